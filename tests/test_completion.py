from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import memlayer
from memlayer.completion import GenerationOptions, complete, encode_prompt
from memlayer.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from memlayer.backbones import Backbone
    from memlayer.model import LongMemModel


@pytest.fixture(scope="module")
def backbone(tiny_checkpoint: Callable[[str], Path]) -> Backbone:
    return memlayer.load_backbone(str(tiny_checkpoint("llama")))


@pytest.fixture
def tokenizer(backbone: Backbone) -> PreTrainedTokenizerBase:
    return backbone.tokenizer


@pytest.fixture
def model(backbone: Backbone) -> LongMemModel:
    return memlayer.wrap(backbone.model, memlayer.LongMemConfig(backend="torch"))


class Typist:
    """Stands for a model that always writes the same text, token by token."""

    device = torch.device("cpu")
    generation_config = SimpleNamespace(eos_token_id=None)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self.ids = tokenizer(text, return_tensors="pt").input_ids
        self.typed: list[int] = []

    def generate(self, *, input_ids: Tensor, streamer: Any, **arguments: object) -> Tensor:
        if streamer is not None:
            streamer.put(input_ids)
            for token in self.ids[0]:
                self.typed.append(int(token))
                streamer.put(token.view(1))
            streamer.end()
        return torch.cat([input_ids, self.ids], dim=1)


def test_text_is_given_as_soon_as_a_word_is_whole(tokenizer):
    typist = Typist(tokenizer, "one two\nthree")
    seen = []
    found = complete(
        typist, tokenizer, "count:", on_text=lambda text: seen.append((text, len(typist.typed)))
    )
    assert "".join(text for text, _ in seen) == found.text == "one two\nthree"
    # How many tokens, one a letter, were written when each piece was given.
    assert seen == [("one ", 4), ("two\n", 8), ("three", 13)]


def test_beams_give_their_text_at_the_end_only(tokenizer):
    typist = Typist(tokenizer, "one two")
    seen = []
    complete(typist, tokenizer, "count:", GenerationOptions(num_beams=2), on_text=seen.append)
    assert seen == ["one two"]


def test_what_it_took_is_counted(model, tokenizer):
    found = complete(model, tokenizer, "abc", GenerationOptions(max_new_tokens=5, greedy=True))
    assert (found.prompt_tokens, found.token_ids.shape) == (3, (1, 3 + found.new_tokens))
    assert found.finished == (found.new_tokens < 5)
    assert found.tokens_per_second == pytest.approx(found.new_tokens / found.seconds)
    assert json.loads(json.dumps(found.to_dict()))["new_tokens"] == found.new_tokens


def test_the_end_token_ends_the_text(model, tokenizer):
    first = complete(model, tokenizer, "abc", GenerationOptions(max_new_tokens=1, greedy=True))
    assert not first.finished
    model.generation_config.eos_token_id = [int(first.token_ids[0, -1])]
    try:
        again = complete(model, tokenizer, "abc", GenerationOptions(max_new_tokens=9, greedy=True))
    finally:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert (again.finished, again.new_tokens) == (True, 1)


def test_a_seed_leaves_the_random_state_as_it_was(model, tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    complete(model, tokenizer, "abc", GenerationOptions(max_new_tokens=4, seed=1))
    assert torch.equal(torch.rand(3), expected)


def test_sampling_options_reach_generate(model, tokenizer):
    # With one token to choose from, sampling is greedy.
    options = GenerationOptions(max_new_tokens=8, top_k=1, seed=0)
    drawn = complete(model, tokenizer, "abc", options)
    greedy = complete(model, tokenizer, "abc", GenerationOptions(max_new_tokens=8, greedy=True))
    assert drawn.text == greedy.text


def test_generation_options_as_arguments_of_generate():
    assert GenerationOptions().to_arguments() == {"max_new_tokens": 100, "num_beams": 1}
    greedy = GenerationOptions(greedy=True).to_arguments()
    assert (greedy["do_sample"], greedy["temperature"]) == (False, None)
    sampling = GenerationOptions(temperature=0.5, top_p=0.9).to_arguments()
    assert (sampling["do_sample"], sampling["temperature"], sampling["top_p"]) == (True, 0.5, 0.9)
    assert "top_k" not in sampling


def test_the_chat_template_is_used_when_asked_for(tokenizer):
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    try:
        ids = encode_prompt(tokenizer, "Hello?", chat=True)
    finally:
        tokenizer.chat_template = None
    assert tokenizer.decode(ids[0]) == "<user>Hello?<assistant>"
    assert tokenizer.decode(encode_prompt(tokenizer, "Hello?")[0]) == "Hello?"


def test_prompts_that_cannot_be_used_are_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"the prompt must have some text, got ' '"):
        encode_prompt(tokenizer, " ")
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        encode_prompt(tokenizer, "x", chat=True)
