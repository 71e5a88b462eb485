"""Sessions as people see them: turns, cards, and catching up with both."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import threading
import types
import urllib.error
import urllib.request

import pytest
from machines import Machines
from peers import InProcessGateway, RawPeer
from support import (
    Program,
    ScriptedServer,
    free_port,
    process_exists,
    wait_for,
    wait_in_shell,
)

import moltis

FINAL = ("done", "error", "aborted", "interrupted")


class Watcher:
    """A client that keeps its messages equal to the gateway's, as the page does."""

    def __init__(self, url, api_key, session="main"):
        self.session = session
        self.rows = {}
        self.events = []
        self._peer, self._reader = (sign_in(url, api_key) for _ in range(2))
        self._peer.request("subscribe", {"events": ["chat", "session"]})

    def send(self, text, **params):
        """Have `text` answered; return the payload of the answer."""
        params = {"sessionKey": self.session, "text": text, **params}
        self._peer.send(
            {"type": "req", "id": "send", "method": "chat.send", "params": params}
        )
        return self.take(lambda m: m.get("id") == "send")["payload"]

    def take(self, wanted, timeout=60):
        """Return the first message for which `wanted`, and apply all up to it."""
        while True:
            message = self._peer.receive(timeout)
            assert message is not None, "the gateway hung up"
            if message.get("event") == "chat":
                payload = message["payload"]
                if payload["sessionKey"] == self.session:
                    self.events.append(payload)
                    self.apply(payload)
            if wanted(message):
                return message

    def until(self, condition, timeout=60):
        """Apply what comes until `condition()`, and return that."""
        while not condition():
            self.take(lambda _: True, timeout)
        return condition()

    def apply(self, event):
        row = event.get("message")
        if row is not None:
            self.rows[row["id"]] = row
        elif event["state"] == "delta":
            row = self.rows[event["messageId"]]
            row["text"] += event["text"]
            row["seq"] = event["seq"]

    def of(self, role):
        """Return the messages of a role in the order of the page."""
        rows = [row for row in self.rows.values() if row["role"] == role]
        return sorted(rows, key=lambda r: (r["state"] == "queued", r["createdAt"]))

    def finish(self, count=1):
        """Return the first `count` cards once they have ended."""
        self.until(
            lambda: sum(row["state"] in FINAL for row in self.of("command")) >= count
        )
        return self.of("command")

    def saw(self, state):
        return any(event["state"] == state for event in self.events)

    def card(self):
        """Return the first card once its job has started."""
        self.until(lambda: any("job" in row for row in self.of("command")))
        return next(row for row in self.of("command") if "job" in row)

    def text(self, card, stream=None):
        """Return the output of a card's job, as the page reads it."""
        return read_output(self._reader, card["jobId"], stream)

    def first_output(self):
        """Return the output of the first card once there is some."""
        card = self.card()
        return wait_for(lambda: self.text(card), what="output")

    def close(self):
        self._peer.close()
        self._reader.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def sign_in(url, api_key):
    peer = RawPeer(url)
    params = {"role": "operator", "auth": {"api_key": api_key}}
    answer = peer.request("connect", params)
    assert answer["ok"], answer
    return peer


def read_output(peer, job_id, stream=None):
    """Return what `job.read` tells of a job's output, of one stream or of both."""
    texts, offset = [], 0
    while True:
        answer = peer.request("job.read", {"id": job_id, "offset": offset})
        assert answer["ok"], answer
        payload = answer["payload"]
        if payload["offset"] > offset:
            texts.append(f"[{payload['offset'] - offset} cut]")
        if not payload["pieces"] and payload["next"] <= offset:
            return "".join(texts)
        texts += [
            piece["text"]
            for piece in payload["pieces"]
            if stream in (None, piece["stream"])
        ]
        offset = payload["next"]


@pytest.fixture
def gateway(tmp_path):
    environ = {k: v for k, v in os.environ.items() if not k.endswith("_API_KEY")}
    with InProcessGateway(tmp_path / "gateway", environ=environ) as running:
        yield running


@pytest.fixture
def chat(gateway):
    with Watcher(gateway.websocket_url, gateway.api_key) as watcher:
        yield watcher


# -- turns ---------------------------------------------------------------------


def test_what_is_typed_runs_and_its_card_says_how_it_ended(gateway, chat):
    assert chat.send("echo hi; echo no >&2; exit 3")["ok"]
    (card,) = chat.finish()
    assert card["state"] == "done"
    assert chat.text(card, "stdout") == "hi\n"
    assert chat.text(card, "stderr") == "no\n"
    command, job = card["command"], card["job"]
    assert (command["node"], command["nodeId"]) == ("Local", "local")
    assert command["command"] == "echo hi; echo no >&2; exit 3"
    assert card["jobId"] == job["id"]
    assert (job["exitCode"], job["words"], job["failed"]) == (
        3,
        "exit status 3",
        True,
    )
    assert job["askedAt"] <= job["endedAt"]
    chat.until(lambda: chat.saw("final"))
    (said,) = chat.of("user")
    assert (said["state"], said["text"]) == ("done", "echo hi; echo no >&2; exit 3")
    assert said["createdAt"] < card["createdAt"]


def test_a_card_names_its_job_from_the_start_and_events_hold_no_output(chat, tmp_path):
    chat.send(f"echo first; {wait_in_shell(tmp_path / 'go')}; echo second")
    card = chat.card()
    assert (card["state"], card["job"]["state"]) == ("running", "running")
    assert chat.first_output() == "first\n"
    (tmp_path / "go").touch()
    (card,) = chat.finish()
    assert chat.text(card) == "first\nsecond\n"
    assert not any("second\\n" in json.dumps(event) for event in chat.events)
    told = [e["state"] for e in chat.events if e.get("messageId") == card["id"]]
    assert told == ["tool_call_start", "tool_call_start", "tool_call_end"]


def test_commands_run_on_the_node_of_the_session_and_nowhere_else(gateway, chat):
    with gateway.node("far"):
        answer = gateway.call("nodes.set_session", session_key="main", node_id="FAR")
        assert answer == {"ok": True, "node_id": "id-of-far"}
        chat.send("echo there")
        (card,) = chat.finish()
        assert card["command"]["nodeId"] == "id-of-far"
        assert card["command"]["node"] == "far"
        assert chat.text(card) == "there\n"
    wait_for(lambda: not gateway.is_connected("id-of-far"))
    chat.send("echo here")
    cards = chat.finish(2)
    assert cards[1]["state"] == "error"
    assert "far has been offline since" in cards[1]["command"]["error"]
    assert "job" not in cards[1]
    (entry,) = gateway.call("sessions.list")
    assert entry["node_id"] == "id-of-far"


def test_one_turn_at_a_time_and_the_others_wait_in_line(chat, tmp_path):
    assert "queued" not in chat.send(f"{wait_in_shell(tmp_path / 'go')}; echo one")
    chat.card()
    assert chat.send("echo two")["queued"]
    chat.until(lambda: any(row["state"] == "queued" for row in chat.of("user")))
    assert len(chat.of("command")) == 1
    (tmp_path / "go").touch()
    one, two = chat.finish(2)
    assert (chat.text(one), chat.text(two)) == ("one\n", "two\n")
    assert one["job"]["endedAt"] <= two["job"]["askedAt"]
    # In the order in which things happened, not that in which they were typed.
    rows = sorted(chat.rows.values(), key=lambda row: row["createdAt"])
    assert [row["role"] for row in rows] == ["user", "command", "user", "command"]


def test_sessions_do_not_wait_for_each_other(gateway, chat, tmp_path):
    chat.send(wait_in_shell(tmp_path / "go"))
    other = gateway.call("sessions.create", label="Other")
    assert other["label"] == "Other"
    with Watcher(gateway.websocket_url, gateway.api_key, other["key"]) as second:
        second.send("echo done")
        (card,) = second.finish()
        assert second.text(card) == "done\n"
    (tmp_path / "go").touch()
    chat.finish()


