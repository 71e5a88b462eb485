"""Strangers, nodes and operators who say anything at all to a live gateway."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import struct
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peers import InProcessGateway, RawPeer, rust_connect
from support import PROGRAM, wait_for

import moltis

FUZZ = settings(max_examples=80)
# A connection each, and hypothesis' view of fixtures does not fit ours: one gateway
# for all examples is the point.
LIVE = settings(max_examples=30, suppress_health_check=list(HealthCheck))

JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=20),
        st.sampled_from(("local", "far", "main", "shell", "-1", "\0", "mdt_x", "../x")),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner)
    ),
    max_leaves=8,
)
SOURCE = PROGRAM.read_text(encoding="utf-8")
NAMES = sorted(
    set(re.findall(r'(?:required|optional)\(\s*[\w.]+, "(\w+)"', SOURCE))
    | set(re.findall(r"\b(\w+)=(?:Optional\(|str\b|int\b|required_)", SOURCE))
    | {"type", "id", "ok", "error", "payload", "event", "method", "params", "seq"}
)
OBJECTS = st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6)


@st.composite
def envelopes(draw, methods):
    """Text that is an envelope, or nearly one."""
    value = draw(OBJECTS)
    value["type"] = draw(st.sampled_from(("req", "res", "event", "x", 1)))
    value["id"] = draw(st.one_of(st.text(max_size=8), JSON))
    value["method"] = value["event"] = draw(st.sampled_from(methods))
    value["params"] = value["payload"] = draw(st.one_of(OBJECTS, JSON))
    return json.dumps(value)


@st.composite
def frames(draw):
    """A masked frame, with any bits, opcode and stated length (RFC 6455 §5.2)."""
    first = draw(st.integers(0, 255))
    payload = draw(st.binary(max_size=200))
    length = draw(st.one_of(st.just(len(payload)), st.integers(0, 2**64 - 1)))
    masked = draw(st.sampled_from((0x80, 0x80, 0x80, 0)))
    if length < 126:
        head = bytes((first, masked | length))
    elif length < 65536:
        head = bytes((first, masked | 126)) + struct.pack("!H", length)
    else:
        head = bytes((first, masked | 127)) + struct.pack("!Q", length)
    key = draw(st.binary(min_size=4, max_size=4)) if masked else b""
    return head + key + payload


# --- without a socket -----------------------------------------------------------------


@FUZZ
@given(st.one_of(st.text(), JSON.map(json.dumps), envelopes(["connect", "node.list"])))
def test_any_text_is_an_envelope_or_an_error_that_can_be_answered(text):
    try:
        envelope = moltis.decode_envelope(text)
    except moltis.EnvelopeError as error:
        moltis.decode_envelope(
            moltis.encode_envelope(moltis.Response(error.id, error=error))
        )
    else:
        assert moltis.decode_envelope(moltis.encode_envelope(envelope)) == envelope


@FUZZ
@given(st.binary(max_size=100))
def test_any_bytes_are_job_data_or_an_rpc_error(data):
    with contextlib.suppress(moltis.RpcError):
        assert moltis.encode_job_data(*moltis.decode_job_data(data)) == data


@FUZZ
@given(st.lists(st.tuples(st.integers(0, 5), st.binary(max_size=40)), max_size=5))
def test_any_frames_are_a_log_or_a_protocol_error(frames):
    data = b"".join(moltis.encode_log_frame(*frame) for frame in frames)
    with contextlib.suppress(moltis.RpcError):
        moltis.check_frames(data[: len(data) - len(data) % 3])
    assert list(moltis.log_frames(data)) == frames


@FUZZ
@given(OBJECTS)
def test_any_connect_is_understood_or_refused(params):
    with contextlib.suppress(moltis.RpcError):
        moltis.ConnectParams.from_json(params).check_protocol()


@FUZZ
@given(st.lists(st.one_of(frames(), st.binary(max_size=50)), max_size=8), st.data())
def test_any_frames_mean_the_same_in_whatever_pieces_they_come(pieces, data):
    stream = b"".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))

    def take(parts):
        protocol = moltis.WebSocketProtocol(client=False, max_message=500)
        messages, answer = [], b""
        for part in parts:
            message = protocol.receive(part)
            while message is not None:
                messages.append(message)
                message = protocol.receive(b"")
            answer += protocol.outgoing()
        return messages, answer, protocol.close_code

    bounds = [0, *cuts, len(stream)]
    parts = [stream[a:b] for a, b in zip(bounds, bounds[1:])]
    assert take(parts) == take([stream])


# --- the doors of a live gateway ------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A gateway that serves a bystander, and what it logs as its own fault."""
    faults = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: faults.append(record.getMessage())
    moltis.log.addHandler(handler)
    directory = tmp_path_factory.mktemp("gateway")
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(directory)}
    with contextlib.ExitStack() as stack:
        gateway = stack.enter_context(InProcessGateway(directory, environ=environ))
        bystander = stack.enter_context(gateway.operator())
        yield gateway
        assert bystander.call("node.list", {})
        wait_for(
            lambda: len(serving()) == 1,
            what=lambda: f"threads to end: {threading.enumerate()}",
        )
    moltis.log.removeHandler(handler)
    assert faults == []


