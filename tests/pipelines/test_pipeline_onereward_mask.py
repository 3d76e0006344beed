"""What `OneRewardMaskPipeline` promises: exact pixels outside the mask, diffusers' behaviour, clear refusals."""

import dataclasses

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
)
from peft import LoraConfig

from onereward.pipelines import MaskConditions, OneRewardMaskPipeline


LAYOUTS = ["c", "2c+1", "2c+1+K"]
PROMPT = "T1-weighted brain MRI with an enhancing tumour"


@pytest.fixture
def source():
    """A 16 x 16 grey image, a mask on the border of latent cells, and a label map."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 16), dtype=np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 6:14] = 255
    label_map = np.zeros((16, 16), np.uint8)
    label_map[6:10, 8:10] = 3
    return image, mask, label_map


def generate(pipeline, source, *, seed=0, prompt=PROMPT, **kwargs):
    image, mask, label_map = source
    if pipeline.has_label_channels:
        kwargs = {"label_map": label_map} | kwargs
    kwargs = {"image": image, "mask_image": mask, "num_inference_steps": 2, "output_type": "pt"} | kwargs
    return pipeline(prompt, generator=torch.Generator().manual_seed(seed), **kwargs).images


# ---------------------------------------------------------------------------------------------- the pixels outside


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("image_channels", [1, 3])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_pixels_outside_the_mask_are_the_source_bit_for_bit(tiny_pipeline, layout, image_channels, dtype, output_type):
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (16, 16, image_channels), dtype=np.uint8)
    image = image if dtype == "uint8" else (rng.random(image.shape)).astype(dtype)
    mask = rng.random((16, 16)) < 0.3
    pipeline = tiny_pipeline(layout=layout, image_channels=image_channels)
    result = generate(pipeline, (image, mask, np.zeros_like(mask, np.uint8)), output_type=output_type)
    result = result[0].permute(1, 2, 0).numpy() if output_type == "pt" else result[0]
    assert result.dtype == image.dtype
    assert np.array_equal(result[~mask], image[~mask])
    assert not np.array_equal(result[mask], image[mask])


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pil_in_gives_equal_pil_out(tiny_pipeline, source, mode):
    image, mask, _ = source
    pipeline = tiny_pipeline(image_channels=1 if mode == "L" else 3)
    picture = PIL.Image.fromarray(image).convert(mode)
    result = generate(pipeline, source, image=picture, mask_image=PIL.Image.fromarray(mask), output_type="pil")[0]
    assert result.mode == mode
    assert np.array_equal(np.array(result)[mask == 0], np.array(picture)[mask == 0])


def test_a_lesion_of_one_pixel_reaches_the_latent_mask(tiny_pipeline, source):
    pipeline = tiny_pipeline(layout="2c+1")
    for y in range(0, 16, 5):
        for x in range(0, 16, 3):
            mask = np.zeros((16, 16), bool)
            mask[y, x] = True
            conditions = pipeline.encode_conditions(PROMPT, source[0], mask)
            assert conditions.mask.sum() == 1 and conditions.mask[0, 0, y // 2, x // 2] == 1


def test_what_the_hole_held_does_not_reach_the_result(tiny_pipeline, source):
    image, mask, _ = source
    other = np.where(mask > 0, 255 - image, image)
    for layout in ("2c+1", "2c+1+K"):
        pipeline = tiny_pipeline(layout=layout)
        for size in ({}, {"height": 8, "width": 8}):
            assert torch.equal(generate(pipeline, source, **size), generate(pipeline, source, image=other, **size))


def test_work_size_leaves_the_result_at_the_size_of_the_source(tiny_pipeline):
    rng = np.random.default_rng(2)
    image, mask = rng.integers(0, 256, (31, 45), dtype=np.uint8), np.zeros((31, 45), np.uint8)
    mask[3:20, 10:30] = 1
    result = generate(tiny_pipeline(layout="2c+1"), (image, mask, None), height=16, width=16, output_type="np")[0]
    assert result.shape == (31, 45, 1)
    assert np.array_equal(result[..., 0][mask == 0], image[mask == 0])


# -------------------------------------------------------------------------------------------- diffusers as oracle


@pytest.mark.parametrize("layout", ["c", "2c+1"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler, DPMSolverMultistepScheduler])
def test_paints_what_stable_diffusion_inpainting_paints(tiny_pipeline, source, layout, guidance_scale, scheduler):
    pipeline = tiny_pipeline(layout=layout, image_channels=3)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, steps_offset=1, skip_prk_steps=True)
    # Theirs samples the condition from the VAE, ours takes the mode: without variance the two agree.
    with torch.no_grad():
        pipeline.vae.quant_conv.weight[4:] = 0
        pipeline.vae.quant_conv.bias[4:] = -30
    theirs = StableDiffusionInpaintPipeline(
        **{k: v for k, v in pipeline.components.items()},
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    image = torch.from_numpy(source[0])[None, None].float().expand(1, 3, -1, -1) / 255
    mask = torch.from_numpy(source[1])[None, None].float() / 255
    arguments = {
        "prompt": PROMPT,
        "image": image,
        "mask_image": mask,
        "num_inference_steps": 3,
        "guidance_scale": guidance_scale,
        "latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)),
        "output_type": "pt",
    }
    expected = theirs(**arguments, height=16, width=16, generator=torch.Generator().manual_seed(6)).images
    result = pipeline(**arguments).images
    inside = mask.bool().expand(1, 3, -1, -1)
    torch.testing.assert_close(result[inside], expected[inside], atol=2e-5, rtol=0)


def test_a_stable_diffusion_inpainting_checkpoint_drops_in(tiny_pipeline, source, tmp_path):
    pipeline = tiny_pipeline(layout="2c+1", image_channels=3)
    theirs = StableDiffusionInpaintPipeline(
        **pipeline.components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    theirs.save_pretrained(tmp_path)
    loaded = OneRewardMaskPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    pipeline.scheduler = loaded.scheduler  # theirs sets `steps_offset` to 1
    assert torch.equal(generate(loaded, source), generate(pipeline, source))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "scheduler", [PNDMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, LCMScheduler]
)
def test_other_schedulers_run(tiny_pipeline, source, layout, scheduler):
    pipeline = tiny_pipeline(layout=layout, prediction_type="epsilon")
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    image = generate(pipeline, source, num_inference_steps=4)
    assert image.shape == (1, 1, 16, 16) and image.dtype == torch.uint8


# ------------------------------------------------------------------------------------- what users of pipelines expect


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_seed_same_image(tiny_pipeline, source, layout):
    pipeline = tiny_pipeline(layout=layout)
    first, again, other = (generate(pipeline, source, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_an_image_in_a_batch_equals_the_image_alone(tiny_pipeline, source, layout, guidance_scale):
    pipeline = tiny_pipeline(layout=layout)
    prompts = [PROMPT, "oedema", ""]
    image = source[0] / np.float32(255)
    kwargs = {"guidance_scale": guidance_scale, "image": image}
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    label_map = {"label_map": source[2]} if pipeline.has_label_channels else {}
    batch = pipeline(
        prompts,
        image,
        source[1],
        **label_map,
        guidance_scale=guidance_scale,
        num_inference_steps=2,
        generator=generators,
        output_type="pt",
    ).images
    for i, prompt in enumerate(prompts):
        alone = generate(pipeline, source, seed=i, prompt=prompt, **kwargs)
        torch.testing.assert_close(batch[i], alone[0], atol=1e-5, rtol=0)


def test_lists_arrays_and_tensors_give_the_same_batch(tiny_pipeline, source):
    pipeline = tiny_pipeline()
    image, mask, label_map = source
    as_array = generate(pipeline, [np.stack([a, a])[..., None] for a in source])
    as_pil = [[PIL.Image.fromarray(a)] * 2 for a in (image, mask, label_map)]
    as_tensor = [torch.from_numpy(np.stack([a, a]))[:, None] for a in source]
    assert as_array.shape == (2, 1, 16, 16)
    assert torch.equal(as_array, generate(pipeline, as_tensor))
    from_pil = generate(pipeline, as_pil)
    assert torch.equal((from_pil * 255).round().to(torch.uint8), as_array)


def test_tensors_in_minus_one_to_one_are_read_as_elsewhere_in_diffusers(tiny_pipeline, source):
    pipeline = tiny_pipeline()
    image = torch.from_numpy(source[0])[None, None].float() / 255
    torch.testing.assert_close(
        generate(pipeline, source, image=image * 2 - 1), generate(pipeline, source, image=image), atol=1e-5, rtol=0
    )


def test_output_types_agree(tiny_pipeline, source):
    pipeline = tiny_pipeline()
    image = source[0] / np.float32(255)
    pt = generate(pipeline, source, image=image, output_type="pt")
    array = generate(pipeline, source, image=image, output_type="np")
    pil = generate(pipeline, source, image=image, output_type="pil")
    latents = generate(pipeline, source, image=image, output_type="latent")
    assert np.array_equal(pt.permute(0, 2, 3, 1).numpy(), array)
    assert np.array_equal(np.array(pil[0]), (array[0, ..., 0] * 255).round().astype(np.uint8))
    conditions = pipeline.encode_conditions(PROMPT, image, source[1], source[2])
    assert torch.equal(pipeline.decode(latents, conditions), pt)


def test_num_images_per_prompt_and_tuple_output(tiny_pipeline, source):
    images = generate(tiny_pipeline(), source, num_images_per_prompt=3, return_dict=True)
    assert images.shape[0] == 3 and not torch.equal(images[0], images[1])
    image, mask, label_map = source
    arguments = {"num_inference_steps": 1, "output_type": "pt", "return_dict": False}
    result = tiny_pipeline()(PROMPT, image, mask, label_map, **arguments)
    assert isinstance(result, tuple) and result[0].shape == (1, 1, 16, 16)


def test_callback_sees_and_changes_the_tensors_it_asks_for(tiny_pipeline, source):
    pipeline = tiny_pipeline()
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, sorted(tensors)))
        pipe._guidance_scale += 1.0
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    latents = generate(
        pipeline,
        source,
        num_inference_steps=3,
        guidance_scale=2.0,
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=pipeline._callback_tensor_inputs,
    )
    assert seen == [(step, sorted(pipeline._callback_tensor_inputs)) for step in range(3)]
    assert latents.abs().sum() == 0
    assert pipeline.guidance_scale == 2.0 + pipeline.num_timesteps == 5.0
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        generate(pipeline, source, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["unet"])


def test_callback_can_interrupt(tiny_pipeline, source):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    generate(tiny_pipeline(), source, num_inference_steps=5, callback_on_step_end=callback)
    assert steps == [0, 1]


def test_guidance_is_the_weighted_difference_of_two_calls(tiny_pipeline, source):
    pipeline = tiny_pipeline()
    conditions = pipeline.encode_conditions(PROMPT, *source, guidance_scale=2.0)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    nothing = dataclasses.replace(
        conditions,
        prompt_embeds=conditions.negative_prompt_embeds,
        label_map=torch.zeros_like(conditions.label_map),
    )
    with torch.no_grad():
        conditional = pipeline.denoise(latents, 500, conditions)
        unconditional = pipeline.denoise(latents, 500, nothing)
        guided = pipeline.denoise(latents, 500, conditions, guidance_scale=3.0)
    torch.testing.assert_close(guided, unconditional + 3.0 * (conditional - unconditional), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="same `guidance_scale`"):
        pipeline.denoise(latents, 500, pipeline.encode_conditions(PROMPT, *source), guidance_scale=3.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_is_close_and_still_exact_outside(tiny_pipeline, source, layout, dtype):
    pipeline = tiny_pipeline(layout=layout)
    image, mask, _ = source
    full = generate(pipeline, source)
    half = generate(pipeline.to(dtype), source)
    assert {m.dtype for m in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {dtype}
    assert np.array_equal(half[0, 0].numpy()[mask == 0], image[mask == 0])
    assert (full.float() - half.float()).abs().mean() < 255 * 0.05


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_and_loaded_it_paints_the_same(tiny_pipeline, source, layout, tmp_path):
    pipeline = tiny_pipeline(layout=layout)
    pipeline.save_pretrained(tmp_path)
    loaded = OneRewardMaskPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(generate(loaded, source), generate(pipeline, source))
    assert dict(loaded.config.labels) == {"background": 0, "NCR": 1, "ED": 2, "ET": 3}


def test_pickles_are_not_read_unless_asked_for(tiny_pipeline, tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    for part in ("unet", "vae"):
        folder = tmp_path / part
        torch.save(getattr(pipeline, part).state_dict(), folder / "diffusion_pytorch_model.bin")
        (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        OneRewardMaskPipeline.from_pretrained(tmp_path)
    OneRewardMaskPipeline.from_pretrained(tmp_path, use_safetensors=None)  # either kind, as in diffusers

    torch.save({"unet.layer.lora_A.weight": torch.ones(1)}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(ValueError, match="no safetensors file"):
        pipeline.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.bin")
    with pytest.raises(OSError):
        pipeline.load_lora_weights(str(tmp_path))


def test_no_path_of_this_machine_is_saved(tiny_pipeline, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "first")
    OneRewardMaskPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for path in (tmp_path / "second").rglob("*.json"):
        assert str(tmp_path) not in path.read_text()


def test_without_text_encoder_it_saves_loads_and_paints(tiny_pipeline, source, tmp_path):
    pipeline = tiny_pipeline()
    embeds = pipeline.encode_prompt(PROMPT)[0]
    pipeline.register_modules(text_encoder=None, tokenizer=None)
    pipeline.save_pretrained(tmp_path)
    loaded = OneRewardMaskPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.text_encoder is None and loaded.tokenizer is None
    with_embeds = generate(loaded, source, prompt=None, prompt_embeds=embeds)
    assert torch.equal(with_embeds, generate(tiny_pipeline(), source))
    assert generate(loaded, source, prompt=None, guidance_scale=2.0).shape == (1, 1, 16, 16)


def test_prompts_are_encoded_apart_from_the_rest(tiny_pipeline, source):
    pipeline = tiny_pipeline()
    text_only = OneRewardMaskPipeline(
        vae=None, unet=None, scheduler=None, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer
    )
    prompt_embeds, negative = text_only.encode_prompt(PROMPT, "cpu", 1, True)
    assert torch.equal(
        generate(pipeline, source, guidance_scale=2.0),
        generate(
            pipeline,
            source,
            prompt=None,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative,
            guidance_scale=2.0,
        ),
    )


def test_attention_slicing_and_vae_tiling_keep_the_image(tiny_pipeline, source):
    pipeline = tiny_pipeline()
    image = source[0] / np.float32(255)
    expected = generate(pipeline, source, image=image)
    pipeline.enable_attention_slicing(1)
    pipeline.vae.enable_slicing()
    torch.testing.assert_close(generate(pipeline, source, image=image), expected, atol=1e-4, rtol=0)
    pipeline.vae.enable_tiling()
    assert generate(pipeline, source, image=image).shape == expected.shape


def test_lora_scale_runs_from_nothing_to_all(tiny_pipeline, source):
    pipeline = tiny_pipeline()
    image = source[0] / np.float32(255)
    base = generate(pipeline, source, image=image)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    with torch.no_grad():
        for name, parameter in pipeline.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    tuned = generate(pipeline, source, image=image)
    off = generate(pipeline, source, image=image, cross_attention_kwargs={"scale": 0.0})
    assert (tuned - base).abs().max() > 1e-3
    torch.testing.assert_close(off, base, atol=1e-5, rtol=0)
    pipeline.fuse_lora()
    torch.testing.assert_close(generate(pipeline, source, image=image), tuned, atol=1e-4, rtol=0)
    pipeline.unfuse_lora()
    pipeline.disable_lora()
    torch.testing.assert_close(generate(pipeline, source, image=image), base, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------- conditions


def test_conditions_are_the_same_each_time_and_slice_like_tensors(tiny_pipeline, source):
    pipeline = tiny_pipeline()
    prompts = [PROMPT, "oedema"]
    first, again = (pipeline.encode_conditions(prompts, *source, guidance_scale=2.0) for _ in range(2))
    group = first.repeat_interleave(2)
    joined = MaskConditions.cat([first[:1], first[1:]])
    for field in dataclasses.fields(MaskConditions):
        value = getattr(first, field.name)
        if value is None:
            continue
        assert torch.equal(value, getattr(again, field.name))
        assert torch.equal(value, getattr(joined, field.name))
        assert torch.equal(value[[0, 0, 1, 1]], getattr(group, field.name))
    assert len(group) == 4 and first.image_latents is None
    half = first.to(dtype=torch.float16)
    assert half.mask.dtype == torch.float16 and half.image.dtype == torch.float32


def test_label_map_becomes_the_share_of_each_latent_cell(tiny_pipeline):
    pipeline = tiny_pipeline()
    mask, label_map = np.zeros((16, 16), np.uint8), np.zeros((16, 16), np.uint8)
    mask[2:6, 2:6] = 1
    label_map[2, 2], label_map[2, 3], label_map[3, 2] = 1, 3, 3
    latent = pipeline.encode_conditions(PROMPT, np.zeros((16, 16), np.uint8), mask, label_map).label_map[0]
    assert latent.shape == (4, 8, 8)
    assert latent[:, 1, 1].tolist() == [0.25, 0.25, 0.0, 0.5]
    assert latent[:, 2, 2].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert latent.sum(0).eq(1).sum() == 4 and latent[:, 0, 0].sum() == 0


def test_order_of_label_names_is_without_meaning(tiny_pipeline, source):
    pipeline = tiny_pipeline()
    expected = generate(pipeline, source)
    pipeline.register_to_config(labels=dict(reversed(pipeline.config.labels.items())))
    assert torch.equal(generate(pipeline, source), expected)


def test_remove_asks_for_background_throughout(tiny_pipeline, source):
    pipeline = tiny_pipeline()
    image, mask, label_map = source
    told = pipeline.encode_conditions(PROMPT, image, mask, task="remove")
    untold = pipeline.encode_conditions(PROMPT, image, mask, task="fill")
    assert torch.equal(told.label_map[:, :1], told.mask) and told.label_map[:, 1:].sum() == 0
    assert untold.label_map.sum() == 0
    with pytest.raises(ValueError, match="must be left out"):
        pipeline.encode_conditions(PROMPT, image, mask, label_map, task="remove")


def test_each_image_may_have_its_own_task(tiny_pipeline, source):
    pipeline = tiny_pipeline()
    image, mask, _ = source
    nothing = np.zeros_like(mask)
    together = pipeline.encode_conditions(None, image, mask, nothing, task=["fill", "remove", "extend"])
    for i, task in enumerate(("fill", "remove", "extend")):
        alone = pipeline.encode_conditions(None, image, mask, nothing, task=task)
        torch.testing.assert_close(together.prompt_embeds[i], alone.prompt_embeds[0])
        assert torch.equal(together.label_map[i], alone.label_map[0])
    # A label map of zeros asks `fill` for nothing in particular, and the others for healthy tissue.
    assert together.label_map.flatten(1).any(1).tolist() == [False, True, True]


def test_no_prompt_means_the_prompt_of_the_task(tiny_pipeline, source):
    pipeline = tiny_pipeline()
    image, mask, _ = source
    without = pipeline.encode_conditions(None, image, mask, task="remove")
    named = pipeline.encode_conditions("healthy tissue, no lesion", image, mask, task="remove")
    assert torch.equal(without.prompt_embeds, named.prompt_embeds)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask_image": np.zeros((16, 16), np.uint8)}, "is empty"),
        ({"mask_image": np.full((16, 16), 100, np.uint8)}, "not binary"),
        ({"mask_image": np.full((16, 16), 0.5)}, "not binary"),
        ({"mask_image": np.ones((8, 16), np.uint8)}, "`mask_image` is 16 x 8 pixels .* but `image` is 16 x 16"),
        ({"label_map": np.ones((16, 8), np.uint8)}, "`label_map` is 8 x 16 pixels"),
        ({"label_map": np.full((16, 16), 7, np.uint8)}, r"unknown labels \[7\]"),
        ({"label_map": np.full((16, 16), 1.5)}, "no integers"),
        ({"label_map": np.ones((16, 16), np.uint8)}, "outside `mask_image`"),
        ({"image": np.full((16, 16), np.nan, np.float32)}, "NaN"),
        ({"image": np.full((16, 16), 40.0, np.float32)}, "values from 40 to 40, but float images must lie"),
        ({"image": np.full((16, 16), -0.1, np.float32)}, r"must lie in \[0, 1\]"),
        ({"image": np.zeros((16, 16), np.int32)}, "uint8 or float"),
        ({"image": np.zeros((16, 16, 2), np.uint8)}, "no image of 1 or 3 channels"),
        ({"image": np.dstack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * 2 + [np.zeros((16, 16), np.uint8)])},
         "`image` is coloured"),
        ({"image": PIL.Image.new("I;16", (16, 16))}, "mode 'I;16'"),
        ({"image": None}, "`image` is a NoneType"),
        ({"image": []}, "empty list"),
        ({"image": [np.zeros((16, 16), np.uint8), np.zeros((8, 8), np.uint8)]}, "differ"),
        ({"image": np.zeros((15, 16), np.uint8), "mask_image": np.ones((15, 16), np.uint8), "label_map": None},
         "multiples of 2"),
        ({"mask_image": PIL.Image.new("RGB", (16, 16), (255, 0, 0))}, "`mask_image` is coloured"),
        ({"prompt": 3}, "`prompt` must be text"),
        ({"prompt": ["a", 3]}, "`prompt` must be text"),
        ({"prompt": ["a", "b", "c"], "image": [np.zeros((16, 16), np.uint8)] * 2}, "different numbers of images"),
        ({"task": "paint"}, "`task` is 'paint'"),
        ({"output_type": "jpg"}, "`output_type` is 'jpg'"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, "`latents` has shape"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_what_is_wanted(tiny_pipeline, source, changes, message):
    pipeline = tiny_pipeline()
    arguments = dict(zip(("image", "mask_image", "label_map"), source, strict=True))
    with pytest.raises(ValueError, match=message):
        pipeline(**{"prompt": PROMPT, "num_inference_steps": 1} | arguments | changes)


def test_label_map_without_label_channels_is_refused(tiny_pipeline, source):
    with pytest.raises(ValueError, match="none for labels"):
        tiny_pipeline(layout="2c+1")(PROMPT, *source, num_inference_steps=1)


def test_denoiser_of_unknown_layout_is_refused(tiny_pipeline):
    components = tiny_pipeline(layout="2c+1").components
    components["vae"] = tiny_pipeline(layout="c").vae
    with pytest.raises(ValueError, match="in_channels` is 13"):
        OneRewardMaskPipeline(**components | {"unet": tiny_pipeline().unet})


def test_list_of_generators_must_fit(tiny_pipeline, source):
    with pytest.raises(ValueError, match="list of 2 generators"):
        tiny_pipeline()(PROMPT, *source, generator=[torch.Generator()] * 2, num_inference_steps=1)
