"""
The built-in phantom: brain slices with tumours and their exact healthy twins, made without a download.

The anatomy is real, the MNI152 template and tissue maps that the nilearn wheel ships, cut along a randomly warped and
tilted surface, given the contrast of four MR sequences, and grown a tumour with the regions of BraTS 2023. Because
the tumour is painted, the same slice without it is known to the last bit: the ground truth that real data never has.

Pictures are axial and shown in the radiological convention: anterior up, the patient's left on the right of the
picture. They stand for research use only, not for clinical use.
"""

import io
from functools import lru_cache

import datasets
import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.spatial.distance import pdist

from onereward.data.masks import dilate
from onereward.data.schema import FEATURES, LABELS, TASKS


CONTRASTS = ("t1n", "t1c", "t2w", "t2f")
SPLITS = ("train", "validation", "test")
FIELD_OF_VIEW = 192.0  # mm, side of the square field: 3 mm a pixel at 64 pixels
NCR, ED, ET = LABELS["NCR"], LABELS["ED"], LABELS["ET"]

# Signal of each tissue relative to the others within a sequence.
SIGNAL = {
    "t1n": {"csf": 0.14, "gm": 0.52, "wm": 0.80, NCR: 0.24, ED: 0.45, ET: 0.50},
    "t1c": {"csf": 0.15, "gm": 0.53, "wm": 0.80, NCR: 0.22, ED: 0.45, ET: 1.18},
    "t2w": {"csf": 1.00, "gm": 0.56, "wm": 0.36, NCR: 0.90, ED: 0.80, ET: 0.64},
    "t2f": {"csf": 0.12, "gm": 0.62, "wm": 0.43, NCR: 0.40, ED: 0.96, ET: 0.76},
}
# How much of the template's own fine detail shows in a sequence, and with which sign.
DETAIL = {"t1n": 0.8, "t1c": 0.8, "t2w": -0.6, "t2f": -0.3}


@lru_cache(maxsize=1)
def load_template() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """
    Tissue maps of the MNI152 template from the files inside the nilearn wheel; nothing is downloaded.

    Returns:
        `tuple`: `maps`, float32 volumes of shape `(197, 233, 189)` at 1 mm named `brain`, `gm`, `wm` (fractions in
        [0, 1]) and `detail` (what of the T1 template the tissue fractions do not explain); and the heights `z` of
        the slices that make good pictures.
    """
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

    t1, gm, wm = (
        load(resolution=1).get_fdata(dtype=np.float32)
        for load in (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)
    )
    brain = ndimage.binary_opening(ndimage.binary_fill_holes(t1 > 0.05), iterations=2).astype(np.float32)
    fractions = np.stack([np.clip(1 - gm - wm, 0, 1), gm, wm]) * brain
    model = np.tensordot([SIGNAL["t1n"][tissue] for tissue in ("csf", "gm", "wm")], fractions, 1).astype(np.float32)
    residual = t1 - model
    detail = residual - ndimage.gaussian_filter(residual, 6)
    # An average of many heads has soft borders between tissues; a power makes them as crisp as in one head.
    fractions **= 1.6
    fractions *= brain / np.maximum(fractions.sum(0), 1e-6)
    area = brain.sum((0, 1))
    # Below the midbrain a slice shows little but the frontal floor, the temporal poles and the cerebellum.
    heights = np.flatnonzero((area > 0.68 * area.max()) & (np.arange(len(area)) >= 54))
    return {"brain": brain, "gm": fractions[1], "wm": fractions[2], "detail": detail}, heights


@lru_cache(maxsize=32)
def spline_basis(n: int, spacing: float) -> np.ndarray:
    """
    Cubic B-spline basis over the field: `(n, m)` weights of m control points `spacing` mm apart at n pixel centres.
    """
    position = (np.arange(n) + 0.5) / n * FIELD_OF_VIEW / spacing
    control = np.arange(int(np.ceil(FIELD_OF_VIEW / spacing)) + 3) - 1
    t = np.abs(position[:, None] - control)
    basis = np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.clip(2 - t, 0, None) ** 3 / 6)
    return basis.astype(np.float32)


