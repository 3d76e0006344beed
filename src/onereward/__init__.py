"""Preference-tuned, mask-guided medical image generation. Research use only, not for clinical use.

Public names are loaded on first use (PEP 562), so that `import onereward` itself is quick and brings in no torch. It
also teaches diffusers and transformers to know our classes by name, see `onereward.hub.autoload`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from onereward.hub.autoload import install_import_hook


if TYPE_CHECKING:
    from onereward.data import load_folder, load_phantom
    from onereward.pipelines import MaskConditions, OneRewardMaskPipeline
    from onereward.rewards import OneRewardConfig, OneRewardModel
    from onereward.trainers import (
        DDPOConfig,
        DDPOTrainer,
        RewardConfig,
        RewardTrainer,
        SFTConfig,
        SFTTrainer,
        VAEConfig,
        VAETrainer,
    )

__version__ = "0.1.0"

# public name -> the module that defines it
_MODULES = {
    "OneRewardMaskPipeline": "pipelines",
    "MaskConditions": "pipelines",
    "load_phantom": "data",
    "load_folder": "data",
    "OneRewardModel": "rewards",
    "OneRewardConfig": "rewards",
    "DDPOTrainer": "trainers",
    "DDPOConfig": "trainers",
    "SFTTrainer": "trainers",
    "SFTConfig": "trainers",
    "VAETrainer": "trainers",
    "VAEConfig": "trainers",
    "RewardTrainer": "trainers",
    "RewardConfig": "trainers",
}

__all__ = [
    "DDPOConfig",
    "DDPOTrainer",
    "MaskConditions",
    "OneRewardConfig",
    "OneRewardMaskPipeline",
    "OneRewardModel",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "VAEConfig",
    "VAETrainer",
    "load_folder",
    "load_phantom",
]


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_MODULES})


install_import_hook()
