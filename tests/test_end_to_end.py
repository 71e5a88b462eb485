"""The program as a stranger meets it: real processes, from a clean HOME."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from support import (
    PROGRAM,
    Program,
    clean_environment,
    free_port,
    launched,
    process_exists,
    run_moltis,
    wait_for,
    wait_in_shell,
    with_patience,
)

OK, FAILURE, USAGE, UNREACHABLE, REFUSED, CONFIGURATION = 0, 1, 2, 69, 77, 78


class Site:
    """A gateway, and as many nodes as a test wants, each with a HOME of its own."""

    def __init__(self, directory):
        self._directory = directory
        self.home = self._home("gateway")
        self._programs = []
        self.gateway = self.start("gateway", "--port", "0", home=self.home)
        self.gateway.wait_for_output("Ctrl+C stops it.")
        self.file = json.loads((self.home / ".moltis/gateway.json").read_text())

    def _home(self, name):
        home = self._directory / name
        home.mkdir(exist_ok=True)
        return home

    def start(self, *arguments, home, **extra):
        program = Program(*arguments, home=home, **extra)
        self._programs.append(program)
        return program

    def run(self, *arguments, **options):
        """Run a subcommand on the gateway's machine."""
        return run_moltis(*arguments, home=self.home, **options)

    def add_command(self, name):
        """Return the words that generate-token says to run on the remote machine."""
        printed = self.run("node", "generate-token", "--name", name).stdout
        line = re.search(r"^  moltis (node add .*)$", printed, re.M).group(1)
        return [word.strip("'") for word in re.findall(r"'[^']*'|\S+", line)]

    def node(self, name, *options, **extra):
        words = [*self.add_command(name), "--foreground", *options]
        node = self.start(*words, home=self._home(name), **extra)
        node.wait_for_output("connected to")
        return node

    def nodes(self):
        listed = json.loads(self.run("node", "list", "--json").stdout)
        return {node["displayName"]: node for node in listed}

    def close(self):
        for program in reversed(self._programs):
            program.end()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A gateway with two nodes that all tests of this file share."""
    site = Site(tmp_path_factory.mktemp("site"))
    try:
        site.node("Build Server")
        site.node("pi")
        yield site
    finally:
        site.close()


@pytest.fixture
def own_site(tmp_path):
    """A gateway that a test may stop."""
    site = Site(tmp_path)
    yield site
    site.close()


# -- what the user gets --------------------------------------------------------


def test_the_gateway_says_where_it_is_and_how_to_sign_in(site):
    said = site.gateway.stdout
    url = re.search(r"Gateway:\s+(http://127\.0\.0\.1:\d+)\n", said).group(1)
    assert re.search(rf"Sign in:\s+{url}/#key=mk_[\w-]{{43}}\n", said)
    assert "mk_" not in site.gateway.stderr


def test_gateway_json_is_for_its_owner_alone(site):
    path = site.home / ".moltis/gateway.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert set(site.file) == {"url", "public_url", "api_key", "pid"}
    assert site.file["pid"] == site.gateway.pid


def test_generate_token_prints_what_to_run_on_the_remote_machine(site):
    done = site.run("node", "generate-token", "--name", "Attic's Pi")
    assert done.stderr.startswith("only this machine reaches 127.0.0.1; ")
    assert done.returncode == OK
    token = re.search(r"^Device token: (mdt_[\w-]{43})$", done.stdout, re.M).group(1)
    address = site.file["url"].replace("http://", "ws://") + "/ws"
    assert (
        f"  moltis node add --host {address} --token {token} --name "
        "'Attic'\"'\"'s Pi'\n" in done.stdout
    )


def test_node_list_shows_every_machine_and_local(site):
    done = site.run("node", "list")
    assert done.returncode == OK
    heading, *rows = done.stdout.splitlines()
    assert heading.startswith("NAME")
    assert [row.split("  ")[0] for row in rows] == ["Local", "Build Server", "pi"]
    assert all("connected" in row for row in rows)
    # What is installed is looked for beside, and told when it is known.
    wait_for(
        lambda: site.run("node", "list", "--wide").stdout.count("python3") == 3,
        what="the runtimes of all",
    )


def test_a_node_says_how_it_is_doing(site):
    telemetry = wait_for(lambda: site.nodes()["pi"]["telemetry"])
    assert telemetry["memTotal"] > telemetry["memAvailable"] > 0
    assert telemetry["cpuCount"] == os.cpu_count()
    assert telemetry["diskTotal"] > 0
    assert telemetry["stale"] is False


def test_exec_prints_what_the_command_prints(site):
    done = site.run("node", "exec", "Build Server", "--", "echo out; echo err >&2")
    assert (done.returncode, done.stdout, done.stderr) == (OK, "out\n", "err\n")


def test_a_name_needs_no_case_and_an_id_is_as_good(site):
    node_id = site.nodes()["pi"]["nodeId"]
    for name in ("PI", node_id):
        assert site.run("node", "exec", name, "--", "echo hi").stdout == "hi\n"


def test_several_words_arrive_as_the_words_they_are(site):
    done = site.run("node", "exec", "pi", "--", "printf", "[%s]", "a b", "$HOME", "c'd")
    assert done.stdout == "[a b][$HOME][c'd]"


@pytest.mark.parametrize("status", [1, 3, 126, 127, 255])
def test_exec_exits_with_the_command_s_status(site, status):
    assert site.run("node", "exec", "pi", "--", f"exit {status}").returncode == status


def test_a_command_that_a_signal_ended_gives_the_status_a_shell_would(site):
    assert site.run("node", "exec", "pi", "--", "kill -9 $$").returncode == 128 + 9


def test_a_command_whose_time_is_up_is_ended_and_its_output_kept(site):
    def attempt(limit):
        words = ("--timeout", limit, "--", "echo a; sleep 120")
        done = site.run("node", "exec", "pi", *words)
        assert done.returncode == 124
        assert done.stdout == "a\n"
        assert "timed out" in done.stderr

    with_patience(attempt, 0.5, 5, 30)


def test_cwd_is_on_the_node_and_the_home_is_the_default(site, tmp_path):
    done = site.run("node", "exec", "pi", "--cwd", tmp_path, "--", "pwd")
    assert Path(done.stdout.strip()).resolve() == tmp_path.resolve()
    home = site.run("node", "exec", "pi", "--", "pwd; echo $HOME").stdout.split()
    assert home[0] == home[1]


def test_a_cwd_that_is_not_there_is_named(site):
    done = site.run("node", "exec", "pi", "--cwd", "/no/such", "--", "pwd")
    assert done.returncode == FAILURE
    assert "/no/such" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_output_is_binary_safe_in_both_directions(site):
    data = bytes(range(256)) * 4096  # 1 MiB: more than a window at its end
    done = subprocess.run(
        [*launched(PROGRAM), "node", "exec", "pi", "--stdin", "--", "cat"],
        input=data,
        capture_output=True,
        check=False,
        env=clean_environment(site.home),
        timeout=60,
    )
    assert done.returncode == OK, done.stderr
    assert done.stdout == data


def test_the_end_of_standard_input_is_passed_on(site):
    done = site.run("node", "exec", "pi", "--stdin", "--", "wc -c", stdin="12345")
    assert done.stdout.strip() == "5"


def test_without_stdin_the_command_s_input_is_empty(site):
    done = site.run("node", "exec", "pi", "--", "wc -c", stdin="12345")
    assert done.stdout.strip() == "0"


def test_exec_prints_while_the_command_runs(site, tmp_path):
    """The command waits for a file that is made only once its output was seen."""
    gate = tmp_path / "gate"
    line = f"echo started; {wait_in_shell(gate)}; echo ended"
    with Program("node", "exec", "pi", "--", line, home=site.home) as running:
        running.wait_for_output("started")
        assert "ended" not in running.stdout
        gate.touch()
        assert running.process.wait(60) == OK
        running.wait_for_output("ended")


def test_one_who_reads_slowly_gets_all_of_it(site):
    """20 MB through a pipe that is drained only after the command has filled it."""
    command = [*launched(PROGRAM), "node", "exec", "pi", "--"]
    process = subprocess.Popen(
        [*command, "head -c 20000000 /dev/zero"],
        stdout=subprocess.PIPE,
        env=clean_environment(site.home),
    )
    with process:
        assert (
            sum(len(piece) for piece in iter(lambda: process.stdout.read(1 << 16), b""))
            == 20_000_000
        )
    assert process.returncode == OK


def test_one_who_stops_reading_ends_the_command(site, tmp_path):
    line = f"echo $$ > {tmp_path}/pid; exec yes"
    command = f"{sys.executable} {PROGRAM} node exec pi -- '{line}' | head -n 1"
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        capture_output=True,
        check=False,
        env=clean_environment(site.home),
        timeout=60,
    )
    assert (done.stdout, done.stderr) == (b"y\n", b"")
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not process_exists(pid), what="the end of `yes`")


def test_ctrl_c_ends_the_remote_process_group(site, tmp_path):
    line = f"sleep 120 & echo $! $$ > {tmp_path}/pids; echo running; wait"
    with Program("node", "exec", "pi", "--", line, home=site.home) as running:
        running.wait_for_output("running")
        assert running.end(signal.SIGINT) == 130
    for pid in (tmp_path / "pids").read_text().split():
        wait_for(lambda p=pid: not process_exists(int(p)), what=f"the end of {pid}")


def test_an_exec_that_is_ended_leaves_nothing_on_the_node(site, tmp_path):
    line = f"echo $$ > {tmp_path}/pid; echo running; sleep 120"
    with Program("node", "exec", "pi", "--", line, home=site.home) as running:
        running.wait_for_output("running")
        assert running.end(signal.SIGTERM) != OK
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not process_exists(pid), what="the end of the command")


def test_several_nodes_run_side_by_side_and_end_with_a_recap(site, tmp_path):
    """Each waits for the other's file: one after the other would never end."""
    both = wait_in_shell(tmp_path, '[ "$(ls "{}" | wc -l)" -ge 2 ]')
    line = f'touch "{tmp_path}/$MOLTIS_TEST$$"; {both}; echo met'
    done = site.run("node", "exec", "Build Server", "pi", "--timeout", 30, "--", line)
    assert done.returncode == OK
    assert sorted(done.stdout.splitlines()) == ["Build Server | met", "pi | met"]
    assert re.fullmatch(r"ok: (Build Server, pi|pi, Build Server)\n", done.stderr)


