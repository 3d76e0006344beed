# /// script
# dependencies = ["onereward"]
# ///
"""
Tunes the denoiser of a mask-guided pipeline on rewards with DDPO. Research use only, not for clinical use.

The embedded base on the built-in phantom, with a reward model that `trainers/reward.py` trained:

    accelerate launch trainers/ddpo.py --config trainers/configs/ddpo_phantom.yaml

All of it from the Hub, on from an adapter that is there, and back to the Hub at every save:

    accelerate launch trainers/ddpo.py --model_name_or_path org/onereward-brats --revision v1.0.0 \\
        --adapter org/adapter --reward_model org/reward-model --dataset_name org/rows --streaming --max_rows 512 \\
        --push_to_hub --hub_model_id org/better-adapter --hub_strategy checkpoint

On several GPUs, with what `trainers/accelerate/` has for it (`ddp.yaml`, `fsdp.yaml`, `zero2.yaml`):

    accelerate launch --config_file trainers/accelerate/ddp.yaml --num_processes 8 trainers/ddpo.py --config ...

Several processes on a CPU are started with

    python -m torch.distributed.run --nproc_per_node 2 trainers/ddpo.py --use_cpu true --config ...

since `accelerate launch --cpu --num_processes 2` starts one process only, without a word. Every option of `DDPOConfig`
may be given on the command line, and takes precedence over the file. With `--resume_from_checkpoint true` the same
command starts a training and, after it was stopped, goes on with it; `--resume_from_checkpoint org/better-adapter`, or
`org/better-adapter@revision`, goes on elsewhere with the checkpoint that `--hub_strategy checkpoint` left on the Hub.
"""

import importlib
import os
from dataclasses import dataclass, field

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftConfig
from transformers import EarlyStoppingCallback
from trl import TrlParser

from onereward.data.load import load_rows
from onereward.hub.adapters import load_adapter
from onereward.hub.provenance import is_repo_id
from onereward.pipelines import OneRewardFluxFillPipeline, OneRewardMaskPipeline, OneRewardSD3InpaintPipeline
from onereward.rewards import OneRewardModel
from onereward.trainers.ddpo import DDPOTrainer
from onereward.trainers.ddpo_config import DDPOConfig


@dataclass
class DDPOScriptArguments:
    """Model, data and rewards of `trainers/ddpo.py`."""

    model_name_or_path: str = field(
        default="pipelines/onereward-brats", metadata={"help": "Mask-guided pipeline to tune."}
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of the pipeline on the Hub."})
    dtype: str = field(
        default="float32", metadata={"help": "Of the weights that stay frozen: 'float32', 'bfloat16' or 'float16'."}
    )
    dataset_name: str = field(
        default="phantom", metadata={"help": "'phantom', a folder or Parquet file of rows, or a data set on the Hub."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of the data set on the Hub."})
    streaming: bool = field(
        default=False, metadata={"help": "Read `max_rows` rows of a data set on the Hub without downloading the rest."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "Rows of each split, at random; all if left out."})
    num_cases: int = field(default=64, metadata={"help": "Cases of the phantom to train on."})
    num_eval_cases: int = field(default=4, metadata={"help": "Cases of the phantom to evaluate on."})
    image_size: int = field(default=64, metadata={"help": "Height and width of the phantom in pixels."})
    reward_model: str | None = field(
        default=None, metadata={"help": "Reward model, by folder or id on the Hub; its criteria come first."}
    )
    reward_revision: str | None = field(default=None, metadata={"help": "Revision of the reward model on the Hub."})
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={"help": "Rewards: reward models by folder or id on the Hub, functions as 'module:function'."},
    )
    eval_reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Rewards that are evaluated and never trained on, likewise."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without a better `metric_for_best_model`."},
    )
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "Adapter to start from, by folder or id on the Hub, in its own rank. Its weights are trained on; "
            "the reference of the KL penalty stays the pipeline without it."
        },
    )
    adapter_revision: str | None = field(default=None, metadata={"help": "Revision of the adapter on the Hub."})
    use_peft: bool = field(default=True, metadata={"help": "Train an adapter; else all weights of the denoiser."})
    peft_config: str | None = field(
        default=None, metadata={"help": "Folder with an adapter_config.json of PEFT, in place of the options below."}
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapter, times its rank."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"],
        metadata={"help": "Layers that get an adapter."},
    )


