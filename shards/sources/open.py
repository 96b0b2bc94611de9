"""Opens the data set of a recipe in the layout that it names, or with the reader of another package."""

from __future__ import annotations

import importlib
from typing import Any

from nd_dist.config import Config
from nd_dist.errors import ConfigError, DataError
from shards.sources.contract import DatasetReader

_READERS = {
    "nsd": "shards.sources.nsd:NsdReader",
    "mindeye2": "shards.sources.mindeye2:MindEye2Reader",
    "laion_fmri": "shards.sources.laion_fmri:LaionFmriReader",
}
_LAYOUTS = {  # what a folder is known by
    "nsd": ("nsddata", "nsddata_betas"),
    "mindeye2": ("wds/subj*", "betas_all_subj*"),
    "laion_fmri": ("derivatives/glmsingle-tedana", "stimuli/task-images_*"),
    "MindEye1": ("webdataset_avg_split", "train/train_subj*", "metadata_subj*.json"),
}
_METHODS = ("design", "read_session", "pictures", "captions")


def open_reader(config: Config) -> DatasetReader:
    """Return the reader that ``config.data.reader`` names, after it has checked that its files exist.

    A reader of another package is named ``package.module:Class``; the class has a method ``open(config)`` that returns
    a ``DatasetReader``.

    Raises:
        DataError: a file, subject or session is missing or does not fit the others, or the folder has another layout.
        ConfigError: there is no such reader.
    """
    name = config.data.reader
    layouts = [known for known, signs in _LAYOUTS.items() if any(any(config.nsd_root.glob(sign)) for sign in signs)]
    if name in _READERS and layouts and name not in layouts:
        raise DataError(
            f"The folder holds the layout of {layouts[0]}, and data.reader is {name}.",
            where=str(config.nsd_root),
            todo=f"set data.reader={layouts[0]}"
            if layouts[0] in _READERS
            else "download NSD itself, or MindEye2's files (docs/data.md): MindEye1's are not read",
        )
    reader: DatasetReader = _reader_class(name).open(config)
    if missing := [method for method in _METHODS if not hasattr(reader, method)]:
        raise ConfigError("A reader does not fulfil the contract.", where=f"data.reader={name}", found=f"no {missing}")
    return reader


def _reader_class(name: str) -> Any:  # Any: a class of somebody else's
    """Return a reader's class.

    Raises:
        ConfigError: it cannot be imported.
    """
    module, _, cls = _READERS.get(name, name).partition(":")
    try:
        return getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            "The reader of the data set cannot be imported.",
            where=f"data.reader={name}",
            expected=f"package.module:Class, importable here (PYTHONPATH), or one of {', '.join(_READERS)}",
            found=str(error),
        ) from error
