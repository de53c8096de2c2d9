# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import math

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from trl_marble.evaluation import before_after_grid, image_grid, plot_balance, plot_progress, plot_rewards, plots
from trl_marble.evaluation.figures import NOT_TAKEN, TAKEN
from trl_marble.evaluation.plots import PALETTE, plot_histograms


RED, GREEN, BLUE, YELLOW = (200, 10, 10), (10, 200, 10), (10, 10, 200), (200, 200, 10)


def tile(color, size=(32, 32)) -> Image.Image:
    return Image.new("RGB", size, color)


def extent(path, color) -> tuple[float, float, int, int]:
    """Middle (x, y), width and height in pixels of all that has one colour in a picture."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    y, x = np.nonzero(np.abs(pixels - np.array(color)).max(axis=2) <= 3)
    assert len(x) > 0, f"nothing has the colour {color}"
    return x.mean(), y.mean(), int(x.max() - x.min()) + 1, int(y.max() - y.min()) + 1


def has_color(path, color: str) -> bool:
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    wanted = np.array([round(255 * part) for part in to_rgb(color)])
    return bool((np.abs(pixels - wanted).max(axis=2) <= 2).sum() > 20)


def history(steps: int = 12, weighted_sum: bool = True) -> list[dict]:
    """A log like the trainer's: weights and rewards at every step, cosines at every third, and other rows between."""
    rows: list[dict] = [{"step": 0, "eval_rewards/reader/mean": 0.5}]
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 0.1, "balance/alpha/reader": 0.3, "balance/alpha/big": 0.7}
        row |= {"rewards/reader/mean": 0.5 + 0.01 * step, "rewards/reader/std": 0.1, "rewards/big/mean": 21.0 - step}
        if step % 3 == 1:
            row |= {"balance/cos_min": 0.2, "balance/conflict": 0.0}
            if weighted_sum:
                row |= {"balance/weighted_sum/cos_min": -0.3, "balance/weighted_sum/conflict": 1.0}
        rows.append(row)
    return [*rows, {"step": steps, "train_runtime": 3.0}]


def test_images_are_in_their_rows_and_columns(tmp_path):
    path = image_grid([[tile(RED), tile(GREEN)], [tile(BLUE)]], ["a", "b"], tmp_path / "new" / "grid.png", cell=80)
    red, green, blue = (extent(path, color) for color in (RED, GREEN, BLUE))
    assert red[1] == green[1] < blue[1]
    assert red[0] == blue[0] < green[0]
    # The tile without the thin line that is drawn over its edge.
    assert all(76 <= side <= 80 for side in (*red[2:], *green[2:], *blue[2:]))


def test_images_keep_their_proportions(tmp_path):
    path = image_grid([[tile(RED, (64, 32)), tile(BLUE, (10, 40))]], ["a"], tmp_path / "grid.png", cell=80)
    _, red_y, width, height = extent(path, RED)
    assert 76 <= width <= 80 and 36 <= height <= 40
    _, blue_y, width, height = extent(path, BLUE)
    assert 16 <= width <= 20 and 76 <= height <= 80
    assert abs(red_y - blue_y) <= 1


def test_labels_and_titles_enlarge_the_page(tmp_path):
    plain = image_grid([[tile(RED)]], ["a"], tmp_path / "plain.png")
    titled = image_grid([[tile(RED)]], ["a"], tmp_path / "titled.png", title="Step 3", column_labels=["seed 0"])
    assert extent(titled, RED)[1] > extent(plain, RED)[1] + 50


@pytest.mark.parametrize("prompt", ["costs $5 or $x^{$", "word " * 80, "unbroken" * 40, "", "two\nlines", "\\frac{"])
def test_any_prompt_can_be_a_label_and_stays_left_of_the_images(prompt, tmp_path):
    path = image_grid([[tile(RED)]], [prompt], tmp_path / "grid.png")
    blank = image_grid([[tile(RED)]], ["x"], tmp_path / "blank.png")
    assert Image.open(path).size == Image.open(blank).size
    assert extent(path, RED) == extent(blank, RED)


def test_after_is_right_of_before_in_the_same_row(tmp_path):
    before, after = [[tile(RED)], [tile(GREEN)]], [[tile(BLUE)], [tile(YELLOW)]]
    path = before_after_grid(["a", "b"], before, after, tmp_path / "grid.png", title="ShapeWorld")
    red, green, blue, yellow = (extent(path, color) for color in (RED, GREEN, BLUE, YELLOW))
    assert red[0] == green[0] < blue[0] == yellow[0]
    assert red[1] == blue[1] < green[1] == yellow[1]


