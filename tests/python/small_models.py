"""Small configurations and models for the tests of the layers."""

from typing import Any

import torch

from fastweights.nn import LanguageModel, LanguageModelConfig

SMALL: dict[str, Any] = {
    "vocabulary_size": 50,
    "width": 32,
    "layers": 2,
    "feed_forward_width": 48,
    "attention_heads": 2,
    "attention_window": 8,
    "attention_sinks": 2,
    "memory_heads": 2,
    "memory_value_heads": 4,
    "memory_key_size": 8,
    "memory_value_size": 12,
    "initializer_range": 0.3,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "both": {},
    "delta_rule": {"memory_rule": "delta_rule", "beta_max": 2.0},
    "attention_only": {"memory": False},
    "memory_only": {"attention": False},
    "untied": {"tie_embeddings": False, "convolution_size": 1},
    "no_sinks": {"attention_sinks": 0},
    "fast_head": {"fast_head": True, "fast_head_half_life": 60.0},
}


def small_config(**changes: Any) -> LanguageModelConfig:
    return LanguageModelConfig(**SMALL | changes)


def small_model(variant: str = "both", **changes: Any) -> LanguageModel:
    return LanguageModel(small_config(**VARIANTS[variant] | changes)).eval()


def random_tokens(batch: int, count: int) -> torch.Tensor:
    return torch.randint(SMALL["vocabulary_size"], (batch, count))
