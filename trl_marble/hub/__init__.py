# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a run publishes: the adapter, as `load_lora_weights` reads it, and its model card."""

from .adapter import adapter_state, save_adapter
from .model_card import GalleryItem, RewardRow, build_model_card


__all__ = ["GalleryItem", "RewardRow", "adapter_state", "build_model_card", "save_adapter"]
