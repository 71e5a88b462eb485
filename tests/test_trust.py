"""What somebody on the wire, at the door, or in the gateway's place cannot do."""

from __future__ import annotations

import contextlib
import email.parser
import io
import json
import os
import re
import shutil
import socket
import sqlite3
import ssl
import subprocess
import threading
import warnings
from functools import partial
from pathlib import Path

import pytest
from peers import InProcessGateway, InProcessNode, RawPeer, rust_connect
from support import Program, run_moltis, wait_for, wait_in_shell

import moltis

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl here")

NAMES = ("localhost", "127.0.0.1")


@pytest.fixture(scope="module")
def tls_files(tmp_path_factory):
    return moltis.ensure_certificate(tmp_path_factory.mktemp("tls"), NAMES)


@pytest.fixture(scope="module")
def other_files(tmp_path_factory):
    """Another certificate for the same names, as a man in the middle makes it."""
    return moltis.ensure_certificate(tmp_path_factory.mktemp("other"), NAMES)


@pytest.fixture
def gateway(tmp_path, tls_files):
    tls = moltis.ServerTls(lambda: tls_files)
    with InProcessGateway(tmp_path / "gateway", tls=tls) as gateway:
        yield gateway


@pytest.fixture
def plain(tmp_path):
    with InProcessGateway(tmp_path / "plain") as gateway:
        yield gateway


