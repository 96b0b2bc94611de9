"""The connection to one host's agent: its process (ssh), its log, what it answered, and when it last did."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.plans.hosts import Host, is_loopback

LOST_BEATS = 15  # beats without an answer: half a minute; a link that is away for twenty seconds is sat out


@dataclass(frozen=True)
class HostFacts:
    """What one host answered.

    Args:
        host: As the hostfile names it.
        problems: What is wrong there, empty if it can take part.
        address: Where the other hosts reach it.
        port: A free port on it.
        gpus: NVIDIA devices that it shows.
        versions: Of Python, packages, and this code.
    """

    host: Host
    problems: tuple[str, ...]
    address: str = ""
    port: int = 0
    gpus: int = 0
    versions: Mapping[str, str] | None = None


class AgentLink:
    """One host's agent.

    Args:
        host: Where.
        log: Takes everything that it says.
    """

    def __init__(self, host: Host, log: Path) -> None:
        self.host, self._log = host, log
        self.facts: dict[str, Any] = {}  # Any: JSON from the other side
        self.has_ended = False
        self.output = -1
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self._unanswered = 0
        self._said: list[str] = []

    @property
    def is_lost(self) -> bool:
        """Whether the host does not answer any more."""
        return self.has_ended or self._unanswered > LOST_BEATS

    def start(self, command: list[str], request: dict[str, Any], environ: Mapping[str, str]) -> None:
        """Start the agent and ask."""
        with open(self._log, "ab") as log:
            log.write(f"--- {shlex.join(command)}\n".encode())
        self._process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # ctrl-C at the terminal is the launcher's to handle
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.output = self._process.stdout.fileno()
        os.set_blocking(self.output, False)
        os.set_blocking(self._process.stdin.fileno(), False)
        self.send(json.dumps(request) + "\n")

    def beat(self) -> None:
        """Ask for a sign of life."""
        self._unanswered += 1
        self.send("beat\n")

    def send(self, text: str) -> None:
        """Send a line; a host that takes none will be found lost."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                os.write(self._process.stdin.fileno(), text.encode())

    def read(self) -> None:
        """Take in what the agent said."""
        try:
            text = os.read(self.output, 65536)
        except BlockingIOError:
            return
        if said := text.replace(b'{"beat": true}\n', b""):
            with contextlib.suppress(OSError), open(self._log, "ab") as log:  # a full disk must not end the beats
                log.write(said)
        *lines, self._rest = (self._rest + text).split(b"\n")
        for line in lines:
            self._take(line.decode(errors="replace").strip())
        self.has_ended = not text

    def _take(self, line: str) -> None:
        """Take in one line."""
        try:
            answer = json.loads(line)
        except json.JSONDecodeError:
            self._said.append(line)  # what ssh or a login script prints
            return
        self._unanswered = 0
        if isinstance(answer, dict) and "versions" in answer:
            self.facts = answer

    @property
    def machine(self) -> str:
        """What tells the machine from others, by whatever name it is reached."""
        return f"{self.facts['host']} {self.facts['addresses']}" if self.facts else self.host.name

    def host_facts(
        self, wanted: Mapping[str, str], where: str, is_alone: bool, interface: str, first_name: str
    ) -> HostFacts:
        """Return what the host answered and what is wrong there.

        Args:
            wanted: Versions that it should have.
            where: Who has these versions, for messages.
            is_alone: Whether its ranks meet none of other hosts.
            interface: The chosen network interface, if one was.
            first_name: The first of the hosts that are this machine.
        """
        if not self.facts:
            said = " ".join(line for line in self._said if line)[-300:]
            return HostFacts(self.host, (said or "no answer over ssh in time",))
        found = self.facts
        problems = [
            f"{name} is {found['versions'].get(name)} there and {version} {where}"
            for name, version in wanted.items()
            if found["versions"].get(name) != version
        ]
        if found["shared"]:
            problems.append(f"does not see the shared folder ({found['shared']})")
        if first_name != self.host.name:
            problems.append(f"is the same machine as {first_name}")
        if not is_alone and is_loopback(found["address"] or self.host.name):
            problems.append(
                f"other hosts cannot reach it by this name: write one that they know, such as {found['host']}"
            )
        if found["address"].startswith("no interface"):
            problems.append(found["address"])
        if not is_alone and not interface and found["own_address"].startswith("127."):
            problems.append(
                f"its own name {found['host']} means {found['own_address']}, where gloo would listen for the others: "
                "set launch.interface, or correct its /etc/hosts"
            )
        return HostFacts(self.host, tuple(problems), found["address"], found["port"], found["gpus"], found["versions"])

    def close(self) -> None:
        """End the connection."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
