# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The notebooks run from top to bottom, and are stored with outputs that say nothing of the machine they ran on."""

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
PATHS = re.compile(
    r"(?<![\w.:/])(/(?:home|root|tmp|work|Users|usr|opt|mnt|var|content)\b|[A-Z]:\\\\)|site-packages|\.venv"
)
SMALL = "from doc_runner import make_small\n\nmake_small()"


def cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(path, folder, monkeypatch, first=None):
    """The notebook after a run in an empty folder."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]))
    notebook = nbformat.read(path, as_version=4)
    if first is not None:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()  # raises where a cell does
    return notebook


def kinds(cell):
    """What a cell shows, but for messages on the way."""
    outputs = (output for output in cell.outputs if output.output_type in ("execute_result", "display_data"))
    return [sorted(output.data) for output in outputs]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    notebook = execute(path, tmp_path, monkeypatch, first=SMALL)
    stored = nbformat.read(path, as_version=4)
    assert [kinds(cell) for cell in cells(notebook)[1:]] == [kinds(cell) for cell in cells(stored)]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_full(path, tmp_path, monkeypatch):
    execute(path, tmp_path, monkeypatch)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_those_of_one_run_and_of_no_machine(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 1_000_000, "GitHub does not show large notebooks"
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert [cell.execution_count for cell in cells(notebook)] == list(range(1, len(cells(notebook)) + 1))
    for cell in cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", "remove warnings and progress bars"
            readable = {kind: data for kind, data in output.get("data", {}).items() if not kind.startswith("image/")}
            shown = output.get("text", "") + json.dumps(readable)
            assert not PATHS.search(shown), PATHS.search(shown)


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["shapeworld"]
