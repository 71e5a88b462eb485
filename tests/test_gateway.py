"""The gateway's side of the wire, against peers whose frames are written by hand."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
import types
import uuid

import pytest
from peers import InProcessGateway, rust_connect, silent_node
from support import wait_for, wait_in_shell

import moltis


@pytest.fixture
def gateway(tmp_path):
    with InProcessGateway(tmp_path / "gateway") as running:
        yield running


def test_the_first_connection_finds_a_whole_gateway(tmp_path, monkeypatch):
    """Clients of a gateway that restarts try again until it listens."""
    scopes = []

    class Door(moltis.HttpDoor):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            file = moltis.GatewayFile.load(tmp_path / "gateway")
            with moltis.OperatorClient(file.url, file.api_key) as client:
                scopes.extend(client.scopes)

    monkeypatch.setattr(moltis, "HttpDoor", Door)
    with InProcessGateway(tmp_path / "gateway"):
        assert scopes == ["operator.admin"]


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


CREDENTIALS = [  # as asked for, and what is granted: a role or a refusal
    ("operator", {}, "FORBIDDEN"),
    ("node", {}, "FORBIDDEN"),
    ("operator", {"deviceToken": "KEY"}, "UNAUTHORIZED"),
    ("node", {"deviceToken": "KEY"}, "UNAUTHORIZED"),
    ("operator", {"api_key": "TOKEN"}, "UNAUTHORIZED"),
    ("node", {"api_key": "TOKEN"}, "UNAUTHORIZED"),
    ("operator", {"pageSecret": "KEY"}, "UNAUTHORIZED"),  # without its cookie
    ("node", {"pageSecret": "KEY"}, "FORBIDDEN"),
    ("operator", {"deviceToken": "TOKEN"}, "node"),
    ("operator", {"deviceToken": "TOKEN", "api_key": "KEY"}, "node"),
    ("node", {"api_key": "KEY"}, "operator"),
]


def test_a_role_comes_from_the_credential_and_loopback_needs_one(gateway):
    secrets = {"KEY": gateway.api_key, "TOKEN": gateway.token()}
    for role, auth, granted in CREDENTIALS:
        auth = {name: secrets[secret] for name, secret in auth.items()}
        with gateway.peer() as peer:
            params = rust_connect("", role=role, auth=auth)
            answer = peer.request("connect", params)
            if answer["ok"]:
                assert answer["payload"]["auth"]["role"] == granted
                ok = peer.request("node.list", {})["ok"]
                assert ok == (granted == "operator")
            else:
                assert answer["error"]["code"] == granted
                assert peer.close_code() == 1008


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
            args={"command": f"{wait_in_shell(go)}; echo honest"},
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
    thread.join(60)
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
        thread.join(60)
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


def report(node, payload):
    """Return the answer to a report, sent as text: JSON of Python has no 1e400."""
    params = {"event": "node.telemetry", "payload": payload}
    request = {"type": "req", "id": "t", "method": "node.event", "params": params}
    node.send(json.dumps(request).replace("Infinity", "1e400"))
    return node.receive()


def test_telemetry_that_is_no_object_is_refused_and_the_node_stays(gateway, rust):
    assert report(rust, 7)["error"]["code"] == "INVALID_REQUEST"
    assert gateway.is_connected("rust-1")


@pytest.mark.parametrize(
    "field",
    [
        {"mem": "much"},
        {"cpuUsage": "12"},
        {"cpuUsage": math.inf},
        {"disk": {"total": -1, "available": 2**70}},
        {"runtimes": {"a": 1}},
    ],
)
def test_a_field_that_makes_no_sense_is_missing_and_voids_no_other(
    gateway, rust, field
):
    assert report(rust, {"nodeId": "rust-1", "cpuCount": 4, **field})["ok"]
    (view,) = [n for n in gateway.call("node.list") if n["nodeId"] == "rust-1"]
    assert view["telemetry"]["cpuCount"] == 4
    assert not {"memTotal", "cpuUsage", "diskTotal"} & set(view["telemetry"])


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
        thread.join(60)
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


def test_a_platform_is_a_short_text_whoever_names_it(gateway):
    """FAULTS, a sibling of D13: a key for tokens names it as well."""
    named = {"displayName": "long", "platform": "\x1b]0;x\x07" + "p" * 500_000}
    with gateway.operator() as client:
        client.call("device.token.create", named)
        (pair,) = client.call("device.pair.list", {})
    assert pair["platform"].startswith("]0;xppp")
    assert len(pair["platform"]) <= 200


def test_a_rotated_token_replaces_the_old_one(gateway):
    with gateway.operator() as client:
        made = client.call("device.token.create", {"displayName": "turn"})
        turned = client.call("device.token.rotate", {"deviceId": made["deviceId"]})
    for token, ok in ((made["deviceToken"], False), (turned["deviceToken"], True)):
        with gateway.peer() as peer:
            assert peer.request("connect", rust_connect(token, "turn"))["ok"] is ok


def test_a_pairing_key_does_not_become_a_node_that_has_connected(gateway):
    """FAULTS D9"""
    with gateway.operator() as admin, gateway.peer() as peer:
        scopes = {"name": "pairs", "scopes": ["operator.pairing"]}
        key = admin.call("keys.create", scopes)["key"]
        made = admin.call("device.token.create", {"displayName": "turn"})
        device = {"deviceId": made["deviceId"]}
        with moltis.OperatorClient(gateway.url, key, gateway.trust) as pairing:
            made = pairing.call("device.token.rotate", device)  # nobody has come yet
            joined = peer.request("connect", rust_connect(made["deviceToken"], "turn"))
            assert joined["ok"]
            with pytest.raises(moltis.Refused, match="only an administrator"):
                pairing.call("device.token.rotate", device)
        assert admin.call("node.describe", {"nodeId": "turn"})["connected"]


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
            moltis.Unreachable, match="cellar has been offline since 20"
        ):
            client.call(
                "node.invoke",
                {"nodeId": "cellar", "command": "system.run", "args": {"command": "x"}},
            )


def test_an_ambiguous_name_lists_the_candidates(gateway):
    with contextlib.ExitStack() as stack:
        for node_id in ("beef-1", "beef-2"):
            peer = stack.enter_context(gateway.peer())
            assert peer.request("connect", rust_connect(gateway.token(), node_id))["ok"]
        client = stack.enter_context(gateway.operator())
        with pytest.raises(moltis.UsageError, match="beef-1, beef-2"):
            client.call("node.describe", {"nodeId": "beef"})
        first = client.call("node.describe", {"nodeId": "rust BOX"})
        assert first["nodeId"] == "beef-1"


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


def test_jobs_of_all_callers_are_announced_as_they_change(gateway, client, tmp_path):
    go = tmp_path / "go"
    events = []

    def states(job_id):
        views = [v for e in list(events) for v in e.payload["jobs"]]
        return [view["state"] for view in views if view["id"] == job_id]

    with gateway.operator(lambda _client, news: events.append(news)) as watcher:
        watcher.call("subscribe", {"events": ["job"]})
        first = client.start("local", f"{wait_in_shell(go)}", keep=True)
        wait_for(lambda: states(first) == ["running"], what="its beginning")
        go.touch()
        wait_for(lambda: states(first)[-1] == "done", what="its ending")


def test_a_job_that_waits_for_its_node_is_announced(gateway):
    seen = []
    with gateway.operator(lambda _client, news: seen.append(news)) as watcher:
        with gateway.node("shy"):
            pass
        watcher.call("subscribe", {"events": ["job"]})
        wait_for(
            lambda: not gateway.call("node.describe", nodeId="shy")["connected"],
            what="its going",
        )
        gateway.call(
            "job.start",
            jobs=[{"node": "shy"}],
            work="run",
            spec={"command": "true"},
            queue=60,
        )
        wait_for(lambda: seen, what="the event")
        (view,) = seen[0].payload["jobs"]
        assert (view["state"], view["command"]) == ("queued", "true")


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
        meeting.settimeout(60)
        guests = [meeting.accept()[0] for _ in range(6)]
        for guest in guests:
            guest.close()
        for thread in threads:
            thread.join()
    assert [result["exitCode"] for result in results] == [0] * 6


def test_one_who_does_not_say_connect_is_hung_up_on(tmp_path, monkeypatch):
    monkeypatch.setattr(moltis, "CONNECT_TIMEOUT", 5.0)
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

        def receive(self, _timeout):
            raise moltis.ConnectionClosed(moltis.CloseCode.ABNORMAL, "it is gone")

    gateway = types.SimpleNamespace(
        _lock=threading.Lock(),
        _connections=set(),
        _closed=False,
        _access=None,
        _require_scram=False,
    )
    ws = Gone()
    moltis.Gateway.serve(gateway, ws, None)
    assert ws.aborted


def test_the_gateways_own_machine_says_that_it_opens_terminals(gateway):
    [local] = gateway.call("node.list")
    assert {"jobs", "terminal", "file.resume"} <= set(local["capabilities"])


def test_no_node_calls_itself_local(gateway):
    """The name stands for the gateway's own machine, and goes on to do so."""
    with gateway.peer() as peer:
        params = rust_connect(gateway.token("pi"))
        params["client"]["displayName"] = " Local"
        assert peer.request("connect", params)["ok"]
        nodes = gateway.call("node.list")
        assert [node["displayName"] for node in nodes] == ["Local", "pi"]
        assert gateway.call("node.describe", nodeId="Local")["nodeId"] == "local"


