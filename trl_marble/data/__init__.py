# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Prompt sets and the order in which they are used."""

from .prompt_sampler import RepeatPromptSampler
from .prompts import validate_prompts


__all__ = ["RepeatPromptSampler", "validate_prompts"]
