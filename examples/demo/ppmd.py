"""Bits that PPMd needs for the same text: the peer that a language model has to beat."""

from __future__ import annotations

import numpy as np
from intervals import Array

ORDER = 8
MEMORY = 1 << 30
PIECE = 4096


def ppmd_bits(prime: bytes, text: bytes) -> Array | None:
    """Bits of each piece of PIECE bytes after `prime`, by PPMd variant I; None without pyppmd."""
    try:
        import pyppmd
    except ImportError:
        return None
    encoder = pyppmd.Ppmd8Encoder(ORDER, MEMORY)
    encoder.encode(prime)
    pieces = [text[at : at + PIECE] for at in range(0, len(text), PIECE)]
    coded = [len(encoder.encode(piece)) for piece in pieces]
    coded[-1] += len(encoder.flush())
    return 8.0 * np.array(coded, dtype=np.float64)
