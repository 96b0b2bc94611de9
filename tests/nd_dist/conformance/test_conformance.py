from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from nd_dist.conformance import Row, run_conformance
from nd_dist.conformance.rows import CANNOT_RUN, NOT_CHECKED, Case, compare
from nd_dist.errors import DataError
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
        "guided_steps",
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
    assert [row.quantity for row in rows] == ["latents", "guided_steps", NOT_CHECKED]
    assert "something_else" in rows[-1].note


def test_files_that_nobody_knows_are_reported(unguided: Path) -> None:
    (unguided / "sampler" / "extra.npz").write_bytes(b"?")
    (unguided / "elsewhere").mkdir()
    (unguided / "elsewhere" / "notes.txt").write_text("?")
    (unguided / "README.md").write_text("?")
    rows = run_conformance(unguided)
    unknown = {row.case_file for row in rows if "no checker" in row.note}
    assert unknown == {"sampler/extra.npz", "elsewhere/notes.txt"}


def failing(folder: Path) -> dict[str, Row]:
    return {row.case_file: row for row in run_conformance(folder) if not row.ok}


def test_a_case_of_unknown_dtype_fails_and_says_so(unguided: Path) -> None:
    path = unguided / "sampler" / "index.json"
    index = json.loads(path.read_text())
    extra = {**index[1], "dtype": "f8", "file": "other.npz"}
    path.write_text(json.dumps([*index, extra]))
    shutil.copy(unguided / "sampler" / UNGUIDED, unguided / "sampler" / "other.npz")
    failed = failing(unguided)
    assert set(failed) == {"other.npz"}
    assert failed["other.npz"].quantity == CANNOT_RUN
    assert "f8" in failed["other.npz"].note


@pytest.mark.parametrize("name", ["configs.json", "unet.safetensors", "clip_vision_hf.safetensors"])
def test_missing_weights_fail_the_cases_that_need_them_by_name(unguided: Path, name: str) -> None:
    (unguided / "weights" / name).unlink()
    failed = failing(unguided)
    assert set(failed) == {UNGUIDED}
    assert name in failed[UNGUIDED].note


def test_torn_weights_fail_the_cases_that_need_them(unguided: Path) -> None:
    weights = unguided / "weights" / "vae.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert "do not load" in failing(unguided)[UNGUIDED].note


def test_a_torn_case_fails_and_the_others_are_still_checked(unguided: Path) -> None:
    shutil.copy(unguided / "sampler" / UNGUIDED, unguided / "sampler" / "s1_k0_e0_sag0.0_f64.npz")
    (unguided / "sampler" / UNGUIDED).write_bytes(b"torn")
    rows = run_conformance(unguided)
    assert [row.quantity for row in rows if row.case_file == UNGUIDED] == [CANNOT_RUN]
    others = {row.quantity: row for row in rows if row.case_file == "s1_k0_e0_sag0.0_f64.npz"}
    assert others["timesteps"].ok
    assert not others["latents"].ok, "the copy holds another sample's latents"


def test_an_index_entry_may_leave_out_what_the_file_s_name_says(unguided: Path) -> None:
    index = unguided / "sampler" / "index.json"
    index.write_text(json.dumps([{"file": UNGUIDED}]))
    rows = run_conformance(unguided)
    assert {"latents", "image"} <= {row.quantity for row in rows if row.case_file == UNGUIDED}
    assert all(row.ok for row in rows)


def test_without_an_index_the_names_say_what_to_run(unguided: Path) -> None:
    (unguided / "sampler" / "index.json").unlink()
    rows = checked(run_conformance(unguided))
    assert {row.case_file for row in rows} == {UNGUIDED}
    assert all(row.ok for row in rows)


def test_an_index_of_any_name_and_inputs_of_any_name_are_followed(unguided: Path) -> None:
    folder = unguided / "sampler"
    (folder / "inputs.npz").rename(folder / "inputs_b.npz")
    (folder / UNGUIDED).rename(folder / "b.npz")
    (folder / "index.json").unlink()
    entry = {"file": "b.npz", "sample": 0, "kappa": 0, "eta": 0, "sag_scale": 0.0, "cfg_scale": 7.5, "dtype": "f64"}
    entries = {"cases": [{**entry, "inputs": "inputs_b.npz", "origin": "elsewhere"}]}
    (folder / "index_b.json").write_text(json.dumps(entries))
    rows = run_conformance(unguided)
    assert {row.case_file for row in checked(rows)} == {"b.npz"}
    assert all(row.ok for row in rows)
    assert any("origin" in row.note for row in rows)


def test_a_case_that_says_nothing_of_its_settings_fails_by_name(unguided: Path) -> None:
    folder = unguided / "sampler"
    (folder / UNGUIDED).rename(folder / "b.npz")
    (folder / "index.json").write_text(json.dumps([{"file": "b.npz", "sample": 0}]))
    failed = failing(unguided)
    assert "kappa, eta, sag, dtype" in failed["b.npz"].note


def test_a_sample_that_the_inputs_lack_and_facts_that_differ_fail(unguided: Path) -> None:
    index = unguided / "sampler" / "index.json"
    entry = next(entry for entry in json.loads(index.read_text()) if entry["file"] == UNGUIDED)
    index.write_text(json.dumps([{**entry, "guided_steps": 3, "final_abs_mean": -1.0}]))
    failed = [row for row in run_conformance(unguided) if not row.ok]
    assert {row.quantity for row in failed} == {"guided_steps", "final_abs_mean"}
    index.write_text(json.dumps([{**entry, "sample": 7}]))
    assert "sample 7" in failing(unguided)[UNGUIDED].note


def test_a_damaged_index_fails_the_family_only(unguided: Path) -> None:
    (unguided / "sampler" / "index.json").write_text("{")
    failed = failing(unguided)
    assert set(failed) == {"sampler/"}


def test_the_number_of_threads_is_as_before(unguided: Path) -> None:
    before = torch.get_num_threads()
    run_conformance(unguided)
    assert torch.get_num_threads() == before


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
