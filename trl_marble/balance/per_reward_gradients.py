# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Gradients of several losses with one forward pass.

Every per-reward loss is a combination of the same few per-sample losses, and so are losses that are not balanced, such
as a penalty. Each combination is a *row* of coefficients, and each row has a gradient. [`SeparateBackward`] needs one
backward pass per row. [`WeightedBackward`] needs one backward pass per per-sample loss, for any number of rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as linear_product

from .flat_gradients import flatten_gradients


MOST_PARTS = 4  # that the gradients of a layer's samples are computed in


class Objective(NamedTuple):
    """
    One loss per sample and its coefficients in each row: row `r` is `sum_i coefficients[r, i] * losses[i]`.

    Args:
        losses (`torch.Tensor` of shape `(B,)`):
            One loss per sample, attached to the graph. Each must depend on its own sample only.
        coefficients (`torch.Tensor` of shape `(R, B)`):
            Its coefficients.
    """

    losses: Tensor
    coefficients: Tensor


class GradientRows(ABC):
    """
    Accumulates the gradients of `R` rows over the micro-batches of an optimizer step.

    ```python
    for micro_batch in step:
        with rows.recording(batch_size=8):
            losses = forward(micro_batch)
            rows.backward([Objective(losses, coefficients)])
    rows.gradients
    ```

    Args:
        num_rows (`int`):
            `R`, at least 1.
        parameters (sequence of `torch.Tensor`):
            Trainable parameters, with `P` numbers in total.

    Attributes:
        gradients (`torch.Tensor` of shape `(R, P)`):
            The accumulated gradients, float32 (float64 if the parameters are), in the order of `parameters`.

    Raises:
        `ValueError`: if `num_rows` is below 1 or there is no parameter.
    """

    def __init__(self, num_rows: int, parameters: Sequence[Tensor]):
        if num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, got {num_rows}.")
        self.parameters = list(parameters)
        self.gradients = flatten_gradients([None] * len(self.parameters), self.parameters).repeat(num_rows, 1)

    @contextmanager
    def recording(self, batch_size: int) -> Iterator[None]:
        """
        A context for the forward pass and all calls of [`~GradientRows.backward`] for it.

        Args:
            batch_size (`int`):
                `B`, the number of samples in the micro-batch.

        Raises:
            `RuntimeError`: inside another such context ([`WeightedBackward`] only).
        """
        yield

    @abstractmethod
    def backward(self, objectives: Sequence[Objective], retain_graph: bool = False) -> None:
        """
        Add the gradient of every row, summed over the objectives. `.grad` is neither read nor changed.

        Args:
            objectives (sequence of [`Objective`]):
                At least one.
            retain_graph (`bool`, *optional*, defaults to `False`):
                Keep the graph for another backward pass over the same forward pass.

        Raises:
            `ValueError`: if the shapes of coefficients and losses do not agree.
            `RuntimeError`: outside [`~GradientRows.recording`] ([`WeightedBackward`] only).
        """

    def _check(self, objectives: Sequence[Objective]) -> None:
        for losses, coefficients in objectives:
            expected = (len(self.gradients), *losses.shape)
            if losses.ndim != 1 or coefficients.shape != expected:
                raise ValueError(
                    f"coefficients must be of shape (rows, samples), here ({len(self.gradients)}, {len(losses)}), "
                    f"got {tuple(coefficients.shape)}."
                )


class SeparateBackward(GradientRows):
    """
    One backward pass per row, as in [MARBLE](https://huggingface.co/papers/2605.06507), for any parameters. A row
    whose coefficients in a micro-batch are all 0 needs none.

    It uses `torch.autograd.grad`, which does not work with reentrant gradient checkpointing, but with the
    non-reentrant one. See [`GradientRows`] for the arguments.
    """

    def backward(self, objectives: Sequence[Objective], retain_graph: bool = False) -> None:
        self._check(objectives)
        contributes = torch.stack([(o.coefficients != 0).any(dim=1) for o in objectives]).any(dim=0)
        pending = contributes.nonzero().flatten().tolist()
        for row in pending:
            loss = torch.stack([(o.coefficients[row] * o.losses).sum() for o in objectives]).sum()
            keep = retain_graph or row != pending[-1]
            grads = torch.autograd.grad(loss, self.parameters, retain_graph=keep, allow_unused=True)
            self.gradients[row] += flatten_gradients(grads, self.parameters)


