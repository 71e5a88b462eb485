"""What Model Context Protocol clients get, over lines of JSON-RPC 2.0 and HTTP."""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import os
import queue
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from urllib.parse import urlsplit

import pytest
from peers import InProcessGateway
from support import (
    PROGRAM,
    clean_environment,
    launched,
    run_moltis,
    wait_for,
    wait_in_shell,
)

import moltis


class McpClient:
    """A client whose every line is written out in the test."""

    def __init__(self, gateway):
        self.answers = []  # and notifications
        self.batches = []
        self._lines = queue.Queue()
        self._client = moltis.LastingClient(gateway.operator)
        self._server = moltis.McpLines(self._client, self.take)
        self._thread = threading.Thread(
            target=self._server.serve,
            args=(lambda _limit: self._lines.get(),),
            name="test-mcp",
        )
        self._thread.start()

    def take(self, line):
        assert "\n" not in line
        message = json.loads(line)
        (self.batches if isinstance(message, list) else self.answers).append(message)

    def send(self, value):
        line = value if isinstance(value, str) else json.dumps(value)
        self._lines.put(f"{line}\n".encode("utf-8", "surrogateescape"))

    def request(self, request_id, method, params=None):
        self.send(
            {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}
        )
        return self.answer(request_id)

    def answer(self, request_id):
        return wait_for(
            lambda: next(
                (
                    a
                    for a in self.answers
                    if "jsonrpc" in a and "method" not in a and a["id"] == request_id
                ),
                None,
            ),
            what=f"the answer to {request_id}",
        )

    def tool(self, request_id, name, **arguments):
        params = {"name": name, "arguments": arguments}
        result = self.request(request_id, "tools/call", params)["result"]
        return result["isError"], json.loads(result["content"][0]["text"])

    def close(self):
        self._lines.put(b"")
        self._thread.join()
        self._server.close(moltis.MCP_GRACE)
        self._client.close()


@pytest.fixture
def gateway(tmp_path):
    with InProcessGateway(tmp_path / "gateway") as running:
        yield running


@pytest.fixture
def client(gateway):
    client = McpClient(gateway)
    yield client
    client.close()


def open_jobs(gateway):
    return gateway.call("job.list", state="open")


def test_initialize_agrees_on_a_version_and_tells_of_the_machines(client):
    params = {"protocolVersion": "2025-03-26", "capabilities": {}}
    result = client.request(0, "initialize", params)["result"]
    assert result["protocolVersion"] == "2025-03-26"
    assert result["capabilities"] == {"tools": {}, "resources": {}, "prompts": {}}
    assert result["serverInfo"]["name"] == "moltis"
    assert result["serverInfo"]["version"] == moltis.__version__
    assert "Local" in result["instructions"]


def test_an_unknown_version_gets_the_newest(client):
    result = client.request(1, "initialize", {"protocolVersion": "1999-01-01"})
    assert result["result"]["protocolVersion"] == moltis.LEGACY_MCP[0]


def test_the_tools_are_those_of_the_agent(client):
    tools = client.request("a", "tools/list")["result"]["tools"]
    assert [tool["name"] for tool in tools] == [
        "exec",
        "exec_status",
        "file_read",
        "file_write",
        "file_edit",
        "file_list",
        "nodes_list",
        "nodes_describe",
        "nodes_select",
    ]
    assert all(tool["inputSchema"]["type"] == "object" for tool in tools)


def test_exec_runs_where_it_is_told_and_names_the_machine(client, gateway):
    with gateway.node("far"):
        failed, result = client.tool(1, "exec", command="echo out; exit 3", node="far")
        assert not failed
        assert result["node"] == "far"
        assert result["stdout"] == "out\n"
        assert result["exit_code"] == 3
        assert client.tool(2, "nodes_select", node="far")[1]["selected"] == "far"
        assert client.tool(3, "exec", command="true")[1]["node"] == "far"
        nodes = client.tool(4, "nodes_list")[1]["nodes"]
        assert [n["node"] for n in nodes if n["selected"]] == ["far"]
    (job, _) = gateway.call("job.list")
    assert (job["nodeName"], job["command"]) == ("far", "true")


def test_a_command_in_the_background_goes_on_and_is_looked_at(client, gateway):
    with gateway.node("far"):
        wait = wait_in_shell("go")
        command = f"cd {gateway.directory}; echo begun; {wait}; echo grüße; exit 3"
        failed, started = client.tool(
            1, "exec", command=command, node="far", background=True
        )
        assert not failed
        assert (started["node"], started["state"]) == ("far", "started")
        job = started["id"]

        def begun():
            result = client.tool(2, "exec_status", id=job)[1]
            client.answers.clear()
            return result if result["stdout"] else None

        result = wait_for(begun)
        assert (result["stdout"], result["state"]) == ("begun\n", "running")
        (gateway.directory / "go").touch()
        place = result["next_offset"]
        failed, result = client.tool(3, "exec_status", id=job, offset=place, wait=60)
        assert not failed
        assert result["stdout"] == "grüße\n"
        assert (result["state"], result["exit_code"]) == ("done", 3)
    (listed,) = gateway.call("job.list")
    assert (listed["id"], listed["kept"]) == (job, True)


def test_a_command_in_the_background_outlives_the_client_and_can_be_ended(gateway):
    client = McpClient(gateway)
    job = client.tool(1, "exec", command="sleep 120", background=True)[1]["id"]
    client.close()
    assert gateway.call("job.wait", id=job, wait=0)["state"] == "running"
    client = McpClient(gateway)
    assert client.tool(2, "exec_status", id=job, cancel=True)[1]["state"] == "cancelled"
    assert client.tool(3, "exec_status", id="none")[0]
    client.close()


