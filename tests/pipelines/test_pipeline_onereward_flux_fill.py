"""What `OneRewardFluxFillPipeline` promises: diffusers inside the mask, exact pixels outside, clear refusals."""

import dataclasses

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FluxFillPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import cast_training_params
from flow_components import tiny_flux_fill_components
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from onereward.pipelines import MaskConditions, OneRewardFluxFillPipeline


PROMPT = "T1-weighted brain MRI with an enhancing tumour"


@pytest.fixture
def source():
    """A 16 x 16 grey image, and a mask that cuts through latent cells."""
    rng = np.random.default_rng(0)
    mask = np.zeros((16, 16), np.uint8)
    mask[3:12, 6:13] = 255
    return rng.integers(0, 256, (16, 16), dtype=np.uint8), mask


def make_pipeline(cls=OneRewardFluxFillPipeline, **kwargs):
    pipeline = cls(**tiny_flux_fill_components(**kwargs))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, source, *, seed=0, prompt=PROMPT, **kwargs):
    kwargs = {"image": source[0], "mask_image": source[1], "num_inference_steps": 2, "output_type": "pt"} | kwargs
    return pipeline(prompt, generator=torch.Generator().manual_seed(seed), max_sequence_length=32, **kwargs).images


def add_random_lora(pipeline):
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    pipeline.transformer.add_adapter(lora)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in pipeline.transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=generator)


# -------------------------------------------------------------------------------------------- diffusers as oracle


@pytest.mark.parametrize("guidance_embeds", [True, False])
@pytest.mark.parametrize("guidance_scale", [1.0, 30.0])
def test_paints_what_flux_fill_paints(source, monkeypatch, guidance_embeds, guidance_scale):
    # Theirs samples the condition from the VAE, ours takes the mode.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    pipeline = make_pipeline(guidance_embeds=guidance_embeds)
    theirs = FluxFillPipeline(**pipeline.components)
    theirs.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    arguments = {
        "image": torch.from_numpy(source[0])[None, None].float().expand(1, 3, -1, -1) / 255,
        "mask_image": torch.from_numpy(source[1])[None, None].float() / 255,
        "num_inference_steps": 3,
        "guidance_scale": guidance_scale,
        "num_images_per_prompt": 2,
        "max_sequence_length": 32,
        "output_type": "pt",
    }
    packed = theirs._pack_latents(latents, 2, 4, 8, 8)
    expected = theirs(PROMPT, latents=packed, height=16, width=16, **arguments).images
    timesteps, sigmas = theirs.scheduler.timesteps, theirs.scheduler.sigmas
    result = pipeline(PROMPT, latents=latents, **arguments).images
    inside = arguments["mask_image"].bool().expand_as(result)
    torch.testing.assert_close(result[inside], expected[inside], atol=1e-5, rtol=0)
    assert torch.equal(result[~inside], arguments["image"].expand_as(result)[~inside])

    conditions = pipeline.encode_conditions(PROMPT, *source)
    assert torch.equal(pipeline.set_timesteps(3, conditions, "cpu"), timesteps)
    assert torch.equal(pipeline.scheduler.sigmas, sigmas) and len(sigmas) == 4 and sigmas[-1] == 0


def test_unet_pipeline_sets_its_timesteps_by_the_same_method(tiny_pipeline, source):
    pipeline = tiny_pipeline(layout="c")
    timesteps = pipeline.set_timesteps(5, pipeline.encode_conditions(PROMPT, *source), "cpu")
    pipeline.scheduler.set_timesteps(5)
    assert torch.equal(timesteps, pipeline.scheduler.timesteps) and len(timesteps) == 5


def test_guidance_is_told_to_the_transformer(source):
    with_guidance, without = make_pipeline(), make_pipeline(guidance_embeds=False)
    assert not torch.equal(
        generate(with_guidance, source, guidance_scale=1.0), generate(with_guidance, source, guidance_scale=5.0)
    )
    assert torch.equal(generate(without, source, guidance_scale=1.0), generate(without, source, guidance_scale=5.0))


def test_checkpoints_go_from_theirs_to_ours_and_back(source, tmp_path):
    make_pipeline(FluxFillPipeline).save_pretrained(tmp_path / "theirs")
    pipeline = OneRewardFluxFillPipeline.from_pretrained(tmp_path / "theirs")
    pipeline.set_progress_bar_config(disable=True)
    expected = generate(make_pipeline(), source)
    assert torch.equal(generate(pipeline, source), expected)

    pipeline.save_pretrained(tmp_path / "ours")
    again = OneRewardFluxFillPipeline.from_pretrained(tmp_path / "ours")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(generate(again, source), expected)
    assert type(FluxFillPipeline.from_pretrained(tmp_path / "ours")) is FluxFillPipeline


