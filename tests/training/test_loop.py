import copy
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import memlayer
from memlayer.data import IGNORED, Document, StreamBatches, tokenize_documents
from memlayer.errors import ConfigError, DataError, TrainingError
from memlayer.evaluation.scoring import model_losses
from memlayer.training import Trainer, read_log, train

pytestmark = pytest.mark.usefixtures("no_curves")


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(run) if entry["kind"] == "step"]


def test_a_run_lowers_the_loss_and_leaves_what_load_reads(
    make_model, tokenizer, documents, make_options, tmp_path
):
    model = make_model()
    options = make_options(steps=40)
    result = train(model, tokenizer, documents[2:], documents[:2], options, output=tmp_path / "run")
    found = losses(result.output)
    assert sum(found[-5:]) < 0.9 * sum(found[:5])
    assert result.perplexities.memory_on < 0.9 * result.perplexities.backbone
    assert {path.name for path in result.output.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "log.jsonl",
        "training.json",
    }
    loaded = memlayer.load(result.output, backbone=make_model().unwrap())
    for name, value in model.side_network.state_dict().items():
        torch.testing.assert_close(loaded.side_network.state_dict()[name], value, rtol=0, atol=0)


def test_the_logged_loss_is_the_mean_over_all_target_tokens_of_the_step(
    make_model, tokenizer, documents, make_options, tmp_path
):
    options = make_options(
        steps=4, gradient_accumulation=3, learning_rate=1e-12, gate_learning_rate=1e-12
    )
    train(make_model("llama"), tokenizer, documents, [], options, output=tmp_path / "run")
    # No learning worth the name: the model stays as it was made.
    model = make_model("llama")
    batches = StreamBatches(
        tokenize_documents(documents, tokenizer), rows=2, segment_length=16, seed=0, repeat=True
    )
    expected = []
    for _ in range(4):
        total = tokens = 0
        for _ in range(3):
            batch = next(batches)
            with torch.no_grad():
                logits = model(batch.input_ids, batch.attention_mask, update_memory=True).logits
            total += functional.cross_entropy(
                logits.flatten(0, 1), batch.targets.flatten(), reduction="sum"
            ).item()
            tokens += int((batch.targets >= 0).sum())
            model.memory.clear(batch.ends.nonzero().flatten().tolist())
        expected.append(total / tokens)
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stride", [16, 11, 4])
def test_overlapping_segments_train_on_the_losses_that_evaluation_gives(
    make_model, tokenizer, documents, make_options, tmp_path, stride
):
    # Rows whose documents end at different steps, and others that begin meanwhile.
    options = make_options(
        steps=12, stride=stride, learning_rate=1e-12, gate_learning_rate=1e-12, seed=1
    )
    train(make_model("llama"), tokenizer, documents, [], options, output=tmp_path / "run")
    model = make_model("llama")
    tokenized = tokenize_documents(documents, tokenizer)
    expected_of = {}
    for document in tokenized:
        with torch.inference_mode():
            found, _ = model_losses(
                model,
                document.input_ids,
                memories={"memory": model.new_memory(overlap=16 - stride)},
                segment_length=16,
                stride=stride,
                advance=lambda tokens: None,
            )
        expected_of[document.id] = found["memory"]
    batches = StreamBatches(
        tokenized, rows=2, segment_length=16, stride=stride, seed=1, repeat=True
    )
    expected = []
    for _ in range(12):
        batches._fill_free_rows()
        places = list(zip(batches._current, batches._offsets, strict=True))
        batch = next(batches)
        parts = [
            expected_of[tokenized[turn.document].id][
                start + (targets != IGNORED).nonzero().flatten()
            ]
            for (turn, start), targets in zip(places, batch.targets, strict=True)
        ]
        expected.append(float(torch.cat(parts).mean()))
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stride", [16, 11])
def test_an_excerpt_is_trained_on_with_what_led_to_it_in_memory(
    make_model, tokenizer, documents, make_options, tmp_path, stride
):
    options = make_options(
        steps=6,
        stride=stride,
        gradient_accumulation=2,
        excerpt_tokens=32,
        lead_tokens=40,
        learning_rate=1e-12,
        gate_learning_rate=1e-12,
    )
    # Two rows, whose excerpts begin at different batches where a document is short.
    train(make_model("llama"), tokenizer, documents, [], options, output=tmp_path / "run")
    batches = StreamBatches(
        tokenize_documents(documents, tokenizer),
        rows=2,
        segment_length=16,
        stride=stride,
        excerpt=32,
        lead=40,
        seed=0,
        repeat=True,
    )
    models = [make_model("llama"), make_model("llama")]
    for model in models:
        model.memory = model.new_memory(overlap=16 - stride)
    expected, leads, trained = [], 0, 0
    for _ in range(6):
        total = tokens = 0
        for batch in (next(batches), next(batches)):
            trained += int(batch.fresh.sum())
            for row, model in enumerate(models):
                lead = batch.lead[row][batch.lead_mask[row].bool()]
                leads += len(lead)
                for part in lead.split(16) if len(lead) else ():
                    model(part[None], update_memory=True)
                real = batch.attention_mask[row].bool()
                with torch.no_grad():
                    logits = model(
                        batch.input_ids[row, real][None], update_memory=batch.fresh[row, real][None]
                    ).logits
                targets = batch.targets[row, real]
                total += functional.cross_entropy(logits[0], targets, reduction="sum").item()
                tokens += int((targets != IGNORED).sum())
                if batch.ends[row]:
                    model.memory.clear()
        expected.append(total / tokens)
    assert leads > 40
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    # What leads to an excerpt counts as memory, not as training.
    entries = [entry for entry in read_log(tmp_path / "run") if entry["kind"] == "step"]
    assert max(entry["memory_tokens"] for entry in entries) > 32
    assert entries[-1]["tokens"] == trained


