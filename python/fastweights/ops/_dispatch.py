"""Calls into the dispatcher."""

from collections.abc import Callable
from typing import Any

import torch

from .. import _C


def operator(name: str) -> Callable[..., Any]:
    """The operator ``fastweights::name``.

    A compiler traces ``torch.ops``, which loses the types of C++ exceptions; all other calls go
    through the bindings, which keep them.
    """
    eager = _C.operator_(name)
    traced = getattr(torch.ops.fastweights, name)

    def call(*args: Any) -> Any:
        return traced(*args) if torch.compiler.is_compiling() else eager(*args)

    return call
