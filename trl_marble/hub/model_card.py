# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The model card of an adapter.

A card is always rendered from the template and its inputs, never from a card that is already on the Hub: a repository
that is pushed twice would otherwise keep the text of the first push.
"""

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.formatting import NOT_MEASURED, format_gain, format_kl, format_share, format_value
from ..evaluation.summary import BalanceSummary, ProgressSummary
from ..evaluation.time_summary import TimeSummary
from ..pipelines import FAMILIES, Family
from .card_inputs import (
    ACCESS_TOKEN,
    TOKEN_REMOVED,
    CardInputs,
    GainsRow,
    GalleryItem,
    RewardRow,
    is_absolute,
    is_hub_id,
)
from .slider import part_file


TEMPLATE = Path(__file__).with_name("model_card_template.md")
TAGS = ["lora", "diffusers"]
TASKS = {
    "text-to-image": "Text-to-Image Generation",
    "image-to-image": "Image-to-Image Generation",
    "text-to-video": "Text-to-Video Generation",
}
TRAINING_TAGS = ["trl_marble", "marble", "diffusion-nft", "reinforcement-learning"]
GALLERY_COLUMNS = 4

# Settings that are also arguments of the pipeline's call, in the order of the usage example. The example has those of
# the training, since the pipeline's defaults (above all its guidance) make other images.
CALL_SETTINGS = (
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
    "height",
    "width",
    "num_frames",
    "max_sequence_length",
)


def build_model_card(inputs: CardInputs) -> ModelCard:
    """
    Render the card of an adapter with its metadata.

    It contains no path of the machine and no access token, see [`CardInputs.public`].

    Args:
        inputs ([`CardInputs`]):
            The contents of the card.

    Returns:
        `huggingface_hub.ModelCard`: write it with `card.save(...)`; `card.validate()` lets the Hub check it.

    Raises:
        `ValueError`: there is no reward and no teacher, an image's path is not relative, the pipeline's class is not
            the name of a class, or a setting that is an argument of its call is not a number.
    """
    if not inputs.rewards and not inputs.teachers:
        raise ValueError("`rewards` is empty. Pass one `RewardRow` for each reward that the adapter was trained on.")
    if not inputs.pipeline_class.isidentifier():
        raise ValueError(f"pipeline_class={inputs.pipeline_class!r} is not the name of a class, which it must be.")
    inputs = inputs.public()
    base = inputs.base_model
    on_hub = base is not None and is_hub_id(base)
    trained = [row for row in inputs.rewards if not row.held_out]
    everything = [*inputs.rewards, *([inputs.diversity] if inputs.diversity else [])]

    card = ModelCard.from_template(
        _metadata(inputs),
        template_path=str(TEMPLATE),
        title=_text(inputs.repo_name),
        base=_base_link(base),
        dataset=None if inputs.dataset_name is None else _code(inputs.dataset_name),
        aggregation=_code(inputs.settings.get("multi_objective_aggregation", "marble")),
        num_trained=len(trained),
        trained_names=", ".join(_code(row.name) for row in trained),
        teachers=[(_code(name), _code(adapter)) for name, adapter in inputs.teachers.items()],
        parts=[_part_cells(name) for name in inputs.parts],
        part_names=json.dumps(list(inputs.parts)),
        part_shares=", ".join([f"{1 / max(1, len(inputs.parts)):.3g}"] * len(inputs.parts)),
        num_teachers="one teacher" if len(inputs.teachers) == 1 else f"{len(inputs.teachers)} teachers",
        trained_here=inputs.trained_here,
        pipeline_class=inputs.pipeline_class,
        base_source=_literal(base if base is not None and on_hub else "path/to/the/base/pipeline"),
        base_comment="" if on_hub or base is None else f"  # {_one_line(base)}",
        adapter_source=_literal(inputs.model_id or "path/to/this/folder"),
        call=_call(inputs),
        edits_images=_edits(inputs),
        makes_videos=_makes_videos(inputs),
        rewards=[_reward_cells(row) for row in inputs.rewards],
        diversity=None if inputs.diversity is None else _reward_cells(inputs.diversity),
        any_held_out=any(row.held_out for row in inputs.rewards),
        any_se=any(_measured(se) for row in everything for se in (row.before_se, row.after_se)),
        any_paired=any(_measured(row.change_se) for row in everything),
        evaluated_on=_sentence(inputs.evaluated_on or "the evaluation prompts"),
        sources=_sources_table(inputs.sources),
        gains=None if inputs.gains is None else _gains_cells(inputs.gains),
        gain_plot=None if inputs.gain_plot is None else _relative_url(inputs.gain_plot),
        better_evaluation=_better_evaluation(inputs),
        before_after=None if inputs.before_after is None else _relative_url(inputs.before_after),
        balance=None if inputs.balance is None else _balance_cells(inputs.balance),
        progress=None if inputs.progress is None else _progress_cells(inputs.progress),
        progress_plot=None if inputs.progress_plot is None else _relative_url(inputs.progress_plot),
        times=None if inputs.times is None else _times_cells(inputs.times),
        balance_plot=None if inputs.balance_plot is None else _relative_url(inputs.balance_plot),
        gallery=_gallery_table(inputs.gallery),
        settings=[(_code(name), _code(value)) for name, value in inputs.settings.items()],
        framework_versions=[
            (_sentence(name), _sentence(version)) for name, version in inputs.framework_versions.items()
        ],
    )
    return ModelCard(ACCESS_TOKEN.sub(TOKEN_REMOVED, card.content))


def _metadata(inputs: CardInputs) -> ModelCardData:
    """The card's metadata. Fields that the Hub turns into links have only names that are Hub ids."""
    dataset = inputs.dataset_name if inputs.dataset_name and is_hub_id(inputs.dataset_name) else None
    results = [
        EvalResult(
            task_type=_task(inputs),
            task_name=TASKS[_task(inputs)],
            dataset_type=dataset or "prompts",
            dataset_name=inputs.dataset_name or "evaluation prompts",
            metric_type=row.name,
            metric_name=_metric_name(row),
            metric_value=float(f"{row.after:.6g}"),
        )
        for row in inputs.rewards
        if row.after is not None and _measured(row.after)
    ]
    fields: dict[str, Any] = {}
    if inputs.base_model and is_hub_id(inputs.base_model):
        fields |= {"base_model": inputs.base_model, "base_model_relation": "adapter"}
    if inputs.gallery:
        # One line per prompt: a line of three dashes would end the metadata.
        fields["widget"] = [
            {"text": " ".join(item.prompt.split()), "output": {"url": _relative_url(item.path)}}
            for item in inputs.gallery
        ]
    return ModelCardData(
        datasets=[dataset] if dataset else None,
        library_name="diffusers",
        pipeline_tag=_task(inputs),
        tags=[*(TRAINING_TAGS if inputs.trained_here else ()), *TAGS, _task(inputs)],
        model_name=inputs.repo_name if results else None,
        eval_results=results or None,
        **fields,
    )


