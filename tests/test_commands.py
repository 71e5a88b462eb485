"""Commands: one shell command as a process group, and many side by side."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from support import process_exists, wait_for

import moltis
from moltis import STDERR, STDIN, STDOUT, CommandResult, CommandSpec, RpcError

MIB = 1024 * 1024


KERNELS = ["pidfd", "portable"] if hasattr(os, "pidfd_open") else ["portable"]


@pytest.fixture(autouse=True, params=KERNELS)
def kernel(request, monkeypatch):
    """Each test twice: with what Linux has, and with what macOS has."""
    if request.param == "portable":
        monkeypatch.delattr(os, "pidfd_open", raising=False)
        monkeypatch.delattr(os, "pipe2", raising=False)


@pytest.fixture
def impatient(monkeypatch):
    """SIGKILL comes soon, so that no test waits for seconds."""
    monkeypatch.setattr(moltis, "KILL_AFTER", 0.2)


class Reader:
    """What the other end of a connection does: it takes chunks and acknowledges."""

    def __init__(self, acknowledges=True):
        self.acknowledges = acknowledges
        self.command = None
        self.data = {STDOUT: b"", STDERR: b""}
        self.repeated = 0  # bytes that came again
        self.largest = 0
        self.consumed = []
        self._busy = threading.Lock()

    def on_chunk(self, kind, offset, data):
        assert self._busy.acquire(blocking=False), "two threads deliver at a time"
        try:
            have = len(self.data[kind])
            assert offset <= have, f"{kind}: a gap from {have} to {offset}"
            self.repeated += min(have - offset, len(data))
            self.data[kind] += data[have - offset :]
            self.largest = max(self.largest, len(data))
            if self.acknowledges:
                self.command.acknowledge(kind, len(self.data[kind]))
        finally:
            self._busy.release()

    def on_stdin(self, consumed):
        self.consumed.append(consumed)

    @property
    def stdout(self):
        return self.data[STDOUT]

    @property
    def stderr(self):
        return self.data[STDERR]


def make(text, reader=None, *, environ=None, default_cwd=None, **spec):
    reader = reader or Reader()
    command = moltis.Command(
        CommandSpec(text, **spec),
        reader.on_chunk,
        on_stdin=reader.on_stdin,
        environ=os.environ if environ is None else environ,
        default_cwd=default_cwd,
    )
    reader.command = command
    return command, reader


def run(text, reader=None, **options):
    command, reader = make(text, reader, **options)
    return command.run(), reader


class Background:
    """A command that runs in a thread of the test."""

    def __init__(self, text, reader=None, **options):
        self.command, self.reader = make(text, reader, **options)
        self.result = None
        self._thread = threading.Thread(target=self._run, name="test-run")
        self._thread.start()

    def _run(self):
        self.result = self.command.run()

    @property
    def ended(self):
        return not self._thread.is_alive()

    def wait(self, timeout=20):
        self._thread.join(timeout)
        assert self.ended, "the command did not end"
        return self.result

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.command.cancel()
        self.wait()


def python(script, *arguments):
    """Return a shell command that runs a Python script."""
    words = [sys.executable, "-c", script, *map(str, arguments)]
    return " ".join(shlex.quote(word) for word in words)


# Output and exit status


def test_output_and_exit_status_come_back():
    result, reader = run("echo out; echo err >&2; exit 7")
    assert (reader.stdout, reader.stderr) == (b"out\n", b"err\n")
    assert result.exit_code == 7
    assert (result.stdout_bytes, result.stderr_bytes) == (4, 4)
    assert not result.timed_out and not result.cancelled and result.error is None


def test_a_command_may_say_nothing():
    result, reader = run("true")
    assert result.exit_code == 0
    assert reader.data == {STDOUT: b"", STDERR: b""}


def test_death_by_signal_is_a_negative_exit_status():
    assert run("kill -9 $$")[0].exit_code == -signal.SIGKILL


def test_output_is_bytes_not_text():
    script = "import os; os.write(1, bytes(range(256)) * 100)"
    assert run(python(script))[1].stdout == bytes(range(256)) * 100


def test_a_command_that_begins_with_a_dash_is_no_option():
    result, reader = run("-e")
    assert result.exit_code == 127
    assert b"not found" in reader.stderr


def test_long_output_is_whole_and_comes_in_bounded_chunks():
    result, reader = run("yes 0123456 | head -c 5000000")
    assert reader.stdout == b"0123456\n" * 625_000
    assert result.stdout_bytes == 5_000_000
    assert reader.largest <= moltis.MAX_CHUNK


def test_lines_written_one_by_one_are_collected():
    """A message for each line would cost more than the command."""
    chunks = []
    reader = Reader()
    take = reader.on_chunk
    reader.on_chunk = lambda *chunk: (chunks.append(chunk), take(*chunk))
    run("i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done", reader)
    assert reader.stdout == b"".join(b"%d\n" % i for i in range(20000))
    assert len(chunks) < 2000


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
    with Background("echo ours; cat /dev/stdout", timeout=0.3) as background:
        assert background.wait().timed_out


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
    assert bool(spawned) is hasattr(os, "pipe2")
    assert run("true", cwd=str(tmp_path))[0].exit_code == 0
    assert len(spawned) <= 1


@pytest.mark.parametrize("blank", [None, "", "  "])
def test_a_blank_working_directory_is_the_runners(tmp_path, blank):
    _, reader = run("pwd", cwd=blank, default_cwd=str(tmp_path))
    assert reader.stdout.strip() == bytes(tmp_path)


def test_a_relative_working_directory_starts_at_the_runners(tmp_path):
    (tmp_path / "sub").mkdir()
    _, reader = run("pwd", cwd="sub", default_cwd=str(tmp_path))
    assert reader.stdout.strip() == bytes(tmp_path / "sub")


def test_a_tilde_is_the_home_directory(home):
    assert run("pwd", cwd="~")[1].stdout.strip() == bytes(home)


def test_a_working_directory_that_is_not_there_is_one_sentence(tmp_path):
    missing = str(tmp_path / "missing")
    result, _ = run("true", cwd=missing)
    assert result.exit_code is None
    assert (
        result.error
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
    assert result.exit_code is None
    assert result.error.startswith("the command cannot be passed to /bin/sh")


def test_a_command_that_is_too_long_is_one_sentence():
    result, _ = run(": " + "x" * 4 * MIB)
    assert "too long" in result.error


def test_a_missing_shell_is_one_sentence(monkeypatch):
    monkeypatch.setattr(moltis, "SHELL", "/nowhere/sh")
    result, _ = run("true", cwd="/")
    assert result.error == "cannot start /nowhere/sh: No such file or directory"


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
    env = moltis.command_environment({"PATH": "/bin"}, {**forwarded, **refused})
    assert env == {"PATH": "/bin", **forwarded}


@pytest.mark.parametrize(
    "value", [1, None, "a\nb", "a\0b", "x" * 257, "a[$(b)]", "`b`"]
)
def test_a_forwarded_value_is_one_line_without_a_command(value):
    assert moltis.filter_environment({"TERM": value}) == {}


def test_no_descriptor_of_ours_reaches_a_command():
    ours = os.open("/dev/null", os.O_RDONLY)
    try:
        with Background("sleep 30"):
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
    result, reader = run("echo before; sleep 30", timeout=1.0)
    assert result.timed_out and not result.cancelled
    assert result.exit_code == -signal.SIGTERM
    assert reader.stdout == b"before\n"


def test_the_whole_group_is_ended(tmp_path):
    """SIGTERM to the group, not to the shell alone."""
    pids = tmp_path / "pids"
    text = f"sleep 30 & echo $! > {pids}; sh -c 'echo $$ >> {pids}; sleep 30'; true"
    with Background(text) as background:
        wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2)
        background.command.cancel()
        assert background.wait().cancelled
    for pid in map(int, pids.read_text().split()):
        assert not process_exists(pid)


def test_a_command_that_ignores_sigterm_is_killed(impatient):
    with Background("trap '' TERM; echo deaf; sleep 30; sleep 30") as background:
        wait_for(lambda: background.reader.stdout)
        background.command.cancel()
        assert background.wait().exit_code == -signal.SIGKILL
    assert background.reader.stdout == b"deaf\n"


def test_a_grandchild_that_ignores_sigterm_is_killed(impatient, tmp_path):
    pid_file = tmp_path / "pid"
    text = (
        f"sh -c 'trap \"\" TERM; echo $$ > {pid_file}; while :; do sleep 1; done'"
        " > /dev/null 2>&1 & sleep 30"
    )
    with Background(text) as background:
        wait_for(lambda: pid_file.exists() and pid_file.read_text().strip())
        background.command.cancel()
        assert background.wait().exit_code == -signal.SIGTERM
    pid = int(pid_file.read_text())
    wait_for(lambda: not process_exists(pid), what="the grandchild's end")


def test_a_command_may_clean_up_when_it_is_ended():
    text = "trap 'echo clean; exit 3' TERM; echo ready; while :; do sleep 0.05; done"
    with Background(text) as background:
        wait_for(lambda: background.reader.stdout)
        background.command.cancel()
        result = background.wait()
    assert result.exit_code == 3
    assert background.reader.stdout == b"ready\nclean\n"


def test_a_stopped_command_hears_the_signal():
    """A stopped process gets SIGTERM only with SIGCONT."""
    text = "trap 'echo heard; exit 4' TERM; echo ready; kill -STOP $$; sleep 30"
    with Background(text) as background:
        wait_for(lambda: background.reader.stdout)
        background.command.cancel()
        result = background.wait()
    assert result.exit_code in (4, -signal.SIGTERM)


def test_cancel_before_the_start_starts_nothing(tmp_path):
    command, _ = make(f"touch {tmp_path}/ran")
    command.cancel()
    result = command.run()
    assert result.cancelled and result.exit_code is None
    assert not (tmp_path / "ran").exists()


def test_cancel_after_the_end_changes_nothing():
    command, _ = make("true")
    result = command.run()
    command.cancel()
    assert command.result == result
    assert not result.cancelled


def test_a_grandchild_with_the_pipes_does_not_keep_the_command_open(tmp_path):
    """The grandchild itself is left alone."""
    pid_file = tmp_path / "pid"
    result, reader = run(f"sleep 30 & echo $! > {pid_file}; echo done")
    pid = int(pid_file.read_text())
    try:
        assert result.exit_code == 0
        assert result.duration < 10
        assert reader.stdout == b"done\n"
        assert process_exists(pid)
    finally:
        os.kill(pid, signal.SIGKILL)


def test_what_a_grandchild_writes_at_once_still_arrives(monkeypatch):
    monkeypatch.setattr(moltis, "DRAIN_AFTER_EXIT", 10.0)  # and it does not need that
    _, reader = run("(sleep 0.1; echo late) & echo early")
    assert reader.stdout == b"early\nlate\n"


def test_a_daemon_that_left_the_group_does_not_keep_the_command_open(tmp_path):
    pid_file = tmp_path / "pid"
    script = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open(sys.argv[1], "w").write(str(os.getpid()))
        time.sleep(30)
    os._exit(0)
os.wait()
"""
    text = python(script, pid_file)
    with Background(f"{text}; sleep 30") as background:
        wait_for(lambda: pid_file.exists() and pid_file.read_text())
        background.command.cancel()
        assert background.wait().cancelled
    os.kill(int(pid_file.read_text()), signal.SIGKILL)


