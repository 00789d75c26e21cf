"""Streams begin at once: accepted connections send small writes without waiting for acknowledgements."""

import asyncio
import contextlib
import socket

from llmopt.serve.server import listen


async def nodelay(listener):
    """TCP_NODELAY of a connection asyncio accepts on ``listener``."""
    found = asyncio.get_running_loop().create_future()

    async def accepted(reader, writer):
        found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async with await asyncio.start_server(accepted, sock=listener):
        _, writer = await asyncio.open_connection(*listener.getsockname()[:2])
        value = await asyncio.wait_for(found, 5)
        writer.close()
        return value


def test_small_writes_leave_at_once():
    with contextlib.closing(listen("127.0.0.1", 0)) as listener:
        assert asyncio.run(nodelay(listener)) != 0


def test_a_socket_that_does_not_name_tcp_delays_them():
    """Negative control: what the listener did before, 40 ms a first token."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        assert asyncio.run(nodelay(listener)) == 0
