# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The settings of [`MarbleNFTTrainer`]."""

import dataclasses
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, get_args

from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from ..balance import OLD_POLICY_PRESETS, WEIGHTINGS
from ..extras import EXTRAS, require_extra
from ..losses import LOSSES, build_loss, settings_of
from ..losses.awm import AWMWeighting
from ..losses.crd import CRDObjective
from ..losses.dgpo import DGPOReference
from ..losses.grpo import Reweighting, WindowPlacement
from ..sde import SDEKind
from ..setting_names import suggest_name
from ..world_size import check_world_size
from .inherited_arguments import check_arguments, check_combinations


AGGREGATIONS = ("marble", "equal", "sum_then_normalize", "normalize_then_sum", "progress")
BALANCE_ON = ("loss", "advantage")
SCALE_REWARDS = ("batch", "group", "none")
REWARD_FAILURE = ("raise", "mask")
ON_NONFINITE = ("raise", "skip")
TEACHER_STATES = ("noised", "trajectory")
PROGRESS_SETTINGS = (
    "progress_temperature",
    "progress_ema",
    "progress_base_images",
    "reward_targets",
    "reward_bounds",
)
BALANCE_SETTINGS = ("balance_every", "balance_fraction", "balance_ema", "balance_on")

PLAIN_PROCESSES = "Start plain processes, `accelerate launch --multi_gpu --num_processes N`"


if TYPE_CHECKING:
    from ..pipelines import Acceleration

    NumberOrNone: TypeAlias = float | None
else:

    class NumberOrNone:
        """A number, or `None` for the words `none`, `null` and `~`: the type of an entry of a list of options."""

        def __new__(cls, text: str) -> float | None:
            return None if text.lower() in ("none", "null", "~") else float(text)


