"""The machines of a gateway, their invocations and their fate."""

from __future__ import annotations

import threading
import uuid
from functools import partial

import pytest
from support import wait_for

import moltis


class Link:
    """A NodeLink that writes down what it is asked for."""

    def __init__(self):
        self.requests = []
        self.acknowledged = []
        self.cancelled = []
        self.rewound = []
        self.stdin = []
        self.hung_up = []
        self.broken = False

    def _check(self):
        if self.broken:
            raise moltis.ConnectionClosed(1006)

    def request(self, invoke_id, command, args):
        self._check()
        self.requests.append((invoke_id, command, args))

    def acknowledge(self, invoke_id, stream, offset):
        self._check()
        self.acknowledged.append((stream, offset))

    def cancel(self, invoke_id):
        self._check()
        self.cancelled.append(invoke_id)

    def rewind(self, invoke_id, stdout, stderr):
        self._check()
        self.rewound.append((invoke_id, stdout, stderr))

    def write_stdin(self, chunk):
        self._check()
        self.stdin.append(chunk)

    def hang_up(self, reason):
        self.hung_up.append(reason)


class Sink:
    """Keeps all that it hears, and deals with output at once unless it is slow."""

    def __init__(self, slow=False):
        self.data = {1: b"", 2: b""}
        self.states = []
        self.ends = []
        self._slow = slow

    def chunk(self, chunk):
        self.data[chunk.kind] += chunk.data
        return 0 if self._slow else chunk.end

    def stdin_received(self, invoke_id, offset):
        self.states.append(("stdin", offset))

    def state(self, invoke_id, state, detail):
        self.states.append((state, detail))

    def end(self, invocation, end):
        self.ends.append(end)
        return False


RESUMING = (moltis.CAP_STREAM, moltis.CAP_CANCEL, moltis.CAP_RESUME)
ORIGIN = moltis.Origin("operator", "test")


class World:
    """A fleet over a real store, with nodes whose links are Links."""

    def __init__(self, directory):
        self.store = moltis.Store(directory / "moltis.db")
        self.access = moltis.Access(self.store)
        self.told = []
        params = moltis.ConnectParams(role="node", capabilities=RESUMING)
        self.local_link = Link()
        local = moltis.ConnectedNode("local", "", self.local_link, params)
        self.fleet = moltis.Fleet(
            self.store.devices, local, lambda name, payload: self.told.append(payload)
        )
        local.ready = True
        self.devices = {}
        self.begin()

    def begin(self, *, files=True):
        """Begin a life of the gateway; what it asked for in another is in the store.

        Without `files` it was followed by its caller alone: no job, no card.
        """
        self.invocations = moltis.Invocations(self.fleet, self.store.commands)
        self.patience = moltis.Patience(self.invocations)
        self.sinks = []  # of what was asked for before

        def find_sink(record):
            self.sinks.append(Sink())
            return self.sinks[-1], 0, 0

        find = [find_sink] if files else []
        self.resumption = moltis.Resumption(
            self.fleet, self.invocations, self.store.commands, *find
        )

    def connect(self, name, *, capabilities=RESUMING, instance="life-1", **params):
        """Bring a node in, as the gateway does."""
        if name not in self.devices:
            self.devices[name], _ = self.access.create_device(name)
        device = self.store.devices.by_id(self.devices[name].id, moltis.now_ms())
        asked = moltis.ConnectParams(
            role="node",
            client_id=f"id-{name}",
            instance=instance,
            capabilities=capabilities,
            **params,
        )
        node = moltis.ConnectedNode(asked.client_id, device.id, Link(), asked)
        self.fleet.claim(node, device)
        self.store.devices.connect(
            device.id,
            node_id=node.node_id,
            address="127.0.0.1",
            now=moltis.now_ms(),
            display_name=name,
            platform="linux",
            version="1",
            capabilities=capabilities,
            commands=("system.run",),
        )
        self.resumption.resumable(node)
        self.fleet.activate(node)
        self.resumption.resume(node)
        return node

    def leave(self, node):
        self.resumption.node_left(node)
        self.fleet.release(node)

    def start(self, name, sink=None, invoke_id=None, **args):
        args = {"command": "true", **args}
        return self.invocations.start(
            name, "system.run", args, ORIGIN, sink or Sink(), invoke_id
        )

    def claim_far(self):
        """Return the node as it comes, before its hello; one that cannot resume."""
        device = self.store.devices.by_id(self.devices["far"].id, moltis.now_ms())
        params = moltis.ConnectParams(role="node", client_id="id-far")
        node = moltis.ConnectedNode("id-far", device.id, Link(), params)
        self.fleet.claim(node, device)
        return node

    def finish(self, node, invocation, result=None):
        """Let the node report; return what it was told."""
        accepted = []
        self.invocations.handle_result(
            node.node_id,
            invocation.id,
            {"exitCode": 0} if result is None else result,
            lambda: accepted.append(True),
        )
        self.store.commands.keep_ended()  # which happens by itself a little later
        return accepted

    def state(self, invocation):
        return self.store.commands.by_id(invocation.id).state


def meanwhile(monkeypatch, owner, name, act, *, after):
    """Let another thread do something just before or after a call of a method."""
    real = getattr(owner, name)

    def call(*args, **params):
        monkeypatch.setattr(owner, name, real)  # once
        if not after:
            act()
        result = real(*args, **params)
        if after:
            act()
        return result

    monkeypatch.setattr(owner, name, call)


def come_back(world, node, connected):
    """Let a node come over another connection, while the old one breaks."""
    node.link.broken = True
    world.leave(node)
    connected.append(world.connect("far"))


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.store.close()


@pytest.fixture
def node(world):
    return world.connect("far")


# -- names ---------------------------------------------------------------------


def test_an_exact_id_wins_over_a_name(world):
    world.connect("one")
    world.connect("id-one")
    assert world.fleet.resolve("id-one") == ("id-one", "one")
    assert world.fleet.resolve("ID-ONE")[1] == "id-one"


def test_nothing_falls_back_to_local(world, node):
    """An offline node is an error, and Local runs nothing instead."""
    world.leave(node)
    with pytest.raises(moltis.RpcError, match="far is offline since"):
        world.start("far")
    with pytest.raises(moltis.RpcError, match="there is no node 'other'"):
        world.start("other")
    assert world.local_link.requests == []


