"""DDPO learns, starts exactly on-policy, and resumes exactly."""

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from peft import LoraConfig
from safetensors import safe_open

from onereward.hub.adapters import load_adapter
from onereward.policy import seeded_generator


sys.path.append(str(Path(__file__).parent))

from ddpo_setup import brightness, logged, make_pipeline, make_rows, make_trainer  # noqa: E402


def flat(parameters):
    return torch.cat([p.detach().flatten() for p in parameters])


# ----------------------------------------------------------------------------------------------------------- on-policy

CHAINS = [
    *({"layout": layout} for layout in ("c", "2c+1", "2c+1+K")),
    *({"prediction_type": p, "timestep_spacing": s} for p in ("epsilon", "sample") for s in ("leading", "linspace")),
    {"rescale_betas_zero_snr": True},
    {"guidance_scale": 2.0},
    {"bf16": True},
    {"same_initial_noise": False},
]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(map(str, chain.values())))
def test_ratio_of_an_untouched_policy_is_exactly_one(tmp_path, chain):
    scheduler = {k: chain[k] for k in ("timestep_spacing", "rescale_betas_zero_snr") if k in chain}
    parts = {k: chain[k] for k in ("layout", "prediction_type") if k in chain}
    options = {k: v for k, v in chain.items() if k not in {**scheduler, **parts}}
    pipeline = make_pipeline(scheduler, **parts)
    # two updates for each of two passes over a rollout, so that old log-probabilities are really compared
    trainer = make_trainer(
        tmp_path,
        pipeline=pipeline,
        learning_rate=0.0,
        gradient_accumulation_steps=2,
        num_iterations=2,
        max_steps=4,
        **options,
    )
    trainer.train()
    assert logged(trainer, "ratio/max_deviation") == [0.0] * 4
    assert logged(trainer, "ratio/mean") == [1.0] * 4
    assert logged(trainer, "clip_ratio") == [0.0] * 4
    assert all(math.isfinite(value) and value > 0 for value in logged(trainer, "grad_norm"))


def test_training_refuses_when_rollout_and_training_pass_differ(tmp_path):
    trainer = make_trainer(tmp_path, lora={"lora_dropout": 0.5, "init_lora_weights": False})
    with pytest.raises(ValueError, match=r"(?s)off 1 by up to .*`epsilon` \(0.001\).*lora_dropout=0"):
        trainer.train()


# ------------------------------------------------------------------------------------------------------------ learning


