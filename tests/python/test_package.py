"""The package itself: errors, exports, the check of torch's version, documentation."""

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastweights
from fastweights import _C, _build, nn, ops


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (fastweights.Error, Exception),
        (fastweights.ShapeError, ValueError),
        (fastweights.FileError, OSError),
        (fastweights.StateMismatch, RuntimeError),
        (fastweights.Cancelled, InterruptedError),
    ],
)
def test_errors_are_also_builtin_ones(error: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(error, builtin)
    assert issubclass(error, fastweights.Error)
    assert str(error("a message")) == "a message"


def test_everything_exported_exists_and_is_documented() -> None:
    for module in (fastweights, ops, nn, fastweights.io):
        for name in module.__all__:
            assert inspect.getdoc(getattr(module, name)), f"{module.__name__}.{name}"


def test_versions() -> None:
    assert fastweights.__version__ == _build.VERSION
    assert torch.__version__.split(".")[:2] == _C.torch_version.split(".")[:2]


def test_another_minor_version_of_torch_is_refused(tmp_path: Path) -> None:
    package = tmp_path / "fastweights"
    package.mkdir()
    assert fastweights.__file__ is not None
    shutil.copy(fastweights.__file__, package / "__init__.py")
    (package / "_build.py").write_text('VERSION = "0"\nTORCH_VERSION = "1.99.3"\n')
    result = subprocess.run(
        [sys.executable, "-c", "import fastweights"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert f"built for torch 1.99.3 and found torch {torch.__version__}" in result.stderr


def test_types_are_declared() -> None:
    assert fastweights.__file__ is not None
    folder = Path(fastweights.__file__).parent
    assert (folder / "py.typed").exists()
    stub = (folder / "_C.pyi").read_text()
    for name in dir(_C):
        if not name.startswith("__"):
            assert name in stub, name
