# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""One process on its own: the error itself. Two of them are in tests/trainer/test_two_processes.py."""

import pytest

from trl_marble.processes import FailingTogether


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
