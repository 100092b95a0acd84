"""What a backbone is, in few numbers: whether two are the same one, in every process and dtype."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memlayer.dispatch import weight_of
from memlayer.errors import CheckpointError
from memlayer.pieces import whole
from memlayer.plain_linear import unpacked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SKETCHED = 64


def fingerprint(backbone: PreTrainedModel) -> str:
    """Give a short name for a backbone's architecture and weights, the same in each process.

    The weights enter as a sample rounded to bfloat16, so that a backbone loaded in float32 and in
    bfloat16 has one fingerprint.
    """
    digest = hashlib.sha256(json.dumps(architecture(backbone), sort_keys=True).encode())
    digest.update(sketch(backbone).bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_backbone(backbone: PreTrainedModel, config: Mapping[str, Any], directory: Path) -> None:
    """Refuse a backbone that a checkpoint was not made for.

    Args:
        backbone: what is to be wrapped.
        config: what `memlayer.checkpoint.read_config` gave.
        directory: the checkpoint's, for the message.

    Raises:
        CheckpointError: if architecture or weights differ.
    """
    name = config["base_model_name_or_path"]
    own, saved = architecture(backbone), config["base_model"]
    different = [key for key in own if own[key] != saved.get(key)]
    if different:
        key = different[0]
        raise CheckpointError(
            f"the checkpoint in {directory} was made for {name!r:.80} with "
            f"{key}={saved.get(key)!r:.80}, this backbone has {key}={own[key]!r}"
        )
    saved_sketch = torch.tensor(config["base_model_sketch"], dtype=torch.float32)
    own_sketch = sketch(backbone)
    # 1 % covers a backbone loaded in bfloat16 (0.4 %); other weights differ by much more.
    if saved_sketch.shape != own_sketch.shape or not torch.allclose(
        saved_sketch, own_sketch, rtol=0.01, atol=1e-6
    ):
        raise CheckpointError(
            f"the checkpoint in {directory} was made for {name!r:.80}; this backbone has the same "
            "architecture but other weights"
        )


def architecture(backbone: PreTrainedModel) -> dict[str, Any]:
    """Give what a backbone's shapes follow from, as JSON types."""
    config = backbone.config.get_text_config(decoder=True)
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }


def sketch(backbone: PreTrainedModel) -> Tensor:
    """Sample weights from all over a backbone: ``(64,)``, float32, on the CPU."""
    # A library may lay out what it packed into integers anew once it is used.
    matrices = [
        name
        for name, weight in backbone.named_parameters()
        if weight.dim() > 1 and weight.dtype.is_floating_point
    ]
    picked = [matrices[number * len(matrices) // _SKETCHED] for number in range(_SKETCHED)]
    values = []
    for number, name in enumerate(picked):
        weight = weight_of(backbone, name)
        flat = unpacked(whole(weight.detach())).flatten()
        values.append(flat[(7919 * number) % weight.numel()])
    return torch.stack([value.float().cpu() for value in values])
