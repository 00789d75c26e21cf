"""llmopt eval: perplexity of an artifact on a text, and KL and top-1 agreement against a baseline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmopt.cli.output import accuracy_lines, emit_json, emit_pairs, progress_bar
from llmopt.errors import ConfigError, ResourceError
from llmopt.textfile import read_utf8

if TYPE_CHECKING:
    from llmopt.artifact import Artifact
    from llmopt.runtime.protocol import Executor


@click.command("eval")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--text", required=True, type=click.Path(path_type=Path), help="UTF-8 text to score.")
@click.option("--baseline", type=click.Path(path_type=Path), help="A second artifact, or the checkpoint (fp32, torch).")
@click.option("--tokens", type=click.IntRange(2), help="Score the first N tokens only.")
@click.option("--window", default=512, show_default=True, type=click.IntRange(2), help="Tokens a window.")
@click.option("--threads", default=0, type=click.IntRange(0), help="Threads of the executor (0: all cores).")
@click.option("--device", default="cpu", show_default=True, help="Device of the executor: cpu or cuda.")
@click.option("--weights", type=click.Path(path_type=Path), help="Directory of the weights, when kept outside.")
@click.option(
    "--report", type=click.Path(path_type=Path, file_okay=False), help="Write report.json and index.html here."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(
    artifact: Path,
    text: Path,
    baseline: Path | None,
    tokens: int | None,
    window: int,
    threads: int,
    device: str,
    weights: Path | None,
    report: Path | None,
    as_json: bool,
) -> None:
    """Score ARTIFACT on a text: consecutive windows, each from an empty state, all next tokens.

    With --baseline also the relative change of perplexity, the KL divergence from the baseline's distribution, and how
    often both rank the same token first, each with its 95% interval by block bootstrap over windows; loss and KL by
    position; the tokens that changed most. --report keeps all of it, with plots.
    """
    from llmopt.artifact import Artifact
    from llmopt.report.evaluate import score, split_windows, summarize
    from llmopt.runtime.executors import load_executor
    from llmopt.target import LoadOptions

    if report is not None and baseline is None:
        raise ConfigError("a report compares with a baseline", where="--report", hint="give --baseline")
    opened = Artifact.open(artifact, weights=weights, defer=True)
    if window > opened.program.max_context:
        raise ConfigError(f"--window {window} exceeds the context of {opened.program.max_context}", where=str(artifact))
    windows = split_windows(tokenize(opened, text), window, tokens)
    options = LoadOptions(device=device, threads=threads, max_sequences=1, max_context=window)
    executor = load_executor(opened, options)
    try:
        with open_baseline(baseline, window, threads) as other, progress_bar(not as_json) as progress:
            result = summarize(score(executor, windows, other, progress))
    finally:
        executor.close()
    result = {"artifact": str(artifact), "text": str(text), "window": window, **result}
    if report is not None:
        write_report(report, result, opened)
    if as_json:
        emit_json(result)
    else:
        emit_pairs(accuracy_lines(result))


def write_report(folder: Path, result: dict[str, Any], artifact: Artifact) -> None:
    """report.json and a self-contained index.html. Raises ResourceError when they cannot be written."""
    import json

    from tokenizers import Tokenizer

    from llmopt.report.page import accuracy_page

    page = accuracy_page(result, artifact.path.name, Tokenizer.from_file(str(artifact.file("tokenizer.json"))))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (folder / "index.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"cannot write the report: {error.strerror}", where=str(folder)) from error


def tokenize(artifact: Artifact, text: Path) -> Any:
    """The text's token ids (n,) int64 by the artifact's tokenizer, without special tokens.

    Raises RequestError for a file that cannot be read as UTF-8, ConfigError for an artifact without tokenizer.
    """
    import numpy as np
    from tokenizers import Tokenizer

    if not artifact.has_file("tokenizer.json"):
        raise ConfigError("the artifact has no tokenizer.json, so text cannot be scored", where=str(artifact.path))
    content = read_utf8(text)
    tokenizer = Tokenizer.from_file(str(artifact.file("tokenizer.json")))
    return np.array(tokenizer.encode(content, add_special_tokens=False).ids, np.int64)


@contextmanager
def open_baseline(path: Path | None, window: int, threads: int) -> Iterator[Executor | None]:
    """The baseline's executor: an artifact's own, or the reference target's over a checkpoint; None without."""
    if path is None:
        yield None
        return
    from llmopt.target import LoadOptions

    options = LoadOptions(threads=threads, max_sequences=1, max_context=window)
    if (path / "manifest.json").is_file():
        from llmopt.artifact import Artifact
        from llmopt.runtime.executors import load_executor

        executor = load_executor(Artifact.open(path, defer=True), options)
    else:
        from llmopt.report.baseline import reference_executor

        executor = reference_executor(path, options)
    try:
        yield executor
    finally:
        executor.close()
