"""Node service: units, the program's copy, the node's state and log, real systemd."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import plistlib
import pwd
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support import (
    Program,
    ScriptedTools,
    clean_environment,
    free_port,
    process_exists,
    run_moltis,
    wait_for,
)

import moltis

# Stands in for the program in a service: it says who it is, logs, and waits.
STAND_IN = b"""
import json, os, pathlib, sys, time

def main():
    directory = pathlib.Path(os.environ.get("MOLTIS_DATA_DIR", "~/.moltis"))
    directory = directory.expanduser()
    state = {"pid": os.getpid(), "connected": True, "since": time.time()}
    (directory / "node-state.json").write_text(json.dumps(state))
    (directory / "argv.json").write_text(json.dumps(sys.argv[1:]))
    print("stand-in runs", __name__, flush=True)
    if "once" not in sys.argv:
        time.sleep(120)

if __name__ == "__main__":
    main()
"""

BROKEN = b"import sys\n\n\ndef main():\n    sys.exit('nothing works')\n"


@pytest.fixture
def directory(home):
    return home / ".moltis"


@pytest.fixture
def spec(home, directory):
    return moltis.ServiceSpec(sys.executable, directory, home)


@pytest.fixture
def tools(tmp_path):
    return ScriptedTools(tmp_path / "tools")


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


# -- its files ----------------------------------------------------------------------


def test_removing_the_files_keeps_the_log_and_what_is_not_ours(directory):
    moltis.install_program(directory, STAND_IN)
    moltis.NodeSettings("ws://x/ws", "mdt_secret", "id", "name").save(directory)
    moltis.NodeState(os.getpid(), True, 1.0).save(directory)
    for name in ("node.log", "node.log.1", "gateway.json"):
        (directory / name).write_text("x")
    moltis.remove_node_files(directory)
    left = sorted(path.name for path in directory.iterdir())
    assert left == ["gateway.json", "node.log", "node.log.1"]
    moltis.remove_node_files(directory)  # whatever is there
    moltis.remove_node_files(directory / "nowhere")


# -- what the running node says ------------------------------------------------------


def test_the_state_is_read_as_it_was_written(directory):
    state = moltis.NodeState(os.getpid(), False, 12.5, "the gateway refused the token")
    state.save(directory)
    assert moltis.NodeState.load(directory) == state


def test_the_state_of_a_node_that_has_ended_is_no_state(directory):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    moltis.NodeState(ended.pid, True, 1.0).save(directory)
    assert moltis.NodeState.load(directory) is None


def test_the_state_of_another_process_with_its_id_is_no_state(directory):
    mark = moltis.process_mark(os.getpid())
    assert mark != moltis.process_mark(1)
    moltis.NodeState(os.getpid(), True, 1.0, mark=mark).save(directory)
    assert moltis.NodeState.load(directory)
    moltis.NodeState(os.getpid(), True, 1.0, mark=mark + "1").save(directory)
    assert moltis.NodeState.load(directory) is None


def test_the_service_manager_finds_a_private_log(spec, tools, not_lingering):
    tools.add("systemctl", "exit 0")
    previous = os.umask(0)
    try:
        manager = moltis.SystemdService(spec, tools.environ)
        manager.install()
    finally:
        os.umask(previous)
    assert mode_of(spec.log) == 0o600
    assert mode_of(manager.unit) == 0o644


@pytest.mark.parametrize("name", ["a\nb", "a\udcffb"])
@pytest.mark.parametrize(
    ("part", "advice"), [("directory", "MOLTIS_DATA_DIR"), ("python", "with a Python")]
)
def test_a_path_that_no_unit_can_name_is_refused(
    home, spec, tools, not_lingering, name, part, advice
):
    path = home / name
    spec = spec.replace(**{part: path if part == "directory" else str(path)})
    tools.add("systemctl", "exit 0")
    with pytest.raises(moltis.BadConfiguration, match=advice):
        moltis.SystemdService(spec, tools.environ).install()


def test_no_state_is_no_state(directory):
    moltis.NodeState.clear(directory)
    assert moltis.NodeState.load(directory) is None


@pytest.mark.parametrize("text", ["x", "[]", '{"pid": "1"}', "{}", '{"pid": 1}'])
def test_a_state_that_cannot_be_read_says_so(directory, text):
    directory.mkdir(parents=True)
    (directory / "node-state.json").write_text(text)
    with pytest.raises(moltis.BadConfiguration, match=r"node-state\.json"):
        moltis.NodeState.load(directory)


@pytest.mark.parametrize("pid", [0, -1, 2**70])
def test_impossible_process_ids_do_not_run(directory, pid):
    moltis.NodeState(pid, True, 1.0).save(directory)
    assert moltis.NodeState.load(directory) is None


def test_waiting_ends_when_the_node_is_connected(directory):
    moltis.NodeState(os.getpid(), False, 1.0, "refused").save(directory)
    found = []

    def wait():
        found.append(moltis.wait_until_connected(directory, moltis.Deadline(20)))

    waiting = threading.Thread(target=wait)
    waiting.start()
    connected = moltis.NodeState(os.getpid(), True, 2.0)
    connected.save(directory)
    waiting.join()
    assert found == [connected]


def test_waiting_in_vain_returns_why(directory):
    moltis.NodeState(os.getpid(), False, 1.0, "refused").save(directory)
    state = moltis.wait_until_connected(directory, moltis.Deadline(0))
    assert state is not None
    assert state.error == "refused"


# -- its log -------------------------------------------------------------------------


@pytest.fixture
def node_log(directory):
    handler = moltis.NodeLog(directory, limit=1000)
    yield handler
    handler.close()


def record(text):
    return logging.LogRecord("moltis", logging.INFO, __file__, 1, text, None, None)


def test_the_log_is_for_its_owner_alone(directory, node_log):
    node_log.handle(record("hello"))
    assert (directory / "node.log").read_text() == "hello\n"
    assert mode_of(directory / "node.log") == 0o600


def test_a_full_log_becomes_the_old_one(directory, node_log):
    for number in range(250):
        node_log.handle(record(f"line {number:03}"))
    log, old = directory / "node.log", directory / "node.log.1"
    assert log.stat().st_size <= 1000
    lines = (old.read_text() + log.read_text()).splitlines()
    assert lines == [f"line {number:03}" for number in range(250 - len(lines), 250)]
    assert mode_of(old) == 0o600
    assert sorted(path.name for path in directory.iterdir()) == [
        "node.log",
        "node.log.1",
    ]


def test_who_has_the_log_open_goes_on_writing_to_the_new_one(directory, node_log):
    """A service manager has it open as stdout and stderr, for appending."""
    with open(directory / "node.log", "a") as stderr:
        while not (directory / "node.log.1").exists():
            node_log.handle(record("x" * 50))
        stderr.write("Traceback\n")
    node_log.handle(record("after"))
    assert (directory / "node.log").read_text() == "Traceback\nafter\n"


def test_a_log_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "node.log").mkdir()
    with pytest.raises(moltis.BadConfiguration, match=r"cannot write .*node\.log"):
        moltis.NodeLog(tmp_path)


def test_the_last_line_of_the_log(directory, node_log):
    assert moltis.last_log_line(directory / "nowhere") == ""
    assert moltis.last_log_line(directory) == ""
    node_log.handle(record("first"))
    node_log.handle(record("last"))
    assert moltis.last_log_line(directory) == "last"


def test_following_the_log_shows_what_comes_also_after_it_was_emptied(
    directory, node_log
):
    node_log.handle(record("before"))
    shown, stopped = [], threading.Event()
    follower = threading.Thread(
        target=moltis.follow_log, args=(directory, shown.append, stopped)
    )
    follower.start()
    try:
        wait_for(lambda: b"before" in b"".join(shown), what="the old line")
        while not (directory / "node.log.1").exists():
            node_log.handle(record("x" * 90))
        node_log.handle(record("after"))
        wait_for(lambda: b"after" in b"".join(shown), what="the new line")
    finally:
        stopped.set()
        follower.join()


def test_following_a_long_log_starts_with_a_whole_line(directory, node_log):
    (directory / "node.log").write_text("0123456789\n" * 1000)
    shown, stopped = [], threading.Event()
    stopped.set()
    moltis.follow_log(directory, shown.append, stopped)
    assert set(b"".join(shown).splitlines()) == {b"0123456789"}
    assert len(b"".join(shown)) <= 4096


def test_following_no_log_says_so(directory):
    with pytest.raises(moltis.BadConfiguration, match=r"cannot read .*node\.log"):
        moltis.follow_log(directory, print, threading.Event())


# -- which manager -------------------------------------------------------------------


def test_each_system_has_its_manager(spec):
    choose = moltis.service_manager
    assert isinstance(choose(spec, {}, "linux"), moltis.SystemdService)
    assert isinstance(choose(spec, {}, "darwin"), moltis.LaunchdService)
    with pytest.raises(moltis.NoServiceManager, match="freebsd13 has neither"):
        choose(spec, {}, "freebsd13")


def test_without_a_manager_there_are_two_other_ways(home):
    directory = home / "50% of it"
    spec = moltis.ServiceSpec("/usr/bin/python3", directory, home)
    text = str(moltis.no_service_manager(spec, "no reason"))
    reason, by_hand, cron = text.splitlines()
    assert "(no reason)" in reason
    assert "configuration is kept" in reason
    line = by_hand.split(":", 1)[1].strip()
    assert shlex.split(line) == [
        f"MOLTIS_DATA_DIR={directory}",
        "/usr/bin/python3",
        f"{directory}/moltis.py",
        "node",
        "run",
    ]
    assert cron.split("@reboot ")[1] == line.replace("%", r"\%")


# -- systemd, as text ----------------------------------------------------------------


def unit_fields(text):
    lines = [line for line in text.splitlines() if line and line[0] not in "#["]
    return [tuple(line.split("=", 1)) for line in lines]


def test_the_unit_restarts_for_ever_and_holds_no_parameter(spec):
    fields = dict(unit_fields(moltis.render_systemd_unit(spec)))
    assert fields["StartLimitIntervalSec"] == "0"
    assert fields["Restart"] == "always"
    assert fields["RestartSec"] == "10"
    assert fields["KillMode"] == "control-group"
    assert fields["TimeoutStopSec"] == "10"
    assert fields["OOMPolicy"] == "continue"
    assert "UMask" not in fields  # commands have the user's own
    assert fields["StandardOutput"] == f"append:{spec.log}"
    assert fields["StandardError"] == f"append:{spec.log}"
    assert fields["WantedBy"] == "default.target"
    assert fields["ExecStart"].endswith(f'"{spec.directory}" "node" "run"')
    assert "Environment" not in fields


def test_another_data_directory_is_told_to_the_service(home):
    spec = moltis.ServiceSpec("/usr/bin/python3", home / "else", home)
    fields = dict(unit_fields(moltis.render_systemd_unit(spec)))
    assert fields["Environment"] == f'"MOLTIS_DATA_DIR={home}/else"'


def test_the_unit_quotes_what_systemd_would_read_otherwise(home):
    """systemd.syntax(7), systemd.unit(5) on specifiers"""
    spec = moltis.ServiceSpec("/opt/a b/%p", home / 'x "%h" \\', home)
    fields = dict(unit_fields(moltis.render_systemd_unit(spec)))
    assert fields["ExecStart"].startswith('"/opt/a b/%%p" "-IS" "-c" "')
    assert f'"{home}/x \\"%%h\\" \\\\" "node"' in fields["ExecStart"]
    assert fields["StandardOutput"] == f'append:{home}/x "%%h" \\/node.log'
    assert fields["Environment"] == f'"MOLTIS_DATA_DIR={home}/x \\"%%h\\" \\\\"'


@pytest.mark.parametrize("name", ["a b", "%h", "$HOME", 'a"b', "a'b", "a\\b", "a=b"])
def test_systemd_takes_a_unit_for_paths_with_any_character(home, name):
    """systemd.service(5): the path of a program is not unescaped like its arguments."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze here")
    python = home / name / "python3"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    unit = home / moltis.UNIT_NAME
    spec = moltis.ServiceSpec(str(python), home / f"{name} data", home)
    unit.write_text(moltis.render_systemd_unit(spec))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", str(unit)],
        check=False,
        capture_output=True,
        text=True,
        env=clean_environment(home, XDG_RUNTIME_DIR=str(home)),
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_relative_data_directory_is_the_same_for_the_service(monkeypatch, home):
    monkeypatch.chdir(home)
    found = moltis.data_directory({"MOLTIS_DATA_DIR": "a/../b"})
    assert found == home / "b"


