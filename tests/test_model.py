"""The wrapped model: what it promises, on tiny models of real Hugging Face classes."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import memlayer
from memlayer.errors import ConfigError, ShapeError, UnknownNameError, UnsupportedModelError

FAMILIES = ("gpt2", "opt", "opt-350m", "llama", "mistral", "qwen2", "qwen3", "smollm3")
SMALL = {"backend": "torch", "memory_size": 64, "top_k": 16, "segment_length": 16}


def wrap(backbone, **settings):
    return memlayer.wrap(backbone, memlayer.LongMemConfig(**(SMALL | settings))).eval()


def trained(model):
    """Move the side network away from its start, gates open, as training would."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.side_network.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data += 0.1 * noise
    if model.side_network.scales is not None:
        model.side_network.scales.data += 0.6
    for gate in model.side_network.gates:
        gate.data += 0.5
    return model


@pytest.fixture(params=FAMILIES)
def backbone(request, make_backbone):
    return make_backbone(request.param)


@pytest.fixture
def llama(make_backbone):
    return make_backbone("llama")


# -------------------------------------------------------------------- the backbone


@torch.no_grad()
def test_with_the_adapter_disabled_logits_are_the_backbones_bit_for_bit(backbone, make_tokens):
    ids, labels = make_tokens(2, 23), make_tokens(2, 23, seed=1)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    expected = backbone(input_ids=ids, attention_mask=mask, labels=labels)
    model = trained(wrap(backbone))
    model.memorize(make_tokens(2, 40, seed=2))
    with model.disable_adapter():
        got = model(input_ids=ids, attention_mask=mask, labels=labels)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.loss, expected.loss)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side_init", ["replace", "identity"])
def test_an_untrained_side_network_with_empty_memory_is_the_backbone(
    side_init, family, attention, make_backbone, make_tokens
):
    backbone = make_backbone(family, attention=attention)
    ids = make_tokens(2, 40)
    expected = backbone(ids).logits
    got = wrap(backbone, side_init=side_init)(ids).logits
    # Sums of residuals in another order.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("memory_layer", [1, 2, 4])
@pytest.mark.parametrize("side_init", ["replace", "identity"])
def test_a_depth_that_the_reduction_factor_does_not_divide_is_covered_whole(
    side_init, memory_layer, make_backbone, make_tokens
):
    backbone = make_backbone("llama", num_hidden_layers=5)
    model = wrap(backbone, side_init=side_init, memory_layers=(memory_layer,))
    assert model.side_network.boundaries == (1, 3, 4)
    ids = make_tokens(1, 20)
    torch.testing.assert_close(model(ids).logits, backbone(ids).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_side_layer_with_its_layers_weights_does_what_that_layer_does_to_changed_states(
    make_backbone, make_tokens
):
    # Every layer has a copy in its place, so a change of one runs through all others as it would
    # in the backbone.
    backbone, changed = make_backbone("llama"), make_backbone("llama")
    ids = make_tokens(1, 20)
    model = wrap(backbone, layer_reduction_factor=1)
    for layer in (model.side_network.layers[1], changed.model.layers[1]):
        for weight in layer.parameters():
            weight.mul_(1.5)
    got, expected = model(ids).logits, changed(ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(got, backbone(ids).logits, atol=1e-2)


def test_unwrapping_leaves_the_backbone_as_it_was(backbone, make_tokens):
    backbone.train()
    next(backbone.parameters()).requires_grad_(False)
    state = copy.deepcopy(backbone.state_dict())
    required = [p.requires_grad for p in backbone.parameters()]
    model = wrap(backbone)
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert not backbone.training
    model.train()
    assert not any(module.training for module in backbone.modules())
    ids = make_tokens(2, 20)
    model(ids, labels=ids, update_memory=True).loss.backward()
    model.memorize(ids)
    assert model.unwrap() is backbone
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())
    assert [p.requires_grad for p in backbone.parameters()] == required
    assert all(module.training for module in backbone.modules())
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in backbone.modules()]
    assert not any(hooks)


