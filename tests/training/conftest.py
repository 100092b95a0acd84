"""A tiny wrapped GPT-2 (with dropout) and a few documents to train it on."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import memlayer
from memlayer.data import Document
from memlayer.training import TrainingOptions

if TYPE_CHECKING:
    from memlayer.model import LongMemModel


@pytest.fixture
def make_model(tiny_checkpoint: Callable[[str], Path]) -> Callable[..., LongMemModel]:
    """Give a function that wraps a tiny backbone, always with the same weights."""

    def make(family: str = "gpt2", **settings: object) -> LongMemModel:
        backbone = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family))
        small = {
            "backend": "torch",
            "segment_length": 16,
            "memory_size": 64,
            "top_k": 8,
            "chunk_size": 4,
        }
        return memlayer.wrap(backbone, memlayer.LongMemConfig(**(small | settings)))

    return make


@pytest.fixture
def tokenizer(tiny_checkpoint: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    """Give the tokenizer of the tiny backbones: one token a byte."""
    return AutoTokenizer.from_pretrained(tiny_checkpoint("gpt2"))


@pytest.fixture
def documents() -> list[Document]:
    """Give six documents of 40 to 140 tokens: none is a multiple of the segment length."""
    choose = random.Random(0)
    words = ["memory", "layer", "chunk", "token", "bank", "key", "value", "segment", "gate"]
    return [
        Document(
            id=f"document-{number}",
            text=" ".join(choose.choice(words) for _ in range(7 + 3 * number)) + ".",
        )
        for number in range(6)
    ]


@pytest.fixture
def make_options() -> Callable[..., TrainingOptions]:
    """Give a function that makes options for a short run; the fields it is given win."""

    def make(**fields: object) -> TrainingOptions:
        short = {
            "steps": 6,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "eval_every": None,
            "eval_tokens": 64,
            "eval_documents": 2,
            "save_every": None,
        }
        return TrainingOptions(**(short | fields))

    return make


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the picture out, which takes longer than the training of a tiny model."""
    monkeypatch.setattr("memlayer.training.loop.plotting_problem", lambda: "not drawn here")