def test_a_relative_data_directory_in_a_deleted_one_is_refused(monkeypatch, home):
    gone = home / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(moltis.BadConfiguration, match="use an absolute path"):
        moltis.data_directory({"MOLTIS_DATA_DIR": "a"})


# -- systemd, with a systemctl that writes down what it is asked ---------------------


@pytest.fixture
def not_lingering(monkeypatch):
    monkeypatch.setattr(moltis.SystemdService, "lingers", lambda self: False)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "systemctl: No such file or directory"),
        ("echo 'Failed to connect to bus: No medium found' >&2; exit 1", "No medium"),
    ],
)
def test_without_user_systemd_nothing_is_written(
    spec, tools, not_lingering, script, reason
):
    if script:
        tools.add("systemctl", script)
    manager = moltis.SystemdService(spec, tools.environ)
    with pytest.raises(moltis.NoServiceManager, match=reason):
        manager.install()
    assert not manager.unit.exists()


def test_a_user_without_a_session_gets_at_their_own_manager(spec, tools, not_lingering):
    tools.add(
        "systemctl", "echo runtime=$XDG_RUNTIME_DIR bus=$DBUS_SESSION_BUS_ADDRESS"
    )
    environ = dict(
        tools.environ, XDG_RUNTIME_DIR="/", DBUS_SESSION_BUS_ADDRESS="unix:path=/x"
    )
    if os.getuid() == 0:  # whose / it is: take what is nobody's
        environ["XDG_RUNTIME_DIR"] = "/nowhere"
    manager = moltis.SystemdService(spec, environ)
    output = manager._try_systemctl("is-active").text
    assert output == f"runtime=/run/user/{os.getuid()} bus="


