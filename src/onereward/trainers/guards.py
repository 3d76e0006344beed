"""Callbacks that watch a training on rewards for signs that the rewards are hacked, and say so or stop it.

They read what the trainer logs, all of it kept in `trainer_state.json`, so that a resumed training goes on with the
whole history. The rewards themselves are guarded in `onereward.rewards.composed`.
"""

import math

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging


logger = logging.get_logger(__name__)


class Guard(TrainerCallback):
    """
    What the guards have in common: each looks at the log after every entry, and says once for each metric what is
    wrong and what helps. The message goes to the log of the program and, as an entry `{"guard", "metric", "message",
    "step"}`, to `log_history`.

    Args:
        on_trigger (`str`, *optional*, defaults to `"warn"`):
            `"warn"`, or `"stop"`, which also ends the training after the update (with `load_best_model_at_end=True`
            the best model is loaded then, as always).

    Raises:
        `ValueError`: when `on_trigger` is unknown.
    """

    def __init__(self, on_trigger: str = "warn"):
        if on_trigger not in ("warn", "stop"):
            raise ValueError(f"`on_trigger` is {on_trigger!r}; expected 'warn' or 'stop'.")
        self.on_trigger = on_trigger

    def check(self, history: list[dict]) -> dict[str, str]:
        """
        What is wrong at the end of a log.

        Args:
            history (`list[dict]`):
                Entries of `trainer.state.log_history`, oldest first.

        Returns:
            `dict[str, str]`: metric -> message.
        """
        raise NotImplementedError

    def requirement(self, args: TrainingArguments) -> str | None:
        """What keeps the guard from seeing anything with these settings, if so."""
        return None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        missing = self.requirement(args)
        if missing and state.is_world_process_zero:
            logger.warning(f"{type(self).__name__} has nothing to watch: {missing}")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        found = self.check(state.log_history)
        if args.world_size > 1:
            # Some metrics are a process's own, and all processes must stop at the same update, or they wait for ever.
            (found,) = broadcast_object_list([found])
        name = type(self).__name__
        said = {entry["metric"] for entry in state.log_history if entry.get("guard") == name}
        for metric, message in found.items():
            if metric in said:
                continue
            if self.on_trigger == "stop":
                message += " The training stops here."
            state.log_history.append({"guard": name, "metric": metric, "message": message, "step": state.global_step})
            if state.is_world_process_zero:
                logger.warning(f"{name}, step {state.global_step}: {message}")
        if found and self.on_trigger == "stop":
            control.should_training_stop = True
        return control


class HeldOutGuard(Guard):
    r"""
    Watches rewards that are never trained on (`eval_reward_funcs` of [`DDPOTrainer`]): they say whether what is gained
    is worth anything.

    Triggers when such a head has been below its best for `patience` evaluations in a row while `eval_reward` was above
    what it was then: the measure rises and what it stands for falls, overoptimisation as in [Gao et
    al.](https://huggingface.co/papers/2210.10760). When both fall it triggers too, with another message.

    Args:
        patience (`int`, *optional*, defaults to 3):
            Evaluations in a row.
        tolerance (`float`, *optional*, defaults to 0.0):
            How far below its best a head may be, in its own unit; the standard error of its mean over the rows of
            `eval_dataset`, say.
        on_trigger (`str`, *optional*, defaults to `"warn"`):
            `"warn"` or `"stop"`.

    Example:

    ```python
    >>> trainer = DDPOTrainer(
    ...     pipeline, reward, args, train, test, eval_reward_funcs=judge, callbacks=[HeldOutGuard(on_trigger="stop")]
    ... )
    ```
    """

    def __init__(self, patience: int = 3, tolerance: float = 0.0, on_trigger: str = "warn"):
        super().__init__(on_trigger)
        if patience < 1:
            raise ValueError(f"`patience` is {patience}; expected 1 or more evaluations.")
        self.patience, self.tolerance = patience, tolerance

    def requirement(self, args):
        if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
            return "`eval_strategy` is 'no'. Set it to 'steps', and pass `eval_dataset` and `eval_reward_funcs`."

    def check(self, history):
        found = {}
        for head in _metrics(history, "eval_heldout/", "/mean"):
            # a server that was down leaves NaN
            entries = [e for e in history if all(math.isfinite(e.get(m, math.nan)) for m in ("eval_reward", head))]
            if not entries:
                continue
            values = [entry[head] for entry in entries]
            best = max(range(len(values)), key=lambda i: values[i])
            recent = range(max(best + 1, len(values) - self.patience), len(values))
            if len(recent) < self.patience or not all(values[i] < values[best] - self.tolerance for i in recent):
                continue
            gains = [entries[i]["eval_reward"] - entries[best]["eval_reward"] for i in recent]
            story = (
                f"`{head}`, which is not trained on, fell from {values[best]:.4g} at step {entries[best]['step']} to "
                f"{values[-1]:.4g}, while `eval_reward` "
            )
            if min(gains) > 0:
                found[head] = story + (
                    f"rose by {gains[-1]:.4g}: the reward is being hacked. Go back to step {entries[best]['step']}; "
                    "raise `beta`, cap the reward or take an ensemble (`capped`, `pessimistic`), or make what was "
                    "lost a `reward_constraints`."
                )
            elif max(gains) <= 0:
                found[head] = story + (
                    "did not rise either: the training is unstable. Lower `learning_rate`, or set `ema_decay=0.9`."
                )
        return found


