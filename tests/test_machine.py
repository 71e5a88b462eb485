"""What one computer does when it is asked, whoever asks."""

from __future__ import annotations

import shutil
import subprocess
import threading
import uuid

import pytest
from support import process_exists, wait_for

import moltis


class RecordingPeer:
    """A MachinePeer that writes down what it is told."""

    def __init__(self, max_result=None):
        self.max_result = max_result
        self.chunks = []
        self.stdin = []
        self.places = []
        self.results = {}

    def chunk(self, chunk):
        self.chunks.append(chunk)

    def stdin_received(self, invoke_id, offset):
        self.stdin.append(offset)

    def queued(self, invoke_id, place):
        self.places.append((invoke_id, place))

    def result(self, invoke_id, result):
        self.results.setdefault(invoke_id, []).append(result)

    def output(self, kind=moltis.STDOUT):
        return b"".join(chunk.data for chunk in self.chunks if chunk.kind == kind)

    def wait(self, invoke_id):
        wait_for(lambda: invoke_id in self.results, what="the result")
        return self.results[invoke_id][-1]


ENVIRON = {"PATH": "/usr/bin:/bin", "HOME": "/tmp"}


@pytest.fixture
def machine(tmp_path):
    inventory = moltis.Inventory(ENVIRON)
    runner = moltis.CommandRunner(
        environ=ENVIRON, working_dir=str(tmp_path), max_timeout=None, limit=2
    )
    machine = moltis.Machine(runner, inventory)
    yield machine
    machine.close()
    inventory.close()


@pytest.fixture
def peer(machine):
    peer = RecordingPeer()
    machine.attach(peer)
    return peer


def run(machine, command, invoke_id=None, **args):
    invoke_id = invoke_id or str(uuid.uuid4())
    machine.invoke(invoke_id, "system.run", {"command": command, **args})
    return invoke_id


def test_a_streamed_command_sends_chunks_then_its_result(machine, peer):
    result = peer.wait(run(machine, "echo out; echo err >&2; exit 5", stream=True))
    assert peer.output(moltis.STDOUT) == b"out\n"
    assert peer.output(moltis.STDERR) == b"err\n"
    assert result["exitCode"] == 5
    assert (result["stdoutBytes"], result["stderrBytes"]) == (4, 4)
    assert "stdout" not in result


def test_a_collected_command_has_its_output_in_the_result(machine, peer):
    result = peer.wait(run(machine, "echo out; echo err >&2"))
    assert (result["stdout"], result["stderr"]) == ("out\n", "err\n")
    assert peer.chunks == []


def test_what_is_no_text_is_replaced_in_a_collected_result(machine, peer):
    assert peer.wait(run(machine, "printf 'a\\377b'"))["stdout"] == "a\ufffdb"


def test_collected_output_is_bounded_and_says_what_was_cut(machine, peer):
    result = peer.wait(run(machine, "head -c 1000000 /dev/zero | tr '\\0' x"))
    assert len(result["stdout"]) < 210_000
    assert "bytes cut" in result["stdout"]
    assert result["stdoutBytes"] == 1_000_000


def test_a_result_fits_what_the_gateway_takes(machine):
    peer = RecordingPeer(max_result=50_000)
    machine.attach(peer)
    result = peer.wait(run(machine, "head -c 100000 /dev/zero"))
    assert len(moltis.to_json(result).encode()) <= 50_000
    assert result["exitCode"] == 0


def test_an_error_that_does_not_fit_is_replaced_by_one_that_does():
    assert moltis.fit_result({"error": "x" * 1000}, 100) == {
        "error": "the result is too large for this gateway"
    }


def test_a_stream_is_named_by_a_uuid(machine, peer):
    result = peer.wait(run(machine, "true", invoke_id="not-a-uuid", stream=True))
    assert "must be a UUID" in result["error"]


def test_one_that_was_asked_twice_runs_once(machine, peer, tmp_path):
    invoke_id = str(uuid.uuid4())
    for _ in range(2):
        run(machine, "echo once >> runs", invoke_id, stream=True)
        peer.wait(invoke_id)
    wait_for(lambda: len(peer.results[invoke_id]) == 2, what="both answers")
    assert peer.results[invoke_id][0] == peer.results[invoke_id][1]
    assert (tmp_path / "runs").read_text() == "once\n"


def test_one_that_is_asked_twice_while_it_runs_runs_once(machine, peer, tmp_path):
    invoke_id = str(uuid.uuid4())
    line = "echo once >> runs; while [ ! -e gate ]; do sleep 0.02; done"
    for _ in range(2):
        run(machine, line, invoke_id, stream=True)
    (tmp_path / "gate").touch()
    peer.wait(invoke_id)
    assert (tmp_path / "runs").read_text() == "once\n"


def test_a_settled_invocation_is_forgotten_but_does_not_run_again(machine, peer):
    invoke_id = run(machine, "true", stream=True)
    peer.wait(invoke_id)
    machine.settle(invoke_id)
    assert machine.inflight() == []
    run(machine, "true", invoke_id, stream=True)
    assert "run already" in peer.wait(invoke_id)["error"]


