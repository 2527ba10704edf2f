"""What the tests of sessions share: a text without a pattern, and when two sessions are alike."""

import torch

from fastweights import Session

NOISE = bytes((i * i * 31 + i // 7) % 256 for i in range(3000))


def same_bits(a: Session, b: Session) -> bool:
    left, right = a.state(), b.state()
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )
