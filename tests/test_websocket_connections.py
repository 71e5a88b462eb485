"""WebSockets over real sockets: threads, slow peers, TLS, and connect()."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from types import ModuleType

import pytest
from echo_peer import accept
from peers import raw_frame
from support import ROOT, free_port, wait_for

from moltis import (
    MAX_BACKLOG,
    CloseCode,
    ConnectionClosed,
    Opcode,
    TlsTrust,
    Unreachable,
    UsageError,
    WebSocket,
    WebSocketProtocol,
    connect,
    encode_close,
)

LONG = 60.0  # s; for what happens at once unless it is broken


class RawPeer:
    """The other end of a connection, as bytes."""

    def __init__(self, sock, *, client=True):
        self.sock = sock
        self.masked = client
        sock.settimeout(LONG)

    def send(self, opcode, payload=b"", *, fin=True):
        self.sock.sendall(raw_frame(opcode, payload, fin=fin, masked=self.masked))

    def read(self, size):
        data = b""
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            assert piece, f"the end after {data!r}"
            data += piece
        return data

    def at_end(self):
        return self.sock.recv(1) == b""


@contextlib.contextmanager
def raw_pair(*, client=False, hold_pongs=False, **options):
    """Give a WebSocket and, as bytes, its peer."""
    ours, theirs = socket.socketpair()
    protocol = WebSocketProtocol(client=client, hold_pongs=hold_pongs)
    ws = WebSocket(ours, protocol, **options)
    with theirs:
        yield ws, RawPeer(theirs, client=not client)
        ws.abort()
        ws.close()


def make_pair(left, right):
    client, server = (WebSocketProtocol(client=client) for client in (True, False))
    return WebSocket(left, client), WebSocket(right, server)


@contextlib.contextmanager
def ws_pair():
    """Give a client and a server that are connected."""
    client, server = make_pair(*socket.socketpair())
    yield client, server
    client.abort()
    server.abort()
    client.close()
    server.close()


class Background:
    """A call in a thread; `result()` gives what came of it."""

    def __init__(self, call, *args, **kwargs):
        self._call = lambda: call(*args, **kwargs)
        self._value = self._error = None
        self._thread = threading.Thread(target=self._run, name="test-background")
        self._thread.start()

    def _run(self):
        try:
            self._value = self._call()
        except Exception as error:
            self._error = error

    def result(self):
        self._thread.join(LONG)
        assert not self._thread.is_alive()
        if self._error:
            raise self._error
        return self._value


def is_waiting(ws):
    """Tell whether a thread waits for the socket of `ws`."""
    return ws._waiting > 0


def writer_threads():
    return [t for t in threading.enumerate() if t.name.startswith("moltis-write-")]


def echo_all(ws):
    for message in iter(ws.receive, None):
        ws.send(message)
        ws.flush(LONG)


# --- messages --------------------------------------------------------------------


def test_messages_of_all_sizes_arrive_in_order():
    messages = ["", "x", b"", os.urandom(125), "é" * 70_000, os.urandom(3 << 20)] * 3
    with ws_pair() as (client, server):
        echo = Background(echo_all, server)
        for message in messages:
            client.send(message)
        assert [client.receive(LONG) for _ in messages] == messages
        client.close()
        echo.result()


def test_a_message_of_64_mib_goes_there_and_back():
    message = os.urandom(1 << 20) * 64
    with ws_pair() as (client, server):
        echo = Background(echo_all, server)
        client.send(message)
        assert client.receive(60) == message
        client.close()
        echo.result()


def test_messages_from_many_threads_do_not_mix():
    with ws_pair() as (client, server):

        def send_many(i):
            for n in range(200):
                client.send(f"{i} {n} " + "x" * (n * 50))

        senders = [Background(send_many, i) for i in range(8)]
        counts = dict.fromkeys(map(str, range(8)), 0)
        for _ in range(8 * 200):
            i, n, rest = server.receive(LONG).split(" ")
            assert int(n) == counts[i]
            assert len(rest) == counts[i] * 50
            counts[i] += 1
        for sender in senders:
            sender.result()


def test_a_short_message_leaves_in_one_piece_and_without_a_thread():
    with raw_pair() as (ws, peer):
        threads = set(threading.enumerate())
        ws.send("hi")
        assert set(threading.enumerate()) <= threads
        assert peer.sock.recv(100) == b"\x81\x02hi"


def test_a_connection_opens_while_another_thread_imports_ssl(monkeypatch):
    monkeypatch.setitem(sys.modules, "ssl", ModuleType("ssl"))  # nothing is in it yet
    with raw_pair() as (ws, peer):
        peer.send(Opcode.TEXT, b"hello")
        assert ws.receive(LONG) == "hello"


def test_what_came_with_the_handshake_is_received_first():
    early = raw_frame(Opcode.TEXT, b"early", masked=True)
    with raw_pair(early=early + early[:3]) as (ws, peer):
        assert ws.receive(LONG) == "early"
        peer.sock.sendall(early[3:])
        assert ws.receive(LONG) == "early"


def test_pings_are_answered_while_a_message_is_awaited():
    """RFC 6455 §5.5.2"""
    with raw_pair() as (ws, peer):
        receiving = Background(ws.receive, LONG)
        peer.send(Opcode.PING, b"there?")
        assert peer.read(8) == b"\x8a\x06there?"
        peer.send(Opcode.TEXT, b"hi")
        assert receiving.result() == "hi"


def test_held_pongs_go_out_when_they_are_released():
    with raw_pair(hold_pongs=True) as (ws, peer):
        peer.send(Opcode.PING, b"1")
        peer.send(Opcode.PING, b"2")
        peer.send(Opcode.TEXT, b"connect")
        assert ws.receive(LONG) == "connect"
        ws.send("hello")
        ws.release_pongs(1000)
        assert peer.read(7) == b"\x81\x05hello"
        assert peer.read(3) == b"\x8a\x012"


def test_a_timeout_is_told_and_costs_nothing():
    with raw_pair() as (ws, peer):
        with pytest.raises(TimeoutError):
            ws.receive(0.01)
        peer.send(Opcode.TEXT, b"half", fin=False)
        with pytest.raises(TimeoutError):
            ws.receive(0)
        peer.send(Opcode.CONTINUATION, b" and half")
        assert ws.receive(LONG) == "half and half"


def test_a_timeout_of_zero_takes_what_is_there():
    with raw_pair() as (ws, peer):
        peer.send(Opcode.TEXT, b"one")
        peer.send(Opcode.TEXT, b"two")
        assert ws.receive(0) == "one"
        assert ws.receive(0) == "two"
        with pytest.raises(TimeoutError):
            ws.receive(0)


def test_ctrl_c_interrupts_a_wait_and_not_the_connection(tmp_path):
    """`node exec` goes on receiving after it has asked for the command's end."""
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import signal, socket, sys, threading
sys.path.insert(0, {str(ROOT)!r})
import moltis
ours, theirs = socket.socketpair()
ws = moltis.WebSocket(ours, moltis.WebSocketProtocol(client=True))
caught = threading.Event()
def handle(number, frame):
    if not caught.is_set() and ws._waiting:
        caught.set()
        raise KeyboardInterrupt
