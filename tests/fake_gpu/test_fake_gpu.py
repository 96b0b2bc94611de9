"""Runs the checks on the pretended GPU in one process, which loads its library before torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.support.gpu_budget import read_budget, table_lines
from tests.support.fake_gpu.build import why_not

ROOT = Path(__file__).parents[2]


@pytest.mark.launch
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_every_gpu_path_runs_at_full_size_on_the_rank_s_device_within_its_budget() -> None:
    plugin = ["-p", "tests.support.fake_gpu.plugin", "-o", "python_files=check_*.py", "-p", "no:cacheprovider"]
    words = [sys.executable, "-m", "pytest", *plugin, "-q", "-x", str(Path(__file__).parent)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_the_documentation_prints_the_budget_table() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert "\n".join(table_lines(read_budget())) in text, "python -m benchmarks.gpu_budget prints it"
