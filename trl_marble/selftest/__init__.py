# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Checks of everything that can be wrong on a user's machine: one a file. It uses the trainer from above."""
