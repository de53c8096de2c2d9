# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What this package stands on: declared, pinned, installed as pinned, and under licences that allow its own.

Known vulnerabilities need a list from elsewhere: `make audit`.
"""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


ROOT = Path(__file__).parents[2]
# With torch's builds for CUDA: they differ between machines, and torch pins them itself.
OF_TORCH = re.compile(r"nvidia-.*|cuda-.*|triton")
# Reciprocal for a whole work that contains them; this package contains none of its dependencies. Not among them: the
# GPL and AGPL, and whatever forbids commercial use.
ALLOWED = re.compile(
    r"\b(?:MIT|BSD|0BSD|Apache|ISC|PSF|Python Software|MPL|Mozilla|HPND|Unlicense|Zlib|CC0|Expat|CNRI"
    r"|LGPL|Lesser General)",
    re.IGNORECASE,
)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def declared(extras: list[str]) -> list[Requirement]:
    """The requirements of the package with some extras, those of extras of its own taken apart."""
    found = [Requirement(text) for text in project()["dependencies"]]
    for extra in extras:
        for text in project()["optional-dependencies"][extra]:
            requirement = Requirement(text)
            own = canonicalize_name(requirement.name) == "trl-marble"
            found += declared(sorted(requirement.extras)) if own else [requirement]
    return found


def installed() -> dict[str, importlib.metadata.Distribution]:
    """All that the tests' environment has because this package asks for it, directly or not."""
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = declared(["test"])
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen or OF_TORCH.fullmatch(name):
            continue
        seen.add((name, extras))
        found[name] = importlib.metadata.distribution(name)
        for text in found[name].requires or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                waiting.append(needed)
    return found


def test_every_pin_is_exact_and_stands_once():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9][a-z0-9-]*==[\w.]+", line)] == []
    assert len(pins()) == len(lines)


def test_all_that_is_needed_is_pinned_and_installed_as_pinned():
    pinned = pins()
    wrong = {
        name: (distribution.version, pinned.get(name))
        for name, distribution in installed().items()
        if name not in pinned or Version(distribution.version).public != Version(pinned[name]).public
    }
    assert wrong == {}, "installed and pinned versions differ; write the tested ones to constraints.txt"


def test_nothing_is_pinned_that_nobody_needs():
    asked = {
        canonicalize_name(requirement.name)
        for extra in project()["optional-dependencies"]
        for requirement in declared([extra])
    }
    assert set(pins()) - set(installed()) - asked == set()


def test_every_bound_allows_the_pinned_version():
    pinned = pins()
    requirements = declared(sorted(project()["optional-dependencies"]))
    assert [str(r) for r in requirements if not re.match(r">=", str(r.specifier))] == []
    assert [str(r) for r in requirements if r.name in pinned and pinned[r.name] not in r.specifier] == []


def imported_modules(file: Path) -> set[str]:
    """Top-level names of all absolute imports of a source file, within functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_all_that_is_imported_is_declared():
    of_module = importlib.metadata.packages_distributions()
    allowed = {
        canonicalize_name(r.name)
        for r in declared(sorted(set(project()["optional-dependencies"]) - {"test", "dev", "docs"}))
    }
    undeclared = {
        f"{file.relative_to(ROOT)}: {module}"
        for file in (ROOT / "trl_marble").rglob("*.py")
        for module in imported_modules(file) - sys.stdlib_module_names - {"trl_marble"}
        if not {canonicalize_name(name) for name in of_module.get(module, [module])} & allowed
    }
    assert undeclared == set()


def licence_of(distribution: importlib.metadata.Distribution) -> str:
    """All that a distribution's metadata says of its licence; the start of its licence file where that is nothing."""
    metadata = distribution.metadata
    said = [metadata.get("License-Expression") or "", (metadata.get("License") or "")[:2000]]
    said += [line for line in metadata.get_all("Classifier", []) if line.startswith("License ::")]
    text = " ".join(said)
    if ALLOWED.search(text) is None:
        files = [file for file in distribution.files or [] if "licen" in file.name.lower() or "COPYING" in file.name]
        text += " ".join((file.read_text() or "")[:2000] for file in files)
    return text


@pytest.mark.filterwarnings("ignore")
def test_every_licence_allows_ours():
    unclear = {
        name: licence_of(found)[:80] for name, found in installed().items() if not ALLOWED.search(licence_of(found))
    }
    assert unclear == {}
