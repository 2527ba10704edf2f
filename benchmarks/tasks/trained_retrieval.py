"""What training would add to the exact store, which is not trained: two forms, measured.

- *keys*: the 64 numbers by which neighbours are found are made by a trained matrix in place of
  random signs, with a trained temperature and recency, for the likelihood of the mixture.
- *reading*: entries are found again by similarity inside the model, before the last block's
  feed-forward, and read by attention (Memorizing Transformers, arXiv:2203.08913): four heads over
  the 64 nearest of all earlier tokens, with trained queries, keys, values, output and a trained
  influence of similarity and age. The model's own weights stay.

Both are trained on two of the three held-out works and measured on the third, each work in turn:
texts of the kind that is read, which the model never saw. (On the works that it was trained on a
model hardly needs a memory, so that reading learns little there.) That is more than a user could
have, so what is gained here is a bound.

Needs data/plays (scripts/fetch-texts). Run from the project's root:

    python benchmarks/tasks/trained_retrieval.py
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm, trange

import fastweights
from fastweights import ExactStore
from fastweights.nn import LanguageModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import Record, save_record
from works import read_works

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "trained_retrieval.json"
KEY_SIZE, NEIGHBOURS, READ_NEIGHBOURS = 64, 128, 64
TEMPERATURE, RECENCY = 0.033, 0.5  # of the store
PIECE = 512
HEADS, HEAD_SIZE = 4, 64
NEVER = -9.0  # a cosine that none has
Row = dict[str, Any]


class Work(NamedTuple):
    """A text, and what the model had at each of its bytes before it came."""

    tokens: Tensor  # int64 [N]
    mixed: Tensor  # [N, width], the residual stream before the last feed-forward
    hidden: Tensor  # [N, width], the final hidden state
    logits: Tensor  # [N, vocabulary]

    def cut(self, begin: int, end: int) -> Work:
        return Work(*(rows[begin:end] for rows in self))


def read(model: LanguageModel, text: bytes) -> Work:
    """Reads a text with the model."""
    seen: dict[str, list[Tensor]] = {"mixed": [], "hidden": []}
    block: Any = model.blocks[-1]
    hooks = [
        block.feed_forward_norm.register_forward_pre_hook(
            lambda _, inputs: seen["mixed"].append(inputs[0][0])
        ),
        model.norm.register_forward_hook(lambda _, __, output: seen["hidden"].append(output[0])),
    ]
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    logits, state = [], None
    for piece in tqdm(torch.split(tokens, 2048), desc="reading", leave=False):
        output, state = model(piece[None], state)
        logits.append(output[0])
    for hook in hooks:
        hook.remove()
    columns = (seen["mixed"], seen["hidden"], logits)
    # What predicted a byte stands one place before it; before the first there is nothing.
    rows = (torch.cat([each[0].new_zeros(1, each[0].shape[1]), *each])[:-1] for each in columns)
    return Work(tokens, *rows)


class Found(NamedTuple):
    """The nearest earlier entries of some places [n, k], and how near they are."""

    cosine: Tensor
    entry: Tensor
    log_age: Tensor


def nearest(keys: Tensor, begin: int, count: int) -> Found:
    """Of the places from `begin` on: entries before each whose keys (unit, [N, d]) are nearest."""
    places = torch.arange(begin, len(keys))[:, None]
    similarity = keys[begin:] @ keys.T
    similarity = similarity.masked_fill(torch.arange(len(keys))[None] >= places, NEVER)
    cosine, entry = similarity.topk(min(count, len(keys)), 1)
    return Found(cosine, entry, (places - entry).clamp(min=1).float().log())


# ---- trained keys ------------------------------------------------------------------------------


class Keys(nn.Module):
    """A matrix that makes keys of hidden states, and how neighbours are counted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        signs = torch.sign(torch.randn(width, KEY_SIZE)) / math.sqrt(width)
        self.matrix = nn.Parameter(signs)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(TEMPERATURE)))
        self.recency = nn.Parameter(torch.tensor(RECENCY))
        self.gate = nn.Linear(3, 1)  # the neighbours' weight, in training only
        nn.init.zeros_(self.gate.weight)

    def votes(self, work: Work, begin: int) -> tuple[Tensor, Tensor]:
        """What the neighbours say from `begin` on [n, 256], and the nearest cosine [n]."""
        found = nearest(normalize(work.hidden @ self.matrix, dim=1), begin, NEIGHBOURS)
        score = found.cosine / self.log_temperature.exp() - self.recency * found.log_age
        weight = score.masked_fill(found.cosine < -1, -torch.inf).softmax(1)
        votes = torch.zeros(len(weight), 256)
        return votes.scatter_add(1, work.tokens[found.entry], weight), found.cosine[:, 0]

    def loss(self, work: Work, begin: int) -> Tensor:
        votes, cosine = self.votes(work, begin)
        logits, target = work.logits[begin:], work.tokens[begin:, None]
        certainty, best = votes.max(1)
        model = logits.log_softmax(1).exp()
        agreement = model.gather(1, best[:, None])[:, 0]
        features = torch.stack([certainty, agreement, 5 * (cosine - 0.8)], 1).detach()
        share: Tensor = self.gate(features).sigmoid()
        p = (1 - share) * model.gather(1, target) + share * votes.gather(1, target)
        return -p.clamp(min=1e-9).log().mean()


