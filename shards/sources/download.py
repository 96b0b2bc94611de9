"""The commands that download a published data set: what is read of it, how large that is, and what is there already.

Nothing is downloaded here: both data sets come by the `aws` client, after terms that people accept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from nd_dist.config import DataConfig
from nd_dist.errors import ConfigError
from shards.sources.known import NSD, NSD_IMAGES, NSD_TRIALS_PER_SESSION
from shards.sources.laion_fmri_layout import NUM_SESSIONS, PARTICIPANTS, LaionFmriLayout, subject_label
from shards.sources.nsd_layout import NsdLayout

NSD_TERMS = "https://cvnlab.slite.page/p/IB6BSeW_7o/Terms-and-Conditions"
NSD_FORM = "https://forms.gle/xue2bCdM9LaFNMeb7"
LAION_FMRI_TERMS = "https://laion-fmri.hebartlab.com/terms"
# Grid of func1pt8mm by subject (NSD data manual); a session is 750 volumes of int16
_GRIDS = {1: (81, 104, 83), 2: (82, 106, 84), 3: (81, 106, 82), 4: (85, 99, 80),
          5: (79, 97, 78), 6: (85, 113, 83), 7: (78, 95, 81), 8: (80, 103, 78)}  # fmt: skip


def nsd_commands(to: Path, subjects: Sequence[int], data: DataConfig) -> Iterator[str]:
    """Yield the commands that copy what is read of NSD, with sizes by arithmetic (betas as int16, uncompressed).

    Raises:
        ConfigError: NSD has no such subject.
    """
    _require_subjects("NSD", subjects, NSD)
    layout = NsdLayout(to)
    yield f"# NSD's terms: {NSD_TERMS}"
    yield f"# Sign the access form first: {NSD_FORM}"
    yield "B=s3://natural-scenes-dataset"
    tables = [layout.expdesign, layout.stim_info]
    yield _sync(to, layout.expdesign.parent, f"design and picture table, some MB{_present(tables)}")
    size = f"{NSD_IMAGES * 425**2 * 3 / 1e9:.1f} GB"
    yield _copy(to, layout.stimuli, f"pictures, {size}")
    for subject in subjects:
        x, y, z = _GRIDS[subject]
        sessions, betas_dir = NSD[subject].sessions, layout.betas_dir(subject, data.betas)
        size = f"{x * y * z * 2 * NSD_TRIALS_PER_SESSION * sessions / 1e9:.0f} GB"
        responses, roi = layout.responses(subject), layout.roi(subject, data.roi)
        betas = [layout.betas(subject, data.betas, session, ".hdf5") for session in range(1, sessions + 1)]
        yield _sync(to, responses.parent, f"subject {subject}: responses, some MB{_present([responses])}")
        yield _sync(to, roi.parent, f"subject {subject}: regions, some MB{_present([roi])}")
        what = f"subject {subject}: {sessions} sessions, {size}{_present(betas)}"
        yield _sync(to, betas_dir, what, "--exclude '*' --include 'betas_session*.hdf5'")
    yield "# Captions are COCO's: nd fetch captions --to DIR"


def laion_fmri_commands(to: Path, subjects: Sequence[int], data: DataConfig) -> Iterator[str]:
    """Yield the commands that copy what is read of LAION-fMRI, with those sizes that its documentation gives.

    Raises:
        ConfigError: LAION-fMRI has no such subject.
    """
    _require_subjects("LAION-fMRI", subjects, PARTICIPANTS)
    layout = LaionFmriLayout(to)
    pictures, metadata, captions = map(layout.stimuli, ("stimuli.h5", "metadata.csv", "desc-captions.csv"))
    yield "# All but the pictures is CC0 and needs no account."
    yield "B=s3://laion-fmri"
    yield _copy(to, metadata, "table of the pictures, 1.6 MB")
    yield _copy(to, captions, "captions, size not published")
    yield f"# The pictures come under a data use agreement ({LAION_FMRI_TERMS}): LAION-fMRI's own program asks for it."
    yield f"pip install laion_fmri && laion-fmri config --data-dir {to}"
    yield f"laion-fmri download-stimuli   # pictures, 3.2 GB{_present([pictures])}"
    for subject in subjects:
        betas_dir, sessions = layout.betas_dir(subject, data.betas), range(1, NUM_SESSIONS + 1)
        betas = [layout.betas(subject, data.betas, session) for session in sessions]
        tables = [layout.trials(subject, data.betas, session) for session in sessions]
        label, rois = subject_label(subject), layout.rois(subject)
        size = "size not published; one reader reports some 3 GB a session"
        what = f"{label}: betas and tables of {NUM_SESSIONS} sessions, {size}{_present([*betas, *tables])}"
        options = "--exclude '*' --include '*SingletrialBetas*' --exclude 'ses-3[1-4]*'"
        yield _sync(to, betas_dir, what, options)
        yield _copy(
            to,
            layout.noise_ceiling(subject, data.betas),
            f"{label}: noise ceiling (data.min_noise_ceiling), size not published",
        )
        yield _copy(to, layout.brain_mask(subject), f"{label}: brain mask, size not published")
        what = f"{label}: ROIs, size not published" + (f"; {len(rois)} are there" if rois else "")
        yield _sync(to, layout.rois_dir(subject), what, "--exclude '*' --include '*_res-1pt8_*'")
    yield "# Named splits (data.split) and groups of duplicates come from the package's repository, some 20 MB:"
    yield "git clone --depth 1 https://github.com/ViCCo-Group/LAION-fMRI"
    yield f"mkdir -p {layout.splits} && cp -r LAION-fMRI/laion_fmri/splits/data/* {layout.splits}"
    yield f"cp LAION-fMRI/scripts/splits/data/*duplicate_groups.json {layout.splits}"


COMMANDS: dict[str, Callable[[Path, Sequence[int], DataConfig], Iterator[str]]] = {
    "nsd": nsd_commands,
    "laion-fmri": laion_fmri_commands,
}
"""What `nd fetch` calls a data set -> its commands."""


def _require_subjects(name: str, subjects: Sequence[int], known: Collection[int]) -> None:
    if unknown := sorted(set(subjects) - set(known)):
        raise ConfigError(f"{name} has no subjects {unknown}.", expected=f"some of {sorted(known)}")


def _present(paths: Sequence[Path]) -> str:
    """Return how many of these files are there, in words that follow a size; "" where none is."""
    count = sum(path.is_file() for path in paths)
    if not count:
        return ""
    return "; is there" if count == len(paths) == 1 else f"; {count} of {len(paths)} files are there"


def _sync(to: Path, folder: Path, what: str, options: str = "") -> str:
    words = ["aws s3 sync --no-sign-request", options, f"$B/{folder.relative_to(to)} {folder}"]
    return f"{' '.join(filter(None, words))}   # {what}"


def _copy(to: Path, path: Path, what: str) -> str:
    return f"aws s3 cp --no-sign-request $B/{path.relative_to(to)} {path}   # {what}{_present([path])}"
