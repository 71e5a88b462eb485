"""What becomes of commands when all that can break does.

Gateway, node and command line are processes, with proxies between them that cut,
fall silent and stop at any byte.  A checker counts runs with a file, compares output,
and demands that the audit says what is true.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import hashlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
from peers import InProcessGateway
from proxy import DOWN, UP, FaultyProxy
from support import clean_environment, free_port, wait_for

import moltis

IMPATIENT = Path(__file__).resolve().parent / "impatient.py"
BREAKS = (  # "cut_after" twice: each byte is another place to break
    *("cut", "cut_after", "cut_after", "hang_up", "freeze", "halve"),
    *("duplicate", "silence", "delay", "pieces"),
)
LOST = "whether the command ran is not known"


def compiled_environment(home, **extra):
    """Return an environment in which Python keeps the compiled form, as installed.

    To compile the source anew takes 0.15 s of each process.
    """
    environ = clean_environment(home, **extra)
    del environ["PYTHONDONTWRITEBYTECODE"]
    return environ


class Process:
    """One process of moltis that can be killed, stopped and started again."""

    def __init__(self, name, directory, arguments, **extra):
        self.name = name
        self.log = directory / f"{name}.log"
        self.process = None
        self._arguments = [sys.executable, str(IMPATIENT), *map(str, arguments)]
        self._environ = compiled_environment(directory, **extra)
        self._directory = directory

    def start(self):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environ,
                cwd=str(self._directory),
            )

    def signal(self, number):
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self):
        """Return when it is dead: what it holds is free again."""
        self.signal(signal.SIGKILL)
        self.process.wait(20)

    def end(self):
        if self.process is not None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()

    def text(self):
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""


class Call:
    """One subcommand of an operator, with what it wrote in files."""

    def __init__(self, world, words, stdin=b""):
        self.number = len(world.calls)
        world.calls.append(self)
        self.out = world.directory / f"call-{self.number}.out"
        self.err = world.directory / f"call-{self.number}.err"
        source = world.directory / f"call-{self.number}.in"
        source.write_bytes(stdin)
        with source.open("rb") as file, self.out.open("wb") as out, self.err.open(
            "wb"
        ) as err:
            self.process = subprocess.Popen(
                [sys.executable, str(IMPATIENT), *words],
                stdin=file,
                stdout=out,
                stderr=err,
                env=world.operator_environment,
                cwd=str(world.directory),
            )

    @property
    def output(self):
        return self.out.read_bytes()

    @property
    def complaints(self):
        return self.err.read_text("utf-8", "replace")

    def wait(self, timeout=90):
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"call {self.number} did not end; {len(self.output)} bytes, "
                f"said {self.complaints!r}"
            ) from None


class World:
    """A gateway and a node, with a proxy before each of the gateway's visitors."""

    def __init__(self, directory, rng=None, node_options=()):
        rng = rng or random.Random(0)
        self.directory = directory
        self.calls = []
        self.gateway_port = free_port()
        self.node_proxy = FaultyProxy(self.gateway_port, rng)
        self.operator_proxy = FaultyProxy(self.gateway_port, rng)
        self.data = directory / "data"
        self.gateway = Process(
            "gateway",
            directory,
            ["gateway", "--port", self.gateway_port],
            MOLTIS_DATA_DIR=str(self.data),
        )
        self.node = None
        self._node_options = node_options
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self):
        self.start_gateway()
        file = moltis.GatewayFile.load(self.data)
        self.api_key = file.api_key
        made = self.rpc("device.token.create", displayName="far")
        self.operator_environment = compiled_environment(
            self.directory,
            MOLTIS_GATEWAY_URL=f"http://127.0.0.1:{self.operator_proxy.port}",
            MOLTIS_API_KEY=file.api_key,
        )
        host = f"ws://127.0.0.1:{self.node_proxy.port}/ws"
        options = ["--foreground", "--name", "far", "--node-id", "far-id"]
        self.node = Process(
            "node",
            self.directory,
            ["node", "add", "--host", host, *options, *self._node_options],
            MOLTIS_DEVICE_TOKEN=made["deviceToken"],
        )
        self.node.start()
        self.wait_for_node()

    @property
    def direct_url(self):
        return f"http://127.0.0.1:{self.gateway_port}"

    def start_gateway(self):
        said = self.gateway.text().count("Ctrl+C stops it")
        self.gateway.start()
        wait_for(
            lambda: self.gateway.text().count("Ctrl+C stops it") > said,
            60,
            lambda: f"the gateway to start: {self.gateway.text()}",
        )

    def rpc(self, method, **params):
        """Make one call; a machine that is busy with others may take several."""
        for _ in range(10):
            with contextlib.suppress(moltis.Unreachable), moltis.OperatorClient(
                self.direct_url, self.api_key
            ) as client:
                return client.call(method, params)
        raise AssertionError(f"no answer to {method}: {self.gateway.text()}")

    def is_connected(self):
        return any(n["connected"] for n in self.rpc("node.list")[1:])

    def wait_for_node(self):
        wait_for(self.is_connected, 60, lambda: f"the node: {self.node.text()}")

    def call(self, command, stdin=None):
        """Start a `node exec`."""
        if stdin is None:
            return Call(self, ["node", "exec", "far", "--", command])
        return Call(self, ["node", "exec", "far", "--stdin", "--", command], stdin)

    def attach(self, command):
        """Start a job, and a `node attach` to it."""
        job = self.rpc(
            "node.invoke",
            nodeId="far",
            command="system.run",
            args={"command": command},
            background=True,
        )
        return Call(self, ["node", "attach", job["invokeId"]])

    def kept_output(self, job):
        """Return all of a job's standard output, as any client gets it."""
        data, position = b"", 0
        while True:
            answer = self.rpc("command.get", id=job, offset=position, encoding="base64")
            pieces = [p for stream, _, p in answer["output"] if stream == "stdout"]
            data += b"".join(map(base64.b64decode, pieces))
            if not answer["output"]:
                return data
            position = answer["next"]

    def runs(self, number=0):
        """Return how often the command of that number was run."""
        path = self.directory / f"runs-{number}"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def counted(self, command):
        """Return `command` with a line that writes down that it is run."""
        return f"echo run >>{self.directory}/runs-{len(self.calls)}; {command}"

    def rows(self):
        """Return the audit, the oldest first."""
        with contextlib.closing(sqlite3.connect(self.data / "moltis.db")) as db:
            db.row_factory = sqlite3.Row
            return list(map(dict, db.execute("SELECT * FROM commands ORDER BY seq")))

    def heal(self):
        self.node_proxy.heal()
        self.operator_proxy.heal()

    def close(self):
        for call in self.calls:
            if call.process.poll() is None:
                call.process.kill()
            call.process.wait()
        for process in (self.node, self.gateway):
            if process is not None:
                process.end()
        self.node_proxy.close()
        self.operator_proxy.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def account(self):
        """Return all that was said, for who has to find out what went wrong."""
        logs = [f"--- {p.name}\n{p.text()[-3000:]}" for p in (self.gateway, self.node)]
        calls = [
            f"--- call {call.number}: status {call.process.poll()}, "
            f"{len(call.output)} bytes, {call.complaints!r}"
            for call in self.calls
        ]
        return "\n".join([*logs, *calls, *(str(row) for row in self.rows())])


