# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of one adapter for many balances: the area of a front, equal costs, and the command in small."""

import json
import sys

import pytest
from example_scripts import EXAMPLES


sys.path.append(str(EXAMPLES / "benchmarks"))
import slider_front as benchmark  # noqa: E402
from evidence.costs import estimate_passes  # noqa: E402


@pytest.mark.parametrize(
    ("points", "area"),
    [
        ([(2, 3)], 6),
        ([(2, 3), (1, 2)], 6),  # the second is worse in both
        ([(2, 1), (1, 2), (3, 0)], 3),
        ([(2, -1), (-1, 2)], 0),
        ([(2, -1), (1, 1), (-1, 5)], 1),
    ],
)
def test_the_area_of_a_front_is_the_union_of_its_rectangles(points, area):
    assert benchmark.front_area(points) == pytest.approx(area)
    assert benchmark.front_area(points[::-1]) == pytest.approx(area)


def test_both_methods_cost_the_same():
    settings = {**benchmark.sizes_of(benchmark.SCALE), **benchmark.SUM, "beta": 0.1}
    costs = {
        method: sum(
            part.steps * estimate_passes(part.settings, len(part.rewards))
            for part in benchmark.parts_of(method, settings, benchmark.STEPS)
        )
        for method in benchmark.METHODS
    }
    assert costs["soup"] == pytest.approx(costs["slider"], rel=0.02)


def test_the_report_compares_areas_seed_by_seed():
    def front(size):
        return [{"share": share, "centring": size, "calm": size, "kl": 0.04} for share in benchmark.SHARES]

    fronts = {"slider": [front(1.0), front(2.0)], "soup": [front(0.0), front(1.0)]}
    text = benchmark.report(fronts, [])
    assert "| one adapter, many balances | 2.500 ± 1.500 |" in text  # areas 1 and 4
    assert "| soup of specialists | 0.500 ± 0.500 |" in text
    assert "| difference, same seed | 2.000 ± 1.000 |" in text
    assert "| difference, same seed | 2.000 ± 1.000 |" in benchmark.report(dict(reversed(fronts.items())), [])
    assert "| soup of specialists | 0.25 | 0.50 ± 0.50 | 0.50 ± 0.50 | 0.040 ± 0.000 |" in text


@pytest.mark.slow
def test_a_quick_run_ends_with_two_fronts(tmp_path):
    arguments = ["--quick", "--seeds", "1", "--output_dir", str(tmp_path)]
    benchmark.main(arguments)
    fronts = json.loads((tmp_path / "front.json").read_text())
    assert list(fronts) == list(benchmark.METHODS)
    for (points,) in fronts.values():
        assert [point["share"] for point in points] == list(benchmark.SHARES)
        assert len({tuple(point.values()) for point in points}) == len(points)
        assert all(point["kl"] > 0 for point in points)
    assert (tmp_path / "front.png").stat().st_size > 10_000
    assert "difference, same seed" in (tmp_path / "report.md").read_text()
    before = (tmp_path / "front.json").read_bytes()
    benchmark.main(arguments)  # everything is finished: nothing changes
    assert (tmp_path / "front.json").read_bytes() == before
