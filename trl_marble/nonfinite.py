# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Numbers that are NaN or infinite: what to say of them, and keeping them out of files."""

from collections.abc import Mapping

import torch
from torch import Tensor


CAUSES = (
    "Usual causes: a learning rate that is too high (if `grad_norm` and `drift/velocity_rms` rose before, lower "
    "`learning_rate` or set `max_grad_norm`), or a base model, VAE or text encoder that overflows in its dtype (load "
    "the pipeline in bfloat16 or float32, not in float16)."
)


def refuse_nonfinite(what: str, tensors: Mapping[str, Tensor]) -> None:
    """
    Make sure that tensors can be saved.

    Args:
        what (`str`):
            What they are, for the message.
        tensors (`Mapping[str, Tensor]`):
            The tensors by name.

    Raises:
        `FloatingPointError`: If one holds NaN or infinity.
    """
    # Read together: the program waits for the device once.
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist() if tensors else []
    for name, is_finite in zip(tensors, finite, strict=True):
        if not is_finite:
            raise FloatingPointError(
                f"`{name}` of the {what} has values that are not finite, so nothing is saved, and what was saved "
                f"before is left as it is. Resume from an earlier checkpoint. {CAUSES}"
            )
