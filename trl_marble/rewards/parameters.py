# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Which keywords a callable takes."""

import inspect
from collections.abc import Callable
from typing import Any


def call_signature(func: Callable[..., Any], follow_wrapped: bool = False) -> inspect.Signature | None:
    """
    The parameters of a callable, `None` where they cannot be inspected.

    Args:
        func (`Callable`):
            The callable.
        follow_wrapped (`bool`, *optional*, defaults to `False`):
            Whether those of the function in a decorator are meant, and not those of what is really called, which may
            take more or less.
    """
    try:
        return inspect.signature(func, follow_wrapped=follow_wrapped)
    except (TypeError, ValueError):  # some callables of C have none
        return None


def accepts(signature: inspect.Signature, keyword: str) -> bool:
    """Whether a callable with these parameters takes a keyword."""
    parameter = signature.parameters.get(keyword)
    if parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
        return True
    return any(other.kind is other.VAR_KEYWORD for other in signature.parameters.values())


def accepts_certainly(func: Callable[..., Any], keyword: str) -> bool:
    """Whether a callable takes a keyword by its name, or any keyword, and then also the function in its decorators."""
    outer, inner = call_signature(func), call_signature(func, follow_wrapped=True)
    if outer is None or inner is None:
        return False
    return keyword in outer.parameters or (accepts(outer, keyword) and accepts(inner, keyword))