def test_a_group_of_zombies_is_over(monkeypatch):
    """PID 1 of many containers reaps nobody: zombies take every signal."""
    monkeypatch.setattr(moltis.ProcessGroup, "_signal", lambda *_: True)
    group = moltis.ProcessGroup("true", cwd=None, env={}, stdin=False)
    wait_for(lambda: group.exit_code is not None)
    group.end()
    assert wait_for(group.advance, 1, "the end") is (sys.platform == "linux")
    group.close()


# Windows


def test_a_full_window_pauses_the_command():
    with Background("yes | head -c 5000000", Reader(acknowledges=False)) as background:
        reader = background.reader
        wait_for(lambda: len(reader.stdout) == moltis.STREAM_WINDOW)
        assert background.command.held == moltis.STREAM_WINDOW
        reader.acknowledges = True
        background.command.acknowledge(STDOUT, len(reader.stdout))
        assert background.wait().stdout_bytes == 5_000_000
    assert len(reader.stdout) == 5_000_000


def test_one_stream_waits_while_the_other_flows():
    text = "yes | head -c 3000000 & sleep 0.1; echo through >&2; wait"
    with Background(text, Reader(acknowledges=False)) as background:
        wait_for(lambda: background.reader.stderr == b"through\n")
        wait_for(lambda: len(background.reader.stdout) == moltis.STREAM_WINDOW)


