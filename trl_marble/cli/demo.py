# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`trl-marble demo`: align a tiny pretrained Stable Diffusion 3 with five rewards at once."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..extras import require_extra
from .errors import usage_errors
from .train import print_times, watching


HELP = "train ShapeWorld, a tiny Stable Diffusion 3, on five rewards: minutes on two CPU cores"

# Settings of `MarbleConfig`. The whole run evaluates before and after, 48 images for each of 48 held-out prompts.
DEMO_SETTINGS: dict[str, Any] = {
    "learning_rate": 1.2e-3,
    "lr_scheduler_type": "linear",  # down to 0: the last steps average the noise of the first
    "num_generations": 16,  # images of each of 16 prompts a step
    "per_device_train_batch_size": 256,
    "gradient_accumulation_steps": 1,
    "rollout_batch_size": 128,
    "num_inference_steps": 8,
    "timestep_fraction": 0.75,  # each image is trained on at 6 of the 8 timesteps
    "beta": 0.0,
    "eval_strategy": "steps",
    "eval_on_start": True,
    "per_device_eval_batch_size": 128,
    "num_generations_eval": 48,
    "num_images_to_log": 8,
}
DEMO_STEPS = 24


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
    from ..evaluation import before_after_grid, rewards_table, summarize_balance
    from ..shapeworld import load_pipeline, load_prompts, reward_funcs

    trainer = MarbleNFTTrainer(
        load_pipeline(),
        reward_funcs=[*reward_funcs()],
        args=MarbleConfig(
            output_dir,
            overwrite_output_dir=True,
            seed=seed,
            max_steps=max_steps,
            eval_steps=max_steps,
            **DEMO_SETTINGS,
        ),
        train_dataset=load_prompts("train"),
        eval_dataset=load_prompts("test"),
        callbacks=[LiveTableCallback(), *watching(reward_hacking)],
    )
    seconds = trainer.train().metrics["train_runtime"]
    before, after = trainer.evaluations[0], trainer.evaluations[-1]
    old, new = ([row[:4] for row in evaluation.gallery.values()] for evaluation in (before, after))
    before_after_grid(list(before.gallery), old, new, Path(output_dir, "before_after.png"))
    trainer.save_model()  # and README.md, with balance.png
    errors = {name: error for name, (_, error) in after.change_since(before).items()}
    first, last = before.summary(), after.summary()
    Console().print(rewards_table(first, last, errors))
    print_times(trainer.state.log_history)
    rewards = {
        name: {"before": first[name][0], "after": last[name][0], "standard_error": error}
        for name, error in errors.items()
    }
    report = {"rewards": rewards, "balance": vars(summarize_balance(trainer.state.log_history)), "seconds": seconds}
    Path(output_dir, "report.json").write_text(json.dumps(report, indent=2))
    print(f"The adapter, its card (README.md) and the pictures are in {Path(output_dir).absolute()}")
