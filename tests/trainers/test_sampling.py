"""What the policy samples is what the pipeline paints, and what training needs of it is kept as it was."""

import math
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from onereward.policy import seeded_generator


sys.path.append(str(Path(__file__).parent))

from ddpo_setup import make_pipeline, make_rows, make_trainer  # noqa: E402


def test_generation_is_that_of_the_pipeline(tmp_path):
    for layout in ("c", "2c+1+K"):
        pipeline, rows = make_pipeline({"timestep_spacing": "leading"}, layout=layout), make_rows(3)
        trainer = make_trainer(tmp_path, pipeline=pipeline, num_inference_steps=5)
        conditions, _ = trainer._encode(rows, [0, 1, 2])
        keys = [(0, 9, i) for i in range(3)]
        images = trainer.sampler.generate(conditions, keys).images
        noise = torch.stack([torch.randn(4, 8, 8, generator=seeded_generator(*key, 0)) for key in keys])
        expected = pipeline(
            list(rows["prompt"]),
            list(rows["image"]),
            list(rows["mask"]),
            label_map=list(rows["label_map"]) if layout == "2c+1+K" else None,
            latents=noise,
            num_inference_steps=5,
            output_type="np",
        ).images
        torch.testing.assert_close(images, torch.from_numpy(expected).permute(0, 3, 1, 2), rtol=0, atol=1e-5)


def test_ddim_in_the_place_of_another_scheduler_clips_only_where_that_one_did(tmp_path):
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    for scheduler in (
        EulerDiscreteScheduler(**schedule),
        DPMSolverMultistepScheduler(**schedule),
        DDPMScheduler(**schedule, clip_sample=True, clip_sample_range=2.0),
        DDPMScheduler(**schedule, clip_sample=False),
    ):
        pipeline = make_pipeline()
        pipeline.scheduler = scheduler
        make_trainer(tmp_path, pipeline=pipeline)
        ours = pipeline.scheduler
        assert type(ours).__name__ == "DDIMScheduler" and torch.equal(ours.alphas_cumprod, scheduler.alphas_cumprod)
        assert ours.config.clip_sample == scheduler.config.get("clip_sample", False)
        if ours.config.clip_sample:
            assert ours.config.clip_sample_range == scheduler.config.clip_sample_range


def test_members_share_what_comes_before_the_window_and_differ_after(tmp_path):
    trainer = make_trainer(tmp_path)
    conditions, _ = trainer._encode(make_rows(2), [0, 1])
    calls = []
    denoise = trainer.pipeline.denoise
    trainer.pipeline.denoise = lambda latents, *args, **kwargs: (
        calls.append(len(latents)) or denoise(latents, *args, **kwargs)
    )
    images, latents, log_probs, _ = trainer.sampler.generate(conditions, [(1,), (2,)], 4, range(2, 4), batch_size=4)
    assert calls == [2, 2] + [4] * 8  # 2 shared steps of 2 groups, then 4 steps of 8 images in batches of 4
    assert latents.shape == (8, 3, 4, 8, 8) and log_probs.shape == (8, 2)
    for group in (slice(0, 4), slice(4, 8)):
        assert torch.equal(latents[group, 0], latents[group, 0][:1].expand(4, -1, -1, -1))
        assert len({round(float(image.double().sum()), 6) for image in images[group]}) == 4
    assert not torch.equal(latents[0, 0], latents[4, 0])


def test_pixels_outside_the_mask_are_those_of_the_source(tmp_path):
    trainer = make_trainer(tmp_path)
    conditions, _ = trainer._encode(make_rows(2), [0, 1])
    images = trainer.sampler.generate(conditions, [(1,), (2,)], 4, range(1, 3)).images
    sources = conditions.image.repeat_interleave(4, dim=0)
    outside = ~conditions.pixel_mask.repeat_interleave(4, dim=0)
    assert torch.equal(images[outside], sources[outside])
    assert not torch.equal(images[~outside], sources[~outside])


class CountReads(TorchDispatchMode):
    """Counts what makes the host wait for the device: reading a tensor's value."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["c", "2c+1", "2c+1+K"])
def test_the_host_does_not_wait_inside_the_denoising_loop(tmp_path, layout):
    trainer = make_trainer(tmp_path, pipeline=make_pipeline(layout=layout))
    conditions, _ = trainer._encode(make_rows(2), [0, 1])
    chain = trainer.sampler.chain(conditions)
    noise = torch.randn(2, 4, 8, 8)
    with torch.no_grad(), CountReads() as reads:
        trainer.sampler.run(chain, range(6), noise, conditions, noise, range(1, 3), torch.randn(2, 2, 4, 8, 8))
    assert reads.count == 0


@pytest.mark.parametrize("layout", ["c", "2c+1", "2c+1+K"])
def test_gradient_is_exactly_zero_outside_the_mask_whatever_is_there(tmp_path, layout):
    trainer = make_trainer(tmp_path, pipeline=make_pipeline(layout=layout))
    conditions, _ = trainer._encode(make_rows(2), [0, 1])
    chain = trainer.sampler.chain(conditions)
    latents, output, drawn = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    outside = (conditions.mask == 0).expand_as(latents)
    assert outside.any() and not outside.all()

    def log_prob(latents, output):
        return trainer.sampler.transition(
            chain, 1, output, latents, conditions.mask, eta=1.0, next_sample=drawn
        ).log_prob

    output.requires_grad_(True)
    expected = log_prob(latents, output)
    expected.sum().backward()
    assert (output.grad[outside] == 0).all() and (output.grad[~outside] != 0).all()
    for background in (0.0, 1e6, math.nan):
        changed = torch.where(outside, background, latents)
        assert torch.equal(log_prob(changed, torch.where(outside, background, output)), expected)


def test_background_of_the_plain_layout_is_one_stored_draw_of_noise(tmp_path):
    trainer = make_trainer(tmp_path, pipeline=make_pipeline(layout="c"))
    conditions, _ = trainer._encode(make_rows(2), [0, 1])
    window, scheduler = range(1, 4), trainer.pipeline.scheduler
    keys = [(1,), (2,)]
    latents = trainer.sampler.generate(conditions, keys, 1, window).latents
    noise = torch.stack([torch.randn(4, 8, 8, generator=seeded_generator(*key, 0)) for key in keys])
    outside = (conditions.mask == 0).expand_as(noise)
    for i, t in enumerate(trainer.sampler.chain(conditions).timesteps[1:5]):
        expected = scheduler.add_noise(conditions.image_latents, noise, t.reshape(1))
        torch.testing.assert_close(latents[:, i][outside], expected[outside])
