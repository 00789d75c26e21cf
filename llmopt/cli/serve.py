"""llmopt serve: the OpenAI API over an artifact."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free port.")
@click.option("--served-model-name", help="Name of the model in the API (default: the artifact's).")
@click.option("--device", default="cpu", show_default=True, help="Device of the executor: cpu or cuda.")
@click.option("--threads", default=0, type=click.IntRange(0), help="Threads of the executor (0: all cores).")
@click.option(
    "--max-sequences", default=8, show_default=True, type=click.IntRange(1), help="Sequences a step may hold."
)
@click.option("--max-context", type=click.IntRange(2), help="Longest sequence; default: the artifact's.")
@click.option("--weights", type=click.Path(path_type=Path), help="Directory of the weights, when kept outside.")
@click.option("--drain-seconds", default=30, show_default=True, type=click.IntRange(0),
              help="How long a shutdown waits for running requests.")  # fmt: skip
def serve(
    artifact: Path,
    host: str,
    port: int,
    served_model_name: str | None,
    device: str,
    threads: int,
    max_sequences: int,
    max_context: int | None,
    weights: Path | None,
    drain_seconds: int,
) -> None:
    """Serve ARTIFACT over HTTP: /v1/completions, /v1/chat/completions, /v1/models, /health, /version.

    SIGTERM and Ctrl-C stop it after running requests have ended. Exit codes: 9 artifact, 10 port in use or
    missing library, 12 the engine died.
    """
    import_server()
    from llmopt.artifact import Artifact
    from llmopt.runtime.session import load_chat, load_tokenizer
    from llmopt.serve import server
    from llmopt.serve.engine_process import EngineOptions
    from llmopt.target import LoadOptions

    # The engine process checks every digest; this one reads the tokenizer and nothing else.
    opened = Artifact.open(artifact, weights=weights, verify=False)
    tokenizer = load_tokenizer(opened)
    load = LoadOptions(device, threads, max_sequences, max_context)
    options = EngineOptions(str(artifact), None if weights is None else str(weights), load)
    name = served_model_name or opened.manifest.model
    server.serve(
        server.ServerOptions(host, port, name, drain_seconds),
        server.engine_command(options),
        tokenizer,
        load_chat(opened),
        lambda url: click.echo(f"serving {name} on {url}"),
    )


def import_server() -> None:
    """Raises ResourceError when the server's libraries are not installed."""
    from importlib.util import find_spec

    from llmopt.errors import ResourceError

    if missing := [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]:
        raise ResourceError(f"serving needs {' and '.join(missing)}", hint="pip install 'llmopt[serve]'")