def test_reward_of_unseen_conditions_rises(tmp_path):
    trainer = make_trainer(
        tmp_path,
        rows=make_rows(24),
        eval_rows=make_rows(6, seed=1),
        per_device_generation_batch_size=32,
        per_device_train_batch_size=32,
        num_generations=8,
        learning_rate=2e-2,
        max_steps=20,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_reward"] > before["eval_reward"]
    assert after["eval_reward_gain"] > 1
    assert after["eval_reward_gain"] == pytest.approx(
        (after["eval_reward"] - before["eval_reward"]) / before["eval_reward_std"]
    )


def test_only_the_adapter_changes(tmp_path):
    pipeline = make_pipeline()
    trainer = make_trainer(tmp_path, pipeline=pipeline)
    modules = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    before = [{name: p.detach().clone() for name, p in module.named_parameters()} for module in modules]
    trainer.train()
    changed = {
        name
        for module, parameters in zip(modules, before, strict=True)
        for name, parameter in module.named_parameters()
        if not torch.equal(parameter, parameters[name])
    }
    assert changed and all("lora_" in name for name in changed)


def test_a_reward_that_cannot_tell_images_apart_moves_nothing(tmp_path):
    for rewards in (lambda images, **_: [3] * len(images), lambda images, **_: [None] * len(images)):
        trainer = make_trainer(tmp_path, rewards)
        before = flat(trainer.policy_parameters)
        trainer.train()
        assert torch.equal(before, flat(trainer.policy_parameters))


def test_penalty_pulls_back_to_the_reference(tmp_path):
    trainer = make_trainer(
        tmp_path,
        lambda images, **_: torch.zeros(len(images)),
        lora={"init_lora_weights": False},
        beta=1.0,
        num_iterations=12,  # of one rollout, so that the same divergence is measured each time
        max_steps=12,
    )
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[0] > 0 and kl[-1] < 0.7 * kl[0]


def test_beta_follows_its_target(tmp_path):
    trainer = make_trainer(tmp_path, lora={"init_lora_weights": False}, beta=0.5, kl_target=1e-9, max_steps=3)
    trainer.train()
    assert logged(trainer, "beta") == [1.0, 2.0, 4.0]


def test_a_divergence_below_its_target_leaves_the_penalty_on(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.5, kl_target=1.0, max_steps=8, num_inference_steps=3, window_size=1)
    trainer.train()
    assert logged(trainer, "beta") == [0.5 / 2**n for n in (1, 2, 3, 4, 5, 6, 6, 6)]


# ---------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("active", [True, False], ids=["active", "switched-off"])
def test_a_new_adapter_does_not_silently_switch_off_one_that_is_loaded(tmp_path, active):
    pipeline = make_pipeline()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="sft")
    if not active:
        pipeline.unet.disable_adapters()
    with pytest.raises(ValueError, match=r"`peft_config` is given, .*\['sft'\].*fuse_lora.*delete_adapters"):
        make_trainer(tmp_path, pipeline=pipeline)
    assert pipeline.unet.active_adapters() == ["sft"]


def test_a_new_adapter_is_trained_on_top_of_one_that_was_fused(tmp_path):
    pipeline = make_pipeline()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="sft")
    conditions = pipeline.encode_conditions("oedema", *(make_rows(1)[0][name] for name in ("image", "mask")))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pipeline.denoise(latents, 500, conditions)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        trainer = make_trainer(tmp_path, pipeline=pipeline)
        torch.testing.assert_close(pipeline.denoise(latents, 500, conditions), expected, rtol=1e-4, atol=1e-5)
    assert trainer.adapter_name == "default"


# ------------------------------------------------------------------------------------------------------------- rollout


def test_conditions_are_encoded_once_a_group_and_rollout(tmp_path):
    trainer = make_trainer(tmp_path, num_iterations=2, max_steps=4)
    counts = {"vae": 0, "text": 0}
    encode, encode_text = trainer.pipeline.vae.encode, trainer.pipeline.text_encoder.forward

    def count_images(pixels, *args, **kwargs):
        counts["vae"] += len(pixels)
        return encode(pixels, *args, **kwargs)

    def count_texts(input_ids, *args, **kwargs):
        counts["text"] += len(input_ids)
        return encode_text(input_ids, *args, **kwargs)

    trainer.pipeline.vae.encode, trainer.pipeline.text_encoder.forward = count_images, count_texts
    trainer.train()
    assert counts == {"vae": 4, "text": 4}  # two rollouts of two groups


def test_every_row_has_its_turn_in_each_epoch(tmp_path):
    trainer = make_trainer(tmp_path)
    epochs = [[row for i in range(4) for row in trainer.rollout_rows(4 * epoch + i)] for epoch in range(2)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1]


# ------------------------------------------------------------------------------------------------------------- rewards


