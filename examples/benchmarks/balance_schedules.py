# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# dependencies = ["trl_marble", "rich"]
# ///
"""Compare schedules of balancing: 24 steps with each of them, from the same pipeline, prompts and seeds.

```bash
python examples/benchmarks/balance_schedules.py --seeds 1 2
```

Each run takes about ten minutes on one core. Finished runs are kept in the output folder and not repeated.
"""

import argparse
import json
from pathlib import Path

from evidence.methods import SHARED_SETTINGS
from rich.console import Console
from rich.table import Table

from trl_marble import MarbleConfig, MarbleNFTTrainer
from trl_marble.evaluation import summarize_balance
from trl_marble.evaluation.records import write_atomically
from trl_marble.shapeworld import load_pipeline, load_prompts, reward_funcs


STEPS = 24
SCHEDULES: dict[str, dict[str, object]] = {
    "every step": {},
    "every step, complete losses": {"balance_on": "loss"},
    "streaming": {"balance_fraction": 0.17},  # one of the six forward passes of a step
    "every 10 steps": {"balance_every": 10},
    "every 10 steps, complete losses": {"balance_every": 10, "balance_on": "loss"},
}


def train(folder: Path, seed: int, overrides: dict[str, object]) -> dict[str, object]:
    """Train with the settings of the compared methods, changed by `overrides`, and report how each reward changed."""
    settings = SHARED_SETTINGS | {
        "learning_rate": 1.2e-3,
        "max_steps": STEPS,
        "eval_strategy": "steps",
        "eval_steps": STEPS,
        "eval_on_start": True,
        "num_generations_eval": 48,
        "per_device_eval_batch_size": 128,
        "save_strategy": "no",
        "report_to": "none",
        "log_images": False,
    }
    trainer = MarbleNFTTrainer(
        load_pipeline(),
        reward_funcs=reward_funcs(),
        args=MarbleConfig(str(folder), seed=seed, **(settings | overrides)),
        train_dataset=load_prompts("train"),
        eval_dataset=load_prompts("test"),
    )
    trainer.train()
    change = trainer.evaluations[-1].change_since(trainer.evaluations[0])
    return {
        "rise": {name: rise for name, (rise, _) in change.items()},
        "standard_error": {name: error for name, (_, error) in change.items()},
        "cos_min": summarize_balance(trainer.state.log_history).cos_min,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/balance_schedules"))
    args = parser.parse_args()

    names = [reward.__name__ for reward in reward_funcs()]
    table = Table(title="Rise of each reward on held-out prompts")
    for column in ("schedule", "seed", *names, "mean", "lowest cosine"):
        table.add_column(column)
    for schedule in args.schedules:
        for seed in args.seeds:
            folder = args.output_dir / f"{schedule.replace(', ', '_').replace(' ', '_')}-{seed}"
            report = folder / "report.json"
            if not report.exists():
                result = train(folder, seed, SCHEDULES[schedule])
                write_atomically(report, json.dumps(result, indent=2).encode())
            result = json.loads(report.read_text())
            rises = [result["rise"][name] for name in names]
            cells = [f"{value:+.3f}" for value in (*rises, sum(rises) / len(rises), result["cos_min"])]
            table.add_row(schedule, str(seed), *cells)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
