"""Packaging of OneReward. `make install` builds a virtual environment from it with the versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent

VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "src/onereward/__init__.py").read_text(encoding="utf-8"))[1]

# Lower bounds are the oldest versions the tests have run with.
INSTALL_REQUIRES = [
    "torch>=2.13",
    "diffusers>=0.42",
    "transformers>=5.23,<6",
    "trl>=1.16",
    "datasets>=5.2",
    "huggingface_hub>=2.4",
    "filelock>=3.13",
    "peft>=0.21",
    "accelerate>=1.15",
    "safetensors>=0.8",
    "numpy>=2.0",
    "scipy>=1.13",
    "Pillow>=11.0",
    "nibabel>=5.3",
    "nilearn>=0.14",  # ships the MNI152 anatomy that the phantom is made of
    "monai>=1.6",
    "typer>=0.20",
    "rich>=14.0",
    "tqdm>=4.66",
    "jinja2>=3.1",
    "matplotlib>=3.9",
]

EXTRAS_REQUIRE = {
    "space": ["gradio[oauth]>=6.31", "spaces>=0.50", "pydicom>=3.0", "pandas>=2.2"],
    "dicom": ["pydicom>=3.0", "highdicom>=0.23"],
    "itk": ["SimpleITK>=2.4"],
    "opencv": ["opencv-python-headless>=4.10"],  # two baselines of the counterfactual benchmark
    "lpips": ["lpips>=0.1.4"],  # brings torchvision, hence outside of everything else
    "docs": [
        "mkdocs>=1.6,<2",
        "mkdocs-material>=9.8",
        "mkdocstrings-python>=2.0",
        "latex2mathml>=3.81",  # formulas without a script from elsewhere
    ],
    "dev": [
        "pytest>=8.0",
        "pytest-xdist>=3.6",
        "pytest-timeout>=2.3",
        "ruff>=0.17",
        "scikit-image>=0.25",
        "scikit-learn>=1.6",
        "choix>=0.4",
        "playwright>=1.55",  # drives a Chromium that is installed already
        "tensorboard>=2.18",
    ],
}

README = ROOT / "README.md"

setup(
    name="onereward",
    version=VERSION,
    description="Preference-tuned, mask-guided medical image generation on the Hugging Face stack",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The OneReward contributors",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11,<3.14",
    # The card templates lie at the top of the repository, for people; in a wheel they are onereward/model_cards.
    packages=[*find_packages("src"), "onereward.model_cards"],
    package_dir={"": "src", "onereward.model_cards": "model_cards"},
    package_data={"": ["*.json", "*.safetensors"], "onereward.model_cards": ["*.md.jinja"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["onereward=onereward.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
