"""Arguments, output and exit codes; what takes real processes is in
test_end_to_end.py."""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import io
import itertools
import json
import marshal
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import urllib.request
from functools import partial
from pathlib import Path

import pytest
from peers import InProcessGateway, silent_node
from support import (
    PROGRAM,
    ROOT,
    Program,
    ScriptedServer,
    Terminal,
    clean_environment,
    free_port,
    launched,
    run_moltis,
    trickling_server,
    wait_for,
    wait_in_shell,
)
from test_agent_on_nodes import ModelServer, calls, says
from world import SmallDisk

import moltis

NODE = {
    "nodeId": "id",
    "displayName": "Pi",
    "platform": "linux",
    "connected": True,
    "lastSeenAt": 0,
    "telemetry": None,
    "providers": [],
}


def context(home, **environ):
    environ = {"MOLTIS_DATA_DIR": str(home / ".moltis"), **environ}
    return moltis.Context(environ, moltis.Output(environ))


# -- which gateway -------------------------------------------------------------


def address(home, host=None, key=None, **environ):
    args = argparse.Namespace(host=host, api_key=key, insecure=False, pin=None)
    return moltis.gateway_address(args, context(home, **environ))[:2]


def test_a_connection_that_is_dialled_again_is_not_warned_of_again(
    home, capsys, monkeypatch
):
    """The sentence would come into the screen of a raw terminal, at each attempt."""
    dials = iter([None, moltis.Unreachable("away"), None])

    def dial(*_arguments):
        problem = next(dials)
        if problem is not None:
            raise problem

    monkeypatch.setattr(moltis, "OperatorClient", dial)
    address = ["--host", "ws://gateway.example", "--api-key", "mk_x"]
    args = moltis.build_parser().parse_args(["node", "shell", "attic", *address])
    moltis.operator_client(args, context(home))
    with pytest.raises(moltis.Unreachable):
        moltis.operator_client(args, context(home))
    moltis.operator_client(args, context(home))
    assert capsys.readouterr().err.count("is not encrypted") == 1


def test_flags_beat_the_environment_which_beats_gateway_json(home):
    file = moltis.GatewayFile("http://file", "mk_file", 1)
    file.save(home / ".moltis")
    variables = {"MOLTIS_GATEWAY_URL": "http://env", "MOLTIS_API_KEY": "mk_env"}
    assert address(home) == ("http://file", "mk_file")
    assert address(home, **variables) == ("http://env", "mk_env")
    assert address(home, "http://flag", "mk_flag", **variables) == (
        "http://flag",
        "mk_flag",
    )


def test_without_any_gateway_it_says_how_to_start_one(home):
    with pytest.raises(moltis.Unreachable, match="moltis gateway"):
        address(home)


def test_the_key_of_gateway_json_goes_to_that_gateway_only(home):
    file = moltis.GatewayFile("http://127.0.0.1:9090", "mk_file", 1)
    file.save(home / ".moltis")
    for own in ("http://127.0.0.1:9090", "ws://localhost:9090/ws", "127.0.0.1:9090"):
        assert address(home, own) == (own, "mk_file")
    for foreign in ("http://evil:9090", "http://127.0.0.1:9091"):
        assert address(home, foreign) == (foreign, "")
    with pytest.raises(moltis.UsageError, match="runs without TLS; use http://127"):
        address(home, "https://localhost:9090")


# -- which subcommand ----------------------------------------------------------


@pytest.mark.parametrize("name", [*moltis.SUBCOMMANDS, "", "node", "key", "nodes"])
@pytest.mark.parametrize(
    "rest", ["", "-h", "one", "one two three", "--all --no-such x", "--port many"]
)
def test_the_parser_of_one_subcommand_says_what_the_whole_parser_says(
    name, rest, capsys
):
    words = [*name.split(), *rest.split()]
    outcomes = []
    for parser in (moltis.build_parsers(words)[""], moltis.build_parser()):
        try:
            outcome = parser.parse_args(words)
        except SystemExit as end:
            outcome = end.code
        except moltis.UsageError as error:
            outcome = str(error)
        outcomes.append((outcome, capsys.readouterr()))
    assert outcomes[0] == outcomes[1]


def test_every_help_says_what_the_subcommand_does(capsys):
    for name, subcommand in moltis.SUBCOMMANDS.items():
        with pytest.raises(SystemExit):
            moltis.main([*name.split(), "--help"])
        words = " ".join(capsys.readouterr().out.split()).casefold()
        assert f" {' '.join(subcommand.help.split()).casefold()}. " in words


def test_the_longest_subcommand_has_its_help_beside_it(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        moltis.main(["node", "--help"])
    out = capsys.readouterr().out
    assert "\n    generate-token  make a token for a machine" in out


@pytest.mark.parametrize("columns", [40, 100])
def test_help_is_as_wide_as_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = moltis.build_parser().format_help().splitlines()
    assert columns - 20 <= max(map(len, lines)) <= columns


# -- node add ------------------------------------------------------------------


def settings_for(home, *arguments, stdin=None, monkeypatch=None, **environ):
    parser = moltis.build_parser()
    args = parser.parse_args(
        ["node", "add", *arguments], argparse.Namespace(command=[])
    )
    if stdin is not None:
        data = io.TextIOWrapper(io.BytesIO(stdin))
        monkeypatch.setattr(sys, "stdin", data)
    offer = moltis.join_offer(args, moltis.TlsTrust(), environ)
    return moltis.node_settings(args, offer, context(home, **environ))


TOKEN = "mdt_" + "x" * 43
PIN = "sha256//" + "A" * 43 + "="


def test_node_add_takes_flags(home, tmp_path):
    settings = settings_for(
        home,
        *("--host", "gateway:9090", "--token", TOKEN, "--name", "Pi"),
        *("--working-dir", str(tmp_path), "--timeout", "60", "--node-id", "n1"),
    )
    assert settings.gateway_url == "ws://gateway:9090/ws"
    assert settings.device_token == TOKEN
    assert settings.display_name == "Pi"
    assert settings.working_dir == str(tmp_path)
    assert settings.timeout == 60
    assert settings.node_id == "n1"
    assert settings.auth == "scram"


def test_node_add_takes_variables(home):
    settings = settings_for(
        home, MOLTIS_GATEWAY_URL="ws://gateway/ws", MOLTIS_DEVICE_TOKEN=TOKEN
    )
    assert settings.device_token == TOKEN
    assert settings.display_name == ""  # the token's, or the host's


def test_node_add_takes_an_offer_from_standard_input(home, monkeypatch):
    offer = {
        "gateway_url": "ws://gateway/ws",
        "device_token": TOKEN,
        "display_name": "Attic",
    }
    settings = settings_for(
        home, stdin=json.dumps(offer).encode(), monkeypatch=monkeypatch
    )
    assert settings.device_token == TOKEN
    assert settings.display_name == "Attic"


@pytest.mark.parametrize("text", [b"<html>", b"[]", b"7", b'{"gateway_url": 7}'])
def test_what_is_no_offer_is_said_to_be_none(home, monkeypatch, text):
    with pytest.raises(moltis.UsageError):
        settings_for(home, stdin=text, monkeypatch=monkeypatch)


def test_node_add_keeps_the_node_s_id(home):
    moltis.NodeSettings("ws://old/ws", TOKEN, "kept", "Pi").save(home / ".moltis")
    settings = settings_for(home, "--host", "gateway", "--token", TOKEN)
    assert settings.node_id == "kept"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--token", TOKEN), "--host is missing"),
        (("--host", "gateway"), "--token is missing"),
        (("--host", "ftp://x", "--token", TOKEN), "is not an address of a server"),
        (("--host", "x", "--token", TOKEN, "--timeout", "0"), "more than 0 .*, not 0$"),
        (("--host", "x", "--token", TOKEN, "--timeout", "inf"), "at most .*, not inf$"),
        (
            ("--host", "x", "--token", TOKEN, "--working-dir", "/no/such"),
            "is not a directory",
        ),
    ],
)
def test_node_add_says_what_is_wrong(home, arguments, words):
    with pytest.raises(moltis.UsageError, match=words) as caught:
        settings_for(home, *arguments)
    assert TOKEN not in str(caught.value)


def test_a_join_link_that_is_used_up_is_refused_in_its_own_words(tmp_path):
    with ScriptedServer(lambda request: (410, {}, [b"used or expired"])) as server:
        done = run_moltis(
            "node", "add", "--join", f"{server.url}/join/mc_abcdefgh", home=tmp_path
        )
    assert done.returncode == 77
    assert "used or expired" in done.stderr
    assert "mc_abcdefgh" not in done.stderr


def test_a_join_link_whose_answer_trickles_is_given_up(home, monkeypatch, capsys):
    monkeypatch.setattr(moltis, "fetch", partial(moltis.fetch, limit=0.4))
    with trickling_server("HTTP/1.1 200 OK\r\n\r\n", "x") as url:
        status, out, err = said(
            capsys, "node", "add", "--join", f"{url}/join/mc_abcdefgh"
        )
    assert (status, out) == (moltis.EXIT_UNREACHABLE, "")
    assert "did not finish its answer within 0.4 s" in err
    assert err.count("\n") == 1
    assert "mc_abcdefgh" not in err


# -- output --------------------------------------------------------------------


def test_a_node_that_says_nothing_is_listed_with_dashes():
    row = moltis.cells(NODE, moltis.NODE_COLUMNS)
    assert row == ["Pi", "connected", "-", "-", "-", "-"]


TELEMETRY = {
    "cpuUsage": 12.4,
    "load": [0.5, 1.0, 2.0],
    "memTotal": 2**30,
    "memAvailable": 2**28,
    "diskTotal": 2**40,
    "diskAvailable": 2**39,
    "runtimes": ["python3", "node"],
    "stale": False,
}


def test_a_node_is_listed_with_what_it_has():
    providers = [{"provider": "ollama", "models": ["a", "b"]}]
    node = {**NODE, "telemetry": TELEMETRY, "providers": providers, "running": 2}
    row = dict(
        zip(moltis.WIDE_NODE_COLUMNS, moltis.cells(node, moltis.WIDE_NODE_COLUMNS))
    )
    assert row["LOAD"] == "0.50"
    assert row["MEMORY"] == "75 % of 1.0 GiB"
    assert row["DISK"] == "50 % of 1.0 TiB"
    assert row["RUNNING"] == "2"
    assert row["CPU"] == "12 %"
    assert row["RUNTIMES"] == "python3 node"
    assert row["MODELS"] == "ollama (2)"


def test_a_node_that_is_away_is_listed_without_figures_of_old():
    seen = moltis.now_ms() - 3 * 3600 * 1000
    away = {**NODE, "connected": False, "lastSeenAt": seen, "telemetry": TELEMETRY}
    row = moltis.cells(away, moltis.NODE_COLUMNS)
    assert row == ["Pi", "offline for 3 h", "-", "-", "-", "-"]
    silent = {**NODE, "telemetry": {**TELEMETRY, "stale": True}}
    assert moltis.cells(silent, moltis.NODE_COLUMNS)[2:] == ["-", "-", "-", "-"]


def shown_in_terminal(columns, print_it, monkeypatch, **environ):
    """Return the lines that a terminal of that width gets."""
    text = io.StringIO()
    text.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", text)
    monkeypatch.setenv("COLUMNS", str(columns))
    print_it(moltis.Output(environ))
    monkeypatch.undo()
    return text.getvalue().splitlines()


def test_a_list_fits_the_terminal_and_the_beginnings_of_ids_stay(monkeypatch):
    rows = [{"id": "f43d068d-a0f4-45d9-9352-11cf8b050f6f", "what": "x" * 200}]
    columns = {"ID": "id", "WHAT": "what"}
    lines = shown_in_terminal(
        40, lambda o: o.table(rows, columns), monkeypatch, NO_COLOR="1"
    )
    assert lines[1] == f"f43d068d  {'x' * 29}…"
    whole = shown_in_terminal(
        40, lambda o: o.table(rows, columns, whole=True), monkeypatch, NO_COLOR="1"
    )
    assert whole[1] == f"{rows[0]['id']}  {'x' * 200}"


def test_columns_that_say_nothing_give_way_first(monkeypatch):
    rows = [{"what": "x" * 30}, {"what": "y", "who": ""}]
    columns = {"WHAT": "what", "WHO": "who", "IN IT": "people"}

    def lines(width):
        return shown_in_terminal(
            width, lambda o: o.table(rows, columns), monkeypatch, NO_COLOR="1"
        )

    assert lines(30) == ["WHAT", "x" * 30, "y"]
    assert lines(80)[2].split() == ["y", "-", "-"]


def test_a_time_that_does_not_fit_keeps_its_end(monkeypatch):
    rows = [{"at": "2026-01-31 18:00", "what": "x" * 30}]
    columns = {"WHEN": "at", "WHAT": "what"}

    def line(width):
        return shown_in_terminal(
            width, lambda o: o.table(rows, columns), monkeypatch, NO_COLOR="1"
        )[1]

    assert line(40) == f"01-31 18:00  {'x' * 26}…"  # without the year, at once
    assert line(24) == f"01-31 18:00  {'x' * 10}…"
    assert line(20) == f"31 18:00   {'x' * 8}…"


def test_what_is_misnamed_is_answered_with_some_of_many_names():
    rows = [{"keyId": f"{i:08}", "name": f"key {i}"} for i in range(5000)]
    with pytest.raises(moltis.UserError, match=r"and 4,9\d\d more") as caught:
        moltis.find_one("nobody", rows, "key", "keyId")
    assert len(str(caught.value)) < 500


def test_states_are_coloured_on_a_terminal_unless_no_color_is_set(monkeypatch, capsys):
    away = {**NODE, "displayName": "Attic", "connected": False}

    def show(output):
        output.table([NODE, away], moltis.NODE_COLUMNS, moltis.node_tone)

    lines = shown_in_terminal(80, show, monkeypatch)
    assert "\033[32mconnected\033[0m" in lines[1]
    assert "\033[31moffline\033[0m" in lines[2]
    assert "\033" not in "".join(shown_in_terminal(80, show, monkeypatch, NO_COLOR="1"))
    show(moltis.Output({}))
    assert "\033" not in capsys.readouterr().out


