# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`trl-marble env`: what a bug report needs to say about the machine."""

import os
import platform
import subprocess
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..extras import EXTRAS


HELP = "print versions and hardware for a bug report"
REQUIRED = (
    *("diffusers", "transformers", "peft", "accelerate", "datasets", "huggingface_hub", "safetensors", "trl"),
    *("evaluate", "quadprog", "numpy"),
)
OPTIONAL = ("torchvision", "torchjd", "qpsolvers", "deepspeed", *(name for names in EXTRAS.values() for name in names))


def register(subparsers: Any, whole: bool = False) -> None:
    command = subparsers.add_parser(
        "env",
        help=HELP,
        description="Print versions and hardware as a Markdown list to paste into an issue: no tokens, no paths.",
        allow_abbrev=False,
    )
    command.set_defaults(run=run)


def run(args: Namespace) -> int:
    print("\n".join(f"- {name}: {value}" for name, value in environment().items()))
    return 0


def environment() -> dict[str, str]:
    """
    What there is.

    Returns:
        `dict[str, str]`: Names and versions or descriptions. Nothing in it is secret or tells of the home folder.
    """
    import torch

    from .. import __version__

    commit = _commit()
    return {
        "trl_marble": __version__ if commit is None else f"{__version__} (commit {commit})",
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "CPUs": str(os.cpu_count()),
        "torch": torch.__version__,
        "accelerator": _accelerator(),
        **{name: _version(name) for name in REQUIRED},
        **{f"{name} (optional)": _version(name) for name in OPTIONAL},
        "accelerate default config": _accelerate_config(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    """The commit of the checkout that the package runs from, with a mark if files were changed since."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
        return subprocess.run(words, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _accelerator() -> str:
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return "none"
    if device.type != "cuda":
        return f"{torch.accelerator.device_count()} x {device.type}"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{', '.join(names)} ({kind})"


def _accelerate_config() -> str:
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if not os.path.isfile(default_config_file):
        return "none"
    config = load_config_from_file(default_config_file).to_dict()
    # Only what says how processes are started: other entries may hold addresses and paths.
    shown = ("compute_environment", "distributed_type", "mixed_precision", "num_processes", "num_machines", "use_cpu")
    return ", ".join(f"{name}={config[name]}" for name in shown if name in config)
