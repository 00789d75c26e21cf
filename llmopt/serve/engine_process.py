"""The engine process: loads the artifact, runs the engine core, speaks the wire protocol with the API process.

Started by the API process as ``python -m llmopt.serve.engine_process FD OPTIONS``, FD being its end of a socket
pair. It lives as long as that socket: when the API process dies, it exits.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from queue import SimpleQueue
from typing import Any

from llmopt.errors import LlmoptError, RequestError, ResourceError
from llmopt.runtime.core import EngineCore
from llmopt.runtime.fairness import QueueOptions
from llmopt.runtime.grammar import GrammarCompiler
from llmopt.runtime.options import SchedulerOptions
from llmopt.runtime.swap import SwapOptions
from llmopt.serve.process import keep_what_is_loaded
from llmopt.serve.stats import engine_stats
from llmopt.serve.wire import (
    VERSION,
    Add,
    Cancel,
    Channel,
    Fatal,
    Message,
    Ping,
    Pong,
    Ready,
    Refused,
    Stop,
    Tokens,
    WireError,
)
from llmopt.target import LoadOptions

INTERNAL = 70


@dataclass(frozen=True)
class EngineOptions:
    """What the engine process loads, and how it schedules. ``nice``: how far it stands back on cores it shares."""

    artifact: str
    weights: str | None
    load: LoadOptions
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    nice: int = 0

    def to_json(self) -> str:
        """For the command line of the process."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> EngineOptions:
        """Inverse of to_json."""
        raw: dict[str, Any] = json.loads(text)
        how = raw["scheduler"]
        nested = {"queue": QueueOptions(**how["queue"]), "swap": SwapOptions(**how["swap"])}
        scheduler = SchedulerOptions(**{**how, **nested})
        return EngineOptions(raw["artifact"], raw["weights"], LoadOptions(**raw["load"]), scheduler, raw["nice"])


def load_core(options: EngineOptions) -> EngineCore:
    """Open the artifact, checking every digest, and load its executor."""
    from llmopt.artifact import Artifact
    from llmopt.runtime.executors import load_executor
    from llmopt.runtime.session import load_tokenizer

    artifact = Artifact.open(options.artifact, weights=options.weights, defer=True)
    executor, ends = load_executor(artifact, options.load), artifact.manifest.eos_token_ids
    grammars = GrammarCompiler(load_tokenizer(artifact), executor.limits.vocab_size, ends)
    return EngineCore(executor, ends, grammars, options.scheduler)


class EngineLoop:
    """Takes messages between steps; waits for one when there is nothing to do.

    A grammar that is not known yet is compiled by another thread, while the others' steps go on.
    """

    def __init__(self, core: EngineCore, channel: Channel) -> None:
        self.core, self.channel = core, channel
        self._theirs: dict[int, int] = {}
        self._ours: dict[int, int] = {}
        self._compiling: dict[int, Add] = {}
        self._compiled: SimpleQueue[int] = SimpleQueue()
        self._compiler = ThreadPoolExecutor(1, "compile")

    def run(self) -> None:
        """Until the API process says stop (or is gone: WireError)."""
        limits = self.core.limits
        self.channel.send(Ready(VERSION, self.core.context, limits.vocab_size, limits.max_sequences))
        while True:
            for message in self.channel.receive(wait=not self.core.has_work):
                if isinstance(message, Stop):
                    return
                self._handle(message)
            self._add_compiled()
            self._step()

    def _handle(self, message: Message) -> None:
        match message:
            case Add(request, _, params):
                compiler = self.core.constraints.compiler
                if params.grammar is None or compiler is None or compiler.knows(params.grammar):
                    self._add(message)
                else:
                    self._compiling[request] = message
                    done = self._compiler.submit(compiler.compile, params.grammar)
                    done.add_done_callback(lambda _: self._compiled.put(request))
                    done.add_done_callback(lambda _: self.channel.wake())
            case Ping(number):
                self.channel.send(Pong(number, engine_stats(self.core)))
            case Cancel(request):
                self._compiling.pop(request, None)
                if (cancelled := self._ours.pop(request, None)) is not None:
                    del self._theirs[cancelled]
                    self.core.cancel(cancelled)
            case _:
                raise WireError(f"unexpected message {message!r}")

    def _add(self, message: Add) -> None:
        try:
            ours = self.core.add(message.prompt, message.params)
        except RequestError as error:
            self.channel.send(Refused.of(message.request, error))
        except ResourceError as error:
            self.channel.send(Refused(message.request, str(error)))
        else:
            self._theirs[ours], self._ours[message.request] = message.request, ours

    def _add_compiled(self) -> None:
        """Start the requests whose grammar has been compiled (or turned out to be wrong, which ``add`` says again)."""
        while not self._compiled.empty():
            if (message := self._compiling.pop(self._compiled.get(), None)) is not None:
                self._add(message)

    def _step(self) -> None:
        outputs = self.core.step()
        for output in outputs:
            ours, output.request_id = output.request_id, self._theirs[output.request_id]
            if output.finish_reason:
                del self._theirs[ours], self._ours[output.request_id]
        if outputs:
            self.channel.send(Tokens(outputs))
        for failure in self.core.failures():
            request = self._theirs.pop(failure.request_id)
            del self._ours[request]
            self.channel.send(Refused.of(request, failure.error))


def run_engine(descriptor: int, load: Callable[[], EngineCore]) -> int:
    """Serve one API process over an inherited socket and return the exit code of this process."""
    # Ctrl-C and a SIGTERM to the whole group reach both processes; the API process drains, then tells this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as connection, Channel(connection) as channel:
        try:
            core = load()
            keep_what_is_loaded()
            try:
                EngineLoop(core, channel).run()
            finally:
                core.close()
            return 0
        except WireError:
            return 0  # the API process is gone: nobody is left to serve
        except LlmoptError as error:
            return _die(channel, Fatal(error.exit_code, str(error)))
        except Exception as error:
            traceback.print_exc()
            return _die(channel, Fatal(INTERNAL, f"internal error in the engine: {type(error).__name__}: {error}"))


def _die(channel: Channel, last: Fatal) -> int:
    try:
        channel.send(last)
    except WireError:
        print(f"error: {last.message}", file=sys.stderr)
    return last.exit_code


def main() -> int:
    """Entry point of the process."""
    options = EngineOptions.from_json(sys.argv[2])
    os.nice(options.nice)  # before any thread of the executor exists: each has its own
    return run_engine(int(sys.argv[1]), lambda: load_core(options))


if __name__ == "__main__":
    sys.exit(main())
