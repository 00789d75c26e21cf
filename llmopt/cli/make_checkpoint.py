"""``llmopt make-checkpoint``: a checkpoint of random weights in a known shape, to try speed and streaming with."""

from __future__ import annotations

import time
from pathlib import Path

import click

from llmopt.cli.output import emit_json, emit_pairs, human_bytes, progress_bar


@click.command("make-checkpoint")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--like", "like", metavar="SHAPE", help="A known shape, such as llama-3.1-8b or llama-125m.")
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="Shapes from this config.json instead.")
@click.option("--layers", type=click.IntRange(1), help="Number of layers instead of the config's.")
@click.option("--dtype", help="bfloat16, float16 or float32; default: the config's.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Equal seeds give equal bytes.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def make_checkpoint(
    output: Path,
    like: str | None,
    config_path: Path | None,
    layers: int | None,
    dtype: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Write a Hugging Face checkpoint of random weights, with a byte-level tokenizer.

    Exit codes: 3 unknown shape or bad config, 4 unreadable config, 5 no decoder of that kind, 10 disk full.
    """
    from llmopt.cli.compile import require_compile_extra
    from llmopt.errors import ConfigError

    if (like is None) == (config_path is None):
        raise ConfigError("give exactly one of --like and --config")
    require_compile_extra()
    from llmopt.frontend.blueprint import named_config, with_layers
    from llmopt.frontend.checkpoint import read_json
    from llmopt.frontend.synthetic import make_checkpoint as write

    config = named_config(like) if like is not None else read_json(config_path or Path())
    if layers is not None:
        config = with_layers(config, layers)
    start = time.perf_counter()
    with progress_bar(not as_json) as progress:
        made = write(output, config, seed=seed, dtype=dtype, progress=progress)
    seconds = time.perf_counter() - start
    if as_json:
        fields = {"bytes": made.bytes, "parameters": made.parameters, "shards": made.shards}
        emit_json({"path": str(output), **fields, "tokenizer": made.tokenizer, "seconds": round(seconds, 2)})
        return
    emit_pairs(
        [
            ("checkpoint", output),
            ("weights", f"{human_bytes(made.bytes)} in {made.shards} shards, {made.parameters / 1e6:.1f}M parameters"),
            ("tokenizer", "byte-level" if made.tokenizer else "none: the vocabulary does not hold 256 bytes"),
            ("time", f"{seconds:.1f} s"),
        ]
    )
