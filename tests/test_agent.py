"""Agent: runs of scripted models, whose commands are real processes."""

from __future__ import annotations

import json
import os
import threading

import pytest
from support import wait_for

import moltis
from moltis import (
    Agent,
    Approvals,
    Cancellation,
    Cancelled,
    ChatMessage,
    ContextTooLong,
    Delta,
    Finished,
    ModelError,
    PlannedCommand,
    RpcError,
    ShellModel,
    Step,
    ToolCall,
    Verdict,
)


def view(node_id, name, connected=True, **telemetry):
    return {
        "nodeId": node_id,
        "displayName": name,
        "platform": "linux",
        "connected": connected,
        "telemetry": telemetry or None,
    }


class Machines:
    """A fleet whose nodes are this machine, each with another environment."""

    def __init__(self, *views):
        self.list = [view("local", "Local"), *views]
        self.ran = []  # (session key, PlannedCommand)

    def views(self):
        return self.list

    def view(self, node_id):
        return next(v for v in self.list if v["nodeId"] == node_id)

    def resolve(self, reference):
        for found in self.list:
            names = (found["nodeId"], found["displayName"].lower())
            if reference.lower() in names:
                return found["nodeId"], found["displayName"]
        known = ", ".join(v["displayName"] for v in self.list)
        raise RpcError("NOT_FOUND", f"there is no node {reference!r}; there is {known}")

    def execute(self, session_key, planned, on_chunk, cancel):
        self.ran.append((session_key, planned))
        if not self.view(planned.node_id)["connected"]:
            raise RpcError("UNAVAILABLE", f"{planned.node_name} is offline")
        command = moltis.Command(
            moltis.CommandSpec(
                planned.command, cwd=planned.working_dir, timeout=planned.timeout
            ),
            on_chunk,
            environ={**os.environ, "NODE": planned.node_id},
            resumable=False,
        )
        with cancel.calling(command.cancel):
            result = command.run()
        if cancel.cancelled:
            raise Cancelled
        value = {"exitCode": result.exit_code, "durationMs": 1}
        return {**value, "timedOut": True} if result.timed_out else value


class Jobs:
    """A Background whose commands do what the test says, and nothing else."""

    def __init__(self):
        self.started = []  # (session key, PlannedCommand)
        self.cancelled = []
        self.view = {"state": "running", "exitCode": None, "signal": None}
        self.pieces = []  # of output; a position is a number of pieces
        self.waited = []  # s
        self.ended = threading.Event()
        self.ended.set()

    def start(self, session_key, planned):
        self.started.append((session_key, planned))

    def cancel(self, session_key, invoke_id):
        self.cancelled.append(invoke_id)

    def end(self, session_key, invoke_id, wait, cancel):
        self.waited.append(wait)
        with cancel.calling(self.ended.set):
            self.ended.wait(20)
            cancel.pause(0)
        known = {"invokeId": invoke_id, "nodeName": "Pi", "error": None}
        return {**known, **self.view}

    def output(self, session_key, invoke_id, position):
        pieces = self.pieces[position : position + 2]
        return moltis.JobReading(pieces, position + len(pieces))


class Session:
    """A conversation in memory."""

    key = "main"

    def __init__(self):
        self.node_id = "local"
        self.asks_first = False
        self.stored = []

    def select_node(self, node_id):
        self.node_id = node_id

    def messages(self):
        return list(self.stored)

    def append(self, message):
        self.stored.append(message)


class Scripted:
    """A model that does what the test says; it keeps what it was asked."""

    id = "scripted/model"

    def __init__(self, *turns, context_tokens=100_000):
        self.turns = list(turns)
        self.asked = []  # (messages, tools)
        self.context_tokens = context_tokens

    def stream(self, messages, tools, cancel):
        assert list(messages) == moltis.settle_tool_calls(messages)
        self.asked.append((list(messages), list(tools)))
        turn = self.turns.pop(0)
        if callable(turn):
            turn = turn(cancel)
        for event in turn:
            if isinstance(event, Exception):
                raise event
            yield event


def says(text):
    message = ChatMessage("assistant", text)
    return [Delta("text", text), Finished(message, "stop", 100, 10)]


