"""The kinds of requests a soak mixes: well-formed, abandoned, malformed, too large, slow; each says how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from llmopt.loadgen.http import HttpError, HttpPool
from llmopt.loadgen.sse import EventParser

HUNG_SECONDS = 120.0
"""A request without an end by then is hung."""
SHED = (429, 503)
SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}},
    "required": ["yes"],
    "additionalProperties": False,
}


@dataclass
class Outcome:
    """How one request ended: ``answered``, ``refused``, ``shed`` (429 or 503) or ``left`` are right; ``lost``, ``hung``
    and ``wrong`` are not, and ``detail`` says what happened."""

    kind: str
    ended: str
    detail: str = ""


@dataclass
class Soak:
    """What the clients share. ``known``: greedy answers already seen, by prompt and length: they must not change."""

    pool: HttpPool
    context: int
    vocab: int
    rng: random.Random
    known: dict[str, str] = field(default_factory=dict)

    def body(self, longest: int = 24) -> dict[str, Any]:
        """A greedy completion of one of a few hundred prompts, some of which share a prefix."""
        which = self.rng.randrange(300)
        draw = random.Random(which)
        shared = [17 + i for i in range(self.context // 4)] if which % 3 == 0 else []
        prompt = shared + [draw.randrange(3, self.vocab) for _ in range(1 + which % 12)]
        return {"prompt": prompt, "max_tokens": self.rng.randint(1, longest), "temperature": 0, "ignore_eos": True}

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, bytes]:
        """Status and body."""
        parts: list[bytes] = []
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        status = await self.pool.request("POST", path, content, lambda data, at: parts.append(data), **headers)
        return status, b"".join(parts)

    def same(self, body: dict[str, Any], text: str) -> str:
        """Empty, or what is wrong: a greedy answer must begin as every other of its prompt does."""
        key, text = json.dumps(body["prompt"]), text.rstrip("\ufffd")  # a character may be cut by max_tokens
        before = self.known.get(key, "")
        if not (before.startswith(text) or text.startswith(before)):
            return f"the answer changed: {before[:60]!r} then {text[:60]!r}"
        self.known[key] = max(before, text, key=len)
        return ""


def wrong_unless_shed(kind: str, status: int, content: bytes) -> Outcome:
    """The outcome of a status nobody expected."""
    if status in SHED:
        return Outcome(kind, "shed")
    return Outcome(kind, "wrong", f"{status}: {content[:200]!r}")


async def whole(soak: Soak) -> Outcome:
    """An answer in one body."""
    body = soak.body()
    status, content = await soak.post("/v1/completions", body)
    if status != 200:
        return wrong_unless_shed("whole", status, content)
    answer = json.loads(content)
    count = answer["usage"]["completion_tokens"]
    problem = soak.same(body, answer["choices"][0]["text"])
    if count != body["max_tokens"]:
        problem = f"{count} tokens instead of {body['max_tokens']}"
    return Outcome("whole", "wrong" if problem else "answered", problem)


async def streamed(soak: Soak, kind: str = "streamed", **changes: Any) -> Outcome:
    """A stream must end once: one finish reason a choice, one [DONE], nothing after."""
    body = {**soak.body(), "stream": True, **changes}
    events, parser = [], EventParser()
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    if "messages" in body:
        del body["prompt"]
    parts: list[bytes] = []

    def take(data: bytes, at: float) -> None:
        parts.append(data)
        events.extend(parser.feed(data))

    status = await soak.pool.request("POST", path, json.dumps(body).encode(), take)
    if status != 200:
        return wrong_unless_shed(kind, status, b"".join(parts))
    if not events or events.count(b"[DONE]") != 1 or events[-1] != b"[DONE]":
        last = events[-1][:200] if events else b""
        return Outcome(kind, "lost", f"the stream ended with {last!r}")
    found = [json.loads(event) for event in events[:-1]]
    choices = [choice for event in found for choice in event["choices"]]
    ends = [choice["index"] for choice in choices if choice["finish_reason"]]
    if sorted(ends) != list(range(body.get("n", 1))):
        return Outcome(kind, "wrong", f"choices that ended: {ends}")
    if "prompt" in body and "n" not in body:
        problem = soak.same(body, "".join(choice["text"] for choice in choices))
        return Outcome(kind, "wrong" if problem else "answered", problem)
    return Outcome(kind, "answered")


async def several(soak: Soak) -> Outcome:
    """Three choices of one prompt in one stream."""
    return await streamed(soak, "several", n=3, temperature=1.0)


async def chat(soak: Soak) -> Outcome:
    """A conversation."""
    messages = [{"role": "user", "content": f"Say {soak.rng.randrange(99)}"}]
    return await streamed(soak, "chat", messages=messages)


async def long(soak: Soak) -> Outcome:
    """A prompt that leaves the context one block at most."""
    size = soak.context - soak.rng.randint(2, 16)
    body = {"prompt": [soak.rng.randrange(3, soak.vocab) for _ in range(size)], "max_tokens": 16, "ignore_eos": True}
    status, content = await soak.post("/v1/completions", body)
    return Outcome("long", "answered") if status == 200 else wrong_unless_shed("long", status, content)


async def constrained(soak: Soak) -> Outcome:
    """An answer that must be JSON of a schema, or be cut by its length."""
    form = {"type": "json_schema", "json_schema": {"name": "yes", "schema": SCHEMA, "strict": True}}
    body = {"messages": [{"role": "user", "content": "Yes?"}], "max_tokens": 24, "response_format": form}
    status, content = await soak.post("/v1/chat/completions", body)
    if status != 200:
        return wrong_unless_shed("constrained", status, content)
    choice = json.loads(content)["choices"][0]
    try:
        right = choice["finish_reason"] == "length" or set(json.loads(choice["message"]["content"])) == {"yes"}
    except ValueError:
        right = False
    return Outcome("constrained", "answered" if right else "wrong", "" if right else str(choice)[:200])


async def cancelled(soak: Soak) -> Outcome:
    """A client that leaves while its answer is streamed."""
    seen = asyncio.Event()
    body = {**soak.body(longest=soak.context // 2), "stream": True}
    body["max_tokens"] = soak.context // 2
    work = asyncio.create_task(
        soak.pool.request("POST", "/v1/completions", json.dumps(body).encode(), lambda data, at: seen.set())
    )
    await asyncio.wait((work, asyncio.create_task(seen.wait())), return_when=asyncio.FIRST_COMPLETED)
    await asyncio.sleep(soak.rng.random() * 0.05)
    return await _leave("cancelled", work)


async def left(soak: Soak) -> Outcome:
    """A client that leaves before it was answered."""
    work = asyncio.create_task(soak.post("/v1/completions", soak.body(longest=64)))
    await asyncio.sleep(soak.rng.random() * 0.1)
    return await _leave("left", work)


async def _leave(kind: str, work: asyncio.Task[Any]) -> Outcome:
    work.cancel()
    with contextlib.suppress(asyncio.CancelledError, HttpError):
        await work
    return Outcome(kind, "left")


REFUSALS: dict[str, tuple[Callable[[Soak], Any], int]] = {
    "malformed": (lambda soak: b'{"prompt": "a", ', 400),
    "not utf-8": (lambda soak: b'{"prompt": "\xff"}', 400),
    "deep": (lambda soak: b"[" * 20_000, 400),
    "unknown field": (lambda soak: {"prompt": "a", "temperatur": 1}, 400),
    "bad value": (lambda soak: {"prompt": "a", "temperature": -1}, 400),
    "too long": (lambda soak: {"prompt": [7] * (soak.context + 1)}, 400),
    "no such token": (lambda soak: {"prompt": [1 << 40], "echo": True}, 400),
    "too many": (lambda soak: {"prompt": "a", "n": 129}, 400),
    "another model": (lambda soak: {"prompt": "a", "model": "gpt"}, 404),
    "too long by far": (lambda soak: {"prompt": "a " * 200_000}, 400),
    "too large": (lambda soak: b" " * (17 << 20), 413),
}
"""Bodies nobody can answer, the rarer the further down, each with the status it must get."""


async def refused(soak: Soak) -> Outcome:
    """A request nobody can answer must get its 4xx."""
    names = list(REFUSALS)
    return await refusal(names[min(int(soak.rng.expovariate(0.4)), len(names) - 1)])(soak)


def refusal(name: str) -> Callable[[Soak], Awaitable[Outcome]]:
    """The kind that sends one of REFUSALS."""
    body, wanted = REFUSALS[name]

    async def refused(soak: Soak) -> Outcome:
        try:
            status, content = await soak.post("/v1/completions", body(soak))
        except (HttpError, OSError) as error:
            # a server may close the connection on a body it will not read
            return Outcome("refused", "refused" if name == "too large" else "lost", f"{name}: {error}")
        if status == wanted:
            return Outcome("refused", "refused")
        return Outcome("refused", "wrong", f"{name}: {status}: {content[:200]!r}")

    return refused


async def duplicate(soak: Soak) -> Outcome:
    """Two requests at once under the same id: both are answered."""
    name = f"same-{soak.rng.randrange(1 << 30)}"
    both = await asyncio.gather(*(soak.post("/v1/completions", soak.body(), **{"x-request-id": name}) for _ in "ab"))
    bad = [(status, content) for status, content in both if status != 200]
    return wrong_unless_shed("duplicate", *bad[0]) if bad else Outcome("duplicate", "answered")


async def slow(soak: Soak) -> Outcome:
    """A client that sends its request a byte at a time and gives up."""
    _, writer = await asyncio.open_connection(soak.pool.address.host, soak.pool.address.port)
    try:
        for byte in b"POST /v1/completions HTTP/1.1\r\nhost: soak\r\ncontent-length: 100\r\n\r\n{"[
            : soak.rng.randint(5, 70)
        ]:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.02)
    except OSError:
        pass
    writer.transport.abort()
    return Outcome("slow", "left")


STREAMER = """
import sys, urllib.request
body = b'{"prompt": "Call me", "max_tokens": 60, "stream": true, "ignore_eos": true}'
request = urllib.request.Request(sys.argv[1], body, {"content-type": "application/json"})
with urllib.request.urlopen(request) as answer:
    print(answer.read(1), flush=True)
    answer.read()
    input()
