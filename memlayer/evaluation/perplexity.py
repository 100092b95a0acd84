"""Perplexity of one model on some documents: what memory brings, and against what.

Every condition scores the same tokens: all of every document but its first.

    backbone       the frozen backbone in the window
    no_memory      the side network, its memory off
    memory_<size>  the side network with that many tokens of memory, empty at each document's start
    foreign_memory the side network with the largest memory, which holds the next document instead
    knn_lm         the frozen backbone and the votes of its own nearest contexts of the past
    knn_memory     the largest memory and the same votes
    dense          the frozen backbone with far more context: the bound
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memlayer.config import LongMemConfig
from memlayer.data.windows import windows
from memlayer.discovery import parts_of
from memlayer.errors import ConfigError, DataError, ShapeError, UnsupportedModelError
from memlayer.evaluation.knn_lm import NearestTokens
from memlayer.evaluation.options import KNN_SETTINGS, PerplexityOptions, Progress, Windowing
from memlayer.evaluation.results import PerplexityResult, WindowReport
from memlayer.evaluation.scoring import (
    FOREIGN,
    KNN_LM,
    KNN_MEMORY,
    Foreign,
    backbone_losses,
    model_losses,
)
from memlayer.evaluation.summary import Losses, summarise
from memlayer.model import LongMemModel
from memlayer.modes import evaluating
from memlayer.plugins import default_plugins

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from memlayer.data import TokenDocument
    from memlayer.memory import MemoryBank


def evaluate_perplexity(
    model: LongMemModel | PreTrainedModel,
    documents: Sequence[TokenDocument],
    options: PerplexityOptions | None = None,
    *,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Score documents under every condition that the model and the options allow.

    The model's own memory and its training mode are as before afterwards.

    Args:
        model: a wrapped model, or a backbone alone: then its window and dense context are scored.
        documents: each scored whole but for its first token, and with a memory of its own.
        options: the defaults if None.
        progress: called after every window with the tokens read so far and in all.

    Raises:
        DataError: if there is no document, or one has fewer than two tokens.
        ConfigError: if an option does not fit the model or another option.
        ShapeError: if the model gives a loss that is not finite.
    """
    began = time.perf_counter()
    options = PerplexityOptions() if options is None else options
    _check_documents(documents)
    evaluation = _Evaluation.plan(model, documents, options, progress)
    with torch.inference_mode(), evaluating(model):
        reports = evaluation.run()
    return PerplexityResult(
        headline=evaluation.headline,
        tokens=sum(len(document.input_ids) - 1 for document in documents),
        backend=evaluation.backend,
        seconds=time.perf_counter() - began,
        overall=reports[0],
        fresh=reports[1] if len(reports) > 1 else None,
        settings={
            **asdict(evaluation.windowing),
            "fresh": options.fresh,
            "memory_sizes": list(evaluation.sizes.values()),
            "foreign_memory": options.foreign_memory,
            **{name: getattr(options, name) for name in KNN_SETTINGS if options.knn_lm},
            "resamples": options.resamples,
            "seed": options.seed,
        },
        notes=evaluation.notes(reports[0]),
    )


