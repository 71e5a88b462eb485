"""The machines of a gateway: names, presence, telemetry."""

from __future__ import annotations

import threading

import pytest
from support import wait_for

import moltis


class Link:
    """A NodeLink that records when it is hung up."""

    def __init__(self, instance="", *, lives=False):
        self.instance = instance
        self.lives = lives
        self.hung_up = []

    def answers(self, timeout):
        return self.lives

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

    def connect(self, name, *, node_id=None, capabilities=(moltis.CAP_JOBS,), **link):
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
        node = moltis.ConnectedNode(asked.client_id, device.id, Link(**link), asked)
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


NODES = [  # id, name, given by an operator
    ("id-one", "one", False),
    ("two-9c41", "id-one", True),
    ("attic-1", "Attic Pi", True),
    ("attic-2", "attic pi", False),
    ("7f3e-55", "alone", False),
    ("7f3e-5", "Straße", False),
    ("9a01-1", "twin", False),
    ("9a01-2", "TWIN", False),
    ("beef", "Caf\u00e9", True),
    ("beef-1", "7f3e", False),
    ("ABCD-1", "upper", False),
]


@pytest.mark.parametrize(
    ("reference", "ids"),
    [
        ("id-one", ["id-one"]),  # an exact id, though another is called so
        ("ID-ONE", ["two-9c41"]),  # its name, given by an operator
        ("attic PI", ["attic-1"]),  # an operator's name, though a machine says it too
        (" attic  pi ", ["attic-1"]),
        ("alone", ["7f3e-55"]),
        ("7f3e-5", ["7f3e-5"]),  # an exact id, though another begins with it
        ("STRASSE", ["7f3e-5"]),
        ("cafe\u0301", ["beef"]),
        ("CAFE\u0301", ["beef"]),
        ("cafe", []),
        ("beef", ["beef"]),
        ("twin", ["9a01-1", "9a01-2"]),
        ("9a01", ["9a01-1", "9a01-2"]),
        ("9a01-", ["9a01-1", "9a01-2"]),
        ("9a0", []),  # too short to mean an id
        ("7F3E", ["beef-1"]),  # a name, though ids begin with it
        ("two-", ["two-9c41"]),  # a unique prefix of an id
        ("abcd", ["ABCD-1"]),
        ("", []),
        ("*", []),
        ("local", []),  # Fleet's own
    ],
)
def test_one_rule_says_which_machine_is_meant(reference, ids):
    """DESIGN 1.10"""
    rows = [dict(zip(("node_id", "display_name", "renamed"), n)) for n in NODES]
    assert list(moltis.NodeNames(None, rows).find(reference)) == ids


@pytest.mark.parametrize("reference", ["local", "LOCAL", " Local "])
def test_local_is_the_gateways_own_machine_and_nothing_else_is(world, reference):
    assert world.fleet.resolve(reference) == ("local", "Local")
    with pytest.raises(moltis.RpcError, match="there is no node"):
        world.fleet.resolve("nowhere")


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
    rows = [
        {"node_id": f"id-{n}", "display_name": f"node{n:04}", "renamed": False}
        for n in range(5000)
    ]
    names = moltis.NodeNames(None, rows)
    monkeypatch.setattr(world.store.devices, "names", lambda: names)
    with pytest.raises(moltis.RpcError, match="node0018 and 4,981 more"):
        world.fleet.resolve("nope")


def test_an_offline_node_is_an_error_that_says_since_when(world, node):
    world.fleet.release(node)
    with pytest.raises(moltis.RpcError, match="far has been offline since"):
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
    for text in (
        "",
        " ",
        "a\0b",
        "x" * 201,
        "a\u202eb",
        "a\u200bb",
        "\u3164",
        "\ufe0f",
    ):
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


def test_a_token_is_one_device_while_its_connection_lives(world):
    """FAULTS D8: the thief of a token does not get the commands."""
    first = world.connect("far", instance="life-1", lives=True)
    with pytest.raises(moltis.RpcError, match="in use by another machine"):
        world.connect("far", instance="life-2")
    assert world.fleet.connected("id-far") is first
    assert first.link.hung_up == []


