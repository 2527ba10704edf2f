"""What write policies do to a model that was trained without them: bits per byte of held-out works.

PYTHONPATH=build/release/python python benchmarks/tasks/write_policies.py
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fastweights
from fastweights import Session, SurpriseGate, WritePolicy

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "tasks")]
from record import Record, save_record
from works import read_works

RESULT = ROOT / "benchmarks" / "results" / "write_policies.json"


def policies(session: Session) -> dict[str, WritePolicy]:
    """Name → policy; the caps are half of the largest norms that `session` has without any."""
    norms: dict[str, float] = {"memory": 0.0, "head": 0.0}
    for name, tensor in session.state().items():
        if name.endswith(("memory.state", "head.state")):
            kind = "head" if name.startswith("head") else "memory"
            norms[kind] = max(norms[kind], float(tensor.norm(dim=(-2, -1)).max()))
    return {
        "as trained": WritePolicy(),
        "frozen": WritePolicy(strength=0.0),
        "strength 0.5": WritePolicy(strength=0.5),
        "strength 1.5": WritePolicy(strength=1.5),
        "surprise, 0 … 4 bits: 0 … 1": WritePolicy(surprise=SurpriseGate(0, 4, 0, 1)),
        "surprise, 0 … 4 bits: 0.5 … 1": WritePolicy(surprise=SurpriseGate(0, 4, 0.5, 1)),
        "surprise, 0 … 4 bits: 1 … 1.5": WritePolicy(surprise=SurpriseGate(0, 4, 1, 1.5)),
        "surprise, 6 … 12 bits: 1 … 0": WritePolicy(surprise=SurpriseGate(6, 12, 1, 0)),
        "norms capped at a half": WritePolicy(
            memory_norm_cap=norms["memory"] / 2, head_norm_cap=norms["head"] / 2
        ),
        "least squares, ridge 1": WritePolicy(ridge=1.0),
        "least squares, ridge 100": WritePolicy(ridge=100.0),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    works = list(dict.fromkeys(row["work"] for row in rows))
    lines = [f"| policy | {' | '.join(works)} | time |", "|---|" + "---:|" * (len(works) + 1)]
    plain = sum(row["seconds"] for row in rows if row["policy"] == "as trained")
    for policy in dict.fromkeys(row["policy"] for row in rows):
        mine = [row for row in rows if row["policy"] == policy]
        bits = " | ".join(f"{row['bits_per_byte']:.3f}" for row in mine)
        lines.append(f"| {policy} | {bits} | {sum(r['seconds'] for r in mine) / plain:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "reader")
    parser.add_argument("--texts", type=Path, default=ROOT / "data" / "plays" / "held_out")
    parser.add_argument("--bytes", type=int, default=60000, help="of each work")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    works = read_works(arguments.texts)
    model = fastweights.load_model(arguments.model).native()
    rows: list[dict[str, Any]] = []
    with tqdm(unit="read") as progress:
        for work, whole in works.items():
            text = whole[: arguments.bytes]
            plain = Session(model)
            plain.read(text)
            for name, policy in policies(plain).items():
                session = Session(model, policy=policy)
                began = time.process_time()
                bits = float(session.read_and_score(text).double().mean())
                report = session.report()
                rows.append(
                    {
                        "work": work,
                        "policy": name,
                        "fields": policy._asdict(),
                        "bits_per_byte": round(bits, 4),
                        "seconds": round(time.process_time() - began, 2),
                        "capped_norms": report.capped_norms,
                        "limited_writes": report.limited_writes,
                    }
                )
                progress.update()
    title = f"Write policies: bits per byte of {arguments.bytes} bytes, read by a fresh session"
    save_record(arguments.output, Record(title, rows))
    print(table(rows))


if __name__ == "__main__":
    main()