def test_an_error_has_structured_content_only_where_it_fits_the_schema(client):
    """Server tools, Output schema: structured results MUST conform to it."""
    calls = [
        ("exec", {"command": "true", "node": "nowhere"}),
        ("exec_status", {"id": "none"}),
        ("file_read", {"path": "/nowhere"}),
        ("nodes_describe", {"node": "nowhere"}),
    ]
    for number, (name, arguments) in enumerate(calls):
        params = {"name": name, "arguments": arguments}
        result = client.request(number, "tools/call", params)["result"]
        assert result["isError"]
        assert "structuredContent" not in result


def test_errors_of_a_tool_are_results_that_say_so(client):
    failed, result = client.tool(1, "exec", command="true", node="nowhere")
    assert failed
    assert "Local" in result["error"]
    failed, result = client.tool(2, "exec", command=7)
    assert failed
    assert "command must be" in result["error"]


@pytest.mark.parametrize("arguments", [[], "ls", 7, False, "", 0])
def test_arguments_that_are_no_object_are_refused(client, arguments):
    call = {"name": "nodes_select", "arguments": arguments}
    error = client.request(9, "tools/call", call)["error"]
    assert error["code"] == -32602
    assert "must be an object" in error["message"]
    error = client.request(10, "tools/call", arguments)["error"]
    assert error["code"] == -32602


def test_what_was_asked_before_the_input_ended_is_answered(client):
    call = {"name": "exec", "arguments": {"command": "echo last words"}}
    client.send({"jsonrpc": "2.0", "id": 11, "method": "tools/call", "params": call})
    client.close()
    assert "last words" in json.dumps(client.answer(11))


