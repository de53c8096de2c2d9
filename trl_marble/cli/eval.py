# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`trl-marble eval`: score a pipeline, with or without an adapter."""

from argparse import Namespace
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import run_errors, usage_errors
from .launching import run_command


if TYPE_CHECKING:
    from ..evaluation import EvaluationConfig
    from .parsing import ConfigParser

HELP = "score a pipeline, with or without an adapter"
USAGE = "trl-marble eval --model MODEL --prompts SOURCE ... --rewards REWARD ... --output_dir DIR [options]"
DESCRIPTION = """Sample images for a prompt set and score them. An evaluation that was interrupted continues where it
stopped when the same command runs again. Every option can also be set in a YAML file (`--config`). Options of
`accelerate launch`, such as `--num_processes 8`, start that many processes."""


@dataclass
class ScriptArguments:
    """
    What to evaluate, on what, by what.

    Args:
        model (`str`):
            The pipeline: a Hub id, a local folder, or `"shapeworld"`.
        prompts (`list[str]`):
            Sources of prompts, each `source` or `name=source`; see [`~trl_marble.cli.sources.load_sources`].
        rewards (`list[str]`):
            Names or dotted paths of rewards; see [`~trl_marble.cli.sources.load_rewards`].
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            The column that holds the prompts of files and datasets.
        split (`str`, *optional*, defaults to `"test"`):
            The split of the prompts to read.
        use_t5 (`bool`, *optional*, defaults to `True`):
            Whether Stable Diffusion 3 reads prompts with T5 too. Leave it out for an adapter trained without it.
    """

    _argument_group_name = "what to evaluate"

    model: str = field(metadata={"help": "Hub id or folder of the pipeline, or 'shapeworld'."})
    prompts: list[str] = field(
        metadata={
            "help": "Prompts: files, folders, Hub datasets, generators (ocr:200, compositional:200) or 'shapeworld', "
            "each with a name if wanted (name=source)."
        }
    )
    rewards: list[str] = field(
        metadata={"help": "Rewards: names (pickscore), dotted paths (my_rewards.brightness) or 'shapeworld'."}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "The column that holds the prompts."})
    split: str = field(default="test", metadata={"help": "The split of the prompts to read."})
    use_t5: bool = field(default=True, metadata={"help": "Whether Stable Diffusion 3 reads prompts with T5 too."})


def register(subparsers: Any, whole: bool = False) -> None:
    """Add the command; its options, which take seconds to import, only where `whole` asks for them."""
    parents = [make_parser(add_help=False)] if whole else []
    command = subparsers.add_parser("eval", help=HELP, add_help=False, parents=parents)
    command.set_defaults(run=run, takes_words=True)


def make_parser(**kwargs: Any) -> "ConfigParser":
    """The parser of all options, those of `EvaluationConfig` too."""
    from ..evaluation import EvaluationConfig
    from .parsing import ConfigParser

    return ConfigParser((ScriptArguments, EvaluationConfig), usage=USAGE, description=DESCRIPTION, **kwargs)


def run(args: Namespace) -> int:
    return run_command("eval", args.words, args.parsers, evaluate)


def evaluate(script_args: ScriptArguments, args: "EvaluationConfig") -> None:
    """Evaluate, print the table and say where the results are."""
    import torch
    from accelerate import PartialState
    from rich.console import Console

    from ..evaluation import evaluate_pipeline
    from ..world_size import check_world_size
    from .sources import load_model, load_rewards, load_sources

    # As in `evaluate_pipeline`: without an accelerator the processes of `torchrun` would each work alone.
    state = PartialState(cpu=not torch.accelerator.is_available())
    with run_errors(), usage_errors():
        check_world_size(state.num_processes)
        prompts = load_sources(script_args.prompts, script_args.split, script_args.prompt_column, seed=args.seed)
        pipeline = load_model(script_args.model, args.bf16, script_args.use_t5).to(state.device)
        results = evaluate_pipeline(pipeline, [*load_rewards(script_args.rewards)], prompts, args)
    if state.is_main_process:
        Console().print(results.to_table())
        print(f"Scores, images and the page contact_sheet.html are in {results.folder.absolute()}")
