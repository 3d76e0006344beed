"""The denoiser as a stochastic policy: pure tensor functions that know nothing of rewards, pipelines or trainers."""

from .ddim import Transition, ddim_alphas, ddim_step
from .gaussian import gaussian_kl, gaussian_log_prob, masked_mean
from .loss import adapt_beta, clipped_surrogate
from .window import seeded_generator, stochastic_window


__all__ = [
    "Transition",
    "adapt_beta",
    "clipped_surrogate",
    "ddim_alphas",
    "ddim_step",
    "gaussian_kl",
    "gaussian_log_prob",
    "masked_mean",
    "seeded_generator",
    "stochastic_window",
]
