"""Generation past the window: every step is a forward over the window, the rest in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import memlayer
from memlayer.capture import run_to_memory_layers
from memlayer.errors import ConfigError
from memlayer.generation import WindowCache

FAMILIES = ("gpt2", "opt", "opt-350m", "llama", "mistral", "qwen3")
FUSIONS = {
    "gate": {},
    "softmax": {"fusion": "softmax"},
    "softmax, recency": {"fusion": "softmax", "recency_bias": True},
}
SMALL = {"backend": "torch", "memory_size": 256, "top_k": 16, "segment_length": 32}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def wrap(backbone, **settings):
    """Wrap, and move the side network away from its start, gates open, as training would."""
    model = memlayer.wrap(backbone, memlayer.LongMemConfig(**(SMALL | settings))).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.side_network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    if model.side_network.scales is not None:
        model.side_network.scales.data += 0.6
    for gate in model.side_network.gates:
        gate.data += 1.5
    for slope in model.side_network.slopes or ():
        slope.data += 1.5
    return model


@pytest.fixture
def llama(make_backbone):
    return make_backbone("llama")


def step_logits(model, ids, tokens, **arguments):
    """Give the logits of every generated token: ``(B, tokens, V)``, and the sequences."""
    # Generated text may hold the padding token, from which Hugging Face would guess a mask.
    arguments = {"attention_mask": torch.ones_like(ids)} | arguments
    output = model.generate(
        ids,
        max_new_tokens=tokens,
        output_logits=True,
        return_dict_in_generate=True,
        **(GREEDY | arguments),
    )
    return torch.stack(output.logits, dim=1), output.sequences


def plain_logits(model, sequence, document, length, step):
    """Give the logits after one whole sequence ``(n,)`` from the definition, without any cache.

    Tokens leave a window of ``length`` in segments of ``step`` as soon as there are more; memory
    holds the document and these segments, each read on its own.
    """
    bank = model.new_memory(memory_size=4096)
    start = max(0, -(-(len(sequence) - length) // step)) * step
    pieces = list(document.split(model.memory_config.segment_length))
    pieces += list(sequence[:start].split(step))
    for piece in filter(len, pieces):
        states = run_to_memory_layers(
            model.parts, model.memory_config.memory_layers, input_ids=piece.unsqueeze(0)
        )
        bank.write(states.keys, states.values)
    states = model.encode(sequence[start:].unsqueeze(0))
    return model.read(states, bank, logits_to_keep=1)[0, -1]


# -------------------------------------------------------------------- one definition of a step


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_is_a_forward_over_all_of_the_text(family, make_backbone, make_tokens):
    model = wrap(make_backbone(family), segment_length=256, memory_size=512)
    model.memorize(make_tokens(2, 300, seed=1))
    ids = make_tokens(2, 190, seed=2)
    # 300 steps: the window of 256 overflows at 257 and 385 tokens.
    cached, sequences = step_logits(model, ids, 300)
    for step in (0, 1, 66, 67, 68, 150, 194, 195, 196, 299):
        seen = sequences[:, : 190 + step]
        alone, _ = step_logits(model, seen, 1, use_cache=False)
        torch.testing.assert_close(cached[:, step], alone[:, 0], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_step_reads_its_window_and_all_before_it_from_memory(
    fusion, family, make_backbone, make_tokens
):
    model = wrap(make_backbone(family), **FUSIONS[fusion])
    document = make_tokens(1, 64, seed=1)
    model.memorize(document)
    ids = make_tokens(1, 75, seed=2)
    cached, sequences = step_logits(model, ids, 60)
    for step in range(0, 60, 3):
        expected = plain_logits(model, sequences[0, : 75 + step], document[0], 32, 16)
        torch.testing.assert_close(cached[0, step], expected, rtol=0, atol=1e-4)
    # The test tells memory from none.
    with model.disable_memory():
        without, _ = step_logits(model, sequences[:, :-1], 1)
    assert (without[0, 0] - cached[0, -1]).abs().max() > 1e-2


@torch.no_grad()
def test_a_window_that_chunks_do_not_divide_evenly_moves_whole_chunks(llama, make_tokens):
    model = wrap(llama, segment_length=30, chunk_size=4)
    ids = make_tokens(1, 41, seed=2)
    cached, sequences = step_logits(model, ids, 30)
    for step in range(0, 30, 7):
        expected = plain_logits(model, sequences[0, : 41 + step], ids[0, :0], 30, 12)
        torch.testing.assert_close(cached[0, step], expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_positions_never_run_out(family, make_backbone, make_tokens):
    positions = {"n_positions": 24} if family == "gpt2" else {"max_position_embeddings": 24}
    model = wrap(make_backbone(family, **positions), segment_length=64)
    output = model.generate(make_tokens(2, 40), max_new_tokens=100, **GREEDY)
    assert output.shape == (2, 140)


@torch.no_grad()
def test_without_memory_the_window_slides_and_nothing_is_kept(llama, make_tokens):
    model = wrap(llama)
    ids = make_tokens(1, 50)
    with model.disable_memory():
        cached, sequences = step_logits(model, ids, 20)
        output = model.generate(ids, max_new_tokens=20, return_dict_in_generate=True, **GREEDY)
    assert output.past_key_values.scratch is None
    for step in range(0, 20, 4):
        start = max(0, -(-(50 + step - 32) // 16)) * 16
        states = model.encode(sequences[:, start : 50 + step])
        expected = model.read(states, None, logits_to_keep=1)[0, -1]
        torch.testing.assert_close(cached[0, step], expected, rtol=0, atol=1e-4)


# -------------------------------------------------------------------- rows, beams, samples


def padded(rows):
    """Pad sequences on the left: ids and mask."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = row
        mask[number, width - len(row) :] = 1
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_alone_gives_the_text_that_it_gives_in_a_batch(
    family, beams, make_backbone, make_tokens
):
    model = wrap(make_backbone(family))
    # Their windows overflow at different steps, two of them in the prompt.
    prompts = [make_tokens(1, n, seed=n)[0] for n in (20, 45, 7, 90)]
    documents = make_tokens(4, 80, seed=9)
    model.memorize(documents)
    ids, mask = padded(prompts)
    arguments = {**GREEDY, "max_new_tokens": 45, "num_beams": beams}
    together = model.generate(ids, attention_mask=mask, **arguments)
    for row, prompt in enumerate(prompts):
        model.memory.clear()
        model.memorize(documents[row : row + 1])
        alone = model.generate(prompt.unsqueeze(0), **arguments)
        assert together[row, -45:].tolist() == alone[0, -45:].tolist()


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_logits_of_a_padded_row_are_those_of_the_row_alone(
    fusion, family, make_backbone, make_tokens
):
    model = wrap(make_backbone(family), **FUSIONS[fusion])
    prompts = [make_tokens(1, n, seed=n)[0] for n in (30, 5, 70)]
    ids, mask = padded(prompts)
    together, sequences = step_logits(model, ids, 60, attention_mask=mask)
    for row, prompt in enumerate(prompts):
        text = torch.cat([prompt, sequences[row, ids.shape[1] :]])
        for step in (0, 2, 3, 27, 28, 59):
            alone, _ = step_logits(model, text[: len(prompt) + step].unsqueeze(0), 1)
            torch.testing.assert_close(together[row, step], alone[0, 0], rtol=0, atol=1e-4)


