"""`nd reconstruct`: own pictures and voxels, and what is said where words or files do not fit."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.recipe import config_yaml
from nd_dist import NeuralDiffuserPipeline
from tests.nd_dist.evaluation.toy_world import NUM_VOXELS, ToySource, toy_config, toy_picture, write_models
from tests.support.command_line import nd


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline with a decoder of two subjects, a picture, and voxels of three trials."""
    folder = tmp_path_factory.mktemp("world")
    write_models(folder)
    run = toy_config(folder, z_calibration="none").run_dir
    shutil.copytree(folder / "decoder", run / "checkpoints" / "stage2" / "model")
    (run / "config.yaml").write_text(config_yaml(toy_config(folder, z_calibration="none")))
    NeuralDiffuserPipeline.from_pretrained(run).save_pretrained(folder / "saved")
    Image.fromarray(toy_picture(1)).save(folder / "disc.png")
    np.save(folder / "betas.npy", ToySource().voxels(1, [0, 1, 2]))
    return folder


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_own_pictures_are_reconstructed_with_the_shipped_networks(world: Path, tmp_path: Path) -> None:
    seen = [world / "disc.png", tmp_path / "other.png"]
    Image.fromarray(toy_picture(2)).save(seen[1])
    ended = nd("reconstruct", *map(str, seen), "--caption", "a disc", "--out", str(tmp_path / "out"), "--kappa", "0")
    assert ended.returncode == 0, ended.stderr
    made = [picture(tmp_path / "out" / path.name).ravel() for path in seen]
    shown = [np.asarray(Image.open(path).resize((64, 64))).ravel() for path in seen]
    like_DS = np.corrcoef(made, shown)[:2, 2:]
    assert list(like_DS.argmax(axis=1)) == [0, 1], "each is most like the picture that it was made from"


def test_voxels_of_a_run_and_of_its_saved_pipeline_become_the_same_pictures(world: Path, tmp_path: Path) -> None:
    for model in ("run", "saved"):
        words = ["--voxels", str(world / "betas.npy"), "--subject", "1", "--model", str(world / model)]
        ended = nd("reconstruct", *words, "--out", str(tmp_path / model))
        assert ended.returncode == 0, ended.stderr
        assert sorted(path.name for path in (tmp_path / model).iterdir()) == [
            f"betas_000{row}.png" for row in range(3)
        ]
        assert "betas_0002.png" in ended.stdout
    for row in range(3):
        name = f"betas_000{row}.png"
        np.testing.assert_array_equal(picture(tmp_path / "run" / name), picture(tmp_path / "saved" / name))
    assert (picture(tmp_path / "run" / "betas_0000.png") != picture(tmp_path / "run" / "betas_0001.png")).any()


def test_words_that_do_not_fit_are_refused_before_a_network_is_read(world: Path, tmp_path: Path) -> None:
    disc, betas = str(world / "disc.png"), str(world / "betas.npy")
    (tmp_path / "disc.png").write_bytes(b"no picture")
    np.save(tmp_path / "whole.npy", np.zeros((2, 30), dtype=np.int16))
    np.save(tmp_path / "gaps.npy", np.full((2, 30), np.nan))
    told = {
        (): (2, "Pictures or --voxels FILE"),
        (disc, "--voxels", betas): (2, "Pictures or --voxels FILE"),
        ("--voxels", betas, "--caption", "a disc"): (2, "--caption belongs to pictures"),
        (disc, "--caption", "a", "--caption", "b"): (2, "expected: 1 or 1 --caption"),
        (disc, str(tmp_path / "disc.png")): (2, "Two pictures would become one file"),
        (str(tmp_path / "disc.png"),): (3, "A picture cannot be read"),
        (str(tmp_path / "none.png"),): (3, "No such file"),
        ("--voxels", disc): (3, "Voxels cannot be read"),
        ("--voxels", str(tmp_path / "whole.npy")): (3, "found: int16 (2, 30)"),
        ("--voxels", str(tmp_path / "gaps.npy")): (3, "NaN or infinity"),
    }
    for words, (code, message) in told.items():
        ended = nd("reconstruct", *words, "--model", "no/model", "--out", str(tmp_path / "out"))
        assert (ended.returncode, message in ended.stderr) == (code, True), (words, ended.stderr)
    assert not (tmp_path / "out").exists()


def test_a_model_or_subject_that_does_not_fit_is_named(world: Path, tmp_path: Path) -> None:
    betas = ("--voxels", str(world / "betas.npy"), "--out", str(tmp_path))
    told = {
        ("--model", "no/model"): (3, "neither a folder nor in the local Hugging Face cache"),
        ("--model", "phantom/stable-diffusion"): (2, "need a trained decoder"),
        ("--model", str(world / "saved")): (2, "knows several subjects"),
        ("--model", str(world / "saved"), "--subject", "2"): (2, f"(3, {NUM_VOXELS[2]})"),
        ("--model", str(world / "saved"), "--subject", "7"): (2, "not trained on this subject"),
    }
    for words, (code, message) in told.items():
        ended = nd("reconstruct", *betas, *words)
        assert (ended.returncode, message in ended.stderr) == (code, True), (words, ended.stderr)
