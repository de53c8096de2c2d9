# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
HPSv3 (https://github.com/MizzenAI/HPSv3): human preference for an image and its prompt. (This file must not have the
name of the package that it imports.)
"""

import torch
from hpsv3.inference import HPSv3RewardInferencer
from pictures import saved


class Scorer:
    def __init__(self):
        self.model = HPSv3RewardInferencer(device="cuda")

    def __call__(self, images, prompts, columns):
        # By keyword: versions differ in the order of the two.
        with saved(images) as paths, torch.no_grad():
            rewards = self.model.reward(image_paths=paths, prompts=prompts)
        return [reward[0].item() for reward in rewards]  # the mean; the other number is the model's uncertainty
