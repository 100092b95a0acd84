"""A whole suite on a tiny model: every step, resumed, and reported."""

from __future__ import annotations

import gzip
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import memlayer
from memlayer.errors import ConfigError, DataError, UnknownNameError
from memlayer.evaluation.cost import measure_cost
from memlayer.evaluation.suite import run as suite_run
from memlayer.evaluation.suite.plan import DOMAINS, SUITES, chosen_steps, steps_of
from memlayer.evaluation.suite.report import write_report
from memlayer.evaluation.suite.run import Subject, run_suite
from memlayer.evaluation.tasks.lookup import task_type
from memlayer.evaluation.tasks.options import TaskOptions
from memlayer_cli.main import run

if TYPE_CHECKING:
    from memlayer.model import LongMemModel

BOOK = "".join(f"On day {number} the Argo saw land and Ada wrote it down. " for number in range(80))


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for domain in DOMAINS:
        texts = [{"id": f"{domain}{n}", "text": f"{n} {BOOK}"[:1600]} for n in range(3)]
        if domain == "books":
            texts.append({"id": "b", "text": BOOK})
        write(folder / domain / f"{domain}_test.jsonl.gz", texts)
    for name, label in (("sst2", "positive"), ("mr", "negative"), ("subj", "objective"),
                        ("sst5", "okay"), ("mpqa", "positive")):  # fmt: skip
        rows = [{"text": f"text {n}", "label": label} for n in range(30)]
        write(folder / "icl" / f"{name}_train.jsonl.gz", rows)
        write(folder / "icl" / f"{name}_test.jsonl.gz", rows[:2])
    asked = [
        {
            "id": str(n),
            "title": "Sea",
            "context": "The Argo saw land.",
            "question": "Who?",
            "answers": [{"text": "Argo"}],
        }
        for n in range(5)
    ]
    for part in ("train", "test"):
        write(folder / "qa" / f"squad_xquad_en_{part}.jsonl.gz", asked)
    passages = [{"text": f"{n} is a passage."} for n in range(6)]
    chapter = {"book_id": "b", "prefix_start": 0, "candidates": passages, "label": 2}
    chapters = [{"id": str(n), "prefix_end": 1000 * n, **chapter} for n in (1, 2)]
    write(folder / "chapterbreak" / "chapterbreak_test.jsonl.gz", chapters)
    places = [BOOK.index("Argo", start) for start in (600, 1900)]
    names = [
        {"id": str(place), "book_id": "b", "target_start": place, "target": "Argo"}
        for place in places
    ]
    write(folder / "recall" / "farname_test.jsonl.gz", names)
    pairs = [[f"k{n}", f"v{n}"] for n in range(75)]
    write(
        folder / "retrieval" / "kv_75_keys.jsonl.gz",
        [{"id": "kv", "key": "k7", "value": "v7", "records": pairs}],
    )
    return folder


@pytest.fixture
def make_checkpoint(
    tiny_checkpoint: Callable[[str], Path], as_trained: Callable[..., LongMemModel], tmp_path: Path
) -> Callable[..., str]:
    def make(name: str, seed: int) -> str:
        backbone = memlayer.load_backbone(str(tiny_checkpoint("llama"))).model
        config = memlayer.LongMemConfig(
            backend="torch", segment_length=128, memory_size=1024, top_k=8, chunk_size=4
        )
        as_trained(memlayer.wrap(backbone, config), seed=seed).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


@pytest.fixture
def subject(data: Path, make_checkpoint: Callable[..., str]) -> Subject:
    return Subject(
        checkpoint=make_checkpoint("run", 0), control=make_checkpoint("control", 1), data=data
    )


