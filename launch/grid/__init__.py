"""Many trainings as one command: which, where, and what has been done."""
