"""Cards of what we publish: Jinja templates of `model_cards/`, filled without a network, the same bytes each time."""

import json
import os
import re
import shlex
from functools import partial
from pathlib import Path

import numpy as np
from huggingface_hub import (
    DatasetCard,
    EvalResult,
    ModelCard,
    ModelCardData,
    SpaceCard,
)
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from onereward.data.whole_file import whole_file
from onereward.hub.environment import PACKAGE, current_environment
from onereward.hub.gallery import PICTURE
from onereward.hub.provenance import plain_command
from onereward.preferences.agreement import Estimate


TEMPLATES = PACKAGE / "model_cards" if (PACKAGE / "model_cards").is_dir() else PACKAGE.parents[1] / "model_cards"

TAGS = ["onereward", "medical-imaging"]

NOTICE = "Research use only, not for clinical use."

# In a card that `OneRewardModel.save_pretrained` wrote, which knows too little: `published_card` makes a whole one.
STUB = "<!-- A stub: `onereward publish` writes the whole card in its place. -->"


def adapter_card(name, base_model, *, raters=None, num_votes=None, denoiser="unet", **fields):
    """
    Card of a LoRA adapter tuned on preferences.

    Args:
        name (`str`):
            Title of the card.
        base_model (`str`):
            Repository or folder of the pipeline that the adapter belongs to.
        repo_id (`str`):
            Where the adapter is to be loaded from: repository or folder.
        training_data (`str`):
            What the adapter was trained on, and the data's licence. Markdown.
        raters (`dict[str, int]`, *optional*):
            Role of the raters -> their number, e.g. `{"simulated": 5}` or `{"radiologist": 3}`. Without them the card
            says that it records no votes.
        num_votes (`int`, *optional*):
            Number of votes, when there are raters.
        agreement (`dict[str, Estimate]`, *optional*):
            How far the raters agree by each criterion, see [`vote_agreement`].
        evaluation (`dict[str, dict]`):
            Measure -> its figures, e.g. `{"ssim": {"before": 0.71, "after": 0.74, "95 % interval": [0.72, 0.76],
            "n": 96}}`, or a [`~onereward.evaluation.bootstrap.Measured`]. Each key becomes a column, a pair a range.
            `reward` and `rewards/...` are what it was tuned for: they are kept apart, and out of the `model-index`.
        eval_dataset (`str`):
            The data of the evaluation, as in "128 unseen conditions of the phantom".
        evaluation_note (`str`, *optional*):
            What a reader must know to read the figures.
        command (`str`):
            The command that makes the adapter. Names of local files are left out of the card.
        seed (`int`):
            Its seed.
        limits (`list[str]`):
            Known limits, a sentence each.
        example_prompt (`str`):
            Prompt of the code example.
        datasets (`list[str]`, *optional*, defaults to `()`):
            Ids of data sets on the Hub.
        widget (`list[dict]`, *optional*, defaults to `()`):
            Pictures of the gallery, as [`write_gallery`] returns them. The grid that it wrote goes on top.
        denoiser (`str`, *optional*, defaults to `"unet"`):
            Name of the denoiser in the pipeline, `"unet"` or `"transformer"`.
        pipeline_class (`str`, *optional*, defaults to `"OneRewardMaskPipeline"`):
            Class of the pipeline.
        commit (`str`, *optional*):
            Commit of the code, see [`source_commit`].
        environment (`dict[str, str]`, *optional*):
            Package -> version. Defaults to the versions in use.
        license (`str`, *optional*, defaults to `"apache-2.0"`):
            Licence of the weights.

    Returns:
        `huggingface_hub.ModelCard`.

    Raises:
        ValueError: when a figure of `evaluation` has no number of images `n`, and `eval_dataset` names none.
    """
    return _model_card(
        "adapter",
        name,
        headline="after",
        task=("image-to-image", "Image-to-Image"),
        library_name="diffusers",
        tags=["lora", "template:diffusion-lora", "ddpo", "inpainting", *TAGS],
        base_model=base_model,
        base_model_relation="adapter",
        base_link=link(base_model),
        denoiser=denoiser,
        **who_voted(raters, num_votes),
        **fields,
    )


