"""`gradsift datastore`: the life of a store after it is built."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.libraries import hush_libraries
from cli.options import output_options
from cli.showing import human_bytes, one_line, visible

if TYPE_CHECKING:
    from datastore.deletion import DeletionReport, Watch

__all__ = ["datastore_group"]

_WIDTH = 80
_SHOWN = 10
_LABEL_WIDTH = 40
_KEY = re.compile(r"(\d{1,9}):(\d{1,18})", re.ASCII)


class RowKey(click.ParamType):
    """`SOURCE:NUMBER`, as a pair."""

    name = "row"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Split and convert."""
        if not isinstance(value, str):
            return value
        if not (key := _KEY.fullmatch(value)):
            self.fail(f"{value!r} is not SOURCE:NUMBER, numbers from 0, such as 0:17", param, ctx)
        return int(key[1]), int(key[2])


@click.group("datastore", short_help="Delete rows of a store; merge, split, shrink stores.")
def datastore_group() -> None:
    """What can be done with a store that is built; `gradsift inspect` shows what is in it.

    Every command can be killed and run again. Readers of a store never see a half-changed one.
    """


def _row_options(command: Any) -> Any:
    for option in (
        click.option("--row", "rows", multiple=True, type=RowKey(), metavar="SOURCE:NUMBER",
                     help="By number of the source and of the row in it, from 0; may be repeated."),
        click.option("--ids", "ids_file", metavar="FILE", help="By the ids in a file, one a line."),
        click.option("--id", "ids", multiple=True, metavar="ID", help="By id; may be repeated."),
    ):  # fmt: skip
        command = option(command)
    return command


