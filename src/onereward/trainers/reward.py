"""Trains the reward model on votes."""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from scipy.optimize import minimize_scalar
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from onereward.data.schema import rows_to_tensors
from onereward.hub.cards import reward_model_card, save_card, source_commit
from onereward.preferences import best_possible_accuracy, pairs_for_training
from onereward.rewards.losses import davidson_log_probabilities, preference_loss
from onereward.rewards.modeling_onereward import OneRewardModel


@dataclass
class RewardConfig(TrainingArguments):
    r"""
    Configuration of [`RewardTrainer`]. Only what differs from [`~transformers.TrainingArguments`] is listed.

    Args:
        learning_rate (`float`, *optional*, defaults to `2e-3`):
            Peak learning rate of AdamW, for a backbone trained from scratch; a pretrained one wants `1e-4` or less.
        weight_decay (`float`, *optional*, defaults to `0.05`):
            Weight decay of AdamW.
        warmup_steps (`float`, *optional*, defaults to `0.1`):
            Steps of linear warm-up; below 1, a share of all steps.
        lr_scheduler_type (`str`, *optional*, defaults to `"cosine"`):
            Learning-rate schedule.
        num_train_epochs (`float`, *optional*, defaults to `10`):
            Passes over the pairs.
        per_device_train_batch_size (`int`, *optional*, defaults to `64`):
            Pairs per step and device. Pairs of one condition come together, and an image they share is encoded once.
        flip_probability (`float`, *optional*, defaults to `0.5`):
            Probability that a batch is mirrored left to right in training. Set it to 0 where sides differ (the heart
            in a chest radiograph).
    """

    output_dir: str | None = field(default="reward_model", metadata={"help": "Where the model is written."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of AdamW."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up; below 1, a share of all steps."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    num_train_epochs: float = field(default=10, metadata={"help": "Passes over the pairs."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Pairs per step and device."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Pairs per evaluation step and device."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "The pairs read the columns."})
    flip_probability: float = field(default=0.5, metadata={"help": "Probability of a left-right flip in training."})


class PreferencePairs(Dataset):
    r"""
    Votes as pairs of candidates, with the votes of all raters counted. A batch holds each of its candidates once,
    however many of its pairs show it.

    Args:
        votes (`datasets.Dataset`):
            One row per vote, criterion and rater, in the schema of `onereward.preferences`. Votes on criteria that are
            not asked for are left out.
        criteria (`list[str]`):
            The criteria, in the order of the model's heads.

    Raises:
        `ValueError`: when a criterion has no vote.
    """

    PICTURES = ("image", "mask", "label_map", "image_0", "image_1")

    def __init__(self, votes: datasets.Dataset, criteria: list[str]):
        # One order is enough: the model scores each image alone, so the other order has the same loss.
        self.rows = pairs_for_training(votes, tuple(criteria), both_orders=False)
        self.counts = torch.tensor(self.rows["counts"], dtype=torch.float32)
        for criterion, count in zip(criteria, self.counts.sum(dim=(0, 2)), strict=True):
            if count == 0:
                raise ValueError(
                    f"No vote is on {criterion!r}; the votes are on {sorted(set(votes['criterion']))}. Give the "
                    "model's config the `criteria` that were voted on."
                )
        _, self.cases = np.unique(self.rows["case_id"], return_inverse=True)
        people = set(zip(votes["rater_role"], votes["rater"], strict=True))
        self.raters = Counter(role for role, _ in people)  # for the card

        # equal pictures are one: a candidate is numbered where it first appears
        encoded = self.rows.select_columns([*self.PICTURES, "prompt", "task"])
        for column in self.PICTURES:
            encoded = encoded.cast_column(column, datasets.Image(decode=False))
        conditions, candidates = {}, {}
        self.conditions, self.pairs, self.candidates = [], [], []
        for index, row in enumerate(encoded):
            files = {column: row[column] and (row[column]["bytes"] or row[column]["path"]) for column in self.PICTURES}
            shown = files["image"], files["mask"], files["label_map"], row["prompt"], row["task"]
            condition = conditions.setdefault(hash(shown), len(conditions))
            pair = []
            for side in ("image_0", "image_1"):
                key = condition, hash(files[side])
                if key not in candidates:
                    candidates[key] = len(candidates)
                    self.candidates.append((index, side))
                pair.append(candidates[key])
            self.conditions.append(condition)
            self.pairs.append(pair)

    def __len__(self) -> int:
        return len(self.pairs)

    def decode(self, candidates: list[int]) -> dict:
        """The candidates with these numbers, as arguments of [`~OneRewardModel.prepare_inputs`]."""
        rows = []
        for index, side in (self.candidates[candidate] for candidate in candidates):
            row = self.rows[index]
            nothing_asked = Image.new("L", row["mask"].size)
            # a candidate takes the place of the truth
            rows.append({**row, "target": row[side], "label_map": row["label_map"] or nothing_asked})
        batch = rows_to_tensors(rows)
        return {"sources": batch.pop("images"), "images": batch.pop("targets"), **batch}

    def __getitems__(self, indices: list[int]) -> dict:
        """
        A batch of P pairs.

        Returns:
            `dict`: `candidates`, the N distinct candidates of all pairs; `pairs`, `(P, 2)`, where each pair finds its
            two among them; `counts`, `(P, criteria, 3)`, votes (first wins, tie, second wins); `cases`, `(P,)`.
        """
        candidates, pairs = torch.tensor([self.pairs[index] for index in indices]).unique(return_inverse=True)
        return {
            "pairs": pairs,
            "counts": self.counts[indices],
            "cases": torch.tensor(self.cases[indices]),
            "candidates": self.decode(candidates.tolist()),
        }


def _as_is(batch):
    return batch  # `PreferencePairs` makes whole batches


class ConditionSampler(Sampler):
    """A new order of the pairs each epoch that keeps the pairs of one condition together."""

    def __init__(self, conditions: list[int], seed: int):
        self.conditions, self.seed, self.epoch = torch.tensor(conditions), seed, 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.conditions)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        keys = torch.rand(int(self.conditions.max()) + 1, generator=generator)
        yield from keys[self.conditions].argsort(stable=True).tolist()


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray, total: np.ndarray, bins: int = 10) -> float:
    r"""
    sum over bins of n_bin / n |accuracy - mean confidence|, with equal bins of the confidence from 1/2 to 1
    (https://huggingface.co/papers/1706.04599, equation 3).

    Args:
        confidence (`np.ndarray` of shape `(P,)`): probability of the image held to be the better one, 1/2 to 1.
        right, total (`np.ndarray` of shape `(P,)`): votes for that image, and all decided votes on the pair.
        bins (`int`, *optional*, defaults to 10): number of bins.
    """
    where = np.minimum(((2 * confidence - 1) * bins).astype(int), bins - 1)
    gaps = np.bincount(where, weights=right - total * confidence, minlength=bins)
    return float(np.abs(gaps).sum() / total.sum())


