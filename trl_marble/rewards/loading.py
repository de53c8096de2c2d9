# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rewards by name, as scripts and configuration files write them."""

import difflib
import importlib
import inspect
from collections.abc import Callable


# Where the rewards of this package are; those that need no argument.
KNOWN_REWARDS = {
    "aesthetic": "trl_marble.rewards.aesthetic.AestheticScore",
    "clipscore": "trl_marble.rewards.clip_score.CLIPScore",
    "geneval": "trl_marble.rewards.geneval.GenEval",
    "hpsv2": "trl_marble.rewards.hps.HPSv2",
    "imagereward": "trl_marble.rewards.image_reward.ImageReward",
    "jpeg_compressibility": "trl_marble.rewards.jpeg.jpeg_compressibility",
    "jpeg_incompressibility": "trl_marble.rewards.jpeg.jpeg_incompressibility",
    "ocr": "trl_marble.rewards.ocr.OCRAccuracy",
    "pickscore": "trl_marble.rewards.pickscore.PickScore",
}


def load_reward(name: str) -> Callable:
    """
    The reward of a name.

    Args:
        name (`str`):
            A key of `KNOWN_REWARDS`, or the dotted path of a callable, such as `"my_rewards.brightness"`. A class is
            called without arguments and must give a reward. The module is imported, which runs its code: never take
            the name from someone you would not run a program of.

    Returns:
        `Callable`: The reward.

    Raises:
        `ValueError`: If there is no such reward; names the nearest one, or what the path lacks.
    """
    path = KNOWN_REWARDS.get(name.lower(), name)
    module_name, _, attribute = path.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in path.split(".")):
        nearest = difflib.get_close_matches(name.lower(), KNOWN_REWARDS, n=1)
        hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(
            f"There is no reward {name!r}. {hint}Known names: {', '.join(KNOWN_REWARDS)}; any other reward is written "
            "as a dotted path, such as 'my_rewards.brightness'."
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, but lacks something itself
        raise ValueError(
            f"The reward {name!r} was not found: there is no module `{error.name}`. Start from the folder that holds "
            "it, or install the package."
        ) from error
    if attribute not in vars(module):
        raise ValueError(f"The reward {name!r} was not found: the module `{module_name}` has no `{attribute}`.")
    found = vars(module)[attribute]
    reward = found() if inspect.isclass(found) else found
    if not callable(reward):
        raise ValueError(f"The reward {name!r} is {reward!r}, which cannot be called.")
    return reward
