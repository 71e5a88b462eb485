"""Measure moltis beside what people would use instead.

python3 tests/bench.py [--quick] [--only NAME] [--json] [--beside DIRECTORY]

Every row is a ratio, or a limit, measured in one run: both sides in turn, several
rounds, the median of each.  What is not installed is named in its row.  With --beside
another version (a directory with its moltis.py and install.sh) is a peer of each row,
driven by its own client.
Other peers: `pip install websockets paramiko ansible-core`; sshd, ssh, chromium.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import importlib.util
import inspect
import json
import os
import pty
import re
import resource
import secrets
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import moltis  # noqa: E402  found by the line above

TRUE = ["sh", "-c", "true"]


class NotMeasured(Exception):
    """A row cannot be measured here; the message says what is missing."""


@dataclass(frozen=True)
class Goal:
    """What a row is held to."""

    text: str
    met: Callable[[float, float], bool | None]


def at_most(factor: float, plus: float = 0.0) -> Goal:
    """At most `factor` times the peer, and `plus` in the row's unit."""
    text = f"≤ {factor:g} ×" + (f" + {plus:g}" if plus else "")
    return Goal(text, lambda ours, peer: ours <= factor * peer + plus)


def faster(times: float) -> Goal:
    """At least so many times faster than the peer, for what takes time."""
    return Goal(f"≥ {times:g} × faster", lambda ours, peer: peer >= times * ours)


def at_least(factor: float) -> Goal:
    """At least `factor` times the peer, for what there should be much of."""
    return Goal(f"≥ {factor:g} ×", lambda ours, peer: ours >= factor * peer)


NO_GOAL = Goal("", lambda ours, peer: None)
NOT_SLOWER = at_most(1.05)
AS_MANY = at_least(0.95)


def limit(most: float, unit: str) -> Goal:
    return Goal(f"≤ {most:g} {unit}", lambda ours, _: ours <= most)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    what: str
    unit: str = ""
    ours: float | None = None
    beside: str = ""
    peer: float | None = None
    goal: str = ""
    met: bool | None = None
    not_measured: str = ""

    @property
    def ratio(self) -> float | None:
        return self.ours / self.peer if self.ours and self.peer else None


@dataclass(frozen=True)
class Peer:
    """What ours is measured beside in one row."""

    name: str
    measure: Callable[[], float] | None
    goal: Goal
    missing: str = ""


def rows_for(
    name: str,
    what: str,
    unit: str,
    ours: Callable[[], float],
    peers: list[Peer],
    rounds: int,
) -> Iterator[Row]:
    """Measure ours and its peers in turn; yield a row for each peer."""
    samples: dict[str, list[float]] = {"": []}
    for number in range(rounds + 1):
        values = {"": ours()}
        for peer in peers:
            if peer.measure is not None:
                values[peer.name] = peer.measure()
        if number:  # the first round warms everything up
            for key, value in values.items():
                samples.setdefault(key, []).append(value)
    middle = statistics.median(samples[""])
    for peer in peers:
        if peer.measure is None:
            yield Row(name, what, not_measured=peer.missing, goal=peer.goal.text)
            continue
        other = statistics.median(samples[peer.name])
        met = peer.goal.met(middle, other)
        yield Row(name, what, unit, middle, peer.name, other, peer.goal.text, met)


def limit_row(name: str, what: str, unit: str, value: float, goal: Goal) -> Row:
    return Row(name, what, unit, value, goal=goal.text, met=goal.met(value, 0))


def timed(action: Callable[[], object]) -> float:
    """Return the milliseconds that `action` takes."""
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1000


def median_of(action: Callable[[], object], count: int) -> float:
    return statistics.median(timed(action) for _ in range(count))


def wait_until(condition: Callable[[], Any], timeout: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise NotMeasured("it did not get ready in time")
        time.sleep(0.02)


# -- ours ----------------------------------------------------------------------


def moltis_of(source: Path) -> Any:
    """Return the module that is the moltis.py of a directory."""
    if source.resolve() == ROOT:
        return moltis
    name = "the_other_moltis"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, source / "moltis.py")
        assert spec is not None
        assert spec.loader is not None
        # Known before it runs: its dataclasses look their module up.
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


