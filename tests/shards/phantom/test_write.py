from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nd_dist.config import PhantomConfig
from nd_dist.errors import ConfigError
from nd_dist.evaluation.scoring.groups import read_groups
from shards.phantom.design import count_images, make_design
from shards.phantom.pictures import PictureWorld
from shards.phantom.write import write_phantom
from shards.sources.classes import read_classes
from shards.sources.nsd_layout import NsdLayout
from shards.sources.open import open_reader
from tests.shards.support import PHANTOM, SEED, folder_bytes, make_config


def test_settings_and_seed_decide_every_byte(phantom_dir: Path, tmp_path: Path) -> None:
    summary = write_phantom(tmp_path / "again", PHANTOM, SEED)
    assert summary.is_new
    written, again = folder_bytes(phantom_dir), folder_bytes(tmp_path / "again")
    assert written.keys() == again.keys()
    assert [name for name in written if written[name] != again[name]] == []
    write_phantom(tmp_path / "other", PHANTOM, SEED + 1)
    other = folder_bytes(tmp_path / "other")
    betas = NsdLayout(Path()).betas(1, "betas_fithrf_GLMdenoise_RR", 1, ".hdf5")
    assert other[str(betas)] != written[str(betas)]


def test_the_groups_of_test_pictures_are_told_to_evaluations(phantom_dir: Path) -> None:
    groups = read_groups(phantom_dir / "image_groups.json")
    world = PictureWorld(SEED, count_images(PHANTOM), PHANTOM.num_shared)
    assert sorted(image_id for ids in groups.values() for image_id in ids) == list(world.shared_ids)
    assert {world.scene(image_id).held_out for image_id in groups["held-out objects"]} == {"object"}
    assert {world.scene(image_id).held_out for image_id in groups["held-out combinations"]} == {"combination"}


def test_every_picture_is_in_the_class_of_its_main_thing(phantom_dir: Path) -> None:
    classes = read_classes(phantom_dir, phantom_dir / "image_classes.json")
    world = PictureWorld(SEED, count_images(PHANTOM), PHANTOM.num_shared)
    named = {image_id: name for name, ids in classes.items() for image_id in ids}
    assert named == {image_id: world.scene(image_id).things[0].super_class for image_id in range(world.num_images)}


def test_a_complete_phantom_is_left_alone(phantom_copy: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in phantom_copy.rglob("*")}
    summary = write_phantom(phantom_copy, PHANTOM, SEED)
    assert not summary.is_new
    assert "there already" in summary.describe()
    assert {path: path.stat().st_mtime_ns for path in phantom_copy.rglob("*")} == times


def test_an_interrupted_phantom_is_completed_to_the_same_bytes(phantom_dir: Path, phantom_copy: Path) -> None:
    record = phantom_copy / "phantom.json"
    settings = json.loads(record.read_text())["settings"]
    record.unlink()
    (phantom_copy / ".phantom-started.json").write_text(json.dumps({"settings": settings}))
    layout = NsdLayout(phantom_copy)
    layout.betas(3, "betas_fithrf_GLMdenoise_RR", 4, ".nii.gz").unlink()
    layout.stim_info.unlink()
    assert write_phantom(phantom_copy, PHANTOM, SEED).is_new
    assert folder_bytes(phantom_copy) == folder_bytes(phantom_dir)


def test_other_settings_or_a_foreign_folder_are_refused(phantom_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="other settings"):
        write_phantom(phantom_copy, PHANTOM, SEED + 1)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").write_text("dear reader")
    with pytest.raises(ConfigError, match="folder of its own"):
        write_phantom(tmp_path / "foreign", PHANTOM, SEED)


def test_more_shared_pictures_than_trials_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="phantom.num_shared"):
        write_phantom(tmp_path / "p", PhantomConfig(num_sessions=2, trials_per_session=10, num_shared=7), 0)
    assert not (tmp_path / "p").exists()


def test_every_picture_is_shown_three_times_to_complete_subjects() -> None:
    config = PhantomConfig()
    world = PictureWorld(0, count_images(config), config.num_shared)
    design = make_design(config, 0, world.shared_ids)
    assert design.num_images == world.num_images == 888
    for subject in (1, 2, 4):
        images, counts = np.unique(design.images(subject), return_counts=True)
        assert len(images) == 240
        assert (counts == 3).all()
        assert set(world.shared_ids) <= set(images.tolist())


@pytest.mark.parametrize(("num_subjects", "num_sessions", "trials"), [(1, 2, 10), (2, 2, 11), (8, 5, 13)])
def test_odd_counts_work_too(num_subjects: int, num_sessions: int, trials: int) -> None:
    config = PhantomConfig(
        num_subjects=num_subjects, num_sessions=num_sessions, trials_per_session=trials, num_shared=2
    )
    design = make_design(config, 0, (1, 3))
    assert design.trials_per_session == trials
    assert len(design.order) == num_sessions * trials
    assert np.unique(design.subject_images[:, 2:]).size == num_subjects * (design.subject_images.shape[1] - 2)


def test_subjects_have_their_own_voxel_counts_and_grids(phantom_dir: Path) -> None:
    layout = NsdLayout(phantom_dir)
    labels = [nibabel.load(layout.roi(subject, "nsdgeneral")).get_fdata() for subject in (1, 2, 3)]
    assert len({volume.shape for volume in labels}) == 3
    assert len({int((volume > 0).sum()) for volume in labels}) > 1
    assert all(set(np.unique(volume)) == {-1, 0, 1} for volume in labels)


def test_some_voxels_of_the_roi_are_constant(phantom_dir: Path) -> None:
    reader = open_reader(make_config(phantom_dir, phantom_dir))
    sessions = [reader.read_session(1, session) for session in (1, 2, 3, 4)]
    constant = np.array([np.ptp(betas, axis=0) == 0 for betas in sessions])
    assert constant.all(axis=0).any(), "dead in every session"
    assert (constant.sum(axis=0) == 1).any(), "at the edge in one session"
    ncsnr = nibabel.load(NsdLayout(phantom_dir).ncsnr(1, "betas_fithrf_GLMdenoise_RR")).get_fdata()
    assert np.isnan(ncsnr).any()


def test_repeats_of_a_picture_resemble_each_other_as_much_as_the_noise_ceiling_says(tmp_path: Path) -> None:
    config = PhantomConfig(num_subjects=1, num_sessions=4, trials_per_session=45, num_shared=6, num_voxels=120)
    write_phantom(tmp_path / "p", config, 3)
    reader = open_reader(make_config(tmp_path / "p", tmp_path, subjects=(1,)))
    design = reader.design(1)
    sessions = []
    for session in design.sessions:
        betas = reader.read_session(1, session)
        sessions.append((betas - betas.mean(0)) / np.maximum(betas.std(0), 1e-6))
    values = np.concatenate(sessions)
    first, second = (
        values[design.repeat == repeat][np.argsort(design.image_id[design.repeat == repeat])] for repeat in (0, 1)
    )
    reliability = (first * second).mean(axis=0)
    assert 0.2 < reliability.mean() < 0.45, "noise ceilings are beta(3, 1.5) of at most 0.5: 0.33 on average"
    assert abs((first * np.roll(second, 7, axis=0)).mean()) < 0.1, "other pictures do not resemble"
