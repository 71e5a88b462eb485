"""Commands in the background: their output in files, and who asks for it."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
import uuid
from queue import SimpleQueue

import pytest
from peers import InProcessGateway, hang_up_on_jobs, silent_node
from support import (
    PROGRAM,
    Program,
    clean_environment,
    free_port,
    run_moltis,
    wait_for,
)

import moltis
from moltis import STDERR, STDOUT, Chunk

ID = str(uuid.uuid4())


@pytest.fixture
def output(tmp_path):
    output = moltis.JobOutput(tmp_path / "job")
    yield output
    output.close()


def data_of(reading, stream=STDOUT):
    return b"".join(p.data for p in reading.pieces if p.stream == stream)


def whole(output, stream=STDOUT):
    """Return a whole stream, read as a client does."""
    data, position = b"", 0
    while position < output.end:
        reading = output.read(position)
        data += data_of(reading, stream)
        position = reading.next
    return data


# Output in files


def test_output_is_read_from_any_place(output):
    output.append(Chunk(STDOUT, ID, 0, b"one\n"))
    first = output.read(0)
    assert data_of(first) == b"one\n"
    output.append(Chunk(STDERR, ID, 0, b"oh\n"))
    output.append(Chunk(STDOUT, ID, 4, b"two\n"))
    second = output.read(first.next)
    assert [(p.stream, p.offset, p.data) for p in second.pieces] == [
        (STDERR, 0, b"oh\n"),
        (STDOUT, 4, b"two\n"),
    ]
    assert output.read(second.next) == moltis.JobReading([], second.next)


def test_a_long_output_is_read_in_parts(output):
    for number in range(20):
        output.append(Chunk(STDOUT, ID, number * 60000, bytes([number]) * 60000))
    assert len(data_of(output.read(0))) < 400_000
    assert whole(output) == b"".join(bytes([n]) * 60000 for n in range(20))


def test_head_and_tail_of_too_much_output_are_kept(output, monkeypatch):
    monkeypatch.setattr(moltis, "JOB_SEGMENT", 1000)
    monkeypatch.setattr(moltis, "MAX_JOB_SEGMENTS", 3)
    for number in range(100):
        output.append(Chunk(STDOUT, ID, number * 100, b"%099d\n" % number))
    numbers = [int(line) for line in whole(output).split()]
    assert numbers[0] == 0
    assert numbers[-1] == 99
    assert 10 < len(numbers) < 40
    assert numbers == sorted(numbers)
    # A client that was in the middle goes on where there is something again.
    assert data_of(output.read(5000)) in whole(output)


def test_what_is_missing_at_the_end_of_a_stream_is_said_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(moltis, "JOB_SEGMENT", 1000)
    monkeypatch.setattr(moltis, "MAX_JOB_SEGMENTS", 2)
    jobs = moltis.Jobs(tmp_path / "jobs", None)
    sink = jobs.open(ID)
    for kind, count in ((STDERR, 10), (STDOUT, 10), (STDERR, 40)):
        for _ in range(count):
            written = sink.output.offset(kind)
            sink.chunk(Chunk(kind, ID, written, b"%099d\n" % written))
    text = b"".join(jobs.read_all(ID))
    assert text.endswith(b"\n[\xe2\x80\xa6 1,000 bytes cut \xe2\x80\xa6]\n")
    jobs.close()


def test_output_survives_a_crash_up_to_the_last_whole_record(tmp_path):
    before = moltis.JobOutput(tmp_path / "job")
    before.append(Chunk(STDERR, ID, 0, b"oh\n"))
    before.append(Chunk(STDOUT, ID, 0, b"one\n"))
    end = before.end
    before.append(Chunk(STDOUT, ID, 4, b"two\n"))
    before.close()
    for path in (tmp_path / "job").iterdir():
        os.truncate(path, path.stat().st_size - 2)  # in the middle of "two\n"
    after = moltis.JobOutput(tmp_path / "job")
    assert after.end == end
    assert (after.offset(STDOUT), after.offset(STDERR)) == (4, 3)
    after.append(Chunk(STDOUT, ID, 4, b"two\n"))
    assert whole(after) == b"one\ntwo\n"
    after.close()


def test_one_segment_alone_tells_how_far_both_streams_are(tmp_path, monkeypatch):
    monkeypatch.setattr(moltis, "JOB_SEGMENT", 100)
    before = moltis.JobOutput(tmp_path / "job")
    before.append(Chunk(STDERR, ID, 0, b"oh\n"))
    for number in range(10):
        before.append(Chunk(STDOUT, ID, number * 50, b"x" * 50))
    before.close()
    after = moltis.JobOutput(tmp_path / "job")
    assert (after.offset(STDOUT), after.offset(STDERR)) == (500, 3)
    after.close()


def test_restarts_cost_a_job_no_output(tmp_path):
    """However often: each life goes on in the file of the one before."""
    lines = [b"line %d\n" % number for number in range(2 * moltis.MAX_JOB_SEGMENTS)]
    for number, line in enumerate(lines):
        output = moltis.JobOutput(tmp_path / "job")
        written = len(b"".join(lines[:number]))
        output.append(Chunk(STDOUT, ID, written, line))
        output.close()
    again = moltis.JobOutput(tmp_path / "job")
    assert whole(again) == b"".join(lines)
    again.close()


@pytest.mark.parametrize("headers", [0, 1])
def test_a_file_that_was_just_begun_costs_nothing(tmp_path, monkeypatch, headers):
    """A crash, or a full disk, left a segment that does not say where it begins."""
    monkeypatch.setattr(moltis, "JOB_SEGMENT", 50)
    output = moltis.JobOutput(tmp_path / "job")
    chunk = Chunk(STDOUT, ID, 0, b"x" * 100)
    output.append(chunk)
    output.append(Chunk(STDERR, ID, 0, b"oh"))
    begun = moltis.JOB_RECORD.pack(STDOUT, 100, 0) * headers
    (tmp_path / "job" / str(output.end)).write_bytes(begun)
    output.close()
    again = moltis.JobOutput(tmp_path / "job")
    assert (again.offset(STDOUT), again.offset(STDERR)) == (100, 2)
    again.append(chunk)  # as its node sends it again
    again.append(Chunk(STDOUT, ID, 100, b"y"))
    assert whole(again) == b"x" * 100 + b"y"
    again.close()


def test_what_is_no_position_is_refused(output):
    output.append(Chunk(STDOUT, ID, 0, b"\xff" * 100))
    with pytest.raises(moltis.RpcError, match="offset must be 0"):
        output.read(60)


def test_output_is_for_its_owner_alone(output, tmp_path):
    output.append(Chunk(STDOUT, ID, 0, b"x"))
    (path,) = (tmp_path / "job").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_job_whose_files_are_slow_is_opened_once_and_holds_up_no_other(
    tmp_path, monkeypatch
):
    jobs = moltis.Jobs(tmp_path, None)
    slow, opening, go_on = str(uuid.uuid4()), threading.Event(), threading.Event()
    opened = []

    with monkeypatch.context() as disk:
        real = moltis.JobOutput

        class Slow(real):
            def __init__(self, directory):
                opened.append(directory.name)
                if directory.name == slow:
                    opening.set()
                    assert go_on.wait(10)
                super().__init__(directory)

        disk.setattr(moltis, "JobOutput", Slow)
        sinks = []
        threads = [
            threading.Thread(target=lambda: sinks.append(jobs.open(slow)))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        assert opening.wait(10)
        assert jobs.open(ID) is jobs.open(ID)
        go_on.set()
        for thread in threads:
            thread.join(10)
    assert sinks[0] is sinks[1]
    assert sorted(opened) == sorted([slow, ID])
    jobs.close()


def test_a_job_that_could_not_be_opened_can_be_later(tmp_path):
    jobs = moltis.Jobs(tmp_path / "jobs", None)
    (tmp_path / "jobs").write_text("in the way")
    with pytest.raises(moltis.RpcError, match="cannot be kept"):
        jobs.open(ID)
    (tmp_path / "jobs").unlink()
    assert jobs.open(ID).output.end == 0
    jobs.close()


# Answers that wait


def test_an_answer_that_is_there_does_not_wait():
    waiters = moltis.Waiters()
    assert waiters.answer(ID, 60, lambda final: "here").result(0) == "here"


def test_an_answer_waits_for_news_or_for_its_time():
    waiters = moltis.Waiters()
    found = []
    news = waiters.answer(ID, 60, lambda final: found or None)
    other = waiters.answer(ID, 0, lambda final: "late" if final else None)
    waiters.wake("another")
    waiters.wake(ID)
    assert other.result(0) == "late"
    assert not news.done()
    found.append("news")
    waiters.wake(ID)
    assert news.result(0) == ["news"]


def test_an_answer_that_fails_says_so():
    def attempt(final):
        raise moltis.RpcError("NOT_FOUND", "gone")

    with pytest.raises(moltis.RpcError, match="gone"):
        moltis.Waiters().answer(ID, 60, attempt).result(0)


def test_too_many_waiters_are_told_at_once(monkeypatch):
    monkeypatch.setattr(moltis, "MAX_WAITERS", 1)
    waiters = moltis.Waiters()
    first = waiters.answer(ID, 60, lambda final: "now" if final else None)
    assert waiters.answer(ID, 60, lambda final: "now" if final else None).result(0)
    assert not first.done()


def test_one_who_looks_late_leaves_nothing_behind():
    waiters, found = moltis.Waiters(), []
    answer = waiters.answer(ID, 60, lambda final: found.pop() if found else None)
    real = answer.done

    def done():
        """Let another thread give the answer just behind our look at it."""
        answer.done = real
        found.append("news")
        waiters.wake(ID)
        return False

    answer.done = done
    waiters.wake(ID)
    assert answer.result(0) == "news"
    waiters.wake(ID)
    assert not waiters._waiting


# The methods


@pytest.fixture
def gateway(tmp_path):
    with InProcessGateway(tmp_path / "gateway") as gateway:
        yield gateway


def start(gateway, command, node="local", **params):
    params = {"args": {"command": command}, "background": True, **params}
    return gateway.call("node.invoke", nodeId=node, command="system.run", **params)[
        "invokeId"
    ]


def read_all(gateway, job, **params):
    """Return the job's last answer, and what all answers say of stdout."""
    text, position = "", 0
    while True:
        answer = gateway.call("command.get", id=job, offset=position, wait=20, **params)
        text += "".join(t for stream, _, t in answer["output"] if stream == "stdout")
        position = answer["next"]
        if answer["endedAt"] and not answer["output"]:
            return answer, text


