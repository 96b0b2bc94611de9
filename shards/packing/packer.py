"""Does one unit of packing: reads, z-scores or extracts, writes a shard, then its receipt. Knows nothing of ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nd_dist.compute.threads import Behind, ahead
from nd_dist.config import Config
from nd_dist.errors import DataError
from nd_dist.events import EventLog
from nd_dist.files import canonical_json, hash_json
from nd_dist.schema import SEMANTIC, TARGETS, TargetSpec
from shards.format.codec import (
    CHECKSUM,
    DTYPES,
    PICTURES,
    VOXELS,
    encode_png,
    image_key,
    member_field,
    narrow,
    npy_header,
    trial_key,
)
from shards.format.index import TRIALS, VERSION, ShardInfo
from shards.format.tables import TEST, TRAIN, TRIAL_ROW
from shards.format.writer import ShardWriter, open_shard
from shards.packing import doubts, normalize
from shards.packing.held import read_held
from shards.packing.plan import ImageUnit, PackPlan, TrialUnit, Unit
from shards.packing.quantize import channel_peaks
from shards.packing.receipts import (
    PACKED_IMAGE_ROW,
    Receipt,
    check_recipe,
    is_whole,
    read_receipts,
    remove_abandoned_parts,
    write_receipt,
)
from shards.packing.targets import TargetExtractor
from shards.sources.contract import DatasetReader

_OWN_KINDS = (TRIALS, PICTURES, *TARGETS)  # int8 stores follow from these
MOST_THREADS = 8  # of a rank that encodes PNG


@dataclass
class _Progress:
    """Counts samples and reports them."""

    events: EventLog
    total: int
    done: int = 0

    def add(self, samples: int) -> None:
        self.done += samples
        self.events.progress("pack", self.done, self.total)


class _Batch(NamedTuple):
    """Pictures that are extracted together, their captions, and themselves as PNG where they are packed."""

    image_ids: Sequence[int]
    pictures_BHWC: npt.NDArray[np.uint8]
    captions: Sequence[Sequence[str]]
    encoded: Sequence[bytes]


@dataclass(frozen=True)
class _ShardFacts:
    """What a receipt says beside where the samples lie; see ``ShardInfo`` and ``Receipt``."""

    shape: tuple[int, ...]
    num_invalid: int = 0
    peaks: npt.NDArray[np.float32] | None = None
    raw: npt.NDArray[np.uint64] | None = None
    accepted: tuple[str, ...] = ()


class Packer:
    """Does units; knows everything but the ranks.

    Args:
        config: The recipe.
        reader: The data set.
        plan: What is to be packed.
        extractor: Makes targets.
        events: Gets ``progress`` in samples.
    """

    def __init__(
        self, config: Config, reader: DatasetReader, plan: PackPlan, extractor: TargetExtractor, events: EventLog
    ) -> None:
        self.plan = plan
        self._config, self._reader, self._extractor, self._events = config, reader, extractor, events
        self.scheme = normalize.SCHEMES[config.data.normalization]
        self._specs: dict[str, TargetSpec] = {spec.name: spec for spec in extractor.specs}
        self.subject_moments: dict[int, normalize.Moments] = {}
        """Subject -> moments of all its sessions, where the z-scoring is by subject; to be set before ``run``."""
        self._repeats = {subject: design.repeat for subject, design in plan.designs.items()}
        self._source = {key: value for key, value in reader.source.items() if key != "simulated"}

    def find_finished(self) -> dict[str, Receipt]:
        """Return the receipts of shards that are done, asked for now or before, and clear away what packers left.

        Raises:
            DataError: a shard was packed by another recipe, or a receipt is damaged.
        """
        shards_dir = self._config.shards_folder
        remove_abandoned_parts(shards_dir)
        receipts, listed, finished = read_receipts(shards_dir), read_held(shards_dir).listed, {}
        planned = {path: (unit, recipe) for unit in self.plan.units for path, recipe in self._recipes(unit).items()}
        for path, receipt in receipts.items():
            if path in planned:
                unit, recipe = planned[path]
                rows = self._rows(unit) if isinstance(unit, TrialUnit) else None
                check_recipe(receipt, recipe, shards_dir, rows)
            elif path in listed and receipt.shard.kind in _OWN_KINDS:
                check_recipe(receipt, self._common_recipe(receipt.shard), shards_dir)
            else:
                continue
            if is_whole(shards_dir, receipt.shard):
                finished[path] = receipt
        return finished

    def run(self, units: Sequence[Unit], finished: set[str]) -> list[Receipt]:
        """Do units and return the receipts of the shards that were written."""
        progress = _Progress(self._events, sum(self.num_samples(unit) for unit in units))
        progress.add(0)
        receipts: list[Receipt] = []
        for unit in units:
            if isinstance(unit, TrialUnit):
                receipts.append(self._write_trials(unit))
                progress.add(self.num_samples(unit))
            else:
                stores = [store for store in unit.stores if unit.path(store) not in finished]
                receipts += self._write_images(unit, stores, progress)
        return receipts

    def num_samples(self, unit: Unit) -> int:
        """Return how many trials or images a unit holds."""
        if isinstance(unit, ImageUnit):
            return len(unit.image_ids)
        return len(unit.trials(self.plan.designs[unit.subject]))

    def _common_recipe(self, shard: ShardInfo) -> dict[str, Any]:
        """Return what a shard that this recipe does not ask for must share with those that it does."""
        data = self._config.data
        if shard.kind == TRIALS:
            settings = {name: getattr(data, name, None) for name in ("betas", "roi")}
            told = [design.source for design in self.plan.designs.values()]
            shared = {name: value for name, value in settings.items() if any(s.get(name) == value for s in told)}
            recipe = {**self._source, **shared, **self._trial_settings()}
        else:
            recipe = {**self._source, **(self._target_settings() if shard.kind != PICTURES else {})}
        return _plain(recipe)

    def _trial_settings(self) -> dict[str, object]:
        data = self._config.data
        name = f"{data.normalization}: {self.scheme.text}"
        return {"normalization": name, "voxel_dtype": data.voxel_dtype}

    def _target_settings(self) -> dict[str, object]:
        return {
            "extractor": self._extractor.fingerprint,
            "batch_size": self._config.frozen.batch_size,
            "target_dtype": self._config.data.target_dtype,
        }

    def _recipes(self, unit: Unit) -> dict[str, dict[str, Any]]:
        """Return path -> everything that a shard's bytes depend on, as plain JSON."""
        if isinstance(unit, TrialUnit):
            design = self.plan.designs[unit.subject]
            recipe: dict[str, object] = {**self._source, **design.source, **self._trial_settings()}
            if not self.scheme.per_session:
                recipe["sessions"] = len(self.plan.fitted[unit.subject])
            return {unit.path: _plain(recipe)}
        images = {**self._source, "images": hash_json(unit.image_ids)}
        targets = {**images, **self._target_settings()}
        return {unit.path(store): _plain(images if store == PICTURES else targets) for store in unit.stores}

    def fit_subject(self, subject: int, sessions: Sequence[int] | None = None) -> normalize.Moments:
        """Return the moments of the fitted images' means over all sessions (or some), in percent signal change.

        Raises:
            DataError: the subject has fewer than two images to fit on.
        """
        design = self.plan.designs[subject]
        chosen = self.plan.fitted[subject] if sessions is None else sessions
        is_fitted = np.isin(design.session, chosen) & (~design.is_test | self.scheme.uses_test)
        if (num_images := len(np.unique(design.image_id[is_fitted]))) < 2:
            raise DataError(
                "A subject has too few images to be z-scored.",
                where=f"subject {subject}",
                expected="at least 2 that are not shared",
                found=num_images,
            )
        means = normalize.ImageMeans(design.image_id[is_fitted])
        for session in chosen:
            trials = design.trials_of(session)
            means.add(self._reader.read_session(subject, session), design.image_id[trials], is_fitted[trials])
        return means.moments

    def _fit(self, subject: int, session: int, betas_TV: npt.NDArray[np.float32]) -> normalize.Moments:
        """Return the moments of one session's fitted trials."""
        design = self.plan.designs[subject]
        is_test = design.is_test[design.trials_of(session)]
        is_fitted = np.ones_like(is_test) if self.scheme.uses_test else ~is_test
        return normalize.fit(betas_TV, is_fitted, where=f"subject {subject}, session {session}")

    def _write_trials(self, unit: TrialUnit) -> Receipt:
        """Write one session's trial shard and its receipt."""
        design, data = self.plan.designs[unit.subject], self._config.data
        where = f"subject {unit.subject}, session {unit.session}"
        betas_TV = self._reader.read_session(unit.subject, unit.session)
        of_session = design.trials_of(unit.session)
        if betas_TV.shape != (len(of_session), design.num_voxels):
            raise DataError(
                "A session's betas do not fit the design.",
                where=where,
                expected=(len(of_session), design.num_voxels),
                found=betas_TV.shape,
            )
        names = [doubts.trial_name(unit.subject, unit.session, trial) for trial in of_session.tolist()]
        raw_T = doubts.raw_checksums(betas_TV)
        found = doubts.session_doubts(betas_TV, raw_T, names, doubts.session_name(unit.subject, unit.session))
        doubts.settle(found, data.accept, where)
        moments = self.subject_moments.get(unit.subject)
        if moments is None:
            moments = self._fit(unit.subject, unit.session, betas_TV)
        is_packed = np.isin(of_session, unit.trials(design))
        voxels_TV, num_invalid = normalize.zscore(betas_TV, moments, self.scheme.ddof)
        dtype = DTYPES[data.voxel_dtype]
        stored_TV = narrow(voxels_TV[is_packed], dtype, where)
        header = npy_header(dtype, (design.num_voxels,))
        rows = self._rows(unit)
        with open_shard(self._config.shards_folder / unit.path) as writer:
            for row, values_V in zip(rows, stored_TV, strict=True):
                key = trial_key(unit.subject, unit.session, int(row["trial"]), int(row["image"]), int(row["repeat"]))
                writer.add_array(key, member_field(VOXELS), header, values_V.tobytes())
        writer.locate(rows)
        facts = _ShardFacts((design.num_voxels,), num_invalid, raw=raw_T[is_packed], accepted=tuple(found))
        return self._finish(unit, TRIALS, writer, rows, facts)

    def _rows(self, unit: TrialUnit) -> npt.NDArray[np.void]:
        """Return the rows of a trial shard as they are known before it is written."""
        design = self.plan.designs[unit.subject]
        trials = unit.trials(design)
        rows = np.zeros(len(trials), dtype=TRIAL_ROW)
        rows["subject"], rows["session"], rows["trial"] = unit.subject, unit.session, trials
        rows["image"], rows["repeat"] = design.image_id[trials], self._repeats[unit.subject][trials]
        rows["split"] = np.where(design.is_test[trials], TEST, TRAIN)
        return rows

    def _write_images(self, unit: ImageUnit, stores: Sequence[str], progress: _Progress) -> list[Receipt]:
        """Write the shards of one unit of images for the stores that lack them, batch by batch."""
        targets = tuple(store for store in stores if store != PICTURES)
        picture_shape: tuple[int, ...] = ()
        peaks: dict[str, list[npt.NDArray[np.float32]]] = {}
        found: list[str] = []
        with ExitStack() as stack:
            writers = {
                store: stack.enter_context(open_shard(self._config.shards_folder / unit.path(store)))
                for store in stores
            }
            writing = stack.enter_context(Behind())
            for batch in stack.enter_context(closing(ahead(self._read(unit, stores)))):
                found += doubts.picture_doubts(batch.pictures_BHWC, batch.image_ids)
                doubts.settle(found, self._config.data.accept, f"pictures of group {unit.group}")
                picture_shape = batch.pictures_BHWC.shape[1:]
                extracted: Mapping[str, npt.NDArray[np.float32]] = {}
                if targets:  # on this thread, which owns the GPU; reading, PNG and the disk go on beside it
                    extracted = self._extractor.extract(batch.pictures_BHWC, batch.captions, batch.image_ids, targets)
                writing.do(partial(self._add, writers, batch, {name: extracted[name] for name in targets}, peaks))
                progress.add(len(batch.image_ids))
        receipts = []
        for store, writer in writers.items():
            rows = np.zeros(len(unit.image_ids), dtype=PACKED_IMAGE_ROW)
            rows["image"] = unit.image_ids
            writer.locate(rows)
            shape = picture_shape if store == PICTURES else self._specs[store].shape
            peak = np.maximum.reduce(peaks[store]) if store in peaks else None
            facts = _ShardFacts(shape, peaks=peak, accepted=tuple(found))
            receipts.append(self._finish(unit, store, writer, rows, facts))
        return receipts

    def _read(self, unit: ImageUnit, stores: Sequence[str]) -> Iterator[_Batch]:
        """Yield the pictures of a unit with what their stores need of them: captions, PNG bytes."""
        batch_size = self._config.frozen.batch_size
        with ThreadPoolExecutor(max_workers=min(MOST_THREADS, os.cpu_count() or 1)) as threads:
            for start in range(0, len(unit.image_ids), batch_size):
                ids = unit.image_ids[start : start + batch_size]
                pictures_BHWC = self._reader.pictures(ids)
                captions = self._reader.captions(ids) if SEMANTIC in stores else [()] * len(ids)
                encoded = list(threads.map(encode_png, pictures_BHWC)) if PICTURES in stores else []
                yield _Batch(ids, pictures_BHWC, captions, encoded)

    def _add(
        self,
        writers: Mapping[str, ShardWriter],
        batch: _Batch,
        extracted: Mapping[str, npt.NDArray[np.float32]],
        peaks: dict[str, list[npt.NDArray[np.float32]]],
    ) -> None:
        """Add a batch's targets and pictures to their shards, and the targets' magnitudes to ``peaks``."""
        image_ids = batch.image_ids
        for image_id, content in zip(image_ids, batch.encoded, strict=False):
            writers[PICTURES].add_bytes(image_key(image_id), member_field(PICTURES), content)
        for name, values in extracted.items():
            shape, writer = self._specs[name].shape, writers[name]
            if values.shape != (len(image_ids), *shape):
                raise DataError(
                    "The extractor returned a target of another shape than it announced.",
                    where=name,
                    expected=(len(image_ids), *shape),
                    found=values.shape,
                )
            dtype = DTYPES[self._config.data.target_dtype]
            header = npy_header(dtype, shape)
            stored = np.stack(
                [narrow(value, dtype, f"{name} of image {i}") for i, value in zip(image_ids, values, strict=True)]
            )
            for image_id, value in zip(image_ids, stored, strict=True):
                writer.add_array(image_key(image_id), member_field(name), header, value.tobytes())
            peaks.setdefault(name, []).append(channel_peaks(stored))

    def _finish(
        self, unit: Unit, kind: str, writer: ShardWriter, rows: npt.NDArray[np.void], facts: _ShardFacts
    ) -> Receipt:
        """Write the receipt of a shard that lies complete on disk."""
        path = unit.path if isinstance(unit, TrialUnit) else unit.path(kind)
        group = f"s{unit.subject:02d}" if isinstance(unit, TrialUnit) else unit.group
        shard = writer.info(path, kind, group, facts.num_invalid)
        receipt = Receipt.make(shard, self._recipes(unit)[path], facts.shape, rows, facts.peaks, facts.raw)
        receipt = receipt.model_copy(update={"accepted": facts.accepted})
        write_receipt(self._config.shards_folder, receipt)
        return receipt


def _plain(recipe: Mapping[str, object]) -> dict[str, Any]:  # Any: JSON
    """Return everything that a shard's bytes depend on as plain JSON."""
    plain: dict[str, Any] = json.loads(canonical_json({**recipe, "format": VERSION, "checksum": CHECKSUM}))
    return plain
