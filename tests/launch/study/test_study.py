"""Study files, their plan, what they cost, how stages stand and the jobs of Slurm: nothing here starts a rank."""

import re
from pathlib import Path

import pytest

from launch.plans.choose import LaunchOptions
from launch.recipe import shipped_names
from launch.study import STUDIES_DIR
from launch.study.costs import cost_of
from launch.study.plan import Stage, plan_study
from launch.study.run import record_path, run_study, states_of
from launch.study.study import Study, load_study
from launch.study.submit import submit_study
from launch.supervise.lock import RunFolder
from nd_dist.errors import ConfigError, NdDistError, RankFailure, WorldError
from nd_dist.evaluation.points.units import config_points
from nd_dist.files import write_json, write_text
from tests.launch.commands.test_submit import SBATCH
from tests.launch.study.tiny import write_study
from tests.support.command_line import nd

STUDIES = shipped_names(STUDIES_DIR)
SQUEUE = "#!/bin/sh\ntr ' ' '\\n' < {folder}/queue\n"
ONE = {"phantom": {"recipe": "demo", "phantom_data": True, "subjects": [1]}}


def tiny(folder: Path, *words: str, **fields: object) -> Study:
    return load_study(write_study(folder, **fields), words)


def finish(study: Study, stage: Stage, error: str = "") -> None:
    write_json(record_path(study, stage), {"identity": stage.identity, "name": stage.name, "error": error})
    if not error:
        write_text(stage.result, "{}")


@pytest.mark.parametrize("name", STUDIES)
def test_the_shipped_studies_plan_every_run_that_their_tables_name(name: str) -> None:
    study = load_study(name)
    plan = plan_study(study)
    shown = {run for table in study.tables for run in table.rows.values()}
    assert shown | {"true unguided", "shuffled"} >= set(study.runs), "every run stands in a table"
    evaluated = [stage for stage in plan if stage.kind == "evaluate"]
    (source,) = study.sources.values()
    assert len(evaluated) == len(study.decoders) * len(source.subjects) * len(study.seeds)
    seen: set[str] = set()
    for stage in plan:
        assert set(stage.needs) <= seen, "what a stage needs comes before it"
        seen.add(stage.name)


def test_a_point_that_several_runs_and_tables_ask_for_is_made_once(tmp_path: Path) -> None:
    plan = plan_study(tiny(tmp_path))
    network = next(stage for stage in plan if (stage.kind, stage.decoder) == ("evaluate", "network"))
    names = [point.name for point in config_points(network.config)]
    assert len(names) == len(set(names)) == 6, "no guidance, two kappas by two etas with the recipe's, true embeddings"
    assert network.config.run_dir == tmp_path / "study" / "phantom" / "network" / "seed-0" / "subj01"
    assert [stage.kind for stage in plan].count("pack") == 1


def test_names_that_do_not_exist_are_refused_with_the_nearest_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tables.0.rows: there is no 'gided'; did you mean guided"):
        tiny(tmp_path, tables=[{"title": "T", "rows": {"a": "gided"}}])
    with pytest.raises(ConfigError, match=r"tables.0.published: there is no 'MindEye3'; did you mean MindEye"):
        tiny(tmp_path, tables=[{"title": "T", "rows": {}, "published": ["MindEye3"]}])
    with pytest.raises(ConfigError, match=r"stage1_of: there is no 'later'"):
        tiny(tmp_path, decoders={"first": {"stage1_of": "later"}, "later": {}})
    with pytest.raises(ConfigError, match=r"subjects \[9\] are not in data.subjects"):
        plan_study(tiny(tmp_path, "sources.phantom.subjects=[1,9]"))
    with pytest.raises(ConfigError, match="The study has no run"):
        plan_study(tiny(tmp_path, runs={}, tables=[]))
    with pytest.raises(ConfigError, match="did you mean paper"):
        load_study("papr")
    with pytest.raises(ConfigError, match=r"training.stepz.*did you mean training.steps"):
        plan_study(tiny(tmp_path, "training.stepz=[1,1]"))
    with pytest.raises(ConfigError, match="does not decide how a trained decoder's pictures are made"):
        plan_study(tiny(tmp_path, runs={"longer": {"settings": {"training.zero_stage": 2}}}, tables=[]))
    with pytest.raises(ConfigError, match="One folder of shards is to be packed in different ways"):
        other = {"settings": {"data.normalization": "mindeye1"}}
        plan_study(tiny(tmp_path, decoders={"a": {}, "b": other}, tables=[], runs={"r": {}}))