def test_a_job_answers_at_once_and_is_read_later(gateway):
    job = start(gateway, "echo one; echo oh >&2; sleep 0.3; echo two; exit 4")
    answer, text = read_all(gateway, job)
    assert text == "one\ntwo\n"
    assert (answer["state"], answer["exitCode"]) == ("done", 4)
    assert (answer["stdoutBytes"], answer["stderrBytes"]) == (8, 3)
    assert answer["background"] is True


def test_bytes_that_are_no_text_come_in_base64(gateway):
    job = start(gateway, r"printf '\377\000'")
    gateway.call("command.wait", id=job)
    answer = gateway.call("command.get", id=job, encoding="base64")
    assert base64.b64decode(answer["output"][0][2]) == b"\xff\x00"


def test_waiting_for_a_job_ends_with_it_or_with_the_time(gateway):
    job = start(gateway, "read line </dev/tty; sleep 30")
    assert gateway.call("command.wait", id=job, wait=0)["endedAt"] is None
    gateway.call("command.cancel", id=job)
    assert gateway.call("command.wait", id=job)["state"] == "cancelled"


def test_a_job_that_is_asked_for_twice_runs_once(gateway, tmp_path):
    command = f"echo run >> {tmp_path}/runs"
    job = str(uuid.uuid4())
    assert start(gateway, command, invokeId=job) == job
    assert start(gateway, command, invokeId=job) == job
    gateway.call("command.wait", id=job)
    assert (tmp_path / "runs").read_text() == "run\n"


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"nodeId": "nowhere"}, "no node 'nowhere'"),
        ({"command": "system.which"}, "needs no background"),
        ({"args": {"command": "cat", "stdin": True}}, "gets no input"),
        ({"args": {"command": ""}}, "command is empty"),
    ],
)
def test_a_job_that_cannot_start_leaves_nothing(gateway, params, problem):
    asked = {
        "nodeId": "local",
        "command": "system.run",
        "args": {"command": "true"},
        "background": True,
        **params,
    }
    with pytest.raises(moltis.UserError, match=problem):
        gateway.call("node.invoke", **asked)
    assert gateway.call("command.list") == []
    assert list((gateway.directory / "jobs").iterdir()) == []


