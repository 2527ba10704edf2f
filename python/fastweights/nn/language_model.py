from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import _C, ops
from ..errors import Error, ShapeError, StateMismatch
from ._projection import make_projection, without_initial_values
from .block import Block
from .config import LanguageModelConfig
from .normalization import RMSNorm
from .state import HeadState, LanguageModelState


class LanguageModelOutput(NamedTuple):
    """What LanguageModel.forward returns; unpacks as ``logits, state``."""

    logits: Tensor | None  # [B, T, vocabulary], at least fp32; None if not wanted
    state: LanguageModelState


class LanguageModel(nn.Module):
    """A language model whose blocks join windowed attention and fast-weight memories.

    It carries all it keeps of what it read in an explicit state of fixed size.

    Weights start as in GPT-2 (Radford et al. 2019): normal(0, initializer_range), and layers that
    write into the residual stream divided by √(2 · layers); norms at one; the convolution uniform
    in ±1/√W (PyTorch's Conv1d); gates as FastWeightMemory says.
    """

    def __init__(self, config: LanguageModelConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LanguageModelConfig()
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        nn.init.normal_(self.embedding.weight, 0.0, config.initializer_range)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.output: nn.Linear | None = None
        if not config.tie_embeddings:
            self.output = make_projection(
                config.width, config.vocabulary_size, config.initializer_range
            )
        self.head_initial_matrix: nn.Parameter | None = None
        if config.fast_head and config.fast_head_initial_matrix:
            self.head_initial_matrix = nn.Parameter(
                torch.zeros(config.width, config.vocabulary_size)
            )

    def initial_state(self, batch: int) -> LanguageModelState:
        """The state before the first token.

        It has the weights' type (the fast weights: fp32) and stands on their device.
        """
        position = torch.zeros(batch, dtype=torch.int64, device=self.norm.weight.device)
        return LanguageModelState(
            tuple(block.initial_state(batch) for block in self._blocks()),
            position,
            self._initial_head(batch),
        )

    def forward(
        self,
        tokens: Tensor,
        state: LanguageModelState | None = None,
        *,
        in_place: bool = False,
        logits: bool = True,
        last_logits_only: bool = False,
        memory_keep: Tensor | None = None,
        write_strength: Tensor | None = None,
    ) -> LanguageModelOutput:
        """Reads T ≥ 0 tokens of each row.

        A sequence may come in pieces of any lengths: the result is that of one call, but for
        rounding. Gradients flow through `state`.

        Args:
            tokens: int64 [B, T].
            state: what an earlier call returned, or None at the start.
            in_place: inference only: the state given is overwritten where it can be.
            logits: False if only the state is wanted.
            last_logits_only: logits of the last token only, [B, 1, vocabulary].
            memory_keep: [B, 1, 1], 0 where the row's memories are left out. Without it they are
                drawn in training as `memory_dropout` says; else all are there.
            write_strength: fp32 [B, T], each r in [0, 2]: how strongly each token is learned. In
                every layer β is multiplied by r and limited to 2, up to which a write is stable,
                and g is multiplied by min(r, 1). With 1, as without it, a token is learned as
                trained, to the bit; with 0 it leaves the fast weights as they are, to the bit.
                Values are not checked.

        Raises:
            ShapeError: tokens of a wrong shape or type.
            StateMismatch: the state of another model or batch.
        """
        _check_tokens(tokens)
        if state is None:
            state = self.initial_state(tokens.shape[0])
        elif not torch.compiler.is_compiling():
            self._check_state(state, tokens.shape[0])
        if memory_keep is None:
            memory_keep = self.draw_memory_keep(tokens.shape[0])
        elif memory_keep.shape != (tokens.shape[0], 1, 1):
            raise ShapeError(
                f"language_model: memory_keep must be [B, 1, 1] = [{tokens.shape[0]}, 1, 1], got "
                f"{list(memory_keep.shape)}"
            )
        _check_write_strength(tokens, write_strength)
        x = nn.functional.dropout(self.embedding(tokens), self.config.dropout, self.training)
        blocks = []
        for block, before in zip(self._blocks(), state.blocks, strict=True):
            x, after = block(x, before, state.position, in_place, memory_keep, write_strength)
            blocks.append(after)
        seen = tokens.shape[1]
        position = state.position.add_(seen) if in_place else state.position + seen
        if not self.config.fast_head:
            return LanguageModelOutput(
                self._logits(self.norm(x[:, -1:] if last_logits_only else x)) if logits else None,
                LanguageModelState(tuple(blocks), position),
            )
        y, head = self._correct(self.norm(x), tokens, state.head, in_place, write_strength)
        return LanguageModelOutput(
            (y[:, -1:] if last_logits_only else y) if logits else None,
            LanguageModelState(tuple(blocks), position, head),
        )

    def enable_attention(self, enabled: bool) -> None:
        """Switches the attention of every block on or off (ablation)."""
        for block in self._blocks():
            block.attention_enabled = enabled

    def enable_memory(self, enabled: bool) -> None:
        """Switches the memory of every block on or off (ablation)."""
        for block in self._blocks():
            block.memory_enabled = enabled

    def parameter_count(self) -> int:
        """Number of trainable and frozen weights."""
        return sum(parameter.numel() for parameter in self.parameters())

    def state_bytes(self, batch: int = 1) -> int:
        """Bytes of a state for `batch` rows; does not depend on how much was read."""
        return self.initial_state(1).nbytes * batch

    def native(self) -> _C.LanguageModel:
        """The C++ model on the same weights: they share storage.

        Its forward pass calls no Python, so it refuses a model with hooks or replaced children.

        Raises:
            Error: naming the module that was changed.
        """
        for name, module in self.named_modules():
            _check_unchanged(name, module)
        tensors = {name: parameter.detach() for name, parameter in self.named_parameters()}
        model = _C.LanguageModel.from_tensors(self.config.to_json(), tensors)
        for layer, block in enumerate(self._blocks()):
            model.enable_branches(layer, block.attention_enabled, block.memory_enabled)
        return model

    @classmethod
    def from_native(cls, native: _C.LanguageModel) -> "LanguageModel":
        """The model in Python on the same weights: they share storage. In evaluation mode."""
        with without_initial_values():
            model = cls(LanguageModelConfig.from_json(native.config))
        model.load_state_dict(native.tensors(), assign=True)
        return model.eval()

    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    def _initial_head(self, batch: int) -> HeadState | None:
        config, weight = self.config, self.norm.weight
        if not config.fast_head:
            return None
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if self.head_initial_matrix is None:
            matrix = weight.new_zeros(batch, config.width, config.vocabulary_size, dtype=wide)
        else:
            matrix = self.head_initial_matrix.to(wide).repeat(batch, 1, 1)
        return HeadState(
            matrix,
            weight.new_zeros(batch, config.width),
            weight.new_zeros(batch, config.vocabulary_size, dtype=wide),
        )

    def _correct(
        self,
        x: Tensor,
        tokens: Tensor,
        head: HeadState | None,
        in_place: bool,
        write_strength: Tensor | None,
    ) -> tuple[Tensor, HeadState]:
        """Logits of the normed x, corrected by the memory at the head, which learns `tokens`."""
        assert head is not None
        logits, state, hidden, pending = ops.fast_head(
            x,
            self._logits(x),
            tokens,
            *head,
            eta=self.config.fast_head_eta,
            g=self.config.fast_head_decay,
            strength=write_strength,
            in_place=in_place,
        )
        return logits, HeadState(state, hidden, pending)

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor
        if self.output is not None:
            logits = self.output(x)
        else:
            logits = nn.functional.linear(x, self.embedding.weight)
        return logits if logits.dtype == torch.float64 else logits.float()

    def draw_memory_keep(self, batch: int) -> Tensor | None:
        """Which rows keep their memories in a step of training: [B, 1, 1] of zeros and ones.

        None where all do.
        """
        if not self.training or self.config.memory_dropout == 0.0:
            return None
        keep = self.norm.weight.new_full((batch, 1, 1), 1.0 - self.config.memory_dropout)
        return torch.bernoulli(keep.detach())

    def _check_state(self, state: LanguageModelState, batch: int) -> None:
        if len(state.blocks) != self.config.layers:
            raise StateMismatch(
                f"language_model: the state has {len(state.blocks)} layers, the model "
                f"{self.config.layers}"
            )
        given = state.tensors()
        for name, shape in self._state_shapes(batch).items():
            tensor = given.pop(name, None)
            if tensor is None or tensor.shape != shape:
                raise StateMismatch(
                    f"language_model: state tensor {name} must be {list(shape)}, got "
                    f"{'none' if tensor is None else f'{tensor.dtype} {list(tensor.shape)}'}"
                )
        if given:
            raise StateMismatch(
                f"language_model: state tensor {next(iter(given))} must be none for this model"
            )
        if state.position.dtype != torch.int64:
            raise StateMismatch(
                f"language_model: state tensor position must be int64, got {state.position.dtype}"
            )

    def _state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        config = self.config
        fields: dict[str, tuple[int, ...]] = {}
        if config.memory:
            channels = 2 * config.key_width + config.value_width
            fields["memory.state"] = (
                batch,
                config.memory_value_heads,
                config.memory_key_size,
                config.memory_value_size,
            )
            fields["memory.conv"] = (batch, config.convolution_size - 1, channels)
        if config.attention:
            ring = (batch, config.attention_window, config.attention_heads, config.head_size)
            fields |= {"attention.key": ring, "attention.value": ring}
        layers = {f"layers.{n}.{f}": s for n in range(config.layers) for f, s in fields.items()}
        head: dict[str, tuple[int, ...]] = {}
        if config.fast_head:
            head["head.state"] = (batch, config.width, config.vocabulary_size)
            head["head.hidden"] = (batch, config.width)
            head["head.logits"] = (batch, config.vocabulary_size)
        return layers | head | {"position": (batch,)}


def _check_tokens(tokens: Tensor) -> None:
    if tokens.dim() != 2 or tokens.dtype != torch.int64:
        raise ShapeError(
            f"language_model: tokens must be int64 [B, T], got {tokens.dtype} {list(tokens.shape)}"
        )


def _check_write_strength(tokens: Tensor, strength: Tensor | None) -> None:
    if strength is None:
        return
    if strength.dtype != torch.float32 or strength.shape != tokens.shape:
        raise ShapeError(
            f"language_model: write_strength must be float32 [B, T] = {list(tokens.shape)}, got "
            f"{strength.dtype} {list(strength.shape)}"
        )


def _check_unchanged(name: str, module: nn.Module) -> None:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    known = type(module).__module__.startswith(("fastweights.nn.", "torch.nn.modules."))
    if any(hooks) or not known:
        raise Error(
            f"language_model: module {name or 'LanguageModel'} ({type(module).__name__}) was "
            "replaced or has hooks, which the C++ model would leave out; call the Python model"
        )
