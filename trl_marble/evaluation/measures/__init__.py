# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
The statistics as modules of the `evaluate` library, which work offline and write no files.

`evaluate.load` reads one file and takes the first such class in it. Each module therefore has a file of its own and
imports no other one by name.
"""

from .prompt_diversity import PromptDiversity
from .reward_mean import RewardMean
from .win_rate import WinRate


__all__ = ["PromptDiversity", "RewardMean", "WinRate"]
