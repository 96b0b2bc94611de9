"""Hosts and slots: DeepSpeed's hostfile grammar and filters, Slurm's node lists, and what this machine offers."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from nd_dist.errors import ConfigError

_LINE = re.compile(r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s+slots=(?P<slots>\d+)$")
_FILTER = "NAME or NAME:SLOT,SLOT, several joined by @"


@dataclass(frozen=True)
class Host:
    """A host and how many ranks it takes (one per GPU).

    Args:
        name: As ssh knows it.
        slots: Ranks.
        devices: Numbers of the GPUs to use, ascending; empty for the first ``slots``.
    """

    name: str
    slots: int
    devices: tuple[int, ...] = ()

    @property
    def device_ids(self) -> tuple[int, ...]:
        """Numbers of the GPUs that the ranks use."""
        return self.devices or tuple(range(self.slots))

    @property
    def is_local(self) -> bool:
        """Whether the name means this machine."""
        own = socket.gethostname()
        return self.name in {"localhost", "127.0.0.1", own, own.split(".")[0]}

    def describe(self) -> str:
        """Return the host as a hostfile writes it."""
        chosen = f" (GPUs {','.join(map(str, self.devices))})" if self.devices else ""
        return f"{self.name} slots={self.slots}{chosen}"


def parse_hostfile(text: str, source: str) -> tuple[Host, ...]:
    """Return the hosts of a hostfile: one ``NAME slots=N`` a line, ``#`` begins a comment.

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
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("The hostfile cannot be read.", where=str(path), found=str(error)) from error
    return parse_hostfile(text, str(path))


def hostfile_text(hosts: Iterable[Host]) -> str:
    """Return the text of a hostfile."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)


def filter_hosts(hosts: tuple[Host, ...], include: str = "", exclude: str = "") -> tuple[Host, ...]:
    """Return the hosts and slots that a filter leaves, in the hostfile's order (DeepSpeed's grammar).

    Args:
        hosts: What there is.
        include: Take only these: ``node1@node2:0,2`` is all of node1 and two GPUs of node2; empty: all.
        exclude: Leave these out.

    Raises:
        ConfigError: both filters, a host or slot that does not exist, a word of another form, or nothing is left.
    """
    if not include and not exclude:
        return hosts
    option = "--include" if include else "--exclude"
    if include and exclude:
        raise ConfigError("--include and --exclude exclude each other.", todo="give one of them")
    named = _parse_filter(include or exclude, option, {host.name: host.device_ids for host in hosts})
    kept: list[Host] = []
    for host in hosts:
        chosen = named.get(host.name, set())
        devices = tuple(number for number in host.device_ids if (number in chosen) == bool(include))
        if devices == host.device_ids:
            kept.append(host)
        elif devices:
            plain = devices == tuple(range(len(devices)))
            kept.append(replace(host, slots=len(devices), devices=() if plain else devices))
    if not kept:
        raise ConfigError("The filter leaves no host.", where=f"{option} {include or exclude}")
    return tuple(kept)


def _parse_filter(text: str, option: str, known: dict[str, tuple[int, ...]]) -> dict[str, set[int]]:
    """Return the slots that a filter names, by host."""
    named: dict[str, set[int]] = {}
    for word in text.split("@"):
        name, colon, numbers = word.partition(":")
        if name not in known:
            raise ConfigError(
                "A filter names a host that the hostfile does not have.",
                where=f"{option} {text}",
                expected=f"{_FILTER}; hosts: {', '.join(known)}",
                found=name or "an empty name",
            )
        if colon and not re.fullmatch(r"\d+(,\d+)*", numbers):
            raise ConfigError("A filter is wrong.", where=f"{option} {text}", expected=_FILTER, found=word)
        slots = {int(number) for number in numbers.split(",")} if colon else set(known[name])
        if unknown := sorted(slots - set(known[name])):
            raise ConfigError(
                f"A filter names slots {unknown} that host {name} does not have.",
                where=f"{option} {text}",
                expected=f"some of {list(known[name])}",
            )
        named.setdefault(name, set()).update(slots)
    return named


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
            where=", ".join(host.describe() for host in hosts),
            expected=f"at least {ranks}",
            found=num_slots(hosts),
        )
    taken: list[Host] = []
    for host in hosts:
        left = ranks - num_slots(taken)
        if left > 0:
            slots = min(host.slots, left)
            taken.append(Host(host.name, slots, host.devices[:slots]))
    return tuple(taken)


def host_of_rank(hosts: tuple[Host, ...], rank: int) -> str:
    """Return the name of the host that a rank runs on: every launcher here fills the hosts in order."""
    first = 0
    for host in hosts:
        first += host.slots
        if rank < first:
            return host.name
    return "an unknown host"


def expand_nodelist(text: str) -> tuple[str, ...]:
    """Return the node names of a Slurm node list: ``gpu[01-03,7],login`` is gpu01, gpu02, gpu03, gpu7, login.

    Raises:
        ConfigError: the list is of another form.
    """
    names: list[str] = []
    words = re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text)
    if ",".join(words) != text:
        raise ConfigError("A node list of Slurm is wrong.", expected="names like gpu[01-03,7]", found=text)
    for word in words:
        match = re.fullmatch(r"([^\[\]\s]*)(?:\[([\d,-]+)\])?([^\[\]\s]*)", word)
        if match is None:
            raise ConfigError("A node list of Slurm is wrong.", expected="names like gpu[01-03,7]", found=text)
        head, ranges, tail = match.groups()
        middles = [""] if ranges is None else [number for part in ranges.split(",") for number in _numbers(part)]
        names += [f"{head}{middle}{tail}" for middle in middles]
    if not names:
        raise ConfigError("A node list of Slurm is empty.", where="SLURM_JOB_NODELIST")
    return tuple(names)


def _numbers(part: str) -> Iterator[str]:
    """Yield the numbers of ``01-03`` as texts of the same width."""
    first, dash, last = part.partition("-")
    for number in range(int(first), int(last if dash else first) + 1):
        yield str(number).zfill(len(first))


def num_local_gpus() -> int:
    """Return how many CUDA devices this machine shows (imports torch)."""
    import torch

    return torch.cuda.device_count()
