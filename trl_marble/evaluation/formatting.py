# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Write numbers with errors, percentages and p-values as text."""

import math


NOT_MEASURED = "not measured"


def format_value(value: float | None, sign: bool = False) -> str:
    """
    A reward, or its change, as text: with four significant digits if its size is at least 0.1.

    Args:
        value (`float`, *optional*): `None` and NaN are written as "not measured".
        sign (`bool`, *optional*, defaults to `False`): write a plus before a value that is not negative.
    """
    if value is None or math.isnan(value):
        return NOT_MEASURED
    digits = 4 if abs(value) < 1 else 3 if abs(value) < 10 else 2
    return f"{value:{'+' if sign else ''}.{digits}f}"


def format_with_error(value: tuple[float, float], sign: bool = False) -> str:
    """
    A mean and its standard error as text.

    Args:
        value (`tuple[float, float]`): mean and standard error. If the mean is NaN, the text is "not measured"; if the
            error is, the text is the mean alone.
        sign (`bool`, *optional*, defaults to `False`): write a plus before a mean that is not negative.
    """
    mean, error = value
    if math.isnan(mean):
        return NOT_MEASURED
    return format_value(mean, sign) + ("" if math.isnan(error) else f" ± {format_value(error)}")


def format_kl(value: tuple[float, float]) -> str:
    """A KL and its standard error with three and two significant digits, as small as they may be."""
    kl, error = value
    if math.isnan(kl):
        return NOT_MEASURED
    return f"{kl:.3g}" + ("" if math.isnan(error) else f" ± {error:.2g}")


def format_gain(value: tuple[float, float]) -> str:
    """A gain in standard deviations, with its standard error."""
    gain, error = value
    if math.isnan(gain):
        return NOT_MEASURED
    return f"{gain:+.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")


def format_share(value: tuple[float, float]) -> str:
    """A share of the prompts in percent, with its standard error."""
    share, error = value
    if math.isnan(share):
        return NOT_MEASURED
    return f"{share:.0%}" + ("" if math.isnan(error) else f" ± {error:.0%}")


def format_percentage(share: float) -> str:
    """A share in [0, 1] as a percentage; "-" for NaN."""
    return "-" if math.isnan(share) else f"{share:.1%}"


def format_p_value(p_value: float) -> str:
    """A p-value with three digits; "-" for NaN."""
    if math.isnan(p_value):
        return "-"
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
