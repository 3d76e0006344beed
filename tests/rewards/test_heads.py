"""Reward heads by themselves, on features from elsewhere: real ratings of real brain scans."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score

from onereward.rewards import OneRewardConfig
from onereward.rewards.losses import preference_loss
from onereward.rewards.modeling_onereward import RewardHeads


RATINGS = Path(os.environ.get("ONEREWARD_DATA", "/nowhere")) / "ratings_mriqc_abide"


def pairs_of(labels: np.ndarray, number: int, rng: np.random.Generator) -> tuple[np.ndarray, torch.Tensor]:
    """Pairs of scans, `(number, 2)`, and the vote that one rater's labels imply: the higher wins, equals are a tie."""
    pairs = rng.integers(len(labels), size=(number, 2))
    outcome = 1 - np.sign(labels[pairs[:, 0]] - labels[pairs[:, 1]]).astype(int)
    return pairs, torch.eye(3)[outcome][:, None]


def train_heads(features: np.ndarray, labels: np.ndarray, seed: int) -> RewardHeads:
    torch.manual_seed(seed)
    features = torch.from_numpy(features).float()
    pairs, counts = pairs_of(labels, 4000, np.random.default_rng(seed))
    heads = RewardHeads(features.shape[1], OneRewardConfig(criteria=["quality"], tasks=["fill"], dropout=0.5))
    heads.norm.momentum = None  # the statistics of all batches, not of the last
    steps, size = 150, 256
    optimizer = torch.optim.AdamW(heads.parameters(), weight_decay=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        batch = torch.arange(step * size, (step + 1) * size) % len(pairs)
        chosen = torch.from_numpy(pairs)[batch]
        output = heads(features[chosen.flatten()], torch.zeros(2 * size, dtype=torch.long))
        first, second = output.logits.view(size, 2, 1).unbind(dim=1)
        optimizer.zero_grad()
        preference_loss(first - second, output.log_nu, counts[batch]).backward()
        optimizer.step()
        schedule.step()
    return heads.eval()


@pytest.fixture(scope="module")
def abide():
    if not RATINGS.is_dir():
        pytest.skip("the ABIDE ratings are not here")
    features = pd.read_csv(RATINGS / "x_abide.csv").set_index("subject_id")
    ratings = pd.read_csv(RATINGS / "y_abide.csv").set_index("subject_id")
    return features, ratings.loc[ratings.index.isin(features.index)]


@pytest.mark.parametrize("rater", ["rater_1", "rater_2"])
def test_pairs_from_one_rater_order_the_scans_of_unseen_sites_as_well_as_a_random_forest(abide, rater):
    """Leave one of 17 sites out: is a scan to be excluded, or not? The baseline is that of the data's source."""
    features, ratings = abide
    rated = ratings[ratings[rater].notna()]
    x, labels, site = features.loc[rated.index].to_numpy(), rated[rater].to_numpy(), rated["site"].to_numpy()
    found, forest = np.zeros(len(labels)), np.zeros(len(labels))
    for held_out in np.unique(site):
        unseen = site == held_out
        classifier = RandomForestClassifier(300, random_state=0, n_jobs=2).fit(x[~unseen], labels[~unseen] >= 0)
        forest[unseen] = classifier.predict_proba(x[unseen])[:, 1]
        heads = train_heads(x[~unseen], labels[~unseen], seed=0)
        rows = torch.from_numpy(x[unseen]).float()
        with torch.no_grad():
            found[unseen] = heads(rows, torch.zeros(len(rows), dtype=torch.long)).logits[:, 0]
    auc = {name: roc_auc_score(labels >= 0, score) for name, score in (("pairs", found), ("forest", forest))}
    print(rater, auc)
    assert auc["forest"] > 0.7  # the baseline is one
    assert auc["pairs"] >= max(auc["forest"], 0.78), auc
