# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`trl-marble estimate`: what a run is going to cost, from its settings alone."""

import re
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import UsageError, usage_errors


if TYPE_CHECKING:
    from ..trainer import MarbleConfig
    from .model_costs import ModelCosts
    from .parsing import ConfigParser
    from .step_passes import StepPasses
    from .train import ScriptArguments

HELP = "images, passes, time and memory of a training, computed from its settings"
USAGE = "trl-marble estimate --config FILE [--gpu NAME | --seconds_per_pass SECONDS] [options of train]"
DESCRIPTION = """Compute what `trl-marble train` is going to cost with the same settings: images and passes of the
transformer in each step, minutes and hours on known GPUs, and peak memory. Nothing is loaded, and no GPU is needed.
The times are not measured: operations of the transformer are divided by what a GPU does at the utilization given."""
GB = 1e9
LEAST_CUDA = 0.5  # GB that CUDA itself needs
SHAPEWORLD_REWARDS = 5
GENERATED = re.compile(r"(\w[\w.-]*=)?(ocr|compositional):(?P<number>\d+)")


class GPU(NamedTuple):
    """Teraflops of dense products in bf16 with fp32 sums, and GB of memory, as its data sheet has them."""

    teraflops: float
    memory: float


GPUS = {
    "rtx4090": GPU(165.2, 24),
    "l40s": GPU(362, 48),
    "a100": GPU(312, 80),
    "h100": GPU(989.4, 80),
    "h200": GPU(989.4, 141),
}


@dataclass
class EstimateArguments:
    """
    How fast the transformer is.

    Args:
        gpu (`str`, *optional*):
            One of `GPUS`. By default all of them.
        utilization (`float`, *optional*, defaults to `0.3`):
            The part of a GPU's peak that the transformer reaches, in (0, 1].
        seconds_per_pass (`float`, *optional*):
            Measured seconds of a forward pass of one image on one GPU, in place of an assumption: those of a batch
            divided by its images.
    """

    _argument_group_name = "how fast the transformer is"

    gpu: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(GPUS)}. Defaults to all of them.", "choices": [*GPUS]}
    )
    utilization: float = field(
        default=0.3, metadata={"help": "The part of a GPU's peak in bf16 that the transformer reaches, in (0, 1]."}
    )
    seconds_per_pass: float | None = field(
        default=None,
        metadata={"help": "Measured seconds of a forward pass of one image on one GPU; no peak is assumed then."},
    )


def register(subparsers: Any, whole: bool = False) -> None:
    """Add the command; its options, which take seconds to import, only where `whole` asks for them."""
    parents = [make_parser(add_help=False)] if whole else []
    command = subparsers.add_parser("estimate", help=HELP, add_help=False, parents=parents)
    command.set_defaults(run=run, takes_words=True)


def make_parser(**kwargs: Any) -> "ConfigParser":
    """The parser of its own options and all those of `trl-marble train`."""
    from ..trainer import MarbleConfig
    from .parsing import ConfigParser
    from .train import ScriptArguments

    kinds = (EstimateArguments, ScriptArguments, MarbleConfig)
    return ConfigParser(kinds, usage=USAGE, description=DESCRIPTION, **kwargs)


def run(args: Namespace) -> int:
    estimate_args, script_args, training_args, num_processes = read_settings(args.words)
    print("\n".join(describe(estimate_args, script_args, training_args, num_processes)))
    return 0