def test_adapters_are_exchanged_with_diffusers(source, tmp_path):
    pipeline = make_pipeline()
    base = generate(pipeline, source)
    add_random_lora(pipeline)
    tuned = generate(pipeline, source)
    assert not torch.equal(tuned, base)
    pipeline.transformer.disable_adapters()
    assert torch.equal(generate(pipeline, source), base)
    pipeline.transformer.enable_adapters()

    FluxFillPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer),
        transformer_lora_adapter_metadata=pipeline.transformer.peft_config["default"].to_dict(),
    )
    ours, theirs = make_pipeline(), make_pipeline(FluxFillPipeline)
    for loaded in (ours, theirs):
        loaded.load_lora_weights(tmp_path)
    assert torch.equal(generate(ours, source), tuned)
    for name, parameter in theirs.transformer.named_parameters():
        assert torch.equal(parameter, ours.transformer.get_parameter(name))


# ---------------------------------------------------------------------------------------------- the pixels outside


@pytest.mark.parametrize("image_channels", [1, 3])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_pixels_outside_the_mask_are_the_source_bit_for_bit(image_channels, dtype, output_type):
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (16, 16, image_channels), dtype=np.uint8)
    image = image if dtype == "uint8" else rng.random(image.shape).astype(dtype)
    mask = rng.random((16, 16)) < 0.3
    pipeline = make_pipeline(image_channels=image_channels)
    result = generate(pipeline, (image, mask), output_type=output_type)
    result = result[0].permute(1, 2, 0).numpy() if output_type == "pt" else result[0]
    assert result.dtype == image.dtype
    assert np.array_equal(result[~mask], image[~mask])
    assert not np.array_equal(result[mask], image[mask])


def test_pil_in_gives_equal_pil_out(source):
    image, mask = source
    picture = PIL.Image.fromarray(image)
    result = make_pipeline(image_channels=1)(PROMPT, picture, PIL.Image.fromarray(mask), num_inference_steps=1)
    assert result.images[0].mode == "L"
    assert np.array_equal(np.array(result.images[0])[mask == 0], image[mask == 0])


def test_what_the_hole_held_does_not_reach_the_result(source):
    image, mask = source
    pipeline = make_pipeline()
    other = (np.where(mask > 0, 255 - image, image), mask)
    for size in ({}, {"height": 8, "width": 8}):
        assert torch.equal(generate(pipeline, source, **size), generate(pipeline, other, **size))


def test_work_size_leaves_the_result_at_the_size_of_the_source():
    rng = np.random.default_rng(2)
    image, mask = rng.integers(0, 256, (31, 45), dtype=np.uint8), np.zeros((31, 45), np.uint8)
    mask[3:20, 10:30] = 1
    result = generate(make_pipeline(image_channels=1), (image, mask), height=16, width=20, output_type="np")[0]
    assert result.shape == (31, 45, 1)
    assert np.array_equal(result[..., 0][mask == 0], image[mask == 0])


# ------------------------------------------------------------------------------------- what users of pipelines expect


def test_an_image_in_a_batch_equals_the_image_alone(source):
    pipeline = make_pipeline()
    rng = np.random.default_rng(3)
    images, prompts = rng.random((3, 16, 16, 3), dtype=np.float32), [PROMPT, "oedema", ""]
    masks = np.stack([source[1], source[1].T, np.full_like(source[1], 255)])
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    batch = pipeline(
        prompts, images, masks, num_inference_steps=2, generator=generators, output_type="pt", max_sequence_length=32
    ).images
    for i, prompt in enumerate(prompts):
        alone = generate(pipeline, (images[i], masks[i]), seed=i, prompt=prompt)
        torch.testing.assert_close(batch[i], alone[0], atol=1e-5, rtol=0)


def test_each_row_may_have_its_own_timestep(source):
    pipeline = make_pipeline()
    conditions = pipeline.encode_conditions([PROMPT, "oedema"], *source)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = pipeline.denoise(latents, torch.tensor([900.0, 100.0]), conditions, guidance_scale=3.5)
        for i, timestep in enumerate([900.0, torch.tensor(100.0)]):
            rows = slice(i, i + 1)
            alone = pipeline.denoise(latents[rows], timestep, conditions[rows], guidance_scale=3.5)
            torch.testing.assert_close(together[rows], alone, atol=1e-5, rtol=1e-5)
    assert together.shape == latents.shape


