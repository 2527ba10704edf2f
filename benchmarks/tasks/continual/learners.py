"""Ways of learning from what was read, behind one interface.

A learner reads texts one after the other and answers questions at any time. Those that take
gradient steps change the weights and carry no state; the others carry a state and leave the weights
alone. Answering and scoring never teach a learner anything: both happen on a copy.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

import fastweights
from baselines.rwkv7 import RWKV7, RWKV7State
from fastweights.nn import LanguageModel, LanguageModelState

PIECE = 1024
LN_2 = math.log(2.0)
Model = LanguageModel | RWKV7
State = LanguageModelState | RWKV7State
S = TypeVar("S", LanguageModelState, RWKV7State)


class Learner(Protocol):
    """Something that learns from texts."""

    def learn(self, text: bytes) -> None:
        """Reads a text and learns from it."""

    def answer_bits(self, prompts: Sequence[bytes], answers: Sequence[bytes]) -> Tensor:
        """Bits of each answer after each prompt: [prompts, answers]."""

    def text_bits(self, text: bytes) -> float:
        """Bits per byte of a text from here on."""


def to_tokens(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.int64)[None]


def row_bits(model: Model, state: State | None, rows: Tensor) -> Tensor:
    """−log2 p of each token but the first: [B, T − 1]."""
    logits = model(rows, state).logits
    assert logits is not None
    log_p = torch.log_softmax(logits[:, :-1], -1)
    return log_p.gather(2, rows[:, 1:, None]).squeeze(2) / -LN_2


def repeated(state: S, count: int) -> S:
    """One row's state for `count` rows."""
    tensors = {name: torch.cat([tensor] * count) for name, tensor in state.tensors().items()}
    return type(state).from_tensors(tensors)


@torch.no_grad()
def answer_bits(
    model: Model,
    state: State | None,
    prompts: Sequence[bytes],
    answers: Sequence[bytes],
) -> Tensor:
    """Bits of each answer after each prompt [prompts, answers]; answers are equally long."""
    candidates = torch.cat([to_tokens(answer) for answer in answers])
    out = []
    for prompt in prompts:
        logits, after = model(to_tokens(prompt), state, last_logits_only=True)
        first = torch.log_softmax(logits[0, -1], 0)[candidates[:, 0]] / -LN_2
        rest = row_bits(model, repeated(after, len(answers)), candidates)
        out.append(first + rest.sum(1))
    return torch.stack(out)


@torch.no_grad()
def text_bits(model: Model, state: State | None, text: bytes) -> float:
    """Bits per byte of a text; its first byte is given."""
    total = 0.0
    tokens = to_tokens(text)
    for begin in range(0, tokens.shape[1] - 1, PIECE):
        piece = tokens[:, begin : begin + PIECE + 1]
        total += float(row_bits(model, state, piece).sum())
        state = model(piece[:, :-1], state, logits=False).state
    return total / (tokens.shape[1] - 1)


# ---- learners that carry a state


