"""A small pipeline from scratch: the size of the embedded base, for one machine."""

import json
from collections.abc import Iterable

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from onereward.pipelines.pipeline_onereward_mask import TASK_PROMPTS, OneRewardMaskPipeline


def train_tokenizer(prompts: Iterable[str], vocab_size: int = 1000, max_length: int = 64) -> CLIPTokenizer:
    r"""
    Trains a CLIP tokenizer (byte-pair encoding, https://huggingface.co/papers/1508.07909) on the prompts of a data
    set. Every byte is in its vocabulary, so that no text is unknown to it.

    Args:
        prompts (`Iterable[str]`):
            Prompts to learn the merges from.
        vocab_size (`int`, *optional*, defaults to `1000`):
            Size of the vocabulary; at least 514, the bytes and two special tokens.
        max_length (`int`, *optional*, defaults to `64`):
            Number of tokens that a prompt is cut or padded to.

    Returns:
        [`~transformers.CLIPTokenizer`]
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet += [f"{character}</w>" for character in alphabet]
    trained = CLIPTokenizer().train_new_from_iterator(
        [*prompts, *TASK_PROMPTS.values()], vocab_size, show_progress=False
    )
    merges = [tuple(pair) for pair in json.loads(trained.backend_tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *("".join(pair) for pair in merges)][: vocab_size - 2] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    merges = [pair for pair in merges if "".join(pair) in vocab]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def small_pipeline(
    prompts: Iterable[str],
    labels: dict[str, int] | None,
    *,
    image_channels: int = 1,
    image_size: int = 64,
    latent_channels: int = 4,
    vae_channels: tuple[int, ...] = (16, 32),
    unet_channels: tuple[int, ...] = (32, 64, 128),
    text_channels: int = 64,
) -> OneRewardMaskPipeline:
    r"""
    Builds a [`OneRewardMaskPipeline`] of about four million random parameters, in the layout with label channels if
    there are `labels`. Train its VAE with [`VAETrainer`] and its denoiser with [`SFTTrainer`].

    Args:
        prompts (`Iterable[str]`):
            Prompts that the tokenizer is trained on.
        labels (`dict[str, int]`, *optional*):
            Name and value of each label, the background included.
        image_channels (`int`, *optional*, defaults to `1`):
            1 for grey images, 3 for colour.
        image_size (`int`, *optional*, defaults to `64`):
            Height and width of the images in pixels.
        latent_channels (`int`, *optional*, defaults to `4`):
            Channels of the latents.
        vae_channels (`tuple[int, ...]`, *optional*, defaults to `(16, 32)`):
            Widths of the VAE; each one after the first halves the latents' height and width.
        unet_channels (`tuple[int, ...]`, *optional*, defaults to `(32, 64, 128)`):
            Widths of the denoiser. Its last level attends to the prompt.
        text_channels (`int`, *optional*, defaults to `64`):
            Width of the text encoder, of two layers.

    Returns:
        [`OneRewardMaskPipeline`]
    """
    tokenizer = train_tokenizer(prompts)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=text_channels,
            intermediate_size=2 * text_channels,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        in_channels=image_channels,
        out_channels=image_channels,
        latent_channels=latent_channels,
        block_out_channels=vae_channels,
        down_block_types=("DownEncoderBlock2D",) * len(vae_channels),
        up_block_types=("UpDecoderBlock2D",) * len(vae_channels),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=image_size,
    )
    levels = len(unet_channels)
    unet = UNet2DConditionModel(
        sample_size=image_size // 2 ** (len(vae_channels) - 1),
        in_channels=2 * latent_channels + 1 + len(labels or {}),
        out_channels=latent_channels,
        block_out_channels=unet_channels,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        layers_per_block=1,
        cross_attention_dim=text_channels,
        attention_head_dim=16,
        norm_num_groups=16,
        # The pooled prompt scales and shifts every level: what a label looks like depends on the contrast it names.
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.02,
        clip_sample=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
    return OneRewardMaskPipeline(
        vae=vae, unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer, labels=labels
    )
