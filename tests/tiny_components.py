"""The components of a tiny random pipeline, for tests and for the processes that they start."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from onereward.data.schema import LABELS
from onereward.pipelines.small import train_tokenizer


PROMPTS = [
    "T1-weighted brain MRI with an enhancing tumour",
    "healthy tissue, no lesion",
    "oedema in the left hemisphere",
]


def tiny_components(layout: str = "2c+1+K", image_channels: int = 1, prediction_type: str = "v_prediction") -> dict:
    """Random components of `OneRewardMaskPipeline`, the same on each call. Layouts: "c", "2c+1", "2c+1+K"."""
    in_channels = {"c": 4, "2c+1": 9, "2c+1+K": 9 + len(LABELS)}[layout]
    tokenizer = train_tokenizer(PROMPTS, vocab_size=300, max_length=77)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=in_channels,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(
            in_channels=image_channels,
            out_channels=image_channels,
            latent_channels=4,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            sample_size=16,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        set_alpha_to_one=False,
    )
    return {
        "vae": vae.eval(),
        "unet": unet.eval(),
        "scheduler": scheduler,
        "text_encoder": text_encoder.eval(),
        "tokenizer": tokenizer,
        "labels": LABELS,
    }
