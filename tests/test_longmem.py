"""The paper's own model: its released checkpoints compute here what they compute there."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

import memlayer
from memlayer.discovery import discover
from memlayer.errors import CheckpointError, ConfigError, DataError
from memlayer.longmem import (
    LongMemGPTConfig,
    LongMemGPTForCausalLM,
    ReleasedSettings,
    convert_longmem,
    fairseq_tokenizer,
)
from memlayer.memory import BankReader
from memlayer.testing import DecoderConformance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYER = "decoder.layers."
BACKBONE = "decoder.pretrained_model.decoder.model."
RUNS = ("seg0", "seg1", "seg2", "seg3", "probe")
CASES = ("a", "a_init", "b")


class Reference:
    """One case of the reference numbers: configuration, weights and what came out."""

    def __init__(self, shared: Path, case: str) -> None:
        with safe_open(shared / "reference" / "model.safetensors", "pt") as file:
            self.config: dict[str, Any] = json.loads(file.metadata()["cases"])[case]
            every = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.case = case
        self._every = every
        self.state = self._weights("a" if case == "a_init" else case)
        if case == "a_init":
            self.state = self._released_start(self.state)

    def _weights(self, case: str) -> dict[str, Tensor]:
        prefix = f"{case}.weight."
        return {n.removeprefix(prefix): w for n, w in self._every.items() if n.startswith(prefix)}

    def _released_start(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy backbone block f * i + 1 into side layer i, by the released rule."""
        made = {name: weight for name, weight in state.items() if name.startswith(BACKBONE)}
        parts = {"self_attn": "attn", "fc1": "mlp.fc_in", "fc2": "mlp.fc_out", "ln_1": "ln_1"}
        for name, weight in state.items():
            if name.endswith("memory_bias"):
                made[name] = torch.zeros_like(weight)
            elif name.startswith(LAYER):
                number, part, rest = name.removeprefix(LAYER).split(".", 2)
                block = self.config["layer_reduction_factor"] * int(number) + 1
                made[name] = state[f"{BACKBONE}transformer.h.{block}.{parts[part]}.{rest}"]
            elif name.startswith("decoder.layer_norm."):
                made[name] = state[f"{BACKBONE}transformer.ln_f.{name.rpartition('.')[2]}"]
        return {name: weight.clone() for name, weight in made.items()}

    def __call__(self, run: str, name: str) -> Tensor:
        own = f"{self.case}.{run}.{name}"
        return self._every[own] if own in self._every else self._every[f"a.{run}.{name}"]

    @property
    def settings(self) -> ReleasedSettings:
        return ReleasedSettings(
            memory_layer=self.config["retrieval_layer_index"],
            chunk_size=self.config["chunk_size"],
            top_k=self.config["k"],
            memory_size=1024,
            segment_length=32,
        )


@pytest.mark.parametrize("case", CASES)
def test_a_converted_checkpoint_computes_what_the_released_code_computes(
    case: str, shared: Path, tmp_path: Path
) -> None:
    reference = Reference(shared, case)
    save_file(reference.state, tmp_path / "released.safetensors")
    convert_longmem(tmp_path / "released.safetensors", tmp_path / "run", reference.settings)
    model = memlayer.load(tmp_path / "run", backend="torch")
    largest = 0.0

    def compare(run: str, name: str, actual: Tensor) -> None:
        nonlocal largest
        error = float((actual - reference(run, name)).abs().max())
        assert error < 2e-5, (run, name)
        largest = max(largest, error)

    reader = model.side_network.readers[0]
    with torch.no_grad():
        for run in RUNS:
            ids = reference(run, "tokens")
            with model.disable_adapter():
                compare(run, "backbone_logits", model(ids).logits)
            states = model.encode(ids)
            compare(run, "k", states.keys[0][0].transpose(0, 1).flatten(1))
            compare(run, "v", states.values[0][0].transpose(0, 1).flatten(1))
            queries: list[Tensor] = []
            attention = model.side_network.layers[reader].attn
            with attention.q_proj.register_forward_hook(lambda *a: queries.append(a[2])):  # noqa: B023
                logits = model.read(states, model.memory)
            compare(run, "logits", logits)
            compare(run, "query", queries[0][0])
            if len(model.memory):
                heads = queries[0].unflatten(2, (model.parts.num_attention_heads, -1))
                found = BankReader(model.memory).retrieve(heads.transpose(1, 2), layer=0)
                assert torch.equal(found.ids[0], reference(run, "index")), run
            if run != "probe":
                model.remember(states)
    print(f"{case}: largest difference {largest:.2g}")


