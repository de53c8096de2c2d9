# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How figures with errors, shares and p-values are written."""

import math

from .summary import NOT_MEASURED, format_value


def format_with_error(value: tuple[float, float], sign: bool = False) -> str:
    """
    A mean and its standard error.

    Args:
        value (`tuple[float, float]`): mean and standard error; without the one it is "not measured", without the other
            the mean stands alone.
        sign (`bool`, *optional*, defaults to `False`): write a plus before a mean that is not negative.
    """
    mean, error = value
    if math.isnan(mean):
        return NOT_MEASURED
    return format_value(mean, sign) + ("" if math.isnan(error) else f" ± {format_value(error)}")


def format_percentage(share: float) -> str:
    """A share in [0, 1] as a percentage; "-" for NaN."""
    return "-" if math.isnan(share) else f"{share:.1%}"


def format_p_value(p_value: float) -> str:
    """A p-value with as many digits as it deserves; "-" for NaN."""
    if math.isnan(p_value):
        return "-"
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
