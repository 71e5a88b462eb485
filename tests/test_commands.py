"""Commands: a job's log on its node, and one shell command that writes it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support import process_exists, wait_for, wait_in_shell, with_patience

import moltis
from moltis import (
    ENDING,
    FRAME_HEAD,
    LOG_WINDOW,
    MAX_FRAME_DATA,
    MAX_LOG_MESSAGE,
    STDERR,
    STDOUT,
    CommandSpec,
    Ending,
    JobLog,
    JobState,
    RpcError,
)

MIB = 1024 * 1024


KERNELS = ["pidfd", "portable"] if hasattr(os, "pidfd_open") else ["portable"]


@pytest.fixture(autouse=True, params=KERNELS)
def kernel(request, monkeypatch):
    """Each test twice: with what Linux has, and with what macOS has."""
    if request.param == "portable":
        monkeypatch.delattr(os, "pidfd_open", raising=False)
        monkeypatch.setattr(moltis, "SEALED_PIPES", False)
        monkeypatch.setattr(moltis, "POPEN_FORKS", False)


@pytest.fixture
def impatient(monkeypatch):
    """SIGKILL comes soon, so that no test waits for seconds."""
    monkeypatch.setattr(moltis, "KILL_AFTER", 0.2)


@pytest.fixture
def patient(monkeypatch):
    """SIGKILL comes late: a shell on a busy machine has time to hear SIGTERM."""
    monkeypatch.setattr(moltis, "KILL_AFTER", 60.0)


class Reader:
    """The other end of a log: takes messages, checks them, acknowledges."""

    def __init__(self, acknowledges=True):
        self.acknowledges = acknowledges
        self.log = None
        self.received = b""  # the log so far
        self.repeated = 0  # bytes that came again
        self.messages = 0
        self.consumed = []
        self._lock = threading.Lock()

    def on_ready(self, log):
        with self._lock:
            for offset, data in iter(log.take, None):
                assert len(data) <= MAX_LOG_MESSAGE
                assert moltis.whole_frames(data) == len(data)
                have = len(self.received)
                assert offset <= have, f"a gap from {have} to {offset}"
                self.messages += 1
                self.repeated += min(have - offset, len(data))
                self.received += data[have - offset :]
                if self.acknowledges:
                    log.acknowledge(len(self.received))

    def stream(self, kind):
        frames = moltis.log_frames(self.received)
        return b"".join(data for number, data in frames if number == kind)

    @property
    def stdout(self):
        return self.stream(STDOUT)

    @property
    def stderr(self):
        return self.stream(STDERR)


def make(text, reader=None, *, environ=None, **options):
    reader = reader or Reader()
    names = ("cwd", "env", "timeout", "stdin", "tty")
    spec = {name: options[name] for name in names if name in options}
    for name in spec:
        del options[name]
    reader.log = JobLog("id", reader.on_ready)
    command = moltis.Command(
        CommandSpec(text, **spec),
        reader.log,
        environ=moltis.command_environment(os.environ if environ is None else environ),
        on_input=reader.consumed.append,
        **options,
    )
    return command, reader


def run(text, reader=None, **options):
    command, reader = make(text, reader, **options)
    ending = command.run()
    command.log.finish(ending)
    command.log.ready()
    return command.log.ending, reader


class Background:
    """A command that runs in a thread of the test."""

    def __init__(self, text, reader=None, **options):
        self.command, self.reader = make(text, reader, **options)
        self._thread = threading.Thread(target=self._run, name="test-run")
        self._thread.start()

    def _run(self):
        ending = self.command.run()
        self.command.log.finish(ending)
        self.command.log.ready()

    @property
    def ended(self):
        return not self._thread.is_alive()

    def wait(self, timeout=60):
        self._thread.join(timeout)
        assert self.ended, "the command did not end"
        return self.command.log.ending

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.command.cancel()
        self.wait()


def python(script, *arguments):
    """Return a shell command that runs a Python script."""
    words = [sys.executable, "-c", script, *map(str, arguments)]
    return " ".join(shlex.quote(word) for word in words)


def frame(kind, data):
    return FRAME_HEAD.pack(kind, len(data)) + data


# The log


def new_log(window=LOG_WINDOW):
    told = []
    return JobLog("id", told.append, window=window), told


def drain(log):
    return b"".join(data for _, data in iter(log.take, None))


def test_a_log_is_frames_in_the_order_in_which_they_were_read():
    log, _ = new_log()
    for kind, data in ((STDOUT, b"a"), (STDERR, b"b"), (STDOUT, b"c")):
        log.append(kind, data)
    log.finish(Ending(JobState.DONE, exit_code=0))
    *frames, (kind, ending) = moltis.log_frames(drain(log))
    assert frames == [(STDOUT, b"a"), (STDERR, b"b"), (STDOUT, b"c")]
    assert kind == ENDING
    assert json.loads(ending) == {
        "state": "done",
        "exitCode": 0,
        "stdoutBytes": 2,
        "stderrBytes": 1,
    }


def test_each_byte_is_taken_once():
    log, _ = new_log()
    assert log.take() is None
    log.append(STDOUT, b"a")
    assert log.take() == (0, frame(STDOUT, b"a"))
    assert log.take() is None


def test_what_was_not_sent_yet_grows_into_one_frame():
    log, _ = new_log()
    for letter in (b"a", b"b", b"c"):
        log.append(STDOUT, letter)
    assert log.take() == (0, frame(STDOUT, b"abc"))
    log.append(STDOUT, b"d")  # a boundary that was sent stays one
    assert log.take() == (8, frame(STDOUT, b"d"))


def test_a_frame_that_was_sent_and_is_to_be_sent_again_does_not_grow():
    log, _ = new_log()
    log.append(STDOUT, b"a")
    log.take()
    log.send_from(0)
    log.append(STDOUT, b"b")
    assert drain(log) == frame(STDOUT, b"a") + frame(STDOUT, b"b")


def test_frames_and_messages_have_at_most_64_kib():
    log, _ = new_log(4 * MIB)
    log.append(STDERR, b"e" * 10)
    log.append(STDOUT, b"x" * 200_000)
    messages = list(iter(log.take, None))
    assert all(len(data) <= MAX_LOG_MESSAGE for _, data in messages)
    assert all(moltis.whole_frames(data) == len(data) for _, data in messages)
    frames = list(moltis.log_frames(b"".join(data for _, data in messages)))
    assert [len(data) for kind, data in frames if kind == STDOUT] == [
        MAX_FRAME_DATA,
        MAX_FRAME_DATA,
        MAX_FRAME_DATA,
        200_000 - 3 * MAX_FRAME_DATA,
    ]


def test_many_small_frames_share_a_message():
    log, _ = new_log()
    for number in range(10_000):
        log.append((STDOUT, STDERR)[number % 2], b"x" * 10)
    sizes = [len(data) for _, data in iter(log.take, None)]
    assert sizes == [65535, 65535, 150_000 - 2 * 65535]


def test_there_is_room_for_whole_frames_within_the_window():
    log, _ = new_log(window=2 * MAX_LOG_MESSAGE)
    opened = []
    log.on_room = lambda: opened.append(1)
    assert log.room == MAX_FRAME_DATA
    log.append(STDOUT, b"x" * MAX_FRAME_DATA)
    log.append(STDOUT, b"y")
    assert log.room == 0
    offset, data = log.take()
    log.take()
    log.acknowledge(offset + len(data))
    assert (log.room, opened) == (MAX_FRAME_DATA, [1])
    log.acknowledge(log.end)
    assert opened == [1]


def test_what_is_acknowledged_is_dropped():
    log, _ = new_log()
    for number in range(4):
        log.append((STDOUT, STDERR)[number % 2], b"hello")
    drain(log)
    log.acknowledge(20)
    assert (log.begin, log.end, log.held) == (20, 40, 20)
    for late in (0, 10, 20):
        log.acknowledge(late)
    assert log.begin == 20
    log.send_from(0)
    assert log.take()[0] == 20


@pytest.mark.parametrize("offset", [5, 11, 100])
def test_an_offset_that_is_no_boundary_or_was_not_sent_is_refused(offset):
    log, _ = new_log()
    for kind in (STDOUT, STDERR, STDOUT):
        log.append(kind, b"hello")
        if kind == STDERR:
            drain(log)
    for use in (log.acknowledge, log.send_from):
        with pytest.raises(RpcError, match=f"offset {offset} "):
            use(offset)
    assert (log.begin, log.end) == (0, 30)


def test_the_ending_needs_no_room():
    log, _ = new_log(window=MAX_LOG_MESSAGE)
    log.append(STDOUT, b"x" * MAX_FRAME_DATA)
    assert log.room == 0
    log.finish(Ending(JobState.DONE))
    assert log.ended
    assert next(reversed(list(moltis.log_frames(drain(log)))))[0] == ENDING


def test_a_result_that_no_frame_can_hold_is_a_failure():
    log, _ = new_log()
    log.finish(Ending(JobState.DONE, result={"text": "x" * MAX_LOG_MESSAGE}))
    assert log.ending.state == JobState.FAILED
    assert log.end < 200


def test_a_log_that_is_discarded_holds_nothing_and_never_fills():
    log, _ = new_log(window=MAX_LOG_MESSAGE)
    log.append(STDOUT, b"x" * MAX_FRAME_DATA)
    opened = []
    log.on_room = lambda: opened.append(1)
    log.discard()
    assert opened == [1]
    log.append(STDOUT, b"y" * MAX_FRAME_DATA)
    log.finish(Ending(JobState.DONE))
    assert (log.room > 0, log.held, log.take()) == (True, 0, None)
    assert log.ending.stdout_bytes == 2 * MAX_FRAME_DATA


@pytest.mark.parametrize("seed", range(8))
def test_a_log_survives_random_acknowledgements_and_reconnects(seed):
    """A reader that loses its connection at random gets every byte, once."""
    import random

    chance = random.Random(seed)
    log, _ = new_log()
    received = b""
    for _ in range(2000):
        step = chance.random()
        if step < 0.4 and log.room:
            size = chance.randint(1, chance.choice((10, MAX_FRAME_DATA)))
            log.append(chance.choice((STDOUT, STDERR)), b"x" * size)
        elif step < 0.7:
            taken = log.take()
            if taken is not None and chance.random() < 0.8:  # else lost on the way
                offset, data = taken
                if offset <= len(received):
                    received += data[len(received) - offset :]
        elif step < 0.9:
            log.acknowledge(len(received))
        else:
            log.send_from(len(received))
    log.send_from(len(received))
    received += drain(log)
    log.finish(Ending(JobState.DONE))
    sizes = dict.fromkeys((STDOUT, STDERR), 0)
    for kind, data in moltis.log_frames(received):
        sizes[kind] += len(data)
    assert sizes == {STDOUT: log.ending.stdout_bytes, STDERR: log.ending.stderr_bytes}


# Output and exit status


def test_output_and_exit_status_come_back():
    result, reader = run("echo out; echo err >&2; exit 7")
    assert (reader.stdout, reader.stderr) == (b"out\n", b"err\n")
    assert (result.state, result.exit_code, result.signal) == ("done", 7, None)
    assert (result.stdout_bytes, result.stderr_bytes) == (4, 4)
    assert result.reason is None
    assert abs(result.started_at - moltis.now_ms()) < 20_000


def test_a_command_may_say_nothing():
    result, reader = run("true")
    assert result.exit_code == 0
    assert len(list(moltis.log_frames(reader.received))) == 1


def test_death_by_signal_is_done_with_the_signal_s_name():
    ending = run("kill -9 $$")[0]
    assert (ending.state, ending.exit_code, ending.signal) == ("done", None, "SIGKILL")


@pytest.mark.skipif(sys.platform != "linux", reason="real-time signals")
def test_a_signal_without_a_name_has_its_number():
    assert run("kill -40 $$")[0].signal == "signal 40"


def test_output_is_bytes_not_text():
    script = "import os; os.write(1, bytes(range(256)) * 100)"
    assert run(python(script))[1].stdout == bytes(range(256)) * 100


def test_a_command_that_begins_with_a_dash_is_no_option():
    result, reader = run("-e")
    assert result.exit_code == 127
    assert b"not found" in reader.stderr


def test_long_output_is_whole():
    result, reader = run("yes 0123456 | head -c 5000000")
    assert reader.stdout == b"0123456\n" * 625_000
    assert result.stdout_bytes == 5_000_000


def test_lines_written_one_by_one_are_collected():
    """A message for each line would cost more than the command."""
    _, reader = run("i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done")
    assert reader.stdout == b"".join(b"%d\n" % i for i in range(20000))
    assert reader.messages < 2000


@contextlib.contextmanager
def busy_machine(pause, share):
    """Have commands that begin meanwhile wait `pause` s between looking and waiting.

    `share` is in how many of all cases, from 0 to 1.
    """
    chance = random.Random(1)

    def profile(frame, event, _):
        ours = frame.f_code is moltis.Command._register_pipes.__code__
        if event == "return" and ours and chance.random() < share:
            time.sleep(pause)

    threading.setprofile(profile)
    try:
        yield
    finally:
        threading.setprofile(None)


@pytest.mark.parametrize("tty", [None, moltis.TerminalSize(24, 80)])
def test_output_goes_on_however_busy_the_machine_is(tty):
    """Between the decision to leave outputs alone and the wait, that pause may end."""
    line = "x" * 499  # a pipe holds only some of them
    script = f"for _ in range(500): print('{line}', flush=True); time.sleep(0.0003)"
    text = python(f"import time\n{script}")
    with busy_machine(0.003, 0.3), Background(text, tty=tty) as background:
        background.wait()
    assert background.reader.stdout.split() == [line.encode()] * 500


def test_a_command_ends_however_busy_the_machine_is(monkeypatch, tmp_path):
    """Between the last look at its outputs and the wait, the time for them may end."""
    monkeypatch.setattr(moltis, "DRAIN_AFTER_EXIT", 0.05)
    pid_file = tmp_path / "pid"
    text = f"sleep 120 & echo $! > {pid_file}"
    with busy_machine(0.1, 1), Background(text) as background:
        background.wait()
    os.kill(int(pid_file.read_text()), signal.SIGKILL)


def test_the_first_line_is_not_delayed_by_what_may_follow():
    with Background("echo first; sleep 120") as background:
        wait_for(lambda: background.reader.stdout)
        assert not background.ended


def test_streams_are_in_the_order_in_which_they_were_written(tmp_path):
    lines = [f"{stream}{number}" for number in range(5) for stream in "oe"]
    # Each is written once the one before it was read.
    text = "; ".join(
        f"echo {line} >&{1 + line.startswith('e')}; {wait_in_shell(tmp_path / line)}"
        for line in lines
    )
    with Background(text) as background:
        received = lambda: background.reader.stdout + background.reader.stderr  # noqa: E731
        for line in lines:
            wait_for(lambda line=line: line.encode() in received())
            (tmp_path / line).touch()
        background.wait()
    *frames, _ending = moltis.log_frames(background.reader.received)
    assert (
        b"".join(data for _, data in frames)
        == "".join(f"{line}\n" for line in lines).encode()
    )


def test_both_streams_flow_at_once():
    """Neither of them may fill its pipe while we wait for the other."""
    script = """
