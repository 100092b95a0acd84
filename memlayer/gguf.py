"""A backbone from a GGUF file: converted once, and kept in the user's cache in float32.

What comes out is a plain transformers model: its weights are ordinary tensors, and it does not call
itself quantised.
"""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
from contextlib import redirect_stderr
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from memlayer.cache import user_cache, whole_folder
from memlayer.errors import CheckpointError, UnknownNameError
from memlayer.model_files import Backbone, first_line, load_files

logger = logging.getLogger(__name__)

CACHE_VERSION = 1
"""Of the converted models in the cache; raise it when the conversion changes."""


def cache_folder() -> Path:
    """Give the folder of converted GGUF models: ``$XDG_CACHE_HOME/memlayer/backbones``."""
    return user_cache() / "backbones"


def load_gguf(path: Path, name: str, dtype: torch.dtype) -> Backbone:
    """Load a file's model and tokenizer, from the cache where they are there.

    Args:
        path: the file.
        name: what to call it in messages.
        dtype: of the weights.

    Raises:
        UnknownNameError: if there is no such file.
        CheckpointError: if it is damaged, or a package that reads it is missing.
    """
    if not path.is_file():
        raise UnknownNameError(f"there is no GGUF file {path}; give the path of an existing one")
    folder = cache_folder() / f"{path.stem}-{_hash(path)}-v{CACHE_VERSION}"
    if folder.is_dir():
        try:
            return load_files(str(folder), name, dtype)
        except CheckpointError as error:
            logger.warning("converting %s again, its copy in the cache is damaged: %s", path, error)
            shutil.rmtree(folder)
    logger.info("converting %s, once; the result is kept in %s", path, folder)
    backbone = _convert(path, name)
    try:
        _store(backbone, folder)
    except OSError as error:
        logger.warning("cannot keep the converted model in %s: %s", folder, error)
    backbone.model.to(dtype)  # type: ignore[arg-type]
    return backbone


def _convert(path: Path, name: str) -> Backbone:
    options = {"gguf_file": path.name}
    try:
        # transformers has no switch for the progress bar of this one step.
        with redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=torch.float32, **options
            )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    except ImportError as error:
        raise CheckpointError(
            f'{path} needs the gguf package: pip install "memlayer-lm[train]"'
        ) from error
    except Exception as error:  # the GGUF reader raises whatever a damaged file makes it do
        raise CheckpointError(
            f"cannot read {path} as a GGUF model ({first_line(error)}); give a whole file of an "
            "architecture that transformers reads"
        ) from error
    return Backbone(model=_plain_copy(model), name=name, loaded_tokenizer=tokenizer)


def _plain_copy(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Move dequantised weights into a model that does not call itself quantised.

    One that does can be neither saved nor trained, though its weights are ordinary tensors.
    """
    config = type(model.config).from_dict(
        {
            key: value
            for key, value in model.config.to_dict().items()
            if key != "quantization_config"
        }
    )
    with torch.device("meta"):
        plain = type(model)(config)
    # assign: the tensors themselves move over, so that there are never two copies in memory.
    # Buffers that no checkpoint has (rotary frequencies) exist in the loaded model only.
    plain.load_state_dict(model.state_dict(), assign=True)
    for module_name, module in model.named_modules():
        for buffer_name in module._non_persistent_buffers_set:
            target = plain.get_submodule(module_name)
            target.register_buffer(buffer_name, module._buffers[buffer_name], persistent=False)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _store(backbone: Backbone, folder: Path) -> None:
    """Put a converted model into the cache, whole or not at all."""
    with whole_folder(folder) as partial:
        backbone.model.save_pretrained(partial)
        backbone.tokenizer.save_pretrained(partial)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
