"""Documents into a bank on disk, each once, whenever the program was stopped."""

from __future__ import annotations

import json

import pytest
import torch

import memlayer
from memlayer.data import tokenizer_fingerprint
from memlayer.data.documents import Document
from memlayer.errors import ConfigError, DataError, MemoryFormatError, StorageError
from memlayer.ingestion import memorize_documents
from memlayer.memory import bank_info, bank_lock, verify_bank

SEGMENT = 16
TEXTS = [
    Document("one", "The whale swam past the ship. " * 9),
    Document("two", "A short note."),
    Document("three", "Call me what you like, she said. " * 6),
]


@pytest.fixture(scope="module")
def backbone(tiny_checkpoint):
    return memlayer.load_backbone(str(tiny_checkpoint("llama")))


@pytest.fixture
def make_model(tiny_checkpoint):
    def make(**changes):
        values = {"backend": "torch", "memory_size": 2048, "top_k": 16, "segment_length": SEGMENT}
        loaded = memlayer.load_backbone(str(tiny_checkpoint("llama")))
        return memlayer.wrap(loaded.model, memlayer.LongMemConfig(**(values | changes)))

    return make


class StoppedError(Exception):
    """Raised where a test stops the program."""


def stop_after(saves):
    """A progress that stops the program after so many saves."""
    left = iter(range(saves))

    def progress(_):
        if next(left, None) is None:
            raise StoppedError

    return progress


def held_sources(bank):
    kept = bank._ring.read(bank._ring.written - bank._held_chunks(), bank._ring.written)
    waiting = bank._waiting.sources[0, : bank._waiting.lengths[0]]
    return torch.cat([kept.sources[0].flatten(0, 1), waiting])


def held_keys(bank):
    kept = bank._ring.read(bank._ring.written - bank._held_chunks(), bank._ring.written)
    waiting = bank._waiting.keys[:, 0, :, : bank._waiting.lengths[0]]
    return torch.cat([kept.keys[:, 0].flatten(2, 3), waiting], dim=2)


def test_what_is_stored_reads_as_the_documents(make_model, backbone, tmp_path):
    model = make_model()
    report = memorize_documents(model, backbone.tokenizer, TEXTS, tmp_path / "bank")
    assert [(one.name, one.outcome) for one in report.documents] == [
        ("one", "new"), ("two", "new"), ("three", "new")
    ]  # fmt: skip
    other = make_model()
    other.memory.load(tmp_path / "bank")
    sources = held_sources(other.memory)
    for number, document in enumerate(TEXTS):
        mine = sources[sources[:, 1] == number]
        assert mine[:, 2].tolist() == list(range(len(mine)))
        assert backbone.tokenizer.decode(mine[:, 0]) == document.text
    assert report.length == report.memorized == len(sources)
    assert json.loads(json.dumps(report.to_dict()))["documents"][1]["memorized"] == len(
        TEXTS[1].text
    )


def test_documents_that_are_held_are_not_read_again(make_model, backbone, tmp_path):
    memorize_documents(make_model(), backbone.tokenizer, TEXTS[:2], tmp_path)
    told = []
    report = memorize_documents(
        make_model(), backbone.tokenizer, TEXTS, tmp_path, progress=told.append
    )
    assert [one.outcome for one in report.documents] == ["held", "held", "new"]
    assert [(one.name, one.saved) for one in told] == [
        ("one", 270), ("two", 13), ("three", 198)
    ]  # fmt: skip
    assert report.memorized == len(TEXTS[2].text)
    assert bank_info(tmp_path).lengths == (sum(len(document.text) for document in TEXTS),)


@pytest.mark.parametrize("saves", [0, 1, 3, 6])
def test_a_stopped_run_goes_on_to_the_same_bank(make_model, backbone, tmp_path, saves):
    whole = make_model()
    memorize_documents(whole, backbone.tokenizer, TEXTS, tmp_path / "whole")
    with pytest.raises(StoppedError):
        memorize_documents(
            make_model(), backbone.tokenizer, TEXTS, tmp_path / "bank",
            save_every=5, progress=stop_after(saves),
        )  # fmt: skip
    assert verify_bank(tmp_path / "bank").whole
    stood = sum(bank_info(tmp_path / "bank").lengths)
    model = make_model()
    report = memorize_documents(model, backbone.tokenizer, TEXTS, tmp_path / "bank")
    assert stood + report.memorized == report.length == len(whole.memory)
    assert torch.equal(held_sources(model.memory), held_sources(whole.memory))
    torch.testing.assert_close(
        held_keys(model.memory), held_keys(whole.memory), rtol=1e-5, atol=1e-5
    )


