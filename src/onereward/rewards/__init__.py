"""Rewards: the multi-head model that learns from votes, the likelihood it is trained with, groups to advantages."""

from transformers import AutoConfig, AutoModel
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_onereward import OneRewardConfig
from .image_reward_pipeline import ImageRewardPipeline
from .modeling_onereward import OneRewardModel, OneRewardOutput


AutoConfig.register(OneRewardConfig.model_type, OneRewardConfig, exist_ok=True)
AutoModel.register(OneRewardConfig, OneRewardModel, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline("image-reward", ImageRewardPipeline, pt_model=AutoModel)

__all__ = ["ImageRewardPipeline", "OneRewardConfig", "OneRewardModel", "OneRewardOutput"]
