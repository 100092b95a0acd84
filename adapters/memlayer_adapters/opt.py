"""OPT: learned positions with an offset of 2, which the backbone itself applies.

The 350m member norms after its sublayers, has no final norm (the path leads to None) and projects
its embeddings in and its outputs out; the others have no projections (None as well).
"""

from memlayer.decoders import DecoderDescription, Projection

OPT = DecoderDescription(
    decoder="model.decoder",
    layers="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    output_projection="model.decoder.project_out",
    position_table="model.decoder.embed_positions",
    attention="self_attn",
    query=Projection(module="q_proj"),
    key=Projection(module="k_proj"),
    value=Projection(module="v_proj"),
    attention_output="out_proj",
)
