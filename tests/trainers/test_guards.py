"""Guards say once what is wrong with a training, or stop it, and are silent where nothing is."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from onereward.rewards.composed import capped
from onereward.trainers.guards import ClipGuard, DriftGuard, HeldOutGuard, VarianceGuard


sys.path.append(str(Path(__file__).parent))

from ddpo_setup import brightness, logged, make_rows, make_trainer  # noqa: E402


MAX_STEPS = 24
ONE_PROCESS = SimpleNamespace(world_size=1, beta=0.0, eval_strategy="no")


def replay(guard, entries, state=None):
    """Have a guard watch a log as a Trainer writes it; gives what it did."""
    state, control = state or TrainerState(is_world_process_zero=True), TrainerControl()
    for i, entry in enumerate(entries, start=1):
        state.global_step = entry.get("step", i)
        state.log_history.append({**entry, "step": state.global_step})
        guard.on_log(ONE_PROCESS, state, control, logs=entry)
        if control.should_training_stop:
            break
    found = [entry for entry in state.log_history if "guard" in entry]
    return SimpleNamespace(found=found, steps=[entry["step"] for entry in found], state=state, control=control)


def series(**columns):
    names = [name.replace("__", "/") for name in columns]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]


# --------------------------------------------------------------------------------------------------------- variance


def test_a_spread_that_collapses_is_reported_once_for_its_head():
    rising, falling = [0.1 + 0.001 * i for i in range(30)], [0.2 * 0.8**i for i in range(30)]
    seen = replay(VarianceGuard(window=5), series(rewards__quality__std=rising, rewards__realism__std=falling))
    # the mean over the five last is below a tenth of that over the five first as soon as 0.8^n < 0.1: n = 11
    assert seen.steps == [16] and seen.found[0]["metric"] == "rewards/realism/std"
    assert seen.found[0]["guard"] == "VarianceGuard" and "'realism'" in seen.found[0]["message"]
    assert "capped" in seen.found[0]["message"] and not seen.control.should_training_stop


def test_a_spread_that_only_wavers_or_was_never_there_is_left_alone():
    noise = (torch.rand(200, generator=torch.Generator().manual_seed(0)) + 0.1).tolist()
    entries = series(rewards__quality__std=noise, rewards__background_kept__std=[0.0] * 200)
    assert replay(VarianceGuard(), entries).found == []
    assert replay(VarianceGuard(window=5), series(rewards__quality__std=[1, 1, 1, 1, 1, 0, 0, 0, 0])).found == []


def test_a_spread_that_could_not_be_measured_is_none_that_collapsed():
    entries = [{"rewards/judge/std": value} for value in (0.2, math.nan, math.nan, 0.2)]
    assert replay(VarianceGuard(window=1), entries).found == []


def test_evaluations_are_not_mistaken_for_training():
    assert replay(VarianceGuard(window=1), [{"eval_rewards/quality/std": v} for v in (1, 0.5, 0)]).found == []


# -------------------------------------------------------------------------------------------------------- drift, clip


@pytest.mark.parametrize(("guard", "metric"), [(DriftGuard(0.5, window=3), "kl"), (ClipGuard(window=3), "clip_ratio")])
def test_what_stays_above_its_limit_is_reported_and_a_peak_is_not(guard, metric):
    peak = [{metric: value} for value in (0.0, 0.9, 0.0, 0.1, 0.9, 0.0)]
    assert replay(guard, peak).found == []
    rising = [{metric: value} for value in (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)]
    seen = replay(guard, rising)
    assert seen.steps == [5] and seen.found[0]["metric"] == metric  # (0.4 + 0.6 + 0.8) / 3 > 0.5
    assert f"`{metric}` is 0.6, above" in seen.found[0]["message"]


def test_a_divergence_that_is_no_number_is_above_any_limit():
    assert replay(DriftGuard(1.0, window=1), [{"kl": float("nan")}]).steps == [1]


# --------------------------------------------------------------------------------------------------------- held out


def evaluations(rewards, judged):
    rows = zip(rewards, judged, strict=True)
    return [{"eval_reward": r, "eval_heldout/judge/mean": j, "step": 10 * i} for i, (r, j) in enumerate(rows)]


def test_a_reward_that_rises_while_the_judge_falls_is_hacked():
    seen = replay(HeldOutGuard(), evaluations([1, 2, 3, 4, 5, 6], [0.1, 0.5, 0.4, 0.3, 0.2, 0.1]))
    assert seen.steps == [40]  # the third evaluation after the best
    message = seen.found[0]["message"]
    assert "from 0.5 at step 10 to 0.2" in message and "rose by 3" in message and "being hacked" in message
    assert seen.found[0]["metric"] == "eval_heldout/judge/mean"


def test_when_both_fall_the_training_is_unstable():
    seen = replay(HeldOutGuard(patience=2), evaluations([3, 2, 1], [0.5, 0.4, 0.3]))
    assert "unstable" in seen.found[0]["message"] and "hacked" not in seen.found[0]["message"]


@pytest.mark.parametrize(
    ("rewards", "judged"),
    [
        ([1, 2, 3, 4, 5], [0.1, 0.2, 0.3, 0.4, 0.5]),  # both rise
        ([1, 2, 3, 4, 5], [0.5, 0.4, 0.5, 0.4, 0.5]),  # the judge recovers
        ([1, 2, 3, 4, 5], [0.5, 0.48, 0.47, 0.46, 0.46]),  # within the tolerance
        ([1, 2, 0, 4, 0], [0.5, 0.4, 0.3, 0.2, 0.1]),  # the reward does neither
        ([1, 2, 3, 4, 5], [float("nan")] * 5),  # the judge cannot score
        ([1, 2, 3, 4, float("nan")], [0.1, 0.5, 0.4, 0.3, 0.2]),  # the reward cannot score
    ],
)
def test_a_judge_that_does_not_fall_for_good_is_no_reason_to_worry(rewards, judged):
    assert replay(HeldOutGuard(tolerance=0.05), evaluations(rewards, judged)).found == []


def test_each_judge_is_watched_by_itself():
    entries = evaluations([1, 2, 3, 4, 5], [0.5, 0.4, 0.3, 0.2, 0.1])
    entries = [{**entry, "eval_heldout/other/mean": entry["eval_reward"]} for entry in entries]
    assert [entry["metric"] for entry in replay(HeldOutGuard(), entries).found] == ["eval_heldout/judge/mean"]


# -------------------------------------------------------------------------------------------------------- what follows


def test_a_guard_that_stops_says_so_and_stops():
    seen = replay(ClipGuard(window=1, on_trigger="stop"), [{"clip_ratio": value} for value in (0.1, 0.9, 0.9, 0.9)])
    assert seen.control.should_training_stop and seen.steps == [2]
    assert seen.found[0]["message"].endswith("The training stops here.")


def test_a_resumed_training_keeps_the_history_and_repeats_no_warning(tmp_path):
    falling = series(rewards__judge__std=[0.2 * 0.8**i for i in range(30)])
    whole = replay(VarianceGuard(), falling)
    for cut in (12, 20):  # before it was said, and after
        before = replay(VarianceGuard(), falling[:cut]).state
        before.save_to_json(str(tmp_path / "trainer_state.json"))
        resumed = TrainerState.load_from_json(str(tmp_path / "trainer_state.json"))
        rest = [{**entry, "step": cut + i} for i, entry in enumerate(falling[cut:], start=1)]
        assert replay(VarianceGuard(), rest, resumed).found == whole.found


def test_guards_that_can_see_nothing_say_what_is_missing(monkeypatch):
    said = []
    monkeypatch.setattr("onereward.trainers.guards.logger.warning", said.append)
    state = TrainerState(is_world_process_zero=True)
    for guard in (HeldOutGuard(), DriftGuard(1.0), ClipGuard(), VarianceGuard()):
        guard.on_train_begin(ONE_PROCESS, state, TrainerControl())
    assert len(said) == 2 and "eval_reward_funcs" in said[0] and "`beta` is 0" in said[1]
    fine = SimpleNamespace(beta=0.01, eval_strategy="steps")
    assert HeldOutGuard().requirement(fine) is None and DriftGuard(1.0).requirement(fine) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClipGuard(on_trigger="abort"), "`on_trigger` is 'abort'; expected 'warn' or 'stop'"),
        (lambda: ClipGuard(limit=1.5), "`limit` is 1.5"),
        (lambda: ClipGuard(window=0), "`window` is 0"),
        (lambda: DriftGuard(0.0), "`limit` is 0.0"),
        (lambda: VarianceGuard(share=10), "`share` is 10"),
        (lambda: HeldOutGuard(patience=0), "`patience` is 0"),
    ],
)
def test_wrong_settings_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


TWO_PROCESSES = """
import json, sys
from types import SimpleNamespace
from accelerate import PartialState
from transformers import TrainerControl, TrainerState
from onereward.trainers.guards import ClipGuard
process = PartialState(cpu=True)
state, control = TrainerState(is_world_process_zero=process.is_main_process), TrainerControl()
args, guard, stopped = SimpleNamespace(world_size=2), ClipGuard(window=1, on_trigger="stop"), None
for step, clip_ratio in enumerate([[0.1, 0.9], [0.2, 0.9], [0.8, 0.3]]):
    state.log_history.append({"clip_ratio": clip_ratio[process.process_index], "step": step})
    guard.on_log(args, state, control)
    if control.should_training_stop:
        stopped = step
        break
