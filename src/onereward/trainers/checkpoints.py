"""Checkpoints that are whole, are those of this run and need no pickle; and a stop that leaves one behind."""

import hashlib
import json
import os
import signal
import threading
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from onereward.data.whole_file import whole_file


logger = logging.get_logger(__name__)

SEAL = "checkpoint.json"


def save_state(path: str | os.PathLike, state) -> None:
    """
    Write the state of an optimizer, a schedule or a random generator without a pickle: one safetensors file that has
    the tensors by number, and in its header as JSON how they hang together.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        state:
            Dicts, lists and tuples, nested, of tensors, numbers, strings and `None`.

    Raises:
        `TypeError`: when something else is in it. The message says where.

    Example:

    ```python
    >>> import torch
    >>> from onereward.trainers.checkpoints import load_state, save_state

    >>> save_state("state.safetensors", {0: {"step": torch.tensor(3.0), "betas": (0.9, 0.999)}})
    >>> load_state("state.safetensors")
    {0: {'step': tensor(3.), 'betas': (0.9, 0.999)}}
    ```
    """
    numbers, tensors = {}, {}

    def written(value, where):
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if torch.is_tensor(value):
            number = numbers.setdefault(id(value), str(len(numbers)))
            tensors[number] = value.detach().contiguous()
            # fused optimizers walk through weights and moments in the order in which they lie in memory
            return {"tensor": [number, value.stride()]}
        if isinstance(value, dict):  # with keys that JSON would turn into strings
            return {"dict": [[written(k, where), written(v, f"{where}[{k!r}]")] for k, v in value.items()]}
        if type(value) in (list, tuple):
            return {type(value).__name__: [written(v, f"{where}[{i}]") for i, v in enumerate(value)]}
        raise TypeError(
            f"`state{where}` is a {type(value).__name__}, which a pickle alone can hold, and there are none here. "
            "Take an optimizer and a schedule whose state is tensors and numbers."
        )

    structure = json.dumps(written(state, ""))
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata={"state": structure})


def load_state(path: str | os.PathLike):
    """
    What [`save_state`] wrote, to the last bit, with its tensors on the CPU.

    Args:
        path (`str` or `os.PathLike`):
            The file.
    """
    with safe_open(path, framework="pt") as file:
        structure, tensors = json.loads(file.metadata()["state"]), {n: file.get_tensor(n) for n in file.keys()}

    def read(value):
        if not isinstance(value, dict):
            return value
        [(kind, content)] = value.items()
        if kind == "tensor":
            number, stride = content
            return torch.empty_strided(tensors[number].shape, stride, dtype=tensors[number].dtype).copy_(
                tensors[number]
            )
        if kind == "dict":
            return {read(k): read(v) for k, v in content}
        return {"list": list, "tuple": tuple}[kind](map(read, content))

    return read(structure)


def fingerprint(module: torch.nn.Module) -> str:
    """
    Name of a module's weights: of all names and shapes, and of the first and last values of each tensor. Enough to
    tell two models apart, and quick for a large one.

    Args:
        module (`torch.nn.Module`):
            The module.

    Returns:
        `str`: hexadecimal digest.
    """
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        ends = torch.cat([tensor.flatten()[:8], tensor.flatten()[-8:]]).float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + ends.numpy().tobytes())
    return digest.hexdigest()[:32]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal_checkpoint(folder: str | os.PathLike, run: dict) -> None:
    """
    Declare a checkpoint whole: write down the digest of each of its files, and what run it is of. The seal comes last,
    so that a checkpoint whose writing was cut short has none.

    Args:
        folder (`str` or `os.PathLike`):
            The checkpoint.
        run (`dict`):
            What a run that goes on from it must agree with, as JSON.
    """
    folder = Path(folder)
    digests = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    with whole_file(folder / SEAL) as partial:
        partial.write_text(json.dumps({"run": run, "files": digests}, indent=2), encoding="utf-8")


class ForeignCheckpointError(ValueError):
    """A checkpoint is whole, but of another run or an older version."""


