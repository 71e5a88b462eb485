"""The one way to another machine: addresses, names, proxies, connections."""

from __future__ import annotations

import base64
import contextlib
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import RUN_ALL
from support import (
    ROOT,
    ScriptedServer,
    clean_environment,
    free_port,
    run_moltis,
    trickling_server,
    wait_for,
)

import moltis
from moltis import ServerUrl, UsageError

PROXY = "http://proxy.test:3128"
LONG = 30.0  # s


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for names in (*moltis.PROXY_VARIABLES.values(), moltis.NO_PROXY_VARIABLES):
        for name in names:
            monkeypatch.delenv(name, raising=False)


# -- several addresses (RFC 8305) ----------------------------------------------------


def entry(port, family=socket.AF_INET, host="127.0.0.1"):
    return (family, socket.SOCK_STREAM, 6, "", (host, port))


@contextlib.contextmanager
def silent_port():
    """Yield a port whose listener answers no SYN: its queue is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        address = server.getsockname()
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(address)
            fillers.append(filler)
        yield address[1]
        for filler in fillers:
            filler.close()


def resolve_to(monkeypatch, *entries):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_k: list(entries))


def test_the_second_address_of_a_name_is_dialled_when_the_first_refuses(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        resolve_to(monkeypatch, entry(free_port()), entry(port))
        with moltis.dial("name", port, timeout=LONG) as sock:
            assert sock.getpeername()[1] == port
        resolve_to(monkeypatch)
        with pytest.raises(OSError, match="name has no address"):
            moltis.dial("name", port, timeout=LONG)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a queue that drops SYNs")
def test_the_second_address_starts_a_quarter_second_after_a_silent_one(monkeypatch):
    """RFC 8305 §5"""
    with silent_port() as silent, socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        resolve_to(monkeypatch, entry(silent), entry(silent), entry(port))
        started = time.monotonic()
        with moltis.dial("name", port, timeout=LONG) as sock:
            assert sock.getpeername()[1] == port
        assert 0.5 <= time.monotonic() - started < LONG / 2
        resolve_to(monkeypatch, entry(silent), entry(silent))
        with pytest.raises(socket.timeout):
            moltis.dial("name", port, timeout=0.6)


def test_addresses_of_both_families_take_turns(monkeypatch):
    """RFC 8305 §4"""
    six = entry(1, socket.AF_INET6, "::1")
    resolve_to(monkeypatch, six, six, entry(1))
    families = [found[0] for found in moltis._addresses("name", 1)]
    assert families == [socket.AF_INET6, socket.AF_INET, socket.AF_INET6]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a queue that drops SYNs")
def test_a_dial_can_be_cancelled(monkeypatch):
    with silent_port() as silent:
        resolve_to(monkeypatch, entry(silent))
        cancel = moltis.Cancellation()
        timer = threading.Timer(0.1, cancel.cancel)
        timer.start()
        with pytest.raises(moltis.Cancelled):
            moltis.dial("name", silent, timeout=LONG, cancel=cancel)
        timer.join()


def test_an_http_request_reaches_an_ipv6_address_whose_end_is_no_number():
    """RFC 3986 §3.2.2: the brackets tell the address from the port."""
    with ScriptedServer(lambda _: (200, {}, [b"here"])) as server:
        url = f"http://[::ffff:127.0.0.1]:{server.port}/"
        with moltis.http_exchange("GET", url) as response:
            assert response.read() == b"here"
        assert server.requests[0][2]["Host"] == f"[::ffff:127.0.0.1]:{server.port}"


@pytest.mark.parametrize(
    ("head", "rest"),
    ids=["head", "length", "to the end", "chunk", "redirects"],
    argvalues=[
        ("HTTP/1.1 200 OK\r\nX: ", "x"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", "x"),
        ("HTTP/1.1 200 OK\r\n\r\n", "x"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "0"),
        ("HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 3\r\n\r\n", "x"),
    ],
)
def test_an_answer_that_trickles_is_given_up_after_the_time_for_all_of_it(head, rest):
    """Each byte would begin a socket's own timeout anew."""
    begun = time.monotonic()
    with trickling_server(head, rest) as url, pytest.raises(
        moltis.Unreachable, match=r"fetched: .* did not finish its answer"
    ) as caught:
        moltis.fetch(f"{url}/join/mc_abcdefgh", moltis.TlsTrust(), 0.4)
    assert time.monotonic() - begun < LONG / 2
    assert "mc_abcdefgh" not in str(caught.value)


