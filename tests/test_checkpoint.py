"""Saving a side network, loading it again, and refusing what does not belong together."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import memlayer
from memlayer import checkpoint
from memlayer.errors import BackendUnavailableError, CheckpointError, ConfigError
from memlayer.fingerprint import fingerprint

SETTINGS = {"backend": "torch", "memory_size": 64, "top_k": 16, "segment_length": 16}


@pytest.fixture(params=["gpt2", "opt", "llama"])
def saved(request, tiny_checkpoint, tmp_path):
    """A trained-looking model, the folder that it was saved to, its backbone's folder."""
    place = tiny_checkpoint(request.param)
    model = memlayer.wrap(
        memlayer.load_backbone(str(place)).model, memlayer.LongMemConfig(**SETTINGS)
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.trainable_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved", place


@torch.no_grad()
def test_a_loaded_model_gives_the_same_answers(saved, make_tokens):
    model, directory, _ = saved
    loaded = memlayer.load(directory)
    past, ids = make_tokens(2, 40, seed=1), make_tokens(2, 20)
    for one in (model, loaded):
        one.memorize(past)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.memory_config == model.memory_config
    assert not loaded.training


def test_only_the_side_network_is_saved(saved):
    model, directory, _ = saved
    assert sorted(path.name for path in directory.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    weights = load_file(directory / "adapter_model.safetensors")
    assert sum(w.numel() for w in weights.values()) == sum(
        p.numel() for p in model.trainable_parameters()
    )


def test_matrices_can_be_saved_in_half_width(saved, tmp_path):
    model, whole, place = saved
    model.save_pretrained(tmp_path / "half", dtype="bf16")
    sizes = [
        (folder / "adapter_model.safetensors").stat().st_size
        for folder in (tmp_path / "half", whole)
    ]
    assert sizes[0] < 0.65 * sizes[1]
    loaded = memlayer.load(tmp_path / "half", backbone=memlayer.load_backbone(str(place)).model)
    before, after = (dict(one.side_network.named_parameters()) for one in (model, loaded))
    for name, weight in after.items():
        rounded = before[name].bfloat16().float() if weight.dim() > 1 else before[name]
        assert weight.dtype == torch.float32
        assert torch.equal(weight, rounded), name
    with pytest.raises(ConfigError, match="dtype must be one of"):
        model.save_pretrained(tmp_path / "half", dtype="bf17")


def test_matrices_can_be_saved_in_eight_bits(saved, tmp_path):
    model, whole, place = saved
    model.save_pretrained(tmp_path / "small", dtype="int8")
    sizes = [
        (folder / "adapter_model.safetensors").stat().st_size
        for folder in (tmp_path / "small", whole)
    ]
    assert sizes[0] < 0.55 * sizes[1]  # tiny rows: names and scales weigh
    loaded = memlayer.load(tmp_path / "small", backbone=memlayer.load_backbone(str(place)).model)
    before, after = (dict(one.side_network.named_parameters()) for one in (model, loaded))
    for name, weight in after.items():
        if weight.dim() > 1:
            step = before[name].abs().amax(1, keepdim=True) / 127
            assert ((weight - before[name]).abs() <= 0.5 * step + 1e-7).all(), name
            assert (weight != before[name]).any(), name
        else:
            assert torch.equal(weight, before[name]), name


def test_eight_bits_without_their_scales_are_refused(saved, tmp_path):
    model, _, place = saved
    model.save_pretrained(tmp_path / "small", dtype="int8")
    path = tmp_path / "small" / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name, weight in weights.items() if weight.dtype == torch.int8)
    del weights[f"{name}.scale"]
    save_file(weights, path)
    config = tmp_path / "small" / "adapter_config.json"
    content = json.loads(config.read_text())
    content["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    config.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"is damaged: .* got torch.int8"):
        memlayer.load(tmp_path / "small", backbone=memlayer.load_backbone(str(place)).model)


@torch.no_grad()
def test_settings_can_be_changed_on_loading(saved):
    _, directory, _ = saved
    loaded = memlayer.load(directory, backend="faiss", memory_size=128)
    assert loaded.memory_config.backend == "faiss"
    assert loaded.memory.capacity == 128
    with pytest.raises(ConfigError, match="multiple of chunk_size=4, got 130"):
        memlayer.load(directory, memory_size=130)


def test_a_given_backbone_is_used_in_whatever_dtype(saved):
    model, directory, place = saved
    assert memlayer.load(directory, backbone=model.unwrap()).backbone is model.backbone
    half = memlayer.load_backbone(str(place), dtype="bf16").model
    assert memlayer.load(directory, backbone=half).backbone.dtype == torch.bfloat16


def test_a_fingerprint_tells_weights_apart_but_not_dtypes(make_backbone):
    first = fingerprint(make_backbone("llama"))
    assert fingerprint(make_backbone("llama").bfloat16()) == first
    assert fingerprint(make_backbone("llama", seed=1)) != first
    assert fingerprint(make_backbone("mistral")) != first


def test_a_checkpoint_for_another_backbone_is_refused(saved, make_backbone):
    _model, directory, _ = saved
    with pytest.raises(CheckpointError, match=r"was made for .* with .*=.* this backbone has"):
        memlayer.load(directory, backbone=make_backbone("qwen2"))
    other = memlayer.load_backbone(str(saved[2])).model
    for weight in other.parameters():
        weight.data += 0.3
    with pytest.raises(CheckpointError, match="same architecture but other weights"):
        memlayer.load(directory, backbone=other)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "swapped", "missing"])
