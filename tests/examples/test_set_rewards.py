# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of diversity as a reward: the command from nothing to a table."""

import json
import sys

import pytest
from example_scripts import EXAMPLES


sys.path.append(str(EXAMPLES / "benchmarks"))
import set_rewards as benchmark  # noqa: E402


@pytest.mark.slow
def test_a_quick_run_ends_with_a_table(tmp_path):
    arguments = ["--quick", "--seeds", "1", "--variants", "six", "diversity", "--output_dir", str(tmp_path)]
    benchmark.main(arguments)
    rows = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows if "---" not in row] == [
        "trained on",
        "nothing",
        "five rewards and diversity",
        "diversity alone",
    ]
    for variant in ("six", "diversity"):
        history = json.loads((tmp_path / variant / "seed-1" / "history.json").read_text())
        assert history[0]["rewards/VendiDiversity/mean"] > 0
    steps = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("history.json"))]
    benchmark.main(arguments)  # everything is finished
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("history.json"))] == steps
