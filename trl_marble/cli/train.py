# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`trl-marble train`: align a pipeline with several rewards."""

import re
from argparse import Namespace
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import UsageError, check_hub_access, hub_errors, run_errors, usage_errors
from .launching import run_command


if TYPE_CHECKING:
    from ..trainer import MarbleConfig, RewardHackingCallback
    from .parsing import ConfigParser

SAMPLING_OF_EVALUATIONS = ("eval_num_inference_steps", "eval_height", "eval_width")
HELP = "train a LoRA against several rewards"
USAGE = "trl-marble train --model MODEL --prompts SOURCE ... --rewards REWARD ... [options]"
DESCRIPTION = """Train a LoRA of a diffusers pipeline on several rewards at once. Every option can also be set in a
YAML file (`--config`). Options of `accelerate launch`, such as `--num_processes 8`, start that many processes;
`--accelerate_config` takes a file that `accelerate config` wrote."""


@dataclass
class ScriptArguments:
    """
    What to train, on what, for what.

    Args:
        model (`str`):
            The pipeline: a Hub id, a local folder, or `"shapeworld"`.
        prompts (`list[str]`):
            Sources of prompts, each `source` or `name=source`; see [`~trl_marble.cli.sources.load_sources`].
        rewards (`list[str]`, *optional*):
            Names or dotted paths of rewards; see [`~trl_marble.cli.sources.load_rewards`]. Without them there must be
            teachers.
        teachers (`list[str]`, *optional*):
            Adapters that the policy learns from, each `source=adapter` with a source of the prompts, or
            `all:name=adapter` for all prompts; see [`~trl_marble.MarbleNFTTrainer`].
        prompt_weights (`list[float]`, *optional*):
            The share of each source in a step, as a weight; equal shares if left out.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            The column that holds the prompts of files and datasets.
        eval_prompts (`list[str]`, *optional*):
            Sources of the prompts to evaluate on.
        eval_split (`str`, *optional*, defaults to `"test"`):
            The split of `eval_prompts` to read.
        eval_rewards (`list[str]`, *optional*):
            Rewards that are measured in evaluations and never trained on.
        reward_hacking (`str`, *optional*, defaults to `"warn"`):
            What a [`~trl_marble.RewardHackingCallback`] does about rewards that are bought with others, and a policy
            that drifts too far: `"warn"`, `"stop"` the training, or nothing (`"off"`).
        use_t5 (`bool`, *optional*, defaults to `True`):
            Whether Stable Diffusion 3 reads prompts with T5 too, which takes 9 GB in bf16. Use an adapter that was
            trained without it on a pipeline without it.
        quantize_base (`str`, *optional*):
            Store the transformer's linear layers in 4 bits (`"nf4"`) or 8 (`"int8"`), with `bitsandbytes` on a GPU.
            On a base that is not quantized alike, the adapter's images differ a little from those of training.
        offload_rewards (`bool`, *optional*, defaults to `False`):
            Whether rewards that are models leave the GPU during updates.
        lora_r (`int`, *optional*, defaults to `32`):
            Rank of the LoRA.
        lora_alpha (`int`, *optional*, defaults to `64`):
            The update is scaled by `lora_alpha / lora_r`.
        lora_target_modules (`list[str]`, *optional*):
            Names of the layers to adapt, `all-linear`, or one regular expression for whole names; the attention
            projections of the pipeline's family if left out.
    """

    _argument_group_name = "what to train"

    model: str = field(metadata={"help": "Hub id or folder of the pipeline, or 'shapeworld'."})
    prompts: list[str] = field(
        metadata={
            "help": "Prompts to train on: files, folders, Hub datasets, generators (ocr:2000, compositional:2000) or "
            "'shapeworld', each with a name if wanted (name=source)."
        }
    )
    rewards: list[str] | None = field(
        default=None,
        metadata={"help": "Rewards: names (pickscore), dotted paths (my_rewards.brightness) or 'shapeworld'."},
    )
    teachers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Adapters to learn from: source=adapter for the prompts of a source, all:name=adapter for all "
            "prompts; an adapter is a Hub id, a folder or a .safetensors file."
        },
    )
    prompt_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each source of prompts. Defaults to equal shares."}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "The column that holds the prompts."})
    eval_prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts to evaluate on, written like those of --prompts."}
    )
    eval_split: str = field(default="test", metadata={"help": "The split of the evaluation prompts."})
    eval_rewards: list[str] | None = field(
        default=None, metadata={"help": "Rewards that are measured in evaluations and never trained on."}
    )
    reward_hacking: Literal["warn", "stop", "off"] = field(
        default="warn",
        metadata={"help": "Whether rewards that are bought with others give a warning, or stop the training."},
    )
    use_t5: bool = field(default=True, metadata={"help": "Whether Stable Diffusion 3 reads prompts with T5 too."})
    quantize_base: Literal["nf4", "int8"] | None = field(
        default=None, metadata={"help": "Store the transformer in 4 ('nf4') or 8 bits ('int8'), with bitsandbytes."}
    )
    offload_rewards: bool = field(
        default=False, metadata={"help": "Whether rewards that are models leave the GPU during updates."}
    )
    lora_r: int = field(default=32, metadata={"help": "Rank of the LoRA."})
    lora_alpha: int = field(default=64, metadata={"help": "The update is scaled by lora_alpha / lora_r."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers to adapt: ends of names, 'all-linear', or one regular expression for whole names. "
            "Defaults to the attention layers of the pipeline's family."
        },
    )


