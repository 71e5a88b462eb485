"""A gateway and a node in processes of their own, and what can befall them.

Between them and to the operators are proxies that break connections; their disks are
small enough to be filled, their wall clocks jump.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import glob
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from proxy import FaultyProxy
from support import clean_environment, free_port, wait_for

import moltis

IMPATIENT = Path(__file__).resolve().parent / "impatient.py"
MOLTIS = (sys.executable, moltis.PYTHON_OPTIONS, str(IMPATIENT))  # as installed
STARTED = "Ctrl+C stops it"  # the gateway's last word before it serves
SMALL_DISK = 10  # MiB; SQLite's log alone may take 4
FAKETIME = "/usr/lib/*/faketime/libfaketimeMT.so.1"


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
        self._arguments = [*MOLTIS, *map(str, arguments)]
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
        self.process.wait(60)
        self._clear_up()

    def end(self):
        if self.process is not None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()
            self._clear_up()

    def _clear_up(self):
        """Remove what the clock's library leaves where a signal ends a process."""
        for path in glob.glob(f"/dev/shm/*faketime*_{self.process.pid}"):
            os.unlink(path)

    def text(self):
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""


class SmallDisk:
    """A file system of its own at `path`, which can be filled to the last block."""

    def __init__(self, path):
        self.path = path
        self._filler = path / "filler"
        path.mkdir(exist_ok=True)
        size = f"size={SMALL_DISK}m,mode=700"
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", size, "moltis-test", str(path)],
            check=True,
            stderr=subprocess.DEVNULL,
        )

    @staticmethod
    @functools.lru_cache(maxsize=None)
    def can_be_made():
        with tempfile.TemporaryDirectory() as directory:
            try:
                SmallDisk(Path(directory)).close()
            except (OSError, subprocess.CalledProcessError):
                return False
        return True

    @property
    def is_full(self):
        return self._filler.exists()

    def fill(self):
        with self._filler.open("ab", buffering=0) as file:
            for size in (1024 * 1024, 4096):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError as error:
                    assert error.errno == errno.ENOSPC

    def free(self):
        with contextlib.suppress(FileNotFoundError):
            self._filler.unlink()

    def close(self):
        subprocess.run(["umount", "-l", str(self.path)], check=True)


