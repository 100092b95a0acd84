"""kNN-LM against its equation, one token at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from memlayer.errors import ConfigError
from memlayer.evaluation import PerplexityOptions, evaluate_perplexity
from memlayer.evaluation.perplexity import _Evaluation
from memlayer.evaluation.scoring import model_losses

if TYPE_CHECKING:
    from memlayer.data import TokenDocument
    from memlayer.model import LongMemModel

LENGTH = 16


def plain_losses(
    model: LongMemModel,
    ids: torch.Tensor,
    *,
    stride: int,
    capacity: int,
    options: PerplexityOptions,
) -> list[float]:
    """Score a document token by token: what each window sees, and every context before it."""
    stored: list[tuple[torch.Tensor, int]] = []
    waiting: list[tuple[torch.Tensor, int]] = []
    losses: list[float] = []
    start = 0
    while len(losses) < len(ids) - 1:
        end = min(start + LENGTH, len(ids) - 1)
        while waiting and len(stored) < start:
            stored.append(waiting.pop(0))
        with torch.no_grad():
            states = model.encode(ids[None, start:end])
            hidden = model.parts.final_norm(states.hidden_states[-1])[0].double()
            chances = torch.softmax(model.backbone_logits(states)[0].double(), dim=1)
        past = stored[-capacity:]
        for place in range(len(losses), end):
            query, target = hidden[place - start], int(ids[place + 1])
            own = float(chances[place - start, target])
            chance = own
            if past:
                distances = torch.stack([(query - key).square().sum() for key, _ in past])
                nearest = distances.topk(min(options.knn_neighbors, len(past)), largest=False)
                votes = torch.softmax(-nearest.values / options.knn_temperature, dim=0)
                agreeing = [past[int(i)][1] == target for i in nearest.indices]
                vote = float(votes[torch.tensor(agreeing)].sum())
                chance = options.knn_weight * vote + (1 - options.knn_weight) * own
            losses.append(-math.log(chance))
            waiting.append((query, target))
        start += stride
    return losses


@pytest.mark.parametrize("stride", [16, 5])
@pytest.mark.parametrize("capacity", [256, 24])
def test_every_loss_is_the_equations(
    stride: int,
    capacity: int,
    model: LongMemModel,
    make_document: Callable[..., TokenDocument],
) -> None:
    # Twice the same text, so that neighbours have something to say.
    document = make_document(45)
    ids = torch.cat([document.input_ids, document.input_ids])
    options = PerplexityOptions(
        knn_lm=True, knn_neighbors=6, knn_weight=0.4, knn_temperature=0.7, memory_sizes=(capacity,)
    )
    evaluation = _Evaluation.plan(model, [document], options, None)
    with torch.inference_mode():
        losses, _ = model_losses(
            model,
            ids,
            memories={},
            nearest=evaluation._nearest(model),
            segment_length=LENGTH,
            stride=stride,
            advance=lambda _: None,
        )
    expected = plain_losses(model, ids, stride=stride, capacity=capacity, options=options)
    assert losses["knn_lm"].tolist() == pytest.approx(expected, rel=2e-4)
    assert not torch.equal(losses["knn_lm"], losses["backbone"])
    assert "knn_memory" not in losses  # there is no memory to mix votes into
    # Nothing votes in the first window.
    assert torch.equal(losses["knn_lm"][:LENGTH], losses["backbone"][:LENGTH])
    if capacity > len(ids):
        assert losses["knn_lm"][60:].mean() < losses["backbone"][60:].mean()


def test_it_is_a_condition_like_the_others(
    model: LongMemModel, make_document: Callable[..., TokenDocument]
) -> None:
    documents = [make_document(60, name="a"), make_document(75, name="b", seed=1)]
    options = PerplexityOptions(knn_lm=True, knn_neighbors=8, stride=8, resamples=50)
    result = evaluate_perplexity(model, documents, options)
    for report in (result.overall, result.fresh):
        assert report is not None
        assert list(report.conditions) == [
            "backbone",
            "no_memory",
            "memory_256",
            "knn_lm",
            "knn_memory",
        ]
        assert report.interval("memory_256", "knn_lm", "documents-t").difference != 0
        assert report.interval("knn_lm", "backbone", "documents-t").difference != 0
        assert report.interval("knn_memory", "memory_256", "documents-t").difference != 0
        assert report.interval("knn_memory", "knn_lm", "documents-t").difference != 0
    assert result.settings["knn_neighbors"] == 8
    alone = evaluate_perplexity(model, documents[1:], options).overall.per_document[0]
    together = result.overall.per_document[1]
    assert alone.perplexity["knn_lm"] == pytest.approx(together.perplexity["knn_lm"], rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"knn_weight": 1.0}, "knn_weight must be between 0 and 1, got 1.0"),
        ({"knn_temperature": 0.0}, "knn_temperature must be above 0, got 0.0"),
        ({"knn_neighbors": 0}, "knn_neighbors must be at least 1, got 0"),
        (
            {"knn_lm": False, "knn_weight": 0.1},
            "knn_temperature belong to knn_lm, got .*0.1, .* wi",
        ),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PerplexityOptions(**({"knn_lm": True} | settings))  # type: ignore[arg-type]


def test_it_needs_a_memory_to_compare_with(
    model: LongMemModel, make_document: Callable[..., TokenDocument]
) -> None:
    options = PerplexityOptions(knn_lm=True, memory_sizes=())
    for subject in (model, model.backbone):
        with pytest.raises(ConfigError, match="knn_lm reads as many contexts as the largest mem"):
            evaluate_perplexity(subject, [make_document(60)], options)


def test_votes_are_mixed_into_the_largest_memory_too(
    model: LongMemModel, make_document: Callable[..., TokenDocument]
) -> None:
    document = make_document(75)
    options = PerplexityOptions(knn_lm=True, knn_neighbors=8, knn_weight=0.3)
    evaluation = _Evaluation.plan(model, [document], options, None)
    nearest = evaluation._nearest(model)
    with torch.inference_mode():
        losses, _ = model_losses(
            model,
            document.input_ids,
            memories={"small": model.new_memory(16), "large": model.new_memory(256)},
            nearest=nearest,
            segment_length=LENGTH,
            stride=LENGTH,
            advance=lambda _: None,
        )
    votes = losses["knn_lm"].neg().exp() - 0.7 * losses["backbone"].neg().exp()
    expected = -(0.7 * losses["large"].neg().exp() + votes).log()
    assert torch.equal(losses["knn_memory"][:LENGTH], losses["large"][:LENGTH])
    torch.testing.assert_close(
        losses["knn_memory"][LENGTH:], expected[LENGTH:], rtol=1e-3, atol=1e-3
    )