def mixed_bits(keys: Keys, work: Work) -> float:
    """Bits per byte of model and neighbours, mixed as the store does it (neighbours alone)."""
    columns: list[list[Tensor]] = [[] for _ in range(5)]
    with torch.no_grad():
        for begin in range(PIECE, len(work.tokens), PIECE):
            piece = work.cut(0, begin + PIECE)
            votes, cosine = keys.votes(piece, begin)
            target = piece.tokens[begin:, None]
            model = piece.logits[begin:].softmax(1)
            certainty, best = votes.max(1)
            given = (
                model.gather(1, target)[:, 0],
                votes.gather(1, target)[:, 0],
                certainty,
                model.gather(1, best[:, None])[:, 0],
                cosine,
            )
            for column, values in zip(columns, given, strict=True):
                column.append(values)
    by_model, by_votes, certainty, agreement, cosine = (torch.cat(each) for each in columns)
    bucket = torch.bucketize(certainty, torch.tensor([0.15, 0.3, 0.45, 0.6, 0.8, 0.95])) * 5
    bucket = (bucket + torch.bucketize(agreement, torch.tensor([0.03, 0.1, 0.3, 0.7]))) * 8
    bucket += torch.bucketize(cosine, cosine.quantile(torch.linspace(0, 1, 9)[1:-1]))
    shares, seen, bits = [0.25] * 280, [0] * 280, 0.0
    for b, m, v in zip(bucket.tolist(), by_model.tolist(), by_votes.tolist(), strict=True):
        share = shares[b]
        p = (1 - share) * m + share * v
        bits -= math.log2(p)
        step = max(0.02, 1 / (seen[b] + 2))
        seen[b] += 1
        shares[b] = min(max(share + step * (share * v / p - share), 1e-4), 1 - 1e-4)
    return bits / len(by_model)


# ---- reading by attention ----------------------------------------------------------------------


