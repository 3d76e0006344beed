"""Active collection: the questions that tell most, fairly spread, with repeats, and blind."""

from collections import Counter

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import binom, entropy

from onereward.preferences.active import next_questions, vote_information


def test_information_is_the_mutual_information_of_answer_and_member():
    rng = np.random.default_rng(0)
    rewards_0, rewards_1 = rng.normal(size=(2, 5, 40)) * 2
    win = expit(rewards_0 - rewards_1)
    joint = np.stack([win, 1 - win]) / 5  # answer x member
    expected = [
        entropy(joint[..., i].sum(1)) + entropy(joint[..., i].sum(0)) - entropy(joint[..., i].ravel())
        for i in range(40)
    ]
    np.testing.assert_allclose(vote_information(rewards_0, rewards_1), expected, atol=1e-9)


def test_a_known_toss_up_and_a_known_win_tell_nothing():
    same = np.zeros((3, 2))
    assert (vote_information(same, same) == 0).all()
    np.testing.assert_allclose(vote_information(same + 9, same), 0, atol=1e-9)
    with pytest.raises(ValueError, match="two members or more"):
        vote_information(same[:1], same[:1])


def laplace(features, answers, prior=1.0):
    """Posterior of Bayesian logistic regression: its mode, and the covariance there."""
    weights = np.zeros(features.shape[1])
    for _ in range(12):
        probability = expit(features @ weights)
        gradient = features.T @ (answers - probability) - prior * weights
        hessian = (features * (probability * (1 - probability))[:, None]).T @ features + prior * np.eye(len(weights))
        weights = weights + np.linalg.solve(hessian, gradient)
    return weights, np.linalg.inv(hessian)


def votes_needed(seed, active, accuracy=0.85, most=1200, size=12):
    """Votes until a linear reward model orders unseen pairs as the truth does; pairs as they come from one policy."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=size) * 3
    # most pairs of one policy hardly differ, a few differ a lot, in some directions more than in others
    scale = rng.lognormal(-1.0, 1.0, size=(1500, 1)) * np.geomspace(0.1, 1.5, size)
    pool = rng.normal(size=(1500, size)) * scale
    test = rng.normal(size=(2000, size)) * np.sqrt(0.3)
    answers = (rng.random(1500) < expit(pool @ truth)).astype(float)
    asked = list(rng.choice(1500, 10, replace=False))
    while len(asked) < most:
        mode, covariance = laplace(pool[asked], answers[asked])
        if np.mean((test @ mode > 0) == (test @ truth > 0)) >= accuracy:
            break
        members = rng.multivariate_normal(mode, covariance, size=24)
        information = vote_information(members @ pool.T, np.zeros((24, 1500))) if active else rng.random(1500)
        # as a rater would be asked, but for repeats, which ask for nothing new
        answered = [(int(pair), "quality") for pair in asked]
        names = [(f"a{i}", f"b{i}") for i in range(1500)]
        questions = next_questions(
            information[:, None], ["quality"], ["fill"] * 1500, names, answered, 6, rng, repeat_share=0
        )
        asked += [question.pair for question in questions]
    return len(asked)


def test_active_pairs_reach_the_accuracy_with_at_most_70_percent_of_the_votes_of_random_ones():
    needed = {active: np.mean([votes_needed(seed, active) for seed in range(10)]) for active in (True, False)}
    assert needed[False] < 1200  # the target can be reached at random, too
    assert needed[True] <= 0.7 * needed[False], needed


CRITERIA, TASKS = ["quality", "realism"], ["fill"] * 30 + ["remove"] * 10
IMAGES = [(f"a{i // 3}", f"b{i}") for i in range(40)]


def ask(information=None, answered=(), count=20, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    information = rng.random((40, 2)) if information is None else information
    kwargs = {"random_share": 0} | kwargs
    return next_questions(information, CRITERIA, TASKS, IMAGES, answered, count, rng, **kwargs)


def test_questions_are_spread_over_criteria_and_tasks_whatever_tells_most():
    information = np.zeros((40, 2))
    information[:30, 0] = 1.0  # all that tells anything is quality of fill
    counts = Counter((q.criterion, TASKS[q.pair]) for q in ask(information))
    assert set(counts.values()) == {5}
    # others have voted on quality of fill already
    counts = Counter((q.criterion, TASKS[q.pair]) for q in ask(all_votes=[(0, "quality")] * 12, count=12))
    assert counts[("quality", "fill")] == 0 and counts[("realism", "fill")] + counts[("realism", "remove")] == 12


def test_within_its_turn_the_pair_that_tells_most_is_asked_and_no_image_is_seen_too_often():
    information = np.zeros((40, 2))
    information[17, 0] = information[33, 1] = 1.0
    questions = ask(information, count=4)
    assert {(17, "quality"), (33, "realism")} <= {(q.pair, q.criterion) for q in questions}
    names = Counter(name for q in ask(count=8) for name in IMAGES[q.pair])
    assert max(names.values()) == 1


def test_a_share_of_the_pairs_is_drawn_at_random():
    information = np.arange(80.0).reshape(40, 2)
    chosen = [q for seed in range(200) for q in ask(information, count=1, seed=seed, random_share=0.5)]
    best = {"fill": 29, "remove": 39}
    share = np.mean([q.pair == best[TASKS[q.pair]] for q in chosen])
    assert 0.5 < share < 0.6  # half of them by their information, and a few by chance
    with pytest.raises(ValueError, match="`random_share` is 1.5"):
        ask(random_share=1.5)


def test_a_share_of_the_questions_are_old_ones_and_each_is_repeated_once():
    answered = [(pair, "quality") for pair in range(20)]
    repeats, asked, seen = 0, 0, list(answered)
    for seed in range(200):
        questions = ask(answered=answered, count=10, seed=seed)
        repeats += sum(q.is_repeat for q in questions)
        asked += len(questions)
        assert all(((q.pair, q.criterion) in answered) == q.is_repeat for q in questions)
        assert all(q.pair < 10 for q in questions if q.is_repeat)  # the older half
    low, high = binom.interval(0.9999, asked, 0.07)
    assert low <= repeats <= high
    again = seen + answered  # all were repeated
    assert not any(q.is_repeat for seed in range(20) for q in ask(answered=again, seed=seed))


def test_sides_and_order_are_by_chance_and_follow_from_the_seed():
    questions = [q for seed in range(100) for q in ask(seed=seed)]
    low, high = binom.interval(0.9999, len(questions), 0.5)
    assert low <= sum(q.left for q in questions) <= high
    assert ask(seed=3) == ask(seed=3) != ask(seed=4)


def test_when_all_is_answered_there_is_nothing_new_to_ask():
    answered = [(pair, criterion) for pair in range(40) for criterion in CRITERIA] * 2
    assert ask(answered=answered) == []


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one row for each pair"):
        ask(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="repeat_share"):
        ask(repeat_share=1.0)