@datastore_group.command("delete", short_help="Delete rows from a store and all made from it.")
@click.argument("datastore", metavar="DS")
@_row_options
@click.option("--ignore-missing", is_flag=True, help="Pass over ids and rows that the store does not have.")
@click.option("--dry-run", is_flag=True, help="Show what would be deleted, and change nothing.")
@click.option("--verify-deleted", is_flag=True, help="Then search for the rows, as `verify-deleted` does.")
@output_options
def delete_command(
    datastore: str,
    rows: Sequence[tuple[int, int]],
    ids: Sequence[str],
    ids_file: str | None,
    ignore_missing: bool,
    dry_run: bool,
    verify_deleted: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Delete rows from the shards of DS and of the embeddings in DS.rds; index, scores and prefilter are removed.

    An id that several rows carry deletes all of them. Rows of a range with a deleted row are copied, none is computed
    again. The pool's own file is left as it is: where the row has to go from there too, see `compact`.

    \b
    gradsift datastore delete store --id pool:17 --verify-deleted
    """
    from datastore import Datastore
    from datastore.deletion import delete_rows, find_rows

    labels = [*ids, *_lines_of(ids_file)]
    if not labels and not rows:
        raise click.UsageError("no row is named; give --id, --ids or --row")
    found = find_rows(Datastore.open(datastore), labels, list(rows), ignore_missing=ignore_missing)
    keys = sorted({*found.rows, *found.deleted})
    if not quiet:
        for label, count in list(found.repeated.items())[:_SHOWN]:
            click.echo(f"note: {count:,} rows have the id {one_line(label, _LABEL_WIDTH)}")
        for label in found.unknown[:_SHOWN]:
            click.echo(f"note: no row {one_line(label, _LABEL_WIDTH)}")
        if found.deleted:
            click.echo(f"note: {_count(len(found.deleted), 'row')} deleted already")
        if dry_run:
            for (source, row), label in list(found.rows.items())[:_SHOWN]:
                click.echo(f"  {source}:{row}  {one_line(label, _LABEL_WIDTH)}")
            if (left := len(found.rows) - _SHOWN) > 0:
                click.echo(f"  … {left:,} more")
            click.echo(f"{_count(len(found.rows), 'row')} would be deleted from {datastore}")
    if dry_run:
        return
    with _watch("delete", quiet) as watch:
        manifest = delete_rows(datastore, keys, watch=watch)
    if not quiet:
        click.echo(f"{_count(len(found.rows), 'row')} deleted from {datastore}; {manifest.num_rows:,} scored rows left")
    if verify_deleted:
        gone = [label for label in labels if label not in found.unknown]
        _verify(datastore, keys, gone, quiet)


@datastore_group.command("verify-deleted", short_help="Search a store for rows that are deleted.")
@click.argument("datastore", metavar="DS")
@_row_options
@output_options
def verify_deleted_command(
    datastore: str,
    rows: Sequence[tuple[int, int]],
    ids: Sequence[str],
    ids_file: str | None,
    quiet: bool,
    debug: bool,
) -> None:
    """Look for deleted rows in every file of DS and of what lies beside it; exit with 1 if one has them still.

    Without options, for all rows that were deleted. An id is searched for among all labels: a deleted row has none.

    \b
    gradsift datastore verify-deleted store --row 0:17
    """
    labels = [*ids, *_lines_of(ids_file)]
    _verify(datastore, list(rows) or ([] if labels else None), labels, quiet)


def _verify(datastore: str, rows: Sequence[tuple[int, int]] | None, labels: Sequence[str], quiet: bool) -> None:
    from datastore.deletion import verify_deleted

    with _watch("verify", quiet) as watch:
        report = verify_deleted(datastore, rows, labels, watch=watch)
    if not quiet:
        _show_report(report)
    if report.problems:
        click.echo(f"error: {_count(len(report.problems), 'file')} may have deleted rows still", err=True)
        click.get_current_context().exit(1)


def _show_report(report: "DeletionReport") -> None:
    import textwrap

    def show(line: str) -> None:
        click.echo(textwrap.fill(visible(line), _WIDTH, subsequent_indent="  ", break_on_hyphens=False))

    what = [_count(len(report.rows), "row")] if report.rows or not report.labels else []
    what += [_count(len(report.labels), "id")] if report.labels else []
    show(f"searched for {' and '.join(what)} in {', '.join(f'{n:,} {name}' for name, n in report.looked_at.items())}")
    for path, problem in list(report.problems.items())[:_SHOWN]:
        show(f"{path}: {problem}")
    if (left := len(report.problems) - _SHOWN) > 0:
        click.echo(f"… {left:,} more")
    if not report.problems:
        click.echo("none is left")
    show(f"not looked at: {'; '.join(report.cannot_see)}")


@datastore_group.command("compact", short_help="A store in which deleted rows left no trace.")
@click.argument("datastore", metavar="DS")
@click.argument("output", metavar="OUT")
@click.option(
    "--data",
    multiple=True,
    metavar="FILE",
    help="For each source that lost rows, in order: the same file without them.",
)
@click.option("--tokenizer", metavar="M", help="Tokenizer, where it has moved since the build.")
@click.option("--trust-remote-code", is_flag=True, help="Let Python code that comes with the tokenizer run.")
@output_options
def compact_command(datastore: str, output: str, data: Sequence[str], quiet: bool, debug: bool, **options: Any) -> None:
    """Write to OUT what DS has but for its deleted rows, renumbered as in the edited pool.

    The files given are compared with DS, token by token, by the digests in it. A source that lost every row is left
    out; where no source lost only some, no --data is needed. Nothing is computed again.

    \b
    gradsift datastore compact store smaller --data edited.jsonl
    """
    hush_libraries(quiet)
    from less.compaction import compact

    with _watch("compact", quiet) as watch:
        compact(datastore=datastore, output=output, data=list(data) or None, watch=watch, progress=not quiet, **options)
    _show_store(output, quiet)


@datastore_group.command("merge", short_help="One store out of several of the same settings.")
@click.argument("output", metavar="OUT")
@click.argument("datastores", nargs=-1, required=True, metavar="DS...")
@output_options
def merge_command(output: str, datastores: Sequence[str], quiet: bool, debug: bool) -> None:
    """Write to OUT the sources of several stores, in their order. More --data can be built into it afterwards.

    \b
    gradsift datastore merge all store-1 store-2
    """
    from datastore import Datastore
    from datastore.derive import merge_stores

    with _watch("merge", quiet) as watch:
        merge_stores(output, [Datastore.open(path) for path in datastores], watch=watch)
    _show_store(output, quiet)


@datastore_group.command("split", short_help="A store for each source of a store.")
@click.argument("datastore", metavar="DS")
@click.option("--by", default="source", show_default=True, type=click.Choice(["source"]), help="What gets a store.")
@click.option("--output", required=True, metavar="FOLDER", help="Folder for the stores, which bear the sources' names.")
@output_options
def split_command(datastore: str, by: str, output: str, quiet: bool, debug: bool) -> None:
    """Write a store for each source of DS.

    \b
    gradsift datastore split store --by source --output stores
    """
    from datastore import Datastore
    from datastore.derive import split_store

    with _watch("split", quiet) as watch:
        folders = split_store(Datastore.open(datastore), output, watch=watch)
    for folder in folders:
        _show_store(str(folder), quiet)


@datastore_group.command("convert", short_help="A smaller store: fewer bits, or fewer features.")
@click.argument("datastore", metavar="DS")
@click.argument("output", metavar="OUT")
@click.option(
    "--feature-dtype",
    type=click.Choice(["float32", "float16", "int8", "int4", "binary"]),
    help="Of stored rows, as in build-datastore; no more bits than DS has.",
)
@click.option("--feature-set", "feature_sets", multiple=True, metavar="NAME", help="Keep this one; may be repeated.")
@click.option("--checkpoint", "checkpoints", multiple=True, metavar="NAME", help="Keep this one; may be repeated.")
@output_options
def convert_command(datastore: str, output: str, quiet: bool, debug: bool, **options: Any) -> None:
    """Write DS to OUT with features in fewer bits, or only some feature sets or checkpoints of it.

    No model runs. From float32 the result is what a build with fewer bits gives, to the byte. Weights of the
    checkpoints that are kept are scaled to a sum of 1.

    \b
    gradsift datastore convert store smaller --feature-dtype int4
    """
    from datastore import Datastore
    from datastore.derive import convert_store

    with _watch("convert", quiet) as watch:
        convert_store(Datastore.open(datastore), output, watch=watch, **options)
    _show_store(output, quiet)


@contextmanager
def _watch(description: str, quiet: bool) -> "Iterator[Watch]":
    """A bar that begins when it is told how much there is to do."""
    from less.progress import Progress

    bar: Progress | None = None
    before = 0

    def watch(done: int, total: int) -> None:
        nonlocal bar, before
        if bar is None:
            bar = Progress(total=total, description=description, unit="shards", enabled=not quiet)
        bar.advance(done - before)
        before = done

    try:
        yield watch
    finally:
        if bar is not None:
            bar.close()


def _lines_of(file: str | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{file} is no text: {error}") from None
    return [line for line in lines if line]


def _show_store(path: str, quiet: bool) -> None:
    from datastore import Datastore

    if not quiet:
        store = Datastore.open(path)
        num_rows = sum(source.num_rows for source in store.sources)
        click.echo(f"{store.num_rows:,} rows scored of {num_rows:,}, {human_bytes(store.num_bytes)}: {path}")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
