"""`gradsift inspect`."""

from typing import Any

import click

from cli.options import output_options
from cli.showing import console, human_bytes, show_skipped, table

__all__ = ["inspect_command"]


@click.command("inspect", short_help="What is in a store: provenance, counts, skipped rows, bytes.")
@click.argument("datastore", metavar="DS")
@click.option("--verify", is_flag=True, help="Read every shard and check its checksum.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest's summary as JSON.")
@output_options
def inspect_command(datastore: str, verify: bool, as_json: bool, quiet: bool, debug: bool) -> None:
    """Show what a store holds and how it was made.

    \b
    gradsift inspect store --verify
    """
    from datastore import Datastore

    store = Datastore.open(datastore)
    if verify:
        store.verify()
    if as_json:
        import json

        click.echo(json.dumps(_summary(store), indent=2))
        return
    view = table(str(store.path), "what", "value")
    view.show_header = False
    for name, value in _lines(store):
        view.add_row(name, value)
    console().print(view)
    checkpoints = table("checkpoints", "name", "step", "weight", "adapter sha256")
    for name in store.checkpoints:
        entry = store.settings["checkpoints"][name]
        checkpoints.add_row(name, str(entry["step"]), f"{entry['weight']:.4f}", entry["adapter_sha256"][:12])
    console().print(checkpoints)
    sources = table("sources", "name", "rows", "sha256", "location")
    for source in store.sources:
        sources.add_row(source.name, f"{source.num_rows:,}", source.sha256[:12], source.location or "in memory")
    console().print(sources)
    show_skipped(store.skipped, sum(source.num_rows for source in store.sources))
    if verify:
        click.echo("every shard's checksum is right")


def _lines(store: Any) -> list[tuple[str, str]]:
    settings, environment = store.settings, store.environment
    model, rendering = settings["model"], settings["rendering"]
    lines = [
        ("scored rows", f"{store.num_rows:,} of {sum(s.num_rows for s in store.sources):,}"),
        ("size", human_bytes(store.num_bytes)),
        ("model", f"{environment['model']} ({model['dtype']}, fingerprint {model['fingerprint'][:12]})"),
        ("LoRA parameters", f"{model['num_params']:,}"),
        ("rendering", ", ".join(f"{key} {_short(value)}" for key, value in rendering.items())),
        ("made with", f"{environment['device']}, " + ", ".join(f"{k} {v}" for k, v in environment["versions"].items())),
    ]
    for name, feature_set in settings["feature_sets"].items():
        projection = ", ".join(f"{key} {value}" for key, value in feature_set["projection"].items())
        lines.append((f"features {name}", f"{feature_set['update_rule']}, {projection}, {feature_set['dtype']}"))
    return lines


def _summary(store: Any) -> dict[str, Any]:
    return {
        "path": str(store.path),
        "num_rows": sum(source.num_rows for source in store.sources),
        "num_scored": store.num_rows,
        "num_bytes": store.num_bytes,
        "settings": store.settings,
        "environment": store.environment,
        "skipped": [{"where": row.where, "reason": row.reason, "detail": row.detail} for row in store.skipped],
    }


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
