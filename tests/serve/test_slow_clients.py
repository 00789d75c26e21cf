"""Clients that send slowly, or much: their connections end in time, and nobody else waits for them."""

import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.serve.conftest import fake_server, running

LIMIT = 1.0
"""Seconds for a head, then for a body."""
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
BODY = b'{"prompt": "Hi", "max_tokens": 2, "temperature": 0}'
LENGTH = b"content-length: %d\r\n\r\n" % len(BODY)


@pytest.fixture(scope="module")
def quick(root, embedded_model):
    """A server of little patience."""
    with running(fake_server(embedded_model, limits={"receive_seconds": LIMIT}), root) as found:
        yield found


class Slow(threading.Thread):
    """A client that sends ``pieces`` with a pause after each, and then a byte now and then until it is cut off.

    ``answer``: what it got; ``seconds``: how long its connection lasted.
    """

    def __init__(self, server, *pieces, pause=0.0, drip=b"x"):
        super().__init__(daemon=True)
        self.pieces, self.pause, self.drip, self.answer, self.seconds = pieces, pause, drip, b"", 0.0
        host, port = server.url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)))
        self.start()

    def run(self):
        begun = time.monotonic()
        self.socket.settimeout(0.1)
        left = list(self.pieces)
        with self.socket:
            while time.monotonic() < begun + 8 * LIMIT:
                try:
                    if left or self.drip:
                        self.socket.sendall(left.pop(0) if left else self.drip)
                        time.sleep(self.pause)
                    if not (found := self.socket.recv(1 << 16)):
                        break
                    self.answer += found
                except TimeoutError:
                    continue
                except OSError:
                    break
        self.seconds = time.monotonic() - begun

    def end(self):
        """Seconds and status (None: it got no answer)."""
        self.join(10 * LIMIT)
        assert not self.is_alive()
        return self.seconds, int(self.answer.split()[1]) if self.answer else None


@pytest.mark.parametrize(
    ("pieces", "drip", "status"),
    [
        ((), b"", None),
        ((HEAD,), b"x", 408),
        ((HEAD + LENGTH,), b" ", 408),
        ((HEAD + b"transfer-encoding: chunked\r\n\r\n",), b"1\r\n \r\n", 408),
        ((b"GET /health HTTP/1.1\r\nhost: a\r\n" + LENGTH,), b" ", 200),
        ((HEAD + LENGTH + BODY,), b"G", 200),
    ],
    ids=["nothing", "head", "body", "chunks", "body nobody reads", "second head"],
)
def test_a_slow_request_ends_in_time(quick, pieces, drip, status):
    seconds, got = Slow(quick, *pieces, drip=drip).end()
    assert got == status
    assert 0.7 * LIMIT <= seconds <= 3.5 * LIMIT


def test_a_patient_server_waits(server):
    """Negative control: with the default of a minute the same client is still connected."""
    slow = Slow(server, HEAD)
    slow.join(1.5 * LIMIT)
    assert slow.is_alive()
    slow.socket.shutdown(socket.SHUT_RDWR)


def test_a_slow_head_is_told_why(quick):
    slow = Slow(quick, HEAD)
    slow.end()
    head, _, body = slow.answer.partition(b"\r\n\r\n")
    assert b"408" in head.splitlines()[0]
    assert json.loads(body)["error"]["message"] == "the head of the request took more than 1 seconds to arrive"


def test_a_request_in_pieces_that_comes_in_time_is_answered(quick):
    pieces = [HEAD[:20], HEAD[20:], LENGTH[:9], LENGTH[9:], BODY[:10], BODY[10:]]
    slow = Slow(quick, *pieces, pause=0.01, drip=b"")
    until = time.monotonic() + 5 * LIMIT
    while b"usage" not in slow.answer and time.monotonic() < until:
        time.sleep(0.05)
    assert slow.answer.startswith(b"HTTP/1.1 200")


def test_a_connection_lives_between_requests_and_as_long_as_its_answer(quick):
    """Neither an idle connection nor an answer that takes longer than the limit counts as slow."""
    with httpx.Client(base_url=quick.url) as client:
        client.get("/health")
        time.sleep(1.5 * LIMIT)
        connection = next(iter(client._transport._pool.connections))
        assert client.get("/health").status_code == 200
        assert list(client._transport._pool.connections) == [connection]


