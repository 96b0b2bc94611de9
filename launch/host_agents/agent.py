"""Runs on every host beside the ranks: ``python -m launch.host_agents.agent``, started over ssh.

It reads one JSON request from standard input and answers with what the host has (Python, packages, this code, whether
it sees the shared folder, a free port). Then it answers every beat. When the beats end, or when it is told to, it
kills whatever the launch left on its host: a cut-off host is cleared by its own agent.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import signal
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from socket import AF_INET, AF_INET6
from typing import Any

import psutil

from launch.plans.tools import free_port_from
from nd_dist.versions import code_digest, installed_versions

CODE = "nd_dist code"
LOOK_S = 1.0
LOST_LOOKS = 30  # looks without a beat: the link is cut, or the launching machine is gone
MPI_HELPERS = {"orted", "prted", "hydra_pmi_proxy", "hydra_bstrap_proxy"}


def main() -> None:
    """Answer the request, then beats, until the launch is over."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request = json.loads(sys.stdin.readline())
    _say(facts(request))
    if request["launch"]:
        _say({"killed": kill(_serve(request["launch"]))})


def _say(value: object) -> None:
    """Write one JSON line; whoever reads it may be gone."""
    with contextlib.suppress(OSError):
        os.write(1, (json.dumps(value) + "\n").encode())


def _serve(launch: str) -> set[psutil.Process]:
    """Answer beats until the end of the launch; return its processes, gone ones among them."""
    seen, unbeaten = processes_of(launch), 0
    while unbeaten < LOST_LOOKS:
        readable, _, _ = select.select([0], [], [], LOOK_S)
        seen |= processes_of(launch)
        if not readable:
            unbeaten += 1
            continue
        unbeaten = 0
        text = os.read(0, 65536)
        if not text or b"end" in text:
            break
        _say({"beat": True})
    return seen


def processes_of(launch: str) -> set[psutil.Process]:
    """Return the processes of a launch on this host.

    Its id stands in the command line of every rank and of the launchers above it; MPI's helpers are known by the ranks
    below them, as long as these live.
    """
    found: set[psutil.Process] = set()
    for process in psutil.process_iter(["cmdline"]):
        if launch in " ".join(process.info["cmdline"] or ()):
            found.add(process)
            with contextlib.suppress(psutil.Error):
                found |= {above for above in process.parents() if above.name() in MPI_HELPERS}
    return found - {psutil.Process(), *psutil.Process().parents()}


def kill(processes: Iterable[psutil.Process]) -> list[str]:
    """Kill processes; return the command lines of those that still ran."""
    killed: list[str] = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            words = " ".join(process.cmdline())
            process.kill()
            killed.append(f"{process.pid} {words[:200]}")
    return killed


def facts(request: dict[str, Any]) -> dict[str, Any]:
    """Return what this host has.

    Args:
        request: ``packages`` (distribution names), ``token_path`` and ``token`` (a file that the launching machine
            wrote to the shared folder), ``interface`` and ``port`` (where the ranks shall meet; may be empty and 0).
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(),
        "machine": f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}",
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


def _shared(path: Path, token: str) -> str:
    """Return an empty text if this host sees the launching machine's file, else what is wrong."""
    try:
        found = path.read_text(encoding="utf-8")
    except OSError as error:
        return f"{path.parent}: {error.strerror}"
    return "" if found == token else f"{path}: another file than on the launching machine"


def _address(interface: str) -> str:
    """Return the address for the rendezvous: the interface's, the one at which ssh reached this host, or its own."""
    if interface:
        cards = psutil.net_if_addrs().get(interface, [])
        found = [card.address for family in (AF_INET, AF_INET6) for card in cards if card.family == family]
        return next((address for address in found if "%" not in address), f"no interface {interface}")
    words = os.environ.get("SSH_CONNECTION", "").split()
    return words[2] if len(words) == 4 else _own_address()


def _own_address() -> str:
    """Return the address that this host's own name means to it, an empty text if none: gloo listens there."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


if __name__ == "__main__":
    main()
