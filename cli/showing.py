"""How results look on a terminal: tables, counts of skipped rows, sizes."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["console", "human_bytes", "show_skipped", "table"]

_EXAMPLES_SHOWN = 3


def console() -> "Console":
    """Standard output, at the terminal's width; 80 columns where it is not a terminal."""
    from rich.console import Console

    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=80)


def table(title: str, *columns: str) -> "Table":
    """An empty table in the project's manner."""
    from rich import box
    from rich.table import Table

    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False)
    for column in columns:
        number = column in ("rank", "score", "rows", "tokens", "bytes", "step", "weight", "K")
        view.add_column(column, justify="right" if number else "left", overflow="fold")
    return view


def show_skipped(skipped: Sequence[Any], num_rows: int | None, what: str = "rows") -> None:
    """`skipped 4 of 28 rows` and a table of reasons, each with the first places."""
    if not skipped:
        return
    of = "" if num_rows is None else f" of {num_rows:,}"
    view = table(f"skipped {len(skipped):,}{of} {what}", "reason", "rows", "where")
    for reason, count in Counter(row.reason for row in skipped).most_common():
        places = [row.where for row in skipped if row.reason == reason]
        more = ", …" if count > _EXAMPLES_SHOWN else ""
        view.add_row(reason, f"{count:,}", ", ".join(places[:_EXAMPLES_SHOWN]) + more)
    console().print(view)


def human_bytes(count: float) -> str:
    """1536 → `1.5 kB`; powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def echo_lines(lines: Iterable[str]) -> None:
    """Plain lines on standard output."""
    for line in lines:
        click.echo(line)
