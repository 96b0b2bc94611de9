"""The commands `nd config ...`. Parses words and calls ``launch.commands.config``."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from launch.options import Overrides, Recipe, command_of

config_app = typer.Typer(no_args_is_help=True, help="Inspect settings and recipes: keys, show, recipes, schema.")
_command = partial(command_of, config_app)


@_command("nd config keys", "nd config keys batch")
def keys(
    word: Annotated[str, typer.Argument(help="Only settings whose key or description contains this word.")] = "",
) -> None:
    """List all settings with key, type, default and description."""
    from launch.commands.config import print_settings

    print_settings(word)


@_command("nd config show paper training.dtype=bfloat16 --diff")
def show(
    recipe: Recipe,
    overrides: Overrides = None,
    diff: Annotated[bool, typer.Option("--diff", help="Show only what differs from the defaults.")] = False,
) -> None:
    """Print the resolved and validated configuration of a recipe; the output is itself a valid recipe."""
    from launch.commands.config import print_config

    print_config(recipe, overrides or [], diff)


@_command("nd config recipes")
def recipes() -> None:
    """List the recipes that come with nd_dist."""
    from launch.commands.config import print_recipes

    print_recipes()


@_command("nd config schema > nd.schema.json")
def schema() -> None:
    """Print the JSON schema of a recipe, for completion and validation in editors."""
    from launch.commands.config import print_schema

    print_schema()
