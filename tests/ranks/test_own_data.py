"""The page about one's own data, as it stands: its reader, and its commands from packing to the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nd_dist.errors import DataError
from shards.format.index import Index
from tests.shards.support import make_config, pack_alone
from tests.support.documents import commands, programs
from tests.support.waiting import HANG_S

TINY = (
    "data.subjects=[1,2] decoder.kind=neuraldiffuser decoder.hidden_size=16 training.steps=[4,4] "
    "training.samples_per_subject=[4,4] training.checkpoint_every=4 sampler.num_steps=3 "
    "evaluation.num_images=3 evaluation.num_repeats=1 evaluation.bootstrap=100 evaluation.controls=false"
)
NUM_PICTURES = 30


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a lab's data of two subjects, and the page's reader beside it."""
    for name, text in programs("own-data.md").items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    draw = np.random.default_rng(5)
    folder = tmp_path / "lab"
    (folder / "pictures").mkdir(parents=True)
    coarse = draw.integers(0, 256, (NUM_PICTURES, 8, 8, 3), dtype=np.uint8)
    for number, picture in enumerate(coarse):
        Image.fromarray(picture.repeat(12, 0).repeat(12, 1)).save(folder / f"pictures/{number:04d}.png")
    (folder / "captions.txt").write_text("".join(f"picture number {i} of the lab\n" for i in range(NUM_PICTURES)))
    (folder / "test.txt").write_text("0\n1\n2\n3\n")
    for subject, num_voxels in ((1, 51), (2, 52)):
        (folder / f"subj{subject:02d}").mkdir()
        weights = draw.standard_normal((coarse[0].size, num_voxels)) / 500
        for session in (1, 2):
            image_id = draw.permutation(NUM_PICTURES)
            betas = coarse.reshape(NUM_PICTURES, -1)[image_id] @ weights
            betas += draw.standard_normal(betas.shape)
            np.savez(folder / f"subj{subject:02d}/session{session:02d}.npz", betas=betas, image_id=image_id)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.launch
def test_the_page_runs_from_pack_to_report_and_nothing_is_called_simulated(lab: Path) -> None:
    script = commands("own-data.md").replace("evaluation.image_groups=null", f"evaluation.image_groups=null {TINY}")
    assert TINY in script
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        ["bash", "-ec", script], cwd=lab, env=environ, capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    metrics = json.loads((lab / "runs/lab/metrics.json").read_text())
    assert metrics["simulated"] is False
    assert "Simulated data" not in (lab / "runs/lab/report.html").read_text()
    index = Index.read(lab / "lab_shards")
    assert (index.num_voxels, index.num_images) == ({1: 51, 2: 52}, NUM_PICTURES)
    assert [info.test_images for info in index.subjects.values()] == [4, 4]


@pytest.mark.parametrize(
    ("damage", "named"),
    [("gap", "without a gap"), ("lengths", r"session02\.npz"), ("ids", r"session02\.npz"), ("zeros", "s01_e02_t000")],
)
def test_the_readers_checks_and_the_packers_own_find_wrong_files(lab: Path, damage: str, named: str) -> None:
    path = lab / "lab/subj01/session02.npz"
    with np.load(path) as file:
        betas, image_id = file["betas"], file["image_id"]
    if damage == "gap":
        (lab / "lab/pictures/0007.png").unlink()
    if damage == "lengths":
        betas = betas[:-1]
    elif damage == "zeros":
        betas[20:] = 0
    elif damage == "ids":
        image_id += 1
    np.savez(path, betas=betas, image_id=image_id)
    config = make_config(lab / "lab", lab / "s", reader="my_lab.reader:Reader", subjects=(1,), targets=("z",))
    with pytest.raises(DataError, match=named):
        pack_alone(config)
