"""Model folders (``config.json`` and ``model.safetensors``), tensor files, the byte tokenizer.

All files are read and written by the C++ library: one parser, atomic writes, no pickle.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import _C
from .nn import LanguageModel

PathLike = str | os.PathLike[str]


def load_model(path: PathLike, dtype: torch.dtype = torch.float32, **changes: Any) -> LanguageModel:
    """Reads a model folder. The model is in evaluation mode.

    Args:
        path: the folder.
        dtype: of the weights in memory; files in bf16 or fp16 are widened.
        **changes: keys of the configuration that shall differ from the folder's, of those that no
            weights depend on: `fast_head=True` gives a trained model a memory at its head.

    Raises:
        FileError: a missing or malformed file.
        Error: a configuration that is not valid.
        StateMismatch: naming the tensors that are missing, of another shape, or not known.
    """
    return LanguageModel.from_native(_C.LanguageModel.load(path, dtype, json.dumps(changes)))


def save_model(path: PathLike, model: LanguageModel, dtype: torch.dtype | None = None) -> None:
    """Writes a model folder; creates it if needed. Each file is replaced atomically.

    Args:
        path: the folder.
        model: a model with exactly the parameters that its configuration says.
        dtype: of the weights in the file; the model's own unless given.

    Raises:
        FileError: naming the path and the cause.
        StateMismatch: naming a tensor that the configuration does not have.
    """
    _C.LanguageModel.from_tensors(model.config.to_json(), model.state_dict()).save(path, dtype)


def load_tensors(path: PathLike) -> dict[str, Tensor]:
    """Reads all tensors of a safetensors file.

    Raises:
        FileError: the file is missing or malformed.
    """
    return _C.load_tensors(path)


def load_metadata(path: PathLike) -> dict[str, str]:
    """Reads the metadata of a safetensors file."""
    return _C.load_metadata(path)


def save_tensors(
    path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file, atomically: if it fails, an older file stays whole.

    Raises:
        FileError: naming the path and the cause.
    """
    _C.save_tensors(path, dict(tensors), dict(metadata or {}))


def write_text(path: PathLike, text: str) -> None:
    """Writes a text file (UTF-8), atomically: if it fails, an older file stays whole.

    Raises:
        FileError: naming the path and the cause.
    """
    _C.write_text(path, text)


class ByteTokenizer:
    """Text as bytes: token i is byte i.

    Every sequence of tokens decodes; bytes that are no UTF-8 survive as surrogate escapes.
    """

    vocabulary_size: int = _C.ByteTokenizer.vocabulary_size

    def __init__(self) -> None:
        self._native = _C.ByteTokenizer()

    def encode(self, text: str | bytes) -> Tensor:
        """Tokens, int64 [T], of a text."""
        if isinstance(text, str):
            text = text.encode("utf-8", "surrogateescape")
        return self._native.encode(text)

    def decode(self, tokens: Tensor) -> str:
        """The text of int64 tokens [T].

        Raises:
            Error: naming an id that is no byte, and its position.
        """
        return self._native.decode(tokens).decode("utf-8", "surrogateescape")


__all__ = [
    "ByteTokenizer",
    "load_metadata",
    "load_model",
    "load_tensors",
    "save_model",
    "save_tensors",
    "write_text",
]
