"""llmopt bench: an artifact's TTFT, ms a token and bandwidth against the floor; ``serve``: a server's latencies."""

from __future__ import annotations

from pathlib import Path

import click

from llmopt.cli.bench_serve import serve
from llmopt.cli.output import emit_json, emit_pairs, emit_table, human_bytes, progress_bar
from llmopt.errors import ConfigError


def parse_counts(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """``1,8`` → (1, 8)."""
    try:
        counts = tuple(int(item) for item in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 1,8") from error
    if min(counts) < 1:
        raise click.BadParameter("a batch holds at least one sequence")
    return counts


class _DefaultGroup(click.Group):
    """``llmopt bench ARTIFACT`` is ``llmopt bench artifact ARTIFACT``: what names no command goes to that one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command in front where none is named."""
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["artifact", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_DefaultGroup, no_args_is_help=False)
def bench() -> None:
    """Measure an artifact (llmopt bench ARTIFACT) or a running server (llmopt bench serve URL)."""


bench.add_command(serve)


@bench.command("artifact", short_help="Time, throughput and bandwidth of an artifact; the default.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt-len", default=256, show_default=True, type=click.IntRange(1), help="Prompt tokens a sequence.")
@click.option("--gen-len", default=64, show_default=True, type=click.IntRange(2), help="Tokens to generate.")
@click.option("--batch", default="1,8", show_default=True, callback=parse_counts, help="Batch sizes to measure.")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1), help="Runs after one to warm up.")
@click.option("--threads", default=0, type=click.IntRange(0), help="Threads of the executor (0: all cores).")
@click.option("--device", default="cpu", show_default=True, help="Device of the executor: cpu or cuda.")
@click.option("--weights", type=click.Path(path_type=Path), help="Directory of the weights, when kept outside.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--append", type=click.Path(path_type=Path), help="Append one row a batch size to this JSONL file.")
def bench_artifact(
    artifact: Path,
    prompt_len: int,
    gen_len: int,
    batch: tuple[int, ...],
    repeat: int,
    threads: int,
    device: str,
    weights: Path | None,
    as_json: bool,
    append: Path | None,
) -> None:
    """Measure ARTIFACT: random prompts of one length, greedy decoding, end-of-sequence ignored.

    The floor is the time the machine needs to read what a step must read (weights once, the KV of every
    sequence) at the bandwidth of its memory, or of the GPU's, measured just before.
    """
    from llmopt.artifact import Artifact
    from llmopt.report.bench import Shape, append_rows, measure
    from llmopt.report.machine import probe_machine
    from llmopt.runtime.executors import load_executor
    from llmopt.target import LoadOptions

    opened = Artifact.open(artifact, weights=weights, defer=True)
    length = prompt_len + gen_len
    if length > opened.program.max_context:
        what = f"--prompt-len + --gen-len is {length}, the context is {opened.program.max_context}"
        raise ConfigError(what, where=str(artifact))
    machine = probe_machine(device, threads)
    options = LoadOptions(device=device, threads=threads, max_sequences=max(batch), max_context=length)
    executor = load_executor(opened, options)
    try:
        with progress_bar(not as_json) as progress:
            shapes = [Shape(size, prompt_len, gen_len, repeat) for size in batch]
            rows = [measure(executor, opened, shape, machine, progress) for shape in shapes]
    finally:
        executor.close()
    if append is not None:
        append_rows(append, rows)
    if as_json:
        emit_json(rows)
        return
    _print(rows)


def _print(rows: list[dict[str, object]]) -> None:
    first = rows[0]
    emit_pairs(
        [
            ("model", f"{first['model']}, {first['recipe']}, target {first['target']}"),
            ("machine", f"{first['machine']}, {first['cores']} cores, reads {first['bandwidth_gb_s']} GB/s"),
            ("prompt, generated", f"{first['prompt_len']}, {first['gen_len']} tokens"),
            ("peak memory", human_bytes(float(str(first["peak_bytes"])))),
            *((("on the GPU", human_bytes(float(str(taken)))),) if (taken := first["device_bytes"]) else ()),
        ]
    )
    click.echo()
    headers = ("batch", "TTFT ms", "ms/token", "p20", "p80", "tok/s", "MB/step", "GB/s", "floor ms", "% of floor")
    keys = ("batch", "ttft_ms", "ms", "ms_p20", "ms_p80", "tok_s", "step_mb", "gb_s", "floor_ms", "floor_percent")
    emit_table(headers, [[row[key] for key in keys] for row in rows])
