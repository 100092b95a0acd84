"""What the suites say where their packages are missing."""

import pytest

from memlayer import MemlayerError
from memlayer.testing.requirements import require_test_tools


def test_what_is_missing_is_named_with_the_command_that_installs_it():
    with pytest.raises(ImportError) as caught:
        require_test_tools(("pytest", "no_such_tool", "nor_this"))
    assert isinstance(caught.value, MemlayerError)
    assert str(caught.value) == (
        "memlayer.testing needs no_such_tool and nor_this, which cannot be imported: "
        'pip install "memlayer-lm[testing]"'
    )


def test_nothing_is_missing_here():
    require_test_tools()