def test_an_abort_ends_the_command_and_what_waits_in_line(gateway, chat):
    chat.send("echo $$; sleep 100")
    chat.send("echo never")
    pid = int(chat.first_output())
    answer = gateway.call("chat.abort", sessionKey="main")
    assert answer["aborted"]
    (card,) = chat.finish()
    assert card["state"] == "aborted"
    assert card["job"]["state"] == "cancelled"
    assert "owner" in card["job"]["words"], "by whom"
    wait_for(lambda: not process_exists(pid), what="the end of the command")
    chat.until(lambda: chat.of("user")[1]["state"] == "aborted")
    wait_for(lambda: not gateway.call("sessions.list")[0]["replying"])
    assert not gateway.call("chat.abort", sessionKey="main")["aborted"]


def test_a_turn_that_is_stopped_before_it_begins_is_not_the_session_s_last():
    """A thread that found nothing left to do died, and no other one began."""
    taken = []
    queue = moltis.TurnQueue("main", lambda turn, _: taken.append(turn), lambda: None)
    person = types.SimpleNamespace(id="key")
    turns = [types.SimpleNamespace(asked_by=person) for _ in range(2)]
    run = queue._run
    queue._run = lambda: (queue.abort(), run())  # Stop is faster
    queue.add(turns[0])
    wait_for(lambda: queue._thread is None, what="its thread to end")
    queue._run = run
    queue.add(turns[1])
    wait_for(lambda: taken == turns[1:], what="the next turn")
    queue.close()


def test_stopping_one_card_is_enough(gateway, chat):
    chat.send("sleep 100")
    gateway.call("job.cancel", id=chat.card()["jobId"])
    (card,) = chat.finish()
    assert (card["state"], card["job"]["state"]) == ("aborted", "cancelled")


def test_a_turn_goes_on_when_whoever_asked_has_left(gateway, tmp_path):
    with Watcher(gateway.websocket_url, gateway.api_key) as first:
        first.send(f"{wait_in_shell(tmp_path / 'go')}; echo finished")
    (tmp_path / "go").touch()

    def card():
        last = history_of(gateway)[-1]
        ended = (last["role"], last["state"]) == ("command", "done")
        return last if ended else None

    assert output_of(gateway, wait_for(card)) == "finished\n"


def output_of(gateway, card):
    pieces = gateway.call("job.read", id=card["jobId"])["pieces"]
    return "".join(piece["text"] for piece in pieces)


def test_a_command_that_cannot_start_says_why(gateway, chat):
    chat.send("x" * (3 * 1024 * 128))
    (card,) = chat.finish()
    assert card["state"] == "error"
    assert card["job"]["state"] == "failed"
    assert card["job"]["reason"]


def test_what_was_accepted_is_not_lost_with_a_gateway_that_is_killed(restartable):
    """FAULTS A26: all are sent at once, and it is killed with the last answer."""
    with restartable.watch() as chat:
        request = {"type": "req", "id": "send", "method": "chat.send"}
        for number in range(8):
            text = f"sleep 60; echo {number}"
            chat._peer.send({**request, "params": {"text": text}})
        for _ in range(8):
            assert chat.take(lambda m: m.get("id") == "send")["ok"]
        restartable.program.end(9)
    restartable.start()
    said = [row for row in history_of(restartable) if row["role"] == "user"]
    assert [row["text"][-1] for row in said] == list("01234567")
    assert [row["state"] for row in said[1:]] == ["interrupted"] * 7


def test_a_long_turn_that_the_end_of_the_gateway_cut_is_said_to_be_once(tmp_path):
    """Also where more messages than a page of the history came after what it cut."""
    store = moltis.Store(tmp_path / moltis.STORE_FILE)
    fields = {"label": "", "model": moltis.SHELL_ID, "node_id": moltis.LOCAL_ID}
    store.sessions.add(moltis.Session("main", created_at=1, updated_at=1, **fields))
    store.sessions.change("main", run_id="r")
    for number in range(moltis.HISTORY_PAGE + 2):
        message = moltis.SessionMessage(
            id=f"m{number}",
            session_key="main",
            run_id="r",
            role="notice" if number else "assistant",
            created_at=number,
            state="done" if number else "running",
            seq=number,
        )
        store.messages.save(message)
    store.close()
    with InProcessGateway(tmp_path) as gateway:
        assert history_of(gateway)[-1]["id"] == f"m{moltis.HISTORY_PAGE + 1}"


# -- catching up ---------------------------------------------------------------


def test_events_are_numbered_without_gaps_and_history_agrees_with_them(gateway, chat):
    for text in ("echo a", "echo b >&2", "echo c"):
        chat.send(text)
    chat.finish(3)
    chat.until(lambda: sum(e["state"] == "final" for e in chat.events) == 3)
    numbers = [event["seq"] for event in chat.events]
    assert numbers == list(range(1, len(numbers) + 1))
    history = history_of(gateway)
    assert history == sorted(chat.rows.values(), key=lambda row: row["createdAt"])
    middle = history[2]["seq"]
    newer = gateway.call("chat.history", sessionKey="main", after=middle)
    assert newer == [row for row in history if row["seq"] > middle]
    older = gateway.call(
        "chat.history", sessionKey="main", before=history[2]["createdAt"]
    )
    assert older == history[:2]


def test_history_has_the_jobs_of_cards_as_they_are_now(gateway, chat, tmp_path):
    chat.send(f"echo so far; {wait_in_shell(tmp_path / 'go')}")
    chat.first_output()
    row = gateway.call("chat.history", sessionKey="main", after=1)[-1]
    assert (row["state"], row["job"]["state"]) == ("running", "running")
    assert row["job"]["end"] > 0
    assert row["seq"] == chat.events[-1]["seq"]
    (tmp_path / "go").touch()
    (card,) = chat.finish()
    assert history_of(gateway)[-1] == card
    assert card["job"]["stdoutBytes"] == len("so far\n")


def test_the_output_of_a_card_can_be_downloaded_whole_by_those_who_may(gateway, chat):
    chat.send("seq 100000; printf 'h\\303\\251llo'")
    (card,) = chat.finish()
    path = f"/api/jobs/{card['jobId']}/output"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(gateway.url + path)
    assert refused.value.code == 401
    refused.value.close()
    with download(gateway, path) as answer:
        lines = answer.read().decode().splitlines()
        assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert answer.headers["Content-Disposition"].startswith("attachment;")
    assert lines == [*map(str, range(1, 100_001)), "héllo"]
    with pytest.raises(urllib.error.HTTPError) as missing:
        download(gateway, f"/api/jobs/{moltis.new_id()}/output")
    assert missing.value.code == 404
    missing.value.close()


def test_the_output_of_a_chat_goes_with_it(gateway, chat):
    chat.send("seq 100000")
    (card,) = chat.finish()
    kept = gateway.directory / "jobs" / card["jobId"]
    assert kept.is_dir()
    gateway.call("sessions.reset", key=chat.session)
    assert not kept.exists()
    assert chat.text(card) in ("", f"[{card['job']['end']} cut]")


def make_older(gateway, days):
    """Move all that chats have, and their jobs, `days` into the past."""
    past = days * 86_400_000
    with contextlib.closing(sqlite3.connect(gateway.directory / "moltis.db")) as db:
        db.execute("UPDATE sessions SET updated_at = updated_at - ?", (past,))
        db.execute("UPDATE messages SET created_at = created_at - ?", (past,))
        db.execute(
            "UPDATE jobs SET asked_at = asked_at - :past, ended_at = ended_at - :past",
            {"past": past},
        )
        db.commit()


def test_chats_that_are_not_used_go_after_the_days_that_were_said(
    tmp_path, monkeypatch
):
    """FAULTS D25: messages, cards, and the logs of their jobs."""
    with InProcessGateway(tmp_path / "gateway", keep_chats=30.0) as gateway:
        keys = {"main": "main"}
        for name in ("old", "busy", "new"):
            keys[name] = gateway.call("sessions.create", label=name)["key"]
        logs = {}
        for name in ("main", "old"):
            with Watcher(gateway.websocket_url, gateway.api_key, keys[name]) as chat:
                chat.send("seq 100000")
                (card,) = chat.finish()
                # Its message is written once more, with the time that it had.
                chat.until(lambda: chat.saw("final"))
                logs[name] = gateway.directory / "jobs" / card["jobId"]
        busy = Watcher(gateway.websocket_url, gateway.api_key, keys["busy"])
        busy.send("sleep 100")
        busy.card()
        assert gateway.call("sessions.storage")["bytes"] > 0
        make_older(gateway, 31)
        with Watcher(gateway.websocket_url, gateway.api_key, keys["new"]) as chat:
            chat.send("echo new")
            chat.finish()
        gateway.running.keep_house()
        assert logs["old"].is_dir(), "the clock is not relied upon yet"
        monkeypatch.setattr(moltis, "STEADY_AFTER", 0.0)
        gateway.running.keep_house()
        left = {entry["key"] for entry in gateway.call("sessions.list")}
        assert left == {keys["main"], keys["busy"], keys["new"]}
        counts = {e["key"]: e["messageCount"] for e in gateway.call("sessions.list")}
        assert counts == {keys["main"]: 0, keys["busy"]: 2, keys["new"]: 2}
        assert not any(path.exists() for path in logs.values())
        assert gateway.call("sessions.storage")["keepDays"] == 30
        gateway.call("chat.abort", sessionKey=keys["busy"])
        busy.finish()
        busy.close()