def test_a_job_runs_from_the_moment_its_node_has_it(gateway, monkeypatch):
    """The store is told later, and only of what takes long."""
    monkeypatch.setattr(moltis, "RUNNING_AFTER", 600)
    with silent_node(gateway) as peer:
        job = start(gateway, "sleep 600", "gone")
        peer.receive_until(lambda m: m.get("event") == moltis.INVOKE_REQUEST)
        (listed,) = gateway.call("command.list")
        assert (listed["invokeId"], listed["state"]) == (job, "running")
        assert listed["startedAt"] >= listed["askedAt"]
        assert gateway.running.store.commands.by_id(job).state == "sent"
        in_line = {"invokeId": job, "state": "queued", "place": 1}
        peer.send({"type": "event", "event": moltis.INVOKE_STATE, "payload": in_line})
        wait_for(lambda: "place" in gateway.call("command.list")[0])
        assert moltis.job_state(gateway.call("command.list")[0]) == "in line (1)"


def test_who_follows_a_job_hears_at_once_that_its_node_is_away_or_back(gateway):
    with gateway.node("far"), gateway.operator() as client:
        job = start(gateway, "sleep 600", "far")
        asked = {"id": job, "wait": 300}
        leaves = client.start("command.get", {**asked, "waiting": False})
        client.call("node.list", {})  # it waits
        gateway.running.fleet.connected("id-of-far").link.hang_up("for a test")
        away = leaves.result(10)
        assert away["waiting"]
        assert away["waitingMs"] >= 0
        back = client.start("command.get", {**asked, "waiting": True}).result(20)
        assert (back["waiting"], back.get("waitingMs")) == (False, None)
        gateway.call("command.cancel", id=job)
        gateway.call("command.wait", id=job)


