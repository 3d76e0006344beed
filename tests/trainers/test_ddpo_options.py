"""Each option of the DDPO trainer does what it says, and does not change what it should not."""

import copy
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel
from PIL import Image
from transformers import EarlyStoppingCallback

from onereward.hub.adapters import load_adapter
from onereward.pipelines import MaskConditions, OneRewardMaskPipeline
from onereward.rewards.running import condition_key
from onereward.trainers.ddpo import DDPOTrainer
from onereward.trainers.ddpo_config import DDPOConfig


sys.path.append(str(Path(__file__).parent))

from ddpo_setup import brightness, logged, make_pipeline, make_rows, make_trainer, tiny_components  # noqa: E402


def flat(parameters):
    return torch.cat([p.detach().flatten() for p in parameters])


def weights_after_training(*args, **kwargs):
    trainer = make_trainer(*args, **kwargs)
    trainer.train()
    return flat(trainer.policy_parameters)


# ------------------------------------------------------------------------------------------------------------- rewards


def test_rewards_in_threads_give_the_same_training(tmp_path):
    def slowly(images, masks, **columns):
        time.sleep(0.02)
        return brightness(images, masks)

    sync, threads = (weights_after_training(tmp_path, slowly, async_rewards=a) for a in (False, True))
    assert torch.equal(sync, threads)


def test_integer_rewards_train_like_floats(tmp_path):
    def integers(images, **_):
        return (images.mean(dim=(1, 2, 3)) * 1000).long()

    def floats(images, **_):
        return integers(images).double()

    assert torch.equal(*(weights_after_training(tmp_path, reward) for reward in (integers, floats)))


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf])
def test_a_head_that_cannot_score_does_not_move_the_policy(tmp_path, missing):
    def unknown(images, **_):
        return [missing] * len(images)

    alone = weights_after_training(tmp_path, brightness)
    with_it = weights_after_training(tmp_path, [brightness, unknown])
    torch.testing.assert_close(alone, with_it, rtol=0, atol=1e-5)


def test_images_that_some_function_failed_on_are_left_out(tmp_path):
    calls = []

    def flaky(images, masks, **_):
        calls.append(1)
        if len(calls) == 2:
            raise ConnectionError
        return brightness(images, masks)

    trainer = make_trainer(tmp_path, flaky, on_reward_error="skip", max_steps=1)
    trainer.train()
    assert trainer._rollout.tensors["advantages"][4:].abs().max() == 0
    assert trainer._rollout.tensors["advantages"][:4].abs().max() > 0


def test_constrained_images_are_pushed_away_from_and_counted(tmp_path):
    def heads(images, masks, **_):
        light = brightness(images, masks)
        return {"light": light, "dark": -light}

    trainer = make_trainer(tmp_path, heads, reward_constraints={"dark": -0.58}, max_steps=1)
    assert trainer.args.reward_constraints == {"dark": -0.58}
    trainer.train()
    assert trainer.reward_weights == [1.0, 0.0]
    advantages = trainer._rollout.tensors["advantages"]
    share = logged(trainer, "constraints/dark/violated")[0]
    assert 0 < share < 1
    assert (advantages[:, 0] <= 0).float().mean() >= share
    with pytest.raises(ValueError, match=r"`reward_constraints` names \['light'\]"):
        make_trainer(tmp_path, brightness, reward_constraints='{"light": 1}').train()


@pytest.mark.parametrize("baseline", ["running", "value"])
def test_other_baselines_need_no_groups_and_learn(tmp_path, baseline):
    trainer = make_trainer(
        tmp_path,
        rows=make_rows(32),
        eval_rows=make_rows(6, seed=1),
        baseline=baseline,
        num_generations=1,
        per_device_generation_batch_size=32,
        per_device_train_batch_size=32,
        learning_rate=2e-2,
        max_steps=20,
    )
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > before
    if baseline == "value":
        assert all(math.isfinite(error) for error in logged(trainer, "value_error"))
        assert trainer._rollout.tensors["advantages"].std(dim=1).max() > 0  # it depends on the step
    else:
        assert set(trainer.running.buffers) == {condition_key(row) for row in make_rows(32)}


