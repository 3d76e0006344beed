"""Cards of votes, data sets and Spaces, computed from what is in them."""

import platform
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
from huggingface_hub import (
    DatasetCardData,
    SpaceCardData,
)

from onereward.hub.cards import TAGS, agreement_table, render_card, shown_command, table, who_voted
from onereward.preferences.agreement import Estimate, krippendorff_alpha, rating_table, with_interval


PHANTOM_ORIGIN = (
    "The built-in phantom of `onereward`: the MNI152 template, warped, with grown tumours; no patient's image is in\n"
    "it. Its anatomy is copyright 1993-2004 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological\n"
    "Institute, McGill University, and may be used, copied, modified and distributed for any purpose with this notice."
)


def vote_agreement(votes: datasets.Dataset, *, resamples: int = 500, seed: int = 0) -> dict[str, Estimate]:
    """
    How far raters agree, see [`~onereward.preferences.agreement.krippendorff_alpha`].

    Args:
        votes (`datasets.Dataset`):
            Rows of `VOTE_FEATURES`.
        resamples (`int`, *optional*, defaults to 500):
            Draws of each interval; cases are drawn.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws.

    Returns:
        `dict[str, Estimate]`: criterion -> Krippendorff's alpha, ordinal, of the answers on pairs, with its 95 %
        interval; of ratings as `"{criterion} (ratings)"`.

    Example:

    ```python
    >>> from onereward.hub.data_cards import vote_agreement
    >>> from onereward.preferences import load_votes

    >>> vote_agreement(load_votes("votes.parquet"))["realism"].value
    ```
    """
    names = ("pair_id", "rater", "criterion", "kind", "label_0", "rating", "created_at", "case_id")
    columns = {name: np.array(votes[name], dtype=object) for name in names}
    agreement = {}
    for kind, answer in (("pair", "label_0"), ("rating", "rating")):
        for criterion in dict.fromkeys(columns["criterion"][columns["kind"] == kind]):
            rows = (columns["kind"] == kind) & (columns["criterion"] == criterion)
            items, values = columns["pair_id"][rows].astype(str), columns[answer][rows].astype(float)
            order = columns["created_at"][rows].astype(str)
            ratings, items_in_order, _ = rating_table(items, columns["rater"][rows].astype(str), values, order)
            case_of = dict(zip(items, columns["case_id"][rows], strict=True))
            agreement[criterion if kind == "pair" else f"{criterion} (ratings)"] = with_interval(
                lambda answers: krippendorff_alpha(answers, "ordinal"),
                ratings,
                clusters=np.array([case_of[item] for item in items_in_order], dtype=str),
                resamples=resamples,
                seed=seed,
                progress=f"Agreement on {criterion}" if len(ratings) > 2000 else None,  # some seconds
            )
    return agreement


def votes_card(name, votes, *, repo_id, license=None, provenance=None):
    """
    Card of a data set of votes, computed from the votes themselves.

    Args:
        name (`str`):
            Title of the card.
        votes (`datasets.Dataset`):
            Rows of `VOTE_FEATURES`.
        repo_id (`str`):
            Where it is to be loaded from.
        license (`str`, *optional*):
            Its licence. Defaults to `"apache-2.0"` for votes on the phantom, else to `"other"`.
        provenance (`dict`, *optional*):
            What its `provenance.json` holds.

    Returns:
        `huggingface_hub.DatasetCard`.
    """
    provenance = provenance or {}
    people = {(role, rater) for role, rater in zip(votes["rater_role"], votes["rater"], strict=True)}
    kinds = Counter(votes["kind"])
    criteria = Counter(votes["criterion"])
    on_phantom = all(case.startswith("phantom-") for case in votes["case_id"])
    origin = _origin(["phantom"] if on_phantom else sources_of(provenance))
    counts = {
        criterion: {
            "votes": number,
            "pairs": len({p for p, c in zip(votes["pair_id"], votes["criterion"], strict=True) if c == criterion}),
            "raters": len({r for r, c in zip(votes["rater"], votes["criterion"], strict=True) if c == criterion}),
        }
        for criterion, number in criteria.items()
    }
    return render_card(
        "votes",
        metadata=_data_metadata(
            name,
            len(votes),
            license or origin["license"],
            ["preference", "human-feedback" if any(role != "simulated" for role, _ in people) else "simulated-raters"],
            ["train"],
            "votes-*",
        ),
        name=name,
        repo_id=repo_id,
        num_pairs=len(set(votes["pair_id"])),
        num_ratings=kinds["rating"],
        num_cases=len(set(votes["case_id"])),
        criteria=list(criteria),
        votes_table=table(counts, "criterion"),
        training_data=origin["text"],
        agreement_table=agreement_table(vote_agreement(votes)),
        limits=["The votes say what these raters liked in these images, and nothing of other ones."],
        synthetic=(
            "The images that were compared (`image_0`, `image_1`) were painted by a model inside the mask: they are "
            "synthetic, and may look right and be wrong."
        ),
        **who_voted(Counter(role for role, _ in people), len(votes)),
        **run_of(provenance),
    )