# -- jobs, as operators ask for them -------------------------------------------


class Client:
    """An operator that keeps apart what the gateway sends about jobs."""

    def __init__(self, gateway, key=None):
        self.peer = gateway.peer()
        auth = {"api_key": key or gateway.api_key}
        answer = self.peer.request("connect", {"role": "operator", "auth": auth})
        assert answer["ok"], answer
        self.hello = answer["payload"]
        self.logs, self.starts = {}, {}  # bytes, and the first offset, by job
        self.events = []  # names and payloads
        self.order = []  # "answer", "log", and names of events, as they came

    def call(self, method, **params):
        """Return the payload, or the code of an error."""
        request_id = str(uuid.uuid4())
        request = {"type": "req", "id": request_id, "method": method, "params": params}
        self.peer.send(request)
        while True:
            answer = self.take()
            if isinstance(answer, dict) and answer.get("id") == request_id:
                self.order.append("answer")
                return answer["payload"] if answer["ok"] else answer["error"]["code"]

    def take(self, timeout=60):
        """Return the next message, once it is kept."""
        message = self.peer.receive(timeout)
        assert message is not None, "the gateway hung up"
        if isinstance(message, bytes):
            kind, job_id, offset, data = moltis.decode_job_data(message)
            assert kind == moltis.LOG_DATA
            self.starts.setdefault(job_id, offset)
            known = self.logs.get(job_id, b"")
            assert offset == self.starts[job_id] + len(known)
            self.logs[job_id] = known + data
            self.order.append("log")
        elif message["type"] == "event":
            self.events.append((message["event"], message["payload"]))
            self.order.append(message["event"])
        return message

    def take_until(self, condition):
        while not condition():
            self.take()

    def start(self, node, command, **params):
        """Start one job; return its id."""
        job_id = params.pop("id", None) or str(uuid.uuid4())
        spec = {"command": command, **params.pop("spec", {})}
        jobs = [{"id": job_id, "node": node}]
        answer = self.call("job.start", jobs=jobs, work="run", spec=spec, **params)
        assert "error" not in answer["jobs"][0], answer
        return job_id

    def ending(self, job_id):
        """Return how a followed job ended, once that is said."""

        def endings():
            states = [p for name, p in self.events if name == "job.state"]
            return [p for p in states if p["id"] == job_id and "ending" in p]

        self.take_until(endings)
        return endings()[-1]

    def output(self, job_id):
        frames = moltis.log_frames(self.logs.get(job_id, b""))
        return b"".join(data for kind, data in frames if kind in moltis.STREAMS)

    def send_input(self, job_id, offset, data):
        self.peer.send(moltis.encode_job_data(moltis.INPUT_DATA, job_id, offset, data))

    def acknowledge(self, job_id):
        end = self.starts[job_id] + len(self.logs[job_id])
        assert self.call("job.ack", id=job_id, offset=end) == {}

    def read_to(self, job_id, count):
        """Take `count` bytes of output in all, and acknowledge them as they come."""
        self.take_until(lambda: job_id in self.logs)
        while len(self.output(job_id)) < count:
            known = len(self.logs[job_id])
            self.acknowledge(job_id)
            self.take_until(lambda: len(self.logs[job_id]) > known)  # noqa: B023

    def close(self):
        self.peer.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@pytest.fixture
def client(gateway):
    with Client(gateway) as client:
        yield client


def test_the_answer_precedes_the_log_and_the_ending_follows_it(client):
    job_id = client.start("local", "echo out; echo err >&2; exit 3", hold=True)
    state = client.ending(job_id)
    assert client.order[0] == "answer"
    assert client.order[-1] == "job.state"
    assert sorted(client.output(job_id).split()) == [b"err", b"out"]
    assert state["ending"]["exitCode"] == 3
    assert state["words"] == "exit status 3"
    assert state["failed"] is True
    assert state["end"] == len(client.logs[job_id])


