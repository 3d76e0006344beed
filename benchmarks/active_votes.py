"""
How many votes active collection saves on real candidates, beside the linear world of tests/preferences/test_active.py.

    onereward demo --output_dir runs/demo
    python benchmarks/active_votes.py runs/demo

The pairs and votes are those of the demo: candidates of the small pipeline, simulated raters, a quarter of the cases
held out. The reward is a Bayesian logistic regression on what an untrained reward model sees, so it is never right;
a vote is worth asking for by what it is expected to tell of it (`vote_information`). Printed are the votes that an
accuracy on unseen pairs needs, mean of the seeds, for random pairs and for several shares of active ones.
"""

import argparse
from pathlib import Path

import datasets
import numpy as np
import torch
from scipy.special import expit
from tqdm.auto import tqdm

from onereward.preferences import CRITERIA, load_votes, vote_information
from onereward.rewards import OneRewardConfig, OneRewardModel
from onereward.trainers.reward import Questions


def read(folder: Path) -> tuple[np.ndarray, dict, np.ndarray]:
    """Features of each pair's difference, for each criterion one vote and the better side of each pair, and cases."""
    votes = load_votes(folder / "votes.parquet")
    truths = datasets.Dataset.from_parquet(str(folder / "votes_truth.parquet"))
    config = OneRewardConfig(labels={"background": 0, "NCR": 1, "ED": 2, "ET": 3}, image_size=votes[0]["image"].height)
    torch.manual_seed(0)
    model, questions, seen = OneRewardModel(config).eval(), Questions(votes, config), []
    model.heads.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        numbers = range(len(questions.candidates))
        for start in tqdm(numbers[::128], desc="Looking"):
            model(**model.prepare_inputs(**questions.decode(numbers[start : start + 128])))
    features = torch.cat(seen)
    features = ((features - features.mean(0)) / (features.std(0) + 1e-6)).clamp(-4, 4)
    differences = features[questions.pairs[:, 0]] - features[questions.pairs[:, 1]]

    number = {pair: i for i, pair in enumerate(dict.fromkeys(votes["pair_id"]))}
    better_side = dict(zip(truths["vote_id"], np.array(truths["p_0"]) > np.array(truths["p_1"]), strict=True))
    answers = {criterion: np.full((len(number), 2), np.nan) for criterion in CRITERIA}
    columns = (votes[name] for name in ("vote_id", "pair_id", "criterion", "label_0"))
    for vote, pair, criterion, label in zip(*columns, strict=True):
        answers[criterion][number[pair]] = label, better_side[vote]
    return differences.numpy(), answers, questions.cases


def laplace(features: np.ndarray, answers: np.ndarray, prior: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Posterior of Bayesian logistic regression: its mode, and the covariance there."""
    weights = np.zeros(features.shape[1])
    for _ in range(15):
        p = expit(features @ weights)
        hessian = (features * (p * (1 - p))[:, None]).T @ features + prior * np.eye(len(weights))
        weights = weights + np.linalg.solve(hessian, features.T @ (answers - p) - prior * weights)
    return weights, np.linalg.inv(hessian)


def accuracies(differences, answers, cases, share, seed, most, step=20, size=60) -> list[float]:
    """Accuracy on the pairs of unseen cases after 30, 50, 70, ... votes, `share` of them asked for actively."""
    rng, unseen = np.random.default_rng(seed), cases % 4 == 0
    pool, test = np.flatnonzero(~unseen), np.flatnonzero(unseen)
    directions = np.linalg.svd(differences[pool], full_matrices=False)[2][:size]
    features = differences @ directions.T
    features = features / features[pool].std(0).max()
    asked, found = list(rng.choice(pool, 30, replace=False)), []
    while len(asked) <= most:
        mode, covariance = laplace(features[asked], answers[asked, 0])
        found.append(((features[test] @ mode > 0) == answers[test, 1]).mean())
        members = rng.multivariate_normal(mode, covariance, size=32)
        information = vote_information(members @ features[pool].T, np.zeros((32, len(pool))))
        information[np.isin(pool, asked)] = -1
        new = list(pool[np.argsort(-information)[: round(share * step)]])
        asked += new + list(rng.choice(np.setdiff1d(pool, asked + new), step - len(new), replace=False))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="folder of a demo run")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--most", type=int, default=1000, help="votes to end at")
    arguments = parser.parse_args()
    differences, answers, cases = read(arguments.run)
    shares, table = (0.0, 0.5, 1.0), []
    for criterion in CRITERIA:
        curves = [
            np.mean(
                [
                    accuracies(differences, answers[criterion], cases, share, seed, arguments.most)
                    for seed in tqdm(range(arguments.seeds), desc=f"{criterion}, {share:.0%} active", leave=False)
                ],
                axis=0,
            )
            for share in shares
        ]
        for target in (0.68, 0.70, 0.72, 0.74):
            needed = [next((30 + 20 * i for i, a in enumerate(curve) if a >= target), None) for curve in curves]
            if needed[0] is not None:
                table.append((criterion, target, needed))
    print("| criterion | accuracy | random pairs | half active | all active |\n| --- | ---: | ---: | ---: | ---: |")
    for criterion, target, needed in table:
        cells = (f"over {arguments.most}" if n is None else str(n) for n in needed)
        print(f"| {criterion} | {target:.2f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
