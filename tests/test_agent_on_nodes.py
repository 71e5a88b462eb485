"""The agent with real nodes: a scripted model server, processes, approvals, the CLI."""

from __future__ import annotations

import json
import os
import re
import signal
import threading

import pytest
from browser import Browser
from support import (
    Program,
    ScriptedServer,
    Terminal,
    free_port,
    open_new_chat,
    process_exists,
    run_moltis,
    wait_for,
    wait_in_shell,
)

import moltis


class ModelServer:
    """An OpenAI-compatible server whose answers the test writes, turn by turn."""

    def __init__(self):
        self.turns = []
        self.asked = []  # request bodies
        self.server = ScriptedServer(self.reply)

    def reply(self, handler):
        if handler.path == "/v1/models":
            return 200, {}, [json.dumps({"data": [{"id": "clever"}]}).encode()]
        body = json.loads(handler.body)
        self.asked.append(body)
        turn = self.turns.pop(0)
        documents = turn(body) if callable(turn) else turn
        return 200, {"Content-Type": "text/event-stream"}, map(event, documents)

    def results(self):
        """Return what the tools answered in the last request, one object each."""
        messages = self.asked[-1]["messages"]
        last = max(i for i, m in enumerate(messages) if m["role"] != "tool")
        return [json.loads(m["content"]) for m in messages[last + 1 :]]

    def tool(self, name):
        tools = {t["function"]["name"]: t["function"] for t in self.asked[-1]["tools"]}
        return tools[name]

    def close(self):
        self.server.close()


def event(document):
    text = document if isinstance(document, str) else json.dumps(document)
    return f"data: {text}\n\n".encode()


def says(text):
    usage = {"prompt_tokens": 1200, "completion_tokens": 34}
    return [
        {"choices": [{"delta": {"content": text}, "finish_reason": "stop"}]},
        {"choices": [], "usage": usage},
        "[DONE]",
    ]


def calls(*wanted):
    """A turn that calls tools: (name, arguments) each."""
    deltas = [
        {
            "index": index,
            "id": f"call{index}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)},
        }
        for index, (name, arguments) in enumerate(wanted)
    ]
    delta = {"tool_calls": deltas}
    return [{"choices": [{"delta": delta, "finish_reason": "tool_calls"}]}, "[DONE]"]


# Before that, a page that is left has no cookie for the next.
SIGNED_IN = "!document.querySelector('#app').hidden"


def runs(command, **arguments):
    return calls(("exec", {"command": command, **arguments}))


class Site:
    """A gateway and two nodes, each a process of its own with a HOME of its own."""

    def __init__(self, directory, server):
        self.directory = directory
        nowhere = f"127.0.0.1:{free_port()}"
        self.quiet = {"OLLAMA_HOST": nowhere}
        keys = {"OPENAI_API_KEY": "sk-x", "OPENAI_BASE_URL": server.server.url}
        self.home = self.make_home("gateway")
        self.programs = [
            Program("gateway", "--port", "0", home=self.home, **self.quiet, **keys)
        ]
        self.programs[0].wait_for_output("Ctrl+C stops it.")
        file = json.loads((self.home / ".moltis/gateway.json").read_text())
        self.url, self.key = file["url"], file["api_key"]
        self.events = []
        self.client = moltis.OperatorClient(self.url, self.key, on_news=self.take)
        self.call("subscribe", events=["chat"])

    def take(self, _client, news):
        if isinstance(news, moltis.Event):
            self.events.append(news.payload)

    def make_home(self, name):
        home = self.directory / name
        home.mkdir()
        return home

    def add_node(self, name, **environ):
        token = self.call("device.token.create", displayName=name)["deviceToken"]
        home = self.make_home(name)
        node = Program(
            *("node", "add", "--host", self.url, "--foreground"),
            *("--name", name, "--node-id", f"id-{name}"),
            home=home,
            MOLTIS_DEVICE_TOKEN=token,
            **{**self.quiet, **environ},
        )
        self.programs.append(node)
        node.wait_for_output("connected to")
        return node

    def call(self, method, **params):
        return self.client.call(method, params)

    def chat(self, *arguments, **options):
        return run_moltis("chat", *arguments, home=self.home, **options)

    def send(self, text, session="main"):
        model = "openai/clever"
        sent = self.call("chat.send", sessionKey=session, text=text, model=model)
        return sent["runId"]

    def wait_for_state(self, run_id, *states):
        def found():
            for payload in self.events:
                if payload.get("runId") == run_id and payload["state"] in states:
                    return payload
            return None

        return wait_for(found, what=lambda: f"{states} in {self.events}")

    def end(self, run_id):
        return self.wait_for_state(run_id, "final", "error", "aborted")

    def question(self, run_id):
        """Return the card of a run's command that waits for an approval."""

        def asked():
            for payload in self.events:
                card = payload.get("message", {})
                approval = card.get("command", {}).get("approval", {})
                if payload.get("runId") == run_id and approval.get("state") == "asked":
                    return card
            return None

        return wait_for(asked, what=lambda: f"a question in {self.events}")

    def decide(self, card, decision):
        params = {"id": card["jobId"], "decision": decision}
        return self.call("exec.approval.resolve", **params)

    def audit(self, command):
        rows = self.call("job.list")
        return next(row for row in rows if row["command"] == command)

    def output(self, job_id):
        pieces = self.call("job.read", id=job_id)["pieces"]
        return [[piece["stream"], piece["text"]] for piece in pieces]

    def model_of(self, key):
        return self.call("sessions.resolve", key=key)["entry"]["model"]

    def session(self, label, **choices):
        key = self.call("sessions.create", label=label)["key"]
        self.call("sessions.patch", key=key, **choices)
        return key

    def close(self):
        self.client.close()
        for program in reversed(self.programs):
            program.end()


