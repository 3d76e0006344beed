"""What `OneRewardSD3InpaintPipeline` promises: diffusers inside the mask, exact pixels outside, clear refusals."""

import dataclasses

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3InpaintPipeline, StableDiffusion3Pipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import cast_training_params
from flow_components import tiny_sd3_components
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from onereward.pipelines import MaskConditions, OneRewardSD3InpaintPipeline


LAYOUTS = [16, 33]
PROMPT = "T1-weighted brain MRI with an enhancing tumour"


@pytest.fixture
def source():
    """A 16 x 16 grey image, and a mask on the border of latent cells."""
    rng = np.random.default_rng(0)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 6:14] = 255
    return rng.integers(0, 256, (16, 16), dtype=np.uint8), mask


def make_pipeline(in_channels=33, cls=OneRewardSD3InpaintPipeline, **kwargs):
    pipeline = cls(**tiny_sd3_components(in_channels, **kwargs))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, source, *, seed=0, prompt=PROMPT, **kwargs):
    kwargs = {"image": source[0], "mask_image": source[1], "num_inference_steps": 2, "output_type": "pt"} | kwargs
    return pipeline(prompt, generator=torch.Generator().manual_seed(seed), max_sequence_length=32, **kwargs).images


# -------------------------------------------------------------------------------------------- diffusers as oracle


@pytest.mark.parametrize("in_channels", LAYOUTS)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("use_dynamic_shifting", [False, True])
def test_paints_what_sd3_inpainting_paints(source, monkeypatch, in_channels, guidance_scale, use_dynamic_shifting):
    # Theirs samples the condition from the VAE, ours takes the mode; theirs forgets the shift when it decodes.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    pipeline = make_pipeline(in_channels, shift_factor=0.0)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, use_dynamic_shifting=use_dynamic_shifting
    )
    theirs = StableDiffusion3InpaintPipeline(**pipeline.components)
    theirs.set_progress_bar_config(disable=True)
    arguments = {
        "prompt": PROMPT,
        "negative_prompt": "oedema",
        "image": torch.from_numpy(source[0])[None, None].float().expand(1, 3, -1, -1) / 255,
        "mask_image": torch.from_numpy(source[1])[None, None].float() / 255,
        "num_inference_steps": 3,
        "guidance_scale": guidance_scale,
        "num_images_per_prompt": 2,
        "latents": torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(5)),
        "max_sequence_length": 32,
        "output_type": "pt",
    }
    expected = theirs(**arguments, strength=1.0, height=16, width=16).images
    timesteps, sigmas = theirs.scheduler.timesteps, theirs.scheduler.sigmas
    result = pipeline(**arguments).images
    inside = arguments["mask_image"].bool().expand_as(result)
    torch.testing.assert_close(result[inside], expected[inside], atol=1e-5, rtol=0)
    assert torch.equal(result[~inside], arguments["image"].expand_as(result)[~inside])

    conditions = pipeline.encode_conditions(PROMPT, *source)
    assert torch.equal(pipeline.set_timesteps(3, conditions, "cpu"), timesteps)
    assert torch.equal(pipeline.scheduler.sigmas, sigmas) and len(sigmas) == 4 and sigmas[-1] == 0


@pytest.mark.parametrize("in_channels", LAYOUTS)
def test_latents_are_those_of_sd3_inpainting_with_a_shift_too(source, monkeypatch, in_channels):
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    pipeline = make_pipeline(in_channels)
    theirs = StableDiffusion3InpaintPipeline(**pipeline.components)
    theirs.set_progress_bar_config(disable=True)
    picture, hole = PIL.Image.fromarray(source[0]).convert("RGB"), PIL.Image.fromarray(source[1])
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(5))
    arguments = {"image": picture, "mask_image": hole, "latents": latents, "output_type": "latent"}
    expected = generate(theirs, source, strength=1.0, height=16, width=16, **arguments)
    torch.testing.assert_close(generate(pipeline, source, **arguments), expected, atol=1e-5, rtol=0)


def test_with_all_masked_it_is_sd3_from_text(source):
    pipeline = make_pipeline(16)
    components = {k: v for k, v in pipeline.components.items() if k not in ("image_encoder", "feature_extractor")}
    theirs = StableDiffusion3Pipeline(**components)
    theirs.set_progress_bar_config(disable=True)
    arguments = {
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "latents": torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(5)),
        "max_sequence_length": 32,
        "output_type": "pt",
    }
    expected = theirs(PROMPT, height=16, width=16, **arguments).images
    result = pipeline(PROMPT, source[0] / np.float32(255), np.ones_like(source[1]), **arguments).images
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("in_channels", LAYOUTS)
def test_checkpoints_go_from_theirs_to_ours_and_back(source, tmp_path, in_channels):
    make_pipeline(in_channels, StableDiffusion3InpaintPipeline).save_pretrained(tmp_path / "theirs")
    pipeline = OneRewardSD3InpaintPipeline.from_pretrained(tmp_path / "theirs")
    pipeline.set_progress_bar_config(disable=True)
    expected = generate(make_pipeline(in_channels), source)
    assert torch.equal(generate(pipeline, source), expected)

    pipeline.save_pretrained(tmp_path / "ours")
    again = OneRewardSD3InpaintPipeline.from_pretrained(tmp_path / "ours")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(generate(again, source), expected)
    StableDiffusion3InpaintPipeline.from_pretrained(tmp_path / "ours")