def test_more_seeds_and_subjects_leave_the_stages_that_there_are_as_they_are(tmp_path: Path) -> None:
    before = {stage.name: stage.identity for stage in plan_study(tiny(tmp_path))}
    after = {
        stage.name: stage.identity
        for stage in plan_study(tiny(tmp_path, "seeds=[0,7]", "sources.phantom.subjects=[1,2,3]"))
    }
    assert before.items() <= after.items()
    assert len(after) == 1 + 2 * 3 * 3 * 2 - 3, "a ridge regression is fitted once for all seeds"
    other = {stage.name: stage.identity for stage in plan_study(tiny(tmp_path, "sampler.cfg_scale=4"))}
    changed = {name.split()[0] for name in before if before[name] != other[name]}
    assert changed == {"evaluate"}, "how pictures are made is no affair of a training"


def test_a_stage_that_fails_blocks_only_what_needs_it_and_is_tried_again_by_the_next_command(tmp_path: Path) -> None:
    study = tiny(tmp_path, sources=ONE)
    pack, train, evaluate, second, *others = plan_study(study)
    for stage in (pack, *others):
        finish(study, stage)
    finish(study, train, "The GPU is gone.\n  more")
    states = states_of(study, (pack, train, evaluate, second, *others))
    assert [states[stage.name] for stage in (pack, train, evaluate, second)] == [
        "done",
        "failed",
        "blocked",
        "blocked",
    ]
    assert {states[stage.name] for stage in others} == {"done"}
    said = nd("study", "status", str(tmp_path / "tiny.yaml"), "sources.phantom.subjects=[1]").stdout
    assert "train phantom network seed 0 subject 1: The GPU is gone. (logs:" in said
    others[-1].result.unlink()
    assert states_of(study, (pack, *others))[others[-1].name] == "waiting", (
        "a record without its result is not believed"
    )


def test_a_study_whose_stages_are_done_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tiny(tmp_path)
    for stage in plan_study(study):
        finish(study, stage)
    run_study(study, LaunchOptions())
    assert "all 13 stages are done" in capsys.readouterr().out


def test_a_stage_that_cannot_start_leaves_the_others_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tiny(tmp_path, "nsd_root=nowhere", "sources.phantom.phantom_data=false", sources=ONE)
    with pytest.raises(RankFailure, match="7 of 7 stages of the study are not done"):
        run_study(study, LaunchOptions())
    said = capsys.readouterr().out
    assert said.count("blocked: it needs") == 6
    assert re.search(r"failed: .*\n.*nowhere", said)


@pytest.mark.launch
def test_the_published_study_is_counted_without_data_networks_or_a_gpu() -> None:
    plan = plan_study(load_study("paper"))
    stages = {(stage.kind, stage.decoder): stage for stage in reversed(plan)}
    guided = cost_of(stages["evaluate", "without prior"])
    steps = 7 * 163.39 + 30 * 36.0 + 38.91  # int(37 * .2) guided steps of 37, and the last decode
    assert guided.work == 1000 * 5
    assert guided.seconds == pytest.approx(1000 * steps / 1e3)
    train = cost_of(stages["train", "NeuralDiffuser"])
    assert train.work == 7 * 2 * 107_100 + 2 * 53_550
    shared, whole = cost_of(stages["train", "one hour"]), train.seconds
    assert shared.seconds == pytest.approx(whole / 2), "stage 1 is not trained again"
    assert cost_of(stages["pack", "NeuralDiffuser"]).work == 70_566
    said = nd("study", "plan", "paper", "--gpu", "a100").stdout
    for needed in ("a100 hours", "How it was counted", "No GPU has confirmed"):
        assert needed in said
    assert "did you mean h100" in nd("study", "plan", "paper", "--gpu", "h1000").stderr