def test_without_lingering_the_person_is_told_what_to_do(spec, tools, not_lingering):
    tools.add("systemctl", "exit 0")
    tools.add("loginctl", "echo 'Access denied' >&2; exit 1")
    manager = moltis.SystemdService(spec, tools.environ)
    (note,) = manager.install()
    name = pwd.getpwuid(os.getuid()).pw_name
    assert f"sudo loginctl enable-linger {name}" in note
    assert ["loginctl", "enable-linger", name] in tools.calls()
    assert manager.unit.read_text() == moltis.render_systemd_unit(spec)


def test_a_systemctl_that_refuses_is_reported(spec, tools, not_lingering):
    tools.add("systemctl", 'case "$*" in *enable*) echo "it is so" >&2; exit 1;; esac')
    manager = moltis.SystemdService(spec, tools.environ)
    with pytest.raises(moltis.UserError, match=r"enable moltis-node\.service` failed"):
        manager.install()


def test_remove_works_where_there_is_no_manager_any_more(spec, tools, not_lingering):
    manager = moltis.SystemdService(spec, tools.environ)
    wants = manager.unit.parent / "default.target.wants" / "moltis-node.service"
    wants.parent.mkdir(parents=True)
    manager.unit.write_text("x")
    wants.symlink_to(manager.unit)
    assert manager.remove() == []
    assert not manager.unit.exists()
    assert not wants.parent.exists()
    assert manager.remove() == []
    assert not manager.status().installed


