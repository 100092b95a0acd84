"""Training from names: of a backbone, of corpora, of a directory. What ``memlayer train`` runs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from memlayer.backbones import load_backbone
from memlayer.data import check_sources, prepare_corpus
from memlayer.devices import choose_device
from memlayer.errors import BackendUnavailableError
from memlayer.model import wrap
from memlayer.plugins import default_plugins
from memlayer.training.directory import check_output
from memlayer.training.loop import train
from memlayer.training.processes import local_device, local_main_process_first
from memlayer.training.progress import TokenizingProgress
from memlayer.training.trackers import check_trackers

if TYPE_CHECKING:
    from memlayer.config import LongMemConfig
    from memlayer.plugins import Plugins
    from memlayer.training.options import TrainingOptions
    from memlayer.training.results import TrainingResult


def train_from_names(
    backbone: str,
    data: Sequence[str],
    config: LongMemConfig,
    options: TrainingOptions,
    *,
    output: Path | str,
    validation_data: Sequence[str] = (),
    device: str = "auto",
    resume: bool = False,
    progress: bool | None = None,
    plugins: Plugins | None = None,
) -> TrainingResult:
    """Load a backbone and documents, wrap, train. What is cheap to check is checked first.

    Documents are tokenized into the user's cache, once, and read from there while training runs: a
    corpus need not fit in memory.

    Args:
        backbone: what `memlayer.load_backbone` takes.
        data: what `memlayer.data.load_documents` takes.
        config: of the wrapped model.
        options: of the training.
        output: the run's directory.
        validation_data: sources whose documents are all validation documents, and those of
            ``data`` all training documents. Empty: ``data`` is split by document.
        device: ``"auto"`` is ``"cuda"`` where there is one, else ``"cpu"``.
        resume: as for `train`.
        progress: as for `train`.
        plugins: where backends and adapters come from; what is installed if None.

    Raises:
        BackendUnavailableError: if the backend, or accelerate, cannot be used here.
        MemlayerError: of the kind that fits whatever else is wrong; see `train`.
    """
    if find_spec("accelerate") is None:
        raise BackendUnavailableError(
            'training needs the package accelerate: pip install "memlayer-lm[train]"'
        )
    plugins = default_plugins() if plugins is None else plugins
    reason = plugins.backends.unavailable_reason(config.backend)
    if reason is not None:
        raise BackendUnavailableError(f"backend {config.backend!r} cannot run here: {reason}")
    check_trackers(options.report_to)
    check_output(output, resume=resume)
    place = local_device(choose_device(device))
    for sources in filter(None, (data, validation_data)):
        check_sources(sources)
    loaded = load_backbone(backbone, device=place)
    # One process a machine tokenizes, and the others open what it wrote.
    with local_main_process_first(), TokenizingProgress(show=progress) as tokenizing:
        corpus = prepare_corpus(data, loaded.tokenizer, progress=tokenizing.done)
        if validation_data:
            documents = corpus
            validation = prepare_corpus(validation_data, loaded.tokenizer, progress=tokenizing.done)
        else:
            documents, validation = corpus.select("train"), corpus.select("validation")
    return train(
        wrap(loaded.model, config, plugins=plugins),
        loaded.tokenizer,
        documents,
        validation,
        options,
        output=output,
        resume=resume,
        progress=progress,
    )