class JumpingClock:
    """The wall clock of the processes that are started with `environment`.

    Their monotonic clock goes on as ever.
    """

    def __init__(self, path):
        self._path = path
        self.jump(0)
        self.environment = {
            "LD_PRELOAD": self.library(),
            "FAKETIME_TIMESTAMP_FILE": str(path),
            "FAKETIME_NO_CACHE": "1",  # a jump counts at once
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            # Else each wait for Python's own lock ends at once, and begins again.
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
            "NO_FAKE_STAT": "1",
        }

    @staticmethod
    @functools.lru_cache(maxsize=None)
    def library():
        """Return Debian's `faketime` library, or None where there is none."""
        return next(iter(glob.glob(FAKETIME)), None)

    def jump(self, seconds):
        """Set the clock, `seconds` off the right time; at the next look it is so."""
        written = self._path.with_suffix(".new")
        written.write_text(f"{seconds:+d}")
        written.replace(self._path)


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
                [*MOLTIS, *words],
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

    @property
    def status(self):
        return self.process.poll()

    def signal(self, number):
        if self.process.poll() is None:
            self.process.send_signal(number)

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

    def __init__(
        self, directory, rng=None, *, small_disks=False, clocks=False, silent=True
    ):
        """`silent`: connections may fall silent, and who does for 1.6 s is given up."""
        rng = rng or random.Random(0)
        self._silence = {} if silent else {"SILENCE": "patient"}
        self.directory = directory
        self.calls = []
        self.disks = {}  # by process
        self.clocks = {}
        self.gateway_port = free_port()
        self.node_proxy = FaultyProxy(self.gateway_port, rng)
        self.operator_proxy = FaultyProxy(self.gateway_port, rng)
        self.data = directory / "data"
        self.node_data = directory / "node-data"
        self.gateway = self.node = None
        try:
            self._make_disks_and_clocks(small_disks, clocks)
            self._start()
        except BaseException:
            self.close()
            raise

    def _make_disks_and_clocks(self, small_disks, clocks):
        for name, path in (("gateway", self.data), ("node", self.node_data)):
            if small_disks:
                self.disks[name] = SmallDisk(path)
            if clocks:
                self.clocks[name] = JumpingClock(self.directory / f"{name}-clock")

    def _process(self, name, arguments, data):
        clock = self.clocks[name].environment if name in self.clocks else {}
        environ = {"MOLTIS_DATA_DIR": str(data), **clock, **self._silence}
        return Process(name, self.directory, arguments, **environ)

    def _start(self):
        arguments = ["gateway", "--port", self.gateway_port]
        self.gateway = self._process("gateway", arguments, self.data)
        self.start_gateway()
        file = moltis.GatewayFile.load(self.data)
        self.api_key = file.api_key
        made = self.rpc("device.token.create", displayName="far")
        self.operator_environment = compiled_environment(
            self.directory,
            MOLTIS_GATEWAY_URL=f"http://127.0.0.1:{self.operator_proxy.port}",
            MOLTIS_API_KEY=file.api_key,
            **self._silence,
        )
        moltis.NodeSettings(
            gateway_url=f"ws://127.0.0.1:{self.node_proxy.port}/ws",
            device_token=made["deviceToken"],
            node_id="far-id",
            display_name="far",
            working_dir=str(self.directory),
        ).save(self.node_data)
        self.node = self._process("node", ["node", "run"], self.node_data)
        self.node.start()
        self.wait_for_node()

    @property
    def direct_url(self):
        return f"http://127.0.0.1:{self.gateway_port}"

    def start_gateway(self):
        """Start it; where its disk is full it says so, and starts once it is not."""
        said = self.gateway.text().count(STARTED)

        def has_started():
            if self.gateway.process.poll() is None:
                return self.gateway.text().count(STARTED) > said
            assert self.disks["gateway"].is_full, self.gateway.text()
            last = self.gateway.text().splitlines()[-1]
            assert "No space left" in last or "make room" in last, last
            self.disks["gateway"].free()
            self.gateway.start()
            return False

        self.gateway.start()
        wait_for(
            has_started, 60, lambda: f"the gateway to start: {self.gateway.text()}"
        )

    def rpc(self, method, **params):
        """Make one call; where something is away, or busy, it may take several."""
        problem = None
        for _ in range(100):
            try:
                with moltis.OperatorClient(self.direct_url, self.api_key) as client:
                    return client.call(method, params)
            except moltis.Unreachable as error:
                problem = error
            time.sleep(0.1)
        raise AssertionError(f"no answer to {method}: {problem}")

    def is_connected(self):
        """Tell whether the node is, by the log: to ask costs more than to look."""
        text = self.gateway.text()
        return text.count("node connected") > text.count("node disconnected")

    def wait_for_node(self):
        wait_for(self.is_connected, 60, self.account)

    def call(self, command, stdin=None, options=(), node="far"):
        """Start a `node exec`."""
        if stdin is None:
            return Call(self, ["node", "exec", *options, node, "--", command])
        return Call(self, ["node", "exec", node, "--stdin", "--", command], stdin)

    def job(self, command, node="far"):
        """Start a kept job; return its id."""
        job = moltis.new_id()
        request = {
            "jobs": [{"id": job, "node": node}],
            "work": "run",
            "spec": {"command": command},
            "keep": True,
        }

        def started():
            (view,) = self.rpc("job.start", **request)["jobs"]
            assert view.get("error", {}).get("code") in (None, "UNAVAILABLE"), view
            return "error" not in view

        wait_for(started, 60, f"{node} to take a job")
        return job

    def attach(self, job):
        """Start a `node attach`."""
        return Call(self, ["node", "attach", job])

    def kept_pieces(self, job):
        """Yield a job's standard output as any client gets it, None for a gap."""
        position = 0
        while True:
            answer = self.rpc("job.read", id=job, offset=position, encoding="base64")
            if answer["offset"] > position:
                yield None
            for piece in answer["pieces"]:
                if piece["stream"] == "stdout":
                    yield base64.b64decode(piece["data"])
            if answer["next"] == position:
                return
            position = answer["next"]

    def counted(self, command, status=0):
        """Return `command` with lines that write down that it is run, and ends."""
        file = self.runs_file(len(self.calls))
        return f"echo run $$ >>{file}; {command}\necho end >>{file}; exit {status}"

    def runs_file(self, number):
        return self.directory / f"runs-{number}"

    def _run_lines(self, number):
        path = self.runs_file(number)
        return path.read_text().splitlines() if path.exists() else []

    def runs(self, number=0):
        """Return how often the command of that number was run."""
        return sum(line.startswith("run") for line in self._run_lines(number))

    def came_to_its_end(self, number):
        return "end" in self._run_lines(number)

    def groups(self, number):
        """Return the process groups of the command of that number."""
        lines = [line.split() for line in self._run_lines(number)]
        return [int(line[1]) for line in lines if line[0] == "run"]

    def rows(self):
        """Return the audit, the oldest first."""
        with contextlib.closing(sqlite3.connect(self.data / "moltis.db")) as db:
            db.row_factory = sqlite3.Row
            return list(map(dict, db.execute("SELECT * FROM jobs ORDER BY seq")))

    def is_full(self, name):
        return name in self.disks and self.disks[name].is_full

    def heal(self):
        self.node_proxy.heal()
        self.operator_proxy.heal()
        for disk in self.disks.values():
            disk.free()
        for call in self.calls:
            call.signal(signal.SIGCONT)

    def close(self):
        for call in self.calls:
            if call.process.poll() is None:
                call.process.kill()
            call.process.wait()
        for disk in self.disks.values():
            disk.free()
        for process in (self.node, self.gateway):
            if process is not None:
                process.end()
        self.node_proxy.close()
        self.operator_proxy.close()
        for number in range(len(self.calls)):
            for group in self.groups(number):  # its node may have been killed
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
        for disk in self.disks.values():
            disk.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def node_log(self):
        path = self.node_data / "node.log"
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def account(self):
        """Return all that was said, for who has to find out what went wrong."""
        logs = {"gateway": self.gateway.text(), "node": self.node.text()}
        logs["node.log"] = self.node_log()
        calls = [
            f"--- call {call.number}: status {call.status}, "
            f"{len(call.output)} bytes, {call.complaints[-1000:]!r}"
            for call in self.calls
        ]
        texts = [f"--- {name}\n{text[-3000:]}" for name, text in logs.items()]
        rows = (json.dumps(row, default=str) for row in self.rows())
        return "\n".join([*texts, *calls, *rows])


def living_in_group(group):
    """Return the lines of `ps` about a group that are more than entries in a table."""
    listing = subprocess.run(
        ["ps", "-A", "-o", "pgid=,stat=,args="],
        check=True,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    rows = (line.split(None, 2) for line in listing.stdout.splitlines())
    return [row for row in rows if row[0] == str(group) and row[1][0] != "Z"]
