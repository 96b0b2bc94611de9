from __future__ import annotations

import csv
import json
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import scipy.io

from nd_dist.errors import DataError
from shards.sources.nsd import NsdReader
from shards.sources.nsd_layout import NsdLayout
from shards.sources.open import open_reader
from tests.shards.support import PHANTOM, make_config


def reader_of(nsd_root: Path, **data: object) -> NsdReader:
    reader = open_reader(make_config(nsd_root, nsd_root.parent / "shards", **data))
    assert isinstance(reader, NsdReader)
    return reader


def test_design_tables_and_responses_agree_on_every_0_based_image(phantom_dir: Path) -> None:
    reader, layout = reader_of(phantom_dir), NsdLayout(phantom_dir)
    with open(layout.stim_info, newline="") as stream:
        info = {int(row["nsdId"]): row for row in csv.DictReader(stream)}
    for subject in (1, 2, 3):
        design = reader.design(subject)
        with open(layout.responses(subject), newline="") as stream:
            responses = list(csv.DictReader(stream, delimiter="\t"))
        assert [int(row["73KID"]) - 1 for row in responses] == design.image_id.tolist()
        assert [int(row["SESSION"]) for row in responses] == design.session.tolist()
        for trial, (image_id, repeat) in enumerate(zip(design.image_id, design.repeat, strict=True)):
            row = info[int(image_id)]
            assert int(row[f"subject{subject}_rep{repeat}"]) == trial + 1, "trial numbers are 1-based in NSD's table"
            assert (row["shared1000"] == "True") == bool(design.is_test[trial])


def test_shared_images_are_tests_for_every_subject_and_others_belong_to_one(phantom_dir: Path) -> None:
    reader = reader_of(phantom_dir)
    designs = [reader.design(subject) for subject in (1, 2, 3)]
    shared = scipy.io.loadmat(NsdLayout(phantom_dir).expdesign)["sharedix"].ravel().astype(int) - 1
    own: list[set[int]] = []
    for design in designs:
        assert set(design.image_id[design.is_test]) <= set(shared.tolist())
        own.append(set(design.image_id[~design.is_test].tolist()))
    assert not own[0] & own[1]
    assert not own[1] & own[2]
    assert not set(shared.tolist()) & set.union(*own)


def test_a_subject_with_fewer_sessions_has_fewer_trials_and_test_images(phantom_dir: Path) -> None:
    reader = reader_of(phantom_dir)
    complete, incomplete = reader.design(1), reader.design(2)
    assert complete.sessions == (1, 2, 3, 4)
    assert incomplete.sessions == (1, 2, 3)
    assert incomplete.num_trials == 45
    seen = np.unique(incomplete.image_id[incomplete.is_test], return_counts=True)[1]
    assert len(seen) < PHANTOM.num_shared, "one shared picture was never seen"
    assert seen.min() == 1, "one was seen once"


def test_nifti_and_hdf5_sessions_are_equal_and_are_what_nibabel_masks(phantom_dir: Path) -> None:
    layout = NsdLayout(phantom_dir)
    for subject in (1, 3):
        nifti = reader_of(phantom_dir, betas_format="nifti").read_session(subject, 2)
        hdf5 = reader_of(phantom_dir, betas_format="hdf5").read_session(subject, 2)
        np.testing.assert_array_equal(nifti, hdf5)
        mask = nibabel.load(layout.roi(subject, "nsdgeneral")).get_fdata() > 0
        volumes = nibabel.load(layout.betas(subject, "betas_fithrf_GLMdenoise_RR", 2, ".nii.gz")).get_fdata()
        np.testing.assert_array_equal(nifti, (volumes[mask].T / 300).astype(np.float32))


def test_auto_takes_hdf5_and_falls_back_to_nifti(phantom_copy: Path) -> None:
    expected = reader_of(phantom_copy).read_session(1, 1)
    NsdLayout(phantom_copy).betas(1, "betas_fithrf_GLMdenoise_RR", 1, ".hdf5").unlink()
    np.testing.assert_array_equal(reader_of(phantom_copy).read_session(1, 1), expected)
    with pytest.raises(DataError, match="no betas of session 1"):
        reader_of(phantom_copy, betas_format="hdf5").design(1)


def test_any_named_roi_with_several_positive_labels_can_be_read(phantom_dir: Path) -> None:
    whole, early = reader_of(phantom_dir), reader_of(phantom_dir, roi="prf-visualrois")
    assert 0 < early.design(1).num_voxels < whole.design(1).num_voxels
    labels = nibabel.load(NsdLayout(phantom_dir).roi(1, "prf-visualrois")).get_fdata()
    assert len(np.unique(labels[labels > 0])) == 7
    with pytest.raises(DataError, match="no-such-roi"):
        reader_of(phantom_dir, roi="no-such-roi").design(1)


