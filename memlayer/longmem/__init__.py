"""The paper's own model: its backbone as a Hugging Face class, and its released checkpoints.

model.py        the backbone: a GPT-2-like decoder with ALiBi and parallel blocks
vocabulary.py   its tokenizer: GPT-2's byte-pair encoding, by fairseq's ids
conversion.py   a fairseq checkpoint -> that backbone in one folder, its side network in another

Importing this registers the backbone with transformers, as model type ``longmem_gpt``.
"""

from __future__ import annotations

from memlayer.longmem.conversion import ReleasedSettings, convert_longmem
from memlayer.longmem.model import LongMemGPTConfig, LongMemGPTForCausalLM, LongMemGPTModel
from memlayer.longmem.vocabulary import fairseq_tokenizer

__all__ = [
    "LongMemGPTConfig",
    "LongMemGPTForCausalLM",
    "LongMemGPTModel",
    "ReleasedSettings",
    "convert_longmem",
    "fairseq_tokenizer",
]
