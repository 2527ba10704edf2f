"""The example that writes chapters: what it leaves, what it says, and its answers to bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, ROOT / "examples" / "write_chapters.py", *arguments]
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        check=False,
    )


def test_it_writes_the_outline_and_completes_the_sheet(tmp_path: Path) -> None:
    sheet = [["The cat of the mill is ", "Mordaunt"], ["The miller's hat is ", "green"]]
    (tmp_path / "sheet.json").write_text(json.dumps(sheet), encoding="utf-8")
    (tmp_path / "outline.txt").write_text("Flour\nRain\n", encoding="utf-8")
    sizes = ["--chapter-bytes", 300, "--passage-bytes", 150, "--candidates", 2]
    files = ["--sheet", tmp_path / "sheet.json", "--outline", tmp_path / "outline.txt"]
    result = run(*files, *sizes, "--output", tmp_path / "text.txt")
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "text.txt").read_text(encoding="utf-8", errors="surrogateescape")
    assert text.index("CHAPTER 1. Flour.") < text.index("CHAPTER 2. Rain.")
    last = result.stderr.strip().splitlines()[-1]
    assert "in 2 chapters" in last
    # Each chapter ends with a line for each fact; it may say them in between, too.
    endings = [chapter.rstrip().splitlines()[-2:] for chapter in text.split("CHAPTER ")[1:]]
    right = sum(
        line.startswith(cue + value)
        for lines in endings
        for line, (cue, value) in zip(lines, sheet, strict=True)
    )
    assert f"{right} of 4 facts completed rightly" in last
    # Said three times and kept verbatim: with the store this is sure.
    assert right == 4


def test_without_a_judge_nothing_is_corrected() -> None:
    result = run("--no-judge", "--no-store", "--chapter-bytes", 100, "--passage-bytes", 100)
    assert result.returncode == 0, result.stderr
    assert "0 of 24 passages corrected" in result.stderr
    assert "CHAPTER 8" in result.stdout


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.json"
    for content in ("{", "[]", "[1]", '[["a", ""]]', '[["a", 1]]', '[["a"]]'):
        sheet.write_text(content, encoding="utf-8")
        result = run("--sheet", sheet)
        assert result.returncode == 1
        assert result.stderr.startswith(f"write_chapters: {sheet} ")
        assert result.stderr.count("\n") == 1
    result = run("--outline", tmp_path / "missing.txt")
    assert result.returncode == 1
    assert "write_chapters: cannot read" in result.stderr
