"""Rewards to advantages: heads keep to their weights, what cannot be scored is left out, noise is not blown up."""

import math

import numpy as np
import pytest
import torch

from onereward.rewards.advantages import as_rewards, compute_advantages, group_normalize, group_std, nan_std, whiten


def rewards(groups=3, members=4, heads=2, seed=0):
    return torch.randn(groups * members, heads, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("returned", [[1, 0, 4, None], [1.0, 0.0, 4.0, math.nan], np.array([1, 0, 4, np.inf])])
def test_integers_floats_none_nan_and_infinities_are_read(returned):
    values = as_rewards(returned, "head", 4)
    assert values.dtype == torch.float32
    assert values[:3].tolist() == [1, 0, 4] and values[3].isnan()


def test_integer_rewards_are_not_truncated():
    integers, floats = torch.tensor([[0], [1], [3], [4]]), torch.tensor([[0.0], [1.0], [3.0], [4.0]])
    ours = compute_advantages(integers, 4)
    assert torch.equal(ours, compute_advantages(floats, 4))
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


def test_scale_and_offset_of_a_head_do_not_change_the_advantages():
    values = rewards()
    scaled = values * torch.tensor([1000.0, 1.0]) + torch.tensor([-50.0, 0.0])
    torch.testing.assert_close(
        compute_advantages(values, 4, std_floor=0.0),
        compute_advantages(scaled, 4, std_floor=0.0),
        rtol=1e-3,
        atol=1e-4,
    )
    summed = [compute_advantages(v, 4, multi_objective_aggregation="sum_then_normalize") for v in (values, scaled)]
    assert not torch.allclose(*summed, atol=0.1)


def test_weights_choose_among_heads():
    values = rewards()
    torch.testing.assert_close(compute_advantages(values, 4, weights=[2.0, 0.0]), compute_advantages(values[:, :1], 4))
    torch.testing.assert_close(
        compute_advantages(values, 4, weights=[-1.0, 0.0]), -compute_advantages(values[:, :1], 4)
    )
    with pytest.raises(ValueError, match="2 reward heads"):
        compute_advantages(values, 4, weights=[1.0])


@pytest.mark.parametrize("scale_rewards", ["group", "batch"])
def test_advantages_have_zero_mean_and_unit_variance(scale_rewards):
    ours = compute_advantages(rewards(groups=8, heads=3), 4, scale_rewards=scale_rewards)
    assert ours.mean().abs() < 1e-6
    assert ours.std().item() == pytest.approx(1, abs=1e-5)


def test_a_saturated_head_does_not_become_noise():
    healthy = rewards(heads=1)
    saturated = 1 + 1e-7 * rewards(heads=1, seed=1)
    together = compute_advantages(torch.cat([healthy, saturated], dim=1), 4)
    torch.testing.assert_close(together, compute_advantages(healthy, 4), rtol=0, atol=0.01)
    assert compute_advantages(saturated, 4).abs().max() < 0.05


def test_an_image_that_no_head_scored_has_no_advantage_and_moves_no_baseline():
    values = rewards(groups=2)
    values[1] = math.nan
    ours = compute_advantages(values, 4, std_floor=0.0)
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
    torch.testing.assert_close(compute_advantages(values, 4), compute_advantages(values[:, :1], 4), rtol=0, atol=1e-5)
    assert (compute_advantages(torch.full((4, 2), math.nan), 4) == 0).all()


def test_clip_bounds_the_advantages():
    values = torch.zeros(16, 1)
    values[3] = 100
    assert compute_advantages(values, 16).max() > 3
    assert compute_advantages(values, 16, clip=2.0).max() == 2


def test_whitening_leaves_nan_out_and_noise_small():
    values = torch.tensor([1.0, math.nan, 3.0])
    ours = whiten(values)
    assert ours[1].isnan() and ours[[0, 2]].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])
    assert whiten(torch.tensor([0.0, 1e-6])).abs().max() < 1e-4


def test_unknown_options_are_refused():
    for option in ("scale_rewards", "multi_objective_aggregation"):
        with pytest.raises(ValueError, match=option):
            compute_advantages(rewards(), 4, **{option: "other"})
