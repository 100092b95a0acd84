"""The control that adapts a backbone without any memory: LoRA, at a given number of weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import peft
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from memlayer.data import IGNORED, StreamBatches
from memlayer.training.schedule import learning_rate_factor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from memlayer.data import Batch, TokenDocument
    from memlayer.training import TrainingOptions


def lora_model(backbone: PreTrainedModel, weights: int, seed: int = 0) -> peft.PeftModel:
    """Copy a backbone and give all linear maps of its layers an update of equal rank.

    Args:
        backbone: left as it is.
        weights: trainable ones to come close to; the rank is the nearest.
        seed: of the updates' first values.
    """
    head = backbone.get_output_embeddings()
    per_rank = sum(
        sum(module.weight.shape)
        for module in backbone.modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head  # Conv1D: GPT-2's
    )
    rank = max(1, round(weights / per_rank))
    torch.manual_seed(seed)
    # Twice the rank as alpha and every linear map: the usual way.
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(copy.deepcopy(backbone), config)
    assert isinstance(model, peft.PeftModel)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Give the parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def next_token_loss(model: Any, batch: Batch, dtype: torch.dtype | None) -> torch.Tensor:
    """Give the mean loss of one segment of every row, without memory."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        logits = model(
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            use_cache=False,
        ).logits
    return functional.cross_entropy(
        logits.float().flatten(0, 1), batch.targets.to(device).flatten(), ignore_index=IGNORED
    )


def train_without_memory(
    model: nn.Module,
    documents: list[TokenDocument],
    options: TrainingOptions,
    *,
    segment_length: int,
    learning_rate: float,
    log: Callable[[int, float], None],
) -> int:
    """Train whatever trains of a causal-LM model on the segments that a side network would read.

    Returns:
        The tokens trained on.
    """
    batches = StreamBatches(
        documents,
        rows=options.batch_size,
        segment_length=segment_length,
        stride=options.stride,
        excerpt=options.excerpt_tokens,
        seed=options.seed,
        repeat=True,
    )
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        weight_decay=0.0,
    )
    dtype = torch.bfloat16 if options.dtype == "bf16" else None
    steps, tokens = options.total_steps(segment_length), 0
    for step in range(1, steps + 1):
        factor = learning_rate_factor(step, steps=steps, warmup=options.warmup)
        optimizer.param_groups[0]["lr"] = learning_rate * factor
        for _ in range(options.gradient_accumulation):
            batch = next(batches)
            tokens += int(batch.fresh.sum())
            loss = next_token_loss(model, batch, dtype)
            (loss / options.gradient_accumulation).backward()
        if options.max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(parameters, options.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0 or step == steps:
            log(step, loss.item())
    return tokens
