"""A tiny model with a tokenizer of one token a byte, in which memory makes a difference."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import memlayer
from memlayer.backbones import Backbone, load_backbone

if TYPE_CHECKING:
    from memlayer.model import LongMemModel

WINDOW = 48


@pytest.fixture
def loaded(tiny_checkpoint: Callable[[str], Path]) -> Backbone:
    return load_backbone(str(tiny_checkpoint("llama")))


@pytest.fixture
def model(loaded: Backbone, as_trained: Callable[..., LongMemModel]) -> LongMemModel:
    config = memlayer.LongMemConfig(
        backend="torch", memory_size=4096, chunk_size=1, top_k=8, segment_length=WINDOW
    )
    return as_trained(memlayer.wrap(loaded.model, config).eval(), by=0.2, seed=1)


@pytest.fixture
def write_records(tmp_path: Path) -> Callable[..., Path]:
    """Give a function that writes ``{place: records}`` gzipped, and gives the folder."""

    def write(files: dict[str, Sequence[dict[str, Any]]]) -> Path:
        for place, records in files.items():
            path = tmp_path / "data" / f"{place}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(path, "wt", encoding="utf-8") as lines:
                lines.writelines(json.dumps(record) + "\n" for record in records)
        return tmp_path / "data"

    return write