def test_who_asks_again_hears_for_how_long_the_node_has_been_away(gateway):
    events, invoke_id = SimpleQueue(), str(uuid.uuid4())
    params = {
        "nodeId": "gone",
        "command": "system.run",
        "args": {"command": "sleep 600", "stream": True},
        "invokeId": invoke_id,
    }
    with gateway.operator() as first:
        with silent_node(gateway) as peer:
            first.start("node.invoke", params)
            peer.receive_until(lambda m: m.get("event") == moltis.INVOKE_REQUEST)
        invocation = gateway.running.invocations.get(invoke_id)
        wait_for(lambda: invocation.away_ms)
        with gateway.operator() as second:
            second.listen(events.put)
            second.start("node.invoke", params)
            event = events.get(timeout=10)
    assert event.payload["state"] == "waiting"
    assert event.payload["waitingMs"] > 0


@pytest.mark.parametrize("written", [b"", b"begun\n"])
def test_a_lost_job_keeps_what_is_known_of_it(gateway, capsys, written):
    with silent_node(gateway) as peer:
        job = start(gateway, "sleep 600", "gone")
        peer.receive_until(lambda m: m.get("event") == moltis.INVOKE_REQUEST)
        if written:
            peer.send(moltis.encode_chunk(Chunk(STDOUT, job, 0, written)))
            wait_for(lambda: gateway.call("command.get", id=job)["output"])
        (device,) = gateway.call("device.pair.list")
        gateway.call("device.token.revoke", deviceId=device["deviceId"])
    lost = gateway.call("command.wait", id=job)
    assert (lost["state"], lost["stdoutBytes"]) == ("lost", len(written))
    assert moltis.job_status(lost, moltis.Output({})) == moltis.EXIT_UNREACHABLE
    unknown = "how the command ended" if written else "whether the command ran"
    said = f"moltis: Rust box: its token was revoked; {unknown} is not known\n"
    assert capsys.readouterr().err == said


