"""Hosts and slots: DeepSpeed's hostfile grammar as pure values, and what this machine offers."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nd_dist.errors import ConfigError

_LINE = re.compile(r"^(?P<name>[^\s=#]+)\s+slots=(?P<slots>\d+)$")


@dataclass(frozen=True)
class Host:
    """A host and how many ranks it takes (one per GPU)."""

    name: str
    slots: int


def parse_hostfile(text: str, source: str) -> tuple[Host, ...]:
    """Return the hosts of a hostfile: one ``name slots=N`` a line, ``#`` begins a comment.

    Raises:
        ConfigError: a line of another form, slots=0, a host named twice, or no host at all.
    """
    hosts: dict[str, Host] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        where = f"{source}, line {number}"
        match = _LINE.match(line)
        if match is None:
            raise ConfigError("A line of the hostfile is wrong.", where=where, expected="NAME slots=N", found=line)
        host = Host(match["name"], int(match["slots"]))
        if host.slots == 0:
            raise ConfigError("A host has no slots.", where=where, found=line, todo="remove the line or give it slots")
        if host.name in hosts:
            raise ConfigError("A host is named twice.", where=where, found=host.name)
        hosts[host.name] = host
    if not hosts:
        raise ConfigError("The hostfile names no host.", where=source, expected="lines of the form NAME slots=N")
    return tuple(hosts.values())


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Return the hosts of a hostfile on disk.

    Raises:
        ConfigError: the file is missing or wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError("The hostfile cannot be read.", where=str(path), found=error.strerror or "") from error
    return parse_hostfile(text, str(path))


def num_slots(hosts: Iterable[Host]) -> int:
    """Return the number of ranks that the hosts take together."""
    return sum(host.slots for host in hosts)


def limit_slots(hosts: tuple[Host, ...], ranks: int) -> tuple[Host, ...]:
    """Return hosts that take exactly ``ranks`` ranks, filled in order.

    Raises:
        ConfigError: there are fewer slots than ranks.
    """
    if ranks > num_slots(hosts):
        raise ConfigError(
            "There are fewer slots than ranks.",
            where=", ".join(f"{host.name} slots={host.slots}" for host in hosts),
            expected=f"at least {ranks}",
            found=num_slots(hosts),
        )
    taken: list[Host] = []
    for host in hosts:
        left = ranks - num_slots(taken)
        if left > 0:
            taken.append(Host(host.name, min(host.slots, left)))
    return tuple(taken)


def num_local_gpus() -> int:
    """Return how many CUDA devices this machine shows (imports torch)."""
    import torch

    return torch.cuda.device_count()


def free_port() -> int:
    """Return a TCP port that is free on this machine now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
