"""The figures as text for a person."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

Figures = dict[str, Any]
SHOWN_CLOZES = 6
LEARNERS = {"carried": "memory", "store": "memory and exact store"}
STEPS = {
    "before": "before",
    "read": "after the false sentence was read",
    "ignored": "after feedback: learn it not at all",
    "corrected": "after it was corrected with the true one",
}


def label_of(name: str) -> str:
    """A reading's name for a person."""
    if name.startswith("reset_"):
        return f"memory emptied every {name.removeprefix('reset_')} bytes"
    return {
        "carried": "memory carried",
        "store": "with an exact store",
        "off": "attention window only",
        "fresh": "fresh session",
        "ppmd_primed": "PPMd primed with training texts",
        "ppmd_unprimed": "PPMd unprimed",
    }[name]


def _number(value: float) -> str:
    return f"{value:+.3f}"


def interval_text(cost: dict[str, float]) -> str:
    """An estimate and its interval."""
    if cost["low"] is None or cost["high"] is None:
        return f"{_number(cost['estimate'])} (too short a text for an interval)"
    return f"{_number(cost['estimate'])} [{_number(cost['low'])}, {_number(cost['high'])}]"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def header(figures: Figures) -> str:
    """What is read, and with what."""
    text, model = figures["text"], figures["model"]
    return (
        f"Text   {text['name']}: {text['bytes']:,} bytes, "
        f"{-(-text['bytes'] // model['window']):,} windows\n"
        f"Model  {model['path']}: {model['parameters']:,} parameters, {model['layers']} blocks, "
        f"window {model['window']} bytes\n"
        f"       (attention reaches {model['reach']} bytes back through all blocks; what lies "
        "beyond is in the memory or lost)\n"
    )


