"""Train a small GPT-2 from nothing, to have a backbone whose every token of training is known.

    python benchmarks/from_scratch.py --data FOLDER --output RUN/backbone
    python benchmarks/reference.py --data FOLDER --output RUN --backbone RUN/backbone ...
    python benchmarks/reference_report.py --data FOLDER --run RUN --backbone RUN/backbone ...

A byte-level BPE tokenizer and the model are made of the train documents that
benchmarks/reference.py reads; the side network then learns from the same ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import reference
import torch
from lora import train_without_memory
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from memlayer.data import tokenize_documents
from memlayer.training import TrainingOptions

END = "<|endoftext|>"


def main() -> None:
    """Parse, make the tokenizer, train, save."""
    arguments = parse(sys.argv[1:])
    documents = reference.read_documents(Path(arguments.data), "train", arguments)
    bytes_of_tokens = ByteLevelBPETokenizer()
    bytes_of_tokens.train_from_iterator(
        (document.text for document in documents),
        vocab_size=arguments.vocabulary,
        special_tokens=[END],
        show_progress=False,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_of_tokens._tokenizer, bos_token=END, eos_token=END
    )
    torch.manual_seed(arguments.seed)
    end = tokenizer.eos_token_id
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=arguments.segment_length,
            n_embd=arguments.width,
            n_layer=arguments.layers,
            n_head=arguments.heads,
            bos_token_id=end,
            eos_token_id=end,
        )
    ).to(arguments.device)
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{weights:,} weights, {len(documents)} documents", flush=True)
    began = time.perf_counter()

    def say(step: int, loss: float) -> None:
        if step % 50 == 0 or step == arguments.steps:
            seconds = time.perf_counter() - began
            print(json.dumps({"step": step, "loss": loss, "seconds": seconds}), flush=True)

    tokens = train_without_memory(
        model.train(),
        tokenize_documents(documents, tokenizer),
        TrainingOptions(
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            dtype=arguments.dtype,
            seed=arguments.seed,
        ),
        segment_length=arguments.segment_length,
        learning_rate=arguments.learning_rate,
        log=say,
    )
    model.eval().save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(json.dumps({"weights": weights, "tokens": tokens, "output": arguments.output}))


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--characters", type=int, default=240_000, help="of each document")

    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)

    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--segment-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