def test_a_name_is_trimmed_and_printable():
    assert moltis.valid_name("  attic \t pi ") == "attic pi"
    for text in ("", " ", "a\0b", "x" * 201, "a\u202eb"):
        with pytest.raises(moltis.RpcError):
            moltis.valid_name(text)


# -- connections ---------------------------------------------------------------


def test_the_old_connection_ends_before_the_new_one_begins(world, node):
    """Chunks of one node stay in order, and the newer connection stays."""
    newer = []
    thread = threading.Thread(target=lambda: newer.append(world.connect("far")))
    thread.start()
    wait_for(lambda: node.link.hung_up, what="the hang-up")
    assert not newer
    world.leave(node)
    thread.join()
    assert world.fleet.connected("id-far") is newer[0]


def test_an_old_connection_that_does_not_end_is_not_in_the_way_for_good(
    world, node, monkeypatch
):
    monkeypatch.setattr(moltis, "REPLACE_TIMEOUT", 0.05)
    with pytest.raises(moltis.RpcError, match="still closing"):
        world.connect("far")
    world.leave(node)
    assert world.connect("far").ready


def test_presence_is_told_when_a_node_comes_and_goes(world, node):
    world.leave(node)
    kinds = [told["type"] for told in world.told if told.get("nodeId") == "id-far"]
    assert kinds == ["node.connected", "node.disconnected"]


@pytest.mark.parametrize("node_id", ["", "local", "Local", "x" * 201, "a\x1b[2Jb"])
def test_an_id_that_is_none_is_refused(world, node_id):
    device, _ = world.access.create_device("odd")
    params = moltis.ConnectParams(role="node", client_id=node_id)
    node = moltis.ConnectedNode(node_id, device.id, Link(), params)
    with pytest.raises(moltis.RpcError, match="must have 1 to 200"):
        world.fleet.claim(node, device)


@pytest.mark.parametrize("node_id", ["Build Server", "build server"])
def test_no_node_takes_the_name_of_another_for_its_id(world, node_id):
    """An id wins over a name: what is meant for that machine would come to it."""
    world.connect("Build Server")
    device, _ = world.access.create_device("odd")
    params = moltis.ConnectParams(role="node", client_id=node_id)
    node = moltis.ConnectedNode(node_id, device.id, Link(), params)
    with pytest.raises(moltis.RpcError, match="another machine is called"):
        world.fleet.claim(node, device)
    assert world.fleet.resolve(node_id) == ("id-Build Server", "Build Server")


def test_a_token_that_nobody_came_with_in_time_keeps_no_id_from_others(world):
    expired, _ = world.access.create_device("Build Server")
    expire = "UPDATE devices SET expires_at = 1 WHERE id = ?"
    world.store.devices._db.write(expire, (expired.id,))
    device, _ = world.access.create_device("odd")
    params = moltis.ConnectParams(role="node", client_id="build server")
    node = moltis.ConnectedNode("build server", device.id, Link(), params)
    world.fleet.claim(node, device)
    assert world.fleet.connected("build server") is node


def test_no_machine_is_given_the_id_of_another_for_its_name(world, node):
    with pytest.raises(moltis.RpcError, match="id-FAR is the id of a node"):
        moltis.free_name(world.store.devices, "id-FAR")
    own = moltis.free_name(world.store.devices, "id-far", "id-far")
    assert own == "id-far"


# -- telemetry -----------------------------------------------------------------


def test_providers_that_were_asked_for_outlast_telemetry_that_names_none(world, node):
    """A Rust node's telemetry says nothing of models."""
    models = [{"provider": "ollama", "models": ["qwen3"]}]
    world.fleet.keep_providers(node, {"providers": models})
    world.fleet.report(node, {"nodeId": "id-far", "cpuCount": 4})
    view = world.fleet.view("id-far")
    assert view["providers"] == models
    assert view["telemetry"]["cpuCount"] == 4


def test_what_a_node_reports_goes_stale(world, node, monkeypatch):
    world.fleet.report(node, {"nodeId": "id-far", "cpuCount": 4})
    assert world.fleet.view("id-far")["telemetry"]["stale"] is False
    monkeypatch.setattr(moltis, "STALE_AFTER", -1.0)
    assert world.fleet.view("id-far")["telemetry"]["stale"] is True


# -- invocations ---------------------------------------------------------------


def test_an_invocation_is_known_and_written_down_before_it_is_sent(world, node):
    def request(invoke_id, command, args):
        assert world.invocations.get(invoke_id) is not None
        assert world.store.commands.by_id(invoke_id).state == "sent"
        node.link.requests.append((invoke_id, command, args))

    node.link.request = request
    invocation = world.start("far")
    assert [asked[0] for asked in node.link.requests] == [invocation.id]


def test_the_audit_says_who_asked_for_what_where_and_how_it_ended(world, node):
    invocation = world.start("far", command="exit 3", cwd="/srv")
    for kind, data in ((1, b"out"), (2, b"er")):
        chunk = moltis.Chunk(kind, invocation.id, 0, data)
        world.invocations.handle_chunk("id-far", chunk)
    world.finish(node, invocation, {"exitCode": 3})
    row = world.store.commands.by_id(invocation.id)
    assert (row.caller_kind, row.caller_name) == ("operator", "test")
    assert (row.node_id, row.node_name) == ("id-far", "far")
    assert (row.command, row.cwd) == ("exit 3", "/srv")
    assert (row.state, row.exit_code) == ("done", 3)
    assert (row.stdout_bytes, row.stderr_bytes) == (3, 2)
    assert row.ended_at >= row.asked_at


@pytest.mark.parametrize(
    ("result", "state"),
    [
        ({"exitCode": 0}, "done"),
        ({"exitCode": 9}, "done"),
        ({"exitCode": -1, "signal": 15, "timedOut": True}, "timed_out"),
        ({"exitCode": -1, "signal": 15, "cancelled": True}, "cancelled"),
        ({"error": "no shell"}, "failed"),
        ({"error": "cancelled before it ran", "cancelled": True}, "cancelled"),
        ({"exitCode": "7"}, "failed"),
        ({}, "failed"),
        ({"exitCode": 10**30}, "done"),
        ({"exitCode": 0, "stdout": 7}, "failed"),
    ],
)
def test_every_end_has_a_state_whatever_the_node_says(world, node, result, state):
    invocation = world.start("far")
    assert world.finish(node, invocation, result) == [True]
    assert world.state(invocation) == state
    assert invocation.future.result(0)["node"] == "far"


