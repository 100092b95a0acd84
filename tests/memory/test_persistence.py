"""Banks on disk: what is saved is what is loaded, in increments, whatever happens in between."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import threading
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from memlayer.errors import ConfigError, MemoryFormatError, StorageError
from memlayer.memory import bank_info, bank_lock, verify_bank


def shard_names(directory):
    return sorted(path.name for path in directory.glob("shard-*"))


def reload(bank, directory, make, **settings):
    other = make(num_layers=bank.num_layers, dtype=bank.dtype, shared=bank.shared, **settings)
    other.load(directory)
    return other


@pytest.mark.parametrize("indexes", ["rebuild", "save"])
@pytest.mark.parametrize(
    ("backend", "overlap"), [("torch", 0), ("torch", 5), ("faiss", 0), ("hnswlib", 0)]
)
def test_a_loaded_bank_answers_and_goes_on_as_the_saved_one(
    tmp_path, make_numbered_bank, feed, assert_alike, backend, overlap, indexes
):
    settings = {"backend": backend, "capacity": 48, "num_layers": 2, "overlap": overlap}
    bank = make_numbered_bank(**settings)
    end = 0
    for step, tokens in enumerate([0, 3, 30, 1, 90, 2]):
        if tokens:
            feed(bank, end, end + tokens, rows=2)
        end += tokens
        bank.save(tmp_path / "bank", indexes=indexes)
        other = make_numbered_bank(**settings)
        other.load(tmp_path / "bank")
        assert_alike(other, bank)
        if bank.rows:
            # The copy goes on; the original too, but later.
            feed(other, end, end + 13, rows=2)
            twin = make_numbered_bank(**settings)
            twin.load(tmp_path / "bank", verify=False)
            feed(twin, end, end + 13, rows=2)
            assert_alike(twin, other)
        assert verify_bank(tmp_path / "bank").whole, step


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_survives_to_the_bit(tmp_path, make_numbered_bank, feed, assert_alike, dtype):
    bank = make_numbered_bank(dtype=dtype)
    feed(bank, 0, 23)
    bank.save(tmp_path)
    assert_alike(reload(bank, tmp_path, make_numbered_bank), bank)


def test_rows_of_unequal_length_survive(tmp_path, make_numbered_bank, feed, assert_alike):
    bank, generator = make_numbered_bank(capacity=40), torch.Generator().manual_seed(0)
    for start in range(0, 400, 25):
        mask = torch.rand(3, 25, generator=generator) < torch.tensor([[1.0], [0.4], [0.02]])
        feed(bank, start, start + 25, rows=3, mask=mask)
        bank.save(tmp_path)
        assert_alike(reload(bank, tmp_path, make_numbered_bank, capacity=40), bank)
    assert len(set(bank._ring.written.tolist())) == 3


def test_a_cleared_row_is_saved_as_cleared(tmp_path, make_numbered_bank, feed, assert_alike):
    bank = make_numbered_bank()
    feed(bank, 0, 50, rows=2)
    bank.save(tmp_path)
    bank.clear([1])
    bank.save(tmp_path)
    assert_alike(reload(bank, tmp_path, make_numbered_bank), bank)
    feed(bank, 50, 70, rows=2)
    bank.save(tmp_path)
    assert_alike(reload(bank, tmp_path, make_numbered_bank), bank)
    bank.clear()
    bank.save(tmp_path)
    assert reload(bank, tmp_path, make_numbered_bank).rows == 0


def test_documents_reading_and_tokenizer_survive(tmp_path, make_numbered_bank, make_tokens):
    from memlayer.memory.reading import RowReading

    bank = make_numbered_bank()
    bank.document_number("a")
    bank.note_document("b", sha256="0" * 64, complete=True)
    bank.tokenizer = "letters"
    keys = torch.zeros(1, 2, 7, 6)
    place = RowReading(document=1, offset=7, open_ids=make_tokens(1, 7)[0])
    bank.write(keys, keys, reading=(place,))
    bank.save(tmp_path)
    other = reload(bank, tmp_path, make_numbered_bank)
    assert other.document_records == bank.document_records
    assert [record.tokens for record in other.document_records] == [0, 7]
    assert other.tokenizer == "letters"
    assert (other.reading[0].document, other.reading[0].offset) == (1, 7)
    assert torch.equal(other.reading[0].open_ids, place.open_ids)


def test_saving_again_writes_only_what_is_new(tmp_path, make_numbered_bank, feed):
    bank = make_numbered_bank()
    feed(bank, 0, 2000)
    bank.save(tmp_path)
    (first,) = tmp_path.glob("shard-*")
    stamp, size = first.stat().st_mtime_ns, first.stat().st_size
    feed(bank, 2000, 2100)
    bank.save(tmp_path)
    second = max(tmp_path.glob("shard-*"))
    assert first.stat().st_mtime_ns == stamp
    assert second.stat().st_size < size / 15
    # A bank that was loaded goes on likewise.
    other = reload(bank, tmp_path, make_numbered_bank)
    feed(other, 2100, 2150)
    other.save(tmp_path)
    assert first.stat().st_mtime_ns == stamp
    assert len(list(tmp_path.glob("shard-*"))) == 3


def test_many_saves_leave_few_shards_and_write_each_chunk_a_few_times(
    tmp_path, make_numbered_bank, feed, assert_alike
):
    bank, written, names = make_numbered_bank(), 0, set()
    for start in range(0, 4000, 40):
        feed(bank, start, start + 40)
        bank.save(tmp_path)
        new = set(shard_names(tmp_path)) - names
        written += sum((tmp_path / name).stat().st_size for name in new)
        names |= new
        counts = [
            shard["counts"][0]
            for shard in json.loads((tmp_path / "manifest.json").read_text())["shards"]
        ]
        assert all(a >= 2 * b for a, b in pairwise(counts))
    assert len(shard_names(tmp_path)) <= math.log2(100) + 1
    assert written < math.log2(100) * sum(p.stat().st_size for p in tmp_path.glob("shard-*"))
    assert_alike(reload(bank, tmp_path, make_numbered_bank), bank)


def test_files_of_a_full_bank_stay_within_a_few_times_its_size(
    tmp_path, make_numbered_bank, feed, assert_alike
):
    bank, largest = make_numbered_bank(capacity=400), 0
    for start in range(0, 6000, 60):
        feed(bank, start, start + 60)
        bank.save(tmp_path)
        chunks = sum(
            shard["counts"][0]
            for shard in json.loads((tmp_path / "manifest.json").read_text())["shards"]
        )
        largest = max(largest, chunks)
    assert largest <= 3 * 400 // 4
    assert_alike(reload(bank, tmp_path, make_numbered_bank, capacity=400), bank)


def test_with_less_capacity_the_newest_chunks_are_loaded_and_with_more_all(
    tmp_path, make_numbered_bank, feed, assert_alike
):
    bank, small = make_numbered_bank(capacity=80), make_numbered_bank(capacity=40)
    large = make_numbered_bank(capacity=160)
    for place, indexes in ((tmp_path / "a", "rebuild"), (tmp_path / "b", "save")):
        bank.clear()
        feed(bank, 0, 102)
        bank.save(place, indexes=indexes)
        other = make_numbered_bank(capacity=40)
        other.load(place)
        small.clear()
        feed(small, 0, 102)
        assert_alike(other, small)
        large.load(place)
        assert large.lengths.tolist() == [80 + 2]
        offsets = large.look_up(torch.arange(25).view(1, 1, 1, -1))[0, 0, 0, :, 0, 2]
        assert offsets.tolist() == [-1] * 5 + list(range(20, 100, 4))
        feed(large, 102, 200)
        assert large.lengths.tolist() == [160]
        feed(large, 200, 500)
        twin = make_numbered_bank(capacity=160)
        feed(twin, 0, 500)
        assert_alike(large, twin)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's list of mappings")
def test_one_shard_is_mapped_and_never_changed(tmp_path, make_numbered_bank, feed, assert_alike):
    bank = make_numbered_bank()
    feed(bank, 0, 1001)
    bank.save(tmp_path)
    (shard,) = tmp_path.glob("shard-*")
    content = shard.read_bytes()
    other = reload(bank, tmp_path, make_numbered_bank)
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line for line in maps if line.endswith(str(shard))]
    start, stop = (int(part, 16) for part in mapped[0].split()[0].split("-"))
    for plane in (other._ring.keys, other._ring.values, other._ring.sources):
        assert start <= plane.data_ptr() < stop
    assert_alike(other, bank)
    feed(other, 1001, 1300)
    feed(bank, 1001, 1300)
    assert_alike(other, bank)
    assert shard.read_bytes() == content


def test_a_bank_in_another_process_finds_the_same(tmp_path, make_numbered_bank, feed):
    bank = make_numbered_bank(capacity=400)
    for start in range(0, 900, 90):
        feed(bank, start, start + 90)
        bank.save(tmp_path)
    queries = torch.randn(1, 2, 4, 6, generator=torch.Generator().manual_seed(3))
    found = bank.retrieve(queries)
    code = f"""