def test_the_recap_tells_ok_from_failed(site):
    line = 'case "$HOME" in *pi) exit 3;; esac'
    done = site.run("node", "exec", "Build Server", "pi", "--", line)
    assert done.returncode == FAILURE
    assert done.stderr == "ok: Build Server\nfailed: pi (3)\n"


def test_an_unknown_node_among_several_runs_nothing(site, tmp_path):
    done = site.run("node", "exec", "pi", "nobody", "--", f"touch {tmp_path}/ran")
    assert done.returncode == FAILURE
    assert "no node 'nobody'" in one_line(done)
    assert not (tmp_path / "ran").exists()


def test_the_recap_names_a_node_that_is_offline(own_site):
    own_site.node("here")
    own_site.node("away").end()
    wait_for(lambda: not own_site.nodes()["away"]["connected"], what="it to be offline")
    done = own_site.run("node", "exec", "here", "away", "--", "echo hi")
    assert done.returncode == FAILURE
    assert done.stdout == "here | hi\n"
    assert "ok: here\n" in done.stderr
    assert "unreachable: away (offline since" in done.stderr


def test_all_counts_the_machines_that_are_offline(own_site):
    """FAULTS E16"""
    own_site.node("here")
    own_site.node("away").end()
    wait_for(lambda: not own_site.nodes()["away"]["connected"], what="it to be offline")
    done = own_site.run("node", "exec", "--all", "--", "echo hi")
    assert done.returncode == FAILURE
    assert sorted(done.stdout.splitlines()) == ["Local | hi", "here | hi"]
    assert "unreachable: away (offline since" in done.stderr


