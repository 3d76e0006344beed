"""Tunes the denoiser of a mask-guided pipeline on rewards, with DDPO in the shape of TRL's `GRPOTrainer`."""

import json
import math
import os
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object
from diffusers import DDIMScheduler
from diffusers.training_utils import cast_training_params
from peft import PeftConfig
from peft.utils import set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModel, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import speed_metrics

from onereward.data.schema import rows_to_tensors
from onereward.data.whole_file import whole_file
from onereward.hub.adapters import PEFT_WEIGHTS, save_adapter
from onereward.hub.cards import adapter_card, save_card, source_commit
from onereward.pipelines import MaskConditions, OneRewardMaskPipeline
from onereward.policy import (
    adapt_beta,
    clipped_surrogate,
    ddim_alphas,
    ddim_step,
    gaussian_kl,
    seeded_generator,
    stochastic_window,
)
from onereward.rewards import OneRewardModel
from onereward.rewards.advantages import as_rewards, compute_advantages, group_std
from onereward.trainers.ema import WeightAverage
from onereward.trainers.sample_grid import sample_grid


# A reward function gets `images`, `masks`, `sources`, `label_maps`, `prompts` and the columns of the data set, and
# returns one number an image, or a dict of head -> numbers.
RewardFunc = str | OneRewardModel | Callable

# What random numbers are for: the first key after the seed.
ORDER, WINDOW, ROLLOUT, EVALUATION = range(4)

STATE_FILE, ROLLOUT_FILE = "ddpo_state.json", "rollout_{}.safetensors"


