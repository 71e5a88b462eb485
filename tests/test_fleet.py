"""The machines of a gateway: names, presence, telemetry."""

from __future__ import annotations

import threading

import pytest
from support import wait_for

import moltis


class Link:
    """A NodeLink that records when it is hung up."""

    def __init__(self):
        self.hung_up = []

    def hang_up(self, reason):
        self.hung_up.append(reason)


class World:
    """A fleet over a real store."""

    def __init__(self, directory):
        self.store = moltis.Store(directory / "moltis.db")
        self.access = moltis.Access(self.store)
        self.told = []
        params = moltis.ConnectParams(role="node")
        local = moltis.ConnectedNode("local", "", Link(), params)
        self.fleet = moltis.Fleet(
            self.store.devices, local, lambda name, payload: self.told.append(payload)
        )
        local.ready = True
        self.devices = {}

    def connect(self, name, *, node_id=None, capabilities=(moltis.CAP_JOBS,)):
        """Bring a node in, as the gateway does."""
        if name not in self.devices:
            self.devices[name], _ = self.access.devices.create_device(name)
        device = self.store.devices.by_id(self.devices[name].id, moltis.now_ms())
        asked = moltis.ConnectParams(
            role="node",
            client_id=node_id or f"id-{name}",
            instance="life-1",
            display_name=name,
            platform="linux",
            version="1",
            capabilities=capabilities,
            commands=("system.run",),
        )
        node = moltis.ConnectedNode(asked.client_id, device.id, Link(), asked)
        self.fleet.claim(node, device)
        self.store.devices.connect(device.id, asked, "127.0.0.1", moltis.now_ms())
        self.fleet.activate(node)
        return node


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.store.close()


@pytest.fixture
def node(world):
    return world.connect("far")


# -- names ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "node_id"),
    [
        ("id-one", "id-one"),  # an exact id, though another is called so
        ("ID-ONE", "two-9c41"),  # its name, given by an operator
        ("attic PI", "attic-1"),  # an operator's name, though a machine says it too
        (" attic pi ", "attic-1"),
        ("alone", "7f3e-55"),
        ("7f3e", "7f3e-55"),  # a unique prefix of an id
        ("local", "local"),
        ("LOCAL", "local"),
    ],
)
def test_a_machine_is_found_by_id_then_name_then_prefix(world, reference, node_id):
    for name, known in [
        ("one", "id-one"),
        ("second", "two-9c41"),
        ("first", "attic-1"),
        ("Attic Pi", "attic-2"),
        ("alone", "7f3e-55"),
    ]:
        world.connect(name, node_id=known)
    world.store.devices.rename(world.devices["second"].id, "id-one")
    world.store.devices.rename(world.devices["first"].id, "Attic Pi")
    assert world.fleet.resolve(reference)[0] == node_id


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("other", "there is no node 'other'; there is Local, twin, twin"),
        ("TWIN", "'TWIN' may be any of 2 nodes; use an id: 7f3e-1, 7f3e-2"),
        ("7f3e", "'7f3e' may be any of 2 nodes; use an id: 7f3e-1, 7f3e-2"),
        ("7f3", "there is no node '7f3'"),
        ("", "there is no node ''"),
    ],
)
def test_what_is_no_one_machine_is_an_error_with_candidates(world, reference, problem):
    for number in (1, 2):
        world.connect(f"twin{number}", node_id=f"7f3e-{number}")
        world.store.devices.rename(world.devices[f"twin{number}"].id, "twin")
    with pytest.raises(moltis.RpcError) as caught:
        world.fleet.resolve(reference)
    assert problem in str(caught.value)


def test_an_error_names_twenty_of_five_thousand(world, monkeypatch):
    class Names:
        by_id = {f"id-{n}": f"node{n:04}" for n in range(5000)}

        def ids_of(self, name):
            return []

    monkeypatch.setattr(world.store.devices, "names", Names)
    with pytest.raises(moltis.RpcError, match="node0018 and 4,981 more"):
        world.fleet.resolve("nope")


def test_an_offline_node_is_an_error_that_says_since_when(world, node):
    world.fleet.release(node)
    with pytest.raises(moltis.RpcError, match="far is offline since"):
        world.fleet.require_connected(*world.fleet.resolve("far"))


def test_machines_are_selected_by_a_part_of_their_name(world):
    for name in ("web1", "web2", "gpu"):
        world.connect(name)
    views, count = world.fleet.select("WEB", 1)
    assert [view["displayName"] for view in views] == ["web1"]
    assert count == 2
    assert world.fleet.select("", 10)[1] == 4  # with Local


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
    world.fleet.release(node)
    thread.join()
    assert world.fleet.connected("id-far") is newer[0]


def test_an_old_connection_that_does_not_end_is_not_in_the_way_for_good(
    world, node, monkeypatch
):
    monkeypatch.setattr(moltis, "REPLACE_TIMEOUT", 0.05)
    with pytest.raises(moltis.RpcError, match="still closing"):
        world.connect("far")
    world.fleet.release(node)
    assert world.connect("far").ready


def test_presence_is_told_when_a_node_comes_and_goes(world, node):
    world.fleet.release(node)
    kinds = [told["type"] for told in world.told if told.get("nodeId") == "id-far"]
    assert kinds == ["node.connected", "node.disconnected"]


@pytest.mark.parametrize("node_id", ["", "local", "Local", "x" * 201, "a\x1b[2Jb"])
def test_an_id_that_is_none_is_refused(world, node_id):
    device, _ = world.access.devices.create_device("odd")
    params = moltis.ConnectParams(role="node", client_id=node_id)
    node = moltis.ConnectedNode(node_id, device.id, Link(), params)
    with pytest.raises(moltis.RpcError, match="must have 1 to 200"):
        world.fleet.claim(node, device)


@pytest.mark.parametrize("node_id", ["Build Server", "build server"])
def test_no_node_takes_the_name_of_another_for_its_id(world, node_id):
    """An id wins over a name: what is meant for that machine would come to it."""
    world.connect("Build Server")
    device, _ = world.access.devices.create_device("odd")
    params = moltis.ConnectParams(role="node", client_id=node_id)
    node = moltis.ConnectedNode(node_id, device.id, Link(), params)
    with pytest.raises(moltis.RpcError, match="another machine is called"):
        world.fleet.claim(node, device)
    assert world.fleet.resolve(node_id) == ("id-Build Server", "Build Server")


def test_a_token_that_nobody_came_with_in_time_keeps_no_id_from_others(world):
    expired, _ = world.access.devices.create_device("Build Server")
    expire = "UPDATE devices SET expires_at = 1 WHERE id = ?"
    world.store.devices._db.write(expire, (expired.id,))
    device, _ = world.access.devices.create_device("odd")
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
    world.fleet.record_providers(node, {"providers": models})
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


def test_a_node_of_ours_before_jobs_is_outdated(world):
    world.connect("old", capabilities=(moltis.CAP_SCRAM, "exec.stream"))
    assert world.fleet.view("id-old")["outdated"] is True
    world.connect("rusty", capabilities=("system.run",))
    assert "outdated" not in world.fleet.view("id-rusty")
