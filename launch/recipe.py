"""Recipes: YAML file + ``key=value`` overrides -> one validated, frozen ``Config``. Reads files, starts nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from nd_dist.config import Config
from nd_dist.config.base import Section
from nd_dist.errors import ConfigError
from nd_dist.files import write_text

RECIPES_DIR = Path(__file__).parent / "recipes"
RETIRED = ("phantom_networks",)
"""Sections that configurations written by earlier versions hold."""
_TIME = re.compile(r"\d+(:\d+)+")
Settings = TypeVar("Settings", bound=Section)


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def recipe_path(recipe: str) -> Path:
    """Return the file of a recipe given by name or path.

    Raises:
        ConfigError: there is no such recipe.
    """
    named = RECIPES_DIR / f"{recipe}.yaml"
    if named.is_file():
        return named
    if Path(recipe).is_file():
        return Path(recipe)
    raise ConfigError(
        "There is no such recipe.",
        where=recipe,
        expected=f"a path of a YAML file, or one of {', '.join(recipe_names())}",
    )


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a recipe with ``key=value`` overrides.

    Raises:
        ConfigError: see ``load_settings``; or there is no such recipe.
    """
    return load_settings(Config, recipe_path(recipe), overrides)


def load_settings(model: type[Settings], path: Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Return the validated settings of a YAML file with ``key=value`` overrides.

    The defaults, the file and the overrides are merged in this order with OmegaConf, so ``${nsd_root}`` and
    ``${oc.env:NSD_ROOT}`` work anywhere; the result is validated once.

    Args:
        model: Class of the settings.
        path: The file; None: the defaults alone.
        overrides: Words of the command line.

    Raises:
        ConfigError: the file is no YAML mapping, an override has no ``=``, a key is unknown, a value out of range.
    """
    where = "the command line" if path is None else str(path)
    if bad := [word for word in overrides if "=" not in word]:
        raise ConfigError("An override is not of the form key=value.", where=" ".join(bad))
    try:
        text = OmegaConf.create(_quoted_times(path.read_text(encoding="utf-8")) if path is not None else "")
        defaults = OmegaConf.create(model().model_dump(mode="json"))
        words = (f"{key}={_quoted_times(value)}" for key, _, value in (w.partition("=") for w in overrides))
        given = OmegaConf.merge(text, OmegaConf.from_dotlist(list(words)))
        merged = OmegaConf.to_container(OmegaConf.merge(defaults, given), resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, OSError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError("A recipe or an override cannot be read.", where=where, found=str(error)) from error
    known = {key: value for key, value in merged.items() if key not in RETIRED} if isinstance(merged, dict) else merged
    return validated(model, known, where)


def _quoted_times(text: str) -> str:
    """Return YAML with times such as 24:00:00 in quotes: YAML 1.1 takes them for numbers to the base of 60."""
    tokens = [token for token in yaml.scan(text) if isinstance(token, yaml.ScalarToken) and token.plain]
    for token in reversed([token for token in tokens if _TIME.fullmatch(token.value)]):
        first, last = token.start_mark.index, token.end_mark.index
        text = f"{text[:first]}'{text[first:last]}'{text[last:]}"
    return text


def validated(model: type[Settings], values: Any, where: str) -> Settings:  # Any: comes from YAML
    """Return plain values as settings.

    Raises:
        ConfigError: names every wrong field with its value, what is allowed, and the nearest key.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_problem(model, detail) for detail in error.errors()]
        raise ConfigError("The configuration is wrong.", where=where, found="\n    ".join(["", *problems])) from error


def _problem(model: type[Section], detail: Mapping[str, Any]) -> str:
    """Return one line for one validation error."""
    key = ".".join(str(part) for part in detail["loc"]) or "(whole configuration)"
    if detail["type"] == "extra_forbidden":
        near = nearest_keys(key, model)
        return f"{key}: unknown key" + (f"; did you mean {' or '.join(near)}?" if near else "")
    message = detail["msg"].removeprefix("Value error, ")
    value = "" if detail["type"] == "value_error" else f" (got {detail['input']!r})"
    return f"{key}: {message}{value}"


def all_keys(model: type[Section] = Config) -> Iterator[str]:
    """Yield every settable key in dotted form, sections included."""
    yield from _dotted(model().model_dump(), "")


def _dotted(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Yield the keys of nested values."""
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")


def nearest_keys(key: str, model: type[Section] = Config) -> list[str]:
    """Return up to three valid keys that look like ``key``: same last word first, then similar spelling."""
    keys = list(all_keys(model))
    last = key.rsplit(".", 1)[-1]
    same_word = [known for known in keys if known.rsplit(".", 1)[-1] == last]
    words = {known.rsplit(".", 1)[-1]: known for known in keys}
    similar_words = [words[word] for word in difflib.get_close_matches(last, words, n=2, cutoff=0.7)]
    similar = difflib.get_close_matches(key, keys, n=2, cutoff=0.7)
    return list(dict.fromkeys(same_word + similar + similar_words))[:3]


def config_yaml(config: Section) -> str:
    """Return settings as YAML that ``load_settings`` reads back to an equal value."""
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def write_config(config: Config) -> Path:
    """Write ``run_dir/config.yaml`` and return its path."""
    path = config.run_dir / "config.yaml"
    write_text(path, config_yaml(config))
    return path
