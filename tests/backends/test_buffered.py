"""Handing vectors from one backend to another."""

from typing import Any

import pytest
import torch

from memlayer import ShapeError
from memlayer.benchmarking import BackendSetup
from memlayer.plugins import default_plugins
from memlayer_backends.buffered import BufferedBackend
from memlayer_backends.torch_exact import TorchBackend


def setups() -> list[str]:
    """Give the built-in backends on the CPU, with all options that they call worth measuring."""
    registry = default_plugins().backends
    found = []
    for name in ("torch", "faiss", "hnswlib"):
        if registry.unavailable_reason(name) is None:
            kind: Any = registry.get(name)
            found += [str(BackendSetup(name=name, options=some)) for some in kind.worth_measuring]
    return found


SETUPS = setups()


def make(text: str, **sizes: Any) -> BufferedBackend:
    setup = BackendSetup.parse(text)
    kind: Any = default_plugins().backends.get(setup.name)
    backend = kind(**{"lanes": 2, "dim": 4, **sizes}, **setup.options)
    assert isinstance(backend, BufferedBackend)
    return backend


def filled(setup: str) -> BufferedBackend:
    """Give a backend whose rings wrap around, of unequal lanes."""
    backend = make(setup)
    keys = torch.randn(2, 900, 4, generator=torch.Generator().manual_seed(0))
    backend.add(keys[:, :700])
    backend.remove_oldest(250, [1])
    backend.remove_oldest(50)
    backend.add(keys[:1, 700:], [0])
    return backend


@pytest.mark.parametrize("taker", SETUPS)
@pytest.mark.parametrize("giver", SETUPS)
def test_vectors_are_taken_over_with_their_ids_and_numbering(giver: str, taker: str) -> None:
    old, new = filled(giver), make(taker)
    queries = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(1))
    before, counts = old.search(queries, 3), old.counts()
    new.take_over(old.buffer)
    assert new.buffer is old.buffer
    assert torch.equal(new.counts(), counts)
    after = new.search(queries, 3)
    agree = (after.ids == before.ids).float().mean()
    assert agree == 1 if (old.exact and new.exact) else agree > 0.8
    new.add(100 * queries[:, :1])
    newest = new.search(queries[:, :1], 1).ids.flatten().tolist()
    assert newest == [900, 700]


@pytest.mark.parametrize(("wrong", "value"), [("lanes", 3), ("dim", 5)])
def test_vectors_of_another_size_are_not_taken_over(wrong: str, value: int) -> None:
    backend = make("torch")
    buffer = backend.buffer
    with pytest.raises(ShapeError, match=f"vectors of {wrong} .* only, got {value}"):
        backend.take_over(make("torch", **{wrong: value}).buffer)
    assert backend.buffer is buffer


def test_vectors_elsewhere_are_not_taken_over() -> None:
    elsewhere = TorchBackend(lanes=2, dim=4, device="meta")
    with pytest.raises(ShapeError, match="vectors of device cpu only, got meta"):
        make("torch").take_over(elsewhere.buffer)


@pytest.mark.parametrize("setup", SETUPS)
def test_only_what_misses_nothing_says_that_it_is_exact(setup: str) -> None:
    assert make(setup).exact is (setup in ("torch", "faiss") or setup.startswith("torch:"))