import os
for _ in range(40):
    os.write(2, b"e" * 65536)
    os.write(1, b"o" * 65536)
"""
    _, reader = run(python(script))
    assert reader.stdout == b"o" * 65536 * 40
    assert reader.stderr == b"e" * 65536 * 40


def test_a_command_that_closes_its_outputs_is_still_waited_for():
    result, _ = run("exec >&- 2>&-; sleep 0.2; exit 5")
    assert result.exit_code == 5
    assert result.duration > 0.15


def test_a_command_that_reads_its_own_output_does_not_block_us(impatient):
    """/dev/stdout opened for reading takes bytes that poll() has promised us."""
    with Background("echo ours; cat /dev/stdout", timeout=300) as background:
        assert background.wait().state == JobState.TIMED_OUT


# Where and with what it runs


def test_the_working_directory_is_the_given_one(tmp_path):
    assert run("pwd", cwd=str(tmp_path))[1].stdout.strip() == bytes(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", ["spawned", "sent elsewhere", "not spawned"])
def test_a_command_begins_afresh_however_it_is_started(tmp_path, monkeypatch, way):
    """No signal ignored, as Python does; no descriptor of ours; its own session."""
    monkeypatch.setattr(moltis, "POPEN_FORKS", True)
    if way == "not spawned":  # as where the C library cannot give it a session
        monkeypatch.setattr(moltis.os, "posix_spawn", lambda *_a, **_k: refuse())
    elsewhere = str(tmp_path) if way == "sent elsewhere" else None
    text = "grep SigIgn /proc/self/status; ls /proc/$$/fd; ps -o sid= -p $$; echo $$"
    result, reader = run(text, cwd=elsewhere)
    assert result.exit_code == 0, reader.stderr
    _, ignored, *descriptors, sid, pid = reader.stdout.split()
    for number in moltis.RESTORED_SIGNALS:
        assert not int(ignored, 16) >> (number - 1) & 1
    assert {int(number) for number in descriptors} <= {0, 1, 2} | inheritable()
    assert sid == pid


def inheritable():
    """Return what this process was itself started with, so that any child has it."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that read the directory
            found |= {int(name)} if os.get_inheritable(int(name)) else set()
    return found


