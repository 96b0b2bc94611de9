"""Hosts for the cluster tests; without root or namespaces every test here is skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Cluster, cluster, reason_against
from tests.cluster.jobs import TINY, run_nd, words_of
from tests.cluster.slurm import wait_for_nodes, write_slurm

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder, and skip it where hosts cannot be made."""
    mine = [item for item in items if HERE in item.path.parents]
    reason = reason_against() if mine else ""
    for item in mine:
        item.add_marker(pytest.mark.cluster)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three hosts for the whole session."""
    with cluster(tmp_path_factory.mktemp("cluster"), 3) as made:
        yield made


@pytest.fixture
def healthy(hosts: Cluster) -> Iterator[Cluster]:
    """The three hosts, all up; whatever a test broke is repaired after it."""
    hosts.repair()
    yield hosts
    hosts.repair()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two hosts with Slurm."""
    folder = tmp_path_factory.mktemp("slurm")
    boot = folder / "slurm" / "boot"
    plain = Cluster(folder, 2)
    write_slurm(folder / "slurm", plain.names, [plain.address(name) for name in plain.names])
    with cluster(folder, 2, lambda name: [[str(boot), name]]) as made:
        wait_for_nodes(made)
        yield made


@pytest.fixture(scope="session")
def packed(hosts: Cluster) -> Path:
    """A folder with a phantom and its shards, packed by MPI ranks on two hosts."""
    folder = hosts.folder / "line"
    folder.mkdir()
    (folder / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    run_nd(hosts, "node1", "phantom", str(folder / "nsd"), *TINY)
    run_nd(hosts, "node1", "pack", "demo", *words_of(folder), "--hostfile", str(folder / "hosts"))
    return folder


@pytest.fixture(scope="session")
def trained(hosts: Cluster, packed: Path) -> Path:
    """The same folder after two stages of training over two hosts: DeepSpeed, started with pdsh."""
    run_nd(hosts, "node1", "train", "demo", *words_of(packed), "--hostfile", str(packed / "hosts"))
    return packed


@pytest.fixture
def broken(healthy: Cluster, packed: Path, tmp_path: Path) -> Path:
    """A folder for a run that will be broken: the packed shards, an empty run folder."""
    folder = healthy.folder / tmp_path.name
    folder.mkdir()
    (folder / "hosts").write_text((packed / "hosts").read_text())
    for name in ("nsd", "shards"):
        (folder / name).symlink_to(packed / name)
    return folder
