"""Configuration of the DDPO trainer."""

import json
from dataclasses import dataclass, field

from transformers import TrainingArguments

from onereward.policy import seeded_generator, stochastic_window


@dataclass
class DDPOConfig(TrainingArguments):
    r"""
    Configuration of [`DDPOTrainer`].

    Only what is special to DDPO, or has another default than in [`~transformers.TrainingArguments`], is listed.

    A rollout makes `per_device_generation_batch_size` images on each device, whole groups of `num_generations` images
    of one condition. Each image gives `window_size` transitions to train on, in batches of
    `per_device_train_batch_size`. By default all of them make one update.

    Args:
        > Parameters that control the rollout

        per_device_generation_batch_size (`int`, *optional*, defaults to `64`):
            Images that each device makes in a rollout. A multiple of `num_generations`.
        num_generations (`int`, *optional*, defaults to `8`):
            Images of one condition, the group that advantages are relative to. May be 1 with another `baseline` than
            `"group"`.
        num_iterations (`int`, *optional*, defaults to `1`):
            How often each rollout is trained on.
        num_inference_steps (`int`, *optional*, defaults to `20`):
            Denoising steps of a rollout and of an evaluation.
        eta (`float`, *optional*, defaults to `1.0`):
            Stochasticity of the steps inside the window, above 0 and up to 1. Outside they are deterministic.
        flow_sampler (`str`, *optional*, defaults to `"sde"`):
            Stochastic step of flow-matching denoisers: `"sde"` ([Flow-GRPO](https://huggingface.co/papers/2505.05470),
            which uses an `eta` of 0.7) or `"cps"` ([coefficients-preserving
            sampling](https://huggingface.co/papers/2509.05952)). Other denoisers take DDIM steps.
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
            of what it returns. When not given 1 each, and 0 for those in `reward_constraints`.
        reward_constraints (`dict[str, float]`, *optional*):
            Least acceptable reward of some heads, by name. An image below it is never reinforced, and is pushed away
            from by how far it falls short.
        baseline (`str`, *optional*, defaults to `"group"`):
            What an image's reward is compared to: `"group"`, the others of its group; `"running"`, the last rewards
            of its condition, as in [DDPO](https://huggingface.co/papers/2305.13301); `"value"`, a small network's
            forecast from the noisy image, as in [PPO](https://huggingface.co/papers/1707.06347) and
            [DPOK](https://huggingface.co/papers/2305.16381).
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            What a head's rewards are divided by with the `"group"` baseline: the standard deviation of each `"group"`,
            that of the `"batch"`, or `"none"`.
        multi_objective_aggregation (`str`, *optional*, defaults to `"normalize_then_sum"`):
            Whether heads are normalised one by one and then summed, or summed first (`"sum_then_normalize"`, and
            always so with the `"value"` baseline).
        reward_std_floor (`float`, *optional*, defaults to `1e-4`):
            Added to the standard deviation of a head, in units of the reward, so that a saturated head stays silent.
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            Advantages are clipped to plus and minus this.
        running_buffer_size (`int`, *optional*, defaults to `32`):
            Rewards of each condition that the `"running"` baseline remembers.
        running_min_count (`int`, *optional*, defaults to `16`):
            With fewer, it compares with the whole rollout.
        async_rewards (`bool`, *optional*, defaults to `False`):
            Whether images are scored in threads while the next ones are made.
        reward_timeout (`float`, *optional*):
            Seconds that a call of a reward function may take. Unlimited when not given.
        reward_retries (`int`, *optional*, defaults to `0`):
            How often a call that failed, or took too long, is made again.
        on_reward_error (`str`, *optional*, defaults to `"raise"`):
            What happens then: `"raise"`, or `"skip"`, where the function does not score these images.

        > Parameters that control the training

        learning_rate (`float`, *optional*, defaults to `1e-3`):
            Peak learning rate of AdamW. For all weights instead of an adapter take 1e-5 or so.
        adam_epsilon (`float`, *optional*, defaults to `1e-12`):
            Epsilon of AdamW. Log-probabilities are means over thousands of elements and their gradients small, often
            below the usual `1e-8`, which would then shrink every update.
        per_device_train_batch_size (`int`, *optional*, defaults to `16`):
            Rows that go through the denoiser at once: images of a rollout, and transitions of a training pass. It
            divides `per_device_generation_batch_size`, and both passes then see the same batches, so that the ratio
            of an untouched policy is exactly 1; or it is a multiple of it, and several steps are folded into a batch.
        gradient_accumulation_steps (`int`, *optional*):
            Batches of an update. All those of a rollout when not given.
        estimator (`str`, *optional*, defaults to `"importance_sampling"`):
            Of the policy gradient, both of [DDPO](https://huggingface.co/papers/2305.13301): `"importance_sampling"`
            with a clipped ratio, or `"score_function"`, for one update a rollout.
        epsilon (`float`, *optional*, defaults to `1e-4`):
            Clip range of the ratio of log-probabilities, which are means over the masked elements.
        epsilon_high (`float`, *optional*):
            Upper clip range. Equal to `epsilon` when not given.
        ratio_normalization (`bool`, *optional*, defaults to `False`):
            Whether ratios are centred and brought to one scale for all steps, as in
            [GRPO-Guard](https://huggingface.co/papers/2510.22319).
        vf_coef (`float`, *optional*, defaults to `0.1`):
            Weight of the loss of the `"value"` baseline's network.
        beta (`float`, *optional*, defaults to `0.0`):
            Weight of the KL divergence from the denoiser without its adapter, or before the training where all weights
            are trained, in nats per masked element. At 0 that denoiser is not run.
        kl_target (`float`, *optional*):
            Divergence that `beta` is adapted to hold, by factors of 2 after each update, down to a 64th and up to
            1024 times of what it starts from, which must be above 0.
        ema_decay (`float`, *optional*):
            Decay of an exponential moving average of the weights over updates. When given, it is the average that is
            evaluated and saved.

        > Parameters that control logging

        logging_steps (`float`, *optional*, defaults to `1`):
            Updates between two logs.
        log_samples_steps (`int`, *optional*):
            Updates between two pictures of samples in `output_dir/samples`, which also go to TensorBoard, trackio and
            wandb when `report_to` names them. None are made when not given.
        hub_base_model (`str`, *optional*):
            Id on the Hub of the pipeline that was loaded from a folder here: an adapter that is published must say
            which one it is for.
    """

    output_dir: str | None = field(default="ddpo", metadata={"help": "Where adapter and checkpoints are written."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    adam_epsilon: float = field(default=1e-12, metadata={"help": "Epsilon of AdamW."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows per denoiser call and device."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Images per denoiser call in evaluation."})
    gradient_accumulation_steps: int | None = field(
        default=None, metadata={"help": "Batches of an update; those of a whole rollout by default."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Updates between two logs."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Reward functions get all columns."})

    per_device_generation_batch_size: int = field(default=64, metadata={"help": "Images of a rollout and device."})
    num_generations: int = field(default=8, metadata={"help": "Images of one condition, a group."})
    num_iterations: int = field(default=1, metadata={"help": "How often each rollout is trained on."})
    num_inference_steps: int = field(default=20, metadata={"help": "Denoising steps of a rollout."})
    eta: float = field(default=1.0, metadata={"help": "Stochasticity of the steps inside the window."})
    flow_sampler: str = field(default="sde", metadata={"help": "'sde' or 'cps', for flow-matching denoisers."})
    window_size: int = field(default=4, metadata={"help": "Consecutive steps that are stochastic and trained."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Weight of classifier-free guidance; 1 is off."})
    same_initial_noise: bool = field(default=True, metadata={"help": "Whether a group starts from one noise."})

    reward_weights: list[float] | None = field(default=None, metadata={"help": "Weight of each reward head."})
    reward_constraints: dict | str | None = field(
        default=None, metadata={"help": "Least acceptable reward of heads by name, e.g. '{\"quality\": 0.5}'."}
    )
    baseline: str = field(default="group", metadata={"help": "Compare rewards to 'group', 'running' or 'value'."})
    scale_rewards: str = field(default="group", metadata={"help": "Scale rewards by 'group', 'batch' or 'none'."})
    multi_objective_aggregation: str = field(
        default="normalize_then_sum", metadata={"help": "'normalize_then_sum' or 'sum_then_normalize'."}
    )
    reward_std_floor: float = field(default=1e-4, metadata={"help": "Added to the standard deviation of a head."})
    advantage_clip: float = field(default=5.0, metadata={"help": "Advantages are clipped to plus and minus this."})
    running_buffer_size: int = field(default=32, metadata={"help": "Rewards of each condition that are remembered."})
    running_min_count: int = field(default=16, metadata={"help": "With fewer, the whole rollout is the baseline."})
    async_rewards: bool = field(default=False, metadata={"help": "Score images while the next ones are made."})
    reward_timeout: float | None = field(default=None, metadata={"help": "Seconds for a call of a reward function."})
    reward_retries: int = field(default=0, metadata={"help": "How often a failed call is made again."})
    on_reward_error: str = field(default="raise", metadata={"help": "'raise' or 'skip' when a call keeps failing."})

    estimator: str = field(
        default="importance_sampling", metadata={"help": "'importance_sampling' or 'score_function'."}
    )
    epsilon: float = field(default=1e-4, metadata={"help": "Clip range of the policy ratio."})
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip range; as epsilon by default."})
    ratio_normalization: bool = field(default=False, metadata={"help": "Centre and scale ratios, as GRPO-Guard."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value network's loss."})
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL divergence from the reference."})
    kl_target: float | None = field(default=None, metadata={"help": "Divergence that beta is adapted to hold."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of a moving average of the weights."})

    log_samples_steps: int | None = field(default=None, metadata={"help": "Updates between pictures of samples."})
    hub_base_model: str | None = field(
        default=None, metadata={"help": "Id on the Hub of the pipeline, where it was loaded from a folder here."}
    )

    def __post_init__(self):
        images, rows = self.per_device_generation_batch_size, self.per_device_train_batch_size
        transitions = images * self.window_size
        if images % self.num_generations:
            raise ValueError(
                f"`per_device_generation_batch_size` is {images}; expected a multiple of `num_generations` "
                f"({self.num_generations}), whole groups."
            )
        if images % rows and (rows % images or transitions % rows):
            raise ValueError(
                f"`per_device_train_batch_size` is {rows}; expected a divisor of `per_device_generation_batch_size` "
                f"({images}), or a multiple of it that divides its {transitions} transitions (times `window_size`)."
            )
        if self.gradient_accumulation_steps is None:
            self.gradient_accumulation_steps = self.steps_per_generation
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"`gradient_accumulation_steps` is {self.gradient_accumulation_steps}; expected a divisor of the "
                f"{self.steps_per_generation} batches of a rollout, so that updates do not mix rollouts."
            )
        super().__post_init__()
        if self.ddp_find_unused_parameters is None:  # every trained weight takes part in every call
            self.ddp_find_unused_parameters = False
        if isinstance(self.reward_constraints, str):
            self.reward_constraints = json.loads(self.reward_constraints)
        for name, options in (
            ("baseline", ("group", "running", "value")),
            ("scale_rewards", ("group", "batch", "none")),
            ("multi_objective_aggregation", ("normalize_then_sum", "sum_then_normalize")),
            ("estimator", ("importance_sampling", "score_function")),
            ("flow_sampler", ("sde", "cps")),
            ("on_reward_error", ("raise", "skip")),
        ):
            if getattr(self, name) not in options:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; expected one of {list(options)}.")
        if self.num_generations < 2 and self.baseline == "group":
            raise ValueError(
                f"`num_generations` is {self.num_generations}; expected at least 2: advantages compare its members. "
                "For one image of each condition take another `baseline`."
            )
        if not 0 < self.eta <= 1:
            raise ValueError(f"`eta` is {self.eta}; expected above 0 and up to 1: without noise nothing is learned.")
        if self.kl_target is not None and self.beta <= 0:
            raise ValueError(f"`kl_target` is {self.kl_target} but `beta` is {self.beta}; set `beta` to start from.")
        if self.estimator == "score_function" and self.updates_per_generation > 1:
            raise ValueError(
                f"`estimator` is 'score_function', which is right for one update a rollout, but there are "
                f"{self.updates_per_generation}; leave `gradient_accumulation_steps` out and `num_iterations` at 1."
            )
        if self.estimator == "score_function" and self.ratio_normalization:
            raise ValueError("`ratio_normalization` is on, but the 'score_function' estimator has no ratio.")
        stochastic_window(self.num_inference_steps, self.window_size, seeded_generator(0))  # checks that it fits

    @property
    def groups_per_generation(self) -> int:
        """Groups that each device makes in a rollout."""
        return self.per_device_generation_batch_size // self.num_generations

    @property
    def steps_per_generation(self) -> int:
        """Training batches of a rollout on each device."""
        return self.per_device_generation_batch_size * self.window_size // self.per_device_train_batch_size

    @property
    def updates_per_generation(self) -> int:
        """Updates made with each rollout."""
        return self.steps_per_generation * self.num_iterations // self.gradient_accumulation_steps
