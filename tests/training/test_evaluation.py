import math

import pytest
import torch
from torch.nn import functional

from memlayer.data import Document, TokenDocument, tokenize_documents
from memlayer.evaluation import PerplexityOptions, evaluate_perplexity
from memlayer.training.evaluation import measure_perplexities, validation_sample


@pytest.fixture
def token_documents(tokenizer):
    texts = ["short", "a longer document, of many tokens", "the longest document of them all, here"]
    return tokenize_documents(
        [Document(id=str(number), text=text) for number, text in enumerate(texts)], tokenizer
    )


def test_the_sample_is_the_beginnings_of_the_longest_documents(token_documents):
    sample = validation_sample(token_documents, tokens=20, count=2)
    assert [len(input_ids) for input_ids in sample] == [11, 11]
    assert torch.equal(sample[0], token_documents[2].input_ids[:11])
    assert torch.equal(sample[1], token_documents[1].input_ids[:11])


def test_documents_without_a_token_to_predict_are_not_sampled(tokenizer):
    documents = tokenize_documents(
        [Document(id="empty", text=""), Document(id="one", text="x")], tokenizer
    )
    assert validation_sample(documents, tokens=20, count=4) == []


def test_the_perplexities_are_those_of_plain_forwards(make_model, token_documents):
    model = make_model("llama", side_init="backbone")
    sample = validation_sample(token_documents, tokens=60, count=2)
    found = measure_perplexities(model, sample)
    totals = dict.fromkeys(("memory_on", "memory_off", "backbone"), 0.0)
    tokens = 0
    model.eval()
    with torch.no_grad():
        for input_ids in sample:
            model.memory.clear()
            for start in range(0, len(input_ids) - 1, 16):
                targets = input_ids[start + 1 : start + 17]
                segment = input_ids[start : start + len(targets)].unsqueeze(0)
                with model.disable_memory():
                    off = model(segment).logits
                with model.disable_adapter():
                    backbone = model(segment).logits
                on = model(segment, update_memory=True).logits
                for name, logits in (
                    ("memory_on", on),
                    ("memory_off", off),
                    ("backbone", backbone),
                ):
                    totals[name] += functional.cross_entropy(
                        logits[0], targets, reduction="sum"
                    ).item()
                tokens += len(targets)
    assert found.tokens == tokens == sum(len(input_ids) - 1 for input_ids in sample)
    for name, total in totals.items():
        assert getattr(found, name) == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert found.memory_on != pytest.approx(found.memory_off, rel=1e-4)


def test_with_a_stride_it_measures_as_the_evaluation_of_a_checkpoint_does(
    make_model, token_documents
):
    model = make_model("llama", side_init="backbone")
    sample = validation_sample(token_documents, tokens=60, count=2)
    found = measure_perplexities(model, sample, stride=6)
    documents = [
        TokenDocument(str(number), input_ids, len(input_ids), len(input_ids))
        for number, input_ids in enumerate(sample)
    ]
    expected = evaluate_perplexity(model, documents, PerplexityOptions(stride=6, fresh=False))
    for name, condition in (
        ("memory_on", "memory_64"),
        ("memory_off", "no_memory"),
        ("backbone", "backbone"),
    ):
        assert getattr(found, name) == pytest.approx(
            expected.overall.conditions[condition].perplexity, rel=1e-5
        )
    assert found.memory_on != pytest.approx(measure_perplexities(model, sample).memory_on, rel=1e-4)


def test_measuring_leaves_memory_and_mode_as_they_were(make_model, token_documents):
    model = make_model().train()
    model.memorize(token_documents[1].input_ids.unsqueeze(0))
    before = model.memory.lengths.tolist()
    measure_perplexities(model, validation_sample(token_documents, tokens=20, count=1))
    assert model.memory.lengths.tolist() == before
    assert model.training
    assert not model.backbone.training


def test_measuring_can_be_stopped_between_segments(make_model, token_documents):
    def stop() -> None:
        raise KeyboardInterrupt

    model = make_model().train()
    with pytest.raises(KeyboardInterrupt):
        measure_perplexities(
            model, validation_sample(token_documents, tokens=20, count=1), after_segment=stop
        )
    assert model.training
