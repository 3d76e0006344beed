"""Fixtures shared by all tests: a Hub of their own, a tiny random pipeline in each layout, and a few phantom rows."""

import atexit
import os
import shutil
import sys
import tempfile

from loopback_hub import LoopbackHub


# The Hugging Face libraries read these when they are imported. No test asks the real Hub.
assert "huggingface_hub" not in sys.modules
_SCRATCH = tempfile.mkdtemp(prefix="onereward-hub-")
atexit.register(shutil.rmtree, _SCRATCH, ignore_errors=True)
HUB = LoopbackHub(os.path.join(_SCRATCH, "hub")).__enter__()
os.environ.update(HUB.env(os.path.join(_SCRATCH, "home")))
os.environ["HF_HUB_OFFLINE"] = "0"

import pytest
from tiny_components import tiny_components

from onereward import cli
from onereward.data.phantom import load_phantom
from onereward.pipelines import OneRewardMaskPipeline


@pytest.fixture
def tiny_pipeline():
    """`tiny_pipeline(layout=..., image_channels=...)` -> a fresh random pipeline, some thousand parameters."""

    def make(**kwargs) -> OneRewardMaskPipeline:
        pipeline = OneRewardMaskPipeline(**tiny_components(**kwargs))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture(scope="session")
def phantom():
    """Twelve rows of two test cases: two contrasts, all three tasks."""
    return load_phantom(2, contrasts=("t1c", "t2f"), split="test", seed=0)


@pytest.fixture
def hub():
    """The Hub that `huggingface_hub` talks to, in this process and in those that inherit its environment."""
    HUB.fail = None
    HUB.calls.clear()
    yield HUB
    HUB.fail = None


@pytest.fixture
def onereward(monkeypatch, capsys):
    """`onereward("generate", ...)` -> (exit code, output, errors) of the command."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["onereward", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        captured = capsys.readouterr()
        return exit.value.code or 0, captured.out, captured.err

    return run
