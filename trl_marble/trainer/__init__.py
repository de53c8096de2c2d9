# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The trainer, its settings and its callbacks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..callbacks import LiveTableCallback, RewardHackingCallback
    from .marble_config import MarbleConfig
    from .marble_nft_trainer import MarbleNFTTrainer

__all__ = ["LiveTableCallback", "MarbleConfig", "MarbleNFTTrainer", "RewardHackingCallback"]

_MODULES = {
    "LiveTableCallback": "..callbacks",
    "MarbleConfig": ".marble_config",
    "MarbleNFTTrainer": ".marble_nft_trainer",
    "RewardHackingCallback": "..callbacks",
}


def __getattr__(name: str) -> Any:
    # At first use: `trl-marble train --help` needs the settings, and not diffusers and all that the trainer imports.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
