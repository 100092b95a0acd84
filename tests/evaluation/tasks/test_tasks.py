"""What each built-in task makes of its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from memlayer.errors import ConfigError, DataError
from memlayer.evaluation.tasks.answering import Answerer
from memlayer.evaluation.tasks.chapterbreak import ChapterBreak, ChapterBreakOptions
from memlayer.evaluation.tasks.icl import InContextLearning, InContextLearningOptions
from memlayer.evaluation.tasks.kv import KeyValues, KeyValuesOptions
from memlayer.evaluation.tasks.lookup import task_type
from memlayer.evaluation.tasks.options import TaskOptions
from memlayer.evaluation.tasks.passkey import Passkey, PasskeyOptions
from memlayer.evaluation.tasks.recall import FarNames, FarNamesOptions
from memlayer.evaluation.tasks.run import evaluate_task
from memlayer.evaluation.tasks.squad import Squad, SquadOptions
from memlayer.plugins import default_plugins

if TYPE_CHECKING:
    from memlayer.backbones import Backbone
    from memlayer.evaluation.tasks.task import Item, Task
    from memlayer.model import LongMemModel

Write = Callable[..., Path]

BOOK = "".join(f"Line {number} of the book about Argo. " for number in range(40))


@pytest.fixture
def data(write_records: Write) -> Path:
    passages = [{"chapter": n, "start": 0, "end": 9, "text": f"Passage {n}."} for n in range(6)]
    question = {"title": "Sea", "context": "The ship is the Argo.", "question": "Which ship?"}
    questions = [
        {"id": str(n), **question, "answers": [{"text": "Argo", "answer_start": 16}]}
        for n in range(5)
    ]
    sentences = [
        {"text": f"{word} film {n}", "label": label}
        for n in range(6)
        for word, label in (("good", "positive"), ("dull", "negative"))
    ]
    types = [{"text": f"text {n}", "label": "objective"} for n in range(12)]
    pairs = [[f"k{n}", f"v{n}"] for n in range(75)]
    target = BOOK.index("Argo", 900)
    return write_records(
        {
            "icl/sst2_train": sentences,
            "icl/sst2_test": sentences[:3],
            "icl/subj_train": types,
            "icl/subj_test": types[:2],
            "qa/squad_xquad_en_train": questions,
            "qa/squad_xquad_en_test": questions[:2],
            "books/books_test": [{"id": "b1", "text": BOOK}],
            "chapterbreak/chapterbreak_test": [
                {
                    "id": "b1-c2",
                    "book_id": "b1",
                    "prefix_start": 0,
                    "prefix_end": 1000,
                    "candidates": passages,
                    "label": 3,
                }
            ],
            "recall/farname_test": [
                {"id": "far", "book_id": "b1", "target_start": target, "target": "Argo"},
                {"id": "near", "book_id": "b1", "target_start": 27, "target": "Argo"},
            ],
            "retrieval/kv_75_keys": [
                {"id": "kv0", "key": "k7", "value": "v7", "key_index": 7, "records": pairs}
            ],
        }
    )


def items(task: Task, data: Path | None, loaded: Backbone, split: Any = "test") -> list[Item]:
    return list(task.items(data, split, loaded.tokenizer))


def test_in_context_learning(data: Path, loaded: Backbone) -> None:
    options = InContextLearningOptions(datasets=("sst2", "subj"), shots=2, cached=4, seeds=2)
    found = items(InContextLearning(options), data, loaded)
    assert len(found) == 2 * (3 + 2)
    assert len({item.id for item in found}) == len(found)
    first = found[0]
    assert first.choices == (" positive", " negative")
    assert first.choices[first.gold] == " positive"
    assert first.memory.count("Sentiment:") == 4
    assert first.prompt.count("Sentiment:") == 3
    assert first.prompt.endswith("Text: good film 0\nSentiment:")
    # One memory for all questions of a drawing, another for the next; data sets take turns.
    groups = list(dict.fromkeys(item.group for item in found))
    assert groups == ["sst2, seed 0", "subj, seed 0", "sst2, seed 1", "subj, seed 1"]
    memories = {group: {i.memory for i in found if i.group == group} for group in groups}
    assert all(len(own) == 1 for own in memories.values())
    assert memories["sst2, seed 0"] != memories["sst2, seed 1"]
    assert "Type: objective" in next(iter(memories["subj, seed 0"]))
    again = items(InContextLearning(options), data, loaded)
    assert again == found


def test_in_context_learning_by_greedy_prefix(
    data: Path, loaded: Backbone, model: LongMemModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = InContextLearningOptions(datasets=("sst2",), shots=2, cached=4, seeds=1, greedy=True)
    task = InContextLearning(options)
    assert InContextLearning().answering == "choice"
    assert {item.answers for item in items(task, data, loaded)} == {("positive",), ("negative",)}
    written = iter(["positive, I think", "The text is positive"] * 100)
    monkeypatch.setattr(Answerer, "_generated", lambda *_: next(written))
    result = evaluate_task(model, loaded.tokenizer, task, TaskOptions(max_items=1), data=data)
    assert result.metrics == ("accuracy",)
    # Each condition writes once: backbone, memory off, memory on. The label has to come first.
    scores = {name: score["accuracy"].mean for name, score in result.conditions.items()}
    assert scores == {"backbone": 1.0, "no_memory": 0.0, "memory": 1.0}


def test_no_demonstration_is_both_in_the_window_and_in_memory(data: Path, loaded: Backbone) -> None:
    options = InContextLearningOptions(datasets=("sst2",), shots=6, cached=6, seeds=1)
    item = items(InContextLearning(options), data, loaded)[0]
    shown = item.prompt.split("\n\n")[:-1]
    assert len(shown) == 6
    assert not set(shown) & set(item.memory.split("\n\n"))


def test_chapterbreak(data: Path, loaded: Backbone) -> None:
    options = ChapterBreakOptions(prefix_characters=600, local_characters=100)
    (item,) = items(ChapterBreak(options), data, loaded)
    assert item.memory + item.prompt == BOOK[:1000][-600:].rstrip()
    assert len(item.prompt) == 100
    assert item.choices[item.gold] == "\n\nPassage 3."
    assert len(item.choices) == 6


def test_squad(data: Path, loaded: Backbone) -> None:
    found = items(Squad(SquadOptions(shots=2, cached=3)), data, loaded)
    assert len(found) == 2
    assert found[0].memory.count("Answer: Argo\n\n") == 3
    assert found[0].prompt.count("Answer: Argo\n\n") == 2
    assert found[0].prompt.endswith("Which ship?\nAnswer:")
    assert found[0].answers == ("Argo",)


def test_far_names_continue_one_memory(data: Path, loaded: Backbone) -> None:
    near, far = items(FarNames(FarNamesOptions(local_characters=20)), data, loaded)
    assert (near.id, far.id) == ("near", "far")
    assert far.memory.startswith(near.memory)
    assert far.memory + far.prompt + far.choices[0] == BOOK[: BOOK.index("Argo", 900) + 4]
    assert far.choices == (" Argo",)
    (only,) = items(FarNames(FarNamesOptions(max_characters=100)), data, loaded)
    assert only.id == "near"


def test_key_values(data: Path, loaded: Backbone) -> None:
    (item,) = items(KeyValues(), data, loaded)
    assert '"k7": "v7"\n' in item.memory
    assert item.prompt == '"k7":'
    assert item.answers == ("v7",)
    with pytest.raises(DataError, match="kv has a test split only, got 'validation'"):
        items(KeyValues(), data, loaded, "validation")


def test_passkeys_lie_from_beginning_to_end_at_any_length(loaded: Backbone) -> None:
    task = Passkey(PasskeyOptions(lengths=(500, 2000), per_length=3))
    found = items(task, None, loaded)
    assert len(found) == 6
    for item in found:
        (key,) = item.answers
        assert item.memory.count(key) == 2
        assert key not in item.prompt
    places = [item.memory.index("The pass key") / len(item.memory) for item in found[3:]]
    assert places[0] == 0
    assert 0.4 < places[1] < 0.6
    assert places[2] > 0.9
    tokens = len(loaded.tokenizer(found[-1].memory)["input_ids"])
    assert tokens == pytest.approx(2000, rel=0.15)
    other = items(task, None, loaded, "validation")
    assert {item.answers for item in other}.isdisjoint({item.answers for item in found})


@pytest.mark.parametrize("name", ["icl", "chapterbreak", "squad", "recall", "kv", "passkey"])
def test_each_is_registered_and_runs(
    name: str, data: Path, loaded: Backbone, model: LongMemModel
) -> None:
    small: dict[str, Any] = {
        "icl": InContextLearningOptions(datasets=("sst2", "subj"), shots=1, cached=2, seeds=1),
        "chapterbreak": ChapterBreakOptions(prefix_characters=300, local_characters=20),
        "squad": SquadOptions(shots=1, cached=1),
        "recall": FarNamesOptions(),
        "kv": KeyValuesOptions(),
        "passkey": PasskeyOptions(lengths=(64,), per_length=2),
    }
    task = task_type(name, default_plugins())(small[name])
    assert task.name == name
    window = TaskOptions(segment_length=task.max_new_tokens + 16)
    result = evaluate_task(model, loaded.tokenizer, task, window, data=data)
    assert result.items >= 1
    assert {"backbone", "no_memory", "memory"} <= set(result.conditions)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: InContextLearningOptions(datasets=("imdb",)),
            "datasets must be of .*'imdb'",
        ),
        (lambda: InContextLearningOptions(datasets=()), "at least one data set"),
        (lambda: InContextLearningOptions(cached=-1), "cached must be .* at least 0, got -1"),
        (lambda: ChapterBreakOptions(prefix_characters=10), "at least 4000, got 10"),
        (lambda: SquadOptions(shots=-1), "shots must be"),
        (lambda: FarNamesOptions(local_characters=0), "local_characters must be"),
        (lambda: KeyValuesOptions(pairs=100), "pairs must be 75 or 140, got 100"),
        (lambda: PasskeyOptions(lengths=(3,)), "lengths must be .* at least 64, got 3"),
    ],
)
def test_options_are_checked(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_too_many_demonstrations_are_refused(data: Path, loaded: Backbone) -> None:
    with pytest.raises(ConfigError, match="at most the 12 training sentences of sst2, got 2020"):
        items(InContextLearning(InContextLearningOptions(datasets=("sst2",))), data, loaded)
    with pytest.raises(ConfigError, match="at most the 5 training questions, got 103"):
        items(Squad(), data, loaded)


def test_damaged_and_missing_files_are_named(write_records: Write, loaded: Backbone) -> None:
    data = write_records({"retrieval/kv_75_keys": [{"id": "a", "key": "k"}]})
    with pytest.raises(DataError, match=r"kv_75_keys.jsonl.gz:1 lacks value, records"):
        items(KeyValues(), data, loaded)
    with pytest.raises(DataError, match=r"there is no .*books_test.jsonl|farname_test.jsonl"):
        items(FarNames(), data, loaded)
    (data / "retrieval" / "kv_75_keys.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="is not a whole gzip file"):
        items(KeyValues(), data, loaded)


def test_the_real_files_are_read(shared: Path, loaded: Backbone) -> None:
    data = shared / "data"
    assert len(items(ChapterBreak(), data, loaded, "validation")) == 62
    assert len(items(Squad(), data, loaded)) == 619
    assert len(items(KeyValues(KeyValuesOptions(pairs=140)), data, loaded)) == 100
    names = items(FarNames(FarNamesOptions(max_characters=10**9)), data, loaded, "validation")
    assert len(names) == 199
    assert all(item.prompt == item.prompt.rstrip() for item in names)
    one = InContextLearningOptions(datasets=("sst5",), seeds=1)
    assert len(items(InContextLearning(one), data, loaded)) == 1476