@pytest.fixture
def world(tmp_path):
    with World(tmp_path) as world:
        yield world


def lines(count):
    return b"".join(b"%d\n" % n for n in range(1, count + 1))


# The named ones


def test_a_million_lines_arrive_once_and_in_order_through_ten_cuts(world):
    call = world.call("for i in $(seq 1000000); do echo $i; done")
    for _ in range(10):
        world.node_proxy.wait_until_passed(300_000, UP)
        world.node_proxy.cut()
    assert call.wait(120) == 0
    assert call.output == lines(1000000)


def test_the_caller_hears_that_its_node_is_waited_for(world):
    call = world.call("echo one; sleep 2; echo two")
    wait_for(lambda: call.output == b"one\n")
    world.node_proxy.silent = True
    world.node_proxy.cut()
    wait_for(lambda: "waiting for far to come back" in call.complaints)
    world.node_proxy.silent = False
    assert call.wait() == 0
    assert call.output == b"one\ntwo\n"
    assert "far is back after" in call.complaints


def test_a_silent_connection_is_given_up_and_its_commands_go_on(world):
    call = world.call("for i in 1 2 3 4 5 6; do echo $i; sleep 0.5; done")
    wait_for(lambda: call.output == b"1\n")
    world.node_proxy.freeze()
    assert call.wait() == 0
    assert call.output == lines(6)