def test_output_waits_for_its_reader_after_the_shells_end(monkeypatch):
    """A reader that is away for minutes loses nothing of what was written."""
    monkeypatch.setattr(moltis, "DRAIN_AFTER_EXIT", 0.05)
    total = moltis.STREAM_WINDOW + 30_000
    text = f"yes | head -c {total}"
    with Background(text, Reader(acknowledges=False)) as background:
        reader, command = background.reader, background.command
        wait_for(lambda: len(reader.stdout) == moltis.STREAM_WINDOW)
        threading.Event().wait(0.3)  # well beyond the drain
        assert not background.ended
        reader.acknowledges = True
        command.acknowledge(STDOUT, len(reader.stdout))
        assert background.wait().stdout_bytes == total
    assert len(reader.stdout) == total


def test_a_grandchild_that_never_stops_is_cut_off():
    """Its pipe is never empty, its reader never away: the drain ends it."""
    result, reader = run("yes & echo done >&2")
    assert result.exit_code == 0
    assert reader.stderr == b"done\n"


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_a_paused_command_can_be_ended(how):
    timeout = 2.0 if how == "timeout" else None
    with Background("yes", Reader(acknowledges=False), timeout=timeout) as background:
        reader, command = background.reader, background.command
        wait_for(lambda: len(reader.stdout) == moltis.STREAM_WINDOW)
        if how == "cancel":
            command.cancel()
        result = background.wait()
    assert (result.cancelled, result.timed_out) == (how == "cancel", how == "timeout")
    assert result.stdout_bytes == moltis.STREAM_WINDOW
    command.rewind({})  # all of it is there for a reader that comes back
    assert reader.repeated == moltis.STREAM_WINDOW