def test_output_types_agree(source):
    pipeline = make_pipeline()
    image = source[0] / np.float32(255)
    pt = generate(pipeline, source, image=image)
    array = generate(pipeline, source, image=image, output_type="np")
    pil = generate(pipeline, source, image=image, output_type="pil")
    latents = generate(pipeline, source, image=image, output_type="latent")
    assert np.array_equal(pt.permute(0, 2, 3, 1).numpy(), array)
    assert np.array_equal(np.array(pil[0]), (array[0] * 255).round().astype(np.uint8))
    conditions = pipeline.encode_conditions(PROMPT, image, source[1])
    assert latents.shape == (1, 4, 8, 8) and torch.equal(pipeline.decode(latents, conditions), pt)
    assert isinstance(pipeline(PROMPT, *source, num_inference_steps=1, return_dict=False), tuple)


def test_callback_sees_changes_and_interrupts(source):
    pipeline = make_pipeline()
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, sorted(tensors)))
        pipe._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else {}

    names = pipeline._callback_tensor_inputs
    arguments = {"callback_on_step_end": callback, "num_inference_steps": 4, "output_type": "latent"}
    latents = generate(pipeline, source, callback_on_step_end_tensor_inputs=names, **arguments)
    assert seen == [(0, sorted(names)), (1, sorted(names))] and latents.abs().sum() == 0
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        generate(pipeline, source, callback_on_step_end_tensor_inputs=["transformer"], **arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_and_still_exact_outside(source, dtype):
    image, mask = source
    pipeline = make_pipeline()
    full = generate(pipeline, source)
    half = generate(pipeline.to(dtype), source)
    assert np.array_equal(half[0, 0].numpy()[mask == 0], image[mask == 0])
    assert (full.float() - half.float()).abs().mean() < 255 * 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_in_float32_go_through_a_transformer_in_half_precision(source, dtype):
    pipeline = make_pipeline()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipeline.denoise(latents, 500.0, pipeline.encode_conditions(PROMPT, *source)).detach()
    pipeline.to(dtype)
    conditions = pipeline.encode_conditions(PROMPT, *source)
    assert conditions.mask.dtype == conditions.mask_channels.dtype == dtype and conditions.image.dtype == torch.float32
    for step in pipeline.set_timesteps(3, conditions):
        velocity = pipeline.denoise(latents, step, conditions, guidance_scale=30.0)
        assert velocity.dtype == dtype and velocity.isfinite().all()
    half = pipeline.denoise(latents, 500.0, conditions).detach().float()
    assert (half - expected).abs().max() < 0.05 * expected.abs().max()
    assert pipeline.decode(latents, conditions).isfinite().all()


def test_gradients_reach_the_adapter_alone(source):
    pipeline = make_pipeline().to(torch.bfloat16)
    pipeline.transformer.requires_grad_(False)
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"]))
    cast_training_params(pipeline.transformer, dtype=torch.float32)
    pipeline.transformer.enable_gradient_checkpointing()
    pipeline.transformer.train()
    conditions = pipeline.encode_conditions(PROMPT, *source)
    assert conditions.mask.dtype == torch.bfloat16
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline.denoise(latents, 500.0, conditions, guidance_scale=2.0).float().square().mean().backward()
    gradients = {n: p.grad for n, p in pipeline.transformer.named_parameters() if p.grad is not None}
    assert gradients and all("lora_" in name for name in gradients)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert any(gradient.any() for gradient in gradients.values())


# ---------------------------------------------------------------------------------------------------- conditions


def test_conditions_are_the_same_each_time_and_slice_like_tensors(source):
    pipeline = make_pipeline()
    prompts = [PROMPT, "oedema"]
    first, again = (pipeline.encode_conditions(prompts, *source) for _ in range(2))
    group, joined = first.repeat_interleave(2), MaskConditions.cat([first[:1], first[1:]])
    repeated = pipeline.encode_conditions(prompts, *source, num_images_per_prompt=2)
    assert type(group) is type(joined) is type(first.to("cpu")) is type(first)
    tensors = [f.name for f in dataclasses.fields(first) if getattr(first, f.name) is not None]
    assert {"mask_channels", "pooled_prompt_embeds", "masked_image_latents"} <= set(tensors)
    for name in tensors:
        value = getattr(first, name)
        assert torch.equal(value, getattr(again, name)) and torch.equal(value, getattr(joined, name))
        assert torch.equal(value[[0, 0, 1, 1]], getattr(group, name))
        assert torch.equal(value[[0, 0, 1, 1]], getattr(repeated, name))
    assert len(group) == 4 and not pipeline.has_label_channels
    half = first.to(dtype=torch.float16)
    assert half.pooled_prompt_embeds.dtype == torch.float16
    assert half.image.dtype == torch.float32 and half.pixel_mask.dtype == torch.bool


def test_latent_mask_holds_every_cell_that_is_touched(source):
    conditions = make_pipeline().encode_conditions(PROMPT, *source)
    mask = torch.from_numpy(source[1])[None, None] > 0
    assert torch.equal(conditions.pixel_mask, mask)
    assert torch.equal(conditions.mask, conditions.mask_channels.amax(1, keepdim=True))
    assert conditions.mask.sum() == 5 * 4 and conditions.mask_channels.sum() == mask.sum()


def test_background_is_left_to_the_transformer(source):
    pipeline = make_pipeline()
    conditions = pipeline.encode_conditions(PROMPT, *source)
    latents = torch.randn(1, 4, 8, 8)
    assert pipeline.reimpose_background(latents, conditions, latents, None) is latents


def test_no_prompt_means_the_prompt_of_the_task(source):
    pipeline = make_pipeline()
    without = pipeline.encode_conditions(None, *source, task=["fill", "remove"])
    named = pipeline.encode_conditions(["", "healthy tissue, no lesion"], *source)
    torch.testing.assert_close(without.prompt_embeds, named.prompt_embeds)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask_image": np.zeros((16, 16), np.uint8)}, "`mask_image` is empty"),
        ({"mask_image": np.full((16, 16), 100, np.uint8)}, "not binary"),
        ({"mask_image": np.ones((8, 16), np.uint8)}, "`mask_image` is 16 x 8 pixels .* but `image` is 16 x 16"),
        ({"label_map": np.zeros((16, 16), np.uint8)}, "`label_map` cannot be used.*say what to paint in `prompt`"),
        ({"negative_prompt": "blur"}, "`negative_prompt` cannot be used"),
        ({"image": np.full((16, 16), 40.0, np.float32)}, "must lie in"),
        ({"image": np.zeros((14, 16), np.uint8), "mask_image": np.ones((14, 16), np.uint8)}, "multiples of 4"),
        ({"prompt": 3}, "`prompt` must be text"),
        ({"prompt": ["a", 3]}, "`prompt` must be text"),
        ({"prompt": ["a", "b", "c"], "image": [np.zeros((16, 16), np.uint8)] * 2}, "different numbers of images"),
        ({"task": "paint"}, "`task` is 'paint'"),
    ],
)
def test_bad_input_is_refused_with_what_is_wanted(source, changes, message):
    arguments = {"prompt": PROMPT, "image": source[0], "mask_image": source[1]} | changes
    with pytest.raises(ValueError, match=message):
        make_pipeline().encode_conditions(**arguments)


