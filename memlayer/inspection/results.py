"""What an inspection found, in plain Python types.

A *weight* is a share of reading: of all that memory gave to a token, in all heads and layers that
read it, how much a chunk gave (`ChunkShares.contribution`, each head counted by its gate). The
weights of all chunks that a token retrieved sum to 1; over several tokens they are averaged.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class HeadRead:
    """One head's part in the reading of one chunk."""

    layer: int
    """Memory layer, as the backbone counts its layers, from 0."""

    head: int
    """Query head, from 0."""

    score: float
    """Inner product of the head's query and the chunk's key."""

    attention: float
    """Share of the head's memory attention that the chunk drew, 0 to 1."""

    contribution: float
    """Share of what the head took from memory that came from the chunk, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Read:
    """One chunk that a token read."""

    chunk: int
    """Number of the chunk in its row of the memory."""

    weight: float
    """Share of the token's reading."""

    heads: tuple[HeadRead, ...]
    """The heads that retrieved it, the one that took most from it first."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A token that may come next, and how likely it is."""

    id: int
    text: str
    with_memory: float
    """Probability, memory read."""

    without_memory: float
    """Probability, memory off."""


@dataclass(frozen=True, kw_only=True)
class TokenReading:
    """One token: how well it was predicted, and what it read."""

    id: int
    text: str
    """Its part of the text; empty where a character's bytes go on in the next token."""

    with_memory: float | None
    """Probability that the tokens before gave it, memory read; None for the first token."""

    without_memory: float | None
    """The same with memory off."""

    gain: float | None
    """Bits that memory saved in predicting it, ``log2(with / without)``; negative: it cost."""

    reads: tuple[Read, ...]
    """The chunks that it read most, in the order of `Inspection.passages`."""

    places: tuple[float, ...]
    """Its reading by place in memory: equal parts of what is held, the oldest first."""

    expected: tuple[Prediction, ...]
    """What was to come next: the likeliest tokens with memory and without, by the former."""


@dataclass(frozen=True, kw_only=True)
class Passage:
    """Retrieved chunks in the text around them."""

    chunks: tuple[int, ...]
    """Numbers of the chunks in it that were read, in the order of the text."""

    document: str | None
    """Name of the document; None where it was memorized without one."""

    offset: int
    """Place of the first chunk's first token in the document, in tokens; -1 where unknown."""

    distance: int
    """Tokens of memory between its last chunk and the prompt."""

    text: str | None
    """None where memory was written without the tokens' ids."""

    marks: tuple[tuple[int, int], ...]
    """Where the chunks are in ``text``: first character and the one after the last."""

    weight: float
    """Share of reading, the mean over the tokens that are summed up."""

    readers: int
    """Tokens that retrieved any of its chunks."""


@dataclass(frozen=True, kw_only=True)
class DocumentReading:
    """How much of a document was read."""

    document: str | None
    """None stands for everything that was memorized without a name."""

    weight: float
    """Share of reading, the mean over the tokens that are summed up."""

    chunks: int
    """Different chunks of it that were retrieved."""


@dataclass(frozen=True, kw_only=True)
class HeadReading:
    """What one head does with memory, over all tokens."""

    layer: int
    head: int
    gate: float
    """Memory's weight in the head's output, 0 to 1: with ``fusion="gate"`` its ``sigmoid(g)``, with
    ``"softmax"`` the mean over the tokens. Where nothing was retrieved, ``sigmoid(g)``."""

    by_distance: tuple[float, ...]
    """Shares of what it took from memory by distance, between `Inspection.distance_edges`; they
    sum to 1, or are all 0 where nothing was retrieved."""


@dataclass(frozen=True, kw_only=True)
class MemoryState:
    """The memory as it was read."""

    tokens: int
    """Tokens that it held, those that wait for their chunk to be whole included."""

    capacity: int
    """Tokens that it holds before the oldest is dropped."""

    dropped: int
    """Tokens that it once held and no longer does."""

    chunk_size: int
    """Tokens of a chunk."""

    documents: tuple[str, ...]
    """Names of all documents that were memorized, in their order."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What each token of a text looked up in memory, and what that changed."""

    backbone: str
    memory: MemoryState
    prompt_tokens: int
    """The first tokens are the prompt's; what follows was generated."""

    tokens: tuple[TokenReading, ...]
    summed: tuple[int, int]
    """The tokens over which ``passages`` and ``documents`` sum up, the second number not included:
    those that generated, or all where nothing was."""

    chunks: tuple[Passage, ...]
    """Every chunk that a token's ``reads`` name, each with the text around it."""

    passages: tuple[Passage, ...]
    """What the tokens of ``summed`` read most, neighbouring chunks joined, best first. A passage
    that many tokens read says little about any of them, so the order is by weight x rarity,
    ``log((tokens + 1) / readers)``, as in text retrieval."""

    documents: tuple[DocumentReading, ...]
    """The documents that the tokens of ``summed`` read, the one that was read most first."""

    heads: tuple[HeadReading, ...]
    distance_edges: tuple[int, ...]
    """Bounds of the classes of ``by_distance``, in tokens, the first 0."""

    @property
    def gain(self) -> float:
        """Bits that memory saved over all tokens."""
        return sum(token.gain for token in self.tokens if token.gain is not None)

    def to_dict(self) -> dict[str, Any]:
        """Give everything in JSON types."""
        return {**asdict(self), "gain": self.gain}
