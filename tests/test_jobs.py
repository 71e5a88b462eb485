"""Jobs at the gateway: rows, logs, followers, and nodes that come and go.

The node is scripted: it runs each id once and keeps its log until it is acknowledged.
Store and files are real.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import threading
import time
import weakref

import pytest

import moltis
from moltis import ENDING, FRAME_HEAD, LOG_WINDOW, STDERR, STDOUT

ME = moltis.Origin("operator", "key-1", "me")


def frame(kind, data):
    return FRAME_HEAD.pack(kind, len(data)) + data


def out(data):
    return frame(STDOUT, data)


def end(state="done", **fields):
    return frame(ENDING, json.dumps({"state": state, **fields}).encode())


def text_of(job):
    """Return what is kept of its output, without the gaps."""
    text, offset = b"", 0
    while True:
        start, data = job.log.read(offset)
        if not data:
            return text.decode()
        text += b"".join(
            data for kind, data in moltis.log_frames(data) if kind != ENDING
        )
        offset = start + len(data)


class ScriptedNode:
    """A node as the gateway reaches it: runs an id once, keeps what is not settled."""

    node_id = "n"
    resumes = True
    ready = True

    def __init__(self):
        self.link = self
        self.jobs = None
        self.up = True
        self.restart()

    def restart(self):
        """Begin another life of the process, which knows nothing of the last."""
        self.instance = moltis.new_id()
        self.logs, self.acked, self.sent = {}, {}, {}
        self.runs, self.cancelled, self.settled, self.known = [], [], [], set()

    # As the gateway calls it

    def check(self, work, spec): ...

    def check_cancel(self, job_id): ...

    def start(self, job_id, _work, _spec):
        self._check_up()
        if job_id not in self.known:
            self.known.add(job_id)
            self.runs.append(job_id)
            self.logs[job_id], self.acked[job_id], self.sent[job_id] = b"", 0, 0

    def acknowledge(self, job_id, offset):
        self._check_up()
        if job_id not in self.logs:
            return
        self.acked[job_id] = max(offset, self.acked[job_id])
        kinds = [kind for kind, _ in moltis.log_frames(self.logs[job_id])]
        if offset >= len(self.logs[job_id]) and kinds[-1:] == [ENDING]:
            self.settled.append(job_id)
            del self.logs[job_id]

    def cancel(self, job_id):
        self._check_up()
        self.cancelled.append(job_id)

    def input(self, *_args):
        self._check_up()

    def _check_up(self):
        if not self.up:
            raise moltis.ConnectionClosed(1006)

    # As a test moves it

    def write(self, job_id, *frames):
        for data in frames:
            self.logs[job_id] += data
            self.pump(job_id)

    def pump(self, job_id):
        """Send whole frames while the window has room."""
        while self.up and job_id in self.logs:
            start = self.sent[job_id]
            if start >= len(self.logs[job_id]):
                return
            if start - self.acked[job_id] >= LOG_WINDOW:
                return
            size = FRAME_HEAD.unpack_from(self.logs[job_id], start)[1]
            data = self.logs[job_id][start : start + FRAME_HEAD.size + size]
            self.sent[job_id] = start + len(data)
            self.jobs.on_log(self, job_id, start, data)

    def drop(self):
        """Lose the connection."""
        self.up = False
        self.jobs.left(self)

    def come(self):
        """Connect again, with what is held."""
        self.up = True
        held = {job_id: self.acked[job_id] for job_id in self.logs}
        offsets = self.jobs.resumed(self, held)
        self.jobs.came(self, held)
        for job_id in [i for i in held if i not in offsets]:
            del self.logs[job_id]
        for job_id, offset in offsets.items():
            if job_id in self.logs:
                self.sent[job_id] = offset
                self.pump(job_id)
        return offsets


class OneNodeFleet:
    """Knows the scripted node alone."""

    def __init__(self, node):
        self.node = node

    def knows(self, node_id):
        return node_id == self.node.node_id

    def connected(self, node_id):
        return self.node if node_id == self.node.node_id and self.node.up else None

    def require_connected(self, node_id, name):
        if self.connected(node_id) is None:
            raise moltis.RpcError("UNAVAILABLE", f"{name} is offline")


class Reader:
    """A follower behind a connection: it reads at once, and acknowledges on demand."""

    person, lost_at = "", 0

    def __init__(self, jobs, job, position=0, *, holds=True, reads=True):
        self.jobs, self.holds, self.position, self.reads = jobs, holds, position, reads
        self.at = position
        self.got, self.endings = b"", []
        self.job = job
        jobs.follow(job, self)

    def wake(self, job):
        while self.reads:
            start, data = job.log.read(self.at, 64 * 1024)
            if not data:
                break
            self.got += data
            self.at = start + len(data)
        if job.ending is not None and self.at >= job.log.end:
            self.endings.append(job.ending)

    def acknowledge(self):
        self.position = self.at
        self.jobs.acknowledge(self.job)

    def frames(self):
        return [(k, d) for k, d in moltis.log_frames(self.got) if k != ENDING]


class World:
    """A gateway's Jobs over a real store, and one scripted node."""

    def __init__(self, directory):
        self.directory = directory
        self.node = ScriptedNode()
        self.store = None
        self.restart_gateway()

    def restart_gateway(self):
        """Begin another life of the gateway, as after a SIGKILL."""
        if self.store is not None:
            self.store.close()
        self.store = moltis.Store(self.directory / "moltis.db")
        self.jobs = moltis.Jobs(
            self.store.jobs, OneNodeFleet(self.node), self.directory / "jobs"
        )
        self.node.jobs = self.jobs
        self.node.sent = dict.fromkeys(self.node.logs, 0)

    def start(
        self, *, kept=False, job_id=None, origin=ME, spec=None, queue=0, work="run"
    ):
        spec = {"command": "true", **(spec or {})}
        return self.jobs.start(
            moltis.new_job(
                ("n", "Node"),
                work,
                spec,
                origin,
                kept=kept,
                job_id=job_id,
                queue=queue,
            )
        )

    def row(self, job):
        return self.store.jobs.get(job.id)


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.store.close()


def test_a_holder_reads_output_in_order_and_the_node_forgets_what_is_read(world):
    job = world.start()
    reader = Reader(world.jobs, job)
    world.node.write(job.id, out(b"hi\n"), frame(STDERR, b"oh\n"), end(exitCode=3))
    assert reader.frames() == [(STDOUT, b"hi\n"), (STDERR, b"oh\n")]
    assert (world.row(job).state, world.row(job).exit_code) == ("done", 3)
    assert job.id in world.node.logs  # its holder has not acknowledged it
    reader.acknowledge()
    assert world.node.settled == [job.id]
    assert world.row(job).words() == "exit status 3"


