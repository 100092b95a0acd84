"""HunYuan: LLaMA's layout with a norm on each head's queries and keys, after rotation."""

from dataclasses import replace

from memlayer.decoders import Projection
from memlayer_adapters.llama import LLAMA

HUNYUAN = replace(
    LLAMA,
    rotary=None,  # the norm behind it would have to be turned, too
    query=Projection(module="q_proj", norm="query_layernorm"),
    key=Projection(module="k_proj", norm="key_layernorm"),
)
