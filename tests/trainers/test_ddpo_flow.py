"""The same trainer tunes flow-matching denoisers: FLUX Fill and both layouts of SD3."""

import math
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    FluxFillPipeline,
    UniPCMultistepScheduler,
)


sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from ddpo_setup import logged, make_rows, make_trainer  # noqa: E402
from flow_components import tiny_flux_fill_components, tiny_sd3_components  # noqa: E402

from onereward.hub.adapters import load_adapter  # noqa: E402
from onereward.pipelines import OneRewardFluxFillPipeline, OneRewardSD3InpaintPipeline  # noqa: E402
from onereward.policy import seeded_generator  # noqa: E402
from onereward.trainers.ddpo import DDPOTrainer  # noqa: E402


PIPELINES = {
    "flux-fill": lambda: OneRewardFluxFillPipeline(**tiny_flux_fill_components()),
    "sd3-16": lambda: OneRewardSD3InpaintPipeline(**tiny_sd3_components(in_channels=16)),
    "sd3-33": lambda: OneRewardSD3InpaintPipeline(**tiny_sd3_components(in_channels=33)),
}


def make_flow_trainer(output_dir, name, **config):
    pipeline = PIPELINES[name]()
    pipeline.set_progress_bar_config(disable=True)
    rows = make_rows()
    if pipeline.vae.config.in_channels == 3:
        rows = rows.map(lambda row: {key: row[key].convert("RGB") for key in ("image", "target")})
    return make_trainer(
        output_dir, pipeline=pipeline, rows=rows, lora={"target_modules": ["to_q", "to_v"]}, eta=0.7, **config
    )


@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchHeunDiscreteScheduler(), FlowMatchLCMScheduler(), UniPCMultistepScheduler(use_flow_sigmas=True)],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_flow_scheduler_that_cannot_be_a_policy_is_refused_and_not_replaced(tmp_path, scheduler):
    pipeline = PIPELINES["sd3-16"]()
    pipeline.scheduler = scheduler
    with pytest.raises(
        ValueError, match=f"is {type(scheduler).__name__}.*FlowMatchEulerDiscreteScheduler.from_config"
    ):
        make_trainer(tmp_path, pipeline=pipeline, lora={"target_modules": ["to_q"]})
    assert pipeline.scheduler is scheduler


@pytest.mark.parametrize("sampler", ["sde", "cps"])
@pytest.mark.parametrize("name", PIPELINES)
def test_ratio_of_an_untouched_policy_is_exactly_one(tmp_path, name, sampler):
    trainer = make_flow_trainer(
        tmp_path, name, flow_sampler=sampler, learning_rate=0.0, gradient_accumulation_steps=2, num_iterations=2,
        max_steps=4,
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "ratio/max_deviation") == [0.0] * 4
    assert all(math.isfinite(value) and value > 0 for value in logged(trainer, "grad_norm"))


@pytest.mark.parametrize("name", PIPELINES)
def test_adapter_is_trained_kept_near_the_base_and_loads_in_the_stock_pipeline(tmp_path, name):
    trainer = make_flow_trainer(tmp_path, name, beta=0.1, num_iterations=3, max_steps=3, ema_decay=0.5)
    before = [p.detach().clone() for p in trainer.policy_parameters]
    trainer.train()
    assert logged(trainer, "kl")[0] == 0 and logged(trainer, "kl")[-1] > 0
    assert any(not torch.equal(p, old) for p, old in zip(trainer.policy_parameters, before, strict=True))
    trainer.save_model()

    stock = FluxFillPipeline(**tiny_flux_fill_components()) if name == "flux-fill" else PIPELINES[name]()
    load_adapter(stock, tmp_path)
    with trainer.ema.applied():
        ours = {n: p.detach().clone() for n, p in trainer.denoiser.named_parameters() if "lora" in n}
    theirs = {n: p for n, p in stock.transformer.named_parameters() if "lora" in n}
    assert len(theirs) == len(ours) > 0 and all(torch.equal(theirs[n], p) for n, p in ours.items())


@pytest.mark.parametrize("name", PIPELINES)
def test_evaluation_is_what_the_pipeline_paints(tmp_path, name):
    trainer = make_flow_trainer(tmp_path, name)
    conditions, _ = trainer._encode(trainer.train_dataset, [0, 1])
    images = trainer.sampler.generate(conditions, [(1,), (2,)]).images
    noise = trainer.sampler.draw([seeded_generator(key, 0) for key in (1, 2)], conditions)
    rows = trainer.train_dataset.select([0, 1])
    expected = trainer.pipeline(
        list(rows["prompt"]), list(rows["image"]), list(rows["mask"]), latents=noise, num_inference_steps=6,
        guidance_scale=1.0, output_type="np",
    ).images  # fmt: skip
    torch.testing.assert_close(images, torch.from_numpy(expected).permute(0, 3, 1, 2), rtol=0, atol=2e-3)


def test_resumed_training_is_the_uninterrupted_one(tmp_path):
    config = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2, "max_steps": 4}
    whole = make_flow_trainer(tmp_path / "whole", "sd3-16", **config)
    whole.train()
    resumed = make_flow_trainer(tmp_path / "resumed", "sd3-16", **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for ours, theirs in zip(resumed.policy_parameters, whole.policy_parameters, strict=True):
        assert torch.equal(ours, theirs)


def test_all_weights_of_a_transformer_are_trained_and_kept_near_the_base(tmp_path):
    first = make_flow_trainer(tmp_path, "sd3-16", beta=0.1, num_iterations=2, learning_rate=1e-4)
    pipeline = PIPELINES["sd3-16"]()
    trainer = DDPOTrainer(pipeline, lambda images, **_: images.mean((1, 2, 3)), first.args, first.train_dataset)
    trainer.train()
    assert logged(trainer, "kl")[0] == 0 and logged(trainer, "kl")[-1] > 0
    assert pipeline.transformer is trainer.denoiser and trainer.adapter_name is None
