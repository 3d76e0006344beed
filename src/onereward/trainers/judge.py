"""Trains the generative judge on votes."""

import shlex
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig, PeftModel, get_peft_model
from scipy.special import expit, xlogy
from torch.utils.data import Dataset
from transformers import EvalPrediction, TrainerCallback, TrainingArguments, set_seed

from onereward.data.schema import TASKS
from onereward.hub.cards import TAGS, render_card, shown_command, table
from onereward.hub.environment import current_environment, source_commit
from onereward.preferences import pairs_for_training
from onereward.rewards.judge import GenerativeJudge, judge_loss
from onereward.trainers.hub import HubTrainer


@dataclass
class JudgeConfig(TrainingArguments):
    r"""
    Configuration of [`JudgeTrainer`]. Only what differs from [`~transformers.TrainingArguments`] is listed.

    Args:
        learning_rate (`float`, *optional*, defaults to `1e-4`):
            Peak learning rate of AdamW, for LoRA. OneReward fine-tunes Qwen2.5-VL-7B with `1e-6`.
        lr_scheduler_type (`str`, *optional*, defaults to `"cosine"`):
            Learning-rate schedule. Not known of OneReward.
        warmup_steps (`float`, *optional*, defaults to `0.05`):
            Steps of linear warm-up; below 1, a share of all steps. Not known of OneReward.
        num_train_epochs (`float`, *optional*, defaults to `1`):
            Passes over the pairs. Not known of OneReward.
        per_device_train_batch_size (`int`, *optional*, defaults to `2`):
            Pairs per step and device; each is asked about in both orders.
        gradient_accumulation_steps (`int`, *optional*, defaults to `8`):
            Steps that make an update: with the batch size above 16 pairs, as in OneReward.
    """

    output_dir: str | None = field(default="judge", metadata={"help": "Where the judge is written."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up; below 1, a share of all steps."})
    num_train_epochs: float = field(default=1, metadata={"help": "Passes over the pairs."})
    per_device_train_batch_size: int = field(default=2, metadata={"help": "Pairs per step and device."})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Pairs per evaluation step and device."})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "Steps that make an update."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "The questions read the columns."})


class JudgePairs(Dataset):
    r"""
    Votes as questions: one row for each pair and criterion, with the votes of all raters counted.

    Args:
        votes (`datasets.Dataset`):
            Rows of `VOTE_FEATURES`.
        criteria (`list[str]`):
            Criteria to ask for; votes on others are left out.

    Raises:
        `ValueError`: when there is no vote on any of them.
    """

    def __init__(self, votes: datasets.Dataset, criteria: list[str]):
        self.rows = pairs_for_training(votes, tuple(criteria), both_orders=False)  # the collator makes the other one
        self.questions = [
            (index, criterion, count)
            for index, counts in enumerate(self.rows["counts"])
            for criterion, count in zip(criteria, counts, strict=True)
            if sum(count)
        ]
        votes_of = zip(votes["rater_role"], votes["rater"], votes["criterion"], votes["kind"], strict=True)
        people = {(role, rater) for role, rater, name, kind in votes_of if name in criteria and kind == "pair"}
        self.raters = Counter(role for role, _ in people)  # for the card

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict:
        row, criterion, counts = self.questions[index]
        return {**self.rows[row], "criterion": criterion, "counts": counts}


def judge_metrics(log_odds: np.ndarray, counts: np.ndarray, kinds: list[tuple[str, str]]) -> dict[str, float]:
    r"""
    How well a judge predicts votes, and how little it cares for the order of the images.

    Args:
        log_odds (`np.ndarray` of shape `(P, 2)`):
            logit(Yes) - logit(No) for each pair as it is, and with its sides swapped.
        counts (`np.ndarray` of shape `(P, 3)`):
            Votes on each pair (first wins, tie, second wins).
        kinds (`list[tuple[str, str]]`):
            Task and criterion of each pair.

    Returns:
        `dict[str, float]`, with p = (P(a, b) + 1 - P(b, a)) / 2:

        - `accuracy/...`: for each criterion, and where there are several tasks for each `task/criterion`, the share of
          the decided votes (no ties) for the image with p above 1/2; `accuracy` is the mean over the criteria.
        - `log_loss/...`: mean negative log-likelihood in nats of the votes under p, a tie counting as half a vote for
          either; always 1/2 gives 0.693.
        - `order_swap_gap`: mean of |P(a, b) + P(b, a) - 1|, 0 at best.
        - `order_swap_agreement`: share of the pairs where both orders name the same winner.

        What has no decided vote has no accuracy.
    """
    as_is, swapped = expit(log_odds.astype(float)).T
    p = (as_is + 1 - swapped) / 2
    wins, ties, losses = counts.astype(float).T
    right = np.where(p > 0.5, wins, np.where(p < 0.5, losses, (wins + losses) / 2))
    metrics, of_criteria = {}, {}
    several_tasks = len({task for task, _ in kinds}) > 1
    for kind in sorted(set(kinds)) if several_tasks else []:
        mine = np.array([other == kind for other in kinds])
        if (wins + losses)[mine].sum() > 0:
            metrics[f"accuracy/{'/'.join(kind)}"] = float(right[mine].sum() / (wins + losses)[mine].sum())
    for name in dict.fromkeys(criterion for _, criterion in kinds):
        mine = np.array([criterion == name for _, criterion in kinds])
        log_likelihood = xlogy(wins + ties / 2, p) + xlogy(losses + ties / 2, 1 - p)
        metrics[f"log_loss/{name}"] = float(-log_likelihood[mine].sum() / counts[mine].sum())
        if (wins + losses)[mine].sum() > 0:
            of_criteria[f"accuracy/{name}"] = float(right[mine].sum() / (wins + losses)[mine].sum())
    if of_criteria:
        metrics = {"accuracy": float(np.mean(list(of_criteria.values()))), **of_criteria, **metrics}
    return metrics | {
        "order_swap_gap": float(np.abs(as_is + swapped - 1).mean()),
        "order_swap_agreement": float(((log_odds[:, 0] > 0) == (log_odds[:, 1] < 0)).mean()),
    }


class JudgeTrainer(HubTrainer):
    r"""
    Trains a [`~onereward.rewards.judge.GenerativeJudge`] on votes, each pair in both orders, with the cross entropy of
    its answer ([`~onereward.rewards.judge.judge_loss`]); a tie is a label of one half.

    Evaluation reports what [`judge_metrics`] returns. Hold out whole cases (see `split_by_case`). What it saves is
    loaded by [`~onereward.rewards.judge.GenerativeJudge.from_pretrained`]: with `peft_config` the adapter alone.

    Args:
        judge ([`~onereward.rewards.judge.GenerativeJudge`]):
            The judge, trained in place.
        args ([`JudgeConfig`], *optional*):
            Configuration of the training.
        train_dataset (`datasets.Dataset`):
            Votes in the schema of `onereward.preferences`.
        eval_dataset (`datasets.Dataset`, *optional*):
            Votes on other cases.
        peft_config (`PeftConfig`, *optional*):
            Adapter to train. Without it the judge's own adapter is trained on, or all its weights if it has none.
        callbacks (`list[TrainerCallback]`, *optional*):
            Further callbacks.

    Raises:
        `ValueError`: when `peft_config` comes for a judge that has an adapter, or nothing is left to train.

    Example:

    ```python
    >>> from peft import LoraConfig
    >>> from onereward.rewards.judge import GenerativeJudge
    >>> from onereward.trainers.judge import JudgeConfig, JudgeTrainer

    >>> judge = GenerativeJudge.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct", model_kwargs={"dtype": "bfloat16"})
    >>> adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    >>> trainer = JudgeTrainer(judge, JudgeConfig("judge"), train_votes, validation_votes, peft_config=adapter)
    >>> trainer.train()
    >>> trainer.evaluate()["eval_accuracy"]
    >>> trainer.save_model()
    ```
    """

    kind, data_role = "reward-model", "votes"

    def __init__(
        self,
        judge: GenerativeJudge,
        args: JudgeConfig | None = None,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        args = args or JudgeConfig()
        if isinstance(judge.model, PeftModel):
            if peft_config is not None:
                raise ValueError(
                    "`peft_config` is given, but the judge has an adapter already. Leave `peft_config` out to train "
                    "that adapter on, or load the judge without it."
                )
        elif peft_config is not None:
            set_seed(args.seed)  # the adapter's first weights are random
            judge.model = get_peft_model(judge.model, peft_config)
        else:
            judge.model.requires_grad_(True)
        if not any(parameter.requires_grad for parameter in judge.model.parameters()):
            raise ValueError(
                "No weight of the judge can be trained. Load its adapter with "
                "`GenerativeJudge.from_pretrained(..., is_trainable=True)`, or pass a `peft_config`."
            )
        self.judge, self.votes = judge, train_dataset
        criteria = judge.criteria.values() if isinstance(judge.criteria, dict) else [judge.criteria]
        self.criteria = list(dict.fromkeys(name for names in criteria for name in names))
        super().__init__(
            model=judge.model,
            args=args,
            train_dataset=train_dataset and JudgePairs(train_dataset, self.criteria),
            eval_dataset=eval_dataset and JudgePairs(eval_dataset, self.criteria),
            data_collator=self.collate,
            callbacks=callbacks,
            compute_metrics=self.compute_judge_metrics,
        )

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """
        Rows of [`JudgePairs`] as inputs of the model: B questions with the pairs as they are, then B with their sides
        swapped; `counts`, `(B, 3)`, votes (first wins, tie, second wins); `kinds`, `(B, 2)`, numbers of task and
        criterion.
        """
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        first, second = columns["image_0"], columns["image_1"]
        twice = {
            name: 2 * columns[column]
            for name, column in {
                "masks": "mask",
                "sources": "image",
                "prompts": "prompt",
                "tasks": "task",
                "criterion": "criterion",
            }.items()
        }
        inputs = self.judge.prepare_inputs(first + second, second + first, **twice)
        kinds = [(TASKS.index(row["task"]), self.criteria.index(row["criterion"])) for row in rows]
        return {**inputs, "counts": torch.tensor(columns["counts"]).float(), "kinds": torch.tensor(kinds)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        counts, _ = inputs.pop("counts"), inputs.pop("kinds")
        log_odds = self.judge.log_odds(inputs, model).view(2, -1).T
        votes = counts.sum(dim=1)
        first_wins = (counts[:, 0] + counts[:, 1] / 2) / votes
        labels = torch.stack([first_wins, 1 - first_wins], dim=1)
        loss = judge_loss(log_odds, labels, votes[:, None].expand(-1, 2))
        return (loss, log_odds) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, log_odds = self.compute_loss(model, inputs, return_outputs=True)
        return loss, log_odds.contiguous(), (inputs["counts"], inputs["kinds"])

    def compute_judge_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        counts, kinds = prediction.label_ids
        kinds = [(TASKS[task], self.criteria[criterion]) for task, criterion in kinds]
        return judge_metrics(prediction.predictions, counts, kinds)

    def _save(self, output_dir: str | None = None, state_dict=None):
        # `Trainer` would add its arguments as a pickle, which has no place in a published folder.
        if self.args.should_save:
            self.judge.save_pretrained(output_dir or self.args.output_dir)

    # ------------------------------------------------------------------------------------------------ card and origin

    def loaded_from(self) -> list[tuple[str, str, str | None]]:
        adapters = getattr(self.model, "peft_config", {})
        config = self.model.config
        name = next(iter(adapters.values())).base_model_name_or_path if adapters else config._name_or_path
        return [("backbone", name, getattr(config, "_commit_hash", None))] if name else []

    def training_data(self) -> datasets.Dataset:
        return self.votes

    def provenance_besides(self) -> dict:
        return {"criteria": self.criteria}

    def model_card(self, model_name: str | None = None, dataset_name: str | None = None, **fields) -> ModelCard:
        args, pairs = self.args, self.train_dataset
        evaluations = [entry for entry in self.state.log_history if "eval_order_swap_gap" in entry]
        last = evaluations[-1] if evaluations else {}
        evaluation = {
            criterion: {measure: last.get(f"eval_{measure}/{criterion}") for measure in ("accuracy", "log_loss")}
            for criterion in self.criteria
        }
        evaluation["all, both orders"] = {
            measure: last.get(f"eval_order_swap_{measure}") for measure in ("gap", "agreement")
        }
        people = {role: count for role, count in pairs.raters.items() if role != "simulated"}
        adapters = getattr(self.model, "peft_config", {})
        base = next(iter(adapters.values())).base_model_name_or_path if adapters else None
        fields = {
            "limits": ["It likes what its raters liked; on images unlike those they saw it can be fooled."],
            "eval_dataset": f"{len(self.eval_dataset or [])} questions on pairs of unseen cases",
            "evaluation_table": table(evaluation),
            "command": shown_command(shlex.join(sys.argv)),
            "seed": args.seed,
            "commit": source_commit(),
            "environment": current_environment(),
            "num_votes": int(sum(sum(count) for _, _, count in pairs.questions)),
            "simulated_raters": pairs.raters.get("simulated", 0),
            "human_raters": sum(people.values()),
            "human_roles": sorted(people),
            **fields,
        }
        metadata = ModelCardData(
            library_name="peft" if adapters else "transformers",
            pipeline_tag="image-text-to-text",
            base_model=base,
            tags=["reward-model", *TAGS],
        )
        text = CARD.format(
            metadata=metadata.to_yaml(),
            name=model_name or Path(args.output_dir).name,
            criteria=", ".join(self.criteria),
            criterion=self.criteria[0],
            question=self.judge.question,
            repo_id=self.hub_model_id or args.output_dir,
            updates=self.state.global_step,
            questions=len(pairs),
            dataset=dataset_name or self.dataset_name or "an unnamed data set",
            **{name: render_card(name, **fields).text.strip() for name in CARD_PARTS},
        )
        return ModelCard(text)


CARD_PARTS = ("intended_use", "raters", "evaluation", "provenance")
CARD = """---
{metadata}
---

# {name}

**Research use only, not for clinical use.**

A judge of mask-guided medical images by {criteria}: a vision-language model that sees two images and
answers Yes or No:

```text
{question}
```

The reward is the probability of Yes, renormalised over both answers
([OneReward](https://huggingface.co/papers/2508.21066)).

## How to use

```python
from diffusers.utils import load_image

from onereward.rewards.judge import GenerativeJudge

judge = GenerativeJudge.from_pretrained("{repo_id}")
first, second = load_image("generated.png"), load_image("image.png")
# one probability for each pair, here one, that the first is better
print(judge.compare([first], [second], tasks=["fill"], criterion="{criterion}"))
```

The judge can be passed to `DDPOTrainer(reward_funcs=judge)` as it is.

{intended_use}

## Training

{updates} updates on {questions} questions, each asked in both orders, from the votes of {dataset}.

{raters}

{evaluation}

{provenance}
"""