class Reading(nn.Module):
    """Attention over the nearest earlier entries, whose result joins the residual stream."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = [model]  # in a list: its weights are not trained
        width, inner = model.config.width, HEADS * HEAD_SIZE
        self.projection = torch.randn(width, KEY_SIZE) / math.sqrt(width)  # not trained
        self.query, self.key, self.value = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.token = nn.Embedding(256, inner)
        nn.init.normal_(self.token.weight, 0.0, 0.05)
        self.output = nn.Linear(inner, width, bias=False)
        nn.init.zeros_(self.output.weight)
        self.nothing = nn.Linear(width, HEADS)  # the score of reading nothing
        nn.init.zeros_(self.nothing.weight)
        nn.init.constant_(self.nothing.bias, -3.0)
        self.log_similarity = nn.Parameter(torch.full((HEADS,), -math.log(TEMPERATURE)))
        self.recency = nn.Parameter(torch.full((HEADS,), RECENCY))

    def forward(self, work: Work, begin: int) -> tuple[Tensor, Tensor]:
        """The final hidden states and logits from `begin` on."""
        normed = work.mixed * torch.rsqrt(work.mixed.square().mean(-1, keepdim=True) + 1e-6)
        with torch.no_grad():
            found = nearest(normalize(normed @ self.projection, dim=1), begin, READ_NEIGHBOURS)
        count, entry = len(found.entry), found.entry.flatten()
        after = torch.cat([normed[1:], normed[-1:]])  # an entry's value has read its token

        def heads(x: Tensor) -> Tensor:
            return x.view(count, -1, HEADS, HEAD_SIZE)

        query, key = heads(self.query(normed[begin:])), heads(self.key(normed[entry]))
        value = heads(self.value(after[entry]) + self.token(work.tokens[entry]))
        near = (found.cosine - found.cosine[:, :1])[..., None] * self.log_similarity.exp()
        score = (query * key).sum(-1) / math.sqrt(HEAD_SIZE) + near
        score = score - self.recency * found.log_age[..., None]
        nothing = self.nothing(normed[begin:])[:, None]
        weight = torch.cat([score, nothing], 1).softmax(1)[:, :-1]
        read = torch.einsum("nkh,nkhd->nhd", weight, value).flatten(1)
        return self.finish(work.mixed[begin:] + self.output(read))

    def finish(self, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """What the model makes of the residual stream before its last feed-forward."""
        (model,) = self.model
        block: Any = model.blocks[-1]
        hidden = model.norm(mixed + block.feed_forward(block.feed_forward_norm(mixed)))
        return hidden, hidden @ model.embedding.weight.T

    def loss(self, work: Work, begin: int) -> Tensor:
        return cross_entropy(self(work, begin)[1], work.tokens[begin:])


def read_bits(reading: Reading, work: Work) -> dict[str, float]:
    """Bits per byte with and without reading, each alone and in front of an exact store."""
    bits = dict.fromkeys(("model", "model, store", "reading", "reading, store"), 0.0)
    stores = {name: ExactStore(work.hidden.shape[1], 256) for name in ("model", "reading")}
    with torch.no_grad():
        for begin in trange(PIECE, len(work.tokens), PIECE, desc="measuring", leave=False):
            piece = work.cut(0, begin + PIECE)
            tokens = piece.tokens[begin:]
            results = {
                "model": (piece.hidden[begin:], piece.logits[begin:]),
                "reading": reading(piece, begin),
            }
            for name, (hidden, logits) in results.items():
                by_store = stores[name].read(tokens, hidden.contiguous(), logits.contiguous())
                bits[name] += cross_entropy(logits, tokens, reduction="sum").item()
                bits[name + ", store"] -= by_store.gather(1, tokens[:, None]).sum().item()
    scale = 1 / (math.log(2.0) * (len(work.tokens) - PIECE))
    return {name: nats * scale for name, nats in bits.items()}


# ---- training ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """How long and how fast."""

    steps: int
    rate: float
    places: int  # of a step


def train(module: Keys | Reading, works: list[Work], plan: Training, name: str) -> None:
    """AdamW on stretches of the works, each with up to 131,072 bytes before it."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, plan.rate, betas=(0.9, 0.95), weight_decay=0.01)
    for step in trange(plan.steps, desc=name, leave=False):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / plan.steps)
        optimizer.param_groups[0]["lr"] = plan.rate * min(1.0, (step + 1) / 50) * cosine
        work = works[int(torch.randint(len(works), (1,)))]
        begin = int(torch.randint(4096, len(work.tokens) - plan.places, (1,)))
        first = max(0, begin - int(2 ** (12 + 5 * torch.rand(1).item())))
        loss = module.loss(work.cut(first, begin + plan.places), begin - first)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "reader")
    parser.add_argument("--held-out", type=Path, default=ROOT / "data" / "plays" / "held_out")
    parser.add_argument("--bytes", type=int, default=60_000, help="of the work that is measured")
    parser.add_argument("--steps", type=int, default=400, help="of training, for each form")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = fastweights.load_model(arguments.model, fast_head=False).eval().requires_grad_(False)
    texts = read_works(arguments.held_out, least=2)
    with torch.no_grad():
        works = {name: read(model, text) for name, text in texts.items()}
    rows: list[Row] = []
    for name, work in works.items():
        others = [each for other, each in works.items() if other != name]
        measured = work.cut(0, arguments.bytes)
        keys, reading = Keys(model.config.width), Reading(model)
        bits = {"neighbours, random keys": mixed_bits(keys, measured)}
        train(keys, others, Training(arguments.steps, 1e-3, 192), "training keys")
        bits["neighbours, trained keys"] = mixed_bits(keys, measured)
        train(reading, others, Training(arguments.steps, 2e-3, 512), "training reading")
        bits |= read_bits(reading, measured)
        for variant, value in bits.items():
            rows.append({"work": name, "variant": variant, "bits_per_byte": round(value, 4)})
            print(f"{name:22} {variant:26} {value:.4f}", flush=True)
        save_record(arguments.output, Record("The exact store and what is trained", rows))


if __name__ == "__main__":
    main()