def test_acknowledging_what_was_not_sent_is_refused():
    command, _ = make("echo hi", Reader(acknowledges=False))
    command.run()
    with pytest.raises(RpcError, match="offset 4 is acknowledged, but 3 bytes"):
        command.acknowledge(STDOUT, 4)
    with pytest.raises(RpcError, match="no output of kind 3"):
        command.acknowledge(STDIN, 0)


def test_acknowledgements_may_come_late_and_twice():
    command, _ = make("echo hello", Reader(acknowledges=False))
    command.run()
    for offset in (4, 2, 4, 0):
        command.acknowledge(STDOUT, offset)
    assert command.offsets()[STDOUT] == 4
    assert command.held == 2


def test_a_window_opens_by_a_whole_chunk():
    """Or a byte acknowledged would be a byte read, and so on for ever."""
    with Background("yes", Reader(acknowledges=False)) as background:
        reader, command = background.reader, background.command
        wait_for(lambda: len(reader.stdout) == moltis.STREAM_WINDOW)
        command.acknowledge(STDOUT, moltis.MAX_CHUNK - 1)
        assert command._streams.room(STDOUT) == 0
        command.acknowledge(STDOUT, moltis.MAX_CHUNK)
        wait_for(lambda: len(reader.stdout) == moltis.STREAM_WINDOW + moltis.MAX_CHUNK)


def test_output_may_count_as_acknowledged_at_once():
    chunks = []
    command = moltis.Command(
        CommandSpec("yes | head -c 3000000"),
        lambda kind, offset, data: chunks.append(data),
        environ=os.environ,
        resumable=False,
    )
    assert command.run().stdout_bytes == 3_000_000
    assert len(b"".join(chunks)) == 3_000_000
    assert command.held == 0


# Coming back


def test_a_rewind_sends_again_from_the_exact_byte():
    command, reader = make("printf 0123456789", Reader(acknowledges=False))
    command.run()
    reader.data[STDOUT] = b"0123"  # what arrived before the cable was pulled
    command.rewind({STDOUT: 4, STDERR: 0})
    assert reader.stdout == b"0123456789"
    assert reader.repeated == 0
    assert command.offsets()[STDOUT] == 0  # the next to come back may have less
    reader.data[STDOUT] = b"01"
    command.rewind({STDOUT: 2, STDERR: 0})
    assert reader.stdout == b"0123456789"


def test_a_rewind_sends_again_while_the_command_runs():
    text = "echo one; read line; echo two"
    with Background(text, Reader(acknowledges=False), stdin=True) as background:
        reader, command = background.reader, background.command
        wait_for(lambda: reader.stdout == b"one\n")
        command.rewind({STDOUT: 2})
        wait_for(lambda: reader.repeated == 2)
        command.write_stdin(0, b"\n")
        background.wait()
    assert reader.stdout == b"one\ntwo\n"


def test_a_reader_that_comes_back_opens_a_paused_stream():
    with Background("yes", Reader(acknowledges=False)) as background:
        reader, command = background.reader, background.command
        wait_for(lambda: len(reader.stdout) == moltis.STREAM_WINDOW)
        command.rewind({STDOUT: moltis.STREAM_WINDOW})
        command.acknowledge(STDOUT, moltis.STREAM_WINDOW)
        wait_for(lambda: len(reader.stdout) == 2 * moltis.STREAM_WINDOW)


def test_a_rewind_beyond_what_was_sent_is_refused():
    command, _ = make("echo hi", Reader(acknowledges=False))
    command.run()
    with pytest.raises(RpcError, match="offset 9"):
        command.rewind({STDOUT: 9})


def test_a_reader_that_went_away_does_not_end_the_command():
    def gone(kind, offset, data):
        raise moltis.ConnectionClosed(1006)

    reader = Reader()
    reader.on_chunk = gone
    command, _ = make("echo one; echo two", reader)
    assert command.run().stdout_bytes == 8
    assert command.held == 8


