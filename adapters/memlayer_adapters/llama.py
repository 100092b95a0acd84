"""LLaMA and the families laid out like it: Mistral, Qwen2, SmolLM. Rotary, grouped queries."""

from memlayer.decoders import DecoderDescription, Projection

LLAMA = DecoderDescription(
    decoder="model",
    layers="model.layers",
    final_norm="model.norm",
    rotary="model.rotary_emb",
    attention="self_attn",
    query=Projection(module="q_proj"),
    key=Projection(module="k_proj"),
    value=Projection(module="v_proj"),
    attention_output="o_proj",
)