def test_a_dropped_memory_is_not_read_but_written(
    make_model, tokenizer, documents, make_options, tmp_path
):
    options = make_options(
        steps=12, memory_dropout=0.5, learning_rate=1e-12, gate_learning_rate=1e-12
    )
    train(make_model("llama"), tokenizer, documents, [], options, output=tmp_path / "run")
    model = make_model("llama")
    batches = StreamBatches(
        tokenize_documents(documents, tokenizer), rows=2, segment_length=16, seed=0, repeat=True
    )
    read = []
    entries = [entry for entry in read_log(tmp_path / "run") if entry["kind"] == "step"]
    for entry in entries:
        batch, held = next(batches), len(model.memory)
        with torch.no_grad():
            with model.disable_memory():
                without = model(batch.input_ids, batch.attention_mask).logits
            logits = model(batch.input_ids, batch.attention_mask, update_memory=True).logits
        model.memory.clear(batch.ends.nonzero().flatten().tolist())
        expected = [
            functional.cross_entropy(scores.flatten(0, 1), batch.targets.flatten()).item()
            for scores in (without, logits)
        ]
        if expected[0] == pytest.approx(expected[1], rel=1e-5):
            assert held == 0
            continue
        read.append(entry["memory_tokens"] > 0)
        assert entry["loss"] == pytest.approx(expected[read[-1]], rel=1e-6)
        assert entry["memory_tokens"] == (held if read[-1] else 0)
    # With half of them dropped, more than one of each kind.
    assert 1 < sum(read) < len(read) - 1


