"""Judging: batches of one fixed size, features that do not depend on neighbours, results that outlive a stop."""

from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nd_dist.errors import DataError
from nd_dist.evaluation.points.layout import PICTURE, repeat_file
from nd_dist.evaluation.scoring.judging import BATCH, Judges, Original, Verdict, features_of, judge_all, pair_metrics
from nd_dist.evaluation.scoring.score import JudgedSheets
from nd_dist.fanout.results import has_result, publish, write_png
from nd_dist.files import sha256_file
from nd_dist.frozen import phantom_judges
from nd_dist.frozen.judges import Judge, Preparation, Score, load_phantom_judges
from nd_dist.metrics.protocols import protocol_named
from nd_dist.pixels import Resize
from tests.nd_dist.evaluation.toy_world import toy_picture

CPU = torch.device("cpu")


@dataclass
class MeanColour:
    """A judge whose features are the mean colour; keeps the sizes of the batches that it was given."""

    sizes: list[int] = field(default_factory=list)
    name: str = "colour"
    score: Score = "distance"
    identity: str = "colour"

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        self.sizes.append(len(pixels_BCHW))
        return pixels_BCHW.mean((2, 3))


@dataclass
class ColourDistance:
    """A judge of pairs: the mean power of the difference between two pictures."""

    name: str
    power: int
    identity: str = "colour distance"

    def distances(self, recons_BCHW: Tensor, originals_BCHW: Tensor) -> Tensor:
        return (recons_BCHW - originals_BCHW).double().abs().pow(self.power).mean((1, 2, 3))


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> list[Judge]:
    """The phantom's judges with random weights."""
    folder = tmp_path_factory.mktemp("judges")
    for index, kind in enumerate(phantom_judges.JUDGE_KINDS):
        torch.manual_seed(index)
        phantom_judges.JudgeNetwork(kind, 3, 2).save(folder / kind)
    return load_phantom_judges(folder, CPU)


def pictures(*sizes: int, pixels: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand((size, 3, pixels, pixels), generator=generator) for size in sizes]


def test_features_do_not_depend_on_what_else_is_judged(judges: list[Judge]) -> None:
    sets = pictures(2, 5, 1, 4, 1)
    together = list(features_of(sets, judges))
    backwards = list(features_of(sets[::-1], judges))[::-1]
    for index, alone in enumerate(sets):
        found = next(features_of([alone], judges))
        assert set(found) == {"plain_early", "plain_late", "residual", "mixer", "depthwise"}
        for name, features_RD in found.items():
            assert torch.equal(together[index][name], features_RD)
            assert torch.equal(backwards[index][name], features_RD)


