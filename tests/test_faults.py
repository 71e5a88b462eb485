"""What becomes of commands when all that can break does.

Gateway, node and command line are processes, with proxies between them that cut,
fall silent and stop at any byte.  A checker counts runs with a file, compares output,
and demands that the audit says what is true.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback

import pytest
from peers import InProcessGateway
from proxy import DOWN, UP
from support import clean_environment, memory_of, wait_for, wait_in_shell
from world import MOLTIS, JumpingClock, SmallDisk, World, living_in_group

import moltis

BREAKS = (  # "cut_after" twice: each byte is another place to break
    *("cut", "cut_after", "cut_after", "hang_up", "freeze", "halve"),
    *("duplicate", "silence", "delay", "pieces"),
)
LOST = "is not known"
NO_ROOM = "make room on that disk"
SCHEDULE_BLOCKS = 10  # of seeds, each a test
JUMPS = (-10 * 365 * 86400, -86400, -5, 5, 3600, 10 * 365 * 86400)  # s


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


@pytest.mark.skipif(sys.platform != "linux", reason="it is read from /proc")
def test_no_amount_of_output_costs_memory(world):
    """200 MB: as much as 4 GB cost, and in seconds."""
    size = 200_000_000
    processes = (world.node, world.gateway)
    before = [memory_of(each.process.pid, "VmHWM") for each in processes]
    call = world.call(f"head -c {size} /dev/zero | tr '\\0' x")
    assert call.wait() == 0
    assert call.out.stat().st_size == size
    with call.out.open("rb") as file:
        pieces = iter(lambda: file.read(1_000_000), b"")
        assert all(piece == b"x" * len(piece) for piece in pieces)
    call.out.unlink()
    for each, most in zip(processes, before):
        assert memory_of(each.process.pid, "VmHWM") - most < size / 8


def test_the_caller_hears_that_its_node_is_waited_for(world):
    go = world.directory / "go"
    call = world.call(f"echo one; {wait_in_shell(go)}; echo two")
    wait_for(lambda: call.output == b"one\n")
    world.node_proxy.silent = True
    world.node_proxy.cut()
    wait_for(lambda: "waiting for far to come back" in call.complaints)
    world.node_proxy.silent = False
    go.touch()
    assert call.wait() == 0
    assert call.output == b"one\ntwo\n"
    assert "far is back after" in call.complaints


def test_a_silent_connection_is_given_up_and_its_commands_go_on(world):
    call = world.call("for i in 1 2 3 4 5 6; do echo $i; sleep 0.5; done")
    wait_for(lambda: call.output)  # a busy machine may show several lines at once
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
    wait_for(lambda: call.output)  # a busy machine may show several lines at once
    world.operator_proxy.cut()
    assert call.wait() == 0
    assert call.output == lines(4)
    assert world.runs() == 1
    assert "the gateway is back" in call.complaints


def test_a_command_outlives_a_gateway_that_is_killed(world):
    command = "for i in 1 2 3 4 5 6; do echo $i; sleep 0.5; done"
    call = world.call(world.counted(command, status=3))
    wait_for(lambda: call.output)  # a busy machine may show several lines at once
    world.gateway.kill()
    world.start_gateway()
    assert call.wait() == 3
    assert call.output == lines(6)
    assert world.runs() == 1
    (row,) = world.rows()
    assert (row["state"], row["exit_code"], row["stdout_bytes"]) == ("done", 3, 12)


def test_a_command_outlives_a_gateway_that_is_stopped_in_order(world):
    call = world.call(world.counted("for i in 1 2 3 4; do echo $i; sleep 0.5; done"))
    wait_for(lambda: call.output)  # a busy machine may show several lines at once
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
        command = [*MOLTIS, "node", "exec", "far", "--"]
        with subprocess.Popen(
            [*command, "echo one; sleep 1; echo two"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environ,
        ) as call:
            assert call.stdout.readline() == b"one\n"
            gateway.running.jobs.close()
            assert call.stdout.read() == b"two\n"
        assert call.returncode == 0


def test_what_ended_while_the_gateway_was_away_lands_in_the_audit(world):
    call = world.call(world.counted("sleep 1; echo out", 5))
    wait_for(world.runs)  # not the row alone, which is there before its node knows
    call.process.kill()  # nobody comes back for it
    world.gateway.kill()
    time.sleep(1.2)  # the command's own time, and not a wait for something
    world.start_gateway()
    row = wait_for(lambda: [r for r in world.rows() if r["ended_at"]])[0]
    assert (row["state"], row["exit_code"], row["stdout_bytes"]) == ("done", 5, 4)


def test_commands_of_a_node_that_was_killed_are_lost_when_it_is_back(world):
    call = world.call(world.counted("echo one; sleep 60"))
    wait_for(lambda: call.output == b"one\n")
    world.node.kill()
    world.node.start()
    assert call.wait() == moltis.EXIT_UNREACHABLE
    assert "how it ended is not known" in call.complaints
    assert [row["state"] for row in world.rows()] == ["lost"]
    assert world.runs() == 1


def test_a_node_that_is_stopped_ends_its_commands_and_says_so(world):
    call = world.call("trap 'echo ended; exit 1' TERM; echo one; sleep 60 & wait")
    wait_for(lambda: call.output == b"one\n")
    world.node.end()
    assert call.wait() == moltis.INTERRUPTED
    assert call.output == b"one\nended\n"
    assert "its node stopped" in call.complaints
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


def test_input_reaches_a_command_whose_request_got_lost(world):
    world.node_proxy.freeze()
    call = world.call("cat", stdin=b"all of it")
    wait_for(world.rows)
    world.node_proxy.cut()
    assert call.wait() == 0
    assert call.output == b"all of it"


def test_who_comes_back_to_a_lost_command_hears_what_others_heard(world):
    call = world.call("echo one; sleep 60")
    wait_for(lambda: call.output == b"one\n")
    world.operator_proxy.silent = True
    world.operator_proxy.cut()
    world.node.kill()
    world.node.start()
    wait_for(lambda: [r for r in world.rows() if r["state"] == "lost"])
    world.operator_proxy.silent = False
    assert call.wait() == moltis.EXIT_UNREACHABLE
    assert "how it ended is not known" in call.complaints


def test_a_job_is_followed_through_kills_and_cuts(world):
    command = world.counted("for i in $(seq 20); do echo $i; sleep 0.2; done")
    call = world.attach(world.job(command))
    wait_for(lambda: call.output)
    world.node_proxy.cut()
    world.gateway.kill()
    world.start_gateway()
    world.operator_proxy.cut()
    assert call.wait() == 0
    assert call.output == lines(20)
    assert world.runs() == 1


# Disks that are full, and clocks that jump


@pytest.fixture
def small_disk(tmp_path):
    if not SmallDisk.can_be_made():
        pytest.skip("nothing can be mounted here; root in a container of its own may")
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.close()


@pytest.fixture
def small_world(tmp_path):
    if not SmallDisk.can_be_made():
        pytest.skip("nothing can be mounted here; root in a container of its own may")
    with World(tmp_path, small_disks=True) as world:
        yield world


def test_a_full_disk_takes_no_command_and_says_why(small_world):
    small_world.disks["gateway"].fill()
    call = small_world.call(small_world.counted("echo one"))
    assert call.wait() == moltis.EXIT_UNREACHABLE
    assert NO_ROOM in call.complaints
    assert len(call.complaints.splitlines()) == 1
    assert small_world.runs() == 0
    small_world.disks["gateway"].free()
    again = small_world.call("echo one")
    assert again.wait() == 0
    assert again.output == b"one\n"


def test_a_command_that_runs_as_the_disk_fills_up_ends_as_ever(small_world):
    """Its caller hears at once, the audit when there is room."""
    call = small_world.call("echo one; sleep 1; echo two; exit 3")
    wait_for(lambda: call.output)
    small_world.disks["gateway"].fill()
    assert call.wait() == 3
    assert call.output == b"one\ntwo\n"
    small_world.disks["gateway"].free()
    row = wait_for(lambda: [r for r in small_world.rows() if r["ended_at"]])[0]
    assert (row["state"], row["exit_code"]) == ("done", 3)


def test_what_fills_the_disk_can_be_cancelled(small_world):
    call = small_world.call("echo one; sleep 60")
    wait_for(lambda: call.output == b"one\n")
    small_world.disks["gateway"].fill()
    call.signal(signal.SIGINT)
    assert call.wait() == moltis.INTERRUPTED
    small_world.disks["gateway"].free()
    wait_for(lambda: [r["state"] for r in small_world.rows()] == ["cancelled"])


def test_commands_of_a_node_go_on_whose_gateway_has_no_room(small_world):
    """It comes back to a gateway that cannot note so."""
    call = small_world.call("for i in 1 2 3 4 5 6; do echo $i; sleep 0.3; done")
    wait_for(lambda: call.output)  # a busy machine may show several lines at once
    small_world.disks["gateway"].fill()
    small_world.node_proxy.cut()
    assert call.wait() == 0
    assert call.output == lines(6)


def test_a_full_disk_of_its_own_does_not_concern_a_node(small_world):
    small_world.disks["node"].fill()
    small_world.node.kill()
    wait_for(lambda: not small_world.is_connected())
    small_world.node.start()
    small_world.wait_for_node()
    call = small_world.call("echo one")
    assert call.wait() == 0


def test_kept_output_is_where_it_was_after_a_full_disk(small_disk, monkeypatch):
    """What could not be written is a gap, and nothing else is."""
    monkeypatch.setattr(moltis, "SEGMENT", 1)  # byte: each piece begins another
    monkeypatch.setattr(moltis, "MEMORY_LOG", 1)
    monkeypatch.setattr(moltis, "UNWRITTEN", 1)  # nothing waits for more
    directory = small_disk.path / moltis.new_id()
    log = moltis.Log(str(directory))
    frames = [moltis.encode_log_frame(1, b"%04d" % n) for n in range(4)]
    log.append(0, frames[0])
    log.append(9, frames[1])
    small_disk.fill()
    log.append(18, frames[2])
    small_disk.free()
    log.append(27, frames[3])
    found = moltis.Log.load(str(directory), ended=True)
    assert (found.begin, found.end) == (0, 36)
    assert found.read(0) == (0, frames[0])
    assert found.read(9) == (9, frames[1])
    assert found.read(18) == (27, frames[3])


def test_an_operator_whose_own_disk_is_full_is_told(world):
    """And the command ends, as it does for one who leaves."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*MOLTIS, "node", "exec", "far", "--", "yes"],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            env=world.operator_environment,
            text=True,
        )
    assert done.returncode == moltis.EXIT_FAILURE
    assert done.stderr == ("moltis: the output is not whole: No space left on device\n")
    wait_for(lambda: [row["state"] for row in world.rows()] == ["cancelled"])