def test_reward_functions_get_the_images_and_every_column(tmp_path):
    calls = []

    def spy(**arguments):
        calls.append(arguments)
        return arguments["images"].mean(dim=(1, 2, 3))

    # batches of 4 images cut groups of 3 in two; the functions get whole ones all the same
    make_trainer(
        tmp_path,
        spy,
        max_steps=1,
        num_generations=3,
        per_device_generation_batch_size=12,
        per_device_train_batch_size=4,
    ).train()
    assert [len(call["images"]) for call in calls] == [3, 3, 6]
    seen = calls[-1]
    assert set(seen) == {
        *("images", "masks", "sources", "label_maps", "prompts"),
        *("task", "modality", "case_id", "source", "target"),
    }
    assert seen["images"].shape == seen["sources"].shape == seen["masks"].shape == seen["label_maps"].shape
    assert seen["images"].shape == (6, 1, 16, 16) and seen["images"].min() >= 0 and seen["images"].max() <= 1
    assert seen["case_id"][:3] == seen["case_id"][:1] * 3 and seen["case_id"][0] != seen["case_id"][3]
    assert seen["label_maps"].dtype == torch.int64 and all(isinstance(prompt, str) for prompt in seen["prompts"])
    assert torch.equal(seen["images"][seen["masks"] == 0], seen["sources"][seen["masks"] == 0])


def test_each_image_is_scored_with_its_own_columns(tmp_path):
    rows = make_rows().map(lambda row: {**row, "prompt": f"oedema of {row['case_id']}"})
    sources = {row["case_id"]: torch.tensor(np.asarray(row["image"])).float() / 255 for row in rows}

    def check(images, masks, sources_=sources, **columns):
        for i, case in enumerate(columns["case_id"]):
            assert columns["prompts"][i] == f"oedema of {case}"
            assert torch.equal(columns["sources"][i, 0], sources_[case])
            assert torch.equal(images[i][masks[i] == 0], columns["sources"][i][masks[i] == 0])
        return brightness(images, masks)

    make_trainer(tmp_path, check, rows=rows, max_steps=4).train()


def test_heads_are_logged_by_name_and_weighed(tmp_path):
    def heads(images, **_):
        values = images.mean(dim=(1, 2, 3))
        return {"light": values, "dark": -values}

    trainer = make_trainer(tmp_path, [heads, brightness], reward_weights=[1.0, 1.0, 0.0], max_steps=1)
    before = flat(trainer.policy_parameters)
    trainer.train()
    for name in ("light", "dark", "brightness"):
        assert len(logged(trainer, f"rewards/{name}/mean")) == len(logged(trainer, f"rewards/{name}/std")) == 1
    assert logged(trainer, "reward")[0] == pytest.approx(0, abs=1e-6)
    assert (flat(trainer.policy_parameters) - before).abs().max() < 1e-4  # the two cancel: rounding is left


def test_wrong_rewards_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="different names"):
        make_trainer(tmp_path, [brightness, brightness]).train()
    with pytest.raises(ValueError, match=r"one weight for each of the heads \['brightness'\]"):
        make_trainer(tmp_path, brightness, reward_weights=[1.0, 2.0]).train()


# --------------------------------------------------------------------------------------- evaluation, logging and files