def check_checkpoint(folder: str | os.PathLike, run: dict) -> None:
    """
    Refuse a checkpoint that is not whole, or not of this run.

    Args:
        folder (`str` or `os.PathLike`):
            The checkpoint.
        run (`dict`):
            What it must agree with, see [`seal_checkpoint`].

    Raises:
        `ValueError`: when it is not sealed, or a file is missing or has changed; a [`ForeignCheckpointError`] when it
        is of another run, or of an older version that wrote pickles. The message names the checkpoint and what is
        wrong with it.
    """
    folder = Path(folder)
    if (folder / "optimizer.pt").is_file():
        raise ForeignCheckpointError(
            f"{folder} was written by an older version: its optimizer.pt is a pickle, which is not read. Finish that "
            "run with the version that began it, or start a new one from its weights."
        )
    if not (folder / SEAL).is_file():
        raise ValueError(f"{folder} is not whole: it has no {SEAL}, which is written last. Use an earlier checkpoint.")
    try:
        seal = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder} is not whole: {SEAL} is no JSON ({error}). Use an earlier checkpoint.") from error
    for name, digest in seal["files"].items():
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            what = "has changed" if (folder / name).is_file() else "is missing"
            raise ValueError(f"{folder} is not whole: {name} {what} since it was saved. Use an earlier checkpoint.")
    run = json.loads(json.dumps(run))
    others = {name: value for name, value in seal["run"].items() if value != run.get(name)}
    if others:
        differences = ", ".join(f"`{name}` was {value} and is {run.get(name)}" for name, value in others.items())
        raise ForeignCheckpointError(
            f"{folder} is of another run: {differences}. Resume with the same settings; to go on from its weights "
            "with others, load it as an adapter and start a new run."
        )


def last_whole_checkpoint(output_dir: str | os.PathLike, run: dict) -> str | None:
    """
    The newest checkpoint of a run that is whole. Each newer one that is refused is named in a warning.

    Args:
        output_dir (`str` or `os.PathLike`):
            Folder of the checkpoints.
        run (`dict`):
            What it must agree with, see [`seal_checkpoint`].

    Returns:
        `str` or `None`: its folder; `None` when no checkpoint is whole.

    Raises:
        `ForeignCheckpointError`: when none is left but those of another run or an older version.
    """
    foreign = None
    for folder in reversed(sort_checkpoints(str(output_dir)) if os.path.isdir(output_dir) else []):
        try:
            check_checkpoint(folder, run)
            return folder
        except ValueError as error:
            logger.warning(str(error))
            foreign = error if isinstance(error, ForeignCheckpointError) else foreign
    if foreign is not None:
        raise foreign
    return None


class TrainingStopped(Exception):
    """The training was asked to stop, and is at a point where it can."""


class StopOnSignal(TrainerCallback):
    """
    On SIGTERM, which is what schedulers send before they kill, and on Ctrl-C, the training stops before its next
    batch, on all processes alike, so that the trainer can save a checkpoint. A second Ctrl-C stops it where it is.
    """

    def __init__(self):
        self.received = 0  # the signal
        self._handlers = {}

    def _handle(self, number, frame):
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = number
        logger.warning(f"{signal.Signals(number).name}: finishing this batch, then saving a checkpoint.")

    def on_train_begin(self, args, state, control, **kwargs):
        self.received = 0
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._handlers = {
                number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)
            }

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def check(self, args) -> None:
        """
        To be called, by all processes, where the training may stop.

        Args:
            args (`TrainingArguments`):
                Arguments of the training.

        Raises:
            [`TrainingStopped`]: when any process was asked to.
        """
        if args.world_size > 1:
            received = torch.tensor(self.received, device=args.device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            self.received = int(received)
        if self.received:
            raise TrainingStopped

    def end(self) -> None:
        """What the signal asked for, now that all is saved: the process ends, or the training is interrupted."""
        if self.received == signal.SIGTERM:
            raise SystemExit(0)
        raise KeyboardInterrupt
