"""What the Generate tab does, without a page: a pipeline, the adapters that may be put on it, and a reward model."""

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

import spaces
from onereward import OneRewardMaskPipeline, OneRewardModel
from onereward.data.scans import Scan
from onereward.generate import GenerateSettings, paint_picture
from onereward.hub.adapters import DIFFUSERS_WEIGHTS, load_adapter


BASE = "base"
HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}(@[\w./-]{1,64})?")
MAX_ADAPTERS = 8  # kept in memory
MAX_ADAPTER_BYTES = 512 * 2**20
MAX_PROMPT = 500  # characters
MAX_STRETCH = 16  # between the sides of a picture
LIMITS = {
    "num_inference_steps": (1, 50),
    "num_images": (1, 8),
    "guidance_scale": (0, 20),
    "adapter_strength": (0, 2),
    "seed": (0, 2**32 - 1),
}


@dataclass
class Job:
    """
    What is to be painted.

    Args:
        scan ([`~onereward.data.scans.Scan`]):
            Where the source is from.
        picture (`np.ndarray` of shape `(H, W)` or `(H, W, 3)`):
            The source in its own numbers: 8 bits, 16 bits, HU, ...
        mask (`np.ndarray` of shape `(H, W)`, bool):
            Where to repaint.
        label_map (`np.ndarray` of shape `(H, W)`, uint8, *optional*):
            What to put there.
        window (`tuple[float, float]`, *optional*):
            Centre and width of what the model sees of a grey picture.
        spacing (`tuple[float, float]`):
            Distance of rows and columns.
        num_images (`int`):
            Images to paint, with seeds that follow on each other.
        settings ([`~onereward.generate.GenerateSettings`]):
            Task, prompt, adapter, steps, guidance and seed.
    """

    scan: Scan
    picture: np.ndarray
    mask: np.ndarray
    label_map: np.ndarray | None
    window: tuple[float, float] | None
    spacing: tuple[float, float]
    num_images: int
    settings: GenerateSettings

    def check(self) -> None:
        """Raises a `ValueError` that says what is wrong, in words for people."""
        for name, (least, most) in LIMITS.items():
            value = self.num_images if name == "num_images" else getattr(self.settings, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
                raise ValueError(f"`{name}` is {str(value)[:40]}; it must be a number from {least} to {most}.")
        if self.settings.task not in ("fill", "remove", "extend"):
            raise ValueError(f"`task` is {str(self.settings.task)[:40]!r}; it must be fill, remove or extend.")
        prompt = "" if self.settings.prompt is None else self.settings.prompt
        if not isinstance(prompt, str) or not prompt.isprintable():  # half characters are not printable either
            raise ValueError("`prompt` must be plain text in one line.")
        if len(prompt) > MAX_PROMPT:
            raise ValueError(f"`prompt` has {len(prompt):,} characters; at most {MAX_PROMPT} are read.")
        if not self.mask.any():
            raise ValueError("The mask is empty: paint where the picture is to change.")
        # black is put around what is no square, in mm: a spacing that is out of proportion would ask for all memory
        sides = [number * distance for number, distance in zip(self.mask.shape, self.spacing, strict=True)]
        if max(sides) > MAX_STRETCH * min(sides):
            raise ValueError(
                f"The picture is {sides[1]:.3g} x {sides[0]:.3g} mm by its header; one side may be at most "
                f"{MAX_STRETCH} times the other. Crop it, or correct the spacing."
            )


class Painter:
    """
    A pipeline with its adapters and a reward model, for one picture at a time.

    Args:
        pipeline (`str`):
            Folder or Hub id.
        adapters (`Path`, *optional*):
            Folder whose sub-folders are adapters that may be picked by name. No other folder is ever read.
        reward_model (`str`, *optional*):
            Folder or Hub id.
    """

    def __init__(self, pipeline: str, adapters: Path | None = None, reward_model: str | None = None):
        self.source = pipeline
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipeline = OneRewardMaskPipeline.from_pretrained(pipeline).to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.reward_model = None
        if reward_model is not None:
            self.reward_model = OneRewardModel.from_pretrained(reward_model).eval().to(self.device)
        found = sorted(adapters.iterdir()) if adapters is not None and adapters.is_dir() else []
        self.adapters = {folder.name: folder for folder in found if folder.is_dir()}
        self.loaded: list[str] = []
        self.lock = threading.Lock()

    @property
    def labels(self) -> dict[str, int]:
        """Names and values of the labels that the pipeline paints, without the background."""
        if not self.pipeline.has_label_channels:
            return {}
        labels = sorted(self.pipeline.config.labels.items(), key=lambda label: label[1])
        return {name: value for name, value in labels if value != 0}

    def paint(self, job: Job, on_step: Callable[[int, int], bool]) -> list[np.ndarray]:
        """
        Paint, one image after the other.

        Args:
            job ([`Job`]):
                What to paint.
            on_step (`Callable`):
                Called with steps done and steps in all; where it returns `True`, painting stops.

        Returns:
            `list[np.ndarray]`: pictures in the numbers of the source, as many as were asked for, or fewer when it was
            stopped. Outside the mask they are the source.
        """
        job.check()
        with self.lock:
            self._put_on(job.settings)
            return paint_images(self.pipeline, job, on_step)

    def rewards(self, job: Job, shown: list[np.ndarray], source: np.ndarray) -> list[dict[str, float]]:
        """
        Of each picture, 8 bits as it is shown, what the reward model thinks, by criterion; nothing where there is no
        model for such pictures.
        """
        model = self.reward_model
        if model is None or not shown or job.settings.task not in model.config.tasks:
            return [{} for _ in shown]
        size, channels = (model.config.image_size,) * 2, model.config.image_channels

        def tensor(picture, mode="area"):
            picture = torch.from_numpy(np.ascontiguousarray(picture)).float()
            picture = picture[None, None] if picture.ndim == 2 else picture.permute(2, 0, 1)[None]
            return torch.nn.functional.interpolate(picture, size, mode=mode)

        def pixels(picture):
            found = tensor(picture) / 255
            return found.mean(1, keepdim=True) if channels == 1 else found.expand(-1, channels, -1, -1)

        number = len(shown)
        labels = np.zeros(job.mask.shape, np.uint8) if job.label_map is None else job.label_map
        scores = model.score(
            torch.cat([pixels(picture) for picture in shown]).to(self.device),
            (tensor(job.mask.astype(np.uint8)) > 0).float().expand(number, -1, -1, -1).to(self.device),
            pixels(source).expand(number, -1, -1, -1).to(self.device),
            tensor(labels, "nearest").long().expand(number, -1, -1, -1).to(self.device),
            [job.settings.prompt or ""] * number,
            [job.settings.task] * number,
        )
        wanted = (model.config.task_criteria or {}).get(job.settings.task, model.config.criteria)
        return [{name: float(scores[name][index]) for name in wanted} for index in range(number)]

    def where(self, adapter: str | None) -> tuple[str | None, str | None]:
        """Folder or Hub id, and revision, of an adapter by its name in the list; twice `None` for the base."""
        if adapter in (None, "", BASE):
            return None, None
        if isinstance(adapter, str) and adapter in self.adapters:
            return str(self.adapters[adapter]), None
        if isinstance(adapter, str) and HUB_ID.fullmatch(adapter) and ".." not in adapter:
            repo_id, _, revision = adapter.partition("@")
            return repo_id, revision or None
        raise ValueError(
            f"The adapter {str(adapter)[:100]!r} is neither {BASE!r}, one of {sorted(self.adapters)}, nor a Hub id "
            "such as org/name or org/name@revision."
        )

    def _put_on(self, settings: GenerateSettings) -> None:
        if settings.adapter is None:
            if self.loaded:
                self.pipeline.disable_lora()
            return
        # PEFT makes the name part of a module's
        name = re.sub(r"\W", "_", f"{Path(settings.adapter).name}_{settings.adapter}_{settings.adapter_revision}")
        if name not in self.loaded:
            if len(self.loaded) == MAX_ADAPTERS:
                self.pipeline.delete_adapters(self.loaded.pop(0))
            if not Path(settings.adapter).is_dir():
                check_public(settings.adapter, settings.adapter_revision)
            load_adapter(self.pipeline, settings.adapter, name, revision=settings.adapter_revision)
            self.loaded.append(name)
        self.pipeline.enable_lora()
        self.pipeline.set_adapters([name], [float(settings.adapter_strength)])


def check_public(repo_id: str, revision: str | None) -> None:
    """
    Whether anybody may have this adapter, and it is no larger than one is: the token of the Space must not open its
    owner's private adapters to whoever asks. What else can be wrong, `load_adapter` says.
    """
    try:
        found = get_hf_file_metadata(hf_hub_url(repo_id, DIFFUSERS_WEIGHTS, revision=revision), token=False)
    except RepositoryNotFoundError:  # gated ones too
        raise ValueError(f"The Hub shows no {repo_id!r} to everybody. Correct the name, or publish it.") from None
    except (EntryNotFoundError, RevisionNotFoundError):
        return
    if found.size is None or found.size > MAX_ADAPTER_BYTES:
        raise ValueError(f"The adapter {repo_id!r} has more than {MAX_ADAPTER_BYTES:,} bytes, the most that are read.")


@spaces.GPU
def paint_images(pipeline, job: Job, on_step) -> list[np.ndarray]:
    """The part that wants a GPU, which a Space may lend for the time of the call."""
    images, steps = [], job.settings.num_inference_steps
    stopped = False
    for number in range(job.num_images):

        def after_step(pipe, step, timestep, tensors, done=number * steps):
            nonlocal stopped
            if on_step(done + step + 1, job.num_images * steps):
                stopped = pipe._interrupt = True
            return tensors

        settings = replace(job.settings, seed=job.settings.seed + number)
        painted = paint_picture(
            pipeline, job.picture, job.mask, job.label_map, job.window, job.spacing, settings, after_step
        )
        if stopped:
            break
        image = job.picture.copy()
        image[job.mask] = job.scan.storable(painted[job.mask])
        images.append(image)
    return images
