"""The command line's side of a gateway."""

from __future__ import annotations

import contextlib
import gc
import threading
import uuid
import weakref

import pytest
from peers import InProcessGateway, silent_node
from support import free_port, process_exists, wait_for

import moltis

WINDOW = 1024 * 1024  # bytes of a stream that may be unacknowledged


@pytest.fixture
def gateway(tmp_path):
    with InProcessGateway(tmp_path / "gateway") as running:
        yield running


@contextlib.contextmanager
def remote_commands(gateway, nodes, args):
    """Commands that were asked for over a connection of their own."""
    with contextlib.closing(
        moltis.RemoteCommands(gateway.operator(), gateway.operator, nodes, args)
    ) as remote:
        remote.start()
        yield remote


def news_of(gateway, nodes, args, feed=None):
    """Run a command; return all that is heard of it."""
    heard = []
    with remote_commands(gateway, nodes, args) as remote:
        feeder = None
        if feed is not None:
            feeder = threading.Thread(target=remote.stdin.feed, args=(feed,))
            feeder.start()
        for news in remote.news():
            heard.append(news)
            if isinstance(news, moltis.RemoteOutput):
                remote.written(news, every=64 * 1024)
            elif isinstance(news, moltis.RemoteEnd):
                remote.acknowledge(news.command)
        if feeder is not None:
            feeder.join()
    return heard


def output(heard, kind=moltis.STDOUT):
    return b"".join(
        news.chunk.data
        for news in heard
        if isinstance(news, moltis.RemoteOutput) and news.chunk.kind == kind
    )


def ends(heard):
    return [news for news in heard if isinstance(news, moltis.RemoteEnd)]


def test_a_wrong_key_is_refused_and_not_repeated(gateway):
    key = "mk_" + "x" * 43
    with pytest.raises(moltis.Refused) as caught:
        moltis.OperatorClient(gateway.url, key, gateway.trust)
    assert "MOLTIS_API_KEY" in str(caught.value)
    assert key not in str(caught.value)


def test_a_gateway_that_is_not_there_is_unreachable(gateway):
    with pytest.raises(moltis.Unreachable, match="refused the connection"):
        moltis.OperatorClient(f"http://127.0.0.1:{free_port()}", "mk_x", gateway.trust)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("UNAVAILABLE", moltis.Unreachable),
        ("TIMEOUT", moltis.Unreachable),
        ("UNAUTHORIZED", moltis.Refused),
        ("FORBIDDEN", moltis.Refused),
        ("RATE_LIMITED", moltis.Refused),
        ("INVALID_REQUEST", moltis.UsageError),
        ("NOT_FOUND", moltis.UserError),
        ("SOMETHING_NEW", moltis.UserError),
    ],
)
def test_an_error_of_the_gateway_has_the_exit_status_that_fits(code, kind):
    error = moltis.user_error(moltis.RpcError(code, "why"))
    assert type(error) is kind
    assert str(error) == "why"


def test_a_call_ends_when_the_gateway_goes_away(gateway):
    with gateway.operator() as client:
        answer = client.start(
            "node.invoke",
            {
                "nodeId": "local",
                "command": "system.run",
                "args": {"command": "sleep 1000"},
            },
        )
        closer = threading.Thread(target=gateway.close)
        closer.start()
        with pytest.raises(moltis.MoltisError):
            answer.result(20)
        closer.join()
        with pytest.raises(moltis.Unreachable, match="hung up"):
            client.call("node.list", {})


def test_output_comes_in_order_and_whole(gateway):
    """Ten windows, with a reader that acknowledges as it goes."""
    count = "i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done"
    line = f"{count}; head -c 9000000 /dev/zero"
    heard = news_of(gateway, {"local": "Local"}, {"command": line})
    data = output(heard)
    numbers, zeros = data[: -9 * 10**6], data[-9 * 10**6 :]
    assert numbers == b"".join(b"%d\n" % i for i in range(20_000))
    assert zeros == bytes(9 * 10**6)
    assert ends(heard)[0].result["exitCode"] == 0


def test_one_who_does_not_read_holds_the_command_up_and_loses_nothing(gateway):
    line = {"command": "head -c 4000000 /dev/zero"}
    with remote_commands(gateway, {"local": "Local"}, line) as remote:
        news = remote.news()
        taken = []
        while sum(len(item.chunk.data) for item in taken) < WINDOW:
            taken.append(next(news))
        # Nothing was acknowledged: a window is all that may have been sent.
        assert gateway.call("node.list")
        assert remote._news.empty()
        total = sum(len(item.chunk.data) for item in taken)
        remote.written(taken[-1], every=1)
        for item in news:
            if isinstance(item, moltis.RemoteOutput):
                total += len(item.chunk.data)
                remote.written(item, every=1)
            elif isinstance(item, moltis.RemoteEnd):
                remote.acknowledge(item.command)
        assert total == 4_000_000