def test_a_fault_of_the_reader_ends_the_command():
    def broken(kind, offset, data):
        raise ZeroDivisionError

    reader = Reader()
    reader.on_chunk = broken
    command, _ = make("echo $$; sleep 30", reader)
    with pytest.raises(ZeroDivisionError):
        command.run()


# Input


def feed(command, data, offset=0):
    command.write_stdin(offset, data)
    command.write_stdin(offset + len(data), b"")


def test_without_input_standard_input_is_empty():
    assert run("cat")[0].exit_code == 0
    command, _ = make("cat")
    with pytest.raises(RpcError, match="without input"):
        command.write_stdin(0, b"x")


def test_input_reaches_the_command():
    command, reader = make("cat", stdin=True)
    feed(command, bytes(range(256)))
    assert command.run().exit_code == 0
    assert reader.stdout == bytes(range(256))
    assert reader.consumed == [256]


def test_no_input_at_all_is_an_end_as_well():
    command, reader = make("wc -c", stdin=True)
    command.write_stdin(0, b"")
    command.run()
    assert reader.stdout.strip() == b"0"


def test_long_input_flows_within_its_window():
    data = os.urandom(5 * MIB)
    with Background("cat", stdin=True) as background:
        reader, command = background.reader, background.command
        for start in range(0, len(data), MIB):
            wait_for(lambda start=start: not start or reader.consumed[-1:] == [start])
            for offset in range(start, start + MIB, moltis.MAX_CHUNK):
                command.write_stdin(offset, data[offset : offset + moltis.MAX_CHUNK])
        command.write_stdin(len(data), b"")
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
    assert len(reader.consumed) <= MIB // moltis.MAX_CHUNK


def test_input_that_was_here_before_is_skipped():
    command, reader = make("cat", stdin=True)
    command.write_stdin(0, b"abcd")
    command.write_stdin(2, b"cdef")
    command.write_stdin(0, b"abc")
    assert command.offsets()[STDIN] == 0  # nothing of it is consumed yet
    command.write_stdin(6, b"")
    command.write_stdin(6, b"")
    command.write_stdin(4, b"ef")
    command.run()
    assert reader.stdout == b"abcdef"


@pytest.mark.parametrize(
    ("offset", "data"), [(5, b"x"), (5, b""), (3, b""), (0, b"x" * (MIB + 1))]
)
def test_input_that_does_not_fit_is_refused(offset, data):
    command, _ = make("cat", stdin=True)
    command.write_stdin(0, b"abcd")
    with pytest.raises(RpcError):
        command.write_stdin(offset, data)


def test_input_after_its_end_is_refused():
    command, _ = make("cat", stdin=True)
    feed(command, b"abcd")
    with pytest.raises(RpcError, match="after its end"):
        command.write_stdin(4, b"e")


def test_input_that_the_command_closed_is_taken_and_dropped():
    """The sender has to get on; the command has said that it wants no more."""
    text = "exec <&-; echo closed; sleep 30"
    with Background(text, stdin=True) as background:
        reader, command = background.reader, background.command
        wait_for(lambda: reader.stdout)
        command.write_stdin(0, b"x" * MIB)
        wait_for(lambda: reader.consumed[-1:] == [MIB])
        command.write_stdin(MIB, b"y" * MIB)
        wait_for(lambda: reader.consumed[-1:] == [2 * MIB])


def test_input_that_crosses_the_commands_end_is_dropped():
    command, _ = make("true", stdin=True)
    command.run()
    command.write_stdin(0, b"late")
    command.write_stdin(7, b"and with a gap")


# Many side by side


class Jobs:
    """A runner whose results and places in line are kept."""

    def __init__(self, **options):
        self.runner = moltis.CommandRunner(environ=os.environ, **options)
        self.results = {}
        self.places = []

    def start(self, invoke_id, text, **spec):
        return self.runner.start(
            invoke_id,
            CommandSpec(text, **spec),
            on_chunk=lambda *_: None,
            on_result=lambda result: self.results.__setitem__(invoke_id, result),
            on_queued=lambda place: self.places.append((invoke_id, place)),
        )

    def wait(self, *invoke_ids):
        wait_for(lambda: self.results.keys() >= set(invoke_ids))
        return [self.results[invoke_id] for invoke_id in invoke_ids]


@pytest.fixture
def jobs(request):
    jobs = Jobs(**getattr(request, "param", {}))
    yield jobs
    jobs.runner.close(10)


