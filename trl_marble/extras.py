# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Features that need an optional dependency say so before any work is done."""

from importlib.util import find_spec


# The modules that a feature needs of each extra.
EXTRAS = {
    "clip": ("ftfy",),
    "completion": ("shtab",),
    "ocr": ("rapidocr", "onnxruntime"),
    "plots": ("matplotlib",),
    "quantization": ("bitsandbytes",),
    "server": ("fastapi", "uvicorn"),
    "tensorboard": ("tensorboard",),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}


class MissingExtraError(ImportError):
    """A feature needs an extra that is not installed."""


def has_extra(extra: str) -> bool:
    """
    Whether all modules that are needed of an extra are installed.

    Args:
        extra (`str`):
            Name of the extra, a key of `EXTRAS`.
    """
    return not _missing(extra)


def require_extra(extra: str, feature: str, otherwise: str = "") -> None:
    """
    Check that an extra is installed.

    Args:
        extra (`str`):
            Name of the extra, a key of `EXTRAS`.
        feature (`str`):
            What needs it, for the message: the start of a sentence, such as `"The reward server"`.
        otherwise (`str`, *optional*):
            What to do without it, for the message: the rest of a sentence, such as `"train on a CPU"`.

    Raises:
        [`MissingExtraError`]: If a module of the extra is not installed. The message says how to install it.
    """
    missing = _missing(extra)
    if missing:
        raise MissingExtraError(
            f"{feature} needs {' and '.join(missing)}, which the extra `{extra}` installs: run "
            f'`pip install ".[{extra}]"` in your clone of trl_marble, or `pip install {" ".join(missing)}`'
            + (f"; or {otherwise}." if otherwise else ".")
        )


def _missing(extra: str) -> list[str]:
    return [module for module in EXTRAS[extra] if find_spec(module) is None]
