"""A trained side network on disk or on the Hub: what is saved, and for which backbone.

adapter_config.json         settings, the backbone's name and fingerprint, the weights' checksum
adapter_model.safetensors   the side network's weights, nothing of the backbone
README.md                   a model card
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from memlayer import __version__
from memlayer.config import LongMemConfig
from memlayer.errors import CheckpointError, ConfigError
from memlayer.fingerprint import architecture, check_backbone, sketch
from memlayer.json_fields import read_json_object
from memlayer.narrow_weights import narrow, widen
from memlayer.pieces import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from memlayer.model import LongMemModel
    from memlayer.plugins import Plugins

FORMAT_VERSION = 1
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
_LARGEST_CONFIG = 2**20
_WEIGHT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def save_adapter(
    model: LongMemModel,
    directory: Path,
    *,
    dtype: torch.dtype | str | None = None,
    write: bool = True,
) -> None:
    """Write a model's side network into a directory, which is made if need be.

    Args:
        model: its owner.
        directory: where to.
        dtype: of matrices in the file; None leaves them as they are.
        write: False: only help other processes to gather what is in pieces.

    Raises:
        ConfigError: if the dtype is unknown.
    """
    weights = dump_tensors(narrow(_side_weights(model), dtype))
    config = {
        "format_version": FORMAT_VERSION,
        "memlayer_version": __version__,
        "base_model_name_or_path": model.backbone.name_or_path,
        "base_model": architecture(model.backbone),
        "base_model_sketch": sketch(model.backbone).tolist(),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "memory": model.memory_config.to_dict(),
    }
    if not write:
        return
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / WEIGHTS_NAME, weights)
    _write(directory / CONFIG_NAME, json.dumps(config, indent=2).encode())
    _write(directory / CARD_NAME, _card(model).encode())


def load_adapter(model: LongMemModel, directory: Path) -> None:
    """Put a saved side network into a model that was wrapped with its settings.

    Raises:
        CheckpointError: if the files are missing or damaged, or made for another backbone.
    """
    config = read_config(directory)
    check_backbone(model.backbone, config, directory)
    weights = widen(_read_weights(directory, config))
    own = _side_weights(model)
    wrong = sorted(
        set(own.keys() ^ weights.keys())
        | {name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape}
    )
    if wrong:
        raise CheckpointError(
            f"{directory / WEIGHTS_NAME} does not fit its settings ({len(wrong)} tensors, first "
            f"{wrong[0]!r}); {CONFIG_NAME} was changed or belongs to another checkpoint"
        )
    for name, weight in weights.items():
        if weight.dtype not in _WEIGHT_TYPES or not bool(weight.isfinite().all()):
            raise CheckpointError(
                f"{directory / WEIGHTS_NAME} is damaged: {name} must be finite floating-point "
                f"numbers, got {weight.dtype} with others among them"
            )
    model.side_network.load_state_dict(weights)


def load(
    directory: str | Path,
    backbone: PreTrainedModel | None = None,
    backend: str | None = None,
    *,
    plugins: Plugins | None = None,
    **changes: Any,
) -> LongMemModel:
    """Load a trained model: its backbone, its side network and an empty memory.

    Args:
        directory: where `LongMemModel.save_pretrained` wrote, or a Hub id.
        backbone: the backbone; loaded by the name in the checkpoint if None.
        backend: a retrieval backend instead of the one in the checkpoint.
        plugins: where backends and adapters come from; what is installed if None.
        changes: fields of `LongMemConfig` to set otherwise (``memory_size``, ``top_k``, ...).

    Raises:
        CheckpointError: if the checkpoint is missing, damaged or made for another backbone.
        ConfigError: if a changed setting makes no sense.
    """
    from memlayer.backbones import load_backbone
    from memlayer.model import wrap

    place = find_checkpoint(directory)
    saved = read_config(place)
    settings = _settings(saved, place).to_dict()
    if backend is not None:
        # Options belong to the backend that they were written for.
        settings |= {"backend": backend, "backend_options": {}}
    config = LongMemConfig.from_dict(settings | changes)
    if backbone is None:
        backbone = load_backbone(str(saved["base_model_name_or_path"])).model
    check_backbone(backbone, saved, place)
    model = wrap(backbone, config, plugins=plugins)
    load_adapter(model, place)
    model.eval()
    return model


def push_adapter(
    model: LongMemModel, repo_id: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Upload a model's side network to the Hub, and give the address of the commit."""
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(model, Path(directory))
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=directory, commit_message="Upload memlayer side network"
        )
    return str(commit.commit_url)


