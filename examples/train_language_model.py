"""Train a byte language model on text files, its memory carried from segment to segment.

python examples/train_language_model.py --texts data/plays/train/*.txt --output build/model
"""

import argparse
import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import fastweights
from fastweights.nn import LanguageModel, LanguageModelConfig


def stream(works: list[Tensor], length: int) -> Iterator[tuple[Tensor, bool]]:
    """Read one work after another in pieces of length + 1 bytes, and say where a work starts."""
    place = random.random()  # in the first work
    while True:
        work = random.choice(works)
        start = int(place * (len(work) - length))
        for offset in range(start, len(work) - length, length):  # the last byte comes again
            yield work[offset : offset + length + 1], offset == start
        place = 0.0


def parameter_groups(model: LanguageModel) -> list[dict[str, object]]:
    """Weight decay for the matrices of projections only."""
    weights = dict(model.named_parameters())
    embedding = weights.pop("embedding.weight")
    matrices = [weights.pop(n) for n in list(weights) if n.endswith(".weight") and "norm" not in n]
    others = [embedding, *weights.values()]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a byte language model on text files.")
    add = parser.add_argument
    add("--texts", type=Path, nargs="+", required=True)
    add("--output", type=Path, required=True, help="model folder")
    add("--steps", type=int, default=1000)
    add("--batch", type=int, default=8, help="rows, each reading its own work")
    add("--segment", type=int, default=512, help="bytes between truncations")
    add("--learning-rate", type=float, default=2.5e-3, help="peak")
    add("--config", type=LanguageModelConfig.from_json, default="{}", help="JSON")
    args = parser.parse_args()
    works = [torch.tensor(list(path.read_bytes())) for path in args.texts]
    if min(map(len, works)) <= args.segment:
        parser.error(f"each text must be longer than a segment of {args.segment} bytes")

    model = LanguageModel(args.config)
    optimizer = torch.optim.AdamW(parameter_groups(model), betas=(0.9, 0.95), fused=True)
    rows = [stream(works, args.segment) for _ in range(args.batch)]
    state = model.initial_state(args.batch)
    for step in range(1, args.steps + 1):
        progress = step / args.steps  # a warm-up over 3%, then a cosine
        rate = min(progress / 0.03, 0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate
        segments, starts = zip(*map(next, rows), strict=True)
        tokens = torch.stack(segments)
        # A work starts with an empty memory; within it the memory of what came before goes on.
        state = state.detach().reset_rows(torch.tensor(starts))
        with torch.autocast("cpu", torch.bfloat16):
            logits, state = model(tokens[:, :-1], state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        print(f"step {step}: {loss.item() / math.log(2):.3f} bits/byte", flush=True)
    fastweights.save_model(args.output, model, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
