"""A job that reads every sample of a URL through the cache. Arguments: url cache_dir. Prints the sum of all bytes."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

from nd_dist.config import RemoteConfig
from shards.reading.reader import ShardReader


def main() -> None:
    reader = ShardReader(sys.argv[1], RemoteConfig(cache_dir=Path(sys.argv[2])))
    crc = 0
    for subject in reader.index.subjects:
        ids = reader.images(subject, "train")
        crc = zlib.crc32(reader.voxels(subject, ids).tobytes(), crc)
        for name in ("c", "z"):
            crc = zlib.crc32(reader.targets(name, ids).tobytes(), crc)
    sys.stdout.write(f"{crc}\n")


if __name__ == "__main__":
    main()
