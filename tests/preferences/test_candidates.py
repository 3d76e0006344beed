import datasets
import numpy as np
import pytest

from onereward.preferences import CANDIDATE_FEATURES, make_candidates, simulate_votes, validate_votes
from onereward.preferences.degradations import DEGRADATIONS


ARGUMENTS = {"num_candidates": 2, "num_degraded": 3, "num_inference_steps": (1, 3), "batch_size": 3}


@pytest.fixture(scope="module")
def few(phantom):
    return phantom.select([0, 1, 2, 3])  # t1c: fill, remove, extend; t2f: fill


@pytest.mark.parametrize("layout", ["2c+1+K", "2c+1"])
def test_all_candidates_keep_the_outside_of_the_mask(tiny_pipeline, few, layout):
    candidates = make_candidates(tiny_pipeline(layout=layout), few, **ARGUMENTS)
    assert candidates.features == CANDIDATE_FEATURES
    assert len(candidates) == 4 * (2 + 3) and len(set(candidates["condition"])) == 4
    for number, row in enumerate(candidates):
        image, mask, candidate = (np.asarray(row[name]) for name in ("image", "mask", "candidate"))
        np.testing.assert_array_equal(candidate[mask == 0], image[mask == 0])
        assert (candidate != image)[mask > 0].any()
        source = few[number // 5]
        assert row["prompt"] == source["prompt"] and row["case_id"] == source["case_id"]
        np.testing.assert_array_equal(image, np.asarray(source["image"]))


def test_names_say_what_was_done(tiny_pipeline, few):
    candidates = make_candidates(tiny_pipeline(), few, model="mine", **ARGUMENTS)
    for index, model in enumerate(candidates["model"]):
        if index % 5 < 2:
            assert model == "mine"
        else:
            origin, *degradations = model.split("+")
            assert origin in ("mine", "target") and 1 <= len(degradations) <= 2
            assert set(degradations) <= set(DEGRADATIONS)
    assert len(set(candidates["seed"])) == len(candidates)


def test_the_seed_decides_and_no_global_generator_does(tiny_pipeline, few):
    runs = [make_candidates(tiny_pipeline(), few, seed=seed, **ARGUMENTS) for seed in (4, 4, 5)]
    pictures = [[np.asarray(row["candidate"]).tobytes() for row in run] for run in runs]
    assert pictures[0] == pictures[1]
    assert all(first != other for first, other in zip(pictures[0], pictures[2], strict=True))


def test_targets_that_differ_outside_the_mask_do_not_shine_through(tiny_pipeline, few):
    def corrupt(row):
        return {"target": row["target"].point(lambda value: 255 - value)}

    inverted = few.map(corrupt, features=few.features, load_from_cache_file=False)
    candidates = make_candidates(
        tiny_pipeline(), inverted, num_candidates=1, num_degraded=8, num_inference_steps=(1, 1)
    )
    assert any(model.startswith("target+") for model in candidates["model"])
    for row in candidates:
        image, mask, candidate = (np.asarray(row[name]) for name in ("image", "mask", "candidate"))
        np.testing.assert_array_equal(candidate[mask == 0], image[mask == 0])


def test_unknown_truths_are_not_used(tiny_pipeline, few):
    unknown = few.remove_columns("target").add_column("target", [None] * len(few)).cast(few.features)
    candidates = make_candidates(tiny_pipeline(), unknown, **ARGUMENTS)
    assert not any(model.startswith("target") for model in candidates["model"])
    votes, _ = simulate_votes(candidates, pairs_per_condition=2)
    validate_votes(votes)


def test_candidates_of_several_calls_can_be_joined(tiny_pipeline, few):
    parts = [make_candidates(tiny_pipeline(), few.select(part), **ARGUMENTS) for part in ([0, 1], [2, 3])]
    joined = datasets.concatenate_datasets(parts)
    assert len(set(joined["condition"])) == 4
    votes, _ = simulate_votes(joined, pairs_per_condition=3)
    assert len(set(votes["pair_id"])) == 12


def test_the_pipelines_progress_bar_is_left_as_it_was(tiny_pipeline, few):
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=False, desc="mine")
    make_candidates(pipeline, few, **ARGUMENTS)
    assert pipeline._progress_bar_config == {"disable": False, "desc": "mine"}


def test_bad_arguments_are_named(tiny_pipeline, few):
    with pytest.raises(ValueError, match="`rows` is empty"):
        make_candidates(tiny_pipeline(), few.select([]))
    with pytest.raises(ValueError, match="`num_candidates` and `num_degraded` are 0 and 4"):
        make_candidates(tiny_pipeline(), few, num_candidates=0)