def test_a_cancelled_call_ends_its_command_and_is_not_answered(client, gateway):
    call = {"name": "exec", "arguments": {"command": "sleep 120"}}
    client.send(
        {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": call},
    )
    wait_for(lambda: open_jobs(gateway), what="the command")
    client.send(
        {
            "jsonrpc": "2.0",
            "method": "notifications/cancelled",
            "params": {"requestId": 7},
        }
    )
    wait_for(lambda: not open_jobs(gateway), what="its end")
    assert client.request(8, "ping")["result"] == {}
    assert all(answer["id"] != 7 for answer in client.answers)


def test_the_end_of_input_ends_what_still_runs(gateway):
    client = McpClient(gateway)
    call = {"name": "exec", "arguments": {"command": "sleep 120"}}
    client.send({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call})
    wait_for(lambda: open_jobs(gateway), what="the command")
    client.close()
    wait_for(lambda: not open_jobs(gateway), what="its end")


TOKEN = (
    '{"jsonrpc":"2.0","id":1,"method":"ping","params":{"_meta":{"progressToken":%s}}}'
)


NONSENSE = [
    ("{", -32700),
    ("7", -32600),
    ('{"id":1}', -32600),
    ('{"id":1,"method":5}', -32600),
    ('{"jsonrpc":"1.0","id":1,"method":"ping"}', -32600),
    ('{"jsonrpc":"2.0","id":null,"method":"ping"}', -32600),
    ('{"jsonrpc":"2.0","id":[1],"method":"ping"}', -32600),
    ('{"jsonrpc":"2.0","id":true,"method":"ping"}', -32600),
    ('{"jsonrpc":"2.0","id":1.5,"method":"ping"}', -32600),
    ('{"jsonrpc":"2.0","id":1e400,"method":"ping"}', -32600),
    ('{"jsonrpc":"2.0","id":NaN,"method":"ping"}', -32700),
    ('{"jsonrpc":"2.0","id":1,"method":"p\\ud800"}', -32602),
    ('{"jsonrpc":"2.0","id":1,"method":"ping\udcff"}', -32700),  # no UTF-8
    ('{"jsonrpc":"2.0","id":1,"method":"ping","params":[1]}', -32602),
    ('{"jsonrpc":"2.0","id":1,"method":"ping","params":{"_meta":7}}', -32602),
    ('{"jsonrpc":"2.0","id":1,"method":"ping","params":{"_meta":[7]}}', -32602),
    (TOKEN % "[]", -32602),
    (TOKEN % "true", -32602),
    ('{"jsonrpc":"2.0","id":1,"method":"pong","result":{}}', -32601),
    ('{"jsonrpc":"2.0","id":1,"method":"sampling/list"}', -32601),
    ('{"jsonrpc":"2.0","id":1,"method":"tools/call"}', -32602),
]


def test_a_message_that_makes_no_sense_gets_an_error_and_the_next_an_answer(
    client, web
):
    for line, code in NONSENSE:
        client.answers.clear()
        client.send(line)
        wait_for(lambda: client.answers, what="an error")
        answer = client.answers[0]
        assert answer["error"]["code"] == code, line
        assert answer["id"] in (None, 1)
        assert client.request(9, "ping")["result"] == {}
        other = web.post(line.encode("utf-8", "surrogateescape")).json
        assert (other["error"]["code"], other["id"]) == (code, answer["id"])


def test_a_list_has_no_page_but_the_first(client, web):
    """Server utilities, Pagination: no cursor is ours, so each one is invalid."""
    lists = ["tools/list", "resources/list", "resources/templates/list", "prompts/list"]
    cursors = ["", "eyJwYWdlIjogM30=", "resources/list", 7, {}]
    for method, cursor in itertools.product(lists, cursors):
        client.answers.clear()
        params = {"cursor": cursor}
        error = client.request(1, method, params)["error"]
        assert error["code"] == -32602
        assert "without a cursor" in error["message"]
        assert web.request(method, params).json["error"] == error
        answer = web.modern(method, **params)
        assert (answer.status, answer.json["error"]) == (400, error)
    for method in lists:
        client.answers.clear()
        assert "result" in client.request(2, method, {"cursor": None})
        assert "nextCursor" not in client.request(3, method)["result"]


def test_it_is_a_subcommand_that_speaks_on_stdin_and_stdout(gateway, home):
    done = subprocess.run(
        [*launched(PROGRAM), "mcp"],
        input='{"jsonrpc":"2.0","id":1,"method":"ping"}\n',
        env=clean_environment(
            home, MOLTIS_GATEWAY_URL=gateway.url, MOLTIS_API_KEY=gateway.api_key
        ),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=True,
    )
    assert json.loads(done.stdout) == {"jsonrpc": "2.0", "id": 1, "result": {}}


def test_a_refused_key_ends_the_bridge_with_a_sentence(gateway, home):
    done = subprocess.run(
        [*launched(PROGRAM), "mcp"],
        input='{"jsonrpc":"2.0","id":1,"method":"initialize"}\n',
        env=clean_environment(
            home, MOLTIS_GATEWAY_URL=gateway.url, MOLTIS_API_KEY="mk_none"
        ),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (moltis.EXIT_REFUSED, "")
    assert "refused the operator key" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_gateway_that_was_away_is_found_again(client):
    assert client.tool(1, "exec", command="echo before")[1]["stdout"] == "before\n"
    client._client.client._ws.abort()
    assert client.tool(2, "exec", command="echo after")[1]["stdout"] == "after\n"


def test_a_command_whose_connection_breaks_goes_on_and_runs_once(client, tmp_path):
    file = tmp_path / "begun"
    command = f"echo run >>{file}; sleep 1; echo out"
    params = {"name": "exec", "arguments": {"command": command}}
    client.send({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})
    wait_for(file.exists)
    client._client.client._ws.abort()
    result = json.loads(client.answer(1)["result"]["content"][0]["text"])
    assert (result["stdout"], result["exit_code"]) == ("out\n", 0)
    assert file.read_text() == "run\n"


def test_a_command_that_outlives_its_gateway_is_named(client, gateway, monkeypatch):
    monkeypatch.setattr(moltis, "CALLER_PATIENCE", 0.2)
    monkeypatch.setattr(moltis, "RECONNECT_AFTER", 0.05)
    params = {"name": "exec", "arguments": {"command": "sleep 120"}}
    client.send({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})
    (job,) = wait_for(lambda: open_jobs(gateway), what="the command")
    gateway.close()
    text = client.answer(1)["result"]["content"][0]["text"]
    assert f"exec_status for {job['id']}" in text


def test_a_ping_is_answered_while_initialize_waits_for_the_gateway(client, monkeypatch):
    waiting, go = threading.Event(), threading.Event()
    call = client._client.call

    def slow_call(method, params, cancel=None):
        waiting.set()
        assert go.wait(60)
        return call(method, params, cancel)

    monkeypatch.setattr(client._client, "call", slow_call)
    client.send({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {}})
    assert waiting.wait(60)
    assert client.request(2, "ping")["result"] == {}
    assert [answer["id"] for answer in client.answers] == [2]
    go.set()
    assert "Local" in client.answer(1)["result"]["instructions"]


def test_a_batch_is_answered_as_one_where_the_version_has_batches(client):
    client.request(0, "initialize", {"protocolVersion": "2025-03-26"})
    calls = [
        {"jsonrpc": "2.0", "id": 1, "method": "ping"},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {
            "jsonrpc": "2.0",
            "id": 2,
            "method": "tools/call",
            "params": {"name": "exec", "arguments": {"command": "echo in a batch"}},
        },
        7,
    ]
    client.send(calls)
    batch = wait_for(
        lambda: next((a for a in client.batches if isinstance(a, list)), None),
        what="the batch",
    )
    assert [answer["id"] for answer in batch] == [1, 2, None]
    assert batch[1]["result"]["structuredContent"]["stdout"] == "in a batch\n"
    assert batch[2]["error"]["code"] == -32600


@pytest.mark.parametrize("version", ["2025-06-18", "2025-11-25"])
def test_a_batch_is_refused_where_the_version_has_none(client, version):
    client.request(0, "initialize", {"protocolVersion": version})
    client.send([{"jsonrpc": "2.0", "id": 1, "method": "ping"}])
    assert client.answer(None)["error"]["code"] == -32600


def test_arguments_that_the_gateway_would_hang_up_on_are_refused(client, gateway):
    wait = wait_in_shell("go")
    other = {"command": f"cd {gateway.directory}; {wait}; echo still there"}
    params = {"name": "exec", "arguments": other}
    client.send({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})
    wait_for(lambda: open_jobs(gateway), what="the command")
    connection = client._client.client
    params = {"name": "exec", "arguments": {"command": "true " + "x" * (3 << 20)}}
    error = client.request(2, "tools/call", params)["error"]
    assert error["code"] == -32602
    assert "1,048,576 bytes" in error["message"]
    assert client._client.client is connection
    # Bytes count, not characters; and what is sent to the gateway in other fields.
    params = {"name": "exec", "arguments": {"command": "echo " + "😀" * 600_000}}
    assert client.request(3, "tools/call", params)["error"]["code"] == -32602
    params = {"uri": f"moltis://jobs/{'x' * (3 << 20)}/log"}
    assert client.request(4, "resources/read", params)["error"]["code"] == -32602
    params = {
        "name": moltis.CARE_PROMPT["name"],
        "arguments": {"node": "x" * (3 << 20)},
    }
    assert client.request(5, "prompts/get", params)["error"]["code"] == -32602
    assert client._client.client is connection
    (gateway.directory / "go").touch()
    assert "still there" in client.answer(1)["result"]["content"][0]["text"]


def test_a_line_without_end_is_skipped_and_the_next_one_answered(client, monkeypatch):
    monkeypatch.setattr(moltis, "MAX_MCP_LINE", 100)
    for piece in (b"x" * 100, b"x" * 100, b'"}\n'):
        client._lines.put(piece)
    assert client.answer(None)["error"]["code"] == -32600
    assert client.request(1, "ping")["result"] == {}


def test_a_whole_number_may_be_written_with_a_point(client):
    job = client.tool(1, "exec", command="echo out", background=True)[1]["id"]
    failed, result = client.tool(2, "exec_status", id=job, offset=0.0, wait=30)
    assert (failed, result["stdout"]) == (False, "out\n")
    failed, result = client.tool(3, "exec_status", id=job, offset=0.5)
    assert failed
    assert "offset must be" in result["error"]


def test_half_a_character_is_refused_with_the_id_of_its_message(client, web):
    params = {"name": "exec", "arguments": {"command": "echo \ud83d"}}
    error = client.request(1, "tools/call", params)["error"]
    assert (error["code"], "half a character" in error["message"]) == (-32602, True)
    answer = web.request("tools/call", params)
    assert (answer.json["id"], answer.json["error"]["code"]) == (1, -32602)
    client.send({"jsonrpc": "2.0", "id": "\udc00", "method": "\udc00"})
    assert client.answer(None)["error"]["code"] == -32602
    params["arguments"]["command"] = "echo \ud83d\ude00"
    assert client.request(2, "tools/call", params)["result"]["isError"] is False


def test_an_id_and_a_progress_token_may_be_written_with_a_point(client, gateway):
    call = {"name": "exec", "arguments": {"command": "sleep 120"}}
    call["_meta"] = {"progressToken": 7.0}
    client.send({"jsonrpc": "2.0", "id": 7.0, "method": "tools/call", "params": call})
    wait_for(lambda: client.answers, what="progress")
    assert client.answers[0]["params"]["progressToken"] == 7
    note = {"jsonrpc": "2.0", "method": "notifications/cancelled"}
    client.send({**note, "params": {"requestId": 7}})
    wait_for(lambda: not open_jobs(gateway), what="its end")


def test_a_tool_that_is_not_there_is_an_error_that_lists_those_that_are(client):
    error = client.request(1, "tools/call", {"name": "shell"})["error"]
    assert error["code"] == -32602
    assert '"shell"' in error["message"]
    assert "nodes_list" in error["message"]


def test_each_tool_has_a_title_and_annotations_and_results_that_fit_its_schema(
    client, tmp_path
):
    tools = {
        tool["name"]: tool
        for tool in client.request("t", "tools/list")["result"]["tools"]
    }
    reads = {n: tool["annotations"]["readOnlyHint"] for n, tool in tools.items()}
    assert reads == {
        "exec": False,
        "exec_status": False,
        "file_read": True,
        "file_write": False,
        "file_edit": False,
        "file_list": True,
        "nodes_list": True,
        "nodes_describe": True,
        "nodes_select": True,
    }
    assert all(tool["title"] for tool in tools.values())
    started = client.tool(0, "exec", command="true", background=True)[1]
    calls = {
        "exec": {"command": "echo out; echo err >&2; kill -9 $$"},
        "exec_status": {"id": started["id"], "wait": 30},
        "file_write": {"path": f"{tmp_path}/f", "content": "a\r\nb\r\n"},
        "file_read": {"path": f"{tmp_path}/f", "limit": 1},
        "file_edit": {"path": f"{tmp_path}/f", "old": "a", "new": "b"},
        "file_list": {"path": str(tmp_path)},
        "nodes_list": {},
        "nodes_describe": {"node": "local"},
        "nodes_select": {"node": "local"},
    }
    kinds = {"string": str, "integer": int, "number": float, "boolean": bool}
    kinds["array"] = list
    for number, (name, arguments) in enumerate(calls.items(), 1):
        params = {"name": name, "arguments": arguments}
        result = client.request(number, "tools/call", params)["result"]
        content, schema = result["structuredContent"], tools[name]["outputSchema"]
        assert json.loads(result["content"][0]["text"]) == content
        assert set(schema["required"]) <= content.keys()
        for key, value in content.items():
            if key in schema["properties"]:
                kind = kinds[schema["properties"][key]["type"]]
                assert isinstance(value, kind), (name, key, value)


def test_the_last_line_is_reported_while_a_command_runs(client, gateway):
    wait = wait_in_shell("go")
    printf = r"printf 'one\r\033[32m50 %%\033[0m\n\n'"
    command = f"cd {gateway.directory}; {printf}; {wait}"
    meta = {"progressToken": "p"}
    params = {"name": "exec", "arguments": {"command": command}, "_meta": meta}
    client.send({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})

    def reports():
        return [answer["params"] for answer in client.answers if "params" in answer]

    wait_for(lambda: len(reports()) > 1, what="progress")
    (gateway.directory / "go").touch()
    (job,) = gateway.call("job.list")
    client.answer(1)
    assert job["id"] in reports()[0]["message"]
    assert reports()[1]["message"] == "50 %"
    assert {report["progressToken"] for report in reports()} == {"p"}
    numbers = [report["progress"] for report in reports()]
    assert numbers == sorted(set(numbers))


def test_the_whole_output_of_a_job_is_a_resource(client, monkeypatch):
    result = client.tool(1, "exec", command="seq 20000; echo ü >&2")[1]
    assert result["truncated"]
    assert result["log"] == f"moltis://jobs/{result['id']}/log"
    read = client.request(2, "resources/read", {"uri": result["log"]})["result"]
    (content,) = read["contents"]
    assert sorted(content["text"].split()) == sorted(
        ["ü", *(str(n) for n in range(1, 20001))]
    )
    (listed,) = client.request(3, "resources/list")["result"]["resources"]
    assert listed["uri"] == result["log"]
    assert "seq 20000" in listed["title"]
    # In parts, if it is long.
    monkeypatch.setattr(moltis, "MAX_LOG_TEXT", 50_000)
    text, uri = "", result["log"]
    while uri:
        read = client.request(f"at {uri}", "resources/read", {"uri": uri})["result"]
        part, _, rest = read["contents"][0]["text"].partition("\n[… it goes on: read ")
        text += part
        uri = rest.partition(" ")[0]
    assert text == content["text"]


@pytest.mark.parametrize(
    "uri", ["moltis://jobs/none/log", "moltis://jobs/log", "file:///etc/passwd", 7]
)
def test_a_resource_that_is_not_there_is_an_error_that_names_it(client, uri):
    error = client.request(1, "resources/read", {"uri": uri})["error"]
    assert error["code"] == -32002
    assert error["data"] == {"uri": uri}


def test_a_prompt_asks_to_look_after_the_machines(client):
    (prompt,) = client.request(1, "prompts/list")["result"]["prompts"]
    params = {"name": prompt["name"]}
    asked = client.request(2, "prompts/get", params)["result"]["messages"]
    assert "nodes_list" in asked[0]["content"]["text"]
    params["arguments"] = {"node": "LOCAL"}
    asked = client.request(3, "prompts/get", params)["result"]["messages"]
    assert "Local" in asked[0]["content"]["text"]
    for arguments in ({"node": "nowhere"}, {"node": 7}, [1]):
        params["arguments"] = arguments
        assert client.request(4, "prompts/get", params)["error"]["code"] == -32602
        client.answers.clear()
    assert client.request(5, "prompts/get", {"name": "x"})["error"]["code"] == -32602


def test_output_of_a_lost_command_is_said_to_be_perhaps_missing(tmp_path):
    directory = tmp_path / "gateway"
    with InProcessGateway(directory) as gateway:
        client = McpClient(gateway)
        job = client.tool(1, "exec", command="sleep 120", background=True)[1]["id"]
        client.close()
    # As after a death: the row still says that it runs.
    with closing(sqlite3.connect(directory / "moltis.db")) as db, db:
        db.execute("UPDATE jobs SET state = 'running', ended_at = NULL, reason = NULL")
    with InProcessGateway(directory) as gateway:
        client = McpClient(gateway)
        failed, result = client.tool(1, "exec_status", id=job)
        client.close()
    assert failed
    assert result["state"] == "lost"
    assert "what it printed last may be missing" in result["error"]


@pytest.mark.parametrize("tool", ["exec", "nodes_list"])
def test_nonsense_from_the_gateway_is_the_error_of_the_call(
    gateway, home, monkeypatch, tool
):
    """It was said to have failed inside the gateway, with a traceback on stderr."""
    params = {"name": tool, "arguments": {"command": "true"} if tool == "exec" else {}}
    asked = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
    address = {"MOLTIS_GATEWAY_URL": gateway.url, "MOLTIS_API_KEY": gateway.api_key}
    with monkeypatch.context() as nonsense:
        nonsense.setattr(moltis.Rpc, "call", lambda *_: [{}])
        line = f"{json.dumps(asked)}\n".encode()
        done = run_moltis("mcp", home=home, stdin=line, **address)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the gateway's answer makes no sense here" in done.stdout


class McpProcess:
    """`moltis mcp` as a client starts it."""

    def __init__(self, gateway, home):
        environ = {"MOLTIS_GATEWAY_URL": gateway.url, "MOLTIS_API_KEY": gateway.api_key}
        self.process = subprocess.Popen(
            [*launched(PROGRAM), "mcp"],
            env=clean_environment(home, **environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )

    def start(self, command):
        call = {"name": "exec", "arguments": {"command": command}}
        message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}
        print(json.dumps(message), file=self.process.stdin, flush=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_its_client_started(gateway, home, number):
    mcp = McpProcess(gateway, home)
    mcp.start("sleep 120")
    wait_for(lambda: open_jobs(gateway), what="the command")
    mcp.process.send_signal(number)
    assert mcp.process.wait(60) == 0  # with its input still open
    assert mcp.process.communicate() == ("", "")
    (job,) = gateway.call("job.list")
    assert job["state"] == "cancelled"


@pytest.mark.skipif(moltis.ON_MAC, reason="there a write has to fail")
@pytest.mark.parametrize("writes", [True, False])
def test_a_client_that_reads_no_more_ends_what_it_started(gateway, home, writes):
    mcp = McpProcess(gateway, home)
    mcp.start("sleep 120")
    wait_for(lambda: open_jobs(gateway), what="the command")
    # As a child of the client does between fork() and exec(): no write fails.
    held = os.dup(mcp.process.stdout.fileno())
    mcp.process.stdout.close()
    if writes:
        mcp.process.stdin.write('{"jsonrpc":"2.0","id":2,"method":"ping"}\n')
        mcp.process.stdin.flush()
        assert os.read(held, 4096)
    os.close(held)
    assert mcp.process.wait(60) == moltis.BROKEN_PIPE
    assert mcp.process.stderr.read() == ""
    mcp.process.stderr.close()
    mcp.process.stdin.close()
    (job,) = gateway.call("job.list")
    assert job["state"] == "cancelled"


# --- over HTTP ------------------------------------------------------------------------


VERSION = "io.modelcontextprotocol/protocolVersion"
MODERN = {VERSION: "2026-07-28", "io.modelcontextprotocol/clientCapabilities": {}}


class HttpAnswer:
    def __init__(self, response):
        self.status, self.headers = response.status, response.headers
        self.body = response.read()
        self.json = (
            json.loads(self.body) if self.body.startswith((b"{", b"[")) else None
        )


class McpHttp:
    """A client that shows each request, and reads a stream as it comes."""

    def __init__(self, gateway, key=None):
        self.gateway = gateway
        self.address = urlsplit(gateway.url).netloc
        self.headers = {"Authorization": f"Bearer {key or gateway.api_key}"}

    def open(self, message, **headers):
        """Return the connection and the response, whose body is still to be read."""
        connection = http.client.HTTPConnection(self.address, timeout=60)
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        given = {k: v for k, v in {**self.headers, **named}.items() if v is not None}
        connection.request("POST", "/mcp", body, given)
        return connection

    def post(self, message, **headers):
        with closing(self.open(message, **headers)) as connection:
            return HttpAnswer(connection.getresponse())

    def request(self, method, params=None, **headers):
        message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params or {}}
        return self.post(message, **headers)

    def modern(self, method, meta=MODERN, headers=(), **params):
        named = {"MCP_Protocol_Version": "2026-07-28", "Mcp_Method": method}
        if "name" in params or "uri" in params:
            named["Mcp_Name"] = params.get("name", params.get("uri"))
        params = {**params, "_meta": meta}
        return self.request(method, params, **{**named, **dict(headers)})

    def tool(self, name, **arguments):
        answer = self.request("tools/call", {"name": name, "arguments": arguments})
        assert answer.status == 200
        result = answer.json["result"]
        return result["isError"], json.loads(result["content"][0]["text"])


@pytest.fixture
def web(gateway):
    return McpHttp(gateway)


def get(gateway, method, path, **headers):
    address = urlsplit(gateway.url).netloc
    with closing(http.client.HTTPConnection(address, timeout=60)) as connection:
        connection.request(method, path, headers=headers)
        return HttpAnswer(connection.getresponse())


@pytest.mark.parametrize("method", ["GET", "DELETE", "HEAD", "PUT", "OPTIONS", "PATCH"])
@pytest.mark.parametrize("headers", [{}, {"Origin": "https://evil.example"}])
def test_a_probe_for_streams_and_sessions_gets_405_before_all_else(
    gateway, method, headers
):
    answer = get(gateway, method, "/mcp", **headers)
    assert (answer.status, answer.headers["Allow"]) == (405, "POST")


@pytest.mark.parametrize(
    "path",
    [
        "/.well-known/oauth-protected-resource",
        "/.well-known/oauth-protected-resource/mcp",
        "/.well-known/oauth-authorization-server",
        "/.well-known/openid-configuration",
        "/.well-known/openid-configuration/mcp",
        "/mcp/.well-known/openid-configuration",
    ],
)
def test_there_is_no_oauth_and_that_is_said_as_json(gateway, path):
    answer = get(gateway, "GET", path)
    assert (answer.status, answer.headers["Content-Type"]) == (404, "application/json")
    assert answer.json["error"] == "not_found"


def test_a_refused_key_is_said_to_be_missing_unknown_or_revoked(gateway, web):
    def refusal(authorization, **params):
        answer = web.request("ping", params, Authorization=authorization)
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        return answer.json["error"]["message"]

    key = gateway.call("keys.create", name="k", scopes=["operator.read"])
    assert "send the operator key" in refusal(None)
    assert "is not valid here" in refusal("Bearer mk_nonsense")
    gateway.call("keys.revoke", keyId=key["keyId"])
    assert "was revoked" in refusal(f"Bearer {key['key']}")
    assert "was revoked" in refusal(f"Bearer {key['key']}", padding="x" * 100_000)


def test_a_body_that_is_too_long_is_refused_with_a_sentence(web):
    answer = web.request("ping", {"padding": "x" * (3 << 20)})
    assert answer.status == 413
    assert answer.body.startswith(b"a body may have 1048576 bytes, not 3")


def test_white_space_around_a_header_is_none_of_its_value(web):
    """RFC 9110 §5.5"""
    named = {"MCP_Protocol_Version": " 2026-07-28 ", "Mcp_Method": "\ttools/call "}
    arguments = {"name": "nodes_list", "arguments": {}}
    answer = web.modern(
        "tools/call", headers={**named, "Mcp_Name": "nodes_list  "}, **arguments
    )
    assert answer.status == 200
    answer = web.request("initialize", MCP_Protocol_Version="2025-06-18 ")
    assert answer.json["result"]["protocolVersion"] == "2025-11-25"


def test_a_sign_in_of_a_browser_counts_for_nothing(gateway, web):
    body = json.dumps({"key": gateway.api_key})
    with closing(http.client.HTTPConnection(web.address, timeout=60)) as connection:
        connection.request("POST", "/api/sign-in", body)
        response = connection.getresponse()
        cookie = response.headers["Set-Cookie"].partition(";")[0]
        secret = json.loads(response.read())["pageSecret"]
    page = {"Cookie": cookie, moltis.PAGE_HEADER: secret, "Authorization": None}
    assert web.request("ping", **page).status == 401


def test_a_page_of_another_origin_is_refused_and_a_program_without_one_is_not(web):
    assert web.request("ping", Origin="https://evil.example").status == 403
    assert web.request("ping", Origin=web.gateway.url).status == 200
    assert web.request("ping").status == 200


def test_each_version_of_the_older_era_is_agreed_on(web):
    for version in moltis.LEGACY_MCP:
        result = web.request("initialize", {"protocolVersion": version}).json["result"]
        assert result["protocolVersion"] == version
        answer = web.request("tools/list", MCP_Protocol_Version=version)
        assert len(answer.json["result"]["tools"]) == 8
    answer = web.request("initialize", {"protocolVersion": "1999-01-01"})
    assert answer.json["result"]["protocolVersion"] == "2025-11-25"
    assert answer.headers["Mcp-Session-Id"] is None


def test_a_notification_is_accepted_without_an_answer(web):
    answer = web.post({"jsonrpc": "2.0", "method": "notifications/initialized"})
    assert (answer.status, answer.body) == (202, b"")


def test_errors_leave_the_session_of_an_older_client_alone(web):
    """To it 404 means that the session is gone, and 400 that the server is."""
    assert web.request("prompts/nothing").status == 200
    assert web.request("tools/call", {"name": "shell"}).status == 200
    assert web.request("tools/call", {"name": "exec", "arguments": []}).status == 200
    assert web.post(b"{").status == 400
    assert web.post({"id": 1}).json["error"]["code"] == -32600


def test_a_batch_without_a_version_is_answered_as_one(web):
    ping = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    answer = web.post([ping, {**ping, "id": 2}])
    assert [one["id"] for one in answer.json] == [1, 2]
    answer = web.post([ping], MCP_Protocol_Version="2025-06-18")
    assert answer.json["error"]["code"] == -32600
    assert web.post([]).json["error"]["code"] == -32600


def test_a_key_sees_the_tools_of_its_scopes_and_others_fail_as_results(gateway):
    key = gateway.call("keys.create", name="k", scopes=["operator.read"])["key"]
    web = McpHttp(gateway, key)
    tools = web.request("tools/list").json["result"]["tools"]
    assert [t["name"] for t in tools] == ["exec_status", "nodes_list", "nodes_describe"]
    failed, result = web.tool("exec", command="true", node="local")
    assert failed
    assert "operator.write" in result["error"]
    assert gateway.call("job.list") == []


def test_without_a_selection_a_command_among_several_machines_needs_a_node(
    web, gateway
):
    assert web.tool("exec", command="true")[1]["node"] == "Local"  # the only one
    with gateway.node("far"):
        failed, result = web.tool("exec", command="true")
        assert failed
        assert "name one in `node`" in result["error"]
        assert web.tool("exec", command="true", node="")[0]
        assert web.tool("exec", command="true", node="far")[1]["node"] == "far"
        failed, result = web.tool("exec", command="true", node="nowhere")
        assert failed
        assert "far" in result["error"]
    call = web.request("tools/call", {"name": "nodes_select", "arguments": {}})
    assert call.json["error"]["code"] == -32602
    assert len(gateway.call("job.list")) == 2


def watched(command):
    meta = {"progressToken": 7}
    params = {"name": "exec", "arguments": {"command": command}, "_meta": meta}
    return {"jsonrpc": "2.0", "id": 5, "method": "tools/call", "params": params}


def events_in(lines):
    """Yield the messages of server-sent events."""
    for line in lines:
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


def test_a_call_with_a_progress_token_is_a_stream_that_begins_at_once(web, gateway):
    command = f"cd {gateway.directory}; echo begun; {wait_in_shell('go')}; echo out"
    with closing(web.open(watched(command))) as connection:
        response = connection.getresponse()
        assert response.headers["Content-Type"] == "text/event-stream"
        assert response.headers["X-Accel-Buffering"] == "no"
        events = events_in(response)
        first = next(events)["params"]
        (job,) = gateway.call("job.list")
        assert first["progressToken"] == 7
        assert job["id"] in first["message"]
        assert next(events)["params"]["message"] == "begun"
        (gateway.directory / "go").touch()
        *_, last = events
        assert last["id"] == 5
        assert last["result"]["structuredContent"]["stdout"] == "begun\nout\n"


def test_a_stream_is_kept_alive_with_comments(web, gateway, monkeypatch):
    monkeypatch.setattr(moltis, "KEEP_ALIVE_INTERVAL", 0.01)
    command = f"cd {gateway.directory}; {wait_in_shell('go')}"
    with closing(web.open(watched(command))) as connection:
        response = connection.getresponse()
        lines = iter(response)
        assert next(line for line in lines if line.startswith(b": it goes on"))
        (gateway.directory / "go").touch()
        assert list(events_in(lines))[-1]["result"]["isError"] is False


def test_a_stream_goes_on_for_a_client_that_ended_only_its_own_side(web, gateway):
    """RFC 9112 §9.6; as `nc -N` does it"""
    command = f"cd {gateway.directory}; {wait_in_shell('go')}; echo out"
    with closing(web.open(watched(command))) as connection:
        connection.sock.shutdown(socket.SHUT_WR)
        lines = iter(connection.getresponse())
        assert any(line == b":\n" for line in lines)  # asks whether it is there
        (gateway.directory / "go").touch()
        *_, last = events_in(lines)
    assert last["result"]["structuredContent"]["stdout"] == "out\n"


def test_who_takes_no_streams_gets_json(web):
    answer = web.post(watched("echo out"), Accept="application/json")
    assert answer.json["result"]["structuredContent"]["stdout"] == "out\n"


@pytest.mark.parametrize("streams", [True, False])
def test_a_command_of_the_older_era_outlives_its_client(web, gateway, streams):
    command = f"cd {gateway.directory}; {wait_in_shell('go')}; echo done >out"
    message = watched(command)
    if not streams:
        del message["params"]["_meta"]
    connection = web.open(message)
    wait_for(lambda: open_jobs(gateway), what="the command")
    connection.close()
    wait_for(lambda: not mcp_calls(gateway), what="the end of the call")
    assert open_jobs(gateway)
    (gateway.directory / "go").touch()
    wait_for(lambda: not open_jobs(gateway), what="its end")
    (job,) = gateway.call("job.list")
    assert job["state"] == "done"
    assert web.tool("exec_status", id=job["id"])[1]["exit_code"] == 0


def mcp_calls(gateway):
    """Return the threads that serve a call."""
    return [
        frame
        for frame in sys._current_frames().values()
        if "_tools_call" in {f.f_code.co_name for f in outer(frame)}
    ]


def outer(frame):
    while frame is not None:
        yield frame
        frame = frame.f_back


@pytest.mark.parametrize("streams", [True, False])
def test_a_command_of_the_modern_era_ends_with_its_client(web, gateway, streams):
    """2026-07-28, Streamable HTTP, Cancellation"""
    message = watched("sleep 120")
    message["params"]["_meta"].update(MODERN)
    if not streams:
        del message["params"]["_meta"]["progressToken"]
    headers = {"MCP_Protocol_Version": "2026-07-28", "Mcp_Name": "exec"}
    connection = web.open(message, Mcp_Method="tools/call", **headers)
    wait_for(lambda: open_jobs(gateway), what="the command")
    connection.close()
    wait_for(lambda: not open_jobs(gateway), what="its end")
    (job,) = gateway.call("job.list")
    assert job["state"] == "cancelled"


def test_an_older_client_cancels_its_own_call_and_no_other(web, gateway):
    def cancel(web, request_id):
        params = {"requestId": request_id}
        note = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": params}
        assert web.post(note).status == 202

    key = gateway.call("keys.create", name="k", scopes=["operator.write"])["key"]
    with closing(web.open(watched("sleep 120"))) as connection:
        response = connection.getresponse()
        assert next(events_in(response))
        cancel(web, 6)
        cancel(McpHttp(gateway, key), 5)
        assert open_jobs(gateway)
        cancel(web, 5)
        assert all("method" in event for event in events_in(response))  # no answer
    (job,) = gateway.call("job.list")
    assert job["state"] == "cancelled"


def test_a_key_that_is_revoked_ends_its_call(web, gateway):
    key = gateway.call("keys.create", name="k", scopes=["operator.write"])
    with closing(McpHttp(gateway, key["key"]).open(watched("sleep 120"))) as connection:
        response = connection.getresponse()
        assert next(events_in(response))
        gateway.call("keys.revoke", keyId=key["keyId"])
        *_, last = events_in(response)
    assert last["result"]["isError"]


# --- 2026-07-28 -----------------------------------------------------------------------


def test_discover_says_what_there_is_and_for_how_long(web):
    answer = web.modern("server/discover")
    assert answer.status == 200
    result = answer.json["result"]
    assert result["supportedVersions"] == ["2026-07-28", *moltis.LEGACY_MCP]
    assert result["capabilities"] == {"tools": {}, "resources": {}, "prompts": {}}
    assert result["resultType"] == "complete"
    assert (result["ttlMs"], result["cacheScope"]) == (60_000, "private")
    server = result["_meta"]["io.modelcontextprotocol/serverInfo"]
    assert server["version"] == moltis.__version__
    assert "Local" in result["instructions"]


@pytest.mark.parametrize(
    ("method", "params", "cached"),
    [
        ("tools/list", {}, True),
        ("resources/list", {}, True),
        ("resources/templates/list", {}, True),
        ("prompts/list", {}, True),
        ("prompts/get", {"name": "look_after_my_machines"}, False),
        ("tools/call", {"name": "nodes_list", "arguments": {}}, False),
    ],
)
def test_each_modern_result_says_what_it_is(web, method, params, cached):
    result = web.modern(method, **params).json["result"]
    assert result["resultType"] == "complete"
    assert ("ttlMs" in result, "cacheScope" in result) == (cached, cached)


def test_the_log_of_a_job_may_be_named_in_base64(web):
    job = web.tool("exec", command="echo out")[1]["id"]
    uri = f"moltis://jobs/{job}/log"
    name = f"=?base64?{base64.b64encode(uri.encode()).decode()}?="
    answer = web.modern("resources/read", uri=uri, headers={"Mcp_Name": name})
    result = answer.json["result"]
    assert (result["ttlMs"], result["contents"][0]["text"]) == (0, "out\n")
    answer = web.modern("resources/read", uri="moltis://jobs/none/log")
    assert (answer.status, answer.json["error"]["code"]) == (400, -32602)


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"meta": None}, 400, -32602),
        ({"meta": {VERSION: "2026-07-28"}}, 400, -32602),
        ({"meta": {**MODERN, VERSION: 7}}, 400, -32602),
        ({"meta": {**MODERN, VERSION: "2027-01-01"}}, 400, -32020),
        ({"headers": {"Mcp_Method": "ping"}}, 400, -32020),
        ({"headers": {"Mcp_Method": None}}, 400, -32020),
        ({"headers": {"Mcp_Name": "exec"}}, 400, -32020),
        ({"headers": {"MCP_Protocol_Version": None}}, 400, -32020),
        ({"headers": {"MCP_Protocol_Version": "2025-11-25"}}, 400, -32020),
    ],
)
def test_a_modern_request_that_says_too_little_is_refused(web, change, status, code):
    answer = web.modern("tools/call", **change, name="nodes_list", arguments={})
    assert (answer.status, answer.json["error"]["code"]) == (status, code)
    assert answer.json["id"] == 1