def refuse():
    raise NotImplementedError


def test_a_shell_is_spawned_where_a_command_need_not_be_sent(monkeypatch, tmp_path):
    """It takes half a millisecond less before Python 3.10."""
    monkeypatch.setattr(moltis, "POPEN_FORKS", True)
    spawned = []
    spawn = os.posix_spawn
    monkeypatch.setattr(
        moltis.os, "posix_spawn", lambda *a, **k: spawned.append(1) or spawn(*a, **k)
    )
    assert run("true", cwd=os.getcwd())[0].exit_code == 0
    assert bool(spawned) is moltis.SEALED_PIPES
    assert run("true", cwd=str(tmp_path))[0].exit_code == 0
    assert len(spawned) <= 1


@pytest.mark.parametrize("blank", [None, "", "  "])
def test_a_blank_working_directory_is_the_runners(tmp_path, blank):
    _, reader = run("pwd", cwd=blank, working_dir=str(tmp_path))
    assert reader.stdout.strip() == bytes(tmp_path)


def test_a_relative_working_directory_starts_at_the_runners(tmp_path):
    (tmp_path / "sub").mkdir()
    _, reader = run("pwd", cwd="sub", working_dir=str(tmp_path))
    assert reader.stdout.strip() == bytes(tmp_path / "sub")


