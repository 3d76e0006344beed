"""Caps and ensembles of rewards."""

import math

import pytest
import torch

from onereward.rewards import OneRewardConfig, OneRewardModel
from onereward.rewards.advantages import compute_advantages, group_normalize
from onereward.rewards.composed import capped, heads_of, pessimistic


def arguments(count=4, size=16):
    images = torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(count, 1, size, size)
    masks[..., 4:12, 4:12] = 1
    columns = {"prompts": ["oedema"] * count, "task": ["fill"] * count, "case_id": list("abcd")[:count]}
    return {"images": images, "sources": images, "masks": masks, "label_maps": masks.long(), **columns}


def giving(name, *values, **heads):
    """A reward function that returns what is asked for."""

    def func(images, **columns):
        return {head: list(of_head) for head, of_head in heads.items()} if heads else list(values)

    func.__name__ = name
    return func


def small_model(seed):
    torch.manual_seed(seed)
    vit = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit |= {"intermediate_size": 16, "image_size": 16, "patch_size": 8}
    return OneRewardModel(OneRewardConfig(backbone_config=vit, criteria=["quality", "realism"], image_size=16))


# ------------------------------------------------------------------------------------------------------------- caps


def test_a_cap_is_the_hinge_of_onereward_as_a_reward():
    rewards, cap = torch.tensor([0.2, 0.9, 0.95, math.nan]), 0.9
    got = capped(giving("judge", *rewards.tolist()), cap)(**arguments())["judge"]
    hinge = torch.clamp(cap - rewards, min=0)  # equation 5, a loss
    torch.testing.assert_close(got, cap - hinge, equal_nan=True)


def test_a_group_at_the_cap_has_no_advantage():
    rewards = torch.tensor([0.91, 0.99, 1.0, 0.95])
    assert (group_normalize(rewards[:, None], 4) != 0).any()
    got = capped(giving("judge", *rewards.tolist()), 0.9)(**arguments())["judge"][:, None]
    assert compute_advantages(got, lambda heads: group_normalize(heads, 4)).tolist() == [0.0] * 4


def test_caps_of_single_heads_leave_the_others_alone():
    func = giving("judge", quality=[1, 2, 3, 4], realism=[1, 2, 3, 4])
    got = capped(func, {"realism": 2.5})(**arguments())
    assert got["quality"].tolist() == [1, 2, 3, 4] and got["realism"].tolist() == [1, 2, 2.5, 2.5]
    with pytest.raises(ValueError, match=r"`cap` names \['realsm'\]; expected some of \['quality', 'realism'\]"):
        capped(func, {"realsm": 2.5})(**arguments())


# ------------------------------------------------------------------------------------------------------- ensembles


def test_pessimism_is_the_mean_minus_k_standard_deviations_of_each_head():
    values = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0))
    members = [giving(f"m{i}", quality=q.tolist(), realism=r.tolist()) for i, (q, r) in enumerate(values)]
    got = pessimistic(members, k=1.5)(**arguments())
    expected = values.double().numpy().mean(0) - 1.5 * values.double().numpy().std(0)
    assert list(got) == ["quality", "realism"]
    assert torch.stack(list(got.values())).numpy() == pytest.approx(expected, rel=1e-5)


def test_two_members_and_one_standard_deviation_give_the_lesser():
    a, b = [0.1, 0.5, 0.3, 0.9], [0.2, 0.4, 0.3, -1.0]
    got = pessimistic([giving("a", *a), giving("b", *b)], k=1, name="both")(**arguments())["both"]
    assert got.tolist() == pytest.approx([min(pair) for pair in zip(a, b, strict=True)])


def test_an_image_that_fools_one_member_loses_to_one_that_all_like():
    honest, hacked = [0.6, 0.6, 0.6], [2.4, -0.1, 0.1]  # the mean of the second is higher
    members = [giving(f"m{i}", *pair) for i, pair in enumerate(zip(honest, hacked, strict=True))]
    plain, wary = (pessimistic(members, k=k)(**arguments(2))["pessimistic"] for k in (0, 1))
    assert plain[1] > plain[0] and wary[1] < wary[0]


def test_models_are_combined_head_by_head_from_folders_too(tmp_path):
    models = [small_model(seed) for seed in range(2)]
    models[1].save_pretrained(tmp_path)
    batch = arguments()
    got = pessimistic([models[0], str(tmp_path)], k=1)(**batch)
    names = ("images", "masks", "sources", "label_maps", "prompts")
    with torch.no_grad():
        scores = [model.score(**{n: batch[n] for n in names}, tasks=batch["task"]) for model in models]
    for head in ("quality", "realism"):
        torch.testing.assert_close(got[head], torch.minimum(scores[0][head], scores[1][head]))
        assert not got[head].requires_grad
    assert not any(p.requires_grad for p in models[0].parameters())


def test_an_image_that_one_member_cannot_score_is_not_scored():
    members = [giving("a", 1, None, 3, 4), giving("b", 1, 2, float("nan"), 4)]
    assert pessimistic(members)(**arguments())["pessimistic"].isnan().tolist() == [False, True, True, False]


def test_members_must_be_several_and_have_heads_in_common():
    with pytest.raises(ValueError, match="list of two rewards or more"):
        pessimistic([giving("a", 1, 1, 1, 1)])
    with pytest.raises(ValueError, match="list of two rewards or more"):
        pessimistic("my-name/rewards")
    with pytest.raises(ValueError, match="`k` is -1; expected 0 or above"):
        pessimistic([giving("a", 1), giving("b", 1)], k=-1)
    with pytest.raises(ValueError, match=r"\[\['quality', 'realism'\], \['b'\]\]; expected the same"):
        pessimistic([giving("a", quality=[1] * 4, realism=[1] * 4), giving("b", 1, 1, 1, 1)])(**arguments())


def test_heads_of_any_reward_are_a_dict_of_tensors():
    got = heads_of(giving("share", 1, None, 0.5, 2))(arguments())
    assert list(got) == ["share"] and got["share"].dtype == torch.float32 and got["share"].isnan().sum() == 1


def test_one_model_is_pessimistic_by_its_own_doubts():
    torch.manual_seed(0)
    model = OneRewardModel(OneRewardConfig(image_size=16, hidden_size=8))
    with pytest.raises(ValueError, match="one model without a posterior"):
        pessimistic(model)
    model.heads.posterior_factor.normal_()
    masks = torch.zeros(3, 1, 16, 16)
    masks[..., 4:12, 4:12] = 1
    batch = {"images": torch.rand(3, 1, 16, 16), "sources": torch.rand(3, 1, 16, 16), "masks": masks}
    batch |= {"label_maps": None, "prompts": [""] * 3}
    rewards, stds = model.score(**batch, tasks=["fill"] * 3, return_std=True)
    got = pessimistic(model, k=2.0)(**batch, task=["fill"] * 3, case_id=["a", "b", "c"])
    assert set(got) == set(rewards)
    for head in rewards:
        assert (stds[head] > 0).all()
        torch.testing.assert_close(got[head], rewards[head] - 2 * stds[head])