@pytest.fixture(scope="module")
def server():
    server = ModelServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def running_site(tmp_path_factory, server):
    site = Site(tmp_path_factory.mktemp("site"), server)
    try:
        site.add_node("alpha", LC_NODE="alpha", NODE="alpha")
        site.add_node("beta", NODE="beta")
        yield site
    finally:
        site.close()


@pytest.fixture
def site(running_site, server):
    server.turns.clear()
    server.asked.clear()
    running_site.events.clear()
    yield running_site
    assert server.turns == [], "the model was asked less often than expected"


# -- in the background ----------------------------------------------------------


def test_a_command_in_the_background_is_asked_for_and_audited_like_any_other(
    site, server, tmp_path
):
    key = site.session("background")
    go = tmp_path / "go"
    command = f"echo on $NODE; {wait_in_shell(go)}; exit 7"

    def look(_body):
        job = server.results()[0]["id"]
        return calls(("exec_status", {"id": job, "wait": 60}))

    def open_jobs():  # of this chat: those of others may be ending
        found = site.call("job.list", state="open")
        return [row for row in found if row.get("sessionKey") == key]

    server.turns += [
        runs(command, node="beta", background=True),
        look,
        says("It failed with 7."),
    ]
    run_id = site.send("build it", key)
    question = site.question(run_id)
    assert question["command"]["background"] is True
    assert open_jobs() == []  # nothing runs without an answer
    site.decide(question, "approve")
    row = wait_for(open_jobs)[0]
    assert (row["id"], row["nodeName"]) == (question["jobId"], "beta")
    assert (row["callerKind"], row["sessionKey"]) == ("model", key)
    assert row["decidedBy"] == "owner"
    listed = run_moltis("node", "jobs", "beta", home=site.home)
    assert row["id"] in listed.stdout
    go.touch()
    ended = site.end(run_id)
    assert ended["message"]["text"] == "It failed with 7."
    (result,) = server.results()
    assert (result["node"], result["state"]) == ("beta", "done")
    assert (result["exit_code"], result["stdout"]) == (7, "on beta\n")
    attached = run_moltis("node", "attach", row["id"], home=site.home)
    assert (attached.stdout, attached.returncode) == ("on beta\n", 7)


def test_a_command_in_the_background_that_is_denied_does_not_run(
    site, server, tmp_path
):
    key = site.session("denied background")
    command = f"touch {tmp_path}/ran"
    server.turns += [runs(command, background=True), says("Then not.")]
    run_id = site.send("do it", key)
    site.decide(site.question(run_id), "deny")
    site.end(run_id)
    assert "denied" in server.results()[0]["error"]
    assert site.audit(command)["state"] == "denied"
    assert not (tmp_path / "ran").exists()


def test_the_terminal_says_what_goes_on_in_the_background(site, server):
    server.turns += [runs("true", background=True), says("It runs.")]
    done = site.chat("--model", "openai/clever", "--yes", "start it")
    assert "$ true (in the background)" in done.stderr
    assert done.stdout == "It runs.\n"


# -- the loop on two nodes -----------------------------------------------------


