"""Named groups of images: their metrics are those of an evaluation of these images alone; bad files are refused."""

import json
from pathlib import Path

import pytest
import torch

from nd_dist.errors import DataError
from nd_dist.evaluation.scoring.groups import group_metrics, read_groups
from nd_dist.metrics.statistics.scores import EACH, WINS, Statistics, scored_arrays

STATISTICS = Statistics(200, 0)
IMAGES = [3, 5, 8, 13, 21, 34]


def made_up_arrays() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    wins = torch.randint(0, 3, (len(IMAGES), len(IMAGES)), generator=generator).int()
    return {
        EACH + "pixcorr": torch.rand(len(IMAGES), generator=generator, dtype=torch.float64),
        WINS + "clip": wins.fill_diagonal_(0),
    }


def test_a_group_scores_as_if_its_images_were_all() -> None:
    arrays = made_up_arrays()
    found = group_metrics(arrays, IMAGES, {"some": (21, 5, 8)}, 2, STATISTICS)["some"]
    rows = torch.tensor([4, 1, 2])
    alone = scored_arrays(
        {EACH + "pixcorr": arrays[EACH + "pixcorr"][rows], WINS + "clip": arrays[WINS + "clip"][rows][:, rows]},
        2,
        "real",
        STATISTICS,
    )
    assert found == {name: item.as_json() for name, item in alone.items()}
    assert found["clip"]["n"] == 3


def test_the_group_of_all_images_has_the_metrics_of_all_images() -> None:
    arrays = made_up_arrays()
    found = group_metrics(arrays, IMAGES, {"all": tuple(IMAGES)}, 2, STATISTICS)["all"]
    assert found == {name: item.as_json() for name, item in scored_arrays(arrays, 2, "real", STATISTICS).items()}


def test_images_that_were_not_evaluated_are_left_out_and_one_image_has_no_distractor() -> None:
    found = group_metrics(made_up_arrays(), IMAGES, {"one": (5, 99), "none": (98, 99)}, 2, STATISTICS)
    assert list(found) == ["one"]
    assert list(found["one"]) == ["pixcorr"]


@pytest.mark.parametrize("content", [["a", "b"], {"a": 3}, {"a": ["3"]}, {"a": [-1]}, {"a": [True]}, {"a": [1.5]}])
def test_a_file_of_other_content_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "groups.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="image groups"):
        read_groups(path)


def test_a_missing_file_says_which_setting_to_change(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"evaluation\.image_groups"):
        read_groups(tmp_path / "none.json")


def test_ids_are_sorted_and_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "groups.json"
    path.write_text('{"b": [3, 1, 3], "a": []}')
    assert read_groups(path) == {"b": (1, 3), "a": ()}