def test_a_model_server_that_trickles_its_list_is_given_up(monkeypatch):
    monkeypatch.setattr(moltis, "ANSWER_LIMIT", 0.3)
    with trickling_server("HTTP/1.1 200 OK\r\n\r\n", "x") as url:
        environ = {"OLLAMA_HOST": url}
        assert moltis.find_ollama(environ, moltis.Cancellation()) is None
        catalog = moltis.ModelCatalog(moltis.make_providers(environ, {}))
        models, errors = catalog.models(moltis.Cancellation())
    assert models == []
    assert "did not finish its answer within 0.3 s" in errors["ollama"]


# -- names ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "modern"),
    [
        ("faß.test", "xn--fa-hia.test"),
        ("FAẞ.test", "xn--fa-hia.test"),
        ("βόλος.test", "xn--nxasmm1c.test"),
        ("نامه\u200cای.test", "xn--mgba3gch31f060k.test"),
    ],
)
def test_a_name_with_two_meanings_is_refused_with_the_one_of_today(host, modern):
    """UTS 46, deviations between IDNA 2003 and IDNA 2008"""
    for parse in (ServerUrl.parse, moltis.websocket_url):
        with pytest.raises(UsageError, match=f"write {modern} if"):
            parse(f"ws://{host}:9090/ws")
    with pytest.raises(moltis.Unreachable, match=modern):
        moltis.fetch(f"http://{host}/", moltis.TlsTrust())
    assert ServerUrl.parse(f"ws://{modern}/").host == modern


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("bücher.test", "xn--bcher-kva.test"),
        ("BÜCHER.test", "xn--bcher-kva.test"),
        ("bu\u0308cher.test", "xn--bcher-kva.test"),
        ("例え。テスト", "xn--r8jz45g.xn--zckzah"),
        ("ΣΙΓΜΑ.test", "xn--mxadrn6a.test"),
        ("so\u00adft.test", "soft.test"),
    ],
)
def test_a_name_with_one_meaning_is_taken(host, name):
    assert ServerUrl.parse(f"ws://{host}/").host == name


@pytest.mark.parametrize(
    ("typed", "host"),
    [
        ("[fe80::1%25lo]", "fe80::1%lo"),
        ("[fe80::1%lo]", "fe80::1%lo"),
        ("[fe80::1%251]", "fe80::1%1"),
        ("[fe80::1%25]", "fe80::1%25"),
    ],
)
def test_a_zone_is_taken_in_both_notations_and_kept_from_the_peer(typed, host):
    """RFC 6874; as curl does"""
    target = ServerUrl.parse(f"ws://{typed}:9090/ws")
    assert target.host == host
    assert target.host_header == "[fe80::1]:9090"
    kept = moltis.websocket_url(f"ws://{typed}:9090/ws")
    assert ServerUrl.parse(kept) == target


LINK_LOCAL = """
import socket, subprocess, sys
sys.path.insert(0, sys.argv[1])
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
subprocess.run(["ip", "address", "add", "fe80::1/64", "dev", "lo", "nodad"], check=True)
import moltis
with socket.create_server(("::", 0), family=socket.AF_INET6) as server:
    for zone in ("%25lo", "%lo"):
        target = moltis.ServerUrl.parse(f"ws://[fe80::1{zone}]/")
        moltis.dial(target.host, server.getsockname()[1], timeout=30).close()
print("reached")
"""


def test_a_link_local_address_is_reached_through_its_zone():
    inside = ["unshare", "-rn", sys.executable, "-c", LINK_LOCAL, str(ROOT)]
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        assert not RUN_ALL, "unshare or ip is missing"
        pytest.skip("needs the programs unshare and ip")
    done = subprocess.run(inside, check=False, capture_output=True, text=True)
    assert done.stdout == "reached\n", done.stderr


# -- which proxy ---------------------------------------------------------------------


def proxy_of(host, secure, **environ):
    found = moltis.find_proxy(host, environ, secure=secure)
    return None if found is None else f"{found.host}:{found.port}"


@pytest.mark.parametrize(
    ("secure", "environ", "proxy"),
    [
        (True, {}, None),
        (True, {"https_proxy": PROXY}, "proxy.test:3128"),
        (True, {"HTTPS_PROXY": "proxy.test"}, "proxy.test:1080"),
        (True, {"https_proxy": "http://a:1", "HTTPS_PROXY": "http://b:2"}, "a:1"),
        (True, {"https_proxy": "", "HTTPS_PROXY": "http://b:2"}, "b:2"),
        (True, {"http_proxy": PROXY}, None),
        (True, {"ALL_PROXY": PROXY}, "proxy.test:3128"),
        (True, {"all_proxy": "http://a:1", "ALL_PROXY": PROXY}, "a:1"),
        (False, {"http_proxy": PROXY}, "proxy.test:3128"),
        (False, {"HTTP_PROXY": PROXY}, None),  # a request's header, in CGI
        (False, {"https_proxy": PROXY}, None),
        (False, {"all_proxy": PROXY}, "proxy.test:3128"),
        (False, {"http_proxy": "http://u:p%40@[::2]:8/"}, "::2:8"),
    ],
)
def test_proxies_come_from_the_environment_as_curl_reads_it(secure, environ, proxy):
    assert proxy_of("gateway.test", secure, **environ) == proxy


