"""Trains the reward model on votes."""

import copy
import shlex
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate.utils import broadcast
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize_scalar
from scipy.stats import spearmanr
from torch import nn
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm
from transformers import EvalPrediction, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from onereward.data.schema import rows_to_tensors
from onereward.data.whole_file import whole_file
from onereward.hub.cards import reward_model_card
from onereward.hub.data_cards import vote_agreement
from onereward.hub.environment import source_commit
from onereward.preferences import best_possible_accuracy
from onereward.rewards.configuration_onereward import OneRewardConfig
from onereward.rewards.laplace import fisher_information, last_layer_posterior
from onereward.rewards.losses import NO_TIES, davidson_log_probabilities, preference_loss, smoothed
from onereward.rewards.modeling_onereward import OneRewardModel, OneRewardOutput
from onereward.rewards.rater_terms import RaterTerms
from onereward.trainers.hub import HubTrainer


TRAINING_STATE = "training_state.safetensors"  # of a checkpoint: what is trained but not published


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
            Questions per step and device, pairs or rated images. Those on one condition come together, and an image
            they share is encoded once.
        flip_probability (`float`, *optional*, defaults to `0.5`):
            Probability that a batch is mirrored left to right in training. Set it to 0 where sides differ (the heart
            in a chest radiograph).
        rater_learning_rate (`float`, *optional*, defaults to `0.005`):
            Peak learning rate of the raters' habits, see [`RaterTerms`]; 0 takes all raters to be alike.
        label_smoothing_factor (`float`, *optional*, defaults to `0.0`):
            Probability with which a vote is taken to be for the wrong side, a slip; below 1/2.
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
    rater_learning_rate: float = field(default=0.005, metadata={"help": "Peak learning rate of the raters' habits."})


