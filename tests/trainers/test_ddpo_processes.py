"""How many processes share the work decides how long it takes, and nothing else."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from onereward.hub.adapters import load_adapter
from onereward.pipelines import OneRewardMaskPipeline


sys.path.append(str(Path(__file__).parent))

from ddpo_setup import logged, make_pipeline, make_rows, make_trainer  # noqa: E402


SETUP, REPOSITORY = Path(__file__).with_name("ddpo_setup.py"), Path(__file__).parents[2]
# Not Adam, which would divide the rounding of a sum of gradients by gradients near 0.
CONFIG = {"optim": "sgd", "learning_rate": 10.0, "max_grad_norm": 0.0, "epsilon": 1e-2, "max_steps": 2}
PORT = 29500 + os.getpid() % 400


def flat(parameters):
    return torch.cat([p.detach().flatten() for p in parameters])


def start_two(output_dir, **config):
    """Two gloo processes; `accelerate launch --cpu --num_processes 2` would start one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(PORT)]
    arguments = {**CONFIG, "output_dir": str(output_dir), "per_device_generation_batch_size": 4, **config}
    return subprocess.Popen(
        [*command, str(SETUP), json.dumps(arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )


def run_two(output_dir, **config):
    process = start_two(output_dir, **config)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors.decode()[-3000:]
    results = [json.loads((output_dir / f"result_{rank}.json").read_text()) for rank in range(2)]
    assert [result["world"] for result in results] == [2, 2]
    return results


OPTIONS = {
    "penalty": {"beta": 0.1, "kl_target": 1e-5},
    "running": {"baseline": "running", "running_min_count": 4, "async_rewards": True},
    # the images of one process have no advantage at all: it must take part all the same
    "unscored": {"unscored": "first rank"},
    "folded": {"per_device_train_batch_size": 8},
}


# one of them each time, the others in the slow run: two processes take 20 seconds to start and to end
@pytest.mark.parametrize(
    "options", [name if name == "penalty" else pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS]
)
def test_two_processes_give_the_weights_of_one_with_their_batches_joined(tmp_path, options):
    config = dict(OPTIONS[options])
    one = {"per_device_train_batch_size": 16} if options == "folded" else {}
    reward = {}
    if options == "unscored":
        probe = make_trainer(tmp_path / "probe", per_device_generation_batch_size=8)
        unscored = config["unscored"] = [f"case-{probe.rollout_rows(index)[0]}" for index in range(2)]

        def score(images, masks, case_id, **_):
            light = (images * masks).sum(dim=(1, 2, 3)) / masks.sum(dim=(1, 2, 3))
            return [None if case in unscored else v for case, v in zip(case_id, light.tolist(), strict=True)]

        reward = {"reward_funcs": score}
    # a picture and a checkpoint at each update: what needs all processes must not wait for one
    saving = {"save_strategy": "steps", "save_steps": 1, "log_samples_steps": 1, "ema_decay": 0.5}
    # and an evaluation on fewer rows than processes, before any reward has been seen
    results = run_two(tmp_path, **config, **saving, num_eval_rows=1, eval_on_start=True)
    assert results[0] == results[1]
    assert len(list((tmp_path / "samples").iterdir())) == 2
    assert (tmp_path / "checkpoint-2" / "checkpoint.json").exists()

    config.pop("unscored", None)
    evaluation = {"eval_rows": make_rows(1, seed=1), "eval_on_start": True}
    trainer = make_trainer(tmp_path / "one", **reward, **{**CONFIG, **config, **one, **evaluation})
    before = flat(trainer.policy_parameters)
    trainer.train()
    after = flat(trainer.policy_parameters)
    torch.testing.assert_close(torch.tensor(results[0]["weights"]), after, rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 1e-3
    assert results[0]["beta"] == pytest.approx(trainer.beta)
    assert results[0]["eval_rewards"] == pytest.approx(logged(trainer, "eval_reward"))


@pytest.mark.slow
def test_all_weights_on_two_processes_are_those_on_one(tmp_path):
    config = {"full": True, "learning_rate": 0.2, "baseline": "value", "vf_coef": 0.01}
    results = run_two(tmp_path, **config)
    assert results[0] == results[1]
    trainer = make_trainer(tmp_path / "one", **{**CONFIG, **config})
    before = flat(trainer.policy_parameters)
    trainer.train()
    after = flat(trainer.policy_parameters)
    torch.testing.assert_close(torch.tensor(results[0]["weights"]), after, rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["adapter", "all-weights"])
@pytest.mark.parametrize("engine", ["fsdp", "zero2"])
def test_weights_split_over_two_processes_are_trained_saved_and_resumed_like_whole_ones(tmp_path, engine, full):
    config = {"full": full, "beta": 0.1, "kl_target": 1e-6, "save_strategy": "steps", "save_steps": 1}
    # a large epsilon, so that Adam does not divide rounding by next to nothing
    config |= {"optim": "adamw_torch", "adam_epsilon": 1e-2, "learning_rate": 1e-3 if full else 1e-2}
    if engine == "zero2":
        pytest.importorskip("deepspeed")
        config["ema_decay"] = 0.5
    split = run_two(tmp_path / "split", engine=engine, **config)
    assert split[0] == split[1]
    trainer = make_trainer(tmp_path / "one", **{**CONFIG, **config})
    trainer.train()
    assert split[0]["beta"] == trainer.beta
    torch.testing.assert_close(
        torch.tensor(split[0]["weights"]), flat(trainer.policy_parameters), rtol=1e-4, atol=1e-5
    )

    pipeline = make_pipeline()
    if full:
        pipeline = OneRewardMaskPipeline.from_pretrained(tmp_path / "split")
    else:
        load_adapter(pipeline, tmp_path / "split", trainable=True)
    saved = flat(p for p in pipeline.unet.parameters() if p.requires_grad)
    with trainer.ema.applied():
        torch.testing.assert_close(saved, flat(trainer.policy_parameters), rtol=1e-4, atol=1e-5)

    shutil.rmtree(tmp_path / "split" / "checkpoint-2")
    assert run_two(tmp_path / "split", engine=engine, resume_from_checkpoint=True, **config) == split


@pytest.mark.slow
def test_two_processes_stop_at_sigterm_together_and_go_on(tmp_path):
    config = {
        "max_steps": 4,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 50,
    }
    whole = run_two(tmp_path / "whole", **config)
    process = start_two(tmp_path / "stopped", slow_rewards=0.3, **config)
    end = time.monotonic() + 60
    while not (tmp_path / "stopped" / "first_rollout").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # which the launcher passes on
    process.wait(60)
    sealed = list((tmp_path / "stopped").glob("checkpoint-*/checkpoint.json"))
    assert len(sealed) == 1 and not list((tmp_path / "stopped").glob("result_*"))
    resumed = run_two(tmp_path / "stopped", resume_from_checkpoint=True, **config)
    assert resumed == whole


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2"])
def test_accelerate_reads_the_files_that_we_ship(name):
    path = REPOSITORY / "trainers" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    expected = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "zero2": "DEEPSPEED"}[name]
    assert config.distributed_type == expected and not config.use_cpu
    assert yaml.safe_load(path.read_text())["num_processes"] == config.num_processes == 8


def test_each_rank_draws_conditions_of_its_own(tmp_path):
    trainer = make_trainer(tmp_path, rows=make_rows(8), per_device_generation_batch_size=8)
    assert len(set(trainer.rollout_rows(0) + trainer.rollout_rows(1))) == 4
