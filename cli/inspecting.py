"""`gradsift inspect`."""

from typing import Any

import click

from cli.options import output_options
from cli.showing import human_bytes, show_skipped, show_table, table

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
    from datastore.errors import StoreError

    store = Datastore.open(datastore)
    if verify:
        from less.verification.checksums import verify_files

        verify_files(store, progress=not quiet)
    if as_json:
        import json

        click.echo(json.dumps(_summary(store), indent=2))
        return
    view = table(str(store.path), "what", "value")
    view.show_header = False
    checkpoints = table("checkpoints", "name", "step", "weight", "adapter sha256")
    try:  # settings and environments are their writer's affair: another's are not shaped like ours
        for name, value in _lines(store):
            view.add_row(name, value)
        for name in store.checkpoints:
            entry = store.settings["checkpoints"][name]
            adapter = entry["adapter_sha256"] or "none"
            checkpoints.add_row(name, str(entry["step"]), f"{entry['weight']:.4f}", adapter[:12])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"the settings and environments of {store.path} are not as `gradsift build-datastore` writes them "
            f"({type(error).__name__}: {error}). See them as they are with --json"
        ) from error
    show_table(view)
    click.echo()
    show_table(checkpoints)
    click.echo()
    sources = table("sources", "name", "rows", "sha256", "location")
    for source in store.sources:
        sources.add_row(source.name, f"{source.num_rows:,}", source.sha256[:12], source.location or "in memory")
    show_table(sources)
    click.echo()
    num_rows = sum(source.num_rows for source in store.sources)
    show_skipped(store.skipped, num_rows, num_set_aside=store.num_set_aside)
    if verify:
        click.echo("every checksum is right")


def _lines(store: Any) -> list[tuple[str, str]]:
    settings, environment = store.settings, store.environment
    model, rendering = settings["model"], settings["rendering"]
    lines = [
        ("scored rows", f"{store.num_rows:,} of {sum(s.num_rows for s in store.sources):,}"),
        ("size", human_bytes(store.num_bytes)),
        ("model", f"{environment['model']} ({model['dtype']}, fingerprint {model['fingerprint'][:12]})"),
        ("rendering", _fields(rendering)),
        ("made with", f"{environment['device']}, " + ", ".join(f"{k} {v}" for k, v in environment["versions"].items())),
    ]
    if model["param_layout"]:
        lines.insert(3, ("LoRA parameters", f"{model['num_params']:,}, layers {model['layers']}"))
    for name, feature_set in settings["feature_sets"].items():
        if embedding := feature_set.get("embedding"):
            made_by = f"embeddings, {_fields(embedding)}"
        else:
            made_by = f"{feature_set['update_rule']}, {_fields(feature_set['projection'])}"
        lines.append(("features", f"{name}: {made_by}, {feature_set['dtype']}"))
    if prefilter := settings.get("prefilter"):
        by = f"{', '.join(prefilter['targets'])} at {prefilter['checkpoint']}, layers {prefilter['layers']}"
        lines.append(("prefilter", f"the best {prefilter['fraction']} for {by}"))
    return lines


def _summary(store: Any) -> dict[str, Any]:
    return {
        "path": str(store.path),
        "num_rows": sum(source.num_rows for source in store.sources),
        "num_scored": store.num_rows,
        "num_set_aside": store.num_set_aside,
        "num_bytes": store.num_bytes,
        "sources": [vars(source) for source in store.sources],
        "settings": store.settings,
        "environment": store.environment if store.manifest.environments else None,
        "skipped": [{"where": row.where, "reason": row.reason, "detail": row.detail} for row in store.skipped],
    }


def _fields(values: dict[str, Any]) -> str:
    """`name value, ...` of what is set; a sha256 by its beginning."""
    known = {name: str(value) for name, value in values.items() if value is not None}
    return ", ".join(f"{name} {text[:12] if len(text) == 64 else text}" for name, text in known.items())