def reward_function(name: str):
    """`module:function` as the function; anything else is the name of a reward model, which the trainer loads."""
    module, _, function = name.partition(":")
    if function:
        return getattr(importlib.import_module(module), function)
    if not os.path.isdir(name) and not is_repo_id(name):
        raise ValueError(
            f"`reward_funcs` holds {name!r}, which is neither a folder nor a Hub id. A function is 'module:function'."
        )
    return name


def load_pipeline(name: str, **kwargs):
    """The pipeline of a folder or repository as the class that can be tuned."""
    classes = {"FluxFillPipeline": OneRewardFluxFillPipeline, "OneRewardFluxFillPipeline": OneRewardFluxFillPipeline}
    for stock in ("StableDiffusion3Pipeline", "StableDiffusion3InpaintPipeline", "OneRewardSD3InpaintPipeline"):
        classes[stock] = OneRewardSD3InpaintPipeline
    class_name = DiffusionPipeline.load_config(name, revision=kwargs.get("revision"))["_class_name"]
    class_name = class_name[-1] if isinstance(class_name, list) else class_name
    return classes.get(class_name, OneRewardMaskPipeline).from_pretrained(name, **kwargs)


def adapter_config(script_args: DDPOScriptArguments) -> PeftConfig | None:
    """The new adapter that was asked for."""
    if not script_args.use_peft or script_args.adapter is not None:
        return None
    if script_args.peft_config is not None:
        return PeftConfig.from_pretrained(script_args.peft_config)
    return LoraConfig(
        r=script_args.lora_r, lora_alpha=script_args.lora_alpha, target_modules=script_args.lora_target_modules
    )


def main(script_args: DDPOScriptArguments, args: DDPOConfig) -> None:
    if not script_args.reward_funcs and script_args.reward_model is None:
        raise ValueError(
            "There is no reward; pass `--reward_model` with its name, or `--reward_funcs` with 'module:function'."
        )
    if script_args.adapter is not None and not script_args.use_peft:
        raise ValueError("`adapter` is given, but `use_peft` is off. Train that adapter on, or leave it out.")
    torch.manual_seed(args.seed)
    rows = {
        "revision": script_args.dataset_revision,
        "streaming": script_args.streaming,
        "max_rows": script_args.max_rows,
        "seed": args.seed,
        "hold_out": 0.1,
        "size": script_args.image_size,
    }
    train_dataset = load_rows(script_args.dataset_name, "train", num_cases=script_args.num_cases, **rows)
    eval_dataset = load_rows(script_args.dataset_name, "validation", num_cases=script_args.num_eval_cases, **rows)
    pipeline = load_pipeline(
        script_args.model_name_or_path, revision=script_args.revision, dtype=getattr(torch, script_args.dtype)
    )
    sources = []
    if script_args.adapter is not None:
        load_adapter(pipeline, script_args.adapter, trainable=True, revision=script_args.adapter_revision)
        sources.append(("adapter", script_args.adapter, script_args.adapter_revision))
    reward_funcs = [reward_function(name) for name in script_args.reward_funcs]
    if script_args.reward_model is not None:
        revision = script_args.reward_revision
        reward_funcs.insert(0, OneRewardModel.from_pretrained(script_args.reward_model, revision=revision))
        sources.append(("reward_model", script_args.reward_model, revision))
    callbacks = []
    if script_args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(script_args.early_stopping_patience))
    trainer = DDPOTrainer(
        pipeline,
        reward_funcs,
        args,
        train_dataset,
        eval_dataset,
        peft_config=adapter_config(script_args),
        eval_reward_funcs=[reward_function(name) for name in script_args.eval_reward_funcs] or None,
        callbacks=callbacks,
    )
    trainer.dataset_name, trainer.dataset_revision = script_args.dataset_name, script_args.dataset_revision
    trainer.sources = tuple(sources)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.create_model_card()
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    parser = TrlParser((DDPOScriptArguments, DDPOConfig))
    main(*parser.parse_args_and_config())
