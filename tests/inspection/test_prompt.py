from __future__ import annotations

import json
import math

import pytest
import torch

from memlayer.errors import ConfigError, ShapeError
from memlayer.inspection import (
    InspectionOptions,
    inspect_prompt,
    inspect_tokens,
    record_reads,
)


def ids_of(tokenizer, text):
    return tokenizer(text, return_tensors="pt").input_ids


def test_tokens_are_the_prompts(inspection, prompt):
    assert "".join(token.text for token in inspection.tokens) == prompt
    assert inspection.prompt_tokens == len(prompt)
    assert inspection.summed == (0, len(prompt))


def test_probabilities_are_the_models_own_with_memory_and_without(
    inspection, model, tiny_backbone, prompt
):
    ids = ids_of(tiny_backbone.tokenizer, prompt)
    with torch.no_grad():
        on = torch.softmax(model(input_ids=ids).logits[0], dim=-1)
        with model.disable_memory():
            off = torch.softmax(model(input_ids=ids).logits[0], dim=-1)
    first, *rest = inspection.tokens
    assert (first.with_memory, first.without_memory, first.gain) == (None, None, None)
    for place, token in enumerate(rest):
        assert token.with_memory == pytest.approx(float(on[place, token.id]), rel=1e-4)
        assert token.without_memory == pytest.approx(float(off[place, token.id]), rel=1e-4)
        ratio = token.with_memory / token.without_memory
        assert token.gain == pytest.approx(math.log2(ratio), abs=1e-4)
    assert any(abs(token.gain) > 1e-3 for token in rest)
    assert inspection.gain == pytest.approx(sum(token.gain for token in rest))
    likeliest = inspection.tokens[-1].expected[0]
    assert likeliest.id == int(on[-1].argmax())
    assert likeliest.with_memory == pytest.approx(float(on[-1].max()), rel=1e-4)


def test_reads_are_what_the_memory_retrieves(model, tiny_backbone, prompt):
    options = InspectionOptions(chunks_per_token=100)
    whole = inspect_prompt(model, tiny_backbone.tokenizer, prompt, options)
    with torch.no_grad(), record_reads(model) as records:
        model(ids_of(tiny_backbone.tokenizer, prompt))
    retrieved = records[0].retrieved
    for number, token in enumerate(whole.tokens):
        found = {(item.head, read.chunk): item.score for read in token.reads for item in read.heads}
        expected = {
            (head, chunk): score
            for head in range(2)
            for chunk, score in zip(
                retrieved.ids[0, head, number].tolist(),
                retrieved.scores[0, head, number].tolist(),
                strict=True,
            )
        }
        assert found == pytest.approx(expected)


def test_the_weights_of_all_that_a_token_read_sum_to_one(model, tiny_backbone, prompt):
    options = InspectionOptions(chunks_per_token=100)
    found = inspect_prompt(model, tiny_backbone.tokenizer, prompt, options)
    for token in found.tokens:
        assert sum(read.weight for read in token.reads) == pytest.approx(1)
        assert sum(token.places) == pytest.approx(1)
    assert sum(item.weight for item in found.documents) == pytest.approx(1)
    for head in found.heads:
        assert sum(head.by_distance) == pytest.approx(1)


def test_heads_count_by_their_gates(inspection, model):
    gates = torch.sigmoid(model.side_network.gates[0]).tolist()
    assert [head.gate for head in inspection.heads] == pytest.approx(gates)
    for token in inspection.tokens:
        for read in token.reads:
            parts = [gates[item.head] * item.contribution for item in read.heads]
            assert read.weight == pytest.approx(sum(parts) / sum(gates))


def test_what_few_tokens_read_comes_before_what_all_read(inspection):
    count = len(inspection.tokens)
    salience = [
        passage.weight * math.log((count + 1) / passage.readers) for passage in inspection.passages
    ]
    assert salience == sorted(salience, reverse=True)
    assert salience[0] > 0


def test_the_number_of_kept_things_is_as_asked(model, tiny_backbone, prompt):
    options = InspectionOptions(
        chunks_per_token=2, passages=1, context=3, predictions=1, place_bins=5
    )
    found = inspect_prompt(model, tiny_backbone.tokenizer, prompt, options)
    assert {len(token.reads) for token in found.tokens} == {2}
    assert {len(token.places) for token in found.tokens} == {5}
    assert {len(token.expected) for token in found.tokens} <= {1, 2}
    assert len(found.passages) == 1
    assert all(len(passage.text.encode()) <= 4 + 2 * 3 for passage in found.chunks)


def test_what_is_generated_is_summed_up_alone(model, tiny_backbone, prompt):
    tokenizer = tiny_backbone.tokenizer
    ids = ids_of(tokenizer, prompt)
    found = inspect_tokens(model, tokenizer, ids, prompt_tokens=10)
    # Token 10 was predicted at token 9; what the last token read served nothing yet.
    assert found.summed == (9, len(prompt) - 1)
    assert max(passage.readers for passage in found.passages) <= len(prompt) - 10
    whole = inspect_tokens(model, tokenizer, ids)
    assert found.tokens == whole.tokens
    assert found.documents != whole.documents


def test_an_empty_memory_is_read_by_nobody(make_model, tiny_backbone, prompt):
    found = inspect_prompt(make_model(), tiny_backbone.tokenizer, prompt)
    assert (found.passages, found.documents, found.chunks) == ((), (), ())
    assert found.memory.tokens == 0
    assert found.gain == 0
    assert {head.by_distance for head in found.heads} == {(0.0,)}
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_model_and_its_memory_stay_as_they_were(model, tiny_backbone, prompt):
    model.train()
    before = model.memory.tokens_written(0)
    inspect_prompt(model, tiny_backbone.tokenizer, prompt)
    assert model.training
    assert model.memory.tokens_written(0) == before


def test_to_dict_is_json_with_everything(inspection):
    found = json.loads(json.dumps(inspection.to_dict(), allow_nan=False))
    assert found["gain"] == inspection.gain
    assert found["tokens"][1]["reads"][0]["heads"][0]["score"]
    assert [item["document"] for item in found["documents"]] == [
        item.document for item in inspection.documents
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the prompt is empty"),
        ("x" * 33, "must fit into one window of 32 tokens, got 33; memorize its beginning"),
    ],
)
def test_a_prompt_that_cannot_be_inspected_is_refused(model, tiny_backbone, text, message):
    with pytest.raises(ConfigError, match=message):
        inspect_prompt(model, tiny_backbone.tokenizer, text)


def test_several_rows_are_refused(make_model, tiny_backbone):
    model = make_model()
    model.memorize(torch.arange(40, 60).view(2, 10))
    with pytest.raises(ShapeError, match="must have one row, got 2"):
        inspect_prompt(model, tiny_backbone.tokenizer, "x")
    with pytest.raises(ShapeError, match=r"must have shape \(1, T\), got \(2, 3\)"):
        inspect_tokens(model, tiny_backbone.tokenizer, torch.ones(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("prompt_tokens", [0, 4])
def test_a_prompt_that_ends_outside_the_text_is_refused(model, tiny_backbone, prompt_tokens):
    ids = ids_of(tiny_backbone.tokenizer, "abc")
    with pytest.raises(ConfigError, match="prompt_tokens must be within 1 to the 3 tokens"):
        inspect_tokens(model, tiny_backbone.tokenizer, ids, prompt_tokens=prompt_tokens)


def test_options_below_one_are_refused():
    with pytest.raises(ConfigError, match="context must be at least 1, got 0"):
        InspectionOptions(context=0)
