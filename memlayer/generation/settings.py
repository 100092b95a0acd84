"""What of a call of ``generate`` bears on windows and memory, and what of its result is text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memlayer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """What of a call of ``generate`` bears on windows and memory.

    Attributes:
        use_cache: whether keys and values are kept from step to step.
        cache_implementation: Hugging Face's kind of cache, if one was asked for.
        sequences: returned for each prompt.
        assisted: whether another model, or the prompt, proposes tokens.
        eos_token_ids: that end a sequence.
        pad_token_id: what fills a sequence that ended.
    """

    use_cache: bool
    cache_implementation: str | None
    sequences: int
    assisted: bool
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    @classmethod
    def read(cls, config: GenerationConfig, arguments: Mapping[str, Any]) -> GenerationSettings:
        """Look settings up in the arguments, then in the configuration."""

        def value(name: str) -> Any:
            given = arguments.get(name)
            return getattr(config, name, None) if given is None else given

        ends = value("eos_token_id")
        if isinstance(ends, Tensor):
            ends = ends.tolist()
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        return cls(
            use_cache=value("use_cache") is not False,
            cache_implementation=value("cache_implementation"),
            sequences=value("num_return_sequences") or 1,
            assisted=arguments.get("assistant_model") is not None
            or value("prompt_lookup_num_tokens") is not None,
            eos_token_ids=tuple(ends),
            pad_token_id=value("pad_token_id"),
        )

    def check(self, *, update_memory: bool, ids_given: bool) -> None:
        """Refuse what memory cannot serve.

        Raises:
            ConfigError: the message says what to do instead.
        """
        if self.assisted:
            raise ConfigError(
                "assisted generation takes tokens back, which memory cannot; generate without an "
                "assistant, or with disable_adapter()"
            )
        if self.cache_implementation not in (None, "dynamic"):
            raise ConfigError(
                f"cache_implementation={self.cache_implementation!r} is not supported with memory; "
                "leave it out"
            )
        if update_memory and self.sequences > 1:
            raise ConfigError(
                f"update_memory=True needs one sequence a prompt, got num_return_sequences="
                f"{self.sequences}; memorize() the one that you choose"
            )
        if update_memory and not ids_given:
            raise ConfigError("update_memory=True needs prompts as input_ids")


def written_tokens(
    sequences: Tensor,
    prompts: Tensor,
    attention_mask: Tensor | None,
    settings: GenerationSettings,
) -> Tensor:
    """Say which tokens of generated sequences are text, and no padding.

    Args:
        sequences: ``(B, T + n)``, int64. Prompts and what was generated.
        prompts: ``(B, T)``.
        attention_mask: ``(B, T)`` of the prompts, or None.
        settings: of the call.

    Returns:
        ``(B, T + n)``, bool. A sequence's first end token is text.
    """
    length = prompts.shape[1]
    generated = sequences[:, length:]
    ends = torch.isin(generated, generated.new_tensor(settings.eos_token_ids))
    text = ends.long().cumsum(dim=1) - ends.long() == 0
    if settings.pad_token_id is not None and settings.pad_token_id not in settings.eos_token_ids:
        padding = (generated == settings.pad_token_id).long()
        # A run of padding up to the end.
        text &= padding.flip(1).cumprod(dim=1).flip(1) == 0
    if attention_mask is None:
        attention_mask = torch.ones_like(prompts)
    return torch.cat([attention_mask[:, -length:].bool(), text], dim=1)
