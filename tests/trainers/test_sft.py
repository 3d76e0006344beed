"""What `SFTTrainer` promises: the stated losses, exact resume, EMA, adapters in both formats."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import EMAModel, compute_snr
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from onereward.data.phantom import load_phantom
from onereward.data.schema import rows_to_tensors
from onereward.pipelines import OneRewardMaskPipeline
from onereward.trainers.sft import SFTConfig, SFTTrainer, min_snr_weight, weighted_error


LORA = {"r": 2, "lora_alpha": 8, "target_modules": ["to_q", "to_v", "conv1"]}


@pytest.fixture(scope="module")
def rows():
    return load_phantom(2, contrasts=("t1c", "t2f"), seed=1)


@pytest.fixture
def make_trainer(tiny_pipeline, rows, tmp_path):
    def make(lora=None, layout="2c+1+K", prediction_type="v_prediction", rows=rows, **kwargs):
        args = SFTConfig(
            **{
                "output_dir": str(tmp_path / "sft"),
                "max_steps": 4,
                "save_steps": 2,
                "learning_rate": 1e-2,
                "lr_scheduler_type": "constant",
                "per_device_train_batch_size": 4,
                "use_cpu": True,
                "report_to": "none",
                "disable_tqdm": True,
            }
            | kwargs
        )
        pipeline = tiny_pipeline(layout=layout, prediction_type=prediction_type)
        return SFTTrainer(pipeline, args, rows, rows, lora and LoraConfig(**lora))

    return make


# -------------------------------------------------------------------------------------------------- the mathematics


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_the_error_of_the_sample_alike_whatever_is_predicted(prediction_type):
    """An error of the prediction that stands for the same error of the sample must cost min(SNR, gamma) times it."""
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    timesteps = torch.tensor([10, 300, 700, 999])
    alpha = scheduler.alphas_cumprod[timesteps]
    snr = compute_snr(scheduler, timesteps)
    torch.testing.assert_close(snr, alpha / (1 - alpha))
    # x0 = (x - sqrt(1 - a) e) / sqrt(a) = sqrt(a) x - sqrt(1 - a) v: how far the sample moves with the prediction
    slope = {"epsilon": ((1 - alpha) / alpha).sqrt(), "v_prediction": (1 - alpha).sqrt(), "sample": torch.ones(4)}
    weight = min_snr_weight(snr, 5.0, prediction_type)
    torch.testing.assert_close(weight / slope[prediction_type] ** 2, snr.clamp(max=5.0), rtol=1e-4, atol=0)


def test_weighted_error_is_the_mean_when_weights_are_equal_and_ignores_what_weighs_nothing():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)
    expected = torch.nn.functional.mse_loss(prediction, target, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(weighted_error(prediction, target, torch.full((2, 1, 4, 4), 7.0)), expected)
    weight = torch.zeros(2, 1, 4, 4)
    weight[:, :, :2] = 1
    half = ((prediction - target) ** 2)[:, :, :2].mean((1, 2, 3))
    torch.testing.assert_close(weighted_error(prediction, target, weight), half)


def test_loss_is_that_of_the_scheduler_velocity(make_trainer, rows):
    """With all variation off, against the same computation written out with diffusers' scheduler."""
    off = dict.fromkeys(
        ["random_mask_prob", "label_dropout", "prompt_dropout", "condition_dropout", "task_prompt_prob"], 0.0
    )
    trainer = make_trainer(mask_loss_weight=1.0, **off)
    pipeline, scheduler = trainer.pipeline, trainer.pipeline.scheduler
    batch = rows_to_tensors([rows[i] for i in range(4)])
    trainer.model.eval()
    torch.manual_seed(3)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)

    torch.manual_seed(3)
    torch.randint(2**62, ())  # the seed of the variation
    with torch.no_grad():
        latents = pipeline.vae.encode(batch["targets"] * 2 - 1).latent_dist.mode() * pipeline.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = ((torch.arange(4) + torch.rand(())) / 4 * 1000).long()
        conditions = pipeline.encode_conditions(
            batch["prompts"], batch["targets"], batch["masks"], batch["label_maps"], task=batch["tasks"]
        )
        output = pipeline.denoise(scheduler.add_noise(latents, noise, timesteps), timesteps, conditions)
    expected = torch.nn.functional.mse_loss(output, scheduler.get_velocity(latents, noise, timesteps))
    torch.testing.assert_close(loss, expected)


