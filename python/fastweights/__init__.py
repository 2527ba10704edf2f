"""Fast-weight memories for PyTorch: rules, layers, and sessions that learn while they read.

- `fastweights.ops`: the rules as differentiable operators.
- `fastweights.fla`: the operators by the functions of flash-linear-attention.
- `fastweights.nn`: layers and the language model as torch.nn.Module.
- `fastweights.load_model`, `fastweights.save_model`: model folders, the same in C++ and Python.
- `fastweights.ExactStore`: an exact memory of a text, beside any model.
- `fastweights.Session`: a running model that learns from what it reads and from what it writes.
- `fastweights.write_judged`: writing that a judge says how to learn from.
- `fastweights.SessionPool`: many of them on one model, called from any threads.
"""

import torch

from ._build import TORCH_VERSION, VERSION

if torch.__version__.split(".")[:2] != TORCH_VERSION.split(".")[:2]:
    raise ImportError(
        f"fastweights was built for torch {TORCH_VERSION} and found torch {torch.__version__}: "
        "install that torch, or build fastweights again with this one"
    )

from . import errors, fla, io, nn, ops
from .end_to_end import EndToEndOptions
from .errors import Cancelled, Error, FileError, ShapeError, StateMismatch
from .exact_store import ExactStore, ExactStoreOptions
from .io import load_model, save_model
from .judging import (
    Candidate,
    Fact,
    JudgedPassage,
    Judgement,
    fact_judge,
    likelihood_judge,
    preference_judge,
    write_judged,
)
from .protection import Protection, protect_keys
from .session import Consolidation, ConsolidationTrial, Session
from .session_pool import SessionPool
from .write_policy import SurpriseGate, WritePolicy

__version__ = VERSION

__all__ = [
    "Cancelled",
    "Candidate",
    "Consolidation",
    "ConsolidationTrial",
    "EndToEndOptions",
    "Error",
    "ExactStore",
    "ExactStoreOptions",
    "Fact",
    "FileError",
    "JudgedPassage",
    "Judgement",
    "Protection",
    "Session",
    "SessionPool",
    "ShapeError",
    "StateMismatch",
    "SurpriseGate",
    "WritePolicy",
    "errors",
    "fact_judge",
    "fla",
    "io",
    "likelihood_judge",
    "load_model",
    "nn",
    "ops",
    "preference_judge",
    "protect_keys",
    "save_model",
    "write_judged",
]
