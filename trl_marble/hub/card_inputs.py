# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The contents of a model card, which are saved next to the card, so that it can be rendered again with new results or
a new name.

Neither the card nor that file may contain folders of the machine or an access token.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ..evaluation.gains import GainPoint
from ..evaluation.results import to_json
from ..evaluation.summary import BalanceSummary, ProgressSummary
from ..evaluation.time_summary import TimeSummary
from ..evaluation.worst_gain import WorstGain


INPUTS_FILE = "model_card.json"

ACCESS_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
TOKEN_REMOVED = "[access token removed]"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CACHED_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_PATH_IN_TEXT = re.compile(r"(?<![\w/:.~\\])(?:~|/[\w.-]+|[A-Za-z]:)(?:[/\\][\w.-]+)+[/\\]?")
_NAME_OF_A_TOKEN = re.compile(r"(^|_)token$")


@dataclass(frozen=True)
class RewardRow:
    """
    One reward before and after training. `None` and NaN mean not measured.

    Args:
        name (`str`): the reward's name.
        before (`float`, *optional*): its mean on the evaluation prompts without the adapter, in the reward's own unit.
        after (`float`, *optional*): the same with the adapter.
        before_se (`float`, *optional*): standard error of `before`.
        after_se (`float`, *optional*): standard error of `after`.
        change (`float`, *optional*): mean difference between images of the same prompts and seeds. Defaults to
            `after - before`.
        change_se (`float`, *optional*): standard error of `change`.
        held_out (`bool`, *optional*, defaults to `False`): whether the adapter was never trained on it.
    """

    name: str
    before: float | None = None
    after: float | None = None
    before_se: float | None = None
    after_se: float | None = None
    change: float | None = None
    change_se: float | None = None
    held_out: bool = False


@dataclass(frozen=True)
class GainsRow:
    """
    How far the rewards rose together, held-out ones not counted, and how far the adapter drifted from its base model,
    see [`~trl_marble.evaluation.GainPoint`]. `None` and NaN mean not measured.

    Args:
        kl (`float`, *optional*): KL to the base model.
        kl_se (`float`, *optional*): standard error of `kl`.
        worst (`float`, *optional*): the smallest gain of a reward, in standard deviations of the base's images.
        worst_se (`float`, *optional*): standard error of `worst`.
        mean (`float`, *optional*): the mean gain.
        mean_se (`float`, *optional*): standard error of `mean`.
        joint_gain (`float`, *optional*): share of the prompts on which all rewards that apply rose, in [0, 1].
        joint_gain_se (`float`, *optional*): standard error of `joint_gain`.
        joint_fall (`float`, *optional*): share of the prompts on which all of them fell, in [0, 1].
        joint_fall_se (`float`, *optional*): standard error of `joint_fall`.
    """

    kl: float | None = None
    kl_se: float | None = None
    worst: float | None = None
    worst_se: float | None = None
    mean: float | None = None
    mean_se: float | None = None
    joint_gain: float | None = None
    joint_gain_se: float | None = None
    joint_fall: float | None = None
    joint_fall_se: float | None = None

    @classmethod
    def of(cls, point: GainPoint) -> "GainsRow":
        """The row of an evaluation."""
        values: dict[str, float] = {}
        for name in ("kl", "worst", "mean", "joint_gain", "joint_fall"):
            values[name], values[f"{name}_se"] = getattr(point, name)
        return cls(**{name: None if math.isnan(value) else value for name, value in values.items()})


@dataclass(frozen=True)
class GalleryItem:
    """
    One sample image of the card.

    Args:
        path (`str`): the image's path, relative to the card.
        prompt (`str`): its prompt.
    """

    path: str
    prompt: str