def test_forecast_does_not_depend_on_the_noise_that_a_step_draws(tmp_path):
    trainer = make_trainer(tmp_path, baseline="value")
    conditions, _ = trainer._encode(make_rows(2), [0, 1])
    first, second = (trainer.sampler.generate(conditions, [(k,), (k + 1,)], 4, range(2, 4)).latents for k in (1, 1))
    level = torch.full((8,), 0.5)
    torch.nn.init.normal_(trainer.model.value.layers[-1].weight)
    trainer.model.value.set_units(torch.tensor([0.0, 1.0]))
    values = trainer.model.value(first[:, 0], level, conditions.repeat_interleave(4))
    # what the members of a group share is before the step; what they drew is after it
    assert torch.allclose(values[:4], values[:1].expand(4)) and not torch.allclose(values[0], values[4])
    assert torch.equal(first, second)


# ---------------------------------------------------------------------------------------------------------- estimators


def test_both_estimators_have_one_gradient_on_policy(tmp_path):
    config = {"optim": "sgd", "learning_rate": 10.0, "max_steps": 1, "max_grad_norm": 0.0}
    ours = [weights_after_training(tmp_path, estimator=e, **config) for e in ("importance_sampling", "score_function")]
    start = flat(make_trainer(tmp_path).policy_parameters)
    torch.testing.assert_close(*ours, rtol=1e-4, atol=1e-6)
    assert (ours[0] - start).abs().max() > 1e-3


def test_normalised_ratio_starts_at_one_and_learns(tmp_path):
    trainer = make_trainer(
        tmp_path,
        rows=make_rows(24),
        eval_rows=make_rows(6, seed=1),
        ratio_normalization=True,
        num_iterations=2,
        per_device_generation_batch_size=32,
        per_device_train_batch_size=32,
        num_generations=8,
        learning_rate=1e-2,
        max_steps=20,
    )
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    ratios = logged(trainer, "ratio/max_deviation")
    assert ratios[0] == 0.0 and ratios[1] > 0
    assert trainer.evaluate()["eval_reward"] > before


def test_folding_steps_into_one_batch_gives_the_same_update_in_fewer_calls(tmp_path):
    config = {"optim": "sgd", "learning_rate": 10.0, "max_steps": 1}
    folded = make_trainer(tmp_path, per_device_train_batch_size=16, **config)
    single = make_trainer(tmp_path, per_device_train_batch_size=4, **config)
    for trainer in (folded, single):
        trainer.train()
    torch.testing.assert_close(flat(folded.policy_parameters), flat(single.policy_parameters), rtol=1e-3, atol=1e-5)
    # 2 groups of 4 images, 6 steps, a window of 2 that starts at step 0 or 1
    start = folded._rollout.window.start
    assert logged(folded, "denoiser_calls") == [start + (6 - start) + 1]
    assert logged(single, "denoiser_calls") == [start + 2 * (6 - start) + 4]


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights_stay_frozen_and_the_ratio_keeps_within_the_clip_range(tmp_path, dtype):
    pipeline = make_pipeline().to(dtype)
    trainer = make_trainer(tmp_path, pipeline=pipeline, num_iterations=2, max_steps=2, learning_rate=1e-3)
    assert all(p.dtype == torch.float32 for p in trainer.policy_parameters)
    trainer.train()
    assert logged(trainer, "ratio/max_deviation")[0] <= trainer.args.epsilon / 10
    assert trainer._rollout.tensors["latents"].dtype == torch.float32
    frozen = [p for p in pipeline.unet.parameters() if not p.requires_grad]
    assert frozen and all(p.dtype == dtype for p in frozen)


def test_noise_above_the_clip_range_is_refused_with_its_size_and_the_remedy(tmp_path):
    trainer = make_trainer(tmp_path)
    denoise = trainer.pipeline.denoise

    def with_other_kernels(*args, **kwargs):
        return denoise(*args, **kwargs) * (1.05 if torch.is_grad_enabled() else 1.0)

    trainer.pipeline.denoise = with_other_kernels
    with pytest.raises(ValueError, match=r"off 1 by up to [0-9.e-]+, over a tenth of `epsilon` \(0.001\).*divides"):
        trainer.train()


