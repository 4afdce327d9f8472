"""`gradsift index`, `gradsift explain` and `gradsift near-duplicates`."""

import textwrap
from typing import TYPE_CHECKING, Any

import click

from cli.json_files import check_writable, write_json
from cli.libraries import hush_libraries
from cli.options import found_again_options, output_options
from cli.showing import human_bytes, one_line, show_numbers, show_skipped, show_table, table, visible

if TYPE_CHECKING:
    from less import AlikeRows, Explanation
    from less.duplicates import AlikeGroup

__all__ = ["explain_command", "index_command", "near_duplicates_command"]

_WIDTH = 80
_SUBTASKS_SHOWN = 8
_CHECKPOINTS_SHOWN = 4
_NAME_WIDTH = 24
_TEXT_WIDTH, _MOMENTUM_WIDTH = 30, 10
_GROUPS_SHOWN, _PLACE_WIDTH = 8, 30
_SHARED = "which all rows share; a feature set without it (sgd, adam-no-momentum) tells rows apart better"


@click.command("index", short_help="An index of a store, to find near rows fast.")
@click.argument("datastore", metavar="DS")
@click.option(
    "--type",
    default="flat",
    show_default=True,
    type=click.Choice(["flat", "ivf", "ivf-sq8"]),
    help="flat looks at a sketch of every row; ivf at some lists of them; ivf-sq8 likewise, in a quarter of the room.",
)
@click.option("--dim", default=1024, show_default=True, metavar="N", help="Columns of a sketch; 0: the features.")
@click.option("--feature-set", metavar="NAME", help="Which feature set, where the store has several.")
@click.option("--checkpoint", metavar="NAME", help="Similarity at this one alone.  [default: over all, weighted]")
@click.option(
    "--recall", default=0.95, show_default=True, metavar="R", help="Wanted share of a row's 10 nearest that is found."
)
@click.option("--seed", default=0, show_default=True, help="Of sketch, lists and the rows recall is measured on.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Check the shards' checksums.")
@output_options
def index_command(datastore: str, feature_set: str | None, quiet: bool, debug: bool, **options: Any) -> None:
    """Index the rows of a store by their similarity in gradient space, beside it, in DS.index.

    What a search gives is exact; how many of the nearest rows it finds is measured, and shown.

    \b
    gradsift index store --type ivf
    """
    from datastore import Datastore, IndexConfig, build_index
    from datastore.similarity import choose_feature_set
    from less.progress import Progress

    config, store = IndexConfig(**options), Datastore.open(datastore)
    name = choose_feature_set(store, feature_set)
    with Progress(total=store.num_rows, description="index", enabled=not quiet) as bar:
        index = build_index(store, name, config=config, advance=bar.advance)
    if quiet:
        return
    entry = index.entry
    click.echo(f"{name}: {entry.num_rows:,} rows, {entry.dim:,} columns{'' if entry.is_sketch else ', no sketch'}")
    if entry.type != "flat":
        click.echo(f"a search looks into {entry.num_probes:,} of {entry.num_lists:,} lists")
    click.echo(
        f"it orders {min(entry.num_candidates, entry.num_rows):,} rows exactly and finds "
        f"{entry.recall:.2f} of a row's 10 nearest\n(measured on {entry.num_measured:,} rows)"
    )
    if entry.recall < config.recall:
        click.echo(f"note: less than the {config.recall:g} asked for; more --dim or --type flat finds more")
    click.echo(f"written: {index.folder} ({human_bytes(entry.file.num_bytes)})")


@click.command("explain", short_help="Why a row has its score, and which rows are like it.")
@click.argument("datastore", metavar="DS")
@click.option(
    "--row", required=True, metavar="ID", help="The row's id; or SOURCE:NUMBER, a row's number in a source, from 0."
)
@click.option(
    "--targets", multiple=True, metavar="T", help="Explain its score for these, as in select; may be repeated."
)
@click.option("--neighbours", default=5, show_default=True, metavar="N", help="Near rows to show.")
@click.option("--top-targets", default=5, show_default=True, metavar="N", help="Targets to show.")
@click.option("--json", "json_file", metavar="FILE", help="Also write all of it as JSON.")
@click.option("--feature-set", metavar="NAME", help="Which feature set, where the store has several.")
@click.option("--system-prompt", metavar="keep|none|TEXT", help="For the targets.  [default: as for the pool]")
@click.option("--tokens-per-batch", type=click.IntRange(min=1), metavar="N", help="Padded tokens computed at once.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Check the files' checksums.")
@found_again_options
@output_options
def explain_command(quiet: bool, debug: bool, json_file: str | None, **options: Any) -> None:
    """Show which subtasks and targets pull a row in, at which checkpoint, and the nearest rows in gradient space.

    Without --targets, only the row and its neighbours. These come from the index, if `gradsift index` made one.

    \b
    gradsift explain store --row pool:17 --targets target.jsonl
    """
    check_writable(json_file, store=options["datastore"], inputs=[*options["targets"], *options["data"]])
    hush_libraries(quiet)
    from less import explain

    for name in ("targets", "checkpoints", "data"):
        options[name] = list(options[name]) or None
    found = explain(progress=not quiet, **options)
    write_json(json_file, found.as_json())
    if quiet:
        return
    _show_row(found)
    _show_influence(found)
    _show_neighbours(found)
    if json_file:
        click.echo(f"written: {json_file}")


