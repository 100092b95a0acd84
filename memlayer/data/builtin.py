"""Corpora that every CPython carries, so that nothing has to be downloaded.

``python-docs``: the language reference, from `pydoc_data.topics` (what ``help("if")`` prints).
``python-stdlib``: the source of the standard library.
Both are those of the running Python, so their texts differ a little from version to version.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

from memlayer.data.documents import Document
from memlayer.errors import DataError

DOCS_DOCUMENT_CHARACTERS = 40_000
"""Where a document of ``python-docs`` is long enough: some 10,000 tokens, so that a memory has
something to remember."""

CONTAINED = 0.6
"""Share of a topic's lines that another topic may have before it counts as a part of that one."""

NOT_SOURCE_TEXT = frozenset(
    {
        "__pycache__",
        "encodings",  # tables of character codes
        "idlelib",
        "lib2to3",  # its tests are most of it
        "pydoc_data",  # python-docs
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
"""Folders that ``python-stdlib`` leaves out, at any depth."""


def read_python_docs() -> list[Document]:
    """Give the language reference as a few long documents.

    The topics are short (the median has some 2,000 characters), and some are sections of others
    (``if`` of ``compound``). Sections are left out, since the same text would otherwise land in two
    splits; the rest is joined in alphabetical order.
    """
    from pydoc_data.topics import topics

    documents = []
    group: list[str] = []
    for name in _whole_topics(topics):
        group.append(name)
        if sum(len(topics[item]) for item in group) >= DOCS_DOCUMENT_CHARACTERS:
            documents.append(group)
            group = []
    if group:
        documents.append(group)
    return [
        Document(
            id=f"python-docs/{names[0]}",
            text="\n\n\n".join(topics[item].strip("\n") for item in names) + "\n",
        )
        for names in documents
    ]


def _whole_topics(topics: dict[str, str]) -> list[str]:
    """Give the sorted names of the topics that are not for the most part a part of a longer one."""
    lines = {
        # Short lines, such as "else:", are everywhere.
        name: {line for line in text.splitlines() if len(line) > 30}
        for name, text in topics.items()
    }
    by_length = sorted(topics, key=lambda name: (-len(topics[name]), name))
    kept: list[str] = []
    for name in by_length:
        mine = lines[name]
        if all(len(mine & lines[other]) <= CONTAINED * len(mine) for other in kept):
            kept.append(name)
    return sorted(kept)


def read_python_stdlib() -> list[Document]:
    """Give one document per top-level module or package, the files of a package joined by path."""
    root = Path(sysconfig.get_path("stdlib"))
    files: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        # _sysconfigdata and config-3.11-... hold the paths of the machine that built Python.
        of_machine = parts[0].startswith(("_sysconfigdata", "config-"))
        if not of_machine and not NOT_SOURCE_TEXT.intersection(parts):
            files.setdefault(parts[0].removesuffix(".py"), []).append(path)
    documents = []
    for name, paths in sorted(files.items()):
        text = _join_files(root, paths)
        if text.strip():
            documents.append(Document(id=f"python-stdlib/{name}", text=text))
    if not documents:
        raise DataError(
            f"python-stdlib: there is no Python source in {root}; this Python comes without it, "
            "give a folder of sources instead"
        )
    return documents


def _join_files(root: Path, paths: list[Path]) -> str:
    if len(paths) == 1:
        return _read(paths[0])
    return "\n\n".join(
        f"# ==== {path.relative_to(root).as_posix()} ====\n\n{_read(path)}" for path in paths
    )


def _read(path: Path) -> str:
    # The standard library's own rule is UTF-8; a stray byte must not cost the corpus.
    return path.read_text(encoding="utf-8", errors="replace")


BUILTIN_CORPORA: dict[str, Callable[[], list[Document]]] = {
    "python-docs": read_python_docs,
    "python-stdlib": read_python_stdlib,
}