class TestTheBackbone(DecoderConformance):
    def make_backbone(self) -> PreTrainedModel:
        torch.manual_seed(0)
        config = LongMemGPTConfig(
            vocab_size=97, hidden_size=48, num_hidden_layers=4, num_attention_heads=6
        )
        model = LongMemGPTForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.15)
        return model

    # The released side network is another function than the block that it starts as.
    test_an_untrained_network_without_memory_is_the_backbone = None

    def test_its_adapter_is_what_is_found(self) -> None:
        backbone = self._backbone()
        described, found = memlayer.wrap(backbone).parts, discover(backbone)
        assert found.description.attention == described.description.attention
        for name in ("query", "key", "value"):
            own, other = getattr(found.description, name), getattr(described.description, name)
            assert own.module == other.module
            assert own.heads == tuple(range(6))
        assert found.scalings == pytest.approx(described.scalings, rel=1e-4)
        assert found.max_positions is described.max_positions is None


@pytest.fixture
def released(shared: Path) -> Reference:
    return Reference(shared, "b")


def test_a_fairseq_file_is_read_without_running_its_code(
    released: Reference, tmp_path: Path
) -> None:
    told = argparse.Namespace(retrieval_layer_index=3, chunk_size=2, k=8)
    extra = {"decoder.version": torch.tensor([3.0])}
    torch.save({"model": released.state | extra, "args": told}, tmp_path / "c.pt")
    settings = ReleasedSettings(memory_size=64)
    config = convert_longmem(tmp_path / "c.pt", tmp_path / "run", settings).memory_config
    assert (config.memory_layers, config.chunk_size, config.top_k) == ((3,), 2, 8)

    torch.save({"model": released.state, "args": Path("x")}, tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match=r"more than tensors and plain values.*\.safetens"):
        convert_longmem(tmp_path / "code.pt", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"x": 3}}, "its 'model' has int under 'x', where a tensor"),
        ({"model": {3: torch.zeros(1)}}, "its 'model' has Tensor under 3, where a tens"),
        ({"cfg": {"model": {"k": "many"}}}, "says k='many', which is no whole number"),
        ({"cfg": 3, "args": {"chunk_size": 2.5}}, r"says chunk_size=2\.5, which is no whole num"),
    ],
)
def test_odd_values_in_a_file_are_named(
    released: Reference, tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    torch.save({"model": released.state} | content, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=message):
        convert_longmem(tmp_path / "c.pt", tmp_path / "run", ReleasedSettings(memory_size=64))


@pytest.mark.parametrize("name", ["chunk_size", "top_k"])
def test_a_setting_of_nothing_is_refused(
    released: Reference, tmp_path: Path, name: Literal["chunk_size", "top_k"]
) -> None:
    save_file(released.state, tmp_path / "c.safetensors")
    settings = replace(ReleasedSettings(memory_size=64), **{name: 0})
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        convert_longmem(tmp_path / "c.safetensors", tmp_path / "run", settings)


def test_what_is_no_longmem_checkpoint_is_refused(released: Reference, tmp_path: Path) -> None:
    def convert(state: Any, settings: ReleasedSettings = released.settings) -> None:
        save_file(state, tmp_path / "c.safetensors")
        convert_longmem(tmp_path / "c.safetensors", tmp_path / "run", settings)

    with pytest.raises(CheckpointError, match=r"cannot read .*none\.pt"):
        convert_longmem(tmp_path / "none.pt", tmp_path / "run")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="has no entry 'model'"):
        convert_longmem(tmp_path / "list.pt", tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"it has a tensor 'encoder\.x'"):
        convert(released.state | {"encoder.x": torch.zeros(1)})
    gate = f"{LAYER}1.self_attn.memory_bias"
    with pytest.raises(CheckpointError, match="4 backbone blocks, 2 side layers and 0 gates"):
        convert({name: weight for name, weight in released.state.items() if name != gate})
    head = f"{BACKBONE}lm_head.bias"
    with pytest.raises(CheckpointError, match=r"lm_head.bias is missing, expected \(64,\)"):
        convert({name: weight for name, weight in released.state.items() if name != head})
    with pytest.raises(ConfigError, match=r"memory_layer must be one of 2 to 3, .* got 1"):
        convert(released.state, ReleasedSettings(memory_layer=1))
    assert not (tmp_path / "run").exists()


