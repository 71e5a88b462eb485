"""Terminals on machines, as a person at a command line uses them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
import tty
import urllib.error
import urllib.request
from pathlib import Path
from unittest import mock

import pexpect
import pyte
import pytest
from peers import InProcessGateway, rust_connect
from proxy import DOWN, FaultyProxy
from support import (
    ROOT,
    Program,
    clean_environment,
    free_port,
    process_exists,
    run_moltis,
    wait_for,
)

import moltis

IMPATIENT = Path(__file__).with_name("impatient.py")
NOTICE = re.compile(rb"\x1b7\x1b\[\d+;1H\x1b\[(?:7m[^\x1b]*\x1b\[K\x1b\[m|2K)\x1b8")


class Site:
    """A gateway with the node "far" behind a link that can be cut, shared by tests."""

    def __init__(self, home):
        self.home = home
        with contextlib.ExitStack() as stack:
            # Whoever runs the tests keeps a shell's history without them.
            entry = pwd.getpwuid(os.getuid())
            login = pwd.struct_passwd((*entry[:5], str(home), "/bin/bash"))
            patches = [
                mock.patch.object(pwd, "getpwuid", lambda _: login),
                mock.patch.object(moltis, "WORKER_LINGER", 0.01),
                mock.patch.object(moltis, "RECONNECT_AFTER", 0.05),
                mock.patch.object(moltis.Backoff.__init__, "__defaults__", (0.05, 0.3)),
            ]
            for patch in patches:
                stack.enter_context(patch)
            self.gateway = stack.enter_context(InProcessGateway(home / ".moltis"))
            self.port = int(self.gateway.url.rpartition(":")[2])
            environ = {**clean_environment(home), "MOLTIS_DATA_DIR": str(home / "node")}
            stack.enter_context(self.gateway.node("far", environ=environ))
            self._stack = stack.pop_all()

    def close(self):
        self._stack.close()

    def person(self, *words, **how):
        return Person(self.home, *words, **how)

    def shell(self, *command, **how):
        return self.person("node", "shell", "far", "--", *command, **how)

    @contextlib.contextmanager
    def bash(self, **how):
        """Yield a person at the prompt of a shell that knows nothing of its user."""
        with self.shell("bash --norc", **how) as shell:
            shell.type("PS1='pro''mpt> '\r")
            shell.expect("prompt> ")
            yield shell

    def key(self, scope):
        """Return the secret of a new key."""
        name = f"{scope} {next(NUMBERS)}"
        made = self.gateway.call("keys.create", name=name, scopes=[scope])
        return made["key"]

    def terminals(self, state="open"):
        jobs = self.gateway.call("job.list", state=state)
        return [job for job in jobs if job["work"] == "terminal"]


class Link(FaultyProxy):
    """A link to a gateway that can be cut."""

    def __init__(self, target):
        self._cuts = []  # bytes that go down until each of the next cuts
        super().__init__(target)

    def cut_each(self, count, times):
        """Reset all connections whenever so many more bytes have come down."""
        self._cuts = [count] * (times - 1)
        self.cut_after(count, DOWN)

    @property
    def is_to_be_cut(self):
        return bool(self._cuts or self._cut_after)

    def _cut_all(self, *, reset):
        super()._cut_all(reset=reset)
        if self._cuts and not self._cut_after:
            self._cut_after[DOWN] = self._cuts.pop()

    @contextlib.contextmanager
    def away(self):
        target, self.target = self.target, free_port()
        self.cut()
        try:
            yield
        finally:
            self.target = target


NUMBERS = itertools.count()
SIZE = {"rows": 24, "cols": 80}


class Screen(pyte.Screen):
    """A screen that passes over what pyte fails at, as a terminal does."""

    def select_graphic_rendition(self, *attrs, private=False):
        if not private:  # vim asks for xterm's keys: CSI ? 4 m
            super().select_graphic_rendition(*attrs)


class Person:
    """A person at a terminal, which shows what a terminal of that size would."""

    def __init__(self, home, *words, size=(24, 80), program=(str(IMPATIENT),), **env):
        self.screen = Screen(size[1], size[0])
        self._stream = pyte.ByteStream(self.screen)
        self.bytes = bytearray()  # all that was shown
        self._drawn = 0  # of these on the screen
        self.spawned = pexpect.spawn(
            sys.executable,
            [*program, *map(str, words)],
            env=clean_environment(home, TERM="xterm-256color", **env),
            dimensions=size,
            timeout=60,
            # Else each piece of a flood is searched with all that came before it.
            searchwindowsize=65536,
            maxread=65536,
        )
        self.spawned.logfile_read = self
        os.set_inheritable(self.spawned.child_fd, False)  # by a shell of our node
        self.cooked = termios.tcgetattr(self.spawned.child_fd)

    def write(self, data):
        """As a file that pexpect writes to."""
        self.bytes += data

    def flush(self): ...

    def type(self, text):
        data = text if isinstance(text, bytes) else text.encode()
        while data:  # a terminal takes what it has room for
            data = data[os.write(self.spawned.child_fd, data) :]

    def expect(self, pattern):
        self.spawned.expect(pattern)
        return self.spawned.match

    def has_size(self, size):
        """Ask programs for their size, until it is that; to redraw, it is one off."""
        wait_for(
            lambda: (
                self.type("stty size\r")
                or self.spawned.expect([rf"[\r\n]{size}\r", r"[\r\n]\d+ \d+\r"]) == 0
            )
        )

    def shows(self, condition, what=""):
        """Wait until the screen, as text, fulfils a condition, or has a text."""

        def fulfilled():
            self.spawned.expect([pexpect.TIMEOUT, pexpect.EOF], timeout=0.02)
            fresh, self._drawn = self.bytes[self._drawn :], len(self.bytes)
            self._stream.feed(fresh)
            text = "\n".join(self.screen.display)
            return condition in text if isinstance(condition, str) else condition(text)

        wait_for(
            fulfilled,
            what=lambda: f"{what or condition} in\n" + "\n".join(self.screen.display),
        )

    def end(self):
        """Return the exit status of the program, once it has ended by itself."""
        self.spawned.expect(pexpect.EOF)
        self._settings_at_the_end = self.settings()
        self.spawned.wait()  # close() hangs up on one that takes its time
        self.spawned.close()
        return self.spawned.exitstatus

    @property
    def is_restored(self):
        """Whether our terminal is as it was: its settings, and what programs set."""
        modes = moltis.TerminalModes()
        modes.feed(self.bytes)
        return modes.changed == {} and self.settings() == self.cooked

    def settings(self):
        if self.spawned.closed:
            return self._settings_at_the_end
        return termios.tcgetattr(self.spawned.child_fd)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        close(self.spawned)


def close(spawned):
    """End a program on a terminal, however long that takes."""
    try:
        spawned.close(force=True)
    except pexpect.ExceptionPexpect:  # killed, and not gone within 0.1 s
        spawned.wait()


class Client:
    """An operator at the gateway's own socket."""

    def __init__(self, gateway):
        self.peer = gateway.peer()
        auth = {"api_key": gateway.api_key}
        answer = self.peer.request("connect", {"role": "operator", "auth": auth})
        assert answer["ok"], answer

    def call(self, method, **params):
        answer = self.peer.request(method, params)
        assert answer["ok"], answer
        return answer["payload"]

    def start(self, node, command, *, spec, **params):
        jobs = [{"id": moltis.new_id(), "node": node}]
        spec = {"command": command, **spec}
        self.call("job.start", jobs=jobs, work="run", spec=spec, **params)
        return jobs[0]["id"]

    def send_input(self, job_id, offset, data):
        self.peer.send(moltis.encode_job_data(moltis.INPUT_DATA, job_id, offset, data))

    def close(self):
        self.peer.__exit__()


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory):
    with contextlib.closing(Site(tmp_path_factory.mktemp("terminals"))) as site:
        yield site


