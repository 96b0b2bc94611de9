from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import webdataset

from nd_dist.errors import ConfigError, DataError
from nd_dist.events import events_path, read_events
from shards.format.index import Index
from shards.packing.pack import plan_pack
from shards.reading.reader import ShardReader
from shards.sources.nsd_layout import NsdLayout
from shards.upkeep.verify import verify
from tests.shards.support import MPIRUN, TARGETS, PooledExtractor, folder_bytes, make_config, pack_alone, start_ranks
from tests.support.waiting import HANG_S, wait_until


@pytest.mark.launch
@pytest.mark.skipif(not MPIRUN.exists(), reason="needs the extra mpi")
def test_several_ranks_pack_the_same_bytes(phantom_dir: Path, packed_dir: Path, tmp_path: Path) -> None:
    process = start_ranks(3, phantom_dir, tmp_path / "shards")
    output, _ = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, output.decode()
    assert folder_bytes(tmp_path / "shards") == folder_bytes(packed_dir)
    progress = [
        [event for event in read_events(events_path(tmp_path / "run", rank)) if event["event"] == "progress"][-1]
        for rank in range(3)
    ]
    assert all(event["done"] == event["total"] for event in progress)


@pytest.mark.parametrize("shards_before", [1, 20])
def test_a_kill_at_any_moment_leaves_something_that_resumes_to_the_same_bytes(
    phantom_dir: Path, packed_dir: Path, tmp_path: Path, shards_before: int
) -> None:
    folder = tmp_path / "shards"
    process = start_ranks(1, phantom_dir, folder, pause_s=0.02)
    wait_until(lambda: len(list(folder.glob(".pack/*.json"))) >= shards_before, pause_s=0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not Index.exists(folder), "the index is written last"
    finished = {path: path.stat().st_mtime_ns for path in folder.rglob("*.tar")}
    assert len(finished) >= shards_before
    receipts = {path.name.removesuffix(".json") for path in folder.glob(".pack/*.json")}
    pack_alone(make_config(phantom_dir, folder))
    assert folder_bytes(folder) == folder_bytes(packed_dir), "equal, and nothing half-written is left"
    kept = {path: path.stat().st_mtime_ns for path in finished if path.name in receipts}
    assert kept == {path: finished[path] for path in kept}, "finished shards are not packed again"


def test_packing_again_changes_nothing(packed_copy: Path, phantom_dir: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in packed_copy.rglob("*")}
    extractor = PooledExtractor()
    pack_alone(make_config(phantom_dir, packed_copy), extractor)
    assert {path: path.stat().st_mtime_ns for path in packed_copy.rglob("*")} == times
    assert extractor.batches == []


def test_the_plan_tells_the_shards_and_their_bytes(phantom_dir: Path, packed_dir: Path) -> None:
    plan = plan_pack(make_config(phantom_dir, packed_dir), PooledExtractor.specs)
    index = Index.read(packed_dir)
    planned = {shard.path: shard for shard in plan.shards}
    assert planned.keys() == {shard.path for shard in index.shards}
    for shard in index.shards:
        assert planned[shard.path].samples == shard.samples
        if shard.kind != "img":  # PNG sizes are estimates
            assert planned[shard.path].num_bytes == shard.bytes
    assert f"{len(index.shards)} shards" in plan.describe()
    assert plan.num_trials == len(index.trials)


def test_a_plan_without_networks_says_whose_bytes_it_does_not_know(phantom_dir: Path, tmp_path: Path) -> None:
    plan = plan_pack(make_config(phantom_dir, tmp_path))
    assert plan.unknown_targets == TARGETS
    assert "c, z, g02 not counted" in plan.describe()
    assert list(tmp_path.iterdir()) == []


def test_batches_begin_at_the_first_image_of_a_shard(phantom_dir: Path, tmp_path: Path) -> None:
    extractor = PooledExtractor()
    pack_alone(make_config(phantom_dir, tmp_path / "shards"), extractor)
    plan = plan_pack(make_config(phantom_dir, tmp_path / "shards"))
    shards = [unit.image_ids for unit in plan.units if hasattr(unit, "image_ids")]
    assert extractor.batches == [ids[start : start + 4] for ids in shards for start in range(0, len(ids), 4)]


def test_images_are_grouped_by_who_sees_them(packed_dir: Path) -> None:
    index = Index.read(packed_dir)
    shared = {image_id for subject in (1, 2, 3) for image_id in ShardReader(packed_dir).images(subject, "test")}
    table = index.table("z")
    for number, shard in enumerate(index.shards):
        if shard.kind == "z":
            images = set(np.flatnonzero(table["shard"] == number).tolist())
            assert (images <= shared) == (shard.group == "shared")
    assert {shard.group for shard in index.shards if shard.kind == "img"} == {"shared"}
    assert len({Path(shard.path).name for shard in index.shards}) == len(index.shards), "basenames are unique"


def test_adding_a_store_leaves_the_others_untouched(phantom_dir: Path, packed_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    before = pack_alone(make_config(phantom_dir, folder, targets=("z",), pictures="none"))
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.tar")}
    after = pack_alone(make_config(phantom_dir, folder))
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert folder_bytes(folder) == folder_bytes(packed_dir), "added or packed at once, the bytes are the same"
    assert before.id != after.id
    assert before.content_id((1, 2), ("z",)) == after.content_id((1, 2), ("z",)), "a run on z may be resumed"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"normalization": "mindeye1"}, "normalization"),
        ({"voxel_dtype": "float32"}, "voxel_dtype"),
        ({"roi": "prf-visualrois"}, "roi"),
        ({"images_per_shard": 5}, "images"),
    ],
)
def test_a_folder_never_mixes_two_recipes(
    phantom_dir: Path, packed_copy: Path, change: dict[str, object], named: str
) -> None:
    before = folder_bytes(packed_copy)
    with pytest.raises(DataError, match="other settings") as caught:
        pack_alone(make_config(phantom_dir, packed_copy, **change))
    assert named in str(caught.value)
    assert folder_bytes(packed_copy) == before