class Relay:
    """A man in the middle: passes on what it hears, and writes it down.

    With `files` it speaks TLS both ways, towards the client with that certificate.
    Connections beyond the first `served` hear nothing.
    """

    def __init__(self, port, files=None, served=1000):
        self.heard = b""
        self.accepted = 0
        self._served = served
        self._lock = threading.Lock()  # guards heard
        self._target = port
        self._tls = moltis.load_tls(files).context if files else None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets = [self._listener]
        self._threads = []
        self._accepting = self._spawn(self._accept)

    def _spawn(self, target, *args):
        thread = threading.Thread(target=target, args=args, name="test-relay")
        self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                client.settimeout(60)
                self._sockets.append(client)
                self.accepted += 1
                if self.accepted <= self._served:
                    with contextlib.suppress(OSError):
                        self._connect(client)

    def _connect(self, client):
        server = socket.create_connection(("127.0.0.1", self._target), 20)
        self._sockets.append(server)
        if self._tls is not None:
            client = self._tls.wrap_socket(client, server_side=True)
            self._sockets.append(client)
            server = moltis.TlsTrust(bound=True).context().wrap_socket(server)
            self._sockets.append(server)
        client.settimeout(None)
        server.settimeout(None)
        self._spawn(self._pass_on, client, server)
        self._spawn(self._pass_on, server, client)

    def _pass_on(self, source, target):
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                with self._lock:
                    self.heard += data
                if not data:
                    break
                target.sendall(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def close(self):
        # A socket that is reset while Python wraps it is left unclosed by Python.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in self._sockets:
            sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def node_settings(gateway, url, token=None, **changes):
    return moltis.NodeSettings(
        gateway_url=url,
        device_token=token or gateway.token("far"),
        node_id="id-of-far",
        display_name="far",
        **changes,
    )


def refusal_of(settings, environ):
    """Return why a node with these settings is not let in, or lets nobody in."""
    node = moltis.RunningNode(
        settings, environ, lambda *_: None, give_up_when_refused=True
    )
    try:
        return str(wait_for(lambda: node.refused, what="the refusal"))
    finally:
        node.close()


# -- TLS without a certificate authority ---------------------------------------------


def test_nodes_and_operators_work_over_a_certificate_of_our_own(gateway):
    assert gateway.websocket_url.startswith("wss://")
    with gateway.node("far"):
        result = gateway.call(
            "node.invoke",
            nodeId="far",
            command="system.run",
            args={"command": "echo over TLS"},
        )
    assert result["stdout"] == "over TLS\n"


def test_a_node_refuses_a_man_in_the_middle_and_says_so(gateway, other_files, caplog):
    """RFC 5802 §6: the two see different certificates, so the proof does not fit."""
    token = gateway.token("far")
    with Relay(gateway.running.port, other_files) as relay:
        settings = node_settings(gateway, f"wss://127.0.0.1:{relay.port}/ws", token)
        reason = refusal_of(settings, gateway.environ)
    assert "somebody stands in between" in reason
    assert token.encode() not in relay.heard
    assert not gateway.is_connected("id-of-far")
    # And the gateway, which has refused as well, tells its own operator.
    assert "somebody stands in between" in caplog.text


def test_a_stolen_database_makes_no_gateway(tmp_path, gateway, other_files):
    """Its verifiers are all that a gateway needs for its own proof of a token."""
    token = gateway.token("far")
    pins = []
    settings = node_settings(gateway, gateway.websocket_url, token)
    node = moltis.RunningNode(
        settings,
        gateway.environ,
        lambda *_: None,
        on_learned=lambda found: pins.append(found["gateway_pin"]),
    )
    try:
        wait_for(lambda: pins, what="the pin")
    finally:
        node.close()
    assert pins == [gateway.running.options.fingerprint()]
    stolen = tmp_path / "stolen"
    stolen.mkdir(mode=0o700)
    source = sqlite3.connect(gateway.directory / "moltis.db")
    with contextlib.closing(source), contextlib.closing(
        sqlite3.connect(stolen / "moltis.db")
    ) as copy:
        source.backup(copy)
    tls = moltis.ServerTls(lambda: other_files)
    with InProcessGateway(stolen, tls=tls) as thief:
        settings = settings.replace(
            gateway_url=thief.websocket_url, gateway_pin=pins[0]
        )
        assert "another TLS certificate" in refusal_of(settings, gateway.environ)
        assert not thief.is_connected("id-of-far")


def test_a_renewed_certificate_with_the_same_key_is_the_same_gateway(tmp_path):
    files = moltis.ensure_certificate(tmp_path / "tls", ["localhost"])
    pin = moltis.load_tls(files).certificate.pin
    files = moltis.ensure_certificate(tmp_path / "tls", NAMES)
    tls = moltis.ServerTls(lambda: files)
    with InProcessGateway(tmp_path / "gateway", tls=tls) as gateway:
        settings = node_settings(gateway, gateway.websocket_url, gateway_pin=pin)
        node = moltis.RunningNode(settings, gateway.environ, lambda *_: None)
        try:
            wait_for(lambda: gateway.is_connected("id-of-far"), what="the node")
        finally:
            node.close()


@pytest.fixture
def issued_files(tmp_path):
    """A certificate that a CA issued, the CA, and the next with another key."""
    made = []
    for name in ("ca", "one", "two"):
        key, certificate = tmp_path / f"{name}.key", tmp_path / f"{name}.pem"
        words = ["openssl", "req", "-x509", "-nodes", "-newkey", "rsa:2048"]
        words += ["-subj", f"/CN={name}", "-keyout", key, "-out", certificate]
        if name != "ca":
            words += ["-CA", made[0].certificate, "-CAkey", made[0].key]
            words += ["-addext", "subjectAltName=IP:127.0.0.1"]
            words += ["-addext", "basicConstraints=critical,CA:FALSE"]
        subprocess.run(words, check=True, capture_output=True)
        made.append(moltis.TlsFiles(certificate, key))
    return made


@pytest.mark.parametrize("kept", ["system", "file"])
def test_a_ca_s_certificate_may_come_with_another_key_and_no_other_may(
    tmp_path, issued_files, other_files, kept, monkeypatch
):
    """Public CAs renew with new keys: a pin would lock every node out."""
    ca, *files = issued_files
    trusted = moltis.read_ca(str(ca.certificate))
    if kept == "system":
        monkeypatch.setenv("SSL_CERT_FILE", str(ca.certificate))
        trusted = None
    directory, changes = tmp_path / "gateway", {"ca": trusted}
    token = None
    for pair in [*files, other_files]:
        tls = moltis.ServerTls(partial(lambda found: found, pair))
        with InProcessGateway(directory, tls=tls) as gateway:
            token = token or gateway.token("far")
            settings = node_settings(gateway, gateway.websocket_url, token, **changes)
            if pair is other_files:
                states = []
                on_state = partial(lambda found, *state: found.append(state), states)
                node = moltis.RunningNode(settings, gateway.environ, on_state)
                try:
                    wait_for(lambda found=states: found, what="a refusal")
                finally:
                    node.close()
                assert "not trusted" in str(states[0][1])
                continue
            pins = []
            node = moltis.RunningNode(
                settings,
                gateway.environ,
                lambda *_: None,
                on_learned=lambda found, pins=pins: pins.append(found["gateway_pin"]),
            )
            try:
                wait_for(partial(gateway.is_connected, "id-of-far"), what="the node")
                if kept == "system" and "gateway_pin" not in changes:
                    wait_for(lambda found=pins: found, what="what is kept")
                    assert pins == ["ca"]
                    changes["gateway_pin"] = "ca"
            finally:
                node.close()


@pytest.mark.parametrize("served", [0, 1])
def test_a_node_that_is_stopped_does_not_wait_for_a_silent_gateway(
    tmp_path, issued_files, monkeypatch, served
):
    """Its second connection asks whether a CA vouches for what it keeps."""
    ca, pair, *_ = issued_files
    monkeypatch.setenv("SSL_CERT_FILE", str(ca.certificate))
    tls = moltis.ServerTls(lambda: pair)
    with contextlib.ExitStack() as stack:
        gateway = stack.enter_context(InProcessGateway(tmp_path / "gateway", tls=tls))
        relay = stack.enter_context(Relay(gateway.running.port, served=served))
        url = f"wss://127.0.0.1:{relay.port}/ws"
        settings = node_settings(gateway, url)
        node = moltis.RunningNode(settings, gateway.environ, lambda *_: None)
        stack.callback(node.close)
        wait_for(lambda: relay.accepted > served, what="the silent connection")
        node.close()
        assert not node._thread.is_alive()


def test_a_node_obeys_no_gateway_that_does_not_know_its_token(tmp_path, gateway):
    """It may have taken the address over, and ask for anything before its proof."""
    with InProcessGateway(tmp_path / "impostor") as impostor:
        stranger = node_settings(gateway, impostor.websocket_url)
        assert "authentication failed" in refusal_of(stranger, gateway.environ)


@pytest.mark.parametrize("proof", ["v=" + "A" * 43 + "=", "e=other-error", "", None])
@pytest.mark.parametrize("event", ["node.invoke.request", "job.start"])
def test_a_hostile_gateway_cannot_get_a_node_to_run_anything(
    tmp_path, plain, proof, event
):
    """All that it says before, in, and after a wrong proof is obeyed by nobody."""
    trace = tmp_path / "ran"
    job_id, spec = moltis.new_id(), {"command": f"touch {trace}"}
    payload = {
        "node.invoke.request": {
            "invokeId": job_id,
            "command": "system.run",
            "args": spec,
        },
        "job.start": {"id": job_id, "work": "run", "spec": spec},
    }[event]
    order = {"type": "event", "event": event, "payload": payload}
    with HostileGateway(order, proof) as hostile:
        settings = node_settings(plain, hostile.url)
        assert "prove" in refusal_of(settings, plain.environ) or proof is None
    assert hostile.orders >= 3
    assert not trace.exists()


class HostileGateway:
    """Lets everyone in, proves nothing, writes down what it hears, and orders."""

    def __init__(self, order, proof):
        self.orders = 0
        self.heard = ""
        self._order = json.dumps(order)
        self._proof = proof
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"ws://127.0.0.1:{self._listener.getsockname()[1]}/ws"
        self._thread = threading.Thread(target=self._run, name="test-hostile")
        self._thread.start()

    def _run(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                with sock, contextlib.suppress(moltis.MoltisError, TimeoutError):
                    self._serve(sock)

    def _serve(self, sock):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            data = sock.recv(4096)
            if not data:
                return  # it left at once
            head += data
        headers = email.parser.BytesParser().parsebytes(head.partition(b"\r\n")[2])
        lines = [f"{n}: {v}" for n, v in moltis.accept_upgrade(headers)]
        lines = ["HTTP/1.1 101 Switching Protocols", *lines, "", ""]
        sock.sendall("\r\n".join(lines).encode())
        protocol = moltis.WebSocketProtocol(client=False)
        with moltis.WebSocket(sock, protocol) as ws:
            self._command(ws)
            first = json.loads(self._hear(ws))
            self._command(ws)
            nonce = first["params"]["clientFirst"].partition(",r=")[2]
            server_first = f"r={nonce}more,s=c2FsdHNhbHQ=,i=4096"
            self._answer(ws, first, {"serverFirst": server_first})
            connect = json.loads(self._hear(ws))
            self._command(ws)
            auth = (
                {} if self._proof is None else {"scram": {"serverFinal": self._proof}}
            )
            hello = {"type": "hello-ok", "protocol": 4, "auth": auth}
            hello["extensions"] = {"moltis": {"jobs": {}}}
            self._answer(ws, connect, hello)
            self._command(ws)
            with contextlib.suppress(moltis.ConnectionClosed):
                while self._hear(ws) is not None:
                    pass

    def _hear(self, ws):
        message = ws.receive(60)
        self.heard += str(message)
        return message

    def _command(self, ws):
        ws.send(self._order)
        self.orders += 1

    def _answer(self, ws, request, payload):
        answer = {"type": "res", "id": request["id"], "ok": True, "payload": payload}
        ws.send(json.dumps(answer))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


def test_an_operator_with_the_pin_refuses_a_man_in_the_middle(gateway, other_files):
    with Relay(gateway.running.port, other_files) as relay, pytest.raises(
        moltis.Refused, match="it may be a man in the middle"
    ):
        url = f"https://127.0.0.1:{relay.port}"
        moltis.OperatorClient(url, gateway.api_key, gateway.trust)
    assert gateway.api_key.encode() not in relay.heard


def test_an_operator_without_a_pin_refuses_a_certificate_of_our_own(gateway):
    with pytest.raises(moltis.Unreachable, match="--fingerprint"):
        moltis.OperatorClient(gateway.url, gateway.api_key)


def test_an_operator_may_have_the_certificate_vouched_for(gateway, tls_files):
    trust = moltis.TlsTrust(ca=moltis.read_ca(str(tls_files.certificate)))
    with moltis.OperatorClient(gateway.url, gateway.api_key, trust) as client:
        assert client.call("node.list", {})


def test_the_command_line_takes_an_authority_of_one_s_own(tmp_path, home, issued_files):
    """FAULTS B7: given with --ca, or as `node add --ca` kept it for that gateway."""
    home.mkdir(exist_ok=True)
    ca, pair, other = issued_files
    tls = moltis.ServerTls(lambda: pair)
    with InProcessGateway(tmp_path / "gateway", tls=tls) as gateway:

        def listed(*options, host=gateway.url):
            words = ("node", "list", "--host", host, *options)
            done = run_moltis(*words, home=home, MOLTIS_API_KEY=gateway.api_key)
            assert done.stderr.count("\n") <= 1  # one sentence
            return done.returncode, done.stdout + done.stderr

        status, text = listed("--ca", ca.certificate)
        assert (status, "Local" in text) == (0, True)
        none = tmp_path / "none.pem"
        pin = gateway.trust.fingerprint
        for options, expected, words in (
            ((), 69, "--ca"),
            (("--ca", other.certificate), 69, "not trusted"),
            (("--ca", none), 78, f"cannot use the CA file {none}"),
            (("--ca", __file__), 78, "it must be PEM"),
            (("--ca", ca.certificate, "--fingerprint", pin), 2, "exclude each other"),
        ):
            status, text = listed(*options)
            assert (status, words in text) == (expected, True), text
        plain = gateway.url.replace("https", "http")
        assert "need TLS" in listed("--ca", ca.certificate, host=plain)[1]

        trusted = moltis.read_ca(str(ca.certificate))
        settings = node_settings(gateway, gateway.websocket_url, ca=trusted)
        settings.save(home / ".moltis")
        assert listed()[0] == 0
        elsewhere = gateway.url.replace("127.0.0.1", "localhost")
        assert listed(host=elsewhere)[0] == 69


def test_a_bearer_token_goes_to_nobody_without_a_trusted_certificate(gateway):
    """The node's side of --auth bearer, for gateways of the original Moltis."""
    settings = node_settings(gateway, gateway.websocket_url, auth="bearer")
    states = []
    node = moltis.RunningNode(
        settings, gateway.environ, lambda ok, why: states.append((ok, why))
    )
    try:
        wait_for(lambda: states, what="the node's first attempt")
    finally:
        node.close()
    assert not states[0][0]
    assert "not trusted" in str(states[0][1])


def test_a_node_that_binds_is_refused_where_somebody_takes_the_tls_off(
    plain, other_files
):
    tls = moltis.load_tls(other_files).context
    with TlsFront(plain.running.port, tls) as front:
        url = f"wss://127.0.0.1:{front.port}/ws"
        reason = refusal_of(node_settings(plain, url), plain.environ)
    assert "a proxy, or somebody else, stands in between" in reason


class TlsFront(Relay):
    """Takes TLS off, as a reverse proxy does."""

    def __init__(self, port, context):
        self._front = context
        super().__init__(port)

    def _connect(self, client):
        server = socket.create_connection(("127.0.0.1", self._target))
        client = self._front.wrap_socket(client, server_side=True)
        self._sockets += [server, client]
        self._spawn(self._pass_on, client, server)
        self._spawn(self._pass_on, server, client)


def test_plain_http_to_the_tls_port_is_told_so(gateway):
    with socket.create_connection(("127.0.0.1", gateway.running.port)) as sock:
        sock.settimeout(60)
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 400 This gateway speaks TLS: use ")


def test_old_tls_is_refused(gateway):
    context = moltis.TlsTrust(bound=True).context()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    address = ("127.0.0.1", gateway.running.port)
    with socket.create_connection(address) as sock, pytest.raises(OSError):
        context.wrap_socket(sock)


def test_a_new_certificate_is_read_while_connections_live_on(
    tmp_path, tls_files, other_files
):
    files = [tls_files]
    tls = moltis.ServerTls(lambda: files[0])
    directory = tmp_path / "gateway"
    with InProcessGateway(directory, tls=tls) as gateway, gateway.operator() as before:
        files[0] = other_files
        gateway.running.reload_tls()
        pin = moltis.GatewayFile.load(directory).fingerprint
        assert pin != gateway.trust.fingerprint
        assert before.call("node.list", {})
        trust = moltis.TlsTrust(pin)
        with moltis.OperatorClient(gateway.url, gateway.api_key, trust) as after:
            assert after.call("node.list", {})


def test_a_broken_certificate_leaves_the_one_in_use(tmp_path, tls_files, caplog):
    files = [tls_files]
    tls = moltis.ServerTls(lambda: files[0])
    with InProcessGateway(tmp_path / "gateway", tls=tls) as gateway:
        files[0] = moltis.TlsFiles(tmp_path / "none", tmp_path / "none")
        gateway.running.reload_tls()
        assert gateway.call("node.list")
    assert "the certificate was not read again" in caplog.text


def test_a_join_link_over_tls_hands_on_the_pin(gateway):
    made = gateway.call("device.token.create", displayName="joined")
    url = f"{gateway.url}/join/{made['joinCode']}"
    with pytest.raises(moltis.Unreachable, match=r"self.signed certificate"):
        moltis.fetch(url, moltis.TlsTrust())
    wrong = moltis.TlsTrust("sha256//" + "A" * 43 + "=")
    with pytest.raises(moltis.Refused, match="it may be a man in the middle"):
        moltis.fetch(url, wrong)
    # Neither attempt has asked for the link, so it is still good for once.
    offer = json.loads(moltis.fetch(url, gateway.trust))
    assert offer["gateway_url"] == gateway.websocket_url
    assert offer["fingerprint"] == gateway.trust.fingerprint


def test_the_lines_to_paste_are_pinned(home, tmp_path):
    """The first download is as safe as the rest: curl and python3 take the pin."""
    home.mkdir(exist_ok=True)
    arguments = ("gateway", "--tls", "--port", "0")
    with Program(*arguments, home=home) as gateway:
        gateway.wait_for_output("Ctrl+C stops it.")
        made = json.loads(
            run_moltis("node", "generate-token", "--json", home=home).stdout
        )
        fetched, _, rest = made["joinCommand"].partition("|")
        assert "curl -fsSk --pinnedpubkey 'sha256//" in fetched
        assert "--fingerprint sha256//" in rest
        if not shutil.which("curl"):
            pytest.skip("no curl here")
        text = subprocess.run(
            ["sh", "-c", fetched], check=True, capture_output=True, timeout=30
        ).stdout
        assert text == moltis.own_program()
        wrong = re.sub("sha256//.{8}", "sha256//AAAAAAAA", fetched)
        done = subprocess.run(["sh", "-c", wrong], check=False, capture_output=True)
        assert done.returncode == 90  # CURLE_SSL_PINNEDPUBKEYNOTMATCH
        assert done.stdout == b""


def test_sighup_reads_the_certificate_again(home, tls_files, tmp_path):
    home.mkdir(exist_ok=True)
    certificate = shutil.copy(tls_files.certificate, tmp_path / "c.pem")
    key = shutil.copy(tls_files.key, tmp_path / "k.pem")
    options = ("--tls-cert", certificate, "--tls-key", key)
    with Program("gateway", "--port", "0", *options, home=home) as gateway:
        gateway.wait_for_output("Ctrl+C stops it.")
        os.kill(gateway.pid, 1)
        gateway.wait_for_output("certificate in use pin=sha256//")
        assert run_moltis("node", "list", home=home).returncode == 0


def test_a_cookie_that_came_over_tls_stays_there(gateway):
    reply = post(gateway, "/api/sign-in", {"key": gateway.api_key})
    flags = {flag.strip() for flag in reply.headers["Set-Cookie"].split(";")}
    assert {"Secure", "HttpOnly", "SameSite=Strict"} <= flags


def post(gateway, path, value, **headers):
    import urllib.request

    body = json.dumps(value).encode()
    request = urllib.request.Request(gateway.url + path, body, headers)
    context = moltis.TlsTrust(bound=True).context()
    with urllib.request.urlopen(request, timeout=60, context=context) as answer:
        answer.body = answer.read()
        return answer


# -- the wire without TLS --------------------------------------------------------------


def test_no_token_key_or_cookie_crosses_plain_ws_between_node_and_gateway(plain):
    token = plain.token("far")
    with Relay(plain.running.port) as relay:
        url = f"ws://127.0.0.1:{relay.port}/ws"
        with InProcessNode(node_settings(plain, url, token), plain.environ):
            wait_for(lambda: plain.is_connected("id-of-far"), what="the node")
            plain.call(
                "node.invoke",
                nodeId="far",
                command="system.run",
                args={"command": "echo heard"},
            )
        # Messages of a client are masked (RFC 6455 §5.3), which hides nothing.
        heard = unmasked(relay.heard)
    assert b"auth.scram" in heard
    secrets = [token, token[4:], plain.api_key, "mdt_", "mk_", "ms_", "Cookie"]
    assert [s for s in secrets if s.encode() in heard + relay.heard] == []


def unmasked(data):
    """Return the payloads of all frames whose masking key can be seen in `data`."""
    found = b""
    for start in range(len(data) - 6):
        if data[start] != 0x81 or not data[start + 1] & 0x80:
            continue
        size, at = data[start + 1] & 0x7F, start + 2
        if size == 126:
            size, at = int.from_bytes(data[at : at + 2], "big"), at + 2
        key, payload = data[at : at + 4], data[at + 4 : at + 4 + size]
        found += moltis.apply_mask(payload, key)
    return found


def test_a_gateway_may_take_nothing_but_scram(tmp_path):
    with InProcessGateway(tmp_path / "strict", require_scram=True) as gateway:
        token = gateway.token("far")
        bearer = node_settings(gateway, gateway.websocket_url, token, auth="bearer")
        assert "only SCRAM" in refusal_of(bearer, gateway.environ)
        with gateway.node("far", token):
            pass


# -- operators -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("node", "list"),
        ("node", "exec", "secret-node", "--", "secret-command"),
        ("node", "generate-token", "--name", "secret-node"),
        ("chat", "--session", "secret-session", "secret-words"),
        ("mcp",),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("proof", [None, "v=" + "A" * 43 + "="])
def test_who_listens_on_the_port_of_a_gateway_that_is_down_learns_nothing(
    home, words, proof
):
    """FAULTS D1: any user of a machine may listen on a port that is free."""
    key = moltis.new_secret("mk_")
    with HostileGateway({"type": "event", "event": "presence"}, proof) as impostor:
        url = impostor.url.replace("ws:", "http:").replace("/ws", "")
        moltis.GatewayFile(url, key, 1).save(home / ".moltis")
        done = run_moltis(*words, home=home)
    assert done.returncode == moltis.Refused.exit_code
    assert "did not prove that it knows your operator key" in done.stderr
    assert "connect" in impostor.heard
    assert "mk_" not in impostor.heard
    assert key[3:] not in impostor.heard
    assert moltis.secret_hash(key) not in impostor.heard
    assert "secret" not in impostor.heard


@pytest.mark.parametrize("way", ["page", "rpc"])
def test_a_key_of_the_first_edition_is_proved_once_it_was_used(plain, way):
    made = plain.call("keys.create", name="old", scopes=["operator.read"])
    with contextlib.closing(sqlite3.connect(plain.directory / "moltis.db")) as db:
        where = "WHERE name = 'old'"
        db.execute(f"UPDATE operator_keys SET handle = NULL, verifier = NULL {where}")
        db.commit()
    with pytest.raises(moltis.Refused, match="refused the operator key"):
        moltis.OperatorClient(plain.url, made["key"])
    if way == "page":
        post(plain, "/api/sign-in", {"key": made["key"]})
    else:
        bearer = {"Authorization": f"Bearer {made['key']}"}
        post(plain, "/api/rpc", {"method": "node.list"}, **bearer)
    with moltis.OperatorClient(plain.url, made["key"]) as client:
        assert client.call("node.list", {})


def test_the_owner_s_key_of_the_first_edition_is_proved_from_the_start(tmp_path):
    """The key itself is in gateway.json, so its verifier can be made."""
    with InProcessGateway(tmp_path / "old") as gateway:
        key = gateway.api_key
    with contextlib.closing(sqlite3.connect(tmp_path / "old" / "moltis.db")) as db:
        db.execute("UPDATE operator_keys SET handle = NULL, verifier = NULL")
        db.commit()
    with InProcessGateway(tmp_path / "old") as gateway:
        assert gateway.api_key == key
        assert gateway.call("node.list")


def test_a_proof_of_a_key_is_bound_to_the_certificate(gateway, monkeypatch):
    """SCRAM-SHA-256-PLUS: a proof made for another certificate opens nothing."""
    monkeypatch.setattr(moltis, "tls_server_end_point", lambda _certificate: b"other")
    with pytest.raises(moltis.Refused, match="another TLS certificate"):
        gateway.operator()


def test_a_wrong_proof_of_a_key_is_recorded_as_one(plain):
    with pytest.raises(moltis.Refused):
        moltis.OperatorClient(plain.url, moltis.new_secret("mk_"))
    newest = plain.call("audit.list", offset=0, limit=1)[0]
    assert newest["event"] == "key.refused"
    assert newest["address"] == "127.0.0.1"


class Browser:
    """A page's WebSocket, signed in with a cookie."""

    def __init__(self, gateway):
        reply = post(gateway, "/api/sign-in", {"key": gateway.api_key})
        self.cookie = reply.headers["Set-Cookie"].partition(";")[0]
        self.secret = json.loads(reply.body)["pageSecret"]
        self.peer = RawPeer(gateway.websocket_url, headers=[("Cookie", self.cookie)])
        params = moltis.ConnectParams(
            role="operator", client_id="page", page_secret=self.secret
        ).to_json()
        assert self.peer.request("connect", params)["ok"]

    def sign_out(self, gateway):
        headers = {"Cookie": self.cookie, "X-Moltis-Page": self.secret}
        post(gateway, "/api/sign-out", {}, **headers)

    def close(self):
        self.peer.close()


@pytest.fixture
def browser(plain):
    browser = Browser(plain)
    yield browser
    browser.close()


def test_signing_out_ends_the_websocket_too(plain, browser):
    browser.sign_out(plain)
    assert browser.peer.close_code() == 1008


def test_a_sign_in_can_be_ended_from_elsewhere(plain, browser):
    (login,) = plain.call("logins.list")
    assert login["keyName"] == "owner"
    assert login["address"] == "127.0.0.1"
    plain.call("logins.revoke", loginId=login["loginId"])
    assert browser.peer.close_code() == 1008
    assert plain.call("logins.list") == []


def test_a_revoked_key_ends_its_connections_and_opens_nothing_more(plain):
    made = plain.call("keys.create", name="ci", scopes=["operator.write"])
    with moltis.OperatorClient(plain.url, made["key"]) as client:
        assert client.call("node.list", {})
        with pytest.raises(moltis.Refused, match=r"operator\.admin"):
            client.call("keys.list", {})
        plain.call("keys.revoke", keyId=made["keyId"])
        with pytest.raises(moltis.Unreachable):
            client.call("node.list", {})
    with pytest.raises(moltis.Refused):
        moltis.OperatorClient(plain.url, made["key"])


def test_what_is_revoked_while_it_connects_does_not_get_in(plain, monkeypatch):
    """Between the look at the key and the entry among those to hang up on."""
    made = plain.call("keys.create", name="ci", scopes=["operator.read"])
    admit = moltis.OperatorAccess.operator_by_handle

    def admit_late(operators, *arguments):
        caller = admit(operators, *arguments)
        operators.revoke_key(caller.id)
        return caller

    monkeypatch.setattr(moltis.OperatorAccess, "operator_by_handle", admit_late)
    with pytest.raises(moltis.Refused):
        moltis.OperatorClient(plain.url, made["key"])


def test_the_key_of_this_machine_is_not_revoked_by_mistake(plain):
    (key,) = plain.call("keys.list")
    with pytest.raises(moltis.UserError, match=r"gateway\.json"):
        plain.call("keys.revoke", keyId=key["keyId"])


def test_keys_are_made_listed_and_revoked_at_the_command_line(home):
    home.mkdir(exist_ok=True)
    with Program("gateway", "--port", "0", home=home) as gateway:
        gateway.wait_for_output("Ctrl+C stops it.")
        options = ("--name", "ci", "--scope", "operator.read")
        made = run_moltis("key", "create", *options, home=home)
        assert made.returncode == 0
        key = made.stdout.strip()
        assert re.fullmatch(r"mk_[\w-]{43}", key)
        assert run_moltis("node", "list", home=home, MOLTIS_API_KEY=key).returncode == 0
        refused = run_moltis(
            *("node", "rename", "x", "y"), home=home, MOLTIS_API_KEY=key
        )
        assert refused.returncode == moltis.EXIT_REFUSED
        assert run_moltis("key", "revoke", "ci", home=home).returncode == 0
        assert "revoked" in run_moltis("key", "list", home=home).stdout
        gone = run_moltis("node", "list", home=home, MOLTIS_API_KEY=key)
        assert gone.returncode == moltis.EXIT_REFUSED
        audit = run_moltis("audit", "--wide", home=home).stdout
        assert re.search(
            r"owner +key\.created .*ci.* +[0-9a-f]{8} +127\.0\.0\.1", audit
        )
        events = json.loads(run_moltis("audit", "--json", home=home).stdout)
        assert [e["event"] for e in events][:3] == [
            *("key.refused", "key.revoked", "key.created")
        ]
        assert key not in json.dumps(events)


# -- the audit -------------------------------------------------------------------------


def test_the_audit_holds_who_came_and_what_was_changed(plain, browser):
    with pytest.raises(OSError, match="401"):
        post(plain, "/api/sign-in", {"key": "mk_wrong"})
    made = plain.call("device.token.create", displayName="Pi")
    moltis.fetch(f"{plain.url}/join/{made['joinCode']}", moltis.TlsTrust())
    plain.call("device.token.rotate", deviceId=made["deviceId"])
    plain.call("device.token.revoke", deviceId=made["deviceId"])
    refusal_of(
        node_settings(plain, plain.websocket_url, made["deviceToken"]), plain.environ
    )
    plain.call(
        "node.invoke",
        nodeId="local",
        command="system.run",
        args={"command": "exit 3"},
    )
    browser.sign_out(plain)
    entries = plain.call("audit.list")
    assert [(e["event"], e["caller"]) for e in reversed(entries)] == [
        ("login.created", "owner"),
        ("login.refused", ""),
        ("token.created", "owner"),
        ("token.joined", "Pi"),
        ("token.rotated", "owner"),
        ("token.revoked", "owner"),
        ("token.refused", ""),
        ("command", "owner"),
        ("login.ended", "owner"),
    ]
    assert {e["address"] for e in entries if e["event"] != "command"} == {"127.0.0.1"}
    command = entries[1]
    assert (command["subject"], command["node"]) == ("exit 3", "Local")
    assert (command["state"], command["exitCode"]) == ("done", 3)


def test_a_refusal_that_repeats_itself_does_not_fill_the_audit(plain):
    for _ in range(3):
        with pytest.raises(OSError, match="401"):
            post(plain, "/api/sign-in", {"key": "mk_wrong"})
    assert [e["event"] for e in plain.call("audit.list")] == ["login.refused"]


def test_strangers_push_nothing_out_of_the_audit(tmp_path, monkeypatch):
    """Who comes from many addresses could else wipe out what an operator did."""
    monkeypatch.setattr(moltis, "MAX_CALLER_EVENTS", 20)
    store = moltis.Store(tmp_path / "moltis.db")
    access = moltis.Access(store)
    access.operators.create_key("thief", [moltis.Scope.ADMIN])
    for number in range(100):
        access.record_refused_proof("node", "unknown", f"2001:db8::{number:x}")
    events = [entry.event for entry in store.audit.page()]
    assert events.count("key.created") == 1
    assert events.count("token.refused") <= 20
    for number in range(100):
        access.devices.create_device(f"far {number}")
    subjects = [entry.subject for entry in store.audit.page()]
    assert "far 99" in subjects
    assert "far 60" not in subjects
    store.close()


def test_the_audit_says_who_renamed_and_who_allowed_everything(plain, tmp_path):
    """FAULTS D12, issue 14 point 9"""
    key = plain.call("keys.create", name="ann", scopes=["operator.write"])
    with plain.node("far"), moltis.OperatorClient(
        plain.url, key["key"], plain.trust
    ) as ann:
        ann.call("node.rename", {"nodeId": "far", "displayName": "near"})
        ann.call("sessions.patch", {"key": "main", "label": "Main"})
        ann.call("sessions.patch", {"key": "main", "approvals": "all"})
        ann.call("sessions.reset", {"key": "main"})
    entries = plain.call("audit.list")
    acts = [(e["event"], e["subject"]) for e in entries if e["caller"] == "ann"]
    assert acts[::-1] == [
        ("node.renamed", "far is now near"),
        ("chat.approvals", "main: Run everything"),
        ("chat.reset", "main"),
    ]
    for entry in entries:
        if entry["caller"] == "ann":
            assert entry["callerId"] == key["keyId"]
            assert entry["address"] == "127.0.0.1"


def test_the_audit_goes_to_a_spreadsheet_in_which_nothing_runs(plain, browser):
    import csv
    import urllib.request

    plain.call("device.token.create", displayName='=HYPERLINK("x")')
    request = urllib.request.Request(plain.url + "/api/audit.csv")
    with pytest.raises(OSError, match="401"):
        urllib.request.urlopen(request, timeout=60)
    request.add_header("Cookie", browser.cookie)
    request.add_header("X-Moltis-Page", browser.secret)
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["Content-Type"].startswith("text/csv")
        rows = list(csv.DictReader(answer.read().decode().splitlines()))
    assert [row["event"] for row in rows] == ["token.created", "login.created"]
    assert rows[0]["subject"] == '\'=HYPERLINK("x")'
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", rows[0]["at"])


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t'=1"),
        ("\r=1", "'\r'=1"),
        (" =1+1", "' =1+1"),
        ("a;=1+1", "a;'=1+1"),
        ("a; -b", "a;' -b"),
        ("a\n=1", "a\n'=1"),
        ("＝1", "'＝1"),
        ("a=1; b", "a=1; b"),
        ("x-1+2@3", "x-1+2@3"),
    ],
)
def test_no_cell_of_the_audit_begins_like_a_formula(text, cell):
    """FAULTS D22: also where a spreadsheet parts cells at semicolons or tabs."""
    import csv

    row = {"at": 1000, "event": "e", "subject": text}
    written = b"".join(moltis.audit_csv(iter([[row]]))).decode()
    (found,) = csv.DictReader(io.StringIO(written, newline=""))
    assert found["subject"] == cell
    assert written.splitlines()[1].startswith('"1970')


