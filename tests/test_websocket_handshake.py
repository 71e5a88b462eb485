"""The opening handshake, both sides: RFC 6455 §4, and RFC 7692 §5 and §7.1."""

from __future__ import annotations

import email

import pytest

from moltis import (
    ClientHandshake,
    DeflateParameters,
    HandshakeError,
    HeaderList,
    Negotiated,
    UsageError,
    WebSocketUrl,
    accept_upgrade,
    accept_value,
    parse_head,
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


def request(*more, without=()):
    fields = [field for field in REQUEST if field[0] not in without]
    return HeaderList([*fields, *more])


def refusal(headers, **options):
    """Return the HandshakeError with which a server refuses a request."""
    with pytest.raises(HandshakeError) as caught:
        accept_upgrade(headers, **options)
    return caught.value


def accept_offer(*offers):
    """Return what a server makes of Sec-WebSocket-Extensions headers."""
    return accept_upgrade(
        request(*(("Sec-WebSocket-Extensions", offer) for offer in offers))
    )


# --- server ----------------------------------------------------------------------


def test_the_accept_value_is_that_of_the_rfc():
    """RFC 6455 §1.3"""
    assert accept_value(KEY) == ACCEPT


def test_the_request_of_the_rfc_is_answered_as_there():
    """RFC 6455 §1.2"""
    upgrade = accept_upgrade(
        request(
            ("Origin", "http://example.com"),
            ("Sec-WebSocket-Protocol", "chat, superchat"),
        ),
        subprotocols=("chat",),
    )
    assert upgrade.response() == (
        b"HTTP/1.1 101 Switching Protocols\r\n"
        b"Upgrade: websocket\r\n"
        b"Connection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"
        b"Sec-WebSocket-Protocol: chat\r\n"
        b"\r\n"
    )


def test_the_headers_of_pythons_http_server_will_do():
    text = "".join(f"{name}: {value}\r\n" for name, value in REQUEST)
    assert accept_upgrade(email.message_from_string(text)).accept == ACCEPT


def test_names_and_tokens_are_read_in_any_case_and_place():
    """RFC 6455 §4.2.1"""
    headers = request(
        ("upgrade", "h2c, WebSocket"),
        ("CONNECTION", "keep-alive,\tUPGRADE"),
        without=("Upgrade", "Connection"),
    )
    assert accept_upgrade(headers).accept == ACCEPT


def test_another_method_than_get_is_refused_with_405():
    """RFC 6455 §4.2.1"""
    error = refusal(request(), method="POST")
    assert error.status == 405
    assert ("Allow", "GET") in error.headers


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


def test_of_the_subprotocols_known_to_both_the_clients_first_is_taken():
    """RFC 6455 §4.2.2"""
    headers = request(
        ("Sec-WebSocket-Protocol", "x, b"), ("Sec-WebSocket-Protocol", "a")
    )
    assert accept_upgrade(headers, subprotocols=("a", "b")).subprotocol == "b"


def test_without_a_common_subprotocol_none_is_chosen():
    """RFC 6455 §4.2.2"""
    headers = request(("Sec-WebSocket-Protocol", "x"))
    upgrade = accept_upgrade(headers, subprotocols=("a",))
    assert upgrade.subprotocol is None
    assert b"Sec-WebSocket-Protocol" not in upgrade.response()


# --- server, compression ---------------------------------------------------------

OFFERS = {
    "": ("permessage-deflate", DeflateParameters()),
    "; client_max_window_bits": (
        "permessage-deflate; client_max_window_bits=12",
        DeflateParameters(client_max_window_bits=12),
    ),
    "; client_max_window_bits=9": (
        "permessage-deflate; client_max_window_bits=9",
        DeflateParameters(client_max_window_bits=9),
    ),
    '; client_max_window_bits="10"': (
        "permessage-deflate; client_max_window_bits=10",
        DeflateParameters(client_max_window_bits=10),
    ),
    "; server_max_window_bits=8": (
        "permessage-deflate; server_max_window_bits=8",
        DeflateParameters(server_max_window_bits=8),
    ),
    "; server_no_context_takeover ;client_no_context_takeover": (
        "permessage-deflate; server_no_context_takeover; client_no_context_takeover",
        DeflateParameters(
            server_no_context_takeover=True, client_no_context_takeover=True
        ),
    ),
}


@pytest.mark.parametrize("offer", OFFERS)
def test_an_offer_of_compression_is_accepted_with_what_it_asks_for(offer):
    """RFC 7692 §7.1"""
    upgrade = accept_offer("permessage-deflate" + offer)
    assert (upgrade.extensions, upgrade.deflate) == OFFERS[offer]
    assert ("Sec-WebSocket-Extensions", upgrade.extensions) in upgrade.headers


@pytest.mark.parametrize(
    "parameters",
    [
        "server_max_window_bits",
        "server_max_window_bits=7",
        "server_max_window_bits=16",
        "server_max_window_bits=08",
        "client_max_window_bits=x",
        "server_no_context_takeover=1",
        "client_no_context_takeover=true",
        "something_else",
    ],
)
def test_an_offer_that_cannot_be_understood_is_declined(parameters):
    """RFC 7692 §5.1: the connection goes on without compression"""
    upgrade = accept_offer(f"permessage-deflate; {parameters}")
    assert upgrade.deflate is None
    assert upgrade.extensions is None


def test_the_first_offer_that_suits_is_taken():
    """RFC 7692 §5"""
    upgrade = accept_offer(
        "x-other; a=b, permessage-deflate; server_max_window_bits=99",
        "permessage-deflate; server_max_window_bits=10, permessage-deflate",
    )
    assert upgrade.extensions == "permessage-deflate; server_max_window_bits=10"


def test_compression_can_be_left_out():
    headers = request(("Sec-WebSocket-Extensions", "permessage-deflate"))
    assert accept_upgrade(headers, compression=False).deflate is None


@pytest.mark.parametrize(
    "offer",
    [
        "permessage-deflate;",
        "permessage deflate",
        "permessage-deflate; =10",
        'permessage-deflate; server_max_window_bits="10',
        "permessage-deflate; server_max_window_bits=10; server_max_window_bits=10",
    ],
)
def test_a_malformed_offer_is_refused_with_400(offer):
    """RFC 6455 §9.1"""
    headers = request(("Sec-WebSocket-Extensions", offer))
    assert refusal(headers).status == 400


# --- client ----------------------------------------------------------------------


def client(url="ws://server.example.com/chat", **options):
    return ClientHandshake(WebSocketUrl.parse(url), **options)


def sent_headers(handshake):
    return parse_head(handshake.request().partition(b"\r\n\r\n")[0])[1]


def answer(handshake, *more, status="101 Switching Protocols", without=()):
    """Return the head of a server's answer, as it should be but for what is said."""
    key = sent_headers(handshake).get_all("Sec-WebSocket-Key", [])[0]
    fields = [
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Accept", accept_value(key)),
    ]
    lines = [
        f"{name}: {value}" for name, value in [*fields, *more] if name not in without
    ]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines]).encode("latin-1")