def test_what_a_node_says_of_an_end_has_room_in_a_list(world, node):
    """Lists hold a thousand ends: a hostile node could else make each of them 2 MB."""
    long = world.start("far")
    world.finish(node, long, {"error": "x" * 1_000_000})
    assert len(long.future.result()["error"]) < 2100
    named = world.start("far")
    world.finish(node, named, {"exitCode": -1, "signal": "SIG" * 1_000_000})
    assert len(world.store.commands.by_id(named.id).signal) == 40
    for number in (2**70, -1, 0, ""):
        odd = world.start("far")
        world.finish(node, odd, {"exitCode": -1, "signal": number})
        assert world.store.commands.by_id(odd.id).signal is None


def test_what_has_run_for_a_second_is_running_in_the_audit(world, node, monkeypatch):
    monkeypatch.setattr(moltis, "RUNNING_AFTER", 3600.0)
    invocation = world.start("far")
    world.patience.tick()
    assert world.state(invocation) == "sent"
    monkeypatch.setattr(moltis, "RUNNING_AFTER", 0)
    world.patience.tick()
    row = world.store.commands.by_id(invocation.id)
    assert row.state == "running"
    assert row.asked_at <= row.started_at <= moltis.now_ms()
    world.finish(node, invocation)
    assert world.state(invocation) == "done"


def test_what_waits_in_line_is_not_running(world, node, monkeypatch):
    sink = Sink()
    invocation = world.start("far", sink)
    world.invocations.handle_state("id-far", invocation.id, "queued", {"place": 2})
    assert sink.states == [("queued", {"place": 2})]
    monkeypatch.setattr(moltis, "RUNNING_AFTER", 0)
    world.patience.tick()
    assert world.state(invocation) == "sent"
    world.invocations.handle_state("id-far", invocation.id, "running", {"place": 0})
    world.patience.tick()
    assert world.state(invocation) == "running"


@pytest.mark.parametrize("in_line", [False, True])
def test_what_does_not_run_yet_is_not_running_after_a_restart(
    world, node, monkeypatch, in_line
):
    """It never reached its node, or waits in line there."""
    monkeypatch.setattr(moltis, "RUNNING_AFTER", 0)
    node.link.broken = not in_line
    invocation = world.start("far")
    queued = ("id-far", invocation.id, "queued", {"place": 3})
    if in_line:
        world.invocations.handle_state(*queued)
    world.leave(node)
    world.begin()
    world.patience.tick()
    assert world.state(invocation) == "sent"
    item = moltis.InflightCommand(invocation.id, 0, 0, 0, done=False)
    world.connect("far", inflight=(item,))
    if in_line:
        world.invocations.handle_state(*queued)
        world.patience.tick()
        row = world.store.commands.by_id(invocation.id)
        assert (row.state, row.started_at) == ("sent", None)
    world.invocations.handle_state("id-far", invocation.id, "running", {"place": 0})
    world.patience.tick()
    assert world.state(invocation) == "running"


def test_a_node_answers_its_own_invocations_only(world, node):
    thief = world.connect("thief")
    invocation = world.start("far")
    world.finish(thief, invocation, {"exitCode": 0, "stdout": "forged"})
    chunk = moltis.Chunk(1, invocation.id, 0, b"forged")
    world.invocations.handle_chunk("id-thief", chunk)
    assert not invocation.future.done()
    assert invocation.received(1) == 0


def test_an_id_that_was_used_is_refused(world, node):
    invoke_id = str(uuid.uuid4())
    invocation = world.start("far", invoke_id=invoke_id)
    for _ in range(2):  # while it runs, and after it
        with pytest.raises(moltis.RpcError, match="asked for before") as caught:
            world.start("far", invoke_id=invoke_id)
        assert caught.value.code == "CONFLICT"
        world.finish(node, invocation)
    assert len(node.link.requests) == 1


def test_what_leaves_no_trace_does_not_run(world, node, monkeypatch):
    def fail(record):
        raise moltis.StoreError("the disk is full")

    monkeypatch.setattr(world.store.commands, "add", fail)
    with pytest.raises(moltis.StoreError):
        world.start("far")
    assert node.link.requests == []
    assert world.invocations.running_on("id-far") == []


def test_a_result_that_cannot_be_written_down_reaches_its_caller(
    world, node, monkeypatch
):
    def fail(invoke_id, end):
        raise moltis.StoreError("the disk is full")

    monkeypatch.setattr(world.store.commands, "end", fail)
    invocation = world.start("far")
    world.finish(node, invocation)
    assert invocation.future.result(0)["exitCode"] == 0


# -- streams -------------------------------------------------------------------


def test_chunks_that_come_again_are_taken_once(world, node):
    sink = Sink()
    invocation = world.start("far", sink)
    for offset, data in (
        (0, b"abc"),
        (0, b"abc"),
        (1, b"bcde"),
        (9, b"gap"),
        (5, b"f"),
    ):
        chunk = moltis.Chunk(1, invocation.id, offset, data)
        world.invocations.handle_chunk("id-far", chunk)
    assert sink.data[1] == b"abcdef"


def test_a_node_that_does_not_wait_for_its_reader_is_refused(world, node):
    """Else a slow reader would have us keep all that a hostile node sends."""
    sink = Sink(slow=True)
    invocation = world.start("far", sink)

    def send(offset, size):
        chunk = moltis.Chunk(1, invocation.id, offset, b"x" * size)
        world.invocations.handle_chunk("id-far", chunk)

    send(0, moltis.STREAM_WINDOW)
    with pytest.raises(moltis.RpcError, match="byte 1048577 of stdout was sent"):
        send(moltis.STREAM_WINDOW, 1)
    world.invocations.acknowledge(invocation, 1, 10)
    send(moltis.STREAM_WINDOW, 10)
    assert len(sink.data[1]) == moltis.STREAM_WINDOW + 10


