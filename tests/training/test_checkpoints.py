import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from memlayer.errors import CheckpointError, ConfigError, MemoryFormatError, TrainingError
from memlayer.training import Trainer, read_log, train
from memlayer.training.checkpoints import list_checkpoints, newest_checkpoint, write_checkpoint

pytestmark = pytest.mark.usefixtures("no_curves")

# Trains as the fixtures do, in a process of its own that can be killed.
CHILD = """
import json, sys
import memlayer
from memlayer.data import Document
from memlayer.training import TrainingOptions, train
from transformers import AutoModelForCausalLM, AutoTokenizer

backbone, output, resume, texts, settings, options = json.loads(sys.argv[1])
train(
    memlayer.wrap(
        AutoModelForCausalLM.from_pretrained(backbone), memlayer.LongMemConfig.from_dict(settings)
    ),
    AutoTokenizer.from_pretrained(backbone),
    [Document(id=name, text=text) for name, text in texts],
    [],
    TrainingOptions.from_dict(options),
    output=output,
    resume=resume,
)
"""


class Killed(BaseException):
    """Ends a run as a kill would: nothing of memlayer's catches it."""


@contextmanager
def killed_after(steps: int) -> Iterator[None]:
    """End the run inside as a kill after this many steps would."""
    step = Trainer._train_step

    def limited(self: Trainer) -> dict[str, object]:
        if self.step == steps:
            raise Killed
        return step(self)

    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        patch.setattr(Trainer, "_train_step", limited)
        yield
        pytest.fail(f"the run ended before it was killed after {steps} steps")


def log_without_times(run: Path) -> list[dict[str, object]]:
    return [
        {key: value for key, value in entry.items() if "second" not in key}
        for entry in read_log(run)
    ]


def assert_same_run(one: Path, other: Path) -> None:
    assert log_without_times(one) == log_without_times(other)
    weights, others = (load_file(run / "adapter_model.safetensors") for run in (one, other))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("backend", "stride"), [("torch", None), ("torch", 10), ("faiss", None), ("hnswlib", None)]
)
@pytest.mark.parametrize("steps_done", [4, 7])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    backend, stride, steps_done, make_model, tokenizer, documents, make_options, tmp_path
):
    # GPT-2 has dropout; the memory of 32 tokens overflows; documents end at different steps.
    options = make_options(
        steps=9,
        gradient_accumulation=2,
        stride=stride,
        memory_dropout=0.25,
        save_every=3,
        eval_every=2,
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"memory_size": 32, "backend": backend}
    arguments = (tokenizer, documents, documents[:2], options)
    train(make_model(**settings), *arguments, output=whole)
    with killed_after(steps_done):
        train(make_model(**settings), *arguments, output=parts)
    assert len(read_log(parts)) > steps_done
    torch.manual_seed(99)  # The checkpoint's random numbers count, not the process's.
    train(make_model(**settings), *arguments, output=parts, resume=True)
    assert_same_run(whole, parts)
    assert len(list_checkpoints(parts)) == options.keep_checkpoints


def test_a_run_killed_before_its_first_checkpoint_resumes_from_the_start(
    make_model, tokenizer, documents, make_options, tmp_path
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = (tokenizer, documents, [], make_options())
    train(make_model(), *arguments, output=whole)
    with killed_after(3):
        train(make_model(), *arguments, output=parts)
    train(make_model(), *arguments, output=parts, resume=True)
    assert_same_run(whole, parts)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, "the process ended early"
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)


