# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How rewards fail."""


class RewardError(RuntimeError):
    """A reward function failed or returned something that is not a reward."""


class BrokenRewardError(RewardError):
    """A reward function that has not scored any image so far, or whose code is wrong whatever the image."""


class InfiniteRewardError(RewardError):
    """A reward function returned a number for an image that is infinite, or too large for float32."""


class WrongFeaturesError(RewardError):
    """The method `features` of a reward returned something else than one row of numbers for each image."""
