"""`gradsift render`."""

from typing import Any

import click

from cli.options import model_option, output_options, rendering_options

__all__ = ["render_command"]


@click.command("render", short_help="Show each token of a row and whether it carries loss.")
@model_option
@click.option("--data", required=True, metavar="FILE", help="Instruction data.")
@click.option("--rows", default=3, show_default=True, type=click.IntRange(min=1), metavar="N", help="Rows to show.")
@rendering_options
@click.option("--trust-remote-code", is_flag=True, help="Let Python code that comes with the tokenizer run.")
@output_options
def render_command(
    model: str, data: str, rows: int, trust_remote_code: bool, quiet: bool, debug: bool, **options: Any
) -> None:
    """Show how rows become tokens: a bar after each token; tokens that carry loss are green and underlined.

    Where the output is not a terminal, tokens that carry loss stand in [brackets].

    \b
    gradsift render --model M --data pool.jsonl --rows 2
    """
    from rich.text import Text

    from cli.showing import console
    from less.data import RenderConfig, Renderer, RowProblem, open_source
    from less.models import context_length, load_config, load_tokenizer

    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    config = load_config(model, trust_remote_code=trust_remote_code)
    renderer = Renderer(tokenizer, RenderConfig(**options), context_length=context_length(config))
    source = open_source(data)
    out = console()
    for record in source.iter_records(0, rows):
        try:
            rendered = renderer.render_record(record)
        except RowProblem as problem:
            out.print(Text(f"{record.where}  skipped: {problem.reason}: {problem.detail}\n", style="red"))
            continue
        cut = ", truncated" if rendered.truncated else ""
        head = f"{record.where}  {record.id}: {rendered.num_tokens} tokens, {rendered.num_supervised} carry loss{cut}"
        out.print(Text(head, style="bold"))
        line = Text()
        for token, supervised in zip(rendered.input_ids, rendered.supervised, strict=True):
            piece = tokenizer.decode([token])
            if not out.is_terminal:
                line.append(f"[{piece}]" if supervised else piece)
            else:
                line.append(piece, style="green underline" if supervised else "dim")
                line.append("|", style="bright_black")
        out.print(line, soft_wrap=True)
        out.print()
