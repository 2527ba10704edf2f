"""How far a result may lie from the fp64 oracle: RMS(error) / RMS(fp64)."""

import math

import torch
from torch import Tensor

OUTPUT_TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.bfloat16: 5e-3,
    torch.float16: 5e-3,
}

GRADIENT_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 8e-3,
    torch.float16: 8e-3,
}

GATE_GRADIENT_TOLERANCE = {**GRADIENT_TOLERANCE, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def relative_error(given: Tensor, expected: Tensor) -> float:
    """RMS(given − expected) / RMS(expected); 0 / 0 is 0."""
    difference, size = rms(given.double() - expected.double()), rms(expected)
    if difference == 0.0:
        return 0.0
    return difference / size if size else math.inf


def assert_near(name: str, given: Tensor, expected: Tensor, tolerance: float) -> None:
    given, expected = given.detach(), expected.detach()
    assert given.shape == expected.shape, f"{name}: {given.shape} instead of {expected.shape}"
    assert torch.isfinite(given).all(), f"{name} is not finite"
    error = relative_error(given, expected)
    near = error <= tolerance or rms(given.double() - expected.double()) <= smallest(given.dtype)
    assert near, f"{name}: relative error {error:.2e} is above {tolerance:.0e}"


def smallest(dtype: torch.dtype) -> float:
    """The smallest positive number of a type: no result can be nearer than that."""
    if not dtype.is_floating_point:
        return 0.0
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