import torch
from memlayer.memory import MemoryBank
from memlayer.plugins import default_plugins
cls = default_plugins().backends.get("torch")
bank = MemoryBank(capacity=400, chunk_size=4, top_k=8, slack=8, num_layers=1, head_dim=6,
    num_key_value_heads=2, identity="a model", make_index=lambda n: cls(lanes=n, dim=6))
bank.load({str(tmp_path)!r})
queries = torch.randn(1, 2, 4, 6, generator=torch.Generator().manual_seed(3))
found = bank.retrieve(queries)
print([found.ids.tolist(), found.gather()[1].tolist(), bank.look_up(found).tolist()])
"""
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert json.loads(printed) == [
        found.ids.tolist(),
        found.gather()[1].tolist(),
        bank.look_up(found).tolist(),
    ]


def test_another_banks_directory_is_replaced_as_a_whole(
    tmp_path, make_numbered_bank, feed, assert_alike
):
    bank, later = make_numbered_bank(), make_numbered_bank()
    feed(bank, 0, 100)
    bank.save(tmp_path)
    later.load(tmp_path)
    lineage = bank_info(tmp_path).lineage
    feed(bank, 100, 200)
    bank.save(tmp_path)
    assert bank_info(tmp_path).lineage == lineage
    # It goes on from a state that the directory no longer holds.
    feed(later, 500, 540)
    later.save(tmp_path)
    assert bank_info(tmp_path).lineage != lineage
    assert_alike(reload(later, tmp_path, make_numbered_bank), later)
    assert len(shard_names(tmp_path)) == 1


def test_a_save_removes_what_a_killed_writer_left_and_nothing_else(
    tmp_path, make_numbered_bank, feed
):
    bank = make_numbered_bank()
    feed(bank, 0, 100)
    bank.save(tmp_path)
    for name in ("shard-00000007.safetensors", "state-00000007.safetensors", "notes.txt",
                 ".manifest.json.77.tmp", "shard-x.safetensors"):  # fmt: skip
        (tmp_path / name).write_text("left")
    (tmp_path / "index-00000007" / "0").mkdir(parents=True)
    feed(bank, 100, 200)
    bank.save(tmp_path)
    bank.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"notes.txt", "shard-x.safetensors", "lock", "manifest.json"} <= names
    assert not any("07" in name or name.endswith(".tmp") for name in names)
    assert verify_bank(tmp_path).whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"identity": "another model"}, "identity='a model', this model needs 'another model'"),
        ({"identity": "a model layers [2]"}, "identity='a model', this model needs 'a model layer"),
        ({"chunk_size": 2}, "chunk_size=4, this model needs 2"),
        ({"dtype": torch.bfloat16}, "dtype='float32', this model needs 'bfloat16'"),
        ({"num_layers": 2}, "num_layers=1, this model needs 2"),
        ({"shared": True}, "shared=False, this model needs True"),
        ({"overlap": 3}, "overlap=0, this model needs 3"),
    ],
)
def test_a_bank_of_other_settings_is_refused(tmp_path, make_numbered_bank, feed, settings, message):
    bank = make_numbered_bank()
    feed(bank, 0, 8)
    bank.save(tmp_path)
    with pytest.raises(MemoryFormatError, match=message):
        make_numbered_bank(**settings).load(tmp_path)


@pytest.mark.parametrize(
    "damage",
    ["missing", "truncated", "flipped", "no state", "no manifest", "bad json", "future", "edited",
     "no index", "longer", "pipe"],
)  # fmt: skip
def test_a_damaged_bank_is_refused_and_nothing_is_lost(
    tmp_path, make_numbered_bank, feed, assert_alike, damage
):
    place = tmp_path / "bank"
    bank = make_numbered_bank()
    feed(bank, 0, 30)
    bank.save(place, indexes="save")
    (shard,), (state,) = place.glob("shard-*"), place.glob("state-*")
    manifest = place / "manifest.json"
    content = json.loads(manifest.read_text())
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif damage == "longer":
        shard.write_bytes(shard.read_bytes() + b"\0")
    elif damage == "flipped":
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    elif damage == "pipe":
        shard.unlink()
        os.mkfifo(shard)
    elif damage == "no state":
        state.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "bad json":
        manifest.write_text("{")
    elif damage == "future":
        manifest.write_text(json.dumps(content | {"format_version": 9}))
    elif damage == "edited":
        manifest.write_text(json.dumps(content | {"capacity": 8}))
    else:
        next(path for path in place.glob("index-*/0/*")).unlink()
    held, twin = make_numbered_bank(), make_numbered_bank()
    for one in (held, twin):
        feed(one, 50, 75)
    with pytest.raises(MemoryFormatError):
        held.load(place)
    assert_alike(held, twin)
    assert not verify_bank(place).whole


def test_verify_reports_every_problem_and_changes_nothing(tmp_path, make_numbered_bank, feed):
    bank = make_numbered_bank()
    for start, stop in ((0, 1000), (1000, 1100)):
        feed(bank, start, stop)
        bank.save(tmp_path)
    shards = sorted(tmp_path.glob("shard-*"))
    assert len(shards) == 2
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    shards[1].unlink()
    before = sorted(path.name for path in tmp_path.iterdir())
    report = verify_bank(tmp_path)
    assert not report.whole
    assert "was truncated or changed" in report.problems[0]
    assert "is missing" in report.problems[1]
    assert len(report.problems) == 2
    assert json.loads(json.dumps(report.to_dict()))["info"]["lengths"] == [1100]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_info_reads_the_manifest_alone(tmp_path, make_numbered_bank, feed):
    bank = make_numbered_bank(capacity=400)
    bank.note_document("a book", sha256="0" * 64, complete=False)
    feed(bank, 0, 90)
    bank.save(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    info = bank_info(tmp_path).to_dict()
    assert json.loads(json.dumps(info)) == info
    assert (info["lengths"], info["capacity"], info["rows"]) == ([90], 400, 1)
    assert info["documents"] == [
        {"name": "a book", "tokens": 0, "sha256": "0" * 64, "complete": False}
    ]
    with pytest.raises(MemoryFormatError, match="there is no memory bank in"):
        bank_info(tmp_path / "elsewhere")


def test_a_second_writer_is_refused_with_the_first_ones_process(
    tmp_path, make_numbered_bank, feed, assert_alike
):
    bank = make_numbered_bank()
    feed(bank, 0, 20)
    bank.save(tmp_path)
    code = f"""