class WeightedBackward(GradientRows):
    """
    One backward pass per objective, for any number of rows, for weights of linear layers.

    The gradient of row `r` is `sum_i coefficients[r, i] * (gradient of losses[i])`. A single backward pass has
    everything that a linear layer needs for the gradients of *all* samples: its input `x` and the gradient `d` of its
    output. So inside [`~GradientRows.recording`] the layers multiply with an autograd function whose backward pass
    computes `d_i^T x_i` for each sample and mixes the samples by one product with the coefficients. (A few losses are
    enough for all rewards because [DiffusionNFT](https://huggingface.co/papers/2509.16117)'s loss is affine in its
    coefficients.)

    Autograd returns the mixed gradients as any others: every weight has a *phantom*, a tensor of shape
    `(R, *weight.shape)` without memory that the product formally depends on. So gradient checkpointing, accumulation
    over timesteps and micro-batches, dropout and `torch.compile` work unchanged.

    Args:
        num_rows (`int`):
            `R`, at least 1.
        linears (sequence of `nn.Linear`):
            Layers of exactly the type `nn.Linear`, without trainable bias. In the forward pass the first dimension of
            their inputs must be that of the samples, in order.

    Raises:
        `TypeError`: if a layer is not an `nn.Linear`.
        `ValueError`: if a layer has a trainable bias or is listed twice. In the forward pass: if the first dimension
            of a layer's input is not the batch size.
    """

    def __init__(self, num_rows: int, linears: Sequence[nn.Linear]):
        for module in linears:
            if type(module) is not nn.Linear:
                raise TypeError(f"{type(module).__name__} is not an nn.Linear: use SeparateBackward.")
            if module.bias is not None and module.bias.requires_grad:
                raise ValueError(
                    "A linear layer has a trainable bias, which has no row gradient: use SeparateBackward."
                )
        if len(set(linears)) != len(linears):
            raise ValueError("A linear layer is listed twice: pass each layer once.")
        super().__init__(num_rows, [module.weight for module in linears])
        self._linears = list(linears)
        self._coefficients: Tensor | None = None
        self._phantoms = []
        sizes = [weight.numel() for weight in self.parameters]
        for weight, block in zip(self.parameters, self.gradients.split(sizes, dim=1), strict=True):
            phantom = self.gradients.new_zeros(()).expand(num_rows, *weight.shape).requires_grad_()
            phantom.register_post_accumulate_grad_hook(partial(_move_gradient, block.view(phantom.shape)))
            self._phantoms.append(phantom)

    @contextmanager
    def recording(self, batch_size: int) -> Iterator[None]:
        if self._coefficients is not None:
            raise RuntimeError("recording() was entered twice; leave the first context before the second.")
        self._coefficients = self.gradients.new_zeros(len(self.gradients), batch_size)
        try:
            for module, phantom in zip(self._linears, self._phantoms, strict=True):
                # Not by the modules' own way of setting attributes, which takes milliseconds for hundreds of layers.
                vars(module).update(phantom=phantom, coefficients=self._coefficients)
                object.__setattr__(module, "__class__", _RowLinear)
            yield
        finally:
            for module in self._linears:
                object.__setattr__(module, "__class__", nn.Linear)
                vars(module).pop("phantom", None)
                vars(module).pop("coefficients", None)
            self._coefficients = None

    def backward(self, objectives: Sequence[Objective], retain_graph: bool = False) -> None:
        self._check(objectives)
        if self._coefficients is None:
            raise RuntimeError("backward() was called outside recording(); the forward pass belongs inside it too.")
        if len(objectives[0].losses) != self._coefficients.shape[1]:
            raise ValueError(
                f"There are {len(objectives[0].losses)} losses, but recording() was entered for "
                f"{self._coefficients.shape[1]} samples."
            )
        for i, (losses, coefficients) in enumerate(objectives):
            # Each pass reads its coefficients from the tensor that the layers have saved. `.data` hides the change
            # from autograd, which would refuse a changed tensor.
            self._coefficients.data.copy_(coefficients)
            losses.sum().backward(retain_graph=retain_graph or i + 1 < len(objectives))


def _move_gradient(destination: Tensor, phantom: Tensor) -> None:
    """Add a phantom's gradient to its place as soon as it is computed, and free its memory."""
    assert phantom.grad is not None
    destination += phantom.grad
    phantom.grad = None


class _RowLinear(nn.Linear):
    """The class of an `nn.Linear` while the gradients of its rows are recorded."""

    phantom: Tensor
    coefficients: Tensor

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[0] != self.coefficients.shape[1]:
            raise ValueError(
                f"A linear layer ({self.in_features} -> {self.out_features}) got an input of shape "
                f"{tuple(input.shape)} for {self.coefficients.shape[1]} samples: its first dimension must be that of "
                "the samples. Leave the layer out of the adapter (`target_modules`), or use SeparateBackward."
            )
        weight = self.weight
        device = input.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            input, weight = input.to(dtype), weight.to(dtype)
        output = _RowProduct.apply(input, weight, self.phantom, self.coefficients)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class _RowProduct(torch.autograd.Function):
    """`input @ weight.T`, with a gradient for the phantom instead of the weight."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, phantom: Tensor, coefficients: Tensor) -> Tensor:
        input = input.contiguous()  # as the product does; with a view all of its tensor would be kept
        ctx.save_for_backward(input, weight, coefficients)
        return linear_product(input, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, coefficients = ctx.saved_tensors
        (grad,) = grads
        batch = len(input)
        outward, inward = grad.reshape(batch, -1, grad.shape[-1]), input.reshape(batch, -1, input.shape[-1])
        # The gradients of the samples, (B, out, in), part by part: with few tokens they are larger than what the
        # layer reads and writes, at the moment when most of the activations exist.
        number = min(MOST_PARTS, -(-min(weight.shape) // max(1, inward.shape[1])))
        rows = [
            coefficients @ torch.bmm(part.mT, inward).flatten(1).to(coefficients.dtype)
            for part in outward.chunk(number, dim=2)
        ]
        grad_input = grad @ weight if ctx.needs_input_grad[0] else None
        return grad_input, None, torch.cat(rows, dim=1).view(-1, *weight.shape), None
