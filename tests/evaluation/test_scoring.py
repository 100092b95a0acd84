from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from memlayer.data import TokenDocument
from memlayer.data.windows import windows
from memlayer.errors import ConfigError
from memlayer.evaluation.scoring import FOREIGN, Foreign, backbone_losses, model_losses
from memlayer.memory import MemoryBank
from memlayer.model import LongMemModel

MakeDocument = Callable[..., TokenDocument]
MakeModel = Callable[[PreTrainedModel], LongMemModel]

LENGTH = 16
# Whole windows only, a partial last window, one window in all, and overlaps that do not divide T.
CUTS = [(49, 16), (58, 16), (12, 16), (49, 8), (58, 5)]


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.inference_mode():
        yield


def ignore(tokens: int) -> None:
    """Count nothing."""


def loss_of_last(logits: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, -1].float(), target.view(1))


def token_by_token(backbone: PreTrainedModel, ids: Tensor, length: int, stride: int) -> Tensor:
    """Score each token by a forward of its own, on the context that the definition gives it."""
    losses = []
    for position in range(len(ids) - 1):
        number = 0
        while position >= number * stride + length:
            number += 1
        context = ids[number * stride : position + 1].unsqueeze(0)
        losses.append(loss_of_last(backbone(context).logits, ids[position + 1]))
    return torch.stack(losses)


def score(
    model: LongMemModel, ids: Tensor, stride: int, sizes: tuple[int, ...] = (256,)
) -> dict[str, Tensor]:
    overlap = LENGTH - stride
    memories = {f"memory_{size}": model.new_memory(size, overlap=overlap) for size in sizes}
    losses, _ = model_losses(
        model, ids, memories=memories, segment_length=LENGTH, stride=stride, advance=ignore
    )
    return losses


@pytest.mark.parametrize(("tokens", "stride"), CUTS)
def test_backbone_losses_are_those_of_one_forward_a_token(
    any_backbone: PreTrainedModel, make_document: MakeDocument, tokens: int, stride: int
) -> None:
    backbone = any_backbone.double()
    ids = make_document(tokens).input_ids
    losses = backbone_losses(backbone, ids, segment_length=LENGTH, stride=stride, advance=ignore)
    # Logits in float64; losses are taken in float32.
    expected = token_by_token(backbone, ids, LENGTH, stride)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("tokens", "stride"), CUTS)
def test_the_wrapped_models_backbone_condition_is_the_bare_backbone(
    any_backbone: PreTrainedModel,
    make_model: MakeModel,
    make_document: MakeDocument,
    tokens: int,
    stride: int,
) -> None:
    ids = make_document(tokens).input_ids
    bare = backbone_losses(any_backbone, ids, segment_length=LENGTH, stride=stride, advance=ignore)
    losses = score(make_model(any_backbone), ids, stride)
    torch.testing.assert_close(losses["backbone"], bare)


def test_fresh_segments_are_the_models_own_retrieve_then_append(
    any_backbone: PreTrainedModel, make_model: MakeModel, make_document: MakeDocument
) -> None:
    model = make_model(any_backbone)
    ids = make_document(70).input_ids
    expected = []
    for start in range(0, len(ids) - 1, LENGTH):
        targets = ids[start + 1 : start + LENGTH + 1]
        segment = ids[start : start + len(targets)].unsqueeze(0)
        logits = model(segment, update_memory=True, use_cache=False).logits[0]
        expected.append(functional.cross_entropy(logits, targets, reduction="none"))
    model.memory.clear()
    losses = score(model, ids, stride=LENGTH)
    torch.testing.assert_close(losses["memory_256"], torch.cat(expected))


def test_no_memory_is_the_model_with_its_memory_disabled(
    model: LongMemModel, make_document: MakeDocument
) -> None:
    ids = make_document(17).input_ids
    model.memorize(make_document(40, seed=9).input_ids.unsqueeze(0))
    with model.disable_memory():
        logits = model(ids[:-1].unsqueeze(0), use_cache=False).logits[0]
    expected = functional.cross_entropy(logits, ids[1:], reduction="none")
    torch.testing.assert_close(score(model, ids, stride=LENGTH)["no_memory"], expected)


@pytest.mark.parametrize("stride", [16, 7, 1])
@pytest.mark.parametrize("size", [12, 256])
def test_memory_losses_are_those_of_a_memory_rebuilt_for_every_window(
    model: LongMemModel, make_document: MakeDocument, stride: int, size: int
) -> None:
    ids = make_document(61).input_ids
    keys: dict[int, list[Tensor]] = {}
    values: dict[int, list[Tensor]] = {}
    expected = torch.empty(len(ids) - 1)
    for window in windows(len(ids) - 1, LENGTH, stride):
        memory = model.new_memory(size)
        for position in range(window.start):
            memory.write(keys[position], values[position])
        states = model.encode(ids[window.start : window.end].unsqueeze(0))
        logits = model.read(states, memory)[0]
        for position in range(window.score_from, window.end):
            place = position - window.start
            keys[position] = [key[:, :, place : place + 1] for key in states.keys]
            values[position] = [value[:, :, place : place + 1] for value in states.values]
            expected[position] = loss_of_last(logits[None, : place + 1], ids[position + 1])
    losses = score(model, ids, stride, sizes=(size,))
    torch.testing.assert_close(losses[f"memory_{size}"], expected)


