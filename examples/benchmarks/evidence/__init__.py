# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The parts of `compare.py`: what is compared, how one run is made, how many run at once, and what is made of them."""
