"""The engine process: loads the artifact, runs the engine core, speaks the wire protocol with the API process.

Started by the API process as ``python -m llmopt.serve.engine_process FD OPTIONS``, FD being its end of a socket
pair. It lives as long as that socket: when the API process dies, it exits.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from llmopt.errors import LlmoptError, RequestError
from llmopt.runtime.core import EngineCore
from llmopt.serve.wire import VERSION, Add, Cancel, Channel, Fatal, Message, Ready, Refused, Stop, Tokens, WireError
from llmopt.target import LoadOptions

INTERNAL = 70


@dataclass(frozen=True)
class EngineOptions:
    """What the engine process loads."""

    artifact: str
    weights: str | None
    load: LoadOptions

    def to_json(self) -> str:
        """For the command line of the process."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> EngineOptions:
        """Inverse of to_json."""
        raw: dict[str, Any] = json.loads(text)
        return EngineOptions(raw["artifact"], raw["weights"], LoadOptions(**raw["load"]))


def load_core(options: EngineOptions) -> EngineCore:
    """Open the artifact, checking every digest, and load its executor."""
    from llmopt.artifact import Artifact
    from llmopt.runtime.executors import load_executor

    artifact = Artifact.open(options.artifact, weights=options.weights, defer=True)
    return EngineCore(load_executor(artifact, options.load), artifact.manifest.eos_token_ids)


class EngineLoop:
    """Takes messages between steps; waits for one when there is nothing to do."""

    def __init__(self, core: EngineCore, channel: Channel) -> None:
        self.core, self.channel = core, channel
        self._theirs: dict[int, int] = {}
        self._ours: dict[int, int] = {}

    def run(self) -> None:
        """Until the API process says stop (or is gone: WireError)."""
        limits = self.core.limits
        self.channel.send(Ready(VERSION, self.core.context, limits.vocab_size, limits.max_sequences))
        while True:
            for message in self.channel.receive(wait=not self.core.has_work):
                if isinstance(message, Stop):
                    return
                self._handle(message)
            self._step()

    def _handle(self, message: Message) -> None:
        match message:
            case Add(request, prompt, params):
                try:
                    ours = self.core.add(prompt, params)
                except RequestError as error:
                    self.channel.send(Refused(request, str(error)))
                else:
                    self._theirs[ours], self._ours[request] = request, ours
            case Cancel(request):
                if (cancelled := self._ours.pop(request, None)) is not None:
                    del self._theirs[cancelled]
                    self.core.cancel(cancelled)
            case _:
                raise WireError(f"unexpected message {message!r}")

    def _step(self) -> None:
        outputs = self.core.step()
        if not outputs:
            return
        named = [replace(output, request_id=self._theirs[output.request_id]) for output in outputs]
        for output, theirs in zip(outputs, named):
            if output.finish_reason:
                del self._theirs[output.request_id], self._ours[theirs.request_id]
        self.channel.send(Tokens(named))


def run_engine(descriptor: int, load: Callable[[], EngineCore]) -> int:
    """Serve one API process over an inherited socket and return the exit code of this process."""
    # Ctrl-C and a SIGTERM to the whole group reach both processes; the API process drains, then tells this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as connection:
        channel = Channel(connection)
        try:
            core = load()
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
    return run_engine(int(sys.argv[1]), lambda: load_core(options))


if __name__ == "__main__":
    sys.exit(main())