def test_a_holder_that_does_not_read_slows_its_command(client):
    count = 5 * 1024 * 1024
    job_id = client.start("local", f"head -c {count} /dev/zero", hold=True)
    client.take_until(lambda: len(client.output(job_id)) > 900_000)
    with contextlib.suppress(TimeoutError):
        while True:
            client.take(1)
    assert len(client.output(job_id)) < 2 * moltis.LOG_WINDOW
    client.read_to(job_id, count)
    client.acknowledge(job_id)
    assert client.ending(job_id)["state"] == "done"
    assert client.output(job_id) == bytes(count)


def test_a_watcher_slows_nobody(gateway, client):
    count = 5 * 1024 * 1024
    with Client(gateway) as other:
        job_id = other.start("local", f"head -c {count} /dev/zero", keep=True)
        answer = client.call("job.follow", id=job_id)
        assert answer["job"]["id"] == job_id
        assert client.ending(job_id)["state"] == "done"
        assert other.call("job.wait", id=job_id, wait=60)["state"] == "done"


def test_a_job_can_be_followed_from_its_tail(client):
    job_id = client.start("local", "head -c 600000 /dev/zero; echo end", keep=True)
    assert client.call("job.wait", id=job_id, wait=60)["state"] == "done"
    answer = client.call("job.follow", id=job_id, tail=200_000)
    assert answer["offset"] >= answer["job"]["end"] - 200_000
    client.ending(job_id)
    assert client.starts[job_id] == answer["offset"]
    assert client.output(job_id).endswith(b"\0end\n")


@pytest.mark.parametrize("way", ["unfollow", "follow"])
def test_a_client_that_follows_no_longer_gets_no_more(gateway, client, way):
    """Of a job that prints faster than the client reads it would have no end."""
    job_id = client.start("local", "head -c 30000000 /dev/zero; sleep 120", keep=True)
    job = gateway.running.jobs.get(job_id)
    wait_for(lambda: moltis.job_view(job)["stdoutBytes"] == 30_000_000)
    end = job.log.end
    client.call("job.follow", id=job_id)
    parameters = {"offset": end} if way == "follow" else {}
    ask(client, f"job.{way}", id=job_id, **parameters)
    # Nothing is read before: it might be all that there is.
    wait_for(lambda: [f.position for f in job.followers] == [*parameters.values()])
    client.call("node.list")
    known = client.logs.pop(job_id, b"")
    assert len(known) < end
    client.starts.pop(job_id, None)
    for _ in range(9):
        client.call("node.list")
    assert job_id not in client.logs
    client.call("job.cancel", id=job_id)


def test_a_holder_that_leaves_cancels_an_unkept_job(gateway, client):
    job_id = client.start("local", "sleep 120", hold=True)
    assert client.call("job.unfollow", id=job_id, leave=True) == {}
    view = client.call("job.wait", id=job_id, wait=60)
    assert view["state"] == "cancelled"


def test_a_kept_job_outlives_its_holder(client, tmp_path):
    command = f"{wait_in_shell(tmp_path / 'go')}; echo on"
    job_id = client.start("local", command, keep=True, hold=True)
    client.call("job.unfollow", id=job_id, leave=True)
    assert client.call("job.wait", id=job_id, wait=0.2)["state"] == "running"
    (tmp_path / "go").touch()
    assert client.call("job.wait", id=job_id, wait=60)["state"] == "done"


def test_a_holder_whose_connection_broke_goes_on_where_it_was(gateway, tmp_path):
    command = f"echo one; {wait_in_shell(tmp_path / 'go')}; echo two"
    with Client(gateway) as first:
        job_id = first.start("local", command, hold=True)
        first.take_until(lambda: first.output(job_id) == b"one\n")
        position = len(first.logs[job_id])
    (tmp_path / "go").touch()
    with Client(gateway) as second:
        answer = second.call("job.follow", id=job_id, offset=position, hold=True)
        assert answer["offset"] == position
        assert second.ending(job_id)["state"] == "done"
        assert second.output(job_id) == b"two\n"


def test_a_job_with_a_known_id_is_followed_and_not_run_again(gateway, tmp_path):
    command = f"echo once >>{tmp_path}/runs; echo said"
    job_id = str(uuid.uuid4())
    for _ in range(2):
        with Client(gateway) as client:
            client.start("local", command, id=job_id, keep=True, hold=True)
            assert client.ending(job_id)["state"] == "done"
            assert client.output(job_id) == b"said\n"
    assert (tmp_path / "runs").read_text() == "once\n"


def test_an_id_of_another_key_is_a_conflict(gateway, client):
    job_id = client.start("local", "true", keep=True)
    scopes = ["operator.write"]
    key = client.call("keys.create", name="other", scopes=scopes)["key"]
    with Client(gateway, key) as other:
        jobs = [{"id": job_id, "node": "local"}]
        spec = {"command": "true"}
        answer = other.call("job.start", jobs=jobs, work="run", spec=spec, keep=True)
        assert answer["jobs"][0]["error"]["code"] == "CONFLICT"


def test_input_comes_from_the_holder_alone(gateway, client):
    job_id = client.start("local", "cat", hold=True, spec={"stdin": True})
    client.take_until(lambda: client.events)
    known = {"id": job_id, "offset": 0, "resume": True}
    assert client.events[0] == ("job.input", known)
    client.send_input(job_id, 0, b"first\n")
    client.take_until(lambda: client.output(job_id) == b"first\n")
    with Client(gateway) as other:
        answer = other.call("job.follow", id=job_id, hold=True)
        assert answer["offset"] == 0
        other.take_until(lambda: ("job.input", {**known, "offset": 6}) in other.events)
        client.send_input(job_id, 6, b"not his any more\n")
        client.call("node.list")
        other.send_input(job_id, 6, b"second\n")
        other.send_input(job_id, 13, b"")
        assert other.ending(job_id)["state"] == "done"
        assert other.output(job_id) == b"first\nsecond\n"


def test_a_client_acknowledges_what_it_has_read_itself(gateway, client):
    job_id = client.start("local", "echo mine; sleep 120", hold=True)
    client.take_until(lambda: client.output(job_id))
    with Client(gateway) as other:
        assert other.call("job.ack", id=job_id, offset=10**6) == {}
        other.call("job.follow", id=job_id)
        assert other.call("job.ack", id=job_id, offset=10**6) == "INVALID_REQUEST"
    assert gateway.running.jobs.get(job_id).holder.position == 0
    client.call("job.cancel", id=job_id)


def test_a_key_that_only_reads_may_watch_and_not_hold(gateway, client):
    job_id = client.start("local", "sleep 120", keep=True)
    made = client.call("keys.create", name="reader", scopes=["operator.read"])
    with Client(gateway, made["key"]) as reader:
        assert reader.call("job.follow", id=job_id, hold=True) == "FORBIDDEN"
        assert reader.call("job.follow", id=job_id)["job"]["state"] == "running"
        assert reader.call("job.cancel", id=job_id) == "FORBIDDEN"
        view = client.call("job.cancel", id=job_id)
        assert view["cancelledBy"] == "owner"
        assert reader.ending(job_id)["words"] == "cancelled by owner"


