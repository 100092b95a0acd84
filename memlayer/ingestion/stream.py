"""Reading a stream of tokens into a memory, whatever the pieces that it comes in.

    piece (B, T) ─► each row's real tokens ─► segments, cut at multiples of the row's own
    segment ─► the frozen backbone up to the last memory layer ─► what is not stored yet ─► bank

A token's key depends on the tokens before it in its segment. So a segment is always computed from
its own beginning, and what a call leaves open is computed again by the next one: of a segment whose
beginning is in memory already, only the rest is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from memlayer.capture import run_to_memory_layers
from memlayer.errors import ConfigError, ShapeError
from memlayer.inputs import decoder_inputs
from memlayer.memory.checks import check_rows
from memlayer.memory.reading import FRESH, NO_TOKENS, Reading, RowReading

if TYPE_CHECKING:
    from memlayer.memory import MemoryBank
    from memlayer.model import LongMemModel

Pieces = Tensor | Iterable[Tensor]


def memorize_stream(
    model: LongMemModel,
    input_ids: Pieces,
    attention_mask: Pieces | None = None,
    *,
    document: str | Sequence[str | None] | None = None,
    keep_text: bool = True,
    offset: int | None = None,
) -> int:
    """Append text to each row of a model's memory; `LongMemModel.memorize` says the rest.

    Args:
        model: whose memory, backbone and settings.
        input_ids: ``(B, T)``, int64, or pieces of that form.
        attention_mask: likewise, 0 for padding.
        document: as `LongMemModel.memorize` has it.
        keep_text: whether token ids are kept beside the keys.
        offset: the token of the document at which the text begins, for a document that was left
            for another and is taken up again. None: where `document` says.

    Returns:
        How many tokens were stored, over all rows.
    """
    stream = None
    for piece in _pieces(input_ids, attention_mask):
        if stream is None:
            _check_batch(model.memory, len(piece))
            stream = _Stream(model, len(piece), document, keep_text, offset)
        elif len(piece) != stream.batch:
            raise ShapeError(
                f"all pieces must have the same batch, got one of {len(piece)} rows after one of "
                f"{stream.batch}"
            )
        stream.feed(piece)
    if stream is None:
        return 0
    stream.finish()
    return stream.stored


class _Stream:
    """One call's way through the text: whole segments as soon as they are there."""

    def __init__(
        self,
        model: LongMemModel,
        batch: int,
        document: str | Sequence[str | None] | None,
        keep_text: bool,
        offset: int | None,
    ) -> None:
        self.batch = batch
        self.stored = 0
        self._model = model
        self._bank = model.memory
        self._length = model.memory_config.segment_length
        self._keep_text = keep_text
        self._reading = self._begin(document, offset)
        self._pending = [NO_TOKENS] * batch

    def feed(self, piece: Sequence[Tensor]) -> None:
        """Take each row's next tokens, and memorize the segments that they make whole."""
        self._pending = [
            torch.cat([pending, new]) for pending, new in zip(self._pending, piece, strict=True)
        ]
        while rows := [row for row in range(self.batch) if self._reach(row) >= self._length]:
            self._memorize_segments(rows)

    def finish(self) -> None:
        """Memorize what is left; its segments stay open."""
        rows = [row for row in range(self.batch) if len(self._pending[row])]
        if rows:
            self._memorize_segments(rows)
        else:
            self._bank.reading = self._reading

    def _begin(self, document: str | Sequence[str | None] | None, offset: int | None) -> Reading:
        """Say where each row stands, its document begun if it is another one."""
        names = [document] * self.batch if document is None or isinstance(document, str) else None
        names = list(document or ()) if names is None else names
        if len(names) != self.batch:
            raise ConfigError(
                f"document must be one name, or one for each of {self.batch} rows, got {len(names)}"
            )
        reading = self._bank.reading
        reading = reading if len(reading) == self.batch else (FRESH,) * self.batch
        return tuple(
            self._begin_row(place, name, offset) for place, name in zip(reading, names, strict=True)
        )

    def _begin_row(self, place: RowReading, name: str | None, offset: int | None) -> RowReading:
        if len(place.open_ids) >= self._length:
            place = place.ended()  # It was opened by a model of longer segments.
        if name is None:
            return place
        number = self._bank.document_number(name)
        if number == place.document and offset in (None, place.offset):
            return place
        return RowReading(document=number, offset=offset or 0)

    def _reach(self, row: int) -> int:
        """Count the tokens of a row's open segment that are known, memorized or not."""
        return len(self._reading[row].open_ids) + len(self._pending[row])

    def _memorize_segments(self, rows: Sequence[int]) -> None:
        """Compute the open segments of some rows, and write what of them is not memorized."""
        old = [len(self._reading[row].open_ids) for row in rows]
        segments, places = [], list(self._reading)
        for row, known in zip(rows, old, strict=True):
            place, new = places[row], self._pending[row][: self._length - known]
            self._pending[row] = self._pending[row][len(new) :]
            segment = torch.cat([place.open_ids, new])
            segments.append(segment)
            places[row] = replace(
                place,
                offset=place.offset + len(new),
                open_ids=segment if len(segment) < self._length else NO_TOKENS,
            )
        sources, mask = self._describe(rows, segments, old)
        keys, values = self._compute(segments)
        # What every row holds already need not go through the bank's checks.
        first = min(old)
        self._bank.write(
            [self._all_rows(layer[:, :, first:], rows) for layer in keys],
            [self._all_rows(layer[:, :, first:], rows) for layer in values],
            self._all_rows(mask[:, first:], rows),
            self._all_rows(sources[:, first:], rows),
            reading=tuple(places),
        )
        self._reading = tuple(places)
        self.stored += int(mask.sum())

    def _compute(self, segments: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        # Padding stands behind the text, where no token sees it: there is nothing to mask.
        input_ids = pad_sequence(list(segments), batch_first=True).to(self._bank.device)
        inputs, _ = decoder_inputs(self._model.parts, input_ids, None)
        layers = self._model.memory_config.memory_layers or ()
        states = run_to_memory_layers(self._model.parts, layers, **inputs)
        return states.keys, states.values

    def _describe(
        self, rows: Sequence[int], segments: Sequence[Tensor], old: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Give sources ``(rows, T, 3)`` and which tokens are to be written, ``(rows, T)``."""
        ids = pad_sequence(list(segments), batch_first=True)
        position = torch.arange(ids.shape[1])
        places = [self._reading[row] for row in rows]
        known = torch.tensor(old).unsqueeze(1)
        documents = torch.tensor([place.document for place in places]).unsqueeze(1)
        offsets = torch.tensor([place.offset for place in places]).unsqueeze(1) - known + position
        lengths = torch.tensor([len(segment) for segment in segments]).unsqueeze(1)
        kept = ids if self._keep_text else torch.full_like(ids, -1)
        sources = torch.stack([kept, documents.expand_as(ids), offsets], dim=2)
        return sources, (position >= known) & (position < lengths)

    def _all_rows(self, some: Tensor, rows: Sequence[int]) -> Tensor:
        """Put rows at their places in the whole batch, zeros elsewhere."""
        if len(rows) == self.batch:
            return some
        everyone = some.new_zeros(self.batch, *some.shape[1:])
        everyone[list(rows)] = some
        return everyone


def _pieces(input_ids: Pieces, attention_mask: Pieces | None) -> Iterator[list[Tensor]]:
    """Go through the pieces: each row's real tokens, ``(n,)``, int64, CPU."""
    if isinstance(input_ids, Tensor):
        masks = None if attention_mask is None else _masks(attention_mask, single=True)
        yield _real_tokens(input_ids, None if masks is None else next(masks))
    elif attention_mask is None:
        for piece in input_ids:
            yield _real_tokens(piece, None)
    else:
        for piece, mask in zip(input_ids, _masks(attention_mask, single=False), strict=True):
            yield _real_tokens(piece, mask)


def _masks(attention_mask: Pieces, *, single: bool) -> Iterator[Tensor]:
    if single is not isinstance(attention_mask, Tensor):
        raise ShapeError(
            "attention_mask must be a tensor where input_ids is one, and one mask a piece where "
            f"input_ids comes in pieces, got {type(attention_mask).__name__}"
        )
    return iter([attention_mask] if isinstance(attention_mask, Tensor) else attention_mask)


def _real_tokens(input_ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        got = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else repr(input_ids)[:60]
        raise ShapeError(f"input_ids must have shape (B, T), got {got}")
    if mask is not None and mask.shape != input_ids.shape:
        raise ShapeError(
            f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, got "
            f"{tuple(mask.shape)}"
        )
    rows = input_ids.detach().to("cpu", torch.int64)
    if mask is None:
        return list(rows)
    return [ids[real] for ids, real in zip(rows, mask.cpu().bool(), strict=True)]


def _check_batch(bank: MemoryBank, batch: int) -> None:
    if not bank.shared:
        check_rows(bank, batch)
