"""What `RewardTrainer` promises: it learns from votes, in any order of the sides, and says how well."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, log_loss
from transformers import AutoModel, ViTConfig

from onereward.preferences import VOTE_FEATURES, save_votes, vote_information
from onereward.preferences.schema import VOTE_DEFAULTS, VOTE_SCHEMA_VERSION, to_png
from onereward.rewards import OneRewardConfig, OneRewardModel
from onereward.rewards.losses import smoothed
from onereward.rewards.modeling_onereward import OneRewardOutput
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
    def make(train_votes=train_votes, model=None, unseen=unseen, peft_config=None, **kwargs):
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
        return RewardTrainer(model or make_model(), args, train_votes, *unseen, peft_config=peft_config)

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


TWO_PROCESSES = """
import sys
import torch
from accelerate import PartialState
from test_reward import CRITERIA, make_model, make_votes
from onereward.trainers.reward import RewardConfig, RewardTrainer
folder, process = sys.argv[1], PartialState(cpu=True)
args = RewardConfig(
    folder, max_steps=4, per_device_train_batch_size=6, use_cpu=True, report_to="none", disable_tqdm=True,
    rater_learning_rate=0.02, save_strategy="no",
)
trainer = RewardTrainer(make_model(), args, make_votes(12, seed=0)[0], make_votes(5, seed=1)[0])
trainer.train()
metrics = {name: value for name, value in trainer.evaluate().items() if name.split("/")[-1] in CRITERIA}
state = {**trainer.model.state_dict(), **trainer.rater_terms.state_dict(), "metrics": metrics}
torch.save(state, f"{folder}/{process.process_index}.pt")
process.destroy_process_group()
"""


def test_two_processes_train_one_model_and_one_set_of_raters(tmp_path):
    (tmp_path / "two_processes.py").write_text(TWO_PROCESSES)
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(29990 + os.getpid() % 9)]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    script = str(tmp_path / "two_processes.py")
    subprocess.run([sys.executable, *command, script, str(tmp_path)], check=True, timeout=120, env=env)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one.pop("metrics") == other.pop("metrics")
    assert (one["consistency"] != 1).all() and one["heads.log_nu"].abs().min() > 0
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# ----------------------------------------------------------------------------------------- ratings, raters, doubt


def make_ratings(votes, slope=6.0, severity=(-1.0, 0.0, 1.0), seed=0):
    """Ratings from 1 to 5 of the first images of the pairs, by the grey of the right half and raters of a severity."""
    rng, rows = np.random.default_rng(seed), []
    for vote in votes:
        if vote["criterion"] != "bright":
            continue
        rater = int(vote["rater"][-1])
        mask = np.asarray(vote["mask"]) > 0
        right = mask & (np.cumsum(mask, axis=1) > mask.sum(axis=1, keepdims=True) / 2)
        grey = np.asarray(vote["image_0"])[right].mean() / 255
        share = rng.binomial(4, 1 / (1 + np.exp(-slope * (grey - 0.5) + severity[rater]))) / 4
        none = {name: None for name in ("image_1", "label_0", "label_1")}
        own = {"kind": "rating", "rating": 1 + 4 * share, "rating_min": 1.0, "rating_max": 5.0}
        names = {"vote_id": vote["vote_id"] + "-rating", "pair_id": vote["pair_id"] + "-rating"}
        rows.append({**vote, **none, **own, **names})
    return datasets.Dataset.from_list(rows, features=VOTE_FEATURES)


@pytest.fixture(scope="module")
def ratings(train_votes):
    return make_ratings(train_votes), make_ratings(make_votes(30, seed=1)[0], seed=1)


def test_ratings_alone_are_learned_and_severe_raters_found(make_trainer, ratings):
    train, unseen = ratings
    trainer = make_trainer(train, make_model(criteria=["bright"]), unseen=(unseen, None), num_train_epochs=16)
    trainer.train()
    assert trainer.evaluate()["eval_rating_correlation/bright"] > 0.7
    severity = trainer.rater_terms.severity[:, 0]
    assert (severity.diff() > 0.3).all()
    assert trainer.train_dataset.rater_names == [f"simulated-{i}" for i in range(3)]
    loaded = {name for name, _ in trainer.model.named_parameters() if "rater" in name}
    assert not loaded  # a rater is no part of a published model


def test_pairs_and_ratings_train_the_same_heads(make_trainer, train_votes, ratings, unseen):
    few = train_votes.select(range(180))  # of ten cases
    together = datasets.concatenate_datasets([few, ratings[0]])
    accuracy = {}
    for name, votes in (("pairs", few), ("together", together)):
        trainer = make_trainer(votes, num_train_epochs=400 * 12 // len(Questions(votes, make_model().config)))
        trainer.train()
        accuracy[name] = trainer.evaluate()["eval_accuracy/bright"]
    assert accuracy["together"] > accuracy["pairs"]
    batch = trainer.train_dataset.__getitems__([0, len(trainer.train_dataset) - 1])
    assert batch["counts"][0].sum() > 0 and batch["ratings"][0].isnan().all()
    assert batch["counts"][1].sum() == 0 and batch["ratings"][1, 0] >= 0
    assert batch["pairs"][1, 0] == batch["pairs"][1, 1]


def test_the_mean_rating_is_counted_over_raters_and_repeats(train_votes):
    one = make_ratings(train_votes.select(range(3)))[0]
    answers = [("a", 1.0), ("a", 3.0), ("b", 5.0)]
    rows = [{**one, "vote_id": str(i), "rater": rater, "rating": value} for i, (rater, value) in enumerate(answers)]
    questions = Questions(datasets.Dataset.from_list(rows, features=VOTE_FEATURES), make_model().config)
    assert len(questions) == 1 and questions.num_ratings[0].tolist() == [3, 0]
    assert questions.ratings[0, 0] == pytest.approx((0 + 0.5 + 1) / 3)
    answers = questions.__getitems__([0])["answers"]
    assert answers["ratings"][:, 0].tolist() == [0.25, 1.0] and answers["num_ratings"][:, 0].tolist() == [2, 1]


def test_a_rater_who_likes_the_left_is_found_and_does_not_spoil_the_reward(make_trainer):
    votes, _ = make_votes(60, seed=4)
    rng = np.random.default_rng(0)
    rows = []
    for vote in votes.to_list():
        left = int(rng.integers(2))
        if vote["rater"] == "simulated-0" and rng.random() < 0.6:  # blindly
            vote |= {"label_0": 1.0 - left, "label_1": float(left)}
        rows.append({**vote, "left": left})
    votes = datasets.Dataset.from_list(rows, features=VOTE_FEATURES)
    trainer = make_trainer(votes, num_train_epochs=12, rater_learning_rate=0.02)
    trainer.train()
    pull, consistency = trainer.rater_terms.pull.detach(), trainer.rater_terms.consistency.detach()
    assert pull[0] > 0.5 > pull[1:].abs().max()
    assert consistency[0] < consistency[1:].min()
    alike = make_trainer(votes, num_train_epochs=1, rater_learning_rate=0.0)
    alike.train()
    assert (alike.rater_terms.pull == 0).all() and (alike.rater_terms.consistency == 1).all()


def test_a_gaussian_head_learns_on_which_images_raters_disagree(make_trainer, train_votes):
    rng = np.random.default_rng(0)

    def disagree(vote):  # about noisy sources, by a coin
        noisy = np.asarray(vote["image"]).mean() > 127
        label = float(rng.integers(2)) if noisy else vote["label_0"]
        return {"label_0": label, "label_1": 1 - label}

    votes = train_votes.map(disagree, features=VOTE_FEATURES)
    trainer = make_trainer(votes, make_model(gaussian=True), num_train_epochs=12)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy/bright"] > 0.6
    questions = trainer.train_dataset
    inputs = questions.decode(range(len(questions.candidates)))
    with torch.no_grad():
        stds = trainer.model(**trainer.model.prepare_inputs(**inputs)).stds.mean(dim=1)
    noisy = inputs["sources"].mean(dim=(1, 2, 3)) > 127 / 255
    assert stds[noisy].mean() > 1.2 * stds[~noisy].mean()
    votes = trainer.model.compare(inputs["images"][:4], inputs["images"][4:8], *_condition(inputs, 4))
    torch.testing.assert_close(votes["bright"].sum(dim=1), torch.ones(4))


@pytest.mark.parametrize("training", [False, True])
def test_a_rating_of_an_uncertain_image_has_the_probability_that_is_stated(make_trainer, training):
    trainer = make_trainer(model=make_model(gaussian=True))
    terms, (logit, std), (consistency, spread, severity) = trainer.rater_terms, (0.5, 1.0), (-3.0, 0.7, 0.4)
    terms.consistency.data[0], terms.log_spread.data[0] = consistency, math.log(spread)
    terms.severity.data[0, 0] = severity
    outputs = OneRewardOutput(logits=torch.full((1, 2), logit), stds=torch.full((1, 2), std), log_nu=torch.zeros(2))
    answers = {
        "questions": torch.tensor([0]),
        "raters": torch.tensor([0]),
        "sides": torch.zeros(1),
        "counts": torch.zeros(1, 2, 3),
        "ratings": torch.tensor([[1.0, math.nan]]),
        "num_ratings": torch.tensor([[1, 0]]),
    }
    loss = trainer.answers_loss(outputs, torch.tensor([[0, 0]]), answers, training)
    if training:  # without its priors
        questions = trainer.train_dataset
        loss = loss - terms.penalty() / (questions.counts.sum() + questions.num_ratings.sum())
        loss = loss - (outputs.stds**2).sum() / 2

    u = torch.linspace(-10, 10, 100_001, dtype=torch.float64)
    seen = consistency * (spread * u - severity) if training else spread * u
    density = (-((u - logit) ** 2) / 2 / std**2).exp()
    top = (density * seen.sigmoid()).sum() / density.sum()
    assert loss.item() == pytest.approx(-top.log().item(), abs=1e-4)


def test_ratings_of_uncertain_images_leave_the_model_less_sure(make_trainer, ratings):
    trainer = make_trainer(ratings[0], make_model(gaussian=True, criteria=["bright"]), unseen=(None, None))
    (layer,) = trainer.model.heads.outputs
    layer.weight.data[1], layer.weight.data[0] = 0, torch.linspace(-1, 1, layer.in_features)
    variances = []
    for bias in (-30.0, 30.0):  # images of no and of the greatest uncertainty
        layer.bias.data[1] = bias
        trainer.finish()
        variances.append(float((trainer.model.heads.posterior_factor[0] ** 2).sum()))
    assert variances[1] > 1.2 * variances[0]


def _condition(inputs, number):
    return [inputs[name][:number] for name in ("masks", "sources", "label_maps", "prompts", "tasks")]


def test_smoothed_labels_make_a_model_less_sure(make_trainer, train_votes):
    spread = {}
    for smoothing in (0.0, 0.2):
        trainer = make_trainer(train_votes, num_train_epochs=6, label_smoothing_factor=smoothing)
        trainer.train()
        spread[smoothing] = trainer.model.heads.logit_std
    assert (spread[0.2] < 0.9 * spread[0.0]).all()
    counts = torch.tensor([[3.0, 1.0, 0.0]])
    torch.testing.assert_close(smoothed(counts, 0.1), torch.tensor([[2.7, 1.0, 0.3]]))


def test_comparisons_are_calibrated_and_the_same_in_both_orders(make_trainer, unseen):
    trainer = make_trainer(num_train_epochs=12)
    trainer.train()
    metrics, model, questions = trainer.evaluate(), trainer.model, trainer.eval_dataset
    for head, criterion in enumerate(CRITERIA):
        temperature = model.heads.temperature[head].item()
        assert temperature == pytest.approx(metrics[f"eval_temperature/{criterion}"], rel=1e-3) and temperature != 1
    first, second = questions.pairs[:20].T.tolist()
    one, other = questions.decode(first), questions.decode(second)
    condition = _condition(one, 20)
    votes = model.compare(one["images"], other["images"], *condition)
    swapped = model.compare(other["images"], one["images"], *condition)
    for head, criterion in enumerate(CRITERIA):
        torch.testing.assert_close(votes[criterion], swapped[criterion].flip(-1))
        difference = model.score(**one)[criterion] - model.score(**other)[criterion]
        difference = difference * model.heads.logit_std[head] / model.heads.temperature[head]
        odds = votes[criterion][:, 0].log() - votes[criterion][:, 2].log()
        torch.testing.assert_close(odds, difference, atol=1e-4, rtol=1e-4)


def test_the_model_is_less_unsure_the_more_votes_it_has_seen(make_trainer, train_votes, unseen):
    unsure = {}
    for number in (180, 1080):
        torch.manual_seed(0)
        trainer = make_trainer(train_votes.select(range(number)), max_steps=60)
        trainer.train()
        inputs = trainer.eval_dataset.decode(range(24))
        _, stds = trainer.model.score(**inputs, return_std=True)
        draws = trainer.model.sample_logits(**inputs, num_samples=4000, generator=torch.Generator().manual_seed(0))
        for head, criterion in enumerate(CRITERIA):
            expected = stds[criterion] * trainer.model.heads.logit_std[head]
            torch.testing.assert_close(draws[:, :, head].std(dim=0), expected, rtol=0.06, atol=1e-4)
        again = trainer.model.sample_logits(**inputs, num_samples=4000, generator=torch.Generator().manual_seed(0))
        assert torch.equal(draws, again)
        first, second = trainer.eval_dataset.pairs[:8].T
        information = vote_information(draws[:, first].numpy(), draws[:, second].numpy())
        unsure[number] = information.mean()
    assert unsure[1080] < 0.7 * unsure[180]


def test_an_untrained_model_has_nothing_to_draw_from(train_votes):
    model, questions = make_model(), Questions(train_votes, make_model().config)
    with pytest.raises(RuntimeError, match="no posterior.*RewardTrainer"):
        model.sample_logits(**questions.decode([0]))


@pytest.fixture
def pretrained(tmp_path):
    vit = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    AutoModel.from_config(ViTConfig(**vit, image_size=SIZE, patch_size=4)).save_pretrained(tmp_path / "vit")

    def make():
        torch.manual_seed(0)
        config = {"criteria": CRITERIA, "labels": LABELS, "image_size": SIZE, "hidden_size": 16}
        return OneRewardModel.from_backbone(tmp_path / "vit", **config)

    return make


ADAPTER = LoraConfig(r=4, target_modules="all-linear")


def test_an_adapter_of_the_backbone_is_trained_saved_folded_in_and_resumed(make_trainer, pretrained):
    settings = {"peft_config": ADAPTER, "max_steps": 6, "save_steps": 3, "logging_steps": 1}
    trainer = make_trainer(model=pretrained(), **settings)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert any("lora_B" in name for name in changed) and any(name.startswith("heads.outputs") for name in changed)
    assert any("patch_embeddings" in name for name in changed)  # has to learn the mask and the source
    assert not any("base_layer" in name and "patch_embeddings" not in name for name in changed)

    trainer.save_model()
    inputs = trainer.train_dataset.decode(range(6))
    loaded = AutoModel.from_pretrained(trainer.args.output_dir)
    for criterion, rewards in trainer.model.score(**inputs).items():
        torch.testing.assert_close(loaded.score(**inputs)[criterion], rewards, atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name in loaded.state_dict())

    resumed = make_trainer(model=pretrained(), **settings)
    resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-3"))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("peft_config", [None, ADAPTER], ids=["all weights", "adapter"])
def test_the_best_checkpoint_is_what_is_left(make_trainer, pretrained, peft_config):
    trainer = make_trainer(
        model=pretrained(),
        peft_config=peft_config,
        load_best_model_at_end=True,
        metric_for_best_model="eval_log_loss/bright",
        greater_is_better=True,  # so that the best is not the last
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        max_steps=6,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-6"
    kept, inputs = OneRewardModel.from_pretrained(best), trainer.train_dataset.decode(range(4))
    with torch.no_grad():
        found, expected = (m.eval()(**m.prepare_inputs(**inputs)).logits for m in (trainer.model, kept))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_an_adapter_that_cannot_be_folded_in_is_refused(make_trainer):
    with pytest.raises(ValueError, match="'.*convolution', a WeightStandardizedConv2d, .*cannot be folded"):
        make_trainer(peft_config=LoraConfig(r=2, target_modules=["convolution"]))


def test_a_task_has_criteria_of_its_own(make_trainer, train_votes):
    config = {"criteria": [*CRITERIA, "removal_quality"], "task_criteria": {"remove": ["removal_quality"]}}
    votes = train_votes.select(range(36)).to_list()
    removed = [
        {
            **vote,
            "task": "remove",
            "criterion": "removal_quality",
            "vote_id": f"r{i}",
            "pair_id": f"r{vote['pair_id']}",
        }
        for i, vote in enumerate(votes)
    ]
    both = datasets.Dataset.from_list(votes + removed, features=VOTE_FEATURES)
    trainer = make_trainer(both, make_model(**config), max_steps=2)
    trainer.train()
    inputs = trainer.train_dataset.decode(range(len(trainer.train_dataset.candidates)))
    rewards = trainer.model.score(**inputs)
    removal = torch.tensor([task == "remove" for task in inputs["tasks"]])
    assert torch.equal(rewards["bright"].isnan(), removal) and not rewards["removal_quality"].isnan().any()

    wrong = datasets.Dataset.from_list([{**removed[0], "criterion": "bright"}], features=VOTE_FEATURES)
    with pytest.raises(ValueError, match=r"Row 0 is a vote on 'bright' of the task 'remove'.*\['removal_quality'\]"):
        Questions(wrong, make_model(**config).config)
    with pytest.raises(ValueError, match="`task_criteria` has .*'beauty'"):
        make_model(task_criteria={"remove": ["beauty"]})


def test_one_name_for_two_things_is_refused(train_votes):
    rows = train_votes.select(range(2)).to_list()
    rows[1]["case_id"] = "another"
    with pytest.raises(ValueError, match="Rows 0 and 1 share the `pair_id`"):
        Questions(datasets.Dataset.from_list(rows, features=VOTE_FEATURES), make_model().config)


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


@pytest.fixture
def script():
    path = Path(__file__).parents[2] / "trainers" / "reward.py"
    spec = importlib.util.spec_from_file_location("reward_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_launch_script_trains_and_saves(tmp_path, train_votes, script):
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


def test_the_launch_script_adapts_a_pretrained_backbone(tmp_path, train_votes, script, pretrained):
    save_votes(train_votes.select(range(72)), tmp_path / "votes.parquet")
    options = {
        "dataset_name": tmp_path / "votes.parquet",
        "backbone": tmp_path / "vit",
        "use_peft": "true",
        "lora_r": 2,
        "gaussian": "true",
        "prompt_buckets": 16,
        "labels": '{"background": 0, "lesion": 1}',
        "task_criteria": '{"remove": ["bright"]}',
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "use_cpu": "true",
        "report_to": "none",
    }
    script.main(*script.parser().parse_args_and_config([x for k, v in options.items() for x in (f"--{k}", str(v))]))
    config = OneRewardModel.from_pretrained(tmp_path / "out").config
    assert config.gaussian and config.prompt_buckets == 16 and config.task_criteria == {"remove": ["bright"]}
    assert config.vision_config.model_type == "vit" and config.vision_image_size == SIZE