def test_input_is_fed_and_its_consumption_told(machine, peer):
    invoke_id = run(machine, "cat", stream=True, stdin=True)
    for offset, data in ((0, b"ab"), (2, b"cd"), (4, b"")):
        machine.write_stdin(moltis.Chunk(moltis.STDIN, invoke_id, offset, data))
    assert peer.wait(invoke_id)["exitCode"] == 0
    assert peer.output() == b"abcd"


def test_cancel_ends_it_and_says_so(machine, peer, tmp_path):
    invoke_id = run(machine, "echo $$ > pid; sleep 1000", stream=True)
    path = tmp_path / "pid"
    wait_for(lambda: path.exists() and path.read_text().strip(), what="its start")
    machine.cancel(invoke_id)
    assert peer.wait(invoke_id)["cancelled"] is True
    assert not process_exists(int(path.read_text()))


def test_those_beyond_the_limit_wait_in_line_and_say_so(machine, peer, tmp_path):
    line = "while [ ! -e gate ]; do sleep 0.02; done"
    ids = [run(machine, line, stream=True) for _ in range(4)]
    wait_for(lambda: len(peer.places) == 2, what="places in line")
    assert peer.places == [(ids[2], 1), (ids[3], 2)]
    (tmp_path / "gate").touch()
    for invoke_id in ids:
        assert peer.wait(invoke_id)["exitCode"] == 0
    assert {(ids[2], 0), (ids[3], 0)} <= set(peer.places)


def test_a_result_waits_for_somebody_to_tell(machine):
    """Nobody is attached while it runs; all of it is told to who comes."""
    invoke_id = run(machine, "echo kept; exit 7", stream=True)
    wait_for(lambda: machine.inflight() and machine.inflight()[0].done, what="the end")
    peer = RecordingPeer()
    machine.attach(peer)
    machine.resume(invoke_id, 0, 0)
    assert peer.wait(invoke_id)["exitCode"] == 7
    assert peer.output() == b"kept\n"


def test_answers_of_lent_models_cost_no_command_its_result(tmp_path, monkeypatch):
    monkeypatch.setattr(moltis, "MAX_KEPT", 2)
    inventory = moltis.Inventory(ENVIRON)
    runner = moltis.CommandRunner(environ=ENVIRON, working_dir=str(tmp_path))
    lender = moltis.ModelLender(moltis.ModelCatalog([]))
    machine, peer = moltis.Machine(runner, inventory, lender), RecordingPeer()
    machine.attach(peer)
    ids = [run(machine, f"exit {code}", stream=True) for code in (3, 4)]
    for invoke_id in ids:
        peer.wait(invoke_id)
    lent = str(uuid.uuid4())
    machine.invoke(lent, "llm.models", {})
    peer.wait(lent)
    again = RecordingPeer()
    machine.attach(again)
    for invoke_id in ids:
        machine.resume(invoke_id, 0, 0)
    assert [again.wait(invoke_id)["exitCode"] for invoke_id in ids] == [3, 4]
    machine.close()
    inventory.close()


def test_resuming_sends_only_what_followed_the_offset(machine, peer):
    invoke_id = run(machine, "printf abcdef", stream=True)
    peer.wait(invoke_id)
    other = RecordingPeer()
    machine.attach(other)
    machine.resume(invoke_id, 4, 0)
    other.wait(invoke_id)
    assert other.output() == b"ef"


def test_an_acknowledgement_beyond_what_was_sent_is_refused(machine, peer):
    invoke_id = run(machine, "printf abc", stream=True)
    peer.wait(invoke_id)
    with pytest.raises(moltis.RpcError):
        machine.acknowledge(invoke_id, moltis.STDOUT, 4)
    machine.acknowledge("unknown", moltis.STDOUT, 4)


def test_closing_ends_commands_and_their_results_are_told(machine, peer):
    ids = [run(machine, "sleep 1000", stream=True) for _ in range(3)]
    closer = threading.Thread(target=machine.close)
    closer.start()
    for invoke_id in ids:
        assert peer.wait(invoke_id)["cancelled"] is True
    closer.join()
    assert "shutting down" in peer.wait(run(machine, "true", stream=True))["error"]


@pytest.mark.parametrize(
    ("timeout", "ok"),
    [(1, True), (0.5, True), (0, False), (-5, False), (2**53 + 2, False)],
)
def test_a_timeout_is_a_positive_number_of_ms(timeout, ok):
    args = {"command": "true", "timeout": timeout}
    if ok:
        assert moltis.run_arguments(args).timeout == timeout / 1000
    else:
        with pytest.raises(moltis.RpcError, match="timeout must be a positive"):
            moltis.run_arguments(args)


def test_the_platform_has_moltis_name(monkeypatch):
    names = {"linux": "linux", "darwin": "macos", "freebsd14": "freebsd"}
    for ours, theirs in names.items():
        monkeypatch.setattr(moltis.sys, "platform", ours)
        assert moltis.platform_name() == theirs


# -- the owner's own guard -------------------------------------------------------------


def is_allowed(command, *patterns):
    try:
        moltis.AllowedCommands(patterns).check(command)
    except moltis.RpcError as error:
        assert error.code == "FORBIDDEN"
        return False
    return True


