"""What one computer does when it is asked, whoever asks."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import threading
import time

import pytest
from support import process_exists, wait_for, wait_in_shell

import moltis
from moltis import Ending, JobState


class RecordingPeer:
    """A MachinePeer that takes all logs, and keeps what it is told."""

    def __init__(self, machine=None, acknowledges=False):
        self.logs = {}
        self.places = []
        self.told_at = []  # of each of them
        self.input = []
        self.machine = machine
        self.acknowledges = acknowledges
        self._lock = threading.Lock()

    def log_ready(self, log):
        with self._lock:
            for offset, data in iter(log.take, None):
                have = self.logs.setdefault(log.job_id, b"")
                assert offset == len(have) or not have
                self.logs[log.job_id] = have + data
                if self.acknowledges:
                    self.machine.acknowledge(log.job_id, offset + len(data))

    def place(self, job_id, place):
        self.told_at.append(time.monotonic())
        self.places.append((job_id, place))

    def input_consumed(self, job_id, offset, *, resume=False):
        self.input.append((job_id, offset, resume))

    def stream(self, job_id, kind=moltis.STDOUT):
        frames = moltis.log_frames(self.logs[job_id])
        return b"".join(data for number, data in frames if number == kind)

    def ending(self, job_id):
        for kind, data in moltis.log_frames(self.logs.get(job_id, b"")):
            if kind == moltis.ENDING:
                return moltis.decode_ending(data)
        return None

    def wait(self, job_id):
        return wait_for(lambda: self.ending(job_id), what="the ending")


GATE = wait_in_shell("gate")


class Machines:
    """Makes machines that are closed at the end."""

    def __init__(self, directory):
        self._directory = directory
        # An empty HOME: the inventory links all that is in it.
        self._environ = {"PATH": "/usr/bin:/bin", "HOME": str(directory / "home")}
        self._inventory = moltis.Inventory(self._environ)
        self._made = []

    def make(self, **options):
        options = {"working_dir": str(self._directory), **options}
        machine = moltis.Machine(
            moltis.MachineOptions(self._environ, self._inventory, **options)
        )
        self._made.append(machine)
        return machine

    def close(self):
        for machine in self._made:
            machine.close()
        self._inventory.close()


@pytest.fixture
def machines(tmp_path):
    machines = Machines(tmp_path)
    yield machines
    machines.close()


@pytest.fixture
def machine(machines, monkeypatch):
    """A machine with two places for commands, and two in line."""
    row = moltis.WORKS["run"].replace(side_by_side=2, line=2)
    monkeypatch.setitem(moltis.WORKS, "run", row)
    return machines.make()


@pytest.fixture
def peer(machine):
    peer = RecordingPeer(machine)
    machine.attach(peer)
    return peer


def start(machine, command, job_id=None, **spec):
    job_id = job_id or moltis.new_id()
    machine.start(job_id, "run", {"command": command, **spec})
    return job_id


def ask(machine, peer, work, spec):
    job_id = moltis.new_id()
    machine.start(job_id, work, spec)
    return peer.wait(job_id)


def settle(machine, peer, job_id):
    peer.wait(job_id)
    machine.acknowledge(job_id, len(peer.logs[job_id]))


# -- a job, from its start to what is remembered of it -------------------------


def test_a_command_is_a_log_with_an_ending(machine, peer):
    job_id = start(machine, "echo out; echo err >&2; exit 5")
    ending = peer.wait(job_id)
    assert peer.stream(job_id, moltis.STDOUT) == b"out\n"
    assert peer.stream(job_id, moltis.STDERR) == b"err\n"
    assert (ending.state, ending.exit_code) == ("done", 5)
    assert (ending.stdout_bytes, ending.stderr_bytes) == (4, 4)


@pytest.mark.parametrize(
    ("work", "spec", "words"),
    [
        ("run", {}, "command is missing"),
        ("run", {"command": "x", "cwd": "/no/such"}, "working directory /no/such"),
        ("which", {"binary": "../sh"}, "plain name"),
        ("chat", {"model": "a/b", "messages": []}, "does not lend its models"),
        ("explode", {}, "unknown work 'explode'"),
    ],
)
def test_every_error_is_an_ending(machine, peer, work, spec, words):
    ending = ask(machine, peer, work, spec)
    assert ending.state == JobState.FAILED
    assert words in ending.reason


def test_a_known_id_does_not_run_again(machine, peer, tmp_path):
    """While it runs, when it has ended, and when its log was acknowledged."""
    job_id = moltis.new_id()
    line = f"echo once >> runs; {GATE}"
    for _ in range(2):
        start(machine, line, job_id)
    (tmp_path / "gate").touch()
    peer.wait(job_id)
    start(machine, line, job_id)
    settle(machine, peer, job_id)
    assert machine.held() == {}
    del peer.logs[job_id]
    start(machine, line, job_id)
    assert peer.wait(job_id).reason == moltis.RAN_BEFORE
    assert (tmp_path / "runs").read_text() == "once\n"


def test_an_ending_is_kept_until_all_of_the_log_is_acknowledged(machine, peer):
    job_id = start(machine, "echo hi")
    peer.wait(job_id)
    machine.acknowledge(job_id, 8)
    assert machine.held() == {job_id: 8}
    machine.acknowledge(job_id, len(peer.logs[job_id]))
    assert machine.held() == {}


def test_what_was_not_sent_cannot_be_acknowledged(machine, peer):
    job_id = start(machine, "printf abc")
    peer.wait(job_id)
    with pytest.raises(moltis.RpcError):
        machine.acknowledge(job_id, len(peer.logs[job_id]) + 1)
    machine.acknowledge("unknown", 4)


def test_only_so_many_endings_are_kept(machine, peer, monkeypatch):
    monkeypatch.setattr(moltis, "MAX_KEPT", 3)
    ids = [start(machine, "true") for _ in range(2)]
    for _ in range(3):
        for job_id in ids:
            peer.wait(job_id)
        ids.append(start(machine, "true"))
    peer.wait(ids[-1])
    assert list(machine.held()) == ids[-3:]


def test_only_so_much_output_is_kept(machine, peer, monkeypatch):
    monkeypatch.setattr(moltis, "MAX_KEPT_OUTPUT", 2500)
    ids = []
    for _ in range(4):
        ids.append(start(machine, "head -c 1000 /dev/zero"))
        peer.wait(ids[-1])
    assert list(machine.held()) == ids[2:]


def test_only_so_many_ids_are_remembered(machine, peer, monkeypatch):
    monkeypatch.setattr(moltis, "MAX_REMEMBERED", 2)
    ids = []
    for _ in range(4):
        ids.append(start(machine, "true"))
        settle(machine, peer, ids[-1])
    peer.logs.clear()
    for job_id, state in ((ids[3], "failed"), (ids[0], "done")):
        start(machine, "true", job_id)
        assert peer.wait(job_id).state == state


def test_a_fault_of_ours_is_an_ending_too(machine, peer, monkeypatch):
    monkeypatch.setattr(moltis.Command, "_loop", lambda *_: 1 / 0)
    job_id = start(machine, "sleep 120")
    assert peer.wait(job_id).reason == "the node failed; its log says why"


# -- input, cancel, close ------------------------------------------------------


def test_input_is_fed_and_its_consumption_reported(machine, peer):
    job_id = start(machine, "cat", stdin=True)
    for offset, data in ((0, b"ab"), (2, b"cd"), (4, b"")):
        machine.input(job_id, offset, data)
    assert peer.wait(job_id).exit_code == 0
    assert peer.stream(job_id) == b"abcd"
    assert peer.input[-1] == (job_id, 4, False)
    machine.input("unknown", 0, b"x")


def test_a_gap_in_the_input_is_refused(machine, peer):
    job_id = start(machine, "cat", stdin=True)
    with pytest.raises(moltis.RpcError, match="does not follow"):
        machine.input(job_id, 7, b"x")
    machine.cancel(job_id)


def test_cancel_ends_the_command_and_says_so(machine, peer, tmp_path):
    job_id = start(machine, "echo $$ > pid; sleep 120")
    path = tmp_path / "pid"
    wait_for(lambda: path.exists() and path.read_text().strip(), what="its start")
    machine.cancel(job_id, "a reason")
    ending = peer.wait(job_id)
    assert (ending.state, ending.reason) == ("cancelled", "a reason")
    assert not process_exists(int(path.read_text()))
    machine.cancel(job_id)  # changes nothing any more
    assert machine.held() == {job_id: 0}


def test_a_cancel_that_comes_before_its_start_is_remembered(machine, peer, tmp_path):
    job_id = moltis.new_id()
    machine.cancel(job_id)
    start(machine, "touch ran", job_id)
    assert peer.wait(job_id).state == JobState.CANCELLED
    assert not (tmp_path / "ran").exists()


def test_closing_ends_all_jobs_and_says_why(machine, peer):
    ids = [start(machine, "sleep 120") for _ in range(4)]
    machine.close()
    for job_id in ids:
        ending = peer.ending(job_id)
        assert (ending.state, ending.reason) == ("cancelled", "its node stopped")
    assert peer.wait(start(machine, "true")).reason == "this node is stopping"


def test_closing_ends_what_is_just_starting(machine, peer, monkeypatch, tmp_path):
    """Its shell runs already, and no thread has it yet."""
    entering, closing = threading.Event(), threading.Event()
    call = moltis.Machine._call_worker

    def hold(*args):
        entering.set()
        assert closing.wait(60)
        call(*args)

    monkeypatch.setattr(moltis.Machine, "_call_worker", hold)
    command = "echo $$ >pid; sleep 120"
    starting = threading.Thread(target=start, args=(machine, command, "one"))
    starting.start()
    assert entering.wait(60)
    pid = tmp_path / "pid"
    wait_for(lambda: pid.exists() and pid.read_text().strip())
    closer = threading.Thread(target=machine.close)
    closer.start()
    wait_for(lambda: machine._stopping)
    closing.set()
    closer.join(60)
    assert peer.ending("one").state == JobState.CANCELLED
    starting.join(60)
    assert not process_exists(int(pid.read_text()))


# -- side by side, and in line -------------------------------------------------


def test_commands_beyond_the_limit_wait_in_line_and_their_places_are_reported(
    machine, peer, tmp_path
):
    ids = [start(machine, GATE) for _ in range(4)]
    wait_for(lambda: len(peer.places) == 2, what="places in line")
    assert peer.places == [(ids[2], 1), (ids[3], 2)]
    (tmp_path / "gate").touch()
    for job_id in ids:
        assert peer.wait(job_id).exit_code == 0
    assert [place for job_id, place in peer.places if job_id == ids[2]] == [1, 0]
    assert peer.places[-1][1] == 0


def test_a_job_that_moves_up_is_reported_once_a_second(machine, peer):
    first = [start(machine, "cat", stdin=True) for _ in range(2)]
    third, fourth = (start(machine, "cat", stdin=True) for _ in range(2))
    wait_for(lambda: len(peer.places) == 2, what="both places")
    machine.input(first[0], 0, b"")
    wait_for(lambda: (fourth, 1) in peer.places, what="the next place")
    then, now = (peer.told_at[peer.places.index((fourth, place))] for place in (2, 1))
    assert now - then > moltis.PLACE_INTERVAL / 2
    wait_for(lambda: (third, 0) in peer.places)  # by another thread


def test_a_job_that_waits_for_a_moment_only_is_not_reported(machine, peer, monkeypatch):
    monkeypatch.setattr(moltis, "PLACE_TICK", 60.0)
    for job_id in [start(machine, "true") for _ in range(4)]:
        peer.wait(job_id)
    assert peer.places == []


def test_those_far_behind_are_reported_less_often(machine, peer, monkeypatch):
    monkeypatch.setattr(moltis, "PLACE_INTERVAL", 0.0)
    job = moltis.MachineJob("run", moltis.JobLog("id", None), None)
    job.waits = True
    for place in (100, 90, 80, 79, 79, 12, 11, 10, 9, 9):
        machine._report_place(job, place)
    job.waits = False
    machine._report_place(job, 0)
    machine._report_place(job, 8)  # that was looked up before
    assert [place for _, place in peer.places] == [100, 79, 12, 10, 9, 0]


def test_what_does_not_fit_into_the_line_is_refused(machine, peer):
    ids = [start(machine, "sleep 120") for _ in range(5)]
    ending = peer.wait(ids[4])
    assert ending.state == JobState.FAILED
    assert ending.reason == "this machine has 4 jobs of this kind already"


def test_a_command_in_line_is_cancelled_at_once(machine, peer):
    ids = [start(machine, "sleep 120") for _ in range(3)]
    wait_for(lambda: peer.places, what="its place")
    machine.cancel(ids[2])
    assert peer.ending(ids[2]) == Ending(JobState.CANCELLED)
    assert peer.places == [(ids[2], 1), (ids[2], 0)]


def test_other_works_do_not_wait_in_the_line_of_commands(machine, peer):
    for _ in range(4):
        start(machine, "sleep 120")
    found = ask(machine, peer, "which", {"binary": "sh"})
    assert found.result == {
        "found": True,
        "path": shutil.which("sh", path="/usr/bin:/bin"),
    }


def test_a_thread_is_used_again_and_ends_when_there_is_no_work(
    machine, peer, monkeypatch
):
    peer.wait(start(machine, "true"))
    named = lambda name: {t for t in threading.enumerate() if t.name == name}  # noqa: E731
    wait_for(lambda: machine._idle)  # it has its name a moment before
    before = set(threading.enumerate())
    peer.wait(start(machine, "true"))
    assert set(threading.enumerate()) <= before
    job_id = start(machine, "cat", stdin=True)
    (thread,) = wait_for(lambda: named(f"moltis-run-{job_id[:8]}"))
    monkeypatch.setattr(moltis, "WORKER_LINGER", 0.01)
    machine.input(job_id, 0, b"")
    wait_for(lambda: not thread.is_alive())


def test_a_command_for_which_there_is_no_thread_ends_at_once(
    machine, peer, monkeypatch
):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as crowded:
        crowded.setattr(threading.Thread, "start", refuse)
        ending = peer.wait(start(machine, "sleep 120"))
    assert ending.reason == "this machine has no thread left"
    assert peer.wait(start(machine, "true")).exit_code == 0


# -- a peer that goes away and comes back --------------------------------------


def test_a_job_goes_on_while_there_is_no_peer(machine):
    job_id = start(machine, "echo kept; exit 7")
    wait_for(lambda: machine._jobs[job_id].log.ended, what="the end")
    peer = RecordingPeer()
    machine.resume({job_id: 0}, peer)
    assert peer.wait(job_id).exit_code == 7
    assert peer.stream(job_id) == b"kept\n"


def test_resuming_sends_only_what_follows_the_offset(machine, peer):
    job_id = start(machine, "echo a; sleep 0.1; echo b >&2")
    peer.wait(job_id)
    other = RecordingPeer()
    machine.resume({job_id: 7}, other)
    assert other.logs[job_id] == peer.logs[job_id][7:]


def test_a_job_that_writes_meanwhile_sends_a_new_peer_nothing_too_early(
    machine, peer, monkeypatch
):
    """The new peer lacks what was lost with the old connection."""
    job_id = start(machine, "echo a; echo b >&2")
    peer.wait(job_id)
    send_from = moltis.JobLog.send_from

    def late(log, offset):
        send_from(log, 0)  # it has more to send,
        log.ready()  # as the thread that writes it says
        send_from(log, offset)

    machine.attach(None)
    monkeypatch.setattr(moltis.JobLog, "send_from", late)
    other = RecordingPeer()
    machine.resume({job_id: 7}, other)
    assert other.logs[job_id] == peer.logs[job_id][7:]


def test_what_the_peer_does_not_name_is_ended_and_forgotten(machine, peer, tmp_path):
    ended = start(machine, "true")
    peer.wait(ended)
    runs = start(machine, "echo $$ > pid; exec sleep 120")
    path = tmp_path / "pid"
    wait_for(lambda: path.exists() and path.read_text().strip(), what="its start")
    machine.resume({})
    wait_for(lambda: not machine.held(), what="both to be forgotten")
    assert not process_exists(int(path.read_text()))
    peer.logs.clear()
    for job_id in (ended, runs):
        start(machine, "true", job_id)
        assert peer.wait(job_id).state == JobState.FAILED


def test_places_and_input_are_reported_again(machine, peer):
    ids = [start(machine, "cat", stdin=True) for _ in range(3)]
    machine.input(ids[0], 0, b"abc")
    wait_for(lambda: peer.input == [(ids[0], 3, False)], what="consumption")
    wait_for(lambda: peer.places, what="the place")
    other = RecordingPeer()
    machine.resume(machine.held(), other)
    expected = [(ids[0], 3, True), (ids[1], 0, True), (ids[2], 0, True)]
    assert sorted(other.input) == sorted(expected)
    wait_for(lambda: other.places == [(ids[2], 1)], what="the place, again")


def test_a_job_that_left_the_line_meanwhile_is_reported_as_running_once(
    machine, peer, monkeypatch
):
    """Also where its own thread comes to that only after its new peer."""
    resumed, report = threading.Event(), moltis.Machine._report_place

    def late(machine, job, place):
        assert place or resumed.wait(60)
        report(machine, job, place)

    monkeypatch.setattr(moltis.Machine, "_report_place", late)
    ids = [start(machine, "cat", stdin=True) for _ in range(3)]
    wait_for(lambda: peer.places == [(ids[2], 1)], what="the place")
    machine.attach(None)
    machine.input(ids[0], 0, b"")
    wait_for(lambda: not machine._jobs[ids[2]].waits, what="its turn")
    other = RecordingPeer()
    machine.resume(machine.held(), other)
    assert other.places == [(ids[2], 0)]
    resumed.set()
    machine.input(ids[2], 0, b"")
    other.wait(ids[2])
    assert other.places == [(ids[2], 0)]


def test_output_beyond_the_window_waits_for_the_peer(machine, peer):
    job_id = start(machine, "head -c 3000000 /dev/zero")
    log = machine._jobs[job_id].log
    wait_for(lambda: not log.room, what="a full window")
    assert log.held <= moltis.LOG_WINDOW
    peer.acknowledges = True
    peer.machine = machine
    machine.acknowledge(job_id, len(peer.logs[job_id]))
    assert peer.wait(job_id).stdout_bytes == 3_000_000
    wait_for(lambda: machine.held() == {}, what="the last acknowledgement")


# -- other works ---------------------------------------------------------------


def test_the_providers_are_those_of_the_inventory(machine, peer):
    ending = ask(machine, peer, "providers", {})
    assert isinstance(ending.result["providers"], list)


class Catalog:
    """Stands for the models of this machine: one that answers what it is told to."""

    def __init__(self, *events, error=None, models=()):
        self._events, self._error, self._models = events, error, models
        self.asked = []

    def model(self, name, effort):
        self.asked.append((name, effort) if effort else name)
        return self

    def stream(self, messages, tools, cancel):
        yield from self._events
        if self._error is not None:
            raise self._error
        cancel.pause(60)

    def models(self, cancel, *, refresh=False):
        self.asked.append(refresh)
        return list(self._models), {"ollama": "is away"}


REQUEST = {"model": "far/model", "messages": [{"role": "user", "text": "hi"}]}


def lending(machines, *events, **options):
    machine = machines.make(catalog=Catalog(*events, **options))
    peer = RecordingPeer(machine)
    machine.attach(peer)
    return machine, peer


def test_a_lent_model_answers_in_json_lines(machines):
    delta = moltis.Delta("text", "hello")
    machine, peer = lending(machines, delta, error=moltis.ModelError("it broke"))
    job_id = moltis.new_id()
    machine.start(job_id, "chat", REQUEST)
    ending = peer.wait(job_id)
    assert json.loads(peer.stream(job_id)) == {"kind": "text", "text": "hello"}
    assert (ending.state, ending.reason) == ("failed", "it broke")
    assert moltis.CAP_LLM in machine.capabilities


def test_a_conversation_that_is_too_long_is_told_from_other_failures(machines):
    machine, peer = lending(machines, error=moltis.ContextTooLong("too long"))
    ending = ask(machine, peer, "chat", REQUEST)
    assert ending.state == "failed"
    assert ending.result == {"kind": "context", "detail": ""}


def test_a_question_is_cancelled_also_while_its_log_is_full(machines):
    delta = moltis.Delta("text", "x" * 100_000)
    machine, peer = lending(machines, *[delta] * 20)
    job_id = moltis.new_id()
    machine.start(job_id, "chat", REQUEST)
    wait_for(lambda: not machine._jobs[job_id].log.room, what="a full window")
    machine.cancel(job_id)
    assert peer.wait(job_id).state == JobState.CANCELLED


def test_a_long_answer_waits_for_room_and_is_whole(machines):
    deltas = [moltis.Delta("text", str(n) * 100_000) for n in range(10)] * 2
    machine, peer = lending(machines, *deltas, error=moltis.ModelError("end"))
    peer.acknowledges = True
    job_id = moltis.new_id()
    machine.start(job_id, "chat", REQUEST)
    peer.wait(job_id)
    lines = peer.stream(job_id).splitlines()
    assert [json.loads(line)["text"] for line in lines] == [d.text for d in deltas]


def test_more_questions_than_a_machine_takes_are_refused(machines):
    machine, peer = lending(machines)
    ids = [moltis.new_id() for _ in range(moltis.MAX_LENT + 1)]
    for job_id in ids:
        machine.start(job_id, "chat", REQUEST)
    assert "8 jobs of this kind" in peer.wait(ids[-1]).reason


def test_the_models_that_can_be_asked_are_a_result(machines):
    info = moltis.ModelInfo("a/b", "A", "B", True)
    machine, peer = lending(machines, models=[info])
    ending = ask(machine, peer, "models", {"refresh": True})
    assert ending.result == {
        "models": [info.to_json()],
        "errors": {"ollama": "is away"},
    }


def test_a_list_of_models_that_no_frame_can_hold_is_cut(machines):
    models = [moltis.ModelInfo(f"a/{n}", "A", "B" * 100, True) for n in range(2000)]
    machine, peer = lending(machines, models=models)
    ending = ask(machine, peer, "models", {})
    assert 100 < len(ending.result["models"]) < 2000


def test_commands_terminals_and_copies_are_recorded():
    assert [name for name, work in moltis.WORKS.items() if work.recorded] == [
        "run",
        "terminal",
        "file.read",
        "file.write",
        "file.change",
    ]


def test_a_checked_spec_has_no_variable_that_may_not_be_forwarded():
    spec = {"command": "x", "env": {"TERM": "dumb", "PATH": "/evil"}, "timeout": 5}
    assert moltis.check_spec("run", spec) == {
        "command": "x",
        "env": {"TERM": "dumb"},
        "timeout": 5,
        "stdin": False,
    }
    for work, wrong in (("run", {}), ("which", {}), ("explode", {})):
        with pytest.raises(moltis.RpcError) as raised:
            moltis.check_spec(work, wrong)
        assert raised.value.code == "INVALID_REQUEST"


def test_a_moltis_gateway_finds_the_capability_that_it_looks_for(machine):
    assert "system.run" in machine.capabilities


def test_the_platform_has_moltis_name(monkeypatch):
    names = {"linux": "linux", "darwin": "macos", "freebsd14": "freebsd"}
    for ours, theirs in names.items():
        monkeypatch.setattr(moltis.sys, "platform", ours)
        assert moltis.platform_name() == theirs


# -- the owner's own guard -----------------------------------------------------


def is_allowed(command, *patterns):
    try:
        moltis.AllowedCommands(patterns).check(moltis.CommandSpec(command))
    except moltis.RpcError as error:
        assert error.code == "FORBIDDEN"
        return False
    return True


@pytest.mark.parametrize(
    ("pattern", "command"),
    [
        ("uptime", "uptime"),
        ("systemctl status *", "systemctl status nginx"),
        ("systemctl status *", "systemctl status "),
        ("*", "anything at all"),
        ("ls ?", "ls x"),
        ("ls [a-c]*", "ls banana"),
        ("ls [!a-c]*", "ls $HOME"),
        ("echo [*]", "echo *"),
        ("a*b*c", "a b b c c"),
        ("* | tail -1", "df -h / | tail -1"),
        ("echo $(date) *", "echo $(date) now"),
        ("make -j? 2>&1", "make -j4 2>&1"),
        ("one; two", "one; two"),
        ("echo ${HOME} *", "echo ${HOME} $USER x$"),
    ],
)
def test_what_the_owner_allows_may_run(pattern, command):
    assert is_allowed(command, "nothing else", pattern)


@pytest.mark.parametrize(
    ("pattern", "command"),
    [
        ("uptime", "uptime -p"),
        ("uptime", " uptime"),
        ("uptime", "Uptime"),
        ("ls ?", "ls xx"),
        ("systemctl status *", "systemctl status; reboot"),
        ("systemctl status *", "systemctl status x; reboot"),
        ("systemctl status *", "systemctl status x && reboot"),
        ("systemctl status *", "systemctl status x & reboot"),
        ("systemctl status *", "systemctl status x | sh"),
        ("systemctl status *", "systemctl status `reboot`"),
        ("systemctl status *", "systemctl status $(reboot)"),
        ("systemctl status *", "systemctl status x\nreboot"),
        ("systemctl status *", "systemctl status x\rreboot"),
        ("systemctl status *", "systemctl status x > /etc/passwd"),
        ("systemctl status *", "systemctl status < /etc/shadow"),
        ("*", "a;b"),
        ("ls ?", "ls ;"),
        ("ls [!a]", "ls ;"),
        ("* | tail -1", "a | b | tail -1"),
        ("one; *", "one; two; three"),
        # Neither half of `$(` may come from a wildcard.
        ("echo $*", "echo $(reboot)"),
        ("echo *(x)", "echo $(x)"),
        ("echo ?(x)", "echo $(x)"),
        # bash calculates in these, and runs what it finds in an index.
        ("df *", "df ${y:=a['$''(reboot)']} ${x[y]}"),
        ("df *", "df ${HOME:LC_X}"),
        ("df *", "df $[LC_X]"),
        ("echo $*", "echo ${HOME:LC_X}"),
        ("echo *{x}", "echo ${x}"),
        ("printf *", "printf -v a['$''(reboot)'] x"),
        ("", "x"),
        # Quotes, backslash and # change what the marks behind them mean.
        ("echo *", "echo 'x"),
        ("echo *", 'echo "x"'),
        ("echo *", "echo \\x"),
        ("echo *", "echo # x"),
        ("echo ? x", "echo # x"),
    ],
)
def test_what_the_owner_does_not_spell_may_not_run(pattern, command):
    assert not is_allowed(command, pattern)


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
def test_what_bash_would_run_while_it_calculates_is_not_allowed(tmp_path):
    """Where /bin/sh is bash, each of these makes a file, without one of `;&|`$(`."""
    shell = tmp_path / "sh"
    shell.symlink_to(shutil.which("bash"))
    index = f"a['$''(touch {tmp_path}/ran)']"
    for line in (f"echo ${{y:={index}}} ${{x[y]}}", f"printf -v {index} x"):
        subprocess.run([str(shell), "-c", line], check=False, capture_output=True)
        assert (tmp_path / "ran").exists()
        (tmp_path / "ran").unlink()
        assert not is_allowed(line, "echo *", "printf *")


def test_a_hostile_line_cannot_make_the_guard_think_for_long():
    assert not is_allowed("a" * 2000 + "!", "*a" * 30 + "b")


def test_a_guarded_machine_says_no_and_runs_nothing(machines, tmp_path):
    allowed = moltis.AllowedCommands(["echo *", "which"])
    guarded = machines.make(allowed=allowed, catalog=Catalog())
    peer = RecordingPeer()
    guarded.attach(peer)
    refused = start(guarded, f"touch {tmp_path}/ran")
    assert "does not allow" in peer.wait(refused).reason
    elsewhere = start(guarded, "echo yes", cwd="/")
    assert "working directory" in peer.wait(elsewhere).reason
    assert peer.wait(start(guarded, "echo yes", cwd=" ")).exit_code == 0
    assert ask(guarded, peer, "which", {"binary": "sh"}).result["found"]
    for work in ("providers", "models", "chat"):
        ending = ask(guarded, peer, work, REQUEST)
        assert f"does not allow the work '{work}'" in ending.reason
    assert moltis.CAP_LLM not in guarded.capabilities
    assert not (tmp_path / "ran").exists()


# -- file systems that are away --------------------------------------------------


@pytest.fixture
def silent(tmp_path):
    """A directory whose file system never answers: a FUSE without its program."""
    path, libc = tmp_path / "silent", ctypes.CDLL(None, use_errno=True)
    path.mkdir()
    try:
        descriptor = os.open("/dev/fuse", os.O_RDWR)
    except OSError:
        pytest.skip("there is no FUSE here")
    options = f"fd={descriptor},rootmode=40000,user_id=0,group_id=0".encode()
    where = os.fsencode(path)
    if not hasattr(libc, "mount") or libc.mount(b"test", where, b"fuse", 0, options):
        os.close(descriptor)
        pytest.skip("no file systems can be mounted here")
    yield path
    libc.umount2(where, 2)  # MNT_DETACH
    os.close(descriptor)  # those who wait get an error
    wait_for(
        lambda: not [t for t in threading.enumerate() if t.name.startswith("moltis-l")],
        what="those who were left behind",
    )


HELD = [
    ("file.read", {"paths": ["{}/f"]}),
    ("file.read", {"paths": ["{}"], "recursive": True}),
    ("file.read", {"paths": ["{}/*"], "patterns": True}),
    ("file.read", {"paths": ["{}/f"], "part": {"first": 1}}),
    ("file.write", {"path": "{}/f"}),
    ("file.write", {"path": "{}/f", "splices": []}),
    (
        "file.write",
        {"path": "{}", "origin": {"name": "f", "identity": "", "resumes": True}},
    ),
    ("file.change", {"action": "mkdir", "path": "{}/new"}),
    ("file.change", {"action": "delete", "path": "{}", "recursive": True}),
]


def held_spec(spec, silent):
    return json.loads(json.dumps(spec).replace("{}", str(silent)))


def test_what_a_silent_file_system_holds_ends_with_a_sentence(
    machines, silent, monkeypatch
):
    monkeypatch.setattr(moltis, "HELD_TIMEOUT", 0.3)
    machine = machines.make(files=moltis.FilePlaces("/"))
    peer = RecordingPeer(machine)
    machine.attach(peer)
    for work, spec in HELD * 2:  # more than there are places
        ending = ask(machine, peer, work, held_spec(spec, silent))
        assert ending.state == "failed", (work, spec)
        assert "silent" in ending.reason
        assert ending.reason.endswith("its file system did not answer within 0 s")
    assert ask(machine, peer, "run", {"command": "echo on"}).exit_code == 0
    monkeypatch.setattr(moltis, "HELD_TIMEOUT", 60.0)
    (silent.parent / "f").write_bytes(b"1")
    read = {"paths": [str(silent.parent / "f")]}
    assert ask(machine, peer, "file.read", read).state == "done"


def test_what_a_silent_file_system_holds_can_be_cancelled(
    machines, silent, monkeypatch
):
    monkeypatch.setattr(moltis, "CANCEL_PATIENCE", 0.1)
    machine = machines.make(files=moltis.FilePlaces("/"))
    peer = RecordingPeer(machine)
    machine.attach(peer)
    ids = [moltis.new_id() for _ in HELD]
    for job_id, (work, spec) in zip(ids, HELD):
        machine.start(job_id, work, held_spec(spec, silent))
    assert ask(machine, peer, "run", {"command": "echo on"}).exit_code == 0
    for job_id in ids:
        machine.cancel(job_id, "by anna")
    endings = [peer.wait(job_id) for job_id in ids]
    assert {(e.state, e.reason) for e in endings} == {("cancelled", "by anna")}
    machine.start(moltis.new_id(), *("file.read", held_spec(HELD[0][1], silent)))
    machine.close()  # ends it, as it ends all others


def test_nothing_gets_its_name_once_it_was_given_up(machines, tmp_path, monkeypatch):
    """The disk comes back after a transfer ended, and writes what it was given."""
    monkeypatch.setattr(moltis, "FLUSH_TIMEOUT", 0.2)
    flushed, fsync = threading.Event(), os.fsync

    def wait(descriptor):
        flushed.wait(60)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", wait)
    machine = machines.make(files=moltis.FilePlaces("/"))
    peer = RecordingPeer(machine)
    machine.attach(peer)
    job_id = moltis.new_id()
    spec = {"path": str(tmp_path / "there"), "bare": True}
    machine.start(job_id, "file.write", spec)
    data = b"content"
    machine.input(job_id, 0, data + hashlib.sha256(data).digest())
    machine.input(job_id, len(data) + 32, b"")
    assert "did not answer" in peer.wait(job_id).reason
    log = peer.logs[job_id]
    flushed.set()
    wait_for(lambda: not os.listdir(tmp_path), what="the part to go")
    assert peer.logs[job_id] == log