def test_a_slow_holder_pauses_the_node_and_memory_stays_bounded(world):
    job = world.start()
    reader = Reader(world.jobs, job)
    for _ in range(64):
        world.node.write(job.id, out(b"x" * 65000))
    assert world.node.sent[job.id] <= LOG_WINDOW + 66_000
    assert job.log.end - job.log.begin <= LOG_WINDOW + 66_000
    while reader.position < len(world.node.logs[job.id]):
        reader.acknowledge()
        world.node.pump(job.id)
    assert len(reader.got) == 64 * 65005


def test_an_id_that_is_asked_for_twice_runs_once(world):
    job_id = moltis.new_id()
    first = world.start(job_id=job_id)
    assert world.start(job_id=job_id) is first
    world.node.write(job_id, end(exitCode=0))
    assert world.start(job_id=job_id).record.state == "done"
    assert world.node.runs == [job_id]


def test_an_id_of_another_key_is_a_conflict(world):
    job = world.start()
    other = moltis.Origin("operator", "key-2", "somebody else")
    with pytest.raises(moltis.RpcError, match="another key") as caught:
        world.start(job_id=job.id, origin=other)
    assert caught.value.code == "CONFLICT"


def test_a_short_kept_log_moves_into_its_row(world):
    job = world.start(kept=True)
    world.node.write(job.id, out(b"kept"), end(exitCode=3))
    assert world.node.settled == [job.id]
    assert not (world.directory / "jobs" / job.id).exists()
    again = world.jobs.get(job.id)
    assert again is not job
    assert next(moltis.log_frames(again.log.read(0)[1])) == (STDOUT, b"kept")


def test_a_log_that_was_in_files_and_is_short_moves_into_its_row(world):
    job = world.start(kept=True)
    world.node.write(job.id, out(b"one"))
    job.log.created -= 2
    world.jobs.tick()
    assert (world.directory / "jobs" / job.id).is_dir()
    world.node.write(job.id, out(b"two"), end())
    assert not (world.directory / "jobs" / job.id).exists()
    assert text_of(world.jobs.get(job.id)) == "onetwo"


def test_a_long_kept_log_keeps_its_first_and_newest_files(world, monkeypatch):
    monkeypatch.setattr(moltis, "SEGMENT", 200_000)
    monkeypatch.setattr(moltis, "MAX_SEGMENTS", 3)
    job = world.start(kept=True)
    for number in range(40):
        world.node.write(job.id, out(bytes([number]) * 50_000))
    world.node.write(job.id, end(exitCode=0))
    log, at, seen = world.jobs.get(job.id).log, 0, []
    while True:
        at, data = log.read(at)
        if not data:
            break
        at += len(data)
        seen += [d[0] for kind, d in moltis.log_frames(data) if kind == STDOUT]
    assert seen[:4] == [0, 1, 2, 3]
    assert seen[-1] == 39
    assert len(seen) < 20


def test_after_a_restart_the_gateway_goes_on_at_the_exact_byte(world):
    job = world.start()
    reader = Reader(world.jobs, job)
    world.node.write(job.id, out(b"one"))
    reader.acknowledge()
    world.node.drop()
    world.restart_gateway()
    again = Reader(world.jobs, world.jobs.get(job.id), reader.at)
    world.node.come()
    world.node.write(job.id, out(b"two"), end(exitCode=0))
    assert again.frames() == [(STDOUT, b"two")]
    again.acknowledge()
    assert world.node.settled == [job.id]


def test_a_client_ahead_of_the_log_waits_for_its_node(world):
    """Its offset lies beyond a window that an earlier life had acknowledged."""
    job = world.start()
    reader = Reader(world.jobs, job)
    for _ in range(30):
        world.node.write(job.id, out(b"x" * 65000))
        reader.acknowledge()
    world.node.drop()
    world.restart_gateway()
    again = Reader(world.jobs, world.jobs.get(job.id), reader.at)
    world.node.come()
    world.node.write(job.id, out(b"two"), end(exitCode=0))
    assert again.frames() == [(STDOUT, b"two")]


@pytest.mark.parametrize("holder_first", [True, False])
def test_what_a_holder_lacks_of_an_ended_job_outlives_two_gateways(world, holder_first):
    """It ended in the second; only its node has the output that was not read."""
    job = world.start()
    reader = Reader(world.jobs, job)
    world.node.write(job.id, out(b"one"))
    reader.acknowledge()
    world.node.drop()
    world.restart_gateway()
    world.node.come()
    world.node.write(job.id, out(b"two"), end(exitCode=3))
    assert world.row(job).state == "done"
    world.node.drop()
    world.restart_gateway()
    if holder_first:
        again = Reader(world.jobs, world.jobs.get(job.id), reader.at)
        world.node.come()
    else:
        world.node.come()
        again = Reader(world.jobs, world.jobs.get(job.id), reader.at)
    assert again.frames() == [(STDOUT, b"two")]
    again.acknowledge()
    assert world.node.settled == [job.id]


def test_times_of_a_job_are_in_order_whichever_clock_jumped(world):
    for started_at in (1, 2**50):
        job = world.start(kept=True)
        world.node.write(job.id, end(startedAt=started_at, duration=7.5))
        row = world.row(job)
        assert row.asked_at <= row.started_at <= row.ended_at - 7500


def test_a_node_that_was_started_anew_has_lost_its_jobs(world):
    job = world.start()
    world.node.drop()
    world.node.restart()
    world.node.come()
    assert world.row(job).state == "lost"
    assert world.row(job).reason == (
        "its node came back without it; how far it got is not known"
    )
    assert world.node.runs == []


def test_a_lost_job_that_wrote_something_did_run(world):
    job = world.start()
    world.node.write(job.id, out(b"x"))
    world.node.drop()
    world.node.restart()
    world.node.come()
    assert world.row(job).reason.endswith("how it ended is not known")
    assert world.row(job).stdout_bytes == 1  # as far as it is known


def test_a_start_that_got_lost_on_its_way_is_sent_again(world):
    world.node.up = False
    world.node.up, start = True, world.node.start

    def broken(*_args):
        raise moltis.ConnectionClosed(1006)

    world.node.start = broken
    job = world.start()
    world.node.start = start
    world.node.drop()
    world.node.come()
    assert world.node.runs == [job.id]
    assert job.record.state == "running"


def test_a_fast_command_ends_before_its_holder_follows(world):
    job = world.start()
    world.node.write(job.id, out(b"hi\n"), end(exitCode=0))
    reader = Reader(world.jobs, world.jobs.get(job.id))
    assert reader.frames() == [(STDOUT, b"hi\n")]
    assert [ending.exit_code for ending in reader.endings] == [0]
    reader.acknowledge()
    assert world.node.settled == [job.id]


def test_the_output_of_a_kept_job_can_be_read_after_waiting_for_its_end(world):
    job = world.start(kept=True)
    ended = world.jobs.ended(job, 60)
    world.node.write(job.id, out(b"x" * 1000), end(exitCode=0))
    assert text_of(ended.result(60)) == "x" * 1000


