"""A fleet in the test's process: each node is this machine, in another environment."""

from __future__ import annotations

import os

import moltis


class NodeInProcess(moltis.LocalLink):
    """A node without a connection: the gateway calls its Machine."""

    def __init__(self, node_id, **options):
        environ = {**os.environ, "NODE": node_id}
        self.machine = moltis.Machine(
            moltis.MachineOptions(environ=environ, inventory=None, **options)
        )
        super().__init__(self.machine)
        self.node_id = node_id


class Machines:
    """Store, Fleet and Jobs with Local and, as they are added, nodes."""

    def __init__(self, directory):
        self.directory = directory
        self.announced = []  # (event, payload)
        self.store = moltis.Store(directory / "moltis.db")
        self._links = []
        local = self._node("local", "")
        self.fleet = moltis.Fleet(
            self.store.devices, local, lambda *event: self.announced.append(event)
        )
        self.jobs = moltis.Jobs(self.store.jobs, self.fleet, directory / "jobs")
        self.fleet.activate(local)
        local.link.attach(self.jobs)

    def _node(self, node_id, device_id, **options):
        link = NodeInProcess(node_id, **options)
        self._links.append(link)
        params = moltis.ConnectParams(
            role="node", capabilities=link.machine.capabilities, platform="linux"
        )
        return moltis.ConnectedNode(node_id, device_id, link, params)

    def know(self, node_id, name):
        """Add a node that is offline; return its device."""
        device, _ = moltis.Access(self.store).devices.create_device(name)
        params = moltis.ConnectParams(
            "node", client_id=node_id, display_name=name, platform="linux"
        )
        self.store.devices.connect(device.id, params, "", moltis.now_ms())
        return self.store.devices.by_node_id(node_id, moltis.now_ms())

    def connect(self, node_id, name, **options):
        """Add a node that is connected."""
        device = self.know(node_id, name)
        node = self._node(node_id, device.id, **options)
        self.fleet.claim(node, device)
        self.fleet.activate(node)
        node.link.attach(self.jobs)
        return node

    def close(self):
        self.jobs.close()
        for link in self._links:
            link.machine.close()
        self.store.close()