def test_a_model_lists_describes_and_selects_a_node_and_runs_a_command_there(
    site, server
):
    """FAULTS D15, of the selection."""
    key = site.session("walk", approvals="all")
    server.turns += [
        calls(("nodes_list", {})),
        calls(("nodes_describe", {"node": "alpha"})),
        calls(("nodes_select", {"node": "alpha"})),
        runs("echo I am $NODE"),
        says("It is alpha."),
    ]
    ended = site.end(site.send("which machine is it?", key))
    assert ended["state"] == "final"
    assert ended["message"]["text"] == "It is alpha."
    assert ended["message"]["usage"] == {"inputTokens": 1200, "outputTokens": 34}
    (result,) = server.results()
    assert result["node"] == "alpha"
    assert result["stdout"] == "I am alpha\n"
    assert result["exit_code"] == 0
    server.turns.append(says("Still alpha."))
    site.end(site.send("and now?", key))
    question = server.asked[-1]["messages"][-1]["content"]
    assert "Selected machine, where exec runs by default: alpha" in question
    assert "beta (id-beta)" in question
    # Its selection is the model's own: it lasts, and moves nothing of the person's.
    assert site.call("sessions.resolve", key=key)["entry"]["node_id"] is None
    server.turns += [runs("echo again on $NODE"), says("Still alpha.")]
    site.end(site.send("!echo typed on $NODE", key))
    assert site.audit("echo typed on $NODE")["nodeId"] == "local"
    site.end(site.send("and now?", key))
    assert server.results()[-1]["node"] == "alpha"
    site.call("sessions.patch", key=key, node_id="id-beta")
    server.turns += [runs("echo where on $NODE"), says("beta.")]
    site.end(site.send("and now?", key))
    assert server.results()[-1]["node"] == "beta"


def test_what_the_model_did_is_in_the_session_for_those_who_look_later(site, server):
    key = site.session("later", approvals="all")
    server.turns += [runs("echo $NODE", node="beta"), says("beta it is")]
    site.end(site.send("hm?", key))
    history = site.call("chat.history", sessionKey=key)
    assert [m["role"] for m in history] == ["user", "command", "assistant"]
    command = history[1]["command"]
    assert (command["node"], command["command"]) == ("beta", "echo $NODE")
    assert history[1]["job"]["exitCode"] == 0
    assert site.output(history[1]["jobId"]) == [["stdout", "beta\n"]]


def test_a_model_that_thinks_before_it_acts_leaves_no_answer_without_words(
    site, server
):
    key = site.session("thinking", approvals="all")
    thought = {"choices": [{"delta": {"reasoning_content": "Let me see."}}]}
    server.turns += [[thought, *runs("echo 1")], [thought, *says("one")]]
    site.end(site.send("hm?", key))
    history = site.call("chat.history", sessionKey=key)
    roles = ["user", "thinking", "command", "thinking", "assistant"]
    assert [m["role"] for m in history] == roles
    assert history[-1]["text"] == "one"


