"""MCP clients of others run a scripted session, over standard input and over HTTP.

Each has an environment of its own: the versions of one SDK exclude each other.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from peers import InProcessGateway
from support import PROGRAM, clean_environment, wait_in_shell

PYTHON_CLIENTS = {
    "mcp 1": ["mcp == 1.30.*"],
    "mcp 2": ["mcp == 2.3.*"],
}
NPM_CLIENTS = ["@modelcontextprotocol/sdk@1.32", "@modelcontextprotocol/client@2.4"]

# Each prints one JSON object: what came of the session's steps.
PYTHON_SCRIPT = r"""
import asyncio, contextlib, json, os, sys

kind, era, url, key, program, command, go = sys.argv[1:]
headers = {"Authorization": f"Bearer {key}"}
RUN = {"command": command, "node": "Local"}
CARE = "look_after_my_machines"


def stdio():
    from mcp import StdioServerParameters
    from mcp.client.stdio import stdio_client

    environ = dict(os.environ)
    server = StdioServerParameters(
        command=sys.executable, args=[program, "mcp"], env=environ
    )
    return stdio_client(server)


async def steps(client, name):
    seen, failure = [], None

    async def progress(done, total, message):
        seen.append(message)
        if message == "one":
            open(go, "w").close()

    tools = await client.list_tools()
    tools = getattr(tools, "tools", tools)
    result = await client.call_tool("exec", RUN, progress_callback=progress)
    content = getattr(result, name)
    log = await client.read_resource(content["log"])
    log = getattr(log, "contents", log)[0].text
    prompt = await client.get_prompt(CARE, {})
    try:
        result = await client.call_tool("nothing", {})
    except Exception as error:
        failure = str(error)
    print(json.dumps({
        "tools": [tool.name for tool in tools], "node": content["node"],
        "progress": seen, "log": log, "failure": failure,
        "prompt": prompt.messages[0].content.text,
    }))


async def version_1():
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    transport = stdio() if kind == "stdio" else streamablehttp_client(url, headers)
    async with transport as streams, ClientSession(*streams[:2]) as client:
        await client.initialize()
        await steps(client, "structuredContent")


async def version_2():
    import httpx2
    from mcp import Client
    from mcp.client.streamable_http import streamable_http_client

    async with httpx2.AsyncClient(headers=headers, timeout=60) as web:
        http = streamable_http_client(url, http_client=web)
        async with Client(stdio() if kind == "stdio" else http, mode=era) as client:
            await steps(client, "structured_content")


asyncio.run(version_1() if era == "1" else version_2())
"""

NODE_SCRIPT = r"""
import { writeFileSync } from "node:fs";
const [kind, era, url, key, program, command, go, python] = process.argv.slice(2);
const sdk = "@modelcontextprotocol/sdk/client/", next = "@modelcontextprotocol/client";
const old = era === "sdk";
const { Client } = await import(old ? sdk + "index.js" : next);
const { StreamableHTTPClientTransport } =
  await import(old ? sdk + "streamableHttp.js" : next);
const { StdioClientTransport } = await import(old ? sdk + "stdio.js" : next + "/stdio");
const requestInit = { headers: { Authorization: `Bearer ${key}` } };
const client = new Client({ name: "test", version: "1" },
  era === "auto" ? { versionNegotiation: { mode: "auto" } } : {});
await client.connect(kind === "http"
  ? new StreamableHTTPClientTransport(new URL(url), { requestInit })
  : new StdioClientTransport({ command: python, args: [program, "mcp"],
      env: process.env }));
const progress = [];
const hears = { onprogress: ({ message }) => {
  progress.push(message);
  if (message === "one") writeFileSync(go, "");
} };
const run = { name: "exec", arguments: { command, node: "Local" } };
const result = await client.callTool(run, ...(old ? [undefined, hears] : [hears]));
const content = result.structuredContent;
const log = await client.readResource({ uri: content.log });
const care = { name: "look_after_my_machines", arguments: {} };
const prompt = await client.getPrompt(care);
const failure = await client.callTool({ name: "nothing", arguments: {} })
  .then(() => null, String);
console.log(JSON.stringify({
  tools: (await client.listTools()).tools.map(tool => tool.name), node: content.node,
  progress, log: log.contents[0].text, failure, prompt: prompt.messages[0].content.text,
}));
await client.close();
"""


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """Return a function that installs clients once, and gives their directory."""
    found = {}

    def install(name, commands):
        if name not in found:
            directory = tmp_path_factory.mktemp("clients")
            for command in commands(directory):
                subprocess.run(command, check=True, capture_output=True, cwd=directory)
            found[name] = directory
        return found[name]

    return install


def run_session(gateway, home, command, kind, era, *rest):
    environ = {"MOLTIS_GATEWAY_URL": gateway.url, "MOLTIS_API_KEY": gateway.api_key}
    url, go = f"{gateway.url}/mcp", gateway.directory / "go"
    # The client lets it go on when it hears of the first line.
    run = f"cd {gateway.directory}; echo one; {wait_in_shell('go')}; seq 20000"
    given = (kind, era, url, gateway.api_key, str(PROGRAM), run, str(go), *rest)
    done = subprocess.run(
        [*command, *given],
        env=clean_environment(home, **environ),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(session, gateway, kind):
    assert {"exec", "exec_status", "nodes_list"} <= set(session["tools"])
    assert session["node"] == "Local"
    job = gateway.call("job.list")[0]
    assert job["id"] in session["progress"][0]
    assert "one" in session["progress"]
    assert session["log"].split() == ["one", *(str(n) for n in range(1, 20001))]
    assert "there is no tool" in session["failure"]
    assert "nodes_list" in session["prompt"]


@pytest.mark.skipif(sys.version_info < (3, 10), reason="the SDK needs Python 3.10")
@pytest.mark.parametrize("kind", ["stdio", "http"])
@pytest.mark.parametrize(
    ("client", "era"),
    [("mcp 1", "1"), ("mcp 2", "auto"), ("mcp 2", "legacy"), ("mcp 2", "2026-07-28")],
)
def test_the_python_sdk_runs_a_session(tmp_path, home, installed, client, era, kind):
    def commands(directory):
        yield [sys.executable, "-m", "venv", str(directory)]
        pip = [str(directory / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        yield [*pip, *PYTHON_CLIENTS[client]]

    python = installed(client, commands) / "bin" / "python"
    script = tmp_path / "session.py"
    script.write_text(PYTHON_SCRIPT)
    with InProcessGateway(tmp_path / "gateway") as gateway:
        command = [str(python), str(script)]
        check(run_session(gateway, home, command, kind, era), gateway, kind)


@pytest.mark.parametrize("kind", ["stdio", "http"])
@pytest.mark.parametrize("era", ["sdk", "legacy", "auto"])
def test_the_typescript_clients_run_a_session(tmp_path, home, installed, era, kind):
    npm = shutil.which("npm") or pytest.skip("npm is not installed")
    node = shutil.which("node") or pytest.skip("node is not installed")

    def commands(_directory):
        yield [npm, "install", "--silent", "--no-audit", "--no-fund", *NPM_CLIENTS]

    script = installed("npm", commands) / "session.mjs"
    script.write_text(NODE_SCRIPT)
    with InProcessGateway(tmp_path / "gateway") as gateway:
        command = [node, os.fspath(script)]
        session = run_session(gateway, home, command, kind, era, sys.executable)
        check(session, gateway, kind)
