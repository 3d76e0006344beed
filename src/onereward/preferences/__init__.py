"""Preferences: the schema of votes and its file, candidates to vote on, simulated raters, and pairs to train on."""

from .bradley_terry import davidson_probabilities
from .candidates import CANDIDATE_FEATURES, make_candidates
from .pairs import pairs_for_training
from .schema import CRITERIA, VOTE_FEATURES, VOTE_SCHEMA_VERSION, load_votes, save_votes, validate_votes
from .simulated import RATERS, SimulatedRater, best_possible_accuracy, simulate_votes, true_utilities


__all__ = [
    "CANDIDATE_FEATURES",
    "CRITERIA",
    "RATERS",
    "VOTE_FEATURES",
    "VOTE_SCHEMA_VERSION",
    "SimulatedRater",
    "best_possible_accuracy",
    "davidson_probabilities",
    "load_votes",
    "make_candidates",
    "pairs_for_training",
    "save_votes",
    "simulate_votes",
    "true_utilities",
    "validate_votes",
]
