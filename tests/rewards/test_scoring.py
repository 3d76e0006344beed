"""Calling reward functions: the same in threads as in turn, and a call that fails or hangs costs no training."""

import threading
import time

import pytest
import torch

from onereward.rewards.scoring import RewardScorer


def batches(count=5):
    images = torch.rand(count, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return [{"images": part, "task": ["fill"] * 4} for part in images]


def brightness(images, **_):
    return images.mean(dim=(1, 2, 3))


def contrasts(images, **_):
    return {"soft": -images.std(dim=(1, 2, 3)), "hard": images.std(dim=(1, 2, 3))}


def collect(scorer, parts):
    return scorer.collect([scorer.submit(part) for part in parts])


def test_rewards_in_threads_are_those_in_turn():
    in_turn, in_threads = RewardScorer([brightness, contrasts]), RewardScorer([brightness, contrasts], True)
    rewards = collect(in_turn, batches())
    assert rewards.shape == (20, 3) and in_turn.names == ["brightness", "soft", "hard"]
    assert torch.equal(rewards, collect(in_threads, batches()))


def test_submitting_does_not_wait():
    gate = threading.Event()

    def slow(images, **_):
        assert gate.wait(30)
        return [1.0] * len(images)

    scorer = RewardScorer([slow], asynchronous=True)
    submitted = [scorer.submit(part) for part in batches()]
    gate.set()  # only now may any of the calls end
    assert scorer.collect(submitted).shape == (20, 1)


def test_calls_of_one_function_keep_their_order_and_do_not_overlap():
    running, order = [], []

    def careful(images, **_):
        running.append(1)
        assert len(running) == 1
        time.sleep(0.01)
        order.append(float(images.sum()))
        running.pop()
        return [0.0] * len(images)

    parts = batches()
    collect(RewardScorer([careful], asynchronous=True), parts)
    assert order == [float(part["images"].sum()) for part in parts]


def test_threads_keep_no_graph():
    weight = torch.nn.Parameter(torch.ones(()))
    for asynchronous in (False, True):
        seen = []

        def differentiable(images, seen=seen, **_):
            seen.append((weight * images.mean(dim=(1, 2, 3))).requires_grad)
            return weight * images.mean(dim=(1, 2, 3))

        assert not collect(RewardScorer([differentiable], asynchronous), batches(1)).requires_grad
        assert seen == [False]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_call_that_fails_is_made_again(asynchronous):
    attempts = []

    def flaky(images, **_):
        attempts.append(float(images.sum()))
        if attempts.count(attempts[-1]) == 1:
            raise ConnectionError("no answer")
        return [2.0] * len(images)

    scorer = RewardScorer([flaky], asynchronous, retries=1)
    assert collect(scorer, batches(2)).tolist() == [[2.0]] * 8
    assert len(attempts) == 4


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_time_of_a_call_starts_at_its_turn_and_it_is_made_again_within_it(asynchronous):
    running, order = [], []

    def careful(images, **_):
        running.append(1)
        overlaps = len(running) > 1
        order.append(float(images.sum()))
        time.sleep(0.05)
        running.pop()
        if len(order) == 2:
            raise ConnectionError("no answer")
        return [float(overlaps)] * len(images)

    parts = batches(24)  # all of them take longer than one may
    rewards = collect(RewardScorer([careful], asynchronous, timeout=1.0, retries=1), parts)
    sums = [float(part["images"].sum()) for part in parts]
    assert order == [sums[0], sums[1], *sums[1:]] and (rewards == 0).all()


def test_calls_that_wait_for_their_turn_are_dropped_when_one_has_failed():
    order, failed = [], threading.Event()

    def breaks_first(images, **_):
        order.append(float(images.sum()))
        if len(order) == 1:
            raise KeyError("weights")
        assert failed.wait(30)
        return [0.0] * len(images)

    *parts, later = batches(5)
    scorer = RewardScorer([breaks_first], asynchronous=True)
    with pytest.raises(KeyError):
        collect(scorer, parts)
    failed.set()
    collect(scorer, [later])
    # the second may have begun before the first was known to have failed
    assert set(order) <= {float(part["images"].sum()) for part in (*parts[:2], later)}


def test_a_call_that_keeps_failing_is_raised_as_it_came_or_named():
    def broken(images, **_):
        raise KeyError("weights")

    with pytest.raises(KeyError, match="weights"):
        collect(RewardScorer([broken]), batches(1))
    with pytest.raises(RuntimeError, match="'broken' failed with KeyError: 'weights', 3 times"):
        collect(RewardScorer([broken], retries=2), batches(1))

    def unanswered(images, **_):
        raise TimeoutError("the server's own")

    with pytest.raises(TimeoutError, match="the server's own"):
        collect(RewardScorer([unanswered], timeout=30), batches(1))


def test_skipped_images_are_not_scored_by_that_function_alone():
    def sometimes(images, **_):
        if images.shape == (4, 1, 8, 8) and float(images[0, 0, 0, 0]) == float(second):
            raise ConnectionError
        return [1.0] * len(images)

    parts = batches(2)
    second = parts[1]["images"][0, 0, 0, 0]
    rewards = collect(RewardScorer([sometimes, brightness], on_error="skip"), parts)
    assert rewards[4:, 0].isnan().all() and rewards[:4].isfinite().all() and rewards[:, 1].isfinite().all()


def test_a_function_that_never_answered_cannot_be_skipped():
    def broken(images, **_):
        raise KeyError("weights")

    with pytest.raises(KeyError):
        collect(RewardScorer([broken], on_error="skip"), batches(1))


def test_a_call_that_hangs_is_given_up_and_those_after_it_go_on():
    calls, release = [], threading.Event()

    def hangs_once(images, **_):
        calls.append(1)
        if len(calls) == 2:
            release.wait(60)
        return [float(len(calls))] * len(images)

    scorer = RewardScorer([hangs_once], asynchronous=True, timeout=0.5, on_error="skip")
    started = time.monotonic()
    rewards = collect(scorer, batches(3))
    release.set()
    assert time.monotonic() - started < 10
    assert rewards[:4].isfinite().all() and rewards[4:8].isnan().all() and rewards[8:].isfinite().all()


def test_a_call_that_hangs_is_named_when_errors_are_raised():
    def hangs(images, **_):
        time.sleep(5)
        return [0.0] * len(images)

    with pytest.raises(RuntimeError, match=r"'hangs' took more than `reward_timeout` \(0.1 s\), 1 times"):
        collect(RewardScorer([hangs], timeout=0.1), batches(1))


def test_heads_must_have_names_of_their_own_and_keep_them():
    with pytest.raises(ValueError, match="different names"):
        collect(RewardScorer([brightness, brightness]), batches(1))

    def fickle(images, **_):
        return {f"head {float(images.sum()):.3f}": images.mean(dim=(1, 2, 3))}

    with pytest.raises(ValueError, match="after"):
        collect(RewardScorer([fickle]), batches(2))
    with pytest.raises(ValueError, match="'raise' or 'skip'"):
        RewardScorer([brightness], on_error="ignore")
