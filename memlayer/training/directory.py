"""The directory of a training run, and what it says of itself: training.json.

training.json   settings, backbone, data and versions, as the run was begun; at its end, results
log.jsonl       see log.py            checkpoints/   see checkpoints.py and state.py
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memlayer import __version__
from memlayer.checkpoint import CONFIG_NAME
from memlayer.data import count_tokens
from memlayer.data.tokens import digest_of
from memlayer.errors import CheckpointError, ConfigError
from memlayer.files import write_atomically
from memlayer.fingerprint import fingerprint
from memlayer.training.checkpoints import CHECKPOINTS
from memlayer.training.log import LOG_NAME

if TYPE_CHECKING:
    from memlayer.data import TokenDocument
    from memlayer.model import LongMemModel
    from memlayer.training.options import TrainingOptions

RUN_NAME = "training.json"
FORMAT_VERSION = 1


def check_output(output: Path | str, *, resume: bool) -> None:
    """Refuse a directory that training must not write to.

    Raises:
        ConfigError: if it holds a run and ``resume`` is false, or none that can go on and it is
            true.
    """
    run = Path(output)
    if run.exists() and not run.is_dir():
        raise ConfigError(f"output must be a directory, got the file {run}; give another name")
    holds_run = any(
        (run / name).exists() for name in (RUN_NAME, LOG_NAME, CONFIG_NAME, CHECKPOINTS)
    )
    if not resume:
        if holds_run:
            raise ConfigError(
                f"{run} holds a training run already; go on with it (resume, on the command line "
                f"--resume) or give another output directory"
            )
        return
    if not (run / RUN_NAME).is_file():
        raise ConfigError(
            f"there is no training run to resume in {run} (no {RUN_NAME}); start one without resume"
        )
    if read_run(run)["finished"]:
        raise ConfigError(
            f"the training run in {run} is finished; start another in another output directory"
        )


def describe_settings(
    model: LongMemModel,
    options: TrainingOptions,
    *,
    processes: int,
    documents: Sequence[TokenDocument],
    validation: Sequence[TokenDocument],
    sample: Sequence[Tensor],
) -> dict[str, Any]:
    """Give what a run must have in common with the one that it goes on from, as JSON types.

    Args:
        model: that is trained.
        options: of the training.
        processes: that train it together.
        documents: trained on.
        validation: documents, the whole of them.
        sample: what is evaluated of them.
    """
    settings = {
        "options": options.to_dict(),
        "memory": model.memory_config.to_dict(),
        "machine": {"processes": processes},
        "backbone": {"backbone_fingerprint": fingerprint(model.backbone)},
        "data": {
            "train_documents": len(documents),
            "train_tokens": count_tokens(documents),
            "train_text_sha256": _joined(document.digest() for document in documents),
            "validation_documents": len(validation),
            "validation_tokens": count_tokens(validation),
            "validation_text_sha256": _joined(digest_of(input_ids) for input_ids in sample),
        },
    }
    return dict(json.loads(json.dumps(settings)))


def write_run(
    run: Path,
    settings: Mapping[str, Any],
    *,
    backbone_name: str | None,
    finished: bool,
    **results: Any,
) -> None:
    """Write training.json, as a whole or not at all.

    Args:
        run: the directory.
        settings: what `describe_settings` gave.
        backbone_name: what the backbone was loaded by, if it was.
        finished: whether the run is over.
        results: further entries, JSON types.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "finished": finished,
        "backbone_name": backbone_name,
        "versions": {
            "python": platform.python_version(),
            "memlayer-lm": __version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "accelerate": version("accelerate"),
        },
        **settings,
        **results,
    }
    write_atomically(run / RUN_NAME, (json.dumps(content, indent=2) + "\n").encode())


def read_run(run: Path) -> dict[str, Any]:
    """Read training.json.

    Raises:
        CheckpointError: if it is damaged, or of another format.
    """
    path = run / RUN_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, _ = content["format_version"], content["finished"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} must describe a training run, got {error!r}; restore it from a copy, or train "
            f"into another directory"
        ) from error
    if found != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {found!r}, this memlayer reads {FORMAT_VERSION}; resume "
            f"with the memlayer that wrote it"
        )
    return dict(content)


def _joined(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()