# ------------------------------------------------------------------------------------------------------- variation


def test_variation_keeps_masks_usable_and_drops_what_it_says(make_trainer, rows):
    trainer = make_trainer(random_mask_prob=1.0, condition_dropout=1.0)
    batch = rows_to_tensors([rows[i] for i in range(12)])
    varied = trainer.vary(batch)
    assert varied["prompts"] == [""] * 12 and varied["keep_label_map"].sum() == 0
    for before, after, task in zip(batch["masks"], varied["masks"], batch["tasks"], strict=True):
        assert after.any() and set(after.unique().tolist()) <= {0.0, 1.0}
        if task == "extend":
            assert torch.equal(before, after)
        if task == "fill":
            assert (after >= before).all()
    assert not torch.equal(batch["masks"], varied["masks"])
    _, conditions = trainer.encode(varied)
    assert conditions.label_map.sum() == 0


def test_no_dropout_keeps_everything(make_trainer, rows):
    off = dict.fromkeys(
        ["random_mask_prob", "label_dropout", "prompt_dropout", "condition_dropout", "task_prompt_prob"], 0.0
    )
    batch = rows_to_tensors([rows[i] for i in range(6)])
    varied = make_trainer(**off).vary(batch)
    assert torch.equal(varied["masks"], batch["masks"]) and varied["prompts"] == batch["prompts"]
    assert varied["keep_label_map"].tolist() == [1.0] * 6


def test_shares_outside_zero_to_one_are_refused():
    with pytest.raises(ValueError, match="`label_dropout` is 1.5"):
        SFTConfig(label_dropout=1.5, use_cpu=True)


def test_rows_without_target_are_refused(make_trainer, rows):
    without = rows.map(lambda row: {"target": None})
    with pytest.raises(ValueError, match="without a target"):
        make_trainer(rows=without).train()


# ------------------------------------------------------------------------------------------- training and resuming


