# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Record what a pipeline does around its transformer in a velocity call, and do it again without the pipeline."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import EllipsisType, NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map


# What of a tensor is the same in every call with latents of one shape, dtype and device.
_FIXED: frozenset[Any] = frozenset(
    {
        Tensor.shape.__get__,  # type: ignore[attr-defined]
        Tensor.ndim.__get__,  # type: ignore[attr-defined]
        Tensor.dtype.__get__,  # type: ignore[attr-defined]
        Tensor.device.__get__,  # type: ignore[attr-defined]
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.__len__,
        Tensor.is_floating_point,
        torch.is_floating_point,
    }
)
# Arguments that are the same in every call, and cannot hide a tensor.
_PLAIN = (
    bool,
    int,
    float,
    str,
    NoneType,
    EllipsisType,
    torch.Size,
    torch.device,
    torch.dtype,
    torch.layout,
    torch.memory_format,
)


@dataclass(frozen=True)
class _Value:
    """Stands for a tensor that is computed in every call."""

    number: int


@dataclass(frozen=True)
class _Operation:
    function: Callable[..., Any]
    arguments: tuple[Any, Any]  # positional and by name, with a `_Value` in the place of tensors
    outputs: list[int]

    @property
    def inputs(self) -> set[int]:
        return {leaf.number for leaf in tree_leaves(self.arguments) if isinstance(leaf, _Value)}