@pytest.fixture
def site(shared_site):
    yield shared_site
    for job in shared_site.terminals():
        shared_site.gateway.call("job.cancel", id=job["id"])
    wait_for(lambda: not shared_site.terminals(), what="the end of all terminals")


# --- The shell and its terminal ---


def test_a_shell_has_a_terminal_with_our_size_and_passes_its_status_on(site):
    with site.shell(size=(31, 97)) as shell:
        shell.type("test -t 0 && stty size; echo $((6*7)); exit 3\r")
        shell.expect("31 97")
        shell.expect("42")
        assert shell.end() == 3
        assert shell.is_restored


def test_a_signal_that_ended_the_command_is_in_the_status_as_in_a_shell(site):
    with site.shell("kill -9 $$") as shell:
        assert shell.end() == 128 + 9


def test_a_command_gets_a_controlling_terminal_and_a_session_of_its_own(site):
    command = 'echo "$(ps -o sid= -p $$)" $$ >/dev/tty'
    with site.shell(command) as shell:
        match = shell.expect(r"(\d+) (\d+)\r")
        assert match[1] == match[2]


def test_the_environment_is_that_of_a_login(site):
    names = "HOME SHELL LOGNAME USER LANG TERM COLORTERM PWD XDG_RUNTIME_DIR LINES"
    report = "; ".join(f'echo "{name}=${name}."' for name in names.split())
    with site.shell(COLORTERM="truecolor", LANG="de_DE.ISO-8859-1") as shell:
        # In two parts: what is typed is shown as well.
        shell.type(f"stty -echo; shopt login_shell; {report}; echo al''l\r")
        shell.expect("all\r")
        shown = shell.bytes.decode()
    user = pwd.getpwuid(os.getuid()).pw_name
    assert re.search(r"login_shell\s+on", shown)
    for line in (
        f"HOME={site.home}.",
        "SHELL=/bin/bash.",
        f"LOGNAME={user}.",
        f"USER={user}.",
        "TERM=xterm-256color.",
        "COLORTERM=truecolor.",
        "LINES=24.",  # bash's own, of the size
    ):
        assert line in shown
    assert re.search(r"LANG=[\w.]*UTF-8\.", shown)
    runtime = f"/run/user/{os.getuid()}"
    assert f"XDG_RUNTIME_DIR={runtime if os.path.isdir(runtime) else ''}." in shown


def test_a_users_runtime_directory_is_named_where_it_is_theirs():
    root = os.stat("/")
    with mock.patch.multiple(
        os, stat=lambda _: root, getuid=lambda: root.st_uid
    ), mock.patch.object(os.path, "isdir", lambda path: path.startswith("/run/user/")):
        variables = moltis.login_variables()
    assert variables["XDG_RUNTIME_DIR"] == f"/run/user/{root.st_uid}"


