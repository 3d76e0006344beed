"""Reward functions made of others that promise less: a cap, and the pessimism of an ensemble."""

from collections.abc import Callable, Sequence

import torch
from transformers import AutoModel

from onereward.rewards.modeling_onereward import OneRewardModel
from onereward.rewards.scoring import RewardFunc, RewardScorer


def heads_of(func: RewardFunc) -> Callable[[dict], dict[str, torch.Tensor]]:
    """
    A reward function of any kind as one of a dict of keyword arguments, that returns the rewards of each head.

    Args:
        func (`RewardFunc`):
            A function, a [`OneRewardModel`], or the folder or Hub id of one; see [`DDPOTrainer`]. A model is frozen,
            and moved to the device of the images.

    Returns:
        `Callable`: from keyword arguments to `dict[str, torch.Tensor]`, head -> float32 of shape `(B,)`, NaN where it
        cannot score.
    """
    func = AutoModel.from_pretrained(func) if isinstance(func, str) else func
    if isinstance(func, OneRewardModel):
        func.requires_grad_(False).eval()
    scorer = RewardScorer([func])

    def heads(arguments):
        if isinstance(func, torch.nn.Module):
            func.to(arguments["images"].device)
        rewards = scorer.collect([scorer.submit(arguments)])
        return dict(zip(scorer.names, rewards.unbind(dim=1), strict=True))

    return heads


def capped(func: RewardFunc, cap: float | dict[str, float]) -> Callable:
    r"""
    A reward that earns nothing more above a level, $\min(r, \lambda)$: what cannot be raised any further need not be
    hacked. It is the hinge $\max(0, \lambda - r)$ of [OneReward](https://huggingface.co/papers/2508.21066), equation
    5, turned from a loss into a reward, up to the constant $\lambda$. A group whose members all reach the cap has
    no advantage, and so no gradient, from that head.

    Args:
        func (`RewardFunc`):
            The reward to cap. Its heads keep their names.
        cap (`float` or `dict[str, float]`):
            The level $\lambda$ in the unit of the reward, or one for each head that is to have one. 0.9 or so for a
            probability; for a [`OneRewardModel`], whose training images have mean 0 and standard deviation 1, what its
            better training images get, 1 or 2.

    Returns:
        `Callable`: a reward function.

    Raises:
        `ValueError`: on the first call, when `cap` names a head that there is not.

    Example:

    ```python
    >>> reward = capped("my-name/tumour-rewards", {"realism": 1.5})
    ```
    """
    heads = heads_of(func)

    def reward(**arguments):
        rewards = heads(arguments)
        caps = cap if isinstance(cap, dict) else dict.fromkeys(rewards, cap)
        if set(caps) - set(rewards):
            raise ValueError(f"`cap` names {sorted(set(caps) - set(rewards))}; expected some of {list(rewards)}.")
        return {name: values.clamp(max=caps.get(name)) if name in caps else values for name, values in rewards.items()}

    return reward


def pessimistic(funcs: Sequence[RewardFunc] | OneRewardModel, k: float = 1.0, name: str = "pessimistic") -> Callable:
    r"""
    What an ensemble of rewards is fairly sure of: the mean of its members minus `k` times their standard deviation. A
    policy that hacks one member makes them disagree, and earns less for it.

    Ensembles against overoptimisation: [Coste et al.](https://huggingface.co/papers/2310.02743), who subtract the
    variance or take the least member, and [Eisenstein et al.](https://huggingface.co/papers/2312.09244), who warn that
    members which share their mistakes, as those trained on the same votes from the same backbone do, are all hacked
    at once: train them from different seeds at least. The standard deviation is that of the members themselves (over
    n, not n - 1), so that two members and `k = 1` give the lesser of both.

    Args:
        funcs (`Sequence[RewardFunc]` or [`OneRewardModel`]):
            Two members or more, in one unit, since they are averaged: [`OneRewardModel`]s, their folders or Hub ids,
            or functions. All have the same heads, which are combined one by one; or each has just one head, whatever
            its name. Or one [`OneRewardModel`], whose last layers' posterior is the ensemble: the standard deviations
            of [`~OneRewardModel.score`].
        k (`float`, *optional*, defaults to 1.0):
            Standard deviations to subtract; 0 is the plain mean.
        name (`str`, *optional*, defaults to `"pessimistic"`):
            Name of the head where each member has one head of another name.

    Returns:
        `Callable`: a reward function. An image that one of the members cannot score is not scored.

    Raises:
        `ValueError`: with fewer than two members, one model without a posterior, or a negative `k`; or on the first
        call when the heads differ.

    Example:

    ```python
    >>> reward = pessimistic(["runs/rewards-seed0", "runs/rewards-seed1", "runs/rewards-seed2"], k=1.0)
    ```
    """
    if k < 0:
        raise ValueError(f"`k` is {k}; expected 0 or above: below, disagreement would be rewarded.")
    if isinstance(funcs, OneRewardModel):
        return _pessimistic_by_posterior(funcs, k)
    if isinstance(funcs, str) or not isinstance(funcs, Sequence) or len(funcs) < 2:
        raise ValueError(f"`funcs` is {funcs!r}; expected a list of two rewards or more, which can disagree.")
    members = [heads_of(func) for func in funcs]

    def reward(**arguments):
        rewards = [heads(arguments) for heads in members]
        names = [list(of_member) for of_member in rewards]
        if any(set(others) != set(names[0]) for others in names):
            if any(len(of_member) > 1 for of_member in rewards):
                raise ValueError(f"The members have the heads {names}; expected the same, or one of each.")
            rewards = [dict(zip([name], of_member.values(), strict=True)) for of_member in rewards]
        combined = {}
        for head in rewards[0]:
            values = torch.stack([of_member[head] for of_member in rewards])
            combined[head] = values.mean(dim=0) - k * values.std(dim=0, correction=0)
        return combined

    return reward


def _pessimistic_by_posterior(model: OneRewardModel, k: float) -> Callable:
    if not model.heads.posterior_factor.any():
        raise ValueError("`funcs` is one model without a posterior; train it with `RewardTrainer`, or give several.")
    model.requires_grad_(False).eval()

    def reward(images, masks, sources, label_maps, prompts, task, **columns):
        model.to(images.device)
        rewards, stds = model.score(images, masks, sources, label_maps, prompts, task, return_std=True)
        return {head: values - k * stds[head] for head, values in rewards.items()}

    return reward
