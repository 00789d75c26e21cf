"""llmopt run: generate from an artifact, for a prompt, a chat or a file of requests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llmopt.cli.output import progress_bar

if TYPE_CHECKING:
    from llmopt.runtime.engine import Output
    from llmopt.runtime.session import Session
    from llmopt.serve.requests import ChatRequest, CompletionRequest

F = TypeVar("F", bound=Callable[..., Any])

SAMPLING = (
    click.option("--max-tokens", type=int, default=256, show_default=True, help="Most new tokens."),
    click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
    click.option("--top-k", type=int, default=0, help="Draw from the K likeliest tokens (0: all)."),
    click.option("--top-p", type=float, default=1.0, help="Draw from the likeliest tokens of this share (1: all)."),
    click.option("--min-p", type=float, default=0.0, help="Drop tokens below this share of the likeliest one's."),
    click.option("--repetition-penalty", type=float, default=1.0, help="Above 1 discourages tokens seen before."),
    click.option("--presence-penalty", type=float, default=0.0, help="Subtracted from tokens already generated."),
    click.option("--frequency-penalty", type=float, default=0.0, help="The same, for each time they were."),
    click.option("--seed", type=int, default=None, help="Makes draws repeatable."),
    click.option("--stop", multiple=True, help="End before this string; may be given several times."),
    click.option("--ignore-eos", is_flag=True, help="Go on after an end-of-sequence token."),
)
LOADING = (
    click.option("--device", default="cpu", show_default=True, help="Device of the executor: cpu or cuda."),
    click.option("--threads", default=0, type=click.IntRange(0), help="Threads of the executor (0: all cores)."),
    click.option("--max-sequences", type=click.IntRange(1), help="Sequences a step may hold (default: 1, files 8)."),
    click.option("--max-context", type=click.IntRange(2), help="Longest sequence; default: the artifact's."),
    click.option("--weights", type=click.Path(path_type=Path), help="Directory of the weights, when kept outside."),
)


def options(*groups: tuple[Callable[[F], F], ...]) -> Callable[[F], F]:
    """Applies groups of click options in the order they are read."""

    def apply(function: F) -> F:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return apply


@dataclass(frozen=True)
class Loading:
    """Where the model comes from and how it is loaded."""

    artifact: Path
    weights: Path | None
    device: str
    threads: int
    max_sequences: int
    max_context: int | None

    def open(self) -> Session:
        """The loaded session."""
        from llmopt.runtime.session import open_session
        from llmopt.target import LoadOptions

        load = LoadOptions(self.device, self.threads, self.max_sequences, self.max_context)
        return open_session(self.artifact, load, self.weights)


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", help="Text to continue; with --chat one message to answer. Default: standard input.")
@click.option("--chat", is_flag=True, help="Use the chat template; without --prompt every input line is a message.")
@click.option("--system", help="System message of the chat.")
@click.option("--input", "source", type=click.Path(path_type=Path), help="JSONL file of requests.")
@click.option("--output", type=click.Path(path_type=Path), help="Where answers to --input go (default: stdout).")
@click.option("--served-model-name", help="Model that lines of --input may name (default: the artifact's).")
@click.option("--json", "as_json", is_flag=True, help="Print an answer as one JSON object instead of streaming it.")
@options(SAMPLING, LOADING)
def run(
    artifact: Path,
    prompt: str | None,
    chat: bool,
    system: str | None,
    source: Path | None,
    output: Path | None,
    served_model_name: str | None,
    as_json: bool,
    device: str,
    threads: int,
    max_sequences: int | None,
    max_context: int | None,
    weights: Path | None,
    **sampling: Any,
) -> None:
    """Generate text from ARTIFACT: continue a prompt, chat, or answer a JSONL file.

    A line of --input is {"prompt": ...} or {"messages": ...} with fields of the OpenAI API, which go before the
    flags here, or OpenAI's batch form {"custom_id", "method", "url", "body"}. Answers keep the order of the lines.
    The same command resumes a run with --output that was killed.
    """
    if source is not None and (prompt is not None or chat or system is not None):
        raise click.UsageError("--input goes without --prompt, --chat and --system")
    for flag, value in (("--output", output), ("--served-model-name", served_model_name)):
        if value is not None and source is None:
            raise click.UsageError(f"{flag} needs --input")
    if output is not None and source is not None and output.resolve() == source.resolve():
        raise click.UsageError("--output is the --input file")
    if system is not None and not chat:
        raise click.UsageError("--system needs --chat")
    loading = Loading(artifact, weights, device, threads, max_sequences or (8 if source else 1), max_context)
    fields = {**sampling, "stop": list(sampling["stop"])}
    if source is not None:
        run_file(loading, source, output, served_model_name, fields)
    elif chat:
        run_chat(loading, prompt, system, fields, as_json)
    else:
        run_prompt(loading, prompt, fields, as_json)


def run_prompt(loading: Loading, prompt: str | None, fields: dict[str, Any], as_json: bool) -> None:
    """Continue one prompt."""
    from llmopt.serve.requests import CompletionRequest, parse_request

    text = read_stdin() if prompt is None else prompt
    request = parse_request(CompletionRequest, {**fields, "prompt": text})
    with loading.open() as session:
        answer(session, request, as_json)


def run_chat(loading: Loading, prompt: str | None, system: str | None, fields: dict[str, Any], as_json: bool) -> None:
    """Answer one message, or every line of standard input in one conversation."""
    from llmopt.serve.requests import ChatRequest, parse_request

    messages = [] if system is None else [{"role": "system", "content": system}]
    with loading.open() as session:
        for text in [prompt] if prompt is not None else input_lines():
            messages.append({"role": "user", "content": text})
            request = parse_request(ChatRequest, {**fields, "messages": messages})
            messages.append({"role": "assistant", "content": answer(session, request, as_json)})


def run_file(loading: Loading, source: Path, output: Path | None, served: str | None, fields: dict[str, Any]) -> None:
    """Answer a file; every line is checked before the first one runs."""
    import asyncio

    from llmopt.artifact.digest import sha256_file
    from llmopt.serve.batch import BatchRunner, checked, run_to_file, run_to_stream
    from llmopt.serve.jobs import JobFile

    jobs = JobFile(source, fields)
    with loading.open() as session, progress_bar() as bar:
        name = served or session.artifact.manifest.model
        runner = BatchRunner(session.engine.core, session.tokenizer, session.chat, name)
        checked(jobs, runner)
        resumed = 0

        def progress(done: int, total: int) -> None:
            bar("requests", done, total)

        if output is None:
            failures = asyncio.run(run_to_stream(runner, jobs, sys.stdout.write, progress))
        else:
            identity = {
                "artifact": sha256_file(session.artifact.path / "manifest.json"),
                "defaults": fields,
                "model": name,
                "max_context": loading.max_context,
            }
            resumed, failures = asyncio.run(run_to_file(runner, jobs, output, identity, progress))
    if resumed:
        click.echo(f"resumed: {resumed} of {len(jobs.lines)} requests had been answered before", err=True)
    if failures:
        click.echo(f"{failures} of {len(jobs.lines) - resumed} requests were refused: their lines say why", err=True)


def answer(session: Session, request: CompletionRequest | ChatRequest, as_json: bool) -> str:
    """Generate and print; returns the text."""
    from llmopt.serve.limits import Limits
    from llmopt.serve.prompts import request_prompts

    [(ids, _)] = request_prompts(request, session.tokenizer, session.chat, None, Limits(), session.engine.core.context)
    parts: list[str] = []
    last, tokens = None, []
    for last in generated(session, ids, request):
        if last.error is not None:
            raise last.error
        parts.append(last.delta.text)
        tokens += [t.token for t in last.delta.tokens]
        if not as_json:
            click.echo(last.delta.text, nl=False)
            sys.stdout.flush()
    assert last is not None
    text = "".join(parts)
    if as_json:
        print_json(text, tokens, last)
    else:
        click.echo()
    return text


def print_json(text: str, tokens: list[int], last: Output) -> None:
    """The answer as one line of JSON."""
    import json

    counts = {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.completion_tokens}
    body = {"text": text, "tokens": tokens, "finish_reason": last.delta.finish_reason, "usage": counts}
    click.echo(json.dumps(body, ensure_ascii=False))


def generated(session: Session, ids: list[int], request: CompletionRequest | ChatRequest) -> Iterator[Output]:
    """Outputs of one request until it ends; leaving early cancels it."""
    engine = session.engine
    request_id = engine.add(ids, request.params())
    try:
        while True:
            for output in engine.step():
                yield output
                if output.finished:
                    return
    finally:
        engine.cancel(request_id)


def input_lines() -> Iterator[str]:
    """Messages of a chat: lines of standard input, asked for on a terminal."""
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            click.secho("> ", nl=False, bold=True, err=True)
        raw = sys.stdin.buffer.readline()
        if not raw:
            return
        if line := decode(raw).strip():
            yield line


def read_stdin() -> str:
    """The prompt on standard input."""
    if sys.stdin.isatty():
        raise click.UsageError("give --prompt, --chat or --input, or a prompt on standard input")
    return decode(sys.stdin.buffer.read())


def decode(raw: bytes) -> str:
    """UTF-8 text; raises RequestError naming the first byte that is none."""
    from llmopt.errors import RequestError

    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        what = f"invalid UTF-8: byte {raw[error.start]:#04x}"
        raise RequestError(what, where=f"standard input line {line}") from error
