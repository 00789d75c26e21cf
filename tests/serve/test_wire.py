"""The wire protocol: round trips, frames cut anywhere, peers that send rubbish or leave."""

import asyncio
import socket
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.errors import OverloadError, QueueFullError, RequestError
from llmopt.runtime.core import TokenOutput
from llmopt.runtime.params import GenerationParams, Grammar
from llmopt.runtime.protocol import Sampled, SamplingParams
from llmopt.serve.wire import (
    MAX_FRAME,
    Add,
    Cancel,
    Channel,
    Fatal,
    Ping,
    Pong,
    Ready,
    Refused,
    Stop,
    Tokens,
    WireError,
    decode,
    encode,
    read_message,
)

IDS, NUMBERS = st.integers(0, 2**31), st.floats(-100, 100)
SAMPLING = st.builds(
    SamplingParams,
    temperature=NUMBERS,
    top_k=IDS,
    logit_bias=st.dictionaries(IDS, NUMBERS, max_size=3),
    seed=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    logprobs=st.one_of(st.none(), st.integers(0, 20)),
)
PARAMS = st.builds(
    GenerationParams,
    SAMPLING,
    st.one_of(st.none(), IDS),
    st.lists(st.text(), max_size=3).map(tuple),
    st.lists(IDS, max_size=3).map(tuple),
    st.booleans(),
    st.one_of(st.none(), st.builds(Grammar, st.sampled_from(["json_schema", "regex", "lark"]), st.text())),
    st.one_of(st.none(), IDS),
    IDS,
    st.text(),
    st.one_of(st.none(), NUMBERS),
)
SAMPLED = st.builds(
    Sampled, IDS, st.one_of(st.none(), NUMBERS), st.lists(st.tuples(IDS, NUMBERS), max_size=3).map(tuple)
)
PROMPTS = st.lists(SAMPLED, max_size=2).map(tuple)
REASONS = st.sampled_from([None, "stop", "length"])
OUTPUTS = st.builds(TokenOutput, IDS, SAMPLED, REASONS) | st.builds(
    TokenOutput, IDS, SAMPLED, REASONS, PROMPTS, IDS, NUMBERS
)
ERRORS = st.one_of(st.builds(RequestError, st.text()), st.builds(QueueFullError, st.text(), retry_after=NUMBERS))
MESSAGES = st.one_of(
    st.builds(Ready, IDS, IDS, IDS, IDS),
    st.builds(Fatal, IDS, st.text()),
    st.builds(Add, IDS, st.lists(IDS, max_size=5), PARAMS),
    st.builds(Cancel, IDS),
    st.builds(Refused.of, IDS, ERRORS),
    st.builds(Ping, IDS),
    st.builds(Pong, IDS, st.dictionaries(st.text(), NUMBERS, max_size=3)),
    st.builds(Tokens, st.lists(OUTPUTS, max_size=3)),
    st.just(Stop()),
)


@settings(max_examples=300)
@given(MESSAGES)
def test_a_message_survives_the_wire(message):
    frame = encode(message)
    assert struct.unpack(">I", frame[:4])[0] == len(frame) - 4
    assert decode(frame[4:]) == message


@settings(max_examples=50, deadline=None)
@given(st.lists(MESSAGES, min_size=1, max_size=5), st.data())
def test_frames_may_arrive_in_any_pieces(messages, data):
    ours, theirs = socket.socketpair()
    with ours, theirs, Channel(ours) as channel:
        got = []
        stream = b"".join(map(encode, messages))
        cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
        for start, stop in zip([0, *cuts], [*cuts, len(stream)]):
            theirs.sendall(stream[start:stop])
            got += channel.receive(wait=False)
        assert got == messages
        theirs.close()
        with pytest.raises(WireError, match="closed"):
            channel.receive(wait=True)


def test_the_async_side_reads_what_the_channel_sends():
    async def talk():
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        with theirs, Channel(theirs) as channel:
            channel.send(Refused(1, "é"))
            channel.send(Stop())
            assert [await read_message(reader) for _ in range(2)] == [Refused(1, "é"), Stop()]
        with pytest.raises(WireError, match="closed"):
            await read_message(reader)
        writer.close()
        await writer.wait_closed()

    asyncio.run(talk())


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[1,2]", b'["Nothing",{}]', b'["Cancel",{}]', b'["Cancel",{"request":1,"x":2}]', b"\xff"]
)
def test_rubbish_is_a_wire_error(data):
    with pytest.raises(WireError, match="not a message"):
        decode(data)


def test_a_frame_that_is_too_long_is_refused_before_it_is_read():
    ours, theirs = socket.socketpair()
    with ours, theirs, Channel(ours) as channel:
        theirs.sendall(struct.pack(">I", MAX_FRAME + 1))
        with pytest.raises(WireError, match="a frame of"):
            channel.receive(wait=True)


def test_sending_to_a_peer_that_left_is_a_wire_error():
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, Channel(ours) as channel, pytest.raises(WireError, match="closed"):
        channel.send(Stop())


def test_errors_keep_their_class_and_their_time():
    error = Refused.of(3, QueueFullError("too many", retry_after=2.5)).error()
    assert isinstance(error, QueueFullError)
    assert (str(error), error.retry_after) == ("too many", 2.5)
    assert not isinstance(Refused.of(3, RequestError("no")).error(), OverloadError)


def test_another_thread_can_wake_a_waiting_channel():
    ours, theirs = socket.socketpair()
    with ours, theirs, Channel(ours) as channel:
        timer = threading.Timer(0.05, channel.wake)
        timer.start()
        assert channel.receive(wait=True) == []
        timer.join()
        theirs.sendall(encode(Stop()))
        assert channel.receive(wait=True) == [Stop()]
        channel.close()
        channel.wake()