def calls(*named):
    """A turn that calls tools: (name, arguments) each."""
    found = tuple(
        ToolCall(f"call{number}", name, arguments)
        for number, (name, arguments) in enumerate(named)
    )
    return [Finished(ChatMessage("assistant", "", found), "stop", 100, 10)]


class Chat:
    """An agent with what it needs, and all that it did."""

    def __init__(self, *views):
        self.machines = Machines(*views)
        self.session = Session()
        self.audit = []
        self.approvals = Approvals(lambda *decision: self.audit.append(decision))
        self.jobs = Jobs()
        self.agent = Agent(
            self.machines, self.machines.execute, self.jobs, self.approvals
        )
        self.steps = []
        self.cancel = Cancellation()

    def run(self, model, text="go"):
        self.agent.run(self.session, model, text, self.steps.append, self.cancel)
        return self.steps[-1]

    def start(self, model, text="go"):
        thread = threading.Thread(target=self.run, args=(model, text), name="test-run")
        thread.start()
        return thread

    def of(self, state):
        return [step.fields for step in self.steps if step.state == state]

    def results(self):
        """What the model was told of its calls."""
        return [json.loads(m.text) for m in self.session.stored if m.role == "tool"]


@pytest.fixture
def chat():
    return Chat(view("pi-id", "Pi"), view("gpu-id", "GPU box", cpuCount=8))


# --- Runs ---


def test_an_answer_without_tools_is_the_end(chat):
    last = chat.run(Scripted(says("Hello!")), "hi")
    assert last == Step(
        "final",
        {
            "text": "Hello!",
            "model": "scripted/model",
            "reason": "stop",
            "inputTokens": 100,
            "outputTokens": 10,
            "iterations": 1,
        },
    )
    states = [step.state for step in chat.steps]
    assert states == ["user_message", "iteration", "delta", "final"]
    assert chat.session.stored == [
        ChatMessage("user", "hi"),
        ChatMessage("assistant", "Hello!"),
    ]


def test_the_model_lists_describes_selects_and_runs(chat):
    model = Scripted(
        calls(("nodes_list", {})),
        calls(("nodes_describe", {"node": "gpu box"})),
        calls(("nodes_select", {"node": "gpu-id"})),
        calls(("exec", {"command": "echo I am $NODE"})),
        says("It is the GPU box."),
    )
    last = chat.run(model)
    listed, described, selected, ran = chat.results()
    assert [n["node"] for n in listed["nodes"]] == ["Local", "Pi", "GPU box"]
    assert described["telemetry"] == {"cpuCount": 8}
    assert selected == {"selected": "GPU box", "connected": True}
    assert ran == {
        "node": "GPU box",
        "stdout": "I am gpu-id\n",
        "stderr": "",
        "exit_code": 0,
        "duration_ms": 1,
    }
    assert chat.session.node_id == "gpu-id"
    assert last.fields["inputTokens"] == 500
    assert last.fields["iterations"] == 5


def test_output_is_seen_as_it_comes(chat):
    chat.run(
        Scripted(
            calls(("exec", {"command": "echo out; echo err >&2"})),
            says("ok"),
        )
    )
    (start,) = chat.of("tool_call_start")
    assert (start["name"], start["node"], start["command"]) == (
        "exec",
        "Local",
        "echo out; echo err >&2",
    )
    (end,) = chat.of("tool_call_end")
    assert end["result"] == {"node": "Local", "exit_code": 0, "duration_ms": 1}


# --- In the background ---


def piece(offset, data, stream=moltis.STDOUT):
    return moltis.JobPiece(stream, offset, data)


def status(chat, **arguments):
    """Return what exec_status answers."""
    chat.run(Scripted(calls(("exec_status", {"id": "job", **arguments})), says("ok")))
    return chat.results()[-1]


def test_a_command_in_the_background_is_answered_with_its_id(chat):
    arguments = {"command": "make", "background": True, "node": "pi", "timeout": 9}
    chat.run(Scripted(calls(("exec", arguments)), says("ok")))
    ((session_key, planned),) = chat.jobs.started
    assert (session_key, planned.command, planned.node_id) == ("main", "make", "pi-id")
    assert planned.timeout == 9
    (start,) = chat.of("tool_call_start")
    assert start["background"] is True
    assert start["invokeId"] == planned.invoke_id
    expected = {"node": "Pi", "id": planned.invoke_id, "state": "started"}
    assert chat.results() == [expected]
    assert chat.machines.ran == []