def test_a_backbone_that_is_refused_stays_as_it_was(llama):
    llama.train()
    with pytest.raises(ConfigError):
        wrap(llama, memory_layers=(2, 3))
    assert llama.training
    assert all(p.requires_grad for p in llama.parameters())


@pytest.mark.parametrize("mode", [True, False])
def test_the_side_network_starts_in_the_mode_that_the_backbone_was_in(mode, llama):
    model = memlayer.wrap(llama.train(mode), memlayer.LongMemConfig(**SMALL))
    assert {module.training for module in model.side_network.modules()} == {mode}
    assert not any(module.training for module in llama.modules())


def test_only_the_side_network_gets_gradients(backbone, make_tokens):
    model = trained(wrap(backbone)).train()
    model.memorize(make_tokens(2, 40, seed=1))
    ids = make_tokens(2, 20)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    missing = [n for n, p in model.side_network.named_parameters() if p.grad is None]
    assert missing == []
    assert all((gate.grad != 0).all() for gate in model.side_network.gates)


def test_the_side_network_shares_no_weights_with_the_backbone(backbone):
    model = wrap(backbone)
    own = {p.data_ptr() for p in model.side_network.parameters()}
    assert not own & {p.data_ptr() for p in backbone.parameters()}
    assert own == {p.data_ptr() for p in model.trainable_parameters()}


def test_the_layer_that_reads_starts_as_the_layer_that_wrote(llama):
    model = wrap(llama, memory_layers=(2,), side_init="backbone")
    side = model.side_network
    assert (side.readers, side.sources, side.boundaries) == ((1,), (1, 2), (1, 3))
    for name, weight in side.layers[1].named_parameters():
        assert torch.equal(weight, llama.model.layers[2].get_parameter(name))
    for name, weight in side.layers[0].named_parameters():
        assert torch.equal(weight, llama.model.layers[1].get_parameter(name))
    assert side.scales is None


@torch.no_grad()
def test_side_layers_are_called_as_the_layer_that_they_copy(make_backbone, make_tokens):
    # Layer 2 slides over 8 tokens, layer 3 does not: their masks differ.
    backbone = make_backbone(
        "qwen2",
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["full_attention", "full_attention", "sliding_attention", "full_attention"],
    )
    model = trained(wrap(backbone, memory_layers=(2,), side_init="backbone"))
    # Only attention and what is after it may mix tokens: with one layer's weights, token 0 reaches
    # token 20 through the sliding layer never.
    states = model.encode(make_tokens(1, 24))
    layer, call = model.side_network.layers[1], states.calls[1]
    hidden = states.hidden_states[1]
    changed = hidden.clone()
    changed[:, 0] += 1
    first, second = (layer(h, *call.args, **call.kwargs) for h in (hidden, changed))
    assert torch.equal(first[:, 20], second[:, 20])
    assert not torch.equal(first[:, 4], second[:, 4])


# -------------------------------------------------------------------- memory


@torch.no_grad()
def test_memory_changes_only_when_asked(backbone, make_tokens):
    model = trained(wrap(backbone))
    ids = make_tokens(2, 20)
    model(ids)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
    assert len(model.memory) == 0
    model(ids, update_memory=True)
    assert model.memory.lengths.tolist() == [20, 20]
    with model.disable_memory():
        model(ids)
    assert len(model.memory) == 20


@torch.no_grad()
def test_a_segment_never_retrieves_itself(backbone, make_tokens):
    model = trained(wrap(backbone))
    ids = make_tokens(2, 20)
    without = model(ids).logits
    # Memory is empty when the segment is read, and holds it afterwards.
    assert torch.equal(model(ids, update_memory=True).logits, without)
    assert not torch.allclose(model(ids).logits, without, atol=1e-4)


