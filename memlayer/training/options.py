"""How a model is trained: the one place where defaults, units and checks of it live.

No torch here: the command line reads the defaults to print its help.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from memlayer.errors import ConfigError

TrainingDtype = Literal["fp32", "bf16"]

MAY_CHANGE_ON_RESUME = frozenset(
    {
        "eval_every",
        "save_every",
        "keep_checkpoints",
        "gradient_checkpointing",
        "memory_storage",
        "report_to",
    }
)
"""What leaves every loss as it is: when to look or save, what to compute twice, where to keep."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Length, optimiser and cadence of one training run.

    AdamW's constants and the linear decay are the paper's (arXiv:2306.07174). Its scale is not
    (256 sequences a step, 100,000 steps, learning rate 2e-4): the defaults here suit one machine,
    and docs/training.md says where each comes from.

    Raises:
        ConfigError: if a field has a wrong value; the message names field, value and remedy.
    """

    steps: int | None = 500
    """Optimiser steps. None where ``tokens`` says how long to train."""

    tokens: int | None = None
    """Tokens to train on, rounded up to whole steps. None where ``steps`` says it."""

    batch_size: int = 1
    """Streams read side by side, each with a memory of its own."""

    gradient_accumulation: int = 1
    """Segments that each stream reads per step. The loss is the mean over all of their tokens."""

    stride: int | None = None
    """Tokens between the starts of two segments of a document. Below ``segment_length`` segments
    overlap: each token is trained on once, and has at least the tokens of the overlap before it, as
    when a model generates. None: ``segment_length``, segments that share nothing, as the paper's.
    """

    excerpt_tokens: int | None = None
    """Tokens of a document to train on at a turn, from a random place, another one in every epoch,
    before the next document has its turn. A document that is no longer is read whole. None: all
    documents are read from beginning to end."""

    lead_tokens: int = 0
    """Tokens before an excerpt, at most, that are memorized and not trained on: a random number for
    each excerpt, so that training reads memories of all sizes up to this and what comes after."""

    memory_dropout: float = 0.0
    """Probability with which a segment of every row is read without memory, and then remembered as
    any other: what a network says without memory is trained only by segments that have none."""

    learning_rate: float = 2e-4
    """Peak learning rate of the side network's weights."""

    gate_learning_rate: float = 1e-1
    """Peak learning rate of the gates: single numbers that have far to go. It is also that of the
    slopes of a recency bias, and of layer scales, which ``side_init="identity"`` has; for these
    2e-2 to 4e-2 was tried."""

    warmup: float = 0.05
    """Part of the steps over which learning rates rise from 0 to their peak, 0 to 1. From there
    they fall linearly, to reach 0 one step after the last."""

    weight_decay: float = 0.01
    """AdamW's, on weight matrices only: not on gates, slopes, layer scales, norms, biases."""

    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""

    beta2: float = 0.98
    """AdamW's decay of the mean squared gradient."""

    epsilon: float = 1e-6
    """AdamW's."""

    max_gradient_norm: float | None = 1.0
    """Gradients are scaled down to this Euclidean norm over all parameters. None: never."""

    dtype: TrainingDtype = "fp32"
    """``"bf16"``: forward and backward under bfloat16 autocast. Weights stay float32."""

    gradient_checkpointing: bool = False
    """Keep only the input of each side layer, and run the layer again in the backward pass: less
    memory, more time."""

    compile: bool = False
    """Compile the layers that memory does not reach into (`LongMemModel.compile`), which takes a
    minute or so at the start. Results differ by rounding."""

    seed: int = 0
    """Seed of the document order and of dropout."""

    eval_every: int | None = 50
    """Steps between evaluations on validation documents; the first step and the last one are
    always evaluated. None: only these."""

    eval_tokens: int = 16_384
    """Validation tokens scored at each evaluation, always the same ones."""

    eval_documents: int = 2
    """Validation documents, the longest ones, that ``eval_tokens`` is shared out to: few, since
    only what goes beyond a document's first segment can be read with memory."""

    save_every: int | None = 100
    """Steps between checkpoints to resume from. None: one only when interrupted."""

    keep_checkpoints: int = 2
    """Newest checkpoints kept; older ones are deleted."""

    report_to: tuple[str, ...] = ()
    """Trackers that get what the log gets, by accelerate's names: ``"tensorboard"``, ``"wandb"``,
    ... Their packages must be installed; some of them send what they get over the network."""

    def __post_init__(self) -> None:
        self._check_length()
        for name in ("batch_size", "gradient_accumulation", "eval_documents", "keep_checkpoints"):
            _check_count(name, getattr(self, name), 1)
        for name in ("stride", "excerpt_tokens", "eval_every", "save_every"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), 1)
        _check_count("lead_tokens", self.lead_tokens, 0)
        if self.lead_tokens and self.excerpt_tokens is None:
            raise ConfigError(
                f"lead_tokens={self.lead_tokens} needs excerpts to lead to; set excerpt_tokens, "
                "how many tokens of a document to train on at a turn"
            )
        _check_count("eval_tokens", self.eval_tokens, 2)
        _check_count("seed", self.seed, 0)
        for name in ("learning_rate", "gate_learning_rate", "epsilon"):
            _check_number(name, getattr(self, name))
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        _check_number("weight_decay", self.weight_decay)
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay must be at least 0, got {self.weight_decay}")
        for name in ("memory_dropout", "warmup", "beta1", "beta2"):
            _check_number(name, getattr(self, name))
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} must be at least 0 and below 1, got {getattr(self, name)}"
                )
        if self.max_gradient_norm is not None:
            _check_number("max_gradient_norm", self.max_gradient_norm)
            if self.max_gradient_norm <= 0:
                raise ConfigError(
                    f"max_gradient_norm must be above 0, or None for no limit, got "
                    f"{self.max_gradient_norm}"
                )
        for name in ("gradient_checkpointing", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        names = self.report_to
        if not isinstance(names, (tuple, list)) or not all(isinstance(n, str) for n in names):
            raise ConfigError(
                f"report_to must be names of trackers, such as ('tensorboard',), got {names!r:.80}"
            )
        object.__setattr__(self, "report_to", tuple(names))
        if self.dtype not in get_args(TrainingDtype):
            raise ConfigError(
                f"dtype must be one of {', '.join(get_args(TrainingDtype))}, got {self.dtype!r}"
            )

    def _check_length(self) -> None:
        if (self.steps is None) == (self.tokens is None):
            raise ConfigError(
                f"give either steps or tokens and None for the other, got steps={self.steps} "
                f"and tokens={self.tokens}"
            )
        for name in ("steps", "tokens"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), 1)

    def tokens_per_step(self, segment_length: int) -> int:
        """Give the tokens that one optimiser step trains on, but for documents' beginnings."""
        new = segment_length if self.stride is None else self.stride
        return self.batch_size * self.gradient_accumulation * new

    def total_steps(self, segment_length: int) -> int:
        """Give the number of optimiser steps."""
        if self.tokens is not None:
            return math.ceil(self.tokens / self.tokens_per_step(segment_length))
        assert self.steps is not None
        return self.steps

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingOptions:
        """Make options from what `to_dict` gave.

        Raises:
            ConfigError: if a key is unknown.
        """
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"the training options have unknown keys {', '.join(unknown)}; known: "
                f"{', '.join(sorted(known))}"
            )
        return cls(**values)


def _check_count(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be a whole number, got {value!r}")
    if value < minimum:
        raise ConfigError(f"{name} must be at least {minimum}, got {value}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value!r}")