def test_lines_of_several_commands_are_labelled_even_when_they_come_in_pieces():
    file = io.BytesIO()
    printer = moltis.StreamPrinter(file, b"pi | ")
    for data in (b"on", b"e\ntw", b"o", b"\n\nthree"):
        printer.write(data)
    printer.finish()
    assert file.getvalue() == b"pi | one\npi | two\npi | \npi | three\n"


def labelled(data, size):
    """Return what is printed of `data` that comes in pieces of `size` bytes."""
    file = io.BytesIO()
    printer = moltis.StreamPrinter(file, b"pi | ")
    for start in range(0, len(data), size):
        printer.write(data[start : start + size])
    printer.finish()
    return file.getvalue()


@pytest.mark.parametrize("size", [1, 2, 3, 4096, 65536, 2**20])
def test_a_line_of_several_commands_is_whole_and_so_are_its_characters(size):
    """FAULTS A15"""
    line = "€𝄞é" * (20 if size < 4096 else 30_000)
    assert labelled(f"{line}\n{line}".encode(), size) == (
        f"pi | {line}\npi | {line}\n".encode()
    )


def test_a_line_that_is_too_long_is_broken_between_characters(monkeypatch):
    monkeypatch.setattr(moltis, "MAX_LABELLED_LINE", 10)
    for shift in range(4):
        text = "x" * shift + "€𝄞é" * 20
        lines = labelled(text.encode(), 7).decode().splitlines()
        assert "".join(line[len("pi | ") :] for line in lines) == text


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"10%\r20%\r100%\n", b"10%|20%|100%"),
        (b"\r10%\r20%\r", b"10%|20%\r"),
        (b"done\r\nnext\r\n", b"done\r|next\r"),
        (b"\n\r\rbar\n", b"|\r|bar"),
    ],
)
def test_progress_of_several_commands_overwrites_no_label(data, shown, size):
    """FAULTS A15: each state of a progress bar is a line."""
    lines = [b"pi | " + line for line in shown.split(b"|")]
    assert labelled(data, size) == b"\n".join(lines) + b"\n"


LEGACY = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    "locale",
    [LEGACY, {"PYTHONIOENCODING": "latin-1"}, {**LEGACY, "PYTHONIOENCODING": "ascii"}],
    ids=["C", "latin-1", "ascii"],
)
def test_what_a_locale_does_not_know_is_escaped_and_the_rest_is_there(tmp_path, locale):
    """FAULTS C13"""
    name = "Bücher 厨房 😀"

    def run(*words, **more):
        done = run_moltis(*words, home=tmp_path, **locale, **more)
        assert "Traceback" not in done.stderr
        return done

    for words in ((), ("node", "add"), ("gateway",), ("node", "exec")):
        whole = run_moltis(*words, "--help", home=tmp_path).stdout
        assert len(run(*words, "--help").stdout.splitlines()) == len(whole.splitlines())
    with InProcessGateway(tmp_path / ".moltis") as gateway:
        gateway.call("device.token.create", displayName=name)
        with gateway.node(name, gateway.token(), node_id="far"):
            listed = run("node", "list")
            assert listed.returncode == 0
            assert r"\u53a8\u623f \ud83d\ude00" in listed.stdout
            assert "Local" in listed.stdout
            nodes = json.loads(run("node", "list", "--json").stdout)
            assert any("厨房 😀" in node["displayName"] for node in nodes)
            done = run("node", "exec", "--all", "--", "echo 厨 é")
            assert done.returncode == 0
            assert r"\u53a8\u623f" in done.stdout
        audit = run("audit")
        assert r"\u53a8\u623f \ud83d\ude00" in audit.stdout
        asked = {"jsonrpc": "2.0", "id": "厨", "method": "ping"}
        stdin = json.dumps(asked, ensure_ascii=False)
        answer = json.loads(run("mcp", stdin=stdin).stdout)
        assert answer["id"] == "厨"


def test_a_command_in_an_ascii_locale_arrives_as_it_was_typed(tmp_path):
    with InProcessGateway(tmp_path / ".moltis"):
        words = ("node", "exec", "local", "--", "printf 厨é | od -An -tx1")
        done = run_moltis(*words, home=tmp_path, **LEGACY)
    assert done.stdout.split() == ["e5", "8e", "a8", "c3", "a9"]


def test_only_whole_words_typed_after_the_question_answer_it(tmp_path, monkeypatch):
    """FAULTS D5: a line that was typed while the model thought is none of them."""
    terminal, ours = pty.openpty()
    with open(ours, closefd=True) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        os.write(terminal, b"yes\ny\nal")  # typed early
        asked = moltis.Output({})
        question = {"command": "rm -rf /", "node": "pi"}
        answers = []
        asking = threading.Thread(
            target=lambda: answers.append(moltis.ask_approval(asked, question))
        )
        prompted = threading.Event()

        class Stderr(io.StringIO):
            def write(self, text):
                if "[y]es" in text:
                    prompted.set()
                return len(text)

        monkeypatch.setattr(sys, "stderr", Stderr())
        asking.start()
        for typed in (b"yup\n", b"nah\n", b"alright\n", b"why?\n", b" No \n"):
            assert prompted.wait(60)
            assert not answers
            prompted.clear()
            os.write(terminal, typed)
        asking.join(60)
        assert answers == ["deny"]
    os.close(terminal)


def test_a_line_without_end_does_not_fill_the_memory():
    file = io.BytesIO()
    printer = moltis.StreamPrinter(file, b"pi | ")
    for _ in range(100):
        printer.write(b"x" * 65536)
    assert len(printer._line) <= moltis.MAX_LABELLED_LINE
    printer.finish()
    assert file.getvalue().replace(b"pi | ", b"").replace(b"\n", b"") == (
        b"x" * 6_553_600
    )


def test_one_command_alone_is_printed_as_it_comes():
    file = io.BytesIO()
    printer = moltis.StreamPrinter(file, b"")
    printer.write(b"\xff\x00no line")
    printer.finish()
    assert file.getvalue() == b"\xff\x00no line"


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ({"exit_code": 0}, 0),
        ({"exit_code": 255}, 255),
        ({"exit_code": 256}, 1),
        ({"exit_code": 3221225477}, 1),
        ({"exit_code": -1}, 1),
        ({"exit_code": -1, "signal": "SIGTERM"}, 143),
        ({"signal": "SIGKILL"}, 137),
        ({"signal": "SIGNOVEL"}, 1),
        ({}, 1),
        ({"state": "timed_out", "signal": "SIGKILL"}, 124),
        ({"state": "cancelled", "signal": "SIGTERM"}, 130),
        ({"state": "lost"}, 69),
        ({"state": "expired"}, 69),
        ({"state": "failed", "reason": "no shell", "exit_code": 0}, 1),
        ({"state": "novel", "exit_code": 0}, 1),
    ],
)
def test_an_ending_has_an_exit_status_that_never_looks_like_success(ending, status):
    ending = moltis.Ending(**{"state": "done", **ending})
    assert moltis.exit_status(ending) == status


def test_colour_only_on_a_terminal_and_never_with_no_color(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for environ, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        moltis.Output(environ).complain("it broke")
        assert ("\033[" in capsys.readouterr().err) is coloured


def test_what_others_wrote_gives_the_terminal_no_orders(capsys):
    """A node's error could wipe out what stands above it, a command its audit."""
    wrote = "x\x1b[2J\x9b1A\u202ey"
    spelt = "x\\x1b[2J\\x9b1A\\u202ey"
    output = moltis.Output({})
    output.table([{"what": wrote}], {"WHAT": "what"})
    output.say(wrote)
    output.complain(wrote)
    printed = capsys.readouterr()
    assert printed.out == f"WHAT\n{spelt}\n"
    assert printed.err == f"{spelt}\nmoltis: {spelt}\n"
    output.json([wrote])
    text = capsys.readouterr().out
    assert json.loads(text) == [wrote]
    assert not {"\x1b", "\x9b"} & set(text)


def test_output_that_a_model_looks_at_gives_the_terminal_no_orders(capsys):
    """Else it could hide, or colour, the question that comes after it."""
    terminal = moltis.ChatTerminal.__new__(moltis.ChatTerminal)
    terminal._typed = False
    terminal._write_output(moltis.STDOUT, "a\x1b[8mb")
    assert capsys.readouterr().err == "a[8mb"
    terminal._typed = True
    terminal._write_output(moltis.STDOUT, "a\x1b[1mb")
    assert capsys.readouterr().out == "a\x1b[1mb"


def test_complaints_hold_no_secret(capsys):
    moltis.Output({}).complain(f"the token {TOKEN} is no good")
    assert TOKEN not in capsys.readouterr().err


# -- main ----------------------------------------------------------------------


def test_version(tmp_path):
    done = run_moltis("--version", home=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"moltis {moltis.__version__}\n")


@pytest.mark.parametrize("words", [(), ("bogus",), ("node",), ("node", "bogus")])
def test_what_is_no_subcommand_is_a_matter_of_usage(tmp_path, words):
    done = run_moltis(*words, home=tmp_path)
    assert done.returncode == 2
    assert "usage: moltis" in done.stderr
    assert done.stdout == ""


def test_what_follows_the_dashes_belongs_to_the_other_machine(tmp_path):
    with InProcessGateway(tmp_path / ".moltis"):
        done = run_moltis(
            *("node", "exec", "Local", "--", "echo", "--help", "--", "-x"),
            home=tmp_path,
        )
    assert done.stdout == "--help -- -x\n"


def test_a_node_named_twice_runs_a_command_once(tmp_path):
    with InProcessGateway(tmp_path / ".moltis"):
        done = run_moltis(
            *("node", "exec", "Local", "local", "LOCAL", "--", "echo", "ran"),
            home=tmp_path,
        )
    assert (done.returncode, done.stdout) == (0, "ran\n")


@pytest.mark.parametrize(
    "options", [("--bind", ""), ("--tls-cert", "", "--tls-key", "")]
)
def test_an_empty_variable_opens_no_gateway_to_the_network(tmp_path, options):
    done = run_moltis("gateway", "--port", "0", *options, home=tmp_path)
    assert done.returncode == 2
    assert options[0] in done.stderr


def test_an_interrupt_while_a_node_is_away_says_how_to_leave(capsys):
    waiting = moltis.Waiting(moltis.Output({}))
    waiting.begin("pi")
    waiting.explain_interrupt()
    assert "when pi is back; leaving in 10 s" in capsys.readouterr().err


def test_a_wait_counts_from_when_the_node_left_and_not_from_when_we_heard(
    capsys, monkeypatch
):
    waiting, now = moltis.Waiting(moltis.Output({})), time.monotonic()
    with monkeypatch.context() as stopped:
        stopped.setattr(moltis.time, "monotonic", lambda: now)
        waiting.begin("pi", 17_000)
        waiting.begin("pi", 99_000)  # heard once more
        waiting.end("pi")
    assert "pi is back after 17 s" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    command = f"{sys.executable} {PROGRAM} gateway --help | true"
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        capture_output=True,
        check=False,
        text=True,
        env=clean_environment(tmp_path),
        timeout=60,
    )
    assert "Traceback" not in done.stderr


def test_it_works_without_standard_streams(tmp_path):
    done = subprocess.run(
        ["/bin/sh", "-c", f"exec {sys.executable} {PROGRAM} node list <&- >&- 2>&-"],
        check=False,
        env=clean_environment(tmp_path),
        timeout=60,
    )
    assert done.returncode == 69


def test_join_and_stdin_are_not_waited_for_when_flags_say_all(tmp_path):
    """Standard input is a pipe that stays open."""
    read, write = os.pipe()
    try:
        done = subprocess.run(
            [
                *(*launched(PROGRAM), "node", "add", "--foreground"),
                *("--host", "ftp://x", "--token", TOKEN),
            ],
            stdin=read,
            capture_output=True,
            check=False,
            env=clean_environment(tmp_path),
            timeout=60,
        )
    finally:
        os.close(read)
        os.close(write)
    assert done.returncode == 2


def terminal_for(feed, nodes, command, **spec):
    """What `node exec` prints with, its jobs started."""
    request = {"work": "run", "spec": {"command": command, **spec}}
    jobs = feed.start(nodes, request)
    return moltis.JobTerminal(feed, jobs, moltis.Output({}))


@pytest.mark.parametrize(
    ("hangs_up", "when"),
    [
        (True, "when Rust box is back"),
        (False, "once the gateway and the node answer again"),
    ],
)
def test_an_interrupt_leaves_a_node_that_does_not_come_back_or_answer(
    tmp_path, monkeypatch, capsys, hangs_up, when
):
    """What runs there is ended when it is back; who interrupted need not wait."""
    monkeypatch.setattr(moltis, "LEAVE_AFTER", 0.2)
    with InProcessGateway(tmp_path / "gateway") as gateway, silent_node(
        gateway
    ) as peer, moltis.JobFeed(gateway.operator) as feed:
        terminal = terminal_for(feed, {"gone": "gone"}, "sleep 120")

        def vanish():
            peer.receive_until(
                lambda m: isinstance(m, dict) and m.get("event") == moltis.JOB_START
            )
            if hangs_up:
                peer.ws.abort()
                wait_for(lambda: terminal._waiting._since, what="it to wait")
            feed.interrupt(signal.SIGTERM)

        thread = threading.Thread(target=vanish, name="test-vanish")
        thread.start()
        assert terminal.execute(feeds=False) == 128 + signal.SIGTERM
        thread.join()
    assert f"left; the command is ended {when}" in capsys.readouterr().err


