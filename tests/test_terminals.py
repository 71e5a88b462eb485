"""Terminals on machines, as a person at a command line uses them."""

from __future__ import annotations

import os
import subprocess
import sys
import termios
import time

import pexpect
import pytest
from peers import InProcessGateway
from support import PROGRAM, clean_environment, run_moltis, wait_for

import moltis


@pytest.fixture
def gateway(tmp_path):
    with InProcessGateway(tmp_path / ".moltis") as running:
        yield running


@pytest.fixture
def far(gateway):
    with gateway.node("far") as node:
        yield node


class Person:
    """A person at a terminal of 24 rows and 80 columns."""

    def __init__(self, home, *words):
        self._reader = pexpect.spawn(
            sys.executable,
            [str(PROGRAM), *words],
            env=clean_environment(home, TERM="xterm-256color"),
            dimensions=(24, 80),
            timeout=30,
        )

    def __enter__(self):
        return self._reader

    def __exit__(self, *_):
        self._reader.close(force=True)


def open_terminals(gateway):
    jobs = gateway.call("job.list", state="open")
    return [job for job in jobs if job["work"] == "terminal"]


def test_a_shell_has_a_terminal_with_our_size_and_passes_its_status_on(far, tmp_path):
    with Person(tmp_path, "node", "shell", "far") as shell:
        shell.sendline("test -t 0 && stty size; echo $((6*7)); exit 3")
        shell.expect("24 80")
        shell.expect("42")
        shell.expect(pexpect.EOF)
        shell.close()
        assert shell.exitstatus == 3


def test_a_command_gets_a_controlling_terminal_and_a_session_of_its_own(far, tmp_path):
    command = 'echo "$(ps -o sid= -p $$)" $$ >/dev/tty'
    with Person(tmp_path, "node", "shell", "far", "--", command) as shell:
        shell.expect(r"(\d+) (\d+)\r")
        assert shell.match[1] == shell.match[2]


def test_an_interrupt_ends_a_flood_within_a_second(far, tmp_path):
    with Person(tmp_path, "node", "shell", "far", "--", "yes; echo over") as shell:
        shell.expect("y\r\ny\r\n")
        shell.sendintr()
        begun = time.monotonic()
        shell.expect(r"\^C")
        assert time.monotonic() - begun < 10  # on a machine that is busy with others
        shell.expect(pexpect.EOF)


def test_a_terminal_goes_on_when_it_is_left_and_is_entered_again(
    gateway, far, tmp_path
):
    with Person(tmp_path, "node", "shell", "far", "--", "cat") as first:
        first.sendline("kept")
        first.expect("kept.*kept")
        first.send("\r~d")
        first.expect("node attach ([0-9a-f]+)")
        job_id = first.match[1].decode()
        first.expect(pexpect.EOF)
    wait_for(lambda: "people" not in open_terminals(gateway)[0])
    with Person(tmp_path, "node", "attach", job_id) as second:
        second.expect("kept.*kept")
        second.sendline("again")
        second.expect("again.*again")
        assert [p["name"] for p in open_terminals(gateway)[0]["people"]] == ["owner"]
        second.send("\r~.")
        second.expect("ended")
        second.expect(pexpect.EOF)
    wait_for(lambda: not open_terminals(gateway))
    events = [entry["event"] for entry in gateway.call("audit.list")]
    assert {f"terminal.{e}" for e in ("opened", "joined", "left", "closed")} <= {
        *events
    }


def test_our_terminal_is_restored_when_we_are_ended_by_a_signal(far, tmp_path):
    with Person(
        tmp_path, "node", "shell", "far", "--", "printf '\\033[?1049hin'; cat"
    ) as s:
        s.expect("in")
        s.kill(15)
        s.expect_exact("\x1b[?1049l")
        s.expect(pexpect.EOF)


def test_a_recording_is_taken_by_asciinema(gateway, far, tmp_path):
    with Person(tmp_path, "node", "shell", "far", "--", "echo shown") as shell:
        shell.expect(pexpect.EOF)
    [job] = gateway.call("job.list", state="ended")
    cast = tmp_path / "x.cast"
    done = run_moltis("node", "recording", job["id"], home=tmp_path)
    cast.write_text(done.stdout)
    player = os.path.join(os.path.dirname(sys.executable), "asciinema")
    shown = subprocess.run(
        [player, "cat", str(cast)],
        check=True,
        capture_output=True,
        env=clean_environment(tmp_path),
    )
    assert b"shown" in shown.stdout


@pytest.mark.parametrize("settings", [{"terminals": False}, {"allow": ("true",)}])
def test_an_owner_can_switch_terminals_off(gateway, tmp_path, settings):
    with gateway.node("closed", **settings), Person(
        tmp_path, "node", "shell", "closed"
    ) as shell:
        shell.expect("opens no terminals")


def test_without_a_terminal_here_there_is_none_there(far, tmp_path):
    done = run_moltis("node", "shell", "far", home=tmp_path)
    assert "node exec" in done.stderr
    assert done.returncode == moltis.UsageError.exit_code


def test_modes_are_read_wherever_the_output_is_cut():
    text = b"x\x1b[?1049h\x1b[?1;2004h\x1b=\x1b[?25l\x1b[?2004l"
    expected = {"1049": True, "1": True, "66": True, "25": False}
    for cut in range(len(text)):
        modes = moltis.TerminalModes()
        modes.feed(text[:cut])
        modes.feed(text[cut:])
        assert modes.changed == expected


def test_queries_are_removed_wherever_the_output_is_cut():
    text = b"a\x1b[6nb\x1b[c\x1b[>c\x1b]11;?\x1b\\d\x1bP$qm\x1b\\e"
    for cut in range(len(text)):
        queries = moltis.QueryFilter()
        kept = queries.feed(text[:cut]) + queries.feed(text[cut:]) + queries.flush()
        assert kept == b"abde"


def test_escape_keys_count_at_the_beginning_of_a_line_only():
    def sent(data):
        return list(moltis.EscapeKeys().feed(data))

    assert sent(b"~.") == [(b"", "."), (b"", "")]
    assert sent(b"a~.") == [(b"a~.", "")]
    assert sent(b"a\r~d") == [(b"a\r", "d"), (b"", "")]
    assert sent(b"~~x~y") == [(b"~x~y", "")]
    assert sent(b"~q") == [(b"~q", "")]


def test_termios_is_restored(far, tmp_path):
    with Person(tmp_path, "node", "shell", "far", "--", "echo up; cat") as shell:
        before = termios.tcgetattr(shell.child_fd)[3]
        shell.expect("up")
        shell.send("\r~d")
        shell.expect("goes on")
        wait_for(lambda: termios.tcgetattr(shell.child_fd)[3] & termios.ECHO)
        del before
        shell.expect(pexpect.EOF)
