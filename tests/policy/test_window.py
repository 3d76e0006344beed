"""The stochastic window: in range, in the early half, reproducible, and spread over its starts."""

import pytest
import torch

from onereward.policy import seeded_generator, stochastic_window


@pytest.mark.parametrize(("num_steps", "size"), [(20, 4), (8, 3), (10, 5), (50, 1)])
def test_window_lies_in_the_early_half_and_reaches_every_start(num_steps, size):
    windows = {stochastic_window(num_steps, size, seeded_generator(7, i)) for i in range(600)}
    assert {window.start for window in windows} == set(range(num_steps // 2 - size + 1))
    assert all(len(window) == size and window.stop <= num_steps // 2 for window in windows)


def test_window_never_holds_the_last_step():
    assert stochastic_window(4, 3, seeded_generator(0)) == range(0, 3)
    for size in (0, 4):
        with pytest.raises(ValueError, match="window_size"):
            stochastic_window(4, size, seeded_generator(0))


def test_generators_follow_from_their_keys_alone():
    first = torch.randn(8, generator=seeded_generator(1, 2, 3))
    torch.randn(8)
    assert torch.equal(first, torch.randn(8, generator=seeded_generator(1, 2, 3)))
    streams = [torch.randn(8, generator=seeded_generator(*keys)) for keys in ((1, 2, 3), (1, 3, 2), (1, 2), (1, 2, 4))]
    assert all(not torch.equal(a, b) for i, a in enumerate(streams) for b in streams[:i])
