# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How a diffusers pipeline is loaded, conditioned, sampled and asked for a velocity."""

from .acceleration import Acceleration
from .adapters import adapter_names, find_adapter, load_adapter, loaded_adapter
from .compilation import compile_blocks
from .conditioning import Conditioning
from .editing import edits_images, encode_distinct, row_digests, with_rgb_images
from .families import FAMILIES, Family, find_family
from .flow_pipeline import FlowPipeline, Rollout
from .loading import add_trainable_adapter, load_pipeline, lora_config, plain_lora_linears
from .offloading import offload_components
from .placement import measured_linears, place_base
from .policy import Policy, adapters_disabled
from .policy_weights import PolicyWeights
from .quantization import quantization_config
from .schedulers import check_flow_matching
from .sharding import shard_base
from .teachers import Teacher, load_teachers
from .verification import verify_acceleration, verify_velocities
from .weight_shadow import WeightShadow


__all__ = [
    "FAMILIES",
    "Acceleration",
    "Conditioning",
    "Family",
    "FlowPipeline",
    "Policy",
    "PolicyWeights",
    "Rollout",
    "Teacher",
    "WeightShadow",
    "adapter_names",
    "adapters_disabled",
    "add_trainable_adapter",
    "check_flow_matching",
    "compile_blocks",
    "edits_images",
    "encode_distinct",
    "find_adapter",
    "find_family",
    "load_adapter",
    "load_pipeline",
    "load_teachers",
    "loaded_adapter",
    "lora_config",
    "measured_linears",
    "offload_components",
    "place_base",
    "plain_lora_linears",
    "quantization_config",
    "row_digests",
    "shard_base",
    "verify_acceleration",
    "verify_velocities",
    "with_rgb_images",
]