def _metric_name(row: RewardRow) -> str:
    notes = ["held out"] if row.held_out else []
    if _measured(row.before):
        notes.append(f"before training: {format_value(row.before)}")
    return f"{row.name} ({', '.join(notes)})" if notes else row.name


def _reward_cells(row: RewardRow) -> dict[str, str]:
    change = row.change
    if change is None and row.before is not None and row.after is not None:
        change = row.after - row.before
    return {
        "name": _text(row.name) + (" (held out)" if row.held_out else ""),
        "before": _with_error(row.before, row.before_se),
        "after": _with_error(row.after, row.after_se),
        "change": _with_error(change, row.change_se, sign=True),
    }


def _gains_cells(gains: GainsRow) -> dict[str, str]:
    def known(value: float | None, se: float | None) -> tuple[float, float]:
        return math.nan if value is None else value, math.nan if se is None else se

    return {
        "kl": format_kl(known(gains.kl, gains.kl_se)),
        "worst": format_gain(known(gains.worst, gains.worst_se)),
        "mean": format_gain(known(gains.mean, gains.mean_se)),
        "joint_gain": format_share(known(gains.joint_gain, gains.joint_gain_se)),
        "joint_fall": format_share(known(gains.joint_fall, gains.joint_fall_se)),
    }


def _with_error(value: float | None, se: float | None, sign: bool = False) -> str:
    text = format_value(value, sign)
    return f"{text} ± {format_value(se)}" if _measured(value) and _measured(se) else text


