"""The gateway's side of the wire, against peers whose frames are written by hand."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import types
import uuid

import pytest
from peers import InProcessGateway, rust_connect
from support import wait_for

import moltis


@pytest.fixture
def gateway(tmp_path):
    with InProcessGateway(tmp_path / "gateway") as running:
        yield running


@pytest.fixture
def rust(gateway):
    """A node of the original Moltis, connected."""
    with gateway.peer() as peer:
        answer = peer.request("connect", rust_connect(gateway.token("Rust box")))
        assert answer["ok"], answer
        peer.hello = answer["payload"]
        answer_providers(peer, [{"provider": "ollama", "models": ["qwen3"]}])
        yield peer


def answer_providers(peer, providers):
    """Answer what the gateway asks a node whose telemetry does not name models."""
    request = peer.receive()["payload"]
    assert request["command"] == "system.providers"
    result = {"invokeId": request["invokeId"], "result": {"providers": providers}}
    assert peer.request("node.invoke.result", result)["ok"]


def invoke_in_background(gateway, results, **params):
    def call():
        with gateway.operator() as client:
            try:
                results.append(client.call("node.invoke", params))
            except moltis.UserError as error:
                results.append(error)

    thread = threading.Thread(target=call, name="test-invoke")
    thread.start()
    return thread


def next_request(peer):
    """Return what the node is asked next, besides the models that it has."""
    event = peer.receive_until(
        lambda m: (
            isinstance(m, dict)
            and m.get("event") == "node.invoke.request"
            and m["payload"]["command"] != "system.providers"
        )
    )
    return event["payload"]


# -- connect -------------------------------------------------------------------


def test_the_answer_to_connect_is_a_hello_that_a_rust_node_reads(rust):
    hello = rust.hello
    assert hello["type"] == "hello-ok"
    assert hello["protocol"] == 4
    assert hello["server"]["version"] == moltis.__version__
    assert hello["policy"] == {
        "maxPayload": 524288,
        "maxBufferedBytes": 1572864,
        "tickIntervalMs": 30000,
    }
    assert hello["auth"]["role"] == "node"
    assert hello["auth"]["deviceToken"] == ""


def test_the_older_flat_form_of_connect_is_accepted(gateway):
    flat = {
        "minProtocol": 4,
        "maxProtocol": 4,
        "client": {"id": "old", "version": "0.9", "platform": "linux", "mode": "node"},
        "caps": ["exec"],
        "commands": ["system.run"],
        "role": "node",
        "auth": {"deviceToken": gateway.token("Old box")},
    }
    with gateway.peer() as peer:
        assert peer.request("connect", flat)["ok"]
        described = gateway.call("node.describe", nodeId="old")
        assert described["connected"]
        assert described["commands"] == ["system.run"]


@pytest.mark.parametrize(("low", "high"), [(3, 3), (5, 9)])
def test_another_protocol_version_is_named_and_refused(gateway, low, high):
    params = rust_connect(gateway.token(), protocol={"min": low, "max": high})
    with gateway.peer() as peer:
        answer = peer.request("connect", params)
        assert answer["error"]["code"] == "PROTOCOL_ERROR"
        assert (
            answer["error"]["message"]
            == f"protocol mismatch: server=4, client={low}-{high}"
        )
        assert peer.close_code() == 1008


def test_a_wrong_token_is_answered_before_the_connection_closes(gateway):
    with gateway.peer() as peer:
        answer = peer.request("connect", rust_connect("mdt_" + "x" * 43))
        assert answer == {
            "type": "res",
            "id": answer["id"],
            "ok": False,
            "error": {"code": "UNAUTHORIZED", "message": "authentication failed"},
        }
        assert peer.close_code() == 1008


def test_a_node_without_a_token_is_forbidden(gateway):
    params = rust_connect("")
    del params["auth"]["deviceToken"]
    with gateway.peer() as peer:
        assert peer.request("connect", params)["error"]["code"] == "FORBIDDEN"


def test_no_pong_precedes_the_answer_to_connect(gateway):
    """A Rust node aborts when anything but the `res` comes first."""
    token = gateway.token()
    with gateway.peer() as peer:
        peer.ping(b"early")
        connect = {"type": "req", "id": "1", "method": "connect"}
        raw = _first_frames(peer, {**connect, "params": rust_connect(token)})
        assert [opcode for opcode, _ in raw[:2]] == [0x1, 0xA]
        assert raw[1][1] == b"early"


def _first_frames(peer, connect):
    """Send `connect`; return opcode and payload of the first two frames back."""
    seen = []
    protocol = peer.ws._protocol
    receive = protocol.receive

    def record(data):
        nonlocal rest
        rest += data
        while len(rest) >= 2:
            length, start = rest[1] & 0x7F, 2
            if length == 126:
                length, start = int.from_bytes(rest[2:4], "big"), 4
            if len(rest) < start + length:
                break
            seen.append((rest[0] & 0xF, rest[start : start + length]))
            rest = rest[start + length :]
        return receive(data)

    rest = b""
    protocol.receive = record
    peer.send(connect)

    def two_came():
        with contextlib.suppress(TimeoutError):
            peer.ws.receive(0.05)  # a Pong is no message: nothing is returned for it
        return len(seen) >= 2

    wait_for(two_came, what="two frames")
    return seen


@pytest.mark.parametrize(
    ("first", "code"),
    [
        ("not json", "INVALID_REQUEST"),
        ("[1]", "INVALID_REQUEST"),
        ('{"type":"event","event":"tick"}', "PROTOCOL_ERROR"),
        ('{"type":"req","id":"1","method":"node.list"}', "INVALID_REQUEST"),
        ('{"type":"req","id":"1","method":"connect","params":7}', "INVALID_REQUEST"),
        ("[" * 100_000 + "]" * 100_000, "INVALID_REQUEST"),
        (b"binary", "PROTOCOL_ERROR"),
    ],
)
def test_a_first_message_that_is_no_connect_gets_an_error(gateway, first, code):
    with gateway.peer() as peer:
        peer.send(first)
        assert peer.receive()["error"]["code"] == code
        assert peer.close_code() == 1008


def test_an_operator_signs_in_with_an_api_key_in_snake_case(gateway):
    params = {
        "protocol": {"min": 4, "max": 4},
        "client": {"id": "x", "version": "1", "platform": "web", "mode": "operator"},
        "role": "operator",
        "auth": {"api_key": gateway.api_key},
    }
    with gateway.peer() as peer:
        answer = peer.request("connect", params)
        assert answer["payload"]["auth"]["role"] == "operator"
        assert "node.list" in answer["payload"]["features"]["methods"]


# -- roles ---------------------------------------------------------------------


def test_a_node_cannot_make_itself_an_operator(gateway):
    params = rust_connect(gateway.token(), role="operator")
    with gateway.peer() as peer:
        assert peer.request("connect", params)["payload"]["auth"]["role"] == "node"
        assert peer.request("node.list", {})["error"]["code"] == "FORBIDDEN"


def test_a_node_reports_on_itself_only(gateway, rust):
    report = {
        "event": "node.telemetry",
        "payload": {"nodeId": "another", "cpuCount": 1},
    }
    assert rust.request("node.event", report)["error"]["code"] == "FORBIDDEN"


def test_a_node_cannot_answer_for_another(gateway, rust, tmp_path):
    go = tmp_path / "go"
    with gateway.node("victim"):
        results = []
        thread = invoke_in_background(
            gateway,
            results,
            nodeId="victim",
            command="system.run",
            args={"command": f"until [ -e {go} ]; do sleep 0.05; done; echo honest"},
        )
        wait_for(lambda: _active_ids(gateway), what="the invocation")
        forged = {
            "invokeId": _active_ids(gateway)[0],
            "result": {"stdout": "forged", "stderr": "", "exitCode": 0},
        }
        assert rust.request("node.invoke.result", forged)["ok"]
        go.touch()
        thread.join()
    assert results[0]["stdout"] == "honest\n"


def _active_ids(gateway):
    return [row.id for row in gateway.running.store.jobs.open()]


# -- work ----------------------------------------------------------------------


def test_a_rust_node_runs_a_command(gateway, rust):
    results = []
    thread = invoke_in_background(
        gateway,
        results,
        nodeId="Rust box",
        command="system.run",
        args={"command": "uname", "timeout": 5000, "env": {"TERM": "x", "PATH": "/"}},
    )
    request = next_request(rust)
    assert request["command"] == "system.run"
    assert request["args"]["command"] == "uname"
    assert request["args"]["timeout"] == 5000
    assert request["args"]["env"] == {"TERM": "x"}
    result = {"stdout": "Linux\n", "stderr": "", "exitCode": 0}
    params = {"invokeId": request["invokeId"], "result": result}
    assert rust.request("node.invoke.result", params)["ok"]
    thread.join()
    assert results[0]["stdout"] == "Linux\n"
    assert results[0]["exitCode"] == 0
    assert results[0]["node"] == "Rust box"


def test_a_rust_node_s_failure_reaches_the_caller(gateway, rust):
    results = []
    thread = invoke_in_background(
        gateway,
        results,
        nodeId="rust-1",
        command="system.run",
        args={"command": "x"},
    )
    request = next_request(rust)
    params = {"invokeId": request["invokeId"], "result": {"error": "no shell here"}}
    rust.request("node.invoke.result", params)
    thread.join()
    assert results[0]["error"] == "no shell here"


def test_pending_work_of_a_rust_node_fails_when_it_disconnects(gateway, rust):
    results = []
    thread = invoke_in_background(
        gateway, results, nodeId="rust-1", command="system.run", args={"command": "x"}
    )
    request = next_request(rust)
    rust.ws.abort()
    thread.join(10)
    assert isinstance(results[0], moltis.Unreachable)
    assert "not known" in str(results[0])
    assert gateway.call("job.read", id=request["invokeId"])["job"]["state"] == "lost"


def test_a_fast_answer_finds_its_invocation(gateway, rust):
    """The invocation is known before the request is sent."""
    results = []
    for _ in range(50):
        thread = invoke_in_background(
            gateway,
            results,
            nodeId="rust-1",
            command="system.which",
            args={"binary": "sh"},
        )
        request = next_request(rust)
        found = {"found": True, "path": "/bin/sh"}
        params = {"invokeId": request["invokeId"], "result": found}
        assert rust.request("node.invoke.result", params)["ok"]
        thread.join(10)
    assert len(results) == 50
    assert all(result["path"] == "/bin/sh" for result in results)


def test_telemetry_of_a_rust_node_is_listed(gateway, rust):
    payload = {
        "nodeId": "rust-1",
        "mem": {"total": 8_000, "available": 3_000},
        "cpuCount": 4,
        "cpuUsage": 12.5,
        "uptime": 99,
        "services": [],
        "disk": {"total": 100, "available": 40},
        "runtimes": ["python3"],
    }
    report = {"event": "node.telemetry", "payload": payload}
    assert rust.request("node.event", report)["ok"]
    telemetry = gateway.call("node.describe", nodeId="rust-1")["telemetry"]
    assert telemetry["memTotal"] == 8_000
    assert telemetry["memAvailable"] == 3_000
    assert telemetry["cpuUsage"] == 12.5
    assert telemetry["uptimeSecs"] == 99
    assert telemetry["diskTotal"] == 100
    assert telemetry["runtimes"] == ["python3"]
    assert telemetry["stale"] is False


@pytest.mark.parametrize(
    "payload",
    [
        7,
        {"mem": "much"},
        {"cpuUsage": "12"},
        {"cpuCount": 1e400},
        {"runtimes": {"a": 1}},
    ],
)
def test_telemetry_of_the_wrong_shape_is_refused_and_the_node_stays(
    gateway, rust, payload
):
    if isinstance(payload, dict):
        payload = {"nodeId": "rust-1", **payload}
    text = json.dumps(
        {
            "type": "req",
            "id": "t",
            "method": "node.event",
            "params": {"event": "node.telemetry", "payload": payload},
        }
    )
    rust.send(text)
    answer = rust.receive()
    assert answer["error"]["code"] == "INVALID_REQUEST"
    assert gateway.is_connected("rust-1")


def test_malformed_messages_of_a_node_get_an_error_and_it_stays(gateway, rust):
    for text in ("{", "[]", '{"type":"bogus"}', '{"type":"req","id":5,"method":"x"}'):
        rust.send(text)
        assert rust.receive()["error"]["code"] == "INVALID_REQUEST"
    assert gateway.is_connected("rust-1")


# -- one token, one device -----------------------------------------------------


def test_a_second_machine_with_a_token_in_use_is_refused(gateway):
    token = gateway.token("twin")
    with gateway.peer() as first, gateway.peer() as second:
        assert first.request("connect", rust_connect(token, "one"))["ok"]
        answer = second.request("connect", rust_connect(token, "two"))
        assert answer["error"]["code"] == "CONFLICT"
        assert gateway.is_connected("one")


def test_a_node_id_that_belongs_to_another_device_is_refused(gateway, rust):
    with gateway.peer() as thief:
        answer = thief.request("connect", rust_connect(gateway.token("thief")))
        assert answer["error"]["code"] == "CONFLICT"
        assert "Rust box" in answer["error"]["message"]
    assert gateway.is_connected("rust-1")


def test_the_same_node_coming_back_replaces_its_old_connection(gateway):
    token = gateway.token("again")
    with gateway.peer() as first, gateway.peer() as second:
        assert first.request("connect", rust_connect(token, "again"))["ok"]
        assert second.request("connect", rust_connect(token, "again"))["ok"]
        assert first.close_code() == 1008
        assert gateway.is_connected("again")
        results = []
        thread = invoke_in_background(
            gateway,
            results,
            nodeId="again",
            command="system.which",
            args={"binary": "x"},
        )
        request = next_request(second)
        params = {"invokeId": request["invokeId"], "result": {"found": False}}
        second.request("node.invoke.result", params)
        thread.join(10)
        assert results[0]["found"] is False


def test_revoking_drops_the_connection_and_refuses_the_next(gateway):
    with gateway.operator() as client, gateway.peer() as peer:
        made = client.call("device.token.create", {"displayName": "gone"})
        params = rust_connect(made["deviceToken"], "gone")
        assert peer.request("connect", params)["ok"]
        client.call("device.token.revoke", {"deviceId": made["deviceId"]})
        assert peer.close_code() == 1008
        with gateway.peer() as again:
            answer = again.request("connect", params)
            assert answer["error"]["code"] == "UNAUTHORIZED"


def test_a_rotated_token_replaces_the_old_one(gateway):
    with gateway.operator() as client:
        made = client.call("device.token.create", {"displayName": "turn"})
        turned = client.call("device.token.rotate", {"deviceId": made["deviceId"]})
    for token, ok in ((made["deviceToken"], False), (turned["deviceToken"], True)):
        with gateway.peer() as peer:
            assert peer.request("connect", rust_connect(token, "turn"))["ok"] is ok


# -- methods -------------------------------------------------------------------


def test_renames_outlast_what_the_node_calls_itself(gateway, tmp_path):
    token = gateway.token("first name")
    with gateway.peer() as peer:
        peer.request("connect", rust_connect(token, "renamed"))
        gateway.call("node.rename", nodeId="Rust box", displayName="attic")
    with gateway.peer() as peer:
        peer.request("connect", rust_connect(token, "renamed"))
        assert gateway.call("node.describe", nodeId="ATTIC")["nodeId"] == "renamed"


def test_no_node_is_called_like_the_gateway_s_own_machine(gateway, rust):
    with gateway.operator() as client:
        for method, params in (
            ("node.rename", {"nodeId": "rust-1", "displayName": " local "}),
            ("device.token.create", {"displayName": "Local"}),
        ):
            with pytest.raises(moltis.UsageError, match="choose another name"):
                client.call(method, params)


def test_names_renames_and_telemetry_survive_a_restart(tmp_path):
    directory = tmp_path / "gateway"
    with InProcessGateway(directory) as gateway:
        with gateway.peer() as peer:
            peer.request("connect", rust_connect(gateway.token(), "kept"))
            report = {
                "event": "node.telemetry",
                "payload": {"nodeId": "kept", "cpuCount": 3},
            }
            assert peer.request("node.event", report)["ok"]
            gateway.call("node.rename", nodeId="kept", displayName="cellar")
        wait_for(lambda: not gateway.is_connected("kept"), what="it to be offline")
        key = gateway.api_key
    with InProcessGateway(directory) as gateway:
        assert gateway.api_key == key
        node = gateway.call("node.describe", nodeId="cellar")
        assert node["connected"] is False
        assert node["lastSeenAt"] > 0
        assert node["telemetry"]["cpuCount"] == 3
        assert node["telemetry"]["stale"] is True
        with gateway.operator() as client, pytest.raises(
            moltis.Unreachable, match="cellar is offline since 20"
        ):
            client.call(
                "node.invoke",
                {"nodeId": "cellar", "command": "system.run", "args": {"command": "x"}},
            )


def test_an_ambiguous_name_lists_the_candidates(gateway):
    with contextlib.ExitStack() as stack:
        for node_id in ("a1", "a2"):
            peer = stack.enter_context(gateway.peer())
            assert peer.request("connect", rust_connect(gateway.token(), node_id))["ok"]
        client = stack.enter_context(gateway.operator())
        with pytest.raises(moltis.UsageError, match="a1, a2"):
            client.call("node.describe", {"nodeId": "rust BOX"})
        assert client.call("node.describe", {"nodeId": "a2"})["nodeId"] == "a2"


def test_an_unknown_node_is_an_error_that_lists_what_there_is(gateway):
    with gateway.operator() as client, pytest.raises(
        moltis.UserError, match="no node 'nowhere'; there is Local"
    ):
        client.call("node.describe", {"nodeId": "nowhere"})


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, "command is missing"),
        ({"command": "  "}, "command is empty"),
        ({"command": 7}, "command must be a string"),
        ({"command": "x", "timeout": -1}, "timeout must be a positive"),
        ({"command": "x", "timeout": "5"}, "timeout must be a number"),
        ({"command": "x", "env": []}, "env must be an object"),
        ({"command": "a\0b"}, "NUL"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_they_travel(
    gateway, args, words
):
    with gateway.operator() as client, pytest.raises(moltis.UsageError, match=words):
        client.call(
            "node.invoke", {"nodeId": "local", "command": "system.run", "args": args}
        )


def test_an_invocation_with_a_known_id_does_not_run_again(gateway, tmp_path):
    params = {
        "nodeId": "local",
        "command": "system.run",
        "args": {"command": f"echo once >> {tmp_path}/runs"},
        "invokeId": str(uuid.uuid4()),
    }
    with gateway.operator() as client:
        assert client.call("node.invoke", params)["exitCode"] == 0
        assert client.call("node.invoke", params)["exitCode"] == 0  # from the audit
    assert (tmp_path / "runs").read_text() == "once\n"


def test_an_unknown_method_is_named(gateway):
    with gateway.operator() as client, pytest.raises(
        moltis.UserError, match="no method 'no\\.such'"
    ):
        client.call("no.such", {})


def test_events_come_to_those_who_subscribed(gateway):
    events = []
    with gateway.operator(lambda _client, news: events.append(news)) as client:
        client.call("subscribe", {"events": ["presence"]})
        token = gateway.token()
        with gateway.peer() as peer:
            peer.request("connect", rust_connect(token, "shy"))
            wait_for(lambda: events, what="presence")
        wait_for(lambda: len(events) == 2, what="its going")
        client.call("unsubscribe", {"events": ["presence"]})
    assert [event.payload["type"] for event in events[:2]] == [
        "node.connected",
        "node.disconnected",
    ]
    assert events[0].payload["nodeId"] == "shy"
    assert events[0].payload["platform"] == "linux"


def test_ten_megabytes_of_json_close_one_connection_and_no_other(gateway, rust):
    with gateway.peer() as peer:
        with contextlib.suppress(moltis.ConnectionClosed):
            peer.ws.send('{"type":"req","x":"' + "x" * 10_000_000 + '"}')
        assert peer.close_code() in (1009, 1006)
    assert gateway.is_connected("rust-1")


def test_two_nodes_run_six_commands_side_by_side(gateway):
    """Each waits for the others: they end only if all six run at once."""
    with gateway.node("one"), gateway.node("two"), socket.socket() as meeting:
        meeting.bind(("127.0.0.1", 0))
        meeting.listen(6)
        port = meeting.getsockname()[1]
        connect = f'socket.create_connection(("127.0.0.1", {port}))'
        code = f"import socket; s = {connect}; s.recv(1)"
        results = []
        threads = [
            invoke_in_background(
                gateway,
                results,
                nodeId=name,
                command="system.run",
                args={"command": f"python3 -c '{code}'"},
            )
            for name in ("one", "two")
            for _ in range(3)
        ]
        meeting.settimeout(20)
        guests = [meeting.accept()[0] for _ in range(6)]
        for guest in guests:
            guest.close()
        for thread in threads:
            thread.join()
    assert [result["exitCode"] for result in results] == [0] * 6


def test_one_who_does_not_say_connect_is_hung_up_on(tmp_path, monkeypatch):
    monkeypatch.setattr(moltis, "CONNECT_TIMEOUT", 0.3)
    with InProcessGateway(tmp_path) as gateway, gateway.peer() as peer:
        assert peer.close_code() == 1008


def test_a_peer_that_is_gone_as_it_is_greeted_is_no_failure():
    """RFC 6455 §7.4.1: nobody may send 1006, with which its connection ended."""

    class Gone:
        aborted = False

        def close(self, code, reason, timeout):
            raise AssertionError(f"{code} {reason} {timeout}")

        def abort(self):
            self.aborted = True

    def introduce(*_):
        raise moltis.ConnectionClosed(moltis.CloseCode.ABNORMAL, "the peer is gone")

    gateway = types.SimpleNamespace(
        _lock=threading.Lock(), _connections=set(), _closed=False, _introduce=introduce
    )
    ws = Gone()
    moltis.Gateway.serve(gateway, ws, None)
    assert ws.aborted


def test_no_node_calls_itself_local(gateway):
    """The name stands for the gateway's own machine, and goes on to do so."""
    with gateway.peer() as peer:
        params = rust_connect(gateway.token("pi"))
        params["client"]["displayName"] = " Local"
        assert peer.request("connect", params)["ok"]
        nodes = gateway.call("node.list")
        assert [node["displayName"] for node in nodes] == ["Local", "pi"]
        assert gateway.call("node.describe", nodeId="Local")["nodeId"] == "local"