def test_grids_refuse_what_does_not_pair_up(tmp_path):
    path, images = tmp_path / "grid.png", [[tile(RED)]]
    with pytest.raises(ValueError, match="`row_labels` has 2 entries, `rows` has 1"):
        image_grid(images, ["a", "b"], path)
    with pytest.raises(ValueError, match="`column_labels` has 2 labels for 1 columns"):
        image_grid(images, ["a"], path, column_labels=["a", "b"])
    with pytest.raises(ValueError, match="`rows` has no image"):
        image_grid([[]], ["a"], path)
    with pytest.raises(ValueError, match="`prompts` has 1 entries, `after` has 2"):
        before_after_grid(["a"], images, images * 2, path)
    with pytest.raises(ValueError, match="1 images before and 2 after for the prompt 'a'"):
        before_after_grid(["a"], images, [[tile(RED)] * 2], path)
    assert not path.exists()


def test_balance_shows_weights_and_both_directions(tmp_path):
    path = plot_balance(history(), tmp_path / "new" / "balance.png")
    assert has_color(path, TAKEN) and has_color(path, NOT_TAKEN)
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    panel = pixels[: pixels.shape[0] * 54 // 100, : pixels.shape[1] * 6 // 10]  # the upper panel without its legend
    reader, big = (int((np.abs(panel - area_color(color)).max(axis=2) <= 2).sum()) for color in PALETTE[:2])
    assert reader / (reader + big) == pytest.approx(0.3, abs=0.01)


def test_balance_shows_held_out_cosines_as_running_means_with_errors(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure) or path)
    rows = history(steps=30)
    for row in rows:
        if "balance/cos_min" in row:  # ten of the steps
            row |= {"balance/heldout_cos/reader": 0.2 if row["step"] % 2 else 0.0, "balance/heldout_cos/big": math.nan}
    plot_balance(rows, tmp_path / "balance.png")
    plot_balance(history(), tmp_path / "balance.png")
    with_held_out, without = figures
    assert len(with_held_out.axes) == 3 and len(without.axes) == 2
    panel = with_held_out.axes[2]
    (line, *_) = panel.lines
    assert line.get_ydata()[-1] == pytest.approx(0.1)  # of the last ten
    (label,) = (text.get_text() for text in panel.get_legend().get_texts())
    assert label == "reader  (+0.100 ± 0.033)"
    assert panel.get_xlabel() == without.axes[1].get_xlabel() == "optimizer step"


def area_color(color: str) -> np.ndarray:
    """The colour of an area that is slightly transparent."""
    return np.array([round(255 * (0.88 * part + 0.12)) for part in to_rgb(color)])


def progress(steps: int = 12) -> list[dict]:
    """A log of weights by progress, with a reward that does not apply at first."""
    rows: list[dict] = [{"step": 0, "eval_rewards/reader/mean": 0.5}]
    for step in range(1, steps + 1):
        row = {"progress/reader": 0.02 * step, "progress/big": 0.05 * step if step > 3 else math.nan}
        rows.append({"step": step} | row | {"progress/weight/reader": 0.5 + 0.03 * step, "progress/weight/big": 0.1})
    return rows


@pytest.mark.parametrize("steps", [1, 12])
def test_progress_shows_every_reward(steps, tmp_path):
    path = plot_progress(progress(steps), tmp_path / "new" / "progress.png")
    assert all(has_color(path, color) for color in PALETTE[:2])


def test_a_log_without_progress_is_refused_with_what_to_log(tmp_path):
    with pytest.raises(ValueError, match="no `progress/weight/<reward>`. Log it.*logging_steps"):
        plot_progress(history(), tmp_path / "progress.png")


@pytest.mark.parametrize("rows", [history(steps=1), history(weighted_sum=False)], ids=["one step", "no weighted sum"])
def test_balance_of_short_and_partial_logs(rows, tmp_path):
    assert has_color(plot_balance(rows, tmp_path / "balance.png"), TAKEN)


def test_a_log_without_balance_is_refused_with_what_to_log(tmp_path):
    path = tmp_path / "balance.png"
    for key in ("balance/alpha", "balance/cos_min"):
        rows = [{name: value for name, value in row.items() if not name.startswith(key)} for row in history()]
        with pytest.raises(ValueError, match="Log them.*logging_steps"):
            plot_balance(rows, path)
    with pytest.raises(ValueError, match="no finite `balance/cos_min`"):
        plot_balance([row | {"balance/cos_min": math.nan} for row in history()], path)
    for broken in ({"balance/alpha/big": math.nan}, {"balance/alpha/new": 0.1}):
        rows = history()
        rows[5] = rows[5] | broken
        with pytest.raises(ValueError, match="has no finite `balance/alpha/(big|new)`"):
            plot_balance(rows, path)
    assert not path.exists()


def test_there_is_one_panel_per_reward(tmp_path):
    one = [{key: value for key, value in row.items() if "big" not in key} for row in history()]
    both = plot_rewards(history(), tmp_path / "both.png")
    single = plot_rewards(one, tmp_path / "one.png")
    assert has_color(both, PALETTE[0]) and has_color(both, PALETTE[1])
    assert has_color(single, PALETTE[0]) and not has_color(single, PALETTE[1])
    assert Image.open(both).width == 2 * Image.open(single).width


