"""`inspect` and `export`: what a state file holds."""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io import save_tensors
from ..session import LogCall, Session
from ._options import Commands, add_command, open_model, open_state, print_table


@dataclass(frozen=True)
class Matrix:
    """Figures of one fast-weight matrix."""

    name: str  # of its memory: `layers.N.memory`
    head: int
    rows: int
    columns: int
    norm: float  # Frobenius
    effective_rank: float
    singular_values: list[float]


@dataclass(frozen=True)
class Inspection:
    """What a state file holds."""

    file: str
    file_bytes: int
    position: int
    log: list[LogCall]
    sizes: dict[str, int]  # bytes by kind
    matrices: list[Matrix]

    def figures(self) -> dict[str, Any]:
        """All of it but the text, for JSON."""
        matrices = [
            {key: value for key, value in vars(matrix).items() if key != "singular_values"}
            for matrix in self.matrices
        ]
        calls = [{"kind": call.kind, "bytes": len(call.text)} for call in self.log]
        return vars(self) | {"log": calls, "matrices": matrices}


def add_commands(commands: Commands) -> None:
    """Adds the two."""
    command = add_command(
        commands,
        "inspect",
        _inspect,
        "Print what a state file holds. That is position, calls, sizes, and of each fast-weight "
        "matrix the norm and the effective rank, the exponential of the entropy of its normalised "
        "singular values.",
    )
    command.add_argument("state", type=Path, metavar="STATE", help="state file")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots too")
    command.add_argument("--json", action="store_true", help="print the figures as JSON")
    command = add_command(
        commands,
        "export",
        _export,
        "Write the tensors of a state to a safetensors file. Their names are those of "
        "Session.state(). The log of what was read is left out.",
    )
    command.add_argument("state", type=Path, metavar="STATE", help="state file")
    command.add_argument("output", type=Path, metavar="OUTPUT", help="safetensors file to write")


def effective_rank(singular_values: Tensor) -> float:
    """The exponential of the entropy of the normalised values (Roy and Vetterli 2007)."""
    total = singular_values.sum()
    if total == 0:
        return 0.0
    share = singular_values / total
    return math.exp(-torch.xlogy(share, share).sum().item())


def matrices(state: dict[str, Tensor]) -> list[Matrix]:
    """The fast-weight matrices among the tensors of a state."""
    result = []
    for name, tensor in state.items():
        if not name.endswith(".state"):
            continue
        rows, columns = tensor.shape[-2:]
        for head, values in enumerate(tensor.double().reshape(-1, rows, columns)):
            spectrum = torch.linalg.svdvals(values)
            norm = spectrum.square().sum().sqrt().item()
            memory = name.removesuffix(".state")
            rank = effective_rank(spectrum)
            result.append(Matrix(memory, head, rows, columns, norm, rank, spectrum.tolist()))
    return result


def kind_of(name: str) -> str:
    """What a tensor of a state is for."""
    kinds = {".state": "fast weights", ".conv": "convolution"}
    for ending, kind in kinds.items():
        if name.endswith(ending):
            return kind
    return "attention window" if ".attention." in name else "other tensors"


def inspect(path: Path, session: Session) -> Inspection:
    """The figures of a session that was loaded from `path`."""
    state, log = session.state(), session.log()
    sizes: dict[str, int] = {}
    for name, tensor in state.items():
        sizes[kind_of(name)] = sizes.get(kind_of(name), 0) + tensor.nbytes
    sizes["log"] = sum(len(call.text) for call in log)
    found = matrices(state)
    return Inspection(str(path), path.stat().st_size, session.position, log, sizes, found)


def _inspect(arguments: argparse.Namespace) -> int:
    session = open_state(arguments.state, open_model(arguments))
    inspection = inspect(arguments.state, session)
    if arguments.json:
        print(json.dumps(inspection.figures(), indent=1))
    else:
        _print(inspection)
    if arguments.html:
        from ._page import write_page

        write_page(arguments.html, inspection)
    return 0


def _print(inspection: Inspection) -> None:
    read = [len(call.text) for call in inspection.log if call.kind == "read"]
    written = [len(call.text) for call in inspection.log if call.kind != "read"]
    print(f"{inspection.file}: {inspection.file_bytes} bytes, position {inspection.position}")
    print(f"{len(read)} calls read {sum(read)} bytes, {len(written)} wrote {sum(written)}")
    print()
    print_table([["holds", "bytes"], *([kind, size] for kind, size in inspection.sizes.items())])
    print()
    rows: list[list[Any]] = [["memory", "head", "size", "norm", "effective rank"]]
    for m in inspection.matrices:
        size = f"{m.rows}x{m.columns}"
        rows.append([m.name, m.head, size, m.norm, f"{m.effective_rank:.1f}"])
    print_table(rows)


def _export(arguments: argparse.Namespace) -> int:
    session = open_state(arguments.state, open_model(arguments))
    state = session.state()
    metadata = {"format": "fastweights state", "position": str(session.position)}
    save_tensors(arguments.output, state, metadata)
    print(f"{arguments.output}: {len(state)} tensors")
    return 0
