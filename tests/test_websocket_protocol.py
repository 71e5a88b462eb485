"""One connection as a state machine: RFC 6455 §5 to §8, bytes against bytes."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peers import raw_frame

from moltis import (
    CloseCode,
    ConnectionClosed,
    CutText,
    Frame,
    FrameParser,
    Opcode,
    WebSocketProtocol,
    encode_close,
)

TEXT, BINARY, MORE = Opcode.TEXT, Opcode.BINARY, Opcode.CONTINUATION
PING = Opcode.PING


@pytest.fixture
def server():
    return WebSocketProtocol(client=False)


@pytest.fixture
def client():
    return WebSocketProtocol(client=True)


def to_server(opcode, payload=b"", *, fin=True):
    """Return a frame as a client sends it."""
    return raw_frame(opcode, payload, fin=fin, masked=True)


def to_client(opcode, payload=b""):
    """Return a frame as a server sends it."""
    return raw_frame(opcode, payload)


def receive_all(protocol, data=b""):
    """Return every message that `data` brings."""
    first = protocol.receive(data)
    return [first, *iter(protocol.receive, None)] if first is not None else []


def sent(protocol):
    """Return the frames that a protocol has to send."""
    parser = FrameParser(masked=protocol.client, max_frame=1 << 30)
    parser.feed(protocol.outgoing())
    return list(iter(parser.next_frame, None))


def close_frame(code, reason=""):
    return Frame(Opcode.CLOSE, encode_close(code, reason))


def closing(protocol):
    """Return code and reason of a close."""
    error = protocol.closed_error()
    assert error.code == protocol.close_code
    return error.code, error.reason


def connect(protocol, other):
    """Carry bytes between the two until neither has any; return what they received."""
    received = {protocol: [], other: []}
    while True:
        to_other, to_protocol = protocol.outgoing(), other.outgoing()
        if not to_other and not to_protocol:
            return received[protocol], received[other]
        received[other] += receive_all(other, to_other)
        received[protocol] += receive_all(protocol, to_protocol)


# --- messages --------------------------------------------------------------------


@pytest.mark.parametrize(
    "message", ["", "hi", "äöü€😀", b"", b"\x00\xff", "x" * 70_000]
)
def test_messages_arrive_as_they_were_sent(server, client, message):
    """RFC 6455 §5.6"""
    client.send(message)
    assert connect(client, server) == ([], [message])
    server.send(message)
    assert connect(client, server) == ([message], [])


def test_a_client_masks_and_a_server_does_not(server, client):
    """RFC 6455 §5.1"""
    server.send("hi")
    assert server.outgoing() == b"\x81\x02hi"
    client.send("hi")
    data = client.outgoing()
    assert data[:2] == b"\x81\x82"
    assert len(data) == 8


def test_half_a_surrogate_pair_is_sent_as_a_question_mark(server):
    """RFC 6455 §8.1: it has no UTF-8, and a file's name may hold one."""
    server.send("caf\udce9")
    assert server.outgoing() == b"\x81\x04caf?"


def test_anything_like_bytes_can_be_sent(server):
    server.send(bytearray(b"ab"))
    server.send(memoryview(b"cd"))
    assert server.outgoing() == b"\x82\x02ab\x82\x02cd"


def test_many_messages_in_one_read_cost_no_quadratic_copying(server):
    data = to_server(BINARY, b"x") * 8000
    receive_all(server, data)  # so that CPython's own reserves are filled
    server.receive(data)
    tracemalloc.start()
    try:
        assert sum(1 for _ in iter(server.receive, None)) == 7999
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 1024


def test_messages_come_out_one_at_a_time(server):
    data = to_server(TEXT, b"one") + to_server(TEXT, b"two")
    assert server.receive(data) == "one"
    assert server.receive() == "two"
    assert server.receive() is None


def test_an_answer_goes_out_before_what_the_next_bytes_bring_about(server):
    """The echo of a message, and then the failure for what came in the same read."""
    assert server.receive(to_server(TEXT, b"hi") + b"\xff\xff") == "hi"
    server.send("hi")
    assert server.receive() is None
    assert sent(server) == [Frame(TEXT, b"hi"), close_frame(1002)]


def test_a_fragmented_message_is_put_together(server):
    """RFC 6455 §5.4"""
    data = (
        to_server(TEXT, b"one ", fin=False)
        + to_server(MORE, b"two ", fin=False)
        + to_server(MORE, b"", fin=False)
        + to_server(MORE, b"three")
    )
    assert receive_all(server, data) == ["one two three"]


