"""Hosts and their slots, the filters that choose among them, and what this machine offers."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass, replace

import psutil

from nd_dist.errors import ConfigError

_FILTER = "NAME or NAME:SLOT,SLOT, several joined by @"


@dataclass(frozen=True)
class Host:
    """A host and how many ranks it takes (one per GPU).

    Args:
        name: As ssh knows it.
        slots: Ranks.
        devices: Numbers of the GPUs to use, ascending; empty for the first ``slots``.
        user: Login name there; empty: ssh's own choice.
    """

    name: str
    slots: int
    devices: tuple[int, ...] = ()
    user: str = ""

    @property
    def login(self) -> str:
        """What ssh, pdsh and mpirun are given."""
        return f"{self.user}@{self.name}" if self.user else self.name

    @property
    def device_ids(self) -> tuple[int, ...]:
        """Numbers of the GPUs that the ranks use."""
        return self.devices or tuple(range(self.slots))

    @property
    def is_local(self) -> bool:
        """Whether the name means this machine."""
        own = socket.gethostname()
        addresses = (card.address for cards in psutil.net_if_addrs().values() for card in cards)
        return is_loopback(self.name) or self.name in {own, own.split(".")[0], *addresses}

    def describe(self) -> str:
        """Return the host as a hostfile writes it."""
        chosen = f" (GPUs {','.join(map(str, self.devices))})" if self.devices else ""
        return f"{self.name} slots={self.slots}{chosen}"


def is_loopback(name: str) -> bool:
    """Return whether a name or address means the machine that uses it, whichever that is."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


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
        name, colon, numbers = (word, "", "") if word in known else word.rpartition(":")
        name = name or word if not colon else name
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
            taken.append(replace(host, slots=slots, devices=host.devices[:slots]))
    return tuple(taken)


def host_of_rank(hosts: tuple[Host, ...], rank: int) -> str:
    """Return the name of the host that a rank runs on: every launcher here fills the hosts in order."""
    first = 0
    for host in hosts:
        first += host.slots
        if rank < first:
            return host.name
    return "an unknown host"


def num_local_gpus() -> int:
    """Return how many CUDA devices this machine shows (imports torch)."""
    import torch

    return torch.cuda.device_count()
