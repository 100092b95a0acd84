"""What memlayer loads of this package: names, and nothing heavy."""

from memlayer import hookimpl


@hookimpl
def register_backends(register):
    """Name the backend; its module is imported when it is used."""
    register("usearch", "memlayer_usearch.backend:UsearchBackend", requires=("usearch",))
