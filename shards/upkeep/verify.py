"""Proves a folder of shards: hashes, tables against tar headers, every record, counts, splits, normalisation, and that
nothing in it is a copy of something else or cannot be real.

Reads everything once, a server's files from the server and not from a cache. Each problem names its shard and, where
one can be told, its sample. Nothing is changed; ``shards.upkeep.repair`` does that.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nd_dist.config import RemoteConfig
from nd_dist.errors import DataError
from shards.format.codec import (
    NPY_HEADER_BYTES,
    PICTURES,
    VOXELS,
    checksum,
    decode_png,
    image_key,
    image_shard_path,
    member_field,
    npy_header,
    trial_shard_path,
)
from shards.format.index import INDEX_NAME, RAW, TRIALS, FeatureInfo, Index, ShardInfo
from shards.format.tables import ABSENT, TEST, Table
from shards.format.tarwalk import Member, TarError, walk
from shards.packing import doubts, normalize
from shards.packing.held import number_of
from shards.places.store import StoredFile
from shards.reading.reader import trial_row_key
from shards.sources.known import KnownCounts, known_data_set

TOLERANCE = 5e-3
"""Of mean 0 and standard deviation 1, in stored (half) precision."""

SINGLE_COLOUR_RATIO = 50
"""A PNG of a single colour is smaller than its pixels by far more than this."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Problem:
    """Something that is wrong.

    Args:
        shard: Path of the file below the shards' folder.
        sample: Key of the sample; empty where the whole file is meant.
        what: What is wrong.
    """

    shard: str
    sample: str
    what: str

    def __str__(self) -> str:
        """Return one line for people."""
        return f"{self.shard}{f', sample {self.sample}' if self.sample else ''}: {self.what}"


@dataclass(frozen=True)
class _Expected:
    """A record that the tables promise: name and place of its member, and its checksum."""

    key: str
    member: Member
    header: bytes
    checksum: int


def verify(
    location: Path | str, progress: Progress | None = None, remote: RemoteConfig | None = None
) -> list[Problem]:
    """Return everything that is wrong with a set of shards; an empty list proves it sound.

    Args:
        location: Folder that ``nd pack`` wrote, or a URL of a copy of it.
        progress: Called with (shards done, all shards).
        remote: Server settings of a URL; its cache is not looked at.
    """
    with tempfile.TemporaryDirectory(prefix="nd-verify-") as cache:  # for a server's tables
        remote = (remote or RemoteConfig()).model_copy(update={"cache_dir": Path(cache)})
        try:
            index = Index.read(location, remote)
        except DataError as error:
            return [Problem(INDEX_NAME, "", str(error))]
        return _verify(index, progress)


def _verify(index: Index, progress: Progress | None) -> list[Problem]:
    """Return everything that is wrong with the shards of an index."""
    scales = [info.scale for info in index.features.values() if info.scale is not None]
    problems = [problem for table in (*index.tables.values(), *scales) for problem in _check_file(index, table)]
    problems = problems or [*_check_tables(index)]
    if problems:  # without sound tables only whole files can be judged
        return problems + [problem for shard in index.shards for problem in _check_file(index, shard)]
    problems += [*check_counts(index), *check_copies(index)]
    means: dict[int, normalize.ImageMeans] = {}
    for number in range(len(index.shards)):
        problems += verify_shard(index, number, means)
        if progress is not None:
            progress(number + 1, len(index.shards))
    for subject, of_subject in means.items():
        if of_subject.is_complete:  # else a session was told above
            problems += _check_moments(f"subject {subject}", of_subject.moments, _scheme(index, subject).ddof)
    return problems


def _read_whole(index: Index, file: StoredFile) -> tuple[bytes, list[Problem]]:
    """Return a file's content, and what is wrong with it before its hash is looked at."""
    try:
        content = index.store.read_whole(file.path)
    except DataError as error:
        return b"", [Problem(file.path, "", f"the file is missing or cannot be read: {error.found}")]
    if len(content) != file.bytes:
        return b"", [Problem(file.path, "", f"the file has {len(content)} bytes instead of {file.bytes}")]
    return content, []


def _check_file(index: Index, file: StoredFile) -> list[Problem]:
    """Return what is wrong with a file as a whole."""
    content, problems = _read_whole(index, file)
    if not problems and hashlib.sha256(content).hexdigest() != file.sha256:
        problems.append(Problem(file.path, "", "the file's hash differs from the index"))
    return problems


