"""What trackers are told: the same as the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from memlayer.errors import BackendUnavailableError, ConfigError
from memlayer.training import TrainingOptions, read_log, train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from memlayer.data import Document
    from memlayer.model import LongMemModel


@pytest.fixture
def fit(
    make_model: Callable[..., LongMemModel],
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    make_options: Callable[..., TrainingOptions],
    tmp_path: Path,
) -> Callable[..., Path]:
    def run(*names: str, **settings: object) -> Path:
        output = tmp_path / "run"
        train(
            make_model(),
            tokenizer,
            documents[:-1],
            documents[-1:],
            make_options(report_to=names, eval_every=3, eval_tokens=64),
            output=output,
            **settings,
        )
        return output

    return run


# TensorBoard's own files use NumPy's and protobuf's deprecated names.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tensorboard_gets_every_number_of_the_log(fit: Callable[..., Path]) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    output = fit("tensorboard")
    events = event_accumulator.EventAccumulator(str(output / "memlayer"))
    events.Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for entry in read_log(output):
        prefix = {"step": "train", "evaluation": "validation"}[entry["kind"]]
        for name, value in entry.items():
            if name not in ("kind", "step"):
                expected.setdefault(f"{prefix}/{name}", []).append((entry["step"], value))
    assert set(events.Tags()["scalars"]) == set(expected)
    assert {"train/loss", "validation/perplexity_memory_on"} < set(expected)
    for name, values in expected.items():
        told = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in told] == [step for step, _ in values]
        assert [value for _, value in told] == pytest.approx([v for _, v in values], rel=1e-6)
    (settings,) = (output / "memlayer").rglob("hparams.yml")
    assert "options/batch_size: " in settings.read_text()


def test_a_tracker_that_cannot_be_used_is_refused_before_anything_is_written(
    fit: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"report_to must be among .*mlflow.*, got 'tensorb'"):
        fit("tensorb")
    with pytest.raises(BackendUnavailableError, match="'dvclive' needs its package: pip install"):
        fit("dvclive")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("names", ["tensorboard", (3,)])
def test_names_must_be_a_list_of_names(names: object) -> None:
    with pytest.raises(ConfigError, match="report_to must be names of trackers"):
        TrainingOptions(report_to=names)  # type: ignore[arg-type]
