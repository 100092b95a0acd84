"""A backbone that PEFT has tuned, from the adapter's folder.

    adapter_config.json        ─► the base model, by its name
    adapter_model.safetensors  ─► merged into it, in float32 ─► the dtype asked for

The base is never changed where it lies: what is merged is this process's copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from memlayer.errors import CheckpointError, UnsupportedModelError
from memlayer.json_fields import read_json_object
from memlayer.model_files import Backbone, first_line, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_LARGEST_CONFIG = 2**20


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no whole model."""
    return (folder / CONFIG_NAME).is_file() and not (folder / "config.json").is_file()


def load_adapted(
    folder: Path,
    name: str,
    dtype: torch.dtype,
    load_base: Callable[[str, torch.dtype], Backbone],
) -> Backbone:
    """Load an adapter's base model and merge the adapter into it.

    Args:
        folder: what PEFT's ``save_pretrained`` wrote.
        name: what to call it in messages.
        dtype: of the merged weights.
        load_base: gives the base model by the name in the adapter's configuration.

    Raises:
        CheckpointError: if files are missing or damaged, PEFT is missing, or this is a side
            network, which is no backbone.
        UnsupportedModelError: if the adapter cannot become part of the model's weights.
        MemlayerError: as ``load_base`` does.
    """
    config = read_json_object(
        folder / CONFIG_NAME, largest=_LARGEST_CONFIG, error=CheckpointError
    ).values
    base = config.get("base_model_name_or_path")
    if "peft_type" not in config:
        raise CheckpointError(
            f"{name} is no backbone but a side network, made for {base!r:.80}; give it as a "
            "checkpoint, or give the backbone that it is for"
        )
    if not isinstance(base, str) or not base or Path(base).resolve() == folder.resolve():
        raise CheckpointError(
            f"the adapter in {name} does not say which model it was made for "
            f"(base_model_name_or_path is {base!r:.80}); write the model's name there"
        )
    if find_spec("peft") is None:
        raise CheckpointError(f"{name} is an adapter, which needs PEFT: pip install peft")
    if not (folder / WEIGHTS_NAME).is_file():  # PEFT would read a pickle instead
        raise CheckpointError(
            f"there is no {WEIGHTS_NAME} in {name}; save the adapter again with save_pretrained"
        )
    # In float32: in half width small updates would be lost in what they are added to.
    backbone = load_base(base, torch.float32)
    model = _merged(backbone.model, folder, name)
    model.to(dtype)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(str(folder), name) or backbone.loaded_tokenizer
    return replace(backbone, model=model, name=name, loaded_tokenizer=tokenizer)


def _merged(base: PreTrainedModel, folder: Path, name: str) -> PreTrainedModel:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # Of how PEFT 0.19 asks transformers; nobody who loads a model can mend it.
            warnings.filterwarnings("ignore", r"\s*`is_gradient_checkpointing`", FutureWarning)
            adapted: Any = PeftModel.from_pretrained(base, str(folder))
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"cannot put the adapter in {name} on {base.name_or_path} ({first_line(error)}); it "
            "is damaged or was made for another model"
        ) from error
    settings = adapted.active_peft_config
    if settings.is_prompt_learning or not hasattr(adapted.base_model, "merge_and_unload"):
        raise UnsupportedModelError(
            f"{name} is an adapter of type {settings.peft_type.value}, which cannot be merged into "
            "the model's weights; give a model without it"
        )
    model: PreTrainedModel = adapted.merge_and_unload()
    return model.requires_grad_(True)  # as a model from files comes; PEFT had frozen it