signal.signal(signal.SIGINT, handle)
def interrupt():
    # Again and again: just before a wait begins, a signal does not end it.
    while not caught.wait(0.02):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
thread = threading.Thread(target=interrupt)
thread.start()
try:
    ws.receive()
except KeyboardInterrupt:
    thread.join()
    theirs.sendall(b"\\x81\\x02hi")
    print(ws.receive(30))
"""
    )
    result = subprocess.run(
        [sys.executable, str(script)],
        check=True,
        stdout=subprocess.PIPE,
        timeout=60,
    )
    assert result.stdout == b"hi\n"


# --- keepalive -------------------------------------------------------------------

PING, PONG = b"\x89\x00", b"\x8a\x80mask"


@pytest.fixture
def hurry(monkeypatch):
    """Ping after 0.1 s of silence, give up after 2 s: a busy machine takes its time."""
    monkeypatch.setattr("moltis.PING_INTERVAL", 0.1)
    monkeypatch.setattr("moltis.PEER_TIMEOUT", 2.0)


@pytest.mark.parametrize("timeout", [None, LONG])
def test_a_silent_peer_is_pinged_and_kept_while_it_answers(hurry, timeout):
    """RFC 6455 §5.5.2"""
    with raw_pair() as (ws, peer):
        threads = set(threading.enumerate())
        receiving = Background(ws.receive, timeout)
        for _ in range(25):
            assert peer.read(2) == PING
            peer.sock.sendall(PONG)
        assert len(set(threading.enumerate()) - threads) == 1
        peer.send(Opcode.TEXT, b"still here")
        assert receiving.result() == "still here"


@pytest.mark.parametrize("timeout", [None, LONG])
def test_a_peer_that_does_not_answer_pings_is_given_up(hurry, timeout):
    with raw_pair() as (ws, peer):
        with pytest.raises(ConnectionClosed, match="nothing arrived") as caught:
            ws.receive(timeout)
        assert caught.value.code == CloseCode.ABNORMAL
        assert peer.read(2) == PING


def test_short_timeouts_of_receive_do_not_keep_a_dead_peer(hurry):
    with raw_pair() as (ws, _), pytest.raises(ConnectionClosed, match="nothing"):
        while True:
            with contextlib.suppress(TimeoutError):
                ws.receive(0.01)


def test_a_silent_peer_is_kept_without_keepalive(hurry):
    """A Moltis node reads nothing, so answers no Ping, while its command runs."""
    with raw_pair() as (ws, peer):
        ws.keepalive = False
        receiving = Background(ws.receive)
        for _ in range(25):
            assert peer.read(2) == PING
        ws.keepalive = True
        with pytest.raises(ConnectionClosed, match="nothing arrived"):
            receiving.result()


def test_a_reader_that_was_busy_pings_before_it_gives_up(hurry):
    with raw_pair() as (ws, peer):
        with pytest.raises(TimeoutError):
            ws.receive(0)
        time.sleep(2.1)  # neither read nor pinged
        receiving = Background(ws.receive)
        assert peer.read(2) == PING
        peer.sock.sendall(PONG)
        peer.send(Opcode.TEXT, b"hi")
        assert receiving.result() == "hi"


def test_pings_of_many_connections_do_not_coincide():
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(raw_pair()) for _ in range(20)]
        due = sorted(ws._next_ping - ws._last_arrival for ws, _ in pairs)
    assert 16 <= due[0] < due[-1] <= 20
    assert due[-1] - due[0] > 1


def test_whether_a_peer_answers_can_be_asked():
    with ws_pair() as (client, server):
        receiving = [Background(ws.receive) for ws in (client, server)]
        assert client.answers(LONG)
        server.abort()
        assert not client.answers(LONG)
        for call in receiving:
            with pytest.raises(ConnectionClosed):
                call.result()
    with raw_pair() as (ws, peer):
        receiving = Background(ws.receive)
        assert not ws.answers(0.01)
        assert peer.read(2) == PING
        ws.abort()
        with pytest.raises(ConnectionClosed):
            receiving.result()


# --- slow peers ------------------------------------------------------------------


def fill(ws, *, at_least=0):
    """Send until something has to wait, and `at_least` bytes more; return all."""
    sent = []
    size = 0
    while not ws.backlog or size < at_least:
        waiting = bool(ws.backlog)
        sent.append(os.urandom(64 * 1024))
        ws.send(sent[-1])
        size += len(sent[-1]) if waiting else 0
    return sent


def test_send_never_waits_and_the_rest_goes_out_as_the_peer_reads():
    with ws_pair() as (client, server):
        sent = fill(client, at_least=1 << 20)
        assert [t.name for t in writer_threads()] == ["moltis-write-"]
        assert [server.receive(LONG) for _ in sent] == sent
        client.flush(LONG)
        wait_for(lambda: not writer_threads(), what="the writer's end")


def test_a_writer_starts_again_when_it_is_needed_again():
    with ws_pair() as (client, server):
        for _ in range(5):
            sent = fill(client)
            assert [server.receive(LONG) for _ in sent] == sent
            client.flush(LONG)


def test_the_backlog_is_what_the_socket_has_not_taken():
    with ws_pair() as (client, server):
        client.send("hi")
        assert client.backlog == 0
        sent = fill(client, at_least=1 << 20)
        assert 1 << 20 <= client.backlog < sum(map(len, sent)) + 14 * len(sent)
        assert [server.receive(LONG) for _ in range(len(sent) + 1)] == ["hi", *sent]
        client.flush(LONG)
        assert client.backlog == 0


def test_on_drain_is_called_once_each_time_the_backlog_falls_below_the_limit():
    with ws_pair() as (client, server):
        calls = []
        client.on_drain = lambda: calls.append(
            (client.backlog < MAX_BACKLOG, threading.current_thread().name)
        )
        for rounds in (1, 2, 3):
            sent = fill(client, at_least=MAX_BACKLOG)
            assert len(calls) == rounds - 1
            server.send("the reader has no part in it")
            assert [server.receive(LONG) for _ in sent] == sent
            client.flush(LONG)
            wait_for(lambda: not writer_threads(), what="the writer's end")
            assert calls == [(True, "moltis-write-")] * rounds


def test_on_drain_may_send_so_that_an_outbox_never_holds_more_than_it_must():
    """How followers of logs pull: no thread, and no outbox that grows."""
    with ws_pair() as (client, server):
        pieces = [b"%d" % i + bytes(60_000) for i in range(300)]
        waiting = iter(pieces)
        highest = 0

        def pump():
            nonlocal highest
            while client.backlog < MAX_BACKLOG:
                piece = next(waiting, None)
                if piece is None:
                    return
                client.send(piece)
                highest = max(highest, client.backlog)

        client.on_drain = pump
        pump()
        assert [server.receive(LONG) for _ in pieces] == pieces
        assert MAX_BACKLOG <= highest < MAX_BACKLOG + 70_000
        wait_for(lambda: not writer_threads(), what="the writer's end")


def test_flush_waits_for_the_peer_and_tells_of_a_timeout():
    with ws_pair() as (client, server):
        client.flush(0)
        sent = fill(client)
        with pytest.raises(TimeoutError):
            client.flush(0.01)
        flushing = Background(client.flush, LONG)
        assert [server.receive(LONG) for _ in sent] == sent
        flushing.result()


def test_flush_tells_of_a_connection_that_ended():
    with ws_pair() as (client, _):
        fill(client)
        flushing = Background(client.flush, LONG)
        client.abort()
        with pytest.raises(ConnectionClosed):
            flushing.result()


def test_a_peer_that_does_not_read_is_dropped_with_1013(monkeypatch):
    """RFC 6455 §7.4.1 and IANA: try again later"""
    monkeypatch.setattr("moltis.MAX_OUTBOX", 1 << 20)
    with ws_pair() as (client, _):
        receiving = Background(client.receive)
        with pytest.raises(ConnectionClosed) as caught:
            fill(client, at_least=2 << 20)
        assert caught.value.code == CloseCode.TRY_AGAIN_LATER
        assert client.close_code == CloseCode.TRY_AGAIN_LATER
        with pytest.raises(ConnectionClosed) as caught:
            receiving.result()
        assert caught.value.code == CloseCode.TRY_AGAIN_LATER
        wait_for(lambda: not writer_threads(), what="the writer's end")


def test_one_message_may_be_longer_than_the_outbox(monkeypatch):
    """And a short one while it goes out is no reason to drop the peer."""
    monkeypatch.setattr("moltis.MAX_OUTBOX", 1024)
    message = os.urandom(4 << 20)
    with ws_pair() as (client, server):
        client.send(message)
        client.send("next")
        assert server.receive(LONG) == message
        assert server.receive(LONG) == "next"


def test_pongs_for_a_peer_that_does_not_read_are_bounded_too(monkeypatch):
    monkeypatch.setattr("moltis.MAX_OUTBOX", 64 * 1024)
    with raw_pair() as (ws, peer):
        receiving = Background(ws.receive)
        ping = raw_frame(Opcode.PING, b"x" * 125, masked=True)
        with contextlib.suppress(OSError):
            while not ws.closed:
                peer.sock.sendall(ping * 100)
        with pytest.raises(ConnectionClosed) as caught:
            receiving.result()
        assert caught.value.code == CloseCode.TRY_AGAIN_LATER


# --- closing ---------------------------------------------------------------------


def test_a_close_from_one_end_is_clean_at_both():
    """RFC 6455 §7.1"""
    with ws_pair() as (client, server):
        receiving = Background(server.receive)
        client.close(CloseCode.GOING_AWAY, "enough")
        assert receiving.result() is None
        assert server.close_code == CloseCode.GOING_AWAY
        assert client.closed
        assert server.closed
        assert client.receive() is None
        with pytest.raises(ConnectionClosed):
            client.send("late")


def test_close_wakes_the_thread_that_receives():
    with ws_pair() as (client, server):
        receiving = Background(client.receive)
        wait_for(lambda: is_waiting(client))
        answering = Background(server.receive)
        client.close()
        assert receiving.result() is None
        assert answering.result() is None


def test_what_was_sent_before_the_close_arrives():
    with ws_pair() as (client, server):
        sent = fill(client)
        closing = Background(client.close, timeout=LONG)
        assert [server.receive(LONG) for _ in sent] == sent
        assert server.receive(LONG) is None
        closing.result()
        assert client.close_code == CloseCode.NORMAL


def test_a_close_with_another_code_is_raised_with_its_reason():
    with ws_pair() as (client, server):
        receiving = Background(server.receive)
        client.close(4001, "token revoked")
        with pytest.raises(ConnectionClosed, match="token revoked") as caught:
            receiving.result()
        assert caught.value.code == 4001


def test_a_close_without_a_code_is_clean():
    """RFC 6455 §7.1.5"""
    with raw_pair() as (ws, peer):
        receiving = Background(ws.receive)
        peer.send(Opcode.CLOSE)
        assert peer.read(2) == b"\x88\x00"
        assert peer.at_end()
        peer.sock.close()
        assert receiving.result() is None
        assert ws.close_code == CloseCode.NO_STATUS


def test_a_server_ends_the_tcp_connection_first():
    """RFC 6455 §7.1.1"""
    with raw_pair(client=False) as (ws, peer):
        receiving = Background(ws.receive)
        peer.send(Opcode.CLOSE, encode_close(1000))
        assert peer.read(4) == b"\x88\x02\x03\xe8"
        assert peer.at_end()
        peer.sock.close()
        receiving.result()


def test_a_client_waits_for_the_server_to_end_the_tcp_connection():
    """RFC 6455 §7.1.1"""
    with raw_pair(client=True) as (ws, peer):
        receiving = Background(ws.receive)
        peer.send(Opcode.CLOSE, encode_close(1000))
        assert peer.read(8)[:2] == b"\x88\x82"
        peer.sock.settimeout(0.05)
        with pytest.raises(socket.timeout):
            peer.at_end()
        peer.sock.close()
        assert receiving.result() is None


def test_a_failure_is_told_to_the_peer_and_raised_with_its_cause():
    """RFC 6455 §7.1.7"""
    with raw_pair() as (ws, peer):
        receiving = Background(ws.receive)
        peer.sock.sendall(b"\x81\x02hi")
        assert peer.read(4) == b"\x88\x02\x03\xea"
        assert peer.at_end()
        peer.sock.close()
        with pytest.raises(ConnectionClosed, match="masked") as caught:
            receiving.result()
        assert caught.value.code == CloseCode.PROTOCOL_ERROR


def test_an_end_without_a_close_frame_is_1006():
    """RFC 6455 §7.1.5"""
    with raw_pair() as (ws, peer):
        peer.sock.close()
        with pytest.raises(ConnectionClosed) as caught:
            ws.receive(LONG)
        assert caught.value.code == CloseCode.ABNORMAL


def test_a_reset_is_an_end_like_others():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        sock, _ = listener.accept()
        ws = WebSocket(sock, WebSocketProtocol(client=False))
        assert ws.remote_ip == "127.0.0.1"
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        with pytest.raises(ConnectionClosed) as caught:
            ws.receive(LONG)
        assert caught.value.code == CloseCode.ABNORMAL
        with pytest.raises(ConnectionClosed):
            ws.send("late")


def test_the_reason_of_a_close_is_read_even_when_a_write_has_failed():
    with raw_pair() as (ws, peer):
        peer.send(Opcode.CLOSE, encode_close(1008, "revoked"))
        peer.sock.close()
        with pytest.raises(ConnectionClosed):
            for _ in range(2):  # the first finds out
                ws.send("late")
        with pytest.raises(ConnectionClosed, match="revoked") as caught:
            ws.receive(LONG)
        assert caught.value.code == 1008


def test_a_peer_that_does_not_answer_a_close_is_left_after_the_timeout():
    with raw_pair() as (ws, peer):
        ws.close(timeout=0.05)
        assert peer.read(4) == b"\x88\x02\x03\xe8"
        assert peer.at_end()
        assert ws.close_code == CloseCode.ABNORMAL


def test_a_peer_that_keeps_the_socket_after_the_handshake_is_left(monkeypatch):
    monkeypatch.setattr("moltis.CLOSE_TIMEOUT", 0.05)
    with raw_pair() as (ws, peer):
        peer.send(Opcode.CLOSE, encode_close(1000))
        assert ws.receive(LONG) is None


def test_close_and_abort_may_come_again_and_from_anywhere():
    with ws_pair() as (client, server):
        receiving = Background(server.receive)
        closing = [Background(client.close, timeout=LONG) for _ in range(4)]
        for call in closing:
            call.result()
        assert receiving.result() is None
        for ws in (client, server):
            ws.abort()
            ws.close()
            ws.abort()


def test_abort_wakes_the_thread_that_receives():
    with ws_pair() as (client, _):
        receiving = Background(client.receive)
        wait_for(lambda: is_waiting(client))
        client.abort()
        with pytest.raises(ConnectionClosed) as caught:
            receiving.result()
        assert caught.value.code == CloseCode.ABNORMAL


def test_abort_ends_a_writer_that_waits():
    with ws_pair() as (client, _):
        fill(client)
        wait_for(lambda: is_waiting(client))
        client.abort()
        wait_for(lambda: not writer_threads(), what="the writer's end")


def test_a_descriptor_is_closed_only_when_nobody_waits_for_it():
    """Its number may belong to another connection at once."""
    with ws_pair() as (client, _):
        receiving = Background(client.receive)
        wait_for(lambda: is_waiting(client))
        descriptor = client._channel.sock.fileno()
        client.abort()
        with pytest.raises(ConnectionClosed):
            receiving.result()
        assert client._channel.sock.fileno() == -1
        with pytest.raises(OSError, match="descriptor"):
            os.fstat(descriptor)


def test_a_with_statement_closes():
    with ws_pair() as (client, server):
        receiving = Background(server.receive)
        with client as ws:
            assert ws is client
        assert receiving.result() is None


# --- limits ----------------------------------------------------------------------


def test_a_message_that_is_too_long_is_answered_with_1009():
    """RFC 6455 §7.4.1"""
    left, right = socket.socketpair()
    client = WebSocket(left, WebSocketProtocol(client=True))
    server = WebSocket(right, WebSocketProtocol(client=False, max_message=1 << 20))
    with client, server:
        receiving = Background(server.receive)
        with contextlib.suppress(ConnectionClosed):
            client.send(bytes(1 << 21))
        for receive in (client.receive, receiving.result):
            with pytest.raises(ConnectionClosed) as caught:
                receive()
            assert caught.value.code == CloseCode.MESSAGE_TOO_BIG


def test_more_than_1024_descriptors_are_no_limit():
    """select() could not wait for these."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200 and hard != resource.RLIM_INFINITY:
        pytest.skip("a limit of descriptors under 1,200")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    others = [os.dup(0) for _ in range(1030)]
    try:
        with raw_pair() as (ws, peer):
            receiving = Background(ws.receive, LONG)
            peer.send(Opcode.TEXT, b"hi")
            assert receiving.result() == "hi"
    finally:
        for descriptor in others:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- TLS -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Return the paths of a certificate for localhost, and its key."""
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-days", "2", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    return certificate, key


@pytest.fixture
def server_context(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


@pytest.fixture
def client_context(certificate):
    return ssl.create_default_context(cafile=str(certificate[0]))


@contextlib.contextmanager
def tls_pair(client_context, server_context):
    left, right = socket.socketpair()
    accepting = Background(server_context.wrap_socket, right, server_side=True)
    left = client_context.wrap_socket(left, server_hostname="localhost")
    client, server = make_pair(left, accepting.result())
    yield client, server
    client.abort()
    server.abort()
    client.close()
    server.close()


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_both_directions_of_tls_are_used_at_once(
    client_context, server_context, version
):
    """OpenSSL must never read and write one connection at the same moment."""
    client_context.maximum_version = getattr(ssl.TLSVersion, version)
    with tls_pair(client_context, server_context) as (client, server):
        piece = os.urandom(100_000)

        def send_many(ws):
            for i in range(100):
                ws.send(b"%d " % i + piece)

        def receive_many(ws):
            return [ws.receive(LONG).partition(b" ")[0] for _ in range(100)]

        calls = [Background(send_many, ws) for ws in (client, server)]
        results = [Background(receive_many, ws) for ws in (client, server)]
        for call in calls:
            call.result()
        for result in results:
            assert result.result() == [b"%d" % i for i in range(100)]


def test_messages_of_all_sizes_go_over_tls(client_context, server_context):
    messages = ["", os.urandom(16 * 1024 - 4), os.urandom(16 * 1024), b"x" * 3_000_000]
    with tls_pair(client_context, server_context) as (client, server):
        echo = Background(echo_all, server)
        for message in messages:
            client.send(message)
            assert client.receive(LONG) == message
        client.close()
        echo.result()
        assert client.close_code == CloseCode.NORMAL


def test_a_slow_tls_peer_gets_all_of_it_in_the_end(client_context, server_context):
    with tls_pair(client_context, server_context) as (client, server):
        sent = fill(client, at_least=2 << 20)
        assert writer_threads()
        server.send("the other way meanwhile")
        assert client.receive(LONG) == "the other way meanwhile"
        assert [server.receive(LONG) for _ in sent] == sent
        client.flush(LONG)


def test_a_tls_peer_that_does_not_read_is_dropped_with_1013(
    client_context, server_context, monkeypatch
):
    monkeypatch.setattr("moltis.MAX_OUTBOX", 1 << 20)
    with tls_pair(client_context, server_context) as (client, _):
        with pytest.raises(ConnectionClosed) as caught:
            fill(client, at_least=2 << 20)
        assert caught.value.code == CloseCode.TRY_AGAIN_LATER


def test_abort_wakes_a_thread_that_receives_over_tls(client_context, server_context):
    with tls_pair(client_context, server_context) as (client, server):
        calls = [Background(ws.receive) for ws in (client, server)]
        wait_for(lambda: is_waiting(client) and is_waiting(server))
        client.abort()
        for call in calls:
            with pytest.raises(ConnectionClosed) as caught:
                call.result()
            assert caught.value.code == CloseCode.ABNORMAL


def test_a_silent_tls_peer_is_kept_while_it_answers(
    client_context, server_context, hurry
):
    with tls_pair(client_context, server_context) as (client, server):
        receiving = [Background(ws.receive) for ws in (client, server)]
        time.sleep(2.5)
        for ws in (client, server):
            ws.send("still here")
        assert [call.result() for call in receiving] == ["still here"] * 2
        with pytest.raises(ConnectionClosed, match="nothing arrived"):
            client.receive()


def test_a_close_over_tls_is_clean_at_both_ends(client_context, server_context):
    for closer in (0, 1):
        with tls_pair(client_context, server_context) as pair:
            receiving = Background(pair[1 - closer].receive)
            pair[closer].close(1001, "enough")
            assert receiving.result() is None
            assert [ws.close_code for ws in pair] == [1001, 1001]


def test_the_peers_certificate_is_known(client_context, server_context, certificate):
    pem = certificate[0].read_text()
    with tls_pair(client_context, server_context) as (client, server):
        assert client.peer_certificate() == ssl.PEM_cert_to_DER_cert(pem)
        assert server.peer_certificate() is None
    with ws_pair() as (client, _):
        assert client.peer_certificate() is None


# --- connect() -------------------------------------------------------------------


class Server:
    """Accepts one connection on a free port and gives it to `serve`."""

    def __init__(self, serve):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._serve = serve
        self._background = Background(self._accept)

    def _accept(self):
        sock, _ = self._listener.accept()
        with contextlib.closing(sock):
            sock.settimeout(LONG)
            return self._serve(sock)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._listener.close()
        self.result = self._background.result()


def serve_echo(sock):
    echo_all(accept(sock))


def complaint(url, *args, **options):
    with pytest.raises(Unreachable) as caught:
        connect(url, *args, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 69
    return str(caught.value)


def test_connect_gives_an_open_websocket():
    with Server(serve_echo) as server, connect(
        f"ws://127.0.0.1:{server.port}/ws"
    ) as ws:
        ws.send("hi")
        assert ws.receive(LONG) == "hi"
        assert ws.remote_ip == "127.0.0.1"


def test_connect_over_tls_checks_the_certificate(certificate, server_context):
    def serve(sock):
        with server_context.wrap_socket(sock, server_side=True) as tls:
            serve_echo(tls)

    with Server(serve) as server, connect(
        f"wss://localhost:{server.port}/", TlsTrust(ca=certificate[0].read_text())
    ) as ws:
        ws.send("hi")
        assert ws.receive(LONG) == "hi"
        assert ws.peer_certificate()


def test_connect_says_that_a_certificate_is_not_trusted(server_context):
    def serve(sock):
        with contextlib.suppress(OSError):
            server_context.wrap_socket(sock, server_side=True).close()

    with Server(serve) as server:
        text = complaint(f"wss://localhost:{server.port}/", TlsTrust())
    assert "not trusted: self" in text


def test_connect_says_that_tls_is_not_spoken():
    with Server(
        lambda sock: sock.recv(10) and sock.sendall(b"HTTP/1.1 400 No\r\n\r\n")
    ) as (server):
        text = complaint(f"wss://localhost:{server.port}/", TlsTrust())
    assert "TLS" in text
    assert "ws://" in text


def test_connect_says_that_nobody_listens():
    text = complaint(f"ws://127.0.0.1:{free_port()}/ws")
    assert "refused" in text
    assert "moltis gateway" in text


def test_connect_says_that_a_name_is_not_known():
    assert "'nowhere.invalid'" in complaint("ws://nowhere.invalid/ws")
    assert "cannot be found" in complaint(f"ws://{'x' * 70}.invalid/ws")


def test_connect_says_who_answered_and_what():
    def serve(sock):
        sock.recv(4096)
        sock.sendall(b"HTTP/1.1 502 Bad Gateway\r\nServer: nginx\r\n\r\nsorry")

    with Server(serve) as server:
        text = complaint(f"ws://127.0.0.1:{server.port}/ws?secret=mdt_x")
    assert "HTTP 502 Bad Gateway (from nginx)" in text
    assert "mdt_x" not in text


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.2\r\n", b"\x00", b"HTTQ/1"])
def test_connect_says_at_once_that_it_is_not_http(greeting):
    def serve(sock):
        sock.sendall(greeting)
        sock.recv(4096)
        with contextlib.suppress(OSError):
            assert sock.recv(4096) == b""

    with Server(serve) as server:
        assert "not HTTP" in complaint(f"ws://127.0.0.1:{server.port}/")


def test_connect_says_that_the_answer_did_not_come():
    def serve(sock):
        while sock.recv(4096):
            sock.sendall(b"HTTP/1.1 1")

    with Server(serve) as server:
        text = complaint(f"ws://127.0.0.1:{server.port}/", timeout=0.1)
    assert "within 0.1 s" in text


def test_connect_says_that_the_connection_was_closed_without_an_answer():
    with Server(lambda sock: sock.recv(4096)) as server:
        text = complaint(f"ws://127.0.0.1:{server.port}/")
    assert "closed the connection" in text


def test_connect_bounds_what_it_reads_of_an_answer():
    def serve(sock):
        sock.recv(4096)
        with contextlib.suppress(OSError):
            sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nX: " + bytes(1 << 20))

    with Server(serve) as server:
        complaint(f"ws://127.0.0.1:{server.port}/")


def test_connect_refuses_what_is_no_address():
    with pytest.raises(UsageError):
        connect("gateway:9090")


def test_a_failed_connect_leaves_no_socket_open():
    before = len(os.listdir("/dev/fd"))
    for _ in range(5):
        with Server(lambda sock: sock.recv(4096)) as server:
            complaint(f"ws://127.0.0.1:{server.port}/")
    assert len(os.listdir("/dev/fd")) <= before  # others' may be collected meanwhile


# --- the echo peer ---------------------------------------------------------------


def test_the_echo_peer_echoes_as_server_and_as_client():
    script = str(ROOT / "tests" / "echo_peer.py")
    server = subprocess.Popen(
        [sys.executable, script, "server"], stdout=subprocess.PIPE
    )
    try:
        url = server.stdout.readline().decode().strip()
        with connect(url + "any/path") as ws:
            ws.send("hi")
            assert ws.receive(LONG) == "hi"
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()

    def serve(sock):
        with accept(sock) as ws:
            ws.send("hi")
            return ws.receive(LONG)

    with Server(serve) as ours:
        url = f"ws://127.0.0.1:{ours.port}/"
        subprocess.run(
            [sys.executable, script, "client", url],
            check=True,
            timeout=60,
        )
    assert ours.result == "hi"
