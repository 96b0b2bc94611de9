"""A study: the trainings and evaluations of a paper as one file, and its tables."""

from pathlib import Path

STUDIES_DIR = Path(__file__).parents[1] / "studies"
"""Studies that come with the package."""
