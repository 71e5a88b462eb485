"""A process puts right what its parent left, for itself and for commands."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from support import Program, clean_environment, run_moltis, wait_for

import moltis

PARENT = """
import os, resource, signal, sys
os.umask(0o027)
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
for name in "CHLD HUP INT QUIT USR1 USR2 ALRM PIPE TSTP TTOU".split():
    signal.signal(getattr(signal, "SIG" + name), signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGTERM])
os.dup2(os.open("/dev/null", os.O_RDONLY), 77)
os.execve(sys.executable, [sys.executable, "-u", *sys.argv[1:]], os.environ)
"""
SECRETS = {"OPENAI_API_KEY": "sk-of-openai", "MOLTIS_API_KEY": "mk_of_an_operator"}
TEXT = [str(moltis.__file__)]  # restarts itself from bytecode
IMPORTED = ["-IS", "-c", moltis.IMPORT_AND_RUN, str(Path(moltis.__file__).parent)]
TABLE = {  # what a command asks: what it gets
    "umask": "0027",
    "ulimit -S -n": "1000",
    "test -e /dev/fd/77 || echo sealed": "sealed",
    "grep -E 'Sig(Blk|Ign):' /proc/self/status | tr -d '0\\n\\t'": "SigBlk:SigIgn:",
    "false; echo $?": "1",
    "env | grep -c -e ^MOLTIS_ -e API_KEY": "0",
    "cat /proc/$PPID/environ | grep -c -a -e sk-of -e mk_of": "0",
    "cat /proc/$PPID/cmdline | grep -c -a -e mdt_of": "0",
    "printf é | od -An -tx1 | tr -d ' '": "c3a9",
    "head -c1": "",
    'test "$(ps -o sid= -p $$)" -eq $$ && echo leads': "leads",
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("program", [TEXT, IMPORTED], ids=["text", "imported"])
@pytest.mark.parametrize("demo", [False, True], ids=["Local", "node"])
def test_a_command_gets_what_its_table_says_whatever_started_the_node(
    home, program, demo
):
    options = ["--demo-node"] if demo else []
    words = [*program, "gateway", "--port", "0", *options]
    with Program(PARENT, *words, program="-c", home=home, **SECRETS) as gateway:
        gateway.wait_for_output("Ctrl+C stops it")
        node = "Demo node" if demo else "local"
        if demo:
            listed = partial(run_moltis, "node", "list", home=home)
            wait_for(lambda: "Demo node" in listed().stdout)
        script = "; echo; ".join(f'printf %s "$({question})"' for question in TABLE)
        done = run_moltis("node", "exec", node, "--", script, home=home)
        # posix_spawn() of glibc leaves signals 32 and 33, its own, or one ignored.
        answers = re.sub("SigIgn:(18|8)\n", "SigIgn:\n", done.stdout).split("\n")
        assert dict(zip(TABLE, answers)) == TABLE, done.stderr
        failed = run_moltis("node", "exec", node, "--", "false", home=home)
        assert failed.returncode == 1
        os.kill(gateway.pid, signal.SIGHUP)  # as nohup has it ignored
        assert run_moltis("node", "exec", node, "--", "true", home=home).returncode == 0
        private = os.stat(home / ".moltis" / moltis.STORE_FILE)
        assert private.st_mode & 0o777 == 0o600


def look_at_itself(code, *arguments, **environ):
    """Return what /proc shows of a process after it ran `code`."""
    program = (
        f"import sys; sys.path.insert(0, {str(Path(moltis.__file__).parent)!r}); "
        f"import moltis, os; {code}; environ = moltis.take_environment(); "
        "print(open('/proc/self/cmdline').read(), open('/proc/self/environ').read()); "
        "print('kept', environ['OPENAI_API_KEY'], 'OPENAI_API_KEY' in os.environ)"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "OPENAI_API_KEY": "sk-of-openai", **environ},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_token_among_the_arguments_is_not_shown_to_others():
    shown = look_at_itself("pass", "--token", "mdt_0123456789abcdef", OTHER="sk-of-o")
    assert "mdt_****" in shown or "****************" in shown
    assert "0123456789abcdef" not in shown
    assert "OTHER=sk-of-o\0" in shown  # only what is ours
    assert shown.count("sk-of-openai") == 1
    assert "kept sk-of-openai False" in shown


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_where_there_is_no_proc_the_c_library_knows_where_the_secrets_are():
    """macOS: `ps -E` shows them."""
    shown = look_at_itself("moltis._wipe_in_proc = lambda: open('/nowhere')")
    assert shown.count("sk-of-openai") == 1
    assert "kept sk-of-openai False" in shown


def can_unshare():
    probe = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    return (
        shutil.which("unshare") and subprocess.run(probe, check=False).returncode == 0
    )


@pytest.mark.skipif(not can_unshare(), reason="needs a process namespace")
def test_process_1_of_a_container_reaps_orphans_and_nobody_elses_status(home):
    container = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    words = [sys.executable, str(moltis.__file__), "gateway", "--port", "0"]
    ask = partial(run_moltis, "node", "exec", "local", "--", home=home)
    with (home / "log").open("wb") as log:
        gateway = subprocess.Popen(
            [*container, *words],
            env=clean_environment(home),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        wait_for(lambda: "Ctrl+C" in (home / "log").read_text())
        for status in (0, 1, 7):
            orphans = "for i in 1 2 3 4 5; do (setsid true &); done; sleep 0.1"
            assert ask(f"{orphans}; exit {status}").returncode == status
        zombies = "ps -A -o stat=,comm= | grep -c '^Z'; true"
        wait_for(lambda: ask(zombies).stdout.strip() == "0")
        ask("kill -TERM 1")
        assert gateway.wait(60) == 0
        assert "stopping" in (home / "log").read_text()
    finally:
        gateway.kill()
        gateway.wait()


LEAVING = """if True:
    import select, sys, threading, time
    sys.path.insert(0, sys.argv.pop(1))
    import moltis

    def run(*_):
        write = threading.Thread(target=sys.stderr.write, args=["x" * 2**20])
        write.daemon = True
        write.start()
        while select.select([], [sys.stderr], [], 0)[1]:
            time.sleep(0.01)
        sys.stdout.write("the answer")
        return 7

    moltis.run_subcommand = run
    sys.exit(moltis.main())
"""


def test_a_thread_that_is_inside_a_write_does_not_hold_up_the_end(home):
    words = [sys.executable, "-c", LEAVING, str(Path(moltis.__file__).parent)]
    process = subprocess.Popen(
        [*words, "node", "list"],
        env=clean_environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,  # nothing reads it: the thread waits in its write()
    )
    try:
        assert process.wait(60) == 7
        assert process.stdout.read() == b"the answer"
    finally:
        process.kill()
        process.communicate()
