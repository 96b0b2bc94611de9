"""Opens the data set of a recipe in the layout that it names."""

from __future__ import annotations

from nd_dist.config import Config
from shards.sources.contract import DatasetReader


def open_reader(config: Config) -> DatasetReader:
    """Return the reader that ``config.data.reader`` names, after it has checked that its files exist.

    Raises:
        DataError: a file, subject or session is missing or does not fit the others.
    """
    if config.data.reader == "mindeye2":
        from shards.sources.mindeye2 import MindEye2Reader

        return MindEye2Reader.open(config)
    from shards.sources.nsd import NsdReader

    return NsdReader.open(config)
