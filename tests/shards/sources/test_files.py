from __future__ import annotations

import csv
import errno
import fcntl
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from nd_dist.errors import DataError
from shards.sources.files import open_hdf5, read_columns, reading
from shards.sources.nsd import NsdReader
from shards.sources.nsd_layout import NsdLayout
from shards.sources.open import open_reader
from tests.shards.support import make_config, pack_alone

BETAS = "betas_fithrf_GLMdenoise_RR"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1890000000\n"
ERROR_PAGE = b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>\n'
WEB_PAGE = b"\n<!DOCTYPE html>\n<html><body>Please log in</body></html>\n"


def told(path: Path, error: Exception) -> str:
    """Return the message for an error that comes up while a file is read."""
    path.write_bytes(b"some content")
    with pytest.raises(DataError) as caught, reading(path):
        raise error
    return str(caught.value)


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (errno.EACCES, "may not be read by this user"),
        (errno.EPERM, "may not be read by this user"),
        (errno.EAGAIN, "another program holds it locked"),
        (errno.ENOLCK, "another program holds it locked"),
        (errno.EMFILE, "too many files open"),
        (errno.ENFILE, "too many files open"),
        (errno.EIO, "disk or network folder failed"),
        (errno.ESTALE, "disk or network folder failed"),
        (errno.ETIMEDOUT, "disk or network folder failed"),
        (errno.EBUSY, "the system refuses it"),
    ],
)
def test_what_the_system_says_is_told_and_is_no_reason_to_download_again(
    tmp_path: Path, number: int, cause: str
) -> None:
    as_python = told(tmp_path / "a", OSError(number, os.strerror(number)))
    as_hdf5 = told(tmp_path / "a", OSError(f"Can't synchronously read data (file read failed: errno = {number}, ...)"))
    for message in (as_python, as_hdf5):
        assert cause in message
        assert "download" not in message
        assert str(tmp_path / "a") in message


def test_damage_is_a_reason_to_download_again(tmp_path: Path) -> None:
    for error in (OSError("truncated file: eof = 96"), EOFError("ends"), KeyError("betas"), ValueError("bad")):
        assert "download this file again" in told(tmp_path / "a", error)


def test_a_folder_that_the_user_may_not_enter_is_a_permission_not_damage(
    phantom_copy: Path, another_user: int
) -> None:
    path = NsdLayout(phantom_copy).betas(1, BETAS, 1, ".hdf5")
    path.chmod(0o600)
    os.seteuid(another_user)
    try:
        with pytest.raises(DataError, match="may not be read by this user"), reading(path):
            raise AssertionError("not reached")
    finally:
        os.seteuid(0)


def test_files_that_another_program_holds_locked_are_read_all_the_same(phantom_copy: Path, tmp_path: Path) -> None:
    layout = NsdLayout(phantom_copy)
    paths = [layout.stimuli, *(layout.betas(1, BETAS, session, ".hdf5") for session in (1, 2, 3, 4))]
    descriptors = [os.open(path, os.O_RDWR) for path in paths]
    for descriptor in descriptors:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        index = pack_alone(make_config(phantom_copy, tmp_path / "shards", subjects=(1,), betas_format="hdf5"))
        assert index.subjects[1].trials == 60
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@pytest.mark.parametrize(
    ("content", "named"),
    [(POINTER, "Git LFS pointer"), (ERROR_PAGE, "error page"), (WEB_PAGE, "web page"), (b"", "is empty")],
)
@pytest.mark.parametrize(
    "name",
    [
        "nsddata/experiments/nsd/nsd_expdesign.mat",
        "nsddata/experiments/nsd/nsd_stim_info_merged.csv",
        "nsddata/ppdata/subj01/behav/responses.tsv",
        "nsddata/ppdata/subj01/func1pt8mm/roi/nsdgeneral.nii.gz",
        f"nsddata_betas/ppdata/subj01/func1pt8mm/{BETAS}/betas_session02.hdf5",
        f"nsddata_betas/ppdata/subj01/func1pt8mm/{BETAS}/betas_session02.nii.gz",
        "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5",
        "captions/captions_val2017.json",
    ],
)
def test_what_was_saved_under_a_files_name_is_called_what_it_is(
    phantom_copy: Path, tmp_path: Path, name: str, content: bytes, named: str
) -> None:
    path = phantom_copy / name
    path.write_bytes(content)
    betas_format = "nifti" if name.endswith("02.nii.gz") else "hdf5"
    config = make_config(phantom_copy, tmp_path / "shards", subjects=(1,), betas_format=betas_format)
    with pytest.raises(DataError, match=named) as caught:
        pack_alone(config)
    assert path.name in str(caught.value)