def complaint(handshake, head):
    """Return the HandshakeError with which a client refuses an answer."""
    with pytest.raises(HandshakeError) as caught:
        handshake.judge(head)
    return caught.value


def test_the_request_says_what_the_rfc_demands():
    """RFC 6455 §4.1"""
    handshake = client(
        "ws://Example.com:8080/chat?room=1",
        headers=[("Origin", "http://example.com")],
        subprotocols=("a", "b"),
    )
    data = handshake.request()
    assert data.startswith(b"GET /chat?room=1 HTTP/1.1\r\nHost: example.com:8080\r\n")
    assert data.endswith(b"\r\n\r\n")
    headers = sent_headers(handshake)
    for name, value in (
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Protocol", "a, b"),
        ("Sec-WebSocket-Extensions", "permessage-deflate; client_max_window_bits"),
        ("Origin", "http://example.com"),
    ):
        assert headers.get_all(name, []) == [value]
    assert accept_upgrade(headers).deflate is not None


def test_each_request_has_a_key_of_its_own():
    """RFC 6455 §4.1"""
    keys = {sent_headers(client()).get_all("Sec-WebSocket-Key", [])[0] for _ in "ab"}
    assert len(keys) == 2


def test_a_server_and_a_client_of_ours_agree():
    handshake = client(subprotocols=("a", "b"))
    upgrade = accept_upgrade(sent_headers(handshake), subprotocols=("b",))
    assert handshake.judge(upgrade.response()[:-4]) == Negotiated("b", upgrade.deflate)