def test_the_background_is_no_way_around_a_question(chat):
    chat.session.asks_first = True
    arguments = {"command": "make", "background": True}
    thread = chat.start(Scripted(calls(("exec", arguments)), says("Then not.")))
    asked = wait_for(lambda: chat.of("approval_request"))[0]
    assert asked["background"] is True
    assert chat.jobs.started == []
    chat.approvals.answer(asked["invokeId"], allowed=False, by="me")
    thread.join()
    assert chat.jobs.started == []
    assert "denied" in chat.results()[0]["error"]


@pytest.mark.parametrize(
    ("view", "told"),
    [
        ({"state": "sent", "waiting": False}, {"state": "running"}),
        (
            {"state": "sent", "waiting": False, "place": 3},
            {"state": "in line", "place": 3},
        ),
        (
            {"state": "running", "waiting": True},
            {"state": "waiting for its node to come back"},
        ),
        ({"state": "done", "exitCode": 3}, {"state": "done", "exit_code": 3}),
        ({"state": "lost", "error": "gone"}, {"state": "lost", "error": "gone"}),
    ],
)
def test_a_model_is_told_how_a_command_stands(chat, view, told):
    chat.jobs.view = {**chat.jobs.view, **view}
    known = {"id": "job", "node": "Pi", "stdout": "", "stderr": "", "next_offset": 0}
    assert status(chat) == {**known, **told}
    assert chat.jobs.waited == [0]


def test_output_comes_from_an_offset_on_and_says_what_is_missing(chat):
    character = "ß".encode()
    chat.jobs.pieces = [
        piece(0, b"a" + character[:1]),
        piece(2, character[1:]),
        piece(0, b"oh", moltis.STDERR),
        piece(1003, b"end"),
    ]
    result = status(chat)
    missing = "\n[… 1,000 bytes not kept …]\n"
    assert result["stdout"] == f"aß{missing}end"
    assert (result["stderr"], result["next_offset"]) == ("oh", 4)
    assert status(chat, offset=3)["stdout"] == "end"


def test_a_model_sees_head_and_tail_of_much_output(chat):
    chat.jobs.pieces = [piece(n * 50_000, b"%d" % n * 50_000) for n in range(10)]
    result = status(chat)
    assert len(result["stdout"]) < 31_000
    assert result["stdout"].startswith("000")
    assert result["stdout"].endswith("999")
    assert "cut" in result["stdout"]
    assert result["truncated"] is True
    assert result["next_offset"] == 10


def test_ending_a_command_waits_for_its_end(chat):
    status(chat, cancel=True)
    assert chat.jobs.cancelled == ["job"]
    assert chat.jobs.waited[0] > 0


def test_waiting_for_a_command_ends_with_the_turn_and_the_command_does_not(chat):
    chat.jobs.ended.clear()
    asked = {"id": "job", "wait": 60}
    thread = chat.start(Scripted(calls(("exec_status", asked))))
    wait_for(lambda: chat.jobs.waited)
    chat.cancel.cancel()
    thread.join()
    assert chat.steps[-1] == Step("aborted")
    assert chat.jobs.cancelled == []


@pytest.mark.parametrize("wrong", [{"wait": 61}, {"wait": -1}, {"offset": -1}])
def test_what_cannot_be_waited_for_or_read_is_refused(chat, wrong):
    assert "wait takes 0 to 60 seconds" in status(chat, **wrong)["error"]


# --- Runs of several commands ---


def test_commands_of_one_turn_run_side_by_side(chat, tmp_path):
    """Each waits for the other: one after the other they would never end."""
    one, two = tmp_path / "one", tmp_path / "two"
    os.mkfifo(one)
    os.mkfifo(two)
    chat.run(
        Scripted(
            calls(
                ("exec", {"command": f"echo a > {one}; cat {two}"}),
                ("exec", {"command": f"cat {one}; echo b > {two}", "node": "pi"}),
            ),
            says("ok"),
        )
    )
    assert [(r["node"], r["stdout"]) for r in chat.results()] == [
        ("Local", "b\n"),
        ("Pi", "a\n"),
    ]