def test_a_tilde_is_the_home_directory(home):
    assert run("pwd", cwd="~")[1].stdout.strip() == bytes(home)


def test_a_working_directory_that_is_not_there_is_one_sentence(tmp_path):
    missing = str(tmp_path / "missing")
    result, _ = run("true", cwd=missing)
    assert result.state == JobState.FAILED
    assert (
        result.reason
        == f"cannot use the working directory {missing}: No such file or directory"
    )


def test_a_working_directory_that_vanishes_does_not_end_the_command(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    result, reader = run(f"rmdir {gone}; echo still here", cwd=str(gone))
    assert result.exit_code == 0
    assert reader.stdout == b"still here\n"


@pytest.mark.parametrize("text", ["echo \0", "echo \ud800"])
def test_a_command_that_cannot_be_passed_on_is_one_sentence(text):
    result, _ = run(text)
    assert result.state == JobState.FAILED
    assert result.reason.startswith("the command cannot be passed to /bin/sh")


def test_a_command_that_is_too_long_is_one_sentence():
    result, _ = run(": " + "x" * 4 * MIB)
    assert "too long" in result.reason


def test_a_missing_shell_is_one_sentence(monkeypatch):
    monkeypatch.setattr(moltis, "SHELL", "/nowhere/sh")
    result, _ = run("true", cwd="/")
    assert result.reason == "cannot start /nowhere/sh: No such file or directory"


def test_our_secrets_are_not_in_a_commands_environment():
    environ = {
        "PATH": os.environ["PATH"],
        "MOLTIS_DEVICE_TOKEN": "mdt_secret",
        "OPENAI_API_KEY": "sk-secret",
        "KEPT": "yes",
    }
    _, reader = run("env", environ=environ)
    assert b"KEPT=yes" in reader.stdout
    assert b"secret" not in reader.stdout


def test_only_harmless_variables_are_forwarded():
    """By the gateway, and again by the node."""
    forwarded = {
        "TERM": "xterm",
        "LANG": "de_DE.UTF-8",
        "LC_ALL": "C",
        "COLORTERM": "truecolor",
        "NO_COLOR": "1",
        "FORCE_COLOR": "1",
    }
    refused = {
        "PATH": "/evil",
        "LD_PRELOAD": "/evil.so",
        "lang": "x",
        "LC_": "x",
        "TERMINFO": "/evil",
        "LC_ALL\n": "x",
    }
    assert moltis.filter_environment({**forwarded, **refused}) == forwarded


def test_a_locale_that_this_system_lacks_is_not_forwarded(monkeypatch):
    """`bash` would warn of it; macOS forwards LC_CTYPE=UTF-8."""
    installed = frozenset(("C", "C.utf8", "POSIX", "de_DE.utf8@euro"))
    monkeypatch.setattr(moltis, "_installed_locales", lambda: installed)
    there = {
        "LANG": "C.UTF-8",
        "LC_TIME": "de_DE.UTF-8@euro",
        "TERM": "no_SUCH",
        "LC_TERMINAL": "iTerm2",
    }
    lacking = {"LC_ALL": "de_DE.UTF-8", "LC_CTYPE": "UTF-8", "LC_NUMERIC": "de_DE"}
    assert moltis.usable_here({**there, **lacking}) == there
    monkeypatch.setattr(moltis, "_installed_locales", frozenset)  # musl takes any
    assert moltis.usable_here(lacking) == lacking


def test_bash_has_nothing_to_warn_of_in_a_language_that_is_not_here():
    warned = run("bash -c true", env={"LC_ALL": "xx_YY.UTF-8", "LANG": "C.UTF-8"})[1]
    assert warned.stderr == b""
    assert run("echo $LC_ALL", env={"LC_ALL": "C"})[1].stdout == b"C\n"


def test_commands_find_what_is_in_the_users_usual_places(home):
    """A service is started with a bare PATH, under launchd with none."""
    ruby = home / ".local/bin/ruby"
    ruby.parent.mkdir(parents=True)
    ruby.write_text("#!/bin/sh\necho 3.1.2\n")
    ruby.chmod(0o755)
    for environ in ({"PATH": "/usr/bin:/bin"}, {}, {"PATH": ""}):
        assert run("ruby", environ={**environ, "HOME": str(home)})[1].stdout
    path = moltis.command_environment({"PATH": "/a:/bin", "HOME": str(home)})["PATH"]
    assert path.startswith("/a:/bin:")
    assert path.split(":").count("/bin") == 1
    assert "/snap/none" not in path


@pytest.mark.parametrize(
    "value", [1, None, "a\nb", "a\0b", "x" * 257, "a[$(b)]", "`b`"]
)
def test_a_forwarded_value_is_one_line_without_a_command(value):
    assert moltis.filter_environment({"TERM": value}) == {}


def test_no_descriptor_of_ours_reaches_a_command():
    ours = os.open("/dev/null", os.O_RDONLY)
    try:
        with Background("sleep 120"):
            _, reader = run("for i in /dev/fd/*; do echo ${i##*/}; done; exec sleep 0")
    finally:
        os.close(ours)
    inherited = {int(name) for name in reader.stdout.split()} - {0, 1, 2}
    # What our own parent left open, and the one by which the shell lists them.
    theirs = {number for number in inherited if _is_inheritable(number)}
    assert ours not in inherited
    assert len(inherited - theirs) <= 1


def _is_inheritable(descriptor):
    try:
        return os.get_inheritable(descriptor)
    except OSError:
        return False


# Ending


def test_a_timeout_ends_the_command():
    def attempt(limit):
        result, reader = run("echo before; sleep 120", timeout=limit)
        assert (result.state, result.signal) == (JobState.TIMED_OUT, "SIGTERM")
        assert result.reason is None
        assert reader.stdout == b"before\n"

    with_patience(attempt, 300, 3000, 30_000)


def test_the_whole_group_is_ended(tmp_path):
    """SIGTERM to the group, not to the shell alone."""
    pids = tmp_path / "pids"
    text = f"sleep 120 & echo $! > {pids}; sh -c 'echo $$ >> {pids}; sleep 120'; true"
    with Background(text) as background:
        wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2)
        background.command.cancel()
        assert background.wait().state == JobState.CANCELLED
    for pid in map(int, pids.read_text().split()):
        assert not process_exists(pid)