class VarianceGuard(Guard):
    r"""
    Watches the standard deviation of each head within the groups, `rewards/{head}/std`. A reward model that is hacked
    gives every image the same high score ([RewardDance](https://huggingface.co/papers/2509.08826), section 4), and
    what is then left of the differences is blown up by the normalisation, the "illusory advantage" of
    [Pref-GRPO](https://huggingface.co/papers/2508.20751).

    Triggers when a head's mean over the last `window` entries of the log is below `share` of that over the first
    `window`. A head that was 0 from the start, as a constraint may be, is left out, and so are entries without it: no
    group had two images that it could score.

    Args:
        share (`float`, *optional*, defaults to 0.1):
            The least share of the standard deviation at the start, between 0 and 1.
        window (`int`, *optional*, defaults to 5):
            Entries of the log that are averaged.
        on_trigger (`str`, *optional*, defaults to `"warn"`):
            `"warn"` or `"stop"`.
    """

    def __init__(self, share: float = 0.1, window: int = 5, on_trigger: str = "warn"):
        super().__init__(on_trigger)
        if not 0 < share < 1:
            raise ValueError(f"`share` is {share}; expected a share between 0 and 1 of the spread at the start.")
        self.share, self.window = share, _checked_window(window)

    def check(self, history):
        found = {}
        for metric in _metrics(history, "rewards/", "/std"):
            values = [entry[metric] for entry in history if metric in entry]
            if len(values) < 2 * self.window:
                continue
            start, now = _mean(values[: self.window]), _mean(values[-self.window :])
            if now < self.share * start:
                head = metric.removeprefix("rewards/").removesuffix("/std")
                found[metric] = (
                    f"`{metric}` collapsed from {start:.3g} to {now:.3g}: the images of a group earn the same of "
                    f"{head!r}. If its mean is near the greatest there is, it is used up, or hacked: look at the "
                    "images, cap it (`capped`) or train the reward model on them. If not, the images have become "
                    "alike: raise `beta`, widen `window_size`, or set `same_initial_noise=False`."
                )
        return found


class DriftGuard(Guard):
    r"""
    Watches `kl`, the divergence from the denoiser before the training, for one masked element and step. How far a
    reward can be trusted ends at some divergence ([Gao et al.](https://huggingface.co/papers/2210.10760)), which
    differs from reward to reward.

    Triggers when the mean over the last `window` entries of the log is above `limit`.

    Args:
        limit (`float`):
            The greatest `kl`. There is no common value: take twice what a run came to whose images you approved of,
            or twice `kl_target`.
        window (`int`, *optional*, defaults to 5):
            Entries of the log that are averaged.
        on_trigger (`str`, *optional*, defaults to `"warn"`):
            `"warn"` or `"stop"`.
    """

    def __init__(self, limit: float, window: int = 5, on_trigger: str = "warn"):
        super().__init__(on_trigger)
        if not limit > 0:
            raise ValueError(f"`limit` is {limit}; expected a divergence above 0.")
        self.limit, self.window = limit, _checked_window(window)

    def requirement(self, args):
        if not getattr(args, "beta", 0):
            return "`beta` is 0, so that `kl` is not computed. Set it, to 1e-8 if it is to be watched and not to act."

    def check(self, history):
        now = _recent_mean(history, "kl", self.window)
        if now <= self.limit:  # NaN, a diverged training, is none of these
            return {}
        return {
            "kl": f"`kl` is {now:.3g}, above the limit of {self.limit:g}: the policy has left the range where the "
            "reward was tried. Raise `beta` or set `kl_target`, lower `learning_rate`, or stop here and look at the "
            "images."
        }


class ClipGuard(Guard):
    r"""
    Watches `clip_ratio`, the share of denoising steps whose ratio left the trust region of
    [PPO](https://huggingface.co/papers/1707.06347). Beyond it the gradient is cut off, and the updates go on with
    what remains, further off the policy that made the images.

    Triggers when the mean over the last `window` entries of the log is above `limit`.

    Args:
        limit (`float`, *optional*, defaults to 0.5):
            The greatest `clip_ratio`, between 0 and 1.
        window (`int`, *optional*, defaults to 5):
            Entries of the log that are averaged.
        on_trigger (`str`, *optional*, defaults to `"warn"`):
            `"warn"` or `"stop"`.
    """

    def __init__(self, limit: float = 0.5, window: int = 5, on_trigger: str = "warn"):
        super().__init__(on_trigger)
        if not 0 < limit < 1:
            raise ValueError(f"`limit` is {limit}; expected a share of steps between 0 and 1.")
        self.limit, self.window = limit, _checked_window(window)

    def check(self, history):
        now = _recent_mean(history, "clip_ratio", self.window)
        if now <= self.limit:
            return {}
        return {
            "clip_ratio": f"`clip_ratio` is {now:.3g}, above {self.limit:g}: most steps are cut off. Make fewer "
            "updates with each rollout (`num_iterations`, `gradient_accumulation_steps`), lower `learning_rate`, or "
            "raise `epsilon`."
        }


def _checked_window(window):
    if window < 1:
        raise ValueError(f"`window` is {window}; expected 1 or more entries of the log.")
    return window


def _metrics(history, prefix, suffix):
    names = {name for entry in history for name in entry if name.startswith(prefix) and name.endswith(suffix)}
    return sorted(names)


def _mean(values):
    return math.fsum(values) / len(values)


def _recent_mean(history, metric, window):
    """Mean of the last `window` values, 0 while there are fewer."""
    values = [entry[metric] for entry in history if metric in entry]
    return _mean(values[-window:]) if len(values) >= window else 0.0