def test_without_t5_it_paints_saves_and_loads(source, tmp_path):
    none = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = OneRewardSD3InpaintPipeline(**tiny_sd3_components(33) | none)
    pipeline.set_progress_bar_config(disable=True)
    conditions = pipeline.encode_conditions(PROMPT, *source, max_sequence_length=32)
    assert conditions.prompt_embeds[:, 24:].eq(0).all() and conditions.prompt_embeds[:, :24].ne(0).any()
    pipeline.save_pretrained(tmp_path)
    loaded = OneRewardSD3InpaintPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.text_encoder_3 is None
    assert torch.equal(generate(loaded, source), generate(pipeline, source))


def test_adapters_are_exchanged_with_diffusers(source, tmp_path):
    pipeline = make_pipeline()
    base = generate(pipeline, source)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    pipeline.transformer.add_adapter(lora)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in pipeline.transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=generator)
    tuned = generate(pipeline, source)
    assert not torch.equal(tuned, base)
    pipeline.transformer.disable_adapters()
    assert torch.equal(generate(pipeline, source), base)

    StableDiffusion3InpaintPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer),
        transformer_lora_adapter_metadata=pipeline.transformer.peft_config["default"].to_dict(),
    )
    ours, theirs = make_pipeline(), make_pipeline(cls=StableDiffusion3InpaintPipeline)
    for loaded in (ours, theirs):
        loaded.load_lora_weights(tmp_path)
    assert torch.equal(generate(ours, source), tuned)
    for name, parameter in theirs.transformer.named_parameters():
        assert torch.equal(parameter, ours.transformer.get_parameter(name))


# ------------------------------------------------------------------------------------------------ the background


@pytest.mark.parametrize("in_channels", LAYOUTS)
@pytest.mark.parametrize("image_channels", [1, 3])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_pixels_outside_the_mask_are_the_source_bit_for_bit(in_channels, image_channels, dtype, output_type):
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (16, 16, image_channels), dtype=np.uint8)
    image = image if dtype == "uint8" else rng.random(image.shape).astype(dtype)
    mask = rng.random((16, 16)) < 0.3
    pipeline = make_pipeline(in_channels, image_channels=image_channels)
    result = generate(pipeline, (image, mask), output_type=output_type)
    result = result[0].permute(1, 2, 0).numpy() if output_type == "pt" else result[0]
    assert result.dtype == image.dtype
    assert np.array_equal(result[~mask], image[~mask])
    assert not np.array_equal(result[mask], image[mask])


def test_pil_in_gives_equal_pil_out(source):
    image, mask = source
    pipeline = make_pipeline(image_channels=1)
    result = pipeline(PROMPT, PIL.Image.fromarray(image), PIL.Image.fromarray(mask), num_inference_steps=1).images[0]
    assert result.mode == "L" and np.array_equal(np.array(result)[mask == 0], image[mask == 0])


def test_what_the_hole_held_does_not_reach_the_result(source):
    image, mask = source
    pipeline = make_pipeline(33)
    other = (np.where(mask > 0, 255 - image, image), mask)
    for size in ({}, {"height": 8, "width": 8}):
        assert torch.equal(generate(pipeline, source, **size), generate(pipeline, other, **size))


def test_work_size_leaves_the_result_at_the_size_of_the_source():
    rng = np.random.default_rng(2)
    image, mask = rng.integers(0, 256, (31, 45), dtype=np.uint8), np.zeros((31, 45), np.uint8)
    mask[3:20, 10:30] = 1
    pipeline = make_pipeline(16, image_channels=1)
    result = generate(pipeline, (image, mask), height=16, width=20, output_type="np")[0]
    assert result.shape == (31, 45, 1)
    assert np.array_equal(result[..., 0][mask == 0], image[mask == 0])


