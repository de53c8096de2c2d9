# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The rule by which a variant replaces the recipe. Pure functions of numbers."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from trl_marble.evaluation import interpolate_at_kl


# Two KLs, or two CPU times, that differ by less than this share count as equal.
EQUAL = 0.1


class End(NamedTuple):
    """
    Where a run has ended.

    Args:
        kl (`float`):
            KL to the base.
        worst (`float`):
            Worst gain, in standard deviations of the base's images.
        error (`float`):
            Its standard error over prompts.
        mean (`float`):
            Mean gain.
        cpu_seconds (`float`, *optional*):
            CPU time of its optimizer steps; `None` if it was not measured.
    """

    kl: float
    worst: float
    error: float
    mean: float
    cpu_seconds: float | None = None


def second_strength(strength: str, kl: float, wanted: float) -> str | None:
    """
    The strength of the KL with which a run is repeated, because it has not ended near the KL that is wanted: drift is
    about inverse to the strength.

    Args:
        strength (`str`):
            The strength that the run had.
        kl (`float`):
            The KL at its end.
        wanted (`float`):
            The KL at which it is to be compared.

    Returns:
        `str`, or `None` if the two KLs count as equal.
    """
    if abs(kl / wanted - 1) <= EQUAL:
        return None
    return np.format_float_positional(float(strength) * kl / wanted, precision=2, fractional=False, trim="-")


def at_equal_kl(ends: Sequence[End], kl: float) -> End:
    """
    The end of a variant at a KL: between its two strengths linear in KL, and of the nearer one where the KL does not
    lie between them.
    """
    ordered = sorted(ends)
    kls = [end.kl for end in ordered]
    worst = interpolate_at_kl(kls, [end.worst for end in ordered], kl)
    mean = interpolate_at_kl(kls, [end.mean for end in ordered], kl)
    nearest = min(ordered, key=lambda end: abs(end.kl - kl))
    return nearest if worst is None or mean is None else nearest._replace(kl=kl, worst=worst, mean=mean)


def choose(recipe: End, variants: Mapping[str, End]) -> str | None:
    """
    The variant that replaces the recipe.

    Args:
        recipe ([`End`]):
            Of the recipe.
        variants (`Mapping[str, End]`):
            Of each variant at the recipe's KL, the simplest first.

    Returns:
        `str`: the first of the variants that are as good as the best one; or `None` if none is better than the recipe.
        Two are equally good if their worst gains differ by no more than the standard error over prompts.
    """
    allowed = {
        name: end
        for name, end in variants.items()
        if recipe.cpu_seconds is None or end.cpu_seconds is None or end.cpu_seconds <= (1 + EQUAL) * recipe.cpu_seconds
    }
    better = {name: end for name, end in allowed.items() if end.worst - recipe.worst > max(recipe.error, end.error)}
    if not better:
        return None
    best = max(better.values(), key=lambda end: end.worst)
    return next(name for name, end in better.items() if best.worst - end.worst <= best.error)