def test_two_hundred_slow_clients_stop_nobody(quick):
    slow = [Slow(quick, HEAD if i % 2 else HEAD + LENGTH, pause=0.3) for i in range(200)]
    with httpx.Client(base_url=quick.url, timeout=10) as client:
        for _ in range(5):
            assert client.post("/v1/completions", content=BODY).status_code == 200
    assert {client.end()[1] for client in slow} == {408}


def test_connections_beyond_the_limit_are_told_so(start):
    """Those that are open go on, probes are answered, and a connection that ends makes room."""
    server = start(limits={"connections": 2})
    with httpx.Client(base_url=server.url) as first, httpx.Client(base_url=server.url) as second:
        for client in (first, second):
            assert client.post("/v1/completions", content=BODY).status_code == 200
        with httpx.Client(base_url=server.url) as third:
            refused = third.post("/v1/completions", content=BODY)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json()["error"]["code"] == "too_many_connections"
            assert third.post("/v1/completions", content=BODY * 20_000).status_code == 503
            for path in ("/health", "/metrics"):
                assert third.get(path).status_code == 200
        assert first.post("/v1/completions", content=BODY).status_code == 200
    until = time.monotonic() + 10
    while httpx.post(f"{server.url}/v1/completions", content=BODY).status_code != 200:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_files_are_allowed_for_every_connection():
    code = "import resource as r; from llmopt.serve.process import allow_files, OTHER_FILES as more; "
    code += "hard = r.getrlimit(r.RLIMIT_NOFILE)[1]; r.setrlimit(r.RLIMIT_NOFILE, (64, hard)); allow_files(300); "
    code += "print(r.getrlimit(r.RLIMIT_NOFILE)[0] == 300 + more); allow_files(10); "
    code += "print(r.getrlimit(r.RLIMIT_NOFILE)[0] == 300 + more); allow_files(1 << 60); "
    code += "print(r.getrlimit(r.RLIMIT_NOFILE)[0] == hard)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 3, done.stderr


BIG = 10 << 20
BODIES = {
    "text": ("completions", {"prompt": "word " * (BIG // 5)}),
    "ids": ("completions", {"prompt": [12345] * (BIG // 7)}),
    "prompts": ("completions", {"prompt": ["a"] * (BIG // 5)}),
    "lists": ("completions", {"prompt": [[1, 2, 3]] * (BIG // 11)}),
    "messages": ("chat/completions", {"messages": [{"role": "user", "content": "Hi"}] * (BIG // 35)}),
}


def resident(pid):
    """Bytes of memory a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_ten_megabytes_stop_nobody(server):
    """Bodies of 10 MB one after the other; meanwhile /health is asked, and short texts are completed.

    A wait is what the server itself computed during it: other processes may take the machine as long as they like.
    """
    done, found = threading.Event(), {}
    clock, before = ~server.process.pid << 3 | 2, resident(server.process.pid)  # as clock_getcpuclockid(3) has it

    def send(name):
        path, body = BODIES[name]
        found[name] = httpx.post(f"{server.url}/v1/{path}", content=json.dumps(body), timeout=60).status_code

    def send_all():
        for name in BODIES:
            send(name)
        done.set()

    sender = threading.Thread(target=send_all)
    sender.start()
    health, texts = [], []
    with httpx.Client(base_url=server.url, timeout=20) as client:
        while not done.is_set():
            for times, ask in ((health, lambda: client.get("/health")),
                               (texts, lambda: client.post("/v1/completions", content=BODY))):  # fmt: skip
                begun = time.clock_gettime(clock)
                assert ask().status_code == 200
                times.append(time.clock_gettime(clock) - begun)
            time.sleep(0.005)
    sender.join()
    assert set(found.values()) == {400}
    assert statistics.median(health) < 0.05
    assert max(health) < 3  # a text of 10 MB alone took 12 s
    assert max(texts) < 4
    until = time.monotonic() + 30
    while resident(server.process.pid) > before + (64 << 20):  # it was 1.5 GB
        assert time.monotonic() < until, "the memory was not given back"
        time.sleep(0.1)
