"""Files that are whole or not there."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """
    Write a file so that nobody sees half of it, not even after a crash: inside `with` it has another name, and takes
    its own only when all of it is on the disk. If the block fails, what was there before stays.

    Args:
        path (`str` or `os.PathLike`):
            The file, replaced if it exists. Its folder is made where it is missing.

    Returns:
        `Path`: where to write.

    Example:

    ```python
    >>> with whole_file("report.md") as partial:
    ...     partial.write_text("All of it.", encoding="utf-8")
    ```
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value) -> None:
    """Write a value as an indented JSON file that nobody sees half of, see [`whole_file`]."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
