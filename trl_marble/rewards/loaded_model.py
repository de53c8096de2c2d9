# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A frozen model that is loaded when it is needed, on the trainer's device."""

import threading
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import nn


# One model is loaded at a time, although rewards run on several threads. While `transformers` loads, it replaces
# functions and settings of the process, such as the tying of weights and the default dtype. After two loads at once
# the replacements can stay, and every later model would have no tied weights.
LOADING = threading.Lock()


class LoadedModel(ABC):
    """
    A frozen model. It is loaded on first use, so that making the object costs nothing.

    Args:
        batch_size, dtype, offload:
            See [`ModelReward`].

    Raises:
        `ValueError`: If `batch_size` is not positive.
    """

    def __init__(self, batch_size: int = 16, dtype: torch.dtype | None = None, offload: bool = False) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.batch_size = batch_size
        self.offload = offload
        self.device = torch.device("cpu")
        self.dtype = dtype or torch.float32
        self._keeps_dtype = dtype is not None
        self._model: nn.Module | None = None

    @abstractmethod
    def load(self) -> nn.Module:
        """
        Load everything that scoring needs, also processors.

        Returns:
            `nn.Module`: the module with all weights. It becomes `self.model`, frozen, on `self.device`, in
            `self.dtype`.
        """

    @property
    def model(self) -> nn.Module:
        """The model, loaded on first use."""
        if self._model is None:
            with LOADING:
                self._model = self.load().requires_grad_(False).eval()
        return self._model

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """
        Set the device and the dtype for scoring.

        Args:
            device (`torch.device` or `str`):
                The device.
            dtype (`torch.dtype`, *optional*):
                The dtype of the weights, unless one was chosen when the reward was made.
        """
        self.device = torch.device(device)
        if dtype is not None and not self._keeps_dtype:
            self.dtype = dtype
        return self

    def release(self) -> None:
        """Move the weights to the CPU until the next images are scored, if `offload` is set."""
        if self.offload and self._model is not None:
            self._model.to("cpu")