def fit_temperature(difference: np.ndarray, wins: np.ndarray, losses: np.ndarray) -> float:
    r"""
    The temperature T > 0 under which sigmoid(d / T) explains the decided votes best
    (https://huggingface.co/papers/1706.04599, section 4.2). Above 1, the model is too sure of itself.

    Args:
        difference (`np.ndarray` of shape `(P,)`): differences d of logits.
        wins, losses (`np.ndarray` of shape `(P,)`): votes for the first and for the second image.
    """

    def negative_log_likelihood(log_temperature):
        d = difference / np.exp(log_temperature)
        return (wins * np.logaddexp(0, -d) + losses * np.logaddexp(0, d)).sum()

    return float(np.exp(minimize_scalar(negative_log_likelihood, bounds=(-4, 4), method="bounded").x))


def preference_metrics(
    difference: np.ndarray, log_nu: np.ndarray, counts: np.ndarray, cases: np.ndarray, criteria: list[str]
) -> dict[str, float]:
    r"""
    How well differences of logits predict votes, for each criterion.

    Args:
        difference (`np.ndarray` of shape `(P, H)`): logit of the first image minus logit of the second.
        log_nu (`np.ndarray` of shape `(H,)`): logarithm of the prevalence of ties.
        counts (`np.ndarray` of shape `(P, H, 3)`): votes (first wins, tie, second wins).
        cases (`np.ndarray` of shape `(P,)`): number of the case of each pair.
        criteria (`list[str]`): the names of the H criteria.

    Returns:
        `dict[str, float]`: `accuracy` (mean over criteria), and for each criterion

        - `accuracy/...`: share of the decided votes (no ties) for the image with the higher logit.
        - `log_loss/...`: mean negative log-likelihood of all votes in nats; always predicting 1/3 gives 1.099.
        - `ece/...`: expected calibration error of the decided votes.
        - `temperature/...`: [`fit_temperature`] on these votes.
        - `ece_calibrated/...`: the same error with the temperature, fitted on one half of the cases and measured on
          the other, both ways.

        A criterion without decided votes has no entry but its `log_loss`, and that only where it has ties.
    """
    log_probabilities = davidson_log_probabilities(torch.from_numpy(difference), torch.from_numpy(log_nu)).numpy()
    metrics = {}
    for head, criterion in enumerate(criteria):
        d, (wins, ties, losses) = difference[:, head], counts[:, head].T
        if wins.sum() + ties.sum() + losses.sum() > 0:
            log_likelihood = (counts[:, head] * log_probabilities[:, head]).sum()
            metrics[f"log_loss/{criterion}"] = float(-log_likelihood / counts[:, head].sum())
        decided = wins + losses
        if decided.sum() == 0:
            continue
        right = np.where(d > 0, wins, np.where(d < 0, losses, decided / 2))
        metrics[f"accuracy/{criterion}"] = float(right.sum() / decided.sum())
        metrics[f"ece/{criterion}"] = expected_calibration_error(_sigmoid(np.abs(d)), right, decided)
        metrics[f"temperature/{criterion}"] = fit_temperature(d, wins, losses)
        confidence = _sigmoid(np.abs(d))
        for half in (0, 1):
            fit, use = cases % 2 != half, cases % 2 == half
            if decided[fit].sum() > 0:
                confidence[use] = _sigmoid(np.abs(d[use]) / fit_temperature(d[fit], wins[fit], losses[fit]))
        metrics[f"ece_calibrated/{criterion}"] = expected_calibration_error(confidence, right, decided)
    accuracies = [value for name, value in metrics.items() if name.startswith("accuracy/")]
    return {"accuracy": float(np.mean(accuracies)), **metrics} if accuracies else metrics


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class RewardTrainer(Trainer):
    r"""
    Trains a [`OneRewardModel`] on votes with the Bradley-Terry model with ties, all criteria at once. After training
    it stores each head's mean and standard deviation over the training images in the model, so that rewards of
    different heads are on one scale.

    Evaluation reports what [`preference_metrics`] returns. Hold out whole cases (see `split_by_case`).

    Args:
        model ([`OneRewardModel`]):
            The model, trained in place.
        args ([`RewardConfig`], *optional*):
            Configuration of the training.
        train_dataset (`datasets.Dataset`):
            Votes in the schema of `onereward.preferences`.
        eval_dataset (`datasets.Dataset`, *optional*):
            Votes on other cases.
        eval_truths (`datasets.Dataset`, *optional*):
            The truths that [`~onereward.preferences.simulate_votes`] returned with `eval_dataset`, for simulated
            votes only. Evaluation then reports `ceiling/...` too, the accuracy nobody can beat.
        callbacks (`list[TrainerCallback]`, *optional*):
            Further callbacks.

    Example:

    ```python
    >>> from onereward import OneRewardConfig, OneRewardModel, RewardConfig, RewardTrainer

    >>> model = OneRewardModel(OneRewardConfig(labels={"background": 0, "NCR": 1, "ED": 2, "ET": 3}))
    >>> trainer = RewardTrainer(model, RewardConfig(output_dir="reward_model"), train_votes, validation_votes)
    >>> trainer.train()
    >>> trainer.evaluate()["eval_accuracy/quality"]
    >>> trainer.save_model()
    ```
    """

    def __init__(
        self,
        model: OneRewardModel,
        args: RewardConfig | None = None,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | None = None,
        eval_truths: datasets.Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        criteria = model.config.criteria
        self.ceiling = best_possible_accuracy(eval_dataset, eval_truths) if eval_truths else {}
        super().__init__(
            model=model,
            args=args or RewardConfig(),
            train_dataset=train_dataset and PreferencePairs(train_dataset, criteria),
            eval_dataset=eval_dataset and PreferencePairs(eval_dataset, criteria),
            data_collator=_as_is,
            callbacks=callbacks,
            compute_metrics=self.compute_preference_metrics,
        )

    def _get_train_sampler(self, train_dataset=None):
        return ConditionSampler(self.train_dataset.conditions, self.args.data_seed or self.args.seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pairs, counts, candidates = inputs["pairs"], inputs["counts"], inputs["candidates"]
        tensors = self.accelerator.unwrap_model(model).prepare_inputs(**candidates)
        if model.training and torch.rand(()) < self.args.flip_probability:
            tensors["pixel_values"] = tensors["pixel_values"].flip(-1)
        outputs = model(**tensors)
        difference = outputs.logits[pairs[:, 0]] - outputs.logits[pairs[:, 1]]
        loss = preference_loss(difference, outputs.log_nu, counts)
        return (loss, difference) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, difference = self.compute_loss(model, inputs, return_outputs=True)
        return loss, difference.float(), (inputs["counts"], inputs["cases"])

    def compute_preference_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        counts, cases = prediction.label_ids
        log_nu = self.model.log_nu.detach().float().cpu().numpy()
        metrics = preference_metrics(prediction.predictions, log_nu, counts, cases, self.model.config.criteria)
        return metrics | {f"ceiling/{criterion}": value for criterion, value in self.ceiling.items()}

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        self.standardize()
        return output

    @torch.no_grad()
    def standardize(self):
        """Store the mean and standard deviation of each head's logits over the training images in the model."""
        self.model.eval()
        numbers = range(len(self.train_dataset.candidates))
        size = 2 * self.args.eval_batch_size
        logits = torch.cat(
            [
                self.model(
                    **self.model.prepare_inputs(**self.train_dataset.decode(numbers[start : start + size]))
                ).logits
                for start in tqdm(numbers[::size], desc="Standardizing", disable=self.args.disable_tqdm, leave=False)
            ]
        ).float()
        self.model.logit_mean.copy_(logits.mean(dim=0))
        self.model.logit_std.copy_(logits.std(dim=0).clamp(min=1e-6))

    def _save(self, output_dir: str | None = None, state_dict=None):
        # `Trainer` would add its arguments as a pickle, which has no place in a published folder.
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir or self.args.output_dir)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: list[str] | None = None, **fields
    ) -> None:
        """
        Write the card of the reward model, with the last evaluation, to `args.output_dir`.

        Args:
            model_name (`str`, *optional*):
                Title of the card. Defaults to the name of `args.output_dir`.
            dataset_name (`str`, *optional*):
                Name of the votes.
            tags (`list[str]`, *optional*):
                Unused: the tags of the card are those of all our reward models.
            **fields:
                Further fields of [`~onereward.hub.cards.reward_model_card`], in place of the trainer's own.
        """
        if not self.is_world_process_zero():
            return
        args, criteria = self.args, self.model.config.criteria
        measures = {"pair_accuracy": "accuracy", "ceiling": "ceiling", "log_loss": "log_loss", "ece": "ece_calibrated"}
        evaluations = [entry for entry in self.state.log_history if "eval_accuracy" in entry]
        card = reward_model_card(
            **{
                "name": model_name or Path(args.output_dir).name,
                "criteria": criteria,
                "repo_id": self.hub_model_id or args.output_dir,
                "training_data": (
                    f"{self.state.global_step} updates on {len(self.train_dataset)} pairs of "
                    f"{dataset_name or 'an unnamed data set'}, by the Bradley-Terry model with ties (Davidson, 1970)."
                ),
                "raters": self.train_dataset.raters,
                "num_votes": int(self.train_dataset.counts.sum()),
                "evaluation": {
                    criterion: {
                        name: evaluations[-1].get(f"eval_{measure}/{criterion}") for name, measure in measures.items()
                    }
                    for criterion in criteria
                }
                if evaluations
                else {},
                "eval_dataset": f"votes on {len(self.eval_dataset or [])} pairs of unseen cases",
                "command": " ".join(sys.argv),
                "seed": args.seed,
                "limits": ["It likes what its raters liked; on images unlike those they saw it can be fooled."],
                "commit": source_commit(),
                **fields,
            }
        )
        save_card(card, args.output_dir)