def read_config(directory: Path) -> dict[str, Any]:
    """Read a checkpoint's adapter_config.json.

    Raises:
        CheckpointError: if it is missing, damaged or of another format.
    """
    path = directory / CONFIG_NAME
    try:
        config = read_json_object(path, largest=_LARGEST_CONFIG, error=CheckpointError).values
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no checkpoint in {directory} (no {CONFIG_NAME}); give the directory that "
            "`memlayer train --output` or save_pretrained wrote"
        ) from error
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {config.get('format_version')!r:.40}, this memlayer reads "
            f"{FORMAT_VERSION}; it was written by memlayer "
            f"{config.get('memlayer_version', '?')!s:.40}"
        )
    expected = {"base_model_name_or_path": str, "base_model": dict, "memory": dict, "sha256": str}
    for name, kind in expected.items():
        if not isinstance(config.get(name), kind):
            raise CheckpointError(f"{path} is damaged: {name} is {config.get(name)!r:.80}")
    sketch = config.get("base_model_sketch")
    if not isinstance(sketch, list) or not all(_is_number(value) for value in sketch):
        raise CheckpointError(f"{path} is damaged: base_model_sketch is {sketch!r:.80}")
    return config


def read_gates(directory: Path) -> dict[int, list[float]]:
    """Read how much each head of each memory layer takes from memory: 0 to 1, by layer.

    Raises:
        CheckpointError: if the checkpoint is missing or damaged.
    """
    config = read_config(directory)
    weights = _read_weights(directory, config)
    layers = _settings(config, directory).memory_layers or ()
    return {
        layer: torch.sigmoid(weights[f"gates.{number}"].float()).tolist()
        for number, layer in enumerate(layers)
    }


def _settings(config: Mapping[str, Any], directory: Path) -> LongMemConfig:
    try:
        return LongMemConfig.from_dict(config["memory"])
    except ConfigError as error:
        raise CheckpointError(f"{directory / CONFIG_NAME} is damaged: {error}") from error


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= torch.finfo(torch.float32).max


def _side_weights(model: LongMemModel) -> dict[str, Tensor]:
    state = model.side_network.state_dict()
    return {name: whole(value).contiguous() for name, value in state.items()}


def _read_weights(directory: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    path = directory / WEIGHTS_NAME
    try:
        # Before it is opened: a pipe would wait for its other end.
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is damaged: it is no ordinary file")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != config["sha256"]:
        raise CheckpointError(
            f"{path} does not match its checksum: it was truncated or changed; save or download "
            "the checkpoint again"
        )
    try:
        return load_tensors(data)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def find_checkpoint(directory: str | Path) -> Path:
    """Give the directory of a checkpoint, downloaded from the Hub if it names one there.

    Raises:
        CheckpointError: if it is neither.
    """
    if Path(directory).is_dir():
        return Path(directory)
    try:
        found = snapshot_download(
            str(directory), allow_patterns=[CONFIG_NAME, WEIGHTS_NAME, CARD_NAME]
        )
    except Exception as error:  # huggingface_hub raises its own, httpx's and ValueError alike
        raise CheckpointError(
            f"{str(directory)!r} is neither a directory nor a checkpoint that can be had from the "
            f"Hugging Face Hub ({type(error).__name__})"
        ) from error
    return Path(found)


def _write(path: Path, data: bytes) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _card(model: LongMemModel) -> str:
    config, name = model.memory_config, model.backbone.name_or_path
    rank = config.side_rank
    trainable = sum(p.numel() for p in model.trainable_parameters())
    return f"""---
base_model: {name}
library_name: memlayer
pipeline_tag: text-generation
tags:
- memlayer
- longmem
---

# A long-term memory for {name}

A [LongMem](https://arxiv.org/abs/2306.07174) side network of {trainable:,} parameters, trained with
memlayer. The backbone is not included and was not changed.

```python
import memlayer

model = memlayer.load("PATH_OR_ID_OF_THIS_CHECKPOINT")
model.memorize(long_document_ids)
model.generate(prompt_ids, max_new_tokens=100)
```

| setting | value |
|---|---|
| memory layers | {list(config.memory_layers or ())} |
| memory size, tokens a row | {config.memory_size} |
| chunk size, tokens | {config.chunk_size} |
| retrieved tokens per query | {config.top_k} |
| segment length | {config.segment_length} |
| backbone layers per side layer | {config.layer_reduction_factor} |
| start | {config.side_init} |
| side layers | {"copies" if rank is None else f"low-rank updates, rank {rank}"} |
"""
