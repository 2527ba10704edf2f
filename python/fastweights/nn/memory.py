import math

import torch
from torch import Tensor, nn

from .. import ops
from ._projection import make_projection
from .config import LanguageModelConfig
from .state import MemoryState


class FastWeightMemory(nn.Module):
    """The layer that owns a fast-weight matrix per head, written with the (gated) delta rule.

    The arithmetic between the projections is `fastweights.ops.fast_weight_memory`.

    When training starts, a_log is 0 and dt_bias is such that, without an input, the gates of all
    heads of all layers have half-lives spread log-uniformly from `half_life_min` to
    `half_life_max`; each layer has some of every scale. The rule "delta_rule" has no `decay`,
    `a_log` and `dt_bias`.
    """

    def __init__(self, config: LanguageModelConfig, layer: int = 0) -> None:
        """`layer` is which of `config.layers` it is; it decides the first half-lives only."""
        super().__init__()
        self.config = config
        width, std, heads = config.width, config.initializer_range, config.memory_value_heads
        self.query = make_projection(width, config.key_width, std)
        self.key = make_projection(width, config.key_width, std)
        self.value = make_projection(width, config.value_width, std)
        self.beta = make_projection(width, heads, std)
        self.gate = make_projection(width, config.value_width, std)
        self.output = make_projection(config.value_width, width, config.residual_range)
        channels = 2 * config.key_width + config.value_width
        bound = 1.0 / math.sqrt(config.convolution_size)  # PyTorch's own for a Conv1d
        taps = torch.empty(channels, config.convolution_size).uniform_(-bound, bound)
        self.convolution_weight = nn.Parameter(taps)
        self.norm_weight = nn.Parameter(torch.ones(config.memory_value_size))
        self.initial_matrix: nn.Parameter | None = None
        if config.memory_initial_matrix:
            self.initial_matrix = nn.Parameter(torch.zeros(config.memory_matrix_shape))
        self.decay: nn.Linear | None = None
        self.a_log: nn.Parameter | None = None
        self.dt_bias: nn.Parameter | None = None
        if config.memory_rule != "delta_rule":
            self.decay = make_projection(width, heads, std)
            self.a_log = nn.Parameter(torch.zeros(heads))
            self.dt_bias = nn.Parameter(_initial_dt_bias(config, layer))

    def initial_state(self, batch: int) -> MemoryState:
        config = self.config
        weight = self.convolution_weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if self.initial_matrix is None:
            matrix = weight.new_zeros((batch, *config.memory_matrix_shape), dtype=wide)
        else:
            matrix = self.initial_matrix.to(wide).repeat(batch, 1, 1, 1)
        conv = weight.new_zeros(batch, config.convolution_size - 1, weight.shape[0])
        return MemoryState(matrix, conv)

    def forward(
        self,
        x: Tensor,
        state: MemoryState,
        in_place: bool = False,
        write_strength: Tensor | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """Reads x [B, T, width].

        Args:
            x: [B, T, width].
            state: what an earlier call returned.
            in_place: inference only: `state` may be overwritten.
            write_strength: fp32 [B, T], how strongly each token is learned (1 without it).
        """
        config = self.config
        o, matrix, conv = ops.fast_weight_memory(
            self.query(x),
            self.key(x),
            self.value(x),
            self.beta(x),
            self.decay(x) if self.decay is not None else None,
            self.gate(x),
            self.convolution_weight,
            self.a_log,
            self.dt_bias,
            self.norm_weight,
            state.state,
            state.conv,
            heads=config.memory_heads,
            value_heads=config.memory_value_heads,
            beta_max=config.beta_max,
            rule=config.memory_rule,
            eps=config.norm_epsilon,
            in_place=in_place,
            write_strength=write_strength,
        )
        return self.output(o), MemoryState(matrix, conv)


def _initial_dt_bias(config: LanguageModelConfig, layer: int) -> Tensor:
    """The x [HV] for which ``exp(−softplus(x)) = ½^(1 / half-life)``.

    Heads spread the half-lives coarsely, layers finely.
    """
    count = config.memory_value_heads * config.layers
    rank = torch.arange(config.memory_value_heads, dtype=torch.float64) * config.layers + layer
    fraction = rank / (count - 1) if count > 1 else torch.full_like(rank, 0.5)
    ratio = config.half_life_max / config.half_life_min
    half_life = config.half_life_min * ratio**fraction
    return torch.log(torch.expm1(math.log(2.0) / half_life)).float()