def test_an_unkept_job_waits_ten_minutes_for_its_holder_then_runs_to_its_end(world):
    job = world.start()
    reader = Reader(world.jobs, job)
    for _ in range(5):
        world.node.write(job.id, out(b"x" * 65000))
        reader.acknowledge()
    world.node.drop()
    world.restart_gateway()
    world.node.come()
    job = world.jobs.get(job.id)
    for _ in range(20):
        world.node.write(job.id, out(b"x" * 65000))
    world.node.write(job.id, end(exitCode=5))
    assert world.row(job).state == "running"  # the window is full
    job.alone_since -= moltis.HOLDER_PATIENCE + 1
    world.jobs.tick()
    world.node.pump(job.id)
    assert world.row(job).exit_code == 5
    assert world.node.settled == [job.id]


def test_an_ending_of_which_nobody_takes_the_output_leaves_its_row_alone(world):
    job = world.start()
    reader = Reader(world.jobs, job, reads=False)
    world.node.write(job.id, end(exitCode=0))
    world.jobs.unfollow(job, reader, leaves=False)
    job.alone_since -= moltis.HOLDER_PATIENCE + 1
    world.jobs.tick()
    assert (world.row(job).state, world.row(job).cancelled_at) == ("done", None)
    assert world.node.settled == [job.id]


def test_a_holder_that_leaves_in_order_cancels_an_unkept_job(world):
    job = world.start()
    reader = Reader(world.jobs, job)
    world.jobs.unfollow(job, reader, leaves=True)
    assert world.node.cancelled == [job.id]


def test_a_watcher_keeps_nothing_and_its_leaving_ends_nothing(world):
    job = world.start()
    holder = Reader(world.jobs, job)
    watcher = Reader(world.jobs, job, holds=False)
    world.jobs.unfollow(job, holder, leaves=False)
    world.jobs.unfollow(job, watcher, leaves=True)
    assert world.node.cancelled == []
    assert job.record.cancelled_at is None


def test_a_second_holder_takes_over_and_begins_at_what_is_left(world):
    job = world.start()
    first = Reader(world.jobs, job)
    for _ in range(5):
        world.node.write(job.id, out(b"x" * 65000))
        first.acknowledge()
    world.node.write(job.id, out(b"left"))
    second = Reader(world.jobs, job)
    assert (first.holds, second.holds) == (False, True)
    assert second.frames() == [(STDOUT, b"left")]


def test_a_slow_holder_of_a_kept_job_pauses_its_node(world):
    job = world.start(kept=True)
    Reader(world.jobs, job, reads=False)
    for _ in range(60):
        world.node.write(job.id, out(b"x" * 60000))
    assert world.node.acked[job.id] == 0
    assert world.node.sent[job.id] <= LOG_WINDOW + 66_000


def test_output_from_inside_a_frame_is_never_taken_for_frames(world):
    """A command prints what looks like an ending, at the right place."""
    job = world.start()
    reader = Reader(world.jobs, job, reads=False)
    evil = end(exitCode=0)
    data = b"A" * (65531 - 5 - len(evil)) + evil
    world.node.write(job.id, out(data))
    inside = 5 + len(data) - len(evil)
    assert job.log.boundary(inside) == len(data) + 5
    world.node.drop()
    world.restart_gateway()
    again = Reader(world.jobs, world.jobs.get(job.id), job.log.boundary(inside))
    world.node.come()
    world.node.write(job.id, out(b"B"))
    assert again.frames() == [(STDOUT, b"B")]
    assert (world.row(job).state, again.endings) == ("running", [])
    assert reader.got == b""


def test_what_a_power_loss_took_of_a_file_is_a_gap(world):
    job = world.start(kept=True)
    for _ in range(20):
        world.node.write(job.id, out(b"x" * 60000))
    acked = world.node.acked[job.id]
    assert acked > 300_025
    world.node.drop()
    path = world.directory / "jobs" / job.id / "0"
    os.truncate(path, 300_030)
    for later in path.parent.iterdir():
        if later != path:
            later.unlink()
    world.restart_gateway()
    offsets = world.node.come()
    assert offsets == {job.id: acked}
    world.node.write(job.id, out(b"tail"), end(exitCode=0))
    log = world.jobs.get(job.id).log
    assert world.row(job).state == "done"
    start = log.read(300_025)[0]
    assert start == acked  # a gap
    assert text_of(world.jobs.get(job.id)).endswith("tail")


def test_half_a_frame_at_the_end_of_a_file_is_cut_off(world):
    job = world.start(kept=True)
    world.node.write(job.id, *[out(b"x" * 60000)] * 2)
    world.node.drop()
    path = world.directory / "jobs" / job.id / "0"
    os.truncate(path, 100_000)
    world.restart_gateway()
    assert world.jobs.get(job.id).log.end == 60_005


def test_zeros_that_a_power_failure_left_at_the_end_of_a_file_are_cut_off(world):
    """They look like endings without a text."""
    job = world.start(kept=True)
    world.node.write(job.id, *[out(b"x" * 60000)] * 2)
    world.node.drop()
    with (world.directory / "jobs" / job.id / "0").open("ab") as file:
        file.write(bytes(4096))
    world.restart_gateway()
    assert world.jobs.get(job.id).log.end == 2 * 60_005


def test_a_gateway_starts_with_an_empty_directory_of_a_job(world):
    job = world.start(kept=True)
    (world.directory / "jobs" / job.id).mkdir(parents=True)
    world.restart_gateway()
    assert world.jobs.get(job.id).log.end == 0


@pytest.mark.parametrize("count", [1, 3])
def test_an_ending_that_was_stored_and_not_acknowledged_is_settled_later(world, count):
    """`count` frames of 60,000 bytes: the log is in the row's files."""
    job = world.start(kept=True)
    for _ in range(count):
        world.node.write(job.id, out(b"x" * 60000))
    acknowledge = world.node.acknowledge

    def cut(*_args):
        raise moltis.ConnectionClosed(1006)

    world.node.acknowledge = cut
    world.node.write(job.id, end(exitCode=0))
    world.node.drop()
    world.node.acknowledge = acknowledge
    world.restart_gateway()
    world.node.come()
    assert world.row(job).state == "done"
    assert world.node.settled == [job.id]
    assert world.node.runs == [job.id]


class Interrupted:
    """A job's lock; another thread is faster by one step before it is first taken."""

    def __init__(self, lock, step):
        self._lock, self._step = lock, step

    def __enter__(self):
        step, self._step = self._step, None
        if step is not None:
            step()
        return self._lock.__enter__()

    def __exit__(self, *error):
        return self._lock.__exit__(*error)


class Killed(BaseException):
    """The gateway's end, at a place of the test's choice."""