open(f"{sys.argv[1]}/{process.process_index}.json", "w").write(json.dumps(stopped))
process.destroy_process_group()
"""


def test_all_processes_stop_at_the_same_update(tmp_path):
    # `clip_ratio` is a process's own; were each to judge its own, one would leave and the other wait for it for ever
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    port = 29950 + os.getpid() % 40
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port), str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, *command, str(tmp_path)], check=True, timeout=120, env=env, capture_output=True)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [2, 2]


# --------------------------------------------------------------------------------------------------- end to end


def likeness(images, sources, masks, **columns):
    """What brightness is to stand for, and what it destroys: pictures like the source."""
    return -((images - sources).abs() * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3))


def train(output_dir, reward_funcs, guards, **config):
    trainer = make_trainer(
        output_dir,
        reward_funcs,
        eval_rows=make_rows(8, seed=1),
        eval_reward_funcs=likeness,
        callbacks=guards,
        per_device_generation_batch_size=16,
        per_device_train_batch_size=16,
        num_generations=8,
        epsilon=1e-2,
        learning_rate=2e-2,
        max_steps=MAX_STEPS,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=2,
        **config,
    )
    trainer.train()
    return trainer


def test_a_reward_made_to_be_hacked_is_caught(tmp_path):
    trainer = train(tmp_path, brightness, [HeldOutGuard(on_trigger="stop"), VarianceGuard()])
    (found,) = (entry for entry in trainer.state.log_history if "guard" in entry)
    assert found["guard"] == "HeldOutGuard" and found["metric"] == "eval_heldout/likeness/mean"
    assert "being hacked" in found["message"] and found["step"] == trainer.state.global_step < MAX_STEPS
    rewards, judged = logged(trainer, "eval_reward"), logged(trainer, "eval_heldout/likeness/mean")
    assert rewards[-1] > rewards[0] and judged[-1] < max(judged)
    # the log that was recorded leads to the same verdict
    record = [entry for entry in trainer.state.log_history if "guard" not in entry]
    assert replay(HeldOutGuard(on_trigger="stop"), record).found == [found]


def test_a_reward_that_fails_for_some_updates_has_not_collapsed(tmp_path):
    calls = []

    def judge(images, masks, **columns):
        calls.append(1)
        if len(calls) > 4:
            raise ConnectionError("the server is down")
        return brightness(images, masks)

    guards = [VarianceGuard(window=2, on_trigger="stop")]
    trainer = make_trainer(tmp_path, [likeness, judge], max_steps=4, on_reward_error="skip", callbacks=guards)
    trainer.train()
    assert len(logged(trainer, "rewards/judge/std")) < trainer.state.global_step == 4


def test_a_head_of_a_rare_task_has_not_collapsed(tmp_path):
    def judge(images, masks, case_id, **columns):
        mine = [int(case.removeprefix("case-")) % 4 == 0 for case in case_id]
        rewards = brightness(images, masks).tolist()
        return [value if is_mine else None for value, is_mine in zip(rewards, mine, strict=True)]

    guards = [VarianceGuard(share=0.5, window=1)]
    trainer = make_trainer(tmp_path, judge, max_steps=8, learning_rate=0.0, callbacks=guards)
    trainer.train()
    spreads = logged(trainer, "rewards/judge/std")
    assert 1 < len(spreads) < 8 and min(spreads) > 0


def test_the_same_reward_capped_is_not_hacked(tmp_path):
    trainer = train(tmp_path, capped(brightness, 0.3), [HeldOutGuard(on_trigger="stop"), DriftGuard(1e-3)], beta=1e-8)
    assert not [entry for entry in trainer.state.log_history if "guard" in entry]
    assert trainer.state.global_step == MAX_STEPS