def best_continuation(model, prompt, tokens, vocabulary):
    """Score every continuation there is, each as one prompt: the best and its log-probability."""
    states = [((), 0.0)]
    for _ in range(tokens):
        grown = []
        for words, score in states:
            text = torch.cat([prompt, torch.tensor(words, dtype=torch.int64)])
            logits, _ = step_logits(model, text.unsqueeze(0), 1, use_cache=False)
            log_probs = logits[0, 0].log_softmax(-1)
            grown += [
                ((*words, word), score + float(log_probs[word])) for word in range(vocabulary)
            ]
        states = grown
    return max(states, key=lambda state: state[1])


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_beam_search_finds_what_exhaustive_search_finds(family, make_backbone, make_tokens):
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = wrap(
        make_backbone(family, vocab_size=4, **special),
        segment_length=8,
        chunk_size=2,
        top_k=4,
        memory_size=64,
    )
    model.memorize(make_tokens(1, 20, seed=1) % 4)
    prompt = make_tokens(1, 7, seed=2)[0] % 4
    # Windows overflow at the 2nd and the 6th token; with 64 beams of 4 words nothing is cut
    # before the last step.
    words, score = best_continuation(model, prompt, 4, 4)
    output = model.generate(
        prompt.unsqueeze(0),
        attention_mask=torch.ones(1, 7, dtype=torch.int64),
        max_new_tokens=4,
        num_beams=64,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
        **GREEDY,
    )
    assert output.sequences[0, 7:].tolist() == list(words)
    assert float(output.sequences_scores[0]) == pytest.approx(score, abs=1e-4)


