"""Two processes: killing either is visible, shutdown drains, clients that leave are forgotten, ports collide."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

from llmopt.errors import ResourceError
from llmopt.serve.server import listen
from tests.serve.conftest import CLIENT, gone, until

SLOW = {"sleep": 0.05}
LONG = {"prompt": "Hi", "temperature": 0, "max_tokens": 80}


def health(server):
    return CLIENT.get(f"{server.url}/health")


def refuses(server):
    """Whether its port is closed."""
    try:
        socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))).close()
    except ConnectionRefusedError:
        return True
    return False


class Background(threading.Thread):
    """A request in another thread; ``lines`` grows as a stream comes in."""

    def __init__(self, server, **body):
        super().__init__(daemon=True)
        self.url, self.body, self.lines, self.response, self.seconds = server.url, body, [], None, 0.0
        self.start()

    def run(self):
        with (
            contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError),  # some tests kill the server
            httpx.stream("POST", f"{self.url}/v1/completions", json=self.body, timeout=30) as response,
        ):
            self.response = response
            self.lines.extend(line for line in response.iter_lines() if line)

    def error(self):
        """The error body, of a refused request or at the end of a stream."""
        self.join(10)
        assert not self.is_alive()
        return json.loads(self.lines[-1].removeprefix("data: "))["error"]


def test_a_dead_engine_fails_requests_at_once_and_ends_the_server(start):
    server = start(SLOW)
    stream, whole = Background(server, **LONG, stream=True), Background(server, **LONG)
    until(lambda: len(stream.lines) > 3 and health(server).json()["active_requests"] == 2)
    os.kill(server.engine_pid(), signal.SIGKILL)
    killed = time.monotonic()
    assert "the engine process died (signal 9)" in stream.error()["message"]
    assert "the engine process died (signal 9)" in whole.error()["message"]
    assert whole.response.status_code == 503
    assert time.monotonic() - killed < 3  # the answers take four seconds
    assert health(server).status_code == 503
    assert "signal 9" in health(server).json()["error"]
    assert CLIENT.post(f"{server.url}/v1/completions", json=LONG).status_code == 503
    assert server.wait() == (12, "error: the engine process died (signal 9)\n")


def test_a_request_that_may_draw_nothing_ends_alone(start):
    """At once it is refused as a whole; on its way its stream ends with the error; the others go on."""
    server = start({"sleep": 0.01, "dead_end": [7, 6]})
    other = Background(server, **LONG, stream=True)
    asked = {**LONG, "prompt": [7, 8, 9]}
    whole, stream = Background(server, **asked), Background(server, **asked, stream=True)
    at_once = Background(server, **{**asked, "prompt": [7] * 6}, stream=True)
    error = {
        "message": "no token is allowed (the grammar or the bias forbids all)",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }
    assert [request.error() for request in (whole, stream, at_once)] == [error] * 3
    assert [r.response.status_code for r in (whole, stream, at_once)] == [400, 200, 400]
    assert len(stream.lines) > 1
    other.join(10)
    assert other.lines[-1] == "data: [DONE]"
    until(lambda: health(server).json()["active_requests"] == 0)
    assert health(server).status_code == 200


def test_a_failing_executor_is_reported_with_its_reason(start):
    server = start({"fail_at": 3})
    request = Background(server, **LONG)
    assert request.error() == {
        "message": "the device is gone",
        "type": "service_unavailable",
        "param": None,
        "code": "engine_unavailable",
    }
    assert server.wait() == (12, "error: the device is gone\n")


def test_when_the_api_process_dies_the_engine_exits(start):
    server = start(SLOW)
    Background(server, **LONG, stream=True)
    until(lambda: health(server).json()["active_requests"] == 1)
    engine = server.engine_pid()
    server.process.kill()
    assert gone(engine)


def test_an_idle_engine_exits_too(start):
    server = start()
    engine = server.engine_pid()
    server.process.kill()
    assert gone(engine)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(start, number):
    server = start(SLOW)
    stream = Background(server, **{**LONG, "max_tokens": 20}, stream=True)
    until(lambda: len(stream.lines) > 2)
    engine = server.engine_pid()
    server.process.send_signal(number)
    until(lambda: refuses(server))
    stream.join(10)
    assert stream.lines[-1] == "data: [DONE]"
    assert '"finish_reason": "length"' in stream.lines[-2]
    assert server.wait() == (0, "")
    assert gone(engine)


def test_a_signal_to_the_whole_group_drains_too(start):
    server = start(SLOW)
    stream = Background(server, **{**LONG, "max_tokens": 20}, stream=True)
    until(lambda: len(stream.lines) > 2)
    os.kill(server.engine_pid(), signal.SIGTERM)
    os.kill(server.engine_pid(), signal.SIGINT)
    server.process.send_signal(signal.SIGTERM)
    stream.join(10)
    assert stream.lines[-1] == "data: [DONE]"
    assert server.wait()[0] == 0


def test_draining_has_an_end(start):
    server = start({"sleep": 0.2}, drain_seconds=1)
    stream = Background(server, **LONG, stream=True)
    until(lambda: len(stream.lines) > 1)
    server.process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    assert server.wait()[0] == 0
    assert time.monotonic() - begun < 12  # the answer takes sixteen seconds


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_forgotten(start, stream):
    server = start({"sleep": 0.3})
    body = json.dumps({**LONG, "stream": stream, "n": 2}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head + body)
        until(lambda: health(server).json()["active_requests"] == 2)
    until(lambda: health(server).json()["active_requests"] == 0, seconds=10)  # the answer itself takes 24 seconds


def test_an_artifact_that_does_not_load_ends_the_server_with_its_code(start):
    server = start({"load_error": "expected sha256 a, found b"})
    assert server.url == ""
    assert server.wait() == (9, "error: manifest.json: expected sha256 a, found b\n")


def test_a_signal_while_loading_ends_the_server(start, root, embedded_model):
    import subprocess
    import sys

    command = [sys.executable, "-m", "tests.serve.fake_server", str(embedded_model), "{}", '{"load_sleep": 30}']
    process = subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until(children.read_text)  # the engine process has begun, so the handlers are in place
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    assert process.wait(20) == 0
    assert time.monotonic() - begun < 15  # loading takes thirty seconds


def test_a_port_in_use_is_a_resource_error(start, server):
    port = int(server.url.rpartition(":")[2])
    second = start(port=port)
    assert second.wait() == (10, f"error: port {port} is in use on 127.0.0.1 (choose another --port)\n")


def test_an_address_nobody_has_is_a_resource_error():
    with pytest.raises(ResourceError, match="cannot listen on"):
        listen("192.0.2.1", 0)
    with pytest.raises(ResourceError, match=r"cannot listen on no\.such\.host\.invalid"):
        listen("no.such.host.invalid", 0)


def test_requests_share_the_engine(start):
    """Four requests together take about as long as one: they are batched, not queued."""
    server = start({"sleep": 0.1})
    begun = time.monotonic()
    requests = [Background(server, **{**LONG, "max_tokens": 15}) for _ in range(4)]
    for request in requests:
        request.join(20)
    assert len({json.loads(r.lines[0])["choices"][0]["text"] for r in requests}) == 1
    assert time.monotonic() - begun < 5
