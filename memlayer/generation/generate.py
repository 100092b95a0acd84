"""``generate()`` for a model with memory: Hugging Face's own loop, over windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import GenerationMixin

from memlayer.errors import ConfigError, ShapeError
from memlayer.generation.settings import GenerationSettings, written_tokens
from memlayer.generation.step import new_window

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from memlayer.memory import MemoryBank
    from memlayer.model import LongMemModel


class MemoryGeneration(GenerationMixin):
    """What `LongMemModel` adds to Hugging Face's generation."""

    backbone: PreTrainedModel
    memory: MemoryBank
    generation_config: GenerationConfig

    main_input_name = "input_ids"
    _is_stateful = True
    _memory_on: bool
    _adapter_on: bool
    _generating_rows: int | None

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        update_memory: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Generate as Hugging Face's ``generate`` does, reading memory at every step.

        The local window holds ``segment_length`` tokens. Of a longer text, prompt or generated,
        all but the last window is kept in a scratch memory beside the bank, up to ``memory_size``
        tokens of it, so that time and space per token are bounded. With beams or several returned
        sequences, all of a prompt's sequences read that prompt's row of the bank, and each its own
        past. ``past_key_values`` of an earlier call's output continue it.

        Args:
            inputs: prompts ``(B, T)``, int64, padded on the left.
            generation_config: Hugging Face's.
            args: further arguments of Hugging Face's ``generate``.
            update_memory: memorize each row's prompt and generated text at the end. False: the
                bank is left as it is, and what overflowed the window is forgotten.
            kwargs: further arguments of Hugging Face's ``generate``. ``inputs_embeds`` are not cut
                into windows: they and what is generated have to fit the backbone.

        Raises:
            ShapeError: if the number of prompts is not that of the memory's rows.
            ConfigError: if an argument cannot be served with memory.
        """
        if not self._adapter_on:
            if update_memory:
                raise ConfigError("update_memory=True needs the adapter; it is disabled here")
            plain: Any = self.backbone
            return plain.generate(inputs, generation_config, *args, **kwargs)
        prompts: Tensor | None = inputs if inputs is not None else kwargs.get("input_ids")
        embeds: Tensor | None = kwargs.get("inputs_embeds")
        given = embeds if prompts is None else prompts
        rows = 1 if given is None else len(given)
        self._check_prompts(rows)
        settings = self.generation_config if generation_config is None else generation_config
        options = GenerationSettings.read(settings, kwargs)
        options.check(update_memory=update_memory, ids_given=prompts is not None)
        model = cast("LongMemModel", self)
        if embeds is None and options.use_cache and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = new_window(model, rows)
        self._generating_rows = rows
        hugging_face: Any = super()
        try:
            output = hugging_face.generate(inputs, generation_config, *args, **kwargs)
        finally:
            self._generating_rows = None
        if update_memory and prompts is not None:
            sequences = output if isinstance(output, Tensor) else output.sequences
            model.memorize(
                sequences,
                attention_mask=written_tokens(
                    sequences, prompts, kwargs.get("attention_mask"), options
                ),
            )
        return output

    def _check_prompts(self, rows: int) -> None:
        memory = self.memory
        if self._memory_on and memory.is_readable and not memory.shared and rows != memory.rows:
            raise ShapeError(
                f"the memory holds {memory.rows} rows, got {rows} prompts; give one prompt a row, "
                "or call memory.clear() first"
            )
