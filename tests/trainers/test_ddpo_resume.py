"""A training that is killed, stopped or started again ends with the weights of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch


sys.path.append(str(Path(__file__).parent))

from ddpo_setup import logged, make_pipeline, make_rows, make_trainer  # noqa: E402

from onereward.trainers import hub as trainers_hub  # noqa: E402


SETUP = Path(__file__).with_name("ddpo_setup.py")
CONFIG = {
    "save_strategy": "steps",
    "save_steps": 1,
    "gradient_accumulation_steps": 2,
    "max_steps": 6,
    "ema_decay": 0.9,
    "baseline": "running",
    "running_min_count": 4,
    "lr_scheduler_type": "linear",
}


def flat(parameters):
    return torch.cat([p.detach().flatten() for p in parameters])


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def start(output_dir, **config):
    arguments = json.dumps({**CONFIG, "output_dir": str(output_dir), **config})
    return subprocess.Popen(
        [sys.executable, str(SETUP), arguments], env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)


def result(output_dir):
    return torch.tensor(json.loads((output_dir / "result_0.json").read_text())["weights"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(folder, **CONFIG)
    torch.set_num_threads(1)
    trainer.train()
    return trainer


def test_killed_and_resumed_is_the_uninterrupted_training(tmp_path, uninterrupted):
    process = start(tmp_path, pause_at=3)
    wait_for(tmp_path / "checkpoint-3" / "checkpoint.json", process)
    process.kill()  # SIGKILL: nothing can be saved now
    process.wait()
    assert not (tmp_path / "result_0.json").exists()

    process = start(tmp_path, resume_from_checkpoint=True)
    assert process.wait(120) == 0, process.stderr.read().decode()[-2000:]
    assert torch.equal(result(tmp_path), flat(uninterrupted.policy_parameters))


def test_sigterm_saves_and_ends_with_exit_status_zero(tmp_path, uninterrupted):
    process = start(tmp_path, save_steps=100, slow_rewards=0.3)
    wait_for(tmp_path / "first_rollout", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, process.stderr.read().decode()[-2000:]
    checkpoints = list(tmp_path.glob("checkpoint-*/checkpoint.json"))
    assert len(checkpoints) == 1 and not (tmp_path / "result_0.json").exists()

    process = start(tmp_path, save_steps=100, resume_from_checkpoint=True)
    assert process.wait(120) == 0, process.stderr.read().decode()[-2000:]
    assert torch.equal(result(tmp_path), flat(uninterrupted.policy_parameters))


def test_resume_passes_over_a_checkpoint_that_was_cut_short(tmp_path, uninterrupted, caplog):
    make_trainer(tmp_path, **CONFIG).train()
    for step in (5, 6):
        path = tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:100])
    resumed = make_trainer(tmp_path, **CONFIG)
    resumed.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry][-2:] == [5, 6]
    assert torch.equal(flat(resumed.policy_parameters), flat(uninterrupted.policy_parameters))
    assert torch.equal(flat(resumed.ema.averages), flat(uninterrupted.ema.averages))
    assert resumed.running.state_dict() == uninterrupted.running.state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "`seed` was 0 and is 1"),
        ({"num_generations": 2}, "`num_generations` was 4 and is 2"),
        ({"lora": {"r": 3}}, "`num_trained_weights`"),
        ({"rows": make_rows(9)}, "`rows` was"),
        ({"pipeline": "2c+1"}, "`denoiser` was"),
    ],
    ids=["seed", "groups", "adapter", "data", "base"],
)
def test_a_foreign_checkpoint_is_refused_by_name(tmp_path, uninterrupted, change, message):
    if "pipeline" in change:
        change = {"pipeline": make_pipeline(layout=change["pipeline"])}
    trainer = make_trainer(tmp_path, **{**CONFIG, **change})
    checkpoint = Path(uninterrupted.args.output_dir, "checkpoint-2")
    before = flat(trainer.policy_parameters)
    with pytest.raises(ValueError, match=f"checkpoint-2 is of another run: .*{message}"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(flat(trainer.policy_parameters), before)


def test_the_same_command_starts_and_resumes(tmp_path, uninterrupted):
    trainer = make_trainer(tmp_path, **CONFIG)
    trainer.train(resume_from_checkpoint="true")  # nothing to resume from yet
    assert trainer.state.global_step == 6
    assert torch.equal(flat(trainer.policy_parameters), flat(uninterrupted.policy_parameters))
    again = make_trainer(tmp_path, **CONFIG)
    again.train(resume_from_checkpoint="true")
    assert logged(again, "loss") == logged(trainer, "loss")  # none was added
    assert torch.equal(flat(again.policy_parameters), flat(uninterrupted.policy_parameters))


def test_older_checkpoints_are_deleted_only_when_the_new_one_is_sealed(tmp_path, monkeypatch):
    kept = []
    seal = trainers_hub.seal_checkpoint

    def spy(folder, run):
        kept.append(len(list(tmp_path.glob("checkpoint-*"))))
        seal(folder, run)

    monkeypatch.setattr(trainers_hub, "seal_checkpoint", spy)
    trainer = make_trainer(tmp_path, **{**CONFIG, "save_total_limit": 1, "max_steps": 3})
    trainer.train()
    assert kept == [1, 2, 2]  # the one before was still there
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_the_last_update_is_saved_whatever_the_interval(tmp_path):
    trainer = make_trainer(tmp_path, **{**CONFIG, "save_steps": 4, "max_steps": 3})
    trainer.train()
    assert (tmp_path / "checkpoint-3" / "checkpoint.json").exists()