def test_a_key_that_only_reads_has_a_terminal_redrawn_rarely_and_changes_nothing(
    gateway, client, monkeypatch
):
    """Without a redraw it may see half a screen; each is a signal to the programs."""
    monkeypatch.setattr(moltis, "READER_REDRAW", 3600.0)
    made = client.call("keys.create", name="eye", scopes=["operator.read"])
    with silent_node(gateway, "tty") as node, Client(gateway, made["key"]) as reader:
        spec = {"command": "vi", "tty": {"rows": 24, "cols": 80}}
        start = {"jobs": [{"node": "tty"}], "work": "run", "spec": spec, "keep": True}
        (job,) = client.call("job.start", **start)["jobs"]
        mark = moltis.to_json(moltis.Mark(0, 24, 80)).encode()
        node.send(log_message(job["id"], 0, (moltis.MARK, mark)))
        client.call("job.read", id=job["id"], wait=60)
        for _ in range(5):
            reader.call("job.follow", id=job["id"], offset=5 + len(mark), screen=True)
            reader.call("job.unfollow", id=job["id"])
        for change in ({"rows": 1, "cols": 1}, {"redraw": True}):
            assert reader.call("job.resize", id=job["id"], **change) == "FORBIDDEN"
        typed = moltis.encode_job_data(moltis.INPUT_DATA, job["id"], 0, b":q!\n")
        reader.peer.send(typed)
        reader.call("node.list")
        client.call("job.follow", id=job["id"], screen=True)
        client.call("job.cancel", id=job["id"])
        events = [node.receive() for _ in range(4)]
        names = [event["event"] for event in events]
        assert names == ["job.start", "job.resize", "job.resize", "job.cancel"]
        # The size that it has: a node redraws at an equal one.
        size = {"id": job["id"], "rows": 24, "cols": 80}
        assert events[1]["payload"] == events[2]["payload"] == size


def test_whoever_takes_the_input_over_keeps_the_size_and_is_there_once(gateway, client):
    """If nobody seems to size it, the others set theirs: whoever had it has left."""
    with silent_node(gateway, "sized") as node, Client(gateway) as other:
        size = {"rows": 24, "cols": 80}
        job_id = client.start("sized", "vi", spec={"tty": size}, keep=True, hold=True)
        node.receive()
        other.call("job.follow", id=job_id)
        other.call("job.resize", id=job_id, **size)
        client.call("job.list")
        del client.events[:]
        for _ in range(3):
            other.call("job.follow", id=job_id, hold=True)
            client.call("job.follow", id=job_id, hold=True)
        client.call("job.cancel", id=job_id)
        states = [state for name, state in client.events if name == "job.state"]
        assert states
        for state in states:
            assert len(state["people"]) == 2
            assert [p["sizes"] for p in state["people"] if "you" not in p] == [True]


def test_output_is_read_in_pieces_that_keep_their_order(client):
    job_id = client.start("local", "echo one; echo two >&2; printf '\\377'", keep=True)
    client.call("job.wait", id=job_id, wait=60)
    answer = client.call("job.read", id=job_id, encoding="base64")
    assert answer["offset"] == 0
    assert answer["next"] == answer["job"]["end"]
    assert {p["stream"] for p in answer["pieces"]} == {"stdout", "stderr"}
    texts = client.call("job.read", id=job_id)["pieces"]
    assert "".join(p["text"] for p in texts if p["stream"] == "stdout") == "one\n\ufffd"


def test_a_reader_waits_for_news(client, tmp_path):
    command = f"{wait_in_shell(tmp_path / 'go')}; echo here; sleep 120"
    job_id = client.start("local", command, keep=True)
    nothing = client.call("job.read", id=job_id, wait=0.1)
    assert nothing["pieces"] == []
    (tmp_path / "go").touch()
    news = client.call("job.read", id=job_id, offset=nothing["next"], wait=60)
    assert news["pieces"] == [{"stream": "stdout", "text": "here\n"}]
    client.call("job.cancel", id=job_id)


def test_jobs_are_listed_by_node_state_and_words(client):
    first = client.start("local", "echo needle", keep=True)
    second = client.start("local", "exit 4", keep=True)
    third = client.start("local", "sleep 120", keep=True)
    for job_id in (first, second):
        client.call("job.wait", id=job_id, wait=60)

    def listed(**filters):
        return [view["id"] for view in client.call("job.list", **filters)]

    assert listed(nodeId="Local") == [third, second, first]
    assert listed(state="open") == [third]
    assert listed(state="failed") == [second]
    assert client.call("job.list", state="bogus") == "INVALID_REQUEST"
    assert listed(query="needle") == [first]
    assert listed(limit=1, before=client.call("job.list")[0]["seq"]) == [second]
    assert "spec" not in client.call("job.list")[0]
    client.call("job.cancel", id=third)


def test_all_names_are_known_before_anything_runs(gateway, client, rust, tmp_path):
    rust.close()
    wait_for(lambda: not gateway.is_connected("rust-1"), what="it to be offline")
    spec, ran = {"command": f"touch {tmp_path}/ran"}, tmp_path / "ran"

    def start(*nodes):
        jobs = [{"id": str(uuid.uuid4()), "node": node} for node in nodes]
        return client.call("job.start", jobs=jobs, work="run", spec=spec, keep=True)

    assert start("local", "nowhere") == "NOT_FOUND"
    assert start("local", "") == "NOT_FOUND"
    assert not ran.exists()
    away, here = start("rust-1", "local")["jobs"]
    assert away["error"]["code"] == "UNAVAILABLE"
    assert "has been offline since" in away["error"]["message"]
    assert client.call("job.wait", id=here["id"], wait=60)["state"] == "done"
    assert ran.exists()


@pytest.mark.parametrize(
    ("method", "params", "words"),
    [
        ("job.read", {}, "id is missing"),
        ("job.read", {"id": "x", "offset": -1}, "offset must be from 0"),
        ("job.read", {"id": "x", "wait": 1000}, "wait takes 0 to 300"),
        ("job.read", {"id": "x", "encoding": "x"}, "encoding must be one of text"),
        ("job.list", {"limit": 2**70}, "limit is out of range"),
        ("job.list", {"limit": "9"}, "limit must be a whole number"),
        ("job.follow", {"id": "x", "hold": 1}, "hold must be true or false"),
        ("job.start", {"jobs": [7]}, "jobs must hold objects only"),
        ("node.invoke", {"nodeId": "local", "command": "x"}, "one of system.run"),
        ("keys.create", {"name": "x", "scopes": [7]}, "scopes must be a string"),
        ("subscribe", {"events": ["x"]}, "there is no event 'x'"),
    ],
)
def test_a_parameter_that_makes_no_sense_is_named(gateway, method, params, words):
    if "id" in params:
        run = {"nodeId": "local", "command": "system.run", "args": {"command": "true"}}
        params = {
            **params,
            "id": gateway.call("node.invoke", **run, background=True)["invokeId"],
        }
    with gateway.operator() as client, pytest.raises(moltis.UsageError, match=words):
        client.call(method, params)


