# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The model card of a trained adapter.

A card is always rendered from the template and from this run's results, never from a card that is already on the Hub:
a repository that is pushed twice would otherwise keep the first push's text.
"""

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.summary import NOT_MEASURED, BalanceSummary, format_value


TEMPLATE = Path(__file__).with_name("model_card_template.md")
TAGS = ["trl_marble", "marble", "diffusion-nft", "reinforcement-learning", "lora", "diffusers", "text-to-image"]
GALLERY_COLUMNS = 4

# Settings that are also arguments of the pipeline's call, in the order in which the example names them. The example
# repeats what was trained with, since the pipeline's defaults (guidance above all) make other images.
CALL_SETTINGS = ("num_inference_steps", "guidance_scale", "height", "width", "max_sequence_length")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CACHED_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_PATH_IN_TEXT = re.compile(r"(?<![\w/:.~\\])(?:~|/[\w.-]+|[A-Za-z]:)(?:[/\\][\w.-]+)+[/\\]?")
_ACCESS_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


@dataclass(frozen=True)
class RewardRow:
    """
    One reward before and after training. `None` and NaN mean that it was not measured.

    Args:
        name (`str`): the reward's name.
        before (`float`, *optional*): its mean on the evaluation prompts without the adapter, in the reward's own unit.
        after (`float`, *optional*): the same with the adapter.
        before_se (`float`, *optional*): standard error of `before`.
        after_se (`float`, *optional*): standard error of `after`.
    """

    name: str
    before: float | None = None
    after: float | None = None
    before_se: float | None = None
    after_se: float | None = None


@dataclass(frozen=True)
class GalleryItem:
    """
    One sample image of the card.

    Args:
        path (`str`): the image's path, relative to the card.
        prompt (`str`): what it was sampled from.
    """

    path: str
    prompt: str


def build_model_card(
    *,
    repo_name: str,
    pipeline_class: str,
    rewards: Sequence[RewardRow],
    base_model: str | None = None,
    dataset_name: str | None = None,
    balance: BalanceSummary | None = None,
    settings: Mapping[str, Any] | None = None,
    gallery: Sequence[GalleryItem] = (),
    balance_plot: str | None = None,
    before_after: str | None = None,
    model_id: str | None = None,
    framework_versions: Mapping[str, str] | None = None,
) -> ModelCard:
    """
    Render the card of an adapter, metadata included.

    No path of the machine and no access token gets into it: local folders are written as their names, and settings
    that hold a token are left out.

    Args:
        repo_name (`str`):
            The adapter's name, the card's title.
        pipeline_class (`str`):
            Name of the diffusers pipeline class that the adapter is for, such as `"StableDiffusion3Pipeline"`.
        rewards (`Sequence[RewardRow]`):
            What the adapter was trained for, with the evaluation's results where there are any.
        base_model (`str`, *optional*):
            Hub id or local folder of the base pipeline.
        dataset_name (`str`, *optional*):
            Hub id, name or local folder of the training prompts.
        balance (`BalanceSummary`, *optional*):
            The run's balancing diagnostics, see [`~trl_marble.evaluation.summarize_balance`].
        settings (`Mapping[str, Any]`, *optional*):
            Training settings by name. `num_inference_steps`, `guidance_scale`, `height`, `width` and
            `max_sequence_length`, where present, also go into the usage example. `multi_objective_aggregation` says
            how the rewards were combined.
        gallery (`Sequence[GalleryItem]`, *optional*, defaults to `()`):
            Sample images.
        balance_plot (`str`, *optional*):
            Path, relative to the card, of the picture made by [`~trl_marble.evaluation.plot_balance`].
        before_after (`str`, *optional*):
            Path, relative to the card, of the picture made by [`~trl_marble.evaluation.before_after_grid`].
        model_id (`str`, *optional*):
            The adapter's repository on the Hub, `"user/name"`, where it has one.
        framework_versions (`Mapping[str, str]`, *optional*):
            Package name -> version.

    Returns:
        `huggingface_hub.ModelCard`: write it with `card.save(...)`; `card.validate()` asks the Hub.

    Raises:
        `ValueError`: where `rewards` is empty, or an image's path is not relative.
    """
    if not rewards:
        raise ValueError("`rewards` is empty. Pass one `RewardRow` for each reward that the adapter was trained on.")
    settings = settings or {}
    title = _public_name(repo_name)
    base = _public_name(base_model) if base_model else None
    dataset = _public_name(dataset_name) if dataset_name else None
    on_hub = base is not None and _is_hub_id(base)

    card = ModelCard.from_template(
        _metadata(title, base, dataset, rewards, gallery),
        template_path=str(TEMPLATE),
        title=_text(title),
        base=_base_link(base),
        dataset=None if dataset is None else f"`{dataset}`",
        aggregation=settings.get("multi_objective_aggregation", "marble"),
        reward_names=", ".join(f"`{row.name}`" for row in rewards),
        pipeline_class=pipeline_class,
        base_source=base if on_hub else "path/to/the/base/pipeline",
        base_comment="" if on_hub or base is None else f"  # {base}",
        adapter_source=model_id or "path/to/this/folder",
        call=_call(settings, gallery),
        rewards=[_reward_cells(row) for row in rewards],
        any_se=any(_measured(se) for row in rewards for se in (row.before_se, row.after_se)),
        before_after=None if before_after is None else _relative_url(before_after),
        balance=None if balance is None else _balance_cells(balance),
        balance_plot=None if balance_plot is None else _relative_url(balance_plot),
        gallery=_gallery_table(gallery),
        settings=[(name, _setting(value)) for name, value in settings.items() if not re.search(r"(^|_)token$", name)],
        framework_versions=list((framework_versions or {}).items()),
    )
    return ModelCard(_ACCESS_TOKEN.sub("[access token removed]", card.content))


def _metadata(
    title: str, base: str | None, dataset: str | None, rewards: Sequence[RewardRow], gallery: Sequence[GalleryItem]
) -> ModelCardData:
    """The card's YAML head. Names that are no Hub ids stay out of the fields that the Hub turns into links."""
    results = [
        EvalResult(
            task_type="text-to-image",
            task_name="Text-to-Image Generation",
            dataset_type=dataset if dataset and _is_hub_id(dataset) else "prompts",
            dataset_name=dataset or "evaluation prompts",
            metric_type=row.name,
            metric_name=f"{row.name} (before training: {format_value(row.before)})",
            metric_value=round(float(row.after), 6),
        )
        for row in rewards
        if row.after is not None and _measured(row.after)
    ]
    fields: dict[str, Any] = {}
    if gallery:
        # In one line: a line of three dashes would end the metadata.
        fields["widget"] = [
            {"text": " ".join(item.prompt.split()), "output": {"url": _relative_url(item.path)}} for item in gallery
        ]
    return ModelCardData(
        base_model=base if base and _is_hub_id(base) else None,
        datasets=[dataset] if dataset and _is_hub_id(dataset) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=TAGS,
        model_name=title if results else None,
        eval_results=results or None,
        **fields,
    )


