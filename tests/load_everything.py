"""
Load everything that was published, in a process of its own, and save what it gives: `load_everything.py OUT [OPTION]`.

    --without-package   as where onereward is not installed: the code of the repositories is run
    --offline           from the cache alone
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch


PIPELINES = {
    "mask": "OneRewardMaskPipeline",
    "flux": "OneRewardFluxFillPipeline",
    "sd3": "OneRewardSD3InpaintPipeline",
}


def paint(pipeline):
    """An image of 16 x 16 pixels, the same for the same weights."""
    pipeline.set_progress_bar_config(disable=True)
    channels = pipeline.vae.config.in_channels
    image = np.random.default_rng(0).random((1, 16, 16, channels), dtype=np.float32)
    mask = np.zeros((1, 16, 16, 1), dtype=np.float32)
    mask[:, 4:12, 4:12] = 1
    more = {} if "unet" in pipeline.components else {"max_sequence_length": 32}
    generator = torch.Generator().manual_seed(0)
    output = pipeline("tumour", image, mask, num_inference_steps=2, generator=generator, output_type="np", **more)
    return np.asarray(output.images)


def score(model):
    """What the reward model thinks of noise."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    image, source = torch.rand(2, 1, config.image_channels, config.image_size, config.image_size, generator=generator)
    mask = torch.zeros(1, 1, config.image_size, config.image_size)
    mask[..., 4:12, 4:12] = 1
    rewards = model.score(image, mask, source, tasks=list(config.tasks[:1]))
    return np.array([rewards[criterion].item() for criterion in config.criteria])


def digest(rows):
    """A number for each row: what is in it, the pixels of its pictures included."""
    numbers = []
    for row in rows:
        content = hashlib.sha256()
        for name in sorted(row):
            value = row[name]
            content.update(f"{name}={value if value is None or not hasattr(value, 'tobytes') else ''}".encode())
            if hasattr(value, "tobytes"):
                content.update(f"{value.size}{value.mode}".encode() + value.tobytes())
        numbers.append(int.from_bytes(content.digest()[:6], "big"))
    return np.array(sorted(numbers))


def main(out, with_package, offline):
    if with_package:
        import onereward  # noqa: F401
    else:
        sys.modules["onereward"] = None  # as if it was not installed
    import datasets
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download
    from peft import PeftModel
    from transformers import AutoModel

    trust = {} if with_package else {"trust_remote_code": True}
    # diffusers asks the Hub for the commit of a repository's code, and for the name of LoRA weights, even offline
    by_hand = offline and not with_package
    weight_name = {"weight_name": "pytorch_lora_weights.safetensors"} if by_hand else {}
    results = {}
    for name, class_name in PIPELINES.items():
        repo = f"org/{name}"
        if by_hand:
            repo = Path(hf_hub_download(repo, "model_index.json")).parent
        if not with_package and not offline:
            try:
                DiffusionPipeline.from_pretrained(repo)
            except ValueError as error:
                assert "trust_remote_code=True" in str(error), error
            else:
                raise AssertionError("the code of the repository was run unasked")
        pipeline = DiffusionPipeline.from_pretrained(repo, **trust)
        assert type(pipeline).__name__ == class_name, type(pipeline)
        assert type(pipeline).__module__.startswith("onereward." if with_package else "diffusers_modules.")
        results[name] = paint(pipeline)
        if with_package:
            own = getattr(onereward, class_name).from_pretrained(repo)
            assert type(own) is type(pipeline)
            results[f"{name} own class"] = paint(own)

        pipeline.load_lora_weights(f"org/{name}-adapter", **weight_name)
        results[f"{name} diffusers"] = paint(pipeline)
        pipeline.unload_lora_weights()
        if with_package:
            from onereward.hub.adapters import load_adapter

            load_adapter(pipeline, f"org/{name}-adapter")
            results[f"{name} load_adapter"] = paint(pipeline)
            pipeline.unload_lora_weights()
        denoiser = "unet" if "unet" in pipeline.components else "transformer"
        tuned = PeftModel.from_pretrained(getattr(pipeline, denoiser), f"org/{name}-adapter")
        setattr(pipeline, denoiser, tuned.base_model.model)
        results[f"{name} peft"] = paint(pipeline)

    reward = AutoModel.from_pretrained("org/reward", **trust)
    assert type(reward).__module__.startswith("onereward." if with_package else "transformers_modules.")
    results["reward"] = score(reward.eval())

    for name in ("rows", "votes"):
        results[name] = digest(datasets.load_dataset(f"org/{name}", split="train"))
        if not offline:
            results[f"{name} streaming"] = digest(datasets.load_dataset(f"org/{name}", split="train", streaming=True))
    if with_package:
        assert not [module for module in sys.modules if module.startswith(("diffusers_modules", "transformers_mod"))]
    np.savez(out, **results)


if __name__ == "__main__":
    main(sys.argv[1], "--without-package" not in sys.argv, "--offline" in sys.argv)
