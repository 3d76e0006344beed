"""Images of a policy, with what of their making a policy gradient is trained on."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from onereward.pipelines import MaskConditions
from onereward.policy import Transition, ddim_alphas, ddim_step, flow_step, seeded_generator
from onereward.trainers.ddpo_config import DDPOConfig


class Chain(NamedTuple):
    r"""
    The denoising steps of a rollout.

    Args:
        timesteps (`torch.Tensor`):
            What the denoiser is told, of shape `(T,)`, noisiest first.
        levels (`torch.Tensor`):
            $\bar\alpha$ before each step, or the noise level $\sigma$ of a flow-matching denoiser, of shape `(T,)`.
        next_levels (`torch.Tensor`):
            The same after each step.
    """

    timesteps: torch.Tensor
    levels: torch.Tensor
    next_levels: torch.Tensor


class Samples(NamedTuple):
    """
    Images of a policy, and what of their making is trained on. Members of a group lie side by side.

    Args:
        images (`torch.Tensor`):
            Images of shape `(N, C, H, W)`, floats in [0, 1].
        latents (`torch.Tensor` or `None`):
            Latents before each step of the window and after its last, float32 of shape `(N, window + 1, c, h, w)`.
            `None` without a window, as the next two.
        log_probs (`torch.Tensor` or `None`):
            Log-probability of each step of the window, of shape `(N, window)`.
        means (`torch.Tensor` or `None`):
            Mean of each step of the window, of shape `(N, window, c, h, w)`; only for `ratio_normalization`.
    """

    images: torch.Tensor
    latents: torch.Tensor | None
    log_probs: torch.Tensor | None
    means: torch.Tensor | None


def join_samples(parts: list[Samples]) -> Samples:
    """Several batches as one."""
    return Samples(*(None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True)))


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


class PolicySampler:
    """
    Generates images with the current policy, in steps whose densities the training pass recomputes with the same
    function.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline. Its scheduler stays where it is a [`~diffusers.DDIMScheduler`] or a
            [`~diffusers.FlowMatchEulerDiscreteScheduler`]; another is replaced by DDIM with the same noise schedule.
        denoise (`Callable`):
            The policy: from latents, timestep and conditions to what the denoiser predicts.
        args ([`DDPOConfig`]):
            Settings of the rollout.

    Raises:
        `ValueError`: when the scheduler cannot be turned into a policy, e.g. another one of flow matching.
    """

    def __init__(self, pipeline: DiffusionPipeline, denoise: Callable, args: DDPOConfig):
        self.pipeline, self.denoise, self.args = pipeline, denoise, args
        self.watch, self.num_calls = Stopwatch(args.device), 0  # of the denoiser
        self.is_flow = isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
        if not self.is_flow and not isinstance(pipeline.scheduler, DDIMScheduler):
            config = pipeline.scheduler.config
            if not hasattr(pipeline.scheduler, "alphas_cumprod") or config.get("use_flow_sigmas"):
                raise ValueError(
                    f"The pipeline's scheduler is {type(pipeline.scheduler).__name__}, whose steps are neither those "
                    "of a noise schedule `alphas_cumprod` nor Euler's of flow matching. For a denoiser of flow "
                    "matching set `pipeline.scheduler = "
                    "FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)`."
                )
            # DDIM clips unless it is told not to; schedulers without the option do not, and latents exceed 1.
            clip_sample = config.get("clip_sample", False)
            pipeline.scheduler = DDIMScheduler.from_config(config, clip_sample=clip_sample)
        if pipeline.scheduler.config.get("thresholding"):
            raise ValueError("The scheduler has `thresholding`, under which a step is no Gaussian; switch it off.")
        if pipeline.scheduler.config.get("stochastic_sampling"):
            raise ValueError("The scheduler has `stochastic_sampling`; switch it off: the noise is the policy's.")

    def chain(self, conditions: MaskConditions) -> Chain:
        """The denoising steps for images of this size."""
        scheduler = self.pipeline.scheduler
        timesteps = self.pipeline.set_timesteps(self.args.num_inference_steps, conditions, conditions.mask.device)
        if self.is_flow:
            levels = scheduler.sigmas.to(timesteps.device, torch.float32)
            return Chain(timesteps, levels[:-1], levels[1:])
        return Chain(timesteps, *ddim_alphas(scheduler.alphas_cumprod, timesteps, scheduler.final_alpha_cumprod))

    def transition(self, chain: Chain, steps: int | torch.Tensor, model_output, latents, mask, **kwargs) -> Transition:
        """One denoising step, or one for each row when `steps` is a tensor, as a Gaussian."""
        levels, config = (chain.levels[steps], chain.next_levels[steps]), self.pipeline.scheduler.config
        if self.is_flow:
            sampler = {"sampler": self.args.flow_sampler, "sigma_max": chain.levels[1]}
            return flow_step(model_output, latents, *levels, mask=mask, **sampler, **kwargs)
        clip = config.clip_sample_range if config.clip_sample else None
        kwargs = {"prediction_type": config.prediction_type, "clip_sample_range": clip, **kwargs}
        return ddim_step(model_output, latents, *levels, mask=mask, **kwargs)

    def run(self, chain: Chain, steps: range, latents, conditions, initial_noise, window=range(0), window_noise=None):
        """
        Take some steps of the chain, those in `window` with `window_noise` of shape `(len(window), B, c, h, w)`. Gives
        the latents after them; those before each step of the window and after its last; log-probabilities and means.
        """
        trajectory, log_probs, means = [], [], []
        for step in steps:
            with self.watch:
                model_output = self.denoise(latents, chain.timesteps[step], conditions)
            self.num_calls += 1
            draw = {"eta": 0.0}
            if step in window:
                trajectory.append(latents)
                draw = {"eta": self.args.eta, "noise": window_noise[step - window.start]}
            transition = self.transition(chain, step, model_output, latents, conditions.mask, **draw)
            following = chain.timesteps[step + 1] if step + 1 < len(chain.timesteps) else None
            latents = self.pipeline.reimpose_background(transition.next_sample, conditions, initial_noise, following)
            if step in window:
                log_probs.append(transition.log_prob)
                means.append(transition.mean)
                if step == window[-1]:
                    trajectory.append(latents)
        return latents, trajectory, log_probs, means

    def draw(self, generators: list[torch.Generator], conditions: MaskConditions, *count: int) -> torch.Tensor:
        """Noise of shape `(len(generators), *count, c, h, w)`, drawn on the CPU: the same on every device."""
        shape = (*count, self.pipeline.vae.config.latent_channels, *conditions.mask.shape[2:])
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return noise.to(conditions.mask.device)

    def batches(
        self, chain: Chain, conditions: MaskConditions, keys, num_generations: int, window: range, batch_size: int
    ) -> Iterator[Samples]:
        """Generate images in batches; see [`~PolicySampler.generate`]."""
        groups, count = len(conditions), num_generations

        # What the members of a group have in common: their noise, and the deterministic steps up to the window
        start = window.start if self.args.same_initial_noise else 0
        if self.args.same_initial_noise:
            shared_noise = self.draw([seeded_generator(*key, 0) for key in keys], conditions)
            parts = torch.arange(groups).split(batch_size)
            shared_latents = torch.cat(
                [self.run(chain, range(start), shared_noise[i], conditions[i], shared_noise[i])[0] for i in parts]
            )

        for part in torch.arange(groups * count).split(batch_size):
            group = part // count
            generators = [seeded_generator(*keys[i // count], 1 + i % count) for i in part.tolist()]
            if self.args.same_initial_noise:
                noise, latents = shared_noise[group], shared_latents[group]
            else:
                noise = latents = self.draw(generators, conditions)
            window_noise = self.draw(generators, conditions, len(window)).transpose(0, 1)
            steps, part_conditions = range(start, len(chain.timesteps)), conditions[group]
            latents, *of_window = self.run(chain, steps, latents, part_conditions, noise, window, window_noise)
            images = self.pipeline.decode(latents, part_conditions).float()
            trajectory, log_probs, means = (torch.stack(values, dim=1) if values else None for values in of_window)
            yield Samples(images, trajectory, log_probs, means if self.args.ratio_normalization else None)

    @torch.no_grad()
    def generate(
        self,
        conditions: MaskConditions,
        keys: list[tuple[int, ...]],
        num_generations: int = 1,
        window: range = range(0),
        batch_size: int | None = None,
    ) -> Samples:
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
            [`Samples`].
        """
        batch_size = batch_size or len(conditions) * num_generations
        chain = self.chain(conditions)
        return join_samples(list(self.batches(chain, conditions, keys, num_generations, window, batch_size)))
