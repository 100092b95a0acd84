"""Evaluate a task: all of its items under all conditions, and what lies between them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from memlayer.errors import ConfigError, DataError
from memlayer.evaluation.statistics import student_interval
from memlayer.evaluation.tasks.answering import Answerer, Likelihoods
from memlayer.evaluation.tasks.holding import HeldMemory
from memlayer.evaluation.tasks.options import TaskOptions
from memlayer.evaluation.tasks.results import Difference, Score, TaskResult
from memlayer.model import LongMemModel
from memlayer.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from memlayer.evaluation.options import Progress
    from memlayer.evaluation.tasks.task import Item, Split, Task

Scores: TypeAlias = dict[str, dict[str, float]]

METRICS = {"choice": ("accuracy", "loss"), "target": ("loss", "accuracy")}
"""Where nothing is generated. ``accuracy``: the right choice is the likeliest; of a target: greedy
decoding writes it. ``loss``: of the right choice, nats a token."""

PLAIN_WINDOW = 1024
"""Tokens of the window of a backbone alone."""


def evaluate_task(
    model: LongMemModel | PreTrainedModel,
    tokenizer: Any,
    task: Task,
    options: TaskOptions | None = None,
    *,
    data: Path | None = None,
    split: Split = "test",
    progress: Progress | None = None,
) -> TaskResult:
    """Score a task's items under every condition that the model and the options allow.

    The model's own memory and its training mode are as before afterwards.

    Args:
        model: a wrapped model, or a backbone alone.
        tokenizer: its own.
        task: what to score.
        options: the defaults if None.
        data: the folder of data sets.
        split: which part of them.
        progress: called after every item with the items done and in all.

    Raises:
        DataError: if the task finds no items, or its files are not what they should be.
        ConfigError: if an option does not fit.
    """
    began = time.perf_counter()
    options = TaskOptions() if options is None else options
    if task.needs_data and data is None:
        raise ConfigError(f"task {task.name!r} reads files; give the folder that they are in")
    items = _chosen(list(task.items(data, split, tokenizer)), options.max_items)
    if not items:
        raise DataError(f"task {task.name!r} finds no items in {data}, split {split}")
    answerer = _answerer(model, tokenizer, options)
    foreign = _foreign(items) if options.foreign_memory else None
    scores: dict[str, Scores] = {}
    with torch.inference_mode(), evaluating(model):
        for number, item in enumerate(items):
            if "memory" in answerer.memories:
                answerer.memories["memory"].hold(item.memory)
            if foreign is not None:
                answerer.memories["foreign_memory"].hold(foreign[number])
            scores[item.id] = _scored(answerer, task, item)
            if progress is not None:
                progress(number + 1, len(items))
    metrics = METRICS.get(task.answering) or tuple(task.scorers)
    return TaskResult(
        task=task.name,
        metrics=metrics,
        items=len(items),
        chance=task.chance,
        conditions=_conditions(list(scores.values()), metrics),
        groups=_groups(items, scores, metrics),
        differences=tuple(_differences(list(scores.values()), metrics)),
        seconds=time.perf_counter() - began,
        settings={
            **asdict(options),
            "segment_length": answerer.window,
            "memory_size": answerer.memories["memory"].bank.capacity if answerer.memories else 0,
            "split": split,
            "task_options": asdict(task.options),
        },
        notes=_notes(items),
        per_item=scores,
    )


def _chosen(items: list[Item], count: int | None) -> list[Item]:
    """Give that many items, spread evenly."""
    if count is None or count >= len(items):
        return items
    return [items[number * len(items) // count] for number in range(count)]


def _answerer(
    model: LongMemModel | PreTrainedModel, tokenizer: Any, options: TaskOptions
) -> Answerer:
    memories: dict[str, HeldMemory] = {}
    overflow = None
    if isinstance(model, LongMemModel):
        window = options.segment_length or model.memory_config.segment_length
        if not options.no_memory:
            names = ["memory", *(["foreign_memory"] if options.foreign_memory else [])]
            memories = {name: HeldMemory(model, tokenizer, options.memory_size) for name in names}
            overflow = HeldMemory(model, tokenizer)
    else:
        window = options.segment_length or PLAIN_WINDOW
    if options.foreign_memory and not memories:
        raise ConfigError("foreign_memory needs a memory; give a checkpoint, without no_memory")
    if options.dense_context is not None and options.dense_context < window:
        raise ConfigError(
            f"dense_context must be at least segment_length={window}, got {options.dense_context}"
        )
    return Answerer(
        model=model,
        tokenizer=tokenizer,
        window=window,
        memories=memories,
        overflow=overflow,
        dense_context=options.dense_context,
    )


def _foreign(items: Sequence[Item]) -> list[str]:
    """Give each item a memory of the next group, as long as its own."""
    longest: dict[str, str] = {}
    for item in items:
        if len(item.memory) > len(longest.get(item.group, "")):
            longest[item.group] = item.memory
    groups = list(dict.fromkeys(item.group for item in items))
    if len(groups) < 2:
        raise ConfigError(
            f"foreign_memory needs items of at least two groups, got {groups[0]!r} alone; leave it "
            "out, or score more items"
        )
    following = dict(zip(groups, [*groups[1:], groups[0]], strict=True))
    return [longest.get(following[item.group], "")[: len(item.memory)] for item in items]


def _scored(answerer: Answerer, task: Task, item: Item) -> Scores:
    if task.answering == "generation":
        return {
            name: {metric: scorer(text, item.answers) for metric, scorer in task.scorers.items()}
            for name, text in answerer.write(item, task.max_new_tokens).items()
        }
    found = answerer.choose(item)
    right = _is_greedy if task.answering == "target" else _is_likeliest
    return {
        name: {
            "accuracy": right(likelihoods, item.gold),
            "loss": float(-likelihoods.logs[item.gold] / likelihoods.tokens[item.gold]),
        }
        for name, likelihoods in found.items()
    }


def _is_likeliest(found: Likelihoods, gold: int) -> float:
    return float(int(found.logs.argmax()) == gold)


def _is_greedy(found: Likelihoods, gold: int) -> float:
    return float(found.greedy[gold])


def _conditions(scores: Sequence[Scores], metrics: Sequence[str]) -> dict[str, dict[str, Score]]:
    return {
        name: {metric: _mean([score[name][metric] for score in scores]) for metric in metrics}
        for name in scores[0]
    }


def _mean(values: Sequence[float]) -> Score:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Score(mean=mean, error=None)
    return Score(mean=mean, error=statistics.stdev(values) / math.sqrt(len(values)))


def _groups(
    items: Sequence[Item], scores: Mapping[str, Scores], metrics: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    members: dict[str, list[Scores]] = {}
    for item in items:
        members.setdefault(item.group, []).append(scores[item.id])
    return {
        group: {
            name: {metric: _mean([one[name][metric] for one in own]).mean for metric in metrics}
            for name in own[0]
        }
        for group, own in members.items()
    }


def _differences(scores: Sequence[Scores], metrics: Sequence[str]) -> Iterator[Difference]:
    names = set(scores[0])
    pairs = [
        ("memory", "no_memory"),
        ("memory", "backbone"),
        ("memory", "foreign_memory"),
        ("foreign_memory", "no_memory"),
        ("no_memory", "backbone"),
        ("dense", "backbone"),
    ]
    for metric in metrics:
        for condition, against in pairs:
            if not {condition, against} <= names:
                continue
            values = torch.tensor(
                [score[condition][metric] - score[against][metric] for score in scores],
                dtype=torch.float64,
            )
            low = high = None
            if len(values) > 1:
                low, high = student_interval(values, torch.ones_like(values))
            yield Difference(
                metric=metric,
                condition=condition,
                against=against,
                difference=float(values.mean()),
                low=low,
                high=high,
            )


def _notes(items: Sequence[Item]) -> tuple[str, ...]:
    empty = sum(not item.memory for item in items)
    return (f"{empty} of {len(items)} items have no memory to read",) if empty else ()
