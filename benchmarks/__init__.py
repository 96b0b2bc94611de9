"""Benchmarks: every figure is a ratio against a baseline that runs in the same process or run."""