def has_the_terminal(command):
    """Tell whether a program runs that its terminal's keys are for."""
    listing = subprocess.run(
        ["ps", "-A", "-o", "pgid=,tpgid=,stat=,args="],
        check=True,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    rows = (line.split(None, 3) for line in listing.stdout.splitlines())
    return any(
        row[3:] == [command] and row[0] == row[1] and row[2][0] != "T" for row in rows
    )


def test_job_control_works_as_in_any_terminal(site):
    with site.bash() as shell:
        shell.type("sleep 61.25\r")
        wait_for(lambda: has_the_terminal("sleep 61.25"))
        shell.type("\x1a")
        shell.expect("Stopped.*prompt> ")
        shell.type("fg; echo do''ne\r")
        shell.expect("sleep 61.25\r")
        wait_for(lambda: has_the_terminal("sleep 61.25"))
        shell.type("\x03")
        shell.expect("prompt> ")
        shell.type("exit 4\r")
        assert shell.end() == 4


def test_an_interrupt_ends_a_flood_within_a_mebibyte(site):
    with site.bash() as shell:
        sizes = []
        for _ in range(5):  # on a busy machine the key may take longer than the output
            shell.type("yes\r")
            shell.expect("y\r\ny\r\n")
            at = len(shell.bytes)
            shell.type("\x03")
            shell.expect(r"prompt> ")
            sizes.append(len(shell.bytes) - at)
            if sizes[-1] < 4 * moltis.TERMINAL_WINDOW:
                break
        assert min(sizes) < 4 * moltis.TERMINAL_WINDOW


def test_whoever_ends_a_terminal_hangs_up_on_its_programs(site, tmp_path):
    heard = tmp_path / "heard"
    trap = f"trap 'echo hup >{heard}; exit' HUP"
    command = f"{trap}; echo re''ady; for i in $(seq 1000); do sleep 0.05; done"
    with site.shell(command) as shell:
        shell.expect("ready")
        shell.type("\r~.")
        shell.expect("ended")
        assert shell.end() == moltis.INTERRUPTED
        assert shell.is_restored
    wait_for(heard.exists)
    [job] = site.terminals("ended")[:1]
    assert job["state"] == "cancelled"


def test_a_program_that_ignores_the_hangup_is_killed_two_seconds_later(site):
    command = "trap '' HUP TERM; echo pid $$; for i in $(seq 300); do sleep 0.2; done"
    with site.shell(command) as shell:
        pid = int(shell.expect(r"pid (\d+)")[1])
        shell.type("\r~.")
        shell.end()
        wait_for(lambda: not process_exists(pid))


# --- Real programs ---


def test_vim_less_and_tmux_work_as_they_do_in_any_terminal(site, tmp_path):
    text = tmp_path / "text"
    with site.bash() as shell:
        shell.type(f"vim -u NONE -N {text}\r")
        shell.shows("[New]", "vim")
        shell.type("iline of vim\x1b:wq\r")
        shell.expect("written.*prompt> ")
        assert text.read_text() == "line of vim\n"
        shell.type("seq 1000 | less\r")
        shell.shows(lambda text: text.splitlines()[-1].startswith(":"), "less")
        shell.type("/777\r")
        shell.shows("777")
        shell.type("q")
        tmux = f"tmux -f /dev/null -S {tmp_path}/socket"
        shell.type(f"{tmux} new 'echo in tmux $((6*7)); cat'\r")
        shell.shows("in tmux 42")
        shell.shows("[0]")
        shell.type("\x02d")
        shell.shows("detached")
        shell.type(f"{tmux} kill-server; exit 5\r")
        assert shell.end() == 5
        assert shell.is_restored


def test_htop_draws_itself_anew_for_whoever_comes_late(site):
    with site.shell("htop -d 50") as first:
        first.shows("F10")
        job_id = site.terminals()[0]["id"]
        with site.person("node", "attach", job_id, size=(30, 100)) as second:
            second.shows(lambda text: "F10" in text.splitlines()[-1], "its last line")
            second.type("q")
            assert second.end() == 0
            assert second.is_restored
        assert first.end() == 0
        assert first.is_restored


@pytest.mark.skipif(not shutil.which("nano"), reason="nano is not installed")
def test_nano_writes_a_file(site, tmp_path):
    text = tmp_path / "text"
    with site.shell(f"nano -I {text}") as shell:
        shell.shows("^X")
        shell.type("line of nano\x0f\r")
        wait_for(text.exists)
        shell.type("\x18")
        assert shell.end() == 0
        assert shell.is_restored
    assert text.read_text() == "line of nano\n"


@pytest.mark.skipif(not shutil.which("script"), reason="script is not installed")
def test_a_terminal_inside_a_terminal_has_its_size_its_keys_and_its_status(site):
    """As `docker exec -it` and `ssh -t` open one."""
    with site.shell("script -qec 'bash --norc' /dev/null") as shell:
        shell.type("PS1='in''ner> '\r")
        shell.expect("inner> ")
        shell.type("stty size\r")
        shell.expect("24 80\r")
        shell.spawned.setwinsize(33, 99)
        shell.has_size("33 99")
        shell.type("sleep 61.5; echo over''slept\r")
        wait_for(lambda: has_the_terminal("sleep 61.5"))
        shell.type("\x03")
        shell.expect("inner> ")
        assert b"overslept" not in shell.bytes
        shell.type("exit 4\r")
        assert shell.end() == 4
        assert shell.is_restored


@pytest.mark.skipif(not shutil.which("sudo"), reason="sudo is not installed")
@pytest.mark.skipif(os.getuid() != 0, reason="root is asked for no password")
def test_sudo_asks_for_a_password_and_shows_none(site):
    somebody = "setpriv --reuid=65534 --regid=65534 --clear-groups"
    with site.shell(f"{somebody} sudo -k true") as shell:
        shell.expect("password for nobody: ")
        shell.type("s3cret\r")
        # At the prompt: between the two, sudo does not wait for keys.
        shell.expect("try again.*password for nobody: ")
        shell.type("\x03")
        assert shell.end() in (1, 128 + signal.SIGINT)  # by itself, or killed
        assert b"s3cret" not in shell.bytes
        assert shell.is_restored


def test_a_password_is_not_shown_and_not_recorded(site):
    asks = "read -rs -p 'pass''word: ' word; echo; echo \"len ${#word}\""
    with site.shell(f"bash -c {shlex.quote(asks)}") as shell:
        shell.expect("password: ")
        shell.type("s3cret\r")
        shell.expect("len 6")
        shell.end()
        assert b"s3cret" not in shell.bytes
    job_id = site.terminals("ended")[0]["id"]
    done = run_moltis("node", "recording", job_id, home=site.home)
    assert "len 6" in done.stdout
    assert "s3cret" not in done.stdout


# --- Leaving and coming back ---


def test_a_terminal_goes_on_when_it_is_left_and_is_entered_again(site):
    with site.shell("cat") as first:
        first.type("kept\r")
        first.expect("kept.*kept")
        first.type("\r~d")
        job_id = first.expect("node attach ([0-9a-f]+)")[1].decode()
        assert first.end() == 0
        assert first.is_restored
    wait_for(lambda: "people" not in site.terminals()[0])
    shown = len("kept\r\n" * 2 + "\r\n" * 2)  # typed, and printed by cat
    wait_for(lambda: site.terminals()[0]["stdoutBytes"] == shown)
    listed = run_moltis("node", "jobs", "far", home=site.home).stdout
    assert "nobody" in listed
    assert f" {shown} B " in listed
    with site.person("node", "attach", job_id) as second:
        second.expect("kept.*kept")
        second.type("again\r")
        second.expect("again.*again")
        [person] = site.terminals()[0]["people"]
        assert person == {"name": "owner", "types": True, "sizes": True}
        second.type("\r~.")
        second.expect("ended")
        second.end()
    with site.person("node", "attach", job_id) as third:  # its last screen stays
        third.shows("again")
        third.end()
        assert third.is_restored


def test_the_audit_names_who_came_and_left_and_from_where(site):
    with site.shell("cat") as first:
        first.type("\r~d")
        first.end()
        job_id = site.terminals()[0]["id"][:8]
    reader = site.key("operator.read")
    with site.person(
        "node",
        "attach",
        job_id,
        MOLTIS_API_KEY=reader,
        MOLTIS_GATEWAY_URL=site.gateway.url,
    ) as second:
        second.expect("only watch")
        second.type("\r~d")
        second.end()
    wait_for(lambda: "people" not in site.terminals()[0])
    site.gateway.call("job.cancel", id=site.terminals()[0]["id"])
    wait_for(lambda: not site.terminals())

    def rows():
        return [
            (row["event"], row["caller"].partition(" ")[0], row["address"])
            for row in reversed(site.gateway.call("audit.list"))
            if job_id in str(row.get("subject"))
        ]

    wait_for(lambda: len(rows()) >= 5)
    assert rows() == [
        ("terminal.opened", "owner", "127.0.0.1"),
        ("terminal.left", "owner", "127.0.0.1"),
        ("terminal.joined", "operator.read", "127.0.0.1"),
        ("terminal.left", "operator.read", "127.0.0.1"),
        ("terminal.closed", "moltis", ""),
    ]


def test_a_start_that_is_repeated_joins_the_terminal_that_it_had_opened(site):
    with contextlib.closing(Client(site.gateway)) as first, contextlib.closing(
        Client(site.gateway)
    ) as second:
        job_id = moltis.new_id()
        request = {
            "jobs": [{"id": job_id, "node": "far"}],
            "work": "run",
            "spec": {"command": "cat", "tty": SIZE},
            "hold": True,
        }
        first.call("job.start", **request)
        asked_at = site.terminals()[0]["askedAt"]
        wait_for(lambda: moltis.now_ms() > asked_at)  # or both would be one
        second.call("job.start", **request)
        rows = [
            row["event"]
            for row in reversed(site.gateway.call("audit.list"))
            if job_id[:8] in str(row.get("subject"))
        ]
        assert rows == ["terminal.opened", "terminal.joined"]
        people = site.terminals()[0]["people"]
        assert [(p["types"], p["sizes"]) for p in people] == [
            (False, True),
            (True, False),
        ]


def test_whoever_joins_and_leaves_at_once_leaves_a_terminal_of_others_running(
    site, monkeypatch
):
    follow, answered = moltis.OperatorPeer.follow, threading.Event()
    with site.shell("cat") as first:
        first.type("kept\r")
        first.expect("kept.*kept")
        job_id = site.terminals()[0]["id"]
        monkeypatch.setattr(
            moltis.OperatorPeer,
            "follow",
            lambda *args, **how: answered.wait(60) and follow(*args, **how),
        )
        with site.person("node", "attach", job_id) as second:
            second.type("~.")
            second.expect("\x18")  # it leaves, and does not know who is in it
            answered.set()
            second.expect("it goes on")
            second.end()
        first.type("still\r")
        first.expect("still.*still")


def test_whoever_comes_back_and_leaves_at_once_leaves_a_terminal_of_others_running(
    site, monkeypatch
):
    follow, asked, answered = moltis.OperatorPeer.follow, threading.Event(), None

    def late(peer, *args, **how):
        if answered is not None:
            asked.set()
            answered.wait(60)
        return follow(peer, *args, **how)

    monkeypatch.setattr(moltis.OperatorPeer, "follow", late)
    with Link(site.port) as link, site.shell(
        "cat",
        MOLTIS_GATEWAY_URL=f"http://127.0.0.1:{link.port}",
        MOLTIS_API_KEY=site.gateway.api_key,
    ) as first:
        first.type("kept\r")
        first.expect("kept.*kept")
        with contextlib.ExitStack() as stack:
            with link.away():
                first.expect("waiting for the gateway")
                job_id = site.terminals()[0]["id"]
                second = stack.enter_context(site.person("node", "attach", job_id))
                second.expect("kept.*kept")
                answered = threading.Event()
            assert asked.wait(60)
            first.expect(r"\x1b\[2K")  # it does not wait for the gateway any more
            first.type("\r~.")
            first.expect("\x18")
            answered.set()
            first.expect("it goes on")
            second.type("still\r")
            second.expect("still.*still")


def test_whoever_is_left_alone_ends_the_terminal_while_the_notice_says_so(site):
    with site.shell("cat") as first:
        first.type("kept\r")
        first.expect("kept.*kept")
        with site.person("node", "attach", site.terminals()[0]["id"]) as second:
            first.expect("owner came in")
            second.shows("kept")
            second.type("\r~d")
            second.end()
        first.expect("owner left")
        first.type("\r~.")
        first.expect("moltis: ended")


def test_escapes_are_shown_and_a_tilde_can_be_typed(site):
    with site.shell("stty -echo; echo re''ady; cat") as shell:
        shell.expect("ready")
        wait_for(lambda: "people" in site.terminals()[0])
        shell.type("\r~?")
        shell.shows("in it: owner (you, sets the size)")
        shell.type("\r~~home\r")
        shell.expect("\r\n~home\r")
        shell.type("~.")
        shell.expect("ended")


WAYS_OUT = {
    "end": lambda shell: shell.type("x"),
    "disconnect": lambda shell: shell.type("\r~."),
    "detach": lambda shell: shell.type("\r~d"),
    "SIGTERM": lambda shell: shell.spawned.kill(signal.SIGTERM),
    "SIGHUP": lambda shell: shell.spawned.kill(signal.SIGHUP),
    "SIGQUIT": lambda shell: shell.spawned.kill(signal.SIGQUIT),
    "SIGINT": lambda shell: shell.spawned.kill(signal.SIGINT),
    "crash": lambda shell: None,
}
CRASHING = """
import sys
sys.path[:0] = %r
import moltis
show = moltis.TerminalSession._show
def crash(self, news):
    show(self, news)
    if any(b"ready" in data for _, data in news.frames):
        raise RuntimeError("crashed")
moltis.TerminalSession._show = crash
sys.exit(moltis.main())
"""


@pytest.mark.parametrize("way", WAYS_OUT)
def test_our_terminal_is_restored_on_every_way_out(site, way):
    modes = r"\033[?1049h\033[?1h\033=\033[?1002;1006h\033[?1004h\033[?2004h\033[?25l"
    odd = r"\033[>4;1m\033[>1u\033[2;5r\033(0\033[4h\033]2;half a tit"
    code = CRASHING % [str(IMPATIENT.parent.parent)]
    program = ("-c", code) if way == "crash" else (str(IMPATIENT),)
    command = f"stty -echo; printf 'ready{modes}{odd}'; head -c 1 >/dev/null"
    with site.shell(f"stty raw; {command}", program=program) as shell:
        shell.expect_exact = shell.spawned.expect_exact
        shell.expect_exact("half a tit")
        assert way == "crash" or not shell.is_restored
        WAYS_OUT[way](shell)
        shell.spawned.expect(pexpect.EOF)
        assert shell.is_restored
        after = shell.bytes.rpartition(b"half a tit")[2]
        # It ends what was cut, and resets margins, line drawing and insert mode.
        assert after.startswith(b"\x18")
        for sequence in (b"\x1b[r", b"\x1b(B", b"\x1b[4l", b"\x1b[m", b"\x1b[?1049l"):
            assert sequence in after


@pytest.mark.parametrize("way", ["a signal", "a closed window"])
def test_a_terminal_outlives_the_window_that_showed_it(site, way):
    with site.shell("echo ready; read -r x; echo got-$x; sleep 60") as shell:
        shell.expect("ready")
        [job] = site.terminals()
        if way == "a signal":
            shell.spawned.kill(signal.SIGHUP)
        else:
            with open(os.devnull) as nothing:
                os.dup2(nothing.fileno(), shell.spawned.child_fd)
        shell.spawned.wait()
    with site.person("node", "attach", job["id"]) as again:
        again.expect("ready")
        again.type("it\r")
        again.expect("got-it")


def test_a_process_that_was_stopped_takes_its_terminal_back(site):
    with site.bash() as shell:
        shell.spawned.kill(signal.SIGSTOP)
        listing = ["ps", "-o", "stat=", "-p", str(shell.spawned.pid)]
        wait_for(lambda: b"T" in subprocess.run(listing, stdout=-1, check=True).stdout)
        # As a shell whose job was stopped.
        termios.tcsetattr(shell.spawned.child_fd, termios.TCSANOW, shell.cooked)
        shell.spawned.setwinsize(33, 99)
        shell.spawned.kill(signal.SIGCONT)
        wait_for(lambda: shell.settings() != shell.cooked)
        shell.has_size("33 99")
        shell.type("sleep 61.75\r")
        wait_for(lambda: has_the_terminal("sleep 61.75"))
        shell.type("\x03")
        shell.expect("prompt> ")
        shell.type("exit 4\r")
        assert shell.end() == 4
        assert shell.is_restored


def test_a_process_that_a_shell_stopped_at_once_takes_the_terminal_after_fg(tmp_path):
    """As by `moltis node shell &` and `fg`."""
    script = tmp_path / "raw.py"
    script.write_text(
        f"import signal, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import moltis\n"
        "with moltis.handling(lambda *_: None, signal.SIGCONT):\n"
        "    with moltis.raw_terminal(0):\n"
        "        print('it is ours')\n"
    )
    with contextlib.ExitStack() as stack:
        shell = pexpect.spawn("bash --norc -i", timeout=60)
        stack.callback(close, shell)
        shell.sendline(f"set -b; {sys.executable} {script} &")
        shell.expect("Stopped")
        shell.sendline("fg")
        assert shell.expect(["it is ours", "Interrupted system call"]) == 0


def test_what_is_said_at_the_end_is_on_a_line_of_its_own(site):
    with site.shell("printf 'prompt> '; exec sleep 60") as shell:
        shell.expect("prompt> ")
        [job] = site.terminals()
        site.gateway.call("job.cancel", id=job["id"])
        shell.shows(lambda text: re.search(r"(?m)^moltis: far: cancelled", text))
        shell.end()


# --- Links that break ---


def test_what_is_typed_while_the_node_is_away_arrives_once_and_whole(site):
    command = "stty raw -echo; echo ready; head -c 6; head -c 4096 | sha256sum; cat"
    with Link(site.port) as link, mock.patch.object(
        site.gateway, "websocket_url", f"ws://127.0.0.1:{link.port}/ws"
    ), site.gateway.node("away"), site.person(
        "node", "shell", "away", "--", command
    ) as shell:
        shell.expect("ready")
        shell.type("before")
        shell.expect("before")
        with link.away():
            shell.shows("waiting for away to come back (")
            at = len(shell.bytes)
            shell.type("k" * 4096)
            [job] = site.gateway.running.jobs.open()
            wait_for(lambda: job.typed.endswith(b"k" * 4096), what="the keys")
            assert b"\a" not in shell.bytes[at:]
            shell.type("lost")
            shell.spawned.expect_exact("\a")
        digest = hashlib.sha256(b"k" * 4096).hexdigest()
        shell.expect(digest)
        shell.shows(lambda text: "waiting for" not in text, "no notice")


def test_output_continues_at_the_exact_byte_and_keys_go_on_over_a_new_link(site):
    numbers = "seq 50000; head -c 4 | od -c; echo ov''er"
    command = f"stty raw -echo; echo ready; head -c 3; {numbers}"
    with Link(site.port) as link, site.shell(
        command,
        MOLTIS_GATEWAY_URL=f"http://127.0.0.1:{link.port}",
        MOLTIS_API_KEY=site.gateway.api_key,
    ) as shell:
        shell.expect("ready")
        shell.type("a")
        with link.away():
            shell.shows("waiting for the gateway to come back")
            shell.type("bc")
            link.cut_each(50_000, times=3)  # of 289,000: none comes too late
        shell.expect("\n50000\n")
        assert not link.is_to_be_cut
        with link.away():
            shell.shows("waiting for the gateway to come back")
            shell.type("wxyz")
        shell.expect("over")
    shown = NOTICE.sub(b"", shell.bytes).replace(b"\a", b"")
    numbers = b"".join(b"%d\n" % number for number in range(1, 50_001))
    assert numbers in shown
    assert b"w   x   y   z" in shown


def test_what_two_type_while_the_node_is_away_arrives(site):
    command = "stty raw -echo; echo ready; head -c 4 | od -c; sleep 60"
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(Link(site.port))
        url = f"ws://127.0.0.1:{link.port}/ws"
        with mock.patch.object(site.gateway, "websocket_url", url):
            stack.enter_context(site.gateway.node("gone"))
        words = ("node", "shell", "gone", "--", command)
        first = stack.enter_context(site.person(*words))
        first.expect("ready")
        [job] = site.terminals()
        environ = {
            "MOLTIS_GATEWAY_URL": site.gateway.url,
            "MOLTIS_API_KEY": site.key("operator.admin"),
        }
        second = stack.enter_context(
            site.person("node", "attach", job["id"], **environ)
        )
        second.shows("ready")
        with link.away():
            first.shows("waiting for gone to come back (")
            second.shows("waiting for gone to come back (")
            first.type("ab")
            wait_for(lambda: typists(site) == ["owner"])
            second.type("cd")
            wait_for(lambda: typists(site) != ["owner"])
        first.shows("a   b   c   d")


def test_what_is_typed_right_before_leaving_arrives(site, tmp_path):
    """Also by somebody who has not typed before, for whom another gives way."""
    with site.bash() as first, Link(site.port) as link:
        first.type("true\r")
        first.expect("true")
        [job] = site.terminals()
        environ = {
            "MOLTIS_GATEWAY_URL": f"http://127.0.0.1:{link.port}",
            "MOLTIS_API_KEY": site.gateway.api_key,
        }
        with site.person("node", "attach", job["id"], **environ) as second:
            second.shows("true")
            first.type("echo a''gain\r")
            second.shows("again")
            link.delay = 0.2
            second.type(f"touch {tmp_path}/typed\r~d")
            assert second.end() == 0
        wait_for((tmp_path / "typed").exists, what="what was typed")


def typists(site):
    """Return the names of those who type into the one terminal."""
    [job] = site.terminals()
    return [person["name"] for person in job["people"] if person["types"]]


def test_a_notice_leaves_nothing_behind_in_a_window_that_grows(site):
    with Link(site.port) as link, site.shell(
        "echo ready; sleep 60",
        MOLTIS_GATEWAY_URL=f"http://127.0.0.1:{link.port}",
        MOLTIS_API_KEY=site.gateway.api_key,
    ) as shell:
        shell.expect("ready")
        with link.away():
            shell.shows("waiting for the gateway to come back")
            shell.screen.resize(30, 80)
            shell.spawned.setwinsize(30, 80)
            shell.shows(lambda _: "waiting for" in shell.screen.display[29])
            assert "waiting for" not in shell.screen.display[23]


@pytest.fixture
def killed(tmp_path):
    """A gateway that can be killed, and its node: processes of their own."""
    port = free_port()

    def gateway():
        program = Program("gateway", "--port", port, home=tmp_path, program=IMPATIENT)
        program.wait_for_output("http")
        return program

    with contextlib.ExitStack() as stack:
        first = stack.enter_context(gateway())
        made = run_moltis("node", "generate-token", "--name", "far", home=tmp_path)
        token = re.search(r"mdt_[\w-]+", made.stdout + made.stderr)[0]
        (tmp_path / "node_home").mkdir()

        def node():
            program = Program(
                *("node", "add", "--foreground", "--host", f"ws://127.0.0.1:{port}/ws"),
                *("--token", token, "--name", "far"),
                home=tmp_path / "node_home",
                program=IMPATIENT,
            )
            stack.enter_context(program)
            program.wait_for_output("onnected")
            return program

        yield first, lambda: stack.enter_context(gateway()), node


def test_a_terminal_is_lost_with_a_node_that_is_killed(killed, tmp_path):
    _, _, start_node = killed
    node = start_node()
    command = r"printf '\033[?1049h\033[?1000hrea''dy'; sleep 60"
    with Person(tmp_path, "node", "shell", "far", "--", command) as shell:
        shell.expect("ready")
        node.end(signal.SIGKILL)
        shell.shows("waiting for far to come back")
        start_node()
        shell.expect("its node came back without it")
        assert shell.end() not in (0, None)
        assert shell.is_restored


def test_a_terminal_survives_a_gateway_that_is_killed(killed, tmp_path):
    first, start_again, start_node = killed
    start_node()
    command = "stty raw -echo; echo ready; head -c 8 | od -c; sleep 60"
    with Person(tmp_path, "node", "shell", "far", "--", command) as shell:
        shell.expect("ready")
        shell.type("abcd")
        time.sleep(0.3)  # what the node has, and what it has not: both are tested
        first.end(signal.SIGKILL)
        shell.shows("waiting for the gateway to come back")
        shell.type("efgh")
        start_again()
        shell.shows("a   b   c   d   e   f   g   h")
        shell.type("\r~.")
        shell.expect("ended")
        shell.end()
        assert shell.is_restored


def test_a_terminal_whose_gateway_is_gone_can_be_left(killed, tmp_path):
    first, start_again, start_node = killed
    start_node()
    with Person(tmp_path, "node", "shell", "far", "--", "cat") as shell:
        shell.type("up\r")
        shell.expect("up.*up")
        first.end(signal.SIGKILL)
        shell.shows("waiting for the gateway to come back")
        shell.type("\r~.")
        shell.expect("goes on")
        shell.end()
        assert shell.is_restored
    start_again()


# --- Several people ---


def test_one_at_a_time_owns_the_size_and_each_sees_who(site):
    with site.bash() as first:
        first.type("stty size\r")
        first.expect("24 80\r")
        first.spawned.setwinsize(33, 99)
        first.has_size("33 99")
        job_id = site.terminals()[0]["id"]
        with site.person("node", "attach", job_id, size=(40, 120)) as second:
            first.expect("owner sets the size")
            second.shows("24 80")
            # Clearing the notice draws anew, and takes the size from nobody.
            first.spawned.expect(r"\x1b\[2K")
            second.type("\r~?")
            second.shows("owner (you, sets the size)")
            second.has_size("40 120")
            first.spawned.setwinsize(22, 77)
            second.expect("owner sets the size")
            first.has_size("22 77")
            sizes = [p["sizes"] for p in site.terminals()[0]["people"]]
            assert sorted(sizes) == [False, True]
            second.spawned.setwinsize(20, 66)
            first.expect("owner sets the size")
            second.has_size("20 66")
            second.type("\r~d")
            assert second.end() == 0
        first.has_size("22 77")  # whoever has it leaves: it is ours again


def test_what_two_type_by_turns_arrives_once_and_in_order(site):
    with site.shell("stty raw -echo; echo ready; cat -v") as first:
        first.expect("ready")
        job_id = site.terminals()[0]["id"]
        with site.person("node", "attach", job_id) as second:
            second.shows("ready")
            for number in range(20):
                person = (first, second)[number % 2]
                person.type(f"<{number}>")
                first.expect(f"<{number}>")
            second.expect("<19>")
        everything = "".join(f"<{number}>" for number in range(20)).encode()
        assert everything in NOTICE.sub(b"", first.bytes)


def test_of_two_who_look_one_answers_and_nobody_what_is_over(site):
    command = (
        r"stty raw -echo; printf 'old\033[6nready'; head -c 1; printf 'new\033[6n'; cat"
    )
    with site.shell(command) as first:
        first.expect("ready")
        assert b"old\x1b[6nready" in first.bytes
        job_id = site.terminals()[0]["id"]
        with site.person("node", "attach", job_id) as second:
            second.expect("ready")
            assert b"old" + moltis.NO_QUERY + b"ready" in second.bytes
            second.type("x")  # from now on it is the one who types, and answers
            second.spawned.expect_exact("new\x1b[6n")
            first.expect("new")
            assert b"new\x1b[6n" not in first.bytes


def test_following_takes_a_key_that_reads_and_typing_one_that_writes(site):
    reads = {
        "MOLTIS_API_KEY": site.key("operator.read"),
        "MOLTIS_GATEWAY_URL": site.gateway.url,
    }
    with site.shell("echo secret; cat") as first:
        first.expect("secret")
        job_id = site.terminals()[0]["id"]
        with site.person("node", "attach", job_id, **reads) as second:
            second.expect("only watch")
            second.expect("secret")
            second.type("typed")
            second.spawned.expect_exact("\a")
            second.shows("moltis: you can only watch")
            first.type("\r")
            assert b"typed" not in first.bytes
            second.type("\r~.")
            second.expect("it goes on")
        with moltis.OperatorClient(
            site.gateway.url, reads["MOLTIS_API_KEY"], None, moltis.ignore_news
        ) as client:
            for method, params in (
                ("job.resize", {"rows": 9, "cols": 9}),
                ("job.cancel", {}),
                ("job.follow", {"hold": True}),
            ):
                with pytest.raises(moltis.UserError, match=r"operator\.write"):
                    client.call(method, {"id": job_id, **params})
    with site.shell(**reads) as third:
        third.expect(r"operator\.write")


def test_whoever_only_watches_sees_what_was_drawn_long_before(site):
    draw = r"printf '\033[H\033[2Jthe he''ad\n'"
    busy = r"yes 0123456789 | head -c 400000 | tr '\n' '\r'"
    wait = "for i in $(seq 600); do sleep 0.05; done"
    command = f"trap {shlex.quote(draw)} WINCH; {draw}; {busy}; echo rea''dy; {wait}"
    reads = {
        "MOLTIS_API_KEY": site.key("operator.read"),
        "MOLTIS_GATEWAY_URL": site.gateway.url,
    }
    with site.shell(command) as first:
        first.expect("ready")
        job_id = site.terminals()[0]["id"]
        first.type("\r~d")  # a notice about who came would be followed by a redraw
        first.end()
        with site.person("node", "attach", job_id, **reads) as second:
            second.shows("the head")


def test_a_key_that_does_not_read_follows_nothing(site):
    other = site.key("operator.pairing")
    with site.shell("cat") as _, moltis.OperatorClient(
        site.gateway.url, other, None, moltis.ignore_news
    ) as client:
        wait_for(site.terminals)
        with pytest.raises(moltis.UserError, match=r"operator\.read"):
            client.call("job.follow", {"id": site.terminals()[0]["id"]})


# --- Much at once ---


def test_a_paste_of_a_megabyte_arrives_whole_while_another_terminal_is_usable(site):
    pasted = (b"0123456789abcdef" * 65536)[:1_000_000]
    command = "stty raw -echo; echo ready; head -c 1000000 | sha256sum; cat"
    with site.shell(command) as shell, site.shell("cat") as other:
        shell.expect("ready")
        other.type("warm\r")
        other.expect("warm.*warm")
        for at in range(0, len(pasted), 4096):
            shell.type(pasted[at : at + 4096])
            if at == 40 * 4096:
                other.type("meanwhile\r")
                other.expect("meanwhile.*meanwhile")
        shell.expect(hashlib.sha256(pasted).hexdigest())


def test_the_node_reads_no_more_than_a_window_ahead_and_takes_input_all_the_same(
    site, tmp_path
):
    heard = tmp_path / "heard"
    command = f"trap 'echo int >{heard}; exit' INT; yes"
    with contextlib.closing(Client(site.gateway)) as client:
        job_id = client.start("far", command, hold=True, spec={"tty": SIZE})

        def end():
            return client.call("job.read", id=job_id, offset=0)["job"]["end"]

        wait_for(lambda: end() > moltis.TERMINAL_WINDOW - moltis.MAX_LOG_MESSAGE)
        # Nothing is acknowledged: the window stays full, and keys pass it by.
        client.send_input(job_id, 0, b"\x03")
        wait_for(heard.exists)
        assert end() <= moltis.TERMINAL_WINDOW + moltis.MAX_LOG_MESSAGE


def test_a_viewer_that_is_too_slow_skips_to_a_screen(site, monkeypatch):
    monkeypatch.setattr(moltis, "SCREEN", 160 * 1024)  # some marks
    command = "head -c 1 >/dev/null; yes 0123456789 | head -c 12000000; echo over"
    with contextlib.ExitStack() as stack:
        quick = stack.enter_context(contextlib.closing(Client(site.gateway)))
        slow = stack.enter_context(contextlib.closing(Client(site.gateway)))
        job_id = quick.start("far", command, keep=True, spec={"tty": SIZE})
        slow.call("job.follow", id=job_id, skip=True, screen=True)
        # Held by nobody, it is not slowed down by whoever looks.
        quick.call("job.follow", id=job_id, hold=True, offset=0)
        quick.send_input(job_id, 0, b"\r")
        quick.call("job.unfollow", id=job_id)
        ended = quick.call("job.wait", id=job_id, wait=60)
        assert ended["stdoutBytes"] > 12_000_000
        gaps = []  # what followed each
        last = None
        while last != ended["end"]:
            message = slow.peer.receive()
            if isinstance(message, bytes):
                _, _, offset, data = moltis.decode_job_data(message)
                if last is not None and offset != last:
                    gaps.append(next(iter(moltis.log_frames(data)))[0])
                last = offset + len(data)
        assert gaps
        assert set(gaps) == {moltis.MARK}


# --- Recordings ---


def test_a_recording_is_taken_by_asciinema(site, tmp_path):
    resized = "until stty size | grep '33 99'; do sleep 0.05; done"
    command = f"printf '%s\\n' 'shown \"\\ ü'; head -c 1; {resized}"
    with site.shell(command) as shell:
        shell.expect("shown")
        shell.spawned.setwinsize(33, 99)
        shell.type("never shown\x7f\r")
        shell.expect("33 99")
        shell.end()
    job = site.terminals("ended")[0]
    done = run_moltis("node", "recording", job["id"], home=site.home)
    url = f"{site.gateway.url}/api/jobs/{job['id']}/recording"
    request = urllib.request.Request(
        url, headers={"Authorization": f"Bearer {site.gateway.api_key}"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["Content-Disposition"].endswith('.cast"')
        cast = answer.read()
    assert cast.decode() == done.stdout
    header, *events = map(json.loads, cast.decode().splitlines())
    assert (header["version"], header["width"], header["height"]) == (2, 80, 24)
    assert [time for time, *_ in events] == sorted(time for time, *_ in events)
    assert {kind for _, kind, _ in events} == {"o", "r"}  # no input
    assert [text for _, kind, text in events if kind == "r"] == ["99x33"]
    (tmp_path / "x.cast").write_bytes(cast)
    player = os.path.join(os.path.dirname(sys.executable), "asciinema")
    shown = subprocess.run(
        [player, "cat", str(tmp_path / "x.cast")],
        check=True,
        capture_output=True,
        env=clean_environment(tmp_path),
    )
    assert 'shown "\\ ü' in shown.stdout.decode()


def test_a_recording_whose_beginning_was_cut_begins_with_size_and_modes():
    recording = moltis.Recording("vim", "pi", 1_700_000_000_000)
    modes = {"1049": True, "kitty": True, "25": False}  # of the screen: two of them
    mark = {"ms": 5000, "rows": 30, "cols": 90, "modes": modes}
    frames = [
        (moltis.STDOUT, b"of a size that is unknown"),
        (moltis.MARK, json.dumps(mark).encode()),
        (moltis.STDOUT, b"shown"),
    ]
    header, *events = (
        json.loads(line) for frame in frames for line in recording.lines(*frame)
    )
    assert (header["width"], header["height"]) == (90, 30)
    assert events == [[5.0, "o", "\x1b[?1049h\x1b[?25l"], [5.0, "o", "shown"]]


def test_a_recording_with_a_gap_continues_with_the_modes_after_it(site, monkeypatch):
    """The alternate screen was switched on in the part that is not kept."""
    monkeypatch.setattr(moltis, "SEGMENT", 100_000)
    monkeypatch.setattr(moltis, "MAX_SEGMENTS", 3)
    command = "seq 40000; printf '\\033[?1049h'; seq 60000; printf 'the %s' end"
    with site.shell(command) as shell:
        shell.expect("the end")
        shell.end()
    job = site.terminals("ended")[0]
    url = f"{site.gateway.url}/api/jobs/{job['id']}/recording"
    headers = {"Authorization": f"Bearer {site.gateway.api_key}"}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        cast = answer.read().decode()
    shown = [text for _, kind, text in map(json.loads, cast.splitlines()[1:])]
    assert "\x1b[?1049h" not in "".join(shown).partition("\x1bc")[0]
    assert shown.count("\x1bc\x1b[?1049h") == 1
    assert "".join(shown).endswith("the end")
    done = run_moltis("node", "recording", job["id"], home=site.home)
    assert done.stdout == cast


def test_only_terminals_have_a_recording(site):
    job_id = site.gateway.call(
        "job.start",
        jobs=[{"id": moltis.new_id(), "node": "far"}],
        work="run",
        spec={"command": "true"},
        keep=True,
    )["jobs"][0]["id"]
    site.gateway.call("job.wait", id=job_id, wait=60)
    done = run_moltis("node", "recording", job_id, home=site.home)
    assert "is no terminal: only terminals are recorded" in done.stderr
    url = f"{site.gateway.url}/api/jobs/{job_id}/recording"
    headers = {"Authorization": f"Bearer {site.gateway.api_key}"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    with contextlib.closing(refused.value) as error:
        assert error.code == 404


# --- What may be opened, and for how long ---


def test_a_terminal_with_nobody_in_it_is_ended(tmp_path):
    assert moltis.IDLE_TERMINAL == 24 * 3600
    with InProcessGateway(tmp_path / ".moltis", idle_terminal=1.5) as gateway:
        client = Client(gateway)
        with contextlib.closing(client):
            job_id = client.start("local", "cat", hold=True, spec={"tty": SIZE})
            followed = time.monotonic()
            while time.monotonic() < followed + 3:  # not while somebody is in it
                time.sleep(0.2)
                assert gateway.call("job.list", state="open")
        # Nor does a question about it count as being in it.
        ended = gateway.call("job.wait", id=job_id, wait=60)
        assert ended["state"] == "cancelled"
        assert "nobody was in it for" in ended["words"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [("closed", {"terminals": False}), ("strict", {"allow": ("true",)})],
)
def test_an_owner_can_switch_terminals_off(site, name, settings):
    with site.gateway.node(name, **settings), site.person(
        "node", "shell", name
    ) as shell:
        shell.expect("opens no terminals")
        assert shell.end() == 2


def test_an_owner_who_allows_few_commands_can_allow_terminals(site):
    settings = {"allow": ("true",), "terminals": True}
    with site.gateway.node("open", **settings), site.person(
        "node", "shell", "open", "--", "echo in''side"
    ) as shell:
        shell.expect("inside")
        assert shell.end() == 0


def test_a_machine_without_terminals_refuses_one_by_itself():
    options = moltis.MachineOptions(environ={}, inventory=None, terminals=False)
    spec = moltis.CommandSpec("", tty=moltis.TerminalSize(24, 80))
    with pytest.raises(moltis.RpcError, match="allows no terminals"):
        moltis._run(options, None, None, spec)


def test_a_system_without_pseudo_terminals_is_named_as_the_reason():
    spec = moltis.CommandSpec("true", tty=moltis.TerminalSize(24, 80))
    command = moltis.Command(spec, moltis.JobLog("", lambda _: None), environ={})
    error = FileNotFoundError(errno.ENOENT, "No such file or directory")
    with mock.patch.object(os, "openpty", side_effect=error):
        reason = command.run().reason
    assert reason == "this system gives no pseudo-terminal: No such file or directory"


@pytest.mark.parametrize("shell", ["/nonexistent/shell", "/"])
def test_a_login_shell_that_is_no_program_is_named_with_what_to_try(site, shell):
    entry = pwd.getpwuid(os.getuid())
    login = pwd.struct_passwd((*entry[:6], shell))
    with mock.patch.object(pwd, "getpwuid", lambda _: login), site.shell() as started:
        assert started.end() != 0
    said = f"there is no program {shell}, the login shell of {entry.pw_name}; change"
    assert said in NOTICE.sub(b"", started.bytes).decode()
    with site.shell("echo us''able") as other:
        other.expect("usable")


@pytest.mark.parametrize(
    ("name", "options"),
    [("bash", "-l"), ("ksh93", "-l"), ("shmenu", ""), ("elvish", "")],
)
def test_a_login_shell_gets_no_option_that_it_may_not_know(
    site, tmp_path, name, options
):
    shell = tmp_path / name
    shell.write_text('#!/bin/sh\necho "given: $*."\n')
    shell.chmod(0o755)
    login = pwd.struct_passwd((*pwd.getpwuid(os.getuid())[:6], str(shell)))
    with mock.patch.object(pwd, "getpwuid", lambda _: login), site.shell() as started:
        started.expect(f"given: {options}\\.")
        assert started.end() == 0


def test_it_is_said_which_of_two_opposite_options_counts(tmp_path):
    done = run_moltis(
        *("node", "add", "--host", "ws://127.0.0.1:1/ws", "--token", "mdt_" + "x" * 43),
        *("--no-terminal", "--allow-terminal"),
        home=tmp_path,
    )
    assert "say --no-terminal or --allow-terminal, not both" in done.stderr


def test_a_node_of_moltis_has_no_terminals_and_that_is_said(site):
    with contextlib.closing(site.gateway.peer()) as peer:
        token = site.gateway.token("Rust box")
        assert peer.request("connect", rust_connect(token))["ok"]
        with site.person("node", "shell", "Rust box") as shell:
            shell.expect("Rust box has no terminals: [^\r]*\r\n$")
            assert shell.end() == 2


def test_without_a_terminal_here_there_is_none_there(site):
    done = run_moltis("node", "shell", "far", home=site.home)
    assert "node exec" in done.stderr
    assert done.returncode == moltis.UsageError.exit_code


@pytest.mark.parametrize(("rows", "cols"), [(0, 80), (24, 1001), (24, None)])
def test_an_odd_size_is_refused_in_one_sentence(site, rows, cols):
    with site.shell("cat"):
        wait_for(site.terminals)
        with pytest.raises(moltis.UserError, match="rows"):
            job_id = site.terminals()[0]["id"]
            size = {"rows": rows, "cols": cols}
            site.gateway.call("job.resize", id=job_id, **size)


def test_a_terminal_never_belongs_to_a_model():
    view = {"work": "terminal", "nodeName": "far", "state": "running"}
    with pytest.raises(moltis.RpcError, match="the terminal of a person"):
        moltis.job_for_model(view)


# --- Pieces ---


def test_modes_are_read_wherever_the_output_is_cut():
    text = b"x\x1b[?1049h\x1b[?1;2004h\x1b=\x1b[?25l\x1b[?2004l"
    expected = {"1049": True, "1": True, "66": True, "25": False}
    for cut in range(len(text)):
        modes = moltis.TerminalModes()
        modes.feed(text[:cut])
        modes.feed(text[cut:])
        assert modes.changed == expected


def test_modes_that_are_restored_and_undone_are_none():
    modes = moltis.TerminalModes()
    modes.feed(b"\x1b[?1049;1002h\x1b=\x1b[?7l\x1b[>1u\x1b[>4;2m")
    others = moltis.TerminalModes()
    others.feed(modes.restoring())
    assert others.changed == {"1049": True, "1002": True, "66": True, "7": False}
    modes.feed(modes.undoing())
    assert modes.changed == {}


def test_queries_are_removed_wherever_the_output_is_cut():
    text = b"a\x1b[6nb\x1b[c\x1b[>c\x1b]11;?\x1b\\d\x1bP$qm\x1b\\e"
    for cut in range(len(text)):
        queries = moltis.QueryFilter()
        kept = queries.feed(text[:cut]) + queries.feed(text[cut:]) + queries.flush()
        assert kept.replace(moltis.NO_QUERY, b"") == b"abde"


@pytest.mark.parametrize(
    "text",
    [
        b"\x1b[\x1b[6n6n",
        b"\x1b[6\nn",
        b"\x1b\r[c",
        b"\x1b[\x05>\x05c",
        b"\x1b]11;?\x1b[c\x1b\\",
    ],
)
def test_no_query_hides_in_another_or_around_control_characters(text):
    queries = moltis.QueryFilter()
    kept = queries.feed(text) + queries.flush()
    assert not re.search(moltis.TERMINAL_QUERY, kept)


def test_the_thread_that_reads_never_waits_for_a_terminal_that_takes_nothing(
    monkeypatch,
):
    master, slave = os.openpty()
    with open(master, "rb", 0) as screen, open(slave, "r+b", 0) as ours:
        tty.setraw(slave)
        monkeypatch.setattr(sys, "stdin", ours)
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(ours)))
        job = moltis.FollowedJob("id", "far", holds=True)
        session = moltis.TerminalSession(None, job, None, may_type=False)
        session._is_fresh = False
        outputs = iter([moltis.JobOutput(job, 0, [(moltis.STDOUT, b"shown")])])
        os.set_blocking(slave, False)
        filled = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                filled += os.write(slave, bytes(1000))
        assert not session._show_at_once(outputs)
        while filled:
            filled -= len(screen.read(min(filled, 4096)))
        wait_for(lambda: session._show_at_once(outputs))
        assert screen.read(5) == b"shown"


def test_escape_keys_count_at_the_beginning_of_a_line_only():
    def sent(data):
        return list(moltis.EscapeKeys().feed(data))

    assert sent(b"~.") == [(b"", "."), (b"", "")]
    assert sent(b"a~.") == [(b"a~.", "")]
    assert sent(b"a\r~d") == [(b"a\r", "d"), (b"", "")]
    assert sent(b"~~x~y") == [(b"~x~y", "")]
    assert sent(b"~q") == [(b"~q", "")]
