"""Recipes: YAML file + ``key=value`` overrides -> one validated, frozen ``Config``. Reads files, starts nothing."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from launch.keys import did_you_mean, nearest, nearest_keys
from nd_dist.config import Config
from nd_dist.config.base import Section
from nd_dist.config.training import OwnSchedule
from nd_dist.errors import ConfigError

RECIPES_DIR = Path(__file__).parent / "recipes"
RETIRED = ("phantom_networks",)
"""Sections that configurations written by earlier versions hold."""
_TIME = re.compile(r"\d+(:\d+)+")
Settings = TypeVar("Settings", bound=Section)
_UNREADABLE = (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, AttributeError)
"""What OmegaConf raises for text that it cannot read or merge."""


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return shipped_names(RECIPES_DIR)


def shipped_names(folder: Path) -> list[str]:
    """Return the names of the YAML files in a folder of the package."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def recipe_path(recipe: str) -> Path:
    """Return the file of a recipe given by name or path; see ``shipped_path``."""
    return shipped_path(RECIPES_DIR, recipe, "recipe")


def shipped_path(folder: Path, name: str, what: str) -> Path:
    """Return a YAML file given by name, which is in a folder of the package, or by path.

    Args:
        folder: The package's folder.
        name: Name or path.
        what: What the file is, for a message.

    Raises:
        ConfigError: there is none.
    """
    for path in (folder / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    names = shipped_names(folder)
    raise ConfigError(
        f"There is no such {what}.",
        where=name,
        expected=f"a path of a YAML file, or one of {', '.join(names)}",
        todo=nearest(name, names),
    )


def load_recipe(recipe: str, overrides: Sequence[str] = (), command: str = "") -> Config:
    """Return the configuration of a recipe with ``key=value`` overrides.

    Args:
        recipe: A name, or the path of a YAML file.
        overrides: Words of the command line.
        command: What it is for: keys that contradict each other are refused where this command uses them.

    Raises:
        ConfigError: see ``load_settings``; there is no such recipe; or a subject is not among the data's.
    """
    config = load_settings(Config, recipe_path(recipe), overrides, command)
    return for_every_target(config, [word.partition("=")[0] for word in overrides])


def for_every_target(config: Config, keys: Collection[str]) -> Config:
    """Return the configuration where settings that were named hold for every target (``training.per_target``)."""
    general = dict.fromkeys(name for name in OwnSchedule.model_fields if f"training.{name}" in keys)
    own = {name: schedule.model_copy(update=general) for name, schedule in config.training.per_target.items()}
    return config.model_copy(update={"training": config.training.model_copy(update={"per_target": own})})


def takes(recipe: str, word: str) -> bool:
    """Return whether a recipe takes a ``key=value`` as it stands."""
    try:
        load_recipe(recipe, [word], "train")
    except ConfigError:
        return False
    return True


def load_settings(
    model: type[Settings], path: Path | None, overrides: Sequence[str] = (), command: str = ""
) -> Settings:
    """Return the validated settings of a YAML file with ``key=value`` overrides.

    The defaults, the file and the overrides are merged in this order with OmegaConf, so ``${nsd_root}`` and
    ``${oc.env:NSD_ROOT}`` work anywhere; the result is validated once.

    Args:
        model: Class of the settings.
        path: The file; None: the defaults alone.
        overrides: Words of the command line.
        command: See ``load_recipe``.

    Raises:
        ConfigError: the file is no YAML mapping; or it names everything that is wrong: words that are not key=value,
            unknown keys with the nearest ones, values out of range with what is allowed.
    """
    try:
        recipe = OmegaConf.create(_quoted_times(path.read_text(encoding="utf-8")) if path is not None else "")
        base: Any = OmegaConf.merge(model().model_dump(mode="json"), recipe)  # Any: OmegaConf's types are unions
    except (*_UNREADABLE, OSError) as error:
        raise ConfigError("A recipe cannot be read.", where=str(path), found=str(error)) from error
    settings, problems = _attempt(model, base, command, overrides)
    if settings is not None:
        return settings
    blames: list[tuple[_Problem, list[str]]] = []
    for problem in problems:  # the words without which there is none; none where the recipe itself is wrong
        words = [problem.word] if problem.word else list(dict.fromkeys(overrides))
        guilty = (word for word in words if problem not in _attempt(model, base, command, _without(word, words))[1])
        blames.append((problem, words if problem.word else list(guilty)))
    places = {"the command line" if words else str(path or "the defaults") for _, words in blames}
    lines = [problem.line(words) for problem, words in blames]
    raise ConfigError(
        "The configuration is wrong.", where=" and ".join(sorted(places)), found="\n    ".join(["", *lines])
    )


def _quoted_times(text: str) -> str:
    """Return YAML with times such as 24:00:00 in quotes: YAML 1.1 takes them for numbers to the base of 60."""
    tokens = [token for token in yaml.scan(text) if isinstance(token, yaml.ScalarToken) and token.plain]
    for token in reversed([token for token in tokens if _TIME.fullmatch(token.value)]):
        first, last = token.start_mark.index, token.end_mark.index
        text = f"{text[:first]}'{text[first:last]}'{text[last:]}"
    return text


@dataclass(frozen=True)
class _Problem:
    """One thing that is wrong with a configuration.

    Args:
        key: The setting; empty for the configuration as a whole.
        text: What is wrong.
        word: The word of the command line that could not even be read.
    """

    key: str
    text: str
    word: str = ""

    def line(self, words: Sequence[str]) -> str:
        """Return a line for the user, who wrote ``words`` or a file."""
        if not words:
            return f"{self.key or '(whole configuration)'}: {self.text}"
        typed = [f"{word.partition('=')[0]}=..." if "://" in word else word for word in words]  # may hold a password
        is_clear = any(word.startswith(self.key) for word in words)
        return f"{' '.join(typed)}: " + (self.text if is_clear else f"{self.key}: {self.text}")


def _attempt(
    model: type[Settings], base: DictConfig, command: str, words: Sequence[str]
) -> tuple[Settings | None, list[_Problem]]:
    """Return the settings of a recipe with words, or none and everything that is wrong with them."""
    merged = copy.deepcopy(base)
    for word in words:
        key, sign, value = word.partition("=")
        try:
            if not sign:
                raise ValueError("not of the form key=value")
            merged.merge_with_dotlist([f"{key}={_quoted_times(value)}"])
            OmegaConf.select(merged, key)  # follows what its value refers to
        except _UNREADABLE as error:
            others = _attempt(model, base, command, _without(word, words))[1]
            related = [problem for problem in others if problem.key]  # not what only holds between settings
            return None, [_Problem(key, _said_by(error), word), *related]
    try:
        values: Any = OmegaConf.to_container(merged, resolve=True)  # Any: comes from YAML
        known = {key: values[key] for key in values if key not in RETIRED}
        return model.model_validate(known, context={"command": command}), []
    except OmegaConfBaseException as error:
        return None, [_Problem(error.full_key or "", _said_by(error))]
    except ValidationError as error:
        return None, list(_problems(model, error))


def _without(word: str, words: Sequence[str]) -> list[str]:
    """Return the other words."""
    return [other for other in words if other != word]


def _said_by(error: Exception) -> str:
    """Return what an error says, without a library's own place of it."""
    if isinstance(error, yaml.MarkedYAMLError):
        return f"its value is no YAML ({error.problem})"
    return str(error).partition("\n    full_key")[0]


def _problems(model: type[Section], error: ValidationError) -> Iterator[_Problem]:
    """Yield what a validation found, each fault once."""
    details = error.errors()
    for detail in details:
        place = detail["loc"]
        is_echo = detail["type"] == "too_short" and any(
            other["loc"][: len(place)] == place and other is not detail for other in details
        )
        if not is_echo:  # a list whose entries are wrong counts as empty as well
            key = ".".join(map(str, place))
            yield _Problem(key, _explained(model, key, detail))


def _explained(model: type[Section], key: str, detail: ErrorDetails) -> str:
    """Return what is wrong with a setting, and what would be right where that can be guessed."""
    given = detail["input"]
    if detail["type"] == "extra_forbidden":
        return f"unknown key; {did_you_mean(nearest_keys(key, model))}".removesuffix("; ")
    if detail["type"] == "tuple_type" and isinstance(given, str | int | float):
        return f"a list is expected: {key}=[{given}]"
    if detail["type"] == "model_type":
        return f"a section, not a value; `nd config keys {key}.` lists its keys"
    value = "" if detail["type"] == "value_error" else f" (got {given!r})"
    return detail["msg"].removeprefix("Value error, ") + value


def config_yaml(config: Section) -> str:
    """Return settings as YAML that ``load_settings`` reads back to an equal value."""
    return yaml_text(config.model_dump(mode="json"))


def yaml_text(values: Mapping[str, Any]) -> str:  # Any: goes to YAML
    """Return sections of a recipe as YAML, in their order."""
    return str(yaml.dump(values, Dumper=_ListsInLine, sort_keys=False, allow_unicode=True, width=119))


class _ListsInLine(yaml.SafeDumper):
    """Writes a list in one line."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        """Return the node of a list."""
        return super().represent_sequence(tag, sequence, flow_style=True)


def changed_settings(config: Config) -> dict[str, Any]:  # Any: goes to YAML
    """Return the settings that differ from the defaults, as the sections of a recipe."""
    plain = Config().flat()
    follows_nsd_root = load_settings(Config, None, [f"nsd_root={config.nsd_root}"]).flat()
    found: dict[str, Any] = {}
    for key, value in config.flat().items():
        is_reference = "${" in str(plain[key])
        if value != plain[key] and not (is_reference and value == follows_nsd_root[key]):
            section, _, name = key.rpartition(".")
            (found.setdefault(section, {}) if section else found)[name] = value
    return found


def config_path(config: Config) -> Path:
    """Return where a run keeps its recipe: ``run_dir/config.yaml``."""
    return config.run_dir / "config.yaml"