def test_the_next_turn_remembers_the_one_before(site, server):
    key = site.session("memory", approvals="all")
    server.turns += [runs("echo 4711"), says("done"), says("it was 4711")]
    site.end(site.send("run it", key))
    site.end(site.send("what was it?", key))
    roles = [m["role"] for m in server.asked[-1]["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "user"]
    assert "4711" in server.asked[-1]["messages"][3]["content"]


def test_calls_of_one_turn_run_side_by_side_on_different_nodes(site, server, tmp_path):
    key = site.session("parallel", approvals="all")
    ends = [tmp_path / "a", tmp_path / "b"]
    for end in ends:
        os.mkfifo(end)
    # Each waits for the other: one after the other, they would wait for ever.
    meet = "echo x > {0} & read line < {1}; echo met $NODE"
    server.turns += [
        calls(
            ("exec", {"command": meet.format(*ends), "node": "alpha", "timeout": 20}),
            ("exec", {"command": meet.format(*ends[::-1]), "node": "beta"}),
        ),
        says("both"),
    ]
    site.end(site.send("meet", key))
    outputs = [(r["node"], r["stdout"]) for r in server.results()]
    assert outputs == [("alpha", "met alpha\n"), ("beta", "met beta\n")]


def test_invented_names_get_an_error_that_lists_what_there_is(site, server):
    key = site.session("invented", approvals="all")
    server.turns += [
        calls(("exec", {"command": "true", "node": "gamma"}), ("nodes_teleport", {})),
        runs(" "),
        says("sorry"),
    ]
    site.end(site.send("try", key))
    first = [json.loads(m["content"]) for m in server.asked[1]["messages"][-2:]]
    assert "alpha, beta, Local" in first[0]["error"]
    assert "nodes_select" in first[1]["error"]
    assert server.results() == [{"error": "command is empty"}]


def test_a_node_that_is_away_is_an_error_and_nothing_runs_elsewhere(site, server):
    node = site.add_node("gone")
    key = site.session("away", approvals="all", node_id="id-gone")
    node.end()
    wait_for(lambda: not site.call("node.describe", nodeId="gone")["connected"])
    server.turns += [runs("echo anywhere"), says("it is away")]
    site.end(site.send("go", key))
    (result,) = server.results()
    assert "gone has been offline since" in result["error"]
    assert "stdout" not in result
    site.call("device.token.revoke", deviceId=device_id(site, "gone"))


def device_id(site, name):
    devices = site.call("device.pair.list")
    return next(d["deviceId"] for d in devices if d["displayName"] == name)


# -- approvals -----------------------------------------------------------------


def test_a_command_waits_for_an_approval_that_shows_all_of_it(site, server):
    key = site.session("ask")
    command = "printf '%s' \"$PWD\"; : 'ümläut $(x)'  "
    server.turns += [runs(command, node="alpha", working_dir="/tmp"), says("ok")]
    run_id = site.send("where?", key)
    card = site.question(run_id)
    assert card["command"]["command"] == command
    assert (card["command"]["node"], card["command"]["cwd"]) == ("alpha", "/tmp")
    site.decide(card, "approve")
    assert site.end(run_id)["state"] == "final"
    assert server.results()[0]["stdout"] == "/tmp"
    row = site.audit(command)
    assert row["state"] == "done"
    assert row["decidedBy"]


def test_a_denial_goes_to_the_model_and_into_the_audit(site, server, tmp_path):
    key = site.session("deny")
    command = f"touch {tmp_path}/ran"
    server.turns += [runs(command, node="beta"), says("as you wish")]
    run_id = site.send("do it", key)
    card = site.question(run_id)
    site.decide(card, "deny")
    assert site.end(run_id)["message"]["text"] == "as you wish"
    assert server.results() == [{"node": "beta", "error": "denied by the user"}]
    assert not (tmp_path / "ran").exists()
    row = site.audit(command)
    assert row["state"] == "denied"
    assert row["decidedBy"]
    assert row["nodeId"] == "id-beta"


def test_always_counts_for_this_node_in_this_session_only(site, server):
    key = site.session("always")
    server.turns += [
        runs("echo 1", node="alpha"),
        runs("echo 2", node="alpha"),
        runs("echo 3", node="beta"),
        says("done"),
    ]
    run_id = site.send("three", key)
    site.decide(site.question(run_id), "always")
    wait_for(lambda: len(server.asked) == 3, what="the second command to run unasked")

    def asked_for_beta():
        cards = [p["message"] for p in site.events if "message" in p]
        return [
            card
            for card in cards
            if card.get("command", {}).get("node") == "beta"
            and card["command"].get("approval", {}).get("state") == "asked"
        ]

    card = wait_for(asked_for_beta)[0]
    with pytest.raises(moltis.UserError, match="closed"):
        site.decide({"jobId": "no-such"}, "approve")
    site.decide(card, "approve")
    site.end(run_id)
    other = site.session("other")
    server.turns += [runs("echo 4", node="alpha"), says("done")]
    run_id = site.send("again", other)
    site.decide(site.question(run_id), "deny")
    site.end(run_id)


def test_a_key_without_the_scope_cannot_approve(site, server, tmp_path):
    key = site.session("scope")
    server.turns += [runs("echo no"), says("fine")]
    run_id = site.send("go", key)
    card = site.question(run_id)
    store = moltis.Store(site.home / ".moltis" / moltis.STORE_FILE)
    try:
        scopes = [moltis.Scope.READ, moltis.Scope.WRITE]
        _, text = moltis.Access(store).operators.create_key("writer", scopes)
    finally:
        store.close()
    with moltis.OperatorClient(site.url, text) as client:
        params = {"id": card["jobId"], "decision": "approve"}
        with pytest.raises(moltis.Refused, match=re.escape("operator.approvals")):
            client.call("exec.approval.resolve", params)
    site.decide(card, "deny")
    site.end(run_id)


def test_what_a_person_typed_needs_no_approval(site):
    key = site.session("typed")
    sent = site.call("chat.send", sessionKey=key, text="!echo typed", model="openai/x")
    assert site.end(sent["runId"])["state"] == "final"
    assert site.audit("echo typed")["state"] == "done"


# -- cancel --------------------------------------------------------------------


def test_cancel_while_the_model_is_silent(site, server):
    key = site.session("cancel1")
    leave = threading.Event()

    def silent(_body):
        leave.wait(60)
        yield from ()

    server.turns.append(silent)
    run_id = site.send("hello?", key)
    wait_for(lambda: server.asked)
    site.call("chat.abort", sessionKey=key)
    assert site.end(run_id)["state"] == "aborted"
    leave.set()


def test_cancel_while_a_question_is_open(site, server):
    key = site.session("cancel2")
    server.turns.append(runs("echo never asked"))
    run_id = site.send("go", key)
    card = site.question(run_id)
    site.call("chat.abort", sessionKey=key)
    assert site.end(run_id)["state"] == "aborted"
    with pytest.raises(moltis.UserError, match="closed"):
        site.decide(card, "approve")


def test_cancel_while_a_command_runs_ends_its_process(site, server, tmp_path):
    key = site.session("cancel3", approvals="all")
    pid_file = tmp_path / "pid"
    server.turns.append(runs(f"echo $$ > {pid_file}; sleep 120", node="alpha"))
    run_id = site.send("sleep", key)
    wait_for(lambda: pid_file.exists() and pid_file.read_text().strip())
    pid = int(pid_file.read_text())
    site.call("chat.abort", sessionKey=key)
    assert site.end(run_id)["state"] == "aborted"
    wait_for(lambda: not process_exists(pid), what="the process to end")
    command = f"echo $$ > {pid_file}; sleep 120"
    wait_for(lambda: site.audit(command)["state"] == "cancelled", what="the audit")


# -- a node's own model --------------------------------------------------------


def test_a_model_that_only_a_node_reaches_runs_commands_on_another(site):
    lines = [
        {
            "message": {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {
                        "function": {
                            "name": "exec",
                            "arguments": {"command": "echo $NODE", "node": "beta"},
                        }
                    }
                ],
            },
            "done": False,
        },
        {"message": {"content": ""}, "done": True, "done_reason": "stop"},
    ]
    answers = [lines, [{"message": {"content": "beta said so"}, "done": True}]]
    asked = []

    def reply(handler):
        if handler.path == "/api/tags":
            return 200, {}, [b'{"models": [{"name": "llama3.2"}]}']
        if handler.path == "/api/show":
            return 200, {}, [b'{"capabilities": ["completion", "tools"]}']
        asked.append(json.loads(handler.body))
        return 200, {}, [json.dumps(x).encode() + b"\n" for x in answers.pop(0)]

    with ScriptedServer(reply) as ollama:
        node = site.add_node("gpu", OLLAMA_HOST=ollama.url)
        listed = {m["displayName"]: m for m in site.call("models.list")}
        model = listed["llama3.2 · gpu"]["id"]
        key = site.session("gpu", approvals="all", model=model)
        sent = site.call("chat.send", sessionKey=key, text="who?")
        ended = site.end(sent["runId"])
        node.end()
    assert ended["message"]["text"] == "beta said so"
    assert ended["message"]["model"] == model
    result = json.loads(asked[1]["messages"][-1]["content"])
    assert (result["node"], result["stdout"]) == ("beta", "beta\n")
    site.call("device.token.revoke", deviceId=device_id(site, "gpu"))


# -- the page ------------------------------------------------------------------


def test_a_stranger_asks_on_the_page_approves_one_command_and_reads_the_answer(
    site, server
):
    def answer(_body):
        (result,) = server.results()
        return says(f"**{result['node']}** has most: {result['stdout'].strip()}")

    server.turns += [
        calls(("nodes_list", {})),
        runs("echo five processes of $NODE", node="beta"),
        answer,
    ]
    with Browser() as browser, browser.new_page() as page:
        page.goto(f"{site.url}/#key={site.key}")
        page.wait_for(SIGNED_IN)
        open_new_chat(page)
        pick(page, "model", "clever")
        # A list of chats that was under way may still tell of the model before.
        key = page.evaluate("location.pathname").rpartition("/")[2]
        wait_for(lambda: site.model_of(key) == "openai/clever", what="the choice")
        page.wait_for("!document.querySelector('#approvals').hidden")
        page.click("#text")
        page.type("which of my machines has most free memory?")
        page.press("Enter")
        page.wait_for_text("Waiting for your approval")
        card = page.text("#messages > :last-child")
        assert "echo five processes of $NODE" in card
        assert "beta" in card
        page.click(".approval .main")
        page.wait_for_text("beta has most: five processes of beta")
        assert page.errors == []
    assert site.audit("echo five processes of $NODE")["decidedBy"]


def test_what_would_hide_on_the_page_is_spelt_out_in_the_question(site, server):
    key = site.session("sly page")
    server.turns += [runs("rm -rf /tmp/x #\x1b[2K\u202e\nuptime"), says("no")]
    run_id = site.send("hm?", key)
    card = site.question(run_id)
    with Browser() as browser, browser.new_page() as page:
        page.goto(f"{site.url}/#key={site.key}")
        page.wait_for(SIGNED_IN)
        page.goto(f"{site.url}/chat/{key}")
        page.wait_for_text("Waiting for your approval")
        shown = page.text("#messages > :last-child code")
        assert shown == "rm -rf /tmp/x #\\x1b[2K\\u202e\nuptime"
    site.decide(card, "deny")
    site.end(run_id)


WATCH_BUTTONS = """(() => {
  globalThis.seen = {};
  const look = () => {
    const button = document.querySelector(".approval .main");
    if (!button) return;
    globalThis.seen[button.disabled ? "closed" : "open"] ??= performance.now();
  };
  new MutationObserver(look).observe(document.body,
    {childList: true, subtree: true, attributes: true});
})()"""


def test_the_page_shows_all_of_a_question_before_it_takes_an_answer(site, server):
    key = site.session("all of it")
    hidden = (
        "echo start" + " " * 300 + "; echo after spaces\u200b\u3164\u00a0" + "\n" * 90
    )
    command = hidden + "echo line\n" * 90 + "echo the end"
    directory = "/tmp/\u202egpj.exe"
    server.turns += [runs(command, working_dir=directory), says("no")]
    with Browser() as browser, browser.new_page() as page:
        page.goto(f"{site.url}/#key={site.key}")
        page.wait_for(SIGNED_IN)
        page.goto(f"{site.url}/chat/{key}")
        page.wait_for(SIGNED_IN)
        page.evaluate(WATCH_BUTTONS)
        run_id = site.send("hm?", key)
        card = site.question(run_id)
        page.wait_for("globalThis.seen.open")
        closed, opened = page.evaluate("[globalThis.seen.closed, globalThis.seen.open]")
        assert opened - closed >= 450
        line = "#messages > :last-child .line"
        shown = page.text(line)
        assert shown.startswith(
            "echo start[300 spaces]; echo after spaces\\u200b\\u3164"
        )
        assert "\\xa0[90 line ends]\necho line" in shown
        assert shown.endswith("echo the end")
        box = f"document.querySelector('{line}')"
        assert page.evaluate(f"{box}.scrollHeight <= {box}.clientHeight + 1")
        for part in (".where", ".approval p"):
            text = page.text(f"#messages > :last-child {part}")
            assert "/tmp/\\u202egpj.exe" in text
            assert "\u202e" not in text
        page.screenshot(site.directory / "question.png", full=True)
        site.decide(card, "deny")
        site.end(run_id)


@pytest.mark.parametrize(
    "arguments",
    [
        '{"command": "echo no", "timeout": 1e999}',
        '{"command": "echo no", "timeout": -1e999}',
        '{"command": "echo no", "timeout": NaN}',
        '{"command": "echo no", "timeout": Infinity}',
        '{"command": "echo no", "timeout": ' + "9" * 5000 + "}",
        '{"command": "echo no", "timeout": "5"}',
        '{"command": 1e999}',
        '{"command": ' + "[" * 90_000 + "]" * 90_000 + "}",
        '{"command": "echo no", "more": ' + '{"a":' * 500 + "1" + "}" * 501,
        '{"command": "echo \\ud800"}',
        '["echo no"]',
        '{"command": "echo no"',
        "1e999",
    ],
)
def test_arguments_that_make_no_sense_are_refused_and_the_turn_goes_on(
    site, server, arguments
):
    """Nothing of them is sent on or stored in a form that no JSON reader takes."""
    key = site.session(f"wrong {hash(arguments)}", approvals="all")
    turn = calls(("exec", {}))
    turn[0]["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"] = arguments
    server.turns += [turn, says("I see.")]
    ended = site.end(site.send("go", key))
    assert (ended["state"], ended["message"]["text"]) == ("final", "I see.")
    (result,) = server.results()
    assert set(result) == {"error"}
    assert 10 < len(result["error"]) < 500
    server.turns.append(says("Still here."))
    ended = site.end(site.send("and?", key))
    assert ended["message"]["text"] == "Still here."
    moltis.from_json(json.dumps(server.asked[-1]))


def test_the_page_shows_what_runs_in_the_background_and_stops_it(site, server):
    key = site.session("background page")
    server.turns += [runs("sleep 100", background=True), says("It runs by itself.")]
    run_id = site.send("start it", key)
    site.question(run_id)
    with Browser() as browser, browser.new_page() as page:
        page.goto(f"{site.url}/#key={site.key}")
        page.wait_for(SIGNED_IN)
        page.goto(f"{site.url}/chat/{key}")
        page.wait_for_text("Waiting for your approval · in the background")
        page.click(".approval .main")
        page.wait_for_text("It runs by itself.")
        page.wait_for_text("Running · in the background")
        page.click("article.command [data-part=stop]")
        page.wait_for_text("Cancelled by ")
        assert page.errors == []


def pick(page, picker, label):
    """Choose an option that holds `label`, once it is there."""
    option = f"[...document.querySelectorAll('#{picker}-list [role=option]')]"
    option += f".find(o => o.innerText.includes({json.dumps(label)}))"

    def found():
        if page.evaluate(f"document.querySelector('#{picker}-list').hidden"):
            page.click(f"#{picker}-button")
        return page.evaluate(f"!!({option})")

    wait_for(found, what=f"{label} among the choices")
    page.evaluate(f"({option}).click()")
    text = f"document.querySelector('#{picker}-button').innerText"
    page.wait_for(f"{text}.includes({json.dumps(label)})")


# -- moltis chat ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "words"),
    [("length", "length limit"), ("content_filter", "refused to answer")],
)
def test_an_answer_that_is_not_whole_is_said_and_has_a_status(
    site, server, reason, words
):
    (document, *rest) = says("half of")
    document["choices"][0]["finish_reason"] = reason
    server.turns.append([document, *rest])
    arguments = ("--session", f"cut-{reason}", "--model", "openai/clever", "hm?")
    ended = site.chat(*arguments)
    assert "half of" in ended.stdout
    assert words in ended.stderr
    assert ended.returncode == 1


