# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Suggest a setting for a name that does not exist here. Imports nothing that takes long."""

import difflib
from collections.abc import Collection


_NO_RATIO = (
    "the default loss has no likelihood ratio to clip (those of AWM and GRPO have `awm_clip_range` and "
    "`grpo_clip_range`); `advantage_clip` limits the advantages"
)
_NO_NOISE = (
    "the default loss adds no noise while images are sampled (GRPO's is `grpo_noise_level`); the solver is the "
    "pipeline's scheduler"
)
_NO_TEXT = "nothing generates text; `num_inference_steps` and `guidance_scale` set how images are sampled"
_NO_ENGINE = "the pipeline itself samples the images; see `rollout_batch_size`"
_RATIO = "`warmup_steps` below 1 is a fraction of the run: `warmup_steps=0.1`"
_SIZE = "set `height` and `width`"
_8BIT = "set `optim='adamw_bnb_8bit'`"
_BF16 = "set `bf16=True`"
_ADAPTER = "pass a `peft.LoraConfig` as `peft_config` of the trainer"

# Settings of other trainers: TRL's GRPOConfig and DDPOConfig, diffusers' scripts, Flow-GRPO, DiffusionNFT, and older
# versions of transformers. A single word is a setting of this package; anything else is an explanation.
OTHER_TRAINERS = {
    # TRL
    "log_completions": "log_images",
    "log_multimodal": "log_images",
    "num_completions_to_print": "num_images_to_log",
    "log_completions_steps": "log_images_steps",
    "generation_batch_size": "it follows from `per_device_train_batch_size`, `steps_per_generation` and the processes",
    "max_completion_length": _NO_TEXT,
    "max_prompt_length": "max_sequence_length",
    "temperature": _NO_TEXT,
    "top_p": _NO_TEXT,
    "top_k": _NO_TEXT,
    "min_p": _NO_TEXT,
    "epsilon": _NO_RATIO,
    "epsilon_high": _NO_RATIO,
    "delta": _NO_RATIO,
    "loss_type": "set `policy_loss`, the loss, to 'nft', 'awm', 'crd', 'dgpo', 'gdro', 'dpo' or 'grpo'",
    "importance_sampling_level": _NO_RATIO,
    "sync_ref_model": "old_policy_preset",
    "ref_model_mixup_alpha": "old_policy_preset",
    "ref_model_sync_steps": "old_policy_preset",
    "use_vllm": _NO_ENGINE,
    "ds3_gather_for_generation": _NO_ENGINE,
    "generation_kwargs": _NO_TEXT,
    "chat_template_kwargs": _NO_TEXT,
    "max_length": "max_sequence_length",
    "disable_dropout": "the adapter's dropout is `lora_dropout` of the `peft_config`",
    "normalize_advantages": "scale_rewards",
    "rloo_k": "num_generations",
    "num_ppo_epochs": "num_iterations",
    "log_with": "report_to",
    "tracker_project_name": "project",
    "train_use_8bit_adam": _8BIT,
    "shuffle_dataset": "prompts are always shuffled, by `data_seed`",
    "kl_coef": "beta",
    "kl_beta": "beta",
    "kl_cfg": "reference_guidance_scale",
    "beta_dpo": "dgpo_beta",
    "model_init_kwargs": "pass the pipeline object itself to the trainer",
    "sample_num_steps": "num_inference_steps",
    "sample_guidance_scale": "guidance_scale",
    "sample_batch_size": "rollout_batch_size",
    "sample_num_batches_per_epoch": "steps_per_generation",
    "sample_eta": _NO_NOISE,
    "train_gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_learning_rate": "learning_rate",
    "train_num_inner_epochs": "num_iterations",
    "train_adv_clip_max": "advantage_clip",
    "train_clip_range": _NO_RATIO,
    "train_timestep_fraction": "timestep_fraction",
    "per_prompt_stat_tracking": "scale_rewards",
    # diffusers
    "pretrained_model_name_or_path": "model",
    "model_name_or_path": "model",
    "train_batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "test_batch_size": "per_device_eval_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "max_train_steps": "max_steps",
    "num_images_per_prompt": "num_generations",
    "resolution": _SIZE,
    "image_size": _SIZE,
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "lr_warmup_steps": "warmup_steps",
    "adam_weight_decay": "weight_decay",
    "use_8bit_adam": _8BIT,
    "allow_tf32": "tf32",
    "mixed_precision": _BF16,
    "precision": _BF16,
    "dtype": _BF16,
    "torch_dtype": _BF16,
    "gradient_clip": "max_grad_norm",
    "grad_accum": "gradient_accumulation_steps",
    "repo_id": "hub_model_id",
    "checkpointing_steps": "save_steps",
    "checkpoints_total_limit": "save_total_limit",
    "validation_steps": "eval_steps",
    "rank": "lora_r",
    "lora_rank": "lora_r",
    "cfg_scale": "guidance_scale",
    # Flow-GRPO and DiffusionNFT
    "num_steps": "num_inference_steps",
    "num_image_per_prompt": "num_generations",
    "num_batches_per_epoch": "steps_per_generation",
    "num_inner_epochs": "num_iterations",
    "adv_clip_max": "advantage_clip",
    "clip_range": _NO_RATIO,
    "noise_level": _NO_NOISE,
    "eta": _NO_NOISE,
    "global_std": "scale_rewards",
    "ema": "weight_ema_decay",
    "ema_decay": "weight_ema_decay",
    "decay_type": "old_policy_preset",
    "reward_fn": "rewards",
    "reward_funcs": "rewards",
    "save_freq": "save_steps",
    "eval_freq": "eval_steps",
    "resume_from": "resume_from_checkpoint",
    "save_dir": "output_dir",
    "num_epochs": "num_train_epochs",
    # transformers, earlier
    "warmup_ratio": _RATIO,
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "logging_dir": "set the environment variable `TENSORBOARD_LOGGING_DIR`",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "group_by_length": "every group has the images of one prompt; leave it out",
    "save_safetensors": "everything is saved as safetensors; leave it out",
}
# For Python, where the rewards and the adapter are arguments of the trainer instead of settings.
TRAINER_ARGUMENTS = {
    "model": "pass it as `pipeline` of the trainer",
    "rewards": "pass them as `reward_funcs` of the trainer",
    "lora_r": _ADAPTER,
    "lora_alpha": _ADAPTER,
    "lora_target_modules": _ADAPTER,
    "peft_config": "pass it to the trainer",
}


def suggest_name(name: str, known: Collection[str], prefix: str = "") -> str | None:
    """
    Suggest what to use instead of a setting that does not exist.

    Args:
        name (`str`):
            The name that does not exist.
        known (`Collection[str]`):
            The settings that exist.
        prefix (`str`, *optional*, defaults to `""`):
            The prefix of a suggested name: `"--"` for options.

    Returns:
        `str`: A clause such as `` did you mean `log_images`? ``, or `None` if no name is similar.
    """
    meant = OTHER_TRAINERS.get(name, _NO_ENGINE if name.startswith("vllm_") else None)
    if meant is not None and " " in meant:
        return meant
    meant = meant or name
    if meant not in known:
        if meant in TRAINER_ARGUMENTS and not prefix:
            return TRAINER_ARGUMENTS[meant]
        nearest = difflib.get_close_matches(name, known, n=1)
        if not nearest:
            return None
        meant = nearest[0]
    return f"did you mean `{prefix}{meant}`?"
