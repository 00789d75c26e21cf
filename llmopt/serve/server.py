"""Runs the API process: binds the port, starts the engine process, serves until told to stop or the engine dies."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import uvicorn

from llmopt.errors import LlmoptError, ResourceError
from llmopt.runtime.chat import ChatTemplate
from llmopt.runtime.grammar import GrammarCompiler
from llmopt.runtime.tokenizer import Tokenizer
from llmopt.serve.answer import Model
from llmopt.serve.app import Access, build_app
from llmopt.serve.client import EngineClient
from llmopt.serve.connection import bounded_connections
from llmopt.serve.engine_process import EngineOptions
from llmopt.serve.health import Canary
from llmopt.serve.limits import Limits
from llmopt.serve.process import allow_files, favour_the_loop, keep_what_is_loaded
from llmopt.serve.tools import ToolFormat
from llmopt.serve.wire import Ready

if TYPE_CHECKING:
    from llmopt.artifact.manifest import Golden

EngineCommand: TypeAlias = Callable[[int], Sequence[str]]
"""The command line of the engine process, given the number of its socket's descriptor."""

KEEP_ALIVE_SECONDS = 75
"""An idle connection stays open longer than clients and proxies keep theirs (60 s): closing first loses requests."""
DEAD_SECONDS = 2.0
"""How long /health says 503 after the engine died, before this process exits."""


@dataclass(frozen=True)
class ServerOptions:
    """Where to listen, for whom, and what is known of the model.

    ``drain_seconds``: how long a shutdown waits for running requests. ``stuck_seconds``: silence of the engine after
    which it counts as dead. ``form``: the format of tool calls (None: the template's). ``eos_token_ids`` and
    ``golden``: of the artifact, for grammars and deep health.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str = "model"
    drain_seconds: int = 30
    stuck_seconds: float = 60.0
    form: ToolFormat | None = None
    eos_token_ids: tuple[int, ...] = ()
    golden: tuple[Golden, ...] = ()
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket (port 0: any free one). Raises ResourceError when the address cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        # asyncio turns Nagle's algorithm off only on sockets that name TCP: without it a stream waits 40 ms to begin.
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ResourceError(f"cannot listen on {host}: {error.strerror or error}", hint="check --host") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ResourceError(f"port {port} is in use on {host}", hint="choose another --port") from error
        raise ResourceError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return listener


def engine_command(options: EngineOptions) -> EngineCommand:
    """How to start the engine process."""
    return lambda fd: [sys.executable, "-m", "llmopt.serve.engine_process", str(fd), options.to_json()]


class _Server(uvicorn.Server):
    """uvicorn, leaving signals to us: it would end the process by the signal instead of an exit code."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    options: ServerOptions,
    command: EngineCommand,
    tokenizer: Tokenizer,
    chat: ChatTemplate | None,
    announce: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain. ``announce`` gets the base URL once requests are answered.

    Raises ResourceError when the port is taken, the engine's typed error when it could not load or died.
    """
    listener = listen(options.host, options.port)
    favour_the_loop()
    allow_files(options.limits.connections)
    with listener:
        asyncio.run(_serve(options, command, tokenizer, chat, announce, listener))


async def _serve(
    options: ServerOptions,
    command: EngineCommand,
    tokenizer: Tokenizer,
    chat: ChatTemplate | None,
    announce: Callable[[str], None],
    listener: socket.socket,
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    client, log = EngineClient(command), options.access.log
    watching: asyncio.Task[None] | None = None
    try:
        connecting = asyncio.create_task(client.connect())
        if not await _first(connecting, stop):
            return
        model = _model(options, tokenizer, chat, await connecting)
        watching = asyncio.create_task(client.watch(min(1.0, options.stuck_seconds / 4), options.stuck_seconds))
        config = uvicorn.Config(
            build_app(model, client, options.access, Canary.of(options.golden, model.engine.context)),
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=options.drain_seconds,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            http=bounded_connections(options.limits.receive_seconds, options.limits.connections),
            ws="none",
        )
        server = _Server(config)
        keep_what_is_loaded()
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        announce(_url(listener))
        log("serving", url=_url(listener), model=model.name, context=model.engine.context)
        if not await _first(asyncio.create_task(client.died.wait()), stop, serving):
            log("draining", active_requests=client.active, seconds=options.drain_seconds)
            server.should_exit = True
        else:
            log("engine died", error=str(client.failure))
            await asyncio.sleep(DEAD_SECONDS)
            server.should_exit = server.force_exit = True
        await serving
        if client.failure is not None:
            raise client.failure
        log("stopped")
    finally:
        if watching is not None:
            watching.cancel()
        await client.close()


def _model(options: ServerOptions, tokenizer: Tokenizer, chat: ChatTemplate | None, engine: Ready) -> Model:
    grammars = GrammarCompiler(tokenizer, engine.vocab_size, options.eos_token_ids)
    named = (options.model_name, tokenizer, chat, engine, int(time.time()))
    return Model(*named, form=options.form, grammars=grammars, limits=options.limits)


async def _first(wanted: asyncio.Task[object], stop: asyncio.Event, *others: asyncio.Task[object]) -> bool:
    """Whether ``wanted`` is done before ``stop`` is set (or one of the others ends); it is cancelled if not."""
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait((wanted, stopped, *others), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if wanted.done():
        return True
    wanted.cancel()
    with contextlib.suppress(asyncio.CancelledError, LlmoptError):
        await wanted
    return False


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