def test_all_means_every_machine(site):
    done = site.run("node", "exec", "--all", "--", "echo hi")
    assert done.returncode == OK
    assert sorted(done.stdout.splitlines()) == [
        "Build Server | hi",
        "Local | hi",
        "pi | hi",
    ]


def test_a_rename_shows_at_once(site):
    site.run("node", "rename", "Build Server", "cellar")
    try:
        assert "cellar" in site.nodes()
    finally:
        site.run("node", "rename", "cellar", "Build Server")
    assert "Build Server" in site.nodes()


def test_forwarded_variables_are_those_of_a_terminal_only(site):
    done = site.run(
        "node",
        "exec",
        "pi",
        "--",
        "echo $LC_TEST:$NO_COLOR:$SECRET:$MOLTIS_API_KEY",
        LC_TEST="a",
        NO_COLOR="b",
        SECRET="c",
        MOLTIS_API_KEY=site.file["api_key"],
    )
    assert done.stdout == "a:b::\n"


def test_the_environment_stands_in_for_the_flags(site, tmp_path):
    done = run_moltis(
        "node",
        "list",
        "--json",
        home=tmp_path,
        MOLTIS_GATEWAY_URL=site.file["url"],
        MOLTIS_API_KEY=site.file["api_key"],
    )
    assert done.returncode == OK
    assert len(json.loads(done.stdout)) == 3


