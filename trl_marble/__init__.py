# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Reinforcement learning of flow-matching pipelines against several rewards at once."""

from typing import TYPE_CHECKING, Any

from .version import __version__


if TYPE_CHECKING:
    from .trainer import LiveTableCallback, MarbleConfig, MarbleNFTTrainer, RewardHackingCallback


__all__ = ["LiveTableCallback", "MarbleConfig", "MarbleNFTTrainer", "RewardHackingCallback", "__version__"]


def __getattr__(name: str) -> Any:
    # At first use: the trainer takes seconds to import, which `trl-marble --help` shall not wait for.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import trainer

    return getattr(trainer, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
