# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Grids of images, or of videos: strips of frames in one file, and the playing videos in another."""

import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..media import PAPER, Sample, film_strip, save_sample, to_rgb
from .figures import DPI, FAINT, INK, RULE, TAKEN, new_figure, save_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Mean width of a character of the default font, in font sizes.
CHARACTER_WIDTH = 0.56
# Size of the text under an image in sizes of the other text, and height of a line of it in cells.
CAPTION_SCALE, CAPTION_LINE = 0.78, 0.105
# Width of the frames of a video side by side, and their minimal height, in cells.
STRIP_WIDTH, STRIP_HEIGHT = 3, 0.6


def image_grid(
    rows: Sequence[Sequence[Sample]],
    row_labels: Sequence[str],
    path: str | os.PathLike,
    *,
    column_labels: Sequence[str] | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    cell: int = 160,
    title: str | None = None,
) -> Path:
    """
    Write rows of images with a label before each row, such as the samples of each prompt.

    A video is shown by four of its frames side by side; the same grid with playing videos is written to the same
    folder, as a WebP file of the same name.

    Args:
        rows (`Sequence[Sequence[PIL.Image.Image]]` or `Sequence[Sequence[list[PIL.Image.Image]]]`):
            The images or videos, row by row. Rows may differ in length and images in size; each image is scaled to its
            cell.
        row_labels (`Sequence[str]`):
            One label per row, wrapped to fit.
        path (`str` or `os.PathLike`):
            The file to write, in the format of its suffix; folders are made.
        column_labels (`Sequence[str]`, *optional*):
            One label per column, such as the rewards or seeds.
        captions (`Sequence[Sequence[str]]`, *optional*):
            The text under each image, such as its rewards; one or more lines, cut to the width of the cell.
        cell (`int`, *optional*, defaults to `160`):
            Width and height of a cell in pixels; frames side by side have three times the width.
        title (`str`, *optional*):
            A title above the grid.

    Returns:
        `Path`: the file.

    Raises:
        `ValueError`: there is no image, or not one label per row or column, or not one caption per image.
    """
    _check_grid("rows", rows, "row_labels", row_labels)
    if captions is not None and [len(row) for row in captions] != [len(row) for row in rows]:
        raise ValueError(
            f"`captions` has rows of {[len(row) for row in captions]}, `rows` of {[len(row) for row in rows]} images. "
            "Pass one caption for each image."
        )
    columns = max(map(len, rows))
    if column_labels is not None and len(column_labels) != columns:
        raise ValueError(f"`column_labels` has {len(column_labels)} labels for {columns} columns. Pass one for each.")
    caption_lines = max((text.count("\n") + 1 for row in captions or () for text in row), default=0)

    def draw(still: Callable[[Sample], Image.Image], size: tuple[int, int]) -> _GridLayout:
        has_labels = column_labels is not None
        layout = _GridLayout(cell, size, [columns], len(rows), title is not None, has_labels, caption_lines)
        for row, samples in enumerate(rows):
            layout.draw_row(row, row_labels[row], [[still(sample) for sample in samples]])
        for row, texts in enumerate(captions or ()):
            for column, text in enumerate(texts):
                layout.write_caption(row, column, text)
        if title is not None:
            layout.write_title(title)
        for column, label in enumerate(column_labels or ()):
            layout.write_column_label(column, label)
        return layout

    return _save_grid(draw, cell, [sample for row in rows for sample in row], path)


def before_after_grid(
    prompts: Sequence[str],
    before: Sequence[Sequence[Sample]],
    after: Sequence[Sequence[Sample]],
    path: str | os.PathLike,
    *,
    cell: int = 160,
    title: str | None = None,
) -> Path:
    """
    Write a grid with the images of every prompt before training on the left and those after it on the right. Videos
    are shown as in [`image_grid`].

    Args:
        prompts (`Sequence[str]`):
            One prompt per row.
        before (`Sequence[Sequence[PIL.Image.Image]]` or `Sequence[Sequence[list[PIL.Image.Image]]]`):
            The images or videos of each prompt before training.
        after (`Sequence[Sequence[PIL.Image.Image]]` or `Sequence[Sequence[list[PIL.Image.Image]]]`):
            Those of each prompt after training, from the same seeds in the same order.
        path (`str` or `os.PathLike`):
            The file to write, in the format of its suffix; folders are made.
        cell (`int`, *optional*, defaults to `160`):
            Width and height of a cell in pixels; frames side by side have three times the width.
        title (`str`, *optional*):
            A title above the grid.

    Returns:
        `Path`: the file.

    Raises:
        `ValueError`: there is no image, or the numbers of prompts and images do not agree.
    """
    _check_grid("before", before, "prompts", prompts)
    _check_grid("after", after, "prompts", prompts)
    for prompt, first, second in zip(prompts, before, after, strict=True):
        if len(first) != len(second):
            raise ValueError(
                f"{len(first)} images before and {len(second)} after for the prompt {prompt!r}. "
                "Sample the same seeds twice."
            )
    columns = max(map(len, before))

    def draw(still: Callable[[Sample], Image.Image], size: tuple[int, int]) -> _GridLayout:
        layout = _GridLayout(cell, size, [columns, columns], len(prompts), title is not None, has_headers=True)
        for row, prompt in enumerate(prompts):
            layout.draw_row(row, prompt, [[still(sample) for sample in block[row]] for block in (before, after)])
        if title is not None:
            layout.write_title(title)
        layout.write_block_header(0, "Before", FAINT)
        layout.write_block_header(1, "After", TAKEN)
        return layout

    pairs = zip(before, after, strict=True)
    return _save_grid(draw, cell, [sample for first, second in pairs for sample in (*first, *second)], path)


