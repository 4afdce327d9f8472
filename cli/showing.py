"""How results look on a terminal: tables, counts of skipped rows, sizes, text from data files."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["console", "human_bytes", "one_line", "show_numbers", "show_skipped", "show_table", "table", "visible"]

_EXAMPLES_SHOWN = 3
_NUMBERS = ("rank", "rows", "score", "step", "weight")


def console() -> "Console":
    """Standard output, at the terminal's width; 80 columns where it is not a terminal. Text is never mark-up."""
    from rich.console import Console

    def make(width: int | None) -> Console:
        return Console(highlight=False, markup=False, emoji=False, width=width)

    plain = make(None)
    return plain if plain.is_terminal else make(80)


def table(title: str, *columns: str) -> "Table":
    """An empty table in the project's manner."""
    from rich import box
    from rich.table import Table

    view = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    for column in columns:
        view.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold")
    return view


def show_table(view: "Table") -> None:
    """Print a table without the spaces that would fill its lines."""
    out = console()
    with out.capture() as capture:
        out.print(view)
    for line in capture.get().splitlines():
        click.echo(line.rstrip())


def show_numbers(view: "Table") -> None:
    """Print a table whose columns but the first are numbers, and an empty line."""
    for column in view.columns[1:]:
        column.justify = "right"
    show_table(view)
    click.echo()


def show_skipped(skipped: Sequence[Any], num_rows: int | None, what: str = "rows", *, num_set_aside: int = 0) -> None:
    """`skipped 4 of 28 rows:` and a table of reasons, each with the first places; rows set aside are only counted."""
    of = "" if num_rows is None else f" of {num_rows:,}"
    if num_set_aside:
        click.echo(f"{num_set_aside:,}{of} {what} set aside by the prefilter\n")
    if not skipped:
        return
    view = table(f"skipped {len(skipped):,}{of} {what}:", "reason", "rows", "where")
    for reason, count in Counter(row.reason for row in skipped).most_common():
        places = [row.where for row in skipped if row.reason == reason]
        more = ", …" if count > _EXAMPLES_SHOWN else ""
        view.add_row(reason, f"{count:,}", visible(", ".join(places[:_EXAMPLES_SHOWN]) + more))
    show_table(view)
    click.echo()


def visible(text: str) -> str:
    """Text from a file, without what would command a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def one_line(text: str, width: int) -> str:
    """The beginning of a text, as one line of at most `width` characters."""
    flat = " ".join(visible(text).split())
    return flat if len(flat) <= width else f"{flat[: width - 1]}…"


def human_bytes(count: float) -> str:
    """1536 → `1.5 kB`; powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