@pytest.mark.parametrize("sizes", [(1,), (8,), (3, 3, 3), (5, 5, 5, 5), (20, 1)])
def test_every_batch_is_full_and_every_set_comes_back_whole(sizes: tuple[int, ...]) -> None:
    judge, sets = MeanColour(), pictures(*sizes, pixels=4)
    found = list(features_of(sets, [judge]))
    assert [len(features["colour"]) for features in found] == list(sizes)
    for features, pixels_RCHW in zip(found, sets, strict=True):
        assert torch.allclose(features["colour"], pixels_RCHW.mean((2, 3)))
    assert set(judge.sizes) == {BATCH["cpu"]}
    assert len(judge.sizes) == -(-sum(sizes) // BATCH["cpu"])


def test_pictures_of_two_sizes_are_judged_apart() -> None:
    sets = [*pictures(3, pixels=4), *pictures(2, pixels=6)]
    assert [len(features["colour"]) for features in features_of(sets, [MeanColour()])] == [3, 2]


def test_a_result_comes_as_soon_as_its_last_picture_is_judged() -> None:
    given: list[int] = []

    def sets() -> object:
        for index, pixels_RCHW in enumerate(pictures(*[4] * 6, pixels=4)):
            given.append(index)
            yield pixels_RCHW

    next(features_of(sets(), [MeanColour()]))  # type: ignore[arg-type]
    assert given == [0, 1]


def test_judges_of_one_input_prepare_a_batch_once() -> None:
    prepare, (first, second) = Preparation(Resize(4), "imagenet", CPU), pictures(2, 2, pixels=8)
    inputs = prepare(first)
    assert prepare(first) is inputs
    assert not torch.equal(prepare(second), inputs)
    assert torch.equal(prepare(first), inputs)


def write_images(folder: Path, num: int, sheet: int = 1) -> list[Verdict]:
    """Write originals and two repeats each; return what judges them, some images at a time."""
    for image in range(num):
        original, recons = folder / "originals" / str(image), folder / "recons" / str(image)
        publish(original, "f", {}, lambda path, i=image: write_png(path / PICTURE, toy_picture(i)))  # type: ignore[misc]
        recons.mkdir(parents=True)
        for repeat in range(2):
            write_png(recons / repeat_file(repeat), np.roll(toy_picture(image), repeat + 1, axis=0))
        files = {repeat_file(repeat): sha256_file(recons / repeat_file(repeat)) for repeat in range(2)}
        publish(folder / "hashes" / str(image), "f", {"files": files}, lambda path: None)
        (folder / "hashes" / str(image) / "record.json").rename(recons / "record.json")
    return [
        Verdict(
            folder / "judged" / str(first),
            "f",
            {image: folder / "originals" / str(image) for image in range(first, first + sheet)},
            {image: folder / "recons" / str(image) for image in range(first, first + sheet)},
            2,
        )
        for first in range(0, num, sheet)
    ]


def test_what_was_judged_before_a_stop_is_on_disk_and_the_rest_gives_the_same_numbers(tmp_path: Path) -> None:
    verdicts, protocol, found = write_images(tmp_path, 6), protocol_named("nd"), Judges([MeanColour()])
    with closing(judge_all(verdicts, protocol, found)) as steps:
        for _ in range(4):  # a batch holds four images of two repeats
            next(steps)
    done = [has_result(verdict.folder, "f") for verdict in verdicts]
    assert done == [True] * 4 + [False] * 2
    assert len(list(judge_all(verdicts[4:], protocol, found))) == 2
    metrics = JudgedSheets([verdict.folder for verdict in verdicts]).metrics(range(6))
    (together,) = write_images(tmp_path / "together", 6, sheet=6)
    list(judge_all([together], protocol, found))
    assert JudgedSheets([together.folder]).metrics(range(6)) == metrics
    assert set(metrics) == {"pixcorr", "ssim", "repeat_pixcorr", "repeat_ssim"}


def test_a_judge_that_gives_no_number_is_named_with_the_image_and_the_repeat(tmp_path: Path) -> None:
    class Broken(MeanColour):
        def features(self, pixels_BCHW: Tensor) -> Tensor:
            features_BD = super().features(pixels_BCHW)
            features_BD[3, 1] = float("nan")  # of two images with two repeats each: image 1, repeat 1
            return features_BD

    verdicts = write_images(tmp_path, 2)
    with pytest.raises(DataError, match=r"(?s)judge colour gives NaN.*1, repeat 1"):
        list(judge_all(verdicts, protocol_named("nd"), Judges([Broken()])))
    assert has_result(verdicts[0].folder, verdicts[0].fingerprint)
    assert not has_result(verdicts[1].folder, verdicts[1].fingerprint), "nothing wrong is kept"


def test_every_judge_of_pairs_gets_both_pictures(tmp_path: Path) -> None:
    protocol, (recons,) = protocol_named("nd"), pictures(3)
    write_png(tmp_path / PICTURE, toy_picture(0))
    original, two = Original(tmp_path, protocol), [ColourDistance("once", 1), ColourDistance("squared", 2)]
    found = pair_metrics(recons, original, protocol, two)
    size = original.pixels_1CHW.shape[-1]
    gap = (replace(protocol.recon_pixels, size=size)(recons) - original.pixels_1CHW).double().abs()
    for judge in two:
        assert found[judge.name] == pytest.approx(gap.pow(judge.power).mean((1, 2, 3)).tolist(), rel=1e-6)
