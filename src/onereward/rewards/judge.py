"""
The generative judge: a vision-language model is asked which of two images is better, and its Yes is the reward.

[OneReward](https://huggingface.co/papers/2508.21066), section 3, with what
[RewardDance](https://huggingface.co/papers/2509.08826) says on the same idea.
"""

import inspect
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Formatter

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import cached_file

from onereward.data.whole_file import whole_file
from onereward.preferences.schema import CRITERIA
from onereward.rewards.running import condition_key


JUDGE_CONFIG = "judge_config.json"

# The paper's own wording is in a figure that was never released as text; this asks all that its text says is asked.
QUESTION = (
    "First image: {first}\nSecond image: {second}\nTask: {task}. Evaluation dimension: {criterion}.{prompt} "
    "Is the first image better than the second image? Answer Yes or No."
)
WORDING = {"fill": "image fill", "extend": "image extend", "remove": "object removal"}
PICTURES = ("first", "second", "mask", "source")
OUTLINE_COLOUR = (1.0, 0.0, 0.0)

# (C, H, W) or (1, H, W) tensors in [0, 1] as one batch, or pictures of any sizes
Images = torch.Tensor | Sequence[torch.Tensor | Image.Image]


# ------------------------------------------------------------------------------------------------------ mathematics


def both_orders(log_odds_01: torch.Tensor, log_odds_10: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    P(first better) from the two orders of a pair, and how much the orders disagree:

    $$p = \frac{P(a, b) + 1 - P(b, a)}{2}, \qquad \mathrm{gap} = |P(a, b) + P(b, a) - 1|$$

    with P the probability of Yes. A judge that looks at nothing but the position has a gap of up to 1.

    Args:
        log_odds_01, log_odds_10 (`torch.Tensor` of shape `(B,)`):
            logit(Yes) - logit(No), with the pair as it is and with its sides swapped.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: probability and gap, both of shape `(B,)` and in [0, 1].
    """
    p_01, p_10 = log_odds_01.sigmoid(), log_odds_10.sigmoid()
    return (p_01 + 1 - p_10) / 2, (p_01 + p_10 - 1).abs()


def judge_loss(log_odds: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    Cross entropy of the answer, renormalised over Yes and No: with d = logit(Yes) - logit(No) and y = 1 where the
    image shown first won, 0 where it lost and 0.5 for a tie,

    $$L = -[y \log \sigma(d) + (1 - y) \log \sigma(-d)]$$

    Over both orders of a pair this is equation 3 of [OneReward](https://huggingface.co/papers/2508.21066).

    Args:
        log_odds (`torch.Tensor` of shape `(B,)`):
            The d of each question.
        labels (`torch.Tensor` of shape `(B,)`):
            The y of each question; the mean of several votes counts as those votes do.
        weights (`torch.Tensor` of shape `(B,)`, *optional*):
            Number of votes behind each label.

    Returns:
        `torch.Tensor`: the mean over votes, a scalar.
    """
    losses = F.binary_cross_entropy_with_logits(log_odds, labels, reduction="none")
    return losses.mean() if weights is None else (weights * losses).sum() / weights.sum()


def win_rates(
    probabilities: torch.Tensor, first: torch.Tensor, second: torch.Tensor, count: int, soft: bool = False
) -> torch.Tensor:
    r"""
    Share of its comparisons that each image wins, the reward of [Pref-GRPO](https://huggingface.co/papers/2508.20751):

    $$w_i = \frac{1}{G - 1} \sum_{j \ne i} 1[x_i \succ x_j]$$

    Args:
        probabilities (`torch.Tensor` of shape `(P,)`):
            P(first better) of each pair; 1/2 is half a win for both.
        first, second (`torch.Tensor` of shape `(P,)`):
            Number of the image on either side of each pair.
        count (`int`):
            Number of images.
        soft (`bool`, *optional*, defaults to `False`):
            Count the probability itself in place of the win.

    Returns:
        `torch.Tensor` of shape `(count,)`, in [0, 1]; NaN for an image that is in no pair.

    Example:

    ```python
    >>> win_rates(torch.tensor([0.9, 0.6, 0.3]), torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2]), count=3)
    tensor([1.0000, 0.0000, 0.5000])
    ```
    """
    wins = probabilities if soft else (1 + (probabilities - 0.5).sign()) / 2
    total, games = torch.zeros(2, count, dtype=wins.dtype, device=wins.device)
    total.index_add_(0, first, wins).index_add_(0, second, 1 - wins)
    games.index_add_(0, first, torch.ones_like(wins)).index_add_(0, second, torch.ones_like(wins))
    return total / games


# ---------------------------------------------------------------------------------------------------------- pictures


def draw_outline(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    An image with a red line of one pixel around the mask. The line lies outside of the mask, so that no repainted
    pixel is covered and none loses its gradient.

    Args:
        image (`torch.Tensor` of shape `(3, H, W)`):
            Values in [0, 1].
        mask (`torch.Tensor` of shape `(1, H, W)`):
            1 = repainted.

    Returns:
        `torch.Tensor` of shape `(3, H, W)`.
    """
    inside = (mask > 0).to(image.dtype)
    line = F.max_pool2d(inside[None], kernel_size=3, stride=1, padding=1)[0] - inside
    return torch.where(line > 0, image.new_tensor(OUTLINE_COLOUR)[:, None, None], image)


def to_patches(image: torch.Tensor, patch_size: int, merge_size: int, temporal_patch_size: int) -> torch.Tensor:
    """
    Cut an image as the vision tower of Qwen2-VL wants it (https://huggingface.co/papers/2409.12191): flat patches,
    those that are merged into one token beside each other, and each repeated as if the image were a short film.

    Args:
        image (`torch.Tensor` of shape `(C, H, W)`):
            Normalised image; sides divisible by `patch_size * merge_size`.
        patch_size, merge_size, temporal_patch_size (`int`):
            As in the model's image processor.

    Returns:
        `torch.Tensor` of shape `(H / patch_size * W / patch_size, C * temporal_patch_size * patch_size ** 2)`.
    """
    channels, height, width = image.shape
    rows, columns = height // patch_size, width // patch_size
    cells = image.reshape(
        channels, rows // merge_size, merge_size, patch_size, columns // merge_size, merge_size, patch_size
    ).permute(1, 4, 2, 5, 0, 3, 6)
    film = cells[:, :, :, :, :, None].expand(*cells.shape[:5], temporal_patch_size, patch_size, patch_size)
    return film.reshape(rows * columns, -1)


def preprocess(images: list[torch.Tensor], like: dict[str, torch.Tensor], image_processor) -> torch.Tensor:
    """
    What an image processor of transformers does, in torch, so that gradients pass: scale, normalise, and lay out.

    Args:
        images (`list[torch.Tensor]`):
            Images of shape `(3, H, W)`, values in [0, 1].
        like (`dict[str, torch.Tensor]`):
            What the processor itself made of them. Sizes and layout are taken from it, and so is the assurance that
            both agree.
        image_processor (`transformers.BaseImageProcessor`):
            The processor.

    Returns:
        `torch.Tensor`: pixel values of the shape of `like["pixel_values"]`.

    Raises:
        `ValueError`: when the processor does something else, such as cropping or cutting an image into several.
    """
    wanted, grid, name = like["pixel_values"], like.get("image_grid_thw"), type(image_processor).__name__
    if grid is not None and wanted.ndim == 2:  # the Qwen-VL family
        sizes = [(int(rows), int(columns)) for _, rows, columns in grid * image_processor.patch_size]
    elif wanted.ndim >= 4 and wanted.shape[:-3].numel() == len(images):
        sizes = [tuple(wanted.shape[-2:])] * len(images)
    else:
        raise ValueError(
            f"{name} turns {len(images)} images into pixel values of shape {tuple(wanted.shape)}, a layout that has "
            "no differentiable counterpart here. Turn off the splitting of images in the processor "
            "(`do_image_splitting`, `do_pan_and_scan`), or take a model of the Qwen-VL family."
        )
    mode = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}.get(image_processor.resample)
    pixels = []
    for image, size in zip(images, sizes, strict=True):
        if image.shape[-2:] != size:
            if mode is None:
                raise ValueError(
                    f"{name} scales with `resample={image_processor.resample}`, which torch has not; set "
                    "`processor.image_processor.resample` to 2 (bilinear) or 3 (bicubic)."
                )
            image = F.interpolate(image[None], size, mode=mode, antialias=True, align_corners=False)[0].clamp(0, 1)
        if image_processor.do_normalize:
            mean, std = (
                image.new_tensor(v)[:, None, None] for v in (image_processor.image_mean, image_processor.image_std)
            )
            image = (image - mean) / std
        if wanted.ndim == 2:
            layout = (image_processor.patch_size, image_processor.merge_size, image_processor.temporal_patch_size)
            image = to_patches(image, *layout)
        pixels.append(image)
    pixels = torch.cat(pixels) if wanted.ndim == 2 else torch.stack(pixels).view_as(wanted)
    # 8-bit rounding before and after the scaling is worth about 0.01 here, a crop or another order far more
    difference = (pixels.detach() - wanted.to(pixels)).abs().mean().item()
    if not difference < 0.05:
        raise ValueError(
            f"{name} and its differentiable counterpart disagree by {difference:.3g} in the mean, expected less than "
            "0.05: it crops, pads or rescales in a way of its own. Take a model of the Qwen-VL family, or set the "
            "processor to plain scaling to one size."
        )
    return pixels


def _as_tensors(images: Images) -> list[torch.Tensor]:
    """Each image as a tensor of shape `(3, H, W)` with values in [0, 1], whatever it came as."""
    tensors = []
    for image in images:
        if isinstance(image, Image.Image):
            image = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise ValueError(
                f"A picture has shape {tuple(image.shape)}; expected (1, H, W) for grey or (3, H, W) for colour. "
                "Convert it first."
            )
        tensors.append(image.expand(3, -1, -1))
    return tensors


def _as_pictures(tensors: list[torch.Tensor]) -> list[Image.Image]:
    eight_bits = ((255 * tensor.detach().clamp(0, 1)).round().byte() for tensor in tensors)
    return [Image.fromarray(tensor.permute(1, 2, 0).cpu().numpy()) for tensor in eight_bits]


def _take(values, indices: list[int]):
    if values is None or torch.is_tensor(values):
        return None if values is None else values[indices]
    return [values[index] for index in indices]


# ------------------------------------------------------------------------------------------------- model and tokens


def load_processor(name_or_path: str | os.PathLike, **kwargs) -> ProcessorMixin:
    """
    The processor of a vision-language model for still images. Processors that also read films, as those of the Qwen-VL
    family, cannot be made without torchvision; here they are made without the part for films.

    Args:
        name_or_path (`str` or `os.PathLike`):
            Id on the Hub, or folder.
        **kwargs:
            Further arguments of `AutoProcessor.from_pretrained`, such as `size`.

    Returns:
        `transformers.ProcessorMixin`
    """
    config = AutoConfig.from_pretrained(name_or_path, revision=kwargs.get("revision"))
    whole = PROCESSOR_MAPPING.get(type(config), None)
    if whole is None or "video_processor" not in whole.get_attributes():
        return AutoProcessor.from_pretrained(name_or_path, **kwargs)
    return without_films(whole).from_pretrained(name_or_path, **kwargs)


def without_films(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """
    A class of processors less its `video_processor`.

    Args:
        processor_class (`type[ProcessorMixin]`):
            Class such as `Qwen2_5_VLProcessor`.

    Returns:
        `type[ProcessorMixin]`: subclass of the same name, so that what it saves names the class it stands for.
    """

    # transformers reads the parts of a processor off the signature of this method
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        processor_class.__init__(
            self, image_processor=image_processor, tokenizer=tokenizer, chat_template=chat_template, **kwargs
        )

    return type(processor_class.__name__, (processor_class,), {"__init__": __init__})


def answer_ids(tokenizer, question: str, answers: tuple[str, str]) -> tuple[int, int]:
    """
    The tokens that tell the two answers apart, found by writing each answer behind the question.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`):
            The tokenizer.
        question (`str`):
            A question with the chat template applied, up to where the answer begins.
        answers (`tuple[str, str]`):
            The answers, such as `("Yes", "No")`.

    Returns:
        `tuple[int, int]`

    Raises:
        `ValueError`: when an answer is not one token of its own there, or both are the same.
    """
    before = tokenizer(question, add_special_tokens=False)["input_ids"]
    ids = []
    for answer in answers:
        after = tokenizer(question + answer, add_special_tokens=False)["input_ids"]
        if after[:-1] != before or after[-1] == tokenizer.unk_token_id:
            given = tokenizer.convert_ids_to_tokens(tokenizer(answer, add_special_tokens=False)["input_ids"])
            raise ValueError(
                f"`answers` is {answers}, but {answer!r} is no single first token of an answer with this tokenizer, "
                f"which writes it as {given}. Pass two answers that are, e.g. `answers=('Yes', 'No')`, or "
                "`answers=(' Yes', ' No')` for a chat template that puts a space before the answer."
            )
        ids.append(after[-1])
    if ids[0] == ids[1]:
        raise ValueError(f"`answers` is {answers}, which are one and the same token ({ids[0]}); expected two.")
    return ids[0], ids[1]


class GenerativeJudge:
    r"""
    A vision-language model that compares images, as the reward model of
    [OneReward](https://huggingface.co/papers/2508.21066): it sees two images and the question whether the first is
    better than the second for a task and a criterion, and the reward is the probability of Yes, renormalised over Yes
    and No, at the first position of the answer,

    $$P(x_0 \succ x_1) = \sigma(\mathrm{logit}(\mathrm{Yes}) - \mathrm{logit}(\mathrm{No}))$$

    Like OneReward's, as far as its paper tells, it is shown the two results and nothing else: no mask and no source,
    and the prompt for the criterion `text_alignment` alone. A `question` with `{mask}` or `{source}` shows these as
    pictures of their own, and `outline=True` draws the mask's outline into both results.

    It is a reward function: give it to [`DDPOTrainer`] in `reward_funcs` as it is. Train it on votes with
    [`JudgeTrainer`]. It is not a `nn.Module`: move it with `judge.model.to(device)`.

    Research use only, not for clinical use.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Image-text-to-text model of transformers, for example Qwen2.5-VL, with or without an adapter.
        processor (`ProcessorMixin`):
            Its processor, with a chat template.
        criteria (`Sequence[str]` or `dict[str, Sequence[str]]`, *optional*, defaults to `CRITERIA`):
            What is asked for; or, for each task, what is asked for there, as OneReward asks for `removal_quality` in
            removal alone. An image is not scored (NaN) on a criterion that its task does not have.
        question (`str`, *optional*, defaults to `QUESTION`):
            The question. Pictures: `{first}` and `{second}`, in this order, and where wanted `{mask}` (white =
            repainted) and `{source}`. Text: `{task}`, `{criterion}`, and `{prompt}`, which becomes `" Prompt: ...."`
            or nothing.
        wording (`dict[str, str]`, *optional*):
            What to call tasks and criteria in the question. Defaults to OneReward's names of tasks; a criterion is
            called by its name, with spaces for underscores.
        prompt_criteria (`Sequence[str]`, *optional*, defaults to `("text_alignment",)`):
            Criteria whose question quotes the prompt. An image without a prompt is not scored on them (NaN).
        outline (`bool`, *optional*, defaults to `False`):
            Whether the mask's outline is drawn into both images.
        answers (`tuple[str, str]`, *optional*, defaults to `("Yes", "No")`):
            What the model is to answer when the first image is better, and when it is not.
        reference (`str` or `Callable`, *optional*):
            What [`~GenerativeJudge.score`] compares images with. `None`: with the others of their group, the images of
            the same condition. `str`: with the images in this column. A function: with the images it returns for the
            keyword arguments of a reward function, such as those of a frozen pipeline.
        soft (`bool`, *optional*, defaults to `False`):
            Within a group, whether probabilities are averaged in place of wins, see [`win_rates`].
        prefix (`str`, *optional*, defaults to `""`):
            Put before the names of the criteria that `score` returns, where another reward has heads of these names.
        batch_size (`int`, *optional*, defaults to 8):
            Pairs that go through the model at once.

    Raises:
        `ValueError`: when the question lacks an image or names something unknown, the processor has no chat template,
        or an answer is no single token.

    Example:

    ```python
    >>> import torch
    >>> from onereward.rewards.judge import GenerativeJudge

    >>> judge = GenerativeJudge.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct", reference="reference_image")
    >>> better = judge.compare(images_0, images_1, tasks=["fill", "remove"], criterion="realism")
    >>> better.shape
    torch.Size([2])
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processor: ProcessorMixin,
        criteria: Sequence[str] | dict[str, Sequence[str]] = CRITERIA,
        question: str = QUESTION,
        wording: dict[str, str] | None = None,
        prompt_criteria: Sequence[str] = ("text_alignment",),
        outline: bool = False,
        answers: tuple[str, str] = ("Yes", "No"),
        reference: str | Callable | None = None,
        soft: bool = False,
        prefix: str = "",
        batch_size: int = 8,
    ):
        names = [name for _, name, _, _ in Formatter().parse(question) if name is not None]
        unknown = sorted(set(names) - {*PICTURES, "task", "criterion", "prompt"})
        if unknown or [name for name in names if name in ("first", "second")] != ["first", "second"]:
            raise ValueError(
                f"`question` is {question!r}; expected `{{first}}` and then `{{second}}`, once each, and of "
                f"`{{mask}}`, `{{source}}`, `{{task}}`, `{{criterion}}` and `{{prompt}}` what is wanted"
                + (f". It names {unknown}." if unknown else ".")
            )
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                f"{type(processor).__name__} has no chat template, which the question is put with. Take a model that "
                "follows instructions, or set `processor.chat_template`."
            )
        self.model, self.processor = model, processor
        self.criteria = {task: tuple(c) for task, c in criteria.items()} if isinstance(criteria, dict) else criteria
        self.question, self.wording, self.outline = question, {**WORDING, **(wording or {})}, outline
        self.prompt_criteria, self.answers = tuple(prompt_criteria), tuple(answers)
        self.reference, self.soft, self.prefix, self.batch_size = reference, soft, prefix, batch_size
        self.processor_kwargs = {}  # what the processor was loaded with, and is to be loaded with again
        self.shown = [name for name in names if name in PICTURES]
        self.yes, self.no = answer_ids(processor.tokenizer, self.ask("", "", ""), self.answers)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        # what only the last position is needed of would otherwise be a tensor of sequence times vocabulary
        self._last_only = "logits_to_keep" in inspect.signature(base.forward).parameters

    # ------------------------------------------------------------------------------------------------------ on disk

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        is_trainable: bool = False,
        model_kwargs: dict | None = None,
        processor_kwargs: dict | None = None,
        **options,
    ) -> "GenerativeJudge":
        """
        Load a judge: a vision-language model as it is, or what [`~GenerativeJudge.save_pretrained`] wrote, with the
        question it was trained on. Weights are read from safetensors alone.

        Args:
            name_or_path (`str` or `os.PathLike`):
                Id on the Hub, or folder, of a model or of an adapter.
            revision (`str`, *optional*):
                Branch, tag or commit on the Hub; of an adapter its own, not that of the model it is for.
            is_trainable (`bool`, *optional*, defaults to `False`):
                Whether the adapter is to be trained further.
            model_kwargs (`dict`, *optional*):
                Further arguments of `AutoModelForImageTextToText.from_pretrained`, e.g. `{"dtype": "bfloat16"}`.
            processor_kwargs (`dict`, *optional*):
                Further arguments of the processor, e.g. `{"size": {"shortest_edge": 50176, "longest_edge": 200704}}`,
                which has Qwen2.5-VL see pictures of 50176 to 200704 pixels; one of 64 by 64 pixels would be four
                tokens otherwise.
            **options:
                Arguments of [`GenerativeJudge`], in place of what was saved.

        Raises:
            `ValueError`: when an adapter has no weights in safetensors.
        """
        name = str(name_or_path)

        def find(file):
            return cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)

        saved = find(JUDGE_CONFIG)
        saved = json.loads(Path(saved).read_text(encoding="utf-8")) if saved else {}
        base = name
        if find("adapter_config.json"):
            base = PeftConfig.from_pretrained(name, revision=revision).base_model_name_or_path
            if not find("adapter_model.safetensors"):
                raise ValueError(
                    f"`name_or_path` is {name!r}, an adapter without adapter_model.safetensors. Pickles are not read; "
                    "save it again with `save_pretrained`."
                )
        of_base = {"revision": revision} if base == name else {}
        model_kwargs = {"use_safetensors": True, **of_base, **(model_kwargs or {})}
        model = AutoModelForImageTextToText.from_pretrained(base, **model_kwargs)
        if base != name:
            model = PeftModel.from_pretrained(model, name, revision=revision, is_trainable=is_trainable)
        processor_kwargs = {**saved.pop("processor_kwargs", {}), **(processor_kwargs or {})}
        judge = cls(model.eval(), load_processor(base, **of_base, **processor_kwargs), **{**saved, **options})
        judge.processor_kwargs = processor_kwargs
        return judge

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """
        Write the judge: of a model with an adapter the adapter alone, in PEFT's format; else model and processor. The
        question and the criteria go to `judge_config.json`.

        Args:
            folder (`str` or `os.PathLike`):
                Where to write.
        """
        if isinstance(self.model, PeftModel):
            # without the argument PEFT asks the Hub whether the base model's vocabulary has grown
            self.model.save_pretrained(folder, save_embedding_layers=False)
        else:
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
        options = ("criteria", "question", "wording", "prompt_criteria", "outline", "answers", "processor_kwargs")
        with whole_file(Path(folder, JUDGE_CONFIG)) as partial:
            text = json.dumps({name: getattr(self, name) for name in options}, indent=2, ensure_ascii=False)
            partial.write_text(text + "\n", encoding="utf-8")

    # ------------------------------------------------------------------------------------------------- the question

    def ask(self, task: str, criterion: str, prompt: str | None = None) -> str:
        """
        The question as the model reads it, chat template applied, with a mark where each picture goes.

        Args:
            task (`str`):
                Task, such as `"fill"`.
            criterion (`str`):
                Criterion, such as `"realism"`.
            prompt (`str`, *optional*):
                Prompt; quoted for `prompt_criteria` alone.
        """
        words = {
            "task": self.wording.get(task, task.replace("_", " ")),
            "criterion": self.wording.get(criterion, criterion.replace("_", " ")),
            "prompt": f" Prompt: {prompt}." if prompt and criterion in self.prompt_criteria else "",
        }
        content = []
        for piece in re.split(rf"(\{{(?:{'|'.join(PICTURES)})\}})", self.question):
            if piece[1:-1] in PICTURES:
                content.append({"type": "image"})
            elif piece:
                content.append({"type": "text", "text": piece.format(**words)})
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def prepare_inputs(
        self,
        images_0: Images,
        images_1: Images,
        masks: Images | None = None,
        sources: Images | None = None,
        prompts: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        criterion: str | Sequence[str] = "quality",
        differentiable: bool = False,
    ) -> dict[str, torch.Tensor]:
        """
        B questions as the model's inputs. Arguments as in [`~GenerativeJudge.compare`], and:

        Args:
            differentiable (`bool`, *optional*, defaults to `False`):
                Whether the pixel values carry gradients back to the images. Otherwise the processor's own are used.

        Returns:
            `dict[str, torch.Tensor]`: what the processor returns, padded on the left.
        """
        count = len(images_0)
        criteria = [criterion] * count if isinstance(criterion, str) else criterion
        prompts, tasks = prompts or [""] * count, tasks or ["fill"] * count
        given = {"images_1": images_1, "masks": masks, "sources": sources, "prompts": prompts, "tasks": tasks}
        for name, values in {**given, "criterion": criteria}.items():
            if values is not None and len(values) != count:
                raise ValueError(f"`{name}` has {len(values)} entries; expected {count}, as many as `images_0`.")
        pictures = {"first": _as_tensors(images_0), "second": _as_tensors(images_1)}
        for name, plural, values in (("mask", "masks", masks), ("source", "sources", sources)):
            if name in self.shown or (name == "mask" and self.outline):
                if values is None:
                    raise ValueError(
                        f"`{plural}` is None, but the question shows them. Pass them, or change `question`."
                    )
                pictures[name] = _as_tensors(values)
        if self.outline:
            for side in ("first", "second"):
                pairs = zip(pictures[side], pictures["mask"], strict=True)
                pictures[side] = [draw_outline(image, mask[:1].to(image)) for image, mask in pairs]
        questions = [[pictures[name][i] for name in self.shown] for i in range(count)]
        texts = [self.ask(*words) for words in zip(tasks, criteria, prompts, strict=True)]
        inputs = self.processor(
            images=[_as_pictures(tensors) for tensors in questions],
            text=texts,
            padding=True,
            padding_side="left",  # so that every answer begins at the last position
            return_tensors="pt",
        )
        inputs = dict(inputs)
        if differentiable:
            flat = [tensor for tensors in questions for tensor in tensors]
            inputs["pixel_values"] = preprocess(flat, inputs, self.processor.image_processor)
        return inputs

    def log_odds(self, inputs: dict[str, torch.Tensor], model: torch.nn.Module | None = None) -> torch.Tensor:
        """
        logit(Yes) - logit(No) at the first position of the answer, with gradients.

        Args:
            inputs (`dict[str, torch.Tensor]`):
                From [`~GenerativeJudge.prepare_inputs`], on any device.
            model (`torch.nn.Module`, *optional*):
                The model where a trainer has wrapped it. Defaults to the judge's own.

        Returns:
            `torch.Tensor` of shape `(B,)`, float32; its sigmoid is the probability of Yes.
        """
        weights = next(self.model.parameters())
        inputs = {
            name: value.to(weights.device, weights.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        if self._last_only:
            inputs["logits_to_keep"] = 1
        logits = (self.model if model is None else model)(**inputs, use_cache=False).logits[:, -1]
        return logits[:, self.yes].float() - logits[:, self.no].float()

    # ------------------------------------------------------------------------------------------------ what it is for

    def compare(
        self,
        images_0: Images,
        images_1: Images,
        masks: Images | None = None,
        sources: Images | None = None,
        prompts: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        criterion: str | Sequence[str] = "quality",
        *,
        average_orders: bool = True,
        differentiable: bool = False,
        return_gap: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        Probability that the first image of each pair is the better one. The model is in evaluation mode for the call.

        Args:
            images_0, images_1 (`torch.Tensor` of shape `(B, C, H, W)`, or a list of B pictures):
                The images, floats in [0, 1], grey or colour; or `PIL.Image.Image`s of any size.
            masks (`torch.Tensor` of shape `(B, 1, H, W)`, or a list of B pictures, *optional*):
                1 (white) = repainted, 0 = kept. Needed when the question shows them.
            sources (`torch.Tensor` of shape `(B, C, H, W)`, or a list of B pictures, *optional*):
                What the images were before. Needed when the question shows them.
            prompts (`Sequence[str]`, *optional*):
                B prompts.
            tasks (`Sequence[str]`, *optional*):
                B tasks. Defaults to `"fill"` for all.
            criterion (`str` or `Sequence[str]`, *optional*, defaults to `"quality"`):
                The criterion, or B of them.
            average_orders (`bool`, *optional*, defaults to `True`):
                Whether each pair is shown in both orders, see [`both_orders`]. `False` asks once, as OneReward does
                while it tunes (its equation 4), in half the time.
            differentiable (`bool`, *optional*, defaults to `False`):
                Whether gradients flow from the result to the images, which must be tensors then: for tuning by reward
                feedback ([ReFL](https://huggingface.co/papers/2304.05977)). Weights that need no gradient get none;
                call `judge.model.requires_grad_(False)` first. Otherwise images are rounded to 8 bits, as they would
                be shown.
            return_gap (`bool`, *optional*, defaults to `False`):
                Whether to return the disagreement of the orders too.

        Returns:
            `torch.Tensor` of shape `(B,)`, float32 in [0, 1], on the model's device; with `return_gap` a tuple of it
            and the gap |P(a, b) + P(b, a) - 1|, 0 for a judge that does not care for the order.

        Raises:
            `ValueError`: when lengths differ, the question shows what is not given, `return_gap` comes without both
            orders, or the processor has no differentiable counterpart.

        Example:

        ```python
        >>> judge.model.requires_grad_(False)
        >>> images.requires_grad_()
        >>> p = judge.compare(images, references, criterion="realism", average_orders=False, differentiable=True)
        >>> loss = (0.9 - p).clamp(min=0).mean()  # OneReward's equation 5
        >>> loss.backward()
        ```
        """
        if return_gap and not average_orders:
            raise ValueError("`return_gap` needs both orders; pass `average_orders=True`.")
        training, results = self.model.training, []
        self.model.eval()
        try:
            with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
                for start in range(0, len(images_0), self.batch_size):
                    part = list(range(len(images_0)))[start : start + self.batch_size]
                    rest = [_take(values, part) for values in (masks, sources, prompts, tasks)]
                    rest.append(criterion if isinstance(criterion, str) else _take(criterion, part))
                    sides = _take(images_0, part), _take(images_1, part)
                    orders = [sides, sides[::-1]] if average_orders else [sides]
                    odds = [self.log_odds(self.prepare_inputs(*order, *rest, differentiable)) for order in orders]
                    results.append(both_orders(*odds) if average_orders else (odds[0].sigmoid(),))
        finally:
            self.model.train(training)
        results = [torch.cat(parts) for parts in zip(*results, strict=True)]
        return (results[0], results[1]) if return_gap else results[0]

    def criteria_of(self, task: str) -> tuple[str, ...]:
        """
        What is asked for in a task.

        Args:
            task (`str`):
                The task.

        Raises:
            `ValueError`: when `criteria` has none for it.
        """
        if not isinstance(self.criteria, dict):
            return tuple(self.criteria)
        if task not in self.criteria:
            raise ValueError(f"`task` is {task!r}, but `criteria` knows {sorted(self.criteria)}; add it there.")
        return self.criteria[task]

    @torch.no_grad()
    def score(
        self,
        images: torch.Tensor,
        masks: torch.Tensor | None = None,
        sources: torch.Tensor | None = None,
        label_maps: torch.Tensor | None = None,
        prompts: Sequence[str] | None = None,
        task: Sequence[str] | None = None,
        **columns,
    ) -> dict[str, torch.Tensor]:
        """
        Rewards of a batch of images, in both orders: the probability that each is better than its reference; without a
        `reference`, the share of the others of its group that it beats ([`win_rates`]). A group of G images takes
        G (G - 1) questions per criterion.

        Args:
            images, sources (`torch.Tensor` of shape `(B, C, H, W)`):
                Images to judge and what they were before, floats in [0, 1].
            masks (`torch.Tensor` of shape `(B, 1, H, W)`):
                1 = repainted.
            label_maps (`torch.Tensor` of shape `(B, 1, H, W)`, *optional*):
                Not shown to the model; tells conditions apart.
            prompts, task (`Sequence[str]`, *optional*):
                B prompts and tasks.
            **columns:
                Columns of the data set; `reference` may name one.

        Returns:
            `dict[str, torch.Tensor]`: for each criterion B float32 numbers in [0, 1], higher is better, NaN where the
            criterion does not apply or the image is alone in its group; on the device of `images`.

        Raises:
            `ValueError`: when there is no column that `reference` names.
        """
        count, device = len(images), images.device
        prompts = [""] * count if prompts is None else [prompt or "" for prompt in prompts]
        tasks = ["fill"] * count if task is None else list(task)
        rest = (masks, sources, prompts, tasks)
        if self.reference is None:
            groups: dict[str, list[int]] = {}
            for i in range(count):
                row = {"image": sources, "mask": masks, "label_map": label_maps}
                row = {name: np.zeros(0) if values is None else values[i].cpu() for name, values in row.items()}
                groups.setdefault(condition_key({**row, "prompt": prompts[i], "task": tasks[i]}), []).append(i)
            pairs = [(i, j) for group in groups.values() for n, i in enumerate(group) for j in group[n + 1 :]]
            others = images
        else:
            pairs = [(i, i) for i in range(count)]
            if isinstance(self.reference, str):
                if self.reference not in columns:
                    raise ValueError(
                        f"`reference` is {self.reference!r}, but the columns are {sorted(columns)}; name one of them."
                    )
                others = columns[self.reference]
            else:
                given = {"images": images, "masks": masks, "sources": sources, "label_maps": label_maps}
                others = self.reference(**given, prompts=prompts, task=tasks, **columns)

        rewards = {}
        of_task = {name: self.criteria_of(name) for name in dict.fromkeys(tasks)}
        # the same heads in every batch, whatever tasks it holds
        known = of_task if not isinstance(self.criteria, dict) else self.criteria
        for criterion in dict.fromkeys(name for names in known.values() for name in names):
            asked = [
                (i, j)
                for i, j in pairs
                if criterion in of_task[tasks[i]] and (prompts[i] or criterion not in self.prompt_criteria)
            ]
            first, second = [i for i, _ in asked], [j for _, j in asked]
            values = torch.full((count,), torch.nan, device=device)
            if asked:
                shown = [_take(part, first) for part in rest]
                better = self.compare(_take(images, first), _take(others, second), *shown, criterion).to(device)
                if self.reference is None:
                    first, second = torch.tensor(first, device=device), torch.tensor(second, device=device)
                    values = win_rates(better, first, second, count, self.soft)
                else:
                    values[first] = better
            rewards[self.prefix + criterion] = values
        return rewards

    def __call__(self, images: torch.Tensor, **columns) -> dict[str, torch.Tensor]:
        """As a reward function: [`~GenerativeJudge.score`]."""
        return self.score(images, **columns)
