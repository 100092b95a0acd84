import json
import struct
from pathlib import Path

import pytest
import torch

from memlayer import MemoryFormatError, RetrievalBackend
from memlayer_backends import _saved_keys
from memlayer_backends.faiss_cpu import FaissBackend
from memlayer_backends.hnswlib_graph import HnswlibBackend
from memlayer_backends.torch_exact import TorchBackend

KINDS = [TorchBackend, FaissBackend, HnswlibBackend]


def filled(kind: type[RetrievalBackend] = TorchBackend) -> RetrievalBackend:
    try:
        backend = kind(lanes=2, dim=4)
    except ImportError as error:
        pytest.skip(str(error))
    backend.add(torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0)))
    backend.remove_oldest(11)
    return backend


def rewrite_header(path: Path, **changes: object) -> None:
    contents = path.read_bytes()
    (size,) = struct.unpack("<Q", contents[:8])
    header = json.loads(contents[8 : 8 + size])
    ours = {**json.loads(header["__metadata__"]["memlayer"]), **changes}
    header["__metadata__"]["memlayer"] = json.dumps(ours)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + contents[8 + size :])


@pytest.mark.parametrize("writer", KINDS)
@pytest.mark.parametrize("reader", KINDS)
def test_any_backend_reads_what_any_other_wrote(
    writer: type[RetrievalBackend], reader: type[RetrievalBackend], tmp_path: Path
) -> None:
    written, read = filled(writer), filled(reader)
    written.save(tmp_path)
    read.clear()
    read.load(tmp_path)
    queries = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(read.search(queries, 8).ids, written.search(queries, 8).ids)


def test_the_file_says_what_wrote_it(tmp_path: Path) -> None:
    filled(TorchBackend).save(tmp_path)
    contents = (tmp_path / "index.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", contents[:8])
    header = json.loads(json.loads(contents[8 : 8 + size])["__metadata__"]["memlayer"])
    assert len(header.pop("sha256")) == 64
    assert header == {
        "format_version": 1,
        "backend": "torch",
        "options": {"block_megabytes": None, "storage": "float32"},
        "lanes": 2,
        "dim": 4,
    }


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MemoryFormatError, match=r"index\.safetensors does not exist"):
        filled().load(tmp_path)


def test_other_lanes_are_told_beside_the_backends_own(tmp_path: Path) -> None:
    filled().save(tmp_path)
    with pytest.raises(
        MemoryFormatError, match="holds 2 lanes of dim 4, this backend has 3 lanes of dim 5"
    ):
        TorchBackend(lanes=3, dim=5).load(tmp_path)


def test_a_newer_format_is_refused_by_its_number(tmp_path: Path) -> None:
    filled().save(tmp_path)
    rewrite_header(tmp_path / "index.safetensors", format_version=2)
    with pytest.raises(MemoryFormatError, match="format_version 2, this memlayer reads 1"):
        filled().load(tmp_path)


def test_a_changed_key_is_noticed(tmp_path: Path) -> None:
    filled().save(tmp_path)
    path = tmp_path / "index.safetensors"
    contents = bytearray(path.read_bytes())
    contents[-200] ^= 1
    path.write_bytes(contents)
    with pytest.raises(MemoryFormatError, match="is damaged"):
        filled().load(tmp_path)


def test_a_truncated_file_is_told(tmp_path: Path) -> None:
    filled().save(tmp_path)
    path = tmp_path / "index.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MemoryFormatError, match="is not a whole memlayer index"):
        filled().load(tmp_path)


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled().save(tmp_path)
    before = (tmp_path / "index.safetensors").read_bytes()

    def full(_: object, path: Path, **__: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(_saved_keys, "save_file", full)
    larger = filled()
    larger.add(torch.ones(2, 5, 4))
    with pytest.raises(OSError, match="No space left"):
        larger.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["index.safetensors"]
    assert (tmp_path / "index.safetensors").read_bytes() == before
