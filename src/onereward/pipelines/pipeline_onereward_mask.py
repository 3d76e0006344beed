# Copyright 2026 The OneReward authors. Licensed under the Apache License, Version 2.0.
# Research use only, not for clinical use.
"""Mask-guided generation of medical images: `fill`, `remove` and `extend` with one latent diffusion pipeline.

This file is also the `pipeline.py` of every published repository, so that
`DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)` works without the `onereward` package. It therefore
imports nothing but torch, diffusers, transformers, numpy and PIL.
"""

import dataclasses
import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput, StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import logging, scale_lora_layers, unscale_lora_layers
from diffusers.utils.hub_utils import _get_model_file
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModel, CLIPTokenizer


logger = logging.get_logger(__name__)

# What is asked for when `prompt` is left out.
TASK_PROMPTS = {
    "fill": "",
    "remove": "healthy tissue, no lesion",
    "extend": "anatomy continued beyond the field of view",
}

EXAMPLE_DOC_STRING = """
    Examples:

    ```py
    >>> from onereward import OneRewardMaskPipeline, load_phantom

    >>> pipe = OneRewardMaskPipeline.from_pretrained("pipelines/onereward-brats")
    >>> row = load_phantom(1, contrasts=("t1c",), tasks=("fill",), split="test")[0]
    >>> image = pipe(row["prompt"], row["image"], row["mask"], label_map=row["label_map"]).images[0]
    ```
"""


@dataclasses.dataclass
class MaskConditions:
    r"""
    Everything the denoiser is conditioned on, encoded once, for `B` images and `c` latent channels. Pipelines whose
    denoiser reads more add fields in a subclass; every field is `None` or a tensor of `B` rows.

    Args:
        image (`torch.Tensor` of shape `(B, C, H, W)`, float32 or float64):
            The source in [0, 1], pasted back outside the mask.
        pixel_mask (`torch.Tensor` of shape `(B, 1, H, W)`, bool):
            Where the source is repainted.
        mask (`torch.Tensor` of shape `(B, 1, h, w)`):
            The latent mask in {0, 1}: 1 where any pixel of the cell is repainted.
        masked_image_latents (`torch.Tensor` of shape `(B, c, h, w)`, *optional*):
            Latents of the source with its hole. `None` in the layout of `c` channels.
        image_latents (`torch.Tensor` of shape `(B, c, h, w)`, *optional*):
            Latents of the whole source, re-imposed outside the mask. Only in the layout of `c` channels.
        label_map (`torch.Tensor` of shape `(B, K, h, w)`, *optional*):
            Share of each latent cell that each of the `K` labels takes, 0 outside the mask; all 0 where nothing is
            said. Only in the layout of `2c + 1 + K` channels.
        prompt_embeds (`torch.Tensor` of shape `(B, L, D)`):
            Encoded prompts.
        negative_prompt_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*):
            Encoded negative prompts, for guidance.
    """

    image: torch.Tensor
    pixel_mask: torch.Tensor
    mask: torch.Tensor
    masked_image_latents: torch.Tensor | None
    image_latents: torch.Tensor | None
    label_map: torch.Tensor | None
    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None = None

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "MaskConditions":
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return type(self)(**{name: None if v is None else function(v) for name, v in values.items()})

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index) -> "MaskConditions":
        return self._map(lambda tensor: tensor[index])

    def repeat_interleave(self, repeats: int) -> "MaskConditions":
        """Each row `repeats` times, side by side: the members of a group."""
        return self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def to(self, device=None, dtype: torch.dtype | None = None) -> "MaskConditions":
        """Moves all tensors to `device`; only what the denoiser reads takes `dtype`, pixels keep theirs."""
        moved = self._map(lambda tensor: tensor.to(device))
        pixels = {"image": moved.image, "pixel_mask": moved.pixel_mask}
        return dataclasses.replace(moved._map(lambda tensor: tensor.to(dtype=dtype)), **pixels)

    @staticmethod
    def cat(conditions: "list[MaskConditions]") -> "MaskConditions":
        """Joins several batches into one."""
        columns = {}
        for field in dataclasses.fields(conditions[0]):
            values = [getattr(c, field.name) for c in conditions]
            columns[field.name] = None if values[0] is None else torch.cat(values)
        return type(conditions[0])(**columns)


