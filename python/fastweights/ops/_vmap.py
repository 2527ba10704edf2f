"""Batching rules of the rules' operators for torch.vmap: the mapped axis becomes part of B."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C


def _fold(argument: Any, dim: int | None, size: int) -> Any:
    """Joins the mapped axis with B, the first axis; tensors that are not mapped are repeated."""
    if not isinstance(argument, Tensor):
        return argument
    mapped = argument.unsqueeze(0).expand(size, *argument.shape) if dim is None else argument
    return mapped.movedim(dim or 0, 0).flatten(0, 1)


def _unfold(result: Tensor, size: int) -> tuple[Tensor, int | None]:
    if result.dim() < 2:  # an output that was not asked for
        return result, None
    return result.reshape(size, result.shape[0] // size, *result.shape[1:]), 0


def _batched(name: str) -> Callable[..., tuple[tuple[Tensor, ...], tuple[int | None, ...]]]:
    operator = _C.operator_(name)
    schema = getattr(torch.ops.fastweights, name).default._schema
    names = [argument.name for argument in schema.arguments]

    def run(
        info: Any, in_dims: Sequence[int | None], *args: Any, **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        values = dict(zip(names, args, strict=False)) | kwargs
        if values.get("cu_seqlens") is not None:
            raise NotImplementedError(
                f"{name}: torch.vmap maps over a batch axis, which packed input (cu_seqlens) does "
                "not have; call it without torch.vmap"
            )
        dims = dict(zip(names, in_dims, strict=False))
        folded = {
            key: _fold(value, dims.get(key), info.batch_size) for key, value in values.items()
        }
        results = operator(**folded)
        tensors, out_dims = zip(*(_unfold(x, info.batch_size) for x in results), strict=True)
        return tensors, out_dims

    return run


def register_vmap(*names: str) -> None:
    """Lets torch.vmap map the operators ``fastweights::name`` over any axis of any argument."""
    for name in names:
        torch.library.register_vmap(f"fastweights::{name}", _batched(name))