def test_an_interrupt_is_obeyed_while_output_never_pauses():
    job = moltis.FollowedJob("id", "far", holds=True)

    class Flood:
        open = {job.id: job}
        interrupted = signal.SIGINT

        def news(self, tick):
            return itertools.repeat(moltis.JobOutput(job, 0, ()), 1000)

        def cancel(self):
            self.open = {}

    feed = Flood()
    moltis.JobTerminal(feed, [job], moltis.Output({}))._print_all()
    assert not feed.open


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("node", "add", "--host", "h", "--token", TOKEN, "--allow", ""), "--allow"),
        (
            ("node", "add", "--host", "h", "--token", TOKEN, "--fingerprint", PIN),
            "wss://",
        ),
        (("node", "exec", "n", "--cwd", "", "--", "rm -rf *"), "--cwd is empty"),
        (("node", "exec", "", "--", "rm -rf *"), "word after `exec` is empty"),
        (("node", "exec", "n", " ", "--", "rm -rf *"), "word after `n` is empty"),
        (("node", "attach", ""), "word after `attach` is empty"),
        (("node", "jobs", ""), "word after `jobs` is empty"),
        (("node", "jobs", "--cancel", ""), "--cancel is empty"),
        (("node", "jobs", "--cancel="), "--cancel is empty"),
        (("chat", "--session", "", "hi"), "--session is empty"),
        (("chat", "--node", "", "hi"), "--node is empty"),
        (("node", "list", "--host", ""), "--host is empty"),
        (("node", "list", "--fingerprint", ""), "--fingerprint is empty"),
        (
            ("node", "list", "--host=http://x", "--api-key=k", "--fingerprint", PIN),
            "need TLS",
        ),
        (("audit", "--limit", "0"), "--limit"),
        (("node", "exec", "n", "--stdin", "--detach", "--", "cat"), "--stdin feeds"),
    ],
)
def test_what_an_unset_variable_leaves_is_not_taken_for_a_choice(
    home, capsys, arguments, words
):
    assert moltis.main(arguments) == moltis.EXIT_USAGE
    assert words in capsys.readouterr().err


def test_the_lock_of_a_gateway_that_was_killed_is_waited_for(tmp_path, monkeypatch):
    """A shell that it was about to start may have it for a moment longer."""
    moltis.GatewayFile("http://127.0.0.1:1", "mk_x", pid=2**70).save(tmp_path)
    looks = []

    def look(pid):
        looks.append(pid)
        if len(looks) == 2:
            held.close()
        return False

    monkeypatch.setattr(moltis, "is_running", look)
    held = (tmp_path / "gateway.lock").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    with moltis.GatewayLock(tmp_path):
        assert looks == [2**70, 2**70]
        monkeypatch.setattr(moltis, "LOCK_PATIENCE", 0.0)
        with pytest.raises(moltis.BadConfiguration, match="already; stop it"):
            moltis.GatewayLock(tmp_path).__enter__()


def test_an_empty_word_may_belong_to_the_other_machine(tmp_path):
    with InProcessGateway(tmp_path / ".moltis"):
        command = ("printf", "[%s]", "")
        done = run_moltis("node", "exec", "local", "--", *command, home=tmp_path)
    assert (done.returncode, done.stdout) == (0, "[]")


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("pi: its token was revoked", "its token was revoked"),
        ("Pi has been offline since noon", "offline since noon"),
        ("the gateway stops", "the gateway stops"),
        ("pizza is out", "pizza is out"),
    ],
)
def test_a_name_is_not_said_twice(text, rest):
    assert moltis.without_name("pi", text) == rest


@pytest.mark.parametrize(
    ("words", "said"),
    [(("node", "exec", "local", "--stdin", "--", "cat"), "typed"), (("chat",), "")],
)
def test_a_terminal_whose_other_end_is_closed_is_the_end_of_input(
    tmp_path, words, said
):
    """EIO on Linux; it was told as output that is not whole, or waited for ever."""
    parent, child = pty.openpty()
    os.write(child, b"typed\n" if said else b"")
    os.close(child)
    with InProcessGateway(tmp_path / ".moltis"), open(parent) as terminal:
        done = subprocess.run(
            [*launched(PROGRAM), *words],
            stdin=terminal,
            capture_output=True,
            check=False,
            text=True,
            env=clean_environment(tmp_path),
            timeout=60,
        )
    assert done.returncode == moltis.EXIT_OK
    assert said in done.stdout
    assert "not whole" not in done.stderr


def cannot_be_read(*_):
    raise OSError(errno.EIO, "Input/output error")


def test_input_that_cannot_be_read_ends_the_command_and_says_so(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(moltis, "read_stdin", cannot_be_read)
    with InProcessGateway(tmp_path / "gateway") as gateway, moltis.JobFeed(
        gateway.operator
    ) as feed:
        terminal = terminal_for(feed, {"local": "Local"}, "cat; sleep 120", stdin=True)
        assert terminal.execute(feeds=True) == moltis.INTERRUPTED
    assert "standard input cannot be read: Input/output" in capsys.readouterr().err


def test_a_disk_that_cannot_be_read_is_no_end_of_input(monkeypatch):
    """Half a backup must not look like a whole one."""
    with open(os.devnull) as file, monkeypatch.context() as disk:
        disk.setattr(sys, "stdin", file)
        disk.setattr(moltis.os, "read", cannot_be_read)
        with pytest.raises(OSError, match="Input/output"):
            moltis.read_stdin(1)


def test_lines_of_nodes_of_the_same_name_have_labels_of_their_own(tmp_path):
    with InProcessGateway(tmp_path / ".moltis") as gateway:
        first = gateway.node("pi", gateway.token(), node_id="one")
        with first, gateway.node("pi", gateway.token(), node_id="two"):
            words = ("node", "exec", "--all", "--", "echo hi")
            done = run_moltis(*words, home=tmp_path)
    labels = sorted(line.partition(" | ")[0] for line in done.stdout.splitlines())
    assert len({"Local", "pi", *labels}) == len(labels) == 3


def test_a_node_is_shown_as_it_is_called_and_not_as_it_was_typed(tmp_path):
    with InProcessGateway(tmp_path / ".moltis") as gateway, gateway.node("Far away"):
        run = partial(run_moltis, "node", "exec", home=tmp_path)
        lines = run("LOCAL", "id-of-far", "--", "echo hi").stdout.splitlines()
        assert sorted(lines) == ["Far away | hi", "Local | hi"]
        assert run("far AWAY", "--", "kill $$").stderr == ""
        [result] = json.loads(run("far AWAY", "--json", "--", "true").stdout)
        assert result["node"] == "Far away"
        [result] = json.loads(run("LOCAL", "--json", "--detach", "--", "true").stdout)
        assert result["node"] == "Local"


def test_one_long_cell_does_not_pad_the_others_in_a_pipe(capsys):
    rows = [{"how": "x" * 200, "what": "y"}, {"how": "x", "what": "y"}]
    moltis.Output({}).table(rows, {"HOW": "how", "WHAT": "what"})
    assert capsys.readouterr().out.splitlines() == [
        f"{'HOW':36}  WHAT",
        f"{'x' * 200}  y",
        f"{'x':36}  y",
    ]


def test_an_interrupt_of_several_commands_counts_as_one(tmp_path):
    with InProcessGateway(tmp_path / ".moltis") as gateway, gateway.node("far"):
        words = ("node", "exec", "--all", "--", "echo begun; sleep 120")
        with Program(*words, home=tmp_path) as execution:
            wait_for(lambda: execution.stdout.count("begun") == 2)
            assert execution.end(signal.SIGINT) == moltis.INTERRUPTED


def test_a_typed_command_that_cannot_run_is_a_failure_of_the_chat(tmp_path):
    with InProcessGateway(tmp_path / ".moltis") as gateway:
        gateway.node("far").close()
        wait_for(lambda: not gateway.is_connected("id-of-far"))
        done = run_moltis("chat", "--node", "far", "echo ran", home=tmp_path)
        assert done.returncode == moltis.EXIT_FAILURE
        assert re.fullmatch(r"\[far\] offline since [-\d]+ [\d:]+\n", done.stderr)
        done = run_moltis("chat", "--node", "local", "exit 3", home=tmp_path)
        assert done.returncode == 3
        done = run_moltis("chat", "--node", "local", "/no-such-word", home=tmp_path)
        assert done.returncode == 127


def wait_for_a_stop(home, code):
    """Run code in which `stop` is to be waited for, by a process of its own."""
    code = f"""if True:
        import os, signal, sys, threading
        sys.path.insert(0, sys.argv[1])
        import moltis

        stop = moltis.StopSignal()
        {code}
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(PROGRAM.parent)],
        check=False,
        env=clean_environment(home),
        timeout=60,
    )
    assert done.returncode == 0


def test_a_signal_in_the_middle_of_the_wait_for_it_is_no_deadlock(home):
    """An Event's lock would be taken where its set() interrupts its wait()."""
    wait_for_a_stop(
        home,
        """
        def interrupt():
            os.kill(os.getpid(), signal.SIGTERM)

        def trace(frame, event, arg):
            if frame.f_code is threading.Condition.wait.__code__:
                interrupt()

        timer = threading.Timer(0.2, interrupt)
        timer.start()
        sys.settrace(trace)
        assert stop.wait() and stop.wait(0)
        sys.settrace(None)
        timer.join()
        """,
    )


def test_a_signal_that_does_not_interrupt_the_main_thread_is_heard_of(home):
    """Another thread gets it here; or it comes just before the wait begins."""
    wait_for_a_stop(
        home,
        """
        def interrupt():
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

        timer = threading.Timer(0.2, interrupt)
        timer.start()
        assert stop.wait() and stop.wait(0)
        timer.join()
        """,
    )


# -- jobs ----------------------------------------------------------------------


@pytest.fixture
def gateway(home):
    """A gateway that programs of the same HOME find."""
    with InProcessGateway(home / ".moltis") as running:
        yield running


def start(gateway, command, node="local", **spec):
    """Start a kept job; return its id."""
    job = moltis.new_id()
    request = {"work": "run", "spec": {"command": command, **spec}, "keep": True}
    gateway.call("job.start", jobs=[{"id": job, "node": node}], **request)
    return job


def test_a_detached_command_is_attached_to_by_the_begin_of_its_id(gateway, home):
    command = "echo one; echo oh >&2; sleep 0.5; echo two; exit 9"
    started = run_moltis("node", "exec", "--detach", "local", "--", command, home=home)
    assert started.returncode == 0
    job = started.stdout.strip()
    attached = run_moltis("node", "attach", job[:8], home=home)
    assert (attached.stdout, attached.stderr) == ("one\ntwo\n", "oh\n")
    assert attached.returncode == 9
    again = run_moltis("node", "attach", job, home=home)
    assert (again.stdout, again.returncode) == ("one\ntwo\n", 9)


def test_jobs_are_listed_and_cancelled(gateway, home):
    job = start(gateway, "sleep 120")
    listed = run_moltis("node", "jobs", "local", home=home)
    assert job in listed.stdout
    assert "sleep 120" in listed.stdout
    done = run_moltis("node", "jobs", "--cancel", job[:8], home=home)
    assert done.returncode == 0
    attached = run_moltis("node", "attach", job, home=home)
    assert attached.returncode == moltis.INTERRUPTED
    assert "Local: cancelled" in attached.stderr


def test_a_command_that_was_not_detached_is_listed_while_it_runs(gateway, home):
    with Program("node", "exec", "local", "--", "echo on; sleep 120", home=home) as run:
        run.wait_for_output("on\n")
        assert "sleep 120" in run_moltis("node", "jobs", home=home).stdout
        run.end(signal.SIGINT)
    assert "sleep 120" not in run_moltis("node", "jobs", home=home).stdout


def test_a_job_is_ended_on_the_node_that_was_named_and_on_no_other(gateway, home):
    with gateway.node("far"):
        job = start(gateway, "sleep 120", node="far")
        words = ("--cancel", job, "--json")
        other = run_moltis("node", "jobs", "local", *words, home=home)
        assert other.returncode == moltis.EXIT_FAILURE
        assert f"'{job}' is no job on local" in other.stderr
        assert gateway.call("job.wait", id=job, wait=0)["state"] == "running"
        named = run_moltis("node", "jobs", "far", *words, home=home)
        assert [row["id"] for row in json.loads(named.stdout)] == [job]
        assert gateway.call("job.wait", id=job, wait=60)["state"] == "cancelled"


def test_jobs_on_several_nodes_are_printed_with_their_names(gateway, home):
    with gateway.node("far"), gateway.node("gone") as gone:
        gone.close()
        wait_for(lambda: not gateway.is_connected("id-of-gone"))
        words = ("node", "exec", "--detach", "far", "gone", "local", "--", "true")
        started = run_moltis(*words, home=home)
        printed = [line.split() for line in started.stdout.splitlines()]
        jobs = {j["id"]: j["nodeName"] for j in gateway.call("job.list")}
    assert [jobs[job].casefold() for job, _ in printed] == ["far", "local"]
    assert [name for _, name in printed] == ["far", "Local"]
    assert started.returncode == moltis.EXIT_FAILURE
    assert "gone: offline since" in started.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("exit 3", "exit status 3"),
        ("kill -9 $$", "killed by SIGKILL"),
        ("sleep 120", "timed out"),
    ],
)
def test_lists_say_how_a_command_ended(gateway, command, words):
    job = start(gateway, command, timeout=300 if "sleep" in command else 60_000)
    gateway.call("job.wait", id=job, wait=60)
    (row,) = gateway.call("job.list", kept=True)
    assert moltis.cells(row, moltis.JOB_COLUMNS)[2] == words
    rows = gateway.call("audit.list")
    row = next(row for row in rows if row["event"] == "command")
    assert (
        dict(zip(moltis.AUDIT_ROW, moltis.cells(row, moltis.AUDIT_ROW)))["HOW IT WENT"]
        == words
    )


def test_ending_what_has_ended_is_said_to_come_too_late(gateway, home):
    job = start(gateway, "exit 3")
    assert run_moltis("node", "attach", job, home=home).returncode == 3
    done = run_moltis("node", "jobs", "--cancel", job, home=home)
    assert done.returncode == moltis.EXIT_FAILURE
    assert "the command on Local has ended: exit status 3" in done.stderr


def started_on(peer):
    """Return the id of the next job that a scripted node is sent."""
    return peer.receive_until(
        lambda m: isinstance(m, dict) and m.get("event") == moltis.JOB_START
    )["payload"]["id"]


