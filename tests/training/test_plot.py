import importlib.util
import json
import sys

import pytest

from memlayer.training import plot_curves, train
from memlayer.training.plot import _smooth

STEPS = [
    {"kind": "step", "step": step, "tokens": 512 * step, "loss": 3.0 - 0.01 * step}
    for step in range(1, 61)
]
EVALUATIONS = [
    {
        "kind": "evaluation",
        "step": step,
        "tokens": 512 * step,
        "perplexity_memory_on": 30.0 - 0.03 * step,
        "perplexity_memory_off": 30.0 - 0.02 * step,
        "perplexity_backbone": 30.0,
    }
    for step in (0, 30, 60)
]


@pytest.mark.parametrize("entries", [[], STEPS[:1], STEPS, STEPS + EVALUATIONS])
def test_a_run_of_any_length_gives_a_picture(entries, tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    picture = plot_curves(tmp_path)
    assert picture == tmp_path / "curves.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_curves_are_the_log_against_tokens(tmp_path):
    (tmp_path / "log.jsonl").write_text(
        "".join(json.dumps(entry) + "\n" for entry in STEPS + EVALUATIONS)
    )
    picture = plot_curves(tmp_path, tmp_path / "curves.svg")
    text = picture.read_text(encoding="utf-8")
    for label in ("memory on", "memory off", "backbone alone", "training tokens"):
        assert f"<!-- {label} -->" in text


def test_a_run_ends_with_its_picture(make_model, tokenizer, documents, make_options, tmp_path):
    options = make_options(steps=2)
    result = train(make_model(), tokenizer, documents, documents, options, output=tmp_path / "run")
    assert result.plot == tmp_path / "run" / "curves.png"
    assert result.plot.is_file()


def test_the_running_mean_starts_at_the_first_value_and_keeps_a_constant():
    assert _smooth([2.0, 0.0])[0] == 2.0
    assert _smooth([3.0] * 50) == pytest.approx([3.0] * 50)
    assert _smooth([]) == []


def test_without_matplotlib_a_run_ends_well_and_plotting_says_what_to_install(
    make_model, tokenizer, documents, make_options, tmp_path, monkeypatch
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "memlayer.training.plot.find_spec",
        lambda name: None if name == "matplotlib" else find_spec(name),
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = train(
        make_model(), tokenizer, documents, [], make_options(steps=2), output=tmp_path / "run"
    )
    assert result.plot is None
    with pytest.raises(ImportError, match=r'pip install "memlayer-lm\[plot\]"'):
        plot_curves(result.output)


def test_plotting_touches_no_global_state_of_matplotlib(tmp_path):
    import matplotlib

    before = matplotlib.get_backend(auto_select=False)
    (tmp_path / "log.jsonl").write_text("")
    plot_curves(tmp_path)
    assert matplotlib.get_backend(auto_select=False) == before