def test_a_command_that_ignores_sigterm_is_killed(impatient):
    with Background("trap '' TERM; echo deaf; sleep 120; sleep 120") as background:
        wait_for(lambda: background.reader.stdout)
        background.command.cancel()
        assert background.wait().signal == "SIGKILL"
    assert background.reader.stdout == b"deaf\n"


def test_a_grandchild_that_ignores_sigterm_is_killed(monkeypatch, tmp_path):
    def attempt(limit):  # within a short one, the shell may not have ended either
        monkeypatch.setattr(moltis, "KILL_AFTER", limit)
        pid_file = tmp_path / str(limit)
        text = (
            f"sh -c 'trap \"\" TERM; echo $$ > {pid_file}; sleep 120; sleep 120'"
            " > /dev/null 2>&1 & sleep 120"
        )
        with Background(text) as background:
            wait_for(lambda: pid_file.exists() and pid_file.read_text().strip())
            background.command.cancel()
            assert background.wait().signal == "SIGTERM"
        pid = int(pid_file.read_text())
        wait_for(lambda: not process_exists(pid), what="the grandchild's end")

    with_patience(attempt, 0.2, 5)


@pytest.mark.usefixtures("patient")
def test_a_command_may_clean_up_when_it_is_ended():
    wait = wait_in_shell("/nowhere")
    text = f"trap 'echo clean; exit 3' TERM; echo ready; {wait}"
    with Background(text) as background:
        wait_for(lambda: background.reader.stdout)
        background.command.cancel()
        result = background.wait()
    assert result.exit_code == 3
    assert background.reader.stdout == b"ready\nclean\n"


@pytest.mark.usefixtures("patient")
def test_a_stopped_command_hears_the_signal():
    """A stopped process gets SIGTERM only with SIGCONT."""
    text = "trap 'echo heard; exit 4' TERM; echo ready; kill -STOP $$; sleep 120"
    with Background(text) as background:
        wait_for(lambda: background.reader.stdout)
        background.command.cancel()
        result = background.wait()
    assert result.exit_code == 4 or result.signal == "SIGTERM"


def test_cancel_before_the_start_starts_nothing(tmp_path):
    command, _ = make(f"touch {tmp_path}/ran")
    command.cancel("nobody needs it")
    ending = command.run()
    assert ending == Ending(JobState.CANCELLED, reason="nobody needs it")
    assert not (tmp_path / "ran").exists()


def test_cancel_after_the_shell_s_exit_changes_nothing(tmp_path):
    pid_file = tmp_path / "pid"
    text = f"sleep 120 & echo $! > {pid_file}; exit 3"
    with Background(text) as background:
        wait_for(lambda: background.command._exited_at)
        background.command.cancel()
        ending = background.wait()
    os.kill(int(pid_file.read_text()), signal.SIGKILL)
    assert (ending.state, ending.exit_code) == (JobState.DONE, 3)
    background.command.cancel()
    assert background.command.log.ending is ending


def test_output_that_a_cancel_leaves_unread_is_not_done(tmp_path):
    """The window is full, the shell has ended, and the rest is in its pipe."""
    full = tmp_path / "full"
    size = moltis.LOG_WINDOW - moltis.MAX_LOG_MESSAGE  # then there is no room for more
    text = f"head -c {size} /dev/zero; {wait_in_shell(full)}; echo rest"
    with Background(text, Reader(acknowledges=False)) as background:
        wait_for(lambda: not background.command.log.room)
        full.touch()
        wait_for(lambda: background.command._exited_at)
        background.command.cancel("the gateway stops")
        ending = background.wait()
    assert (ending.state, ending.exit_code) == (JobState.CANCELLED, 0)
    assert ending.reason == "the gateway stops"


def test_a_grandchild_with_the_pipes_does_not_keep_the_command_open(tmp_path):
    """The grandchild itself is left alone."""
    pid_file = tmp_path / "pid"
    result, reader = run(f"sleep 120 & echo $! > {pid_file}; echo done")
    pid = int(pid_file.read_text())
    try:
        assert result.exit_code == 0
        assert result.duration < 60
        assert reader.stdout == b"done\n"
        assert process_exists(pid)
    finally:
        os.kill(pid, signal.SIGKILL)


def test_what_a_grandchild_writes_at_once_still_arrives(monkeypatch):
    monkeypatch.setattr(moltis, "DRAIN_AFTER_EXIT", 10.0)  # and it does not need that
    _, reader = run("echo early; (sleep 0.1; echo late) &")
    assert reader.stdout == b"early\nlate\n"


def test_a_daemon_that_left_the_group_does_not_keep_the_command_open(tmp_path):
    pid_file = tmp_path / "pid"
    script = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open(sys.argv[1], "w").write(str(os.getpid()))
        time.sleep(120)
    os._exit(0)
