# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Which modules import which: no circles, and nothing below the trainer knows of it."""

import ast
import importlib.util
from graphlib import TopologicalSorter
from pathlib import Path

import trl_marble


ROOT = Path(trl_marble.__file__).parent
TOP = ("trainer", "selftest", "cli")  # the rooms that may use all others


def modules() -> dict[str, Path]:
    paths = {path.relative_to(ROOT.parent).with_suffix("").parts: path for path in ROOT.rglob("*.py")}
    named = {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for parts, path in paths.items()}
    return {name: path for name, path in named.items() if name != "trl_marble"}


def modules_below_the_trainer() -> dict[str, Path]:
    return {name: path for name, path in modules().items() if name.split(".")[1] not in TOP}


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a module imports, also inside functions and for types only."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(relative, package)
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found - {name}


def test_no_module_is_part_of_a_circle_of_imports():
    known = modules()
    graph = {name: imported(name, path, known) for name, path in known.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_no_module_below_the_trainer_imports_or_mentions_it():
    known = modules_below_the_trainer()
    for name, path in known.items():
        assert "MarbleNFTTrainer" not in path.read_text(encoding="utf-8"), path
        assert not [other for other in imported(name, path, known) if other.startswith("trl_marble.trainer")], path