def _part_cells(name: str) -> dict[str, str]:
    """Name and file of a part of the adapter, as Python literals."""
    return {"name": _literal(name), "file": _literal(part_file(name))}


def _sources_table(sources: Mapping[str, Sequence[RewardRow]]) -> str:
    """A Markdown table, with one row per reward and one column per source; empty without sources."""
    if not sources:
        return ""
    lines = ["| " + " | ".join(["Reward", *map(_text, sources)]) + " |", "|:--|" + "--:|" * len(sources)]
    for name in dict.fromkeys(row.name for rows in sources.values() for row in rows):
        found = [next((row for row in rows if row.name == name), RewardRow(name)) for rows in sources.values()]
        lines.append("| " + " | ".join([_text(name), *map(_before_to_after, found)]) + " |")
    return "\n".join(lines)


def _better_evaluation(inputs: CardInputs) -> str | None:
    """That training had a better evaluation than the adapter's; `None` if it had not, or nobody knows."""
    best, own = inputs.best_evaluation, inputs.adapter_evaluation
    if best is None or own is None or best.step == own.step:
        return None
    return (
        f"The best evaluation in training was that of step {best.step}, where the least gain of a reward was "
        f"{best.gain:+.2f} ({_text(best.reward)}); the adapter is from step {inputs.adapter_step}, whose latest "
        f"evaluation, of step {own.step}, had {own.gain:+.2f} ({_text(own.reward)}). Gains are in standard deviations "
        "of the reward over the base pipeline's images."
    )


def _before_to_after(row: RewardRow) -> str:
    measured = [format_value(value) for value in (row.before, row.after) if _measured(value)]
    return " → ".join(measured) or "–"


def _balance_cells(balance: BalanceSummary) -> dict[str, Any]:
    def percent(share: float | None) -> str:
        return f"{100 * share:.0f}%" if share is not None and _measured(share) else NOT_MEASURED

    def cosine(value: float | None, error: float | None = None) -> str:
        if value is None:
            return NOT_MEASURED
        return f"{value:+.3f}" + ("" if error is None else f" ± {error:.3f}")

    return {
        "alpha": [(_text(name), f"{weight:.3f}") for name, weight in balance.alpha.items()],
        "cosines": [
            {
                "name": _text(name),
                "weight": f"{weight:.3f}",
                "in_sample": cosine(balance.cos.get(name)),
                "held_out": cosine(balance.heldout_cos.get(name), balance.heldout_cos_se.get(name)),
                "weighted_sum": cosine(balance.weighted_sum_heldout_cos.get(name)),
                "signal": percent(balance.signal.get(name)),
            }
            for name, weight in balance.alpha.items()
        ]
        if balance.heldout_cos
        else [],
        "cos_min": format_value(balance.cos_min, sign=True),
        "conflict": percent(balance.conflict),
        "weighted_sum_cos_min": format_value(balance.weighted_sum_cos_min, sign=True),
        "weighted_sum_conflict": percent(balance.weighted_sum_conflict),
    }


def _progress_cells(progress: ProgressSummary) -> list[tuple[str, str, str]]:
    """Name, progress and weight of each reward."""
    return [
        (_text(name), format_value(progress.progress[name], sign=True), f"{weight:.3f}")
        for name, weight in progress.weight.items()
    ]


def _times_cells(times: TimeSummary) -> dict[str, Any]:
    """The step as a whole, and the parts of it."""
    return {
        "step": format_value(times.step),
        "rate_and_memory": times.rate_and_memory,
        "rows": [(_text(row.label), format_value(row.seconds), f"{row.share:.0%}") for row in times.rows()],
    }