class Frozen:
    """Learns nothing: each question meets the model as it was trained."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def learn(self, text: bytes) -> None:
        """Nothing."""

    def answer_bits(self, prompts: Sequence[bytes], answers: Sequence[bytes]) -> Tensor:
        return answer_bits(self.model, None, prompts, answers)

    def text_bits(self, text: bytes) -> float:
        return text_bits(self.model, None, text)


class Carried(Frozen):
    """Carries the state: attention window and fast weights, or RWKV-7's token shifts and matrices.

    `window_only` empties the fast weights.
    """

    def __init__(self, model: Model, window_only: bool = False) -> None:
        super().__init__(copy.deepcopy(model))
        if window_only:
            assert isinstance(self.model, LanguageModel)
            self.model.enable_memory(False)
        self.state = self.model.initial_state(1)

    @torch.no_grad()
    def learn(self, text: bytes) -> None:
        for piece in torch.split(to_tokens(text), PIECE, 1):
            self.state = self.model(piece, self.state, logits=False).state

    def answer_bits(self, prompts: Sequence[bytes], answers: Sequence[bytes]) -> Tensor:
        return answer_bits(self.model, self.state, prompts, answers)

    def text_bits(self, text: bytes) -> float:
        return text_bits(self.model, self.state, text)


class CarriedWithStore(Carried):
    """Carries the state and an exact store, which finds again what was read and speaks along."""

    model: LanguageModel
    state: LanguageModelState

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model)
        config = model.config
        self.store = fastweights.ExactStore(config.width, config.vocabulary_size)
        self.hidden = torch.zeros(1, config.width)  # at the last token
        self.logits = torch.zeros(1, config.vocabulary_size)
        self.seen: list[Tensor] = []
        self.model.norm.register_forward_hook(lambda _module, _given, out: self.seen.append(out))

    def advance(
        self, tokens: Tensor, state: LanguageModelState
    ) -> tuple[Tensor, Tensor, LanguageModelState]:
        """Final hidden states [B, T, D], logits [B, T, N] and the state after `tokens` [B, T]."""
        self.seen.clear()
        logits, after = self.model(tokens, state)
        assert logits is not None
        return self.seen.pop(), logits, after

    @torch.no_grad()
    def learn(self, text: bytes) -> None:
        for piece in torch.split(to_tokens(text), PIECE, 1):
            hidden, logits, self.state = self.advance(piece, self.state)
            self._read(self.store, piece[0], hidden[0], logits[0])
            self.hidden, self.logits = hidden[0, -1:], logits[0, -1:]

    def _read(
        self,
        store: fastweights.ExactStore,
        tokens: Tensor,
        hidden: Tensor,
        logits: Tensor,
        last: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Bits of each token; `last` is the hidden state and the logits before the first one."""
        first_hidden, first_logits = last or (self.hidden, self.logits)
        log_p = store.read(
            tokens,
            torch.cat([first_hidden, hidden[:-1]]),
            torch.cat([first_logits, logits[:-1]]),
        )
        return log_p.gather(1, tokens[:, None]).squeeze(1) / -LN_2

    @torch.no_grad()
    def answer_bits(self, prompts: Sequence[bytes], answers: Sequence[bytes]) -> Tensor:
        candidates = torch.cat([to_tokens(answer) for answer in answers])
        out = []
        for prompt in prompts:
            tokens = to_tokens(prompt)
            hidden, logits, after = self.advance(tokens, self.state)
            store = copy.copy(self.store)
            self._read(store, tokens[0], hidden[0], logits[0])
            last = hidden[0, -1:], logits[0, -1:]
            rows = self.advance(candidates, repeated(after, len(answers)))
            for answer, row_hidden, row_logits in zip(candidates, rows[0], rows[1], strict=True):
                fork = copy.copy(store)
                out.append(self._read(fork, answer, row_hidden, row_logits, last).sum())
        return torch.stack(out).view(len(prompts), len(answers))

    @torch.no_grad()
    def text_bits(self, text: bytes) -> float:
        store, state, last, bits = copy.copy(self.store), self.state, None, []
        for piece in torch.split(to_tokens(text), PIECE, 1):
            hidden, logits, state = self.advance(piece, state)
            bits.append(self._read(store, piece[0], hidden[0], logits[0], last))
            last = hidden[0, -1:], logits[0, -1:]
        return float(torch.cat(bits)[1:].mean())


class InSession:
    """A session reads each text; copies of it are asked."""

    def __init__(self, session: fastweights.Session) -> None:
        self.session = session

    def learn(self, text: bytes) -> None:
        self.session.read(text)

    def answer_bits(self, prompts: Sequence[bytes], answers: Sequence[bytes]) -> Tensor:
        out = []
        for prompt in prompts:
            asked = self.session.fork()
            asked.read(prompt)
            out.append([asked.score(answer) * len(answer) for answer in answers])
        return torch.tensor(out)

    def text_bits(self, text: bytes) -> float:
        return float(self.session.token_bits(text)[1:].mean())


class Consolidated(Frozen):
    """A session reads each text and is consolidated; fresh sessions of the new model are asked.

    So nothing is carried but what the model itself has learned: no attention window, no log. The
    text that was just read is the one that consolidation is tried on, and `guarded` is text that
    the model was trained on. Where consolidation is refused, the session carries on.
    """

    def __init__(self, model: LanguageModel, guarded: bytes) -> None:
        super().__init__(model)
        self.guarded = guarded
        self.session = fastweights.Session(model)
        self.accepted: list[bool] = []  # of each text

    def learn(self, text: bytes) -> None:
        self.session.read(text)
        try:
            consolidated = self.session.consolidate(text, self.guarded)
        except fastweights.Error:
            self.accepted.append(False)
            return
        self.accepted.append(True)
        self.model = consolidated.model
        self.session = fastweights.Session(consolidated.model)


# ---- learners that take gradient steps


class Gradient(Frozen):
    """Fine-tunes all weights on each text, `steps` times; the text is one row."""

    def __init__(
        self, model: LanguageModel, make_optimizer: Callable[..., torch.optim.Optimizer], steps: int
    ) -> None:
        super().__init__(copy.deepcopy(model).requires_grad_())
        self.steps = steps
        self.optimizer = make_optimizer(self.trained())

    def trained(self) -> list[nn.Parameter]:
        """The weights that are trained."""
        return list(self.model.parameters())

    def loss(self, text: bytes) -> Tensor:
        return row_bits(self.model, None, to_tokens(text)).mean()

    def penalty(self) -> Tensor:
        """Added to the loss."""
        return torch.zeros(())

    def texts_of_step(self, text: bytes) -> list[bytes]:
        """What one step learns from."""
        return [text]

    def learn(self, text: bytes) -> None:
        for _ in range(self.steps):
            self.optimizer.zero_grad(set_to_none=True)
            texts = self.texts_of_step(text)
            for each in texts:
                torch.autograd.backward(self.loss(each) / len(texts))
            penalty = self.penalty()
            if penalty.requires_grad:
                torch.autograd.backward(penalty)
            nn.utils.clip_grad_norm_(self.trained(), 1.0)
            self.optimizer.step()


