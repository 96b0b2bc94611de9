"""The launching machine's side of ``launch.host_agents.agent``: one ssh connection per host, all asked at once.

Before a launch: what every host has, and everything that is wrong, said per host. During a launch: which hosts have
stopped answering. After it: nothing of the launch is left on any host that can be reached.
"""

from __future__ import annotations

import os
import selectors
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from launch.host_agents.agent import CODE, versions
from launch.host_agents.link import AgentLink, HostFacts
from launch.plans.deepspeed import SSH_OPTIONS
from launch.plans.hosts import Host
from nd_dist.errors import WorldError
from nd_dist.files import write_text
from nd_dist.versions import PACKAGES

FACTS_WITHIN_S = 45.0
BEAT_S = 2.0
END_WITHIN_S = 15.0
POLL_S = 0.2


@dataclass(frozen=True)
class Inquiry:
    """What the hosts are asked.

    Args:
        launch_id: The launch to keep watch over; empty: answer and end.
        shared_dir: A folder that all hosts must see.
        interface: Network interface of the rendezvous; empty: the one that ssh uses.
        port: First port to try; 0: any.
        python: Interpreter of the agents.
        ranks_meet: Whether ranks on different hosts talk to each other; otherwise a host's own name may mean anything.
    """

    launch_id: str
    shared_dir: Path
    interface: str = ""
    port: int = 0
    python: str = sys.executable
    ranks_meet: bool = True


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
        self._agents = [AgentLink(host, log_dir / f"host-{host.name}.log") for host in hosts]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)

    def __enter__(self) -> HostAgents:
        inquiry = self._inquiry
        token, token_path = uuid.uuid4().hex, inquiry.shared_dir / f".nd-token-{os.getpid()}-{time.time_ns()}"
        request = {
            "launch": inquiry.launch_id, "packages": list(PACKAGES), "token": token, "token_path": str(token_path),
            "interface": inquiry.interface, "port": inquiry.port,
        }  # fmt: skip
        write_text(token_path, token)
        with ExitStack() as connections:
            connections.callback(self._close)
            try:
                for agent in self._agents:
                    agent.start(self._command(agent.host), request, self._environ)
                self._wait(lambda agent: bool(agent.facts) or agent.has_ended, FACTS_WITHIN_S)
            finally:
                token_path.unlink(missing_ok=True)
            connections.pop_all()  # they stay open until the block's end
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell every agent to clear its host; wait a while for those that answer."""
        self._over.set()
        self._thread.join()
        for agent in self._agents:
            agent.send("end\n")
        self._wait(lambda agent: agent.has_ended or agent.is_lost, END_WITHIN_S)
        self._close()

    def _close(self) -> None:
        """End every connection."""
        for agent in self._agents:
            agent.close()

    def facts(self) -> tuple[HostFacts, ...]:
        """Return what every host answered, with what is wrong there.

        Versions are compared with this machine's; with those of the first host where the ranks have an interpreter of
        their own, but for this very code, which is always compared.
        """
        wanted, where = versions(list(PACKAGES)), "here"
        first = self._agents[0]
        if self._inquiry.python != sys.executable and first.facts:
            wanted, where = {**first.facts["versions"], CODE: wanted[CODE]}, f"on {first.host.name}"
        is_alone = len(self._agents) == 1 or not self._inquiry.ranks_meet
        names: dict[str, str] = {}
        for agent in reversed(self._agents):  # the first of several names of a machine is the one that counts
            names[agent.machine] = agent.host.name
        return tuple(
            agent.host_facts(wanted, where, is_alone, self._inquiry.interface, names[agent.machine])
            for agent in self._agents
        )

    def lost(self) -> tuple[str, ...]:
        """Return the names of the hosts that do not answer any more."""
        return tuple(agent.host.name for agent in self._agents if agent.is_lost)

    def _command(self, host: Host) -> list[str]:
        """Return the words that start the agent of a host."""
        python = [self._inquiry.python, "-m", "launch.host_agents.agent"]
        if host.is_local and not self._always_ssh:
            return python
        path = f"PYTHONPATH={self._environ.get('PYTHONPATH', '')}"
        return ["ssh", *shlex.split(SSH_OPTIONS), host.login, f"exec {shlex.join(['env', path, *python])}"]

    def _keep_beating(self) -> None:
        """Ask every host for a sign of life until the launch is over."""
        while not self._over.is_set():
            for agent in self._agents:
                agent.beat()
            deadline = time.monotonic() + BEAT_S
            while time.monotonic() < deadline and not self._over.is_set():
                self._read()

    def _wait(self, is_true: Callable[[AgentLink], bool], within_s: float) -> None:
        """Read answers until a condition holds for every agent or the time is over."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline and not all(is_true(agent) for agent in self._agents):
            self._read()

    def _read(self) -> None:
        """Read what the agents say, or wait a moment."""
        with selectors.DefaultSelector() as selector:
            for agent in self._agents:
                if not agent.has_ended:
                    selector.register(agent.output, selectors.EVENT_READ, agent)
            for key, _ in selector.select(POLL_S):
                key.data.read()


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
            todo="repair them (`nd doctor --hostfile` checks again), or leave them out with --exclude",
        )
