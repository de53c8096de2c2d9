# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Settings and fixtures for every test: no network, one thread, tiny real pipelines."""

import os


# Before anything imports huggingface_hub, which reads it once. A test that talks to a Hub of its own sets HF_ENDPOINT.
if "HF_ENDPOINT" not in os.environ:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402


pytest_plugins = ["run_fixtures"]

torch.set_num_threads(1)
settings.register_profile("shared machine", deadline=None)  # an example's time says how busy the machine is
settings.register_profile("long", deadline=None, max_examples=2000)  # `make fuzz`
settings.load_profile("shared machine")


def pytest_generate_tests(metafunc):
    """A set has another order in every process, and the processes of `pytest -n` have to find the same tests."""
    for mark in metafunc.definition.iter_markers("parametrize"):
        if isinstance(mark.args[1], set | frozenset):
            raise TypeError(f"{metafunc.definition.nodeid} is parametrized with a set; sort it.")


@pytest.fixture
def tiny_sd3():
    """Factory of fresh tiny SD3 pipelines, see tests/support/tiny.py."""
    return tiny.tiny_sd3


@pytest.fixture
def tiny_flux():
    """Factory of fresh tiny Flux pipelines, see tests/support/tiny.py."""
    return tiny.tiny_flux