@torch.no_grad()
def test_beams_store_what_they_have_in_common_once(llama, make_tokens):
    model = wrap(llama)
    output = model.generate(
        make_tokens(1, 100),
        max_new_tokens=2,
        num_beams=4,
        return_dict_in_generate=True,
        **GREEDY,
    )
    scratch = output.past_key_values.scratch
    # 80 tokens of the prompt left the window, for each beam, in chunks of 4.
    assert scratch.lengths().tolist() == [80] * 4
    assert scratch.stored_chunks == 20


@torch.no_grad()
def test_several_returned_sequences_each_read_their_own_past(llama, make_tokens):
    model = wrap(llama)
    document = make_tokens(2, 60, seed=1)
    model.memorize(document)
    ids = make_tokens(2, 30, seed=2)
    torch.manual_seed(0)
    logits, sequences = step_logits(model, ids, 50, do_sample=True, num_return_sequences=3, top_k=0)
    assert sequences.shape == (6, 80)
    assert len({tuple(row.tolist()) for row in sequences}) == 6
    for row in range(6):
        for step in (0, 3, 20, 49):
            expected = plain_logits(model, sequences[row, : 30 + step], document[row // 3], 32, 16)
            torch.testing.assert_close(logits[row, step], expected, rtol=0, atol=1e-4)


# -------------------------------------------------------------------- what users rely on


@torch.no_grad()
def test_a_returned_cache_continues_the_text(llama, make_tokens):
    model = wrap(llama)
    model.memorize(make_tokens(2, 60, seed=1))
    ids = make_tokens(2, 30, seed=2)
    whole = model.generate(ids, max_new_tokens=60, **GREEDY)
    first = model.generate(ids, max_new_tokens=25, return_dict_in_generate=True, **GREEDY)
    assert isinstance(first.past_key_values, WindowCache)
    rest = model.generate(
        first.sequences,
        attention_mask=torch.ones_like(first.sequences),
        past_key_values=first.past_key_values,
        max_new_tokens=35,
        **GREEDY,
    )
    assert torch.equal(rest, whole)


@torch.no_grad()
def test_a_copied_cache_continues_on_its_own(llama, make_tokens):
    model = wrap(llama)
    prompt, questions = make_tokens(1, 70), [make_tokens(1, 5, seed=n) for n in (1, 2)]
    first = model.generate(prompt, max_new_tokens=1, return_dict_in_generate=True, **GREEDY)
    for question in questions:
        text = torch.cat([prompt, question], dim=1)
        # The last token was given and not read yet; the question takes its place.
        continued = model.generate(
            text,
            attention_mask=torch.ones_like(text),
            past_key_values=copy.deepcopy(first.past_key_values),
            max_new_tokens=40,
            **GREEDY,
        )
        assert torch.equal(continued, model.generate(text, max_new_tokens=40, **GREEDY))


@torch.no_grad()
def test_a_streamer_and_stopping_criteria_serve_beyond_the_window(llama, make_tokens):
    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    class AtLength(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 77)

    streamer = Collect()
    output = wrap(llama).generate(
        make_tokens(1, 40),
        max_new_tokens=500,
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([AtLength()]),
        **GREEDY,
    )
    assert output.shape == (1, 77)
    assert streamer.tokens == [*output[0].tolist(), "end"]


@torch.no_grad()
def test_what_a_step_holds_is_bounded(llama, make_tokens):
    model = wrap(llama, memory_size=64)
    sizes = []
    for tokens in (150, 300):
        output = model.generate(
            make_tokens(2, 10), max_new_tokens=tokens, return_dict_in_generate=True, **GREEDY
        )
        cache = output.past_key_values
        assert cache.get_seq_length() == 10 + tokens - 1
        assert all(layer.keys.shape[2] <= 32 for layer in cache.local.layers)
        assert cache.ids.shape[1] <= 32
        assert cache.scratch.lengths().tolist() == [64, 64]
        sizes.append(cache.scratch.allocated_chunks)
    # 16 chunks are seen; a quarter more, and what the next segment needs, may be allocated.
    assert sizes[0] == sizes[1] <= 32


@torch.no_grad()
def test_the_bank_is_left_alone_unless_asked(llama, make_tokens):
    model = wrap(llama)
    model.memorize(make_tokens(1, 40, seed=1))
    model.generate(make_tokens(1, 50), max_new_tokens=30, **GREEDY)
    assert model.memory.lengths.tolist() == [40]
    written = model.generate(make_tokens(1, 50), max_new_tokens=30, update_memory=True, **GREEDY)
    expected = wrap(llama)
    expected.memorize(make_tokens(1, 40, seed=1))
    expected.memorize(written)
    query = torch.randn(1, 4, 3, 8)
    assert model.memory.lengths.tolist() == [120]
    for mine, other in zip(
        model.memory.retrieve(query).gather(), expected.memory.retrieve(query).gather(), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@torch.no_grad()
def test_updating_memory_leaves_padding_and_what_follows_an_end_out(llama, make_tokens):
    model = wrap(llama)
    ids, mask = padded([make_tokens(1, 20)[0], make_tokens(1, 9, seed=1)[0]])
    free = model.generate(ids, attention_mask=mask, max_new_tokens=12, **GREEDY)
    # The token that the first row gives at its fifth step ends it there, if not before.
    end = int(free[0, 24])
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=12,
        update_memory=True,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=0,
    )
    generated = output[:, 20:]
    written = [
        int((row == end).long().argmax()) + 1 if (row == end).any() else len(row)
        for row in generated
    ]
    assert written[0] <= 5
    assert model.memory.lengths.tolist() == [20 + written[0], 9 + written[1]]


@torch.no_grad()
def test_a_plain_cache_of_the_users_own_is_used_as_it_is(llama, make_tokens):
    model = wrap(llama)
    ids = make_tokens(1, 40)
    cache = DynamicCache(config=llama.config)
    model.generate(ids, past_key_values=cache, max_new_tokens=10, **GREEDY)
    # No window: everything stays local.
    assert cache.get_seq_length() == 49


@torch.no_grad()
def test_what_generation_cannot_do_with_memory_is_refused(llama, make_backbone, make_tokens):
    model = wrap(llama)
    ids = make_tokens(1, 8)
    with pytest.raises(ConfigError, match="assisted generation takes tokens back"):
        model.generate(ids, assistant_model=make_backbone("llama"), max_new_tokens=2)
    with pytest.raises(ConfigError, match="assisted generation"):
        model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=2)
    with pytest.raises(ConfigError, match="cache_implementation='static' is not supported"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ConfigError, match=r"one sequence a prompt, got num_return_sequences=2"):
        model.generate(
            ids,
            generation_config=GenerationConfig(
                num_return_sequences=2, do_sample=True, max_new_tokens=2
            ),
            update_memory=True,
        )
    with pytest.raises(ConfigError, match="update_memory=True needs prompts as input_ids"):
        model.generate(
            inputs_embeds=llama.get_input_embeddings()(ids), max_new_tokens=2, update_memory=True
        )
    with (
        model.disable_adapter(),
        pytest.raises(ConfigError, match="update_memory=True needs the adapter"),
    ):
        model.generate(ids, max_new_tokens=2, update_memory=True)
    with pytest.raises(ConfigError, match=r"longer than chunk_size=16 tokens, got 16"):
        wrap(llama, chunk_size=16, segment_length=16).generate(ids, max_new_tokens=2)


@torch.no_grad()
def test_a_cache_of_generation_is_held_to_its_batch_and_window(llama, make_tokens):
    model = wrap(llama)
    output = model.generate(
        make_tokens(2, 40), max_new_tokens=3, return_dict_in_generate=True, **GREEDY
    )
    cache = output.past_key_values
    with pytest.raises(ConfigError, match="of 2 sequences of 2 prompts, got a batch of 4"):
        model(make_tokens(4, 1), past_key_values=cache)
    with pytest.raises(ConfigError, match=r"the last 18 of 40 tokens.*logits_to_keep=0"):
        model(make_tokens(2, 40), past_key_values=cache)
    with pytest.raises(ConfigError, match="update_memory is not supported with the cache"):
        model(make_tokens(2, 1), past_key_values=cache, update_memory=True)
    with pytest.raises(ConfigError, match="input_ids must be given"):
        model(inputs_embeds=torch.zeros(2, 1, 32), past_key_values=cache)
    with pytest.raises(ConfigError, match="cannot be taken back"):
        cache.crop(-1)
    with pytest.raises(ConfigError, match="cannot be repeated"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(ConfigError, match="cannot be taken out"):
        cache.batch_select_indices(torch.tensor([0]))
    with pytest.raises(ConfigError, match="among those of one prompt only"):
        cache.reorder_cache(torch.tensor([1, 0]))
    cache.reset()
    assert (cache.get_seq_length(), cache.sequences, cache.scratch) == (0, 0, None)
