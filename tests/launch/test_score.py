"""`nd score` with real launchers: the same numbers on two ranks as on one, and errors before any rank starts."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.command_line import nd_process


def write_pictures(folder: Path) -> list[str]:
    rng = np.random.default_rng(0)
    seen = rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    np.save(folder / "seen.npy", seen)
    np.save(folder / "made.npy", np.stack([seen // 2, seen[:, ::-1]], axis=1))
    return [str(folder / "seen.npy"), str(folder / "made.npy")]


@pytest.mark.launch
def test_two_ranks_score_as_one_does(tmp_path: Path) -> None:
    pictures, found = write_pictures(tmp_path), []
    for ranks in ("1", "2"):
        run_dir = tmp_path / ranks
        words = ["--protocol", "nd", "--out", str(run_dir), "--ranks", ranks, "evaluation.bootstrap=100"]
        result = nd_process("score", *pictures, *words)
        assert result.returncode == 0, result.stdout + result.stderr
        assert (run_dir / "report.html").is_file()
        found.append({**json.loads((run_dir / "metrics.json").read_text()), "provenance": {}})
    assert found[0] == found[1]
    assert {name: item["n"] for name, item in found[0]["points"][0]["metrics"].items()} == dict.fromkeys(
        ("pixcorr", "ssim", "repeat_pixcorr", "repeat_ssim"), 12
    )


@pytest.mark.launch
def test_pictures_that_do_not_fit_are_refused_before_a_rank_starts(tmp_path: Path) -> None:
    seen, made = write_pictures(tmp_path)
    np.save(made, np.load(made)[:5])
    result = nd_process("score", seen, made, "--out", str(tmp_path / "run"))
    assert result.returncode == 3
    assert "not as many reconstructed images" in result.stderr + result.stdout
    assert not (tmp_path / "run").exists()
    result = nd_process("score", seen, made, "--out", str(tmp_path / "run"), "--protocol", "mindeye3")
    assert result.returncode == 2