@dataclass(frozen=True)
class CardInputs:
    """
    Everything that the card of an adapter is rendered from, see [`build_model_card`].

    Args:
        repo_name (`str`):
            The adapter's name, the card's title.
        rewards (`Sequence[RewardRow]`):
            The rewards that the adapter was trained with and those that were held out, with results of evaluations.
        pipeline_class (`str`, *optional*, defaults to `"DiffusionPipeline"`):
            Name of the diffusers pipeline class that the adapter is for, such as `"StableDiffusion3Pipeline"`.
        base_model (`str`, *optional*):
            Hub id or local folder of the base pipeline.
        dataset_name (`str`, *optional*):
            Hub id, name or local folder of the training prompts.
        balance (`BalanceSummary`, *optional*):
            The run's balancing diagnostics, see [`~trl_marble.evaluation.summarize_balance`].
        settings (`Mapping[str, Any]`, *optional*):
            Training settings by name. `num_inference_steps`, `guidance_scale`, `height`, `width`, `num_frames` and
            `max_sequence_length`, if present, are also in the usage example, or the evaluations' own
            (`eval_num_inference_steps`, ...) where there are. `multi_objective_aggregation` says how
            the rewards were combined. Settings whose name ends in `token` are left out.
        gallery (`Sequence[GalleryItem]`, *optional*):
            Sample images, or videos.
        balance_plot (`str`, *optional*):
            Path, relative to the card, of the picture made by [`~trl_marble.evaluation.plot_balance`].
        before_after (`str`, *optional*):
            Path, relative to the card, of the picture made by [`~trl_marble.evaluation.before_after_grid`].
        model_id (`str`, *optional*):
            The adapter's repository on the Hub, `"user/name"`, if it has one.
        framework_versions (`Mapping[str, str]`, *optional*):
            Package name -> version.
        diversity (`RewardRow`, *optional*):
            How much the images of one prompt differ, before and after, see
            [`~trl_marble.evaluation.group_diversity`].
        gains (`GainsRow`, *optional*):
            How far the rewards rose together, and the KL to the base model that it was paid with.
        gain_plot (`str`, *optional*):
            Path, relative to the card, of the picture of a run made by [`~trl_marble.evaluation.plot_gains`].
        sources (`Mapping[str, Sequence[RewardRow]]`, *optional*):
            Source of the evaluation prompts -> the rewards on these prompts alone.
        evaluated_on (`str`, *optional*):
            The images that the rewards were measured on, as the end of a sentence: `"512 images of 128 prompts"`.
        trained_here (`bool`, *optional*, defaults to `True`):
            Whether this package trained the adapter. If not, the card says nothing about its training.
        edits_images (`bool`, *optional*, defaults to `False`):
            Whether it was trained to edit images, so that the usage example passes an image to the pipeline.
        adapter_step (`int`, *optional*):
            The optimizer step that the adapter is from.
        best_evaluation (`WorstGain`, *optional*):
            The evaluation of the training whose worst reward gained most, see
            [`~trl_marble.evaluation.best_evaluation`].
        adapter_evaluation (`WorstGain`, *optional*):
            The latest evaluation up to `adapter_step`.
        progress (`ProgressSummary`, *optional*):
            How far the rewards came, of a run whose weights follow that, see
            [`~trl_marble.evaluation.summarize_progress`].
        progress_plot (`str`, *optional*):
            Path, relative to the card, of the picture made by [`~trl_marble.evaluation.plot_progress`].
        times (`TimeSummary`, *optional*):
            Where the time of the training went.
        teachers (`Mapping[str, str]`, *optional*):
            The adapters that it was distilled from, as the trainer is given them.
        parts (`Sequence[str]`, *optional*):
            Of an adapter that is the equal mixture of one for each reward: their names. They are in the files
            `adapters/<name>.safetensors`.
    """

    repo_name: str
    rewards: Sequence[RewardRow]
    pipeline_class: str = "DiffusionPipeline"
    base_model: str | None = None
    dataset_name: str | None = None
    balance: BalanceSummary | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    gallery: Sequence[GalleryItem] = ()
    balance_plot: str | None = None
    before_after: str | None = None
    model_id: str | None = None
    framework_versions: Mapping[str, str] = field(default_factory=dict)
    diversity: RewardRow | None = None
    sources: Mapping[str, Sequence[RewardRow]] = field(default_factory=dict)
    evaluated_on: str | None = None
    trained_here: bool = True
    edits_images: bool = False
    gains: GainsRow | None = None
    gain_plot: str | None = None
    adapter_step: int | None = None
    best_evaluation: WorstGain | None = None
    adapter_evaluation: WorstGain | None = None
    progress: ProgressSummary | None = None
    progress_plot: str | None = None
    times: TimeSummary | None = None
    teachers: Mapping[str, str] = field(default_factory=dict)
    parts: Sequence[str] = field(default_factory=list)

    def public(self) -> "CardInputs":
        """
        A copy without private values: local folders are replaced by their names, settings with a token are left out,
        and settings that have no type in JSON become text.
        """
        return dataclasses.replace(
            self,
            repo_name=public_name(self.repo_name),
            base_model=public_name(self.base_model) if self.base_model else None,
            dataset_name=public_name(self.dataset_name) if self.dataset_name else None,
            teachers={name: public_name(adapter) for name, adapter in self.teachers.items()},
            settings={
                name: _public_setting(value)
                for name, value in self.settings.items()
                if not _NAME_OF_A_TOKEN.search(name)
            },
        )

    def save(self, folder: str | os.PathLike) -> Path:
        """
        Write the public part of the inputs.

        Args:
            folder (`str` or `os.PathLike`):
                The card's folder, to which `model_card.json` is written.

        Returns:
            `Path`: the file.
        """
        text = to_json(dataclasses.asdict(self.public())).decode("utf-8")
        file = Path(folder) / INPUTS_FILE
        file.write_text(ACCESS_TOKEN.sub(TOKEN_REMOVED, text), encoding="utf-8")
        return file

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "CardInputs":
        """
        Read the file of [`CardInputs.save`].

        Args:
            folder (`str` or `os.PathLike`):
                The card's folder.

        Raises:
            `FileNotFoundError`: there is no `model_card.json`.
            `ValueError`: it is damaged or from another version of this package, with fields of other types.
        """
        file = Path(folder) / INPUTS_FILE
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            json.dumps(content, ensure_ascii=False).encode("utf-8")  # raises for half of a surrogate pair
            if content["balance"] is not None:
                content["balance"] = BalanceSummary(**content["balance"])
            if content.get("progress") is not None:
                content["progress"] = ProgressSummary(**content["progress"])
            if content.get("times") is not None:
                content["times"] = TimeSummary(**content["times"])
            if content["diversity"] is not None:
                content["diversity"] = RewardRow(**content["diversity"])
            if content.get("gains") is not None:
                content["gains"] = GainsRow(**content["gains"])
            for name in ("best_evaluation", "adapter_evaluation"):
                if content.get(name) is not None:
                    content[name] = WorstGain(**content[name])
            content["rewards"] = [RewardRow(**row) for row in content["rewards"]]
            content["gallery"] = [GalleryItem(**item) for item in content["gallery"]]
            content["sources"] = {
                source: [RewardRow(**row) for row in rows] for source, rows in content["sources"].items()
            }
            inputs = cls(**content)
            for name, hint in get_type_hints(cls).items():
                if not _fits(getattr(inputs, name), hint):
                    raise TypeError(f"`{name}` is {str(getattr(inputs, name))[:80]!r}")
            return inputs
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{file} cannot be read ({type(error).__name__}: {error}). It is damaged or from another version; "
                "delete it, or write the card again with `trainer.create_model_card()`."
            ) from error


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository id with its owner (`"user/name"`)."""
    return _HUB_ID.fullmatch(name) is not None


def public_name(source: str) -> str:
    """
    The name of a Hub repository or a folder on the card: the repository's id, or the folder's name without its path.

    For a folder in the cache of the Hub (`.../models--user--name/snapshots/<commit>`) it is the id of the repository.
    """
    if cached := _CACHED_SNAPSHOT.search(source):
        return f"{cached[1]}/{cached[2]}"
    if is_hub_id(source) and not Path(source).exists():
        return source
    name = re.split(r"[/\\]", str(source).rstrip("/\\"))[-1]
    # "." and "~" have to be resolved to have a name.
    return name if name not in ("", ".", "..", "~") else Path(os.path.expanduser(source)).resolve().name


def is_absolute(path: str) -> bool:
    """Whether a path is absolute on any system."""
    return PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()


def _public_setting(value: Any) -> Any:
    """Numbers unchanged, anything else as text, in which paths are shortened to their last part."""
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    if isinstance(value, str | PurePosixPath | PureWindowsPath) and is_absolute(text):
        return public_name(text)
    return _PATH_IN_TEXT.sub(lambda match: public_name(match[0]), text)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON has a type, for the types in the dataclasses of this file."""
    arguments = get_args(hint)
    match get_origin(hint):
        case kind if kind is UnionType:
            return any(_fits(value, argument) for argument in arguments)
        case kind if kind in (Mapping, dict):
            return isinstance(value, Mapping) and all(
                _fits(key, arguments[0]) and _fits(entry, arguments[1]) for key, entry in value.items()
            )
        case kind if kind is Sequence:
            return isinstance(value, list | tuple) and all(_fits(entry, arguments[0]) for entry in value)
    if hint is Any:
        return True
    if hint is float:
        # `float` raises OverflowError for an integer that is too large.
        return isinstance(value, int | float) and not isinstance(value, bool) and float(value) is not None
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return isinstance(value, hint) and all(_fits(getattr(value, n), h) for n, h in get_type_hints(hint).items())
    return isinstance(value, hint)
