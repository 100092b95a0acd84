"""GPT-2: learned positions, one matrix for queries, keys and values."""

from memlayer.decoders import DecoderDescription, Projection

GPT2 = DecoderDescription(
    decoder="transformer",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    position_table="transformer.wpe",
    attention="attn",
    query=Projection(module="c_attn", part=0, parts=3),
    key=Projection(module="c_attn", part=1, parts=3),
    value=Projection(module="c_attn", part=2, parts=3),
    attention_output="c_proj",
)
