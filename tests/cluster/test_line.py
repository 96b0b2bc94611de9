"""The whole line over several hosts, equal to the same line on one."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from nd_dist.events import events_path, read_events
from tests.cluster.hosts import Cluster
from tests.cluster.jobs import losses, metrics_points, record_start, require_launcher, run_nd, words_of

THREE_HOSTS = ["node1 slots=1", "node2 slots=2", "node3 slots=1"]


def curve(run_dir: Path, rank: int = 0) -> dict[tuple[int, int], float]:
    return losses(list(read_events(events_path(run_dir, rank))))


def hosts_of(run_dir: Path, command: str, ranks: int) -> list[str]:
    events = [event for rank in range(ranks) for event in read_events(events_path(run_dir, rank))]
    return [e["host"] for e in events if e["event"] == "rank_start" and e["command"] == command]


@pytest.fixture(scope="module")
def evaluated(hosts: Cluster, trained: Path) -> Path:
    """The trained run, evaluated and swept by MPI ranks on two hosts."""
    for command in ("evaluate", "sweep"):
        run_nd(hosts, "node1", command, "demo", *words_of(trained), "--hostfile", str(trained / "hosts"))
    return trained


def test_every_command_ran_on_both_hosts_and_left_nothing(hosts: Cluster, evaluated: Path) -> None:
    for command in ("pack", "train", "evaluate", "sweep"):
        assert hosts_of(evaluated / "run", command, 2) == ["node1", "node2"], command
        if command != "train":
            record_start(f"{command}, mpirun", evaluated / "run", command, 2)
    for host in hosts.hosts.values():
        assert host.leftovers() == {}


def test_shards_packed_on_two_hosts_are_those_of_one(hosts: Cluster, packed: Path) -> None:
    other = hosts.folder / "one-pack"
    run_nd(hosts, "node3", "pack", "demo", *words_of(other, nsd_root=packed / "nsd"), "--ranks", "1")
    assert_equal_shards(other, packed)


def assert_equal_shards(other: Path, packed: Path) -> None:
    files = sorted(path.relative_to(packed) for path in (packed / "shards").rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in (other / "shards").rglob("*") if path.is_file())
    for name in files:
        if name.suffix in (".tar", ".safetensors", ".npy") or name.name == "index.json":
            assert (packed / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.slow
def test_sixteen_oversubscribed_ranks_on_three_hosts_pack_the_same_shards(
    healthy: Cluster, packed: Path, broken: Path
) -> None:
    (broken / "hosts").write_text("node1 slots=5\nnode2 slots=6\nnode3 slots=5\n")
    (broken / "shards").unlink()
    run_nd(healthy, "node1", "pack", "demo", *words_of(broken), "--hostfile", str(broken / "hosts"))
    assert hosts_of(broken / "run", "pack", 16) == ["node1"] * 5 + ["node2"] * 6 + ["node3"] * 5
    assert_equal_shards(broken, packed)
    assert not any(host.leftovers() for host in healthy.hosts.values())


def test_training_over_two_hosts_follows_the_curve_of_one(hosts: Cluster, trained: Path) -> None:
    other = hosts.folder / "one-train"
    run_nd(hosts, "node3", "train", "demo", *words_of(other, shards_dir=trained / "shards"), "--ranks", "2")
    assert hosts_of(other / "run", "train", 2) == ["node3", "node3"]
    assert curve(trained / "run") == curve(other / "run")
    record_start("train, local", other / "run", "train", 2)
    record_start("train, deepspeed-pdsh", trained / "run", "train", 2)


def test_evaluation_and_sweep_over_two_hosts_give_the_metrics_of_one(hosts: Cluster, evaluated: Path) -> None:
    other = hosts.folder / "one-evaluate"
    shutil.copytree(evaluated / "run" / "checkpoints", other / "run" / "checkpoints")
    for command in ("evaluate", "sweep"):
        words = words_of(other, shards_dir=evaluated / "shards")
        run_nd(hosts, "node3", command, "demo", *words, "--ranks", "1")
    assert metrics_points(other / "run") == metrics_points(evaluated / "run")


def test_open_mpis_launcher_trains_the_same(healthy: Cluster, trained: Path, broken: Path) -> None:
    require_launcher("deepspeed-openmpi")
    hosts = ["--hostfile", str(broken / "hosts"), "--launcher", "deepspeed-openmpi"]
    run_nd(healthy, "node1", "train", "demo", *words_of(broken), *hosts)
    assert hosts_of(broken / "run", "train", 2) == ["node1", "node2"]
    assert curve(broken / "run") == curve(trained / "run")
    record_start("train, deepspeed-openmpi", broken / "run", "train", 2)


def test_the_users_own_deepspeed_command_trains_the_same_over_two_hosts(
    healthy: Cluster, trained: Path, broken: Path
) -> None:
    """deepspeed --hostfile hosts --module launch.join train RECIPE key=value ..."""
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(broken / "hosts")]
    words = ["--module", "launch.join", "train", "demo", *words_of(broken)]
    result = healthy.run("node1", [*deepspeed, *words])
    assert result.returncode == 0, result.stdout + result.stderr
    assert hosts_of(broken / "run", "train", 2) == ["node1", "node2"]
    assert curve(broken / "run") == curve(trained / "run")
    assert not any(host.leftovers() for host in healthy.hosts.values())


def test_a_hostfile_in_open_mpis_form_with_a_user_trains_the_same(
    healthy: Cluster, trained: Path, broken: Path
) -> None:
    (broken / "hosts").write_text("root@node[1-2] slots=1 max_slots=2\r\n")
    run_nd(healthy, "node1", "train", "demo", *words_of(broken), "--hostfile", str(broken / "hosts"))
    assert hosts_of(broken / "run", "train", 2) == ["node1", "node2"]
    assert curve(broken / "run") == curve(trained / "run")


@pytest.mark.slow
def test_three_hosts_with_unequal_slots_train_and_evaluate_the_same(
    healthy: Cluster, trained: Path, evaluated: Path, broken: Path
) -> None:
    (broken / "hosts").write_text("\n".join(THREE_HOSTS) + "\n")
    words = words_of(broken)
    run_nd(healthy, "node1", "train", "demo", *words, "--hostfile", str(broken / "hosts"))
    assert hosts_of(broken / "run", "train", 4) == ["node1", "node2", "node2", "node3"]
    four, two = curve(broken / "run"), curve(trained / "run")
    assert four.keys() == two.keys()
    assert {key: four[key] for key in four if key[1] < 8} == pytest.approx(
        {key: two[key] for key in two if key[1] < 8}, rel=1e-4
    )
    shutil.rmtree(broken / "run" / "checkpoints")
    shutil.copytree(trained / "run" / "checkpoints", broken / "run" / "checkpoints")
    for command in ("evaluate", "sweep"):
        run_nd(healthy, "node1", command, "demo", *words, "--hostfile", str(broken / "hosts"))
    assert metrics_points(broken / "run") == metrics_points(evaluated / "run")


@pytest.mark.slow
def test_a_run_folder_with_a_hostile_name_and_a_working_folder_like_it_work(
    healthy: Cluster, trained: Path, broken: Path
) -> None:
    hostile = broken / 'it\'s $HOME %h & "more"'
    hostile.mkdir()
    words = ["train", "demo", *words_of(broken, run_dir="'relative run'"), "--hostfile", str(broken / "hosts")]
    run_nd(healthy, "node1", *words, cwd=hostile)
    assert curve(hostile / "relative run") == curve(trained / "run")