def test_an_unknown_version_is_answered_with_those_that_are_known(web, client):
    meta = {**MODERN, VERSION: "2027-01-01"}
    named = {"MCP_Protocol_Version": "2027-01-01"}
    answer = web.modern("tools/list", meta=meta, headers=named)
    assert answer.status == 400
    for error in (
        answer.json["error"],
        web.request("tools/list", **named).json["error"],
        client.request(1, "tools/list", {"_meta": meta})["error"],
    ):
        assert error["code"] == -32022
        assert error["data"] == {
            "requested": "2027-01-01",
            "supported": ["2026-07-28", *moltis.LEGACY_MCP],
        }


@pytest.mark.parametrize("method", ["initialize", "ping", "resources/subscribe"])
def test_a_method_that_the_modern_era_lacks_is_404(web, method):
    answer = web.modern(method)
    assert (answer.status, answer.json["error"]["code"]) == (404, -32601)


def test_both_eras_share_one_standard_input(client, gateway):
    """2026-07-28, Versioning: a server may serve both on the same process."""
    with gateway.node("far"):
        client.request(1, "initialize", {"protocolVersion": "2025-06-18"})
        assert client.tool(2, "nodes_select", node="far")[1]["selected"] == "far"
        discovered = client.request(3, "server/discover", {"_meta": MODERN})["result"]
        assert "exec runs by default: none" in discovered["instructions"]
        tools = client.request(4, "tools/list", {"_meta": MODERN})["result"]["tools"]
        assert "nodes_select" not in [tool["name"] for tool in tools]
        call = {"name": "exec", "arguments": {"command": "true"}, "_meta": MODERN}
        result = client.request(5, "tools/call", call)["result"]
        assert result["isError"]  # what was selected is of the older era
        assert client.tool(6, "exec", command="true")[1]["node"] == "far"
    assert client.request(7, "server/discover")["error"]["code"] == -32602
