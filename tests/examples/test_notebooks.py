# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The notebooks run from top to bottom, and are stored with outputs that say nothing of the machine they ran on."""

import json
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


def cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell shows, but for messages on the way."""
    outputs = (output for output in cell.outputs if output.output_type in ("execute_result", "display_data"))
    return [sorted(output.data) for output in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook, stored = (nbformat.read(path, as_version=4) for _ in range(2))
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises where a cell does
    assert [kinds(cell) for cell in cells(notebook)] == [kinds(cell) for cell in cells(stored)]


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
