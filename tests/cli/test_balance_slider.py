# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A balance slider from the command line."""

from trl_marble.cli.main import main
from trl_marble.hub.files import read_layers


def test_a_run_with_a_balance_slider_leaves_an_adapter_for_each_reward(workplace, capsys):
    options = ["--balance_slider", "true", "--multi_objective_aggregation", "normalize_then_sum"]
    assert main(["train", "--config", "run.yaml", *options]) == 0
    for name in ("bright", "blue"):
        layers = read_layers(workplace / "run" / "adapters" / f"{name}.safetensors")
        assert {layer.rank for layer in layers.values()} == {4}
    assert {layer.rank for layer in read_layers(workplace / "run").values()} == {8}
    capsys.readouterr()
    assert main(["train", "--config", "run.yaml", "--balance_slider", "true", "--output_dir", "other"]) != 0
    assert "set `multi_objective_aggregation='normalize_then_sum'`" in capsys.readouterr().err