def test_a_selection_counts_for_the_calls_that_follow_it_in_the_same_turn(chat):
    chat.run(
        Scripted(
            calls(
                ("exec", {"command": "echo $NODE"}),
                ("nodes_select", {"node": "Pi"}),
                ("exec", {"command": "echo $NODE"}),
                ("nodes_select", {}),
                ("exec", {"command": "echo $NODE"}),
            ),
            says("ok"),
        )
    )
    outputs = [r["stdout"] for r in chat.results() if "stdout" in r]
    assert outputs == ["local\n", "pi-id\n", "local\n"]


def test_timeout_and_directory_reach_the_command(chat, tmp_path):
    arguments = {"command": "pwd; sleep 60", "timeout": 0.3}
    chat.run(
        Scripted(
            calls(("exec", {**arguments, "working_dir": str(tmp_path), "node": None})),
            says("ok"),
        )
    )
    (result,) = chat.results()
    assert result["stdout"] == f"{os.path.realpath(tmp_path)}\n"
    assert result["timed_out"] is True


def test_a_selected_node_that_is_offline_is_an_error_and_not_local():
    chat = Chat(view("pi-id", "Pi", connected=False), view("b", "Box"))
    chat.session.node_id = "pi-id"
    chat.run(Scripted(calls(("exec", {"command": "true"})), says("ok")))
    assert chat.results() == [{"error": "Pi is offline"}]


def test_forty_turns_are_enough():
    chat = Chat()
    turn = calls(("exec", {"command": "true"}))
    last = chat.run(Scripted(*[turn] * 40))
    assert last.state == "error"
    assert "40 turns" in last.fields["message"]
    assert len(chat.machines.ran) == 40


def test_an_error_of_the_model_ends_the_run_and_keeps_what_was_said(chat):
    turn = [Delta("text", "The disk "), ModelError("the stream broke off")]
    last = chat.run(Scripted(turn))
    assert last == Step("error", {"message": "the stream broke off"})
    assert chat.session.stored[-1].text == "The disk \n\n[broken off]"


def test_a_stream_without_end_is_no_answer(chat):
    last = chat.run(Scripted([Delta("text", "half")]))
    assert last.state == "error"


# --- Tools and their arguments ---


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("exec", {}, "command is missing"),
        ("exec", {"command": 5}, "command must be a string"),
        ("exec", {"command": " "}, "command is empty"),
        ("exec", {"command": "ls", "timeout": "5"}, "timeout must be a number"),
        ("exec", {"command": "ls", "timeout": 0}, "timeout must be more than 0"),
        ("exec", {"command": "ls", "host": "pi"}, "it has command, node, timeout"),
        ("exec", {"command": "ls", "node": ""}, "there is Local, Pi, GPU box"),
        ("exec", {"command": "ls", "node": "mars"}, "there is Local, Pi, GPU box"),
        ("nodes_describe", {}, "node is missing"),
        ("nodes_select", {"node": "mars"}, "there is Local, Pi, GPU box"),
        ("nodes_list", {"all": True}, "it has none"),
        ("reboot", {}, "there is exec, exec_status, nodes_list"),
    ],
)
def test_a_wrong_call_gets_a_sentence_that_helps(chat, name, arguments, sentence):
    chat.run(Scripted(calls((name, arguments)), says("sorry")))
    (result,) = chat.results()
    assert sentence in result["error"]
    assert chat.machines.ran == []
    assert chat.session.node_id == "local"
    assert len(chat.of("tool_call_start")) == len(chat.of("tool_call_end")) == 1


def test_arguments_that_were_no_json_are_shown_to_their_author(chat):
    call = ToolCall("a", "exec", {}, malformed='{"command": "ls')
    message = ChatMessage("assistant", "", (call,))
    chat.run(Scripted([Finished(message, "length", 0, 0)], says("sorry")))
    assert '{"command": "ls' in chat.results()[0]["error"]


def test_without_nodes_no_node_is_offered():
    chat = Chat(view("pi-id", "Pi", connected=False))
    model = Scripted(says("ok"))
    chat.run(model)
    tools = model.asked[0][1]
    assert [tool.name for tool in tools] == ["exec", "exec_status"]
    assert not any("node" in tool.parameters["properties"] for tool in tools)


