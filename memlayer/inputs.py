"""What a decoder is called with: the arguments, padding and positions of one forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memlayer.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache

    from memlayer.decoders import DecoderParts


def decoder_inputs(
    parts: DecoderParts,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    *,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: Tensor | None = None,
) -> tuple[dict[str, Any], Tensor | None]:
    """Complete the arguments of a decoder's forward.

    Args:
        parts: the backbone's parts.
        input_ids: ``(B, T)``, int64.
        attention_mask: ``(B, past + T)``, 0 for padding, on either side.
        position_ids: ``(B, T)``, int64; counted over the real tokens if there is padding.
        past_key_values: the cache of earlier calls.
        inputs_embeds: ``(B, T, E)`` instead of ``input_ids``.

    Returns:
        Keyword arguments, and the mask ``(B, T)``, bool, of this call's real tokens; None where
        all are.

    Raises:
        ConfigError: if not exactly one of ids and embeddings is given, or learned positions would
            run out.
    """
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None or (input_ids is not None and inputs_embeds is not None):
        raise ConfigError("exactly one of input_ids and inputs_embeds must be given")
    tokens = given.shape[1]
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    if parts.max_positions is not None and past + tokens > parts.max_positions:
        raise ConfigError(
            f"the backbone has learned positions for {parts.max_positions} tokens, got "
            f"{past + tokens}; memorize the older text and pass the rest"
        )
    if position_ids is not None and not parts.takes_positions:
        raise ConfigError(
            f"{type(parts.decoder).__name__} takes no position_ids: it counts by itself; leave "
            "them out"
        )
    mask = None
    if attention_mask is not None and not bool(attention_mask.all()):
        mask = attention_mask[:, -tokens:].bool()
        if position_ids is None and parts.takes_positions:
            # Most Hugging Face decoders count from 0 on, whatever is padding.
            counted = attention_mask.long().cumsum(dim=1) - 1
            position_ids = counted.clamp(min=0)[:, -tokens:]
    inputs: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "inputs_embeds": inputs_embeds,
        "use_cache": False,
    }
    if past_key_values is not None:
        inputs |= {"past_key_values": past_key_values, "use_cache": True}
    return {name: value for name, value in inputs.items() if value is not None}, mask