def test_evaluation_is_deterministic_and_in_batches_of_any_size(tmp_path):
    rows = make_rows(5, seed=1)
    trainer = make_trainer(tmp_path, eval_rows=rows, per_device_eval_batch_size=5)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_reward"] == second["eval_reward"] and second["eval_reward_gain"] == 0
    assert first["eval_reward"] == first["eval_rewards/brightness/mean"] and first["eval_reward_std"] > 0
    trainer.args.per_device_eval_batch_size = 2
    assert trainer.evaluate()["eval_reward"] == pytest.approx(first["eval_reward"], abs=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_each_process_takes_part_in_an_evaluation_of_any_number_of_rows(tmp_path, monkeypatch, count):
    trainer = make_trainer(tmp_path, eval_rows=make_rows(3, seed=1), per_device_eval_batch_size=1)
    rows = list(range(count))
    expected, _ = trainer._evaluate_rows(trainer.eval_dataset, rows, 1, range(0), "")
    sent = {0: [(row, [[math.nan]]) for row in rows]}  # until the first process, which is run last, has its own
    calls, denoise = [], trainer.pipeline.denoise
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    monkeypatch.setattr(
        trainer.pipeline, "denoise", lambda *args, **kwargs: calls.append(rank) or denoise(*args, **kwargs)
    )
    monkeypatch.setattr(
        "onereward.trainers.ddpo.gather_object", lambda scored: sent.update({rank: scored}) or sent[0] + sent[1]
    )
    for rank in (1, 0):
        monkeypatch.setattr(type(trainer.args), "process_index", rank)
        trainer.scorer.names = None
        rewards, _ = trainer._evaluate_rows(trainer.eval_dataset, rows, 1, range(0), "")
        assert trainer.reward_names == ["brightness"]
    assert torch.equal(rewards, expected)
    assert calls.count(0) == calls.count(1)  # weights that are split over processes are gathered in each call


def test_samples_go_to_a_folder_and_to_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "logs")
    try:
        make_trainer(tmp_path, log_samples_steps=1, report_to="tensorboard").train()
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step_000000.png", "step_000001.png"]
    events = EventAccumulator(str(tmp_path / "logs"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [0, 1]
    assert {"train/reward", "train/images_per_second", "train/time_outside_denoiser"} <= set(events.Tags()["scalars"])


def test_saved_adapter_gives_the_images_of_the_trainer(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=0.5)
    trainer.train()
    trainer.save_model()
    conditions, _ = trainer._encode(make_rows(2), [0, 1])
    with trainer.ema.applied():
        expected = trainer.sampler.generate(conditions, [(1,), (2,)]).images
    raw = trainer.sampler.generate(conditions, [(1,), (2,)]).images
    assert not torch.equal(raw, expected)

    pipeline = make_pipeline()
    load_adapter(pipeline, tmp_path)
    chain = trainer.sampler.chain(conditions)
    pipeline.scheduler.set_timesteps(6)
    latents = torch.stack([torch.randn(4, 8, 8, generator=seeded_generator(i, 0)) for i in (1, 2)])
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            # 6 steps do not divide 1000: the trainer's own chain decides what follows
            step = chain.timesteps.tolist().index(int(t))
            output = pipeline.denoise(latents, t, conditions)
            latents = trainer.sampler.transition(chain, step, output, latents, conditions.mask, eta=0.0).next_sample
        images = pipeline.decode(latents, conditions)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    files = {path.name for path in tmp_path.iterdir()}
    assert {"pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"} <= files
    assert not any(name.endswith((".bin", ".pt")) or name == "model.safetensors" for name in files)


def test_samples_go_to_trackio_and_wandb(tmp_path, monkeypatch):
    for name in ("trackio", "wandb"):
        logs = []
        module = SimpleNamespace(log=lambda values, logs=logs, **_: logs.append(values), Image=Path)
        trainer = make_trainer(tmp_path / name, log_samples_steps=1)
        trainer.args.report_to = [name]
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, module)
            trainer.train()
        assert [entry["samples"].name for entry in logs] == ["step_000000.png", "step_000001.png"]


def test_push_to_hub_uploads_the_adapter_and_its_card(tmp_path, hub):
    make_pipeline().save_pretrained(tmp_path / "base")
    HfApi().create_repo("org/tiny")
    HfApi().upload_folder(repo_id="org/tiny", folder_path=tmp_path / "base")
    trainer = make_trainer(tmp_path, hub_model_id="org/adapter", hub_base_model="org/tiny")
    trainer.train()
    trainer.push_to_hub(dataset_name="boxes")
    folder = Path(snapshot_download("org/adapter"))
    names = {path.name for path in folder.iterdir()}
    assert {"pytorch_lora_weights.safetensors", "adapter_model.safetensors"} <= names
    card = (folder / "README.md").read_text()
    assert "org/adapter" in card and "not for clinical use" in card
    load_adapter(make_pipeline(), folder)


def test_card_says_what_was_done(tmp_path):
    trainer = make_trainer(tmp_path, eval_rows=make_rows(2, seed=1), eval_strategy="steps", eval_steps=1)
    trainer.train()
    trainer.create_model_card(model_name="adapter", dataset_name="boxes")
    text = " ".join((tmp_path / "README.md").read_text().split())
    assert "Research use only, not for clinical use." in text
    assert "2 updates of DDPO on 8 conditions of boxes, 4 images of each at a time." in text
    assert "votes" in text and "2 unseen conditions" in text
    assert f"{logged(trainer, 'eval_reward')[-1]:.4g}" in text


# --------------------------------------------------------------------------------------------- resuming and processes


@pytest.mark.parametrize("stop", [2, 3], ids=["between-rollouts", "within-a-rollout"])
def test_resumed_training_is_the_uninterrupted_one(tmp_path, stop):
    config = {
        "gradient_accumulation_steps": 2,
        "ema_decay": 0.9,
        "beta": 0.1,
        "kl_target": 1e-5,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": stop,
        "max_steps": 6,
    }
    whole = make_trainer(tmp_path / "whole", **config)
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{stop}"
    assert (checkpoint / "rollout_0.safetensors").exists() == (stop % 2 == 1)

    resumed = make_trainer(tmp_path / "resumed", **config)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(flat(resumed.policy_parameters), flat(whole.policy_parameters))
    assert torch.equal(flat(resumed.ema.averages), flat(whole.ema.averages))
    assert resumed.beta == whole.beta != config["beta"]
    for ours, theirs in zip(
        resumed.optimizer.state_dict()["state"].values(), whole.optimizer.state_dict()["state"].values(), strict=True
    ):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert list(resumed.pipeline.unet.peft_config) == ["default"]
    assert resumed.state.global_step == whole.state.global_step == 6
    for name in ("loss", "reward", "kl"):
        after = len(logged(whole, name)) - len([e for e in whole.state.log_history if e["step"] <= stop and name in e])
        assert logged(resumed, name)[-after:] == logged(whole, name)[-after:]


def test_activation_checkpointing_changes_nothing_but_memory(tmp_path):
    weights = []
    for options in ({}, {"activation_checkpointing": True}, {"gradient_checkpointing": True}):
        trainer = make_trainer(tmp_path, **options)
        trainer.train()
        assert trainer.pipeline.unet.is_gradient_checkpointing == bool(options)
        weights.append(flat(trainer.policy_parameters))
    torch.testing.assert_close(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])