def test_all_weights_are_trained_in_float32_whatever_they_were_loaded_in(tmp_path):
    pipeline = make_pipeline().to(torch.bfloat16)
    trainer = make_trainer(tmp_path, pipeline=pipeline, bf16=True, full=True, learning_rate=1e-3)
    before = copy.deepcopy(pipeline.unet.state_dict())
    trainer.train()
    after = pipeline.unet.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    assert sum(not torch.equal(before[name].float(), after[name]) for name in after) > 0.9 * len(after)
    assert logged(trainer, "ratio/max_deviation")[0] <= trainer.args.epsilon / 10
    assert not any(p.requires_grad for m in (pipeline.vae, pipeline.text_encoder) for p in m.parameters())


def test_a_tuned_denoiser_is_published_with_its_pipeline_and_a_card(tmp_path):
    trainer = make_trainer(tmp_path / "out", full=True, learning_rate=1e-3)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(dataset_name="boxes")
    loaded = OneRewardMaskPipeline.from_pretrained(tmp_path / "out")
    for name, tensor in trainer.denoiser.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], tensor)
    assert "not for clinical use" in (tmp_path / "out" / "README.md").read_text()


def test_penalty_of_all_weights_is_measured_from_where_they_began(tmp_path):
    trainer = make_trainer(tmp_path, full=True, learning_rate=1e-3, beta=0.1, num_iterations=3, max_steps=3)
    base = copy.deepcopy(trainer.denoiser.state_dict())
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[0] == 0 and kl[-1] > 0
    assert all(torch.equal(trainer.reference.state_dict()[name], tensor) for name, tensor in base.items())
    assert trainer.pipeline.unet is trainer.denoiser


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["to_q", "to_v"], use_dora=True),
        LoraConfig(r=2, target_modules="all-linear", use_rslora=True),
        LoHaConfig(r=2, target_modules=["to_q", "to_v"]),
        LoKrConfig(r=2, target_modules=["to_q", "to_v"]),
    ],
    ids=["DoRA", "rsLoRA", "LoHa", "LoKr"],
)
def test_any_adapter_of_peft_is_trained_saved_and_resumed(tmp_path, config):
    def make(output_dir, **options):
        defaults = {"per_device_generation_batch_size": 8, "per_device_train_batch_size": 4, "num_generations": 4}
        defaults |= {"num_inference_steps": 6, "window_size": 2, "learning_rate": 1e-2, "beta": 0.1, "max_steps": 2}
        defaults |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "lr_scheduler_type": "constant"}
        torch.manual_seed(0)
        args = DDPOConfig(output_dir=str(output_dir), save_steps=1, epsilon=1e-3, **{**defaults, **options})
        return DDPOTrainer(make_pipeline(), brightness, args, make_rows(), peft_config=copy.deepcopy(config))

    trainer = make(tmp_path / "whole")
    trainer.train()
    assert logged(trainer, "kl")[-1] > 0
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert torch.equal(flat(resumed.policy_parameters), flat(trainer.policy_parameters))

    trainer.save_model()
    loaded = PeftModel.from_pretrained(make_pipeline().unet, tmp_path / "whole")
    theirs = {n: p for n, p in loaded.named_parameters() if ".default" in n}
    ours = {n: p for n, p in trainer.denoiser.named_parameters() if ".default" in n}
    assert len(theirs) == len(ours) > 0
    assert all(torch.equal(theirs[f"base_model.model.{name}"], p) for name, p in ours.items())