def test_a_node_without_streams_may_send_all_its_output_at_once(world):
    world.connect("rust", capabilities=())
    invocation = world.start("rust")
    output = "x" * (moltis.STREAM_WINDOW + 1)
    node = world.fleet.connected("id-rust")
    world.finish(node, invocation, {"exitCode": 0, "stdout": output})
    assert len(invocation.sink.data[1]) == len(output)
    assert invocation.future.result()["exitCode"] == 0


def test_a_result_that_comes_again_and_again_is_answered_so_often_and_no_more(
    world, node
):
    """Its output never does: the node says that there is more than it sends."""
    invocation = world.start("far")
    accepted = []
    for number in range(100):
        world.invocations.handle_result(
            "id-far", invocation.id, done(4), partial(accepted.append, number)
        )
    world.invocations.handle_chunk("id-far", output(invocation, 0, b"0123"))
    world.invocations.acknowledge(invocation, moltis.STDOUT, 4)
    world.store.commands.keep_ended()
    assert accepted == list(range(100 - moltis.MAX_ACCEPTS, 100))


@pytest.mark.parametrize("offset", [-1, 2**62, 2**70])
def test_an_offset_that_no_stream_can_have_is_refused(offset):
    with pytest.raises(moltis.RpcError, match="must count bytes"):
        moltis.InflightCommand.from_json({"invokeId": "one", "stdout": offset})


def test_the_node_is_told_now_and_then_what_was_dealt_with(world, node):
    invocation = world.start("far")
    step = 64 * 1024
    for number in range(16):
        chunk = moltis.Chunk(1, invocation.id, number * step, bytes(step))
        world.invocations.handle_chunk("id-far", chunk)
    assert [offset for _, offset in node.link.acknowledged] == [
        n * 256 * 1024 for n in (1, 2, 3, 4)
    ]


def test_the_node_may_forget_only_when_all_output_was_dealt_with(world, node):
    invocation = world.start("far", Sink(slow=True))
    chunk = moltis.Chunk(1, invocation.id, 0, b"abc")
    world.invocations.handle_chunk("id-far", chunk)
    accepted = world.finish(node, invocation)
    assert accepted == []
    assert invocation.future.done()
    world.invocations.acknowledge(invocation, 1, 3)
    assert accepted == [True]
    assert invocation.settled.done()
    assert world.invocations.get(invocation.id) is None


def test_an_acknowledgement_of_what_was_not_sent_is_refused(world, node):
    invocation = world.start("far")
    with pytest.raises(moltis.RpcError, match="acknowledged before it was sent"):
        world.invocations.acknowledge(invocation, 1, 1)


# -- coming and going ----------------------------------------------------------


def test_a_node_that_can_resume_is_waited_for(world, node):
    sink = Sink()
    invocation = world.start("far", sink)
    world.leave(node)
    assert sink.states == [("waiting", {})]
    assert not invocation.future.done()
    item = moltis.InflightCommand(invocation.id, 0, 0, 5, done=False)
    again = world.connect("far", inflight=(item,))
    assert sink.states[-1] == ("running", {"resumed": True, "stdin": 5})
    assert again.link.requests == []
    world.finish(again, invocation)
    assert world.state(invocation) == "done"


def test_a_node_keeps_what_a_caller_who_comes_back_may_still_need(world, node):
    invocation = world.start("far", Sink(slow=True))
    chunk = moltis.Chunk(1, invocation.id, 0, b"abcdef")
    world.invocations.handle_chunk("id-far", chunk)
    world.invocations.acknowledge(invocation, 1, 2)
    world.leave(node)
    item = moltis.InflightCommand(invocation.id, 2, 0, 0, done=False)
    again = world.connect("far", inflight=(item,))
    # What is before these offsets the node forgets.
    assert world.resumption.resumable(again) == [
        {"invokeId": invocation.id, "stdout": 2, "stderr": 0}
    ]


@pytest.mark.parametrize(("code", "dealt_with"), [(1000, 3), (1006, 0)])
def test_only_a_caller_who_says_goodbye_has_no_use_for_output(code, dealt_with):
    class Gone:
        closed = True
        close_code = code

        def send(self, message):
            raise moltis.ConnectionClosed(code)

    peer = moltis.OperatorPeer(Gone(), None, None, None)
    chunk = moltis.Chunk(1, moltis.new_id(), 0, b"abc")
    assert peer.chunk(chunk) == dealt_with
    assert peer.end(None, None) is (code == 1000)


def test_a_request_that_got_lost_on_the_way_is_sent_again(world, node):
    node.link.broken = True
    invocation = world.start("far")
    world.leave(node)
    again = world.connect("far")
    assert [asked[0] for asked in again.link.requests] == [invocation.id]


def test_a_node_that_came_back_without_it_has_lost_it(world, node):
    invocation = world.start("far")
    world.leave(node)
    world.connect("far", instance="life-2")
    with pytest.raises(moltis.RpcError, match="far: the node came back without it"):
        invocation.future.result(0)
    assert world.state(invocation) == "lost"


def test_what_a_busy_node_has_no_room_to_name_is_not_lost_with_the_gateway(
    world, node, monkeypatch
):
    monkeypatch.setattr(moltis, "MAX_INFLIGHT", 1)
    named, beyond, unwanted = (world.start("far") for _ in range(3))
    world.leave(node)
    world.invocations.cancel(unwanted)
    world.begin()
    item = moltis.InflightCommand(named.id, 0, 0, 0, done=False)
    again = world.connect("far", inflight=(item,))
    assert again.link.requests == []  # it has no arguments any more: nothing to send
    told = world.invocations.get(beyond.id).sink.states
    assert [state for state, _ in told] == ["waiting", "running"]
    assert again.link.cancelled == [unwanted.id]
    assert world.state(beyond) == "sent"
    world.finish(again, world.invocations.get(beyond.id), done(0))
    assert world.state(beyond) == "done"


