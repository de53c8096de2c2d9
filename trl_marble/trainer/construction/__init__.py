# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The components of a trainer, made from its settings: one module for each kind."""

from .arguments import check_weighting as check_weighting
from .arguments import default_config as default_config
from .pipeline import add_adapters as add_adapters
from .pipeline import build_flow as build_flow
from .pipeline import cache_embeddings as cache_embeddings
from .pipeline import place_pipeline as place_pipeline
from .prompts import build_prompt_sampler as build_prompt_sampler
from .prompts import check_evaluation_prompts as check_evaluation_prompts
from .prompts import check_prompts as check_prompts
from .rewards import build_scorers as build_scorers
from .rollouts import build_source as build_source
from .samplers import build_evaluator as build_evaluator
from .samplers import build_sampler as build_sampler
from .update import build_policy_loss as build_policy_loss
from .update import build_update as build_update