def test_the_same_process_replaces_its_own_connection(world):
    first = world.connect("far", instance="life-1", lives=True)
    first.link.hang_up = lambda _reason: world.fleet.release(first)
    again = world.connect("far", instance="life-1")
    assert world.fleet.connected("id-far") is again


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


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("id-F\u00c4R", "id-f\u00e4r is the id of another machine"),
        ("F\u00c4R", "another machine is called f\u00e4r"),
        ("Fa\u0308R", "another machine is called f\u00e4r"),
        (" f\u00e4r ", "another machine is called f\u00e4r"),
        ("ID-F", "the id of another machine, id-f\u00e4r, begins with it"),
        ("waiting", "a token was made for waiting and is not used yet"),
        ("LOCAL", "Local is the gateway's own machine"),
    ],
)
def test_no_machine_is_given_what_means_another_for_its_name(world, name, problem):
    """FAULTS D8, E5"""
    far = world.connect("f\u00e4r").device_id
    other = world.connect("other").device_id
    world.access.devices.create_device("waiting")  # for its machine
    with pytest.raises(moltis.RpcError, match=problem):
        moltis.free_name(world.store.devices, name, other)
    for own in ("id-f\u00e4r", "F\u00c4R"):
        assert moltis.free_name(world.store.devices, own, far) == own


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("L\u043ec\u0430l", "Local"),  # Cyrillic
        ("\u04cf\u043e\u0441\u0430\u04cf", "Local"),  # Cyrillic throughout
        ("L\u03bfc\u03b1l", "Local"),  # Greek
        ("L\u0585c\u0251l", "Local"),  # Armenian, phonetic
        ("\uff2c\uff4f\uff43\uff41\uff4c", "Local"),  # full width
        ("\U0001d40b\u24de\u217d\u00aa\u2113", "Local"),  # of mathematics, in a circle
        ("\u13de\u1d0f\u1d04\u1d00\u029f", "Local"),  # small capitals
        ("Local ", "Local"),
        ("Local\u00a0", "Local"),
        ("\u2800Local", "Local"),  # a blank of Braille
        ("Lo\u034fcal", "Local"),  # invisible
        ("Local\ufe0f", "Local"),
        ("\u3164Local", "Local"),
        ("LocaI", "Local"),
        ("loca1", "Local"),
        ("L0cal", "Local"),
        ("W\u0415B-1", "web-1"),
        ("we\u042c-1", "web-1"),
        ("web\ufe63\uff11", "web-1"),
        ("\u043a\u0438\u0435\u0432-\u0445", "\u043a\u0438\u0435\u0432-x"),
        ("\u039d\u03bfde", "node"),
        ("\u03b7\u03bfde", "node"),
        ("ser\u03bder", "server"),
        ("\u0401\u0436", "\u00eb\u0436"),
    ],
)
def test_no_machine_is_given_a_name_that_looks_like_another_s(world, name, like):
    """FAULTS D8"""
    if like != "Local":
        world.connect(like)
    other = world.connect("other").device_id
    with pytest.raises(
        moltis.RpcError, match=r"another machine is called|is the gatew"
    ):
        moltis.free_name(world.store.devices, name, other)
    # A machine that calls itself so gets another name, or keeps the one it has.
    device = world.store.devices.by_id(other, moltis.now_ms())
    params = moltis.ConnectParams(
        "node", client_id="id-other", display_name=name, named=True
    )
    assert moltis.note_presence(world.store.devices, device, params, "")
    assert world.fleet.view("id-other")["displayName"] != name
    if like == "Local":
        with pytest.raises(moltis.RpcError, match="must have 1 to 200"):
            moltis.check_node_id(name)


@pytest.mark.parametrize(
    "name",
    [
        *("Caf\u00e9", "local pi", "Locals", "web-l", "\u0141ukasz", "\u53a8\u623f"),
        "\u0421\u0435\u0440\u0432\u0435\u0440 web",
        "\u30b5\u30fc\u30d0\u30fcA",
        "\u2764\ufe0f box",
        "\u0e1a\u0e49\u0e32\u0e19",
        "\u039d\u03af\u03ba\u03b7",
    ],
)
def test_names_in_any_script_are_good_and_mean_themselves_in_any_case(world, name):
    world.connect("web-1")
    world.connect("Cafe")
    assert moltis.free_name(world.store.devices, name) == name
    node = world.connect(name)
    for reference in (name, name.upper(), name.lower()):
        assert world.fleet.resolve(reference) == (node.node_id, name)


