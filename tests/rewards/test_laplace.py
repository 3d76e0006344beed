"""The last layer's uncertainty, against exact answers."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import multivariate_normal
from sklearn.linear_model import BayesianRidge

from onereward.rewards.laplace import fisher_information, last_layer_posterior
from onereward.rewards.losses import NO_TIES, davidson_log_probabilities


@pytest.mark.parametrize("log_nu", [NO_TIES, -1.0, 0.7])
def test_information_is_the_curvature_of_the_log_likelihood(log_nu):
    difference = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    nu = torch.full_like(difference, log_nu)
    information = fisher_information(difference, nu)
    first, _, second = davidson_log_probabilities(difference, nu).exp().unbind(-1)
    torch.testing.assert_close(information, (first + second - (first - second) ** 2) / 4)
    for outcome in range(3):  # the same for each outcome, so that it is the observed information, too
        log_p = davidson_log_probabilities(difference, nu)[:, outcome]
        (slope,) = torch.autograd.grad(log_p.sum(), difference, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), difference)
        torch.testing.assert_close(information, -curvature)


def test_uncertain_logits_tell_less():
    difference, nu = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    sure, unsure = (fisher_information(difference, nu, torch.full_like(nu, v)) for v in (0.0, 4.0))
    assert (unsure < 0.7 * sure).all()


def test_the_posterior_is_the_inverse_of_the_curvature_with_the_prior():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 6, generator=generator)
    curvature, weight = rows.T @ rows, torch.randn(6, generator=generator)
    factor, tau = last_layer_posterior(curvature, weight)
    expected = torch.linalg.inv(curvature + tau * torch.eye(6))
    torch.testing.assert_close(factor @ factor.T, expected, rtol=1e-4, atol=1e-6)


def test_the_prior_is_that_of_bayesian_linear_regression():
    """With Gaussian answers of variance 1 the approximation is exact; scikit-learn maximizes the same evidence."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4000, 8)) * np.geomspace(0.05, 1, 8)
    answers = rows @ rng.normal(size=8) * 0.3 + rng.normal(size=4000)
    ridge = BayesianRidge(fit_intercept=False, alpha_1=0, alpha_2=0, lambda_1=0, lambda_2=0, tol=1e-8, max_iter=5000)
    ridge.fit(rows, answers)
    noise = 1 / np.sqrt(ridge.alpha_)
    rows, answers = rows / noise, answers / noise
    curvature, tau = rows.T @ rows, None
    for _ in range(50):  # the weights depend on the prior, and the prior on the weights
        weight = np.linalg.solve(curvature + (tau or 1.0) * np.eye(8), rows.T @ answers)
        factor, tau = last_layer_posterior(torch.from_numpy(curvature), torch.from_numpy(weight))
    assert tau == pytest.approx(ridge.lambda_, rel=0.05)
    np.testing.assert_allclose(factor @ factor.T, ridge.sigma_, rtol=0.05, atol=1e-5)


def test_draws_explain_how_far_a_fit_on_other_votes_would_be():
    """Logistic regression on fresh votes, again and again: 95 of 100 intervals hold the true difference."""
    rng, hits, tries = np.random.default_rng(1), 0, 0
    truth = rng.normal(size=4) * 0.7
    for _ in range(150):
        rows = rng.normal(size=(300, 4))
        wins = rng.random(300) < 1 / (1 + np.exp(-rows @ truth))
        weight = np.zeros(4)
        for _ in range(30):
            p = 1 / (1 + np.exp(-rows @ weight))
            hessian = (rows * (p * (1 - p))[:, None]).T @ rows + 1e-3 * np.eye(4)
            weight += np.linalg.solve(hessian, rows.T @ (wins - p) - 1e-3 * weight)
        d = torch.from_numpy(rows @ weight)
        information = fisher_information(d, torch.full_like(d, NO_TIES)).numpy()
        factor, _ = last_layer_posterior(
            torch.from_numpy((rows * information[:, None]).T @ rows), torch.from_numpy(weight)
        )
        new = rng.normal(size=(20, 4))
        std = np.linalg.norm(new @ factor.numpy(), axis=1)
        hits += (np.abs(new @ (weight - truth)) < 1.96 * std).sum()
        tries += 20
    assert 0.92 < hits / tries < 0.975


@pytest.mark.parametrize("std", [0.1, 1.0, 3.0, 4.2])
def test_votes_on_uncertain_logits_are_the_mean_over_what_they_may_be(std):
    for d, log_nu in [(-3.0, 0.5), (0.0, -1.0), (2.5, -3.0)]:
        tensors = (torch.tensor(x, dtype=torch.float64) for x in (d, log_nu, std**2))
        found = davidson_log_probabilities(*tensors).exp()
        assert found.sum() == pytest.approx(1, abs=1e-9)
        for outcome in range(3):

            def integrand(x, d=d, log_nu=log_nu, outcome=outcome):
                weights = np.exp([x / 2, log_nu, -x / 2])
                return weights[outcome] / weights.sum() * multivariate_normal.pdf(x, d, std**2)

            expected, _ = quad(integrand, d - 9 * std, d + 9 * std, limit=300)
            assert found[outcome].item() == pytest.approx(expected, abs=1e-3)