@pytest.mark.parametrize("output", [b"", b"x" * 60000], ids=["short", "in files"])
def test_an_ending_whose_row_a_kill_prevented_is_sent_again(world, monkeypatch, output):
    job = world.start(kept=True)
    world.node.write(job.id, out(output), out(output))
    job.log.created -= 2
    world.jobs.tick()  # the log moves to files

    def killed(record, _data=None):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(world.store.jobs, "save", killed)
        world.node.write(job.id, end(exitCode=7))
    world.node.drop()
    world.restart_gateway()
    world.node.come()
    assert (world.row(job).state, world.row(job).exit_code) == ("done", 7)
    assert text_of(world.jobs.get(job.id)) == 2 * output.decode()
    assert world.node.settled == [job.id]


def test_an_ending_is_not_acknowledged_before_its_row_is_written(world, monkeypatch):
    job = world.start(kept=True)
    data = out(b"x" * 60000) * 6 + end(exitCode=0)
    world.node.logs[job.id], world.node.sent[job.id] = data, len(data)
    job.lock = Interrupted(job.lock, lambda: world.jobs.acknowledge(job))

    def killed(record, _data=None):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(world.store.jobs, "save", killed)
        world.jobs.on_log(world.node, job.id, 0, data)
    assert world.node.settled == []
    world.restart_gateway()
    world.node.come()
    assert world.row(job).state == "done"


def test_a_cancel_that_crosses_the_end_does_not_change_it(world):
    job = world.start(kept=True)
    cancel = world.node.cancel

    def crossed(job_id):
        cancel(job_id)
        world.node.write(job_id, end(exitCode=0))

    world.node.cancel = crossed
    world.jobs.cancel(job)
    assert world.row(job).state == "done"
    assert world.node.settled == [job.id]


def test_a_node_that_comes_back_just_as_its_job_is_given_up_corrects_it(world):
    job = world.start(kept=True, spec={"timeout": 1000})
    world.node.drop()
    job.away_since -= 100
    world.jobs.tick()
    assert world.row(job).state == "lost"
    world.node.come()
    world.node.write(job.id, out(b"out"), end(exitCode=0))
    assert world.row(job).state == "done"
    assert text_of(world.jobs.get(job.id)) == "out"
    assert world.node.settled == [job.id]


def test_who_follows_a_lost_job_hears_that_it_is_not(world):
    job = world.start(kept=True, spec={"timeout": 1000})
    reader = Reader(world.jobs, job, holds=False)
    world.node.drop()
    job.away_since -= 100
    world.jobs.tick()
    assert [ending.state for ending in reader.endings] == ["lost"]
    world.node.come()
    assert job.record.state == "running"
    world.node.write(job.id, out(b"out"), end(exitCode=0))
    assert reader.endings[-1].state == "done"
    assert reader.frames() == [(STDOUT, b"out")]
    assert world.node.settled == [job.id]


def test_an_id_whose_job_has_ended_is_known_though_its_node_is_away(world):
    job = world.start(kept=True)
    world.node.write(job.id, end(exitCode=7))
    world.node.drop()
    assert world.start(job_id=job.id).record.exit_code == 7


def test_a_settled_job_is_acknowledged_once(world):
    job = world.start(kept=True)
    told, acknowledge = [], world.node.acknowledge
    world.node.acknowledge = lambda *args: (told.append(args), acknowledge(*args))
    ended = world.jobs.ended(job, 60)
    world.node.write(job.id, out(b"x"), end())
    assert ended.done()
    assert len(told) == 1


def test_a_command_without_a_timeout_is_awaited_until_somebody_stops_it(world):
    job = world.start()
    world.node.drop()
    job.away_since -= 100_000
    world.jobs.tick()
    assert job.record.state == "running"
    world.jobs.cancel(job, "me")
    world.jobs.tick()
    assert job.record.state == "lost"


def test_a_full_disk_delays_the_row_and_not_its_caller(world, monkeypatch):
    job = world.start()
    reader = Reader(world.jobs, job)

    def full(*_args):
        raise moltis.StoreError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(world.store.jobs, "save", full)
        world.node.write(job.id, end(exitCode=3))
        assert [ending.exit_code for ending in reader.endings] == [3]
        reader.acknowledge()
        world.jobs.tick()
        assert job.id in world.node.logs
        assert world.row(job).state == "running"
    world.jobs.tick()
    assert world.row(job).exit_code == 3
    assert world.node.settled == [job.id]


def test_what_fills_the_disk_can_be_cancelled(world, monkeypatch):
    job = world.start()

    def full(*_args):
        raise moltis.StoreError("the disk is full")

    monkeypatch.setattr(world.store.jobs, "save", full)
    world.jobs.cancel(job)
    assert world.node.cancelled == [job.id]


def test_output_that_cannot_be_written_is_a_gap_and_the_command_goes_on(world):
    job = world.start(kept=True)
    for _ in range(2):
        world.node.write(job.id, out(b"a" * 65000))
    directory = world.directory / "jobs" / job.id
    path = directory / "0"
    path.rename(directory.parent / "away")
    directory.rmdir()
    directory.write_bytes(b"")  # no file can be made below it
    for _ in range(6):
        world.node.write(job.id, out(b"b" * 65000))
    assert world.node.acked[job.id] > 0
    directory.unlink()
    directory.mkdir()
    (directory.parent / "away").rename(path)
    world.node.write(job.id, out(b"c" * 10))
    world.node.write(job.id, end(exitCode=0))
    assert world.row(job).state == "done"
    text = text_of(world.jobs.get(job.id))
    assert text.startswith("aaa")
    assert text.endswith("cccccccccc")


def test_what_a_disk_takes_in_part_is_cut_to_whole_frames(world, monkeypatch):
    job = world.start(kept=True)
    world.node.write(job.id, *[out(b"a" * 65000)] * 2)
    with monkeypatch.context() as patched:
        write = os.write
        patched.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
        world.node.write(job.id, out(b"b" * 65000))
    path = world.directory / "jobs" / job.id / "0"
    assert path.stat().st_size == 2 * 65005


def test_a_full_disk_is_reported_once_until_it_has_room_again(
    world, monkeypatch, caplog
):
    """A command that prints without end would fill the disk of the log as well."""

    def full(*_args):
        raise OSError(errno.ENOSPC, "full")

    job = world.start(kept=True)
    world.node.write(job.id, *[out(b"a" * 65000)] * 2)
    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full)
            world.node.write(job.id, *[out(b"b" * 65000)] * 9)
        world.node.write(job.id, out(b"c" * 65000))
    assert caplog.text.count("output is lost") == 2


