"""A saved pipeline carries its own code: people without the package load it with `trust_remote_code=True`."""

import json
import os
import subprocess
import sys

import numpy as np
import torch


PAINT = """
import numpy as np, torch
def paint(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    image = np.random.default_rng(0).random((1, 16, 16, 1), dtype=np.float32)
    mask = np.zeros((1, 16, 16, 1), dtype=np.float32)
    mask[:, 4:12, 4:12] = 1
    generator = torch.Generator().manual_seed(0)
    output = pipeline("tumour", image, mask, num_inference_steps=2, generator=generator, output_type="np")
    return np.asarray(output.images)
"""
exec(PAINT)  # the very same function here and in the other process

STRANGER = """
import sys
sys.modules["onereward"] = None  # as if it was not installed
from diffusers import DiffusionPipeline
folder, again = sys.argv[1:]
try:
    DiffusionPipeline.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("the repository's code was run without the flag")
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
assert type(pipeline).__name__ == "OneRewardMaskPipeline"
assert type(pipeline).__module__.startswith("diffusers_modules"), type(pipeline).__module__
named = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
assert type(named).__name__ == "OneRewardMaskPipeline"
pipeline.save_pretrained(again)
np.save(again + "/image.npy", paint(pipeline))
"""


def test_the_saved_code_gives_the_image_of_the_package(tiny_pipeline, tmp_path):
    pipeline = tiny_pipeline()
    folder, again = tmp_path / "saved", tmp_path / "again"
    pipeline.save_pretrained(folder)
    result = subprocess.run(
        [sys.executable, "-c", PAINT + STRANGER, folder, again],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
    )
    assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(np.load(again / "image.npy"), paint(pipeline))  # noqa: F821
    assert (again / "pipeline.py").read_bytes() == (folder / "pipeline.py").read_bytes()
    index, index_again = (json.loads((path / "model_index.json").read_text()) for path in (folder, again))
    assert index_again == index