# -- launchd -------------------------------------------------------------------------


@pytest.fixture
def launchd(spec, tools):
    tools.add("launchctl", "exit 0")
    return moltis.LaunchdService(spec, tools.environ)


def test_the_agent_restarts_for_ever_and_holds_no_parameter(spec):
    assert plistlib.loads(moltis.render_launchd_plist(spec)) == {
        "Label": "org.moltis.node",
        "ProgramArguments": spec.command,
        "RunAtLoad": True,
        "KeepAlive": True,
        "ThrottleInterval": 10,
        "ExitTimeOut": 10,
        "ProcessType": "Background",
        "StandardOutPath": str(spec.log),
        "StandardErrorPath": str(spec.log),
    }


def test_another_data_directory_is_told_to_the_agent(home):
    spec = moltis.ServiceSpec("/usr/bin/python3", home / "<&>", home)
    agent = plistlib.loads(moltis.render_launchd_plist(spec))
    assert agent["EnvironmentVariables"] == {"MOLTIS_DATA_DIR": f"{home}/<&>"}


def test_the_agents_arguments_run_the_copy_as_they_stand(home, launchd, directory):
    moltis.install_program(directory, STAND_IN.replace(b'"once"', b'"run"'))
    launchd.install()
    agent = plistlib.loads(launchd.unit.read_bytes())
    with open(agent["StandardOutPath"], "ab") as log:
        subprocess.run(
            agent["ProgramArguments"], stdout=log, env={"HOME": str(home)}, check=True
        )
    assert json.loads((directory / "argv.json").read_text()) == ["node", "run"]
    assert moltis.last_log_line(directory) == "stand-in runs moltis"


