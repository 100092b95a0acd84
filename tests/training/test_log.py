import json

import pytest

from memlayer.errors import CheckpointError
from memlayer.training import read_log, train
from memlayer.training.log import TrainingLog

pytestmark = pytest.mark.usefixtures("no_curves")


def test_every_step_and_every_evaluation_is_one_line_with_its_keys(
    make_model, tokenizer, documents, make_options, tmp_path
):
    options = make_options(steps=4, eval_every=2, gradient_accumulation=2)
    train(make_model(), tokenizer, documents, documents[:3], options, output=tmp_path / "run")
    entries = read_log(tmp_path / "run" / "log.jsonl")
    assert [(entry["kind"], entry["step"]) for entry in entries] == [
        ("evaluation", 0),
        ("step", 1),
        ("step", 2),
        ("evaluation", 2),
        ("step", 3),
        ("step", 4),
        ("evaluation", 4),
    ]
    steps = [entry for entry in entries if entry["kind"] == "step"]
    assert set(steps[0]) == {
        "kind",
        "step",
        "tokens",
        "loss",
        "learning_rate",
        "gate_learning_rate",
        "gradient_norm",
        "seconds",
        "tokens_per_second",
        "memory_tokens",
        "gate_mean",
    }
    evaluations = [entry for entry in entries if entry["kind"] == "evaluation"]
    assert set(evaluations[0]) == {
        "kind",
        "step",
        "tokens",
        "perplexity_memory_on",
        "perplexity_memory_off",
        "perplexity_backbone",
        "evaluated_tokens",
        "seconds",
    }
    # The second segment of the first step reads the first one.
    assert steps[0]["memory_tokens"] == 16
    assert steps[1]["memory_tokens"] > 16
    # Padding is not counted: 2 rows of 2 segments of 16 at most.
    assert 0 < steps[0]["tokens"] <= 64
    assert [entry["tokens"] for entry in steps] == sorted({entry["tokens"] for entry in steps})
    assert evaluations[0]["evaluated_tokens"] == 64
    # Before the first step the model is its backbone, with memory off at least.
    assert evaluations[0]["perplexity_memory_off"] == pytest.approx(
        evaluations[0]["perplexity_backbone"], rel=1e-5
    )


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"kind": "step", "step": 1}\n{"kind": "step", "st')
    assert read_log(tmp_path) == [{"kind": "step", "step": 1}]


def test_a_damaged_line_is_refused_with_its_number(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"kind": "step", "step": 1}\nstep two\n{"kind": "step", "step": 3}\n')
    with pytest.raises(
        CheckpointError, match=r"log.jsonl line 2 must be a JSON object, got b'step"
    ):
        read_log(path)


def test_a_log_that_goes_on_drops_what_will_be_written_again(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [{"kind": "step", "step": step, "loss": 1.5} for step in range(1, 6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"half')
    log = TrainingLog(path, last_step=3)
    log.write({"kind": "step", "step": 4, "loss": 2.5})
    log.close()
    assert [(entry["step"], entry["loss"]) for entry in read_log(path)] == [
        (1, 1.5),
        (2, 1.5),
        (3, 1.5),
        (4, 2.5),
    ]
