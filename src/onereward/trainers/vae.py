"""Trains the small autoencoder that a pipeline from scratch needs before its denoiser can be trained."""

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments, set_seed

from onereward.data.schema import rows_to_tensors
from onereward.hub.cards import TAGS, render_card, shown_command
from onereward.hub.environment import current_environment, source_commit
from onereward.trainers.hub import HubTrainer


@dataclass
class VAEConfig(TrainingArguments):
    r"""
    Configuration of [`VAETrainer`]. Only what differs from [`~transformers.TrainingArguments`] is listed.

    Args:
        learning_rate (`float`, *optional*, defaults to `1e-3`):
            Peak learning rate of AdamW.
        per_device_train_batch_size (`int`, *optional*, defaults to `32`):
            Rows per step and device; each gives its image and its target.
        kl_weight (`float`, *optional*, defaults to `1e-4`):
            Weight of the Kullback-Leibler term, which keeps the latents close to a standard normal.
        gradient_weight (`float`, *optional*, defaults to `0.5`):
            Weight of the error of the image's horizontal and vertical differences, which keeps edges sharp.
    """

    output_dir: str | None = field(default="vae", metadata={"help": "Where the VAE and its checkpoints are written."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows per step and device."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "The collator reads the columns."})
    kl_weight: float = field(default=1e-4, metadata={"help": "Weight of the Kullback-Leibler term."})
    gradient_weight: float = field(default=0.5, metadata={"help": "Weight of the error of image differences."})

    def __post_init__(self):
        super().__post_init__()
        if self.data_seed is None:  # else rows are shuffled by the seed of the noise, which is each process's own
            self.data_seed = self.seed


def kl_to_standard_normal(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    r"""
    KL(N(mean, exp(logvar)) || N(0, 1)) = (mean² + exp(logvar) - 1 - logvar) / 2, averaged over all elements
    (https://huggingface.co/papers/1312.6114, appendix B).
    """
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()


def gradient_error(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the horizontal and vertical differences of `(B, C, H, W)` images."""
    across = F.l1_loss(images.diff(dim=-1), targets.diff(dim=-1))
    return across + F.l1_loss(images.diff(dim=-2), targets.diff(dim=-2))


class OwnNoise(TrainerCallback):
    """
    Seeds each process by its number when the training begins. The Trainer seeds all alike, so that they make the same
    weights; with the same noise, timesteps and dropouts too, several processes would see less variety than one with
    all their rows. The first goes on as it was, and draws what a single process draws.

    Rows are shuffled by `data_seed`, which must be set: where it is `None` the seed of the noise would decide, and
    processes would not share the rows out. A checkpoint holds the random state of each process.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if args.process_index > 0:
            set_seed(args.seed + args.process_index)


class _Reconstruction(torch.nn.Module):
    """One forward for encoder and decoder: what is called on a wrapped model is what processes synchronise."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pixels: torch.Tensor):
        posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.sample() if self.training else posterior.mode()
        return self.vae.decode(latents).sample, posterior


class VAETrainer(HubTrainer):
    r"""
    Trains an [`~diffusers.AutoencoderKL`] on the images and targets of row-schema data, then sets its scaling factor
    so that latents have unit variance (https://huggingface.co/papers/2112.10752, section G).

    Args:
        vae ([`~diffusers.AutoencoderKL`]):
            The autoencoder, trained in place.
        args ([`VAEConfig`], *optional*):
            Configuration of the training.
        train_dataset (`datasets.Dataset`):
            Rows in the schema of `onereward.data`.
        eval_dataset (`datasets.Dataset`, *optional*):
            Rows to measure the loss on.
        callbacks (`list[TrainerCallback]`, *optional*):
            Further callbacks.

    Example:

    ```python
    >>> from onereward import LABELS, VAEConfig, VAETrainer, load_phantom, small_pipeline

    >>> dataset = load_phantom(8, tasks=("fill",))
    >>> pipeline = small_pipeline(dataset["prompt"], LABELS)
    >>> VAETrainer(pipeline.vae, VAEConfig(max_steps=2), dataset).train()
    ```
    """

    kind = "vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        args: VAEConfig | None = None,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        args = args or VAEConfig()
        self.vae = vae
        super().__init__(
            model=_Reconstruction(vae),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=self.collate,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = False
        self.add_callback(OwnNoise())

    @staticmethod
    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        """Images and, where there are any, targets of the rows, in [-1, 1]."""
        batch = rows_to_tensors(rows)
        images = [batch["images"]] + ([] if batch["targets"] is None else [batch["targets"]])
        return {"pixel_values": torch.cat(images) * 2 - 1}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pixels = inputs["pixel_values"]
        images, posterior = model(pixels)
        loss = F.l1_loss(images, pixels) + self.args.gradient_weight * gradient_error(images, pixels)
        loss = loss + self.args.kl_weight * kl_to_standard_normal(posterior.mean, posterior.logvar)
        return (loss, images) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        self.set_scaling_factor()
        return output

    @torch.no_grad()
    def set_scaling_factor(self, num_rows: int = 256) -> None:
        """Sets shift and scaling factor from the latents of `num_rows` training rows: zero mean, unit variance."""
        vae = self.vae.eval()
        num_rows = min(num_rows, len(self.train_dataset))
        latents = []
        for start in range(0, num_rows, 32):
            rows = [self.train_dataset[i] for i in range(start, min(start + 32, num_rows))]
            latents.append(vae.encode(self.collate(rows)["pixel_values"].to(vae.device)).latent_dist.mode())
        latents = torch.cat(latents)
        vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())

    def loaded_from(self) -> list[tuple[str, str, str | None]]:
        name = self.vae.config.get("_name_or_path")
        return [("base_model", name, None)] if name else []

    def model_card(self, model_name: str | None = None, dataset_name: str | None = None, **fields) -> ModelCard:
        fields = {
            "limits": ["It rebuilds what its training data had; on images unlike those it can be wrong."],
            "synthetic": "What it rebuilds is not the image that it saw: do not show it as an acquired one.",
            "command": shlex.join(sys.argv),
            "seed": self.args.seed,
            "commit": source_commit(),
            "environment": current_environment(),
            **fields,
        }
        fields["command"] = shown_command(fields["command"])
        text = CARD.format(
            metadata=ModelCardData(library_name="diffusers", tags=["vae", *TAGS], license="apache-2.0").to_yaml(),
            name=model_name or Path(self.args.output_dir).name,
            repo_id=self.hub_model_id or self.args.output_dir,
            updates=self.state.global_step,
            rows=len(self.train_dataset),
            dataset=dataset_name or self.dataset_name or "an unnamed data set",
            **{name: render_card(name, **fields).text.strip() for name in ("intended_use", "provenance")},
        )
        return ModelCard(text)

    def _save(self, output_dir: str | None = None, state_dict=None):
        if self.args.should_save:
            self.vae.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        weights = load_file(os.path.join(resume_from_checkpoint, "diffusion_pytorch_model.safetensors"))
        self.vae.load_state_dict(weights)


CARD = """---
{metadata}
---

# {name}

**Research use only, not for clinical use.**

The autoencoder of a pipeline for mask-guided medical image generation.

## How to use

```python
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("{repo_id}")
```

{intended_use}

## Training

{updates} updates on the images and targets of {rows} rows of {dataset}.

{provenance}
"""