def test_chat_prints_the_answer_on_stdout_and_the_commands_on_stderr(site, server):
    server.turns += [runs("echo out of $NODE"), says("The answer.")]
    done = site.chat("--model", "openai/clever", "--node", "alpha", "--yes", "hm?")
    assert done.returncode == 0
    assert done.stdout == "The answer.\n"
    assert "[alpha] $ echo out of $NODE\nout of alpha\n" in done.stderr
    assert "1,200 tokens in, 34 out" in done.stderr


def test_chat_names_the_files_that_a_model_reads_and_changes(site, server, tmp_path):
    path = tmp_path / "f"
    path.write_text("one\n")
    server.turns += [
        calls(("file_list", {"path": str(tmp_path)})),
        calls(("file_edit", {"path": str(path), "old": "one", "new": "two"})),
        says("The answer."),
    ]
    done = site.chat("--model", "openai/clever", "--node", "alpha", "--yes", "hm?")
    assert (done.returncode, done.stdout) == (0, "The answer.\n")
    assert path.read_text() == "two\n"
    for words in (f"list {tmp_path}", f"read {path}", f"write {path}"):
        assert f"[alpha] {words}\n" in done.stderr
    rows = site.call("job.list")
    assert [row["work"] for row in rows[:2]] == ["file.write", "file.read"]
    assert rows[0]["callerKind"] == "model"


