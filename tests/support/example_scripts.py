# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The example scripts as modules, and their command lines."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from trl import ModelConfig, TrlParser

from trl_marble import MarbleConfig


EXAMPLES = Path(__file__).parents[2] / "examples"


def load_script(name: str) -> ModuleType:
    """The module of `examples/scripts/<name>.py`, imported anew."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", EXAMPLES / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(script: ModuleType, *arguments: str) -> tuple[Any, ...]:
    """What the script makes of a command line: its own arguments, the `MarbleConfig`, and TRL's options of models."""
    kinds = [script.ScriptArguments, MarbleConfig, *([ModelConfig] if hasattr(script, "ModelConfig") else [])]
    return TrlParser(kinds).parse_args_and_config(list(arguments))


def as_options(values: dict[str, Any]) -> list[str]:
    """A command line of `--name value` for each."""
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def command_in_docstring(script: ModuleType, output_dir: Path) -> list[str]:
    """The arguments of the first command of the script's docstring, with another output folder."""
    name = Path(script.__file__).name
    command = script.__doc__.split(name, 1)[1].split("```")[0].replace("\\", "").split()
    command[command.index("--output_dir") + 1] = str(output_dir)
    return command