def test_the_small_suite_runs_resumes_and_reports(
    subject: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert subject.control is not None
    output = tmp_path / "out"
    call = ["eval", "suite", "small", "--checkpoint", subject.checkpoint]
    call += ["--control", subject.control, "--data", str(subject.data), "--output", str(output)]
    assert run(call) == 0
    assert capsys.readouterr().err.count("there already") == 0
    results = sorted((output / "results").iterdir())
    # Every step, and perplexity of the control.
    scored = [step for step in SUITES["small"] if step.kind == "perplexity"]
    assert len(results) == len(SUITES["small"]) + len(scored)
    before = {path: path.stat().st_mtime_ns for path in results}
    report = (output / "report.md").read_text(encoding="utf-8")
    for step in SUITES["small"]:
        heading = "## Cost of the past" if step.kind == "cost" else f"**{step.name}**"
        assert heading in report
    assert "| trained without memory |" in report
    assert "| foreign memory |" in report
    figures = sorted(path.name for path in (output / "figures").iterdir())
    assert figures == [
        "cost.png",
        "gates.png",
        "local_context.png",
        "memory_size.png",
        "recovery.png",
        "tasks.png",
    ]
    content = json.loads((output / "report.json").read_text(encoding="utf-8"))
    books = content["results"]["perplexity-books"]["result"]
    assert f"| {books['conditions']['memory_1024']['perplexity']:.3f} |" in report
    control = content["results"]["perplexity-books-control"]["result"]
    assert list(control["conditions"]) == ["backbone", "no_memory"]
    assert control["tokens"] == books["tokens"]
    assert control["conditions"]["backbone"] == books["conditions"]["backbone"]
    model = memlayer.load(subject.checkpoint)
    (layer,) = model.memory_config.memory_layers or ()
    gates = torch.sigmoid(model.side_network.gates[0]).tolist()
    assert content["gates"] == {str(layer): gates}
    assert f"| {layer} | " + " | ".join(f"{gate:.2f}" for gate in gates) in report

    results[0].unlink()
    assert run(call) == 0
    assert capsys.readouterr().err.count("there already") == len(results) - 1
    after = {path: path.stat().st_mtime_ns for path in sorted((output / "results").iterdir())}
    assert list(after) == list(before)
    assert [path for path in after if after[path] != before[path]] == results[:1]


def test_a_result_is_made_again_when_what_it_rests_on_changes(
    subject: Subject, tmp_path: Path, make_checkpoint: Callable[..., str]
) -> None:
    made: list[tuple[str, bool]] = []

    def go(changed: Subject) -> bool:
        made.clear()
        run_suite(
            "small",
            changed,
            tmp_path / "out",
            only=("kv-75",),
            announce=lambda name, number, steps, there: made.append((name, there)),
        )
        assert [name for name, _ in made] == ["kv-75"]
        return made[0][1]

    assert not go(subject)
    assert go(subject)
    other = Subject(checkpoint=make_checkpoint("other", 5), data=subject.data)
    assert not go(other)
    assert go(subject)
    write(subject.data / "retrieval" / "kv_75_keys.jsonl.gz", [
        {"id": "kv", "key": "k7", "value": "changed", "records": [["k7", "changed"]]}
    ])  # fmt: skip
    assert not go(subject)


def test_what_was_finished_stays_when_a_step_fails(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = suite_run.evaluate_task_from_names

    def fails(name: str, *rest: Any, **options: Any) -> Any:
        if name == "passkey":
            raise DataError("the disk is gone")
        return evaluate(name, *rest, **options)

    monkeypatch.setattr(suite_run, "evaluate_task_from_names", fails)
    with pytest.raises(DataError, match="the disk is gone"):
        run_suite("small", subject, tmp_path / "out", only=("kv-75", "passkey"))
    (kept,) = (tmp_path / "out" / "results").iterdir()
    assert kept.name.startswith("kv-75-")


def test_a_report_without_matplotlib_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "memlayer.evaluation.suite.report.drawing_problem", lambda: "they need matplotlib: pip"
    )
    path = write_report("small", {}, tmp_path, {"checkpoint": "x"}, {})
    assert "No figures: they need matplotlib" in path.read_text(encoding="utf-8")
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("suite", list(SUITES))
def test_every_step_names_a_task_and_options_that_exist(suite: str) -> None:
    names = [step.name for step in steps_of(suite)]
    assert len(set(names)) == len(names)
    for step in steps_of(suite):
        if step.task is not None:
            TaskOptions(**step.options)
            task_type(step.task).options_type(**step.task_options)
        elif step.kind == "cost":
            inspect.signature(measure_cost).bind(None, **step.options)
        else:
            assert step.domain in DOMAINS


def test_what_cannot_be_is_refused_before_anything_runs(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="no suite 'big'; known are paper, small"):
        steps_of("big")
    with pytest.raises(ConfigError, match="suite 'small' has no step 'mmlu'; it has perplexity-"):
        chosen_steps("small", ("mmlu",))
    with pytest.raises(DataError, match="there is no folder"):
        run_suite("small", Subject(checkpoint="x", data=tmp_path / "no"), tmp_path / "out")
    (subject.data / "code" / "code_test.jsonl.gz").unlink()
    with pytest.raises(DataError, match=r"step 'perplexity-code' needs .*code_test.jsonl"):
        run_suite("small", subject, tmp_path / "out")
    same = Subject(checkpoint="x", control="x", data=subject.data)
    with pytest.raises(ConfigError, match="the control must be another checkpoint than 'x'"):
        run_suite("small", same, tmp_path / "out", only=("kv-75",))
    assert not (tmp_path / "out").exists()