def test_control_frames_are_answered_inside_a_fragmented_message(server):
    """RFC 6455 §5.4"""
    data = (
        to_server(BINARY, b"one ", fin=False)
        + to_server(Opcode.PING, b"?")
        + to_server(Opcode.PONG, b"unasked")
        + to_server(MORE, b"two")
    )
    assert receive_all(server, data) == [b"one two"]
    assert sent(server) == [Frame(Opcode.PONG, b"?")]


def test_a_continuation_of_nothing_fails_the_connection_with_1002(server):
    """RFC 6455 §5.4"""
    assert receive_all(server, to_server(MORE, b"x")) == []
    assert sent(server) == [close_frame(1002)]


def test_a_message_inside_another_fails_the_connection_with_1002(server):
    """RFC 6455 §5.4"""
    data = to_server(TEXT, b"x", fin=False) + to_server(TEXT, b"y")
    assert receive_all(server, data) == []
    assert sent(server) == [close_frame(1002)]


def test_an_unmasked_frame_fails_the_connection_with_1002(server):
    """RFC 6455 §5.1"""
    server.receive(b"\x81\x02hi")
    assert server.outgoing() == b"\x88\x02\x03\xea"


def test_a_masked_frame_fails_a_clients_connection_with_1002(client):
    """RFC 6455 §5.1"""
    client.receive(to_server(TEXT, b"hi"))
    assert sent(client) == [close_frame(1002)]
    assert client.close_code == 1002


def test_after_a_failure_nothing_more_is_looked_at(server):
    """RFC 6455 §7.1.7"""
    server.receive(b"\xff")
    server.receive(b"\xff" + to_server(TEXT, b"hi"))
    server.outgoing()
    assert receive_all(server, to_server(TEXT, b"hi")) == []
    assert receive_all(server, to_server(Opcode.PING)) == []
    assert server.outgoing() == b""
    with pytest.raises(ConnectionClosed) as caught:
        server.send("hi")
    assert caught.value.code == 1002


# --- whatever may come -----------------------------------------------------------

FRAMES = st.builds(
    to_server,
    st.sampled_from(sorted(Opcode.ALL)),
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=50).map(str.encode),
        st.integers(0, 70_000).map(bytes),
        st.sampled_from([1000, 1001, 3000]).map(encode_close),
    ),
    fin=st.booleans(),
)
STREAMS = st.one_of(st.binary(max_size=300), st.lists(FRAMES, max_size=8).map(b"".join))


def outcome(pieces):
    """Return all that a server gives and says to bytes that come in `pieces`."""
    server = WebSocketProtocol(client=False, max_message=100_000)
    messages = [message for piece in pieces for message in receive_all(server, piece)]
    return messages, server.outgoing(), server.close_code


@given(STREAMS, st.integers(1, 5000))
def test_how_bytes_are_cut_changes_nothing_and_no_bytes_raise(data, size):
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    assert outcome(pieces) == outcome([data])


# --- UTF-8 -----------------------------------------------------------------------

IMPOSSIBLE = [
    b"\x80",  # a continuation byte first
    b"\xc0",  # could only be an overlong form
    b"\xc1",
    b"\xe0\x80",
    b"\xed\xa0",  # half of a surrogate pair
    b"\xf0\x80",
    b"\xf4\x90",  # beyond U+10FFFF
    b"\xf5",
    b"\xff",
    b"\xc3(",
    b"\xe2\x82(",
]


@pytest.mark.parametrize("impossible", IMPOSSIBLE)
def test_text_that_is_not_utf8_fails_with_1007(server, impossible):
    """RFC 6455 §8.1"""
    server.receive(to_server(TEXT, b"ok " * 100 + impossible))
    assert sent(server) == [close_frame(1007)]


@pytest.mark.parametrize("impossible", IMPOSSIBLE)
def test_text_fails_across_fragments_too(server, impossible):
    """RFC 6455 §8.1"""
    server.receive(to_server(TEXT, b"ok", fin=False))
    for i in range(len(impossible)):
        server.receive(to_server(MORE, impossible[i : i + 1], fin=False))
    server.receive(to_server(MORE))
    assert sent(server) == [close_frame(1007)]


@pytest.mark.parametrize("text", [b"\xe2\x82", b"abc\xf0\x9f\x98"])
def test_text_that_ends_inside_a_character_fails_with_1007(text):
    """RFC 6455 §8.1"""
    whole = WebSocketProtocol(client=False)
    whole.receive(to_server(TEXT, text))
    assert sent(whole) == [close_frame(1007)]
    halves = WebSocketProtocol(client=False)
    halves.receive(to_server(TEXT, text, fin=False))
    assert halves.open
    halves.receive(to_server(MORE))
    assert sent(halves) == [close_frame(1007)]