import sys
from memlayer.memory.lock import bank_lock
with bank_lock({str(tmp_path)!r}):
    print("held", flush=True)
    sys.stdin.read()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match=rf"another process is writing to .*{child.pid}\)"):
            bank.save(tmp_path)
        # Readers need no lock.
        assert_alike(reload(bank, tmp_path, make_numbered_bank), bank)
        child.kill()
    bank.save(tmp_path)


def test_a_writer_may_save_under_its_own_lock_and_another_thread_may_not(
    tmp_path, make_numbered_bank, feed
):
    bank, refused = make_numbered_bank(), []
    feed(bank, 0, 20)

    def save():
        try:
            bank.save(tmp_path)
        except StorageError as error:
            refused.append(str(error))

    with bank_lock(tmp_path):
        bank.save(tmp_path)
        thread = threading.Thread(target=save)
        thread.start()
        thread.join()
    assert len(refused) == 1
    thread = threading.Thread(target=save)
    thread.start()
    thread.join()
    assert len(refused) == 1


def test_a_reader_beside_a_writer_always_gets_a_whole_state(tmp_path, make_numbered_bank, feed):
    bank = make_numbered_bank(capacity=600)
    feed(bank, 0, 50)
    bank.save(tmp_path)
    failed = []

    def write():
        try:
            for start in range(50, 2500, 50):
                feed(bank, start, start + 50)
                bank.save(tmp_path)
        except BaseException as error:
            failed.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while writer.is_alive():
        other = make_numbered_bank(capacity=600)
        other.load(tmp_path)
        end = int(other._ring.written[0]) * 4 + int(other._waiting.lengths[0])
        assert end % 50 == 0
        twin = make_numbered_bank(capacity=600)
        feed(twin, 0, end)
        assert torch.equal(other.lengths, twin.lengths)
        seen.append(end)
        assert verify_bank(tmp_path).whole
    writer.join()
    assert not failed
    assert seen == sorted(seen)
    assert len(set(seen)) > 3


