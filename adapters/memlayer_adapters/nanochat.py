"""NanoChat: as HunYuan, with norms that have no weights, and logits that are capped."""

from dataclasses import replace

from memlayer.decoders import Projection
from memlayer_adapters.hunyuan import HUNYUAN

NANOCHAT = replace(
    HUNYUAN,
    head=None,
    query=Projection(module="q_proj", norm="q_norm"),
    key=Projection(module="k_proj", norm="k_norm"),
)
