"""The training program: an interrupted and resumed run takes the steps of an unbroken one.

Run by ctest, which passes the program's path in the environment.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any

PROGRAM = os.environ["FASTWEIGHTS_TRAINER"]
SMALL = ["width=32", "layers=2", "feed_forward_width=64", "attention_window=32"]
SMALL += ["attention_heads=2", "memory_heads=2", "memory_value_heads=2"]
SMALL += ["memory_key_size=16", "memory_value_size=16"]


def write_texts(folder: Path) -> Path:
    """A few works of words that come again."""
    generator = random.Random(1)
    words = ["".join(generator.choices("abcdefgh", k=5)) for _ in range(50)]
    folder.mkdir()
    for work in range(4):
        text = " ".join(generator.choice(words) for _ in range(1500))
        (folder / f"work{work}.txt").write_text(text, encoding="utf-8")
    return folder


class TrainLanguageModel(unittest.TestCase):
    """Each test has a folder of its own."""

    def setUp(self) -> None:
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        self.texts = write_texts(self.folder / "texts")

    def command(self, output: str, *options: str, threads: int = 2, steps: int = 60) -> list[str]:
        command = [PROGRAM, "--texts", str(self.texts), "--output", str(self.folder / output)]
        command += ["--held-out", str(self.texts / "work3.txt"), "--evaluate-every", "20"]
        command += ["--steps", str(steps), "--batch", "4", "--segment", "64", "--log-every", "1"]
        command += ["--threads", str(threads), "--repeat-probability", "0.3", "--seed", "5"]
        for setting in SMALL:
            command += ["--set", setting]
        return [*command, *options]

    def run_program(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    def records(self, output: str, event: str) -> list[dict[str, Any]]:
        """The log without what the clock decides."""
        lines = (self.folder / output / "log.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        clock = ("seconds", "bytes_per_second")
        return [
            {key: value for key, value in record.items() if key not in clock}
            for record in records
            if record["event"] == event
        ]

    def interrupt(self, command: list[str], output: str, steps: int, number: signal.Signals) -> int:
        """Sends a signal once the log has that many steps; the exit code."""
        log = self.folder / output / "log.jsonl"
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                if log.exists() and log.read_bytes().count(b'"train"') >= steps:
                    process.send_signal(number)
                    break
                time.sleep(0.005)
            return process.wait(timeout=120)

    def checkpoint_tensors(self, output: str) -> bytes:
        """What lies behind the header, which holds the time that was used."""
        data = (self.folder / output / "checkpoint.safetensors").read_bytes()
        return data[8 + int.from_bytes(data[:8], "little") :]

    def check_interrupted_run(self, threads: int) -> None:
        """Two signals, wherever they come, leave no trace in the steps and the checkpoint."""
        endless = {"threads": threads, "steps": 10**9}
        parts = self.command("parts", "--set", "memory_dropout=0.2", **endless)
        code = self.interrupt(parts, "parts", 7, signal.SIGINT)
        assert code == 128 + signal.SIGINT
        taken = len(self.records("parts", "train"))
        code = self.interrupt([*parts, "--resume"], "parts", taken + 9, signal.SIGTERM)
        assert code == 128 + signal.SIGTERM
        resumed = self.run_program([*parts, "--resume", "--stop-after", "5"])
        assert resumed.returncode == 0, resumed.stderr

        steps = self.records("parts", "train")
        assert len(steps) >= taken + 9 + 5
        whole = self.command("whole", "--set", "memory_dropout=0.2", **endless)
        unbroken = self.run_program([*whole, "--stop-after", str(len(steps))])
        assert unbroken.returncode == 0, unbroken.stderr
        assert steps == self.records("whole", "train")
        assert self.checkpoint_tensors("parts") == self.checkpoint_tensors("whole")

    def test_interrupted_run_is_exact(self) -> None:
        self.check_interrupted_run(threads=1)

    def test_interrupted_run_is_exact_with_two_workers(self) -> None:
        self.check_interrupted_run(threads=2)

    def check_resumed_run(self, *options: str, threads: int) -> None:
        whole = self.run_program(self.command("whole", *options, threads=threads))
        assert whole.returncode == 0, whole.stderr
        parts = self.command("parts", *options, threads=threads)
        for more in (["--stop-after", "8"], ["--resume", "--stop-after", "23"], ["--resume"]):
            result = self.run_program([*parts, *more])
            assert result.returncode == 0, result.stderr

        expected = self.records("whole", "train")
        assert len(expected) == 60
        assert self.records("parts", "train") == expected
        assert self.records("parts", "evaluation")[-1] == self.records("whole", "evaluation")[-1]
        assert expected[-1]["bits_per_byte"] < expected[0]["bits_per_byte"]
        for name in ("config.json", "model.safetensors"):
            first, second = (self.folder / run / "model" / name for run in ("whole", "parts"))
            assert first.read_bytes() == second.read_bytes(), name

    def test_resumed_run_is_exact(self) -> None:
        self.check_resumed_run("--set", "memory_dropout=0.2", threads=1)

    def test_resumed_run_is_exact_with_two_workers(self) -> None:
        self.check_resumed_run("--set", "memory_dropout=0.2", "--set", "dropout=0.2", threads=2)

    def test_checkpoint_survives_divergence(self) -> None:
        first = self.run_program(self.command("run", steps=5))
        assert first.returncode == 0, first.stderr
        checkpoint = (self.folder / "run" / "checkpoint.safetensors").read_bytes()
        more = self.command("run", "--resume", "--learning-rate", "1e30", "--clip", "0", steps=50)
        diverged = self.run_program(more)
        assert diverged.returncode == 1
        assert "is not finite" in diverged.stderr
        assert "is kept" in diverged.stderr
        assert (self.folder / "run" / "checkpoint.safetensors").read_bytes() == checkpoint

    def test_errors_are_one_line(self) -> None:
        (self.texts / "empty.txt").touch()
        cases = [
            (["--texts", "missing.txt"], "missing.txt does not exist"),
            (["--texts", str(self.texts / "empty.txt")], "empty.txt is empty"),
            (["--texts", str(self.texts)], "empty.txt is empty"),
            (["--texts", str(self.texts / "work0.txt"), "--set", "widht=3"], "widht"),
            (["--texts", str(self.texts / "work0.txt"), "--resume"], "does not exist"),
        ]
        for options, message in cases:
            output = ["--output", str(self.folder / "run"), "--steps", "1"]
            result = self.run_program([PROGRAM, *output, *options])
            assert result.returncode == 1, result.stderr
            assert message in result.stderr
            assert len(result.stderr.strip().splitlines()) == 1, result.stderr

    def test_refuses_to_overwrite_and_other_data(self) -> None:
        assert self.run_program(self.command("run", steps=2)).returncode == 0
        again = self.run_program(self.command("run", steps=2))
        assert "--overwrite" in again.stderr
        assert again.returncode == 1
        (self.texts / "work0.txt").write_text("other words", encoding="utf-8")
        other = self.run_program(self.command("run", "--resume", steps=2))
        assert "texts was" in other.stderr
        assert other.returncode == 1

    def test_cut_off_checkpoint_is_refused(self) -> None:
        assert self.run_program(self.command("run", steps=2)).returncode == 0
        checkpoint = self.folder / "run" / "checkpoint.safetensors"
        os.truncate(checkpoint, checkpoint.stat().st_size - 100)
        result = self.run_program(self.command("run", "--resume", steps=2))
        assert result.returncode == 1
        assert "checkpoint.safetensors" in result.stderr


if __name__ == "__main__":
    unittest.main()
