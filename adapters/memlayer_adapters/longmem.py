"""The paper's own backbone: ALiBi, and blocks whose attention and MLP stand side by side."""

from memlayer.decoders import DecoderDescription, Projection

LONGMEM = DecoderDescription(
    decoder="transformer",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    attention="attn",
    query=Projection(module="q_proj"),
    key=Projection(module="k_proj"),
    value=Projection(module="v_proj"),
    attention_output="out_proj",
)
