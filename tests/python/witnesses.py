"""Implementations by others, loaded file by file from where scripts/setup puts them.

Neither package can be imported: fla-core needs Triton, and transformers changes what it computes
where it can import fla; rwkv sets global switches and may compile an extension.
"""

import ast
import functools
import importlib.util
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FOLDER = Path(sys.prefix) / "witnesses"


def source(file: str) -> Path:
    path = FOLDER / file
    assert path.exists(), f"{file} is not installed: run scripts/setup"
    return path


@functools.cache
def naive(path: str) -> ModuleType:
    """fla/ops/<path>/naive.py, a module that needs no Triton."""
    file = source(f"fla/ops/{path}/naive.py")
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def parsed(file: str) -> ast.Module:
    return ast.parse(source(file).read_text(encoding="utf-8"))


def definition(file: str, name: str) -> ast.FunctionDef:
    """The last definition of a function in a file: a plain one stands behind the one for CUDA."""
    nodes = ast.walk(parsed(file))
    found = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name]
    assert found, f"{file} has no {name}"
    return max(found, key=lambda node: node.lineno)


def function(file: str, name: str) -> Callable[..., Any]:
    """One function of a file that cannot be imported, without its decorators."""
    node = definition(file, name)
    bare = ast.FunctionDef(**{field: getattr(node, field) for field in node._fields})
    bare.decorator_list = []
    module = ast.fix_missing_locations(ast.Module(body=[bare], type_ignores=[]))
    names: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "math": math}
    exec(compile(module, file, "exec"), names)
    made: types.FunctionType = names[name]
    return made
