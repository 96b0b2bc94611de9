"""Packs a data set into shards, on any number of ranks, with the same bytes for each, resumable shard by shard.

    plan -> units that lack a receipt -> every rank its part: write shard, then receipt -> gather -> tables -> index

Rank 0 alone decides what is pending and writes the index; every rank derives the same plan. A unit's bytes depend on
the unit only: target extraction runs in batches that begin at the shard's first image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from nd_dist.comm import Comm
from nd_dist.config import Config
from nd_dist.errors import NdDistError
from nd_dist.events import EventLog
from shards.format.index import Index
from shards.packing.assemble import assemble_index
from shards.packing.held import read_held
from shards.packing.packer import Packer
from shards.packing.plan import ImageUnit, TrialUnit, Unit, plan, plan_pack
from shards.packing.quantize import pack_int8
from shards.packing.receipts import Receipt
from shards.packing.targets import TargetExtractor
from shards.sources.contract import DatasetReader, image_sets
from shards.sources.open import open_reader

__all__ = ["pack", "plan_pack"]

T = TypeVar("T")


def pack(config: Config, comm: Comm, events: EventLog, extractor: TargetExtractor) -> Index:
    """Pack what a recipe asks for and return the index; every rank calls it, every rank gets the index.

    Finished shards are kept, so running it again after an interruption, after ``repair``, or with more targets,
    sessions or subjects does only what is missing; with fewer, what the folder holds stays.

    Args:
        config: The recipe (``nsd_root``, ``shards_dir``, ``data``, ``frozen.batch_size``).
        comm: The ranks that share the work.
        events: This rank's events; gets ``progress`` in samples.
        extractor: Makes targets; not called where nothing is missing.

    Raises:
        DataError: data is missing or damaged, or the folder holds shards of other settings.
    """
    return pack_from(open_reader(config), config, comm, events, extractor)


def pack_from(
    reader: DatasetReader, config: Config, comm: Comm, events: EventLog, extractor: TargetExtractor
) -> Index:
    """Like ``pack``, from any data set that a reader knows how to read."""
    held = _on_main(comm, lambda: read_held(config.shards_folder))
    packer = Packer(config, reader, plan(config.data, reader, extractor.specs, held), extractor, events)
    finished = _on_main(comm, packer.find_finished)
    pending = [unit for unit in packer.plan.units if any(path not in finished for path in unit_paths(unit))]
    _fit_subjects(packer, comm, pending)
    mine = share(pending, [packer.num_samples(unit) for unit in pending], comm.rank, comm.size)
    receipts = packer.run(mine, set(finished))
    gathered = comm.gather([receipt.model_dump_json() for receipt in receipts])
    new = [Receipt.model_validate_json(text) for part in gathered for text in part]
    packed = {**finished, **{receipt.shard.path: receipt for receipt in new}}
    packed |= pack_int8(config, packed if comm.rank == 0 else None, comm, events)
    return _on_main(comm, lambda: assemble_index(config, packer.plan, packed, reader.source, image_sets(reader)))


def share(units: Sequence[Unit], sizes: Sequence[int], rank: int, num_ranks: int) -> list[Unit]:
    """Return a rank's units, in order, so that all ranks get about as many trials and about as many images.

    The largest go first, each to the rank that has least; trials and images are dealt out apart, as their costs have
    no common measure.
    """
    mine = []
    for kind in (TrialUnit, ImageUnit):
        loads = [0] * num_ranks
        numbers = [number for number, unit in enumerate(units) if isinstance(unit, kind)]
        for number in sorted(numbers, key=lambda number: -sizes[number]):
            least = loads.index(min(loads))
            loads[least] += sizes[number]
            if least == rank:
                mine.append(number)
    return [units[number] for number in sorted(mine)]


def unit_paths(unit: Unit) -> tuple[str, ...]:
    """Return the shards that a unit writes."""
    return (unit.path,) if isinstance(unit, TrialUnit) else tuple(unit.path(store) for store in unit.stores)


def _on_main(comm: Comm, work: Callable[[], T]) -> T:
    """Return, on every rank, what rank 0 computes; an expected error is raised on every rank, so none waits."""
    outcome: T | NdDistError | None = None
    if comm.rank == 0:
        try:
            outcome = work()
        except NdDistError as error:
            outcome = error
    outcome = comm.broadcast(outcome)
    if isinstance(outcome, NdDistError):
        raise outcome
    return outcome


def _fit_subjects(packer: Packer, comm: Comm, pending: Sequence[Unit]) -> None:
    """Fit the z-scoring of whole subjects, where the scheme wants that; every rank reads some subjects."""
    if packer.scheme.per_session:
        return
    subjects = sorted({unit.subject for unit in pending if isinstance(unit, TrialUnit)})
    parts = comm.gather({subject: packer.fit_subject(subject) for subject in subjects[comm.rank :: comm.size]})
    fitted = {subject: moments for part in parts for subject, moments in part.items()}
    packer.subject_moments.update(_on_main(comm, lambda: fitted))
