"""Supervised training of the denoiser: from scratch, fully fine-tuned, or through a LoRA adapter."""

import os
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers.training_utils import compute_snr
from huggingface_hub import ModelCard
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from onereward.data.masks import random_mask
from onereward.data.schema import rows_to_tensors
from onereward.hub.adapters import PEFT_WEIGHTS, save_adapter
from onereward.hub.cards import adapter_card, pipeline_card
from onereward.hub.environment import source_commit
from onereward.pipelines.pipeline_onereward_mask import TASK_PROMPTS, MaskConditions, OneRewardMaskPipeline
from onereward.trainers.ema import WeightAverage
from onereward.trainers.hub import HubTrainer, loaded_revision
from onereward.trainers.vae import OwnNoise


@dataclass
class SFTConfig(TrainingArguments):
    r"""
    Configuration of [`SFTTrainer`]. Only what differs from [`~transformers.TrainingArguments`] is listed.

    Args:
        learning_rate (`float`, *optional*, defaults to `1e-4`):
            Peak learning rate of AdamW. From scratch, `1e-3` suits a model of a few million parameters.
        per_device_train_batch_size (`int`, *optional*, defaults to `32`):
            Rows per step and device.
        train_text_encoder (`bool`, *optional*, defaults to `False`):
            Whether the text encoder is trained too, as is needed from scratch.
        random_mask_prob (`float`, *optional*, defaults to `0.3`):
            Share of rows whose mask becomes a random shape (`remove`) or its union with one (`fill`). Rows of
            `extend` keep their own.
        label_dropout (`float`, *optional*, defaults to `0.1`):
            Share of rows that lose their label map, so that prompts alone work too.
        prompt_dropout (`float`, *optional*, defaults to `0.1`):
            Share of rows that lose their prompt, so that label maps alone work too.
        condition_dropout (`float`, *optional*, defaults to `0.1`):
            Share of rows that lose both, which classifier-free guidance needs
            (https://huggingface.co/papers/2207.12598).
        task_prompt_prob (`float`, *optional*, defaults to `0.1`):
            Share of rows whose prompt becomes the fixed prompt of their task, which the pipeline uses when it is
            given none.
        mask_loss_weight (`float`, *optional*, defaults to `4.0`):
            Weight of the loss inside the mask, relative to 1 outside, where the image is known.
        snr_gamma (`float`, *optional*):
            Cap on the signal-to-noise ratio that weights a timestep (min-SNR,
            https://huggingface.co/papers/2303.09556; 5 is usual). No weighting when left out.
        ema_decay (`float`, *optional*):
            Decay of the moving average of the weights, which is what is evaluated and saved; it warms up as
            `(1 + step) / (10 + step)`. No averaging when left out.
        hub_base_model (`str`, *optional*):
            Id on the Hub of the pipeline that was loaded from a folder here: an adapter that is published must say
            which one it is for.
    """

    output_dir: str | None = field(default="sft", metadata={"help": "Where the result and checkpoints are written."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows per step and device."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "The collator reads the columns."})
    train_text_encoder: bool = field(default=False, metadata={"help": "Whether the text encoder is trained too."})
    random_mask_prob: float = field(default=0.3, metadata={"help": "Share of rows that get a random mask."})
    label_dropout: float = field(default=0.1, metadata={"help": "Share of rows that lose their label map."})
    prompt_dropout: float = field(default=0.1, metadata={"help": "Share of rows that lose their prompt."})
    condition_dropout: float = field(default=0.1, metadata={"help": "Share of rows that lose both."})
    task_prompt_prob: float = field(default=0.1, metadata={"help": "Share of rows with the fixed prompt of a task."})
    mask_loss_weight: float = field(default=4.0, metadata={"help": "Weight of the loss inside the mask."})
    snr_gamma: float | None = field(default=None, metadata={"help": "Cap of min-SNR weighting, e.g. 5."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of the average of the weights."})
    hub_base_model: str | None = field(
        default=None, metadata={"help": "Id on the Hub of the pipeline, where it was loaded from a folder here."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.data_seed is None:  # else rows are shuffled by the seed of the noise, which is each process's own
            self.data_seed = self.seed
        for name in ("random_mask_prob", "label_dropout", "prompt_dropout", "condition_dropout", "task_prompt_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but a share from 0 to 1 is wanted.")


def min_snr_weight(snr: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    r"""
    Loss weight of min-SNR-γ (https://huggingface.co/papers/2303.09556, equation 8 and appendix A): `min(SNR, γ)` for
    the error of the sample, divided by `SNR` for that of the noise and by `SNR + 1` for that of the velocity.
    """
    capped = snr.clamp(max=gamma)
    return {"sample": capped, "epsilon": capped / snr, "v_prediction": capped / (snr + 1)}[prediction_type]


def weighted_error(prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each row, `(B, c, h, w)` -> `(B,)`, with `weight` of shape `(B, 1, h, w)`."""
    weight = weight.expand_as(prediction)
    return (weight * (prediction - target) ** 2).flatten(1).sum(1) / weight.flatten(1).sum(1)


class _Denoiser(torch.nn.Module):
    """One forward for text encoder and denoiser: what is called on a wrapped model is what processes synchronise."""

    def __init__(self, pipeline: OneRewardMaskPipeline, train_text_encoder: bool):
        super().__init__()
        self.pipeline = pipeline
        self.unet = pipeline.unet
        self.text_encoder = pipeline.text_encoder if train_text_encoder else None

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: MaskConditions, prompts: list[str]):
        if self.text_encoder is not None:
            conditions = replace(conditions, prompt_embeds=self.pipeline.encode_prompt(prompts)[0])
        return self.pipeline.denoise(latents, timesteps, conditions)

    def activation_checkpointing_enable(self, **kwargs):
        self.unet.enable_gradient_checkpointing()  # the name that diffusers has for it


class SFTTrainer(HubTrainer):
    r"""
    Trains the denoiser of a [`OneRewardMaskPipeline`] to fill masks as the targets of row-schema data show. With
    `peft_config` a LoRA adapter is trained and saved in the formats of diffusers and PEFT; without, the denoiser (and,
    if asked for, the text encoder) is trained and the whole pipeline is saved.

    Args:
        pipeline ([`OneRewardMaskPipeline`]):
            The pipeline, without an adapter; its VAE stays frozen. Any inpainting checkpoint of diffusers may be
            loaded into one.
        args ([`SFTConfig`], *optional*):
            Configuration of the training.
        train_dataset (`datasets.Dataset`):
            Rows in the schema of `onereward.data`, each with a target.
        eval_dataset (`datasets.Dataset`, *optional*):
            Rows to measure the loss on, with the same masks, noise and timesteps each time.
        peft_config ([`~peft.LoraConfig`], *optional*):
            Adapter to train in place of the denoiser.
        callbacks (`list[TrainerCallback]`, *optional*):
            Further callbacks.

    Raises:
        `ValueError`: when the denoiser has an adapter already, or `peft_config` comes with `train_text_encoder`.

    Example:

    ```python
    >>> from onereward import LABELS, SFTConfig, SFTTrainer, load_phantom, small_pipeline

    >>> dataset = load_phantom(8)
    >>> pipeline = small_pipeline(dataset["prompt"], LABELS)
    >>> SFTTrainer(pipeline, SFTConfig(max_steps=2, train_text_encoder=True), dataset).train()
    ```
    """

    def __init__(
        self,
        pipeline: OneRewardMaskPipeline,
        args: SFTConfig | None = None,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        args = args or SFTConfig()
        if peft_config is not None and args.train_text_encoder:
            raise ValueError("`train_text_encoder` cannot go with `peft_config`: only the denoiser gets an adapter.")
        loaded = list(getattr(pipeline.unet, "peft_config", None) or {})
        if loaded:  # a new one would switch it off, and with it the weights cannot be saved as a pipeline's
            raise ValueError(
                f"The denoiser has the adapters {loaded} already. Make them part of the weights first, with "
                "`pipeline.fuse_lora()` and `pipeline.unload_lora_weights()`, or remove them with "
                "`pipeline.delete_adapters(name)`."
            )
        self.pipeline = pipeline
        self.peft_config = peft_config
        for module in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
            if module is not None:
                module.requires_grad_(False)
        if peft_config is None:
            pipeline.unet.requires_grad_(True)
            if args.train_text_encoder:
                pipeline.text_encoder.requires_grad_(True)
        else:
            pipeline.unet.add_adapter(peft_config)
        for module in (pipeline.unet, pipeline.text_encoder):
            for parameter in () if module is None else module.parameters():
                if parameter.requires_grad:  # in full precision: half of it is too coarse for an optimizer's steps
                    parameter.data = parameter.data.float()
        super().__init__(
            model=_Denoiser(pipeline, args.train_text_encoder),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=rows_to_tensors,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = False
        for module in (pipeline.vae, pipeline.text_encoder):
            if module is not None:
                module.to(self.args.device)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.ema = WeightAverage(self.trainable, args.ema_decay)
        self.add_callback(self.ema)
        self.add_callback(OwnNoise())

    # ------------------------------------------------------------------------------------------------------- batches

    def vary(self, batch: dict) -> dict:
        """
        Varies the masks and prompts of a batch as the configuration says, and adds `keep_label_map`, `(B,)`, 0 for
        rows that lose their label map. Here rather than in the collator, which runs ahead of the training and would
        not repeat itself after a resume.
        """
        args, rng = self.args, np.random.default_rng(torch.randint(2**62, ()).item())
        masks, prompts, keep_label_map = (
            batch["masks"].clone(),
            list(batch["prompts"]),
            torch.ones(len(batch["masks"])),
        )
        for i, task in enumerate(batch["tasks"]):
            if task != "extend" and rng.random() < args.random_mask_prob:
                shape = torch.from_numpy(random_mask(rng, masks.shape[-2:])).to(masks)
                masks[i, 0] = shape if task == "remove" else torch.maximum(masks[i, 0], shape)
            if rng.random() < args.task_prompt_prob:
                prompts[i] = TASK_PROMPTS[task]
            lose_both = rng.random() < args.condition_dropout
            if lose_both or rng.random() < args.prompt_dropout:
                prompts[i] = ""
            if lose_both or rng.random() < args.label_dropout:
                keep_label_map[i] = 0
        return {**batch, "masks": masks, "prompts": prompts, "keep_label_map": keep_label_map}

    def encode(self, inputs: dict) -> tuple[torch.Tensor, MaskConditions]:
        """Latents of the targets, `(B, c, h, w)`, and the conditions that go with them."""
        if inputs["targets"] is None:
            raise ValueError("the data has rows without a target. Keep those that have one, e.g. with `.filter()`.")
        pipeline = self.pipeline
        has_labels = pipeline.has_label_channels
        conditions = pipeline.encode_conditions(
            inputs["prompts"],
            inputs["targets"],
            inputs["masks"],
            inputs["label_maps"] * inputs["masks"].long() if has_labels else None,
            task=inputs["tasks"],
        )
        if has_labels:
            keep = inputs["keep_label_map"].to(conditions.label_map)
            conditions = replace(conditions, label_map=conditions.label_map * keep.view(-1, 1, 1, 1))
        with torch.no_grad():
            latents = pipeline.encode_image(inputs["targets"])
        return latents, conditions

    # ---------------------------------------------------------------------------------------------------------- loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scheduler = self.pipeline.scheduler
        inputs = self.vary(inputs)
        latents, conditions = self.encode(inputs)
        noise = torch.randn_like(latents)
        # One timestep in each of B equal parts of the schedule: as random as B free draws, with less variance.
        part = (torch.arange(len(latents), device=latents.device) + torch.rand(())) / len(latents)
        timesteps = (part * scheduler.config.num_train_timesteps).long()
        timesteps = timesteps.clamp(max=scheduler.config.num_train_timesteps - 1)

        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        prediction = model(noisy_latents, timesteps, conditions, inputs["prompts"]).float()
        prediction_type = scheduler.config.prediction_type
        if prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, noise, timesteps)
        else:
            target = {"epsilon": noise, "sample": latents}[prediction_type]

        weight = 1 + (self.args.mask_loss_weight - 1) * conditions.mask.float()
        loss = weighted_error(prediction, target.float(), weight)
        if self.args.snr_gamma is not None:
            loss = loss * min_snr_weight(compute_snr(scheduler, timesteps), self.args.snr_gamma, prediction_type)
        loss = loss.mean()
        return (loss, prediction) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(self.args.seed)
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def evaluate(self, *args, **kwargs):
        with torch.random.fork_rng(), self.ema.applied():
            torch.manual_seed(self.args.seed)
            return super().evaluate(*args, **kwargs)

    # --------------------------------------------------------------------------------------------- saving and resuming

    def _save(self, output_dir: str | None = None, state_dict=None):
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):  # to go on from
            self.ema.save_weights_behind(folder)
        with self.ema.applied():
            if self.peft_config is None:
                self.pipeline.save_pretrained(folder)
            else:
                save_adapter(self.pipeline, folder, base_model=self._base_model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        pipeline = self.pipeline
        if self.peft_config is None:
            weights = "diffusion_pytorch_model.safetensors"
            pipeline.unet.load_state_dict(load_file(os.path.join(resume_from_checkpoint, "unet", weights)))
            if self.args.train_text_encoder:
                path = os.path.join(resume_from_checkpoint, "text_encoder", "model.safetensors")
                pipeline.text_encoder.load_state_dict(load_file(path), strict=False)
        else:
            weights = load_file(os.path.join(resume_from_checkpoint, PEFT_WEIGHTS))
            weights = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
            set_peft_model_state_dict(pipeline.unet, weights)  # in place: a second adapter would not be trained
        self.ema.load_weights_behind(resume_from_checkpoint)

    # ------------------------------------------------------------------------------------------------ card and origin

    @property
    def kind(self) -> str:
        return "pipeline" if self.peft_config is None else "adapter"

    @property
    def _base_model(self) -> str | None:
        return getattr(self.pipeline.config, "_name_or_path", None)

    def loaded_from(self) -> list[tuple[str, str, str | None]]:
        return [("base_model", self._base_model, loaded_revision(self.pipeline))] if self._base_model else []

    def model_card(self, model_name: str | None = None, dataset_name: str | None = None, **fields) -> ModelCard:
        args = self.args
        losses = [entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry]
        fields = {"pipeline_class": type(self.pipeline).__name__, **fields}
        if self.peft_config is None:
            make_card, figures = pipeline_card, {"value": losses[-1]} if losses else {}
            fields = {"labels": self.pipeline.config.get("labels"), **fields}
        else:
            make_card, figures = adapter_card, {"before": losses[0], "after": losses[-1]} if losses else {}
        return make_card(
            **{
                "name": model_name or Path(args.output_dir).name,
                "base_model": self._base_model,
                "repo_id": self.hub_model_id or args.output_dir,
                "training_data": (
                    f"{self.state.global_step} updates of supervised training on {len(self.train_dataset)} rows of "
                    f"{dataset_name or self.dataset_name or 'an unnamed data set'}."
                ),
                "evaluation": {"loss": figures} if figures else {},
                "eval_dataset": f"{len(self.eval_dataset or [])} unseen rows",
                "command": shlex.join(sys.argv),
                "seed": args.seed,
                "limits": ["It paints what its training data had; on images unlike those it can be wrong."],
                "example_prompt": self.train_dataset[0]["prompt"],
                "commit": source_commit(),
                **fields,
            }
        )