@torch.no_grad()
def test_a_mask_says_what_is_remembered_and_padding_never_is(llama, make_tokens):
    model = wrap(llama)
    ids = make_tokens(2, 20)
    wanted, padding = torch.zeros_like(ids), torch.ones_like(ids)
    wanted[:, 8:] = 1
    padding[0, 15:] = 0
    model(ids, attention_mask=padding, update_memory=wanted)
    assert model.memory.lengths.tolist() == [7, 12]
    model(ids, attention_mask=padding, update_memory=torch.zeros_like(ids))
    assert model.memory.lengths.tolist() == [7, 12]
    with model.disable_adapter(), pytest.raises(ConfigError, match="update_memory=True needs the"):
        model(ids, update_memory=wanted)


@torch.no_grad()
def test_updating_in_a_forward_remembers_what_memorize_does(backbone, make_tokens):
    ids = make_tokens(2, 16)
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    forward, early = wrap(backbone), wrap(backbone)
    forward(ids, attention_mask=mask, update_memory=True)
    early.memorize(ids, attention_mask=mask)
    query = torch.randn(2, 4, 3, 8, generator=torch.Generator().manual_seed(0))
    assert forward.memory.lengths.tolist() == early.memory.lengths.tolist() == [10, 16]
    for mine, expected in zip(
        early.memory.retrieve(query).gather(), forward.memory.retrieve(query).gather(), strict=True
    ):
        # Ingestion leaves the mask of right padding away: the same sums, in another order.
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_memorize_runs_no_layer_after_the_memory_layer(backbone, make_tokens):
    ran = []
    model = wrap(backbone, memory_layers=(1,))
    for index, layer in enumerate(model.parts.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    model.memorize(make_tokens(1, 16))
    assert ran == [0, 1]


@torch.no_grad()
def test_keys_are_those_before_rotation(llama, make_tokens):
    ids = make_tokens(1, 12)
    model = wrap(llama, memory_layers=(2,))
    states = model.encode(ids)
    layer = llama.model.layers[2]
    hidden = layer.input_layernorm(llama(ids, output_hidden_states=True).hidden_states[2])
    keys = layer.self_attn.k_proj(hidden).view(1, 12, 2, 8).transpose(1, 2)
    values = layer.self_attn.v_proj(hidden).view(1, 12, 2, 8).transpose(1, 2)
    torch.testing.assert_close(states.keys[0], keys, rtol=0, atol=1e-6)
    torch.testing.assert_close(states.values[0], values, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("scope", ["row", "batch"])
def test_rows_of_a_batch_do_not_read_each_other_unless_asked(scope, backbone, make_tokens):
    ids, past = make_tokens(2, 20), make_tokens(2, 40, seed=1)
    other = past.clone()
    other[1] = make_tokens(1, 40, seed=2)[0]
    logits = []
    for memorized in (past, other):
        model = trained(wrap(backbone, memory_scope=scope))
        model.memorize(memorized)
        logits.append(model(ids).logits)
    assert torch.equal(logits[0][0], logits[1][0]) == (scope == "row")
    assert not torch.equal(logits[0][1], logits[1][1])


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["gate", "softmax"])
def test_each_row_alone_gives_what_it_gives_in_a_padded_batch(fusion, backbone, make_tokens):
    ids, past = make_tokens(3, 24), make_tokens(3, 40, seed=1)
    mask, past_mask = torch.ones_like(ids), torch.ones_like(past)
    mask[0, :9] = 0
    mask[1, 20:] = 0
    past_mask[1, :13] = 0
    past_mask[2, 30:] = 0
    together = trained(wrap(backbone, fusion=fusion))
    together.memorize(past, attention_mask=past_mask)
    together.memory.clear(rows=[2])
    logits = together(ids, attention_mask=mask).logits
    for row in range(3):
        alone = trained(wrap(backbone, fusion=fusion))
        if row != 2:
            # Left padding moves segment borders, so the row alone is memorized padded too.
            alone.memorize(past[row : row + 1], attention_mask=past_mask[row : row + 1])
        real = mask[row].bool()
        expected = alone(ids[row : row + 1, real]).logits[0]
        torch.testing.assert_close(logits[row, real], expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_clearing_one_row_leaves_the_others_alone(backbone, make_tokens):
    model = trained(wrap(backbone))
    ids = make_tokens(2, 20)
    without = model(ids).logits
    model.memorize(make_tokens(2, 40, seed=1))
    before = model(ids).logits
    model.memory.clear(rows=[1])
    after = model(ids).logits
    assert torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1], without[1], rtol=0, atol=1e-6)
    assert not torch.allclose(before[1], without[1], atol=1e-4)


