"""Rewards to advantages: heads keep to their weights, what cannot be scored is left out, noise is not blown up."""

import math

import numpy as np
import pytest
import torch

from onereward.rewards.advantages import (
    as_rewards,
    compute_advantages,
    constrain,
    group_normalize,
    group_std,
    nan_std,
    weighted_sum,
    whiten,
)


def advantages_of(rewards, members, weights=None, aggregation="normalize_then_sum", **kwargs):
    return compute_advantages(rewards, lambda heads: group_normalize(heads, members, **kwargs), weights, aggregation)


def rewards(groups=3, members=4, heads=2, seed=0):
    return torch.randn(groups * members, heads, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("returned", [[1, 0, 4, None], [1.0, 0.0, 4.0, math.nan], np.array([1, 0, 4, np.inf])])
def test_integers_floats_none_nan_and_infinities_are_read(returned):
    values = as_rewards(returned, "head", 4)
    assert values.dtype == torch.float32
    assert values[:3].tolist() == [1, 0, 4] and values[3].isnan()


def test_integer_rewards_are_not_truncated():
    integers, floats = torch.tensor([[0], [1], [3], [4]]), torch.tensor([[0.0], [1.0], [3.0], [4.0]])
    ours = advantages_of(integers, 4)
    assert torch.equal(ours, advantages_of(floats, 4))
    z = (np.array([0, 1, 3, 4]) - 2) / np.std([0, 1, 3, 4], ddof=1)
    np.testing.assert_allclose(ours, z, rtol=1e-3)


def test_wrong_number_of_rewards_is_refused_by_name():
    with pytest.raises(ValueError, match="'sharpness'.*4 images"):
        as_rewards([1.0, 2.0], "sharpness", 4)


def test_standard_deviation_is_that_of_numpy_without_nan():
    values = torch.tensor([[1.0, math.nan, 4.0, 6.0], [math.nan, math.nan, 2.0, math.nan]])
    assert nan_std(values).item() == pytest.approx(np.nanstd(values, ddof=1))
    assert nan_std(values, dim=1).flatten().tolist() == [pytest.approx(np.std([1, 4, 6], ddof=1)), 0.0]


def test_each_head_is_normalised_within_its_own_group():
    values = rewards()
    ours = group_normalize(values, 4, std_floor=0.0)
    for group in range(3):
        block = values[4 * group : 4 * group + 4].numpy()
        expected = (block - block.mean(0)) / block.std(0, ddof=1)
        np.testing.assert_allclose(ours[4 * group : 4 * group + 4], expected, rtol=1e-4, atol=1e-6)


def test_group_std_is_the_mean_over_the_groups():
    values = rewards()
    expected = np.stack([values[4 * g : 4 * g + 4].numpy().std(0, ddof=1) for g in range(3)]).mean(0)
    np.testing.assert_allclose(group_std(values, 4), expected, rtol=1e-5)


def test_groups_without_two_scored_images_tell_nothing_of_the_standard_deviation():
    values = rewards()
    values[4:, 0] = math.nan
    values[11, 0] = 5.0
    values[:, 1] = math.nan
    ours = group_std(values, 4)
    assert ours[0].item() == pytest.approx(np.std(values[:4, 0].numpy(), ddof=1)) and ours[1].isnan()


def test_scale_and_offset_of_a_head_do_not_change_the_advantages():
    values = rewards()
    scaled = values * torch.tensor([1000.0, 1.0]) + torch.tensor([-50.0, 0.0])
    torch.testing.assert_close(
        advantages_of(values, 4, std_floor=0.0),
        advantages_of(scaled, 4, std_floor=0.0),
        rtol=1e-3,
        atol=1e-4,
    )
    summed = [advantages_of(v, 4, aggregation="sum_then_normalize") for v in (values, scaled)]
    assert not torch.allclose(*summed, atol=0.1)


def test_weights_choose_among_heads():
    values = rewards()
    torch.testing.assert_close(advantages_of(values, 4, weights=[2.0, 0.0]), advantages_of(values[:, :1], 4))
    torch.testing.assert_close(advantages_of(values, 4, weights=[-1.0, 0.0]), -advantages_of(values[:, :1], 4))
    with pytest.raises(ValueError, match="2 reward heads"):
        advantages_of(values, 4, weights=[1.0])


@pytest.mark.parametrize("scale_rewards", ["group", "batch"])
def test_advantages_have_zero_mean_and_unit_variance(scale_rewards):
    ours = advantages_of(rewards(groups=8, heads=3), 4, scale_rewards=scale_rewards)
    assert ours.mean().abs() < 1e-6
    assert ours.std().item() == pytest.approx(1, abs=1e-5)


def test_a_saturated_head_does_not_become_noise():
    healthy = rewards(heads=1)
    saturated = 1 + 1e-7 * rewards(heads=1, seed=1)
    together = advantages_of(torch.cat([healthy, saturated], dim=1), 4)
    torch.testing.assert_close(together, advantages_of(healthy, 4), rtol=0, atol=0.01)
    assert advantages_of(saturated, 4).abs().max() < 0.05


def test_an_image_that_no_head_scored_has_no_advantage_and_moves_no_baseline():
    values = rewards(groups=2)
    values[1] = math.nan
    ours = advantages_of(values, 4, std_floor=0.0)
    assert ours[1] == 0 and ours.isfinite().all()
    kept = [0, 2, 3]
    block = values[kept].numpy()
    z = ((block - block.mean(0)) / block.std(0, ddof=1)).mean(1)
    expected = torch.from_numpy(z) / nan_std(
        torch.cat([torch.from_numpy(z), group_normalize(values, 4, 0.0)[4:].mean(1)])
    )
    torch.testing.assert_close(ours[kept], expected.float(), rtol=1e-3, atol=1e-3)


def test_a_head_that_could_not_score_has_no_say():
    values = rewards(groups=1)
    values[:, 1] = math.nan
    torch.testing.assert_close(advantages_of(values, 4), advantages_of(values[:, :1], 4), rtol=0, atol=1e-5)
    assert (advantages_of(torch.full((4, 2), math.nan), 4) == 0).all()


@pytest.mark.parametrize("aggregation", ["normalize_then_sum", "sum_then_normalize"])
def test_a_head_that_could_not_score_one_image_has_no_say_on_it(aggregation):
    light = torch.tensor([0.1, 0.2, 0.3, 0.9, 0.4, 0.1, 0.2, 0.9])
    same = torch.tensor([10.0, 10.0, 10.0, math.nan, -7.0, -7.0, math.nan, -7.0])  # says the same of all it scored
    ours, alone = (
        compute_advantages(heads, lambda heads: group_normalize(heads, 4), None, aggregation, num_generations=4)
        for heads in (torch.stack([light, same], dim=1), light[:, None])
    )
    torch.testing.assert_close(ours, alone, rtol=0, atol=1e-4)


def test_in_the_sum_a_missing_head_is_its_mean_over_the_group_or_else_over_all():
    nan = math.nan
    values = torch.tensor([[1.0, 2.0], [3.0, nan], [nan, 6.0], [nan, nan], [nan, 7.0], [nan, 9.0]])
    total = weighted_sum(values, [1.0, 10.0], num_generations=2)
    assert total[[0, 1, 2, 4, 5]].tolist() == [21, 23, 62, 72, 92] and total[3].isnan()
    # by themselves: the mean over all
    assert weighted_sum(values, [1.0, 10.0])[[0, 1, 2]].tolist() == [21, 63, 62]


def test_a_head_that_scored_nothing_adds_nothing():
    values = torch.tensor([[1.0, 2.0], [math.nan, 2.0], [1.0, math.nan], [math.nan, math.nan]])
    assert weighted_sum(torch.stack([values[:, 0], values[:, 0] * math.nan], dim=1), [1.0, 1.0])[[0, 2]].tolist() == [
        1,
        1,
    ]
    # a head without weight does not make an image scored
    total = weighted_sum(values, [1.0, 0.0])
    assert total[[0, 2]].tolist() == [1, 1] and total[[1, 3]].isnan().all()


def test_an_image_that_violates_a_constraint_is_never_reinforced():
    values = torch.tensor([[9.0, 0.1], [1.0, 0.9], [5.0, 0.4], [7.0, math.nan]])
    advantages = torch.tensor([2.0, -1.0, -0.5, 1.0])
    ours = constrain(advantages, values, [None, 0.5], std_floor=0.0)
    std = np.std([0.1, 0.9, 0.4], ddof=1)
    assert ours.tolist() == pytest.approx([-0.4 / std, -1.0, -0.5 - 0.1 / std, 1.0])
    per_step = constrain(advantages[:, None].repeat(1, 3), values, [None, 0.5], std_floor=0.0)
    assert torch.equal(per_step, ours[:, None].repeat(1, 3))
    assert torch.equal(constrain(advantages, values, [None, None]), advantages)


def test_whitening_leaves_nan_out_and_noise_small():
    values = torch.tensor([1.0, math.nan, 3.0])
    ours = whiten(values)
    assert ours[1].isnan() and ours[[0, 2]].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])
    assert whiten(torch.tensor([0.0, 1e-6])).abs().max() < 1e-4


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="scale_rewards"):
        advantages_of(rewards(), 4, scale_rewards="other")
    with pytest.raises(ValueError, match="multi_objective_aggregation"):
        advantages_of(rewards(), 4, aggregation="other")
