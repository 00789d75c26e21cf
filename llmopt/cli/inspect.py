"""llmopt inspect: what an artifact holds, how it was built and what of the model was compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmopt.cli.output import emit_json, emit_pairs, emit_table

if TYPE_CHECKING:
    from llmopt.artifact import Artifact


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--weights", type=click.Path(path_type=Path), help="Directory of the weights, when kept outside.")
@click.option("--no-verify", is_flag=True, help="Skip the digests of files and weights.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(artifact: Path, weights: Path | None, no_verify: bool, as_json: bool) -> None:
    """Show ARTIFACT: its manifest, sizes, KV plan, the passes' record, the coverage ledger and, of quantized linears,
    from how many rows on bfloat16 would be as fast.

    Milliseconds come from the build log beside the artifact and are left out when it is gone.
    """
    from llmopt.artifact import Artifact
    from llmopt.report.build_log import build_log
    from llmopt.report.sections import (
        crossover_rows,
        gap_lines,
        ledger_rows,
        manifest_pairs,
        pass_rows,
        size_rows,
        state_rows,
    )

    opened = Artifact.open(artifact, weights=weights, verify=not no_verify)
    log = build_log(artifact)
    if as_json:
        emit_json(as_dict(opened, log))
        return
    report = opened.report()
    emit_pairs(manifest_pairs(opened.manifest, verified=not no_verify))
    _section("KV plan", ("group", "kind", "layers", "block", "bytes/block", "window"), state_rows(opened.manifest))
    _section("Passes", ("pass", "rewrites", "nodes before", "after", "ms"), pass_rows(report, log))
    _section("Coverage", ("share of", "compiled", "generic", "eager"), ledger_rows(report["ledger"]))
    for line in gap_lines(report["ledger"]):
        click.echo(f"  gap: {line}")
    if crossing := crossover_rows(opened.manifest):
        _section("Crossover against bfloat16", ("arch", "weights", "shape", "from"), crossing)
    _section("Sizes", ("part", "size"), size_rows(opened, report))


def as_dict(artifact: Artifact, log: dict[str, Any] | None) -> dict[str, Any]:
    """Everything as one JSON value."""
    manifest: dict[str, Any] = json.loads(artifact.manifest.to_json())
    manifest["weights"].pop("chunks")
    recipe = artifact.file("recipe.yaml").read_text("utf-8")
    return {"manifest": manifest, "report": artifact.report(), "recipe": recipe, "build_log": log}


def _section(title: str, headers: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    click.echo()
    emit_table(headers, rows, title=title)
