"""An engine in this process behind the interface the API process has to the other one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from llmopt.runtime.core import EngineCore, TokenOutput
from llmopt.runtime.params import GenerationParams

SETTLE = 16
"""Turns of the event loop after a step that ended a request: enough for its answer to be complete, the next begun."""

_Item = TokenOutput | Exception


class LocalClient:
    """Steps an engine core between the turns of the event loop, as long as anyone waits for tokens."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._queues: dict[int, asyncio.Queue[_Item]] = {}
        self._stepping: asyncio.Task[None] | None = None

    async def generate(self, prompt: list[int], params: GenerationParams) -> AsyncGenerator[TokenOutput, None]:
        """Tokens of one request as they come. Leaving early cancels it. Raises RequestError or ExecutorError."""
        request = self._core.add(prompt, params)
        queue = self._queues[request] = asyncio.Queue()
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._step())
        try:
            while True:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            del self._queues[request]
            self._core.cancel(request)

    async def _step(self) -> None:
        """Until nobody waits. A step that fails ends every request."""
        try:
            while self._queues:
                outputs = self._core.step()
                for output in outputs:
                    self._give(output.request_id, output)
                for failure in self._core.failures():
                    self._give(failure.request_id, failure.error)
                for _ in range(SETTLE if any(output.finish_reason for output in outputs) else 1):
                    await asyncio.sleep(0)
        except Exception as error:
            for request in self._queues:
                self._give(request, error)

    def _give(self, request: int, item: _Item) -> None:
        if (queue := self._queues.get(request)) is not None:
            queue.put_nowait(item)
