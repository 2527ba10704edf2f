from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ShapeError, StateMismatch


class MemoryState(NamedTuple):
    """What a FastWeightMemory carries from token to token."""

    state: Tensor  # the fast weights [B, HV, K, V], fp32 (fp64 in a fp64 model)
    conv: Tensor  # the last inputs of the convolution [B, W - 1, 2·H·K + HV·V]


class AttentionState(NamedTuple):
    """What a SlidingWindowAttention carries: rings in which token i stands in slot i % window."""

    key: Tensor  # rotated keys [B, window, heads, D]
    value: Tensor  # [B, window, heads, D]


class BlockState(NamedTuple):
    """The states of a block's branches; None for a branch that it does not have."""

    memory: MemoryState | None = None
    attention: AttentionState | None = None


class HeadState(NamedTuple):
    """What the memory at the head carries.

    Since a token is written when the next one is known, the last one's hidden state and logits
    belong to it.
    """

    state: Tensor  # [B, width, vocabulary], fp32 (fp64 in a fp64 model)
    hidden: Tensor  # [B, width]
    logits: Tensor  # [B, vocabulary], corrected, at least fp32


class LanguageModelState(NamedTuple):
    """All that decides what a LanguageModel predicts next, beside its weights."""

    blocks: tuple[BlockState, ...]
    position: Tensor  # int64 [B], tokens seen
    head: HeadState | None = None  # of a model with a fast head

    @property
    def batch(self) -> int:
        """B, the number of rows."""
        return self.position.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; does not grow with what was read."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def detach(self) -> "LanguageModelState":
        """The same values, cut from the graph: truncates back-propagation through time."""
        return self._map(Tensor.detach)

    def clone(self) -> "LanguageModelState":
        """Copies of all tensors."""
        return self._map(Tensor.clone)

    def to(self, device: torch.device | str) -> "LanguageModelState":
        """The same state on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def reset_rows(self, mask: Tensor) -> "LanguageModelState":
        """A state whose rows where `mask` (bool [B]) is true are as at the start: all zero.

        A model with learned initial matrices starts elsewhere: take its `initial_state` for those
        rows.
        """
        if mask.dtype != torch.bool or mask.shape != (self.batch,):
            raise ShapeError(
                f"reset_rows: mask must be bool [B] = [{self.batch}], got {mask.dtype} "
                f"{list(mask.shape)}"
            )

        def reset(tensor: Tensor) -> Tensor:
            rows = mask.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1))
            return tensor.masked_fill(rows, 0)

        return self._map(reset)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name.

        `layers.N.memory.state`, `layers.N.memory.conv`, `layers.N.attention.key`,
        `layers.N.attention.value` for each layer that has them, `head.state`, `head.hidden`,
        `head.logits` of a model that has a fast head, then `position`.
        """
        return dict(self._named())

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "LanguageModelState":
        """The inverse of `tensors`; any order.

        Raises:
            StateMismatch: an unknown or a missing name.
        """
        rest = dict(tensors)
        if "position" not in rest:
            raise StateMismatch('state: tensor "position" is missing')
        position = rest.pop("position")
        blocks: list[BlockState] = []
        while any(name.startswith(f"layers.{len(blocks)}.") for name in rest):
            blocks.append(_take_block(rest, f"layers.{len(blocks)}."))
        head = _take(rest, "head.", HeadState._fields)
        if rest:
            raise StateMismatch(f'state: unknown tensor "{next(iter(rest))}"')
        return cls(tuple(blocks), position, HeadState(*head) if head else None)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for n, block in enumerate(self.blocks):
            for branch, state in block._asdict().items():
                if state is not None:
                    for field, tensor in state._asdict().items():
                        yield f"layers.{n}.{branch}.{field}", tensor
        if self.head is not None:
            for field, tensor in self.head._asdict().items():
                yield f"head.{field}", tensor
        yield "position", self.position

    def _map(self, function: Callable[[Tensor], Tensor]) -> "LanguageModelState":
        return LanguageModelState(
            tuple(
                BlockState(
                    MemoryState(*map(function, block.memory)) if block.memory else None,
                    AttentionState(*map(function, block.attention)) if block.attention else None,
                )
                for block in self.blocks
            ),
            function(self.position),
            HeadState(*map(function, self.head)) if self.head else None,
        )


def _take(tensors: dict[str, Tensor], prefix: str, fields: tuple[str, ...]) -> list[Tensor] | None:
    """Takes the named fields out of `tensors`: all, or None if there is none of them."""
    names = [prefix + field for field in fields]
    missing = [name for name in names if name not in tensors]
    if len(missing) == len(names):
        return None
    if missing:
        raise StateMismatch(f'state: tensor "{missing[0]}" is missing')
    return [tensors.pop(name) for name in names]


def _take_block(tensors: dict[str, Tensor], prefix: str) -> BlockState:
    memory = _take(tensors, f"{prefix}memory.", MemoryState._fields)
    attention = _take(tensors, f"{prefix}attention.", AttentionState._fields)
    return BlockState(
        MemoryState(*memory) if memory else None,
        AttentionState(*attention) if attention else None,
    )
