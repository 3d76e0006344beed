"""The likelihood of votes against the closed form, scipy, choix and the numpy version of the votes' simulator."""

import choix
import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from onereward.preferences import davidson_probabilities
from onereward.rewards.losses import davidson_log_probabilities, preference_loss


NO_TIES = -60.0  # log nu


def test_probabilities_are_those_of_the_simulated_raters():
    difference = torch.linspace(-30, 30, 61, dtype=torch.float64)
    for nu in (0.01, 0.5, 4.0):
        found = davidson_log_probabilities(difference, torch.tensor(nu, dtype=torch.float64).log()).exp()
        np.testing.assert_allclose(found, davidson_probabilities(difference.numpy(), nu), rtol=1e-12)


def test_without_ties_it_is_bradley_terry():
    difference = torch.linspace(-8, 8, 33, dtype=torch.float64)
    found = davidson_log_probabilities(difference, torch.tensor(NO_TIES, dtype=torch.float64))
    torch.testing.assert_close(found[:, 0], torch.nn.functional.logsigmoid(difference), rtol=1e-12, atol=1e-12)


def test_large_differences_stay_finite_with_their_gradients():
    difference = torch.tensor([[-1e4], [1e4]], requires_grad=True)
    loss = preference_loss(difference, torch.zeros(1), torch.tensor([[[1.0, 0, 0]], [[1.0, 0, 0]]]))
    loss.backward()
    assert loss.item() == pytest.approx(5000, rel=1e-6)  # one vote costs 1e4, the other nothing
    assert difference.grad.flatten().tolist() == pytest.approx([-0.5, 0.0])


def test_swapped_pairs_cost_the_same():
    generator = torch.Generator().manual_seed(0)
    difference = 3 * torch.randn(50, 3, generator=generator)
    log_nu = torch.randn(3, generator=generator)
    counts = torch.randint(0, 4, (50, 3, 3), generator=generator).float()
    for pair in range(50):
        one = preference_loss(difference[pair : pair + 1], log_nu, counts[pair : pair + 1])
        other = preference_loss(-difference[pair : pair + 1], log_nu, counts[pair : pair + 1].flip(-1))
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)  # but for the order of the sum


def test_the_best_fit_to_one_pair_is_the_closed_form():
    """With w wins, t ties and l losses the likelihood is highest at d = log(w / l), nu = t / sqrt(w l)."""
    wins, ties, losses = 12.0, 5.0, 3.0
    counts = torch.tensor([[[wins, ties, losses]]])
    parameters = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = preference_loss(parameters[:1, None], parameters[1:], counts)
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = [np.log(wins / losses), np.log(ties / np.sqrt(wins * losses))]
    np.testing.assert_allclose(parameters.detach(), expected, atol=1e-4)


@pytest.fixture
def tournament():
    """1,500 games of six items of known strength, without ties: (winner, loser)."""
    rng = np.random.default_rng(1)
    strength = np.array([1.2, 0.5, 0.1, -0.2, -0.6, -1.0])
    games = []
    for _ in range(1500):
        first, second = rng.choice(6, 2, replace=False)
        first_wins = rng.random() < 1 / (1 + np.exp(strength[second] - strength[first]))
        games.append((first, second) if first_wins else (second, first))
    return games


def test_minimizing_it_gives_the_utilities_that_choix_finds(tournament):
    counts = torch.zeros(6, 6, 3, dtype=torch.float64)
    for winner, loser in tournament:
        counts[winner, loser, 0] += 1
    counts = counts.view(36, 1, 3)
    first, second = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")

    def loss_and_gradient(utilities):
        utilities = torch.tensor(utilities, requires_grad=True)
        difference = (utilities[first] - utilities[second]).view(36, 1)
        loss = preference_loss(difference, torch.tensor([NO_TIES], dtype=torch.float64), counts)
        loss.backward()
        return loss.item(), utilities.grad.numpy()

    found = minimize(loss_and_gradient, np.zeros(6), jac=True, method="BFGS", options={"gtol": 1e-9}).x
    expected = choix.opt_pairwise(6, [(int(winner), int(loser)) for winner, loser in tournament], alpha=0)
    np.testing.assert_allclose(found - found.mean(), expected - expected.mean(), atol=1e-4)


def test_counting_votes_equals_listing_them():
    generator = torch.Generator().manual_seed(2)
    difference, log_nu = torch.randn(4, 2, generator=generator), torch.tensor([0.3, -0.7])
    counts = torch.tensor([[[2.0, 0, 1], [0, 0, 0]], [[0, 3, 0], [1, 1, 1]], [[0, 0, 1], [2, 0, 0]], [[1, 0, 0]] * 2])
    votes = [
        -davidson_log_probabilities(difference[pair, head], log_nu[head])[outcome]
        for pair in range(4)
        for head in range(2)
        for outcome in range(3)
        for _ in range(int(counts[pair, head, outcome]))
    ]
    torch.testing.assert_close(preference_loss(difference, log_nu, counts), torch.stack(votes).mean())


def test_a_criterion_nobody_judged_gets_no_gradient():
    difference = torch.ones(3, 2, requires_grad=True)
    log_nu = torch.zeros(2, requires_grad=True)
    counts = torch.zeros(3, 2, 3)
    counts[:, 0, 0] = 1
    preference_loss(difference, log_nu, counts).backward()
    assert (difference.grad[:, 0] < 0).all() and log_nu.grad[0] > 0
    assert (difference.grad[:, 1] == 0).all() and log_nu.grad[1] == 0


def test_a_batch_without_votes_costs_nothing():
    loss = preference_loss(torch.ones(3, 2, requires_grad=True), torch.zeros(2), torch.zeros(3, 2, 3))
    assert loss.item() == 0
