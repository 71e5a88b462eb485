"""The opening handshake, both sides: RFC 6455 §4."""

from __future__ import annotations

import email.message
import time

import pytest

from moltis import (
    HandshakeError,
    ServerUrl,
    UsageError,
    accept_upgrade,
    accept_value,
    check_upgraded,
    upgrade_request,
)

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="

REQUEST = (
    ("Host", "server.example.com"),
    ("Upgrade", "websocket"),
    ("Connection", "Upgrade"),
    ("Sec-WebSocket-Key", KEY),
    ("Sec-WebSocket-Version", "13"),
)
GRANTED = [
    ("Upgrade", "websocket"),
    ("Connection", "Upgrade"),
    ("Sec-WebSocket-Accept", ACCEPT),
]


def message(fields):
    """Return headers as http.server has them."""
    parsed = email.message.Message()
    for name, value in fields:
        parsed[name] = value
    return parsed


def request(*more, without=()):
    return message([*(f for f in REQUEST if f[0] not in without), *more])


def refusal(headers):
    """Return the HandshakeError with which a server refuses a request."""
    with pytest.raises(HandshakeError) as caught:
        accept_upgrade(headers)
    return caught.value


# --- server ----------------------------------------------------------------------


def test_the_accept_value_is_that_of_the_rfc():
    """RFC 6455 §1.3"""
    assert accept_value(KEY) == ACCEPT


def test_the_request_of_the_rfc_is_answered_as_there():
    """RFC 6455 §1.2; subprotocols and extensions are neither needed nor granted."""
    more = (
        ("Origin", "http://example.com"),
        ("Sec-WebSocket-Protocol", "chat, superchat"),
        ("Sec-WebSocket-Extensions", "permessage-deflate; client_max_window_bits"),
    )
    assert accept_upgrade(request(*more)) == GRANTED


def test_names_and_tokens_are_read_in_any_case_and_place():
    """RFC 6455 §4.2.1"""
    headers = request(
        ("upgrade", "h2c, WebSocket"),
        ("CONNECTION", "keep-alive,\tUPGRADE"),
        without=("Upgrade", "Connection"),
    )
    assert accept_upgrade(headers) == GRANTED


def test_an_ordinary_request_is_told_to_upgrade():
    """RFC 7231 §6.5.15"""
    error = refusal(request(without=("Upgrade",)))
    assert error.status == 426
    assert ("Upgrade", "websocket") in error.headers


@pytest.mark.parametrize("version", ["8", "0", "", "13, 14", "14"])
def test_another_version_is_told_which_one_is_spoken(version):
    """RFC 6455 §4.4"""
    error = refusal(
        request(("Sec-WebSocket-Version", version), without=("Sec-WebSocket-Version",))
    )
    assert error.status == 426
    assert ("Sec-WebSocket-Version", "13") in error.headers


@pytest.mark.parametrize("name", ["Host", "Connection", "Sec-WebSocket-Key"])
def test_a_request_without_a_needed_header_is_refused_with_400(name):
    """RFC 6455 §4.2.1"""
    assert refusal(request(without=(name,))).status == 400


@pytest.mark.parametrize("field", [REQUEST[0], REQUEST[3], REQUEST[4]])
def test_a_header_that_comes_twice_is_refused_with_400(field):
    """RFC 6455 §11.3"""
    assert refusal(request(field)).status == 400


@pytest.mark.parametrize(
    "key", ["", "AAAA", KEY + "AAAA", "dGhlIHNhbXBsZSBub25jZQ", "é" * 24, "?" * 24]
)
def test_a_key_that_is_not_16_bytes_is_refused_with_400(key):
    """RFC 6455 §4.2.1"""
    headers = request(("Sec-WebSocket-Key", key), without=("Sec-WebSocket-Key",))
    assert refusal(headers).status == 400


# --- client ----------------------------------------------------------------------


def answer(*more, status="101 Switching Protocols", without=()):
    """Return the head of a server's answer to KEY, right but for the changes."""
    fields = [field for field in GRANTED if field[0] not in without]
    lines = [f"{name}: {value}" for name, value in [*fields, *more]]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines]).encode("latin-1")


def complaint(head):
    """Return the HandshakeError with which a client refuses an answer."""
    with pytest.raises(HandshakeError) as caught:
        check_upgraded(head, KEY)
    return caught.value


