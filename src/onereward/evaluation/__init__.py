"""Measures that were never a reward: metrics, the held-out judge, intervals by case, and the pictures of a report."""