def test_background_is_reimposed_at_the_noise_of_the_timestep(source):
    pipeline = make_pipeline(16)
    conditions = pipeline.encode_conditions([PROMPT, "oedema"], *source)
    timesteps = pipeline.set_timesteps(4, conditions)
    latents, noise = torch.randn(2, 2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    outside = (conditions.mask == 0).expand_as(latents)
    for t in timesteps:
        expected = pipeline.scheduler.scale_noise(conditions.image_latents, t[None], noise)
        result = pipeline.reimpose_background(latents, conditions, noise, t)
        torch.testing.assert_close(result[outside], expected[outside], atol=1e-6, rtol=0)
        assert torch.equal(result[~outside], latents[~outside])
    clean = pipeline.reimpose_background(latents, conditions, noise, None)
    assert torch.equal(clean[outside], conditions.image_latents[outside])

    rows = pipeline.reimpose_background(latents, conditions, noise, timesteps[[1, 3]])
    for i, t in enumerate(timesteps[[1, 3]]):
        assert torch.equal(rows[i], pipeline.reimpose_background(latents, conditions, noise, t)[i])
    half = pipeline.reimpose_background(latents, conditions.to(dtype=torch.bfloat16), noise, timesteps[1])
    assert half.dtype == torch.float32


def test_background_is_left_to_a_transformer_that_reads_it(source):
    pipeline = make_pipeline(33)
    conditions = pipeline.encode_conditions(PROMPT, *source)
    latents = torch.randn(1, 16, 8, 8)
    assert pipeline.reimpose_background(latents, conditions, latents, None) is latents


# ------------------------------------------------------------------------------------- what users of pipelines expect


@pytest.mark.parametrize("in_channels", LAYOUTS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_an_image_in_a_batch_equals_the_image_alone(source, in_channels, guidance_scale):
    pipeline = make_pipeline(in_channels)
    rng = np.random.default_rng(3)
    images, prompts = rng.random((3, 16, 16, 3), dtype=np.float32), [PROMPT, "oedema", ""]
    masks = np.stack([source[1], source[1].T, np.full_like(source[1], 255)])
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    arguments = {"guidance_scale": guidance_scale, "negative_prompt": "blur"}
    batch = pipeline(
        prompts,
        images,
        masks,
        num_inference_steps=2,
        generator=generators,
        output_type="pt",
        max_sequence_length=32,
        **arguments,
    ).images
    for i, prompt in enumerate(prompts):
        alone = generate(pipeline, (images[i], masks[i]), seed=i, prompt=prompt, **arguments)
        torch.testing.assert_close(batch[i], alone[0], atol=1e-5, rtol=0)


def test_guidance_is_the_weighted_difference_of_two_calls(source):
    pipeline = make_pipeline()
    conditions = pipeline.encode_conditions([PROMPT, "oedema"], *source, guidance_scale=2.0)
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    nothing = dataclasses.replace(
        conditions,
        prompt_embeds=conditions.negative_prompt_embeds,
        pooled_prompt_embeds=conditions.negative_pooled_prompt_embeds,
    )
    timestep = torch.tensor([900.0, 100.0])
    with torch.no_grad():
        conditional = pipeline.denoise(latents, timestep, conditions)
        unconditional = pipeline.denoise(latents, timestep, nothing)
        guided = pipeline.denoise(latents, timestep, conditions, guidance_scale=3.0)
        alone = pipeline.denoise(latents[1:], 100.0, conditions[1:], guidance_scale=3.0)
    torch.testing.assert_close(guided, unconditional + 3.0 * (conditional - unconditional), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(guided[1:], alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="same `guidance_scale`"):
        pipeline.denoise(latents, timestep, pipeline.encode_conditions(PROMPT, *source), guidance_scale=3.0)


def test_output_types_agree(source):
    pipeline = make_pipeline()
    image = source[0] / np.float32(255)
    pt = generate(pipeline, source, image=image)
    array = generate(pipeline, source, image=image, output_type="np")
    latents = generate(pipeline, source, image=image, output_type="latent")
    assert np.array_equal(pt.permute(0, 2, 3, 1).numpy(), array)
    conditions = pipeline.encode_conditions(PROMPT, image, source[1])
    assert latents.shape == (1, 16, 8, 8) and torch.equal(pipeline.decode(latents, conditions), pt)
    assert isinstance(pipeline(PROMPT, *source, num_inference_steps=1, return_dict=False), tuple)


def test_callback_sees_and_changes_the_tensors_it_asks_for(source):
    pipeline = make_pipeline()
    names, seen = pipeline._callback_tensor_inputs, []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, sorted(tensors)))
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    arguments = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    changed = generate(pipeline, source, guidance_scale=2.0, **arguments)
    assert seen == [(step, sorted(names)) for step in range(2)]
    assert not torch.equal(changed, generate(pipeline, source, guidance_scale=2.0))


@pytest.mark.parametrize("in_channels", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_and_still_exact_outside(source, in_channels, dtype):
    image, mask = source
    pipeline = make_pipeline(in_channels)
    full = generate(pipeline, source)
    half = generate(pipeline.to(dtype), source)
    assert np.array_equal(half[0, 0].numpy()[mask == 0], image[mask == 0])
    assert (full.float() - half.float()).abs().mean() < 255 * 0.05


@pytest.mark.parametrize("in_channels", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_in_float32_go_through_a_transformer_in_half_precision(source, in_channels, dtype):
    pipeline = make_pipeline(in_channels).to(dtype)
    conditions = pipeline.encode_conditions(PROMPT, *source, guidance_scale=2.0)
    assert conditions.mask.dtype == dtype and conditions.image.dtype == torch.float32
    noise = latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in pipeline.set_timesteps(3, conditions):
        velocity = pipeline.denoise(latents, t, conditions, guidance_scale=2.0)
        assert velocity.dtype == dtype and velocity.isfinite().all()
        latents = pipeline.reimpose_background(latents - 0.3 * velocity, conditions, noise, t)
        assert latents.dtype == torch.float32 and latents.isfinite().all()
    assert pipeline.decode(latents, conditions).isfinite().all()


def test_gradients_reach_the_adapter_alone(source):
    pipeline = make_pipeline().to(torch.bfloat16)
    pipeline.transformer.requires_grad_(False)
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"]))
    cast_training_params(pipeline.transformer, dtype=torch.float32)
    pipeline.transformer.enable_gradient_checkpointing()
    pipeline.transformer.train()
    conditions = pipeline.encode_conditions(PROMPT, *source, guidance_scale=2.0)
    assert conditions.mask.dtype == torch.bfloat16
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline.denoise(latents, 500.0, conditions, guidance_scale=2.0).float().square().mean().backward()
    gradients = {n: p.grad for n, p in pipeline.transformer.named_parameters() if p.grad is not None}
    assert gradients and all("lora_" in name for name in gradients)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert any(gradient.any() for gradient in gradients.values())


# ---------------------------------------------------------------------------------------------------- conditions


@pytest.mark.parametrize("in_channels", LAYOUTS)
def test_conditions_are_the_same_each_time_and_slice_like_tensors(source, in_channels):
    pipeline = make_pipeline(in_channels)
    prompts = [PROMPT, "oedema"]
    first, again = (pipeline.encode_conditions(prompts, *source, guidance_scale=2.0) for _ in range(2))
    group, joined = first.repeat_interleave(2), MaskConditions.cat([first[:1], first[1:]])
    repeated = pipeline.encode_conditions(prompts, *source, num_images_per_prompt=2, guidance_scale=2.0)
    assert type(group) is type(joined) is type(first.to("cpu")) is type(first)
    tensors = [f.name for f in dataclasses.fields(first) if getattr(first, f.name) is not None]
    assert {"pooled_prompt_embeds", "negative_pooled_prompt_embeds", "negative_prompt_embeds"} <= set(tensors)
    assert ("image_latents" in tensors) == (in_channels == 16)
    for name in tensors:
        value = getattr(first, name)
        assert torch.equal(value, getattr(again, name)) and torch.equal(value, getattr(joined, name))
        assert torch.equal(value[[0, 0, 1, 1]], getattr(group, name))
        assert torch.equal(value[[0, 0, 1, 1]], getattr(repeated, name))
    assert len(group) == 4 and not pipeline.has_label_channels


def test_a_lesion_of_one_pixel_reaches_the_latent_mask(source):
    mask = np.zeros((16, 16), bool)
    mask[5, 9] = True
    conditions = make_pipeline().encode_conditions(PROMPT, source[0], mask)
    assert conditions.mask.sum() == 1 and conditions.mask[0, 0, 2, 4] == 1 and conditions.pixel_mask.sum() == 1


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
        ({"label_map": np.zeros((16, 16), np.uint8)}, "`label_map` cannot be used.*say what to paint in `prompt`"),
        ({"image": np.zeros((14, 16), np.uint8), "mask_image": np.ones((14, 16), np.uint8)}, "multiples of 4"),
        ({"prompt": 3}, "`prompt` must be text"),
        ({"task": "paint"}, "`task` is 'paint'"),
    ],
)
def test_bad_input_is_refused_with_what_is_wanted(source, changes, message):
    arguments = {"prompt": PROMPT, "image": source[0], "mask_image": source[1]} | changes
    with pytest.raises(ValueError, match=message):
        make_pipeline().encode_conditions(**arguments)


def test_transformer_that_does_not_fit_the_vae_is_refused():
    components = tiny_sd3_components(33)
    components["transformer"].register_to_config(in_channels=20)
    with pytest.raises(ValueError, match=r"in_channels` is 20, but with 16 latent channels it must be 16 .* or 33"):
        OneRewardSD3InpaintPipeline(**components)


def test_pickles_are_not_read_unless_asked_for(tmp_path):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    torch.save(pipeline.vae.state_dict(), tmp_path / "vae" / "diffusion_pytorch_model.bin")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        OneRewardSD3InpaintPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no safetensors file"):
        pipeline.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.bin")
