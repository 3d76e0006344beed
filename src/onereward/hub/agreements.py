"""Data that came with a promise: whose they are, and why what is made from them is not published without a word."""

import re


# name -> what it is, who owns it, where its terms stand, and why publishing is refused.
AGREEMENTS = {
    "mimic": {
        "what": "MIMIC-CXR and the other MIMIC databases",
        "owner": "MIT Laboratory for Computational Physiology and Beth Israel Deaconess Medical Center, on PhysioNet",
        "url": "https://physionet.org/content/mimic-cxr/view-dua/2.1.0/",
        "reason": (
            "whoever was given access signed not to share it with anyone else, and its keepers ask that models which "
            "may have memorised records go to PhysioNet under the same agreement"
        ),
    },
    "adni": {
        "what": "the Alzheimer's Disease Neuroimaging Initiative",
        "owner": "ADNI, at the LONI Image and Data Archive",
        "url": "https://ida.loni.usc.edu/collaboration/access/appApply.jsp?project=ADNI",
        "reason": (
            "its agreement forbids redistribution of participants' data in any manner, and lets derived data of "
            "participants out through ADNI's own archive only"
        ),
    },
    "oai": {
        "what": "the Osteoarthritis Initiative, OAI-ZIB included",
        "owner": "US National Institutes of Health, in the NIMH Data Archive",
        "url": "https://nda.nih.gov/oai",
        "reason": (
            "the archive's Data Use Certification gives access to the recipients it names, who answer for how the "
            "data are used"
        ),
    },
    "oasis": {
        "what": "the Open Access Series of Imaging Studies (OASIS-1 to OASIS-4)",
        "owner": "Washington University in St. Louis, Knight Alzheimer Disease Research Center",
        "url": "https://sites.wustl.edu/oasisbrains/",
        "reason": "each user is to accept its Data Use Agreement in person before the data are handed over",
    },
    "brats": {
        "what": "the Brain Tumor Segmentation (BraTS) challenges",
        "owner": "the BraTS organisers, on Synapse and at CBICA (University of Pennsylvania)",
        "url": "https://www.synapse.org/Synapse:syn51156910",
        "reason": (
            "most editions go to registered researchers, who may not pass them on (the 2021 edition on TCIA is CC BY "
            "4.0: name it as the permission where that is what you used)"
        ),
    },
}

# Long words are found anywhere in a name, also in "MICCAI_BraTS2020"; "oai" only where no other word goes on.
PATTERNS = {
    "mimic": r"mimic",
    "adni": r"adni",
    "oai": r"(?<![a-z])oai(?![a-z])|oai[-_ ]?zib|osteoarthritis[-_ ]initiative",
    "oasis": r"oasis",
    "brats": r"brats",
}

# Our own base has the labels of BraTS and its name, and none of its data: it is made from the phantom.
OWN_BASE = r"onereward-brats(?![a-z0-9]|-\d)"


def find_agreements(*texts):
    """
    Which data-use agreements the names of data speak of.

    Args:
        *texts (`str`):
            Names of data: values of the `source` column, ids of data sets, names of folders and files. Never names of
            models, which may be called after the labels that they know.

    Returns:
        `list[str]`: keys of `AGREEMENTS`, sorted.

    Example:

    ```python
    >>> from onereward.hub.agreements import find_agreements

    >>> find_agreements("MICCAI_BraTS2020_TrainingData", "phantom", "acme/mimic-cxr-pairs")
    ['brats', 'mimic']
    ```
    """
    text = re.sub(OWN_BASE, "", "\n".join(texts).lower())
    return sorted(name for name, pattern in PATTERNS.items() if re.search(pattern, text))


def check_agreements(agreements, private, permission):
    """
    Refuse to publish what was made from data under an agreement, unless nobody else sees it or somebody permits it.

    Args:
        agreements (`list[str]`):
            Keys of `AGREEMENTS`, and other marks as `onereward data --agreement` sets them, in their own words.
        private (`bool`):
            Whether the repository is private.
        permission (`str`, *optional*):
            Who permits it, and where that is written.

    Raises:
        ValueError: with each agreement, why it is in the way, where its terms stand, and what to do.

    Example:

    ```python
    >>> from onereward.hub.agreements import check_agreements

    >>> check_agreements(["brats"], private=False, permission="CC BY 4.0, https://doi.org/10.7937/jc8x-9874")
    ```
    """
    if not agreements or private or (permission or "").strip():
        return
    reasons = "; ".join(describe_agreement(agreement) for agreement in agreements)
    raise ValueError(
        f"This is made from data under a data-use agreement: {reasons}. Publish it as a private repository "
        "(`--private`), or say who permits it and where that is written (`--permission`), which goes into the card."
    )


def describe_agreement(agreement):
    """
    One agreement in words: what it is, whose, why it is in the way and where its terms stand.

    Args:
        agreement (`str`):
            Key of `AGREEMENTS`, or a mark in its own words, which is returned as it is.

    Returns:
        `str`.
    """
    known = AGREEMENTS.get(agreement)
    if known is None:
        return agreement
    return f"{agreement}, that is {known['what']} ({known['owner']}): {known['reason']} ({known['url']})"
