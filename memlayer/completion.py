"""Text from a prompt: how to pick tokens, streaming, and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from memlayer.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from memlayer.model import LongMemModel


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How much to generate, and how to pick tokens.

    With everything at its default, tokens are picked as the model's own generation settings say.

    Raises:
        ConfigError: if a value is out of range, or two contradict each other.
    """

    max_new_tokens: int = 100
    """Tokens to generate at most."""

    greedy: bool = False
    """Take the likeliest token each time."""

    temperature: float | None = None
    """Sample: below 1, likely tokens more often than the model says; above, less often."""

    top_p: float | None = None
    """Sample among the likeliest tokens that together have this probability."""

    top_k: int | None = None
    """Sample among this many of the likeliest tokens."""

    num_beams: int = 1
    """Texts that beam search keeps side by side."""

    seed: int | None = None
    """Of the sampling; None: another text each time."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(
                f"temperature must be above 0, got {self.temperature}; greedy takes the likeliest"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.greedy and self.samples:
            raise ConfigError(
                "greedy and sampling (temperature, top_p, top_k, seed) exclude each other; "
                "give one of them"
            )

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn, whatever the model's own settings are."""
        return any(
            value is not None for value in (self.temperature, self.top_p, self.top_k, self.seed)
        )

    def to_arguments(self) -> dict[str, Any]:
        """Give the arguments of Hugging Face's ``generate``."""
        arguments: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
        }
        if self.samples:
            given = {
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
            }
            arguments |= {name: value for name, value in given.items() if value is not None}
            arguments["do_sample"] = True
        elif self.greedy:
            # The model's own settings of a sampling that does not take place are a warning.
            arguments |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return arguments


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model wrote."""

    text: str
    """What follows the prompt, special tokens left out."""

    prompt_tokens: int
    new_tokens: int
    seconds: float
    """From the prompt's ids to the last token."""

    finished: bool
    """Whether the model ended the text itself, rather than ``max_new_tokens``."""

    token_ids: Tensor = field(repr=False)
    """``(1, prompt_tokens + new_tokens)``, int64, on the CPU."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, the reading of the prompt included."""
        return self.new_tokens / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Give everything but the ids in JSON types."""
        names = ("text", "prompt_tokens", "new_tokens", "seconds", "finished", "tokens_per_second")
        return {name: getattr(self, name) for name in names}


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = False) -> Tensor:
    """Turn a prompt into token ids.

    Args:
        tokenizer: the backbone's.
        prompt: a text to go on with; with ``chat``, what a user says.
        chat: put the prompt into the tokenizer's chat template.

    Returns:
        ``(1, T)``, int64.

    Raises:
        ConfigError: if the prompt is empty, or there is no chat template.
    """
    if not prompt.strip():
        raise ConfigError(f"the prompt must have some text, got {prompt!r}")
    if not chat:
        ids: Tensor = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"]
        return ids.long()
    if not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template; give the prompt without chat")
    talk: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    chat_ids: Tensor = talk["input_ids"]
    return chat_ids.long()


def complete(
    model: LongMemModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    options: GenerationOptions | None = None,
    *,
    chat: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Completion:
    """Let a model go on from a prompt, reading its memory and leaving it as it is.

    Args:
        model: with what it memorized, one row or none.
        tokenizer: the backbone's.
        prompt: see `encode_prompt`.
        options: how to pick tokens; the defaults if None.
        chat: see `encode_prompt`.
        on_text: called with each new piece of text as soon as it is sure. Beam search knows its
            text at the end only, and then calls it once.

    Raises:
        ConfigError: if the prompt cannot be used.
        ShapeError: if the memory has several rows.
    """
    options = GenerationOptions() if options is None else options
    ids = encode_prompt(tokenizer, prompt, chat=chat).to(model.device)
    streamer = None
    if on_text is not None and options.num_beams == 1:
        streamer = _text_streamer(tokenizer, on_text)
    start = time.perf_counter()
    with _seeded(options.seed):
        # All ones, and said so: prompts may hold the token that also pads.
        output = model.generate(
            input_ids=ids,
            attention_mask=ids.new_ones(ids.shape),
            streamer=streamer,
            **options.to_arguments(),
        )
    seconds = time.perf_counter() - start
    new = output[0, ids.shape[1] :].tolist()
    text = str(tokenizer.decode(new, skip_special_tokens=True))
    if on_text is not None and streamer is None:
        on_text(text)
    return Completion(
        text=text,
        prompt_tokens=ids.shape[1],
        new_tokens=len(new),
        seconds=seconds,
        finished=bool(new) and new[-1] in _end_tokens(model),
        token_ids=output[:1].cpu(),
    )


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from a seed inside the block, and as if nothing was drawn after it."""
    import torch

    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _end_tokens(model: LongMemModel) -> tuple[int, ...]:
    end = model.generation_config.eos_token_id
    if end is None:
        return ()
    return (end,) if isinstance(end, int) else tuple(end)


def _text_streamer(tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
