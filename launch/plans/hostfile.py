"""Hostfiles as DeepSpeed, Open MPI, MPICH, Slurm and batch systems write them -> hosts and slots."""

from __future__ import annotations

import ipaddress
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from launch.plans.hosts import Host
from nd_dist.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FORMS = "NAME slots=N, NAME:N or NAME; NAME may be USER@NAME, node[1-4] or [IPV6]"
_IGNORED = ("max_slots", "max-slots")


def parse_hostfile(text: str, source: str) -> tuple[Host, ...]:
    """Return the hosts of a hostfile, in the order in which they are first named.

    A line is ``NAME slots=N`` (DeepSpeed, Open MPI), ``NAME:N`` (MPICH), ``NAME N`` (SGE) or ``NAME`` alone, one
    slot each time that it stands there (PBS, LSF). ``#`` begins a comment.

    Raises:
        ConfigError: a line of another form, no slots, a host given slots twice, or no host at all.
    """
    hosts: dict[str, Host] = {}
    final: set[str] = set()
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        where = f"{source}, line {number}"
        try:
            named, is_final = _parse_line(line)
        except ValueError as error:
            raise ConfigError("A line of the hostfile is wrong.", where=where, expected=_FORMS, found=line) from error
        for host in named:
            if host.slots == 0:
                raise ConfigError(
                    "A host has no slots.", where=where, found=line, todo="remove the line or give it slots"
                )
            before = hosts.get(host.name, replace(host, slots=0))
            if host.name in final or (before.slots and is_final) or before.user != host.user:
                raise ConfigError("A host is named twice.", where=where, found=host.name)
            hosts[host.name] = replace(host, slots=before.slots + host.slots)
            final.update([host.name] if is_final else [])
    if not hosts:
        raise ConfigError("The hostfile names no host.", where=source, expected=f"lines of the form {_FORMS}")
    return tuple(hosts.values())


def _parse_line(line: str) -> tuple[list[Host], bool]:
    """Return the hosts of a line, and whether their slots are final (not to be added to those of another line).

    Raises:
        ValueError: the line is of none of the known forms.
    """
    word, *rest = re.sub(r"\s*=\s*", "=", line).split()
    slots = rest[0] if rest and rest[0].isdecimal() else None  # SGE; the queue and the cores follow
    settings = {} if slots else dict(setting.split("=", 1) for setting in rest)
    user, _, place = word.rpartition("@")
    slots, user = settings.pop("slots", slots), settings.pop("user", settings.pop("username", user))
    names, count = _names_and_count(place)
    is_wrong = set(settings) - set(_IGNORED) or (user and not _NAME.fullmatch(user))
    if is_wrong or (slots is not None and (count or not slots.isdecimal())):
        raise ValueError(line)
    return [Host(name, int(slots or count or 1), user=user) for name in names], slots is not None


def _names_and_count(place: str) -> tuple[tuple[str, ...], str]:
    """Return the names that ``NAME``, ``NAME:N``, ``node[1-4]:N``, ``IPV6`` or ``[IPV6]:N`` stands for, and N.

    Raises:
        ValueError: it is none of these.
    """
    if match := re.fullmatch(r"(\[)?([0-9A-Fa-f.]*:[0-9A-Fa-f.:]*:[0-9A-Fa-f.:]*)(?(1)\](?::(\d+))?)", place):
        return (str(ipaddress.IPv6Address(match[2])),), match[3] or ""
    match = re.fullmatch(r"((?:[^:,\[\]]|\[[^\]]*\])+)(?::(\d+))?", place)
    names = expand_nodelist(match[1]) if match else ()
    if not match or not all(map(_NAME.fullmatch, names)):
        raise ValueError(place)
    return names, match[2] or ""


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Return the hosts of a hostfile on disk.

    Raises:
        ConfigError: the file is missing or wrong.
    """
    try:
        return parse_hostfile(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("The hostfile cannot be read.", where=str(path), found=str(error)) from error


def hostfile_text(hosts: Iterable[Host]) -> str:
    """Return the text of a hostfile, in DeepSpeed's form."""
    return "".join(f"{host.login} slots={host.slots}\n" for host in hosts)


def expand_nodelist(text: str) -> tuple[str, ...]:
    """Return the names of a node list: ``gpu[01-03,7],login`` is gpu01, gpu02, gpu03, gpu7, login.

    Raises:
        ConfigError: the list is of another form.
    """
    names: list[str] = []
    words = re.findall(r"(?:[^,\[\]\s]|\[[\d,-]+\])+", text)
    if not text or ",".join(words) != text:
        raise ConfigError("A list of nodes is wrong.", expected="names like gpu[01-03,7]", found=text)
    for word in words:
        parts = re.split(r"\[([\d,-]+)\]", word)  # every second part is what stood in brackets
        choices = [list(_numbers(part)) if i % 2 else [part] for i, part in enumerate(parts)]
        names += ["".join(chosen) for chosen in itertools.product(*choices)]
    return tuple(names)


def _numbers(ranges: str) -> Iterator[str]:
    """Yield the numbers of ``01-03,7`` as texts of the width that each range begins with.

    Raises:
        ConfigError: a range is of another form.
    """
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ConfigError("A list of nodes is wrong.", expected="names like gpu[01-03,7]", found=f"[{ranges}]")
        for number in range(int(match[1]), int(match[2] or match[1]) + 1):
            yield str(number).zfill(len(match[1]))
