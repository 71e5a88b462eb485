"""The node's side of the wire, against gateways whose frames are written by hand."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import operator
import os
import queue
import signal
import socket
import sqlite3
import struct
import threading
import time
import uuid

import pytest
from peers import InProcessGateway, InProcessNode
from proxy import FaultyProxy
from support import free_port, process_exists, wait_for, wait_in_shell, with_patience

import moltis

TOKEN = "mdt_" + "t" * 43
GATE = wait_in_shell("gate")
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
        self.forgets = 0  # results that it refuses
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
        mask, data = file.read(4), file.read(length)
        if len(data) < length:
            return None  # the connection ended within it
        key = (mask * (length // 4 + 1))[:length]
        numbers = (int.from_bytes(piece, "big") for piece in (data, key))
        data = operator.xor(*numbers).to_bytes(length, "big")
        self.frames.append((opcode, length))
        if opcode == 8:
            return None
        if length > MAX_FRAME:
            self.dropped += 1
            return b""
        if opcode == 2:
            self._take_log(data)
        return data if opcode == 1 else b""

    def _take_log(self, data):
        raise AssertionError("a Moltis gateway gets no binary message")

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
        elif envelope["method"] == "node.invoke.result" and self.forgets:
            # It registers an invoke after sending it.
            self.forgets -= 1
            error = {"code": "INVALID_REQUEST", "message": "no pending invoke"}
            answer = {"type": "res", "id": envelope["id"], "ok": False, "error": error}
        self._send(answer)
        if envelope["method"] == "connect":
            self.connects.put(envelope["params"])
        else:
            self.requests.put(envelope)

    def _send(self, value):
        data = json.dumps(value).encode()
        self._send_frame(0x81, data)

    def _send_frame(self, first, data):
        head = bytes([first])
        if len(data) < 126:
            head += bytes([len(data)])
        elif len(data) < 65536:
            head += bytes([126]) + struct.pack("!H", len(data))
        else:
            head += bytes([127]) + struct.pack("!Q", len(data))
        self._connections[-1].sendall(head + data)

    def event(self, name, **payload):
        self._send({"type": "event", "event": name, "payload": payload})

    def ask(self, command, args, invoke_id=None):
        """Send a request to the node; return its id."""
        invoke_id = invoke_id or str(uuid.uuid4())
        self.event(
            "node.invoke.request", invokeId=invoke_id, command=command, args=args
        )
        return invoke_id

    def invoke(self, command, args, invoke_id=None):
        """Return the result of a request to the node."""
        return self.result(self.ask(command, args, invoke_id))

    def result(self, invoke_id):
        while True:
            request = self.requests.get(timeout=60)
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
        node.connect = moltis_gateway.connects.get(timeout=60)
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
    assert "system.run" in params["extensions"]["moltis"]["caps"]


def test_a_command_s_output_comes_in_one_piece(node, moltis_gateway):
    result = moltis_gateway.invoke(
        "system.run", {"command": "echo out; echo err >&2; exit 3"}
    )
    assert result["stdout"] == "out\n"
    assert result["stderr"] == "err\n"
    assert result["exitCode"] == 3


def test_death_by_signal_is_minus_one_and_the_signal(node, moltis_gateway):
    result = moltis_gateway.invoke("system.run", {"command": "kill -15 $$"})
    assert (result["exitCode"], result["signal"]) == (-1, "SIGTERM")


def test_a_timeout_in_ms_ends_the_command_and_keeps_its_output(node, moltis_gateway):
    def attempt(limit):
        run = {"command": "echo so far; sleep 120", "timeout": limit}
        result = moltis_gateway.invoke("system.run", run)
        assert result["stdout"] == "so far\n"
        return result

    result = with_patience(attempt, 2000, 30_000)
    assert (result["exitCode"], result["timedOut"]) == (-1, True)
    # The output is all that such a gateway passes on.
    assert "timed out" in result["stderr"]


def test_the_verdict_arrives_while_the_gateway_waits_for_it(
    node, moltis_gateway, monkeypatch, tmp_path
):
    """It waits for max(timeout, 5) s; a command that ignores SIGTERM takes longer."""
    monkeypatch.setattr(moltis, "MOLTIS_PATIENCE", 4.0)
    monkeypatch.setattr(moltis, "KILL_AFTER", 60.0)
    command = f"echo $$ > {tmp_path}/pid; trap '' TERM; echo so far; sleep 77; sleep 77"

    def attempt(limit):
        run = {"command": command, "timeout": limit}
        result = moltis_gateway.invoke("system.run", run)
        assert (result["stdout"], result["timedOut"]) == ("so far\n", True)

    with_patience(attempt, 3000, 30_000)
    pid = int((tmp_path / "pid").read_text())
    assert process_exists(pid)
    os.killpg(pid, signal.SIGKILL)
    wait_for(lambda: not process_exists(pid), what="the end of the command")


def test_time_in_line_counts_for_a_moltis_gateway(
    node, moltis_gateway, monkeypatch, tmp_path
):
    monkeypatch.setattr(moltis, "MOLTIS_PATIENCE", 1.0)
    row = moltis.WORKS["run"].replace(side_by_side=1)
    monkeypatch.setitem(moltis.WORKS, "run", row)
    slow = moltis_gateway.ask("system.run", {"command": "sleep 77"})
    args = {"command": f"touch {tmp_path}/ran", "timeout": 400}
    assert moltis_gateway.invoke("system.run", args)["timedOut"] is True
    node.close()
    assert moltis_gateway.result(slow)["cancelled"] is True
    assert not (tmp_path / "ran").exists()


def test_a_result_that_came_too_early_is_sent_once_more(node, moltis_gateway):
    moltis_gateway.forgets = 1
    invoke_id = moltis_gateway.ask("system.run", {"command": "echo early"})
    began = time.monotonic()
    for _ in range(2):
        assert moltis_gateway.result(invoke_id)["stdout"] == "early\n"
    assert time.monotonic() - began >= moltis.RESEND_PAUSE / 2


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
    locale, preload, path, term = result["stdout"].rstrip("\n").split(",")
    assert (locale, preload, term) == ("C", "", "dumb")
    assert path.startswith("/usr/bin:/bin")
    assert "evil" not in path


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
        ("system.explode", {}, "unknown work 'system.explode'"),
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
    assert moltis_gateway.dropped == 0
    assert max(length for _, length in moltis_gateway.frames) > 100_000


def test_nothing_but_what_it_knows_is_sent_to_a_moltis_gateway(node, moltis_gateway):
    """No binary message, no event, no method of ours."""
    moltis_gateway.invoke("system.run", {"command": "echo x", "stream": True})
    opcodes = {opcode for opcode, _ in moltis_gateway.frames}
    assert opcodes <= {0x1, 0x9, 0xA}


def test_telemetry_comes_at_once(node, moltis_gateway):
    request = moltis_gateway.requests.get(timeout=60)
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
    line = f"{wait_in_shell(gate)}; echo done"
    slow = moltis_gateway.ask("system.run", {"command": line})
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
    assert "it ran before" in again.get("error", "")
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
    assert moltis_gateway.connects.get(timeout=60)["client"]["id"] == "node-1"
    assert moltis_gateway.invoke("system.which", {"binary": "sh"})["found"]
    assert node.states[:3] == [True, False, True]


def test_a_gateway_that_cannot_resume_is_not_told_old_results(
    node, moltis_gateway, tmp_path
):
    """It forgot what it asked for when the connection broke."""
    gate = tmp_path / "gate"
    line = f"{wait_in_shell(gate)}; touch {tmp_path}/ended"
    moltis_gateway.ask("system.run", {"command": line}, "x1")
    assert moltis_gateway.invoke("system.which", {"binary": "sh"})["found"]
    moltis_gateway.drop()
    # It may be back before we have looked.
    wait_for(lambda: False in node.states, what="the node to notice")
    gate.touch()
    wait_for((tmp_path / "ended").exists, what="the command to end all the same")
    moltis_gateway.connects.get(timeout=60)
    assert moltis_gateway.invoke("system.which", {"binary": "sh"})["found"]


def test_the_node_s_timeout_is_a_maximum(moltis_gateway, tmp_path):
    with node_for(moltis_gateway.url, tmp_path, timeout=0.3):
        moltis_gateway.connects.get(timeout=60)
        for args in ({"timeout": 900_000}, {}):
            args = {"command": "sleep 120", **args}
            assert moltis_gateway.invoke("system.run", args)["timedOut"] is True


def test_the_working_directory_of_the_settings_is_used(moltis_gateway, tmp_path):
    with node_for(moltis_gateway.url, tmp_path, working_dir=str(tmp_path)):
        moltis_gateway.connects.get(timeout=60)
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
    moltis_gateway.connects.get(timeout=60)
    args = {"command": f"echo $$ > {tmp_path}/pid; sleep 120"}
    moltis_gateway.ask("system.run", args, "last")
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
            gateway.connects.get(timeout=60)
        node.close()
    assert said == [f"{gateway.url} refused this node: {message}"]


# -- the extension `jobs`, at a gateway that is scripted -----------------------------


class JobsGateway(MoltisGateway):
    """A gateway of ours whose every step the test takes itself."""

    def __init__(self):
        super().__init__()
        self.logs = {}
        self.events = []  # name, payload
        self.resumes = None  # what its hello says; None: all from where we are
        self.deaf = threading.Event()  # while it is set, logs are not read
        self.messages = 0

    def _answer(self, envelope):
        if envelope["type"] == "event":
            self.events.append((envelope["event"], envelope["payload"]))
            return
        if envelope["method"] != "connect":
            super()._answer(envelope)
            return
        ours = envelope["params"]["extensions"]["moltis"]
        offsets = self.resumes
        if offsets is None:
            offsets = {
                i: max(at, len(self.logs.get(i, b""))) for i, at in ours["jobs"].items()
            }
        hello = {"type": "hello-ok", "protocol": 4, "features": {"methods": []}}
        hello["extensions"] = {"moltis": {"jobs": offsets}}
        self._send({"type": "res", "id": envelope["id"], "ok": True, "payload": hello})
        self.connects.put(envelope["params"])

    def _take_log(self, message):
        kind, job_id, offset, data = moltis.decode_job_data(message)
        assert kind == moltis.LOG_DATA
        assert moltis.whole_frames(data) == len(data)
        have = self.logs.setdefault(job_id, b"")
        assert offset <= len(have), "a gap"
        self.messages += 1  # before the test sees the ending
        self.logs[job_id] = have + data[len(have) - offset :]

    def start(self, command, job_id=None, **spec):
        job_id = job_id or moltis.new_id()
        spec = {"command": command, **spec}
        self.event("job.start", id=job_id, work="run", spec=spec)
        return job_id

    def input(self, job_id, offset, data):
        message = moltis.encode_job_data(moltis.INPUT_DATA, job_id, offset, data)
        self._send_frame(0x82, message)

    def acknowledge(self, job_id, offset=None):
        offset = len(self.logs[job_id]) if offset is None else offset
        self.event("job.ack", id=job_id, offset=offset)

    def stream(self, job_id, kind=moltis.STDOUT):
        frames = moltis.log_frames(self.logs.get(job_id, b""))
        return b"".join(data for number, data in frames if number == kind)

    def ending(self, job_id):
        data = self.stream(job_id, moltis.ENDING)
        return moltis.decode_ending(data) if data else None

    def wait(self, job_id):
        return wait_for(lambda: self.ending(job_id), what="the ending")

    def of(self, name):
        return [payload for event, payload in self.events if event == name]


@pytest.fixture
def jobs_gateway():
    with JobsGateway() as gateway:
        yield gateway


@pytest.fixture
def jobs_node(jobs_gateway, tmp_path):
    with node_for(jobs_gateway.url, tmp_path, working_dir=str(tmp_path)) as node:
        node.connect = jobs_gateway.connects.get(timeout=60)
        yield node


def machine_of(node):
    return node.running._agent._machine


def come_back(gateway, node):
    """Cut the connection; return the params with which the node is back."""
    known = len(node.states)
    gateway.drop()
    params = gateway.connects.get(timeout=60)
    # It may give several reasons why it is away.
    wait_for(lambda: True in node.states[known:], what="the node to serve")
    return params


def test_a_node_names_its_life_and_the_logs_that_it_holds(
    jobs_gateway, jobs_node, tmp_path
):
    ours = jobs_node.connect["extensions"]["moltis"]
    assert moltis.CAP_JOBS in ours["caps"]
    assert (ours["instance"], ours["jobs"]) == (machine_of(jobs_node).instance, {})
    job_id = jobs_gateway.start(f"echo a; {GATE}; echo b")
    wait_for(lambda: jobs_gateway.stream(job_id) == b"a\n", what="the first frame")
    (tmp_path / "gate").touch()
    jobs_gateway.wait(job_id)
    jobs_gateway.acknowledge(job_id, 7)
    wait_for(lambda: machine_of(jobs_node).held() == {job_id: 7}, what="the ack")
    again = come_back(jobs_gateway, jobs_node)["extensions"]["moltis"]
    assert (again["instance"], again["jobs"]) == (ours["instance"], {job_id: 7})


def test_a_job_s_log_comes_with_its_ending_last(jobs_gateway, jobs_node):
    job_id = jobs_gateway.start("echo out; echo err >&2; exit 3")
    ending = jobs_gateway.wait(job_id)
    assert jobs_gateway.stream(job_id) == b"out\n"
    assert jobs_gateway.stream(job_id, moltis.STDERR) == b"err\n"
    assert (ending.state, ending.exit_code) == ("done", 3)
    jobs_gateway.acknowledge(job_id)
    wait_for(lambda: not machine_of(jobs_node).held(), what="the log to be dropped")


def test_an_ending_is_sent_once(jobs_gateway, jobs_node):
    job_id = jobs_gateway.start("true")
    jobs_gateway.wait(job_id)
    assert jobs_gateway.messages == 1
    assert [opcode for opcode, _ in jobs_gateway.frames].count(2) == 1


def test_input_and_cancel_reach_the_job(jobs_gateway, jobs_node):
    job_id = jobs_gateway.start("cat; sleep 77", stdin=True)
    jobs_gateway.input(job_id, 0, b"hello")
    jobs_gateway.input(job_id, 5, b"")
    wait_for(lambda: jobs_gateway.stream(job_id) == b"hello", what="the input")
    wait_for(lambda: {"id": job_id, "offset": 5} in jobs_gateway.of("job.input"))
    jobs_gateway.event("job.cancel", id=job_id)
    assert jobs_gateway.wait(job_id).state == "cancelled"


def test_places_in_line_are_reported(jobs_gateway, jobs_node, monkeypatch, tmp_path):
    row = moltis.WORKS["run"].replace(side_by_side=1)
    monkeypatch.setitem(moltis.WORKS, "run", row)
    ids = [jobs_gateway.start(GATE) for _ in range(2)]
    waits, runs = ({"id": ids[1], "place": place} for place in (1, 0))
    wait_for(lambda: jobs_gateway.of("job.place") == [waits], what="the place")
    (tmp_path / "gate").touch()
    jobs_gateway.wait(ids[1])
    assert jobs_gateway.of("job.place") == [waits, runs]


def test_a_job_goes_on_from_where_its_gateway_is(jobs_gateway, jobs_node, tmp_path):
    line = f"echo one; {GATE}; echo two; exit 4"
    job_id = jobs_gateway.start(line)
    wait_for(lambda: jobs_gateway.stream(job_id) == b"one\n", what="the first line")
    assert come_back(jobs_gateway, jobs_node)["extensions"]["moltis"]["jobs"] == {
        job_id: 0
    }
    (tmp_path / "gate").touch()
    assert jobs_gateway.wait(job_id).exit_code == 4
    assert jobs_gateway.stream(job_id) == b"one\ntwo\n"


def test_what_got_lost_on_the_way_is_sent_again(jobs_gateway, jobs_node):
    job_id = jobs_gateway.start("echo one; exit 5")
    jobs_gateway.wait(job_id)
    del jobs_gateway.logs[job_id]
    come_back(jobs_gateway, jobs_node)
    assert jobs_gateway.wait(job_id).exit_code == 5


def test_what_the_hello_does_not_name_is_ended(jobs_gateway, jobs_node, tmp_path):
    job_id = jobs_gateway.start("echo $$ > pid; exec sleep 77")
    path = tmp_path / "pid"
    wait_for(lambda: path.exists() and path.read_text().strip(), what="its start")
    jobs_gateway.resumes = {}
    come_back(jobs_gateway, jobs_node)
    wait_for(lambda: not process_exists(int(path.read_text())), what="its end")
    wait_for(lambda: not machine_of(jobs_node).held(), what="the log to be dropped")
    assert job_id not in jobs_gateway.logs


def test_input_goes_on_from_where_it_was_consumed(jobs_gateway, jobs_node):
    job_id = jobs_gateway.start("cat", stdin=True)
    jobs_gateway.input(job_id, 0, b"abc")
    wait_for(lambda: jobs_gateway.stream(job_id) == b"abc", what="the input")
    come_back(jobs_gateway, jobs_node)
    again = {"id": job_id, "offset": 3, "resume": True}
    wait_for(lambda: again in jobs_gateway.of("job.input"), what="the offset")
    jobs_gateway.input(job_id, 1, b"bcd")  # what has arrived before is skipped
    jobs_gateway.input(job_id, 4, b"")
    assert jobs_gateway.wait(job_id).exit_code == 0
    assert jobs_gateway.stream(job_id) == b"abcd"


def test_output_waits_for_its_acknowledgement(jobs_gateway, jobs_node):
    job_id = jobs_gateway.start("head -c 5000000 /dev/zero; echo end >&2")
    log = wait_for(lambda: machine_of(jobs_node)._jobs.get(job_id), what="the job").log
    while jobs_gateway.ending(job_id) is None:
        wait_for(lambda: not log.room or log.ended, what="a full window")
        assert log.held < moltis.LOG_WINDOW + 1000  # the ending needs no room
        wait_for(
            lambda: len(jobs_gateway.logs.get(job_id, b"")) == log.end,
            what="its arrival",
        )
        arrived = len(jobs_gateway.logs[job_id])
        jobs_gateway.acknowledge(job_id, arrived)
        # Not for room: it may be taken again before we look.
        wait_for(lambda at=arrived: log.begin >= at, what="the acknowledgement")
    assert jobs_gateway.ending(job_id).stdout_bytes == 5_000_000
    assert len(jobs_gateway.stream(job_id)) == 5_000_000


def test_messages_that_make_no_sense_cost_nothing(jobs_gateway, jobs_node):
    jobs_gateway.event("job.start", id="x1", work="run", spec={"command": "true"})
    jobs_gateway.event("job.start", id=moltis.new_id(), work="run", spec=7)
    jobs_gateway.event("job.ack", id=moltis.new_id(), offset=-1)
    jobs_gateway.event("job.ack", id=moltis.new_id(), offset=4)
    jobs_gateway.event("job.resize", id=moltis.new_id(), rows=24, cols=80)
    jobs_gateway.event("job.fly", id=moltis.new_id())
    jobs_gateway._send_frame(0x82, b"short")
    jobs_gateway._send_frame(0x82, bytes([9]) + bytes(24))
    jobs_gateway.input(moltis.new_id(), 7, b"a gap, of nothing")
    assert jobs_gateway.wait(jobs_gateway.start("exit 6")).exit_code == 6
    assert jobs_node.states == [True]


def refuse_as_unauthorized(gateway):
    def refuse(envelope):
        error = {"code": "UNAUTHORIZED", "message": "authentication failed"}
        gateway._send(
            {"type": "res", "id": envelope["id"], "ok": False, "error": error}
        )

    gateway._answer = refuse


def test_a_refusal_of_a_gateway_that_did_not_prove_itself_ends_no_job(
    jobs_gateway, jobs_node, tmp_path
):
    """Any process may listen on the port of a gateway that is down."""
    job_id = jobs_gateway.start(f"{GATE}; exit 7")
    wait_for(lambda: machine_of(jobs_node).held(), what="the job")
    error = {"code": "UNAUTHORIZED", "message": "authentication failed"}
    refused = threading.Event()

    def refuse(envelope):
        answer = {"type": "res", "id": envelope["id"], "ok": False, "error": error}
        jobs_gateway._send(answer)
        refused.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs_gateway, "_answer", refuse)
        jobs_gateway.drop()
        assert refused.wait(30)
    wait_for(lambda: jobs_node.states[-1], what="the node to be back")
    (tmp_path / "gate").touch()
    assert jobs_gateway.wait(job_id).exit_code == 7


def test_closing_reports_how_the_jobs_ended(jobs_gateway, jobs_node, monkeypatch):
    monkeypatch.setattr(moltis, "KILL_AFTER", 60.0)
    job_id = jobs_gateway.start("sleep 77")
    wait_for(lambda: machine_of(jobs_node).held(), what="the job")
    closing = threading.Thread(target=jobs_node.close)
    closing.start()
    ending = jobs_gateway.wait(job_id)
    assert (ending.state, ending.reason) == ("cancelled", "its node stopped")
    jobs_gateway.acknowledge(job_id)
    closing.join(30)
    assert not closing.is_alive()  # it waited for that alone


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


def revoke(gateway, name):
    (device,) = [
        d for d in gateway.call("device.pair.list") if d["displayName"] == name
    ]
    gateway.call("device.token.revoke", deviceId=device["deviceId"])


def start_sleeper(gateway, directory):
    """Start a job; return the pid of its shell."""
    start_jobs(gateway, f"echo $$ > {directory}/pid; exec sleep 77", 1)
    path = directory / "pid"
    wait_for(lambda: path.exists() and path.read_text().strip(), what="its start")
    return int(path.read_text())


def test_a_node_whose_token_is_revoked_ends_its_jobs(gateway, tmp_path, monkeypatch):
    monkeypatch.setattr(moltis.NodePeer, "cancel", lambda *_: None)
    with gateway.node("far"):
        pid = start_sleeper(gateway, tmp_path)
        revoke(gateway, "far")
        wait_for(lambda: not process_exists(pid), what="its end")


def test_a_node_that_comes_back_over_tls_with_a_revoked_token_ends_its_jobs(
    tmp_path, monkeypatch
):
    """The TLS key is the one that proved itself before."""
    monkeypatch.setattr(moltis.NodePeer, "cancel", lambda *_: None)
    monkeypatch.setattr(moltis.NodePeer, "hang_up", lambda peer, _: peer._ws.abort())
    files = moltis.ensure_certificate(tmp_path / "tls", ("localhost", "127.0.0.1"))
    tls = moltis.ServerTls(lambda: files)
    with InProcessGateway(tmp_path / "gateway", tls=tls) as gateway, gateway.node(
        "far"
    ):
        pid = start_sleeper(gateway, tmp_path)
        revoke(gateway, "far")
        wait_for(lambda: not process_exists(pid), what="its end")


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

        monkeypatch.setattr(moltis.Machine, "start", fail)
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
            assert call.result(60)["found"] is True
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


def test_a_slow_reading_of_telemetry_delays_no_command(gateway, monkeypatch):
    """A disk that hangs, or `nvidia-smi`."""
    monkeypatch.setattr(moltis, "TELEMETRY_INTERVAL", 0.05)
    read, begun, goes_on = (
        moltis.TelemetrySource.read,
        threading.Event(),
        threading.Event(),
    )

    def read_slowly(source):
        begun.set()
        goes_on.wait(300)
        return read(source)

    with gateway.node("slow"), gateway.operator() as client:
        monkeypatch.setattr(moltis.TelemetrySource, "read", read_slowly)
        assert begun.wait(60)
        asked = {"nodeId": "slow", "command": "system.which", "args": {"binary": "sh"}}
        try:
            assert client.start("node.invoke", asked).result(60)["found"] is True
        finally:
            goes_on.set()


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
            assert not node.running._thread.is_alive()


def test_closing_does_not_wait_for_a_sign_in_that_is_stuck(tmp_path):
    with Mute() as gateway:
        node = node_for(gateway.url, tmp_path)
        assert gateway.connects.get(timeout=60)["method"] == "connect"
        close_aside(node)
        assert not node.running._thread.is_alive()


CHATTY = 1_000_000  # bytes: within the window, and together beyond any buffer


@pytest.fixture
def behind(jobs_gateway, tmp_path):
    """A node with full logs behind a proxy that stands still; with its connection."""
    with FaultyProxy(jobs_gateway.port) as proxy:
        url = f"ws://127.0.0.1:{proxy.port}/ws"
        node = node_for(url, tmp_path, working_dir=str(tmp_path))
        jobs_gateway.connects.get(timeout=60)
        go = wait_in_shell("go")
        ids = [
            jobs_gateway.start(f"{go}; head -c {CHATTY} /dev/zero; exit 3")
            for _ in range(moltis.MAX_RUNNING)
        ]
        machine = machine_of(node)
        wait_for(lambda: len(machine.held()) == len(ids), what="all jobs to start")
        _, ws = node.running._agent._serving
        proxy.freeze()
        (tmp_path / "go").touch()
        wait_for(lambda: ws.backlog >= moltis.MAX_BACKLOG, what="a full outbox")
        yield node, ws, proxy, ids
        node.close()


def test_closing_does_not_wait_for_a_gateway_that_reads_nothing(behind):
    node, ws, *_ = behind
    close_aside(node)
    assert ws.closed


def test_no_outbox_grows_with_the_number_of_logs(behind, jobs_gateway):
    """And a connection that is stuck costs no output."""
    node, ws, proxy, ids = behind
    jobs = machine_of(node)._jobs
    wait_for(
        lambda: all(not job.log.room or job.log.ended for job in jobs.values()),
        what="all logs to be full, or whole",
    )
    assert ws.backlog < moltis.MAX_BACKLOG + 2 * moltis.MAX_LOG_MESSAGE
    proxy.heal()
    jobs_gateway.connects.get(timeout=60)
    for job_id in ids:
        wait_for(lambda i=job_id: i in jobs_gateway.logs, what="some output")
        while jobs_gateway.ending(job_id) is None:
            jobs_gateway.acknowledge(
                job_id, moltis.whole_frames(jobs_gateway.logs[job_id])
            )
            time.sleep(0.02)
        ending = jobs_gateway.ending(job_id)
        assert (ending.exit_code, ending.stdout_bytes) == (3, CHATTY)
        assert len(jobs_gateway.stream(job_id)) == CHATTY


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
            gateway.connects.get(timeout=60)
        assert len(said()) == 1
        assert node.states == [False]
        gateway.refusal = None
        wait_for(lambda: node.states[-1], what="the node to connect")
        gateway.refusal = refusal
        gateway.drop()
        wait_for(lambda: len(said()) == 2, what="the second warning")
        assert node.states[-1] is False


def start_jobs(gateway, command, count):
    """Start kept jobs on the node `far`; return their ids."""
    ids = [moltis.new_id() for _ in range(count)]
    for job_id in ids:
        gateway.call(
            "job.start",
            jobs=[{"id": job_id, "node": "far"}],
            work="run",
            spec={"command": command},
            keep=True,
        )
    return ids


def test_a_log_that_the_gateway_does_not_know_is_not_kept(tmp_path):
    """Its database was lost, say."""
    port = free_port()
    go, data = tmp_path / "go", tmp_path / "gateway"
    with InProcessGateway(data, port=port) as first:
        node = first.node("far")
        command = f"{wait_in_shell(go)}; echo done"
        known, unknown = start_jobs(first, command, 2)
        machine = machine_of(node)
        wait_for(lambda: len(machine.held()) == 2, what="both to be on the node")
    wait_for(lambda: node.states[-1] is False, what="the node to notice")
    go.touch()
    jobs = list(machine._jobs.values())
    wait_for(lambda: all(job.log.ended for job in jobs), what="the ends")
    assert machine.held().keys() == {known, unknown}
    with contextlib.closing(sqlite3.connect(data / "moltis.db")) as db, db:
        db.execute("DELETE FROM jobs WHERE id = ?", (unknown,))
    with InProcessGateway(data, port=port) as second:
        wait_for(lambda: not machine.held(), what="both to be settled")
        (row,) = second.call("job.list")
        assert (row["id"], row["state"]) == (known, "done")
        node.close()


def go_and_come_back(gateways, gateway, node, restart):
    """Cut the node off, or start its gateway anew; return the one it is back at."""
    if restart:
        gateways.close()
        gateway = InProcessGateway(gateway.directory, port=gateway.running.port)
        gateways.enter_context(gateway)
    else:
        node.running._agent._serving[1].abort()
    # Between, it may give several reasons why it is away.
    wait_for(
        lambda: len(node.states) >= 3 and node.states[-1],
        what="the node to come back",
    )
    return gateway


@pytest.mark.parametrize("restart", [False, True])
def test_running_and_waiting_jobs_survive_their_connection(tmp_path, restart):
    """And the gateway as well."""
    go = tmp_path / "go"
    command = f"{wait_in_shell(go)}; echo once >> {tmp_path}/runs"
    count = moltis.MAX_RUNNING + 4

    def in_line(gateway):
        return {row.get("place") for row in gateway.call("job.list")} >= {1, 2, 3, 4}

    with contextlib.ExitStack() as gateways:
        gateway = InProcessGateway(tmp_path / "gateway", port=free_port())
        gateways.enter_context(gateway)
        node = gateway.node("far")
        ids = start_jobs(gateway, command, count)
        wait_for(lambda: in_line(gateway), what="the places in line")
        gateway = go_and_come_back(gateways, gateway, node, restart)
        wait_for(lambda: in_line(gateway), what="the places in line, again")
        go.touch()
        for job_id in ids:
            ended = gateway.call("job.wait", id=job_id, wait=60)
            assert (ended["state"], ended["exitCode"]) == ("done", 0)
        assert (tmp_path / "runs").read_text() == "once\n" * count
        node.close()