def _show_row(found: "Explanation") -> None:
    click.echo(f"{one_line(found.id, 30)}: {one_line(found.where, 24)}, row {found.row} of source {found.source}")
    click.echo(f"  {one_line(found.text, _WIDTH - 2)}")
    cut = ", cut to the length limit" if found.truncated else ""
    click.echo(f"{found.num_tokens:,} tokens, {found.num_supervised:,} of them supervised{cut}\n")
    has_momentum = any(facts.momentum_cosine is not None for facts in found.checkpoints)
    columns = ["checkpoint", "weight", "loss", "‖g‖", "‖Γ‖", *(["cosine with momentum"] if has_momentum else [])]
    view = table(f"{found.feature_set}, what the store holds of it", *columns)
    for facts in found.checkpoints:
        cells = [f"{facts.weight:.3f}", f"{facts.loss:.3f}", f"{facts.grad_norm:.4g}", f"{facts.update_norm:.4g}"]
        if has_momentum:
            cells.append("–" if facts.momentum_cosine is None else f"{facts.momentum_cosine:.3f}")
        view.add_row(facts.name, *cells)
    show_numbers(view)


def _show_influence(found: "Explanation") -> None:
    if not found.target_sets:
        return
    show_skipped(found.skipped_targets, None, what="targets")
    for target_set in found.target_sets:
        sentence = (
            f"{one_line(target_set.name, _NAME_WIDTH)}: score {target_set.score:.4f}, rank {target_set.rank:,} of "
            f"{found.num_rows:,}, by {one_line(target_set.subtask, _NAME_WIDTH)}"
        )
        _say(sentence)
    click.echo()
    heaviest = sorted(found.checkpoints, key=lambda facts: -facts.weight)[:_CHECKPOINTS_SHOWN]
    names = [facts.name for facts in found.checkpoints if facts in heaviest]
    which = f" ({len(names)} that weigh most)" if len(names) < len(found.checkpoints) else ""
    heads = [f"at {name.removeprefix('checkpoint-')}" for name in names]
    has_momentum = found.subtasks[0].from_momentum is not None
    several = len(found.target_sets) > 1
    view = table(
        f"subtasks: score, and its parts by checkpoint{which}", "subtask", "score", "rank", *heads,
        *(["momentum"] if has_momentum else []),
    )  # fmt: skip
    for pull in found.subtasks[:_SUBTASKS_SHOWN]:
        name = f"{pull.target_set}/{pull.subtask}" if several and pull.subtask != pull.target_set else pull.subtask
        parts = [f"{pull.by_checkpoint[checkpoint]:.4f}" for checkpoint in names]
        momentum = [] if pull.from_momentum is None else [f"{pull.from_momentum:.4f}"]
        view.add_row(one_line(name, _NAME_WIDTH), f"{pull.score:.4f}", f"{pull.rank:,}", *parts, *momentum)
    if (left := len(found.subtasks) - _SUBTASKS_SHOWN) > 0:
        view.add_row(f"… {left:,} more")
    show_numbers(view)
    if not found.targets:
        return
    view = table(
        f"targets that pull most: Σ w cos, and cosines by checkpoint{which}", "target", "subtask", "Σ w cos", *heads
    )
    for target in found.targets:
        cosines = [f"{target.cosines[checkpoint]:.3f}" for checkpoint in names]
        view.add_row(
            one_line(target.id, _NAME_WIDTH), one_line(target.subtask, _NAME_WIDTH), f"{target.contribution:.4f}",
            *cosines,
        )  # fmt: skip
    show_numbers(view)
    for target in found.targets:
        click.echo(f"{one_line(target.id, _NAME_WIDTH)} ({one_line(target.where, _NAME_WIDTH)})")
        click.echo(f"  {one_line(target.text, _WIDTH - 2)}")
    click.echo()