def test_networks_of_other_sizes_are_counted_in_steps_and_pictures_alone() -> None:
    stages = {(stage.kind, stage.decoder): stage for stage in plan_study(load_study("phantom"))}
    cost = cost_of(stages["evaluate", "with prior"])
    assert (cost.work, cost.seconds, cost.disk_gb) == (32 * 2, 0.0, 0.0)
    assert cost_of(stages["train", "NeuralDiffuser"]).work == 400


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for sbatch, which numbers jobs from 101 on and keeps its calls, and squeue, which prints a file."""
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (tmp_path / name).write_text(text.format(folder=tmp_path, refused=99))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


def waits_of(folder: Path) -> list[tuple[str, str]]:
    """What each call of sbatch waits for, and its script."""
    pattern = r"^--parsable (?:--dependency=(\S+) )?.*/(\S+)\.sbatch$"
    return re.findall(pattern, (folder / "calls").read_text(), re.MULTILINE)


def test_jobs_wait_for_the_job_or_the_task_that_they_need(slurm: Path) -> None:
    study = tiny(slurm)
    submit_study(study, False)
    assert waits_of(slurm) == [
        ("", "pack-phantom-network"),
        ("afterok:101", "train-phantom-network-seed-0"),
        ("aftercorr:102", "evaluate-phantom-network-seed-0"),
        ("afterok:101,aftercorr:102", "train-phantom-one-session-seed-0"),
        ("aftercorr:104", "evaluate-phantom-one-session-seed-0"),
        ("afterok:101", "train-phantom-ridge"),
        ("aftercorr:106", "evaluate-phantom-ridge-seed-0"),
        ("afterany:101:102:103:104:105:106:107", "report"),
    ]
    script = (slurm / "study" / "slurm" / "train-phantom-one-session-seed-0.sbatch").read_text()
    assert "#SBATCH --array=0,1\n" in script
    assert "1) set -- --stage 'train phantom one session seed 0 subject 2' ;;" in script
    assert f'-m launch.cli study run {slurm / "study" / "study.yaml"} "$@" &' in script
    assert load_study(str(slurm / "study" / "study.yaml")) == study


def test_what_is_done_or_in_the_queue_is_not_submitted_again_and_what_was_lost_is(slurm: Path) -> None:
    study = tiny(slurm)
    submit_study(study, False)
    pack, train, *_ = plan_study(study)
    for stage in (pack, train):
        finish(study, stage)
    (slurm / "queue").write_text("102_1 103_1 106_0 106_1 999")  # the others were cancelled
    submit_study(study, False)
    assert waits_of(slurm)[8:] == [
        ("", "evaluate-phantom-network-seed-0"),
        ("afterok:102_1", "train-phantom-one-session-seed-0"),
        ("aftercorr:110", "evaluate-phantom-one-session-seed-0"),
        ("aftercorr:106", "evaluate-phantom-ridge-seed-0"),
        ("afterany:102:103:106:109:110:111:112", "report"),
    ]
    script = (slurm / "study" / "slurm" / "evaluate-phantom-network-seed-0.sbatch").read_text()
    assert "#SBATCH --array=0\n" in script, "the other subject's is in the queue"
    assert states_of(study, plan_study(study))["evaluate phantom network seed 0 subject 2"] == "queued 103_1"
    (slurm / "squeue").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(RankFailure, match="does not say which jobs it has"):
        submit_study(study, False)


def test_a_study_that_could_not_run_is_not_submitted(slurm: Path) -> None:
    words = ("nsd_root=nowhere", "sources.phantom.phantom_data=false", "sources.phantom.subjects=[1]")
    with pytest.raises(NdDistError, match="nowhere"):
        submit_study(tiny(slurm, *words), False)
    assert not (slurm / "calls").exists()


def test_a_second_command_that_runs_or_submits_a_study_is_refused(slurm: Path) -> None:
    study = tiny(slurm)
    folder = RunFolder(study.study_dir, "study-1")
    try:
        for command in (lambda: run_study(study, LaunchOptions()), lambda: submit_study(study, False)):
            with pytest.raises(WorldError, match="Another command works in this run folder(.|\n)*study-1"):
                command()
    finally:
        folder.release()


def test_a_ridge_regression_is_fitted_once_for_all_seeds_and_evaluated_for_each(tmp_path: Path) -> None:
    plan = plan_study(tiny(tmp_path, "seeds=[0,7]", sources=ONE))
    ridge = [(stage.name, stage.needs) for stage in plan if stage.decoder == "ridge"]
    fit = "train phantom ridge subject 1"
    assert ridge == [
        (fit, ("pack phantom network",)),
        ("evaluate phantom ridge seed 0 subject 1", (fit,)),
        ("evaluate phantom ridge seed 7 subject 1", (fit,)),
    ]


def test_a_stage_is_named_in_messages_as_it_is_typed(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    said = nd("study", "run", path, "--stage", "train phantom network seed 0 subject 9").stderr
    assert "did you mean train phantom network seed 0 subject" in said
