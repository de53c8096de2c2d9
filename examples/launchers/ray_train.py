# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# requires-python = ">=3.11"
# dependencies = ["trl_marble", "ray[train]>=2.40"]
#
# [tool.uv.sources]
# trl_marble = { path = "../.." }  # `uv run` from a clone: the package is not on PyPI yet
# ///
"""
`trl-marble train` in the workers of Ray Train, for example on 8 GPUs of a Ray cluster:

```bash
python examples/launchers/ray_train.py --num_workers 8 --use_gpu --config train.yaml
```

All other options are those of `trl-marble train`, without those of `accelerate launch`. Start it in a folder that all
nodes share, and set an `output_dir` that they share too. If a worker fails or a node is lost, Ray starts all workers
again, and they continue from the latest valid checkpoint, so choose `save_steps` by how many steps you can afford to
lose.
"""

import os
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(settings: dict[str, Any]) -> None:
    """
    Run the command in a worker. Ray has set the environment that says which one it is.

    Args:
        settings (`dict[str, Any]`):
            `"folder"`, where to run it, and `"words"`, its options.
    """
    from trl_marble.cli.main import main

    os.chdir(settings["folder"])
    status = main(["train", *settings["words"]])
    if status != 0:
        raise RuntimeError(f"`trl-marble train` ended with status {status}; its last messages say why.")


def parse(words: list[str] | None = None) -> tuple[Any, list[str]]:
    """The options of this script, and those of the command."""
    parser = ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--num_workers", type=int, default=1, help="processes, one per GPU; default: %(default)s")
    parser.add_argument("--use_gpu", action="store_true", help="whether each of them has a GPU")
    parser.add_argument("--max_failures", type=int, default=3, help="restarts of all workers; default: %(default)s")
    return parser.parse_known_args(words)


if __name__ == "__main__":
    own, others = parse()
    TorchTrainer(
        train,
        train_loop_config={"folder": os.getcwd(), "words": [*others, "--resume_from_checkpoint", "auto"]},
        scaling_config=ScalingConfig(num_workers=own.num_workers, use_gpu=own.use_gpu),
        run_config=RunConfig(
            storage_path=str(Path("ray_results").absolute()),
            failure_config=FailureConfig(max_failures=own.max_failures),
        ),
    ).fit()