@torch.no_grad()
def test_disabling_memory_is_the_same_as_having_none(backbone, make_tokens):
    model = trained(wrap(backbone))
    ids = make_tokens(2, 20)
    without = model(ids).logits
    model.memorize(make_tokens(2, 40, seed=1))
    with model.disable_memory():
        assert torch.equal(model(ids).logits, without)
    assert not torch.equal(model(ids).logits, without)


@torch.no_grad()
def test_attention_implementations_agree(make_backbone, make_tokens):
    for family in FAMILIES:
        results = []
        for attention in ("eager", "sdpa"):
            model = trained(wrap(make_backbone(family, attention=attention)))
            model.memorize(make_tokens(2, 40, seed=1))
            results.append(model(make_tokens(2, 20)).logits)
        torch.testing.assert_close(*results, rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_change_of_attention_implementation_reaches_the_side_network(llama, make_tokens):
    model = wrap(llama)
    llama.set_attn_implementation("eager")
    assert model.side_network.layers[0].self_attn.config._attn_implementation == "eager"


@torch.no_grad()
def test_several_memory_layers_are_each_read(backbone, make_tokens):
    model = trained(wrap(backbone, memory_layers=(1, 3)))
    model.memorize(make_tokens(2, 40, seed=1))
    ids = make_tokens(2, 20)
    both = model(ids).logits
    for gate in model.side_network.gates:
        kept = gate.data.clone()
        gate.data.fill_(-30.0)
        assert not torch.allclose(model(ids).logits, both, atol=1e-4)
        gate.data = kept


@torch.no_grad()
def test_a_memory_distance_turns_queries_by_that_many_positions(llama, make_tokens):
    ids, past = make_tokens(1, 12), make_tokens(1, 32, seed=1)
    results = {}
    for distance in (None, 0, 50):
        model = trained(wrap(llama, memory_distance=distance))
        model.memorize(past)
        results[distance] = model(ids).logits
    torch.testing.assert_close(results[0], results[None], rtol=0, atol=1e-6)
    assert not torch.allclose(results[50], results[None], atol=1e-3)
    # The scores are those of rotated queries and unrotated keys at that distance.
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query = torch.randn(1, 4, 3, 8)
    cos, sin = llama.model.rotary_emb(query, torch.tensor([[50]]))
    expected, _ = apply_rotary_pos_emb(query, query, cos, sin)
    torch.testing.assert_close(model.side_network.reading.rotate(query), expected)


def test_a_bank_of_another_model_is_refused(tmp_path, make_backbone, make_tokens):
    first, second = wrap(make_backbone("llama")), wrap(make_backbone("llama", seed=1))
    first.memorize(make_tokens(1, 16))
    first.memory.save(tmp_path / "bank")
    wrap(make_backbone("llama")).memory.load(tmp_path / "bank")
    with pytest.raises(memlayer.MemoryFormatError, match="has identity="):
        second.memory.load(tmp_path / "bank")


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_memory_filled_in_inference_mode_can_be_trained_on_and_written_to(
    backend, llama, make_tokens
):
    model = trained(wrap(llama, backend=backend)).train()
    ids = make_tokens(2, 16)
    with torch.inference_mode():
        model.memorize(make_tokens(2, 61, seed=1))
        model(ids, update_memory=True)
    for _ in range(8):
        model(ids, labels=ids, update_memory=True).loss.backward()
    assert all((gate.grad != 0).all() for gate in model.side_network.gates)


# -------------------------------------------------------------------- generation


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["gate", "softmax"])
def test_cached_steps_equal_one_forward(fusion, backbone, make_tokens):
    model = trained(wrap(backbone, fusion=fusion))
    model.memorize(make_tokens(2, 40, seed=1))
    ids = make_tokens(2, 40)
    full = model(ids).logits
    cache = DynamicCache(config=backbone.config)
    steps = [model(ids[:, :10], past_key_values=cache).logits]
    steps += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(10, 40)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=0, atol=1e-4)


