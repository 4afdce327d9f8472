"""`gradsift verify`."""

from typing import Any

import click

from cli.json_files import check_writable, write_json
from cli.libraries import hush_libraries
from cli.options import found_again_options, output_options
from cli.showing import visible

__all__ = ["verify_command"]

_WIDTH = 80


class Bounds(click.ParamType):
    """`name=bound,...` as a dict; which names there are is `less.verification.certificate`'s business."""

    name = "bounds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Split and convert."""
        if not isinstance(value, str):
            return value
        try:
            pairs = [part.split("=") for part in value.split(",")]
            return {name.strip(): float(bound) for name, bound in pairs}
        except ValueError:
            self.fail(f"{value!r} is not NAME=BOUND,... such as gradient=1e-3,spearman=0.9", param, ctx)


@click.command("verify", short_help="What a store's numbers are worth: a certificate.")
@click.argument("datastore", metavar="DS")
@click.option(
    "--targets",
    multiple=True,
    metavar="T",
    help="Score against these, and look for them in the pool; may be repeated.  [default: other rows of the store]",
)
@click.option("--sample", default=64, show_default=True, metavar="N", help="Rows to recompute exactly.")
@click.option("--feature-set", metavar="NAME", help="Which feature set, where the store has several.")
@click.option("--seed", default=0, show_default=True, help="Chooses the sample.")
@click.option(
    "--require",
    type=Bounds(),
    metavar="NAME=BOUND,...",
    help="Exit with 1 if one is missed; names as in --json, under `values`.",
)
@click.option("--json", "json_file", metavar="FILE", help="Also write all of it as JSON.")
@found_again_options
@output_options
def verify_command(quiet: bool, debug: bool, json_file: str | None, **options: Any) -> None:
    """Recompute some of a store's rows by the slow reference, and say in words what its numbers are worth.

    Checks every file, the gradients and update directions, what is stored of them, what the projection does to the
    ranking, and what else explains the scores.

    \b
    gradsift verify store --targets target.jsonl \\
        --require gradient=1e-3,spearman=0.9,contaminated=0
    """
    check_writable(json_file, store=options["datastore"], inputs=[*options["targets"], *options["data"]])
    hush_libraries(quiet)
    from less import verify

    for name in ("targets", "checkpoints", "data"):
        options[name] = list(options[name]) or None
    certificate = verify(progress=not quiet, **options)
    write_json(json_file, certificate.as_json(), ascii_only=False)
    if not quiet:
        for line in certificate.verdicts:
            _show(line)
        if json_file:
            click.echo(f"written: {json_file}")
    if certificate.missed:
        click.echo(f"missed: {', '.join(certificate.missed)}", err=True)
        click.get_current_context().exit(1)


def _show(line: str) -> None:
    import textwrap

    click.echo(
        textwrap.fill(visible(line), _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    )
