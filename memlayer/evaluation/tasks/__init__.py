"""Evaluation tasks: questions whose answers may stand far back.

    task.py      what a task is: items of a memory, a prompt and right answers
    options.py   what every task can be told
    holding.py   one item's memory in a bank, carried on to the next item where it continues
    answering.py how each condition answers: by likelihood, or by greedy generation
    scores.py    matches of generated text
    run.py       all items under all conditions
    results.py   what comes out
    lookup.py    tasks by name
    named.py     the same for names, as the command line has them
    icl.py, chapterbreak.py, squad.py, recall.py, kv.py, passkey.py: the tasks

This module is the built-in plug-in that names them; it imports nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memlayer.hookspecs import hookimpl

if TYPE_CHECKING:
    from memlayer.hookspecs import Register


@hookimpl
def register_tasks(register: Register) -> None:
    """Name the built-in tasks."""
    for name, target in (
        ("icl", "icl:InContextLearning"),
        ("chapterbreak", "chapterbreak:ChapterBreak"),
        ("squad", "squad:Squad"),
        ("recall", "recall:FarNames"),
        ("kv", "kv:KeyValues"),
        ("passkey", "passkey:Passkey"),
    ):
        register(name, f"memlayer.evaluation.tasks.{target}")