def smooth_noise(rng: np.random.Generator, n: int, spacing: float, std: float) -> np.ndarray:
    """
    Smooth Gaussian field of shape `(n, n)`: cubic B-spline through normal control points `spacing` mm apart.

    The mean of the squared cubic B-spline is 151/315 in one dimension, which gives the factor for `std` in two.
    The number of draws does not depend on `n`, so the same stream gives the same field at every resolution.
    """
    basis = spline_basis(n, spacing)
    control = rng.standard_normal((basis.shape[1], basis.shape[1]), dtype=np.float32)
    return basis @ control @ basis.T * np.float32(std * 315 / 151)


def area_average(array: np.ndarray) -> np.ndarray:
    """Halve the last two axes by averaging 2 x 2 blocks."""
    *lead, n, m = array.shape
    return array.reshape(*lead, n // 2, 2, m // 2, 2).mean((-3, -1))


def sample_anatomy(coordinates: np.ndarray) -> dict[str, np.ndarray]:
    """Tissue fractions and detail, each `(n, n)`, at template voxel coordinates of shape `(3, n, n)`."""
    maps, _ = load_template()
    tissue = {name: ndimage.map_coordinates(volume, coordinates, order=1) for name, volume in maps.items()}
    tissue["csf"] = np.clip(tissue["brain"] - tissue["gm"] - tissue["wm"], 0, None)
    return tissue


def draw_surface(rng: np.random.Generator, n: int) -> np.ndarray:
    """
    Draw where in the template a slice is cut: a tilted, gently waving surface with affine and elastic deformation.

    Returns:
        `np.ndarray`: template voxel coordinates of shape `(3, n, n)`; rows run from anterior to posterior, columns
        from the patient's right to left (the template's x grows towards the right).
    """
    maps, heights = load_template()
    centre_x, centre_y, _ = (np.array(maps["brain"].shape) - 1) / 2
    axis = ((np.arange(n) + 0.5) / n - 0.5).astype(np.float32) * -FIELD_OF_VIEW
    y, x = np.meshgrid(axis, axis, indexing="ij")
    height = rng.choice(heights)
    angle = np.deg2rad(rng.normal(0, 4))
    scale_x, scale_y = rng.normal(0.96, 0.04, 2)  # the template is larger than the average head
    wave = rng.uniform(1.5, 4.0)
    u = (np.cos(angle) * x - np.sin(angle) * y) / scale_x
    v = (np.sin(angle) * x + np.cos(angle) * y) / scale_y
    u += smooth_noise(rng, n, 46, wave) + smooth_noise(rng, n, 17, 0.9)
    v += smooth_noise(rng, n, 46, wave) + smooth_noise(rng, n, 17, 0.9)
    z = height + smooth_noise(rng, n, 58, 1.6)
    z += np.tan(rng.normal(0, 0.025)) * x + np.tan(rng.normal(0, 0.03)) * y
    # Ventricles differ more between people than the rest: zoom around them. The template is mirror-symmetric, so a
    # left-right flip would add nothing; the deformation above is what makes a slice asymmetric.
    zoom = 1 - rng.normal(0, 0.16) * np.exp(-((u / 28) ** 2) - ((v + 8) / 38) ** 2)
    return np.stack([u * zoom + centre_x, (v + 8) * zoom - 8 + centre_y, z]).astype(np.float32)


def remove_specks(labels: np.ndarray, pixels: int) -> np.ndarray:
    """
    Keep the largest connected piece of a label map, and give specks of one label inside it to their neighbours.

    Args:
        labels (`np.ndarray`):
            Label map of shape `(H, W)`.
        pixels (`int`):
            Regions smaller than this are specks.

    Returns:
        `np.ndarray`: label map of shape `(H, W)`.
    """
    connectivity = np.ones((3, 3))
    pieces, count = ndimage.label(labels > 0, connectivity)
    if count == 0:
        return labels
    inside = pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    labels = np.where(inside, labels, 0)
    # Giving a speck away can only enlarge its neighbours, so one pass over the labels from the rarest on is enough.
    for value in sorted(np.unique(labels[inside]), key=lambda v: (labels == v).sum()):
        regions, _ = ndimage.label(labels == value, connectivity)
        small = (np.bincount(regions.ravel()) < pixels)[regions] & (regions > 0)
        if small.any() and (inside & ~small).any():
            nearest = ndimage.distance_transform_edt(~inside | small, return_distances=False, return_indices=True)
            labels = np.where(small, labels[tuple(nearest)], labels)
    return labels


def grow_tumour(rng: np.random.Generator, coordinates: np.ndarray, healthy: dict, mass_effect: bool):
    """
    Grow one tumour into a healthy slice.

    A lobulated core sits in or near white matter at least 12 mm inside the brain; oedema spreads from it along white
    matter and spares fluid; the core is a ring around necrosis, solid, or hardly enhancing.

    Returns:
        `tuple`: the tissue around the tumour (the `healthy` one itself unless `mass_effect`), and the label map of
        shape `(n, n)`.
    """
    n = len(healthy["brain"])
    mm = FIELD_OF_VIEW / n
    y, x = np.meshgrid(np.arange(n, dtype=np.float32) * mm, np.arange(n, dtype=np.float32) * mm, indexing="ij")
    depth = ndimage.distance_transform_edt(healthy["brain"] > 0.5) * mm
    centre_x = (load_template()[0]["brain"].shape[0] - 1) / 2
    place = np.cumsum((depth > 12) * (0.15 + healthy["wm"]))
    while True:
        row, column = divmod(int(np.searchsorted(place, rng.random() * place[-1])), n)
        radius = rng.uniform(9, 25)  # of the whole tumour, mm
        core_radius = radius * rng.uniform(0.48, 0.74)
        kind = rng.choice(["ring", "solid", "non-enhancing"], p=[0.7, 0.17, 0.13])
        dy, dx = y - row * mm, (x - column * mm) * rng.uniform(0.75, 1.3)
        distance, angle = np.hypot(dy, dx), np.arctan2(dx, dy)
        lobes = sum(rng.normal(0, 0.16 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4, 5, 7))
        rough = smooth_noise(rng, n, 8.5, 0.1)
        push = rng.uniform(0.2, 0.5) * core_radius
        tissue, displaced = healthy, coordinates
        if mass_effect:
            # Anatomy moves outwards from the core; the displacement ends exactly at 2.2 radii.
            push = push * np.clip(1 - (distance / (2.2 * radius)) ** 2, 0, None) ** 2 / np.maximum(distance, 1e-3)
            # Template x and y grow to the patient's left-to-right and posterior-to-anterior: against both axes.
            displaced = coordinates + np.stack([push * dx, push * dy, np.zeros_like(push)])
            tissue = sample_anatomy(displaced)
        brain = tissue["brain"] > 0.5
        # The falx between the hemispheres stops a tumour; only through the corpus callosum can it cross.
        midline = np.abs(displaced[0] - centre_x) < 2
        brain &= ~(midline & (ndimage.gaussian_filter(tissue["wm"], 1 / mm) < 0.6))
        core = (distance < core_radius * (1 + lobes + rough)) & brain
        spread = 0.75 + 0.85 * ndimage.gaussian_filter(tissue["wm"], 2 / mm)
        oedema = (distance < radius * (1 + 1.2 * lobes + 1.5 * rough) * spread) & brain
        oedema &= ndimage.gaussian_filter(tissue["csf"], 1 / mm) < 0.5
        rim = rng.uniform(3.6, 6.0) * np.clip(1 + smooth_noise(rng, n, 12, 0.35), 0.75, 1.8)
        gap = smooth_noise(rng, n, 14, 1.0) > 1.6
        patches = smooth_noise(rng, n, 9, 1.0) > 1.2
        inside = ndimage.distance_transform_edt(core) * mm
        if kind == "ring":
            enhancing = (inside <= rim) & ~gap
        elif kind == "solid":
            enhancing = inside <= 2.4 * rim
        else:
            enhancing = patches
        labels = np.where(core, np.where(enhancing, ET, NCR), np.where(oedema, ED, 0))
        labels = remove_specks(labels, round(4 * (FIELD_OF_VIEW / 64 / mm) ** 2))
        if 300 <= (labels > 0).sum() * mm**2 <= 0.3 * brain.sum() * mm**2:
            return tissue, labels.astype(np.uint8)


def acquire(rng: np.random.Generator, contrast: str, healthy: dict, tissue: dict, lesion: dict):
    """
    Take the same slice twice in one sequence, without and with the tumour, with one bias field and one noise.

    Args:
        rng (`np.random.Generator`):
            The acquisition's own stream.
        contrast (`str`):
            One of `CONTRASTS`.
        healthy, tissue (`dict[str, np.ndarray]`):
            Tissue of the twin and around the tumour, maps of shape `(n, n)`.
        lesion (`dict[int, np.ndarray]`):
            Weight of each tumour region in [0, 1], maps of shape `(n, n)`.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: twin and tumour image of shape `(n / 2, n / 2)`, `uint8`.
    """
    n = len(healthy["brain"])
    signal = {name: value * rng.normal(1, 0.04) for name, value in SIGNAL[contrast].items()}
    texture = 1 + smooth_noise(rng, n, 7, 0.08) + smooth_noise(rng, n, 3.5, 0.05)
    bias = np.exp(smooth_noise(rng, n, 87, 0.06))
    vessels = smooth_noise(rng, n, 4.5, 1.0) > 2.0
    sigma = rng.uniform(0.005, 0.014)
    noise = sigma * rng.standard_normal((2, n, n), dtype=np.float32)

    def plain(maps):
        image = sum(np.float32(signal[name]) * maps[name] for name in ("csf", "gm", "wm"))
        image = image + np.float32(DETAIL[contrast]) * maps["detail"]
        if contrast == "t1c":  # contrast agent in the vessels of the sulci
            image += 0.4 * ndimage.gaussian_filter((vessels & (maps["csf"] > 0.3)).astype(np.float32), 0.4)
        return image

    twin = plain(healthy)
    # The scale comes from the healthy twin alone; were it the image's own, a bright tumour would darken the brain.
    table = SIGNAL[contrast]
    headroom = 1.1 * max(table.values()) / max(table[name] for name in ("csf", "gm", "wm"))
    white = np.percentile(twin[healthy["brain"] > 0.5], 99) * headroom
    with_tumour = plain(tissue) * np.clip(1 - sum(lesion.values()), 0, 1)
    with_tumour += sum(np.float32(signal[value]) * texture * weight for value, weight in lesion.items())

    pictures = []
    for image, maps in ((twin, healthy), (with_tumour, tissue)):
        image = np.clip(image, 0, None) * bias * maps["brain"]
        image = np.hypot(image + noise[0], noise[1]) * (maps["brain"] > 0.5)  # Rician, as in magnitude images
        image = area_average(image) * (area_average(maps["brain"]) > 0.5)
        pictures.append(np.round(np.clip(image / white, 0, 1) * 255).astype(np.uint8))
    return pictures


def render_case(seed: int, split: str, index: int, size: int, contrasts: tuple[str, ...], mass_effect: bool) -> dict:
    """
    Render one case: its healthy twin and its tumour image in every contrast, and the tumour's label map.

    Anatomy, tumour and every acquisition have random streams of their own, spawned from (seed, split, index): adding
    a contrast changes no other picture, and no case is ever drawn in two splits.

    Returns:
        `dict`: `twin` and `tumour`, contrast to `uint8` image of shape `(size, size)`; `label_map` and `brain`, of
        shape `(size, size)`; `streams`, the seed sequences left for masks and prompts.
    """
    root = np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index))
    anatomy, tumour, acquisition, *streams = root.spawn(5)
    n = 2 * size
    mm = FIELD_OF_VIEW / n
    coordinates = draw_surface(np.random.default_rng(anatomy), n)
    healthy = sample_anatomy(coordinates)
    rng = np.random.default_rng(tumour)
    tissue, labels = grow_tumour(rng, coordinates, healthy, mass_effect)

    occupancy = area_average(np.stack([labels == value for value in (0, NCR, ED, ET)]).astype(np.float32))
    brain = area_average(tissue["brain"]) > 0.5
    label_map = remove_specks((occupancy.argmax(0) * brain).astype(np.uint8), 4)
    # What is too thin to be labelled at the output size is not painted either.
    labels = labels * dilate(label_map > 0, 1).repeat(2, 0).repeat(2, 1)

    # Borders are soft over about a millimetre, and oedema lets some of the anatomy through.
    lesion = {v: ndimage.gaussian_filter((labels == v).astype(np.float32), 1.0 / mm) for v in (NCR, ED, ET)}
    lesion[ED] *= np.clip(rng.uniform(0.72, 0.92) + smooth_noise(rng, n, 13, 0.08), 0.5, 1)

    case = {"twin": {}, "tumour": {}, "label_map": label_map, "brain": brain, "streams": streams}
    for name, stream in zip(CONTRASTS, acquisition.spawn(len(CONTRASTS)), strict=True):
        if name in contrasts:
            rng = np.random.default_rng(stream)
            case["twin"][name], case["tumour"][name] = acquire(rng, name, healthy, tissue, lesion)
    return case


