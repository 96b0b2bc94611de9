"""Composition root: the command line, launch plans, and the short programs that one rank runs."""
