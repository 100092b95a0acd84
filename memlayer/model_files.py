"""A causal language model from files that ``save_pretrained`` wrote, in a folder or on the Hub.

No pickle is read, and no code is run that the files bring.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from memlayer.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    import torch


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


def load_files(source: str, name: str, dtype: torch.dtype, **options: Any) -> Backbone:
    """Load a model and its tokenizer.

    Args:
        source: a folder, or an id on the Hub.
        name: what to call it in messages.
        dtype: of the weights.
        options: more arguments of ``from_pretrained``.

    Raises:
        CheckpointError: if the files are damaged or incomplete.
        UnsupportedModelError: if it is not a causal language model.
    """
    import memlayer.longmem  # noqa: F401 - transformers learns of the paper's own backbone

    try:
        config = AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} has no model configuration that transformers {transformers.__version__} can "
            f"read ({first_line(error)})"
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
            f"cannot read the weights of {name} ({first_line(error)}); save the model again with "
            "save_pretrained"
        ) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{name} lacks {len(missing)} weights of its {type(model).__name__} (first: "
            f"{missing[0]}); save the whole causal language model with save_pretrained"
        )
    return Backbone(
        model=model, name=name, loaded_tokenizer=load_tokenizer(source, name, **options)
    )


def load_tokenizer(
    source: str, name: str, **options: Any
) -> transformers.PreTrainedTokenizerBase | None:
    """Load a tokenizer; None where a folder has none.

    Raises:
        CheckpointError: if its files are damaged.
    """
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
            f"cannot read the tokenizer of {name} ({first_line(error)}); save it again with "
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


def first_line(error: BaseException) -> str:
    """Give the first line of what an error says, or its type's name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
