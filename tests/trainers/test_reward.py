"""What `RewardTrainer` promises: it learns from votes, in any order of the sides, and says how well."""

import importlib.util
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, log_loss

from onereward.preferences import VOTE_FEATURES, save_votes
from onereward.preferences.schema import VOTE_DEFAULTS, VOTE_SCHEMA_VERSION, to_png
from onereward.rewards import OneRewardConfig, OneRewardModel
from onereward.trainers.reward import (
    ConditionSampler,
    Questions,
    RewardConfig,
    RewardTrainer,
    expected_calibration_error,
    fit_temperature,
    preference_metrics,
)


LABELS = {"background": 0, "lesion": 1}
CRITERIA = ["bright", "dark"]
SIZE = 16


def make_votes(cases, seed, raters=3, nu=0.4, labelled=True):
    """
    Votes on squares of random greys in noise. "bright": the brighter right half is better. "dark": the darker left
    half is better. Also the true probabilities, in the format of `simulate_votes`.
    """
    rng = np.random.default_rng(seed)
    votes, truths = [], []
    for case in range(cases):
        source = rng.uniform(0.3, 0.7, (SIZE, SIZE))
        mask = np.zeros((SIZE, SIZE), bool)
        top, left = rng.integers(2, 6, 2)
        mask[top : top + 8, left : left + 8] = True
        levels = rng.uniform(0.2, 0.8, (4, 2))
        candidates = []
        for right, dark in levels:
            image = np.where(mask, right + rng.normal(0, 0.05, mask.shape), source)
            image[top : top + 8, left : left + 4] += dark - right
            candidates.append(to_png(np.round(255 * image.clip(0, 1)).astype(np.uint8)))
        row = {
            **VOTE_DEFAULTS,
            "image": to_png(np.round(255 * source).astype(np.uint8)),
            "mask": to_png(255 * mask.astype(np.uint8)),
            "label_map": to_png(mask.astype(np.uint8)) if labelled else None,
            "prompt": "a square",
            "task": "fill",
            "case_id": f"case-{seed}-{case}",
            "rater_role": "simulated",
            "model_0": "a",
            "model_1": "b",
            "seed_0": 0,
            "seed_1": 0,
            "created_at": "2025-01-01T00:00:00+00:00",
            "schema_version": VOTE_SCHEMA_VERSION,
        }
        for first, second in [(0, 1), (2, 3), (1, 2)]:
            differences = 15 * (levels[first] - levels[second]) * [1, -1]
            for criterion, d in zip(CRITERIA, differences, strict=True):
                p = np.array([np.exp(d / 2), nu, np.exp(-d / 2)])
                p /= p.sum()
                for rater in range(raters):
                    label = (1.0, 0.5, 0.0)[rng.choice(3, p=p)]
                    vote_id = f"{seed}-{case}-{first}{second}-{criterion}-{rater}"
                    votes.append(
                        {
                            **row,
                            "vote_id": vote_id,
                            "pair_id": f"{seed}-{case}-{first}{second}",
                            "image_0": candidates[first],
                            "image_1": candidates[second],
                            "label_0": label,
                            "label_1": 1 - label,
                            "criterion": criterion,
                            "rater": f"simulated-{rater}",
                        }
                    )
                    truths.append({"vote_id": vote_id, "p_0": p[0], "p_tie": p[1], "p_1": p[2]})
    return datasets.Dataset.from_list(votes, features=VOTE_FEATURES), datasets.Dataset.from_list(truths)


@pytest.fixture(scope="module")
def train_votes():
    return make_votes(60, seed=0)[0]


@pytest.fixture(scope="module")
def unseen():
    return make_votes(30, seed=1)


def make_model(**config) -> OneRewardModel:
    vision = {"model_type": "bit", "embedding_size": 16, "hidden_sizes": [32], "depths": [2], "num_groups": 4}
    config = {"criteria": CRITERIA, "labels": LABELS, "image_size": SIZE, "hidden_size": 32} | config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OneRewardModel(OneRewardConfig(vision_config=vision, **config))


@pytest.fixture
def make_trainer(tmp_path, train_votes, unseen):
    def make(train_votes=train_votes, model=None, **kwargs):
        args = RewardConfig(
            **{
                "output_dir": str(tmp_path / "reward"),
                "per_device_train_batch_size": 12,
                "use_cpu": True,
                "report_to": "none",
                "disable_tqdm": True,
                "flip_probability": 0,  # left and right are what the criteria of these votes are about
            }
            | kwargs
        )
        return RewardTrainer(model or make_model(), args, train_votes, *unseen)

    return make


# --------------------------------------------------------------------------------------------------------- learning