@pytest.mark.parametrize(
    "words", [["--help"], ["node", "exec", "--help"], ["--version"]]
)
def test_help_that_does_not_fit_on_a_disk_is_one_sentence(words, tmp_path):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*MOLTIS, *words],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "HOME": str(tmp_path)},
            text=True,
        )
    assert done.returncode == moltis.EXIT_FAILURE
    assert done.stderr == ("moltis: the output is not whole: No space left on device\n")


@pytest.fixture
def clocks(tmp_path):
    if JumpingClock.library() is None:
        pytest.skip("Debian's package faketime is not here")
    with World(tmp_path, clocks=True) as world:
        yield world


@pytest.mark.parametrize("seconds", [JUMPS[0], JUMPS[-1]])
def test_a_clock_that_jumps_changes_no_fate(clocks, seconds):
    """Nor when a command's time is up, nor what the audit says of its length."""
    call = clocks.call("echo one; sleep 60", options=("--timeout", "4"))
    wait_for(lambda: call.output == b"one\n")
    for clock in clocks.clocks.values():
        clock.jump(seconds)
    assert call.wait() == moltis.TIMED_OUT  # and not 0, which `sleep` ends with
    (row,) = clocks.rows()
    assert row["state"] == "timed_out"
    assert row["asked_at"] <= row["started_at"] <= row["ended_at"]


