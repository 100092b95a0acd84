"""Qwen3: LLaMA's layout with a norm on each head's queries and keys, before rotation."""

from dataclasses import replace

from memlayer.decoders import Projection
from memlayer_adapters.llama import LLAMA

QWEN3 = replace(LLAMA, query=Projection(module="q_norm"), key=Projection(module="k_norm"))
