"""A decoder with a long-term memory: `wrap` a backbone, then use it as before.

encode    one pass of the frozen backbone                  -> BackboneStates
read      the side network over those states and a memory  -> logits
remember  the states' keys and values                      -> memory
forward = encode, read and, if asked, remember
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from memlayer import checkpoint
from memlayer.adaptation import AdaptedModel
from memlayer.capture import BackboneStates, run_backbone
from memlayer.compilation import refuse_compiled, release_layers
from memlayer.config import LongMemConfig
from memlayer.discovery import parts_of
from memlayer.dispatch import execution_device
from memlayer.errors import BackendUnavailableError, ConfigError, UnsupportedModelError
from memlayer.fingerprint import fingerprint
from memlayer.generation import MemoryGeneration, WindowCache, advance, new_window
from memlayer.head import logits_of
from memlayer.ingestion import memorize_stream
from memlayer.inputs import decoder_inputs
from memlayer.kv_cache import with_side_layers
from memlayer.local_attention import other_attention
from memlayer.memory import BankReader, MemoryBank, MemoryReader
from memlayer.memory.identity import bank_identity
from memlayer.plugins import Plugins, default_plugins
from memlayer.side_network import SideNetwork

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from memlayer.retrieval import RetrievalBackend


class LongMemModel(AdaptedModel, MemoryGeneration):
    """A frozen backbone, a side network that reads memory, and the memory.

    Made by `wrap` or `load`. Whatever this class does not define is the backbone's (``config``,
    ``dtype``, ``get_input_embeddings``, ...). Memory changes only in `memorize`, in a forward with
    ``update_memory`` and by its own methods. One forward at a time may run on one backbone.

    Attributes:
        backbone: the Hugging Face model: frozen, in eval mode, otherwise as it was.
        side_network: the only trainable part.
        memory: what was memorized, one row per batch row.
        memory_config: the settings, ``memory_layers`` filled in.
    """

    memory: MemoryBank

    def __init__(
        self, backbone: PreTrainedModel, config: LongMemConfig, plugins: Plugins | None = None
    ) -> None:
        super().__init__()
        plugins = default_plugins() if plugins is None else plugins
        self._make_backend = _backend_maker(plugins, config)
        self.parts = parts_of(backbone, plugins)
        if config.memory_distance is not None and self.parts.rotary is None:
            raise ConfigError(
                "memory_distance needs a backbone with rotary positions that turn as LLaMA's, got "
                f"{backbone.config.model_type}; leave memory_distance at None"
            )
        if config.fusion == "softmax":
            decoder_config: Any = self.parts.decoder.config
            if decoder_config._attn_implementation != "sdpa":
                raise other_attention(decoder_config)
        # A wrong backend option is the user's mistake now, not at the first write.
        self._make_backend(1, self.parts.head_dim, execution_device(backbone))
        self.memory_config = config.for_depth(len(self.parts.layers))
        self.side_network = SideNetwork(self.parts, self.memory_config)
        # Nothing can be refused from here on: a backbone that is refused stays as it was.
        self._was = [(module, module.training) for module in backbone.modules()]
        self._required_grad = [(p, p.requires_grad) for p in backbone.parameters()]
        self.backbone = backbone.requires_grad_(False)
        self.train(backbone.training)
        if not torch.finfo(next(backbone.parameters()).dtype).bits > 32:
            self.side_network.float()
        self.generation_config = backbone.generation_config
        self._kept_identity: str | None = None
        self.memory = self.new_memory()
        self._memory_on = True
        self._adapter_on = True
        self._generating_rows: int | None = None

    def __getattr__(self, name: str) -> Any:
        """Give what only the backbone has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "backbone":
                raise
            return getattr(super().__getattr__("backbone"), name)

    @property
    def device(self) -> torch.device:
        """Where inputs are taken and outputs given; a backbone may lie on others, too."""
        spread = hasattr(self.backbone, "hf_device_map")
        return execution_device(self.backbone) if spread else self.backbone.device

    @property
    def _memory_layers(self) -> tuple[int, ...]:
        return self.memory_config.memory_layers or ()

    # ---------------------------------------------------------------- the three steps

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
    ) -> BackboneStates:
        """Run the frozen backbone once, without its head; no gradient is kept.

        Args:
            input_ids: ``(B, T)``, int64.
            attention_mask: ``(B, past + T)``, 0 for padding, on either side.
            position_ids: ``(B, T)``; counted from the mask if there is padding and none are given.
            past_key_values: the cache of earlier calls; extended in place.
            inputs_embeds: ``(B, T, E)`` instead of ``input_ids``.
            use_cache: make a cache if none is given.

        Raises:
            ConfigError: if learned positions would run out.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        inputs, mask = decoder_inputs(
            self.parts,
            input_ids,
            attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
        )
        if past_key_values is not None:
            with_side_layers(past_key_values, self.side_network.sources, len(self.parts.layers))
        states = run_backbone(
            self.parts,
            outputs_of=self.side_network.outputs,
            calls_of=self.side_network.sources,
            memory_layers=self._memory_layers,
            **inputs,
        )
        states.attention_mask, states.past_key_values = mask, past_key_values
        return states

    def read(
        self,
        states: BackboneStates,
        memory: MemoryBank | MemoryReader | None = None,
        *,
        expand: int = 1,
        logits_to_keep: int | Tensor = 0,
    ) -> Tensor:
        """Run the side network over one backbone pass.

        Args:
            states: what `encode` gave.
            memory: what to read; None, or a memory with nothing in it, means local context only.
            expand: consecutive batch rows that share one row of a bank.
            logits_to_keep: how many last positions to give logits for (0: all), or which.

        Returns:
            Logits ``(B, T, V)``, of fewer positions if so asked.
        """
        reader = BankReader(memory, expand) if isinstance(memory, MemoryBank) else memory
        hidden = self.side_network(states, reader)
        return self._head(_keep(hidden, logits_to_keep))

    def backbone_logits(self, states: BackboneStates, logits_to_keep: int | Tensor = 0) -> Tensor:
        """Give the frozen backbone's own logits of the same pass: ``(B, T, V)``."""
        hidden = _keep(states.hidden_states[-1], logits_to_keep)
        return self._head(self.parts.final_norm(hidden))

    def remember(
        self,
        states: BackboneStates,
        memory: MemoryBank | None = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        """Append one backbone pass's keys and values to a memory (the model's own if None).

        Args:
            states: what `encode` gave.
            memory: to append to.
            mask: ``(B, T)``, 0 for tokens to leave out. Padding is left out anyway.
        """
        bank = self.memory if memory is None else memory
        kept = states.attention_mask
        if mask is not None:
            kept = mask if kept is None else mask.bool() & kept.bool()
        bank.write(states.keys, states.values, kept)

    def _head(self, hidden: Tensor) -> Tensor:
        return logits_of(self.backbone, self.parts, hidden)

    # ---------------------------------------------------------------- use

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        update_memory: bool | Tensor = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Predict the next tokens, reading memory; the arguments are Hugging Face's.

        Args:
            input_ids: ``(B, T)``, int64.
            attention_mask: ``(B, past + T)``, 0 for padding. Padding is never memorized.
            position_ids: ``(B, T)``, int64. A cache made by `generate` counts them itself.
            past_key_values: a `DynamicCache`, to hold the backbone's and the side network's layers,
                or the cache that `generate` returned, whose oldest tokens go to memory.
            inputs_embeds: ``(B, T, E)`` instead of ``input_ids``.
            labels: ``(B, T)``, int64; shifted inside, -100 is not scored.
            use_cache: return a cache; as the backbone's config says if None and not training.
            logits_to_keep: how many last positions to give logits for (0: all), or which.
            update_memory: after reading, append this segment to memory, or those of its tokens
                that a mask ``(B, T)`` has 1 for; padding never. A backward pass may still follow,
                but before the next update.
            return_dict: False for a tuple.
            kwargs: passed to the backbone while the adapter is disabled; else refused.

        Raises:
            ShapeError: if the batch is not the one that was memorized.
            ConfigError: if an argument is not supported.
        """
        if not self._adapter_on:
            return self._plain_backbone(
                update_memory,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                return_dict=return_dict,
                **kwargs,
            )
        _refuse_unsupported(kwargs)
        if use_cache is None:
            use_cache = past_key_values is not None or (
                not self.training and bool(self.config.use_cache)
            )
        memory = self.memory if self._memory_on else None
        cache = past_key_values
        if cache is None and self._generating_rows is not None and inputs_embeds is None:
            # generate(use_cache=False): every step is a forward over all of the text.
            past_key_values = new_window(self, self._generating_rows)
        if isinstance(past_key_values, WindowCache):
            if input_ids is None:
                raise ConfigError("input_ids must be given with the cache that generate() makes")
            _refuse_in_window(labels=labels, update_memory=update_memory)
            states, reader = advance(
                self, past_key_values, input_ids, attention_mask, memory, logits_to_keep
            )
        else:
            states = self.encode(
                input_ids,
                attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
            )
            batch = states.hidden_states[0].shape[0]
            expand = 1 if self._generating_rows is None else batch // self._generating_rows
            reader = None if memory is None else BankReader(memory, expand)
            cache = states.past_key_values
        logits = self.read(states, reader, logits_to_keep=logits_to_keep)
        mask = update_memory if isinstance(update_memory, Tensor) else None
        if mask is not None or update_memory:
            self.remember(states, mask=mask)
        loss = None
        if labels is not None:
            loss = self.backbone.loss_function(logits, labels, vocab_size=logits.shape[-1])
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def memorize(
        self,
        input_ids: Tensor | Iterable[Tensor],
        attention_mask: Tensor | Iterable[Tensor] | None = None,
        *,
        document: str | Sequence[str | None] | None = None,
        keep_text: bool = True,
    ) -> None:
        """Append text to each row's memory.

        The text is read in segments of ``segment_length``, the backbone running only up to the
        last memory layer. A row's text may come in any pieces, in one call or many: the memory is
        the same, to rounding. For that the memory keeps the token ids of each row's open segment,
        and a call computes again (but does not write again) the beginning of the segment that the
        call before left open: at most ``segment_length - 1`` tokens a row.

        Args:
            input_ids: ``(B, T)``, int64, any length; or pieces of that form of one batch, taken
                from an iterable one at a time, of which no more than a segment waits.
            attention_mask: ``(B, T)``, 0 for padding, on either side; or one a piece.
            document: the name of what is read, or one per row. A name other than that of the
                row's present document begins a document and a segment, its offsets counted from 0;
                the same name, or None, continues. A row that was given no name reads a document
                without one.
            keep_text: whether token ids are kept beside the keys, so that what is retrieved can be
                shown as text. Documents and offsets always are, and the open segment's ids.

        Raises:
            ShapeError: if the shapes do not fit, or not the rows that memory already holds.
            ConfigError: if there is not one document a row, or a name is empty.
        """
        memorize_stream(self, input_ids, attention_mask, document=document, keep_text=keep_text)

    def disable_memory(self) -> AbstractContextManager[None]:
        """Run the side network without memory inside the block."""
        return self._without("_memory_on")

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Run exactly the backbone inside the block."""
        return self._without("_adapter_on")

    @contextmanager
    def _without(self, switch: str) -> Iterator[None]:
        before = getattr(self, switch)
        setattr(self, switch, False)
        try:
            yield
        finally:
            setattr(self, switch, before)

    def unwrap(self) -> PreTrainedModel:
        """Give the backbone back as it was before `wrap`; this model is not to be used after.

        Of a `PeftModel` it is the model inside, with the adapter's layers in it.
        """
        release_layers(self.parts.layers)
        for parameter, required in self._required_grad:
            parameter.requires_grad_(required)
        for module, training in self._was:
            module.training = training
        return self.backbone

    def new_memory(self, memory_size: int | None = None, *, overlap: int = 0) -> MemoryBank:
        """Make an empty memory for this model.

        Args:
            memory_size: tokens per row, if not as configured.
            overlap: newest tokens of a row that are kept but not found, for windows that overlap.
        """
        config = self.memory_config
        if memory_size is not None:
            config = replace(config, memory_size=memory_size)
        return MemoryBank(
            capacity=config.memory_size,
            chunk_size=config.chunk_size,
            top_k=config.top_k,
            num_layers=len(self._memory_layers),
            num_key_value_heads=self.parts.num_key_value_heads,
            head_dim=self.parts.head_dim,
            make_index=lambda lanes: self.new_index(lanes, self.parts.head_dim),
            dtype=self.backbone.dtype,
            device=self.device,
            storage=config.memory_storage,
            shared=config.memory_scope == "batch",
            slack=config.segment_length,
            overlap=overlap,
            identity=self._kept_identity or self._identity(),
        )

    def keep_identity(self) -> None:
        """Take what memories are of from now, as the backbone will not change.

        For a backbone that is about to be put into pieces: to look at it would gather them.
        """
        self._kept_identity = self._identity()

    def _identity(self) -> str:
        return bank_identity(fingerprint(self.backbone), self._memory_layers)

    def new_index(self, lanes: int, dim: int) -> RetrievalBackend:
        """Make an empty index of this model's backend, for vectors of any kind.

        Args:
            lanes: independent sets of vectors.
            dim: length of every vector.
        """
        return self._make_backend(lanes, dim, self.device)

    # ---------------------------------------------------------------- moving, saving

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # Every way to another device or dtype comes through here; the memory has to go along.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if (self.memory.device, self.memory.dtype) != (self.device, self.backbone.dtype):
            if len(self.memory):
                raise ConfigError(
                    f"the memory holds {len(self.memory)} tokens as {self.memory.dtype} on "
                    f"{self.memory.device}, the model is now {self.backbone.dtype} on "
                    f"{self.device}; move the model before it memorizes, or call memory.clear()"
                )
            self.memory = self.new_memory()
        return self

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        is_main_process: bool = True,
    ) -> None:
        """Write the side network: adapter_config.json, adapter_model.safetensors, README.md.

        Args:
            directory: made if need be.
            dtype: of the matrices on disk, also ``"bf16"`` and the like, or ``"int8"`` for 8 bits
                and a scale a row; norms, biases, gates and slopes stay as they are. None: all
                as they are. `load` gives float32 again.
            is_main_process: whether to write. Where processes hold a model in pieces, all of them
                call this, and one writes.

        Raises:
            ConfigError: if the dtype is unknown.
        """
        checkpoint.save_adapter(self, Path(directory), dtype=dtype, write=is_main_process)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face Hub.

        Returns:
            The address of the commit.
        """
        return checkpoint.push_adapter(self, repo_id, private=private, token=token)

    # ---------------------------------------------------------------- parts

    def _plain_backbone(
        self, update_memory: bool | Tensor, **arguments: Any
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        if isinstance(update_memory, Tensor) or update_memory:
            raise ConfigError("update_memory=True needs the adapter; it is disabled here")
        given = {name: value for name, value in arguments.items() if value is not None}
        output: CausalLMOutputWithPast | tuple[Any, ...] = self.backbone(**given)
        return output


def wrap(
    backbone: PreTrainedModel,
    config: LongMemConfig | None = None,
    *,
    plugins: Plugins | None = None,
) -> LongMemModel:
    """Give a Hugging Face decoder a long-term memory.

    The backbone is frozen and put in eval mode, and otherwise left alone; `LongMemModel.unwrap`
    undoes that. The side network is in the mode that the backbone was in.

    Args:
        backbone: a causal-LM model. It may be quantized, or carry a PEFT adapter (a `PeftModel`, or
            one that was injected), which stays frozen; side layers start from what both compute.
        config: settings; the defaults if None.
        plugins: where backends and adapters come from; what is installed if None.

    Raises:
        UnsupportedModelError: if no adapter describes the backbone and its parts cannot be found,
            it lacks what is needed, or it is compiled.
        UnknownNameError: if there is no such backend.
        BackendUnavailableError: if the backend's package or device is missing.
        ConfigError: if a setting does not fit the backbone.
    """
    refuse_compiled(backbone)
    return LongMemModel(_base(backbone), LongMemConfig() if config is None else config, plugins)


def _base(backbone: Any) -> PreTrainedModel:
    """Give the model that a `PeftModel` has put its layers into."""
    if not hasattr(backbone, "get_base_model"):
        return cast("PreTrainedModel", backbone)
    settings = backbone.active_peft_config
    if settings.is_prompt_learning:
        raise UnsupportedModelError(
            f"the backbone's adapter is {settings.peft_type.value}, which puts a prompt before the "
            "text and so is no part of the model itself; give a model without it"
        )
    return cast("PreTrainedModel", backbone.get_base_model())


def _backend_maker(
    plugins: Plugins, config: LongMemConfig
) -> Callable[[int, int, torch.device], RetrievalBackend]:
    backend: Any = plugins.backends.get(config.backend)
    options = dict(config.backend_options)
    reason = plugins.backends.unavailable_reason(config.backend)
    if reason is not None:
        raise BackendUnavailableError(f"backend {config.backend!r} cannot run here: {reason}")

    def make(lanes: int, dim: int, device: torch.device) -> RetrievalBackend:
        made: RetrievalBackend = backend(lanes=lanes, dim=dim, device=device, **options)
        return made

    return make


def _refuse_unsupported(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise ConfigError(
                f"argument {name}={value!r} is not supported with memory; use disable_adapter() "
                "for the backbone's own"
            )


def _refuse_in_window(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise ConfigError(
                f"{name} is not supported with the cache that generate() makes; pass a "
                "DynamicCache, or none"
            )


def _keep(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    return hidden[:, logits_to_keep]
