# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
A GPU for machines without one: `torch.device("cuda")` on a PyTorch without CUDA.

Its tensors are real and its results are those of the CPU, but what a GPU refuses is refused, such as operands on
different devices. [`listening`] notes what a GPU would wait for, what is copied, and the dtypes of products.

Whatever asks for a GPU in this process finds one: use it in a process of its own. As a plugin of pytest
(`pytest -p pretended_gpu`, with this folder in `PYTHONPATH`) it is there in all tests of the process. It needs a C++
compiler, and a minute the first time.
"""

import collections
import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch


PACKAGE = f"{os.sep}trl_marble{os.sep}"
DEVICE = torch.device("cuda", 0)


@functools.cache
def install() -> ctypes.CDLL:
    """Make the GPU. Returns its library."""
    if torch.cuda.is_available():
        raise RuntimeError("There is a real GPU; the pretended one would take its place.")
    for name in ("bitsandbytes", "torchao"):  # they look for libraries of a GPU when they find one
        with contextlib.suppress(ImportError):
            __import__(name)
    library = ctypes.CDLL(str(_build()))
    for name in ("stream", "live_bytes", "peak_bytes"):
        getattr(library, f"pretended_{name}").restype = ctypes.c_int64
    library.pretended_set_stream.argtypes = [ctypes.c_int64]
    _replace(torch.cuda, library)
    return library


def _build() -> Path:
    """Compile the library, unless that was done before."""
    source = Path(__file__).with_suffix(".cpp")
    key = hashlib.sha256(source.read_bytes() + torch.__version__.encode() + sys.version.encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"pretended_gpu_{os.getuid()}" / f"{key}.so"
    if library.is_file():
        return library
    library.parent.mkdir(mode=0o700, exist_ok=True)
    beside = library.with_suffix(f".{os.getpid()}")
    folder = Path(torch.__file__).parent
    flags = [
        "-std=c++20",
        "-O1",
        "-w",
        "-fPIC",
        "-shared",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    paths = ["-isystem", str(folder / "include"), f"-L{folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    subprocess.run([_compiler(), *flags, str(source), "-o", str(beside), *paths], check=True)
    beside.rename(library)
    return library


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def has_compiler() -> bool:
    """Whether the GPU can be made on this machine."""
    return shutil.which(_compiler()) is not None


def pytest_configure(config: Any) -> None:
    install()


# ---- What it did ----


class Happening(NamedTuple):
    """
    One thing that a GPU did.

    Args:
        kind (`str`):
            `"wait"`: the program waits for the GPU. `"to_device"`: numbers are copied to it. `"product"`: a product of
            matrices, a convolution or attention. `"from_device"`: a copy that is not waited for.
        operation (`str`):
            Its name in PyTorch.
        detail (`str`):
            The dtypes of a product.
        numbers (`int`):
            Size of the largest tensor.
        place (`str`):
            The function of trl_marble that asked for it, and the line; empty in a backward pass.
        thread (`str`):
            Name of the thread.
        stream (`int`):
            The stream; 0 is the default one.
    """

    kind: str
    operation: str
    detail: str
    numbers: int
    place: str
    thread: str
    stream: int


class Log(list[Happening]):
    """What happened, in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: collections.Counter[tuple[str, int]] = (
            collections.Counter()
        )  # of other kinds, by thread's stream

    def of(self, kind: str) -> "list[Happening]":
        """What happened of one kind."""
        return [each for each in self if each.kind == kind]

    def table(self, kind: str) -> "collections.Counter[tuple[str, ...]]":
        """How often it happened, by place, operation and detail."""
        return collections.Counter((each.place, each.operation, each.detail) for each in self.of(kind))


@contextlib.contextmanager
def listening() -> Iterator[Log]:
    """Note what happens inside the context, on all threads."""
    library, log = install(), Log()

    def note(kind: str, operation: str, detail: str, numbers: int) -> None:
        stream = library.pretended_stream()
        if kind == "kernel":
            log.kernels[operation, stream] += 1
            return
        thread = threading.current_thread().name
        log.append(Happening(kind, operation, detail, numbers, _place(sys._getframe(1)), thread, stream))

    @_LISTENER
    def listener(kind: bytes, operation: bytes, detail: bytes, numbers: int) -> None:
        note(kind.decode(), operation.decode(), detail.decode(), numbers)

    _listeners.append((note, listener))  # kept for good: other threads may still be calling it
    _hearing.append(note)
    library.pretended_listen(listener)
    try:
        yield log
    finally:
        library.pretended_listen(_LISTENER())
        _hearing.remove(note)


