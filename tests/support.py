"""Helpers that several test files share."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import os
import pty
import pwd
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import moltis

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "moltis.py"
# The only runtime whose version gateways and nodes of tests ask for: Java takes longer
# to answer than they take to start.
ONE_RUNTIME = {"python3": moltis.RUNTIMES["python3"]}


def wait_for(condition, timeout=60.0, what="the condition"):
    """Return the first true value of `condition()`; fail after `timeout` seconds.

    That is long, as it costs nothing where all is well: only a machine that is busy
    with other things needs it.

    `what`, a text or a function that gives one, says what did not happen.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            text = what() if callable(what) else what
            raise AssertionError(f"waited {timeout:g} s in vain for {text}")
        time.sleep(0.01)


def with_patience(attempt, *limits):
    """Return `attempt(limit)` for the first of the time limits that is enough.

    Within a short one, a busy machine may not even have started a program.
    """
    *short, longest = limits
    for limit in short:
        with contextlib.suppress(AssertionError):
            return attempt(limit)
    return attempt(longest)


def at_once(action, count=8):
    """Call `action` in several threads at once; return results and errors."""
    barrier, ended = threading.Barrier(count), []

    def run():
        barrier.wait(60)
        try:
            ended.append(action())
        except Exception as error:
            ended.append(error)

    threads = [threading.Thread(target=run, name="test-race") for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(ended) == count
    return ended


def wait_in_shell(path, condition="[ -e '{}' ]"):
    """Return a shell command that waits for a file, a minute or two at most.

    It outlives a test run that is killed: nothing else would end it then.
    `condition` is what the shell asks about the path instead.
    """
    return (
        f"n=0; until {condition.format(path)} || [ $n -gt 3000 ]; "
        "do sleep 0.02; n=$((n+1)); done"
    )


def child_processes():
    """Return the command names of this process's children, by process id."""
    if sys.platform == "linux":
        return dict(_children_in_proc())
    listing = subprocess.Popen(
        ["ps", "-A", "-o", "pid=,ppid=,comm="], stdout=subprocess.PIPE, text=True
    )
    output, _ = listing.communicate()
    rows = (line.split(None, 2) for line in output.splitlines())
    return {
        int(pid): command
        for pid, parent, command in rows
        if int(parent) == os.getpid() and int(pid) != listing.pid
    }


def _children_in_proc():
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread may end as we look
            for pid in path.read_text().split():
                yield int(pid), Path(f"/proc/{pid}/comm").read_text().strip()


def memory_of(pid, what="VmRSS"):
    """Return the bytes that a process is resident with; VmHWM: the most so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"{what}:\s*(\d+) kB", status)[1]) * 1024


def process_exists(pid):
    """Tell whether `pid` runs; one that ended and awaits its parent does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if sys.platform == "linux":
            return False
        found = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)],
            check=False,
            stdout=subprocess.PIPE,
            text=True,
        )
        return found.returncode == 0 and not found.stdout.startswith("Z")
    return stat.rpartition(")")[2].split()[0] != "Z"


def own_ports():
    """Return an iterator over TCP ports, of which no other worker of xdist has any."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[len("gw") :])
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ports = range(10_000 + worker, 32_000, workers)
    start = random.SystemRandom().randrange(len(ports))
    return itertools.cycle([*ports[start:], *ports[:start]])


PORTS = own_ports()


def free_port():
    """Return a TCP port of 127.0.0.1 on which nothing listens.

    It stays free: the system gives no port of this range to connections, or to a server
    on port 0, and no other test gets it.
    """
    while True:
        port = next(PORTS)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def clean_environment(home, **extra):
    """Return the environment of a person who has just logged in, and no more."""
    return {
        "HOME": str(home),
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        **extra,
    }


def account_in(home):
    """Return the environment of a person in whose account `home` is the home directory.

    Else a shell that a terminal opens reads the profile of whoever runs the tests: that
    of pyenv waits a minute for a lock which an ended shell has left.  With Debian's
    libnss-wrapper; without it the profile had better be quick.
    """
    libraries = list(Path("/usr/lib").glob("*/libnss_wrapper.so"))
    if not libraries:
        assert os.environ.get("MOLTIS_TEST_ALL") != "1", "libnss-wrapper is missing"
        return {}
    users, groups = Path(home) / "passwd", Path(home) / "group"
    entry = pwd.getpwuid(os.getuid())
    fields = (entry.pw_name, "x", *entry[2:5], home, "/bin/bash")
    users.write_text(":".join(map(str, fields)) + "\n")
    shutil.copy("/etc/group", groups)
    return {
        "LD_PRELOAD": str(libraries[0]),
        "NSS_WRAPPER_PASSWD": str(users),
        "NSS_WRAPPER_GROUP": str(groups),
    }


def launched(program):
    """Return what starts `program` from its compiled form, as a launcher does.

    It takes a fifth of the time; the tests of installing start the file itself as well.
    """
    code = moltis.IMPORT_AND_RUN.replace(
        "import moltis; ", f"import moltis; moltis.RUNTIMES = {ONE_RUNTIME!r}; "
    )
    return [sys.executable, "-S", "-c", code, str(Path(program).parent)]


def run_moltis(*arguments, home, stdin=b"", timeout=60, program=PROGRAM, **extra):
    """Run the program to its end as a person would; output is text.

    `home` is its HOME, `extra` more of its environment.
    """
    return subprocess.run(
        [*launched(program), *map(str, arguments)],
        input=stdin.decode() if isinstance(stdin, bytes) else stdin,
        check=False,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout,
        env=clean_environment(home, **extra),
        cwd=str(home),
    )


class Program:
    """A moltis that runs beside the test, with what it has written so far.

    It starts as a launcher starts it, or from the script `program`, if that is given.
    """

    def __init__(self, *arguments, home, program=None, **extra):
        script = [sys.executable, "-u", str(program)]
        self.process = subprocess.Popen(
            [*(script if program else launched(PROGRAM)), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=clean_environment(home, **extra),
            cwd=str(home),
        )
        self._texts = {"stdout": bytearray(), "stderr": bytearray()}
        self._readers = [
            threading.Thread(target=self._read, args=(name,), name=f"test-{name}")
            for name in self._texts
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, name):
        pipe = getattr(self.process, name)
        while True:
            data = pipe.read1(65536)
            if not data:
                break
            self._texts[name] += data
        pipe.close()

    @property
    def pid(self):
        return self.process.pid

    @property
    def stdout(self):
        return self._texts["stdout"].decode("utf-8", "replace")

    @property
    def stderr(self):
        return self._texts["stderr"].decode("utf-8", "replace")

    @property
    def output(self):
        return self.stdout + self.stderr

    def wait_for_output(self, text, timeout=60.0):
        """Return all output once `text` is in it."""

        def said():
            return text in self.output or self.process.poll() is not None

        wait_for(said, timeout, lambda: f"{text!r} in {self.output!r}")
        wait_for(lambda: text in self.output, what=lambda: f"{text!r}: {self.output}")
        return self.output

    def end(self, signal_number=15, timeout=60.0):
        """Send a signal where it still runs; return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        try:
            return self.process.wait(timeout)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            for reader in self._readers:
                reader.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()


