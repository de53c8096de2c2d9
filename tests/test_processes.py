# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""One process on its own: the error itself. Two of them are in tests/trainer/test_two_processes.py."""

import os
import signal
import threading

import pytest

from trl_marble.processes import FailingTogether
from trl_marble.termination import RunTerminated


@pytest.mark.parametrize("settings", [{}, {"ask": False}, {"exchanges": True}])
def test_one_process_raises_the_error_itself(settings) -> None:
    together, error = FailingTogether(), KeyError("tag")
    with together.phase(**settings):
        pass
    assert not together.failed
    with pytest.raises(KeyError) as caught, together.phase(**settings):
        raise error
    assert caught.value is error and error.__cause__ is None and together.failed


def test_an_interruption_is_not_the_failure_of_all() -> None:
    together = FailingTogether()
    with pytest.raises(KeyboardInterrupt), together.phase():
        raise KeyboardInterrupt
    assert not together.failed


def ask_to_end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_ends_the_run_at_the_end_of_a_phase_and_only_once() -> None:
    together, before, done = FailingTogether(), signal.getsignal(signal.SIGTERM), []
    with pytest.raises(RunTerminated) as caught, together.ending_on_sigterm():
        ask_to_end()
        done.append("between phases")
        try:
            with together.phase(ask=False):
                done.append("the phase")
        finally:
            assert together.failed  # all processes are here, so that they can save together
            ask_to_end()
            with together.phase():
                done.append("what is done at last")
    assert caught.value.code == 143
    assert done == ["between phases", "the phase", "what is done at last"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failure_goes_before_sigterm() -> None:
    together = FailingTogether()
    with pytest.raises(KeyError), together.ending_on_sigterm(), together.phase():
        ask_to_end()
        raise KeyError("tag")


def test_where_processes_exchange_data_sigterm_waits_for_the_end_of_the_step() -> None:
    together = FailingTogether()
    with pytest.raises(RunTerminated), together.ending_on_sigterm():
        ask_to_end()
        with together.phase(exchanges=True, ask=False):
            pass
        assert not together.failed
        with together.phase(exchanges=True):
            pass


def test_another_thread_leaves_the_signal_alone() -> None:
    together, found = FailingTogether(), []

    def train() -> None:
        with together.ending_on_sigterm(), together.phase():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]
