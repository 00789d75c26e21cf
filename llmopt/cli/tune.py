"""``llmopt tune``: measures kernel configurations for a model's shapes and keeps the best in a table."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from llmopt.cli.output import Progress, emit_json, emit_pairs, emit_table, progress_bar
from llmopt.errors import ConfigError


@click.command("tune")
@click.argument("source", metavar="[CHECKPOINT_OR_CONFIG]", required=False, type=click.Path(path_type=Path))
@click.option("-r", "--recipe", help="Recipe file, or the name of a built-in one (bf16-cuda).")
@click.option("--build-only", type=click.Path(path_type=Path), metavar="BUNDLE",
              help="Only make this folder of candidates; needs no GPU.")  # fmt: skip
@click.option("--time", "bundle", type=click.Path(path_type=Path), metavar="BUNDLE",
              help="Time a folder of candidates here; needs no Triton and no torch.")  # fmt: skip
@click.option("--target", default="cuda", show_default=True, help="Whose candidates a bundle holds.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False),
              help="The table to add to; default: the one builds use.")  # fmt: skip
@click.option("--rows", type=click.Path(path_type=Path, dir_okay=False), help="Append every timing to this JSONL file.")
@click.option("--only", default="", metavar="REGEX", help="Only what matches: 'gemm bfloat16 256x'.")
@click.option("--max-context", type=click.IntRange(1), help="As in llmopt compile.")
@click.option("--device", default="cuda", show_default=True, help="cuda or cuda:1.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def tune(
    source: Path | None,
    recipe: str | None,
    build_only: Path | None,
    bundle: Path | None,
    target: str,
    output: Path | None,
    rows: Path | None,
    only: str,
    max_context: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure kernel configurations for the shapes of a model under a recipe.

    Candidates are built with the installed compiler and timed as built: in one go on a machine with both compiler and
    GPU, else with --build-only on any machine and --time on the GPU's. Shapes alone matter: a config.json will do.

    Exit codes: 3 recipe or table, 4 checkpoint, 8 target, 9 damaged bundle, 10 no GPU or no compiler, 12 GPU failure.
    """
    check_usage(source, recipe, build_only, bundle)
    pattern(only)
    with progress_bar(not as_json) as progress, TemporaryDirectory(prefix="llmopt-tune-") as scratch:
        folder = bundle or build_only or Path(scratch)
        if bundle is None:
            built = build(source or Path(), recipe or "", max_context, folder, only, progress)
        if build_only is None:
            from llmopt.registry import load_tuner

            timed = load_tuner(target).time_candidates(folder, device, output, rows, progress)
    if build_only is None:
        emit_json(timed) if as_json else show(timed)
    else:
        emit_json(built) if as_json else emit_pairs(list(built.items()))


def check_usage(source: Path | None, recipe: str | None, build_only: Path | None, bundle: Path | None) -> None:
    """Raises ConfigError for options that contradict each other."""
    if bundle is not None and (source is not None or build_only is not None or recipe is not None):
        raise ConfigError("--time takes a bundle that exists: no checkpoint, recipe or --build-only beside it")
    if bundle is None and (source is None or recipe is None):
        raise ConfigError("give a checkpoint (or config.json) and a recipe, or a bundle to --time")
    if build_only is not None and build_only.exists() and (not build_only.is_dir() or any(build_only.iterdir())):
        raise ConfigError("the folder is not empty", where=str(build_only), hint="name a new one")


def pattern(text: str) -> None:
    """Raises ConfigError for a pattern that is no regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise ConfigError(f"not a regular expression: {error}", where="--only") from error


def build(
    source: Path, recipe: str, max_context: int | None, folder: Path, only: str, progress: Progress
) -> dict[str, Any]:
    """Candidates for a checkpoint's or config's shapes; a folder half made is removed."""
    import shutil

    from llmopt.cli.compile import require_compile_extra

    require_compile_extra()
    from llmopt.plan import shape_program
    from llmopt.recipe import load_recipe
    from llmopt.registry import load_tuner

    loaded = load_recipe(recipe)
    tuner = load_tuner(loaded.target)
    program, model = shape_program(source, loaded, max_context)
    try:
        found: dict[str, Any] = tuner.build_candidates(program, loaded.target_options, folder, model, only, progress)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return found


def show(timed: dict[str, Any]) -> None:
    """For people."""
    lines = [
        (kernel, key, f"{config['us']:.2f}", " ".join(f"{k}={v}" for k, v in config.items() if k != "us"))
        for kernel, entries in timed["best"].items()
        for key, config in entries.items()
    ]
    emit_table(("kernel", "shape", "us", "configuration"), lines)
    for line in (*timed["wrong"], *timed["failed"]):
        click.echo(f"left out: {line}")
    emit_pairs([("gpu", timed["gpu"]), ("compiler", timed["compiler"]), ("timed", timed["timed"]),
                ("table", f"{timed['table']}, {timed['entries']} entries of this compiler")])  # fmt: skip