def test_checkpoint_holds_the_adapter_and_not_the_denoiser(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    with safe_open(tmp_path / "checkpoint-2" / "adapter_model.safetensors", "pt") as file:
        assert all("lora_" in name for name in file.keys())
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()


def test_launch_script_trains_saves_and_writes_a_card(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "base")
    rows = datasets.DatasetDict(train=make_rows(), validation=make_rows(2, seed=1))
    rows.save_to_disk(tmp_path / "rows")
    (tmp_path / "config.yaml").write_text(
        "num_generations: 4\nper_device_generation_batch_size: 8\nper_device_train_batch_size: 8\n"
        "num_inference_steps: 4\nwindow_size: 2\nmax_steps: 9\n"
    )
    script = Path(__file__).parents[2] / "trainers" / "ddpo.py"
    arguments = ["--config", "config.yaml", "--model_name_or_path", "base", "--dataset_name", "rows"]
    arguments += ["--reward_funcs", "ddpo_setup:brightness", "--max_steps", "1", "--output_dir", "out"]
    result = subprocess.run(
        [sys.executable, str(script), *arguments, "--use_cpu", "true", "--save_strategy", "no"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert {"README.md", "adapter_config.json", "pytorch_lora_weights.safetensors"} <= set(
        os.listdir(tmp_path / "out")
    )
    load_adapter(make_pipeline(), tmp_path / "out")
    assert "1 updates of DDPO" in (tmp_path / "out" / "README.md").read_text()