def test_the_request_says_what_the_rfc_demands():
    """RFC 6455 §4.1"""
    url = ServerUrl.parse("ws://Example.com:8080/chat?room=1")
    head, _, body = upgrade_request(url, KEY).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    assert (first, body) == ("GET /chat?room=1 HTTP/1.1", b"")
    expected = {**dict(REQUEST), "Host": "example.com:8080"}
    fields = dict(line.split(": ", 1) for line in lines)
    assert fields == expected
    assert accept_upgrade(message(fields.items())) == GRANTED


def test_a_plain_answer_is_taken():
    check_upgraded(answer(("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")), KEY)


def test_a_refusal_is_reported_with_its_status_and_who_answered():
    error = complaint(b"HTTP/1.1 404 Not Found\r\nServer: nginx/1.22")
    assert error.status == 404
    assert str(error) == "HTTP 404 Not Found (from nginx/1.22)"


@pytest.mark.parametrize(
    "head", [b"", b"SSH-2.0-OpenSSH_9.2", b"HTTP/2 101", b"HTTP/1.1 999 What"]
)
def test_what_is_not_http_is_refused(head):
    assert complaint(head).status == 502


@pytest.mark.parametrize("line", [b"no colon", b"space : x", b": x", b" folded"])
def test_a_malformed_header_line_is_refused(line):
    assert complaint(answer() + b"\r\n" + line).status == 502


def test_a_header_of_many_spaces_takes_no_time():
    """An impostor's 60 KiB took seconds of a regular expression."""
    times = []
    for _ in range(3):  # garbage of other tests may be collected meanwhile
        started = time.process_time()
        check_upgraded(answer(("X", "a" + " " * 60_000 + "b")), KEY)
        times.append(time.process_time() - started)
    assert min(times) < 0.1


@pytest.mark.parametrize("name", ["Upgrade", "Connection", "Sec-WebSocket-Accept"])
def test_an_answer_without_a_needed_header_is_refused(name):
    """RFC 6455 §4.1"""
    assert complaint(answer(without=(name,))).status == 502


@pytest.mark.parametrize(
    "value", [accept_value("another"), f"{ACCEPT}x", ACCEPT.lower()]
)
def test_a_wrong_accept_value_is_refused(value):
    """RFC 6455 §4.1"""
    head = answer(("Sec-WebSocket-Accept", value), without=("Sec-WebSocket-Accept",))
    assert complaint(head).status == 502
    assert complaint(answer(("Sec-WebSocket-Accept", value))).status == 502


@pytest.mark.parametrize(
    "field",
    [
        ("Sec-WebSocket-Protocol", "chat"),
        ("Sec-WebSocket-Extensions", "permessage-deflate"),
    ],
)
def test_what_was_not_offered_is_refused(field):
    """RFC 6455 §4.1"""
    assert complaint(answer(field)).status == 502


# --- addresses -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "host", "port", "resource", "header"),
    [
        ("ws://h", "h", 80, "/", "h"),
        ("WS://H:9090/ws", "h", 9090, "/ws", "h:9090"),
        ("wss://h/a?b=c", "h", 443, "/a?b=c", "h"),
        ("https://h:443/", "h", 443, "/", "h"),
        ("http://h:443/", "h", 443, "/", "h:443"),
        ("ws://[::1]:9090/ws", "::1", 9090, "/ws", "[::1]:9090"),
        ("ws://h/a b/é?x=a b", "h", 80, "/a%20b/%C3%A9?x=a%20b", "h"),
        ("ws://é.example/", "xn--9ca.example", 80, "/", "xn--9ca.example"),
    ],
)
def test_an_address_is_taken_apart(url, host, port, resource, header):
    """RFC 6455 §3"""
    target = ServerUrl.parse(url)
    assert (target.host, target.port, target.resource) == (host, port, resource)
    assert target.host_header == header
    assert target.secure is url.lower().startswith(("wss:", "https:"))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "gateway:9090",
        "ftp://h/",
        "ws://",
        "ws://h:99999/",
        "ws://[::1/",
        "ws://h/\udc80",
        "ws://é..é/",
        "ws://h:x/mdt_12345678",
    ],
)
def test_what_is_no_address_is_refused_with_what_it_was(url):
    with pytest.raises(UsageError, match="address") as caught:
        ServerUrl.parse(url)
    assert "12345678" not in str(caught.value)


def test_an_address_is_shown_without_what_may_be_secret():
    target = ServerUrl.parse("wss://user:secret@h:9090/ws?token=mdt_secret")
    assert str(target) == "wss://h:9090/ws"
