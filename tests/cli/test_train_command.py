import inspect
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import memlayer_cli.train as command
from memlayer.config import LongMemConfig
from memlayer.training import TrainingOptions, read_log
from memlayer_cli.main import run

TINY = ["--segment-length", "16", "--memory-size", "64", "--top-k", "8", "--backend", "torch"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Give a folder of eight texts; some are for validation."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"The memory of document {number}. " * 6)
    return folder


@pytest.fixture
def train(tiny_checkpoint: Callable[[str], Path], texts: Path, tmp_path: Path):
    """Give a function that runs ``memlayer train`` on a tiny GPT-2, with further arguments."""

    def go(*arguments: str, output: str = "run") -> int:
        return run(
            [
                "train",
                *("--backbone", str(tiny_checkpoint("gpt2")), "--data", str(texts)),
                *("--output", str(tmp_path / output), "--steps", "3", "--eval-tokens", "64"),
                *TINY,
                *arguments,
            ]
        )

    return go


def test_it_ends_with_a_table_and_the_paths_of_what_it_wrote(train, tmp_path, capsys):
    assert train() == 0
    shown = capsys.readouterr().out
    for words in ("backbone alone", "memory off", "memory on", "over the same 64 tokens"):
        assert words in shown
    assert f"checkpoint: {tmp_path / 'run'}\n" in shown
    assert f"plot: {tmp_path / 'run' / 'curves.png'}\n" in shown
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} < names
    assert {"log.jsonl", "curves.png", "training.json"} < names


def test_json_to_standard_output_is_all_that_is_there(train, tmp_path, capsys):
    assert train("--json", "-") == 0
    results = json.loads(capsys.readouterr().out)
    assert results["steps"] == 3
    assert results["output"] == str(tmp_path / "run")
    assert set(results["perplexities"]) == {"memory_on", "memory_off", "backbone", "tokens"}


def test_settings_reach_the_model_and_the_training(train, tmp_path):
    assert (
        train(
            *("--memory-layer", "1", "--memory-layer", "3", "--chunk-size", "2"),
            *("--side-init", "backbone", "--learning-rate", "0.001", "--seed", "5"),
            *("--gate-learning-rate", "0.1", "--gradient-accumulation", "2", "--batch-size", "2"),
            *("--stride", "12"),
            *("--excerpt-tokens", "48"),
            *("--lead-tokens", "30", "--memory-dropout", "0.25"),
            *("--dtype", "bf16", "--device", "cpu", "--eval-every", "2", "--save-every", "2"),
        )
        == 0
    )
    saved = json.loads((tmp_path / "run" / "training.json").read_text())
    assert saved["memory"]["memory_layers"] == [1, 3]
    assert saved["memory"]["chunk_size"] == 2
    assert saved["memory"]["side_init"] == "backbone"
    assert TrainingOptions.from_dict(saved["options"]) == TrainingOptions(
        steps=3,
        batch_size=2,
        gradient_accumulation=2,
        stride=12,
        excerpt_tokens=48,
        lead_tokens=30,
        memory_dropout=0.25,
        learning_rate=0.001,
        gate_learning_rate=0.1,
        dtype="bf16",
        seed=5,
        eval_every=2,
        eval_tokens=64,
        save_every=2,
    )
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()


def test_tokens_take_the_place_of_steps(train, tiny_checkpoint, texts, tmp_path):
    arguments = ["--backbone", str(tiny_checkpoint("gpt2")), "--data", str(texts), *TINY]
    output = tmp_path / "tokens"
    assert run(["train", *arguments, "--tokens", "40", "--output", str(output)]) == 0
    assert [entry["step"] for entry in read_log(output) if entry["kind"] == "step"] == [1, 2, 3]


def test_steps_and_tokens_together_are_refused(train, capsys):
    assert train("--tokens", "40") == 2
    assert "give either steps or tokens" in capsys.readouterr().err


def test_defaults_are_those_of_the_library():
    library = LongMemConfig().to_dict() | TrainingOptions().to_dict()
    parameters = inspect.signature(command.train).parameters
    shown = {
        name: parameter.default
        for name, parameter in parameters.items()
        if name in library and name not in ("steps", "tokens", "report_to")
    }
    assert parameters["report_to"].default is None  # no tracker, as library["report_to"] says
    assert library["report_to"] == ()
    assert len(shown) > 12
    assert shown == {name: library[name] for name in shown}


