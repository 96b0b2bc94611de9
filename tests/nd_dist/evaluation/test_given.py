"""Pictures that were made elsewhere: read, matched by name, scored as the metric functions score them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nd_dist.comm import Comm
from nd_dist.config import Config
from nd_dist.errors import ConfigError, DataError
from nd_dist.evaluation.given import given_job
from nd_dist.evaluation.merge import merge_runs
from nd_dist.evaluation.picture_sets import open_pictures
from nd_dist.evaluation.run import evaluate
from nd_dist.events import EventLog
from nd_dist.frozen.judges import load_phantom_judges
from nd_dist.metrics.distance import correlation_distance
from nd_dist.metrics.identification import correlation_matrix, two_way
from nd_dist.metrics.pixel import pixel_correlation, structural_similarity
from nd_dist.metrics.protocols import protocol_named
from nd_dist.metrics.retrieval import brain_hits, cosine_matrix, image_hits
from nd_dist.pixels import pictures_to_pixels
from nd_dist.report.report import write_report
from tests.nd_dist.evaluation.toy_world import toy_picture, write_models

NUM, REPEATS, SIZE = 11, 2, 48


@pytest.fixture(scope="module")
def judges_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judges")
    write_models(folder)
    return folder / "models" / "judges"


def originals() -> np.ndarray:
    return np.stack([toy_picture(image, SIZE) for image in range(NUM)])


def recons() -> np.ndarray:
    """(N, R, H, W, 3): the originals with noise; one of one colour."""
    rng = np.random.default_rng(0)
    made = np.clip(originals()[:, None] + rng.normal(0, 60, (NUM, REPEATS, SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
    made[3, 1] = 77
    return made


def write_folders(folder: Path, name: str = "{image}_{repeat}.png") -> tuple[Path, Path]:
    for image in range(NUM):
        write_picture(folder / "seen" / f"{image}.png", originals()[image])
        for repeat in range(REPEATS):
            write_picture(folder / "made" / name.format(image=image, repeat=repeat), recons()[image, repeat])
    return folder / "seen", folder / "made"


def write_picture(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def score(run_dir: Path, seen: Path, made: Path, subject: int = 1, judges: Path | None = None, **more: Any) -> Any:
    values = {
        "run_dir": run_dir,
        "score": {"originals": seen, "reconstructions": made, "method": "theirs", **more.pop("score", {})},
        "evaluation": {"bootstrap": 100, "judges_dir": judges, "subjects": (subject,), **more},
    }
    job = given_job(Config.model_validate(values), torch.device("cpu"))
    return evaluate(job, Comm(), EventLog(run_dir, 0, "score"))


def test_two_folders_score_as_the_functions_do(tmp_path: Path, judges_dir: Path) -> None:
    content = score(tmp_path / "run", *write_folders(tmp_path), judges=judges_dir)
    (point,) = content["points"]
    found = {name: item["value"] for name, item in point["metrics"].items()}
    seen = pictures_to_pixels(originals())
    sets = [pictures_to_pixels(np.ascontiguousarray(recons()[:, repeat])) for repeat in range(REPEATS)]
    expected = {
        "pixcorr": np.mean([pixel_correlation(made, seen).mean() for made in sets]),
        "ssim": np.mean([structural_similarity(made, seen).mean() for made in sets]),
        "repeat_pixcorr": float(pixel_correlation(sets[0], sets[1]).mean()),
    }
    for judge in load_phantom_judges(judges_dir, torch.device("cpu")):
        true, made = judge.features(seen).numpy(), [judge.features(each).numpy() for each in sets]
        if judge.score == "two_way":
            expected[judge.name] = np.mean([two_way(correlation_matrix(true, each)) for each in made])
        else:
            expected[judge.name] = np.mean([correlation_distance(true, each).mean() for each in made])
    assert set(found) == {*expected, "repeat_ssim"}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert (point["subject"], point["metrics"]["pixcorr"]["n"]) == (1, NUM)


def test_without_judges_the_pixel_metrics_stand_alone_and_the_page_can_be_written(tmp_path: Path) -> None:
    content = score(tmp_path / "run", *write_folders(tmp_path))
    assert set(content["points"][0]["metrics"]) == {"pixcorr", "ssim", "repeat_pixcorr", "repeat_ssim"}
    page = write_report(tmp_path / "run").read_text()
    assert "theirs" in page
    assert "without guidance" not in page.lower()
    assert "theirs" in (tmp_path / "run" / "metrics.tex").read_text()


def test_arrays_of_bytes_score_as_the_same_pictures_in_folders(tmp_path: Path) -> None:
    seen, made = write_folders(tmp_path)
    np.save(tmp_path / "seen.npy", originals())
    torch.save(torch.from_numpy(recons()).permute(0, 1, 4, 2, 3), tmp_path / "made.pt")
    in_folders = score(tmp_path / "one", seen, made)
    in_arrays = score(tmp_path / "two", tmp_path / "seen.npy", tmp_path / "made.pt")
    assert in_arrays["points"][0]["metrics"] == in_folders["points"][0]["metrics"]


def test_floats_are_scored_as_they_are_and_clamped_only_where_the_protocol_does(tmp_path: Path) -> None:
    seen = torch.rand(NUM, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made = seen + 0.15 * torch.randn(seen.shape, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    torch.save(seen, tmp_path / "seen.pt")
    torch.save({"all_recons": made}, tmp_path / "made.pt")
    for name, given in (("mindeye2", made), ("mindeye1", made.clamp(0, 1))):
        protocol = protocol_named(name)
        pixels = [protocol.recon_pixels(protocol.recon_first(side)) for side in (given, seen)]
        content = score(tmp_path / name, tmp_path / "seen.pt", tmp_path / "made.pt", protocol=name)
        found = content["points"][0]["metrics"]
        assert found["pixcorr"]["value"] == pytest.approx(float(pixel_correlation(*pixels).mean()), abs=1e-12)
        assert found["ssim"]["value"] == pytest.approx(float(structural_similarity(*pixels).mean()), abs=1e-12)


def test_retrieval_comes_from_features_of_both_sides(tmp_path: Path) -> None:
    seen, made = write_folders(tmp_path)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((NUM, 2, 3)).astype(np.float32)
    brains = images + rng.standard_normal(images.shape).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    torch.save(torch.from_numpy(brains), tmp_path / "brains.pt")
    files = {"brain_features": tmp_path / "brains.pt", "image_features": tmp_path / "images.npy"}
    metrics = score(tmp_path / "run", seen, made, score=files)["points"][0]["metrics"]
    cosines = cosine_matrix(brains, images)
    assert metrics["image_retrieval"]["value"] == image_hits(cosines).mean()
    assert metrics["brain_retrieval"]["value"] == brain_hits(cosines).mean()
    with pytest.raises(ConfigError, match="both sides"):
        score(tmp_path / "other", seen, made, score={"brain_features": tmp_path / "brains.pt"})


def test_subjects_that_are_scored_apart_join_to_their_mean(tmp_path: Path) -> None:
    seen, made = write_folders(tmp_path)
    np.save(tmp_path / "other.npy", recons()[:, ::-1] // 2)
    runs = [score(tmp_path / "one", seen, made, 1), score(tmp_path / "five", seen, tmp_path / "other.npy", 5)]
    merge_runs(tmp_path / "joined", [tmp_path / "one", tmp_path / "five"])
    content = json.loads((tmp_path / "joined" / "metrics.json").read_text())
    (mean,) = content["averages"]
    assert mean["subject"] == 0
    for name, item in mean["metrics"].items():
        by_hand = np.mean([run["points"][0]["metrics"][name]["value"] for run in runs])
        assert item["value"] == pytest.approx(by_hand, abs=1e-12)
        assert item["ci_low"] < item["value"] < item["ci_high"]
    assert "Mean of subjects 1, 5" in write_report(tmp_path / "joined").read_text()


@pytest.mark.parametrize("name", ["{image}_{repeat}.png", "{image}-repeat-{repeat}.png", "{image}/{repeat}.png"])
def test_repeats_are_known_by_their_image_however_they_are_numbered(tmp_path: Path, name: str) -> None:
    seen, made = write_folders(tmp_path, name)
    pictures = open_pictures(made, open_pictures(seen))
    assert pictures.names == tuple(str(image) for image in range(NUM)), "in the order of people, 2 before 10"
    assert pictures.num_repeats == REPEATS
    assert torch.equal(pictures.pixels(10), pictures_to_pixels(recons()[10]))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    seen, made = write_folders(tmp_path)
    known = open_pictures(seen)
    write_picture(made / "stranger_0.png", recons()[0, 0])
    with pytest.raises(DataError, match=r"no original of stranger_0\.png"):
        open_pictures(made, known)
    (made / "stranger_0.png").unlink()
    (made / "7_0.png").unlink()
    with pytest.raises(DataError, match="fewer of 7"):
        open_pictures(made, known)
    (made / "7_1.png").unlink()
    with pytest.raises(DataError, match="no picture of 7"):
        open_pictures(made, known)
    for repeat in range(REPEATS):
        write_picture(made / f"7_{repeat}.png", recons()[7, 0][:20])
    with pytest.raises(DataError, match=r"others: 7_0\.png, 7_1\.png"):
        open_pictures(made, known).check_sizes()
    np.save(tmp_path / "short.npy", recons()[:5])
    with pytest.raises(DataError, match="as many"):
        open_pictures(tmp_path / "short.npy", known)
    with pytest.raises(DataError, match="no pictures"):
        open_pictures(tmp_path / "nothing")


@pytest.mark.parametrize(("value", "found"), [(float("nan"), "nan"), (200.0, "200"), (-1.0, "-1")])
def test_a_pixel_that_is_no_number_of_a_picture_is_named_by_image_and_repeat(
    tmp_path: Path, value: float, found: str
) -> None:
    pixels = torch.rand(3, 2, 3, 16, 16)
    pixels[2, 1, 0, 5, 5] = value
    torch.save(pixels, tmp_path / "made.pt")
    with pytest.raises(DataError, match=f"(?s)Image 2, repeat 1.*{found}"):
        open_pictures(tmp_path / "made.pt").pixels(2)