class HubLoading:
    r"""
    What the pipelines of this package have in common on the Hub: weights are read from safetensors alone, and the code
    travels with the weights, so that `DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)` works where the
    package is not installed. Where it is, that copy is never run.

    A class sets `HUB_MODULE`, the name of its file in the repository, and `HUB_SIBLINGS`, those of the files beside it
    that it imports.
    """

    HUB_MODULE: str
    HUB_SIBLINGS: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        As [`~diffusers.DiffusionPipeline.from_pretrained`], but weights are read from safetensors alone; pickles need
        `use_safetensors=False`.

        Raises:
            `OSError`: when there is no such pipeline, or when weights of it are there as pickles only.
        """
        kwargs = {"use_safetensors": True, **kwargs}
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            missing = re.search(r"necessary `safetensors` weights|no file named \S+\.safetensors", str(error))
            if not kwargs["use_safetensors"] or missing is None:
                raise
            raise OSError(
                f"{str(pretrained_model_name_or_path)!r} does not hold all its weights as safetensors, and nothing "
                "else is read: a pickle (.bin, .pt, .ckpt) can run code. Ask its authors for safetensors, or, if you "
                "trust them, load it once with `use_safetensors=False` and write it anew with `save_pretrained`."
            ) from error

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict, adapter_name: str | None = None, **kwargs):
        """
        As in the pipelines of diffusers, but weights are read from safetensors alone; pickles need
        `use_safetensors=False`. `pytorch_lora_weights.safetensors`, the name that diffusers writes, is looked for
        first: so `revision` and `token` count from the start, and the cache will do where there is no network.

        Raises:
            `OSError`: when there is no such adapter, or when it is there as a pickle only.
            `ValueError`: when nothing in the file was made for this pipeline.
        """
        kwargs = {"use_safetensors": True, **kwargs}
        weight_name, name = kwargs.get("weight_name"), pretrained_model_name_or_path_or_dict
        if kwargs["use_safetensors"] and weight_name and not weight_name.endswith(".safetensors"):
            raise ValueError(  # diffusers would unpickle it all the same
                f"`weight_name` is {weight_name!r}, which is no safetensors file. Convert it, or pass "
                "`use_safetensors=False` if you trust whoever made it: a pickle can run code."
            )
        if kwargs["use_safetensors"] and not weight_name and not isinstance(name, dict):
            kwargs["weight_name"] = _lora_file(name, kwargs)
        before = self.get_list_adapters()
        super().load_lora_weights(name, adapter_name, **kwargs)
        if self.get_list_adapters() == before and not kwargs.get("hotswap"):  # diffusers says nothing
            raise ValueError(
                f"Nothing in {'the given weights' if isinstance(name, dict) else repr(str(name))} was made for this "
                f"pipeline ({type(self).__name__}), and no adapter was loaded. If it was written by PEFT, use "
                "`PeftModel.from_pretrained` on the denoiser."
            )

    @classmethod
    def _dict_from_json_file(cls, json_file):
        # The repository names its own copy of this file. Called on the installed class, that copy is never executed.
        config = super()._dict_from_json_file(json_file)
        if isinstance(config.get("_class_name"), (list, tuple)):
            config["_class_name"] = config["_class_name"][1]
        return config

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs):
        # `save_pretrained` calls this last, before it uploads: the place to let the code travel with the weights.
        super().save_config(save_directory)
        path = Path(save_directory) / self.config_name
        index = json.loads(path.read_text())
        index["_class_name"] = [self.HUB_MODULE, type(self).__name__]
        index.pop("_name_or_path", None)
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for config_path in path.parent.glob("*/config.json"):  # diffusers notes where each was loaded from: our disk
            config = json.loads(config_path.read_text())
            if config.pop("_name_or_path", None) is not None:
                config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        source = Path(inspect.getsourcefile(type(self)))
        files = {self.HUB_MODULE: source} | {name: source.with_name(f"{name}.py") for name in self.HUB_SIBLINGS}
        for name, file in files.items():
            target = path.with_name(f"{name}.py")
            if file.resolve() != target.resolve():
                shutil.copyfile(file, target)


def _lora_file(name, kwargs: dict) -> str | None:
    """The name that diffusers gives to LoRA weights, where the folder or repository `name` has such a file."""
    where = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
    try:
        _get_model_file(
            name, weights_name=LORA_WEIGHT_NAME_SAFE, **{key: kwargs[key] for key in where if key in kwargs}
        )
    except OSError:  # it may have another name; diffusers looks for it, or says what is wrong
        return None
    return LORA_WEIGHT_NAME_SAFE


class OneRewardMaskPipeline(
    HubLoading, DiffusionPipeline, StableDiffusionMixin, TextualInversionLoaderMixin, StableDiffusionLoraLoaderMixin
):
    r"""
    Pipeline that repaints the masked part of a medical image as a prompt and a label map ask, and leaves every pixel
    outside the mask exactly as it was. Research use only, not for clinical use.

    The channels of the denoiser decide how it is told about the mask. With `c` latent channels and `K` labels,
    `unet.config.in_channels` is

    - `c`: any latent diffusion model; the noised background is re-imposed after each step,
    - `2c + 1`: the layout of Stable Diffusion inpainting, whose checkpoints drop in,
    - `2c + 1 + K`: the same, followed by the label map.

    `vae.config.in_channels` decides whether images are grey (1) or colour (3).

    Args:
        vae ([`AutoencoderKL`]):
            Model that encodes images into latents and decodes them.
        unet ([`UNet2DConditionModel`]):
            The denoiser.
        scheduler ([`SchedulerMixin`]):
            Any scheduler of diffusers; the trainers need one with `alphas_cumprod`, such as [`DDIMScheduler`].
        text_encoder ([`~transformers.CLIPTextModel`], *optional*):
            Frozen text encoder. Without it the denoiser is not conditioned on text.
        tokenizer ([`~transformers.CLIPTokenizer`], *optional*):
            Tokenizer of `text_encoder`.
        labels (`dict[str, int]`, *optional*):
            Name and value of each label that a label map may hold, the background included, e.g.
            `{"background": 0, "NCR": 1, "ED": 2, "ET": 3}`. Needed by the layout of `2c + 1 + K` channels.
    """

    HUB_MODULE = "pipeline"
    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", "mask", "masked_image_latents"]

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        labels: dict[str, int] | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_to_config(labels=labels)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self._guidance_scale = 1.0
        self._interrupt = False
        if vae is None or unet is None:  # only the text half is wanted, as when prompts are encoded apart
            return
        c, k = vae.config.latent_channels, len(labels or {})
        layouts = {c: "c", 2 * c + 1: "2c + 1"} | ({2 * c + 1 + k: "2c + 1 + K"} if k else {})
        if unet.config.in_channels not in layouts:
            raise ValueError(
                f"`unet.config.in_channels` is {unet.config.in_channels}, but with {c} latent channels and {k} labels "
                f"it must be one of {sorted(layouts)}. Pass the `labels` that the denoiser was trained with."
            )

    # ------------------------------------------------------------------------------------------------- conditions

    @property
    def has_label_channels(self) -> bool:
        """Whether the denoiser reads a label map."""
        return self.unet.config.in_channels > 2 * self.vae.config.latent_channels + 1

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = False,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ):
        r"""
        Encodes prompts into text encoder hidden states.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                One prompt per image. Not needed with `prompt_embeds`.
            device (`torch.device`, *optional*):
                Where the embeddings are wanted. Defaults to the device of the pipeline.
            num_images_per_prompt (`int`, *optional*, defaults to `1`):
                How often each embedding is repeated.
            do_classifier_free_guidance (`bool`, *optional*, defaults to `False`):
                Whether the negative prompt is encoded too.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to steer away from; the empty prompt when left out.
            prompt_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*):
                Embeddings to use in place of `prompt`.
            negative_prompt_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*):
                Embeddings to use in place of `negative_prompt`.
            lora_scale (`float`, *optional*):
                Strength of the LoRA layers of the text encoder.
            clip_skip (`int`, *optional*):
                Number of last layers of the text encoder that are left out.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: prompt and negative prompt embeddings, each of shape
            `(B * num_images_per_prompt, L, D)`.
        """
        device = device or self._execution_device
        prompt = [prompt] if isinstance(prompt, str) else prompt
        if lora_scale is not None and self.text_encoder is not None:
            scale_lora_layers(self.text_encoder, lora_scale)
        if prompt_embeds is None:
            prompt_embeds = self._encode_text(prompt, device, clip_skip)
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negative_prompt = "" if negative_prompt is None else negative_prompt
            if isinstance(negative_prompt, str):
                negative_prompt = [negative_prompt] * len(prompt_embeds)
            negative_prompt_embeds = self._encode_text(negative_prompt, device, clip_skip, prompt_embeds.shape[1])
        if lora_scale is not None and self.text_encoder is not None:
            unscale_lora_layers(self.text_encoder, lora_scale)

        dtype = self.text_encoder.dtype if self.text_encoder is not None else self.unet.dtype
        prompt_embeds = prompt_embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0)
        if not do_classifier_free_guidance:
            negative_prompt_embeds = None
        else:
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds, negative_prompt_embeds

    def _encode_text(self, prompt: list[str], device, clip_skip: int | None, max_length: int | None = None):
        if not all(isinstance(text, str) for text in prompt):
            raise ValueError(f"`prompt` must be text, one string per image, but it holds {prompt!r}.")
        if self.text_encoder is None:
            if any(prompt):
                logger.warning("`prompt` is not used: this pipeline has no text encoder. Leave it out.")
            return torch.zeros(len(prompt), 1, self.unet.config.cross_attention_dim, device=device)
        prompt = self.maybe_convert_prompt(prompt, self.tokenizer)
        max_length = max_length or self.tokenizer.model_max_length
        tokens = self.tokenizer(
            prompt, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt"
        )
        for text in prompt:
            if len(self.tokenizer(text).input_ids) > max_length:
                logger.warning(
                    f"`prompt` is longer than the {max_length} tokens that are read, its end is lost: {text}"
                )
        use_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        outputs = self.text_encoder(
            tokens.input_ids.to(device),
            attention_mask=tokens.attention_mask.to(device) if use_mask else None,
            output_hidden_states=clip_skip is not None,
        )
        if clip_skip is None:
            return outputs[0]
        text_model = getattr(self.text_encoder, "text_model", self.text_encoder)
        return text_model.final_layer_norm(outputs.hidden_states[-(clip_skip + 1)])

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encodes `(B, C, H, W)` pixels in [0, 1] into `(B, c, h, w)` latents: the mode, which repeats itself."""
        encoded = self.vae.encode(pixels.to(self.vae.dtype) * 2 - 1)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_conditions(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput = None,
        mask_image: PipelineImageInput = None,
        label_map: PipelineImageInput | None = None,
        task: str | list[str] = "fill",
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 1.0,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> MaskConditions:
        r"""
        Encodes what [`~OneRewardMaskPipeline.__call__`] is given, see there for the arguments. The result is
        deterministic and may be kept and reused.

        Returns:
            [`MaskConditions`] of `B * num_images_per_prompt` rows.
        """
        device = self._execution_device
        channels = self.vae.config.in_channels
        tasks = [task] if isinstance(task, str) else list(task)
        if set(tasks) - set(TASK_PROMPTS):
            raise ValueError(f"`task` is {task!r}, but it must be one of {list(TASK_PROMPTS)}.")
        source = _pixels(image, channels)
        pixel_mask = _mask(mask_image)
        labels = None if label_map is None else _label_map(label_map, self.config.labels)
        if prompt is None and prompt_embeds is None:
            prompt = [TASK_PROMPTS[t] if self.text_encoder is not None else "" for t in tasks]
        prompt = [prompt] if isinstance(prompt, str) else prompt
        if prompt_embeds is None and not isinstance(prompt, (list, tuple)):
            raise ValueError(f"`prompt` must be text or a list of texts, but it is a {type(prompt).__name__}.")

        # One image with many prompts, or one prompt for many images: what comes once is repeated.
        given = {"prompt": prompt if prompt_embeds is None else prompt_embeds, "image": source}
        given |= {"mask_image": pixel_mask, "label_map": labels, "task": tasks}
        sizes = {name: len(value) for name, value in given.items() if value is not None}
        batch_size = max(sizes.values())
        if set(sizes.values()) - {1, batch_size}:
            raise ValueError(f"the arguments hold different numbers of images: {sizes}. Give one of each, or as many.")
        source, pixel_mask, labels = (
            value if value is None or len(value) == batch_size else value.expand(batch_size, -1, -1, -1)
            for value in (source, pixel_mask, labels)
        )
        if prompt_embeds is None:
            prompt = list(prompt) * (batch_size // len(prompt))
        elif len(prompt_embeds) != batch_size:
            prompt_embeds = prompt_embeds.expand(batch_size, -1, -1)
        for name, value in (("mask_image", pixel_mask), ("label_map", labels)):
            if value is not None and value.shape[-2:] != source.shape[-2:]:
                raise ValueError(
                    f"`{name}` is {_size(value)} pixels (width x height), but `image` is {_size(source)}. "
                    f"Resize it, with nearest neighbours, to the size of the image."
                )
        if labels is not None and (labels.ne(0) & ~pixel_mask).any():
            raise ValueError(
                "`label_map` has labels outside `mask_image`, where nothing is painted. Set it to 0 there, or widen "
                "the mask."
            )
        tasks *= batch_size // len(tasks)
        is_remove = torch.tensor([t == "remove" for t in tasks])
        if labels is not None and labels.flatten(1).any(1)[is_remove].any():
            raise ValueError("`label_map` must be left out, or 0, where the task is 'remove': nothing is put there.")

        height, width = height or source.shape[-2], width or source.shape[-1]
        if height % self.vae_scale_factor or width % self.vae_scale_factor:
            raise ValueError(
                f"`height` and `width` are {height} and {width}, but must be multiples of {self.vae_scale_factor}. "
                f"Pass the size to work at, e.g. height={-(-height // 8) * 8}, width={-(-width // 8) * 8}: the result "
                f"still has the size of `image`."
            )
        source, pixel_mask = source.to(device), pixel_mask.to(device)
        pixels, canvas_mask = source.float(), pixel_mask.float()
        if (height, width) != source.shape[-2:]:
            # Averages and maxima over the same windows: no pixel of the hole can leak into the context.
            pixels = F.adaptive_avg_pool2d(pixels, (height, width))
            canvas_mask = F.adaptive_max_pool2d(canvas_mask, (height, width))
        mask = F.max_pool2d(canvas_mask, self.vae_scale_factor)

        latent_channels = self.vae.config.latent_channels
        masked_image_latents = image_latents = label_latents = None
        if self.unet.config.in_channels == latent_channels:
            image_latents = self.encode_image(pixels)
        else:
            masked_image_latents = self.encode_image(torch.where(canvas_mask > 0.5, 0.5, pixels))  # 0.5: the VAE's 0
        if self.has_label_channels:
            # By value, since the order of names does not survive `model_index.json`.
            values = torch.tensor(sorted(self.config.labels.values()), device=device).view(1, -1, 1, 1)
            says = is_remove
            if labels is not None:
                says = says | labels.flatten(1).any(1) | torch.tensor([t == "extend" for t in tasks])
            labels = torch.zeros_like(pixel_mask, dtype=torch.long) if labels is None else labels.to(device)
            one_hot = (labels == values) & pixel_mask & says.to(device).view(-1, 1, 1, 1)
            label_latents = F.adaptive_avg_pool2d(one_hot.float(), mask.shape[-2:])
        elif labels is not None and labels.any():
            raise ValueError(
                f"`label_map` cannot be used: this denoiser has {self.unet.config.in_channels} input channels, none "
                f"for labels. Leave it out and say what to paint in `prompt`."
            )

        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            device,
            1,
            guidance_scale > 1,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            lora_scale,
            clip_skip,
        )
        conditions = MaskConditions(
            image=source,
            pixel_mask=pixel_mask,
            mask=mask,
            masked_image_latents=masked_image_latents,
            image_latents=image_latents,
            label_map=label_latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        ).to(device, self.unet.dtype)
        return conditions if num_images_per_prompt == 1 else conditions.repeat_interleave(num_images_per_prompt)

    # -------------------------------------------------------------------------------------------------- denoising

    def set_timesteps(
        self, num_inference_steps: int, conditions: MaskConditions, device: torch.device | None = None
    ) -> torch.Tensor:
        """
        Sets the timesteps of the scheduler and returns them, `(T,)`, on `device`, by default that of `conditions`.
        Nothing else is read of `conditions` here; flow matching pipelines shift their timesteps by the image size.
        """
        self.scheduler.set_timesteps(num_inference_steps, device=device or conditions.mask.device)
        return self.scheduler.timesteps

    def prepare_latents(
        self,
        conditions: MaskConditions,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The noise that denoising starts from, `(B, c, h, w)`: `latents` if given, else drawn from `generator`."""
        shape = (len(conditions), self.vae.config.latent_channels, *conditions.mask.shape[-2:])
        if latents is None:
            if isinstance(generator, list) and len(generator) != shape[0]:
                raise ValueError(
                    f"`generator` is a list of {len(generator)} generators, but {shape[0]} images are wanted. "
                    f"Pass one generator, or one for each image."
                )
            return randn_tensor(shape, generator=generator, device=conditions.mask.device, dtype=conditions.mask.dtype)
        if latents.shape != shape:
            raise ValueError(f"`latents` has shape {tuple(latents.shape)}, but {shape} is wanted.")
        return latents.to(conditions.mask.device, conditions.mask.dtype)

    def denoise(
        self,
        latents: torch.Tensor,
        timestep: int | torch.Tensor,
        conditions: MaskConditions,
        *,
        guidance_scale: float = 1.0,
        cross_attention_kwargs: dict[str, Any] | None = None,
        unet: torch.nn.Module | None = None,
    ) -> torch.Tensor:
        r"""
        Calls the denoiser once.

        Args:
            latents (`torch.Tensor` of shape `(B, c, h, w)`):
                Noisy latents.
            timestep (`int` or `torch.Tensor` of shape `()` or `(B,)`):
                Their timestep.
            conditions ([`MaskConditions`]):
                Conditions of `B` rows.
            guidance_scale (`float`, *optional*, defaults to `1.0`):
                Weight of classifier-free guidance (https://huggingface.co/papers/2207.12598), off at 1 and below. The
                unconditional half sees the negative prompt and no label map.
            cross_attention_kwargs (`dict`, *optional*):
                Passed on to the attention processors, e.g. `{"scale": 0.5}` for half of a LoRA.
            unet (`torch.nn.Module`, *optional*):
                Denoiser to call in place of `self.unet`, e.g. the same one wrapped by a trainer.

        Returns:
            `torch.Tensor` of shape `(B, c, h, w)`: noise, velocity or sample, as `scheduler.config.prediction_type`.
        """
        unet = self.unet if unet is None else unet
        guided = guidance_scale > 1
        if guided and conditions.negative_prompt_embeds is None:
            raise ValueError("`conditions` hold no negative prompt: encode them with the same `guidance_scale`.")
        model_input = self.scheduler.scale_model_input(latents, timestep).to(conditions.mask.dtype)
        if conditions.image_latents is None:
            model_input = torch.cat([model_input, conditions.mask, conditions.masked_image_latents], dim=1)
        prompt_embeds = conditions.prompt_embeds
        if guided:
            model_input = torch.cat([model_input, model_input])
            prompt_embeds = torch.cat([conditions.negative_prompt_embeds, prompt_embeds])
            if torch.is_tensor(timestep) and timestep.ndim:
                timestep = torch.cat([timestep, timestep])
        if conditions.label_map is not None:
            label_map = conditions.label_map
            if guided:
                label_map = torch.cat([torch.zeros_like(label_map), label_map])
            model_input = torch.cat([model_input, label_map], dim=1)
        output = unet(
            model_input,
            timestep,
            encoder_hidden_states=prompt_embeds,
            cross_attention_kwargs=cross_attention_kwargs,
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
        timestep: int | torch.Tensor | None,
    ) -> torch.Tensor:
        """
        In the layout of `c` channels, puts the source, noised to `timestep` (`None` = clean) with the one draw `noise`
        of the whole trajectory, back outside the latent mask. Other layouts are returned as they came.
        """
        if conditions.image_latents is None:
            return latents
        background = conditions.image_latents.to(latents.dtype)
        if timestep is not None:
            timesteps = torch.as_tensor(timestep, device=latents.device).reshape(-1)
            background = self.scheduler.add_noise(background, noise.to(latents.dtype), timesteps)
        return torch.where(conditions.mask > 0.5, latents, background)

    def decode(self, latents: torch.Tensor, conditions: MaskConditions) -> torch.Tensor:
        """
        Decodes latents `(B, c, h, w)` into images `(B, C, H, W)` in [0, 1]; outside the pixel mask they are the source
        itself, bit for bit.
        """
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        pixels = (self.vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
        if pixels.shape[-2:] != conditions.image.shape[-2:]:
            pixels = F.interpolate(pixels, conditions.image.shape[-2:], mode="bilinear", align_corners=False)
        return torch.where(conditions.pixel_mask, pixels.to(conditions.image.dtype), conditions.image)

    # --------------------------------------------------------------------------------------------------- generation

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        return self._cross_attention_kwargs

    @property
    def clip_skip(self) -> int | None:
        return self._clip_skip

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput = None,
        mask_image: PipelineImageInput = None,
        label_map: PipelineImageInput | None = None,
        task: str | list[str] = "fill",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ):
        r"""
        Repaints the masked part of one or many images.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to paint. Defaults to a fixed prompt of the task.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of them):
                The source. PIL images in mode "L" or "RGB"; arrays `(H, W)`, `(H, W, C)` or `(B, H, W, C)` and tensors
                `(H, W)`, `(C, H, W)` or `(B, C, H, W)`, either uint8 or float in [0, 1]. A float tensor with negative
                values is read as [-1, 1], as elsewhere in diffusers.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of them):
                The mask, of the size of `image`: 1 or white = repaint, 0 or black = keep, as in diffusers and BraTS
                (MONAI's inpainting tutorials use the opposite). It must be binary and not empty.
            label_map (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of them, *optional*):
                What to put where: at each pixel the value of a label of `config.labels`, 0 outside the mask.
            task (`str` or `list[str]`, *optional*, defaults to `"fill"`):
                `"fill"` paints what the label map says or, if that is 0 throughout, the prompt; `"remove"` paints
                healthy tissue: its label map is background throughout; `"extend"` continues the image beyond its field
                of view. One task for all images, or one for each.
            height (`int`, *optional*):
                Height in pixels at which the denoiser works. Defaults to that of `image`. Set it, with `width`, to the
                size that the model was trained at when images are larger: they are shrunk for the denoiser, and the
                result is enlarged and pasted into the source, whose size it has.
            width (`int`, *optional*):
                Width in pixels at which the denoiser works.
            num_inference_steps (`int`, *optional*, defaults to `50`):
                Number of denoising steps.
            timesteps (`list[int]`, *optional*):
                Own timesteps, in descending order, for schedulers that take them.
            sigmas (`list[float]`, *optional*):
                Own sigmas, for schedulers that take them.
            guidance_scale (`float`, *optional*, defaults to `1.0`):
                Weight of classifier-free guidance; off at 1 and below.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to steer away from, with guidance.
            num_images_per_prompt (`int`, *optional*, defaults to `1`):
                How many images to generate for each source.
            eta (`float`, *optional*, defaults to `0.0`):
                Noise of the DDIM step (https://huggingface.co/papers/2010.02502), from 0 to 1; other schedulers
                ignore it.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the result deterministic.
            latents (`torch.Tensor` of shape `(B, c, h, w)`, *optional*):
                Standard normal noise to start from.
            prompt_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*):
                Embeddings to use in place of `prompt`.
            negative_prompt_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*):
                Embeddings to use in place of `negative_prompt`.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` for `(B, H, W, C)`, `"pt"` for `(B, C, H, W)`, or `"latent"`. Arrays and tensors are
                uint8 if the source was, else float in [0, 1].
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an [`ImagePipelineOutput`] instead of a tuple.
            cross_attention_kwargs (`dict`, *optional*):
                Passed on to the attention processors, e.g. `{"scale": 0.5}` for half of a LoRA.
            clip_skip (`int`, *optional*):
                Number of last layers of the text encoder that are left out.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback_on_step_end(pipeline, step, timestep, callback_kwargs)`; may return
                a dict of tensors to go on with.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                Which of `_callback_tensor_inputs` it gets.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the images. Outside the mask they equal the source bit for bit.

        Raises:
            `ValueError`: if sizes, values or types of the inputs do not fit; the message says what is wanted.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        callback_names = callback_on_step_end_tensor_inputs or ["latents"]
        if set(callback_names) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {self._callback_tensor_inputs}, but found "
                f"{[name for name in callback_names if name not in self._callback_tensor_inputs]}."
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}, but it must be 'pil', 'np', 'pt' or 'latent'.")
        self._guidance_scale = guidance_scale
        self._cross_attention_kwargs = cross_attention_kwargs
        self._clip_skip = clip_skip
        self._interrupt = False

        # 1. Encode what the denoiser is conditioned on
        conditions = self.encode_conditions(
            prompt,
            image,
            mask_image,
            label_map,
            task,
            height,
            width,
            negative_prompt,
            num_images_per_prompt,
            guidance_scale,
            prompt_embeds,
            negative_prompt_embeds,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
            clip_skip=clip_skip,
        )

        # 2. Prepare timesteps and noise
        timesteps, num_inference_steps = retrieve_timesteps(
            self.scheduler, num_inference_steps, conditions.mask.device, timesteps, sigmas
        )
        noise = self.prepare_latents(conditions, generator, latents)
        latents = noise * self.scheduler.init_noise_sigma
        step_arguments = inspect.signature(self.scheduler.step).parameters
        step_kwargs = {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in step_arguments}

        # 3. Denoise
        num_warmup_steps = len(timesteps) - num_inference_steps * self.scheduler.order
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                model_output = self.denoise(
                    latents,
                    t,
                    conditions,
                    guidance_scale=self._guidance_scale,
                    cross_attention_kwargs=cross_attention_kwargs,
                )
                latents = self.scheduler.step(model_output, t, latents, **step_kwargs, return_dict=False)[0]
                next_timestep = timesteps[i + 1] if i + 1 < len(timesteps) else None
                latents = self.reimpose_background(latents, conditions, noise, next_timestep)

                if callback_on_step_end is not None:
                    tensors = {n: latents if n == "latents" else getattr(conditions, n) for n in callback_names}
                    changed = callback_on_step_end(self, i, t, tensors) or {}
                    latents = changed.pop("latents", latents)
                    conditions = dataclasses.replace(conditions, **changed)
                if i == len(timesteps) - 1 or ((i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()

        # 4. Decode, and paste into the source
        images = latents if output_type == "latent" else _output(self.decode(latents, conditions), image, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    __call__.__doc__ += EXAMPLE_DOC_STRING


# ------------------------------------------------------------------------------------------------ pixels in and out


def _batch(value: PipelineImageInput, name: str) -> torch.Tensor:
    """Anything that holds images -> `(B, C, H, W)`, in the type that it came in."""
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError(f"`{name}` is an empty list.")
        batches = [_batch(item, name) for item in value]
        if len({(b.shape[1:], b.dtype) for b in batches}) > 1:
            shapes = sorted({f"{_size(b)} {b.shape[1]}-channel {b.dtype}" for b in batches})
            raise ValueError(f"the images of `{name}` differ ({'; '.join(shapes)}). Give images of one size and type.")
        return torch.cat(batches)
    if isinstance(value, PIL.Image.Image):
        if value.mode not in ("L", "RGB", "1"):
            raise ValueError(
                f"`{name}` is a PIL image in mode {value.mode!r}, but 'L' or 'RGB' is wanted. Convert it yourself, "
                f"e.g. `.convert('L')`, after windowing to 8 bits: converting here could lose grey levels."
            )
        value = np.array(value)
    stacks = name != "image"  # masks and label maps have no channels, so that a third axis can count them
    if isinstance(value, np.ndarray):
        value = value[None] if value.ndim == 2 or (value.ndim == 3 and value.shape[-1] in (1, 3)) else value
        value = value[..., None] if value.ndim == 3 and (stacks or len(value) == 1) else value
        value = torch.from_numpy(np.ascontiguousarray(value))
        value = value.permute(0, 3, 1, 2) if value.ndim == 4 else value
    elif torch.is_tensor(value):
        value = value[None] if value.ndim == 2 or (value.ndim == 3 and not stacks) else value
        value = value[:, None] if value.ndim == 3 else value
    else:
        raise ValueError(f"`{name}` is a {type(value).__name__}, but a PIL image, array, tensor or list is wanted.")
    if value.ndim != 4 or value.shape[1] not in (1, 3):
        raise ValueError(
            f"`{name}` has shape {tuple(value.shape)}, which is no image of 1 or 3 channels. Arrays are (H, W), "
            f"(H, W, C) or (B, H, W, C), tensors are (H, W), (C, H, W) or (B, C, H, W)."
        )
    return value


def _pixels(image: PipelineImageInput, channels: int) -> torch.Tensor:
    """`image` -> `(B, channels, H, W)`, float in [0, 1]; float64 stays, to be given back exactly."""
    pixels = _batch(image, "image")
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255
    elif not pixels.is_floating_point():
        raise ValueError(f"`image` is {pixels.dtype}, but uint8 or float in [0, 1] is wanted. Window it first.")
    elif pixels.dtype != torch.float64:
        pixels = pixels.float()
    low, high = float(pixels.min()), float(pixels.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("`image` holds NaN or infinite values. Replace them before generating.")
    if low < 0 and torch.is_tensor(image if not isinstance(image, (list, tuple)) else image[0]):
        pixels, low, high = pixels / 2 + 0.5, low / 2 + 0.5, high / 2 + 0.5
    if low < 0 or high > 1:
        raise ValueError(
            f"`image` has values from {low:g} to {high:g}, but float images must lie in [0, 1]. Rescale them, e.g. by "
            f"a CT window or robust percentiles."
        )
    if pixels.shape[1] == 1 and channels == 3:
        pixels = pixels.expand(-1, 3, -1, -1)
    return pixels if channels == 3 else _one_channel(pixels, "image")


def _one_channel(batch: torch.Tensor, name: str) -> torch.Tensor:
    """`(B, C, H, W)` -> `(B, 1, H, W)`, refused where the channels differ."""
    if not torch.equal(batch, batch[:, :1].expand_as(batch)):
        raise ValueError(f"`{name}` is coloured, but one channel is wanted. Convert it first, e.g. `.convert('L')`.")
    return batch[:, :1]


def _mask(mask_image: PipelineImageInput) -> torch.Tensor:
    """`mask_image` -> `(B, 1, H, W)`, bool, checked to be binary and not empty."""
    mask = _one_channel(_batch(mask_image, "mask_image"), "mask_image")
    if mask.dtype != torch.bool:
        high = 255 if mask.dtype == torch.uint8 and mask.max() > 1 else 1
        if not ((mask == 0) | (mask == high)).all():
            raise ValueError(
                f"`mask_image` is not binary: it has values from {float(mask.min()):g} to {float(mask.max()):g}, but "
                f"only 0 (keep) and {high} (repaint) are wanted. Threshold it, e.g. `mask > {high / 2:g}`."
            )
        mask = mask == high
    empty = (~mask.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        which = "" if len(mask) == 1 else f" for image {empty[0]}"
        raise ValueError(f"`mask_image` is empty{which}: nothing would be painted. 1 or white marks what to repaint.")
    return mask


def _label_map(label_map: PipelineImageInput, labels: dict[str, int] | None) -> torch.Tensor:
    """`label_map` -> `(B, 1, H, W)`, long, checked to hold known labels only."""
    if not labels:
        raise ValueError("`label_map` cannot be used: the config of this pipeline names no `labels`. Leave it out.")
    values = _one_channel(_batch(label_map, "label_map"), "label_map")
    if values.is_floating_point() and not torch.equal(values, values.round()):
        raise ValueError("`label_map` holds values that are no integers. Give the value of one label at each pixel.")
    unknown = sorted(set(values.unique().tolist()) - set(labels.values()))
    if unknown:
        raise ValueError(f"`label_map` holds the unknown labels {unknown}; this pipeline knows {dict(labels)}.")
    return values.long()


def _output(images: torch.Tensor, source: PipelineImageInput, output_type: str):
    """`(B, C, H, W)` in [0, 1] -> what `output_type` names, in uint8 if the source was a uint8 array or tensor."""
    first = source[0] if isinstance(source, (list, tuple)) else source
    if output_type == "pil" or getattr(first, "dtype", None) in (np.uint8, torch.uint8):
        images = (images * 255).round().to(torch.uint8)
    if output_type == "pt":
        return images
    images = images.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return images
    return [PIL.Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in images]


def _size(batch: torch.Tensor) -> str:
    return f"{batch.shape[-1]} x {batch.shape[-2]}"