def test_a_plain_answer_grants_nothing_more():
    handshake = client(subprotocols=("a",))
    assert handshake.judge(answer(handshake)) == Negotiated(None, None)


def test_a_refusal_is_reported_with_its_status_and_who_answered():
    handshake = client()
    head = b"HTTP/1.1 404 Not Found\r\nServer: nginx/1.22"
    error = complaint(handshake, head)
    assert error.status == 404
    assert str(error) == "HTTP 404 Not Found (from nginx/1.22)"


@pytest.mark.parametrize(
    "head", [b"", b"SSH-2.0-OpenSSH_9.2", b"HTTP/2 101", b"HTTP/1.1 999 What"]
)
def test_what_is_not_http_is_refused(head):
    assert complaint(client(), head).status == 502


def test_a_malformed_header_line_is_refused():
    handshake = client()
    for line in (b"no colon", b"space : x", b": x", b" folded"):
        complaint(handshake, answer(handshake) + b"\r\n" + line)


@pytest.mark.parametrize("name", ["Upgrade", "Connection", "Sec-WebSocket-Accept"])
def test_an_answer_without_a_needed_header_is_refused(name):
    """RFC 6455 §4.1"""
    handshake = client()
    assert complaint(handshake, answer(handshake, without=(name,))).status == 502


def test_an_accept_value_for_another_key_is_refused():
    """RFC 6455 §4.1"""
    assert complaint(client(), answer(client())).status == 502


def test_a_subprotocol_that_was_not_offered_is_refused():
    """RFC 6455 §4.1"""
    handshake = client(subprotocols=("a",))
    complaint(handshake, answer(handshake, ("Sec-WebSocket-Protocol", "b")))


@pytest.mark.parametrize(
    "extensions",
    [
        "x-other",
        "permessage-deflate, permessage-deflate",
        "permessage-deflate; client_max_window_bits",
        "permessage-deflate; server_max_window_bits=7",
        "permessage-deflate; unknown",
        "permessage-deflate;",
    ],
)
def test_an_extension_that_was_not_offered_so_is_refused(extensions):
    """RFC 6455 §4.1, RFC 7692 §7.1"""
    handshake = client()
    complaint(handshake, answer(handshake, ("Sec-WebSocket-Extensions", extensions)))


def test_compression_that_was_not_offered_is_refused():
    """RFC 6455 §4.1"""
    handshake = client(compression=False)
    assert b"Extensions" not in handshake.request()
    complaint(
        handshake,
        answer(handshake, ("Sec-WebSocket-Extensions", "permessage-deflate")),
    )


def test_a_server_may_choose_the_parameters_of_compression():
    """RFC 7692 §7.1"""
    handshake = client()
    chosen = (
        "permessage-deflate; server_no_context_takeover; client_no_context_takeover; "
        "server_max_window_bits=10; client_max_window_bits=11"
    )
    head = answer(handshake, ("Sec-WebSocket-Extensions", chosen))
    assert handshake.judge(head).deflate == DeflateParameters(True, True, 10, 11)


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
    target = WebSocketUrl.parse(url)
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
        WebSocketUrl.parse(url)
    assert "12345678" not in str(caught.value)


def test_an_address_is_shown_without_what_may_be_secret():
    target = WebSocketUrl.parse("wss://user:secret@h:9090/ws?token=mdt_secret")
    assert str(target) == "wss://h:9090/ws"
