# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rewards: their protocol, how they are called, and the rewards of this package."""

from .adversarial import AdversarialReward
from .aesthetic import AestheticScore
from .clip_score import CLIPScore
from .feature_models import CLIPFeatures, DINOv2Features, FeatureModel
from .frame_reward import FrameReward
from .geneval import GenEval
from .hps import HPSv2
from .image_reward import ImageReward
from .jpeg import jpeg_compressibility, jpeg_incompressibility
from .learning_reward import LearningReward
from .loading import KNOWN_REWARDS, load_reward
from .model_reward import ModelReward
from .ocr import OCRAccuracy
from .pickscore import PickScore
from .protocol import InfiniteRewardError, Learner, RewardError, RewardFunc, reward_names, reward_tensor
from .remote import RemoteReward
from .scoring import PendingScores, RewardScorer, Scores
from .set_reward import SetReward
from .set_rewards import FrechetReward, MMDReward, VendiDiversity
from .vlm_judge import VLMJudge


__all__ = [
    "KNOWN_REWARDS",
    "AdversarialReward",
    "AestheticScore",
    "CLIPScore",
    "FrameReward",
    "GenEval",
    "HPSv2",
    "ImageReward",
    "InfiniteRewardError",
    "Learner",
    "LearningReward",
    "ModelReward",
    "OCRAccuracy",
    "PendingScores",
    "PickScore",
    "RemoteReward",
    "RewardError",
    "RewardFunc",
    "RewardScorer",
    "Scores",
    "SetReward",
    "VLMJudge",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "load_reward",
    "reward_names",
    "reward_tensor",
    "CLIPFeatures",
    "DINOv2Features",
    "FeatureModel",
    "FrechetReward",
    "MMDReward",
    "VendiDiversity",
]
