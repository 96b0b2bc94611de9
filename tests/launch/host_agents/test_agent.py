import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from launch.host_agents.agent import facts, kill, processes_of
from launch.host_agents.agents import HostAgents, Inquiry, require_hosts
from launch.plans.environment import environment
from launch.plans.hosts import Host
from launch.plans.tools import free_port_from, require_port
from nd_dist.errors import WorldError
from tests.support.waiting import HANG_S, wait_until

HERE = (Host("localhost", 2),)


def launch_id(command: str) -> str:
    """Return an id that no other test run on this machine uses: agents kill whatever carries it."""
    return f"{command}-{os.getpid()}-1"


def sleeper(mark: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({2 * HANG_S})", mark])
    wait_until(lambda: mark.encode() in Path(f"/proc/{process.pid}/cmdline").read_bytes())
    return process


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(HANG_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def test_leftovers_of_a_launch_are_killed_and_nothing_else() -> None:
    ours, others = sleeper(launch_id("train")), sleeper(launch_id("evaluate"))
    try:
        assert [line.split()[0] for line in kill(processes_of(launch_id("train")))] == [str(ours.pid)]
        assert has_ended(ours)
        assert others.poll() is None
    finally:
        others.kill()
        ours.kill()


def test_an_agent_answers_what_its_host_has_and_clears_it_at_the_end(tmp_path: Path) -> None:
    left = sleeper(launch_id("evaluate"))
    try:
        with HostAgents(HERE, Inquiry(launch_id("evaluate"), tmp_path), tmp_path / "logs", environment()) as agents:
            (answer,) = agents.facts()
            assert answer.problems == ()
            assert answer.port > 0
            assert agents.lost() == ()
            assert left.poll() is None
        assert has_ended(left)
    finally:
        left.kill()
    log = (tmp_path / "logs" / "host-localhost.log").read_text()
    assert str(left.pid) in log
    assert '"python": "3.' in log
    assert '"beat"' not in log
    assert list(tmp_path.glob(".nd-token*")) == []


def test_an_agent_that_is_gone_makes_its_host_lost(tmp_path: Path) -> None:
    with HostAgents(HERE, Inquiry(launch_id("sweep"), tmp_path), tmp_path, environment()) as agents:
        (agent,) = [
            child for child in psutil.Process().children() if "launch.host_agents.agent" in " ".join(child.cmdline())
        ]
        agent.kill()
        assert wait_until(agents.lost) == ("localhost",)


def test_an_agent_whose_launching_process_is_killed_clears_its_host_and_leaves(tmp_path: Path) -> None:
    left = sleeper(launch_id("pack"))
    request = {"launch": launch_id("pack"), "packages": [], "token": "", "token_path": str(tmp_path / "none"),
               "interface": "", "port": 0}  # fmt: skip
    agent = subprocess.Popen(
        [sys.executable, "-m", "launch.host_agents.agent"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    )
    try:
        assert agent.stdin is not None
        assert agent.stdout is not None
        agent.stdin.write((json.dumps(request) + "\n").encode())
        agent.stdin.flush()
        assert json.loads(agent.stdout.readline())["host"] == socket.gethostname()
        agent.stdin.close()  # what the end of the ssh connection looks like
        assert has_ended(left)
        assert has_ended(agent)
    finally:
        left.kill()
        agent.kill()


@pytest.fixture
def fake_ssh(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Makes an environment whose ssh is a script that is given the remote command as its last word."""

    def make(script: str) -> dict[str, str]:
        (tmp_path / "ssh").write_text(f"#!/bin/sh\nfor word; do :; done\n{script}\n")
        (tmp_path / "ssh").chmod(0o755)
        return {**environment(), "PATH": f"{tmp_path}:/usr/bin:/bin"}

    return make


def test_every_problem_of_a_host_is_said(tmp_path: Path, fake_ssh: Callable[[str], dict[str, str]]) -> None:
    environ = fake_ssh("echo 'ssh: connect to host gpu9 port 22: No route to host'; exit 255")
    with HostAgents((Host("gpu9", 1),), Inquiry("", tmp_path), tmp_path, environ) as agents:
        with pytest.raises(WorldError, match="gpu9: ssh: connect to host gpu9 port 22: No route") as caught:
            require_hosts(agents.facts())
    assert caught.value.exit_code == 3


def test_a_machine_without_ssh_says_so_instead_of_a_traceback(tmp_path: Path) -> None:
    with HostAgents((Host("gpu9", 1),), Inquiry("", tmp_path), tmp_path, {"PATH": str(tmp_path)}) as agents:
        (facts,) = agents.facts()
    assert "No such file or directory: 'ssh'" in facts.problems[0]


def test_one_machine_under_two_names_and_a_meeting_on_loopback_are_refused(
    tmp_path: Path, fake_ssh: Callable[[str], dict[str, str]]
) -> None:
    environ = fake_ssh('SSH_CONNECTION="10.0.0.9 4000 127.0.0.1 22" exec sh -c "$word"')
    hosts = (Host("gpu1", 1), Host("gpu1-ib", 1))
    with HostAgents(hosts, Inquiry("", tmp_path), tmp_path, environ) as agents:
        first, second = agents.facts()
    assert any("is reached at 127.0.0.1" in problem for problem in first.problems)
    assert not any("same machine" in problem for problem in first.problems)
    assert "is the same machine as gpu1: name it once, with all its slots" in second.problems
    with HostAgents(hosts[:1], Inquiry("", tmp_path), tmp_path, environ) as agents:
        assert agents.facts()[0].problems == (), "a host alone may meet itself on loopback"


def test_how_a_user_reached_this_machine_says_nothing_about_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "127.0.0.1 4000 127.0.0.1 22")  # through a tunnel
    with HostAgents(HERE, Inquiry("", tmp_path), tmp_path, environment()) as agents:
        own = facts({"packages": [], "token": "", "token_path": "", "interface": "", "port": 0})["own_address"]
        assert agents.facts()[0].address == own


def test_a_busy_port_is_passed_over() -> None:
    with socket.socket() as busy:
        busy.bind(("", 0))
        port = busy.getsockname()[1]
        assert port < free_port_from(port) <= port + 50


def test_no_free_port_in_reach_is_one_clear_error() -> None:
    assert require_port(5000, 5000) == 5000
    with pytest.raises(WorldError, match=r"launch\.port"):
        require_port(0, 5000)


def test_an_interface_is_looked_up_by_name(tmp_path: Path) -> None:
    request = {"packages": [], "token": "x", "token_path": str(tmp_path / "none"), "port": 0}
    assert facts({**request, "interface": "lo"})["address"] == "127.0.0.1"
    assert facts({**request, "interface": "nope0"})["address"] == "no interface nope0"
    assert "No such file" in facts({**request, "interface": ""})["shared"]


def problems_of(folder: Path, *names: str) -> list[str]:
    """Return what is wrong with hosts that all are this machine, asked without ssh."""
    hosts = [Host(name, 1) for name in names]
    with HostAgents(hosts, Inquiry("", folder), folder, environment()) as agents:
        return ["; ".join(facts.problems) for facts in agents.facts()]


def test_a_name_that_means_another_machine_on_each_host_is_a_problem_where_there_are_several(tmp_path: Path) -> None:
    first, second = problems_of(tmp_path, "localhost", socket.gethostname())
    assert f"write {socket.gethostname()} instead of localhost" in first
    assert "is the same machine as localhost" in second
    assert problems_of(tmp_path, "localhost") == [""]