def test_the_agent_is_loaded_anew_and_started(launchd, tools):
    launchd.install()
    launchd.start()
    domain = f"gui/{os.getuid()}"
    assert launchd.unit.name == "org.moltis.node.plist"
    assert tools.calls() == [
        ["launchctl", "enable", f"{domain}/org.moltis.node"],
        ["launchctl", "bootout", f"{domain}/org.moltis.node"],
        ["launchctl", "bootstrap", domain, str(launchd.unit)],
        ["launchctl", "kickstart", "-k", f"{domain}/org.moltis.node"],
    ]


def test_loading_is_tried_until_the_old_agent_is_gone(launchd, tools):
    tools.add(
        "launchctl",
        'case $1 in bootstrap) test -e "$0.done" || { : >"$0.done"; exit 5; };; esac',
    )
    launchd.install()
    launchd.start()
    assert [call[1] for call in tools.calls()].count("bootstrap") == 2


def test_the_agent_is_removed_also_when_half_installed(launchd, tools):
    launchd.install()
    assert launchd.remove() == []
    assert not launchd.unit.exists()
    tools.add("launchctl", "echo 'Boot-out failed: 3: No such process' >&2; exit 3")
    assert launchd.remove() == []


PRINTED = """gui/501/org.moltis.node = {
	active count = 1
	path = /Users/u/Library/LaunchAgents/org.moltis.node.plist
	type = LaunchAgent
	state = running

	program = /usr/bin/python3
	arguments = {
		/usr/bin/python3
	}

	default environment = {
		PATH => /usr/bin:/bin:/usr/sbin:/sbin
	}

	domain = gui/501 [100006]
	minimum runtime = 10
	exit timeout = 10
	runs = 1
	pid = 34567
	last exit code = (never exited)

	endpoints = {
		"x" = {
			state = idle
			pid = 1
		}
	}
}
"""


def test_the_status_is_read_from_launchctl_print(launchd, tools):
    """Output of launchctl on macOS 14."""
    launchd.install()
    tools.add("launchctl", f"cat <<'END'\n{PRINTED}END")
    assert launchd.status() == moltis.ServiceStatus(
        installed=True, enabled=True, active=True, pid=34567, state="running"
    )
    tools.add("launchctl", "echo 'Could not find service' >&2; exit 113")
    assert launchd.status() == moltis.ServiceStatus(
        installed=True, enabled=True, active=False, pid=None, state="not loaded"
    )
    launchd.unit.unlink()
    assert launchd.status().state == "not installed"


def test_a_mac_without_launchctl_gets_the_other_ways(spec, tools):
    manager = moltis.LaunchdService(spec, tools.environ)
    with pytest.raises(moltis.NoServiceManager, match="@reboot"):
        manager.install()


# -- real systemd --------------------------------------------------------------------


@pytest.fixture
def real(monkeypatch):
    """The user's own systemd, and all that is written for it in their real home."""
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("MOLTIS_DATA_DIR")
    spec = moltis.ServiceSpec(moltis.lasting_python(), home / ".moltis", home)
    manager = moltis.SystemdService(spec, os.environ)
    if (
        not Path("/run/systemd/system").exists()
        or manager._try_systemctl("status").status
    ):
        pytest.skip("needs a working systemctl --user")
    if manager.unit.exists() or spec.directory.exists():
        pytest.skip("would touch the moltis node of this user")
    yield manager
    manager.remove()
    shutil.rmtree(spec.directory)