def test_chat_without_a_terminal_denies(site, server):
    server.turns += [runs("echo never"), says("All right.")]
    done = site.chat("--model", "openai/clever", "--session", "strict", "hm?")
    assert done.returncode == 0
    assert "denied" in done.stderr
    assert "--yes" in done.stderr
    assert server.results()[0]["error"] == "denied by the user"


def test_chat_reads_the_message_from_a_pipe(site):
    done = site.chat("--session", "pipe", stdin="echo from the pipe\n")
    assert done.stdout == "from the pipe\n"
    assert done.returncode == 0


def test_piped_text_for_a_model_is_no_command(site, server, tmp_path):
    """FAULTS D4: whoever wrote the file would have a shell, and nobody is asked."""
    server.turns.append(says("I see."))
    trace = tmp_path / "trace"
    arguments = ("--session", "piped", "--model", "openai/clever")
    done = site.chat(*arguments, stdin=f"!touch {trace}\nand more\n")
    assert done.returncode == 0
    assert done.stdout == "I see.\n"
    assert not trace.exists()
    written = site.chat(*arguments, f"!touch {trace}")
    assert written.returncode == 0
    assert trace.exists()


def test_chat_keeps_the_streams_of_a_typed_command_apart(site):
    line = "echo out; echo err >&2; exit 3"
    done = site.chat("--session", "typed2", "--node", "beta", line)
    assert done.stdout == "out\n"
    assert "err\n" in done.stderr
    assert "[beta] exit status 3" in done.stderr
    assert done.returncode == 3