def test_the_active_adapter_is_trained_on_and_saved(tmp_path):
    first = make_trainer(tmp_path / "first")
    first.train()
    first.save_model()
    pipeline = make_pipeline()
    load_adapter(pipeline, tmp_path / "first", adapter_name="other")
    load_adapter(pipeline, tmp_path / "first", adapter_name="mine")
    args = copy.copy(first.args)
    args.output_dir = str(tmp_path / "second")
    second = DDPOTrainer(pipeline, brightness, args, make_rows())
    assert second.adapter_name == "mine"
    before = flat(second.policy_parameters)
    torch.testing.assert_close(before, flat(first.policy_parameters))
    second.train()
    after = flat(second.policy_parameters)
    assert not torch.equal(before, after)
    other = flat(p for name, p in pipeline.unet.named_parameters() if ".other." in f"{name}.")
    assert torch.equal(other, before)
    second.save_model()
    loaded = make_pipeline()
    load_adapter(loaded, tmp_path / "second", trainable=True)
    assert torch.equal(flat(p for p in loaded.unet.parameters() if p.requires_grad), after)
    pipeline.set_adapters(["mine", "other"])
    with pytest.raises(ValueError, match=r"active adapters \['mine', 'other'\]; expected one"):
        DDPOTrainer(pipeline, brightness, args, make_rows())


# ---------------------------------------------------------------------------------------------------- stop and compare


def test_training_stops_when_a_reward_that_is_not_trained_on_stops_rising(tmp_path):
    def darkness(images, masks, **_):
        return -brightness(images, masks)

    trainer = make_trainer(
        tmp_path,
        eval_rows=make_rows(4, seed=1),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        eval_on_start=True,
        load_best_model_at_end=True,
        metric_for_best_model="eval_heldout/darkness/mean",
        greater_is_better=True,
        max_steps=20,
        eval_reward_funcs=darkness,
        callbacks=[EarlyStoppingCallback(2)],
    )
    trainer.train()
    heldout = logged(trainer, "eval_heldout/darkness/mean")
    assert trainer.state.global_step < 20
    best = trainer.state.best_global_step
    assert heldout[best] == pytest.approx(max(heldout[1:])) and trainer.state.global_step == best + 2
    assert trainer.evaluate()["eval_heldout/darkness/mean"] == pytest.approx(heldout[best], abs=1e-6)
    assert not logged(trainer, "rewards/darkness/mean")


@pytest.mark.slow
def test_compiled_denoiser_gives_the_same_training(tmp_path):
    plain = weights_after_training(tmp_path)
    trainer = make_trainer(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    trainer.train()
    assert logged(trainer, "ratio/max_deviation")[0] <= trainer.args.epsilon / 10
    torch.testing.assert_close(flat(trainer.policy_parameters), plain, rtol=1e-3, atol=1e-4)
    trainer.save_model()
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()


# --------------------------------------------------------------------------------------------------------------- speed


def test_a_rollout_keeps_the_latents_of_the_window_and_no_images(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, bf16=True)
    trainer.train()
    tensors = trainer._rollout.tensors
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "latents": (8, 3, 4, 8, 8),
        "log_probs": (8, 2),
        "advantages": (8, 2),
    }
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


