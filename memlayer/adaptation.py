"""What a training loop asks of a wrapped model: modes, parameters, and how layers are run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from memlayer.compilation import compile_layers
from memlayer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from memlayer.config import LongMemConfig
    from memlayer.decoders import DecoderParts
    from memlayer.side_network import SideNetwork


class AdaptedModel(nn.Module):
    """A frozen backbone and a side network that trains; the base of `memlayer.LongMemModel`."""

    backbone: PreTrainedModel
    side_network: SideNetwork
    memory_config: LongMemConfig
    parts: DecoderParts

    def train(self, mode: bool = True) -> Self:
        """Set the side network's mode; the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def compile(self, **options: Any) -> None:
        """Compile the layers of backbone and side network in place, for training and scoring.

        Each layer for itself, but for those that memory is written from or read in. With a KV
        cache, that is in `generate`, layers run as before. Results differ by rounding, those of the
        bare backbone too; `unwrap` gives it back as it was.

        Args:
            options: of `torch.compile`.
        """
        compile_layers(self._layers_to_compile(), **options)

    def _layers_to_compile(self) -> Iterator[nn.Module]:
        for inside, layers in (
            (self.memory_config.memory_layers or (), self.parts.layers),
            (self.side_network.readers, self.side_network.in_order),
        ):
            yield from (layer for number, layer in enumerate(layers) if number not in inside)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Train with less memory and more time: side layers run again in the backward pass.

        Memory is searched once all the same. With a KV cache nothing is run again.

        Args:
            gradient_checkpointing_kwargs: Hugging Face's; ``use_reentrant=False`` is what is done.

        Raises:
            ConfigError: if they ask for anything else.
        """
        asked = gradient_checkpointing_kwargs or {}
        if asked not in ({}, {"use_reentrant": False}):
            raise ConfigError(
                f"gradient checkpointing is the one with use_reentrant=False, got {asked}"
            )
        self.side_network.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep all that the backward pass needs, as is the default."""
        self.side_network.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether side layers run again in the backward pass."""
        return self.side_network.gradient_checkpointing

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Go through the side network's parameters."""
        return self.side_network.parameters()

    def parameter_groups(
        self, *, learning_rate: float, gate_learning_rate: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """Sort the trainable parameters for an optimizer; see `SideNetwork.parameter_groups`."""
        return self.side_network.parameter_groups(
            learning_rate=learning_rate,
            gate_learning_rate=gate_learning_rate,
            weight_decay=weight_decay,
        )

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, in PEFT's words."""
        trainable = sum(p.numel() for p in self.trainable_parameters())
        total = trainable + sum(p.numel() for p in self.backbone.parameters())
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )
