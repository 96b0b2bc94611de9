"""A study: the trainings and evaluations of a paper as one file, and its tables."""
