"""A rank that packs the small phantom; run with ``mpirun``. Arguments: nsd_root shards_dir pause_s data."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nd_dist.comm import connect
from nd_dist.events import EventLog
from nd_dist.world import World
from shards.packing.pack import pack
from tests.shards.support import TARGETS, PooledExtractor, make_config


class SlowExtractor(PooledExtractor):
    """The same targets, with a pause before each batch, so that there is time to be killed."""

    pause_s = 0.0

    def extract(
        self,
        pictures_BHWC: npt.NDArray[np.uint8],
        captions: Sequence[Sequence[str]],
        image_ids: Sequence[int],
        wanted: Collection[str] = TARGETS,
    ) -> dict[str, npt.NDArray[np.float32]]:
        time.sleep(self.pause_s)
        return super().extract(pictures_BHWC, captions, image_ids, wanted)


def main() -> None:
    config = make_config(Path(sys.argv[1]), Path(sys.argv[2]), **json.loads(sys.argv[4]))
    extractor = SlowExtractor()
    extractor.pause_s = float(sys.argv[3])
    comm = connect(World.from_env(os.environ))
    index = pack(config, comm, EventLog(config.run_dir, comm.rank, "pack"), extractor)
    assert index.place == str(config.shards_dir)


if __name__ == "__main__":
    main()
