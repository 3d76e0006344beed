"""A few votes whose agreement is known by counting."""

import datasets
import numpy as np

from onereward.preferences.schema import VOTE_DEFAULTS, VOTE_FEATURES, to_png


def make_votes(case="phantom-test-{}", roles=("simulated", "simulated", "simulated"), pairs=12):
    """Votes of three raters, the first two of one mind and the third against them on each fourth pair."""
    rng, votes = np.random.default_rng(0), []
    picture = to_png(rng.integers(0, 256, (16, 16), dtype=np.uint8))
    mask = to_png(np.full((16, 16), 255, np.uint8))
    for pair in range(pairs):
        for number, role in enumerate(roles):
            label = float(pair % 2 != (number == 2 and pair % 4 == 0))
            votes.append(
                {
                    **dict.fromkeys(VOTE_FEATURES),
                    **VOTE_DEFAULTS,
                    "vote_id": f"{pair}-{number}",
                    "pair_id": f"pair-{pair}",
                    "prompt": "a tumour",
                    "task": "fill",
                    "image": picture,
                    "mask": mask,
                    "image_0": picture,
                    "image_1": picture,
                    "label_0": label,
                    "label_1": 1 - label,
                    "criterion": "realism",
                    "rater": f"{number:016x}",
                    "rater_role": role,
                    "model_0": "base",
                    "model_1": "tuned",
                    "case_id": case.format(pair),
                    "created_at": "2026-01-01T00:00:00+00:00",
                    "schema_version": 2,
                }
            )
    return datasets.Dataset.from_list(votes, features=VOTE_FEATURES)