def running_state(directory):
    return wait_for(
        lambda: moltis.NodeState.load(directory), 30, "the node to say that it runs"
    )


@pytest.mark.systemd
def test_systemd_starts_the_node_and_has_it_start_on_boot(real):
    directory = real._spec.directory
    moltis.install_program(directory, STAND_IN)
    assert real.install() == []
    real.start()
    state = running_state(directory)
    assert json.loads((directory / "argv.json").read_text()) == ["node", "run"]
    assert real.status() == moltis.ServiceStatus(
        installed=True,
        enabled=True,
        active=True,
        pid=state.pid,
        state="active (running)",
    )
    assert Path("/var/lib/systemd/linger", moltis.account_name(os.getuid())).exists()
    wait_for(lambda: "stand-in runs moltis" in moltis.last_log_line(directory))
    assert mode_of(directory / "node.log") == 0o600
    # FAULTS A20: a command that the kernel ends for its memory ends no node.
    shown = real._try_systemctl("show", "--property=OOMPolicy", moltis.UNIT_NAME)
    assert shown.stdout == b"OOMPolicy=continue\n"


@pytest.mark.systemd
def test_systemd_starts_a_node_that_was_killed_again(real):
    directory = real._spec.directory
    moltis.install_program(directory, STAND_IN)
    real.install()
    real.start()
    killed = running_state(directory).pid
    os.kill(killed, signal.SIGKILL)
    # Killed, it has a process id until systemd has taken note of its end.
    wait_for(lambda: running_state(directory).pid != killed, 60, "another process")
    assert real.status().pid == running_state(directory).pid


@pytest.mark.systemd
def test_systemd_runs_the_new_program_after_a_second_start(real):
    directory = real._spec.directory
    for word in (b"first", b"other"):
        moltis.install_program(directory, STAND_IN.replace(b"stand-in", word))
        real.install()
        real.start()
        running_state(directory)
        wait_for(lambda w=word: w.decode() in moltis.last_log_line(directory))


@pytest.mark.systemd
def test_systemd_ends_the_node_and_all_that_it_started(real):
    directory = real._spec.directory
    child = b'__import__("subprocess").Popen(["sleep", "120"], start_new_session=True)'
    program = STAND_IN.replace(
        b"    state =", b"    child = " + child + b"\n    state ="
    )
    program = program.replace(b'"pid": os.getpid()', b'"pid": child.pid')
    moltis.install_program(directory, program)
    real.install()
    real.start()
    started = running_state(directory).pid
    real.stop()
    assert not process_exists(started)
    assert not real.status().active
    assert real.status().enabled


@pytest.mark.systemd
def test_systemd_keeps_trying_a_node_that_cannot_start(real):
    directory = real._spec.directory
    moltis.install_program(directory, BROKEN)
    real.install()
    real._systemctl("start", moltis.UNIT_NAME)
    wait_for(lambda: "nothing works" in moltis.last_log_line(directory), 60)
    wait_for(lambda: "auto-restart" in real.status().state, 60, "the next attempt")
    assert "exit-code" in real.status().state
    assert not real.status().active


@pytest.mark.systemd
def test_an_interpreter_that_is_gone_is_reported_at_once(real):
    directory = real._spec.directory
    moltis.install_program(directory, STAND_IN)
    spec = moltis.ServiceSpec("/nowhere/python3", directory, directory.parent)
    manager = moltis.SystemdService(spec, os.environ)
    manager.install()
    with pytest.raises(moltis.UserError, match=r"start moltis-node\.service` failed"):
        manager.start()


