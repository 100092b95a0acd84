"""The steps of each suite. No torch here: the command line lists them.

Sizes are chosen so that ``paper`` takes hours on a CPU and ``small`` minutes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from memlayer.errors import ConfigError, UnknownNameError

DOMAINS = ("books", "technical", "code")

Kind: TypeAlias = Literal["perplexity", "task", "cost"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One evaluation: of a task, of perplexity in a domain, or of what a past costs.

    Attributes:
        name: unique within the suite.
        task: the task's name.
        domain: of perplexity: the folder and the beginning of the file's name.
        options: fields of `PerplexityOptions` or `TaskOptions`; of cost, arguments of
            `measure_cost`.
        task_options: fields of the task's own options.
        max_documents: of perplexity: the first ones.
        max_tokens: of perplexity: of each document.
    """

    name: str
    task: str | None = None
    domain: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    task_options: Mapping[str, Any] = field(default_factory=dict)
    max_documents: int | None = None
    max_tokens: int | None = None

    @property
    def kind(self) -> Kind:
        """Which of the three it is."""
        if self.task is not None:
            return "task"
        return "cost" if self.domain is None else "perplexity"


def steps_of(suite: str) -> tuple[Step, ...]:
    """Give the steps of a suite.

    Raises:
        UnknownNameError: if there is none of that name.
    """
    if suite not in SUITES:
        raise UnknownNameError(f"there is no suite {suite!r}; known are {', '.join(SUITES)}")
    return SUITES[suite]


def chosen_steps(suite: str, only: tuple[str, ...]) -> tuple[Step, ...]:
    """Give those steps of a suite that are named; all if none is.

    Raises:
        ConfigError: if a name is not a step's.
    """
    steps = {step.name: step for step in steps_of(suite)}
    for name in only:
        if name not in steps:
            raise ConfigError(f"suite {suite!r} has no step {name!r}; it has {', '.join(steps)}")
    return tuple(step for name, step in steps.items() if not only or name in only)


def _perplexity(
    documents: int, tokens: int, sizes: tuple[int, ...], dense: int
) -> tuple[Step, ...]:
    """Give fresh segments by memory size, and overlapping ones beside dense context."""
    fresh = {"memory_sizes": sizes, "foreign_memory": True}
    overlapping = {
        "memory_sizes": sizes[-1:],
        "stride": 256,
        "segment_length": 512,
        "fresh": False,
        "dense_context": dense,
    }
    common = {"max_documents": documents, "max_tokens": tokens}
    return tuple(
        Step(name=f"{kind}-{domain}", domain=domain, options=options, **common)  # type: ignore[arg-type]
        for domain in DOMAINS
        for kind, options in (("perplexity", fresh), ("overlapping", overlapping))
    )


_FOREIGN = {"foreign_memory": True}

SUITES: Mapping[str, tuple[Step, ...]] = {
    "paper": (
        *_perplexity(10, 16_385, (1024, 4096, 16_384, 65_536), 2048),
        *(
            Step(
                name=f"icl-{shots}",
                task="icl",
                options={**_FOREIGN, "max_items": 3000, "segment_length": 1024},
                task_options={"shots": shots},
            )
            for shots in (4, 20)
        ),
        *(
            Step(
                name=f"chapterbreak-{kilo}k",
                task="chapterbreak",
                options=_FOREIGN,
                task_options={"prefix_characters": 4500 * kilo},
            )
            for kilo in (1, 4, 8)
        ),
        Step(name="squad", task="squad", options={**_FOREIGN, "segment_length": 1024}),
        Step(name="recall", task="recall", options=_FOREIGN),
        Step(name="kv-75", task="kv", options={**_FOREIGN, "dense_context": 8192}),
        Step(
            name="passkey",
            task="passkey",
            options={**_FOREIGN, "dense_context": 8192},
            task_options={"lengths": (1024, 4096, 16_384)},
        ),
        Step(name="cost", options={"pasts": tuple(1024 * 2**power for power in range(7))}),
    ),
    "small": (
        *(
            Step(
                name=f"perplexity-{domain}",
                domain=domain,
                options={"memory_sizes": (256, 1024), "foreign_memory": True, "resamples": 200},
                max_documents=2,
                max_tokens=1537,
            )
            for domain in DOMAINS
        ),
        Step(
            name="overlapping-code",
            domain="code",
            options={
                "memory_sizes": (1024,),
                "stride": 256,
                "segment_length": 512,
                "fresh": False,
                "dense_context": 1024,
                "resamples": 200,
            },
            max_documents=2,
            max_tokens=1537,
        ),
        Step(
            name="icl",
            task="icl",
            options={**_FOREIGN, "max_items": 10},
            task_options={"shots": 2, "cached": 20, "seeds": 1},
        ),
        Step(
            name="chapterbreak",
            task="chapterbreak",
            options={"max_items": 2},
            task_options={"prefix_characters": 4500},
        ),
        Step(
            name="squad",
            task="squad",
            options={"max_items": 2},
            task_options={"shots": 1, "cached": 3},
        ),
        Step(
            name="recall",
            task="recall",
            options={"max_items": 2},
            task_options={"max_characters": 40_000},
        ),
        Step(name="kv-75", task="kv", options={"max_items": 1}),
        Step(
            name="passkey",
            task="passkey",
            options={"dense_context": 2048},
            task_options={"lengths": (1024,), "per_length": 2},
        ),
        Step(name="cost", options={"pasts": (1024, 4096), "rounds": 1}),
    ),
}
