"""`import onereward` stays quick and light, and every public name resolves."""

import statistics
import subprocess
import sys
from importlib import import_module

import pytest

import onereward


HEAVY = ["torch", "numpy", "diffusers", "transformers", "datasets", "monai", "trl", "PIL", "typer"]


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_takes_less_than_half_a_second():
    code = "import time; start = time.perf_counter(); import onereward; print(time.perf_counter() - start)"
    assert statistics.median(float(run_python(code)) for _ in range(3)) < 0.5


def test_import_brings_in_no_heavy_package():
    code = f"import sys, onereward; print([name for name in {HEAVY} if name in sys.modules])"
    assert run_python(code) == "[]"


@pytest.mark.parametrize("name", onereward.__all__)
def test_public_name_resolves(name):
    module = import_module(f"onereward.{onereward._MODULES[name]}")
    assert getattr(onereward, name) is getattr(module, name)
    assert getattr(getattr(onereward, name), "__name__", name) == name


def test_every_public_name_is_listed_once():
    assert sorted(onereward._MODULES) == sorted(onereward.__all__)
    assert set(onereward.__all__) <= set(dir(onereward))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'OneRewardPipelin'"):
        _ = onereward.OneRewardPipelin


def test_trainers_are_found_in_their_package():
    trainers = import_module("onereward.trainers")
    for name in trainers.__all__:
        assert getattr(trainers, name) is getattr(onereward, name)
    assert sorted(trainers.__all__) == sorted(n for n, module in onereward._MODULES.items() if "trainers" in module)
