"""A running launch: checked before, watched, judged and cleared at its end."""
