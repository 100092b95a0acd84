"""One item's memory in a bank, carried on to the next item where that continues the same text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from memlayer.memory import MemoryBank
    from memlayer.model import LongMemModel


class HeldMemory:
    """A bank and the text that it holds.

    Args:
        model: whose keys and values are stored; its own memory stays as it is.
        tokenizer: the model's.
        size: tokens that the bank holds; the model's ``memory_size`` if None.

    Attributes:
        bank: what `hold` filled.
    """

    def __init__(self, model: LongMemModel, tokenizer: Any, size: int | None = None) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._text = ""
        self.bank = model.new_memory(size)

    def hold(self, text: str) -> None:
        """Make the bank hold a text; nothing is read again where it continues what it held.

        Such a text is tokenised in the pieces in which it came.
        """
        if text == self._text:
            return
        if not self._text or not text.startswith(self._text):
            self.bank.clear()
            self._text = ""
        ids = token_ids(self._tokenizer, text[len(self._text) :])
        self._text = text
        if len(ids):
            self.add(ids)

    def add(self, ids: Tensor) -> None:
        """Append token ids ``(n,)``, int64, which `hold` will know nothing of."""
        with reading(self._model, self.bank):
            self._model.memorize(ids.unsqueeze(0).to(self._model.device), keep_text=False)


@contextmanager
def reading(model: LongMemModel, bank: MemoryBank) -> Iterator[None]:
    """Let a model use another bank as its memory while this is entered."""
    own, model.memory = model.memory, bank
    try:
        yield
    finally:
        model.memory = own


@contextmanager
def windowed(model: LongMemModel, length: int) -> Iterator[None]:
    """Let a model generate in a window of so many tokens while this is entered."""
    own = model.memory_config
    model.memory_config = replace(own, segment_length=length)
    try:
        yield
    finally:
        model.memory_config = own


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """Give the token ids of a text, ``(n,)``, int64, without special tokens."""
    # verbose: no warning that a long text is longer than the tokenizer thinks models take.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)
