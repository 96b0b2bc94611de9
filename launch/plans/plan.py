"""Launch plans: what would run, as a pure value. Nothing here starts a process or reads the environment.

What every planner relies on: the ranks of a launch run ``python -m launch.ranks.rank MODULE CONFIG LAUNCH_ID``;
whatever else they need (working folder, environment) stands in a file beside the config, where no launcher or shell
changes it.
"""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from launch.plans.hosts import Host
from launch.plans.tools import Tools
from nd_dist.errors import ConfigError

Launcher = Literal["auto", "local", "deepspeed-pdsh", "deepspeed-openmpi", "mpirun", "srun"]
LAUNCHERS: tuple[str, ...] = get_args(Launcher)
RANK_MODULE = "launch.ranks.rank"
ENCODED = "base64:"

_PLAIN = re.compile(r"[A-Za-z0-9_./=+,@:-]+")


@dataclass(frozen=True)
class LaunchPlan:
    """One command line that starts the ranks of one command.

    Args:
        argv: The command, one word each (never through a shell).
        env: Variables that every rank is given, on every host.
        ranks: How many ranks it starts.
        note: What a user should know about it; empty if nothing.
        is_leased: Whether ranks take work from a shared pool, so that one that finishes proves that all work is
            done, and one that dies costs only its unit.
        hosts: Where the ranks run, in rank order; empty for this machine.
        own_env: Variables of the starting process alone.
        files: Text files that must be on disk first.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    ranks: int
    note: str = ""
    is_leased: bool = False
    hosts: tuple[Host, ...] = ()
    own_env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[Path, str] = field(default_factory=dict)

    def shell(self) -> str:
        """Return the command as a line for a POSIX shell, every word quoted."""
        words = [f"{name}={shlex.quote(value)}" for name, value in sorted({**self.env, **self.own_env}.items())]
        return " ".join([*words, shlex.join(self.argv)])


@dataclass(frozen=True)
class RankProgram:
    """The module whose ``work`` every rank runs, with the one config file that it is given.

    Args:
        module: Name of the module, e.g. ``launch.ranks.train``.
        config_path: The run's config file.
        launch_id: Names this launch in the events, so that its completion records can be told from older ones.
        options: Further words for the module.
        is_leased: See ``LaunchPlan``.
    """

    module: str
    config_path: Path
    launch_id: str
    options: tuple[str, ...] = ()
    is_leased: bool = False

    @property
    def arguments(self) -> tuple[str, ...]:
        """Words after ``python -m launch.ranks.rank``; positional, because DeepSpeed's parser also tries options."""
        return (self.module, plain_word(str(self.config_path)), self.launch_id, *map(plain_word, self.options))

    @property
    def hostfile_path(self) -> Path:
        """Where a plan puts the hostfile that holds exactly the chosen hosts."""
        return self.config_path.parent / ".state" / "hostfile"


def plain_word(text: str) -> str:
    """Return a text as a word that no shell, pdsh (``%h``) or launcher on the way to the rank can change."""
    if _PLAIN.fullmatch(text) and not text.startswith(ENCODED):
        return text
    return ENCODED + base64.urlsafe_b64encode(text.encode("utf-8")).decode("ascii")


def text_of_word(word: str) -> str:
    """Return the text of ``plain_word``."""
    if not word.startswith(ENCODED):
        return word
    return base64.urlsafe_b64decode(word.removeprefix(ENCODED)).decode("utf-8")


def require_plain(text: str, what: str, launcher: str) -> str:
    """Return a text that a launcher sends through a remote shell as it is.

    Raises:
        ConfigError: it holds characters that the shell or pdsh would change.
    """
    if not _PLAIN.fullmatch(text):
        raise ConfigError(
            f"{launcher} sends {what} through a shell that would change it.",
            found=text,
            expected="letters, digits and _ . / = + , @ : - only",
            todo="move it to another path, or use another --launcher",
        )
    return text


def single_plan(program: RankProgram, tools: Tools, env: Mapping[str, str], note: str = "") -> LaunchPlan:
    """Return the plan of one process without any launcher."""
    return LaunchPlan((tools.python, "-m", RANK_MODULE, *program.arguments), env, 1, note, program.is_leased)


def require_names(hosts: tuple[Host, ...], launcher: str, takes_users: bool = False, takes_gpus: bool = False) -> None:
    """Refuse hosts that a launcher would misread, and chosen GPUs where it counts slots only.

    Raises:
        ConfigError: a host is given by an IPv6 address, with a user, or with other GPUs than its first ones.
    """
    if odd := [host.login for host in hosts if ":" in host.name or (host.user and not takes_users)]:
        raise ConfigError(
            f"{launcher} takes hosts by their names alone.",
            found=", ".join(odd),
            todo="name the user in ~/.ssh/config and the address in /etc/hosts",
        )
    if chosen := [host.describe() for host in hosts if host.devices and not takes_gpus]:
        raise ConfigError(
            f"{launcher} cannot choose GPUs of a host.",
            found=", ".join(chosen),
            todo="include the first slots of each host, or train with --launcher deepspeed-pdsh",
        )