def test_the_prompt_names_the_machines_anew_in_every_turn(chat):
    model = Scripted(calls(("nodes_select", {"node": "pi"})), says("ok"))
    chat.run(model)
    prompts = [messages[0].text for messages, _ in model.asked]
    assert "exec runs by default: Local (local)" in prompts[0]
    assert "exec runs by default: Pi (pi-id)" in prompts[1]
    assert "- GPU box (gpu-id): linux, 8 CPUs" in prompts[0]


def test_a_node_is_described_in_one_line():
    line = moltis.describe_node(
        view(
            "x",
            "Box",
            connected=False,
            cpuCount=4,
            cpuUsage=12.4,
            memTotal=8 * 1024**3,
            memAvailable=1024**3,
            gpus=[{"name": "RTX 4090"}],
        )
    )
    assert line == (
        "Box (x): linux, offline, 4 CPUs, 12 % busy, "
        "memory 1.0 GiB free of 8.0 GiB, GPU RTX 4090"
    )


@pytest.mark.parametrize("node", ["stdout", "stderr", "both"])
def test_a_model_sees_head_and_tail_of_long_output(chat, node):
    loud = "echo begin; head -c 5000000 /dev/zero | tr '\\0' x; echo; echo end"
    command = {"stdout": loud, "stderr": f"({loud}) >&2"}
    command["both"] = f"({loud}); ({loud}) >&2"
    chat.run(Scripted(calls(("exec", {"command": command[node]})), says("ok")))
    (result,) = chat.results()
    assert result["truncated"] is True
    assert len(result["stdout"] + result["stderr"]) < 30_200
    for stream in ("stdout", "stderr") if node == "both" else (node,):
        assert result[stream].startswith("begin\n")
        assert result[stream].endswith("end\n")
        assert " cut …\n" in result[stream]


# --- Cancelling ---


def test_cancelled_while_the_model_speaks(chat):
    def speak(cancel):
        yield Delta("text", "Well, ")
        chat.cancel.cancel()
        yield Cancelled()

    assert chat.run(Scripted(speak)) == Step("aborted")
    assert chat.session.stored[-1].text.startswith("Well, ")


def test_cancelled_while_commands_run(chat, tmp_path):
    thread = chat.start(
        Scripted(
            calls(
                ("exec", {"command": f"touch {tmp_path}/1; sleep 60"}),
                ("exec", {"command": f"touch {tmp_path}/2; sleep 60", "node": "pi"}),
                ("exec", {"command": "echo done"}),
            )
        )
    )
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    wait_for(lambda: len(chat.of("tool_call_end")) == 1)
    chat.cancel.cancel()
    thread.join()
    assert chat.steps[-1] == Step("aborted")
    first, second, third = chat.results()
    assert first == second == {"error": "cancelled by the user"}
    assert third["stdout"] == "done\n"


def test_cancelled_while_a_person_is_asked(chat):
    chat.session.asks_first = True
    thread = chat.start(Scripted(calls(("exec", {"command": "true"}))))
    wait_for(lambda: chat.of("approval_request"))
    chat.cancel.cancel()
    thread.join()
    assert chat.steps[-1] == Step("aborted")
    assert chat.machines.ran == []
    invoke_id = chat.of("approval_request")[0]["invokeId"]
    with pytest.raises(RpcError, match="closed"):
        chat.approvals.answer(invoke_id, allowed=True, by="anna")


# --- Approvals ---


def approve(chat, **answer):
    """Answer the next question of `chat` once it is there."""
    question = wait_for(lambda: open_questions(chat))[0]
    chat.approvals.answer(question["invokeId"], by="anna", **answer)
    return question


def open_questions(chat):
    closed = {fields["invokeId"] for fields in chat.of("approval_resolved")}
    return [f for f in chat.of("approval_request") if f["invokeId"] not in closed]


