"""The error ladder: every failure that a user can cause or meet, with the exit code of the command.

Messages say what failed, where, expected against found, and what to do next. Errors are caught in two places only:
the command line (-> exit code) and the rank boundary (-> failure file).
"""

from __future__ import annotations


class NdDistError(ValueError):
    """Base of all errors that nd_dist raises on purpose.

    Args:
        what: One sentence, what failed.
        where: File, key, host or sample that it concerns.
        expected: What would have been right.
        found: What was there instead.
        todo: What the user can do next (a command where there is one).
    """

    exit_code = 1

    def __init__(
        self, what: str, *, where: str = "", expected: object = "", found: object = "", todo: str = ""
    ) -> None:
        self.what, self.where, self.todo = what, where, todo
        self.expected, self.found = str(expected), str(found)
        super().__init__(self.render())

    def render(self) -> str:
        """Return the message, one labelled line for each part that is known."""
        parts = [("where", self.where), ("expected", self.expected), ("found", self.found), ("next", self.todo)]
        return "\n".join([self.what, *(f"  {label}: {text}" for label, text in parts if text)])


class ConfigError(NdDistError):
    """A recipe, an override or an option is wrong (field, value, allowed values, nearest key)."""

    exit_code = 2


class DataError(NdDistError):
    """A file of the data set, a shard or an index is missing, damaged or inconsistent."""

    exit_code = 3


class StorageError(DataError):
    """A file could not be written on a rank's host: disk full, quota, read-only. The data is not to blame."""

    exit_code = 4


class WorldError(NdDistError):
    """The launcher's environment contradicts itself, or ranks do not see each other."""

    exit_code = 3


class CheckpointError(NdDistError):
    """A checkpoint or a model folder is missing, torn, or made by another recipe."""

    exit_code = 3


class RankFailure(NdDistError):
    """A rank or a host died, hung or was killed (rank, host, log path, last lines)."""

    exit_code = 4


class Requeue(NdDistError):
    """The run was asked to stop, has saved its state, and wants to be started again."""

    exit_code = 5