@dataclass(frozen=True, kw_only=True)
class _Evaluation:
    """One evaluation, its settings resolved.

    Attributes:
        model: wrapped model or backbone.
        documents: to score.
        options: as given.
        windowing: resolved.
        sizes: tokens of each memory condition, rising, by the condition's name.
        progress: as given.
    """

    model: LongMemModel | PreTrainedModel
    documents: Sequence[TokenDocument]
    options: PerplexityOptions
    windowing: Windowing
    sizes: Mapping[str, int]
    progress: Progress | None

    @classmethod
    def plan(
        cls,
        model: LongMemModel | PreTrainedModel,
        documents: Sequence[TokenDocument],
        options: PerplexityOptions,
        progress: Progress | None,
    ) -> _Evaluation:
        """Resolve the settings; nothing is computed yet."""
        sizes = options.memory_sizes
        if isinstance(model, LongMemModel):
            config, max_positions = model.memory_config, model.parts.max_positions
            sizes = (config.memory_size,) if sizes is None else sizes
        else:
            config, max_positions = LongMemConfig(), _max_positions(model)
            if sizes:
                raise ConfigError(
                    f"memory_sizes need a model with a side network, got {list(sizes)} and a "
                    "backbone alone; evaluate a checkpoint"
                )
        if options.foreign_memory and (not sizes or len(documents) < 2):
            raise ConfigError(
                f"foreign_memory needs a memory and at least two documents, got memory_sizes="
                f"{list(sizes or ())} and {len(documents)} documents; leave it out"
            )
        if options.knn_lm and not sizes:
            raise ConfigError(
                "knn_lm reads as many contexts as the largest memory holds tokens, got no "
                "memory_sizes; give a size, and a model that is wrapped"
            )
        return cls(
            model=model,
            documents=documents,
            options=options,
            windowing=Windowing.resolve(
                options, segment_length=config.segment_length, max_positions=max_positions
            ),
            sizes={f"memory_{size}": size for size in sizes or ()},
            progress=progress,
        )

    @property
    def headline(self) -> str:
        """Name the condition whose perplexity stands for the model."""
        if self.sizes:
            return list(self.sizes)[-1]
        return "no_memory" if isinstance(self.model, LongMemModel) else "backbone"

    @property
    def backend(self) -> str | None:
        """Name the backend that searches the memory; None without memory."""
        if self.sizes and isinstance(self.model, LongMemModel):
            return self.model.memory_config.backend
        return None

    @property
    def strides(self) -> list[int]:
        """Strides to report: the one asked for, then that of fresh segments if it differs."""
        asked, fresh = self.windowing.stride, self.windowing.segment_length
        return [asked, fresh] if self.options.fresh and asked != fresh else [asked]

    def run(self) -> list[WindowReport]:
        """Score everything and report on each stride."""
        advance = _counter(self.progress, self._tokens_to_read())
        # Dense context has windows of its own, whatever the stride: measured once for all.
        dense = {} if self.windowing.dense_context is None else {"dense": self._dense(advance)}
        reports = []
        for stride in self.strides:
            by_condition, held = self._score(stride, advance)
            losses = Losses(
                documents=self.documents,
                by_condition=by_condition | dense,
                held=held,
                sizes=self.sizes,
                segment_length=self.windowing.segment_length,
                stride=stride,
            )
            _check_finite(losses)
            reports.append(
                summarise(losses, resamples=self.options.resamples, seed=self.options.seed)
            )
        return reports

    def notes(self, report: WindowReport) -> tuple[str, ...]:
        """Say what a reader of the numbers must know."""
        unread = [item.id for item in report.per_document if item.memory_tokens_held == 0]
        if not self.sizes or not unread:
            return ()
        named = ", ".join(unread[:3]) + (f" and {len(unread) - 3} more" if unread[3:] else "")
        return (
            f"memory is never read in {len(unread)} of {len(report.per_document)} documents, "
            f"which fit in one window of {self.windowing.segment_length} tokens: {named}",
        )

    def _tokens_to_read(self) -> int:
        cuts = [(self.windowing.segment_length, stride) for stride in self.strides]
        if self.windowing.dense_context is not None:
            cuts.append((self.windowing.dense_context, self.windowing.dense_stride))
        return sum(
            window.end - window.start
            for document in self.documents
            for length, stride in cuts
            for window in windows(len(document.input_ids) - 1, length, stride)
        )

    def _dense(self, advance: Callable[[int], None]) -> list[Tensor]:
        assert self.windowing.dense_context is not None
        backbone = self.model.backbone if isinstance(self.model, LongMemModel) else self.model
        return [
            backbone_losses(
                backbone,
                document.input_ids,
                segment_length=self.windowing.dense_context,
                stride=self.windowing.dense_stride,
                advance=advance,
            )
            for document in self.documents
        ]

    def _score(
        self, stride: int, advance: Callable[[int], None]
    ) -> tuple[dict[str, list[Tensor]], list[int]]:
        """Give the losses of every document by condition, and the tokens that memory held."""
        model = self.model
        cut = {"segment_length": self.windowing.segment_length, "stride": stride}
        if not isinstance(model, LongMemModel):
            losses = [
                backbone_losses(model, document.input_ids, **cut, advance=advance)
                for document in self.documents
            ]
            return {"backbone": losses}, [0] * len(losses)
        overlap = self.windowing.segment_length - stride
        memories = {
            name: model.new_memory(size, overlap=overlap) for name, size in self.sizes.items()
        }
        by_condition: dict[str, list[Tensor]] = {
            name: [] for name in ("backbone", "no_memory", *memories)
        }
        if self.options.foreign_memory:
            by_condition[FOREIGN] = []
            other_memory = model.new_memory(self.sizes[self.headline], overlap=overlap)
        if self.options.knn_lm:
            by_condition |= {KNN_LM: [], KNN_MEMORY: []}
        held = []
        for index, document in enumerate(self.documents):
            read = self._distinct(memories, len(document.input_ids) - 1)
            foreign = None
            if self.options.foreign_memory:
                other = self.documents[(index + 1) % len(self.documents)]
                other_memory.clear()
                foreign = Foreign(other.input_ids, other_memory)
            scored, most_held = model_losses(
                model,
                document.input_ids,
                memories=read,
                foreign=foreign,
                nearest=self._nearest(model) if self.options.knn_lm else None,
                **cut,
                advance=advance,
            )
            for name, losses in by_condition.items():
                losses.append(scored.get(name, scored[self.headline]))
            held.append(most_held)
            for memory in read.values():
                memory.clear()
        return by_condition, held

    def _nearest(self, model: LongMemModel) -> NearestTokens:
        return NearestTokens(
            model.new_index(1, model.parts.hidden_size + 1),
            capacity=self.sizes[self.headline],
            neighbors=self.options.knn_neighbors,
            weight=self.options.knn_weight,
            temperature=self.options.knn_temperature,
        )

    def _distinct(
        self, memories: Mapping[str, MemoryBank], positions: int
    ) -> dict[str, MemoryBank]:
        """Leave out memories that hold the whole document, as the largest does."""
        return {
            name: memory
            for name, memory in memories.items()
            if memory.capacity < positions or name == self.headline
        }


def _check_documents(documents: Sequence[TokenDocument]) -> None:
    if not documents:
        raise DataError("there is no document to evaluate, got an empty list")
    for document in documents:
        if len(document.input_ids) < 2:
            raise DataError(
                f"document {document.id!r} has {len(document.input_ids)} tokens; at least 2 are "
                "needed, since the first one is never scored"
            )


def _check_finite(losses: Losses) -> None:
    for name, parts in losses.by_condition.items():
        for document, part in zip(losses.documents, parts, strict=True):
            wrong = (~part.isfinite()).nonzero()
            if len(wrong):
                place = int(wrong[0])
                raise ShapeError(
                    f"condition {name!r} gives token {place + 1} of document {document.id!r} the "
                    f"loss {float(part[place])}; the weights are damaged, or the dtype is too "
                    "narrow"
                )


def _max_positions(backbone: PreTrainedModel) -> int | None:
    """Give the size of a learned position table; None for others and for unknown families."""
    try:
        return parts_of(backbone, default_plugins()).max_positions
    except UnsupportedModelError:
        return None


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress is not None:
            progress(done, total)

    return advance
