"""What a reward function could not score has no say: not on an image, and not on how good a model is."""

import math
import sys
from pathlib import Path

import pytest
import torch


sys.path.append(str(Path(__file__).parent))

from ddpo_setup import brightness, logged, make_rows, make_trainer  # noqa: E402


@pytest.mark.parametrize("baseline", ["value", "running"])
def test_a_head_has_no_say_on_what_it_could_not_score(tmp_path, baseline):
    def trained(unknown):
        def rest(images, **_):
            first = sum(seen)
            seen.append(len(images))
            # not the first group, nor one image of the second
            return [unknown if first + i <= 4 else 10.0 for i in range(len(images))]

        seen, sums = [], {"multi_objective_aggregation": "sum_then_normalize", "max_steps": 1}
        trainer = make_trainer(tmp_path, [brightness, rest], baseline=baseline, **sums)
        trainer.train()
        return trainer._rollout.tensors

    partly, wholly = trained(None), trained(10.0)
    for name in {"advantages", "rewards"} & set(wholly):  # what the value's forecast learns, too
        torch.testing.assert_close(partly[name], wholly[name], rtol=0, atol=1e-3)


def test_evaluations_without_a_head_that_could_score_before_are_not_compared(tmp_path):
    down = []

    def judge(images, case_id, **_):
        if down:
            raise ConnectionError("no answer")
        return [-5.0 if case != "case-0" else None for case in case_id]

    def elsewhere(images, **_):  # of another task than these rows'
        return [None] * len(images)

    heads = [brightness, judge, elsewhere]
    trainer = make_trainer(tmp_path, heads, eval_rows=make_rows(4, seed=1), on_reward_error="skip")
    metrics = trainer.evaluate()
    known = metrics["eval_rewards/brightness/mean"] + metrics["eval_rewards/judge/mean"]
    assert metrics["eval_reward"] == pytest.approx(known) and math.isnan(metrics["eval_rewards/elsewhere/mean"])
    down.append(1)
    metrics = trainer.evaluate()
    assert math.isnan(metrics["eval_reward"]) and math.isfinite(metrics["eval_rewards/brightness/mean"])
    down.clear()
    assert trainer.evaluate()["eval_reward"] == logged(trainer, "eval_reward")[0]
