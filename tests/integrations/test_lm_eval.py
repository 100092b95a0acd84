"""The harness's own tasks through our model, offline: their data sets are files of the test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional

import memlayer
from memlayer.errors import ConfigError

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from memlayer.integrations.lm_eval import MemlayerLM  # noqa: E402

if TYPE_CHECKING:
    from memlayer.backbones import Backbone
    from memlayer.model import LongMemModel

WINDOW = 64

FIRST = "The Argo sailed from the harbour with fifty rowers, and the wind was fair that year. "
TEXTS = [FIRST * 3 + f"Number {number} of them was lost at sea." for number in range(3)]


@pytest.fixture
def loaded(tiny_checkpoint: Callable[[str], Path]) -> Backbone:
    return memlayer.load_backbone(str(tiny_checkpoint("llama")))


@pytest.fixture
def model(loaded: Backbone, as_trained: Callable[..., LongMemModel]) -> LongMemModel:
    config = memlayer.LongMemConfig(
        backend="torch", memory_size=1024, chunk_size=1, top_k=8, segment_length=WINDOW
    )
    return as_trained(memlayer.wrap(loaded.model, config).eval(), by=0.2, seed=1)


@pytest.fixture
def make(model: LongMemModel, loaded: Backbone) -> Callable[..., MemlayerLM]:
    def give(condition: Any = "memory", **options: Any) -> MemlayerLM:
        return MemlayerLM(model=model, tokenizer=loaded.tokenizer, condition=condition, **options)

    return give


@pytest.fixture
def tasks(tmp_path: Path) -> TaskManager:
    """Give the harness's wikitext and sst2, as it defines them, over files of the test."""
    root = Path(lm_eval.__file__).parent / "tasks"
    pages = [{"page": text} for text in TEXTS]
    sentences = [
        {"sentence": f"{text} It was {word}.", "label": label}
        for text in ("", TEXTS[0])
        for label, word in enumerate(["dull", "fine"])
    ]
    for name, place, rows in (
        ("wikitext", "wikitext/wikitext.yaml", pages),
        ("sst2", "glue/sst2/default.yaml", sentences),
    ):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        splits = dict.fromkeys(("train", "validation", "test"), str(data))
        own = {
            "include": str(root / place),
            "task": f"own_{name}",
            "tag": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": splits},
        }
        (tmp_path / "tasks").mkdir(exist_ok=True)
        # JSON is YAML too.
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps(own), encoding="utf-8")
    return TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)


def scores(model: Any, tasks: TaskManager) -> dict[str, dict[str, Any]]:
    results = lm_eval.simple_evaluate(
        model=model, tasks=["own_wikitext", "own_sst2"], task_manager=tasks, bootstrap_iters=0
    )
    found: dict[str, dict[str, Any]] = results["results"]
    return found


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_two_of_the_harnesss_tasks_score_as_the_backbone_with_the_adapter_disabled(
    make: Callable[..., MemlayerLM], loaded: Backbone, tasks: TaskManager
) -> None:
    bare = HFLM(
        pretrained=loaded.model, tokenizer=loaded.tokenizer, max_length=WINDOW, batch_size=1
    )
    expected, found = scores(bare, tasks), scores(make("backbone"), tasks)
    assert set(found) == {"own_wikitext", "own_sst2"}
    assert found == expected
    assert scores(make("memory"), tasks)["own_wikitext"] != found["own_wikitext"]


def requests_of(*pairs: tuple[str, str]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number)
        for number, pair in enumerate(pairs)
    ]


def expected_beyond(
    model: LongMemModel, tokenizer: Any, context: str, continuation: str, longest: int
) -> float:
    """Memorize all but the window, and score the continuation by a plain forward."""
    ids = tokenizer(context, return_tensors="pt").input_ids
    own = tokenizer(continuation, return_tensors="pt").input_ids
    room = WINDOW - longest
    model.memory.clear()
    model.memorize(ids[:, :-room])
    whole = torch.cat([ids[:, -room:], own], dim=1)
    logits = model(whole).logits[0, -own.shape[1] - 1 : -1].double()
    model.memory.clear()
    return -float(functional.cross_entropy(logits, own[0], reduction="sum"))


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 4])
def test_context_beyond_the_window_is_read_from_memory(
    make: Callable[..., MemlayerLM], model: LongMemModel, loaded: Backbone, batch_size: int
) -> None:
    pairs = [
        ("a short one", " indeed"),
        (TEXTS[0], " Argo"),
        (TEXTS[0], " rowers"),
        (TEXTS[1], " Argo"),
        ("another short one", " too"),
    ]
    found = make(batch_size=batch_size).loglikelihood(requests_of(*pairs), disable_tqdm=True)
    for number, longest in ((1, 7), (2, 7), (3, 5)):
        expected = expected_beyond(model, loaded.tokenizer, *pairs[number], longest)
        assert found[number][0] == pytest.approx(expected, abs=1e-3)
    # Those within the window have nothing in memory, whatever was read before them.
    without = make("no_memory").loglikelihood(requests_of(*pairs), disable_tqdm=True)
    for number in (0, 4):
        assert found[number][0] == pytest.approx(without[number][0], abs=1e-4)
    assert abs(found[1][0] - without[1][0]) > 1e-3


