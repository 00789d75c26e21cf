"""The API process's side of the engine: starts the process, hands out requests, notices its death."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import subprocess
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol

from llmopt.errors import ExecutorError, LlmoptError
from llmopt.runtime.core import TokenOutput
from llmopt.runtime.params import GenerationParams
from llmopt.serve.wire import (
    VERSION,
    Add,
    Cancel,
    Fatal,
    Message,
    Ping,
    Pong,
    Ready,
    Refused,
    Stop,
    Tokens,
    encode,
    read_message,
)
from llmopt.serve.wire import WireError as Closed

STOP_SECONDS = 10.0
"""How long the engine process may take to exit once told to."""


class TokenSource(Protocol):
    """What answers requests by tokens: an engine process, or an engine in this one."""

    def generate(self, prompt: list[int], params: GenerationParams) -> AsyncGenerator[TokenOutput, None]:
        """Tokens of one request as they come. Leaving early cancels it. Raises RequestError or ExecutorError."""


_Item = TokenOutput | LlmoptError


class EngineClient:
    """One engine process and the requests it works on.

    ``command``: the command line of the process, given the number of its socket's descriptor.
    """

    def __init__(self, command: Callable[[int], Sequence[str]]) -> None:
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(command(theirs.fileno()), pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL)
        theirs.close()
        self._socket = ours
        self.died: asyncio.Event = asyncio.Event()
        self.failure: LlmoptError | None = None
        self._queues: dict[int, asyncio.Queue[_Item]] = {}
        self.stats: dict[str, float] = {}
        """What the engine counts, as of its last answer to ``watch``."""
        self._heard = False
        self._ids = itertools.count(1)
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def alive(self) -> bool:
        """Whether requests can be served."""
        return self._writer is not None and not self.died.is_set()

    @property
    def active(self) -> int:
        """Requests without an end."""
        return len(self._queues)

    async def connect(self) -> Ready:
        """Wait until the artifact is loaded. Raises the engine's own typed error when it cannot be."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._socket)
        try:
            message = await read_message(reader)
        except Closed:
            message = await self._post_mortem()
        if isinstance(message, Ready) and message.version == VERSION:
            self._reading = asyncio.create_task(self._read(reader))
            return message
        self._fail(_error_of(message) if isinstance(message, Fatal) else ExecutorError(f"unexpected {message!r}"))
        assert self.failure is not None
        raise self.failure

    async def generate(self, prompt: list[int], params: GenerationParams) -> AsyncGenerator[TokenOutput, None]:
        """Tokens of one request as they come. Leaving early cancels it. Raises RequestError or ExecutorError."""
        request, queue = next(self._ids), asyncio.Queue[_Item]()
        if self.failure is not None:
            raise self.failure
        self._queues[request] = queue
        finished = False
        try:
            self._send(Add(request, prompt, params))
            while not finished:
                item = await queue.get()
                if isinstance(item, LlmoptError):
                    finished = True
                    raise item
                finished = item.finish_reason is not None
                yield item
        finally:
            del self._queues[request]
            if not finished:
                self._send(Cancel(request))

    async def watch(self, interval: float, patience: float) -> None:
        """Ask the engine every ``interval`` seconds whether it lives; kill it once it is silent for ``patience``.

        It answers between two steps, so a step that never ends is silence too.
        """
        silent = 0
        for number in itertools.count(1):
            self._heard = False
            self._send(Ping(number))
            await asyncio.sleep(interval)
            silent = 0 if self._heard else silent + 1
            if silent * interval >= patience and not self._stopping:
                self._fail(ExecutorError(f"the engine has been silent for {silent * interval:g} seconds: it is stuck"))
                self.process.kill()
                return

    async def close(self) -> None:
        """Stop the process: ask, wait, kill. Requests still running are dropped."""
        self._stopping = True
        self._send(Stop())
        if self._writer is not None:
            self._writer.close()
        else:
            self._socket.close()
        if self._reading is not None:  # else it is still loading, and nothing is lost
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self.process.wait, STOP_SECONDS)
        if self.process.poll() is None:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading

    def _send(self, message: Message) -> None:
        if self._writer is not None and not self._writer.is_closing() and not self.died.is_set():
            self._writer.write(encode(message))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                message = await read_message(reader)
                self._heard = True
                match message:
                    case Tokens(outputs):
                        for output in outputs:
                            self._give(output.request_id, output)
                    case Refused(request):
                        self._give(request, message.error())
                    case Pong(_, stats):
                        self.stats = stats
                    case Fatal():
                        self._fail(_error_of(message))
                        return
                    case _:
                        raise Closed(f"unexpected message {message!r}")
        except Closed:
            if not self._stopping:
                self._fail(_error_of(await self._post_mortem()))

    def _give(self, request: int, item: _Item) -> None:
        queue = self._queues.get(request)
        if queue is not None:  # otherwise cancelled while the message was under way
            queue.put_nowait(item)

    def _fail(self, error: LlmoptError) -> None:
        """The engine is dead: every request learns it now. The first reason is the one that counts."""
        if self.failure is not None:
            return
        self.failure = error
        self.died.set()
        for queue in self._queues.values():
            queue.put_nowait(error)

    async def _post_mortem(self) -> Fatal:
        """What the exit status of the silent process says."""
        try:
            status = await asyncio.to_thread(self.process.wait, 1.0)
        except subprocess.TimeoutExpired:
            return Fatal(ExecutorError.exit_code, "the engine process closed its connection")
        how = f"signal {-status}" if status < 0 else f"exit code {status}"
        return Fatal(ExecutorError.exit_code, f"the engine process died ({how})")


def _error_of(fatal: Fatal) -> LlmoptError:
    """The typed error a Fatal message stands for; one of an unknown code counts as the executor's."""
    classes = {c.exit_code: c for c in LlmoptError.__subclasses__()}
    cls = classes.get(fatal.exit_code, ExecutorError)
    return cls(fatal.message)