os.wait()
"""
    text = python(script, pid_file)
    with Background(f"{text}; sleep 120") as background:
        wait_for(lambda: pid_file.exists() and pid_file.read_text())
        background.command.cancel()
        assert background.wait().state == JobState.CANCELLED
    os.kill(int(pid_file.read_text()), signal.SIGKILL)


def test_a_group_of_zombies_is_over(monkeypatch):
    """PID 1 of many containers reaps nobody: zombies take every signal."""
    monkeypatch.setattr(moltis.ProcessGroup, "_signal", lambda *_: True)
    group = moltis.ProcessGroup(["true"], cwd=None, env={}, stdin=False)
    wait_for(lambda: group.exit_code is not None)
    group.end()
    assert wait_for(group.ended, what="the end")
    group.close()


def test_processes_that_could_not_be_ended_are_named(impatient, monkeypatch, tmp_path):
    """Another user's, that is; here a signal just does not reach them."""
    pid_file = tmp_path / "pid"
    real = os.killpg
    spared = []
    monkeypatch.setattr(
        moltis.os,
        "killpg",
        lambda *args: spared.append(args) or _only_look(real, *args),
    )
    text = f"sleep 77 & echo $! > {pid_file}; wait"
    user = moltis.account_name(os.getuid())

    def attempt(limit):
        del spared[:]
        with Background(text, timeout=limit) as background:
            ending = background.wait()
        group = background.command._group
        real(group._shell, signal.SIGKILL)
        wait_for(lambda: group.exit_code is not None)  # reaps it
        assert [number for _, number in spared if number] == [
            signal.SIGTERM,
            signal.SIGCONT,
            signal.SIGKILL,
        ]
        assert ending.state == JobState.TIMED_OUT
        assert pid_file.exists()
        pid = int(pid_file.read_text())
        assert f"sleep (pid {pid}, user {user})" in ending.reason
        assert ending.reason.startswith("could not end ")

    with_patience(attempt, 3000, 30_000)


def _only_look(killpg, group, number):
    if number:
        raise PermissionError
    killpg(group, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="compares with /proc")
def test_ps_finds_the_same_processes_as_proc():
    own = os.getpid()
    for every in (moltis._processes_in_proc, moltis._processes_by_ps):
        (found,) = [group for survivor, group, _ in every() if survivor.pid == own]
        assert found == os.getpgrp()


def test_a_listing_of_processes_that_is_cut_off_is_read_as_far_as_it_goes(monkeypatch):
    listing = moltis.ProgramResult(124, b"  7   7 S   0 /bin/a b\n  8   8")
    monkeypatch.setattr(moltis, "run_program", lambda *_, **__: listing)
    assert list(moltis._processes_by_ps()) == [(moltis.Survivor(7, "a b", 0), 7, "S")]


def test_an_ending_does_not_name_processes_without_end():
    survivors = [moltis.Survivor(n, f"p{n}", os.getuid()) for n in range(5)]
    group = type("Group", (), {"ending": True, "exit_code": None})()
    group.survivors = survivors
    command, _ = make("true")
    command.cancel("by me")
    reason = command._ending(group).reason
    assert reason.startswith("by me; could not end p0 (pid 0, ")
    assert reason.endswith(" and 2 more")


# Windows


def fill(background):
    """Wait until the log has no room for more."""
    wait_for(lambda: not background.command.log.room, what="a full window")


def test_a_full_window_pauses_the_command():
    with Background("yes | head -c 5000000", Reader(acknowledges=False)) as background:
        reader, job_log = background.reader, background.command.log
        fill(background)
        threading.Event().wait(0.1)
        assert LOG_WINDOW - MAX_LOG_MESSAGE < job_log.held <= LOG_WINDOW
        reader.acknowledges = True
        job_log.acknowledge(job_log.end)
        assert background.wait().stdout_bytes == 5_000_000
    assert len(reader.stdout) == 5_000_000


def test_output_waits_for_its_reader_after_the_shells_exit(monkeypatch):
    """A reader that is away for minutes loses nothing of what was written."""
    monkeypatch.setattr(moltis, "DRAIN_AFTER_EXIT", 0.05)
    total = LOG_WINDOW + 20_000
    text = f"yes | head -c {total}"
    with Background(text, Reader(acknowledges=False)) as background:
        reader, job_log = background.reader, background.command.log
        fill(background)
        threading.Event().wait(0.3)  # well beyond the drain
        assert not background.ended
        reader.acknowledges = True
        job_log.acknowledge(job_log.end)
        assert background.wait().stdout_bytes == total
    assert len(reader.stdout) == total


def test_a_grandchild_that_never_stops_is_cut_off():
    """Its pipe is never empty, its reader never away: the drain ends it."""
    ending, reader = run("yes & echo done >&2")
    assert ending.exit_code == 0
    assert reader.stderr == b"done\n"


def test_a_full_pipe_comes_before_what_was_written_after_it(tmp_path, monkeypatch):
    """One read is less than a pipe holds: a page came after the error's text."""
    written = tmp_path / "written"
    poll = moltis._poll

    def late(*arguments):
        wait_for(written.exists, what="both outputs")
        return poll(*arguments)

    monkeypatch.setattr(moltis, "_poll", late)
    _, reader = run(f"head -c 65536 /dev/zero; echo oh >&2; touch {written}")
    kinds = [kind for kind, data in moltis.log_frames(reader.received) if data]
    assert reader.stdout == bytes(65536)
    assert kinds.index(STDERR) == kinds.count(STDOUT)


@pytest.mark.parametrize("limits", [[None], [2000, 30_000]], ids=["cancel", "timeout"])
def test_a_paused_command_can_be_ended(limits):
    def attempt(limit):
        reader = Reader(acknowledges=False)
        with Background("yes", reader, timeout=limit) as background:
            command = background.command
            wait_for(lambda: not command.log.room or background.ended)
            if limit is None:
                command.cancel()
            ending = background.wait()
        assert ending.state == (JobState.TIMED_OUT if limit else JobState.CANCELLED)
        assert ending.stdout_bytes == len(reader.stdout) > LOG_WINDOW // 2
        command.log.send_from(0)  # all of it is there for a reader that comes back
        command.log.ready()
        assert reader.repeated == len(reader.received)

    with_patience(attempt, *limits)


def test_a_reader_that_comes_back_while_the_command_runs_gets_what_it_lacks():
    text = "echo one; read line; echo two"
    with Background(text, Reader(acknowledges=False), stdin=True) as background:
        reader, command = background.reader, background.command
        wait_for(lambda: reader.stdout == b"one\n")
        reader.received = b""
        command.log.send_from(0)
        command.log.ready()
        assert reader.stdout == b"one\n"
        command.input(0, b"\n")
        background.wait()
    assert reader.stdout == b"one\ntwo\n"


