"""What every stored figure carries: the machine, the commit, the date and the command."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """The processor, its cores and the versions that decide a speed."""
    import torch

    name = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
    }


def commit() -> str:
    """The commit of the sources, with `+changes` where the tree differs from it."""
    root = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        result = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        )
        return result.stdout.strip()

    revision = git("rev-parse", "--short=12", "HEAD") or "unknown"
    dirty = git("status", "--porcelain", "--untracked-files=no")
    return revision + ("+changes" if dirty else "")


def command() -> str:
    """The command line, with the script's path relative to the project."""
    root = Path(__file__).resolve().parents[1]
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(root) if script.is_relative_to(root) else Path(script.name)
    return " ".join(["python", str(shown), *sys.argv[1:]])


@dataclass
class Record:
    """One benchmark's figures and where they come from."""

    title: str
    rows: list[dict[str, Any]]
    machine: dict[str, Any] = field(default_factory=machine)
    commit: str = field(default_factory=commit)
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat("T", "seconds"))
    command: str = field(default_factory=command)


def save_record(path: Path, record: Record) -> None:
    """Writes the record as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(record), indent=1) + "\n")
    temporary.replace(path)
