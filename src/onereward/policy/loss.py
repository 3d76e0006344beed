"""The loss of a policy-gradient update, and the coefficient of its penalty."""

import torch

from .gaussian import gaussian_kl


# How far the coefficient of the penalty may move from where it starts. A policy starts at its reference, with a
# divergence of 0, and may stay below the target for long. A coefficient that fell all that time would be 0 in the end;
# it could not rise in time when the divergence grows, and would then overshoot as far.
BETA_FALL, BETA_RISE = 2**6, 2**10


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, epsilon: float, epsilon_high: float | None = None
) -> torch.Tensor:
    r"""
    The clipped surrogate loss of [PPO](https://huggingface.co/papers/1707.06347), equation 7, with its sign turned.

    $$L = \max\big(-A r,\; -A \, \mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon_\mathrm{high})\big)$$

    Args:
        ratio (`torch.Tensor`):
            $r = \exp(\log p - \log p_\mathrm{old})$ of each transition, of shape `(B,)`.
        advantages (`torch.Tensor`):
            $A$ of each transition, of shape `(B,)`.
        epsilon (`float`):
            How far the ratio may fall below 1 and still be pushed further down. With log-probabilities that are means
            over elements it is small, 1e-4 say.
        epsilon_high (`float`, *optional*):
            How far it may rise above 1 ([DAPO](https://huggingface.co/papers/2503.14476) uses a larger value). Equal
            to `epsilon` when not given.

    Returns:
        `torch.Tensor`: loss of each transition, of shape `(B,)`.
    """
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def score_function_loss(log_prob: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    r"""
    The loss whose gradient is the score-function estimator, DDPO-SF in [DDPO](https://huggingface.co/papers/2305.13301)
    and REINFORCE elsewhere: $L = -A \log p$. Unbiased for the policy that made the rollout and for no other, hence for
    one update.

    Args:
        log_prob (`torch.Tensor`):
            Log-probability of each transition, of shape `(B,)`.
        advantages (`torch.Tensor`):
            $A$ of each transition, of shape `(B,)`.

    Returns:
        `torch.Tensor`: loss of each transition, of shape `(B,)`.
    """
    return -advantages * log_prob


def guarded_log_ratio(
    log_ratio: torch.Tensor,
    mean: torch.Tensor,
    old_mean: torch.Tensor,
    std: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    The normalised logarithm of the ratio of [GRPO-Guard](https://huggingface.co/papers/2510.22319).

    With $x' = \mu_\mathrm{old} + \sigma z$ the plain logarithm is
    $z \, \Delta\mu / \sigma - \Delta\mu^2 / (2 \sigma^2)$: below 0 on average, so that clipping protects the images
    with a positive advantage too little, and of another width at each step. Adding what the second term takes away,
    and multiplying by $\sigma$, leaves $z \, \Delta\mu$: centred, and alike at all steps.

    Args:
        log_ratio (`torch.Tensor`):
            $\log p - \log p_\mathrm{old}$, each the mean over the masked elements, of shape `(B,)`.
        mean (`torch.Tensor`):
            Mean of the step under the policy, of shape `(B, C, *spatial)`.
        old_mean (`torch.Tensor`):
            Mean under the policy that made the rollout, of the same shape.
        std (`torch.Tensor`):
            Standard deviation of the step, of shape `(B or 1, 1, ...)`.
        mask (`torch.Tensor`, *optional*):
            See [`masked_mean`].

    Returns:
        `torch.Tensor`: tensor of shape `(B,)`.
    """
    return (log_ratio + gaussian_kl(mean, old_mean, std, mask)) * std.flatten()


def adapt_beta(beta: float, kl: float, kl_target: float, start: float) -> float:
    r"""
    The next coefficient of the KL penalty, by the rule of [PPO](https://huggingface.co/papers/1707.06347), section 4:
    twice as much when the divergence exceeds 1.5 times its target, half as much when it falls below its target over
    1.5, else unchanged; and kept within reach of the first coefficient.

    $$\beta' = \mathrm{clip}\big(2^s \beta,\; \beta_0 / 64,\; 1024 \, \beta_0\big), \qquad
    s = \begin{cases} 1 & D > 1.5 \, D_\mathrm{target} \\ -1 & D < D_\mathrm{target} / 1.5 \\
    0 & \text{else} \end{cases}$$

    Args:
        beta (`float`):
            $\beta$, coefficient of the update just made.
        kl (`float`):
            $D$, divergence from the reference measured in it, in nats per element.
        kl_target (`float`):
            Divergence to keep to.
        start (`float`):
            $\beta_0$, coefficient of the first update.

    Returns:
        `float`: coefficient of the next update.
    """
    if kl > 1.5 * kl_target:
        beta = 2 * beta
    elif kl < kl_target / 1.5:
        beta = beta / 2
    return min(max(beta, start / BETA_FALL), start * BETA_RISE)
