"""Stock webdataset over packed shards, for users who bring their own training loop.

The pipeline is webdataset's own (its splitting, decoding, shuffling); only the opening of a shard is ours, so that a
wrong byte anywhere in a shard is an error, where stock webdataset ends without a word or passes it on, and a server's
shards come through the cache. For exact passes, resuming and equal steps on all ranks use ``shards.reading.stream``.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from webdataset import DataPipeline, decode, shardlists, tariterators
from webdataset.compat import FluidWrapper

from nd_dist.errors import DataError
from nd_dist.schema import Split
from shards.format.index import TRIALS, Index, ShardInfo
from shards.format.tables import TEST, TRAIN
from shards.places.store import read_checked
from shards.reading.reader import ShardReader


def as_webdataset(
    index: Index,
    split: Split,
    *,
    subjects: Sequence[int] | None = None,
    targets: Sequence[str] = (),
    shuffle_seed: int | None = None,
) -> FluidWrapper:
    """Return a stock webdataset pipeline over the trials of one split.

    A sample is a dict: ``__key__``, ``voxels.npy`` (V,), ``subject``, ``session``, ``trial``, ``image_id``, ``repeat``
    and one array a target. Shards are split over ranks and DataLoader workers by webdataset, so ranks may get
    different numbers of samples. Append webdataset's own steps: ``.shuffle(1000).to_tuple("voxels.npy", "c")``.

    Args:
        index: From ``Index.read``.
        split: ``train`` or ``test``.
        subjects: Only these (none: all).
        targets: Targets to join to every trial, float32.
        shuffle_seed: Shuffle the shards with this seed (none: in order).

    Raises:
        DataError: a subject or target was not packed; on iterating: a shard is missing, cut or damaged.
    """
    wanted = sorted(index.subjects) if subjects is None else list(subjects)
    if missing := [subject for subject in wanted if subject not in index.subjects]:
        raise DataError(f"Subjects {missing} were not packed.", where=index.place, expected=sorted(index.subjects))
    for name in targets:
        index.feature(name)
    groups = {f"s{subject:02d}" for subject in wanted}
    files = {shard.path: shard for shard in index.shards if shard.kind == TRIALS and shard.group in groups}
    rows = index.trials[index.trials["split"] == (TEST if split == "test" else TRAIN)]
    kept = frozenset(rows[["subject", "image"]].tolist())
    return FluidWrapper(
        DataPipeline(
            shardlists.SimpleShardList(list(files), seed=shuffle_seed),
            shardlists.split_by_node,
            shardlists.split_by_worker,
            _Open(index, files),
            tariterators.group_by_keys,
            decode(),
            _Join(index, kept, targets),
        )
    )


class _Open:
    """A pipeline stage: shard names -> members of their tars, as they were packed or an error."""

    def __init__(self, index: Index, files: Mapping[str, ShardInfo]) -> None:
        self._index, self._files = index, files

    def __call__(self, names: Iterable[Mapping[str, str]]) -> Iterator[dict[str, Any]]:  # Any: webdataset's samples
        for name in names:
            content = read_checked(self._index.store, self._files[name["url"]])
            yield from tariterators.tar_file_expander([{"url": name["url"], "stream": io.BytesIO(content)}])


class _Join:
    """A pipeline stage: keeps the trials of a split and adds what the tables and target stores know of them."""

    def __init__(self, index: Index, kept: frozenset[tuple[int, int]], targets: Sequence[str]) -> None:
        self._index, self._kept, self._targets = index, kept, tuple(targets)

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:  # Any: webdataset's samples
        reader = ShardReader.over(self._index)
        for sample in samples:
            subject, session, trial, image_id, repeat = (int(part[1:]) for part in sample["__key__"].split("_"))
            if (subject, image_id) not in self._kept:
                continue
            targets = {name: reader.targets(name, [image_id])[0] for name in self._targets}
            known = {"subject": subject, "session": session, "trial": trial, "image_id": image_id, "repeat": repeat}
            yield {**sample, **known, **targets}