class _SignatureOfInit:
    """The signature of a class as its `__init__` has it."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        signature = inspect.signature(owner.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])


@dataclass(repr=False)  # the inherited one hides tokens
class MarbleConfig(TrainingArguments):
    r"""
    Configuration class for the [`MarbleNFTTrainer`].

    This class includes only the parameters that are specific to MARBLE training. For a full list of training
    arguments, please refer to the [`~transformers.TrainingArguments`] documentation. Defaults are those of the MARBLE
    paper (https://huggingface.co/papers/2605.06507) for Stable Diffusion 3.5 Medium on one device: 48 prompts x 24
    images per optimizer step. On several devices divide `gradient_accumulation_steps` by their number. Five differ,
    because they were better or cheaper where we compared (docs/step_cost.md, docs/long_runs.md): the paper has
    `balance_every=10`, `balance_on="loss"`, `beta=1e-4`, `regularizer_fraction=1.0` and `old_policy_preset=1`.

    Parameters:
        > Parameters that control the rollouts

        num_generations (`int`, *optional*, defaults to `24`):
            Number of images sampled for each prompt: the group that advantages are centred on. At least 2. The global
            generation batch (`per_device_train_batch_size * steps_per_generation * number of processes`) must be a
            multiple of it.
        num_inference_steps (`int`, *optional*, defaults to `25`):
            Number of solver steps of a rollout. The solver is the pipeline's own scheduler.
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            Guidance scale of the rollouts. `1.0` samples without classifier-free guidance, as DiffusionNFT does,
            whatever the pipeline's own argument for that is (0 for Z-Image and Krea 2, whose values are 1 lower);
            less is refused. Guidance-distilled pipelines (Flux, Flux.2) are given the value as it is.
        height (`int`, *optional*):
            Height of the images or videos in pixels. Defaults to the pipeline's own. The paper uses 512.
        width (`int`, *optional*):
            Width of the images or videos in pixels. Defaults to the pipeline's own. The paper uses 512.
        num_frames (`int`, *optional*):
            Number of frames of a video, for pipelines of videos. Defaults to the pipeline's own number.
        max_sequence_length (`int`, *optional*):
            Maximum number of prompt tokens, for pipelines whose text encoder takes it. Defaults to the pipeline's own.
        rollout_batch_size (`int`, *optional*):
            Number of images that one call of the pipeline samples on each device. Defaults to `num_generations`.
            Images depend on it only by rounding.
        rollout_attention_backend (`str`, *optional*):
            The attention backend of diffusers for the transformer in rollouts, such as `"flash"` or `"sage"`: fewer
            bits for faster images. The update and evaluations keep the transformer's own. Refused where the
            transformer computes attention by itself, as that of Stable Diffusion 3.
        rollout_cache (`dict` or `str`, *optional*):
            A cache of diffusers for rollouts, which leaves out layers where they change little from one solver step to
            the next: under `"type"` the class of its settings, and the settings by their names, such as
            `{"type": "FirstBlockCacheConfig", "threshold": 0.1}`; also as JSON. The update and evaluations do without.
            Some caches decide for all images of a call at once, so that these depend on `rollout_batch_size`.
            Refused where diffusers has no caches for the transformer, as for Stable Diffusion 3.
        offload_components (`bool`, *optional*, defaults to `False`):
            Whether text encoders, image encoders and the VAE are on the device only while they are used, and on the
            CPU otherwise. The transformer stays on the device.
        cache_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the embeddings of all prompts are computed before training and kept on disk, below
            `HF_HOME/trl_marble/embeddings`. Later runs with the same prompts, text encoders and settings find them
            there. The text encoders are then removed from the pipeline, so that only these prompts can be sampled and
            evaluated.
        num_generations_eval (`int`, *optional*, defaults to `4`):
            Number of images sampled for each prompt of `eval_dataset`. Seeds are the same at every evaluation.
        eval_num_inference_steps (`int`, *optional*):
            Number of solver steps in evaluations. Defaults to `num_inference_steps`.
        eval_height (`int`, *optional*):
            Height of the images or videos in evaluations, in pixels. Defaults to `height`.
        eval_width (`int`, *optional*):
            Width of the images or videos in evaluations, in pixels. Defaults to `width`.

        > Parameters that control how often samples are used

        steps_per_generation (`int`, *optional*):
            Number of micro-batches a generation batch is split into. Defaults to `gradient_accumulation_steps`, that
            is one optimizer step for each generation batch. Must be a multiple of `gradient_accumulation_steps`, so
            that an optimizer step never mixes generation batches.
        num_iterations (`int`, *optional*, defaults to `1`):
            Number of passes over each generation batch.
        timestep_fraction (`float`, *optional*, defaults to `0.99`):
            Fraction, in `(0, 1]`, of the rollout's time grid that each sample is trained on in one pass, rounded down
            to a whole number of timesteps (at least one), drawn anew for each sample without replacement.

        > Parameters that control the rewards

        reward_weights (`list[float]`, *optional*):
            Weight of each reward, in the order of `reward_funcs`, in the weighted sum that `"sum_then_normalize"` and
            `"normalize_then_sum"` train on. MARBLE needs no weights: with `"marble"` and `"equal"` they only define
            the weighted sum that the `balance/weighted_sum/*` metrics compare with. Defaults to `1.0` each.
        scale_rewards (`str`, *optional*, defaults to `"batch"`):
            What centred rewards are divided by: `"batch"` (standard deviation over all valid samples of the generation
            batch on all processes), `"group"` (standard deviation of the prompt's group) or `"none"`.
        multi_objective_aggregation (`str`, *optional*, defaults to `"marble"`):
            How several rewards become one update. `"marble"`: per-reward gradients, balanced so that the update goes
            against none of these sampled gradients (MARBLE). `"equal"`: the same with fixed equal coefficients.
            `"sum_then_normalize"`: weighted sum of the raw rewards, then one advantage (DiffusionNFT).
            `"normalize_then_sum"`: one advantage per reward, then their weighted sum, normalized again (GDPO).
            `"progress"`: the same with weights that follow how far each reward has come since the base model: needs
            no weights, does not depend on the rewards' scales, and costs what a weighted sum costs, see
            [`~trl_marble.balance.ProgressWeights`]; best with `scale_rewards="group"`.
        balance_slider (`bool`, *optional*, defaults to `False`):
            Whether to train one adapter for every balance between the rewards: it has a part for each reward, of the
            rank of the `peft_config`, which is saved as an adapter of its own, and diffusers'
            `pipeline.set_adapters(names, shares)` sets the balance when images are made. Each prompt of a generation
            batch has shares of the rewards, drawn evenly from all that sum to 1: they mix the parts that sample and
            train on its images, and are the weights of its advantages in `"normalize_then_sum"`, which it needs
            (times `reward_weights`). Evaluations are at equal shares. See docs/one_adapter_many_balances.md.
        resample_silent_prompts (`int`, *optional*, defaults to `0`):
            How often other prompts are drawn for those without a signal: on whose images no reward differs, so that
            nothing can be learned from them. `1` (or `True`): their images are sampled anew for other prompts, of the
            same `source` if there is that column; with more, those of them that have no signal either are replaced
            again. `resampled/prompts` counts the prompts that were drawn, `resampled/still_silent` those without a
            signal in the end.
        reward_failure (`str`, *optional*, defaults to `"raise"`):
            What happens if a reward raises, takes too long, or returns an exception for an image. `"raise"`:
            training stops before the next images are sampled, with an error that names the reward, the prompt and the
            cause; first a checkpoint of the last optimizer step is saved, if there was one. `"mask"`: the images are
            treated as ones that the reward does not apply to and counted in `rewards/<name>/failed`; training stops
            only if a reward fails for every image of a generation batch. Return values that are not scores, such as
            one value too few, always stop training.
        on_nonfinite (`str`, *optional*, defaults to `"raise"`):
            What happens if a number is NaN or infinite: a sampled latent, an infinite reward (a reward that is NaN
            does not apply), or the gradient of an optimizer step. (For rewards that raise or take too long see
            `reward_failure`.) `"raise"`: nothing of the optimizer step is used, what was trained before it is saved,
            and training stops with an error that names what is not finite, where it arose, and what to change.
            `"skip"`: the image counts as one that no reward applies to (an infinite reward as one that failed), and an
            optimizer step whose gradient is not finite is skipped; each is counted (`nonfinite/latents`,
            `rewards/<name>/failed`, `nonfinite/skipped_steps`), and training stops only if no image is left, or after
            ten consecutive skipped steps. No weights that are not finite are ever saved.
        reward_timeout (`float`, *optional*):
            Longest time in seconds to wait for the rewards of a generation batch, all of them together, counted from
            when its last image is sampled; in an evaluation for those of each batch. Scores that are missing then
            count as failed, see `reward_failure`. Rewards score while images are sampled, so the time has to cover
            only by how much they are slower than sampling. Defaults to waiting for ever.

        > Parameters that control the loss

        policy_loss (`str`, *optional*, defaults to `"nft"`):
            The loss: `"nft"` (DiffusionNFT, see [`~trl_marble.losses.NFTLoss`]), `"awm"` (advantage weighted
            matching, https://huggingface.co/papers/2509.25050, see [`~trl_marble.losses.AWMLoss`]), `"crd"` (centered
            reward distillation, https://huggingface.co/papers/2603.14128, see [`~trl_marble.losses.CRDLoss`]),
            `"dgpo"` (direct group preference optimization, https://huggingface.co/papers/2510.08425, see
            [`~trl_marble.losses.DGPOLoss`]), `"gdro"` (group-level direct reward optimization,
            https://huggingface.co/papers/2601.02036, see [`~trl_marble.losses.GDROLoss`]), `"dpo"` (pairs of each
            reward's best and worst sample, https://huggingface.co/papers/2311.12908, see
            [`~trl_marble.losses.DPOLoss`]) or `"grpo"` (Flow-GRPO and successors,
            https://huggingface.co/papers/2505.05470, see [`~trl_marble.losses.GRPOLoss`]). A setting that the chosen
            loss does not use is refused.
        nft_beta (`float`, *optional*, defaults to `0.1`):
            Mixing coefficient b of the implicit positive and negative policies, v± = v_old ± b (v - v_old)
            (DiffusionNFT, https://huggingface.co/papers/2509.16117). Greater than 0.
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            Advantages are clipped to ± this value, reward by reward, before anything is mixed. Greater than 0.
        beta (`float`, *optional*, defaults to `0.1`):
            Coefficient of the penalty `mean((v - v_ref)^2)` that keeps the policy near the base model (called KL). It
            decides how far a policy drifts, and with that whether long runs keep every reward. The papers' `1e-4` is
            next to no penalty. With `0.0` the base model's forward pass is not run.
        kl_target (`float`, *optional*):
            The KL to hold, as `kl` (or `guided_kl`) is logged: the mean over elements of `(v - v_ref)^2`. `beta` is
            then the first value of a coefficient that follows the KL, see [`~trl_marble.update.KLControl`]: begin
            high, with 0.5 for example. By default `beta` stays as it is.
        regularizer_fraction (`float`, *optional*, defaults to `0.25`):
            In `(0, 1]`: the fraction of the timesteps of each image at which the penalties are evaluated: that of
            `beta`, and AWM's trust region. They are drawn anew for each step, and are the same ones, the first and
            third of an image for example, for all images; their number is rounded to an integer, at least 1. The
            penalty is the mean over them, so that on average over the draws its gradient is that of all timesteps.
            The others cost no forward pass of the base model (for AWM, nor of the old policy) and no backward pass of
            the penalties. `1.0` evaluates them everywhere.

        awm_weighting (`str`, *optional*, defaults to `"ghuber"`):
            How AWM weights the matching error over timesteps and sizes: `"ghuber"`, `"huber"`, `"t"`, `"t2"` or
            `"uniform"`, see [`~trl_marble.losses.AWMLoss`].
        awm_power (`float`, *optional*, defaults to `0.25`):
            Power of `"ghuber"`, in `(0, 1]`.
        awm_off_policy (`bool`, *optional*, defaults to `False`):
            Whether the old policy samples. By default the trained policy does, and each generation batch is used for
            one optimizer step.
        awm_clip_range (`float`, *optional*, defaults to `1.0`):
            Clip of the likelihood ratio with `awm_off_policy=True`. Greater than 0.
        awm_ema_beta (`float`, *optional*, defaults to `1.0`):
            Coefficient of the trust region `mean((v - v_old)^2)` around the old policy, a fast moving average of the
            trained weights (the paper's is `old_policy_preset=3`). With `0.0` its forward pass is not run.
        crd_objective (`str`, *optional*, defaults to `"mse"`):
            How CRD compares the centred log ratio of the policies with the centred reward: `"mse"`, by their squared
            difference, or `"bce"`, by the cross-entropy of their sigmoids.
        crd_beta (`float`, *optional*, defaults to `1.0`):
            Factor b of the log ratio in CRD: the higher, the nearer the policy stays to the old one. Greater than 0.
        sampling_policy_preset (`int`, *optional*):
            For CRD, a schedule as `old_policy_preset` has them, of a policy apart from the old one that samples the
            images. The published settings are `old_policy_preset=4` with `sampling_policy_preset=2`. By default the
            old policy samples.
        reference_guidance_scale (`float`, *optional*):
            For CRD and DGPO, guidance scale of the base model where the policy is compared with it, in the convention
            of `guidance_scale`; 4.5 in the published settings. The penalty of `beta`, and what `kl_target` holds, is
            then the distance to the guided base model, which is logged as `guided_kl`. It costs a second forward pass
            of the base model, but for guidance-distilled pipelines, which take the value as input. By default the base
            model is not guided.
        dgpo_beta (`float`, *optional*, defaults to `100.0`):
            How much the weight of a prompt's group depends on what the policy prefers already in DGPO. Greater than 0.
        dgpo_reference (`str`, *optional*, defaults to `"base"`):
            Which policy's preferences DGPO compares the trained one's with: `"base"` (the base model) or `"old"`
            (published with a `dgpo_beta` of 2000 to 5000).
        dgpo_clip_range (`float`, *optional*, defaults to `1e-3`):
            How far from 1 the likelihood ratio of the trained to the old policy may be in DGPO before a sample has no
            gradient. Greater than 0.
        gdro_beta (`float`, *optional*, defaults to `30.0`):
            How much of a difference of matching errors is a preference of the policy in GDRO. Greater than 0.
        gdro_temperature (`float`, *optional*, defaults to `0.2`):
            Temperature of the ranking that GDRO aims at, in units of the advantages. Greater than 0.
        gdro_best (`float`, *optional*, defaults to `0.05`):
            How much each group's best sample is learned by itself in GDRO, in units of `gdro_beta`.
        dpo_beta (`float`, *optional*, defaults to `5000.0`):
            How much of a difference of matching errors is a preference of the policy with `policy_loss="dpo"`. Greater
            than 0.

        grpo_sde (`str`, *optional*, defaults to `"flow_sde"`):
            How rollouts of `policy_loss="grpo"` add noise, on whose probability it trains: `"flow_sde"` (Flow-GRPO)
            or `"cps"` (coefficients-preserving sampling, https://huggingface.co/papers/2509.05952). Evaluations add
            none.
        grpo_noise_level (`float`, *optional*, defaults to `0.7`):
            How much noise, in `(0, 1]`.
        grpo_window_size (`int`, *optional*, defaults to `2`):
            Number of consecutive solver steps that add noise, which are those that each image is trained on; less than
            `num_inference_steps`, as the last step adds none.
        grpo_window (`str`, *optional*, defaults to `"random"`):
            Where these steps are: `"fixed"` (the first ones), `"random"` (drawn for each generation batch from the
            first half of the rollout) or `"sliding"` (the first ones, one step later every `grpo_window_every`
            generation batches, and after the first half the first ones again).
        grpo_window_every (`int`, *optional*, defaults to `25`):
            See `grpo_window`.
        grpo_clip_range (`float`, *optional*, defaults to `1e-4`):
            Clip of the likelihood ratio, where a generation batch is used for several optimizer steps. Greater than 0.
            Log-likelihoods are means over the numbers of an image, so that ratios are close to 1.
        grpo_guard (`bool`, *optional*, defaults to `False`):
            Whether the likelihood ratio is normalized as in GRPO-Guard (https://huggingface.co/papers/2510.22319).
        grpo_reweighting (`str`, *optional*, defaults to `"none"`):
            Weights of the solver steps: `"none"`, `"noise"` (by the noise that they add, TempFlow-GRPO,
            https://huggingface.co/papers/2508.04324) or `"step"` (by the inverse of their length, GRPO-Guard's).

        > Parameters that control the teachers

        teacher_weight (`float`, *optional*, defaults to `1.0`):
            Coefficient of the teachers' loss, the mean over all samples of `mean((v - v_teacher)^2)`, where rewards
            are summed (`"sum_then_normalize"`, `"normalize_then_sum"` and `"progress"`): it is added to their loss.
            With `"marble"` and `"equal"` each teacher is balanced as a reward is, and this only defines the weighted
            sum that the `balance/weighted_sum/*` metrics compare with. Greater than 0.
        teacher_states (`str`, *optional*, defaults to `"noised"`):
            Where the policy is compared with the teachers: at noised versions of its own images (`"noised"`), or, in
            a run without rewards, at the states that it went through when it sampled them (`"trajectory"`); these
            are kept in float32, `num_inference_steps` latents for each image, and the solver is Euler's. Teachers
            beside rewards are compared with where the loss is computed: with `policy_loss="grpo"` at states of
            rollouts, otherwise at noised images.

        > Parameters that control the balancing

        weighting (`str`, *optional*, defaults to `"mgda"`):
            How `multi_objective_aggregation="marble"` finds the coefficients, see
            [`~trl_marble.balance.get_weighting`]. The trainer also takes a callable.
        balance_every (`int`, *optional*, defaults to `1`):
            The balancing problem is solved from per-reward gradients every this many optimizer steps. In between, the
            smoothed solution is used at the cost of one backward pass. With `1` every step is solved, and
            `balance_ema` matters only for rewards that apply to no sample of a step.
        balance_fraction (`float`, *optional*, defaults to `1.0`):
            In `(0, 1]`: the fraction of an optimizer step's forward passes (timesteps of micro-batches, of all
            processes) in which per-reward gradients are taken when the balancing problem is solved. With `1.0` the
            solution is exact and used at once. Below, it is an estimate from a random part of the step and goes into
            the moving average, which is what every step uses: at `balance_every=1` the balance stays fresh at
            little more than the cost of a single reward.
        balance_ema (`float`, *optional*, defaults to `0.7`):
            Decay, in `[0, 1)`, of the moving average of the solutions that is used between solves.
        balance_on (`str`, *optional*, defaults to `"advantage"`):
            Which gradients of `policy_loss="nft"` or `"crd"` are balanced: those of each reward's complete loss
            (`"loss"`, the paper's), or only those of its advantage-weighted part (`"advantage"`); the trust region
            around the old policy that all rewards share is then applied once, in the same backward pass as the penalty
            of `beta`.

        > Parameters that control the weights by progress

        progress_temperature (`float`, *optional*, defaults to `0.15`):
            With `multi_objective_aggregation="progress"`, as all of these: `tau` of the weights `softmax(-p / tau)`,
            where `p` is the progress of each reward since the base model in units of its scale. Of two rewards, the
            one that is `tau` ahead weighs 2.7 times less. Greater than 0.
        progress_ema (`float`, *optional*, defaults to `0.9`):
            Decay, in `[0, 1)`, of the moving average of the progress over generation batches.
        progress_base_images (`int`, *optional*, defaults to `4`):
            Number of images of the base model for each prompt, sampled and scored when the prompt is drawn for the
            first time. The progress is measured against them.
        reward_priorities (`list[float]`, *optional*):
            How much each reward matters, in the order of `reward_funcs`: numbers above 0 of which only ratios count.
            With `"marble"` the update's cosine with the gradient of a reward of twice the priority is twice as large;
            with `"progress"` that reward is to come twice as far. Defaults to equal ones.
        reward_targets (`list[float | None]`, *optional*):
            For each reward, in the order of `reward_funcs`, the mean from which on it weighs nothing, in its own unit;
            `None` for a reward without one. Defaults to no targets.
        reward_bounds (`list[float | None]`, *optional*):
            For each reward, in the order of `reward_funcs`, the highest mean that can be hoped for: its progress is
            the share of the way from the base model to there. `None` for a reward whose progress is in standard
            deviations of the base model's images, which is the default for all.

        > Parameters that control the old policy and the averaged weights

        old_policy_preset (`int`, *optional*, defaults to `0`):
            How fast the policy that samples follows the one that is trained: old <- eta old + (1 - eta) current with
            eta = min(max(0, step - flat) * rate, max), applied after each generation batch. `0`: fully on-policy;
            `1`: rate 0.001 up to 0.95 (the paper's); `2`: flat 75, rate 0.0075, max 0.999; `3`: rate 0.001 up to 0.3
            (AWM's and DGPO's); `4`: from 0.25 on, rate 0.005 up to 0.999 (CRD's).
        weight_ema_decay (`float`, *optional*, defaults to `0.9`):
            Upper limit, in `[0, 1)`, of the decay of the averaged weights, min((1 + step) / (10 + step), this), which
            are the ones that are evaluated, saved and pushed. `0.0` evaluates and saves the trained weights
            themselves.

        > Parameters that control how processes share the work

        shard_base (`bool`, *optional*, defaults to `False`):
            Whether each process keeps only its part of the transformer's frozen weights (FSDP2), where the whole does
            not fit one GPU. They travel between processes in every forward and backward pass. The adapter, its
            gradients and the optimizer's state, which are small, stay whole on every process. Without effect with one
            process.

        > Parameters that control the output folder

        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether to delete the checkpoints in `output_dir` that the run does not go on from. Without it a run that
            starts anew among the checkpoints of an earlier one is refused.
        resume_from_checkpoint (`str`, *optional*):
            The checkpoint that `train()` goes on from: its path, `"latest"` for the latest valid one in `output_dir`,
            or `"auto"` for that one where there is one, and a new run where there is none.

        > Parameters that control logging

        log_images (`bool`, *optional*, defaults to `True`):
            Whether to save pictures of the run, and to send them to TensorBoard, Weights & Biases and Trackio where
            they are in use: grids of rollout and evaluation images with their rewards and histograms of the rewards
            (`output_dir/images`; of videos some frames side by side, and beside each grid one that plays), plots of
            rewards, weights and cosines at each save and at the end (`output_dir/plots`).
        log_images_steps (`int`, *optional*, defaults to `10`):
            Least number of optimizer steps between two grids of rollout images, which come at logging steps, the
            first one included. They take about half a second; grids of videos some seconds.
        num_images_to_log (`int`, *optional*, defaults to `4`):
            Number of prompts in a logged grid, with up to as many images each.

    Raises:
        `TypeError`: For a setting that does not exist, with the nearest that does.
        `ValueError`: For settings that cannot work, alone or together.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "rollout_cache"]  # noqa: RUF012  (read from JSON)

    # Parameters whose types or default values are overridden from TrainingArguments
    output_dir: str = field(
        default="trainer_output", metadata={"help": "Where the adapter, its card, checkpoints and pictures go."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Whether to delete checkpoints of an earlier run in `output_dir`."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to resume from: its path, 'latest' for the latest valid one in `output_dir`, or 'auto'"
            " for the latest valid one if there are checkpoints and a new run if there are none."
        },
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The learning rate schedule."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "Number of images in one forward and backward pass on each device."}
    )
    gradient_accumulation_steps: int = field(
        default=144, metadata={"help": "Number of micro-batches in one optimizer step (8 x 144 = 48 prompts x 24)."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every X optimizer steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay `False`: see `on_nonfinite` for losses that are not finite."}
    )
    save_steps: float = field(default=50, metadata={"help": "Save a checkpoint every X optimizer steps."})
    dataloader_pin_memory: bool = field(
        default=False, metadata={"help": "Whether to pin memory. Has no effect: a batch has only row numbers."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay `False`: rewards receive every column of the dataset."}
    )

    # Parameters that control the rollouts
    num_generations: int = field(default=24, metadata={"help": "Number of images sampled for each prompt."})
    num_inference_steps: int = field(default=25, metadata={"help": "Number of solver steps of a rollout."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Guidance scale of the rollouts."})
    height: int | None = field(
        default=None, metadata={"help": "Height of the images or videos in pixels. Defaults to the pipeline's own."}
    )
    width: int | None = field(
        default=None, metadata={"help": "Width of the images or videos in pixels. Defaults to the pipeline's own."}
    )
    num_frames: int | None = field(
        default=None, metadata={"help": "Number of frames of a video. Defaults to the pipeline's own number."}
    )
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "Maximum number of prompt tokens. Defaults to the pipeline's own."}
    )
    rollout_batch_size: int = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Images sampled at once on each device. Defaults to `num_generations`."}
    )
    rollout_attention_backend: str | None = field(
        default=None,
        metadata={"help": "Attention backend of diffusers in rollouts ('flash', 'sage', ...), not in updates."},
    )
    rollout_cache: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Cache of diffusers in rollouts, not in updates: "
            """'{"type": "FirstBlockCacheConfig", "threshold": 0.1}'."""
        },
    )
    offload_components: bool = field(
        default=False, metadata={"help": "Whether text encoders and VAE are on the CPU while they are not used."}
    )
    cache_embeddings: bool = field(
        default=False,
        metadata={"help": "Whether prompts are encoded before training, kept on disk, and text encoders removed."},
    )
    num_generations_eval: int = field(default=4, metadata={"help": "Number of images for each evaluation prompt."})
    eval_num_inference_steps: int | None = field(
        default=None, metadata={"help": "Solver steps in evaluations. Defaults to `num_inference_steps`."}
    )
    eval_height: int | None = field(default=None, metadata={"help": "Height in evaluations. Defaults to `height`."})
    eval_width: int | None = field(default=None, metadata={"help": "Width in evaluations. Defaults to `width`."})

    # Parameters that control how often samples are used
    steps_per_generation: int = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Micro-batches of a generation batch. Defaults to `gradient_accumulation_steps`."},
    )
    num_iterations: int = field(default=1, metadata={"help": "Number of passes over each generation batch."})
    timestep_fraction: float = field(
        default=0.99,
        metadata={"help": "Fraction of the rollout's timesteps that each sample is trained on in a pass."},
    )

    # Parameters that control the rewards
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward in sums of rewards. Defaults to 1 each."}
    )
    scale_rewards: Literal["batch", "group", "none"] = field(
        default="batch", metadata={"help": "What centred rewards are divided by: 'batch', 'group' or 'none'."}
    )
    multi_objective_aggregation: Literal["marble", "equal", "sum_then_normalize", "normalize_then_sum", "progress"] = (
        field(
            default="marble",
            metadata={
                "help": "How rewards become one update: 'marble', 'equal', 'sum_then_normalize', 'normalize_then_sum' "
                "or 'progress'."
            },
        )
    )

    balance_slider: bool = field(
        default=False, metadata={"help": "Whether one adapter is trained for every balance between the rewards."}
    )
    resample_silent_prompts: int = field(
        default=0, metadata={"help": "How often other prompts are drawn for those on which no reward differs."}
    )
    reward_failure: Literal["raise", "mask"] = field(
        default="raise", metadata={"help": "What to do if a reward fails: 'raise' or 'mask'."}
    )
    on_nonfinite: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "What to do if a number is NaN or infinite: 'raise' or 'skip'."}
    )
    reward_timeout: float | None = field(
        default=None,
        metadata={"help": "Longest time in seconds to wait for all rewards, once a generation batch is sampled."},
    )

    # Parameters that control the loss
    policy_loss: str = field(
        default="nft", metadata={"help": "The loss: 'nft', 'awm', 'crd', 'dgpo', 'gdro', 'dpo' or 'grpo'."}
    )
    nft_beta: float = field(default=0.1, metadata={"help": "Mixing coefficient of the implicit policies."})
    advantage_clip: float = field(default=5.0, metadata={"help": "Advantages are clipped to ± this value."})
    beta: float = field(default=0.1, metadata={"help": "Coefficient of the KL penalty toward the base model."})
    kl_target: float | None = field(
        default=None,
        metadata={"help": "KL to the base model to hold: `beta` then follows the KL, and is its first value."},
    )
    regularizer_fraction: float = field(
        default=0.25,
        metadata={"help": "Fraction of the timesteps at which the KL and AWM's trust region are evaluated."},
    )
    awm_weighting: Literal["ghuber", "huber", "t", "t2", "uniform"] = field(
        default="ghuber", metadata={"help": "How AWM weights the matching error."}
    )
    awm_power: float = field(default=0.25, metadata={"help": "Power of AWM's weighting 'ghuber'."})
    awm_off_policy: bool = field(default=False, metadata={"help": "Whether the old policy samples for AWM."})
    awm_clip_range: float = field(default=1.0, metadata={"help": "Clip of AWM's likelihood ratio, off-policy."})
    awm_ema_beta: float = field(
        default=1.0, metadata={"help": "Coefficient of AWM's trust region around the old policy."}
    )
    crd_objective: Literal["mse", "bce"] = field(
        default="mse", metadata={"help": "How CRD compares the policies' log ratio with the reward."}
    )
    crd_beta: float = field(default=1.0, metadata={"help": "Factor of the policies' log ratio in CRD."})
    sampling_policy_preset: int | None = field(
        default=None, metadata={"help": "CRD: schedule of a policy that samples apart from the old one."}
    )
    reference_guidance_scale: float | None = field(
        default=None,
        metadata={"help": "CRD, DGPO: guidance scale of the base model that the policy is compared with."},
    )
    dgpo_beta: float = field(
        default=100.0, metadata={"help": "How much DGPO's group weights depend on what the policy prefers."}
    )
    dgpo_reference: Literal["base", "old"] = field(
        default="base", metadata={"help": "What DGPO compares the policy's preferences with."}
    )
    dgpo_clip_range: float = field(default=1e-3, metadata={"help": "Clip of DGPO's likelihood ratio."})
    gdro_beta: float = field(
        default=30.0, metadata={"help": "GDRO: how much of a difference of matching errors is a preference."}
    )
    gdro_temperature: float = field(default=0.2, metadata={"help": "Temperature of the ranking that GDRO aims at."})
    gdro_best: float = field(default=0.05, metadata={"help": "How much GDRO learns the best sample by itself."})
    dpo_beta: float = field(
        default=5000.0, metadata={"help": "DPO: how much of a difference of matching errors is a preference."}
    )

    grpo_sde: Literal["flow_sde", "cps"] = field(
        default="flow_sde", metadata={"help": "How rollouts of GRPO add noise: 'flow_sde' or 'cps'."}
    )
    grpo_noise_level: float = field(default=0.7, metadata={"help": "How much noise rollouts of GRPO add."})
    grpo_window_size: int = field(
        default=2, metadata={"help": "Number of solver steps that add noise and are trained on by GRPO."}
    )
    grpo_window: Literal["fixed", "random", "sliding"] = field(
        default="random", metadata={"help": "Where GRPO's steps are: 'fixed', 'random' or 'sliding'."}
    )
    grpo_window_every: int = field(
        default=25, metadata={"help": "Generation batches after which GRPO's sliding window moves by a step."}
    )
    grpo_clip_range: float = field(default=1e-4, metadata={"help": "Clip of GRPO's likelihood ratio."})
    grpo_guard: bool = field(default=False, metadata={"help": "Whether GRPO-Guard normalizes the likelihood ratio."})
    grpo_reweighting: Literal["none", "noise", "step"] = field(
        default="none", metadata={"help": "Weights of GRPO's solver steps: 'none', 'noise' or 'step'."}
    )

    # Parameters that control the teachers
    teacher_weight: float = field(
        default=1.0, metadata={"help": "Coefficient of the teachers' loss where rewards are summed."}
    )
    teacher_states: Literal["noised", "trajectory"] = field(
        default="noised",
        metadata={"help": "Without rewards: teachers are followed at 'noised' images or along the 'trajectory'."},
    )

    # Parameters that control the balancing
    weighting: str = field(default="mgda", metadata={"help": "Rule for the balancing weights: 'mgda' or 'equal'."})
    balance_every: int = field(default=1, metadata={"help": "Solve the balancing problem every X optimizer steps."})
    balance_fraction: float = field(
        default=1.0, metadata={"help": "Fraction of the forward passes of a step that a solution is taken from."}
    )
    balance_ema: float = field(default=0.7, metadata={"help": "Decay of the moving average of the solutions."})
    balance_on: Literal["loss", "advantage"] = field(
        default="advantage", metadata={"help": "What is balanced: 'loss' or 'advantage' gradients."}
    )

    # Parameters that control the weights by progress
    progress_temperature: float = field(
        default=0.15, metadata={"help": "How far ahead a reward must be to weigh 2.7 times less, in its scale."}
    )
    progress_ema: float = field(default=0.9, metadata={"help": "Decay of the moving average of the progress."})
    progress_base_images: int = field(
        default=4, metadata={"help": "Images of the base model per prompt that the progress is measured against."}
    )
    reward_priorities: list[float] | None = field(
        default=None,
        metadata={"help": "How much each reward matters: with 'marble' or 'progress', only the ratios count."},
    )
    reward_targets: list[NumberOrNone] | None = field(
        default=None, metadata={"help": "Mean of each reward from which on it weighs nothing; 'none' for no target."}
    )
    reward_bounds: list[NumberOrNone] | None = field(
        default=None, metadata={"help": "Highest mean of each reward that can be hoped for; 'none' for no bound."}
    )

    # Parameters that control the old policy and the averaged weights
    old_policy_preset: int = field(
        default=0, metadata={"help": "Schedule of the old policy, which samples the images: 0, 1, 2, 3 or 4."}
    )
    weight_ema_decay: float = field(
        default=0.9,
        metadata={"help": "Upper limit of the decay of the averaged weights, which are evaluated and saved."},
    )

    # Parameters that control how processes share the work
    shard_base: bool = field(
        default=False, metadata={"help": "Whether each process keeps only a part of the frozen transformer (FSDP2)."}
    )

    # Parameters that control logging
    log_images: bool = field(default=True, metadata={"help": "Whether to save pictures of the run."})
    log_images_steps: int = field(
        default=10, metadata={"help": "Least number of optimizer steps between grids of rollout images."}
    )
    num_images_to_log: int = field(default=4, metadata={"help": "Number of prompts in a logged grid."})

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # The generated `__init__` would name the unknown setting too, but not the one that was meant.
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        for name in kwargs:
            if name not in known:
                how = suggest_name(name, known) or "see the docstring for the settings there are"
                raise TypeError(f"`{cls.__name__}` has no setting `{name}`; {how}{'' if how.endswith('?') else '.'}")
        return super().__new__(cls)

    __signature__ = _SignatureOfInit()  # else notebooks and `inspect` would show that of `__new__`

    def __post_init__(self) -> None:
        self._check_launch()
        check_arguments(self)
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith("joint_fall"):
            self.greater_is_better = False
        super().__post_init__()
        self.build_acceleration()
        self._check_choices()
        self._check_ranges()
        self._check_batches()
        self._check_unused()
        self._check_balance_slider()
        check_combinations(self)
        self._check_devices()
        if self.log_images:
            require_extra("plots", "`log_images=True`, the default,", "set `log_images=False`")
        for tracker in EXTRAS.keys() & set(self.report_to or ()):
            require_extra(tracker, f"`report_to={tracker!r}`")

    def _check_choices(self) -> None:
        for name, choices in (
            ("policy_loss", tuple(LOSSES)),
            ("awm_weighting", get_args(AWMWeighting)),
            ("crd_objective", get_args(CRDObjective)),
            ("dgpo_reference", get_args(DGPOReference)),
            ("grpo_sde", get_args(SDEKind)),
            ("grpo_window", get_args(WindowPlacement)),
            ("grpo_reweighting", get_args(Reweighting)),
            ("multi_objective_aggregation", AGGREGATIONS),
            ("weighting", tuple(WEIGHTINGS)),
            ("balance_on", BALANCE_ON),
            ("scale_rewards", SCALE_REWARDS),
            ("reward_failure", REWARD_FAILURE),
            ("teacher_states", TEACHER_STATES),
            ("on_nonfinite", ON_NONFINITE),
            ("old_policy_preset", tuple(OLD_POLICY_PRESETS)),
            ("sampling_policy_preset", (None, *OLD_POLICY_PRESETS)),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(map(repr, choices))}.")

    def _check_ranges(self) -> None:
        at_least = {
            "num_generations": (2, "advantages compare the images of one prompt with each other"),
            "num_inference_steps": (1, "a rollout needs a step"),
            "num_iterations": (1, "each generation batch is used at least once"),
            "num_generations_eval": (1, "an evaluation needs at least one image per prompt"),
            "resample_silent_prompts": (0, "0 keeps all prompts"),
            "progress_base_images": (1, "progress is measured against the base model"),
            "balance_every": (1, "1 solves at every optimizer step"),
            "grpo_window_size": (1, "only steps that add noise are trained on"),
            "grpo_window_every": (1, "1 moves the window after each generation batch"),
            "num_images_to_log": (1, "set `log_images=False` to log none"),
            "log_images_steps": (1, "1 logs images at every logging step"),
            "per_device_train_batch_size": (1, "a forward pass needs an image"),
            "per_device_eval_batch_size": (1, "a rollout needs an image"),
            "gradient_accumulation_steps": (1, "1 takes an optimizer step after each micro-batch"),
            "rollout_batch_size": (1, "leave it out to use `num_generations`"),
            "steps_per_generation": (1, "leave it out to use `gradient_accumulation_steps`"),
            "height": (1, "leave it out to use the pipeline's own"),
            "width": (1, "leave it out to use the pipeline's own"),
            "num_frames": (1, "leave it out to use the pipeline's own number"),
            "max_sequence_length": (1, "leave it out to use the pipeline's own"),
            "eval_num_inference_steps": (1, "leave it out to use `num_inference_steps`"),
            "eval_height": (1, "leave it out to use `height`"),
            "eval_width": (1, "leave it out to use `width`"),
        }
        for name, (minimum, why) in at_least.items():
            if not isinstance(getattr(self, name), Integral | None):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be an integer.")
            if getattr(self, name) is not None and getattr(self, name) < minimum:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least {minimum}: {why}.")
        above_zero = (
            "nft_beta",
            "awm_clip_range",
            "crd_beta",
            "dgpo_beta",
            "dgpo_clip_range",
            "gdro_beta",
            "dpo_beta",
            "teacher_weight",
        )
        for name in (*above_zero, "gdro_temperature", "grpo_clip_range", "advantage_clip", "progress_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be a finite number greater than 0.")
        if self.reward_timeout is not None and not 0 < self.reward_timeout < math.inf:
            raise ValueError(
                f"`reward_timeout` is {self.reward_timeout}; it must be a number of seconds greater than 0. Leave it "
                "out to wait for ever."
            )
        for name, policy in (("beta", "base model"), ("awm_ema_beta", "old policy")):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}; it must be 0 (no penalty toward the {policy}) or greater."
                )
        if not 0 <= self.gdro_best < math.inf:
            raise ValueError(f"`gdro_best` is {self.gdro_best}; it must be 0 or greater.")
        if self.kl_target is not None and not 0 < self.kl_target < math.inf:
            raise ValueError(
                f"`kl_target` is {self.kl_target}; it must be a finite number greater than 0. Leave it out to keep "
                "`beta` as it is."
            )
        if self.multi_objective_aggregation == "progress" and self.scale_rewards == "none":
            raise ValueError(
                "`multi_objective_aggregation='progress'` sums scaled rewards, and `scale_rewards` is 'none'; set "
                "`scale_rewards='group'` or 'batch'."
            )
        if self.multi_objective_aggregation == "progress" and self.resample_silent_prompts:
            raise ValueError(
                "`multi_objective_aggregation='progress'` measures progress over all prompts, and "
                f"`resample_silent_prompts={self.resample_silent_prompts}` leaves some of them out; leave one of the "
                "two out."
            )
        if self.kl_target is not None and self.beta == 0:
            raise ValueError(
                f"`kl_target={self.kl_target}` needs a first value of `beta`, which is 0.0; set `beta=0.5`."
            )
        for name in ("balance_ema", "weight_ema_decay", "progress_ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; a decay must be in [0, 1).")
        for name in ("timestep_fraction", "balance_fraction", "regularizer_fraction", "awm_power", "grpo_noise_level"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be in (0, 1].")
        if self.reward_weights is not None and not _are_finite_numbers(self.reward_weights):
            raise ValueError(
                f"`reward_weights` is {self.reward_weights!r}; pass a list with one finite number for each reward."
            )
        if self.reward_priorities is not None and not (
            _are_finite_numbers(self.reward_priorities) and all(value > 0 for value in self.reward_priorities)
        ):
            raise ValueError(
                f"`reward_priorities` is {self.reward_priorities!r}; pass a list with one number above 0 for each "
                "reward."
            )

        for name in ("reward_targets", "reward_bounds"):
            if (values := getattr(self, name)) is not None:
                _check_optional_numbers(name, values)
        for target, bound in zip(self.reward_targets or [], self.reward_bounds or [], strict=False):
            if target is not None and bound is not None and target > bound:
                raise ValueError(
                    f"`reward_targets` has {target} where `reward_bounds` has {bound}: a target above what can be "
                    "hoped for is never reached; lower it or raise the bound."
                )

    def _check_batches(self) -> None:
        if self.rollout_batch_size is None:
            # Not the training batch size: how that is split must not touch the images, not even by a rounding.
            self.rollout_batch_size = self.num_generations
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        if self.steps_per_generation % self.gradient_accumulation_steps != 0:
            raise ValueError(
                f"`steps_per_generation` ({self.steps_per_generation}) must be a multiple of "
                f"`gradient_accumulation_steps` ({self.gradient_accumulation_steps}), so that an optimizer step stays "
                "within one generation batch."
            )
        if self.generation_batch_size % self.num_generations != 0:
            raise ValueError(
                f"The generation batch has {self.generation_batch_size} images (`per_device_train_batch_size` "
                f"{self.per_device_train_batch_size} x {self.world_size} processes x `steps_per_generation` "
                f"{self.steps_per_generation}), which is not a multiple of `num_generations` "
                f"({self.num_generations}). Change one of them so that every prompt has its whole group."
            )

    def _check_balance_slider(self) -> None:
        """Refuse what does not work with shares that differ from sample to sample."""
        if not self.balance_slider:
            return
        if self.multi_objective_aggregation != "normalize_then_sum":
            raise ValueError(
                "`balance_slider=True` sums the advantages of the rewards, with other weights for each prompt, and "
                f"`multi_objective_aggregation={self.multi_objective_aggregation!r}` does something else; set "
                "`multi_objective_aggregation='normalize_then_sum'`."
            )
        for name in ("torch_compile", "shard_base"):
            if getattr(self, name):
                raise ValueError(
                    f"`balance_slider=True` and `{name}=True` do not work together: layers of the transformer are "
                    "changed from batch to batch. Leave one of them out."
                )

    def _check_unused(self) -> None:
        """Refuse settings that have no effect beside others."""
        defaults = {f.name: f.default for f in dataclasses.fields(MarbleConfig)}
        for name, reason in self._find_unused().items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` has no effect with {reason}; leave one of the two out."
                )

    def _find_unused(self) -> dict[str, str]:
        """The settings of this class that have no effect here, and the reason."""
        unused: dict[str, str] = {}
        if not self.balances_gradients:
            reason = f"`multi_objective_aggregation={self.multi_objective_aggregation!r}`, which balances no gradients"
            unused = dict.fromkeys(BALANCE_SETTINGS, reason)
        if self.multi_objective_aggregation not in ("marble", "progress"):
            reason = f"`multi_objective_aggregation={self.multi_objective_aggregation!r}`"
            unused["reward_priorities"] = f"{reason}, which does not look at them (`reward_weights` are for sums)"
        if self.multi_objective_aggregation != "marble":
            unused["weighting"] = f"`multi_objective_aggregation={self.multi_objective_aggregation!r}`"
        if "beta" not in settings_of(LOSSES[self.policy_loss]):
            unused["kl_target"] = f"`policy_loss={self.policy_loss!r}`, which has no KL"
        if not any(build_loss(LOSSES[self.policy_loss], vars(self)).penalties):
            unused["regularizer_fraction"] = self._why_no_penalties()
        if self.multi_objective_aggregation == "progress":
            unused["reward_weights"] = "`multi_objective_aggregation='progress'`, which finds the weights"
        else:
            reason = f"`multi_objective_aggregation={self.multi_objective_aggregation!r}`, which has other weights"
            unused |= dict.fromkeys(PROGRESS_SETTINGS, reason)
        unused |= dict.fromkeys(self._settings_of_other_losses(), f"`policy_loss={self.policy_loss!r}`")
        if self.policy_loss == "awm":
            unused |= self._unused_by_awm()
        if self.policy_loss == "grpo":
            unused |= self._unused_by_grpo()
        if self.beta == 0 and not (self.policy_loss == "dgpo" and self.dgpo_reference == "base"):
            unused.setdefault("reference_guidance_scale", "`beta=0.0`, with which no base model is compared with")
        if not self.log_images:
            unused["log_images_steps"] = "`log_images=False`"
        return unused

    def _why_no_penalties(self) -> str:
        known = settings_of(LOSSES[self.policy_loss])
        zero = " and ".join(f"`{name}=0.0`" for name in ("beta", "awm_ema_beta") if name in known)
        return f"{zero or f'`policy_loss={self.policy_loss!r}`'}, which leaves no penalty"

    @property
    def unused_settings(self) -> list[str]:
        """The settings of this class that have no effect beside the others."""
        return list(self._find_unused())

    def _settings_of_other_losses(self) -> set[str]:
        """Settings of losses that the chosen one does not have."""
        # Advantages are clipped before any loss sees them.
        known = {name for loss in LOSSES.values() for name in settings_of(loss)} - {"advantage_clip"}
        return known - set(settings_of(LOSSES[self.policy_loss]))

    def _unused_by_awm(self) -> dict[str, str]:
        unused: dict[str, str] = {}
        if self.awm_weighting != "ghuber":
            unused["awm_power"] = f"`awm_weighting={self.awm_weighting!r}`"
        if self.awm_off_policy:
            return unused
        if self.num_iterations > 1 or self.steps_per_generation > self.gradient_accumulation_steps:
            raise ValueError(
                "`policy_loss='awm'` takes one optimizer step for each generation batch, which the trained policy has "
                f"sampled; `num_iterations` is {self.num_iterations}, `steps_per_generation` "
                f"{self.steps_per_generation} and `gradient_accumulation_steps` {self.gradient_accumulation_steps}. "
                "Take one step, or set `awm_off_policy=True`, with which the old policy samples and is compared with."
            )
        unused["awm_clip_range"] = "`awm_off_policy=False`, where the likelihood ratio is 1"
        if self.awm_ema_beta == 0:
            unused["old_policy_preset"] = "`awm_ema_beta=0.0` and `awm_off_policy=False`, which need no old policy"
        return unused

    def _unused_by_grpo(self) -> dict[str, str]:
        if self.grpo_window_size >= self.num_inference_steps:
            raise ValueError(
                f"`grpo_window_size` is {self.grpo_window_size} and `num_inference_steps` is "
                f"{self.num_inference_steps}; it must be smaller, as the last step adds no noise."
            )
        if self.grpo_guard and self.grpo_reweighting == "noise":
            raise ValueError(
                "`grpo_guard=True` weights steps by their noise already, as `grpo_reweighting='noise'` does; leave "
                "one of the two out, or set `grpo_reweighting='step'`."
            )
        if self.rollout_cache is not None:
            raise ValueError(
                "`rollout_cache` changes the velocities of rollouts, and `policy_loss='grpo'` trains on the "
                "probability of their steps; leave `rollout_cache` out."
            )
        loss = "`policy_loss='grpo'`"
        unused = {
            "timestep_fraction": f"{loss}, which trains on `grpo_window_size` steps",
            "old_policy_preset": f"{loss}, which samples each generation batch with the trained policy",
        }
        if self.grpo_window != "sliding":
            unused["grpo_window_every"] = f"`grpo_window={self.grpo_window!r}`"
        if self.num_iterations == 1 and self.steps_per_generation == self.gradient_accumulation_steps:
            unused["grpo_clip_range"] = (
                "one optimizer step for each generation batch, where the likelihood ratio is 1 (`num_iterations` and "
                "`steps_per_generation` give it more)"
            )
        return unused

    def _check_launch(self) -> None:
        """Refuse ways of sharing the work under which the gradients would be wrong, before they are set up."""
        if self.deepspeed or _is_set("ACCELERATE_USE_DEEPSPEED"):
            raise ValueError(
                "DeepSpeed is not supported: it reduces gradients and steps by itself, while here the gradients of "
                f"each reward are added up over processes before they are balanced. {PLAIN_PROCESSES}, and set "
                "`shard_base=True` if the base does not fit one GPU."
            )
        if self.fsdp or _is_set("ACCELERATE_USE_FSDP"):
            raise ValueError(
                "FSDP as `accelerate` and `transformers` set it up is not supported: it would shard the adapter too, "
                f"and the gradients of each reward are needed whole. {PLAIN_PROCESSES}, and set `shard_base=True`: it "
                "shards the frozen base, which is nearly all of the memory, by FSDP2."
            )
        if self.parallelism_config is not None or _is_set(
            "ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_USE_MEGATRON_LM"
        ):
            raise ValueError(f"Tensor, context and pipeline parallelism are not supported. {PLAIN_PROCESSES}.")

    def _check_devices(self) -> None:
        check_world_size(self.world_size)
        if self.n_gpu > 1:
            raise ValueError(
                f"One process sees {self.n_gpu} GPUs and would use the first one only. {PLAIN_PROCESSES} to use N of "
                "them, or choose one by the environment variable `CUDA_VISIBLE_DEVICES=0`."
            )
        if self.shard_base and self.torch_compile:
            raise ValueError("`shard_base=True` and `torch_compile=True` do not work together; leave one of them out.")
        if self.rollout_cache is not None and self.shard_base:
            raise ValueError(
                "`rollout_cache` and `shard_base=True` do not work together: processes that leave out different "
                "layers would wait for each other without end. Leave one of them out."
            )
        if self.rollout_cache is not None and self.torch_compile:
            raise ValueError(
                "`rollout_cache` and `torch_compile=True` do not work together: the compiled layers would be compiled "
                "anew when the cache comes and goes. Leave one of them out."
            )

    def build_acceleration(self) -> "Acceleration | None":
        """How rollouts are sampled faster; `None` where they are not."""
        if self.rollout_attention_backend is None and self.rollout_cache is None:
            return None
        from ..pipelines import Acceleration  # here, because the help of the command line needs no diffusers

        return Acceleration(self.rollout_attention_backend, self.rollout_cache)  # type: ignore[arg-type]

    @property
    def old_policy_schedule(self) -> tuple[int, float, float]:
        """`flat`, `rate` and `max` of the old policy's decay; with `policy_loss="grpo"` it does not lag."""
        return OLD_POLICY_PRESETS[0 if self.policy_loss == "grpo" else self.old_policy_preset]

    @property
    def sampling_policy_schedule(self) -> tuple[int, float, float] | None:
        """The same of a policy that samples apart from the old one; `None` where there is none."""
        return None if self.sampling_policy_preset is None else OLD_POLICY_PRESETS[self.sampling_policy_preset]

    @property
    def evaluation_steps(self) -> int:
        """Number of solver steps in evaluations."""
        return self.num_inference_steps if self.eval_num_inference_steps is None else self.eval_num_inference_steps

    @property
    def evaluation_size(self) -> tuple[int | None, int | None]:
        """Height and width of the images in evaluations; `None` for the pipeline's own."""
        height = self.height if self.eval_height is None else self.eval_height
        return height, self.width if self.eval_width is None else self.eval_width

    @property
    def base_is_sharded(self) -> bool:
        """Whether each process has a part of the frozen base only: `shard_base`, where there are several processes."""
        return self.shard_base and self.world_size > 1

    @property
    def balances_gradients(self) -> bool:
        """Whether the aggregation needs one gradient for each reward."""
        return self.multi_objective_aggregation in ("marble", "equal")

    @property
    def generation_batch_size(self) -> int:
        """Number of images sampled together on all processes."""
        return self.per_device_train_batch_size * self.world_size * self.steps_per_generation

    @property
    def prompts_per_generation(self) -> int:
        """Number of prompts in one generation batch on all processes."""
        return self.generation_batch_size // self.num_generations


def _is_set(*flags: str) -> bool:
    """Whether `accelerate launch` has set any of these environment variables."""
    return any(parse_flag_from_env(flag) for flag in flags)


def _check_optional_numbers(name: str, values: Any) -> None:
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    if not is_list or not _are_finite_numbers([value for value in values if value is not None]):
        raise ValueError(f"`{name}` is {values!r}; pass a list with one finite number, or `None`, for each reward.")
    if all(value is None for value in values):
        raise ValueError(f"`{name}` is {values!r}, which has no effect; leave it out.")


def _are_finite_numbers(values: Any) -> bool:
    return isinstance(values, Sequence) and all(isinstance(v, Real) and math.isfinite(v) for v in values)