@pytest.mark.systemd
def test_removing_leaves_no_file_but_the_log(real):
    directory = real._spec.directory
    moltis.install_program(directory, STAND_IN)
    real.install()
    real.start()
    pid = running_state(directory).pid
    (note,) = real.remove()
    assert "disable-linger" in note
    moltis.remove_node_files(directory)
    (directory / "argv.json").unlink()  # the stand-in's own
    assert [path.name for path in directory.iterdir()] == ["node.log"]
    assert not process_exists(pid)
    assert not real.unit.exists()
    assert not (real.unit.parent / "default.target.wants").exists()
    assert real.status() == moltis.ServiceStatus(
        installed=False, enabled=False, active=False, pid=None, state="not installed"
    )


@pytest.mark.systemd
def test_an_odd_data_directory_and_interpreter_work(real):
    home = real.unit.parents[3]
    directory = home / ".moltis" / 'a "b" %h $HOME \\x'
    moltis.install_program(directory, STAND_IN)
    python = directory / "it's python"
    python.symlink_to(moltis.lasting_python())
    spec = moltis.ServiceSpec(str(python), directory, home)
    manager = moltis.SystemdService(spec, os.environ)
    manager.install()
    manager.start()
    assert manager.status().pid == running_state(directory).pid
    wait_for(lambda: "stand-in" in moltis.last_log_line(directory), what="the log")
    manager.remove()


@pytest.mark.systemd
def test_a_program_without_a_session_finds_its_manager(real):
    """As from cron: no XDG_RUNTIME_DIR, no bus address."""
    bare = {"PATH": os.environ["PATH"]}
    manager = moltis.SystemdService(real._spec, bare)
    moltis.install_program(real._spec.directory, STAND_IN)
    assert manager.install() == []
    manager.start()
    assert manager.status().pid == running_state(real._spec.directory).pid


# -- the whole way: gateway, `node add`, systemd -------------------------------------


@pytest.fixture
def gateway(tmp_path):
    """A gateway process; its data directory is `gateway.directory`."""
    with gateway_process(tmp_path / "gateway", free_port()) as program:
        yield program


@contextlib.contextmanager
def gateway_process(directory, port):
    directory.mkdir(exist_ok=True)
    program = Program("gateway", "--port", port, home=directory)
    with program:
        program.wait_for_output("Ctrl+C stops it")
        program.directory, program.port = directory, port
        program.url = f"ws://127.0.0.1:{port}/ws"
        yield program


def new_token(gateway):
    done = run_moltis("node", "generate-token", "--json", home=gateway.directory)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["deviceToken"]


def connected_names(gateway):
    done = run_moltis("node", "list", "--json", home=gateway.directory)
    nodes = json.loads(done.stdout) if done.returncode == 0 else []
    return {n["displayName"] for n in nodes if n["connected"]} - {"Local"}


def add_node(gateway, home, name, token=None):
    return run_moltis(
        *("node", "add", "--host", gateway.url, "--name", name),
        home=home,
        MOLTIS_DEVICE_TOKEN=token or new_token(gateway),
    )


@pytest.mark.systemd
def test_an_added_node_is_there_from_then_on(real, gateway):
    home, directory = real._spec.home, real._spec.directory
    token = new_token(gateway)
    done = add_node(gateway, home, "Build Server", token)
    assert done.returncode == 0, done.stderr
    node_id = moltis.NodeSettings.load(directory).node_id
    for words in ("Build Server", node_id, gateway.url, "active", "node.log"):
        assert words in done.stdout
    assert mode_of(directory / "node.json") == 0o600
    assert connected_names(gateway) == {"Build Server"}
    assert list((directory / "__pycache__").glob("moltis.*.pyc"))

    status = run_moltis("node", "status", "--json", home=home)
    value = json.loads(status.stdout)
    assert status.returncode == 0
    assert value["connected"] is True
    assert value["nodeId"] == node_id
    os.kill(value["pid"], signal.SIGKILL)
    wait_for(lambda: not connected_names(gateway), 60, "the gateway to miss it")
    wait_for(lambda: connected_names(gateway), 60, "the node to come back")

    done = add_node(gateway, home, "Build Server", token)
    assert done.returncode == 0, done.stderr
    assert moltis.NodeSettings.load(directory).node_id == node_id