"""


async def killed(soak: Soak) -> Outcome:
    """A client process that is killed while it reads its stream."""
    address = soak.pool.address
    url = f"http://{address.host}:{address.port}/v1/completions"
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-S", "-c", STREAMER, url, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL
    )
    assert process.stdout is not None
    await process.stdout.readline()
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
    return Outcome("killed", "left")


KINDS: dict[Callable[[Soak], Awaitable[Outcome]], float] = {
    whole: 30, streamed: 30, several: 4, chat: 6, long: 3, constrained: 3, cancelled: 9, left: 4, refused: 8,
    duplicate: 2, slow: 1, killed: 0.5,
}  # fmt: skip
"""Each kind and its share of a hundred requests."""


async def one(soak: Soak, kind: Callable[[Soak], Awaitable[Outcome]]) -> Outcome:
    """Run one request to its end, whatever it is."""
    try:
        async with asyncio.timeout(HUNG_SECONDS):
            return await kind(soak)
    except TimeoutError:
        return Outcome(kind.__name__, "hung")
    except (HttpError, OSError) as error:
        return Outcome(kind.__name__, "lost", f"{type(error).__name__}: {error}")
    except (ValueError, LookupError, TypeError) as error:
        return Outcome(kind.__name__, "wrong", f"not an answer of OpenAI's form: {error!r}")
