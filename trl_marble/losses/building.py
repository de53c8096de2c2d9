# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""From a configuration to the loss it names."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .policy_loss import PolicyLoss


def settings_of(kind: type[PolicyLoss]) -> list[str]:
    """The settings that a loss uses: the names of its fields."""
    return [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]


def build_loss(kind: type[PolicyLoss], settings: Mapping[str, Any]) -> PolicyLoss:
    """
    A loss with its settings.

    Args:
        kind (`type[PolicyLoss]`):
            The class of the loss, a dataclass.
        settings (`Mapping[str, Any]`):
            Settings by name; those that the loss does not use are left alone.
    """
    return kind(**{name: settings[name] for name in settings_of(kind)})
