# /// script
# dependencies = ["onereward"]
# ///
"""
Trains the denoiser of a mask-guided pipeline on row-schema data. Research use only, not for clinical use.

From scratch, on the built-in phantom, with a small VAE trained first:

    accelerate launch trainers/sft.py --config trainers/configs/sft_phantom.yaml

A LoRA adapter for your own data (a folder written by `onereward data`, or a data set on the Hub):

    accelerate launch trainers/sft.py --model_name_or_path pipelines/onereward-brats --dataset_name my-data \
        --use_peft --lora_r 8 --learning_rate 1e-3 --max_steps 300 --output_dir runs/sft
"""

import json
from dataclasses import dataclass, field

import torch
from peft import LoraConfig
from trl import TrlParser

from onereward.data.load import load_rows
from onereward.data.schema import LABELS
from onereward.pipelines import OneRewardMaskPipeline, small_pipeline
from onereward.trainers.sft import SFTConfig, SFTTrainer
from onereward.trainers.vae import VAEConfig, VAETrainer


@dataclass
class SFTScriptArguments:
    """Model and data of `trainers/sft.py`."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Inpainting pipeline to start from; a small one from scratch if left out."}
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of the pipeline on the Hub."})
    dataset_name: str = field(
        default="phantom", metadata={"help": "'phantom', a folder or Parquet file of rows, or a data set on the Hub."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of the data set on the Hub."})
    streaming: bool = field(
        default=False, metadata={"help": "Read `max_rows` rows of a data set on the Hub without downloading the rest."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "Rows of each split, at random; all if left out."})
    num_cases: int = field(default=500, metadata={"help": "Cases of the phantom to train on."})
    num_eval_cases: int = field(default=8, metadata={"help": "Cases of the phantom to evaluate on."})
    tasks: list[str] = field(
        default_factory=lambda: ["fill", "remove", "extend"],
        metadata={"help": "Tasks of the phantom; one named twice gets twice the rows."},
    )
    labels: dict | str | None = field(
        default=None, metadata={"help": "Label names and values of a pipeline from scratch; BraTS's if left out."}
    )
    image_size: int = field(default=64, metadata={"help": "Height and width of the phantom in pixels."})
    vae_name_or_path: str | None = field(default=None, metadata={"help": "VAE to use in a pipeline from scratch."})
    vae_revision: str | None = field(default=None, metadata={"help": "Revision of that VAE on the Hub."})
    vae_max_steps: int = field(default=0, metadata={"help": "Steps to train the VAE for before the denoiser."})
    vae_learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of the VAE."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter in place of all weights."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapter, times its rank."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"],
        metadata={"help": "Layers that get an adapter."},
    )


def main(script_args: SFTScriptArguments, args: SFTConfig) -> None:
    torch.manual_seed(args.seed)
    rows = {
        "revision": script_args.dataset_revision,
        "streaming": script_args.streaming,
        "max_rows": script_args.max_rows,
        "seed": args.seed,
        "hold_out": 0.1,
        "size": script_args.image_size,
        "tasks": tuple(script_args.tasks),
    }
    train_dataset = load_rows(script_args.dataset_name, "train", num_cases=script_args.num_cases, **rows)
    eval_dataset = load_rows(script_args.dataset_name, "validation", num_cases=script_args.num_eval_cases, **rows)
    if script_args.model_name_or_path is None:
        image = train_dataset[0]["image"]
        image_channels = 1 if image.mode == "L" else 3
        labels = json.loads(script_args.labels) if isinstance(script_args.labels, str) else script_args.labels
        pipeline = small_pipeline(
            train_dataset["prompt"], labels or LABELS, image_channels=image_channels, image_size=image.height
        )
        if script_args.vae_name_or_path is not None:
            vae = type(pipeline.vae).from_pretrained(
                script_args.vae_name_or_path, revision=script_args.vae_revision, use_safetensors=True
            )
            pipeline.register_modules(vae=vae)
    else:
        pipeline = OneRewardMaskPipeline.from_pretrained(script_args.model_name_or_path, revision=script_args.revision)

    if script_args.vae_max_steps > 0:
        vae_args = VAEConfig(
            output_dir=f"{args.output_dir}-vae",
            max_steps=script_args.vae_max_steps,
            learning_rate=script_args.vae_learning_rate,
            per_device_train_batch_size=args.per_device_train_batch_size,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            use_cpu=args.use_cpu,
            bf16=args.bf16,
            report_to=args.report_to,
            seed=args.seed,
        )
        VAETrainer(pipeline.vae, vae_args, train_dataset, eval_dataset).train()
        pipeline.vae.save_pretrained(vae_args.output_dir)

    peft_config = None
    if script_args.use_peft:
        peft_config = LoraConfig(
            r=script_args.lora_r,
            lora_alpha=script_args.lora_alpha,
            target_modules=script_args.lora_target_modules,
        )
    trainer = SFTTrainer(pipeline, args, train_dataset, eval_dataset, peft_config)
    trainer.dataset_name, trainer.dataset_revision = script_args.dataset_name, script_args.dataset_revision
    if script_args.model_name_or_path is None and script_args.vae_name_or_path is not None:
        trainer.sources = (("base_model", script_args.vae_name_or_path, script_args.vae_revision),)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.create_model_card()
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    parser = TrlParser((SFTScriptArguments, SFTConfig))
    main(*parser.parse_args_and_config())