class _GridLayout:
    """
    A page of image cells, addressed by block, row and column, with space for labels. Text and gaps scale with `cell`;
    `size` is the width and height of a cell.

    The images are pasted into one array, so that the plotting library resamples none of them, and matplotlib writes
    the text over it.
    """

    def __init__(
        self,
        cell: int,
        size: tuple[int, int],
        blocks: list[int],
        rows: int,
        has_title: bool,
        has_headers: bool,
        caption_lines: int = 0,
    ) -> None:
        self.cell, self.size, self.blocks = cell, size, blocks
        self.gap, self.margin, self.block_gap = round(0.06 * cell), round(0.16 * cell), round(0.3 * cell)
        self.label_width = round(1.55 * cell)
        self.font = 0.105 * cell  # in pixels
        self.title_height = round(0.3 * cell) if has_title else 0
        self.header_height = round(0.34 * cell) if has_headers else 0
        # With some space between the last line and the next row.
        self.caption_height = round((CAPTION_LINE * caption_lines + 0.12) * cell) if caption_lines else 0
        last = len(blocks) - 1
        self.width = self.left(last, blocks[last]) - self.gap + self.margin
        self.height = self.top(rows) - self.gap + self.margin
        self.page = Image.new("RGB", (self.width, self.height), PAPER)
        self.texts: list[tuple[float, float, str, dict[str, Any]]] = []
        self.frames: list[tuple[int, int, int, int]] = []
        self.rules: list[tuple[int, int, int, str]] = []

    def left(self, block: int, column: int) -> int:
        """The left edge of a cell in pixels."""
        columns = sum(self.blocks[:block]) + column
        return self.margin + self.label_width + block * self.block_gap + columns * (self.size[0] + self.gap)

    def top(self, row: int) -> int:
        """The upper edge of a row in pixels."""
        height = self.size[1] + self.caption_height + self.gap
        return self.margin + self.title_height + self.header_height + row * height

    def draw_row(self, row: int, label: str, blocks: Sequence[Sequence[Image.Image]]) -> None:
        width = int((self.label_width - 2 * self.gap) / (CHARACTER_WIDTH * self.font))
        fitting = int(self.size[1] / (1.35 * self.font))
        lines = textwrap.wrap(label, width, max_lines=min(6, fitting), placeholder=" …")
        middle = self.top(row) + self.size[1] / 2
        self.texts.append((self.margin, middle, "\n".join(lines), {"va": "center", "linespacing": 1.35}))
        for block, images in enumerate(blocks):
            for column, image in enumerate(images):
                scale = min(self.size[0] / image.width, self.size[1] / image.height)
                size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
                x = self.left(block, column) + (self.size[0] - size[0]) // 2
                y = self.top(row) + (self.size[1] - size[1]) // 2
                self.page.paste(to_rgb(image).resize(size, Image.Resampling.LANCZOS), (x, y))
                self.frames.append((x, y, *size))

    def write_caption(self, row: int, column: int, text: str) -> None:
        width = int(self.size[0] / (CHARACTER_WIDTH * CAPTION_SCALE * self.font))
        lines = [line if len(line) <= width else line[: width - 1] + "…" for line in text.split("\n")]
        style = {"va": "baseline", "color": FAINT, "scale": CAPTION_SCALE}
        # Line by line: matplotlib's own distance between two lines depends on their letters.
        for number, line in enumerate(lines, start=1):
            y = self.top(row) + self.size[1] + CAPTION_LINE * number * self.cell
            self.texts.append((self.left(0, column), y, line, style))

    def write_title(self, text: str) -> None:
        y = self.margin + 0.1 * self.cell
        self.texts.append((self.margin, y, text, {"va": "center", "weight": "bold", "scale": 1.3}))

    def write_column_label(self, column: int, text: str) -> None:
        width = int(self.size[0] / (CHARACTER_WIDTH * self.font))
        x, y = self.left(0, column) + self.size[0] / 2, self.top(0) - 0.08 * self.cell
        text = textwrap.fill(text, width, max_lines=2, placeholder=" …")
        self.texts.append((x, y, text, {"va": "bottom", "ha": "center", "color": FAINT}))

    def write_block_header(self, block: int, text: str, color: str) -> None:
        left, right = self.left(block, 0), self.left(block, self.blocks[block]) - self.gap
        y = self.top(0) - round(0.1 * self.cell)
        style = {"va": "bottom", "weight": "bold", "color": color, "scale": 1.15}
        self.texts.append((left, y - 0.05 * self.cell, text, style))
        self.rules.append((left, right, y, color))

    def save(self, path: str | os.PathLike) -> Path:
        return save_figure(self._draw(), path)

    def save_playing(self, samples: Sequence[Sample], path: Path) -> None:
        """Write the page with playing videos; the samples are those of its cells, in order."""
        canvas: Any = self._draw().canvas
        canvas.draw()
        page = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        videos = [(at, each) for at, each in zip(self.frames, samples, strict=True) if isinstance(each, list)]
        pages = []
        for time in range(max(len(video) for _, video in videos)):
            pages.append(page.copy())
            for (x, y, width, height), video in videos:
                frame = to_rgb(video[min(time, len(video) - 1)])  # the last frame of a video that has ended
                small = frame.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)  # much faster
                pages[-1].paste(small, (x, y))
        save_sample(pages, path, lossless=False)

    def _draw(self) -> "Figure":
        figure = new_figure(self.width / DPI, self.height / DPI, constrained=False)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.imshow(np.asarray(self.page), extent=(0, self.width, self.height, 0), interpolation="nearest")
        for x, y, width, height in self.frames:
            edges = ([x, x + width, x + width, x, x], [y, y, y + height, y + height, y])
            axes.plot(*edges, color=RULE, linewidth=0.6)
        point = 72 / DPI  # points per pixel
        for left, right, ruled, color in self.rules:
            axes.plot([left, right], [ruled, ruled], color=color, linewidth=0.014 * self.cell * point)
        for text_x, text_y, text, style in self.texts:
            size = self.font * style.get("scale", 1.0) * point
            style = {"color": INK} | {key: value for key, value in style.items() if key != "scale"}
            # In a prompt, text between dollar signs is no formula.
            axes.text(text_x, text_y, text, fontsize=size, parse_math=False, **style)
        axes.set_xlim(0, self.width)
        axes.set_ylim(self.height, 0)
        return figure


