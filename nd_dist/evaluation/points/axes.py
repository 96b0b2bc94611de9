"""The further axes of a sweep: which configuration keys can be one, and the recipe as it is at a point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from nd_dist.config import Config
from nd_dist.errors import ConfigError
from nd_dist.evaluation.points.units import CONTROLS, Point, config_points, grid_settings

SECTIONS = ("sampler.", "frozen.")
KEYS = (
    "seed",
    "model",
    "guidance_model",
    "evaluation.embeddings",
    "evaluation.z_calibration",
    "evaluation.calibrated_by",
    "evaluation.two_repeats",
)
OWN_AXES = {"sampler.kappa": "sweep.kappa", "sampler.eta": "sweep.eta", "evaluation.subjects": "evaluation.subjects"}
DECODING = (
    "seed",
    "evaluation.z_calibration",
    "evaluation.calibrated_by",
    "evaluation.two_repeats",
    "evaluation.embeddings",
)


def config_at(config: Config, point: Point) -> Config:
    """Return the recipe as it is at a point.

    Raises:
        ConfigError: a setting is unknown or out of range.
    """
    settings = dict(point.settings)
    if point.control == "ceiling":
        settings["evaluation.embeddings"] = "ground_truth"
    if not settings:
        return config
    try:
        return config.replaced(settings)
    except (ValidationError, KeyError) as error:
        raise ConfigError(
            "A value of a sweep's axis is not allowed.", where=str(settings), found=str(error).splitlines()[-2:]
        ) from error


def decoding_settings(point: Point) -> Point:
    """Return the part of a point that decides what the decoder predicts: points that share it share predictions."""
    settings = tuple(pair for pair in point.settings if pair[0] in DECODING)
    return Point(0.0, 0.0, settings, "ridge" if point.control == "ridge" else "none")


def check_axes(config: Config) -> None:
    """Refuse axes and points that an evaluation cannot vary, and values that no configuration may have.

    Raises:
        ConfigError: names the key and what to do instead.
    """
    known = config.flat()
    for key in config.sweep.all_axes():
        if key in OWN_AXES:
            raise ConfigError("This axis has a setting of its own.", where=f"sweep.axes: {key}", todo=OWN_AXES[key])
        _check_key(key, f"sweep.axes: {key}", known)
    for settings in grid_settings(config):
        config_at(config, Point(0.0, 0.0, settings))
    for point in config_points(config):
        for key, _ in point.settings:
            _check_key(key, f"evaluation.points: {key}", known)
        if not point.is_plain and point.control not in CONTROLS:
            raise ConfigError(
                "There is no such control.",
                where="evaluation.points",
                expected=", ".join(CONTROLS),
                found=point.control,
            )
        config_at(config, point)


def _check_key(key: str, where: str, known: Mapping[str, Any]) -> None:
    """Refuse a key that does not decide how a trained decoder's pictures are made."""
    if key not in known or not (key in KEYS or key.startswith(SECTIONS)):
        raise ConfigError(
            "An evaluation cannot vary this key: it does not decide how a trained decoder's pictures are made.",
            where=where,
            expected=f"a key of {', '.join(SECTIONS)} or one of {', '.join(KEYS)}",
            todo="train once per value, each in its own run_dir=, evaluate there, and combine them with `nd merge`",
        )
