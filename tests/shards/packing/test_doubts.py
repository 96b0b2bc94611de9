from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from nd_dist.errors import DataError
from shards.format.index import Index
from shards.packing import doubts
from shards.phantom.write import write_phantom
from shards.reading.reader import ShardReader
from shards.sources.nsd_layout import NsdLayout
from shards.upkeep.export_mindeye2 import export
from shards.upkeep.repair import repair
from shards.upkeep.verify import verify
from tests.shards.support import PHANTOM, make_config, pack_alone

BETAS = "betas_fithrf_GLMdenoise_RR"
Betas = npt.NDArray[np.int16]


def rewrite(path: Path, change: Callable[[Betas], None]) -> None:
    """Change the betas (trials, Z, Y, X) of an HDF5 file in place."""
    with h5py.File(path, "r+") as file:
        betas = file["betas"][:]
        change(betas)
        file["betas"][...] = betas


def zero_trial(betas: Betas) -> None:
    betas[3] = 0


def constant_trial(betas: Betas) -> None:
    betas[14] = 7


def zero_tail(betas: Betas) -> None:
    betas[9:] = 0


def half_a_trial(betas: Betas) -> None:
    betas[9].reshape(-1)[: betas[9].size * 4 // 5] = 0


def equal_trials(betas: Betas) -> None:
    betas[5] = betas[4]


def zero_session(betas: Betas) -> None:
    betas[:] = 0


def constant_session(betas: Betas) -> None:
    betas[:] = 300


def dead_voxels(betas: Betas) -> None:
    betas[:, :, :, ::2] = 0


@pytest.mark.parametrize(
    ("change", "kind", "sample"),
    [
        (zero_trial, "constant-trials", "s01_e02_t00018"),
        (constant_trial, "constant-trials", "s01_e02_t00029"),
        (zero_tail, "constant-trials", "s01_e02_t00024"),
        (half_a_trial, "constant-trials", "s01_e02_t00024"),
        (equal_trials, "equal-trials", "s01_e02_t00020"),
        (zero_session, "constant-trials,constant-voxels", "s01_e02"),
        (constant_session, "constant-trials,constant-voxels", "s01_e02"),
        (dead_voxels, "constant-voxels", "s01_e02"),
    ],
)
def test_betas_that_cannot_be_real_are_refused_by_name_and_kept_where_that_is_asked_for(
    phantom_copy: Path, tmp_path: Path, change: Callable[[Betas], None], kind: str, sample: str
) -> None:
    rewrite(NsdLayout(phantom_copy).betas(1, BETAS, 2, ".hdf5"), change)
    folder, settings = tmp_path / "shards", {"subjects": (1,), "targets": (), "pictures": "none"}
    with pytest.raises(DataError, match="cannot be real") as caught:
        pack_alone(make_config(phantom_copy, folder, **settings))
    assert "subject 1, session 2" in str(caught.value)
    assert sample in str(caught.value)
    assert f"data.accept=[{kind}]" in str(caught.value)
    assert not Index.exists(folder)
    accept = tuple(kind.split(","))
    index = pack_alone(make_config(phantom_copy, folder, accept=accept, **settings))
    assert any(sample in doubt for doubt in index.accepted)
    assert {doubt.split(" ")[0] for doubt in index.accepted} <= set(accept)
    assert verify(folder) == []


def test_a_trial_that_is_not_finite_is_named(tmp_path: Path) -> None:
    betas_TV = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    betas_TV[2] = np.nan
    found = doubts.session_doubts(betas_TV, doubts.raw_checksums(betas_TV), [f"t{n}" for n in range(6)], "s01_e01")
    assert found == ["constant-trials t2", "constant-voxels s01_e01"]


def test_a_sound_session_with_some_dead_voxels_and_zeros_has_no_doubt() -> None:
    betas_TV = np.random.default_rng(0).normal(size=(30, 100)).astype(np.float32)
    betas_TV[:, :9] = 0
    betas_TV[:, 9] = np.nan
    betas_TV[4, 10:40] = 0
    assert doubts.session_doubts(betas_TV, doubts.raw_checksums(betas_TV), [""] * 30, "") == []


def blank_pictures(nsd_root: Path, colour: int) -> None:
    """Write the file of pictures anew with the second half of its chunks missing, or of one colour."""
    path = NsdLayout(nsd_root).stimuli
    with h5py.File(path) as file:
        bricks = file["imgBrick"][:]
    path.unlink()
    with h5py.File(path, "w") as file:
        written = file.create_dataset("imgBrick", bricks.shape, "u1", chunks=(1, *bricks.shape[1:]))
        written[: len(bricks) // 2] = bricks[: len(bricks) // 2]
        if colour:
            written[len(bricks) // 2 :] = colour


@pytest.mark.parametrize("colour", [0, 128])
@pytest.mark.parametrize("pictures", ["all", "none"])
def test_pictures_of_one_colour_are_refused_by_name_also_where_only_targets_are_packed(
    phantom_copy: Path, tmp_path: Path, colour: int, pictures: str
) -> None:
    blank_pictures(phantom_copy, colour)
    settings = {"subjects": (1,), "pictures": pictures, "targets": ("z",)}
    with pytest.raises(DataError, match=r"i\d{5}.*of a single colour(.|\n)*data.accept=\[constant-pictures\]"):
        pack_alone(make_config(phantom_copy, tmp_path / "shards", **settings))
    index = pack_alone(make_config(phantom_copy, tmp_path / "shards", accept=("constant-pictures",), **settings))
    assert len(index.accepted) > 5
    assert verify(tmp_path / "shards") == []
    without = {**index.model_dump(mode="json"), "accepted": []}
    write_index(tmp_path / "shards", without)
    found = [problem for problem in verify(tmp_path / "shards") if "single colour" in problem.what]
    assert len(found) == (len(index.accepted) if pictures == "all" else 0), "verify sees what lies in the shards"


def write_index(folder: Path, content: dict[str, object]) -> None:
    from shards.format.index import index_id, json_bytes

    (folder / "index.json").write_bytes(json_bytes({**content, "id": index_id(content)}))


def test_a_file_that_was_downloaded_again_is_packed_by_the_same_command(phantom_copy: Path, tmp_path: Path) -> None:
    path, settings = NsdLayout(phantom_copy).betas(1, BETAS, 2, ".hdf5"), {"subjects": (1,), "targets": ()}
    right = path.read_bytes()
    rewrite(path, zero_tail)
    with pytest.raises(DataError):
        pack_alone(make_config(phantom_copy, tmp_path / "shards", **settings))
    path.write_bytes(right)
    assert pack_alone(make_config(phantom_copy, tmp_path / "shards", **settings)).accepted == ()


def test_trials_that_another_session_has_too_are_refused_when_the_index_is_written(
    phantom_copy: Path, tmp_path: Path
) -> None:
    layout, folder = NsdLayout(phantom_copy), tmp_path / "shards"
    first, second = (layout.betas(1, BETAS, session, ".hdf5") for session in (2, 3))
    right = second.read_bytes()
    with h5py.File(first) as file:
        copied = file["betas"][4]
    rewrite(second, lambda betas: betas.__setitem__(6, copied))
    config = make_config(phantom_copy, folder, subjects=(1,), targets=(), betas_format="hdf5")
    with pytest.raises(DataError, match=r"s01_e03_t00036: the same as another trial"):
        pack_alone(config)
    assert not Index.exists(folder)
    second.write_bytes(right)
    pack_alone(config)
    assert verify(folder) == [], "both sessions were packed again"


def test_a_refused_session_leaves_the_index_of_what_was_there(phantom_copy: Path, tmp_path: Path) -> None:
    folder, settings = tmp_path / "shards", {"subjects": (1,), "targets": (), "betas_format": "hdf5"}
    pack_alone(make_config(phantom_copy, folder, max_sessions=2, max_test_sessions=2, **settings))
    before = (folder / "index.json").read_bytes()
    layout = NsdLayout(phantom_copy)
    with h5py.File(layout.betas(1, BETAS, 2, ".hdf5")) as file:
        copied = file["betas"][4]
    rewrite(layout.betas(1, BETAS, 3, ".hdf5"), lambda betas: betas.__setitem__(6, copied))
    with pytest.raises(DataError, match="the same as another trial"):
        pack_alone(make_config(phantom_copy, folder, **settings))
    assert (folder / "index.json").read_bytes() == before
    assert verify(folder) == []


@pytest.fixture(scope="module")
def mindeye2_root(phantom_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom in MindEye2's layout; read only."""
    folder = tmp_path_factory.mktemp("me2")
    pack_alone(make_config(phantom_dir, folder / "all", pictures="all", targets=(), voxel_dtype="float32"))
    export(ShardReader(folder / "all"), folder / "me2")
    return folder / "me2"


def test_one_persons_data_under_two_names_are_refused_and_found_in_shards_of_an_earlier_version(
    mindeye2_root: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(mindeye2_root, tmp_path / "me2"))
    shutil.copy(root / "betas_all_subj01_fp32_renorm.hdf5", root / "betas_all_subj03_fp32_renorm.hdf5")
    settings = {"reader": "mindeye2", "targets": (), "subjects": (1, 3)}
    with pytest.raises(DataError, match="delivered twice"):
        pack_alone(make_config(root, tmp_path / "a", **settings))
    with h5py.File(root / "betas_all_subj03_fp32_renorm.hdf5", "r+") as file:
        file["betas"][0, 0] += 1  # another first row: what was not seen before packing is seen after it
    with pytest.raises(DataError, match="s03_e01_t00001.*the same as another trial"):
        pack_alone(make_config(root, tmp_path / "b", **settings))
    index = pack_alone(make_config(root, tmp_path / "c", accept=("equal-trials",), **settings))
    assert len(index.accepted) == 59
    earlier = {**index.model_dump(mode="json"), "accepted": []}
    del earlier["accepted"], earlier["tables"]["raw"]  # z-scored records alone
    write_index(tmp_path / "c", earlier)
    found = verify(tmp_path / "c")
    assert {problem.what for problem in found} == {"cannot be real: the same as another trial, voxel by voxel"}
    assert {problem.shard for problem in found} == {f"trials/subj03/nsd-s03-e0{number}.tar" for number in (2, 3, 4)}


def test_verify_finds_a_zero_trial_and_copied_sessions_that_were_packed(phantom_copy: Path, tmp_path: Path) -> None:
    layout, folder = NsdLayout(phantom_copy), tmp_path / "shards"
    rewrite(layout.betas(1, BETAS, 1, ".hdf5"), zero_trial)
    shutil.copy(layout.betas(1, BETAS, 2, ".hdf5"), layout.betas(1, BETAS, 3, ".hdf5"))
    config = make_config(phantom_copy, folder, subjects=(1,), targets=(), accept=("constant-trials", "equal-trials"))
    index = pack_alone(config)
    write_index(folder, {**index.model_dump(mode="json"), "accepted": []})
    found = {str(problem) for problem in verify(folder)}
    assert len(found) == 1 + 15
    assert any("sample s01_e01_t00003: cannot be real: constant" in problem for problem in found)
    assert any("nsd-s01-e03.tar, sample s01_e03_t00030: cannot be real: the same" in problem for problem in found)


def test_a_repair_packs_what_cannot_be_real_again_once_the_files_were_replaced(
    phantom_copy: Path, phantom_dir: Path, tmp_path: Path
) -> None:
    path = NsdLayout(phantom_copy).betas(1, BETAS, 2, ".hdf5")
    rewrite(path, zero_trial)
    folder, settings = tmp_path / "shards", {"subjects": (1,), "targets": ()}
    index = pack_alone(make_config(phantom_copy, folder, accept=("constant-trials",), **settings))
    write_index(folder, {**index.model_dump(mode="json"), "accepted": []})
    shutil.copy(NsdLayout(phantom_dir).betas(1, BETAS, 2, ".hdf5"), path)
    assert repair(folder) == ["trials/subj01/nsd-s01-e02.tar"]
    assert pack_alone(make_config(phantom_copy, folder, **settings)).accepted == ()
    assert verify(folder) == []


def test_two_subjects_in_nsds_layout_with_the_same_files_are_refused(tmp_path: Path) -> None:
    write_phantom(tmp_path / "nsd", PHANTOM, seed=3)
    layout = NsdLayout(tmp_path / "nsd")
    for folder in ("nsddata/ppdata/subj03/func1pt8mm", f"nsddata_betas/ppdata/subj03/func1pt8mm/{BETAS}"):
        shutil.rmtree(tmp_path / "nsd" / folder)
        shutil.copytree(tmp_path / "nsd" / folder.replace("subj03", "subj01"), tmp_path / "nsd" / folder)
    assert layout.betas(3, BETAS, 4, ".hdf5").is_file()
    with pytest.raises(DataError, match="delivered twice(.|\n)*subj03(.|\n)*subj01"):
        pack_alone(make_config(tmp_path / "nsd", tmp_path / "shards", subjects=(1, 3)))
