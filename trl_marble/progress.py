# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Progress bars for the parts of a step: where they are drawn is decided by who runs the step."""

from collections.abc import Callable
from typing import Any, Protocol

from tqdm.auto import tqdm


class ProgressBar(Protocol):
    """A bar, as a context manager."""

    def __enter__(self) -> Any: ...
    def __exit__(self, *exception: Any) -> Any: ...
    def update(self, number: int = 1) -> Any: ...


# From what is being done and how much there is to do to a bar.
MakeBar = Callable[[str, int], ProgressBar]


def tqdm_bar(what: str, total: int, disable: bool = False) -> ProgressBar:
    """
    A bar of tqdm that leaves nothing behind.

    Args:
        what (`str`):
            What is being done.
        total (`int`):
            How much there is to do.
        disable (`bool`, *optional*, defaults to `False`):
            Whether to show nothing.
    """
    return tqdm(total=total, desc=what, leave=False, dynamic_ncols=True, disable=disable)
