"""A card as it is published: names of folders become those of repositories, and nothing that must be said lacks."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import datasets
from huggingface_hub import (
    DatasetCard,
    ModelCard,
    SpaceCard,
)

from onereward.hub.about import About
from onereward.hub.agreements import AGREEMENTS
from onereward.hub.cards import (
    NOTICE,
    STUB,
    adapter_card,
    lines_outside_code,
    link,
    on_the_hub,
    pipeline_card,
    rendered,
    reward_card_of_config,
    who_voted,
    with_section,
)
from onereward.hub.data_cards import PHANTOM_ORIGIN, dataset_card, run_of, sources_of, space_card, votes_card
from onereward.hub.gallery import PICTURE
from onereward.hub.provenance import is_repo_id, read_provenance
from onereward.preferences.schema import read_votes


# Absolute paths, in the home folder, and of Windows. One part alone may be anything: `/api`, `</b>`.
LOCAL_PATH = re.compile(r"""(?<![\w/.<:])(?:file:/+|~/|[A-Za-z]:\\|(?:/[\w@+-][\w.@+-]*){2})[^\s"'`|)>]*""")

CARDS = {
    "pipeline": ModelCard,
    "adapter": ModelCard,
    "reward-model": ModelCard,
    "dataset": DatasetCard,
    "votes": DatasetCard,
    "space": SpaceCard,
}

# How the code of our cards names the repository that it is about.
OWN_NAMES = {
    "pipeline": r'\.from_pretrained\("([^"]+)"',
    "adapter": r'\.load_lora_weights\("([^"]+)"',
    "reward-model": r'(?:model=|\.from_pretrained\()"([^"]+)"',
    "dataset": r'load_dataset\("([^"]+)"',
    "votes": r'load_dataset\("([^"]+)"',
    "space": r"hf download (\S+)",
}


def published_card(kind, folder, repo_id, *, base_model=None, about=None, version=None):
    """
    The card as it is to be published: that of the folder, or one made from what the folder holds. Names of local
    folders become those of the repositories; the notice, the licence and who made it are put in where they lack.

    Args:
        kind (`str`):
            `"pipeline"`, `"adapter"`, `"reward-model"`, `"dataset"`, `"votes"` or `"space"`.
        folder (`str` or `os.PathLike`):
            What is to be published; of votes and data sets a Parquet file, a folder of them or with `data/*.parquet`,
            or one that `save_to_disk` wrote.
        repo_id (`str`):
            Where it is to be published.
        base_model (`str`, *optional*):
            Repository of the pipeline that an adapter belongs to. What the card says, when not given.
        about ([`About`], *optional*):
            Who made it.
        version (`str`, *optional*):
            Version of the release. That of `about` when not given.

    Returns:
        `str`: what `README.md` is to hold.

    Raises:
        ValueError: when `kind` is unknown, or the folder holds too little to make a card.

    Example:

    ```python
    >>> from onereward.hub.published_card import published_card

    >>> print(published_card("pipeline", "pipelines/onereward-brats", "org/onereward-brats")[:4])
    ---
    ```
    """
    if kind not in CARDS:
        raise ValueError(f"`kind` is {kind!r}; expected one of {tuple(CARDS)}.")
    folder, about = Path(folder), about or About()
    provenance = read_provenance(folder) or {}
    readme = folder / "README.md"
    written = readme.read_text(encoding="utf-8") if readme.is_file() else STUB
    if STUB in written:
        card = _card_of_files(kind, folder, repo_id, base_model, provenance)
    else:
        card = CARDS[kind](written, ignore_metadata_errors=True)
        if kind in ("dataset", "votes", "space"):  # what the card's author left to us
            known = _card_of_files(kind, folder, repo_id, base_model, provenance).data.to_dict()
            for key in known.keys() - card.data.to_dict().keys():
                card.data[key] = known[key]
    text, data = card.text, card.data

    own = re.search(OWN_NAMES[kind], text)
    if own and (not on_the_hub(own[1]) or f"onereward provenance {own[1]}`" in text):  # not of somebody else's
        text = _renamed(text, own[1], repo_id)
    base = data.to_dict().get("base_model") if CARDS[kind] is ModelCard else None
    if isinstance(base, str):
        if base_model:
            text, data["base_model"] = _renamed(text, base, base_model), base_model
        elif not on_the_hub(base):
            data["base_model"] = data["base_model_relation"] = None  # the Hub refuses a card with a path
    if kind == "space" and base_model:  # fetched when the Space is built; its app reads here which it is
        data["models"], data["preload_from_hub"] = [base_model], [base_model]
    for key in ("datasets", "models"):
        if data.to_dict().get(key):
            data[key] = [name for name in data[key] if is_repo_id(name)] or None

    data["license"] = about.license or data.to_dict().get("license") or "apache-2.0"
    if data["license"] == "other" and not data.to_dict().get("license_name"):
        data["license_name"] = "see-the-card"
    details = asdict(about) | {"version": version or about.version, "license": data["license"]}
    for key, value in details.items():
        if value:
            data[key] = list(value) if isinstance(value, tuple) else value
    if NOTICE.rstrip(".") not in text:
        text = _below_title(text, f"**{NOTICE}**")
    if kind == "adapter" and (folder / PICTURE).is_file() and PICTURE not in text:
        picture = f"![The same unseen cases before and after tuning]({PICTURE})"
        notice = f"**{NOTICE}**"
        text = text.replace(notice, f"{notice}\n\n{picture}", 1) if notice in text else _below_title(text, picture)
    text = with_section(text, "About", _about_table(details, repo_id))
    if provenance.get("agreements"):
        text = with_section(text, "Data-use agreements", _agreements_text(provenance))
    if about.authors or about.doi:
        text = with_section(text, "Citation", _citation(card, details, repo_id))
    card.text = text
    return LOCAL_PATH.sub("PATH", str(card))


