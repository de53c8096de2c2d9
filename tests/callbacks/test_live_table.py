# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The live table on a terminal, the lines where there is none, and that all is as before when training has ended."""

import io
import logging
import sys
import time

import pytest
from rich.console import Console
from trainer_helpers import blue, bright, prompt_set, small_trainer
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from trl_marble import LiveTableCallback
from trl_marble.callbacks.live_table import run_table, sparkline, status_line
from trl_marble.rewards import RewardError


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "num_generations_eval": 2}


def dark(images, **kwargs):
    return [-value for value in bright(images)]


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, height=40)


def rendered(table):
    screen = Console(file=io.StringIO(), width=140)
    screen.print(table)
    return screen.file.getvalue()


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_on_a_terminal_there_is_one_display(tmp_path, capfd, disable_tqdm):
    class Talk(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            print("a print")
            print("an error", file=sys.stderr)

    before = sys.stdout, sys.stderr
    screen = console(terminal=True)

    def slow(images, trainer_state, **kwargs):
        deadline = time.monotonic() + 20
        while trainer_state.global_step == 1 and "rewards  " not in screen.file.getvalue():
            assert time.monotonic() < deadline  # the display refreshes four times a second
        return blue(images)

    trainer = small_trainer(
        tmp_path,
        [bright, slow],
        callbacks=[LiveTableCallback(screen), Talk()],
        eval_dataset=prompt_set(),
        eval_reward_funcs=dark,
        disable_tqdm=disable_tqdm,
        **EVALUATED,
    )
    trainer.train()
    shown = screen.file.getvalue()
    last = shown[shown.rindex("Reward") :]
    for text in ("bright", "slow", "dark (held out)", "Weight", "Evaluation"):
        assert text in last, text
    for text in ("step  ", "rewards  ", "2/2", "0:00:00 left", "a print", "an error"):
        assert text in shown, text
    # Nothing writes past the display: no bars, no printed log, no messages.
    outside = "".join(capfd.readouterr())
    for text in ("rollout", "it/s", "'loss'", "a print", "an error"):
        assert text not in outside, text
    assert (sys.stdout, sys.stderr) == before
    kinds = {type(callback) for callback in trainer.callback_handler.callbacks}
    assert not {PrinterCallback, ProgressCallback} & kinds


def test_messages_of_transformers_appear_above_the_table(tmp_path):
    """Its log handler was made before the display, and holds the stream of that time."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("transformers").addHandler(handler)
    screen = console(terminal=True)
    real = sys.stderr
    try:
        sys.stderr = stream  # what the handler writes to is what the display takes the place of

        class Talk(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                logging.getLogger("transformers.talk").warning("a log message")

        small_trainer(tmp_path, callbacks=[LiveTableCallback(screen), Talk()], max_steps=1).train()
    finally:
        sys.stderr = real
        logging.getLogger("transformers").removeHandler(handler)
    assert "a log message" in screen.file.getvalue() and "a log message" not in stream.getvalue()
    assert handler.stream is stream


def test_a_failure_gives_the_terminal_back(tmp_path):
    def fails(images, trainer_state, **kwargs):
        if trainer_state.global_step == 1:
            raise ConnectionError("scorer went away")
        return bright(images)

    before = sys.stdout, sys.stderr
    callback = LiveTableCallback(console(terminal=True))
    trainer = small_trainer(tmp_path, [fails, blue], callbacks=[callback])
    with pytest.raises(RewardError):
        trainer.train()
    assert (sys.stdout, sys.stderr) == before and not callback.shows_bars
    with trainer.progress("rollout", 2) as bar:  # not one of the display that is gone
        bar.update(2)


def test_without_a_terminal_there_is_a_line_for_each_log(tmp_path, capsys):
    screen = console(terminal=False)
    trainer = small_trainer(
        tmp_path,
        callbacks=[LiveTableCallback(screen)],
        eval_dataset=prompt_set(),
        eval_reward_funcs=dark,
        disable_tqdm=True,
        **EVALUATED,
    )
    trainer.train()
    lines = screen.file.getvalue().splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["step 0/2", "step 1/2", "step 2/2", "step 2/2"]
    assert "evaluation | bright 0." in lines[0] and "dark -0." in lines[0] and "()" not in lines[0]
    assert "weights bright 0." in lines[1] and "worst cosine" in lines[1] and lines[1].endswith("left")
    assert "(" in lines[2] and "'loss'" not in capsys.readouterr().out


HISTORY = [
    {"step": 0, "eval_rewards/a/mean": 0.5, "eval_rewards/a/standard_error": 0.01, "eval_rewards/h/mean": 3.0},
    {"step": 1, "loss": 1.0, "rewards/a/mean": 0.50, "rewards/b/mean": float("nan"), "balance/alpha/a": 1.0}
    | {"balance/alpha/b": 0.0, "drift/diversity": 0.2},
    {"step": 2, "loss": 1.0, "rewards/a/mean": 0.75, "rewards/b/mean": 7.0, "balance/alpha/a": 0.25}
    | {"balance/alpha/b": 0.75, "drift/diversity": 0.1, "balance/cos_min": 0.125},
    {"step": 2, "eval_rewards/a/mean": 0.6, "eval_rewards/a/standard_error": 0.01, "eval_rewards/h/mean": 2.5},
]


def test_a_row_tells_value_change_trend_and_weight():
    table = run_table(HISTORY, ["a", "b"], ["h"])
    lines = {line.split()[1]: " ".join(line.split()) for line in rendered(table).splitlines() if line.startswith("│")}
    assert lines["a"] == "│ a │ 0.7500 │ +0.2500 │ ▁█ │ 0.25 │ 0.6000 │ +0.1000 │"
    assert lines["b"] == "│ b │ 7.000 │ │ ▁ │ 0.75 │ - │ │"
    assert lines["h"] == "│ h (held out) │ │ │ █▁ │ │ 2.500 │ -0.5000 │"
    assert "worst cosine in-sample +0.12 · diversity 0.100 (-50%)" in rendered(table)
    assert run_table([], ["a"]).row_count == 1  # nothing was logged yet


def test_held_out_cosines_are_means_over_the_latest_steps_beside_the_in_sample_one():
    values = [-9.0] * 5 + [0.1, 0.3] * 10  # the first are older than the window
    history = [
        {"step": step, "loss": 1.0, "rewards/a/mean": 0.5, "rewards/b/mean": 0.5, "balance/cos_min": 0.4}
        | {"balance/heldout_cos/a": value, "balance/heldout_cos/b": -value}
        for step, value in enumerate(values)
    ]
    history.append({"step": 25, "balance/heldout_cos/a": float("nan")})
    shown = rendered(run_table(history, ["a", "b", "c"]))
    lines = {line.split()[1]: " ".join(line.split()) for line in shown.splitlines() if line.startswith("│")}
    assert "│ +0.20 ± 0.02 │" in lines["a"] and "│ -0.20 ± 0.02 │" in lines["b"] and "±" not in lines["c"]
    cells = run_table(history, ["a", "b"]).columns[5]._cells
    assert [cell.style for cell in cells] == ["green", "red"]
    line = status_line(history[:-1], ["a", "b"])
    assert line.endswith("worst cosine in-sample +0.40, held-out -0.20")
    assert "worst cosine in-sample +0.40" in shown


def test_weights_by_progress_are_shown_with_the_progress():
    progress = {"progress/a": 0.3, "progress/b": float("nan"), "progress/weight/a": 0.2, "progress/weight/b": 0.8}
    row = {"step": 1, "loss": 1.0, "rewards/a/mean": 0.5, "rewards/b/mean": 0.25} | progress
    lines = [" ".join(line.split()) for line in rendered(run_table([row], ["a", "b"], ["h"])).splitlines()]
    assert "│ a │ 0.5000 │ │ ▁ │ 0.20 │ +0.30 │" in lines and "│ b │ 0.2500 │ │ ▁ │ 0.80 │ │" in lines
    assert status_line([row], ["a", "b"]) == "a 0.5000 | b 0.2500 | weights a 0.20, b 0.80"


def test_lines_are_of_steps_and_evaluations_only():
    assert status_line(HISTORY[:2], ["a", "b"]) == "a 0.5000 | b - | weights a 1.00, b 0.00"
    assert status_line(HISTORY, ["a", "b"], ["h"]) == "evaluation | a 0.6000 (+0.1000) | h 2.500 (-0.5000)"
    assert status_line([*HISTORY, {"step": 2, "train_runtime": 3.0}], ["a"]) is None


def test_sparklines():
    assert sparkline([]) == "" and sparkline([3.0]) == "▁" and sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([0.0, 0.0, 1.0, 1.0], width=2) == "▁█"
    assert len(sparkline(list(range(1000)))) == 16


def test_a_trainer_in_a_terminal_has_the_table(tmp_path, monkeypatch):
    def tables(**settings):
        trainer = small_trainer(tmp_path, **settings)
        return [each for each in trainer.callback_handler.callbacks if isinstance(each, LiveTableCallback)]

    assert not tables(disable_tqdm=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert len(tables(disable_tqdm=False)) == 1
    own = LiveTableCallback(console(terminal=False))
    assert tables(disable_tqdm=False, callbacks=[own]) == [own]
    assert not tables(disable_tqdm=True)