def draw_strip(rng: np.random.Generator, brain: np.ndarray) -> np.ndarray:
    """
    Draw the region beyond a field of view: strips from one, two or all sides of the picture into the brain.

    Args:
        rng (`np.random.Generator`):
            Source of randomness.
        brain (`np.ndarray`):
            Boolean brain mask of shape `(H, W)`; each strip ends 12 to 35 % into its extent.

    Returns:
        `np.ndarray`: boolean mask of shape `(H, W)`.
    """
    sides = rng.permutation(4)[: rng.choice([1, 2, 4], p=[0.6, 0.3, 0.1])]
    mask = np.zeros_like(brain)
    for side in sides:
        reach = rng.uniform(0.12, 0.35) * (0.5 if len(sides) == 4 else 1)
        # Turn the picture so that the side is on top; `mask` is turned as a view and so filled in place.
        filled = np.flatnonzero(np.rot90(brain, side).any(1))
        np.rot90(mask, side)[: filled[0] + max(1, round(reach * len(filled)))] = True
    return mask


def largest_diameter(region: np.ndarray) -> float:
    """Largest distance in pixels across a region of shape `(H, W)`, from outer edge to outer edge of its pixels."""
    rim = region & ~ndimage.binary_erosion(region)
    points = np.argwhere(rim)
    return (pdist(points).max() if len(points) > 1 else 0.0) + 1


