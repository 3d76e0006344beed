"""The moving average of the weights that a trainer trains, which is what it evaluates and publishes."""

import os
from collections.abc import Iterable
from contextlib import contextmanager

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback


WEIGHTS_BEHIND_EMA = "weights_behind_ema.safetensors"


class WeightAverage(TrainerCallback):
    r"""
    $\bar\theta \leftarrow d \bar\theta + (1 - d) \theta$ after each update, with $d$ warming up as
    $\min(\mathrm{decay}, (1 + n) / (10 + n))$ over $n$ updates.

    Args:
        parameters (`Iterable[torch.nn.Parameter]`):
            The weights.
        decay (`float`, *optional*):
            Decay of the average. Without it there is no average, and every method does nothing.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float | None):
        self.decay = decay
        self.parameters = [] if decay is None else list(parameters)
        self.averages = [p.detach().clone() for p in self.parameters]

    def on_step_end(self, args, state, control, **kwargs):
        if self.averages:
            decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
            torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)

    def swap(self) -> None:
        """Exchange the weights and their average; once more changes them back."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            parameter.data, average.data = average.data, parameter.data

    @contextmanager
    def applied(self):
        """The average takes the place of the weights inside `with`."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def save_weights_behind(self, folder: str | os.PathLike) -> None:
        """Write the weights themselves: a folder of published weights holds the average, resuming needs both."""
        if self.averages:
            weights = {str(i): p.detach().contiguous() for i, p in enumerate(self.parameters)}
            save_file(weights, os.path.join(folder, WEIGHTS_BEHIND_EMA))

    def load_weights_behind(self, folder: str | os.PathLike) -> None:
        """Take what the folder published, just loaded as the weights, for the average, and the weights from it."""
        if self.averages:
            behind = load_file(os.path.join(folder, WEIGHTS_BEHIND_EMA))
            for i, (parameter, average) in enumerate(zip(self.parameters, self.averages, strict=True)):
                average.data.copy_(parameter.data)
                parameter.data.copy_(behind[str(i)])
