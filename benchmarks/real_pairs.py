"""Take keys and queries of a real model reading real text, for the retrieval benchmarks.

    python benchmarks/real_pairs.py --data FILE --output pairs.safetensors [--tokens 1048576]

The backbone reads the documents of a JSON Lines file in windows, one after the other. Of each of
16 key/value heads (those of the layers given) the file holds the chunk keys, that is the mean key
of every four tokens, before any rotary embedding, and queries of the heads that share that
key/value head, from the text that follows the last key: what a memory is asked while it is read.

    keys     (lanes, tokens / 4, dim)  float16, as read
    queries  (lanes, queries, dim)     float16; the first half drawn from the batch of windows that
                                       follows, all heads of the group, the second from the next

An engine may learn from what it is asked. So let it learn from the first half, and measure it with
the second, which is later text.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import memlayer
from memlayer.discovery import parts_of
from memlayer.plugins import default_plugins

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 4
PASSAGES = 2


def texts(path: Path) -> Iterator[str]:
    """Give the text of every document."""
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def windows(path: Path, tokenizer: Any, *, length: int, batch: int) -> Iterator[Tensor]:
    """Give batches ``(batch, length)`` of token ids, documents joined."""
    ids: list[int] = []
    for text in texts(path):
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        while len(ids) >= length * batch:
            yield torch.tensor(ids[: length * batch]).view(batch, length)
            ids = ids[length * batch :]


class Recorder:
    """Hooks that keep what the query and key projections of some layers give.

    Attributes:
        keys, queries: ``(batch, heads, tokens, dim)`` of every layer, in the order of the layers.
    """

    def __init__(self, backbone: PreTrainedModel, layers: list[int]) -> None:
        parts = parts_of(backbone, default_plugins())
        self.group = parts.num_attention_heads // parts.num_key_value_heads
        self.keys: list[Tensor] = []
        self.queries: list[Tensor] = []
        for index in layers:
            attention = parts.attention(parts.layers[index])
            for projection, kept in (
                (parts.description.key, self.keys),
                (parts.description.query, self.queries),
            ):

                def keep(_: Any, __: Any, output: Tensor, kept=kept, projection=projection) -> None:  # type: ignore[no-untyped-def]
                    kept.append(projection.split_heads(output, parts.head_dim))

                attention.get_submodule(projection.module).register_forward_hook(keep)

    def take(self) -> tuple[Tensor, Tensor]:
        """Give keys ``(lanes, tokens, dim)`` and queries ``(lanes, group * tokens, dim)``."""
        keys = torch.cat(self.keys, dim=1).transpose(0, 1).flatten(1, 2)
        queries = torch.cat(self.queries, dim=1).transpose(0, 1).flatten(1, 2)
        queries = queries.unflatten(0, (-1, self.group)).transpose(1, 2).flatten(1, 2)
        self.keys.clear()
        self.queries.clear()
        return keys, queries


@torch.inference_mode()
def main() -> None:
    """Parse, read, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help=".jsonl or .jsonl.gz, 'text'")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--layers", type=int, nargs="+", default=[14, 16, 18, 20, 21, 22])
    parser.add_argument("--lanes", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1_048_576)
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    loaded = memlayer.load_backbone(arguments.backbone, device=arguments.device)
    decoder = loaded.model.to(getattr(torch, arguments.dtype)).eval()
    recorder = Recorder(decoder, arguments.layers)
    # What lies above the last layer is not needed.
    decoder.model.layers = decoder.model.layers[: max(arguments.layers) + 1]
    keys, asked, held, began = [], [], 0, time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    stream = windows(
        arguments.data, loaded.tokenizer, length=arguments.window, batch=arguments.batch
    )
    for ids in stream:
        decoder.model(input_ids=ids.to(arguments.device), use_cache=False)
        new, queries = (part.cpu() for part in recorder.take())
        if held >= arguments.tokens:
            # Drawn, and not every n-th: that would be one head of the group for long.
            drawn = torch.randperm(queries.shape[1], generator=generator)
            asked.append(queries[: arguments.lanes, drawn[: arguments.queries // PASSAGES]].half())
            if len(asked) == PASSAGES:
                break
            continue
        chunks = new[: arguments.lanes].float().unflatten(1, (-1, CHUNK)).mean(2)
        keys.append(chunks.half())
        held += ids.numel()
        if held % 65_536 == 0:
            print(f"{held} tokens, {time.perf_counter() - began:.0f} s", flush=True)
    else:
        parser.error(f"{arguments.data} has {held} tokens, fewer than asked for; lower --tokens")
    save_file(
        {
            "keys": torch.cat(keys, dim=1)[:, : arguments.tokens // CHUNK].contiguous(),
            "queries": torch.cat(asked, dim=1),
        },
        arguments.output,
        metadata={"layers": str(arguments.layers), "backbone": arguments.backbone},
    )


if __name__ == "__main__":
    main()