def test_what_was_approved_is_what_runs_byte_for_byte(chat):
    chat.session.asks_first = True
    command = "echo 'ä  b'\t# \u202e\n"
    arguments = {"command": command, "node": "pi", "working_dir": "/", "timeout": 9}
    thread = chat.start(Scripted(calls(("exec", arguments)), says("ok")))
    question = approve(chat, allowed=True)
    thread.join()
    (key, planned), verdict = chat.machines.ran[0], chat.audit[0][2]
    assert key == "main"
    assert {**question, **planned.fields()} == question
    assert (planned.command, planned.working_dir, planned.timeout) == (command, "/", 9)
    assert (verdict.allowed, verdict.by) == (True, "anna")
    assert chat.of("approval_request")[0]["command"] == command
    assert chat.of("approval_resolved")[0]["by"] == "anna"


def test_a_denial_goes_to_the_model_as_such(chat):
    chat.session.asks_first = True
    thread = chat.start(Scripted(calls(("exec", {"command": "rm x"})), says("ok")))
    approve(chat, allowed=False)
    thread.join()
    assert chat.results() == [{"node": "Local", "error": "denied by the user"}]
    assert chat.machines.ran == []
    assert chat.steps[-1].state == "final"
    assert chat.audit[0][2].allowed is False


def test_always_holds_for_that_node_in_that_session_only(chat):
    chat.session.asks_first = True
    command = ("exec", {"command": "true"})
    thread = chat.start(Scripted(calls(command), calls(command), says("ok")))
    approve(chat, allowed=True, always=True)
    thread.join()
    assert len(chat.machines.ran) == 2
    assert [verdict.by for _, _, verdict in chat.audit] == ["anna", "anna, always here"]

    elsewhere = ("exec", {"command": "true", "node": "pi"})
    thread = chat.start(Scripted(calls(elsewhere), says("ok")))
    assert approve(chat, allowed=True)["nodeId"] == "pi-id"
    thread.join()

    chat.approvals.forget("main")
    thread = chat.start(Scripted(calls(command), says("ok")))
    approve(chat, allowed=False)
    thread.join()
    assert len(chat.machines.ran) == 3


def test_always_answers_the_questions_that_are_open_there_already(chat):
    chat.session.asks_first = True
    here, elsewhere = ({"command": "true", "node": node} for node in ("local", "pi"))
    model = Scripted(calls(*[("exec", x) for x in (here, elsewhere, here)]), says("ok"))
    thread = chat.start(model)
    wait_for(lambda: len(open_questions(chat)) == 3)
    first = next(q for q in open_questions(chat) if q["nodeId"] == "local")
    chat.approvals.answer(first["invokeId"], by="anna", allowed=True, always=True)
    wait_for(lambda: len(open_questions(chat)) == 1)
    assert approve(chat, allowed=False)["nodeId"] == "pi-id"
    thread.join()
    assert len(chat.machines.ran) == 2


def test_nobody_there_to_ask_means_no():
    audit = []
    approvals = Approvals(lambda *decision: audit.append(decision), timeout=0.01)
    planned = PlannedCommand("i", "local", "Local", "true")
    verdict = approvals.ask("main", planned, lambda: None, Cancellation())
    assert not verdict.allowed
    assert "nobody answered" in verdict.reason
    assert audit == [("main", planned, verdict)]
    with pytest.raises(RpcError, match="closed"):
        approvals.answer("i", allowed=True, by="anna")


def test_a_question_is_answered_once():
    approvals = Approvals(lambda *_: None)
    planned = PlannedCommand("i", "local", "Local", "true")

    def answer_twice():
        approvals.answer("i", allowed=True, by="anna")
        with pytest.raises(RpcError):
            approvals.answer("i", allowed=False, by="ben")

    verdict = approvals.ask("main", planned, answer_twice, Cancellation())
    assert verdict == Verdict(True, "anna")


# --- Shell ---


def test_shell_runs_what_was_typed_on_the_selected_node(chat):
    """Nobody is asked: a person typed it."""
    chat.session.asks_first = True
    chat.session.node_id = "pi-id"
    last = chat.run(ShellModel(), "echo $NODE; exit 3")
    (result,) = chat.results()
    assert (result["stdout"], result["exit_code"]) == ("pi-id\n", 3)
    assert last.state == "final"
    assert [m.role for m in chat.session.stored] == ["user", "assistant", "tool"]


def test_an_exclamation_mark_goes_to_shell_under_any_model(chat):
    model = Scripted()
    chat.run(model, "!echo hi")
    assert chat.results()[0]["stdout"] == "hi\n"
    assert model.asked == []