@pytest.mark.parametrize(
    "message",
    [
        FRAME_HEAD.pack(STDOUT, 2**31) + b"x",
        b"\1\0\0",
        frame(ENDING, b"{"),
        frame(ENDING, b"[]"),
        frame(ENDING, b"7"),
        end("lost"),
        end("expired"),
        end(duration=1e999),
        end(stdoutBytes=-1),
        end(exitCode=2**70),
        end() + out(b"more"),
        end() + end(),
        frame(9, b"of a kind that nobody knows"),
    ],
)
def test_what_is_no_log_is_refused_and_changes_nothing(world, message):
    job = world.start(kept=True)
    with pytest.raises(moltis.RpcError) as caught:
        world.jobs.on_log(world.node, job.id, 0, message)
    assert caught.value.code == "PROTOCOL_ERROR"
    assert world.row(job).state == "running"
    assert job.log.end == 0


def test_frames_behind_an_ending_are_refused(world):
    job = world.start()
    Reader(world.jobs, job, reads=False)
    world.node.write(job.id, end())
    with pytest.raises(moltis.RpcError, match="follow the ending"):
        world.jobs.on_log(world.node, job.id, job.log.end, out(b"more"))


def test_a_node_sends_no_more_than_a_window_ahead(world):
    job = world.start()
    Reader(world.jobs, job, reads=False)
    with pytest.raises(moltis.RpcError, match="window"):
        for number in range(40):
            world.jobs.on_log(world.node, job.id, number * 65005, out(b"x" * 65000))


def test_a_node_answers_for_its_own_jobs_only(world):
    job = world.start(kept=True)

    class Other(ScriptedNode):
        node_id = "other"

    other = Other()
    world.jobs.on_log(other, job.id, 0, end(exitCode=0))
    assert world.row(job).state == "running"
    assert world.jobs.resumed(other, {job.id: 0}) == {}


def test_a_job_cancelled_before_it_reached_its_node_never_runs(world):
    world.node.up = False
    job = world.start(queue=60)
    assert job.record.state == "queued"
    world.jobs.cancel(job, "me")
    world.node.come()
    assert (world.row(job).state, world.node.runs) == ("cancelled", [])
    assert world.row(job).words() == "cancelled by me"


def test_a_queued_job_is_sent_when_its_node_comes(world):
    world.node.up = False
    job = world.start(queue=60)
    world.node.come()
    assert (job.record.state, world.node.runs) == ("running", [job.id])
    assert world.row(job).sent_to == world.node.instance


def test_a_queued_job_survives_a_restart_and_expires_in_time(world):
    world.node.up = False
    job = world.start(queue=0.05)
    world.restart_gateway()
    time.sleep(0.06)
    world.jobs.tick()
    assert world.row(job).state == "expired"
    assert "did not come in time" in world.row(job).words()


def test_a_job_for_a_node_that_is_away_is_refused(world):
    world.node.up = False
    with pytest.raises(moltis.RpcError, match="offline"):
        world.start()


def test_a_cancel_overtakes_its_start_and_both_arrive(world):
    world.node.up = False
    job = world.start(queue=60)
    start = world.node.start

    def slow(*args):
        world.jobs.cancel(job)
        start(*args)

    world.node.start = slow
    world.node.come()
    assert world.node.cancelled == [job.id]


def test_a_job_that_was_sent_never_runs_in_another_life_of_its_node(world):
    """Not even if the ticker looks between its hello and its jobs."""
    job = world.start()
    world.node.drop()
    world.node.restart()
    world.node.up = True
    world.jobs.tick()
    assert world.node.runs == []
    world.node.come()
    assert (job.record.state, world.node.runs) == ("lost", [])


def test_a_node_that_cannot_resume_loses_its_jobs_when_it_leaves(world):
    world.node.resumes = False
    job = world.start()
    world.node.drop()
    assert world.row(job).state == "lost"


def test_a_revoked_node_loses_its_jobs(world):
    job = world.start()
    world.jobs.lose("n", "its token was revoked")
    assert world.row(job).words() == (
        "lost: its token was revoked; how far it got is not known"
    )


def test_the_way_a_kept_job_was_running_when_the_gateway_was_killed_is_in_files(world):
    job = world.start(kept=True)
    world.node.write(job.id, out(b"x" * 40_000))
    job.log.created -= 2
    world.jobs.tick()
    world.node.restart()
    world.restart_gateway()
    world.node.come()
    assert world.row(job).state == "lost"
    assert len(text_of(world.jobs.get(job.id))) == 40_000


def test_the_view_of_a_running_job_counts_what_it_has_written_so_far(world):
    def written():
        view = moltis.job_view(world.jobs.get(job.id))
        return view["stdoutBytes"], view["stderrBytes"]

    job = world.start(kept=True)
    assert written() == (0, 0)
    mark = frame(moltis.MARK, b'{"ms":1,"rows":24,"cols":80}')
    world.node.write(job.id, mark, out(b"abc"), frame(STDERR, b"no"), out(b"d"))
    assert written() == (4, 2)
    world.node.drop()
    world.node.come()  # and sends all of it again: it was not acknowledged
    assert written() == (4, 2)
    job.log.flush()
    world.restart_gateway()
    assert written() == (4, 2)
    world.node.come()
    world.node.write(job.id, out(b"e" * 100_000))
    assert written() == (100_004, 2)
    world.node.write(job.id, end(stdoutBytes=100_004, stderrBytes=2))
    assert written() == (100_004, 2)


def test_a_job_is_not_sent_before_its_row_is_written(world, monkeypatch):
    def full(_record):
        world.jobs.tick()
        raise moltis.StoreError("the disk is full")

    monkeypatch.setattr(world.store.jobs, "add", full)
    with pytest.raises(moltis.StoreError):
        world.start()
    assert world.node.runs == []


def test_a_job_whose_row_was_just_written_is_found_by_its_id(world, monkeypatch):
    add, written, go_on = world.store.jobs.add, threading.Event(), threading.Event()

    def slow(record):
        record = add(record)
        written.set()
        assert go_on.wait(60)
        return record

    monkeypatch.setattr(world.store.jobs, "add", slow)
    job_id, found = moltis.new_id(), []
    starts = [
        threading.Thread(target=lambda: found.append(world.start(job_id=job_id)))
        for _ in range(2)
    ]
    starts[0].start()
    assert written.wait(60)
    starts[1].start()
    get = threading.Thread(target=lambda: found.append(world.jobs.get(job_id)))
    get.start()
    time.sleep(0.05)  # both wait for the first
    go_on.set()
    for thread in (*starts, get):
        thread.join()
    assert found[0] is found[1] is found[2]
    assert world.node.runs == [job_id]


def test_a_node_that_is_just_coming_back_is_not_given_up(world):
    job = world.start(kept=True, spec={"timeout": 1000})
    world.node.drop()
    job.away_since -= 100
    held = {job.id: 0}
    world.jobs.resumed(world.node, held)
    world.jobs.tick()
    world.node.up = True
    world.jobs.came(world.node, held)
    assert job.record.state == "running"
    world.node.write(job.id, out(b"x"), end(exitCode=0))
    assert world.row(job).state == "done"


