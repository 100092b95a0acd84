"""What must hold for every family of decoders, as tests that a plug-in author subclasses."""

from __future__ import annotations

import copy
import tempfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

import memlayer
from memlayer.errors import ConfigError
from memlayer.memory import BankReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from memlayer.model import LongMemModel

ROWS, TOKENS = 2, 24


class DecoderConformance:
    """Subclass it, give a small backbone with random weights, and pytest runs the suite over it.

    class TestMine(DecoderConformance):
        def make_backbone(self):
            return MyModelForCausalLM(MyConfig(num_hidden_layers=4, ...))
    """

    relative_error = 1e-4
    """What two ways to compute the same logits may differ by, of the largest logit."""

    def make_backbone(self) -> PreTrainedModel:
        """Give a small causal-LM model in float32, with at least 4 layers; the same every time.

        Weights of a usual size (0.02) make all logits alike: take larger ones.
        """
        raise NotImplementedError

    # ---------------------------------------------------------------- the backbone stays what it is

    def test_with_the_adapter_disabled_it_is_the_backbone_bit_for_bit(self) -> None:
        """Wrapping changes no number of the backbone."""
        backbone = self._backbone()
        ids = self._ids(backbone)
        with torch.no_grad():
            expected = backbone(input_ids=ids, use_cache=False).logits
            model = self._wrapped(backbone)
            model.memorize(self._ids(backbone, seed=1))
            with model.disable_adapter():
                assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)

    def test_an_untrained_network_without_memory_is_the_backbone(self) -> None:
        """All parts are where they are said to be, the head too."""
        backbone = self._backbone()
        ids = self._ids(backbone)
        model = memlayer.wrap(backbone, _config()).eval()
        with torch.no_grad():
            expected = backbone(input_ids=ids, use_cache=False).logits
            self._close(model.backbone_logits(model.encode(ids)), expected)
            self._close(model(input_ids=ids, use_cache=False).logits, expected)

    # ---------------------------------------------------------------- memory

    def test_what_is_memorized_is_what_a_forward_computes(self) -> None:
        """Reading up to the memory layer gives the keys and values of a whole forward."""
        model = self._wrapped(self._backbone())
        ids = self._ids(model)
        with torch.no_grad():
            states = model.encode(ids)
            by_forward = model.new_memory()
            model.remember(states, by_forward)
            model.memorize(ids)
            query = states.keys[0].repeat_interleave(self._groups(model), dim=1)
            for one, other in zip(
                self._read(model.memory, query), self._read(by_forward, query), strict=True
            ):
                self._close(one, other)
            # Each key finds itself: it is its own best match of those as long as it is.
            heads, found = states.keys[0], self._read(model.memory, query)[0]
            best = found[:, :: self._groups(model)]
            expected = (heads @ heads.transpose(-1, -2)).amax(dim=-1)
            self._close(best, expected)

    def test_keys_do_not_know_their_position(self) -> None:
        """The same token has the same key in the first layer, wherever it stands."""
        backbone = self._backbone()
        model = memlayer.wrap(backbone, _config(memory_layers=(0,))).eval()
        if model.parts.max_positions is not None:
            pytest.skip("learned positions are part of its keys")
        ids = self._ids(model)[:, :1].expand(-1, 6)
        with torch.no_grad():
            states = model.encode(ids)
            if not torch.allclose(
                states.hidden_states[0][:, :1].expand(-1, 6, -1), states.hidden_states[0], atol=1e-6
            ):
                pytest.skip("positions are part of its keys")
            self._close(states.keys[0][:, :, 5], states.keys[0][:, :, 0])

    def test_memory_changes_logits_and_rows_do_not_see_each_other(self) -> None:
        """What one row memorized changes that row alone."""
        model = self._wrapped(self._backbone())
        ids, first = self._ids(model), self._ids(model, seed=1)
        second = torch.stack([first[0], self._ids(model, seed=2)[1]])
        logits = []
        with torch.no_grad():
            without = model(input_ids=ids, use_cache=False).logits
            for past in (first, second):
                model.memory.clear()
                model.memorize(past)
                logits.append(model(input_ids=ids, use_cache=False).logits)
        size = float(without.abs().max())
        assert float((logits[0] - without).abs().max()) > 1e-3 * size
        self._close(logits[0][0], logits[1][0])
        assert float((logits[0][1] - logits[1][1]).abs().max()) > 1e-4 * size

    def test_every_weight_of_the_side_network_gets_a_gradient(self) -> None:
        """A backward pass reaches all of it, the gate too, and nothing of the backbone."""
        model = self._wrapped(self._backbone())
        model.memorize(self._ids(model, seed=1))
        model.train()
        ids = self._ids(model)
        model(input_ids=ids, labels=ids).loss.backward()
        for gate in model.side_network.gates:
            assert gate.grad is not None
            assert bool((gate.grad != 0).any())
        for name, parameter in model.side_network.named_parameters():
            assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name
        reached = [p.grad is not None for p in model.side_network.parameters()]
        assert sum(reached) >= len(reached) / 2
        assert all(parameter.grad is None for parameter in model.backbone.parameters())

    def test_padding_on_the_left_changes_nothing_that_it_does_not_change_in_the_backbone(
        self,
    ) -> None:
        """A padded row is its text, in memory and out, wherever that holds of the backbone."""
        model = self._wrapped(self._backbone())
        ids = self._ids(model)
        padded, mask = ids.clone(), torch.ones_like(ids)
        padded[:, :5], mask[:, :5] = 3, 0
        with torch.no_grad():
            own = model.backbone_logits(model.encode(padded, mask))[:, 5:]
            expected = model.backbone_logits(model.encode(ids[:, 5:]))
            if float((own - expected).abs().max()) > 1e-3 * float(expected.abs().max()):
                pytest.skip("the backbone counts padding as text")
            model.memorize(padded, mask)
            assert len(model.memory) == TOKENS - 5
            by_padded = model(input_ids=padded, attention_mask=mask, use_cache=False).logits[:, 5:]
            model.memory.clear()
            model.memorize(ids[:, 5:])
            self._close(by_padded, model(input_ids=ids[:, 5:], use_cache=False).logits)

    # ---------------------------------------------------------------- generation, files

    def test_one_forward_is_as_many_cached_steps(self) -> None:
        """With memory, over a cache that both networks share."""
        self._check_cached_steps(self._wrapped(self._backbone()))

    def test_one_softmax_over_window_and_memory_gives_as_many_cached_steps(self) -> None:
        """The same with ``fusion="softmax"``, which looks at the layer's own attention."""
        try:
            model = self._wrapped(self._backbone(), fusion="softmax")
            self._check_cached_steps(model)
        except ConfigError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            pytest.skip('no `fusion="softmax"`')

    def _check_cached_steps(self, model: LongMemModel) -> None:
        ids = self._ids(model)[:, :10]
        with torch.no_grad():
            model.memorize(self._ids(model, seed=1))
            whole = model(input_ids=ids, use_cache=False).logits
            output = model(input_ids=ids[:, :4], use_cache=True)
            steps = [output.logits]
            for place in range(4, ids.shape[1]):
                output = model(
                    input_ids=ids[:, place : place + 1], past_key_values=output.past_key_values
                )
                steps.append(output.logits)
            self._close(torch.cat(steps, dim=1), whole)

    def test_generation_writes_what_forwards_would(self) -> None:
        """`generate` is greedy decoding by plain forwards, with memory."""
        model = self._wrapped(self._backbone())
        # Some families' own settings force tokens.
        model.generation_config = GenerationConfig(pad_token_id=0)
        ids = self._ids(model)[:, :6]
        with torch.no_grad():
            model.memorize(self._ids(model, seed=1))
            written = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=5,
                do_sample=False,
                num_beams=1,
            )
            for place in range(6, written.shape[1]):
                logits = model(input_ids=written[:, :place], use_cache=False).logits[:, -1]
                chosen = logits.gather(1, written[:, place : place + 1])[:, 0]
                self._close(chosen, logits.amax(dim=1))
        assert written.shape == (ROWS, 11)

    def test_a_saved_network_answers_as_before(self) -> None:
        """`save_pretrained`, then `load` over the same backbone."""
        model = self._wrapped(self._backbone())
        ids = self._ids(model)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
            model.save_pretrained(folder)
            loaded = memlayer.load(folder, backbone=self._backbone()).eval()
            assert torch.equal(loaded(input_ids=ids, use_cache=False).logits, expected)

    # ---------------------------------------------------------------- parts of the tests

    def _backbone(self) -> PreTrainedModel:
        backbone: PreTrainedModel = self.make_backbone().eval()
        return backbone

    def _wrapped(self, backbone: PreTrainedModel, **changes: object) -> LongMemModel:
        """Give a wrapped model whose side network is no longer the backbone's copy."""
        model = memlayer.wrap(backbone, _config(**changes)).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.trainable_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise.to(parameter) * parameter.std(correction=0))
            for gate in model.side_network.gates:
                gate.fill_(0.5)
        return model

    def _ids(self, model: PreTrainedModel | LongMemModel, seed: int = 0) -> Tensor:
        words: Any = model.get_input_embeddings()
        vocabulary = len(words.weight)
        generator = torch.Generator().manual_seed(seed)
        # The first ids are special tokens in most vocabularies.
        return torch.randint(5, vocabulary, (ROWS, TOKENS), generator=generator)

    def _groups(self, model: LongMemModel) -> int:
        return model.parts.num_attention_heads // model.parts.num_key_value_heads

    def _read(self, bank: memlayer.MemoryBank, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Give the best score of each query, and the values of what it found, best first."""
        found = BankReader(bank).retrieve(queries, layer=0)
        return found.scores[..., 0], found.scores

    def _close(self, actual: Tensor, expected: Tensor) -> None:
        error = float((actual - expected).abs().max())
        allowed = self.relative_error * float(expected.abs().max())
        assert error <= allowed, f"differs by {error:.3g}, more than {allowed:.3g}"


def _config(**changes: object) -> memlayer.LongMemConfig:
    settings: dict[str, object] = {
        "backend": "torch",
        "memory_size": 64,
        "chunk_size": 1,
        "top_k": 4,
        "segment_length": 32,
    }
    return memlayer.LongMemConfig(**copy.deepcopy(settings | changes))  # type: ignore[arg-type]
