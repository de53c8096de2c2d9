# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints: folders that are complete or absent, and the state of a run in safetensors and JSON."""
