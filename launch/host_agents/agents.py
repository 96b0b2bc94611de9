"""The launching machine's side of ``launch.host_agents.agent``: one ssh connection per host, all asked at once.

Before a launch: what every host has, and everything that is wrong, said per host. During a launch: which hosts have
stopped answering. After it: nothing of the launch is left on any host that can be reached.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

from launch.host_agents.agent import CODE, versions
from launch.plans.deepspeed import SSH_OPTIONS
from launch.plans.hosts import Host, is_loopback
from nd_dist.config import LaunchConfig
from nd_dist.errors import WorldError
from nd_dist.files import write_text
from nd_dist.versions import PACKAGES

FACTS_WITHIN_S = 45.0
BEAT_S = 2.0
LOST_BEATS = 15  # beats without an answer: half a minute; a link that is away for twenty seconds is sat out
END_WITHIN_S = 15.0


@dataclass(frozen=True)
class Inquiry:
    """What the hosts are asked.

    Args:
        launch_id: The launch to keep watch over; empty: answer and end.
        shared_dir: A folder that all hosts must see.
        launch: Interpreter of the agents, interface and port of the rendezvous.
        ranks_meet: Whether ranks on different hosts talk to each other; otherwise a host's own name may mean anything.
    """

    launch_id: str
    shared_dir: Path
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    ranks_meet: bool = True


@dataclass(frozen=True)
class HostFacts:
    """What one host answered: what is wrong there, where the others reach it, a free port, its NVIDIA devices."""

    host: Host
    problems: tuple[str, ...]
    address: str = ""
    port: int = 0
    gpus: int = 0


class _Agent:
    """The connection to one host's agent: its process (ssh), its log, what it answered, whether it still does.

    Args:
        host: Where.
        log: Takes everything that it says.
    """

    def __init__(self, host: Host, log: Path) -> None:
        self.host, self._log = host, log
        self.facts: dict[str, Any] = {}  # Any: JSON from the other side
        self.answered, self.ended = threading.Event(), threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._unanswered = 0
        self._said: list[str] = []

    @property
    def is_lost(self) -> bool:
        """Whether the host does not respond any more."""
        return self.ended.is_set() or self._unanswered > LOST_BEATS

    def start(self, command: list[str], environ: Mapping[str, str], request: str) -> None:
        """Start the agent, ask, and listen from now on."""
        self._note(f"--- {shlex.join(command)}\n".encode())
        try:
            self._process = subprocess.Popen(
                command, env=environ, stdin=PIPE, stdout=PIPE, stderr=STDOUT,
                start_new_session=True,  # ctrl-C at the terminal is the launcher's to handle
            )  # fmt: skip
        except OSError as error:  # there is no ssh here
            self._said.append(str(error))
        threading.Thread(target=self._listen, daemon=True).start()
        self.send(request)

    def _listen(self) -> None:
        """Take in what the agent says until it ends."""
        if self._process is not None and self._process.stdout is not None:
            with self._process.stdout as lines:
                for line in lines:
                    self._take(line)
        self.ended.set()
        self.answered.set()

    def _take(self, line: bytes) -> None:
        """Take in one line."""
        try:
            answer = json.loads(line)
        except ValueError:  # what ssh or a login script prints
            answer = None
            self._said.append(line.decode(errors="replace").strip())
        if answer is not None:
            self._unanswered = 0
        if answer != {"beat": True}:
            self._note(line)
        if isinstance(answer, dict) and "versions" in answer:
            self.facts = answer
            self.answered.set()

    def send(self, text: str) -> None:
        """Send a line; a host that takes none will be found lost."""
        if self._process is not None and self._process.stdin is not None and not self.is_lost:
            with contextlib.suppress(OSError):
                self._process.stdin.write(f"{text}\n".encode())
                self._process.stdin.flush()

    def beat(self) -> None:
        """Ask for a sign of life."""
        self._unanswered += 1
        self.send("beat")

    def close(self) -> None:
        """End this side of the connection."""
        if self._process is not None and self._process.stdin is not None:
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def _note(self, text: bytes) -> None:
        with contextlib.suppress(OSError), open(self._log, "ab") as log:  # a full disk must not end the beats
            log.write(text)

    def problems(self, wanted: Mapping[str, str], where: str, must_meet: bool) -> list[str]:
        """Return what is wrong on the host.

        Args:
            wanted: Versions that it should have.
            where: Who has these versions, for messages.
            must_meet: Whether its ranks meet those of other hosts, at addresses that nobody chose.
        """
        if not self.facts:
            return [" ".join(line for line in self._said if line)[-300:] or "no answer over ssh in time"]
        found, has = self.facts, self.facts["versions"]
        known = ((name, has.get(name), version) for name, version in wanted.items())
        problems = [f"{name} is {there} there and {here} {where}" for name, there, here in known if there != here]
        if found["shared"]:
            problems.append(f"does not see the shared folder ({found['shared']})")
        if found["address"].startswith("no interface"):
            problems.append(found["address"])
        if must_meet and is_loopback(found["address"]):
            problems.append(
                f"is reached at {found['address']}, which is another machine for every other host: write "
                f"{found['host']} instead of {self.host.name} in the hostfile, or set launch.interface"
            )
        elif must_meet and is_loopback(found["own_address"]):
            problems.append(
                f"its own name {found['host']} means {found['own_address']}, where gloo would listen for the others: "
                "set launch.interface, or correct its /etc/hosts"
            )
        return problems


class HostAgents:
    """Agents on hosts; a context manager that ends them, and what the launch left there, on the way out.

    Args:
        hosts: Where.
        inquiry: What to ask.
        log_dir: Takes a ``host-NAME.log`` per host with everything that it said.
        environ: Environment for ssh.
        always_ssh: Use ssh for this machine too (DeepSpeed with pdsh does).
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        inquiry: Inquiry,
        log_dir: Path,
        environ: Mapping[str, str],
        always_ssh: bool = False,
    ) -> None:
        self._inquiry, self._environ, self._always_ssh = inquiry, environ, always_ssh
        log_dir.mkdir(parents=True, exist_ok=True)
        self._agents = [_Agent(host, log_dir / f"host-{host.name}.log") for host in hosts]
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._keep_beating, daemon=True)

    def __enter__(self) -> HostAgents:
        """Ask every host, and wait until all have answered or had their time to."""
        token, inquiry = uuid.uuid4().hex, self._inquiry
        token_path = inquiry.shared_dir / f".nd-token-{os.getpid()}-{time.time_ns()}"
        request = {
            "launch": inquiry.launch_id, "packages": list(PACKAGES), "token": token, "token_path": str(token_path),
            "interface": inquiry.launch.interface, "port": inquiry.launch.port,
        }  # fmt: skip
        write_text(token_path, token)
        try:
            for agent in self._agents:
                agent.start(*self._command(agent.host), json.dumps(request))
            _wait_for([agent.answered for agent in self._agents], FACTS_WITHIN_S)
        finally:
            token_path.unlink(missing_ok=True)
        self._beats.start()
        return self

    def _keep_beating(self) -> None:
        """Ask every host for a sign of life until the launch is over."""
        while not self._over.wait(BEAT_S):
            for agent in self._agents:
                agent.beat()

    def __exit__(self, *_: object) -> None:
        """Tell every agent to clear its host; wait a while for those that answer."""
        self._over.set()
        self._beats.join()
        for agent in self._agents:
            agent.send("end")
        _wait_for([agent.ended for agent in self._agents if not agent.is_lost], END_WITHIN_S)
        for agent in self._agents:
            agent.close()

    def facts(self) -> tuple[HostFacts, ...]:
        """Return what every host answered, with what is wrong there.

        Versions are compared with this machine's; with those of the first host where the ranks have an interpreter of
        their own, but for this very code, which is always compared.
        """
        wanted, where = versions(list(PACKAGES)), "here"
        first, inquiry = self._agents[0], self._inquiry
        if inquiry.launch.python and first.facts:
            wanted, where = {**first.facts["versions"], CODE: wanted[CODE]}, f"on {first.host.name}"
        must_meet = len(self._agents) > 1 and inquiry.ranks_meet and not inquiry.launch.interface
        machines: dict[str, str] = {}
        found: list[HostFacts] = []
        for agent in self._agents:
            name, problems, has = agent.host.name, agent.problems(wanted, where, must_meet), agent.facts
            if has and (known := machines.setdefault(has["machine"], name)) != name:
                problems.append(f"is the same machine as {known}: name it once, with all its slots")
            answers = (has["address"], has["port"], has["gpus"]) if has else ()
            found.append(HostFacts(agent.host, tuple(problems), *answers))
        return tuple(found)

    def lost(self) -> tuple[str, ...]:
        """Return the names of the hosts that do not answer any more."""
        return tuple(agent.host.name for agent in self._agents if agent.is_lost)

    def _command(self, host: Host) -> tuple[list[str], Mapping[str, str]]:
        """Return the words that start the agent of a host, and their environment."""
        python = [self._inquiry.launch.python or sys.executable, "-m", "launch.host_agents.agent"]
        if host.is_local and not self._always_ssh:  # how the user reached this machine says nothing
            return python, {name: value for name, value in self._environ.items() if name != "SSH_CONNECTION"}
        path = f"PYTHONPATH={self._environ.get('PYTHONPATH', '')}"
        remote = f"exec {shlex.join(['env', path, *python])}"
        return ["ssh", *shlex.split(SSH_OPTIONS), host.login, remote], self._environ


def _wait_for(events: Sequence[threading.Event], within_s: float) -> None:
    """Wait until everything has happened or the time is over."""
    deadline = time.monotonic() + within_s
    for event in events:
        event.wait(max(0.0, deadline - time.monotonic()))


def require_hosts(facts: Sequence[HostFacts]) -> None:
    """Refuse a launch on hosts that cannot take part.

    Raises:
        WorldError: names every such host and everything that is wrong there.
    """
    bad = [item for item in facts if item.problems]
    if bad:
        lines = [f"{item.host.name}: {'; '.join(item.problems)}" for item in bad]
        raise WorldError(
            f"{len(bad)} of {len(facts)} hosts cannot take part.",
            found="\n    ".join(["", *lines]),
            todo="fix them (check again with `nd doctor --hostfile`), or leave them out with --exclude",
        )
