import json
import math
from dataclasses import asdict, dataclass, fields

from .. import _C


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Everything that decides the shapes and the arithmetic of a LanguageModel.

    ``config.json`` holds exactly these keys, and ``"format": "fastweights"``, ``"version": 1``.
    The checks are those of the C++ library: `fastweights.Error` names the key, what it must be and
    what it is.

    Attributes:
        vocabulary_size: number of tokens.
        width: of the residual stream.
        layers: number of blocks.
        feed_forward_width: hidden width of each feed-forward layer.
        attention: whether blocks have attention.
        attention_heads: each of width / attention_heads dimensions, a multiple of 4.
        attention_window: tokens that a token sees, itself included.
        attention_sinks: learned keys and values that every token sees.
        rope_base: base of the rotary frequencies.
        memory: whether blocks have a fast-weight memory.
        memory_rule: "gated_delta_rule" or "delta_rule".
        memory_heads: H, key heads.
        memory_value_heads: HV, a multiple of H.
        memory_key_size: K, 1 to 256.
        memory_value_size: V, 1 to 256.
        convolution_size: W, taps of the short convolution.
        beta_max: the largest write strength, up to 2 (negative eigenvalues).
        half_life_min: shortest half-life of the decay gates when training starts, in tokens.
        half_life_max: longest.
        memory_dropout: probability that a row trains without its memories.
        memory_initial_matrix: whether memories start from learned matrices, not from zero.
        fast_head: whether there is a memory at the head, see `fastweights.ops.fast_head`.
        fast_head_eta: its write strength, up to 2.
        fast_head_half_life: in tokens; 0: nothing is forgotten.
        fast_head_initial_matrix: whether it starts from a learned matrix, not from zero.
        tie_embeddings: whether the output layer is the embedding's transpose.
        dropout: share of the embeddings' and branches' outputs that is missing in training.
        norm_epsilon: of every norm.
        initializer_range: standard deviation of the weights when training starts.
    """

    vocabulary_size: int = 256
    width: int = 256
    layers: int = 4
    feed_forward_width: int = 704
    attention: bool = True
    attention_heads: int = 4
    attention_window: int = 128
    attention_sinks: int = 1
    rope_base: float = 10000.0
    memory: bool = True
    memory_rule: str = "gated_delta_rule"
    memory_heads: int = 4
    memory_value_heads: int = 4
    memory_key_size: int = 64
    memory_value_size: int = 64
    convolution_size: int = 4
    beta_max: float = 1.0
    half_life_min: float = 4.0
    half_life_max: float = 8192.0
    memory_dropout: float = 0.0
    memory_initial_matrix: bool = False
    fast_head: bool = False
    fast_head_eta: float = 0.3
    fast_head_half_life: float = 0.0
    fast_head_initial_matrix: bool = False
    tie_embeddings: bool = True
    dropout: float = 0.0
    norm_epsilon: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        self.to_json()

    @classmethod
    def from_json(cls, text: str) -> "LanguageModelConfig":
        """Reads ``config.json``; keys left out keep their defaults.

        Raises:
            Error: malformed JSON, an unknown key (naming the nearest known one), a value of a wrong
                type or out of its range, another format or a newer version.
        """
        values = json.loads(_C.parse_config(text))
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def to_json(self) -> str:
        """The text of ``config.json``."""
        return _C.parse_config(json.dumps(asdict(self)))

    @property
    def head_size(self) -> int:
        """D, dimensions of an attention head."""
        return self.width // self.attention_heads

    @property
    def key_width(self) -> int:
        """H·K, width of the memory's queries and of its keys."""
        return self.memory_heads * self.memory_key_size

    @property
    def value_width(self) -> int:
        """HV·V, width of the memory's values."""
        return self.memory_value_heads * self.memory_value_size

    @property
    def memory_matrix_shape(self) -> tuple[int, int, int]:
        """[HV, K, V], the fast weights of one layer."""
        return self.memory_value_heads, self.memory_key_size, self.memory_value_size

    @property
    def fast_head_decay(self) -> float:
        """Log-decay of a token at the head."""
        return -math.log(2.0) / self.fast_head_half_life if self.fast_head_half_life else 0.0

    @property
    def residual_range(self) -> float:
        """Initial standard deviation of layers that write into the residual stream.

        There are 2 · layers of them (GPT-2, Radford et al. 2019).
        """
        return self.initializer_range / math.sqrt(2.0 * self.layers)
