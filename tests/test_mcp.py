"""The tools for Model Context Protocol clients, over lines of JSON-RPC 2.0."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading

import pytest
from peers import InProcessGateway
from support import PROGRAM, clean_environment, wait_for, wait_in_shell

import moltis


class McpClient:
    """A client whose every line is written out in the test."""

    def __init__(self, gateway):
        self.answers = []
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
        self.answers.append(json.loads(line))

    def send(self, value):
        line = value if isinstance(value, str) else json.dumps(value)
        self._lines.put(f"{line}\n".encode())

    def request(self, request_id, method, params=None):
        self.send(
            {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}
        )
        return self.answer(request_id)

    def answer(self, request_id):
        return wait_for(
            lambda: next((a for a in self.answers if a.get("id") == request_id), None),
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


def test_errors_of_a_tool_are_results_that_say_so(client):
    failed, result = client.tool(1, "exec", command="true", node="nowhere")
    assert failed
    assert "Local" in result["error"]
    failed, result = client.tool(2, "exec", command=7)
    assert failed
    assert "command must be" in result["error"]


@pytest.mark.parametrize("arguments", [[], "ls", 7])
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


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("{", -32700),
        ("[1]", -32600),
        ('{"id":1}', -32600),
        ('{"id":1,"method":5}', -32600),
        ('{"jsonrpc":"1.0","id":1,"method":"ping"}', -32600),
        ('{"jsonrpc":"2.0","id":null,"method":"ping"}', -32600),
        ('{"jsonrpc":"2.0","id":[1],"method":"ping"}', -32600),
        ('{"jsonrpc":"2.0","id":1,"method":"ping","params":[1]}', -32602),
        ('{"jsonrpc":"2.0","id":1,"method":"sampling/list"}', -32601),
        ('{"jsonrpc":"2.0","id":1,"method":"tools/call"}', -32602),
    ],
)
def test_a_line_that_makes_no_sense_gets_an_error_and_the_next_an_answer(
    client, line, code
):
    client.send(line)
    wait_for(lambda: client.answers, what="an error")
    assert client.answers[0]["error"]["code"] == code
    assert client.request(9, "ping")["result"] == {}


def test_it_is_a_subcommand_that_speaks_on_stdin_and_stdout(gateway, home):
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "mcp"],
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


def test_a_gateway_that_was_away_is_found_again(client):
    assert client.tool(1, "exec", command="echo before")[1]["stdout"] == "before\n"
    client._client._client._ws.abort()
    assert client.tool(2, "exec", command="echo after")[1]["stdout"] == "after\n"


def test_a_command_whose_connection_breaks_goes_on_and_runs_once(client, tmp_path):
    file = tmp_path / "begun"
    command = f"echo run >>{file}; sleep 1; echo out"
    params = {"name": "exec", "arguments": {"command": command}}
    client.send({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})
    wait_for(file.exists)
    client._client._client._ws.abort()
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
