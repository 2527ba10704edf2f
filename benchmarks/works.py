"""The works that benchmarks read: data/plays, which scripts/fetch-texts makes."""

from __future__ import annotations

import sys
from pathlib import Path


def read_works(folder: Path, least: int = 1) -> dict[str, bytes]:
    """Name → bytes of each .txt in a folder, by name; ends the program if there are too few."""
    works = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.txt"))}
    if len(works) < least:
        program = Path(sys.argv[0]).stem
        sys.exit(f"{program}: {len(works)} of {least} texts in {folder}; run scripts/fetch-texts")
    return works
