"""The habits of raters: found where there are some, and no part of what is published."""

import numpy as np
import torch

from onereward.rewards.losses import NO_TIES, preference_loss
from onereward.rewards.rater_terms import RaterTerms


def fit(loss, parameters, steps=400):
    optimizer = torch.optim.Adam(parameters, lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def test_a_rater_without_habits_sees_what_there_is():
    terms, difference = RaterTerms(2, 3), torch.randn(5, 3)
    raters, sides = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([1.0, -1, 0, 1, -1])
    assert torch.equal(terms.of_pairs(difference, raters, sides), difference)
    assert torch.equal(terms.of_ratings(difference, raters), difference)
    assert terms.penalty() == 0


def test_a_coin_a_reversed_rater_and_one_who_likes_the_left_are_found_from_their_votes():
    rng = np.random.default_rng(0)
    utilities, habits = rng.normal(size=60) * 2, [(1, 0), (1, 0), (0, 0), (-1, 0), (1, 1.0)]
    raters = torch.from_numpy(rng.integers(5, size=5000))
    first, second = torch.from_numpy(rng.integers(60, size=(2, 5000)))
    sides = torch.from_numpy(rng.choice([-1.0, 1.0], 5000)).float()
    a, b = torch.tensor(habits).float()[raters].T
    d = a * torch.from_numpy(utilities[first] - utilities[second]).float() + b * sides
    wins = (torch.rand(5000, generator=torch.Generator().manual_seed(0)) < d.sigmoid()).float()
    counts = torch.stack([wins, 0 * wins, 1 - wins], dim=-1)[:, None]

    terms, found = RaterTerms(5, 1), torch.zeros(60, 1, requires_grad=True)
    no_ties = torch.tensor([NO_TIES])

    def loss():
        seen = terms.of_pairs(found[first] - found[second], raters, sides)
        return preference_loss(seen, no_ties, counts) + terms.penalty() / 5000

    fit(loss, [found, *terms.parameters()])
    consistency, pull = terms.consistency.detach(), terms.pull.detach()
    torch.testing.assert_close(
        consistency / consistency[:2].mean(), torch.tensor([1, 1, 0, -1, 1.0]), atol=0.2, rtol=0
    )
    torch.testing.assert_close(pull, torch.tensor([0, 0, 0, 0, 1.0]), atol=0.25, rtol=0)
    assert np.corrcoef(found[:, 0].detach(), utilities)[0, 1] > 0.98


def test_a_severe_rater_is_found_from_ratings():
    rng = np.random.default_rng(1)
    utilities, severity = rng.normal(size=(80, 1)), np.array([-0.8, 0.0, 0.8])
    images, raters = (torch.from_numpy(x) for x in (rng.integers(80, size=1500), rng.integers(3, size=1500)))
    means = torch.from_numpy(utilities[images, 0] - severity[raters]).sigmoid().numpy()
    share = torch.from_numpy(rng.binomial(10, means) / 10).float()[:, None]  # eleven points on a scale
    labels = torch.stack([share, 0 * share, 1 - share], dim=-1)
    terms, found = RaterTerms(3, 1), torch.zeros(80, 1, requires_grad=True)

    def loss():
        seen = terms.of_ratings(found[images], raters)
        return preference_loss(seen, torch.tensor([NO_TIES]), labels) + terms.penalty() / 1500

    fit(loss, [found, *terms.parameters()])
    differences = terms.severity[:, 0].detach() - terms.severity[1, 0].item()
    spread = terms.log_spread.exp().item() * found.std().item() / utilities.std()  # in units of the truth
    torch.testing.assert_close(differences / spread, torch.tensor([-0.8, 0.0, 0.8]), atol=0.2, rtol=0)
    assert np.corrcoef(found[:, 0].detach(), utilities[:, 0])[0, 1] > 0.95