def test_what_was_cancelled_meanwhile_does_not_run_because_there_was_no_room_for_it(
    world, node, monkeypatch
):
    monkeypatch.setattr(moltis, "MAX_INFLIGHT", 1)
    named, unwanted = world.start("far"), world.start("far")
    world.leave(node)
    world.invocations.cancel(unwanted)
    item = moltis.InflightCommand(named.id, 0, 0, 0, done=False)
    again = world.connect("far", inflight=(item,))
    assert again.link.cancelled == [unwanted.id]
    assert world.state(unwanted) == "cancelled"


def test_pending_invokes_of_a_node_that_cannot_resume_fail_when_it_leaves(world):
    rust = world.connect("rust", capabilities=("exec",))
    invocation = world.start("rust")
    world.leave(rust)
    with pytest.raises(moltis.RpcError, match="the node disconnected"):
        invocation.future.result(0)
    assert world.state(invocation) == "lost"


def test_a_node_that_is_just_coming_is_asked_once(world, node):
    """The caller and the node's coming may both be about to send."""
    world.leave(node)
    rust = world.claim_far()
    early = world.start("far")  # before its hello
    assert rust.link.requests == []
    world.fleet.activate(rust)
    late = world.start("far")  # after its hello, before it was brought up to date
    world.resumption.resume(rust)
    asked = [invoke_id for invoke_id, _, _ in rust.link.requests]
    assert sorted(asked) == sorted([early.id, late.id])


@pytest.mark.parametrize("after", [False, True])
def test_a_node_that_comes_anew_as_it_is_to_be_asked_is_asked(
    world, node, monkeypatch, after
):
    """Before or after the command is written down: what was looked up is gone."""
    again = []
    come_anew = partial(come_back, world, node, again)
    meanwhile(monkeypatch, world.invocations, "_register", come_anew, after=after)
    invocation = world.start("far")
    assert [asked for asked, *_ in again[0].link.requests] == [invocation.id]
    assert invocation.away_ms is None


@pytest.mark.parametrize("turns_out", [False, True])
def test_a_node_that_comes_anew_as_it_is_asked_is_not_said_to_be_away(
    world, node, monkeypatch, turns_out
):
    """Just before it is asked, or just after it `turns_out` to be gone."""
    again, sink = [], Sink()
    come_anew = partial(come_back, world, node, again)
    node.link.broken = turns_out
    moment = (world.fleet, "expects") if turns_out else (node.link, "request")
    meanwhile(monkeypatch, *moment, come_anew, after=turns_out)
    invocation = world.start("far", sink)
    assert len(again[0].link.requests) == 1
    assert invocation.away_ms is None
    assert ("waiting", {}) not in sink.states[-1:]


def test_what_is_cancelled_as_its_node_is_to_be_asked_is_cancelled_there(
    world, node, monkeypatch
):
    told, invoke_id = [], str(uuid.uuid4())
    monkeypatch.setattr(node.link, "request", lambda *_: told.append("request"))
    monkeypatch.setattr(node.link, "cancel", lambda _: told.append("cancel"))

    def cancel():
        world.invocations.cancel(world.invocations.get(invoke_id))

    meanwhile(monkeypatch, world.store.commands, "add", cancel, after=True)
    world.start("far", invoke_id=invoke_id)
    assert told[-2:] == ["request", "cancel"]


def test_what_was_cancelled_while_its_node_was_away_is_cancelled_when_it_is_back(
    world, node
):
    invocation = world.start("far")
    world.leave(node)
    world.invocations.cancel(invocation)
    item = moltis.InflightCommand(invocation.id, 0, 0, 0, done=False)
    again = world.connect("far", inflight=(item,))
    assert again.link.cancelled == [invocation.id]


def test_what_a_node_runs_that_nobody_asked_for_is_cancelled(world):
    stray = str(uuid.uuid4())
    item = moltis.InflightCommand(stray, 0, 0, 0, done=False)
    node = world.connect("far", inflight=(item,))
    assert node.link.cancelled == [stray]


def test_one_that_is_overdue_is_given_up(world, node, monkeypatch):
    monkeypatch.setattr(moltis, "LOST_AFTER", -10.0)
    invocation = world.start("far", timeout=1000)
    patient = world.start("far")  # no timeout: it may take as long as it takes
    world.patience.tick()
    assert world.state(invocation) == "sent"  # it may wait in line there
    world.leave(node)
    world.patience.tick()
    assert world.state(invocation) == "lost"
    assert not patient.future.done()


def test_a_gateway_that_begins_anew_waits_as_long_as_the_old_one(
    world, node, monkeypatch
):
    monkeypatch.setattr(moltis, "LOST_AFTER", -10.0)
    hasty = world.start("far", timeout=10_001)
    slow = world.start("far", timeout=60_000)
    patient = world.start("far")  # no timeout: until its node is back, or not ours
    world.leave(node)
    world.begin()
    assert [sink.states for sink in world.sinks] == [[("waiting", {})]] * 3
    wait_for(lambda: world.patience.tick() or world.state(hasty) == "lost")
    assert "after the command's timeout" in world.store.commands.by_id(hasty.id).error
    assert world.state(slow) == world.state(patient) == "sent"
    assert [sink.ends != [] for sink in world.sinks] == [True, False, False]


def test_a_cancelled_command_of_an_absent_node_is_not_waited_for(
    world, node, monkeypatch
):
    invocation = world.start("far")
    world.leave(node)
    world.patience.tick()
    world.invocations.cancel(invocation)
    world.patience.tick()
    assert world.state(invocation) == "sent"  # it may be back any moment
    monkeypatch.setattr(moltis, "LOST_AFTER", 0.0)
    world.begin()  # which does not forget that it is to end
    world.patience.tick()
    row = world.store.commands.by_id(invocation.id)
    assert row.state == "lost"
    assert "it was away when the command was cancelled" in row.error


def test_a_cancel_outlives_the_gateway(world, node):
    invocation = world.start("far")
    node.link.broken = True  # it does not hear of it
    world.invocations.cancel(invocation)
    world.fleet.release(node)
    world.begin()
    item = moltis.InflightCommand(invocation.id, 0, 0, 0, done=False)
    again = world.connect("far", inflight=(item,))
    assert again.link.cancelled == [invocation.id]