# -- one command, one answer: Moltis nodes -------------------------------------


def answer_run(rust, request, **result):
    result = {"stdout": "", "stderr": "", "exitCode": 0, **result}
    params = {"invokeId": request["invokeId"], "result": result}
    method = "node.invoke.result"
    rust.send({"type": "req", "id": "answer", "method": method, "params": params})


def test_a_rust_node_gets_one_command_at_a_time(client, rust):
    spec = {"cwd": " "}  # a Rust node would fail on it
    ids = [client.start("rust-1", f"echo {n}", keep=True, spec=spec) for n in range(3)]
    for number, job_id in enumerate(ids):
        request = next_request(rust)
        assert request["invokeId"] == job_id
        assert request["args"] == {"command": f"echo {number}"}
        places = [client.call("job.read", id=i)["job"].get("place") for i in ids]
        assert places[number:] == [None, 1, 2][: 3 - number]
        answer_run(rust, request, stdout=f"{number}\n")
        assert client.call("job.wait", id=job_id, wait=60)["state"] == "done"


def test_a_rust_node_is_silent_while_its_command_runs(gateway, client, rust):
    link = gateway.running.fleet.connected("rust-1").link
    wait_for(lambda: link._ws.keepalive, what="keepalive after system.providers")
    job_id = client.start("rust-1", "sleep 120", keep=True, spec={"timeout": 1000.5})
    request = next_request(rust)
    assert request["args"] == {"command": "sleep 120", "timeout": 1001}
    assert not link._ws.keepalive
    answer_run(rust, request)
    client.call("job.wait", id=job_id, wait=60)
    assert link._ws.keepalive


def test_a_rust_node_ends_no_command_that_runs(client, rust):
    first = client.start("rust-1", "sleep 120", keep=True)
    second = client.start("rust-1", "echo never", keep=True)
    request = next_request(rust)
    assert client.call("job.cancel", id=first) == "INVALID_REQUEST"
    assert client.call("job.cancel", id=second)["state"] == "cancelled"
    answer_run(rust, request, stdout="ran")
    assert client.call("job.wait", id=first, wait=60)["state"] == "done"
    assert rust.receive()["id"] == "answer"
    with pytest.raises(TimeoutError):
        rust.receive(0.2)


def test_input_for_a_rust_node_is_refused_before_anything_is_sent(client, rust):
    jobs = [{"id": str(uuid.uuid4()), "node": "rust-1"}]
    spec = {"command": "cat", "stdin": True}
    answer = client.call("job.start", jobs=jobs, work="run", spec=spec, hold=True)
    assert "passes no input to commands" in answer["jobs"][0]["error"]["message"]
    with pytest.raises(TimeoutError):
        rust.receive(0.2)


def test_a_large_answer_of_a_rust_node_is_taken_whole(client, rust):
    """Close 1009 would end it for good."""
    job_id = client.start("rust-1", "cat large", hold=True)
    answer_run(rust, next_request(rust), stdout="é" * 2_500_000, stderr="x" * 100)
    client.read_to(job_id, 5_000_100)
    client.acknowledge(job_id)
    state = client.ending(job_id)
    assert state["ending"]["stdoutBytes"] == 5_000_000
    assert client.output(job_id).decode().count("é") == 2_500_000


CUT = "its node's answer was longer than 16 MiB; the rest is not known"


def test_an_answer_of_a_rust_node_over_16_mib_is_cut_and_said_so(client, rust):
    """FAULTS B1: its keys are sorted, so that only output is behind the cut."""
    job_id = client.start("rust-1", "cat huge", keep=True)
    request = next_request(rust)
    result = {"exitCode": 3, "stderr": "", "stdout": "é\n" * 7_000_000}
    params = {"invokeId": request["invokeId"], "result": result}
    answer = rust.request("node.invoke.result", params)
    assert answer["ok"]
    view = client.call("job.wait", id=job_id, wait=60)
    assert view["words"] == "exit status 3"
    assert 6_000_000 < view["stdoutBytes"] < 7_000_000 * 3
    text = read_all(client, job_id)
    assert text.startswith("é\né\n")
    assert CUT in text
    # The connection goes on, whatever of the message had not arrived.
    job_id = client.start("rust-1", "echo next", keep=True)
    answer_run(rust, next_request(rust), stdout="next\n")
    assert client.call("job.wait", id=job_id, wait=60)["state"] == "done"
    assert read_all(client, job_id) == "next\n"


def read_all(client, job_id):
    text, offset = [], 0
    while True:
        answer = client.call("job.read", id=job_id, offset=offset)
        text += [piece["text"] for piece in answer["pieces"]]
        if answer["next"] <= offset:
            return "".join(text)
        offset = answer["next"]


@pytest.mark.parametrize(
    "result",
    [
        {"stdout": "x" * 17_000_000, "exitCode": 0},
        {"x" * 17_000_000: "", "exitCode": 0},
    ],
    ids=["without its exit code", "cut inside a name"],
)
def test_a_cut_answer_that_does_not_say_how_it_ended_has_failed(client, rust, result):
    job_id = client.start("rust-1", "cat huge", keep=True)
    params = {"invokeId": next_request(rust)["invokeId"], "result": result}
    request = {"method": "node.invoke.result", "params": params}
    rust.send({"type": "req", "id": "answer", **request})
    view = client.call("job.wait", id=job_id, wait=60)
    assert view["words"] == f"failed: {CUT}"
    job_id = client.start("rust-1", "echo next", keep=True)
    answer_run(rust, next_request(rust))
    assert client.call("job.wait", id=job_id, wait=60)["state"] == "done"


def test_another_message_of_a_rust_node_over_16_mib_is_ignored(client, rust):
    job_id = client.start("rust-1", "x", keep=True)
    request = next_request(rust)
    params = {"event": "node.telemetry", "payload": {"x": "x" * 17_000_000}}
    rust.send({"type": "req", "id": "1", "method": "node.event", "params": params})
    answer_run(rust, request)
    assert client.call("job.wait", id=job_id, wait=60)["state"] == "done"


@pytest.mark.parametrize(
    ("result", "state", "words"),
    [
        (
            {"error": "command timed out after 5000ms"},
            "timed_out",
            "timed out: command timed out after 5000ms",
        ),
        ({"error": "no shell"}, "failed", "failed: no shell"),
        ({"exitCode": "7"}, "failed", "exitCode must be a whole number"),
        ({"exitCode": -1, "signal": 9}, "done", "killed by SIGKILL"),
        ({"exitCode": 2**40}, "done", "exit status -1"),
        ({"exitCode": 0, "timedOut": True}, "timed_out", "timed out"),
    ],
)
def test_what_a_rust_node_answers_is_an_ending(client, rust, result, state, words):
    job_id = client.start("rust-1", "x", keep=True)
    answer_run(rust, next_request(rust), **result)
    view = client.call("job.wait", id=job_id, wait=60)
    assert view["state"] == state
    assert words in view["words"]


