"""The code in README.md and docs/ runs, and its links lead somewhere.

Blocks of a page run one after the other in one namespace, in a folder that holds a model in
`models/reader` (the one that ships or, in a tree without it, a small random one) and `book.txt`.
"""

import re
import textwrap
from pathlib import Path

import pytest

import fastweights
from fastweights.nn import LanguageModel, LanguageModelConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
BOOK = "The king is dead. Who told the queen? The fool told her, and he wept.\n" * 20

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^]\[]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    found = FENCED.findall(page.read_text(encoding="utf-8"))
    return [text for name, text in found if name == language]


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    titles = (re.sub(r"[^\w\- ]", "", title.lower()) for title in HEADING.findall(prose(page)))
    return {title.strip().replace(" ", "-") for title in titles}


@pytest.fixture
def reader_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shipped = ROOT / "models" / "reader"
    (tmp_path / "models").mkdir()
    model = tmp_path / "models" / "reader"
    if (shipped / "model.safetensors").exists():
        model.symlink_to(shipped)
    else:
        config = LanguageModelConfig(width=32, layers=1, feed_forward_width=32, attention_window=16)
        fastweights.save_model(model, LanguageModel(config))
    (tmp_path / "book.txt").write_text(BOOK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("reader_folder")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_python_blocks_run(page: Path) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python"), start=1):
        exec(compile(block, f"{name_of(page)}, block {number}", "exec"), namespace)


def test_the_cpp_lines_of_the_readme_are_those_of_the_example() -> None:
    source = (ROOT / "examples" / "link_me" / "main.cpp").read_text(encoding="utf-8")
    (shown,) = blocks(ROOT / "README.md", "cpp")
    assert textwrap.indent(shown, "  ") in source


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name_of(page)}: {target} is not there"
        if anchor:
            assert anchor in anchors(linked), f"{name_of(page)}: {target} has no such heading"
