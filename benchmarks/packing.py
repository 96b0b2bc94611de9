"""Packing with one and with two MPI ranks: seconds from the first unit to the index, start-up not counted.

    python -m benchmarks.packing
    python -m benchmarks.packing --sessions 16 --rounds 5 --dir /data/scratch

Made-up betas and targets in true shapes. Bar: two ranks >= 1.7 x one, on two cores that do nothing else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.support.shards import MadeUpExtractor, MadeUpReader, made_up_config
from nd_dist.comm import connect
from nd_dist.events import EventLog
from nd_dist.world import World
from shards.packing.pack import pack_from

TRIALS_PER_SESSION = 250


def pack_once(folder: Path, sessions: int) -> None:
    """Be one rank: pack, and let rank 0 write the seconds."""
    from webdataset import TarWriter  # imported by the first shard otherwise

    assert TarWriter
    comm = connect(World.from_env(os.environ))
    config = made_up_config(folder)
    source = MadeUpReader(sessions * TRIALS_PER_SESSION // 3, TRIALS_PER_SESSION)
    comm.barrier()
    started = time.perf_counter()
    pack_from(source, config, comm, EventLog(config.run_dir, comm.rank, "pack"), MadeUpExtractor())
    if comm.rank == 0:
        (folder / "seconds").write_text(str(time.perf_counter() - started))
    comm.finish()


def main() -> None:
    """Compare one and two ranks, interleaved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None)
    parser.add_argument("--rank-of", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        pack_once(options.rank_of, options.sessions)
        return
    seconds: dict[int, list[float]] = {1: [], 2: []}
    load, num_bytes = os.getloadavg()[0], 0
    for _ in range(options.rounds):
        for ranks in seconds:
            folder = Path(tempfile.mkdtemp(dir=options.dir, prefix="nd-pack-"))
            program = ["-m", "benchmarks.packing", "--rank-of", str(folder), "--sessions", str(options.sessions)]
            mpirun = Path(sys.executable).with_name("mpirun")
            subprocess.run([str(mpirun), "-n", str(ranks), sys.executable, *program], check=True)
            seconds[ranks].append(float((folder / "seconds").read_text()))
            num_bytes = sum(path.stat().st_size for path in folder.rglob("*.tar"))
            shutil.rmtree(folder)
    ratio = statistics.median(one / two for one, two in zip(seconds[1], seconds[2], strict=True))
    print(f"{num_bytes / 1e6:.0f} MB; load {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    for ranks, values in seconds.items():
        rate = num_bytes / 1e6 / statistics.median(values)
        print(f"{ranks} rank(s): median {statistics.median(values):.2f} s, {rate:.0f} MB/s")
    print(f"{'met   ' if ratio >= 1.7 else 'MISSED'} two ranks {ratio:.2f} x one (bar 1.7)")


if __name__ == "__main__":
    main()