def _check_tables(index: Index) -> Iterator[Problem]:
    """Yield tables, whole by their hash, that do not fit the index or each other."""
    for kind, info in index.tables.items():
        try:
            table = index.table(kind)
            num_rows = index.num_images if kind in index.features else info.rows
            num_rows = len(index.trials) if kind == RAW else num_rows
        except DataError as error:
            yield Problem(info.path, "", f"{error.what} {error.found}")
            continue
        if len(table) != num_rows:
            yield Problem(info.path, "", f"{len(table)} rows instead of {num_rows}")
        if kind == TRIALS or kind in index.features:
            own = [number for number, shard in enumerate(index.shards) if shard.kind == kind]
            strange = table[~np.isin(table["shard"], [*own, *([] if kind == TRIALS else [ABSENT])])]
            if len(strange):
                yield Problem(info.path, "", f"{len(strange)} rows name a shard that is none of {kind}")
        if kind == TRIALS and (lost := sorted({*table["subject"].tolist()} - index.subjects.keys())):
            yield Problem(info.path, "", f"trials of subjects {lost}, which the index does not know")


def check_counts(index: Index) -> Iterator[Problem]:
    """Yield contradictions between index, table of trials, and the known counts of a published data set."""
    trials = index.trials
    path = index.tables[TRIALS].path
    test_images = np.unique(trials["image"][trials["split"] == TEST])
    if len(mixed := np.intersect1d(test_images, trials["image"][trials["split"] != TEST])):
        yield Problem(path, image_key(int(mixed[0])), f"{len(mixed)} images are in train and test")
    if len(beyond := trials["image"][trials["image"] >= index.num_images]):
        yield Problem(path, image_key(int(beyond[0])), f"{len(beyond)} trials show images that do not exist")
    for subject, info in index.subjects.items():
        rows = trials[trials["subject"] == subject]
        found = _counts(rows, info.voxels)
        expected = KnownCounts(**{name: getattr(info, name) for name in asdict(found)})
        yield from _compare(path, f"subject {subject}", "the index", expected, found)
        trained = np.unique(rows["session"][rows["split"] != TEST])
        whole = _counts(rows[np.isin(rows["session"], trained)], info.voxels)  # of the others test trials alone
        known = known_data_set(index.num_images, index.source, info.source.get("roi"))
        if known is not None and (counts := known.expected(subject, whole)) is not None:
            yield from _compare(path, f"subject {subject}", f"{known.name}'s known counts", counts, whole)
        if len(np.unique(rows["trial"])) < len(rows):
            yield Problem(path, f"subject {subject}", "a trial is there twice")
        most = int(np.unique(rows["image"], return_counts=True)[1].max(initial=0))
        if known is not None and most > known.most_repeats:
            told = f"an image was shown {most} times instead of at most {known.most_repeats}"
            yield Problem(path, f"subject {subject}", told)


def _counts(rows: Table, num_voxels: int) -> KnownCounts:
    """Return what some rows of a subject hold."""
    tests = rows[rows["split"] == TEST]
    return KnownCounts(
        sessions=len(np.unique(rows["session"][rows["split"] != TEST])),
        trials=len(rows),
        images=len(np.unique(rows["image"])),
        test_images=len(np.unique(tests["image"])),
        test_trials=len(tests),
        voxels=num_voxels,
    )


def check_copies(index: Index) -> Iterator[Problem]:
    """Yield trials that equal one of another session or subject, before or after z-scoring, or are zero throughout."""
    rows, raw = index.trials, index.raw_checksums
    names = [doubts.trial_name(*row) for row in rows[["subject", "session", "trial"]].tolist()]
    zeros = {s: checksum(memoryview(bytes(4 * info.voxels))) for s, info in index.subjects.items()}
    is_zero = raw == np.array([zeros.get(subject, 0) for subject in rows["subject"].tolist()], dtype=np.uint64)
    found = [f"{doubts.CONSTANT_TRIALS} {names[trial]}" for trial in np.flatnonzero(is_zero & (raw != 0)).tolist()]
    found += doubts.copy_doubts(raw, rows["checksum"], names, {*found, *index.accepted})
    places = dict(zip(names, rows["shard"].tolist(), strict=True))
    for doubt in found:
        yield from _doubtful(index, index.shards[places[doubt.split(" ")[1]]].path, [doubt])


