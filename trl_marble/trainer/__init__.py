# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The trainer and its settings."""

from .marble_config import MarbleConfig
from .marble_nft_trainer import MarbleNFTTrainer


__all__ = ["MarbleConfig", "MarbleNFTTrainer"]
