import torch
from torch import Tensor

from ._dispatch import operator

_rms_norm = operator("rms_norm")
_gated_rms_norm = operator("gated_rms_norm")
_swiglu = operator("swiglu")


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """``x · rsqrt(mean(x²) + eps) · weight`` over the last dimension.

    Computed in fp32, or in fp64 for fp64 inputs (Zhang & Sennrich, arXiv:1910.07467).

    Args:
        x: [..., D].
        weight: [D].
        eps: added to the mean of squares.
        dtype: of the result; x's unless given.
    """
    y: Tensor = _rms_norm(x, weight, eps, dtype)
    return y


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm(x) · weight · silu(gate)``, the output gate of Gated DeltaNet (arXiv:2412.06464).

    Args:
        x: [..., D].
        gate: of x's shape.
        weight: [D].
        eps: added to the mean of squares.
    """
    y: Tensor = _gated_rms_norm(x, gate, weight, eps)
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up`` (Shazeer, arXiv:2002.05202); both of one shape."""
    y: Tensor = _swiglu(gate, up)
    return y
