"""The demo: its measures on known cases, and a whole run with a small model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from small_models import small_model

import fastweights
from fastweights.nn import LanguageModel

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo"
TEXT = (
    b"Now came Cordelia to the gate. " + b"the wind and the rain went on and on. " * 70
    + b"And then came Cordelia, and with her came Ferdinand the Weary. "
    + b"the sun and the sea went on and on and. " * 70 + b"So spoke Ferdinand at last to Cordelia."
)  # fmt: skip


@pytest.fixture(autouse=True)
def _demo_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEMO))


def demo_module(name: str) -> ModuleType:
    return __import__(name)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(3)
    return small_model(vocabulary_size=256)


def plain_bits(model: LanguageModel, text: bytes, period: int | None) -> np.ndarray:
    """One row, token by token, the fast weights emptied every `period` tokens."""
    state = model.initial_state(1)
    logits = torch.zeros(256)
    bits = []
    with torch.no_grad():
        for at, byte in enumerate(text):
            bits.append(-logits.double().log_softmax(0)[byte].item() / np.log(2))
            if period and at % period == 0:
                state = state._replace(
                    blocks=tuple(
                        b._replace(memory=b.memory._replace(state=torch.zeros_like(b.memory.state)))
                        for b in state.blocks
                        if b.memory is not None
                    ),
                    head=state.head and type(state.head)(*map(torch.zeros_like, state.head)),
                )
            out, state = model(torch.tensor([[byte]]), state)
            logits = out[0, 0]
    return np.array(bits)


def test_rows_of_a_batch_are_one_long_reading(model: LanguageModel) -> None:
    readings = demo_module("readings")
    text = TEXT[2000:3500]
    window = model.config.attention_window
    counted = []
    reset = readings.read_reset(model, text, window, counted.append)
    assert reset == pytest.approx(plain_bits(model, text, window), abs=2e-3)
    assert sum(counted) >= len(text)

    model.enable_memory(False)
    off = readings.read_off(model, text, lambda _: None)
    expected = plain_bits(model, text, None)
    model.enable_memory(True)
    assert off == pytest.approx(expected, abs=2e-3)


def test_window_only_leaves_no_memory_in_the_model(tmp_path: Path) -> None:
    with_head = small_model("fast_head", vocabulary_size=256)
    fastweights.save_model(tmp_path / "model", with_head)
    ablated = demo_module("readings").window_only(tmp_path / "model")
    assert not ablated.config.fast_head
    assert not any(block.memory_enabled for block in ablated.blocks)


def test_the_carried_reading_is_the_sessions(model: LanguageModel) -> None:
    readings = demo_module("readings")
    visited = {}
    session = fastweights.Session(model)

    def visit(position: int, copied: fastweights.Session) -> None:
        visited[position] = copied.position
        copied.write(max_tokens=3)

    bits = readings.read_carried(session, TEXT, [100, 1000], visit, lambda _: None)
    expected = fastweights.Session(model).token_bits(TEXT).numpy()
    assert bits == pytest.approx(expected, abs=2e-3)
    assert visited == {100: 100, 1000: 1000}
    assert session.position == len(TEXT)


def test_intervals_cover_a_correlated_mean() -> None:
    intervals = demo_module("intervals")
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(100):  # a moving average over 8, of mean 1
        values = np.convolve(random.normal(1.0, 1.0, 1007), np.ones(8) / 8, "valid")
        interval = intervals.ratio_interval(values, np.ones(1000), 40)
        assert interval.estimate == pytest.approx(values.mean())
        covered += interval.low <= 1.0 <= interval.high
    assert 85 <= covered <= 100
    assert intervals.ratio_interval(np.ones(10), np.ones(10), 5).low is None
    halves = intervals.ratio_interval(np.ones(100), np.full(100, 2.0), 10)
    assert halves == (0.5, 0.5, 0.5)


def test_words_are_found_with_their_distance() -> None:
    recall = demo_module("recall")
    common = recall.commonest_words([b"went went came", b"Went came then there"])
    assert common == {b"went"}  # a quarter of four
    words = recall.find_words(TEXT, common)
    names = [w for w in words if TEXT[w.begin : w.end] == b"Cordelia"]
    assert [w.distance for w in names] == [
        recall.FIRST_TIME, names[1].begin - names[0].begin, names[2].begin - names[1].begin
    ]  # fmt: skip
    clozes = recall.choose_clozes(words, TEXT, 10)
    assert {TEXT[w.begin : w.end] for w in clozes} == {b"Cordelia", b"Ferdinand"}
    assert all(w.distance >= recall.FAR for w in clozes)
    assert len(recall.choose_clozes(words, TEXT, 2)) == 2


def test_costs_by_distance_add_up() -> None:
    recall = demo_module("recall")
    words = recall.find_words(TEXT, {b"came", b"went", b"wind", b"rain", b"then"})
    carried = np.ones(len(TEXT))
    rows = recall.by_distance(words, {"carried": carried, "off": carried * 1.5}, 8, 4)
    assert sum(row.words for row in rows) == len(words)
    assert rows[0].label == "never before"
    length = {row.label: row.carried for row in rows}
    for row in rows:
        assert row.costs["off"].estimate == pytest.approx(0.5 * length[row.label])


def test_the_same_bits_are_told_from_others(model: LanguageModel) -> None:
    learning = demo_module("learning")
    one, other = fastweights.Session(model), fastweights.Session(model)
    one.read(TEXT)
    other.read(TEXT)
    assert learning.same_bits(one, other)
    assert not learning.same_bits(one, fastweights.Session(model))
    assert not learning.same_bits(one, fastweights.Session(model, store=True))
    other.rollback(len(TEXT) - 1)
    assert not learning.same_bits(one, other)
    zero = torch.tensor(0.0)
    assert torch.equal(zero, -zero)
    assert not learning._same_tensors(zero, -zero)


@pytest.mark.parametrize("store", [False, True])
def test_a_planted_fact_costs_what_a_session_driven_so_says(
    model: LanguageModel, store: bool
) -> None:
    learning = demo_module("learning")
    session = fastweights.Session(model, store=store)
    session.read(TEXT)
    kept = session.fork()
    between = TEXT[:1000]
    taught = learning.teach(session, between)
    assert learning.same_bits(session, kept)
    assert taught["restored"]
    steps = taught["steps"]
    assert list(steps) == ["before", "read", "ignored", "corrected"]

    false, true = learning.statement("false"), learning.statement("true")
    assert false != true
    driven = fastweights.Session(model, store=store)
    for text in (TEXT, false, between):
        driven.read(text)
    assert steps["read"]["true"]["bits_per_byte"] == pytest.approx(driven.score(true))
    bits = driven.token_bits(false)
    name = false.index(learning.NAMES["false"])
    assert steps["read"]["false"]["name_bits"] == pytest.approx(float(bits[name:-2].sum()))
    if store:  # it is found, then not found, then the other one is
        assert steps["read"]["false"]["bits_per_byte"] < steps["before"]["false"]["bits_per_byte"]
        assert steps["ignored"]["false"]["bits_per_byte"] > steps["read"]["false"]["bits_per_byte"]
        assert steps["corrected"]["true"]["bits_per_byte"] < steps["read"]["true"]["bits_per_byte"]


def test_going_back_leads_to_the_same_bits(model: LanguageModel) -> None:
    learning = demo_module("learning")
    session = fastweights.Session(model)
    session.read(TEXT)
    kept = session.fork()
    back = learning.go_back(session, b"import this\n", b"the wind and the rain")
    assert learning.same_bits(session, kept)
    assert back["same_bits"]
    assert back["undone_bytes"] == 12 + learning.WRITTEN
    bits = back["bits_per_byte"]
    assert bits["back"] == bits["before"] != bits["after"]


def test_parts_of_two_texts_are_neighbours() -> None:
    learning = demo_module("learning")
    text, other = bytes(range(256)) * 400, bytes(range(255, -1, -1)) * 100
    for size in (learning.LEAST_TEXT, 20_001, len(text)):
        learned, trial, following, guarded, unguarded = learning.divide(text[:size], other)
        assert text[:size][learned:].startswith(trial + following)
        assert min(len(trial), len(following)) > 0
        assert (guarded + unguarded) in other
    assert learning.divide(text[: learning.LEAST_TEXT - 1], other) is None
    parts = learning.divide(text, b"")
    assert parts.guarded == parts.unguarded == b""


def consolidated(model: LanguageModel, text: bytes, other: bytes) -> dict[str, Any]:
    learning = demo_module("learning")
    session = fastweights.Session(model)
    session.read(text)
    parts = learning.divide(text, other)
    figures = learning.consolidate(session, model, parts, lambda done, total: None)
    assert session.position == len(text)
    assert figures["undone_bytes"] == len(text) - len(text) // 2
    assert figures["bytes"]["trial"] == len(parts.trial)
    return figures


def test_a_model_is_made_where_it_pays() -> None:
    torch.manual_seed(3)
    with_head = small_model("fast_head", vocabulary_size=256)
    made = consolidated(with_head, b"the wind and the rain went on and on. " * 200, TEXT)
    assert made["accepted"]
    before, after = made["before"], made["after"]
    assert before.keys() == after.keys() == {"trial", "next", "guarded", "unguarded"}
    assert after["trial"] == pytest.approx(made["chosen"]["trial_bits"], abs=1e-6)
    assert after["trial"] < before["trial"]
    assert after["guarded"] <= before["guarded"] + made["tolerance"]
    told = demo_module("report").consolidation(
        {"text": {"name": "rain"}, "consolidation": made | {"other": "tale"}}
    )
    assert f"{after['next']:.3f}" in told
    assert "tale, guarded" in told


def test_a_model_is_refused_with_its_figures(model: LanguageModel) -> None:
    refused = consolidated(model, b"ab" * 2500 + (b"ba " * 2000)[:5000], b"")
    assert not refused["accepted"]
    assert re.search(r"refused.*[\d.]+ bits per byte for [\d.]+ before", refused["why"])
    told = demo_module("report").consolidation(
        {"text": {"name": "ab"}, "consolidation": refused | {"other": ""}}
    )
    assert "Not accepted" in told
    assert "no other text is at hand" in told

    without = consolidated(small_model("attention_only", vocabulary_size=256), TEXT, TEXT)
    assert "no memory" in without["why"]


def run_demo(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(DEMO), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_demo_runs_on_any_file(model: LanguageModel, tmp_path: Path) -> None:
    fastweights.save_model(tmp_path / "model", model)
    file = tmp_path / "tale.txt"
    file.write_bytes(TEXT + bytes(range(256)))
    options = [
        file,
        "--model",
        tmp_path / "model",
        "--output",
        tmp_path / "out",
        "--training",
        tmp_path,
    ]

    told = run_demo(*options)
    assert told.returncode == 0, told.stderr
    assert "exactly alike" in told.stdout
    assert "memory carried" in told.stdout
    figures = json.loads((tmp_path / "out" / "tale.json").read_text())
    assert (tmp_path / "out" / "tale.png").read_bytes().startswith(b"\x89PNG")
    assert figures["text"] == {"name": "tale", "bytes": len(TEXT) + 256}
    assert figures["cloze"]["asked"] == 3
    assert figures["cloze"]["right"].keys() == {"carried", "store", "fresh", "off"}
    assert {"carried", "store"} <= figures["bits_per_byte"].keys()
    assert figures["store"]["store_bytes"] > 0
    for name in ("carried", "store"):
        assert figures["feedback"]["sessions"][name]["restored"]
        assert figures["rollback"]["sessions"][name]["same_bits"]
    assert figures["consolidation"]["learned_bytes"] == figures["text"]["bytes"] // 2
    for told_of in ("exact store", "Corrected by feedback", "Rolled back", "Consolidated"):
        assert told_of in told.stdout
    assert {"machine", "commit", "date", "command", "samples"} <= figures.keys()
    total = sum(figures["samples"]["window_bits"]["carried"])
    assert figures["bits_per_byte"]["carried"] == pytest.approx(
        total / len(TEXT + bytes(256)), 1e-4
    )

    quiet = run_demo(*options, "--json-only", "--limit", 1)
    assert quiet.returncode == 0, quiet.stderr
    of_one_byte = json.loads(quiet.stdout)
    assert of_one_byte["text"]["bytes"] == 1
    assert not of_one_byte["consolidation"]["accepted"]
    assert "shorter" in of_one_byte["consolidation"]["why"]
    assert quiet.stderr == ""


def test_bad_input_gives_one_clear_line(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    for arguments, why in [
        ([tmp_path / "missing"], "No such file"),
        ([empty], "empty"),
        ([tmp_path], "directory"),
        ([__file__, "--model", tmp_path], "no model"),
        (["--work", "nothing-by-shakespeare"], "held-out"),
    ]:
        result = run_demo(*arguments)
        assert result.returncode == 1
        assert why in result.stderr
        assert result.stderr.count("\n") == 1


def test_the_readme_shows_the_stored_figures() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "update-readme-figures"), "--check"]
    result = subprocess.run(script, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