# Schedules: what happens to whom is drawn from a seed


class Work:
    """A command of which is known beforehand what it will write and how it ends."""

    def __init__(self, rng, world):
        self.world = world
        self.status = rng.choice([0, 0, 3, 7])
        self.stdout = self.stderr = b""
        self.stdin = None
        self.options = ()
        self.cancelled = False  # by us
        self.node = rng.choice(["far", "far", "far", "local"])
        kinds = ["ticks", "ticks", "big", "errors", "input", "quiet", "endless", "job"]
        self.kind = rng.choice(kinds)
        if self.kind == "job" and world.is_full("gateway"):
            self.kind = "quiet"
        command = world.counted(getattr(self, f"_{self.kind}")(rng), self.status)
        self.job = world.job(command, self.node) if self.kind == "job" else None
        if self.job is not None:
            self.call = world.attach(self.job)
        else:
            self.call = world.call(command, self.stdin, self.options, self.node)

    def _ticks(self, rng):
        count = rng.randint(5, 25)
        self.stdout = lines(count)
        return f"for i in $(seq {count}); do echo $i; sleep 0.1; done"

    _job = _ticks

    def _big(self, rng):
        count = rng.randint(10, 400) * 1000
        self.stdout = lines(count)
        return f"seq {count // 2}; sleep 0.5; seq {count // 2 + 1} {count}"

    def _errors(self, _rng):
        self.stdout = lines(3000)
        self.stderr = b"".join(b"e%d\n" % n for n in range(1, 3001))
        return "for i in $(seq 3000); do echo $i; echo e$i >&2; done"

    def _input(self, rng):
        piece = bytes(rng.getrandbits(8) for _ in range(1000))
        self.stdout = self.stdin = piece * rng.randint(1, 4000)
        return "cat"

    def _quiet(self, rng):
        return f"sleep {rng.uniform(0, 2):.2f}"

    def _endless(self, rng):
        """What only its time limit ends, at the latest."""
        self.options = ("--timeout", f"{rng.uniform(0.5, 2):.1f}")
        self.stdout = b"one\n"
        deaf = rng.choice(["", "", "trap '' TERM; "])
        return f"{deaf}echo one; sleep 30"

    def cancel(self):
        """End it, as a person does."""
        self.cancelled = True
        if self.job is None:
            self.call.signal(signal.SIGCONT)
            self.call.signal(signal.SIGINT)
        else:
            self.world.rpc("job.cancel", id=self.job)

    @property
    def row(self):
        """Return what the audit says of it, or None."""
        mark = f"{self.world.runs_file(self.call.number)}; "
        return next((r for r in self.world.rows() if mark in r["command"]), None)


