"""Published numbers on NSD: where they stand and how they were computed. Data only; nothing is computed from them.

Few are first-hand: most were read in *another* paper's or site's table ("quoted in"), and the same method is quoted
with different numbers, which is what protocols are for. Check the original paper before you print one.
NeuralDiffuser's own table is not here because its text was not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One row of somebody's table.

    Args:
        method: Name of the method.
        source: Where the row was read.
        protocol: The protocol its authors' code has (see ``protocols``), or what is known of it.
        subjects: Whose brains.
        is_first_hand: Read in the authors' own output rather than quoted by others.
        values: Metric name -> value; shares in 0..1.
        note: What else is known of its values.
    """

    method: str
    source: str
    protocol: str
    subjects: str
    is_first_hand: bool
    values: Mapping[str, float]
    note: str = ""


_COLUMNS = (
    "pixcorr", "ssim", "alexnet_2", "alexnet_5", "inception", "clip", "effnet_b", "swav", "fwd", "bwd", "lpips",
)  # fmt: skip
AUTHORS_DIRECTION = {"fwd": "brain_retrieval", "bwd": "image_retrieval"}
"""What MindEye2's notebook computes under the names that it prints (its text calls "fwd" image retrieval):
``batchwise_cosine_similarity`` returns the transposed matrix, so "fwd" finds the brain response of each picture."""
FOUR_SUBJECTS = "1, 2, 5, 7 (mean)"


def _row(
    method: str, source: str, protocol: str, values: str, subjects: str = FOUR_SUBJECTS, is_first_hand: bool = False
) -> Published:
    """Return a row; ``values`` holds one word per column, ``-`` where the source has none, shares in per cent.

    Retrieval counts only in a first-hand row, whose code says which direction it is; quoted ones are a note.
    """
    words = values.split()
    words += ["-"] * (len(_COLUMNS) - len(words))
    numbers = {name: float(word) for name, word in zip(_COLUMNS, words, strict=True) if word != "-"}
    shares = {name: value / 100 if value > 1 else value for name, value in numbers.items()}
    retrieved = {name: shares.pop(name) for name in AUTHORS_DIRECTION if name in shares}
    if is_first_hand:
        shares |= {AUTHORS_DIRECTION[name]: value for name, value in retrieved.items()}
        retrieved = {}
    note = "".join(f"retrieval {100 * value:.1f} %, direction not known" for value in retrieved.values())
    return Published(method, source, protocol, subjects, is_first_hand, shares, note)


_PRISM = "PRISM's own re-run and protocol"

PUBLISHED: tuple[Published, ...] = (
    _row(
        "MindEye2", "its notebook final_evaluations, executed outputs", "mindeye2, with blurry blend",
        ".3740 .4395 97.91 99.11 96.00 93.69 .6075 .3363 99.96 99.87", "1", is_first_hand=True,
    ),
    _row("MindEye2", "quoted in Brain-IT's table", "mindeye2", ".322 .431 96.1 98.6 95.4 93.0 .619 .344"),
    _row("MindEye2", "quoted by ROITok", "not stated", ".285 .389 96.3 - 95.4 93.0 - - 91.7"),
    _row("MindEye2", "quoted in PRISM's table", _PRISM, ".3160 .4447 - - 93.08 92.01 - - - - .6338"),
    _row("NeuralDiffuser", "re-run quoted in PRISM's table", _PRISM, ".3011 .3348 - - 94.87 94.09 - - - - .6522"),
    _row("MindEye1", "quoted in PRISM's table", _PRISM, ".3114 .3868 - - 91.98 91.21 - - - - .6501"),
    _row("PRISM", "its own table, quoted", _PRISM, ".3404 .4640 - - 95.16 94.67 - - - - .5963"),
    _row("Takagi & Nishimoto", "quoted in MindHier's table", "not stated", ".246 .410 - - 83.8 82.1 .811 .504"),
    _row("MindBridge", "quoted", "mindbridge", ".151 .263 - - 92.4 94.7 .712 .418"),
    _row("MindTuner", "quoted", "not stated", ".322 .421 95.8 98.8 95.6 93.8 .612 .340 98.9"),
    _row("NeuroSwift", "quoted", "not stated", ".335 .437 96.5 - 95.4 97.1"),
    _row("MindHier", "quoted", "not stated, 1000 images", ".235 .381 - - 95.9 96.4 .606 .329"),
    _row("Brain-IT", "quoted", "not stated", ".386 .486 98.4 99.5 97.3 96.4 .564 .320"),
    _row("ROITok (IP-Adapter)", "quoted", "not stated", ".475 .426 97.6 - 94.7 92.9 - - 98.7"),
)  # fmt: skip
