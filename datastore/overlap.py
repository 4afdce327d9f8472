"""Work that nothing has to wait for: reading ahead of the one who uses it, writing behind the one who made it.

Order and results are those of a plain loop; an error comes where the loop would have had it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

__all__ = ["WriteBehind", "read_ahead"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item], *, threads: int = 1) -> Iterator[Result]:
    """`map(read, items)`, with as many of the next results made by threads while one is used."""
    with ThreadPoolExecutor(threads) as readers:
        coming: deque[Future[Result]] = deque()
        try:
            for item in items:
                coming.append(readers.submit(read, item))
                if len(coming) > threads:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            readers.shutdown(cancel_futures=True)


class WriteBehind:
    """Runs one call at a time in a thread; a context manager that ends when the last call has."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._call: Future[Any] | None = None

    def __call__(self, write: Callable[..., Any], *args: Any) -> None:
        """Start `write(*args)` once the call before it has ended; raises what that one raised."""
        self._wait()
        self._call = self._thread.submit(write, *args)

    def _wait(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._thread.shutdown()
        if kind is None:
            self._wait()
