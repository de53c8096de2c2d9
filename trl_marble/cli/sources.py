# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Pipelines, prompts and rewards as command lines and YAML files write them."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline

from .. import shapeworld
from ..data import compositional_prompts, load_prompts, mix_prompts, ocr_prompts
from ..data.loading import SUFFIXES
from ..pipelines import load_pipeline
from ..pipelines.quantization import Quantization, quantization_config
from ..rewards import ModelReward, RewardFunc, load_reward
from ..rewards.loading import split_reward_name


SHAPEWORLD = "shapeworld"
GENERATORS: dict[str, Callable[[int, int], Dataset]] = {"ocr": ocr_prompts, "compositional": compositional_prompts}
NAMED_SOURCE = re.compile(r"(?:(?P<name>\w[\w.-]*)=)?(?P<source>.+)")
# Of all prompts that a generator can make, one in five is for evaluation.
HELD_OUT = 5


def load_model(
    model: str, bf16: bool = False, use_t5: bool = True, quantization: Quantization | None = None
) -> DiffusionPipeline:
    """
    The pipeline of a name.

    Args:
        model (`str`):
            A Hub id, a local folder, or `"shapeworld"`, the pipeline that comes with the package (always in fp32).
        bf16 (`bool`, *optional*, defaults to `False`):
            Whether the weights are loaded in bf16.
        use_t5 (`bool`, *optional*, defaults to `True`):
            Whether the T5 encoder of a Stable Diffusion 3 is loaded.
        quantization (`"nf4"` or `"int8"`, *optional*):
            How the transformer's linear layers are stored, see
            [`~trl_marble.pipelines.quantization_config`].

    Returns:
        [`~diffusers.DiffusionPipeline`]: the pipeline.

    Raises:
        `OSError`: If it cannot be loaded.
        `ValueError`: If the pipeline that comes with the package is to be quantized, or the pipeline has no T5 encoder
            to leave out.
        `ImportError`: If `bitsandbytes` is missing.
    """
    if model == SHAPEWORLD:
        if quantization is not None:
            raise ValueError(
                f"`{SHAPEWORLD}` is small and always in fp32; leave out the quantization {quantization!r}."
            )
        return _with_t5(shapeworld.load_pipeline(), use_t5)
    dtype = torch.bfloat16 if bf16 else torch.float32
    options: dict[str, Any] = {} if use_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization, dtype)
    return _with_t5(load_pipeline(model, dtype, **options), use_t5)


def _with_t5(pipeline: DiffusionPipeline, use_t5: bool) -> DiffusionPipeline:
    """The pipeline, checked: diffusers passes over a component that is to be left out and that there is not."""
    if not use_t5 and "text_encoder_3" not in pipeline.components:
        raise ValueError(
            "`use_t5=False` leaves out the T5 encoder of Stable Diffusion 3, and a "
            f"{type(pipeline).__name__} has none of that kind; leave the setting out."
        )
    return pipeline


