# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How figures with errors, shares and p-values are written."""

import math


NOT_MEASURED = "not measured"


def format_value(value: float | None, sign: bool = False) -> str:
    """
    A reward's value, or the change of one, with four significant digits where it is at least 0.1 in size.

    Args:
        value (`float`, *optional*): `None` and NaN are written as "not measured".
        sign (`bool`, *optional*, defaults to `False`): write a plus before what is not negative.
    """
    if value is None or math.isnan(value):
        return NOT_MEASURED
    digits = 4 if abs(value) < 1 else 3 if abs(value) < 10 else 2
    return f"{value:{'+' if sign else ''}.{digits}f}"


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