def test_a_machine_that_calls_itself_as_another_is_told_apart(world):
    """FAULTS D8: it must neither get what is meant for that one nor block its name."""
    world.connect("pi")
    second, _ = world.access.devices.create_device("")
    params = moltis.ConnectParams(
        role="node", client_id="7f3e55aa-1", display_name="PI"
    )
    devices = world.store.devices
    for _ in range(2):  # and so each time
        device = devices.by_id(second.id, moltis.now_ms())
        assert moltis.note_presence(devices, device, params, "")
        assert world.fleet.resolve("pi") == ("id-pi", "pi")
        assert world.fleet.resolve("7f3e") == ("7f3e55aa-1", "PI 7f3e55aa")
    devices.revoke(world.devices["pi"].id, 1)
    device = devices.by_id(second.id, moltis.now_ms())
    assert moltis.note_presence(devices, device, params, "")
    assert world.fleet.resolve("pi") == ("7f3e55aa-1", "PI")


def test_a_revoked_id_is_never_that_of_another_token(world, node):
    """FAULTS D8: chats that selected it would reach another machine."""
    world.fleet.release(node)
    world.store.devices.revoke(node.device_id, 1)
    for node_id in ("id-far", "ID-FAR", "id-f", "id-far-2"):
        with pytest.raises(moltis.RpcError, match="id-far was the id of another"):
            world.connect(f"thief of {node_id}", node_id=node_id)
    with pytest.raises(moltis.RpcError, match="id-far was the id of another"):
        moltis.free_name(world.store.devices, "ID-far")


def test_an_id_that_a_device_had_before_is_never_that_of_another(world, node):
    """FAULTS, a sibling of D8: a machine that was set up anew has another id."""
    world.fleet.release(node)
    world.fleet.release(world.connect("far", node_id="second-id"))
    for node_id in ("id-far", "id-f", "id-far-2"):
        with pytest.raises(moltis.RpcError, match="id-far was the id of another"):
            world.connect(f"thief of {node_id}", node_id=node_id)
    params = moltis.ConnectParams("node", client_id="id-x", display_name="id-far")
    other = world.devices["thief of id-f"]
    assert moltis.own_name(world.store.devices, other, params) == "id-far id-x"
    with pytest.raises(moltis.RpcError, match="there is no node 'id-far'"):
        world.fleet.resolve("id-far")
    world.connect("far")  # its own
    assert world.fleet.resolve("id-far") == ("id-far", "far")


def test_ids_and_names_by_the_thousand_leave_one_row_and_one_reading(world):
    """FAULTS D13"""
    device, _ = world.access.devices.create_device("flood")
    for number in range(1000):
        params = moltis.ConnectParams(
            "node", client_id=f"id {number}", display_name=f"name {number}"
        )
        node = moltis.ConnectedNode(params.client_id, device.id, Link(), params)
        device = world.store.devices.by_id(device.id, moltis.now_ms())
        world.fleet.claim(node, device)
        assert moltis.note_presence(world.store.devices, device, params, "")
        world.fleet.activate(node)
        world.fleet.report(node, {"nodeId": node.node_id, "cpuCount": 4})
        world.fleet.release(node)
    assert [view["nodeId"] for view in world.fleet.views()] == ["local", "id 999"]
    assert world.fleet.history("id 999")
    assert len(world.store.devices.gone_ids(but="")) == 16
    for kept in (world.fleet._telemetry, world.fleet._histories):
        assert len(kept) <= 2  # one more than the machines, but for Local
    with pytest.raises(moltis.RpcError, match="there is no node 'name 1'"):
        world.fleet.resolve("name 1")


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


def test_the_last_half_hour_of_a_machine_is_kept_in_few_bytes():
    history = moltis.History()
    for n in range(1000):
        history.add(1_700_000_000_000 + n, (n % 101, None, 33.4))
    rows = history.rows()
    assert len(rows) == moltis.HISTORY_READINGS
    assert rows[-1] == [1_700_000_000_999, 999 % 101, None, 33]
    assert len(history._readings) < 1000


def test_a_report_adds_cpu_memory_and_disk_to_the_history(world, node):
    report = {"cpuUsage": 50, "mem": {"total": 10, "available": 4}}
    world.fleet.report(node, report)
    ((_, *percents),) = world.fleet.history(node.node_id)
    assert percents == [50, 60, None]