def test_ending_what_runs_on_a_node_that_is_away_says_when_that_will_be(
    gateway, capsys
):
    with silent_node(gateway) as peer:
        job = start(gateway, "sleep 120", "gone")
        started_on(peer)
    wait_for(lambda: "awayMs" in gateway.call("job.wait", id=job, wait=0))
    with gateway.operator() as client:
        moltis.cancel_job(client, job, moltis.Output({}))
    assert "it ends when Rust box is back, which is away now" in capsys.readouterr().err


def test_who_waits_in_line_is_told_the_place(gateway, capsys):
    with silent_node(gateway) as peer, moltis.JobFeed(gateway.operator) as feed:
        terminal = terminal_for(feed, {"gone": "gone"}, "true")

        def answer():
            job = started_on(peer)
            place = {"id": job, "place": 3}
            peer.send({"type": "event", "event": "job.place", "payload": place})
            wait_for(lambda: terminal._in_line, what="the place to be told")
            ending = moltis.to_json(moltis.Ending("done", exit_code=5)).encode()
            frame = moltis.encode_log_frame(moltis.ENDING, ending)
            peer.send(moltis.encode_job_data(moltis.LOG_DATA, job, 0, frame))

        thread = threading.Thread(target=answer, name="test-answer")
        thread.start()
        assert terminal.execute(feeds=False) == 5
        thread.join()
    assert "Rust box: number 3 in line" in capsys.readouterr().err


def test_attaching_to_what_was_not_detached_says_that_its_output_is_not_stored(
    gateway, home
):
    command = "echo shown; read x; echo more; exit 7"
    with subprocess.Popen(
        [*launched(PROGRAM), "node", "exec", "local", "--stdin", "--", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=clean_environment(home),
    ) as foreground:
        assert foreground.stdout.readline() == b"shown\n"
        (job,) = gateway.call("job.list")
        with Program("node", "attach", job["id"], home=home) as attached:
            attached.wait_for_output("the output of this command is not stored")
            followed = gateway.running.jobs.get(job["id"])
            wait_for(lambda: len(followed.followers) == 2, what="both to follow it")
            foreground.stdin.write(b"x\n")
            foreground.stdin.close()
            assert attached.process.wait(60) == 7
            attached.wait_for_output("more\n")
        assert foreground.stdout.read() == b"more\n"
    after = run_moltis("node", "attach", job["id"], home=home)
    assert after.returncode == 7
    assert "[… 11 bytes cut …]" in after.stderr


def test_output_that_is_no_longer_kept_is_said_to_be_cut(gateway, home, monkeypatch):
    for name, size in (("SEGMENT", 65536), ("MAX_SEGMENTS", 3), ("MEMORY_LOG", 65536)):
        monkeypatch.setattr(moltis, name, size)
    job = start(gateway, "seq 200000")
    gateway.call("job.wait", id=job, wait=60)
    attached = run_moltis("node", "attach", job, home=home)
    assert attached.stdout.startswith("1\n2\n")
    assert attached.stdout.endswith("\n199999\n200000\n")
    (cut,) = re.findall(r"\[… ([\d,]+) bytes cut …\]", attached.stderr)
    size = sum(len(f"{n}\n") for n in range(1, 200001))
    missing = size - len(attached.stdout)
    # It counts the heads of frames as well: 5 bytes of at most 64 KiB.
    assert missing <= int(cut.replace(",", "")) < missing * 1.01 + 100


def test_a_job_whose_answer_is_lost_is_named_and_can_be_asked_for(home, monkeypatch):
    real = moltis.JobMethods.start

    def start_and_hang_up(self, call, **params):
        answer = real(self, call, **params)
        call.peer.ws.abort()
        return answer

    monkeypatch.setattr(moltis.JobMethods, "start", start_and_hang_up)
    words = ("node", "exec", "--detach", "local", "--", "echo once; exit 4")
    with InProcessGateway(home / ".moltis") as gateway:
        started = run_moltis(*words, home=home)
        assert started.returncode == moltis.EXIT_UNREACHABLE
        assert started.stdout == ""
        job = re.search(r"([0-9a-f-]{36}) on local", started.stderr).group(1)
        attached = run_moltis("node", "attach", job, home=home)
        assert (attached.stdout, attached.returncode) == ("once\n", 4)
        assert [row["id"] for row in gateway.call("job.list")] == [job]


def test_of_a_job_that_the_gateway_never_heard_of_attach_says_so(gateway, home):
    attached = run_moltis("node", "attach", moltis.new_id(), home=home)
    assert attached.returncode == moltis.EXIT_FAILURE
    assert "there is no job" in attached.stderr


def test_attaching_to_no_job_says_where_to_look(gateway, home):
    done = run_moltis("node", "attach", "nonsense", home=home)
    assert done.returncode == moltis.EXIT_FAILURE
    assert "moltis node jobs" in done.stderr


@pytest.fixture
def lasting_node(tmp_path):
    """A function that starts a node which outlives gateways."""
    (tmp_path / "node").mkdir()
    nodes = []

    def start(gateway):
        host = f"ws://127.0.0.1:{gateway.running.port}/ws"
        words = ("node", "add", "--foreground", "--node-id", "far-id", "--host", host)
        token = gateway.token("far")
        nodes.append(Program(*words, home=tmp_path / "node", MOLTIS_DEVICE_TOKEN=token))
        wait_for(lambda: gateway.is_connected("far-id"), what="the node")

    yield start
    for node in nodes:
        node.end()


def test_a_job_is_attached_to_through_a_restart_of_the_gateway(
    tmp_path, home, lasting_node
):
    data, go, port = home / ".moltis", tmp_path / "go", free_port()
    with InProcessGateway(data, port=port) as first:
        lasting_node(first)
        job = start(first, f"echo 1; {wait_in_shell(go)}; echo 2", "far-id")
        attached = Program("node", "attach", job, home=home)
        attached.wait_for_output("1\n")
    with attached, InProcessGateway(data, port=port):
        go.touch()
        assert attached.process.wait(60) == 0
        attached.wait_for_output("2\n")
    assert attached.stdout == "1\n2\n"
    assert "waiting for the gateway to come back (away since " in attached.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another uid")
def test_a_uid_without_an_account_or_a_home_gets_sentences(request):
    """As in a container that runs as a number."""
    place = Path(tempfile.mkdtemp(dir="/var/tmp"))  # pytest's own are its owner's
    request.addfinalizer(partial(shutil.rmtree, place))
    place.chmod(0o755)
    copy, directory = place / "moltis.py", place / "data"
    copy.write_bytes(PROGRAM.read_bytes())
    copy.chmod(0o644)
    directory.mkdir()
    os.chown(directory, 47114711, -1)
    script = (
        "import os, sys; os.setuid(47114711); del os.environ['HOME'];"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )

    def run(words, **environ):
        return subprocess.run(
            ["/usr/bin/python3", "-c", script, str(copy), *words],
            check=False,
            capture_output=True,
            text=True,
            env={**clean_environment(place), **environ},
            cwd="/",
        )

    done = run(["node", "status"])
    assert done.returncode == 78
    assert "uid 47114711 has no account" in done.stderr
    for words in (["node", "status"], ["node", "list"], ["install", "--uninstall"]):
        done = run(words, MOLTIS_DATA_DIR=str(directory))
        assert done.returncode != 0 or words[0] == "install"
        assert "Traceback" not in done.stderr, done.stderr


# -- backup and restore --------------------------------------------------------


def test_a_backup_of_a_running_gateway_is_restored_whole(gateway, home, tmp_path):
    """FAULTS D24: with what is in the WAL alone."""
    made = gateway.call("device.token.create", displayName="Pi")
    job = start(gateway, "echo kept")
    gateway.call("job.wait", id=job, wait=60)
    file, empty = tmp_path / "a backup?.db", tmp_path / "elsewhere"
    done = run_moltis("gateway", "backup", file, home=home)
    assert done.returncode == 0, done.stderr
    assert "jobs/" in done.stderr
    assert file.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.glob("a backup*")] == [file.name]
    again = run_moltis("gateway", "backup", file, home=home)
    assert again.returncode == moltis.EXIT_FAILURE
    assert f"{file} exists" in again.stderr
    there = {"MOLTIS_DATA_DIR": str(empty)}
    done = run_moltis("gateway", "restore", file, home=home, **there)
    assert done.returncode == 0, done.stderr
    with InProcessGateway(empty) as restored:
        (pair,) = restored.call("device.pair.list")
        assert pair["deviceId"] == made["deviceId"]
        assert b"kept" in restored.running.store.jobs.log(job)


def test_columns_are_even_beside_wide_and_combining_characters(capsys):
    names = ["plain", "\u65e5\u672c", "e\u0301t"]
    rows = [{"name": name, "state": "x"} for name in names]
    moltis.Output({}).table(rows, {"NAME": "name", "STATE": "state"})
    assert capsys.readouterr().out.split("\n")[:4] == [
        "NAME   STATE",
        "plain  x",
        "\u65e5\u672c   x",  # four columns
        "e\u0301t     x",  # two
    ]
    assert moltis.fitting_start("a\u65e5\u672c", 4) == "a\u65e5"


def test_a_restore_replaces_nothing(gateway, home, tmp_path):
    """FAULTS D24"""
    file = tmp_path / "backup.db"
    assert run_moltis("gateway", "backup", file, home=home).returncode == 0
    with moltis.GatewayLock(home / ".moltis"):  # as `moltis gateway` holds it
        running = run_moltis("gateway", "restore", file, home=home)
    assert running.returncode == moltis.EXIT_CONFIGURATION
    gateway.close()
    (home / ".moltis" / "gateway.json").unlink()
    before = (home / ".moltis" / "moltis.db").read_bytes()
    stopped = run_moltis("gateway", "restore", file, home=home)
    assert stopped.returncode == moltis.EXIT_FAILURE
    assert "has a gateway already (moltis.db)" in stopped.stderr
    assert (home / ".moltis" / "moltis.db").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "is not a file"),
        (b"", "is no database of a gateway"),
        (b"not a database\n" * 100, "is no database of a gateway; name what `backup`"),
    ],
)
def test_a_restore_of_what_is_no_backup_leaves_nothing(
    home, tmp_path, content, problem
):
    file, empty = tmp_path / "backup.db", tmp_path / "elsewhere"
    if content is not None:
        file.write_bytes(content)
    there = {"MOLTIS_DATA_DIR": str(empty)}
    done = run_moltis("gateway", "restore", file, home=home, **there)
    assert done.returncode == moltis.EXIT_FAILURE
    assert problem in done.stderr
    assert "Traceback" not in done.stderr
    assert not (empty / "moltis.db").exists()


def test_the_audit_as_json_goes_to_its_end(gateway, home, monkeypatch):
    """FAULTS A23: without a number it is all of it, and an array all the same."""
    monkeypatch.setattr(moltis, "MAX_PAGE", 50)
    for number in range(120):
        entry = moltis.AuditEntry(number, "key.created", "me", "", f"key {number}")
        gateway.running.store.audit.add(entry)

    def subjects(*words):
        done = run_moltis("audit", "--json", *words, home=home)
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout)
        return [row["subject"] for row in rows if row["caller"] == "me"]

    everything = [f"key {number}" for number in reversed(range(120))]
    assert subjects() == everything
    assert subjects("--limit", "3") == everything[:2]  # and that it was exported


# -- small things that a stranger stumbles over --------------------------------


def said(capsys, *words):
    """Return status, stdout and stderr of a command line, run in this process."""
    capsys.readouterr()
    status = moltis.main([*words])
    return (status, *capsys.readouterr())


def test_a_node_without_a_name_has_that_of_its_token_here_and_there(gateway):
    learned = []
    settings = moltis.NodeSettings(
        gateway.websocket_url, gateway.token("Pi"), "id-of-pi"
    )
    node = moltis.RunningNode(
        settings, gateway.environ, lambda *_: None, on_learned=learned.append
    )
    try:
        wait_for(lambda: gateway.is_connected("id-of-pi"), what="the node")
        [view] = [n for n in gateway.call("node.list") if n["nodeId"] == "id-of-pi"]
        assert view["displayName"] == "Pi"
        assert learned == [{"display_name": "Pi"}]
    finally:
        node.close()


def test_a_node_without_any_name_has_that_of_its_host(gateway):
    settings = moltis.NodeSettings(gateway.websocket_url, gateway.token(), "id-of-pi")
    node = moltis.RunningNode(settings, gateway.environ, lambda *_: None)
    try:
        wait_for(lambda: gateway.is_connected("id-of-pi"), what="the node")
        [view] = [n for n in gateway.call("node.list") if n["nodeId"] == "id-of-pi"]
        assert view["displayName"] == socket.gethostname()
    finally:
        node.close()