def test_input_goes_no_further_ahead_than_a_window(gateway):
    sent = []

    def read(size):
        data = b"x" * size if sum(sent) < 5_000_000 else b""
        sent.append(len(data))
        return data

    heard = news_of(
        gateway, {"local": "Local"}, {"command": "wc -c", "stdin": True}, feed=read
    )
    assert int(output(heard)) == sum(sent)


def test_input_is_binary_safe(gateway):
    data = bytes(range(256)) * 5000
    pieces = [data[i : i + 60_000] for i in range(0, len(data), 60_000)] + [b""]
    heard = news_of(
        gateway,
        {"local": "Local"},
        {"command": "cat", "stdin": True},
        feed=lambda size: pieces.pop(0),
    )
    assert output(heard) == data


def test_several_commands_are_one_stream_of_news(gateway):
    nodes = {"local": "Local", "nowhere": "Nowhere"}
    heard = news_of(gateway, nodes, {"command": "echo hi"})
    by_name = {end.command.name: end for end in ends(heard)}
    assert by_name["Local"].result["exitCode"] == 0
    assert "no node 'nowhere'" in str(by_name["Nowhere"].error)


@pytest.mark.parametrize(
    ("event", "payload"),
    [
        ("node.invoke.ack", {}),
        ("node.invoke.state", {"state": "running"}),
    ],
)
def test_a_node_that_has_more_input_than_it_was_sent_ends_no_other_s_command(
    gateway, tmp_path, event, payload
):
    go, nodes = tmp_path / "go", {"local": "Local", "evil": "Rust box"}
    args, ended = {"command": f"while [ ! -e {go} ]; do sleep 0.02; done"}, {}
    with silent_node(gateway, "evil") as evil, remote_commands(
        gateway, nodes, args
    ) as remote:
        asked = evil.receive_until(lambda m: m.get("event") == moltis.INVOKE_REQUEST)
        its_id = {"invokeId": asked["payload"]["invokeId"]}
        payload = {**its_id, **payload, "stdin": 7}
        evil.send({"type": "event", "event": event, "payload": payload})
        evil.request("node.invoke.result", {**its_id, "result": {"exitCode": 0}})
        for news in remote.news():
            if isinstance(news, moltis.RemoteEnd):
                remote.acknowledge(news.command)
                ended[news.command.name] = news
                go.touch()
    assert ended["Rust box"].result["exitCode"] == 0
    assert ended["Local"].result["exitCode"] == 0


def test_leaving_ends_what_was_followed(gateway, tmp_path):
    line = {"command": f"echo $$ > {tmp_path}/pid; sleep 1000"}
    with remote_commands(gateway, {"local": "Local"}, line):
        path = tmp_path / "pid"
        wait_for(lambda: path.exists() and path.read_text().strip(), what="its start")
    pid = int(path.read_text())
    wait_for(lambda: not process_exists(pid), what="its end")


def test_finished_commands_leave_nothing_with_their_connection(gateway, monkeypatch):
    peers, follow = [], moltis.OperatorPeer.follow

    def record(self, *args):
        peers.append(self)
        follow(self, *args)

    monkeypatch.setattr(moltis.OperatorPeer, "follow", record)
    with remote_commands(gateway, {"local": "Local"}, {"command": "echo hi"}) as remote:
        for news in remote.news():
            if isinstance(news, moltis.RemoteOutput):
                remote.written(news, every=1)
            elif isinstance(news, moltis.RemoteEnd):
                remote.acknowledge(news.command)
        assert len(peers) == 1
        wait_for(lambda: not peers[0]._followed, what="nothing to follow")


def test_a_caller_who_comes_back_often_leaves_no_connections(gateway, monkeypatch):
    peers, follow = [], moltis.OperatorPeer.follow

    def record(self, *args):
        peers.append(weakref.ref(self))
        follow(self, *args)

    def left():
        gc.collect()
        return sum(peer() is not None for peer in peers)

    monkeypatch.setattr(moltis.OperatorPeer, "follow", record)
    invoke_id = str(uuid.uuid4())
    params = {
        "nodeId": "local",
        "command": "system.run",
        "args": {"command": "sleep 1000", "stream": True},
        "invokeId": invoke_id,
    }
    for number in range(1, 6):
        client = gateway.operator()
        client.start("node.invoke", params)
        wait_for(lambda n=number: len(peers) == n, what="the command to be followed")
        client.drop()
    wait_for(lambda: left() <= 1, what="all but the last to be forgotten")
    gateway.call("node.invoke.cancel", invokeId=invoke_id)


@pytest.mark.parametrize("args", [{"command": "rm \udcff\udcfe"}, {"cwd": "/\udcff"}])
def test_what_is_not_utf_8_is_refused_and_not_changed(gateway, args):
    """As `?` a shell would take it for any character."""
    with gateway.operator() as client, pytest.raises(moltis.UsageError, match="UTF-8"):
        client.start("node.invoke", {"nodeId": "local", "args": args})


def test_what_is_said_in_a_chat_is_not_changed_either(gateway):
    with gateway.operator() as client, pytest.raises(moltis.UsageError, match="UTF-8"):
        client.call("chat.send", {"sessionKey": "main", "text": "rm \udcff"})