def test_a_demo_node_shows_everything_with_one_command(tmp_path):
    with Program("gateway", "--port", 0, "--demo-node", home=tmp_path) as gateway:
        gateway.wait_for_output("node connected")
        done = run_moltis("node", "exec", "Demo node", "--", "echo hi", home=tmp_path)
        assert (done.returncode, done.stdout) == (OK, "hi\n")
        assert gateway.end() == OK


def test_a_command_that_is_running_is_running_in_the_audit(site, tmp_path):
    with Program("node", "exec", "pi", "--", "sleep 120", home=site.home) as running:

        def states():
            db = sqlite3.connect(str(site.home / ".moltis/moltis.db"))
            try:
                sql = "SELECT state FROM jobs WHERE command = 'sleep 120'"
                return [row[0] for row in db.execute(sql)]
            finally:
                db.close()

        wait_for(lambda: states() == ["running"], what=lambda: f"running: {states()}")
        running.end(signal.SIGINT)
        wait_for(lambda: states() == ["cancelled"], what=lambda: f"end: {states()}")


# -- stopping ------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_closes_the_gateway_with_all_that_it_does(own_site, number):
    """Clients are connected, idle and busy; Local runs what will not be ended."""
    url = own_site.file["url"]
    own_site.node("far")
    stubborn = "trap '' TERM; echo started; sleep 120 & wait; sleep 120"
    local = own_site.start("node", "exec", "Local", "--", stubborn, home=own_site.home)
    far = own_site.start(
        "node", "exec", "far", "--", "echo started; sleep 120", home=own_site.home
    )
    for program in (local, far):
        program.wait_for_output("started")
    idle = http.client.HTTPConnection(url[len("http://") :])
    idle.request("GET", "/health")
    idle.getresponse().read()
    try:
        assert own_site.gateway.end(number) == OK
    finally:
        idle.close()
        for program in (local, far):  # they would wait for it to come back
            program.end(signal.SIGKILL)
    assert "Traceback" not in own_site.gateway.stderr
    assert "Traceback" not in far.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_closes_a_node_and_ends_its_commands(own_site, number, tmp_path):
    node = own_site.node("far")
    line = f"echo $$ > {tmp_path}/pid; echo running; sleep 120"
    with Program("node", "exec", "far", "--", line, home=own_site.home) as running:
        running.wait_for_output("running")
        assert node.end(number) == OK
        running.process.wait(60)
    pid = int((tmp_path / "pid").read_text())
    assert not process_exists(pid)
    assert "Traceback" not in node.stderr
    wait_for(lambda: not own_site.nodes()["far"]["connected"], what="it to be offline")


