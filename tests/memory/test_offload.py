"""Keys and values in main memory: the same answers, and only what was found on the device."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import memlayer
from memlayer.attention import memory_attention
from memlayer.errors import ConfigError
from memlayer.memory.offload import bring

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_chunk_is_brought_once_and_stands_where_it_is_looked_for(device, dtype, monkeypatch):
    # Pieces of two chunks: all borders are crossed.
    monkeypatch.setattr("memlayer.memory.offload._PIECE_BYTES", 2 * 4 * 8 * dtype.itemsize)
    generator = torch.Generator().manual_seed(0)
    stores = [torch.randn(50, 4, 8, generator=generator).to(dtype) for _ in range(2)]
    places = torch.randint(50, (2, 3, 5, 4), generator=generator)
    copies, positions = bring(stores, places.to(device), torch.device(device))
    assert positions.shape == places.shape
    for store, copied in zip(stores, copies, strict=True):
        assert len(copied) == len(places.unique()) < 50
        assert (copied.device.type, copied.dtype) == (device, dtype)
        assert torch.equal(copied[positions].cpu(), store[places])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_computes_the_same_forward_and_backward(family, device, make_backbone):
    """Rows with padding between them, evictions, two updates before a backward."""
    ids = torch.randint(90, (2, 48), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    found = []
    for storage in ("device", "host"):
        config = memlayer.LongMemConfig(
            backend="torch",
            memory_size=64,
            top_k=16,
            segment_length=16,
            memory_layers=(1, 3),
            memory_storage=storage,
        )
        model = memlayer.wrap(make_backbone(family).to(device), config).train()
        for start in range(0, 40, 8):
            model.memorize(ids[:, start : start + 8], attention_mask=mask[:, start : start + 8])
        torch.manual_seed(0)  # dropout
        output = model(ids[:, :16], labels=ids[:, :16], update_memory=True)
        output.loss.backward()
        gradients = [p.grad for p in model.side_network.parameters() if p.grad is not None]
        found.append((output.logits, gradients, model.memory))
    (logits, gradients, near), (others, other_gradients, far) = found
    assert torch.equal(logits, others)
    assert len(gradients) == len(other_gradients) > 10
    for mine, other in zip(gradients, other_gradients, strict=True):
        assert torch.equal(mine, other)
    assert near._ring.keys.device.type == device
    for plane in (far._ring.keys, far._ring.values, far._ring.chunk_keys):
        assert plane.device.type == "cpu"


def test_what_was_brought_outlives_what_is_written_later(make_numbered_bank, feed):
    bank = make_numbered_bank(capacity=64, storage="host")
    feed(bank, 0, 64)
    queries = torch.randn(1, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    query = queries.clone().requires_grad_()
    retrieved = bank.retrieve(queries)
    keys, values, _ = retrieved.gather()
    attended, _ = memory_attention(query, retrieved, 0.5)
    feed(bank, 64, 400)
    again = retrieved.gather()
    assert torch.equal(again[0], keys)
    assert torch.equal(again[1], values)
    attended.sum().backward()
    assert query.grad.isfinite().all()


def test_another_storage_is_refused(make_numbered_bank):
    with pytest.raises(ConfigError, match="storage must be one of device, host, got 'disk'"):
        make_numbered_bank(storage="disk")


LOOK = """
import sys
import torch
from memlayer.memory import MemoryBank
from memlayer.plugins import default_plugins

def private():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

torch_backend = default_plugins().backends.get("torch")
bank = MemoryBank(
    capacity=32768, chunk_size=16, top_k=32, num_layers=1, num_key_value_heads=2, head_dim=128,
    make_index=lambda lanes: torch_backend(lanes=lanes, dim=128, device="cpu"), storage="host",
)
queries = torch.randn(1, 4, 3, 128)
torch.randn(1, 256, 128) @ torch.randn(1, 128, 4096)  # what a product allocates once
before = private()
bank.load(sys.argv[1], verify=False)
found = bank.retrieve(queries)
print(private() - before, len(bank), int(found.found.sum()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_saved_bank_is_read_from_its_file_without_being_in_main_memory(tmp_path):
    torch_backend = memlayer.plugins.default_plugins().backends.get("torch")
    bank = memlayer.memory.MemoryBank(
        capacity=32768,
        chunk_size=16,
        top_k=32,
        num_layers=1,
        num_key_value_heads=2,
        head_dim=128,
        make_index=lambda lanes: torch_backend(lanes=lanes, dim=128, device="cpu"),
    )
    keys = torch.randn(1, 2, 32768, 128)
    bank.write(keys, keys)
    bank.save(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    result = subprocess.run(
        [sys.executable, "-c", LOOK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    grown, held, found = map(int, result.stdout.split())
    assert (held, found) == (32768, 24)
    # Of 64 MiB of keys and values little but the index, 4 MiB.
    assert size > 64 * 2**20
    assert 0 < grown * 1024 < 16 * 2**20
