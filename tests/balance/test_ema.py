# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import pytest

from trl_marble.balance import OLD_POLICY_PRESETS, old_policy_decay, weight_ema_decay


@pytest.mark.parametrize(
    ("preset", "step", "expected"),
    [
        (0, 0, 0.0),
        (0, 10_000, 0.0),
        (1, 0, 0.0),
        (1, 100, 0.1),
        (1, 949, 0.949),
        (1, 5000, 0.95),
        (2, 0, 0.0),
        (2, 75, 0.0),
        (2, 76, 0.0075),
        (2, 175, 0.75),
        (2, 1000, 0.999),
    ],
)
def test_old_policy_presets(preset, step, expected):
    assert old_policy_decay(step, *OLD_POLICY_PRESETS[preset]) == pytest.approx(expected, abs=1e-12)


def test_diffusion_nfts_own_bound():
    assert old_policy_decay(600, flat=0, rate=0.001, max=0.5) == 0.5


def test_weight_ema_decay():
    assert [weight_ema_decay(step) for step in (0, 8, 80, 10_000)] == pytest.approx([0.1, 0.5, 0.9, 0.9])
    assert [weight_ema_decay(step, 0.98) for step in (0, 80, 10_000)] == pytest.approx([0.1, 0.9, 0.98])
    assert [weight_ema_decay(step, 0.0) for step in (0, 80)] == [0.0, 0.0]