def test_it_learns_both_criteria_and_rewards_are_standardized(make_trainer, unseen):
    trainer = make_trainer(num_train_epochs=12)
    before = trainer.evaluate()
    trainer.train()
    metrics = trainer.evaluate()
    votes, _ = unseen
    for criterion in CRITERIA:
        labels = [v for v, c in zip(votes["label_0"], votes["criterion"], strict=True) if c == criterion and v != 0.5]
        right = round(metrics[f"eval_accuracy/{criterion}"] * len(labels))
        assert binomtest(right, len(labels), 0.5, alternative="greater").pvalue < 1e-6
        assert 0.5 < metrics[f"eval_ceiling/{criterion}"] <= 1
        assert metrics[f"eval_accuracy/{criterion}"] > 0.9 * metrics[f"eval_ceiling/{criterion}"]
        assert metrics[f"eval_log_loss/{criterion}"] < before[f"eval_log_loss/{criterion}"]
    assert metrics["eval_loss"] == pytest.approx(np.mean([metrics[f"eval_log_loss/{c}"] for c in CRITERIA]), rel=0.05)

    pairs = trainer.train_dataset
    rewards = torch.stack(list(trainer.model.score(**pairs.decode(range(len(pairs.candidates)))).values()), dim=1)
    torch.testing.assert_close(rewards.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(rewards.std(0), torch.ones(2), atol=1e-4, rtol=0)

    trainer.save_model()
    loaded = OneRewardModel.from_pretrained(trainer.args.output_dir)
    inputs = pairs.decode(range(4))
    assert torch.equal(loaded.score(**inputs)["bright"], trainer.model.score(**inputs)["bright"])


def test_the_prevalence_of_ties_is_learned(make_trainer):
    frequent, rare = (
        make_trainer(make_votes(60, seed=2, nu=nu)[0], num_train_epochs=4, learning_rate=0.02) for nu in (4.0, 0.05)
    )
    frequent.train()
    rare.train()
    assert (frequent.model.heads.log_nu > 0.3).all() and (rare.model.heads.log_nu < -0.3).all()


def test_resuming_gives_the_weights_of_an_uninterrupted_run(make_trainer):
    settings = {"max_steps": 6, "save_steps": 3, "logging_steps": 1}  # the fifteen batches of an epoch are cut in two
    whole = make_trainer(**settings)
    whole.train()
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_the_order_of_the_sides_does_not_matter(make_trainer, train_votes):
    def swap(vote):
        return {"image_0": vote["image_1"], "image_1": vote["image_0"], "label_0": vote["label_1"]}

    swapped = train_votes.select(range(36)).map(swap, features=VOTE_FEATURES)
    losses = []
    for votes in (train_votes.select(range(36)), swapped):
        trainer = make_trainer(votes)
        trainer.model.eval()
        losses.append(trainer.compute_loss(trainer.model, trainer.train_dataset.__getitems__(range(6))))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------------------- data


def test_votes_are_counted_and_shared_images_are_decoded_once(train_votes):
    pairs = Questions(train_votes, make_model().config)
    assert len(pairs) == 60 * 3 and len(pairs.candidates) == 60 * 4
    assert pairs.counts.sum() == len(train_votes) == 60 * 3 * 2 * 3
    assert pairs.raters == {"simulated": 3}

    batch = pairs.__getitems__([0, 1, 2, 5])
    assert len(batch["candidates"]["images"]) == 4 + 2  # the four of case 0, two of case 1
    row = train_votes.filter(lambda vote: vote["pair_id"] == "0-1-12")[0]
    for side, name in enumerate(("image_0", "image_1")):
        shown = batch["candidates"]["images"][batch["pairs"][3, side], 0]
        np.testing.assert_allclose(shown, np.asarray(row[name]) / 255, rtol=1e-6)
    for head, criterion in enumerate(CRITERIA):
        mine = train_votes.filter(lambda vote, c=criterion: vote["pair_id"] == "0-1-12" and vote["criterion"] == c)
        expected = [mine["label_0"].count(label) for label in (1.0, 0.5, 0.0)]
        assert batch["counts"][3, head].tolist() == expected


def test_pairs_of_one_condition_stay_together_in_a_new_order_each_epoch():
    conditions = [0] * 5 + [1] * 3 + [2] * 4 + [3] * 2
    sampler = ConditionSampler(conditions, seed=0)
    orders = []
    for epoch in range(8):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(14)) and order == list(sampler)
        shown = [conditions[index] for index in order]
        assert sum(a != b for a, b in zip(shown[:-1], shown[1:], strict=True)) == 3
        orders.append(tuple(shown))
    assert len(set(orders)) > 3


def test_votes_without_a_label_map():
    votes, _ = make_votes(2, seed=3, labelled=False)
    pairs = Questions(votes, make_model().config)
    assert not pairs.decode([0, 1])["label_maps"].any()


def test_a_criterion_without_votes_is_refused(make_trainer):
    with pytest.raises(ValueError, match="No vote is on 'sharp'.*'bright', 'dark'"):
        make_trainer(model=make_model(criteria=["bright", "sharp"]))