def test_what_a_rust_node_had_in_line_is_lost_with_its_connection(client, rust):
    ids = [client.start("rust-1", "x", keep=True) for _ in range(2)]
    next_request(rust)
    rust.ws.abort()
    for job_id in ids:
        view = client.call("job.wait", id=job_id, wait=60)
        assert view["state"] == "lost"
        assert "its node disconnected" in view["words"]


def test_an_old_node_of_ours_is_served_and_said_to_be_outdated(gateway, caplog):
    caps = ["auth.scram", "exec.stream", "exec.cancel", "exec.resume"]
    extensions = {"moltis": {"caps": caps, "commands": ["system.run"]}}
    params = rust_connect(gateway.token(), "old", extensions=extensions)
    params["client"]["version"] = "0.1.0"
    with gateway.peer() as old, Client(gateway) as client:
        hello = old.request("connect", params)["payload"]
        # Else it would speak of streams that this gateway does not know.
        assert not set(caps[1:]) & set(hello["features"]["methods"])
        assert client.call("node.describe", nodeId="old")["outdated"] is True
        wait_for(lambda: "version 0.1.0" in caplog.text, what="the warning")
        job_id = client.start("old", "echo hi", keep=True)
        answer_run(old, next_request(old), stdout="hi\n")
        client.call("job.wait", id=job_id, wait=60)
        pieces = client.call("job.read", id=job_id)["pieces"]
        assert pieces == [{"stream": "stdout", "text": "hi\n"}]


# -- nodes of ours, by hand ----------------------------------------------------


def jobs_connect(token, node_id="ours", jobs=None, instance="life 1"):
    moltis_extension = {
        "caps": ["auth.scram", "jobs", "terminal"],
        "commands": ["system.run"],
        "instance": instance,
        "jobs": jobs or {},
    }
    return rust_connect(token, node_id, extensions={"moltis": moltis_extension})


def next_event(peer, name):
    wanted = lambda m: isinstance(m, dict) and m.get("event") == name  # noqa: E731
    return peer.receive_until(wanted)["payload"]


def log_message(job_id, offset, *frames):
    data = b"".join(moltis.encode_log_frame(*frame) for frame in frames)
    return moltis.encode_job_data(moltis.LOG_DATA, job_id, offset, data)


DONE = (moltis.ENDING, b'{"state":"done","exitCode":0}')


@pytest.fixture
def ours(gateway):
    with gateway.peer() as peer:
        peer.token = gateway.token("Our box")
        assert peer.request("connect", jobs_connect(peer.token))["ok"]
        yield peer


def test_a_job_travels_to_our_node_and_its_log_comes_back(client, ours):
    job_id = client.start("ours", "echo hi", hold=True, spec={"timeout": 9000})
    started = next_event(ours, "job.start")
    assert started["id"] == job_id
    assert started["work"] == "run"
    assert started["spec"]["command"] == "echo hi"
    ours.send(
        {"type": "event", "event": "job.place", "payload": {"id": job_id, "place": 2}}
    )
    client.take_until(lambda: any(p.get("place") == 2 for _, p in client.events))
    ours.send(log_message(job_id, 0, (moltis.STDOUT, b"hi\n")))
    ours.send(log_message(job_id, 8, DONE))
    assert client.ending(job_id)["words"] == "done"
    assert client.output(job_id) == b"hi\n"
    client.acknowledge(job_id)
    end = len(client.logs[job_id])
    assert next_event(ours, "job.ack") == {"id": job_id, "offset": end}


def test_our_node_hears_of_cancel_resize_and_input(client, ours):
    spec = {"tty": {"rows": 25, "cols": 81}}
    job_id = client.start("ours", "cat", hold=True, spec=spec)
    assert next_event(ours, "job.start")["spec"]["tty"] == spec["tty"]
    client.send_input(job_id, 0, b"abc")
    message = ours.receive_until(lambda m: isinstance(m, bytes))
    sent = (moltis.INPUT_DATA, job_id, 0, b"abc")
    assert moltis.decode_job_data(message) == sent
    consumed = {"id": job_id, "offset": 3}
    ours.send({"type": "event", "event": "job.input", "payload": consumed})
    client.take_until(lambda: ("job.input", consumed) in client.events)
    client.call("job.resize", id=job_id, rows=24, cols=80)
    size = {"id": job_id, "rows": 24, "cols": 80}
    assert next_event(ours, "job.resize") == size
    client.call("job.cancel", id=job_id)
    assert next_event(ours, "job.cancel") == {"id": job_id}


def test_the_hello_says_from_where_a_node_sends_its_logs(gateway, client, ours):
    job_id = client.start("ours", "echo hi", keep=True)
    next_event(ours, "job.start")
    ours.send(log_message(job_id, 0, (moltis.STDOUT, b"hi\n")))
    offset = client.call("job.read", id=job_id, wait=60)["next"]
    assert offset == 8
    ours.ws.abort()

    def is_away():
        return "awayMs" in client.call("job.read", id=job_id)["job"]

    wait_for(is_away, what="the node to be away")
    stranger = str(uuid.uuid4())
    held = {job_id: 0, stranger: 0}
    with gateway.peer() as again:
        answer = again.request("connect", jobs_connect(ours.token, jobs=held))
        known = answer["payload"]["extensions"]["moltis"]["jobs"]
        assert known == {job_id: offset}
        again.send(log_message(job_id, offset, (moltis.STDOUT, b"on\n"), DONE))
        assert client.call("job.wait", id=job_id, wait=60)["state"] == "done"
        pieces = client.call("job.read", id=job_id)["pieces"]
        assert pieces == [{"stream": "stdout", "text": "hi\non\n"}]


@pytest.mark.parametrize(
    "frames",
    [
        [DONE, (moltis.STDOUT, b"more")],
        [(9, b"what kind?")],
        [(moltis.ENDING, b'{"state":"lost"}')],
        [(moltis.ENDING, b"no JSON")],
    ],
)
def test_a_log_that_makes_no_sense_ends_the_connection(client, ours, frames):
    job_id = client.start("ours", "x", keep=True)
    ours.send(log_message(job_id, 0, *frames))
    assert ours.close_code() == 1008


