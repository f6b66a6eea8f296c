"""Learners: log-probabilities, objectives and one jitted train step for all of them."""
