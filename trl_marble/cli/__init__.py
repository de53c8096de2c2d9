# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The command `trl-marble`: one module a command, which imports what takes long only when it runs."""
