"""Tunes the denoiser of a mask-guided pipeline on rewards, with DDPO in the shape of TRL's `GRPOTrainer`."""

import copy
import json
import math
import shlex
import sys
import textwrap
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate.utils import TorchDynamoPlugin, gather_object
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from huggingface_hub import ModelCard
from peft import PeftConfig
from peft.utils import set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModel, TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, speed_metrics
from transformers.utils import logging

from onereward.data.schema import LABELS, rows_to_tensors
from onereward.data.synthetic import save_png
from onereward.hub.adapters import PEFT_WEIGHTS, denoiser_name, denoiser_of, save_adapter
from onereward.hub.cards import adapter_card, pipeline_card
from onereward.hub.environment import source_commit
from onereward.hub.gallery import write_gallery
from onereward.hub.provenance import read_provenance
from onereward.pipelines import MaskConditions, OneRewardMaskPipeline
from onereward.policy import (
    adapt_beta,
    clipped_surrogate,
    gaussian_kl,
    guarded_log_ratio,
    score_function_loss,
    seeded_generator,
    stochastic_window,
)
from onereward.rewards import OneRewardModel
from onereward.rewards.advantages import (
    compute_advantages,
    constrain,
    group_normalize,
    group_std,
    weighted_sum,
    whiten,
)
from onereward.rewards.running import RunningStatistics, condition_key
from onereward.rewards.scoring import RewardFunc, RewardScorer
from onereward.trainers.checkpoints import SEAL, StopOnSignal, TrainingStopped, fingerprint
from onereward.trainers.ddpo_config import DDPOConfig
from onereward.trainers.ema import WeightAverage
from onereward.trainers.hub import HubTrainer, loaded_revision
from onereward.trainers.sample_grid import sample_grid
from onereward.trainers.sampling import Chain, PolicySampler, Samples, join_samples
from onereward.trainers.value import ValueModel, state_features


logger = logging.get_logger(__name__)

# What random numbers are for: the first key after the seed.
ORDER, WINDOW, ROLLOUT, EVALUATION = range(4)

