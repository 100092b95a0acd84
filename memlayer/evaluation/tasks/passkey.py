"""A number hidden in a long text that says nothing, made at any length.

Source:
    Landmark Attention (arXiv:2305.16300), the idea.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from memlayer.errors import ConfigError
from memlayer.evaluation.tasks.scores import starts_with
from memlayer.evaluation.tasks.task import Item, Split, Task, at_least

FILLER = (
    "Clouds drift over the hills. A cart rolls along the road. Somebody waters the plants. "
    "The clock in the hall ticks on. Bread is in the oven. "
)


@dataclass(frozen=True, kw_only=True)
class PasskeyOptions:
    """How long, and how often.

    Raises:
        ConfigError: if a field has a wrong value.
    """

    lengths: tuple[int, ...] = (4096,)
    """Tokens of the texts, about."""

    per_length: int = 20
    """Texts of each length, the number's place spread evenly from beginning to end."""

    seed: int = 0
    """Of the numbers."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(self.lengths))
        if not self.lengths:
            raise ConfigError("lengths must hold at least one length")
        for length in self.lengths:
            at_least("lengths", length, 64)
        at_least("per_length", self.per_length, 1)
        at_least("seed", self.seed, 0)


class Passkey(Task):
    """Generated texts; every split has numbers of its own."""

    name = "passkey"
    summary = "A number hidden in a long text, at any length; needs no data."
    answering = "generation"
    scorers: ClassVar = {"accuracy": starts_with}
    max_new_tokens = 12
    needs_data = False
    options_type = PasskeyOptions

    def items(self, data: Path | None, split: Split, tokenizer: Any) -> Iterator[Item]:
        """Give the texts of each length, the number deeper each time."""
        options: PasskeyOptions = self.options
        per_filler = len(tokenizer(FILLER, add_special_tokens=False)["input_ids"])
        for length in options.lengths:
            fillers = max(1, round(length / per_filler))
            draw = random.Random(f"{split} {options.seed} {length}")
            for number in range(options.per_length):
                key = str(draw.randrange(10_000, 100_000))
                before = round(fillers * number / max(1, options.per_length - 1))
                hidden = f"The pass key is {key}. Remember it: {key} is the pass key. "
                yield Item(
                    id=f"{length}-{number}",
                    group=f"{length} tokens, key {key}",
                    memory=FILLER * before + hidden + FILLER * (fillers - before),
                    prompt="What is the pass key? The pass key is",
                    answers=(key,),
                )