class Replay(Gradient):
    """Fine-tuning in which every step also learns from one earlier text, drawn at random."""

    def __init__(
        self,
        model: LanguageModel,
        make_optimizer: Callable[..., torch.optim.Optimizer],
        steps: int,
        seed: int,
    ) -> None:
        super().__init__(model, make_optimizer, steps)
        self.draw = random.Random(seed)
        self.earlier: list[bytes] = []

    def texts_of_step(self, text: bytes) -> list[bytes]:
        return [text, *([self.draw.choice(self.earlier)] if self.earlier else [])]

    def learn(self, text: bytes) -> None:
        super().learn(text)
        self.earlier.append(text)


class ElasticWeights(Gradient):
    """Elastic weight consolidation (Kirkpatrick et al. 2017): weights that mattered are held.

    The importance of a weight is its mean squared gradient, on base text at first and on each text
    after it was learned; importances add up, and the anchor moves along.
    """

    def __init__(
        self,
        model: LanguageModel,
        make_optimizer: Callable[..., torch.optim.Optimizer],
        steps: int,
        base: bytes,
        strength: float,
    ) -> None:
        super().__init__(model, make_optimizer, steps)
        self.strength = strength
        self.importance = [torch.zeros_like(weight) for weight in self.trained()]
        self.remember(base)

    def remember(self, text: bytes) -> None:
        tokens = [text[i : i + PIECE] for i in range(0, len(text) - 1, PIECE)]
        for piece in tokens:
            self.model.zero_grad(set_to_none=True)
            # The Fisher information is that of a token's log-likelihood in nats.
            torch.autograd.backward(self.loss(piece) * LN_2 * len(piece) ** 0.5)
            for importance, weight in zip(self.importance, self.trained(), strict=True):
                if weight.grad is not None:
                    importance += weight.grad.square() / len(tokens)
        self.anchor = [weight.detach().clone() for weight in self.trained()]

    def penalty(self) -> Tensor:
        terms = zip(self.importance, self.trained(), self.anchor, strict=True)
        sums = [(f * (weight - anchor).square()).sum() for f, weight, anchor in terms]
        return self.strength / 2 * torch.stack(sums).sum()

    def learn(self, text: bytes) -> None:
        super().learn(text)
        self.remember(text)


class LowRank(nn.Module):
    """W + B A, W fixed (LoRA, Hu et al. 2021)."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


class LoRA(Gradient):
    """Fine-tunes a change of low rank of every projection."""

    def __init__(
        self,
        model: LanguageModel,
        make_optimizer: Callable[..., torch.optim.Optimizer],
        steps: int,
        rank: int = 8,
    ) -> None:
        self.rank = rank
        super().__init__(model, make_optimizer, steps)

    def trained(self) -> list[nn.Parameter]:
        parametrize = nn.utils.parametrize
        if not any(parametrize.is_parametrized(module) for module in self.model.modules()):
            self.model.requires_grad_(False)
            for module in list(self.model.modules()):
                if isinstance(module, nn.Linear):
                    low_rank = LowRank(module.weight, self.rank)
                    parametrize.register_parametrization(module, "weight", low_rank)
        return [weight for weight in self.model.parameters() if weight.requires_grad]


class RandomSteps(Frozen):
    """A control: moves the weights at random, as far as another learner moved them."""

    def __init__(self, model: LanguageModel, like: Gradient, seed: int) -> None:
        super().__init__(copy.deepcopy(model))
        self.like = like
        self.before = [weight.detach().clone() for weight in like.model.parameters()]
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def learn(self, text: bytes) -> None:
        """The other learner has learned this text already."""
        own = list(self.model.parameters())
        for index, weight in enumerate(self.like.model.parameters()):
            distance = (weight - self.before[index]).norm()
            step = torch.randn(weight.shape, generator=self.generator)
            own[index].add_(step, alpha=float(distance / step.norm()))
            self.before[index] = weight.detach().clone()


def load_reader(folder: Path, fast_head: bool = False) -> LanguageModel:
    """The model, in evaluation mode."""
    model = fastweights.load_model(folder, fast_head=fast_head)
    return model.eval().requires_grad_(False)