def test_a_design_tells_all_sessions_and_the_packer_chooses(phantom_dir: Path) -> None:
    design = reader_of(phantom_dir, max_sessions=2).design(1)
    assert design.sessions == (1, 2, 3, 4)
    assert design.num_trials == 60


def test_a_missing_session_in_the_middle_is_said(phantom_copy: Path) -> None:
    for suffix in (".hdf5", ".nii.gz"):
        NsdLayout(phantom_copy).betas(1, "betas_fithrf_GLMdenoise_RR", 2, suffix).unlink()
    with pytest.raises(DataError, match="Subject 1 has no betas of session 2"):
        reader_of(phantom_copy).design(1)


def test_a_missing_last_session_is_said_with_the_way_out(phantom_copy: Path) -> None:
    for suffix in (".hdf5", ".nii.gz"):
        NsdLayout(phantom_copy).betas(1, "betas_fithrf_GLMdenoise_RR", 4, suffix).unlink()
    with pytest.raises(DataError, match="data.max_sessions=3"):
        reader_of(phantom_copy).design(1)
    assert reader_of(phantom_copy, max_sessions=3).design(1).sessions == (1, 2, 3)
    NsdLayout(phantom_copy).responses(1).unlink()
    assert reader_of(phantom_copy).design(1).sessions == (1, 2, 3), "without responses the betas count"


def test_a_subject_or_betas_version_that_does_not_exist_is_said(phantom_dir: Path) -> None:
    with pytest.raises(DataError, match="Subject 7 is not in NSD's design"):
        reader_of(phantom_dir).design(7)
    with pytest.raises(DataError, match="betas_assumehrf"):
        reader_of(phantom_dir, betas="betas_assumehrf").design(1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nsddata/experiments/nsd/nsd_expdesign.mat", "design is missing"),
        ("nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5", "pictures are missing"),
        ("captions/captions_val2017.json", "captions need"),
        ("nsddata/experiments/nsd/nsd_stim_info_merged.csv", "captions need"),
    ],
)
def test_a_missing_file_is_said_when_the_reader_opens(phantom_copy: Path, name: str, message: str) -> None:
    (phantom_copy / name).unlink()
    with pytest.raises(DataError, match=message):
        reader_of(phantom_copy)


def test_captions_are_not_asked_for_without_a_caption_target(phantom_copy: Path) -> None:
    (phantom_copy / "captions/captions_val2017.json").unlink()
    assert reader_of(phantom_copy, targets=("z",)).design(1).num_trials == 60


@pytest.mark.parametrize(
    "name", ["nsddata/experiments/nsd/nsd_expdesign.mat", "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"]
)
def test_a_truncated_file_is_an_error_that_names_it(phantom_copy: Path, name: str) -> None:
    path = phantom_copy / name
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=path.name):
        reader_of(phantom_copy)


def test_betas_of_another_length_or_grid_are_refused(phantom_copy: Path) -> None:
    path = NsdLayout(phantom_copy).betas(1, "betas_fithrf_GLMdenoise_RR", 3, ".hdf5")
    with h5py.File(path, "r") as file:
        betas = file["betas"][:]
    for wrong in (betas[:-1], betas[:, :-1]):
        with h5py.File(path, "w") as file:
            file["betas"] = wrong
        with pytest.raises(DataError, match="betas_session03.hdf5"):
            reader_of(phantom_copy).design(1)


def test_responses_that_contradict_the_design_are_refused(phantom_copy: Path) -> None:
    path = NsdLayout(phantom_copy).responses(1)
    lines = path.read_text().splitlines()
    cells = lines[8].split("\t")
    cells[4] = str(int(cells[4]) % 10 + 1)
    lines[8] = "\t".join(cells)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="trial 7"):
        reader_of(phantom_copy).design(1)


def test_a_design_that_contradicts_itself_is_refused(phantom_copy: Path) -> None:
    path = NsdLayout(phantom_copy).expdesign
    content = {key: value for key, value in scipy.io.loadmat(path).items() if not key.startswith("_")}
    content["sharedix"] = content["sharedix"] - 1  # the 1-based trap
    scipy.io.savemat(path, content)
    with pytest.raises(DataError, match="contradicts itself"):
        reader_of(phantom_copy)


