from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest

from memlayer.data import Document, iterate_documents, load_documents
from memlayer.errors import ConfigError, DataError, UnknownNameError

RECORDS = [{"id": "one", "text": "First text."}, {"id": "two", "text": "Zweiter Text: ü.\n"}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
DOCUMENTS = [Document(id=record["id"], text=record["text"]) for record in RECORDS]


def load(*sources: object, **options: object) -> list[Document]:
    return load_documents([str(source) for source in sources], split="all", **options)  # type: ignore[arg-type]


def error_of(*sources: object, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        load(*sources, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "README", "a.tar.tex"])
def test_a_text_file_is_one_document_whatever_its_extension(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("Some text.\n")
    assert load(tmp_path / name) == [Document(id=name, text="Some text.\n")]


def test_a_byte_order_mark_is_dropped_and_line_ends_become_newlines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert load(tmp_path / "a.txt")[0].text == "one\ntwo\n"


def test_json_lines_are_the_same_documents_plain_and_compressed(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(LINES))
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        assert load(tmp_path / name) == DOCUMENTS


def test_zstandard_files_of_several_frames_are_read_to_the_end(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    first, second = LINES.splitlines(keepends=True)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(first) + zstandard.compress(second))
    assert load(path) == DOCUMENTS


def test_records_without_id_are_named_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert [document.id for document in load(tmp_path / "a.jsonl")] == ["a.jsonl:1", "a.jsonl:3"]


def test_text_field_names_another_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n')
    assert load(tmp_path / "a.jsonl", text_field="body")[0].text == "one"


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    columns = {name: [record[name] for record in RECORDS] for name in ("id", "text")}
    assert load(write_parquet(tmp_path / "a.parquet", columns)) == DOCUMENTS


def test_a_folder_gives_its_files_sorted_by_path_without_hidden_ones(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "c.txt").write_text("c")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "z.jsonl").write_bytes(LINES)
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / ".git" / "config").write_text("hidden")
    assert [document.id for document in load(tmp_path)] == ["a.txt", "b/c.txt", "one", "two"]