@torch.no_grad()
def test_greedy_generation_follows_the_full_forward_under_left_padding(backbone, make_tokens):
    model = trained(wrap(backbone, segment_length=32))
    model.memorize(make_tokens(2, 40, seed=1))
    ids = make_tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    generated = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False
    )
    whole = torch.cat([mask, torch.ones(2, 12, dtype=mask.dtype)], dim=1)
    logits = model(generated, attention_mask=whole).logits[:, 11:-1]
    logits[..., 2] = -torch.inf  # the end of text, which min_new_tokens forbids
    assert torch.equal(logits.argmax(-1), generated[:, 12:])


@torch.no_grad()
def test_beams_and_returned_sequences_read_the_row_of_their_prompt(llama, make_tokens):
    model = trained(wrap(llama))
    model.memorize(make_tokens(2, 40, seed=1))
    ids = make_tokens(2, 8)
    mask = torch.ones_like(ids)
    settings = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, **settings)
    assert together.shape[0] == 4
    for row in range(2):
        alone = trained(wrap(llama))
        alone.memorize(make_tokens(2, 40, seed=1)[row : row + 1])
        expected = alone.generate(ids[row : row + 1], attention_mask=mask[:1], **settings)
        mine = together[2 * row : 2 * row + 2, : expected.shape[1]]
        assert torch.equal(mine, expected)


@torch.no_grad()
def test_generation_with_the_adapter_disabled_is_the_backbones(backbone, make_tokens):
    ids = make_tokens(2, 8)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    expected = backbone.generate(ids, **settings)
    model = trained(wrap(backbone))
    with model.disable_adapter():
        assert torch.equal(model.generate(ids, **settings), expected)


# -------------------------------------------------------------------- parameters, dtypes


def test_trainable_parameters_are_printed_in_pefts_words(llama, capsys):
    model = wrap(llama)
    model.print_trainable_parameters()
    trainable = sum(p.numel() for p in model.side_network.parameters())
    total = trainable + sum(p.numel() for p in llama.parameters())
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,} || all params: {total:,} || "
        f"trainable%: {100 * trainable / total:.4f}\n"
    )


@pytest.mark.parametrize("side_init", ["replace", "identity"])
def test_parameter_groups_hold_every_parameter_once(side_init, llama):
    model = wrap(llama, side_init=side_init, recency_bias=True)
    groups = model.parameter_groups(learning_rate=1e-3, gate_learning_rate=0.1, weight_decay=0.01)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.trainable_parameters())
    matrices, vectors, gates = groups
    assert {p.dim() for p in matrices["params"]} == {2}
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.01, 0.0)
    assert (gates["lr"], gates["weight_decay"]) == (0.1, 0.0)
    network = model.side_network
    single = [*network.gates, *network.slopes, network.scales]
    assert {id(p) for p in gates["params"]} == {id(p) for p in single if p is not None}


def test_a_bfloat16_backbone_keeps_its_dtype_and_the_side_network_trains_in_float32(
    make_backbone, make_tokens
):
    for family in ("gpt2", "opt-350m", "llama"):
        model = trained(wrap(make_backbone(family).bfloat16()))
        model.memorize(make_tokens(2, 40, seed=1))
        assert model.memory.dtype == torch.bfloat16
        ids = make_tokens(2, 20)
        model(ids, labels=ids).loss.backward()
        assert {p.dtype for p in model.trainable_parameters()} == {torch.float32}
        assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)


