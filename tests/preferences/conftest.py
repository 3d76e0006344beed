"""Candidates and votes without a pipeline: spoilt phantom targets."""

import datasets
import numpy as np
import pytest

from onereward.data.phantom import load_phantom
from onereward.preferences import CANDIDATE_FEATURES, SimulatedRater, simulate_votes
from onereward.preferences.candidates import spoil
from onereward.preferences.schema import to_png


@pytest.fixture(scope="session")
def rows():
    """Twelve rows of two test cases: two contrasts, all three tasks."""
    return list(load_phantom(2, contrasts=("t1c", "t2f"), split="test", seed=0))


@pytest.fixture(scope="session")
def candidates(rows):
    """Five candidates for each of the rows: the target itself and four spoilt ones."""
    table = []
    for index, row in enumerate(rows):
        target = (np.asarray(row["target"]), "target", 0)
        made = [target] + [spoil(row, [target], seed=10 * index + number) for number in range(4)]
        encoded = {name: value if isinstance(value, str) else to_png(value) for name, value in row.items()}
        for picture, model, seed in made:
            own = {"condition": f"condition-{index}", "candidate": to_png(picture), "model": model, "seed": seed}
            table.append({**encoded, **own})
    return datasets.Dataset.from_list(table, features=CANDIDATE_FEATURES)


@pytest.fixture(scope="session")
def simulated(candidates):
    """Votes and truths of three raters on four pairs of each condition."""
    return simulate_votes(candidates, pairs_per_condition=4, seed=0)


@pytest.fixture(scope="session")
def crowd(candidates):
    """Votes and truths of 200 equal raters with every habit there is, on two pairs of each condition."""
    raters = tuple(SimulatedRater(f"simulated-{i}", 0.7, 0.8, 0.3, 0.25, 0.1) for i in range(200))
    return simulate_votes(candidates, raters, pairs_per_condition=2, seed=3)
