"""`gradsift render`."""

from typing import Any

import click

from cli.libraries import hush_libraries
from cli.options import loading_options, model_option, output_options, rendering_options, strict_option
from cli.showing import console, visible

__all__ = ["render_command"]


@click.command("render", short_help="Show each token of a row and whether it carries loss.")
@model_option
@click.option("--data", required=True, metavar="FILE", help="Instruction data.")
@click.option("--rows", default=3, show_default=True, type=click.IntRange(min=1), metavar="N", help="Rows to show.")
@rendering_options()
@strict_option
@loading_options
@output_options
def render_command(
    model: str,
    tokenizer: str | None,
    data: str,
    rows: int,
    trust_remote_code: bool,
    strict: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Show how rows become tokens: a bar after each token; those that carry loss are green and underlined.

    Where the output is not a terminal, tokens that carry loss stand in [brackets].

    \b
    gradsift render --model M --data pool.jsonl --rows 2
    """
    hush_libraries(quiet)
    from rich.text import Text

    from datastore.errors import RowError
    from less.data import RenderConfig, Renderer, RowProblem, open_source
    from less.data.rendering import token_texts
    from less.models import context_length, load_config, load_tokenizer

    source = open_source(data)
    words = load_tokenizer(tokenizer or model, trust_remote_code=trust_remote_code)
    config = load_config(model, trust_remote_code=trust_remote_code)
    renderer = Renderer(words, RenderConfig(**options), context_length=context_length(config))
    out = console()
    for record in source.iter_records(0, min(rows, source.num_rows)):
        try:
            rendered = renderer.render_record(record)
        except RowProblem as problem:
            if strict:
                raise RowError(f"{record.where}: {problem}; mend it, or leave out --strict") from None
            out.print(Text(f"{record.where}  skipped: {visible(str(problem))}\n", style="red"), soft_wrap=True)
            continue
        cut = ", truncated" if rendered.truncated else ""
        counts = f"{rendered.num_tokens} tokens, {rendered.num_supervised} carry loss{cut}"
        out.print(Text(f"{record.where}  {visible(record.id)}: {counts}", style="bold"))
        line = Text()
        texts = token_texts(words, rendered.input_ids)
        for text, supervised in zip(texts, rendered.supervised, strict=True):
            piece = visible(text.replace("\n", "⏎\n"))
            if out.is_terminal:
                line.append(piece, style="green underline" if supervised else "dim")
                line.append("|", style="bright_black")
            else:
                line.append(f"[{piece}]" if supervised else f"{piece}|")
        out.print(line, soft_wrap=True)
        out.print()
