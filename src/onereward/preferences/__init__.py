"""Preferences: votes and where they are kept, candidates and which to ask about, raters, and pairs to train on."""

from .active import next_questions, vote_information
from .bradley_terry import davidson_probabilities
from .candidates import CANDIDATE_FEATURES, make_candidates
from .pairs import pairs_for_training
from .schema import (
    CRITERIA,
    VOTE_FEATURES,
    VOTE_SCHEMA_VERSION,
    best_worst_votes,
    load_votes,
    phi_warning,
    rater_id,
    save_votes,
    upgrade_votes,
    validate_votes,
)
from .simulated import RATERS, SimulatedRater, best_possible_accuracy, simulate_votes, true_utilities
from .store import VoteStore
from .study import Item, Receipt, Study, StudyError
from .study_design import StudySettings, Unit, make_study, study_units


__all__ = [
    "CANDIDATE_FEATURES",
    "CRITERIA",
    "RATERS",
    "VOTE_FEATURES",
    "VOTE_SCHEMA_VERSION",
    "Item",
    "Receipt",
    "SimulatedRater",
    "Study",
    "StudyError",
    "StudySettings",
    "Unit",
    "VoteStore",
    "best_possible_accuracy",
    "best_worst_votes",
    "davidson_probabilities",
    "load_votes",
    "make_candidates",
    "make_study",
    "next_questions",
    "pairs_for_training",
    "phi_warning",
    "rater_id",
    "save_votes",
    "simulate_votes",
    "study_units",
    "true_utilities",
    "upgrade_votes",
    "validate_votes",
    "vote_information",
]