class Terminal:
    """A moltis on a terminal of its own, typed into by the test."""

    def __init__(self, *arguments, home):
        parent, child = pty.openpty()
        self.descriptor = parent
        self.text = ""
        self._bytes = b""
        environ = clean_environment(home, TERM="dumb")
        self.process = subprocess.Popen(
            [*launched(PROGRAM), *arguments],
            stdin=child,
            stdout=child,
            stderr=child,
            env=environ,
            cwd=str(home),
            start_new_session=True,
        )
        os.close(child)
        self._reader = threading.Thread(target=self._read, name="test-terminal")
        self._reader.start()

    def _read(self):
        while True:
            try:
                data = os.read(self.descriptor, 65536)
            except OSError:  # Linux says so when the other end is closed
                return
            if not data:
                return
            self._bytes += data  # may end inside a character or the end of a line
            self.text = self._bytes.decode("utf-8", "replace").replace("\r\n", "\n")

    def wait_for(self, text):
        wait_for(lambda: text in self.text, what=lambda: f"{text!r}: {self.text!r}")

    def type(self, text):
        os.write(self.descriptor, text.encode())

    def close(self):
        try:
            return self.process.wait(60)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self._reader.join()
            os.close(self.descriptor)


def open_new_chat(page):
    """Click New chat, and wait until it is the one that is shown."""
    before = page.evaluate("location.pathname")
    page.click("#new-chat")
    page.wait_for(f"location.pathname !== {json.dumps(before)}")
    # Drawn as well: until then the field holds, and the welcome is, the old chat's.
    current = "document.querySelector('#sessions li.current a')"
    page.wait_for(f"{current}?.getAttribute('href') === location.pathname")
    page.wait_for("!document.querySelector('#welcome').hidden")


class ScriptedServer:
    """An HTTP server on a free port that answers as `reply(request)` says.

    `reply` gets the handler, whose `body` holds the request's body, and returns
    (status, headers, chunks); each chunk is sent by itself.  It may also wait in
    between: one thread a connection.
    """

    def __init__(self, reply):
        self.requests = []  # (method, path, headers, body)
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def handle_one(self):
                length = int(self.headers.get("Content-Length") or 0)
                self.body = self.rfile.read(length)
                outer.requests.append(
                    (self.command, self.path, self.headers, self.body)
                )
                status, headers, chunks = reply(self)
                self.send_response(status)
                for name, value in dict(headers).items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # the client may leave
                    for chunk in chunks:
                        self.wfile.write(chunk)
                        self.wfile.flush()

            do_GET = do_POST = do_HEAD = handle_one

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False  # so that closing waits for them
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="test-http"
        )
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class ScriptedTools:
    """Programs that write down how they are called, alone on a PATH of their own."""

    def __init__(self, directory):
        self._directory = directory
        self._directory.mkdir()
        self.environ = {"PATH": str(directory)}

    def add(self, name, script):
        """Make, or replace, the program `name`: lines for /bin/sh."""
        path = self._directory / name
        record = f"printf '%s\\0' {name} \"$@\" >>'{self._directory}/.calls'"
        end = f"echo >>'{self._directory}/.calls'"
        system = "PATH=/usr/bin:/bin"
        path.write_text(f"#!/bin/sh\n{system}\n{record}\n{end}\n{script}\n")
        path.chmod(0o755)

    def calls(self):
        """Return the argument lists of all calls so far, the program's name first."""
        record = self._directory / ".calls"
        lines = record.read_text().splitlines() if record.exists() else []
        return [line.split("\0")[:-1] for line in lines]


@contextlib.contextmanager
def trickling_server(head, rest):
    """Yield the address of an HTTP server that sends `rest` slowly, again and again."""
    ends = threading.Event()

    def serve(sock):
        with contextlib.closing(sock), contextlib.suppress(OSError):
            sock.recv(4096)
            sock.sendall(head.encode())
            while not ends.wait(0.05):
                for character in rest:
                    sock.sendall(character.encode())

    def accept():
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=serve, args=(sock,)))
            threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = [threading.Thread(target=accept)]
        threads[0].start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            ends.set()
            listener.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