@pytest.mark.parametrize("code", ["IMPORT_AND_RUN", "LOAD_AND_RUN"])
def test_an_interrupt_while_the_program_loads_is_no_traceback(tmp_path, code):
    """In the first 50 ms it is not our code that would have to handle it."""
    slow = tmp_path / "moltis.py"
    slow.write_text(
        "import time\nprint('loading', flush=True)\nend = time.monotonic() + 60\n"
        "while time.monotonic() < end: pass\n"
    )
    descriptor = -1
    if code == "LOAD_AND_RUN":
        parts = (compile(slow.read_text(), "moltis.py", "exec"), {}, sys.path)
        (tmp_path / "code").write_bytes(marshal.dumps(parts))
        descriptor = os.open(tmp_path / "code", os.O_RDONLY)
    first = tmp_path if descriptor < 0 else descriptor
    process = subprocess.Popen(
        [sys.executable, "-IS", "-c", getattr(moltis, code), str(first), "moltis"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=() if descriptor < 0 else (descriptor,),
    )
    assert process.stdout.readline() == b"loading\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == -signal.SIGINT
    if descriptor >= 0:
        os.close(descriptor)


def test_an_echoed_name_is_one_line(gateway, capsys):
    gateway.call("device.token.create", displayName="Pi")
    with silent_node(gateway, "id-of-pi"):
        status, _, err = said(capsys, "node", "rename", "id-of-pi", "Attic\nPi")
    assert (status, err) == (0, "id-of-pi is now called Attic Pi\n")
    status, _, err = said(capsys, "chat", "--session", "my\nwork", "true")
    assert (status, err) == (0, "a new session: my work\n")


@pytest.mark.parametrize(
    "line",
    [
        "node cp file Local:",
        "node cp Local:/etc/passwd .",
        "install --prefix tools",
        "node add --host h --token mdt_x --working-dir here",
        "node add --host h --token mdt_x --allow-files here",
    ],
)
def test_a_working_directory_that_is_gone_is_said_to_be(
    gateway, tmp_path, capsys, monkeypatch, line
):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    status, _, err = said(capsys, *line.split())
    assert (status, "is gone; `cd` to another" in err) == (1, True), err


def test_words_after_two_dashes_are_arguments_though_they_begin_with_one(
    gateway, capsys
):
    with gateway.node("-pi"):
        status, _, err = said(capsys, "node", "rename", "--", "-pi", "--attic")
        assert (status, err) == (0, "-pi is now called --attic\n")
    status, _, err = said(capsys, "node", "revoke", "--", "--attic")
    assert (status, err) == (0, "--attic is revoked\n")
    status, _, err = said(capsys, "chat", "--", "-nothing")
    assert (status, "-nothing: not found" in err) == (127, True), err
    for line in ("node list -- more", "key list -- -more", "node jobs -- Local more"):
        status, _, err = said(capsys, *line.split())
        assert (status, "more" in err) == (2, True), (line, err)


def test_a_session_that_is_refused_is_not_announced(gateway, capsys):
    status, _, err = said(capsys, "chat", "--session", "x" * 500, "true")
    assert (status, err) == (2, "moltis: a name has 1 to 200 printable characters\n")


def test_a_key_that_is_revoked_already_is_said_to_be(gateway, capsys):
    made = gateway.call("keys.create", name="ci", scopes=["operator.read"])
    assert said(capsys, "key", "revoke", "ci")[0] == 0
    for reference in ("ci", made["keyId"]):
        status, _, err = said(capsys, "key", "revoke", reference)
        assert status == 1
        assert "is revoked already, since " in err
    gateway.call("keys.create", name="ci", scopes=["operator.read"])
    assert said(capsys, "key", "revoke", "ci")[0] == 0  # the one that is not


def test_a_machine_that_is_no_node_has_no_log_and_nothing_to_remove(home, capsys):
    status, out, err = said(capsys, "node", "remove")
    assert (status, out) == (0, "")
    assert err == "this machine is no node; there is nothing to remove\n"
    for follow in ((), ("-f",)):
        status, out, err = said(capsys, "node", "logs", *follow)
        assert (status, out) == (1, "")
        assert err.startswith("moltis: there is no log here: ")
        assert err.endswith("node.log is made when the node runs\n")


def test_a_wrong_key_is_refused_in_one_sentence(gateway, capsys, monkeypatch):
    monkeypatch.setenv("MOLTIS_API_KEY", "mk_" + "x" * 43)
    status, _, err = said(capsys, "node", "list")
    assert status == 77
    assert "moltis 0.1" not in err


def test_a_key_is_asked_for_where_there_is_a_gateway(
    gateway, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("MOLTIS_DATA_DIR", str(tmp_path / "elsewhere"))
    status, _, err = said(capsys, "node", "list", "--host", gateway.url)
    assert (status, "give the key in MOLTIS_API_KEY" in err) == (77, True), err
    nowhere = f"127.0.0.1:{free_port()}"
    status, _, err = said(capsys, "node", "list", "--host", nowhere)
    assert (status, "refused the connection" in err) == (69, True), err


def test_http_to_a_gateway_with_tls_says_what_to_use(tmp_path, capsys, monkeypatch):
    files = moltis.ensure_certificate(tmp_path / "tls", ["127.0.0.1"])
    tls = moltis.ServerTls(lambda: files)
    with InProcessGateway(tmp_path / "data", tls=tls) as gateway:
        plain = gateway.running.url.replace("https:", "http:")
        monkeypatch.setenv("MOLTIS_DATA_DIR", str(tmp_path / "data"))
        status, _, err = said(capsys, "node", "list", "--host", plain)
        assert status == 2
        assert err.endswith(f"runs with TLS; use {gateway.running.url}\n")
        monkeypatch.setenv("MOLTIS_API_KEY", "mk_" + "x" * 43)
        status, _, err = said(capsys, "node", "list", "--host", plain)
        assert status == 69
        assert err.endswith(f"speaks TLS; use {gateway.websocket_url}\n")


# -- words that are nearly right -----------------------------------------------


@pytest.mark.parametrize(
    ("line", "hint", "usage"),
    [
        ("exec a", "'exec'; did you mean `moltis node exec`?", "node exec NODE"),
        ("nodes", "'nodes'; did you mean `moltis node list`?", "node list"),
        ("keys", "'keys'; did you mean `moltis key list`?", "key list"),
        ("nod lst", "'nod'; did you mean `moltis node list`?", "node list"),
        (
            "node atach x",
            "'node atach'; did you mean `moltis node attach`?",
            "node att",
        ),
        ("gateway bakup", "did you mean `moltis gateway backup`?", "gateway backup"),
        ("audti", "did you mean `moltis audit`?", "audit"),
        ("frobnicate", "'frobnicate'; `moltis --help` lists them", "[-h] [--version]"),
        ("node frobnicate", "'node frobnicate'; `moltis node --help` l", "node [-h]"),
        ("node ls", "'node ls'; did you mean `moltis node list`?", "node list"),
        ("ps", "'ps'; did you mean `moltis node jobs`?", "node jobs"),
        (
            "model rm x",
            "'model rm'; did you mean `moltis model remove`?",
            "model remove",
        ),
        ("node rm x", "'node rm'; did you mean `moltis node revoke`?", "node revoke"),
        (
            "node exec x --timout 1",
            "no option --timout; did you mean --time",
            "node exec",
        ),
        ("node list --jsn", "has no option --jsn; did you mean --json?", "node list"),
        ("node cp -rf a b:", "no option", "node cp"),  # newer Pythons name it: -f
        ("--versoin", "`moltis` has no option --versoin; did you mean --vers", "[-h]"),
        (
            "node list one",
            "`moltis node list` takes no further word, as 'one'",
            "node list",
        ),
        (
            "gateway --prot 1",
            "`moltis gateway` has no option --prot; did you",
            "gateway",
        ),
        (
            "node attach --jsn",
            "`moltis node attach` has no option --jsn",
            "node attach",
        ),
        ("version", "'version'; did you mean `moltis --version`?", "[-h]"),
        ("help lst", "'lst'; did you mean `moltis node list`?", "node list"),
        ("key", "make an operator key, shown once", "key [-h]"),
        ("", "serve the page, the nodes and the command line", "[-h]"),
        ("node jobs --cancel", "`moltis node jobs`: argument --cancel", "node jobs"),
    ],
)
def test_a_misspelt_word_gets_the_nearest_one_and_the_usage_that_helps(
    capsys, line, hint, usage
):
    status, out, err = said(capsys, *line.split())
    assert (status, out) == (2, "")
    assert hint in err
    assert f"usage: moltis {usage}" in err


@pytest.mark.parametrize("line", ["", "node", "node exec", "chat"])
def test_help_is_a_word_as_well_as_an_option(capsys, line):
    texts = []
    for words in ([*line.split(), "--help"], ["help", *line.split()]):
        with pytest.raises(SystemExit, match=r"^0$"):
            moltis.main(words)
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("usage: moltis")
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def gateway_with_attic(tmp_path_factory):
    """A data directory whose gateway knows a node that is away."""
    directory = tmp_path_factory.mktemp("attic")
    with InProcessGateway(directory) as running:
        running.node("Attic").close()
        yield directory


@pytest.fixture
def attic(gateway_with_attic, monkeypatch):
    monkeypatch.setenv("MOLTIS_DATA_DIR", str(gateway_with_attic))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("audit --state faild", "--state does not take 'faild'; did you mean failed?"),
        ("audit --state FAILED", "--state does not take 'FAILED'; did you mean failed"),
        ("audit --what comand", "--what does not take 'comand'; did you mean command?"),
        ("audit --what key.creatd", "did you mean key.created?"),
        (
            "audit --what xyz",
            "--what takes command, login, key, token, node, chat, mod",
        ),
        ("completion zsch", "SHELL does not take 'zsch'; did you mean zsh?"),
        ("completion tcl", "SHELL takes bash, zsh, fish, not 'tcl'"),
        ("node add --auth scramm", "--auth does not take 'scramm'; did you mean scram"),
        ("model add x --protocol opanai", "did you mean openai?"),
        ("key create --name x --scope operater.write", "did you mean operator.write?"),
        ("key create --name x --scope wirte", "not take 'wirte'; did you mean operato"),
        ("key create --name x --scope bogus", "operator.admin, not 'bogus'"),
    ],
)
def test_a_misspelt_value_gets_one_sentence_with_the_nearest_one(capsys, line, problem):
    status, out, err = said(capsys, *line.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert problem in err


@pytest.mark.parametrize(
    ("line", "near"),
    [
        ("node exec atic -- true", "Attic"),
        ("node exec local atic -- true", "Attic"),
        ("node jobs ATTICK", "Attic"),
        ("node rename attc pi", "Attic"),
        ("node revoke atic", "Attic"),
        ("node cp atic:x .", "Attic"),
        ("chat --node atic hi", "Attic"),
        ("audit --node atic", "Attic"),
        ("audit --who ownr", "owner"),
        ("audit --json --who ownr", "owner"),
        ("key revoke onwer", "owner"),
        ("chat --model olama/llama hi", "ollama/llama"),
    ],
)
def test_a_misspelt_name_gets_one_sentence_with_the_nearest_one(
    attic, capsys, line, near
):
    status, out, err = said(capsys, *line.split())
    assert (status in (1, 2), out, err.count("\n")) == (True, "", 1)
    assert err.endswith(f"; did you mean {near}?\n")


def test_an_empty_list_is_said_to_be_empty(attic, capsys):
    assert said(capsys, "audit", "--state", "lost") == (
        *(0, ""),
        "nothing in the audit matches\n",
    )
    assert said(capsys, "node", "jobs", "attic") == (
        *(0, ""),
        "no job runs on attic, and none was left in the background\n",
    )
    assert said(capsys, "node", "jobs", "--json") == (0, "[]\n", "")
    assert said(capsys, "audit", "--json", "--state", "lost") == (0, "[]\n", "")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("gateway --port 65536", "--port takes a number, from 0 to 65535, not 65536"),
        ("gateway --port x", "--port takes a number, from 0 to 65535, not x"),
        ("gateway --keep-audit 0", "--keep-audit takes days, more than 0 and at most"),
        ("gateway --keep-output inf", "--keep-output takes GiB, more than 0"),
        ("gateway --idle-terminal nan", "--idle-terminal takes hours, more than 0"),
        (
            "node exec pi --timeout 0",
            "--timeout takes seconds, more than 0 and at most",
        ),
        ("audit --limit 0.5", "--limit takes a number, from 1 to"),
        ("audit --since tomorrow", "--since takes 30min, 24h, 7d, 2026-01-31"),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_range(home, capsys, line, words):
    status, out, err = said(capsys, *line.split())
    assert (status, out) == (2, "")
    assert words in err


def test_a_new_key_comes_with_its_sign_in_link_and_no_log_has_it(gateway, capsys, home):
    create = ("key", "create", "--name", "ann", "--scope", "read")
    made = json.loads(said(capsys, *create, "--json")[1])
    assert made["signInLink"] == f"{gateway.url}/#key={made['key']}"
    assert made["keyId"] in [key["keyId"] for key in gateway.call("keys.list")]
    # Nobody looks at this stderr, which may be kept in a log.
    status, out, err = said(capsys, *create[:3], "bob", *create[4:])
    assert (status, out.count("mk_")) == (0, 1)
    assert "mk_" not in err
    shown = Terminal("key", "create", "--name", "cy", "--scope", "read", home=home)
    assert shown.close() == 0
    assert f"{gateway.url}/#key=mk_" in shown.text


def test_a_scope_needs_no_operator_before_it(gateway, capsys):
    status, out, _ = said(capsys, "key", "create", "--name", "ci", "--scope", "read")
    assert status == 0
    assert out.startswith("mk_")
    [made] = [k for k in gateway.call("keys.list") if k["name"] == "ci"]
    assert made["scopes"] == ["operator.read"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host", "x", "--token", "mk_" + "x" * 43), "mk_… is the operator key"),
        (("--join", "http://x/join/c", "--token", TOKEN), "exclude each other"),
    ],
)
def test_what_is_no_token_beside_no_link_is_said(home, arguments, words):
    with pytest.raises(moltis.UsageError, match=words):
        settings_for(home, *arguments)


def test_the_same_token_is_the_same_node_though_nothing_was_kept(home, tmp_path):
    def node_id(token):
        return settings_for(
            home, "--host", "gateway", "--token", token, "--foreground"
        ).node_id

    assert node_id(TOKEN) == node_id(TOKEN)
    assert node_id(TOKEN) != node_id("mdt_" + "y" * 43)
    assert moltis.is_uuid(node_id(TOKEN))


# -- exec --json, audit filters ------------------------------------------------


def test_exec_prints_outputs_and_endings_as_json(gateway, home):
    """The statuses, and what goes to stderr, are those without --json."""
    line = "echo out; echo err >&2; exit 3"
    done = run_moltis("node", "exec", "--json", "local", "--", line, home=home)
    assert done.returncode == 3
    [result] = json.loads(done.stdout)
    assert (result["node"], result["state"], result["exitCode"]) == ("Local", "done", 3)
    assert (result["stdout"], result["stderr"]) == ("out\n", "err\n")
    assert (result["words"], result["failed"]) == ("exit status 3", True)
    with gateway.node("far"):
        pass
    done = run_moltis("node", "exec", "--json", "--all", "--", "echo hi", home=home)
    assert done.returncode == 1
    local, far = json.loads(done.stdout)
    assert (local["node"], local["stdout"]) == ("Local", "hi\n")
    assert (far["node"], far["failed"], far["stdout"]) == ("far", True, "")
    assert "offline" in far["error"]