@torch.no_grad()
def test_memory_goes_where_the_model_goes(llama, make_tokens):
    model = wrap(llama).to(torch.float64)
    assert model.memory.dtype == torch.float64
    model.memorize(make_tokens(1, 20))
    model(make_tokens(1, 8))
    with pytest.raises(ConfigError, match=r"memory holds 20 tokens as torch.float64 on cpu"):
        model.to(torch.float32)


# -------------------------------------------------------------------- what users get wrong


def test_settings_that_do_not_fit_the_backbone_are_refused(llama):
    with pytest.raises(ConfigError, match=r"memory_layers must be within 0 to 3, got \[7\]"):
        wrap(llama, memory_layers=(7,))
    with pytest.raises(ConfigError, match=r"different side layers, got \[2, 3\].*2 apart"):
        wrap(llama, memory_layers=(2, 3))
    with pytest.raises(ConfigError, match="at most the backbone's 4 layers, got 9"):
        wrap(llama, layer_reduction_factor=9)
    with pytest.raises(UnknownNameError, match=r"unknown backend 'tirch'.*torch"):
        wrap(llama, backend="tirch")
    with pytest.raises(ConfigError, match="colour"):
        wrap(llama, backend_options={"colour": "red"})


def test_memory_distance_needs_rotary_positions(make_backbone):
    with pytest.raises(ConfigError, match="memory_distance needs a backbone with rotary"):
        wrap(make_backbone("gpt2"), memory_distance=5)


def test_a_family_that_no_adapter_describes_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)
    with pytest.raises(UnsupportedModelError, match=r"model_type 'mamba', and .* no cache"):
        wrap(MambaForCausalLM(config))


def test_a_batch_that_was_not_memorized_is_refused(llama, make_tokens):
    model = wrap(llama)
    model.memorize(make_tokens(2, 20))
    with pytest.raises(ShapeError, match=r"holds 2 rows, got a batch of 4.*clear"):
        model(make_tokens(4, 8))
    with pytest.raises(ShapeError, match="holds 2 rows, got 4 prompts"):
        model.generate(make_tokens(4, 8), max_new_tokens=2)
    with pytest.raises(ShapeError, match="holds 2 rows, got a batch of 3"):
        model.memorize(make_tokens(3, 20))


def test_other_wrong_arguments_are_refused(llama, make_backbone, make_tokens):
    model = wrap(llama)
    ids = make_tokens(1, 8)
    with pytest.raises(ConfigError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ConfigError, match="output_attentions=True is not supported"):
        model(ids, output_attentions=True)
    with pytest.raises(ConfigError, match="adapter; it is disabled"), model.disable_adapter():
        model(ids, update_memory=True)
    with pytest.raises(ShapeError, match=r"shape \(B, T\), got \(8,\)"):
        model.memorize(ids[0])
    with pytest.raises(ShapeError, match="attention_mask must have the shape of input_ids"):
        model.memorize(ids, attention_mask=torch.ones(1, 7))
    with pytest.raises(ConfigError, match="DynamicCache, got StaticCache"):
        model(ids, past_key_values=StaticCache(config=llama.config, max_cache_len=16))
    gpt2 = wrap(make_backbone("gpt2", n_positions=16))
    with pytest.raises(ConfigError, match="learned positions for 16 tokens, got 17"):
        gpt2(make_tokens(1, 17))


def test_what_memories_are_of_is_looked_up_each_time_unless_it_is_kept(make_backbone):
    model = memlayer.wrap(make_backbone("llama"), memlayer.LongMemConfig(backend="torch"))
    before = model.memory.identity
    with torch.no_grad():
        model.backbone.model.layers[0].mlp.up_proj.weight.mul_(2)
        model.backbone.lm_head.weight.add_(1)
    changed = model.new_memory().identity
    assert changed != before
    model.keep_identity()
    with torch.no_grad():
        model.backbone.lm_head.weight.add_(1)
    assert model.new_memory().identity == changed