def test_a_folder_says_which_files_it_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes("ü".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    with caplog.at_level(logging.WARNING):
        assert [document.id for document in load(tmp_path)] == ["a.txt"]
    assert "left out 3 files" in caplog.text
    assert "empty.txt, image.png, latin.txt" in caplog.text


def test_a_broken_json_lines_file_in_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text("{\n")
    assert "b.jsonl:1 is not JSON" in error_of(tmp_path)


def test_a_document_given_twice_is_kept_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("a")
    assert [document.id for document in load(tmp_path, tmp_path / "a.txt")] == ["a.txt"]
    assert "left out 1 documents that the sources give twice" in caplog.text


def test_texts_under_one_id_get_the_same_new_ids_whatever_their_order(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder)
    forward = load(tmp_path / "x", tmp_path / "y")
    backward = load(tmp_path / "y", tmp_path / "x")
    assert len({document.id for document in forward}) == 2
    assert all(document.id.startswith("a.txt#") for document in forward)
    assert forward == backward[::-1]


@pytest.mark.parametrize("content", [b"", b" \n\t\n"], ids=["empty", "white space"])
def test_a_file_without_text_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert error_of(tmp_path / "a.txt").startswith(f"{tmp_path}/a.txt holds no text")


def test_a_binary_file_is_named_with_the_offset_of_its_first_nul(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\0\xff")
    assert "a.txt is binary (a NUL byte at offset 3)" in error_of(tmp_path / "a.txt")


def test_a_file_in_another_encoding_is_named_with_its_first_bad_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abcd\xfcef")
    message = error_of(tmp_path / "a.txt")
    assert "a.txt is not UTF-8 (byte 0xfc at offset 4); convert it to UTF-8" in message


def test_a_missing_file_names_the_folder_that_exists_and_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    message = error_of(tmp_path / "boks" / "a.txt")
    assert f"there is no file or folder {tmp_path}/boks/a.txt" in message
    assert f"the folder {tmp_path} exists and holds 'books'" in message


def test_documents_come_one_at_a_time_and_missing_sources_are_named_at_once(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "one"}\n{"text": "two"}\nno JSON\n')
    documents = iterate_documents([str(lines)])
    assert [next(documents).text, next(documents).text] == ["one", "two"]
    with pytest.raises(DataError, match=r"lines\.jsonl:3 is not JSON"):
        next(documents)
    with pytest.raises(DataError, match="there is no file or folder"):
        iterate_documents([str(lines), str(tmp_path / "none.txt")])


def test_a_folder_without_text_is_named(tmp_path: Path) -> None:
    assert "holds no text (0 files left out)" in error_of(tmp_path)


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": \n')
    message = error_of(tmp_path / "a.jsonl")
    assert f"{tmp_path}/a.jsonl:2 is not JSON (Expecting value at column" in message


def test_a_line_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('["text"]\n')
    assert "a.jsonl:1 is a JSON list; every line" in error_of(tmp_path / "a.jsonl")


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "\xfc"}\n')
    message = error_of(tmp_path / "a.jsonl")
    assert "a.jsonl:2 is not UTF-8 (byte 0xfc at offset 10 of the line)" in message


def test_a_record_without_text_is_named_with_the_fields_it_has(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "x", "body": "one"}\n')
    message = error_of(tmp_path / "a.jsonl")
    assert "a.jsonl:1 has no field 'text', only body, id; name the text's field" in message


@pytest.mark.parametrize("value", ["null", "3", '["a"]'])
def test_a_text_that_is_no_string_is_named(tmp_path: Path, value: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": {value}}}\n')
    assert "a.jsonl:1 has a field 'text' of type" in error_of(tmp_path / "a.jsonl")


def test_blank_records_are_left_out_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n{"text": "one"}\n')
    assert [document.text for document in load(tmp_path / "a.jsonl")] == ["one"]
    assert "left out 1 blank documents" in caplog.text


@pytest.mark.parametrize("cut", [-1, -9, 12, 5])
def test_a_truncated_gzip_file_is_named(tmp_path: Path, cut: int) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES)[:cut])
    assert "a.jsonl.gz is not a whole gzip file" in error_of(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("cut", [-1, 12, 5])
def test_a_truncated_zstandard_file_is_named(tmp_path: Path, cut: int) -> None:
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(LINES * 100)[:cut])
    assert "a.jsonl.zst is not a whole zstd file" in error_of(tmp_path / "a.jsonl.zst")


def test_a_file_that_is_no_gzip_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(LINES)
    assert "a.jsonl.gz is not a whole gzip file" in error_of(tmp_path / "a.jsonl.gz")


def test_a_parquet_file_without_the_column_is_named_with_those_it_has(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"body": ["one"], "n": [1]})
    message = error_of(path)
    assert "a.parquet has no column 'text', only body, n; name the text's column" in message


def test_a_parquet_row_without_text_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ["one", None]})
    assert "a.parquet, row 2, has a field 'text' of type NoneType" in error_of(path)


def test_a_truncated_parquet_file_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ["one"]})
    path.write_bytes(path.read_bytes()[:-20])
    assert "a.parquet is not a whole Parquet file" in error_of(path)


def test_a_corpus_name_with_a_typo_suggests_the_corpus() -> None:
    with pytest.raises(UnknownNameError) as caught:
        load("python-doc")
    assert str(caught.value).startswith("'python-doc' is no file or folder and no built-in corpus")
    assert str(caught.value).endswith("Did you mean 'python-docs'?")


def test_a_split_that_does_not_exist_names_those_that_do() -> None:
    with pytest.raises(ConfigError, match="split must be one of train, validation, test, all"):
        load_documents(["python-docs"], split="dev")  # type: ignore[arg-type]


@pytest.mark.parametrize("sources", [[], "python-docs"])
def test_sources_must_be_a_list_with_something_in_it(sources: list[str]) -> None:
    with pytest.raises(ConfigError, match="sources must be a list of at least one source"):
        load_documents(sources, split="all")


def test_the_books_of_the_shared_data_load_whole(shared: Path) -> None:
    documents = load(shared / "data" / "books" / "books_validation.jsonl.gz")
    assert len(documents) == 8
    assert sum(len(document.text) for document in documents) == 2_716_236
