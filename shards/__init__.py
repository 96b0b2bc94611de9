"""Data sets to WebDataset shards and back: readers, packer, index, stream, and a phantom.

What most programs need can be imported from here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards.format.index import Index
    from shards.packing.pack import pack
    from shards.reading.as_webdataset import as_webdataset
    from shards.reading.reader import ShardReader
    from shards.reading.selection import StreamConfig
    from shards.reading.stream import TrialStream
    from shards.reading.trials import open_trials
    from shards.upkeep.verify import verify

_FACE = {
    "Index": "format.index",
    "pack": "packing.pack",
    "as_webdataset": "reading.as_webdataset",
    "ShardReader": "reading.reader",
    "StreamConfig": "reading.selection",
    "TrialStream": "reading.stream",
    "open_trials": "reading.trials",
    "verify": "upkeep.verify",
}
__all__ = ["Index", "ShardReader", "StreamConfig", "TrialStream", "as_webdataset", "open_trials", "pack", "verify"]


def __getattr__(name: str) -> Any:  # Any: whatever the name stands for
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FACE[name]}"), name)