def test_a_document_that_was_left_for_another_is_continued_where_it_stood(
    make_model, backbone, tmp_path
):
    with pytest.raises(StoppedError):
        memorize_documents(
            make_model(), backbone.tokenizer, TEXTS, tmp_path, save_every=5, progress=stop_after(1)
        )
    memorize_documents(make_model(), backbone.tokenizer, TEXTS[1:2], tmp_path)
    model = make_model()
    report = memorize_documents(model, backbone.tokenizer, TEXTS[:1], tmp_path)
    assert report.documents[0].outcome == "continued"
    sources = held_sources(model.memory)
    mine = sources[sources[:, 1] == 0]
    assert mine[:, 2].tolist() == list(range(len(TEXTS[0].text)))


def test_another_text_by_a_name_that_is_taken_is_refused(make_model, backbone, tmp_path):
    memorize_documents(make_model(), backbone.tokenizer, TEXTS, tmp_path)
    before = bank_info(tmp_path)
    with pytest.raises(DataError, match=r"another text by the name 'two'.*another name"):
        memorize_documents(
            make_model(), backbone.tokenizer, [Document("two", "A longer note.")], tmp_path
        )
    assert bank_info(tmp_path) == before


def test_a_model_reads_what_it_memorized_and_what_it_loads_alike(make_model, backbone, tmp_path):
    model = make_model()
    memorize_documents(model, backbone.tokenizer, TEXTS, tmp_path)
    other = make_model()
    other.memory.load(tmp_path)
    ids = backbone.tokenizer("whale", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)


def test_banks_of_another_tokenizer_layer_or_model_are_refused(
    make_model, make_backbone, backbone, tmp_path
):
    memorize_documents(make_model(), backbone.tokenizer, TEXTS[:1], tmp_path)
    from copy import deepcopy

    longer = deepcopy(backbone.tokenizer)
    longer.add_tokens(["whale"])
    assert tokenizer_fingerprint(longer) != tokenizer_fingerprint(backbone.tokenizer)
    with pytest.raises(MemoryFormatError, match=r"has tokenizer='.*', this model's is '"):
        memorize_documents(make_model(), longer, TEXTS[:1], tmp_path)
    with pytest.raises(MemoryFormatError, match=r"identity='\w+ layers \[2\]', .* layers \[1\]'"):
        memorize_documents(make_model(memory_layers=(1,)), backbone.tokenizer, TEXTS[:1], tmp_path)


def test_wrong_settings_are_refused(make_model, backbone, tmp_path):
    with pytest.raises(ConfigError, match="save_every must be at least 1 segment, got 0"):
        memorize_documents(make_model(), backbone.tokenizer, TEXTS, tmp_path, save_every=0)
    with pytest.raises(ConfigError, match="got memory_scope='batch'; use 'row'"):
        memorize_documents(make_model(memory_scope="batch"), backbone.tokenizer, TEXTS, tmp_path)
    model = make_model()
    model.memory.write(torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 4, 8))
    model.memory.save(tmp_path)
    with pytest.raises(MemoryFormatError, match="has 2 rows, documents go into one"):
        memorize_documents(make_model(), backbone.tokenizer, TEXTS, tmp_path)


def test_the_directory_is_locked_while_documents_are_read(make_model, backbone, tmp_path):
    import threading

    refused, told = [], []

    def progress(step):
        told.append(step)

        def write():
            try:
                with bank_lock(tmp_path):
                    pass
            except StorageError as error:
                refused.append(error)

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()

    memorize_documents(make_model(), backbone.tokenizer, TEXTS, tmp_path, progress=progress)
    assert len(refused) == len(told) == 4
