# Copyright 2026 The OneReward authors. Licensed under the Apache License, Version 2.0.
# Research use only, not for clinical use.
import copy
import os
import re
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import ModelOutput, cached_file

from .configuration_onereward import OneRewardConfig
from .features_onereward import (
    NUM_DETAILS,
    NUM_REGIONS,
    correlation_ratio,
    details,
    region_statistics,
    regions,
    tissue_mask,
)
from .image_reward_pipeline import ImageRewardPipeline
from .losses import davidson_log_probabilities


MAX_STD = 3.0  # of a logit; odds of 20 to 1 are a difference of 3


@dataclass
class OneRewardOutput(ModelOutput):
    """
    Output of [`OneRewardModel`].

    Args:
        logits (`torch.FloatTensor` of shape `(B, len(criteria))`):
            On the scale of the votes: the difference of two images' logits gives the probability that a rater prefers
            the first. Only differences within one condition (image, mask, label map, prompt) have a meaning.
        rewards (`torch.FloatTensor` of shape `(B, len(criteria))`):
            The logits with mean 0 and standard deviation 1 over the training images.
        log_nu (`torch.FloatTensor` of shape `(len(criteria),)`):
            Logarithm of the prevalence of ties in the votes, learned with the rest; used by the loss.
        stds (`torch.FloatTensor` of shape `(B, len(criteria))`, *optional*):
            With `config.gaussian`, how far raters disagree on the image: the standard deviation of its logit.
        features (`torch.FloatTensor` of shape `(B, len(criteria), hidden_size)`):
            What the last layer of each head sees.
    """

    logits: torch.FloatTensor | None = None
    rewards: torch.FloatTensor | None = None
    log_nu: torch.FloatTensor | None = None
    stds: torch.FloatTensor | None = None
    features: torch.FloatTensor | None = None


class RewardHeads(nn.Module):
    r"""
    The trained end of a [`OneRewardModel`]: from numbers that describe an image to a reward for each criterion,
    conditioned on the task and the prompt. It can be trained by itself on features from elsewhere.

    Once trained it knows what it is unsure of: a Laplace approximation of the last layer of each head, a normal
    distribution of its weights around those that were learned ([Daxberger et al.](https://huggingface.co/papers/2106.14806)).

    Args:
        num_features (`int`):
            Numbers an image.
        config ([`OneRewardConfig`]):
            Of it `criteria`, `tasks`, `prompt_buckets`, `hidden_size`, `dropout` and `gaussian`.

    Example:

    ```python
    >>> heads = RewardHeads(68, OneRewardConfig(criteria=["quality"], tasks=["fill"]))
    >>> heads(torch.randn(5, 68), torch.zeros(5, dtype=torch.long)).logits.shape
    torch.Size([5, 1])
    ```
    """

    def __init__(self, num_features: int, config: OneRewardConfig):
        super().__init__()
        width, number = config.hidden_size, len(config.criteria)
        self.norm = nn.BatchNorm1d(num_features)
        self.dropout = nn.Dropout(config.dropout)
        self.project = nn.Linear(num_features, width)
        self.task_embedding = nn.Embedding(len(config.tasks), width)
        if config.prompt_buckets:
            self.word_embedding = nn.Embedding(config.prompt_buckets + 1, width, padding_idx=0)
        self.bodies = nn.ModuleList(
            nn.Sequential(nn.GELU(), nn.Dropout(config.dropout), nn.Linear(width, width), nn.GELU())
            for _ in range(number)
        )
        self.outputs = nn.ModuleList(nn.Linear(width, 2 if config.gaussian else 1) for _ in range(number))
        self.log_nu = nn.Parameter(torch.zeros(number))
        # Set once the weights are trained: the units of the rewards, ...
        self.register_buffer("logit_mean", torch.zeros(number))
        self.register_buffer("logit_std", torch.ones(number))
        # ... how sure the model may be of its differences, ...
        self.register_buffer("temperature", torch.ones(number))
        # ... and the last layers' uncertainty, F F^T the covariance of a head's weights. Features count from their
        # mean, as rewards do: pairs tell nothing of what all images share.
        self.register_buffer("feature_mean", torch.zeros(number, width))
        self.register_buffer("posterior_factor", torch.zeros(number, width, width))

    def forward(
        self, features: torch.FloatTensor, task_ids: torch.LongTensor, word_ids: torch.LongTensor | None = None
    ) -> OneRewardOutput:
        """
        Args:
            features (`torch.FloatTensor` of shape `(B, num_features)`):
                What describes the images, in any units.
            task_ids, word_ids:
                As in [`OneRewardModel`].

        Returns:
            [`OneRewardOutput`]
        """
        hidden = self.project(self.dropout(self.norm(features))) + self.task_embedding(task_ids)
        if word_ids is not None and hasattr(self, "word_embedding"):
            words = self.word_embedding(word_ids).sum(dim=1)
            hidden = hidden + words / (word_ids > 0).sum(dim=1, keepdim=True).clamp(min=1)
        last = torch.stack([body(hidden) for body in self.bodies], dim=1)
        found = torch.stack([output(last[:, i]) for i, output in enumerate(self.outputs)], dim=1)
        logits = found[..., 0]
        return OneRewardOutput(
            logits=logits,
            rewards=(logits - self.logit_mean) / self.logit_std,
            log_nu=self.log_nu.clone(),  # DDP takes a bare parameter in an output for one that was not used
            stds=MAX_STD * found[..., 1].sigmoid() if found.shape[-1] > 1 else None,
            features=last,
        )

    def deviations(self, features: torch.FloatTensor) -> torch.FloatTensor:
        """
        How the logits move with the uncertain weights: `(B, H, W)` times W standard normal numbers, the same for all
        images, is a draw of the logits' errors. From `features` of the output, `(B, H, W)`.
        """
        return torch.einsum("bhw,hwv->bhv", features - self.feature_mean, self.posterior_factor)