def _reward_cells(row: RewardRow) -> dict[str, str]:
    change = NOT_MEASURED
    if row.before is not None and row.after is not None:
        change = format_value(row.after - row.before, sign=True)
    return {
        "name": _text(row.name),
        "before": _with_error(row.before, row.before_se),
        "after": _with_error(row.after, row.after_se),
        "change": change,
    }


def _with_error(value: float | None, se: float | None) -> str:
    text = format_value(value)
    return f"{text} ± {format_value(se)}" if _measured(value) and _measured(se) else text


def _balance_cells(balance: BalanceSummary) -> dict[str, Any]:
    def percent(share: float | None) -> str:
        return f"{100 * share:.0f}%" if share is not None and _measured(share) else NOT_MEASURED

    return {
        "alpha": [(_text(name), f"{weight:.3f}") for name, weight in balance.alpha.items()],
        "cos_min": format_value(balance.cos_min, sign=True),
        "conflict": percent(balance.conflict),
        "weighted_sum_cos_min": format_value(balance.weighted_sum_cos_min, sign=True),
        "weighted_sum_conflict": percent(balance.weighted_sum_conflict),
    }


def _gallery_table(gallery: Sequence[GalleryItem]) -> str:
    """A Markdown table of images, each with its prompt below; empty where there are none."""
    columns = min(GALLERY_COLUMNS, len(gallery))
    lines = []
    for start in range(0, len(gallery), GALLERY_COLUMNS):
        items = gallery[start : start + GALLERY_COLUMNS]
        empty = [""] * (columns - len(items))
        images = [f"![{_text(item.prompt)}]({_relative_url(item.path)})" for item in items]
        lines.append("| " + " | ".join(images + empty) + " |")
        if start == 0:
            lines.append("|" + ":-:|" * columns)
        lines.append("| " + " | ".join([_text(item.prompt) for item in items] + empty) + " |")
    return "\n".join(lines)


def _call(settings: Mapping[str, Any], gallery: Sequence[GalleryItem]) -> str:
    """The arguments of the pipeline's call in the usage example."""
    prompt = gallery[0].prompt if gallery else "your prompt"
    given = [f"{name}={settings[name]!r}" for name in CALL_SETTINGS if settings.get(name) is not None]
    return ", ".join([json.dumps(prompt, ensure_ascii=False), *given])


def _base_link(base: str | None) -> str:
    if base is None:
        return "a diffusers pipeline"
    return f"[{base}](https://huggingface.co/{base})" if _is_hub_id(base) else f"`{base}`"


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None


def _public_name(source: str) -> str:
    """
    How the card calls a Hub repository or a folder: the repository's id, or the folder's name without the way to it.

    A folder in the Hub's own cache (`.../models--user--name/snapshots/<commit>`) is called by the id it came from.
    """
    if cached := _CACHED_SNAPSHOT.search(source):
        return f"{cached[1]}/{cached[2]}"
    if _is_hub_id(source) and not Path(source).exists():
        return source
    name = re.split(r"[/\\]", str(source).rstrip("/\\"))[-1]
    # "." and "~" have no name of their own until they are looked up.
    return name if name not in ("", ".", "..", "~") else Path(source).expanduser().resolve().name


def _setting(value: Any) -> str:
    """A setting's value for a table cell, with the paths in it cut down to their last part."""
    if isinstance(value, str | PurePosixPath | PureWindowsPath):
        text = str(value)
        if PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute():
            return f"`{_public_name(text)}`"
    text = _PATH_IN_TEXT.sub(lambda match: _public_name(match[0]), str(value))
    return "`" + text.replace("`", "'").replace("\n", " ").replace("|", "\\|") + "`" if text else "(empty)"


def _text(value: str) -> str:
    """Text as it shall be read, in a Markdown table cell: no markup, no line breaks, no cell borders of its own."""
    escaped = re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(value, quote=False))
    return " ".join(escaped.split())


def _relative_url(path: str) -> str:
    if PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute():
        raise ValueError(
            f"The image path {path!r} is absolute, and means nothing to a reader of the card. Pass it relative to the "
            "card's folder."
        )
    return quote(path.replace("\\", "/"))


def _measured(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