def test_shell_without_a_command_says_so(chat):
    chat.run(ShellModel(), "  ")
    assert chat.results() == [{"error": "command is empty"}]


def test_a_model_knows_afterwards_what_shell_did(chat):
    chat.run(ShellModel(), "echo hi")
    model = Scripted(says("It said hi."))
    chat.run(model, "what did it say?")
    texts = [m.text for m in model.asked[0][0][1:]]
    assert texts[0] == "echo hi"
    assert '"stdout":"hi\\n"' in texts[2]


# --- A history that is too long ---


def turn_of(number, output):
    call = ToolCall(f"c{number}", "exec", {"command": "ls"})
    return [
        ChatMessage("user", f"question {number}"),
        ChatMessage("assistant", "", (call,)),
        ChatMessage("tool", output, tool_call_id=call.id, tool_name="exec"),
        ChatMessage("assistant", f"answer {number}"),
    ]


def history(turns, output):
    messages = [ChatMessage("system", "be good")]
    for number in range(turns):
        messages += turn_of(number, output)
    return messages


def size(messages):
    return sum(map(moltis.message_size, messages))


def test_what_fits_stays_as_it_is():
    messages = history(3, "x" * 1000)
    assert moltis.compact(messages, size(messages)) == (messages, "")


def test_old_output_goes_first():
    messages = history(8, "x" * 5000)
    kept, lost = moltis.compact(messages, size(messages) - 9000)
    assert lost == "left out to save space: 2 old outputs"
    assert len(kept) == len(messages)
    outputs = [m.text for m in kept if m.role == "tool"]
    assert "4,600 characters cut" in outputs[0]
    assert outputs[2:] == ["x" * 5000] * 6
    assert size(kept) <= size(messages) - 9000


def test_old_turns_go_next_and_whole():
    messages = history(8, "x" * 5000)
    kept, lost = moltis.compact(messages, 16_500)
    assert "4 old outputs and" in lost
    assert size(kept) <= 16_500
    assert kept[0].role == "system"
    assert kept[1].role == "user"
    assert moltis.settle_tool_calls(kept) == kept


def test_the_last_question_stays_whatever_happens():
    messages = history(3, "x" * 50_000)
    kept, _ = moltis.compact(messages, 3000)
    assert [m.text for m in kept if m.role == "user"] == ["question 2"]
    assert size(kept) < 3000


def test_compaction_is_shown_once_a_run(chat):
    chat.session.stored = history(9, "x" * 5000)[1:]
    model = Scripted(
        calls(("exec", {"command": "true"})), says("ok"), context_tokens=12_000
    )
    chat.run(model)
    notices = [d["text"] for d in chat.of("delta") if d["kind"] == "notice"]
    assert len(notices) == 1
    assert notices[0].startswith("left out to save space")
    assert len(chat.session.stored) > 36  # what is stored stays whole


def test_a_model_that_holds_less_than_thought_is_asked_with_less(chat):
    chat.session.stored = history(9, "x" * 5000)[1:]
    too_long = [ContextTooLong("maximum context length is 4096 tokens")]
    model = Scripted(too_long, too_long, says("ok"))
    last = chat.run(model)
    assert last.fields["text"] == "ok"
    sizes = [size(messages) for messages, _ in model.asked]
    assert sizes[0] > 2 * sizes[1] - 1000 > sizes[2]


def test_what_can_never_fit_is_an_error(chat):
    too_long = [ContextTooLong("prompt is too long")]
    last = chat.run(Scripted(*[too_long] * 20))
    assert last == Step("error", {"message": "prompt is too long"})


def test_a_command_whose_turn_comes_after_stop_does_not_run(chat):
    """More calls than run side by side: the last wait for the first."""
    chat.session.asks_first = False
    count = moltis.MAX_PARALLEL_CALLS + 2
    named = [("exec", {"command": "sleep 600"}) for _ in range(count)]
    thread = chat.start(Scripted(calls(*named)))
    wait_for(lambda: len(chat.machines.ran) == moltis.MAX_PARALLEL_CALLS)
    chat.cancel.cancel()
    thread.join()
    assert chat.steps[-1] == Step("aborted")
    assert len(chat.machines.ran) == moltis.MAX_PARALLEL_CALLS