def test_a_queued_job_that_is_just_sent_does_not_expire(world):
    world.node.up = False
    job = world.start(queue=0.01)
    time.sleep(0.02)
    job.lock = Interrupted(job.lock, world.node.come)
    world.jobs.tick()
    assert world.row(job).state == "running"
    assert world.node.runs == [job.id]


def test_a_job_is_not_sent_over_a_connection_that_is_just_lost(world):
    world.node.up = False
    job = world.start(queue=60)
    world.node.up = True
    job.lock = Interrupted(job.lock, world.node.drop)
    world.jobs._send(job)
    assert (job.record.state, job.away_ms is None) == ("queued", False)


def test_a_job_is_not_sent_again_while_its_connection_is_cleared_away(world):
    job = world.start()
    world.node.ready = False
    world.jobs.left(world.node)
    world.jobs.tick()
    assert job.away_ms is not None


def test_the_echo_of_keys_is_in_memory_before_it_is_in_a_file(tmp_path):
    """Nothing that is in no file is acknowledged; after a second it is in one."""
    directory = str(tmp_path / "log")
    job_log = moltis.Log(directory)
    job_log.append(0, out(b"first"))
    job_log.flush()
    begun, writes = job_log.end, []
    write = job_log._write
    job_log._write = lambda *piece: writes.append(piece) or write(*piece)
    for _ in range(1000):
        before = job_log.end
        job_log.append(before, out(b"k"))
        assert job_log.read(before) == (before, out(b"k"))
    assert not writes
    assert job_log.durable == begun
    job_log.flush()
    assert len(writes) == 1
    assert job_log.durable == job_log.end
    whole = out(b"first") + 1000 * out(b"k")
    assert moltis.Log.load(directory, ended=False).read(0) == (0, whole)
    # A gap, and much at once.
    job_log.append(job_log.end, out(b"before"))
    job_log.skip_to(20_000)
    job_log.append(20_000, out(bytes(20_000)))
    loaded = moltis.Log.load(directory, ended=False)
    assert loaded.read(0) == (0, whole + out(b"before"))
    assert loaded.read(len(whole) + 11) == (20_000, out(bytes(20_000)))


def test_the_log_of_a_lost_job_goes_on_when_it_comes_back(world):
    job = world.start(kept=True, spec={"timeout": 1000})
    reader = Reader(world.jobs, job, holds=False)
    world.node.write(job.id, out(b"one"))
    job.log.created -= 2
    world.jobs.tick()
    world.node.drop()
    job.away_since -= 100
    world.jobs.tick()
    assert world.row(job).state == "lost"
    world.node.come()
    job.log._memory.clear()  # what is in no file is lost in a crash
    world.node.write(job.id, out(b"two"))
    world.jobs.tick()
    job.log._memory.clear()
    world.node.write(job.id, end(exitCode=0))
    assert text_of(world.jobs.get(job.id)) == "onetwo"
    assert reader.frames() == [(STDOUT, b"one"), (STDOUT, b"two")]


def test_a_short_log_in_files_is_read_on_when_it_is_in_its_row(world):
    job = world.start(kept=True)
    world.node.write(job.id, out(b"one"))
    job.log.created -= 2
    world.jobs.tick()
    world.node.drop()
    world.restart_gateway()
    job = world.jobs.get(job.id)
    world.node.come()
    world.node.write(job.id, out(b"two"), end())
    assert text_of(job) == "onetwo"


def test_who_comes_to_a_lost_job_later_hears_that_it_is_not(world):
    job = world.start(kept=True, spec={"timeout": 1000})
    world.node.drop()
    job.away_since -= 100
    world.jobs.tick()
    job = world.jobs.get(job.id)
    reader = Reader(world.jobs, job, holds=False)
    world.node.come()
    world.node.write(job.id, out(b"out"), end(exitCode=0))
    assert reader.endings[-1].state == "done"
    assert reader.frames() == [(STDOUT, b"out")]


def test_a_lost_job_is_forgotten_with_its_last_follower(world):
    job = world.start(kept=True)
    reader = Reader(world.jobs, job, holds=False)
    world.jobs.lose("n", "its token was revoked")
    assert world.jobs.get(job.id) is job
    world.jobs.unfollow(job, reader, leaves=False)
    assert world.jobs.get(job.id) is not job


def test_output_is_taken_while_the_row_of_a_cancelled_job_waits_for_room(
    world, monkeypatch
):
    job = world.start(kept=True)

    def full(*_args):
        raise moltis.StoreError("the disk is full")

    monkeypatch.setattr(world.store.jobs, "save", full)
    world.jobs.cancel(job)
    for _ in range(10):
        world.node.write(job.id, out(b"x" * 60000))
    assert world.node.acked[job.id] > 0


def test_only_what_is_written_to_a_file_is_durable(world, monkeypatch):
    job = world.start(kept=True)
    append, seen = moltis.Segment.append, []

    def write(segment, data):
        seen.append(job.log.durable <= segment.end)
        append(segment, data)

    monkeypatch.setattr(moltis.Segment, "append", write)
    for _ in range(4):
        world.node.write(job.id, out(b"x" * 60000))
    assert seen == [True] * 4


def test_news_of_a_job_are_output_a_change_of_state_and_the_end(world):
    job = world.start(kept=True)
    output = world.jobs.news(job, 0, 60)
    away = world.jobs.news(job, 100, 60)
    ended = world.jobs.ended(job, 60)
    world.node.write(job.id, out(b"x"))
    assert (output.done(), away.done(), ended.done()) == (True, False, False)
    world.node.drop()
    assert (away.done(), ended.done()) == (True, False)
    world.node.come()
    world.node.write(job.id, end())
    assert ended.done()


def test_an_answer_that_waits_comes_in_time_and_when_the_gateway_stops(world):
    job = world.start()
    timely = world.jobs.ended(job, 0.01)
    time.sleep(0.02)
    world.jobs.tick()
    assert timely.result(0) is job
    stopped = world.jobs.ended(job, None)
    world.jobs.close()
    with pytest.raises(moltis.RpcError, match="the command goes on"):
        stopped.result(0)


@pytest.mark.parametrize("acknowledged", [False, True])
def test_who_waits_for_a_job_that_just_ended_comes_after_its_chat(world, acknowledged):
    """Else the next command of that chat starts where the one before did."""
    job = world.start(kept=True)
    keeps, goes_on, found = threading.Event(), threading.Event(), []

    def keep(_job):
        keeps.set()
        goes_on.wait(60)

    world.jobs.on_end = keep
    ending = threading.Thread(target=world.node.write, args=(job.id, end(exitCode=0)))
    ending.start()
    assert keeps.wait(60)

    def wait():
        if acknowledged:  # as the ticker does: then its row is all that there is
            world.jobs.acknowledge(job)
        known = world.jobs.get(job.id)
        found.append(world.jobs.wait(known, 60, moltis.Cancellation()).id)

    waiting = threading.Thread(target=wait)
    waiting.start()
    waiting.join(0.2)  # it has to wait for us
    assert found == []
    goes_on.set()
    ending.join()
    waiting.join()
    assert found == [job.id]