@dataclass
class DDPOConfig(TrainingArguments):
    r"""
    Configuration of [`DDPOTrainer`].

    Only what is special to DDPO, or has another default than in [`~transformers.TrainingArguments`], is listed.

    A rollout makes `per_device_train_batch_size * steps_per_generation` images on each device: whole groups of
    `num_generations` images of one condition. An update takes `gradient_accumulation_steps` batches of them.

    Args:
        > Parameters that control the rollout

        num_generations (`int`, *optional*, defaults to `8`):
            Images of one condition, the group that advantages are relative to. The images of a rollout on one device
            must be a multiple of it.
        steps_per_generation (`int`, *optional*):
            Batches of `per_device_train_batch_size` images in a rollout. A multiple of `gradient_accumulation_steps`;
            equal to it, one update for each rollout, when not given.
        num_iterations (`int`, *optional*, defaults to `1`):
            How often each rollout is trained on.
        num_inference_steps (`int`, *optional*, defaults to `20`):
            Denoising steps of a rollout and of an evaluation.
        eta (`float`, *optional*, defaults to `1.0`):
            Stochasticity of the DDIM steps inside the window, above 0 and up to 1. Outside they are deterministic.
        window_size (`int`, *optional*, defaults to `4`):
            Consecutive steps that are stochastic and trained. Where they start is drawn for each rollout, in the
            noisier half of the chain.
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            Weight of classifier-free guidance, the same in rollout, training and evaluation. 1 is off, and half the
            cost.
        same_initial_noise (`bool`, *optional*, defaults to `True`):
            Whether the images of a group start from the same noise. They then differ by what the trained steps did
            alone, and the steps before the window are computed once for the group.

        > Parameters that control the rewards

        reward_weights (`list[float]`, *optional*):
            Weight of each reward head, in the order of `reward_funcs` and, within a function that returns several,
            of what it returns. 1 each when not given.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            What a head's rewards are divided by: the standard deviation of each `"group"`, that of the `"batch"`, or
            `"none"`.
        multi_objective_aggregation (`str`, *optional*, defaults to `"normalize_then_sum"`):
            Whether heads are normalised one by one and then summed, or summed first (`"sum_then_normalize"`).
        reward_std_floor (`float`, *optional*, defaults to `1e-4`):
            Added to the standard deviation of a head, in units of the reward, so that a saturated head stays silent.
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            Advantages are clipped to plus and minus this.

        > Parameters that control the training

        learning_rate (`float`, *optional*, defaults to `1e-3`):
            Peak learning rate of AdamW.
        adam_epsilon (`float`, *optional*, defaults to `1e-12`):
            Epsilon of AdamW. Log-probabilities are means over thousands of elements and their gradients small, often
            below the usual `1e-8`, which would then shrink every update.
        per_device_train_batch_size (`int`, *optional*, defaults to `16`):
            Images that go through the denoiser at once, in the rollout as in training: the same batches, of the same
            step, so that the ratio of an untouched policy is exactly 1.
        epsilon (`float`, *optional*, defaults to `1e-4`):
            Clip range of the ratio of log-probabilities, which are means over the masked elements.
        epsilon_high (`float`, *optional*):
            Upper clip range. Equal to `epsilon` when not given.
        beta (`float`, *optional*, defaults to `0.0`):
            Weight of the KL divergence from the denoiser without adapter, in nats per masked element. At 0 that
            denoiser is not run.
        kl_target (`float`, *optional*):
            Divergence that `beta` is adapted to hold, by factors of 2 after each update. Needs `beta` above 0 to start
            from.
        ema_decay (`float`, *optional*):
            Decay of an exponential moving average of the adapter over updates. When given, it is the average that is
            evaluated and saved.

        > Parameters that control logging

        logging_steps (`float`, *optional*, defaults to `1`):
            Updates between two logs.
        log_samples_steps (`int`, *optional*):
            Updates between two pictures of samples in `output_dir/samples`, which also go to TensorBoard and trackio
            when `report_to` names them. None are made when not given.
    """

    output_dir: str | None = field(default="ddpo", metadata={"help": "Where adapter and checkpoints are written."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    adam_epsilon: float = field(default=1e-12, metadata={"help": "Epsilon of AdamW."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Images per denoiser call and device."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Images per denoiser call in evaluation."})
    logging_steps: float = field(default=1, metadata={"help": "Updates between two logs."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Reward functions get all columns."})

    num_generations: int = field(default=8, metadata={"help": "Images of one condition, a group."})
    steps_per_generation: int | None = field(default=None, metadata={"help": "Batches of images in a rollout."})
    num_iterations: int = field(default=1, metadata={"help": "How often each rollout is trained on."})
    num_inference_steps: int = field(default=20, metadata={"help": "Denoising steps of a rollout."})
    eta: float = field(default=1.0, metadata={"help": "Stochasticity of the steps inside the window."})
    window_size: int = field(default=4, metadata={"help": "Consecutive steps that are stochastic and trained."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Weight of classifier-free guidance; 1 is off."})
    same_initial_noise: bool = field(default=True, metadata={"help": "Whether a group starts from one noise."})

    reward_weights: list[float] | None = field(default=None, metadata={"help": "Weight of each reward head."})
    scale_rewards: str = field(default="group", metadata={"help": "Scale rewards by 'group', 'batch' or 'none'."})
    multi_objective_aggregation: str = field(
        default="normalize_then_sum", metadata={"help": "'normalize_then_sum' or 'sum_then_normalize'."}
    )
    reward_std_floor: float = field(default=1e-4, metadata={"help": "Added to the standard deviation of a head."})
    advantage_clip: float = field(default=5.0, metadata={"help": "Advantages are clipped to plus and minus this."})

    epsilon: float = field(default=1e-4, metadata={"help": "Clip range of the policy ratio."})
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip range; as epsilon by default."})
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL divergence from the reference."})
    kl_target: float | None = field(default=None, metadata={"help": "Divergence that beta is adapted to hold."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of a moving average of the adapter."})

    log_samples_steps: int | None = field(default=None, metadata={"help": "Updates between pictures of samples."})

    def __post_init__(self):
        super().__post_init__()
        if self.ddp_find_unused_parameters is None:  # every adapter weight takes part in every call
            self.ddp_find_unused_parameters = False
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"`steps_per_generation` is {self.steps_per_generation}; expected a multiple of "
                f"`gradient_accumulation_steps` ({self.gradient_accumulation_steps}), so that updates do not mix "
                "rollouts."
            )
        if self.num_generations < 2:
            raise ValueError(
                f"`num_generations` is {self.num_generations}; expected at least 2: advantages compare its members."
            )
        if self.images_per_rollout % self.num_generations:
            raise ValueError(
                f"A rollout has {self.images_per_rollout} images on each device (`per_device_train_batch_size` "
                f"{self.per_device_train_batch_size} times `steps_per_generation` {self.steps_per_generation}); "
                f"expected a multiple of `num_generations` ({self.num_generations})."
            )
        if not 0 < self.eta <= 1:
            raise ValueError(f"`eta` is {self.eta}; expected above 0 and up to 1: without noise nothing is learned.")
        if self.kl_target is not None and self.beta <= 0:
            raise ValueError(f"`kl_target` is {self.kl_target} but `beta` is {self.beta}; set `beta` to start from.")
        stochastic_window(self.num_inference_steps, self.window_size, seeded_generator(0))  # checks that it fits

    @property
    def images_per_rollout(self) -> int:
        """Images that each device makes in a rollout."""
        return self.per_device_train_batch_size * self.steps_per_generation

    @property
    def groups_per_rollout(self) -> int:
        """Groups that each device makes in a rollout."""
        return self.images_per_rollout // self.num_generations


@dataclass
class Rollout:
    """
    What the training passes need of a rollout, on one device. Members of a group lie side by side.

    Args:
        index (`int`):
            Number of the rollout since the start of the training.
        rows (`list[int]`):
            Row of the data set behind each group.
        conditions ([`MaskConditions`]):
            Conditions of each group.
        window (`range`):
            The stochastic steps.
        latents (`torch.Tensor`):
            Latents before each step of the window and after the last, float32 of shape `(N, window + 1, c, h, w)`.
        log_probs (`torch.Tensor`):
            Log-probability of each step of the window, of shape `(N, window)`.
        advantages (`torch.Tensor`):
            Advantage of each image, of shape `(N,)`.
    """

    index: int
    rows: list[int]
    conditions: MaskConditions
    window: range
    latents: torch.Tensor
    log_probs: torch.Tensor
    advantages: torch.Tensor


class Stopwatch:
    """Adds up the time spent inside `with stopwatch:`; on a GPU by events, so that the host need not wait."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.spans = []

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self):
        self.spans.append([self._now()])

    def __exit__(self, *exception):
        self.spans[-1].append(self._now())

    def read(self) -> float:
        """Seconds since the last reading."""
        if self.cuda:
            torch.cuda.synchronize()
        spans, self.spans = self.spans, []
        return sum(start.elapsed_time(end) / 1000 if self.cuda else end - start for start, end in spans)


class _Policy(torch.nn.Module):
    """The denoiser as the Trainer sees it: one forward, which is what processes synchronise."""

    def __init__(self, pipeline: OneRewardMaskPipeline, guidance_scale: float):
        super().__init__()
        self.pipeline = pipeline
        self.unet = pipeline.unet
        self.guidance_scale = guidance_scale

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, conditions: MaskConditions) -> torch.Tensor:
        return self.pipeline.denoise(latents, timestep, conditions, guidance_scale=self.guidance_scale)

    def activation_checkpointing_enable(self, **kwargs):
        self.unet.enable_gradient_checkpointing()  # the name that the denoisers of diffusers have for it


class DDPOTrainer(Trainer):
    r"""
    Trainer for [DDPO](https://huggingface.co/papers/2305.13301): reinforcement learning of a diffusion model on any
    reward, for mask-guided pipelines. Research use only, not for clinical use.

    Each rollout generates groups of images, one group for a condition (source, mask, label map, prompt), scores them,
    and turns the scores of each reward head into advantages within the group, as
    [GRPO](https://huggingface.co/papers/2402.03300) does. A window of the denoising steps is stochastic, as in
    [MixGRPO](https://huggingface.co/papers/2507.21802); the policy gradient makes those of its draws likelier that led
    to better images. Rollout and training compute the log-probabilities with the same function, on the same batches,
    from trajectories kept in float32.

    Args:
        pipeline ([`OneRewardMaskPipeline`]):
            Pipeline to tune. Its denoiser gets the adapter; VAE and text encoder stay frozen. A scheduler other than
            [`~diffusers.DDIMScheduler`] is replaced by one with the same noise schedule.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`):
            What to tune for, the higher the better. Each is

            - a [`OneRewardModel`], whose criteria become the reward heads,
            - a `str`: folder or model id of one,
            - a function with keyword arguments `images` (B, C, H, W) and `sources` (B, C, H, W), floats in [0, 1],
              `masks` (B, 1, H, W), 1 = repainted, `label_maps` (B, 1, H, W), integers, `prompts`, a list of B strings,
              and every other column of the data set as a list of B values, e.g. `task`, `modality`, `case_id` and
              `target`. It returns B numbers, or a dict of head -> B numbers. `None` or NaN says that it cannot score
              an image, which then learns nothing from that head.
        args ([`DDPOConfig`], *optional*):
            Configuration of the training.
        train_dataset (`datasets.Dataset`):
            Conditions in the row schema of `onereward.data`, at least as many as a rollout has groups.
        eval_dataset (`datasets.Dataset`, *optional*):
            Conditions to evaluate on: one image each, deterministic steps, fixed seeds.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter to add to the denoiser, a `LoraConfig` say. May be left out when the denoiser has one, which
            is then trained on.
        callbacks (`list[TrainerCallback]`, *optional*):
            Further callbacks.

    Raises:
        `ValueError`: when there is no adapter, the data set is too small, two heads share a name, or the scheduler
        cannot be turned into a policy.

    Example:

    ```python
    >>> from peft import LoraConfig
    >>> from onereward import DDPOConfig, DDPOTrainer, OneRewardMaskPipeline, load_phantom

    >>> def brightness(images, masks, **columns):
    ...     return (images * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3))

    >>> trainer = DDPOTrainer(
    ...     OneRewardMaskPipeline.from_pretrained("pipelines/onereward-brats"),
    ...     brightness,
    ...     DDPOConfig(max_steps=20, gradient_accumulation_steps=4),
    ...     load_phantom(64, tasks=("fill",)),
    ...     peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    ... )
    >>> trainer.train()
    ```
    """

    loss_is_scaled_for_ga = True

    _tag_names = ["onereward", "ddpo"]
    _name = "DDPO"
    _paper = {
        "title": "Training Diffusion Models with Reinforcement Learning",
        "id": "2305.13301",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{black2024training,
                title        = {{Training Diffusion Models with Reinforcement Learning}},
                author       = {Kevin Black and Michael Janner and Yilun Du and Ilya Kostrikov and Sergey Levine},
                year         = 2024,
                booktitle    = {The Twelfth International Conference on Learning Representations},
            }"""),
    }

    def __init__(
        self,
        pipeline: OneRewardMaskPipeline,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: DDPOConfig | None = None,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        args = args or DDPOConfig()
        self.pipeline = pipeline

        # Policy: the denoiser with its adapter
        for module in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
            if module is not None:
                module.requires_grad_(False).eval()
        if peft_config is not None:
            pipeline.unet.add_adapter(peft_config)
        elif getattr(pipeline.unet, "peft_config", None):
            pipeline.unet.enable_adapters()
        else:
            raise ValueError(
                "`peft_config` is missing and the denoiser has no adapter; pass one, e.g. "
                "`LoraConfig(r=8, lora_alpha=16, target_modules=['to_q', 'to_k', 'to_v', 'to_out.0'])`."
            )
        cast_training_params(pipeline.unet, dtype=torch.float32)
        pipeline.unet.to(memory_format=torch.channels_last)  # convolutions are faster in this layout
        self.policy_parameters = [p for p in pipeline.unet.parameters() if p.requires_grad]

        # Chain: timesteps and alphas of the policy
        if not isinstance(pipeline.scheduler, DDIMScheduler):
            pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        if pipeline.scheduler.config.thresholding:
            raise ValueError("The scheduler has `thresholding`, under which a step is no Gaussian; switch it off.")

        # Rewards
        self.reward_funcs = []
        for func in reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]:
            func = AutoModel.from_pretrained(func) if isinstance(func, str) else func
            if isinstance(func, OneRewardModel):
                func.requires_grad_(False).eval().to(args.device)
            self.reward_funcs.append(func)
        self.reward_names = None  # the heads, known once the functions have been called

        # Data
        groups = args.groups_per_rollout * args.world_size
        if train_dataset is not None and len(train_dataset) < groups:
            raise ValueError(
                f"`train_dataset` has {len(train_dataset)} rows, but a rollout has {groups} groups and each wants a "
                "condition of its own. Bring more rows, or lower `per_device_train_batch_size`, "
                "`steps_per_generation`, or raise `num_generations`."
            )

        # State that a checkpoint holds besides the Trainer's own
        self.beta = args.beta
        self.start = None  # reward and standard deviation within groups of the first evaluation
        self._rollout = None
        self._update_kl = []
        self._metrics = defaultdict(list)  # what the next log averages
        self._on_policy_checked = False

        super().__init__(
            model=_Policy(pipeline, args.guidance_scale),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=list,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = False
        self.ema = WeightAverage(self.policy_parameters, args.ema_decay)
        self.add_callback(self.ema)
        for module in (pipeline.vae, pipeline.text_encoder):
            if module is not None:
                module.to(args.device)
        pipeline.scheduler.set_timesteps(args.num_inference_steps, device=args.device)
        self.timesteps = pipeline.scheduler.timesteps
        self.alphas, self.next_alphas = ddim_alphas(
            pipeline.scheduler.alphas_cumprod, self.timesteps, pipeline.scheduler.final_alpha_cumprod
        )
        self._denoiser_watch = Stopwatch(args.device)
        self._logged_at, self._num_images = None, 0  # since when, and how many images, the next log reports

    # ---------------------------------------------------------------------------------------------------------- data

    def get_train_dataloader(self) -> DataLoader:
        """
        Counts the images of an epoch. Which rows they belong to follows from the number of the rollout, see
        [`~DDPOTrainer.rollout_rows`], so that a resumed run needs nothing of the loader's state.
        """
        images = self._rollouts_per_epoch * self.args.images_per_rollout * self.args.world_size
        dataset = range(images * self.args.num_iterations)
        return self.accelerator.prepare(DataLoader(dataset, batch_size=self._train_batch_size, collate_fn=list))

    @property
    def _rollouts_per_epoch(self) -> int:
        return len(self.train_dataset) // (self.args.groups_per_rollout * self.args.world_size)

    def rollout_rows(self, index: int) -> list[int]:
        """
        Rows of the training data that rollout number `index` takes on this process. Each epoch is a new permutation.
        """
        epoch, position = divmod(index, self._rollouts_per_epoch)
        order = torch.randperm(len(self.train_dataset), generator=seeded_generator(self.args.seed, ORDER, epoch))
        first = (position * self.args.world_size + self.args.process_index) * self.args.groups_per_rollout
        return order[first : first + self.args.groups_per_rollout].tolist()

    def _encode(self, dataset: datasets.Dataset, rows: list[int]) -> tuple[MaskConditions, dict[str, list]]:
        """Conditions of some rows, and the columns that reward functions get."""
        rows = [dataset[row] for row in rows]
        batch = rows_to_tensors(rows)
        conditions = self.pipeline.encode_conditions(
            batch["prompts"],
            batch["images"],
            batch["masks"],
            batch["label_maps"] if self.pipeline.has_label_channels else None,
            task=batch["tasks"],
            guidance_scale=self.args.guidance_scale,
        )
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("image", "mask", "label_map")}
        columns["label_maps"] = batch["label_maps"]
        return conditions, columns

    # ------------------------------------------------------------------------------------------------------- rollout

    def _transition(self, step: int, model_output, latents, conditions, **kwargs):
        config = self.pipeline.scheduler.config
        return ddim_step(
            model_output,
            latents,
            self.alphas[step],
            self.next_alphas[step],
            prediction_type=config.prediction_type,
            mask=conditions.mask,
            clip_sample_range=config.clip_sample_range if config.clip_sample else None,
            **kwargs,
        )

    def _run(self, steps: range, latents, conditions, initial_noise, window: range = range(0), window_noise=None):
        """
        Take some steps of the chain, those in `window` with `window_noise` of shape `(len(window), B, c, h, w)`. Gives
        the latents after them, those before each step of the window and after its last, and the log-probabilities.
        """
        trajectory, log_probs = [], []
        for step in steps:
            with self._denoiser_watch:
                model_output = self.model(latents, self.timesteps[step], conditions)
            if step in window:
                trajectory.append(latents)
                draw = {"eta": self.args.eta, "noise": window_noise[step - window.start]}
            else:
                draw = {"eta": 0.0}
            transition = self._transition(step, model_output, latents, conditions, **draw)
            following = self.timesteps[step + 1] if step + 1 < len(self.timesteps) else None
            latents = self.pipeline.reimpose_background(transition.next_sample, conditions, initial_noise, following)
            if step in window:
                log_probs.append(transition.log_prob)
                if step == window[-1]:
                    trajectory.append(latents)
        return latents, trajectory, log_probs

    @torch.no_grad()
    def generate(
        self,
        conditions: MaskConditions,
        keys: list[tuple[int, ...]],
        num_generations: int = 1,
        window: range = range(0),
        batch_size: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Generate images with the current policy.

        Args:
            conditions ([`MaskConditions`]):
                One condition for each group.
            keys (`list[tuple[int, ...]]`):
                For each group the keys of its random numbers, see [`~onereward.policy.seeded_generator`].
            num_generations (`int`, *optional*, defaults to `1`):
                Images of each group.
            window (`range`, *optional*):
                The stochastic steps. None by default.
            batch_size (`int`, *optional*):
                Images per call of the denoiser. All at once when not given.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]`: images of shape `(N, C, H, W)`, floats in
            [0, 1]; latents of the window, float32 of shape `(N, len(window) + 1, c, h, w)`; log-probabilities of shape
            `(N, len(window))`. Members of a group lie side by side. The last two are `None` without a window.
        """
        self.model.eval()
        device, scale = conditions.mask.device, self.pipeline.scheduler.init_noise_sigma
        groups, count = len(conditions), num_generations
        shape = (self.pipeline.vae.config.latent_channels, *conditions.mask.shape[-2:])
        batch_size = batch_size or groups * count

        def draw(generators, *shape):
            return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)

        # What the members of a group have in common: their noise, and the deterministic steps up to the window
        start = window.start if self.args.same_initial_noise else 0
        if self.args.same_initial_noise:
            shared_noise = draw([seeded_generator(*key, 0) for key in keys], *shape)
            parts = torch.arange(groups).split(batch_size)
            shared_latents = torch.cat(
                [self._run(range(start), scale * shared_noise[i], conditions[i], shared_noise[i])[0] for i in parts]
            )

        images, trajectories, log_probs = [], [], []
        for part in torch.arange(groups * count).split(batch_size):
            group = part // count
            generators = [seeded_generator(*keys[i // count], 1 + i % count) for i in part.tolist()]
            if self.args.same_initial_noise:
                noise, latents = shared_noise[group], shared_latents[group]
            else:
                noise = draw(generators, *shape)
                latents = scale * noise
            window_noise = draw(generators, len(window), *shape).transpose(0, 1)
            steps, part_conditions = range(start, len(self.timesteps)), conditions[group]
            latents, *of_window = self._run(steps, latents, part_conditions, noise, window, window_noise)
            images.append(self.pipeline.decode(latents, part_conditions).float())
            if window:
                trajectories.append(torch.stack(of_window[0], dim=1))
                log_probs.append(torch.stack(of_window[1], dim=1))
        if not window:
            return torch.cat(images), None, None
        return torch.cat(images), torch.cat(trajectories), torch.cat(log_probs)

    def _score(self, images: torch.Tensor, conditions: MaskConditions, columns: dict, num_generations: int):
        """Rewards of all heads, float32 of shape `(N, heads)`, NaN where an image could not be scored."""

        def of_group(values):
            if torch.is_tensor(values):
                return values.repeat_interleave(num_generations, dim=0)
            return [value for value in values for _ in range(num_generations)]

        columns = {name: of_group(values) for name, values in columns.items()}
        arguments = {
            "images": images,
            "masks": of_group(conditions.pixel_mask.float()),
            "sources": of_group(conditions.image.float()),
            "label_maps": columns.pop("label_maps").to(images.device),
            "prompts": columns.pop("prompt"),
        }
        heads = []
        for func in self.reward_funcs:
            if isinstance(func, OneRewardModel):
                rewards = func.score(**arguments, tasks=columns["task"])
            else:
                rewards = func(**arguments, **columns)
            if not isinstance(rewards, dict):
                rewards = {getattr(func, "__name__", type(func).__name__): rewards}
            heads += rewards.items()
        names = [name for name, _ in heads]
        if self.reward_names is None:
            self.reward_names = names
            weights = self.args.reward_weights
            if len(set(names)) < len(names):
                raise ValueError(f"The reward heads are {names}; expected different names. Rename a reward function.")
            if weights is not None and len(weights) != len(names):
                raise ValueError(f"`reward_weights` is {weights}; expected one weight for each of the heads {names}.")
        elif names != self.reward_names:
            raise ValueError(f"The reward functions returned the heads {names}, after {self.reward_names} before.")
        return torch.stack([as_rewards(values, name, len(images)).to(images.device) for name, values in heads], dim=1)

    def _weighted_sum(self, rewards: torch.Tensor) -> torch.Tensor:
        """The reward of each image, of shape `(N,)`: the weighted sum of its heads; NaN where no head could score."""
        weights = torch.tensor(self.args.reward_weights or [1.0] * rewards.shape[1], device=rewards.device)
        return torch.where(rewards.isnan().all(dim=1), math.nan, (rewards * weights).nansum(dim=1))

    def _make_rollout(self, index: int) -> Rollout:
        """Generate and score the groups of one rollout."""
        args = self.args
        window = stochastic_window(
            args.num_inference_steps, args.window_size, seeded_generator(args.seed, WINDOW, index)
        )
        rows = self.rollout_rows(index)
        conditions, columns = self._encode(self.train_dataset, rows)
        # Keyed by the group's number among those of all processes: how many there are does not matter.
        first = args.process_index * args.groups_per_rollout
        keys = [(args.seed, ROLLOUT, index, first + group) for group in range(len(rows))]
        images, latents, log_probs = self.generate(
            conditions, keys, args.num_generations, window, args.per_device_train_batch_size
        )
        local_rewards = self._score(images, conditions, columns, args.num_generations)
        rewards = self.accelerator.gather(local_rewards)
        advantages = compute_advantages(
            rewards,
            args.num_generations,
            args.reward_weights,
            args.scale_rewards,
            args.multi_objective_aggregation,
            args.reward_std_floor,
            args.advantage_clip,
        )
        advantages = advantages[args.process_index * len(images) :][: len(images)]

        self._num_images += len(rewards)
        self._record_rewards(rewards, args.num_generations)
        every = args.log_samples_steps
        if every and self.is_world_process_zero() and self.state.global_step % every < self._updates_per_rollout:
            self._log_samples(images, conditions, columns, self._weighted_sum(local_rewards))
        return Rollout(index, rows, conditions, window, latents, log_probs, advantages)

    # ------------------------------------------------------------------------------------------------------ training

    @property
    def _updates_per_rollout(self) -> int:
        args = self.args
        return args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        args = self.args
        if self._logged_at is None:
            self._logged_at = time.perf_counter()
        # Where we are follows from the number of updates and from which batch of an update this is.
        batch = inputs[0] // (self._train_batch_size * args.world_size) % args.gradient_accumulation_steps
        step = self.state.global_step * args.gradient_accumulation_steps + batch
        index, step = divmod(step, args.steps_per_generation * args.num_iterations)
        if self._rollout is None or self._rollout.index != index:
            self._rollout = self._make_rollout(index)
        rollout = self._rollout
        part = torch.arange(args.images_per_rollout).split(self._train_batch_size)[step % args.steps_per_generation]
        conditions = rollout.conditions[part // args.num_generations]

        model.train()
        total = torch.zeros((), device=args.device)
        ratios = []
        sync_gradients = self.accelerator.sync_gradients
        for i, denoising_step in enumerate(rollout.window):
            is_last = i == len(rollout.window) - 1
            transitions = {
                "step": denoising_step,
                "latents": rollout.latents[part, i],
                "next_latents": rollout.latents[part, i + 1],
                "old_log_probs": rollout.log_probs[part, i],
                "advantages": rollout.advantages[part],
                "conditions": conditions,
            }
            # Processes exchange gradients once an update, after the last backward pass.
            self.accelerator.gradient_state._set_sync_gradients(sync_gradients and is_last)
            with nullcontext() if is_last else self.accelerator.no_sync(model), self._denoiser_watch:
                loss, ratio = self.compute_loss(model, transitions, return_outputs=True)
                loss = loss / (len(rollout.window) * self.current_gradient_accumulation_steps)
                self.accelerator.backward(loss)
            total += loss.detach()
            ratios.append(ratio)

        self._record_ratios(torch.cat(ratios))
        if not self._on_policy_checked and step < args.gradient_accumulation_steps:
            self._check_on_policy(torch.cat(ratios))
        if sync_gradients and args.kl_target is not None:
            kl = self.accelerator.reduce(torch.stack(self._update_kl).mean(), reduction="mean").item()
            self.beta = adapt_beta(self.beta, kl, args.kl_target)
            self._update_kl = []
        return total

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss of the transitions of one denoising step, and their ratios."""
        step, latents, conditions = inputs["step"], inputs["latents"], inputs["conditions"]
        if self.beta > 0:
            with torch.no_grad(), self._adapter_disabled():
                reference_output = self.model(latents, self.timesteps[step], conditions)
        transition = self._transition(
            step,
            model(latents, self.timesteps[step], conditions),
            latents,
            conditions,
            eta=self.args.eta,
            next_sample=inputs["next_latents"],
        )
        ratio = (transition.log_prob - inputs["old_log_probs"]).exp()
        loss = clipped_surrogate(ratio, inputs["advantages"], self.args.epsilon, self.args.epsilon_high).mean()
        if self.beta > 0:
            # With the same `eta`: the mean of a stochastic step is another than that of a deterministic one.
            reference = self._transition(
                step, reference_output, latents, conditions, eta=self.args.eta, next_sample=inputs["next_latents"]
            )
            kl = gaussian_kl(transition.mean, reference.mean, transition.std, conditions.mask).mean()
            loss = loss + self.beta * kl
            self._update_kl.append(kl.detach())
            self._metrics["kl"].append(kl.detach())
        return (loss, ratio.detach()) if return_outputs else loss

    @contextmanager
    def _adapter_disabled(self):
        self.pipeline.unet.disable_adapters()
        try:
            yield
        finally:
            self.pipeline.unet.enable_adapters()

    def _check_on_policy(self, ratio: torch.Tensor) -> None:
        """Before the first update the policy is the one that made the rollout, and the ratio is 1 but for rounding."""
        noise = self.accelerator.gather((ratio - 1).abs().max()).max().item()
        if not noise <= self.args.epsilon / 10:
            raise ValueError(
                f"Before any update the ratio of the policy to itself is off 1 by up to {noise:.2g}, over a tenth of "
                f"`epsilon` ({self.args.epsilon:g}): rollout and training pass compute different things, and the "
                "clipping would act on noise. Remedies: no dropout in denoiser or adapter (`lora_dropout=0`), higher "
                f"precision, or `epsilon` of at least {10 * noise:.1g}."
            )
        self._on_policy_checked = True

    # ---------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Generate one image for each row, with deterministic steps and seeds that depend on the row alone, and score it.

        The first evaluation also makes groups of one rollout's size, to measure how far the rewards of one condition
        spread: gains are reported in that unit.

        Args:
            eval_dataset (`datasets.Dataset`, *optional*):
                Rows to evaluate on in place of `self.eval_dataset`.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                Prefix of the metrics.

        Returns:
            `dict[str, float]`: `eval_reward`, the mean over rows of the weighted sum of the heads;
            `eval_rewards/{head}/mean`; `eval_reward_std` and `eval_rewards/{head}/std`, the standard deviation within
            groups at the first evaluation; `eval_reward_gain`, the rise of `eval_reward` since then, in units of
            `eval_reward_std`; and the time it took.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("There is no `eval_dataset`; pass one to the trainer or to `evaluate`.")
        start_time, args, spans = time.time(), self.args, list(self._denoiser_watch.spans)
        with self.ema.applied():
            rewards = self._evaluate_rows(dataset, list(range(len(dataset))), 1, range(0), "Evaluating")
            if self.start is None:
                window = stochastic_window(
                    args.num_inference_steps, args.window_size, seeded_generator(args.seed, WINDOW, 0)
                )
                rows = list(range(min(len(dataset), args.groups_per_rollout * args.world_size)))
                groups = self._evaluate_rows(dataset, rows, args.num_generations, window, "Measuring the spread")
                stds = group_std(torch.cat([groups, self._weighted_sum(groups)[:, None]], dim=1), args.num_generations)
                self.start = {"reward": self._weighted_sum(rewards).nanmean().item(), "stds": stds.tolist()}
        self._denoiser_watch.spans = spans  # the speed that is logged is that of the training
        if self._logged_at is not None:
            self._logged_at += time.time() - start_time

        reward = self._weighted_sum(rewards).nanmean().item()
        *head_stds, reward_std = self.start["stds"]
        metrics = {"reward": reward, "reward_std": reward_std}
        metrics["reward_gain"] = (reward - self.start["reward"]) / max(reward_std, args.reward_std_floor)
        for name, mean, std in zip(self.reward_names, rewards.nanmean(dim=0).tolist(), head_stds, strict=True):
            metrics[f"rewards/{name}/mean"], metrics[f"rewards/{name}/std"] = mean, std
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics.update(speed_metrics(metric_key_prefix, start_time, num_samples=len(dataset)))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_rows(self, dataset, rows, num_generations, window, description) -> torch.Tensor:
        """Rewards of all rows, gathered: `(len(rows) * num_generations, heads)` in the order of the rows."""
        args = self.args
        mine = rows[args.process_index :: args.world_size]
        parts = torch.tensor(mine, dtype=torch.long).split(max(args.per_device_eval_batch_size // num_generations, 1))
        scored = []
        for part in tqdm(
            parts, desc=description, leave=False, disable=args.disable_tqdm or not self.is_local_process_zero()
        ):
            conditions, columns = self._encode(dataset, part.tolist())
            keys = [(args.seed, EVALUATION, row) for row in part.tolist()]
            images, _, _ = self.generate(conditions, keys, num_generations, window)
            rewards = self._score(images, conditions, columns, num_generations).unflatten(0, (-1, num_generations))
            scored += zip(part.tolist(), rewards.tolist(), strict=True)
        if args.world_size > 1:
            scored = gather_object(scored)
        return torch.tensor([rewards for _, rewards in sorted(scored)]).flatten(0, 1)

    # ------------------------------------------------------------------------------------------------------- logging

    def _record_rewards(self, rewards: torch.Tensor, num_generations: int) -> None:
        metrics, total = self._metrics, self._weighted_sum(rewards)
        stds = group_std(torch.cat([rewards, total[:, None]], dim=1), num_generations)
        for i, name in enumerate(self.reward_names):
            metrics[f"rewards/{name}/mean"].append(rewards[:, i].nanmean())
            metrics[f"rewards/{name}/std"].append(stds[i])
        metrics["reward"].append(total.nanmean())
        metrics["reward_std"].append(stds[-1])

    def _record_ratios(self, ratio: torch.Tensor) -> None:
        metrics, args = self._metrics, self.args
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        metrics["clip_ratio"].append(((ratio < 1 - args.epsilon) | (ratio > 1 + high)).float().mean())
        metrics["ratio/mean"].append(ratio.mean())
        metrics["ratio/max_deviation"].append((ratio - 1).abs().max())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was recorded since the last log of the training, averaged over its batches."""
        recorded = self._metrics
        if recorded and not any(name.startswith("eval_") for name in logs):
            self._metrics = defaultdict(list)
            for name, values in recorded.items():
                value = torch.stack([value.float() for value in values]).nanmean().item()
                if not math.isnan(value):  # a head may have been unable to score anything
                    logs[name] = value
            if self.args.kl_target is not None:
                logs["beta"] = self.beta
            seconds = time.perf_counter() - self._logged_at
            logs["images_per_second"] = self._num_images / seconds
            logs["time_outside_denoiser"] = 1 - self._denoiser_watch.read() / seconds
            self._logged_at, self._num_images = time.perf_counter(), 0
        super().log(logs, start_time)

    def _log_samples(self, images, conditions, columns, rewards, num_groups: int = 4) -> None:
        """Write a picture of the first groups, and send it where the run is tracked."""
        count = self.args.num_generations
        grid = sample_grid(
            conditions.image[:num_groups],
            conditions.pixel_mask[:num_groups],
            columns["label_maps"][:num_groups],
            images.unflatten(0, (-1, count))[:num_groups],
            rewards.view(-1, count)[:num_groups],
        )
        step = self.state.global_step
        path = Path(self.args.output_dir, "samples", f"step_{step:06d}.png")
        with whole_file(path) as partial:
            grid.save(partial, format="png")
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image("samples", np.asarray(grid), step, dataformats="HWC")
        if "trackio" in self.args.report_to:
            import trackio

            trackio.log({"samples": trackio.Image(str(path))})

    # -------------------------------------------------------------------------------------------- saving and resuming

    def _save(self, output_dir: str | None = None, state_dict=None):
        if self.args.should_save:
            with self.ema.applied():
                save_adapter(self.pipeline, output_dir or self.args.output_dir, base_model=self._base_model)

    @property
    def _base_model(self) -> str | None:
        return getattr(self.pipeline.config, "_name_or_path", None)

    def _save_rng_state(self, output_dir: str) -> None:
        # With the random states goes what else a resumed run needs; the method is called on every process.
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            with open(os.path.join(output_dir, STATE_FILE), "w", encoding="utf-8") as file:
                json.dump({"beta": self.beta, "start": self.start}, file)
            self.ema.save_weights_behind(output_dir)
        batches = self.state.global_step * self.args.gradient_accumulation_steps
        if batches % (self.args.steps_per_generation * self.args.num_iterations):  # in the midst of a rollout
            rollout = self._rollout
            tensors = {name: getattr(rollout, name).contiguous() for name in ("latents", "log_probs", "advantages")}
            numbers = {
                "index": rollout.index,
                "rows": rollout.rows,
                "window": [rollout.window.start, rollout.window.stop],
            }
            path = os.path.join(output_dir, ROLLOUT_FILE.format(self.args.process_index))
            save_file(tensors, path, metadata={"rollout": json.dumps(numbers)})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        folder, device = Path(resume_from_checkpoint), self.args.device
        weights = load_file(folder / PEFT_WEIGHTS)
        weights = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
        set_peft_model_state_dict(self.pipeline.unet, weights)  # in place: a second adapter would not be trained
        self.ema.load_weights_behind(folder)
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        self.beta, self.start = state["beta"], state["start"]
        path = folder / ROLLOUT_FILE.format(self.args.process_index)
        if path.exists():
            with safe_open(path, framework="pt", device=str(device)) as file:
                numbers = json.loads(file.metadata()["rollout"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            conditions, _ = self._encode(self.train_dataset, numbers["rows"])
            window = range(*numbers.pop("window"))
            self._rollout = Rollout(conditions=conditions, window=window, **numbers, **tensors)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: list[str] | None = None,
        **fields,
    ) -> None:
        """
        Write the card of the adapter, `README.md`, with what the trainer knows of it.

        Args:
            model_name (`str`, *optional*):
                Title of the card. The name of `output_dir` when not given.
            dataset_name (`str`, *optional*):
                Name of the training data.
            tags (`list[str]`, *optional*):
                Unused: the tags of the card are those of all our adapters.
            **fields:
                Further fields of [`~onereward.hub.cards.adapter_card`], in place of the trainer's own: raters and
                number of votes, say.
        """
        if not self.is_world_process_zero():
            return
        args = self.args
        evaluations = [entry for entry in self.state.log_history if "eval_reward" in entry]
        entries = evaluations or [entry for entry in self.state.log_history if "reward" in entry]
        prefix = "eval_" if evaluations else ""
        heads = ["reward", *(f"rewards/{name}/mean" for name in self.reward_names or [])]
        card = adapter_card(
            **{
                "name": model_name or Path(args.output_dir).name,
                "base_model": str(self._base_model),
                "repo_id": self.hub_model_id or args.output_dir,
                "training_data": (
                    f"{self.state.global_step} updates of DDPO on {len(self.train_dataset)} conditions of "
                    f"{dataset_name or 'an unnamed data set'}, {args.num_generations} images of each at a time."
                ),
                "evaluation": {
                    head: {"before": entries[0][prefix + head], "after": entries[-1][prefix + head]} for head in heads
                }
                if entries
                else {},
                "eval_dataset": (
                    f"{len(self.eval_dataset)} unseen conditions" if evaluations else "the conditions of the training"
                ),
                "command": " ".join(sys.argv),
                "seed": args.seed,
                "limits": ["The rewards are what it was tuned for: judge it by measures that were not."],
                "example_prompt": self.train_dataset[0]["prompt"],
                "commit": source_commit(),
                **fields,
            }
        )
        save_card(card, args.output_dir)