def _show_neighbours(found: "Explanation") -> None:
    if not found.neighbours:
        return
    has_momentum = found.neighbours[0].from_momentum is not None
    momentum = ["momentum"] if has_momentum else []
    view = table("nearest rows in gradient space", "similarity", *momentum, "row", "where", "text")
    for near in found.neighbours:
        text = f"(the same tokens) {near.text}" if near.same_tokens else near.text
        numbers = [f"{value:.4f}" for value in (near.similarity, near.from_momentum) if value is not None]
        beginning = one_line(text, _TEXT_WIDTH - (_MOMENTUM_WIDTH if has_momentum else 0))
        view.add_row(*numbers, one_line(near.id, _NAME_WIDTH), visible(near.where), beginning)
    show_table(view)
    said = [f"found by {found.neighbours_by}"]
    if has_momentum and any((near.from_momentum or 0) > near.similarity / 2 for near in found.neighbours):
        said.append(f"note: most of this is Adam's momentum, {_SHARED}")
    for sentence in said:
        _say(sentence)
    click.echo()


@click.command("near-duplicates", short_help="Groups of rows that are alike in gradient space.")
@click.argument("datastore", metavar="DS")
@click.option(
    "--threshold", default=0.95, show_default=True, metavar="COS", help="Rows at least this similar are alike."
)
@click.option(
    "--output", metavar="OUT", help="Also write every row that would go, with the row that it is like: .jsonl."
)
@click.option("--feature-set", metavar="NAME", help="Which feature set, where the store has several.")
@click.option("--data", multiple=True, metavar="POOL", help="The pool, where it has moved.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Check the files' checksums.")
@output_options
def near_duplicates_command(quiet: bool, debug: bool, output: str | None, **options: Any) -> None:
    """Show which rows of a store are alike in gradient space, by the index that `gradsift index` made.

    Rows that are alike, or joined by rows that are, make a group. The first of them in the pool would stay, the others
    would go; nothing is changed. OUT has a line for each that would go: id, source and row number, where it stands in
    the pool, its similarity to the row that would stay, and that row.

    \b
    gradsift near-duplicates store --threshold 0.95 --output alike.jsonl
    """
    check_writable(output)
    hush_libraries(quiet)
    from less import near_duplicates

    options["data"] = list(options["data"]) or None
    found = near_duplicates(output=output, progress=not quiet, **options)
    if quiet:
        return
    _show_groups(found)
    if output:
        click.echo(f"written: {output}")


def _show_groups(found: "AlikeRows") -> None:
    limit = f"similarity of {found.threshold:g} or more, found by {found.found_by}"
    if not found.groups:
        _say(f"{found.feature_set}: none of the {found.num_rows:,} rows are alike ({limit})")
        return
    num_rows = found.num_others + len(found.groups)
    groups = "1 group" if len(found.groups) == 1 else f"{len(found.groups):,} groups"
    _say(f"{found.feature_set}: {num_rows:,} of {found.num_rows:,} rows are alike, in {groups} ({limit})")
    _say(
        f"the first row of each would stay, {found.num_others:,} would go, {found.num_same_tokens:,} of them with the "
        "very tokens of the row that would stay"
    )
    click.echo()
    click.echo("the largest groups: the row that would stay, and the row least like it")
    for group in found.groups[:_GROUPS_SHOWN]:
        _show_group(group)
    if (left := len(found.groups) - _GROUPS_SHOWN) > 0:
        click.echo(f"… {left:,} more")
    click.echo()
    if found.num_by_way:
        _say(
            f"note: {found.num_by_way:,} of the rows that would go are less like the row that would stay than "
            f"{found.threshold:g}, and alike by way of other rows; a higher --threshold joins fewer"
        )
    if found.num_ids_shared:
        _say(
            f"note: {found.num_ids_shared:,} of the rows that would go have the id of a row that would stay; name them "
            "by source and row number"
        )
    if found.num_by_momentum:
        _say(
            f"note: for {found.num_by_momentum:,} of the rows that would go most of the similarity is Adam's "
            f"momentum, {_SHARED}"
        )


def _show_group(group: "AlikeGroup") -> None:
    lowest, highest = (f"{value:.4f}" for value in group.similarities)
    facts = [f"{group.num_rows:,} rows", f"similarity {lowest if lowest == highest else f'{lowest}–{highest}'}"]
    if group.num_same_tokens:
        of = "" if group.num_same_tokens == len(group.others) else f"{group.num_same_tokens:,} with "
        facts.append(f"{of}the same tokens")
    click.echo(", ".join(facts))
    pair = (group.first, group.least)
    places = [_place(row.where) for row in pair]
    width = max(map(len, places))
    for row, place in zip(pair, places, strict=True):
        click.echo(f"  {place:{width}}  {one_line(row.text, _WIDTH - width - 4)}".rstrip())


def _place(where: str) -> str:
    """A place in the pool on one line; of a long one the end, which has the number."""
    place = " ".join(visible(where).split())
    return place if len(place) <= _PLACE_WIDTH else f"…{place[1 - _PLACE_WIDTH :]}"


def _say(sentence: str) -> None:
    click.echo(textwrap.fill(sentence, _WIDTH, subsequent_indent="  ", break_on_hyphens=False))