def test_a_command_cancelled_before_it_could_be_sent_is_sent_to_nobody(world, node):
    world.leave(node)
    coming = world.claim_far()
    invocation = world.start("far")  # before its hello
    world.invocations.cancel(invocation)
    world.fleet.activate(coming)
    world.resumption.resume(coming)
    assert coming.link.requests == []
    assert world.state(invocation) == "cancelled"


def test_a_node_that_is_revoked_as_it_is_asked_is_not_waited_for(world, node):
    def request(*_):
        world.store.devices.revoke(node.device_id, moltis.now_ms())
        raise moltis.ConnectionClosed(1008)

    node.link.request = request
    invocation = world.start("far")
    with pytest.raises(moltis.RpcError, match="far: its token was revoked"):
        invocation.future.result(0)
    assert world.state(invocation) == "lost"


def test_what_is_lost_while_the_disk_is_full_is_written_down_later(
    world, node, monkeypatch
):
    invocation = world.start("far")

    def fail(*_):
        raise moltis.StoreError("the disk is full")

    with monkeypatch.context() as full:
        full.setattr(world.store.commands, "end", fail)
        world.invocations.give_up(invocation, "gone")
        world.patience.tick()
    assert world.state(invocation) == "sent"
    world.patience.tick()
    assert world.state(invocation) == "lost"
    assert world.invocations.active.all() == []


def test_what_ended_as_the_disk_was_full_is_written_down_though_its_node_is_another(
    world, node, monkeypatch
):
    """It was stopped, and is back without anything."""

    def fail(*_):
        raise moltis.StoreError("the disk is full")

    with monkeypatch.context() as full:
        invocation = world.start("far")
        full.setattr(world.store.commands, "end", fail)
        full.setattr(moltis.Database, "transaction", fail)
        assert world.finish(node, invocation) == []
        world.leave(node)
        world.connect("far", instance="life-2")
        result = world.resumption.again(invocation.id, ORIGIN, Sink(), 0, 0)
        assert result["exitCode"] == 0
        world.patience.tick()
        assert world.state(invocation) == "sent"
    world.patience.tick()
    assert world.state(invocation) == "done"
    assert world.invocations.active.all() == []


def test_a_lost_command_that_its_node_still_runs_is_not_lost(world, node, monkeypatch):
    invocation = world.start("far")
    world.leave(node)
    world.invocations.give_up(invocation, "gone")
    item = moltis.InflightCommand(invocation.id, 7, 0, 0, done=False)
    again = world.connect("far", inflight=(item,))
    monkeypatch.setattr(moltis, "RUNNING_AFTER", 0)
    world.patience.tick()
    row = world.store.commands.by_id(invocation.id)
    assert (row.state, row.ended_at, row.error) == ("running", None, None)
    found = world.invocations.get(invocation.id)
    world.invocations.handle_chunk("id-far", output(found, 7, b"rest"))
    assert world.sinks[-1].data[1] == b"rest"
    world.finish(again, found, done(11))
    row = world.store.commands.by_id(invocation.id)
    assert (row.state, row.exit_code, row.stdout_bytes) == ("done", 0, 11)


def test_what_is_lost_as_it_is_noted_to_run_stays_lost(world, node, monkeypatch):
    monkeypatch.setattr(moltis, "RUNNING_AFTER", 0)
    invoke_id = world.start("far").id
    world.leave(node)
    world.begin()
    item = moltis.InflightCommand(invoke_id, 0, 0, 0, done=False)
    world.connect("far", inflight=(item,))
    invocation = world.invocations.get(invoke_id)

    def give_up():
        world.invocations.give_up(invocation, "its token was revoked")

    meanwhile(monkeypatch, world.store.commands, "start", give_up, after=False)
    world.patience.tick()
    assert world.state(invocation) == "lost"


def test_one_who_comes_back_as_a_command_is_lost_hears_of_it(world, node, monkeypatch):
    invocation = world.start("far")

    def give_up():
        world.invocations.give_up(invocation, "its token was revoked")

    meanwhile(monkeypatch, world.invocations, "attach", give_up, after=False)
    found = world.resumption.again(invocation.id, ORIGIN, Sink(), 0, 0)
    with pytest.raises(moltis.RpcError, match="its token was revoked"):
        found.future.result(10)


def test_one_who_comes_back_just_after_a_command_is_lost_hears_of_it(
    world, node, monkeypatch
):
    invocation, heard = world.start("far"), []

    def come_back_for_it():
        with pytest.raises(moltis.RpcError, match="its token was revoked") as caught:
            world.resumption.again(invocation.id, ORIGIN, Sink(), 0, 0)
        heard.append(caught.value)

    meanwhile(monkeypatch, world.invocations, "_settle", come_back_for_it, after=True)
    world.invocations.give_up(invocation, "its token was revoked")
    assert len(heard) == 1


def test_a_command_whose_end_is_known_is_not_said_to_be_lost(world, node):
    """Its caller came back for output that its node has, which then is gone."""
    invocation = world.start("far", Sink(slow=True))
    world.invocations.handle_chunk("id-far", output(invocation, 0, b"abc"))
    world.finish(node, invocation, done(3))
    back = Sink()
    future = world.invocations.attach(invocation, back, (0, 0))
    world.leave(node)
    world.invocations.give_up(invocation, "its token was revoked")
    with pytest.raises(moltis.RpcError) as caught:
        future.result(10)
    assert caught.value.message == (
        "far: its token was revoked; the command ended (done), but its output is gone"
    )
    assert [end.state for end in back.ends] == ["done"]
    assert world.state(invocation) == "done"


def test_a_lost_command_that_reports_after_all_corrects_the_audit(world, node):
    invocation = world.start("far")
    world.invocations.give_up(invocation, "gone")
    accepted = world.finish(node, invocation)
    assert accepted == [True]  # so that the node may forget it


def test_when_the_gateway_stops_those_who_wait_are_told_and_commands_go_on(world, node):
    invocation = world.start("far")
    world.invocations.close()
    with pytest.raises(moltis.RpcError, match="the command goes on"):
        invocation.future.result(0)
    assert node.link.cancelled == []
    assert world.state(invocation) == "sent"
    with pytest.raises(moltis.RpcError, match="the gateway stops"):
        world.start("far")


# -- what comes back -----------------------------------------------------------


def output(invocation, offset, data, kind=1):
    return moltis.Chunk(kind, invocation.id, offset, data)


