"""LAION-fMRI's layout, read from a phantom in it: what is uncommon there, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
from PIL import Image

from nd_dist.config import Config, PhantomConfig
from nd_dist.errors import DataError
from shards.format.index import Index
from shards.format.splits import choose_split, representatives
from shards.phantom.laion_fmri import FEW, LACKS_ROI, LACKS_RUN, MANY, NAN_VOXELS
from shards.phantom.nifti import write_nifti
from shards.phantom.write import write_phantom
from shards.reading.reader import ShardReader
from shards.sources.contract import DatasetReader
from shards.sources.laion_fmri_layout import ImageTable, LaionFmriLayout
from shards.sources.open import open_reader
from shards.upkeep.source import verify_source
from shards.upkeep.verify import verify
from tests.shards.support import SEED, folder_bytes, make_config, pack_alone, start_ranks

PHANTOM = PhantomConfig(
    layout="laion-fmri", num_subjects=2, num_sessions=4, trials_per_session=40, num_shared=12, num_voxels=60
)
VERSION = "glmsingle-tedana"
DATA = {"reader": "laion_fmri", "betas": VERSION, "roi": "laiongeneral", "subjects": (1, 3), "pictures": "all"}


def config_of(root: Path, shards: Path | None = None, **data: Any) -> Config:
    return make_config(root, shards or root, **{**DATA, **data})


def open_at(root: Path, **data: Any) -> DatasetReader:
    return open_reader(config_of(root, **data))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small phantom in LAION-fMRI's layout; read only."""
    folder = tmp_path_factory.mktemp("laion") / "data"
    write_phantom(folder, PHANTOM, SEED)
    return folder