def _doubtful(index: Index, path: str, found: Sequence[str]) -> Iterator[Problem]:
    """Yield what cannot be real and was not accepted when it was packed."""
    for kind, sample in (doubt.split(" ") for doubt in found if doubt not in index.accepted):
        yield Problem(path, sample, f"cannot be real: {doubts.WORDS[kind]}")


def _compare(path: str, sample: str, source: str, expected: KnownCounts, found: KnownCounts) -> Iterator[Problem]:
    """Yield every count that differs."""
    for name, value in asdict(expected).items():
        if (other := getattr(found, name)) != value:
            yield Problem(path, sample, f"{other} {name} instead of {value} ({source})")


def verify_shard(index: Index, number: int, means: dict[int, normalize.ImageMeans] | None = None) -> list[Problem]:
    """Return what is wrong with one shard, against tables that are sound.

    Args:
        index: Index of the folder.
        number: Position of the shard in the index.
        means: Gets the session's trials where the z-scoring spans sessions and only all of them can be judged.
    """
    shard = index.shards[number]
    content, problems = _read_whole(index, shard)
    if problems:
        return problems
    table = index.table(shard.kind)
    rows = table[table["shard"] == number]
    if shard.kind == TRIALS:
        expected = _expected_trials(index, rows)
        named = {(trial_shard_path(s, e, "-test" in shard.path), f"s{s:02d}") for s, e in _sessions_of(rows)}
    else:
        expected = _expected_images(index.features[shard.kind], shard.kind, table, number)
        named = {(image_shard_path(shard.kind, shard.group, number_of(shard)), shard.group)}
    problems = [*_check_members(shard, content, expected)]
    if named != {(shard.path, shard.group)}:
        problems.append(Problem(shard.path, "", "the table lists samples in it that belong into another shard"))
    if hashlib.sha256(content).hexdigest() != shard.sha256 and not problems:
        problems.append(Problem(shard.path, "", "bytes between the samples differ from what was packed"))
    if shard.samples != len(expected):
        problems.append(Problem(shard.path, "", f"{len(expected)} samples in the table instead of {shard.samples}"))
    if not problems and shard.kind == TRIALS:
        problems += _check_normalization(index, shard, content, rows, {} if means is None else means)
    if not problems and shard.kind == PICTURES:
        problems += _check_pictures(index, shard, content, expected)
    return problems


def _sessions_of(rows: Table) -> set[tuple[int, int]]:
    """Return the subjects and sessions of rows of trials."""
    return set(rows[["subject", "session"]].tolist())


def _check_pictures(
    index: Index, shard: ShardInfo, content: bytes, expected: Sequence[_Expected]
) -> Iterator[Problem]:
    """Yield pictures of a single colour; only a small PNG can be one."""
    most_bytes = prod(index.features[PICTURES].shape) // SINGLE_COLOUR_RATIO
    for item in expected:
        start, stop = item.member.offset, item.member.offset + item.member.num_bytes
        if stop - start <= most_bytes:
            picture_HWC = decode_png(content[start:stop], where=item.key)
            found = doubts.picture_doubts(picture_HWC[None], [int(item.key[1:])])
            yield from _doubtful(index, shard.path, found)


def _expected_trials(index: Index, rows: Table) -> list[_Expected]:
    """Return the records of a trial shard."""
    info = index.voxels
    header = npy_header(info.dtype, (index.subjects[int(rows["subject"][0])].voxels,)) if len(rows) else b""
    expected = []
    for row in rows:
        key, offset = trial_row_key(row), int(row["offset"])
        num_bytes = index.subjects[int(row["subject"])].voxels * np.dtype(info.dtype).itemsize
        member = Member(f"{key}.{member_field(VOXELS)}", offset - NPY_HEADER_BYTES, NPY_HEADER_BYTES + num_bytes)
        expected.append(_Expected(key, member, header, int(row["checksum"])))
    return expected


