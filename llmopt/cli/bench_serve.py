"""llmopt bench serve: load on an OpenAI server, and what its answers took."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmopt.cli.output import emit_json, emit_pairs, emit_table, progress_bar

if TYPE_CHECKING:
    from llmopt.loadgen.benchmark import Load
    from llmopt.loadgen.client import Endpoint


@click.command(short_help="Load on a running OpenAI server: TTFT, ITL, goodput.")
@click.argument("url")
@click.option("--endpoint", default="completions", show_default=True, type=click.Choice(["completions", "chat"]),
              help="Prompts of token ids, or conversations of short words.")  # fmt: skip
@click.option("--model", help="Model to ask for (default: the first the server lists).")
@click.option("--api-key", envvar="OPENAI_API_KEY", show_envvar=True, help="Sent as a bearer token.")
@click.option("--requests", default=200, show_default=True, type=click.IntRange(1), help="Requests to send.")
@click.option("--rate", default=math.inf, type=click.FloatRange(0, min_open=True),
              help="Requests a second (default: all at once).")  # fmt: skip
@click.option("--arrival", default="poisson", show_default=True, type=click.Choice(["poisson", "constant", "burst"]),
              help="How arrivals are spread at that rate.")  # fmt: skip
@click.option("--burst-size", default=16, show_default=True, type=click.IntRange(1), help="Requests in one burst.")
@click.option("--concurrency", type=click.IntRange(1), help="Most requests open at once (default: no limit).")
@click.option(
    "--prompt-len", default="256", show_default=True, help="N, uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA[:MAX]."
)
@click.option("--output-len", default="64", show_default=True, help="Tokens to generate; the same forms.")
@click.option("--input", "source", type=click.Path(path_type=Path),
              help="JSONL file of lengths or whole bodies instead.")  # fmt: skip
@click.option("--shared-prefixes", default=0, type=click.IntRange(0), help="Distinct prefixes shared by the prompts.")
@click.option("--prefix-len", default=0, type=click.IntRange(0), help="Tokens of each, before --prompt-len.")
@click.option(
    "--vocab-size",
    default=1000,
    show_default=True,
    type=click.IntRange(4),
    help="Prompt token ids are drawn below this.",
)
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0 is greedy.")
@click.option("--stop-at-eos", is_flag=True, help="Let answers end early (default: ignore_eos, exact lengths).")
@click.option("--no-stream", is_flag=True, help="Ask for whole answers: end-to-end times only.")
@click.option("--body", default="{}", help='JSON put into every request, such as {"top_p": 0.9}.')
@click.option("--slo", multiple=True, help="Bound in ms a good request meets: ttft=250, tpot=25, itl=50, e2e=9000.")
@click.option("--warmup", default=0, show_default=True, type=click.IntRange(0), help="Requests before, not counted.")
@click.option("--seed", type=int, help="Repeats the same requests (a prefix cache will know them).")
@click.option("--timeout", default=600.0, show_default=True, type=click.FloatRange(0, min_open=True),
              help="Seconds a request may take.")  # fmt: skip
@click.option("--label", help="What is measured, kept with the figures: server, model, machine.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--output", type=click.Path(path_type=Path), help="Write figures and every request's times as JSON.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write an HTML page with the distributions.")
@click.option("--append", type=click.Path(path_type=Path), help="Append the figures as a row to this JSONL file.")
def serve(
    url: str,
    seed: int | None,
    as_json: bool,
    output: Path | None,
    plot: Path | None,
    append: Path | None,
    slo: tuple[str, ...],
    **options: Any,
) -> None:
    """Send requests to the OpenAI server at URL and report TTFT, ITL and end-to-end percentiles.

    Works against any server of /v1/completions or /v1/chat/completions. Times start when a request is sent; the
    report says how late the client itself was.
    """
    import asyncio
    import secrets

    from llmopt.loadgen.benchmark import append_row, measure, write_page, write_records
    from llmopt.loadgen.summary import Slo

    bounds = Slo.parse(slo)
    seed = secrets.randbits(32) if seed is None else seed
    endpoint, load = parse_options(url, seed, options)
    with progress_bar(not as_json) as progress:
        summary, run = asyncio.run(measure(endpoint, load, bounds, progress))
    if output is not None:
        write_records(output, summary, run)
    if plot is not None:
        write_page(plot, summary, run)
    if append is not None:
        append_row(append, summary)
    if as_json:
        emit_json(summary)
    else:
        show(summary)


def parse_options(url: str, seed: int, options: dict[str, Any]) -> tuple[Endpoint, Load]:
    """The flags as the load generator takes them. Raises ConfigError for one that does not parse."""
    from llmopt.loadgen.benchmark import Load
    from llmopt.loadgen.client import Endpoint
    from llmopt.loadgen.lengths import Lengths
    from llmopt.loadgen.workload import FileShape, Shape

    shape = Shape(
        Lengths.parse(options["prompt_len"], "--prompt-len"),
        Lengths.parse(options["output_len"], "--output-len"),
        options["shared_prefixes"],
        options["prefix_len"],
        options["vocab_size"],
        options["endpoint"] == "chat",
    )
    source = options["source"]
    ends = {} if options["stop_at_eos"] else {"ignore_eos": True}
    extra = {"temperature": options["temperature"], **ends, **parse_body(options["body"])}
    endpoint = Endpoint(
        url,
        options["endpoint"],
        options["model"],
        options["api_key"],
        not options["no_stream"],
        options["timeout"],
        extra,
    )
    load = Load(
        shape if source is None else FileShape.read(source, shape),
        options["requests"],
        options["rate"],
        options["arrival"],
        options["burst_size"],
        options["concurrency"],
        options["warmup"],
        seed,
        options["label"],
    )
    return endpoint, load


def parse_body(text: str) -> dict[str, Any]:
    """A JSON object; raises ConfigError for anything else."""
    import json

    from llmopt.errors import ConfigError

    try:
        body = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"not JSON: {error}", where="--body") from error
    if not isinstance(body, dict):
        raise ConfigError("expected a JSON object", where="--body")
    return body


def show(summary: dict[str, Any]) -> None:
    """The figures for people; a client that may have shaped them is said so in the last line."""
    client, failed = summary["client"], summary["failed"]
    emit_pairs(
        [
            ("model", f"{summary['model']} at {summary['url']}"),
            *([("label", summary["label"])] if summary["label"] else []),
            ("load", summary["load"]),
            (
                "requests",
                f"{summary['succeeded']} answered, {failed} failed, {summary['peak_running']} at once at most",
            ),
            ("tokens", f"{summary['prompt_tokens']} in, {summary['output_tokens']} out"),
            ("throughput", f"{summary['output_tok_s']} output tok/s, {summary['requests_s']} requests/s"),
            ("goodput", f"{summary['goodput_s']} requests/s, {summary['goodput_share']:.1%} meet {slo_text(summary)}"),
            *(("failed", f"{count} x {what}") for what, count in summary["errors"].items()),
        ]
    )
    click.echo()
    heads = ("mean", "p50", "p90", "p95", "p99", "max")
    rows = [("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("ITL", "itl_ms"), ("end to end", "e2e_ms")]
    table = [(name, *(summary[key][h] if summary[key] else None for h in heads)) for name, key in rows]
    table.append(("client lag", *(client["loop_lag_ms"][h] if client["loop_lag_ms"] else None for h in heads)))
    emit_table(("ms", *heads), table)
    if client["bottleneck"]:
        what = f"the client used {client['cpu_share']:.0%} of a core and its loop was late: it shaped these figures"
        click.secho(f"warning: {what}", fg="yellow", err=True)


def slo_text(summary: dict[str, Any]) -> str:
    """``ttft 250 ms, itl 25 ms``."""
    return ", ".join(f"{name} {bound:g} ms" for name, bound in summary["slo_ms"].items()) or "no bound (answered)"
