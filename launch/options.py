"""Arguments and options that several commands of `nd` share, each said once, and what a shell completes them with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from launch.plans.choose import LaunchOptions

Command = TypeVar("Command", bound=Callable[..., None])
_RECIPES_DIR = Path(__file__).parent / "recipes"


def recipes_like(incomplete: str) -> list[str]:
    """Return the names of recipes that begin with a text; a shell offers files where there are none."""
    return sorted(path.stem for path in _RECIPES_DIR.glob("*.yaml") if path.stem.startswith(incomplete))


def settings_like(incomplete: str) -> list[tuple[str, str]]:
    """Return ``key=`` and meaning of the settings whose key begins with a text."""
    from launch.keys import settings_of

    return [(f"{each.key}=", each.meaning) for each in settings_of() if each.key.startswith(incomplete)]


def commands_like(incomplete: str) -> list[str]:
    """Return the commands that can be submitted and begin with a text."""
    from launch.plans.sbatch import SUBMITTED

    return [name for name in SUBMITTED if name.startswith(incomplete)]


Recipe = Annotated[
    str,
    typer.Argument(
        help="Recipe: a name (`nd config recipes`) or the path of a YAML file.", autocompletion=recipes_like
    ),
]
RecipeOption = Annotated[str, typer.Option("--recipe", help="Recipe to use.", autocompletion=recipes_like)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="key=value overrides (`nd config keys`), e.g. sampler.kappa=1e5.", autocompletion=settings_like
    ),
]
Ranks = Annotated[int | None, typer.Option("--ranks", min=1, help="Number of ranks (default: one per GPU, or one).")]
Hostfile = Annotated[
    Path | None, typer.Option("--hostfile", help="File of hosts, one per line: `NAME slots=N` or `NAME:N`.")
]
LauncherName = Annotated[
    str,
    typer.Option(
        "--launcher",
        help="auto, local or srun; for train also deepspeed-pdsh, deepspeed-openmpi, for the others mpirun.",
    ),
]
Include = Annotated[
    str, typer.Option("--include", help="Only these hosts and slots: NAME or NAME:SLOT,SLOT, joined by @.")
]
Exclude = Annotated[str, typer.Option("--exclude", help="Leave out these hosts and slots (same format).")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print non-default settings, hosts, the exact command, and whether it would start."
    ),
]
AllTargets = Annotated[
    bool, typer.Option("--all-targets", help="Train all targets as a grid (heads=single: one network each).")
]
Subjects = Annotated[str, typer.Option("--subjects", help="Train a grid over these target subjects, e.g. 1,2,5,7.")]
Submitted = Annotated[
    str,
    typer.Argument(
        help="pack, train, evaluate or sweep; several, joined by commas, run one after another.",
        autocompletion=commands_like,
    ),
]
RunDir = Annotated[Path, typer.Argument(help="Folder of a run.")]


@dataclass(frozen=True)
class LaunchWords:
    """What every launching command is given; see ``launching``."""

    recipe: Recipe
    overrides: Overrides = None
    ranks: Ranks = None
    hostfile: Hostfile = None
    launcher: LauncherName = "auto"
    include: Include = ""
    exclude: Exclude = ""
    dry_run: DryRun = False

    @property
    def options(self) -> LaunchOptions:
        """What says where and how ranks start."""
        from launch.plans.choose import LaunchOptions

        return LaunchOptions(self.ranks, self.hostfile, self.launcher, self.include, self.exclude)

    def launch(self, command: str, *more: str) -> None:
        """Start a launching command, or show what it would start.

        Args:
            command: ``pack``, ``train``, ``evaluate``, ``sweep``, ``estimate``.
            more: Further overrides.
        """
        from launch.commands.dry_run import dry_run_command
        from launch.commands.launching import launch_command
        from launch.recipe import load_recipe

        config = load_recipe(self.recipe, [*(self.overrides or []), *more], command)
        (dry_run_command if self.dry_run else launch_command)(command, config, self.options)


def launching(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command whose first argument, ``words``, is filled from the fields of ``LaunchWords`` by typer."""
    shared = inspect.signature(LaunchWords, eval_str=True).parameters.values()
    _, *own = inspect.signature(command, eval_str=True).parameters.values()

    def filled(**values: Any) -> None:  # Any: whatever typer parsed
        given = {each.name: values.pop(each.name) for each in own}
        command(LaunchWords(**values), **given)

    filled.__name__, filled.__doc__ = command.__name__, command.__doc__
    filled.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
    filled.__annotations__ = {}
    return filled


def command_of(app: typer.Typer, *examples: str) -> Callable[[Command], Command]:
    """Return what makes a function a command of a program, whose help ends with examples."""
    return app.command(epilog="\n\n".join(["Examples:" if len(examples) > 1 else "Example:", *examples]))
