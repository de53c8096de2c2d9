# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
EditScore (https://github.com/VectorSpaceLab/EditScore): how well an image was edited as the prompt says, 0 to 10. The
image before and after come as one film strip, see `pictures.py`.
"""

from editscore import EditScore
from pictures import frames_of


class Scorer:
    def __init__(self):
        self.model = EditScore(
            backbone="qwen3vl",
            model_name_or_path="Qwen/Qwen3-VL-4B-Instruct",
            lora_path="EditScore/EditScore-Qwen3-VL-4B-Instruct",
            score_range=25,
            num_pass=1,
        )

    def __call__(self, images, prompts, columns):
        edits = [frames_of(strip, sizes) for strip, sizes in zip(images, columns["sizes"])]  # noqa: B905
        return [self.model.evaluate(edit, prompt)["overall"] for edit, prompt in zip(edits, prompts)]  # noqa: B905