def test_pictures_and_captions_come_in_the_order_asked_for(phantom_dir: Path) -> None:
    reader = reader_of(phantom_dir)
    ids = [5, 0, 5, 2]
    pictures = reader.pictures(ids)
    assert pictures.shape == (4, 64, 64, 3)
    assert (pictures[0] == pictures[2]).all()
    assert (pictures[1] == reader.pictures([0])[0]).all()
    captions = reader.captions(ids)
    assert captions[0] == captions[2]
    assert all(len(texts) == 5 for texts in captions)


def test_a_picture_without_caption_is_an_error(phantom_copy: Path) -> None:
    for split in ("train2017", "val2017"):
        path = phantom_copy / f"captions/captions_{split}.json"
        content = json.loads(path.read_text())
        content["annotations"] = content["annotations"][5:]
        path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="no caption"):
        reader_of(phantom_copy).captions(range(reader_of(phantom_copy).num_images))


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [
        ("SUBJECT", 2, "SUBJECT is 2 instead of 1 in trial 7"),
        ("SESSION", 2, "do not count up|SESSION is 2 instead of 1 in trial 7"),
        ("10KID", 3, "10KID is 3 instead of"),
        ("RUN", 9, "SESSION, RUN, TRIAL do not count up"),
    ],
)
def test_every_identity_that_responses_state_is_compared_with_where_they_lie(
    phantom_copy: Path, column: str, value: int, named: str
) -> None:
    path = NsdLayout(phantom_copy).responses(1)
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    place = lines[0].index(column)
    lines[8][place] = str(value if lines[8][place] != str(value) else value + 1)
    path.write_text("\n".join("\t".join(line) for line in lines) + "\n")
    with pytest.raises(DataError, match=named) as caught:
        reader_of(phantom_copy).design(1)
    assert str(path) in str(caught.value)


def test_another_subjects_responses_are_refused(phantom_copy: Path) -> None:
    layout = NsdLayout(phantom_copy)
    layout.responses(1).write_bytes(layout.responses(3).read_bytes())
    with pytest.raises(DataError, match="SUBJECT is 3 instead of 1|disagree"):
        reader_of(phantom_copy).design(1)


@pytest.mark.parametrize("suffix", [".hdf5", ".nii.gz"])
def test_one_session_delivered_under_two_names_is_refused_before_packing(phantom_copy: Path, suffix: str) -> None:
    paths = [NsdLayout(phantom_copy).betas(1, "betas_fithrf_GLMdenoise_RR", number, suffix) for number in (2, 3)]
    paths[1].write_bytes(paths[0].read_bytes())
    betas_format = "hdf5" if suffix == ".hdf5" else "nifti"
    with pytest.raises(DataError, match="delivered twice") as caught:
        reader_of(phantom_copy, betas_format=betas_format).design(1)
    assert "betas_session03" in str(caught.value)
    assert "betas_session02" in str(caught.value)
    accepted = reader_of(phantom_copy, betas_format=betas_format, accept=("equal-trials",))
    assert accepted.design(1).num_trials == 60


def test_sessions_without_betas_beyond_those_to_train_on_are_absent(phantom_copy: Path) -> None:
    for session in (2, 4):
        for suffix in (".hdf5", ".nii.gz"):
            NsdLayout(phantom_copy).betas(1, "betas_fithrf_GLMdenoise_RR", session, suffix).unlink()
    design = reader_of(phantom_copy, max_sessions=1).design(1)
    assert (design.sessions, design.absent) == ((1, 3), (2, 4))
    assert design.num_trials == 60, "trials keep their numbers"
    with pytest.raises(DataError, match="no betas of session 2"):
        reader_of(phantom_copy, max_sessions=2).design(1)


def test_voxels_below_a_noise_ceiling_are_left_out_and_the_index_says_so(phantom_dir: Path) -> None:
    layout = NsdLayout(phantom_dir)
    labels = np.asarray(nibabel.load(layout.roi(1, "nsdgeneral")).get_fdata())
    snr = np.asarray(nibabel.load(layout.ncsnr(1, "betas_fithrf_GLMdenoise_RR")).get_fdata())
    ceiling = 100 * snr**2 / (snr**2 + 1 / 3)
    whole, reliable = reader_of(phantom_dir).design(1), reader_of(phantom_dir, min_noise_ceiling=60).design(1)
    assert reliable.num_voxels == ((labels > 0) & (ceiling >= 60)).sum()
    assert 0 < reliable.num_voxels < whole.num_voxels
    assert reliable.source["roi"] == "nsdgeneral, noise ceiling at least 60 %"
    with pytest.raises(DataError, match="no voxel with a positive label and a noise ceiling of at least 100 %"):
        reader_of(phantom_dir, min_noise_ceiling=100).design(1)
