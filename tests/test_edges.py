"""The gateway's door: slow, greedy, confused and forwarded clients."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from peers import InProcessGateway, RawPeer
from support import Program, free_port, memory_of, wait_for

import moltis


@pytest.fixture
def gateway(tmp_path):
    with InProcessGateway(tmp_path / "gateway") as gateway:
        yield gateway


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for what does TLS in front of the gateway."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl here")
    return moltis.ensure_certificate(tmp_path_factory.mktemp("tls"), ["localhost"])


def dial(gateway):
    sock = socket.create_connection(("127.0.0.1", gateway.running.port), 60)
    sock.settimeout(60)
    return sock


def exchange(gateway, request):
    """Send bytes; return all that comes until the gateway hangs up."""
    with dial(gateway) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(request)
        return read_all(sock)


def read_all(sock):
    answer = b""
    with contextlib.suppress(ConnectionError):
        while True:
            data = sock.recv(65536)
            if not data:
                break
            answer += data
    return answer


def is_served(gateway):
    with urllib.request.urlopen(gateway.url + "/health", timeout=60) as answer:
        return json.loads(answer.read())["status"] == "ok"


# -- slow clients ----------------------------------------------------------------------


def test_who_trickles_a_request_is_closed_after_the_time_for_all_of_it(
    gateway, monkeypatch
):
    monkeypatch.setattr(moltis, "REQUEST_TIMEOUT", 5.0)
    with dial(gateway) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")

        def is_closed():
            # Each byte would begin a socket's own timeout anew.
            try:
                sock.sendall(b"x")
            except ConnectionError:
                return True
            assert is_served(gateway)
            return False

        wait_for(is_closed, what="the gateway to hang up")


def test_who_says_nothing_during_tls_is_closed_and_holds_nobody_up(
    tmp_path, certificate, monkeypatch
):
    monkeypatch.setattr(moltis, "REQUEST_TIMEOUT", 5.0)
    tls = moltis.ServerTls(lambda: certificate)
    with contextlib.ExitStack() as stack:
        gateway = stack.enter_context(InProcessGateway(tmp_path / "tls", tls=tls))
        silent = stack.enter_context(dial(gateway))
        halfway = stack.enter_context(dial(gateway))
        halfway.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        assert gateway.call("node.list")
        assert read_all(silent) == b""
        read_all(halfway)


def test_who_does_not_say_connect_is_closed(gateway, monkeypatch):
    monkeypatch.setattr(moltis, "CONNECT_TIMEOUT", 5.0)
    with gateway.peer() as peer:
        with pytest.raises(moltis.ConnectionClosed, match="no connect within"):
            peer.receive()
        assert peer.ws.close_code == 1008


# -- greedy clients --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (b"GET /health HTTP/1.1\r\nHost: h\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 431),
        (  # A line that is read in two parts is not two lines.
            b"POST /api/rpc HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
            + b" " * 1024
            + b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n",
            431,
        ),
        (b"GET / HTTP/1.1\r\n" + b"X: 1\r\n" * 101 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + (b"X: " + b"x" * 900 + b"\r\n") * 90, 431),
        (
            b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n",
            400,
        ),
        (b"POST /api/rpc HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n", 413),
        (b"POST /api/rpc HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 411),
        (b"POST /api/rpc HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
        *(
            (
                b"POST /api/rpc HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + body,
                400,
            )
            for body in (b"x\r\n", b"-1\r\n", b"1\n", b"0x1\r\n", b"1\r\nabc")
        ),
        (b"POST /api/rpc HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 411),
        (
            b"POST /api/rpc HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            400,
        ),
        (
            b"GET /health HTTP/1.1\r\nContent-Length: 0\r\nContent-Length: 4\r\n\r\n",
            400,
        ),
        (
            b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: x\r\n\r\n",
            400,
        ),
        (b"GET /health HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
        (b"GET /health HTTP/1.1\r\nno colon\r\nHost: h\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost : h\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n: h\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nX: a\r\n folded\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n X: a\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nX: a\rContent-Length: 9\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nX: a\0b\r\n\r\n", 400),
        (b"GET /health\rX HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: a/b\r\nConnection: close\r\n\r\n", 400),
        (b"DELETE / HTTP/1.1\r\n\r\n", 501),
        (b"GET / HTTP/9.9\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    ],
)
def test_what_is_no_decent_request_is_refused(gateway, request_head, status):
    answer = exchange(gateway, request_head)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert b"Traceback" not in answer
    assert is_served(gateway)


def slow_reader(gateway):
    """Return a connection on which most of an answer waits at the gateway."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(60)
    sock.connect(("127.0.0.1", gateway.running.port))
    return sock


