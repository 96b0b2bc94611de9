from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from nd_dist.conformance import Row, run_conformance
from nd_dist.conformance.rows import NOT_CHECKED, Case, compare
from nd_dist.errors import CheckpointError, DataError
from tests.nd_dist.conformance.own_cases import CASES, write_cases

GUIDED = "s1_k2000_e0.1_sag0.75_f64.npz"
UNGUIDED = "s0_k0_e0_sag0.0_f64.npz"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("cases") / "reference")


@pytest.fixture
def unguided(written: Path, tmp_path: Path) -> Path:
    """A copy that holds the unguided case only, which is quick."""
    folder = Path(shutil.copytree(written, tmp_path / "copy"))
    for path in (folder / "sampler").glob("s*.npz"):
        if path.name != UNGUIDED:
            path.unlink()
    return folder


def change(path: Path, **arrays: object) -> None:
    with np.load(path) as content:
        np.savez(path, **{**dict(content), **arrays})  # type: ignore[arg-type]


def checked(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.quantity != NOT_CHECKED]


def test_every_case_and_quantity_of_an_independent_procedure_holds(written: Path) -> None:
    rows = run_conformance(written)
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]
    assert len({row.case_file for row in rows}) == len(CASES)
    assert {row.quantity for row in rows if row.case_file == GUIDED} == {
        "z_t",
        "timesteps",
        "latents",
        "image",
        "eps_used_first",
        "eps_before_guidance",
        "eps_after_guidance",
        "guidance_loss",
        "gradient",
    }
    tolerances = {row.tolerance for row in rows if row.case_file == GUIDED and row.quantity == "latents"}
    assert tolerances == {1e-6}
    assert all(row.error < row.tolerance for row in checked(rows) if row.tolerance)


def test_a_subset_is_checked_and_what_is_absent_is_said(unguided: Path) -> None:
    rows = run_conformance(unguided)
    assert {row.case_file for row in checked(rows)} == {UNGUIDED}
    absent = {row.case_file for row in rows if row.quantity == NOT_CHECKED}
    assert GUIDED in absent
    assert all(row.ok for row in rows)


@pytest.mark.parametrize("quantity", ["latents", "image", "z_t", "timesteps"])
def test_a_wrong_value_fails_its_row_and_no_other(unguided: Path, quantity: str) -> None:
    path = unguided / "sampler" / UNGUIDED
    with np.load(path) as content:
        wrong = content[quantity].copy()
    wrong.reshape(-1)[-1] += 1
    change(path, **{quantity: wrong})
    failed = [row for row in run_conformance(unguided) if not row.ok]
    assert [(row.case_file, row.quantity) for row in failed] == [(UNGUIDED, quantity)]
    assert failed[0].error > failed[0].tolerance


def test_nan_and_another_shape_in_a_reference_fail(unguided: Path) -> None:
    path = unguided / "sampler" / UNGUIDED
    change(path, latents=np.full((37, 4, 8, 8), np.nan), image=np.zeros((1, 16, 16, 3)))
    failed = {row.quantity: row for row in run_conformance(unguided) if not row.ok}
    assert set(failed) == {"latents", "image"}
    assert "shapes differ" in failed["image"].note
    assert math.isinf(failed["image"].error)


def test_a_case_with_fewer_arrays_is_checked_for_what_it_holds(unguided: Path) -> None:
    path = unguided / "sampler" / UNGUIDED
    with np.load(path) as content:
        latents = content["latents"]
    np.savez(path, latents=latents, something_else=np.zeros(3))
    rows = [row for row in run_conformance(unguided) if row.case_file == UNGUIDED]
    assert [row.quantity for row in rows] == ["latents", NOT_CHECKED]
    assert "something_else" in rows[1].note


def test_files_that_nobody_knows_are_reported(unguided: Path) -> None:
    (unguided / "sampler" / "extra.npz").write_bytes(b"?")
    (unguided / "elsewhere").mkdir()
    (unguided / "elsewhere" / "notes.txt").write_text("?")
    (unguided / "README.md").write_text("?")
    rows = run_conformance(unguided)
    unknown = {row.case_file for row in rows if "no checker" in row.note}
    assert unknown == {"sampler/extra.npz", "elsewhere/notes.txt"}


def test_an_unknown_dtype_is_reported(unguided: Path) -> None:
    path = unguided / "sampler" / "index.json"
    index = json.loads(path.read_text())
    extra = {**index[1], "dtype": "f8", "file": "other.npz"}
    path.write_text(json.dumps([*index, extra]))
    shutil.copy(unguided / "sampler" / UNGUIDED, unguided / "sampler" / "other.npz")
    assert any(row.case_file == "other.npz" and "f8" in row.note for row in run_conformance(unguided))


@pytest.mark.parametrize("name", ["configs.json", "unet.safetensors", "clip_vision_hf.safetensors"])
def test_missing_weights_are_named(unguided: Path, name: str) -> None:
    (unguided / "weights" / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        run_conformance(unguided)


def test_torn_weights_a_torn_case_and_a_poor_index_are_refused(unguided: Path) -> None:
    weights = unguided / "weights" / "vae.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:500])
    with pytest.raises(CheckpointError, match="do not load"):
        run_conformance(unguided)
    weights.write_bytes(whole)
    index = unguided / "sampler" / "index.json"
    entries = json.loads(index.read_text())
    index.write_text(json.dumps([{"file": UNGUIDED, "sample": 0}]))
    with pytest.raises(DataError, match="lacks keys"):
        run_conformance(unguided)
    index.write_text(json.dumps(entries))
    (unguided / "sampler" / UNGUIDED).write_bytes(b"torn")
    with pytest.raises(DataError, match="could not be read"):
        run_conformance(unguided)


def test_a_folder_without_cases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        run_conformance(tmp_path / "nowhere")
    (tmp_path / "readme.txt").write_text("?")
    with pytest.raises(DataError, match="no reference case"):
        run_conformance(tmp_path)


def test_errors_are_relative_to_the_largest_reference_value() -> None:
    assert compare("f", "q", [1.0, 2.0], [1.0, 4.0], 1.0).error == pytest.approx(0.5)
    assert compare("f", "q", [0.1], [0.0], 1.0).error == pytest.approx(0.1)
    assert compare("f", "q", torch.ones(1, 3), np.ones(3), 0.0).ok
    assert not compare("f", "q", [math.nan], [1.0], 1.0).ok


def test_pickled_arrays_are_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "case.npz", values=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="could not be read"):
        Case(tmp_path / "case.npz")