def test_chats_are_kept_for_ever_unless_days_are_said(gateway, chat, monkeypatch):
    monkeypatch.setattr(moltis, "STEADY_AFTER", 0.0)
    chat.send("echo old")
    chat.finish()
    make_older(gateway, 10_000)
    gateway.call("sessions.create")
    gateway.running.keep_house()
    assert len(gateway.call("chat.history", sessionKey="main")) == 2
    assert gateway.call("sessions.storage")["keepDays"] is None


def download(gateway, path):
    headers = {"Authorization": f"Bearer {gateway.api_key}"}
    return urllib.request.urlopen(
        urllib.request.Request(gateway.url + path, headers=headers)
    )


@pytest.mark.parametrize("path", ["/", "/chat/main", "/settings/nodes"])
def test_each_view_of_the_page_has_an_address(gateway, path):
    with urllib.request.urlopen(gateway.url + path) as answer:
        page = answer.read().decode().replace("../", "")  # to its script and styles
        assert page == moltis.WEB_HTML.decode()
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert "unsafe" not in answer.headers["Content-Security-Policy"]


# -- sessions ------------------------------------------------------------------


def test_a_session_is_labelled_by_its_first_message(gateway):
    key = gateway.call("sessions.create")["key"]
    with Watcher(gateway.websocket_url, gateway.api_key, key) as watcher:
        watcher.send("echo hello")
        watcher.finish()
    entry = gateway.call("sessions.resolve", key=key)["entry"]
    assert entry["label"] == "echo hello"
    assert entry["messageCount"] == 2
    assert entry["preview"] == "echo hello"
    renamed = gateway.call("sessions.patch", key=key, label="Greetings", archived=True)
    assert renamed["label"] == "Greetings"
    assert renamed["archived"]
    assert gateway.call("sessions.patch", key=key, label=" ")["label"] == ""


def test_sessions_are_told_to_those_who_watch(gateway, chat):
    key = gateway.call("sessions.create", label="New")["key"]
    gateway.call("sessions.patch", key=key, node_id="local", approvals="all")
    gateway.call("sessions.reset", key=key)
    gateway.call("sessions.delete", key=key)
    kinds = []
    while not kinds or kinds[-1] != "deleted":
        event = chat.take(lambda m: m.get("event") == "session")["payload"]
        assert event["sessionKey"] == key
        kinds.append(event["type"])
    assert kinds == ["created", "patched", "reset", "deleted"]


def test_a_reset_forgets_what_was_said_and_ends_what_runs(gateway, chat):
    chat.send("echo $$; sleep 100")
    pid = int(chat.first_output())
    last = chat.events[-1]["seq"]
    gateway.call("sessions.reset", key="main")
    assert not process_exists(pid)
    assert gateway.call("chat.history", sessionKey="main") == []
    chat.rows.clear()
    chat.send("echo anew")
    (card,) = chat.finish()
    assert card["seq"] > last, "numbers go on, so that no client takes old for new"


@pytest.mark.parametrize(
    ("method", "params", "code"),
    [
        ("chat.send", {"sessionKey": "none", "text": "hi"}, "NOT_FOUND"),
        ("chat.send", {"sessionKey": "main", "text": "  "}, "INVALID_REQUEST"),
        ("chat.send", {"text": "hi", "model": "nothing"}, "INVALID_REQUEST"),
        ("chat.history", {"sessionKey": "none"}, "NOT_FOUND"),
        ("chat.abort", {"sessionKey": "none"}, "NOT_FOUND"),
        ("sessions.patch", {"key": "none", "label": "x"}, "NOT_FOUND"),
        ("sessions.patch", {"key": "main", "model": "nothing"}, "INVALID_REQUEST"),
        ("sessions.patch", {"key": "main", "node_id": "nowhere"}, "NOT_FOUND"),
        ("sessions.patch", {"key": "main", "approvals": "maybe"}, "INVALID_REQUEST"),
        ("sessions.delete", {"key": "main"}, "INVALID_REQUEST"),
        ("sessions.delete", {"key": "none"}, "NOT_FOUND"),
        ("exec.approval.resolve", {"id": "none", "decision": "approve"}, "NOT_FOUND"),
        ("exec.approval.resolve", {"id": "none", "decision": "yes"}, "INVALID_REQUEST"),
    ],
)
def test_what_makes_no_sense_is_refused(gateway, method, params, code):
    with sign_in(gateway.websocket_url, gateway.api_key) as peer:
        assert peer.request(method, params)["error"]["code"] == code


def test_commands_of_chats_are_in_the_audit(gateway, chat):
    chat.send("exit 4")
    chat.finish()
    (row,) = gateway.call("job.list", nodeId="local", state="done")
    assert row["command"] == "exit 4"
    assert row["exitCode"] == 4
    assert row["sessionKey"] == "main"
    assert row["callerKind"] == "chat"
    assert gateway.call("job.list", state="failed") == [row]
    assert gateway.call("job.list", state="cancelled") == []
    assert gateway.call("job.list", before=row["seq"]) == []


def test_the_load_of_the_last_half_hour_is_remembered(gateway):
    readings = gateway.call("telemetry.history", nodeId="local")
    assert readings
    for at, *percents in readings:
        assert at > 1_600_000_000_000
        assert len(percents) == 3  # CPU, memory, disk
        assert all(0 <= p <= 100 for p in percents if p is not None)


# -- models --------------------------------------------------------------------


class ScriptedOllama:
    """A model that gives the answers of a list, and keeps what it was asked."""

    def __init__(self, answers):
        self._answers = list(answers)
        self.asked = []
        self.held = threading.Event()  # the last piece of an answer waits for it
        self.held.set()
        self.server = ScriptedServer(self._reply)

    def _reply(self, request):
        if not request.path.endswith("/api/chat"):
            return 200, {}, [b'{"models": []}']
        self.asked.append(json.loads(request.body))
        message = self._answers.pop(0)
        message = message(self) if callable(message) else message
        return 200, {"Content-Type": "application/x-ndjson"}, self._stream(message)

    def results(self):
        """Return what the tools answered in the last request."""
        messages = self.asked[-1]["messages"]
        return [json.loads(m["content"]) for m in messages if m["role"] == "tool"]

    def _stream(self, message):
        yield line({"message": {"role": "assistant", **message}, "done": False})
        self.held.wait(60)
        yield line(
            {
                "message": {"role": "assistant", "content": ""},
                "done": True,
                "done_reason": "stop",
                "prompt_eval_count": 7,
                "eval_count": 5,
            }
        )


def line(value):
    return (json.dumps({"model": "m", **value}) + "\n").encode()


def calling(command, **arguments):
    return using("exec", command=command, **arguments)


def using(tool, **arguments):
    return {"tool_calls": [{"function": {"name": tool, "arguments": arguments}}]}


@contextlib.contextmanager
def with_model(tmp_path, *answers):
    """Give a gateway whose only model gives these answers, a watcher, the model."""
    model = ScriptedOllama(answers)
    with model.server:
        environ = {"PATH": os.environ["PATH"], "OLLAMA_HOST": model.server.url}
        environ["HOME"] = str(tmp_path)
        with InProcessGateway(tmp_path / "gw", environ=environ) as gateway:
            gateway.call("sessions.patch", key="main", model="ollama/m")
            with Watcher(gateway.websocket_url, gateway.api_key) as chat:
                yield gateway, chat, model