def read_settings(words: list[str]) -> tuple[EstimateArguments, "ScriptArguments", "MarbleConfig", int]:
    """
    The settings of a command line, as `trl-marble train` reads them.

    Args:
        words (`list[str]`):
            What stands after the command's name.

    Returns:
        `tuple[EstimateArguments, ScriptArguments, MarbleConfig, int]`: with the settings of one process that does the
        work of all, and the number of processes.

    Raises:
        [`UsageError`]: If `trl-marble train` would refuse them, or a setting of this command is out of range.
    """
    from .launching import launch_arguments
    from .parsing import read_config
    from .sources import check_reward_names
    from .train import check_evaluation, check_task

    config, own_words = read_config(words)
    parser = make_parser()
    others = parser.take(own_words, config)
    num_processes = 1
    if others:
        launch = launch_arguments(others, parser, {"train": make_parser}, ["train", *words])
        num_processes = launch.num_processes or _processes_of(launch.config_file) or 1
    given = parser.parse_known_args(own_words)[0]
    # No device is asked for, and one process does the work of all: the images of a step are the same.
    own_words = [*own_words, "--use_cpu", "True"]
    for name in ("gradient_accumulation_steps", "steps_per_generation"):
        if (number := getattr(given, name)) is not None:
            own_words += [f"--{name}", str(number * num_processes)]
    estimate_args, script_args, training_args = parser.build(own_words)
    check_task(script_args)
    check_evaluation(script_args, training_args)
    with usage_errors():
        check_reward_names([*(script_args.rewards or []), *(script_args.eval_rewards or [])])
    if not 0 < estimate_args.utilization <= 1:
        raise UsageError(f"`--utilization` is {estimate_args.utilization}; it must be in (0, 1], such as 0.3")
    if estimate_args.seconds_per_pass is not None and not estimate_args.seconds_per_pass > 0:
        raise UsageError(f"`--seconds_per_pass` is {estimate_args.seconds_per_pass}; it must be greater than 0")
    if estimate_args.gpu is not None and estimate_args.seconds_per_pass is not None:
        raise UsageError("`--gpu` has no effect with `--seconds_per_pass`, which is measured; leave one of them out")
    return estimate_args, script_args, training_args, num_processes


def _processes_of(accelerate_config: str | None) -> int | None:
    """Processes of all machines in a file of `accelerate config`."""
    if accelerate_config is None:
        return None
    from accelerate.commands.config.config_args import load_config_from_file

    number: int = load_config_from_file(str(Path(accelerate_config))).num_processes
    return number


def describe(
    estimate_args: EstimateArguments, script_args: "ScriptArguments", args: "MarbleConfig", num_processes: int
) -> list[str]:
    """
    What a run costs, in lines of text.

    Args:
        estimate_args ([`EstimateArguments`]):
            How fast the transformer is.
        script_args ([`ScriptArguments`]):
            What is trained.
        args ([`~trl_marble.MarbleConfig`]):
            The settings of one process that does the work of all.
        num_processes (`int`):
            The processes that share it.

    Returns:
        `list[str]`: the lines.
    """
    from .model_costs import find_costs
    from .sources import read_teachers
    from .step_passes import compute_passes

    costs = find_costs(script_args.model, script_args.lora_target_modules)
    num_rewards = sum(SHAPEWORLD_REWARDS if name == "shapeworld" else 1 for name in script_args.rewards or [])
    teachers = read_teachers(script_args.teachers or [])
    of_all = sum(name.partition(":")[0] == "all" for name in teachers)
    num_lessons = of_all + (of_all < len(teachers))
    # Flux takes its guidance as an input.
    classifier_free = costs is None or costs.name != "flux"
    num_prompts = _generated_prompts(script_args.prompts)
    passes = compute_passes(
        args,
        num_processes,
        classifier_free,
        num_rewards,
        num_prompts,
        num_lessons=num_lessons,
        num_teachers=len(teachers),
    )
    images = args.generation_batch_size
    devices = "1 GPU" if num_processes == 1 else f"{num_processes} GPUs"
    rows = num_rewards + len(teachers)
    memory = None if costs is None else _peak_memory(script_args, args, costs, rows)
    lines = [
        f"Each generation batch: {images} images ({args.prompts_per_generation} prompts x {args.num_generations})",
        f"Passes per step: {_passes(passes)}",
    ]
    if estimate_args.seconds_per_pass is not None:
        backward = 1.0 if costs is None else costs.backward(*_size(args)) / costs.forward(*_size(args))
        seconds = estimate_args.seconds_per_pass * (passes.forward + backward * passes.backward) / num_processes
        lines.append(f"{devices} at {estimate_args.seconds_per_pass:g} s per pass: {_duration(seconds, args)}")
    elif costs is None:
        lines.append(
            f"Time and memory: nothing is known of the size of `{script_args.model}`; measure a forward pass and give "
            "`--seconds_per_pass`"
        )
    else:
        lines += _times(estimate_args, args, costs, passes, num_processes, memory)
    if costs is not None:
        lines.append(_memory_line(memory))
    lines.append(
        "Computed from the transformer's operations, not measured. Not counted: loading, encoding, decoding, rewards "
        "and evaluations."
    )
    return lines