def test_chat_exits_with_a_failure_when_the_model_fails(site, server):
    server.turns.append([{"error": {"message": "the model fell over"}}])
    done = site.chat("--model", "openai/clever", "hm?")
    assert done.returncode == 1
    assert "the model fell over" in done.stderr
    assert done.stdout == ""


def test_chat_names_the_nodes_there_are_when_one_is_unknown(site):
    done = site.chat("--node", "nowhere", "true")
    assert done.returncode != 0
    assert "alpha, beta, Local" in done.stderr


def test_chat_with_an_unknown_model_says_how_models_are_named(site):
    done = site.chat("--model", "nonsense", "true")
    assert done.returncode == 2
    assert "PROVIDER/NAME" in done.stderr


def test_ctrl_c_ends_the_answer_and_its_command(site, tmp_path):
    pid_file = tmp_path / "pid"
    line = f"echo $$ > {pid_file}; sleep 120"
    chat = Program("chat", "--session", "ctrl-c", line, home=site.home)
    try:
        wait_for(lambda: pid_file.exists() and pid_file.read_text().strip())
        pid = int(pid_file.read_text())
    finally:
        assert chat.end(signal.SIGINT) == 130
    wait_for(lambda: not process_exists(pid), what="the process to end")


def test_on_a_terminal_chat_asks_and_approves(site, server):
    server.turns += [runs("echo yes I ran"), says("Good.")]
    arguments = ("chat", "--session", "tty", "--model", "openai/clever", "hm?")
    terminal = Terminal(*arguments, home=site.home)
    try:
        terminal.wait_for("[y]es, [n]o, [a]lways")
        assert "May this run on Local?\n    echo yes I ran" in terminal.text
        terminal.type("what\n")
        terminal.type("y\n")
        terminal.wait_for("Good.")
    finally:
        assert terminal.close() == 0
    assert server.results()[0]["stdout"] == "yes I ran\n"