def test_the_residual_behind_the_norm_is_for_the_papers_start_only() -> None:
    with pytest.raises(ConfigError, match=r'normed_residual needs side_init="backbone", got .repl'):
        memlayer.LongMemConfig(normed_residual=True)
    with pytest.raises(ConfigError, match="normed_residual must be True or False, got 1"):
        memlayer.LongMemConfig(normed_residual=1, side_init="backbone")  # type: ignore[arg-type]


# What GPT-2's splitting does with it is what SmolLM2's does, which takes digits one by one.
PROSE = "  It's the \u201cold\u201d mill;\n\n they said: caf\u00e9, na\u00efve... \tDon't!  "


@pytest.fixture(scope="session")
def vocabulary(smollm2: memlayer.Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a real byte-pair vocabulary as fairseq keeps it: ids in another order."""
    folder = tmp_path_factory.mktemp("vocabulary")
    model = json.loads(smollm2.tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "encoder.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [" ".join(pair) for pair in model["merges"]]
    text = "\n".join(["#version: 0.2", *merges, ""])
    (folder / "vocab.bpe").write_text(text, encoding="utf-8")
    order = torch.randperm(len(model["vocab"]), generator=torch.Generator().manual_seed(0))
    lines = [f"{number} 7" for number in order.tolist()] + ["madeupword0000 0"]
    (folder / "dict.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_text_gets_the_ids_of_fairseqs_dictionary(
    vocabulary: Path, smollm2: memlayer.Backbone, tmp_path: Path
) -> None:
    fairseq_tokenizer(vocabulary).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    lines = (vocabulary / "dict.txt").read_text(encoding="utf-8").splitlines()
    place = {line.split()[0]: number + 4 for number, line in enumerate(lines)}
    ids = tokenizer(PROSE).input_ids
    assert ids == [place[str(number)] for number in smollm2.tokenizer(PROSE).input_ids]
    assert tokenizer.decode(ids) == PROSE
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert (tokenizer.eos_token_id, tokenizer.unk_token_id) == (2, 3)
    assert len(tokenizer) == len(lines) + 4


def test_a_vocabulary_that_does_not_fit_is_refused(
    vocabulary: Path, released: Reference, tmp_path: Path
) -> None:
    save_file(released.state, tmp_path / "c.safetensors")
    with pytest.raises(DataError, match=r"has 49157 tokens, .*c\.safetensors has 64; give"):
        convert_longmem(tmp_path / "c.safetensors", tmp_path / "run", vocabulary=vocabulary)
    folder = shutil.copytree(vocabulary, tmp_path / "other")
    with (folder / "dict.txt").open("a", encoding="utf-8") as file:
        file.write("99999 1\n")
    with pytest.raises(DataError, match=r"dict\.txt has id 99999, which encoder\.json has not"):
        fairseq_tokenizer(folder)
    (folder / "encoder.json").write_text("[1]")
    with pytest.raises(DataError, match=r"encoder\.json is no table of tokens"):
        fairseq_tokenizer(folder)
    (folder / "dict.txt").unlink()
    with pytest.raises(DataError, match=r"cannot read .*dict\.txt .* a fairseq vocabulary is dict"):
        fairseq_tokenizer(folder)
    (folder / "dict.txt").write_text("")
    (folder / "encoder.json").write_text("{}")
    with pytest.raises(DataError, match="other do not belong together"):
        fairseq_tokenizer(folder)
