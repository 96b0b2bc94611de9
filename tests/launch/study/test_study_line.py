"""A study with real ranks: killed on the way and run again it ends as if nothing had been, and grows by a seed."""

import csv
import hashlib
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launch.study.tiny import write_study
from tests.support.command_line import ND, nd_process
from tests.support.waiting import wait_until

pytestmark = pytest.mark.launch
SOURCES = {"phantom": {"recipe": "demo", "phantom_data": True, "subjects": [1]}}
ROWS = {"none": "unguided", "guided": "guided"}
TABLES = [{"title": "Parts", "rows": ROWS, "against": "none"}]
RUNS = {"unguided": {"settings": {"sampler.kappa": 0}}, "guided": {}}


def study(*words: str) -> str:
    ended = nd_process("study", *words, "--ranks", "1") if words[0] == "run" else nd_process("study", *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def hashes(folder: Path) -> dict[Path, str]:
    paths = [*folder.rglob("metrics.json"), *folder.rglob("model.safetensors"), *folder.rglob("repeat-*.png")]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def run_until_there_is(path: Path, pattern: str, *words: str) -> None:
    """Run a study, and kill its process as soon as a file is there."""
    process = subprocess.Popen([*ND, "study", "run", *words, "--ranks", "1"], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: any(path.glob(pattern)) or process.poll() is not None, pattern)
        assert process.poll() is None, "the study was to be killed on the way"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def test_a_killed_study_ends_as_an_undisturbed_one_and_a_seed_adds_its_own_stages_only(tmp_path: Path) -> None:
    fields = {"sources": SOURCES, "decoders": {"network": {}}, "runs": RUNS, "tables": TABLES}
    path, killed = write_study(tmp_path, **fields), f"study_dir={tmp_path / 'killed'}"
    study("run", path)
    first = tmp_path / "killed" / "phantom" / "network" / "seed-0" / "subj01"
    run_until_there_is(first, "checkpoints/stage1/step-*", path, killed)
    run_until_there_is(first, "reconstructions/*/*/image-*", path, killed)
    study("run", path, killed)
    study("report", path)
    study("report", path, killed)
    tables = [(tmp_path / name / "tables.csv").read_text() for name in ("study", "killed")]
    assert tables[0] == tables[1]
    before = hashes(tmp_path / "killed")
    said = study("run", path, killed, "seeds=[0,1]")
    assert hashes(tmp_path / "killed").items() >= before.items()
    assert "seed 0" not in said
    assert "seed 1 subject 1" in said
    stages = [json.loads(file.read_text()) for file in (tmp_path / "killed" / "stages").glob("*.json")]
    assert len(stages) == 2 * 2, "the first study had packed the shards"
    assert not any(stage["error"] for stage in stages)
    assert (first.parents[1] / "seed-1" / "subj01" / "metrics.json").is_file()


def test_two_data_sets_stand_in_one_table_each_with_its_own_mean(tmp_path: Path) -> None:
    laion = {
        "recipe": "laion_fmri_demo",
        "phantom_data": True,
        "subjects": [1, 3],
        "settings": {
            "nsd_root": str(tmp_path / "laion"),
            "shards_dir": str(tmp_path / "laion-shards"),
            "phantom.num_subjects": 2,
            "phantom.num_sessions": 4,
            "phantom.trials_per_session": 40,
            "phantom.num_shared": 12,
            "data.subjects": [1, 3],
        },
    }
    decoders = {"ridge": {"settings": {"decoder.kind": "ridge", "training.stages": [2]}}}
    runs = {"nearest": {"settings": {"control": "nearest"}}, "ridge": {}, "only": {"sources": ["laion"]}}
    rows = {"nearest": "nearest", "ridge": "ridge", "on one": "only"}
    tables = [{"title": "Two", "rows": rows, "against": "nearest", "published": ["MindEye2"]}]
    sources = {**SOURCES, "laion": laion}
    path = write_study(tmp_path, sources=sources, decoders=decoders, runs=runs, tables=tables)
    study("run", path)
    study("report", path)
    lines = list(csv.DictReader((tmp_path / "study" / "tables.csv").open()))
    values = {(line["row"], line["data"], line["subject"]) for line in lines if line["metric"] == "pixcorr"}
    whose = [("phantom", "mean"), ("phantom", "1"), ("laion", "mean"), ("laion", "1"), ("laion", "3")]
    for row in ("nearest", "ridge"):
        assert {(row, *each) for each in whose} <= values
    assert ("on one", "laion", "mean") in values
    assert [line["value"] for line in lines if line["row"] == "on one" and line["data"] == "phantom"] == [
        "not run"
    ] * 2
    differences = [line["data"] for line in lines if line["difference"] and line["metric"] == "pixcorr"]
    assert differences == ["phantom", "laion", "laion"], "each data set is tested apart"
    page = (tmp_path / "study" / "report.html").read_text()
    for head in ("phantom mean", "phantom 1", "laion mean", "laion 1", "laion 3"):
        assert f"<th>{head}</th>" in page
