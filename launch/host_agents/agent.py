"""Runs on every host beside the ranks: ``python -m launch.host_agents.agent``, started over ssh.

It reads one JSON request from standard input and answers with what the host has (Python, packages, this code, whether
it sees the shared folder, a free port). Then it answers every beat. When the beats end, or when it is told to, it
kills whatever the launch left on its host: a cut-off host is cleared by its own agent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import select
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from socket import AF_INET, AF_INET6
from typing import Any

import psutil

from launch.plans.tools import free_port_from
from nd_dist.versions import CODE_DIR, installed_versions

CODE = "nd_dist code"
LOOK_S = 1.0
LOST_LOOKS = 30  # looks without a beat: the link is cut, or the launching machine is gone
_MPI_HELPERS = ("orted", "prted", "hydra_pmi_proxy", "hydra_bstrap_proxy")


def main() -> None:
    """Answer the request, then beats, until the launch is over."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request = json.loads(sys.stdin.readline())
    _say(facts(request))
    if request["launch"]:
        _say({"killed": _serve(request["launch"])})


def _say(value: object) -> None:
    """Write one JSON line; whoever reads it may be gone."""
    with contextlib.suppress(OSError):
        os.write(1, (json.dumps(value) + "\n").encode())


def _serve(launch: str) -> list[str]:
    """Answer beats until the end of the launch; return the command lines that had to be killed."""
    leftovers, unbeaten = Leftovers(launch), 0
    while unbeaten < LOST_LOOKS:
        leftovers.look()
        readable, _, _ = select.select([0], [], [], LOOK_S)
        if not readable:
            unbeaten += 1
            continue
        unbeaten = 0
        text = os.read(0, 65536)
        if not text or b"end" in text:
            break
        _say({"beat": True})
    return leftovers.kill()


class Leftovers:
    """The processes of one launch on this host.

    Args:
        launch: Its id, which stands in the command line of every rank and of the launchers above it.
    """

    def __init__(self, launch: str) -> None:
        self._launch = launch.encode()
        self._helpers: dict[int, str] = {}

    def look(self) -> None:
        """Remember the MPI helpers above the ranks: nothing else tells whose they are once the ranks are gone."""
        for pid in self._own():
            for above in _ancestors(pid):
                name = _stat_name(above)
                if name in _MPI_HELPERS:
                    self._helpers[above] = _start_time(above)

    def kill(self) -> list[str]:
        """Kill every process of the launch; return their command lines."""
        self.look()
        helpers = [pid for pid, start in self._helpers.items() if _start_time(pid) == start]
        killed: list[str] = []
        for pid in [*self._own(), *helpers]:
            words = _words(pid).replace(b"\0", b" ").decode(errors="replace").strip()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
                killed.append(f"{pid} {words[:200]}")
        return killed

    def _own(self) -> list[int]:
        """Return the processes that carry the launch's id in their command line."""
        spared = {os.getpid(), *_ancestors(os.getpid())}
        return [pid for pid in _pids() if pid not in spared and self._launch in _words(pid)]


def _pids() -> Iterator[int]:
    """Yield the process ids of this host."""
    yield from (int(name) for name in os.listdir("/proc") if name.isdigit())


def _words(pid: int) -> bytes:
    """Return a process's command line, empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _stat(pid: int) -> tuple[str, list[str]]:
    """Return a process's name and the fields after it, empty if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return "", ["Z", "0", *["0"] * 18]
    head, _, tail = text.rpartition(")")
    return head.partition("(")[2], tail.split()


def _stat_name(pid: int) -> str:
    return _stat(pid)[0]


def _start_time(pid: int) -> str:
    return _stat(pid)[1][19]


def _ancestors(pid: int) -> list[int]:
    """Return the processes above a process."""
    found: list[int] = []
    while (pid := int(_stat(pid)[1][1])) > 1:
        found.append(pid)
    return found


def facts(request: dict[str, Any]) -> dict[str, Any]:
    """Return what this host has.

    Args:
        request: ``packages`` (distribution names), ``token_path`` and ``token`` (a file that the launching machine
            wrote to the shared folder), ``interface`` and ``port`` (where the ranks shall meet; may be empty and 0).
    """
    return {
        "host": socket.gethostname(),
        "addresses": sorted(_addresses()),
        "versions": versions(request["packages"]),
        "shared": _shared(Path(request["token_path"]), request["token"]),
        "address": _address(request["interface"]),
        "own_address": _own_address(),
        "port": free_port_from(request["port"]),
        "gpus": sum(name.removeprefix("nvidia").isdigit() for name in os.listdir("/dev")),
    }


def versions(packages: list[str]) -> dict[str, str]:
    """Return the versions that must be equal on all hosts: Python, packages, and this very code."""
    return {"python": platform.python_version(), CODE: code_digest(), **installed_versions(packages)}


def code_digest() -> str:
    """Return a short hash over the source files of the three packages that this interpreter imports."""
    digest = hashlib.sha256()
    for package in ("launch", "nd_dist", "shards"):
        for path in sorted((CODE_DIR / package).rglob("*.py")):
            digest.update(f"{path.relative_to(CODE_DIR)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _shared(path: Path, token: str) -> str:
    """Return an empty text if this host sees the launching machine's file, else what is wrong."""
    try:
        found = path.read_text(encoding="utf-8")
    except OSError as error:
        return f"{path.parent}: {error.strerror}"
    return "" if found == token else f"{path}: another file than on the launching machine"


def _address(interface: str) -> str:
    """Return the address for the rendezvous: the interface's, or the one at which ssh reached this host."""
    if not interface:
        words = os.environ.get("SSH_CONNECTION", "").split()
        return words[2] if len(words) == 4 else ""
    return next(iter(_addresses(interface)), f"no interface {interface}")


def _addresses(interface: str = "") -> list[str]:
    """Return the addresses of a network interface, or of all but the loopback one; IPv4 first, no link-local ones."""
    cards = psutil.net_if_addrs()
    named = [interface] if interface else [name for name in cards if name != "lo"]
    found = [card for name in named for card in cards.get(name, ()) if card.family in (AF_INET, AF_INET6)]
    return [card.address for card in sorted(found, key=lambda card: card.family) if "%" not in card.address]


def _own_address() -> str:
    """Return the address that this host's own name means to it, an empty text if none: gloo listens there."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


if __name__ == "__main__":
    main()
