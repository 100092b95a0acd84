"""The ``memlayer`` command: thin commands that parse, call the library and show the result."""