class Questions(Dataset):
    r"""
    What raters were asked: which of two candidates is better, or how good one is, with the answers of them all. A
    batch holds each of its candidates once, however many of its questions show it.

    Args:
        votes (`datasets.Dataset`):
            One row per vote, criterion and rater, in the schema of `onereward.preferences`, on pairs and ratings of
            single images alike. Votes on criteria that the model has not are left out.
        config ([`OneRewardConfig`]):
            Of the model: its criteria, in the order of its heads, and which tasks they are for.

    Raises:
        `ValueError`: when no vote is on a criterion of the model, a vote is on a criterion that its task is not judged
            by, or votes on one `pair_id` are on different things.
    """

    PICTURES = ("image", "mask", "label_map", "image_0", "image_1")

    def __init__(self, votes: datasets.Dataset, config: OneRewardConfig):
        criteria = config.criteria
        plain = votes.select_columns([name for name in votes.column_names if name not in self.PICTURES]).to_dict()
        first_rows: dict[str, int] = {}
        answers: dict[tuple[str, str, int], tuple[np.ndarray, list[list[float]]]] = {}
        people = set()
        for row, vote in enumerate(
            dict(zip(plain, values, strict=True)) for values in zip(*plain.values(), strict=True)
        ):
            if vote["criterion"] not in criteria:
                continue
            if vote["criterion"] not in config.judged_by(vote["task"]):
                raise ValueError(
                    f"Row {row} is a vote on {vote['criterion']!r} of the task {vote['task']!r}, which the model "
                    f"judges by {config.judged_by(vote['task'])}. Change its `task_criteria`, or leave such votes out."
                )
            first = first_rows.setdefault(vote["pair_id"], row)
            if any(plain[name][first] != vote[name] for name in ("case_id", "kind")):
                raise ValueError(
                    f"Rows {first} and {row} share the `pair_id` {vote['pair_id']!r} but are on different cases, or "
                    "one is a pair and the other a rating."
                )
            # the image that was first may have been on either side of the screen; -1 is unknown
            side = {0: 1, 1: -1}.get(vote["left"], 0)
            counts, ratings = answers.setdefault(
                (vote["pair_id"], vote["rater"], side), (np.zeros((len(criteria), 3)), [[] for _ in criteria])
            )
            head = criteria.index(vote["criterion"])
            if vote["kind"] == "pair":
                counts[head, round(2 - 2 * vote["label_0"])] += 1  # 1, 0.5, 0: the first wins, a tie, the second wins
            else:
                low, high = vote["rating_min"], vote["rating_max"]
                ratings[head].append((vote["rating"] - low) / (high - low))
            people.add((vote["rater_role"], vote["rater"]))
        if not answers:
            raise ValueError(
                f"No vote is on any of {criteria}; the votes are on {sorted(set(votes['criterion']))}. Give the "
                "model's config the `criteria` that were voted on."
            )
        self.raters = Counter(role for role, _ in people)  # for the card
        self.rater_names = sorted({rater for _, rater in people})

        numbers = {pair: number for number, pair in enumerate(first_rows)}
        self.answers = {
            "questions": torch.tensor([numbers[pair] for pair, _, _ in answers]),
            "raters": torch.tensor([self.rater_names.index(rater) for _, rater, _ in answers]),
            "sides": torch.tensor([float(side) for _, _, side in answers]),
            "counts": torch.tensor(np.stack([counts for counts, _ in answers.values()]), dtype=torch.float32),
            "ratings": torch.tensor([[sum(r) / len(r) if r else np.nan for r in rs] for _, rs in answers.values()]),
            "num_ratings": torch.tensor([[len(r) for r in ratings] for _, ratings in answers.values()]),
        }
        self.answers_to: list[list[int]] = [[] for _ in numbers]
        for answer, question in enumerate(self.answers["questions"].tolist()):
            self.answers_to[question].append(answer)
        # of all raters together
        where, shape = self.answers["questions"], (len(numbers), len(criteria))
        self.counts = torch.zeros(*shape, 3).index_add(0, where, self.answers["counts"])
        self.num_ratings = torch.zeros(shape).index_add(0, where, self.answers["num_ratings"].float())
        total = (self.answers["ratings"] * self.answers["num_ratings"]).nan_to_num()
        self.ratings = torch.zeros(shape).index_add(0, where, total) / self.num_ratings  # NaN where there is none

        self.rows = votes.select(list(first_rows.values()))
        _, self.cases = np.unique(self.rows["case_id"], return_inverse=True)
        # equal pictures are one: a candidate is numbered where it first appears
        encoded = self.rows.select_columns([*self.PICTURES, "prompt", "task", "kind"])
        for column in self.PICTURES:
            encoded = encoded.cast_column(column, datasets.Image(decode=False))
        conditions, candidates = {}, {}
        self.conditions, pairs, self.candidates = [], [], []
        for index, row in enumerate(encoded):
            files = {column: row[column] and (row[column]["bytes"] or row[column]["path"]) for column in self.PICTURES}
            shown = files["image"], files["mask"], files["label_map"], row["prompt"], row["task"]
            condition = conditions.setdefault(hash(shown), len(conditions))
            pair = []
            for side in ("image_0", "image_1") if row["kind"] == "pair" else ("image_0", "image_0"):
                key = condition, hash(files[side])
                if key not in candidates:
                    candidates[key] = len(candidates)
                    self.candidates.append((index, side))
                pair.append(candidates[key])
            self.conditions.append(condition)
            pairs.append(pair)
        self.pairs = torch.tensor(pairs)

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
        A batch of B questions.

        Returns:
            `dict`: `candidates`, the N distinct candidates of all questions; `pairs`, `(B, 2)`, where each question
            finds its two among them, twice the same for a rating; `counts`, `(B, H, 3)`, votes (first wins, tie,
            second wins); `ratings`, `(B, H)`, the mean rating from 0 to 1, NaN without any; `cases`, `(B,)`; and
            `answers`, what each rater said: `questions`, `raters`, `sides`, `(A,)`, `counts`, `(A, H, 3)`, `ratings`
            and `num_ratings`, `(A, H)`.
        """
        candidates, pairs = self.pairs[indices].unique(return_inverse=True)
        chosen = [answer for index in indices for answer in self.answers_to[index]]
        answers = {name: values[chosen] for name, values in self.answers.items()}
        lengths = torch.tensor([len(self.answers_to[index]) for index in indices])
        answers["questions"] = torch.arange(len(indices)).repeat_interleave(lengths)
        return {
            "pairs": pairs,
            "counts": self.counts[indices],
            "ratings": self.ratings[indices],
            "cases": torch.tensor(self.cases[indices]),
            "answers": answers,
            "candidates": self.decode(candidates.tolist()),
        }


def _as_is(batch):
    return batch  # `Questions` makes whole batches


class ConditionSampler(Sampler):
    """A new order of the questions each epoch that keeps those on one condition together."""

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


def fit_temperature(
    difference: np.ndarray, wins: np.ndarray, losses: np.ndarray, variance: np.ndarray | None = None
) -> float:
    r"""
    The temperature T > 0 under which sigmoid(d / T) explains the decided votes best
    (https://huggingface.co/papers/1706.04599, section 4.2). Above 1, the model is too sure of itself.

    Args:
        difference (`np.ndarray` of shape `(P,)`): differences d of logits.
        wins, losses (`np.ndarray` of shape `(P,)`): votes for the first and for the second image.
        variance (`np.ndarray` of shape `(P,)`, *optional*): variances of d, which T^2 divides.
    """

    def negative_log_likelihood(log_temperature):
        first, second = decided_log_probabilities(difference, variance, np.exp(log_temperature))
        return -(wins * first + losses * second).sum()

    return float(np.exp(minimize_scalar(negative_log_likelihood, bounds=(-4, 4), method="bounded").x))


def decided_log_probabilities(
    difference: np.ndarray, variance: np.ndarray | None = None, temperature: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """
    Log-probabilities that the first and that the second image wins, given that there is no tie: those of
    sigmoid(+-d / T), or of its mean over d ~ N(difference, variance).
    """
    d = torch.from_numpy(np.asarray(difference, dtype=float)) / temperature
    spread = None if variance is None else torch.from_numpy(np.asarray(variance, dtype=float)) / temperature**2
    first, _, second = davidson_log_probabilities(d, torch.tensor(NO_TIES, dtype=d.dtype), spread).numpy().T
    return first, second


def preference_metrics(
    difference: np.ndarray,
    log_nu: np.ndarray,
    counts: np.ndarray,
    cases: np.ndarray,
    criteria: list[str],
    variance: np.ndarray | None = None,
) -> dict[str, float]:
    r"""
    How well differences of logits predict votes, for each criterion.

    Args:
        difference (`np.ndarray` of shape `(P, H)`): logit of the first image minus logit of the second.
        log_nu (`np.ndarray` of shape `(H,)`): logarithm of the prevalence of ties.
        counts (`np.ndarray` of shape `(P, H, 3)`): votes (first wins, tie, second wins).
        cases (`np.ndarray` of shape `(P,)`): number of the case of each pair.
        criteria (`list[str]`): the names of the H criteria.
        variance (`np.ndarray` of shape `(P, H)`, *optional*): variances of the differences, of a Gaussian head.

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
    tensors = (None if array is None else torch.from_numpy(array) for array in (difference, log_nu, variance))
    log_probabilities = davidson_log_probabilities(*tensors).numpy()
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
        spread = None if variance is None else variance[:, head]
        confidence = np.exp(decided_log_probabilities(np.abs(d), spread)[0])
        metrics[f"ece/{criterion}"] = expected_calibration_error(confidence, right, decided)
        metrics[f"temperature/{criterion}"] = fit_temperature(d, wins, losses, spread)
        for half in (0, 1):
            fit, use = cases % 2 != half, cases % 2 == half
            if decided[fit].sum() > 0:
                spreads = (None, None) if spread is None else (spread[fit], spread[use])
                temperature = fit_temperature(d[fit], wins[fit], losses[fit], spreads[0])
                confidence[use] = np.exp(decided_log_probabilities(np.abs(d[use]), spreads[1], temperature)[0])
        metrics[f"ece_calibrated/{criterion}"] = expected_calibration_error(confidence, right, decided)
    accuracies = [value for name, value in metrics.items() if name.startswith("accuracy/")]
    return {"accuracy": float(np.mean(accuracies)), **metrics} if accuracies else metrics


def rating_metrics(logits: np.ndarray, ratings: np.ndarray, criteria: list[str]) -> dict[str, float]:
    """
    How well logits order rated images: `rating_correlation/...`, Spearman's rank correlation with the mean rating, for
    each criterion with three rated images or more that are not all alike.

    Args:
        logits (`np.ndarray` of shape `(N, H)`): logits of the images.
        ratings (`np.ndarray` of shape `(N, H)`): mean ratings, NaN where there is none.
        criteria (`list[str]`): the names of the H criteria.
    """
    metrics = {}
    for head, criterion in enumerate(criteria):
        rated = np.isfinite(ratings[:, head])
        if rated.sum() >= 3 and np.ptp(ratings[rated, head]) > 0:
            correlation = spearmanr(logits[rated, head], ratings[rated, head]).statistic
            metrics[f"rating_correlation/{criterion}"] = float(correlation)
    return metrics


class _RaterTermsStep(TrainerCallback):
    """Does for the raters' terms, which are no part of the model, what `Trainer` and DDP do for its weights."""

    def __init__(self, trainer: "RewardTrainer"):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for parameter in self.trainer.rater_terms.parameters():
            if parameter.grad is not None:
                parameter.grad = self.trainer.accelerator.reduce(parameter.grad, "mean")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.rater_terms.zero_grad()


def first_layer(model: OneRewardModel) -> nn.Module:
    """The layer of the backbone that sees the input's channels."""
    channels = model.config.vision_channels
    return next(m for m in model.vision.modules() if isinstance(m, nn.Conv2d) and m.in_channels == channels)


def _votes_on(questions: Questions) -> torch.Tensor:
    """Number of votes and ratings on each criterion, `(H,)`."""
    return questions.counts.sum(dim=(0, 2)) + questions.num_ratings.sum(dim=0)


def _differences(
    outputs: OneRewardOutput, first: torch.Tensor, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Differences of the logits of pairs, `(P, H)`, and with a Gaussian head their variances."""
    difference = outputs.logits[first] - outputs.logits[second]
    if outputs.stds is None:
        return difference, None
    return difference, outputs.stds[first] ** 2 + outputs.stds[second] ** 2


class RewardTrainer(HubTrainer):
    r"""
    Trains a [`OneRewardModel`] on votes, all criteria at once: on pairs with the Bradley-Terry model with ties, on
    ratings as on shares of a vote against a bar, and beside it the habits of the raters ([`RaterTerms`]), which are
    not saved with the model. After training it stores in the model each head's mean and standard deviation over the
    training images, so that rewards of different heads are on one scale; what the last layers are unsure of; and,
    where there are votes to evaluate on, the temperature under which the model is as sure as it may be.

    Evaluation reports what [`preference_metrics`] and [`rating_metrics`] return, for raters without habits. Hold out
    whole cases (see `split_by_case`).

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
        peft_config (`PeftConfig`, *optional*):
            Adapter of the backbone, such as `LoraConfig(target_modules="all-linear")`. Of the backbone it is trained
            alone, and the first layer, which has to learn the channels that are new to it; the heads always are. What
            is saved is the whole model with the adapter folded in.
        callbacks (`list[TrainerCallback]`, *optional*):
            Further callbacks.

    Raises:
        `ValueError`: when a criterion of the model has no vote in `train_dataset`, or the adapter cannot be folded in.

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

    kind, data_role = "reward-model", "votes"

    def __init__(
        self,
        model: OneRewardModel,
        args: RewardConfig | None = None,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | None = None,
        eval_truths: datasets.Dataset | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        args, config = args or RewardConfig(), model.config
        self.votes = train_dataset
        self.ceiling = best_possible_accuracy(eval_dataset, eval_truths) if eval_truths else {}
        questions = train_dataset and Questions(train_dataset, config)
        if questions:
            for criterion, number in zip(config.criteria, _votes_on(questions), strict=True):
                if number == 0:
                    raise ValueError(
                        f"No vote is on {criterion!r}; the votes are on {sorted(set(train_dataset['criterion']))}. "
                        "Give the model's config the `criteria` that were voted on."
                    )
        if peft_config is not None:
            set_seed(args.seed)  # the adapter's first weights are random
            model.vision = get_peft_model(model.vision, peft_config)
            for name, layer in model.vision.named_modules():
                # such as BiT's convolutions, which standardize their weights: the sum is not the sum of outputs
                if isinstance(layer, BaseTunerLayer) and type(layer.base_layer) not in (nn.Linear, nn.Conv2d):
                    raise ValueError(
                        f"`peft_config` adapts {name!r}, a {type(layer.base_layer).__name__}, into which an adapter "
                        "cannot be folded. Choose `target_modules` that are linear layers or plain convolutions, or "
                        "train all weights."
                    )
            first_layer(model).requires_grad_(True)
        super().__init__(
            model=model,
            args=args,
            train_dataset=questions,
            eval_dataset=eval_dataset and Questions(eval_dataset, config),
            data_collator=_as_is,
            callbacks=callbacks,
            compute_metrics=self.compute_preference_metrics,
        )
        self.rater_terms = RaterTerms(len(questions.rater_names) if questions else 0, len(config.criteria))
        self.rater_terms.to(args.device)
        self.add_callback(_RaterTermsStep(self))

    def _get_train_sampler(self, train_dataset=None):
        return ConditionSampler(self.train_dataset.conditions, self.args.data_seed or self.args.seed)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            super().create_optimizer(model)
            terms = {"params": list(self.rater_terms.parameters()), "lr": self.args.rater_learning_rate}
            self.optimizer.add_param_group({**terms, "weight_decay": 0.0})
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tensors = self.accelerator.unwrap_model(model).prepare_inputs(**inputs["candidates"])
        if model.training and torch.rand(()) < self.args.flip_probability:
            tensors["pixel_values"] = tensors["pixel_values"].flip(-1)
        outputs = model(**tensors)
        loss = self.answers_loss(outputs, inputs["pairs"], inputs["answers"], model.training)
        return (loss, outputs) if return_outputs else loss

    def answers_loss(
        self, outputs: OneRewardOutput, pairs: torch.Tensor, answers: dict[str, torch.Tensor], training: bool
    ) -> torch.Tensor:
        """
        Mean negative log-likelihood of answers, in nats; in training those of raters with habits, and smoothed.

        Args:
            outputs ([`OneRewardOutput`]): of the candidates.
            pairs, answers: as in a batch of [`Questions`].
            training (`bool`): whether it is for training.

        Returns:
            `torch.Tensor`: scalar.
        """
        terms, raters = self.rater_terms, answers["raters"]
        first, second = pairs[answers["questions"]].T
        difference, variance = _differences(outputs, first, second)
        logits, own_variance = outputs.logits[first], None if variance is None else outputs.stds[first] ** 2
        if training:
            difference = terms.of_pairs(difference, raters, answers["sides"])
            if variance is not None:
                scale = terms.consistency[raters, None] ** 2
                variance, own_variance = variance * scale, own_variance * scale
        ratings = terms.of_ratings(logits, raters if training else None)
        if own_variance is not None:
            own_variance = own_variance * terms.log_spread.exp() ** 2

        # a rating of 0.7 is 0.7 of a vote against a bar and 0.3 of one for it
        share, rated = answers["ratings"].nan_to_num(), answers["num_ratings"].float()
        of_ratings = torch.stack([share, torch.zeros_like(share), 1 - share], dim=-1) * rated[..., None]
        counts, smoothing = answers["counts"], self.args.label_smoothing_factor if training else 0.0
        log_nu, no_ties = outputs.log_nu, torch.full_like(outputs.log_nu, NO_TIES)
        votes, bars = counts.sum(), rated.sum()
        loss = votes * preference_loss(difference, log_nu, smoothed(counts, smoothing), variance)
        if bars > 0:
            loss = loss + bars * preference_loss(ratings, no_ties, smoothed(of_ratings, smoothing), own_variance)
        loss = loss / (votes + bars)
        if training:
            loss = loss + terms.penalty() / _votes_on(self.train_dataset).sum()
            if variance is not None:
                # Votes hardly tell large differences of uncertain images from small ones of certain images: a unit
                # half-normal prior of each standard deviation does.
                loss = loss + (outputs.stds**2).sum() / 2 / (votes + bars)
        return loss

    def share_buffers(self):
        """Give all processes the running statistics of the first, as DDP does before each step of the training."""
        if self.accelerator.num_processes > 1:
            for buffer in self.accelerator.unwrap_model(self.model).buffers():
                broadcast(buffer)

    def evaluation_loop(self, *args, **kwargs):
        self.share_buffers()
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        first, second = inputs["pairs"].T
        difference, variance = _differences(outputs, first, second)
        predictions = {"difference": difference, "variance": variance, "logits": outputs.logits[first]}
        predictions = tuple(values.float() for values in predictions.values() if values is not None)
        return loss, predictions, (inputs["counts"], inputs["cases"], inputs["ratings"])

    def compute_preference_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        counts, cases, ratings = prediction.label_ids
        difference, *variance, logits = prediction.predictions
        log_nu, criteria = self.model.heads.log_nu.detach().float().cpu().numpy(), self.model.config.criteria
        metrics = preference_metrics(difference, log_nu, counts, cases, criteria, *variance)
        metrics |= rating_metrics(logits, ratings, criteria)
        return metrics | {f"ceiling/{criterion}": value for criterion, value in self.ceiling.items()}

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        self.finish()
        return output

    @torch.no_grad()
    def finish(self):
        """
        Store in the model what is known once its weights are: the mean and standard deviation of each head's logits
        over the training images, the last layers' posterior, and with votes to evaluate on the temperature.
        """
        self.share_buffers()
        self.model.eval()
        heads, questions = self.model.heads, self.train_dataset
        numbers, size = range(len(questions.candidates)), 2 * self.args.eval_batch_size
        outputs = [
            self.model(**self.model.prepare_inputs(**questions.decode(numbers[start : start + size])))
            for start in tqdm(numbers[::size], desc="Finishing", disable=self.args.disable_tqdm, leave=False)
        ]
        columns = {name: torch.cat([output[name] for output in outputs]).float() for name in ("logits", "features")}
        stds = torch.cat([output.stds for output in outputs]).float() if self.model.config.gaussian else None
        whole = OneRewardOutput(**columns, stds=stds)
        heads.logit_mean.copy_(whole.logits.mean(dim=0))
        heads.logit_std.copy_(whole.logits.std(dim=0).clamp(min=1e-6))

        heads.feature_mean.copy_(whole.features.mean(dim=0))
        first, second = questions.pairs.to(whole.logits.device).T
        difference, variance = _differences(whole, first, second)
        information = fisher_information(difference, heads.log_nu, variance)
        information = information * questions.counts.sum(dim=-1).to(information)
        spread = self.rater_terms.log_spread.exp()
        own_variance = None if stds is None else (spread * stds[first]) ** 2
        of_bar = fisher_information(spread * whole.logits[first], torch.full_like(heads.log_nu, NO_TIES), own_variance)
        of_bar = of_bar * spread**2 * questions.num_ratings.to(of_bar)
        for head, layer in enumerate(heads.outputs):
            features = whole.features[:, head] - heads.feature_mean[head]
            rows = torch.cat([features[first] - features[second], features[first]])
            weights = torch.cat([information[:, head], of_bar[:, head]])
            factor, _ = last_layer_posterior(rows.T @ (weights[:, None] * rows), layer.weight[0])
            heads.posterior_factor[head] = factor

        if self.eval_dataset is not None:
            found = self.predict(self.eval_dataset, metric_key_prefix="calibration").metrics
            for head, criterion in enumerate(self.model.config.criteria):
                heads.temperature[head] = found.get(f"calibration_temperature/{criterion}", 1.0)

    def _save(self, output_dir: str | None = None, state_dict=None):
        # `Trainer` would add its arguments as a pickle, which has no place in a published folder.
        if not self.args.should_save:
            return
        folder, model = Path(output_dir or self.args.output_dir), self.accelerator.unwrap_model(self.model)
        state = {f"rater_terms.{name}": value for name, value in self.rater_terms.state_dict().items()}
        if isinstance(model.vision, PeftModel):
            frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
            state |= {f"model.{name}": value for name, value in model.state_dict().items() if name not in frozen}
            model = copy.deepcopy(model)
            model.vision = model.vision.merge_and_unload()
        model.save_pretrained(folder)
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):  # to go on from
            with whole_file(folder / TRAINING_STATE) as partial:
                save_file({name: value.contiguous() for name, value in state.items()}, partial)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        state = load_file(Path(resume_from_checkpoint) / TRAINING_STATE)
        adapted = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
        if adapted:  # what the checkpoint's model has folded in
            self.accelerator.unwrap_model(model or self.model).load_state_dict(adapted, strict=False)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        terms = {name: state[f"rater_terms.{name}"] for name in self.rater_terms.state_dict()}
        self.rater_terms.load_state_dict(terms)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    # ------------------------------------------------------------------------------------------------ card and origin

    def loaded_from(self) -> list[tuple[str, str, str | None]]:
        config = self.model.config
        models = [("reward_model", config), ("backbone", config.vision_config)]
        named = [(role, part._name_or_path, getattr(part, "_commit_hash", None)) for role, part in models]
        return [model for model in named if model[1]]

    def training_data(self) -> datasets.Dataset:
        return self.votes

    def provenance_besides(self) -> dict:
        return {"criteria": list(self.model.config.criteria)}

    @cached_property
    def agreement(self) -> dict:
        """How far the raters agree on each criterion, see [`~onereward.hub.data_cards.vote_agreement`]."""
        return vote_agreement(self.votes)

    def model_card(self, model_name: str | None = None, dataset_name: str | None = None, **fields) -> ModelCard:
        args, criteria = self.args, self.model.config.criteria
        measures = {"pair_accuracy": "accuracy", "ceiling": "ceiling", "log_loss": "log_loss", "ece": "ece_calibrated"}
        evaluations = [entry for entry in self.state.log_history if "eval_accuracy" in entry]
        return reward_model_card(
            **{
                "name": model_name or Path(args.output_dir).name,
                "criteria": criteria,
                "repo_id": self.hub_model_id or args.output_dir,
                "training_data": (
                    f"{self.state.global_step} updates on {len(self.train_dataset)} pairs of "
                    f"{dataset_name or self.dataset_name or 'an unnamed data set'}, by the Bradley-Terry model with "
                    "ties (Davidson, 1970)."
                ),
                "raters": self.train_dataset.raters,
                "num_votes": int(_votes_on(self.train_dataset).sum()),
                "agreement": self.agreement,
                "evaluation": {
                    criterion: {
                        name: evaluations[-1].get(f"eval_{measure}/{criterion}") for name, measure in measures.items()
                    }
                    for criterion in criteria
                }
                if evaluations
                else {},
                "eval_dataset": f"votes on {len(self.eval_dataset or [])} pairs of unseen cases",
                "command": shlex.join(sys.argv),
                "seed": args.seed,
                "limits": ["It likes what its raters liked; on images unlike those they saw it can be fooled."],
                "commit": source_commit(),
                **fields,
            }
        )
