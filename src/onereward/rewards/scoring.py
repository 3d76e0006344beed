"""Calls reward functions, in turn or in threads beside the sampling, and reads what they return."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial

import torch

from onereward.rewards.advantages import as_rewards
from onereward.rewards.modeling_onereward import OneRewardModel


# A reward function gets `images`, `masks`, `sources`, `label_maps`, `prompts` and the columns of the data set, and
# returns one number an image, or a dict of head -> numbers.
RewardFunc = str | OneRewardModel | Callable


def _in_thread(func: Callable[[], dict], after: Future | None = None) -> Future:
    """Call a function in a thread of its own, once the call before it is over and unless it is cancelled by then."""
    result = Future()

    def run():
        if after is not None:
            wait([after])
        if result.set_running_or_notify_cancel():
            try:
                result.set_result(func())
            except BaseException as error:  # whatever it is, the thread that waits for the result raises it
                result.set_exception(error)

    # A daemon: a call that hangs for ever must not keep the process from ending.
    threading.Thread(target=run, daemon=True).start()
    return result


class RewardScorer:
    r"""
    The reward functions of a training, and their heads.

    Args:
        reward_funcs (`list[OneRewardModel | Callable]`):
            Reward models, and functions of keyword arguments; see [`DDPOTrainer`].
        asynchronous (`bool`, *optional*, defaults to `False`):
            Whether [`~RewardScorer.submit`] returns at once and the functions run in threads, one for each function,
            whose calls keep their order.
        timeout (`float`, *optional*):
            Seconds that a call may take once its turn has come; the wait for it is over then.
        retries (`int`, *optional*, defaults to 0):
            How often a call that failed, or took too long, is made again before the next one has its turn.
        on_error (`str`, *optional*, defaults to `"raise"`):
            What happens after that: `"raise"`, or `"skip"`, where the images count as not scored by that function.

    Example:

    ```python
    >>> scorer = RewardScorer([lambda images, **_: images.mean((1, 2, 3))])
    >>> scorer.collect([scorer.submit({"images": torch.ones(2, 1, 8, 8)})])
    tensor([[1.],
            [1.]])
    ```
    """

    def __init__(
        self,
        reward_funcs: list[OneRewardModel | Callable],
        asynchronous: bool = False,
        timeout: float | None = None,
        retries: int = 0,
        on_error: str = "raise",
    ):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"`on_error` is {on_error!r}; expected 'raise' or 'skip'.")
        self.reward_funcs = reward_funcs
        self.asynchronous, self.timeout, self.retries, self.on_error = asynchronous, timeout, retries, on_error
        self.names: list[str] | None = None  # of the heads, known once the functions have been called
        self._heads = [None] * len(reward_funcs)  # of each function
        self._last: list[Future | None] = [None] * len(reward_funcs)  # calls, which the next ones wait for

    def submit(self, arguments: dict) -> tuple[dict, list]:
        """
        Have a batch of images scored.

        Args:
            arguments (`dict`):
                Keyword arguments of the functions, `images` of shape `(B, C, H, W)` among them.

        Returns:
            `tuple[dict, list]`: what [`~RewardScorer.collect`] wants.
        """
        calls = [partial(self._attempts, i, arguments) for i in range(len(self.reward_funcs))]
        if self.asynchronous:
            calls = self._last = [_in_thread(*turn) for turn in zip(calls, self._last, strict=True)]
        return arguments, calls

    def _name(self, i: int) -> str:
        return getattr(self.reward_funcs[i], "__name__", type(self.reward_funcs[i]).__name__)

    @torch.no_grad()  # threads begin with gradients on
    def _call(self, i: int, arguments: dict) -> dict:
        func = self.reward_funcs[i]
        if isinstance(func, OneRewardModel):
            names = ("images", "masks", "sources", "label_maps", "prompts")
            rewards = func.score(**{name: arguments[name] for name in names}, tasks=arguments["task"])
        else:
            rewards = func(**arguments)
        return rewards if isinstance(rewards, dict) else {self._name(i): rewards}

    def _attempts(self, i: int, arguments: dict) -> dict:
        """What a function returns, after another attempt or two where it fails; each has the whole `timeout`."""
        for _ in range(self.retries + 1):
            try:
                if self.timeout is None:
                    return self._call(i, arguments)
                call = _in_thread(partial(self._call, i, arguments))
                if wait([call], self.timeout).done:
                    return call.result()
                what, cause = f"took more than `reward_timeout` ({self.timeout:g} s)", None
            except Exception as error:
                if self.retries == 0:
                    raise  # as it came: the function's own traceback says most
                what, cause = f"failed with {type(error).__name__}: {error}", error
        raise RuntimeError(f"The reward function {self._name(i)!r} {what}, {self.retries + 1} times.") from cause

    def _finish(self, i: int, call: Callable[[], dict] | Future, count: int) -> dict:
        """What a call returned for `count` images, or that it could not score them."""
        try:
            return call.result() if self.asynchronous else call()
        except Exception:
            if self.on_error == "raise" or self._heads[i] is None:
                raise
        return {name: [None] * count for name in self._heads[i]}

    def collect(self, submitted: list[tuple[dict, list]]) -> torch.Tensor:
        """
        The rewards of batches that were submitted.

        Args:
            submitted (`list[tuple[dict, list]]`):
                What [`~RewardScorer.submit`] returned, in any number.

        Returns:
            `torch.Tensor`: float32 of shape `(images, heads)` on the device of the images, NaN where an image could
            not be scored.

        Raises:
            `ValueError`: when a function does not return one number for each image, two heads share a name, or the
            heads change. `RuntimeError`: when a call failed or took too long, and `on_error` is `"raise"`; the first
            call of a function, which tells its heads, cannot be skipped.
        """
        try:
            return torch.cat([self._collect(*batch) for batch in submitted])
        except BaseException:
            if self.asynchronous:
                for call in (call for _, calls in submitted for call in calls):
                    call.cancel()  # nobody waits for those that have not begun
            raise

    def _collect(self, arguments: dict, calls: list) -> torch.Tensor:
        count, device = len(arguments["images"]), arguments["images"].device
        heads = []
        for i, call in enumerate(calls):
            rewards = self._finish(i, call, count)
            self._heads[i] = list(rewards)
            heads += rewards.items()
        names = [name for name, _ in heads]
        if self.names is None and len(set(names)) < len(names):
            raise ValueError(f"The reward heads are {names}; expected different names. Rename a reward function.")
        if self.names not in (None, names):
            raise ValueError(f"The reward functions returned the heads {names}, after {self.names} before.")
        self.names = names
        return torch.stack([as_rewards(values, name, count).to(device) for name, values in heads], dim=1)
