"""Who made an artefact: what people write down once, in a YAML file, for its card."""

import datetime
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path

import yaml


# What the Hub knows, https://huggingface.co/docs/hub/repositories-licenses; it refuses a card with another one.
LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openrail++
osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license gemma unknown other
""".split()


@dataclass(frozen=True)
class About:
    """
    Who made what is published, for its card. [`read_about`] reads it from a file.

    Args:
        authors (`tuple[str, ...]`, *optional*):
            Names, in their order.
        affiliations (`tuple[str, ...]`, *optional*):
            Where they work.
        published (`str`, *optional*):
            Date of publication, `YYYY-MM-DD`.
        version (`str`, *optional*):
            Semantic version, `MAJOR.MINOR.PATCH`.
        license (`str`, *optional*):
            Identifier of the licence on the Hub, such as `"apache-2.0"`; `"other"` for one that the Hub does not know.
        funding (`tuple[str, ...]`, *optional*):
            Who paid, with the number of the grant.
        doi (`str`, *optional*):
            DOI of the artefact or its paper, such as `"10.1000/182"`.
        repository (`str`, *optional*):
            Address of the code, `https://...`.
    """

    authors: tuple[str, ...] = ()
    affiliations: tuple[str, ...] = ()
    published: str | None = None
    version: str | None = None
    license: str | None = None
    funding: tuple[str, ...] = ()
    doi: str | None = None
    repository: str | None = None


ABOUT_LISTS = ("authors", "affiliations", "funding")

ABOUT_FORMS = {
    "published": (r"\d{4}-\d{2}-\d{2}", "a date as YYYY-MM-DD"),
    "version": (r"\d+\.\d+\.\d+", "a version in quotes, such as '1.0.0'"),
    "license": ("|".join(map(re.escape, LICENSES)), "a licence of the Hub, such as apache-2.0, or other"),
    "doi": (r"10\.\d{4,9}/\S+", "a DOI without its address, such as 10.1000/182"),
    "repository": (r"https?://\S+", "an address that begins with https://"),
}


def read_about(path: str | os.PathLike) -> About:
    """
    Read an [`About`] from a YAML file.

    Args:
        path (`str` or `os.PathLike`):
            File with any of the fields of [`About`]; those that are tuples are lists of text there.

    Returns:
        [`About`]

    Raises:
        `FileNotFoundError`: when there is no such file.
        `ValueError`: when it is no YAML mapping, or holds an unknown key or a value that will not do.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from onereward.hub.about import read_about

    >>> Path("about.yaml").write_text("authors: [A. Example, B. Example]\\nlicense: cc-by-4.0\\n")
    51
    >>> read_about("about.yaml").authors
    ('A. Example', 'B. Example')
    ```
    """
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{Path(path).name} is no YAML file: {error}") from error
    known = [field.name for field in fields(About)]
    if not isinstance(entries, dict):
        raise ValueError(f"{Path(path).name} holds {entries!r}; expected lines `key: value` with keys among {known}.")
    unknown = [key for key in entries if key not in known]
    if unknown:
        raise ValueError(f"{Path(path).name} has the unknown key(s) {unknown}; expected some of {known}.")
    about = {}
    for key, value in entries.items():
        if value is None:
            continue
        if key in ABOUT_LISTS:
            if not isinstance(value, list) or not all(isinstance(entry, str) and entry.strip() for entry in value):
                raise ValueError(f"`{key}` in {Path(path).name} is {value!r}; expected a list of texts, [A, B].")
            about[key] = tuple(value)
            continue
        value = value.isoformat() if isinstance(value, datetime.date) else value  # YAML knows dates
        form, wanted = ABOUT_FORMS[key]
        if not isinstance(value, str) or not re.fullmatch(form, value):
            raise ValueError(f"`{key}` in {Path(path).name} is {value!r}; expected {wanted}.")
        about[key] = value
    return About(**about)
