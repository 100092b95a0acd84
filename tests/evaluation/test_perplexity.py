import json
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from memlayer.data import TokenDocument
from memlayer.data.windows import windows
from memlayer.errors import ConfigError, DataError, ShapeError
from memlayer.evaluation import PerplexityOptions, PerplexityResult, evaluate_perplexity
from memlayer.evaluation.results import recovery
from memlayer.model import LongMemModel

MakeDocument = Callable[..., TokenDocument]
MakeBackbone = Callable[..., PreTrainedModel]
MakeModel = Callable[[PreTrainedModel], LongMemModel]


def options(**changes: object) -> PerplexityOptions:
    return PerplexityOptions(**{"resamples": 200, **changes})


@pytest.fixture
def documents(make_document: MakeDocument) -> list[TokenDocument]:
    lengths = {"a": 61, "b": 12, "c": 90, "d": 40}
    return [
        make_document(length, name=name, seed=seed)
        for seed, (name, length) in enumerate(lengths.items())
    ]


@st.composite
def any_options(draw: st.DrawFn) -> PerplexityOptions:
    length = draw(st.integers(2, 70))
    dense = draw(st.none() | st.integers(length, 100))
    return options(
        segment_length=length,
        stride=draw(st.none() | st.integers(max(1, length // 4), length)),
        memory_sizes=draw(st.lists(st.sampled_from([8, 32, 64, 256]), max_size=2)),
        dense_context=dense,
        dense_stride=None if dense is None else draw(st.none() | st.integers(length // 2, length)),
        fresh=draw(st.booleans()),
    )


@settings(
    max_examples=8,
    deadline=None,
    # The fixtures are made once and stay as they are.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(chosen=any_options())
def test_the_same_tokens_are_scored_whatever_the_options(
    make_backbone: MakeBackbone,
    make_model: MakeModel,
    documents: list[TokenDocument],
    chosen: PerplexityOptions,
) -> None:
    # Without attention, logits depend on the current token alone and no longer on the window: the
    # same perplexity everywhere means the same tokens, in the right places.
    backbone = make_backbone("llama")
    for layer in backbone.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    with torch.inference_mode():
        losses = [
            torch.nn.functional.cross_entropy(
                backbone(document.input_ids[:-1].unsqueeze(0)).logits[0],
                document.input_ids[1:],
                reduction="sum",
            ).item()
            for document in documents
        ]
    tokens = sum(len(document.input_ids) - 1 for document in documents)
    result = evaluate_perplexity(make_model(backbone), documents, chosen)
    assert result.tokens == tokens
    for report in filter(None, (result.overall, result.fresh)):
        assert sum(item.tokens for item in report.by_position) == tokens
        assert [item.tokens for item in report.per_document] == [60, 11, 89, 39]
        for name in {"backbone", "dense"} & report.conditions.keys():
            # Float32 sums in another order.
            assert report.conditions[name].loss == pytest.approx(sum(losses) / tokens, rel=1e-5)
            for item, loss in zip(report.per_document, losses, strict=True):
                assert math.log(item.perplexity[name]) * item.tokens == pytest.approx(
                    loss, rel=1e-5
                )


def test_a_documents_memory_knows_nothing_of_the_document_before(
    model: LongMemModel, documents: list[TokenDocument]
) -> None:
    together = evaluate_perplexity(model, documents, options())
    for document, score in zip(documents, together.overall.per_document, strict=True):
        alone = evaluate_perplexity(model, [document], options()).overall.per_document[0]
        assert alone.perplexity == pytest.approx(score.perplexity)


def test_memory_sizes_are_measured_as_if_each_were_alone(
    model: LongMemModel, documents: list[TokenDocument]
) -> None:
    together = evaluate_perplexity(model, documents, options(memory_sizes=(128, 16, 64, 512)))
    assert list(together.overall.conditions) == [
        "backbone",
        "no_memory",
        "memory_16",
        "memory_64",
        "memory_128",
        "memory_512",
    ]
    for size in (16, 64, 128, 512):
        alone = evaluate_perplexity(model, documents, options(memory_sizes=(size,)))
        name = f"memory_{size}"
        assert alone.overall.conditions[name].loss == pytest.approx(
            together.overall.conditions[name].loss
        )


def test_the_pooled_perplexity_weighs_documents_by_their_tokens(
    model: LongMemModel, documents: list[TokenDocument]
) -> None:
    report = evaluate_perplexity(model, documents, options()).overall
    for name, score in report.conditions.items():
        total = sum(math.log(item.perplexity[name]) * item.tokens for item in report.per_document)
        assert score.loss == pytest.approx(total / 199)
        assert score.perplexity == pytest.approx(math.exp(score.loss))
        # The fixture's documents have four bytes a token.
        assert score.bits_per_byte == pytest.approx(total / math.log(2) / (4 * 203))


def test_places_in_the_window_pool_to_the_whole(
    model: LongMemModel, documents: list[TokenDocument]
) -> None:
    report = evaluate_perplexity(model, documents, options(stride=8, fresh=False)).overall
    assert [(item.start, item.end) for item in report.by_position] == [
        (start, start + 2) for start in range(0, 16, 2)
    ]
    total = sum(
        item.tokens * math.log(item.perplexity["memory_256"] or 1.0) for item in report.by_position
    )
    assert total / 199 == pytest.approx(report.conditions["memory_256"].loss)
    # First windows alone reach the first half: 16 of each document, 11 of the short one.
    assert sum(item.tokens for item in report.by_position[:4]) == 4 * 8


def test_a_place_that_no_token_has_gets_no_perplexity(
    model: LongMemModel, make_document: MakeDocument
) -> None:
    report = evaluate_perplexity(model, [make_document(5)], options()).overall
    assert [item.tokens for item in report.by_position] == [2, 2, 0, 0, 0, 0, 0, 0]
    assert report.by_position[2].perplexity == {
        "backbone": None,
        "no_memory": None,
        "memory_256": None,
    }


def test_an_overlapping_stride_reports_fresh_segments_too_unless_told_not_to(
    model: LongMemModel, documents: list[TokenDocument]
) -> None:
    both = evaluate_perplexity(model, documents, options(stride=8))
    fresh = evaluate_perplexity(model, documents, options())
    only = evaluate_perplexity(model, documents, options(stride=8, fresh=False))
    assert both.overall == only.overall
    assert both.fresh == fresh.overall
    assert (fresh.fresh, only.fresh) == (None, None)
    assert (both.overall.stride, fresh.overall.stride) == (8, 16)
    assert both.perplexity == both.overall.conditions["memory_256"].perplexity


def test_every_condition_is_compared_over_documents_and_over_blocks(
    model: LongMemModel, documents: list[TokenDocument]
) -> None:
    report = evaluate_perplexity(model, documents, options(dense_context=64)).overall
    pairs = {(item.condition, item.against) for item in report.intervals}
    assert pairs == {
        ("memory_256", "no_memory"),
        ("memory_256", "backbone"),
        ("no_memory", "backbone"),
        ("dense", "backbone"),
    }
    for condition, against in pairs:
        losses = [report.conditions[name].loss for name in (condition, against)]
        units = {"documents": 4, "documents-t": 4, "blocks": 5}
        for method, number in units.items():
            interval = report.interval(condition, against, method)
            assert interval.difference == pytest.approx(losses[0] - losses[1], abs=1e-6)
            assert interval.units == number


def test_blocks_are_stretches_of_four_segments_within_a_document(
    model: LongMemModel, make_document: MakeDocument
) -> None:
    documents = [make_document(tokens) for tokens in (257, 65, 66)]
    report = evaluate_perplexity(model, documents, options()).overall
    assert report.interval("memory_256", "no_memory", "blocks").units == 4 + 1 + 2


def test_recovery_is_the_share_of_the_gap_to_dense_context() -> None:
    assert recovery(30.0, 28.0, 20.0) == pytest.approx(0.2)
    assert recovery(30.0, 31.0, 20.0) == pytest.approx(-0.1)
    assert recovery(30.0, 28.0, 30.0) is None
    assert recovery(30.0, 28.0, 31.0) is None


def test_the_result_recovers_against_the_backbones_own_gap(
    model: LongMemModel, documents: list[TokenDocument]
) -> None:
    result = evaluate_perplexity(model, documents, options(dense_context=64, dense_stride=16))
    scores = result.overall.conditions
    local, dense = scores["backbone"].perplexity, scores["dense"].perplexity
    # Random weights: whether context helps is chance, but it is not the same either way.
    assert local != dense
    assert result.recovery == recovery(local, result.perplexity, dense)
    assert scores["backbone"].recovery is None
    assert scores["dense"].recovery is None


def test_without_dense_context_there_is_no_recovery(
    model: LongMemModel, documents: list[TokenDocument]
) -> None:
    assert evaluate_perplexity(model, documents, options()).recovery is None


def test_dense_context_as_long_as_the_documents_is_one_plain_forward(
    backbone: PreTrainedModel, documents: list[TokenDocument]
) -> None:
    chosen = options(segment_length=16, dense_context=128)
    report = evaluate_perplexity(backbone, documents, chosen).overall
    for document, score in zip(documents, report.per_document, strict=True):
        ids = document.input_ids.unsqueeze(0)
        expected = backbone(ids, labels=ids).loss.item()
        assert math.log(score.perplexity["dense"]) == pytest.approx(expected, rel=1e-5)


def test_a_backbone_alone_scores_as_it_does_inside_the_model(
    any_backbone: PreTrainedModel, make_model: MakeModel, documents: list[TokenDocument]
) -> None:
    alone = evaluate_perplexity(any_backbone, documents, options(segment_length=16))
    wrapped = evaluate_perplexity(make_model(any_backbone), documents, options())
    assert alone.perplexity == pytest.approx(wrapped.overall.conditions["backbone"].perplexity)
    assert (alone.headline, alone.backend, alone.memory_tokens) == ("backbone", None, 0)


def test_without_memory_the_headline_is_the_side_network(
    model: LongMemModel, documents: list[TokenDocument]
) -> None:
    result = evaluate_perplexity(model, documents, options(memory_sizes=()))
    assert (result.headline, result.backend, result.memory_tokens) == ("no_memory", None, 0)
    assert list(result.overall.conditions) == ["backbone", "no_memory"]


def test_the_models_own_memory_and_mode_are_left_alone(
    model: LongMemModel, documents: list[TokenDocument], make_document: MakeDocument
) -> None:
    model.memorize(make_document(24, seed=9).input_ids.unsqueeze(0))
    model.train()
    evaluate_perplexity(model, documents, options())
    assert len(model.memory) == 24
    assert model.training
    assert not model.backbone.training


def test_memory_that_is_never_read_is_noted(
    model: LongMemModel, documents: list[TokenDocument], make_document: MakeDocument
) -> None:
    result = evaluate_perplexity(model, documents, options())
    assert [item.memory_tokens_held for item in result.overall.per_document] == [48, 0, 80, 32]
    assert result.notes == (
        "memory is never read in 1 of 4 documents, which fit in one window of 16 tokens: b",
    )
    assert evaluate_perplexity(model, [make_document(40)], options()).notes == ()
    assert evaluate_perplexity(model, documents, options(memory_sizes=())).notes == ()


def test_foreign_memory_is_compared_with_the_own_and_with_none(
    model: LongMemModel, make_document: MakeDocument
) -> None:
    twins = [make_document(61, name=name) for name in "ab"]
    result = evaluate_perplexity(model, twins, options(foreign_memory=True, memory_sizes=(8, 256)))
    conditions = result.overall.conditions
    assert conditions["foreign_memory"].loss == conditions["memory_256"].loss
    assert result.overall.interval("memory_256", "foreign_memory", "documents-t").difference == 0
    against_none = result.overall.interval("foreign_memory", "no_memory", "documents-t")
    assert against_none.difference == pytest.approx(
        conditions["memory_256"].loss - conditions["no_memory"].loss
    )
    different = [make_document(61, name=name, seed=seed) for seed, name in enumerate("ab")]
    result = evaluate_perplexity(model, different, options(foreign_memory=True))
    assert result.overall.interval("memory_256", "foreign_memory", "documents-t").difference != 0


def test_the_json_has_the_same_keys_whatever_was_asked(
    model: LongMemModel, backbone: PreTrainedModel, documents: list[TokenDocument]
) -> None:
    results = [
        evaluate_perplexity(backbone, documents, options(segment_length=16)),
        evaluate_perplexity(model, documents, options(memory_sizes=())),
        evaluate_perplexity(model, documents[1:2], options()),
        evaluate_perplexity(model, documents, options(stride=8, dense_context=64)),
    ]
    parsed = [json.loads(json.dumps(item.to_dict(), allow_nan=False)) for item in results]
    assert len({tuple(item) for item in parsed}) == 1
    assert len({tuple(item["settings"]) for item in parsed}) == 1
    for item, result in zip(parsed, results, strict=True):
        assert item["perplexity"] == result.perplexity
        assert item["conditions"][item["headline"]]["perplexity"] == item["perplexity"]
        assert item["tokens"] == sum(score["tokens"] for score in item["per_document"])
    assert parsed[3]["fresh"]["stride"] == 16
    assert set(parsed[3]["fresh"]) < set(parsed[3])
    assert (parsed[3]["memory_tokens"], parsed[3]["backend"]) == (256, "torch")
    assert parsed[0]["backend"] is None


def test_progress_ends_at_the_tokens_to_read(
    model: LongMemModel, documents: list[TokenDocument]
) -> None:
    seen: list[tuple[int, int]] = []
    evaluate_perplexity(
        model,
        documents,
        options(stride=8, dense_context=64),
        progress=lambda done, total: seen.append((done, total)),
    )
    read = sum(
        window.end - window.start
        for document in documents
        for length, stride in ((16, 8), (16, 16), (64, 16))
        for window in windows(len(document.input_ids) - 1, length, stride)
    )
    assert seen[-1] == (read, read)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def bad(result: Callable[[], PerplexityResult]) -> str:
    with pytest.raises(ConfigError) as caught:
        result()
    return str(caught.value)


def test_sizes_that_do_not_fit_are_refused_with_what_would(
    model: LongMemModel, backbone: PreTrainedModel, documents: list[TokenDocument]
) -> None:
    def message(**changes: object) -> str:
        return bad(lambda: evaluate_perplexity(model, documents, options(**changes)))

    assert message(stride=17) == (
        "stride must be at most segment_length=16, got 17; a larger one would leave tokens out"
    )
    assert message(dense_context=8) == "dense_context must be at least segment_length=16, got 8"
    assert message(dense_stride=8) == "dense_stride needs a dense_context, got dense_stride=8 alone"
    assert message(dense_context=32, dense_stride=33) == (
        "dense_stride must be at most dense_context=32, got 33"
    )
    assert message(memory_sizes=(6,)).startswith("memory_size must be a multiple of chunk_size=4")
    assert message(stride=0) == "stride must be at least 1, got 0"
    assert message(segment_length=1.5) == "segment_length must be a whole number, got 1.5"
    assert message(foreign_memory=True, memory_sizes=()) == (
        "foreign_memory needs a memory and at least two documents, got memory_sizes=[] and 4 "
        "documents; leave it out"
    )
    assert bad(
        lambda: evaluate_perplexity(model, documents[:1], options(foreign_memory=True))
    ).endswith("got memory_sizes=[256] and 1 documents; leave it out")
    assert bad(lambda: evaluate_perplexity(backbone, documents, options(memory_sizes=(64,)))) == (
        "memory_sizes need a model with a side network, got [64] and a backbone alone; evaluate "
        "a checkpoint"
    )


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["model", "backbone"])
def test_learned_positions_limit_segment_and_dense_context(
    make_backbone: MakeBackbone,
    make_model: MakeModel,
    documents: list[TokenDocument],
    family: str,
    wrapped: bool,
) -> None:
    limit = {"gpt2": "n_positions", "opt": "max_position_embeddings"}[family]
    backbone = make_backbone(family, **{limit: 64})
    model = make_model(backbone) if wrapped else backbone

    def message(**changes: object) -> str:
        return bad(lambda: evaluate_perplexity(model, documents, options(**changes)))

    assert message(segment_length=65) == (
        "segment_length must be at most 64, the learned positions of this backbone, got 65"
    )
    assert message(segment_length=16, dense_context=65) == (
        "dense_context must be at most 64, the learned positions of this backbone, got 65"
    )
    result = evaluate_perplexity(model, documents, options(segment_length=64, dense_context=64))
    scores = result.overall.conditions
    assert scores["dense"].loss == pytest.approx(scores["backbone"].loss)


def test_a_document_without_a_token_to_score_is_refused(
    model: LongMemModel, make_document: MakeDocument
) -> None:
    with pytest.raises(DataError, match=r"document 'x' has 1 tokens; at least 2 are needed"):
        evaluate_perplexity(model, [make_document(40), make_document(1, name="x")])
    with pytest.raises(DataError, match="there is no document to evaluate"):
        evaluate_perplexity(model, [])


def test_a_loss_that_is_not_finite_names_condition_document_and_token(
    backbone: PreTrainedModel, documents: list[TokenDocument]
) -> None:
    with torch.no_grad():
        backbone.lm_head.weight.fill_(float("nan"))
    with pytest.raises(
        ShapeError, match=r"condition 'backbone' gives token 1 of document 'a' the loss nan"
    ):
        evaluate_perplexity(backbone, documents, options(segment_length=16))
