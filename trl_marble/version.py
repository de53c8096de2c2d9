# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The version of this package."""

__version__ = "0.1.0"
