"""Resamples, permutations and what scores are made of."""
