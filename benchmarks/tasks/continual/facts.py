"""Facts that no model can know: who holds an office in a land, both names made up."""

from __future__ import annotations

import random
from dataclasses import dataclass

OFFICES = ["steward", "herald", "captain", "keeper", "warden", "admiral", "marshal", "chanter"]
LAND_STARTS = ["Va", "Mor", "Il", "Tre", "Os", "Ker", "Lu", "Dra", "Fen", "Hy"]
LAND_ENDS = ["vemoth", "landir", "thorn", "quay", "maris", "dovel", "renna", "gast"]
NAME_STARTS = ["Bel", "Cor", "Dun", "Ead", "Gar", "Hol", "Ish", "Jor", "Kel", "Mar", "Nev", "Oth"]
NAME_ENDS = ["isand", "wynne", "ovane", "adric", "ulphe", "enith", "oriel", "amond"]

FACTS_PER_SET = 8
REPEATS = 3


@dataclass(frozen=True)
class Fact:
    """One sentence. All answers are eight bytes long, so that their costs can be compared."""

    office: str
    land: str
    name: str

    @property
    def prompt(self) -> bytes:
        return f"\nThe {self.office} of {self.land} is called ".encode()

    @property
    def answer(self) -> bytes:
        return self.name.encode()

    @property
    def sentence(self) -> bytes:
        return self.prompt + self.answer + b"."


def fact_sets(sets: int, seed: int) -> list[list[Fact]]:
    """`sets` lists of FACTS_PER_SET facts; no land and no name is there twice."""
    draw = random.Random(seed)
    lands = [a + b for a in LAND_STARTS for b in LAND_ENDS]
    names = [a + b for a in NAME_STARTS for b in NAME_ENDS]
    count = sets * FACTS_PER_SET
    if count > min(len(lands), len(names)):
        raise ValueError(f"there are names for {len(lands)} facts, not for {count}")
    chosen = zip(draw.sample(lands, count), draw.sample(names, count), strict=True)
    facts = [Fact(draw.choice(OFFICES), land, name) for land, name in chosen]
    return [facts[i : i + FACTS_PER_SET] for i in range(0, count, FACTS_PER_SET)]


def exchange_text(facts: list[Fact], seed: int) -> bytes:
    """The facts as a text: each REPEATS times, every time in another order."""
    draw = random.Random(seed)
    text = b""
    for _ in range(REPEATS):
        text += b"".join(fact.sentence for fact in draw.sample(facts, len(facts)))
    return text


def shuffled(facts: list[Fact], seed: int) -> list[Fact]:
    """The same prompts with the answers of other facts: what a learner must not profit from."""
    names = [fact.name for fact in facts]
    turn = random.Random(seed).randrange(1, len(names))
    return [
        Fact(fact.office, fact.land, name)
        for fact, name in zip(facts, names[turn:] + names[:turn], strict=True)
    ]
