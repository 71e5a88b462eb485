"""TLS: certificates made by openssl and loaded by ssl, read from their DER; pins."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support import ROOT, wait_for

import moltis
from moltis import (
    BadConfiguration,
    TlsFiles,
    TlsTrust,
    ensure_certificate,
    host_addresses,
    host_names,
    load_tls,
    parse_certificate,
    parse_fib_trie,
    parse_if_inet6,
    parse_ifconfig,
    read_certificate,
    tls_server_end_point,
)

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")

NAMES = ("localhost", "pi.local", "127.0.0.1", "2001:db8::1")
SUBJECT_ALTERNATIVES = (
    "DNS:localhost",
    "DNS:pi.local",
    "IP:127.0.0.1",
    "IP:2001:db8::1",
)


def openssl(*arguments):
    done = subprocess.run(
        ["openssl", *map(str, arguments)], check=False, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def self_signed(directory, *options, name="other", days=30):
    """Make a certificate as somebody else would; return its files."""
    files = TlsFiles(directory / f"{name}.pem", directory / f"{name}.key")
    openssl(
        *("req", "-x509", "-nodes", "-subj", "/CN=localhost", "-days", days),
        *("-keyout", files.key, "-out", files.certificate, *options),
    )
    return files


def der_of(files):
    return read_certificate(files.certificate)


@pytest.fixture
def files(tmp_path):
    return ensure_certificate(tmp_path / "tls", NAMES)


def handshake(identity, client_context, server_name=None):
    """Connect the two over a socket pair; return the certificate the client saw."""
    near, far = socket.socketpair()
    failures = []

    def serve():
        try:
            with identity.context.wrap_socket(far, server_side=True) as tls:
                tls.sendall(b"hello")
        except OSError as error:
            failures.append(error)
            far.close()

    server = threading.Thread(target=serve)
    server.start()
    try:
        with client_context.wrap_socket(near, server_hostname=server_name) as tls:
            assert tls.recv(5) == b"hello"
            assert not failures
            return tls.getpeercert(binary_form=True), tls.version()
    finally:
        near.close()
        server.join()


def trusting(files):
    return ssl.create_default_context(cafile=str(files.certificate))


def unverified():
    return TlsTrust(bound=True).context()


# --- our own certificate --------------------------------------------------------------


def test_the_certificate_holds_the_names_and_lasts_ten_years(files):
    certificate = parse_certificate(der_of(files))
    assert set(certificate.names) == set(SUBJECT_ALTERNATIVES)
    assert abs(certificate.expires_at - time.time() - 3650 * 86400) < 86400
    text = openssl("x509", "-in", files.certificate, "-noout", "-text").decode()
    for fact in ("NIST CURVE: P-256", "ecdsa-with-SHA256", "CA:FALSE"):
        assert fact in text


@pytest.mark.parametrize("name", NAMES)
def test_who_trusts_the_certificate_reaches_the_gateway_under_each_name(files, name):
    _, version = handshake(load_tls(files), trusting(files), name)
    assert version == "TLSv1.3"


def test_who_does_not_trust_it_or_uses_another_name_does_not(files, tmp_path):
    identity = load_tls(files)
    with pytest.raises(ssl.SSLError):
        handshake(identity, ssl.create_default_context(), "localhost")
    with pytest.raises(ssl.SSLError):
        handshake(identity, trusting(files), "evil.example")
    with pytest.raises(ssl.SSLError):
        handshake(identity, trusting(self_signed(tmp_path)), "localhost")


def test_tls_older_than_1_2_is_refused(files):
    identity = load_tls(files)
    assert identity.context.minimum_version == ssl.TLSVersion.TLSv1_2
    context = unverified()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert handshake(identity, context)[1] == "TLSv1.2"


def test_the_key_is_readable_by_its_owner_alone(files):
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in files.key.parent.iterdir()}
    assert modes["key.pem"] == 0o600
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(files.key.parent.stat().st_mode) == 0o700


def test_the_certificate_is_kept_while_it_fits(files):
    before = files.certificate.read_bytes(), files.key.read_bytes()
    assert ensure_certificate(files.key.parent, NAMES) == files
    ensure_certificate(files.key.parent, NAMES[:2])
    ensure_certificate(files.key.parent, ("LOCALHOST", "2001:DB8:0::1"))
    assert (files.certificate.read_bytes(), files.key.read_bytes()) == before


def test_a_new_address_renews_the_certificate_and_leaves_the_pin(files):
    before = parse_certificate(der_of(files))
    ensure_certificate(files.key.parent, (*NAMES, "192.0.2.99"))
    after = parse_certificate(der_of(files))
    assert "IP:192.0.2.99" in after.names
    assert after.pin == before.pin


def test_two_certificates_have_different_serial_numbers(files):
    serial = openssl("x509", "-in", files.certificate, "-noout", "-serial")
    ensure_certificate(files.key.parent, (*NAMES, "more"))
    assert openssl("x509", "-in", files.certificate, "-noout", "-serial") != serial


def test_a_certificate_that_ends_soon_is_renewed(files, monkeypatch):
    monkeypatch.setattr(moltis, "TLS_DAYS", 20)
    ensure_certificate(files.key.parent, (*NAMES, "a"))
    soon = parse_certificate(der_of(files)).expires_at
    monkeypatch.undo()
    ensure_certificate(files.key.parent, (*NAMES, "a"))
    assert parse_certificate(der_of(files)).expires_at > soon + 86400 * 3000


def test_what_is_no_name_is_left_out(tmp_path):
    names = ("localhost", "bücher.example", "a b", "x\n[req]", "a,DNS:evil", "", "\0")
    certificate = load_tls(ensure_certificate(tmp_path / "tls", names)).certificate
    assert certificate.names == ("DNS:localhost",)


@pytest.mark.parametrize("damage", ["certificate", "key", "both", "another key"])
def test_what_is_damaged_is_made_anew(files, tmp_path, damage):
    other = self_signed(tmp_path)
    if damage in ("certificate", "both"):
        files.certificate.write_bytes(b"")
    if damage in ("key", "both"):
        files.key.write_bytes(b"nonsense")
    if damage == "another key":
        shutil.copy(other.key, files.key)
    ensure_certificate(files.key.parent, NAMES)
    handshake(load_tls(files), trusting(files), "localhost")


@pytest.mark.parametrize("content", [None, b"", b"nonsense"])
def test_a_certificate_that_is_lost_is_made_anew_for_the_same_key(files, content):
    pin = parse_certificate(der_of(files)).pin
    files.certificate.unlink()
    if content is not None:
        files.certificate.write_bytes(content)
    ensure_certificate(files.key.parent, NAMES)
    assert parse_certificate(der_of(files)).pin == pin


def test_a_key_that_cannot_be_read_is_named_and_left_there(files):
    """A new one would have another pin."""
    files.key.unlink()
    files.key.symlink_to(files.key)
    with pytest.raises(BadConfiguration, match=f"cannot read {files.key}: "):
        ensure_certificate(files.key.parent, NAMES)
    assert files.key.is_symlink()


def test_without_openssl_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadConfiguration, match=r"openssl.* --tls-cert and --tls-key"):
        ensure_certificate(tmp_path / "tls", NAMES)


def test_with_a_certificate_in_place_openssl_is_not_needed(files, monkeypatch):
    monkeypatch.setenv("PATH", "")
    ensure_certificate(files.key.parent, NAMES)


@pytest.mark.parametrize(
    ("script", "timeout", "words"),
    [
        ("echo no entropy >&2; exit 1", 30, "no entropy"),
        ("exec sleep 60", 0.3, "longer than"),
    ],
)
def test_an_openssl_that_fails_is_an_error_that_says_why(
    tmp_path, monkeypatch, script, timeout, words
):
    monkeypatch.setattr(moltis, "OPENSSL_TIMEOUT", timeout)
    program = tmp_path / "openssl"
    program.write_text(f"#!/bin/sh\nPATH=/bin:/usr/bin; exec 3>&2; {script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadConfiguration, match=words):
        ensure_certificate(tmp_path / "tls", NAMES)


# --- a certificate that was brought ---------------------------------------------------


def test_curl_accepts_the_pin(files):
    """curl --pinnedpubkey: SHA-256 of the SubjectPublicKeyInfo."""
    public = openssl("x509", "-in", files.certificate, "-noout", "-pubkey")
    lines = [x for x in public.decode().splitlines() if not x.startswith("-")]
    digest = hashlib.sha256(base64.b64decode("".join(lines))).digest()
    expected = "sha256//" + base64.b64encode(digest).decode()
    assert load_tls(files).certificate.pin == expected


def test_another_certificate_than_the_pinned_one_is_what_an_attack_looks_like(
    files, tmp_path
):
    pin = load_tls(files).certificate.pin
    TlsTrust(pin).check(der_of(files))
    ensure_certificate(files.key.parent, (*NAMES, "more"))
    TlsTrust(pin).check(der_of(files))
    for der in (der_of(self_signed(tmp_path)), b"", b"nonsense"):
        TlsTrust().check(der)  # a CA vouches for it
        with pytest.raises(moltis.Refused, match="it may be a man in the middle"):
            TlsTrust(pin).check(der)
    for wrong in ("", pin[:-1], pin.lower(), "sha256//\ud800"):
        with pytest.raises(moltis.Refused):
            TlsTrust(wrong).check(der_of(files))


@pytest.mark.parametrize("trust", [TlsTrust("sha256//pin"), TlsTrust(bound=True)])
def test_a_client_that_pins_or_binds_takes_the_certificate_of_any_ca(files, trust):
    _, version = handshake(load_tls(files), trust.context())
    assert version == "TLSv1.3"


def test_a_client_may_name_its_own_ca(files, tmp_path):
    trust = TlsTrust(ca=moltis.read_ca(str(files.certificate)))
    handshake(load_tls(files), trust.context(), "localhost")
    with pytest.raises(ssl.SSLError):
        handshake(load_tls(files), TlsTrust().context(), "localhost")
    for path in (tmp_path / "missing", files.key):
        with pytest.raises(BadConfiguration, match=re.escape(str(path))):
            moltis.read_ca(str(path))


@pytest.mark.parametrize("damage", [b"no", "\u00fc".encode()])
def test_a_ca_file_with_a_damaged_certificate_is_named(files, tmp_path, damage):
    """A comment is none, nor are the ends of lines of Windows."""
    whole = files.certificate.read_bytes().replace(b"\n", b"\r\n")
    path = tmp_path / "bundle.pem"
    path.write_bytes(whole + "# f\u00fcr uns\n".encode() + whole)
    trust = TlsTrust(ca=moltis.read_ca(str(path)))
    handshake(load_tls(files), trust.context(), "localhost")
    path.write_bytes(whole + whole.replace(b"MII", damage))
    sentence = f"cannot use the CA file {path}: CA certificate 2 is damaged; it must be"
    with pytest.raises(BadConfiguration, match=sentence):
        moltis.read_ca(str(path))


ALGORITHMS = {
    "rsa sha1": ("-newkey rsa:2048 -sha1", "sha256"),
    "rsa sha256": ("-newkey rsa:2048 -sha256", "sha256"),
    "rsa sha384": ("-newkey rsa:2048 -sha384", "sha384"),
    "rsa sha512": ("-newkey rsa:2048 -sha512", "sha512"),
    "pss sha256": ("-newkey rsa:2048 -sha256 -sigopt rsa_padding_mode:pss", "sha256"),
    "pss sha384": ("-newkey rsa:2048 -sha384 -sigopt rsa_padding_mode:pss", "sha384"),
    "pss sha512": ("-newkey rsa:2048 -sha512 -sigopt rsa_padding_mode:pss", "sha512"),
    "ec sha256": ("-newkey ec -pkeyopt ec_paramgen_curve:P-256 -sha256", "sha256"),
    "ec sha384": ("-newkey ec -pkeyopt ec_paramgen_curve:P-384 -sha384", "sha384"),
    "ec sha512": ("-newkey ec -pkeyopt ec_paramgen_curve:P-521 -sha512", "sha512"),
    "ed25519": ("-newkey ed25519", "sha256"),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_channel_binding_is_the_hash_that_the_signature_uses(tmp_path, algorithm):
    """RFC 5929 §4.1"""
    options, name = ALGORITHMS[algorithm]
    der = der_of(self_signed(tmp_path, *options.split()))
    assert tls_server_end_point(der) == hashlib.new(name, der).digest()


def test_client_and_server_compute_the_same_channel_binding(files):
    identity = load_tls(files)
    seen, _ = handshake(identity, unverified())
    assert tls_server_end_point(seen) == identity.channel_binding
    assert parse_certificate(seen) == identity.certificate


def test_a_chain_is_known_by_its_first_certificate(files, tmp_path):
    other = self_signed(tmp_path)
    chain = tmp_path / "chain.pem"
    own = files.certificate.read_bytes()
    chain.write_bytes(b"Bag Attributes\n" + own + other.certificate.read_bytes())
    identity = load_tls(TlsFiles(chain, files.key))
    assert identity.certificate == parse_certificate(der_of(files))


def test_certificate_and_key_may_be_in_one_file(files, tmp_path):
    both = tmp_path / "both.pem"
    both.write_bytes(files.key.read_bytes() + files.certificate.read_bytes())
    assert load_tls(TlsFiles(both, both)).certificate == load_tls(files).certificate


def test_a_renewed_certificate_is_another_identity(files):
    old = load_tls(files)
    ensure_certificate(files.key.parent, (*NAMES, "more"))
    new = load_tls(files)
    assert old.channel_binding != new.channel_binding
    seen, _ = handshake(old, unverified())
    assert tls_server_end_point(seen) == old.channel_binding


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_named_and_never_waited_for(files, tmp_path, make):
    path = tmp_path / "other"
    make(path)
    problems = []

    def use(read, *arguments):
        with pytest.raises(BadConfiguration) as caught:
            read(*arguments)
        problems.append(str(caught.value))

    for use_of_path in (
        (load_tls, TlsFiles(path, files.key)),
        (moltis.read_ca, str(path)),
        (moltis.read_channel_binding, path),
    ):
        threading.Thread(target=use, args=use_of_path, daemon=True).start()
    wait_for(lambda: len(problems) == 3)
    assert all(p.startswith(f"{path} is not a regular file") for p in problems)


@pytest.mark.parametrize("name", ["certificate", "key"])
def test_a_pipe_in_the_place_of_our_own_files_is_named_and_left_there(files, name):
    """A new key in its place would have another pin."""
    path = getattr(files, name)
    path.unlink()
    os.mkfifo(path)
    problems = []

    def ensure():
        with pytest.raises(BadConfiguration) as caught:
            ensure_certificate(files.key.parent, NAMES)
        problems.append(str(caught.value))

    threading.Thread(target=ensure, daemon=True).start()
    wait_for(lambda: problems)
    assert problems[0].startswith(f"{path} is not a regular file")
    assert path.is_fifo()


def test_a_key_may_come_through_a_pipe(files):
    """As bash gives it: --tls-key <(decrypt key.pem)."""
    reader, writer = os.pipe()
    with open(writer, "wb") as pipe:
        pipe.write(files.key.read_bytes())
    with open(reader, "rb"):
        identity = load_tls(TlsFiles(files.certificate, Path(f"/dev/fd/{reader}")))
    seen, _ = handshake(identity, unverified())
    assert tls_server_end_point(seen) == identity.channel_binding


def test_files_that_cannot_be_used_are_named(files, tmp_path):
    other = self_signed(tmp_path)
    secret = self_signed(tmp_path, name="secret")
    openssl(
        *("rsa", "-in", secret.key, "-aes128", "-passout", "pass:secret"),
        *("-out", tmp_path / "locked.key"),
    )
    for certificate, key in (
        (tmp_path / "missing.pem", files.key),
        (files.certificate, tmp_path / "missing.key"),
        (files.certificate, other.key),
        (files.key, files.key),
        (secret.certificate, tmp_path / "locked.key"),
    ):
        with pytest.raises(BadConfiguration, match=re.escape(str(certificate))):
            load_tls(TlsFiles(certificate, key))


@pytest.mark.parametrize("names", ["", "-addext subjectAltName=DNS:a.example,IP:::1"])
def test_the_names_of_other_certificates_are_read(tmp_path, names):
    certificate = parse_certificate(der_of(self_signed(tmp_path, *names.split())))
    assert list(certificate.names) == (["DNS:a.example", "IP:::1"] if names else [])


def test_years_have_two_digits_until_2049_and_four_after(tmp_path):
    """RFC 5280 §4.1.2.5"""
    for days in (30, 3650, 365 * 60):
        expires_at = parse_certificate(
            der_of(self_signed(tmp_path, days=days))
        ).expires_at
        assert abs(expires_at - time.time() - days * 86400) < 86400


def test_what_is_no_certificate_is_refused(files):
    der = der_of(files)
    broken = [der[:n] for n in range(0, len(der), 7)]
    broken += [b"\x30\x80" + der, b"\x30\x00", b"\x02\x01\x01", der[4:]]
    for data in broken:
        for read in (parse_certificate, tls_server_end_point):
            with pytest.raises(ValueError, match=r"no X\.509 certificate"):
                read(data)
    for pem in (b"", der, b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----"):
        files.certificate.write_bytes(pem)
        with pytest.raises(ValueError):
            read_certificate(files.certificate)


def test_a_damaged_certificate_raises_nothing_but_value_errors(files):
    der = der_of(files)
    for position in range(len(der)):
        for bit in (0x01, 0x80):
            data = bytearray(der)
            data[position] ^= bit
            for read in (parse_certificate, tls_server_end_point):
                with contextlib.suppress(ValueError):
                    read(bytes(data))


def test_a_python_without_ssl_is_told_what_to_install(files):
    script = (
        "import sys; sys.modules['ssl'] = None; sys.path.insert(0, sys.argv[1])\n"
        "import moltis, pathlib\n"
        "try:\n"
        "    moltis.ensure_certificate(pathlib.Path(sys.argv[2]), ['localhost'])\n"
        "except moltis.BadConfiguration as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), str(files.key.parent)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "ssl" in done.stdout
    assert "install" in done.stdout


# --- the names of this machine --------------------------------------------------------


def test_this_machine_is_known_by_names_that_fit_a_certificate(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "Pi")
    assert host_names() == ["localhost", "pi", "pi.local"]
    monkeypatch.setattr(socket, "gethostname", lambda: "pi.example.org")
    assert host_names() == ["localhost", "pi.example.org"]
    monkeypatch.setattr(socket, "gethostname", lambda: "bad name, DNS:evil\n")
    assert host_names() == ["localhost"]


def test_the_addresses_of_this_machine_are_its_own():
    addresses = host_addresses()
    assert {"127.0.0.1", "::1"} <= set(addresses)
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family) as sock:
            sock.bind((address, 0))
            continue
        assert address == "::1", "only IPv6 loopback may be missing"


def test_a_certificate_can_be_made_for_this_machine(tmp_path):
    names = [*host_names(), *host_addresses()]
    certificate = load_tls(ensure_certificate(tmp_path / "tls", names)).certificate
    assert {name.partition(":")[2] for name in certificate.names} == set(names)


def test_linux_tells_its_addresses():
    trie = """Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 192.168.1.0/24 2 0 2
        |-- 192.168.1.0
           /24 link UNICAST
        |-- 192.168.1.17
           /32 host LOCAL
        |-- 192.168.1.255
           /32 link BROADCAST
Local:
     |-- 127.0.0.1
        /32 host LOCAL
"""
    assert parse_fib_trie(trie) == {"192.168.1.17", "127.0.0.1"}
    table = (
        "00000000000000000000000000000001 01 80 10 80       lo\n"
        "fe80000000000000021122fffe334455 02 40 20 80     eth0\n"
        "20010db8000000000000000000000017 02 40 00 80     eth0\n"
    )
    assert parse_if_inet6(table) == {"::1", "2001:db8::17"}


def test_macos_and_the_bsds_tell_their_addresses():
    text = (
        "lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384\n"
        "\tinet 127.0.0.1 netmask 0xff000000\n"
        "\tinet6 ::1 prefixlen 128 \n"
        "\tinet6 fe80::1%lo0 prefixlen 64 scopeid 0x1 \n"
        "en0: flags=8863<UP,BROADCAST> mtu 1500\n"
        "\tether a4:83:e7:00:00:00\n"
        "\tinet6 2001:db8::17 prefixlen 64 autoconf secured \n"
        "\tinet 192.168.1.17 netmask 0xffffff00 broadcast 192.168.1.255\n"
    )
    assert parse_ifconfig(text) == {"127.0.0.1", "::1", "2001:db8::17", "192.168.1.17"}