def test_rewards_have_their_evaluations_with_errors_over_prompts(tmp_path):
    rows = history()
    shown = [(3, 0.50, 0.05), (6, 0.60, 0.10), (9, 0.40, math.nan)]
    rows += [{"step": 0, "eval_rewards/dark/mean": -0.2, "eval_rewards/dark/standard_error": 0.1}]
    for step, mean, error in shown:
        rows.append({"step": step, "eval_rewards/reader/mean": mean, "eval_rewards/reader/standard_error": error})
    figures: list = []

    def keep(figure, path):
        figures.append(figure)
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save_figure", keep)
        plot_rewards(rows, tmp_path / "rewards.png")
    panels = {axes.get_title(loc="left"): axes for axes in figures[0].axes if axes.get_visible()}
    assert list(panels) == ["reader", "big", "dark  (held out)"]
    ((points, _, (bars,)),) = panels["reader"].containers
    assert points.get_xydata().tolist() == [[0, 0.5]] + [[step, mean] for step, mean, _ in shown]
    drawn = [segment[:, 1].tolist() for segment in bars.get_segments() if segment.size]
    assert drawn == [pytest.approx([0.45, 0.55]), pytest.approx([0.5, 0.7])]
    assert not panels["big"].containers


@pytest.mark.filterwarnings("error")  # matplotlib warns when it finds no layout
def test_rewards_without_evaluations_fill_the_picture(tmp_path):
    rows = [{"step": step, "rewards/reader/mean": 0.5 + 0.1 * step} for step in range(1, 4)]
    picture = np.asarray(Image.open(plot_rewards(rows, tmp_path / "rewards.png")).convert("L"))
    columns = np.flatnonzero((picture < 250).any(axis=0))
    assert columns[0] < 0.05 * picture.shape[1] and columns[-1] > 0.95 * picture.shape[1]


def test_rewards_may_be_missing_in_some_steps(tmp_path):
    rows = history(steps=60)
    for row in rows[5:30]:
        row["rewards/reader/mean"] = math.nan
    assert has_color(plot_rewards(rows, tmp_path / "rewards.png"), PALETTE[0])


def test_a_log_without_rewards_is_refused_with_what_to_log(tmp_path):
    with pytest.raises(ValueError, match="neither `rewards/<reward>/mean`"):
        plot_rewards([{"step": 1, "rewards/reader/std": 0.1}], tmp_path / "rewards.png")


def ink(path, left: int, top: int, right: int, bottom: int) -> int:
    """Number of pixels of a part of a picture that are not paper."""
    pixels = np.asarray(Image.open(path).convert("RGB"))[top:bottom, left:right]
    return int((pixels.min(axis=2) < 200).sum())


def test_captions_are_under_their_images_and_rows_move_down_for_them(tmp_path):
    rows = [[tile(RED), tile(GREEN)], [tile(BLUE)]]
    one, two = (
        image_grid(rows, ["a", "b"], tmp_path / f"{lines}.png", cell=80, captions=[["x" * 90, ""], [text]])
        for lines, text in ((1, "0.5 bright"), (2, "0.5 bright\n– reader"))
    )
    plain = image_grid(rows, ["a", "b"], tmp_path / "plain.png", cell=80)
    heights = [Image.open(path).height for path in (plain, one, two)]
    assert heights[0] < heights[1] < heights[2]
    for color, captioned in ((RED, True), (GREEN, False)):
        x, y, width, height = extent(one, color)
        under = int(x - width / 2), int(y + height / 2) + 2, int(x + width / 2), int(y + height / 2) + 14
        assert (ink(one, *under) > 0) == captioned, color  # and a caption that is too long stays under its image


def test_refuses_another_number_of_captions_than_images(tmp_path):
    with pytest.raises(ValueError, match=r"`captions` has rows of \[1\], `rows` of \[2\] images"):
        image_grid([[tile(RED), tile(BLUE)]], ["a"], tmp_path / "grid.png", captions=[["x"]])


def test_histograms_have_a_colour_for_each_source_or_reward(tmp_path):
    values = {"reader": [0.1, 0.2, math.nan, 0.9], "big": [1.0, 2.0, 3.0, 4.0], "never": [math.nan] * 4}
    alone = plot_histograms(values, tmp_path / "new" / "alone.png", title="Step 3")
    mixed = plot_histograms(values, tmp_path / "mixed.png", sources=["glyph", "free", "glyph", "free"])
    shade = [tuple(round(255 * (0.88 * part + 0.12)) for part in to_rgb(color)) for color in PALETTE]
    for path in (alone, mixed):
        assert all(extent(path, color)[2] > 0 for color in shade[:2])
    assert extent(mixed, shade[0])[1] != extent(alone, shade[0])[1]


def test_histograms_of_values_that_do_not_pair_up_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no reward"):
        plot_histograms({}, tmp_path / "h.png")
    with pytest.raises(ValueError, match=r"`sources` has 1 entries, `values\['a'\]` has 2"):
        plot_histograms({"a": [1.0, 2.0]}, tmp_path / "h.png", sources=["x"])
