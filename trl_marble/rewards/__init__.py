# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rewards: their protocol, how they are called, and the rewards of this package."""

from .adversarial import AdversarialReward
from .aesthetic import AestheticScore
from .bradley_terry import bradley_terry
from .clip_score import CLIPScore
from .feature_models import CLIPFeatures, DINOv2Features, FeatureModel
from .frame_reward import FrameReward
from .geneval import GenEval
from .group_judges import PairwiseJudge, RankingJudge
from .hps import HPSv2
from .human import HumanReward
from .image_reward import ImageReward
from .jpeg import jpeg_compressibility, jpeg_incompressibility
from .judge_templates import ARTIFACT_TEMPLATE
from .learning_reward import LearningReward
from .loading import KNOWN_REWARDS, load_reward
from .model_reward import ModelReward
from .ocr import OCRAccuracy
from .pickscore import PickScore
from .protocol import InfiniteRewardError, Learner, RewardError, RewardFunc, reward_names, reward_tensor
from .remote import RemoteReward
from .reward_calls import PendingScores
from .scores import Scores
from .scoring import RewardScorer
from .set_reward import SetReward
from .set_rewards import FrechetReward, MMDReward, VendiDiversity
from .vlm_judge import VLMJudge


__all__ = [
    "ARTIFACT_TEMPLATE",
    "KNOWN_REWARDS",
    "AdversarialReward",
    "AestheticScore",
    "CLIPScore",
    "FrameReward",
    "GenEval",
    "HPSv2",
    "HumanReward",
    "ImageReward",
    "InfiniteRewardError",
    "Learner",
    "LearningReward",
    "ModelReward",
    "OCRAccuracy",
    "PairwiseJudge",
    "PendingScores",
    "PickScore",
    "RankingJudge",
    "RemoteReward",
    "RewardError",
    "RewardFunc",
    "RewardScorer",
    "Scores",
    "SetReward",
    "VLMJudge",
    "bradley_terry",
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