def test_an_excerpt_shorter_than_a_segment_is_refused(
    make_model, tokenizer, documents, make_options, tmp_path
):
    with pytest.raises(ConfigError, match="an excerpt must have at least segment_length=16 tokens"):
        train(
            make_model(),
            tokenizer,
            documents,
            [],
            make_options(excerpt_tokens=15),
            output=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_overlap_needs_a_memory_for_each_row_and_a_stride_within_the_segment(
    make_model, tokenizer, documents, make_options, tmp_path
):
    with pytest.raises(ConfigError, match="stride=8 below segment_length=16 needs a memory for ea"):
        train(
            make_model(memory_scope="batch"),
            tokenizer,
            documents,
            [],
            make_options(stride=8),
            output=tmp_path,
        )
    with pytest.raises(ConfigError, match="stride must be within 1 and segment_length=16, got 17"):
        train(make_model(), tokenizer, documents, [], make_options(stride=17), output=tmp_path)


def test_accumulated_gradients_are_those_of_one_mean_over_all_tokens(
    make_model, tokenizer, documents, make_options, tmp_path
):
    options = make_options(gradient_accumulation=3, max_gradient_norm=None)
    model, reference = (make_model("llama", side_init="backbone").train() for _ in range(2))
    trainer = Trainer(model, tokenizer, documents, [], options, output=tmp_path)
    batches = StreamBatches(
        tokenize_documents(documents, tokenizer), rows=2, segment_length=16, seed=0, repeat=True
    )
    entry = trainer._train_step()
    total, tokens = 0.0, 0
    for _ in range(3):
        batch = next(batches)
        logits = reference(batch.input_ids, batch.attention_mask, update_memory=True).logits
        part = functional.cross_entropy(
            logits.flatten(0, 1), batch.targets.flatten(), reduction="sum"
        )
        part.backward()
        total, tokens = total + part.item(), tokens + int((batch.targets >= 0).sum())
        reference.memory.clear(batch.ends.nonzero().flatten().tolist())
    squares = sum(
        float((parameter.grad / tokens).square().sum())
        for parameter in reference.trainable_parameters()
        if parameter.grad is not None
    )
    assert entry["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert entry["gradient_norm"] == pytest.approx(math.sqrt(squares), rel=1e-4)


def test_a_row_forgets_its_document_at_the_end_of_it_and_no_other_row_does(
    make_model, tokenizer, make_options, tmp_path
):
    short, long = "a" * 33, "b" * 200
    model = make_model(memory_size=256)
    trainer = Trainer(
        model,
        tokenizer,
        [Document(id="short", text=short), Document(id="long", text=long)],
        [],
        make_options(),
        output=tmp_path,
    )
    held = []
    for _ in range(4):
        trainer._train_step()
        held.append(sorted(model.memory.lengths.tolist()))
    # 33 tokens are two segments with targets; the row then begins the next document.
    assert held[:2] == [[16, 16], [0, 32]]
    assert held[3] == [32, 64] or held[3] == [0, 64]


def test_only_the_side_network_learns_and_every_part_of_it_does(
    make_model, tokenizer, documents, make_options, tmp_path
):
    model = make_model()
    before = copy.deepcopy(dict(model.named_parameters()))
    train(model, tokenizer, documents, [], make_options(steps=8), output=tmp_path / "run")
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == name.startswith("side_network."), name


def test_training_leaves_the_users_random_numbers_and_memory_alone(
    make_model, tokenizer, documents, make_options, tmp_path
):
    model = make_model()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(model, tokenizer, documents, documents, make_options(steps=2), output=tmp_path / "run")
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert len(model.memory) == 0
    assert not model.training


def test_evaluating_more_often_changes_no_loss(
    make_model, tokenizer, documents, make_options, tmp_path
):
    for name, every in (("often", 1), ("never", None)):
        options = make_options(eval_every=every)
        train(make_model(), tokenizer, documents, documents, options, output=tmp_path / name)
    assert losses(tmp_path / "often") == losses(tmp_path / "never")


def test_weight_decay_spares_gates_scales_norms_and_biases(
    make_model, tokenizer, documents, make_options, tmp_path
):
    trainer = Trainer(
        make_model(side_init="identity"),
        tokenizer,
        documents,
        [],
        make_options(weight_decay=0.5),
        output=tmp_path,
    )
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    decayed, spared = set(), set()
    for group in trainer._stepper.optimizer.param_groups:
        target = decayed if group["weight_decay"] == 0.5 else spared
        target.update(names[id(parameter)] for parameter in group["params"])
    assert all(name.endswith("weight") and "ln_" not in name for name in decayed)
    assert any("gates" in name for name in spared)
    assert any("scales" in name for name in spared)
    assert len(decayed | spared) == sum(1 for _ in trainer.model.trainable_parameters())


def test_bfloat16_trains_and_keeps_float32_weights(
    make_model, tokenizer, documents, make_options, tmp_path
):
    model = make_model()
    train(model, tokenizer, documents, documents, make_options(dtype="bf16"), output=tmp_path / "a")
    train(make_model(), tokenizer, documents, documents, make_options(), output=tmp_path / "b")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    half, full = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert half != full
    # bfloat16 has 8 bits of mantissa.
    assert half == pytest.approx(full, rel=0.02)


@pytest.mark.parametrize("what", ["weight", "learning rate"])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    what, make_model, tokenizer, documents, make_options, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    rate = 1e-3 if what == "weight" else 1e30
    options = make_options(
        save_every=2, steps=20, warmup=0.0, learning_rate=rate, max_gradient_norm=None
    )
    trainer = Trainer(make_model(), tokenizer, documents, [], options, output=run)
    if what == "weight":
        step = trainer._train_step

        def poisoned():
            if trainer.step == 5:
                with torch.no_grad():
                    trainer.model.side_network.norm.weight[3] = float("nan")
            return step()

        monkeypatch.setattr(trainer, "_train_step", poisoned)
    with pytest.raises(TrainingError) as caught:
        trainer.run()
    message = str(caught.value)
    if what == "weight":
        assert "the loss is nan at step 6" in message
        assert f"the last good checkpoint is {run / 'checkpoints' / 'step-000004'}" in message
        assert (run / "checkpoints" / "step-000004" / "state.json").is_file()
    else:
        assert "no checkpoint was written yet" in message
        assert "lower learning rates than learning_rate=1e+30" in message
    assert not (run / "adapter_model.safetensors").exists()


def test_a_directory_that_holds_a_run_is_not_written_to(
    make_model, tokenizer, documents, make_options, tmp_path
):
    train(make_model(), tokenizer, documents, [], make_options(steps=1), output=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="holds a training run already; go on with it"):
        train(make_model(), tokenizer, documents, [], make_options(steps=1), output=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_documents_shorter_than_a_segment_are_refused(
    make_model, tokenizer, make_options, tmp_path
):
    with pytest.raises(DataError, match="every document is shorter than segment_length=16"):
        train(
            make_model(),
            tokenizer,
            [Document(id="a", text="short")],
            [],
            make_options(),
            output=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_a_file_is_refused(
    make_model, tokenizer, documents, make_options, tmp_path
):
    (tmp_path / "run").write_text("precious")
    with pytest.raises(ConfigError, match="output must be a directory, got the file"):
        train(make_model(), tokenizer, documents, [], make_options(), output=tmp_path / "run")


def test_a_memory_that_all_rows_share_trains_too(
    make_model, tokenizer, documents, make_options, tmp_path
):
    model = make_model(memory_scope="batch", memory_size=256)
    train(model, tokenizer, documents, [], make_options(), output=tmp_path / "run")
    held = [entry["memory_tokens"] for entry in read_log(tmp_path / "run")]
    assert held == sorted(held)


@pytest.mark.parametrize(
    ("options", "text", "error", "message"),
    [
        (
            {"eval_tokens": 32},
            "a" * 99,
            ConfigError,
            "eval_tokens must be more than segment_len.*32",
        ),
        ({}, "a" * 17, DataError, r"every validation document fits in one segment.*longest: 17\)"),
        ({}, "", DataError, "every validation document fits in one segment"),
    ],
)
def test_a_validation_that_never_reads_memory_is_refused(
    options, text, error, message, make_model, tokenizer, documents, make_options, tmp_path
):
    validation = [Document(id=name, text=text) for name in ("one", "other")]
    with pytest.raises(error, match=message):
        train(
            make_model(),
            tokenizer,
            documents,
            validation,
            make_options(**options),
            output=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("side_init", ["replace", "identity"])
def test_gradient_checkpointing_changes_no_loss_and_no_weight(
    side_init, make_model, tokenizer, documents, make_options, tmp_path
):
    models = {}
    for again in (False, True):
        # GPT-2, which has dropout: what is run again draws the same random numbers.
        models[again] = model = make_model(side_init=side_init)
        options = make_options(
            steps=8, gradient_accumulation=2, max_gradient_norm=None, gradient_checkpointing=again
        )
        train(model, tokenizer, documents, [], options, output=tmp_path / str(again))
        assert model.is_gradient_checkpointing == again
    assert losses(tmp_path / "True") == losses(tmp_path / "False")
    for name, value in models[True].side_network.state_dict().items():
        assert torch.equal(value, models[False].side_network.state_dict()[name]), name


def test_gradient_checkpointing_searches_once_and_keeps_less(make_model):
    model = make_model("llama").train()
    input_ids = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    model.memorize(input_ids)
    searches, kept = [], []
    retrieve = model.memory.retrieve

    def counting(*arguments, **keywords):
        searches.append(1)
        return retrieve(*arguments, **keywords)

    model.memory.retrieve = counting
    gradients = {}
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        size = 0

        def note(tensor):
            nonlocal size
            size += tensor.numel()
            return tensor

        searches.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(input_ids, labels=input_ids, update_memory=again).loss
        loss.backward()
        assert len(searches) == 1
        kept.append(size)
        gradients[again] = [p.grad.clone() for p in model.trainable_parameters()]
        model.zero_grad()
    assert kept[1] < 0.7 * kept[0]
    assert all(torch.equal(*pair) for pair in zip(*gradients.values(), strict=True))
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    with pytest.raises(ConfigError, match="use_reentrant=False, got"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