def test_votes_on_images_of_another_size_are_refused(make_trainer, train_votes):
    def enlarge(vote):
        return {name: vote[name].resize((32, 32), Image.NEAREST) for name in Questions.PICTURES}

    trainer = make_trainer(train_votes.select(range(12)).map(enlarge, features=VOTE_FEATURES), max_steps=1)
    with pytest.raises(ValueError, match=r"`images` has shape .*32, 32.* wants .*16, 16"):
        trainer.train()


# ---------------------------------------------------------------------------------------------------------- metrics


def test_metrics_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    difference = rng.normal(0, 2, (200, 2)).astype(np.float32)
    log_nu = np.array([-0.5, 0.5], np.float32)
    outcomes = rng.integers(0, 3, (200, 2))
    counts = np.eye(3, dtype=np.float32)[outcomes]
    metrics = preference_metrics(difference, log_nu, counts, np.arange(200), ["a", "b"])
    for head, criterion in enumerate(["a", "b"]):
        weights = np.stack(
            [np.exp(difference[:, head] / 2), np.full(200, np.exp(log_nu[head])), np.exp(-difference[:, head] / 2)], 1
        )
        expected = log_loss(outcomes[:, head], weights / weights.sum(1, keepdims=True), labels=[0, 1, 2])
        assert metrics[f"log_loss/{criterion}"] == pytest.approx(expected, rel=1e-5)
        decided = outcomes[:, head] != 1
        expected = accuracy_score(outcomes[decided, head] == 0, difference[decided, head] > 0)
        assert metrics[f"accuracy/{criterion}"] == pytest.approx(expected)
    assert metrics["accuracy"] == pytest.approx((metrics["accuracy/a"] + metrics["accuracy/b"]) / 2)


def test_the_temperature_makes_an_overconfident_model_calibrated():
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1.5, 20_000)
    wins = (rng.random(20_000) < 1 / (1 + np.exp(-truth))).astype(float)
    counts = np.stack([wins, 0 * wins, 1 - wins], 1)[:, None]
    metrics = preference_metrics(3 * truth[:, None], np.zeros(1), counts, np.arange(20_000), ["a"])
    assert metrics["temperature/a"] == pytest.approx(3, rel=0.05)
    assert fit_temperature(truth, wins, 1 - wins) == pytest.approx(1, rel=0.05)
    assert metrics["ece/a"] > 0.1 and metrics["ece_calibrated/a"] < 0.015


def test_calibration_error_of_a_worked_example():
    confidence, total = np.array([0.52, 0.52, 0.98, 0.96]), np.array([1.0, 3.0, 2.0, 2.0])
    right = np.array([1.0, 1.0, 2.0, 1.0])
    # bins [0.5, 0.55) and [0.95, 1]: 4 votes, 2 right, mean 0.52; 4 votes, 3 right, mean 0.97
    assert expected_calibration_error(confidence, right, total) == pytest.approx((4 * 0.02 + 4 * 0.22) / 8)


def test_a_criterion_with_ties_only_has_no_accuracy():
    counts = np.array([[[0.0, 2, 0], [1, 0, 0]], [[0, 1, 0], [0, 0, 0]]])
    metrics = preference_metrics(np.ones((2, 2)), np.zeros(2), counts, np.array([0, 1]), ["tied", "decided"])
    assert "accuracy/tied" not in metrics and metrics["log_loss/tied"] > 0
    assert metrics["accuracy"] == metrics["accuracy/decided"] == 1


# -------------------------------------------------------------------------------------------------------- publishing


def test_the_card_says_who_voted_and_how_well_the_model_does(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(dataset_name="squares")
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "Research use only, not for clinical use." in card and "squares" in card
    assert f"{metrics['eval_accuracy/bright']:.4g}" in card and f"{metrics['eval_ceiling/bright']:.4g}" in card
    assert "simulated" in card


def test_the_launch_script_trains_and_saves(tmp_path, train_votes):
    path = Path(__file__).parents[2] / "trainers" / "reward.py"
    spec = importlib.util.spec_from_file_location("reward_script", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    save_votes(train_votes, tmp_path / "votes.parquet")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"dataset_name: {tmp_path / 'votes.parquet'}\nlabels: {{background: 0, lesion: 1}}\n"
        f"vision_config: {{model_type: bit, embedding_size: 8, hidden_sizes: [16], depths: [1], num_groups: 4}}\n"
        f"output_dir: {tmp_path / 'out'}\nmax_steps: 2\nuse_cpu: true\nreport_to: none\ndisable_tqdm: true\n"
    )
    script.main(*script.parser().parse_args_and_config(["--config", str(config), "--max_steps", "1"]))
    model = OneRewardModel.from_pretrained(tmp_path / "out")
    assert model.config.criteria == CRITERIA and model.config.image_size == SIZE
    assert "Research use only" in (tmp_path / "out" / "README.md").read_text()
