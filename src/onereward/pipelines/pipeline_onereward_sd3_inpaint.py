# Copyright 2026 The OneReward authors. Licensed under the Apache License, Version 2.0.
# Research use only, not for clinical use.
"""Mask-guided generation of medical images with Stable Diffusion 3, by the contract of `OneRewardMaskPipeline`.

It travels with the weights, with the files beside it that it imports, so that
`DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)` works without the `onereward` package.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3InpaintPipeline,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion_3.pipeline_output import StableDiffusion3PipelineOutput
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_inpaint import (
    calculate_shift,
    retrieve_timesteps,
)
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    SiglipImageProcessor,
    SiglipVisionModel,
    T5EncoderModel,
    T5TokenizerFast,
)

from .flow import generate, read_inputs
from .pipeline_onereward_mask import HubLoading, MaskConditions, OneRewardMaskPipeline


EXAMPLE_DOC_STRING = """
    Examples:

    ```py
    >>> import torch
    >>> from onereward import OneRewardSD3InpaintPipeline, load_phantom

    >>> repo = "stabilityai/stable-diffusion-3.5-medium"
    >>> pipe = OneRewardSD3InpaintPipeline.from_pretrained(repo, dtype=torch.bfloat16).to("cuda")
    >>> row = load_phantom(1, contrasts=("t1c",), tasks=("fill",), split="test")[0]
    >>> image = pipe(row["prompt"], row["image"], row["mask"], height=512, width=512).images[0]
    ```