def done(count, **more):
    return {"exitCode": 0, "stdoutBytes": count, "stderrBytes": 0, **more}


def test_a_result_that_overtakes_its_output_waits_for_it(world, node):
    """As it may when a command ends in the moment in which its node resumes."""
    invocation = world.start("far")
    accepted = world.finish(node, invocation, done(6))
    assert not invocation.future.done()
    assert world.state(invocation) == "sent"
    world.invocations.handle_chunk("id-far", output(invocation, 0, b"whole\n"))
    assert invocation.future.result(0)["exitCode"] == 0
    assert world.store.commands.by_id(invocation.id).stdout_bytes == 6
    assert accepted == [True]


def test_a_caller_who_comes_back_gets_what_follows_and_the_result(world, node):
    first, second = Sink(slow=True), Sink()
    invocation = world.start("far", first)
    world.invocations.handle_chunk("id-far", output(invocation, 0, b"0123456789"))
    accepted = world.finish(node, invocation, done(10))
    assert accepted == []
    found = world.resumption.again(invocation.id, ORIGIN, second, 4, 0)
    assert found is invocation
    assert node.link.rewound == [(invocation.id, 4, 0)]
    assert not found.future.done()  # before the output is there again
    world.invocations.handle_chunk("id-far", output(invocation, 4, b"456789"))
    assert second.data[1] == b"456789"
    assert found.future.result(0)["exitCode"] == 0
    assert accepted == [True]


def test_what_was_on_its_way_to_the_old_caller_is_no_gap_for_the_new_one(world, node):
    second = Sink()
    invocation = world.start("far", Sink(slow=True))
    world.invocations.handle_chunk("id-far", output(invocation, 0, b"0123"))
    world.resumption.again(invocation.id, ORIGIN, second, 2, 0)
    world.invocations.handle_chunk("id-far", output(invocation, 4, b"4567"))
    assert second.data[1] == b""
    world.invocations.handle_chunk("id-far", output(invocation, 2, b"23"))
    world.invocations.handle_chunk("id-far", output(invocation, 4, b"4567"))
    assert second.data[1] == b"234567"


def test_an_old_sink_cannot_deal_with_output_of_the_new_one(world, node):
    old = Sink(slow=True)
    invocation = world.start("far", old)
    world.invocations.handle_chunk("id-far", output(invocation, 0, b"0123"))
    world.resumption.again(invocation.id, ORIGIN, Sink(slow=True), 0, 0)
    world.invocations.acknowledge(invocation, 1, 4, old)
    assert invocation.consumed(1) == 0


def test_one_who_takes_over_leaves_the_other_an_answer(world, node):
    invocation = world.start("far")
    before = invocation.future
    world.resumption.again(invocation.id, ORIGIN, Sink(), 0, 0)
    with pytest.raises(moltis.RpcError, match="another client"):
        before.result(0)


def test_another_operator_does_not_get_at_a_command(world, node):
    invocation = world.start("far")
    other = moltis.Origin("operator", "other")
    with pytest.raises(moltis.RpcError, match="another one asked"):
        world.resumption.again(invocation.id, other, Sink(), 0, 0)
    world.finish(node, invocation)
    with pytest.raises(moltis.RpcError, match="nothing is known"):
        world.resumption.again(invocation.id, other, Sink(), 0, 0)


def test_what_has_ended_is_answered_from_the_audit(world, node):
    invocation = world.start("far")
    world.invocations.handle_chunk("id-far", output(invocation, 0, b"0123"))
    result = done(4, exitCode=-1, signal=15, cancelled=True)
    world.finish(node, invocation, result)
    known = world.resumption.again(invocation.id, ORIGIN, Sink(), 4, 0)
    assert known == {**result, "node": "far"}
    with pytest.raises(moltis.RpcError, match="is not kept any more") as caught:
        world.resumption.again(invocation.id, ORIGIN, Sink(), 2, 0)
    assert caught.value.code == "UNAVAILABLE"  # as for what is lost altogether


def test_what_was_cancelled_in_line_is_answered_from_the_audit(world, node):
    invocation = world.start("far")
    result = {"error": "cancelled before it ran", "cancelled": True}
    world.finish(node, invocation, result)
    known = world.resumption.again(invocation.id, ORIGIN, Sink(), 0, 0)
    assert known == {**result, "node": "far"}


def test_nobody_gets_a_second_run_for_output_of_a_first(world, node):
    """The audit was deleted, or is another one: at most once all the same."""
    unknown = str(uuid.uuid4())
    assert world.resumption.again(unknown, ORIGIN, Sink(), 0, 0) is None
    with pytest.raises(moltis.RpcError, match="nothing is known"):
        world.resumption.again(unknown, ORIGIN, Sink(), 10, 0)


def test_a_caller_with_output_is_not_told_that_it_may_not_have_run(world):
    """The gateway was killed, and with it what ran on its own machine."""
    invocation = world.start("local")
    world.begin()
    for stdout, unknown in ((0, "whether the command ran"), (4, "how the command end")):
        with pytest.raises(moltis.RpcError, match=unknown):
            world.resumption.again(invocation.id, ORIGIN, Sink(), stdout, 0)


def test_a_caller_may_come_back_before_its_node(world, node):
    """Both were away: the gateway was started anew."""
    record = world.start("far")
    world.leave(node)
    world.begin()
    sink = Sink()
    found = world.resumption.again(record.id, ORIGIN, sink, 3, 0)
    item = moltis.InflightCommand(record.id, 0, 0, 0, done=False)
    again = world.connect("far", inflight=(item,))
    assert world.resumption.resumable(again) == [
        {"invokeId": record.id, "stdout": 3, "stderr": 0}
    ]
    world.invocations.handle_chunk("id-far", output(found, 3, b"rest"))
    assert sink.data[1] == b"rest"


def test_a_caller_who_is_back_first_hears_that_its_output_waits_for_the_node(
    world, node
):
    invocation = world.start("far", Sink(slow=True))
    world.invocations.handle_chunk("id-far", output(invocation, 0, b"0123"))
    world.finish(node, invocation, done(4))
    world.leave(node)
    world.begin()
    sink = Sink()
    world.resumption.again(invocation.id, ORIGIN, sink, 0, 0)
    assert [state for state, _ in sink.states] == ["waiting"]


