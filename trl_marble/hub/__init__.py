# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Adapters as files and on the Hub: save, load, fuse, compare, combine and push them, and write their cards."""

from ..pipelines import load_adapter
from .adapter import adapter_state, save_adapter
from .arithmetic import AdapterComparison, WeightComparison, combine_adapters, compare_adapters
from .card_inputs import CardInputs, GainsRow, GalleryItem, RewardRow
from .fusing import fuse_adapter
from .model_card import build_model_card
from .push import published_files, push_adapter
from .results_card import card_from_evaluations


__all__ = [
    "AdapterComparison",
    "CardInputs",
    "GainsRow",
    "GalleryItem",
    "RewardRow",
    "WeightComparison",
    "adapter_state",
    "build_model_card",
    "card_from_evaluations",
    "combine_adapters",
    "compare_adapters",
    "fuse_adapter",
    "load_adapter",
    "published_files",
    "push_adapter",
    "save_adapter",
]
