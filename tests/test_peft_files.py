"""A backbone from a PEFT adapter's folder: the tuned model itself, on its base's name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import memlayer
from memlayer.backbones import load_backbone
from memlayer.errors import CheckpointError, UnsupportedModelError

# PEFT 0.19 asks transformers 5 by an old name when an adapter is made.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

INPUTS = torch.tensor([[5, 40, 17, 200, 3]])

MakeAdapter = Callable[..., tuple[Path, torch.Tensor]]


@pytest.fixture
def make_adapter(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> MakeAdapter:
    def make(family: str = "llama", **settings: Any) -> tuple[Path, torch.Tensor]:
        """Give an adapter's folder, and the logits of the model that it was saved from."""
        base = load_backbone(str(tiny_checkpoint(family))).model
        config = peft.LoraConfig(
            r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings
        )
        adapted = peft.get_peft_model(base, config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(str(tmp_path / "adapter"))
        with torch.no_grad():
            return tmp_path / "adapter", adapted.eval()(input_ids=INPUTS).logits

    return make


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_merged_model_computes_what_the_adapted_one_does(
    family: str, make_adapter: MakeAdapter, tiny_checkpoint: Callable[[str], Path]
) -> None:
    folder, expected = make_adapter(family, fan_in_fan_out=family == "gpt2")
    backbone = load_backbone(str(folder))
    with torch.no_grad():
        logits = backbone.model(INPUTS).logits
        bare = load_backbone(str(tiny_checkpoint(family))).model(INPUTS).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert (logits - bare).abs().max() > 1e-2
    assert backbone.name == str(folder)
    assert backbone.model.name_or_path == str(folder.resolve())
    # The adapter's folder has none of its own, so that it is the base's.
    assert backbone.tokenizer("a")["input_ids"]


def test_it_is_a_plain_model_that_can_be_saved_whole(
    make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder, expected = make_adapter()
    model = load_backbone(str(folder)).model
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("lora" in name for name, _ in model.named_modules())
    model.save_pretrained(tmp_path / "whole")
    with torch.no_grad():
        logits = load_backbone(str(tmp_path / "whole")).model(INPUTS).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_updates_are_merged_before_they_are_rounded(make_adapter: MakeAdapter) -> None:
    folder, _ = make_adapter()
    whole = load_backbone(str(folder)).model
    half = load_backbone(str(folder), dtype="bf16").model
    for name, weight in half.named_parameters():
        assert torch.equal(weight, whole.get_parameter(name).bfloat16()), name


def test_a_side_network_on_it_is_loaded_with_it_by_name(
    make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder, _ = make_adapter()
    model = memlayer.wrap(load_backbone(str(folder)).model, memlayer.LongMemConfig(backend="torch"))
    model.save_pretrained(tmp_path / "side")
    loaded = memlayer.load(tmp_path / "side")
    with torch.no_grad():
        assert torch.equal(loaded(INPUTS).logits, model.eval()(INPUTS).logits)


def test_a_side_network_is_no_backbone(
    make_adapter: MakeAdapter, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = memlayer.wrap(
        load_backbone(str(tiny_checkpoint("llama"))).model, memlayer.LongMemConfig(backend="torch")
    )
    model.save_pretrained(tmp_path / "side")
    with pytest.raises(
        CheckpointError, match=r"no backbone but a side network, made for '/.*llama"
    ):
        load_backbone(str(tmp_path / "side"))


@pytest.mark.parametrize("base", [None, "", 3, "itself"])
def test_an_adapter_that_does_not_say_what_it_is_for(
    base: object, make_adapter: MakeAdapter
) -> None:
    folder, _ = make_adapter()
    change(folder, base_model_name_or_path=str(folder) if base == "itself" else base)
    with pytest.raises(CheckpointError, match="does not say which model it was made for"):
        load_backbone(str(folder))


def test_a_pickle_is_never_read(make_adapter: MakeAdapter) -> None:
    folder, _ = make_adapter()
    shutil.move(folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    with pytest.raises(
        CheckpointError, match=r"no adapter_model.safetensors in .*save the adapter"
    ):
        load_backbone(str(folder))


def test_an_adapter_of_another_model_is_refused(
    make_adapter: MakeAdapter, tiny_checkpoint: Callable[[str], Path]
) -> None:
    folder, _ = make_adapter()
    change(folder, base_model_name_or_path=str(tiny_checkpoint("gpt2")), target_modules=["q_proj"])
    with pytest.raises(
        CheckpointError, match=r"cannot put the adapter in .* on .*gpt2 \(.*\); it is"
    ):
        load_backbone(str(folder))


def test_truncated_weights_are_an_error(make_adapter: MakeAdapter) -> None:
    folder, _ = make_adapter()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"cannot put the adapter in .*it is damaged"):
        load_backbone(str(folder))


def test_a_learned_prompt_cannot_be_merged(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = load_backbone(str(tiny_checkpoint("llama"))).model
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(base, settings).save_pretrained(str(tmp_path / "prompt"))
    with pytest.raises(
        UnsupportedModelError, match="of type PROMPT_TUNING, which cannot be merged"
    ):
        load_backbone(str(tmp_path / "prompt"))


def test_without_peft_the_message_says_what_to_install(
    make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_adapter()
    monkeypatch.setattr("memlayer.peft_files.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="is an adapter, which needs PEFT: pip install peft"):
        load_backbone(str(folder))


def change(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
