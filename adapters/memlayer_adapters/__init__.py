"""The decoder adapters that come with memlayer, registered as any third party's are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memlayer import hookimpl

if TYPE_CHECKING:
    from memlayer.hookspecs import Register


@hookimpl
def register_adapters(register: Register) -> None:
    """Name the descriptions; each is imported on first use."""
    register("gpt2", "memlayer_adapters.gpt2:GPT2", model_types=("gpt2",))
    register("opt", "memlayer_adapters.opt:OPT", model_types=("opt",))
    register(
        "llama",
        "memlayer_adapters.llama:LLAMA",
        model_types=("llama", "mistral", "qwen2", "smollm3"),
    )
    register(
        "hunyuan",
        "memlayer_adapters.hunyuan:HUNYUAN",
        model_types=("hunyuan_v1_dense", "hunyuan_v1_moe"),
    )
    register("nanochat", "memlayer_adapters.nanochat:NANOCHAT", model_types=("nanochat",))
    register("longmem", "memlayer_adapters.longmem:LONGMEM", model_types=("longmem_gpt",))
    register("qwen3", "memlayer_adapters.qwen3:QWEN3", model_types=("qwen3",))