@pytest.fixture(scope="module")
def packed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That phantom, packed by one process; read only."""
    folder = tmp_path_factory.mktemp("laion_packed") / "shards"
    pack_alone(config_of(root, folder))
    return folder


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """A copy of the phantom that a test may damage."""
    return Path(shutil.copytree(root, tmp_path / "data"))


def rows_of(path: Path, delimiter: str = "\t") -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream, delimiter=delimiter))


def rewrite(path: Path, change: Callable[[list[dict[str, str]]], None], delimiter: str = "\t") -> None:
    rows = rows_of(path, delimiter)
    change(rows)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(stream.getvalue())


def volume(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).get_fdata())


def test_settings_and_seed_decide_every_byte_of_the_phantom(root: Path, tmp_path: Path) -> None:
    write_phantom(tmp_path / "again", PHANTOM, SEED)
    written, again = folder_bytes(root), folder_bytes(tmp_path / "again")
    assert written.keys() == again.keys()
    assert [name for name in written if written[name] != again[name]] == []


def test_betas_are_those_of_the_volumes_under_roi_and_brain_mask_as_stored_and_scaled(root: Path) -> None:
    layout, reader = LaionFmriLayout(root), open_at(root)
    for subject in (1, 3):
        is_roi = volume(layout.roi(subject, "laion", "laiongeneral")) > 0
        is_chosen = is_roi & (volume(layout.brain_mask(subject)) > 0)
        assert is_chosen.sum() == is_roi.sum() - 1 == reader.design(subject).num_voxels
        for session in (1, 2, 3, 4):
            expected = volume(layout.betas(subject, VERSION, session))[is_chosen].T
            np.testing.assert_allclose(reader.read_session(subject, session), expected, rtol=1e-6)


def test_trials_are_those_of_the_tables_and_ids_are_rows_of_the_metadata(root: Path) -> None:
    layout = LaionFmriLayout(root)
    names = [row["image_name"] for row in rows_of(layout.stimuli("metadata.csv"), ",")]
    assert names != sorted(names)
    for subject, name in ((1, "sub-01"), (3, "sub-03")):
        design = open_at(root).design(subject)
        tables = [rows_of(layout.trials(subject, VERSION, session)) for session in design.sessions]
        labels = [row["label"] for table in tables for row in table]
        assert [names[image_id] for image_id in design.image_id] == labels
        assert [int(row["session"][4:]) for table in tables for row in table] == design.session.tolist()
        assert design.is_test.tolist() == [label.startswith("shared_") for label in labels]
        assert design.name == name


def test_sessions_differ_in_trials_a_run_is_missing_and_images_differ_in_repeats(root: Path) -> None:
    designs = {subject: open_at(root).design(subject) for subject in (1, 3)}
    counts = {s: [len(design.trials_of(session)) for session in design.sessions] for s, design in designs.items()}
    assert counts[1][0] < counts[1][1]
    assert counts[LACKS_RUN][1] < counts[1][1]
    repeats = np.unique(designs[1].image_id, return_counts=True)[1]
    assert {MANY, FEW} <= set(repeats.tolist())
    assert repeats.min() < FEW
    assert designs[1].repeat.max() == MANY - 1


def test_a_session_of_another_experiment_and_masks_of_another_grid_are_left_alone(root: Path) -> None:
    assert (root / "derivatives" / VERSION / "sub-01/ses-31/func").is_dir()
    assert open_at(root).design(1).sessions == (1, 2, 3, 4)
    assert list(LaionFmriLayout(root).rois_dir(1).glob("*/*res-1pt5*"))


def test_pictures_are_shown_over_grey_and_decoded_in_the_order_asked_for(root: Path) -> None:
    layout = LaionFmriLayout(root)
    images = ImageTable(layout)
    png = next(image_id for image_id, name in enumerate(images.names) if name.endswith(".png"))
    jpg = next(image_id for image_id, name in enumerate(images.names) if name.endswith(".jpg"))
    with h5py.File(layout.stimuli("stimuli.h5")) as file:
        stored = [Image.open(io.BytesIO(bytes(file["images"][image_id]))) for image_id in (png, jpg)]
    shown = open_at(root).pictures([png, jpg])
    rgba = np.asarray(stored[0]).astype(float)
    alpha = rgba[..., 3:] / 255
    assert 0 < alpha.min() < 1
    np.testing.assert_allclose(shown[0], rgba[..., :3] * alpha + 128 * (1 - alpha), atol=1)
    assert (shown[1] == np.asarray(stored[1])).all()
    assert (open_at(root).pictures([jpg, png]) == shown[::-1]).all()


def test_captions_are_what_people_wrote_with_commas_quotes_and_line_ends(root: Path) -> None:
    layout = LaionFmriLayout(root)
    rows = rows_of(layout.stimuli("desc-captions.csv"), ",")
    by_name: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: int(row["caption_idx"])):
        if row["source"] == "human":
            by_name.setdefault(row["image_name"], []).append(row["caption"])
    names = ImageTable(layout).names
    captions = open_at(root).captions(range(len(names)))
    assert [list(texts) for texts in captions] == [by_name[name] for name in names]
    assert any('"' in text and "," in text and "\n" in text for texts in captions for text in texts)
    assert not any("language model" in text for texts in captions for text in texts)
    assert {len(texts) for texts in captions} == {3, 5}


def test_a_roi_is_a_label_a_category_everything_or_a_sum_of_these(root: Path) -> None:
    def chosen(roi: str, **data: Any) -> int:
        return open_at(root, roi=roi, **data).design(1).num_voxels

    assert chosen("retinotopy") == chosen("V1v+V1d") == chosen("V1v") + chosen("V1d")
    assert chosen("all") == chosen("laiongeneral") == chosen("laiongeneral+face")
    assert 0 < chosen("all", min_noise_ceiling=85) < chosen("all")
    with pytest.raises(DataError, match=f"(?s)Subject {LACKS_ROI} has no ROI 'FFA1'.*V1d, V1v"):
        open_at(root, roi="FFA1").design(LACKS_ROI)


def test_voxels_that_are_nan_in_a_session_or_in_one_trial_are_zero_in_that_session(packed: Path) -> None:
    reader = ShardReader(packed)
    for session, voxel in zip((1, 2), NAN_VOXELS, strict=True):
        for other in (1, 2, 4):
            rows = reader.trials_of(1, [other])
            values = np.empty((len(rows), reader.num_voxels[1]), dtype=reader.index.voxels.dtype)
            reader.read_voxels(rows, values)
            assert (values[:, voxel] == 0).all() == (other == session)


def test_packed_shards_prove_themselves_and_know_the_data_sets_names(packed: Path) -> None:
    index = Index.read(packed)
    assert verify(packed) == []
    assert {subject: info.name for subject, info in index.subjects.items()} == {1: "sub-01", 3: "sub-03"}
    assert index.is_simulated
    assert {"tau", "ood", "cluster_k5_4", "random_0", "pooled/tau", "shared/tau"} <= set(index.splits)
    assert {"OOD", "not OOD", "LAION", "cluster 0"} <= set(index.groups)


@pytest.mark.launch
def test_two_ranks_pack_the_same_bytes(root: Path, packed: Path, tmp_path: Path) -> None:
    output = start_ranks(2, root, tmp_path / "shards", **DATA).communicate()[0]
    written, expected = folder_bytes(tmp_path / "shards"), folder_bytes(packed)
    assert written.keys() == expected.keys(), output.decode()
    assert [name for name in written if written[name] != expected[name]] == []


def test_a_split_file_is_read_by_its_folder_and_copies_never_lie_on_both_sides(root: Path, packed: Path) -> None:
    index, names = Index.read(packed), ImageTable(LaionFmriLayout(root)).names
    same = representatives(index)
    assert len(np.unique(same)) == len(names) - 1
    for split in index.splits:
        for subject, pool in ((1, "sub-01"), (3, "sub-03")):
            if not (path := root / "splits" / pool / f"{split}.json").exists():
                continue
            variant = json.loads(path.read_text())["variants"][0]
            reader = ShardReader.over(choose_split(index, split, [subject]))
            assert {names[i] for i in reader.images(subject, "test")} == set(variant["test_ids"])
            left_out = set(variant["train_ids"]) - {names[i] for i in reader.images(subject, "train")}
            assert len(left_out) <= 1
        together = ShardReader.over(choose_split(index, split, [1, 3]))
        tested = {same[i] for subject in (1, 3) for i in together.images(subject, "test")}
        assert not tested & {same[i] for subject in (1, 3) for i in together.images(subject, "train")}


def trials_path(root: Path, session: int = 2) -> Path:
    return LaionFmriLayout(root).trials(1, VERSION, session)


def betas_path(root: Path, session: int = 2) -> Path:
    return LaionFmriLayout(root).betas(1, VERSION, session)


def _swap_indices(root: Path) -> None:
    def swap(rows: list[dict[str, str]]) -> None:
        rows[0]["beta_index"], rows[1]["beta_index"] = "1", "0"

    rewrite(trials_path(root), swap)


def _of_another_subject(root: Path) -> None:
    own = LaionFmriLayout(root).trials(3, VERSION, 1)
    label = next(row["label"] for row in rows_of(own) if row["label"].startswith("unique_"))
    rewrite(trials_path(root), lambda rows: rows[4].update(label=label))


def _on_another_grid(root: Path) -> None:
    layout = LaionFmriLayout(root)
    shutil.copy(layout.roi(1, "laion", "laiongeneral", "1pt5"), layout.roi(1, "laion", "laiongeneral"))


def _elsewhere(root: Path) -> None:
    path = betas_path(root)
    write_nifti(path, volume(path).astype(np.float32), voxel_mm=2.0)


def _whole_numbers(root: Path) -> None:
    path = betas_path(root)
    write_nifti(path, np.nan_to_num(volume(path)).astype(np.int16), voxel_mm=1.778)


def _as_a_share(root: Path) -> None:
    path = LaionFmriLayout(root).noise_ceiling(1, VERSION)
    write_nifti(path, (volume(path) / 100).astype(np.float32), voxel_mm=1.778)


def _fewer_pictures(root: Path) -> None:
    with h5py.File(LaionFmriLayout(root).stimuli("stimuli.h5"), "r+") as file:
        images = [np.asarray(image) for image in file["images"][:-1]]
        del file["images"]
        file.create_dataset("images", shape=(len(images),), dtype=h5py.vlen_dtype(np.uint8))[:] = images


def _two_names(root: Path) -> None:
    path = LaionFmriLayout(root).stimuli("metadata.csv")
    rewrite(path, lambda rows: rows[0].update(rows[1]), ",")


def _wrong_kind(root: Path) -> None:
    path = LaionFmriLayout(root).stimuli("metadata.csv")
    rewrite(path, lambda rows: rows[0].update(unique_or_shared="both"), ",")


def _unknown_source(root: Path) -> None:
    path = LaionFmriLayout(root).stimuli("desc-captions.csv")
    rewrite(path, lambda rows: rows[0].update(source="machine"), ",")


def _leaky_split(root: Path) -> None:
    path = root / "splits/sub-01/tau.json"
    content = json.loads(path.read_text())
    content["variants"][0]["train_ids"][0] = content["variants"][0]["test_ids"][0]
    path.write_text(json.dumps(content))


def _short_split(root: Path) -> None:
    path = root / "splits/sub-01/tau.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "n_test": 1}))


def _unknown_in_split(root: Path) -> None:
    path = root / "splits/sub-01/tau.json"
    content = json.loads(path.read_text())
    content["variants"][0]["train_ids"][0] = "unique_LAION_nowhere_p01.jpg"
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda root: rewrite(trials_path(root), lambda rows: rows.pop()), "ses-02_task.*expected.*num_trials=39"),
        (lambda root: rewrite(trials_path(root), lambda rows: rows[3].update(label="x.jpg")), "trials.tsv.*'x.jpg'"),
        (lambda root: rewrite(trials_path(root), lambda rows: rows[3].update(run="13")), "trials.tsv.*runs 1 .. 12"),
        (lambda root: shutil.copy(trials_path(root, 1), trials_path(root)), "trials.tsv.*ses-02.*ses-01"),
        (_swap_indices, "trials.tsv.*beta_index 0 .. 39"),
        (_of_another_subject, "trials.tsv.*end in _p01.*_p04"),
        (lambda root: trials_path(root).unlink(), "missing.*ses-02.*trials.tsv"),
        (lambda root: betas_path(root).unlink(), "no betas of session 2.*max_sessions=1"),
        (lambda root: shutil.copy(betas_path(root, 1), betas_path(root)), "Betas do not fit ROI and table of trials"),
        (_on_another_grid, "not on the brain mask's grid.*laiongeneral"),
        (_elsewhere, "lie elsewhere.*ses-02"),
        (_whole_numbers, "whole numbers without a scale.*ses-02"),
        (_as_a_share, "not in percent.*Noiseceiling12rep"),
        (_fewer_pictures, "as many pictures.*stimuli.h5"),
        (_two_names, "metadata.csv.*1 names stand there twice"),
        (_wrong_kind, "metadata.csv.*unique_or_shared 'both'"),
        (_unknown_source, "captions.csv.*machine"),
        (_leaky_split, "trains on images that it tests.*tau.json"),
        (_short_split, "contradicts itself.*tau.json.*1 test images"),
        (_unknown_in_split, "does not hold.*tau.json.*nowhere"),
    ],
)
def test_what_is_not_as_described_is_refused_by_file_expected_and_found(
    damage: Callable[[Path], object], named: str, copy: Path, tmp_path: Path
) -> None:
    damage(copy)
    with pytest.raises(DataError, match=f"(?s){named}"):
        pack_alone(config_of(copy, tmp_path / "shards", min_noise_ceiling=1))
    assert not Index.exists(tmp_path / "shards")


def test_a_data_set_is_proved_before_it_is_packed(root: Path, copy: Path) -> None:
    assert list(verify_source(config_of(root))) == []
    path = betas_path(copy, 4)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    LaionFmriLayout(copy).trials(3, VERSION, 1).unlink()
    with h5py.File(LaionFmriLayout(copy).stimuli("stimuli.h5"), "r+") as file:
        file["images"][5] = np.frombuffer(b"no picture", dtype=np.uint8)
    problems = list(verify_source(config_of(copy)))
    assert len(problems) <= 3
    assert any("subject 1, session 4: " in problem and path.name in problem for problem in problems)
    assert any(problem.startswith("subject 3: ") and "trials.tsv" in problem for problem in problems)


def test_subjects_have_gaps_and_a_number_between_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)no subject 2.*1, 3, 5, 6, 7"):
        open_at(root).design(2)


def test_without_its_betas_a_later_session_is_left_out(copy: Path) -> None:
    betas_path(copy, 4).unlink()
    design = open_at(copy, max_sessions=2).design(1)
    assert design.sessions == (1, 2, 3)
    assert design.absent == (4,)


def test_without_split_files_there_is_the_own_split_alone(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "splits")
    index = pack_alone(config_of(copy, tmp_path / "shards"))
    assert index.splits == ()
    assert "OOD" in index.groups