_LISTENER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64)
_listeners: list[Any] = []
_hearing: list[Any] = []  # who hears of waits that are not operations


def _waits(operation: str) -> None:
    for note in _hearing:
        note("wait", operation, "", 0)


def _place(frame: Any) -> str:
    """The innermost line of trl_marble on the stack."""
    while frame is not None:
        name = frame.f_code.co_filename
        if PACKAGE in name:
            return f"{name.rsplit(PACKAGE, 1)[1]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


# ---- torch.cuda ----


_deepcopy = torch.Tensor.__deepcopy__


class _Stream:
    """A stream that has always ended."""

    made = 0

    def __init__(self, device: Any = None, priority: int = 0, stream_id: int | None = None, **kwargs: Any) -> None:
        if stream_id is None:
            _Stream.made += 1
        self.stream_id = _Stream.made if stream_id is None else stream_id
        self.device = DEVICE

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream) and self.stream_id == other.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)

    def synchronize(self) -> None:
        _waits("Stream.synchronize")

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        event = _Event() if event is None else event
        event.record(self)
        return event


class _Event:
    """An event that passes at once."""

    def __init__(self, enable_timing: bool = False, **kwargs: Any) -> None:
        self.enable_timing, self.moment = enable_timing, None

    def record(self, stream: Any = None) -> None:
        self.moment = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _waits("Event.synchronize")

    def wait(self, stream: Any = None) -> None:
        pass

    def elapsed_time(self, end: "_Event") -> float:
        if not (self.enable_timing and end.enable_timing):
            raise ValueError("Both events must be made with enable_timing=True.")
        return 1000 * (end.moment - self.moment)


def _replace(cuda: Any, library: Any) -> None:
    """Let `torch.cuda` and `torch.accelerator` speak of the GPU that is there now."""
    properties = SimpleNamespace(
        name="pretended GPU", total_memory=80 * 10**9, major=9, minor=0, multi_processor_count=1, gcnArchName=""
    )

    def current_stream(device: Any = None) -> _Stream:
        return _Stream(stream_id=library.pretended_stream())

    def set_stream(stream: _Stream) -> None:
        library.pretended_set_stream(stream.stream_id)

    @contextlib.contextmanager
    def stream_context(stream: _Stream | None) -> Iterator[None]:
        before = library.pretended_stream()
        if stream is not None:
            library.pretended_set_stream(stream.stream_id)
        try:
            yield
        finally:
            library.pretended_set_stream(before)

    def get_rng_state(device: Any = "cuda") -> torch.Tensor:
        return torch.get_rng_state()

    def deepcopy(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        if tensor.device.type != "cuda":
            return _deepcopy(tensor, memo)
        memo[id(tensor)] = copied = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return copied

    torch.Tensor.__deepcopy__ = deepcopy  # the own one makes a storage, which Python cannot do on this device
    nothing = lambda *args, **kwargs: None  # noqa: E731
    for name, value in {
        "_initialized": True,
        "is_initialized": lambda: True,
        "_lazy_init": nothing,
        "init": nothing,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "synchronize": lambda device=None: _waits("synchronize"),
        "Stream": _Stream,
        "Event": _Event,
        "stream": stream_context,
        "current_stream": current_stream,
        "default_stream": lambda device=None: _Stream(stream_id=0),
        "set_stream": set_stream,
        "is_current_stream_capturing": lambda: False,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "mem_get_info": lambda device=None: (properties.total_memory,) * 2,
        "max_memory_allocated": lambda device=None: library.pretended_peak_bytes(),
        "max_memory_reserved": lambda device=None: library.pretended_peak_bytes(),
        "memory_allocated": lambda device=None: library.pretended_live_bytes(),
        "memory_reserved": lambda device=None: library.pretended_live_bytes(),
        "memory_stats": lambda device=None: {},
        "reset_peak_memory_stats": lambda device=None: library.pretended_reset_peak(),
        "empty_cache": nothing,
        "ipc_collect": nothing,
        # It draws from the CPU's generator.
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "get_rng_state": get_rng_state,
        "get_rng_state_all": lambda: [get_rng_state()],
        "set_rng_state": nothing,
        "set_rng_state_all": nothing,
    }.items():
        setattr(cuda, name, value)
        if hasattr(cuda.random, name):
            setattr(cuda.random, name, value)
    for name, value in {
        "is_available": lambda: True,
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "device_count": lambda: 1,
        "current_device_index": lambda: 0,
        "set_device_index": nothing,
        "synchronize": lambda device=None: _waits("synchronize"),
        "current_stream": current_stream,
        "set_stream": set_stream,
        "empty_cache": nothing,
    }.items():
        setattr(torch.accelerator, name, value)
