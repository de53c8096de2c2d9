# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Load rewards by name, for scripts and configuration files."""

import difflib
import importlib
import inspect
from collections.abc import Callable


# The paths of the rewards of this package that need no argument.
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
    Load a reward by its name.

    Args:
        name (`str`):
            A key of `KNOWN_REWARDS`, or the dotted path of a callable, such as `"my_rewards.brightness"`. A class is
            called without arguments and must return a reward. The module is imported, which runs its code: never use a
            name from somebody whose programs you would not run.

    Returns:
        `Callable`: The reward.

    Raises:
        `ValueError`: If there is no such reward; the message has the most similar name, or the missing part of the
            path.
    """
    module_name, attribute = split_reward_name(name)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, but one of its own imports does not
        raise ValueError(
            f"The reward {name!r} was not found: there is no module `{error.name}`. Start from the folder that "
            "contains it, or install the package."
        ) from error
    if attribute not in vars(module):
        raise ValueError(f"The reward {name!r} was not found: the module `{module_name}` has no `{attribute}`.")
    found = vars(module)[attribute]
    reward = found() if inspect.isclass(found) else found
    if not callable(reward):
        raise ValueError(f"The reward {name!r} is {reward!r}, which is not callable. Name a function or a class.")
    return reward


def split_reward_name(name: str) -> tuple[str, str]:
    """
    Where a reward is, without importing anything.

    Args:
        name (`str`):
            As for [`load_reward`].

    Returns:
        `tuple[str, str]`: The module, and the name in it.

    Raises:
        `ValueError`: If it is neither a key of `KNOWN_REWARDS` nor a dotted path.
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
    return module_name, attribute
