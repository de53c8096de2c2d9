# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Find out which keywords a callable accepts."""

import inspect
from collections.abc import Callable
from typing import Any


def call_signature(func: Callable[..., Any], follow_wrapped: bool = False) -> inspect.Signature | None:
    """
    The signature of a callable; `None` if it cannot be inspected.

    Args:
        func (`Callable`):
            The callable.
        follow_wrapped (`bool`, *optional*, defaults to `False`):
            Whether to inspect the function in a decorator instead of the one that is called, which may accept other
            keywords.
    """
    try:
        return inspect.signature(func, follow_wrapped=follow_wrapped)
    except (TypeError, ValueError):  # some callables written in C have no signature
        return None


def accepts(signature: inspect.Signature, keyword: str) -> bool:
    """Whether a callable with this signature accepts a keyword."""
    parameter = signature.parameters.get(keyword)
    if parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
        return True
    return any(other.kind is other.VAR_KEYWORD for other in signature.parameters.values())


def accepts_log_function(func: Callable[..., Any], keyword: str) -> bool:
    """
    Whether a reward can be called with `log_metric` or `log_extra`.

    It can if it has a parameter of that name, or if it and the function in its decorators accept any keyword. If its
    signature cannot be inspected, it is called without them.
    """
    outer, inner = call_signature(func), call_signature(func, follow_wrapped=True)
    if outer is None or inner is None:
        return False
    return keyword in outer.parameters or (accepts(outer, keyword) and accepts(inner, keyword))