def _generated_prompts(sources: list[str]) -> int | None:
    """The number of prompts where all of them are generated; `None` where that is known only once they are loaded."""
    found = [GENERATED.fullmatch(source) for source in sources]
    return sum(int(match["number"]) for match in found if match) if all(found) else None


def _times(
    estimate_args: EstimateArguments,
    args: "MarbleConfig",
    costs: "ModelCosts",
    passes: "StepPasses",
    num_processes: int,
    memory: float | None,
) -> list[str]:
    """How long a step takes on known GPUs, and which of them it does not fit."""
    height, width = _size(args)
    operations = passes.forward * costs.forward(height, width) + passes.backward * costs.backward(height, width)
    lines = []
    for name, gpu in GPUS.items():
        if estimate_args.gpu in (None, name):
            title = f"{num_processes} x {name}" if num_processes > 1 else name
            if memory is not None and memory + LEAST_CUDA > gpu.memory:
                lines.append(f"{title}: does not fit its {gpu.memory:g} GB")
                continue
            seconds = operations / (gpu.teraflops * 1e12 * estimate_args.utilization * num_processes)
            lines.append(
                f"{title} at {estimate_args.utilization:.0%} of {gpu.teraflops:g} TFLOPS: {_duration(seconds, args)}"
            )
    return lines


def _peak_memory(
    script_args: "ScriptArguments", args: "MarbleConfig", costs: "ModelCosts", num_rows: int
) -> float | None:
    """The peak of one GPU in GB; `None` for settings that it is not computed for."""
    _size(args)
    if script_args.quantize_base == "int8" or args.shard_base or not args.bf16 or not costs.knows_memory:
        return None
    return costs.peak_memory(script_args, args, num_rows) / GB


def _size(args: "MarbleConfig") -> tuple[int, int]:
    if args.height is None or args.width is None:
        raise UsageError("set `height` and `width`: the cost of a pass depends on them, and no pipeline is loaded")
    return args.height, args.width


def _memory_line(memory: float | None) -> str:
    if memory is None:
        return (
            "Peak memory of one GPU: computed only with `bf16`, without `shard_base` and int8, and with an adapter on "
            "the default layers or on `all-linear`"
        )
    return f"Peak memory of one GPU: {memory:.1f} GB, and {LEAST_CUDA:g} to 1 for CUDA, and the models of the rewards"


def _passes(passes: "StepPasses") -> str:
    """All passes and what they are for."""
    parts = {
        "sampling": passes.rollout,
        "base images": passes.base_images,
        "old policy": passes.old,
        "base model": passes.reference,
        "teachers": passes.teachers,
        "forward": passes.trained,
        "backward": passes.backward,
        "recomputed": passes.backward if passes.checkpointed else 0,
    }
    shown = ", ".join(f"{name} {number:,.0f}" for name, number in parts.items() if number)
    return f"{passes.total:,.0f} ({shown})"


def _duration(seconds: float, args: "MarbleConfig") -> str:
    """Of a step, and of the run where its steps are known."""
    text = f"{seconds / 60:.1f} minutes per step"
    if args.max_steps <= 0:
        return text
    minutes = seconds * args.max_steps / 60
    return f"{text}, {minutes:.0f} minutes in all" if minutes < 90 else f"{text}, {minutes / 60:.1f} hours in all"
