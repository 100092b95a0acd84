"""From the decoder's output to logits, by the backbone's own code.

Between a decoder and its logits a family may scale, cap or transform. So the backbone's forward
runs, with a decoder that has done its work already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from memlayer.decoders import DecoderParts


def logits_of(backbone: PreTrainedModel, parts: DecoderParts, normed: Tensor) -> Tensor:
    """Give logits ``(B, T, V)`` of hidden states behind the final norm, ``(B, T, E)``."""
    hidden: Tensor = parts.output_projection(normed.to(backbone.dtype))
    if parts.head is not None:
        made: Tensor = parts.head(hidden)
        return made.to(normed.device)
    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    with _decoder_gives(parts.decoder, hidden):
        logits: Tensor = backbone(input_ids=ids, use_cache=False, return_dict=True).logits
    return logits.to(normed.device)


@contextmanager
def _decoder_gives(decoder: nn.Module, hidden: Tensor) -> Iterator[None]:
    output = _DecoderOutput(last_hidden_state=hidden)
    own = vars(decoder).get("forward")  # accelerate gives one to a decoder that it spreads
    decoder.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own


class _DecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    """With what only some families' heads ask for: router logits and the like, all None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return
