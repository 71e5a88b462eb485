"""The tools for Model Context Protocol clients, over lines of JSON-RPC 2.0."""

from __future__ import annotations

import json
import queue
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing

import pytest
from peers import InProcessGateway
from support import PROGRAM, clean_environment, wait_for, wait_in_shell

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
        self._lines.put(f"{line}\n".encode())

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
    connection = client._client._client
    params = {"name": "exec", "arguments": {"command": "true " + "x" * (3 << 20)}}
    error = client.request(2, "tools/call", params)["error"]
    assert error["code"] == -32602
    assert "1,048,576 bytes" in error["message"]
    assert client._client._client is connection
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


def test_a_tool_that_is_not_there_is_an_error_that_lists_those_that_are(client):
    error = client.request(1, "tools/call", {"name": "shell"})["error"]
    assert error["code"] == -32602
    assert '"shell"' in error["message"]
    assert "nodes_list" in error["message"]


def test_each_tool_has_a_title_and_annotations_and_results_that_fit_its_schema(client):
    tools = {
        tool["name"]: tool
        for tool in client.request("t", "tools/list")["result"]["tools"]
    }
    reads = {n: tool["annotations"]["readOnlyHint"] for n, tool in tools.items()}
    assert reads == {
        "exec": False,
        "exec_status": False,
        "nodes_list": True,
        "nodes_describe": True,
        "nodes_select": True,
    }
    assert all(tool["title"] for tool in tools.values())
    started = client.tool(0, "exec", command="true", background=True)[1]
    calls = {
        "exec": {"command": "echo out; echo err >&2; kill -9 $$"},
        "exec_status": {"id": started["id"], "wait": 30},
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


class McpProcess:
    """`moltis mcp` as a client starts it."""

    def __init__(self, gateway, home):
        environ = {"MOLTIS_GATEWAY_URL": gateway.url, "MOLTIS_API_KEY": gateway.api_key}
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), "mcp"],
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


def test_a_client_that_reads_no_more_ends_what_it_started(gateway, home):
    mcp = McpProcess(gateway, home)
    mcp.start("sleep 120")
    wait_for(lambda: open_jobs(gateway), what="the command")
    mcp.process.stdout.close()
    mcp.process.stdin.write('{"jsonrpc":"2.0","id":2,"method":"ping"}\n')
    mcp.process.stdin.flush()
    assert mcp.process.wait(60) == moltis.BROKEN_PIPE
    assert mcp.process.stderr.read() == ""
    mcp.process.stderr.close()
    mcp.process.stdin.close()
    (job,) = gateway.call("job.list")
    assert job["state"] == "cancelled"
