# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Callbacks: a live table, a watch for reward hacking, and pictures of a run."""

from .live_table import LiveTableCallback
from .marble_callback import MarbleCallback
from .pictures import RolloutPicture, RunPictures
from .reward_hacking import RewardHackingCallback


__all__ = ["LiveTableCallback", "MarbleCallback", "RewardHackingCallback", "RolloutPicture", "RunPictures"]
