"""Work that a device need not wait for: reading ahead of it and writing behind it, each in one thread.

Order and results are those of a plain loop; an error comes where the loop would have had it.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

__all__ = ["WriteBehind", "read_ahead"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(items: Iterable[Item], read: Callable[[Item], Result]) -> Iterator[tuple[Item, Result]]:
    """Each item with `read` of it; the next one is read while the caller is busy with this one."""
    with ThreadPoolExecutor(1) as thread:
        ahead: tuple[Item, Future[Result]] | None = None
        try:
            for item in items:
                before, ahead = ahead, (item, thread.submit(read, item))
                if before is not None:
                    yield before[0], before[1].result()
            if ahead is not None:
                yield ahead[0], ahead[1].result()
        finally:
            thread.shutdown(cancel_futures=True)


class WriteBehind:
    """Runs one call at a time in a thread; a context manager that ends when the last call has."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._call: Future[Any] | None = None

    def __call__(self, write: Callable[..., Any], *args: Any) -> None:
        """Start `write(*args)` once the call before it has ended; raises what that one raised."""
        self.wait()
        self._call = self._thread.submit(write, *args)

    def wait(self) -> None:
        """Until the call that runs has ended; raises what it raised."""
        call, self._call = self._call, None
        if call is not None:
            call.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()
