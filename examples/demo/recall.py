"""What stood thousands of bytes earlier: words that come back, and names to be completed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from intervals import Array, Interval, ratio_interval

import fastweights

WORD = re.compile(rb"[A-Za-z\x80-\xff][A-Za-z'\x80-\xff]{3,}")
COMMONEST = 500
FAR = 2000
CLUE = 2
LONGEST = 24
FIRST_TIME = -1

# Distance to the previous occurrence, in bytes; the last bucket has no upper bound.
BUCKETS = (0, 512, 2000, 8192, 32768)


class Word(NamedTuple):
    """An occurrence of a word that is none of the commonest."""

    begin: int
    end: int
    distance: int  # from the previous occurrence, FIRST_TIME if there is none


class BucketResult(NamedTuple):
    """Bits per word at a range of distances, and how many more the other readings take."""

    label: str
    words: int
    carried: float  # bits per word
    costs: dict[str, Interval]  # other reading -> its bits per word minus the carried one's

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return self._asdict() | {"costs": {n: c._asdict() for n, c in self.costs.items()}}


class Cloze(NamedTuple):
    """A word to be completed from its first letters."""

    context: str
    truth: str
    distance: int
    answers: dict[str, str]  # who answers -> the whole word


def commonest_words(texts: Iterable[bytes]) -> set[bytes]:
    """The COMMONEST most frequent words, in lower case; of few words a quarter."""
    counts: Counter[bytes] = Counter()
    for text in texts:
        counts.update(match.group().lower() for match in WORD.finditer(text))
    return {word for word, _ in counts.most_common(min(COMMONEST, -(-len(counts) // 4)))}


def find_words(text: bytes, common: set[bytes]) -> list[Word]:
    """Every occurrence of a word that is not common, in order."""
    last: dict[bytes, int] = {}
    words = []
    for match in WORD.finditer(text):
        word = match.group()
        if word.lower() in common:
            continue
        distance = match.start() - last[word] if word in last else FIRST_TIME
        words.append(Word(match.start(), match.end(), distance))
        last[word] = match.start()
    return words


def _label(bucket: int) -> str:
    if bucket == FIRST_TIME:
        return "never before"
    if bucket + 1 == len(BUCKETS):
        return f">= {BUCKETS[bucket]}"
    return f"{BUCKETS[bucket]} - {BUCKETS[bucket + 1]}"


def by_distance(
    words: list[Word], readings: dict[str, Array], window: int, block: int
) -> list[BucketResult]:
    """What the other readings cost more than the one called "carried", by distance.

    Intervals as in `intervals`, in blocks of `block` windows.
    """
    return [
        result
        for bucket in [FIRST_TIME, *range(len(BUCKETS))]
        if (result := _bucket(words, bucket, readings, window, block)) is not None
    ]


def far_words(
    words: list[Word], readings: dict[str, Array], window: int, block: int
) -> BucketResult | None:
    """The same for all words whose previous occurrence lies FAR bytes back or more."""
    far = [word for word in words if word.distance >= FAR]
    return _result(f">= {FAR}", far, readings, window, block)


def _bucket(
    words: list[Word], bucket: int, readings: dict[str, Array], window: int, block: int
) -> BucketResult | None:
    def belongs(word: Word) -> bool:
        if word.distance == FIRST_TIME or bucket == FIRST_TIME:
            return word.distance == bucket == FIRST_TIME
        return int(np.searchsorted(BUCKETS, word.distance, side="right")) - 1 == bucket

    return _result(_label(bucket), list(filter(belongs, words)), readings, window, block)


def _result(
    label: str, words: list[Word], readings: dict[str, Array], window: int, block: int
) -> BucketResult | None:
    if not words:
        return None
    sums = {name: _per_window(words, bits, window) for name, bits in readings.items()}
    counts = _per_window(words, None, window, len(readings["carried"]))
    costs = {
        name: ratio_interval(values - sums["carried"], counts, block)
        for name, values in sums.items()
        if name != "carried"
    }
    return BucketResult(label, len(words), float(sums["carried"].sum() / counts.sum()), costs)


def _per_window(
    words: list[Word], bits: Array | None, window: int, size: int | None = None
) -> Array:
    """Sum over the words that begin in each window: their bits, or 1 each."""
    length = len(bits) if bits is not None else size or 0
    out = np.zeros(-(-length // window))
    for word in words:
        out[word.begin // window] += 1.0 if bits is None else bits[word.begin : word.end].sum()
    return out


def choose_clozes(words: list[Word], text: bytes, count: int) -> list[Word]:
    """`count` names, evenly spread, that come back after FAR bytes or more.

    A name is a word with a capital that begins neither a sentence nor a line.
    """
    names = [
        word
        for word in words
        if word.distance >= FAR
        and text[word.begin : word.begin + 1].isupper()
        and text[word.begin - 1 : word.begin] == b" "
        and text[word.begin - 2 : word.begin - 1].isalpha()
    ]
    if len(names) <= count:
        return names
    return [names[i * len(names) // count] for i in range(count)]


def complete(session: fastweights.Session) -> str:
    """The most probable end of the word that the session stands in.

    The session learns what it writes: give a copy.
    """
    letters = []

    def add(piece: str) -> bool:
        going_on = piece.isalpha() or piece == "'"
        if going_on:
            letters.append(piece)
        return going_on

    session.write(max_tokens=LONGEST, temperature=0, on_token=add)
    return "".join(letters)


def make_cloze(text: bytes, word: Word, completions: dict[str, str]) -> Cloze:
    """A cloze with its answers, as text."""
    clue = text[word.begin : word.begin + CLUE].decode("utf-8", "replace")
    return Cloze(
        context=text[max(0, word.begin - 60) : word.begin].decode("utf-8", "replace"),
        truth=text[word.begin : word.end].decode("utf-8", "replace"),
        distance=word.distance,
        answers={name: clue + rest for name, rest in completions.items()},
    )


def count_right(clozes: list[Cloze], name: str) -> int:
    """How many words `name` completed rightly."""
    return sum(c.answers[name] == c.truth for c in clozes)