def test_a_line_that_was_typed_while_the_model_thought_approves_nothing(site, server):
    """FAULTS D5"""
    server.turns += [runs("echo never"), says("Good.")]
    arguments = ("chat", "--session", "tty3", "--model", "openai/clever", "hm?")
    terminal = Terminal(*arguments, home=site.home)
    terminal.type("yes\n" * 3)  # before the model was even asked
    try:
        terminal.wait_for("[y]es, [n]o, [a]lways")
        terminal.type("nothing of the kind\n")
        terminal.type("no\n")
        terminal.wait_for("Good.")
    finally:
        assert terminal.close() == 0
    assert server.results()[0]["error"] == "denied by the user"


def test_ctrl_c_at_the_question_ends_the_run(site, server):
    server.turns.append(runs("echo never"))
    arguments = ("chat", "--session", "tty2", "--model", "openai/clever", "hm?")
    terminal = Terminal(*arguments, home=site.home)
    try:
        terminal.wait_for("[y]es, [n]o, [a]lways")
        terminal.process.send_signal(signal.SIGINT)
    finally:
        assert terminal.close() == 130
    assert "never" not in terminal.text.replace("echo never", "")


def test_what_would_hide_in_a_terminal_is_spelt_out_in_the_question(site, server):
    sly = "rm -rf /tmp/x #\x1b[2K\rls \u202e\nuptime"
    server.turns += [runs(sly), says("I see\x1b[2J.")]
    arguments = ("chat", "--session", "sly", "--model", "openai/clever", "hm?")
    terminal = Terminal(*arguments, home=site.home)
    try:
        terminal.wait_for("[y]es, [n]o, [a]lways")
        assert "rm -rf /tmp/x #\\x1b[2K\\rls \\u202e\n    uptime\n" in terminal.text
        terminal.type("n\n")
        terminal.wait_for("I see[2J.")
    finally:
        assert terminal.close() == 0
    assert "\x1b" not in terminal.text
    assert site.audit(sly)["state"] == "denied"


def test_without_a_message_chat_is_a_prompt(site):
    terminal = Terminal("chat", "--session", "prompt", home=site.home)
    try:
        terminal.wait_for("Local · Shell › ")
        terminal.type("echo first $((40 + 2))\n")
        terminal.wait_for("first 42")
        terminal.type("sleep 120\n")
        session = next(s for s in site.call("sessions.list") if s["label"] == "prompt")
        wait_for(lambda: running(site, session["key"]), what="the command to run")
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("cancelled")
        terminal.type("echo second $((40 + 3))\n")
        # Ctrl+D means the end only to a prompt that is there.
        terminal.wait_for("second 43\nLocal · Shell › ")
        terminal.type("\x04")
    finally:
        assert terminal.close() == 0


def running(site, key):
    history = site.call("chat.history", sessionKey=key)
    cards = [m for m in history if "command" in m]
    return any(c["command"]["command"] == "sleep 120" and "job" in c for c in cards)