def test_other_networks_are_refused_too(phantom_dir: Path, packed_copy: Path) -> None:
    with pytest.raises(DataError, match="extractor"):
        pack_alone(make_config(phantom_dir, packed_copy), PooledExtractor(revision=2))


@pytest.mark.parametrize("normalization", ["mindeye1", "mindeye2", "brain-diffuser"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_normalization_packs_and_proves_itself(
    phantom_dir: Path, tmp_path: Path, normalization: str, dtype: str
) -> None:
    config = make_config(
        phantom_dir, tmp_path / "shards", normalization=normalization, voxel_dtype=dtype, targets=(), pictures="none"
    )
    index = pack_alone(config)
    assert verify(tmp_path / "shards") == []
    assert {info.normalization for info in index.subjects.values()} == {normalization}
    assert index.features == {}


def test_brain_diffuser_statistics_are_those_of_the_training_images_means(phantom_dir: Path, tmp_path: Path) -> None:
    from shards.sources.open import open_reader

    config = make_config(phantom_dir, tmp_path / "shards", normalization="brain-diffuser", targets=(), subjects=(1,))
    pack_alone(config)
    source = open_reader(config)
    design = source.design(1)
    betas = np.concatenate([source.read_session(1, session) for session in design.sessions]).astype(np.float64)
    train_ids = np.unique(design.image_id[~design.is_test])
    fitted = np.stack([betas[design.image_id == image_id].mean(axis=0) for image_id in train_ids])
    is_alive = np.all([np.ptp(betas[design.session == s], axis=0) > 0 for s in design.sessions], axis=0)
    expected = (betas - fitted.mean(axis=0)) / np.maximum(fitted.std(axis=0, ddof=1), 1e-9)
    ids = ShardReader(tmp_path / "shards").images(1, "train")
    means = np.stack([expected[design.image_id == image_id].mean(axis=0) for image_id in ids])
    found = ShardReader(tmp_path / "shards").voxels(1, ids)
    np.testing.assert_allclose(found[:, is_alive], means[:, is_alive], atol=4e-3)


def test_trials_of_all_sessions_read_with_stock_webdataset(packed_dir: Path) -> None:
    reader = ShardReader(packed_dir)
    urls = [str(packed_dir / f"trials/subj01/nsd-s01-e{session:02d}.tar") for session in (1, 2, 3, 4)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    rows = reader.trials[reader.trials["subject"] == 1]
    assert len(samples) == len(rows)
    for sample, row in zip(samples, rows, strict=True):
        assert (
            sample["__key__"] == f"s01_e{row['session']:02d}_t{row['trial']:05d}_i{row['image']:05d}_r{row['repeat']}"
        )
        record = np.empty(reader.num_voxels[1], "<f2")
        reader.read_voxels(row[None], record[None])
        np.testing.assert_array_equal(sample["voxels.npy"], record)
    pictures = list(
        webdataset.WebDataset(str(packed_dir / "features/img/nsd-img-shared-000.tar"), shardshuffle=False).decode(
            "rgb8"
        )
    )
    assert (pictures[0]["png"] == reader.pictures([int(pictures[0]["__key__"][1:])])[0]).all()


def test_damaged_betas_stop_packing_and_name_the_file(phantom_copy: Path, tmp_path: Path) -> None:
    path = NsdLayout(phantom_copy).betas(2, "betas_fithrf_GLMdenoise_RR", 3, ".nii.gz")
    path.write_bytes(path.read_bytes()[:-40])
    folder = tmp_path / "shards"
    with pytest.raises(DataError, match=r"subj02.*betas_session03\.nii\.gz"):
        pack_alone(make_config(phantom_copy, folder, betas_format="nifti"))
    assert not Index.exists(folder)
    assert not list(folder.rglob("*.part"))


def test_a_damaged_receipt_says_what_to_do(phantom_dir: Path, packed_copy: Path) -> None:
    receipt = packed_copy / ".pack/nsd-s01-e02.tar.json"
    receipt.write_text("{}")
    with pytest.raises(DataError, match="receipt is damaged"):
        pack_alone(make_config(phantom_dir, packed_copy))
    receipt.unlink()
    pack_alone(make_config(phantom_dir, packed_copy))
    assert verify(packed_copy) == []


def test_parts_of_dead_packers_are_removed_and_of_running_ones_kept(phantom_dir: Path, packed_copy: Path) -> None:
    import socket

    host = socket.gethostname()
    dead = packed_copy / f"trials/subj01/a.tar.{host}-{2**22 + 1}-1.part"
    running = packed_copy / f"trials/subj01/b.tar.{host}-{os.getpid()}-1.part"
    elsewhere = packed_copy / "trials/subj01/c.tar.far.away-1-1.part"
    old = packed_copy / "trials/subj01/d.tar.far.away-2-1.part"
    for path in (dead, running, elsewhere, old):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    pack_alone(make_config(phantom_dir, packed_copy))
    assert [path.exists() for path in (dead, running, elsewhere, old)] == [False, True, True, False]


def test_a_target_that_the_networks_do_not_make_is_refused(phantom_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="g12"):
        pack_alone(make_config(phantom_dir, tmp_path / "shards", targets=("z", "g12")))


def test_a_target_of_another_shape_or_not_finite_is_refused(phantom_dir: Path, tmp_path: Path) -> None:
    class Broken(PooledExtractor):
        def extract(self, *args: object) -> dict[str, np.ndarray]:  # type: ignore[override]
            values = super().extract(*args)  # type: ignore[arg-type]
            return {**values, "z": values["z"][:, :2]} if self.is_short else {**values, "z": values["z"] * np.nan}

        is_short = True

    broken = Broken()
    with pytest.raises(DataError, match="another shape"):
        pack_alone(make_config(phantom_dir, tmp_path / "shards"), broken)
    broken.is_short = False
    with pytest.raises(DataError, match="z of image"):
        pack_alone(make_config(phantom_dir, tmp_path / "shards"), broken)
    assert not list((tmp_path / "shards").rglob("*.part"))


def test_a_disk_that_takes_no_more_bytes_leaves_nothing_half_written(phantom_dir: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(DataError, match="could not be written"):
            pack_alone(make_config(phantom_dir, tmp_path / "shards"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "shards").rglob("*.tar*"))
    pack_alone(make_config(phantom_dir, tmp_path / "shards"))
    assert verify(tmp_path / "shards") == []


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 9])
def test_units_are_shared_completely_and_evenly(phantom_dir: Path, packed_dir: Path, ranks: int) -> None:
    from shards.packing.pack import share
    from shards.packing.plan import ImageUnit

    plan = plan_pack(make_config(phantom_dir, packed_dir))
    sizes = [len(unit.image_ids) if isinstance(unit, ImageUnit) else 15 for unit in plan.units]
    shares = [share(plan.units, sizes, rank, ranks) for rank in range(ranks)]
    assert sorted(map(str, (unit for part in shares for unit in part))) == sorted(map(str, plan.units))
    for kind, most in ((True, 6), (False, 15)):
        loads = [
            sum(
                s
                for unit, s in zip(plan.units, sizes, strict=True)
                if unit in part and isinstance(unit, ImageUnit) == kind
            )
            for part in shares
        ]
        assert max(loads) - min(loads) <= most, "no more than one unit apart"
