"""Fetches the shards of a server in the background, in the order in which a stream will first use them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

from nd_dist.errors import NdDistError
from shards.places.store import Store, StoredFile


class Prefetcher:
    """Fetches files until it is closed. An error ends it in silence: whoever reads the file meets the same one.

    Args:
        store: Where the files lie; nothing is done where it is a folder.
        files: What will be needed, in order; walked by the background thread.
    """

    def __init__(self, store: Store, files: Iterable[StoredFile]) -> None:
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None
        if store.is_remote:
            self._thread = threading.Thread(target=self._run, args=(store, files), name="prefetcher", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop after the files under way."""
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, store: Store, files: Iterable[StoredFile]) -> None:
        """Fetch (runs in the background thread)."""
        try:
            for _ in store.prefetch(self._until_closed(files)):
                pass
        except NdDistError:
            return

    def _until_closed(self, files: Iterable[StoredFile]) -> Iterator[StoredFile]:
        """Yield files until ``close`` is called."""
        for file in files:
            if self._is_closed.is_set():
                return
            yield file