def serving():
    """Return the threads that serve a connection to the gateway."""
    return [t for t in threading.enumerate() if t.name.startswith("moltis-read-127")]


def send_and_read(gateway, data):
    """Send bytes and half-close; return what comes until the gateway hangs up."""
    with socket.create_connection(("127.0.0.1", gateway.running.port), 10) as sock:
        answer = b""
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while True:
                piece = sock.recv(65536)
                if not piece:
                    break
                answer += piece
        return answer


HTTP_PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            (
                *(b"GET ", b"POST ", b"HEAD ", b"PUT ", b"/", b"/ws", b"/api/rpc"),
                *(b"/health", b"/join/", b"/api/jobs/", b"/chat/", b"/%2e%2e/"),
                *(
                    b" HTTP/1.1",
                    b" HTTP/1.0",
                    b"\r\n",
                    b"\r\n\r\n",
                    b"\n",
                    b"\r",
                    b": ",
                ),
                *(
                    b"Host: localhost\r\n",
                    b"Content-Length: 5\r\n",
                    b"Origin: null\r\n",
                ),
                *(b"Cookie: moltis_login=x\r\n", b"Authorization: Bearer mk_x\r\n"),
                *(b"Upgrade: websocket\r\n", b"Connection: Upgrade\r\n", b"Expect: "),
                *(b"Sec-WebSocket-Version: 13\r\n", b"100-continue\r\n", b"{}", b"\0"),
                b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n",
            )
        ),
        st.binary(max_size=20),
    ),
    max_size=15,
).map(b"".join)


@LIVE
@given(st.one_of(HTTP_PIECES, st.binary(max_size=300)))
def test_any_bytes_at_the_http_door_are_answered_or_hung_up_on(site, data):
    answer = send_and_read(site, data)
    assert b"Traceback" not in answer
    assert not re.match(rb"HTTP/1\.1 5(?!01|05)", answer)


UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


@LIVE
@given(st.lists(st.one_of(frames(), st.binary(max_size=50)), max_size=6))
def test_any_frames_at_the_websocket_door_end_in_a_close(site, pieces):
    answer = send_and_read(site, UPGRADE + b"".join(pieces))
    assert answer.startswith(b"HTTP/1.1 101 ")


# What these do is run commands, or ask other machines.
RUNNING = ("chat.send", "job.start", "node.invoke")


@pytest.fixture(scope="module")
def methods(site):
    with site.peer() as peer:
        params = moltis.ConnectParams(
            role="operator", client_id="fuzz", api_key=site.api_key
        )
        hello = peer.request("connect", params.to_json())["payload"]
    known = [
        method
        for method in hello["features"]["methods"]
        if method not in RUNNING and not method.startswith("models.")
    ]
    assert len(known) > 20
    return known


@LIVE
@given(data=st.data())
def test_whatever_a_stranger_says_first_is_refused(site, methods, data):
    texts = data.draw(st.lists(envelopes(["connect", "auth.scram"]), max_size=3))
    with site.peer() as peer:
        with contextlib.suppress(moltis.ConnectionClosed):
            for text in texts:
                peer.send(text)
        peer.ws.close(timeout=1)
    assert site.running.port


@LIVE
@given(data=st.data())
def test_whatever_an_operator_asks_is_answered(site, methods, data):
    peer = RawPeer(site.websocket_url)
    params = moltis.ConnectParams(
        role="operator", client_id="fuzz", api_key=site.api_key
    )
    with peer:
        assert peer.request("connect", params.to_json())["ok"]
        for number in range(5):
            method = data.draw(st.sampled_from(methods))
            answer = peer.request(method, data.draw(OBJECTS), str(number))
            assert answer["ok"] or answer["error"]["code"] != "INTERNAL", answer


@LIVE
@given(caps=st.sampled_from(([], ["jobs"])), data=st.data())
def test_whatever_a_node_says_concerns_itself_alone(site, methods, caps, data):
    token = site.token()
    node_id = f"fuzz-{moltis.new_id()}"
    extensions = {"moltis": {"caps": caps}}
    with site.peer() as peer:
        params = rust_connect(token, node_id, extensions=extensions)
        assert peer.request("connect", params)["ok"]
        spoken = ["node.invoke.result", "node.event", "job.place", "job.input"]
        spoken += methods
        with contextlib.suppress(moltis.ConnectionClosed):
            for text in data.draw(st.lists(envelopes(spoken), max_size=5)):
                peer.send(text)
            peer.send(data.draw(st.binary(max_size=60)))
    wait_for(lambda: not site.is_connected(node_id), what="the node to be away")
    with site.operator() as operator:
        device = [
            d["deviceId"]
            for d in operator.call("device.pair.list", {})
            if d["nodeId"] == node_id
        ]
        operator.call("device.token.revoke", {"deviceId": device[0]})
