"""Model directory: models on real nodes, asked over the node's own connection."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import threading
import time

import pytest
from peers import InProcessGateway, rust_connect
from support import Program, ScriptedServer, free_port, run_moltis, wait_for

import moltis
from moltis import Cancellation, Cancelled, ChatMessage, Delta, Finished, ModelError

HELLO = [ChatMessage("user", "hello")]


class Ollama:
    """An Ollama with one model, whose answers the test writes."""

    def __init__(self):
        self.answer = [chunk("Hello "), chunk("there"), chunk(done=True)]
        self.asked = []  # bodies of /api/chat
        self.release = threading.Event()
        self.release.set()
        self.server = ScriptedServer(self.reply)
        self.environ = {"OLLAMA_HOST": self.server.url}

    def reply(self, handler):
        if handler.path == "/api/tags":
            return 200, {}, [json.dumps({"models": [{"name": "llama3.2"}]}).encode()]
        if handler.path == "/api/show":
            return 200, {}, [json.dumps({"capabilities": ["completion"]}).encode()]
        self.asked.append(json.loads(handler.body))
        return 200, {"Content-Type": "application/x-ndjson"}, self.chunks()

    def chunks(self):
        for number, piece in enumerate(self.answer):
            if number == 1:
                self.release.wait(60)
            yield piece

    def close(self):
        self.release.set()
        self.server.close()


def chunk(text="", done=False):
    message = {"role": "assistant", "content": text}
    return json.dumps({"message": message, "done": done}).encode() + b"\n"


def bare_environ(directory, **extra):
    """Return an environment in which no provider is set up, and no Ollama runs."""
    keys = set(moltis.API_KEY_VARIABLES.values())
    return {
        **{name: value for name, value in os.environ.items() if name not in keys},
        "MOLTIS_DATA_DIR": str(directory),
        "OLLAMA_HOST": f"127.0.0.1:{free_port()}",
        **extra,
    }


@pytest.fixture
def gateway(tmp_path):
    environ = bare_environ(tmp_path / "gateway")
    with InProcessGateway(tmp_path / "gateway", environ=environ) as running:
        yield running


@pytest.fixture
def ollama():
    server = Ollama()
    yield server
    server.close()


@pytest.fixture
def gpu_box(gateway, ollama, tmp_path):
    """A node called GPU box, the only machine that knows of the Ollama."""
    environ = bare_environ(tmp_path / "node", **ollama.environ)
    with gateway.node("GPU box", environ=environ) as node:
        # Connected is one thing, ready another: between the two is its hello.
        fleet = gateway.running.fleet
        wait_for(lambda: fleet.connected("id-of-GPU box").ready)
        yield node


@pytest.fixture
def models(gateway):
    return gateway.running.models


LENT = "id-of-GPU box:ollama/llama3.2"


def ask(models, model_id=LENT, cancel=None, messages=HELLO):
    model = models.choose(model_id)
    return list(model.stream(messages, (), cancel or Cancellation()))


def test_models_of_nodes_are_listed_after_shell_with_the_name_of_their_node(
    gateway, gpu_box
):
    entries = gateway.call("models.list")
    assert entries[0]["id"] == "shell"
    assert entries[1:] == [
        {
            "id": LENT,
            "provider": "Ollama",
            "displayName": "llama3.2 · GPU box",
            "supportsTools": False,
            "reasoning": False,
            "nodeId": "id-of-GPU box",
            "nodeName": "GPU box",
        }
    ]


def test_the_node_asks_and_its_answer_streams_back(models, gpu_box, ollama):
    events = ask(models)
    assert events[:2] == [Delta("text", "Hello "), Delta("text", "there")]
    assert isinstance(events[2], Finished)
    assert events[2].message.text == "Hello there"
    assert ollama.asked[0]["model"] == "llama3.2"
    assert ollama.asked[0]["messages"] == [{"role": "user", "content": "hello"}]


def test_a_node_in_a_process_of_its_own_lends_its_models(gateway, ollama, tmp_path):
    environ = {
        **ollama.environ,
        "MOLTIS_DEVICE_TOKEN": gateway.token("far"),
        "MOLTIS_DATA_DIR": str(tmp_path / "far"),
    }
    arguments = ("node", "add", "--host", gateway.websocket_url, "--foreground")
    arguments += ("--node-id", "far", "--name", "Far")
    with Program(*arguments, home=tmp_path, **environ) as node:
        node.wait_for_output("connected to")
        assert [m["displayName"] for m in gateway.call("models.list")] == [
            "Shell",
            "llama3.2 · Far",
        ]
        events = ask(gateway.running.models, "far:ollama/llama3.2")
        assert events[-1].message.text == "Hello there"


def test_shell_is_found_as_it_is_written(models):
    assert models.choose("Shell").id == models.choose("").id == "shell"


def test_a_model_may_be_named_by_the_name_of_its_node(models, gpu_box):
    assert ask(models, "gpu BOX:ollama/llama3.2")[-1].message.text == "Hello there"


def test_no_node_gets_what_is_said_to_another_model_by_its_name(
    gateway, models, gpu_box
):
    """Its id wins, whoever had a name first keeps it, and our own models are ours."""
    names = ("id-of-gpu box", "id-of-GPU box", "ollama/llama3.2", "GPU BOX")
    with contextlib.ExitStack() as stack:
        for number, name in enumerate(names):
            peer = stack.enter_context(gateway.peer())
            params = rust_connect(gateway.token(), f"{number} is odd")
            params["client"]["displayName"] = name
            assert peer.request("connect", params)["ok"]
        assert models.choose(LENT).id == LENT
        assert models.choose("gpu box:ollama/llama3.2").id == LENT
        ours = "ollama/llama3.2:latest"
        assert models.choose(ours).id == ours


def test_an_answer_longer_than_the_window_arrives_whole(models, gpu_box, ollama):
    piece = "x" * 50_000
    ollama.answer = [chunk(piece)] * 60 + [chunk(done=True)]
    assert ask(models)[-1].message.text == piece * 60


def lent_jobs(gateway, node_id="id-of-GPU box"):
    """Return the jobs of a node that the gateway has not settled."""
    return gateway.running.jobs._on(node_id)


def held(node):
    """Return the jobs whose logs a node holds."""
    return node.running._agent._machine.held()


def test_a_reader_that_is_slow_holds_up_the_node_and_loses_nothing(
    gateway, models, gpu_box, ollama
):
    piece = "x" * 60_000
    ollama.answer = [chunk(piece)] * 60 + [chunk(done=True)]
    stream = models.choose(LENT).stream(HELLO, (), Cancellation())
    assert next(stream) == Delta("text", piece)
    (job,) = lent_jobs(gateway)
    wait_for(lambda: job.log.end - job.acknowledged > 900_000)
    assert job.record.is_open
    assert list(stream)[-1].message.text == piece * 60


def test_all_is_forgotten_on_both_sides_once_the_answer_is_read(
    gateway, models, gpu_box
):
    ask(models)
    wait_for(lambda: not lent_jobs(gateway), what="the gateway to forget")
    wait_for(lambda: not held(gpu_box), what="the node to forget")
    assert gateway.call("job.list") == [], "nor is it recorded"


def test_an_unknown_model_on_a_node_is_an_error_that_names_the_node(
    models, gpu_box, ollama
):
    ollama.answer = [b'{"error": "model \\"nope\\" not found"}\n']
    with pytest.raises(ModelError, match=r"GPU box: .*not found"):
        ask(models, "GPU box:ollama/nope")


def test_a_provider_the_node_has_no_key_for_is_refused_by_the_node(models, gpu_box):
    with pytest.raises(ModelError, match=r"providers that are set up .ollama"):
        ask(models, "GPU box:anthropic/claude")


def test_a_conversation_too_long_for_the_model_is_told_as_such(models, gpu_box, ollama):
    ollama.answer = [b'{"error": "input exceeds the context length"}\n']
    with pytest.raises(moltis.ContextTooLong):
        ask(models)


def test_an_answer_beyond_all_measure_is_broken_off(
    gateway, models, gpu_box, ollama, monkeypatch
):
    monkeypatch.setattr(moltis, "MAX_MODEL_ANSWER", 100_000)
    ollama.answer = [chunk("x" * 1000) for _ in range(200)]
    with pytest.raises(ModelError, match=r"more than 97\.7 KiB; ask for less"):
        ask(models)


def test_a_node_that_never_ends_its_answer_is_not_believed(
    gateway, models, gpu_box, ollama, monkeypatch
):
    check = moltis.check_answer_length

    def check_as_gateway(length):
        # The node would check it as well, in threads of its own.
        if not threading.current_thread().name.startswith("moltis-model-"):
            check(length)

    monkeypatch.setattr(moltis, "check_answer_length", check_as_gateway)
    monkeypatch.setattr(moltis, "MAX_MODEL_ANSWER", 100_000)
    ollama.answer = [*(chunk("x" * 1000) for _ in range(200)), chunk(done=True)]
    with pytest.raises(ModelError, match=r"more than 97\.7 KiB"):
        ask(models)
    wait_for(lambda: not lent_jobs(gateway), what="the end of the job")


def test_cancelling_ends_the_request_on_the_node(gateway, models, gpu_box, ollama):
    ollama.release.clear()
    cancel = Cancellation()
    stream = models.choose(LENT).stream(HELLO, (), cancel)
    assert next(stream) == Delta("text", "Hello ")
    cancel.cancel()  # between two words, while nobody waits
    began = time.monotonic()
    with pytest.raises(Cancelled):
        next(stream)
    assert time.monotonic() - began < 30, "it waited for the node's next word"
    wait_for(lambda: not lent_jobs(gateway), what="the end of the job")
    wait_for(lambda: not held(gpu_box), what="the node to end the request")


def test_an_answer_survives_a_lost_connection(gateway, models, gpu_box, ollama):
    ollama.release.clear()
    stream = models.choose(LENT).stream(HELLO, (), Cancellation())
    assert next(stream) == Delta("text", "Hello ")
    node = gateway.running.fleet.connected("id-of-GPU box")
    node.link.hang_up("the cable was pulled")
    notice = next(stream)
    assert notice.kind == "notice"
    assert "waiting for GPU box to come back" in notice.text
    ollama.release.set()
    assert list(stream)[-1].message.text == "Hello there"


def test_a_lent_model_may_stream_for_minutes(
    gateway, models, gpu_box, ollama, monkeypatch
):
    """Only silence is limited, here and on the node.  A word takes five seconds."""
    real, sent, told = time.monotonic, [], []
    monkeypatch.setattr(time, "monotonic", lambda: real() + 5 * len(sent))

    def words():
        for _ in range(30):
            wait_for(lambda: len(told) == len(sent), what="the word before to arrive")
            sent.append("word ")
            yield chunk(sent[-1])
        yield chunk(done=True)

    ollama.answer = words()
    for event in models.choose(LENT).stream(HELLO, (), Cancellation()):
        told.append(event)
    *deltas, finished = told
    assert [delta.text for delta in deltas] == sent
    assert finished.message.text == "word " * 30


class LentLog:
    """Jobs whose node sends a log in pieces, and then its ending."""

    def __init__(self, lines, size=1000, **ending):
        data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        self.frames = [moltis.encode_log_frame(moltis.STDOUT, p) for p in pieces]
        last = json.dumps({"state": "done", **ending}).encode()
        self.frames.append(moltis.encode_log_frame(moltis.ENDING, last))
        self.ending = moltis.Ending.from_json(json.loads(last))
        self.length = sum(map(len, self.frames))

    def start(self, record):
        self.job = moltis.Job(record, moltis.Log())
        return self.job

    def follow(self, job, follower):
        self.holder = follower
        if self.frames:
            frame = self.frames.pop(0)
            job.log.append(job.log.end, frame)
            if not self.frames:
                job.record = job.record.replace(
                    state=self.ending.state, reason=self.ending.reason
                )
                job.result = self.ending.result
            follower.wake(job)

    def acknowledge(self, job):
        self.follow(job, self.holder)  # the next frame

    def unfollow(self, job, follower, *, leaves):
        assert leaves


def answer_of(jobs):
    model = moltis.RemoteModel(jobs, ("n", "n"), "ollama/m")
    return list(model.stream(HELLO, (), Cancellation()))


FINISHED = Finished(ChatMessage("assistant", "Grüße"), "stop", 7, 3)


@pytest.mark.parametrize("size", range(1, 40))
def test_an_answer_may_be_cut_at_any_byte(size):
    events = [Delta("text", "Grü"), Delta("text", "ße"), FINISHED]
    jobs = LentLog([event.to_json() for event in events], size)
    assert answer_of(jobs) == events
    assert jobs.holder.position == jobs.length


@pytest.mark.parametrize("line", [7, {}, {"kind": 1}, {"message": {}}, "x"])
def test_a_node_that_sends_no_events_is_told_apart_from_an_answer(line):
    with pytest.raises(ModelError, match="sent no answer"):
        answer_of(LentLog([line]))


def test_an_answer_without_its_end_is_no_answer():
    with pytest.raises(ModelError, match="broke off"):
        answer_of(LentLog([Delta("text", "half").to_json()]))


def test_an_answer_whose_job_failed_is_no_answer():
    lines = [Delta("text", "whole").to_json(), FINISHED.to_json()]
    with pytest.raises(ModelError, match="n: the node is stopping"):
        answer_of(LentLog(lines, state="failed", reason="the node is stopping"))


def test_a_node_may_be_silent_for_long_but_not_for_ever(monkeypatch):
    """There is a limit for silence, and none for an answer that goes on."""
    monkeypatch.setattr(moltis, "MODEL_SILENCE", 0.1)
    jobs = LentLog([Delta("text", "Hello ").to_json(), FINISHED.to_json()], size=50)
    jobs.acknowledge = lambda _job: None  # the next frame never comes
    model = moltis.RemoteModel(jobs, ("n", "n"), "ollama/m")
    stream = model.stream(HELLO, (), Cancellation())
    assert next(stream) == Delta("text", "Hello ")
    with pytest.raises(ModelError, match=r"n has sent nothing for 0\.1 s"):
        next(stream)


def test_a_gateway_asked_while_the_node_is_away_says_since_when(
    gateway, models, gpu_box
):
    gpu_box.close()
    wait_for(lambda: not gateway.is_connected("id-of-GPU box"))
    with pytest.raises(ModelError, match="GPU box has been offline since"):
        ask(models)


def test_a_node_that_keeps_its_models_to_itself_is_not_asked(gateway, ollama, tmp_path):
    environ = bare_environ(tmp_path / "node", **ollama.environ)
    with gateway.node("shy", environ=environ, llm=False):
        assert [m["id"] for m in gateway.call("models.list")] == ["shell"]
        assert (
            "llm.chat"
            not in gateway.call("node.describe", nodeId="shy")["capabilities"]
        )
        with pytest.raises(ModelError, match="does not lend its models"):
            ask(gateway.running.models, "shy:ollama/llama3.2")
    assert ollama.asked == []


def test_no_llm_is_kept_in_node_json(tmp_path):
    settings = moltis.NodeSettings("ws://g:1/ws", "mdt_x", "i", "n", llm=False)
    settings.save(tmp_path)
    assert json.loads((tmp_path / "node.json").read_text())["llm"] is False
    assert moltis.NodeSettings.load(tmp_path) == settings


def test_a_node_that_says_nothing_of_it_lends_its_models(tmp_path):
    value = {"gateway_url": "ws://g/ws", "device_token": "t", "node_id": "i"}
    (tmp_path / "node.json").write_text(json.dumps({**value, "display_name": "n"}))
    assert moltis.NodeSettings.load(tmp_path).llm is True


# -- Settings → Models ---------------------------------------------------------


def test_a_key_that_was_entered_is_kept_private_and_never_shown(gateway):
    secret = "sk-" + "s" * 40
    gateway.call("models.configure", provider="groq", apiKey=secret)
    path = gateway.directory / "models.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret in path.read_text()
    providers = gateway.call("models.providers")
    groq = next(p for p in providers if p["id"] == "groq")
    assert groq["keyFrom"] == "settings"
    assert secret not in json.dumps(providers)


def test_a_server_that_was_entered_is_listed_and_can_be_chosen(gateway):
    def reply(handler):
        if handler.path == "/v1/models":
            return 200, {}, [b'{"data": [{"id": "qwen"}]}']
        line = json.dumps({"choices": [{"delta": {"content": "hi"}}]})
        return 200, {}, [f"data: {line}\n\ndata: [DONE]\n\n".encode()]

    with ScriptedServer(reply) as server:
        gateway.call("models.configure", provider="lab", baseUrl=server.url)
        assert gateway.call("models.list")[-1]["id"] == "lab/qwen"
        events = ask(gateway.running.models, "lab/qwen")
        assert events[-1].message.text == "hi"
        gateway.call("models.configure", provider="lab", baseUrl="")
        assert [m["id"] for m in gateway.call("models.list")] == ["shell"]


def test_a_server_of_ones_own_may_talk_as_anthropic_does(gateway):
    """Its key goes where LiteLLM looks for it, and where vLLM does."""

    def reply(handler):
        if handler.path.startswith("/v1/models"):
            return 200, {}, [b'{"data": [{"id": "claude-at-home"}]}']
        block = {"type": "text", "text": "hi"}
        message = {"type": "message", "content": [block], "stop_reason": "end_turn"}
        return 200, {"Content-Type": "application/json"}, [json.dumps(message).encode()]

    with ScriptedServer(reply) as server:
        gateway.call(
            "models.configure",
            provider="lab",
            baseUrl=f"{server.url}/v1/",
            apiKey="k",
            protocol="anthropic",
        )
        lab = gateway.call("models.providers")[-1]
        assert (lab["id"], lab["protocol"], lab["own"]) == ("lab", "anthropic", True)
        assert (lab["keyFrom"], lab["models"], lab["error"]) == ("settings", 1, "")
        events = ask(gateway.running.models, "lab/claude-at-home")
        assert events[-1].message.text == "hi"
        for _, path, headers, _ in server.requests:
            assert path.startswith(("/v1/models", "/v1/messages"))
            assert headers["x-api-key"] == "k"
            assert headers["Authorization"] == "Bearer k"


def test_what_was_entered_can_be_removed_once(gateway):
    url = f"http://127.0.0.1:{free_port()}"
    gateway.call("models.configure", provider="lab", apiKey="k", baseUrl=url)
    gateway.call("models.configure", provider="groq", apiKey="g")
    gateway.call("models.remove", provider="lab")
    assert list(json.loads((gateway.directory / "models.json").read_text())) == ["groq"]
    assert "lab" not in [p["id"] for p in gateway.call("models.providers")]
    with pytest.raises(moltis.UserError, match=r"for 'lab'; there is groq"):
        gateway.call("models.remove", provider="lab")
    subjects = [event["subject"] for event in gateway.call("audit.list", limit=5)]
    assert subjects.count("lab removed") == 1


def test_an_address_that_is_the_providers_own_sets_nothing_up(gateway):
    own = "https://api.anthropic.com/"
    gateway.call("models.configure", provider="anthropic", apiKey="k", baseUrl=own)
    gateway.call("models.configure", provider="anthropic", apiKey="")
    assert json.loads((gateway.directory / "models.json").read_text()) == {}


def test_a_provider_that_cannot_be_asked_says_why(gateway):
    ollama = gateway.call("models.providers")[0]
    assert ollama["id"] == "ollama"
    assert ollama["models"] == 0
    assert "cannot be reached" in ollama["error"]


@pytest.mark.parametrize(
    "params",
    [
        {"provider": "a/b", "baseUrl": "http://x"},
        {"provider": "shell", "baseUrl": "http://x"},
        {"provider": "", "baseUrl": "http://x"},
        {"provider": "lab", "baseUrl": "file:///etc/passwd"},
        {"provider": "lab", "baseUrl": "gpu-box"},
        {"provider": "lab", "baseUrl": "sk-secret"},
        {"provider": "lab", "baseUrl": "http://[::1"},
        {"provider": "lab", "baseUrl": "http://x:99999"},
        {"provider": "lab", "baseUrl": "http://me:sk-secret@x"},
        {"provider": "lab", "baseUrl": "http://x/v1?key=sk-secret"},
        {"provider": "lab", "baseUrl": ""},
        {"provider": "lab", "apiKey": "sk-secret"},
        {"provider": "lab", "baseUrl": "http://x", "protocol": "sk-other"},
        {"provider": "groq", "apiKey": "sk-secret", "protocol": "anthropic"},
    ],
)
def test_what_cannot_be_a_provider_is_refused(gateway, params):
    with pytest.raises(moltis.UsageError) as caught:
        gateway.call("models.configure", **params)
    assert "sk-secret" not in str(caught.value)
    assert not (gateway.directory / "models.json").exists()


def test_a_key_alone_is_not_enough_to_change_models(gateway):
    access = gateway.running._access
    _, key = access.operators.create_key("reader", [moltis.Scope.READ])
    with moltis.OperatorClient(gateway.url, key) as client:
        assert client.call("models.list", {})
        with pytest.raises(moltis.Refused, match="scope"):
            client.call("models.configure", {"provider": "groq", "apiKey": "x"})


def test_an_unknown_provider_lists_those_that_are_set_up(gateway, models):
    with pytest.raises(ModelError, match="PROVIDER/NAME"):
        models.choose("nonsense")


def test_only_so_many_lists_are_asked_for_at_a_time(gateway, gpu_box, monkeypatch):
    asked = threading.Event()
    monkeypatch.setattr(
        moltis.ModelDirectory, "_entries", lambda *_: asked.wait(60) and []
    )
    with gateway.operator() as client:
        answers = [
            client.start("models.list", {}) for _ in range(moltis.MAX_LISTINGS + 1)
        ]
        with pytest.raises(moltis.RpcError, match="32 others ask for models now"):
            answers[-1].result(60)
        asked.set()
        assert [answer.result(60) for answer in answers[:-1]] == [[]] * 32
    gateway.call("models.list")


def test_no_name_is_shell(models):
    assert models.choose("").id == models.choose("shell").id == "shell"


def test_closing_the_gateway_ends_a_list_that_is_being_asked_for(tmp_path):
    asked = threading.Event()
    leave = threading.Event()

    def reply(_handler):
        asked.set()
        leave.wait(60)
        return 200, {}, [b"{}"]

    with ScriptedServer(reply) as server:
        environ = bare_environ(tmp_path, OLLAMA_HOST=server.url)
        with InProcessGateway(tmp_path, environ=environ) as gateway:
            entries = gateway.running.models.entries(refresh=False)
            assert asked.wait(60)
        with pytest.raises(Cancelled):
            entries.result(0)
        leave.set()


def test_keys_of_models_stand_in_no_answer_and_no_log(gateway, caplog):
    """Also one that HTTP does not take, one that a server quotes, and after removal."""
    caplog.set_level("DEBUG")

    def quoting(handler):
        said = {"error": {"message": f"wrong: {handler.headers['Authorization']}"}}
        return 401, {}, [json.dumps(said).encode()]

    answers = []
    with ScriptedServer(quoting) as server:
        for name, key in (("odd", "sk-odd-secret\u00e9"), ("lab", "sk-lab-secret")):
            entry = {"provider": name, "baseUrl": server.url, "apiKey": key}
            answers.append(gateway.call("models.configure", **entry))
        answers.append(gateway.call("models.list", refresh=True))
        answers.append(gateway.call("models.providers"))
        gateway.call("chat.send", sessionKey="main", model="lab/m", text="hello")

        def failed():
            return [
                row
                for row in gateway.call("chat.history", sessionKey="main")
                if row["state"] == "error"
            ]

        answers.append(wait_for(failed, what="the error"))
        assert "wrong: Bearer" in answers[-1][-1]["answered"]
        answers.append(gateway.call("models.remove", provider="lab"))
        answers.append(gateway.call("audit.list"))
    assert "-secret" not in json.dumps(answers) + caplog.text


KEYS = {  # of a node: one that a server quotes, and two that HTTP does not take
    "OPENAI_API_KEY": 'sk-quoted/"secret"',
    "ANTHROPIC_API_KEY": "sk-ant-\u00e9-secret",
    "GROQ_API_KEY": "gsk-two\nlines-secret",
}


def quotes_its_key(handler):
    """A server that quotes the key in what it says, in each way that is left to it."""
    key = handler.headers["Authorization"].partition(" ")[2]
    if handler.path.endswith("/models"):
        return 307, {"Location": f"http://elsewhere/{key}"}, []
    said = json.dumps({"error": {"message": f"wrong: {key}"}})
    model = json.loads(handler.body)["model"]
    if model == "no-object":
        return (
            200,
            {"Content-Type": "text/event-stream"},
            [f'data: "{key}"\n\n'.encode()],
        )
    return {"plain": 400, "json": 401, "busy": 503}[model], {}, [said.encode()]


def test_keys_of_a_node_that_lends_its_models_stay_there(gateway, tmp_path, caplog):
    """None is in an answer, a log, the page, or a file of the gateway or the node."""
    caplog.set_level("DEBUG")
    answers = []
    with ScriptedServer(quotes_its_key) as server:
        address = server.url.replace("//", "//user:pass-secret@")
        environ = bare_environ(
            tmp_path / "node",
            **KEYS,
            OPENAI_BASE_URL=f"{address}/v1?token=url-secret",
            OLLAMA_HOST="http://a:ollama-secret@127.0.0.1:9",
        )
        with gateway.node("GPU box", environ=environ):
            node = gateway.running.fleet.connected("id-of-GPU box")
            wait_for(lambda: node.ready and node.lends_models)
            answers.append(gateway.call("models.list", refresh=True))
            for model in (
                *("openai/plain", "openai/json", "openai/no-object", "openai/busy"),
                *("anthropic/m", "groq/m", "ollama/m"),
            ):
                model_id = f"id-of-GPU box:{model}"
                key = gateway.call("sessions.create", label=model)["key"]
                gateway.call("chat.send", sessionKey=key, model=model_id, text="hello")

                def failed(key=key):
                    rows = gateway.call("chat.history", sessionKey=key)
                    return [row for row in rows if row["state"] == "error"]

                answers += wait_for(failed, what=f"the error of {model}")
            answers.append(gateway.call("node.describe", nodeId=node.node_id))
            for method in ("node.list", "job.list", "audit.list", "models.providers"):
                answers.append(gateway.call(method))
            data = str(gateway.directory)
            listed = run_moltis(
                *("node", "list", "--json"), home=tmp_path, MOLTIS_DATA_DIR=data
            )
            assert "GPU box" in listed.stdout
            answers.append(listed.stdout + listed.stderr)
    files = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    texts = json.dumps(answers) + caplog.text
    assert "wrong: " in texts, "the servers were asked"
    assert "character 8 of the API key is" in texts
    assert "secret" not in texts
    assert not [data for data in files if b'secret"' in data or b"-secret" in data]
