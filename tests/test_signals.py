"""How subcommands end: at a signal, and without a stream to write to."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import termios

import pytest
from peers import InProcessGateway
from support import PROGRAM, ROOT, clean_environment, launched, wait_for

import moltis


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    home = tmp_path_factory.mktemp("site")
    with InProcessGateway(home / ".moltis") as gateway:
        gateway.home = home
        yield gateway


def start(*words, home, **options):
    """Start a subcommand; who calls it owns the process."""
    return subprocess.Popen(
        [*launched(PROGRAM), *words],
        env=clean_environment(home),
        cwd=str(home),
        **{"stdin": subprocess.DEVNULL, **options},
    )


# --- Locks ---

# Sends SIGINT where the main thread has just taken the lock of an answer, in a function
# that is called by the one named.
INTERRUPTED = """
import os, signal, sys, threading
sys.path.insert(0, sys.argv.pop(1))
import moltis
within = sys.argv.pop(1)

def trace(frame, event, arg):
    taken = threading.Condition.__enter__.__code__
    if frame.f_code is taken and frame.f_back.f_code.co_name == "result":
        caller = frame
        while caller is not None and caller.f_code.co_name != within:
            caller = caller.f_back
        return at_return if caller is not None else None

def at_return(frame, event, arg):
    if event == "return":
        sys.settrace(None)
        os.kill(os.getpid(), signal.SIGINT)
    return at_return

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.settrace(trace)
sys.exit(moltis.main())
"""


@pytest.mark.parametrize(
    ("words", "within", "status"),
    [
        (("node", "list"), "cmd_node_list", -signal.SIGINT),
        (("node", "attach", "5f0c"), "known_job", -signal.SIGINT),
        (("node", "cp", "Local:/none", "."), "run", -signal.SIGINT),
        (("chat", "echo hi"), "cmd_chat", -signal.SIGINT),
        (("chat", "sleep 120"), "_sent", moltis.INTERRUPTED),
    ],
)
def test_an_interrupt_with_a_lock_just_taken_is_no_hang(site, words, within, status):
    """As an exception it would leave the lock held, for which others then wait."""
    code = [sys.executable, "-S", "-c", INTERRUPTED, str(ROOT), within]
    done = subprocess.run(
        [*code, *words],
        env=clean_environment(site.home),
        cwd=str(site.home),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (status, b""), done.stderr


# --- A gateway that does not answer ---

WITH_GATEWAY = [
    "node generate-token",
    "node list",
    "node exec x -- true",
    "node recording 5f0c",
    "node jobs",
    "node attach 5f0c",
    "node cp x:a .",
    "node rename x y",
    "node revoke x",
    "key list",
    "model list",
    "audit",
    "mcp",
    "chat hi",
    "doctor",
]
ENDS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("line", WITH_GATEWAY)
def test_a_signal_ends_the_wait_for_a_gateway_that_does_not_answer(home, line):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        moltis.GatewayFile(url, "mk_x", os.getpid()).save(home / ".moltis")
        number = ENDS[WITH_GATEWAY.index(line) % len(ENDS)]
        with start(*line.split(), home=home) as waiting, server.accept()[0]:
            waiting.send_signal(number)
            assert waiting.wait(60) == -number


# --- Readers that stand still ---


PIPE_FULL = 60_000  # bytes; of 65,536


def unread(reader):
    """Return how many bytes wait in a pipe."""
    waiting = bytearray(4)
    fcntl.ioctl(reader, termios.FIONREAD, waiting)
    return int.from_bytes(waiting, sys.byteorder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("subcommand", ["exec", "errors", "attach", "cp", "chat"])
def test_a_signal_ends_what_waits_for_its_reader(site, subcommand, number):
    command, big = "exec yes", site.home / "big"
    big.write_bytes(b"x" * 1_000_000)
    words = {
        "exec": ["node", "exec", "Local", "--", command],
        "errors": ["node", "exec", "Local", "--", f"{command} >&2"],
        "attach": ["node", "attach"],
        "cp": ["node", "cp", f"Local:{big}", "-"],
        "chat": ["chat", "--session", f"stalled {number}", command],
    }[subcommand]
    if subcommand == "attach":
        job = {"id": moltis.new_id(), "node": "local"}
        work = {"work": "run", "spec": {"command": command}, "keep": True}
        site.call("job.start", jobs=[job], **work)
        words.append(job["id"])
    reader, writer = os.pipe()
    stream = "stderr" if subcommand == "errors" else "stdout"
    with start(*words, home=site.home, **{stream: writer}) as waiting:
        os.close(writer)
        wait_for(lambda: unread(reader) > PIPE_FULL, what="it to wait for us")
        waiting.send_signal(number)
        assert waiting.wait(60) in (128 + number, moltis.INTERRUPTED)
    os.close(reader)
    for job in site.call("job.list", state="running"):
        site.call("job.cancel", id=job["id"])


# --- Signals that come late ---


class Feed:
    interrupted = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def interrupt(self, number):
        self.interrupted = number


def test_no_copy_begins_after_a_signal_that_the_one_before_did_not_obey(monkeypatch):
    begun = []

    def deliver(self, plan, *_):
        begun.append(plan.target)
        signal.raise_signal(signal.SIGTERM)
        return {}

    monkeypatch.setattr(moltis.FileCopy, "_feed", lambda self: Feed())
    monkeypatch.setattr(moltis.FileCopy, "_deliver", deliver)
    context = moltis.Context({}, moltis.Output({}))
    copy = moltis.FileCopy(argparse.Namespace(), context)
    plan = moltis.CopyPlan("", ["a"], "web1", "b", None, "web1: ")
    copy._transfer(plan)
    with pytest.raises(moltis.Terminated) as stopped:
        copy._transfer(plan.replace(target="web2"))
    assert (begun, stopped.value.number) == (["web1"], signal.SIGTERM)


def test_an_interrupt_leaves_no_alarm():
    with moltis.interrupting(Feed()):
        signal.raise_signal(signal.SIGINT)
        assert signal.getitimer(signal.ITIMER_REAL)[0]
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


# --- Streams that cannot be written or read ---

PRINTING = [
    "--version",
    "--help",
    "node list",
    "node list --json",
    "node list --help",
    "node generate-token",
    "node jobs --json",
    "node exec Local -- echo hi",
    "node exec Local --json -- echo hi",
    "node exec Local --detach -- true",
    "node cp Local:/etc/passwd -",
    "key list",
    "audit",
    "audit --json",
    "completion bash",
    "node status --json",
    "chat date",
]


@pytest.mark.parametrize("line", PRINTING)
def test_an_answer_that_cannot_be_written_is_an_error(site, line):
    """As of coreutils: an error, one sentence, and no traceback."""
    closed = [[*launched(PROGRAM), *line.split()], ">&-", "Bad file descriptor"]
    full = [closed[0], ">/dev/full", "No space left on device"]
    for words, redirection, reason in (closed, full):
        done = subprocess.run(
            ["/bin/sh", "-c", f'"$@" {redirection}', "sh", *words],
            env=clean_environment(site.home),
            cwd=str(site.home),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            check=False,
            timeout=60,
        )
        assert done.returncode == moltis.EXIT_FAILURE, done.stderr
        *_, last = done.stderr.splitlines()
        assert last == f"moltis: the output is not whole: {reason}"
        assert "Traceback" not in done.stderr


def test_streams_that_do_not_block_are_written_and_read_whole(site):
    """As other programs, which share them, leave them."""
    (stdin, typed), (printed, stdout) = os.pipe(), os.pipe()
    for descriptor in (stdin, stdout):
        os.set_blocking(descriptor, False)
    line = ["node", "exec", "Local", "--stdin", "--", "cat; seq 100000"]
    streams = {"stdin": stdin, "stdout": stdout}
    with start(*line, home=site.home, **streams) as running:
        os.close(stdin)
        os.close(stdout)
        wait_for(lambda: site.call("job.list", state="running"))
        os.write(typed, b"typed\n")
        os.close(typed)
        with open(printed, encoding="ascii") as output:
            whole = ["typed", *map(str, range(1, 100_001))]
            assert output.read().split() == whole
        assert running.wait(60) == 0


@pytest.mark.parametrize("line", ["--help", "node exec --help"])
def test_help_that_cannot_be_written_without_a_buffer_is_an_error(site, line):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*launched(PROGRAM), *line.split()],
            env=clean_environment(site.home, PYTHONUNBUFFERED="1"),
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
    assert done.returncode == moltis.EXIT_FAILURE
    assert b"the output is not whole: No space left on device" in done.stderr


def test_an_answer_whose_reader_leaves_in_the_middle_is_no_success(site):
    """Also where Python has no buffer for it, as in many containers."""
    line = ["node", "exec", "Local", "--json", "--", "seq 200000"]
    with subprocess.Popen(
        [*launched(PROGRAM), *line],
        env=clean_environment(site.home, PYTHONUNBUFFERED="1"),
        cwd=str(site.home),
        stdout=subprocess.PIPE,
    ) as running:
        assert running.stdout.read(1) == b"["
        running.stdout.close()
        assert running.wait(60) == moltis.BROKEN_PIPE


@pytest.mark.parametrize("method", ["ping", "tools/list"])
def test_a_signal_ends_mcp_whose_client_reads_nothing(site, method):
    """Both where the main thread answers and where another does."""
    line = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method}).encode() + b"\n"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with start("mcp", home=site.home, **pipes) as mcp:
        os.set_blocking(mcp.stdin.fileno(), False)

        def is_full():
            with contextlib.suppress(BlockingIOError):
                os.write(mcp.stdin.fileno(), line * 20)
            return unread(mcp.stdout) > PIPE_FULL

        wait_for(is_full, what="answers to wait for us")
        mcp.send_signal(signal.SIGTERM)
        assert mcp.wait(60) == 0


@pytest.mark.parametrize("ignored", [True, False])
def test_a_hangup_ends_mcp_unless_nohup_started_it(site, ignored):
    words = ["/bin/sh", "-c", 'trap "" HUP; exec "$@"' if ignored else 'exec "$@"']
    line = b'{"jsonrpc":"2.0","id":1,"method":"ping"}\n'
    with subprocess.Popen(
        [*words, "sh", *launched(PROGRAM), "mcp"],
        env=clean_environment(site.home),
        cwd=str(site.home),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as mcp:
        for _ in range(1 + ignored):
            mcp.stdin.write(line)
            mcp.stdin.flush()
            assert json.loads(mcp.stdout.readline())["result"] == {}
            mcp.send_signal(signal.SIGHUP)
        if ignored:
            mcp.send_signal(signal.SIGTERM)
        assert mcp.wait(60) == 0