def test_nobody_hears_of_an_end_before_its_chat_has(world):
    """Not from a thread, either, that looked whether it had ended just before."""
    job = world.start(kept=True)
    keeps, goes_on = threading.Event(), threading.Event()

    def keep(_job):
        keeps.set()
        goes_on.wait(60)

    world.jobs.on_end = keep
    waits = [world.jobs.ended(job, 60), world.jobs.news(job, 100, 60)]
    client = moltis.ClientFollower(job, None, 0, lambda _client: None, holds=False)

    def states():
        said = [m for m in iter(client._next, None) if isinstance(m, str)]
        return [json.loads(message)["payload"]["state"] for message in said]

    ending = threading.Thread(target=world.node.write, args=(job.id, end(exitCode=0)))
    ending.start()
    assert keeps.wait(60)
    for wait in [*world.jobs._waits.values()]:
        wait.wake(job)
    assert (states(), [wait.done() for wait in waits]) == ([], [False, False])
    goes_on.set()
    ending.join()
    assert (states(), [wait.done() for wait in waits]) == (["done"], [True, True])


def test_a_client_is_sent_the_state_of_one_moment(world, monkeypatch):
    """`node exec` took "running" for how its command had ended, and was 1."""
    job, view = world.start(kept=True), moltis.job_view

    def ends_meanwhile(*arguments):
        found = view(*arguments)
        monkeypatch.undo()
        world.node.write(job.id, end(exitCode=7))
        return found

    monkeypatch.setattr(moltis, "job_view", ends_meanwhile)
    client = moltis.ClientFollower(job, None, 0, lambda _client: None, holds=False)
    said = [m for m in iter(client._next, None) if isinstance(m, str)]
    first, second = (json.loads(message)["payload"] for message in said)
    assert (first["state"], "ending" in first) == ("running", False)
    assert (second["state"], second["ending"]["exitCode"]) == ("done", 7)


def test_a_job_that_was_waited_for_is_no_garbage_cycle(world):
    """Each command would otherwise leave some forty objects to the collector."""
    job = world.start(kept=True)
    ended = world.jobs.ended(job, 60)
    world.node.write(job.id, end())
    assert ended.result(0) is job
    known = weakref.ref(job)
    gc.disable()
    try:
        del job, ended
        assert known() is None
    finally:
        gc.enable()


def test_the_oldest_logs_go_when_all_are_too_large(world):
    ids = []
    for _ in range(4):
        job = world.start(kept=True)
        world.node.write(job.id, out(b"x" * 60_000), out(b"y" * 60_000), end())
        ids.append(job.id)
    world.jobs = moltis.Jobs(
        world.store.jobs,
        OneNodeFleet(world.node),
        world.directory / "jobs",
        keep_output=250_000,
    )
    world.jobs.tick()
    kept = {path.name for path in (world.directory / "jobs").iterdir()}
    assert kept == set(ids[2:])


def test_a_file_in_place_of_the_directory_of_logs_does_not_end_a_tick(world):
    (world.directory / "jobs").rmdir()
    (world.directory / "jobs").write_text("")
    job = world.start(kept=True)
    world.node.write(job.id, out(b"x" * 100_000))
    world.jobs._unswept = world.jobs._keep_output  # look at the size of all logs
    world.jobs.tick()
    assert text_of(job).startswith("xxx")


def test_many_threads_follow_and_leave_while_a_node_writes(world):
    job = world.start(kept=True)
    holder = Reader(world.jobs, job)
    errors = []

    def come_and_go():
        try:
            for _ in range(50):
                reader = Reader(world.jobs, job, holds=False)
                world.jobs.unfollow(job, reader, leaves=False)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(200):
        world.node.write(job.id, out(b"%03d" % number))
        if number % 50 == 0:
            holder.acknowledge()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [int(d) for _, d in holder.frames()] == list(range(200))


def test_five_thousand_nodes_come_back_in_seconds(world):
    links = []
    for number in range(500):
        link = ScriptedNode()
        link.node_id = f"n{number}"
        links.append(link)
        row = moltis.new_job(
            (link.node_id, link.node_id), "run", {"command": "x"}, ME, kept=True
        )
        world.jobs._fleet.node = link
        link.job_id = world.jobs.start(row).id
    begin = time.process_time()
    for link in links:
        world.jobs.resumed(link, {link.job_id: 0})
        world.jobs.came(link, {link.job_id: 0})
    assert (time.process_time() - begin) / 500 < 0.002
    assert all(world.jobs.get(link.job_id).away_ms is None for link in links)


# -- behind a WebSocket --------------------------------------------------------


class ManualOutlet:
    """The source that a follower wakes, read as a slow connection would."""

    def wake(self, source, _urgency):
        self.next = source


@pytest.mark.parametrize("newest", [None, 200_000])
def test_a_watcher_that_falls_behind_skips_to_the_newest_output(world, newest):
    """Only if it asked for that: who saves output wants all of it."""
    job = world.start(kept=True)
    outlet, done = ManualOutlet(), []
    follower = moltis.ClientFollower(
        job, outlet, 0, done.append, holds=False, newest=newest
    )
    world.jobs.follow(job, follower)
    follower.open()
    for n in range(100):
        world.node.write(job.id, out(b"%05d" % n + b"x" * 60_000))
    world.node.write(job.id, end(exitCode=0))
    read, messages = 0, []
    while not done:
        message = outlet.next()
        messages.append(message)
        read += len(message) if isinstance(message, bytes) else 0
    texts = [m for m in messages if isinstance(m, bytes)]
    offsets = [moltis.decode_job_data(text)[2] for text in texts]
    assert json.loads(messages[-1])["payload"]["ending"]["exitCode"] == 0
    assert b"00099" in b"".join(texts)
    if newest is None:
        assert read > 6_000_000
    else:
        assert read < 300_000
        assert job.log.end - newest <= offsets[0]


# --- Input ---


def test_what_is_typed_ahead_does_not_overtake_the_start(world):
    """It would be lost: the node does not know the job yet."""
    node, told = world.node, []
    start = node.start
    typing = threading.Thread(
        target=lambda: world.jobs.input(world.jobs.get(job_id), reader, 0, b"ls\r")
    )

    def slow_start(*args):
        typing.start()
        typing.join(0.2)  # it has to wait for us
        start(*args)
        told.append("start")

    node.start = slow_start
    node.input = lambda *_args: told.append("input")
    node.up = False
    job = world.start(work=moltis.TERMINAL, queue=60)
    job_id = job.id
    reader = Reader(world.jobs, job)
    node.come()
    typing.join()
    # Either it follows the start, or the client is asked for it again.
    assert told in (["start"], ["start", "input"])
    assert job.input_resumes == 1


