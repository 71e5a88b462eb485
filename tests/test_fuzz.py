"""Strangers at our doors, as hypothesis imagines them: SCRAM and certificates."""

from __future__ import annotations

import base64
import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st

from moltis import (
    AuthenticationError,
    ScramClient,
    ScramServer,
    ScramVerifier,
    decoy_verifier,
    der_values,
    make_verifier,
    parse_certificate,
    tls_server_end_point,
)

FUZZ = settings(max_examples=100)

TOKEN = "mdt_" + "t" * 43
VERIFIER = make_verifier(TOKEN)

# Any text that JSON can carry, and text that looks like SCRAM at first sight.
PIECES = st.one_of(
    st.sampled_from("nypr=,AB4096+/é\0\n\ud800"),
    st.sampled_from(("n,,", "y,,", "p=tls-server-end-point,,", "=2C", "=3D", "user")),
    st.sampled_from(("n=", "r=", "s=", "i=", "c=", "p=", "v=", "e=", "m=", "a=")),
)
MESSAGES = st.one_of(st.text(), st.lists(PIECES, max_size=20).map("".join))
USERNAMES = st.text(
    st.characters(blacklist_categories=("Cs",), blacklist_characters="\0,="), min_size=1
)


def edited(text, position, replacement, length):
    start = position % (len(text) + 1)
    return text[:start] + replacement + text[start + length :]


EDITS = st.tuples(st.integers(0, 300), MESSAGES, st.integers(0, 5))


def pair(binding=None):
    return (
        ScramClient("user", TOKEN, binding),
        ScramServer(lambda _: VERIFIER, binding),
    )


# --- SCRAM ----------------------------------------------------------------------------


@FUZZ
@given(MESSAGES, MESSAGES)
def test_a_server_answers_or_refuses_whatever_comes(first, final):
    server = ScramServer(lambda name: decoy_verifier(b"key", name), None)
    with contextlib.suppress(AuthenticationError):
        assert isinstance(server.first(first), str)
    with contextlib.suppress(AuthenticationError):
        server.final(final)
    assert server.username is None


@FUZZ
@given(MESSAGES, MESSAGES)
def test_a_client_answers_or_refuses_whatever_comes(server_first, server_final):
    client, _ = pair()
    with contextlib.suppress(AuthenticationError):
        assert isinstance(client.final(server_first), str)
    try:
        client.verify(server_final)
    except AuthenticationError:
        return
    raise AssertionError("a stranger passed for the server")


@FUZZ
@given(USERNAMES, st.text(st.characters(blacklist_categories=("Cs",))), st.binary())
def test_all_names_secrets_and_bindings_work(username, secret, binding):
    verifier = make_verifier(secret)
    client = ScramClient(username, secret, binding or None)
    server = ScramServer(lambda _: verifier, binding or None)
    if len(client.first()) > 4000:
        return
    client.verify(server.final(client.final(server.first(client.first()))))
    assert server.username == username


@FUZZ
@given(EDITS, st.sampled_from([None, b"binding"]))
def test_who_edits_the_first_message_is_noticed(edit, binding):
    client, server = pair(binding)
    sent = client.first()
    received = edited(sent, *edit)
    with contextlib.suppress(AuthenticationError):
        server.final(client.final(server.first(received)))
    assert server.username is None or received == sent


@FUZZ
@given(EDITS, st.sampled_from([None, b"binding"]))
def test_who_edits_the_second_message_is_noticed(edit, binding):
    client, server = pair(binding)
    sent = server.first(client.first())
    received = edited(sent, *edit)
    with contextlib.suppress(AuthenticationError):
        server.final(client.final(received))
    assert server.username is None or received == sent


@FUZZ
@given(EDITS, st.sampled_from([None, b"binding"]))
def test_who_edits_the_third_message_is_noticed(edit, binding):
    client, server = pair(binding)
    sent = client.final(server.first(client.first()))
    received = edited(sent, *edit)
    with contextlib.suppress(AuthenticationError):
        server.final(received)
    # The last digit of base64 has bits that nobody reads: not a lie worth noticing.
    assert server.username is None or meaning(received) == meaning(sent)


def meaning(client_final):
    unproved, _, proof = client_final.rpartition(",p=")
    return unproved, base64.b64decode(proof)


@FUZZ
@given(EDITS, st.sampled_from([None, b"binding"]))
def test_who_edits_the_last_message_is_noticed(edit, binding):
    client, server = pair(binding)
    sent = server.final(client.final(server.first(client.first())))
    received = edited(sent, *edit)
    try:
        client.verify(received)
    except AuthenticationError:
        return
    signatures = [base64.b64decode(m.split(",")[0][2:]) for m in (sent, received)]
    assert signatures[0] == signatures[1]


@FUZZ
@given(st.binary(min_size=1), st.integers(1, 10**6), st.binary(min_size=1))
def test_a_verifier_survives_its_text_form(salt, iterations, key):
    verifier = ScramVerifier(salt, iterations, key, key[::-1])
    assert ScramVerifier.from_text(verifier.to_text()) == verifier


@FUZZ
@given(st.text())
def test_no_text_does_more_harm_to_a_verifier_than_a_value_error(text):
    with contextlib.suppress(ValueError):
        ScramVerifier.from_text(text)


# --- certificates ---------------------------------------------------------------------


def der(tag, content):
    """Encode a value as DER does."""
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    digits = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(digits))) + digits + content


TAGS = st.sampled_from([0x02, 0x03, 0x04, 0x06, 0x17, 0x18, 0x30, 0x31, 0xA0, 0xA3])
CONTENTS = st.recursive(
    st.binary(max_size=300),
    lambda inner: st.lists(
        st.tuples(TAGS, inner).map(lambda item: der(*item)), max_size=8
    ).map(b"".join),
)


@FUZZ
@given(st.one_of(st.binary(), CONTENTS))
def test_no_bytes_do_more_harm_to_a_certificate_than_a_value_error(data):
    for read in (der_values, parse_certificate, tls_server_end_point):
        with contextlib.suppress(ValueError):
            read(data)


@FUZZ
@given(st.lists(st.tuples(TAGS, st.binary(max_size=70_000)), max_size=5))
def test_der_is_read_as_it_was_written(values):
    """X.690 §8.1"""
    data = b"".join(der(tag, content) for tag, content in values)
    read = der_values(data)
    assert [(value.tag, value.content) for value in read] == values
    assert b"".join(value.encoding for value in read) == data
