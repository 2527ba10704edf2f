"""Bits that each byte of a text costs, with the memory carried, emptied, or switched off.

The carried reading is what a user gets: a Session. The others run the same weights through the
Python model, many stretches of the text as rows of one batch. So that nothing but the memory
differs, each row first passes over the bytes before its stretch, a window farther than attention
reaches (layers x window): its attention window and short convolution hold what they would hold in
one long run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from intervals import Array

import fastweights
from fastweights.nn import LanguageModel
from fastweights.nn.state import BlockState, HeadState, LanguageModelState, MemoryState

ROWS = 32
Advance = Callable[[int], object]


def reach(model: LanguageModel) -> int:
    """Bytes that attention can see back through all layers."""
    return model.config.layers * model.config.attention_window


def read_carried(
    session: fastweights.Session,
    text: bytes,
    stops: Sequence[int],
    visit: Callable[[int, fastweights.Session], None],
    advance: Advance,
) -> Array:
    """Reads the text with the session; at each of `stops`, `visit` gets a copy of it."""
    bits = []
    for begin, end in zip([0, *stops], [*stops, len(text)], strict=True):
        done = 0

        def progress(position: int, _total: int) -> None:
            nonlocal done
            advance(position - done)
            done = position

        bits.append(session.read_and_score(text[begin:end], progress).numpy().astype(np.float64))
        if end < len(text):
            visit(end, copy.copy(session))
    return np.concatenate(bits)


def read_reset(model: LanguageModel, text: bytes, period: int, advance: Advance) -> Array:
    """The fast weights are emptied at every multiple of `period`; the attention window goes on."""
    return _read_rows(model, text, period, advance, resets=True)


def window_only(folder: Path) -> LanguageModel:
    """The model without a memory at its head, and with those of its blocks switched off."""
    model = fastweights.load_model(folder, fast_head=False)
    model.enable_memory(False)
    return model


def read_off(model: LanguageModel, text: bytes, advance: Advance) -> Array:
    """Reads with a model that has no memory left: attention window only (see `window_only`)."""
    return _read_rows(model, text, model.config.attention_window, advance, resets=False)


def _read_rows(
    model: LanguageModel, text: bytes, period: int, advance: Advance, *, resets: bool
) -> Array:
    step = model.config.attention_window
    assert period % step == 0
    stretch = -(-len(text) // (ROWS * period)) * period
    rows = -(-len(text) // stretch)
    warm = reach(model) + step
    tokens = _cut(text, rows, stretch, warm)
    bits = np.zeros((rows, stretch))
    with torch.inference_mode():
        state = model.initial_state(rows)
        before = torch.zeros(rows, 1, model.config.vocabulary_size)
        for at in range(-warm, stretch, step):
            if at == 0:
                state, before = _start_first_row(state, before)
            if resets and at % period == 0:
                state = _without_fast_weights(state)
            piece = tokens[:, warm + at : warm + at + step]
            logits, state = model(piece, state)
            if at >= 0:
                ahead = torch.cat([before, logits[:, :-1]], dim=1)
                bits[:, at : at + step] = _bits(ahead, piece)
                advance(min(step * rows, len(text)))
            before = logits[:, -1:]
    return bits.reshape(-1)[: len(text)]


def _cut(text: bytes, rows: int, stretch: int, warm: int) -> torch.Tensor:
    """Rows of `warm + stretch` tokens, overlapping by `warm`; zeros where there is no text."""
    padded = bytes(warm) + text + bytes(rows * stretch - len(text))
    flat = torch.frombuffer(bytearray(padded), dtype=torch.uint8).long()
    return flat.unfold(0, warm + stretch, stretch)


def _start_first_row(
    state: LanguageModelState, before: torch.Tensor
) -> tuple[LanguageModelState, torch.Tensor]:
    """The first row begins with the text: what it passed over was padding."""
    first = torch.arange(state.batch) == 0
    return state.reset_rows(first), before.masked_fill(first.view(-1, 1, 1), 0.0)


def _without_fast_weights(state: LanguageModelState) -> LanguageModelState:
    head = HeadState(*map(torch.zeros_like, state.head)) if state.head else None
    return state._replace(blocks=tuple(map(_emptied, state.blocks)), head=head)


def _emptied(block: BlockState) -> BlockState:
    if block.memory is None:
        return block
    memory = MemoryState(torch.zeros_like(block.memory.state), block.memory.conv)
    return block._replace(memory=memory)


def _bits(logits: torch.Tensor, tokens: torch.Tensor) -> Array:
    log_p = torch.log_softmax(logits, dim=-1).gather(2, tokens.unsqueeze(2)).squeeze(2)
    bits: Array = -log_p.double().numpy() / np.log(2.0)
    return bits
