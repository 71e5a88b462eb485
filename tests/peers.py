"""Gateways within the test's process, and peers that speak by hand."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from unittest import mock

from support import wait_for

import moltis


def raw_frame(opcode, payload=b"", *, fin=True, masked=False):
    """Return a frame, which may be a fragment (RFC 6455 §5.4)."""
    data = moltis.encode_frame(opcode, payload, masked=masked)
    return data if fin else bytes((data[0] & 0x7F,)) + data[1:]


class InProcessGateway:
    """A real gateway on a free port of 127.0.0.1, its database in `directory`."""

    def __init__(self, directory, *, environ=os.environ, **options):
        self.environ = {**environ, "MOLTIS_DATA_DIR": str(directory)}
        self.directory = directory
        options = moltis.GatewayOptions(**{"port": 0, **options})
        self.running = moltis.RunningGateway(self.environ, options)
        self.url = self.running.url
        self.websocket_url = moltis.websocket_url(self.url)
        file = moltis.GatewayFile.load(directory)
        self.api_key = file.api_key
        self.trust = moltis.TlsTrust(file.fingerprint)

    def operator(self, on_news=moltis.ignore_news):
        """Return a client that is signed in with the gateway's own key."""
        return moltis.OperatorClient(self.url, self.api_key, self.trust, on_news)

    def call(self, method, **params):
        """Make one call over a connection of its own."""
        with self.operator() as client:
            return client.call(method, params)

    def token(self, name=""):
        return self.call("device.token.create", displayName=name)["deviceToken"]

    def node(self, name="far", token=None, environ=None, **settings):
        """Return a real node that is connected to this gateway."""
        settings = moltis.NodeSettings(
            gateway_url=self.websocket_url,
            device_token=token or self.token(name),
            node_id=settings.pop("node_id", f"id-of-{name}"),
            display_name=name,
            **settings,
        )
        node = InProcessNode(settings, environ or self.environ)
        wait_for(
            lambda: self.is_connected(settings.node_id), what="the node to connect"
        )
        return node

    def is_connected(self, node_id):
        nodes = {node["nodeId"]: node for node in self.call("node.list")}
        return node_id in nodes and nodes[node_id]["connected"]

    def peer(self):
        return RawPeer(self.websocket_url)

    def close(self):
        self.running.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class InProcessNode:
    """A real node agent in a thread of the test's process."""

    def __init__(self, settings, environ):
        self.states = []
        self.settings = settings
        self.running = moltis.RunningNode(
            settings, environ, lambda connected, error: self.states.append(connected)
        )

    def close(self):
        self.running.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class RawPeer:
    """A WebSocket client whose every envelope is written out in the test."""

    def __init__(self, url, trust=None, headers=()):
        real = moltis.upgrade_request
        more = "".join(f"{name}: {value}\r\n" for name, value in headers).encode()

        def request(*args):
            return real(*args)[:-2] + more + b"\r\n"

        with mock.patch.object(moltis, "upgrade_request", request):
            self.ws = moltis.connect(url, trust)

    def send(self, value):
        self.ws.send(value if isinstance(value, (str, bytes)) else json.dumps(value))

    def ping(self, payload):
        """Send a Ping; nothing else may wait to be sent."""
        self.ws._channel.sock.sendall(raw_frame(0x9, payload, masked=True))

    def receive(self, timeout=60):
        """Return the next message: an envelope, bytes, or None after a close."""
        message = self.ws.receive(timeout)
        return json.loads(message) if isinstance(message, str) else message

    def receive_until(self, wanted, timeout=60):
        """Return the first message for which `wanted(message)`, and drop the others."""
        while True:
            message = self.receive(timeout)
            assert message is not None, "the gateway hung up"
            if wanted(message):
                return message

    def request(self, method, params, request_id=None):
        """Return the answer to one request."""
        request_id = request_id or str(uuid.uuid4())
        self.send({"type": "req", "id": request_id, "method": method, "params": params})
        return self.receive_until(
            lambda m: isinstance(m, dict) and m.get("id") == request_id
        )

    def close_code(self):
        """Read to the end of the connection; return the code it was closed with."""
        with contextlib.suppress(moltis.ConnectionClosed):
            while self.ws.receive(30) is not None:
                pass
        return self.ws.close_code

    def close(self):
        self.ws.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def rust_connect(token, node_id="rust-1", **changes):
    """Return the params of `connect` as a node of the original Moltis sends them."""
    return {
        "protocol": {"min": 4, "max": 4},
        "client": {
            "id": node_id,
            "displayName": "Rust box",
            "version": "0.10.18",
            "platform": "linux",
            "mode": "headless",
        },
        "role": "node",
        "auth": {"deviceToken": token, "publicKey": "cHVibGljIGtleQ=="},
        "extensions": {
            "moltis": {
                "caps": ["exec"],
                "commands": ["system.run", "system.which", "system.providers"],
            }
        },
        **changes,
    }


@contextlib.contextmanager
def silent_node(gateway, node_id="gone"):
    """A node that takes commands, called "Rust box", and does nothing about them."""
    with gateway.peer() as peer:
        caps = [*moltis.MACHINE_CAPABILITIES, moltis.CAP_TERMINAL]
        extensions = {"moltis": {"caps": caps}}
        params = rust_connect(gateway.token(), node_id, extensions=extensions)
        assert peer.request("connect", params)["ok"]
        yield peer


@contextlib.contextmanager
def other_node(world, name, **settings):
    """A node beside the one of the world, with settings of its own."""
    token = world.rpc("device.token.create", displayName=name)["deviceToken"]
    settings = moltis.NodeSettings(
        gateway_url=f"ws{world.direct_url[4:]}/ws",
        device_token=token,
        node_id=f"id-of-{name}",
        display_name=name,
        **settings,
    )
    environ = {**os.environ, "MOLTIS_DATA_DIR": str(world.scratch / "data")}
    with InProcessNode(settings, environ) as node:
        try:
            wait_for(lambda: True in node.states, what="the node to connect")
            yield
        finally:
            revoke(world, f"id-of-{name}")


def revoke(world, node_id):
    for device in world.rpc("device.pair.list"):
        if device["nodeId"] == node_id:
            world.rpc("device.token.revoke", deviceId=device["deviceId"])
