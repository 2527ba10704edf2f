"""Language models of equal size with random weights: ours and the peers', behind one interface.

Eight layers of width 512 and a vocabulary of the 256 bytes everywhere, so that all spend their
parameters, some 27 million, on layers. As a program it measures one cold start:

    python benchmarks/speed/language_models.py NAME FOLDER DTYPE THREADS
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

WIDTH = 512
LAYERS = 8
VOCABULARY = 256
PACKAGES = ["rwkv>=0.8.30", "transformers>=5.2"]


class LanguageModel(Protocol):
    """A model that reads and decodes with its own means, in evaluation mode."""

    def read(self, text: bytes) -> None:
        """Reads a text, keeping what it needs to go on."""

    def decode(self, tokens: int) -> None:
        """Goes on greedily, token by token."""

    @property
    def parameters(self) -> int:
        """Number of weights."""


@dataclass(frozen=True)
class Trainable:
    """A model as a PyTorch module, and its logits for tokens [B, T]."""

    module: torch.nn.Module
    logits: Callable[[Tensor], Tensor]


# ---- fastweights


def fastweights_config() -> Any:
    from fastweights.nn import LanguageModelConfig

    return LanguageModelConfig(
        width=WIDTH,
        layers=LAYERS,
        feed_forward_width=640,
        attention_heads=8,
        memory_heads=8,
        memory_value_heads=8,
        memory_key_size=64,
        memory_value_size=64,
        vocabulary_size=VOCABULARY,
    )


class Fastweights:
    """A Session of this library."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        import fastweights

        self._model = fastweights.load_model(folder / "fastweights", dtype=dtype)
        self._native = self._model.native()
        self._session = fastweights.Session(self._native)

    @staticmethod
    def make(folder: Path) -> None:
        import fastweights

        torch.manual_seed(0)
        model = fastweights.nn.LanguageModel(fastweights_config())
        fastweights.save_model(folder / "fastweights", model)

    @staticmethod
    def trainable(folder: Path, dtype: torch.dtype) -> Trainable:
        import fastweights

        model = fastweights.load_model(folder / "fastweights").to(dtype).train()

        def logits(tokens: Tensor) -> Tensor:
            output: Tensor | None = model(tokens).logits
            assert output is not None
            return output

        return Trainable(model.requires_grad_(), logits)

    def read(self, text: bytes) -> None:
        self._session.read(text)

    def decode(self, tokens: int) -> None:
        self._session.write(max_tokens=tokens, temperature=0.0)

    @property
    def parameters(self) -> int:
        return self._model.parameter_count()


# ---- RWKV-7 in the package rwkv


