# /// script
# dependencies = ["onereward"]
# ///
"""
Trains the generative judge, a vision-language model that compares images, on votes. Research use only, not for
clinical use.

    accelerate launch trainers/judge.py --config trainers/configs/judge.yaml --dataset_name votes.parquet

Votes are a Parquet file written by `onereward.preferences.save_votes` or a data set on the Hub with the same columns.
The judge is asked for the criteria that were voted on. A part of the cases is held out to evaluate on.
"""

import json
from dataclasses import dataclass, field

import torch
from peft import LoraConfig
from trl import TrlParser

from onereward.data.schema import split_by_case
from onereward.preferences import load_votes
from onereward.rewards.judge import QUESTION, GenerativeJudge
from onereward.trainers.judge import JudgeConfig, JudgeTrainer


@dataclass
class JudgeScriptArguments:
    """Model and data of `trainers/judge.py`."""

    dataset_name: str = field(metadata={"help": "Parquet file of votes, or a data set of votes on the Hub."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of the votes on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a data set on the Hub."})
    eval_fraction: float = field(default=0.2, metadata={"help": "Share of the cases to hold out."})
    model_name_or_path: str = field(
        default="Qwen/Qwen2.5-VL-7B-Instruct", metadata={"help": "Image-text-to-text model, or a judge to train on."}
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of that model on the Hub."})
    dtype: str = field(default="bfloat16", metadata={"help": "Of the weights that stay frozen."})
    processor_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Of the processor, such as the pixels that a picture is brought to, see judge.yaml."},
    )
    question: str = field(default=QUESTION, metadata={"help": "The question, see `GenerativeJudge`."})
    prompt_criteria: list[str] = field(
        default_factory=lambda: ["text_alignment"], metadata={"help": "Criteria whose question quotes the prompt."}
    )
    outline: bool = field(default=False, metadata={"help": "Draw the outline of the mask into both images."})
    use_peft: bool = field(default=True, metadata={"help": "Train an adapter; else all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter, times its rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the adapter."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Layers that get an adapter."}
    )


def main(script_args: JudgeScriptArguments, args: JudgeConfig) -> None:
    torch.manual_seed(args.seed)
    votes = load_votes(
        script_args.dataset_name,
        criteria=None,
        split=script_args.dataset_train_split,
        revision=script_args.dataset_revision,
    )
    fractions = {"train": 1 - script_args.eval_fraction, "eval": script_args.eval_fraction}
    parts = split_by_case(votes, fractions, seed=args.seed)
    processor_kwargs = script_args.processor_kwargs
    judge = GenerativeJudge.from_pretrained(
        script_args.model_name_or_path,
        revision=script_args.revision,
        is_trainable=True,
        model_kwargs={"dtype": script_args.dtype},
        processor_kwargs=json.loads(processor_kwargs) if isinstance(processor_kwargs, str) else processor_kwargs,
        criteria=list(dict.fromkeys(votes["criterion"])),
        question=script_args.question,
        prompt_criteria=script_args.prompt_criteria,
        outline=script_args.outline,
    )
    adapter = None
    if script_args.use_peft and not hasattr(judge.model, "peft_config"):
        modules = script_args.lora_target_modules
        adapter = LoraConfig(
            r=script_args.lora_r,
            lora_alpha=script_args.lora_alpha,
            lora_dropout=script_args.lora_dropout,
            target_modules=modules[0] if len(modules) == 1 else modules,  # "all-linear" is a word, not a name
        )
    trainer = JudgeTrainer(judge, args, parts["train"], parts["eval"], peft_config=adapter)
    trainer.dataset_name, trainer.dataset_revision = script_args.dataset_name, script_args.dataset_revision
    trainer.sources = (("backbone", script_args.model_name_or_path, script_args.revision),)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_model()
    trainer.create_model_card()
    if args.push_to_hub:
        trainer.push_to_hub()


def parser() -> TrlParser:
    return TrlParser((JudgeScriptArguments, JudgeConfig))


if __name__ == "__main__":
    main(*parser().parse_args_and_config())
