"""What a condition makes of an item is what the plain forward over its text makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from memlayer.errors import ConfigError, DataError
from memlayer.evaluation.tasks.answering import Answerer
from memlayer.evaluation.tasks.holding import HeldMemory, token_ids
from memlayer.evaluation.tasks.task import Item
from memlayer.model import LongMemModel

if TYPE_CHECKING:
    from memlayer.backbones import Backbone

MEMORY = "long ago a ship called Argo went over the sea and did not come back. "
PROMPT = "the ship was called"
CHOICES = (" Argo", " the Beagle", " Ark")


@pytest.fixture
def answerer(model: LongMemModel, loaded: Backbone) -> Answerer:
    return Answerer(
        model=model,
        tokenizer=loaded.tokenizer,
        window=48,
        memories={
            name: HeldMemory(model, loaded.tokenizer) for name in ("memory", "foreign_memory")
        },
        overflow=HeldMemory(model, loaded.tokenizer),
        dense_context=200,
    )


def item(**changes: object) -> Item:
    content = {
        "id": "1",
        "group": "a",
        "memory": MEMORY,
        "prompt": PROMPT,
        "choices": CHOICES,
        "answers": ("Argo",),
    }
    return Item(**{**content, **changes})  # type: ignore[arg-type]


def plain(logits: Tensor, choice: Tensor) -> float:
    """Give the log-likelihood of the last tokens, which are the choice, from logits ``(T, V)``."""
    before = logits[-len(choice) - 1 : -1].double()
    return -float(functional.cross_entropy(before, choice, reduction="sum"))


def expected(answerer: Answerer, condition: str, prompt: str, *before: str) -> list[float]:
    model = answerer.model
    assert isinstance(model, LongMemModel)
    found = []
    for choice in CHOICES:
        own = token_ids(answerer.tokenizer, choice)
        ids = torch.cat([token_ids(answerer.tokenizer, prompt), own]).unsqueeze(0)
        if condition == "dense":
            ids = torch.cat(
                [token_ids(answerer.tokenizer, "".join(before)).unsqueeze(0), ids], dim=1
            )
        if condition in ("dense", "backbone"):
            logits = model.backbone(ids).logits
        elif condition == "no_memory":
            with model.disable_memory():
                logits = model(ids).logits
        else:
            model.memory.clear()
            for number, text in enumerate(before):
                ids_before = token_ids(answerer.tokenizer, text).unsqueeze(0)
                # Each a document: read by itself.
                model.memorize(ids_before, document=str(number))
            logits = model(ids).logits
            model.memory.clear()
        found.append(plain(logits[0], own))
    return found


@torch.no_grad()
def test_likelihoods_are_those_of_a_plain_forward(answerer: Answerer) -> None:
    other = "quite another text about bread and how it is baked in the north. "
    answerer.memories["memory"].hold(MEMORY)
    answerer.memories["foreign_memory"].hold(other)
    found = answerer.choose(item())
    assert list(found) == ["backbone", "no_memory", "memory", "foreign_memory", "dense"]
    for condition, likelihoods in found.items():
        before = other if condition == "foreign_memory" else MEMORY
        torch.testing.assert_close(
            likelihoods.logs.tolist(),
            expected(answerer, condition, PROMPT, before),
            rtol=0,
            atol=2e-4,
            msg=lambda text, name=condition: f"{name}: {text}",
        )
    assert not torch.allclose(found["memory"].logs, found["foreign_memory"].logs, atol=1e-3)


@torch.no_grad()
def test_what_a_prompt_has_beyond_the_window_is_read_from_memory(answerer: Answerer) -> None:
    long = "there was once a very old man who lived alone in a small house by the sea"
    answerer.memories["memory"].hold(MEMORY)
    found = answerer.choose(item(prompt=long))
    room = answerer.window - len(" the Beagle")
    head, tail = long[:-room], long[-room:]
    for condition, *before in (("memory", MEMORY, head), ("no_memory",), ("backbone",)):
        torch.testing.assert_close(
            found[condition].logs.tolist(),
            expected(answerer, condition, tail, *before),
            rtol=0,
            atol=2e-4,
        )
    # And it does not stay there for the next item.
    again = answerer.choose(item())
    torch.testing.assert_close(
        again["memory"].logs.tolist(),
        expected(answerer, "memory", PROMPT, MEMORY),
        rtol=0,
        atol=2e-4,
    )


@torch.no_grad()
def test_choices_of_one_token_are_scored_in_one_row(answerer: Answerer) -> None:
    answerer.memories["memory"].hold(MEMORY)
    one = answerer.choose(item(choices=("A", "B", "t")))
    # The longer one forces a row for each.
    many = answerer.choose(item(choices=("A", "B", "t", "to")))
    for condition in one:
        torch.testing.assert_close(one[condition].logs, many[condition].logs[:3], rtol=0, atol=2e-4)
        assert one[condition].greedy.tolist() == many[condition].greedy.tolist()[:3]
        assert one[condition].tokens.tolist() == [1, 1, 1]


@torch.no_grad()
def test_a_choice_is_greedy_where_generation_writes_it(answerer: Answerer) -> None:
    answerer.memories["memory"].hold(MEMORY)
    model = answerer.model
    assert isinstance(model, LongMemModel)
    ids = token_ids(answerer.tokenizer, PROMPT).unsqueeze(0)
    with model.disable_memory():
        written = model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
    text = answerer.tokenizer.decode(written)
    if token_ids(answerer.tokenizer, text).tolist() != written.tolist():
        pytest.skip("the random model wrote bytes that are no text")
    found = answerer.choose(item(choices=(text, "zzz")))["no_memory"]
    assert found.greedy.tolist() == [True, False]


@torch.no_grad()
def test_generation_reads_the_held_memory_and_leaves_the_models_own(answerer: Answerer) -> None:
    model = answerer.model
    assert isinstance(model, LongMemModel)
    own = model.memory
    answerer.memories["memory"].hold(MEMORY)
    answerer.memories["foreign_memory"].hold("something else entirely, " * 4)
    texts = answerer.write(item(), 8)
    assert list(texts) == ["backbone", "no_memory", "memory", "foreign_memory", "dense"]
    assert model.memory is own
    model.memory.clear()
    model.memorize(token_ids(answerer.tokenizer, MEMORY).unsqueeze(0))
    ids = token_ids(answerer.tokenizer, PROMPT).unsqueeze(0)
    written = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    expected_text = answerer.tokenizer.decode(written, skip_special_tokens=True)
    assert texts["memory"] == expected_text.split("\n", 1)[0].strip()


@torch.no_grad()
def test_generation_has_the_window_that_was_asked_for(answerer: Answerer) -> None:
    model = answerer.model
    assert isinstance(model, LongMemModel)
    own = model.memory_config
    long = "there was once a very old man who lived alone in a small house by the sea"
    assert len(long) > own.segment_length
    wide = replace(answerer, window=2 * own.segment_length, dense_context=None)
    texts = wide.write(item(prompt=long), 8)
    assert model.memory_config is own
    # A cache of one's own is a window without end.
    ids = token_ids(answerer.tokenizer, long).unsqueeze(0)
    with model.disable_memory():
        whole = model.generate(
            ids,
            max_new_tokens=8,
            do_sample=False,
            past_key_values=DynamicCache(config=model.config),
        )
        cut = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert not torch.equal(whole, cut)
    text = answerer.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert texts["no_memory"] == text.split("\n", 1)[0].strip()


def test_a_choice_that_fills_the_window_is_refused(answerer: Answerer) -> None:
    with pytest.raises(ConfigError, match="more than the 60 tokens of the longest choice of item"):
        answerer.choose(item(choices=("x" * 60, "y")))


def test_an_answer_that_may_fill_the_window_is_refused(answerer: Answerer) -> None:
    with pytest.raises(ConfigError, match="the 48 tokens that an answer may have, got 48"):
        answerer.write(item(), 48)


def test_an_empty_prompt_is_refused(answerer: Answerer) -> None:
    for ask in (answerer.choose, lambda one: answerer.write(one, 4)):
        with pytest.raises(DataError, match="item '1' has an empty prompt"):
            ask(item(prompt=""))


@torch.no_grad()
def test_a_memory_is_carried_on_where_the_text_continues(answerer: Answerer) -> None:
    model = answerer.model
    assert isinstance(model, LongMemModel)
    own, memorized = model.memory, model.memorize
    read: list[int] = []
    # Whole segments, so that the encoder reads the same ones either way.
    first, second = (
        "there is a ship upon the sea and it is the Argo.",
        "no one has seen it for many years, they say here",
    )
    held = answerer.memories["memory"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            model,
            "memorize",
            lambda ids, **rest: (read.append(ids.shape[1]), memorized(ids, **rest))[1],
        )
        held.hold(first)
        held.hold(first + second)
        held.hold(first + second)
        in_pieces = answerer.choose(item())["memory"].logs
        held.hold(second)
        held.hold(first + second)
        whole = answerer.choose(item())["memory"].logs
        held.hold("")
    assert read == [48, 48, 48, 96]
    torch.testing.assert_close(in_pieces, whole, rtol=0, atol=1e-5)
    assert int(held.bank.lengths.sum()) == 0
    assert model.memory is own