def test_a_log_ends_where_its_row_can_say_so(gateway, client, ours):
    """SQLite's integers have 64 bits: the row would say "running" for ever."""
    job_id = client.start("ours", "x", keep=True)
    ours.ws.abort()
    last = 2**63 - 1
    with gateway.peer() as again:
        again.request("connect", jobs_connect(ours.token, jobs={job_id: last}))
        again.send(log_message(job_id, last, DONE))
        assert again.close_code() == 1008
    assert client.call("job.read", id=job_id)["job"]["state"] == "running"


def test_a_node_writes_into_its_own_logs_only(gateway, client, ours):
    job_id = client.start("ours", "x", keep=True)
    with gateway.peer() as thief:
        token = gateway.token("thief")
        assert thief.request("connect", jobs_connect(token, "thief"))["ok"]
        thief.send(log_message(job_id, 0, (moltis.STDOUT, b"forged"), DONE))
        report = {"event": "node.telemetry", "payload": {"nodeId": "thief"}}
        assert thief.request("node.event", report)["ok"]
    assert client.call("job.read", id=job_id)["job"]["state"] == "running"


def test_reports_of_a_node_beyond_its_allowance_are_dropped():
    """15 a second, of a megabyte each, would keep everybody busy."""
    now = [0.0]
    allowance = moltis.Allowance(10, 1.0, clock=lambda: now[0])
    assert sum(allowance.take() for _ in range(1000)) == 10
    now[0] += 2.5
    assert sum(allowance.take() for _ in range(1000)) == 2
    now[0] += 1e6
    assert sum(allowance.take() for _ in range(1000)) == 10


@pytest.mark.parametrize(
    ("pause", "taken"), [(1.0, 10 + 240), (moltis.TELEMETRY_INTERVAL, 120)]
)
def test_a_node_that_reports_each_second_is_heard_four_times_a_minute(pause, taken):
    """Each report is stored, and sent to all pages; it may have a megabyte."""
    now = [0.0]
    allowance = moltis.Allowance(
        moltis.REPORT_BURST, moltis.REPORT_PAUSE, clock=lambda: now[0]
    )
    heard = 0
    while now[0] < 3600:
        heard += allowance.take()
        now[0] += pause
    assert abs(heard - taken) <= 1


@pytest.fixture
def audience(monkeypatch):
    """The connected operators of a gateway that is made later."""
    audience = moltis.Audience()
    monkeypatch.setattr(moltis, "Audience", lambda: audience)
    return audience


def test_states_by_the_thousand_cost_a_reader_the_newest_only(
    audience, gateway, client, ours
):
    """FAULTS D13"""
    job_id = client.start("ours", "echo hi", hold=True)
    next_event(ours, "job.start")
    unknown = str(uuid.uuid4())
    largest = 0
    for number in range(5000):
        for named, place in ((job_id, number % 7 + 1), (unknown, 2**62)):
            payload = {"id": named, "place": place}
            ours.send({"type": "event", "event": "job.place", "payload": payload})
        if number % 1000 == 0:
            largest = max(largest, client.peer.ws.backlog, audience_backlog(audience))
    payload = {"id": job_id, "place": 2**62}
    ours.send({"type": "event", "event": "job.place", "payload": payload})
    places = lambda: [told.get("place") for _, told in client.events]  # noqa: E731
    client.take_until(lambda: moltis.MAX_LINE in places())
    assert largest <= moltis.MAX_BACKLOG + moltis.MAX_LOG_MESSAGE
    assert {payload["id"] for name, payload in client.events} == {job_id}
    assert gateway.call("node.list")


def audience_backlog(audience):
    return max(peer.ws.backlog for peer in audience._peers)


def test_words_of_a_moltis_node_in_an_ending_are_shown_and_bounded():
    failed = moltis.moltis_ending("run", {"error": "\x1b[2J" + "x" * 9999})
    assert "\x1b" not in failed.reason
    assert len(failed.reason) < moltis.MAX_REASON + 100
    killed = moltis.moltis_ending("run", {"signal": "SIG\x1b" + "X" * 9999})
    assert killed.signal == "SIG" + "X" * 36


# -- the share of a key that is no administrator's -----------------------------


@pytest.fixture
def shared(audience, gateway):
    """A gateway, and a key that may only read."""
    return gateway, gateway.call("keys.create", name="ci", scopes=["operator.read"])


def flood(client):
    """Start a job whose output does not end; return its id."""
    return client.start("local", "exec timeout 100 yes", keep=True)


def ask(client, method, **params):
    """Send a request and leave its answer unread."""
    request = {"type": "req", "id": str(uuid.uuid4()), "method": method}
    client.peer.send({**request, "params": params})


def test_a_key_whose_clients_do_not_read_is_refused_calls_and_no_other(
    shared, audience, monkeypatch
):
    monkeypatch.setattr(moltis, "KEY_BACKLOG", 2 * moltis.MAX_BACKLOG)
    gateway, made = shared
    with contextlib.ExitStack() as stack:
        admin = stack.enter_context(Client(gateway))
        idle = [Client(gateway, made["key"]) for _ in range(2)]
        for client in idle:
            stack.callback(client.peer.ws.abort)
        reader = stack.enter_context(Client(gateway, made["key"]))
        job_id = flood(admin)
        for client in idle:
            ask(client, "job.follow", id=job_id)
        # Not for the backlog: a system may still take some of it.
        wait_for(lambda: reader.call("node.list") == "RATE_LIMITED")
        assert reader.call("job.unfollow", id=job_id) == {}  # as all that makes room
        assert admin.call("node.list")
        for client in idle:
            client.peer.ws.abort()
        wait_for(lambda: reader.call("node.list") != "RATE_LIMITED")
        admin.call("job.cancel", id=job_id)


def test_connections_of_a_key_share_one_outbox(shared, audience, monkeypatch):
    most = 2 * 1024 * 1024
    monkeypatch.setattr(moltis, "MAX_KEY_OUTBOX", most)
    gateway, made = shared
    with contextlib.ExitStack() as stack:
        admin = stack.enter_context(Client(gateway))
        reader = stack.enter_context(Client(gateway, made["key"]))
        idle = [Client(gateway, made["key"]) for _ in range(8)]
        for client in idle:
            stack.callback(client.peer.ws.abort)
        job_id = admin.start("local", "head -c 200000 /dev/zero", keep=True)
        assert admin.call("job.wait", id=job_id, wait=60)["state"] == "done"
        largest = 0
        for _ in range(60):  # 16 MB for each: more than any system's buffers take
            for client in idle:
                with contextlib.suppress(moltis.ConnectionClosed):
                    ask(client, "job.read", id=job_id, encoding="base64")
            largest = max(largest, audience.backlog(made["keyId"]))
        wait_for(lambda: len(audience._peers) < 10, what="idle clients to be dropped")
        assert largest <= most + 8 * 300_000  # the first message of each may be over
        assert reader.call("node.list")
        assert admin.call("node.list")