def check_refused_save(bank, directory, make, message):
    """The save fails in one sentence, and what was saved before is whole and all that is there."""
    before = sorted(path.name for path in directory.iterdir())
    end = bank_info(directory).lengths[0]
    with pytest.raises(StorageError, match=message):
        bank.save(directory)
    assert sorted(path.name for path in directory.iterdir()) == before
    assert verify_bank(directory).whole
    assert reload(bank, directory, make).lengths.tolist() == [end]


def test_a_file_that_may_not_grow_further_leaves_the_old_state(tmp_path, make_numbered_bank, feed):
    bank = make_numbered_bank()
    feed(bank, 0, 20)
    bank.save(tmp_path)
    feed(bank, 20, 1000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        check_refused_save(bank, tmp_path, make_numbered_bank, "there is no space left on its disk")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    bank.save(tmp_path)
    assert bank_info(tmp_path).lengths == (1000,)


@contextmanager
def small_disk(place):
    """A file system of 256 KiB, where the system lets us have one."""
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    done = subprocess.run(["mount", *options], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_leaves_the_old_state(tmp_path, make_numbered_bank, feed):
    with small_disk(tmp_path / "disk") as disk:
        bank = make_numbered_bank()
        feed(bank, 0, 100)
        bank.save(disk / "bank")
        feed(bank, 100, 4000)
        check_refused_save(bank, disk / "bank", make_numbered_bank, "no space left on its disk")
        bank.clear()
        feed(bank, 0, 200)
        bank.save(disk / "bank")
        assert bank_info(disk / "bank").lengths == (200,)


def test_a_read_only_disk_is_refused_and_can_be_read(tmp_path, make_numbered_bank, feed):
    with small_disk(tmp_path / "disk") as disk:
        bank = make_numbered_bank()
        feed(bank, 0, 100)
        bank.save(disk / "bank")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        feed(bank, 100, 140)
        check_refused_save(bank, disk / "bank", make_numbered_bank, "cannot be written")


def test_a_file_in_the_way_is_refused(tmp_path, make_numbered_bank, feed):
    bank = make_numbered_bank()
    feed(bank, 0, 20)
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "bank"):
        with pytest.raises(StorageError, match="cannot be written"):
            bank.save(place)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unknown_way_to_keep_indexes_is_refused(tmp_path, make_numbered_bank):
    with pytest.raises(ConfigError, match="indexes must be 'rebuild' or 'save', got 'drop'"):
        make_numbered_bank().save(tmp_path, indexes="drop")