def test_an_approved_command_runs_and_the_model_answers(tmp_path):
    answers = calling("echo from the model"), {"content": "It said hello."}
    with with_model(tmp_path, *answers) as (gateway, chat, model):
        chat.send("say hello")
        asked = chat.until(lambda: approval(chat, "asked"))
        assert asked["command"]["command"] == "echo from the model"
        assert asked["command"]["approval"]["risks"] == []
        (question,) = gateway.call("exec.approval.list")
        assert question["jobId"] == asked["jobId"]
        assert question["expiresAt"] == asked["command"]["approval"]["expiresAt"]
        resolve(gateway, asked, "approve")
        chat.until(lambda: chat.saw("final"))
        (card,) = chat.of("command")
        assert card["state"] == "done"
        assert chat.text(card) == "from the model\n"
        assert card["command"]["approval"] == {
            "state": "approved",
            "by": "owner",
        }
        (answer,) = chat.of("assistant")
        assert answer["text"] == "It said hello."
        assert answer["model"] == "ollama/m"
        assert answer["usage"] == {"inputTokens": 14, "outputTokens": 10}
        (row,) = gateway.call("job.list")
        assert row["callerKind"] == "model"
        assert row["decidedBy"] == "owner"
        assert gateway.call("exec.approval.list") == []
        (session,) = gateway.call("sessions.list")
        last = session["lastJob"]
        assert (last["id"], last["words"], last["nodeName"]) == (
            row["id"],
            "done",
            "Local",
        )
        told = model.asked[1]["messages"][-1]
        assert told["role"] == "tool"
        assert "from the model" in told["content"]


def history(gateway):
    return gateway.call("chat.history", sessionKey="main")


def approval(chat, state):
    for card in chat.of("command"):
        if card["command"].get("approval", {}).get("state") == state:
            return card
    return None


def resolve(gateway, card, decision):
    gateway.call("exec.approval.resolve", id=card["jobId"], decision=decision)


def test_a_denied_command_does_not_run_and_is_in_the_audit(tmp_path):
    answers = calling(f"touch {tmp_path}/ran"), {"content": "Then not."}
    with with_model(tmp_path, *answers) as (gateway, chat, _):
        chat.send("do it")
        resolve(gateway, chat.until(lambda: approval(chat, "asked")), "deny")
        chat.until(lambda: chat.saw("final"))
        (card,) = chat.of("command")
        assert card["state"] == "aborted"
        assert card["command"]["approval"]["state"] == "denied"
        assert not (tmp_path / "ran").exists()
        assert card["job"]["words"] == "denied by owner"
        (row,) = gateway.call("job.list", state="denied")
        assert row["id"] == card["jobId"]
        assert row["decidedBy"] == "owner"
        assert row["callerName"] == "ollama/m for owner"


def test_what_a_model_remembers_of_a_session_includes_what_was_typed(tmp_path):
    with with_model(tmp_path, {"content": "Yes."}) as (_, chat, model):
        chat.send("!echo typed by hand")
        chat.finish()
        chat.send("did it work?")
        chat.until(lambda: sum(e["state"] == "final" for e in chat.events) == 2)
        roles = [message["role"] for message in model.asked[0]["messages"]]
        assert roles == ["system", "user", "assistant", "tool", "user"]


def test_an_answer_can_be_ended_and_keeps_what_was_said(tmp_path):
    with with_model(tmp_path, {"content": "Once upon a time"}) as (
        gateway,
        chat,
        model,
    ):
        model.held.clear()
        chat.send("a story")
        chat.until(lambda: [r for r in chat.of("assistant") if r["text"]])
        gateway.call("chat.abort", sessionKey="main")
        chat.until(lambda: chat.saw("aborted"))
        (answer,) = chat.of("assistant")
        assert (answer["state"], answer["text"]) == ("aborted", "Once upon a time")
        model.held.set()


def test_a_model_that_fails_is_said_in_the_chat(tmp_path):
    with with_model(tmp_path) as (_, chat, model):
        model.server.close()
        chat.send("hello")
        chat.until(lambda: chat.saw("error"))
        notice = chat.of("notice")[-1]  # before it: that it is tried again
        assert notice["state"] == "error"
        assert "cannot be reached" in notice["text"]


def test_after_an_error_the_model_goes_on_and_what_was_answered_is_shown(tmp_path):
    """Nothing is asked twice, and the part of an answer that came does not go back."""
    failed = {"content": "half", "thinking": "hm"}
    with with_model(tmp_path, failed, {"content": "whole"}) as (gateway, chat, model):
        gateway.call("sessions.patch", key="main", effort="low")
        stream, model._stream = (
            model._stream,
            lambda message: iter(
                [
                    line({"message": {"role": "assistant", **message}, "done": False}),
                    line({"error": "out of memory, key mk_" + "x" * 43}),
                ]
            ),
        )
        chat.send("hello")
        chat.until(lambda: chat.saw("error"))
        notice = chat.of("notice")[-1]
        assert "out of memory" in notice["answered"]
        assert "x" * 43 not in json.dumps(history(gateway))
        assert [row["text"] for row in chat.of("thinking")] == ["hm"]
        model._stream = stream
        gateway.call("chat.retry")
        chat.until(lambda: chat.saw("final"))
        assert chat.of("assistant")[-1]["text"] == "whole"
        first, second = model.asked
        assert first["messages"] == second["messages"]
        assert first["think"] == "low"
        with pytest.raises(moltis.MoltisError, match="nothing to try again"):
            gateway.call("chat.retry")


@pytest.mark.parametrize("page", [moltis.HISTORY_PAGE, 0])
def test_a_question_that_failed_goes_on_where_it_was_asked(tmp_path, monkeypatch, page):
    """Also where more messages than a page of the history came after it."""

    def fail(_model):
        raise ConnectionError

    answers = fail, fail, fail, calling("echo hi"), {"content": "whole"}
    with with_model(tmp_path, *answers) as (gateway, chat, _), gateway.node("far"):
        gateway.call("sessions.patch", key="main", approvals="all")
        chat.send("hello")
        chat.until(lambda: chat.saw("error"))
        gateway.call("sessions.patch", key="main", node_id="far")
        monkeypatch.setattr(moltis, "HISTORY_PAGE", page)
        gateway.call("chat.retry")
        chat.until(lambda: chat.saw("final"))
        (card,) = chat.of("command")
        assert card["command"]["node"] == "Local"


# -- in the background -----------------------------------------------------------


def look(**arguments):
    """A model's look at the command that it started first."""
    return lambda model: using("exec_status", id=model.results()[0]["id"], **arguments)


def says(text):
    return {"content": text}


@contextlib.contextmanager
def with_background(tmp_path, command, *answers):
    """Give what with_model() gives, once a model has left `command` running."""
    first = calling(command, background=True), says("It runs.")
    with with_model(tmp_path, *first, *answers) as (gateway, chat, model):
        gateway.call("sessions.patch", key="main", approvals="all")
        chat.send("start it")
        chat.until(lambda: chat.saw("final"))
        yield gateway, chat, model


def test_a_command_in_the_background_is_a_job_and_a_card(tmp_path):
    command = f"echo begun; {wait_in_shell(tmp_path / 'go')}; echo grüße; exit 3"
    answers = (look(), says("Not yet."), look(wait=60, offset=0), says("Now."))
    with with_background(tmp_path, command, *answers) as (gateway, chat, model):
        card = chat.card()
        assert card["state"] == "running"
        assert card["command"]["background"] is True
        (listed,) = gateway.call("job.list", state="open")
        assert listed["id"] == card["jobId"]
        assert (listed["callerKind"], listed["sessionKey"]) == ("model", "main")
        chat.first_output()
        chat.send("how is it?")
        chat.until(lambda: len(model.asked) == 4)
        result = model.results()[-1]
        assert (result["stdout"], result["state"]) == ("begun\n", "running")
        assert result["next_offset"] > 0
        (tmp_path / "go").touch()
        chat.send("and now?")
        (card,) = chat.finish()
        chat.until(lambda: len(model.asked) == 6)
        result = model.results()[-1]
        assert result["stdout"] == "begun\ngrüße\n"
        assert (result["state"], result["exit_code"]) == ("done", 3)
        assert (card["state"], card["job"]["exitCode"]) == ("done", 3)
        assert chat.text(card) == "begun\ngrüße\n"


