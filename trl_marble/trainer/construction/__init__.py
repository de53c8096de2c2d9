# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The components of a trainer, made from its settings: one module for each kind."""

from .arguments import check_weighting, default_config
from .pipeline import add_adapters, build_flow, cache_embeddings, place_pipeline
from .prompts import build_prompt_sampler, check_evaluation_prompts, check_prompts
from .rewards import build_scorers
from .rollouts import build_source
from .samplers import build_evaluator, build_sampler
from .update import build_policy_loss, build_update


__all__ = [
    "add_adapters",
    "build_evaluator",
    "build_flow",
    "build_policy_loss",
    "build_prompt_sampler",
    "build_sampler",
    "build_scorers",
    "build_source",
    "build_update",
    "cache_embeddings",
    "check_evaluation_prompts",
    "check_prompts",
    "check_weighting",
    "default_config",
    "place_pipeline",
]
