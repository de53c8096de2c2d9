# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The evidence: what the pages show was written by the comparison, not by hand."""

import json
import re
from pathlib import Path


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "evidence"
REPORT = FOLDER / "report.md"
REPORTS = sorted(FOLDER.glob("*report.md"))
PAGES = [ROOT / "docs" / "evidence.md", *sorted(set(FOLDER.glob("*.md")) - set(REPORTS))]
RESULTS = json.loads((FOLDER / "results.json").read_text())
LABELS = {row["label"] for rows in (RESULTS["main"], *RESULTS["ablations"].values()) for row in rows.values()}


def rows_of(path: Path) -> list[str]:
    """The rows of all tables."""
    return [line for line in path.read_text().splitlines() if line.startswith("| ") and "---" not in line]


def rows_of_methods(path: Path) -> list[str]:
    """Those that begin with a method."""
    return [row for row in rows_of(path) if row.split("|")[1].strip() in LABELS]


def test_every_row_of_the_pages_is_one_of_the_reports():
    assert sum(len(rows_of_methods(page)) for page in PAGES) >= 3
    known = {row for report in REPORTS for row in rows_of(report)}
    assert [(page.name, row) for page in PAGES for row in rows_of(page) if row not in known] == []


def test_every_result_in_the_readme_is_one_of_the_reports():
    rows = rows_of_methods(ROOT / "README.md")
    assert len(rows) >= 2 and set(rows) <= {row for report in REPORTS for row in rows_of(report)}


def test_the_report_is_that_of_the_results():
    section = REPORT.read_text().split("## Change of each reward")[1].split("\n## ")[0]
    changes = {
        row.split("|")[1].strip(): re.findall(r"[+-]\d\.\d{3} ± ", row)
        for row in section.splitlines()
        if row.startswith("| ")
    }
    for result in RESULTS["main"].values():
        means = [f"{change['mean']:+.3f} ± " for change in result["changes"].values()]
        assert changes[result["label"]] == means
    assert not RESULTS["scale"]["quick"] and RESULTS["scale"]["steps"] == 25
