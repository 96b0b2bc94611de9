"""How ranks that somebody else's launcher has started find their launch: each knocks, rank 0's process answers.

A knock is a file with a word that nobody else knows; the answer is put beside the word, and the rank takes both away.
So no file that a killed launch left behind misleads anybody, and no launcher's variables have to name a launch.
"""

from __future__ import annotations

import socket
import time
import uuid
from pathlib import Path

from launch.supervise.heartbeat import read_record
from launch.supervise.lock import RunFolder
from nd_dist.errors import NdDistError, WorldError
from nd_dist.files import write_json
from nd_dist.world import World

POLL_S = 0.2
REFUSED_FOR_S = 10.0
REMEDY = "let every rank run the same command, on hosts that see this folder under the same path"


def _path(run_dir: Path, rank: int) -> Path:
    return run_dir / ".state" / "door" / f"rank-{rank:04d}.json"


def knock(run_dir: Path, world: World, within_s: float) -> str:
    """Join the launch of rank 0; return its id.

    Raises:
        WorldError: rank 0 has not answered in time.
        NdDistError: rank 0 does not start; with the exit code of its reason.
    """
    own, word, deadline = _path(run_dir, world.rank), uuid.uuid4().hex, time.monotonic() + within_s
    try:
        while time.monotonic() < deadline:
            said = read_record(own)
            if said.get("word") != word:
                write_json(own, {"word": word, "host": socket.gethostname()})
            elif "launch" in said:
                return str(said["launch"])
            elif "error" in said:
                error = NdDistError(f"Rank 0 does not start: {said['error']}")
                error.exit_code = said["exit_code"]
                raise error
            time.sleep(POLL_S)
    finally:
        own.unlink(missing_ok=True)
    raise WorldError(f"Rank 0 has not let rank {world.rank} of {world.size} in.", where=str(run_dir), todo=REMEDY)


class Door:
    """Rank 0's side.

    Args:
        run_dir: Folder of the run.
        size: Ranks of the world.
    """

    def __init__(self, run_dir: Path, size: int) -> None:
        self._run_dir, self._outside, self._answered = run_dir, set(range(1, size)), set[int]()
        self.folder: RunFolder | None = None  # the run folder, once rank 0's process holds it

    def wait(self, within_s: float) -> list[str]:
        """Wait until every other rank has knocked; return the hosts of ranks 1, 2, ...

        Raises:
            WorldError: some did not in time.
        """
        deadline = time.monotonic() + within_s
        while True:
            knocks = {rank: read_record(_path(self._run_dir, rank)) for rank in self._outside}
            if missing := sorted(rank for rank, said in knocks.items() if not said):
                if time.monotonic() > deadline:
                    what = f"Ranks {missing} have not come within {within_s:.0f} s."
                    raise WorldError(what, where=str(self._run_dir), todo=REMEDY)
                time.sleep(POLL_S)
            else:
                return [str(knocks[rank]["host"]) for rank in sorted(knocks)]

    def answer(self, **answer: object) -> None:
        """Answer whoever knocks; a rank that has taken its answer away is in, and looked after no more."""
        for rank in sorted(self._outside):
            said = read_record(_path(self._run_dir, rank))
            if not said and rank in self._answered:
                self._outside.remove(rank)
            elif said and not answer.items() <= said.items():
                write_json(_path(self._run_dir, rank), {**said, **answer})
                self._answered.add(rank)

    def refuse(self, error: NdDistError) -> None:
        """Tell the others why there is no launch, for as long as it takes them to come, but not for ever."""
        deadline = time.monotonic() + REFUSED_FOR_S
        while self._outside and time.monotonic() < deadline:
            self.answer(error=str(error), exit_code=error.exit_code)
            time.sleep(POLL_S)
