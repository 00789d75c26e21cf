"""The HTTP client of the load generator: any split of the bytes, kept connections, what is no HTTP."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.errors import ConfigError
from llmopt.loadgen.http import Address, HttpError, HttpPool, ResponseParser, parse_url
from llmopt.loadgen.sse import EventParser

pieces = st.lists(st.binary(min_size=1, max_size=40), max_size=6)
cuts = st.lists(st.integers(1, 30), min_size=1, max_size=50)


def split(data, sizes):
    """``data`` in pieces of ``sizes``, over and over."""
    parts, at, turn = [], 0, 0
    while at < len(data):
        parts.append(data[at : at + sizes[turn % len(sizes)]])
        at += len(parts[-1])
        turn += 1
    return parts


def chunked(parts):
    """A chunked response."""
    body = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in parts)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


def counted(parts):
    """A response of known length, after an interim one."""
    body = b"".join(parts)
    return b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 No\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@settings(deadline=None)
@given(pieces, cuts)
def test_a_response_is_the_same_however_its_bytes_are_cut(parts, sizes):
    for wire, status in ((chunked(parts), 200), (counted(parts), 503)):
        parser = ResponseParser()
        found = b"".join(parser.feed(piece) for piece in split(wire, sizes))
        assert (found, parser.status, parser.done, parser.keep_alive) == (b"".join(parts), status, True, True)


@settings(deadline=None)
@given(st.lists(st.text("ab\u00e9 :", max_size=8), max_size=8), cuts)
def test_events_are_the_same_however_their_bytes_are_cut(payloads, sizes):
    wire = "".join(f": comment\r\ndata: {p}\r\n\r\n" for p in payloads).encode()
    parser = EventParser()
    found = [p for piece in split(wire, sizes) for p in parser.feed(piece)]
    assert found == [p.strip().encode() for p in payloads]


def test_a_body_without_length_ends_with_the_connection():
    parser = ResponseParser()
    assert parser.feed(b"HTTP/1.0 200 OK\r\n\r\nall of it") == b"all of it"
    parser.close()
    assert parser.done
    assert not parser.keep_alive


@pytest.mark.parametrize(
    "wire",
    [b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab",
     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"],
)  # fmt: skip
def test_what_is_no_http_is_an_error(wire):
    with pytest.raises(HttpError):
        ResponseParser().feed(wire)


@pytest.mark.parametrize("wire", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab", chunked([b"a"])[:-3]])
def test_an_answer_cut_short_is_an_error(wire):
    parser = ResponseParser()
    parser.feed(wire)
    with pytest.raises(HttpError, match="closed the connection"):
        parser.close()


def test_addresses():
    assert parse_url("http://h:1/v1/") == Address("h", 1, "/v1", False)
    assert parse_url("https://h") == Address("h", 443, "", True)
    for bad in ("h:1", "ftp://h", "http://", "http://h:x", "http://h/?a=1"):
        with pytest.raises(ConfigError, match="http://HOST:PORT"):
            parse_url(bad)


def served(answers, exchanges):
    """Runs ``exchanges(pool)`` against a server giving ``answers`` (bytes, keep open?) a connection each in turn."""

    async def go():
        connections = []

        async def accepted(reader, writer):
            connections.append(writer)
            for answer, keep in answers[len(connections) - 1]:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(answer)
                if not keep:
                    break
            else:
                await reader.read()
            writer.close()

        server = await asyncio.start_server(accepted, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            pool = HttpPool(Address("127.0.0.1", port, "", False), {})
            result = await exchanges(pool)
            pool.close()
            await asyncio.sleep(0.01)
        return result, len(connections)

    return asyncio.run(go())


async def get(pool):
    """Status and body of one request."""
    parts = []
    status = await pool.request("GET", "/", b"", lambda data, at: parts.append(data))
    return status, b"".join(parts)


def test_connections_are_kept_and_replaced_when_the_server_closed_them():
    async def three(pool):
        first = await get(pool)
        second = await get(pool)
        await asyncio.sleep(0.05)  # the server closes the connection, unasked
        return first, second, await get(pool)

    ok = chunked([b"hi"])
    answers = [[(ok, True), (ok, False)], [(ok, True)]]
    assert served(answers, three) == (((200, b"hi"),) * 3, 2)


def test_a_connection_that_breaks_off_is_no_answer():
    async def broken(pool):
        with pytest.raises(HttpError):
            await get(pool)

    assert served([[(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhi", False)]], broken) == (None, 1)
    assert served([[(b"", False)]], broken) == (None, 1)