@pytest.mark.parametrize("limit", ["MAX_KEY_CALLS", "MAX_LIMITED_CALLS"])
def test_a_key_has_so_many_answers_that_wait_and_an_administrator_more(
    shared, monkeypatch, limit
):
    monkeypatch.setattr(moltis, limit, 20)
    gateway, made = shared
    with Client(gateway) as admin, Client(gateway, made["key"]) as reader:
        job_id = admin.start("local", "sleep 100", keep=True)
        for number in range(20):
            method = ("job.wait", "job.read")[number % 2]
            ask(reader, method, id=job_id, offset=0, wait=60)
        error = reader.peer.request("job.wait", {"id": job_id, "wait": 60})["error"]
        assert error["code"] == "RATE_LIMITED"
        assert error["retryable"]
        assert "20 calls" in error["message"]
        assert admin.call("job.wait", id=job_id, wait=0.1)["state"] == "running"
        admin.call("job.cancel", id=job_id)
        wait_for(lambda: reader.call("node.list") != "RATE_LIMITED")


def test_a_key_gets_one_page_of_history_at_a_time(shared, monkeypatch):
    gateway, made = shared
    at_once, most = [], []
    history = moltis.Chats.history

    def slow(*args, **params):
        at_once.append(1)
        most.append(len(at_once))
        threading.Event().wait(0.05)  # time for the others to come in
        at_once.pop()
        return history(*args, **params)

    monkeypatch.setattr(moltis.Chats, "history", slow)
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(Client(gateway, made["key"])) for _ in range(4)]
        for reader in readers:
            ask(reader, "chat.history", sessionKey="main")
        for reader in readers:
            assert reader.take()["payload"] == []
    assert most == [1, 1, 1, 1]


def test_an_administrator_s_command_runs_beside_those_who_take_all_they_can(
    shared, audience, monkeypatch
):
    monkeypatch.setattr(moltis, "MAX_KEY_CALLS", 100)
    gateway, made = shared
    with contextlib.ExitStack() as stack:
        stack.enter_context(gateway.node("far"))
        admin = stack.enter_context(Client(gateway))
        for _ in range(50):
            address = ("127.0.0.1", gateway.running.port)
            stack.enter_context(socket.create_connection(address, 10))
        job_id = flood(admin)
        idle = [Client(gateway, made["key"]) for _ in range(10)]
        for client in idle:
            stack.callback(client.peer.ws.abort)
            ask(client, "job.follow", id=job_id)
        waiter = stack.enter_context(Client(gateway, made["key"]))
        sleep_id = admin.start("local", "sleep 100", keep=True)
        for _ in range(100):
            ask(waiter, "job.wait", id=sleep_id, wait=60)
        assert waiter.call("job.wait", id=sleep_id) == "RATE_LIMITED"
        wait_for(
            lambda: audience.backlog(made["keyId"]) >= 10 * moltis.MAX_BACKLOG,
            what="output to wait for all who do not read",
        )
        args = {"command": "true"}
        run = {"nodeId": "far", "command": "system.run", "args": args}
        for _ in range(3):
            assert admin.call("node.invoke", **run)["exitCode"] == 0
        assert audience.backlog(made["keyId"]) <= moltis.MAX_KEY_OUTBOX
        for running in (job_id, sleep_id):
            admin.call("job.cancel", id=running)


# -- a node that turned --------------------------------------------------------


def test_a_node_reports_on_its_own_jobs_alone(gateway, client):
    """Whatever ids it names: it has seen none of the others', and guessed them."""
    with silent_node(gateway, "honest") as honest, gateway.peer() as hostile:
        extensions = {"moltis": {"caps": list(moltis.MACHINE_CAPABILITIES)}}
        params = rust_connect(gateway.token("turned"), "turned", extensions=extensions)
        job_id = client.start("honest", "id", keep=True)
        params["extensions"]["moltis"].update(instance="i", jobs={job_id: 0})
        hello = hostile.request("connect", params)["payload"]
        assert hello["extensions"]["moltis"]["jobs"] == {}
        ending = moltis.Ending("done", 0)
        forged = moltis.encode_log_frame(1, b"forged") + moltis.encode_log_frame(
            moltis.ENDING, moltis.to_json(ending).encode()
        )
        hostile.send(moltis.encode_job_data(moltis.LOG_DATA, job_id, 0, forged))
        for name, field in (("job.place", "place"), ("job.input", "offset")):
            event = {"id": job_id, field: 7, "resume": True}
            hostile.send({"type": "event", "event": name, "payload": event})
        result = {"invokeId": job_id, "result": {"stdout": "forged", "exitCode": 0}}
        hostile.request("node.invoke.result", result)  # all before it is read
        job = gateway.running.jobs.get(job_id)
        assert (job.record.state, job.log.end, job.input_at) == ("running", 0, 0)
        assert job.place != 7
        honest.send(moltis.encode_job_data(moltis.LOG_DATA, job_id, 0, forged))
        assert client.call("job.wait", id=job_id, wait=60)["state"] == "done"


# -- what each scope may call --------------------------------------------------

METHODS_OF = {
    "operator.read": """
        node.list node.describe telemetry.history job.follow job.unfollow job.ack
        job.read job.wait job.list sessions.list sessions.resolve sessions.storage
        chat.history exec.approval.list models.list models.providers
        subscribe unsubscribe
        """,
    "operator.write": """
        node.rename node.invoke job.start job.once job.cancel job.resize sessions.create
        sessions.patch sessions.reset sessions.delete nodes.set_session chat.send
        chat.retry chat.abort
        """,
    "operator.approvals": "exec.approval.resolve",
    "operator.pairing": """
        device.token.create device.token.rotate device.token.revoke device.pair.list
        """,
    "operator.admin": """
        models.configure models.remove keys.list keys.create keys.revoke logins.list
        logins.revoke audit.list audit.export
        """,
}
INCLUDED = {  # what a scope may call besides its own methods
    "operator.write": ("operator.read",),
    "operator.admin": tuple(METHODS_OF),
}


@pytest.mark.parametrize("scope", METHODS_OF)
def test_a_key_calls_the_methods_of_its_scope_and_no_other(gateway, scope):
    """FAULTS, siblings of D9. Of every method that there is."""
    key = gateway.call("keys.create", name=scope, scopes=[scope])["key"]
    allowed = set()
    for own in (scope, *INCLUDED.get(scope, ())):
        allowed |= set(METHODS_OF[own].split())
    with Client(gateway, key) as client:
        methods = set(client.hello["features"]["methods"]) - {"auth.scram", "jobs"}
        assert methods == set(" ".join(METHODS_OF.values()).split())
        answers = {
            method: client.peer.request(method, {"id": "x"})
            for method in sorted(methods)
        }
    codes = {m: a.get("error", {}).get("code") for m, a in answers.items()}
    assert {m for m, code in codes.items() if code != "FORBIDDEN"} == allowed