def register(subparsers: Any, whole: bool = False) -> None:
    """Add the command; its options, which take seconds to import, only where `whole` asks for them."""
    parents = [make_parser(add_help=False)] if whole else []
    command = subparsers.add_parser("train", help=HELP, add_help=False, parents=parents)
    command.set_defaults(run=run, takes_words=True)


def make_parser(**kwargs: Any) -> "ConfigParser":
    """The parser of all options, those of `MarbleConfig` too."""
    from ..trainer import MarbleConfig
    from .parsing import ConfigParser

    return ConfigParser((ScriptArguments, MarbleConfig), usage=USAGE, description=DESCRIPTION, **kwargs)


def run(args: Namespace) -> int:
    return run_command("train", args.words, args.parsers, train)


def train(script_args: ScriptArguments, training_args: "MarbleConfig") -> None:
    """Train, save the adapter with its card, push them where asked to, and say where they are."""
    from torch import nn

    from ..checkpoint.folder import find_checkpoint, find_replaced
    from ..pipelines import lora_config
    from ..trainer import LiveTableCallback, MarbleNFTTrainer
    from .sources import load_model, load_rewards, load_sources, read_teachers

    check_task(script_args)
    check_evaluation(script_args, training_args)
    if training_args.push_to_hub:
        check_hub_access(training_args.hub_token)  # before models are loaded
    with hub_errors("nothing was trained"), usage_errors():
        folder = Path(training_args.output_dir)
        wanted = training_args.resume_from_checkpoint
        checkpoint = find_checkpoint(wanted, folder)  # before models are loaded
        overwrite = training_args.overwrite_output_dir
        find_replaced(folder, wanted, checkpoint, overwrite, warns=False)  # refuses a mixed folder
        prompts = load_sources(
            script_args.prompts,
            column=script_args.prompt_column,
            weights=script_args.prompt_weights,
            seed=training_args.seed,
        )
        eval_prompts = None
        if script_args.eval_prompts:
            eval_prompts = load_sources(
                script_args.eval_prompts,
                split=script_args.eval_split,
                column=script_args.prompt_column,
                seed=training_args.seed,
            )
        rewards = load_rewards(script_args.rewards or [], script_args.offload_rewards)
        eval_rewards = load_rewards(script_args.eval_rewards or [], script_args.offload_rewards)
        pipeline = load_model(script_args.model, training_args.bf16, script_args.use_t5, script_args.quantize_base)
        peft_config = lora_config(pipeline, script_args.lora_r, script_args.lora_alpha)
        if script_args.lora_target_modules is not None:
            linears = [name for name, layer in pipeline.transformer.named_modules() if isinstance(layer, nn.Linear)]
            peft_config.target_modules = lora_targets(script_args.lora_target_modules, linears)
        trainer = MarbleNFTTrainer(
            pipeline,
            reward_funcs=[*rewards] if rewards else None,
            args=training_args,
            train_dataset=prompts,
            eval_dataset=eval_prompts,
            peft_config=peft_config,
            callbacks=[LiveTableCallback(), *watching(script_args.reward_hacking)],
            eval_reward_funcs=[*eval_rewards],
            teachers=read_teachers(script_args.teachers or []),
        )
    with run_errors():
        trainer.train()
    trainer.save_model()  # and its card
    folder = Path(training_args.output_dir).absolute()
    if trainer.is_world_process_zero():
        print_times(trainer.state.log_history)
        print(f"The adapter and its card (README.md) are in {folder}")
    if training_args.push_to_hub:
        again = f"the adapter is in {folder}, to be pushed by `trl-marble push`, but now nothing was pushed"
        with hub_errors(again):
            trainer.push_to_hub()
        if trainer.is_world_process_zero():
            print(f"They are on the Hub: {trainer.hub_model_id}")


