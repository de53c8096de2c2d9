# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What is released: a wheel that runs in an environment of its own, and an sdist that is not too large."""

import os
import subprocess
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import trl_marble


ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAX_SDIST = 20_000_000


def pip(python: Path, *words: str, folder: Path) -> None:
    """Run pip, or skip the test where there is no package index; the exact versions are those of constraints.txt."""
    command = [python, "-m", "pip", *words, "-c", ROOT / "constraints.txt", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0 and ("No matching distribution" in done.stderr or "Failed to establish" in done.stderr):
        pytest.skip(f"no package index that has everything: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder with wheel and sdist, built from the checkout as an index's user would build them."""
    folder = tmp_path_factory.mktemp("built")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    pip(python, "install", "build", "hatchling", folder=folder)
    command = [python, "-m", "build", "--no-isolation", "--outdir", folder / "dist", ROOT]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "dist"


def test_the_version_stands_everywhere():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert PROJECT["version"] == trl_marble.__version__
    assert f"\nversion: {PROJECT['version']}\n" in citation
    assert f"\n## {PROJECT['version']} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_sdist_is_small_and_has_what_the_tests_need(built):
    (sdist,) = built.glob("*.tar.gz")
    assert sdist.stat().st_size < MAX_SDIST
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "tests/conftest.py", "docs/pipelines.md", "examples/configs/sd3.5m_24gb.yaml"} <= names
    assert not [name for name in names if name.startswith(("model_cards", "runs", ".venv", "build"))]


@pytest.mark.slow
def test_the_wheel_has_the_package_alone_with_its_data(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"trl_marble"}
    package = ROOT / "trl_marble"
    files = {path.relative_to(ROOT).as_posix() for path in package.rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} <= set(names)


@pytest.mark.slow
def test_the_wheel_trains_the_demos_first_steps_in_a_bare_environment(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    pip(python, "install", f"{wheel}[plots]", folder=tmp_path)
    # Nothing of the checkout is seen: another folder, and no PYTHONPATH.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words = [tmp_path / "env" / "bin" / "trl-marble", "demo", "--max_steps", "2", "--output_dir", "demo"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("pytorch_lora_weights.safetensors", "README.md", "report.json", "before_after.png"):
        assert (tmp_path / "demo" / name).is_file(), name
    found = subprocess.run(
        [python, "-c", "import trl_marble; print(trl_marble.__file__, trl_marble.__version__)"],
        **{"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": True},
    ).stdout
    assert found.startswith(str(tmp_path)) and found.split()[1] == PROJECT["version"]