def test_an_earlier_connection_has_no_say_in_input(world):
    """Its last message may be read after the next one has come."""
    job = world.start()
    world.jobs.on_input(world.node, job.id, 5, resume=True)
    earlier = ScriptedNode()
    world.jobs.on_input(earlier, job.id, 0, resume=True)
    assert (job.input_at, job.input_end) == (5, 5)


def test_a_job_that_its_node_resumes_is_not_sent_to_it_again(world):
    """The ticker looks after it is connected, and before came()."""
    job = world.start(kept=True)
    world.jobs.on_input(world.node, job.id, 500, resume=True)
    world.node.drop()
    world.node.up = True
    held = {job.id: 0}
    world.jobs.resumed(world.node, held)
    world.jobs.tick()
    assert (job.sent_over, job.input_end, job.input_resumes) == (None, 500, 2)
    world.jobs.came(world.node, held)
    assert (job.sent_over, job.input_end, job.input_resumes) == (world.node, 500, 2)


def test_sizes_of_a_terminal_reach_its_node_in_their_order(world, monkeypatch):
    """A redraw sends the size that it finds, while a person chooses another."""
    sizes = []
    world.node.resize = lambda _job_id, size: sizes.append((size.rows, size.cols))
    job = world.start(kept=True, work=moltis.TERMINAL)
    world.jobs.resize(job, moltis.TerminalSize(24, 80), None)
    found, goes_on = threading.Event(), threading.Event()
    current_size = moltis.Job.current_size

    def slow(job):
        size = current_size(job)
        found.set()
        goes_on.wait(60)
        return size

    monkeypatch.setattr(moltis.Job, "current_size", slow)
    redraws = threading.Thread(target=world.jobs.redraw, args=(job,))
    larger = moltis.TerminalSize(50, 200)
    resizes = threading.Thread(target=world.jobs.resize, args=(job, larger, None))
    redraws.start()
    found.wait(60)
    resizes.start()
    resizes.join(0.2)  # it has to wait for the redraw
    goes_on.set()
    redraws.join()
    resizes.join()
    assert sizes == [(24, 80), (24, 80), (50, 200)]


@pytest.mark.parametrize("known", [True, False], ids=["it has it", "it never came"])
def test_a_size_that_is_chosen_while_the_node_is_away_reaches_it(world, known):
    sizes = []
    world.node.resize = lambda _job_id, size: sizes.append((size.rows, size.cols))
    job = world.start(kept=True, work=moltis.TERMINAL)
    world.node.drop()
    if not known:  # lost with the connection
        world.node.known.clear()
        world.node.logs.clear()
    world.jobs.resize(job, moltis.TerminalSize(50, 200), None)
    assert sizes == []
    world.node.come()
    assert sizes == [(50, 200)]


def test_keys_on_a_link_that_breaks_arrive_though_another_person_types_by_then(world):
    """The gateway has them: whoever typed them was told that they were forwarded."""
    received = []

    def take(_job_id, offset, data):
        world.node._check_up()
        received.append((offset, bytes(data)))

    world.node.input = take
    job = world.start(kept=True, work=moltis.TERMINAL)
    first = Reader(world.jobs, job)
    world.jobs.input(job, first, 0, b"abc")
    world.jobs.input(job, first, 3, b"def")
    world.jobs.on_input(world.node, job.id, 2, resume=False)
    world.node.drop()  # it has received no more than it consumed
    second = Reader(world.jobs, job)
    assert first.lost_at == job.input_end == 6
    world.jobs.input(job, second, 6, b"ghi")
    del received[:]
    world.node.come()
    world.jobs.on_input(world.node, job.id, 2, resume=True)
    assert received == [(2, b"cdefghi")]
    assert job.input_end == 9


def test_a_terminal_has_no_end_of_input(world):
    """It would end it for everyone, for good: people type Ctrl+D."""
    received = []
    world.node.input = lambda _job_id, offset, data: received.append((offset, data))
    job = world.start(kept=True, work=moltis.TERMINAL)
    reader = Reader(world.jobs, job)
    world.jobs.input(job, reader, 0, b"")
    world.jobs.input(job, reader, 0, b"ls\r")
    assert received == [(0, b"ls\r")]


def test_a_terminal_takes_input_again_once_what_was_too_much_for_its_node_is_read(
    world, monkeypatch
):
    """Its node would refuse more: all that follows would be after a gap."""
    monkeypatch.setattr(moltis, "TERMINAL_INPUT", 10)
    received = []
    world.node.input = lambda _job_id, offset, data: received.append((offset, data))
    job = world.start(kept=True, work=moltis.TERMINAL)
    reader = Reader(world.jobs, job)
    resumes = job.input_resumes
    world.jobs.input(job, reader, 0, b"12345678")
    world.jobs.input(job, reader, 8, b"abcd")
    world.jobs.input(job, reader, 12, b"ef")
    assert received == [(0, b"12345678")]
    world.jobs.on_input(world.node, job.id, 8, resume=False)
    assert (job.input_end, job.input_resumes) == (8, resumes + 1)  # asks for the rest
    world.jobs.input(job, reader, 8, b"abcdef")
    assert received[1:] == [(8, b"abcdef")]


@pytest.mark.parametrize("is_known", [True, False], ids=["sent", "restarted"])
def test_a_node_that_claims_more_input_than_it_was_sent_stops_nobody(world, is_known):
    """The gateway would hang up on whoever types at such an offset."""
    job = world.start(kept=True, work=moltis.TERMINAL)
    reader = Reader(world.jobs, job)
    if is_known:
        world.jobs.input(job, reader, 0, b"abc")
    else:
        job.input_end = None
    world.jobs.on_input(world.node, job.id, moltis.MAX_OFFSET - 1, resume=True)
    typed = moltis.encode_job_data(moltis.INPUT_DATA, job.id, job.input_end, b"x" * 100)
    assert moltis.decode_job_data(typed)
    assert job.input_end == (3 if is_known else moltis.MAX_OFFSET // 2)


def test_the_size_of_a_terminal_is_read_from_its_last_mark_alone(world, monkeypatch):
    """There may be thousands, and whoever types waits meanwhile."""
    job = world.start(kept=True, work=moltis.TERMINAL)
    for rows in range(1, 100):
        mark = moltis.to_json(moltis.Mark(rows, rows, 80)).encode()
        world.node.write(job.id, frame(moltis.MARK, mark), out(b"x"))
    world.node.write(job.id, frame(moltis.MARK, b"malformed"))
    decoded, decode = [], moltis.decode_mark
    monkeypatch.setattr(
        moltis, "decode_mark", lambda data: decoded.append(data) or decode(data)
    )
    assert job.current_size() == moltis.TerminalSize(99, 80)
    assert len(decoded) == 2