def _card_of_files(kind, folder, repo_id, base_model, provenance):
    """The card of a folder that has none."""
    name = repo_id.split("/")[-1]
    if kind == "space":
        return space_card(name, folder, repo_id=repo_id)
    if kind == "votes":
        (votes,) = _splits_of(folder).values()
        return votes_card(name, votes, repo_id=repo_id, provenance=provenance)
    if kind == "dataset":
        return dataset_card(name, _splits_of(folder), repo_id=repo_id, provenance=provenance)
    known = {
        "name": name,
        "repo_id": repo_id,
        "training_data": _training_text(provenance, base_model),
        "evaluation": {},
        "eval_dataset": "",
        "limits": [],
        **run_of(provenance),
    }
    if kind == "pipeline":
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        class_name = index["_class_name"]
        class_name = class_name if isinstance(class_name, str) else class_name[-1]
        return pipeline_card(labels=index.get("labels"), pipeline_class=class_name, example_prompt="MRI", **known)
    if kind == "adapter":
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = base_model or config.get("base_model_name_or_path")
        if base is None:
            raise ValueError(
                "The adapter says nowhere which pipeline it belongs to. Name the repository with `base_model` "
                "(`--base-model org/name`)."
            )
        class_name = (config.get("auto_mapping") or {}).get("base_model_class", "UNet2DConditionModel")
        flow = {
            "FluxTransformer2DModel": "OneRewardFluxFillPipeline",
            "SD3Transformer2DModel": "OneRewardSD3InpaintPipeline",
        }
        return adapter_card(
            base_model=base,
            denoiser="transformer" if class_name in flow else "unet",
            pipeline_class=flow.get(class_name, "OneRewardMaskPipeline"),
            example_prompt="MRI",
            **_recorded_raters(provenance),
            **known,
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return reward_card_of_config(
        criteria=config["criteria"],
        image_size=config.get("image_size"),
        example_task=config["tasks"][0],
        example_prompt="MRI",
        **who_voted(**_recorded_raters(provenance)),
        **known,
    )


def _splits_of(path: Path) -> dict[str, datasets.Dataset]:
    """Split -> rows of a Parquet file, a folder of them or with `data/*.parquet`, or what `save_to_disk` wrote."""
    if path.is_file():
        return {"train": read_votes(path)}
    shards = sorted((path / "data").glob("*.parquet")) or sorted(path.glob("*.parquet"))
    if not shards:
        parts = datasets.load_from_disk(path)
        return dict(parts) if isinstance(parts, datasets.DatasetDict) else {"train": parts}
    files = {}
    for shard in shards:
        split = re.match(r"\w+", shard.stem)[0]
        files.setdefault("train" if split == "votes" else split, []).append(shard)
    return {
        split: datasets.concatenate_datasets([read_votes(shard) for shard in parts]) for split, parts in files.items()
    }


def _recorded_raters(provenance) -> dict:
    """The raters and number of the votes that a `provenance.json` names, of the nearest parents that have some."""
    parents = provenance.get("parents", ())
    for parent in parents:
        if parent["role"] == "votes" and parent.get("raters"):
            return {"raters": parent["raters"], "num_votes": parent["num_rows"]}
    for parent in parents:
        found = _recorded_raters(parent)
        if found["raters"]:
            return found
    return {"raters": None, "num_votes": None}


def _training_text(provenance, base_model) -> str:
    lines = []
    for parent in provenance.get("parents", ()):
        if base_model and parent["role"] == "base_model":
            parent = parent | {"name": base_model}
        size = f", {parent['num_rows']} rows" if parent.get("num_rows") is not None else ""
        revision = f" at revision `{parent['revision'][:12]}`" if parent.get("revision") else ""
        lines.append(f"- {parent['role'].replace('_', ' ')}: {link(parent['name'])}{revision}{size}")
    if "phantom" in sources_of(provenance):
        lines += ["", PHANTOM_ORIGIN]
    return "\n".join(lines) or "What it was trained on is not recorded."


def _renamed(text: str, old: str, new: str) -> str:
    """A repository or folder under another name, where code quotes it or the text links to it."""
    text = text.replace(f'"{old}"', f'"{new}"').replace(f"[{old}](https://huggingface.co/{old})", f"`{old}`")
    text = text.replace(f"`{old}`", link(new))
    return re.sub(
        rf"(onereward provenance |hf download |--dataset_name |--data ){re.escape(old)}(?![\w/.-])",
        rf"\g<1>{new}",
        text,
    )


def _below_title(text: str, paragraph: str) -> str:
    lines = text.splitlines()
    title = next((number for number, line in lines_outside_code(text) if line.startswith("# ")), -1)
    return (
        "\n".join(
            [
                *lines[: title + 1],
                "",
                paragraph,
                *([] if lines[title + 1 : title + 2] == [""] else [""]),
                *lines[title + 1 :],
            ]
        )
        + "\n"
    )


def _about_table(details: dict, repo_id: str) -> str:
    shown = {
        "Authors": ", ".join(details["authors"]),
        "Affiliations": "; ".join(details["affiliations"]),
        "Published": details["published"],
        "Version": details["version"],
        "Licence": details["license"],
        "Funding": "; ".join(details["funding"]),
        "DOI": details["doi"] and f"[{details['doi']}](https://doi.org/{details['doi']})",
        "Repository": details["repository"],
    }
    rows = [f"| {key} | {str(value).replace('|', '/')} |" for key, value in shown.items() if value]
    return "\n".join(["| | |", "| --- | --- |", *rows, f"| Use | {NOTICE} |"])


def _agreements_text(provenance: dict) -> str:
    lines = []
    for name in provenance["agreements"]:
        entry = AGREEMENTS.get(name)
        lines.append(f"- {entry['what']} ({entry['owner']}): [terms]({entry['url']})" if entry else f"- {name}")
    if provenance.get("permission"):
        lines += ["", f"Permission to publish: {provenance['permission']}"]
    return "It derives from data that came with an agreement, which binds whoever uses it:\n\n" + "\n".join(lines)


def _citation(card, details: dict, repo_id: str) -> str:
    place = {DatasetCard: "datasets/", SpaceCard: "spaces/"}.get(type(card), "")
    year = (details["published"] or "")[:4]
    entries = {
        "title": repo_id.split("/")[-1],
        "author": " and ".join(details["authors"]),
        "year": year,
        "version": details["version"],
        "doi": details["doi"],
        "url": f"https://huggingface.co/{place}{repo_id}",
        "note": NOTICE,
    }
    lines = [f"  {key} = {{{value}}}," for key, value in entries.items() if value]
    key = re.sub(r"\W+", "-", repo_id)
    own = "\n".join(["```bibtex", f"@misc{{{key},", *lines, "}", "```"])
    return own + "\n\nand the software it was made with:\n\n" + rendered("citation")