class Schedule:
    """One world, some work, and a row of misfortunes, all drawn from `seed`."""

    def __init__(self, seed, directory):
        self.seed = seed
        self.rng = random.Random(seed)
        disks = SmallDisk.can_be_made()
        clocks = JumpingClock.library() is not None and self.rng.random() < 0.5
        self.world = World(directory, self.rng, small_disks=disks, clocks=clocks)
        self.works = []
        self.story = []
        self.node_died = False
        self.node_ended = False
        self.gateway_died = False
        self.gateway_ended = False
        self.gateway_was_full = False
        self.misfortunes = [
            *(self.break_connections, self.break_connections),
            *(self.break_both, self.break_both),
            *(self.kill_gateway, self.stop_gateway),
            *(self.kill_node, self.stop_node),
            *(self.pause, self.pause, self.pause_caller),
            *(self.cancel, self.ask_for_more),
            *((self.fill_disk, self.fill_disk) if disks else ()),
            *((self.jump, self.jump) if clocks else ()),
        ]

    def run(self):
        """Raises AssertionError where something is not as it has to be."""
        with self.world as world:
            try:
                for _ in range(self.rng.randint(1, 3)):
                    self.ask_for_more()
                for _ in range(self.rng.randint(1, 6)):
                    time.sleep(self.rng.uniform(0, 0.5))
                    self.rng.choice(self.misfortunes)()
                world.heal()
                for work in self.works:
                    work.call.wait()
                self.check_audit()
                for work in self.works:
                    self.check(work)
                assert "Traceback" not in world.gateway.text() + world.node_log()
            except BaseException:
                raise AssertionError(
                    f"schedule {self.seed}\n{self.story}\n{traceback.format_exc()}\n"
                    f"{world.account()}"
                ) from None

    def tell(self, *what):
        self.story.append(what)

    # Misfortunes

    def ask_for_more(self):
        self.works.append(Work(self.rng, self.world))
        self.tell("work", self.works[-1].kind, self.works[-1].node)

    def cancel(self):
        work = self.rng.choice(self.works)
        if not work.cancelled:
            self.tell("cancel", work.call.number)
            work.cancel()

    def pause_caller(self):
        """For good, or until all is well again."""
        work = self.rng.choice(self.works)
        self.tell("caller", work.call.number, "pause")
        work.call.signal(signal.SIGSTOP)

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
        self.gateway_ended = True
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
        self.tell("node", "kill")
        self.node_died = True
        self.world.node.kill()
        time.sleep(self.rng.choice([0, 0, 0.5]))
        self.world.node.start()

    def stop_node(self):
        """As `node remove` and a machine that shuts down do."""
        self.tell("node", "stop")
        self.node_ended = True
        self.world.node.end()
        time.sleep(self.rng.choice([0, 0, 0.5]))
        self.world.node.start()

    def fill_disk(self):
        """For a while, or until all is well again."""
        name = self.rng.choice(["gateway", "gateway", "gateway", "node"])
        disk = self.world.disks[name]
        self.tell(name, "disk full")
        self.gateway_was_full |= name == "gateway"
        disk.fill()
        if self.rng.random() < 0.5:
            self.ask_for_more()
        if self.rng.random() < 0.5:
            time.sleep(self.rng.uniform(0, 1))
            self.tell(name, "disk free")
            disk.free()

    def jump(self):
        name, seconds = self.rng.choice(["gateway", "node"]), self.rng.choice(JUMPS)
        self.tell(name, "clock", seconds)
        self.world.clocks[name].jump(seconds)

    def died(self, work):
        """Tell whether what ran it was killed."""
        return self.gateway_died if work.node == "local" else self.node_died

    def ended(self, work):
        """Tell whether what ran it was told to end."""
        return self.gateway_ended if work.node == "local" else self.node_ended

    # What has to be true in the end

    def check_audit(self):
        """Every invocation ends, once, and those that we know of are all there are."""

        def open_rows():
            return [r for r in self.world.rows() if r["state"] in moltis.JobState.OPEN]

        wait_for(lambda: not open_rows(), 60, lambda: f"the end of {open_rows()}")
        assert len(self.world.rows()) <= len(self.works)

    def check(self, work):
        row, number = work.row, work.call.number
        runs = self.world.runs(number)
        assert runs <= 1, f"call {number} ran {runs} times"
        if row is None:
            self.check_refused(work)
        else:
            getattr(self, f"check_{row['state']}")(work, row, runs)

    def check_refused(self, work):
        """It never got as far as being asked for."""
        assert not self.world.runs(work.call.number)
        if work.cancelled:
            assert work.call.status != 0
            return
        assert work.call.status == moltis.EXIT_UNREACHABLE
        last = work.call.complaints.splitlines()[-1]
        assert NO_ROOM in last or "database" not in last

    def check_lost(self, work, _row, runs):
        assert self.died(work) or self.ended(work) or not runs
        no_disk = self.gateway_was_full and (self.gateway_died or self.gateway_ended)
        no_process = self.gateway_died and self.node_died and work.node != "local"
        if no_disk or no_process:
            # Nothing outlived its end, which its caller may know: it is told first.
            whole = work.call.status == work.status
            assert work.stdout.startswith(work.call.output)
            assert work.call.output == work.stdout or not whole
            return
        self.check_stranded(work)
        # Who attaches to a job may not have got as far as hearing of it.
        assert (
            LOST in work.call.complaints
            or work.cancelled
            or (work.job and not work.call.output)
        )

    def check_stranded(self, work):
        """Its caller knows no end of it."""
        statuses = [moltis.EXIT_UNREACHABLE]
        if work.cancelled:
            # The signal itself ends a process that has just begun, or is done.
            statuses += [moltis.INTERRUPTED, -signal.SIGINT]
        assert work.call.status in statuses
        if work.job and self.gateway_was_full and "bytes cut" in work.call.complaints:
            return  # there are gaps in what it had to read
        assert work.stdout.startswith(work.call.output)

    def check_end(self, work, status, output=None):
        """Its caller knows its end, or has good reason not to."""
        if work.call.status == status:
            assert work.call.output == (work.stdout if output is None else output)
            return
        assert (
            self.died(work)  # as the end was told
            or self.ended(work)
            or work.cancelled
            or (work.job and not work.call.output)  # it did not even get to follow
        )
        self.check_stranded(work)

    def check_done(self, work, row, runs):
        assert runs == 1
        assert self.world.came_to_its_end(work.call.number)
        assert work.kind != "endless"
        assert row["exit_code"] == work.status
        assert row["stdout_bytes"] == len(work.stdout)
        assert row["stderr_bytes"] == len(work.stderr)
        if work.job is not None:
            self.check_kept(work)
        if work.job is None or not self.gateway_was_full:
            self.check_end(work, work.status)

    def check_kept(self, work):
        """What was kept of a job's output is what it wrote, and all if it could be."""
        end = 0
        for data in self.world.kept_pieces(work.job):
            if data is None:
                assert self.gateway_was_full
                return
            assert work.stdout[end : end + len(data)] == data
            end += len(data)
        assert end == len(work.stdout) or self.gateway_was_full

    def check_failed(self, work, row, runs):
        """It came as its node was ending."""
        assert not runs
        assert self.ended(work)
        assert "stopping" in row["reason"]
        self.check_end(work, moltis.EXIT_FAILURE, output=b"")

    def check_timed_out(self, work, row, _runs):
        assert work.kind == "endless"
        self.check_ended_early(work)
        # On a busy machine the shell may not have got to its line.
        written = work.stdout[: row["stdout_bytes"]]
        self.check_end(work, moltis.TIMED_OUT, output=written)

    def check_cancelled(self, work, _row, _runs):
        assert work.cancelled or self.ended(work)
        self.check_ended_early(work)
        if work.call.status != work.status:  # it may not care how a job ended
            work.cancelled = True
            self.check_stranded(work)

    def check_ended_early(self, work):
        """Nothing of it lives."""
        if work.kind == "endless":
            assert not self.world.came_to_its_end(work.call.number)
        for group in self.world.groups(work.call.number):
            assert not living_in_group(group)


def test_schedules_can_have_full_disks():
    if not SmallDisk.can_be_made():
        pytest.skip("nothing can be mounted here; root in a container of its own may")


def test_schedules_can_have_clocks_that_jump():
    if JumpingClock.library() is None:
        pytest.skip("Debian's package faketime is not here")


def pytest_generate_tests(metafunc):
    """Cut the schedules into blocks, which several workers of xdist share."""
    if "seeds" in metafunc.fixturenames:
        option = metafunc.config.getoption
        count, first = option("--schedules"), option("--first-schedule")
        size = max(-(-count // SCHEDULE_BLOCKS), option("--schedules-at-once"))
        seeds = range(first, first + count)
        blocks = [seeds[start : start + size] for start in range(0, count, size)]
        ids = [f"{block[0]}-{block[-1]}" for block in blocks]
        metafunc.parametrize("seeds", blocks, ids=ids)


def test_schedules_of_misfortunes(seeds, tmp_path, pytestconfig):
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
        list(pool.map(run, seeds))
    assert not failures, "\n\n".join(
        [f"{len(failures)} of {len(seeds)} schedules failed", *failures]
    )
