"""Small banks, and tokens that say where they come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from memlayer.memory import MemoryBank

HEADS, DIM = 2, 6


@pytest.fixture(scope="session")
def make_numbered_bank() -> Callable[..., MemoryBank]:
    """Make a bank of 2 heads of 6 and chunks of 4, other settings as given."""
    from memlayer.memory import MemoryBank
    from memlayer.plugins import default_plugins

    def make(backend: str = "torch", **settings: object) -> MemoryBank:
        cls = default_plugins().backends.get(backend)
        values = {
            "capacity": 4096,
            "chunk_size": 4,
            "top_k": 8,
            "slack": 8,
            "num_layers": 1,
            "num_key_value_heads": HEADS,
            "head_dim": DIM,
            "identity": "a model",
        }
        return MemoryBank(
            **(values | settings),
            make_index=lambda lanes: cls(lanes=lanes, dim=DIM, device="cpu"),
        )

    return make


def keys_of(offsets: torch.Tensor) -> torch.Tensor:
    """Give keys that say which token they belong to: ``(B, 2, T, 6)``."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(DIM, generator=generator)
    plane = offsets[:, None, :, None].double()
    return torch.sin(plane * (1 + torch.arange(DIM)) * 0.37 + signs).expand(-1, HEADS, -1, -1)


@pytest.fixture(scope="session")
def feed() -> Callable[..., None]:
    """Write tokens ``start`` to ``stop`` of one stream to every row of a bank."""

    def write(bank: MemoryBank, start: int, stop: int, rows: int = 1, mask=None) -> None:
        offsets = torch.arange(start, stop).expand(rows, -1)
        keys = keys_of(offsets).to(bank.dtype)
        sources = torch.stack([offsets % 97, torch.full_like(offsets, -1), offsets], dim=2)
        layers = [keys] * bank.num_layers
        bank.write(layers, [-layer for layer in layers], mask, sources)

    return write


@pytest.fixture(scope="session")
def assert_alike() -> Callable[[MemoryBank, MemoryBank], None]:
    """Compare everything that two banks hold, and what they find."""

    def compare(mine: MemoryBank, expected: MemoryBank) -> None:
        assert mine.rows == expected.rows
        assert torch.equal(mine.lengths, expected.lengths)
        if not mine.rows:
            return
        (kept, waiting), (other, theirs) = (
            (bank._ring.read(bank._ring.written - bank._held_chunks(), bank._ring.written),
             bank._waiting)
            for bank in (mine, expected)
        )  # fmt: skip
        for name in ("keys", "values", "chunk_keys", "sources", "counts"):
            assert torch.equal(getattr(kept, name), getattr(other, name)), name
        for row, count in enumerate(waiting.lengths.tolist()):
            for name in ("keys", "values"):
                assert torch.equal(
                    getattr(waiting, name)[:, row, :, :count],
                    getattr(theirs, name)[:, row, :, :count],
                ), name
            assert torch.equal(waiting.sources[row, :count], theirs.sources[row, :count])
        generator = torch.Generator().manual_seed(1)
        queries = torch.randn(mine.rows, HEADS, 3, DIM, generator=generator).to(mine.dtype)
        found, expected_found = mine.retrieve(queries), expected.retrieve(queries)
        assert torch.equal(found.ids, expected_found.ids)
        assert torch.equal(found.scores, expected_found.scores)
        for one, other in zip(found.gather(), expected_found.gather(), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(mine.look_up(found), expected.look_up(expected_found))

    return compare
