"""The commands `nd config ...`. Parses words and calls ``launch.commands.config``."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from launch.options import Overrides, Recipe, command_of

config_app = typer.Typer(no_args_is_help=True, help="Look at settings and recipes: keys, show, recipes, schema.")
_command = partial(command_of, config_app)


@_command("nd config keys", "nd config keys batch")
def keys(word: Annotated[str, typer.Argument(help="Only settings with this word in key or meaning.")] = "") -> None:
    """List settings: key, type, default, meaning with its unit."""
    from launch.commands.config import print_settings

    print_settings(word)


@_command("nd config show paper training.dtype=bfloat16 --diff")
def show(
    recipe: Recipe,
    overrides: Overrides = None,
    diff: Annotated[bool, typer.Option("--diff", help="Only what differs from the defaults.")] = False,
) -> None:
    """Print the configuration of a recipe with overrides, checked and resolved; the output is a recipe too."""
    from launch.commands.config import print_config

    print_config(recipe, overrides or [], diff)


@_command("nd config recipes")
def recipes() -> None:
    """List the recipes that come with nd_dist."""
    from launch.commands.config import print_recipes

    print_recipes()


@_command("nd config schema > nd.schema.json")
def schema() -> None:
    """Print the JSON schema of a recipe, with which an editor completes and checks YAML files."""
    from launch.commands.config import print_schema

    print_schema()