@dataclass(frozen=True, eq=False)
class Circumstances:
    """
    What a recording is for: it is used again as long as they are equal.

    Args:
        objects (`list`):
            Objects that have to be the same ones.
        values (`tuple`):
            Values that have to be equal.
    """

    objects: list[Any]
    values: tuple[Any, ...]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Circumstances)
            and self.values == other.values
            and len(self.objects) == len(other.objects)
            and all(mine is its for mine, its in zip(self.objects, other.objects, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]


class Recording:
    """
    What has to be computed in a velocity call: the transformer, and what depends on `x_t` or `t` before and after it.
    Everything else is kept as it was when it was recorded.
    """

    def __init__(self, operations: list[_Operation], result: int, kept: list[tuple[Tensor, int]]) -> None:
        self._operations, self._result, self._kept = operations, result, kept

    def is_intact(self) -> bool:
        """Whether nothing has written into the tensors that are kept."""
        return all(tensor._version == version for tensor, version in self._kept)

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """
        The velocity, as the recorded call would have it.

        Args:
            x_t (`torch.Tensor` of shape `[batch, ...]`):
                Noisy latents, of the recorded shape, dtype and device.
            t (`torch.Tensor` of shape `[batch]` or `[]`):
                Times, of the recorded shape.
        """
        values = {0: x_t, 1: t}

        def fill(leaf: Any) -> Any:
            return values[leaf.number] if isinstance(leaf, _Value) else leaf

        for operation in self._operations:
            args, kwargs = tree_map(fill, operation.arguments)
            values.update(zip(operation.outputs, tree_leaves(operation.function(*args, **kwargs)), strict=True))
        return values[self._result]


class Recorder(TorchFunctionMode):
    """
    Records all functions of tensors that depend on `x_t` or `t`, and the call of the transformer as one of them.

    ```python
    recorder = Recorder(x_t, t)
    with recorder.recording(transformer, call_transformer):
        velocity = ...  # `recorder.stop()` ends it earlier
    recording = recorder.finish(velocity)
    ```

    Args:
        x_t (`torch.Tensor`):
            Noisy latents.
        t (`torch.Tensor`):
            Times.
    """

    def __init__(self, x_t: Tensor, t: Tensor) -> None:
        super().__init__()
        self.fault: str | None = None  # why the call cannot be repeated
        self._values = [x_t, t]  # kept alive, so that their ids are theirs alone
        self._numbers = {id(x_t): 0, id(t): 1}
        self._operations: list[_Operation] = []
        self._kept: dict[int, tuple[Tensor, int]] = {}
        self._is_active = False

    @contextmanager
    def recording(self, transformer: nn.Module, call_transformer: Callable[..., Any]) -> Iterator[None]:
        """
        Record what happens inside the context, once.

        Args:
            transformer (`torch.nn.Module`):
                What happens inside of its calls is not recorded.
            call_transformer (`Callable`):
                What to call in its place later on, with its arguments.
        """
        calls: list[Any] = []  # of the transformer: the modes under which it runs, and its arguments

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._pause()
            calls.append((_modes(x_t), args, kwargs))

        def end(module: nn.Module, inputs: Any, output: Any) -> None:
            _, args, kwargs = calls[-1]
            self._note(call_transformer, args, kwargs, output, None)
            self._resume()

        x_t = self._values[0]
        outside = _modes(x_t)
        # Before all other hooks, such as those of a sharded base: they are a part of the call.
        handles = [
            transformer.register_forward_pre_hook(begin, with_kwargs=True, prepend=True),
            transformer.register_forward_hook(end),
        ]
        self._resume()
        try:
            yield
        finally:
            self._pause()
            for handle in handles:
                handle.remove()
        if [modes for modes, *_ in calls] != [outside]:
            self._refuse("the transformer is not called once, or is called under a mode that the pipeline sets")

    def stop(self) -> None:
        """Record nothing more."""
        self._pause()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(id(leaf) in self._numbers for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        before = _versions((args, kwargs))
        output = func(*args, **kwargs)
        if func not in _FIXED:
            self._note(func, args, kwargs, output, before)
        return output

    def finish(self, velocity: Tensor) -> Recording | None:
        """
        The recording; `None` where the call cannot be repeated, for which `fault` has the reason.

        Args:
            velocity (`torch.Tensor`):
                The result of the call.
        """
        result = self._numbers.get(id(velocity), -1)
        needed, operations = {result}, []
        for operation in reversed(self._operations):
            if needed.intersection(operation.outputs):
                operations.append(operation)
                needed |= operation.inputs
        if not {0, 1, result} <= needed or result < 0:
            self._refuse("the velocity does not depend on x_t and t by functions of tensors alone")
        leaves = tree_leaves([operation.arguments for operation in operations])
        kept = [self._kept[id(leaf)] for leaf in leaves if id(leaf) in self._kept]
        recording = Recording(operations[::-1], result, kept)
        if not recording.is_intact():
            self._refuse("a tensor that stays the same is written into")
        return None if self.fault else recording

    def _note(self, function: Any, args: Any, kwargs: Any, output: Any, before: list[int] | None) -> None:
        """Add an operation."""
        outputs = tree_leaves(output)
        if not outputs or not all(isinstance(leaf, Tensor) for leaf in outputs):
            self._refuse(f"{function} gives something else than tensors")
            return
        if before is not None and before != _versions((args, kwargs)):
            self._refuse(f"{function} writes into a tensor")
            return
        arguments = tree_map(self._replace, (args, kwargs))
        self._operations.append(_Operation(function, arguments, [self._number_of(leaf) for leaf in outputs]))

    def _replace(self, leaf: Any) -> Any:
        """What to keep of an argument."""
        if id(leaf) in self._numbers:
            return _Value(self._numbers[id(leaf)])
        if isinstance(leaf, Tensor):
            if isinstance(leaf, nn.Parameter) or leaf.requires_grad or leaf.is_inference():
                self._refuse(
                    "a weight outside of the transformer, or a tensor of the inference mode, has a part in it"
                )
            else:
                self._kept.setdefault(id(leaf), (leaf, leaf._version))
        elif not isinstance(leaf, _PLAIN) and not _is_plain_slice(leaf):
            self._refuse(f"an argument is a {type(leaf).__name__}")
        return leaf

    def _number_of(self, tensor: Tensor) -> int:
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self._values)
            self._values.append(tensor)
        return self._numbers[id(tensor)]

    def _refuse(self, fault: str) -> None:
        self.fault = self.fault or fault

    def _resume(self) -> None:
        self.__enter__()
        self._is_active = True

    def _pause(self) -> None:
        if self._is_active:  # it is not after an error of the transformer
            self._is_active = False
            self.__exit__(None, None, None)


def _versions(tree: Any) -> list[int]:
    """How often tensors have been written into."""
    return [leaf._version for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_inference()]


def _is_plain_slice(leaf: Any) -> bool:
    return isinstance(leaf, slice) and all(isinstance(part, int | None) for part in (leaf.start, leaf.stop, leaf.step))


def autocast_of(tensor: Tensor) -> tuple[bool, torch.dtype]:
    """Whether functions of a tensor run under autocast, and its dtype."""
    kind = tensor.device.type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _modes(tensor: Tensor) -> tuple[Any, ...]:
    return torch.is_grad_enabled(), *autocast_of(tensor)