STATE_FILE, ROLLOUT_FILE, VALUE_WEIGHTS = "ddpo_state.json", "rollout_{}.safetensors", "value_model.safetensors"


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
        chain ([`Chain`]):
            The denoising steps.
        window (`range`):
            The stochastic ones.
        tensors (`dict[str, torch.Tensor]`):
            `latents`, `log_probs` and perhaps `means` as in [`Samples`]; `advantages` of shape `(N, window)`; and
            `rewards` of shape `(N,)` for the `"value"` baseline.
    """

    index: int
    rows: list[int]
    conditions: MaskConditions
    chain: Chain
    window: range
    tensors: dict[str, torch.Tensor]


class _Policy(torch.nn.Module):
    """The denoiser as the Trainer sees it: one forward, which is what processes synchronise."""

    def __init__(self, pipeline: DiffusionPipeline, guidance_scale: float):
        super().__init__()
        self.pipeline = pipeline
        self.denoiser = denoiser_of(pipeline)
        self._no_split_modules = getattr(self.denoiser, "_no_split_modules", None)  # what FSDP keeps in one piece
        self.value = None
        self.guidance_scale = guidance_scale

    def forward(self, latents, timestep, conditions, level=None):
        """What the denoiser predicts; with `level` also the forecast of the value network."""
        output = self.pipeline.denoise(latents, timestep, conditions, guidance_scale=self.guidance_scale)
        return output if level is None else (output, self.value(latents, level, conditions))

    def activation_checkpointing_enable(self, **kwargs):
        self.denoiser.enable_gradient_checkpointing()  # the name that the denoisers of diffusers have for it


class DDPOTrainer(HubTrainer):
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
        pipeline ([`OneRewardMaskPipeline`], [`OneRewardFluxFillPipeline`] or [`OneRewardSD3InpaintPipeline`]):
            Pipeline to tune. Its denoiser is trained; VAE and text encoders stay frozen. Flow-matching pipelines keep
            their scheduler, a [`~diffusers.FlowMatchEulerDiscreteScheduler`]; one other than
            [`~diffusers.DDIMScheduler`] is else replaced by a DDIM scheduler with the same noise schedule.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`):
            What to tune for, the higher the better. Each is

            - a [`OneRewardModel`], whose criteria become the reward heads,
            - a `str`: folder or model id of one,
            - a function with keyword arguments `images` (B, C, H, W) and `sources` (B, C, H, W), floats in [0, 1],
              `masks` (B, 1, H, W), 1 = repainted, `label_maps` (B, 1, H, W), integers, `prompts`, a list of B strings,
              and every other column of the data set as a list of B values, e.g. `task`, `modality`, `case_id` and
              `target`. It returns B numbers, or a dict of head -> B numbers. `None` or NaN says that it cannot score
              an image, which then learns nothing from that head. B is a number of whole groups.
        args ([`DDPOConfig`], *optional*):
            Configuration of the training.
        train_dataset (`datasets.Dataset`):
            Conditions in the row schema of `onereward.data`, at least as many as a rollout has groups.
        eval_dataset (`datasets.Dataset`, *optional*):
            Conditions to evaluate on: one image each, deterministic steps, fixed seeds.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter to add to the denoiser, a `LoraConfig` say, which has none yet. When left out, the denoiser's
            active adapter is trained on; if it has none, all its weights are trained, in float32.
        eval_reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            Rewards that are evaluated, and never trained on: what tells progress from overfitting to `reward_funcs`.
            With `metric_for_best_model="eval_heldout/{name}/mean"`, `load_best_model_at_end=True` and
            [`~transformers.EarlyStoppingCallback`] the training stops when they stop rising.
        callbacks (`list[TrainerCallback]`, *optional*):
            Further callbacks.

    Raises:
        `ValueError`: when `peft_config` comes for a denoiser that has an adapter, several adapters are active, the
        data set is too small, two heads share a name, or the scheduler cannot be turned into a policy.

    Example:

    ```python
    >>> from peft import LoraConfig
    >>> from onereward import DDPOConfig, DDPOTrainer, OneRewardMaskPipeline, load_phantom

    >>> def brightness(images, masks, **columns):
    ...     return (images * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3))

    >>> trainer = DDPOTrainer(
    ...     OneRewardMaskPipeline.from_pretrained("pipelines/onereward-brats"),
    ...     brightness,
    ...     DDPOConfig(max_steps=20),
    ...     load_phantom(64, tasks=("fill",)),
    ...     peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    ... )
    >>> trainer.train()
    ```
    """

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
        eval_reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        args = args or DDPOConfig()
        if args.n_gpu > 1:
            args._n_gpu = 1  # one process drives one GPU: `accelerate launch` starts one for each

        # Policy: the denoiser, with an adapter or whole
        self.pipeline = pipeline
        self.denoiser = denoiser_of(pipeline)
        self._denoiser_class, self._base_fingerprint = type(self.denoiser), fingerprint(self.denoiser)
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False).eval()
        self.adapter_name = self.reference = None
        loaded = list(getattr(self.denoiser, "peft_config", None) or {})
        if peft_config is not None:
            if loaded:  # the new one would switch them off
                raise ValueError(
                    f"`peft_config` is given, but the denoiser has the adapters {loaded} already. Leave `peft_config` "
                    "out to train the active one on, make it part of the weights first with `pipeline.fuse_lora()` "
                    "and `pipeline.unload_lora_weights()`, or remove it with `pipeline.delete_adapters(name)`."
                )
            self.adapter_name = "default"
            self.denoiser.add_adapter(peft_config)
        elif loaded:
            active = self.denoiser.active_adapters()
            if len(active) != 1:
                raise ValueError(
                    f"The denoiser has the active adapters {active}; expected one to train on. Choose it with "
                    "`pipeline.set_adapters(name)`."
                )
            self.adapter_name = active[0]
            for name, parameter in self.denoiser.named_parameters():
                parameter.requires_grad_(f".{self.adapter_name}." in f"{name}.")
        else:
            if args.beta > 0:
                self.reference = copy.deepcopy(self.denoiser)
            self.denoiser.requires_grad_(True)
        cast_training_params(self.denoiser, dtype=torch.float32)
        if args.torch_compile:
            self.denoiser.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        self.policy_parameters = [p for p in self.denoiser.parameters() if p.requires_grad]

        self.sampler = PolicySampler(pipeline, lambda *state: self.model(*state), args)

        # Rewards
        def load(funcs):
            funcs = funcs if isinstance(funcs, (list, tuple)) else [funcs]
            funcs = [AutoModel.from_pretrained(func) if isinstance(func, str) else func for func in funcs]
            for func in funcs:
                if isinstance(func, OneRewardModel):
                    func.requires_grad_(False).eval().to(args.device)
            return RewardScorer(
                funcs, args.async_rewards, args.reward_timeout, args.reward_retries, args.on_reward_error
            )

        self.scorer = load(reward_funcs)
        self.eval_scorer = None if eval_reward_funcs is None else load(eval_reward_funcs)
        self.running = RunningStatistics(args.running_buffer_size, args.running_min_count, args.reward_std_floor)

        # Data
        groups = args.groups_per_generation * args.world_size
        if train_dataset is not None and len(train_dataset) < groups:
            raise ValueError(
                f"`train_dataset` has {len(train_dataset)} rows, but a rollout has {groups} groups and each wants a "
                "condition of its own. Bring more rows, lower `per_device_generation_batch_size`, or raise "
                "`num_generations`."
            )

        # State that a checkpoint holds besides the Trainer's own
        self.beta = args.beta
        self.start = None  # reward and standard deviation within groups of the first evaluation
        self._rollout = None
        self._pictures = None  # of the card: fingerprint of the weights, before, after
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
        if self.is_fsdp_enabled and (args.ema_decay is not None or args.baseline == "value"):
            raise ValueError(
                "`ema_decay` and the baseline 'value' need whole weights, which FSDP splits up. Take DDP, or none."
            )
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # which want weights in one stretch
            for module in (self.denoiser, self.reference):
                if isinstance(module, UNet2DConditionModel):
                    module.to(memory_format=torch.channels_last)  # convolutions are faster in this layout
        self.ema = WeightAverage(self.policy_parameters, args.ema_decay)
        self.stop = StopOnSignal()
        self.add_callback(self.ema)
        self.add_callback(self.stop)
        for module in (*pipeline.components.values(), self.reference):
            if isinstance(module, torch.nn.Module) and module is not self.denoiser:
                module.to(args.device)
        if args.baseline == "value":
            conditions, _ = self._encode(train_dataset, [0])
            noise = self.sampler.draw([seeded_generator(0)], conditions)
            features = state_features(noise, conditions.mask.flatten(1)[:, 0], conditions)
            self.model.value = ValueModel(features.shape[1]).to(args.device)
        self._logged_at, self._num_images = None, 0  # since when, and how many images, the next log reports

    def _build_accelerator_args(self, **kwargs) -> dict:
        # The denoiser is compiled in place, for rollout and training pass alike; the Trainer would compile for the
        # training pass alone.
        return {**super()._build_accelerator_args(**kwargs), "dynamo_plugin": TorchDynamoPlugin(backend="no")}

    # ---------------------------------------------------------------------------------------------------------- data

    def get_train_dataloader(self) -> DataLoader:
        """
        Counts the batches of an epoch. What they hold follows from the number of the rollout, see
        [`~DDPOTrainer.rollout_rows`], so that a resumed run needs nothing of the loader's state.
        """
        steps = self._rollouts_per_epoch * self.args.steps_per_generation * self.args.num_iterations
        dataset = range(steps * self._train_batch_size * self.args.world_size)
        return self.accelerator.prepare(DataLoader(dataset, batch_size=self._train_batch_size, collate_fn=list))

    @property
    def _rollouts_per_epoch(self) -> int:
        return len(self.train_dataset) // (self.args.groups_per_generation * self.args.world_size)

    def rollout_rows(self, index: int) -> list[int]:
        """
        Rows of the training data that rollout number `index` takes on this process. Each epoch is a new permutation.
        """
        epoch, position = divmod(index, self._rollouts_per_epoch)
        order = torch.randperm(len(self.train_dataset), generator=seeded_generator(self.args.seed, ORDER, epoch))
        first = (position * self.args.world_size + self.args.process_index) * self.args.groups_per_generation
        return order[first : first + self.args.groups_per_generation].tolist()

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
        if self.args.baseline == "running":
            columns["condition_key"] = [condition_key(row) for row in rows]
        return conditions, columns

    # ------------------------------------------------------------------------------------------------------- rewards

    def _arguments(
        self, images: torch.Tensor, conditions: MaskConditions, columns: dict, num_generations: int
    ) -> dict:
        """Keyword arguments of the reward functions for whole groups of images."""

        def of_group(values):
            if torch.is_tensor(values):
                return values.repeat_interleave(num_generations, dim=0)
            return [value for value in values for _ in range(num_generations)]

        columns = {name: of_group(values) for name, values in columns.items() if name != "condition_key"}
        return {
            "images": images,
            "masks": of_group(conditions.pixel_mask.float()),
            "sources": of_group(conditions.image.float()),
            "label_maps": columns.pop("label_maps").to(images.device),
            "prompts": columns.pop("prompt"),
            **columns,
        }

    @property
    def reward_names(self) -> list[str] | None:
        """Names of the reward heads, known once the functions have been called."""
        return self.scorer.names

    @property
    def reward_weights(self) -> list[float]:
        """Weight of each reward head."""
        names, args = self.reward_names, self.args
        unknown = set(args.reward_constraints or {}) - set(names)
        if unknown:
            raise ValueError(f"`reward_constraints` names {sorted(unknown)}; expected some of the heads {names}.")
        if args.reward_weights is None:
            return [0.0 if name in (args.reward_constraints or {}) else 1.0 for name in names]
        if len(args.reward_weights) != len(names):
            raise ValueError(
                f"`reward_weights` is {args.reward_weights}; expected one weight for each of the heads {names}."
            )
        return args.reward_weights

    def _advantages(self, rewards: torch.Tensor, keys: list[str] | None, values: torch.Tensor | None) -> torch.Tensor:
        """Advantages of the images of all processes: `(N,)`, or `(N, window)` with the `"value"` baseline."""
        args, weights = self.args, self.reward_weights
        if args.baseline == "value":
            total = weighted_sum(rewards, weights, args.num_generations)[:, None].expand_as(values)
            surprises = (total - values) / self.model.value.scale
            advantages = whiten(surprises.flatten()).view_as(values).nan_to_num(nan=0.0)
        else:

            def normalize(heads):
                if args.baseline == "running":
                    return self.running.normalize(heads, keys)
                return group_normalize(heads, args.num_generations, args.reward_std_floor, args.scale_rewards)

            aggregation = args.multi_objective_aggregation
            advantages = compute_advantages(rewards, normalize, weights, aggregation, args.num_generations)
        if args.reward_constraints:
            least = [args.reward_constraints.get(name) for name in self.reward_names]
            advantages = constrain(advantages, rewards, least, args.reward_std_floor)
        return advantages.clamp(-args.advantage_clip, args.advantage_clip)

    def _sample_and_score(self, chain, conditions, columns, keys, window) -> tuple[Samples, torch.Tensor]:
        """Generate the images of a rollout, and have each group scored as soon as it is whole."""
        count = self.args.num_generations
        parts, submitted, scored = [], [], 0
        waiting = conditions.image[:0].float()
        for part in self.sampler.batches(
            chain, conditions, keys, count, window, self.args.per_device_train_batch_size
        ):
            self.stop.check(self.args)
            waiting = torch.cat([waiting, part.images])
            parts.append(part._replace(images=waiting[:0]))  # the calls of the reward functions hold them
            whole = len(waiting) // count
            if whole:
                groups = slice(scored, scored + whole)
                of_groups = {name: values[groups] for name, values in columns.items()}
                arguments = self._arguments(waiting[: whole * count], conditions[groups], of_groups, count)
                submitted.append(self.scorer.submit(arguments))
                waiting, scored = waiting[whole * count :], scored + whole
        images = torch.cat([arguments["images"] for arguments, _ in submitted])
        return join_samples(parts)._replace(images=images), self.scorer.collect(submitted)

    @torch.no_grad()
    def _make_rollout(self, index: int) -> Rollout:
        """Generate and score the groups of one rollout."""
        args, count = self.args, self.args.num_generations
        self.model.eval()
        window = stochastic_window(
            args.num_inference_steps, args.window_size, seeded_generator(args.seed, WINDOW, index)
        )
        rows = self.rollout_rows(index)
        conditions, columns = self._encode(self.train_dataset, rows)
        chain = self.sampler.chain(conditions)
        # Keyed by the group's number among those of all processes: how many there are does not matter.
        first = args.process_index * args.groups_per_generation
        keys = [(args.seed, ROLLOUT, index, first + group) for group in range(len(rows))]
        samples, local_rewards = self._sample_and_score(chain, conditions, columns, keys, window)

        rewards = self.accelerator.gather(local_rewards)
        total, values, all_keys = weighted_sum(rewards, self.reward_weights, count), None, None
        local_total = total[args.process_index * len(local_rewards) :][: len(local_rewards)]
        tensors = {"latents": samples.latents, "log_probs": samples.log_probs}
        if args.ratio_normalization:
            tensors["means"] = samples.means
        if args.baseline == "value":
            self.model.value.set_units(total)
            local = conditions.repeat_interleave(count)
            levels = [chain.levels[step].expand(len(local)) for step in window]
            values = [self.model.value(samples.latents[:, i], level, local) for i, level in enumerate(levels)]
            values = self.accelerator.gather(torch.stack(values, dim=1))
            tensors["rewards"] = local_total
        elif args.baseline == "running":
            all_keys = [key for key in columns["condition_key"] for _ in range(count)]
            all_keys = gather_object(all_keys) if args.world_size > 1 else all_keys
        advantages = self._advantages(rewards, all_keys, values)
        advantages = advantages[args.process_index * len(local_rewards) :][: len(local_rewards)]
        tensors["advantages"] = advantages if advantages.ndim == 2 else advantages[:, None].repeat(1, len(window))

        self._num_images += len(rewards)
        self._record_rewards(rewards, total)
        every = args.log_samples_steps
        if every and self.is_world_process_zero() and self.state.global_step % every < args.updates_per_generation:
            self._log_samples(samples.images, conditions, columns, local_total)
        return Rollout(index, rows, conditions, chain, window, tensors)

    # ------------------------------------------------------------------------------------------------------ training

    def _batch(self, inputs: list[int]) -> dict:
        """The transitions of one training batch, from a new rollout where the last is used up."""
        args = self.args
        self.stop.check(args)
        # Where we are follows from the number of updates and from which batch of an update this is.
        batch = inputs[0] // (self._train_batch_size * args.world_size) % args.gradient_accumulation_steps
        step = self.state.global_step * args.gradient_accumulation_steps + batch
        index, step = divmod(step, args.steps_per_generation * args.num_iterations)
        if self._rollout is None or self._rollout.index != index:
            self._rollout = None  # before the next one takes its place in memory
            self._rollout = self._make_rollout(index)
        rollout = self._rollout

        # Transitions lie in the order in which the rollout made them, batch by batch and step by step.
        rows, images = self._train_batch_size, torch.arange(args.per_device_generation_batch_size)
        parts = images.split(min(rows, len(images)))
        image = torch.cat([part.repeat(args.window_size) for part in parts])
        place = torch.cat([torch.arange(args.window_size).repeat_interleave(len(part)) for part in parts])
        chosen = slice((step % args.steps_per_generation) * rows, (step % args.steps_per_generation + 1) * rows)
        image, place = image[chosen], place[chosen]
        tensors = {name: tensor for name, tensor in rollout.tensors.items() if name not in ("latents", "rewards")}
        return {
            "chain": rollout.chain,
            "steps": (place + rollout.window.start).to(args.device),
            "conditions": rollout.conditions[image // args.num_generations],
            "latents": rollout.tensors["latents"][image, place],
            "next_latents": rollout.tensors["latents"][image, place + 1],
            **{name: tensor[image, place] for name, tensor in tensors.items()},
            "rewards": rollout.tensors["rewards"][image] if "rewards" in rollout.tensors else None,
            "is_on_policy": step < args.gradient_accumulation_steps,
        }

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        if self._logged_at is None:
            self._logged_at = time.perf_counter()
        batch = self._batch(inputs)
        with self.sampler.watch:
            loss = super().training_step(model, batch, num_items_in_batch)
        if self.accelerator.sync_gradients and self.args.kl_target is not None:
            kl = self.accelerator.reduce(torch.stack(self._update_kl).mean(), reduction="mean").item()
            self.beta = adapt_beta(self.beta, kl, self.args.kl_target, self.args.beta)
            self._update_kl = []
        if self.accelerator.sync_gradients and batch["is_on_policy"]:
            self._on_policy_checked = True
        return loss

    def _prepare_inputs(self, inputs):
        return inputs  # they are on the device

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss of some transitions, and their ratios."""
        args, chain, steps = self.args, inputs["chain"], inputs["steps"]
        latents, conditions = inputs["latents"], inputs["conditions"]
        state = (latents, chain.timesteps[steps], conditions)
        # With the same `eta`: the mean of a stochastic step is another than that of a deterministic one.
        drawn = {"eta": args.eta, "next_sample": inputs["next_latents"]}
        if self.beta > 0:
            with torch.no_grad(), self._reference():
                reference_output = self.model(*state)
                reference = self.sampler.transition(chain, steps, reference_output, latents, conditions.mask, **drawn)
            self.sampler.num_calls += 1
        if args.baseline == "value":
            model_output, values = model(*state, chain.levels[steps])
        else:
            model_output = model(*state)
        self.sampler.num_calls += 1
        transition = self.sampler.transition(chain, steps, model_output, latents, conditions.mask, **drawn)

        log_ratio = transition.log_prob - inputs["log_probs"]
        if args.ratio_normalization:
            log_ratio = guarded_log_ratio(log_ratio, transition.mean, inputs["means"], transition.std, conditions.mask)
        ratio = log_ratio.exp()
        if args.estimator == "score_function":
            loss = score_function_loss(transition.log_prob, inputs["advantages"]).mean()
        else:
            loss = clipped_surrogate(ratio, inputs["advantages"], args.epsilon, args.epsilon_high).mean()
        if self.beta > 0:
            kl = gaussian_kl(transition.mean, reference.mean, transition.std, conditions.mask).mean()
            loss = loss + self.beta * kl
            self._update_kl.append(kl.detach())
            self._metrics["kl"].append(kl.detach())
        if args.baseline == "value":
            known = inputs["rewards"].isfinite()
            errors = torch.where(known, (values - inputs["rewards"].nan_to_num()) / self.model.value.scale, 0)
            loss = loss + args.vf_coef * (errors**2).sum() / known.sum().clamp(min=1)
            self._metrics["value_error"].append((errors.detach() ** 2).sum() / known.sum().clamp(min=1))

        self._record_ratios(ratio.detach())
        if not self._on_policy_checked and inputs["is_on_policy"]:
            self._check_on_policy(ratio.detach())
        return (loss, ratio.detach()) if return_outputs else loss

    @contextmanager
    def _reference(self):
        """The denoiser before the training takes the place of the policy."""
        if self.adapter_name is None:
            with self._denoiser_replaced_by(self.reference):
                yield
            return
        self.denoiser.disable_adapters()
        try:
            yield
        finally:
            self.denoiser.enable_adapters()

    @contextmanager
    def _denoiser_replaced_by(self, module: torch.nn.Module):
        name = denoiser_name(self.pipeline)
        setattr(self.pipeline, name, module)
        try:
            yield
        finally:
            setattr(self.pipeline, name, self.denoiser)

    def _check_on_policy(self, ratio: torch.Tensor) -> None:
        """Before the first update the policy is the one that made the rollout, and the ratio is 1 but for rounding."""
        noise = self.accelerator.gather((ratio - 1).abs().max()).max().item()
        if not noise <= self.args.epsilon / 10:
            raise ValueError(
                f"Before any update the ratio of the policy to itself is off 1 by up to {noise:.2g}, over a tenth of "
                f"`epsilon` ({self.args.epsilon:g}): rollout and training pass compute different things, and the "
                "clipping would act on noise. Remedies: no dropout in denoiser or adapter (`lora_dropout=0`), a "
                "`per_device_train_batch_size` that divides `per_device_generation_batch_size`, higher precision, or "
                f"`epsilon` of at least {10 * noise:.1g}."
            )

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
            `dict[str, float]`: `eval_reward`, the mean over rows of the weighted sum of the heads, NaN when one of
            them scored rows in an earlier evaluation and none in this one; `eval_rewards/{head}/mean`;
            `eval_reward_std` and `eval_rewards/{head}/std`, the standard deviation within groups at the first
            evaluation; `eval_reward_gain`, the rise of `eval_reward` since then, in units of `eval_reward_std`;
            `eval_heldout/{head}/mean` of the rewards that are not trained on; and the time it took.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("There is no `eval_dataset`; pass one to the trainer or to `evaluate`.")
        start_time, args = time.time(), self.args
        self.model.eval()
        spans, calls = list(self.sampler.watch.spans), self.sampler.num_calls
        with self.ema.applied():
            rewards, heldout = self._evaluate_rows(dataset, list(range(len(dataset))), 1, range(0), "Evaluating")
            total = weighted_sum(rewards, self.reward_weights)
            if self.start is None:
                window = stochastic_window(
                    args.num_inference_steps, args.window_size, seeded_generator(args.seed, WINDOW, 0)
                )
                rows = list(range(min(len(dataset), args.groups_per_generation * args.world_size)))
                count = max(args.num_generations, 2)
                groups, _ = self._evaluate_rows(dataset, rows, count, window, "Measuring the spread")
                totals = weighted_sum(groups, self.reward_weights, count)[:, None]
                stds = group_std(torch.cat([groups, totals], dim=1), count)
                self.start = {"reward": total.nanmean().item(), "stds": stds.tolist()}
        self.sampler.watch.spans, self.sampler.num_calls = spans, calls  # the speed that is logged is the training's
        if self._logged_at is not None:
            self._logged_at += time.time() - start_time

        reward, means = total.nanmean().item(), rewards.nanmean(dim=0).tolist()
        before = [entry for entry in self.state.log_history if f"{metric_key_prefix}_reward" in entry]
        for name, mean, weight in zip(self.reward_names, means, self.reward_weights, strict=True):
            known = (entry[f"{metric_key_prefix}_rewards/{name}/mean"] for entry in before)
            if weight and math.isnan(mean) and not all(map(math.isnan, known)):
                reward = math.nan  # without this head, the sum cannot be compared with those before
        *head_stds, reward_std = self.start["stds"]
        metrics = {"reward": reward, "reward_std": reward_std}
        metrics["reward_gain"] = (reward - self.start["reward"]) / max(reward_std, args.reward_std_floor)
        for name, mean, std in zip(self.reward_names, means, head_stds, strict=True):
            metrics[f"rewards/{name}/mean"], metrics[f"rewards/{name}/std"] = mean, std
        if heldout is not None:
            for name, mean in zip(self.eval_scorer.names, heldout.nanmean(dim=0).tolist(), strict=True):
                metrics[f"heldout/{name}/mean"] = mean
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics.update(speed_metrics(metric_key_prefix, start_time, num_samples=len(dataset)))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_rows(self, dataset, rows, num_generations, window, description):
        """
        Rewards of all rows, gathered, of shape `(len(rows) * num_generations, heads)` in the order of the rows; and
        those that are not trained on, or `None`.
        """
        args = self.args
        # As many on each process, some twice if need be: one without any would not know the names of the heads, and
        # one with fewer would leave the others waiting where the denoiser's weights are split up.
        places = math.ceil(len(rows) / args.world_size) * args.world_size
        mine = [rows[i % len(rows)] for i in range(args.process_index, places, args.world_size)]
        parts = torch.tensor(mine, dtype=torch.long).split(max(args.per_device_eval_batch_size // num_generations, 1))
        scorers = [scorer for scorer in (self.scorer, self.eval_scorer) if scorer is not None]
        scored = []
        for part in tqdm(
            parts, desc=description, leave=False, disable=args.disable_tqdm or not self.is_local_process_zero()
        ):
            conditions, columns = self._encode(dataset, part.tolist())
            keys = [(args.seed, EVALUATION, row) for row in part.tolist()]
            images = self.sampler.generate(conditions, keys, num_generations, window).images
            arguments = self._arguments(images, conditions, columns, num_generations)
            submitted = [scorer.submit(arguments) for scorer in scorers]
            rewards = [
                s.collect([its]).unflatten(0, (-1, num_generations)) for s, its in zip(scorers, submitted, strict=True)
            ]
            scored += zip(part.tolist(), *(values.tolist() for values in rewards), strict=True)
        if args.world_size > 1:
            scored = gather_object(scored)
        scored = {row: values for row, *values in scored}
        by_scorer = zip(*(scored[row] for row in rows), strict=True)
        rewards, *heldout = (torch.tensor(values).flatten(0, 1) for values in by_scorer)
        return rewards, heldout[0] if heldout else None

    # ------------------------------------------------------------------------------------------------------- logging

    def _record_rewards(self, rewards: torch.Tensor, total: torch.Tensor) -> None:
        metrics = self._metrics
        stds = group_std(torch.cat([rewards, total[:, None]], dim=1), self.args.num_generations)
        for i, name in enumerate(self.reward_names):
            metrics[f"rewards/{name}/mean"].append(rewards[:, i].nanmean())
            metrics[f"rewards/{name}/std"].append(stds[i])
        metrics["reward"].append(total.nanmean())
        metrics["reward_std"].append(stds[-1])
        constraints = self.args.reward_constraints or {}
        for name, least in constraints.items():
            violated = (rewards[:, self.reward_names.index(name)] < least).float().mean()
            metrics[f"constraints/{name}/violated"].append(violated)

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
            logs["denoiser_calls"] = self.sampler.num_calls
            logs["time_outside_denoiser"] = 1 - self.sampler.watch.read() / seconds
            self._logged_at, self._num_images, self.sampler.num_calls = time.perf_counter(), 0, 0
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
        save_png(grid, path, model=self._base_model or "onereward", sidecar=False)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image("samples", np.asarray(grid), step, dataformats="HWC")
        if "trackio" in self.args.report_to:
            import trackio

            trackio.log({"samples": trackio.Image(str(path))})
        if "wandb" in self.args.report_to:
            import wandb

            wandb.log({"samples": wandb.Image(str(path))}, commit=False)

    # -------------------------------------------------------------------------------------------- saving and resuming

    def train_from(self, checkpoint: str | None, **kwargs):
        """
        As [`~HubTrainer.train`], with two promises more: SIGTERM saves a checkpoint and ends the process with exit
        status 0, and Ctrl-C saves one before it raises.
        """
        if checkpoint:
            state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
            *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
            if self.is_fsdp_enabled:
                self._load_weights(Path(checkpoint))  # while they are whole
            elif self.is_deepspeed_enabled or state.global_step >= max_steps:
                self._load_from_checkpoint(checkpoint)  # where the Trainer does not
            if state.global_step >= max_steps:  # the Trainer would make one update more
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        try:
            return super().train_from(checkpoint, **kwargs)
        except TrainingStopped:
            # The weights are those of the last update: what was done since then is done again, to the same end.
            if not (self.checkpoint_folder / SEAL).is_file():
                self._save_checkpoint(self.model_wrapped, None)
                self._finish_current_push()
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            self.stop.end()
        finally:
            self.stop.on_train_end(self.args, self.state, self.control)

    @property
    def run_description(self) -> dict:
        """What decides where a checkpoint's numbers belong: what differs makes it another run's."""
        names = ("seed", "num_generations", "num_iterations", "num_inference_steps", "window_size", "baseline")
        names += ("per_device_generation_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")
        rows = self.train_dataset
        return {
            "denoiser": self._base_fingerprint,
            "trained_weights": [[name, *p.shape] for name, p in self.model.named_parameters() if p.requires_grad][:3],
            "num_trained_weights": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "rows": [len(rows), condition_key(rows[0]), condition_key(rows[len(rows) - 1])],
            "num_processes": self.args.world_size,
            **{name: getattr(self.args, name) for name in names},
        }

    def write_model(self, output_dir: str | None = None) -> None:
        with self.ema.applied():
            super().write_model(output_dir)

    def _save(self, output_dir: str | None = None, state_dict=None):
        """An adapter in the formats of diffusers and PEFT; a whole denoiser as a folder of its pipeline."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if state_dict is not None:  # gathered from several processes
            state_dict = {name.removeprefix("denoiser."): tensor for name, tensor in state_dict.items()}
        if self.adapter_name is not None:
            save_adapter(
                self.pipeline,
                folder,
                base_model=self._base_model,
                adapter_name=self.adapter_name,
                state_dict=state_dict,
            )
            return
        denoiser = self.denoiser
        if state_dict is not None:
            denoiser = self._denoiser_class.from_config(self.denoiser.config)
            denoiser.load_state_dict(state_dict)
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            denoiser.save_pretrained(folder / denoiser_name(self.pipeline))
        else:
            with self._denoiser_replaced_by(denoiser):
                self.pipeline.save_pretrained(folder)

    def write_result(self, checkpoint: Path, folder: Path) -> None:
        if self.adapter_name is not None:
            super().write_result(checkpoint, folder)
            return
        component = denoiser_name(self.pipeline)
        denoiser = self._denoiser_class.from_pretrained(checkpoint / component, use_safetensors=True)
        with self._denoiser_replaced_by(denoiser):
            self.pipeline.save_pretrained(folder)

    @property
    def _base_model(self) -> str | None:
        return getattr(self.pipeline.config, "_name_or_path", None)

    def save_state_besides(self, folder: Path) -> None:
        rollout = self._rollout
        if rollout is not None and rollout.index == self.state.global_step // self.args.updates_per_generation:
            # It is not used up.
            tensors = {name: tensor.contiguous() for name, tensor in rollout.tensors.items()}
            window = [rollout.window.start, rollout.window.stop]
            numbers = json.dumps({"index": rollout.index, "rows": rollout.rows, "window": window})
            path = folder / ROLLOUT_FILE.format(self.args.process_index)
            save_file(tensors, path, metadata={"rollout": numbers})
        if self.args.should_save:
            state = {"beta": self.beta, "start": self.start, "running": self.running.state_dict()}
            (folder / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
            self.ema.save_weights_behind(folder)
            if self.args.baseline == "value":
                save_file(self.model.value.state_dict(), folder / VALUE_WEIGHTS)

    def _load_weights(self, folder: Path) -> None:
        if self.adapter_name is not None:
            weights = load_file(folder / PEFT_WEIGHTS)
            weights = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
            # in place: a second adapter would not be trained
            set_peft_model_state_dict(self.denoiser, weights, adapter_name=self.adapter_name)
        else:
            loaded = self._denoiser_class.from_pretrained(folder / denoiser_name(self.pipeline), use_safetensors=True)
            self.denoiser.load_state_dict(loaded.state_dict())
        if self.args.baseline == "value":
            self.model.value.load_state_dict(load_file(folder / VALUE_WEIGHTS))
        self.ema.load_weights_behind(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        folder = Path(resume_from_checkpoint)
        if model is None:
            self._load_weights(folder)
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        self.beta, self.start = state["beta"], state["start"]
        self.running.load_state_dict(state["running"])
        path = folder / ROLLOUT_FILE.format(self.args.process_index)
        if path.exists():
            with safe_open(path, framework="pt") as file:
                numbers = json.loads(file.metadata()["rollout"])
                tensors = {name: file.get_tensor(name).to(self.args.device) for name in file.keys()}
            conditions, _ = self._encode(self.train_dataset, numbers["rows"])
            window, chain = range(*numbers["window"]), self.sampler.chain(conditions)
            self._rollout = Rollout(numbers["index"], numbers["rows"], conditions, chain, window, tensors)

    def _load_best_model(self):
        self._load_weights(Path(self.state.best_model_checkpoint))

    # ------------------------------------------------------------------------------------------------ card and origin

    @property
    def kind(self) -> str:
        return "pipeline" if self.adapter_name is None else "adapter"

    def loaded_from(self) -> list[tuple[str, str, str | None]]:
        models = [("base_model", self._base_model, loaded_revision(self.pipeline))]
        for func in self.scorer.reward_funcs:
            if isinstance(func, OneRewardModel):
                models.append(("reward_model", func.config._name_or_path, getattr(func.config, "_commit_hash", None)))
        return [model for model in models if model[1]]

    def provenance_besides(self) -> dict:
        return {"rewards": self.reward_names}

    def _raters(self) -> dict:
        """Whose votes made the reward, where one reward model did and says so: fields of the card."""
        models = [model for role, *model in self.made_from() if role == "reward_model"]
        try:
            known = read_provenance(*models[0]) if len(models) == 1 else None
        except OSError as error:
            logger.warning(f"The card does not say whose votes made the reward: {error}")
            known = None
        votes = [parent for parent in (known or {"parents": []})["parents"] if parent["role"] == "votes"]
        if len(votes) != 1 or "raters" not in votes[0]:
            return {}
        return {"raters": votes[0]["raters"], "num_votes": votes[0]["num_rows"]}

    @torch.no_grad()
    def _gallery(self, num_rows: int = 4) -> list[dict]:
        """Pictures for the card: the same conditions and the same noise, with the adapter off and on."""
        dataset = self.train_dataset if self.eval_dataset is None else self.eval_dataset
        numbers = np.linspace(0, len(dataset) - 1, min(num_rows, len(dataset))).astype(int).tolist()
        conditions, _ = self._encode(dataset, numbers)
        keys = [(self.args.seed, EVALUATION, number) for number in numbers]
        self.model.eval()
        with self.ema.applied():
            # the same weights are not painted anew: the last bit may differ, and that would be a new release
            weights = fingerprint(self.denoiser)
            if self._pictures is None or self._pictures[0] != weights:
                after = self.sampler.generate(conditions, keys).images
                with self._reference():
                    before = self.sampler.generate(conditions, keys).images
                self._pictures = weights, before.cpu(), after.cpu()
        _, before, after = self._pictures
        rows = [dataset[number] for number in numbers]
        labels = self.pipeline.config.get("labels") or LABELS
        return write_gallery(self.args.output_dir, rows, before, after, labels=labels, model=self.hub_model_id)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, **fields) -> None:
        """
        Write the card of the adapter or the tuned pipeline, `README.md`, to `args.output_dir`. That of an adapter has
        pictures of the same conditions before and after, except with FSDP and DeepSpeed, where a single process has
        not got all weights. Arguments as in [`~HubTrainer.create_model_card`].
        """
        whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if self.is_world_process_zero() and self.adapter_name is not None and whole and "widget" not in fields:
            fields["widget"] = self._gallery()
        super().create_model_card(model_name, dataset_name, tags, **fields)

    def model_card(self, model_name: str | None = None, dataset_name: str | None = None, **fields) -> ModelCard:
        args = self.args
        evaluations = [entry for entry in self.state.log_history if "eval_reward" in entry]
        entries = evaluations or [entry for entry in self.state.log_history if "reward" in entry]
        prefix = "eval_" if evaluations else ""
        heads = ["reward", *(f"rewards/{name}/mean" for name in self.reward_names or [])]
        if evaluations and self.eval_scorer is not None:  # what was never trained on
            heads += [f"heldout/{name}/mean" for name in self.eval_scorer.names]
        make_card, after = (pipeline_card, "value") if self.adapter_name is None else (adapter_card, "after")
        if self.adapter_name is not None:
            fields = {**self._raters(), "denoiser": denoiser_name(self.pipeline), **fields}
        return make_card(
            **{
                "name": model_name or Path(args.output_dir).name,
                "base_model": str(self._base_model),
                "repo_id": self.hub_model_id or args.output_dir,
                "training_data": (
                    f"{self.state.global_step} updates of DDPO on {len(self.train_dataset)} conditions of "
                    f"{dataset_name or self.dataset_name or 'an unnamed data set'}, {args.num_generations} images of "
                    "each at a time."
                ),
                "evaluation": {
                    head: {"before": entries[0][prefix + head], after: entries[-1][prefix + head]} for head in heads
                }
                if entries
                else {},
                "eval_dataset": (
                    f"{len(self.eval_dataset)} unseen conditions" if evaluations else "the conditions of the training"
                ),
                "command": shlex.join(sys.argv),
                "seed": args.seed,
                "limits": ["The rewards are what it was tuned for: judge it by measures that were not."],
                "example_prompt": self.train_dataset[0]["prompt"],
                "pipeline_class": type(self.pipeline).__name__,
                "commit": source_commit(),
                **fields,
            }
        )
