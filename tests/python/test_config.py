"""The configuration: defaults, JSON, and the checks that it shares with C++."""

import json
from dataclasses import replace
from typing import Any

import pytest

import fastweights
from fastweights import _C
from fastweights.nn import LanguageModelConfig


def test_defaults_are_those_of_cpp() -> None:
    assert LanguageModelConfig().to_json() == _C.parse_config("{}")


def test_json_round_trip() -> None:
    config = LanguageModelConfig(width=128, memory_rule="delta_rule", beta_max=2.0, attention=False)
    values = json.loads(config.to_json())
    assert values["format"] == "fastweights"
    assert values["version"] == 1
    assert LanguageModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width must be from 1 to .*, got 0"),
        ({"layers": -1}, "layers must be .* got -1"),
        ({"width": 250}, "attention_heads must divide width = 250, got 4"),
        ({"width": 264}, "must be a multiple of 4 up to 256, got 66"),
        ({"memory_heads": 3}, "memory_heads must divide memory_value_heads = 4, got 3"),
        ({"memory_key_size": 257}, "memory_key_size must be from 1 to 256, got 257"),
        ({"memory_rule": "hebb"}, 'memory_rule must be .* got "hebb"'),
        ({"beta_max": 2.5}, "beta_max must be .* to 2.0, got 2.5"),
        ({"half_life_max": 1.0}, "half_life_max must be from 4.0 .* got 1.0"),
        ({"memory_dropout": 1.5}, "memory_dropout must be .* got 1.5"),
        ({"dropout": -0.5}, "dropout must be from 0.0 to 0.99, got -0.5"),
        ({"attention": False, "memory": False}, "attention or memory must be true"),
        ({"layers": 2.5}, "layers must be an integer, got 2.5"),
        ({"memory": "yes"}, 'memory must be true or false, got "yes"'),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(fastweights.Error, match=message):
        replace(LanguageModelConfig(), **changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ('{"widht": 3}', 'unknown key "widht"; the nearest known key is "width"'),
        ('{"format": "other"}', "format must be"),
        ('{"version": 2}', "version must be 1, got 2"),
        ('{"width": "wide"}', 'width must be an integer, got "wide"'),
    ],
)
def test_malformed_json(text: str, message: str) -> None:
    with pytest.raises(fastweights.Error, match=message):
        LanguageModelConfig.from_json(text)