def test_a_thread_is_used_again(jobs):
    jobs.start("one", "true")
    jobs.wait("one")
    wait_for(lambda: "moltis-run-idle" in [t.name for t in threading.enumerate()])
    before = threading.active_count()
    jobs.start("two", "true")
    jobs.wait("two")
    assert threading.active_count() == before


def test_a_thread_without_work_ends(jobs, monkeypatch):
    monkeypatch.setattr(moltis, "WORKER_LINGER", 0.01)
    before = threading.active_count()
    jobs.start("one", "true")
    jobs.wait("one")
    wait_for(lambda: threading.active_count() == before)
    jobs.start("two", "exit 2")
    assert jobs.wait("two")[0].exit_code == 2


limited = pytest.mark.parametrize("jobs", [{"limit": 1}], indirect=True)


def test_commands_run_side_by_side(jobs):
    first = jobs.start("first", "cat", stdin=True)
    jobs.start("second", "exit 2")
    assert [r.exit_code for r in jobs.wait("second")] == [2]
    assert "first" not in jobs.results
    first.write_stdin(0, b"")
    assert [r.exit_code for r in jobs.wait("first")] == [0]


def test_a_thread_carries_the_name_of_its_invocation(jobs):
    jobs.start("0123456789", "cat", stdin=True)
    wait_for(lambda: "moltis-run-01234567" in [t.name for t in threading.enumerate()])


@limited
def test_commands_beyond_the_limit_wait_in_line_and_say_so(jobs):
    first = jobs.start("first", "cat", stdin=True)
    jobs.start("second", "exit 2")
    jobs.start("third", "exit 3")
    wait_for(lambda: len(jobs.places) == 2, what="both places")
    assert jobs.places == [("second", 1), ("third", 2)]
    wait_for(lambda: jobs.runner.running() == ["first"])
    first.write_stdin(0, b"")
    jobs.wait("first", "second", "third")
    assert [place for name, place in jobs.places if name == "second"] == [1, 0]
    assert [place for name, place in jobs.places if name == "third"][-1] == 0


@limited
def test_who_moves_up_in_line_hears_of_it(jobs):
    first = jobs.start("first", "cat", stdin=True)
    second = jobs.start("second", "cat", stdin=True)
    jobs.start("third", "true")
    wait_for(lambda: len(jobs.places) == 2, what="both places")
    first.write_stdin(0, b"")
    wait_for(lambda: ("third", 1) in jobs.places, what="the next place")
    second.write_stdin(0, b"")
    jobs.wait("third")
    assert [place for name, place in jobs.places if name == "second"] == [1, 0]
    assert [place for name, place in jobs.places if name == "third"] == [2, 1, 0]


@limited
def test_who_waits_for_a_moment_only_is_told_nothing(jobs, monkeypatch):
    monkeypatch.setattr(moltis, "PLACE_INTERVAL", 60.0)
    for name in ("first", "second", "third"):
        jobs.start(name, "true")
    jobs.wait("first", "second", "third")
    assert jobs.places == []


@limited
def test_a_place_that_cannot_be_told_costs_nobody_anything(jobs, caplog):
    def fail(_place):
        raise ZeroDivisionError

    first = jobs.start("first", "cat", stdin=True)
    results = []
    jobs.runner.start(
        "second",
        CommandSpec("exit 2"),
        on_chunk=lambda *_: None,
        on_result=results.append,
        on_queued=fail,
    )
    jobs.start("third", "exit 3")
    wait_for(lambda: jobs.places == [("third", 2)], what="the place of the other")
    assert "place not told invocation=second" in caplog.text
    first.write_stdin(0, b"")
    jobs.wait("third")
    assert [result.exit_code for result in results] == [2]


def test_those_far_behind_hear_of_their_place_less_often():
    told = []
    job = moltis._Job("id", None, None, told.append)
    for place in (100, 90, 80, 79, 79, 12, 11, 10, 9, 9):
        job.tell_place(place)
    assert told == [100, 79, 12, 10, 9]
    job.tell_place_again()
    job.tell_place(9)
    job.leave_line()
    job.tell_place(8)  # it had looked before
    job.tell_place_again()
    job.tell_place(8)
    assert told[5:] == [9, 0]


@limited
def test_a_command_in_line_is_cancelled_at_once(jobs):
    jobs.start("first", "sleep 30")
    wait_for(lambda: jobs.runner.running() == ["first"])
    jobs.start("second", "echo never")
    assert jobs.runner.cancel("second")
    assert jobs.results["second"].cancelled
    assert jobs.results["second"].exit_code is None
    assert "first" not in jobs.results
    assert jobs.runner.cancel("first")
    assert jobs.wait("first")[0].exit_code in (-signal.SIGTERM, None)
    assert not jobs.runner.cancel("unknown")


