"""Opens the place that a location names: a folder, or a server through the cache of this node."""

from __future__ import annotations

from pathlib import Path

from nd_dist.config import RemoteConfig
from nd_dist.errors import ConfigError
from nd_dist.location import parse_location
from shards.places.store import FolderStore, Store


def open_store(location: Path | str, remote: RemoteConfig | None = None) -> Store:
    """Return the store at a location.

    Args:
        location: A folder, or a URL (see ``nd_dist.location.parse_location``).
        remote: Cache and server settings (default: those of ``RemoteConfig``); not looked at for a folder.

    Raises:
        ConfigError: this is neither a folder nor a URL, or a package that its protocol needs is not installed.
        DataError: the cache folder cannot be used.
    """
    try:
        location = parse_location(location)
    except ValueError as error:
        raise ConfigError("This is neither a folder nor a URL of shards.", found=str(error)) from None
    if isinstance(location, Path):
        return FolderStore(location)
    from shards.places.remote import RemoteStore  # imports the protocols' packages

    return RemoteStore.connect(location, remote or RemoteConfig())
