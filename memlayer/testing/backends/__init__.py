"""What every retrieval backend must do, as tests that a plug-in author subclasses.

Results are compared with float64 products of plainly kept vectors. Where several vectors have
nearly the same score, any of them is right.
"""

from __future__ import annotations

from memlayer.testing.backends.contents import ContentTests
from memlayer.testing.backends.files import FileTests
from memlayer.testing.backends.inputs import InputTests
from memlayer.testing.backends.ranking import RankingTests
from memlayer.testing.backends.refusals import RefusalTests
from memlayer.testing.backends.searching import SearchTests
from memlayer.testing.backends.steps import RandomStepTests
from memlayer.testing.backends.threads import ThreadTests

__all__ = ["BackendConformance"]


class BackendConformance(
    SearchTests,
    RankingTests,
    ContentTests,
    InputTests,
    RefusalTests,
    FileTests,
    ThreadTests,
    RandomStepTests,
):
    """Subclass it, set `backend`, and pytest runs the whole suite over that backend.

    class TestMine(BackendConformance):
        backend = "mine"
    """
