# Copyright 2026 The OneReward authors. Licensed under the Apache License, Version 2.0.
# Research use only, not for clinical use.
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig


class OneRewardConfig(PreTrainedConfig):
    r"""
    Configuration of a [`OneRewardModel`].

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the backbone: any image model of transformers whose output has a feature map or a square
            grid of patch tokens. Defaults to a small BiT (group normalisation, so that training and evaluation see
            the same network). Its `num_channels` is always set to [`~OneRewardConfig.vision_channels`].
        vision_image_size (`int`, *optional*):
            Height and width in pixels that the backbone's input is resized to, for backbones of one size. As it comes
            when `None`.
        vision_mean, vision_std (`list[float]`, *optional*):
            Mean and standard deviation, for values in [0, 1], of the three channels that a pretrained backbone wants.
            When given, image and source reach the backbone in colour and in these units. See
            [`~OneRewardModel.from_backbone`].
        criteria (`list[str]`, *optional*, defaults to `("quality", "realism", "clinical_relevance")`):
            One reward head each.
        task_criteria (`dict[str, list[str]]`, *optional*):
            The criteria of some tasks, such as `{"remove": ["removal_quality"]}`; a task that is not named has all. A
            reward on another criterion is NaN, and votes on it are refused.
        tasks (`list[str]`, *optional*, defaults to `("fill", "remove", "extend")`):
            Tasks the model is conditioned on.
        labels (`dict[str, int]`, *optional*):
            Names and values of the label map, background included. Each becomes an input channel; none when `None`.
        image_channels (`int`, *optional*, defaults to 1):
            Channels of the judged image and of the source: 1 (grey) or 3 (colour).
        image_size (`int`, *optional*, defaults to 64):
            Height and width in pixels of the images the model was trained on; others are refused, because sharpness
            and texture mean something else at another scale.
        prompt_buckets (`int`, *optional*, defaults to 0):
            Size of the hashed vocabulary of the prompt's words; 0 leaves the prompt out.
        hidden_size (`int`, *optional*, defaults to 128):
            Width of the heads.
        dropout (`float`, *optional*, defaults to 0.1):
            Share of the statistics, and of the heads' hidden values, that is dropped in training.
        gaussian (`bool`, *optional*, defaults to `False`):
            Whether a reward is a distribution with a mean and a standard deviation, as in
            [HPSv3](https://huggingface.co/papers/2508.03789), which learns of which images raters disagree.

    Raises:
        `ValueError`: when `task_criteria` names a task or criterion that there is not.

    Example:

    ```python
    >>> from onereward import OneRewardConfig, OneRewardModel

    >>> config = OneRewardConfig(labels={"background": 0, "NCR": 1, "ED": 2, "ET": 3})
    >>> config.num_channels
    7
    >>> model = OneRewardModel(config)
    ```
    """

    model_type = "onereward"
    sub_configs = {"vision_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    vision_image_size: int | None = None
    vision_mean: list[float] | None = None
    vision_std: list[float] | None = None
    criteria: list[str] | tuple[str, ...] = ("quality", "realism", "clinical_relevance")
    tasks: list[str] | tuple[str, ...] = ("fill", "remove", "extend")
    task_criteria: dict[str, list[str]] | None = None
    labels: dict[str, int] | None = None
    image_channels: int = 1
    image_size: int = 64
    prompt_buckets: int = 0
    hidden_size: int = 128
    dropout: float = 0.1
    gaussian: bool = False

    def __post_init__(self, **kwargs):
        if self.vision_config is None:
            self.vision_config = {
                "model_type": "bit",
                "embedding_size": 16,
                "hidden_sizes": [16],
                "depths": [1],
                "num_groups": 8,
            }
        if isinstance(self.vision_config, dict):
            vision_config = dict(self.vision_config)
            self.vision_config = CONFIG_MAPPING[vision_config.pop("model_type")](**vision_config)
        self.vision_config.num_channels = self.vision_channels
        self.criteria, self.tasks = list(self.criteria), list(self.tasks)
        for task, criteria in (self.task_criteria or {}).items():
            if task not in self.tasks or not criteria or set(criteria) - set(self.criteria):
                raise ValueError(
                    f"`task_criteria` has {criteria} for {task!r}; expected some of the criteria {self.criteria} for "
                    f"one of the tasks {self.tasks}."
                )
        super().__post_init__(**kwargs)

    @property
    def num_channels(self) -> int:
        """Channels of the input: image, source, mask, one-hot labels."""
        return 2 * self.image_channels + 1 + len(self.labels or {})

    @property
    def vision_channels(self) -> int:
        """Channels that the backbone sees: the same, image and source in colour for a pretrained one."""
        return self.num_channels + 2 * ((3 if self.vision_mean else self.image_channels) - self.image_channels)

    def judged_by(self, task: str) -> list[str]:
        """The criteria that a task is judged by."""
        return (self.task_criteria or {}).get(task, self.criteria)


OneRewardConfig.register_for_auto_class()
