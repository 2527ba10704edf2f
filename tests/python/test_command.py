"""The program `fastweights`: what its commands print, save and return."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from small_models import small_model
from small_sessions import same_bits

import fastweights
from fastweights import EndToEndOptions, Session
from fastweights.command import main
from fastweights.command._difference import common_prefix
from fastweights.command._inspection import effective_rank
from fastweights.nn import LanguageModel

ROOT = Path(__file__).resolve().parents[2]
BOOK = b"The king is dead. Who told the queen? The fool told her, and he wept.\n" * 8


class Output(NamedTuple):
    code: int
    out: str
    err: str


class Place(NamedTuple):
    """A folder with a model and a book, from which the program is called."""

    folder: Path
    model: LanguageModel
    captured: pytest.CaptureFixture[bytes]

    def call(self, *arguments: str) -> Output:
        self.captured.readouterr()
        code = main(arguments)
        out, err = self.captured.readouterr()
        return Output(code, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))

    def state(self, name: str, text: bytes = BOOK) -> Session:
        """A state file, made without the program."""
        session = Session(self.model)
        session.read(text)
        session.save(self.folder / name)
        return session

    def load(self, name: str) -> Session:
        return Session.load(self.folder / name, self.model)


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> Place:
    torch.manual_seed(1)
    fastweights.save_model(tmp_path / "models" / "reader", small_model(vocabulary_size=256))
    (tmp_path / "book.txt").write_bytes(BOOK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTWEIGHTS_MODEL", raising=False)
    return Place(tmp_path, fastweights.load_model(tmp_path / "models" / "reader"), capsysbinary)


def shown(text: str) -> str:
    """What a session wrote, as `Place.call` returns it."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


# ---- what sessions do ---------------------------------------------------------------------------


def test_read_learns_and_saves(place: Place) -> None:
    result = place.call("read", "book.txt", "--state", "a.fwstate")
    assert result.code == 0, result.err
    assert f"book.txt: {len(BOOK)} bytes, " in result.out
    expected = place.state("expected")
    assert same_bits(place.load("a.fwstate"), expected)

    assert place.call("read", "book.txt", "--state", "a.fwstate", "--skip", "9").code == 0
    expected.read(BOOK[9:])
    assert same_bits(place.load("a.fwstate"), expected)


