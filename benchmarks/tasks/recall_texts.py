"""Training texts that give a model reasons to remember.

Ordinary text repeats little: a model that is trained on it learns style and topic, and no recall.
In these texts most of what is hard to predict was said before: made-up names, asked for again after
more bytes than an attention window holds, lists of made-up words said again, facts that change,
between lines of the training plays. Distances are log-uniform. The names of the benchmarks
(`continual/facts.py`) are made of other syllables.

    python benchmarks/tasks/recall_texts.py --output data/recall
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from works import read_works

ROOT = Path(__file__).resolve().parents[2]
NEAREST, FARTHEST = 140, 6000  # bytes back to what is asked again
CONSONANTS = ["b", "c", "ch", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "qu", "r", "s"]
CONSONANTS += ["sh", "st", "t", "th", "tr", "v", "w", "x", "z", "br", "cl", "dr", "gr", "pl"]
VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "ei", "ia", "oa", "ou"]
ENDS = ["", "l", "m", "n", "r", "s", "t", "nd", "rk", "st", "x"]
ROLES = ["steward", "herald", "captain", "keeper", "warden", "cook", "queen", "smith", "poet"]
ROLES += ["river", "horse", "physician", "ship", "hound", "sword", "gate", "bridge", "banner"]
STATEMENTS = [
    ("The {role} of {place} is called ", "{name}."),
    ("The {role} of {place} is ", "{name}."),
    ("In {place} the {role} bears the name ", "{name}."),
    ("At {place} they call the {role} ", "{name}."),
    ("Who is the {role} of {place}? It is ", "{name}."),
]


def word(draw: random.Random, syllables: int) -> str:
    """A made-up word."""
    parts = [draw.choice(CONSONANTS) + draw.choice(VOWELS) for _ in range(syllables)]
    return "".join(parts) + draw.choice(ENDS)


def name(draw: random.Random) -> str:
    return word(draw, draw.choice([2, 2, 3])).capitalize()


@dataclass
class Topic:
    """Something that can be said again, and where it was said last."""

    said: int
    role: str = ""
    place: str = ""
    name: str = ""
    statement: int = 0
    words: str = ""

    def sentence(self, draw: random.Random, again: bool) -> str:
        if self.words:
            return self.words
        other = again and draw.random() < 0.3
        begin, end = STATEMENTS[draw.randrange(len(STATEMENTS)) if other else self.statement]
        return (begin + end).format(role=self.role, place=self.place, name=self.name)


class Work:
    """One text as it grows."""

    def __init__(self, plays: list[str], seed: int) -> None:
        self._draw = random.Random(seed)
        self._plays = plays
        self._topics: list[Topic] = []
        self._parts: list[str] = []
        self._size = 0

    def text(self, size: int) -> str:
        steps = [self._new_fact, self._new_list, self._again, self._change, self._filler]
        while self._size < size:
            self._draw.choices(steps, [0.28, 0.05, 0.5, 0.04, 0.13])[0]()
        return "".join(self._parts)

    def _say(self, text: str) -> None:
        self._parts.append(text + "\n")
        self._size += len(text) + 1

    def _new_fact(self) -> None:
        draw = self._draw
        topic = Topic(
            said=self._size,
            role=draw.choice(ROLES),
            place=name(draw),
            name=name(draw),
            statement=draw.randrange(len(STATEMENTS)),
        )
        self._topics.append(topic)
        self._say(topic.sentence(draw, again=False))

    def _new_list(self) -> None:
        words = " ".join(word(self._draw, 2) for _ in range(self._draw.randint(6, 16)))
        self._topics.append(Topic(said=self._size, words=words))
        self._say(words)

    def _pick(self) -> Topic | None:
        """The topic whose distance is nearest to one that is drawn."""
        far = [topic for topic in self._topics if self._size - topic.said >= NEAREST]
        if not far:
            return None
        log_distance = self._draw.uniform(math.log(NEAREST), math.log(FARTHEST))
        return min(far, key=lambda topic: abs(math.log(self._size - topic.said) - log_distance))

    def _again(self) -> None:
        topic = self._pick()
        if topic is None:
            return
        sentence = topic.sentence(self._draw, again=True)
        topic.said = self._size
        self._say(sentence)

    def _change(self) -> None:
        topic = self._pick()
        if topic is None or topic.words:
            return
        topic.name, topic.said = name(self._draw), self._size
        self._say("From now on: " + topic.sentence(self._draw, again=False))

    def _filler(self) -> None:
        play = self._draw.choice(self._plays)
        begin = self._draw.randrange(max(1, len(play) - 300))
        lines = play[begin : begin + 300].split("\n")[1:-1]
        for line in lines[: self._draw.randint(1, 3)]:
            self._say(line)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=Path, default=ROOT / "data" / "plays" / "train")
    parser.add_argument("--output", type=Path, default=ROOT / "data" / "recall")
    parser.add_argument("--works", type=int, default=60)
    parser.add_argument("--bytes", type=int, default=120_000, help="of each work")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    plays = [text.decode("utf-8", "replace") for text in read_works(arguments.texts).values()]
    arguments.output.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(arguments.works), unit="work"):
        text = Work(plays, arguments.seed * 1_000_003 + index).text(arguments.bytes)
        (arguments.output / f"recall-{index:03d}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
