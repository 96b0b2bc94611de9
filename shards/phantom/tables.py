"""The phantom's tables in NSD's formats: design (MATLAB), picture table (CSV), responses (TSV), COCO captions (JSON).

Ids are 1-based wherever NSD's are: 10k and 73k ids of design and responses, trial numbers, sessions, runs. Only
``nsdId`` is 0-based, as in NSD.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import scipy.io

from nd_dist.files import canonical_json
from nd_dist.seeds import unit_seed
from shards.phantom.design import BLANK_SLOTS, NUM_REPEATS, PhantomDesign

COCO_SPLITS = ("train2017", "val2017")
RESPONSE_COLUMNS = (
    *("SUBJECT", "SESSION", "RUN", "TRIAL", "73KID", "10KID", "TIME", "ISOLD", "ISCORRECT", "RT", "CHANGEMIND"),
    *("MEMORYRECENT", "MEMORYFIRST", "ISOLDCURRENT", "ISCORRECTCURRENT", "TOTAL1", "TOTAL2", "BUTTON", "MISSINGDATA"),
)
FIRST_DAY = 737_000.0  # MATLAB day number
TRIAL_S = 4.0


def expdesign_bytes(design: PhantomDesign) -> bytes:
    """Return ``nsd_expdesign.mat``: masterordering, subjectim, sharedix (1-based) and stimpattern."""
    num_sessions = len(design.order) // design.trials_per_session
    pattern = np.zeros((num_sessions, len(design.run_trials), max(design.run_trials) + BLANK_SLOTS), dtype=np.uint8)
    for run, count in enumerate(design.run_trials):
        pattern[:, run, 3 : 3 + count] = 1  # NSD's runs begin with three blank slots
    stream = io.BytesIO()
    content = {
        "masterordering": design.order[None].astype(np.float64) + 1,
        "subjectim": design.subject_images.astype(np.float64) + 1,
        "sharedix": design.subject_images[:1, : design.num_shared].astype(np.float64) + 1,
        "stimpattern": pattern,
    }
    scipy.io.savemat(stream, content, do_compression=True)
    return _without_date(stream.getvalue())


def _without_date(content: bytes) -> bytes:
    """Return a MATLAB file whose 116-byte description names no date, so that equal content is equal bytes."""
    return b"MATLAB 5.0 MAT-file, phantom NSD".ljust(116) + content[116:]


def coco_ids(seed: int, num_images: int) -> npt.NDArray[np.int64]:
    """Return a made-up COCO id for every image, (num_images,), all different."""
    rng = np.random.Generator(np.random.PCG64(unit_seed(seed, "coco")))
    return rng.permutation(np.arange(1, 8 * num_images + 1))[:num_images]


def coco_split(image_id: int) -> str:
    """Return the made-up COCO split of an image: every fifth is from the validation set."""
    return COCO_SPLITS[image_id % 5 == 4]


def stim_info_text(design: PhantomDesign, coco: npt.NDArray[np.int64]) -> str:
    """Return ``nsd_stim_info_merged.csv``: COCO id, who saw a picture, and in which (1-based) trials."""
    subjects = range(1, len(design.num_sessions) + 1)
    trials = np.zeros((design.num_images, len(subjects), NUM_REPEATS), dtype=np.int64)
    for subject in subjects:
        seen = np.zeros(design.num_images, dtype=np.int64)
        # the table lists the design of a complete subject, also where sessions are missing (as NSD's does)
        for trial, image_id in enumerate(design.subject_images[subject - 1, design.order]):
            trials[image_id, subject - 1, seen[image_id]] = trial + 1
            seen[image_id] += 1
    shared = set(design.subject_images[0, : design.num_shared].tolist())
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["", "cocoId", "cocoSplit", "cropBox", "loss", "nsdId", "flagged", "BOLD5000", "shared1000"]
        + [f"subject{subject}" for subject in subjects]
        + [f"subject{subject}_rep{repeat}" for subject in subjects for repeat in range(NUM_REPEATS)]
    )
    for image_id in range(design.num_images):
        writer.writerow(
            [image_id, coco[image_id], coco_split(image_id), "(0, 0, 0, 0)", 0.0, image_id, False, False]
            + [image_id in shared]
            + [int(trials[image_id, subject - 1].any()) for subject in subjects]
            + trials[image_id].ravel().tolist()
        )
    return stream.getvalue()


def responses_text(design: PhantomDesign, subject: int) -> str:
    """Return a subject's ``responses.tsv``: what was shown when; of answers none is at hand (NaN, MISSINGDATA 1)."""
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
    writer.writerow(RESPONSE_COLUMNS)
    seen: set[int] = set()
    runs = [(run, trial) for run, count in enumerate(design.run_trials, 1) for trial in range(1, count + 1)]
    for index, image_id in enumerate(design.images(subject).tolist()):
        session, within = divmod(index, design.trials_per_session)
        run, trial = runs[within]
        day = FIRST_DAY + 7 * session + (run * 300 + trial * TRIAL_S) / 86_400
        shown = (subject, session + 1, run, trial, image_id + 1, int(design.order[index]) + 1, f"{day:.6f}")
        answers = ["NaN"] * (len(RESPONSE_COLUMNS) - len(shown) - 2)
        writer.writerow([*shown, int(image_id in seen), *answers, 1])
        seen.add(image_id)
    return stream.getvalue()


def captions_text(
    split: str, image_ids: Iterable[int], captions: Sequence[Sequence[str]], coco: npt.NDArray[np.int64]
) -> str:
    """Return a COCO caption file of one split.

    Args:
        split: ``train2017`` or ``val2017``; only its pictures are written.
        image_ids: Image ids.
        captions: Captions of image ``i`` at position ``i``.
        coco: COCO id of image ``i`` at position ``i``.
    """
    chosen = [image_id for image_id in image_ids if coco_split(image_id) == split]
    images = [{"id": int(coco[i]), "file_name": f"{int(coco[i]):012d}.jpg"} for i in chosen]
    annotations = [
        {"image_id": int(coco[i]), "id": 10 * i + number, "caption": text}
        for i in chosen
        for number, text in enumerate(captions[i])
    ]
    content = {"info": {"description": f"Phantom captions, {split}"}, "licenses": []}
    return canonical_json({**content, "images": images, "annotations": annotations}) + "\n"