def download(body=b""):
    return (
        b"GET /moltis.py HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    ) + body


def test_bytes_that_nobody_reads_cost_no_client_its_answer(gateway):
    with slow_reader(gateway) as sock:
        sock.sendall(download(b"x" * 60_000))
        assert read_all(sock).endswith(Path(moltis.__file__).read_bytes())


def test_a_tls_client_that_ends_its_half_gets_the_whole_answer(tmp_path, certificate):
    """RFC 8446 §6.1: its close_notify, which nobody reads, ends its half alone."""
    tls = moltis.ServerTls(lambda: certificate)
    with InProcessGateway(tmp_path / "tls", tls=tls) as gateway:
        context = moltis.TlsTrust(bound=True).context()
        arrived, leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(arrived, leaving)
        with slow_reader(gateway) as sock:

            def exchange_until(done):
                while True:
                    with contextlib.suppress(ssl.SSLWantReadError):
                        return done()
                    sock.sendall(leaving.read())
                    arrived.write(sock.recv(65536))

            exchange_until(client.do_handshake)
            client.write(download())
            with pytest.raises(ssl.SSLWantReadError):
                client.unwrap()
            sock.sendall(leaving.read())
            sock.shutdown(socket.SHUT_WR)
            assert len(read_all(sock)) > len(Path(moltis.__file__).read_bytes())


def test_a_header_line_that_is_too_long_is_not_read_as_two():
    lines = moltis.HeaderLines(io.BytesIO(b"X:" + b" " * 8 + b"Host: other\r\n"))
    with pytest.raises(moltis.RequestTooLarge):
        lines.readline(10)


def test_a_body_that_nobody_reads_does_not_pass_for_a_request(gateway):
    """Or a proxy and we would not agree on where a request begins."""
    hidden = b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    answer = exchange(gateway, head % len(hidden) + hidden)
    assert answer.count(b"HTTP/1.1") == 1
    assert b"\r\nConnection: close\r\n" in answer


@pytest.mark.parametrize(
    "body",
    [
        b'1\r\n{\r\n15;why="not"\r\n"method":"node.list"}\r\n0\r\n\r\n',
        b'16\r\n{"method":"node.list"}\r\n00\r\nTrailer: x\r\n\r\n',
    ],
)
def test_a_body_may_come_in_chunks(gateway, body):
    """RFC 9112 §7.1: as .NET sends it, and so the MCP SDK for C#."""
    head = (
        "POST /api/rpc HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: Chunked\r\n"
        f"Authorization: Bearer {gateway.api_key}  \r\n\r\n"
    ).encode()
    after = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = exchange(gateway, head + body + after)
    assert answer.count(b"HTTP/1.1 200 ") == 2


@pytest.mark.parametrize("known", [True, False])
def test_chunks_have_the_limits_of_a_body(gateway, known):
    key = gateway.api_key if known else "mk_none"
    head = (
        "POST /api/rpc HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        f"Authorization: Bearer {key}\r\n\r\n"
    ).encode()
    chunks = (b"8000\r\n" + b"x" * 0x8000 + b"\r\n") * 64  # 2 MiB
    answer = exchange(gateway, head + chunks)
    assert answer.startswith(b"HTTP/1.1 413 " if known else b"HTTP/1.1 401 ")
    assert answer.count(b"HTTP/1.1") == 1


def test_json_that_is_nested_too_deeply_is_refused_in_time(gateway):
    deep = b"[" * 30_000 + b"]" * 30_000
    head = b"POST /api/sign-in HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n"
    answer = exchange(gateway, head % len(deep) + b"Connection: close\r\n\r\n" + deep)
    assert answer.startswith(b"HTTP/1.1 400 ")
    with gateway.peer() as peer:
        peer.send(deep.decode())
        assert peer.receive()["error"]["code"] == "INVALID_REQUEST"
    assert is_served(gateway)


def test_a_long_body_needs_a_credential_before_it_is_read(gateway):
    body = json.dumps({"method": "node.list", "params": {"x": "y" * 100_000}}).encode()
    head = b"POST /api/rpc HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n"
    answer = exchange(gateway, head % len(body) + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 401 ")
    authorization = f"Authorization: Bearer {gateway.api_key}\r\n".encode()
    known = head % len(body) + authorization + b"Connection: close\r\n\r\n"
    assert exchange(gateway, known + body).startswith(b"HTTP/1.1 200 ")


def test_a_long_message_needs_a_credential_first(gateway):
    long = {"type": "req", "id": "1", "method": "x", "params": {"x": "y" * 500_000}}
    with gateway.peer() as stranger:
        stranger.send(long)
        assert stranger.close_code() == 1009
    with gateway.operator() as operator:
        assert operator.call("node.list", long["params"])


def test_the_memory_of_what_strangers_began_to_send_does_not_add_up(tmp_path):
    """FAULTS D16"""

    def connections(port):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as f:
            return json.load(f)["connections"]

    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here")
    port = free_port()
    request = (
        f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: Upgrade\r\n"
        "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    begun = b"\x81\xff" + (250_000).to_bytes(8, "big") + b"\0" * 4 + b"x" * 240_000
    with Program("gateway", "--port", port, home=tmp_path) as gateway:
        gateway.wait_for_output("Ctrl+C stops it.")
        before = memory_of(gateway.pid)
        held = []
        for _ in range(3):
            with contextlib.ExitStack() as stack:
                for _ in range(200):
                    address = ("127.0.0.1", port)
                    sock = stack.enter_context(socket.create_connection(address, 60))
                    sock.sendall(request.encode())
                    assert sock.recv(1000).startswith(b"HTTP/1.1 101")
                    sock.sendall(begun)
                wait_for(
                    lambda: memory_of(gateway.pid) > before + 40 * 2**20,
                    what="the load",
                )
                held.append(memory_of(gateway.pid) - before)
            wait_for(lambda: connections(port) == 0, what="the end of all connections")
        # The C library may keep some of it, for the next of them.
        assert memory_of(gateway.pid) - before < held[0] * 1.5
    assert max(held) < held[0] * 1.5


def test_strangers_leave_room_for_those_who_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(moltis, "MAX_STRANGERS", 6)
    monkeypatch.setattr(moltis, "REQUEST_TIMEOUT", 60.0)
    with contextlib.ExitStack() as stack:
        gateway = stack.enter_context(InProcessGateway(tmp_path / "small"))
        operator = stack.enter_context(gateway.operator())
        stack.enter_context(gateway.node("far"))
        strangers = [stack.enter_context(dial(gateway)) for _ in range(30)]
        # Those beyond the limit are hung up on at once, the others in a minute.
        wait_for(lambda: sum(map(moltis.is_closed_there, strangers)) >= 20)
        assert not all(map(moltis.is_closed_there, strangers))
        args = {"command": "echo still here"}
        run = {"nodeId": "far", "command": "system.run", "args": args}
        assert operator.call("node.invoke", run)["stdout"] == "still here\n"
        for sock in strangers:
            sock.close()
        wait_for(lambda: tries_to_connect(gateway), what="room for others again")


def test_a_system_without_a_free_thread_refuses_connections(
    gateway, monkeypatch, capfd, caplog
):
    """As in a container with `pids.max`: socketserver would print each traceback."""
    start = moltis.ConnectionThreads.start

    def fail(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(moltis.ConnectionThreads, "start", fail)
    for _ in range(3):
        assert exchange(gateway, b"") == b""
    assert [r.getMessage() for r in caplog.records] == [
        "can't start new thread: refused one of address=127.0.0.1"
    ]
    monkeypatch.setattr(moltis.ConnectionThreads, "start", start)
    assert gateway.call("node.list")
    assert capfd.readouterr().err == ""


def tries_to_connect(gateway):
    with contextlib.suppress(moltis.Unreachable):
        return gateway.call("node.list")


class Limits:
    """ConnectionLimits with a clock of the test's own and sockets that are no one's."""

    def __init__(self, total, **limits):
        self.now = 0.0
        self.limits = moltis.ConnectionLimits(total, clock=lambda: self.now, **limits)
        self.sock = socket.socket()
        self.move, self.identify = self.limits.move, self.limits.identify
        self.forget = self.limits.forget

    def admit(self, address, *, shared=False):
        return self.limits.admit(address, self.sock, shared=shared)


@pytest.fixture
def limited():
    made = []

    def make(total, **limits):
        made.append(Limits(total, **limits))
        return made[-1]

    yield make
    for limits in made:
        limits.sock.close()


def operator(name, *scopes):
    return moltis.Caller(moltis.OPERATOR, name, name, scopes)


ADMIN = operator("owner", moltis.Scope.ADMIN)
READER = operator("reader", moltis.Scope.READ)


@pytest.mark.parametrize(
    "neighbours",
    [
        ("192.0.2.1", "192.0.2.200", "::ffff:192.0.2.3"),
        ("2001:db8:1::1", "2001:db8:1:ffff::1", "2001:db8:1:2:3::"),
    ],
)
def test_neighbours_share_the_room_of_a_network(limited, neighbours):
    limits = limited(100, strangers=10, strangers_each=2)
    first, second = map(limits.admit, neighbours[:2])
    assert limits.admit(neighbours[2]) is None  # the others have just come
    limits.now = moltis.STRANGER_TIME
    assert limits.admit(neighbours[2])
    assert (first.network, bool(second.network)) == ("", True)  # the oldest made room


@pytest.mark.parametrize(
    "flood",
    [
        [f"2001:db8:{n % 4}::{n:x}" for n in range(1024)],
        [f"10.{n // 256}.{n % 256}.1" for n in range(1024)],
        ["198.51.100.1"] * 1024,
    ],
)
def test_a_newcomer_gets_in_whoever_else_idles(limited, flood):
    limits = limited(16_000, strangers=1024, strangers_each=256)
    known = limits.admit("192.0.2.1")
    limits.identify(known, READER)
    idle = [limits.admit(address, shared=True) for address in flood]
    newcomer = limits.admit("192.0.2.9")
    assert newcomer
    assert (idle[0].network == "") is (len(idle) == 1024)
    for address in flood:
        limits.admit(address, shared=True)
    assert newcomer.network or len(set(flood)) == 1024  # the flood's own made room
    limits.identify(newcomer, ADMIN)


def test_the_client_of_a_proxy_counts_in_its_own_network(limited):
    limits = limited(100, strangers=10, strangers_each=2)
    for _ in range(2):
        limits.move(limits.admit("127.0.0.1", shared=True), "203.0.113.7")
    late = limits.admit("127.0.0.1", shared=True)
    with pytest.raises(moltis.RpcError, match="from your network"):
        limits.move(late, "203.0.113.9")
    limits.move(limits.admit("127.0.0.1", shared=True), "198.51.100.9")


def test_a_key_has_a_share_and_an_administrator_gets_in(limited):
    limits = limited(80, strangers=20, strangers_each=20)
    taken = [limits.admit("192.0.2.1") for _ in range(11)]
    for admission in taken[:10]:
        limits.identify(admission, READER)
    with pytest.raises(moltis.RpcError, match="too many connections of reader"):
        limits.identify(taken[10], READER)
    limits.identify(taken[10], operator("other", moltis.Scope.READ))
    limits.forget(taken[0])
    limits.identify(limits.admit("192.0.2.1"), READER)
    others = [operator(f"key {n}", moltis.Scope.WRITE) for n in range(7)]
    room = 80 - 20 - 11
    for n in range(room):
        limits.identify(limits.admit("192.0.2.1"), others[n % 7])
    with pytest.raises(moltis.RpcError, match="too many connections;"):
        limits.identify(limits.admit("192.0.2.1"), operator("late", moltis.Scope.WRITE))
    limits.identify(limits.admit("192.0.2.1"), ADMIN)


def test_the_ended_and_the_identified_are_no_strangers(limited):
    limits = limited(100, strangers=3, strangers_each=3)
    for _ in range(20):
        limits.forget(limits.admit("192.0.2.1"))
        admission = limits.admit("192.0.2.1")
        limits.identify(admission, ADMIN)
        limits.identify(admission, ADMIN)
        limits.forget(admission)
    assert all(limits.admit("192.0.2.1") for _ in range(3))
    assert limits.admit("192.0.2.1") is None


def test_idle_clients_of_a_proxy_keep_nobody_out(tmp_path, monkeypatch):
    monkeypatch.setattr(moltis, "MAX_STRANGERS", 8)
    proxies = moltis.TrustedProxies(["127.0.0.1"])
    with contextlib.ExitStack() as stack:
        gateway = stack.enter_context(InProcessGateway(tmp_path / "g", proxies=proxies))
        for number in range(24):
            forwarded = [("X-Forwarded-For", f"2001:db8:{number % 4}::{number:x}")]
            with contextlib.suppress(moltis.MoltisError):
                url = gateway.websocket_url
                stack.enter_context(RawPeer(url, headers=forwarded))
        assert gateway.call("node.list")


def test_a_key_that_has_its_share_is_told_so_and_others_get_in(tmp_path, monkeypatch):
    monkeypatch.setattr(moltis, "MAX_KEY_CONNECTIONS", 3)
    with contextlib.ExitStack() as stack:
        gateway = stack.enter_context(InProcessGateway(tmp_path / "g"))
        made = gateway.call("keys.create", name="ci", scopes=["operator.read"])
        for _ in range(3):
            stack.enter_context(moltis.OperatorClient(gateway.url, made["key"]))
        with pytest.raises(moltis.MoltisError, match="too many connections of ci"):
            moltis.OperatorClient(gateway.url, made["key"])
        authorization = {"Authorization": f"Bearer {made['key']}"}
        body = json.dumps({"method": "node.list"}).encode()
        request = urllib.request.Request(gateway.url + "/api/rpc", body, authorization)
        with pytest.raises(urllib.error.HTTPError, match="429"):
            urllib.request.urlopen(request, timeout=60)
        assert gateway.call("node.list")


# -- other sites' pages ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "host", "allowed"),
    [
        ("http://{host}", None, True),
        ("https://{host}", None, False),
        ("http://evil.example", None, False),
        ("http://{host}.evil.example", None, False),
        ("http://evil.example", "evil.example", False),
        ("http://gateway.lan", "gateway.lan", False),
        ("null", None, False),
        ("", None, False),
    ],
)
def test_a_page_of_another_origin_opens_no_websocket(gateway, origin, host, allowed):
    own = f"127.0.0.1:{gateway.running.port}"
    lines = [
        "GET /ws HTTP/1.1",
        f"Host: {host or own}",
        f"Origin: {origin.format(host=own)}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    ]
    with dial(gateway) as sock:
        sock.sendall("\r\n".join([*lines, "", ""]).encode())
        status = int(sock.recv(4096).split()[1])
    assert (status == 101) is allowed
    assert status in (101, 403, 421)


def test_no_answer_tells_versions_or_lets_others_embed_it(gateway):
    for path in ("/", "/health", "/nowhere", "/api/rpc"):
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        head = exchange(gateway, request.encode()).partition(b"\r\n\r\n")[0].decode()
        assert "python" not in head.lower()
        assert "\r\nX-Content-Type-Options: nosniff\r\n" in head
        assert "\r\nReferrer-Policy: no-referrer\r\n" in head
        assert "frame-ancestors 'none'" in head
        assert "unsafe-inline" not in head
        assert "Access-Control-" not in head


# -- proxies ---------------------------------------------------------------------------

NGINX_HEADERS = """\
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection "upgrade";
"""
NGINX = """
daemon off;
master_process off;
pid {directory}/pid;
error_log stderr;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {directory};
    proxy_temp_path {directory};
    fastcgi_temp_path {directory};
    uwsgi_temp_path {directory};
    scgi_temp_path {directory};
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {certificate};
        ssl_certificate_key {key};
        location / {{
            proxy_pass http://127.0.0.1:{gateway};
{headers}        }}
    }}
}}
"""


class Nginx:
    """A real nginx that does TLS in front of a gateway."""

    def __init__(self, directory, gateway, files):
        self.port = free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        config = directory / "nginx.conf"
        text = NGINX.format(
            headers=NGINX_HEADERS,
            directory=directory,
            port=self.port,
            gateway=gateway.running.port,
            certificate=files.certificate,
            key=files.key,
        )
        config.write_text(text)
        self._process = subprocess.Popen(
            [shutil.which("nginx"), "-p", str(directory), "-c", str(config)],
            stderr=subprocess.DEVNULL,
        )
        wait_for(self._listens, what="nginx to listen")

    def _listens(self):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 5).close()
            return True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait(60)


@pytest.fixture
def proxied(tmp_path, certificate):
    """A gateway that trusts its proxy, and knows the certificate which that shows."""
    if not shutil.which("nginx"):
        pytest.skip("no nginx here")
    binding = moltis.read_channel_binding(certificate.certificate)
    proxies = moltis.TrustedProxies(["127.0.0.1"], binding)
    with InProcessGateway(tmp_path / "gateway", proxies=proxies) as gateway:
        directory = tmp_path / "nginx"
        directory.mkdir()
        with Nginx(directory, gateway, certificate) as nginx:
            yield gateway, nginx


def ask_through(nginx, method, path, body=b"", **headers):
    """Return the answer to a request that comes from 127.0.0.2."""
    import http.client

    connection = http.client.HTTPSConnection(
        "127.0.0.1",
        nginx.port,
        timeout=10,
        source_address=("127.0.0.2", 0),
        context=moltis.TlsTrust(bound=True).context(),
    )
    try:
        fields = {name.replace("_", "-"): text for name, text in headers.items()}
        connection.request(method, path, body, fields)
        answer = connection.getresponse()
        answer.body = answer.read()
        return answer
    finally:
        connection.close()


def test_a_node_binds_to_the_certificate_of_a_proxy_that_is_known(proxied):
    """SCRAM-SHA-256-PLUS through a real nginx"""
    gateway, nginx = proxied
    gateway.websocket_url = moltis.websocket_url(nginx.url)
    with gateway.node("far"):
        args = {"command": "echo through nginx"}
        result = gateway.call(
            "node.invoke", nodeId="far", command="system.run", args=args
        )
    assert result["stdout"] == "through nginx\n"


def test_who_comes_through_a_trusted_proxy_keeps_address_scheme_and_origin(proxied):
    gateway, nginx = proxied
    key = json.dumps({"key": gateway.api_key}).encode()
    answer = ask_through(
        *(nginx, "POST", "/api/sign-in", key),
        Origin=nginx.url,
        X_Forwarded_For="203.0.113.7",  # nobody can make up where they come from
    )
    assert answer.status == 200, answer.body
    assert "; Secure" in answer.headers["Set-Cookie"]
    (login,) = gateway.call("logins.list")
    assert login["address"] == "127.0.0.2"
    code = gateway.call("device.token.create")["joinCode"]
    offer = json.loads(ask_through(nginx, "GET", f"/join/{code}").body)
    assert offer["gateway_url"] == moltis.websocket_url(nginx.url)
    foreign = ask_through(nginx, "POST", "/api/sign-in", key, Origin="https://evil")
    assert foreign.status == 403


def test_guessing_through_a_proxy_locks_out_who_guesses_and_nobody_else(proxied):
    gateway, nginx = proxied
    wrong = json.dumps({"key": "mk_wrong"}).encode()
    statuses = [
        ask_through(nginx, "POST", "/api/sign-in", wrong).status for _ in range(6)
    ]
    assert statuses == [401] * 5 + [429]
    context = moltis.TlsTrust(bound=True).context()
    request = urllib.request.Request(
        nginx.url + "/api/sign-in", json.dumps({"key": gateway.api_key}).encode()
    )
    with urllib.request.urlopen(request, timeout=60, context=context) as answer:
        assert answer.status == 200


def test_websockets_of_browsers_pass_a_trusted_proxy(proxied):
    gateway, nginx = proxied
    params = moltis.ConnectParams(
        role="operator", client_id="page", api_key=gateway.api_key
    )
    peer = RawPeer(
        moltis.websocket_url(nginx.url),
        moltis.TlsTrust(bound=True),
        headers=[("Origin", nginx.url)],
    )
    with peer:
        assert peer.request("connect", params.to_json())["ok"]


PREFIXES = ("", "/moltis")


def nginx_config(port, gateway, prefix):
    return nginx_config_of(port, {prefix: gateway})


def nginx_config_of(port, gateways):
    """`gateways` are ports by prefix."""
    locations = "\n".join(
        f"""
        location {prefix}/ {{
            proxy_pass http://127.0.0.1:{gateway}/;
{NGINX_HEADERS}        }}"""
        for prefix, gateway in gateways.items()
    )
    return f"""
daemon off;
master_process off;
pid nginx.pid;
error_log stderr;
events {{ }}
http {{
    access_log off;
    client_body_temp_path .;
    proxy_temp_path .;
    fastcgi_temp_path .;
    uwsgi_temp_path .;
    scgi_temp_path .;
    server {{
        listen 127.0.0.1:{port};{locations}
    }}
}}
"""


def caddy_config(port, gateway, prefix):
    return f"""
{{
    admin off
    auto_https off
    storage file_system .
}}
http://:{port} {{
    bind 127.0.0.1
    handle_path {prefix}/* {{
        reverse_proxy 127.0.0.1:{gateway}
    }}
}}
"""


def haproxy_config(port, gateway, prefix):
    return f"""
defaults
    mode http
    option forwardfor
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    timeout tunnel 60s
frontend door
    bind 127.0.0.1:{port}
    http-request set-header X-Forwarded-Proto http
    http-request replace-path {prefix}(/.*) \\1
    default_backend gateway
backend gateway
    server moltis 127.0.0.1:{gateway}
"""


def apache_config(port, gateway, prefix):
    modules = "/usr/lib/apache2/modules"
    names = (
        *("mpm_event", "authz_core", "headers", "rewrite"),
        *("proxy", "proxy_http", "proxy_wstunnel"),
    )
    load = "\n".join(f"LoadModule {n}_module {modules}/mod_{n}.so" for n in names)
    return f"""
ServerRoot .
PidFile apache.pid
ErrorLog /dev/null
DefaultRuntimeDir .
Mutex pthread
ServerName localhost
Listen 127.0.0.1:{port}
{load}
ProxyRequests Off
RequestHeader set X-Forwarded-Proto http
RewriteEngine On
RewriteCond %{{HTTP:Upgrade}} websocket [NC]
RewriteRule ^{prefix}/(.*) ws://127.0.0.1:{gateway}/$1 [P,L]
ProxyPass {prefix}/ http://127.0.0.1:{gateway}/
"""


# By the program's name: its configuration, and its arguments before the file's name.
PROXIES = {
    "nginx": (nginx_config, ("-p", ".", "-c")),
    "caddy": (caddy_config, ("run", "--adapter", "caddyfile", "--config")),
    "haproxy": (haproxy_config, ("-db", "-f")),
    "apache2": (apache_config, ("-DFOREGROUND", "-d", ".", "-f")),
}


@contextlib.contextmanager
def proxy_of_debian(name, port, config, directory):
    """Run a proxy of PROXIES, which listens on `port`, in a directory of its own."""
    file = directory / "proxy.conf"
    file.write_text(config)
    process = subprocess.Popen(
        [shutil.which(name), *PROXIES[name][1], str(file)],
        cwd=directory,
        env={**os.environ, "HOME": str(directory)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def listens():
        assert process.poll() is None, f"{name} ended with {process.poll()}"
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 5).close()
            return True

    try:
        wait_for(listens, what=f"{name} to listen")
        yield
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(params=[(name, prefix) for name in PROXIES for prefix in PREFIXES])
def behind(request, tmp_path):
    """A gateway, and the address of its page behind a proxy of Debian."""
    name, prefix = request.param
    if not shutil.which(name):
        pytest.skip(f"no {name} here")
    proxies = moltis.TrustedProxies(["127.0.0.1"])
    config = PROXIES[name][0]
    port = free_port()
    with InProcessGateway(tmp_path / "gateway", proxies=proxies) as gateway:
        text = config(port, gateway.running.port, prefix)
        with proxy_of_debian(name, port, text, tmp_path):
            yield gateway, f"http://127.0.0.1:{port}{prefix}"


def test_all_of_a_gateway_is_there_behind_a_proxy(behind):
    """With nothing at the proxy but what README asks for, and with a path or without"""
    gateway, url = behind
    origin = url[: -len("/moltis")] if url.endswith("/moltis") else url

    def ask_proxy(path, body=None, **headers):
        headers = {name.replace("_", "-"): text for name, text in headers.items()}
        request = urllib.request.Request(url + path, body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode(), answer.headers

    for view in ("/", "/chat/main"):
        page, _ = ask_proxy(view)
        for link in re.findall(r'(?:href|src)="([^"]*app\.[a-z]+)"', page):
            found = urllib.parse.urljoin(url + view, link)
            assert ask_proxy(found[len(url) :])[0] in (
                moltis.WEB_CSS.decode(),
                moltis.WEB_JS.decode(),
            )
    assert ask_proxy("/install.sh")[0] == moltis.INSTALL_SH
    assert ask_proxy("/moltis.py")[0]

    key = json.dumps({"key": gateway.api_key}).encode()
    body, headers = ask_proxy("/api/sign-in", key, Origin=origin)
    assert gateway.call("logins.list")[0]["address"] == "127.0.0.1"
    cookie = headers["Set-Cookie"].partition(";")[0]
    port = urllib.parse.urlsplit(url).port
    assert cookie.startswith(f"moltis_login_http_{port}=")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        ask_proxy("/api/sign-in", key, Origin="https://evil.example")
    browser = [("Cookie", cookie), ("Origin", origin)]
    params = moltis.ConnectParams(
        role="operator", client_id="page", page_secret=json.loads(body)["pageSecret"]
    )
    with RawPeer(moltis.websocket_url(url), headers=browser) as peer:
        assert peer.request("connect", params.to_json())["ok"]

    code = gateway.call("device.token.create", displayName="far")["joinCode"]
    link = f"{url}/join/{code}"
    offer = json.loads(ask_proxy(f"/join/{code}")[0])
    joined = moltis.joined_gateway(link, offer["gateway_url"])
    assert joined == moltis.websocket_url(url)
    gateway.websocket_url = joined
    with gateway.node("far", offer["device_token"]):
        run = {"command": "echo through", "timeout": 20_000}
        with moltis.OperatorClient(url, gateway.api_key) as operator:
            call = {"nodeId": "far", "command": "system.run", "args": run}
            assert operator.call("node.invoke", call)["stdout"] == "through\n"


def test_what_a_stranger_says_of_forwarding_is_not_believed(gateway):
    key = json.dumps({"key": gateway.api_key}).encode()
    headers = {
        "X-Forwarded-For": "203.0.113.7",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "evil.example",
    }
    request = urllib.request.Request(gateway.url + "/api/sign-in", key, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert "Secure" not in answer.headers["Set-Cookie"]
    assert gateway.call("logins.list")[0]["address"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("forwarded", "address"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("198.51.100.1, 203.0.113.7", "203.0.113.7"),
        ("203.0.113.7, 10.1.2.3", "203.0.113.7"),
        ("203.0.113.7, 10.1.2.3, 10.9.9.9", "203.0.113.7"),
        ("2001:db8::1", "2001:db8::1"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("10.1.2.3", "10.1.2.3"),
        ("unknown", "10.0.0.1"),
        ("203.0.113.7, unknown", "10.0.0.1"),
        ("", "10.0.0.1"),
        ("203.0.113.66:5001", "203.0.113.66"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        (" 198.51.100.1 ,203.0.113.7:80 , 10.1.2.3:99 ", "203.0.113.7"),
        ("[nothing]:443", "10.0.0.1"),
    ],
)
def test_the_client_is_who_the_last_trusted_proxy_heard(forwarded, address):
    assert seen_through({"X-Forwarded-For": forwarded}).client == address


def seen_through(fields, host="gateway", scheme="http"):
    """Return the public address of a request that comes from a trusted proxy."""
    from email.message import Message

    headers = Message()
    for name, text in fields.items():
        headers[name] = text
    proxies = moltis.TrustedProxies(["10.0.0.0/8"])
    host, port = moltis.split_host(host, scheme)
    direct = moltis.PublicAddress("10.0.0.1", scheme, host, port)
    return proxies.public_address(headers, direct)


@pytest.mark.parametrize(
    ("fields", "client", "url"),
    [
        ({"X-Forwarded-Proto": "https"}, "10.0.0.1", "https://gateway"),
        ({"X-Forwarded-Proto": "wss"}, "10.0.0.1", "https://gateway"),
        ({"X-Forwarded-Proto": "WSS"}, "10.0.0.1", "https://gateway"),
        ({"X-Forwarded-Proto": "ws"}, "10.0.0.1", "http://gateway"),
        (
            {"X-Forwarded-Proto": "https", "X-Forwarded-Port": "8443"},
            *("10.0.0.1", "https://gateway:8443"),
        ),
        (
            {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "Other.example:444"},
            *("10.0.0.1", "https://other.example:444"),
        ),
        (
            {"X-Forwarded-Proto": "https", "X-Forwarded-Prefix": "/moltis/"},
            *("10.0.0.1", "https://gateway/moltis"),
        ),
        (
            {"X-Forwarded-Proto": "https", "X-Forwarded-Prefix": "//evil"},
            *("10.0.0.1", "https://gateway"),
        ),
        (
            {
                "X-Forwarded-For": "203.0.113.7, 10.0.0.2",
                "X-Forwarded-Proto": "wss, ws",
            },
            *("203.0.113.7", "https://gateway"),
        ),
        (
            {"Forwarded": 'for="[2001:db8::1]:443";proto=https;host="h.example:444"'},
            *("2001:db8::1", "https://h.example:444"),
        ),
        (
            {"Forwarded": "For=198.51.100.1, for=203.0.113.7:99;Proto=HTTPS"},
            *("203.0.113.7", "https://gateway"),
        ),
        ({"Forwarded": "for=_hidden"}, "10.0.0.1", "http://gateway"),
        (
            {"X-Forwarded-For": "203.0.113.7", "Forwarded": "for=198.51.100.1"},
            *("203.0.113.7", "http://gateway"),
        ),
    ],
)
def test_a_trusted_proxy_says_where_a_request_comes_from(fields, client, url):
    """RFC 7239, and the headers before it"""
    public = seen_through(fields)
    assert (public.client, public.url) == (client, url)


@pytest.mark.parametrize(
    ("host", "origin", "same"),
    [
        ("h:443", "https://h", True),
        ("h", "https://h:443", True),
        ("H", "https://h", True),
        ("h:8443", "https://h", False),
        ("h", "https://h:8443", False),
        ("h", "http://h", False),
        ("[2001:db8::1]", "https://[2001:db8::1]:443", True),
        ("h", "https://user@h", False),
        ("h", "https://h/", False),
        ("h", "null", False),
        ("h", "https://h:x", False),
        ("h", "https://", False),
    ],
)
def test_an_origin_is_scheme_name_and_effective_port(host, origin, same):
    """RFC 6454 §5"""
    name, port = moltis.split_host(host, "https")
    public = moltis.PublicAddress("192.0.2.1", "https", name, port)
    assert public.is_origin(origin) is same


def test_a_proxy_that_is_no_network_is_refused():
    with pytest.raises(moltis.UsageError, match=re.escape("10.0.0.0/8, not nginx")):
        moltis.TrustedProxies(["nginx"])
