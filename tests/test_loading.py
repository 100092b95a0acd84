from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import memlayer
from memlayer.errors import ConfigError, MemoryFormatError
from memlayer.loading import ModelNames, load_model
from memlayer.memory.identity import bank_identity, identity_layers


@pytest.fixture
def backbone(tiny_checkpoint: Callable[[str], Path]) -> str:
    return str(tiny_checkpoint("llama"))


@pytest.fixture
def bank(backbone: str, tmp_path: Path) -> Path:
    """Save a bank with settings of its own."""
    loaded = memlayer.load_backbone(backbone)
    config = memlayer.LongMemConfig(memory_layers=(0, 3), memory_size=96, chunk_size=8, top_k=16)
    model = memlayer.wrap(loaded.model, config)
    model.memorize(loaded.tokenizer("Bring the long rope. ", return_tensors="pt").input_ids)
    model.memory.save(tmp_path / "bank")
    return tmp_path / "bank"


def test_a_backbone_takes_the_banks_settings_and_contents(backbone, bank):
    loaded = load_model(ModelNames(backbone=backbone), bank=bank)
    config = loaded.model.memory_config
    assert (config.memory_layers, config.memory_size, config.chunk_size) == ((0, 3), 96, 8)
    assert len(loaded.model.memory) == 21
    assert not loaded.model.training
    assert loaded.tokenizer.decode([40]) == "I"


def test_a_given_size_wins_over_the_banks(backbone, bank):
    loaded = load_model(ModelNames(backbone=backbone, memory_size=64), bank=bank)
    assert loaded.model.memory.capacity == 64


def test_a_banks_settings_can_be_taken_without_its_contents(backbone, bank):
    loaded = load_model(ModelNames(backbone=backbone), bank=bank, remember=False)
    assert loaded.model.memory_config.memory_layers == (0, 3)
    assert len(loaded.model.memory) == 0


def test_other_layers_than_the_banks_are_refused(backbone, bank):
    with pytest.raises(MemoryFormatError, match=r"layers \[1\]"):
        load_model(ModelNames(backbone=backbone, memory_layers=(1,)), bank=bank)


def test_settings_of_a_backbone_are_as_given(backbone):
    names = ModelNames(
        backbone=backbone, memory_layers=(1,), segment_length=48, backend="torch", dtype="bf16"
    )
    loaded = load_model(names)
    config = loaded.model.memory_config
    assert (config.memory_layers, config.segment_length, config.backend) == ((1,), 48, "torch")
    assert str(loaded.model.dtype) == "torch.bfloat16"


def test_a_checkpoint_keeps_its_own_settings(backbone, tmp_path):
    model = memlayer.wrap(
        memlayer.load_backbone(backbone).model, memlayer.LongMemConfig(segment_length=40, top_k=8)
    )
    model.save_pretrained(tmp_path)
    loaded = load_model(ModelNames(checkpoint=str(tmp_path), backend="torch", memory_size=128))
    config = loaded.model.memory_config
    assert (config.segment_length, config.top_k, config.backend) == (40, 8, "torch")
    assert config.memory_size == 128
    assert loaded.backbone == backbone


def test_exactly_one_model_is_wanted():
    with pytest.raises(ConfigError, match="give either a checkpoint or a backbone"):
        ModelNames()
    with pytest.raises(ConfigError, match="give either a checkpoint or a backbone"):
        ModelNames(checkpoint="a", backbone="b")


def test_what_a_checkpoint_fixes_is_refused():
    with pytest.raises(ConfigError, match=r"memory_layers is fixed by the checkpoint 'a'"):
        ModelNames(checkpoint="a", memory_layers=(1,))


@pytest.mark.parametrize("layers", [(0,), (3, 11, 20)])
def test_the_layers_can_be_read_from_a_banks_identity(layers):
    assert identity_layers(bank_identity("0123abcd", layers)) == layers


def test_other_identities_name_no_layers():
    assert identity_layers("made by hand") is None