def test_an_invocation_runs_once(jobs, tmp_path):
    text = f"echo ran >> {tmp_path}/runs"
    command = jobs.start("one", text)
    assert jobs.start("one", text) is command
    jobs.wait("one")
    assert jobs.start("one", text) is command
    assert command.result.exit_code == 0
    jobs.runner.forget("one")
    assert jobs.runner.get("one") is None
    with pytest.raises(RpcError, match="run already"):
        jobs.start("one", text)
    assert (tmp_path / "runs").read_text() == "ran\n"


def test_a_running_command_is_not_forgotten(jobs):
    command = jobs.start("one", "sleep 30")
    jobs.runner.forget("one")
    assert jobs.runner.get("one") is command
    assert jobs.runner.known() == {"one": command}


@pytest.mark.parametrize("jobs", [{"max_timeout": 0.2}], indirect=True)
@pytest.mark.parametrize("timeout", [None, 60])
def test_no_caller_exceeds_the_nodes_timeout(jobs, timeout):
    jobs.start("one", "sleep 30", timeout=timeout)
    assert jobs.wait("one")[0].timed_out


def test_closing_ends_and_reports_everything():
    jobs = Jobs(limit=1)
    jobs.start("first", "echo started; sleep 30")
    jobs.start("second", "sleep 30")
    wait_for(lambda: jobs.runner.running() == ["first"])
    jobs.runner.close(10)
    assert all(result.cancelled for result in jobs.results.values())
    assert sorted(jobs.results) == ["first", "second"]
    with pytest.raises(RpcError, match="shutting down"):
        jobs.start("third", "true")


def test_closing_ends_and_reports_what_is_just_starting(monkeypatch, tmp_path):
    """Its shell runs already, and it is in no line yet."""
    jobs = Jobs()
    entering, closed = threading.Event(), threading.Event()

    def hold(*_):
        entering.set()
        assert closed.wait(10)

    enter = moltis.CommandRunner._enter
    monkeypatch.setattr(
        moltis.CommandRunner, "_enter", lambda *args: (hold(), enter(*args))
    )
    command = f"echo $$ >{tmp_path}/pid; sleep 30"
    starting = threading.Thread(target=jobs.start, args=("one", command))
    starting.start()
    assert entering.wait(10)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    closing = threading.Thread(target=jobs.runner.close)
    closing.start()
    wait_for(lambda: jobs.runner._closed)
    closed.set()
    closing.join(10)
    assert jobs.results["one"].cancelled  # by the time at which it is closed
    starting.join(10)
    assert not process_exists(int((tmp_path / "pid").read_text()))


def test_only_so_many_results_are_kept(jobs, monkeypatch):
    monkeypatch.setattr(moltis, "MAX_KEPT", 3)
    for number in range(5):
        jobs.start(str(number), "true")
        jobs.wait(str(number))
    assert list(jobs.runner.known()) == ["2", "3", "4"]


def test_only_so_much_output_is_kept(jobs, monkeypatch):
    monkeypatch.setattr(moltis, "MAX_KEPT_OUTPUT", 25)
    for number in range(4):
        jobs.start(str(number), "printf 0123456789")
        jobs.wait(str(number))
    assert list(jobs.runner.known()) == ["2", "3"]


def test_only_so_many_ids_are_remembered(jobs, monkeypatch):
    monkeypatch.setattr(moltis, "MAX_REMEMBERED", 2)
    for number in range(4):
        jobs.start(str(number), "true")
        jobs.wait(str(number))
        jobs.runner.forget(str(number))
    assert jobs.start("0", "true").spec.command == "true"
    with pytest.raises(RpcError):
        jobs.start("3", "true")


def test_a_result_that_cannot_be_sent_is_kept(jobs):
    told = threading.Event()

    def away(result):
        told.set()
        raise moltis.ConnectionClosed(1006)

    jobs.runner.start(
        "one", CommandSpec("exit 3"), on_chunk=lambda *_: None, on_result=away
    )
    assert told.wait(10)
    assert jobs.runner.get("one").result.exit_code == 3


def test_a_fault_in_a_handler_is_a_result_too(jobs):
    def broken(kind, offset, data):
        raise ZeroDivisionError

    jobs.runner.start(
        "one",
        CommandSpec("echo hi"),
        on_chunk=broken,
        on_result=lambda result: jobs.results.__setitem__("one", result),
    )
    assert jobs.wait("one")[0].error == "the runner failed; its log says why"


# In one piece


