"""The node's side of the wire, against gateways whose frames are written by hand."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import queue
import socket
import sqlite3
import struct
import threading
import uuid

import pytest
from peers import InProcessGateway, InProcessNode
from proxy import FaultyProxy
from support import free_port, process_exists, wait_for

import moltis

TOKEN = "mdt_" + "t" * 43
MAX_FRAME = 524_288  # bytes; what a Moltis gateway takes


class MoltisGateway:
    """A gateway of the original Moltis, its frames made and read by hand.

    It drops frames beyond 524,288 bytes, never pings, knows `connect`,
    `node.invoke.result` and `node.event` only, and has never heard of our extensions.
    """

    def __init__(self, refusal=None):
        self.refusal = refusal
        self.requests = queue.SimpleQueue()  # after connect
        self.connects = queue.SimpleQueue()
        self.frames = []  # opcode and length of all that came
        self.dropped = 0
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.port = self._sock.getsockname()[1]
        self.url = f"ws://127.0.0.1:{self.port}/ws"
        self._connections = []
        self._thread = threading.Thread(target=self._accept, name="test-moltis")
        self._thread.start()

    def _accept(self):
        while True:
            try:
                connection, _ = self._sock.accept()
            except OSError:
                return
            if self._sock.fileno() < 0:
                return
            self._connections.append(connection)
            with contextlib.suppress(OSError):
                self._serve(connection)
            connection.close()

    def _serve(self, connection):
        file = connection.makefile("rb")
        key = b""
        for line in iter(file.readline, b"\r\n"):
            if not line:
                return
            name, _, value = line.partition(b":")
            if name.lower() == b"sec-websocket-key":
                key = value.strip()
        digest = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        connection.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Accept: "
            + base64.b64encode(digest)
            + b"\r\n\r\n"
        )
        while True:
            message = self._read_frame(file)
            if message is None:
                return
            if message:
                self._answer(json.loads(message))

    def _read_frame(self, file):
        head = file.read(2)
        if len(head) < 2:
            return None
        opcode, length = head[0] & 0xF, head[1] & 0x7F
        assert head[1] & 0x80, "a client masks"
        assert not head[0] & 0x70, "no extension was granted"
        if length == 126:
            length = struct.unpack("!H", file.read(2))[0]
        elif length == 127:
            length = struct.unpack("!Q", file.read(8))[0]
        mask = file.read(4)
        data = bytes(b ^ mask[i % 4] for i, b in enumerate(file.read(length)))
        self.frames.append((opcode, length))
        if opcode == 8:
            return None
        if length > MAX_FRAME:
            self.dropped += 1
            return b""
        return data if opcode == 1 else b""

    def _answer(self, envelope):
        assert envelope["type"] == "req", envelope
        answer = {"type": "res", "id": envelope["id"], "ok": True, "payload": {}}
        if envelope["method"] == "connect":
            if self.refusal:
                answer = {**answer, "ok": False, "error": self.refusal}
                del answer["payload"]
            else:
                answer["payload"] = {
                    "type": "hello-ok",
                    "protocol": 4,
                    "server": {"version": "0.10.18", "host": "h", "connId": "c"},
                    "features": {"methods": ["node.list"], "events": ["presence"]},
                    "snapshot": {},
                    "policy": {"maxPayload": MAX_FRAME},
                }
        elif envelope["method"] not in ("node.invoke.result", "node.event"):
            error = {"code": "UNKNOWN_METHOD", "message": envelope["method"]}
            answer = {"type": "res", "id": envelope["id"], "ok": False, "error": error}
        self._send(answer)
        if envelope["method"] == "connect":
            self.connects.put(envelope["params"])
        else:
            self.requests.put(envelope)

    def _send(self, value):
        data = json.dumps(value).encode()
        head = bytes([0x81])
        if len(data) < 126:
            head += bytes([len(data)])
        else:
            head += bytes([126]) + struct.pack("!H", len(data))
        self._connections[-1].sendall(head + data)

    def invoke(self, command, args, invoke_id=None):
        """Return the result of a request to the node."""
        invoke_id = invoke_id or str(uuid.uuid4())
        payload = {"invokeId": invoke_id, "command": command, "args": args}
        event = {"type": "event", "event": "node.invoke.request", "payload": payload}
        self._send(event)
        return self.result(invoke_id)

    def result(self, invoke_id):
        while True:
            request = self.requests.get(timeout=20)
            params = request["params"]
            if request["method"] == "node.invoke.result":
                assert params["invokeId"] == invoke_id
                return params["result"]

    def drop(self):
        connection = self._connections[-1]
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def close(self):
        # Only a connection, not shutdown(), ends accept() on every system.
        address = self._sock.getsockname()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            socket.create_connection(address, 1).close()
        self._sock.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def node_for(url, tmp_path, **settings):
    settings = {
        "gateway_url": url,
        "device_token": TOKEN,
        "node_id": "node-1",
        "display_name": "Far",
        "auth": "bearer",
        **settings,
    }
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    return InProcessNode(moltis.NodeSettings(**settings), environ)


@pytest.fixture
def moltis_gateway():
    with MoltisGateway() as gateway:
        yield gateway


@pytest.fixture
def node(moltis_gateway, tmp_path):
    """A node of ours at a gateway of the original Moltis."""
    with node_for(moltis_gateway.url, tmp_path) as node:
        node.connect = moltis_gateway.connects.get(timeout=10)
        yield node


# -- at a gateway of the original Moltis -----------------------------------------


def test_connect_is_what_a_moltis_gateway_reads(node):
    params = node.connect
    assert params["protocol"] == {"min": 4, "max": 4}
    assert params["role"] == "node"
    assert params["auth"] == {"deviceToken": TOKEN}
    assert params["client"] == {
        "id": "node-1",
        "displayName": "Far",
        "version": moltis.__version__,
        "platform": moltis.platform_name(),
        "mode": "headless",
    }
    commands = params["extensions"]["moltis"]["commands"]
    assert {"system.run", "system.which", "system.providers"} <= set(commands)


def test_a_command_s_output_comes_in_one_piece(node, moltis_gateway):
    result = moltis_gateway.invoke(
        "system.run", {"command": "echo out; echo err >&2; exit 3"}
    )
    assert result["stdout"] == "out\n"
    assert result["stderr"] == "err\n"
    assert result["exitCode"] == 3


def test_death_by_signal_is_minus_one_and_the_signal(node, moltis_gateway):
    result = moltis_gateway.invoke("system.run", {"command": "kill -15 $$"})
    assert (result["exitCode"], result["signal"]) == (-1, 15)


def test_a_timeout_in_ms_ends_the_command_and_keeps_its_output(node, moltis_gateway):
    result = moltis_gateway.invoke(
        "system.run", {"command": "echo so far; sleep 1000", "timeout": 300}
    )
    assert result["stdout"] == "so far\n"
    assert result["timedOut"] is True


@pytest.mark.parametrize("cwd", ["", "  "])
def test_an_empty_cwd_is_the_node_s_working_directory(
    node, moltis_gateway, tmp_path, cwd
):
    result = moltis_gateway.invoke("system.run", {"command": "pwd", "cwd": cwd})
    assert result["exitCode"] == 0
    assert result["stdout"].startswith("/")


def test_only_a_terminal_s_variables_are_taken(node, moltis_gateway):
    env = {"LC_ALL": "C", "LD_PRELOAD": "/evil.so", "PATH": "/evil", "TERM": "dumb"}
    command = "echo $LC_ALL,$LD_PRELOAD,$PATH,$TERM"
    result = moltis_gateway.invoke("system.run", {"command": command, "env": env})
    assert result["stdout"] == "C,,/usr/bin:/bin,dumb\n"


def test_which_and_providers_are_answered(node, moltis_gateway):
    found = moltis_gateway.invoke("system.which", {"binary": "sh"})
    assert found["found"] is True
    assert found["path"].endswith("/sh")
    missing = moltis_gateway.invoke("system.which", {"binary": "no-such-program"})
    assert missing == {"found": False, "path": None}
    assert isinstance(moltis_gateway.invoke("system.providers", {})["providers"], list)


@pytest.mark.parametrize(
    ("command", "args", "words"),
    [
        ("system.run", {}, "command is missing"),
        ("system.run", {"command": " "}, "command is empty"),
        ("system.run", {"command": "x", "timeout": 0}, "timeout"),
        ("system.run", {"command": "x", "cwd": "/no/such"}, "/no/such"),
        ("system.which", {"binary": "../sh"}, "plain name"),
        ("system.explode", {}, "unknown command 'system.explode'"),
    ],
)
def test_what_cannot_be_done_is_a_result_with_an_error(
    node, moltis_gateway, command, args, words
):
    result = moltis_gateway.invoke(command, args)
    assert set(result) == {"error"}
    assert words in result["error"]


def test_no_frame_exceeds_what_a_moltis_gateway_takes(node, moltis_gateway):
    """Control characters take six bytes each as JSON."""
    command = "head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2"
    result = moltis_gateway.invoke("system.run", {"command": command})
    assert result["exitCode"] == 0
    assert "cut" in result["stdout"]
    assert result["stdoutBytes"] == 3_000_000
    assert moltis_gateway.dropped == 0
    assert max(length for _, length in moltis_gateway.frames) > 100_000


def test_nothing_but_what_it_knows_is_sent_to_a_moltis_gateway(node, moltis_gateway):
    """No binary message, no event, no method of ours."""
    moltis_gateway.invoke("system.run", {"command": "echo x", "stream": True})
    opcodes = {opcode for opcode, _ in moltis_gateway.frames}
    assert opcodes <= {0x1, 0x9, 0xA}


def test_telemetry_comes_at_once(node, moltis_gateway):
    request = moltis_gateway.requests.get(timeout=10)
    assert request["method"] == "node.event"
    assert request["params"]["event"] == "node.telemetry"
    payload = request["params"]["payload"]
    assert payload["nodeId"] == "node-1"
    assert payload["mem"]["total"] > 0
    assert payload["disk"]["total"] > 0
    assert isinstance(payload["services"], list)
    assert isinstance(payload["runtimes"], list)


def test_commands_run_side_by_side_and_hold_nothing_up(node, moltis_gateway, tmp_path):
    """Telemetry, `which` and a second command are answered while one runs."""
    gate = tmp_path / "gate"
    line = f"while [ ! -e {gate} ]; do sleep 0.05; done; echo done"
    slow = str(uuid.uuid4())
    payload = {"invokeId": slow, "command": "system.run", "args": {"command": line}}
    moltis_gateway._send(
        {"type": "event", "event": "node.invoke.request", "payload": payload}
    )
    assert moltis_gateway.invoke("system.which", {"binary": "sh"})["found"]
    quick = moltis_gateway.invoke("system.run", {"command": "echo quick"})
    assert quick["stdout"] == "quick\n"
    gate.touch()
    assert moltis_gateway.result(slow)["stdout"] == "done\n"


def test_a_repeated_request_does_not_run_again(node, moltis_gateway, tmp_path):
    invoke_id = str(uuid.uuid4())
    command = {"command": f"echo once >> {tmp_path}/runs"}
    moltis_gateway.invoke("system.run", command, invoke_id)
    again = moltis_gateway.invoke("system.run", command, invoke_id)
    assert "run already" in again.get("error", "")
    assert (tmp_path / "runs").read_text() == "once\n"


def test_messages_that_make_no_sense_are_skipped(node, moltis_gateway):
    for value in (
        [],
        {"type": "event", "event": "node.invoke.request"},
        {"type": "event", "event": "node.invoke.request", "payload": {"invokeId": 7}},
        {"type": "event", "event": "presence", "payload": {"x": 1}, "seq": 4},
        {"type": "res", "id": "nobody's", "ok": True, "payload": {}},
        {"type": "req", "id": "1", "method": "x"},
    ):
        moltis_gateway._send(value)
    assert moltis_gateway.invoke("system.which", {"binary": "sh"})["found"]


def test_it_comes_back_after_the_connection_breaks(node, moltis_gateway):
    moltis_gateway.drop()
    assert moltis_gateway.connects.get(timeout=20)["client"]["id"] == "node-1"
    assert moltis_gateway.invoke("system.which", {"binary": "sh"})["found"]
    assert node.states[:3] == [True, False, True]


def test_a_gateway_that_cannot_resume_is_not_told_old_results(
    node, moltis_gateway, tmp_path
):
    """It forgot what it asked for when the connection broke."""
    gate = tmp_path / "gate"
    line = f"while [ ! -e {gate} ]; do sleep 0.05; done; touch {tmp_path}/ended"
    payload = {"invokeId": "x1", "command": "system.run", "args": {"command": line}}
    event = {"type": "event", "event": "node.invoke.request", "payload": payload}
    moltis_gateway._send(event)
    assert moltis_gateway.invoke("system.which", {"binary": "sh"})["found"]
    moltis_gateway.drop()
    # It may be back before we have looked.
    wait_for(lambda: False in node.states, what="the node to notice")
    gate.touch()
    wait_for((tmp_path / "ended").exists, what="the command to end all the same")
    moltis_gateway.connects.get(timeout=20)
    assert moltis_gateway.invoke("system.which", {"binary": "sh"})["found"]


def test_the_node_s_timeout_is_a_maximum(moltis_gateway, tmp_path):
    with node_for(moltis_gateway.url, tmp_path, timeout=0.3):
        moltis_gateway.connects.get(timeout=10)
        for args in ({"timeout": 900_000}, {}):
            args = {"command": "sleep 1000", **args}
            assert moltis_gateway.invoke("system.run", args)["timedOut"] is True


def test_the_working_directory_of_the_settings_is_used(moltis_gateway, tmp_path):
    with node_for(moltis_gateway.url, tmp_path, working_dir=str(tmp_path)):
        moltis_gateway.connects.get(timeout=10)
        result = moltis_gateway.invoke("system.run", {"command": "pwd", "cwd": ""})
        assert result["stdout"].strip() == str(tmp_path.resolve())


def test_a_node_that_wants_proof_names_the_way_to_a_moltis_gateway():
    with MoltisGateway() as gateway:
        said = []
        settings = moltis.NodeSettings(gateway.url, TOKEN, "n", "n")
        node = moltis.RunningNode(
            settings, {}, lambda _, error: said.append(str(error))
        )
        wait_for(lambda: said, what="a reason")
        node.close()
    assert "--auth bearer" in said[0]


def test_closing_ends_running_commands_and_reports_them(moltis_gateway, tmp_path):
    node = node_for(moltis_gateway.url, tmp_path)
    moltis_gateway.connects.get(timeout=10)
    args = {"command": f"echo $$ > {tmp_path}/pid; sleep 1000"}
    payload = {"invokeId": "last", "command": "system.run", "args": args}
    moltis_gateway._send(
        {"type": "event", "event": "node.invoke.request", "payload": payload}
    )
    path = tmp_path / "pid"
    wait_for(lambda: path.exists() and path.read_text().strip(), what="the command")
    node.close()
    assert moltis_gateway.result("last")["cancelled"] is True
    assert not process_exists(int(path.read_text()))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("UNAUTHORIZED", "authentication failed"),
        ("NOT_PAIRED", "pairing required"),
        ("PROTOCOL_ERROR", "protocol mismatch: server=5, client=4-4"),
    ],
)
def test_a_refusal_says_why_and_the_node_keeps_trying(tmp_path, code, message):
    said = []
    with MoltisGateway({"code": code, "message": message}) as gateway:
        settings = moltis.NodeSettings(
            gateway.url, TOKEN, "node-1", "Far", auth="bearer"
        )
        node = moltis.RunningNode(
            settings, {"PATH": "/bin"}, lambda connected, error: said.append(str(error))
        )
        for _ in range(2):
            gateway.connects.get(timeout=20)
        node.close()
    assert said == [f"{gateway.url} refused this node: {message}"]


# -- at a gateway of ours --------------------------------------------------------


@pytest.fixture
def gateway(tmp_path):
    with InProcessGateway(tmp_path / "gateway") as running:
        yield running


def test_the_token_never_crosses_the_wire(gateway):
    token = gateway.token("quiet")
    sent, send = [], moltis.WebSocket.send

    def record(self, message):
        sent.append(message if isinstance(message, str) else "")
        send(self, message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moltis.WebSocket, "send", record)
        with gateway.node("quiet", token):
            pass
    assert any("auth.scram" in message for message in sent)
    assert not any(token in message or token[4:] in message for message in sent)


def test_a_gateway_that_does_not_know_the_token_is_not_believed(tmp_path):
    """It says hello without having proved itself: the node obeys nothing."""
    ran = tmp_path / "ran"

    def serve(server):
        connection, _ = server.accept()
        with connection:
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(4096)
            key = head.split(b"Sec-WebSocket-Key: ")[1].split(b"\r\n")[0]
            guid = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
            accept = base64.b64encode(hashlib.sha1(key + guid).digest())
            connection.sendall(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                b"Connection: Upgrade\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n"
            )
            protocol = moltis.WebSocketProtocol(client=False)
            hello = {"type": "hello-ok", "protocol": 4, "features": {"methods": []}}
            while True:
                message = protocol.receive(connection.recv(65536))
                if message is None:
                    continue
                request = json.loads(message)
                payload = hello
                if request["method"] == "auth.scram":
                    nonce = request["params"]["clientFirst"].split("r=")[1]
                    first = f"r={nonce}impostor,s=c2FsdHNhbHQ=,i=4096"
                    payload = {"serverFirst": first}
                answer = {"type": "res", "id": request["id"], "ok": True}
                protocol.send(json.dumps({**answer, "payload": payload}))
                args = {"command": f"touch {ran}"}
                run = {"invokeId": "i", "command": "system.run", "args": args}
                event = {"type": "event", "event": "node.invoke.request"}
                protocol.send(json.dumps({**event, "payload": run}))
                connection.sendall(protocol.outgoing())
                if request["method"] == "connect":
                    while connection.recv(4096):
                        pass
                    return

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,), name="test-impostor")
        thread.start()
        said = []
        settings = moltis.NodeSettings(
            f"ws://127.0.0.1:{server.getsockname()[1]}/ws", TOKEN, "n", "n"
        )
        node = moltis.RunningNode(
            settings,
            {"PATH": "/bin"},
            lambda connected, error: said.append((connected, error)),
            give_up_when_refused=True,
        )
        wait_for(lambda: node.refused, what="the node to refuse")
        node.close()
        thread.join()
    assert "impostor" in str(node.refused)
    assert said == []
    assert not ran.exists()


def test_a_wrong_token_ends_a_node_that_is_to_give_up(gateway):
    settings = moltis.NodeSettings(gateway.websocket_url, TOKEN, "n", "n")
    node = moltis.RunningNode(settings, {}, lambda *_: None, give_up_when_refused=True)
    wait_for(lambda: node.refused, what="the refusal")
    assert "authentication failed" in str(node.refused)
    node.close()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ws://no-such-host.invalid/ws", "cannot be found"),
        ("ws://127.0.0.1:{port}/ws", "refused the connection"),
        ("wss://127.0.0.1:{plain}/ws", "did not agree on TLS"),
        ("ws://127.0.0.1:{plain}/elsewhere", "404"),
    ],
)
def test_it_says_in_one_line_why_it_cannot_connect(gateway, url, words):
    plain = gateway.url.rpartition(":")[2]
    said = []
    settings = moltis.NodeSettings(
        url.format(port=free_port(), plain=plain), TOKEN, "n", "n"
    )
    node = moltis.RunningNode(settings, {}, lambda _, error: said.append(str(error)))
    wait_for(lambda: said, what="a reason")
    node.close()
    assert words in said[0]
    assert "\n" not in said[0]


def test_a_fault_inside_a_message_s_handler_does_not_end_the_node(gateway, monkeypatch):
    """Whatever it is: a node that ended would be out of reach for good."""
    with gateway.node("tough") as node:
        broken = []

        def fail(*_):
            broken.append(1)
            monkeypatch.undo()
            raise RuntimeError("out of threads")

        monkeypatch.setattr(moltis.Machine, "invoke", fail)
        with gateway.operator() as client:
            call = client.start(
                "node.invoke",
                {
                    "nodeId": "tough",
                    "command": "system.which",
                    "args": {"binary": "sh"},
                },
            )
            wait_for(lambda: broken, what="the fault")
            # The request had not been carried out: it is sent again.
            assert call.result(20)["found"] is True
        assert node.states[-1] is True


def test_telemetry_of_ours_names_runtimes_and_providers(gateway):
    with gateway.node("rich"):
        wait_for(
            lambda: gateway.call("node.describe", nodeId="rich")["telemetry"],
            what="telemetry",
        )
        entry = gateway.call("node.describe", nodeId="rich")
        assert isinstance(entry["providers"], list)
        wait_for(
            lambda: (
                "python3"
                in gateway.call("node.describe", nodeId="rich")["telemetry"]["runtimes"]
            ),
            what="the runtimes",
        )


# -- connections that are stuck --------------------------------------------------


class Mute(MoltisGateway):
    """A gateway that says nothing after the handshake."""

    def _answer(self, envelope):
        self.connects.put(envelope)


def close_aside(node):
    """Close a node; return once that is done, or fail."""
    closing = threading.Thread(target=node.close, name="test-close")
    closing.start()
    closing.join(30)
    assert not closing.is_alive()


def test_closing_does_not_wait_for_a_handshake_that_is_stuck(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}/ws"
        node = node_for(url, tmp_path)
        peer, _ = silent.accept()
        with peer:
            assert peer.recv(4) == b"GET "
            close_aside(node)
            assert node.running._thread.is_alive()  # it was stuck until now
    node.running._thread.join(10)


def test_closing_does_not_wait_for_a_sign_in_that_is_stuck(tmp_path):
    with Mute() as gateway:
        node = node_for(gateway.url, tmp_path)
        assert gateway.connects.get(timeout=10)["method"] == "connect"
        close_aside(node)
        assert node.running._thread.is_alive()
    node.running._thread.join(10)


def start_chatty(gateway, node, go):
    """Start jobs that fill their windows once `go` is there; return their ids."""
    command = f"until [ -e {go} ]; do sleep 0.02; done; head -c {CHATTY} /dev/zero"
    command = f"{command}; head -c {CHATTY} /dev/zero >&2; sleep 0.1"
    args = {"command": command}
    asked = {"nodeId": "far", "command": "system.run", "args": args}
    jobs = [
        gateway.call("node.invoke", **asked, background=True)["invokeId"]
        for _ in range(moltis.MAX_RUNNING)
    ]
    machine = node.running._agent._machine
    wait_for(lambda: len(machine.inflight()) == len(jobs), what="all jobs to start")
    return jobs


CHATTY = 1_000_000  # bytes a stream: within the window, and together beyond any buffer


@pytest.fixture
def behind(gateway):
    """A node behind a proxy, with the proxy."""
    with FaultyProxy(gateway.running.port) as proxy:
        settings = moltis.NodeSettings(
            gateway_url=f"ws://127.0.0.1:{proxy.port}/ws",
            device_token=gateway.token("far"),
            node_id="far",
            display_name="far",
        )

        def start():
            node = InProcessNode(settings, gateway.environ)
            wait_for(lambda: gateway.is_connected("far"), what="the node")
            return node

        yield start, proxy


def test_closing_does_not_wait_for_a_gateway_that_reads_nothing(
    gateway, behind, tmp_path
):
    start, proxy = behind
    node = start()
    start_chatty(gateway, node, tmp_path / "go")
    _, ws = node.running._agent._serving
    proxy.freeze()
    (tmp_path / "go").touch()
    wait_for(lambda: ws.backlog > CHATTY, what="an outbox that is stuck")
    close_aside(node)
    assert ws.closed


def test_an_outbox_that_overflows_costs_the_connection_and_no_output(
    gateway, behind, tmp_path, monkeypatch, caplog
):
    start, proxy = behind
    with monkeypatch.context() as first:
        first.setattr(moltis, "MAX_NODE_OUTBOX", 256 * 1024)
        node = start()
    jobs = start_chatty(gateway, node, tmp_path / "go")
    proxy.freeze()  # what was sent so far stays on the way for good
    (tmp_path / "go").touch()
    for job in jobs:
        ended = gateway.call("command.wait", id=job, wait=60)
        assert (ended["state"], ended["exitCode"]) == ("done", 0)
        assert (ended["stdoutBytes"], ended["stderrBytes"]) == (CHATTY, CHATTY)
    assert node.states == [True, False, True]
    assert "(1013" in caplog.text  # it was not the gateway that hung up
    node.close()


# -- while the gateway is away ---------------------------------------------------


def test_a_problem_is_logged_once_and_again_after_it_was_solved(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(moltis.Backoff.__init__, "__defaults__", (0.02, 0.02))
    refusal = {"code": "UNAVAILABLE", "message": "the gateway starts"}

    def said():
        return [r.message for r in caplog.records if refusal["message"] in r.message]

    with MoltisGateway(refusal) as gateway, node_for(gateway.url, tmp_path) as node:
        for _ in range(4):
            gateway.connects.get(timeout=10)
        assert len(said()) == 1
        assert node.states == [False]
        gateway.refusal = None
        wait_for(lambda: node.states[-1], what="the node to connect")
        gateway.refusal = refusal
        gateway.drop()
        wait_for(lambda: len(said()) == 2, what="the second warning")
        assert node.states[-1] is False


def test_a_result_that_the_gateway_does_not_know_is_not_kept(tmp_path):
    """Its database was lost, say, or the command is too old for it."""
    port = free_port()
    go, data = tmp_path / "go", tmp_path / "gateway"
    with InProcessGateway(data, port=port) as first:
        node = first.node("far")
        command = f"until [ -e {go} ]; do sleep 0.02; done; echo done"
        args = {"command": command}
        asked = {"nodeId": "far", "command": "system.run", "args": args}
        known, unknown = (
            first.call("node.invoke", **asked, background=True)["invokeId"]
            for _ in range(2)
        )
        machine = node.running._agent._machine
        wait_for(lambda: len(machine.inflight()) == 2, what="both to be on the node")
    wait_for(lambda: node.states[-1] is False, what="the node to notice")
    go.touch()
    wait_for(lambda: all(item.done for item in machine.inflight()), what="the ends")
    assert {item.invoke_id for item in machine.inflight()} == {known, unknown}
    with contextlib.closing(sqlite3.connect(data / "moltis.db")) as db, db:
        db.execute("DELETE FROM commands WHERE invoke_id = ?", (unknown,))
    with InProcessGateway(data, port=port) as second:
        wait_for(lambda: not machine.inflight(), what="both to be settled")
        (row,) = second.call("command.list")
        assert (row["invokeId"], row["state"]) == (known, "done")
        node.close()


def come_back(gateways, gateway, node, restart):
    """Cut the node off, or start its gateway anew; return the one it is back at."""
    if restart:
        gateways.close()
        gateway = InProcessGateway(gateway.directory, port=gateway.running.port)
        gateways.enter_context(gateway)
    else:
        node.running._agent._serving[1].abort()
    wait_for(lambda: len(node.states) == 3, what="the node to come back")
    return gateway


@pytest.mark.parametrize("restart", [False, True])
def test_more_than_it_can_name_survives_its_connection(tmp_path, monkeypatch, restart):
    """And the gateway as well: what one `connect` has no room for is in line."""
    monkeypatch.setattr(moltis, "MAX_INFLIGHT", moltis.MAX_RUNNING)
    go = tmp_path / "go"
    command = f"until [ -e {go} ]; do sleep 0.02; done; echo once >> {tmp_path}/runs"
    asked = {"nodeId": "far", "command": "system.run", "args": {"command": command}}
    count = moltis.MAX_RUNNING + 4
    with contextlib.ExitStack() as gateways:
        gateway = gateways.enter_context(InProcessGateway(tmp_path / "gateway"))
        node = gateway.node("far")
        for _ in range(count):
            gateway.call("node.invoke", **asked, background=True)
        gateway = come_back(gateways, gateway, node, restart)
        go.touch()
        for row in gateway.call("command.list"):
            ended = gateway.call("command.wait", id=row["invokeId"], wait=60)
            assert (ended["state"], ended["exitCode"]) == ("done", 0)
        assert (tmp_path / "runs").read_text() == "once\n" * count
        node.close()


@pytest.mark.parametrize("restart", [False, True])
def test_what_is_in_line_is_said_to_be_when_the_connection_is_back(tmp_path, restart):
    def in_line(gateway):
        return [row.get("place") for row in gateway.call("command.list")].count(1)

    with contextlib.ExitStack() as gateways:
        gateway = gateways.enter_context(InProcessGateway(tmp_path / "gateway"))
        node = gateway.node("far")
        asked = {"nodeId": "far", "command": "system.run", "background": True}
        for _ in range(moltis.MAX_RUNNING + 1):
            gateway.call("node.invoke", **asked, args={"command": "sleep 100"})
        wait_for(lambda: in_line(gateway) == 1, what="the place in line")
        gateway = come_back(gateways, gateway, node, restart)
        wait_for(lambda: in_line(gateway) == 1, what="the place in line, again")
        node.close()
