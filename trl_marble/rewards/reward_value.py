# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Convert one value that a reward returned, of any number type."""

import math
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor


def to_number(value: Any) -> float:
    """
    Convert the value that a reward returned for one image.

    Args:
        value (`Any`):
            A number of Python (also `bool`, `Fraction`, `Decimal`), NumPy or torch, also as an array or tensor of one
            element, or `None`.

    Returns:
        `float`: NaN for `None` and for a masked element of a masked array; infinite for a number that is too large for
        a float.

    Raises:
        `TypeError`: If it is not a number. Texts and complex numbers are refused whatever their value.
    """
    if isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "biufO":
        value = value.reshape(1).tolist()[0]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if value is None:
        return math.nan
    # NumPy's time spans are `Real`, its bool is not, and neither is `Decimal`.
    if not isinstance(value, Real | Decimal | np.bool_) or isinstance(value, np.timedelta64):
        raise TypeError(f"{type(value).__name__} is not a number")
    number: Any = value
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf
    except ValueError as error:  # a signalling NaN of `Decimal`
        raise TypeError(f"{value!r} is not a number") from error
