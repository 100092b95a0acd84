from __future__ import annotations

import itertools

import pytest

from memlayer.data import Document, load_documents


@pytest.fixture(scope="module")
def docs() -> list[Document]:
    return load_documents(["python-docs"], split="all")


@pytest.fixture(scope="module")
def stdlib() -> list[Document]:
    return load_documents(["python-stdlib"], split="all")


def test_python_docs_are_a_few_long_documents(docs: list[Document]) -> None:
    assert len(docs) >= 3
    assert all(len(document.text) >= 40_000 for document in docs[:-1])
    assert "lambda_expr" in "".join(document.text for document in docs)


def test_python_docs_share_little_between_documents(docs: list[Document]) -> None:
    lines = [{line for line in item.text.splitlines() if len(line) > 30} for item in docs]
    for mine, other in itertools.combinations(lines, 2):
        assert len(mine & other) < 0.1 * min(len(mine), len(other))


def test_python_docs_have_a_document_for_every_split() -> None:
    for split in ("train", "validation", "test"):
        assert load_documents(["python-docs"], split=split)


def test_python_stdlib_keeps_a_package_together(stdlib: list[Document]) -> None:
    texts = {document.id: document.text for document in stdlib}
    assert "# ==== json/decoder.py ====" in texts["python-stdlib/json"]
    assert "class JSONDecoder" in texts["python-stdlib/json"]
    assert "def dedent" in texts["python-stdlib/textwrap"]


def test_python_stdlib_leaves_out_tests_and_machine_paths(stdlib: list[Document]) -> None:
    names = {document.id.removeprefix("python-stdlib/") for document in stdlib}
    assert not names & {"test", "idlelib", "lib2to3", "encodings", "site-packages"}
    assert not any(name.startswith("_sysconfigdata") for name in names)
    assert not any("/tests/" in line for item in stdlib for line in _headings(item))


def _headings(document: Document) -> list[str]:
    return [line for line in document.text.splitlines() if line.startswith("# ==== ")]