def test_characters_may_be_split_anywhere(server):
    """RFC 6455 §5.6"""
    text = "aé€😀" * 3
    data = text.encode()
    frames = [to_server(TEXT, b"", fin=False)]
    frames += [to_server(MORE, data[i : i + 1], fin=False) for i in range(len(data))]
    frames.append(to_server(MORE))
    assert receive_all(server, b"".join(frames)) == [text]
    assert [m for b in frames for m in receive_all(server, b)] == [text]


def test_binary_may_hold_anything(server):
    """RFC 6455 §5.6"""
    data = to_server(BINARY, b"\xff", fin=False) + to_server(MORE, b"\xc0")
    assert receive_all(server, data) == [b"\xff\xc0"]


# --- limits ----------------------------------------------------------------------


@pytest.mark.parametrize("fragments", [1, 2, 7])
@pytest.mark.parametrize(("size", "answer"), [(1000, []), (1001, [close_frame(1009)])])
def test_a_message_over_the_limit_fails_with_1009(fragments, size, answer):
    """RFC 6455 §7.4.1"""
    server = WebSocketProtocol(client=False, max_message=1000)
    step = -(-size // fragments)
    for i in range(fragments):
        opcode = BINARY if i == 0 else MORE
        piece = bytes(min(step, size - i * step))
        server.receive(to_server(opcode, piece, fin=i == fragments - 1))
    assert sent(server) == answer


def test_messages_may_be_longer_once_the_pongs_are_released():
    server = WebSocketProtocol(client=False, max_message=1000, hold_pongs=True)
    server.release_pongs(2000)
    assert server.receive(to_server(BINARY, bytes(2000))) == bytes(2000)
    server.receive(to_server(BINARY, bytes(2001)))
    assert sent(server) == [close_frame(1009)]


@pytest.mark.parametrize("step", [1, 7, 100_000])
@pytest.mark.parametrize("fragments", [1, 2, 7])
def test_a_message_over_the_limit_is_cut_for_a_peer_that_never_comes_back(
    fragments, step
):
    """FAULTS B1: the rest is read, and not kept."""
    server = WebSocketProtocol(client=False, hold_pongs=True)
    server.release_pongs(1000, cuts=True)
    payload = ("x" + "é" * 3000).encode()
    size = -(-len(payload) // fragments)
    data = b""
    for i in range(fragments):
        piece = payload[i * size : (i + 1) * size]
        data += to_server(TEXT if i == 0 else MORE, piece, fin=i == fragments - 1)
        data += to_server(PING, b"p")
    data += to_server(TEXT, b"y" * 1000) + to_server(BINARY, bytes(1001))
    data += to_server(TEXT, b"z")
    received, longest = [], 0
    for start in range(0, len(data), step):
        received += receive_all(server, data[start : start + step])
        longest = max(longest, len(server._parser._buffer))
    # The limit is inside the last character.
    assert received == ["x" + "é" * 499, "y" * 1000, "z"]
    assert [isinstance(text, CutText) for text in received] == [True, 0, 0]
    assert longest < 1000 + 14 + step
    assert server.close_code is None
    assert len(sent(server)) == fragments


def test_a_frame_that_announces_too_much_fails_before_it_arrives():
    """RFC 6455 §7.4.1"""
    server = WebSocketProtocol(client=False, max_message=1000)
    server.receive(b"\x82\xff" + (1 << 40).to_bytes(8, "big") + b"mask")
    assert sent(server) == [close_frame(1009)]


def test_a_message_in_single_bytes_takes_no_more_memory_than_it_needs(server):
    frames = to_server(BINARY, b"x", fin=False) + to_server(MORE, b"x", fin=False) * 999
    server.receive(frames)
    more = to_server(MORE, b"x", fin=False) * 1000
    tracemalloc.start()
    try:
        for _ in range(10):
            server.receive(more)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000  # an object for each byte would take 400,000


# --- Ping and Pong ---------------------------------------------------------------


@pytest.mark.parametrize("payload", [b"", b"\x00\xff", b"x" * 125])
def test_a_ping_is_answered_with_its_payload(server, payload):
    """RFC 6455 §5.5.2"""
    server.receive(to_server(Opcode.PING, payload))
    assert sent(server) == [Frame(Opcode.PONG, payload)]


def test_each_ping_is_answered_in_order(server):
    """RFC 6455 §5.5.3"""
    server.receive(b"".join(to_server(Opcode.PING, b"%d" % i) for i in range(10)))
    assert [frame.payload for frame in sent(server)] == [b"%d" % i for i in range(10)]


def test_our_pings_may_be_answered(client):
    """RFC 6455 §5.5.2"""
    client.ping()
    assert sent(client) == [Frame(Opcode.PING, b"")]
    client.receive(to_client(Opcode.PONG))
    assert client.open


def test_held_pongs_go_out_at_release_for_the_latest_ping():
    """RFC 6455 §5.5.3; a Moltis node aborts on a Pong before its `connect` answer."""
    server = WebSocketProtocol(client=False, hold_pongs=True)
    for payload in (b"1", b"2", b"3"):
        server.receive(to_server(Opcode.PING, payload))
    assert server.outgoing() == b""
    server.release_pongs(1000)
    assert sent(server) == [Frame(Opcode.PONG, b"3")]
    server.release_pongs(1000)
    assert server.outgoing() == b""
    server.receive(to_server(Opcode.PING, b"4"))
    assert sent(server) == [Frame(Opcode.PONG, b"4")]


def test_a_held_pong_is_not_sent_after_a_close():
    """RFC 6455 §5.5.1"""
    server = WebSocketProtocol(client=False, hold_pongs=True)
    server.receive(to_server(Opcode.PING))
    server.close()
    server.release_pongs(1000)
    assert sent(server) == [close_frame(1000)]


# --- closing ---------------------------------------------------------------------


@pytest.mark.parametrize("code", [1000, 1001, 1011, 3000, 4999])
def test_a_close_is_answered_with_its_code(server, code):
    """RFC 6455 §5.5.1"""
    server.receive(to_server(Opcode.CLOSE, encode_close(code, "because")))
    assert sent(server) == [close_frame(code)]
    assert closing(server) == (code, "because")
    assert server.ended
    assert server.closes_first


def test_a_close_without_a_code_is_answered_likewise(server):
    """RFC 6455 §7.1.5"""
    server.receive(to_server(Opcode.CLOSE))
    assert sent(server) == [Frame(Opcode.CLOSE, b"")]
    assert server.close_code == CloseCode.NO_STATUS


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"\x03", 1002),
        (b"\x03\xec", 1002),
        (b"\x03\xed", 1002),
        (b"\xff\xff", 1002),
        (b"\x03\xe8\xff", 1007),
    ],
)
def test_a_bad_close_frame_fails_the_connection(server, payload, code):
    """RFC 6455 §7.4, §8.1"""
    server.receive(to_server(Opcode.CLOSE, payload))
    assert sent(server) == [close_frame(code)]
    assert server.close_code == code


