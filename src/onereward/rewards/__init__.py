"""Rewards: the multi-head model that learns from votes, the likelihood it is trained with, groups to advantages."""

from transformers import AutoConfig, AutoModel

from .configuration_onereward import OneRewardConfig
from .modeling_onereward import OneRewardModel, OneRewardOutput


AutoConfig.register(OneRewardConfig.model_type, OneRewardConfig, exist_ok=True)
AutoModel.register(OneRewardConfig, OneRewardModel, exist_ok=True)

__all__ = ["OneRewardConfig", "OneRewardModel", "OneRewardOutput"]
