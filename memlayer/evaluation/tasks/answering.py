"""How each condition answers an item.

    prompt + each choice ─► encode, once ─► logits of every condition ─► log-likelihoods
    prompt ─► generate, once a condition ─► text

Conditions are those of `memlayer.evaluation.perplexity`: ``backbone`` (the window alone),
``no_memory``, ``memory``, ``foreign_memory`` and ``dense`` (the bare backbone over memory and
prompt).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from memlayer.errors import ConfigError, DataError
from memlayer.evaluation.tasks.holding import HeldMemory, reading, token_ids, windowed
from memlayer.memory import BankReader
from memlayer.memory.readers import StackedReader
from memlayer.model import LongMemModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from memlayer.evaluation.tasks.task import Item
    from memlayer.memory import MemoryReader


@dataclass(frozen=True)
class Likelihoods:
    """What one condition makes of the choices.

    Attributes:
        logs: ``(choices,)``, float64. Log-likelihood of each whole choice, nats.
        greedy: ``(choices,)``, bool. Whether greedy decoding writes the choice.
        tokens: ``(choices,)``, int64. Tokens of each.
    """

    logs: Tensor
    greedy: Tensor
    tokens: Tensor


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """A model with the memories that its conditions read.

    Attributes:
        model: a wrapped model or a backbone alone.
        tokenizer: its own.
        window: tokens of the local window.
        memories: filled for the item at hand, by condition; none for a backbone alone.
        overflow: takes what a prompt has beyond the window; None where there is no memory.
        dense_context: tokens of the condition ``dense``, or None.
    """

    model: LongMemModel | PreTrainedModel
    tokenizer: Any
    window: int
    memories: Mapping[str, HeldMemory]
    overflow: HeldMemory | None
    dense_context: int | None

    @property
    def backbone(self) -> PreTrainedModel:
        """The bare model."""
        return self.model.backbone if isinstance(self.model, LongMemModel) else self.model

    def _prompt(self, item: Item) -> Tensor:
        prompt = token_ids(self.tokenizer, item.prompt)
        if not len(prompt):
            raise DataError(f"item {item.id!r} has an empty prompt, after which nothing is likely")
        return prompt

    # ---------------------------------------------------------------- likelihoods

    def choose(self, item: Item) -> dict[str, Likelihoods]:
        """Give the likelihoods of an item's choices under every condition."""
        prompt = self._prompt(item)
        choices = [token_ids(self.tokenizer, choice) for choice in item.choices]
        longest = max(len(choice) for choice in choices)
        if longest >= self.window:
            raise ConfigError(
                f"segment_length must be more than the {longest} tokens of the longest choice of "
                f"item {item.id!r}, got {self.window}"
            )
        # Where every choice is one token, one row answers for all.
        rows = [choice[:0] for choice in choices[:1]] if longest == 1 else choices
        room = self.window - (longest if longest > 1 else 0)
        head, tail = prompt[: max(0, len(prompt) - room)], prompt[-room:]
        ids, mask = joined(tail, rows)
        kept = torch.arange(len(tail) - 1, len(tail) - 1 + longest)
        device = self.backbone.device
        ids, mask, kept = ids.to(device), mask.to(device), kept.to(device)
        found = {}
        if isinstance(self.model, LongMemModel):
            model = self.model
            states = model.encode(ids, mask)
            found["backbone"] = likelihoods(model.backbone_logits(states, kept), choices)
            for name, reader in self._readers(head, len(ids)):
                logits = model.read(states, reader, logits_to_keep=kept)
                found[name] = likelihoods(logits, choices)
        else:
            output = self.backbone(
                input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept
            )
            found["backbone"] = likelihoods(output.logits, choices)
        if self.dense_context is not None:
            before = torch.cat([token_ids(self.tokenizer, item.memory), prompt])
            before = before[-(self.dense_context - longest) :]
            found["dense"] = likelihoods(self._dense_logits(before, rows, longest), choices)
        return found

    def _readers(self, head: Tensor, rows: int) -> Iterator[tuple[str, MemoryReader | None]]:
        """Give what each condition reads, for rows of one prompt whose head the window lacks."""
        yield "no_memory", None
        beyond = []
        if len(head) and self.overflow is not None:
            self.overflow.bank.clear()
            self.overflow.add(head)
            beyond = [BankReader(self.overflow.bank, rows)]
        for name, held in self.memories.items():
            yield name, StackedReader([BankReader(held.bank, rows), *beyond])

    def _dense_logits(self, before: Tensor, rows: Sequence[Tensor], longest: int) -> Tensor:
        """Give logits ``(rows, longest, V)`` after a long text, which is read once."""
        backbone = self.backbone
        before = before.unsqueeze(0).to(backbone.device)
        cache = DynamicCache(config=backbone.config)
        if before.shape[1] > 1:
            backbone(input_ids=before[:, :-1], past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(len(rows))
        ids, mask = (part.to(backbone.device) for part in joined(before[0, -1:].cpu(), rows))
        past = mask.new_ones(len(rows), before.shape[1] - 1)
        output = backbone(
            input_ids=ids, attention_mask=torch.cat([past, mask], dim=1), past_key_values=cache
        )
        logits: Tensor = output.logits[:, :longest]
        return logits

    # ---------------------------------------------------------------- generation

    def write(self, item: Item, max_new_tokens: int) -> dict[str, str]:
        """Give each condition's greedy continuation of an item's prompt, up to the line's end."""
        if max_new_tokens >= self.window:
            raise ConfigError(
                f"segment_length must be more than the {max_new_tokens} tokens that an answer may "
                f"have, got {self.window}"
            )
        prompt = self._prompt(item)
        short = prompt[-(self.window - max_new_tokens) :]
        texts = {}
        if isinstance(self.model, LongMemModel):
            model = self.model
            with model.disable_adapter():
                texts["backbone"] = self._generated(model, short, max_new_tokens)
            with windowed(model, self.window):
                with model.disable_memory():
                    texts["no_memory"] = self._generated(model, short, max_new_tokens)
                for name, held in self.memories.items():
                    # The prompt's head goes to memory inside of generate().
                    with reading(model, held.bank):
                        texts[name] = self._generated(model, prompt, max_new_tokens)
        else:
            texts["backbone"] = self._generated(self.model, short, max_new_tokens)
        if self.dense_context is not None:
            before = torch.cat([token_ids(self.tokenizer, item.memory), prompt])
            before = before[-(self.dense_context - max_new_tokens) :]
            texts["dense"] = self._generated(self.backbone, before, max_new_tokens)
        return texts

    def _generated(self, model: Any, ids: Tensor, max_new_tokens: int) -> str:
        ids = ids.unsqueeze(0).to(self.backbone.device)
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        text: str = self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        return text.split("\n", 1)[0].strip()


def joined(prompt: Tensor, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Put each row behind the prompt: ids and mask, ``(rows, T)``, padded on the right."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), len(prompt) + longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        whole = torch.cat([prompt, row])
        ids[number, : len(whole)] = whole
        mask[number, : len(whole)] = 1
    return ids, mask


def likelihoods(logits: Tensor, choices: Sequence[Tensor]) -> Likelihoods:
    """Score choices by logits ``(rows, longest, V)``; one row stands for all."""
    logs = torch.log_softmax(logits.float(), dim=-1).cpu()
    best = logs.argmax(dim=-1)
    sums, greedy = [], []
    for number, choice in enumerate(choices):
        row = number if len(logs) > 1 or len(choices) == 1 else 0
        places = torch.arange(len(choice))
        sums.append(logs[row, places, choice].double().sum())
        greedy.append(bool((best[row, places] == choice).all()))
    return Likelihoods(
        logs=torch.stack(sums),
        greedy=torch.tensor(greedy),
        tokens=torch.tensor([len(choice) for choice in choices]),
    )