def test_separate_validation_data_are_all_of_them_validation(
    train, tiny_checkpoint, texts, tmp_path
):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("The memory of a document that nobody trained on. " * 4)
    assert train("--validation-data", str(held_out)) == 0
    saved = json.loads((tmp_path / "run" / "training.json").read_text())["data"]
    assert saved["train_documents"] == 8
    assert saved["validation_documents"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", "10"], "top_k must be a multiple of chunk_size=4, got 10; the nearest value"),
        (["--memory-layer", "9"], "memory_layers must be"),
        (["--backend", "fais"], "Did you mean 'faiss'?"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--device", "abacus"], "device must be one that torch can use here"),
        (["--segment-length", "4096"], "every document is shorter than segment_length=4096"),
        (["--resume"], "there is no training run to resume in"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, message, train, tmp_path, capsys):
    assert train(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", [b"", b"\x00\x01\x02binary", b"caf\xe9 au lait" * 10])
def test_a_file_that_is_no_text_is_refused_by_name(damage, train, tmp_path, capsys):
    (tmp_path / "bad.txt").write_bytes(damage)
    assert train("--data", str(tmp_path / "bad.txt")) == 2
    assert "bad.txt" in capsys.readouterr().err


def test_a_second_run_into_the_same_directory_says_what_to_do(train, capsys):
    assert train() == 0
    capsys.readouterr()
    assert train() == 2
    assert "holds a training run already" in capsys.readouterr().err
    assert train("--resume") == 2
    assert "is finished" in capsys.readouterr().err


def test_a_loss_that_is_no_number_is_a_failure_and_not_a_mistake(train, capsys):
    assert train("--learning-rate", "1e30", "--gate-learning-rate", "1e30", "--warmup", "0") == 1
    error = capsys.readouterr().err
    assert "train into another directory with lower learning rates" in error
    assert error.count("\n") == 1


def test_an_unavailable_backend_is_reported_before_anything_is_loaded(
    train, tmp_path, capsys, monkeypatch
):
    from memlayer.plugins import default_plugins

    reason = default_plugins().backends.unavailable_reason("faiss-gpu")
    if reason is None:
        pytest.skip("faiss-gpu works on this machine")
    monkeypatch.setattr("memlayer.training.run.prepare_corpus", pytest.fail)
    monkeypatch.setattr("memlayer.training.run.load_backbone", pytest.fail)
    assert train("--backend", "faiss-gpu") == 2
    error = capsys.readouterr().err
    assert "faiss-gpu" in error
    assert 'pip install "memlayer-lm[faiss-gpu]"' in error
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_is_reported_before_anything_is_loaded(
    train, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr("memlayer.training.run.load_backbone", pytest.fail)
    assert train("--report-to", "dvclive") == 2
    assert "report_to 'dvclive' needs its package: pip install dvclive" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_missing_accelerate_is_reported_with_the_install_command(train, capsys, monkeypatch):
    monkeypatch.setattr("memlayer.training.run.find_spec", lambda _: None)
    assert train() == 2
    assert 'pip install "memlayer-lm[train]"' in capsys.readouterr().err


def test_a_hub_id_without_the_hub_is_one_clear_line(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    arguments = ["--backbone", "gpt2-medium", "--data", str(texts), *TINY]
    assert run(["train", *arguments, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "gpt2-medium" in error
    assert error.count("\n") == 1


def test_ctrl_c_exits_with_130_and_resume_finishes_the_run(
    tiny_checkpoint, texts, tmp_path, capsys
):
    output = tmp_path / "run"
    arguments = ["train", "--backbone", str(tiny_checkpoint("gpt2")), "--data", str(texts), *TINY]
    arguments += ["--output", str(output), "--steps", "150", "--eval-tokens", "64"]
    code = "from memlayer_cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True
    )
    while not (output / "log.jsonl").exists() or len(read_log(output)) < 3:
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.endswith("memlayer: interrupted\n")
    assert "Traceback" not in error
    assert len(list((output / "checkpoints").iterdir())) == 1
    assert not (output / "adapter_model.safetensors").exists()
    assert run([*arguments, "--resume"]) == 0
    steps = [entry["step"] for entry in read_log(output) if entry["kind"] == "step"]
    assert steps == list(range(1, 151))
