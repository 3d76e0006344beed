# Copyright 2026 The OneReward authors. Licensed under the Apache License, Version 2.0.
# Research use only, not for clinical use.
"""Mask-guided generation of medical images with FLUX.1 Fill, by the contract of `OneRewardMaskPipeline`.

It travels with the weights, with the files beside it that it imports, so that
`DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)` works without the `onereward` package.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxTransformer2DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift, retrieve_timesteps
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from .flow import generate, read_inputs
from .pipeline_onereward_mask import HubLoading, MaskConditions, OneRewardMaskPipeline


EXAMPLE_DOC_STRING = """
    Examples:

    ```py
    >>> import torch
    >>> from onereward import OneRewardFluxFillPipeline, load_phantom

    >>> repo = "black-forest-labs/FLUX.1-Fill-dev"
    >>> pipe = OneRewardFluxFillPipeline.from_pretrained(repo, dtype=torch.bfloat16).to("cuda")
    >>> row = load_phantom(1, contrasts=("t1c",), tasks=("fill",), split="test")[0]
    >>> image = pipe(row["prompt"], row["image"], row["mask"], height=512, width=512).images[0]
    ```
"""


@dataclasses.dataclass(kw_only=True)
class FluxFillConditions(MaskConditions):
    r"""
    [`MaskConditions`] of FLUX.1 Fill, for a VAE that shrinks images by `f`. `image_latents`, `label_map` and
    `negative_prompt_embeds` are `None`.

    Args:
        mask_channels (`torch.Tensor` of shape `(B, f * f, h, w)`):
            The mask in {0, 1} at full resolution: the pixels of each latent cell as channels.
        pooled_prompt_embeds (`torch.Tensor` of shape `(B, P)`):
            Pooled output of the CLIP text encoder.
    """

    mask_channels: torch.Tensor
    pooled_prompt_embeds: torch.Tensor


class OneRewardFluxFillPipeline(HubLoading, FluxFillPipeline):
    r"""
    [`~diffusers.FluxFillPipeline`] that leaves every pixel outside the mask exactly as it was, and that the trainers
    can tune. Research use only, not for clinical use.

    Checkpoints of [`~diffusers.FluxFillPipeline`] load, and adapters trained here load there. The transformer reads
    the latents, those of the source with its hole, and the mask at full resolution. It has no channels for a label
    map: what to paint is said in the prompt.

    Args:
        scheduler ([`~diffusers.FlowMatchEulerDiscreteScheduler`]):
            Scheduler of flow matching.
        vae ([`~diffusers.AutoencoderKL`]):
            Model that encodes images into latents and decodes them, for 1 or 3 image channels.
        text_encoder ([`~transformers.CLIPTextModel`]):
            Encoder whose pooled output sums up the prompt.
        tokenizer ([`~transformers.CLIPTokenizer`]):
            Tokenizer of `text_encoder`.
        text_encoder_2 ([`~transformers.T5EncoderModel`]):
            Encoder whose tokens the transformer attends to.
        tokenizer_2 ([`~transformers.T5TokenizerFast`]):
            Tokenizer of `text_encoder_2`.
        transformer ([`~diffusers.FluxTransformer2DModel`]):
            The denoiser, with `4 * (2c + f * f)` input channels for `c` latent channels and a VAE that shrinks by `f`.
    """

    HUB_MODULE = "pipeline_onereward_flux_fill"
    HUB_SIBLINGS = ("flow", "pipeline_onereward_mask")

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5TokenizerFast,
        transformer: FluxTransformer2DModel,
    ):
        super().__init__(scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, transformer)
        self._guidance_scale = 1.0
        self._joint_attention_kwargs = None
        self._interrupt = False
        if vae is None or transformer is None:  # only the text half is wanted, as when prompts are encoded apart
            return
        wanted = 4 * (2 * vae.config.latent_channels + self.vae_scale_factor**2)
        if transformer.config.in_channels != wanted:
            raise ValueError(
                f"`transformer.config.in_channels` is {transformer.config.in_channels}, but FLUX Fill with this VAE "
                f"reads {wanted}: latents, masked image and mask. Load a Fill checkpoint, such as "
                f"'black-forest-labs/FLUX.1-Fill-dev'."
            )

    # ------------------------------------------------------------------------------------------------- conditions

    @property
    def has_label_channels(self) -> bool:
        """Whether the denoiser reads a label map: no."""
        return False

    encode_image = OneRewardMaskPipeline.encode_image

    @torch.no_grad()
    def encode_conditions(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput = None,
        mask_image: PipelineImageInput = None,
        label_map: None = None,
        task: str | list[str] = "fill",
        height: int | None = None,
        width: int | None = None,
        negative_prompt: None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 1.0,
        max_sequence_length: int = 512,
    ) -> FluxFillConditions:
        r"""
        Encodes what [`~OneRewardFluxFillPipeline.__call__`] is given, see there for the arguments. The result is
        deterministic and may be kept and reused. `label_map` and `negative_prompt` must be left out, and
        `guidance_scale` changes nothing here: it is told to the transformer at each step.

        Returns:
            [`FluxFillConditions`] of `B * num_images_per_prompt` rows.

        Raises:
            `ValueError`: if sizes, values or types of the inputs do not fit; the message says what is wanted.
        """
        if negative_prompt is not None:
            raise ValueError(
                "`negative_prompt` cannot be used: FLUX.1 Fill is distilled to one call a step, without a negative "
                "one. Leave it out and say what to paint in `prompt`."
            )
        inputs = read_inputs(
            self, prompt, image, mask_image, label_map, task, height, width, multiple=2 * self.vae_scale_factor
        )
        prompt_embeds, pooled_prompt_embeds, _ = self.encode_prompt(
            inputs.prompt, max_sequence_length=max_sequence_length
        )
        conditions = FluxFillConditions(
            image=inputs.source,
            pixel_mask=inputs.pixel_mask,
            mask=F.max_pool2d(inputs.mask, self.vae_scale_factor),
            masked_image_latents=self.encode_image(torch.where(inputs.mask > 0.5, 0.5, inputs.pixels)),
            image_latents=None,
            label_map=None,
            prompt_embeds=prompt_embeds,
            mask_channels=F.pixel_unshuffle(inputs.mask, self.vae_scale_factor),
            pooled_prompt_embeds=pooled_prompt_embeds,
        ).to(self._execution_device, self.transformer.dtype)
        return conditions if num_images_per_prompt == 1 else conditions.repeat_interleave(num_images_per_prompt)

    # -------------------------------------------------------------------------------------------------- denoising

    def set_timesteps(
        self, num_inference_steps: int, conditions: MaskConditions, device: torch.device | None = None
    ) -> torch.Tensor:
        r"""
        Sets the timesteps of the scheduler as [`~diffusers.FluxFillPipeline`] does, shifted towards noise for larger
        images.

        Args:
            num_inference_steps (`int`):
                Number of denoising steps `T`.
            conditions ([`MaskConditions`]):
                Conditions of the size of the images.
            device (`torch.device`, *optional*):
                Where the timesteps are wanted. Defaults to the device of `conditions`.

        Returns:
            `torch.Tensor` of shape `(T,)`: timesteps from 1000 towards 0. `scheduler.sigmas`, of shape `(T + 1,)`,
            are the same in [0, 1], and end in 0.
        """
        height, width = conditions.mask.shape[-2:]
        config = self.scheduler.config
        mu = calculate_shift(
            (height // 2) * (width // 2),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        return retrieve_timesteps(self.scheduler, device=device or conditions.mask.device, sigmas=sigmas, mu=mu)[0]

    prepare_latents = OneRewardMaskPipeline.prepare_latents

    def denoise(
        self,
        latents: torch.Tensor,
        timestep: float | torch.Tensor,
        conditions: FluxFillConditions,
        *,
        guidance_scale: float = 1.0,
    ) -> torch.Tensor:
        r"""
        Calls the denoiser once.

        Args:
            latents (`torch.Tensor` of shape `(B, c, h, w)`):
                Noisy latents, not packed.
            timestep (`float` or `torch.Tensor` of shape `()` or `(B,)`):
                Their timestep, from 0 to 1000.
            conditions ([`FluxFillConditions`]):
                Conditions of `B` rows.
            guidance_scale (`float`, *optional*, defaults to `1.0`):
                Guidance that the transformer was distilled with, told to it as a number. Not used by transformers
                without `guidance_embeds`.

        Returns:
            `torch.Tensor` of shape `(B, c, h, w)`: the velocity, noise minus image.
        """
        dtype = conditions.mask.dtype
        model_input = torch.cat([latents.to(dtype), conditions.masked_image_latents, conditions.mask_channels], dim=1)
        batch_size, channels, height, width = model_input.shape
        timestep = torch.as_tensor(timestep, device=model_input.device).reshape(-1).expand(batch_size).to(dtype)
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((batch_size,), guidance_scale, device=model_input.device, dtype=torch.float32)
        output = self.transformer(
            hidden_states=self._pack_latents(model_input, batch_size, channels, height, width),
            timestep=timestep / 1000,
            guidance=guidance,
            pooled_projections=conditions.pooled_prompt_embeds,
            encoder_hidden_states=conditions.prompt_embeds,
            txt_ids=model_input.new_zeros(conditions.prompt_embeds.shape[1], 3),
            img_ids=self._prepare_latent_image_ids(batch_size, height // 2, width // 2, model_input.device, dtype),
            return_dict=False,
        )[0]
        scale = self.vae_scale_factor
        return self._unpack_latents(output, height * scale, width * scale, scale)

    def reimpose_background(
        self,
        latents: torch.Tensor,
        conditions: MaskConditions,
        noise: torch.Tensor,
        timestep: float | torch.Tensor | None,
    ) -> torch.Tensor:
        """Returns `latents` as they came: the transformer reads the background."""
        return latents

    decode = OneRewardMaskPipeline.decode

    # --------------------------------------------------------------------------------------------------- generation

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput = None,
        mask_image: PipelineImageInput = None,
        task: str | list[str] = "fill",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 30.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        max_sequence_length: int = 512,
    ):
        r"""
        Repaints the masked part of one or many images, as [`~diffusers.FluxFillPipeline`] does at its `strength` of 1.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to paint. Defaults to a fixed prompt of the task.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of them):
                The source. PIL images in mode "L" or "RGB"; arrays `(H, W)`, `(H, W, C)` or `(B, H, W, C)` and tensors
                `(H, W)`, `(C, H, W)` or `(B, C, H, W)`, either uint8 or float in [0, 1]. A float tensor with negative
                values is read as [-1, 1], as elsewhere in diffusers.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of them):
                The mask, of the size of `image`: 1 or white = repaint, 0 or black = keep. It must be binary and not
                empty.
            task (`str` or `list[str]`, *optional*, defaults to `"fill"`):
                `"fill"`, `"remove"` or `"extend"`: chooses the prompt where none is given.
            height (`int`, *optional*):
                Height in pixels at which the denoiser works. Defaults to that of `image`, which is shrunk, or
                enlarged, for the denoiser; the result has the size of `image`.
            width (`int`, *optional*):
                Width in pixels at which the denoiser works.
            num_inference_steps (`int`, *optional*, defaults to `50`):
                Number of denoising steps.
            guidance_scale (`float`, *optional*, defaults to `30.0`):
                Guidance that the transformer was distilled with.
            num_images_per_prompt (`int`, *optional*, defaults to `1`):
                How many images to generate for each source.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the result deterministic.
            latents (`torch.Tensor` of shape `(B, c, h, w)`, *optional*):
                Standard normal noise to start from, not packed.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` for `(B, H, W, C)`, `"pt"` for `(B, C, H, W)`, or `"latent"` for `(B, c, h, w)`, not
                packed. Arrays and tensors are uint8 if the source was, else float in [0, 1].
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`FluxPipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback_on_step_end(pipeline, step, timestep, callback_kwargs)`; may return
                a dict of tensors to go on with.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                Which of `_callback_tensor_inputs` it gets.
            max_sequence_length (`int`, *optional*, defaults to `512`):
                Number of tokens that T5 pads or cuts the prompt to. Fewer are faster, for a model tuned so.

        Returns:
            [`FluxPipelineOutput`] or `tuple`: the images. Outside the mask they equal the source bit for bit.

        Raises:
            `ValueError`: if sizes, values or types of the inputs do not fit; the message says what is wanted.
        """
        images = generate(
            self,
            {
                "prompt": prompt,
                "image": image,
                "mask_image": mask_image,
                "task": task,
                "height": height,
                "width": width,
                "num_images_per_prompt": num_images_per_prompt,
                "guidance_scale": guidance_scale,
                "max_sequence_length": max_sequence_length,
            },
            num_inference_steps,
            generator,
            latents,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        return FluxPipelineOutput(images=images) if return_dict else (images,)

    __call__.__doc__ += EXAMPLE_DOC_STRING


# --------------------------------------------------------------------------- what the flow matching pipelines share
