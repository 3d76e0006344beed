"""The DDIM policy step: equal to diffusers and to torch.distributions, finite everywhere, blind outside the mask."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler

from onereward.policy import ddim_alphas, ddim_step


SHAPE = (3, 4, 6, 6)
SPACINGS, PREDICTIONS = ("leading", "trailing", "linspace"), ("epsilon", "v_prediction", "sample")
SCHEDULERS = list(itertools.product(SPACINGS, (0, 1), PREDICTIONS, (False, True), (False, True)))


def make_scheduler(spacing, offset, prediction_type, zero_snr, alpha_to_one, num_steps=10):
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        timestep_spacing=spacing,
        steps_offset=offset,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        set_alpha_to_one=alpha_to_one,
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


def alphas_of(scheduler):
    return ddim_alphas(scheduler.alphas_cumprod, scheduler.timesteps, scheduler.final_alpha_cumprod)


def random_tensors(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("spacing", "offset", "prediction_type", "zero_snr", "alpha_to_one"), SCHEDULERS)
def test_step_equals_that_of_diffusers(spacing, offset, prediction_type, zero_snr, alpha_to_one, eta):
    # diffusers reckons the next timestep by a constant stride; compare where that is the next entry of the list, which
    # for linspace takes a long chain
    num_steps = 250 if spacing == "linspace" else 10
    scheduler = make_scheduler(spacing, offset, prediction_type, zero_snr, alpha_to_one, num_steps)
    output, sample, noise = random_tensors()
    compared = 0
    alphas, alphas_next = alphas_of(scheduler)
    for i in [*range(0, num_steps - 1, num_steps // 10), num_steps - 1]:
        alpha, alpha_next = alphas[i], alphas_next[i]
        t = int(scheduler.timesteps[i])
        following = -1 if i == num_steps - 1 else int(scheduler.timesteps[i + 1])
        assumed = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        if max(assumed, -1) != following:
            continue
        if alpha == 0 and (prediction_type == "epsilon" or eta > 0):
            continue  # diffusers divides by 0, or takes the root of a difference rounded below 0
        theirs = scheduler.step(output, t, sample, eta=eta, variance_noise=noise if eta else None).prev_sample
        ours = ddim_step(output, sample, alpha, alpha_next, eta, prediction_type, noise=noise if eta else None)
        torch.testing.assert_close(ours.next_sample, theirs, rtol=1e-5, atol=1e-5)
        compared += 1
    assert compared >= (6 if spacing == "linspace" else 9)


@pytest.mark.parametrize(("spacing", "offset", "prediction_type", "zero_snr", "alpha_to_one"), SCHEDULERS)
def test_log_prob_is_finite_and_that_of_a_normal(spacing, offset, prediction_type, zero_snr, alpha_to_one):
    scheduler = make_scheduler(spacing, offset, prediction_type, zero_snr, alpha_to_one)
    output, sample, noise = random_tensors()
    for alpha, alpha_next in zip(*alphas_of(scheduler), strict=True):
        step = ddim_step(output, sample, alpha, alpha_next, 1.0, prediction_type, noise=noise)
        assert all(part.isfinite().all() for part in step)
        if step.std.item() > 0:
            normal = torch.distributions.Normal(step.mean, step.std.expand_as(step.mean))
            expected = normal.log_prob(step.next_sample).flatten(1).mean(1)
            torch.testing.assert_close(step.log_prob, expected, rtol=1e-5, atol=1e-5)
        else:
            assert (step.log_prob == 0).all()


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_variance_is_that_of_diffusers(eta):
    scheduler = make_scheduler("leading", 1, "epsilon", False, False)
    output, sample, noise = random_tensors()
    for i, (alpha, alpha_next) in enumerate(zip(*alphas_of(scheduler), strict=True)):
        t = int(scheduler.timesteps[i])
        std = ddim_step(output, sample, alpha, alpha_next, eta, "epsilon", noise=noise).std
        assert std.item() == pytest.approx(eta * scheduler._get_variance(t, t - 100).item() ** 0.5, rel=1e-5)


def test_next_alpha_is_that_of_the_next_timestep_whatever_the_stride():
    scheduler = make_scheduler("linspace", 0, "epsilon", False, True, num_steps=20)
    alpha, alpha_next = alphas_of(scheduler)
    for i, t in enumerate(scheduler.timesteps.tolist()):
        assert alpha[i] == scheduler.alphas_cumprod[t]
    assert torch.equal(alpha_next[:-1], alpha[1:])
    assert alpha_next[-1] == 1


def test_rollout_and_training_agree_to_the_bit():
    output, sample, noise = random_tensors()
    mask = (torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    drawn = ddim_step(output, sample, 0.2, 0.4, 1.0, "v_prediction", mask=mask, noise=noise)
    again = ddim_step(output, sample, 0.2, 0.4, 1.0, "v_prediction", mask=mask, next_sample=drawn.next_sample)
    assert torch.equal((again.log_prob - drawn.log_prob).exp(), torch.ones(3))


def test_folded_rows_of_different_timesteps_equal_single_steps():
    scheduler = make_scheduler("trailing", 0, "v_prediction", False, True)
    alpha, alpha_next = (values[[1, 4, 8]] for values in alphas_of(scheduler))
    output, sample, noise = random_tensors()
    folded = ddim_step(output, sample, alpha, alpha_next, 1.0, "v_prediction", noise=noise)
    for i in range(3):
        rows = (tensor[i : i + 1] for tensor in (output, sample))
        single = ddim_step(*rows, alpha[i], alpha_next[i], 1.0, "v_prediction", noise=noise[i : i + 1])
        assert torch.equal(folded.next_sample[i], single.next_sample[0])
        assert torch.equal(folded.log_prob[i], single.log_prob[0])


def test_half_precision_outputs_are_computed_in_float32():
    output, sample, noise = random_tensors()
    step = ddim_step(output.bfloat16(), sample.bfloat16(), 0.2, 0.4, 1.0, "epsilon", noise=noise)
    expected = ddim_step(output.bfloat16().float(), sample.bfloat16().float(), 0.2, 0.4, 1.0, "epsilon", noise=noise)
    assert step.next_sample.dtype == step.log_prob.dtype == torch.float32
    assert torch.equal(step.next_sample, expected.next_sample)


def test_gradient_outside_the_mask_is_exactly_zero_and_the_background_does_not_matter():
    output, sample, noise = random_tensors()
    mask = torch.zeros(3, 1, 6, 6)
    mask[..., 2:4, 1:5] = 1
    outside = (mask == 0).expand_as(sample)
    drawn = ddim_step(output, sample, 0.2, 0.4, 1.0, "epsilon", mask=mask, noise=noise)

    output.requires_grad_(True)
    step = ddim_step(output, sample, 0.2, 0.4, 1.0, "epsilon", mask=mask, next_sample=drawn.next_sample)
    step.log_prob.sum().backward()
    assert (output.grad[outside] == 0).all()
    assert (output.grad[~outside] != 0).all()

    for background in (7.0, torch.nan):
        replaced = torch.where(outside, background, drawn.next_sample)
        other = ddim_step(output, sample, 0.2, 0.4, 1.0, "epsilon", mask=mask, next_sample=replaced)
        assert torch.equal(other.log_prob, step.log_prob)


def test_log_prob_is_per_element_whatever_the_size_of_the_mask():
    sample, small, large = torch.zeros(1, 4, 6, 6), torch.zeros(1, 1, 6, 6), torch.ones(1, 1, 6, 6)
    small[..., 0, 0] = 1
    log_probs = [
        ddim_step(sample, sample, 0.2, 0.4, 1.0, "epsilon", mask=mask, noise=torch.ones_like(sample)).log_prob
        for mask in (small, large)
    ]
    torch.testing.assert_close(*log_probs)


def test_volumes_work_like_images():
    generator = torch.Generator().manual_seed(0)
    output, sample, noise = (torch.randn(2, 4, 3, 6, 6, generator=generator) for _ in range(3))
    step = ddim_step(output, sample, torch.tensor([0.2, 0.3]), torch.tensor([0.4, 0.5]), 1.0, "epsilon", noise=noise)
    flat = ddim_step(
        *(tensor.flatten(2, 3) for tensor in (output, sample)),
        torch.tensor([0.2, 0.3]),
        torch.tensor([0.4, 0.5]),
        1.0,
        "epsilon",
        noise=noise.flatten(2, 3),
    )
    assert torch.equal(step.next_sample.flatten(2, 3), flat.next_sample)
    assert torch.equal(step.log_prob, flat.log_prob)


def test_clipping_of_the_clean_sample_is_that_of_diffusers():
    scheduler = DDIMScheduler(clip_sample=True, clip_sample_range=0.5, timestep_spacing="leading")
    scheduler.set_timesteps(10)
    output, sample, _ = random_tensors()
    alpha, alpha_next = alphas_of(scheduler)
    theirs = scheduler.step(output, int(scheduler.timesteps[3]), sample).prev_sample
    ours = ddim_step(output, sample, alpha[3], alpha_next[3], 0.0, "epsilon", clip_sample_range=0.5)
    torch.testing.assert_close(ours.next_sample, theirs, rtol=1e-5, atol=1e-5)


def test_deterministic_step_has_no_log_prob():
    output, sample, noise = random_tensors()
    step = ddim_step(output, sample, 0.2, 0.4, 0.0, "epsilon")
    assert step.log_prob is None and torch.equal(step.next_sample, step.mean)
    with pytest.raises(ValueError, match="neither"):
        ddim_step(output, sample, 0.2, 0.4, 0.0, "epsilon", noise=noise)


def test_stochastic_step_wants_noise_or_the_next_sample():
    output, sample, noise = random_tensors()
    with pytest.raises(ValueError, match="exactly one"):
        ddim_step(output, sample, 0.2, 0.4, 1.0, "epsilon")
    with pytest.raises(ValueError, match="exactly one"):
        ddim_step(output, sample, 0.2, 0.4, 1.0, "epsilon", noise=noise, next_sample=sample)
    with pytest.raises(ValueError, match="flow_prediction"):
        ddim_step(output, sample, 0.2, 0.4, 1.0, "flow_prediction", noise=noise)