def test_a_caller_and_its_node_may_come_back_at_the_same_moment(
    world, node, monkeypatch
):
    invocation = world.start("far", Sink(slow=True))
    world.invocations.handle_chunk("id-far", output(invocation, 0, b"0123456789"))
    world.finish(node, invocation, done(10))
    world.leave(node)
    world.begin()
    look_up = world.store.commands.by_id
    item = moltis.InflightCommand(invocation.id, 0, 0, 0, done=True)

    def look_up_as_it_connects(invoke_id):
        record = look_up(invoke_id)
        monkeypatch.undo()
        world.connect("far", inflight=(item,))
        return record

    monkeypatch.setattr(world.store.commands, "by_id", look_up_as_it_connects)
    second = Sink()
    world.resumption.again(invocation.id, ORIGIN, second, 4, 0)
    world.invocations.handle_chunk("id-far", output(invocation, 4, b"456789"))
    assert second.data[1] == b"456789"


def test_a_caller_who_stays_away_costs_its_command(world, node, monkeypatch):
    monkeypatch.setattr(moltis, "CALLER_PATIENCE", 0.0)
    sink = Sink(slow=True)
    invocation = world.start("far", sink)
    world.invocations.handle_chunk("id-far", output(invocation, 0, b"0123"))
    invocation.detach(sink)
    world.patience.tick()
    assert node.link.cancelled == [invocation.id]
    assert node.link.rewound == [(invocation.id, 0, 0)]
    world.invocations.handle_chunk("id-far", output(invocation, 0, b"0123"))
    assert world.finish(node, invocation, done(4, cancelled=True)) == [True]
    assert world.state(invocation) == "cancelled"


def test_a_caller_has_as_long_to_come_back_after_a_restart(world, node, monkeypatch):
    """Its node was back at once, and not much later than a node may be."""
    monkeypatch.setattr(moltis, "LOST_AFTER", -1.0)
    invocation = world.start("far")
    world.leave(node)
    world.begin(files=False)
    item = moltis.InflightCommand(invocation.id, 0, 0, 0, done=False)
    world.connect("far", inflight=(item,))
    chunk = output(invocation, 0, b"abc")
    world.invocations.handle_chunk("id-far", chunk)
    world.patience.tick()
    world.invocations.handle_chunk("id-far", chunk)  # for the caller, had it left
    sink = Sink()
    assert world.resumption.again(invocation.id, ORIGIN, sink, 0, 0)
    world.invocations.handle_chunk("id-far", chunk)
    assert sink.data[1] == b"abc"


def test_who_leaves_takes_nothing_from_another_client_that_came(world, node):
    """The one leaves at the moment in which the other takes over."""
    first, second = Sink(slow=True), Sink()
    invocation = world.start("far", first)
    world.resumption.again(invocation.id, ORIGIN, second, 0, 0)
    world.invocations.forsake(invocation, first, cancel=True)
    assert node.link.cancelled == []
    world.invocations.handle_chunk("id-far", output(invocation, 0, b"0123"))
    assert second.data[1] == b"0123"
    world.invocations.forsake(invocation, second, cancel=True)
    assert node.link.cancelled == [invocation.id]


def test_a_command_cancelled_before_its_node_heard_of_it_does_not_run(world, node):
    invocation = world.start("far")  # the request gets lost
    world.leave(node)
    world.invocations.cancel(invocation)
    again = world.connect("far")
    assert again.link.requests == []
    assert invocation.future.result(0)["cancelled"] is True
    assert world.state(invocation) == "cancelled"


def test_what_an_earlier_gateway_asked_for_is_sent_to_no_node_again(world):
    """A node of the original Moltis would run it twice: it remembers no ids."""
    first = world.connect("rust", capabilities=(), instance="")
    invocation = world.start("rust")
    world.fleet.release(first)
    world.begin()
    again = world.connect("rust", capabilities=(), instance="")
    assert again.link.requests == []
    assert world.state(invocation) == "lost"


def test_a_result_that_the_node_let_go_is_lost_and_no_failure(world, node):
    invocation = world.start("far")
    result = {"error": "invocation … was run already", "lost": True}
    assert world.finish(node, invocation, result) == [True]
    assert world.state(invocation) == "lost"


def test_ends_are_noted_together_and_before_anybody_reads_them(world, node):
    invocations = [world.start("far") for _ in range(3)]
    accepted = []
    for invocation in invocations:
        world.invocations.handle_result(
            "id-far", invocation.id, {"exitCode": 0}, lambda: accepted.append(True)
        )
        assert invocation.future.result(0)["exitCode"] == 0
    assert {world.state(invocation) for invocation in invocations} == {"done"}
    wait_for(lambda: accepted == [True] * 3)


def test_a_node_keeps_the_result_until_the_audit_has_it(world, node, monkeypatch):
    invocation = world.start("far")

    def fail(*_):
        raise moltis.StoreError("the disk is full")

    with monkeypatch.context() as full:
        full.setattr(moltis.Database, "_connection", fail)
        accepted = world.finish(node, invocation)
        world.patience.tick()
        assert invocation.future.result(0)["exitCode"] == 0  # the caller has it
        assert accepted == []
    world.patience.tick()
    assert accepted == [True]
    assert world.state(invocation) == "done"


def test_what_a_node_is_asked_to_send_again_is_what_the_caller_lacks(world, node):
    """Both connections broke: the node comes back first, the caller with less."""
    first, second = Sink(slow=True), Sink()
    invocation = world.start("far", first)
    world.invocations.handle_chunk("id-far", output(invocation, 0, b"0123456789"))
    world.invocations.acknowledge(invocation, 1, 2)
    world.leave(node)
    item = moltis.InflightCommand(invocation.id, 0, 0, 0, done=False)
    again = world.connect("far", inflight=(item,))
    assert (1, 2) in again.link.acknowledged  # not 10: that is not the caller's yet
    world.resumption.again(invocation.id, ORIGIN, second, 5, 0)
    assert again.link.rewound == [(invocation.id, 5, 0)]
    assert (1, 5) in again.link.acknowledged  # or a full window would stay full
