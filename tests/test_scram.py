"""SCRAM: RFC 5802 and RFC 7677, both halves, with channel binding."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets

import pytest

from moltis import (
    AuthenticationError,
    ScramClient,
    ScramServer,
    ScramVerifier,
    decoy_verifier,
    make_verifier,
    scram_handle,
)

# RFC 7677 §3
RFC_NONCE = "rOprNGfwEbeRWgbNEkqO"
RFC_SERVER_NONCE = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
RFC_CLIENT_FIRST = f"n,,n=user,r={RFC_NONCE}"
RFC_SERVER_FIRST = f"r={RFC_NONCE}{RFC_SERVER_NONCE},s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
RFC_CLIENT_FINAL = (
    f"c=biws,r={RFC_NONCE}{RFC_SERVER_NONCE},"
    "p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
)
RFC_SERVER_FINAL = "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="
RFC_SALT = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")

TOKEN = "mdt_" + "t" * 43
BINDING = b"hash of the certificate"


@pytest.fixture
def rfc_verifier(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(secrets, "token_bytes", lambda _: RFC_SALT)
        return make_verifier("pencil")


def server_for(secret=TOKEN, binding=None):
    verifiers = {"user": make_verifier(secret)}

    def lookup(name):
        return verifiers.get(name) or decoy_verifier(b"decoy", name)

    return ScramServer(lookup, binding)


def authenticate(client, server):
    """Let the two talk to the end; return the server, which knows who it is."""
    server_first = server.first(client.first())
    client.verify(server.final(client.final(server_first)))
    return server


# --- the exchange ---------------------------------------------------------------------


def test_the_client_says_what_the_example_of_the_rfc_says(monkeypatch):
    """RFC 7677 §3"""
    monkeypatch.setattr(secrets, "token_urlsafe", lambda _: RFC_NONCE)
    client = ScramClient("user", "pencil")
    assert client.first() == RFC_CLIENT_FIRST
    assert client.final(RFC_SERVER_FIRST) == RFC_CLIENT_FINAL
    client.verify(RFC_SERVER_FINAL)


def test_the_server_says_what_the_example_of_the_rfc_says(monkeypatch, rfc_verifier):
    """RFC 7677 §3"""
    monkeypatch.setattr(secrets, "token_urlsafe", lambda _: RFC_SERVER_NONCE)
    server = ScramServer(lambda _: rfc_verifier)
    assert server.first(RFC_CLIENT_FIRST) == RFC_SERVER_FIRST
    assert server.username is None
    assert server.final(RFC_CLIENT_FINAL) == RFC_SERVER_FINAL
    assert server.username == "user"


@pytest.mark.parametrize("binding", [None, BINDING])
def test_both_sides_are_sure_of_each_other_in_the_end(binding):
    server = authenticate(
        ScramClient("user", TOKEN, binding), server_for(binding=binding)
    )
    assert server.username == "user"


def test_the_token_is_in_no_message():
    client, server = ScramClient(scram_handle(TOKEN), TOKEN), server_for()
    spoken = [client.first()]
    spoken.append(server.first(spoken[0]))
    spoken.append(client.final(spoken[1]))
    assert TOKEN not in "".join(spoken)
    assert TOKEN[4:] not in "".join(spoken)


def test_nonces_are_fresh_on_both_sides():
    firsts = {ScramClient("user", TOKEN).first() for _ in range(50)}
    answers = {server_for().first(RFC_CLIENT_FIRST) for _ in range(5)}
    assert len(firsts) == 50
    assert len(answers) == 5


# --- refusals by the server -----------------------------------------------------------


def test_a_wrong_secret_is_refused():
    client, server = ScramClient("user", "mdt_wrong"), server_for()
    with pytest.raises(AuthenticationError, match="does not know the secret"):
        authenticate(client, server)
    assert server.username is None


def test_an_unknown_user_is_refused_with_the_same_words_as_a_wrong_secret():
    texts = []
    for username in ("user", "nobody"):
        with pytest.raises(AuthenticationError) as caught:
            authenticate(ScramClient(username, "mdt_wrong"), server_for())
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_an_unknown_user_gets_the_same_salt_each_time_and_others_another():
    def salt(username, key=b"key"):
        server = ScramServer(lambda name: decoy_verifier(key, name))
        return server.first(f"n,,n={username},r=abc").split(",")[1:]

    assert salt("nobody") == salt("nobody")
    assert salt("nobody") != salt("somebody")
    assert salt("nobody") != salt("nobody", key=b"another")
    known = server_for().first("n,,n=user,r=abc").split(",")[1:]
    assert len(known[0]) == len(salt("nobody")[0])
    assert known[1] == salt("nobody")[1]


def test_a_proof_serves_once():
    client, server = ScramClient("user", TOKEN), server_for()
    proof = client.final(server.first(client.first()))
    server.final(proof)
    with pytest.raises(AuthenticationError, match="nobody asked"):
        server.final(proof)
    with pytest.raises(AuthenticationError, match="twice"):
        server.first(client.first())


def test_there_is_no_second_guess_within_one_exchange():
    client, server = ScramClient("user", TOKEN), server_for()
    proof = client.final(server.first(client.first()))
    with pytest.raises(AuthenticationError):
        server.final(proof[:-4] + "AAA=")
    with pytest.raises(AuthenticationError, match="nobody asked"):
        server.final(proof)


def test_a_recorded_exchange_is_of_no_use_later():
    client, server = ScramClient("user", TOKEN), server_for()
    first = client.first()
    proof = client.final(server.first(first))
    later = server_for()
    later.first(first)
    with pytest.raises(AuthenticationError, match="nonce"):
        later.final(proof)


def test_a_proof_before_the_first_message_is_refused():
    with pytest.raises(AuthenticationError, match="nobody asked"):
        server_for().final(RFC_CLIENT_FINAL)


def test_a_second_first_message_is_refused():
    server = server_for()
    server.first(RFC_CLIENT_FIRST)
    with pytest.raises(AuthenticationError, match="twice"):
        server.first(RFC_CLIENT_FIRST)


def test_nobody_acts_for_somebody_else():
    """RFC 5802 §7: an authzid is refused."""
    with pytest.raises(AuthenticationError, match="somebody else"):
        server_for().first("n,a=root,n=user,r=abc")


@pytest.mark.parametrize(
    "message",
    [
        "",
        "n",
        "n,,",
        "n,,n=,r=abc",
        "n,,n=user",
        "n,,n=user,r=",
        "n,,n=user,r=ab c",
        "n,,n=user,r=abc,",
        "n,,n=user,r=abcé",
        "n,,n=us\0er,r=abc",
        "n,,n=user=,r=abc",
        "n,,n=user=2,r=abc",
        "n,,n=user=3d,r=abc",
        "n,,n=\ud800,r=abc",
        "n,,m=must,n=user,r=abc",
        "n,,r=abc,n=user",
        "x,,n=user,r=abc",
        "p,,n=user,r=abc",
        "p=,,n=user,r=abc",
        " n,,n=user,r=abc",
        "n,,n=user,r=abc\n",
        "n,,n=user,r=" + "a" * 5000,
    ],
)
def test_a_malformed_first_message_is_refused(message):
    """RFC 5802 §7"""
    with pytest.raises(AuthenticationError):
        server_for().first(message)


def test_unknown_extensions_are_signed_and_otherwise_ignored():
    """RFC 5802 §5.1"""
    verifier = make_verifier(TOKEN)
    server = ScramServer(lambda _: verifier)
    server_first = server.first("n,,n=user,r=abc,x=new")
    unproved = f"c=biws,{server_first.split(',')[0]},y=more"
    signed = f"n=user,r=abc,x=new,{server_first},{unproved}".encode()
    salted = hashlib.pbkdf2_hmac("sha256", TOKEN.encode(), verifier.salt, 4096)
    key = hmac.new(salted, b"Client Key", "sha256").digest()
    signature = hmac.new(hashlib.sha256(key).digest(), signed, "sha256").digest()
    proof = base64.b64encode(bytes(a ^ b for a, b in zip(key, signature))).decode()
    server.final(f"{unproved},p={proof}")
    assert server.username == "user"


@pytest.mark.parametrize(
    "tamper",
    [
        lambda m: "",
        lambda m: m.rpartition(",")[0],
        lambda m: m[:-4] + "====",
        lambda m: m.rpartition("p=")[0] + "p=AAAA",
        lambda m: m.replace("c=biws", "c=****"),
        lambda m: m.replace("c=biws", "c=eSws"),
        lambda m: m.replace(",r=", ",r=x"),
        lambda m: m + "\n",
        lambda m: m + ",p=AAAA",
    ],
)
def test_a_malformed_final_message_is_refused(tamper):
    client, server = ScramClient("user", TOKEN), server_for()
    message = client.final(server.first(client.first()))
    with pytest.raises(AuthenticationError):
        server.final(tamper(message))
    assert server.username is None


# --- channel binding ------------------------------------------------------------------


def test_a_man_in_the_middle_with_another_certificate_is_noticed_by_the_server():
    """RFC 5802 §6"""
    client = ScramClient("user", TOKEN, b"hash of his certificate")
    with pytest.raises(AuthenticationError, match="another TLS certificate"):
        authenticate(client, server_for(binding=BINDING))


def test_a_man_in_the_middle_cannot_exchange_the_binding_in_the_message():
    """RFC 5802 §6: the proof covers what the client saw."""
    client = ScramClient("user", TOKEN, b"his")
    server = server_for(binding=b"our")
    message = client.final(server.first(client.first()))
    his, our = (
        base64.b64encode(b"p=tls-server-end-point,," + b).decode()
        for b in (b"his", b"our")
    )
    assert his in message
    with pytest.raises(AuthenticationError, match="does not know the secret"):
        server.final(message.replace(his, our))


def test_a_client_that_was_told_of_no_binding_is_refused_where_there_is_one():
    """RFC 5802 §6: the flag y is how a downgrade comes to light."""
    with pytest.raises(AuthenticationError, match="stands in between"):
        server_for(binding=BINDING).first("y,,n=user,r=abc")


def test_a_client_that_could_bind_is_served_where_there_is_nothing_to_bind_to():
    """RFC 5802 §6"""
    assert server_for().first("y,,n=user,r=abc").startswith("r=abc")


def test_a_downgrade_cannot_be_hidden_by_another_flag():
    """RFC 5802 §6: the proof covers the flag."""
    client, server = ScramClient("user", TOKEN), server_for()
    server_first = server.first(client.first().replace("n,,", "y,,"))
    with pytest.raises(AuthenticationError):
        server.final(client.final(server_first))


def test_a_client_without_binding_is_refused_over_tls():
    with pytest.raises(AuthenticationError, match="does not bind to our TLS"):
        authenticate(ScramClient("user", TOKEN), server_for(binding=BINDING))


def test_another_kind_of_binding_is_refused():
    with pytest.raises(AuthenticationError):
        server_for(binding=BINDING).first("p=tls-unique,,n=user,r=abc")


def test_a_binding_to_a_certificate_that_is_not_ours_is_refused_without_tls():
    client = ScramClient("user", TOKEN, BINDING)
    with pytest.raises(AuthenticationError, match="in between"):
        authenticate(client, server_for())


# --- refusals by the client -----------------------------------------------------------


def test_a_server_that_does_not_know_the_secret_is_noticed():
    client = ScramClient("user", TOKEN)
    server = server_for("mdt_guessed")
    client.final(server.first(client.first()))
    signature = base64.b64encode(bytes(32)).decode()
    with pytest.raises(AuthenticationError, match="does not know the secret"):
        client.verify(f"v={signature}")


@pytest.mark.parametrize("message", ["", "v=", "v=AAAA", "v=***", "x=AAAA", "e=", "\n"])
def test_a_malformed_end_proves_nothing(message):
    client = ScramClient("user", TOKEN)
    client.final(server_for().first(client.first()))
    with pytest.raises(AuthenticationError):
        client.verify(message)


def test_an_end_before_the_middle_proves_nothing():
    empty = base64.b64encode(b"").decode()
    for message in (RFC_SERVER_FINAL, f"v={empty}"):
        with pytest.raises(AuthenticationError):
            ScramClient("user", TOKEN).verify(message)


def test_an_error_of_the_server_is_reported():
    """RFC 5802 §7"""
    client = ScramClient("user", TOKEN)
    client.final(server_for().first(client.first()))
    with pytest.raises(AuthenticationError, match="invalid-proof"):
        client.verify("e=invalid-proof")


@pytest.mark.parametrize(
    "message",
    [
        "",
        "r=NONCE,s=W22Z,i=4096",  # not longer than the client's own nonce
        "r=other,s=W22Z,i=4096",
        "r=NONCEx,s=W22Z,i=4095",
        "r=NONCEx,s=W22Z,i=999999999",
        "r=NONCEx,s=W22Z,i=9999999999999999999999",
        "r=NONCEx,s=W22Z,i=-1",
        "r=NONCEx,s=W22Z,i=٤٠٩٦",
        "r=NONCEx,s=W22Z",
        "r=NONCEx,s=,i=4096",
        "r=NONCEx,s=*,i=4096",
        "r=NONCEx,s=\ud800,i=4096",
        "m=must,r=NONCEx,s=W22Z,i=4096",
        "e=unknown-user",
    ],
)
def test_a_bad_answer_of_the_server_is_refused(message, monkeypatch):
    monkeypatch.setattr(secrets, "token_urlsafe", lambda _: "NONCE")
    client = ScramClient("user", TOKEN)
    with pytest.raises(AuthenticationError):
        client.final(message)


# --- what is kept ---------------------------------------------------------------------


def test_a_verifier_has_a_text_form(rfc_verifier):
    """RFC 5803 §3"""
    assert rfc_verifier.to_text() == (
        "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ=="
        "$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY="
        ":wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
    )
    assert ScramVerifier.from_text(rfc_verifier.to_text()) == rfc_verifier


@pytest.mark.parametrize(
    "text", ["", "SCRAM-SHA-256$4096:a$b", "SCRAM-SHA-1$1:AA==$AA==:AA==", "$:$:"]
)
def test_another_text_is_no_verifier(text):
    with pytest.raises(ValueError):
        ScramVerifier.from_text(text)


def test_salts_differ():
    assert make_verifier(TOKEN).salt != make_verifier(TOKEN).salt


def test_a_python_without_openssl_computes_the_same(monkeypatch, rfc_verifier):
    monkeypatch.delattr(hashlib, "pbkdf2_hmac")
    monkeypatch.setattr(secrets, "token_bytes", lambda _: RFC_SALT)
    assert make_verifier("pencil") == rfc_verifier


def test_a_handle_does_not_tell_the_token():
    expected = hashlib.sha256(b"moltis handle" + TOKEN.encode()).hexdigest()[:32]
    assert scram_handle(TOKEN) == expected
    assert hashlib.sha256(TOKEN.encode()).hexdigest()[:32] != expected