def test_a_node_that_waits_for_a_silent_gateway_can_be_stopped(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        node = Program(
            *("node", "add", "--host", f"ws://127.0.0.1:{port}/ws", "--foreground"),
            home=tmp_path,
            MOLTIS_DEVICE_TOKEN="mdt_" + "x" * 43,
        )
        with node:
            connection, _ = silent.accept()
            assert node.end(signal.SIGTERM) == OK
            assert "did not answer" not in node.output  # it did not give up by itself
            connection.close()


# -- bad input -----------------------------------------------------------------


def one_line(done):
    """Return the only line on stderr; nothing else was printed, and no traceback."""
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_a_wrong_token_is_one_line_and_exit_77(site, tmp_path):
    token = "mdt_" + "x" * 43
    done = run_moltis(
        *("node", "add", "--host", site.file["url"], "--token", token),
        *("--foreground", "--name", "stranger"),
        home=tmp_path,
    )
    assert done.returncode == REFUSED
    assert token not in done.stderr
    # A warning for root comes before.
    assert "authentication failed" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_wrong_operator_key_is_one_line_and_exit_77(site):
    done = site.run("node", "list", "--api-key", "mk_" + "x" * 43)
    assert done.returncode == REFUSED
    assert "mk_xxx" not in one_line(done)


def test_no_gateway_at_all_is_one_line_and_exit_69(tmp_path):
    done = run_moltis("node", "list", home=tmp_path)
    assert done.returncode == UNREACHABLE
    assert "moltis gateway" in one_line(done)


def test_a_gateway_that_is_not_there_is_one_line_and_exit_69(tmp_path):
    done = run_moltis(
        *("node", "list", "--host", f"127.0.0.1:{free_port()}", "--api-key", "mk_x"),
        home=tmp_path,
    )
    assert done.returncode == UNREACHABLE
    assert "refused the connection" in one_line(done)


def test_a_foreground_node_keeps_trying_until_the_gateway_is_there(tmp_path):
    port = free_port()
    (tmp_path / "gateway").mkdir()
    start = ("gateway", "--port", port)
    with Program(*start, home=tmp_path / "gateway") as gateway:
        gateway.wait_for_output("Ctrl+C stops it.")
        made = run_moltis("node", "generate-token", "--json", home=tmp_path / "gateway")
        token = json.loads(made.stdout)["deviceToken"]
    node = Program(
        *("node", "add", "--host", f"127.0.0.1:{port}", "--foreground"),
        home=tmp_path,
        MOLTIS_DEVICE_TOKEN=token,
    )
    with node:
        node.wait_for_output("refused the connection")
        assert node.process.poll() is None
        with Program(*start, home=tmp_path / "gateway"):
            node.wait_for_output("connected to")


def test_a_stale_gateway_json_is_recognised(own_site):
    own_site.gateway.end(signal.SIGKILL)
    done = own_site.run("node", "list")
    assert done.returncode == UNREACHABLE
    assert "is not running any more" in one_line(done)


def test_a_second_gateway_says_who_holds_the_directory(site):
    done = site.run("gateway", "--port", "0")
    assert done.returncode == CONFIGURATION
    said = one_line(done)
    assert site.file["url"] in said
    assert str(site.gateway.pid) in said
    assert site.run("node", "list").returncode == OK


def test_a_port_in_use_is_named(site, tmp_path):
    port = site.file["url"].rpartition(":")[2]
    done = run_moltis("gateway", "--port", port, home=tmp_path)
    assert done.returncode == CONFIGURATION
    assert f"port {port}: Address already in use" in one_line(done)
    assert not (tmp_path / ".moltis/gateway.json").exists()


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_a_port_that_is_none_is_a_matter_of_usage(tmp_path, port):
    assert run_moltis("gateway", "--port", port, home=tmp_path).returncode == USAGE


def test_a_data_directory_that_is_a_file_is_named(tmp_path):
    (tmp_path / ".moltis").write_text("")
    for words in (("gateway",), ("node", "list"), ("node", "run")):
        done = run_moltis(*words, home=tmp_path)
        assert done.returncode == CONFIGURATION, words
        assert str(tmp_path / ".moltis") in one_line(done)


@pytest.mark.parametrize(
    ("name", "is_directory"),
    [
        ("jobs", False),
        ("moltis.db", True),
        ("gateway.json", True),
        ("gateway.lock", True),
    ],
)
def test_a_file_for_a_directory_of_the_gateway_or_the_reverse_is_named(
    tmp_path, name, is_directory
):
    path = tmp_path / ".moltis" / name
    path.parent.mkdir(mode=0o700)
    if is_directory:
        path.mkdir()
    else:
        path.touch()
    done = run_moltis("gateway", "--port", "0", home=tmp_path)
    assert done.returncode == CONFIGURATION
    assert str(path) in one_line(done)


def as_nobody(python, *arguments, home):
    """Run the program as a user who may do nothing."""

    def drop():
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)

    return subprocess.run(
        [python, "-B", str(home / "moltis.py"), *arguments],
        check=False,
        capture_output=True,
        text=True,
        preexec_fn=drop,
        env=clean_environment(home),
        cwd="/",
        timeout=60,
    )