def test_stop_ends_the_wait_for_a_command_in_the_background_and_not_it(tmp_path):
    answers = (look(wait=60), says("Never said."))
    with with_background(tmp_path, "echo $$; sleep 100", *answers) as (
        gateway,
        chat,
        model,
    ):
        chat.send("wait for it")
        chat.until(lambda: any("exec_status" in r["text"] for r in chat.of("notice")))
        gateway.call("chat.abort", sessionKey="main")
        chat.until(lambda: chat.saw("aborted"))
        assert len(model.asked) == 3
        (row,) = [m for m in history_of(gateway) if m["role"] == "command"]
        assert row["state"] == "running"
        gateway.call("job.cancel", id=row["jobId"])
        (card,) = chat.finish()
        assert card["job"]["state"] == "cancelled"


def test_a_model_can_end_what_it_left_in_the_background(tmp_path):
    answers = (look(cancel=True), says("Ended."))
    with with_background(tmp_path, "sleep 100", *answers) as (_, chat, model):
        chat.send("end it")
        (card,) = chat.finish()
        assert card["job"]["state"] == "cancelled"
        chat.until(lambda: len(model.asked) == 4)
        assert model.results()[-1]["state"] == "cancelled"


def test_a_reset_ends_what_runs_in_the_background(tmp_path):
    with with_background(tmp_path, "echo $$; sleep 100") as (gateway, chat, _):
        pid = int(chat.first_output())
        gateway.call("sessions.reset", key="main")
        wait_for(lambda: not process_exists(pid), what="the end of the command")
        wait_for(lambda: not gateway.call("job.list", state="open"))


def test_a_model_cannot_look_at_another_session_s_commands(tmp_path):
    with with_background(tmp_path, "sleep 100", look(cancel=True), says("No.")) as (
        gateway,
        chat,
        model,
    ):
        job_id = chat.card()["jobId"]
        other = gateway.call("sessions.create", label="Other")["key"]
        model.results = lambda: [{"id": job_id}]
        with Watcher(gateway.websocket_url, gateway.api_key, other) as second:
            second.send("end it", model="ollama/m")
            second.until(lambda: second.saw("final"))
        (told,) = [m for m in model.asked[-1]["messages"] if m["role"] == "tool"]
        assert "is no command of this session" in told["content"]
        assert gateway.call("job.wait", id=job_id, wait=0)["state"] == "running"


def test_a_command_in_the_background_that_cannot_start_is_no_job(tmp_path):
    answers = calling("true", background=True), says("Oh.")
    with with_model(tmp_path, *answers) as (gateway, chat, model):
        gateway.node("far").close()
        wait_for(lambda: not gateway.is_connected("id-of-far"))
        gateway.call("sessions.patch", key="main", approvals="all", node_id="far")
        chat.send("start it")
        (card,) = chat.finish()
        assert card["state"] == "error"
        assert "far has been offline since" in card["command"]["error"]
        chat.until(lambda: chat.saw("final"))
        assert "far has been offline" in model.results()[0]["error"]
        assert gateway.call("job.list") == []


def test_what_a_revoked_key_asked_for_ends_with_it(tmp_path):
    """Its question, its turns in line, and what was always allowed it."""
    answers = (calling(f"touch {tmp_path}/ran"), says("never"))
    with with_model(tmp_path, *answers) as (gateway, chat, _):
        scopes = ["operator.read", "operator.write"]
        key = gateway.call("keys.create", name="guest", scopes=scopes)
        with Watcher(gateway.websocket_url, key["key"]) as guest:
            guest.send("do it")
            guest.send("!touch " + str(tmp_path / "queued"))
        chat.until(lambda: approval(chat, "asked"))
        asked = approval(chat, "asked")
        gateway.call("keys.revoke", keyId=key["keyId"])
        (card,) = chat.finish()
        assert card["state"] == "aborted"
        # By its text: a turn that began late stands after what was queued behind it.
        queued = next(r for r in chat.rows.values() if r["text"].startswith("!touch"))
        chat.until(lambda: chat.rows[queued["id"]]["state"] == "aborted")
        with pytest.raises(moltis.UserError, match="closed"):
            resolve(gateway, asked, "approve")
        assert not (tmp_path / "ran").exists()
        assert not (tmp_path / "queued").exists()


def test_a_question_that_is_stopped_is_closed_on_its_card(tmp_path):
    with with_model(tmp_path, calling("echo no")) as (gateway, chat, _):
        chat.send("do it")
        chat.until(lambda: approval(chat, "asked"))
        gateway.call("chat.abort", sessionKey="main")
        (card,) = chat.finish()
        (stored,) = [m for m in history(gateway) if m["role"] == "command"]
        for shown in (card, stored):
            assert shown["state"] == "aborted"
            assert shown["command"]["error"] == "cancelled by the user"
            assert "approval" not in shown["command"]


def test_a_question_that_ends_with_the_gateway_is_closed_on_its_card(tmp_path):
    with with_model(tmp_path, calling("echo no")) as (_, chat, _):
        chat.send("do it")
        chat.until(lambda: approval(chat, "asked"))
    (path,) = tmp_path.rglob("moltis.db")
    with contextlib.closing(sqlite3.connect(path)) as db:
        query = "SELECT state, details FROM messages WHERE role = 'command'"
        ((state, details),) = db.execute(query).fetchall()
    command = json.loads(details)["command"]
    assert (state, command["error"]) == ("interrupted", "the gateway stopped")
    assert "approval" not in command


def test_what_a_revoked_key_allowed_for_ever_is_asked_again(tmp_path):
    answers = calling("echo 1"), says("ok"), calling("echo 2"), says("ok")
    with with_model(tmp_path, *answers) as (gateway, chat, _):
        scopes = ["operator.read", "operator.write", "operator.approvals"]
        key = gateway.call("keys.create", name="guest", scopes=scopes)
        chat.send("one")
        asked = chat.until(lambda: approval(chat, "asked"))
        with moltis.OperatorClient(gateway.url, key["key"]) as guest:
            params = {"id": asked["jobId"], "decision": "always"}
            guest.call("exec.approval.resolve", params)
        chat.finish()
        gateway.call("keys.revoke", keyId=key["keyId"])
        chat.send("two")
        asked = chat.until(lambda: approval(chat, "asked"))
        assert asked["command"]["command"] == "echo 2"
        resolve(gateway, asked, "deny")
        chat.finish()


def test_the_commands_of_a_revoked_key_end_with_it(tmp_path):
    """Those in the background, and those that no chat shows, as well."""
    answers = calling("sleep 100", background=True), says("It runs.")
    with with_model(tmp_path, *answers) as (gateway, chat, _):
        gateway.call("sessions.patch", key="main", approvals="all")
        scopes = ["operator.read", "operator.write"]
        key = gateway.call("keys.create", name="guest", scopes=scopes)
        mine = moltis.new_id()
        spec = {"command": "sleep 99"}
        start = {"work": "run", "keep": True}
        jobs = [{"id": mine, "node": "local"}]
        gateway.call("job.start", jobs=jobs, spec=spec, **start)
        with Watcher(gateway.websocket_url, key["key"]) as guest:
            guest.send("leave it running")
            chat.until(lambda: chat.saw("final"))
        with moltis.OperatorClient(gateway.url, key["key"]) as guest:
            jobs = [{"id": moltis.new_id(), "node": "local"}]
            guest.call("job.start", {"jobs": jobs, "spec": spec, **start})
        assert len(gateway.call("job.list", state="open")) == 3
        gateway.call("keys.revoke", keyId=key["keyId"])
        wait_for(lambda: len(gateway.call("job.list", state="open")) == 1)
        ended = gateway.call("job.list", state="cancelled")
        assert {job["command"] for job in ended} == {"sleep 100", "sleep 99"}
        assert {job["words"] for job in ended} == {"cancelled by owner"}
        gateway.call("job.cancel", id=mine)


# -- restarts ------------------------------------------------------------------