def test_short_output_is_collected_whole():
    collector = moltis.OutputCollector(100)
    collector.add(STDOUT, 0, b"hello ")
    collector.add(STDERR, 0, b"oops")
    collector.add(STDOUT, 6, "wörld".encode())
    assert collector.stdout.text() == "hello wörld"
    assert collector.stderr.text() == "oops"
    assert collector.stdout.cut == 0


def test_chunks_that_come_again_count_once():
    clipped = moltis.ClippedBytes(100)
    for offset, data in ((0, b"abc"), (1, b"bcd"), (0, b"ab"), (9, b"ahead")):
        clipped.add(offset, data)
    assert (clipped.text(), clipped.total) == ("abcd", 4)


@pytest.mark.parametrize("size", [1, 7, 100, 5000])
def test_long_output_keeps_head_and_tail(size):
    clipped = moltis.ClippedBytes(10)
    data = bytes(range(97, 123)) * 100
    for start in range(0, len(data), size):
        clipped.add(start, data[start : start + size])
    assert clipped.cut == 2590
    assert clipped.text() == "abcde\n… 2,590 bytes cut …\nvwxyz"


def test_a_cut_leaves_no_broken_characters():
    clipped = moltis.ClippedBytes(9)
    clipped.add(0, "äöüäöüäöü".encode())
    assert clipped.text() == "äö\n… 9 bytes cut …\nöü"


def test_nothing_may_be_kept_at_all():
    clipped = moltis.ClippedBytes(0)
    for offset in range(100):
        clipped.add(offset, b"x")
    assert clipped.text() == "\n… 100 bytes cut …\n"


def test_bytes_that_are_no_text_are_replaced():
    clipped = moltis.ClippedBytes(100)
    clipped.add(0, b"a\xff\xfeb\xc3")
    assert clipped.text() == "a��b�"
    clipped.add(5, b"\x80" * 200)
    assert clipped.text().endswith(" bytes cut …\n" + 47 * "�")


# Under load


@pytest.mark.parametrize("seed", range(8))
def test_streams_survive_random_acknowledgements_and_rewinds(seed):
    """A reader that loses its connection at random gets every byte, once."""
    import random

    chance = random.Random(seed)
    script = """
import os, sys, random
chance = random.Random(int(sys.argv[1]))
for _ in range(300):
    os.write(chance.choice((1, 1, 2)), chance.randbytes(chance.randint(1, 60000))
             if hasattr(chance, "randbytes") else os.urandom(1000))
"""
    reader = LossyReader(chance)
    with Background(python(script, seed), reader) as background:
        while not background.ended:
            reader.disturb()
            time.sleep(0.0005)  # or nothing is sent between two rewinds
        result = background.wait()
    reader.settle()
    assert len(reader.stdout) == result.stdout_bytes
    assert len(reader.stderr) == result.stderr_bytes


class LossyReader(Reader):
    """A reader whose connection breaks at random, with chunks on their way."""

    def __init__(self, chance):
        super().__init__()
        self._chance = chance
        self._lock = threading.Lock()  # guards data and connected
        self.connected = True

    def on_chunk(self, kind, offset, data):
        with self._lock:
            if not self.connected:
                raise moltis.ConnectionClosed(1006)
            have = len(self.data[kind])
            if offset > have:
                return  # on its way when we came back
            self.data[kind] += data[have - offset :]

    def disturb(self):
        step = self._chance.random()
        kind = self._chance.choice((STDOUT, STDERR))
        if step < 0.1:
            with self._lock:
                self.connected = not self.connected
                back = self.connected
            if back:
                self.settle()
        elif self.connected:
            self.command.acknowledge(kind, len(self.data[kind]))

    def settle(self):
        with self._lock:
            self.connected = True
            offsets = {kind: len(data) for kind, data in self.data.items()}
        self.command.rewind(offsets)


def test_results_compare_by_value():
    assert CommandResult(0) == CommandResult(0, duration=0.0)


def test_every_descriptor_is_given_back():
    if not Path("/dev/fd").exists():
        pytest.skip("no /dev/fd")
    before = len(os.listdir("/dev/fd"))
    for _ in range(20):
        run("echo hi; exit 1", stdin=True)
        run("true", cwd="/nowhere")
    assert len(os.listdir("/dev/fd")) == before


def test_a_command_for_which_there_is_no_thread_ends_at_once(monkeypatch):
    def refuse_thread(_thread):
        raise RuntimeError("can't start new thread")

    results = []
    runner = moltis.CommandRunner(environ=os.environ)
    with monkeypatch.context() as crowded:
        crowded.setattr(threading.Thread, "start", refuse_thread)
        runner.start(
            "id",
            CommandSpec("sleep 600"),
            on_chunk=lambda *_: None,
            on_result=results.append,
        )
    assert results[0].cancelled
    runner.close()
