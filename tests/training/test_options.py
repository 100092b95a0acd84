import pytest

from memlayer.errors import ConfigError
from memlayer.training import TrainingOptions
from memlayer.training.schedule import learning_rate_factor


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 1.5}, "steps must be a whole number, got 1.5"),
        (
            {"tokens": 5},
            "either steps or tokens and None for the other, got steps=500",
        ),
        ({"steps": None}, "either steps or tokens and None for the other, got steps=None"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"gradient_accumulation": -1}, "gradient_accumulation must be at least 1, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"gate_learning_rate": float("nan")}, "gate_learning_rate must be a finite number"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"beta2": 1.0}, "beta2 must be at least 0 and below 1, got 1.0"),
        ({"warmup": 2.0}, "warmup must be at least 0 and below 1, got 2.0"),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm must be above 0, or None for no limit"),
        ({"dtype": "fp16"}, "dtype must be one of fp32, bf16, got 'fp16'"),
        ({"eval_every": 0}, "eval_every must be at least 1, got 0"),
        ({"excerpt_tokens": 0}, "excerpt_tokens must be at least 1, got 0"),
        ({"lead_tokens": 9}, "lead_tokens=9 needs excerpts to lead to; set excerpt_tokens"),
        ({"lead_tokens": -1}, "lead_tokens must be at least 0, got -1"),
        ({"memory_dropout": 1.0}, "memory_dropout must be at least 0 and below 1, got 1.0"),
        ({"eval_tokens": 1}, "eval_tokens must be at least 2, got 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1, got 0"),
    ],
)
def test_a_wrong_option_is_refused_with_its_name_and_value(fields, message):
    with pytest.raises(ConfigError, match=message):
        TrainingOptions(**fields)


def test_options_survive_json():
    options = TrainingOptions(steps=None, tokens=1000, dtype="bf16", eval_every=None)
    assert TrainingOptions.from_dict(options.to_dict()) == options


def test_an_unknown_option_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="unknown keys momentum; known: batch_size, beta1"):
        TrainingOptions.from_dict({"momentum": 0.9})


def test_a_number_of_tokens_is_rounded_up_to_whole_steps():
    options = TrainingOptions(steps=None, tokens=1001, batch_size=2, gradient_accumulation=5)
    assert options.tokens_per_step(10) == 100
    assert options.total_steps(10) == 11


def test_the_learning_rate_rises_to_its_peak_and_falls_in_a_line_to_nearly_nothing():
    factors = [learning_rate_factor(step, steps=10, warmup=0.2) for step in range(1, 11)]
    assert factors[:2] == [0.5, 1.0]
    assert factors[2:] == pytest.approx([8 / 9, 7 / 9, 6 / 9, 5 / 9, 4 / 9, 3 / 9, 2 / 9, 1 / 9])


@pytest.mark.parametrize("steps", [1, 2, 3, 500])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.99])
def test_every_step_of_a_run_of_any_length_learns_something(steps, warmup):
    factors = [
        learning_rate_factor(step, steps=steps, warmup=warmup) for step in range(1, steps + 1)
    ]
    assert max(factors) == 1.0
    assert min(factors) > 0.0
