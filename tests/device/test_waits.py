# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a device is waited for and what is copied, as far as a CPU alone can tell."""

import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trl_marble.nonfinite import refuse_nonfinite
from trl_marble.pipelines import WeightShadow
from trl_marble.pipelines.offloading import _way_back
from trl_marble.rewards.threads import EventLoopThread, Worker
from trl_marble.rollout.batch import _FIELDS, _ON_CPU, StoredBatch


CUDA = torch.device("cuda", 1)


class Reads(TorchDispatchMode):
    """Counts operations whose result the program reads: on a GPU it would wait for them."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.number += name in ("_local_scalar_dense", "equal", "nonzero")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def parameters():
    return {str(number): nn.Parameter(torch.full((3,), float(number))) for number in range(5)}


@pytest.mark.parametrize("changed", [None, "0", "4"])
def test_one_read_tells_whether_the_policies_are_the_same(parameters, changed):
    shadow = WeightShadow(parameters.items())
    if changed is not None:
        parameters[changed].data[1] += 1
    with Reads() as reads:
        assert shadow.equals_live() == (changed is None)
    assert reads.number == 1


def test_nan_is_no_equal(parameters):
    parameters["2"].data[0] = torch.nan
    assert not WeightShadow(parameters.items()).equals_live()


def test_weights_that_cannot_be_saved_are_found_together(parameters):
    refuse_nonfinite("weights", {})
    tensors = {name: parameter.detach() for name, parameter in parameters.items()}
    with Reads() as reads:
        refuse_nonfinite("weights", tensors)
    assert reads.number <= len(tensors)  # of a list on the CPU
    tensors["3"] = torch.tensor([0.0, torch.inf])
    with pytest.raises(FloatingPointError, match="`3` of the weights"):
        refuse_nonfinite("weights", tensors)


def test_a_component_comes_back_without_a_copy():
    """From the device `meta`, from which nothing can be copied."""
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    module[0].register_buffer("nothing", None)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in module.state_dict().items()}
    parameters = list(module.parameters())
    come_back = _way_back(module)
    module.to("meta")
    assert all(parameter.is_meta for parameter in module.parameters())
    come_back()
    assert all(now is parameter for now, parameter in zip(module.parameters(), parameters, strict=True))
    for name, tensor in module.state_dict().items():
        address, value = before[name]
        assert tensor.data_ptr() == address and tensor.equal(value), name


def test_a_stored_batch_keeps_on_the_cpu_what_the_program_looks_at(tmp_path):
    of_samples = {"sample_ids": torch.arange(2), "latents": torch.zeros(2, 1), "first_half": torch.zeros(2)}
    tensors = {name: torch.zeros(1, 2) for name in _FIELDS} | of_samples
    save_file(tensors, tmp_path / "generation_batch_0.safetensors", metadata={"rows": "a"})
    stored = StoredBatch.load(tmp_path, range(2), num_updates=1, device=torch.device("meta"))
    assert {name for name, tensor in stored.tensors.items() if tensor.device.type == "cpu"} == _ON_CPU
    assert "sample_ids" in _ON_CPU and stored.tensors.keys() == tensors.keys()


# ---- The streams of reward threads ----


class FakeCuda:
    """What `trl_marble.rewards.threads` uses of CUDA: each thread has its current stream."""

    def __init__(self, monkeypatch):
        self.current, self.devices, self.events = threading.local(), {}, []
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(self, device))
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self.current, "stream", stream))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current.stream)
        monkeypatch.setattr(torch.accelerator, "set_device_index", self.set_device_index)

    def set_device_index(self, index):
        self.devices[threading.get_ident()] = index


class FakeStream:
    def __init__(self, cuda, device):
        self.cuda, self.device = cuda, device

    def wait_stream(self, other):
        self.cuda.events.append(("wait_stream", other))

    def synchronize(self):
        self.cuda.events.append(("synchronize", self))


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def look(cuda):
    """What a call on a thread of a reward sees."""
    cuda.events.append(("call", cuda.current.stream))
    return cuda.current.stream, cuda.devices[threading.get_ident()]


def test_each_worker_has_a_device_and_a_stream_which_ends_before_its_result_is_given(cuda):
    workers = [Worker(f"reward-{number}", CUDA) for number in range(2)]
    seen = [[worker.submit(lambda: look(cuda)).result(timeout=30) for _ in range(2)] for worker in workers]
    for worker in workers:
        worker.stop()
    streams = [stream for calls in seen for stream, _ in calls]
    assert len({id(stream) for stream in streams}) == 2 and streams[0] is streams[1] and streams[2] is streams[3]
    assert {index for calls in seen for _, index in calls} == {1} and {stream.device for stream in streams} == {CUDA}
    for stream in streams[::2]:
        own = [kind for kind, which in cuda.events if which is stream]
        assert own == ["call", "synchronize"] * 2
    assert cuda.events.count(("wait_stream", "default")) == 2


def test_async_rewards_share_a_stream_and_their_threads_have_their_own(cuda):
    import asyncio

    async def call():
        return look(cuda), await asyncio.to_thread(look, cuda)

    loop = EventLoopThread("async-rewards", CUDA)
    (first, first_index), (second, second_index) = loop.submit(call).result(timeout=30)
    loop.stop()
    assert first is not second and first_index == second_index == 1
    assert ("synchronize", second) in cuda.events and cuda.events[-1] == ("synchronize", first)


def test_a_failing_stream_fails_the_call(cuda, monkeypatch):
    def fail(stream):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(FakeStream, "synchronize", fail)
    worker = Worker("reward", CUDA)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        worker.submit(lambda: 1).result(timeout=30)
    worker.stop()


def test_nothing_of_cuda_is_asked_on_a_cpu(cuda):
    worker = Worker("reward", torch.device("cpu"))
    assert worker.submit(lambda: 1).result(timeout=30) == 1
    worker.stop()
    assert cuda.events == [] and cuda.devices == {}
