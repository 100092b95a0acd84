"""A model for lm-evaluation-harness, whose context beyond the window goes to memory.

    simple_evaluate(model=MemlayerLM(checkpoint="RUN"), tasks=["wikitext"])
    python -m memlayer.integrations.lm_eval run --model memlayer --model_args checkpoint=RUN ...

    request no longer than the window ─► the harness's own path, memory empty
    longer one ─► head ─► memory;  tail in the window ─► side network reads memory ─► score
    rolling    ─► window by window, each read with those before it in memory
    generation ─► `LongMemModel.generate`, which does the same

Every request starts with an empty memory. Written against lm-eval 0.4.13.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from memlayer.devices import choose_device
from memlayer.errors import ConfigError
from memlayer.evaluation.run import load_checkpoint
from memlayer.evaluation.tasks.answering import joined, likelihoods
from memlayer.evaluation.tasks.holding import reading, windowed
from memlayer.memory import BankReader

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        f'lm-evaluation-harness is needed ({error}): pip install "memlayer-lm[lm-eval]"'
    ) from error

if TYPE_CHECKING:
    from torch import Tensor

    from memlayer.model import LongMemModel

Condition = Literal["memory", "no_memory", "backbone"]

Request = tuple[Any, list[int], list[int]]
"""What the harness makes of a request: its texts, tokens of the context and of the continuation."""

ANY_LENGTH = 2**30
"""Tokens of context that are taken with memory: the harness cuts nothing off."""


@register_model("memlayer")
class MemlayerLM(HFLM):  # type: ignore[misc]
    """A checkpoint of memlayer as a model of lm-evaluation-harness.

    Args:
        checkpoint: what `memlayer.load` takes, with the backbone that its configuration names.
            Either this or ``model`` and ``tokenizer``.
        model: a wrapped model.
        tokenizer: its own.
        condition: ``"memory"``; ``"no_memory"``, the side network with its memory off; or
            ``"backbone"``, the adapter disabled, which scores as the backbone itself. Without
            memory a request is cut on the left to the window, as the harness does with any model.
        memory_size: tokens that memory holds; the checkpoint's if None.
        segment_length: tokens of the window; the checkpoint's if None.
        backend: a retrieval backend instead of the checkpoint's.
        dtype: of the backbone.
        device: ``"auto"`` or None is ``"cuda"`` where there is one, else ``"cpu"``.
        batch_size: of requests within the window; longer ones are read one context at a time.
        options: what else `lm_eval.models.huggingface.HFLM` takes.

    Raises:
        ConfigError: if it is not said which model, or an option has a wrong value.
        MemlayerError: of the kind that fits whatever is wrong with the checkpoint.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        *,
        model: LongMemModel | None = None,
        tokenizer: Any = None,
        condition: Condition = "memory",
        memory_size: int | None = None,
        segment_length: int | None = None,
        backend: str | None = None,
        dtype: str = "fp32",
        device: str | None = "auto",
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        if (checkpoint is None) == (model is None) or (model is None) != (tokenizer is None):
            raise ConfigError(
                "give either a checkpoint, or a model and its tokenizer, got "
                f"checkpoint={checkpoint!r}, model {'given' if model is not None else 'None'}, "
                f"tokenizer {'given' if tokenizer is not None else 'None'}"
            )
        if condition not in get_args(Condition):
            raise ConfigError(
                f"condition must be one of {', '.join(get_args(Condition))}, got {condition!r}"
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(
                f"batch_size must be a whole number, at least 1, got {batch_size!r}: the harness "
                "finds a batch size by trying the longest context, and with memory there is none"
            )
        if checkpoint is not None:
            place = {"dtype": dtype, "device": choose_device(device or "auto")}
            model, loaded = load_checkpoint(checkpoint, backend, place)
            tokenizer = loaded.tokenizer
        assert model is not None
        window = segment_length or model.memory_config.segment_length
        super().__init__(
            pretrained=model.backbone,
            tokenizer=tokenizer,
            max_length=ANY_LENGTH if condition == "memory" else window,
            batch_size=int(batch_size),
            **options,
        )
        self._model = model.eval()
        self._condition = condition
        self._window = window
        self._bank = model.new_memory(memory_size)

    # ---------------------------------------------------------------- scores

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        with self._as_asked():
            logits: Tensor = super()._model_call(inps, attn_mask, labels)
        return logits

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Score continuations; give each log-likelihood, and whether greedy decoding writes it."""
        long = {
            number
            for number, (_, context, continuation) in enumerate(requests)
            if len(context) + len(continuation) > self._window + 1
        }
        if self._condition != "memory" or not long:
            whole: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm=disable_tqdm, override_bs=override_bs
            )
            return whole
        short = [request for number, request in enumerate(requests) if number not in long]
        answers = super()._loglikelihood_tokens(short, disable_tqdm, override_bs) if short else []
        found = dict(zip(sorted(set(range(len(requests))) - long), answers, strict=True))
        contexts: dict[tuple[int, ...], list[int]] = {}
        for number in sorted(long):
            contexts.setdefault(tuple(requests[number][1]), []).append(number)
        for context, numbers in contexts.items():
            scores = self._beyond_the_window(
                list(context), [requests[number][2] for number in numbers]
            )
            for number, score in zip(numbers, scores, strict=True):
                found[number] = score
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], score)
        return [found[number] for number in range(len(requests))]

    @torch.no_grad()
    def _beyond_the_window(
        self, context: list[int], continuations: Sequence[list[int]]
    ) -> list[tuple[float, bool]]:
        longest = max(len(continuation) for continuation in continuations)
        if longest >= self._window:
            raise ConfigError(
                f"segment_length must be more than the {longest} tokens of a continuation, got "
                f"{self._window}"
            )
        room = self._window - longest
        self._bank.clear()
        self._remember(context[:-room])
        rows = [torch.tensor(continuation) for continuation in continuations]
        tail = torch.tensor(context[-room:])
        ids, mask = (part.to(self.device) for part in joined(tail, rows))
        kept = torch.arange(len(tail) - 1, len(tail) - 1 + longest, device=self.device)
        logits = self._model.read(
            self._model.encode(ids, mask), BankReader(self._bank, len(rows)), logits_to_keep=kept
        )
        found = likelihoods(logits, rows)
        return list(zip(found.logs.tolist(), found.greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Give the log-likelihood of whole texts, each window read with the windows before it."""
        if self._condition != "memory":
            plain: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
            return plain
        totals = []
        for request in requests:
            (text,) = request.args
            total = self._rolled(self.tok_encode(text))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            totals.append(total)
        return totals

    @torch.no_grad()
    def _rolled(self, tokens: list[int]) -> float:
        self._bank.clear()
        before, total = self.prefix_token_id, 0.0
        for start in range(0, len(tokens), self._window):
            window = tokens[start : start + self._window]
            ids = torch.tensor([[before, *window[:-1]]], device=self.device)
            logits = self._model.read(self._model.encode(ids), BankReader(self._bank))
            total += float(likelihoods(logits, [torch.tensor(window)]).logs)
            before = window[-1]
            self._remember(window)
        return total

    # ---------------------------------------------------------------- text

    def _model_generate(self, context: Tensor, max_length: int, stop: Any, **options: Any) -> Any:
        with self._as_asked():
            return super()._model_generate(context, max_length, stop, **options)

    # ---------------------------------------------------------------- memory

    def _remember(self, tokens: Sequence[int]) -> None:
        with reading(self._model, self._bank):
            ids = torch.tensor([list(tokens)], device=self.device)
            self._model.memorize(ids, keep_text=False)

    @contextmanager
    def _as_asked(self) -> Iterator[None]:
        """Run the model under the condition; with memory: an empty one, not the model's own."""
        if self._condition == "backbone":
            with self._model.disable_adapter():
                yield
        elif self._condition == "no_memory":
            with windowed(self._model, self._window), self._model.disable_memory():
                yield
        else:
            self._bank.clear()
            with windowed(self._model, self._window), reading(self._model, self._bank):
                yield


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