class RestartableGateway:
    """A gateway in a process of its own, which can be killed and comes back."""

    def __init__(self, home, **environ):
        self.port = free_port()
        self.home = home
        self.environ = environ
        self.directory = home / ".moltis"
        self.program = None
        self.start()

    def start(self):
        self.program = Program(
            "gateway", "--port", self.port, home=self.home, **self.environ
        )
        self.program.wait_for_output("Sign in")

    def watch(self):
        url = f"ws://127.0.0.1:{self.port}/ws"
        return Watcher(url, moltis.GatewayFile.load(self.directory).api_key)

    def call(self, method, **params):
        key = moltis.GatewayFile.load(self.directory).api_key
        url = f"http://127.0.0.1:{self.port}"
        with moltis.OperatorClient(url, key) as client:
            return client.call(method, params)


@pytest.fixture
def restartable(tmp_path):
    gateway = RestartableGateway(tmp_path)
    yield gateway
    gateway.program.end()


@pytest.fixture
def far(restartable, tmp_path):
    """A node of that gateway, selected in the session main."""
    token = restartable.call("device.token.create", displayName="far")["deviceToken"]
    settings = moltis.NodeSettings(
        gateway_url=f"ws://127.0.0.1:{restartable.port}/ws",
        device_token=token,
        node_id="far",
        display_name="far",
    )
    node = moltis.RunningNode(settings, dict(os.environ), lambda *_: None)
    wait_for(lambda: connected(restartable, "far"))
    restartable.call("nodes.set_session", session_key="main", node_id="far")
    yield node
    node.close()


def connected(gateway, node_id):
    views = {view["nodeId"]: view for view in gateway.call("node.list")}
    return node_id in views and views[node_id]["connected"]


@pytest.mark.parametrize("signal_number", [9, 15])
def test_a_card_is_completed_after_the_gateway_has_come_back(
    restartable, far, tmp_path, signal_number
):
    head, tail = "seq 60000", "seq 60001 120000"
    with restartable.watch() as chat:
        chat.send(f"{head}; {wait_in_shell(tmp_path / 'go')}; {tail}; exit 5")
        card = chat.card()
        wait_for(lambda: chat.text(card).endswith("60000\n"))
        last = chat.events[-1]["seq"]
    restartable.program.end(signal_number)
    restartable.start()
    (_, card) = history_of(restartable)
    assert (card["state"], card["job"]["state"]) == ("running", "running")
    (tmp_path / "go").touch()
    wait_for(lambda: history_of(restartable)[-1]["state"] == "done")
    (said, card) = history_of(restartable)
    assert said["state"] == "done"
    assert card["job"]["exitCode"] == 5
    assert card["seq"] > last
    whole = "".join(f"{n}\n" for n in range(1, 120001))
    assert card["job"]["stdoutBytes"] == len(whole)
    with restartable.watch() as chat:
        assert chat.text(card) == whole


@pytest.mark.parametrize("signal_number", [9, 15])
def test_a_command_in_the_background_is_looked_at_after_a_restart(
    tmp_path, signal_number
):
    go = tmp_path / "go"
    command = f"echo begun; {wait_in_shell(go)}; echo ended; exit 4"
    answers = [
        calling(command, background=True),
        says("It runs."),
        look(wait=60),
        says("It ended."),
    ]
    model = ScriptedOllama(answers)
    with model.server:
        gateway = RestartableGateway(tmp_path, OLLAMA_HOST=model.server.url)
        token = gateway.call("device.token.create", displayName="far")["deviceToken"]
        url = f"ws://127.0.0.1:{gateway.port}/ws"
        settings = moltis.NodeSettings(url, token, "far", "far")
        node = moltis.RunningNode(settings, dict(os.environ), lambda *_: None)
        wait_for(lambda: connected(gateway, "far"))
        choices = {"model": "ollama/m", "approvals": "all", "node_id": "far"}
        gateway.call("sessions.patch", key="main", **choices)
        with gateway.watch() as chat:
            chat.send("start it")
            chat.until(lambda: chat.saw("final"))
            chat.first_output()
        gateway.program.end(signal_number)
        gateway.start()
        (card,) = [m for m in history_of(gateway) if m["role"] == "command"]
        assert card["state"] == "running"
        with gateway.watch() as chat:
            chat.send("how is it?")
            wait_for(lambda: len(model.asked) == 3, what="the question")
            go.touch()
            chat.until(lambda: chat.saw("final"))
        result = model.results()[-1]
        assert (result["state"], result["exit_code"]) == ("done", 4)
        assert result["stdout"] == "begun\nended\n"
        (card,) = [m for m in history_of(gateway) if m["role"] == "command"]
        assert card["state"] == "done"
        assert output_of(gateway, card) == "begun\nended\n"
        node.close()
        gateway.program.end()


def history_of(gateway):
    return gateway.call("chat.history", sessionKey="main")


def test_a_command_of_local_is_lost_with_the_gateway_and_says_so(restartable):
    with restartable.watch() as chat:
        chat.send("echo begun; sleep 30; echo ended")
        chat.send("echo waiting in line")
        chat.first_output()
    restartable.program.end(9)
    restartable.start()
    rows = history_of(restartable)
    by_role = {row["role"]: row for row in rows}
    assert by_role["command"]["state"] == "error"
    assert by_role["command"]["job"]["state"] == "lost"
    assert [r["state"] for r in rows if r["role"] == "user"] == ["done", "interrupted"]
    assert restartable.call("job.list")[0]["state"] == "lost"
    assert not restartable.call("sessions.list")[0]["replying"]


def test_an_abort_does_not_wait_for_a_node_that_is_silent(restartable, tmp_path):
    """The command is ended, and its card with it, when the node is heard of again."""
    token = restartable.call("device.token.create", displayName="far")["deviceToken"]
    url = f"ws://127.0.0.1:{restartable.port}/ws"
    arguments = ("--host", url, "--name", "far", "--node-id", "far", "--foreground")
    (tmp_path / "far").mkdir()
    with Program(
        "node", "add", *arguments, home=tmp_path / "far", MOLTIS_DEVICE_TOKEN=token
    ) as node, restartable.watch() as chat:
        wait_for(lambda: connected(restartable, "far"))
        restartable.call("nodes.set_session", session_key="main", node_id="far")
        chat.send("echo $$; sleep 100")
        pid = int(chat.first_output())
        node.process.send_signal(signal.SIGSTOP)
        try:
            assert restartable.call("chat.abort", sessionKey="main")["aborted"]
            chat.until(lambda: chat.saw("aborted"))
            (card,) = chat.of("command")
            assert card["state"] == "running"
        finally:
            node.process.send_signal(signal.SIGCONT)
        (card,) = chat.finish()
        assert card["state"] == "aborted"
        assert not process_exists(pid)


@pytest.fixture
def machines(tmp_path):
    machines = Machines(tmp_path)
    yield machines
    machines.close()


@contextlib.contextmanager
def chats_of(machines):
    """Give the sessions of a gateway that has just been started."""
    chats = moltis.Chats(
        *(machines.store, machines.fleet, machines.jobs, None, moltis.Approvals()),
        lambda *event: machines.announced.append(event),
    )
    try:
        yield chats
    finally:
        chats.close()


def test_all_commands_of_a_chat_end_with_it_however_many(machines):
    machines.know("far", "far")
    with chats_of(machines) as chats:
        key = chats.create("")["key"]
        origin = moltis.Origin("model", "key-1", "m", session_key=key)
        jobs = [
            machines.jobs.start(
                moltis.new_job(
                    ("far", "far"),
                    "run",
                    {"command": "reboot"},
                    origin,
                    kept=True,
                    queue=600,
                )
            )
            for _ in range(101)
        ]
        chats.delete(key)
    assert {job.record.state for job in jobs} == {"cancelled"}


