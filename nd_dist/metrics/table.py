"""The metrics that are reported: name, order, direction, how a number is written, and the function of a pair's metric.

An entry is all that a metric takes; others' packages add theirs (``nd_dist.plugins``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from nd_dist.metrics.pixel import Picture
from nd_dist.plugins import registered

Kind = Literal["low-level", "high-level", "retrieval", "agreement"]


@dataclass(frozen=True)
class Metric:
    """One reported metric.

    Args:
        name: Key in ``metrics.json``.
        label: The field's name for it, as tables print it.
        kind: Block of the table it stands in.
        higher_is_better: Its direction.
        is_share: Written in per cent (two-way identification, retrieval).
        chance: Value without any information, where there is one.
        explanation: One sentence.
        stands_for: What of the field's table a made-up world has it for; empty for the field's own.
        function: Of a reconstruction and what was seen (``Picture`` both) -> the value; none: judges or sets give it.
        version: To be raised whenever its values become others: pictures are then judged or scored again.
    """

    name: str
    label: str
    kind: Kind
    higher_is_better: bool
    is_share: bool
    chance: float | None
    explanation: str
    stands_for: str = ""
    function: Callable[[Picture, Picture], float] | None = None
    version: int = 1

    @property
    def arrow(self) -> str:
        """Arrow that shows the better direction."""
        return "↑" if self.higher_is_better else "↓"

    def text(self, value: float) -> str:
        """Return a value as the field prints it: 95.4 % for shares, .322 otherwise."""
        text = f"{100 * value:.1f} %" if self.is_share else _without_zero(f"{value:.3f}")
        return text.replace("-", "−")

    @property
    def unit_suffix(self) -> str:
        """What a column's heading adds where the cells hold bare numbers."""
        return ", %" if self.is_share else ""

    def number(self, value: float) -> str:
        """Return a value as ``text`` does, without its unit."""
        return self.text(value).removesuffix(" %")

    def change(self, value: float) -> str:
        """Return a difference with its sign; shares differ in percentage points."""
        text = f"{abs(100 * value):.1f}" if self.is_share else _without_zero(f"{abs(value):.3f}")
        return f"{'−' if value < 0 else '+'}{text}"


def _without_zero(text: str) -> str:
    """Return a decimal number without the zero before its point: -0.12 -> -.12."""
    return re.sub(r"^(-?)0\.", r"\1.", text)


def _two_way(name: str, label: str, network: str = "", stands_for: str = "") -> Metric:
    text = f"Two-way identification on features of {network or label}."
    return Metric(name, label, "high-level", True, True, 0.5, text, stands_for)


def _distance(name: str, label: str, network: str = "", stands_for: str = "") -> Metric:
    text = f"Mean correlation distance of features of {network or label}."
    return Metric(name, label, "high-level", False, False, 1.0, text, stands_for)


def _decoded(target: str, words: str) -> Metric:
    text = f"Correlation of the decoded {words} with the picture's own; both less their mean over the pictures."
    return Metric(f"decoded_{target}", f"r of {target}", "retrieval", True, False, 0.0, text)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "pixcorr",
            "PixCorr",
            "low-level",
            True,
            False,
            0.0,
            "Pearson correlation of the RGB pixels.",
            function=Picture.correlation,
        ),
        Metric(
            "ssim",
            "SSIM",
            "low-level",
            True,
            False,
            None,
            "Structural similarity of the grey pictures.",
            function=Picture.similarity,
        ),
        _two_way("alexnet_2", "AlexNet(2)"),
        _two_way("alexnet_5", "AlexNet(5)"),
        _two_way("inception", "Inception"),
        _two_way("clip", "CLIP"),
        _distance("effnet_b", "EffNet-B"),
        _distance("swav", "SwAV"),
        Metric("lpips", "LPIPS", "high-level", False, False, None, "Learned perceptual distance (AlexNet, v0.1)."),
        Metric("fid", "FID", "high-level", False, False, None, "Frechet distance of the sets; needs many images."),
        Metric("kid", "KID", "high-level", False, False, None, "Kernel distance of the sets, unbiased at any number."),
        _two_way("plain_early", "Plain, early", "a small plain classifier, an early layer", "AlexNet(2)"),
        _two_way("plain_late", "Plain, late", "a small plain classifier, its last layer", "AlexNet(5)"),
        _two_way("residual", "Residual", "a small residual classifier", "Inception"),
        _two_way("mixer", "Mixer", "a small MLP-mixer classifier", "CLIP"),
        _distance("depthwise", "Depthwise", "a small depthwise classifier", "EffNet-B and SwAV"),
        Metric(
            "kind_seen",
            "Kind, seen",
            "retrieval",
            True,
            True,
            None,
            "Is the kind of thing seen in the picture?",
            version=2,
        ),
        Metric("kind", "Kind, decoded", "retrieval", True, True, None, "Is the kind of thing in the decoded caption?"),
        Metric(
            "image_retrieval", "Image retrieval", "retrieval", True, True, None, "Given the brain, find its picture."
        ),
        Metric(
            "brain_retrieval", "Brain retrieval", "retrieval", True, True, None, "Given the picture, find its brain."
        ),
        _decoded("c", "caption's embedding"),
        _decoded("z", "latent"),
        _decoded("g", "guidance layers (mean over them)"),
        Metric(
            "repeat_pixcorr",
            "Repeats: PixCorr",
            "agreement",
            True,
            False,
            None,
            "PixCorr among the repeats of a picture, beside its control.",
        ),
        Metric(
            "repeat_ssim",
            "Repeats: SSIM",
            "agreement",
            True,
            False,
            None,
            "SSIM among the repeats of a picture, beside its control.",
        ),
        *registered("metrics").values(),
    )
}
COMPUTED = {metric.name: metric.function for metric in METRICS.values() if metric.function is not None}
"""Metrics of a pair of pictures."""
FIRST = {"pixcorr": 1, "ssim": 1}  # those that judged pictures have without saying so


def added_metrics() -> dict[str, int]:
    """Return name -> version of the metrics of pairs that are not the first two as they were."""
    versions = {name: METRICS[name].version for name in COMPUTED}
    return {name: version for name, version in versions.items() if FIRST.get(name) != version}


def metric_of(name: str, higher_is_better: bool = True) -> Metric:
    """Return a metric by name; an unknown judge's metric is made from its name and direction.

    Args:
        name: Key in ``metrics.json``.
        higher_is_better: Direction of a metric that the table does not know.
    """
    if name in METRICS:
        return METRICS[name]
    label = name.replace("_", " ")
    return _two_way(name, label) if higher_is_better else _distance(name, label)


def ordered(names: Iterable[str]) -> list[str]:
    """Return metric names in the paper's order: low-level, high-level, retrieval, agreement; unknown ones by name."""
    blocks: tuple[Kind, ...] = ("low-level", "high-level", "retrieval", "agreement")
    known = list(METRICS)

    def place(name: str) -> tuple[int, int, str]:
        return blocks.index(metric_of(name).kind), known.index(name) if name in METRICS else len(known), name

    return sorted(names, key=place)
