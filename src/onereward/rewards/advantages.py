"""From the rewards of a rollout to advantages: normalise each head, weigh and sum, whiten, constrain."""

import math
from collections.abc import Callable, Sequence

import torch


def as_rewards(values: torch.Tensor | Sequence[float | int | None], name: str, batch_size: int) -> torch.Tensor:
    """
    What a reward function returned, as numbers. `None`, NaN and infinities become NaN: that image could not be scored.

    Args:
        values (`torch.Tensor` or `Sequence[float | int | None]`):
            One number an image.
        name (`str`):
            What to call the reward in a message.
        batch_size (`int`):
            Number of images there are.

    Returns:
        `torch.Tensor`: float32 of shape `(batch_size,)`, on the CPU or where `values` was.

    Raises:
        `ValueError`: when there is not one number for each image.
    """
    if not torch.is_tensor(values):
        values = torch.tensor([math.nan if value is None else float(value) for value in values])
    values = values.detach().float()
    if values.shape != (batch_size,):
        raise ValueError(
            f"The reward {name!r} has shape {tuple(values.shape)} for {batch_size} images; expected ({batch_size},): "
            "return one number (or None) for each image."
        )
    return torch.where(values.isfinite(), values, math.nan)


def nan_std(values: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """
    Unbiased standard deviation of the values that are not NaN; 0 where fewer than two are.

    Args:
        values (`torch.Tensor`):
            Values, NaN where missing.
        dim (`int`, *optional*):
            Dimension to reduce, kept with size 1. All when not given.

    Returns:
        `torch.Tensor`: standard deviations.
    """
    kept = {"dim": dim, "keepdim": dim is not None}
    squares = (values - values.nanmean(**kept)) ** 2
    count = values.isfinite().sum(**kept)
    return (squares.nansum(**kept) / (count - 1).clamp(min=1)).sqrt()


def group_std(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    Standard deviation within the groups, for each head the mean over the groups of which it scored two images or
    more.

    Args:
        rewards (`torch.Tensor`):
            Rewards of shape `(groups * num_generations, heads)`, a group's members side by side.
        num_generations (`int`):
            Members of a group.

    Returns:
        `torch.Tensor`: tensor of shape `(heads,)`, NaN where there is no such group.
    """
    groups = rewards.unflatten(0, (-1, num_generations))
    count = groups.isfinite().sum(dim=1, keepdim=True)
    return torch.where(count > 1, nan_std(groups, dim=1), math.nan).nanmean(dim=(0, 1))


def group_normalize(
    rewards: torch.Tensor, num_generations: int, std_floor: float = 1e-4, scale_rewards: str = "group"
) -> torch.Tensor:
    r"""
    Each head's reward relative to its group: $(r - \mu_g) / (\sigma + \mathrm{floor})$, the advantage of
    [GRPO](https://huggingface.co/papers/2402.03300).

    The floor keeps a head that is saturated, and differs by rounding only, from being blown up to plus and minus 1.

    Args:
        rewards (`torch.Tensor`):
            Rewards of shape `(groups * num_generations, heads)`, a group's members side by side, NaN = not scored.
        num_generations (`int`):
            Members of a group.
        std_floor (`float`, *optional*, defaults to `1e-4`):
            Added to the standard deviation, in units of the reward.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            What $\sigma$ is: `"group"`, each group's own; `"batch"`, one over the deviations of all groups, steadier
            when groups are small; `"none"`, no scaling ([Dr. GRPO](https://huggingface.co/papers/2503.20783)).

    Returns:
        `torch.Tensor`: tensor of the shape of `rewards`, NaN where they are.

    Raises:
        `ValueError`: when `scale_rewards` is unknown.
    """
    groups = rewards.unflatten(0, (-1, num_generations))
    centred = groups - groups.nanmean(dim=1, keepdim=True)
    if scale_rewards == "group":
        centred = centred / (nan_std(groups, dim=1) + std_floor)
    elif scale_rewards == "batch":
        centred = centred / (nan_std(centred.flatten(0, 1), dim=0) + std_floor)
    elif scale_rewards != "none":
        raise ValueError(f"`scale_rewards` is {scale_rewards!r}; expected 'group', 'batch' or 'none'.")
    return centred.flatten(0, 1)


def whiten(values: torch.Tensor, std_floor: float = 0.1) -> torch.Tensor:
    """
    Shift and scale a batch to mean 0 and standard deviation 1, leaving NaN out.

    Args:
        values (`torch.Tensor`):
            Values of shape `(N,)`.
        std_floor (`float`, *optional*, defaults to `0.1`):
            Least standard deviation to divide by. What was normalised before has about 1; much less means that no
            head told the images apart, and that noise must not be scaled up.

    Returns:
        `torch.Tensor`: tensor of shape `(N,)`, NaN where `values` is.
    """
    return (values - values.nanmean()) / nan_std(values).clamp(min=std_floor)


def weighted_sum(
    rewards: torch.Tensor, weights: Sequence[float] | torch.Tensor, num_generations: int = 1
) -> torch.Tensor:
    """
    The reward of each image: the weighted sum of its heads.

    A head that could not score an image must neither raise nor lower it among the others. It enters with its mean over
    the image's group; where it scored none of the group, with its mean over all images; and where it scored none at
    all, with nothing for any of them. The mean over images is then the weighted sum of the heads' means, however many
    each of them scored.

    Args:
        rewards (`torch.Tensor`):
            Rewards of all processes, of shape `(N, heads)`, a group's members side by side, NaN = not scored.
        weights (`Sequence[float]` or `torch.Tensor`):
            Weight of each head.
        num_generations (`int`, *optional*, defaults to 1):
            Members of a group.

    Returns:
        `torch.Tensor`: tensor of shape `(N,)`, NaN where no head with a weight could score.
    """
    weights = torch.as_tensor(weights, dtype=torch.float32, device=rewards.device)
    unscored = (rewards.isnan() | (weights == 0)).all(dim=1)
    groups = rewards.unflatten(0, (-1, num_generations))
    for means in (groups.nanmean(dim=1, keepdim=True), rewards.nanmean(dim=0)):
        groups = torch.where(groups.isnan(), means, groups)
    return torch.where(unscored, math.nan, (groups.flatten(0, 1) * weights).nansum(dim=1))


def compute_advantages(
    rewards: torch.Tensor,
    normalize: Callable[[torch.Tensor], torch.Tensor],
    weights: Sequence[float] | torch.Tensor | None = None,
    multi_objective_aggregation: str = "normalize_then_sum",
    num_generations: int = 1,
) -> torch.Tensor:
    """
    Advantages of a rollout from the rewards of its heads.

    With `"normalize_then_sum"` ([GDPO](https://huggingface.co/papers/2601.05242)) each head is normalised first, so
    that heads of different scales, and saturated ones, keep to their weights; the weighted mean is then whitened over
    the batch. With `"sum_then_normalize"` the weighted rewards are summed first, as in
    [GRPO](https://huggingface.co/papers/2402.03300).

    Args:
        rewards (`torch.Tensor`):
            Rewards of all processes, of shape `(N, heads)`, NaN = not scored. A head that could not score an image has
            no say on it, see [`weighted_sum`]; an image that no head could score has advantage 0.
        normalize (`Callable[[torch.Tensor], torch.Tensor]`):
            What rewards are compared to: from rewards of shape `(N, any)` to normalised ones, such as
            [`group_normalize`] or [`RunningStatistics.normalize`].
        weights (`Sequence[float]` or `torch.Tensor`, *optional*):
            Weight of each head, 1 when not given.
        multi_objective_aggregation (`str`, *optional*, defaults to `"normalize_then_sum"`):
            `"normalize_then_sum"` or `"sum_then_normalize"`.
        num_generations (`int`, *optional*, defaults to 1):
            Members of a group, side by side.

    Returns:
        `torch.Tensor`: finite float32 tensor of shape `(N,)`.

    Raises:
        `ValueError`: when there is not one weight for each head, or an option is unknown.

    Example:

    ```python
    >>> rewards = torch.tensor([[1.0], [2.0], [3.0], [10.0], [20.0], [30.0]])
    >>> compute_advantages(rewards, lambda values: group_normalize(values, num_generations=3))
    tensor([-1.1180,  0.0000,  1.1180, -1.1181,  0.0000,  1.1181])
    ```
    """
    rewards = rewards.float()
    weights = torch.ones(rewards.shape[1]) if weights is None else torch.as_tensor(weights, dtype=torch.float32)
    if weights.shape != (rewards.shape[1],):
        raise ValueError(
            f"There are {rewards.shape[1]} reward heads but weights of shape {tuple(weights.shape)}; expected one "
            "weight for each head."
        )
    weights = weights.to(rewards.device)

    if multi_objective_aggregation == "normalize_then_sum":
        total = weighted_sum(normalize(rewards), weights, num_generations)
        advantages = whiten(total / weights.abs().sum().clamp(min=1e-12))
    elif multi_objective_aggregation == "sum_then_normalize":
        advantages = normalize(weighted_sum(rewards, weights, num_generations)[:, None])[:, 0]
    else:
        raise ValueError(
            f"`multi_objective_aggregation` is {multi_objective_aggregation!r}; expected 'normalize_then_sum' or "
            "'sum_then_normalize'."
        )
    return advantages.nan_to_num(nan=0.0)


def constrain(
    advantages: torch.Tensor, rewards: torch.Tensor, least: Sequence[float | None], std_floor: float = 1e-4
) -> torch.Tensor:
    """
    Make sure that no image is reinforced that violates a constraint, however well it does otherwise.

    Its advantage is at most 0, and is lowered by how far each constrained head falls short, in standard deviations of
    that head over the batch. Images that meet all constraints keep theirs.

    Args:
        advantages (`torch.Tensor`):
            Advantages of shape `(N,)` or `(N, steps)`.
        rewards (`torch.Tensor`):
            Rewards of shape `(N, heads)`. A head that could not score an image (NaN) does not constrain it.
        least (`Sequence[float | None]`):
            Least acceptable reward of each head, `None` where any is.
        std_floor (`float`, *optional*, defaults to `1e-4`):
            Added to the standard deviation, in units of the reward.

    Returns:
        `torch.Tensor`: tensor of the shape of `advantages`.
    """
    least = torch.tensor([-math.inf if value is None else value for value in least], device=rewards.device)
    shortfall = ((least - rewards) / (nan_std(rewards, dim=0) + std_floor)).clamp(min=0).nan_to_num(nan=0.0).sum(dim=1)
    shortfall = shortfall.view(-1, *[1] * (advantages.ndim - 1))
    return torch.where(shortfall > 0, advantages.clamp(max=0) - shortfall, advantages)