def test_the_audit_is_kept_as_long_as_was_said(tmp_path, monkeypatch):
    monkeypatch.setattr(moltis, "STEADY_AFTER", 0.0)  # the clock is relied upon
    with InProcessGateway(tmp_path / "brief", keep_audit=1.0) as gateway:
        audit, now = gateway.running.store.audit, moltis.now_ms()
        for at in (now - 2 * 86_400_000, now):
            audit.add(moltis.AuditEntry(at, "key.created", "me", "", "a key"))
        gateway.running.keep_house()
        assert [entry.at for entry in audit.page()] == [now]


# -- a node's own guard ----------------------------------------------------------------


def test_a_node_runs_only_what_its_owner_allows(plain, tmp_path):
    with plain.node("far", allow=("echo *",)):
        run = {"nodeId": "far", "command": "system.run"}
        refused = plain.call(
            "node.invoke", **run, args={"command": f"touch {tmp_path}/x"}
        )
        assert "does not allow" in refused["error"]
        allowed = plain.call("node.invoke", **run, args={"command": "echo yes"})
        assert allowed["stdout"] == "yes\n"
    assert not (tmp_path / "x").exists()


def test_the_guard_is_kept_in_node_json_and_never_taken_for_none(tmp_path):
    settings = moltis.NodeSettings("ws://g/ws", "mdt_t", "id", "pi", allow=("echo *",))
    settings.save(tmp_path)
    assert moltis.NodeSettings.load(tmp_path) == settings
    path = tmp_path / "node.json"
    for broken in ('"echo *"', "[1]", "{}"):
        path.write_text(
            re.sub(r'"allow": \[[^]]*\]', f'"allow": {broken}', path.read_text())
        )
        with pytest.raises(moltis.BadConfiguration, match="allow must"):
            moltis.NodeSettings.load(tmp_path)
        settings.save(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is warned")
def test_root_is_told_what_it_means_to_be_a_node(home):
    home.mkdir(exist_ok=True)
    arguments = ("--host", "ws://127.0.0.1:1/ws", "--token", "mdt_x", "--foreground")
    with Program("node", "add", *arguments, home=home) as node:
        node.wait_for_output(
            "everyone who may run commands at the gateway is root here"
        )


def test_an_offer_cannot_talk_a_node_into_sending_its_token(home, plain):
    """What came over plain http may be somebody else's."""
    home.mkdir(exist_ok=True)
    offer = {"gateway_url": plain.websocket_url, "device_token": plain.token("far")}
    with Relay(plain.running.port) as relay:
        offer["gateway_url"] = f"ws://127.0.0.1:{relay.port}/ws"
        path = home / "offer.json"
        path.write_text(json.dumps({**offer, "auth": "bearer"}))
        line = f"'{moltis.sys.executable}' '{moltis.__file__}' node add --foreground"
        with open(path) as stdin, subprocess.Popen(
            ["sh", "-c", f"exec {line}"],
            stdin=stdin,
            stderr=subprocess.DEVNULL,
            env={"HOME": str(home), "PATH": os.environ["PATH"]},
        ) as process:
            wait_for(
                lambda: any(
                    n["displayName"] != "Local" and n["connected"]
                    for n in plain.call("node.list")
                ),
                what="the node",
            )
            process.terminate()
        assert offer["device_token"].encode() not in unmasked(relay.heard)


# -- what is written -------------------------------------------------------------------


def environment_there(home):
    """Return what `env` printed on the node, once that is connected."""
    done = run_moltis("node", "exec", "far", "--", "env", home=home)
    return done.stdout if done.returncode == 0 else None


def test_no_secret_is_in_the_database_a_log_or_a_process_title(home):
    """All of what a gateway and a node write is searched for what they know."""
    home.mkdir(exist_ok=True)
    far = home / "far"
    with Program("gateway", "--port", "0", home=home) as gateway:
        gateway.wait_for_output("Ctrl+C stops it.")
        file = json.loads((home / ".moltis/gateway.json").read_text())
        made = json.loads(
            run_moltis("node", "generate-token", "--json", home=home).stdout
        )
        settings = moltis.NodeSettings(
            made["gatewayUrl"], made["deviceToken"], "id-of-far", "far"
        )
        settings.save(far)
        environ = {"home": home, "MOLTIS_DATA_DIR": str(far)}
        with Program("node", "run", **environ) as node:
            done = wait_for(lambda: environment_there(home), 30, "the node")
            titles = b"".join(
                Path(f"/proc/{program.pid}/cmdline").read_bytes()
                for program in (gateway, node)
                if os.path.exists("/proc/self/cmdline")
            )
            written = titles + done.encode() + node.output.encode()
        # The sign-in link is for the terminal, and for nothing else.
        written += gateway.stderr.encode()
    keep_them = {home / ".moltis/gateway.json", far / "node.json"}
    for path in home.rglob("*"):
        if path.is_file() and path not in keep_them:
            written += path.read_bytes()
    secrets = [file["api_key"], made["deviceToken"], made["joinCode"]]
    assert [s for s in secrets if s[4:].encode() in written] == []
    for path in keep_them:
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_token_that_is_rotated_as_a_node_comes_in_with_it_lets_nobody_in(
    plain, monkeypatch
):
    made = plain.call("device.token.create", displayName="far")
    claim = moltis.Fleet.claim

    def claim_late(self, node, device):
        plain.call("device.token.rotate", deviceId=made["deviceId"])
        claim(self, node, device)

    monkeypatch.setattr(moltis.Fleet, "claim", claim_late)
    with plain.peer() as peer:
        refused = peer.request("connect", rust_connect(made["deviceToken"]))
        assert refused["error"]["code"] == "UNAUTHORIZED"


def test_a_token_that_two_brought_at_once_is_revoked_for_both(plain, monkeypatch):
    made = plain.call("device.token.create", displayName="far")
    note_presence, both = moltis.note_presence, threading.Barrier(2)

    def note_together(*args):
        both.wait(60)
        return note_presence(*args)

    monkeypatch.setattr(moltis, "note_presence", note_together)
    with plain.peer() as one, plain.peer() as other:
        for peer, node_id in ((one, "one"), (other, "other")):
            params = rust_connect(made["deviceToken"], node_id)
            peer.send({"type": "req", "id": "1", "method": "connect", "params": params})
        for peer in (one, other):
            assert peer.receive_until(lambda m: m.get("id") == "1")["ok"]
        plain.call("device.token.revoke", deviceId=made["deviceId"])
        for peer in (one, other):
            assert peer.close_code() == moltis.CloseCode.POLICY_VIOLATION


def test_the_browser_is_opened_without_the_key_in_its_arguments(tmp_path):
    """Another user of the machine reads them in a list of processes."""
    browser = tmp_path / "browser"
    browser.write_text(f"#!/bin/sh\nprintf %s \"$1\" >'{tmp_path}/argument'\n")
    browser.chmod(0o755)
    arguments = ("gateway", "--port", "0", "--open")
    with Program(*arguments, home=tmp_path, BROWSER=f"{browser} %s") as gateway:
        told = wait_for(lambda: list(tmp_path.glob("argument")), what="the browser")
        address = wait_for(told[0].read_text, what="its argument")
        (page,) = tmp_path.glob("moltis-sign-in-*/index.html")
        assert address == page.as_uri()
        assert page.parent.stat().st_mode & 0o777 == 0o700
        text = page.read_text()
        assert gateway.end() == 0
    assert not page.parent.exists()
    assert moltis.GatewayFile.load(tmp_path / ".moltis").api_key not in text


def test_a_gateway_that_is_killed_leaves_no_file_with_the_key(plain, tmp_path):
    """FAULTS D23: what `--open` writes is a code for one sign-in, kept in memory."""
    link = plain.running.one_time_link()
    code = link.partition("#key=")[2]
    assert plain.api_key not in link
    answer = post(plain, "/api/sign-in", {"key": code})
    assert answer.status == 200
    for spent in (code, plain.running.one_time_link().replace("mo_", "mo_x")):
        with pytest.raises(OSError, match="401"):
            post(plain, "/api/sign-in", {"key": spent.partition("#key=")[2] or spent})


def test_a_key_that_is_revoked_gets_no_answer_to_what_it_asked_before(plain, tmp_path):
    """Over HTTP, where there is no lasting connection to hang up on."""
    made = plain.call("keys.create", name="thief", scopes=["operator.write"])
    line = f"echo >{tmp_path}/runs; {wait_in_shell(tmp_path / 'go')}; id"
    run = {"nodeId": "local", "command": "system.run", "args": {"command": line}}
    refused = []

    def ask():
        import urllib.error
        import urllib.request

        body = json.dumps({"method": "node.invoke", "params": run}).encode()
        request = urllib.request.Request(plain.url + "/api/rpc", body)
        request.add_header("Authorization", f"Bearer {made['key']}")
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=60)
        with caught.value as answer:
            refused.append((answer.code, answer.read()))

    asking = threading.Thread(target=ask, name="test-ask")
    asking.start()
    wait_for((tmp_path / "runs").exists, what="the command")
    plain.call("keys.revoke", keyId=made["keyId"])
    (tmp_path / "go").touch()
    asking.join()
    assert refused[0][0] == 401
    assert b"uid=" not in refused[0][1]