def test_a_job_on_the_gateway_s_machine_says_that_the_gateway_stopped(tmp_path, capsys):
    with InProcessGateway(tmp_path / "gateway") as first:
        job = start(first, "echo begun; sleep 600")
        wait_for(lambda: first.call("command.get", id=job)["output"])
    with InProcessGateway(tmp_path / "gateway") as second:
        ended = second.call("command.get", id=job)
        record = second.running.store.commands.by_id(job)
    assert moltis.job_status(ended, moltis.Output({})) == moltis.INTERRUPTED
    said = "Local: the command was cancelled; the gateway on its machine stopped"
    assert said in capsys.readouterr().err
    # And to one who asked for it in the foreground, and asks again.
    assert moltis.record_result(record)["stopped"]


def test_jobs_and_what_runs_are_listed_newest_first(gateway):
    with gateway.node("far"):
        first = start(gateway, "true", node="far")
        second = start(gateway, "sleep 30")
        gateway.call("command.wait", id=first)
        listed = gateway.call("command.list")
        assert [job["invokeId"] for job in listed] == [second, first]
        assert [j["invokeId"] for j in gateway.call("command.list", nodeId="far")] == [
            first
        ]
        gateway.call("command.cancel", id=second)
        gateway.call("command.wait", id=second)


def test_what_is_no_job_is_not_found(gateway):
    for method in ("command.get", "command.wait", "command.cancel"):
        with pytest.raises(moltis.UserError, match="nothing is known of a command"):
            gateway.call(method, id="no-such")


def test_the_oldest_jobs_that_ended_make_room(gateway, monkeypatch):
    monkeypatch.setattr(moltis, "MAX_JOBS", 2)
    jobs = []
    for _ in range(4):
        jobs.append(start(gateway, "echo x"))
        gateway.call("command.wait", id=jobs[-1])
    kept = {path.name for path in (gateway.directory / "jobs").iterdir()}
    assert kept == set(jobs[2:])
    assert gateway.call("command.get", id=jobs[0])["output"] == []


