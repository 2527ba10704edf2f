"""The page that `inspect --html` writes: tables, and plots as SVG inside it."""

import html
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import Error
from ._inspection import Inspection, Matrix

STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: .15em .8em; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; }
svg { max-width: 100%; height: auto; }
"""


def write_page(path: Path, inspection: Inspection) -> None:
    """Writes one file that needs no other.

    Raises:
        Error: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    title = html.escape(f"State of {Path(inspection.file).name}")
    body = [
        f"<h1>{title}</h1>",
        f"<p>Position {inspection.position}, {inspection.file_bytes} bytes in the file.</p>",
        "<h2>What it holds</h2>",
        table(["", "bytes"], inspection.sizes.items()),
        "<h2>What was read and written</h2>",
        plot_log(inspection),
        "<h2>Fast-weight matrices</h2>",
        plot_ranks(inspection.matrices),
        plot_spectra(inspection.matrices),
        table(
            ["memory", "head", "size", "norm", "effective rank"],
            (row(m) for m in inspection.matrices),
        ),
    ]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    page = f"<!DOCTYPE html>\n<html lang=en><head>{head}</head><body>\n" + "\n".join(body)
    path.write_text(page + "\n</body></html>\n", encoding="utf-8")


def row(m: Matrix) -> list[Any]:
    """A matrix in the table."""
    return [m.name, m.head, f"{m.rows}×{m.columns}", f"{m.norm:.4g}", f"{m.effective_rank:.1f}"]


def table(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """An HTML table."""

    def line(cells: Iterable[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    lines = [line(header, "th"), *(line(row, "td") for row in rows)]
    return "<table>" + "\n".join(lines) + "</table>"


def figure(columns: int, height: float) -> tuple[Any, list[Any]]:
    """A figure of several axes side by side."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Error("--html needs matplotlib: pip install matplotlib") from None
    result = Figure(figsize=(10, height), layout="constrained")
    return result, list(result.subplots(1, columns, squeeze=False)[0])


def svg(drawn: Any) -> str:
    """A figure as an element of the page."""
    file = io.StringIO()
    drawn.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def plot_log(inspection: Inspection) -> str:
    """The calls along the text."""
    drawn, (axes,) = figure(1, 1.3)
    at = inspection.position - sum(len(call.text) for call in inspection.log)
    spans: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # by whether it was read
    for call in inspection.log:
        spans[call.kind == "read"].append((at, len(call.text)))
        at += len(call.text)
    for is_read, color in ((True, "tab:blue"), (False, "tab:orange")):
        axes.broken_barh(spans[is_read], (0, 1), color=color, edgecolor="white", linewidth=0.5)
    axes.set(yticks=[], xlabel="position (blue: read, orange: written)")
    return svg(drawn)


def plot_ranks(found: list[Matrix]) -> str:
    """Norm and effective rank of every matrix."""
    drawn, (left, right) = figure(2, 3.2)
    names = [f"{m.name.replace('.memory', '')}/{m.head}" for m in found]
    left.bar(names, [m.norm for m in found])
    left.set_ylabel("norm")
    right.bar(names, [min(m.rows, m.columns) for m in found], color="#ddd", label="largest")
    right.bar(names, [m.effective_rank for m in found], label="effective rank")
    right.legend()
    for axes in (left, right):
        axes.tick_params("x", rotation=90, labelsize=6)
    return svg(drawn)


def plot_spectra(found: list[Matrix]) -> str:
    """Singular values, a line for each matrix, a colour for each memory."""
    drawn, (axes,) = figure(1, 3.5)
    names = list(dict.fromkeys(m.name for m in found))
    for m in found:
        values = [value for value in m.singular_values if value > 0]
        label = m.name if m.head == 0 else None
        axes.semilogy(values, color=f"C{names.index(m.name) % 10}", alpha=0.7, label=label)
    axes.set(xlabel="index", ylabel="singular value")
    if found:
        axes.legend()
    return svg(drawn)