@pytest.mark.parametrize("bound", ["HISTORY_PAGE", "MAX_HISTORY", "MAX_CHANGED"])
def test_an_answer_that_lacks_older_messages_says_so(machines, monkeypatch, bound):
    if bound != "MAX_HISTORY":
        monkeypatch.setattr(moltis, bound, 2)
    after = 0 if bound == "MAX_CHANGED" else None
    with chats_of(machines) as chats:
        key = chats.create("")["key"]
        log = chats._log(key)
        for number in range(5):
            log.add("final", "user", "run", "done", text=f"{number}" + "x" * 90)
            found = chats.history(key, after=after)
            if bound == "MAX_HISTORY" and number == 0:
                size = len(moltis.to_json(found[0]))
                monkeypatch.setattr(moltis, bound, size * 5 // 2)
            assert ["hasEarlier" in row for row in found] == [
                number > 1 and n == 0 for n in range(len(found))
            ]
        assert [row["text"][0] for row in found] == ["3", "4"]
        if after is None:
            found = chats.history(key, before=found[0]["createdAt"])
            assert [row["text"][0] for row in found] == ["1", "2"]
            assert found[0]["hasEarlier"]
            (first,) = chats.history(key, before=found[0]["createdAt"])
            assert "hasEarlier" not in first


def test_a_turn_between_two_answers_is_shown_as_interrupted(machines):
    machines.store.sessions.add(moltis.Session("s", "", "shell", "local", 1, 1))
    machines.store.sessions.change("s", run_id="run")
    for _ in range(2):  # and said once
        with chats_of(machines) as chats:
            (message,) = chats.history("s")
    assert (message["role"], message["state"]) == ("notice", "interrupted")
    assert message["runId"] == "run"


def test_what_a_model_was_saying_is_shown_as_interrupted(machines):
    with chats_of(machines) as chats:
        key = chats.create("")["key"]
        machines.store.sessions.change(key, run_id="run")
        log = chats._log(key)
        answer = log.add("delta", "assistant", "run", "running")
        log.say(answer, "half an ans")
        last = machines.announced[-1][1]["seq"]
    # close() stores what was said so far
    machines.announced.clear()
    with chats_of(machines) as chats:
        (message,) = chats.history(key)
    assert (message["state"], message["text"]) == ("interrupted", "half an ans")
    numbers = [event["seq"] for name, event in machines.announced if name == "chat"]
    assert min(numbers) > last + 1000, "no number is given twice"


def test_what_waited_for_an_approval_is_shown_as_interrupted(machines):
    planned = moltis.PlannedCommand(moltis.new_id(), "local", "Local", "true")
    with chats_of(machines) as chats:
        command = {"command": "true", "node": "Local", "nodeId": "local"}
        details = {"command": {**command, "approval": {"state": "asked"}}}
        log = chats._log("main")
        job_id = planned.job_id
        log.add(
            *("tool_call_start", "command", "run", "running"),
            job_id=job_id,
            details=details,
        )
    with chats_of(machines) as chats:
        (card,) = chats.history("main")
    assert (card["state"], card["jobId"]) == ("interrupted", job_id)
    assert card["command"] == {**command, "error": "the gateway stopped"}


def test_a_browser_that_sleeps_is_spared_words_but_not_their_end():
    class Peer:
        def __init__(self, backlog):
            self.events = {"chat"}
            self.told = []
            self.ws = type("Ws", (), {"backlog": backlog})

        def notify(self, text):
            self.told.append(json.loads(text)["payload"]["state"])

    awake, asleep = Peer(0), Peer(10 * 1024 * 1024)
    audience = moltis.Audience()
    audience.add(awake)
    audience.add(asleep)
    audience.announce("chat", {"state": "delta", "text": "x"})
    audience.announce("chat", {"state": "delta", "text": "", "message": {}})
    audience.announce("chat", {"state": "tool_call_end", "message": {}})
    assert awake.told == ["delta", "delta", "tool_call_end"]
    assert asleep.told == ["delta", "tool_call_end"]


# -- nodes that do not come back -------------------------------------------------


class Site:
    """A gateway that can begin anew, and a node in a process of its own."""

    def __init__(self, directory):
        self.directory = directory
        self.port = free_port()
        self.home = directory / "far"
        self.home.mkdir()
        self.node = None
        self.start()

    def start(self):
        environ = {k: v for k, v in os.environ.items() if not k.endswith("_API_KEY")}
        self.gateway = InProcessGateway(
            self.directory / "gateway", environ=environ, port=self.port
        )

    def restart_without_node(self, signal_number=signal.SIGKILL):
        """Begin anew; a node that was only stopped may come back."""
        self.gateway.close()
        self.node.process.send_signal(signal_number)
        self.start()

    def add_node(self):
        url = f"ws://127.0.0.1:{self.port}/ws"
        options = ("--foreground", "--name", "far", "--node-id", "far")
        token = self.gateway.token("far")
        self.node = Program(
            *("node", "add", "--host", url, *options),
            home=self.home,
            MOLTIS_DEVICE_TOKEN=token,
        )
        wait_for(lambda: self.gateway.is_connected("far"), what="the node")
        self.gateway.call("nodes.set_session", session_key="main", node_id="far")

    def send(self, text):
        """Have a command run; return its id once it has said something."""
        with self.watch() as chat:
            chat.send(text)
            chat.first_output()
            return chat.card()["jobId"]

    def watch(self):
        return Watcher(self.gateway.websocket_url, self.gateway.api_key)

    def call(self, method, **params):
        return self.gateway.call(method, **params)

    def card(self):
        return next(m for m in history_of(self) if m["role"] == "command")

    def wait_for_card(self, state):
        wait_for(lambda: self.card()["state"] == state, what=lambda: str(self.card()))
        return self.card()["job"]

    def row(self):
        return self.call("job.list")[0]

    def device_id(self):
        return self.call("device.pair.list")[0]["deviceId"]

    def close(self):
        if self.node is not None:
            self.node.process.send_signal(signal.SIGCONT)
            self.node.end()
        self.gateway.close()


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setattr(moltis, "LOST_AFTER", 0.3)
    monkeypatch.setattr(moltis, "TICK_INTERVAL", 0.05)
    site = Site(tmp_path)
    site.add_node()
    yield site
    site.close()


def test_a_command_without_a_timeout_waits_for_its_node_and_can_be_stopped(site):
    """Also by a gateway that knows it from its database alone."""
    job_id = site.send("echo so far; sleep 100")
    site.restart_without_node()
    assert site.card()["state"] == "running"
    assert site.card()["job"]["awayMs"] >= 0
    assert "endedAt" not in site.call("job.wait", id=job_id, wait=1)
    site.call("job.cancel", id=job_id)
    job = site.wait_for_card("error")
    assert job["state"] == "lost"
    assert "its node stayed away" in job["words"]
    assert output_of(site, site.card()) == "so far\n"
    assert site.row()["state"] == "lost"


def test_stop_ends_what_waits_for_a_node_since_an_earlier_life(site):
    site.send("echo so far; sleep 100")
    site.restart_without_node()
    site.call("chat.abort", sessionKey="main")
    assert site.wait_for_card("error")["state"] == "lost"
    assert site.row()["state"] == "lost"


def test_a_stopped_command_is_ended_when_its_node_comes_back_after_all(site):
    """A row and a card that said lost are corrected."""
    job_id = site.send("echo $$; sleep 100")
    site.restart_without_node(signal.SIGSTOP)
    site.call("job.cancel", id=job_id)
    assert site.wait_for_card("error")["state"] == "lost"
    pid = int(output_of(site, site.card()))
    site.gateway.close()  # nor does another restart forget that it is to end
    site.start()
    assert process_exists(pid)
    site.node.process.send_signal(signal.SIGCONT)
    job = site.wait_for_card("aborted")
    assert job["state"] == "cancelled"
    assert "lost" not in job["words"]
    assert site.row()["state"] == "cancelled"
    wait_for(lambda: not process_exists(pid), what="the end of the command")


@pytest.mark.parametrize("away", [False, True])
def test_revoking_a_node_s_token_ends_what_it_was_asked_for(site, away, monkeypatch):
    monkeypatch.setattr(moltis, "LOST_AFTER", 60.0)  # it is lost for another reason
    site.send("echo $$; sleep 100")
    pid = int(output_of(site, site.card()))
    if away:
        site.restart_without_node(signal.SIGSTOP)
    words = {"lost": "its token was revoked"}
    if not away:  # the node is told before we hang up, and may be faster
        words["cancelled"] = "by owner"
    site.call("device.token.revoke", deviceId=site.device_id())
    wait_for(lambda: site.card()["state"] in ("error", "aborted"), what="its end")
    job = site.card()["job"]
    assert words[job["state"]] in job["words"]
    assert site.row()["state"] == job["state"]
    assert site.call("job.list", state="open") == []
    if not away:
        wait_for(lambda: not process_exists(pid), what="the end of the command")


def test_what_was_asked_of_a_node_that_was_revoked_is_lost_at_the_start(site):
    """As an older gateway may have left it."""
    site.send("echo so far; sleep 100")
    site.gateway.close()
    site.node.process.send_signal(signal.SIGKILL)
    store = moltis.Store(site.gateway.directory / "moltis.db")
    (device,) = store.devices.all(moltis.now_ms())
    store.devices.revoke(device.id, moltis.now_ms())
    store.close()
    site.start()
    site.wait_for_card("error")
    assert site.row()["state"] == "lost"


# -- where a message runs ------------------------------------------------------


def directory(gateway, key="main"):
    return gateway.call("sessions.resolve", key=key)["entry"]["directory"]


def in_order(chat, lines, **params):
    """Send each line once the one before it has ended; return the outputs."""
    for count, line in enumerate(lines, 1):
        chat.send(line, **params)
        chat.finish(count)
        chat.until(lambda: all(row["state"] in FINAL for row in chat.rows.values()))
    return [chat.text(card) for card in chat.of("command")]


def test_a_command_starts_where_the_last_one_on_its_machine_ended(
    gateway, chat, tmp_path
):
    with gateway.node("far"):
        chat.send("pwd")
        home = chat.text(chat.finish()[0])
        gateway.call("sessions.reset", key="main")
        chat.rows.clear()
        far = {"nodeId": "far"}
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        lines = [f"cd {tmp_path}/link", "pwd; (cd /)", "cd ..; false", "pwd", "cd /usr"]
        texts = in_order(chat, lines)
        assert texts[1] == f"{tmp_path}/link\n"
        assert texts[3] == f"{tmp_path}\n"
        assert directory(gateway) == "/usr"
        assert chat.of("command")[1]["command"]["cwd"] == f"{tmp_path}/link"
        assert chat.of("command")[1]["job"]["cwd"] == f"{tmp_path}/link"
        # Each machine has its own, and each chat.
        chat.send("pwd", **far)
        assert chat.text(chat.finish(6)[5]) == home
        other = gateway.call("sessions.create", label="Other")
        assert other["directory"] == ""
        chat.send("cd; cd /")
        chat.send("cd")
        chat.finish(8)
        wait_for(lambda: directory(gateway) == "~")
        chat.send("pwd")
        assert chat.text(chat.finish(9)[8]) == home
        gateway.call("sessions.reset", key="main")
        assert directory(gateway) == ""


def test_a_directory_outlives_the_gateway(tmp_path):
    for line, expected in [("cd /usr/lib", ""), ("pwd", "/usr/lib\n")]:
        gateway = InProcessGateway(tmp_path / "gateway")
        with gateway, Watcher(gateway.websocket_url, gateway.api_key) as chat:
            chat.send(line)
            assert chat.text(chat.finish()[0]) == expected


def test_a_directory_that_is_gone_fails_one_command_and_is_given_up(
    gateway, chat, tmp_path
):
    (tmp_path / "gone").mkdir()
    gone = f"cd {tmp_path}/gone; rmdir {tmp_path}/gone"
    texts = in_order(chat, ["pwd", gone, "ls", "pwd"])
    second = chat.of("command")[2]
    assert f"cannot use the working directory {tmp_path}/gone" in second["job"]["words"]
    assert texts[3] == texts[0]


@pytest.mark.parametrize(
    "line",
    [
        *("export A=1", "A=1", "cd /; alias x=y", "true && . ./venv", "set -e; true"),
        *("echo one\nexport B=2", "unset A", "A=1 B=2"),
    ],
)
def test_the_first_variable_that_does_not_stay_is_explained_once(chat, line):
    in_order(chat, [line, line])
    (notice,) = chat.of("notice")
    assert notice["text"] == moltis.ONLY_DIRECTORY
    assert notice["state"] == "done"


@pytest.mark.parametrize(
    "line",
    [
        *("A=1 env", "echo export A=1", "grep set .", "cd /tmp", "printf '%s' A=1"),
        "n=0; until false; do n=1; done",
    ],
)
def test_other_commands_explain_nothing(line):
    assert not moltis.changes_environment(line)


def test_a_message_runs_where_its_sender_saw_the_session(gateway, chat, tmp_path):
    """Also when it waits, and the session goes elsewhere meanwhile."""
    with gateway.node("far"):
        seen = {"nodeId": "far", "model": "shell", "directory": "/usr"}
        chat.send(wait_in_shell(tmp_path / "go"))
        chat.send("echo $PWD", **seen)
        gateway.call("sessions.patch", key="main", node_id=None)
        waiting = chat.until(lambda: [r for r in chat.of("user") if "node" in r][1:])
        assert (waiting[0]["node"], waiting[0]["directory"]) == ("far", "/usr")
        (tmp_path / "go").touch()
        card = chat.finish(2)[1]
        assert chat.text(card) == "/usr\n"
        assert card["command"]["node"] == "far"
        assert card["command"]["chatNodeId"] == "local"
        assert "chatNodeId" not in chat.of("command")[0]["command"]


def test_a_message_without_a_machine_goes_where_the_session_was_when_it_was_sent(
    gateway, chat, tmp_path
):
    with gateway.node("far"):
        gateway.call("sessions.patch", key="main", node_id="far")
        chat.send(wait_in_shell(tmp_path / "go"))
        chat.send("echo there")
        gateway.call("sessions.patch", key="main", node_id=None)
        (tmp_path / "go").touch()
        assert [card["command"]["node"] for card in chat.finish(2)] == ["far", "far"]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"nodeId": "nowhere"}, "there is no node 'nowhere'"),
        ({"directory": "/a\nb"}, "one line"),
        ({"directory": "/" + "x" * 5000}, "4096 bytes"),
        ({"id": "1"}, "a UUID in lower case, not '1'"),
    ],
)
def test_what_a_message_cannot_be_bound_to_is_refused(gateway, params, words):
    with pytest.raises(moltis.MoltisError, match=words):
        gateway.call("chat.send", text="echo never", **params)
    assert gateway.call("job.list") == []


