from __future__ import annotations

import argparse
import re

import pytest

from benchmarks import sampler as benchmark


def test_the_benchmark_compares_equal_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = argparse.Namespace(
        device="cpu",
        dtype="float32",
        images=1,
        repeats=2,
        rounds=1,
        steps=8,
        kappa=3000.0,
        eta=0.4,
        sag=[0.75, 0.0],
        rows=None,
        vae_rows=1,
        channels_last=True,
        compile=False,
    )
    benchmark.measure("toy", arguments)
    printed = capsys.readouterr().out
    differences = [float(value) for value in re.findall(r"relative difference (\S+)", printed)]
    baseline, ours = differences[::3], differences[1::3]
    assert baseline == [0.0, 0.0]
    assert all(difference < 1e-4 for difference in ours)
    promises = [float(value) for value in re.findall(r"promised x\s*([\d.]+)", printed)]
    assert all(1.5 < promise < 2.6 for promise in promises[1::3])
