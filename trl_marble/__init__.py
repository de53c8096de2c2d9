# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Reinforcement learning of diffusion and flow-matching pipelines against several rewards at once."""

from .trainer import MarbleConfig, MarbleNFTTrainer


__version__ = "0.1.0.dev0"

__all__ = ["MarbleConfig", "MarbleNFTTrainer", "__version__"]