@pytest.mark.parametrize("stride", [16, 7])
@pytest.mark.parametrize("tokens", [61, 20])
def test_a_foreign_memory_holds_as_much_of_another_document(
    model: LongMemModel, make_document: MakeDocument, stride: int, tokens: int
) -> None:
    ids, other = make_document(61).input_ids, make_document(tokens, seed=1).input_ids

    def losses_beside(foreign: Tensor) -> dict[str, Tensor]:
        losses, _ = model_losses(
            model,
            ids,
            memories={"memory_256": model.new_memory(overlap=LENGTH - stride)},
            foreign=Foreign(foreign, model.new_memory(overlap=LENGTH - stride)),
            segment_length=LENGTH,
            stride=stride,
            advance=ignore,
        )
        return losses

    own = losses_beside(ids)
    assert torch.equal(own[FOREIGN], own["memory_256"])
    # Read by the plain definition: each window over the other document's tokens before its start.
    read_again = other.repeat(4)[: len(ids)]
    whole = losses_beside(other)
    pieces: list[tuple[list[Tensor], list[Tensor]]] = []
    expected = torch.empty(len(ids) - 1)
    for window in windows(len(ids) - 1, LENGTH, stride):
        memory = model.new_memory()
        for keys, values in pieces[: window.start]:
            memory.write(keys, values)
        logits = model.read(model.encode(ids[window.start : window.end].unsqueeze(0)), memory)[0]
        states = model.encode(read_again[window.start : window.end].unsqueeze(0))
        for position in range(window.score_from, window.end):
            place = position - window.start
            pieces.append(
                (
                    [key[:, :, place : place + 1] for key in states.keys],
                    [value[:, :, place : place + 1] for value in states.values],
                )
            )
            expected[position] = loss_of_last(logits[None, : place + 1], ids[position + 1])
    torch.testing.assert_close(whole[FOREIGN], expected)
    assert not torch.equal(whole[FOREIGN], whole["memory_256"])


@pytest.mark.parametrize("stride", [16, 7])
def test_memory_makes_a_difference_after_the_first_window_and_none_in_it(
    model: LongMemModel, make_document: MakeDocument, stride: int
) -> None:
    losses = score(model, make_document(61).input_ids, stride)
    differs = losses["memory_256"] != losses["no_memory"]
    assert not differs[:LENGTH].any()
    assert differs[LENGTH:].float().mean() > 0.9


@pytest.mark.parametrize("stride", [16, 11, 4, 1])
def test_memory_holds_what_left_the_window_and_nothing_of_the_window(
    model: LongMemModel,
    make_document: MakeDocument,
    stride: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = []
    read = model.read

    def note(states: Any, memory: MemoryBank | None = None, **arguments: Any) -> Tensor:
        if memory is not None:
            held.append(len(memory))
        return read(states, memory, **arguments)

    monkeypatch.setattr(model, "read", note)
    ids = make_document(61).input_ids
    score(model, ids, stride)
    # The rebuilt memory above fixes which tokens these are.
    assert held == [window.start for window in windows(len(ids) - 1, LENGTH, stride)]


@pytest.mark.parametrize("stride", [16, 6])
@pytest.mark.parametrize("changed", [20, 33, 47, 60])
def test_a_token_changes_no_loss_before_its_own(
    model: LongMemModel, make_document: MakeDocument, stride: int, changed: int
) -> None:
    ids = make_document(61).input_ids
    other = ids.clone()
    other[changed] = (other[changed] + 1) % 97
    before, after = score(model, ids, stride), score(model, other, stride)
    for name, losses in before.items():
        torch.testing.assert_close(losses[: changed - 1], after[name][: changed - 1])
        assert not torch.equal(losses[changed - 1 :], after[name][changed - 1 :])


def test_half_precision_logits_are_scored_in_float32(
    backbone: PreTrainedModel, make_document: MakeDocument
) -> None:
    ids = make_document(20).input_ids
    losses = backbone_losses(
        backbone.bfloat16(), ids, segment_length=LENGTH, stride=LENGTH, advance=ignore
    )
    logits = backbone(ids[:LENGTH].unsqueeze(0)).logits[0].float()
    expected = functional.cross_entropy(logits, ids[1 : LENGTH + 1], reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses[:LENGTH], expected)


@pytest.mark.parametrize("which", ["memories", "foreign"])
def test_a_memory_in_which_a_window_would_find_itself_is_refused(
    model: LongMemModel, make_document: MakeDocument, which: str
) -> None:
    ids = make_document(61).input_ids
    banks = {name: model.new_memory(overlap=10) for name in ("memories", "foreign")}
    banks[which] = model.new_memory()
    message = "windows of 16 tokens every 6 need memories of overlap=10, got 0; make them with"
    with pytest.raises(ConfigError, match=message):
        model_losses(
            model,
            ids,
            memories={"memory_256": banks["memories"]},
            foreign=Foreign(ids, banks["foreign"]),
            segment_length=LENGTH,
            stride=6,
            advance=ignore,
        )


def test_progress_counts_every_token_that_was_read(
    model: LongMemModel, make_document: MakeDocument
) -> None:
    ids = make_document(61).input_ids
    counted: list[int] = []
    model_losses(model, ids, memories={}, segment_length=LENGTH, stride=6, advance=counted.append)
    assert counted == [w.end - w.start for w in windows(len(ids) - 1, LENGTH, 6)]