def test_detached_commands_are_named_in_json(gateway, capsys):
    words = ("node", "exec", "--json", "--detach", "local")
    # As main() splits it: what follows belongs to the other machine.
    status, out, _ = said(capsys, *words, "--", "true")
    assert status == 0
    [started] = json.loads(out)
    assert started["node"] == "Local"
    assert gateway.call("job.wait", id=started["id"], wait=60)["state"] == "done"


def test_input_that_nobody_reads_is_hinted_at(tmp_path):
    """`echo hello | moltis node exec pi -- cat` prints nothing."""
    reader, writer = os.pipe()
    os.write(writer, b"hello")
    (tmp_path / "file").write_bytes(b"hello")
    (tmp_path / "empty").touch()
    code = "import moltis, sys; sys.exit(moltis.has_unread_input())"

    def looks(stdin):
        return subprocess.run(
            [sys.executable, "-c", code], stdin=stdin, cwd=PROGRAM.parent, check=False
        ).returncode

    with open(tmp_path / "file") as file, open(tmp_path / "empty") as empty:
        assert [looks(reader), looks(file)] == [1, 1]
        assert [looks(empty), looks(subprocess.DEVNULL)] == [0, 0]
    os.close(writer)
    os.read(reader, 5)
    assert looks(reader) == 0
    os.close(reader)


def test_exec_says_on_a_terminal_that_it_passes_no_input_on(gateway, home):
    """FAULTS E17"""
    ours, terminal = pty.openpty()
    try:
        done = subprocess.run(
            [*launched(PROGRAM), "node", "exec", "local", "--", "cat; echo over"],
            check=False,
            input=b"hello",
            stdout=subprocess.PIPE,
            stderr=terminal,
            env=clean_environment(home),
        )
    finally:
        os.close(terminal)  # or a read would wait for ever where nothing was said
    said = b""
    with open(ours, "rb", buffering=0) as shown, contextlib.suppress(OSError):
        for piece in iter(lambda: shown.read(4096), b""):
            said += piece  # each write may come by itself; an error is the end
    assert (done.returncode, done.stdout) == (0, b"over\n")
    assert b"standard input was not read; --stdin passes it on" in said


def test_the_audit_is_filtered_by_who_what_where_and_when(gateway, capsys):
    gateway.call("keys.create", name="ci", scopes=["operator.read"])
    gateway.call(
        "node.invoke", nodeId="local", command="system.run", args={"command": "false"}
    )

    def entries(*words):
        status, out, err = said(capsys, "audit", "--json", "--limit", "100", *words)
        assert (status, err) == (0, "")
        return [(entry["event"], entry["subject"]) for entry in json.loads(out)]

    assert ("command", "false") in entries("--node", "Local")
    assert {event for event, _ in entries("--what", "key")} == {"key.created"}
    assert entries("--what", "command") == [("command", "false")]
    assert entries("--state", "failed", "--who", "OWNER") == [("command", "false")]
    assert entries("--state", "done", "--what", "key") == []
    assert entries("--who", "ci") == []  # has done nothing
    assert ("command", "false") in entries("--since", "5min")
    assert entries("--since", "2100-01-01") == []
    status, out, err = said(capsys, "audit", "--json", "--who", "nobody")
    assert (status, out) == (1, "")
    assert err.endswith("nothing in the audit is by 'nobody'; there is ci, owner\n")
    with pytest.raises(moltis.Refused):  # a refusal is by no name
        moltis.OperatorClient(gateway.url, "mk_" + "x" * 43, gateway.trust)
    status, _, err = said(capsys, "audit", "--json", "--who", "nobody")
    assert err.endswith("there is ci, owner\n")
    status, _, err = said(capsys, "audit", "--since", "yesterday")
    assert status == 2
    assert "not yesterday" in err


# -- completion ----------------------------------------------------------------


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    """A directory with an installed `moltis`, for PATH."""
    prefix = tmp_path_factory.mktemp("prefix")
    run_moltis("install", "--prefix", prefix, home=prefix)
    return prefix / "bin"


class ShellTerminal:
    """An interactive shell in a terminal, with what it has shown so far."""

    def __init__(self, words, **environ):
        self.text = ""
        self._process, self._fd = pty.fork()
        if self._process == 0:
            os.execvpe(words[0], words, environ)
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("4H", 24, 200, 0, 0))
        self._reader = threading.Thread(target=self._read, name="test-shell")
        self._reader.start()

    def _read(self):
        with contextlib.suppress(OSError):
            while True:
                data = os.read(self._fd, 65536)
                if not data:
                    return
                self.text += data.decode("utf-8", "replace")

    def type(self, keys, shows):
        """Type keys; wait until something new is shown with `shows` in it."""
        start = len(self.text)
        os.write(self._fd, keys.encode())

        def plain():  # without what moves the cursor, or is drawn again
            new = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[>=]|\x07", "", self.text[start:])
            return re.sub(r".\x08", "", new)

        wait_for(lambda: shows in plain(), 30, lambda: f"{shows!r} in {plain()!r}")

    def close(self):
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        self._reader.join()
        os.close(self._fd)


