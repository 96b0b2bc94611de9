"""Keep a thread busy beside this one: fetch the next item ahead, or finish the last piece of work behind."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self, TypeVar

Item = TypeVar("Item")


def ahead(items: Iterable[Item]) -> Generator[Item, None, None]:
    """Yield items; while one is used a thread gets the next one."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, iterator, end)
            yield item  # type: ignore[misc]  # the end alone is no item


class Behind:
    """A thread that finishes one piece of work while the next begins; on leaving all is done or an error raised."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._last: Future[None] | None = None

    def do(self, work: Callable[[], None]) -> None:
        """Start a piece of work once the one before is done, whose error is raised here."""
        self.wait()
        self._last = self._thread.submit(work)

    def wait(self) -> bool:
        """Wait until everything is done, whose error is raised here; return whether there was anything."""
        last, self._last = self._last, None
        if last is not None:
            last.result()
        return last is not None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait until the thread has done everything; an error that is on its way already goes first."""
        self._thread.shutdown()
        if kind is None:
            self.wait()