class Installed:
    """An installed moltis, a gateway, and as many nodes as asked for."""

    def __init__(self, directory: Path, source: Path = ROOT) -> None:
        self.source = source
        self.moltis = moltis_of(source)
        self.home = directory / "home"
        self.home.mkdir()
        self.program = str(directory / "prefix/bin/moltis")
        # What is measured is what a user gets: started from its compiled form.
        self.run("sh", str(source / "install.sh"), "--prefix", f"{directory}/prefix")
        # The interpreter that the installed command uses, without its program.
        launcher = Path(self.program).read_text()
        self.python = re.search(r"exec '?([^' ]+)", launcher)[1]  # type: ignore[index]
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []
        self.gateway = self.start_gateway()

    def environ(self, home: Path | None = None) -> dict[str, str]:
        path = os.environ.get("PATH", "/usr/bin:/bin")
        return {"HOME": str(home or self.home), "PATH": path, "LANG": "C.UTF-8"}

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=self.environ()
        )
        if done.returncode:
            raise NotMeasured(f"{command[0]} failed: {done.stderr.strip()[-200:]}")
        return done.stdout

    def start(
        self, *arguments: str, home: Path | None = None
    ) -> subprocess.Popen[bytes]:
        log = (self._directory / "log").open("ab")
        process = subprocess.Popen(
            [self.program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=self.environ(home),
        )
        log.close()
        self._processes.append(process)
        return process

    def start_gateway(self, port: int = 0) -> subprocess.Popen[bytes]:
        file = self.home / ".moltis/gateway.json"
        process = self.start("gateway", "--port", str(port))

        def is_up() -> bool:
            try:
                return bool(json.loads(file.read_text())["pid"] == process.pid)
            except (OSError, ValueError):
                return False

        wait_until(is_up)
        settings = json.loads(file.read_text())
        self.url, self.api_key = settings["url"], settings["api_key"]
        return process

    def operator(self) -> Any:
        trust = self.moltis.TlsTrust()
        return self.moltis.OperatorClient(self.url, self.api_key, trust)

    def add_node(self, name: str) -> subprocess.Popen[bytes]:
        """Return the process of a node that runs as the service would run it."""
        home = self._directory / name
        home.mkdir()
        with self.operator() as client:
            made = client.call("device.token.create", {"displayName": name})
        url = self.moltis.websocket_url(self.url)
        self.moltis.NodeSettings(
            url, made["deviceToken"], str(uuid.uuid4()), name
        ).save(home / ".moltis")
        process = self.start("node", "run", home=home)

        def is_connected() -> bool:
            with self.operator() as client:
                nodes = client.call("node.list", {})
            return any(n["displayName"] == name and n["connected"] for n in nodes)

        wait_until(is_connected)
        return process

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def close(self) -> None:
        for process in reversed(self._processes):
            if process.poll() is None:
                self.stop(process)


class PlainOperator:
    """An operator's connection as a script of twenty lines has it: one thread."""

    def __init__(self, site: Installed) -> None:
        self._moltis = site.moltis
        connect = site.moltis.connect
        # Where there is compression it is asked for, though no client of ours does.
        if "compression" in inspect.signature(connect).parameters:
            connect = partial(connect, compression=False)
        self._ws = connect(site.moltis.websocket_url(site.url))
        params = site.moltis.ConnectParams(role="operator", api_key=site.api_key)
        self._ask("connect", params.to_json())
        self.receive()

    def ask_for_true(self, node: str) -> None:
        args = {"command": "true"}
        params = {"nodeId": node, "command": "system.run", "args": args}
        self._ask("node.invoke", params)

    def receive(self) -> Any:
        """Return the payload of the next answer."""
        while True:
            envelope = self._moltis.decode_envelope(self._ws.receive())
            if isinstance(envelope, self._moltis.Response):
                if envelope.error is not None:
                    raise envelope.error
                return envelope.payload

    def run_true(self, node: str) -> None:
        self.ask_for_true(node)
        assert self.receive()["exitCode"] == 0

    def chat(self, text: str, session: str) -> None:
        """Say something to Shell, and wait for the end of the turn."""
        self._ask("chat.send", {"sessionKey": session, "text": text, "model": "shell"})
        while True:
            envelope = self._moltis.decode_envelope(self._ws.receive())
            payload = getattr(envelope, "payload", None)
            if isinstance(payload, dict) and payload.get("state") == "final":
                return

    def call(self, method: str, params: Any) -> Any:
        self._ask(method, params)
        return self.receive()

    def close(self) -> None:
        self._ws.close()

    def _ask(self, method: str, params: Any) -> None:
        request = self._moltis.Request(self._moltis.new_id(), method, params)
        self._ws.send(self._moltis.encode_envelope(request))


# -- peers ---------------------------------------------------------------------


class Ssh:
    """An sshd of our own on this machine, with a warm ControlMaster connection."""

    def __init__(self, directory: Path) -> None:
        sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.defpath)
        if sshd is None or shutil.which("ssh") is None:
            raise NotMeasured("sshd is not installed")
        directory.mkdir(mode=0o700)
        for name in ("host", "user"):
            path = str(directory / name)
            quiet = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path]
            subprocess.run(quiet, check=True)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        self.key = directory / "user"
        self.directory = directory
        (directory / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {directory}/host\n"
            f"AuthorizedKeysFile {directory}/user.pub\nStrictModes no\nUsePAM no\n"
            "MaxSessions 100\nMaxStartups 100\nPidFile none\n"
            "Subsystem sftp internal-sftp\n"  # for scp
            # What a shell reads in this machine's HOME is not OpenSSH's time.
            f"SetEnv HOME={directory}\n"
        )
        self.config = directory / "ssh_config"
        hosts = " ".join(["bench", *(f"bench{n}" for n in range(20))])
        self.config.write_text(
            f"Host {hosts}\n  HostName 127.0.0.1\n  Port {self.port}\n"
            f"  User {getpass.getuser()}\n  IdentityFile {directory}/user\n"
            "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
            f"  LogLevel ERROR\n  ControlPath {directory}/%n\n  ControlPersist 600\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            [sshd, "-D", "-f", str(directory / "sshd_config")],
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: self.call("true", fresh=True) == 0, 20)
        self.warm("bench")

    def command(self, *words: str, fresh: bool = False) -> list[str]:
        master = "no" if fresh else "auto"
        path = ["-o", "ControlPath=none"] if fresh else []
        options = ["-o", f"ControlMaster={master}", *path]
        return ["ssh", "-F", str(self.config), *options, "bench", *words]

    def warm(self, host: str) -> None:
        command = ["ssh", "-F", str(self.config), "-o", "ControlMaster=auto", host]
        subprocess.run(
            [*command, "true"], check=True, stderr=subprocess.DEVNULL, timeout=30
        )

    def call(self, *words: str, fresh: bool = False) -> int:
        done = subprocess.run(
            self.command(*words, fresh=fresh),
            check=False,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return done.returncode

    def true(self, *, fresh: bool = False) -> None:
        if self.call("true", fresh=fresh):
            raise NotMeasured("ssh failed")

    def close(self) -> None:
        for path in self.directory.glob("bench*"):
            exit_master = ["ssh", "-F", str(self.config), "-O", "exit", path.name]
            subprocess.run(exit_master, check=False, stderr=subprocess.DEVNULL)
        self._process.terminate()
        self._process.wait()


class Bench:
    """What the rows share; made when the first of them needs it."""

    def __init__(self, directory: Path, *, quick: bool, beside: Path | None) -> None:
        self.quick = quick
        self.beside = beside  # another version of moltis
        self.rounds = 3 if quick else 7
        self._directory = directory
        self._made: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()

    def count(self, full: int) -> int:
        return max(5, full // 5) if self.quick else full

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            try:
                self._made[name] = make()
                self._stack.callback(getattr(self._made[name], "close", lambda: None))
            except NotMeasured as error:
                self._made[name] = error
        if isinstance(self._made[name], NotMeasured):
            raise self._made[name]
        return self._made[name]

    def directory(self, name: str) -> Path:
        path = self._directory / name
        path.mkdir(exist_ok=True)
        return path

    @property
    def ours(self) -> Installed:
        made = self._once("ours", lambda: Installed(self.directory("ours")))
        assert isinstance(made, Installed)
        return made

    @property
    def node(self) -> Any:
        """The process of a node that is called bench."""
        return self._once("node", lambda: self.ours.add_node("bench"))

    @property
    def client(self) -> Any:
        assert self.node
        return self._once("client", lambda: PlainOperator(self.ours))

    @property
    def other(self) -> Installed:
        """The other version of moltis, with a node that is called bench."""

        def make() -> Installed:
            assert self.beside is not None
            site = Installed(self.directory("other"), self.beside)
            site.add_node("bench")
            return site

        made = self._once("other", make)
        assert isinstance(made, Installed)
        return made

    def other_peers(
        self, measure: Callable[[Installed], float], goal: Goal
    ) -> list[Peer]:
        """Return the other version as a peer, if there is one."""
        if self.beside is None:
            return []
        other = self.other
        return [Peer("the other moltis", lambda: measure(other), goal)]

    def other_client(self, site: Installed) -> Any:
        return self._once("other client", lambda: PlainOperator(site))

    @property
    def ssh(self) -> Ssh:
        made = self._once("ssh", lambda: Ssh(self._directory / "ssh"))
        assert isinstance(made, Ssh)
        return made

    def ssh_peer(self, name: str, measure: Callable[[Ssh], float], goal: Goal) -> Peer:
        try:
            ssh = self.ssh
        except NotMeasured as error:
            return Peer(name, None, goal, str(error))
        return Peer(name, lambda: measure(ssh), goal)

    def close(self) -> None:
        self._stack.close()


def spawn_true() -> None:
    process = subprocess.Popen(
        TRUE,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.communicate()


# -- rows: commands ------------------------------------------------------------


def bench_round_trip(bench: Bench) -> Iterator[Row]:
    """`true` on a node, one after another."""
    client, count = bench.client, bench.count(200)

    def ours() -> float:
        return median_of(lambda: client.run_true("bench"), count)

    def others(site: Installed) -> float:
        client = bench.other_client(site)
        return median_of(lambda: client.run_true("bench"), count)

    peers = [
        *bench.other_peers(others, NOT_SLOWER),
        Peer("local Popen", lambda: median_of(spawn_true, count), at_most(1.2, 0.3)),
        bench.ssh_peer(
            "ssh, ControlMaster",
            lambda ssh: median_of(ssh.true, count // 5),
            faster(5),
        ),
        bench.ssh_peer(
            "ssh, fresh",
            lambda ssh: median_of(lambda: ssh.true(fresh=True), 3),
            faster(80),
        ),
        *_paramiko_peers(bench, count // 5),
    ]
    what = "`true` on a node, one after another, p50"
    yield from rows_for("round-trip", what, "ms", ours, peers, bench.rounds)


def _paramiko_peers(bench: Bench, count: int) -> list[Peer]:
    names = (("paramiko", False, faster(15)), ("paramiko, no delay", True, faster(1.3)))
    try:
        import paramiko

        ssh = bench.ssh
    except ImportError:
        missing = "paramiko is not installed"
        return [Peer(name, None, goal, missing) for name, _, goal in names]
    except NotMeasured as error:
        return [Peer(name, None, goal, str(error)) for name, _, goal in names]

    def connection(no_delay: bool) -> Any:
        client = paramiko.SSHClient()
        client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
        client.connect(
            "127.0.0.1",
            ssh.port,
            getpass.getuser(),
            key_filename=str(ssh.key),
            allow_agent=False,
            look_for_keys=False,
        )
        if no_delay:
            client.get_transport().sock.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
            )
        bench._stack.callback(client.close)
        return client

    def call(client: Any) -> None:
        client.exec_command("true")[1].channel.recv_exit_status()

    def peer(name: str, client: Any, goal: Goal) -> Peer:
        return Peer(name, lambda: median_of(lambda: call(client), count), goal)

    return [peer(name, connection(no_delay), goal) for name, no_delay, goal in names]


def bench_in_flight(bench: Bench) -> Iterator[Row]:
    """32 commands in flight."""
    count = bench.count(800)

    def flight(client: Any) -> float:
        start = time.perf_counter()
        for _ in range(32):
            client.ask_for_true("bench")
        for _ in range(count - 32):
            client.receive()
            client.ask_for_true("bench")
        for _ in range(32):
            client.receive()
        return count / (time.perf_counter() - start)

    def floor() -> float:
        with ThreadPoolExecutor(8) as pool:
            start = time.perf_counter()
            for future in [pool.submit(spawn_true) for _ in range(count)]:
                future.result()
            return count / (time.perf_counter() - start)

    def over_ssh(ssh: Ssh) -> float:
        few = max(32, count // 10)
        with ThreadPoolExecutor(32) as pool:
            start = time.perf_counter()
            for future in [pool.submit(ssh.true) for _ in range(few)]:
                future.result()
            return few / (time.perf_counter() - start)

    def others(site: Installed) -> float:
        return flight(bench.other_client(site))

    peers = [
        *bench.other_peers(others, AS_MANY),
        Peer("local Popen, 8 threads", floor, at_least(0.75)),
        bench.ssh_peer("ssh, ControlMaster", over_ssh, at_least(10)),
    ]
    what = "32 in flight, commands per second"
    ours = partial(flight, bench.client)
    yield from rows_for("in-flight", what, "/s", ours, peers, bench.rounds)


def bench_exec(bench: Bench) -> Iterator[Row]:
    """`moltis node exec` as an installed command, start to exit."""
    ours_, count = bench.ours, bench.count(15)
    assert bench.node

    def exec_true(site: Installed) -> float:
        words = (site.program, "node", "exec", "bench", "--", "true")
        return median_of(lambda: site.run(*words), count)

    ours = partial(exec_true, ours_)
    peers = [
        *bench.other_peers(exec_true, NOT_SLOWER),
        bench.ssh_peer(
            "ssh, fresh",
            lambda ssh: median_of(lambda: ssh.true(fresh=True), 3),
            at_most(0.4),
        ),
        bench.ssh_peer(
            "ssh, ControlMaster",
            lambda ssh: median_of(ssh.true, count),
            at_most(5),
        ),
    ]
    what = "`moltis node exec bench -- true`, start to exit"
    yield from rows_for("exec", what, "ms", ours, peers, bench.rounds)


def bench_all(bench: Bench) -> Iterator[Row]:
    """One command on 20 nodes."""
    ours_ = bench.ours

    def nodes() -> list[Any]:
        return [ours_.add_node(f"of-20-{number}") for number in range(20)]

    processes = bench._once("twenty", nodes)

    def ours() -> float:
        return timed(
            lambda: ours_.run(ours_.program, "node", "exec", "--all", "--", "true")
        )

    goal = faster(20)
    peer = Peer("ansible", None, goal, "ansible is not installed")
    if shutil.which("ansible"):
        peer = bench.ssh_peer("ansible", _ansible, goal)
    what = "`--all -- true` over 20 nodes"
    yield from rows_for("all", what, "ms", ours, [peer], min(bench.rounds, 3))
    for process in processes:
        ours_.stop(process)


def _ansible(ssh: Ssh) -> float:
    inventory = ssh.directory / "inventory"
    inventory.write_text("\n".join(f"bench{number}" for number in range(20)))
    for number in range(20):
        ssh.warm(f"bench{number}")
    command = ["ansible", "all", "-i", str(inventory), "-m", "raw", "-a", "true"]
    options = f"-F {ssh.config} -o ControlMaster=auto -o ControlPath={ssh.directory}/%n"
    environ = {**os.environ, "ANSIBLE_SSH_ARGS": options}

    def call() -> None:
        try:
            subprocess.run(
                [*command, "-f", "20"],
                check=True,
                env=environ,
                stdout=subprocess.DEVNULL,
            )
        except subprocess.CalledProcessError as error:
            raise NotMeasured("ansible failed") from error

    return timed(call)


def bench_output(bench: Bench) -> Iterator[Row]:
    """A large output into a file."""
    ours_ = bench.ours
    assert bench.node
    size = (50 if bench.quick else 200) * 1000 * 1000
    source, target = bench.directory("output") / "source", os.devnull
    if not source.exists():
        block = secrets.token_bytes(1000 * 1000)
        with source.open("wb") as file:
            for _ in range(size // len(block)):
                file.write(block)

    def speed(command: list[str], site: Installed = ours_) -> float:
        with open(target, "wb") as file:
            taken = timed(
                lambda: subprocess.run(
                    command, check=True, stdout=file, env=site.environ()
                )
            )
        return size / taken / 1000  # MB/s

    def exec_cat(site: Installed) -> float:
        words = [site.program, "node", "exec", "bench", "--", f"cat {source}"]
        return speed(words, site)

    peers = [
        *bench.other_peers(exec_cat, AS_MANY),
        bench.ssh_peer(
            "ssh, ControlMaster",
            lambda ssh: speed(ssh.command("cat", str(source))),
            at_least(0.7),
        ),
    ]
    what = f"{size // 1000_000} MB of output through `node exec`"
    yield from rows_for(
        "output", what, "MB/s", lambda: exec_cat(ours_), peers, min(bench.rounds, 3)
    )


# -- rows: files ---------------------------------------------------------------


class Copies:
    """Copies on this machine, and what our gateway and node need meanwhile."""

    def __init__(self, bench: Bench) -> None:
        assert bench.node
        self.site = bench.ours
        self.place = bench.directory("files")
        self._pids = {"gateway": self.site.gateway.pid, "node": bench.node.pid}
        self._rest = {name: resident(pid) for name, pid in self._pids.items()}
        self._most = dict(self._rest)

    @property
    def grown(self) -> dict[str, float]:
        """MiB above rest, at most, by process."""
        return {name: self._most[name] - self._rest[name] for name in self._pids}

    def seconds(self, command: list[str]) -> float:
        # Not deleted: for 5 s ext4 looks for other inodes, which takes 1 ms a file.
        with contextlib.suppress(FileNotFoundError):
            (self.place / "copied").rename(self.place / secrets.token_hex(8))
        begin = time.perf_counter()
        process = subprocess.Popen(command, env=self.site.environ())
        while process.poll() is None:
            for name, pid in self._pids.items():
                self._most[name] = max(self._most[name], resident(pid))
            time.sleep(0.02)
        if process.returncode:
            raise NotMeasured(f"{command[0]} failed")
        return time.perf_counter() - begin

    def ours(self, *words: str) -> float:
        return self.seconds([self.site.program, "node", "cp", *words])

    def scp(self, ssh: Ssh, *words: str) -> float:
        return self.seconds(["scp", "-q", "-F", str(ssh.config), *words])


def bench_files(bench: Bench) -> Iterator[Row]:
    """Files to a node and from it, beside scp."""
    copies, rounds = Copies(bench), min(bench.rounds, 3) if bench.quick else 1
    place = copies.place
    size, count = (64, 2000) if bench.quick else (1024, 10_000)
    with (place / "big").open("wb") as file:
        for _ in range(size):
            file.write(secrets.token_bytes(2**20))
    (place / "small").mkdir()
    for one in range(count):
        (place / "small" / str(one)).write_bytes(bytes(1024))
    ways = {
        "to a node": (f"{place}/big", f"bench:{place}/up"),
        "from a node": (f"bench:{place}/big", f"{place}/down"),
    }
    rate = size * 2**20 / 1e6  # MB/s of a copy that takes a second
    for way, ends in ways.items():
        scp = bench.ssh_peer(
            "scp",
            lambda ssh, ends=ends: rate / copies.scp(ssh, *ends),  # type: ignore[misc]
            at_least(0.5),
        )
        yield from rows_for(
            "files",
            f"{size} MiB {way}, `node cp`",
            "MB/s",
            lambda ends=ends: rate / copies.ours(*ends),  # type: ignore[misc]
            [scp],
            rounds,
        )
    tree = ("-r", f"{place}/small", f"bench:{place}/copied")
    scp = bench.ssh_peer("scp -r", lambda ssh: copies.scp(ssh, *tree), faster(2))
    what = f"{count:,} files of 1 KiB to a node, `node cp -r`"
    yield from rows_for("files", what, "s", lambda: copies.ours(*tree), [scp], 1)
    for name, grown in copies.grown.items():
        what = f"memory of the {name} above rest, in copies"
        yield limit_row("files", what, "MiB", grown, limit(8, "MiB"))


# -- rows: terminals -----------------------------------------------------------


@contextlib.contextmanager
def on_terminal(command: list[str], env: dict[str, str]) -> Iterator[int]:
    """Run a command on a terminal of its own; yield our end of it."""
    pid, master = pty.fork()
    if pid == 0:
        os.execvpe(command[0], command, {**env, "TERM": "xterm"})
    try:
        yield master
    finally:
        os.close(master)  # hangs up
        os.waitpid(pid, 0)


def read_until(master: int, text: bytes) -> int:
    """Return how many bytes came, up to `text` or the end."""
    count, last = 0, b""
    while text not in last:
        try:
            data = os.read(master, 65536)
        except OSError:  # the end, on Linux
            break
        if not data:
            break
        count, last = count + len(data), last[-len(text) :] + data
    return count


def bench_terminal(bench: Bench) -> Iterator[Row]:
    """A terminal on a node, beside `ssh -t`."""
    ours_ = bench.ours
    assert bench.node
    environ = ours_.environ()
    shell = [ours_.program, "node", "shell", "bench", "--"]

    def key_to_echo(command: list[str], share: float) -> float:
        times = []
        with on_terminal(
            [*command, "stty raw -echo; printf RE''ADY; cat"], environ
        ) as us:
            read_until(us, b"READY")
            for _ in range(bench.count(500)):
                begun = time.perf_counter()
                os.write(us, b"x")
                read_until(us, b"x")
                times.append(time.perf_counter() - begun)
        return sorted(times)[int(len(times) * share)] * 1000

    for name, share in (("p50", 0.5), ("p99", 0.99)):
        yield from rows_for(
            "terminal",
            f"from key to echo in `node shell`, {name}",
            "ms",
            partial(key_to_echo, shell, share),
            [
                bench.ssh_peer(
                    "ssh -t, ControlMaster",
                    lambda ssh, share=share: key_to_echo(ssh.command("-tt"), share),
                    at_most(1.5),
                )
            ],
            bench.rounds,
        )

    size = (10 if bench.quick else 100) * 1000 * 1000
    source = bench.directory("terminal") / "text"
    line = b"%078d\n"
    with source.open("wb") as file:
        file.writelines(line % number for number in range(size // 79))

    def speed(command: list[str]) -> float:
        with on_terminal([*command, f"cat {source}"], environ) as us:
            begun = time.perf_counter()
            count = read_until(us, b"no such bytes")
            return count / (time.perf_counter() - begun) / 1e6

    yield from rows_for(
        "terminal",
        f"`cat` of {size // 1000_000} MB of text in `node shell`",
        "MB/s",
        partial(speed, shell),
        [
            bench.ssh_peer(
                "ssh -t, ControlMaster",
                lambda ssh: speed(ssh.command("-tt")),
                at_least(0.4),
            )
        ],
        min(bench.rounds, 3),
    )

    spec = {"command": "cat", "tty": {"rows": 24, "cols": 80}}
    before = resident(bench.node.pid)
    ids = [str(uuid.uuid4()) for _ in range(10)]
    with ours_.operator() as client:
        jobs = [{"id": job_id, "node": "bench"} for job_id in ids]
        request = {"jobs": jobs, "work": "run", "spec": spec, "keep": True}
        client.call("job.start", request)
        time.sleep(3)
        each = (resident(bench.node.pid) - before) / len(ids)
        for job_id in ids:
            client.call("job.cancel", {"id": job_id})
    what = "each of ten idle terminals, resident on the node"
    yield limit_row("terminal", what, "MiB", each, limit(1, "MiB"))


# -- rows: WebSocket -----------------------------------------------------------

# Both servers echo text, and count binary messages until the text that ends them.
OURS_SINK = """
import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import socket, threading, moltis, echo_peer
def serve(sock):
    ws = echo_peer.accept(sock)
    while True:
        message = ws.receive()
        if message is None: return
        if isinstance(message, str): ws.send(message)
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(f"ws://127.0.0.1:{listener.getsockname()[1]}/", flush=True)
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=serve, args=(sock,), daemon=True).start()
"""
THEIR_SINK = """
from websockets.sync.server import serve
def handle(ws):
    for message in ws:
        if isinstance(message, str): ws.send(message)
with serve(handle, "127.0.0.1", 0, compression=None, max_size=None) as server:
    print(f"ws://127.0.0.1:{server.socket.getsockname()[1]}/", flush=True)
    server.serve_forever()
"""


@contextlib.contextmanager
def echo_server(code: str, *arguments: str) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def bench_websocket(bench: Bench) -> Iterator[Row]:
    """Echo of small messages, and large ones in the masked direction."""
    try:
        from websockets.sync.client import connect as connect_theirs
    except ImportError:
        missing = "websockets is not installed"
        yield Row("websocket", "WebSocket echo, 125 bytes, p50", not_measured=missing)
        yield Row("websocket", "WebSocket 1 MiB, masked", not_measured=missing)
        return
    text, block, blocks = "x" * 125, bytes(1024 * 1024), 64
    count = bench.count(2000)
    with contextlib.ExitStack() as stack:
        our_url = stack.enter_context(echo_server(OURS_SINK, str(ROOT)))
        their_url = stack.enter_context(echo_server(THEIR_SINK))
        ours = moltis.connect(our_url)
        stack.callback(ours.close)
        theirs = stack.enter_context(
            connect_theirs(their_url, compression=None, max_size=None)
        )

        def echo_ours() -> None:
            ours.send(text)
            ours.receive()

        def echo_theirs() -> None:
            theirs.send(text)
            theirs.recv()

        def speed(send: Callable[[Any], Any], echo: Callable[[], Any]) -> float:
            start = time.perf_counter()
            for _ in range(blocks):
                send(block)
            echo()
            return blocks * 1.048576 / (time.perf_counter() - start)

        def send_ours(data: bytes) -> None:
            ours.send(data)
            ours.flush()

        yield from rows_for(
            "websocket",
            "WebSocket echo, 125 bytes, p50",
            "µs",
            lambda: median_of(echo_ours, count) * 1000,
            [
                Peer(
                    "websockets (threads)",
                    lambda: median_of(echo_theirs, count) * 1000,
                    at_most(0.35),
                )
            ],
            bench.rounds,
        )
        yield from rows_for(
            "websocket",
            "WebSocket 1 MiB binary, masked direction",
            "MB/s",
            lambda: speed(send_ours, echo_ours),
            [
                Peer(
                    "websockets (threads)",
                    lambda: speed(theirs.send, echo_theirs),
                    at_least(0.4),
                )
            ],
            bench.rounds,
        )


# -- rows: at rest -------------------------------------------------------------


def resident(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    if sys.platform == "linux":
        status = Path(f"/proc/{pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]
    listing = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(pid)], check=True, capture_output=True
    )
    return int(listing.stdout) / 1024


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class AsReadMeSays:
    """A gateway and a node started from the text, with README's first commands."""

    def __init__(self, directory: Path, source: Path) -> None:
        self._program = str(source / "moltis.py")
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []
        directory.mkdir()
        self.gateway = self._start("gateway", "--demo-node", "--port", "0")
        file = directory / "gateway/.moltis/gateway.json"
        wait_until(file.exists)
        settings = json.loads(file.read_text())
        version = moltis_of(source)
        with version.OperatorClient(
            settings["url"], settings["api_key"], version.TlsTrust()
        ) as client:
            made = client.call("device.token.create", {"displayName": "rest"})
        host = version.websocket_url(settings["url"])
        token = ("--token", made["deviceToken"], "--name", "rest", "--foreground")
        self.node = self._start("node", "add", "--host", host, *token)

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        home = self._directory / words[0]
        home.mkdir()
        environ = {**os.environ, "HOME": str(home)}
        process = subprocess.Popen(
            ["python3", self._program, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environ,
        )
        self._processes.append(process)
        return process

    def close(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
            process.wait(20)


def bench_memory(bench: Bench) -> Iterator[Row]:
    """Node and gateway at rest."""
    sites = [AsReadMeSays(bench.directory("memory") / "ours", ROOT)]
    if bench.beside is not None:
        sites.append(AsReadMeSays(bench.directory("memory") / "other", bench.beside))
    try:
        time.sleep(5 if bench.quick else 30)
        for what, name, most in (
            ("`python3 moltis.py node add … --foreground`, resident", "node", 24),
            ("`python3 moltis.py gateway --demo-node`, resident", "gateway", 32),
        ):
            value, *others = (resident(getattr(site, name).pid) for site in sites)
            goal = limit(most, "MiB")
            row = Row("memory", what, "MiB", value, goal=goal.text)
            beside = {"beside": "the other moltis", "peer": others[0]} if others else {}
            yield replace(row, met=goal.met(value, 0), **beside)
        if sys.platform != "linux":
            yield Row("memory", "CPU of an idle node", not_measured="no /proc here")
            return
        seconds = 20 if bench.quick else 300
        before = cpu_seconds(sites[0].node.pid)
        time.sleep(seconds)
        used = 100 * (cpu_seconds(sites[0].node.pid) - before) / seconds
        what = f"CPU of an idle node over {seconds} s"
        yield limit_row("memory", what, "%", used, limit(0.1, "% of a core"))
    finally:
        for site in sites:
            site.close()


def bench_start(bench: Bench) -> Iterator[Row]:
    """Start-up of the installed command."""
    ours_, count = bench.ours, bench.count(20)
    assert bench.node

    def bare(*options: str) -> float:
        command = (ours_.python, *options, "-c", "pass")
        return median_of(lambda: ours_.run(*command), count)

    for words, goal in ((("--version",), at_most(2)), (("node", "list"), at_most(4))):
        what = f"`moltis {' '.join(words)}`, start to exit"

        def start(site: Installed, words: tuple[str, ...] = words) -> float:
            return median_of(lambda: site.run(site.program, *words), count)

        ours = partial(start, ours_)
        peers = [
            *bench.other_peers(start, NOT_SLOWER),
            Peer("python3 -c pass", bare, goal),
            # Without what .pth files on this machine add to every start.
            Peer("python3 -IS -c pass", lambda: bare("-IS"), NO_GOAL),
        ]
        yield from rows_for("start", what, "ms", ours, peers, bench.rounds)


def bench_page(bench: Bench) -> Iterator[Row]:
    """From the sign-in link to a chat that one can type into."""
    what, goal = "first answer of the page, Chromium", limit(300, "ms")
    try:
        from browser import PROGRAMS, Browser
    except ImportError as error:
        yield Row("page", what, not_measured=f"{error.name} is not installed")
        return
    if not any(shutil.which(name) for name in PROGRAMS):
        yield Row("page", what, not_measured="chromium is not installed")
        return
    ours_ = bench.ours
    samples = []
    with Browser() as browser:
        for number in range(bench.rounds + 1):
            with browser.new_page(isolated=True) as page:
                link = f"{ours_.url}/#key={ours_.api_key}"

                def open_it(page: Any = page, link: str = link) -> None:
                    page.goto(link)
                    page.wait_for("!!document.querySelector('textarea:enabled')")

                taken = timed(open_it)
            if number:
                samples.append(taken)
    yield limit_row("page", what, "ms", statistics.median(samples), goal)


# -- rows: many nodes ----------------------------------------------------------


class SimulatedNodes:
    """Many nodes in one process: real connections, the real protocol, no commands."""

    def __init__(
        self, version: Any, address: tuple[str, int], tokens: list[str]
    ) -> None:
        self._moltis = version
        self._address = address
        self._tokens = tokens
        self._selector = selectors.DefaultSelector()
        self._reports: list[tuple[float, int]] = []
        self.connected = 0
        self._sockets: dict[int, tuple[socket.socket, Any]] = {}

    def run(self) -> None:
        """Connect and answer, for ever; tell stdout when all are connected."""
        waiting = deque(range(len(self._tokens)))
        due = deque()  # (when to report, number)
        told = -1
        while True:
            for _ in range(min(50, len(waiting))):
                number = waiting.popleft()
                try:
                    self._connect(number)
                    # Spread over the 30 s, as nodes that came one by one are.
                    when = time.monotonic() + secrets.randbelow(30_000) / 1000
                    due.append((when, number))
                except OSError:
                    waiting.append(number)
                    time.sleep(0.05)
                    break
            for key, _ in self._selector.select(0 if waiting else 0.2):
                if not self._serve(key.data):
                    waiting.append(key.data)
            now = time.monotonic()
            for _ in range(len(due)):
                when, number = due.popleft()
                if number not in self._sockets:
                    continue
                if when <= now:
                    self._report(number)
                    when = now + 30
                due.append((when, number))
            if self.connected != told:
                told = self.connected
                print(told, flush=True)

    def _connect(self, number: int) -> None:
        sock = socket.create_connection(self._address, 30)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(
            b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        head = b""
        while b"\r\n\r\n" not in head:
            piece = sock.recv(4096)
            if not piece:
                raise OSError("no upgrade")
            head += piece
        protocol = self._moltis.WebSocketProtocol(client=True)
        params = self._moltis.ConnectParams(
            role="node",
            client_id=f"sim-{number}",
            display_name=f"sim-{number}",
            platform="linux",
            device_token=self._tokens[number],
            commands=("system.run",),
        )
        self._sockets[number] = (sock, protocol)
        self._request(number, "connect", params.to_json())
        self._selector.register(sock, selectors.EVENT_READ, number)

    def _request(self, number: int, method: str, params: Any) -> None:
        sock, protocol = self._sockets[number]
        request = self._moltis.Request(self._moltis.new_id(), method, params)
        # One that is closed by now is noticed, and dialled again, by _serve().
        with contextlib.suppress(OSError, self._moltis.ConnectionClosed):
            protocol.send(self._moltis.encode_envelope(request))
            sock.sendall(protocol.outgoing())

    def _report(self, number: int) -> None:
        payload = {
            "nodeId": f"sim-{number}",
            "mem": {"total": 2**30, "available": 2**29},
            "cpuCount": 1,
            "cpuUsage": 1.0,
            "uptime": 9,
            "services": [],
            "disk": {"total": 2**40, "available": 2**39},
            "runtimes": [],
        }
        event = {"event": "node.telemetry", "payload": payload}
        self._request(number, "node.event", event)

    def _serve(self, number: int) -> bool:
        """Return whether the connection goes on."""
        sock, protocol = self._sockets[number]
        try:
            data = sock.recv(65536)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(sock)
            sock.close()
            del self._sockets[number]
            self.connected -= getattr(protocol, "welcome", 0)
            return False
        message = protocol.receive(data)
        while message is not None:
            self._take(number, protocol, json.loads(message))
            message = protocol.receive(b"")
        with contextlib.suppress(OSError):
            sock.sendall(protocol.outgoing())
        return True

    def _take(self, number: int, protocol: Any, envelope: Any) -> None:
        if envelope.get("event") == "node.invoke.request":
            invoke_id = envelope["payload"]["invokeId"]
            result = {"stdout": "", "stderr": "", "exitCode": 0}
            params = {"invokeId": invoke_id, "result": result}
            self._request(number, "node.invoke.result", params)
        elif envelope.get("payload", {}).get("type") == "hello-ok":
            protocol.welcome = 1
            self.connected += 1


class Simulation:
    """A process of SimulatedNodes."""

    def __init__(self, site: Installed, count: int) -> None:
        tokens = []
        with site.operator() as client:
            answers: deque[Any] = deque()
            for number in range(count):
                params = {"displayName": f"sim-{number}"}
                answers.append(client.start("device.token.create", params))
                if len(answers) > 64:
                    tokens.append(answers.popleft().result(60)["deviceToken"])
            tokens += [answer.result(60)["deviceToken"] for answer in answers]
        self._process = subprocess.Popen(
            [
                *(sys.executable, __file__, "--simulate", site.url),
                *("--beside", str(site.source)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(tokens) + "\n")
        self._process.stdin.flush()
        self.connected = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.connected = int(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()


def bench_fleet(bench: Bench) -> Iterator[Row]:
    """1,000 and 5,000 simulated nodes at one gateway."""
    if sys.platform != "linux":
        yield Row("fleet", "many nodes", not_measured="no /proc here")
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for count in (200,) if bench.quick else (1000, 5000):
        if hard < count + 200:
            missing = f"the descriptor limit here is {hard}"
            yield Row("fleet", f"{count:,} nodes", not_measured=missing)
            continue
        versions = {"": ROOT}
        if bench.beside is not None:
            versions[", the other moltis"] = bench.beside
        for number, (name, source) in enumerate(versions.items()):
            site = Installed(bench.directory(f"fleet-{count}-{number}"), source)
            try:
                yield from _fleet_rows(bench, site, count, name)
            finally:
                site.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _fleet_rows(
    bench: Bench, site: Installed, count: int, version: str
) -> Iterator[Row]:
    def row(what: str, unit: str, value: float, goal: Goal) -> Row:
        what = f"{count:,} nodes{version}: {what}"
        return limit_row("fleet", what, unit, value, goal)

    site.add_node("real")

    def round_trip() -> float:
        with contextlib.closing(PlainOperator(site)) as client:
            return median_of(lambda: client.run_true("real"), bench.count(100))

    def chat_turn() -> float:
        with contextlib.closing(PlainOperator(site)) as client:
            client.call("subscribe", {"events": ["chat"]})
            session = client.call("sessions.create", {"label": "bench"})
            params = {"session_key": session["key"], "node_id": "real"}
            client.call("nodes.set_session", params)
            return median_of(
                lambda: client.chat("echo hi", session["key"]), bench.count(25)
            )

    alone, alone_in_chat = round_trip(), chat_turn()
    simulation = Simulation(site, count)
    try:
        wait_until(lambda: simulation.connected == count, 300)
        time.sleep(5 if bench.quick else 35)
        most = limit(250, "MiB")
        yield row("gateway, resident", "MiB", resident(site.gateway.pid), most)
        seconds = 5 if bench.quick else 60
        before = cpu_seconds(site.gateway.pid)
        time.sleep(seconds)
        used = 100 * (cpu_seconds(site.gateway.pid) - before) / seconds
        yield row("gateway at rest, CPU", "%", used, limit(15, "% of a core"))
        many, goal = round_trip(), at_most(2)
        what = f"{count:,} nodes{version}: round trip of `true`, p50"
        met = goal.met(many, alone)
        yield Row("fleet", what, "ms", many, "one node", alone, goal.text, met)
        many = chat_turn()
        what = f"{count:,} nodes{version}: `echo hi` in a chat, p50"
        met = goal.met(many, alone_in_chat)
        beside = ("one node", alone_in_chat, goal.text, met)
        yield Row("fleet", what, "ms", many, *beside)
        taken = timed(
            lambda: site.run(site.program, "node", "exec", "--all", "--", "true")
        )
        yield row("`--all -- true`", "s", taken / 1000, limit(5, "s"))
        port = int(site.url.rpartition(":")[2])
        site.stop(site.gateway)
        wait_until(lambda: simulation.connected == 0)
        site.gateway = site.start_gateway(port)
        back = timed(lambda: wait_until(lambda: simulation.connected == count, 300))
        yield row("all back after a restart", "s", back / 1000, limit(30, "s"))
    finally:
        simulation.close()


# -- rows: a crowd at the door --------------------------------------------------


def crowd(url: str, api_key: str, job_id: str, strangers: int, readers: int) -> None:
    """Connect strangers that say nothing and readers that do not read, for ever."""
    where = moltis.ServerUrl.parse(url)
    followers = []
    for _ in range(readers):
        follower = moltis.connect(moltis.websocket_url(url))
        connect = moltis.ConnectParams(role="operator", api_key=api_key).to_json()
        for method, params in (("connect", connect), ("job.follow", {"id": job_id})):
            request = moltis.Request(moltis.new_id(), method, params)
            follower.send(moltis.encode_envelope(request))
        followers.append(follower)
    selector = selectors.DefaultSelector()
    complete = False
    while True:
        for _ in range(min(20, strangers - len(selector.get_map()))):
            sock = socket.create_connection((where.host, where.port), 30)
            selector.register(sock, selectors.EVENT_READ)
        for key, _ in selector.select(0.05):  # the gateway has hung up on it
            selector.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]
        if len(selector.get_map()) == strangers and not complete:
            complete = True
            print("complete", flush=True)


def bench_load(bench: Bench) -> Iterator[Row]:
    """`true` beside 1,000 strangers, 20 readers that do not read, a flooding node."""
    site = Installed(bench.directory("load"))
    people: subprocess.Popen[str] | None = None
    try:
        for name in ("quiet", "flooding"):
            site.add_node(name)

        def worst() -> float:
            """Return the p99 of the round trip of `true`, in ms."""
            count = bench.count(1000)
            with contextlib.closing(PlainOperator(site)) as client:
                samples = [
                    timed(lambda: client.run_true("quiet")) for _ in range(count)
                ]
            return sorted(samples)[count * 99 // 100]

        with site.operator() as client:
            params = {"name": "readers", "scopes": ["operator.read"]}
            key = client.call("keys.create", params)["key"]
            worst()  # warms everything up
            quiet = worst()
            jobs = [{"node": "flooding"}]
            spec = {"command": "exec timeout 600 yes"}
            start = {"jobs": jobs, "work": "run", "spec": spec, "keep": True}
            job_id = client.call("job.start", start)["jobs"][0]["id"]
            people = subprocess.Popen(
                [sys.executable, __file__, "--crowd", site.url],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert people.stdin is not None
            assert people.stdout is not None
            people.stdin.write(json.dumps([key, job_id, 1000, 20]) + "\n")
            people.stdin.flush()
            if not people.stdout.readline():
                raise NotMeasured("the crowd did not get in")
            loud = worst()
            client.call("job.cancel", {"id": job_id})
        goal = at_most(3)
        beside = ("quiet", quiet, goal.text, goal.met(loud, quiet))
        what = "1,000 strangers, 20 idle readers, a flood: `true`, p99"
        yield Row("load", what, "ms", loud, *beside)
    finally:
        if people is not None:
            people.kill()
            people.wait()
        site.close()


# -- the table -----------------------------------------------------------------

BENCHES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "round-trip": bench_round_trip,
    "in-flight": bench_in_flight,
    "exec": bench_exec,
    "all": bench_all,
    "output": bench_output,
    "files": bench_files,
    "terminal": bench_terminal,
    "websocket": bench_websocket,
    "memory": bench_memory,
    "start": bench_start,
    "page": bench_page,
    "fleet": bench_fleet,
    "load": bench_load,
}


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cells(row: Row) -> list[str]:
    if row.not_measured:
        return [row.what, f"not measured: {row.not_measured}", "", "", row.goal, ""]
    peer = f"{row.beside}: {number(row.peer)} {row.unit}" if row.peer else ""
    ratio = f"{row.ratio:.2f}" if row.ratio else ""
    met = {True: "yes", False: "no", None: ""}[row.met]
    return [row.what, f"{number(row.ours)} {row.unit}", peer, ratio, row.goal, met]


def print_table(rows: list[Row]) -> None:
    table = [["what", "ours", "beside", "ratio", "goal", "met"], *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for at, line in enumerate(table):
        padded = (cell.ljust(width) for cell, width in zip(line, widths))
        print("| " + " | ".join(padded) + " |")
        if at == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def machine() -> str:
    model = ""
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = f", {found[1]}" if found else ""
    version = sys.version.split()[0]
    return f"{os.cpu_count()} cores{model}, {sys.platform}, Python {version}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, fewer nodes")
    parser.add_argument("--only", choices=BENCHES, help="these rows alone")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    parser.add_argument("--beside", type=Path, help="directory of another moltis")
    parser.add_argument("--simulate", help=argparse.SUPPRESS)
    parser.add_argument("--crowd", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.simulate or args.crowd:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    if args.crowd:
        crowd(args.crowd, *json.loads(sys.stdin.readline()))
    if args.simulate:
        host, _, port = args.simulate.partition("//")[2].partition(":")
        tokens = json.loads(sys.stdin.readline())
        SimulatedNodes(moltis_of(args.beside), (host, int(port)), tokens).run()
    rows: list[Row] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), quick=args.quick, beside=args.beside)
        try:
            for key, measure in BENCHES.items():
                if args.only in (None, key):
                    print(f"measuring {key} …", file=sys.stderr)
                    try:
                        rows.extend(measure(bench))
                    except NotMeasured as error:
                        what = str(measure.__doc__).splitlines()[0]
                        rows.append(Row(key, what, not_measured=str(error)))
        finally:
            bench.close()
    if args.json:
        found = [{**asdict(row), "ratio": row.ratio} for row in rows]
        print(json.dumps({"machine": machine(), "rows": found}, indent=2))
    else:
        print(f"{machine()}; {'quick' if args.quick else 'full'} run\n")
        print_table(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
