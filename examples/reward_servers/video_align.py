# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
VideoAlign (https://github.com/KwaiVGI/VideoAlign): visual quality, motion quality and text alignment of a video, each
in standard deviations of its training data; the reward is their sum. Videos come as film strips, see `pictures.py`.
"""

import os
import tempfile

import cv2
import numpy as np
import torch
from inference import VideoVLMRewardInference  # of the repository
from pictures import frames_of


FRAMES_PER_SECOND = float(os.environ.get("VIDEO_ALIGN_FPS", "16"))  # of the videos that are made


class Scorer:
    def __init__(self):
        checkpoints = os.environ.get("VIDEO_ALIGN_CHECKPOINTS", "checkpoints")
        self.model = VideoVLMRewardInference(checkpoints, device="cuda", dtype=torch.bfloat16)

    def __call__(self, images, prompts, columns):
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            paths = [os.path.join(folder, f"{number}.mp4") for number in range(len(images))]
            for strip, sizes, path in zip(images, columns["sizes"], paths):  # noqa: B905
                writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), FRAMES_PER_SECOND, tuple(sizes[0]))
                for frame in frames_of(strip, sizes):
                    writer.write(np.asarray(frame)[..., ::-1].copy())  # blue first
                writer.release()
            rewards = self.model.reward(paths, prompts, use_norm=True)
        return [reward["Overall"] for reward in rewards]  # or "VQ", "MQ", "TA"