"""


@dataclasses.dataclass(kw_only=True)
class SD3Conditions(MaskConditions):
    r"""
    [`MaskConditions`] of Stable Diffusion 3. `label_map` is `None`.

    Args:
        pooled_prompt_embeds (`torch.Tensor` of shape `(B, P)`):
            Pooled outputs of the two CLIP text encoders.
        negative_pooled_prompt_embeds (`torch.Tensor` of shape `(B, P)`, *optional*):
            The same of the negative prompts, for guidance.
    """

    pooled_prompt_embeds: torch.Tensor
    negative_pooled_prompt_embeds: torch.Tensor | None = None


class OneRewardSD3InpaintPipeline(HubLoading, StableDiffusion3InpaintPipeline):
    r"""
    [`~diffusers.StableDiffusion3InpaintPipeline`] that leaves every pixel outside the mask exactly as it was, and that
    the trainers can tune. Research use only, not for clinical use.

    Checkpoints of Stable Diffusion 3 and 3.5 load, and adapters trained here load in the pipelines of diffusers. With
    `c` latent channels (16 in the published checkpoints), `transformer.config.in_channels` is

    - `c`: any Stable Diffusion 3; the noised background is re-imposed after each step,
    - `2c + 1`: mask and latents of the source with its hole are read too.

    It has no channels for a label map: what to paint is said in the prompt. Images are decoded with the `shift_factor`
    of the VAE, as in the other Stable Diffusion 3 pipelines; the inpainting pipeline of diffusers leaves it out
    (https://github.com/huggingface/diffusers/issues/13611).

    Args:
        transformer ([`~diffusers.SD3Transformer2DModel`]):
            The denoiser.
        scheduler ([`~diffusers.FlowMatchEulerDiscreteScheduler`]):
            Scheduler of flow matching.
        vae ([`~diffusers.AutoencoderKL`]):
            Model that encodes images into latents and decodes them, for 1 or 3 image channels.
        text_encoder ([`~transformers.CLIPTextModelWithProjection`]):
            First CLIP text encoder.
        tokenizer ([`~transformers.CLIPTokenizer`]):
            Tokenizer of `text_encoder`.
        text_encoder_2 ([`~transformers.CLIPTextModelWithProjection`]):
            Second CLIP text encoder.
        tokenizer_2 ([`~transformers.CLIPTokenizer`]):
            Tokenizer of `text_encoder_2`.
        text_encoder_3 ([`~transformers.T5EncoderModel`] or `None`):
            T5 text encoder. With `None` its tokens are zeros, which saves most of the memory.
        tokenizer_3 ([`~transformers.T5TokenizerFast`] or `None`):
            Tokenizer of `text_encoder_3`.
        image_encoder ([`~transformers.SiglipVisionModel`], *optional*):
            Not used; there so that the components of the diffusers pipelines can be passed on.
        feature_extractor ([`~transformers.SiglipImageProcessor`], *optional*):
            Not used either.
    """

    HUB_MODULE = "pipeline_onereward_sd3_inpaint"
    HUB_SIBLINGS = ("flow", "pipeline_onereward_mask")
    _optional_components = [*StableDiffusion3InpaintPipeline._optional_components, "text_encoder_3", "tokenizer_3"]

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer_2: CLIPTokenizer,
        text_encoder_3: T5EncoderModel | None,
        tokenizer_3: T5TokenizerFast | None,
        image_encoder: SiglipVisionModel | None = None,
        feature_extractor: SiglipImageProcessor | None = None,
    ):
        super().__init__(
            transformer,
            scheduler,
            vae,
            text_encoder,
            tokenizer,
            text_encoder_2,
            tokenizer_2,
            text_encoder_3,
            tokenizer_3,
            image_encoder,
            feature_extractor,
        )
        self._guidance_scale = 1.0
        self._clip_skip = None
        self._joint_attention_kwargs = None
        self._interrupt = False
        if vae is None or transformer is None:  # only the text half is wanted, as when prompts are encoded apart
            return
        c = vae.config.latent_channels
        if transformer.config.in_channels not in (c, 2 * c + 1):
            raise ValueError(
                f"`transformer.config.in_channels` is {transformer.config.in_channels}, but with {c} latent channels "
                f"it must be {c} (latents alone) or {2 * c + 1} (latents, mask and masked image). Load the `vae` that "
                f"the transformer was trained with."
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
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 1.0,
        max_sequence_length: int = 256,
    ) -> SD3Conditions:
        r"""
        Encodes what [`~OneRewardSD3InpaintPipeline.__call__`] is given, see there for the arguments. The result is
        deterministic and may be kept and reused. `label_map` must be left out.

        Returns:
            [`SD3Conditions`] of `B * num_images_per_prompt` rows.

        Raises:
            `ValueError`: if sizes, values or types of the inputs do not fit; the message says what is wanted.
        """
        multiple = self.vae_scale_factor * self.patch_size
        inputs = read_inputs(self, prompt, image, mask_image, label_map, task, height, width, multiple)
        mask = F.max_pool2d(inputs.mask, self.vae_scale_factor)
        masked_image_latents = image_latents = None
        if self.transformer.config.in_channels == self.vae.config.latent_channels:
            image_latents = self.encode_image(inputs.pixels)
        else:
            masked_image_latents = self.encode_image(torch.where(inputs.mask > 0.5, 0.5, inputs.pixels))
        prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds = (
            self.encode_prompt(
                inputs.prompt,
                prompt_2=None,
                prompt_3=None,
                do_classifier_free_guidance=guidance_scale > 1,
                negative_prompt=negative_prompt,
                max_sequence_length=max_sequence_length,
            )
        )
        conditions = SD3Conditions(
            image=inputs.source,
            pixel_mask=inputs.pixel_mask,
            mask=mask,
            masked_image_latents=masked_image_latents,
            image_latents=image_latents,
            label_map=None,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
        ).to(self._execution_device, self.transformer.dtype)
        return conditions if num_images_per_prompt == 1 else conditions.repeat_interleave(num_images_per_prompt)

    # -------------------------------------------------------------------------------------------------- denoising

    def set_timesteps(
        self, num_inference_steps: int, conditions: MaskConditions, device: torch.device | None = None
    ) -> torch.Tensor:
        r"""
        Sets the timesteps of the scheduler as [`~diffusers.StableDiffusion3InpaintPipeline`] does, shifted towards
        noise for larger images where the scheduler is configured so.

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
        shift = {}
        config = self.scheduler.config
        if config.get("use_dynamic_shifting"):
            height, width = conditions.mask.shape[-2:]
            shift["mu"] = calculate_shift(
                (height // self.patch_size) * (width // self.patch_size),
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.16),
            )
        device = device or conditions.mask.device
        return retrieve_timesteps(self.scheduler, num_inference_steps, device, **shift)[0]

    prepare_latents = OneRewardMaskPipeline.prepare_latents

    def denoise(
        self,
        latents: torch.Tensor,
        timestep: float | torch.Tensor,
        conditions: SD3Conditions,
        *,
        guidance_scale: float = 1.0,
    ) -> torch.Tensor:
        r"""
        Calls the denoiser once.

        Args:
            latents (`torch.Tensor` of shape `(B, c, h, w)`):
                Noisy latents.
            timestep (`float` or `torch.Tensor` of shape `()` or `(B,)`):
                Their timestep, from 0 to 1000.
            conditions ([`SD3Conditions`]):
                Conditions of `B` rows.
            guidance_scale (`float`, *optional*, defaults to `1.0`):
                Weight of classifier-free guidance (https://huggingface.co/papers/2207.12598), off at 1 and below.

        Returns:
            `torch.Tensor` of shape `(B, c, h, w)`: the velocity, noise minus image.
        """
        guided = guidance_scale > 1
        if guided and conditions.negative_prompt_embeds is None:
            raise ValueError("`conditions` hold no negative prompt: encode them with the same `guidance_scale`.")
        model_input = latents.to(conditions.mask.dtype)
        if conditions.image_latents is None:
            model_input = torch.cat([model_input, conditions.mask, conditions.masked_image_latents], dim=1)
        timestep = torch.as_tensor(timestep, device=model_input.device).reshape(-1).expand(len(model_input))
        prompt_embeds, pooled_prompt_embeds = conditions.prompt_embeds, conditions.pooled_prompt_embeds
        if guided:
            model_input, timestep = torch.cat([model_input, model_input]), torch.cat([timestep, timestep])
            prompt_embeds = torch.cat([conditions.negative_prompt_embeds, prompt_embeds])
            pooled_prompt_embeds = torch.cat([conditions.negative_pooled_prompt_embeds, pooled_prompt_embeds])
        output = self.transformer(
            hidden_states=model_input,
            timestep=timestep,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled_prompt_embeds,
            return_dict=False,
        )[0]
        if guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
        return output

    def reimpose_background(
        self,
        latents: torch.Tensor,
        conditions: MaskConditions,
        noise: torch.Tensor,
        timestep: float | torch.Tensor | None,
    ) -> torch.Tensor:
        r"""
        In the layout of `c` channels, puts the source, noised to `timestep`, back outside the latent mask:
        $(1 - \sigma) x_0 + \sigma \epsilon$. The layout of `2c + 1` channels is returned as it came.

        Args:
            latents (`torch.Tensor` of shape `(B, c, h, w)`):
                Latents after a step.
            conditions ([`MaskConditions`]):
                Conditions of `B` rows.
            noise (`torch.Tensor` of shape `(B, c, h, w)`):
                The one draw of the whole trajectory, that it started from.
            timestep (`float` or `torch.Tensor` of shape `()` or `(B,)`, *optional*):
                The timestep of `latents`, from 0 to 1000. `None` = clean, after the last step.

        Returns:
            `torch.Tensor` of shape `(B, c, h, w)`.
        """
        if conditions.image_latents is None:
            return latents
        background = conditions.image_latents.to(latents.dtype)
        if timestep is not None:
            # The timestep is sigma in other units, so that no table of the scheduler is needed.
            timestep = torch.as_tensor(timestep, device=latents.device, dtype=torch.float32).reshape(-1, 1, 1, 1)
            sigma = timestep / self.scheduler.config.num_train_timesteps
            background = ((1 - sigma) * background + sigma * noise).to(latents.dtype)
        return torch.where(conditions.mask > 0.5, latents, background)

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
        guidance_scale: float = 7.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        max_sequence_length: int = 256,
    ):
        r"""
        Repaints the masked part of one or many images, as [`~diffusers.StableDiffusion3InpaintPipeline`] does at a
        `strength` of 1: from pure noise.

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
            guidance_scale (`float`, *optional*, defaults to `7.0`):
                Weight of classifier-free guidance; off at 1 and below.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to steer away from, with guidance.
            num_images_per_prompt (`int`, *optional*, defaults to `1`):
                How many images to generate for each source.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the result deterministic.
            latents (`torch.Tensor` of shape `(B, c, h, w)`, *optional*):
                Standard normal noise to start from.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` for `(B, H, W, C)`, `"pt"` for `(B, C, H, W)`, or `"latent"`. Arrays and tensors are
                uint8 if the source was, else float in [0, 1].
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`StableDiffusion3PipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback_on_step_end(pipeline, step, timestep, callback_kwargs)`; may return
                a dict of tensors to go on with.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                Which of `_callback_tensor_inputs` it gets.
            max_sequence_length (`int`, *optional*, defaults to `256`):
                Number of tokens that T5 pads or cuts the prompt to.

        Returns:
            [`StableDiffusion3PipelineOutput`] or `tuple`: the images. Outside the mask they equal the source bit for
            bit.

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
                "negative_prompt": negative_prompt,
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
        return StableDiffusion3PipelineOutput(images=images) if return_dict else (images,)

    __call__.__doc__ += EXAMPLE_DOC_STRING