class OneRewardModel(PreTrainedModel):
    r"""
    Judges the repainted part of an image by several criteria at once: a backbone that sees the image, the source, the
    mask and the label map, and one head per criterion, conditioned on the task and the prompt.

    What is wrong with a repainted part, grain, blur, a seam, a lesion too dark, shows in how it differs from what is
    around it. So the features of the backbone, and apart from them the image's own detail at several scales, enter
    the heads as mean and spread over regions: the mask, its border, its surroundings, and each label. That is what
    lets few votes suffice. Each image is judged alone: scores of a pair do not depend on its order.

    Research use only, not for clinical use.

    Args:
        config ([`OneRewardConfig`]):
            Configuration of the model.

    Example:

    ```python
    >>> import torch
    >>> from onereward import OneRewardConfig, OneRewardModel

    >>> model = OneRewardModel(OneRewardConfig())
    >>> source, mask = torch.rand(2, 1, 64, 64), torch.zeros(2, 1, 64, 64)
    >>> mask[..., 20:40, 20:40] = 1
    >>> image = torch.where(mask > 0, torch.rand_like(source), source)
    >>> rewards = model.score(image, mask, source, tasks=["fill", "remove"])
    >>> {criterion: reward.shape for criterion, reward in rewards.items()}
    {'quality': torch.Size([2]), 'realism': torch.Size([2]), 'clinical_relevance': torch.Size([2])}
    ```
    """

    config_class = OneRewardConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: OneRewardConfig):
        super().__init__(config)
        self.vision = AutoModel.from_config(config.vision_config)
        backbone = config.vision_config
        width = backbone.hidden_sizes[-1] if hasattr(backbone, "hidden_sizes") else backbone.hidden_size
        seen = NUM_DETAILS * config.image_channels
        statistics = seen + 2 * (NUM_REGIONS + len(config.labels or {})) * (seen + width)
        self.heads = RewardHeads(statistics, config)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.FloatTensor,
        task_ids: torch.LongTensor,
        word_ids: torch.LongTensor | None = None,
    ) -> OneRewardOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, num_channels, H, W)`):
                Image, source (both [-1, 1]), mask (1 = repainted) and one-hot labels, from [`prepare_inputs`].
            task_ids (`torch.LongTensor` of shape `(B,)`):
                Position of the task in `config.tasks`.
            word_ids (`torch.LongTensor` of shape `(B, L)`, *optional*):
                Hashed words of the prompt, 0 = padding. Needed when `config.prompt_buckets` is not 0.

        Returns:
            [`OneRewardOutput`]
        """
        config = self.config
        parts = [config.image_channels, config.image_channels, 1, len(config.labels or {})]
        image, source, mask, one_hot = pixel_values.split(parts, dim=1)
        features = self.look(image, source, mask, one_hot)
        tissue = tissue_mask(source)
        areas = regions(mask, one_hot, tissue)
        seen = details(image, source, mask, tissue)
        statistics = torch.cat(
            [
                region_statistics(seen, areas),
                region_statistics(features, areas),
                correlation_ratio(seen, mask, one_hot),
            ],
            dim=1,
        )
        return self.heads(statistics, task_ids, word_ids)

    def look(
        self, image: torch.Tensor, source: torch.Tensor, mask: torch.Tensor, one_hot: torch.Tensor
    ) -> torch.Tensor:
        """The backbone's feature map of shape `(B, features, h, w)`; arguments as channels of `pixel_values`."""
        config = self.config
        if config.vision_mean:
            mean, std = (image.new_tensor(x).view(1, 3, 1, 1) for x in (config.vision_mean, config.vision_std))
            image, source = (((x.expand(-1, 3, -1, -1) + 1) / 2 - mean) / std for x in (image, source))
        seen = torch.cat([image, source, mask, one_hot], dim=1)
        if config.vision_image_size:
            seen = F.interpolate(seen, size=(config.vision_image_size,) * 2, mode="bilinear", antialias=True)
        # convolutions on the CPU take half the time in this memory layout
        features = self.vision(seen.contiguous(memory_format=torch.channels_last)).last_hidden_state
        if features.ndim == 3:  # tokens: leave out class and register tokens, which come first; lay out the grid
            side = int(features.shape[1] ** 0.5)
            features = features[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
        return features

    @classmethod
    def from_backbone(
        cls, pretrained_model_name_or_path: str | os.PathLike, revision: str | None = None, **config
    ) -> "OneRewardModel":
        """
        A reward model with the backbone of a pretrained image model, such as a DINOv2 or DINOv3, a ViT, a ConvNeXt V2,
        or the image side of a CLIP. Its heads are new and have to be trained.

        The backbone sees what it was trained on, a colour image in its own size and units, and further channels (the
        source, the mask, the label map) whose weights start at 0. Train it with `RewardTrainer(peft_config=...)`, or
        as a whole with a learning rate of `1e-4` or less.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Hub id or folder of an image model of transformers with weights in safetensors.
            revision (`str`, *optional*):
                Branch, tag or commit on the Hub.
            **config:
                Fields of [`OneRewardConfig`], apart from `vision_config`. `vision_image_size`, `vision_mean` and
                `vision_std` default to what the model's image processor says, and without one to its own size and the
                statistics of ImageNet.

        Returns:
            [`OneRewardModel`]

        Raises:
            `OSError`: when there is no such model, or only a pickle of it.

        Example:

        ```python
        >>> model = OneRewardModel.from_backbone("facebook/dinov2-small", criteria=["realism"], image_size=256)
        ```
        """
        vision_config = AutoConfig.from_pretrained(pretrained_model_name_or_path, revision=revision)
        vision_config = getattr(vision_config, "vision_config", vision_config)  # of a model of images and texts
        backbone = AutoModel.from_pretrained(
            pretrained_model_name_or_path,
            config=vision_config,
            revision=revision,
            use_safetensors=True,
            dtype=torch.float32,
        )
        try:
            processor, _ = ImageProcessingMixin.get_image_processor_dict(
                pretrained_model_name_or_path, revision=revision
            )
        except OSError:  # it has none
            processor = {}
        size = processor.get("crop_size") or processor.get("size") or getattr(vision_config, "image_size", 224)
        if isinstance(size, dict):
            size = size.get("height") or size["shortest_edge"]
        own = {
            "vision_image_size": size,
            "vision_mean": processor.get("image_mean", [0.485, 0.456, 0.406]),
            "vision_std": processor.get("image_std", [0.229, 0.224, 0.225]),
        }
        model = cls(OneRewardConfig(vision_config=copy.deepcopy(vision_config), **{**own, **config}))
        weights, wanted = backbone.state_dict(), model.vision.state_dict()
        for name, weight in weights.items():
            if weight.shape != wanted[name].shape:  # the first layer: the image's channels come first
                weights[name] = torch.zeros_like(wanted[name])
                weights[name][:, :3] = weight
        model.vision.load_state_dict(weights)
        return model

    def prepare_inputs(
        self,
        images: torch.Tensor,
        masks: torch.Tensor,
        sources: torch.Tensor,
        label_maps: torch.Tensor | None = None,
        prompts: list[str] | None = None,
        tasks: list[str] | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Check the inputs of [`score`] and turn them into those of [`forward`], on the model's device.

        Args: as in [`score`].

        Returns:
            `dict[str, torch.Tensor]`: `pixel_values`, `task_ids` and, when the model reads prompts, `word_ids`.

        Raises:
            `ValueError`: when a shape, a value, a label or a task is not what the model was made for.
        """
        config, batch = self.config, len(images)
        size = (config.image_size, config.image_size)
        wanted = {"images": config.image_channels, "sources": config.image_channels, "masks": 1, "label_maps": 1}
        given = {"images": images, "sources": sources, "masks": masks}
        if label_maps is not None:
            given["label_maps"] = label_maps
        for name, tensor in given.items():
            shape = (batch, wanted[name], *size)
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"`{name}` has shape {tuple(tensor.shape)}; this model wants {shape}: {wanted[name]} channel(s) "
                    f"of {size[0]}x{size[1]} pixels. Resize or convert the images first."
                )
        for name in ("images", "sources"):
            low, high = given[name].aminmax()
            if not (low >= 0 and high <= 1):  # also catches NaN
                raise ValueError(f"`{name}` has values from {low:g} to {high:g}; expected floats in [0, 1], no NaN.")
        if not ((masks == 0) | (masks == 1)).all():
            raise ValueError("`masks` holds values other than 0 and 1; threshold it with `(masks > 0.5).float()`.")
        if not masks.flatten(1).any(dim=1).all():
            empty = (~masks.flatten(1).any(dim=1)).nonzero()[0].item()
            raise ValueError(f"`masks[{empty}]` is empty; there is nothing to judge. 1 marks the repainted pixels.")
        for name, texts in (("tasks", tasks), ("prompts", prompts)):
            if texts is not None and (isinstance(texts, str) or len(texts) != batch):
                raise ValueError(f"`{name}` is {texts!r}; expected a list of {batch} strings, one for each image.")
        for name, needed in (("tasks", len(config.tasks) > 1), ("prompts", config.prompt_buckets)):
            if needed and {"tasks": tasks, "prompts": prompts}[name] is None:
                raise ValueError(f"`{name}` is missing; this model is conditioned on it: a list of {batch} strings.")
        unknown = set(tasks or []) - set(config.tasks)
        if unknown:
            raise ValueError(f"`tasks` holds {sorted(unknown)}; this model knows {config.tasks}.")

        images, sources, masks = (tensor.to(self.device, torch.float32) for tensor in (images, sources, masks))
        channels = [2 * images - 1, 2 * sources - 1, masks]
        if config.labels:
            label_maps = torch.zeros_like(masks) if label_maps is None else label_maps.to(self.device)
            # by value: the order of names in a JSON file is nobody's promise
            values = torch.tensor(sorted(config.labels.values()), device=self.device)
            one_hot = (label_maps == values[:, None, None]) * masks
            if (one_hot.sum(dim=1, keepdim=True) < masks).any():
                found = label_maps[masks > 0].unique().tolist()
                raise ValueError(f"`label_maps` holds the values {found}; this model knows {config.labels}.")
            channels.append(one_hot)
        inputs = {
            "pixel_values": torch.cat(channels, dim=1).to(self.dtype),
            "task_ids": torch.tensor(
                [config.tasks.index(task) for task in tasks or config.tasks[:1] * batch], device=self.device
            ),
        }
        if config.prompt_buckets:
            words = [
                torch.tensor([zlib.crc32(word.encode()) % config.prompt_buckets + 1 for word in _words(prompt)] or [0])
                for prompt in prompts
            ]
            inputs["word_ids"] = nn.utils.rnn.pad_sequence(words, batch_first=True).to(self.device)
        return inputs

    @torch.no_grad()
    def _judge(self, *args) -> OneRewardOutput:
        """The output for arguments of [`prepare_inputs`], in evaluation mode."""
        training = self.training
        self.eval()
        try:
            return self(**self.prepare_inputs(*args))
        finally:
            self.train(training)

    def _by_criterion(self, values: torch.Tensor, tasks: list[str] | None) -> dict[str, torch.Tensor]:
        """Values of shape `(B, H, ...)` as a dict, NaN where a task is not judged by a criterion."""
        by_criterion, tasks = {}, tasks or self.config.tasks[:1] * len(values)
        for head, criterion in enumerate(self.config.criteria):
            judged = [
                criterion in self.config.judged_by(task) for task in tasks or self.config.tasks[:1] * len(values)
            ]
            judged = torch.tensor(judged, device=values.device).view(-1, *[1] * (values.ndim - 2))
            by_criterion[criterion] = torch.where(judged, values[:, head].float(), torch.nan)
        return by_criterion

    @torch.no_grad()
    def score(
        self,
        images: torch.Tensor,
        masks: torch.Tensor,
        sources: torch.Tensor,
        label_maps: torch.Tensor | None = None,
        prompts: list[str] | None = None,
        tasks: list[str] | None = None,
        return_std: bool = False,
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """
        Rewards of a batch of repainted images; the model is in evaluation mode for the call.

        Args:
            images (`torch.Tensor` of shape `(B, C, H, W)`):
                Images to judge, floats in [0, 1].
            masks (`torch.Tensor` of shape `(B, 1, H, W)`):
                1 = repainted, 0 = kept.
            sources (`torch.Tensor` of shape `(B, C, H, W)`):
                What the images were before, floats in [0, 1].
            label_maps (`torch.Tensor` of shape `(B, 1, H, W)`, *optional*):
                Integer values of `config.labels` that were asked for inside the mask; 0 everywhere when not given.
            prompts (`list[str]`, *optional*):
                B prompts; needed when `config.prompt_buckets` is not 0.
            tasks (`list[str]`, *optional*):
                B of `config.tasks`; needed when there are several.
            return_std (`bool`, *optional*, defaults to `False`):
                Whether to return also how unsure the model is of each reward.

        Returns:
            `dict[str, torch.Tensor]`: for each criterion B float32 rewards, higher is better, with mean 0 and
            standard deviation 1 over the training images; NaN where `config.task_criteria` leaves the criterion out.
            With `return_std` a tuple of these and of the rewards' standard deviations under the last layer's
            posterior: what more votes would make smaller. They are 0 before the training.

        Raises:
            `ValueError`: when a shape, a value, a label or a task is not what the model was made for.
        """
        output = self._judge(images, masks, sources, label_maps, prompts, tasks)
        rewards = self._by_criterion(output.rewards, tasks)
        if not return_std:
            return rewards
        stds = self.heads.deviations(output.features).norm(dim=-1) / self.heads.logit_std
        return rewards, self._by_criterion(stds, tasks)

    @torch.no_grad()
    def compare(
        self,
        images_0: torch.Tensor,
        images_1: torch.Tensor,
        masks: torch.Tensor,
        sources: torch.Tensor,
        label_maps: torch.Tensor | None = None,
        prompts: list[str] | None = None,
        tasks: list[str] | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        What a rater would say of pairs of images, as far as the model knows: calibrated, where the trainer had votes
        to calibrate it on.

        Args:
            images_0, images_1 (`torch.Tensor` of shape `(B, C, H, W)`):
                Images of the same conditions, floats in [0, 1].
            masks, sources, label_maps, prompts, tasks:
                The conditions, as in [`score`].

        Returns:
            `dict[str, torch.Tensor]`: for each criterion `(B, 3)` probabilities: the first wins, a tie, the second
            wins. NaN where `config.task_criteria` leaves the criterion out.
        """
        condition = (masks, sources, label_maps, prompts, tasks)
        first, second = self._judge(images_0, *condition), self._judge(images_1, *condition)
        temperature, variance = self.heads.temperature, None
        if self.config.gaussian:
            variance = (first.stds**2 + second.stds**2) / temperature**2
        difference = (first.logits - second.logits) / temperature
        votes = davidson_log_probabilities(difference, self.heads.log_nu, variance).exp()
        return self._by_criterion(votes, tasks)

    @torch.no_grad()
    def sample_logits(
        self,
        images: torch.Tensor,
        masks: torch.Tensor,
        sources: torch.Tensor,
        label_maps: torch.Tensor | None = None,
        prompts: list[str] | None = None,
        tasks: list[str] | None = None,
        num_samples: int = 24,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """
        Logits under draws of the last layers' weights, as if from an ensemble of models, for
        [`~onereward.preferences.vote_information`]. All images of a call are judged by the same draws; so are those of
        several calls, with generators of one seed.

        Args:
            images, masks, sources, label_maps, prompts, tasks:
                As in [`score`].
            num_samples (`int`, *optional*, defaults to 24):
                Members of the ensemble, K.
            generator (`torch.Generator`, *optional*):
                Source of chance, on the CPU.

        Returns:
            `torch.Tensor` of shape `(K, B, len(criteria))`: in the units of the votes.

        Raises:
            `RuntimeError`: when the model was not trained with [`RewardTrainer`], which finds the weights' posterior.
        """
        if not self.heads.posterior_factor.any():
            raise RuntimeError(
                "The model has no posterior to draw from. Train it with `RewardTrainer`, which finds it."
            )
        output = self._judge(images, masks, sources, label_maps, prompts, tasks)
        noise = torch.randn(num_samples, *self.heads.feature_mean.shape, generator=generator).to(output.logits)
        moves = torch.einsum("bhv,khv->kbh", self.heads.deviations(output.features), noise)
        return (output.logits + moves).float()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        As [`~transformers.PreTrainedModel.from_pretrained`], but weights are read from safetensors alone; pickles need
        `use_safetensors=False`.

        Raises:
            `OSError`: when there is no such model, or when its weights are there as pickles only.
        """
        kwargs = {"use_safetensors": True, **kwargs}
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except OSError as error:
            missing = re.search(r"no file named model\.safetensors|cannot be loaded with `safetensors`", str(error))
            if not kwargs["use_safetensors"] or missing is None:
                raise
            raise OSError(  # transformers advises to take the pickle
                f"{str(pretrained_model_name_or_path)!r} does not hold its weights as safetensors, and nothing else "
                "is read: a pickle (.bin, .pt, .ckpt) can run code. Ask its authors for safetensors, or, if you trust "
                "them, load it once with `use_safetensors=False` and write it anew with `save_pretrained`."
            ) from error

    def load_adapter(self, peft_model_id: str | None = None, *args, load_config=None, adapter_kwargs=None, **kwargs):
        """
        As in transformers, but from `adapter_model.safetensors` alone, a pickle is neither downloaded nor read. Called
        by [`from_pretrained`], where a repository has an adapter.

        Raises:
            `OSError`: when the adapter is there as a pickle only.
        """
        if peft_model_id is not None and (load_config is None or load_config.use_safetensors is not False):
            where = {**(load_config.download_kwargs if load_config else {}), **(adapter_kwargs or {})}
            file = cached_file(
                peft_model_id, "adapter_model.safetensors", **where, _raise_exceptions_for_missing_entries=False
            )
            if file is None:
                raise OSError(
                    f"{str(peft_model_id)!r} has an adapter, but no adapter_model.safetensors, and nothing else is "
                    "read: a pickle (.bin, .pt, .ckpt) can run code. Ask its authors for safetensors."
                )
        return super().load_adapter(
            peft_model_id, *args, load_config=load_config, adapter_kwargs=adapter_kwargs, **kwargs
        )

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """
        Save `config.json`, `model.safetensors`, the files of code that make the folder loadable without the
        `onereward` package (with `trust_remote_code=True`), and a model card unless there is one.

        Args: as in [`~transformers.PreTrainedModel.save_pretrained`].
        """
        card = os.path.join(save_directory, "README.md")
        if not os.path.exists(card):
            os.makedirs(save_directory, exist_ok=True)
            with open(card + ".tmp", "w", encoding="utf-8") as file:
                file.write(model_card(self.config))
            os.replace(card + ".tmp", card)
        # where `pipeline("image-reward", model=folder)` finds its code
        implementation = f"{ImageRewardPipeline.__module__.split('.')[-1]}.{ImageRewardPipeline.__name__}"
        self.config.custom_pipelines = {"image-reward": {"impl": implementation, "pt": ["AutoModel"]}}
        super().save_pretrained(save_directory, **kwargs)


def _words(prompt: str) -> list[str]:
    return re.findall(r"\w+", prompt.lower())


def model_card(config: OneRewardConfig) -> str:
    """A README.md that says what the folder holds. The trainer and `onereward publish` write the whole card."""
    return f"""---
library_name: transformers
pipeline_tag: image-classification
license: apache-2.0
tags:
- onereward
- reward-model
- medical-imaging
---

<!-- A stub: `onereward publish` writes the whole card in its place. -->

# OneReward reward model

**Research use only, not for clinical use.**

Judges the repainted part of a medical image by {len(config.criteria)} criteria ({", ".join(config.criteria)}), for
the tasks {", ".join(config.tasks)}. Input: {config.image_size}x{config.image_size} pixels, {config.image_channels}
channel(s). A reward is relative: compare images of one condition only.
"""


OneRewardModel.register_for_auto_class("AutoModel")
