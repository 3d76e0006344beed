"""A Space as others get it: what its app uses of ours goes with it, so that it runs wherever it is downloaded to."""

import ast
import json
import re
import shutil
from importlib.metadata import distribution
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from onereward.hub.agreements import find_agreements
from onereward.hub.artefacts import copy_files, forget_folders, stage_folder
from onereward.hub.cards import TEMPLATES


PACKAGE = Path(__file__).resolve().parents[1]
SOURCES = PACKAGE.parents[1]  # the checkout, where the package is in one
BASE = "pipelines/onereward-brats"
SUFFIXES = (".py", ".json", ".safetensors")  # of the package, as in a wheel
LEGAL = ("LICENSE", "NOTICE")


def complete_space(space: Path, base_model: str | None = None) -> None:
    """
    Put beside the app of a Space what it uses of ours and does not have: the package `onereward/`, its licence, and
    the embedded base in `pipelines/onereward-brats/`. A Space installs what `requirements.txt` names before the other
    files are there, so that a wheel beside it would not be found.

    A Space that does not import `onereward`, or brings its own, or names it in `requirements.txt`, stays as it is.

    Args:
        space (`Path`):
            Folder with `app.py`, to be changed.
        base_model (`str`, *optional*):
            Hub id of the pipeline that the Space is to load in place of the embedded base. It goes without weights
            then, and its card names the pipeline, see [`~onereward.hub.published_card.published_card`].

    Raises:
        `ValueError`: when the app wants the embedded base, but neither is it there nor `base_model` given.

    Example:

    ```python
    >>> import shutil
    >>> from pathlib import Path
    >>> from onereward.hub.space import complete_space

    >>> space = Path(shutil.copytree("spaces/onereward-arena", "runs/arena", dirs_exist_ok=True))
    >>> complete_space(space)
    >>> (space / "onereward/__init__.py").is_file(), (space / "pipelines/onereward-brats/model_index.json").is_file()
    (True, True)
    ```
    """
    programs = [path.read_text(encoding="utf-8") for path in sorted(space.glob("*.py"))]
    needs = space / "requirements.txt"
    is_installed = needs.is_file() and re.search(r"^onereward\b", needs.read_text(encoding="utf-8"), re.MULTILINE)
    if (space / "onereward").exists() or is_installed or not any(map(_imports_onereward, programs)):
        return
    files = [path for path in PACKAGE.rglob("*") if path.suffix in SUFFIXES and path.is_file()]
    copy_files(PACKAGE, sorted(path.relative_to(PACKAGE).as_posix() for path in files), space / "onereward")
    templates = sorted(path.name for path in TEMPLATES.glob("*.jinja"))
    copy_files(TEMPLATES, templates, space / "onereward/model_cards")
    for name in LEGAL:
        (space / name).write_text(_legal_text(name), encoding="utf-8")

    if base_model is not None:
        shutil.rmtree(space / BASE, ignore_errors=True)
    elif any(BASE in program for program in programs) and not (space / BASE).is_dir():
        base = SOURCES / BASE
        if not base.is_dir():
            raise ValueError(
                f"The app uses {BASE}, which is neither beside it nor part of the installed package. Name a pipeline "
                "on the Hub with `base_model` (`--base-model org/name`), or put a pipeline there."
            )
        stage_folder("pipeline", base, space / BASE)
        forget_folders(space / BASE)


def agreements_of_space(space: Path) -> list[str]:
    """The agreements that hold for a Space: of the models in it, and of the images that its study shows."""
    found = set()
    for record in space.rglob("*/provenance.json"):
        found.update(json.loads(record.read_text(encoding="utf-8")).get("agreements", ()))
    for table in space.rglob("*.parquet"):
        if "source" in pq.read_schema(table).names:
            found.update(find_agreements(*pc.unique(pq.read_table(table, columns=["source"])["source"]).to_pylist()))
    return sorted(found)


def _imports_onereward(program: str) -> bool:
    for node in ast.walk(ast.parse(program)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        if any(name.split(".")[0] == "onereward" for name in names):
            return True
    return False


def _legal_text(name: str) -> str:
    """From the checkout, or of an installed package from where pip keeps it."""
    beside = SOURCES / name
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    return distribution("onereward").read_text(f"licenses/{name}")
