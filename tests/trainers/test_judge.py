"""What `JudgeTrainer` promises: the judge learns from votes, in both orders, and comes back from disk as it was."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors.torch import load_file
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, log_loss
from trl import TrlParser


sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from ddpo_setup import make_trainer as make_ddpo_trainer  # noqa: E402
from tiny_judge import SHORT_QUESTION, make_votes, tiny_judge, tiny_parts  # noqa: E402

from onereward.preferences import VOTE_FEATURES, save_votes  # noqa: E402
from onereward.rewards.judge import GenerativeJudge, judge_loss  # noqa: E402
from onereward.trainers.judge import JudgeConfig, JudgePairs, JudgeTrainer, judge_metrics  # noqa: E402


CRITERIA = ["bright", "dark"]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def train_votes():
    return make_votes(192, seed=0)


@pytest.fixture(scope="module")
def unseen():
    return make_votes(100, seed=1)


@pytest.fixture
def make_trainer(tmp_path, train_votes, unseen):
    def make(votes=train_votes, judge=None, lora=None, **settings):
        args = JudgeConfig(
            **{
                "output_dir": str(tmp_path / "judge"),
                "learning_rate": 5e-3,
                "max_steps": 2,
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 1,
                "per_device_eval_batch_size": 50,
                "save_strategy": "no",
                "use_cpu": True,
                "report_to": "none",
                "disable_tqdm": True,
            }
            | settings
        )
        judge = judge or tiny_judge(criteria=CRITERIA, question=SHORT_QUESTION)
        adapter = LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **(lora or {})})
        return JudgeTrainer(judge, args, votes, unseen, adapter)

    return make


@pytest.fixture
def base(tmp_path):
    model, processor = tiny_parts()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def sides(votes):
    rows = [vote for vote in votes if vote["criterion"] == "bright"]
    return [row["image_0"] for row in rows], [row["image_1"] for row in rows]


# --------------------------------------------------------------------------------------------------------- learning


def test_it_learns_a_preference_and_its_opposite(make_trainer, unseen):
    """One model, two criteria that contradict each other: it must look at the images and read the question."""
    trainer = make_trainer(max_steps=120, per_device_train_batch_size=16)
    before = trainer.evaluate()
    trainer.train()
    metrics = trainer.evaluate()
    for criterion in CRITERIA:
        right = round(100 * metrics[f"eval_accuracy/{criterion}"])
        assert binomtest(right, 100, 0.8, alternative="greater").pvalue < 0.01
        assert metrics[f"eval_log_loss/{criterion}"] < before[f"eval_log_loss/{criterion}"]
    assert before["eval_accuracy"] < 0.6  # whatever a random model makes of one, it cannot have both
    assert metrics["eval_order_swap_gap"] < before["eval_order_swap_gap"]
    assert metrics["eval_order_swap_agreement"] > before["eval_order_swap_agreement"]

    # as a reward of groups of two, it is right as often as it says
    rows = [vote for vote in unseen if vote["criterion"] == "dark"]
    columns = {"images": ("image_0", "image_1"), "sources": ("image", "image"), "masks": ("mask", "mask")}
    columns = {
        name: torch.stack([torch.tensor(np.array(row[side]))[None] / 255 for row in rows for side in both])
        for name, both in columns.items()
    }
    rewards = trainer.judge.score(**columns, task=[row["task"] for row in rows for _ in range(2)])
    right = sum(reward == row["label_0"] for reward, row in zip(rewards["dark"][::2].tolist(), rows, strict=True))
    assert right == round(100 * metrics["eval_accuracy/dark"])


def test_votes_that_are_all_ties_make_it_undecided(make_trainer):
    trainer = make_trainer(make_votes(64, seed=2, ties=True), max_steps=40)
    trainer.train()
    p, gap = trainer.judge.compare(*sides(make_votes(20, seed=3)), criterion="bright", return_gap=True)
    assert (p - 0.5).abs().max() < 0.05 and gap.max() < 0.1


def test_the_loss_is_the_cross_entropy_of_two_answers():
    logits = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1.0, 0, 0.5, 1, 0.5, 0.25])
    expected = F.cross_entropy(logits, torch.stack([labels, 1 - labels], dim=1))
    torch.testing.assert_close(judge_loss(logits[:, 0] - logits[:, 1], labels), expected)


def test_each_pair_is_asked_about_in_both_orders(make_trainer):
    trainer = make_trainer()
    rows = [trainer.train_dataset[i] for i in range(3)]
    batch = trainer.collate(rows)
    pictures = batch["pixel_values"].unflatten(0, (2, 3, 2, -1))  # order, pair, side, patches
    assert torch.equal(pictures[0], pictures[1].flip(1)) and not torch.equal(pictures[0], pictures[1])
    trainer.model.eval()
    log_odds = trainer.judge.log_odds({k: v for k, v in batch.items() if k not in ("counts", "kinds")})
    wins = batch["counts"][:, 0]
    expected = F.binary_cross_entropy(log_odds.sigmoid(), torch.cat([wins, 1 - wins]))
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)


def test_votes_of_several_raters_count_one_by_one(make_trainer):
    votes = make_votes(4, seed=4, raters=3)
    # three raters, of whom the first wavers on one pair and the second contradicts
    labels = [0.5 if i == 3 else 1 - v if i == 4 else v for i, v in enumerate(votes["label_0"])]
    votes = votes.remove_columns(["label_0", "label_1"])
    votes = votes.add_column("label_0", labels).add_column("label_1", [1 - v for v in labels])
    votes = votes.select_columns(list(VOTE_FEATURES)).cast(VOTE_FEATURES)
    votes = votes.select(range(2, len(votes)))  # one vote on the first question, three on the others
    alone = votes.map(lambda vote: {"pair_id": vote["vote_id"]})
    losses = []
    for each in (votes, alone):
        trainer = make_trainer(each)
        trainer.model.eval()
        pairs = trainer.train_dataset
        losses.append(trainer.compute_loss(trainer.model, trainer.collate([pairs[i] for i in range(len(pairs))])))
    assert len(JudgePairs(votes, CRITERIA)) == 8 and len(JudgePairs(alone, CRITERIA)) == 22
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


def test_small_steps_add_up_to_a_large_one(make_trainer):
    weights = []
    for size, steps in ((8, 1), (2, 4)):
        trainer = make_trainer(
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=2, optim="sgd"
        )
        trainer.train()
        weights.append({name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad})
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-7)


def test_recomputing_activations_changes_nothing(make_trainer):
    weights = []
    for recompute in (False, True):
        trainer = make_trainer(activation_checkpointing=recompute, max_steps=3)
        trainer.train()
        weights.append({name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad})
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-7)


def test_only_the_adapter_is_trained(make_trainer):
    trainer = make_trainer()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)


# --------------------------------------------------------------------------------------------------------- on disk


def test_the_adapter_comes_back_to_the_same_probabilities(make_trainer, base, unseen):
    judge = GenerativeJudge.from_pretrained(base, criteria=CRITERIA, question=SHORT_QUESTION)
    trainer = make_trainer(judge=judge, max_steps=4)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(dataset_name="squares")
    folder = Path(trainer.args.output_dir)
    names = {path.name for path in folder.iterdir()}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert names == {"README.md", "provenance.json", "judge_config.json", *adapter}
    loaded = GenerativeJudge.from_pretrained(folder)
    images = sides(unseen)
    p, gap = trainer.judge.compare(*images, criterion="dark", return_gap=True)
    again, gap_again = loaded.compare(*images, criterion="dark", return_gap=True)
    assert torch.equal(p, again) and torch.equal(gap, gap_again)
    assert not torch.equal(p, tiny_judge(question=SHORT_QUESTION).compare(*images, criterion="dark"))

    card = (folder / "README.md").read_text()
    assert "Research use only, not for clinical use." in card and "squares" in card and "No human being" in card
    assert ModelCard(card).data.base_model == str(base)
    assert card.count("---\n") == 2  # no front matter but its own
    for entry in trainer.state.log_history:
        if "eval_accuracy" in entry:
            assert f"{entry['eval_accuracy/bright']:.4g}" in card and f"{entry['eval_order_swap_gap']:.4g}" in card


def test_a_saved_adapter_is_trained_on(make_trainer, base, train_votes, tmp_path):
    judge = GenerativeJudge.from_pretrained(base, criteria=CRITERIA, question=SHORT_QUESTION)
    first = make_trainer(judge=judge)
    first.train()
    first.save_model()
    folder = first.args.output_dir
    with pytest.raises(ValueError, match="`peft_config` is given, but the judge has an adapter"):
        make_trainer(judge=GenerativeJudge.from_pretrained(folder, is_trainable=True))
    args = JudgeConfig(str(tmp_path / "next"), max_steps=3, use_cpu=True, report_to="none", disable_tqdm=True)
    with pytest.raises(ValueError, match="No weight of the judge can be trained.*is_trainable=True"):
        JudgeTrainer(GenerativeJudge.from_pretrained(folder), args, train_votes)
    trainer = JudgeTrainer(GenerativeJudge.from_pretrained(folder, is_trainable=True), args, train_votes)
    trainer.train()
    trainer.save_model()
    old, new = (load_file(Path(path) / "adapter_model.safetensors") for path in (folder, tmp_path / "next"))
    assert old.keys() == new.keys() and any(not torch.equal(old[name], new[name]) for name in old)


def test_resuming_gives_the_weights_of_an_uninterrupted_run(make_trainer):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    lora = {"lora_dropout": 0.1}  # so that the random numbers must go on too
    whole = make_trainer(lora=lora, **settings)
    whole.train()
    resumed = make_trainer(lora=lora, **settings)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))
    assert any("lora_B" in name and value.any() for name, value in whole.model.state_dict().items())
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


# ---------------------------------------------------------------------------------------------------------- metrics


def test_metrics_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    log_odds = rng.normal(0, 2, (200, 2))
    outcomes = rng.integers(0, 3, 200)
    kinds = [(("fill", "remove")[i % 2], ("a", "b")[i % 3 > 0]) for i in range(200)]
    metrics = judge_metrics(log_odds, np.eye(3)[outcomes], kinds)
    yes = 1 / (1 + np.exp(-log_odds))
    p = yes[:, 0] / 2 + (1 - yes[:, 1]) / 2
    for name, wanted in {"a": (None, "a"), "b": (None, "b"), "remove/b": ("remove", "b")}.items():
        mine = np.array([criterion == wanted[1] and wanted[0] in (None, task) for task, criterion in kinds])
        decided = mine & (outcomes != 1)
        expected = accuracy_score(outcomes[decided] == 0, p[decided] > 0.5)
        assert metrics[f"accuracy/{name}"] == pytest.approx(expected)
        if wanted[0] is None:  # a tie is half a vote for either
            answers = np.concatenate([np.ones(mine.sum()), np.zeros(mine.sum())])
            weights = np.concatenate([1 - outcomes[mine] / 2, outcomes[mine] / 2])
            expected = log_loss(answers, np.tile(p[mine], 2), sample_weight=weights)
            assert metrics[f"log_loss/{name}"] == pytest.approx(expected)
    assert metrics["accuracy"] == pytest.approx((metrics["accuracy/a"] + metrics["accuracy/b"]) / 2)
    assert metrics["order_swap_gap"] == pytest.approx(np.abs(yes.sum(1) - 1).mean())
    assert metrics["order_swap_agreement"] == pytest.approx(accuracy_score(yes[:, 0] > 0.5, yes[:, 1] < 0.5))


def test_votes_that_are_all_ties_have_no_accuracy():
    metrics = judge_metrics(np.ones((2, 2)), np.array([[0, 1, 0], [0, 2, 0]]), [("fill", "a")] * 2)
    assert not any("accuracy" in name for name in metrics) and metrics["log_loss/a"] == pytest.approx(np.log(2))


def test_votes_on_other_criteria_are_refused(make_trainer, train_votes):
    with pytest.raises(ValueError, match=r"on any of \('sharp',\)"):
        make_trainer(judge=tiny_judge(criteria=["sharp"]))


# ------------------------------------------------------------------------------------------------------- in use


def test_ddpo_trains_on_the_judge(tmp_path):
    judge = tiny_judge(criteria=["realism"], prefix="judge/")
    trainer = make_ddpo_trainer(tmp_path, judge, max_steps=1)
    trainer.train()
    assert trainer.reward_names == ["judge/realism"]
    # as many wins as defeats in each group
    logged = [entry for entry in trainer.state.log_history if "rewards/judge/realism/mean" in entry]
    assert logged[0]["rewards/judge/realism/mean"] == pytest.approx(0.5)


def load_script():
    spec = importlib.util.spec_from_file_location("judge_script", REPOSITORY / "trainers" / "judge.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules["judge_script"] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    return script


def test_the_launch_script_trains_and_saves(tmp_path, base, train_votes):
    script = load_script()
    save_votes(train_votes.select(range(40)), tmp_path / "votes.parquet")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"dataset_name: {tmp_path / 'votes.parquet'}\nmodel_name_or_path: {base}\ndtype: float32\n"
        f"output_dir: {tmp_path / 'out'}\nmax_steps: 2\nuse_cpu: true\nreport_to: none\n"
        "disable_tqdm: true\nprocessor_kwargs: {size: {shortest_edge: 576, longest_edge: 1024}}\n"
    )
    script.main(*script.parser().parse_args_and_config(["--config", str(config), "--max_steps", "1"]))
    judge = GenerativeJudge.from_pretrained(tmp_path / "out")
    assert judge.criteria == CRITERIA
    assert judge.prepare_inputs(*sides(train_votes.select([0])))["image_grid_thw"].tolist() == 2 * [[1, 6, 6]]
    assert "Research use only" in (tmp_path / "out" / "README.md").read_text()
    metrics = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert 0 <= metrics["eval_accuracy"] <= 1 and 0 <= metrics["eval_order_swap_gap"] <= 1


def test_the_configuration_file_is_understood(tmp_path):
    script = load_script()
    assert isinstance(script.parser(), TrlParser)
    path = REPOSITORY / "trainers" / "configs" / "judge.yaml"
    given = ["--config", str(path), "--dataset_name", "votes", "--use_cpu", "true", "--output_dir", str(tmp_path)]
    script_args, args = script.parser().parse_args_and_config(given)
    assert script_args.processor_kwargs["size"]["shortest_edge"] == 224 * 224
    assert script_args.lora_target_modules == ["all-linear"] and args.learning_rate == 1e-4
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 16