SEQUENCE_NAMES = {
    "t1n": ("T1-weighted", "native T1", "non-contrast T1-weighted", "T1 pre-contrast"),
    "t1c": ("contrast-enhanced T1-weighted", "post-contrast T1", "T1 with gadolinium", "T1-weighted post-contrast"),
    "t2w": ("T2-weighted", "T2", "T2-weighted spin echo"),
    "t2f": ("T2-FLAIR", "FLAIR", "fluid-attenuated T2-weighted"),
}

PROMPTS = {
    "fill": (
        "Axial {sequence} brain MRI: {lesion}.",
        "{sequence} axial slice of the brain showing {lesion}.",
        "Insert into this axial {sequence} image {lesion}.",
        "Brain MRI, axial {sequence}. Findings: {lesion}.",
        "Paint {lesion} on the axial {sequence} slice.",
        "Axial {sequence} MRI of the head with {lesion}.",
        "Fill the marked region of this {sequence} brain slice with {lesion}.",
    ),
    "remove": (
        "Axial {sequence} brain MRI without tumour: {healthy}.",
        "Remove the lesion from this axial {sequence} slice and restore {healthy}.",
        "Pseudo-healthy axial {sequence} image of the brain, {healthy} in the marked region.",
        "Replace the marked region of this {sequence} brain slice by {healthy}.",
        "Brain MRI, axial {sequence}. Findings: {healthy}, no mass.",
        "Show this axial {sequence} slice as before the tumour: {healthy}.",
    ),
    "extend": (
        "Extend this axial {sequence} brain MRI beyond its field of view; the new region shows {content}.",
        "Complete the cropped axial {sequence} slice, {content} in the missing part.",
        "Outpaint the edge of this {sequence} brain slice with {content}.",
        "Brain MRI, axial {sequence}, field of view enlarged: {content}.",
        "Continue the axial {sequence} image past its border, showing {content}.",
        "Widen the field of this axial {sequence} image; at the edge {content}.",
    ),
}
HEALTHY = (
    "healthy brain tissue",
    "normal brain parenchyma",
    "unremarkable brain tissue",
    "normal-appearing cortex and white matter",
)