@torch.no_grad()
def test_a_rolling_score_is_that_of_its_windows_with_memory(
    make: Callable[..., MemlayerLM], model: LongMemModel, loaded: Backbone
) -> None:
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS]
    found = make().loglikelihood_rolling(asked, disable_tqdm=True)
    for text, total in zip(TEXTS, found, strict=True):
        ids = loaded.tokenizer(text, return_tensors="pt").input_ids
        model.memory.clear()
        expected, before = 0.0, torch.tensor([[loaded.tokenizer.eos_token_id]])
        for window in ids.split(WINDOW, dim=1):
            logits = model(torch.cat([before, window[:, :-1]], dim=1)).logits[0].double()
            expected -= float(functional.cross_entropy(logits, window[0], reduction="sum"))
            model.memorize(window)
            before = window[:, -1:]
        assert total == pytest.approx(expected, abs=2e-3)
    model.memory.clear()


@torch.no_grad()
def test_generation_goes_on_from_a_context_of_any_length(
    make: Callable[..., MemlayerLM], model: LongMemModel, loaded: Backbone
) -> None:
    from lm_eval.api.instance import Instance

    settings = {"max_gen_toks": 8, "until": ["\n"], "do_sample": False}
    asked = [Instance("generate_until", {}, (text, settings), 0) for text in (TEXTS[0], "short")]
    found = make().generate_until(asked, disable_tqdm=True)
    for text, written in zip((TEXTS[0], "short"), found, strict=True):
        ids = loaded.tokenizer(text, return_tensors="pt").input_ids
        whole = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        plain = loaded.tokenizer.decode(whole, skip_special_tokens=True)
        assert written == plain.split("\n")[0]


def test_the_models_own_memory_is_neither_read_nor_changed(
    make: Callable[..., MemlayerLM], model: LongMemModel
) -> None:
    pairs = requests_of((TEXTS[0], " Argo"), ("short", " one"))
    before = make().loglikelihood(pairs, disable_tqdm=True)
    model.memorize(torch.arange(50).unsqueeze(0))
    assert make().loglikelihood(pairs, disable_tqdm=True) == before
    assert model.memory.lengths.tolist() == [50]


def test_what_cannot_be_is_refused(make: Callable[..., MemlayerLM], model: LongMemModel) -> None:
    with pytest.raises(ConfigError, match=r"condition must be one of memory, .* got 'off'"):
        make("off")
    with pytest.raises(ConfigError, match="give either a checkpoint, or a model and its tokenizer"):
        MemlayerLM()
    with pytest.raises(ConfigError, match="tokenizer None"):
        MemlayerLM(model=model)
    for batch_size in ("auto", 0, "auto:4"):
        with pytest.raises(ConfigError, match="batch_size must be a whole number, at least 1, got"):
            make(batch_size=batch_size)
    with pytest.raises(ConfigError, match="more than the 80 tokens of a continuation, got 64"):
        make().loglikelihood(requests_of((TEXTS[0], "x" * 80)), disable_tqdm=True)


def test_the_command_line_knows_the_model_by_its_name(model: LongMemModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "run")
    data = tmp_path / "pages.jsonl"
    data.write_text(json.dumps({"page": TEXTS[0]}) + "\n", encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "pages.yaml").write_text(
        f"task: pages\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\n"
        "doc_to_target: '{{page}}'\nmetric_list: [{metric: bits_per_byte}]\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "memlayer.integrations.lm_eval", "run", "--model", "memlayer"]
    arguments = f"checkpoint={tmp_path / 'run'},memory_size=512"
    task = ["--tasks", "pages", "--include_path", str(tmp_path / "tasks")]
    result = subprocess.run(
        [*command, "--model_args", arguments, *task, "--device", "cpu"],
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "bits_per_byte" in result.stdout