def test_a_process_killed_amid_training_resumes_with_the_same_losses(
    make_model, tokenizer, documents, make_options, tiny_checkpoint, tmp_path
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = make_model().memory_config.to_dict()
    options = make_options(steps=40, save_every=5)

    def command(*, resume: bool) -> list[str]:
        texts = [(document.id, document.text) for document in documents]
        job = [str(tiny_checkpoint("gpt2")), str(parts), resume, texts, settings, options.to_dict()]
        return [sys.executable, "-c", CHILD, json.dumps(job)]

    process = subprocess.Popen(command(resume=False))
    wait_for(parts / "checkpoints" / "step-000005", process)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert not (parts / "adapter_model.safetensors").exists()
    subprocess.run(command(resume=True), check=True, timeout=120)
    train(make_model(), tokenizer, documents, [], options, output=whole)
    assert_same_run(whole, parts)


def test_ctrl_c_saves_a_checkpoint_and_the_run_can_go_on(
    make_model, tokenizer, documents, make_options, tmp_path, monkeypatch
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = (tokenizer, documents, documents[:2], make_options())
    train(make_model(), *arguments, output=whole)
    forward = type(make_model()).forward
    calls = []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(type(make_model()), "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(make_model(), *arguments, output=parts)
    assert [path.name for path in (parts / "checkpoints").iterdir()] == ["step-000003"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(make_model(), *arguments, output=parts, resume=True)
    assert_same_run(whole, parts)


def test_a_second_ctrl_c_stops_at_once_and_saves_nothing(
    make_model, tokenizer, documents, make_options, tmp_path, monkeypatch
):
    model = make_model()
    forward = type(model).forward

    def impatient(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", impatient)
    with pytest.raises(KeyboardInterrupt):
        train(model, tokenizer, documents, [], make_options(), output=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.fixture
def stopped_run(make_model, tokenizer, documents, make_options, tmp_path):
    """Give a run with checkpoints of steps 2 and 4 that was killed after step 5."""
    options = make_options(save_every=2)
    with killed_after(5):
        train(make_model(), tokenizer, documents, [], options, output=tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"steps": 7}, {}, "steps was 6 when this run began, got 7"),
        ({"learning_rate": 0.5}, {}, "learning_rate was 0.01 when this run began, got 0.5"),
        ({"stride": 8}, {}, "stride was None when this run began, got 8"),
        ({"seed": 1}, {}, "seed was 0 when this run began, got 1"),
        ({}, {"top_k": 16}, "top_k was 8 when this run began, got 16"),
        ({}, {"backend": "faiss"}, "backend was 'torch' when this run began, got 'faiss'"),
        ({}, {"family": "llama"}, "backbone_fingerprint was '[0-9a-f]+' when this run began, got"),
    ],
)
def test_other_settings_on_resume_are_refused_by_name(
    options, settings, message, stopped_run, make_model, tokenizer, documents, make_options
):
    with pytest.raises(ConfigError, match=message):
        train(
            make_model(**settings),
            tokenizer,
            documents,
            [],
            make_options(**({"save_every": 2} | options)),
            output=stopped_run,
            resume=True,
        )


def test_other_documents_on_resume_are_refused(
    stopped_run, make_model, tokenizer, documents, make_options
):
    options = make_options(save_every=2)
    with pytest.raises(ConfigError, match="train_documents was 6 when this run began, got 5"):
        train(make_model(), tokenizer, documents[1:], [], options, output=stopped_run, resume=True)
    swapped = [documents[1], documents[0], *documents[2:]]
    with pytest.raises(ConfigError, match=r"train_text_sha256 was '[0-9a-f]+' when this run began"):
        train(make_model(), tokenizer, swapped, [], options, output=stopped_run, resume=True)


def test_how_often_to_look_and_save_may_change_on_resume(
    stopped_run, make_model, tokenizer, documents, make_options
):
    options = make_options(save_every=5, keep_checkpoints=1, eval_every=1)
    result = train(make_model(), tokenizer, documents, [], options, output=stopped_run, resume=True)
    assert [path.name for path in list_checkpoints(result.output)] == ["step-000005"]


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    stopped_run, make_model, tokenizer, documents, make_options, tmp_path_factory
):
    options = make_options(save_every=2)
    whole = tmp_path_factory.mktemp("whole") / "run"
    train(make_model(), tokenizer, documents, [], options, output=whole)
    weights = stopped_run / "checkpoints" / "step-000004" / "side_network.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.warns(UserWarning, match="side_network.safetensors differs from what was written"):
        train(make_model(), tokenizer, documents, [], options, output=stopped_run, resume=True)
    assert_same_run(whole, stopped_run)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "state.json").write_text("{"), "must be the state of a training run"),
        (lambda path: (path / "random.safetensors").unlink(), "random.safetensors is missing"),
        (lambda path: shutil.rmtree(path / "memory"), "memory/.* is missing"),
        (
            lambda path: (path / "state.json").write_text('{"format_version": 9, "files": {}}'),
            "has format_version 9, this memlayer reads 1",
        ),
    ],
)
def test_a_run_whose_checkpoints_are_all_damaged_says_what_is_wrong(damage, message, stopped_run):
    for path in list_checkpoints(stopped_run):
        damage(path)
    with pytest.raises(CheckpointError, match=message):
        newest_checkpoint(stopped_run)


def test_there_is_no_pickle_in_a_checkpoint(stopped_run):
    names = [path for path in (stopped_run / "checkpoints").rglob("*") if path.is_file()]
    # The bank's lock holds the number of the process that wrote it.
    kinds = {path.suffix for path in names if path.name != "lock"}
    assert kinds == {".json", ".safetensors"}


def test_nothing_to_resume_and_nothing_left_to_do_are_errors(
    stopped_run, make_model, tokenizer, documents, make_options
):
    arguments = (tokenizer, documents, [], make_options(save_every=2))
    with pytest.raises(ConfigError, match="there is no training run to resume in"):
        train(make_model(), *arguments, output=stopped_run / "nowhere", resume=True)
    train(make_model(), *arguments, output=stopped_run, resume=True)
    with pytest.raises(ConfigError, match="is finished; start another"):
        train(make_model(), *arguments, output=stopped_run, resume=True)


def test_a_checkpoint_that_cannot_be_written_leaves_the_former_ones(stopped_run):
    before = sorted(path for path in stopped_run.rglob("*") if path.is_file())

    def full_disk(directory: Path) -> None:
        (directory / "half").write_text("half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(TrainingError, match=r"No space left on device.*resume from .*step-000004"):
        write_checkpoint(stopped_run, step=6, state={}, write=full_disk, keep=1)
    assert sorted(path for path in stopped_run.rglob("*") if path.is_file()) == before


def test_leftovers_of_a_kill_are_no_checkpoints_and_go_with_the_next_one(stopped_run):
    folder = stopped_run / "checkpoints"
    for name in (".step-000006.tmp", ".step-000002.old"):
        (folder / name).mkdir()
        (folder / name / "state.json").write_text("{}")
    assert newest_checkpoint(stopped_run)[0] == folder / "step-000004"
    write_checkpoint(stopped_run, step=6, state={}, write=lambda _: None, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000004", "step-000006"]


def test_the_memory_in_a_checkpoint_is_of_the_same_backbone(stopped_run, make_model):
    with pytest.raises(MemoryFormatError):
        make_model("llama").memory.load(stopped_run / "checkpoints" / "step-000004" / "memory")