@pytest.mark.parametrize("layout", ["c", "2c+1", "2c+1+K"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_training_lowers_the_held_out_loss(make_trainer, layout, prediction_type):
    trainer = make_trainer(layout=layout, prediction_type=prediction_type, max_steps=30, save_strategy="no")
    before, again = trainer.evaluate()["eval_loss"], trainer.evaluate()["eval_loss"]
    trainer.train()
    assert before == again
    assert trainer.evaluate()["eval_loss"] < 0.9 * before


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_resumed_training_ends_with_the_same_weights(make_trainer, lora, ema_decay, tmp_path):
    kwargs = {"lora": lora, "ema_decay": ema_decay, "train_text_encoder": lora is None}
    whole = make_trainer(**kwargs)
    whole.train()
    resumed = make_trainer(**kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "sft" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert len(whole.trainable) == len(resumed.trainable) > 0
    for a, b in zip(whole.trainable + whole.ema.averages, resumed.trainable + resumed.ema.averages, strict=True):
        assert torch.equal(a, b)
    if lora:
        assert list(resumed.pipeline.unet.peft_config) == ["default"]


def test_average_of_the_weights_is_that_of_diffusers(make_trainer):
    trainer = make_trainer(ema_decay=0.5, max_steps=3, save_strategy="no")
    theirs = EMAModel(trainer.trainable)

    class Follow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            decay = min(0.5, (1 + state.global_step) / (10 + state.global_step))
            for average, weight in zip(theirs.shadow_params, trainer.trainable, strict=True):
                average.sub_((1 - decay) * (average - weight.detach()))

    trainer.add_callback(Follow())
    trainer.train()
    for ours, expected in zip(trainer.ema.averages, theirs.shadow_params, strict=True):
        torch.testing.assert_close(ours, expected)


def test_what_is_saved_is_the_average(make_trainer, tmp_path):
    trainer = make_trainer(ema_decay=0.9)
    trainer.train()
    trainer.save_model()
    loaded = OneRewardMaskPipeline.from_pretrained(tmp_path / "sft")
    for parameter, average in zip(loaded.unet.parameters(), trainer.ema.averages, strict=True):
        assert torch.equal(parameter, average)
    assert not (tmp_path / "sft" / "weights_behind_ema.safetensors").exists()
    assert any(not torch.equal(a, b) for a, b in zip(trainer.trainable, trainer.ema.averages, strict=True))


def test_adapter_loads_into_diffusers_and_peft_alike(make_trainer, tiny_pipeline, rows, tmp_path):
    trainer = make_trainer(lora=LORA)
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "sft"
    assert len(load_file(folder / "adapter_model.safetensors")) == len(trainer.trainable)

    def paint(pipeline):
        row = rows[0]
        generator = torch.Generator().manual_seed(0)
        arguments = {"num_inference_steps": 2, "generator": generator, "output_type": "np"}
        return pipeline(row["prompt"], row["image"], row["mask"], row["label_map"], **arguments).images

    by_diffusers, by_peft = tiny_pipeline(), tiny_pipeline()
    base = paint(by_diffusers)
    by_diffusers.load_lora_weights(str(folder))
    by_peft.unet = PeftModel.from_pretrained(by_peft.unet, str(folder))
    tuned = paint(trainer.pipeline)
    assert np.abs(tuned - base).max() > 1e-4
    np.testing.assert_allclose(paint(by_diffusers), tuned, atol=1e-6)
    np.testing.assert_allclose(paint(by_peft), tuned, atol=1e-6)


def test_only_the_denoiser_is_trained_unless_asked(make_trainer):
    trainer = make_trainer()
    trained = {id(p) for p in trainer.trainable}
    assert trained == {id(p) for p in trainer.pipeline.unet.parameters()}
    trainer = make_trainer(train_text_encoder=True)
    text = {id(p) for p in trainer.pipeline.text_encoder.parameters()}
    assert text <= {id(p) for p in trainer.trainable}
    with pytest.raises(ValueError, match="cannot go with `peft_config`"):
        make_trainer(lora=LORA, train_text_encoder=True)


def test_weights_in_half_precision_are_trained_in_full(tiny_pipeline, rows, tmp_path):
    pipeline = tiny_pipeline().to(torch.bfloat16)
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    trainer = SFTTrainer(pipeline, args, rows, peft_config=LoraConfig(**LORA))
    assert {p.dtype for p in trainer.trainable} == {torch.float32}


@pytest.mark.parametrize("lora", [None, LORA], ids=["all-weights", "new-adapter"])
def test_a_denoiser_with_an_adapter_is_refused_with_the_remedy(tiny_pipeline, rows, tmp_path, lora):
    """A new one would switch it off; and with all weights trained it would be saved as no pipeline can load it."""
    pipeline = tiny_pipeline()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="first")
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    with pytest.raises(ValueError, match=r"adapters \['first'\] already.*fuse_lora"):
        SFTTrainer(pipeline, args, rows, peft_config=lora and LoraConfig(**lora))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    trainer = SFTTrainer(pipeline, args, rows, peft_config=lora and LoraConfig(**lora))
    assert list(getattr(trainer.pipeline.unet, "peft_config", None) or {}) == (["default"] if lora else [])


# ------------------------------------------------------------------------------------------------ several processes


def record(trainer):
    """What the batches of a training hold, and what is drawn for them."""
    drawn = {"targets": [], "noise": [], "timesteps": []}
    vary, add_noise = trainer.vary, trainer.pipeline.scheduler.add_noise

    def vary_and_record(batch):
        drawn["targets"] += batch["targets"].flatten(1).double().sum(1).tolist()
        return vary(batch)

    def add_noise_and_record(latents, noise, timesteps):
        drawn["noise"] += noise.flatten(1)[:, 0].tolist()
        drawn["timesteps"] += timesteps.tolist()
        return add_noise(latents, noise, timesteps)

    trainer.vary, trainer.pipeline.scheduler.add_noise = vary_and_record, add_noise_and_record
    return drawn


def test_processes_draw_noise_of_their_own_and_shuffle_rows_alike(make_trainer, monkeypatch):
    drawn = []
    for rank in range(2):
        monkeypatch.setattr(SFTConfig, "process_index", rank)
        trainer = make_trainer(max_steps=1, save_strategy="no")
        drawn.append(record(trainer))
        for _ in range(2):  # the second time the random states differ from the beginning
            trainer.train()
    assert drawn[0]["targets"] == drawn[1]["targets"]
    assert set(drawn[0]["noise"]).isdisjoint(drawn[1]["noise"])
    assert drawn[0]["timesteps"] != drawn[1]["timesteps"]


PROCESS = """
import json, sys
from pathlib import Path
import torch
from test_sft import OneRewardMaskPipeline, SFTConfig, SFTTrainer, load_phantom, record
from tiny_components import tiny_components

folder, results = Path(sys.argv[1]), []
rows = load_phantom(8, contrasts=("t1c",), tasks=("fill",), seed=1)
for checkpoint in (None, str(folder / "checkpoint-2")):
    torch.manual_seed(0)
    args = SFTConfig(
        output_dir=str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, use_cpu=True, report_to="none", disable_tqdm=True,
    )
    trainer = SFTTrainer(OneRewardMaskPipeline(**tiny_components()), args, rows)
    results.append(record(trainer))
    trainer.train(resume_from_checkpoint=checkpoint)
    results[-1]["weights"] = torch.cat([p.detach().flatten() for p in trainer.trainable]).tolist()
(folder / f"result_{args.process_index}.json").write_text(json.dumps(results))
"""


@pytest.mark.slow
def test_two_processes_share_the_rows_draw_their_own_noise_and_resume_exactly(tmp_path):
    (tmp_path / "process.py").write_text(PROCESS)
    port = 29900 + os.getpid() % 90
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    path = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *filter(None, sys.path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    result = subprocess.run(
        [*command, str(tmp_path / "process.py"), str(tmp_path)], env=environment, timeout=200, capture_output=True
    )
    assert result.returncode == 0, result.stderr.decode()[-3000:]
    results = [json.loads((tmp_path / f"result_{rank}.json").read_text()) for rank in range(2)]
    (first, _), (second, _) = results
    assert first["weights"] == second["weights"]
    epoch = first["targets"][:4] + second["targets"][:4]
    assert len(set(epoch)) == 8 and set(epoch) == set(first["targets"] + second["targets"])
    assert set(first["noise"]).isdisjoint(second["noise"]) and first["timesteps"] != second["timesteps"]
    for whole, resumed in results:
        assert resumed["weights"] == whole["weights"]
        assert all(resumed[name] == whole[name][8:] for name in ("targets", "noise", "timesteps"))


def test_gradient_checkpointing_changes_nothing_but_memory(make_trainer):
    plain = make_trainer(max_steps=2)  # a trainer seeds the random numbers when it is made, and must train at once
    plain.train()
    checkpointed = make_trainer(max_steps=2, activation_checkpointing=True)
    checkpointed.train()
    assert checkpointed.pipeline.unet.is_gradient_checkpointing and not plain.pipeline.unet.is_gradient_checkpointing
    for a, b in zip(plain.trainable, checkpointed.trainable, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_every_option_is_documented():
    for field in dataclasses.fields(SFTConfig):
        if field.name in SFTConfig.__annotations__:
            assert field.metadata.get("help") or field.name == "output_dir"
            assert field.name in ("output_dir", "remove_unused_columns") or f"{field.name} (" in SFTConfig.__doc__