@pytest.mark.parametrize(
    ("host", "exempt", "direct"),
    [
        ("gateway.test", "*", True),
        ("gateway.test", "gateway.test", True),
        ("GATEWAY.test.", "other, .Test", True),
        ("gateway.test", "test.", True),
        ("mygateway.test", "gateway.test", False),
        ("gateway.test", "gateway", False),
        ("gateway.test", "*.test", False),  # curl has no other patterns either
        ("gateway.test", "", False),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("11.1.2.3", "10.0.0.0/8", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3", "2.3", False),
        ("10.1.2.3", "10.1.2.0/99", False),
        ("10.1.2.3", "10.1.2.0/x", False),
        ("2001:db8::7", "2001:db8::/32", True),
        ("2001:db9::7", "2001:db8::/32", False),
        ("2001:db8::7", "[2001:db8:0::7]", True),
        ("::ffff:10.1.2.3", "10.0.0.0/8", True),
    ],
)
@pytest.mark.parametrize("variable", ["no_proxy", "NO_PROXY"])
def test_no_proxy_names_suffixes_addresses_and_networks(variable, host, exempt, direct):
    found = proxy_of(host, True, HTTPS_PROXY=PROXY, **{variable: exempt})
    assert (found is None) is direct


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST.",
        "x.localhost",
        "127.0.0.1",
        "127.1",
        "0x7f000001",
        "::1",
        "::ffff:127.0.0.1",
        "0.0.0.0",
        "::",
    ],
)
def test_nothing_for_this_machine_goes_through_a_proxy(host):
    environ = {"all_proxy": PROXY, "http_proxy": PROXY, "https_proxy": PROXY}
    assert proxy_of(host, True, **environ) is None
    assert proxy_of(host, False, **environ) is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("socks5h://u:secret@p:1", "socks5h:// is not supported"),
        ("socks://u:secret@[::1]:1/", "socks:// is not supported"),
        ("SOCKS4A://p", "SOCKS4A:// is not supported"),
        ("https://p", "https:// is not supported"),
        ("http://u:secret@", "looks like http://proxy:3128"),
        ("http://p:port", "looks like"),
        ("http://[::1", "looks like"),
        ("p:99999", "looks like"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named_without_its_password(value, words):
    with pytest.raises(moltis.BadConfiguration, match=words) as caught:
        proxy_of("gateway.test", True, HTTPS_PROXY=value)
    assert "HTTPS_PROXY" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        ("node", "list", "--host", "wss://gateway.test/ws", "--api-key", "mk_x"),
        ("node", "list", "--host", "ws://gateway.test/ws", "--api-key", "mk_x"),
        ("node", "add", "--join", "http://gateway.test/join/mc_x"),
        ("install", "--from", "http://gateway.test"),
    ],
    ids=" ".join,
)
def test_a_socks_proxy_is_refused_in_a_sentence(tmp_path, words):
    done = run_moltis(*words, home=tmp_path, all_proxy="socks5h://u:secret@p:1080")
    assert done.returncode in (69, 78)
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if "warning:" not in line]
    assert "all_proxy names a proxy that cannot be used: socks5h:// is" in line
    assert "secret" not in done.stderr


# -- through one ---------------------------------------------------------------------


