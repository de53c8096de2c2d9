# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Scored images on the classes of the `evaluate` library: they work alone, offline, and leave no files.

`evaluate.load` reads one file and takes the first such class in it: each measure has a file of its own, which imports
no other one by name.
"""

from .prompt_diversity import PromptDiversity
from .reward_mean import RewardMean
from .win_rate import WinRate


__all__ = ["PromptDiversity", "RewardMean", "WinRate"]