def dataset_card(name, splits, *, repo_id, license=None, provenance=None):
    """
    Card of a data set of conditions, computed from the rows themselves.

    Args:
        name (`str`):
            Title of the card.
        splits (`dict[str, datasets.Dataset]`):
            Split -> rows of the schema.
        repo_id (`str`):
            Where it is to be loaded from.
        license (`str`, *optional*):
            Its licence. Defaults to `"apache-2.0"` for the phantom, else to `"other"`.
        provenance (`dict`, *optional*):
            What its `provenance.json` holds.

    Returns:
        `huggingface_hub.DatasetCard`.
    """
    provenance = provenance or {}

    def all_of(column):
        return [value for rows in splits.values() for value in rows[column]]

    cases, origin = set(all_of("case_id")), _origin(sorted({*all_of("source"), *sources_of(provenance)}))
    picture = next(iter(splits.values()))[0]["image"]
    targets = [
        row["target"] is not None
        for rows in splits.values()
        for row in rows.select_columns("target").cast_column("target", datasets.Image(decode=False))
    ]
    tasks = Counter(all_of("task"))
    counts = {
        split: {"rows": len(rows), "cases": len(set(rows["case_id"]))}
        | {task: rows["task"][:].count(task) for task in tasks}
        for split, rows in splits.items()
    }
    return render_card(
        "dataset",
        metadata=_data_metadata(
            name, len(targets), license or origin["license"], ["inpainting"], list(splits), "{split}-*"
        ),
        name=name,
        repo_id=repo_id,
        num_rows=len(targets),
        num_cases=len(cases),
        num_targets="all" if all(targets) else f"{sum(targets)} of {len(targets)}",
        modalities=sorted(set(all_of("modality"))),
        picture_size=f"{picture.width} x {picture.height} pixels, {'grey' if picture.mode == 'L' else 'colour'}",
        splits_table=table(counts, "split"),
        example_split=next(iter(splits)),
        training_data=origin["text"],
        limits=[],
        synthetic=origin["synthetic"],
        **run_of(provenance),
    )


def space_card(name, folder, *, repo_id, license=None):
    """
    Card of a Gradio Space, from the files in its folder.

    Args:
        name (`str`):
            Title of the Space.
        folder (`str` or `os.PathLike`):
            Folder with `app.py` and `requirements.txt`.
        repo_id (`str`):
            Where it is published.
        license (`str`, *optional*):
            Its licence. Defaults to `"apache-2.0"`.

    Returns:
        `huggingface_hub.SpaceCard`.
    """
    code = "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob("*.py")))
    needs = Path(folder, "requirements.txt")
    pinned = re.search(r"^gradio\S*?==([\d.]+)", needs.read_text(encoding="utf-8"), re.M) if needs.is_file() else None
    metadata = SpaceCardData(
        title=name,
        emoji="🩻",
        colorFrom="blue",
        colorTo="gray",
        sdk="gradio",
        sdk_version=pinned[1] if pinned else version("gradio"),
        python_version=".".join(platform.python_version_tuple()[:2]),
        app_file="app.py",
        license=license or "apache-2.0",
        hf_oauth=True if re.search(r"LoginButton|OAuthProfile", code) else None,
        short_description="Mask-guided medical image generation, for research",
        tags=[*TAGS, "inpainting"],
    )
    return render_card(
        "space",
        metadata=metadata.to_yaml(),
        name=name,
        repo_id=repo_id,
        app_file="app.py",
        about_text="Paint the masked part of a medical image with a diffusion model, and say which result is better.",
        limits=[],
    )


def _data_metadata(name, number, license, tags, splits, files):
    sizes = {"n<1K": 1e3, "1K<n<10K": 1e4, "10K<n<100K": 1e5, "100K<n<1M": 1e6, "1M<n<10M": 1e7}
    size = next((size for size, end in sizes.items() if number < end), "10M<n<100M")
    data_files = [{"split": split, "path": f"data/{files.format(split=split)}.parquet"} for split in splits]
    metadata = DatasetCardData(
        pretty_name=name,
        license=license,
        task_categories=["image-to-image"],
        size_categories=[size],
        tags=[*tags, *TAGS],
        configs=[{"config_name": "default", "data_files": data_files}],
    )
    return metadata.to_yaml()


def _origin(sources):
    """What is said of where data come from: its text, the licence if nobody gives one, and what is synthetic."""
    if set(sources) == {"phantom"}:
        return {
            "license": "apache-2.0",
            "text": PHANTOM_ORIGIN,
            "synthetic": "All pictures are synthetic: they show a phantom, and no patient.",
        }
    listed = ", ".join(f"`{source}`" for source in sources) or "not recorded"
    return {
        "license": "other",
        "text": f"Sources: {listed}. The licence of the pictures is that of their source: look it up before you pass "
        "them on.",
        "synthetic": "Rows are as their sources have them; what is painted with them is synthetic, and may look right "
        "and be wrong.",
    }


def sources_of(provenance) -> list[str]:
    """The sources that a `provenance.json` names, of all parents that it knows."""
    parents = provenance.get("parents", ())
    own = {source for parent in parents for source in parent.get("sources", ())}
    own |= {"phantom" for parent in parents if parent["name"] == "phantom"}
    return sorted(own.union(*(sources_of(parent) for parent in parents)))


def run_of(provenance) -> dict:
    """What a `provenance.json` says of the run, for a template."""
    return {
        "command": shown_command(provenance.get("command") or ""),
        "seed": provenance.get("seed"),
        "commit": provenance.get("commit"),
        "environment": provenance.get("packages") or {},
    }
