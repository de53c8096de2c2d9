# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`trl-marble demo`: align a tiny pretrained Stable Diffusion 3 with five rewards at once."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extras import require_extra
from .errors import usage_errors
from .train import print_times, watching


if TYPE_CHECKING:
    from ..evaluation import Evaluation

HELP = "train ShapeWorld, a tiny Stable Diffusion 3, on five rewards: minutes on two CPU cores"

# Settings of `MarbleConfig` for runs of any length, see docs/long_runs.md. Evaluations score 24 images for each of 48
# held-out prompts.
DEMO_SETTINGS: dict[str, Any] = {
    "learning_rate": 1.2e-3,
    "lr_scheduler_type": "linear",  # down to 0: the last steps average the noise of the first
    "num_generations": 8,  # images of each of 8 prompts a step
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": 1,
    "rollout_batch_size": 64,
    "num_inference_steps": 5,
    "timestep_fraction": 0.8,  # each image is trained on at 4 of the 5 timesteps
    "old_policy_preset": 0,  # the policy that samples is the one that is trained
    "beta": 0.2,
    "regularizer_fraction": 0.25,  # the KL at one of the 4 timesteps
    "multi_objective_aggregation": "progress",
    "scale_rewards": "group",
    "eval_strategy": "steps",
    "eval_steps": 30,  # and after the last step
    "eval_on_start": True,
    "per_device_eval_batch_size": 128,
    "num_generations_eval": 24,
    "num_images_to_log": 8,
}
DEMO_STEPS = 60


def register(subparsers: Any, whole: bool = False) -> None:
    command = subparsers.add_parser("demo", help=HELP, description=__doc__, allow_abbrev=False)
    command.add_argument("--output_dir", "--output-dir", default="runs/demo", help="default: %(default)s")
    command.add_argument("--seed", type=int, default=42, help="default: %(default)s")
    command.add_argument("--max_steps", "--max-steps", type=int, default=DEMO_STEPS, help="default: %(default)s")
    command.add_argument(
        "--reward_hacking",
        "--reward-hacking",
        choices=("warn", "stop", "off"),
        default="warn",
        help="warn of rewards that are bought with others, stop the training, or neither; default: %(default)s",
    )
    command.set_defaults(run=run)


def run(args: Namespace) -> int:
    with usage_errors():
        require_extra("plots", "The demo, which leaves pictures,")
    run_demo(args.output_dir, args.seed, args.max_steps, args.reward_hacking)
    return 0


def run_demo(output_dir: str, seed: int = 42, max_steps: int = DEMO_STEPS, reward_hacking: str = "warn") -> None:
    """Train, print every reward before and after, and leave the adapter, its card, pictures and report.json."""
    from rich.console import Console

    from .. import LiveTableCallback, MarbleConfig, MarbleNFTTrainer
    from ..evaluation import before_after_grid, evaluations_table, rewards_table, run_gains
    from ..evaluation.results import to_json
    from ..shapeworld import load_pipeline, load_prompts, reward_funcs

    config = MarbleConfig(output_dir, overwrite_output_dir=True, seed=seed, max_steps=max_steps, **DEMO_SETTINGS)
    trainer = MarbleNFTTrainer(
        load_pipeline(),
        reward_funcs=[*reward_funcs()],
        args=config,
        train_dataset=load_prompts("train"),
        eval_dataset=load_prompts("test"),
        callbacks=[LiveTableCallback(), *watching(reward_hacking)],
    )
    seconds = trainer.train().metrics["train_runtime"]
    before, after = trainer.evaluations[0], trainer.evaluations[-1]
    old, new = ([row[:4] for row in evaluation.gallery.values()] for evaluation in (before, after))
    before_after_grid(list(before.gallery), old, new, Path(output_dir, "before_after.png"))
    trainer.save_model()  # and README.md, with plots

    errors = {name: error for name, (_, error) in after.change_since(before).items()}
    console, history = Console(), trainer.state.log_history
    console.print(rewards_table(before.summary(), after.summary(), errors))
    console.print(evaluations_table(run_gains(history)))
    print_times(history)
    Path(output_dir, "report.json").write_bytes(to_json(make_report(before, after, history, seconds)))
    print(f"The adapter, its card (README.md) and the pictures are in {Path(output_dir).absolute()}")


def make_report(
    before: "Evaluation", after: "Evaluation", history: Sequence[Mapping[str, Any]], seconds: float
) -> dict[str, Any]:
    """
    What a run reached, for report.json.

    Args:
        before ([`~trl_marble.evaluation.Evaluation`]):
            The evaluation before the first step.
        after ([`~trl_marble.evaluation.Evaluation`]):
            That after the last step.
        history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`.
        seconds (`float`):
            Duration of the training, evaluations included.

    Returns:
        `dict[str, Any]`: `"rewards"`, each before and after with its change; `"evaluations"`, the gains and the KL of
        each, see [`~trl_marble.evaluation.GainPoint`]; `"balance"` or `"progress"`, the summary of how the rewards
        were weighted, where the aggregation measures it; and `"seconds"`.
    """
    from ..evaluation import run_gains, summarize_balance, summarize_progress

    measured = {"before": before.summary(), "after": after.summary(), "change": after.change_since(before)}
    summaries = {"balance": summarize_balance(history), "progress": summarize_progress(history)}
    return {
        "rewards": {
            name: {
                when: dict(zip(("mean", "standard_error"), values[name], strict=True))
                for when, values in measured.items()
            }
            for name in before.reward_names
        },
        "evaluations": [point.numbers() for point in run_gains(history)],
        **{name: vars(summary) for name, summary in summaries.items() if summary is not None},
        "seconds": seconds,
    }