@pytest.mark.parametrize("method", ["job.start", "chat.send"])
def test_what_a_key_asks_for_while_it_is_revoked_ends_with_it(
    plain, tmp_path, monkeypatch, method
):
    """FAULTS, a sibling of D10: the call was admitted, and not recorded yet."""
    made = plain.call("keys.create", name=f"{method} key", scopes=["operator.write"])
    line = f"echo >>{tmp_path}/runs; {wait_in_shell(tmp_path / 'go')}"
    jobs, chats = plain.running.jobs, plain.running._chats
    acted = threading.Event()

    def after_the_key(act):
        def late(*args, **options):
            monkeypatch.undo()
            plain.call("keys.revoke", keyId=made["keyId"])
            try:
                return act(*args, **options)
            finally:
                acted.set()

        return late

    with moltis.OperatorClient(plain.url, made["key"], plain.trust) as client:
        if method == "job.start":
            monkeypatch.setattr(jobs, "start", after_the_key(jobs.start))
            params = {"jobs": [{"node": "local"}], "work": "run", "keep": True}
            params["spec"] = {"command": line}
        else:
            monkeypatch.setattr(chats, "send", after_the_key(chats.send))
            params = {"text": f"!{line}"}
        with contextlib.suppress(moltis.MoltisError):  # it was hung up on
            client.call(method, params)

    assert acted.wait(30)
    wait_for(lambda: not jobs.open(caller_id=made["keyId"]), what="its commands to end")
    wait_for(
        lambda: (
            not {m["state"] for m in plain.call("chat.history")} & {"queued", "running"}
        ),
        what="its turn to end",
    )
    for job in plain.call("job.list", limit=10):
        assert line not in job["command"] or job["state"] == "cancelled"


