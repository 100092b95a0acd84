r"""The backbone of LongMem (arXiv:2306.07174): a decoder with ALiBi and parallel blocks.

.. math::
    h^{l+1} = h^l + \mathrm{attn}(x) + \mathrm{mlp}(x), \quad x = \mathrm{LN}(h^l)

No position is added to the embeddings; head :math:`h` adds :math:`m_h j` to the score of key
:math:`j`. The head has a bias and is not tied. In the paper's checkpoints a side layer differs from
the block that it is a copy of in two constants, which `to_side_network` sets.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

SIDE_NORM_EPS = 1e-5


@strict
class LongMemGPTConfig(PreTrainedConfig):
    """The sizes of the backbone; the defaults are those of the released one."""

    model_type = "longmem_gpt"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 50264
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False


class LongMemGPTNorm(nn.LayerNorm):
    """A layer norm, with the released side network's own constant there."""

    def to_side_network(self) -> None:
        """Become the copy in the side network."""
        self.eps = SIDE_NORM_EPS


class LongMemGPTMLP(nn.Module):
    """Two linear maps around a GELU: its tanh form, in the side network the exact one."""

    def __init__(self, config: LongMemGPTConfig) -> None:
        super().__init__()
        self.fc_in = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.fc_out = nn.Linear(4 * config.hidden_size, config.hidden_size)
        self.approximate = "tanh"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``(B, T, E)`` to ``(B, T, E)``."""
        inner = functional.gelu(self.fc_in(hidden_states), approximate=self.approximate)
        output: Tensor = self.fc_out(inner)
        return output

    def to_side_network(self) -> None:
        """Become the copy in the side network."""
        self.approximate = "none"


class LongMemGPTAttention(nn.Module):
    """Causal attention with ALiBi, no biases."""

    def __init__(self, config: LongMemGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        size = config.hidden_size
        self.scaling = (size // self.num_heads) ** -0.5
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.out_proj = nn.Linear(size, size, bias=False)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, past_key_values: Cache | None = None
    ) -> Tensor:
        """Attend over the past and ``(B, T, E)``; the mask ``(B, H, T, S)`` has the slopes."""
        query, key, value = (
            projection(hidden_states).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        heads = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask.to(query.dtype), scale=self.scaling
        )
        output: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        return output


class LongMemGPTBlock(nn.Module):
    """One norm that feeds attention and MLP side by side."""

    def __init__(self, config: LongMemGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = LongMemGPTNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = LongMemGPTAttention(config, layer_idx)
        self.mlp = LongMemGPTMLP(config)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, past_key_values: Cache | None = None
    ) -> Tensor:
        """Map ``(B, T, E)`` to ``(B, T, E)``."""
        normed = self.ln_1(hidden_states)
        attended: Tensor = self.attn(normed, attention_mask, past_key_values)
        output: Tensor = hidden_states + attended + self.mlp(normed)
        return output


class LongMemGPTPreTrainedModel(PreTrainedModel):
    """What both classes share."""

    config_class = LongMemGPTConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["LongMemGPTBlock"]  # noqa: RUF012 - as transformers types it


class LongMemGPTModel(LongMemGPTPreTrainedModel):
    """The decoder without its head."""

    _input_embed_layer = "wte"

    def __init__(self, config: LongMemGPTConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.h = nn.ModuleList(
            LongMemGPTBlock(config, number) for number in range(config.num_hidden_layers)
        )
        self.ln_f = LongMemGPTNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Map ids ``(B, T)`` to hidden states ``(B, T, E)``."""
        hidden: Tensor = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        mask = alibi_mask(
            self.config.num_attention_heads, hidden.shape[1], past, attention_mask, hidden
        )
        for block in self.h:
            hidden = block(hidden, mask, past_key_values)
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden),
            past_key_values=past_key_values if use_cache else None,
        )


class LongMemGPTForCausalLM(LongMemGPTPreTrainedModel, GenerationMixin):
    """The decoder with its head, which has a bias."""

    def __init__(self, config: LongMemGPTConfig) -> None:
        super().__init__(config)
        self.transformer = LongMemGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next tokens: logits ``(B, T, V)``."""
        output = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values
        )


def alibi_slopes(heads: int) -> Tensor:
    r"""Give the slopes :math:`m_h`, ``(H,)``, float32 (Press et al., arXiv:2108.12409).

    Of p heads, p a power of two, head h has :math:`2^{-8 (h + 1) / p}`; more heads take every
    other slope of twice as many.
    """
    power = 2 ** (heads.bit_length() - 1)
    exponents = [-8 * (head + 1) / power for head in range(power)]
    exponents += [-4 * (2 * head + 1) / power for head in range(heads - power)]
    return torch.tensor([2**exponent for exponent in exponents])


def alibi_mask(
    heads: int, tokens: int, past: int, attention_mask: Tensor | None, like: Tensor
) -> Tensor:
    """Give what is added to scores, ``(1 or B, H, T, past + T)``: slopes, and causality.

    Args:
        heads: H.
        tokens: T.
        past: tokens in the cache.
        attention_mask: ``(B, past + T)``, 0 for padding; None where there is none.
        like: of the device and dtype that it is to have.
    """
    places = torch.arange(past + tokens, device=like.device)
    # Relative to the token itself: in half precision small numbers are the exact ones.
    distance = places - places[past:, None]
    slopes = alibi_slopes(heads).to(like.device)
    mask = (slopes[:, None, None] * distance).to(like.dtype)[None]
    hidden = (distance > 0)[None, None]
    if attention_mask is not None:
        hidden = hidden | ~attention_mask.bool()[:, None, None]
    return mask.masked_fill(hidden, torch.finfo(like.dtype).min)


AutoConfig.register(LongMemGPTConfig.model_type, LongMemGPTConfig, exist_ok=True)
AutoModelForCausalLM.register(LongMemGPTConfig, LongMemGPTForCausalLM, exist_ok=True)
