"""The boundary of a program: the other place (beside the rank boundary) where errors are caught."""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Callable


def guarded(program: Callable[[], object]) -> None:
    """Run a program; its errors become messages and exit codes."""
    from nd_dist.errors import NdDistError

    try:
        program()
    except NdDistError as error:
        _complain(type(error).__name__, str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _complain("Interrupted", "Stopped; run the same command again to resume.")
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - the last line of defence: a bug is reported, with its traceback on disk
        _complain("Unexpected error", f"{type(error).__name__}: {error}\n  traceback: {_write_traceback()}")
        sys.exit(1)


def _write_traceback() -> str:
    """Write the traceback of the current exception to a new file and return its path."""
    with tempfile.NamedTemporaryFile("w", prefix="nd-traceback-", suffix=".txt", delete=False) as stream:
        traceback.print_exc(file=stream)
    return stream.name


def _complain(title: str, message: str) -> None:
    """Write an error to the terminal's standard error."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True)
    console.print(Text(f"{title}: ", style="bold red") + Text(message))