def print_times(history: list[dict[str, Any]]) -> None:
    """Print where the time of a run went, if its log says so."""
    from rich.console import Console

    from ..evaluation.time_summary import summarize_times, times_table

    if (times := summarize_times(history)) is not None:
        Console().print(times_table(times))


def watching(reward_hacking: str) -> list["RewardHackingCallback"]:
    """The callback that watches a run, none for `"off"`."""
    from ..trainer import RewardHackingCallback

    return [] if reward_hacking == "off" else [RewardHackingCallback(reward_hacking)]  # type: ignore[arg-type]


def check_task(script_args: ScriptArguments) -> None:
    """
    Refuse a run that has nothing to learn from.

    Args:
        script_args ([`ScriptArguments`]):
            The options of the command.

    Raises:
        [`UsageError`]: If there are neither rewards nor teachers.
    """
    if not script_args.rewards and not script_args.teachers:
        raise UsageError("there is nothing to train on; name `rewards`, `teachers` or both")


def check_evaluation(script_args: ScriptArguments, args: "MarbleConfig") -> None:
    """
    Refuse settings of evaluations that never take place.

    Args:
        script_args ([`ScriptArguments`]):
            The options of the command.
        args ([`MarbleConfig`]):
            The settings of the training.

    Raises:
        [`UsageError`]: If there are prompts and no evaluation, or an evaluation or its settings and no prompts.
    """
    if script_args.eval_prompts:
        if args.eval_strategy == "no" and not args.eval_on_start:
            raise UsageError("`eval_prompts` are never evaluated; set `eval_strategy` to steps, and `eval_steps`")
    elif unused := [
        *(["eval_rewards"] if script_args.eval_rewards else []),
        *(["eval_split"] if script_args.eval_split != "test" else []),
        *(name for name in SAMPLING_OF_EVALUATIONS if getattr(args, name) is not None),
    ]:
        name = unused[0]
        raise UsageError(f"`{name}` has no effect without `eval_prompts`; name the prompts to evaluate on")
    elif args.eval_strategy != "no" or args.eval_on_start:
        name = "eval_on_start" if args.eval_strategy == "no" else "eval_strategy"
        raise UsageError(f"`{name}` needs `eval_prompts`; name the prompts to evaluate on")


def lora_targets(words: list[str], layers: Collection[str]) -> list[str] | str:
    """
    The layers that a LoRA adapts, as peft has them.

    Args:
        words (`list[str]`):
            As they were written.
        layers (`Collection[str]`):
            The names of the transformer's layers.

    Returns:
        `list[str]` or `str`: Ends of layers' names; or the text itself of a single word that is no name: `all-linear`,
        or a regular expression for whole names.

    Raises:
        [`UsageError`]: If a name or an expression fits no layer: peft says nothing of one of several names.
    """
    how = f"Layers have names such as {next(iter(layers), '')!r}; several are separated by spaces (a list in a file)."
    if len(words) == 1 and not re.fullmatch(r"[\w.]+", words[0]):
        if words[0].lower() == "all-linear":
            return words[0]
        try:
            fits = any(re.fullmatch(words[0], layer) for layer in layers)
        except re.error as error:
            raise UsageError(f"`lora_target_modules` {words[0]!r} is no regular expression: {error}. {how}") from error
        if not fits:
            raise UsageError(f"`lora_target_modules` {words[0]!r} fits the whole name of no layer. {how}")
        return words[0]
    unknown = [word for word in words if not any(f".{layer}".endswith(f".{word}") for layer in layers)]
    if unknown or not words:
        raise UsageError(f"`lora_target_modules` {(unknown or words)!r}: there is no such layer. {how}")
    return words
