"""Which steps of a rollout are stochastic, and random numbers that follow from keys alone."""

import numpy as np
import torch


def seeded_generator(*keys: int) -> torch.Generator:
    """
    A fresh CPU generator whose stream follows from the keys alone.

    Random numbers are then a function of what they are for (seed, number of the rollout, group, ...) and not of what
    was drawn before, so a resumed run, or one on another number of processes, draws the same.

    Args:
        keys (`int`):
            One or more whole numbers, 0 or above.

    Returns:
        `torch.Generator`: independent for different keys, equal for equal ones.

    Example:

    ```python
    >>> torch.equal(torch.rand(3, generator=seeded_generator(0, 7)), torch.rand(3, generator=seeded_generator(0, 7)))
    True
    ```
    """
    state = np.random.SeedSequence(keys).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)  # torch takes 63 bits


def stochastic_window(num_inference_steps: int, window_size: int, generator: torch.Generator) -> range:
    """
    Draw the consecutive steps that are stochastic and trained; the others are deterministic.

    As in [MixGRPO](https://huggingface.co/papers/2507.21802), with a start drawn at random. The window lies in the
    noisier half of the chain where it fits there: late steps decide little and have the least precise
    log-probabilities. It never holds the last step, whose standard deviation is 0 with most schedulers.

    Args:
        num_inference_steps (`int`):
            Steps of the chain, T.
        window_size (`int`):
            Steps in the window, from 1 to T - 1.
        generator (`torch.Generator`):
            Where the start is drawn from; see [`seeded_generator`].

    Returns:
        `range`: the step numbers, 0 being the noisiest step.

    Raises:
        `ValueError`: when the window does not fit.

    Example:

    ```python
    >>> stochastic_window(20, 4, seeded_generator(0))
    range(0, 4)
    ```
    """
    if not 1 <= window_size <= num_inference_steps - 1:
        raise ValueError(
            f"`window_size` is {window_size}; expected from 1 to {num_inference_steps - 1}, one less than "
            f"`num_inference_steps` ({num_inference_steps})."
        )
    num_starts = max(num_inference_steps // 2 - window_size, 0) + 1
    start = int(torch.randint(num_starts, (1,), generator=generator))
    return range(start, start + window_size)
