"""Batches in which every row is a stream over documents.

    row 0   A[0:T]   A[T:2T]   A[2T:]▯▯   D[0:T]   ...     ▯ padding: mask 0, target -100
    row 1   B[0:T]   B[T:]▯    C[0:T]     C[T:2T]  ...

A row's next segment continues the same document, so that its memory is that document's past. Where
`Batch.ends` is True the document is over: the caller clears that row's memory after the step.

With a stride S below T segments overlap, as windows.py says: A[0:T], A[S:S+T], ... All but the last
S tokens of a later segment are context, which an earlier one has scored: their target is -100.

With excerpts a turn is not a whole document: some of it, from a random place, after a lead that is
only to be memorized.

    document   ..........[ Batch.lead ][ segment ][ segment ]......

Where segments overlap, the first one begins within the lead, as if that had been read in segments.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from memlayer.data.windows import count_windows
from memlayer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from memlayer.data.tokens import TokenDocument

IGNORED = -100
"""Target of a position that is not scored; what PyTorch's cross entropy skips."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One segment of every row.

    Attributes:
        input_ids: ``(B, T)``, int64; 0 where ``attention_mask`` is 0.
        targets: ``(B, T)``, int64. The token that follows in the document, also across the end of
            the segment; `IGNORED` where none does, and on padding.
        attention_mask: ``(B, T)``, int64. 1 for tokens, 0 for padding, which is on the right.
        fresh: ``(B, T)``, int64. 1 for tokens that no segment before this one held, 0 for context
            and padding.
        ends: ``(B,)``, bool. The row's document, or its excerpt, ends with this segment.
        lead: ``(B, L)``, int64. Tokens before the first fresh one that are to be memorized ahead of
            this segment, where an excerpt begins; L is 0 in all other batches.
        lead_mask: ``(B, L)``, int64. 1 for them, 0 for padding, which is on the right.
    """

    input_ids: Tensor
    targets: Tensor
    attention_mask: Tensor
    fresh: Tensor
    ends: Tensor
    lead: Tensor
    lead_mask: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Give the same batch on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def rows(self, rows: slice) -> Batch:
        """Give some of the rows."""
        return self._each(lambda tensor: tensor[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(**{name: change(tensor) for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class _Excerpt:
    """What a row reads at a turn: a document's tokens from ``begin`` on and before ``stop``.

    The first ``context`` of them are not scored: they are the end of the lead.
    """

    document: int
    begin: int
    context: int
    stop: int


class StreamBatches(Iterator[Batch]):
    """Iterate over documents in ``rows`` parallel streams, resumable at every batch.

    A document goes to whichever row is free first. Once all documents are given out, the rows that
    finish are padding until the last one has finished; with ``repeat`` the next epoch, in a new
    order, follows without a break instead. After the end, iterating again starts again.

    A last segment of one token would have nothing to predict and is left out.

    Args:
        documents: of at least 2 tokens each; shorter ones are skipped, which is logged.
        rows: streams, that is, the batch size.
        segment_length: T, tokens of a row and batch.
        stride: S, tokens between the starts of two segments; T if None.
        excerpt: tokens of a document that an epoch scores, from a random place that is another one
            in every epoch; None for all. A document that is no longer is read whole.
        lead: tokens before an excerpt, at most, that its first batch says to memorize: a random
            number, so that memories of all sizes are read.
        seed: decides the order of the documents in every epoch, and the excerpts.
        shuffle: False keeps the order given.
        repeat: never end.

    Raises:
        ConfigError: if ``rows``, ``segment_length``, ``excerpt`` or ``lead`` is too small,
            ``stride`` not within 1 to T, or a lead without excerpts.
        DataError: if there is no document, or none as long as one segment.
    """

    def __init__(
        self,
        documents: Sequence[TokenDocument],
        *,
        rows: int,
        segment_length: int,
        stride: int | None = None,
        excerpt: int | None = None,
        lead: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        repeat: bool = False,
    ) -> None:
        if rows < 1:
            raise ConfigError(f"rows must be at least 1, got {rows}")
        if segment_length < 2:
            raise ConfigError(f"segment_length must be at least 2, got {segment_length}")
        stride = segment_length if stride is None else stride
        if not 1 <= stride <= segment_length:
            raise ConfigError(
                f"stride must be within 1 and segment_length={segment_length}, got {stride}"
            )
        if excerpt is not None and excerpt < segment_length:
            raise ConfigError(
                f"an excerpt must have at least segment_length={segment_length} tokens, got "
                f"{excerpt}; make it longer, or give None for whole documents"
            )
        if lead < 0 or (lead and excerpt is None):
            raise ConfigError(
                "lead must be at least 0, and 0 without excerpts, got "
                f"{lead} with excerpt={excerpt}"
            )
        self.documents = _usable(documents, segment_length)
        self.rows = rows
        self.segment_length = segment_length
        self.stride = stride
        self.excerpt = excerpt
        self.lead = lead
        self.seed = seed
        self.shuffle = shuffle
        self.repeat = repeat
        self._current: list[_Excerpt | None]
        self._restart()

    @property
    def total_segments(self) -> int:
        """Segments of one epoch, over all rows, but for those that leads add where they overlap."""
        return sum(
            count_windows(
                self._scored_tokens(len(document.input_ids)), self.segment_length, self.stride
            )
            for document in self.documents
        )

    def __iter__(self) -> StreamBatches:
        """Go on where the last batch stopped, or from the start after the end."""
        return self

    def __next__(self) -> Batch:
        """Give every row's next segment."""
        leads = self._fill_free_rows()
        if all(excerpt is None for excerpt in self._current):
            self._restart()
            raise StopIteration
        lead_lengths = torch.tensor([len(lead) for lead in leads])
        shape = (self.rows, self.segment_length)
        batch = Batch(
            input_ids=torch.zeros(shape, dtype=torch.int64),
            targets=torch.full(shape, IGNORED, dtype=torch.int64),
            attention_mask=torch.zeros(shape, dtype=torch.int64),
            fresh=torch.zeros(shape, dtype=torch.int64),
            ends=torch.zeros(self.rows, dtype=torch.bool),
            lead=pad_sequence(leads, batch_first=True),
            lead_mask=(torch.arange(int(lead_lengths.max())) < lead_lengths[:, None]).long(),
        )
        for row in range(self.rows):
            self._write_row(batch, row)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Give, as JSON types, the place after the last batch."""
        return {
            "settings": self._settings(),
            "epoch": self._epoch,
            "given_out": self._given_out,
            "current": [excerpt and list(astuple(excerpt)) for excerpt in self._current],
            "offsets": list(self._offsets),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place that `state_dict` told, so that the same batches follow.

        Raises:
            DataError: if the state belongs to other documents or settings.
        """
        # Streams that were saved before segments could overlap do not name their stride, and those
        # that were saved before there were excerpts do not name these.
        settings = {
            "stride": state["settings"].get("segment_length"),
            "excerpt": None,
            "lead": 0,
            **state["settings"],
        }
        for name, value in self._settings().items():
            saved = settings.get(name)
            if saved != value:
                raise DataError(
                    f"the saved stream has {name}={saved}, this one has {value}; resume with the "
                    "documents and settings that the stream was started with"
                )
        self._epoch = int(state["epoch"])
        self._order = self._epoch_order()
        self._given_out = int(state["given_out"])
        self._current = [
            self._whole(current) if isinstance(current, int) else current and _Excerpt(*current)
            for current in state["current"]
        ]
        self._offsets = list(state["offsets"])

    def _restart(self) -> None:
        self._epoch = 0
        self._order = self._epoch_order()
        self._given_out = 0
        self._current = [None] * self.rows
        self._offsets = [0] * self.rows

    def _epoch_order(self) -> list[int]:
        order = list(range(len(self.documents)))
        if self.shuffle:
            random.Random(f"{self.seed}/{self._epoch}").shuffle(order)
        return order

    def _settings(self) -> dict[str, Any]:
        return {
            "documents": _digest(self.documents),
            "rows": self.rows,
            "segment_length": self.segment_length,
            "stride": self.stride,
            "excerpt": self.excerpt,
            "lead": self.lead,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "repeat": self.repeat,
        }

    def _fill_free_rows(self) -> list[Tensor]:
        """Begin a turn in every row that has none; give the tokens that lead to it."""
        leads = [torch.empty(0, dtype=torch.int64)] * self.rows
        for row in range(self.rows):
            if self._current[row] is None:
                document = self._next_document()
                if document is None:
                    continue
                excerpt, lead = self._excerpt_of(document)
                fresh = excerpt.begin + excerpt.context
                ids = self.documents[document].input_ids[fresh - lead : fresh]
                leads[row] = ids.to(torch.int64)
                self._current[row], self._offsets[row] = excerpt, excerpt.begin
        return leads

    def _excerpt_of(self, document: int) -> tuple[_Excerpt, int]:
        """Choose what of a document this epoch reads, and how many tokens lead to it."""
        whole = self._whole(document)
        scored = self._scored_tokens(whole.stop)
        if scored == whole.stop - 1:
            return whole, 0
        choice = random.Random(f"{self.seed}/{self._epoch}/{document}")
        fresh = choice.randint(0, whole.stop - 1 - scored)
        lead = choice.randint(0, min(self.lead, fresh))
        context = min(lead, self.segment_length - self.stride)
        return _Excerpt(document, fresh - context, context, fresh + scored + 1), lead

    def _whole(self, document: int) -> _Excerpt:
        return _Excerpt(document, 0, 0, len(self.documents[document].input_ids))

    def _scored_tokens(self, length: int) -> int:
        """Count the tokens with a target in a turn of a document."""
        return length - 1 if self.excerpt is None else min(length - 1, self.excerpt)

    def _next_document(self) -> int | None:
        if self._given_out == len(self._order):
            if not self.repeat:
                return None
            self._epoch += 1
            self._order = self._epoch_order()
            self._given_out = 0
        self._given_out += 1
        return self._order[self._given_out - 1]

    def _write_row(self, batch: Batch, row: int) -> None:
        excerpt = self._current[row]
        if excerpt is None:
            return
        ids = self.documents[excerpt.document].input_ids[: excerpt.stop]
        start, end = self._offsets[row], self._offsets[row] + self.segment_length
        inputs, targets = ids[start:end], ids[start + 1 : end + 1]
        overlap = self.segment_length - self.stride
        context = overlap if start > excerpt.begin else excerpt.context
        batch.input_ids[row, : len(inputs)] = inputs
        batch.attention_mask[row, : len(inputs)] = 1
        batch.fresh[row, context : len(inputs)] = 1
        batch.targets[row, context : len(targets)] = targets[context:]
        self._offsets[row] = start + self.stride
        # From the last token alone nothing can be predicted: a segment that starts there is none.
        if end >= len(ids) - 1:
            batch.ends[row] = True
            self._current[row] = None


def _usable(documents: Sequence[TokenDocument], segment_length: int) -> Sequence[TokenDocument]:
    if not documents:
        raise DataError("there are no documents to stream; give at least one")
    lengths = [len(document.input_ids) for document in documents]
    if max(lengths) < segment_length:
        raise DataError(
            f"every document is shorter than segment_length={segment_length} tokens "
            f"(longest: {max(lengths)}); lower segment_length or give longer documents"
        )
    usable = [number for number, length in enumerate(lengths) if length > 1]
    if len(usable) == len(documents):
        return documents
    logger.warning(
        "skipped %d of %d documents, which have fewer than 2 tokens",
        len(documents) - len(usable),
        len(documents),
    )
    return [documents[number] for number in usable]


def _digest(documents: Sequence[TokenDocument]) -> str:
    """Tell whether documents are the same, by their ids, lengths and order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.id}\0{len(document.input_ids)}\0".encode())
    return digest.hexdigest()[:16]
