"""What an evaluation consists of: guidance points, and the bundles of images that ranks claim. Pure values.

Who does what is decided elsewhere (``leases``); nothing here knows of ranks, so composition never depends on them.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nd_dist.config import Config, Scalar, Value
from nd_dist.files import canonical_json, hash_json

UNGUIDED = "unguided"
ORIGINAL = "original"
MAX_NAME = 120
OF_POINT = ("sampler.kappa", "sampler.eta", "control")  # what a point says by fields of its own
SEED = "seed"  # the axis that repeats an experiment: averaged over, not chosen from

Control = Literal["none", "shuffled", "nearest", "ridge", "ceiling"]
CONTROLS: dict[Control, str] = {
    "shuffled": "decoder inputs shuffled across images",
    "nearest": "nearest training image as the reconstruction",
    "ridge": "a ridge regression as the decoder",
    "ceiling": "ground-truth embeddings",
}


@dataclass(frozen=True)
class Point:
    """One way to reconstruct: a guidance setting, further settings that differ from the recipe's, or a control.

    Args:
        kappa: Guidance scale; 0 is without guidance.
        eta: Guided share of the denoising steps; 0 is without guidance.
        settings: Other configuration keys with values of their own, by key: the further axes of a sweep.
        control: ``none``, or which control it is (``CONTROLS``).
    """

    kappa: float
    eta: float
    settings: tuple[tuple[str, Value], ...] = ()
    control: Control = "none"

    @property
    def is_guided(self) -> bool:
        """Whether any step is guided."""
        return self.kappa > 0 and self.eta > 0 and self.control != "nearest"

    @property
    def is_plain(self) -> bool:
        """Whether it is no control."""
        return self.control == "none"

    @property
    def has_own_decoding(self) -> bool:
        """Whether what it is made from was decoded from the image's own voxels, and retrieval says something of it."""
        return self.control in ("none", "ridge")

    @property
    def seed(self) -> Value:
        """Its own seed; empty where it has the recipe's."""
        return dict(self.settings).get(SEED, "")

    @property
    def is_seed_mean(self) -> bool:
        """Whether it stands for a mean over seeds rather than for one."""
        return isinstance(self.seed, str) and bool(self.seed)

    @property
    def without_seed(self) -> Point:
        """The point apart from its seed."""
        return dataclasses.replace(self, settings=tuple(pair for pair in self.settings if pair[0] != SEED))

    def with_seed(self, seed: Value) -> Point:
        """Return the point with another seed, or with words for a mean over seeds."""
        return dataclasses.replace(self, settings=tuple(sorted([*self.without_seed.settings, (SEED, seed)])))

    @property
    def name(self) -> str:
        """Folder name; points without guidance share one, because they make the same pictures."""
        guidance = f"kappa-{self.kappa:g}_eta-{self.eta:g}" if self.is_guided else UNGUIDED
        words = [] if self.control == "nearest" else [guidance]
        words += [f"{key.rsplit('.', 1)[-1]}-{_file_word(value)}" for key, value in self.settings]
        words += [] if self.control == "none" else [f"control-{self.control}"]
        name = "_".join(words)
        return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}-{hash_json([name])[:8]}"

    @property
    def family(self) -> str:
        """Name of the points that share a trajectory: those of equal kappa and settings, whatever their eta."""
        return dataclasses.replace(self, eta=1.0).name if self.is_guided else self.name

    @property
    def order(self) -> tuple[str, int, str, float, float]:
        """What points are sorted by: controls last, then settings (the recipe's own first), kappa, eta."""
        control = "" if self.control == "none" else self.control
        return control, len(self.settings), canonical_json(self.settings), self.kappa, self.eta

    def describe(self) -> dict[str, Any]:
        """Return the point as JSON: kappa, eta, and what else sets it apart."""
        facts: dict[str, Any] = {"kappa": self.kappa, "eta": self.eta}
        if self.settings:
            facts["settings"] = dict(self.settings)
        if self.control != "none":
            facts["control"] = self.control
        return facts

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Point:
        """Return the point that ``describe`` described (further keys are ignored)."""
        settings = tuple(sorted((key, _hashable(value)) for key, value in entry.get("settings", {}).items()))
        return cls(float(entry["kappa"]), float(entry["eta"]), settings, entry.get("control", "none"))


def _hashable(value: Any) -> Any:  # Any: a setting's value as JSON has it
    """Return a value of JSON as settings of points hold it."""
    return tuple(value) if isinstance(value, list) else value


def _file_word(value: Value) -> str:
    """Return a setting's value as a part of a file name."""
    text = f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]", "-", text)


