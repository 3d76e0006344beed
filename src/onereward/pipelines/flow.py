"""What the flow-matching pipelines have in common: their inputs, and their loop."""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput

from .pipeline_onereward_mask import TASK_PROMPTS, _mask, _output, _pixels, _size


@dataclasses.dataclass
class Inputs:
    """Checked inputs of `B` images: prompts, the source and its mask, and both at the size the denoiser works at."""

    prompt: list[str]
    source: torch.Tensor  # (B, C, H, W) in [0, 1]
    pixel_mask: torch.Tensor  # (B, 1, H, W), bool
    pixels: torch.Tensor  # (B, C, height, width) in [0, 1], float32
    mask: torch.Tensor  # (B, 1, height, width) in {0, 1}, float32


def read_inputs(
    pipeline: DiffusionPipeline,
    prompt: str | list[str] | None,
    image: PipelineImageInput,
    mask_image: PipelineImageInput,
    label_map: None,
    task: str | list[str],
    height: int | None,
    width: int | None,
    multiple: int,
) -> Inputs:
    """Checks and completes what `encode_conditions` is given; `height` and `width` must be multiples of `multiple`."""
    if label_map is not None:
        raise ValueError(
            f"`label_map` cannot be used: the denoiser of {type(pipeline).__name__} has no channels for labels. Leave "
            f"it out and say what to paint in `prompt`."
        )
    if pipeline.text_encoder is None or pipeline.text_encoder_2 is None:
        raise ValueError(
            "`text_encoder` and `text_encoder_2` must both be there to encode `prompt`. Load the pipeline with them."
        )
    tasks = [task] if isinstance(task, str) else list(task)
    if set(tasks) - set(TASK_PROMPTS):
        raise ValueError(f"`task` is {task!r}, but it must be one of {list(TASK_PROMPTS)}.")
    source, pixel_mask = _pixels(image, pipeline.vae.config.in_channels), _mask(mask_image)
    if prompt is None:
        prompt = [TASK_PROMPTS[t] for t in tasks]
    prompt = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompt, (list, tuple)) or not all(isinstance(text, str) for text in prompt):
        raise ValueError(f"`prompt` must be text or a list of texts, one per image, but it is {prompt!r}.")

    # One image with many prompts, or one prompt for many images: what comes once is repeated.
    sizes = {"prompt": len(prompt), "image": len(source), "mask_image": len(pixel_mask), "task": len(tasks)}
    batch_size = max(sizes.values())
    if set(sizes.values()) - {1, batch_size}:
        raise ValueError(f"the arguments hold different numbers of images: {sizes}. Give one of each, or as many.")
    prompt = list(prompt) * (batch_size // len(prompt))
    source, pixel_mask = (value.expand(batch_size, -1, -1, -1) for value in (source, pixel_mask))
    if pixel_mask.shape[-2:] != source.shape[-2:]:
        raise ValueError(
            f"`mask_image` is {_size(pixel_mask)} pixels (width x height), but `image` is {_size(source)}. Resize it, "
            f"with nearest neighbours, to the size of the image."
        )

    height, width = height or source.shape[-2], width or source.shape[-1]
    if height % multiple or width % multiple:
        raise ValueError(
            f"`height` and `width` are {height} and {width}, but must be multiples of {multiple}. Pass the size to "
            f"work at, e.g. height={-(-height // multiple) * multiple}, width={-(-width // multiple) * multiple}: the "
            f"result still has the size of `image`."
        )
    source, pixel_mask = source.to(pipeline._execution_device), pixel_mask.to(pipeline._execution_device)
    pixels, mask = source.float(), pixel_mask.float()
    if (height, width) != source.shape[-2:]:
        # Averages and maxima over the same windows: no pixel of the hole can leak into the context.
        pixels = F.adaptive_avg_pool2d(pixels, (height, width))
        mask = F.adaptive_max_pool2d(mask, (height, width))
    return Inputs(prompt, source, pixel_mask, pixels, mask)


def generate(
    pipeline: DiffusionPipeline,
    inputs: dict,
    num_inference_steps: int,
    generator: torch.Generator | list[torch.Generator] | None,
    latents: torch.Tensor | None,
    output_type: str,
    callback_on_step_end: Callable | None,
    callback_on_step_end_tensor_inputs: list[str] | None,
):
    """What `__call__` does, by the same methods as the trainers: encodes `inputs`, denoises, decodes -> the images."""
    if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
        callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
    callback_names = callback_on_step_end_tensor_inputs or ["latents"]
    if set(callback_names) - set(pipeline._callback_tensor_inputs):
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` has to be in {pipeline._callback_tensor_inputs}, but found "
            f"{[name for name in callback_names if name not in pipeline._callback_tensor_inputs]}."
        )
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"`output_type` is {output_type!r}, but it must be 'pil', 'np', 'pt' or 'latent'.")
    pipeline._guidance_scale = inputs["guidance_scale"]
    pipeline._interrupt = False

    conditions = pipeline.encode_conditions(**inputs)
    timesteps = pipeline.set_timesteps(num_inference_steps, conditions)
    noise = latents = pipeline.prepare_latents(conditions, generator, latents)

    pipeline._num_timesteps = len(timesteps)
    with pipeline.progress_bar(total=len(timesteps)) as progress_bar:
        for i, t in enumerate(timesteps):
            if pipeline.interrupt:
                continue
            velocity = pipeline.denoise(latents, t, conditions, guidance_scale=pipeline.guidance_scale)
            latents = pipeline.scheduler.step(velocity, t, latents, return_dict=False)[0]
            next_timestep = timesteps[i + 1] if i + 1 < len(timesteps) else None
            latents = pipeline.reimpose_background(latents, conditions, noise, next_timestep)

            if callback_on_step_end is not None:
                tensors = {n: latents if n == "latents" else getattr(conditions, n) for n in callback_names}
                changed = callback_on_step_end(pipeline, i, t, tensors) or {}
                latents = changed.pop("latents", latents)
                conditions = dataclasses.replace(conditions, **changed)
            progress_bar.update()

    if output_type == "latent":
        images = latents
    else:
        images = _output(pipeline.decode(latents, conditions), inputs["image"], output_type)
    pipeline.maybe_free_model_hooks()
    return images
