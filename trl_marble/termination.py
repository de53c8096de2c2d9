# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How a run ends that was asked to by SIGTERM. Imports nothing that takes long."""

import signal


EXIT_STATUS = 128 + signal.SIGTERM  # of a process that the signal itself has ended, as shells and schedulers report it


class RunTerminated(SystemExit):
    """SIGTERM has asked the run to end. Where nothing catches it, the process exits with [`EXIT_STATUS`]."""

    def __init__(self) -> None:
        super().__init__(EXIT_STATUS)
