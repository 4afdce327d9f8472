"""How far a long piece of work has come: rows/s, tokens/s and the time left.

A terminal gets a tqdm bar, a log file or a pipe gets a plain line every ten seconds, and `enabled=False`
gets nothing.
"""

import sys
import time
from types import TracebackType

from tqdm import tqdm

__all__ = ["Progress"]

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts rows and tokens of one piece of work and shows them on standard error."""

    def __init__(self, *, total: int, description: str, unit: str = "rows", enabled: bool = True) -> None:
        self._total, self._description, self._unit, self._enabled = total, description, unit, enabled
        self._rows = self._tokens = self._rows_printed = 0
        self._start = self._last_line = time.monotonic()
        self._bar: tqdm | None = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=description, unit=f" {unit}", dynamic_ncols=True, leave=True)

    def advance(self, rows: int = 1, tokens: int = 0) -> None:
        """Count `rows` more as done, made of `tokens` tokens."""
        self._rows += rows
        self._tokens += tokens
        if self._bar is not None:
            if self._tokens:
                self._bar.set_postfix_str(f"{self._per_second(self._tokens):,.0f} tokens/s", refresh=False)
            self._bar.update(rows)
        elif self._enabled and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._print_line()

    def note(self, text: str) -> None:
        """A line of its own, which does not tear the bar apart."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._enabled:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar, or print the last line."""
        if self._bar is not None:
            self._bar.close()
        elif self._enabled and self._rows > self._rows_printed:
            self._print_line()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None or kind is None:
            self.close()

    def _per_second(self, count: int) -> float:
        return count / max(time.monotonic() - self._start, 1e-9)

    def _print_line(self) -> None:
        self._last_line, self._rows_printed = time.monotonic(), self._rows
        rate = self._per_second(self._rows)
        parts = [
            f"{self._description}: {self._rows:,} of {self._total:,} {self._unit}",
            f"{rate:,.1f} {self._unit}/s",
        ]
        if self._tokens:
            parts.append(f"{self._per_second(self._tokens):,.0f} tokens/s")
        left_seconds = (self._total - self._rows) / rate if rate else 0.0
        if left_seconds >= 1:
            parts.append(f"{tqdm.format_interval(left_seconds)} left")
        print(", ".join(parts), file=sys.stderr, flush=True)
