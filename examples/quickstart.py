# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Align a tiny pretrained Stable Diffusion 3 with five rewards at once: python examples/quickstart.py [--seed 42]"""

import json
from argparse import ArgumentParser
from pathlib import Path

from rich.console import Console

from trl_marble import MarbleConfig, MarbleNFTTrainer
from trl_marble.evaluation import before_after_grid, rewards_table, summarize_balance
from trl_marble.shapeworld import load_pipeline, load_prompts, reward_funcs


parser = ArgumentParser(description=__doc__)
parser.add_argument("--output_dir", default="runs/demo")
parser.add_argument("--seed", type=int, default=42)
parser.add_argument("--max_steps", type=int, default=24)
cli = parser.parse_args()

trainer = MarbleNFTTrainer(
    load_pipeline(),
    reward_funcs=reward_funcs(),
    args=MarbleConfig(
        **vars(cli),
        learning_rate=1.2e-3,
        lr_scheduler_type="linear",  # down to 0: the last steps average the noise of the first
        num_generations=16,  # images of each of 16 prompts a step
        per_device_train_batch_size=256,
        gradient_accumulation_steps=1,
        rollout_batch_size=128,
        num_inference_steps=8,
        timestep_fraction=0.75,  # each image is trained on at 6 of the 8 timesteps
        beta=0.0,
        eval_strategy="steps",
        eval_steps=cli.max_steps,
        eval_on_start=True,
        per_device_eval_batch_size=128,
        num_generations_eval=48,
        num_images_to_log=8,
    ),
    train_dataset=load_prompts("train"),
    eval_dataset=load_prompts("test"),
)
seconds = trainer.train().metrics["train_runtime"]
trainer.save_model()
before, after = trainer.evaluations[0], trainer.evaluations[-1]
images = [[row[:4] for row in evaluation.gallery.values()] for evaluation in (before, after)]
before_after_grid(list(before.gallery), *images, Path(cli.output_dir, "before_after.png"))
trainer.create_model_card()  # README.md, with balance.png

errors = {name: error for name, (_, error) in after.change_since(before).items()}
first, last = before.summary(), after.summary()
Console().print(rewards_table(first, last, errors))
rewards = {name: {"before": first[name][0], "after": last[name][0], "standard_error": errors[name]} for name in errors}
report = {"rewards": rewards, "balance": vars(summarize_balance(trainer.state.log_history)), "seconds": seconds}
Path(cli.output_dir, "report.json").write_text(json.dumps(report, indent=2))