@dataclass(frozen=True)
class Bundle:
    """What one rank claims at a time: some images of a subject, all their repeats, at the points of one family.

    Args:
        points: Points that share a trajectory (``Point.family``), ascending eta.
        subject: Whose brain.
        index: Position among the bundles of (family, subject).
        image_ids: Images in this bundle, ascending.
    """

    points: tuple[Point, ...]
    subject: int
    index: int
    image_ids: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the bundle's lease."""
        return f"{self.points[0].family}_{subject_name(self.subject)}_{self.index:05d}"


def subject_name(subject: int) -> str:
    """Return the folder name of a subject: 1 -> ``subj01``."""
    return f"subj{subject:02d}"


def image_name(image_id: int) -> str:
    """Return the folder name of an image: 12 -> ``image-00012``."""
    return f"image-{image_id:05d}"


def sheet_name(index: int) -> str:
    """Return the folder name of some images that are judged together."""
    return f"images-{index:05d}"


def recipe_point(config: Config) -> Point:
    """Return the recipe's own guidance point."""
    return Point(config.sampler.kappa, config.sampler.eta)


def config_points(config: Config) -> tuple[Point, ...]:
    """Return the points of `nd evaluate`: those that are listed, or the recipe's and the same without guidance."""
    if config.evaluation.points:
        return distinct_points(listed_point(config, words) for words in config.evaluation.points)
    guided = recipe_point(config)
    without = Point(0.0, 0.0)
    return (without, guided) if config.evaluation.baseline and guided.is_guided else (guided,)


def listed_point(config: Config, words: Mapping[str, Any]) -> Point:
    """Return the point of settings in which it differs from the recipe."""
    plain = config.flat()
    kappa, eta = (float(words.get(key, plain[key])) for key in ("sampler.kappa", "sampler.eta"))
    own = [(key, value) for key, value in words.items() if _hashable(plain.get(key)) != value]
    settings = tuple(sorted((key, value) for key, value in own if key not in OF_POINT))
    point = Point(kappa, eta, settings, words.get("control", "none"))
    return point if point.is_guided else dataclasses.replace(point, kappa=0.0, eta=0.0)


def control_points(config: Config) -> tuple[Point, ...]:
    """Return the controls of a recipe, at its guidance point; none where they are off."""
    if not config.evaluation.controls:
        return ()
    guided = recipe_point(config)
    ceiling = config.evaluation.embeddings == "decoded"  # otherwise the evaluation itself is the ceiling
    points = [dataclasses.replace(guided, control="shuffled"), Point(0.0, 0.0, control="nearest")]
    return (*points, dataclasses.replace(guided, control="ceiling")) if ceiling else (*points,)


def grid_points(config: Config) -> tuple[Point, ...]:
    """Return the points of `nd sweep`: every combination of its axes, each first without guidance where asked for."""
    points = []
    for settings in grid_settings(config):
        grid = [Point(kappa, eta, settings) for kappa in config.sweep.kappa for eta in config.sweep.eta]
        has_unguided = any(not point.is_guided for point in grid)
        points += [Point(0.0, 0.0, settings)] if config.evaluation.baseline and not has_unguided else []
        points += grid
    return tuple(dict.fromkeys(points))


def grid_settings(config: Config) -> list[tuple[tuple[str, Scalar], ...]]:
    """Return the combinations of a sweep's axes other than kappa and eta; the recipe's own values are left out."""
    own = config.flat()
    axes = [[(key, value) for value in values] for key, values in sorted(config.sweep.all_axes().items())]
    combinations = [tuple(pair for pair in pairs if own.get(pair[0]) != pair[1]) for pairs in itertools.product(*axes)]
    return list(dict.fromkeys(combinations))


def distinct_points(points: Iterable[Point]) -> tuple[Point, ...]:
    """Return points that make different pictures, in order: all points without guidance count as one."""
    return tuple({point.name: point for point in reversed(list(points))}.values())[::-1]


def plan_bundles(points: Iterable[Point], images: Mapping[int, Sequence[int]], batch_size: int) -> list[Bundle]:
    """Return every bundle of an evaluation, in a fixed order.

    Args:
        points: Points to reconstruct at.
        images: Subject -> image ids.
        batch_size: Images in a bundle.
    """
    families: dict[str, list[Point]] = {}
    for point in distinct_points(points):
        families.setdefault(point.family, []).append(point)
    bundles = []
    for family in families.values():
        members = tuple(sorted(family, key=lambda point: point.eta))
        for subject in sorted(images):
            ids = sorted(images[subject])
            for index, start in enumerate(range(0, len(ids), batch_size)):
                bundles.append(Bundle(members, subject, index, tuple(ids[start : start + batch_size])))
    return bundles
