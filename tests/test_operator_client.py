"""The command line's side of a gateway."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from concurrent.futures import Future

import pytest
from peers import InProcessGateway, silent_node
from support import free_port, process_exists, wait_for, wait_in_shell

import moltis


@pytest.fixture
def gateway(tmp_path):
    with InProcessGateway(tmp_path / "gateway") as running:
        yield running


def run_request(command, **spec):
    return {"work": "run", "spec": {"command": command, **spec}}


@contextlib.contextmanager
def started(gateway, nodes, request, dial=None):
    """A feed in which jobs were started, over connections of its own."""
    with moltis.JobFeed(dial or gateway.operator) as feed:
        feed.start(nodes, request)
        yield feed


def news_until_the_end(feed):
    deadline = moltis.Deadline(60)
    for news in feed.news(tick=1):
        if news is not None:
            yield news
        if not feed.open:
            return
        assert not deadline.expired, "nothing happens"


def news_of(gateway, request, nodes=None, read=None):
    """Run a command; return everything that is heard of it."""
    with started(gateway, nodes or {"local": "Local"}, request) as feed:
        if read is None:
            return list(news_until_the_end(feed))
        feeder = threading.Thread(target=feed.feed_input, args=(read,))
        feeder.start()
        heard = list(news_until_the_end(feed))
        feeder.join()
        return heard


def output(heard, kind=moltis.STDOUT):
    return b"".join(
        data
        for news in heard
        if isinstance(news, moltis.JobOutput)
        for frame_kind, data in news.frames
        if frame_kind == kind
    )


def ended(heard):
    """Return the jobs that ended, by name."""
    jobs = [news.job for news in heard if isinstance(news, moltis.JobChange)]
    return {job.name: job for job in jobs if job.ending or job.error}


def test_a_wrong_key_is_refused_and_not_repeated(gateway):
    key = "mk_" + "x" * 43
    with pytest.raises(moltis.Refused) as caught:
        moltis.OperatorClient(gateway.url, key, gateway.trust)
    assert "MOLTIS_API_KEY" in str(caught.value)
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "kind"),
    [("RATE_LIMITED", moltis.Unreachable), ("INVALID_REQUEST", moltis.Refused)],
)
def test_a_sign_in_that_fails_for_another_reason_does_not_blame_the_key(
    gateway, monkeypatch, code, kind
):
    def sign_in(*_):
        raise moltis.RpcError(code, "for a reason")

    monkeypatch.setattr(moltis, "sign_in", sign_in)
    with pytest.raises(kind) as caught:
        moltis.OperatorClient(gateway.url, "mk_" + "x" * 43, gateway.trust)
    assert str(caught.value) == f"{gateway.url}: for a reason"


def test_a_gateway_that_is_not_there_is_unreachable(gateway):
    with pytest.raises(moltis.Unreachable, match="refused the connection"):
        moltis.OperatorClient(f"http://127.0.0.1:{free_port()}", "mk_x", gateway.trust)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("UNAVAILABLE", moltis.Unreachable),
        ("TIMEOUT", moltis.Unreachable),
        ("UNAUTHORIZED", moltis.Refused),
        ("FORBIDDEN", moltis.Refused),
        ("RATE_LIMITED", moltis.Refused),
        ("INVALID_REQUEST", moltis.UsageError),
        ("NOT_FOUND", moltis.UserError),
        ("SOMETHING_NEW", moltis.UserError),
    ],
)
def test_an_error_of_the_gateway_has_the_exit_status_that_fits(code, kind):
    error = moltis.user_error(moltis.RpcError(code, "why"))
    assert type(error) is kind
    assert str(error) == "why"


def test_a_call_ends_when_the_gateway_goes_away(gateway):
    with gateway.operator() as client:
        request = run_request("sleep 120")
        jobs = [{"id": moltis.new_id(), "node": "local"}]
        client.call("job.start", {**request, "jobs": jobs, "keep": True})
        answer = client.start("job.wait", {"id": jobs[0]["id"], "wait": 300})
        closer = threading.Thread(target=gateway.close)
        closer.start()
        with pytest.raises(moltis.MoltisError):
            answer.result(60)
        closer.join()
        with pytest.raises(moltis.Unreachable, match="hung up"):
            client.call("node.list", {})


def test_output_comes_in_order_and_whole(gateway):
    """Ten windows, with a reader that acknowledges as it goes."""
    count = "i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done"
    heard = news_of(gateway, run_request(f"{count}; head -c 9000000 /dev/zero"))
    data = output(heard)
    numbers, zeros = data[: -9 * 10**6], data[-9 * 10**6 :]
    assert numbers == b"".join(b"%d\n" % i for i in range(20_000))
    assert zeros == bytes(9 * 10**6)
    assert ended(heard)["Local"].ending.exit_code == 0


def one_by_one(directory, lines):
    """Return a command that writes each line once there is a file for the one before.

    A busy machine would read two that are written in succession together.
    """
    return "; ".join(
        f"echo {line} >&{1 + line.startswith('e')}; {wait_in_shell(directory / line)}"
        for line in lines
    )


def test_both_streams_keep_the_order_in_which_they_were_written(gateway, tmp_path):
    lines, said = ["1", "e1", "2", "e2", "3", "e3"], []
    request = run_request(one_by_one(tmp_path, lines))
    with started(gateway, {"local": "Local"}, request) as feed:
        for news in news_until_the_end(feed):
            for kind, data in getattr(news, "frames", ()):
                if kind in moltis.STREAMS:
                    said.append(data.decode().strip())
                    (tmp_path / said[-1]).touch()
    assert said == lines


def test_one_who_does_not_read_holds_the_command_up_and_loses_nothing(gateway):
    request = run_request("head -c 4000000 /dev/zero")
    with started(gateway, {"local": "Local"}, request) as feed:
        wait_for(lambda: feed._queued > 900_000, what="a window of output")
        # Nothing is acknowledged: a window is all that may be sent.
        assert gateway.call("node.list")
        assert feed._queued < moltis.LOG_WINDOW + 2 * moltis.MAX_LOG_MESSAGE
        assert len(output(news_until_the_end(feed))) == 4_000_000


def test_what_the_reading_thread_shows_at_once_keeps_its_order(gateway):
    shown, refuses = [], itertools.cycle((False, False, True))

    def note(news, how):
        shown.extend((data, how) for kind, data in news.frames if kind == moltis.STDOUT)

    def show_at_once(outputs):
        if next(refuses):
            return False
        for news in outputs:
            note(news, "at once")
        return True

    def is_enough():
        return all([how for _, how in shown].count(h) >= 5 for h in ("at once", "news"))

    line = "i=0; while [ $i -lt 6000 ]; do echo $i; i=$((i+1)); sleep 0.01; done"
    with started(gateway, {"local": "Local"}, run_request(line)) as feed:
        for news in feed.news(tick=1, show_at_once=show_at_once):
            if isinstance(news, moltis.JobOutput):
                note(news, "news")
            if is_enough():
                break
            assert feed.open, shown
    numbers = list(map(int, b"".join(data for data, _ in shown).split()))
    assert numbers == list(range(len(numbers)))


def test_news_may_be_closed_by_another_thread_than_the_one_that_read_it(gateway):
    """As a copy between nodes does that ends before its source."""
    with moltis.JobFeed(gateway.operator) as feed:
        news = feed.news(tick=0.01)
        reader = threading.Thread(target=next, args=[news], name="test-reader")
        reader.start()
        reader.join()
        news.close()


def test_a_gateway_that_does_not_answer_keeps_nobody_from_leaving(gateway):
    """A signal and `~.` are news like the ticks that come while it is dialled."""
    dials, answers = [], threading.Event()

    def dial(on_news):
        dials.append(on_news)
        assert len(dials) == 1 or answers.wait(60), "nothing else happens meanwhile"
        return gateway.operator(on_news)

    with started(gateway, {"local": "Local"}, run_request("sleep 120"), dial) as feed:
        news = feed.news(tick=1)
        changes = (n for n in news if isinstance(n, moltis.GatewayChange))
        feed.client.drop()
        assert not next(changes).reachable
        while len(dials) < 2:
            assert next(news) is None
        assert next(news) is None
        answers.set()
        assert next(changes).reachable


def test_a_gateway_is_not_said_to_be_away_since_before_it_was_lost(gateway):
    """The thread that reads a connection may end after it was found to be closed."""
    dial = gateway.operator
    with started(gateway, {"local": "Local"}, run_request("sleep 120"), dial) as feed:
        began = time.monotonic()
        feed._lost = True
        change = next(feed.news())
        assert not change.reachable
        assert change.away_ms <= (time.monotonic() - began) * 1000


def test_a_watcher_that_does_not_read_keeps_little_in_memory(gateway):
    request = run_request("head -c 20000000 /dev/zero")
    job = moltis.new_id()
    start = {**request, "jobs": [{"id": job, "node": "local"}], "keep": True}
    gateway.call("job.start", **start)
    gateway.call("job.wait", id=job, wait=60)
    with moltis.JobFeed(gateway.operator) as feed:
        feed.follow(job, "Local")
        limit = 3 * moltis.LOG_WINDOW
        wait_for(lambda: feed._queued > limit, what="its reader to stop")
        assert feed._queued <= limit + 2 * moltis.MAX_LOG_MESSAGE
        assert len(output(news_until_the_end(feed))) == 20_000_000


def test_input_goes_no_further_ahead_than_a_window(gateway):
    sent = []

    def read(size):
        data = b"x" * size if sum(sent) < 5_000_000 else b""
        sent.append(len(data))
        return data

    heard = news_of(gateway, run_request("wc -c", stdin=True), read=read)
    assert int(output(heard)) == sum(sent)


def test_input_is_binary_safe(gateway):
    data = bytes(range(256)) * 5000
    pieces = [data[i : i + 60_000] for i in range(0, len(data), 60_000)] + [b""]
    request = run_request("cat", stdin=True)
    heard = news_of(gateway, request, read=lambda size: pieces.pop(0))
    assert output(heard) == data


def test_input_that_is_not_consumed_is_sent_again_and_no_other():
    sent = []
    job_input = moltis.JobInput(moltis.new_id(), lambda m: sent.append(decoded(m)))
    pieces = [b"abc", b"def", b""]
    job_input.feed(lambda _size: pieces.pop(0))
    assert sent == []  # the job was not started
    job_input.resume()
    assert sent == [(0, b"abcdef"), (6, b"")]
    job_input.consumed(4)
    job_input.resume()
    assert sent[2:] == [(4, b"ef"), (6, b"")]
    job_input.consumed(7)  # more than was sent
    job_input.resume()
    assert sent[4:] == [(6, b"")]


class Swift:
    """A gateway whose first `job.input` comes while `job.start` is being sent."""

    ended, ended_at, scopes = False, 0.0, ()

    def __init__(self, on_news):
        self.on_news, self.sent = on_news, []

    def start(self, _method, params):
        payload = {"id": params["jobs"][0]["id"], "offset": 0, "resume": True}
        event = moltis.Event("job.input", payload)
        reads = threading.Thread(target=self.on_news, args=(self, event))
        reads.start()
        reads.join()
        return Future()

    def send(self, message):
        self.sent.append(decoded(message))

    def notify(self, *_args): ...

    def close(self): ...


def test_a_terminal_takes_keys_however_fast_the_gateway_is():
    with moltis.JobFeed(Swift) as feed:
        job = feed.open_terminal("pi", {"command": ""})
        assert feed.type(job, b"ls\r", lambda: False)
        assert feed.client.sent == [(0, b"ls\r")]


def decoded(message):
    kind, _, offset, data = moltis.decode_job_data(message)
    assert kind == moltis.INPUT_DATA
    return offset, data


@pytest.mark.parametrize("others", [b"", b"other"], ids=["alone", "others type"])
def test_what_was_typed_before_a_reconnect_is_not_typed_again(others):
    """A program that shows no echo, as for a password, reports nothing for long."""
    program, is_up = bytearray(), True

    def send(message):
        # The gateway takes what follows, and the node skips what it has.
        _, _, offset, data = moltis.decode_job_data(message)
        if is_up and offset <= len(program):
            program.extend(data[len(program) - offset :])

    typed = moltis.TypedInput(moltis.new_id(), send)
    typed.go_on(0)
    typed.type(b"secret", lambda: False)
    is_up = False
    typed.pause()
    typed.type(b"12", lambda: True)
    program += others
    is_up = True
    typed.go_on(len(program))
    typed.type(b"\r", lambda: False)
    assert bytes(program) == b"secret" + others + b"12\r"


def test_several_jobs_are_one_stream_of_news(gateway):
    with gateway.node("far"), gateway.node("gone") as gone:
        gone.close()
        wait_for(lambda: not gateway.is_connected("id-of-gone"))
        nodes = {"local": "Local", "far": "Far", "gone": "Gone"}
        heard = news_of(gateway, run_request("echo hi"), nodes)
    jobs = ended(heard)
    assert output(heard) == b"hi\nhi\n"
    assert jobs["Local"].ending.exit_code == jobs["far"].ending.exit_code == 0
    assert isinstance(jobs["Gone"].error, moltis.Unreachable)
    assert "gone has been offline" in str(jobs["Gone"].error)


def test_an_unknown_name_is_an_error_and_nothing_runs(gateway, tmp_path):
    nodes = {"local": "Local", "nowhere": "Nowhere"}
    request = run_request(f"touch {tmp_path}/ran")
    with pytest.raises(moltis.UserError, match="no node 'nowhere'"):
        news_of(gateway, request, nodes)
    assert gateway.call("job.list") == []


def test_a_job_goes_on_at_the_exact_byte_when_the_connection_breaks(gateway, tmp_path):
    request = run_request(one_by_one(tmp_path, "123456"))
    heard = []
    breaks = [b"1\n", b"1\n2\n3\n"]
    with gateway.node("far"), started(gateway, {"far": "Far"}, request) as feed:
        for news in news_until_the_end(feed):
            heard.append(news)
            if breaks and output(heard) == breaks[0]:
                del breaks[0]
                feed.client.drop()
            for line in output(heard).decode().split():
                (tmp_path / line).touch()
    assert output(heard) == b"1\n2\n3\n4\n5\n6\n"
    gone = [n.reachable for n in heard if isinstance(n, moltis.GatewayChange)]
    assert gone[:2] == [False, True]
    assert ended(heard)["far"].ending.exit_code == 0


def test_a_job_whose_first_answer_is_lost_is_started_once(gateway, tmp_path):
    clients = []

    def dial(on_news):
        client = gateway.operator(on_news)
        if not clients:
            start = client.start

            def start_and_break(method, params):
                answer = start(method, params)
                if method == "job.start":
                    client.drop()
                return answer

            client.start = start_and_break
        clients.append(client)
        return client

    request = run_request(f"echo ran >>{tmp_path}/runs; echo out")
    with gateway.node("far"), started(gateway, {"far": "Far"}, request, dial) as feed:
        heard = list(news_until_the_end(feed))
    assert len(clients) == 2
    assert output(heard) == b"out\n"
    assert (tmp_path / "runs").read_text() == "ran\n"


def test_a_gateway_that_stays_away_ends_the_news(gateway, monkeypatch):
    monkeypatch.setattr(moltis, "CALLER_PATIENCE", 0.2)
    monkeypatch.setattr(moltis, "RECONNECT_AFTER", 0.05)
    with started(gateway, {"local": "Local"}, run_request("sleep 120")) as feed:
        gateway.close()
        heard = list(news_until_the_end(feed))
    assert isinstance(ended(heard)["Local"].error, moltis.Unreachable)


def test_missing_output_is_counted(gateway, monkeypatch):
    """A watcher of an unkept job gets what its holder has not acknowledged."""
    request = run_request("head -c 3000000 /dev/zero; sleep 120")
    with started(gateway, {"local": "Local"}, request) as feed:
        heard = []
        for news in news_until_the_end(feed):
            heard.append(news)
            if len(output(heard)) == 3_000_000:
                break
        (job,) = feed.open
        with moltis.JobFeed(gateway.operator) as watcher:
            watcher.follow(job, "Local")
            feed.cancel()
            seen = list(news_until_the_end(watcher))
    cut = sum(n.cut for n in seen if isinstance(n, moltis.JobOutput))
    assert cut >= 3_000_000 - moltis.LOG_WINDOW
    assert cut + len(output(seen)) >= 3_000_000


def test_a_node_that_has_more_input_than_it_was_sent_ends_no_other_s_job(
    gateway, tmp_path
):
    go, nodes = tmp_path / "go", {"local": "Local", "evil": "Rust box"}
    request = run_request(wait_in_shell(go))
    with silent_node(gateway, "evil") as evil, started(gateway, nodes, request) as feed:
        asked = evil.receive_until(
            lambda m: isinstance(m, dict) and m.get("event") == "job.start"
        )
        job_id = asked["payload"]["id"]
        payload = {"id": job_id, "offset": 7, "resume": True}
        evil.send({"type": "event", "event": "job.input", "payload": payload})
        ending = moltis.Ending(moltis.JobState.DONE, exit_code=0)
        frame = moltis.encode_log_frame(moltis.ENDING, moltis.to_json(ending).encode())
        evil.send(moltis.encode_job_data(moltis.LOG_DATA, job_id, 0, frame))
        heard = []
        for news in news_until_the_end(feed):
            heard.append(news)
            if "Rust box" in ended(heard):
                go.touch()
    assert all(job.ending.exit_code == 0 for job in ended(heard).values())


def test_leaving_in_order_cancels_what_was_held(gateway, tmp_path):
    request = run_request(f"echo $$ > {tmp_path}/pid; sleep 120")
    with started(gateway, {"local": "Local"}, request):
        path = tmp_path / "pid"
        wait_for(lambda: path.exists() and path.read_text().strip(), what="its start")
    pid = int(path.read_text())
    wait_for(lambda: not process_exists(pid), what="its end")


def test_a_call_of_a_lasting_client_goes_on_when_the_connection_breaks(gateway):
    client = moltis.LastingClient(gateway.operator)
    with contextlib.closing(client):
        jobs = [{"id": moltis.new_id(), "node": "local"}]
        start = {**run_request("sleep 1"), "jobs": jobs, "keep": True}
        client.call("job.start", start)
        breaker = threading.Timer(0.3, client.client._ws.abort)
        breaker.start()
        view = client.call("job.wait", {"id": jobs[0]["id"], "wait": 60})
        breaker.join()
    assert view["state"] == "done"


@pytest.mark.parametrize("spec", [{"command": "rm \udcff\udcfe"}, {"cwd": "/\udcff"}])
def test_what_is_not_utf_8_is_refused_and_not_changed(gateway, spec):
    """As `?` a shell would take it for any character."""
    with gateway.operator() as client, pytest.raises(moltis.UsageError) as caught:
        client.start("job.start", {"jobs": [], "work": "run", "spec": spec})
    [value] = spec.values()
    assert str(caught.value) == f"{value!r} is not UTF-8, and cannot be sent"


def test_what_is_said_in_a_chat_is_not_changed_either(gateway):
    with gateway.operator() as client, pytest.raises(moltis.UsageError, match="UTF-8"):
        client.call("chat.send", {"sessionKey": "main", "text": "rm \udcff"})
