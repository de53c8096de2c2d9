# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of the adversarial reward: what its measures see, and the command from nothing to a table."""

import json
import sys

import numpy as np
import pytest
from example_scripts import EXAMPLES
from PIL import Image


sys.path.append(str(EXAMPLES / "benchmarks"))
import adversarial_reward as benchmark  # noqa: E402


def test_texture_sees_what_layout_does_not():
    clean = benchmark.drawn(4, seed=0)
    noise = np.random.default_rng(0).normal(0, 12, (64, 64, 1))
    rough = [Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8)) for image in clean]
    changes = [(extract(rough) - extract(clean)).abs().mean() for extract in (benchmark.layout, benchmark.texture)]
    spreads = [extract(clean).std(dim=0).mean() for extract in (benchmark.layout, benchmark.texture)]
    assert changes[0] / spreads[0] < 0.2 < 1 < changes[1] / spreads[1]


@pytest.mark.slow
def test_a_quick_run_ends_with_results(tmp_path):
    arguments = ["--quick", "--seeds", "1", "--variants", "six", "--output_dir", str(tmp_path)]
    benchmark.main(arguments)
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (tmp_path / "report.md").read_text().splitlines()
        if line.startswith("|")
    ]
    base, six = (dict(zip(header, row, strict=True)) for row in rows)
    assert (base["trained on"], six["trained on"]) == ("nothing", "five rewards and the adversarial one")
    numbers = {name: float(six[name].split(" ± ")[0]) for name in header[2:]}
    assert base["worst gain"] == "0.00 ± –" and 0 <= numbers["told apart"] <= 1 and numbers["distance texture"] > -0.1
    history = json.loads((tmp_path / "six" / "seed-1" / "history.json").read_text())
    assert history[0]["rewards/AdversarialReward/mean"] == 0 != history[1]["rewards/AdversarialReward/mean"]
    assert history[0]["adversarial/accuracy"] == 0.5
