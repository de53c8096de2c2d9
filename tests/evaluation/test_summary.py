# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import math

import pytest
from rich.console import Console

from trl_marble.evaluation import BalanceSummary, format_value, rewards_table, summarize_balance
from trl_marble.evaluation.summary import mean_with_error


HISTORY = [
    {"step": 0, "eval_rewards/reader/mean": 0.5},
    {
        "step": 1,
        "balance/alpha/reader": 0.2,
        "balance/alpha/big": 0.8,
        "balance/cos_min": 0.1,
        "balance/conflict": 0.0,
        "balance/weighted_sum/cos_min": -0.2,
        "balance/weighted_sum/conflict": 1.0,
    },
    {"step": 2, "balance/alpha/reader": 0.4, "balance/alpha/big": 0.6},
    {
        "step": 3,
        "balance/alpha/reader": 0.6,
        "balance/alpha/big": 0.4,
        "balance/cos_min": 0.05,
        "balance/conflict": 0.0,
        "balance/weighted_sum/cos_min": 0.3,
        "balance/weighted_sum/conflict": 0.5,
    },
    {"step": 4, "balance/cos_min": math.nan, "balance/conflict": 0.0},
    {"step": 4, "train_runtime": 3.0},
]


def text(table) -> list[list[str]]:
    """The table's rows, as a terminal without colours shows them."""
    console = Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return [
        [cell.strip() for cell in line.strip("│┃").split("│")] for line in capture.get().splitlines() if "│" in line
    ]


def test_balance_is_summarized_over_the_steps_that_logged_it():
    summary = summarize_balance(HISTORY)
    assert summary.alpha == pytest.approx({"reader": 0.4, "big": 0.6})
    assert (summary.cos_min, summary.conflict) == (0.05, 0.0)
    assert (summary.weighted_sum_cos_min, summary.weighted_sum_conflict) == (-0.2, 0.75)


def test_noisy_cosines_are_averaged_with_their_errors():
    measured = [
        {"balance/alpha/a": 0.5, "balance/alpha/b": 0.5, "balance/cos/a": 0.4, "balance/cos/b": math.nan}
        | {"balance/heldout_cos/a": value, "balance/heldout_cos/b": math.nan, "balance/signal/a": 2 * value}
        | {"balance/weighted_sum/heldout_cos/a": -value}
        for value in (-0.1, math.nan, 0.1, 0.3)
    ]
    summary = summarize_balance(measured)
    assert summary.heldout_cos == pytest.approx({"a": 0.1, "b": None})
    assert summary.heldout_cos_se == pytest.approx({"a": 0.2 / math.sqrt(3), "b": None})
    assert summary.cos["a"] == pytest.approx(0.4)
    assert summary.weighted_sum_heldout_cos["a"] == pytest.approx(-0.1)
    assert summary.signal == {}  # without norms there are no squared norms to divide by
    rows = [row | {"balance/grad_norm/a": norm} for row, norm in zip(measured, (1, 2, 1, 3), strict=True)]
    assert summarize_balance(rows).signal == pytest.approx({"a": (-0.2 + 0.2 + 9 * 0.6) / 11, "b": None})
    assert mean_with_error(measured, "balance/heldout_cos/a", last=2) == pytest.approx((0.2, 0.1))
    assert mean_with_error(measured, "balance/heldout_cos/a", last=1) == pytest.approx((0.3, math.nan), nan_ok=True)
    assert all(math.isnan(value) for value in mean_with_error(measured, "balance/heldout_cos/b"))


def test_without_balancing_there_is_no_summary_and_without_cosines_they_are_none():
    assert summarize_balance([]) is None
    assert summarize_balance([{"step": 1, "loss": 0.1}]) is None
    assert summarize_balance(HISTORY[2:3]) == BalanceSummary(alpha={"reader": 0.4, "big": 0.6})


@pytest.mark.parametrize(
    ("value", "sign", "expected"),
    [
        (0.68374, False, "0.6837"),
        (-0.5, False, "-0.5000"),
        (1.23456, False, "1.235"),
        (21.3449, False, "21.34"),
        (0.05, True, "+0.0500"),
        (-0.05, True, "-0.0500"),
        (None, False, "not measured"),
        (math.nan, True, "not measured"),
    ],
)
def test_values_are_written_with_their_precision(value, sign, expected):
    assert format_value(value, sign) == expected


def test_table_shows_the_change_in_standard_errors():
    before, after = {"reader": (0.5, 0.03), "big": (21.0, 0.0)}, {"reader": (0.7, 0.04), "big": (20.0, 0.0)}
    assert text(rewards_table(before, after, difference_se={"reader": 0.02, "big": 0.0})) == [
        ["reader", "0.5000 ± 0.0300", "0.7000 ± 0.0400", "+0.2000", "+10.0"],
        ["big", "21.00 ± 0.0000", "20.00 ± 0.0000", "-1.000", "-"],
    ]


def test_means_of_one_prompt_have_no_error():
    table = rewards_table({"calm": (0.5, math.nan)}, {"calm": (0.7, math.nan)}, difference_se={"calm": math.nan})
    assert text(table) == [["calm", "0.5000", "0.7000", "+0.2000", "-"]]


def test_only_changes_of_two_standard_errors_are_coloured():
    before = dict.fromkeys(("up", "down", "same"), (0.5, 0.0))
    after = {"up": (0.75, 0.125), "down": (0.25, 0.125), "same": (0.6, 0.125)}
    changes = rewards_table(before, after, dict.fromkeys(before, 0.125)).columns[3].cells
    assert [(cell.plain, cell.style) for cell in changes] == [
        ("+0.2500", "green"),
        ("-0.2500", "red"),
        ("+0.1000", ""),
    ]


def test_names_are_not_taken_for_markup():
    table = rewards_table({"[bold]reader": (0.5, 0.1)}, {"[bold]reader": (0.6, 0.1)}, {"[bold]reader": 0.1})
    assert text(table)[0][0] == "[bold]reader"


def test_tables_of_different_rewards_are_refused():
    with pytest.raises(ValueError, match=r"`after` has the rewards \['big'\], `before` has \['reader'\]"):
        rewards_table({"reader": (0.5, 0.1)}, {"big": (0.5, 0.1)}, {"reader": 0.1})
    with pytest.raises(ValueError, match="`difference_se` has the rewards"):
        rewards_table({"reader": (0.5, 0.1)}, {"reader": (0.5, 0.1)}, difference_se={})
