"""The packages that the suites need and memlayer itself does not."""

from __future__ import annotations

from importlib.util import find_spec

from memlayer.errors import BackendUnavailableError


def require_test_tools(names: tuple[str, ...] = ("pytest", "hypothesis")) -> None:
    """Do nothing where all of these packages are installed.

    Raises:
        BackendUnavailableError: naming those that are not, and the command that installs them.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(
            f"memlayer.testing needs {' and '.join(missing)}, which cannot be imported: "
            'pip install "memlayer-lm[testing]"'
        )