@pytest.fixture
def public_directory():
    """A directory that every user can reach, with the program in it."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    path.chmod(0o755)
    shutil.copy(PROGRAM, path / "moltis.py")
    yield path
    shutil.rmtree(path)


def test_a_data_directory_that_cannot_be_read_is_named(public_directory):
    data = public_directory / ".moltis"
    data.mkdir(mode=0o700)
    (data / "gateway.json").write_text("{}")
    # The interpreter of the tests may itself lie where only root may look.
    python = "/usr/bin/python3"
    for words in (("gateway", "--port", "0"), ("node", "list"), ("node", "run")):
        done = as_nobody(python, *words, home=public_directory)
        assert done.returncode == CONFIGURATION, done.stderr
        assert str(data) in one_line(done)
        assert "ermi" in done.stderr  # permission, permitted


def test_a_database_of_a_newer_version_is_left_alone(tmp_path):
    (tmp_path / ".moltis").mkdir()
    path = tmp_path / ".moltis/moltis.db"
    db = sqlite3.connect(str(path))
    db.execute("PRAGMA user_version = 999")
    db.close()
    before = path.read_bytes()
    done = run_moltis("gateway", "--port", "0", home=tmp_path)
    assert done.returncode == CONFIGURATION
    assert "999" in one_line(done)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_left_alone(tmp_path):
    (tmp_path / ".moltis").mkdir()
    path = tmp_path / ".moltis/moltis.db"
    path.write_bytes(b"my diary " * 1000)
    done = run_moltis("gateway", "--port", "0", home=tmp_path)
    assert done.returncode == CONFIGURATION
    assert str(path) in one_line(done)
    assert path.read_bytes() == b"my diary " * 1000


@pytest.mark.parametrize("text", ["{", "[]", '{"url": 7}', '"x"', "\udcff"])
def test_a_gateway_json_that_makes_no_sense_is_named(tmp_path, text):
    (tmp_path / ".moltis").mkdir()
    path = tmp_path / ".moltis/gateway.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    done = run_moltis("node", "list", home=tmp_path)
    assert done.returncode == CONFIGURATION
    assert str(path) in one_line(done)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_under_the_database_loses_nothing(small_disk, tmp_path):
    """What leaves no trace does not run; with room again all goes on."""
    data = {"MOLTIS_DATA_DIR": str(small_disk)}
    with Program("gateway", "--port", 0, home=tmp_path, **data) as gateway:
        gateway.wait_for_output("Ctrl+C stops it.")
        run = ("node", "exec", "Local", "--")
        before = run_moltis(*run, "echo one", home=tmp_path, **data)
        assert before.stdout == "one\n"
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(b"x" * 4096)
        witness = tmp_path / "ran"
        failed = None
        for _ in range(200):  # the log file has pages to spare at first
            failed = run_moltis(*run, f"echo x >> {witness}", home=tmp_path, **data)
            if failed.returncode:
                break
        assert failed.returncode == UNREACHABLE
        assert "moltis.db" in one_line(failed)
        ran = len(witness.read_text()) if witness.exists() else 0
        assert run_moltis("node", "list", home=tmp_path, **data).returncode == OK
        assert (len(witness.read_text()) if witness.exists() else 0) == ran
        filler.unlink()
        after = run_moltis(*run, "echo two", home=tmp_path, **data)
        assert after.stdout == "two\n"
        assert gateway.end() == OK


def test_two_machines_with_one_token(own_site, tmp_path):
    words = [*own_site.add_command("twin"), "--foreground"]
    first = own_site.start(*words, home=own_site._home("first"))
    first.wait_for_output("connected to")
    second = run_moltis(*words, home=own_site._home("second"))
    assert second.returncode == REFUSED
    assert "this token is in use by another machine" in second.stderr
    assert own_site.nodes()["twin"]["connected"]


def test_a_revoked_node_is_dropped_at_once_and_stays_out(own_site):
    node = own_site.node("gone")
    assert own_site.run("node", "revoke", "gone").returncode == OK
    wait_for(lambda: node.process.poll() is not None, what="the node to end")
    assert node.process.returncode == REFUSED
    assert "gone" not in {n for n, v in own_site.nodes().items() if v["connected"]}


def test_an_offline_node_says_since_when(own_site):
    own_site.node("away").end()
    wait_for(lambda: not own_site.nodes()["away"]["connected"], what="it to be offline")
    done = own_site.run("node", "exec", "away", "--", "true")
    assert done.returncode == UNREACHABLE
    since = r"away has been offline since \d{4}-\d\d-\d\d \d\d:\d\d"
    assert re.search(since, one_line(done))
    assert re.search(r"away +offline for", own_site.run("node", "list").stdout)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("node", "exec", "pi"), "no command"),
        (("node", "exec", "--", "true"), "name the nodes, or say --all"),
        (("node", "exec", "pi", "--all", "--", "true"), "name the nodes"),
        (("node", "exec", "pi", "--timeout", "0", "--", "true"), "--timeout"),
        (("node", "exec", "pi", "--timeout", "nan", "--", "true"), "--timeout"),
        (("node", "exec", "--all", "--stdin", "--", "cat"), "--stdin feeds one node"),
        (("node", "exec", "pi", "--", ""), "command is empty"),
        (("node", "rename", "pi", "\a"), "printable characters"),
        (("node", "rename", "Local", "x"), "Local cannot be renamed"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_exit_2(site, words, said):
    done = site.run(*words)
    assert done.returncode == USAGE
    assert said in one_line(done)


def test_an_unknown_node_is_named_with_those_there_are(site):
    done = site.run("node", "exec", "nobody", "--", "true")
    assert done.returncode == FAILURE
    said = one_line(done)
    assert "'nobody'" in said
    assert "Build Server" in said


def test_an_answer_that_is_not_moltis_is_said_to_be_none(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def serve():
            connection, _ = other.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"220 mail.example.org ESMTP\r\n")

        thread = threading.Thread(target=serve, name="test-other")
        thread.start()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        done = run_moltis(
            *("node", "list", "--host", address, "--api-key", "mk_x"), home=tmp_path
        )
        thread.join()
    assert done.returncode == UNREACHABLE
    assert "not HTTP" in one_line(done)