def pipeline_card(name, *, labels=None, base_model=None, **fields):
    """
    Card of a pipeline. Arguments as in [`adapter_card`], without `raters`, `num_votes` and `denoiser`, and:

    Args:
        labels (`dict[str, int]`, *optional*):
            Label names and values that the pipeline knows.
        base_model (`str`, *optional*):
            The checkpoint that the training started from; `None` when it started from scratch.
        picture (`str`, *optional*):
            File of an example grid in the repository, for the top.

    Returns:
        `huggingface_hub.ModelCard`.
    """
    return _model_card(
        "pipeline",
        name,
        headline="value",
        task=("image-to-image", "Image-to-Image"),
        library_name="diffusers",
        tags=["inpainting", *TAGS],
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        labels=labels,
        **fields,
    )


def reward_model_card(name, criteria, *, raters, num_votes, **fields):
    """
    Card of a reward model. Arguments as in [`adapter_card`], without `base_model` and `denoiser`, and:

    Args:
        raters (`dict[str, int]`):
            Required here: a model of preferences must say whose they are.
        criteria (`list[str]`):
            The heads. `evaluation` has a row for each, e.g. `{"quality": {"pair_accuracy": 0.86, "ceiling": 0.9}}`.
        image_size (`int`, *optional*):
            Height and width of the pictures that it judges, in pixels.
        example_task (`str`, *optional*, defaults to `"fill"`):
            Task of the code example.

    Returns:
        `huggingface_hub.ModelCard`.
    """
    if not raters:
        raise ValueError(
            f"`raters` is {raters}, but the card of a reward model must say whose preferences it learned: role -> "
            'number of raters, e.g. {"simulated": 5} or {"radiologist": 3}.'
        )
    return reward_card_of_config(name, criteria, **who_voted(raters, num_votes), **fields)


def reward_card_of_config(name, criteria, *, image_size=None, example_task="fill", **fields):
    """[`reward_model_card`] with what is known of the raters among `fields`, also where that is nothing."""
    return _model_card(
        "reward_model",
        name,
        headline="pair_accuracy",
        task=("image-classification", "Preference"),
        library_name="transformers",
        tags=["reward-model", *TAGS],
        criteria=criteria,
        example_task=example_task,
        size_note=f", {image_size} x {image_size} pixels" if image_size else "",
        **fields,
    )


