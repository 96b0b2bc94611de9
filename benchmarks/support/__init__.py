"""What the benchmarks share: made-up data, baselines, measuring."""