HEADER = "SUBJECT\tSESSION\tRUN\tTRIAL\t73KID\t10KID\n"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (HEADER.replace("\t", ",") + "1,1,1,1,1,1\n", "no column 'SUBJECT' between"),
        (HEADER + "1\t1.0\t1\t1\t3\t2\n", "column 'SESSION' holds '1.0'"),
        (HEADER + "1\tnan\t1\t1\t3\t2\n", "column 'SESSION' holds 'nan'"),
        (HEADER + "1\t1\t1\n", "line 2 ends early"),
        (HEADER, "no row below the first line"),
        ("SUBJECT\tSESSION\n1\t1\n", "no column 'RUN'"),
        ("\x00\x01\x02", "responses.tsv"),
        (b"\xff\xfe\x00\x41", "responses.tsv"),
        ("\n\n\n", "responses.tsv"),
    ],
)
def test_a_table_of_responses_that_is_none_is_said_with_file_and_column(
    phantom_copy: Path, content: str | bytes, named: str
) -> None:
    path = NsdLayout(phantom_copy).responses(1)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=named) as caught:
        open_reader(make_config(phantom_copy, phantom_copy / "x")).design(1)
    assert "responses.tsv" in str(caught.value)


def test_columns_come_as_whole_numbers_and_words_whatever_else_the_table_holds(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,word,other\n3,"a, b",1.5\n-1,c,\n')
    numbers, words = read_columns(tmp_path / "a.csv", ",", ["id"], ["word"])
    assert numbers["id"].tolist() == [3, -1]
    assert words == {"word": ["a, b", "c"]}
    # as a spreadsheet saves it
    (tmp_path / "a.csv").write_text(
        '\ufeffid,word,other\r\n3,"a, b",1.5\r\n', encoding="utf-8"
    )  # saved by a spreadsheet
    assert read_columns(tmp_path / "a.csv", ",", ["id"])[0]["id"].tolist() == [3]
    (tmp_path / "a.csv").write_text("id,word,other\n3,a,1.5\n4,b\n")
    with pytest.raises(DataError, match="line 3 ends early"):
        read_columns(tmp_path / "a.csv", ",", ["id"])


@pytest.mark.parametrize("change", ["shared", "ids from 1", "twice"])
def test_a_table_of_pictures_that_contradicts_the_design_is_refused(phantom_copy: Path, change: str) -> None:
    path = NsdLayout(phantom_copy).stim_info
    with open(path, newline="") as stream:
        rows = list(csv.DictReader(stream))
    if change == "shared":
        next(row for row in rows if row["shared1000"] == "True")["shared1000"] = "False"
    for row in {"shared": [], "ids from 1": rows, "twice": rows[:1]}[change]:
        row["nsdId"] = str(int(row["nsdId"]) + 1)
    with open(path, "w", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    reader = open_reader(make_config(phantom_copy, phantom_copy / "x"))
    assert isinstance(reader, NsdReader)
    with pytest.raises(DataError, match="table of pictures and its design disagree"):
        reader.captions([0])


def test_captions_of_white_space_only_are_none(phantom_copy: Path) -> None:
    import json

    for split in ("train2017", "val2017"):
        path = phantom_copy / f"captions/captions_{split}.json"
        content = json.loads(path.read_text())
        for number, annotation in enumerate(content["annotations"]):
            annotation["caption"] = " \n" if number % 5 == 0 else annotation["caption"]
        path.write_text(json.dumps(content))
    reader = open_reader(make_config(phantom_copy, phantom_copy / "x"))
    assert {len(texts) for texts in reader.captions(range(reader.num_images))} == {4}


def test_an_hdf5_file_is_opened_without_a_lock(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["betas"] = np.arange(3)
    with open(tmp_path / "a.hdf5", "rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with open_hdf5(tmp_path / "a.hdf5") as file:
            assert file["betas"][:].tolist() == [0, 1, 2]