def rwkv7_weights() -> dict[str, Tensor]:
    """Random weights under the names and in the shapes of RWKV-7 (heads of 64)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator) * (0.5 / math.sqrt(size[-1]))

    heads, hidden = WIDTH // 64, 4 * WIDTH
    ranks = {"w": 64, "a": 64, "v": 32, "g": 128}
    weights = {"emb.weight": normal(VOCABULARY, WIDTH), "head.weight": normal(VOCABULARY, WIDTH)}
    norms = ["ln_out", "blocks.0.ln0"]
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        norms += [f"{block}.ln1", f"{block}.ln2", f"{block}.att.ln_x"]
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a", "w0", "a0", "v0"):
            weights[f"{block}.att.{name}"] = torch.rand(1, 1, WIDTH, generator=generator)
        weights[f"{block}.att.r_k"] = normal(heads, 64)
        for name, rank in ranks.items():
            weights[f"{block}.att.{name}1"] = normal(WIDTH, rank)
            weights[f"{block}.att.{name}2"] = normal(rank, WIDTH)
        for name in ("receptance", "key", "value", "output"):
            weights[f"{block}.att.{name}.weight"] = normal(WIDTH, WIDTH)
        weights[f"{block}.ffn.x_k"] = torch.rand(1, 1, WIDTH, generator=generator)
        weights[f"{block}.ffn.key.weight"] = normal(hidden, WIDTH)
        weights[f"{block}.ffn.value.weight"] = normal(WIDTH, hidden)
    for name in norms:
        weights[f"{name}.weight"] = torch.ones(WIDTH)
        weights[f"{name}.bias"] = torch.zeros(WIDTH)
    return weights


class Rwkv7:
    """RWKV-7 as the package rwkv runs it, with its TorchScript on."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
        import contextlib
        import io

        from rwkv.model import RWKV

        strategy = "cpu bf16" if dtype == torch.bfloat16 else "cpu fp32"
        with contextlib.redirect_stdout(io.StringIO()), torch.inference_mode():
            self._model = RWKV(model=str(folder / "rwkv7"), strategy=strategy)
        self._count: int = sum(tensor.numel() for tensor in self._model.z.values())
        self._token = 0
        self._state: Any = None

    @staticmethod
    def make(folder: Path) -> None:
        torch.save(rwkv7_weights(), folder / "rwkv7.pth")

    def read(self, text: bytes) -> None:
        with torch.inference_mode():
            logits, self._state = self._model.forward(list(text), None)
            self._token = int(logits.argmax())

    def decode(self, tokens: int) -> None:
        with torch.inference_mode():
            for _ in range(tokens):
                logits, self._state = self._model.forward(self._token, self._state)
                self._token = int(logits.argmax())

    @property
    def parameters(self) -> int:
        return self._count


# ---- Qwen3.5 in transformers


def qwen_config() -> Any:
    from transformers.models.qwen3_5 import Qwen3_5TextConfig

    return Qwen3_5TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=1472,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        tie_word_embeddings=True,
        eos_token_id=None,
    )


class Qwen:
    """Qwen3.5's text model: three gated delta nets to one full attention, the PyTorch path."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from transformers.models.qwen3_5 import Qwen3_5ForCausalLM
        from transformers.utils import logging

        quiet: Any = logging
        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
        kind: Any = Qwen3_5ForCausalLM
        self._model = kind.from_pretrained(folder / "qwen3.5", dtype=dtype).eval()
        self._token = torch.zeros(1, 1, dtype=torch.int64)
        self._cache: Any = None

    @staticmethod
    def make(folder: Path) -> None:
        from transformers.models.qwen3_5 import Qwen3_5ForCausalLM

        torch.manual_seed(0)
        Qwen3_5ForCausalLM(qwen_config()).save_pretrained(folder / "qwen3.5")

    @staticmethod
    def trainable(folder: Path, dtype: torch.dtype) -> Trainable:
        model = Qwen(folder, dtype)._model.train()

        def logits(tokens: Tensor) -> Tensor:
            output: Tensor = model(input_ids=tokens, use_cache=False).logits
            return output

        return Trainable(model, logits)

    def _step(self, tokens: Tensor) -> None:
        output = self._model(
            input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cache = output.past_key_values
        self._token = output.logits[:, -1].argmax(-1, keepdim=True)

    def read(self, text: bytes) -> None:
        self._cache = None
        with torch.inference_mode():
            self._step(torch.tensor([list(text)]))

    def decode(self, tokens: int) -> None:
        with torch.inference_mode():
            for _ in range(tokens):
                self._step(self._token)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._model.parameters())


MODELS: dict[str, Any] = {"fastweights": Fastweights, "rwkv7": Rwkv7, "qwen3.5": Qwen}


def main() -> None:
    name, folder, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    imports = {"fastweights": "fastweights", "rwkv7": "torch", "qwen3.5": "transformers"}
    __import__(imports[name])
    start = time.perf_counter()
    model: LanguageModel = MODELS[name](Path(folder), getattr(torch, dtype))
    loaded = time.perf_counter()
    model.read(b"\n")
    model.decode(1)
    done = time.perf_counter()
    print(json.dumps({"load_seconds": loaded - start, "first_token_seconds": done - loaded}))


if __name__ == "__main__":
    main()
