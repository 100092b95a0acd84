"""Settings: what is refused, with which words, and that they survive JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from memlayer import LongMemConfig
from memlayer.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 10}, "top_k must be a multiple of chunk_size=4, got 10; .* that fits is 8"),
        ({"top_k": 3}, "top_k must be a multiple of chunk_size=4, got 3; .* that fits is 4"),
        ({"memory_size": 1001}, "memory_size must be a multiple of chunk_size=4, got 1001"),
        ({"memory_size": 32}, "top_k must be at most memory_size, got top_k=64 and memory_size=32"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"segment_length": 1}, "segment_length must be at least 2, got 1"),
        ({"layer_reduction_factor": -2}, "layer_reduction_factor must be at least 1, got -2"),
        ({"memory_distance": -1}, "memory_distance must be at least 0, got -1"),
        ({"recency_bias": 1}, "recency_bias must be True or False, got 1"),
        ({"top_k": 64.0}, "top_k must be a whole number, got 64.0"),
        ({"chunk_size": True}, "chunk_size must be a whole number, got True"),
        ({"side_init": "zero"}, "side_init must be one of replace, identity, backbone, got 'zero'"),
        ({"memory_scope": "all"}, "memory_scope must be one of row, batch, got 'all'"),
        ({"chunk_key": "sum"}, "chunk_key must be one of mean, got 'sum'"),
        ({"backend": ""}, "backend must be a name, got ''"),
        ({"backend_options": 3}, "backend_options must be a mapping, got 3"),
        ({"memory_layers": (3, 1)}, r"layer numbers from 0 in rising order, got \[3, 1\]"),
        ({"memory_layers": (-1,)}, r"layer numbers from 0 in rising order, got \[-1\]"),
        ({"memory_layers": ()}, r"layer numbers from 0 in rising order, got \[\]"),
        ({"memory_layers": "18"}, "memory_layers must be whole numbers, got '18'"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_and_value(settings, message):
    with pytest.raises(ConfigError, match=message):
        LongMemConfig(**settings)


def test_settings_survive_json():
    config = LongMemConfig(memory_layers=[1, 3], backend="hnswlib", backend_options={"m": 8})
    assert LongMemConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.memory_layers == (1, 3)


def test_settings_of_another_version_are_refused():
    values = LongMemConfig().to_dict()
    with pytest.raises(ConfigError, match="unknown keys colour; known: backend, "):
        LongMemConfig.from_dict(values | {"colour": "red"})
    with pytest.raises(ConfigError, match="format_version 2, this memlayer reads 1 to 1"):
        LongMemConfig.from_dict(values | {"format_version": 2})


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LongMemConfig().top_k = 3


@pytest.mark.parametrize(("depth", "layer"), [(24, 17), (30, 21), (12, 8), (4, 2), (2, 0)])
def test_the_default_memory_layer_is_at_three_quarters_of_the_depth(depth, layer):
    assert LongMemConfig().for_depth(depth).memory_layers == (layer,)