def _save_grid(
    draw: Callable[[Callable[[Sample], Image.Image], tuple[int, int]], _GridLayout],
    cell: int,
    samples: Sequence[Sample],
    path: str | os.PathLike,
) -> Path:
    """
    Write a grid; if it has videos, also the same grid with playing videos.

    Args:
        draw (`Callable`):
            Draws the grid, given a function that makes one image of a sample, and the width and height of a cell.
        cell (`int`):
            Width and height of a cell that shows one image.
        samples (`Sequence[PIL.Image.Image]` or `Sequence[list[PIL.Image.Image]]`):
            The samples in the order in which `draw` draws them.
        path (`str` or `os.PathLike`):
            The file to write.
    """
    strips = [film_strip(sample) for sample in samples if isinstance(sample, list)]
    if not strips:
        return draw(film_strip, (cell, cell)).save(path)
    width = STRIP_WIDTH * cell
    needed = max(round(width * strip.height / strip.width) for strip in strips)
    path = draw(film_strip, (width, min(cell, max(needed, round(STRIP_HEIGHT * cell))))).save(path)
    draw(_first_frame, (cell, cell)).save_playing(samples, path.with_suffix(".webp"))
    return path


def _first_frame(sample: Sample) -> Image.Image:
    return sample[0] if isinstance(sample, list) else sample


def _check_grid(
    rows_argument: str, rows: Sequence[Sequence[Sample]], labels_argument: str, labels: Sequence[str]
) -> None:
    if len(rows) != len(labels):
        raise ValueError(
            f"`{labels_argument}` has {len(labels)} entries, `{rows_argument}` has {len(rows)} rows. "
            "Pass one for each row."
        )
    if not any(rows):
        raise ValueError(f"`{rows_argument}` has no image. Pass at least one row with one image.")
