"""Keys whose associations a session's writes leave alone (docs/write_policies.md)."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import _C

if TYPE_CHECKING:
    from . import nn


class Protection(NamedTuple):
    """Protected directions of the keys of each memory in the blocks.

    A session that has them splits each head's matrix: the part of the matrix that it began with
    that lies in these directions neither decays nor is written into, and every write goes by the
    rest of its key. So what a protected key reads stays what it was, and other keys learn as
    before.
    """

    projectors: list[Tensor]  # of each layer, onto the protected directions: fp32 [HV, K, K]
    least_free: float = 0.05  # a write is refused where less of its key's squared length is free

    def free_ranks(self) -> Tensor:
        """Directions that are free: int64 [layers, HV]."""
        ranks = [each.diagonal(0, -2, -1).sum(-1).round() for each in self.projectors]
        sizes = [each.shape[-1] for each in self.projectors]
        free = [size - rank.to(torch.int64) for size, rank in zip(sizes, ranks, strict=True)]
        return torch.stack(free) if free else torch.zeros(0, 0, dtype=torch.int64)


def protect_keys(
    model: "nn.LanguageModel | _C.LanguageModel",
    text: str | bytes,
    *,
    share: float = 0.9,
    most: int = 0,
    least_free: float = 0.05,
) -> Protection:
    """The protection of the keys that a model makes of a text.

    Args:
        model: the model of the sessions that are to have it.
        text: what it is to keep, for example what a consolidated model learned.
        share: of each head the fewest directions are protected that hold this share of the squared
            length of its keys, in (0, 1].
        most: directions of a head at most, below its key size; 0: half of it.
        least_free: see `Protection`.

    Raises:
        Error: the text is empty, the model has no memories, or an option is out of range.
    """
    from .session import _native, _to_bytes

    return Protection(*_C.protect_keys(_native(model), _to_bytes(text), share, most, least_free))


__all__ = ["Protection", "protect_keys"]