def test_a_full_disk_costs_output_and_not_the_command(gateway, home, monkeypatch):
    def fail(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(moltis.JobOutput, "_write", fail)
    job = start(gateway, "echo lost; exit 3")
    done = gateway.call("command.wait", id=job)
    assert (done["state"], done["exitCode"], done["stdoutBytes"]) == ("done", 3, 5)
    environ = {"MOLTIS_GATEWAY_URL": gateway.url, "MOLTIS_API_KEY": gateway.api_key}
    attached = run_moltis("node", "attach", job, home=home, **environ)
    assert "5 B of stdout are not kept any more" in attached.stderr
    assert (attached.returncode, attached.stdout) == (3, "")


def test_a_job_goes_on_where_it_was_after_a_restart_of_the_gateway(tmp_path):
    with InProcessGateway(tmp_path / "gateway") as first:
        token, port = first.token("far"), first.running.port
        settings = {"token": token, "node_id": "far-id"}
        first.node("far", **settings).close()
    data = tmp_path / "gateway"
    node_home = tmp_path / "node"
    node_home.mkdir()
    arguments = ["node", "add", "--foreground", "--node-id", "far-id", "--name", "far"]
    host = f"ws://127.0.0.1:{port}/ws"
    with Program(*arguments, "--host", host, home=node_home, MOLTIS_DEVICE_TOKEN=token):
        with InProcessGateway(data, port=port) as second:
            wait_for(lambda: second.is_connected("far-id"), 20, "the node")
            job = start(second, "for i in 1 2 3 4; do echo $i; sleep 0.5; done", "far")
            wait_for(lambda: second.call("command.get", id=job)["output"])
        with InProcessGateway(data, port=port) as third:
            answer, text = read_all(third, job)
    assert text == "1\n2\n3\n4\n"
    assert (answer["state"], answer["exitCode"]) == ("done", 0)


@pytest.mark.parametrize("restarts", [False, True])
def test_a_job_whose_node_never_returns_is_lost_after_its_timeout(
    tmp_path, monkeypatch, restarts
):
    """The command's own timeout plus LOST_AFTER: 0.5 s here, and an hour there."""
    monkeypatch.setattr(moltis, "LOST_AFTER", -9.5)
    monkeypatch.setattr(moltis, "KEEPALIVE_TICK", 0.05)
    data, port = tmp_path / "gateway", free_port()
    node_home = tmp_path / "node"
    node_home.mkdir()
    gateway = InProcessGateway(data, port=port)
    arguments = ["node", "add", "--foreground", "--node-id", "far-id", "--name", "far"]
    host = f"ws://127.0.0.1:{port}/ws"
    token = gateway.token("far")
    with Program(
        *arguments, "--host", host, home=node_home, MOLTIS_DEVICE_TOKEN=token
    ) as node:
        wait_for(lambda: gateway.is_connected("far-id"), 20, "the node")
        sleep = "echo begun; sleep 100"
        short, long = (
            start(gateway, sleep, "far", args={"command": sleep, "timeout": timeout})
            for timeout in (10_000, 3_600_000)
        )
        wait_for(lambda: gateway.call("command.get", id=short)["output"])
        node.process.kill()
        if restarts:
            gateway.close()
            gateway = InProcessGateway(data, port=port)
        ended = gateway.call("command.wait", id=short, wait=20)
        assert ended["state"] == "lost"
        assert "how the command ended is not known" in ended["error"]
        assert ended["timeoutMs"] == 10_000
        assert read_all(gateway, short)[1] == "begun\n"
        assert gateway.call("command.wait", id=long, wait=0)["waiting"]
        gateway.close()


# The command line


@pytest.fixture
def program(home):
    port = free_port()
    with Program("gateway", "--port", port, home=home) as program:
        program.wait_for_output("Ctrl+C stops it")
        yield program


def test_a_detached_command_is_attached_to_by_the_begin_of_its_id(program, home):
    command = "echo one; echo oh >&2; sleep 0.5; echo two; exit 9"
    started = run_moltis("node", "exec", "--detach", "local", "--", command, home=home)
    assert started.returncode == 0
    job = started.stdout.strip()
    attached = run_moltis("node", "attach", job[:8], home=home)
    assert attached.stdout == "one\ntwo\n"
    assert "oh\n" in attached.stderr
    assert attached.returncode == 9
    again = run_moltis("node", "attach", job, home=home)
    assert (again.stdout, again.returncode) == ("one\ntwo\n", 9)


def test_jobs_are_listed_and_cancelled(program, home):
    started = run_moltis(
        "node", "exec", "--detach", "local", "--", "sleep 60", home=home
    )
    job = started.stdout.strip()
    listed = run_moltis("node", "jobs", "local", home=home)
    assert job in listed.stdout
    assert "sleep 60" in listed.stdout
    done = run_moltis("node", "jobs", "--cancel", job[:8], home=home)
    assert done.returncode == 0
    attached = run_moltis("node", "attach", job, home=home)
    assert attached.returncode == moltis.INTERRUPTED
    assert "cancelled" in attached.stderr


def test_a_job_is_ended_on_the_node_that_was_named_and_on_no_other(gateway, home):
    environ = {"MOLTIS_GATEWAY_URL": gateway.url, "MOLTIS_API_KEY": gateway.api_key}
    with gateway.node("far"):
        job = start(gateway, "sleep 600", node="far")
        words = ("--cancel", job, "--json")
        other = run_moltis("node", "jobs", "local", *words, home=home, **environ)
        assert other.returncode == moltis.EXIT_FAILURE
        assert f"'{job}' is no job on local" in other.stderr
        assert gateway.call("command.wait", id=job, wait=0)["endedAt"] is None
        named = run_moltis("node", "jobs", "far", *words, home=home, **environ)
        assert [row["invokeId"] for row in json.loads(named.stdout)] == [job]
        assert gateway.call("command.wait", id=job)["state"] == "cancelled"


def test_jobs_on_several_nodes_are_printed_with_their_names(gateway, home):
    environ = {"MOLTIS_GATEWAY_URL": gateway.url, "MOLTIS_API_KEY": gateway.api_key}
    with gateway.node("far"):
        words = ("node", "exec", "--detach", "far", "local", "--", "true")
        started = run_moltis(*words, home=home, **environ)
        printed = [line.split() for line in started.stdout.splitlines()]
        jobs = {j["invokeId"]: j["nodeName"] for j in gateway.call("command.list")}
        assert [jobs[job].casefold() for job, _ in printed] == ["far", "local"]
        assert [name.casefold() for _, name in printed] == ["far", "local"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("exit 3", "done (3)"),
        ("kill -9 $$", "done (SIGKILL)"),
        ("kill -36 $$", "done (signal 36)"),
        ("sleep 600", "timed_out"),
    ],
)
def test_lists_say_how_a_command_ended(gateway, command, words):
    args = {"command": command, "timeout": 300 if "sleep" in command else None}
    job = start(gateway, "", args=args)
    ended = gateway.call("command.wait", id=job)
    assert moltis.job_state(ended) == words
    assert ended["askedAt"] <= ended["startedAt"] <= ended["endedAt"]
    row = next(r for r in gateway.call("audit.list") if r["event"] == "command")
    assert moltis.audit_row(row)[5] == words