def test_damaged_weights_are_refused(saved, damage):
    _, directory, _ = saved
    path = directory / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[:-100])
    elif damage == "flipped":
        data[-3] ^= 64
        path.write_bytes(data)
    elif damage == "swapped":
        save_file({"gates.0": torch.zeros(2)}, path)
    else:
        path.unlink()
    with pytest.raises(
        CheckpointError, match=r"checksum: it was truncated|cannot be read: No such"
    ):
        memlayer.load(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 7}, "format_version 7, this memlayer reads 1; it was written by"),
        ({"sha256": None}, "damaged: sha256 is None"),
        ({"memory": {"format_version": 1, "top_k": 3}}, "damaged: top_k must be a multiple"),
        ({"memory": {"format_version": 1, "colour": 3}}, "unknown keys colour"),
        ({"memory": {"format_version": 1, "memory_layers": 0.5}}, "must be whole numbers, got 0.5"),
        ({"memory": {"format_version": 1, "side_init": "x" * 9999}}, "got 'x{79}$"),
    ],
)
def test_a_tampered_configuration_is_refused(saved, change, message):
    _, directory, _ = saved
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        memlayer.load(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "adapter_config.json is damaged: maximum recursion depth"),
        ('{"format_version": ' + "9" * 10_000 + "}", "is damaged: Exceeds the limit"),
        ("[]", "is damaged: it holds no JSON object"),
        (" " * 2**20 + "{}", "is damaged: it has more than 1,048,576 bytes"),
    ],
    ids=["deep", "long number", "no object", "large"],
)
def test_a_configuration_that_chokes_a_parser_is_refused(tmp_path, content, message):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        memlayer.load(tmp_path)


@pytest.mark.parametrize("saved", ["llama"], indirect=True)
def test_a_sketch_that_is_no_list_of_numbers_is_refused(saved):
    _, directory, _ = saved
    path = directory / "adapter_config.json"
    content = json.loads(path.read_text())
    for sketch in (None, "text", [[]], ["1"], [1e300], [True], [float("nan")]):
        path.write_text(json.dumps(content | {"base_model_sketch": sketch}))
        with pytest.raises(CheckpointError, match="is damaged: base_model_sketch is"):
            memlayer.load(directory)


@pytest.mark.parametrize("saved", ["llama"], indirect=True)
@pytest.mark.parametrize(
    "change", [lambda w: w.fill_(float("nan")), lambda w: w.long()], ids=["not finite", "integers"]
)
def test_weights_that_are_no_finite_numbers_are_refused_whatever_their_checksum(saved, change):
    model, directory, _ = saved
    path = directory / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    save_file(weights | {name: change(weights[name])}, path)
    config = json.loads((directory / "adapter_config.json").read_text())
    config["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{name} must be finite floating-point"):
        memlayer.load(directory, backbone=model.unwrap())


@pytest.mark.parametrize("saved", ["llama"], indirect=True)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_in_a_files_place_is_refused_and_not_waited_for(saved, name):
    _, directory, _ = saved
    (directory / name).unlink()
    os.mkfifo(directory / name)
    with pytest.raises(CheckpointError, match="is damaged: it is no ordinary file"):
        memlayer.load(directory)


def test_settings_that_the_weights_do_not_fit_are_refused(saved):
    _, directory, _ = saved
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    config["memory"]["layer_reduction_factor"] = 1
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not fit its settings"):
        memlayer.load(directory)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*no adapter_config.json"):
        memlayer.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config.json is damaged"):
        memlayer.load(tmp_path)


def test_a_missing_hub_id_is_refused_in_one_sentence():
    with pytest.raises(CheckpointError, match="neither a directory nor a checkpoint that can be"):
        memlayer.load("nobody/no-such-checkpoint")


def test_an_unavailable_backend_is_refused_before_anything_is_loaded(saved, monkeypatch):
    _, directory, _ = saved
    from memlayer.plugins import default_plugins

    reason = default_plugins().backends.unavailable_reason("faiss-gpu")
    if reason is None:
        pytest.skip("faiss-gpu runs here")
    with pytest.raises(BackendUnavailableError, match="faiss-gpu"):
        memlayer.load(directory, backend="faiss-gpu")


def test_an_interrupted_save_leaves_the_old_file(saved, monkeypatch):
    model, directory, _ = saved
    before = (directory / "adapter_model.safetensors").read_bytes()
    for parameter in model.trainable_parameters():
        parameter.data += 1

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(directory)
    assert (directory / "adapter_model.safetensors").read_bytes() == before
    assert len(list(directory.iterdir())) == 3


def test_the_card_names_the_backbone_and_the_settings(saved):
    _model, directory, place = saved
    card = (directory / "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {place}\n")
    assert "| memory size, tokens a row | 64 |" in card


def test_push_uploads_what_save_writes(saved, monkeypatch):
    # The Hub itself cannot be had in a test: its client is replaced, nothing else.
    model, _, _ = saved
    uploaded = {}

    class Client:
        def __init__(self, token):
            uploaded["token"] = token

        def create_repo(self, repo_id, *, private, exist_ok):
            uploaded["repo"] = (repo_id, private, exist_ok)

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            from pathlib import Path

            uploaded["files"] = sorted(path.name for path in Path(folder_path).iterdir())
            return type("Commit", (), {"commit_url": f"hub/{repo_id}/commit"})()

    monkeypatch.setattr(checkpoint, "HfApi", Client)
    assert model.push_to_hub("me/memory", private=True, token="t") == "hub/me/memory/commit"
    assert uploaded == {
        "token": "t",
        "repo": ("me/memory", True, True),
        "files": ["README.md", "adapter_config.json", "adapter_model.safetensors"],
    }
