"""Train a byte language model on text files, its memory carried from segment to segment.

    python examples/train_language_model.py --texts data/plays/train/*.txt --output build/model
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import fastweights
from fastweights.nn import LanguageModel, LanguageModelConfig


class Row:
    """Reads one work from front to back, then the next one."""

    def __init__(self, works: list[Tensor]) -> None:
        self.works = works
        self.work = random.choice(works)
        self.offset = random.randrange(len(self.work))

    def next(self, length: int) -> tuple[Tensor, bool]:
        """The next length + 1 bytes (the last is the first of the next call), and whether a work starts."""
        starts = self.offset + length + 1 > len(self.work)
        if starts:
            self.work, self.offset = random.choice(self.works), 0
        self.offset += length
        return self.work[self.offset - length : self.offset + 1], starts


def parameter_groups(model: LanguageModel) -> list[dict[str, object]]:
    """Weight decay for the matrices of projections only."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and n.endswith(".weight")]
    decaying = [p for p in matrices if p is not model.embedding.weight]
    others = [p for p in model.parameters() if all(p is not d for d in decaying)]
    return [{"params": decaying, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a byte language model on text files.")
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True, help="model folder")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--segment", type=int, default=512, help="bytes between truncations")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    works = [torch.tensor(list(path.read_bytes())) for path in args.texts]
    if min(map(len, works)) <= args.segment:
        parser.error(f"each text must be longer than a segment of {args.segment} bytes")

    model = LanguageModel(LanguageModelConfig(memory_dropout=0.1))
    optimizer = torch.optim.AdamW(parameter_groups(model), betas=(0.9, 0.95), fused=True)
    warmup = max(1, args.steps // 50)
    rows = [Row(works) for _ in range(args.batch)]
    state, start = model.initial_state(args.batch), time.monotonic()
    for step in range(args.steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min((step + 1) / warmup, 0.02 + 0.98 * cosine)
        segments, starts = zip(*(row.next(args.segment) for row in rows), strict=True)
        tokens = torch.stack(segments)
        # A work starts with an empty memory; otherwise that of the bytes before goes on.
        state = state.detach().reset_rows(torch.tensor(starts))
        with torch.autocast("cpu", torch.bfloat16):
            logits, state = model(tokens[:, :-1], state)
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        speed = (step + 1) * args.batch * args.segment / (time.monotonic() - start)
        end = "\n" if step + 1 == args.steps else "\r"
        print(f"step {step + 1}: {loss.item() / math.log(2):.3f} bits/byte, {speed:.0f} bytes/s", end=end)
    fastweights.save_model(args.output, model, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
