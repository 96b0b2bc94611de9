"""What is wrong on a host is said per host before ranks start: `nd doctor --hostfile` and every launch."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from tests.cluster.hosts import ROOT, Cluster
from tests.cluster.jobs import ND, hostfile, run_nd, words_of


def metadata_of(package: str) -> Path:
    """Return the file that says which version of a package is installed."""
    found = [file for file in importlib.metadata.files(package) or () if file.name == "METADATA"]
    return Path(str(found[0].locate()))


def test_doctor_finds_equal_hosts_ready(healthy: Cluster) -> None:
    hosts = hostfile(healthy.folder, *(f"{name} slots=1" for name in healthy.names))
    text = run_nd(healthy, "node1", "doctor", "--hostfile", str(hosts), "--shared", str(healthy.folder))
    assert text.count("Python, packages and code as here") == 3
    for host in healthy.hosts.values():
        assert host.leftovers() == {}


def test_doctor_names_what_is_wrong_on_every_host_at_once(healthy: Cluster, tmp_path: Path) -> None:
    fake = healthy.folder / "METADATA"
    fake.write_text(metadata_of("webdataset").read_text().replace("\nVersion: ", "\nVersion: 9.", 1))
    mounted = str(metadata_of("webdataset"))
    assert healthy.run("node2", ["mount", "--bind", str(fake), mounted]).returncode == 0
    healthy.cut("node3")
    hosts = hostfile(healthy.folder, *(f"{name} slots=1" for name in healthy.names))
    try:
        result = healthy.run("node1", [*ND, "doctor", "--hostfile", str(hosts), "--shared", "/tmp"])
    finally:
        healthy.run("node2", ["umount", mounted])
    assert result.returncode == 3, result.stderr
    lines = result.stdout.splitlines()
    assert any("host node2" in line and "webdataset is 9." in line for line in lines)
    assert any("host node2" in line and "does not see the shared folder" in line for line in lines)
    assert any("host node3" in line and "missing" in line for line in lines)
    assert any("host node1" in line and "ok" in line for line in lines)


def test_doctor_and_launch_take_the_same_road_and_refuse_the_same_hosts(
    healthy: Cluster, packed: Path, broken: Path
) -> None:
    (broken / "hosts").write_text(f"localhost slots=1\nnode2 slots=1\n{healthy.address('node2')} slots=1\n")
    doctor = healthy.run("node1", [*ND, "doctor", "--hostfile", str(broken / "hosts"), "--shared", str(broken)])
    words = ["train", "demo", *words_of(broken, training__samples_per_subject="[6,6]")]
    launch = healthy.run("node1", [*ND, *words, "--hostfile", str(broken / "hosts")])
    assert (doctor.returncode, launch.returncode) == (3, 3), doctor.stdout + launch.stdout + launch.stderr
    for text in (doctor.stdout, launch.stderr):
        assert "localhost port 22: Connection refused" in text  # sshd listens at the host's address alone
        assert "is the same machine as node2" in text
    ready = [*ND, "doctor", "--hostfile", str(packed / "hosts"), "--shared", str(broken)]
    assert healthy.run("node1", [*ready, "launch.interface=eth0"]).returncode == 0
    refused = healthy.run("node1", [*ready, "launch.interface=ib7"])
    assert refused.returncode == 3
    assert refused.stdout.count("no interface ib7") == 2


def test_a_launch_on_hosts_that_differ_is_refused_before_ranks_start(
    healthy: Cluster, packed: Path, broken: Path
) -> None:
    (broken / "hosts").write_text("node1 slots=1\nnode2 slots=1\nnowhere slots=1\n")
    other = healthy.folder / "other.py"
    other.write_text("# another state of the code\n")
    mounted = str(ROOT / "launch" / "__init__.py")
    assert healthy.run("node2", ["mount", "--bind", str(other), mounted]).returncode == 0
    try:
        words = ["train", "demo", *words_of(broken, training__samples_per_subject="[6,6]")]
        result = healthy.run("node1", [*ND, *words, "--hostfile", str(broken / "hosts")])
    finally:
        healthy.run("node2", ["umount", mounted])
    assert result.returncode == 3, result.stdout + result.stderr
    assert "2 of 3 hosts cannot take part" in result.stderr
    assert "node2: nd_dist code is" in result.stderr
    assert "nowhere: " in result.stderr
    assert not (broken / "run" / "events").exists()
    words = ["train", "demo", *words_of(broken), "--hostfile", str(broken / "hosts"), "--include", "node7"]
    assert healthy.run("node1", [*ND, *words]).returncode == 2


def test_a_name_by_which_other_hosts_cannot_reach_the_first_one_is_refused(healthy: Cluster, broken: Path) -> None:
    table = healthy.folder / "own-hosts"
    table.write_text(f"127.0.1.1 me\n{healthy.address('node2')} node2\n")
    (broken / "hosts").write_text("me slots=1\nnode2 slots=1\n")
    known = healthy.folder / "ssh" / "known_hosts"
    assert healthy.run("node1", ["mount", "--bind", str(table), "/etc/hosts"]).returncode == 0
    sshd = healthy.popen("node1", ["/usr/sbin/sshd", "-D", "-f", str(healthy.folder / "node1" / "sshd_config"),
                                   "-o", "ListenAddress=127.0.1.1"])  # fmt: skip
    line = next(line for line in known.read_text().splitlines() if line.startswith("node1,"))
    trust = ["bash", "-c", f"echo 'me,127.0.1.1 {line.split(' ', 1)[1]}' >> ~root/.ssh/known_hosts"]
    assert healthy.run("node1", trust).returncode == 0
    try:
        words = ["train", "demo", *words_of(broken), "--hostfile", str(broken / "hosts")]
        result = healthy.run("node1", [*ND, *words])
    finally:
        sshd.kill()
        healthy.run("node1", ["umount", "/etc/hosts"])
    assert result.returncode == 3, result.stdout + result.stderr
    assert "me: is reached at 127.0.1.1" in result.stderr
    assert "write node1 instead of me" in result.stderr