@pytest.mark.systemd
def test_a_node_waits_for_a_gateway_that_is_away(real, tmp_path):
    home, port = real._spec.home, free_port()
    with gateway_process(tmp_path / "gateway", port) as gateway:
        assert add_node(gateway, home, "Pi").returncode == 0
    status = wait_for(lambda: away(home), 60, "the node to notice")
    assert status["lastError"]
    assert status["pid"]
    with gateway_process(tmp_path / "gateway", port) as gateway:
        wait_for(lambda: connected_names(gateway) == {"Pi"}, 60, "its return")


def away(home):
    done = run_moltis("node", "status", "--json", home=home)
    return json.loads(done.stdout) if done.returncode == 1 else None


@pytest.mark.systemd
def test_a_gateway_that_is_not_there_is_said_when_the_node_is_added(real):
    url = f"ws://127.0.0.1:{free_port()}/ws"
    done = run_moltis(
        *("node", "add", "--host", url, "--token", "mdt_" + "x" * 43),
        home=real._spec.home,
    )
    assert done.returncode == moltis.EXIT_UNREACHABLE
    assert "refused the connection" in done.stderr
    assert real.status().active


@pytest.mark.systemd
def test_a_removed_node_leaves_no_file_but_its_log(real, gateway):
    home, directory = real._spec.home, real._spec.directory
    before = {path for path in home.rglob("*") if directory not in path.parents}
    add_node(gateway, home, "Pi")
    done = run_moltis("node", "remove", home=home)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in directory.iterdir()] == ["node.log"]
    after = {path for path in home.rglob("*") if directory not in path.parents}
    assert {p for p in after - before if not p.is_dir()} == set()
    assert run_moltis("node", "remove", home=home).returncode == 0
    assert run_moltis("node", "status", home=home).returncode == 1


@pytest.mark.systemd
def test_one_line_makes_a_node_of_a_machine_with_only_python(real, gateway):
    """curl … | python3 - node add …"""
    text = Path(moltis.__file__).read_bytes()
    done = subprocess.run(
        [sys.executable, "-", "node", "add", "--host", gateway.url, "--name", "Pi"],
        input=text,
        check=False,
        capture_output=True,
        cwd="/",
        env=clean_environment(real._spec.home, MOLTIS_DEVICE_TOKEN=new_token(gateway)),
    )
    assert done.returncode == 0, done.stderr
    assert connected_names(gateway) == {"Pi"}
    assert (real._spec.directory / "moltis.py").read_bytes() == text


# -- and a reboot --------------------------------------------------------------------

SDTB = Path(__file__).resolve().parent.parent.parent / "shared" / "tools" / "sdtb"


def in_machine(*words):
    return subprocess.run(
        [str(SDTB), *words], check=False, capture_output=True, text=True
    )


@pytest.fixture
def machine():
    """A machine that boots systemd and has this one's loopback interface."""
    if os.getuid() != 0 or not SDTB.exists():
        pytest.skip("needs root, and ../shared/tools/sdtb to boot a machine in")
    name = f"moltis-{os.getpid()}"
    up = in_machine("up", "-n", name, "-b", str(Path(moltis.__file__).parent))
    try:
        assert up.returncode == 0, up.stderr
        yield name
    finally:
        in_machine("down", "-n", name)


@pytest.mark.boots
def test_a_node_is_back_after_a_reboot_with_nobody_logged_in(machine, gateway):
    copied = in_machine("root", "-n", machine, "cp", moltis.__file__, "/srv/moltis.py")
    assert copied.returncode == 0, copied.stderr
    done = in_machine(
        *("run", "-n", machine, "env", f"MOLTIS_DEVICE_TOKEN={new_token(gateway)}"),
        *("/usr/bin/python3", "/srv/moltis.py", "node", "add", "--name", "Pi"),
        *("--host", gateway.url),
    )
    assert done.returncode == 0, done.stderr
    assert connected_names(gateway) == {"Pi"}

    rebooted = in_machine("reboot", "-n", machine)
    assert rebooted.returncode == 0, rebooted.stderr
    wait_for(lambda: "Pi" in connected_names(gateway), 60, "the node to come back")
    sessions = in_machine("root", "-n", machine, "loginctl", "list-sessions")
    assert "tester" not in sessions.stdout
    run = run_moltis("node", "exec", "Pi", "--", "id", "-un", home=gateway.directory)
    assert run.stdout == "tester\n"
