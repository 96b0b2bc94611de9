"""The check of a real GPU, on a CPU at toy size: every part runs to its end and says what it is there to say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import PARTS, main

SAYS = {
    "machine": ("tflops", "to_device_gb_s", "memory_gb_s", "launch_us"),
    "correctness": ("differences", "two_runs_are_equal"),
    "engine": ("ZeRO 0, float32", "ZeRO 1, float32", "ZeRO 2, float32", "ZeRO 3, float32"),
    "training": ("g02, plain", "g02, nd_dist"),
    "sampler": ("published_s", "1 rows", "2 rows"),
    "extraction and decoding": ("extract c, float32", "extract z, bfloat16", "decode c", "decode z"),
    "evaluation": ("networks", "points"),
    "memory": ("16 GB", "24 GB"),
}


def checked(folder: Path, part: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code of a check of one part, and its line."""
    code = main(["--out", str(folder), "--size", "toy", "--device", "cpu", "--only", part])
    (line,) = (folder / "gpu_check.jsonl").read_text(encoding="utf-8").splitlines()
    return code, json.loads(line)


@pytest.mark.launch
@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_the_check_of_a_gpu_runs_on_a_cpu(tmp_path: Path, part: str) -> None:
    code, line = checked(tmp_path, part)
    assert line["ok"], line
    assert code == 0
    assert line["part"] == part
    assert set(SAYS[part]) <= set(line)


def test_a_part_that_fails_is_a_line_with_its_error_and_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "no number")  # no Python starts
    code, line = checked(tmp_path, "machine")
    assert code == 1
    assert not line["ok"]
    assert "PYTHONHASHSEED" in line["error"]
