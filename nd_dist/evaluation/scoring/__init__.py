"""From pictures to numbers: judges, metrics, comparisons, groups."""
