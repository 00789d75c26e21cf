"""llmopt serve: the OpenAI API over an artifact."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import click

from llmopt.serve.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])


def settings(command: F) -> F:
    """One option for every setting, in their order."""
    kinds = get_type_hints(Settings)
    for setting in reversed(fields(Settings)):
        command = _option(setting, kinds[setting.name])(command)
    return command


def _option(setting: Field[Any], kind: Any) -> Callable[[F], F]:
    name, default = setting.name.replace("_", "-"), setting.default
    shown = "" if default in (None, ()) else f"  [default: {default}]"
    what, kinds = setting.metadata["what"] + shown, [k for k in get_args(kind) if k is not type(None)] or [kind]
    if kind is bool:
        return click.option(f"--{name}/--no-{name}", default=None, help=what)
    if isinstance(default, tuple):
        return click.option(f"--{name}", multiple=True, help=what)
    if all(isinstance(k, str) for k in kinds):
        return click.option(f"--{name}", type=click.Choice(kinds), default=None, help=what)
    parsed = click.Path(path_type=Path) if kinds == [Path] else kinds[0]
    return click.option(f"--{name}", type=parsed, default=None, help=what)


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--config", type=click.Path(path_type=Path), help="serve.yaml: the settings below by their names.")
@settings
def serve(artifact: Path, config: Path | None, **given: Any) -> None:
    """Serve ARTIFACT over HTTP with OpenAI's API (docs/serving.md); flags go over the settings of --config.

    SIGTERM and Ctrl-C stop it after running requests have ended. API keys come from --api-keys-file and from
    LLMOPT_API_KEYS (separated by commas). Exit codes: 3 settings, 9 artifact, 10 port in use or missing library,
    12 the engine died or is stuck.
    """
    import_server()
    from llmopt.artifact import Artifact
    from llmopt.runtime.session import load_chat, load_tokenizer
    from llmopt.serve import server
    from llmopt.serve.app import Access
    from llmopt.serve.config import load_options, load_settings, request_limits, scheduler_options
    from llmopt.serve.engine_process import EngineOptions
    from llmopt.serve.logs import Log
    from llmopt.serve.security import load_keys
    from llmopt.serve.tools import tool_format

    told = load_settings(config, {name: value for name, value in given.items() if value not in (None, ())})
    log, keys = Log(told.log == "json"), load_keys(told.api_keys_file, os.environ)
    if told.public and not len(keys):
        log("warning", message=f"{told.host} may be reached by others and no API key is set")
    # The engine process checks every digest; this one reads the tokenizer and nothing else.
    opened = Artifact.open(artifact, weights=told.weights, verify=False)
    weights = None if told.weights is None else str(told.weights)
    options = server.ServerOptions(
        host=told.host,
        port=told.port,
        model_name=told.served_model_name or opened.manifest.model,
        drain_seconds=told.drain_seconds,
        stuck_seconds=told.stuck_seconds,
        form=None if told.tool_format is None else tool_format(told.tool_format),
        eos_token_ids=tuple(opened.manifest.eos_token_ids),
        golden=tuple(opened.manifest.golden),
        limits=request_limits(told),
        access=Access(keys, told.cors_origins, log),
    )
    server.serve(
        options,
        server.engine_command(
            EngineOptions(str(artifact), weights, load_options(told), scheduler_options(told), told.engine_nice)
        ),
        load_tokenizer(opened),
        load_chat(opened),
        lambda url: click.echo(f"serving {options.model_name} on {url}"),
    )


def import_server() -> None:
    """Raises ResourceError when the server's libraries are not installed."""
    from importlib.util import find_spec

    from llmopt.errors import ResourceError

    needed = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
    if missing := [package for module, package in needed.items() if find_spec(module) is None]:
        raise ResourceError(f"serving needs {' and '.join(missing)}", hint="pip install 'llmopt[serve]'")
