"""The Generate tab: open a picture, say what to repaint, look closely, take it home."""

import copy
import json
import math
import threading
import time
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from html import escape
from pathlib import Path

import gradio as gr
import numpy as np
from access import RateLimit, caller
from guard import fresh_folder, one_line
from opened import PAINT_SIZE, Opened, enlarged, open_picture, painted, read_label_map, read_mask, read_once
from painting import BASE, LIMITS, Job, Painter
from PIL import Image
from views import difference, figure, outline, reward_bars, side_by_side, slider

from onereward.data.scans import AXES, plane, window
from onereward.generate import GenerateSettings, write_painted


COLORS = ["#ffb03b", "#e4572e", "#3fa7d6", "#59cd90", "#b084cc", "#f6f740"]
EXAMPLES = Path(__file__).parent / "examples"


def to_number(name: str, value, whole: bool = False) -> float:
    """An argument that must be a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a number.")
    if whole and value != int(value):
        raise ValueError(f"`{name}` is {value}; it must be a whole number.")
    return int(value) if whole else float(value)


class GenerateTab:
    """
    The tab and the functions behind it.

    Args:
        painter ([`~painting.Painter`]):
            What paints.
        text (`dict`):
            The words, `texts.json`.
    """

    def __init__(self, painter: Painter, text: dict):
        self.painter, self.text = painter, text
        self.cancelled: dict[str, threading.Event] = {}
        self.limit = RateLimit(per_minute=20)
        self.examples = json.loads((EXAMPLES / "examples.json").read_text(encoding="utf-8"))

    # ------------------------------------------------------------------------------------------------- painting

    def run(self, opened: Opened, mask: np.ndarray, label_map: np.ndarray | None, choices: dict, on_step):
        """Paint, and ask the reward model."""
        adapter, adapter_revision = self.painter.where(choices["adapter"])
        settings = GenerateSettings(
            self.painter.source,
            adapter=adapter,
            adapter_revision=adapter_revision,
            adapter_strength=choices["adapter_strength"],
            task=choices["task"],
            prompt=choices["prompt"] or None,
            slice=opened.index if opened.scan.is_volume else None,
            axis=opened.axis,
            window=opened.file_window if opened.picture.ndim == 2 else None,
            num_inference_steps=choices["num_inference_steps"],
            guidance_scale=choices["guidance_scale"],
            seed=choices["seed"],
        )
        number = choices["num_images"]
        picture = opened.picture.copy()  # a view would keep all of a volume in memory
        seen = opened.window if picture.ndim == 2 else None
        job = Job(opened.scan, picture, mask, label_map, seen, opened.spacing, number, settings)
        images = self.painter.paint(job, on_step)
        shown = [image if image.ndim == 3 else window(image, *opened.window) for image in images]
        rewards = self.painter.rewards(job, shown, opened.shown)
        return job, images, shown, rewards

    def write(self, opened: Opened, job: Job, images: list[np.ndarray]) -> tuple[list[str], str]:
        """The images as files that say what they are, `(PNG files, ZIP of all files)`."""
        folder = fresh_folder()
        scan, pictures = opened.scan, []
        for number, image in enumerate(images):
            settings = replace(job.settings, seed=job.settings.seed + number)
            result, inside = image, job.mask
            if scan.is_volume:
                result, inside = scan.pixels.copy(), np.zeros(scan.pixels.shape, bool)
                plane(result, scan.affine, opened.axis, opened.index)[...] = image
                plane(inside, scan.affine, opened.axis, opened.index)[...] = job.mask
            name = f"synthetic-{settings.task}-seed{settings.seed}"
            endings = {"nifti": [".png", ".nii.gz"], "picture": [".png"]}.get(scan.kind, [".png", ".dcm"])
            for ending in endings:
                output = folder / f"{name}{ending}"
                write_painted(result, scan, output, inside, [opened.index], job.window, settings)
            pictures.append(str(folder / f"{name}.png"))
        archive = folder / f"synthetic-{job.settings.task}.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for path in sorted(folder.iterdir()):
                if path != archive:
                    file.write(path, path.name)
        return pictures, str(archive)

    def details(self, job: Job, source: np.ndarray, shown, rewards, number: int) -> str:
        """The chosen image beside its source, as both are seen, with what the reward model thinks."""
        text, view = self.text["generate"], self.text["view"]
        edge = ("outline", outline(job.mask))
        figures = [
            figure(text["source"], [("image", source), edge], "source"),
            figure(
                text["result"].format(number=number + 1),
                [("image", source), ("over", shown[number]), edge],
                "result",
            ),
            figure(text["difference"], [("image", difference(shown[number], source))], "difference"),
        ]
        tools = [slider(view["blend"], "--blend"), slider(view["outline"], "--outline", 60)]
        height, width = job.mask.shape
        bars = reward_bars(
            rewards[number], {name: words["name"] for name, words in self.text["vote"]["criteria"].items()}, view
        )
        return side_by_side(figures, tools, view, width / height) + bars

    # ----------------------------------------------------------------------------------------- what the API offers

    def generate(
        self,
        image: str,
        mask: str,
        task: str,
        prompt: str,
        num_inference_steps: float,
        guidance_scale: float,
        seed: float,
        num_images: float,
        adapter: str,
        adapter_strength: float,
        slice: float | None = None,
        axis: str = "axial",
        window_center: float | None = None,
        window_width: float | None = None,
        label_map: str | None = None,
        request: gr.Request = None,
    ) -> tuple[list[str], str, list]:
        """
        Repaint the masked part of a picture, NIfTI volume or DICOM file. `mask` is white, or 1, where to repaint, or
        a label map; `label_map` says what to paint where the mask is larger than that. Gives PNG files, a ZIP of all
        files with where they come from, and rewards.
        """
        with plain_errors(), read_once(image, mask, label_map):
            self.limit.check(caller(request))
            if image is None or mask is None:
                raise ValueError(self.text["generate"]["no_picture"])
            if axis not in (None, "", *AXES):
                raise ValueError(f"`axis` is {str(axis)[:40]!r}; it must be one of {', '.join(AXES)}.")
            choices = {
                **{"task": task, "prompt": prompt, "adapter": adapter, "adapter_strength": adapter_strength},
                "num_inference_steps": to_number("num_inference_steps", num_inference_steps, whole=True),
                "guidance_scale": guidance_scale,
                "seed": to_number("seed", seed, whole=True),
                "num_images": to_number("num_images", num_images, whole=True),
            }
            self.painter.where(adapter)  # says what is wrong with a name before a large file is read
            opened = open_picture(image)
            opened.axis = axis or opened.axis
            opened.index = opened.num_slices // 2 if slice is None else to_number("slice", slice, whole=True)
            if window_center is not None and window_width is not None:
                opened.set_window(to_number("window_center", window_center), to_number("window_width", window_width))
            inside, labels = read_mask(mask, opened, self.painter.labels)
            if task == "remove":
                labels = None  # a lesion of any label
            if label_map is not None:
                labels = read_label_map(label_map, opened, self.painter.labels)
                inside = inside | (labels > 0)
            job, images, shown, rewards = self.run(opened, inside, labels, choices, lambda *_: False)
            pictures, archive = self.write(opened, job, images)
            return pictures, archive, rewards

    # --------------------------------------------------------------------------------------------------- the page

    def build(self) -> None:
        """Draws the tab; to be called inside `gr.Blocks`."""
        text, labels = self.text["generate"], self.painter.labels
        opened, painting = gr.State(None), gr.State(None)
        gallery = gr.Gallery(
            [(str(EXAMPLES / example["image"]), example["caption"]) for example in self.examples],
            label=text["examples"],
            columns=len(self.examples),
            rows=1,
            height="auto",
            object_fit="contain",
            allow_preview=False,
            buttons=[],
            elem_id="examples",
        )
        with gr.Row(elem_id="studio"):
            with gr.Column(scale=1, min_width=320):
                upload = gr.File(
                    label=text["upload"],
                    file_types=[".png", ".jpg", ".jpeg", ".nii", ".gz", ".dcm"],
                    height=130,
                    elem_id="upload",
                )
                warnings = gr.Markdown(visible=False, elem_id="warnings")
                with gr.Row(visible=False) as volume_row:
                    number = gr.Slider(0, 1, 0, step=1, label=text["slice"], elem_id="slice")
                    axis = gr.Dropdown(list(zip(text["axes"], AXES, strict=True)), value="axial", label=text["axis"])
                with gr.Row(visible=False) as window_row:
                    center = gr.Number(label=text["center"], elem_id="center")
                    width = gr.Number(label=text["width"], elem_id="width")
                editor = gr.ImageEditor(
                    label=text["editor"],
                    type="numpy",
                    image_mode="RGBA",
                    sources=(),
                    transforms=(),
                    format="png",
                    brush=gr.Brush(default_size=24, colors=COLORS, color_mode="fixed"),
                    layers=gr.LayerOptions(
                        allow_additional_layers=False,
                        layers=[text["repaint"], *labels] if labels else [text["repaint"]],
                    ),
                    canvas_size=(PAINT_SIZE, PAINT_SIZE),
                    height=480,
                    fixed_canvas=False,
                    buttons=[],
                    elem_id="editor",
                )
                legend = "".join(
                    f'<span><i style="background:{color}"></i>{number}. {escape(name)}</span>'
                    for number, (name, color) in enumerate(zip([text["repaint"], *labels], COLORS, strict=False), 1)
                )
                legend = f"{text['layers']} {legend}"
                gr.HTML(f'<div class="legend">{legend}</div>')
                mask_upload = gr.File(label=text["mask_upload"], height=130, elem_id="mask-upload")
            with gr.Column(scale=1, min_width=320):
                task = gr.Radio(
                    [(text["tasks"][name], name) for name in text["tasks"]], value="fill", label=text["task"]
                )
                prompt = gr.Dropdown(
                    text["prompts"], value="", label=text["prompt"], info=text["prompt_info"], allow_custom_value=True
                )
                adapter = gr.Dropdown(
                    [BASE, *self.painter.adapters],
                    value=BASE,
                    label=text["adapter"],
                    info=text["adapter_info"],
                    allow_custom_value=True,
                    elem_id="adapter",
                )
                with gr.Accordion(text["settings"], open=False):
                    strength = gr.Slider(*LIMITS["adapter_strength"], 1, label=text["strength"])
                    steps = gr.Slider(*LIMITS["num_inference_steps"], 20, step=1, label=text["steps"])
                    guidance = gr.Slider(1, LIMITS["guidance_scale"][1], 2, step=0.1, label=text["guidance"])
                    with gr.Row():
                        seed = gr.Number(0, precision=0, minimum=0, label=text["seed"])
                        count = gr.Slider(*LIMITS["num_images"], 2, step=1, label=text["number"])
                with gr.Row():
                    run = gr.Button(text["run"], variant="primary", elem_id="run")
                    cancel = gr.Button(text["cancel"], elem_id="cancel")
                message = gr.Markdown(elem_id="message")
                results = gr.Gallery(
                    label=text["candidates"],
                    columns=4,
                    height="auto",
                    object_fit="contain",
                    allow_preview=False,
                    buttons=[],
                    elem_id="results",
                )
                download = gr.DownloadButton(text["download"], interactive=False, elem_id="download")
        details = gr.HTML(elem_id="details")

        chosen = [task, prompt, steps, guidance, seed, count, adapter, strength]
        shown_controls = [opened, editor, warnings, volume_row, number, axis, window_row, center, width]

        def slices(found: Opened):
            return gr.Slider(maximum=max(found.num_slices - 1, 1), value=found.index)

        def show(found: Opened, mask=None, label_map=None) -> list:
            """The picture that is open, in the editor, with the controls that it needs."""
            grey = found.picture.ndim == 2 and found.picture.dtype != np.uint8
            note = text["warnings"].format(warnings="; ".join(found.warnings))
            return [
                found,
                self.editor_value(found, mask, label_map),
                gr.Markdown(note, visible=bool(found.warnings)),
                gr.Row(visible=found.scan.is_volume),
                slices(found),
                found.axis,
                gr.Row(visible=grey or found.scan.is_volume),
                *found.file_window,
            ]

        def on_upload(path):
            with plain_errors(), read_once(path):
                return show(open_picture(path)) if path else [gr.skip()] * len(shown_controls)

        def on_view(found, number, axis, center, width):
            with plain_errors():
                if found is None:
                    return [gr.skip()] * 3
                found.set_window(to_number("window_center", center), to_number("window_width", width))
                found.axis = axis
                found.index = min(int(number), found.num_slices - 1)
                return [found, self.editor_value(found), slices(found)]

        def on_mask(path, found):
            with plain_errors(), read_once(path):
                if path is None:
                    return gr.skip()
                if found is None:
                    raise ValueError(text["no_picture"])
                return self.editor_value(found, *read_mask(path, found, labels))

        def on_example(event: gr.SelectData, request: gr.Request):
            on_cancel(request)  # the example before may still be painted
            example = self.examples[event.index]
            found = open_picture(EXAMPLES / example["image"])
            mask, _ = read_mask(EXAMPLES / example["mask"], found, {})
            label_map = np.asarray(Image.open(EXAMPLES / example["label_map"]))
            return [*show(found, mask, label_map if label_map.any() else None), example["task"], example["prompt"]]

        def on_run(
            found,
            value,
            task,
            prompt,
            steps,
            guidance,
            seed,
            count,
            adapter,
            strength,
            request: gr.Request,
            progress=gr.Progress(),  # noqa: B008
        ):
            choices = {
                **{"task": task, "prompt": prompt, "adapter": adapter, "adapter_strength": strength},
                **{"num_inference_steps": int(steps), "guidance_scale": guidance},
                **{"seed": int(seed or 0), "num_images": int(count)},
            }
            with plain_errors():
                if found is None or not value or not value["layers"]:
                    raise ValueError(text["no_picture"])
                found = copy.copy(found)  # who looks at another slice meanwhile does not move this one
                layers = [painted(layer, found.picture.shape[:2]) for layer in value["layers"]]
                if len(layers) != 1 + len(labels):
                    raise ValueError(text["layers_changed"])
                stop = self.cancelled[request.session_hash] = threading.Event()

                def on_step(done, total):
                    progress((done, total), desc=text["progress"], unit="steps")
                    return stop.is_set()

                # the first layer says where, the others say what; the last one painted on a pixel counts
                label_map = np.zeros(layers[0].shape, np.uint8)
                for layer, label in zip(layers[1:], labels.values(), strict=True):
                    label_map[layer] = label
                self.limit.check(caller(request))
                start = time.monotonic()
                mask = np.any(layers, axis=0)
                # to be removed is a lesion of any label
                asked = label_map if label_map.any() and task != "remove" else None
                try:
                    job, images, shown, rewards = self.run(found, mask, asked, choices, on_step)
                finally:
                    self.cancelled.pop(request.session_hash, None)
                if not images:
                    return [text["stopped"], None, None, gr.skip(), ""]
                pictures, archive = self.write(found, job, images)
                seconds = time.monotonic() - start
                note = text["ready"].format(count=len(images), seconds=seconds, prompt=choices["prompt"] or "")
                state = (replace(job, scan=None), found.shown, shown, rewards)
                return [
                    note,
                    pictures,
                    state,
                    gr.DownloadButton(value=archive, interactive=True),
                    self.details(*state, 0),
                ]

        def on_cancel(request: gr.Request):
            if request.session_hash in self.cancelled:
                self.cancelled[request.session_hash].set()
            return text["stopped"]

        def on_pick(state, event: gr.SelectData):
            with plain_errors():
                return gr.skip() if state is None else self.details(*state, event.index)

        private = {"api_visibility": "private"}
        painting_event = {"concurrency_id": "gpu", "concurrency_limit": 1, **private}
        outputs = [message, results, painting, download, details]
        upload.upload(on_upload, upload, shown_controls, **private)
        for control, event in ((number, "release"), (axis, "input"), (center, "submit"), (width, "submit")):
            getattr(control, event)(
                on_view, [opened, number, axis, center, width], [opened, editor, number], **private
            )
        mask_upload.upload(on_mask, [mask_upload, opened], editor, **private)
        painted_example = gallery.select(on_example, None, [*shown_controls, task, prompt], **private).then(
            on_run, [opened, editor, *chosen], outputs, trigger_mode="multiple", **painting_event
        )
        painted_own = run.click(on_run, [opened, editor, *chosen], outputs, **painting_event)
        cancel.click(on_cancel, None, message, cancels=[painted_example, painted_own], queue=False, **private)
        results.select(on_pick, painting, details, **private)

        api = [gr.File(visible=False, label="image"), gr.File(visible=False, label="mask"), *chosen]
        api += [gr.Number(visible=False, label="slice"), gr.Textbox("axial", visible=False, label="axis")]
        api += [gr.Number(visible=False, label="window_center"), gr.Number(visible=False, label="window_width")]
        api.append(gr.File(visible=False, label="label_map"))
        found_files = [gr.File(visible=False, file_count="multiple"), gr.File(visible=False), gr.JSON(visible=False)]
        gr.Button(visible=False).click(
            self.generate, api, found_files, api_name="generate", concurrency_id="gpu", concurrency_limit=1
        )

    def editor_value(self, opened: Opened, mask=None, label_map=None) -> dict:
        """The open picture as the editor shows it; what is to be repainted as its layers, one for each label."""
        background = np.asarray(Image.fromarray(enlarged(opened.shown)).convert("RGBA"))
        nothing = np.zeros(opened.shown.shape[:2], bool)
        mask = nothing if mask is None else mask
        parts = [mask if label_map is None else mask & (label_map == 0)]
        parts += [nothing if label_map is None else label_map == value for value in self.painter.labels.values()]
        layers = []
        for part, color in zip(parts, COLORS, strict=False):
            channels = [int(color[place : place + 2], 16) for place in (1, 3, 5)] + [255]
            layers.append(enlarged(part[..., None] * np.array(channels, np.uint8)))
        return {"background": background, "layers": layers, "composite": None}


@contextmanager
def plain_errors():
    """What is wrong with an input becomes a message on the page, in one line; anything else is a fault of ours."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise gr.Error(one_line(error) or type(error).__name__, print_exception=False) from None
