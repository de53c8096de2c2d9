# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The settings of [`evaluate_pipeline`]."""

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class EvaluationConfig:
    """
    Configuration class for [`evaluate_pipeline`].

    Args:
        output_dir (`str`):
            Where scores, images and the contact sheet go. An evaluation that was interrupted continues there.
        adapter (`str`, *optional*):
            LoRA adapter to evaluate: a Hub id, a folder with `pytorch_lora_weights.safetensors`, or a `.safetensors`
            file. Defaults to the pipeline as it is.
        num_generations (`int`, *optional*, defaults to `4`):
            Number of images sampled for each prompt.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the evaluation, not negative. The same seed gives image number g of prompt number p the same
            initial noise, whatever is evaluated.
        num_inference_steps (`int`, *optional*, defaults to `25`):
            Number of solver steps. The solver is the pipeline's own scheduler.
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            Guidance scale, as in training: `1.0` samples without classifier-free guidance, whatever the pipeline's own
            argument for that is; guidance-distilled pipelines are given the value as it is.
        height (`int`, *optional*):
            Height of the images or videos in pixels. Defaults to the pipeline's own.
        width (`int`, *optional*):
            Width of the images or videos in pixels. Defaults to the pipeline's own.
        eval_num_inference_steps (`int`, *optional*):
            As in a training, where evaluations may differ from rollouts: in the place of `num_inference_steps`.
        eval_height (`int`, *optional*):
            The same in the place of `height`.
        eval_width (`int`, *optional*):
            The same in the place of `width`.
        num_frames (`int`, *optional*):
            Number of frames of a video, for pipelines of videos. Defaults to the pipeline's own number.
        max_sequence_length (`int`, *optional*):
            Maximum number of prompt tokens, for pipelines whose text encoder takes it. Defaults to the pipeline's own.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of images that one call of the pipeline samples on each device, and that are scored and saved
            together. Images depend on it only by rounding.
        bf16 (`bool`, *optional*, defaults to `False`):
            Whether the transformer computes in bfloat16. A pipeline given by name is loaded in it; of one given as an
            object the other components keep their dtype, as in training with `MarbleConfig.bf16`. Rewards that are
            models score in it, unless they chose their own dtype.
        reward_failure (`str`, *optional*, defaults to `"raise"`):
            What happens where a reward raises, takes too long, or answers an exception or an infinite number for an
            image. `"raise"`: the evaluation stops with an error that names the reward, the prompt and the cause; what
            was scored is kept. `"mask"`: the images count as ones that the reward does not apply to, and how many
            they are is reported; it stops only if a reward fails for every image that it applies to. An image whose
            latents are not finite is one that all rewards fail for.
        reward_timeout (`float`, *optional*):
            Longest time in seconds to wait for the answers of all rewards about one batch, once the next one is
            sampled. Defaults to waiting for ever.

    Raises:
        `ValueError`: for a setting that cannot work.
    """

    output_dir: str = field(metadata={"help": "Where scores, images and the contact sheet go."})
    adapter: str | None = field(
        default=None,
        metadata={"help": "LoRA to evaluate: Hub id, folder or .safetensors file. Without it the base is evaluated."},
    )
    num_generations: int = field(default=4, metadata={"help": "Number of images sampled for each prompt."})
    seed: int = field(default=0, metadata={"help": "Seed of the images."})
    num_inference_steps: int = field(default=25, metadata={"help": "Number of solver steps."})
    guidance_scale: float = field(
        default=1.0, metadata={"help": "Guidance scale; 1.0 turns classifier-free guidance off."}
    )
    height: int | None = field(default=None, metadata={"help": "Height of the images or videos in pixels."})
    width: int | None = field(default=None, metadata={"help": "Width of the images or videos in pixels."})
    eval_num_inference_steps: int | None = field(
        default=None, metadata={"help": "As in a training, in the place of `num_inference_steps`."}
    )
    eval_height: int | None = field(default=None, metadata={"help": "As in a training, in the place of `height`."})
    eval_width: int | None = field(default=None, metadata={"help": "As in a training, in the place of `width`."})
    num_frames: int | None = field(default=None, metadata={"help": "Number of frames of a video."})
    max_sequence_length: int | None = field(default=None, metadata={"help": "Maximum number of prompt tokens."})
    batch_size: int = field(default=8, metadata={"help": "Number of images sampled and scored together."})
    bf16: bool = field(default=False, metadata={"help": "Whether to sample in bfloat16."})
    reward_failure: Literal["raise", "mask"] = field(
        default="raise",
        metadata={"help": "What to do if a reward fails: 'raise', or 'mask' the images and count them."},
    )
    reward_timeout: float | None = field(
        default=None, metadata={"help": "Longest time in seconds to wait for all rewards' answers about one batch."}
    )

    def __post_init__(self) -> None:
        if not str(self.output_dir).strip():
            raise ValueError(f"`output_dir` is {self.output_dir!r}; pass the folder that the results go to.")
        at_least = {
            "num_generations": (1, "an evaluation needs at least one image per prompt"),
            "seed": (0, "seeds are not negative"),
            "num_inference_steps": (1, "sampling needs a step"),
            "height": (1, "leave it out to use the pipeline's own"),
            "width": (1, "leave it out to use the pipeline's own"),
            "eval_num_inference_steps": (1, "leave it out to use `num_inference_steps`"),
            "eval_height": (1, "leave it out to use `height`"),
            "eval_width": (1, "leave it out to use `width`"),
            "num_frames": (1, "leave it out to use the pipeline's own number"),
            "max_sequence_length": (1, "leave it out to use the pipeline's own"),
            "batch_size": (1, "a call of the pipeline needs an image"),
        }
        for name, (minimum, why) in at_least.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < minimum):
                raise ValueError(f"`{name}` is {value!r}; it must be an integer of at least {minimum}: {why}.")
        for name in ("num_inference_steps", "height", "width"):
            if (own := getattr(self, f"eval_{name}")) is not None:
                setattr(self, name, own)
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"`guidance_scale` is {self.guidance_scale}; it must be a finite number, 0 or greater.")
        if self.reward_failure not in ("raise", "mask"):
            raise ValueError(f"`reward_failure` is {self.reward_failure!r}; it must be one of 'raise', 'mask'.")
        if self.reward_timeout is not None and not 0 < self.reward_timeout < math.inf:
            raise ValueError(
                f"`reward_timeout` is {self.reward_timeout}; it must be a number of seconds greater than 0. Leave it "
                "out to wait for ever."
            )
