"""Pictures that are open on the page: read from uploads within limits, and shown slice by slice."""

import shutil
import threading
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gradio.utils import get_upload_folder
from guard import MAX_UPLOAD

from onereward.data.scans import (
    AXES,
    BadScan,
    Scan,
    default_window,
    plane_affine,
    read_labels,
    read_scan,
    reorient,
    window,
)
from onereward.data.synthetic import is_synthetic


PAINT_SIZE = 512  # a small picture is enlarged to about this, to be painted on
MAX_PIXELS, MAX_VOXELS = 2048**2, 2**25
MAX_OPEN = 512 * 2**20  # bytes of all pictures that are open at once, of whomever


@dataclass
class Opened:
    """A picture that is open: the scan, which slice of it is shown, and how."""

    held: Scan | None
    axis: str = "axial"
    index: int = 0
    window: tuple[float, float] = (127.5, 255.0)
    warnings: list[str] = field(default_factory=list)

    @property
    def scan(self) -> Scan:
        if self.held is None:
            raise ValueError("Your picture was put away, as others needed the room. Please open it again.")
        return self.held

    @property
    def picture(self) -> np.ndarray:
        """The slice in its own numbers."""
        return self.scan.slice(self.index, self.axis) if self.scan.is_volume else self.scan.pixels

    @property
    def shown(self) -> np.ndarray:
        """The slice as it is seen, 8 bits."""
        return self.picture if self.picture.ndim == 3 else window(self.picture, *self.window)

    @property
    def file_window(self) -> tuple[float, float]:
        """Centre and width of the window in the numbers of the file, which those of `picture` may be turned from."""
        return self.scan.turn(self.window[0]), self.window[1]

    def set_window(self, center: float, width: float) -> None:
        """Look through another window, given in the numbers of the file."""
        self.window = self.scan.turn(center), width

    @property
    def spacing(self) -> tuple[float, float]:
        if not self.scan.is_volume:
            return self.scan.spacing or (1.0, 1.0)
        place = plane_affine(self.scan.pixels.shape, self.scan.affine, self.axis, self.index)
        return tuple(np.linalg.norm(place[:3, [1, 0]], axis=0))

    @property
    def num_slices(self) -> int:
        if not self.scan.is_volume:
            return 1
        return reorient(self.scan.pixels, self.scan.affine)[0].shape[AXES.index(self.axis)]


def open_picture(path: str) -> Opened:
    """An upload, or a `ValueError` that says what is wrong with it."""
    scan = read(read_scan, path)
    opened = Opened(scan, window=default_window(scan), warnings=list(scan.warnings))
    make_room(opened)
    opened.index = opened.num_slices // 2
    if opened.picture.shape[0] * opened.picture.shape[1] > MAX_PIXELS:
        raise ValueError(f"The picture has {opened.picture.shape} pixels; at most {MAX_PIXELS} can be shown. Crop it.")
    if is_synthetic(path):
        opened.warnings.append("this file says that it is synthetic")
    return opened


READING, OPEN = threading.Lock(), []  # one file is read at a time, as each may take much memory


def read(reader, path: str | Path) -> Scan:
    """What [`read_scan`] or [`read_labels`] makes of a file, within the limits."""
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        raise ValueError("The upload is gone: DICOM files are read once. Please send it again.")
    largest = MAX_VOXELS if str(path).endswith((".nii", ".gz")) else MAX_PIXELS
    with READING:
        return reader(path, max_bytes=MAX_UPLOAD, max_pixels=largest)


def make_room(opened: Opened) -> None:
    """Put the pictures away that were opened first, where all that are open take too much memory."""
    with READING:
        OPEN[:] = [one for one in OPEN if one() is not None] + [weakref.ref(opened)]
        kept = [one for one in (reference() for reference in OPEN) if one is not None and one.held is not None]
        size = sum(one.held.pixels.nbytes for one in kept)
        for oldest in kept[:-1]:
            if size > MAX_OPEN:
                size -= oldest.held.pixels.nbytes
                oldest.held = None


@contextmanager
def read_once(*paths: str | None):
    """
    For uploads that are read within: DICOM files, which name patients in their headers, do not stay, nor do files that
    cannot be read, which may be anything.
    """
    refused = False
    try:
        yield
    except BadScan:
        refused = True
        raise
    finally:
        for path in (Path(path) for path in paths if isinstance(path, str)):
            if path.is_file() and path.is_relative_to(get_upload_folder()):
                with open(path, "rb") as file:
                    named = file.read(132)[128:] == b"DICM"
                if named or refused:
                    shutil.rmtree(path.parent) if path.parent != Path(get_upload_folder()) else path.unlink()


def enlarged(picture: np.ndarray) -> np.ndarray:
    """A small picture with each pixel repeated, so that there is room to paint."""
    factor = max(1, PAINT_SIZE // max(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def painted(layer: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
    """A layer of the editor as a mask of the source's own pixels: those that are painted on by half or more."""
    if layer is None:
        return np.zeros(shape, bool)
    alpha = (layer[..., -1] if layer.ndim == 3 else layer) > 0
    factor = max(1, PAINT_SIZE // max(shape))
    if alpha.shape != (shape[0] * factor, shape[1] * factor):
        raise ValueError(
            f"The mask is {alpha.shape[1]}x{alpha.shape[0]} but the picture {shape[1]}x{shape[0]} pixels. Open the "
            "picture again."
        )
    cells = alpha.reshape(shape[0], factor, shape[1], factor).mean(axis=(1, 3))
    return cells >= 0.5 if (cells >= 0.5).any() else cells > 0


def read_values(path: str | Path, opened: Opened) -> np.ndarray:
    """An upload of a mask or label map as its numbers, on the pixels that are shown."""
    found = read(read_labels, path)
    if found.is_volume != opened.scan.is_volume and found.is_volume:
        raise ValueError("The mask is a volume, but the picture is not.")
    values = found.slice(opened.index, opened.axis) if found.is_volume else found.pixels
    values = values if values.ndim == 2 else values.max(axis=2)
    if values.shape != opened.picture.shape[:2]:
        raise ValueError(
            f"The mask is {values.shape[1]}x{values.shape[0]} but the picture {opened.picture.shape[1]}x"
            f"{opened.picture.shape[0]} pixels; both must have one size."
        )
    if not values.any():
        raise ValueError("The mask is empty here; white, or any label above 0, marks what is repainted.")
    return values


def read_mask(path: str | Path, opened: Opened, labels: dict[str, int]) -> tuple[np.ndarray, np.ndarray | None]:
    """An upload as a mask and, where it holds nothing but labels, a label map. Of 0 and 1 it is a mask alone."""
    values = read_values(path, opened)
    there = set(np.unique(values).tolist()) - {0}
    is_label_map = there <= set(labels.values()) and there != {1}
    return values > 0, values.astype(np.uint8) if is_label_map else None


def read_label_map(path: str | Path, opened: Opened, labels: dict[str, int]) -> np.ndarray:
    """An upload that says what to paint, whatever labels it holds."""
    values = read_values(path, opened)
    if not set(np.unique(values).tolist()) <= {0, *labels.values()}:
        raise ValueError(f"The label map holds other values than {labels}.")
    return values.astype(np.uint8)