def test_ending_what_has_ended_is_said_to_come_too_late(program, home):
    started = run_moltis("node", "exec", "--detach", "local", "--", "exit 3", home=home)
    job = started.stdout.strip()
    assert run_moltis("node", "attach", job, home=home).returncode == 3
    done = run_moltis("node", "jobs", "--cancel", job, home=home)
    assert done.returncode == moltis.EXIT_FAILURE
    assert "the command on Local had ended before: done (3)" in done.stderr


def test_ending_what_runs_on_a_node_that_is_away_says_when_that_will_be(
    gateway, capsys
):
    with silent_node(gateway) as peer:
        job = start(gateway, "sleep 600", "gone")
        peer.receive_until(lambda m: m.get("event") == moltis.INVOKE_REQUEST)
    wait_for(lambda: gateway.call("command.get", id=job)["waiting"])
    with gateway.operator() as client:
        moltis.cancel_job(client, job, moltis.Output({}))
    assert "it ends when Rust box is back, which is away now" in capsys.readouterr().err


@pytest.mark.parametrize("follows_anew", [False, True])
def test_the_end_of_what_is_no_job_is_told_at_once(gateway, tmp_path, follows_anew):
    """Also when the client that follows it came back meanwhile: `wait` is not over."""
    fifo, invoke_id = tmp_path / "fifo", str(uuid.uuid4())
    os.mkfifo(fifo)
    params = {
        "nodeId": "local",
        "command": "system.run",
        "args": {"command": f"read x <{fifo}; exit 7", "stream": True},
        "invokeId": invoke_id,
    }
    with gateway.operator() as client, gateway.operator() as asks:
        results = [client.start("node.invoke", params)]
        wait_for(lambda: gateway.running.invocations.get(invoke_id))
        answers = [
            asks.start(method, {"id": invoke_id, "wait": 300})
            for method in ("command.get", "command.wait")
        ]
        asks.call("node.list", {})  # both are waiting
        if follows_anew:
            results.append(client.start("node.invoke", params))
            with pytest.raises(moltis.RpcError, match="another client"):
                results[0].result(10)
        with fifo.open("w") as file:
            file.write("x\n")
        for answer in answers:
            ended = answer.result(10)
            assert (ended["state"], ended["exitCode"]) == ("done", 7)
            assert not ended["background"]
        assert results[-1].result(10)["exitCode"] == 7


def test_looking_at_what_is_no_job_leaves_nothing_behind(gateway):
    """Forty looks ask once to be woken at the end."""
    invoke_id = str(uuid.uuid4())
    with gateway.operator() as client, gateway.operator() as asks:
        args = {"command": "read x </dev/tty; sleep 30", "stream": True}
        params = {"nodeId": "local", "command": "system.run", "args": args}
        result = client.start("node.invoke", {**params, "invokeId": invoke_id})
        client.call("node.list", {})  # it is under way, and so is its answer
        callbacks = gateway.running.invocations.get(invoke_id).future._done_callbacks
        before = len(callbacks)
        for method in ("command.get", "command.wait") * 20:
            asks.start(method, {"id": invoke_id, "wait": 300})
        asks.call("node.list", {})  # all are waiting
        assert len(callbacks) <= before + 1
        asks.call("command.cancel", {"id": invoke_id})
        assert result.result(10)["cancelled"]