def _model_card(
    template,
    name,
    *,
    headline,
    task,
    library_name,
    tags,
    evaluation,
    eval_dataset,
    command,
    base_model=None,
    base_model_relation=None,
    license="apache-2.0",
    datasets=(),
    widget=(),
    picture=None,
    agreement=None,
    pipeline_class="OneRewardMaskPipeline",
    example_prompt="",
    commit=None,
    environment=None,
    **fields,
):
    evaluation = {measure: columns_of(figures) for measure, figures in evaluation.items()}
    signal = {measure: figures for measure, figures in evaluation.items() if re.match(r"reward$|rewards/", measure)}
    results = {measure: figures for measure, figures in evaluation.items() if measure not in signal}
    for measure, figures in results.items():
        if "n" not in figures and not re.search(r"\d", eval_dataset):
            raise ValueError(
                f"`evaluation` has figures of {measure!r} without `n`, and `eval_dataset` is {eval_dataset!r}: say on "
                "how many images, or pairs, they rest."
            )
    eval_results = [
        EvalResult(
            task_type=task[0],
            task_name=task[1],
            dataset_type="phantom" if "phantom" in eval_dataset else "custom",
            dataset_name=eval_dataset,
            metric_type=_metric(measure, headline),
            metric_name=measure.replace("_", " "),
            metric_value=figures[headline],
            metric_args={column: figure for column, figure in figures.items() if column != headline} or None,
        )
        for measure, figures in results.items()
        if figures.get(headline) is not None
    ]
    metadata = ModelCardData(
        model_name=name if eval_results else None,
        license=license,
        library_name=library_name,
        pipeline_tag=task[0],
        tags=tags,
        base_model=base_model,
        base_model_relation=base_model_relation,
        datasets=list(datasets) or None,
        metrics=sorted({_metric(measure, headline) for measure in results}) or None,
        rewards=sorted({measure.split("/")[1] for measure in signal if "/" in measure}) or None,
        widget=list(widget) or None,
        eval_results=eval_results or None,
    )
    return render_card(
        template,
        metadata=metadata.to_yaml(),
        name=name,
        base_model=base_model,
        widget=list(widget),
        picture=picture or (PICTURE if widget else None),
        eval_dataset=eval_dataset,
        evaluation_table=table(results) if results else "",
        signal_table=table(signal) if signal else "",
        agreement_table=agreement_table(agreement) if agreement else "",
        pipeline_class=pipeline_class,
        example_prompt=example_prompt,
        command=shown_command(command or ""),
        commit=commit,
        environment=current_environment() if environment is None else environment,
        **fields,
    )


def columns_of(figures) -> dict:
    """Figures of one measure by column, those that are not finite as `None`."""
    if not isinstance(figures, dict):  # Measured
        figures = {"value": figures.value, "95 % interval": (figures.low, figures.high), "n": figures.n}

    def finite(value):
        if isinstance(value, (list, tuple)):
            return None if any(finite(end) is None for end in value) else [finite(end) for end in value]
        if isinstance(value, np.generic):
            value = value.item()
        return None if isinstance(value, float) and not np.isfinite(value) else value

    return {column: finite(figure) for column, figure in figures.items()}


def _metric(measure: str, headline: str) -> str:
    """Type of a metric in the `model-index`. The rows of a reward model are criteria, measured in one way."""
    return headline if headline == "pair_accuracy" else re.sub(r"\W+", "_", measure).strip("_")


def link(repo_id: str) -> str:
    """A repository as a Markdown link; a name that cannot be that of one as code."""
    return f"[{repo_id}](https://huggingface.co/{repo_id})" if on_the_hub(repo_id) else f"`{repo_id}`"


