# /// script
# dependencies = ["onereward"]
# ///
"""
Trains the reward model on votes. Research use only, not for clinical use.

    accelerate launch trainers/reward.py --config trainers/configs/reward_phantom.yaml \
        --dataset_name votes.parquet

Votes are a Parquet file written by `onereward.preferences.save_votes` or a data set on the Hub with the same columns,
on pairs, ratings of single images, or both. The reward heads are the criteria that were voted on. A part of the cases
is held out to evaluate on. With few votes on larger images, start from a pretrained backbone:

    --backbone facebook/dinov2-small --use_peft true --learning_rate 1e-4
"""

import json
from dataclasses import dataclass, field

import datasets
import torch
from peft import LoraConfig
from trl import TrlParser

from onereward.data.schema import split_by_case
from onereward.preferences import load_votes
from onereward.rewards import OneRewardConfig, OneRewardModel
from onereward.trainers.reward import RewardConfig, RewardTrainer


@dataclass
class RewardScriptArguments:
    """Model and data of `trainers/reward.py`."""

    dataset_name: str = field(metadata={"help": "Parquet file of votes, or a data set of votes on the Hub."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of the votes on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a data set on the Hub."})
    eval_fraction: float = field(default=0.2, metadata={"help": "Share of the cases to hold out."})
    truths: str | None = field(
        default=None, metadata={"help": "Parquet file of the truths of simulated votes, to report the ceiling."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reward model to start from; one from scratch if left out."}
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of that reward model on the Hub."})
    backbone: str | None = field(
        default=None, metadata={"help": "Pretrained image model to start from, such as facebook/dinov2-small."}
    )
    backbone_revision: str | None = field(default=None, metadata={"help": "Revision of the backbone on the Hub."})
    vision_config: dict | str | None = field(
        default=None, metadata={"help": "Config of a backbone from scratch; a small one if left out."}
    )
    labels: dict | str | None = field(default=None, metadata={"help": "Label names and values of the label maps."})
    task_criteria: dict | str | None = field(
        default=None, metadata={"help": "Criteria of some tasks, as in {remove: [removal_quality]}; else all."}
    )
    prompt_buckets: int = field(default=0, metadata={"help": "Vocabulary of the prompts; 0 does not read them."})
    gaussian: bool = field(default=False, metadata={"help": "Learn on which images raters disagree."})
    use_peft: bool = field(default=False, metadata={"help": "Of the backbone train an adapter; else all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter, times its rank."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Layers of the backbone that get an adapter."}
    )


def make_model(script_args: RewardScriptArguments, votes: datasets.Dataset) -> OneRewardModel:
    if script_args.model_name_or_path is not None:
        return OneRewardModel.from_pretrained(script_args.model_name_or_path, revision=script_args.revision)
    vision_config, labels, task_criteria = (
        json.loads(value) if isinstance(value, str) else value
        for value in (script_args.vision_config, script_args.labels, script_args.task_criteria)
    )
    image = votes[0]["image"]
    config = {
        "criteria": list(dict.fromkeys(votes["criterion"])),
        "task_criteria": task_criteria,
        "labels": labels,
        "image_channels": len(image.getbands()),
        "image_size": image.height,
        "prompt_buckets": script_args.prompt_buckets,
        "gaussian": script_args.gaussian,
    }
    if script_args.backbone is not None:
        return OneRewardModel.from_backbone(script_args.backbone, script_args.backbone_revision, **config)
    return OneRewardModel(OneRewardConfig(vision_config=vision_config, **config))


def main(script_args: RewardScriptArguments, args: RewardConfig) -> None:
    torch.manual_seed(args.seed)
    votes = load_votes(
        script_args.dataset_name,
        criteria=None,
        split=script_args.dataset_train_split,
        revision=script_args.dataset_revision,
    )
    fractions = {"train": 1 - script_args.eval_fraction, "eval": script_args.eval_fraction}
    parts = split_by_case(votes, fractions, seed=args.seed)
    adapter = None
    if script_args.use_peft:
        modules = script_args.lora_target_modules
        adapter = LoraConfig(
            r=script_args.lora_r,
            lora_alpha=script_args.lora_alpha,
            target_modules=modules[0] if len(modules) == 1 else modules,  # "all-linear" is a word, not a name
        )
    truths = script_args.truths and datasets.Dataset.from_parquet(script_args.truths)
    model = make_model(script_args, votes)
    trainer = RewardTrainer(model, args, parts["train"], parts["eval"], truths, peft_config=adapter)
    trainer.dataset_name, trainer.dataset_revision = script_args.dataset_name, script_args.dataset_revision
    if script_args.model_name_or_path is not None:
        trainer.sources = (("reward_model", script_args.model_name_or_path, script_args.revision),)
    elif script_args.backbone is not None:
        trainer.sources = (("backbone", script_args.backbone, script_args.backbone_revision),)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_model()
    trainer.create_model_card()
    if args.push_to_hub:
        trainer.push_to_hub()


def parser() -> TrlParser:
    return TrlParser((RewardScriptArguments, RewardConfig))


if __name__ == "__main__":
    main(*parser().parse_args_and_config())