def _gallery_table(gallery: Sequence[GalleryItem]) -> str:
    """A Markdown table of images, each with its prompt below; empty without images."""
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


def _call(inputs: CardInputs) -> str:
    """The arguments of the pipeline's call in the usage example."""
    prompt = inputs.gallery[0].prompt if inputs.gallery else "your prompt"
    # As in evaluations, whose rewards the card has.
    chosen = {name: inputs.settings.get(f"eval_{name}", inputs.settings.get(name)) for name in CALL_SETTINGS}
    arguments = {name: value for name, value in chosen.items() if value is not None}
    for name, value in arguments.items():
        if not isinstance(value, int | float):
            raise ValueError(f"The setting {name!r} is {str(value)[:80]!r}; the example needs a number.")
    own = _convert_arguments(arguments, inputs.pipeline_class)
    given = [f"{name}={value!r}" for name, value in own.items()]
    text = json.dumps(prompt, ensure_ascii=False)
    if _edits(inputs):
        return ", ".join(['image=load_image("your_image.png")', f"prompt={text}", *given])
    # The first argument of a pipeline that could take an image is not the prompt.
    return ", ".join([text if _takes_image(inputs) == "no" else f"prompt={text}", *given])


def _task(inputs: CardInputs) -> str:
    """The adapter's task, by its name on the Hub."""
    if _makes_videos(inputs):
        return "text-to-video"
    return "image-to-image" if _edits(inputs) else "text-to-image"


def _edits(inputs: CardInputs) -> bool:
    """Whether the adapter is for editing images."""
    return inputs.edits_images or _takes_image(inputs) == "required"


def _takes_image(inputs: CardInputs) -> str:
    """The `Family.takes_image` of the pipeline: whether it takes images to edit."""
    family = _family(inputs.pipeline_class)
    return "no" if family is None else family.takes_image


def _convert_arguments(arguments: Mapping[str, Any], pipeline_class: str) -> dict[str, Any]:
    """Convert arguments to the names of the pipeline's own, and the guidance scale to its convention."""
    family = _family(pipeline_class)
    if family is None:
        return dict(arguments)
    own: dict[str, Any] = {}
    for name, value in arguments.items():
        if name == "guidance_scale":
            own |= family.guidance_arguments(value)
        else:
            own[family.num_frames_argument if name == "num_frames" else name] = value
    return own


def _family(pipeline_class: str) -> Family | None:
    """The family of a pipeline class by its name; `None` if it is not in the table."""
    return {family.pipeline_class.__name__: family for family in FAMILIES}.get(pipeline_class)


def _makes_videos(inputs: CardInputs) -> bool:
    """Whether the pipeline makes videos, from the table; for a pipeline that is not in it, from the samples."""
    family = _family(inputs.pipeline_class)
    if family is None:
        return any(item.path.endswith(".webp") for item in inputs.gallery)
    return family.output == "video"


def _base_link(base: str | None) -> str:
    if base is None:
        return "a diffusers pipeline"
    return f"[{base}](https://huggingface.co/{base})" if is_hub_id(base) else _code(base)


def _code(value: Any) -> str:
    """A name or value in code style, for a text or a table cell."""
    text = _one_line(str(value))
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`" if text else "(empty)"


def _literal(text: str) -> str:
    """A text as a Python literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _sentence(text: str) -> str:
    """A part of a sentence, which may have code style but no links, no HTML and no line breaks."""
    return _one_line(re.sub(r"([\\\[\]])", r"\\\1", html.escape(text, quote=False)))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _text(value: str) -> str:
    """Text for a Markdown table cell: escaped, so that it has no markup, line breaks or cell borders."""
    escaped = re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(value, quote=False))
    return " ".join(escaped.split())


def _relative_url(path: str) -> str:
    if is_absolute(path):
        raise ValueError(
            f"The image path {path!r} is absolute, so a reader of the card has no such file. Pass it relative to the "
            "card's folder."
        )
    return quote(path.replace("\\", "/"))


def _measured(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