def reading(figures: Figures) -> str:
    """Speed and memory of the session."""
    r = figures["reading"]
    lines = [
        f"Read in {r['seconds']:.1f} s, {figures['text']['bytes'] / r['seconds']:,.0f} bytes/s, "
        f"questions included. The session holds {_megabytes(r['session_bytes'])} of tensors at any "
        f"length, and a log of {r['log_bytes']:,} bytes."
    ]
    if len(r["resident_bytes"]) > 4:
        early = r["resident_bytes"][len(r["resident_bytes"]) // 10]
        late = r["resident_bytes"][-1]
        lines.append(
            f"Memory of the process: {_megabytes(early[1])} after {early[0]:,} bytes, "
            f"{_megabytes(late[1])} after {late[0]:,}."
        )
    store = figures["store"]
    lines.append(
        f"With an exact store behind the memory: {store['seconds']:.1f} s, "
        f"{figures['text']['bytes'] / store['seconds']:,.0f} bytes/s; the store holds "
        f"{_megabytes(store['store_bytes'])}."
    )
    return "\n".join(lines)


def bits_per_byte(figures: Figures) -> str:
    """The table of readings."""
    lines = [
        "Bits per byte (lower is better), and what each costs more than the carried memory:",
        "",
    ]
    for name, bits in figures["bits_per_byte"].items():
        cost = figures["cost"].get(name)
        lines.append(
            f"  {label_of(name):<34} {bits:6.3f}   {interval_text(cost) if cost else ''}".rstrip()
        )
    boot = figures["bootstrap"]
    lines += [
        "",
        _wrap(
            f"In brackets: {boot['level']:.0%} intervals by a {boot['kind']} of "
            f"{boot['window_bytes']} bytes, in blocks of {boot['block_bytes']} bytes, "
            f"{boot['resamples']:,} resamples. All readings have the same weights and the same "
            "attention window; where the memory is emptied, the window is not; the exact store "
            "stands behind the carried memory. " + _fairness(figures)
        ),
    ]
    return "\n".join(lines)


def _fairness(figures: Figures) -> str:
    dropout = figures["model"]["memory_dropout"]
    if dropout > 0:
        return (
            f'"Attention window only" is an ablation, though in training {dropout:.0%} of the rows '
            "went without their memories: an equal model trained without any would do better."
        )
    return (
        '"Attention window only" is an ablation: this model was never trained without its '
        "memories, so it says nothing about a model that has none."
    )


def recall(figures: Figures) -> str:
    """Words that come back, by distance."""
    rows = figures["recall"]["by_distance"]
    if not rows:
        return "The text has no words outside the commonest ones: nothing to recall."
    names = list(rows[0]["costs"])
    lines = [
        "Bits per word, for words that are none of the commonest, by distance from where the same",
        "word stood last; the other columns: what it costs more than with the carried memory.",
        "",
        f"  {'bytes back':<14} {'words':>6} {'carried':>8}   "
        + "   ".join(f"{_short(name):<24}" for name in names),
    ]
    for row in rows:
        costs = "   ".join(f"{_interval_short(row['costs'][name]):<24}" for name in names)
        lines.append(
            f"  {row['label']:<14} {row['words']:>6} {row['carried']:>8.2f}   {costs}".rstrip()
        )
    lines += [
        "",
        _wrap(
            'Words seen "never before" are the control: what the memory gains there is style and '
            "topic, and only a larger gain on words that come back is recall."
        ),
    ]
    return "\n".join(lines)


def _short(name: str) -> str:
    return label_of(name).removeprefix("memory ").removesuffix(" bytes")


def _interval_short(cost: dict[str, float]) -> str:
    if cost["low"] is None:
        return f"{cost['estimate']:+.2f}"
    return f"{cost['estimate']:+.2f} [{cost['low']:+.2f}, {cost['high']:+.2f}]"


def cloze(figures: Figures) -> str:
    """Names to be completed."""
    cloze = figures["cloze"]
    asked, right = cloze["asked"], cloze["right"]
    if not asked:
        return "The text has no names that come back after 2,000 bytes: none to complete."
    lines = [
        _wrap(
            f"Names that last stood 2,000 bytes back or more, to be completed from their first two "
            f"letters ({asked} asked, evenly spread over the text): with the carried memory "
            f"{right['carried']} right; with an exact store {right['store']}; a fresh session that "
            f"has read only the last {figures['model']['reach']} bytes {right['fresh']}; "
            f"attention window only {right['off']}. Some of them:"
        ),
        "",
    ]
    items = cloze["items"]
    step = max(1, len(items) // SHOWN_CLOZES)
    for item in items[::step][:SHOWN_CLOZES]:
        context = " ".join(item["context"].split())
        answers = item["answers"]
        lines.append(
            f"  ...{context[-50:]} [{item['truth']}], last seen {item['distance']:,} bytes back"
        )
        lines.append(
            f"      carried: {answers['carried']}   store: {answers['store']}   "
            f"fresh: {answers['fresh']}   window only: {answers['off']}"
        )
    return "\n".join(lines)


def continuation(figures: Figures) -> str:
    """What the session writes on."""
    return "The session writes on:\n\n" + textwrap.indent(figures["continuation"].strip(), "  | ")


def resumed(figures: Figures) -> str:
    """Whether the other process went on exactly alike."""
    r = figures["resumed"]
    verdict = (
        "exactly alike" if r["same_bytes"] and r["same_logits"] else "DIFFERENTLY: this is a bug"
    )
    return _wrap(
        f"Saved ({_megabytes(r['file_bytes'])}) and resumed in another process, which went on "
        f"{verdict}: {r['written_bytes']} bytes written {_same(r['same_bytes'])}, then "
        f"{r['read_bytes']} bytes read and the logits {_same(r['same_logits'])} bit for bit."
    )


def feedback(figures: Figures) -> str:
    """What a planted fact costs, at each step of teaching."""
    taught = figures["feedback"]
    lines = [
        "Corrected by feedback. It is told something false, once, and then the truth:",
        "",
        f"  false: {taught['false'].strip()}",
        f"  true:  {taught['true'].strip()}",
        "",
        f"  {'bits per byte of the sentence':<42} {_two_columns(LEARNERS.values())}",
        f"  {'(bits of the name in brackets)':<42} "
        + _two_columns(["false          true"] * len(LEARNERS)),
    ]
    for step, label in STEPS.items():
        costs = [_costs(taught["sessions"][name]["steps"][step]) for name in LEARNERS]
        lines.append(f"  {label:<42} {_two_columns(costs)}")
    restored = all(taught["sessions"][name]["restored"] for name in LEARNERS)
    times = " and ".join(f"{1e3 * taught['sessions'][name]['seconds']:.0f} ms" for name in LEARNERS)
    lines += [
        "",
        _wrap(
            f"Read once, the false name cost {_fewer_bits(taught, 'carried'):.1f} bits less by the "
            f"memory alone, {_fewer_bits(taught, 'store'):.1f} bits less with the exact store. "
            f"Before each question {taught['between_bytes']:,} bytes of the text are read on a "
            "copy, twice as many as attention can look back: what makes a sentence cheaper is in "
            f"the memory or in the store. Feedback took {times}; feedback of 1 afterwards "
            + ("restored every bit." if restored else "did NOT restore every bit: this is a bug.")
        ),
    ]
    return "\n".join(lines)


def _fewer_bits(taught: Figures, learner: str) -> float:
    steps = taught["sessions"][learner]["steps"]
    before, after = (steps[step]["false"]["name_bits"] for step in ("before", "read"))
    return float(before - after)


def _two_columns(cells: Iterable[str]) -> str:
    return "   ".join(f"{cell:<28}" for cell in cells).rstrip()


def _costs(asked: Figures) -> str:
    return "  ".join(
        f"{cost['bits_per_byte']:.2f} ({cost['name_bits']:5.1f})" for cost in asked.values()
    )


def rollback(figures: Figures) -> str:
    """Reading and writing that was taken back."""
    r = figures["rollback"]
    lines = [
        _wrap(
            f"Rolled back. It reads {r['foreign_bytes']:,} bytes of a foreign text (the source of "
            f"this program), writes on, and goes back; bits per byte of the first "
            f"{r['probe_bytes']:,} bytes of {r['probe']} before, after, and when it was back:"
        ),
        "",
    ]
    for name, label in LEARNERS.items():
        each = r["sessions"][name]
        bits = "   ".join(f"{bits:.3f}" for bits in each["bits_per_byte"].values())
        lines.append(
            f"  {label:<22} {bits}   {each['undone_bytes']:,} bytes taken back in "
            f"{1e3 * each['seconds']:.0f} ms, {_every_bit(each['same_bits'])}"
        )
    return "\n".join(lines)


def _every_bit(same: bool) -> str:
    return "every bit as it was" if same else "NOT every bit as it was: this is a bug"


def consolidation(figures: Figures) -> str:
    """The model that was made of what the session learned."""
    c = figures["consolidation"]
    if "learned_bytes" not in c:
        return f"No model was made of what it learned: {c['why']}."
    if not c["accepted"]:
        return f"{_task(figures)}\n\n{_wrap('Not accepted: ' + c['why'] + '.')}"
    lines = [_task(figures), "", _choice(figures), "", f"  {'':<44} {'before':>7} {'after':>7}"]
    for part, before in c["before"].items():
        lines.append(f"  {part_label(figures, part):<44} {before:>7.3f} {c['after'][part]:>7.3f}")
    return "\n".join(lines)


def _task(figures: Figures) -> str:
    c = figures["consolidation"]
    return _wrap(
        f"Consolidated. Back at {c['learned_bytes']:,} bytes ({c['undone_bytes']:,} taken back in "
        f"{1e3 * c['undone_seconds']:.0f} ms), a new model is to begin with what the session "
        f"learned. It must make the next {c['bytes']['trial']:,} bytes cheaper" + _guard(figures)
    )


def _choice(figures: Figures) -> str:
    chosen, trials = (figures["consolidation"][name] for name in ("chosen", "trials"))
    return _wrap(
        f"Accepted, the best of {len(trials)} ways: it keeps {chosen['memory_share']:.0%} of what "
        f"the memories in the blocks learned and {chosen['head_share']:.0%} at the head, "
        f"protection {chosen['protection']:g}. Bits per byte, by fresh sessions:"
    )


def _guard(figures: Figures) -> str:
    c = figures["consolidation"]
    if not c["other"]:
        return "; no other text is at hand to be guarded."
    return (
        f", and {c['bytes']['guarded']:,} bytes of {c['other']} at most {c['tolerance']} bits per "
        "byte dearer."
    )


def part_label(figures: Figures, part: str) -> str:
    """A part of the two texts that a consolidated model was measured with."""
    text, other = figures["text"]["name"], figures["consolidation"]["other"]
    return {
        "trial": f"{text}, what comes next (decides)",
        "next": f"{text}, what comes then",
        "guarded": f"{other}, guarded (decides)",
        "unguarded": f"{other}, another part",
    }[part]


def _same(same: bool) -> str:
    return "the same" if same else "not the same"


def _wrap(text: str) -> str:
    return textwrap.fill(text, 100)