def _expected_images(info: FeatureInfo, store: str, table: Table, number: int) -> list[_Expected]:
    """Return the records of an image-keyed shard."""
    header = b"" if store == PICTURES else npy_header(info.dtype, info.shape)
    expected = []
    for image_id in np.flatnonzero(table["shard"] == number).tolist():
        row, key = table[image_id], image_key(image_id)
        num_bytes = int(row["bytes"])
        if header and num_bytes != prod(info.shape) * np.dtype(info.dtype).itemsize:
            num_bytes = -1  # matches no member
        member = Member(f"{key}.{member_field(store)}", int(row["offset"]) - info.header, info.header + num_bytes)
        expected.append(_Expected(key, member, header, int(row["checksum"])))
    return expected


def _check_members(shard: ShardInfo, content: bytes, expected: Sequence[_Expected]) -> Iterator[Problem]:
    """Yield every difference between a tar's members and what the tables promise."""
    members: list[Member] = []
    try:
        members.extend(walk(io.BytesIO(content), len(content)))
    except TarError as error:
        key = expected[len(members)].key if len(members) < len(expected) else ""
        yield Problem(shard.path, key, str(error))
    for item, member in zip(expected, members, strict=False):
        if member != item.member:
            yield Problem(shard.path, item.key, f"the tar holds {member}; the table says {item.member}")
    for item in expected:
        start = item.member.offset
        header = content[start : start + len(item.header)]
        record = content[start + len(item.header) : start + item.member.num_bytes]
        if header != item.header:
            yield Problem(shard.path, item.key, "the npy header is not the one that was packed")
        elif checksum(memoryview(record)) != item.checksum:
            yield Problem(shard.path, item.key, "the bytes are not those that were packed (checksum differs)")
    if len(members) > len(expected):
        yield Problem(shard.path, "", f"{len(members) - len(expected)} members that no table knows")


def _scheme(index: Index, subject: int) -> normalize.Scheme:
    """Return how a subject was z-scored."""
    return normalize.SCHEMES[index.subjects[subject].normalization]


def _check_normalization(
    index: Index, shard: ShardInfo, content: bytes, rows: Table, means: dict[int, normalize.ImageMeans]
) -> Iterator[Problem]:
    """Yield voxels of a session that are not finite or not z-scored."""
    subject = int(rows["subject"][0])
    dtype, num_voxels = index.voxels.dtype, index.subjects[subject].voxels
    voxels_TV = np.stack(
        [np.frombuffer(content, dtype, num_voxels, int(offset)) for offset in rows["offset"]], dtype=np.float32
    )
    if not np.isfinite(voxels_TV).all():
        yield Problem(shard.path, "", "some voxels are not finite")
        return
    scheme = _scheme(index, subject)
    is_fitted = _is_fitted(rows, scheme)
    only_test = not (rows["split"] != TEST).any()
    num_invalid = int((voxels_TV == 0).all(axis=0).sum())
    if num_invalid != shard.invalid_voxels and not (only_test and num_invalid > shard.invalid_voxels):
        yield Problem(shard.path, "", f"{num_invalid} voxels are zero instead of {shard.invalid_voxels}")
    session = doubts.session_name(subject, int(rows["session"][0]))
    yield from _doubtful(index, shard.path, doubts.invalid_doubts(shard.invalid_voxels, num_voxels, session))
    if only_test:  # fitted on trials that are not here
        return
    if scheme.per_session:
        yield from _check_moments(shard.path, normalize.fit(voxels_TV, is_fitted, where=shard.path), scheme.ddof)
        return
    if subject not in means:
        trials = index.trials[index.trials["subject"] == subject]
        means[subject] = normalize.ImageMeans(trials["image"][_is_fitted(trials, scheme)])
    means[subject].add(voxels_TV, rows["image"], is_fitted)


def _is_fitted(rows: Table, scheme: normalize.Scheme) -> npt.NDArray[np.bool_]:
    """Return which trials the z-scoring was fitted on."""
    return np.asarray((rows["split"] != TEST) | scheme.uses_test, dtype=np.bool_)


def _check_moments(where: str, moments: normalize.Moments, ddof: int) -> Iterator[Problem]:
    """Yield a problem where fitted voxels do not have mean 0 and standard deviation 1."""
    is_valid: npt.NDArray[np.bool_] = moments.count > 0
    for name, error in (("mean", np.abs(moments.mean)), ("standard deviation", np.abs(moments.std(ddof) - 1))):
        worst = float(error[is_valid].max(initial=0.0))
        if worst > TOLERANCE:
            yield Problem(where, "", f"the {name} of a fitted voxel is off by {worst:.3g}")