def test_input_and_output_go_on_at_the_exact_byte(world):
    data = (
        random.Random(1).randbytes(8_000_000)
        if sys.version_info >= (3, 9)
        else (os.urandom(8_000_000))
    )
    call = world.call("cat; echo end >&2", stdin=data)
    for number in range(8):
        proxy = (world.node_proxy, world.operator_proxy)[number % 2]
        proxy.cut_after(100_000 + 7919 * number, (UP, DOWN)[number // 2 % 2])
        proxy.wait_until_cut(call.process)
    assert call.wait() == 0
    assert hashlib.sha256(call.output).digest() == hashlib.sha256(data).digest()
    assert "end\n" in call.complaints


def test_a_caller_whose_connection_breaks_goes_on_with_its_command(world):
    call = world.call(world.counted("for i in 1 2 3 4; do echo $i; sleep 0.5; done"))
    wait_for(lambda: call.output == b"1\n")
    world.operator_proxy.cut()
    assert call.wait() == 0
    assert call.output == lines(4)
    assert world.runs() == 1
    assert "the gateway is back" in call.complaints


def test_a_command_outlives_a_gateway_that_is_killed(world):
    command = "for i in 1 2 3 4 5 6; do echo $i; sleep 0.5; done; exit 3"
    call = world.call(world.counted(command))
    wait_for(lambda: call.output == b"1\n")
    world.gateway.kill()
    world.start_gateway()
    assert call.wait() == 3
    assert call.output == lines(6)
    assert world.runs() == 1
    (row,) = world.rows()
    assert (row["state"], row["exit_code"], row["stdout_bytes"]) == ("done", 3, 12)


def test_a_command_outlives_a_gateway_that_is_stopped_in_order(world):
    call = world.call(world.counted("for i in 1 2 3 4; do echo $i; sleep 0.5; done"))
    wait_for(lambda: call.output == b"1\n")
    world.gateway.end()
    world.start_gateway()
    assert call.wait() == 0
    assert call.output == lines(4)
    assert world.runs() == 1


def test_a_caller_who_comes_back_as_the_gateway_stops_leaves_its_command_alone(
    tmp_path,
):
    """The gateway hangs up a moment later than it says that it stops."""
    with InProcessGateway(tmp_path / "data") as gateway, gateway.node():
        environ = clean_environment(
            tmp_path, MOLTIS_GATEWAY_URL=gateway.url, MOLTIS_API_KEY=gateway.api_key
        )
        command = [sys.executable, str(IMPATIENT), "node", "exec", "far", "--"]
        with subprocess.Popen(
            [*command, "echo one; sleep 1; echo two"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environ,
        ) as call:
            assert call.stdout.readline() == b"one\n"
            gateway.running.invocations.close()
            assert call.stdout.read() == b"two\n"
        assert call.returncode == 0


def test_what_ended_while_the_gateway_was_away_lands_in_the_audit(world):
    call = world.call("sleep 1; echo out; exit 5")
    wait_for(world.rows)
    call.process.kill()  # nobody comes back for it
    world.gateway.kill()
    time.sleep(1.2)  # the command's own time, and not a wait for something
    world.start_gateway()
    row = wait_for(lambda: [r for r in world.rows() if r["ended_at"]], 20)[0]
    assert (row["state"], row["exit_code"], row["stdout_bytes"]) == ("done", 5, 4)


def test_commands_of_a_node_that_was_killed_are_lost_when_it_is_back(world):
    call = world.call(world.counted("echo one; sleep 60"))
    wait_for(lambda: call.output == b"one\n")
    world.node.kill()
    world.node.start()
    assert call.wait() == moltis.EXIT_UNREACHABLE
    assert LOST in call.complaints
    assert [row["state"] for row in world.rows()] == ["lost"]
    assert world.runs() == 1


def test_a_node_that_is_stopped_ends_its_commands_and_says_so(world):
    call = world.call("trap 'echo ended; exit 1' TERM; echo one; sleep 60 & wait")
    wait_for(lambda: call.output == b"one\n")
    world.node.end()
    assert call.wait() == moltis.INTERRUPTED
    assert call.output == b"one\nended\n"
    assert "its node stops" in call.complaints
    assert [row["state"] for row in world.rows()] == ["cancelled"]


def test_a_command_ends_with_the_caller_who_leaves(world):
    mark = world.directory / "mark"
    call = world.call(f"trap 'echo >{mark}; exit' TERM; echo one; sleep 60 & wait")
    wait_for(lambda: call.output == b"one\n")
    call.process.send_signal(signal.SIGTERM)
    assert call.wait() == moltis.INTERRUPTED
    assert mark.exists()
    assert [row["state"] for row in world.rows()] == ["cancelled"]


def test_a_cancel_reaches_a_node_that_was_away(world):
    call = world.call("echo one; sleep 60")
    wait_for(lambda: call.output == b"one\n")
    world.node_proxy.silent = True
    world.node_proxy.cut()
    wait_for(lambda: "waiting for far" in call.complaints)
    call.process.send_signal(signal.SIGINT)
    time.sleep(0.1)  # either order is right
    world.node_proxy.silent = False
    assert call.wait() == moltis.INTERRUPTED


def test_a_stopped_reader_slows_its_own_command_down_and_no_other(world):
    call = world.call("head -c 30000000 /dev/zero")
    wait_for(lambda: call.output)
    call.process.send_signal(signal.SIGSTOP)
    other = world.call("seq 100000")
    assert other.wait() == 0
    assert other.output == lines(100000)
    call.process.send_signal(signal.SIGCONT)
    assert call.wait() == 0
    assert len(call.output) == 30000000


def test_a_job_is_followed_through_kills_and_cuts(world):
    call = world.attach(
        world.counted("for i in $(seq 20); do echo $i; sleep 0.2; done")
    )
    wait_for(lambda: call.output)
    world.node_proxy.cut()
    world.gateway.kill()
    world.start_gateway()
    world.operator_proxy.cut()
    assert call.wait() == 0
    assert call.output == lines(20)
    assert world.runs() == 1


# Schedules: what happens to whom is drawn from a seed


class Work:
    """A command whose output and status are known beforehand."""

    def __init__(self, rng, world):
        kind = rng.choice(["ticks", "ticks", "big", "errors", "input", "quiet", "job"])
        self.stdin = None
        self.status = rng.choice([0, 0, 1, 7])
        self.is_job = kind == "job"
        start = world.attach if kind == "job" else world.call
        if kind in ("ticks", "job"):
            count = rng.randint(5, 25)
            self.stdout = lines(count)
            command = f"for i in $(seq {count}); do echo $i; sleep 0.1; done"
        elif kind == "big":
            count = rng.randint(10, 400) * 1000
            self.stdout = lines(count)
            command = f"seq {count // 2}; sleep 0.5; seq {count // 2 + 1} {count}"
        elif kind == "errors":
            self.stdout = lines(3000)
            command = "for i in $(seq 3000); do echo $i; echo e$i >&2; done"
        elif kind == "input":
            size = rng.randint(1, 4_000_000)
            self.stdin = bytes(rng.getrandbits(8) for _ in range(1000)) * (
                size // 1000 + 1
            )
            self.stdout = self.stdin
            command = "cat"
        else:
            self.stdout = b""
            command = f"sleep {rng.uniform(0, 2):.2f}"
        call = world.counted(f"{command}; exit {self.status}")
        self.call = start(call, *([self.stdin] if self.stdin else []))


class Schedule:
    """One world, some work, and a row of misfortunes, all drawn from `seed`."""

    def __init__(self, seed, directory):
        self.seed = seed
        self.rng = random.Random(seed)
        self.world = World(directory, self.rng)
        self.story = []
        self.node_died = False
        self.gateway_died = False
        self.misfortunes = [
            self.break_connections,
            self.break_connections,
            self.break_both,
            self.break_both,
            self.kill_gateway,
            self.stop_gateway,
            self.pause,
            self.pause,
            self.kill_node,
        ]

    def run(self):
        """Raises AssertionError where something is not as it has to be."""
        with self.world as world:
            works = [Work(self.rng, world) for _ in range(self.rng.randint(1, 3))]
            try:
                for _ in range(self.rng.randint(1, 6)):
                    time.sleep(self.rng.uniform(0, 0.6))
                    self.rng.choice(self.misfortunes)()
                world.heal()
                for work in works:
                    work.call.wait()
                self.check_audit(works)
                for work in works:
                    self.check(work)
            except BaseException:
                raise AssertionError(
                    f"schedule {self.seed}\n{self.story}\n{traceback.format_exc()}\n"
                    f"{world.account()}"
                ) from None

    def tell(self, *what):
        self.story.append(what)

    def break_connections(self):
        name = self.rng.choice(["node", "operator"])
        proxy = getattr(self.world, f"{name}_proxy")
        what = self.rng.choice(BREAKS)
        self.tell(name, what)
        if what == "silence":
            proxy.silent = True
            time.sleep(self.rng.uniform(0, 1.5))
            proxy.silent = False
        elif what == "delay":
            proxy.delay = self.rng.uniform(0, 0.3)
        elif what == "pieces":
            proxy.piece = self.rng.choice([1, 7, 100, 1460])
            time.sleep(0.3)
            proxy.piece = 65536
        elif what == "cut_after":
            proxy.cut_after(self.rng.choice([1, 40, 500, 70_000, 300_000]))
        else:
            getattr(proxy, what)()

    def break_both(self):
        self.tell("both", "cut_after")
        for proxy in (self.world.node_proxy, self.world.operator_proxy):
            proxy.cut_after(self.rng.choice([500, 70_000, 300_000, 900_000]))

    def kill_gateway(self):
        self.tell("gateway", "kill")
        self.gateway_died = True
        self.world.gateway.kill()
        time.sleep(self.rng.choice([0, 0, 0.5]))
        self.world.start_gateway()

    def stop_gateway(self):
        self.tell("gateway", "stop")
        self.gateway_died = True
        self.world.gateway.end()
        self.world.start_gateway()

    def pause(self):
        name = self.rng.choice(["node", "gateway"])
        self.tell(name, "pause")
        process = getattr(self.world, name)
        process.signal(signal.SIGSTOP)
        time.sleep(self.rng.uniform(0, 1.5))
        process.signal(signal.SIGCONT)

    def kill_node(self):
        if self.rng.random() < 0.5:
            return
        self.tell("node", "kill")
        self.node_died = True
        self.world.node.kill()
        time.sleep(self.rng.choice([0, 0, 0.5]))
        self.world.node.start()

    def check_audit(self, works):
        """Every invocation ends, in a state that is true."""

        def open_rows():
            return [r for r in self.world.rows() if r["state"] in ("sent", "running")]

        wait_for(lambda: not open_rows(), 60, lambda: f"the end of {open_rows()}")
        for row in self.world.rows():
            states = ["done"]
            if self.node_died or self.gateway_died:
                states.append("lost")
            assert row["state"] in states, row
        assert len(self.world.rows()) <= len(works)

    def check(self, work):
        call, world = work.call, self.world
        runs = world.runs(call.number)
        mark = f"/runs-{call.number};"
        row = next((r for r in world.rows() if mark in r["command"]), None)
        assert runs <= 1, f"call {call.number} ran {runs} times"
        if row is None:  # it never got as far as being asked for
            assert runs == 0
            assert call.process.poll() == moltis.EXIT_UNREACHABLE
            return
        if row["state"] == "lost":
            assert self.node_died or runs == 0
            assert call.process.poll() == moltis.EXIT_UNREACHABLE
            # Who attaches to a job may not have got as far as hearing of it.
            assert LOST in call.complaints or (work.is_job and not call.output)
            assert work.stdout.startswith(call.output)
            return
        assert runs == 1
        assert row["exit_code"] == work.status
        assert row["stdout_bytes"] == len(work.stdout)
        if work.is_job:
            assert world.kept_output(row["invoke_id"]) == work.stdout
        status = call.process.poll()
        if status == moltis.EXIT_UNREACHABLE:
            # Its node died as the end was told, or it did not even get to follow.
            assert self.node_died or (work.is_job and not call.output)
        else:
            assert status == work.status
            assert call.output == work.stdout


def test_schedules_of_misfortunes(tmp_path, pytestconfig):
    count = pytestconfig.getoption("--schedules")
    first = pytestconfig.getoption("--first-schedule")
    failures = []
    lock = threading.Lock()

    def run(seed):
        directory = tmp_path / str(seed)
        directory.mkdir()
        try:
            Schedule(seed, directory).run()
        except Exception as error:
            with lock:
                failures.append(str(error))

    at_once = pytestconfig.getoption("--schedules-at-once")
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, range(first, first + count)))
    assert not failures, "\n\n".join(
        [f"{len(failures)} of {count} schedules failed", *failures]
    )
