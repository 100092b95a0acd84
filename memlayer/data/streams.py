"""Batches in which every row is a stream over documents.

    row 0   A[0:T]   A[T:2T]   A[2T:]▯▯   D[0:T]   ...     ▯ padding: mask 0, target -100
    row 1   B[0:T]   B[T:]▯    C[0:T]     C[T:2T]  ...

A row's next segment continues the same document, so that its memory is that document's past. Where
`Batch.ends` is True the document is over: the caller clears that row's memory after the step.

With a stride S below T segments overlap, as windows.py says: A[0:T], A[S:S+T], ... All but the last
S tokens of a later segment are context, which an earlier one has scored: their target is -100.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
        ends: ``(B,)``, bool. The row's document ends with this segment.
    """

    input_ids: Tensor
    targets: Tensor
    attention_mask: Tensor
    fresh: Tensor
    ends: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Give the same batch on another device."""
        return Batch(
            input_ids=self.input_ids.to(device),
            targets=self.targets.to(device),
            attention_mask=self.attention_mask.to(device),
            fresh=self.fresh.to(device),
            ends=self.ends.to(device),
        )


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
        seed: decides the order of the documents in every epoch.
        shuffle: False keeps the order given.
        repeat: never end.

    Raises:
        ConfigError: if ``rows`` or ``segment_length`` is too small, or ``stride`` not within 1
            to T.
        DataError: if there is no document, or none as long as one segment.
    """

    def __init__(
        self,
        documents: Sequence[TokenDocument],
        *,
        rows: int,
        segment_length: int,
        stride: int | None = None,
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
        self.documents = _usable(documents, segment_length)
        self.rows = rows
        self.segment_length = segment_length
        self.stride = stride
        self.seed = seed
        self.shuffle = shuffle
        self.repeat = repeat
        self._current: list[int | None]
        self._restart()

    @property
    def total_segments(self) -> int:
        """Segments of one epoch, over all rows."""
        return sum(
            count_windows(len(document.input_ids) - 1, self.segment_length, self.stride)
            for document in self.documents
        )

    def __iter__(self) -> StreamBatches:
        """Go on where the last batch stopped, or from the start after the end."""
        return self

    def __next__(self) -> Batch:
        """Give every row's next segment."""
        self._fill_free_rows()
        if all(document is None for document in self._current):
            self._restart()
            raise StopIteration
        shape = (self.rows, self.segment_length)
        batch = Batch(
            input_ids=torch.zeros(shape, dtype=torch.int64),
            targets=torch.full(shape, IGNORED, dtype=torch.int64),
            attention_mask=torch.zeros(shape, dtype=torch.int64),
            fresh=torch.zeros(shape, dtype=torch.int64),
            ends=torch.zeros(self.rows, dtype=torch.bool),
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
            "current": list(self._current),
            "offsets": list(self._offsets),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place that `state_dict` told, so that the same batches follow.

        Raises:
            DataError: if the state belongs to other documents or settings.
        """
        # Streams that were saved before segments could overlap do not name their stride.
        settings = {"stride": state["settings"].get("segment_length"), **state["settings"]}
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
        self._current = list(state["current"])
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
            "seed": self.seed,
            "shuffle": self.shuffle,
            "repeat": self.repeat,
        }

    def _fill_free_rows(self) -> None:
        for row in range(self.rows):
            if self._current[row] is None:
                self._current[row] = self._next_document()
                self._offsets[row] = 0

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
        document = self._current[row]
        if document is None:
            return
        ids = self.documents[document].input_ids
        start, end = self._offsets[row], self._offsets[row] + self.segment_length
        inputs, targets = ids[start:end], ids[start + 1 : end + 1]
        context = self.segment_length - self.stride if start else 0
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