class Tinyproxy:
    """Debian's tinyproxy on a free port."""

    def __init__(self, directory, *options):
        self.port = free_port()
        self.log = directory / "tinyproxy.log"
        configuration = directory / "tinyproxy.conf"
        lines = [
            f"Port {self.port}",
            "Listen 127.0.0.1",
            f'LogFile "{self.log}"',
            "LogLevel Connect",
            "MaxClients 20",
            *options,
        ]
        configuration.write_text("\n".join(lines) + "\n")
        command = ["tinyproxy", "-d", "-c", str(configuration)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_for(self._listens, what="tinyproxy")

    def _listens(self):
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


@pytest.fixture
def tinyproxy():
    if shutil.which("tinyproxy") is None:
        assert not RUN_ALL, "tinyproxy is missing"
        pytest.skip("needs the program tinyproxy")


@pytest.fixture
def somewhere_else(monkeypatch):
    """Take 127.0.0.1 for another machine, to which a proxy may lead."""
    monkeypatch.setattr(moltis, "is_this_machine", lambda _host: False)


@pytest.mark.usefixtures("tinyproxy", "somewhere_else")
def test_a_download_and_a_websocket_go_through_a_real_proxy(tmp_path, monkeypatch):
    from test_websocket_connections import Server, serve_echo

    with Tinyproxy(tmp_path, "BasicAuth joe s3cret") as proxy:
        monkeypatch.setenv("http_proxy", f"http://joe:s3cre%74@127.0.0.1:{proxy.port}")
        with ScriptedServer(lambda _: (200, {}, [b"all of it"])) as server:
            assert moltis.fetch(server.url, moltis.TlsTrust()) == b"all of it"
            assert f"CONNECT 127.0.0.1:{server.port}" in proxy.log.read_text()
        with Server(serve_echo) as server, moltis.connect(
            f"ws://127.0.0.1:{server.port}/ws"
        ) as ws:
            ws.send("hi")
            assert ws.receive(LONG) == "hi"
        assert f"CONNECT 127.0.0.1:{server.port}" in proxy.log.read_text()
        nobody = free_port()
        with pytest.raises(moltis.Unreachable, match=r"HTTP/1.\d 50\d"):
            moltis.connect(f"ws://127.0.0.1:{nobody}/ws")
        monkeypatch.setenv("http_proxy", f"http://joe:wrong@127.0.0.1:{proxy.port}")
        with pytest.raises(moltis.Unreachable, match="user:password") as caught:
            moltis.connect(f"ws://127.0.0.1:{nobody}/ws")
        assert "wrong" not in str(caught.value)


@pytest.mark.usefixtures("somewhere_else")
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "403 Forbidden.*NO_PROXY"),
        (b"HTTP/1.1 407 \x1b[2J\r\n\r\n", "407 .*user:password"),
        (b"SSH-2.0-x\r\n", "not HTTP"),
        (b"", "closed the connection"),
    ],
)
def test_a_proxy_that_refuses_is_named_with_what_to_do(monkeypatch, answer, words):
    from test_websocket_connections import Server

    def serve(sock):
        sock.recv(4096)
        sock.sendall(answer)

    with Server(serve) as server:
        monkeypatch.setenv("https_proxy", f"http://u:pw@127.0.0.1:{server.port}")
        with pytest.raises(moltis.Unreachable, match=words) as caught:
            moltis.connect("wss://gateway.test/ws", moltis.TlsTrust())
    text = str(caught.value)
    assert f"http://127.0.0.1:{server.port} (from https_proxy)" in text
    assert text.isprintable()
    assert "pw" not in text


@pytest.mark.usefixtures("somewhere_else")
def test_a_proxy_that_is_not_there_is_named(monkeypatch):
    port = free_port()
    monkeypatch.setenv("ALL_PROXY", f"127.0.0.1:{port}")
    with pytest.raises(moltis.Unreachable, match=f"proxy http://127.0.0.1:{port}"):
        moltis.fetch("http://gateway.test/moltis.py", moltis.TlsTrust())


def test_a_tunnel_is_asked_for_with_its_credentials():
    """RFC 9110 §9.3.6, RFC 7617"""
    environ = {"https_proxy": "http://joe:p%C3%A9%3A@proxy.test"}
    proxy = moltis.find_proxy("2001:db8::1", environ, secure=True)
    coded = base64.b64encode("joe:pé:".encode()).decode()
    assert proxy.connect_request("2001:db8::1", 443).decode() == (
        "CONNECT [2001:db8::1]:443 HTTP/1.1\r\nHost: [2001:db8::1]:443\r\n"
        f"Proxy-Authorization: Basic {coded}\r\n\r\n"
    )
    assert "joe" not in str(proxy) + repr(proxy)


def test_a_join_code_for_this_machine_goes_through_no_proxy(home):
    """`node add --join` of the first edition sent it through http_proxy."""
    with ScriptedServer(lambda _: (404, {}, [b"no such code"])) as server:
        environ = clean_environment(home, http_proxy=f"http://127.0.0.1:{free_port()}")
        link = f"http://127.0.0.1:{server.port}/join/x"
        words = [sys.executable, str(ROOT / "moltis.py"), "node", "add", "--join", link]
        done = subprocess.run(
            words, check=False, capture_output=True, text=True, env=environ
        )
    assert [path for _, path, _, _ in server.requests] == ["/join/x"]
    assert "404" in done.stderr
