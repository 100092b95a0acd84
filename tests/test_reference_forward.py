"""The whole memory-augmented forward against its equations, written plainly in float64.

No batch, no cache, no blocks, no hooks: one token, one head at a time where that is what the
equation says. Weights are read out of the models; nothing of Hugging Face's forward runs here.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it

import memlayer

HEADS, DIM = 4, 8


class Weights:
    """Float64 copies of a module's parameters, by name."""

    def __init__(self, module):
        self.named = {name: p.detach().double() for name, p in module.named_parameters()}

    def __getitem__(self, name):
        return self.named[name]

    def linear(self, name, x):
        bias = self.named.get(f"{name}.bias")
        y = x @ self.named[f"{name}.weight"].T
        return y if bias is None else y + bias

    def conv1d(self, name, x):
        return x @ self.named[f"{name}.weight"] + self.named[f"{name}.bias"]

    def layer_norm(self, name, x, eps=1e-5):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (variance + eps).sqrt() * self[f"{name}.weight"] + self[f"{name}.bias"]

    def rms_norm(self, name, x, eps=1e-6):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * self[f"{name}.weight"]


def rotate(x, theta=10000.0):
    """RoPE: pair (i, i + D/2) of token t turned by t / theta^(2i/D). ``x`` is (T, D)."""
    out = torch.empty_like(x)
    half = x.shape[1] // 2
    for t in range(x.shape[0]):
        for i in range(half):
            angle = t / theta ** (2 * i / x.shape[1])
            a, b = x[t, i], x[t, i + half]
            out[t, i] = a * math.cos(angle) - b * math.sin(angle)
            out[t, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def attend(queries, keys, values, rotary, memory, gate):
    """Causal attention head by head, fused with memory; lists of (T, D), one a head."""
    group = len(queries) // len(keys)
    outputs = []
    for h, query in enumerate(queries):
        key, value = keys[h // group], values[h // group]
        q, k = (rotate(query), rotate(key)) if rotary else (query, key)
        rows = []
        for t in range(query.shape[0]):
            local = torch.softmax(q[t] @ k[: t + 1].T / math.sqrt(DIM), -1) @ value[: t + 1]
            if memory is not None and (found := memory.best(query[t], h // group)) is not None:
                recalled_k, recalled_v = found
                if memory.one_softmax:
                    # Keys that are not rotated stand at position 0, the query at t.
                    scores = torch.cat([k[: t + 1] @ q[t], recalled_k @ q[t]]) / math.sqrt(DIM)
                    scores[t + 1 :] += gate[h]
                    both = torch.cat([value[: t + 1], recalled_v])
                    rows.append(torch.softmax(scores, -1) @ both)
                    continue
                weights = torch.softmax(query[t] @ recalled_k.T / math.sqrt(DIM), -1)
                share = torch.sigmoid(gate[h])
                local = (1 - share) * local + share * (weights @ recalled_v)
            rows.append(local)
        outputs.append(torch.stack(rows))
    return torch.cat(outputs, dim=-1)


def heads_of(x):
    return list(x.split(DIM, dim=-1))


class Llama:
    rotary = True

    def embed(self, w, ids):
        return w["model.embed_tokens.weight"][ids]

    def query_key_value(self, w, x):
        x = w.rms_norm("input_layernorm", x)
        return [heads_of(w.linear(f"self_attn.{n}_proj", x)) for n in "qkv"]

    def attention(self, w, x, memory=None, gate=None):
        return w.linear("self_attn.o_proj", attend(*self.query_key_value(w, x), True, memory, gate))

    def layer(self, w, x, memory=None, gate=None):
        x = x + self.attention(w, x, memory, gate)
        y = w.rms_norm("post_attention_layernorm", x)
        gated = F.silu(w.linear("mlp.gate_proj", y)) * w.linear("mlp.up_proj", y)
        return x + w.linear("mlp.down_proj", gated)

    def norm(self, w, x):
        return w.rms_norm("norm", x)

    def head(self, w, x):
        return (
            x @ w["lm_head.weight"].T
            if "lm_head.weight" in w.named
            else (x @ w["model.embed_tokens.weight"].T)
        )

    layers = "model.layers"


class Gpt2:
    rotary = False

    def embed(self, w, ids):
        return w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: len(ids)]

    def query_key_value(self, w, x):
        joint = w.conv1d("attn.c_attn", w.layer_norm("ln_1", x))
        return [heads_of(part) for part in joint.chunk(3, dim=-1)]

    def attention(self, w, x, memory=None, gate=None):
        return w.conv1d("attn.c_proj", attend(*self.query_key_value(w, x), False, memory, gate))

    def layer(self, w, x, memory=None, gate=None):
        x = x + self.attention(w, x, memory, gate)
        inner = F.gelu(w.conv1d("mlp.c_fc", w.layer_norm("ln_2", x)), approximate="tanh")
        return x + w.conv1d("mlp.c_proj", inner)

    def norm(self, w, x):
        return w.layer_norm("norm", x)

    def head(self, w, x):
        return x @ w["transformer.wte.weight"].T

    layers = "transformer.h"


class Opt:
    rotary = False

    def embed(self, w, ids):
        positions = w["model.decoder.embed_positions.weight"][2 : 2 + len(ids)]
        return w["model.decoder.embed_tokens.weight"][ids] + positions

    def query_key_value(self, w, x):
        x = w.layer_norm("self_attn_layer_norm", x)
        return [heads_of(w.linear(f"self_attn.{n}_proj", x)) for n in "qkv"]

    def attention(self, w, x, memory=None, gate=None):
        return w.linear(
            "self_attn.out_proj", attend(*self.query_key_value(w, x), False, memory, gate)
        )

    def layer(self, w, x, memory=None, gate=None):
        x = x + self.attention(w, x, memory, gate)
        return x + w.linear("fc2", F.relu(w.linear("fc1", w.layer_norm("final_layer_norm", x))))

    def norm(self, w, x):
        return w.layer_norm("norm", x)

    def head(self, w, x):
        return x @ w["model.decoder.embed_tokens.weight"].T

    layers = "model.decoder.layers"


class Opt350m(Opt):
    def embed(self, w, ids):
        positions = w["model.decoder.embed_positions.weight"][2 : 2 + len(ids)]
        words = w["model.decoder.embed_tokens.weight"][ids]
        return w.linear("model.decoder.project_in", words) + positions

    def query_key_value(self, w, x):
        return [heads_of(w.linear(f"self_attn.{n}_proj", x)) for n in "qkv"]

    def layer(self, w, x, memory=None, gate=None):
        x = w.layer_norm("self_attn_layer_norm", x + self.attention(w, x, memory, gate))
        y = w.linear("fc2", F.relu(w.linear("fc1", x)))
        return w.layer_norm("final_layer_norm", x + y)

    def norm(self, w, x):
        return x

    def head(self, w, x):
        return w.linear("model.decoder.project_out", x) @ w["model.decoder.embed_tokens.weight"].T


PLAIN = {"llama": Llama(), "gpt2": Gpt2(), "opt": Opt(), "opt-350m": Opt350m()}


class PlainMemory:
    """Every token's keys and values, a list a head; the chunks found by comparing with all."""

    def __init__(self, capacity, chunk_size, top_k, one_softmax):
        self.capacity, self.chunk_size, self.top_k = capacity, chunk_size, top_k
        self.one_softmax = one_softmax
        self.keys, self.values = [], []

    def write(self, keys, values):
        self.keys = [
            torch.cat(pair) for pair in zip(self.keys or [k[:0] for k in keys], keys, strict=True)
        ]
        self.values = [
            torch.cat(pair)
            for pair in zip(self.values or [v[:0] for v in values], values, strict=True)
        ]

    def best(self, query, head):
        if not self.keys:
            return None
        c = self.chunk_size
        last = len(self.keys[head]) // c
        first = max(0, last - self.capacity // c)
        scored = sorted(
            range(first, last),
            key=lambda j: -float(query @ self.keys[head][j * c : (j + 1) * c].mean(0)),
        )
        tokens = [t for j in scored[: self.top_k // c] for t in range(j * c, (j + 1) * c)]
        return (self.keys[head][tokens], self.values[head][tokens]) if tokens else None


def plain_forward(model, family, ids, memory):
    """Equations 1 to 7 of the method for one sequence; gives logits (T, V) and writes memory."""
    plain, side = PLAIN[family], model.side_network
    backbone, norm = Weights(model.backbone), Weights(side)
    (memory_layer,), (reader,) = model.memory_config.memory_layers, side.readers
    hidden = [plain.embed(backbone, ids)]
    for index, layer in enumerate(model.parts.layers):
        weights = Weights(layer)
        if index == memory_layer:
            _, keys, values = plain.query_key_value(weights, hidden[-1])
        hidden.append(plain.layer(weights, hidden[-1]))
    s = hidden[0]
    reduction, depth = model.memory_config.layer_reduction_factor, len(model.parts.layers)
    for number, layer in enumerate(side.layers):
        reads = {"memory": memory, "gate": side.gates[0].double()} if number == reader else {}
        upper, lower = min(reduction * (number + 1), depth), reduction * number
        if model.memory_config.side_init == "replace":
            copied = side.sources[number]
            reached = s + hidden[copied] - hidden[lower]
            s = plain.layer(Weights(layer), reached, **reads) + hidden[upper] - hidden[copied + 1]
            continue
        f = plain.layer(Weights(layer), s, **reads)
        scale = 1.0 if side.scales is None else side.scales[number].double()
        changed = plain.attention(Weights(layer), s, **reads) - plain.attention(Weights(layer), s)
        s = s + scale * (f - s) + (1 - scale) * changed + (hidden[upper] - hidden[lower])
    memory.write(keys, values)
    return plain.head(backbone, plain.norm(norm, s))


@torch.no_grad()
@pytest.mark.parametrize("side_init", ["replace", "identity", "backbone"])
@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("fusion", ["gate", "softmax"])
def test_the_fast_path_computes_the_methods_equations(
    fusion, family, side_init, make_backbone, make_tokens
):
    config = memlayer.LongMemConfig(
        backend="torch", memory_size=48, chunk_size=4, top_k=12, segment_length=20,
        side_init=side_init, fusion=fusion,
    )  # fmt: skip
    model = memlayer.wrap(make_backbone(family), config).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.side_network.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    for gate in model.side_network.gates:
        gate += torch.randn(gate.shape, generator=generator)
    if model.side_network.scales is not None:
        model.side_network.scales += 0.7
    memory = PlainMemory(48, 4, 12, one_softmax=fusion == "softmax")
    # The last segments read a memory that has dropped its oldest chunks, and a tail of 2 waits.
    for step, tokens in enumerate((20, 18, 20, 20)):
        ids = make_tokens(1, tokens, seed=step)
        expected = plain_forward(model, family, ids[0], memory)
        got = model(ids, update_memory=True).logits[0].double()
        scale = expected.abs().max()
        assert ((got - expected).abs().max() / scale).item() < 1e-5
    assert len(model.memory) == 48
