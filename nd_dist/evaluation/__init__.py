"""Evaluation: guided reconstruction over any number of ranks, records on shared storage, scores, sweep, report."""
