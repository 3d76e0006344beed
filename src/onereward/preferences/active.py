"""Which pair to show to which rater next, so that few votes tell much."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Question(NamedTuple):
    """
    One vote to ask for.

    Args:
        pair (`int`):
            Number of the pair among the candidates.
        criterion (`str`):
            What to compare by.
        left (`int`):
            Which of the two images to show on the left, 0 or 1, by chance.
        is_repeat (`bool`):
            Whether the rater has answered it before: how often both answers agree is the rater's consistency.
    """

    pair: int
    criterion: str
    left: int
    is_repeat: bool


def vote_information(rewards_0: np.ndarray, rewards_1: np.ndarray) -> np.ndarray:
    r"""
    What a vote on each pair is expected to tell of the reward model: the mutual information between the answer and
    which member of the ensemble is right, in nats ([BALD](https://huggingface.co/papers/1112.5745), equation 2).

    $$I = H\Big(\frac{1}{K} \sum_k p_k\Big) - \frac{1}{K} \sum_k H(p_k), \qquad
    p_k = \frac{1}{1 + e^{r_{k1} - r_{k0}}}$$

    It is high where the members disagree and each is sure, and 0 where all expect the same, be it a clear win or a
    toss-up: asking what is known to be a toss-up tells nothing.

    Args:
        rewards_0 (`np.ndarray`):
            Rewards of the first image of each pair by each member, of shape `(K, ...)`, in the units of Bradley-Terry:
            a difference of 1 is odds of e.
        rewards_1 (`np.ndarray`):
            Those of the second image, of the same shape.

    Returns:
        `np.ndarray`: array of shape `(...)`, from 0 to log 2.

    Raises:
        `ValueError`: when the shapes differ or there are fewer than two members.

    Example:

    ```python
    >>> vote_information(np.array([[2.0, 0.0], [-2.0, 0.0]]), np.zeros((2, 2))).round(3)
    array([0.328, 0.   ])
    ```
    """
    rewards_0, rewards_1 = np.asarray(rewards_0, dtype=float), np.asarray(rewards_1, dtype=float)
    if rewards_0.shape != rewards_1.shape or len(rewards_0) < 2:
        raise ValueError(
            f"`rewards_0` and `rewards_1` have the shapes {rewards_0.shape} and {rewards_1.shape}; expected one "
            "shape, with the rewards of two members or more of an ensemble first."
        )
    probability = 1 / (1 + np.exp(np.clip(rewards_1 - rewards_0, -50, 50)))
    return np.maximum(_entropy(probability.mean(axis=0)) - _entropy(probability).mean(axis=0), 0)


def _entropy(probability: np.ndarray) -> np.ndarray:
    p = np.clip(probability, 1e-12, 1 - 1e-12)
    return -(p * np.log(p) + (1 - p) * np.log(1 - p))


def next_questions(
    information: np.ndarray,
    criteria: Sequence[str],
    tasks: Sequence[str],
    images: Sequence[tuple[str, str]],
    answered: Sequence[tuple[int, str]],
    count: int,
    rng: np.random.Generator,
    all_votes: Sequence[tuple[int, str]] = (),
    repeat_share: float = 0.07,
    random_share: float = 0.5,
) -> list[Question]:
    """
    The next questions for one rater. New ones go by turns to the criterion, and within it to the task, that has the
    fewest votes of all raters, and there to the pair that tells most, or a random one; within one call no image is
    shown twice as long as others are left. A share are questions that the rater has answered before. Order and sides
    are by chance.

    Nothing that a rater sees may tell which model made an image: show the images under names of their own, and draw
    `rng` from a seed that the rater does not know.

    Args:
        information (`np.ndarray`):
            What a vote on each pair and criterion tells, of shape `(pairs, criteria)`; see [`vote_information`].
            Random numbers make it random collection.
        criteria (`Sequence[str]`):
            Names of the criteria.
        tasks (`Sequence[str]`):
            Task of each pair.
        images (`Sequence[tuple[str, str]]`):
            Names of the two images of each pair.
        answered (`Sequence[tuple[int, str]]`):
            Pair and criterion of each vote of this rater, oldest first.
        count (`int`):
            Questions wanted.
        rng (`np.random.Generator`):
            Source of chance.
        all_votes (`Sequence[tuple[int, str]]`, *optional*):
            Pair and criterion of the votes of all raters. Those of this rater when not given.
        repeat_share (`float`, *optional*, defaults to `0.07`):
            Share of repeats, from 0 up to below 1, once there is something to repeat. The latest answers are repeated
            last, so that memory helps little.
        random_share (`float`, *optional*, defaults to `0.5`):
            Share of the new questions whose pair is drawn at random. A reward model that cannot be right has the wrong
            doubts, and asking by them alone then needs more votes than asking at random; half and half keeps most of
            what active collection saves, and loses little where it does not.

    Returns:
        `list[Question]`: at most `count`; fewer when the rater has answered nearly all there is.

    Raises:
        `ValueError`: when the arguments do not fit together.

    Example:

    ```python
    >>> questions = next_questions(
    ...     np.array([[0.1], [0.3]]), ["quality"], ["fill", "fill"], [("a", "b"), ("c", "d")], [], 1,
    ...     np.random.default_rng(0),
    ... )
    >>> questions[0].pair
    1
    ```
    """
    information = np.asarray(information, dtype=float)
    if information.shape != (len(tasks), len(criteria)) or len(images) != len(tasks):
        raise ValueError(
            f"`information` has shape {information.shape} for {len(tasks)} tasks, {len(images)} pairs of images and "
            f"{len(criteria)} criteria; expected one row for each pair and one column for each criterion."
        )
    if not 0 <= repeat_share < 1:
        raise ValueError(f"`repeat_share` is {repeat_share}; expected from 0 up to below 1, such as 0.07.")
    if not 0 <= random_share <= 1:
        raise ValueError(f"`random_share` is {random_share}; expected from 0 to 1, such as 0.5.")

    own = Counter(answered)
    repeatable = [question for question in dict.fromkeys(answered) if own[question] == 1]
    older = repeatable[: max(len(repeatable) // 2, 1)]
    num_repeats = min(int(rng.binomial(count, repeat_share)), len(older))
    chosen = [(*older[i], True) for i in rng.choice(len(older), num_repeats, replace=False)] if num_repeats else []

    votes = Counter((criterion, tasks[pair]) for pair, criterion in (all_votes or answered))
    open_questions: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for column, criterion in enumerate(criteria):
        for pair in np.argsort(-(information[:, column] + 1e-12 * rng.random(len(tasks)))):
            if (int(pair), criterion) not in own:
                open_questions.setdefault((criterion, tasks[pair]), []).append(int(pair))
    shown: Counter = Counter()
    while open_questions and len(chosen) < count:
        by_criterion = Counter({c: sum(n for (other, _), n in votes.items() if other == c) for c in criteria})
        place = min(open_questions, key=lambda key: (by_criterion[key[0]], votes[key], rng.random()))
        candidates = open_questions[place]
        # the first is the one that tells most
        order = rng.permutation(len(candidates)) if rng.random() < random_share else range(len(candidates))
        fewest = min(order, key=lambda i: max(shown[name] for name in images[candidates[i]])) if shown else order[0]
        pair = candidates.pop(fewest)
        if not candidates:
            del open_questions[place]
        shown.update(images[pair])
        votes[place] += 1
        chosen.append((pair, place[0], False))
    order = rng.permutation(len(chosen))
    return [Question(chosen[i][0], chosen[i][1], int(rng.integers(2)), chosen[i][2]) for i in order]