def test_read_takes_standard_input(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff words \x00")))
    assert place.call("read", "-", "--state", "a.fwstate").code == 0
    assert place.load("a.fwstate").log()[0].text == b"\xff words \x00"


def test_read_and_score_print_the_bits_that_a_session_counts(place: Place) -> None:
    bits = Session(place.model).score(BOOK)
    assert f"{bits:.4f} bits per byte" in place.call("score", "book.txt").out
    read = place.call("read", "book.txt", "--state", "a.fwstate", "--score")
    assert f"{bits:.4f} bits per byte" in read.out

    before = (place.folder / "a.fwstate").read_bytes()
    after = place.load("a.fwstate").score(BOOK)
    result = place.call("score", "book.txt", "book.txt", "--state", "a.fwstate")
    assert result.out.count(f"{after:.4f} bits per byte") == 2
    assert f"{after:.4f}" != f"{bits:.4f}"
    assert (place.folder / "a.fwstate").read_bytes() == before


def test_write_prints_what_a_session_writes_and_saves_it(place: Place) -> None:
    session = place.state("a.fwstate")
    options = ["--bytes", "20", "--temperature", "0.9", "--top-k", "40", "--seed", "3"]
    result = place.call("write", "--state", "a.fwstate", "--prompt", "The ", *options)
    assert result.code == 0, result.err
    session.read("The ")
    text = session.write(max_tokens=20, temperature=0.9, top_k=40, seed=3)
    assert result.out == f"The {shown(text)}\n"
    assert same_bits(place.load("a.fwstate"), session)


def test_write_stops_behind_a_text_and_leaves_the_state(place: Place) -> None:
    session = place.state("a.fwstate")
    text = session.write(max_tokens=30, temperature=0)
    stop = next(each for each in text[5:] if each.isascii() and each.isprintable())
    greedy = ["write", "--bytes", "30", "--temperature", "0", "--no-save", "--state", "a.fwstate"]
    result = place.call(*greedy, "--stop", stop)
    assert result.out == shown(text[: text.index(stop) + 1]) + "\n"
    assert place.call(*greedy).out == shown(text) + "\n"
    assert same_bits(place.load("a.fwstate"), place.state("b.fwstate"))


def test_chat_reads_lines_and_answers(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Who?\nWhy?\n")))
    result = place.call("chat", "--state", "a.fwstate", "--bytes", "7", "--seed", "5")
    assert result.code == 0, result.err
    log = place.load("a.fwstate").log()
    assert [(call.kind, call.text) for call in log if call.kind == "read"] == [
        ("read", b"Who?\n"),
        ("read", b"Why?\n"),
    ]
    session = Session(place.model)
    for line, seed in ((b"Who?\n", 5), (b"Why?\n", None)):  # the seed restarts it once
        session.read(line)
        answer = session.write(max_tokens=7, temperature=0.8, seed=seed, stop="\n\n")
        assert shown(answer) in result.out
    assert same_bits(place.load("a.fwstate"), session)


# ---- what states hold ---------------------------------------------------------------------------


def test_a_new_session_takes_gradient_steps_if_asked(place: Place) -> None:
    assert place.call("read", "book.txt", "--state", "a.fwstate", "--end-to-end").code == 0
    assert place.load("a.fwstate").end_to_end == EndToEndOptions()
    assert place.call("write", "--state", "a.fwstate", "--end-to-end", "--bytes", "5").code == 0
    assert place.call("read", "book.txt", "--state", "plain.fwstate").code == 0
    result = place.call("read", "book.txt", "--state", "plain.fwstate", "--end-to-end")
    assert result.code == 2
    assert "takes no gradient steps" in result.err


def test_writing_ahead_writes_the_same(place: Place) -> None:
    written = [
        place.call("write", "--prompt", "Once", "--bytes", "40", "--seed", "1", "--ahead", ahead)
        for ahead in ("0", "8")
    ]
    assert written[0].code == written[1].code == 0
    assert written[0].out == written[1].out
    result = place.call("write", "--ahead", "100")
    assert result.code == 2
    assert "ahead must be in [0, 64]" in result.err


def test_a_new_session_gets_a_store_if_asked(place: Place) -> None:
    assert place.call("read", "book.txt", "--state", "a.fwstate", "--store").code == 0
    assert place.load("a.fwstate").report().store_tokens == len(BOOK)
    assert place.call("read", "book.txt", "--state", "a.fwstate").code == 0
    assert place.load("a.fwstate").report().store_tokens == 2 * len(BOOK)
    place.state("plain.fwstate")
    result = place.call("read", "book.txt", "--state", "plain.fwstate", "--store")
    assert result.code == 2
    assert "without an exact store" in result.err


def test_merge_lets_one_state_go_on_with_the_other(place: Place) -> None:
    place.state("a.fwstate")
    other = place.load("a.fwstate")
    other.read(b"The king lives.")
    other.save(place.folder / "b.fwstate")
    result = place.call("merge", "a.fwstate", "b.fwstate", "c.fwstate")
    assert (result.code, result.err) == (0, "")
    assert f"{len(BOOK)} bytes and 15 of the second" in result.out
    assert same_bits(place.load("c.fwstate"), other)


def test_inspect_tells_position_calls_sizes_and_matrices(place: Place) -> None:
    session = place.state("a.fwstate")
    session.write(max_tokens=5)
    session.save("a.fwstate")
    figures = json.loads(place.call("inspect", "a.fwstate", "--json").out)
    assert figures["position"] == len(BOOK) + 5
    assert figures["log"] == [
        {"kind": "read", "bytes": len(BOOK)},
        {"kind": "written", "bytes": 5},
    ]
    assert figures["file_bytes"] == (place.folder / "a.fwstate").stat().st_size
    state = session.state()
    counted = sum(size for kind, size in figures["sizes"].items() if kind != "log")
    assert counted == sum(tensor.nbytes for tensor in state.values())
    found = {(m["name"], m["head"]): m for m in figures["matrices"]}
    assert len(found) == 2 * 4
    for (name, head), matrix in found.items():
        values = state[f"{name}.state"][0, head].double()
        assert matrix["norm"] == pytest.approx(values.norm().item())
        shares = torch.linalg.eigvalsh(values @ values.T).clamp(min=1e-30).sqrt()
        shares = shares / shares.sum()
        entropy = torch.distributions.Categorical(shares).entropy().item()
        assert matrix["effective_rank"] == pytest.approx(2.718281828459045**entropy, rel=1e-4)

    text = place.call("inspect", "a.fwstate").out
    assert f"position {len(BOOK) + 5}\n" in text
    assert f"1 calls read {len(BOOK)} bytes, 1 wrote 5" in text
    assert re.search(r"layers\.1\.memory +3 +8x12 +[\d.e-]+ +[\d.]+\n", text)


def test_effective_rank_of_known_matrices() -> None:
    assert effective_rank(torch.zeros(5)) == 0
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)


def test_inspect_writes_a_page_with_plots(place: Place) -> None:
    pytest.importorskip("matplotlib")
    place.state("<a>.fwstate").save("<a>.fwstate")
    assert place.call("inspect", "<a>.fwstate", "--html", "page.html").code == 0
    page = (place.folder / "page.html").read_text(encoding="utf-8")
    assert page.count("<svg") == page.count("</svg>") == 3
    assert "<a>" not in page
    assert "&lt;a&gt;.fwstate" in page
    assert page.count("<td>layers.0.memory</td>") == 4
    assert "src=" not in page  # one file


def test_diff_finds_where_two_states_part(place: Place) -> None:
    first = place.state("a.fwstate", BOOK + b"He laughed.")
    second = place.state("b.fwstate", BOOK + b"He sighed, and wept.")
    result = place.call("diff", "a.fwstate", "b.fwstate")
    assert result.code == 1, result.err
    assert f"the logs have {len(BOOK) + 3} bytes in common" in result.out
    assert "a.fwstate goes on 'laughed.'" in result.out
    figures = json.loads(place.call("diff", "a.fwstate", "b.fwstate", "--json").out)
    assert figures["common_bytes"] == len(BOOK) + 3
    name = "layers.1.memory.state"
    a, b = first.state()[name].double(), second.state()[name].double()
    assert figures["distances"][name] == pytest.approx(((a - b).norm() / a.norm()).item())
    assert figures["distances"][name] > 0


def test_diff_of_equal_states_and_of_other_calls(place: Place) -> None:
    place.state("a.fwstate")
    place.state("b.fwstate")
    result = place.call("diff", "a.fwstate", "b.fwstate")
    assert result.code == 0
    assert "the logs are the same\n" in result.out
    session = Session(place.model)
    session.read(BOOK[:50])
    session.read(BOOK[50:])
    session.save("b.fwstate")
    result = place.call("diff", "a.fwstate", "b.fwstate")
    assert result.code == 1
    assert "the logs are the same text in other calls" in result.out


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [(b"", b"", 0), (b"", b"a", 0), (b"ab", b"abc", 2), (b"xb", b"ab", 0), (b"abcd", b"abxd", 2)],
)
def test_common_prefix(first: bytes, second: bytes, common: int) -> None:
    assert common_prefix(first, second) == common