SHELLS = {
    "bash": (["bash", "--norc", "-i"], 'eval "$(moltis completion bash)"'),
    "zsh": (
        ["zsh", "-f", "-i"],
        'autoload -U compinit; compinit -u; eval "$(moltis completion zsh)"',
    ),
    "fish": (["fish", "--no-config", "-i"], "moltis completion fish | source"),
}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_subcommands_options_and_nodes(
    shell, gateway, launcher, home
):
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    words, script = SHELLS[shell]
    gateway.call("device.token.create", displayName="far")
    with gateway.node("Build Server"):
        terminal = ShellTerminal(
            words,
            **clean_environment(home, PATH=f"{launcher}:/usr/bin:/bin", TERM="xterm"),
        )
        try:
            terminal.type(f"{script}; echo rea''dy\n", "ready")
            terminal.type("moltis no\t", "node")
            terminal.type("ex\t", "exec")
            terminal.type("Bu\t", "Build\\ Server")
            terminal.type("--time\t", "--timeout")
            terminal.type("\x15moltis node exec Build\\ S\t", "Server")
            terminal.type('\x15moltis node exec "Bu\t', '"Build Server"')
        finally:
            terminal.close()


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("quote", ["", '"', "'"])
def test_a_shell_completes_a_name_to_one_word_whatever_is_in_it(
    shell, quote, gateway, launcher, home
):
    """A node that names itself must not run a command on the operator's machine."""
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    words, script = SHELLS[shell]
    with gateway.node("""Web's "a" $(touch got) `touch got` \\ $HOME"""):
        terminal = ShellTerminal(
            words,
            **clean_environment(home, PATH=f"{launcher}:/usr/bin:/bin", TERM="xterm"),
        )
        try:
            terminal.type(f"cd {home}; {script}; echo rea''dy\n", "ready")
            terminal.type(f"moltis node jobs {quote}W\t", "HOME")
            terminal.type("\n", "no job runs")
        finally:
            terminal.close()
    assert not (home / "got").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ga", ["gateway"]),
        ("gateway ", ["backup", "restore"]),
        ("key create --scope ", list(moltis.SCOPES)),
        ("node exec Pi --timeout ", []),
        ("node exec A", ["Attic"]),
        ("node exec --all -- A", []),
        ("completion ", list(moltis.COMPLETION_SCRIPTS)),
        ("bogus ", []),
        ("node list --w", ["--wide"]),
    ],
)
def test_what_may_follow_is_what_the_parser_takes(capsys, monkeypatch, line, words):
    monkeypatch.setattr(moltis, "known_nodes", lambda *_: ["Attic", "Pi"])
    status, out, err = said(capsys, "completion", "fish", "--", *line.split(" "))
    assert (status != 0, err) == (not words and "--all" not in line, "")
    assert [found.partition("\t")[0] for found in out.splitlines()] == words


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_paths_of_nodes(shell, gateway, launcher, home, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    words, script = SHELLS[shell]
    (tmp_path / "there" / "deep").mkdir(parents=True)
    (tmp_path / "there" / "deep" / "file.txt").touch()
    with gateway.node("Attic"):
        terminal = ShellTerminal(
            words,
            **clean_environment(home, PATH=f"{launcher}:/usr/bin:/bin", TERM="xterm"),
        )
        try:
            terminal.type(f"{script}; echo rea''dy\n", "ready")
            terminal.type("moltis node cp Att\t", "Attic:")
            terminal.type(f"{tmp_path}/the\t", "there/")
            terminal.type("de\t", "deep/")
            terminal.type("f\t", "file.txt")
        finally:
            terminal.close()


@pytest.mark.parametrize(
    ("shell", "line", "words"),
    [
        ("fish", "node cp Attic:{}/d", ["Attic:{}/deep/", "Attic:{}/doc.txt"]),
        ("fish", "node cp -r a Attic:{}/deep/", ["Attic:{}/deep/a b"]),
        ("bash", "node cp Attic : {}/d", ["{}/deep/", "{}/doc.txt"]),
        ("bash", "node cp Attic : {}/.h", ["{}/.hidden"]),
        ("bash", 'node cp "Attic:{}/.h', ["Attic:{}/.hidden"]),
        ("bash", "node cp 'Attic:{}/.h", ["Attic:{}/.hidden"]),
        ("fish", "node cp Attic:{}/none/", []),
        ("fish", "node cp nobody:{}/d", []),
        ("fish", "node cp Away:{}/d", []),
        ("fish", "node cp ./Attic:{}/d", []),
        ("fish", "node cp At", ["Attic:"]),
    ],
)
def test_paths_of_nodes_are_offered_and_none_of_one_that_is_away(
    gateway, capsys, tmp_path, shell, line, words, monkeypatch
):
    monkeypatch.setattr(moltis, "COMPLETION_PATIENCE", 60.0)
    (tmp_path / "deep").mkdir()
    for name in ("doc.txt", "other", ".hidden", "deep/a b"):
        (tmp_path / name).touch()
    gateway.call("device.token.create", displayName="Away")
    with gateway.node("Attic"):
        typed = line.format(tmp_path).split(" ")
        status, out, err = said(capsys, "completion", shell, "--", *typed)
    assert err == ""
    # Without one, files of this machine are offered only where such a path begins.
    assert (status == 0) == (words != [] or "./" in line)
    found = [one.partition("\t")[0] for one in out.splitlines()]
    assert sorted(found) == [word.format(tmp_path) for word in words]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_ids_and_no_files_where_ids_belong(
    shell, gateway, launcher, home
):
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    job = start(gateway, "true")
    words, script = SHELLS[shell]
    (home / "only-file").touch()
    environ = clean_environment(home, PATH=f"{launcher}:/usr/bin:/bin", TERM="xterm")
    terminal = ShellTerminal(words, **environ)
    try:
        terminal.type(f"cd {home}; {script}; echo rea''dy\n", "ready")
        terminal.type(f"moltis node attach {job[:8]}\t", job)
        terminal.type("\x15moltis node recording only\t-X", "only-X")
        terminal.type("\x15moltis doctor --ca only\t-X", "only-file")
    finally:
        terminal.close()


def test_names_of_keys_and_ids_of_jobs_are_offered(gateway, capsys):
    job = start(gateway, "echo of the job")
    for line in ("node attach ", "node recording ", "node jobs --cancel "):
        status, out, _ = said(capsys, "completion", "fish", "--", *line.split(" "))
        assert (status, out) == (0, f"{job}\techo of the job\n")
    status, out, _ = said(capsys, "completion", "fish", "--", "key", "revoke", "")
    assert (status, out.partition("\t")[0]) == (0, "owner")


# -- model ---------------------------------------------------------------------


def model_server(request):
    """A server of models, which wants a key."""
    if request.headers.get("Authorization") != "Bearer sk-right":
        return 401, {}, [b'{"error": {"message": "wrong key"}}']
    return 200, {}, [b'{"data": [{"id": "qwen3"}]}']


def test_a_server_of_models_is_added_listed_and_removed(gateway, capsys, monkeypatch):
    def model(*words, typed=""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
        status, out, err = said(capsys, "model", *words)
        assert "sk-right" not in out + err
        return status, out or err

    with ScriptedServer(model_server) as server:
        status, text = model("add", "gpu-box", "--url", server.url)
        assert status == 0
        assert text.startswith("gpu-box is added, but lists no models: ")
        assert "wrong key" in text
        done = model("add", "gpu-box", "--api-key-stdin", typed="sk-right\n")
        assert done == (0, "gpu-box is added; models: 1\n")
        ids = [row["id"] for row in json.loads(model("list", "--json")[1])]
        assert ids == ["shell", "gpu-box/qwen3"]
        rows = [line.split() for line in model("list", "--providers")[1].splitlines()]
        assert ["gpu-box", "1", "entered", server.url, "-"] in rows
        assert model("remove", "gpu-box") == (0, "gpu-box is removed\n")
        status, text = model("remove", "gpu-box")
        assert status == 1
        assert "nothing was entered for 'gpu-box'" in text
        monkeypatch.setenv("MOLTIS_MODEL_KEY", "sk-right")  # without a terminal
        done = model("add", "other", "--url", server.url)
        assert done == (0, "other is added; models: 1\n")


def test_the_key_of_a_server_of_models_is_asked_for_and_not_shown(gateway, home):
    with ScriptedServer(model_server) as server:
        words = "model", "add", "gpu-box", "--url", server.url
        terminal = ShellTerminal(
            [sys.executable, str(PROGRAM), *words], **clean_environment(home)
        )
        try:
            terminal.type("", "API key")
            terminal.type("sk-right\n", "gpu-box is added; models: 1")
        finally:
            terminal.close()
    assert "sk-right" not in terminal.text


@pytest.mark.parametrize(
    ("words", "typed", "hint"),
    [
        ("groq --api-key-stdin", "\n", "there is no key on standard input"),
        ("groq --api-key-stdin", "one\ntwo\n", "the key is no line of"),
        ("groq --api-key-stdin", "schlüssel", "the key is no line of"),
        ("groq", "", "give a key"),
        ("groq --protocol openai", "", "protocol of its own"),
        ("gpu", "", "give a key"),
        ("gpu --api-key-stdin", "key", "needs an address"),
        ("gpu --url gpu:8080", "", "must look like http://"),
        ("gpu --url http://me:word@gpu", "", "enter a key by itself"),
        ("GPU --url http://gpu", "", "cannot be the name of a provider"),
    ],
)
def test_what_cannot_be_a_server_of_models_is_said(
    gateway, capsys, monkeypatch, words, typed, hint
):
    stdin = io.TextIOWrapper(io.BytesIO(typed.encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    status, out, err = said(capsys, "model", "add", *words.split())
    assert (status, out) == (2, "")
    assert hint in err
    assert "word@" not in err
    assert not (gateway.directory / "models.json").exists()


# -- chat ----------------------------------------------------------------------


@pytest.fixture
def terminal(gateway, home):
    """A chat of its own, at its prompt."""
    chat = Terminal("chat", "--session", "here", home=home)
    try:
        chat.wait_for("Local · Shell › ")
        yield chat
    finally:
        chat.type("/exit\n")
        assert chat.close() == 0


def sessions(gateway):
    return {s["label"]: s for s in gateway.call("sessions.list")}


def texts(gateway, label):
    """Return what was said in a chat, in its order."""
    history = gateway.call("chat.history", sessionKey=sessions(gateway)[label]["key"])
    return [m["text"] for m in history if m["role"] == "user"]


def test_the_prompt_of_a_chat_says_where_a_message_goes(gateway, terminal):
    with gateway.node("far"):
        terminal.type("mkdir -p deep && cd deep\n")
        terminal.wait_for("Local ~/deep · Shell › ")
        terminal.type("/node far\n")
        terminal.wait_for("far · Shell › ")
        terminal.type("/node nowhere\n")
        terminal.wait_for("nowhere")
        terminal.type("/nodes\n")
        terminal.wait_for("did you mean /node?")
        terminal.type("/node\n")
        terminal.wait_for("Local  connected")
        terminal.type("/model\n")
        terminal.wait_for("/model\nshell\n")
        terminal.type("/help\n")
        terminal.wait_for("/exit           leave, as Ctrl+D does")
        terminal.type("/new work\n")
        wait_for(lambda: "work" in sessions(gateway))
        assert sessions(gateway)["work"]["node_id"] == "id-of-far"
        terminal.type("echo $((6 * 7))\n")
        terminal.wait_for("42\nfar ")
    assert texts(gateway, "here") == ["mkdir -p deep && cd deep"]
    assert texts(gateway, "work") == ["echo $((6 * 7))"]


def test_a_message_goes_to_the_machine_and_directory_of_its_prompt(gateway, terminal):
    """FAULTS E1: chosen elsewhere while it was typed."""
    terminal.type("cd /\n")
    terminal.wait_for("Local / · Shell › ")
    key = sessions(gateway)["here"]["key"]
    gateway.call("chat.send", sessionKey=key, text="cd /usr", nodeId="local")
    wait_for(lambda: sessions(gateway)["here"]["directory"] == "/usr")
    with gateway.node("far"):
        gateway.call("sessions.patch", key=key, node_id="far")
        terminal.type("echo here: $PWD\n")
        terminal.wait_for("here: /\nfar · Shell › ")


def test_a_chat_whose_machine_was_removed_says_so(gateway, home, capsys):
    gateway.node("Attic").close()
    wait_for(lambda: not gateway.is_connected("id-of-Attic"))
    assert said(capsys, "chat", "--session", "t", "--node", "attic", "echo hi")[0] == 1
    assert said(capsys, "node", "revoke", "Attic")[0] == 0
    status, out, err = said(capsys, "chat", "--session", "t", "echo hi")
    assert (status, out) == (1, "")
    assert "the machine of this chat was removed; choose another with --node" in err
    terminal = Terminal("chat", "--session", "t", home=home)
    terminal.wait_for("removed machine · Shell ›")
    terminal.type("/exit\n")
    assert terminal.close() == 0


def test_exit_ends_a_chat(gateway, home):
    chat = Terminal("chat", home=home)
    chat.wait_for("Local · Shell › ")
    chat.type("/exit\n")
    assert chat.close() == 0


def test_a_line_that_is_not_utf_8_gets_one_sentence(terminal):
    os.write(terminal.descriptor, b"echo \xff\n")
    terminal.wait_for("is not UTF-8, and ")
    terminal.type("echo $((40 + 2))\n")
    terminal.wait_for("\n42\n")
    assert "Traceback" not in terminal.text


def test_the_model_of_a_chat_is_kept(gateway, home):
    """FAULTS E3: the next line went to /bin/sh."""
    words = ("chat", "--session", "kept", "--model", "openai/x")
    refused = run_moltis(*words, "hi", home=home)
    assert "openai" in refused.stderr
    assert sessions(gateway)["kept"]["model"] == "shell"
    with ScriptedServer(lambda _handler: None) as server:
        own = {"provider": "own", "baseUrl": server.url, "protocol": "openai"}
        gateway.call("models.configure", **own)
        run_moltis("chat", "--session", "kept", "--model", "own/x", "hi", home=home)
    assert sessions(gateway)["kept"]["model"] == "own/x"
    assert run_moltis("chat", "--session", "kept", "hi", home=home).returncode == 1


def test_a_model_that_changes_a_file_shows_the_whole_diff_and_waits(gateway, home):
    old = "".join(f"key{i} = old value {i}\n" for i in range(300))
    (home / "conf").write_text(old)
    turns = [
        calls(("file_write", {"path": "conf", "content": old.replace("old", "new")})),
        says("It is written."),
    ]
    server = ModelServer()
    server.turns = turns
    with contextlib.closing(server):
        own = {"provider": "own", "baseUrl": server.server.url, "protocol": "openai"}
        gateway.call("models.configure", **own)
        words = ("--session", "w", "--model", "own/clever", "change conf")
        chat = Terminal("chat", *words, home=home)
        try:
            chat.wait_for("[y]es, [n]o: ")
            assert (home / "conf").read_text() == old
            for i in range(300):
                assert f"-key{i} = old value {i}\n" in chat.text
                assert f"+key{i} = new value {i}\n" in chat.text
            chat.type("always\n")  # no change of a file is approved unseen
            wait_for(lambda: chat.text.count("[y]es, [n]o: ") == 2, what="the question")
            chat.type("y\n")
            chat.wait_for("It is written.")
        finally:
            assert chat.close() == 0
    assert (home / "conf").read_text() == old.replace("old", "new")


def test_a_turn_that_ended_while_the_gateway_was_away_is_over_for_older_ones_too(
    gateway, monkeypatch, capsys
):
    """They do not say so when the message comes again."""
    clients = []

    def dial(on_news):
        client = gateway.operator(on_news)
        clients.append(client)
        call = client.call

        def call_and_break(method, params, *rest):
            answer = call(method, params, *rest)
            if method == "chat.send":
                answer.pop("over", None)
                if len(clients) == 1:
                    [session] = call("sessions.list", {})
                    while session["replying"]:
                        [session] = call("sessions.list", {})
                    client.drop()
            return answer

        client.call = call_and_break
        return client

    monkeypatch.setattr(moltis, "operator_client", lambda _a, _c, news: dial(news))
    status, out, _ = said(capsys, "chat", "echo once")
    assert (status, len(clients)) == (0, 2)
    assert "once" in out


def test_a_gateway_of_version_0_1_is_said_to_be_too_old(home, capsys):
    """It refuses the right key, which it cannot verify without being sent it."""

    def refuse(*_args):
        raise moltis.Refused("authentication failed")

    health = json.dumps({"status": "ok", "version": "0.1.0"}).encode()
    with pytest.MonkeyPatch.context() as patch, ScriptedServer(
        lambda _handler: (200, {}, [health])
    ) as server:
        patch.setattr(moltis, "OperatorClient", refuse)
        url = server.url
        moltis.GatewayFile(url, "mk_x", os.getpid()).save(home / ".moltis")
        status, out, err = said(capsys, "chat", "hi")
    assert (status, out) == (77, "")
    assert f"{url} runs moltis 0.1.0" in err
    assert "upgrade it with `moltis install" in err


def test_a_chat_goes_on_after_a_restart_of_the_gateway(tmp_path, home, lasting_node):
    """A command under way, then a message that was typed while the gateway was away."""
    data, go, port = home / ".moltis", tmp_path / "go", free_port()
    with InProcessGateway(data, port=port) as first:
        lasting_node(first)
        chat = Terminal("chat", "--session", "here", "--node", "far", home=home)
        chat.wait_for("far · Shell › ")
        chat.type(f"echo one; {wait_in_shell(go)}; echo two\n")
        chat.wait_for("\none\n")
    chat.wait_for("waiting for the gateway to come back (away since ")
    try:
        with InProcessGateway(data, port=port) as second:
            chat.wait_for("the gateway is back after")
            wait_for(lambda: second.is_connected("far-id"), what="the node")
            go.touch()
            chat.wait_for("\ntwo\nfar ")
            chat.type("/node local\n")
            chat.wait_for("Local · Shell › ")
        chat.type("echo $((6 * 7))\n")
        wait_for(lambda: chat.text.count("(away since") == 2)
        with InProcessGateway(data, port=port) as third:
            chat.wait_for("\n42\nLocal ")
            assert texts(third, "here")[1:] == ["echo $((6 * 7))"]
    finally:
        chat.type("/exit\n")
        assert chat.close() == 0


def test_what_is_typed_while_the_gateway_is_away_can_be_given_up(tmp_path, home):
    with InProcessGateway(home / ".moltis"):
        chat = Terminal("chat", home=home)
        chat.wait_for("Local · Shell › ")
    chat.type("echo never\n")
    chat.wait_for("waiting for the gateway")
    chat.process.send_signal(signal.SIGINT)
    chat.wait_for("given up")
    wait_for(lambda: chat.text.count("Local · Shell › ") == 2)
    chat.type("/exit\n")
    assert chat.close() == 0


def test_a_message_whose_answer_was_lost_runs_once(gateway, capsys):
    """The connection breaks after the gateway has the message."""
    feed = moltis.JobFeed(gateway.operator)
    session = gateway.call("sessions.list")[0]
    with feed:
        output = moltis.Output({})
        chat = moltis.ChatTerminal(feed, session, output, lambda _card: "deny")
        client = feed.client

        def loses_the_answer(method, params):
            answer = moltis.OperatorClient.call(client, method, params)
            if method == "chat.send":
                wait_for(lambda: feed._news, what="an event of the message")
                client.drop()
                raise moltis.Unreachable("the gateway hung up")
            return answer

        client.call = loses_the_answer
        assert chat.turn("echo $((6 * 7))") == moltis.EXIT_OK
    assert capsys.readouterr().out == "42\n"
    history = gateway.call("chat.history", sessionKey=session["key"])
    assert [m["role"] for m in history] == ["user", "command"]


# -- doctor --------------------------------------------------------------------


def findings(capsys, *words):
    """Return status and findings of `moltis doctor` here, by check."""
    status, out, _ = said(capsys, "doctor", "--json", *words)
    return status, {found["check"]: found for found in json.loads(out)}


def test_a_doctor_finds_a_gateway_well(gateway, capsys):
    status, found = findings(capsys)
    assert status == moltis.EXIT_OK
    assert {f["state"] for f in found.values()} <= {"well", "note"}
    assert found["gateway"]["words"].endswith("1 of 1 machines are connected")
    assert found["clock"]["words"] == "agrees with the gateway's"
    assert found["database"]["state"] == found["data directory"]["state"] == "well"
    assert "--bind 0.0.0.0" in found["from outside"]["advice"]
    status, out, _ = said(capsys, "doctor")
    assert re.search(r"(?m)^well   database        moltis.db is whole$", out)
    assert re.search(r"(?m)^ {23}→ moltis gateway --bind 0.0.0.0 lets others in$", out)


def test_a_doctor_without_a_gateway_says_how_to_start_one(home, capsys):
    status, found = findings(capsys)
    assert status == moltis.EXIT_OK
    assert "moltis gateway" in found["gateway"]["advice"]
    assert "does not exist yet" in found["data directory"]["words"]


def test_a_stopped_gateway_is_wrong_once(home, capsys):
    with InProcessGateway(home / ".moltis"):
        pass
    status, found = findings(capsys)
    assert status == moltis.EXIT_FAILURE
    assert [f["check"] for f in found.values() if f["state"] == "wrong"] == ["gateway"]


@pytest.mark.parametrize("module", ["ssl", "sqlite3"])
def test_a_doctor_names_a_module_that_python_lacks(home, tmp_path, module):
    with InProcessGateway(home / ".moltis") as gateway:
        words = f"import sys; sys.modules[{module!r}] = None; {moltis.IMPORT_AND_RUN}"
        done = subprocess.run(
            [sys.executable, "-S", "-c", words, str(ROOT), "doctor", "--json"],
            env=clean_environment(home, MOLTIS_GATEWAY_URL=gateway.url),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    found = [f for f in json.loads(done.stdout) if f["state"] != "well"]
    assert f"Python's module {module}" in found[0]["words"]
    assert "OpenWrt: python3-" in found[0]["advice"]
    assert found[0]["state"] == ("wrong" if module == "sqlite3" else "note")
    assert done.returncode == (module == "sqlite3")
    assert done.stderr == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("words", [["node", "remove"], ["gateway", "backup", "x"]])
def test_a_file_that_its_user_may_not_look_at_is_named(words):
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o755)
        data = Path(scratch) / "closed" / "data"
        data.parent.mkdir(0o700)
        program = Path(scratch) / "moltis.py"
        shutil.copy(PROGRAM, program)
        done = subprocess.run(
            ["/usr/bin/python3", str(program), *words],
            env=clean_environment("/nonexistent", MOLTIS_DATA_DIR=str(data)),
            preexec_fn=partial(os.setuid, 65534),
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.stderr.startswith(f"moltis: cannot use {data}/")
    assert done.stderr.endswith(": Permission denied\n")
    assert done.returncode == moltis.EXIT_CONFIGURATION


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_doctor_says_that_a_data_directory_is_of_root(mode):
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o755)
        data = Path(scratch) / "data"
        with InProcessGateway(data):
            pass
        data.chmod(mode)
        program = Path(scratch) / "moltis.py"
        shutil.copy(PROGRAM, program)
        done = subprocess.run(
            ["/usr/bin/python3", str(program), "doctor", "--json"],
            env=clean_environment("/nonexistent", MOLTIS_DATA_DIR=str(data)),
            preexec_fn=partial(os.setuid, 65534),
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.stderr == ""
    wrong = [f for f in json.loads(done.stdout) if f["state"] == "wrong"]
    assert f"{data} belongs to root" in wrong[0]["words"]
    assert f"chown -R nobody {data}" in wrong[0]["advice"]
    assert done.returncode == moltis.EXIT_FAILURE


@pytest.mark.parametrize(
    ("break_it", "check", "words", "advice"),
    [
        (lambda d: d.chmod(0o755), "data directory", "(755)", "chmod go= "),
        (
            lambda d: (d / "gateway.json").chmod(0o644),
            "data directory",
            "may read",
            "gateway.json",
        ),
        (
            lambda d: (d / "moltis.db").write_bytes(b"SQLite format 3\0" + b"x" * 9000),
            "database",
            "cannot use the database",
            "restore a backup",
        ),
        (lambda d: (d / "node.json").write_text("{"), "node", "node.json", ""),
        (lambda d: (d / "gateway.json").write_text("[]"), "gateway", "json", ""),
    ],
)
def test_a_doctor_says_what_is_wrong_in_a_data_directory(
    home, capsys, break_it, check, words, advice
):
    data = home / ".moltis"
    with InProcessGateway(data):
        pass
    for left in data.glob("moltis.db-*"):
        left.unlink()
    break_it(data)
    status, found = findings(capsys)
    assert status == moltis.EXIT_FAILURE
    assert found[check]["state"] == "wrong"
    assert words in found[check]["words"]
    assert advice in found[check]["advice"]


def test_a_data_directory_that_is_none_or_of_another_user_is_wrong(home, capsys):
    data = home / ".moltis"
    data.write_text("")
    status, found = findings(capsys)
    assert status == moltis.EXIT_FAILURE
    assert "is no directory" in found["data directory"]["words"]
    if os.geteuid() == 0:
        data.unlink()
        data.mkdir(mode=0o700)
        os.chown(data, 65534, -1)
        status, found = findings(capsys)
        assert status == moltis.EXIT_FAILURE
        assert "belongs to" in found["data directory"]["words"]


@pytest.mark.skipif(not SmallDisk.can_be_made(), reason="mounting takes root")
def test_a_full_disk_is_wrong(home, capsys):
    disk = SmallDisk(home / ".moltis")
    try:
        disk.fill()
        status, found = findings(capsys)
    finally:
        disk.close()
    assert status == moltis.EXIT_FAILURE
    assert "No space left" in found["data directory"]["words"]
    assert found["disk"]["state"] == "wrong"


def test_a_certificate_is_wrong_when_it_has_expired_or_is_another(
    tmp_path, monkeypatch
):
    files = moltis.ensure_certificate(tmp_path, ["localhost", "127.0.0.1"])
    tls = moltis.ServerTls(lambda: files)
    with InProcessGateway(tmp_path / "gateway", tls=tls) as gateway:

        def found(trust):
            (finding,) = moltis.check_tls("TLS", gateway.websocket_url, trust)
            return finding

        assert found(gateway.trust).state == "well"
        other = found(moltis.TlsTrust("sha256//" + "A" * 43 + "="))
        assert other.state == "wrong"
        assert gateway.trust.fingerprint in other.words
        now = moltis.time.time()
        monkeypatch.setattr(moltis.time, "time", lambda: now + 20 * 365 * 86400)
        expired = found(gateway.trust)
        monkeypatch.undo()
    assert expired.state == "wrong"
    assert "expired on 20" in expired.words


@pytest.mark.parametrize(
    ("off", "state", "words"),
    [(3570, "wrong", "59 min behind"), (-5, "note", "ahead of"), (0, "well", "agrees")],
)
def test_a_clock_that_is_off_is_said(off, state, words):  # off: of the gateway's, s
    def health(_request):
        at = moltis.now_ms() + off * 1000
        return 200, {}, [json.dumps({"status": "ok", "at": at}).encode()]

    with ScriptedServer(health) as server:
        (found,) = moltis.check_clock("clock", server.url, moltis.TlsTrust())
    assert found.state == state
    assert words in found.words


def test_what_is_no_gateway_is_said_to_be_none():
    with ScriptedServer(lambda _: (200, {}, [b"<html>"])) as server:
        found = [*moltis.check_way("", server.url, moltis.TlsTrust())]
    assert "is no gateway" in found[-1].words


def test_a_doctor_says_why_a_node_is_not_connected(home, capsys):
    data = home / ".moltis"
    moltis.NodeSettings("ws://127.0.0.1:1/ws", "mdt_x", "id-of-pi").save(data)
    status, found = findings(capsys)
    assert status == moltis.EXIT_FAILURE
    assert "it does not run" in found["node"]["words"]
    assert "node logs" in found["node"]["advice"]
    assert "gateway" not in found  # a node needs none of its own
    reason = "127.0.0.1:1 cannot be reached"
    moltis.NodeState(os.getpid(), False, 0.0, reason).save(data)
    assert reason in findings(capsys)[1]["node"]["words"]
    moltis.NodeState(os.getpid(), True, 0.0).save(data)
    assert findings(capsys)[1]["node"]["state"] == "well"


# -- who asked -----------------------------------------------------------------


def test_a_job_says_through_which_client_it_was_asked_for(gateway, home, capsys):
    run_moltis("node", "exec", "local", "--", "true 1", home=home)
    run_moltis("chat", "true 2", home=home)
    call = {"name": "exec", "arguments": {"command": "true 3", "node": "local"}}
    request = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}
    hello = {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "1"},
    }
    first = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": hello}
    lines = "".join(f"{json.dumps(line)}\n" for line in (first, request))
    run_moltis("mcp", home=home, stdin=lines)
    for path, body in (
        ("/mcp", {**request, "params": {**call, "arguments": {"command": "true 4"}}}),
        (
            "/api/rpc",
            {
                "method": "node.invoke",
                "params": {
                    "nodeId": "local",
                    "command": "system.run",
                    "args": {"command": "true 5"},
                },
            },
        ),
    ):
        asked = urllib.request.Request(
            f"{gateway.url}{path}",
            json.dumps(body).encode(),
            {
                "Authorization": f"Bearer {gateway.api_key}",
                "Content-Type": "application/json",
                "Accept": "application/json, text/event-stream",
            },
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            answer.read()
    kinds = {j["command"]: j["callerKind"] for j in gateway.call("job.list")}
    assert kinds == {
        "true 1": "shell",
        "true 2": "chat",
        "true 3": "MCP",
        "true 4": "MCP",
        "true 5": "API",
    }
    start(gateway, "true 6")
    _, out, _ = said(capsys, "node", "jobs")
    assert "owner (shell)" in out
    _, out, _ = said(capsys, "node", "jobs", "--json")
    assert {job["callerKind"] for job in json.loads(out)} >= {"shell", "chat"}


# -- gateways that answer nonsense ---------------------------------------------

ASKING = (  # subcommands that read what a gateway answers
    "node list --wide",
    "node revoke far",
    "node jobs",
    "node exec local -- true",
    "node exec local far -- true",
    "node exec --all -- true",
    "node exec --detach local -- true",
    "node attach 1234",
    "node recording 1234",
    "node generate-token",
    "node cp {home}/file far:{home}/copy",
    "node cp far:{home}/file {home}/copy",
    "key list",
    "key create --name other --scope read",
    "key revoke other",
    "model list",
    "model list --providers",
    "model add box --url http://127.0.0.1:9/v1",
    "audit",
    "audit --who nobody",
    "audit --json",
    "doctor",
    "chat hello",
)


@pytest.mark.parametrize("words", ASKING)
def test_an_answer_that_makes_no_sense_is_said_in_one_sentence(
    gateway, home, monkeypatch, capsys, words
):
    (home / "file").write_text("text")
    answers = (7, "x", [7], [{}], {"jobs": 7}, {"jobs": [{}]}, {"id": []})
    with monkeypatch.context() as nonsense:
        for answer in answers:
            nonsense.setattr(moltis.Rpc, "call", lambda *_, answer=answer: answer)
            status = moltis.main(words.format(home=home).split())
            printed = capsys.readouterr()
            said = [line for line in printed.err.splitlines() if line[:8] == "moltis: "]
            assert "Traceback" not in printed.err
            if words == "doctor":
                assert "wrong  gateway         the gateway's answer" in printed.out
            elif status:
                assert len(said) == 1, printed.err


def test_completion_offers_nothing_where_an_answer_makes_no_sense(
    gateway, monkeypatch, capsys
):
    with monkeypatch.context() as nonsense:
        for answer in (7, "x", [7], [{}], {"output": 7}):
            nonsense.setattr(moltis.Rpc, "call", lambda *_, answer=answer: answer)
            for words in ("node exec ", "node cp far:/e"):
                line = ["completion", "fish", "--", *words.split(" ")]
                assert moltis.main(line) == moltis.EXIT_FAILURE
                assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", [moltis.JOB_STATE, moltis.JOB_INPUT])
def test_an_event_that_makes_no_sense_is_said_in_one_sentence(
    gateway, home, monkeypatch, name
):
    encode = moltis.encode_envelope

    def encoded(envelope):
        if isinstance(envelope, moltis.Event) and envelope.name == name:
            envelope = moltis.Event(name, {})
        return encode(envelope)

    monkeypatch.setattr(moltis, "encode_envelope", encoded)
    words = ("node", "exec", "--stdin", "local", "--", "cat")
    done = run_moltis(*words, home=home, stdin=b"text")
    assert done.returncode == moltis.EXIT_FAILURE
    said = done.stderr
    assert said.startswith("moltis: the gateway's answer makes no sense here (line ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("jobs", [[], [{"id": "of another", "nodeName": "Pi"}]])
@pytest.mark.parametrize(
    "words", ["node exec local -- true", "node cp {0}/file local:{0}/copy"]
)
def test_an_answer_without_the_job_that_was_asked_for_ends_the_wait(
    gateway, home, monkeypatch, words, jobs
):
    (home / "file").write_text("text")
    call = moltis.Rpc.call

    def answer(rpc, caller, method, *rest):
        if method == moltis.JOB_START:
            return {"jobs": jobs}
        return call(rpc, caller, method, *rest)

    monkeypatch.setattr(moltis.Rpc, "call", answer)
    done = run_moltis(*words.format(home).split(), home=home)
    assert done.returncode == moltis.EXIT_FAILURE
    assert done.stderr.startswith("moltis: the gateway's answer makes no sense here")
    assert done.stderr.count("\n") == 1


def test_a_chat_does_not_wait_for_another_run_than_that_of_its_message(
    gateway, home, monkeypatch
):
    call = moltis.Rpc.call

    def answer(rpc, caller, method, *rest):
        found = call(rpc, caller, method, *rest)
        return {**found, "runId": "another"} if method == "chat.send" else found

    monkeypatch.setattr(moltis.Rpc, "call", answer)
    done = run_moltis("chat", "true", home=home)
    assert done.returncode == moltis.EXIT_FAILURE
    assert done.stderr.startswith("moltis: the gateway's answer makes no sense here")
    assert done.stderr.count("\n") == 1


def test_an_error_of_our_own_before_any_answer_is_not_the_gateways(
    gateway, monkeypatch, capsys
):
    def fail(*_):
        raise ValueError("ours")

    monkeypatch.setattr(moltis, "operator_trust", fail)
    with pytest.raises(ValueError, match="ours"):
        moltis.main(["node", "list"])


@pytest.mark.parametrize(
    ("variable", "words", "name", "other"),
    [
        ("MOLTIS_API_KEY", "node list", "the operator key", "mdt_"),
        (
            "MOLTIS_DEVICE_TOKEN",
            "node add --foreground --host ws://h",
            "the device token",
            "mk_",
        ),
    ],
)
def test_what_can_be_no_such_secret_is_refused_in_one_sentence(
    gateway, home, variable, words, name, other
):
    for given, said in (
        (os.fsdecode(b"x\xff"), f"{name} has characters that none has"),
        (other + "x" * 43, f"{other}… is the "),
    ):
        done = run_moltis(*words.split(), home=home, **{variable: given})
        assert done.returncode == moltis.EXIT_USAGE
        assert done.stderr.startswith(f"moltis: {said}")
        assert done.stderr.count("\n") == 1


def test_a_value_however_long_does_not_hide_what_is_wrong_with_it(capsys):
    status, _, err = said(capsys, "gateway", "--port", "x" * 100_000)
    assert status == moltis.EXIT_USAGE
    assert err.startswith("moltis: --port takes a number")
    assert len(err) < 5000


def test_an_audit_whose_pages_repeat_ends(gateway, home, monkeypatch):
    row = {"at": 1.0, "event": "job.start"}
    monkeypatch.setattr(moltis.Rpc, "call", lambda *_: [row])
    done = run_moltis("audit", "--json", home=home)
    assert done.returncode == moltis.EXIT_FAILURE
    assert done.stderr.startswith("moltis: the gateway's answer makes no sense here")


def test_a_prompt_is_shown_where_the_gateway_refuses_to_list_sessions(
    gateway, monkeypatch
):
    answer, refuses = moltis.Rpc.call, threading.Event()

    def call(*arguments):
        if refuses.is_set():
            raise moltis.RpcError("RATE_LIMITED", "too many requests")
        return answer(*arguments)

    monkeypatch.setattr(moltis.Rpc, "call", call)
    output = moltis.Output({})
    with moltis.JobFeed(gateway.operator) as feed:
        session = moltis.chosen_session(feed, "main", output)
        chat = moltis.ChatTerminal(feed, session, output, None)
        shown = chat.look()
        refuses.set()
        assert chat.look() == shown


# -- leaving -------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_chat_that_a_signal_ends_says_that_its_command_goes_on(gateway, home, number):
    with Program("chat", "echo begun; sleep 120", home=home) as chat:
        chat.wait_for_output("begun")
        assert chat.end(number) == 128 + number
        assert "the answer goes on in the session main; `moltis node" in chat.stderr
    [job] = gateway.call("job.list", state="running")
    gateway.call("job.cancel", id=job["id"])