def test_bad_calls_are_refused_with_what_is_wanted(source):
    pipeline = make_pipeline()
    with pytest.raises(ValueError, match="`output_type` is 'jpg'"):
        generate(pipeline, source, output_type="jpg")
    with pytest.raises(ValueError, match="`latents` has shape"):
        generate(pipeline, source, latents=torch.zeros(1, 16, 16))
    pipeline.text_encoder_2 = None
    with pytest.raises(ValueError, match="`text_encoder_2` must both be there"):
        generate(pipeline, source)


def test_transformer_that_is_no_fill_model_is_refused():
    components = tiny_flux_fill_components()
    components["transformer"].register_to_config(in_channels=16)
    with pytest.raises(ValueError, match="in_channels` is 16, but FLUX Fill with this VAE reads 48"):
        OneRewardFluxFillPipeline(**components)


def test_pickles_are_not_read_unless_asked_for(tmp_path):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    torch.save(pipeline.vae.state_dict(), tmp_path / "vae" / "diffusion_pytorch_model.bin")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        OneRewardFluxFillPipeline.from_pretrained(tmp_path)

    torch.save({"transformer.layer.lora_A.weight": torch.ones(1)}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(ValueError, match="no safetensors file"):
        pipeline.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.bin")
    with pytest.raises(OSError):
        pipeline.load_lora_weights(str(tmp_path))