@pytest.mark.parametrize(
    ("pattern", "command"),
    [
        ("uptime", "uptime"),
        ("systemctl status *", "systemctl status nginx"),
        ("systemctl status *", "systemctl status "),
        ("*", "anything at all"),
        ("ls ?", "ls x"),
        ("ls [a-c]*", "ls banana"),
        ("ls [!a-c]*", "ls $HOME"),
        ("echo [*]", "echo *"),
        ("a*b*c", "a b b c c"),
        ("* | tail -1", "df -h / | tail -1"),
        ("echo $(date) *", "echo $(date) now"),
        ("make -j? 2>&1", "make -j4 2>&1"),
        ("one; two", "one; two"),
        ("echo ${HOME} *", "echo ${HOME} $USER x$"),
    ],
)
def test_what_the_owner_allows_may_run(pattern, command):
    assert is_allowed(command, "nothing else", pattern)


@pytest.mark.parametrize(
    ("pattern", "command"),
    [
        ("uptime", "uptime -p"),
        ("uptime", " uptime"),
        ("uptime", "Uptime"),
        ("ls ?", "ls xx"),
        ("systemctl status *", "systemctl status; reboot"),
        ("systemctl status *", "systemctl status x; reboot"),
        ("systemctl status *", "systemctl status x && reboot"),
        ("systemctl status *", "systemctl status x & reboot"),
        ("systemctl status *", "systemctl status x | sh"),
        ("systemctl status *", "systemctl status `reboot`"),
        ("systemctl status *", "systemctl status $(reboot)"),
        ("systemctl status *", "systemctl status x\nreboot"),
        ("systemctl status *", "systemctl status x\rreboot"),
        ("systemctl status *", "systemctl status x > /etc/passwd"),
        ("systemctl status *", "systemctl status < /etc/shadow"),
        ("*", "a;b"),
        ("ls ?", "ls ;"),
        ("ls [!a]", "ls ;"),
        ("* | tail -1", "a | b | tail -1"),
        ("one; *", "one; two; three"),
        # Neither half of `$(` may come from a wildcard.
        ("echo $*", "echo $(reboot)"),
        ("echo *(x)", "echo $(x)"),
        ("echo ?(x)", "echo $(x)"),
        # bash calculates in these, and runs what it finds in an index.
        ("df *", "df ${y:=a['$''(reboot)']} ${x[y]}"),
        ("df *", "df ${HOME:LC_X}"),
        ("df *", "df $[LC_X]"),
        ("echo $*", "echo ${HOME:LC_X}"),
        ("echo *{x}", "echo ${x}"),
        ("printf *", "printf -v a['$''(reboot)'] x"),
        ("", "x"),
    ],
)
def test_what_the_owner_does_not_spell_may_not_run(pattern, command):
    assert not is_allowed(command, pattern)


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
def test_what_bash_would_run_while_it_calculates_is_not_allowed(tmp_path):
    """Where /bin/sh is bash, each of these makes a file, without one of `;&|`$(`."""
    shell = tmp_path / "sh"
    shell.symlink_to(shutil.which("bash"))
    index = f"a['$''(touch {tmp_path}/ran)']"
    for line in (f"echo ${{y:={index}}} ${{x[y]}}", f"printf -v {index} x"):
        subprocess.run([str(shell), "-c", line], check=False, capture_output=True)
        assert (tmp_path / "ran").exists()
        (tmp_path / "ran").unlink()
        assert not is_allowed(line, "echo *", "printf *")


def test_a_hostile_line_cannot_make_the_guard_think_for_long():
    assert not is_allowed("a" * 2000 + "!", "*a" * 30 + "b")


def test_a_guarded_machine_says_no_and_runs_nothing(machine, tmp_path):
    peer = RecordingPeer()
    inventory = moltis.Inventory(ENVIRON)
    runner = moltis.CommandRunner(environ=ENVIRON, working_dir=str(tmp_path))
    allowed = moltis.AllowedCommands(["echo *"])
    guarded = moltis.Machine(runner, inventory, allowed=allowed)
    guarded.attach(peer)
    try:
        for stream in (False, True):
            refused = run(guarded, f"touch {tmp_path}/ran", stream=stream)
            assert "does not allow" in peer.wait(refused)["error"]
        assert peer.wait(run(guarded, "echo yes"))["stdout"] == "yes\n"
    finally:
        guarded.close()
        inventory.close()
    assert not (tmp_path / "ran").exists()


def test_what_is_in_line_comes_last_of_what_is_in_flight(machine, peer):
    """So that a list that has to be cut loses nothing that has output."""
    ids = [str(uuid.uuid4()) for _ in range(4)]
    machine.invoke(ids[0], "system.run", {"command": "true", "stream": True})
    peer.wait(ids[0])
    for invoke_id in ids[1:]:
        machine.invoke(invoke_id, "system.run", {"command": "sleep 30", "stream": True})
    assert [item.invoke_id for item in machine.inflight()] == ids
    wait_for(
        lambda: [told[0] for told in peer.places][-1:] == ids[3:],
        what="a place in line",
    )