def on_the_hub(name) -> bool:
    """Whether a name can be that of a repository: `org/name`, and no folder here."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name))) and not os.path.exists(str(name))


def who_voted(raters, num_votes):
    """Roles and numbers of raters as the fields of a card, people and programs apart."""
    raters = raters or {}
    people = {role: count for role, count in raters.items() if role != "simulated"}
    return {
        "num_votes": num_votes,
        "simulated_raters": raters.get("simulated", 0),
        "human_raters": sum(people.values()),
        "human_roles": sorted(people),
    }


def agreement_table(agreement: dict[str, Estimate]) -> str:
    """The result of [`vote_agreement`] as a Markdown table."""
    rows = {
        criterion: {"alpha": found.value, "95 % interval": (found.low, found.high), "items": found.items}
        | ({"note": found.note} if any(other.note for other in agreement.values()) else {})
        for criterion, found in agreement.items()
    }
    return table({criterion: columns_of(columns) for criterion, columns in rows.items()}, "criterion")


def lines_outside_code(text: str):
    """`(number, line)` of the lines that are in no block of code."""
    inside = False
    for number, line in enumerate(text.splitlines()):
        if line.startswith("```"):
            inside = not inside
        elif not inside:
            yield number, line


def with_section(text: str, title: str, content: str) -> str:
    """
    Put a section into the text of a card.

    Args:
        text (`str`):
            The text, Markdown.
        title (`str`):
            Title of the section.
        content (`str`):
            What it is to hold.

    Returns:
        `str`: the text with the section in place of the one of that title or, where there is none, before the section
        "Citation" or at the end.

    Example:

    ```python
    >>> from onereward.hub.cards import with_section

    >>> print(with_section("# A card", "Thanks", "To all."))
    # A card
    <BLANKLINE>
    ## Thanks
    <BLANKLINE>
    To all.
    <BLANKLINE>
    ```
    """
    lines = text.splitlines()
    heads = [(number, line[3:].strip()) for number, line in lines_outside_code(text) if line.startswith("## ")]
    numbers = [number for number, _ in heads] + [len(lines)]
    at = next((i for i, (_, head) in enumerate(heads) if head == title), None)
    if at is None:
        first = last = next((number for number, head in heads if head == "Citation"), len(lines))
    else:
        first, last = numbers[at], numbers[at + 1]
    before, after = "\n".join(lines[:first]).rstrip("\n"), "\n".join(lines[last:]).strip("\n")
    return "\n\n".join(part for part in (before, f"## {title}\n\n{content.strip()}", after) if part) + "\n"


def render_card(template, **fields):
    """
    Fill `model_cards/{template}.md.jinja`. A field that the template needs and that is missing is a
    `jinja2.UndefinedError`.

    Args:
        template (`str`):
            Name of the template.
        **fields:
            What the template asks for; `metadata` is the YAML of its front matter.

    Returns:
        `huggingface_hub.ModelCard`, `DatasetCard` or `SpaceCard`.
    """
    kind = {"dataset": DatasetCard, "votes": DatasetCard, "space": SpaceCard}.get(template, ModelCard)
    return kind(rendered(template, **fields))


def rendered(template, **fields) -> str:
    """The text of [`render_card`]."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quoted"] = partial(json.dumps, ensure_ascii=False)  # a string as Python and JSON write it
    text = environment.get_template(f"{template}.md.jinja").render(**fields)
    return re.sub(r"\n{3,}", "\n\n", text)


def save_card(card, folder):
    """Writes a card as `README.md` into a folder, made where it is missing; a reader never sees half of it."""
    with whole_file(Path(folder, "README.md")) as partial_path:
        card.save(partial_path)


def table(rows, title="measure"):
    """
    Markdown table with a row for each measure and a column for each kind of figure.

    Args:
        rows (`dict[str, dict]`):
            Row -> column -> figure, text or pair of figures.
        title (`str`, *optional*, defaults to `"measure"`):
            Head of the first column.

    Example:

    ```python
    >>> from onereward.hub.cards import table

    >>> print(table({"ssim": {"before": 0.71234, "after": 0.74321, "ci95": [0.72, 0.76]}}))
    | measure | before | after | ci95 |
    | --- | ---: | ---: | ---: |
    | ssim | 0.7123 | 0.7432 | 0.72 to 0.76 |
    ```
    """
    columns = list(dict.fromkeys(column for figures in rows.values() for column in figures))
    lines = [[title, *columns], ["---", *["---:"] * len(columns)]]
    lines += [[measure, *(_figure(figures.get(column)) for column in columns)] for measure, figures in rows.items()]
    return "\n".join("| " + " | ".join(line).replace("_", " ") + " |" for line in lines)


def _figure(value):
    if value is None:
        return "–"
    if isinstance(value, (list, tuple)):
        return " to ".join(_figure(part) for part in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def shown_command(command: str) -> str:
    """A command without what is on this disk alone: names of local files and folders, but for code and settings."""

    def shown(place, word):
        option, _, value = word.rpartition("=")
        local = os.path.exists(value) and Path(value).suffix not in (".py", ".yaml", ".yml")
        if not local or (place < 2 and "/" not in word):  # `onereward data`, where there is a folder of that name
            return word
        return f"{option}=PATH" if option else "PATH"

    return plain_command([shown(place, word) for place, word in enumerate(shlex.split(command))])