def test_a_command_for_a_machine_that_was_removed_says_so_without_json(gateway, chat):
    with gateway.node("far"):
        gateway.call("sessions.patch", key="main", node_id="far")
    (device,) = gateway.call("device.pair.list")
    gateway.call("device.token.revoke", deviceId=device["deviceId"])
    chat.send("pwd")
    (notice,) = chat.until(
        lambda: [r for r in chat.of("notice") if r["state"] == "error"]
    )
    assert notice["text"].startswith("The machine of this chat was removed; choose")


def test_a_message_is_answered_once_for_each_id(gateway, chat, tmp_path):
    """Also over another connection, and while both are under way."""
    id_ = moltis.new_id()
    line = f"echo x >>{tmp_path}/runs"
    runs = {chat.send(line, id=id_)["runId"] for _ in range(2)}
    chat.finish()
    runs.add(gateway.call("chat.send", text=line, id=id_)["runId"])
    assert len(runs) == 1
    chat.send("true")
    chat.finish(2)
    assert (tmp_path / "runs").read_text() == "x\n"
    with pytest.raises(moltis.MoltisError, match="is the id of another message"):
        gateway.call("chat.send", text="echo other", id=id_)


def test_a_message_that_an_earlier_gateway_took_is_not_run_again(tmp_path):
    id_ = moltis.new_id()
    for _ in range(2):
        with InProcessGateway(tmp_path / "gateway") as gateway:
            answer = gateway.call("chat.send", text="echo once", id=id_)
            assert answer["ok"]
            wait_for(lambda: not gateway.call("sessions.list")[0]["replying"])
    # Opened anew: what is written counts.
    with InProcessGateway(tmp_path / "gateway") as gateway:
        assert len(gateway.call("job.list")) == 1


def test_a_chat_is_made_with_its_machine_and_model(gateway):
    with gateway.node("far"):
        made = gateway.call("sessions.create", node_id="far", model="shell")
        assert (made["node_id"], made["model"]) == ("id-of-far", "shell")
    with pytest.raises(moltis.MoltisError, match="nothing"):
        gateway.call("sessions.create", model="nothing/here")


def test_a_machine_that_allows_no_directory_but_its_own_goes_on_there(gateway, chat):
    with gateway.node("far", allow=["cd /tmp", "pwd"]):
        texts = in_order(chat, ["pwd", "cd /tmp", "pwd"], nodeId="far")
        assert texts[2] == texts[0]
        assert directory(gateway) == ""