EPOCH = """
import sys
from peft import LoraConfig
from onereward import DDPOConfig, DDPOTrainer, OneRewardMaskPipeline, load_phantom

def brightness(images, masks, **columns):
    return (images * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3))

args = DDPOConfig(
    output_dir=sys.argv[1], max_steps=1, num_inference_steps=20, use_cpu=True, report_to="none", save_strategy="no"
)
assert args.per_device_generation_batch_size == 64
pipeline = OneRewardMaskPipeline.from_pretrained("pipelines/onereward-brats")
adapter = LoraConfig(r=8, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"])
DDPOTrainer(pipeline, brightness, args, load_phantom(2, tasks=("fill",), size=64), peft_config=adapter).train()
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory is read from /proc")
def test_an_epoch_of_64_images_of_64_pixels_in_20_steps_takes_less_than_2_gb(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", EPOCH, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout.split()[-1]) * 1024 < 2e9


# ------------------------------------------------------------------------------------------------------------ the mask


def test_a_lesion_of_one_pixel_is_still_painted(tmp_path):
    rows = make_rows(8)

    def shrink(row):
        mask = Image.new("L", row["mask"].size)
        mask.putpixel((5, 9), 255)
        return {**row, "mask": mask, "label_map": Image.new("L", mask.size)}

    trainer = make_trainer(tmp_path, rows=rows.map(shrink), max_steps=1)
    trainer.train()
    assert (trainer._rollout.conditions.mask.flatten(1).sum(1) == 1).all()
    assert all(math.isfinite(value) and value > 0 for value in logged(trainer, "grad_norm"))


# --------------------------------------------------------------------------------------------------- unusual pipelines


def test_rows_without_a_prompt_run(tmp_path):
    trainer = make_trainer(tmp_path, rows=make_rows().map(lambda row: {**row, "prompt": ""}))
    trainer.train()
    assert logged(trainer, "ratio/max_deviation")[0] == 0.0


def test_a_pipeline_without_text_encoder_runs(tmp_path):
    pipeline = OneRewardMaskPipeline(**{**tiny_components(), "text_encoder": None, "tokenizer": None})
    trainer = make_trainer(
        tmp_path, pipeline=pipeline, rows=make_rows().map(lambda row: {**row, "prompt": ""}), beta=0.1
    )
    trainer.train()
    assert logged(trainer, "ratio/max_deviation")[0] == 0.0


class VolumeDenoiser(torch.nn.Module):
    """Two convolutions in three dimensions, told the timestep by a channel of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Conv3d(4, 8, 3, padding=1), torch.nn.Conv3d(8, 1, 3, padding=1)

    def forward(self, volumes, timestep):
        time = (
            (torch.as_tensor(timestep).float() / 1000).view(-1, 1, 1, 1, 1).expand(len(volumes), 1, *volumes.shape[2:])
        )
        return self.last(torch.nn.functional.silu(self.first(torch.cat([volumes, time], dim=1))))


class VolumePipeline(DiffusionPipeline):
    """What the trainer asks of a pipeline, in three dimensions: volumes of eight equal slices, without a VAE."""

    has_label_channels = False
    reimpose_background = OneRewardMaskPipeline.reimpose_background
    set_timesteps = OneRewardMaskPipeline.set_timesteps

    def __init__(self, unet, vae, scheduler):
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)

    def encode_conditions(self, prompt, image, mask_image, label_map=None, task="fill", guidance_scale=1.0):
        image, mask = (tensor[:, :, None].repeat(1, 1, 8, 1, 1) for tensor in (image, mask_image > 0))
        return MaskConditions(image, mask, mask.float(), None, None, None, torch.zeros(len(image), 1, 4))

    def denoise(self, latents, timestep, conditions, *, guidance_scale=1.0):
        surroundings = conditions.image * (1 - conditions.mask)
        return self.unet(torch.cat([latents, conditions.mask, surroundings], dim=1), timestep)

    def decode(self, latents, conditions):
        return torch.where(conditions.pixel_mask, (latents / 2 + 0.5).clamp(0, 1), conditions.image)


def test_a_denoiser_of_volumes_runs(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(latent_channels=1, block_out_channels=(4,), norm_num_groups=1, layers_per_block=1)
    scheduler = DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    pipeline = VolumePipeline(VolumeDenoiser(), vae, scheduler)
    shapes = []

    def volume_brightness(images, masks, **_):
        shapes.append(tuple(images.shape))
        return (images * masks).flatten(1).sum(1) / masks.flatten(1).sum(1)

    args = DDPOConfig(
        output_dir=str(tmp_path),
        per_device_generation_batch_size=4,
        per_device_train_batch_size=4,
        num_generations=2,
        num_inference_steps=4,
        window_size=2,
        max_steps=2,
        learning_rate=1e-3,
        beta=0.1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    trainer = DDPOTrainer(pipeline, volume_brightness, args, make_rows())
    trainer.train()
    assert shapes == [(4, 1, 8, 16, 16)] * 2
    assert logged(trainer, "ratio/max_deviation")[0] == 0.0
    assert all(math.isfinite(value) and value > 0 for value in logged(trainer, "grad_norm"))
