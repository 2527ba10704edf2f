"""The training of the baseline RWKV-7: its text, and that it goes on where it was stopped."""

import argparse
import math
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from baselines.train_rwkv7 import IGNORED, TextStream, Trainer, held_out_bits, learning_rate

LENGTH = 600


def work(seed: int, size: int) -> bytes:
    draw = random.Random(seed)
    return bytes(draw.choice(b"abcdefgh   \n") for _ in range(size))


WORKS = [work(seed, size) for seed, size in ((1, 9000), (3, 4321), (4, 601))]


def stream(repeats: float = 0.0, resets: float = 0.0) -> TextStream:
    made = TextStream(list(WORKS), LENGTH, repeats, resets, random.Random(5))
    made.start(3)
    return made


def test_each_row_reads_whole_works_in_order() -> None:
    texts = stream()
    rows: list[list[int]] = [[] for _ in range(3)]
    works: list[bytes] = []
    for _ in range(60):
        segment = texts.next()
        assert segment.bytes == int((segment.targets != IGNORED).sum())
        for b, row in enumerate(rows):
            given = segment.targets[b][segment.targets[b] != IGNORED].tolist()
            if segment.fresh[b]:
                works.append(bytes(row))
                row.clear()
                row.append(int(segment.inputs[b, 0]))
            assert segment.inputs[b, : len(given)].tolist() == [row[-1], *given[:-1]]
            row += given
    finished = [text for text in works if text]
    assert len(finished) > 6
    assert all(any(each.endswith(text) for each in texts.works) for text in finished)
    assert sum(text in texts.works for text in finished) > 3  # from the first byte to the last


def test_passages_come_again_and_nothing_is_lost() -> None:
    texts = stream(repeats=1.0)
    texts.works = [WORKS[0]]
    texts.rows, texts.deck = texts.rows[:1], []
    texts.rows[0].work, texts.rows[0].offset = 0, 0
    read, lengths = b"", []
    while not read or texts.rows[0].offset < len(WORKS[0]):
        segment = texts.next()
        text = bytes(segment.targets[0][segment.targets[0] != IGNORED].tolist())
        read += bytes([int(segment.inputs[0, 0])]) * (not read) + text
        lengths.append(len(text))
    assert len(read) > len(WORKS[0]) + 10 * 64
    assert set(lengths[:-1]) == {LENGTH}
    place = 0
    for byte in read:  # the work is a subsequence of what was read
        place += place < len(WORKS[0]) and byte == WORKS[0][place]
    assert place == len(WORKS[0])
    assert len({read[i : i + 40] for i in range(len(read) - 40)}) < len(read) - 10 * 24


def test_a_restored_stream_goes_on() -> None:
    texts = stream(repeats=0.5, resets=0.3)
    for _ in range(7):
        texts.next()
    other = stream()
    other.repeat_probability, other.reset_probability = 0.5, 0.3
    other.restore(texts.save())
    for _ in range(30):
        one, two = texts.next(), other.next()
        assert torch.equal(one.inputs, two.inputs)
        assert torch.equal(one.targets, two.targets)
        assert torch.equal(one.fresh, two.fresh)


def test_schedule() -> None:
    assert learning_rate(1.0, 0.0) == 0.01
    assert learning_rate(1.0, 0.03) == 1.0
    assert learning_rate(1.0, 1.0) == pytest.approx(0.02)


def trainer(folder: Path) -> Trainer:
    for kind in ("train", "held_out"):
        (folder / kind).mkdir(exist_ok=True)
        (folder / kind / "play.txt").write_bytes(WORKS[0])
    arguments = argparse.Namespace(
        texts=folder,
        output=folder,
        seed=1,
        bytes=960.0,
        feed_forward_width=64,
        batch=2,
        segment=48,
        learning_rate=1e-2,
        repeat_probability=0.25,
        reset_probability=0.02,
        bf16=False,
    )
    return Trainer(arguments)


def test_a_restored_training_takes_the_same_steps(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    for _ in range(3):
        first.seconds += 10.0
        first.step()
    first.save()
    second = trainer(tmp_path)
    second.restore()
    assert (second.steps, second.bytes, second.seconds) == (3, 288, 30.0)
    for _ in range(2):
        assert first.step() == second.step()
    for one, two in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_training_learns(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    before = held_out_bits(made.model, made.held_out, 500)["play"]
    assert before == pytest.approx(8.0, abs=0.3)  # 256 bytes, nothing known
    for _ in range(12):
        made.step()
    after = held_out_bits(made.model, made.held_out, 500)["play"]
    assert after < math.log2(12) + 1.5