def describe(label_map: np.ndarray, modality: str, task: str, mm_per_px: float, rng: np.random.Generator) -> str:
    """
    Write a prompt in a radiologist's words that is true of a label map.

    Composition, side and size are computed from the label map (values of `LABELS`); the wording is drawn. The side
    follows the radiological convention: left of the patient is right in the picture; a lesion whose centre is within
    8 mm of the picture's centre line is in the midline. The size is the largest diameter of all labelled pixels
    together, in whole millimetres; under 25 mm is small, over 50 mm is large. A core without enhancement is called
    non-enhancing; a necrotic core is rimmed if at least 60 % of its surrounding pixels enhance.

    Args:
        label_map (`np.ndarray`):
            Label map of shape `(H, W)`; all zero means healthy.
        modality (`str`):
            `"t1n"`, `"t1c"`, `"t2w"`, `"t2f"`, or any other name, used as it is.
        task (`str`):
            `"fill"`, `"remove"` or `"extend"`.
        mm_per_px (`float`):
            Side of a pixel in millimetres.
        rng (`np.random.Generator`):
            Source of the wording.

    Returns:
        `str`: one or two sentences.

    Example:

    ```python
    >>> label_map = np.zeros((64, 64), np.uint8)
    >>> label_map[20:30, 40:50] = LABELS["ET"]
    >>> describe(label_map, "t1c", "fill", 3.0, np.random.default_rng(0))
    'Axial T1 with gadolinium brain MRI: a left medium-sized solid enhancing tumour without oedema, 41 mm.'
    ```
    """

    def say(*choices):
        return choices[rng.integers(len(choices))]

    sequence = say(*SEQUENCE_NAMES.get(modality, (modality,)))
    healthy = say(*HEALTHY)
    ncr, ed, et = (label_map == value for value in (NCR, ED, ET))
    region = ncr | ed | et
    if not region.any():
        content = healthy
    else:
        shell = dilate(ncr, 1) & ~ncr
        if et.any() and ncr.any() and et[shell].mean() >= 0.6:
            core = say(
                "ring-enhancing tumour with a necrotic core",
                "rim-enhancing mass around central necrosis",
                "necrotic tumour with an enhancing ring",
            )
        elif et.any() and ncr.any():
            core = say(
                "partly enhancing tumour with a non-enhancing core",
                "heterogeneously enhancing mass with a non-enhancing part",
            )
        elif et.any():
            core = say("solid enhancing tumour", "solid enhancing mass", "homogeneously enhancing tumour")
        elif ncr.any():
            core = say("non-enhancing tumour core", "non-enhancing mass", "tumour without enhancement")
        else:
            core = None
        halo = say("surrounding oedema", "peritumoral oedema", "vasogenic oedema around it")
        if core is None:
            noun = say("area of oedema", "zone of vasogenic oedema", "patch of oedema")
        elif ed.any():
            noun = f"{core} and {halo}" if " with " in core or " around " in core else f"{core} with {halo}"
        else:
            noun = f"{core}, {say('no oedema', 'without oedema')}"
        offset = (np.argwhere(region)[:, 1].mean() - (label_map.shape[1] - 1) / 2) * mm_per_px
        side = "midline" if abs(offset) <= 8 else "left" if offset > 0 else "right"
        diameter = round(largest_diameter(region) * mm_per_px)
        word = "small" if diameter < 25 else "large" if diameter > 50 else say("medium-sized", "mid-sized")
        place = {
            "left": ("left-sided", "left hemispheric"),
            "right": ("right-sided", "right hemispheric"),
            "midline": ("midline", "near-midline"),
        }[side]
        measure = say(f"{diameter} mm", f"about {diameter} mm across", f"largest diameter {diameter} mm")
        content = f"a {word} {say(*place)} {noun}, {measure}"
    return say(*PROMPTS[task]).format(sequence=sequence, lesion=content, healthy=healthy, content=content)


