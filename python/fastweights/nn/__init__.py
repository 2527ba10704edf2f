"""The layers as ``torch.nn.Module``: the same classes, parameter names and arithmetic as in C++.

Projections are ordinary ``torch.nn.Linear`` children and are called as such, so that hooks, LoRA,
quantisation and FSDP work on them; what lies between them is one operator of `fastweights.ops`.
States are immutable named tuples that go in and come out.
"""

from .attention import SlidingWindowAttention
from .block import Block
from .config import LanguageModelConfig
from .feed_forward import SwiGLU
from .language_model import LanguageModel, LanguageModelOutput
from .memory import FastWeightMemory
from .normalization import RMSNorm
from .state import AttentionState, BlockState, HeadState, LanguageModelState, MemoryState

__all__ = [
    "AttentionState",
    "Block",
    "BlockState",
    "FastWeightMemory",
    "HeadState",
    "LanguageModel",
    "LanguageModelConfig",
    "LanguageModelOutput",
    "LanguageModelState",
    "MemoryState",
    "RMSNorm",
    "SlidingWindowAttention",
    "SwiGLU",
]
