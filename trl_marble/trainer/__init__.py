# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The trainer, its settings and its callbacks."""

from .live_table import LiveTableCallback
from .marble_config import MarbleConfig
from .marble_nft_trainer import MarbleNFTTrainer
from .reward_hacking import RewardHackingCallback


__all__ = ["LiveTableCallback", "MarbleConfig", "MarbleNFTTrainer", "RewardHackingCallback"]