def load_sources(
    sources: Sequence[str],
    split: str = "train",
    column: str = "prompt",
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Dataset:
    """
    The prompt set of a list of sources, mixed where there are several.

    Args:
        sources (`Sequence[str]`):
            Each is `source` or `name=source`, with a source that [`~trl_marble.data.load_prompts`] reads, `ocr:N` or
            `compositional:N` for N generated prompts, or `shapeworld`. A path that exists is that path, whatever is in
            its name.
        split (`str`, *optional*, defaults to `"train"`):
            The split to read. Prompts that are generated for `"train"` are never among those for other splits,
            whatever their numbers and seeds.
        column (`str`, *optional*, defaults to `"prompt"`):
            The column that holds the prompts of files and datasets.
        weights (`Sequence[float]`, *optional*):
            Weight of each source, in their order. Defaults to equal shares.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the generated prompts.

    Returns:
        `datasets.Dataset`: With a column `source` where there are several sources, names or weights.

    Raises:
        `ValueError`: If two sources have the same name, the number of weights is another than that of the sources, or
            a source cannot be read.
        `FileNotFoundError`: If there is no such source.
    """
    datasets: dict[str, Dataset] = {}
    is_named = False
    for text in sources:
        found = NAMED_SOURCE.fullmatch(text)
        if found is None:
            raise ValueError("A source of prompts is empty; name a file, a folder, a Hub dataset or a generator.")
        given, source = (None, text) if Path(text).exists() else (found["name"], found["source"])
        is_named = is_named or given is not None
        name = given or _name_of(source)
        if name in datasets:
            raise ValueError(f"Two sources are named {name!r}; tell them apart: `a={source} b=...`.")
        datasets[name] = _load_source(source, split, column, seed)
    if weights is not None and len(weights) != len(datasets):
        raise ValueError(
            f"There are {len(weights)} weights ({', '.join(map(str, weights))}) for the sources "
            f"{', '.join(datasets)}; give each source one, in their order."
        )
    if len(datasets) == 1 and weights is None and not is_named:
        return next(iter(datasets.values()))
    return mix_prompts(datasets, None if weights is None else dict(zip(datasets, weights, strict=True)))


def _name_of(source: str) -> str:
    """The last part of a path or Hub id, without the suffix of a file; the kind of a generator."""
    name = Path(source.partition(":")[0]).name
    return Path(name).stem if Path(name).suffix.lower() in SUFFIXES else name


def _load_source(source: str, split: str, column: str, seed: int) -> Dataset:
    if source == SHAPEWORLD:
        return shapeworld.load_prompts("train" if split == "train" else "test")
    kind, _, number = source.partition(":")
    if kind in GENERATORS and not Path(source).exists():
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(f"The source {source!r} does not say how many prompts to make; write `{kind}:2000`.")
        return _generate(kind, int(number), split, seed)
    return load_prompts(source, split=split, column=column)


def _generate(kind: str, n: int, split: str, seed: int) -> Dataset:
    held_out = split != "train"
    share = 1 / HELD_OUT if held_out else 1 - 1 / HELD_OUT
    drawn = GENERATORS[kind](int(1.5 * n / share) + 100, seed)  # more than enough for n of this split
    # A checksum of the prompt decides, so that a prompt is in the same split whatever else is drawn.
    rows = [i for i, prompt in enumerate(drawn["prompt"][:]) if (crc32(prompt.encode()) % HELD_OUT == 0) == held_out]
    return drawn.select(rows[:n])


def check_reward_names(names: Sequence[str]) -> None:
    """
    Refuse names that no reward can have, without importing anything.

    Args:
        names (`Sequence[str]`):
            As for [`load_rewards`].

    Raises:
        `ValueError`: If there is no such reward; names the nearest one.
    """
    for name in names:
        if name != SHAPEWORLD:
            split_reward_name(name)


def load_rewards(names: Sequence[str], offload: bool = False) -> list[RewardFunc]:
    """
    The rewards of a list of names.

    Args:
        names (`Sequence[str]`):
            Known names (`"pickscore"`), dotted paths of modules in the current folder or of installed packages
            (`"my_rewards.brightness"`), and `"shapeworld"` for the five rewards of that world.
        offload (`bool`, *optional*, defaults to `False`):
            Whether models that score leave the GPU during updates.

    Returns:
        `list[RewardFunc]`: The rewards in their order.

    Raises:
        `ValueError`: If there is no such reward; names the nearest one, or what the path lacks.
    """
    if os.getcwd() not in sys.path:  # an installed command does not find modules beside it, as `python script.py` does
        sys.path.insert(0, os.getcwd())
    rewards: list[RewardFunc] = []
    for name in names:
        rewards += shapeworld.reward_funcs() if name == SHAPEWORLD else [load_reward(name)]
    for reward in rewards:
        if offload and isinstance(reward, ModelReward):
            reward.offload = True
    return rewards


def read_teachers(words: Sequence[str]) -> dict[str, str]:
    """
    Teachers as the trainer takes them.

    Args:
        words (`Sequence[str]`):
            Each `source=adapter`, or `all:name=adapter`.

    Raises:
        `ValueError`: If one of them has no name or no adapter, or two have the same name.
    """
    teachers: dict[str, str] = {}
    for word in words:
        name, _, adapter = word.partition("=")
        if not name or not adapter:
            raise ValueError(f"The teacher {word!r} is not of the form `source=adapter` or `all:name=adapter`.")
        if name in teachers:
            raise ValueError(f"Two teachers are named {name!r}; give each its own name.")
        teachers[name] = adapter
    return teachers
