"""Cards of what we publish: Jinja templates of `model_cards/`, filled without a network, the same bytes each time."""

import json
import platform
import subprocess
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from onereward.data.whole_file import whole_file


# In a wheel the templates lie inside the package, in a checkout at the top of the repository.
PACKAGE = Path(__file__).resolve().parents[1]
TEMPLATES = PACKAGE / "model_cards" if (PACKAGE / "model_cards").is_dir() else PACKAGE.parents[1] / "model_cards"

STACK = ("torch", "diffusers", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "onereward")

TAGS = ["onereward", "medical-imaging"]


def adapter_card(name, base_model, *, raters=None, num_votes=None, **fields):
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
        evaluation (`dict[str, dict]`):
            Measure -> its figures, e.g. `{"ssim": {"before": 0.71, "after": 0.74, "ci95": [0.72, 0.76]}}`. Each key
            becomes a column, a pair a range.
        eval_dataset (`str`):
            The data of the evaluation, as in "128 unseen conditions of the phantom".
        command (`str`):
            The exact command that makes the adapter.
        seed (`int`):
            Its seed.
        limits (`list[str]`):
            Known limits, a sentence each.
        example_prompt (`str`):
            Prompt of the code example.
        datasets (`list[str]`, *optional*, defaults to `()`):
            Ids of data sets on the Hub.
        widget (`list[dict]`, *optional*, defaults to `()`):
            Pictures of the gallery, `{"text": prompt, "output": {"url": "images/0.png"}}` each.
        commit (`str`, *optional*):
            Commit of the code, see [`source_commit`].
        environment (`dict[str, str]`, *optional*):
            Package -> version. Defaults to the versions in use.
        license (`str`, *optional*, defaults to `"apache-2.0"`):
            Licence of the weights.

    Returns:
        `huggingface_hub.ModelCard`.
    """
    return _card(
        "adapter",
        name,
        headline="after",
        task=("image-to-image", "Image-to-Image"),
        library_name="diffusers",
        tags=["lora", "template:diffusion-lora", "ddpo", "inpainting", *TAGS],
        base_model=base_model,
        base_model_relation="adapter",
        **_who_voted(raters, num_votes),
        **fields,
    )


def pipeline_card(name, *, labels=None, base_model=None, **fields):
    """
    Card of a pipeline that was trained without preferences. Arguments as in [`adapter_card`], without `raters` and
    `num_votes`, and:

    Args:
        labels (`dict[str, int]`, *optional*):
            Label names and values that the pipeline knows.
        base_model (`str`, *optional*):
            The checkpoint that the training started from; `None` when it started from scratch.

    Returns:
        `huggingface_hub.ModelCard`.
    """
    return _card(
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
    Card of a reward model. Arguments as in [`adapter_card`], without `base_model` and `example_prompt`, and:

    Args:
        raters (`dict[str, int]`):
            Required here: a model of preferences must say whose they are.
        criteria (`list[str]`):
            The heads. `evaluation` has a row for each, e.g. `{"quality": {"pair_accuracy": 0.86, "ceiling": 0.9}}`.

    Returns:
        `huggingface_hub.ModelCard`.
    """
    if not raters:
        raise ValueError(
            f"`raters` is {raters}, but the card of a reward model must say whose preferences it learned: role -> "
            'number of raters, e.g. {"simulated": 5} or {"radiologist": 3}.'
        )
    return _card(
        "reward_model",
        name,
        headline="pair_accuracy",
        task=("image-classification", "Preference"),
        library_name="transformers",
        tags=["reward-model", *TAGS],
        criteria=criteria,
        **_who_voted(raters, num_votes),
        **fields,
    )


def _card(
    template,
    name,
    *,
    headline,
    task,
    library_name,
    tags,
    evaluation,
    eval_dataset,
    base_model=None,
    base_model_relation=None,
    license="apache-2.0",
    datasets=(),
    widget=(),
    commit=None,
    environment=None,
    **fields,
):
    metadata = ModelCardData(
        model_name=name,
        license=license,
        library_name=library_name,
        pipeline_tag=task[0],
        tags=tags,
        base_model=base_model,
        base_model_relation=base_model_relation,
        datasets=list(datasets) or None,
        widget=list(widget) or None,
        eval_results=[
            EvalResult(
                task_type=task[0],
                task_name=task[1],
                dataset_type="phantom" if "phantom" in eval_dataset else "custom",
                dataset_name=eval_dataset,
                metric_type=measure,
                metric_name=measure.replace("_", " "),
                metric_value=figures[headline],
            )
            for measure, figures in evaluation.items()
        ],
    )
    return render_card(
        template,
        metadata=metadata.to_yaml(),
        name=name,
        base_model=base_model,
        widget=list(widget),
        eval_dataset=eval_dataset,
        evaluation_table=table(evaluation),
        commit=commit,
        environment=current_environment() if environment is None else environment,
        **fields,
    )


def _who_voted(raters, num_votes):
    raters = raters or {}
    people = {role: count for role, count in raters.items() if role != "simulated"}
    return {
        "num_votes": num_votes,
        "simulated_raters": raters.get("simulated", 0),
        "human_raters": sum(people.values()),
        "human_roles": sorted(people),
    }


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
        `huggingface_hub.ModelCard`.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quoted"] = partial(json.dumps, ensure_ascii=False)  # a string as Python and JSON write it
    return ModelCard(environment.get_template(f"{template}.md.jinja").render(**fields))


def save_card(card, folder):
    """Writes a card as `README.md` into a folder, made where it is missing; a reader never sees half of it."""
    with whole_file(Path(folder, "README.md")) as partial_path:
        card.save(partial_path)


def table(rows):
    """
    Markdown table with a row for each measure and a column for each kind of figure.

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
    lines = [["measure", *columns], ["---", *["---:"] * len(columns)]]
    lines += [[measure, *(_figure(figures.get(column)) for column in columns)] for measure, figures in rows.items()]
    return "\n".join("| " + " | ".join(line).replace("_", " ") + " |" for line in lines)


def _figure(value):
    if value is None:
        return "–"
    if isinstance(value, (list, tuple)):
        return " to ".join(_figure(part) for part in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def current_environment():
    """Versions of Python and of the packages that decide what a run gives, as `dict[str, str]`."""
    versions = {"python": platform.python_version()}
    for package in STACK:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # onereward itself, when run from a checkout that was not installed
            continue
    return versions


def source_commit():
    """Commit of the checkout that the package is imported from, or `None` outside of a checkout."""
    result = subprocess.run(
        ["git", "-C", str(PACKAGE), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() if result.returncode == 0 else None