def to_png(array: np.ndarray) -> dict:
    """An 8-bit picture as the encoded value of a `datasets.Image` column."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def case_rows(
    seed: int, split: str, index: int, size: int, contrasts: tuple[str, ...], tasks: tuple[str, ...], mass_effect: bool
) -> list[dict]:
    """The encoded rows of one case: contrast by contrast, and task by task within."""
    case = render_case(seed, split, index, size, contrasts, mass_effect)
    masks_stream, prompts_stream = case["streams"]
    mask_rngs = dict(zip(TASKS, map(np.random.default_rng, masks_stream.spawn(len(TASKS))), strict=True))
    prompt_rngs = map(np.random.default_rng, prompts_stream.spawn(len(CONTRASTS) * len(TASKS)))
    prompt_rngs = dict(zip([(name, task) for name in CONTRASTS for task in TASKS], prompt_rngs, strict=True))

    lesion = case["label_map"] > 0
    margins = {task: mask_rngs[task].uniform(1, 4) * size / 64 for task in ("fill", "remove")}
    strip = draw_strip(mask_rngs["extend"], case["brain"])
    nothing = np.zeros_like(case["label_map"])
    rows = []
    for name in contrasts:
        twin, tumour = case["twin"][name], case["tumour"][name]
        around = {task: dilate(lesion, margin) | (twin != tumour) for task, margin in margins.items()}
        pictures = {
            "fill": (twin, around["fill"], case["label_map"], tumour),
            "remove": (tumour, around["remove"], nothing, twin),
            "extend": (tumour, strip, case["label_map"] * strip, tumour),
        }
        for task in tasks:
            image, mask, label_map, target = pictures[task]
            rows.append(
                {
                    "image": to_png(image),
                    "mask": to_png(np.where(mask, 255, 0).astype(np.uint8)),
                    "label_map": to_png(label_map),
                    "target": to_png(target),
                    "prompt": describe(label_map, name, task, FIELD_OF_VIEW / size, prompt_rngs[name, task]),
                    "task": task,
                    "modality": name,
                    "case_id": f"phantom-{split}-{index:06d}",
                    "source": "phantom",
                }
            )
    return rows


def load_phantom(
    num_cases: int,
    *,
    size: int = 64,
    contrasts: tuple[str, ...] = CONTRASTS,
    tasks: tuple[str, ...] = TASKS,
    seed: int = 0,
    split: str = "train",
    mass_effect: bool = False,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """
    Make phantom cases: one row for each case, contrast and task, in this order.

    A row depends on (`seed`, `split`, its case's index, `size`, `mass_effect`, contrast, task) and on nothing else: a
    longer data set starts with the rows of a shorter one, and the number of processes changes nothing.

    - `fill`: `image` is the healthy twin, `target` the tumour image, `label_map` says what is where.
    - `remove`: `image` is the tumour image, `target` the healthy twin, `label_map` is zero.
    - `extend`: `image` and `target` are the tumour image, `mask` covers strips at the field's edge.

    `image` and `target` are equal bit for bit outside `mask`; without mass effect, twin and tumour image also agree
    everywhere more than 6 pixels (at 64) away from the tumour.

    Args:
        num_cases (`int`):
            Number of cases.
        size (`int`, *optional*, defaults to 64):
            Height and width in pixels, 64 to 128 and a multiple of 8. The field of view is 192 mm at every size.
        contrasts (`tuple[str, ...]`, *optional*, defaults to `("t1n", "t1c", "t2w", "t2f")`):
            MR sequences: T1, T1 with contrast agent, T2, FLAIR.
        tasks (`tuple[str, ...]`, *optional*, defaults to `("fill", "remove", "extend")`):
            Tasks.
        seed (`int`, *optional*, defaults to 0):
            Seed of the whole data set, at least 0.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"`, `"validation"` or `"test"`. No case of one is in another.
        mass_effect (`bool`, *optional*, defaults to `False`):
            Whether the tumour pushes the brain around it away. Masks then cover all that moved.
        num_proc (`int`, *optional*):
            Number of processes.

    Returns:
        `datasets.Dataset`: rows of `onereward.data.schema.FEATURES`.

    Raises:
        `ValueError`: when an argument is out of its range.

    Example:

    ```python
    >>> from onereward.data.phantom import load_phantom

    >>> dataset = load_phantom(10, contrasts=("t1c",), tasks=("fill",), split="test")
    >>> dataset[0]["prompt"]
    ```
    """
    if num_cases < 1:
        raise ValueError(f"`num_cases` is {num_cases}; expected at least 1.")
    if not 64 <= size <= 128 or size % 8:
        raise ValueError(f"`size` is {size}; expected a multiple of 8 from 64 to 128.")
    if seed < 0:
        raise ValueError(f"`seed` is {seed}; expected 0 or more.")
    if split not in SPLITS:
        raise ValueError(f"`split` is {split!r}; expected one of {SPLITS}.")
    for argument, chosen, known in (("contrasts", contrasts, CONTRASTS), ("tasks", tasks, TASKS)):
        if isinstance(chosen, str) or not chosen or not set(chosen) <= set(known):
            raise ValueError(f"`{argument}` is {chosen!r}; expected one or more of {known}, as a tuple.")

    load_template()  # before any worker is forked, so that all share it

    def render(indices):
        rows = [
            row
            for index in indices
            for row in case_rows(seed, split, index, size, tuple(contrasts), tuple(tasks), mass_effect)
        ]
        return {column: [row[column] for row in rows] for column in FEATURES}

    return datasets.Dataset.from_dict({"index": range(num_cases)}).map(
        render,
        input_columns="index",
        batched=True,
        batch_size=8,
        num_proc=num_proc,
        remove_columns="index",
        features=FEATURES,
        desc=f"Rendering the phantom ({split})",
    )
