"""Run the steps of a suite that have no result yet, and write the report.

A result is kept under a key of everything that it depends on: the step, the checkpoint's weights,
the data files' content, the version. What is there under that key is not made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import memlayer
from memlayer.benchmarking.machine import Machine
from memlayer.checkpoint import find_checkpoint, read_config, read_gates
from memlayer.data.records import plain_or_compressed
from memlayer.devices import choose_device
from memlayer.errors import ConfigError, DataError
from memlayer.evaluation.cost import measure_cost
from memlayer.evaluation.options import PerplexityOptions
from memlayer.evaluation.run import evaluate_perplexity_from_names, load_checkpoint
from memlayer.evaluation.suite.plan import Step, chosen_steps
from memlayer.evaluation.suite.report import write_report
from memlayer.evaluation.tasks.lookup import task_type
from memlayer.evaluation.tasks.named import evaluate_task_from_names
from memlayer.evaluation.tasks.options import TaskOptions
from memlayer.files import write_atomically

Announce: TypeAlias = Callable[[str, int, int, bool], None]
Results: TypeAlias = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a suite evaluates, and where.

    Attributes:
        checkpoint: what `memlayer.load` takes.
        control: a checkpoint trained without memory, scored with its memory off; or None.
        data: the folder of data sets.
        backend: a retrieval backend instead of the checkpoint's.
        dtype: of the backbone.
        device: as for `memlayer.load_backbone`, or ``"auto"``.
    """

    checkpoint: str
    control: str | None = None
    data: Path
    backend: str | None = None
    dtype: str = "fp32"
    device: str = "auto"


def run_suite(
    suite: str,
    subject: Subject,
    output: Path,
    *,
    only: Sequence[str] = (),
    announce: Announce | None = None,
) -> Path:
    """Run a suite; give the path of its report.

    Args:
        suite: ``"paper"`` or ``"small"``.
        subject: what is evaluated.
        output: gets ``results/``, ``figures/``, ``report.md`` and ``report.json``.
        only: names of steps; all if empty. The report has every result that is there.
        announce: called before each step with its name, number, the number of steps, and whether it
            is there already.

    Raises:
        MemlayerError: of the kind that fits whatever is wrong; what was finished stays.
    """
    steps = chosen_steps(suite, tuple(only))
    _check_data(subject, steps)
    folder = output / "results"
    folder.mkdir(parents=True, exist_ok=True)
    content = _content(subject)
    results: Results = {}
    for number, step in enumerate(steps):
        runs = {"": subject.checkpoint}
        if step.kind == "perplexity" and subject.control is not None:
            runs["control"] = subject.control
        for role, checkpoint in runs.items():
            name = f"{step.name}-{role}" if role else step.name
            key = _key(step, content, role, subject.device)
            place = folder / f"{name}-{key[:12]}.json"
            if announce is not None:
                announce(name, number, len(steps), place.exists())
            if not place.exists():
                result = _evaluated(step, subject, checkpoint, without_memory=bool(role))
                entry = {"step": asdict(step), "kind": step.kind, "key": key, "result": result}
                write_atomically(place, json.dumps(entry, indent=1).encode())
            results[name] = json.loads(place.read_text(encoding="utf-8"))
    gates = read_gates(find_checkpoint(subject.checkpoint))
    return write_report(suite, results, output, _description(subject), gates)


def _evaluated(
    step: Step, subject: Subject, checkpoint: str, *, without_memory: bool
) -> dict[str, Any]:
    if step.kind == "cost":
        place = {"dtype": subject.dtype, "device": choose_device(subject.device)}
        model, _ = load_checkpoint(checkpoint, subject.backend, place)
        return measure_cost(model, **step.options).to_dict()
    if step.task is None:
        options = dict(step.options)
        if without_memory:
            options |= {"memory_sizes": (), "foreign_memory": False, "dense_context": None}
        return evaluate_perplexity_from_names(
            [str(_document_file(subject, step))],
            PerplexityOptions(**options),
            checkpoint=checkpoint,
            split="all",
            max_documents=step.max_documents,
            max_tokens=step.max_tokens,
            backend=subject.backend,
            dtype=subject.dtype,
            device=subject.device,
        ).to_dict()
    own = task_type(step.task).options_type(**step.task_options)
    return evaluate_task_from_names(
        step.task,
        TaskOptions(**step.options),
        own,
        data=subject.data,
        checkpoint=checkpoint,
        backend=subject.backend,
        dtype=subject.dtype,
        device=subject.device,
    ).to_dict()


def _document_file(subject: Subject, step: Step) -> Path:
    assert step.domain is not None
    return plain_or_compressed(subject.data / step.domain / f"{step.domain}_test.jsonl")


def _check_data(subject: Subject, steps: Sequence[Step]) -> None:
    """Refuse to begin what cannot end."""
    if not subject.data.is_dir():
        raise DataError(f"there is no folder {subject.data}")
    for step in steps:
        if step.domain is not None and not _document_file(subject, step).is_file():
            raise DataError(
                f"step {step.name!r} needs {_document_file(subject, step)}; leave the step out by "
                "naming those that you want"
            )
    if subject.control is not None and subject.control == subject.checkpoint:
        raise ConfigError(
            f"the control must be another checkpoint than {subject.checkpoint!r}, one trained "
            "without memory"
        )


def _content(subject: Subject) -> dict[str, Any]:
    """Give the identity of everything that all steps depend on."""
    checkpoints = {
        name: read_config(find_checkpoint(path))["sha256"]
        for name, path in (("", subject.checkpoint), ("control", subject.control))
        if path is not None
    }
    digest = hashlib.sha256()
    for path in sorted(subject.data.rglob("*.jsonl*")):
        digest.update(str(path.relative_to(subject.data)).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return {
        "version": memlayer.__version__,
        "checkpoints": checkpoints,
        "data": digest.hexdigest(),
        "backend": subject.backend,
        "dtype": subject.dtype,
    }


def _key(step: Step, content: dict[str, Any], role: str, device: str) -> str:
    own = content | {"checkpoints": content["checkpoints"][role], "step": asdict(step)}
    if step.kind == "cost":
        # Scores are the same on every machine, times are not.
        own["machine"] = Machine.here(choose_device(device)).to_dict()
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def _description(subject: Subject) -> dict[str, Any]:
    import torch

    config = read_config(find_checkpoint(subject.checkpoint))
    return {
        **{name: None if value is None else str(value) for name, value in asdict(subject).items()},
        "memlayer_version": memlayer.__version__,
        "torch_version": torch.__version__,
        "backbone": config["base_model_name_or_path"],
        "memory": config["memory"],
    }
