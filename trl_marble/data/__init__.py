# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Prompt sets and the order in which they are used."""

from .generators import compositional_prompts, ocr_prompts
from .loading import load_prompts
from .mixing import mix_prompts, source_weights
from .prompt_sampler import RepeatPromptSampler
from .prompts import prepare_prompts, validate_prompts
from .rows import read_rows


__all__ = [
    "RepeatPromptSampler",
    "compositional_prompts",
    "load_prompts",
    "mix_prompts",
    "ocr_prompts",
    "prepare_prompts",
    "read_rows",
    "source_weights",
    "validate_prompts",
]