def test_export_writes_the_tensors(place: Place) -> None:
    session = place.state("a.fwstate")
    assert place.call("export", "a.fwstate", "a.safetensors").code == 0
    tensors = fastweights.io.load_tensors("a.safetensors")
    state = session.state()
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)
    assert fastweights.io.load_metadata("a.safetensors")["position"] == str(len(BOOK))


# ---- errors, signals, the process ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["read", "none.txt", "--state", "a"], "none.txt: No such file or directory"),
        (["read", "empty.txt", "--state", "a"], "empty.txt is empty"),
        (["read", "book.txt", "--state", "a", "--skip", "9999"], "--skip must be in [0, "),
        (["read", "book.txt", "--state", "book.txt"], "no fastweights state file"),
        (["score", "book.txt", "--state", "none.fwstate"], "none.fwstate"),
        (["inspect", "none.fwstate"], "none.fwstate"),
        (["inspect", "book.txt"], "no fastweights state file"),
        (["diff", "book.txt", "none.fwstate"], "no fastweights state file"),
        (["export", "none.fwstate", "out"], "none.fwstate"),
        (["write", "--temperature", "-1"], "temperature"),
        (["write", "--seed", "-1"], "seed must be in"),
        (["write", "--model", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line(place: Place, arguments: list[str], message: str) -> None:
    (place.folder / "empty.txt").touch()
    result = place.call(*arguments)
    assert result.code == 2
    assert message in result.err
    assert result.err.startswith("fastweights: ")
    assert len(result.err.strip().splitlines()) == 1, result.err


def test_usage_is_refused_before_anything_is_read(place: Place) -> None:
    for arguments in ([], ["sing"], ["read", "book.txt"], ["write", "--bytes", "0"]):
        with pytest.raises(SystemExit) as exit_:
            place.call(*arguments)
        assert exit_.value.code == 2


def test_a_state_of_another_model_is_refused(place: Place) -> None:
    place.state("a.fwstate")
    torch.manual_seed(2)
    fastweights.save_model("other", small_model(vocabulary_size=256))
    result = place.call("inspect", "a.fwstate", "--model", "other")
    assert result.code == 2
    assert "model" in result.err


def test_the_model_is_looked_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.folder / "models" / "reader").rename(place.folder / "moved")
    monkeypatch.setenv("FASTWEIGHTS_MODEL", "moved")
    assert place.call("score", "book.txt").code == 0
    monkeypatch.setenv("FASTWEIGHTS_MODEL", "gone")
    result = place.call("score", "book.txt")
    assert result.code == 2
    assert "gone" in result.err


def test_interrupted_reading_is_saved(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    read, expected = Session.read, place.state("expected", BOOK[:100])

    def interrupted(session: Session, text: bytes, progress: object = None) -> None:
        read(session, text[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "read", interrupted)
    result = place.call("read", "book.txt", "--state", "a.fwstate")
    assert result.code == 130
    assert f"book.txt: stopped after 100 of {len(BOOK)} bytes" in result.out
    assert "saved at position 100" in result.err
    assert same_bits(place.load("a.fwstate"), expected)
    assert place.call("read", "book.txt", "--state", "b.fwstate", "--no-save").code == 130
    assert not (place.folder / "b.fwstate").exists()


def run(*arguments: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "fastweights", *arguments]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


def test_a_process_that_gets_ctrl_c_saves_and_says_so(place: Place) -> None:
    (place.folder / "long.txt").write_bytes(BOOK * 200_000)
    with run("read", "book.txt", "long.txt", "--state", "a.fwstate") as process:
        deadline = time.monotonic() + 120
        while not (place.folder / "a.fwstate").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert b"Traceback" not in err
    position = place.load("a.fwstate").position
    assert len(BOOK) <= position < len(BOOK) * 200_000
    assert f"saved at position {position}" in err.decode()
    assert b"book.txt: 560 bytes" in out


def test_as_a_process(place: Place) -> None:
    place.state("a.fwstate")
    with run("inspect", "a.fwstate") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert b"layers.0.memory" in out
    with run("inspect", "none") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert b"Traceback" not in err


def test_the_console_script_is_declared() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.scripts]\nfastweights = "fastweights.command:main"\n' in text


def test_the_commands_of_the_documentation_run(place: Place) -> None:
    text = (ROOT / "docs" / "command.md").read_text(encoding="utf-8")
    lines = "".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)).splitlines()
    assert len(lines) == 9
    for line in lines:
        program, *arguments = shlex.split(line)
        if program == "cp":
            shutil.copy(*arguments)
            continue
        assert program == "fastweights"
        result = place.call(*arguments)
        assert result.code == (1 if arguments[0] == "diff" else 0), (line, result.err)
