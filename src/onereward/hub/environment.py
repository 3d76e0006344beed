"""What a run gives depends on it: the versions of packages, and the commit of our own code."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


# In a wheel the templates lie inside the package, in a checkout at the top of the repository.
PACKAGE = Path(__file__).resolve().parents[1]

STACK = ("torch", "diffusers", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "onereward")


def current_environment():
    """Versions of Python and of the packages that decide what a run gives, as `dict[str, str]`."""
    versions = {"python": platform.python_version()}
    for package in STACK:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # onereward itself, when run from a checkout that was not installed
            continue
    return versions


def source_commit():
    """Commit of the checkout that the package is imported from, or `None` outside of a checkout."""
    result = subprocess.run(
        ["git", "-C", str(PACKAGE), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() if result.returncode == 0 else None
