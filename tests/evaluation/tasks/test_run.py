from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from memlayer.errors import ConfigError, DataError
from memlayer.evaluation.tasks.options import TaskOptions
from memlayer.evaluation.tasks.run import evaluate_task
from memlayer.evaluation.tasks.scores import exact_match, f1, normalise, starts_with
from memlayer.evaluation.tasks.task import Item, Task

if TYPE_CHECKING:
    from memlayer.backbones import Backbone
    from memlayer.evaluation.tasks.results import TaskResult
    from memlayer.model import LongMemModel


class Letters(Task):
    """Three groups of four items each."""

    name = "letters"
    summary = "Letters."
    answering: ClassVar[Any] = "choice"
    chance = 1 / 3
    needs_data = False

    def items(self, data: Path | None, split: str, tokenizer: Any) -> Iterator[Item]:
        for group in "xyz":
            for number in range(4):
                yield Item(
                    id=f"{group}{number}",
                    group=group,
                    memory=f"{group} is a letter. " * (number + 1),
                    prompt="the letter is",
                    choices=(" x", " y", " z"),
                    gold="xyz".index(group),
                    answers=(group,),
                )


class Written(Letters):
    answering = "generation"
    max_new_tokens = 4


class Nothing(Letters):
    def items(self, data: Path | None, split: str, tokenizer: Any) -> Iterator[Item]:
        return iter(())


def evaluated(model: Any, loaded: Backbone, task: Task | None = None, **options: Any) -> TaskResult:
    return evaluate_task(model, loaded.tokenizer, task or Letters(), TaskOptions(**options))


def test_every_condition_is_scored_on_every_item(model: LongMemModel, loaded: Backbone) -> None:
    seen = []
    result = evaluate_task(
        model,
        loaded.tokenizer,
        Letters(),
        TaskOptions(foreign_memory=True, dense_context=100),
        progress=lambda done, of: seen.append((done, of)),
    )
    names = ["backbone", "no_memory", "memory", "foreign_memory", "dense"]
    assert list(result.conditions) == names
    assert seen == [(number + 1, 12) for number in range(12)]
    assert all(list(scores) == names for scores in result.per_item.values())
    for name in names:
        values = [scores[name]["accuracy"] for scores in result.per_item.values()]
        score = result.conditions[name]["accuracy"]
        assert score.mean == pytest.approx(sum(values) / 12)
        deviation = torch.tensor(values, dtype=torch.float64).std().item()
        assert score.error == pytest.approx(deviation / math.sqrt(12))
        assert result.groups["x"][name]["accuracy"] == pytest.approx(sum(values[:4]) / 4)
    against = result.difference("memory", "foreign_memory", "loss")
    assert against.difference == pytest.approx(
        result.conditions["memory"]["loss"].mean - result.conditions["foreign_memory"]["loss"].mean
    )
    assert against.low is not None
    assert against.high is not None
    assert against.low < against.difference < against.high
    assert json.loads(json.dumps(result.to_dict()))["conditions"]["memory"]["loss"]["mean"]


def test_the_foreign_memory_is_another_groups_and_as_long(
    model: LongMemModel, loaded: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memlayer.evaluation.tasks.holding import HeldMemory

    held: list[str] = []
    hold = HeldMemory.hold
    monkeypatch.setattr(
        HeldMemory, "hold", lambda self, text: (held.append(text), hold(self, text))[1]
    )
    evaluated(model, loaded, foreign_memory=True)
    own, foreign = held[::2], held[1::2]
    assert [text[0] for text in own] == list("xxxxyyyyzzzz")
    assert [text[0] for text in foreign] == list("yyyyzzzzxxxx")
    assert [len(text) for text in own] == [len(text) for text in foreign]


def test_generated_answers_are_scored_by_the_tasks_scorers(
    model: LongMemModel, loaded: Backbone
) -> None:
    result = evaluated(model, loaded, Written())
    assert result.metrics == ("exact_match", "f1")
    assert list(result.conditions) == ["backbone", "no_memory", "memory"]


def test_items_are_spread_evenly(model: LongMemModel, loaded: Backbone) -> None:
    assert list(evaluated(model, loaded, max_items=4).per_item) == ["x0", "x3", "y2", "z1"]
    assert evaluated(model, loaded, max_items=100).items == 12


def test_a_backbone_alone_and_a_model_without_memory(model: LongMemModel, loaded: Backbone) -> None:
    alone = evaluated(loaded.model, loaded)
    without = evaluated(model, loaded, no_memory=True)
    assert list(alone.conditions) == ["backbone"]
    assert list(without.conditions) == ["backbone", "no_memory"]
    assert without.conditions["backbone"]["loss"].mean == pytest.approx(
        alone.conditions["backbone"]["loss"].mean, abs=1e-5
    )


def test_model_and_mode_are_as_before(model: LongMemModel, loaded: Backbone) -> None:
    model.memorize(torch.tensor([[1, 2, 3]]))
    before = model.memory
    model.train()
    evaluated(model, loaded, max_items=2)
    assert model.training
    assert model.memory is before
    assert model.memory.lengths.tolist() == [3]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (Nothing(), {}, "task 'letters' finds no items"),
        (Letters(), {"foreign_memory": True, "no_memory": True}, "foreign_memory needs a memory"),
        (Letters(), {"foreign_memory": True, "max_items": 1}, "two groups, got 'x' alone"),
        (Letters(), {"dense_context": 8}, "at least segment_length=48, got 8"),
    ],
)
def test_what_cannot_be_done_is_refused(
    model: LongMemModel, loaded: Backbone, task: Task, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        evaluated(model, loaded, task, **options)


@pytest.mark.parametrize("name", ["max_items", "segment_length", "memory_size", "dense_context"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_options_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a whole number"):
        TaskOptions(**{name: value})


@pytest.mark.parametrize(
    ("said", "right", "exact", "overlap"),
    [
        ("The Argo.", ("argo",), 1.0, 1.0),
        ("a ship", ("the ship Argo", "boat"), 0.0, 2 / 3),
        ("", ("x",), 0.0, 0.0),
        ("", ("the",), 1.0, 1.0),
        ("two two", ("two",), 0.0, 2 / 3),
    ],
)
def test_matches_of_text(said: str, right: tuple[str, ...], exact: float, overlap: float) -> None:
    assert exact_match(said, right) == exact
    assert f1(said, right) == pytest.approx(overlap)


def test_normalising_and_beginnings() -> None:
    assert normalise("  The  U.S.A., an idea ") == "usa idea"
    assert starts_with('"123-AB": yes', ("123-ab",)) == 1.0
    assert starts_with("so 123", ("123",)) == 0.0
