from __future__ import annotations

import io
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import webdataset

from nd_dist.config import Config
from nd_dist.errors import DataError
from shards.sources.contract import DatasetReader
from shards.sources.open import open_reader
from shards.upkeep.verify import verify
from tests.shards.support import make_config, pack_alone


@pytest.fixture(scope="module")
def source(phantom_dir: Path) -> DatasetReader:
    return open_reader(make_config(phantom_dir, phantom_dir))


def npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def write_tar(path: Path, rows: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        for number, row in enumerate(rows):
            others = {f"{name}_behav.npy": npy(np.full((15, 17), -1.0)) for name in ("past", "future", "olds")}
            tar.write({"__key__": f"sample{number:09d}", "behav.npy": npy(row[None]), **others})


@pytest.fixture
def mindeye2_dir(source: DatasetReader, tmp_path: Path) -> Path:
    """The phantom in MindEye2's published layout."""
    root = tmp_path / "mindeye2"
    for subject in (1, 2):
        design = source.design(subject)
        betas = np.concatenate([source.read_session(subject, session) for session in design.sessions])
        root.mkdir(exist_ok=True)
        with h5py.File(root / f"betas_all_subj{subject:02d}_fp32_renorm.hdf5", "w") as file:
            file["betas"] = betas
        rows = []
        for trial in range(design.num_trials):
            row = np.full(17, np.nan)
            row[[0, 1, 2, 5]] = design.image_id[trial], subject, design.session[trial], trial
            row[16] = design.is_test[trial]
            rows.append(row)
        for session in design.sessions:
            train = [rows[t] for t in design.trials_of(session) if not design.is_test[t]]
            write_tar(root / f"wds/subj{subject:02d}/train/{session - 1}.tar", train)
        write_tar(root / f"wds/subj{subject:02d}/new_test/0.tar", [row for row in rows if row[16]])
    ids = range(source.num_images)
    with h5py.File(root / "coco_images_224_float16.hdf5", "w") as file:
        file["images"] = (source.pictures(ids).transpose(0, 3, 1, 2) / 255).astype(np.float16)
    captions = [(*texts[:4], "") for texts in source.captions(ids)]
    np.save(root / "COCO_73k_annots_curated.npy", np.array(captions))
    return root


def config_of(root: Path, **data: object) -> Config:
    return make_config(root, root.parent / "shards", reader="mindeye2", subjects=(1, 2), **data)


def test_the_design_is_that_of_the_same_data_in_nsds_layout(mindeye2_dir: Path, source: DatasetReader) -> None:
    reader = open_reader(config_of(mindeye2_dir))
    for subject in (1, 2):
        found, expected = reader.design(subject), source.design(subject)
        assert found.num_voxels == expected.num_voxels
        for name in ("session", "image_id", "is_test", "repeat"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        np.testing.assert_array_equal(reader.read_session(subject, 2), source.read_session(subject, 2))


def test_pictures_survive_half_precision_and_empty_captions_are_left_out(
    mindeye2_dir: Path, source: DatasetReader
) -> None:
    reader = open_reader(config_of(mindeye2_dir))
    assert (reader.pictures([3, 1]) == source.pictures([3, 1])).all()
    assert reader.captions([3, 1]) == [texts[:4] for texts in source.captions([3, 1])]


def test_it_packs_and_proves_itself(mindeye2_dir: Path) -> None:
    config = config_of(mindeye2_dir)
    index = pack_alone(config)
    assert verify(config.shards_dir) == []
    assert index.source["reader"] == "mindeye2"


def test_a_missing_session_is_said_with_the_way_out(mindeye2_dir: Path) -> None:
    (mindeye2_dir / "wds/subj01/train/3.tar").unlink()
    with pytest.raises(DataError, match="data.max_sessions=3"):
        open_reader(config_of(mindeye2_dir)).design(1)
    design = open_reader(config_of(mindeye2_dir, max_sessions=3)).design(1)
    last = design.trials_of(4)
    assert (design.image_id[last] >= 0).tolist() == design.is_test[last].tolist(), "its test trials are known"


def test_every_missing_session_in_the_middle_is_named_and_the_way_out_works(mindeye2_dir: Path) -> None:
    for number in (1, 2):
        (mindeye2_dir / f"wds/subj01/train/{number}.tar").unlink()
    with pytest.raises(
        DataError, match=r"not complete(.|\n)*1\.tar, 2\.tar(.|\n)*sessions 1, 4(.|\n)*max_sessions=1$"
    ):
        open_reader(config_of(mindeye2_dir)).design(1)
    assert open_reader(config_of(mindeye2_dir, max_sessions=1)).design(1).num_trials == 60


@pytest.mark.parametrize(
    "name",
    [
        "betas_all_subj01_fp32_renorm.hdf5",
        "coco_images_224_float16.hdf5",
        "COCO_73k_annots_curated.npy",
        "wds/subj01/new_test/0.tar",
        "wds/subj01/train/2.tar",
    ],
)
def test_a_missing_or_truncated_file_is_named(mindeye2_dir: Path, name: str) -> None:
    path = mindeye2_dir / name
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=path.name):
        open_reader(config_of(mindeye2_dir)).design(1)
    if "train" not in name:
        path.unlink()
        with pytest.raises(DataError, match=path.name):
            open_reader(config_of(mindeye2_dir)).design(1)


def test_captions_that_are_python_objects_are_refused(mindeye2_dir: Path) -> None:
    path = mindeye2_dir / "COCO_73k_annots_curated.npy"
    np.save(path, np.array([["a", None]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="Python objects"):
        open_reader(config_of(mindeye2_dir))


@pytest.mark.parametrize("kind", ["link", "hard link", "device", "up", "absolute", "pickle", "large", "huge header"])
def test_a_hostile_tar_is_refused(mindeye2_dir: Path, kind: str) -> None:
    path = mindeye2_dir / "wds/subj01/train/2.tar"
    member = tarfile.TarInfo("sample000000001.behav.npy")
    content = b""
    if kind in ("link", "hard link", "device"):
        member.type = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}[kind]
        member.linkname = "/etc/passwd"
    elif kind in ("up", "absolute", "pickle"):
        member.name = {"up": "../x.behav.npy", "absolute": "/x.behav.npy", "pickle": "x.behav.pkl"}[kind]
    elif kind == "large":
        content = bytes(2 << 20)
    member.size = len(content)
    headers = {"comment": "x" * 2_000_000} if kind == "huge header" else {}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
        tar.addfile(member, io.BytesIO(content))
    with pytest.raises(DataError, match=r"2\.tar") as caught:
        open_reader(config_of(mindeye2_dir)).design(1)
    assert "plain npy file" in str(caught.value)


def test_behaviour_that_is_a_python_object_is_refused(mindeye2_dir: Path) -> None:
    path = mindeye2_dir / "wds/subj01/train/2.tar"
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo("sample000000001.behav.npy")
        member.size = len(stream.getvalue())
        tar.addfile(member, io.BytesIO(stream.getvalue()))
    with pytest.raises(DataError, match="allow_pickle"):
        open_reader(config_of(mindeye2_dir)).design(1)
