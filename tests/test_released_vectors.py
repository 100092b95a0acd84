"""The memory bank and the fused attention against numbers of the released implementation.

Source of the numbers and their equations: reference/README.md beside the project; floats there hold
to 2e-5.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from memlayer.attention import fuse, memory_attention, memory_share
from memlayer.memory import MemoryBank
from memlayer.plugins import default_plugins

CASES = (
    "c2_k8", "c4_k16", "c2_k16_long", "c4_k8_heads6", "c1_k8", "c4_k16_gate0", "c4_k16_exact",
    "c2_k8_fp16store", "empty",
)  # fmt: skip


class Case:
    def __init__(self, path, name):
        with safe_open(path, "pt") as file:
            self.settings = json.loads(file.metadata()["cases"])[name]
            prefix = f"{name}."
            self.tensors = {
                key.removeprefix(prefix): file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118 - a safetensors file is no mapping
                if key.startswith(prefix)
            }
        self.heads = self.settings["num_heads"]
        self.dim = self.settings["embed_dim"] // self.heads
        self.chunk_size, self.top_k = self.settings["chunk_size"], self.settings["k"]

    def __getitem__(self, name):
        return self.tensors[name]

    def split(self, tensor):
        """``(T, 1, E)`` or ``(1, T, E)`` -> ``(1, H, T, d)``."""
        return tensor.reshape(-1, self.heads, self.dim).transpose(0, 1).unsqueeze(0)

    def join(self, tensor):
        """``(1, H, T, d)`` -> ``(T, 1, E)``."""
        return tensor.squeeze(0).transpose(0, 1).flatten(1).unsqueeze(1)

    def bank(self, backend):
        cls = default_plugins().backends.get(backend)
        bank = MemoryBank(
            capacity=1024,
            chunk_size=self.chunk_size,
            top_k=self.top_k,
            num_layers=1,
            num_key_value_heads=self.heads,
            head_dim=self.dim,
            make_index=lambda lanes: cls(lanes=lanes, dim=self.dim, device="cpu"),
            dtype=getattr(torch, self.settings.get("store", "float32")),
        )
        for number in range(len(self.settings["stored_segments"])):
            bank.write(
                self.split(self[f"in.stored_k.{number}"]), self.split(self[f"in.stored_v.{number}"])
            )
        return bank


@pytest.fixture(params=CASES)
def case(request, shared):
    return Case(shared / "reference" / "memory_layer.safetensors", request.param)


def close(got, expected):
    torch.testing.assert_close(got.to(expected.dtype), expected, rtol=0, atol=2e-5)


def chunk_keys_of(bank, case):
    """Read the index back through searches: the score of a unit vector is one coordinate."""
    count = len(bank) // case.chunk_size
    axes = torch.eye(case.dim).expand(1, case.heads, -1, -1)
    found = bank.retrieve(axes, top_k=count * case.chunk_size)
    by_number = found.scores.gather(3, found.ids.argsort(dim=3))
    return by_number[0].transpose(1, 2)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_the_bank_stores_and_finds_what_the_released_code_does(case, backend):
    query = case.split(case["in.hidden"].squeeze(1) @ case["in.q_proj.weight"].T)
    close(case.join(query), case["out.query"])
    bank = case.bank(backend)
    if not case.settings["stored_segments"]:
        assert not bank.is_readable
        return
    found = bank.retrieve(query)
    assert torch.equal(found.ids[0], case["out.index"])
    close(found.scores[0], case["out.score"])
    keys, values, mask = found.gather()
    assert mask.all()
    close(keys[0], case["out.retrieved_k"])
    close(values[0], case["out.retrieved_v"])
    close(chunk_keys_of(bank, case), case["out.chunk_key"])
    stored = bank._ring.keys[0, 0, :, : case["out.bank_k"].shape[1]]
    assert torch.equal(stored, case["out.bank_k"])
    assert torch.equal(bank._ring.values[0, 0, :, : stored.shape[1]], case["out.bank_v"])


def test_the_fused_attention_is_that_of_the_released_code(case):
    hidden = case["in.hidden"].squeeze(1)
    query, key, value = (
        case.split(hidden @ case[f"in.{name}_proj.weight"].T) for name in ("q", "k", "v")
    )
    tokens = hidden.shape[0]
    causal = torch.full((tokens, tokens), -torch.inf).triu(1)
    scaling = case.dim**-0.5
    scores = query @ key.mT * scaling + case["in.position_bias"] + causal
    local = torch.softmax(scores, dim=-1) @ value
    close(case.join(local), case["out.local"])
    fused = local
    bank = case.bank("torch")
    if bank.is_readable:
        found = bank.retrieve(query)
        memory, _ = memory_attention(query, found, scaling)
        close(case.join(memory), case["out.memory"])
        fused = fuse(local, memory, memory_share(case["in.memory_bias"], found.found.any(-1)))
    close(case.join(fused), case["out.fused"])
    close(case.join(fused) @ case["in.out_proj.weight"].T, case["out.output"])
