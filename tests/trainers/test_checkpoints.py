"""A checkpoint is whole and of this run, or it is refused by name and the one before it is used."""

import json
import os
import signal
import time

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from onereward.trainers.checkpoints import (
    SEAL,
    ForeignCheckpointError,
    StopOnSignal,
    TrainingStopped,
    check_checkpoint,
    fingerprint,
    last_whole_checkpoint,
    load_state,
    save_state,
    seal_checkpoint,
)


RUN = {"seed": 0, "rows": [8, "abc"]}


def make_checkpoint(output_dir, step, run=RUN):
    folder = output_dir / f"checkpoint-{step}"
    (folder / "unet").mkdir(parents=True)
    (folder / "optimizer.safetensors").write_bytes(os.urandom(1000))
    (folder / "unet" / "weights.safetensors").write_bytes(os.urandom(1000))
    seal_checkpoint(folder, run)
    return folder


def truncate(folder):
    path = folder / "unet" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:500])


def change(folder):
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


SPOILT = {
    "no checkpoint.json": lambda folder: (folder / SEAL).unlink(),
    "no JSON": lambda folder: (folder / SEAL).write_text("{"),
    "unet/weights.safetensors has changed": truncate,
    "optimizer.safetensors has changed": change,
    "optimizer.safetensors is missing": lambda folder: (folder / "optimizer.safetensors").unlink(),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_checkpoint_that_is_not_whole_is_refused_by_name_and_the_previous_one_is_used(tmp_path, what, caplog):
    first, second, last = (make_checkpoint(tmp_path, step) for step in (2, 9, 10))
    check_checkpoint(last, RUN)
    assert last_whole_checkpoint(tmp_path, RUN) == str(last)
    SPOILT[what](last)
    with pytest.raises(ValueError, match=rf"checkpoint-10 is not whole: .*{what}"):
        check_checkpoint(last, RUN)
    assert last_whole_checkpoint(tmp_path, RUN) == str(second)
    SPOILT[what](second)
    assert last_whole_checkpoint(tmp_path, RUN) == str(first)
    SPOILT[what](first)
    assert last_whole_checkpoint(tmp_path, RUN) is None


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(tmp_path):
    folder = make_checkpoint(tmp_path, 1)
    with pytest.raises(
        ValueError, match=r"checkpoint-1 is of another run: `seed` was 0 and is 1. Resume with the same"
    ):
        check_checkpoint(folder, {**RUN, "seed": 1})
    make_checkpoint(tmp_path, 2, {**RUN, "seed": 1})
    assert last_whole_checkpoint(tmp_path, RUN) == str(folder)
    assert last_whole_checkpoint(tmp_path, {**RUN, "seed": 1}) == str(tmp_path / "checkpoint-2")
    with pytest.raises(ForeignCheckpointError, match="checkpoint-1 is of another run"):
        last_whole_checkpoint(tmp_path, {**RUN, "seed": 2})


def test_without_checkpoints_there_is_none(tmp_path):
    assert last_whole_checkpoint(tmp_path, RUN) is None
    assert last_whole_checkpoint(tmp_path / "missing", RUN) is None


def test_seal_names_every_file(tmp_path):
    folder = make_checkpoint(tmp_path, 1)
    sealed = set(json.loads((folder / SEAL).read_text())["files"])
    assert sealed == {"optimizer.safetensors", "unet/weights.safetensors"}


def test_fingerprint_tells_models_apart_and_one_model_from_itself_not():
    torch.manual_seed(0)
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    assert fingerprint(first) == fingerprint(first.to(torch.float64).float()) != fingerprint(second)


@pytest.mark.parametrize("fused", [False, True], ids=["loop", "fused"])
def test_an_optimizer_goes_on_from_its_state_to_the_same_weights(tmp_path, fused):
    """In the memory layout of convolutions too, which fused optimizers rely on."""
    torch.manual_seed(0)
    batches = torch.randn(4, 2, 3, 8, 8)

    def start():
        torch.manual_seed(1)
        model = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        return model, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)

    def train(model, optimizer, schedule, batches):
        for batch in batches:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            schedule.step()

    whole = start()
    train(*whole, batches)
    first = start()
    train(*first, batches[:2])
    for name, part in zip(("model", "optimizer", "schedule"), first, strict=True):
        save_state(tmp_path / name, part.state_dict())
    second = start()
    for name, part in zip(("model", "optimizer", "schedule"), second, strict=True):
        part.load_state_dict(load_state(tmp_path / name))
    train(*second, batches[2:])
    assert torch.equal(second[0].weight, whole[0].weight) and not torch.equal(first[0].weight, whole[0].weight)


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {0: [None, True, 1, 0.1, float("inf"), "x"], "tuple": (1, (2.5,)), "dict": {"a": {}}, "none": ()}
    save_state(tmp_path / "state", state)
    assert load_state(tmp_path / "state") == state
    scaler = torch.amp.GradScaler("cpu")
    save_state(tmp_path / "scaler", scaler.state_dict())
    assert load_state(tmp_path / "scaler") == scaler.state_dict()


def test_what_only_a_pickle_can_hold_is_refused_by_place(tmp_path):
    with pytest.raises(TypeError, match=r"`state\['groups'\]\[1\]` is a object"):
        save_state(tmp_path / "state", {"groups": [1, object()]})
    assert not (tmp_path / "state").exists()


@pytest.fixture
def stop(tmp_path):
    callback, args = StopOnSignal(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    callback.on_train_begin(args, TrainerState(), TrainerControl())
    yield callback, args
    callback.on_train_end(args, TrainerState(), TrainerControl())


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.05)


def test_a_signal_stops_the_training_where_it_may_stop(stop):
    callback, args = stop
    callback.check(args)
    send(signal.SIGTERM)
    with pytest.raises(TrainingStopped):
        callback.check(args)
    with pytest.raises(SystemExit) as exit:
        callback.end()
    assert exit.value.code == 0


def test_a_second_ctrl_c_stops_at_once(stop):
    callback, args = stop
    send(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    with pytest.raises(TrainingStopped):
        callback.check(args)
    with pytest.raises(KeyboardInterrupt):
        callback.end()


def test_signals_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    callback, args = StopOnSignal(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    callback.on_train_begin(args, TrainerState(), TrainerControl())
    assert signal.getsignal(signal.SIGTERM) != before
    callback.on_train_end(args, TrainerState(), TrainerControl())
    assert signal.getsignal(signal.SIGTERM) == before
