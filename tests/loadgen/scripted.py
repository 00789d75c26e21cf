"""An OpenAI server that answers on a schedule: what it measures is known beforehand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading


class Scripted:
    """Streams ``tokens`` pieces: the first after ``first`` seconds, the others ``gap`` apart. Keeps request bodies.

    ``failing``: every so many requests one is refused with 429. ``cut``: streams end before their last event.
    """

    def __init__(self, first=0.05, gap=0.02, tokens=5, failing=0, cut=False):
        self.first, self.gap, self.tokens, self.failing, self.cut = first, gap, tokens, failing, cut
        self.bodies, self.heads, self.running, self.most = [], [], 0, 0

    async def accept(self, reader, writer):
        """One connection."""
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    await self.answer(reader, writer)
        finally:
            writer.transport.abort()

    async def answer(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().partition("content-length:")[2].split()[0])
        content = await reader.readexactly(length)
        self.heads.append(head)
        if head.startswith("GET"):
            return whole(writer, 200, {"data": [{"id": "scripted"}]})
        body = json.loads(content)
        self.bodies.append(body)
        if self.failing and len(self.bodies) % self.failing == 0:
            return whole(writer, 429, {"error": {"message": "too many requests"}})
        self.running += 1
        self.most = max(self.most, self.running)
        await self.generate(writer, body)
        self.running -= 1

    async def generate(self, writer, body):
        usage = {"prompt_tokens": len(body.get("prompt", "...")), "completion_tokens": self.tokens}
        chat = "messages" in body
        if not body.get("stream"):
            await asyncio.sleep(self.first + self.gap * (self.tokens - 1))
            return whole(writer, 200, {"choices": [{"text": "x", "finish_reason": "length"}], "usage": usage})
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        if chat:
            event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for i in range(self.tokens):
            await asyncio.sleep(self.gap if i else self.first)
            piece = {"delta": {"content": "x"}} if chat else {"text": "x"}
            event(writer, {"choices": [{**piece, "finish_reason": None if i + 1 < self.tokens else "length"}]})
        event(writer, {"choices": [], "usage": usage})
        if not self.cut:
            chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")


def whole(writer, status, body):
    data = json.dumps(body).encode()
    writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(data), data))


def event(writer, body):
    chunk(writer, b"data: " + json.dumps(body).encode() + b"\n\n")


def chunk(writer, data):
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


@contextlib.contextmanager
def serving(scripted, tls=None):
    """The base URL of ``scripted``, running in a thread. ``tls``: the SSLContext of an https server."""
    ready, stop, found = threading.Event(), asyncio.Event(), {}

    async def main():
        found["loop"] = asyncio.get_running_loop()
        async with await asyncio.start_server(scripted.accept, "127.0.0.1", 0, ssl=tls) as server:
            found["port"] = server.sockets[0].getsockname()[1]
            ready.set()
            await stop.wait()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=5) if tasks else None
            await asyncio.sleep(0.01)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert ready.wait(5)
        yield f"{'https' if tls else 'http'}://127.0.0.1:{found['port']}"
    finally:
        found["loop"].call_soon_threadsafe(stop.set)
        thread.join(5)