def test_attaching_to_a_foreground_command_says_where_its_output_is(program, home):
    command = "echo shown; read x; exit 7"
    with subprocess.Popen(
        [sys.executable, PROGRAM, "node", "exec", "local", "--stdin", "--", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=clean_environment(home),
    ) as foreground:
        assert foreground.stdout.readline() == b"shown\n"
        listed = run_moltis("node", "jobs", "--json", home=home)
        job = json.loads(listed.stdout)[0]["invokeId"]
        with Program("node", "attach", job, home=home) as attached:
            attached.wait_for_output("is no job: its output is with who started it")
            foreground.stdin.write(b"x\n")
            foreground.stdin.close()
            assert attached.process.wait(10) == 7
            assert attached.stdout == ""
    after = run_moltis("node", "attach", job, home=home)
    assert after.returncode == 7
    assert "output of this command on Local is not kept here" in after.stderr


def test_a_job_whose_answer_is_lost_is_named_and_can_be_asked_for(
    gateway, home, monkeypatch
):
    hang_up_on_jobs(monkeypatch)
    environ = {"MOLTIS_GATEWAY_URL": gateway.url, "MOLTIS_API_KEY": gateway.api_key}
    words = ("node", "exec", "--detach", "local", "--", "echo once; exit 4")
    started = run_moltis(*words, home=home, **environ)
    assert started.returncode == moltis.EXIT_UNREACHABLE
    assert started.stdout == ""
    said = re.search("`moltis (node attach ([0-9a-f-]{36}))` tells", started.stderr)
    attached = run_moltis(*said.group(1).split(), home=home, **environ)
    assert (attached.stdout, attached.returncode) == ("once\n", 4)
    assert [job["invokeId"] for job in gateway.call("command.list")] == [said.group(2)]


def test_of_a_job_that_the_gateway_never_heard_of_attach_says_so(gateway, home):
    environ = {"MOLTIS_GATEWAY_URL": gateway.url, "MOLTIS_API_KEY": gateway.api_key}
    attached = run_moltis("node", "attach", str(uuid.uuid4()), home=home, **environ)
    assert attached.returncode == moltis.EXIT_FAILURE
    assert "nothing is known of a command" in attached.stderr


def test_attaching_to_output_that_cannot_be_read_says_so_and_ends(tmp_path, home):
    with InProcessGateway(tmp_path / "gateway") as gateway:
        job = start(gateway, "echo hi")
        gateway.call("command.wait", id=job)
    (tmp_path / "gateway" / "jobs" / job / "of another program").touch()
    with InProcessGateway(tmp_path / "gateway") as gateway:
        environ = {"MOLTIS_GATEWAY_URL": gateway.url, "MOLTIS_API_KEY": gateway.api_key}
        attached = run_moltis("node", "attach", job, home=home, **environ)
    assert attached.returncode == moltis.EXIT_UNREACHABLE
    assert "the output of a job cannot be kept" in attached.stderr
    assert "the gateway" not in attached.stderr


def test_attaching_to_no_job_says_where_to_look(program, home):
    done = run_moltis("node", "attach", "nonsense", home=home)
    assert done.returncode == moltis.EXIT_FAILURE
    assert "moltis node jobs" in done.stderr


def test_asking_for_a_job_a_second_time_costs_its_output_nothing(tmp_path):
    jobs, job = moltis.Jobs(tmp_path / "jobs", None), str(uuid.uuid4())
    with jobs.new(job) as sink:
        pass
    with pytest.raises(moltis.RpcError), jobs.new(job):
        raise moltis.RpcError("CONFLICT", "it was asked for before")
    sink.chunk(moltis.Chunk(moltis.STDOUT, job, 0, b"kept"))
    assert b"".join(jobs.read_all(job)) == b"kept"
    jobs.close()