def test_a_key_that_is_revoked_as_it_is_checked_begins_nothing(plain, monkeypatch):
    made = plain.call("keys.create", name="checked", scopes=["operator.write"])
    operators = plain.running._access.operators
    admit = operators.admit_operator

    def revoke_after(*args):
        caller = admit(*args)
        monkeypatch.undo()
        plain.call("keys.revoke", keyId=made["keyId"])
        return caller

    monkeypatch.setattr(operators, "admit_operator", revoke_after)
    with pytest.raises(OSError, match="401"):
        bearer = {"Authorization": f"Bearer {made['key']}"}
        post(plain, "/api/rpc", {"method": "sessions.create"}, **bearer)


def test_a_look_at_a_join_link_does_not_use_it_up(plain):
    """RFC 9110 §9.3.2: `curl -I`, and what previews links, ask with HEAD."""
    import urllib.request

    made = plain.call("device.token.create", displayName="far")
    link = f"{plain.url}/join/{made['joinCode']}"
    look = urllib.request.Request(link, method="HEAD")
    with urllib.request.urlopen(look, timeout=60) as answer:
        assert answer.status == 200
    with urllib.request.urlopen(link, timeout=60) as answer:
        assert json.load(answer)["display_name"] == "far"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.skipif(not moltis.PEER_CLOSED, reason="the system does not say it")
def test_a_wait_ends_when_its_client_says_over_tls_that_it_leaves(gateway, version):
    """RFC 8446 §6.1: its close_notify looks like data."""
    jobs = gateway.running.jobs
    job, spec = moltis.new_id(), {"command": "sleep 120"}
    asked = [{"id": job, "node": "local"}]
    gateway.call("job.start", jobs=asked, work="run", spec=spec, keep=True)
    params = {"id": job, "wait": 300}
    body = json.dumps({"method": "job.wait", "params": params}).encode()
    head = (
        "POST /api/rpc HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Authorization: Bearer {gateway.api_key}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = version
    port = int(gateway.url.rpartition(":")[2])
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port), 20)) as sock:
        sock.sendall(head.encode() + body)
        wait_for(lambda: jobs._waits, what="job.wait to wait")
        sock.setblocking(False)
        with contextlib.suppress(ssl.SSLWantReadError):
            sock.unwrap()  # sends close_notify
    wait_for(lambda: not jobs._waits, what="the end of job.wait")
    gateway.call("job.cancel", id=job)