def test_a_fault_of_the_reader_ends_the_command():
    def broken(_log):
        raise ZeroDivisionError

    reader = Reader()
    reader.on_ready = broken
    command, _ = make("echo $$; sleep 120", reader)
    with pytest.raises(ZeroDivisionError):
        command.run()


# Limits


@pytest.mark.parametrize("timeout", [None, 60_000])
def test_no_caller_exceeds_the_nodes_timeout(timeout):
    ending, _ = run("sleep 120", timeout=timeout, max_timeout=0.2)
    assert ending.state == JobState.TIMED_OUT


@pytest.mark.parametrize(
    ("timeout", "ok"),
    [(1, True), (0.5, True), (0, False), (-5, False), (2**53 + 2, False)],
)
def test_a_timeout_is_a_positive_number_of_ms(timeout, ok):
    spec = {"command": "true", "timeout": timeout}
    if ok:
        assert CommandSpec.from_json(spec).timeout == timeout
    else:
        with pytest.raises(RpcError, match="timeout must be a positive"):
            CommandSpec.from_json(spec)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({}, "command is missing"),
        ({"command": " "}, "command is empty"),
        ({"command": "a\0b"}, "NUL"),
        ({"command": 7}, "command must be a string"),
        ({"command": "x", "stdin": "yes"}, "stdin must be true or false"),
        ({"command": "x", "timeout": float("nan")}, "timeout must be a positive"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(spec, words):
    with pytest.raises(RpcError, match=words):
        CommandSpec.from_json(spec)


# Input


def feed(command, data, offset=0):
    command.input(offset, data)
    command.input(offset + len(data), b"")


def test_without_input_standard_input_is_empty():
    assert run("cat")[0].exit_code == 0
    command, _ = make("cat")
    assert command.consumed is None
    with pytest.raises(RpcError, match="without input"):
        command.input(0, b"x")


def test_input_reaches_the_command():
    command, reader = make("cat", stdin=True)
    feed(command, bytes(range(256)))
    assert command.run().exit_code == 0
    assert reader.stdout == bytes(range(256))
    assert reader.consumed == [256]
    assert command.consumed == 256


def test_no_input_at_all_is_an_end_as_well():
    command, reader = make("wc -c", stdin=True)
    command.input(0, b"")
    command.run()
    assert reader.stdout.strip() == b"0"


def test_long_input_flows_within_its_window():
    data = os.urandom(5 * MIB)
    with Background("cat", stdin=True) as background:
        reader, command = background.reader, background.command
        for start in range(0, len(data), MIB):
            wait_for(lambda start=start: not start or reader.consumed[-1:] == [start])
            for offset in range(start, start + MIB, MAX_LOG_MESSAGE):
                command.input(offset, data[offset : offset + MAX_LOG_MESSAGE])
        command.input(len(data), b"")
        assert background.wait().exit_code == 0
    assert reader.stdout == data
    assert reader.consumed[-1] == len(data)


def test_a_slow_consumer_of_input_is_not_reported_byte_by_byte():
    script = "import os\nwhile os.read(0, 1000): pass"
    with Background(python(script), stdin=True) as background:
        command, reader = background.command, background.reader
        feed(command, b"x" * MIB)
        assert background.wait().exit_code == 0
    assert reader.consumed[-1] == MIB
    assert len(reader.consumed) <= MIB // MAX_LOG_MESSAGE


def test_input_that_was_here_before_is_skipped():
    command, reader = make("cat", stdin=True)
    command.input(0, b"abcd")
    command.input(2, b"cdef")
    command.input(0, b"abc")
    assert command.consumed == 0
    command.input(6, b"")
    command.input(6, b"")
    command.input(4, b"ef")
    command.run()
    assert reader.stdout == b"abcdef"


@pytest.mark.parametrize(
    ("offset", "data"), [(5, b"x"), (5, b""), (3, b""), (0, b"x" * (MIB + 1))]
)
def test_input_that_does_not_fit_is_refused(offset, data):
    command, _ = make("cat", stdin=True)
    command.input(0, b"abcd")
    with pytest.raises(RpcError):
        command.input(offset, data)


def test_input_after_its_end_is_refused():
    command, _ = make("cat", stdin=True)
    feed(command, b"abcd")
    with pytest.raises(RpcError, match="after its end"):
        command.input(4, b"e")


def test_input_that_the_command_closed_is_taken_and_dropped():
    """The sender has to get on; the command wants no more."""
    text = "exec <&-; echo closed; sleep 120"
    with Background(text, stdin=True) as background:
        reader, command = background.reader, background.command
        wait_for(lambda: reader.stdout)
        command.input(0, b"x" * MIB)
        wait_for(lambda: reader.consumed[-1:] == [MIB])
        command.input(MIB, b"y" * MIB)
        wait_for(lambda: reader.consumed[-1:] == [2 * MIB])


def test_input_that_crosses_the_commands_end_is_dropped():
    command, _ = make("true", stdin=True)
    command.run()
    command.input(0, b"late")
    command.input(7, b"and with a gap")


# Terminals

TTY = moltis.TerminalSize(24, 80)


def test_a_size_that_a_terminal_has_already_makes_its_programs_redraw():
    text = (
        "trap 'stty size' WINCH; echo ready; for i in $(seq 200); do sleep 0.05; done"
    )
    with Background(text, tty=TTY) as background:
        reader, command = background.reader, background.command
        wait_for(lambda: b"ready" in reader.stdout)
        command.resize(TTY)
        wait_for(lambda: b"24 80" in reader.stdout)
        before = len(reader.stdout)
        command.resize(moltis.TerminalSize(33, 99))
        wait_for(lambda: b"33 99" in reader.stdout[before:])
    marks = [
        moltis.decode_mark(d) for k, d in moltis.log_frames(reader.received) if k == 4
    ]
    # A redraw is no change, and is not recorded as one.
    assert {(mark.rows, mark.cols) for mark in marks} == {(24, 80), (33, 99)}


def test_a_redraw_ends_however_often_it_is_asked_for():
    terminal = moltis.Terminal(TTY)
    try:
        wait_for(
            lambda: (
                terminal.resize(TTY)
                or terminal.end_redraw()
                or os.get_terminal_size(terminal.master).columns == 79
            )
        )
        wait_for(
            lambda: (
                terminal.resize(TTY)
                or terminal.end_redraw()
                or os.get_terminal_size(terminal.master).columns == 80
            )
        )
    finally:
        os.close(terminal.master)
        terminal.close_slave()


def test_no_mark_is_between_the_parts_of_a_sequence_that_sets_a_mode(monkeypatch):
    """Whoever begins at the mark would see its end as text, and miss the mode."""
    monkeypatch.setattr(moltis, "MARK_INTERVAL", 0)
    text = r"stty -echo; printf '\033[?10'; read x; printf 49h; read x; printf end"
    with Background(text, tty=TTY) as background:
        reader, command = background.reader, background.command
        wait_for(lambda: b"[?10" in reader.stdout)
        command.input(0, b"\n")
        wait_for(lambda: b"49h" in reader.stdout)
        command.input(1, b"\n")
    frames = list(moltis.log_frames(reader.received))
    starts = [n for n, (kind, _) in enumerate(frames) if kind == moltis.MARK]
    assert len(starts) >= 2
    for n in starts:
        modes = moltis.TerminalModes(moltis.decode_mark(frames[n][1]).modes)
        modes.feed(b"".join(d for kind, d in frames[n:] if kind == moltis.STDOUT))
        assert modes.changed == {"1049": True}


@pytest.mark.parametrize("most", [1024, 0])
def test_a_terminal_works_with_select_and_with_descriptors_that_it_cannot_have(
    monkeypatch, most
):
    """As on macOS, whose poll() may not support terminals."""
    monkeypatch.setattr(moltis, "ON_MAC", True)
    monkeypatch.setattr(moltis, "FD_SETSIZE", most)
    with Background('read -r name; echo "hello $name"; exit 3', tty=TTY) as background:
        background.command.input(0, b"world\n")
        assert background.wait().exit_code == 3
    assert b"hello world\r\n" in background.reader.stdout


def test_input_is_written_before_the_thread_of_its_command_wakes(monkeypatch):
    woken = []
    with Background("echo ready; cat", tty=TTY) as background:
        command, reader = background.command, background.reader
        wait_for(lambda: b"ready" in reader.stdout)
        monkeypatch.setattr(command, "_wake", lambda: woken.append(1))
        command.input(0, b"key")
        wait_for(lambda: b"key" in reader.stdout)
        assert not woken
        # Reported all the same, and soon: the sender forgets it.
        wait_for(lambda: reader.consumed == [3])
        monkeypatch.undo()


# Excerpts


def excerpt(limit, *pieces):
    kept = moltis.Excerpt(limit)
    for piece in pieces:
        kept.add(piece)
    return kept


def test_short_output_is_excerpted_whole():
    kept = excerpt(100, b"hello ", "wörld".encode())
    assert (kept.text(), kept.cut) == ("hello wörld", 0)


@pytest.mark.parametrize("size", [1, 7, 100, 5000])
def test_long_output_keeps_head_and_tail(size):
    data = bytes(range(97, 123)) * 100
    pieces = (data[start : start + size] for start in range(0, len(data), size))
    kept = excerpt(10, *pieces)
    assert kept.text() == "abcde\n… 2,590 bytes cut …\nvwxyz"
    assert kept.cut == 2590


def test_a_cut_leaves_no_broken_characters():
    kept = excerpt(10, "äöüäöüäöü".encode())
    assert kept.text() == "äö\n… 8 bytes cut …\nöü"


def test_an_excerpt_in_characters_counts_all_other_bytes():
    assert excerpt(100, "äöü".encode() * 10).text(4) == "äö\n… 52 bytes cut …\nöü"
    assert excerpt(40, "äöü".encode() * 10).text(4) == "äö\n… 52 bytes cut …\nöü"
    assert excerpt(100, b"short").text(5) == "short"
    assert excerpt(100, b"short").text(0) == "\n… 5 bytes cut …\n"


def test_nothing_may_be_kept_at_all():
    assert excerpt(0, *[b"x"] * 100).text() == "\n… 100 bytes cut …\n"


def test_bytes_that_are_no_text_are_replaced():
    assert excerpt(100, b"a\xff\xfeb\xc3").text() == "a��b�"
    assert excerpt(100, b"\x80" * 200).text().endswith(" bytes cut …\n" + 47 * "�")


# Leftovers


def test_every_descriptor_is_given_back():
    if not Path("/dev/fd").exists():
        pytest.skip("no /dev/fd")
    before = len(os.listdir("/dev/fd"))
    for _ in range(20):
        run("echo hi; exit 1", stdin=True)
        run("true", cwd="/nowhere")
    assert len(os.listdir("/dev/fd")) <= before  # others' may be collected meanwhile


def test_what_this_process_inherited_reaches_no_command():
    """`flock -n LOCK moltis node run` passes on a lock that would outlive the node."""
    inherited = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(inherited, True)
    try:
        moltis._seal_descriptors()
        _, reader = run(f"test -e /dev/fd/{inherited} && echo there; true")
        assert reader.stdout == b""
    finally:
        os.close(inherited)


def test_a_command_in_another_script_arrives_whatever_the_locale(tmp_path):
    """A service may have a Latin-1 locale, and none at all."""
    (tmp_path / "厨").mkdir()
    program = f"""
import sys; sys.path.insert(0, {str(Path(moltis.__file__).parent)!r})
import moltis, os
job_log = moltis.JobLog("id", lambda log: None)
spec = moltis.CommandSpec({"printf 厨; pwd"!a}, {str(tmp_path / "厨")!a})
command = moltis.Command(spec, job_log, environ=dict(os.environ))
command.run()
sys.stdout.buffer.write(job_log.take()[1][5:])
"""
    environ = {**os.environ, "LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0"}
    environ["PYTHONCOERCECLOCALE"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, check=True
    )
    assert done.stdout == f"厨{tmp_path}/厨\n".encode()
