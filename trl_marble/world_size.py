# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Check that all launched processes work together. Imports nothing that takes long."""

import os


def check_world_size(num_processes: int) -> None:
    """
    Refuse a number of processes other than the launched one: each process would do all the work in the same folder.

    Args:
        num_processes (`int`):
            Number of processes that work together.

    Raises:
        `ValueError`: If the launcher was started for another number.
    """
    launched = os.environ.get("WORLD_SIZE", "1")
    how = (
        "One process per accelerator is started by `accelerate launch --multi_gpu --num_processes N`; for N on "
        "CPUs also set `use_cpu=True`, or start them by `trl-marble train --cpu --num_processes N`."
    )
    if launched.isdecimal() and int(launched) > 1 and int(launched) != num_processes:
        raise ValueError(
            f"{launched} processes were launched (`WORLD_SIZE`), and {num_processes} would work together: there are "
            f"not enough accelerators. {how}"
        )
    # `accelerate launch` without `--multi_gpu` starts one process, whatever the requested number. The only sign of a
    # larger number is that it sets the address of process 0.
    one_for_several = "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ
    if num_processes == 1 and one_for_several and "RANK" not in os.environ:
        raise ValueError(
            "`accelerate launch` was asked for several processes (it has set `MASTER_ADDR`) and started one. "
            f"{how} For one process, pass `--num_processes 1` and leave `MASTER_ADDR` out of the environment."
        )
