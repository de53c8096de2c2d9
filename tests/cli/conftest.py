# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A folder as a user of the command line has it: a tiny pipeline, prompts, rewards and a configuration."""

import sys
from pathlib import Path

import pytest
import tiny
import yaml


REWARDS = '''
import os
import signal
from pathlib import Path

import numpy as np


def bright(images, **kwargs):
    return [float(np.asarray(image).mean()) / 255 for image in images]


def blue(images, **kwargs):
    return [float(np.asarray(image)[..., 2].mean()) / 255 for image in images]


def interrupted(images, trainer_state, **kwargs):
    """As if Ctrl-C were pressed in the second step of the first run."""
    if trainer_state.global_step == 1 and not Path("interrupted").exists():
        Path("interrupted").touch()
        os.kill(os.getpid(), signal.SIGINT)
    return blue(images)


def terminated(images, trainer_state, **kwargs):
    """As if SIGTERM came in the second step of the first run."""
    if trainer_state.global_step == 1 and not Path("terminated").exists():
        Path("terminated").touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return blue(images)


def broken(images, **kwargs):
    raise ValueError("no scores today")
'''
SETTINGS = {
    "model": "base",
    "prompts": "prompts.txt",
    "rewards": ["my_rewards.bright", "my_rewards.blue"],
    "output_dir": "run",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_generations": 2,
    "num_inference_steps": 2,
    "max_sequence_length": 16,
    "max_steps": 1,
    "learning_rate": "1e-4",  # what YAML makes of 1e-4
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "lora_r": 4,
    "lora_alpha": 8,
}


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "base"
    tiny.tiny_sd3(num_layers=1).save_pretrained(folder)
    return folder


@pytest.fixture
def workplace(tmp_path, tiny_pipeline_folder, monkeypatch) -> Path:
    """The current folder during the test: `base`, `prompts.txt`, `my_rewards.py` and `run.yaml`."""
    (tmp_path / "base").symlink_to(tiny_pipeline_folder)
    (tmp_path / "prompts.txt").write_text("a red dog\na cat\nred hat\ntree\nbig red\nsky\n")
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    yield tmp_path
    sys.modules.pop("my_rewards", None)
