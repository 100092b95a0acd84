"""Documents into a bank on disk: each once, a few segments at a time, going on after any kill."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from memlayer.data.tokens import tokenize_documents, tokenizer_fingerprint
from memlayer.errors import ConfigError, DataError, MemoryFormatError
from memlayer.ingestion.stream import memorize_stream
from memlayer.memory import bank_exists, bank_lock

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from memlayer.data.documents import Document
    from memlayer.memory import MemoryBank
    from memlayer.model import LongMemModel

Outcome = Literal["new", "held", "continued"]


@dataclass(frozen=True, kw_only=True)
class MemorizedDocument:
    """What became of one document.

    Attributes:
        name: the document's.
        outcome: ``"new"``: read from its start. ``"continued"``: read from where an earlier run was
            cut off. ``"held"``: the bank had read all of it before.
        tokens: of the whole document.
        memorized: tokens that were read now.
    """

    name: str
    outcome: Outcome
    tokens: int
    memorized: int


@dataclass(frozen=True, kw_only=True)
class MemorizeProgress:
    """How far one document is on the disk.

    Attributes:
        name: the document's.
        outcome: see `MemorizedDocument`.
        tokens: of the whole document.
        saved: tokens of it that are on the disk now.
    """

    name: str
    outcome: Outcome
    tokens: int
    saved: int


@dataclass(frozen=True, kw_only=True)
class MemorizeReport:
    """What `memorize_documents` did.

    Attributes:
        bank: the directory.
        documents: one entry a document, in the order given.
        length: tokens that the bank holds now.
    """

    bank: str
    documents: tuple[MemorizedDocument, ...]
    length: int

    @property
    def memorized(self) -> int:
        """Tokens that were read, over all documents."""
        return sum(document.memorized for document in self.documents)

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON types."""
        return {**asdict(self), "documents": [asdict(one) for one in self.documents]}


def memorize_documents(
    model: LongMemModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Document],
    bank_dir: str | Path,
    *,
    save_every: int = 16,
    progress: Callable[[MemorizeProgress], None] | None = None,
) -> MemorizeReport:
    """Memorize documents one after the other in one row, and keep the memory in a directory.

    The directory is locked all along. The model's memory becomes the directory's: what it held
    before is dropped, and afterwards it can be read at once. What was saved last survives a kill;
    run again with the same documents, it goes on from there. A document that the bank has read to
    its end is not read again, even if its oldest chunks were dropped since.

    Args:
        model: whose memory, backbone and settings; its memory is not shared by rows.
        tokenizer: the backbone's.
        documents: taken one at a time; the ``id`` is the name.
        bank_dir: where the bank is; made if need be.
        save_every: segments after which the bank is saved. It is at each document's end too.
        progress: called after each save, and once for a document that is held already.

    Raises:
        StorageError: if another process writes there, or the disk is full or read-only.
        MemoryFormatError: if the bank there is damaged or of another model, memory layer,
            tokenizer or chunk size.
        DataError: if a document's name stands for another text in the bank.
        ConfigError: if ``save_every`` is less than 1, or the memory is shared by rows.
    """
    if isinstance(save_every, bool) or not isinstance(save_every, int) or save_every < 1:
        raise ConfigError(f"save_every must be at least 1 segment, got {save_every!r}")
    if model.memory.shared:
        raise ConfigError("documents need a memory per row, got memory_scope='batch'; use 'row'")
    place = Path(bank_dir)
    with bank_lock(place):
        model.memory.clear()
        if bank_exists(place):
            model.memory.load(place)
        bank = model.memory
        _check_bank(bank, place, tokenizer_fingerprint(tokenizer))
        reader = _DocumentReader(model, place, save_every, progress)
        done = tuple(reader.read(document, tokenizer) for document in documents)
        if not bank_exists(place):
            bank.save(place)
    return MemorizeReport(bank=str(place), documents=done, length=len(bank))


class _DocumentReader:
    """Reads documents into one bank and saves it as it goes."""

    def __init__(
        self,
        model: LongMemModel,
        place: Path,
        save_every: int,
        progress: Callable[[MemorizeProgress], None] | None,
    ) -> None:
        self._model = model
        self._bank = model.memory
        self._place = place
        self._step = save_every * model.memory_config.segment_length
        self._progress = progress

    def read(self, document: Document, tokenizer: PreTrainedTokenizerBase) -> MemorizedDocument:
        """Memorize what the bank does not hold of one document."""
        (tokenized,) = tokenize_documents([document], tokenizer)
        name, ids = document.id, tokenized.input_ids
        digest = tokenized.digest()
        record = self._bank.find_document(name)
        if record is not None and record.sha256 != digest:
            raise DataError(
                f"the bank in {self._place} holds another text by the name {name!r}; give this "
                "document another name, or memorize into another directory"
            )
        if record is not None and record.complete:
            self._tell(name, "held", len(ids), len(ids))
            return MemorizedDocument(name=name, outcome="held", tokens=len(ids), memorized=0)
        begin = 0 if record is None else record.tokens
        outcome: Outcome = "continued" if begin else "new"
        self._bank.note_document(name, sha256=digest, complete=False)
        # Saves lie at multiples of the step, where segments end: nothing is computed twice.
        for start in self._starts(begin, len(ids)):
            stop = min(start - start % self._step + self._step, len(ids))
            self._memorize(name, ids[start:stop], start)
            if stop < len(ids):
                self._bank.save(self._place)
                self._tell(name, outcome, len(ids), stop)
        self._bank.note_document(name, sha256=digest, complete=True)
        self._bank.save(self._place)
        self._tell(name, outcome, len(ids), len(ids))
        return MemorizedDocument(
            name=name, outcome=outcome, tokens=len(ids), memorized=len(ids) - begin
        )

    def _starts(self, begin: int, end: int) -> list[int]:
        following = range(begin - begin % self._step + self._step, end, self._step)
        return [begin, *following] if begin < end else []

    def _memorize(self, name: str, ids: Tensor, offset: int) -> None:
        memorize_stream(self._model, ids.unsqueeze(0), document=name, offset=offset)

    def _tell(self, name: str, outcome: Outcome, tokens: int, saved: int) -> None:
        if self._progress is not None:
            self._progress(MemorizeProgress(name=name, outcome=outcome, tokens=tokens, saved=saved))


def _check_bank(bank: MemoryBank, place: Path, tokenizer: str) -> None:
    if bank.rows > 1:
        raise MemoryFormatError(
            f"the bank in {place} has {bank.rows} rows, documents go into one; give a directory "
            "of its own"
        )
    if bank.tokenizer not in (None, tokenizer):
        raise MemoryFormatError(
            f"the bank in {place} has tokenizer={bank.tokenizer!r}, this model's is "
            f"{tokenizer!r}; load it with the tokenizer that wrote it"
        )
    bank.tokenizer = tokenizer
