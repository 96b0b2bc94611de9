"""`nd config`: what can be set, and what a recipe sets."""

from __future__ import annotations

import json
from collections.abc import Sequence

from launch.console import aligned, make_console
from launch.keys import called_elsewhere, did_you_mean, nearest_keys, settings_of
from launch.recipe import changed_settings, config_yaml, load_recipe, recipe_names, recipe_path, yaml_text
from nd_dist.config import Config
from nd_dist.errors import ConfigError


def print_settings(word: str) -> None:
    """Print the settings that have a word in their key or meaning; all of them for an empty word.

    Raises:
        ConfigError: there is none.
    """
    wanted = word.lower()
    also = called_elsewhere(wanted)
    found = [each for each in settings_of() if wanted in f"{each.key} {each.meaning}".lower() or each.key in also]
    if not found:
        raise ConfigError("No setting has this word.", found=word, todo=did_you_mean(nearest_keys(word)))
    make_console().print(aligned([(each.key, f"{each.default} ({each.kind}): {each.meaning}") for each in found]))


def print_config(recipe: str, overrides: Sequence[str], is_diff: bool) -> None:
    """Print the configuration of a recipe as YAML, all of it or what differs from the defaults."""
    config = load_recipe(recipe, overrides)
    make_console().print(yaml_text(changed_settings(config)) if is_diff else config_yaml(config), end="")


def print_recipes() -> None:
    """Print name, file and first comment of the recipes that come with the package."""
    paths = {name: recipe_path(name) for name in recipe_names()}
    first_lines = {name: path.read_text(encoding="utf-8").partition("\n")[0] for name, path in paths.items()}
    make_console().print(aligned([(name, first_lines[name].lstrip("# "), str(paths[name])) for name in paths]))


def print_schema() -> None:
    """Print the JSON schema of a recipe."""
    make_console().print(json.dumps(Config.model_json_schema(), indent=1))