def test_a_client_lets_the_server_end_the_tcp_connection(client):
    """RFC 6455 §7.1.1"""
    client.receive(to_client(Opcode.CLOSE, encode_close(1000)))
    assert client.ended
    assert not client.closes_first


def test_a_close_from_us_waits_for_the_peers(server, client):
    """RFC 6455 §7.1.2"""
    client.close(1000, "done")
    assert not client.open
    assert not client.ended
    assert connect(client, server) == ([], [])
    assert client.ended
    assert server.ended
    assert closing(server) == (1000, "done")
    assert client.close_code == 1000


def test_after_our_close_we_send_nothing_more(server):
    """RFC 6455 §5.5.1"""
    server.close()
    server.close(1001)
    server.receive(to_server(Opcode.PING))
    with pytest.raises(ConnectionClosed):
        server.send("late")
    with pytest.raises(ConnectionClosed):
        server.ping()
    assert sent(server) == [close_frame(1000)]


def test_after_our_close_the_peers_messages_still_count(server):
    """RFC 6455 §5.5.1: until it has sent a Close itself."""
    server.close()
    data = to_server(TEXT, b"on its way") + to_server(Opcode.CLOSE, encode_close(1000))
    assert receive_all(server, data) == ["on its way"]
    assert server.ended


def test_after_the_peers_close_nothing_counts(server):
    """RFC 6455 §5.5.1"""
    data = to_server(Opcode.CLOSE) + to_server(TEXT, b"late") + to_server(Opcode.PING)
    assert receive_all(server, data) == []
    assert sent(server) == [Frame(Opcode.CLOSE, b"")]


def test_both_may_close_at_the_same_time(server, client):
    """RFC 6455 §7.1.2"""
    client.close(1000)
    server.close(1001)
    assert connect(client, server) == ([], [])
    assert client.close_code == 1001
    assert server.close_code == 1000


def test_a_failure_after_our_close_sends_no_second_one(server):
    """RFC 6455 §5.5.1"""
    server.close()
    server.receive(b"\xff\xff")
    assert sent(server) == [close_frame(1000)]
    assert server.close_code == 1002


def test_the_end_without_a_close_frame_is_1006(server):
    """RFC 6455 §7.1.5"""
    server.send("never read")
    server.give_up()
    assert server.close_code == CloseCode.ABNORMAL
    assert server.outgoing() == b""
    with pytest.raises(ConnectionClosed):
        server.send("late")


def test_the_end_after_a_close_frame_keeps_its_code(server):
    """RFC 6455 §7.1.5"""
    server.receive(to_server(Opcode.CLOSE, encode_close(4000, "mine")))
    server.give_up()
    assert closing(server) == (4000, "mine")
