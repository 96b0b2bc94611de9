"""How ranks that somebody else's launcher has started find their launch: each knocks, rank 0's process lets it in.

A knock is a file with a word that nobody else knows; a rank is in when the launch record repeats its word, and it then
takes its knock away. So no file that a killed launch left behind misleads anybody, and no launcher's variables have to
name a launch.
"""

from __future__ import annotations

import socket
import time
import uuid
from pathlib import Path
from typing import Any

from launch.supervise.heartbeat import launch_record_path
from launch.supervise.lock import RunFolder
from nd_dist.errors import DataError, NdDistError, WorldError
from nd_dist.files import read_json, write_json
from nd_dist.world import World

POLL_S = 0.2
REFUSED_FOR_S = 10.0


def knock(run_dir: Path, world: World, within_s: float) -> str:
    """Join the launch of rank 0; return its id.

    Raises:
        WorldError: rank 0 has not answered in time.
        NdDistError: rank 0 did not start the launch; with the exit code of its reason.
    """
    word, own = uuid.uuid4().hex, _knock_path(run_dir, world.rank)
    write_json(own, {"word": word, "host": socket.gethostname()})
    deadline = time.monotonic() + within_s
    try:
        while time.monotonic() < deadline:
            record = _read(launch_record_path(run_dir))
            if record.get("joined", {}).get(str(world.rank)) == word:
                return str(record["launch"])
            answer = _read(_refusal_path(run_dir))
            if word in answer.get("words", ()):
                error = NdDistError(f"Rank 0 did not start: {answer['error']}")
                error.exit_code = answer["exit_code"]
                raise error
            time.sleep(POLL_S)
    finally:
        own.unlink(missing_ok=True)
    raise WorldError(
        f"Rank 0 has not let rank {world.rank} of {world.size} in.",
        where=str(run_dir),
        todo="let every rank run the same command, on hosts that see this folder under the same path",
    )


class Door:
    """Rank 0's side.

    Args:
        folder: The run folder, which rank 0's process holds.
        run_dir: Its path.
        size: Ranks of the world.
    """

    def __init__(self, folder: RunFolder, run_dir: Path, size: int) -> None:
        self.folder, self._run_dir, self._outside = folder, run_dir, set(range(1, size))
        self._words: dict[int, str] = {}

    def wait(self, within_s: float) -> list[str]:
        """Wait until every other rank has knocked; return the hosts of ranks 1, 2, ...

        Raises:
            WorldError: some did not in time.
        """
        deadline = time.monotonic() + within_s
        while len(knocks := _knocks(self._run_dir, self._outside)) < len(self._outside):
            if time.monotonic() > deadline:
                raise WorldError(
                    f"Ranks {sorted(self._outside - set(knocks))} have not come within {within_s:.0f} s.",
                    where=str(self._run_dir),
                    todo="let every rank run the same command, on hosts that see this folder under the same path",
                )
            time.sleep(POLL_S)
        return [str(knocks[rank]["host"]) for rank in sorted(knocks)]

    def admit(self) -> None:
        """Let in whoever knocks; nothing is looked at any more once everybody is in."""
        knocks = _knocks(self._run_dir, self._outside)
        words = {**self._words, **{rank: said["word"] for rank, said in knocks.items()}}
        if words != self._words:
            self.folder.note(joined=words)
        self._words = words
        self._outside = {rank for rank in self._outside if rank in knocks or rank not in words}


def refuse(run_dir: Path, size: int, error: NdDistError) -> None:
    """Tell the other ranks why there is no launch, for as long as it takes them to ask, but not for ever."""
    outside, told = set(range(1, size)), set[str]()
    deadline = time.monotonic() + REFUSED_FOR_S
    while time.monotonic() < deadline:
        knocks = _knocks(run_dir, outside)
        words = {said["word"] for said in knocks.values()}
        if len(told) >= size - 1 and not words - told:
            return
        if words - told:
            told |= words
            write_json(_refusal_path(run_dir), {"words": [*told], "error": str(error), "exit_code": error.exit_code})
        time.sleep(POLL_S)


def _knock_path(run_dir: Path, rank: int) -> Path:
    return run_dir / ".state" / "door" / f"rank-{rank:04d}.json"


def _refusal_path(run_dir: Path) -> Path:
    return run_dir / ".state" / "door" / "refused.json"


def _knocks(run_dir: Path, ranks: set[int]) -> dict[int, Any]:
    """Return what the ranks that knock have said."""
    found = {rank: _read(_knock_path(run_dir, rank)) for rank in ranks}
    return {rank: said for rank, said in found.items() if said}


def _read(path: Path) -> Any:  # Any: JSON
    """Return what a file says; nothing where it is not there (any more)."""
    try:
        return read_json(path)
    except (DataError, OSError):
        return {}
