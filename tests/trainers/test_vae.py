"""What `VAETrainer` promises: it learns, resumes exactly, and leaves latents of unit variance."""

import pytest
import torch
from diffusers import AutoencoderKL

from onereward.data.phantom import load_phantom
from onereward.trainers.vae import VAEConfig, VAETrainer, gradient_error, kl_to_standard_normal


@pytest.fixture(scope="module")
def rows():
    return load_phantom(2, contrasts=("t1c", "t2f"), tasks=("fill",), seed=1)


@pytest.fixture
def make_trainer(tiny_pipeline, rows, tmp_path):
    def make(**kwargs):
        args = VAEConfig(
            **{
                "output_dir": str(tmp_path / "vae"),
                "max_steps": 4,
                "save_steps": 2,
                "lr_scheduler_type": "constant",
                "per_device_train_batch_size": 2,
                "use_cpu": True,
                "report_to": "none",
                "disable_tqdm": True,
            }
            | kwargs
        )
        return VAETrainer(tiny_pipeline().vae, args, rows, rows)

    return make


def test_kl_is_that_of_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_to_standard_normal(mean, logvar), expected)


def test_gradient_error_sees_edges_and_no_offset():
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gradient_error(images + 0.3, images), torch.tensor(0.0), atol=1e-6, rtol=0)
    edge = torch.zeros(1, 1, 4, 4)
    edge[..., 2:] = 1.0  # 4 of the 12 horizontal differences are 1
    torch.testing.assert_close(gradient_error(edge, torch.zeros_like(edge)), torch.tensor(4 / 12))


def test_training_lowers_the_held_out_loss_and_leaves_latents_of_unit_variance(make_trainer, rows):
    trainer = make_trainer(max_steps=40, save_strategy="no", learning_rate=5e-3)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before
    vae = trainer.vae
    pixels = trainer.collate([rows[i] for i in range(4)])["pixel_values"]
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(latents.mean()) < 1e-4 and abs(latents.std() - 1) < 1e-4


def test_resumed_training_ends_with_the_same_weights(make_trainer, tmp_path):
    whole = make_trainer()
    whole.train()
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "vae" / "checkpoint-2"))
    for a, b in zip(whole.vae.parameters(), resumed.vae.parameters(), strict=True):
        assert torch.equal(a, b)


def test_processes_draw_noise_of_their_own_and_shuffle_rows_alike(make_trainer, monkeypatch):
    pixels, images = [], []

    def record(module, arguments, output):
        pixels.append(arguments[0])
        images.append(output[0].detach())

    for rank in range(2):
        monkeypatch.setattr(VAEConfig, "process_index", rank)
        trainer = make_trainer(max_steps=1, save_strategy="no", learning_rate=0.0)
        trainer.model.register_forward_hook(record)
        trainer.train()
    assert torch.equal(pixels[0], pixels[1]) and not torch.equal(images[0], images[1])


def test_saved_vae_loads_into_diffusers_with_its_scaling(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    trainer.save_model()
    loaded = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert loaded.config.scaling_factor == trainer.vae.config.scaling_factor != 0.18215
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trainer.vae.parameters(), strict=True))
