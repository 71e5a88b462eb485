"""install.sh under the shells that people have, `moltis install`, and the restart."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import (
    PROGRAM,
    ROOT,
    Program,
    ScriptedServer,
    clean_environment,
    memory_of,
    run_moltis,
    trickling_server,
    wait_for,
)

import moltis

SCRIPT = ROOT / "install.sh"
SHELLS = {"dash": ["dash"], "busybox sh": ["busybox", "sh"], "bash": ["bash"]}

# Stands in for moltis.py: it prints where it lies, how it was started, and with what.
STAND_IN = '''#!/usr/bin/env python3
"""moltis: a stand-in."""
import os, sys
__version__ = "9.8.7"

def main():
    print(__name__, os.path.dirname(__file__), sys.argv[1:])
    return len(sys.argv) - 1


if __name__ == "__main__":
    sys.exit(main())
'''

# What install.sh needs besides a shell and Python; no curl and no wget.
TOOLS = ("dirname", "mktemp", "rm", "sed", "uname")


@pytest.fixture(params=SHELLS)
def shell(request):
    command = SHELLS[request.param]
    if not shutil.which(command[0]):
        pytest.skip(f"no {command[0]} here")
    return [shutil.which(command[0]), *command[1:]]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source" / "program.py"
    path.parent.mkdir()
    path.write_text(STAND_IN)
    return path


@pytest.fixture
def path_of(tmp_path):
    """Make a PATH with the basic tools and those named."""

    def make(*names, python=True):
        directory = tmp_path / "bin"
        directory.mkdir(exist_ok=True)
        for name in (*TOOLS, *names):
            (directory / name).symlink_to(shutil.which(name))
        if python:
            (directory / "python3").symlink_to(sys.executable)
        return directory

    return make


def run_script(shell, home, *arguments, script=SCRIPT, stdin=None, **environment):
    return subprocess.run(
        [*shell, *([str(script)] if script else ["-s", "--"]), *map(str, arguments)],
        input=stdin,
        check=False,
        capture_output=True,
        text=True,
        cwd=str(home),
        env=clean_environment(home, **environment),
    )


# -- install.sh ----------------------------------------------------------------------


def test_the_script_runs_the_program_that_it_was_given(shell, home, source):
    done = run_script(
        shell,
        home,
        *("--prefix", "a b", "--from", source, "--uninstall"),
        *("--", "x", "--from", "y"),
    )
    words = ["install", "--prefix", "a b", "--uninstall", "--", "x", "--from", "y"]
    assert done.stdout == f"__main__ {source.parent} {words}\n"
    assert done.returncode == len(words)


def test_beside_the_script_is_where_the_program_is(shell, home, source):
    script = source.parent / "install.sh"
    shutil.copy(SCRIPT, script)
    source.rename(source.parent / "moltis.py")
    done = run_script(shell, home, script=script)
    assert done.stdout == f"__main__ {source.parent} ['install']\n"


@pytest.mark.parametrize("tool", ["curl", "wget", None])
def test_a_gateways_address_is_enough(shell, home, path_of, tool):
    """From a pipe, with curl, wget or neither."""
    if tool and not shutil.which(tool):
        pytest.skip(f"no {tool} here")
    path = path_of(*([tool] if tool else []))
    with ScriptedServer(lambda request: (200, {}, [STAND_IN.encode()])) as server:
        done = run_script(
            shell,
            home,
            *("--from", server.url),
            script=None,
            stdin=SCRIPT.read_text(),
            PATH=str(path),
            TMPDIR=str(home),
        )
    assert done.returncode == 1, done.stderr  # words after the program
    assert [request[1] for request in server.requests] == ["/moltis.py"]
    assert "['install']" in done.stdout
    assert not list(home.iterdir())


@pytest.mark.parametrize("given", ["/", "/moltis", "/moltis/moltis.py"])
def test_a_gateway_may_lie_behind_a_path(home, given):
    with ScriptedServer(lambda request: (200, {}, [STAND_IN.encode()])) as server:
        run_script(["sh"], home, "--from", server.url + given)
    expected = "/moltis.py" if given == "/" else "/moltis/moltis.py"
    assert [request[1] for request in server.requests] == [expected]


def test_from_a_pipe_nothing_is_taken_from_the_working_directory(shell, home):
    (home / "moltis.py").write_text(STAND_IN)
    done = run_script(shell, home, script=None, stdin=SCRIPT.read_text())
    assert done.returncode == 1
    assert "no moltis.py here; say --from http://GATEWAY:9090" in done.stderr


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    ids=["absent", "a page", "empty", "cut", "another"],
    argvalues=[
        (404, b"not found", "cannot download"),
        (200, b"<html>please sign in</html>", "is not moltis.py"),
        (200, b"", "is not moltis.py"),
        (200, STAND_IN.encode().partition(b"if __name__")[0], "not all of it"),
        (200, b"import os\n\n\nsys.exit(main())\n", "is not moltis.py"),
    ],
)
def test_what_is_not_moltis_is_refused(shell, home, status, body, reason):
    with ScriptedServer(lambda request: (status, {}, [body])) as server:
        done = run_script(shell, home, "--from", f"{server.url}/moltis.py")
    assert done.returncode == 1
    assert reason in done.stderr
    assert server.url in done.stderr
    assert not list(home.iterdir())


@pytest.mark.parametrize("tool", ["curl", "wget", None])
def test_a_gateway_that_is_offline_is_named(shell, home, path_of, tool):
    path = path_of(*([tool] if tool and shutil.which(tool) else []))
    done = run_script(shell, home, "--from", "http://127.0.0.1:9", PATH=str(path))
    assert done.returncode == 1
    assert "cannot download http://127.0.0.1:9/moltis.py" in done.stderr


@pytest.mark.parametrize("given", [["--from"], ["--from="], ["--from", "/nowhere"]])
def test_a_program_that_is_not_there_is_named(shell, home, given):
    done = run_script(shell, home, *given)
    assert done.returncode == 1
    assert f"there is no {given[-1].strip('-from=') or 'moltis.py'}" in done.stderr


def fake_python(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.skipif(
    os.path.exists("/usr/libexec/platform-python"), reason="has a platform-python"
)
def test_without_a_complete_python_it_asks_for_one(shell, home, source, path_of):
    path = path_of(python=False)
    assert "python3" not in os.listdir(path)
    for script in (None, "exit 1"):  # none; too old, broken, or without zlib
        if script:
            fake_python(path / "python3", script)
        done = run_script(shell, home, "--from", source, PATH=str(path))
        assert done.returncode == 1
        assert "no complete Python 3.8 or later here; install" in done.stderr


@pytest.mark.parametrize("name", ["python3.12", "python3.8", "platform-python"])
def test_a_python_of_another_name_will_do(shell, home, source, path_of, name):
    path = path_of(python=False)
    fake_python(path / "python3", "exit 1")
    (path / name).symlink_to(sys.executable)
    done = run_script(shell, home, "--from", source, PATH=str(path))
    assert "['install']" in done.stdout


@pytest.mark.parametrize("tool", ["curl", "wget", None])
def test_a_download_that_trickles_is_given_up(home, path_of, tool):
    if tool and not shutil.which(tool):
        pytest.skip(f"no {tool} here")
    path = path_of(*([tool] if tool else []))
    script = SCRIPT.read_text()
    assert script.count("alarm(600)") == 1
    with trickling_server("HTTP/1.1 200 OK\r\n\r\n", "x") as url:
        done = run_script(
            *([shutil.which("sh")], home, "--from", url),
            script=None,
            stdin=script.replace("alarm(600)", "setitimer(signal.ITIMER_REAL, 0.5)"),
            PATH=str(path),
            TMPDIR=str(home),
        )
    assert done.returncode == 1
    assert f"cannot download {url}/moltis.py" in done.stderr
    assert not list(home.iterdir())


def test_moltis_install_gives_up_a_download_that_trickles(home, monkeypatch):
    monkeypatch.setattr(moltis, "DOWNLOAD_LIMIT", 0.4)
    with trickling_server("HTTP/1.1 200 OK\r\n\r\n", "x") as url, pytest.raises(
        moltis.Unreachable, match="did not finish its answer"
    ):
        moltis.chosen_program(url)


def test_a_download_that_stops_halfway_does_nothing(home, source):
    """All is in functions, and the last line calls one of them."""
    lines = SCRIPT.read_text().splitlines(keepends=True)
    assert lines[-1] == 'main "$@"\n'
    done = run_script(
        ["sh"], home, "--from", source, script=None, stdin="".join(lines[:-1])
    )
    assert done.stdout == done.stderr == ""
    assert not list(home.iterdir())


@pytest.mark.parametrize("tool", ["shellcheck", "checkbashisms"])
def test_it_is_portable_shell(tool):
    if not shutil.which(tool):
        pytest.skip(f"no {tool} here")
    for script in (SCRIPT, ROOT / "tests" / "run", ROOT / ".ci" / "run"):
        done = subprocess.run([tool, str(script)], check=False, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_gateway_hands_out_the_script_of_the_repository():
    assert (ROOT / "install.sh").read_text(encoding="utf-8") == moltis.INSTALL_SH


# -- the program's copy --------------------------------------------------------------


def test_the_copy_is_private_and_compiled(home):
    path = moltis.install_program(home / ".moltis", STAND_IN.encode())
    assert path == home / ".moltis" / "moltis.py"
    assert path.read_bytes() == STAND_IN.encode()
    assert path.stat().st_mode & 0o777 == 0o600
    assert list((home / ".moltis" / "__pycache__").glob("moltis.*.pyc"))


def test_a_newer_copy_of_the_same_size_replaces_the_compiled_form_too(home):
    for number in range(3):
        moltis.install_program(
            home / ".moltis", b"def main():\n    print(%d)\n" % number
        )
        command = [sys.executable, "-c", moltis.IMPORT_AND_RUN, str(home / ".moltis")]
        assert subprocess.check_output(command) == b"%d\n" % number


def test_a_text_that_is_no_program_is_not_installed_in_silence(home):
    with pytest.raises(moltis.BadConfiguration, match="cannot compile"):
        moltis.install_program(home / ".moltis", b"<html>not found</html>")


def test_the_program_knows_its_own_text():
    assert moltis.own_program() == Path(moltis.__file__).read_bytes()


def test_what_a_gateway_serves_must_be_a_whole_moltis():
    text = moltis.own_program()
    moltis.check_program(text, "URL")
    moltis.check_program(text.replace(b'__version__ = "', b'__version__ = "10'), "URL")
    half = text[: text.index(b"\n# Node service")]
    for wrong in (b"", b"<html></html>", half):
        with pytest.raises(moltis.BadConfiguration, match=r"URL is not moltis\.py"):
            moltis.check_program(wrong, "URL")


def test_what_a_gateway_serves_must_not_be_older():
    text = moltis.own_program().replace(
        b'__version__ = "%s"' % moltis.__version__.encode(), b'__version__ = "0.0.9"'
    )
    with pytest.raises(moltis.BadConfiguration, match=r"0\.0\.9, older"):
        moltis.check_program(text, "URL")


def test_the_service_runs_on_the_interpreter_beneath_a_virtual_environment():
    base = subprocess.check_output(
        [moltis.lasting_python(), "-c", "import sys; print(sys.prefix)"], text=True
    )
    assert base.strip() == sys.base_prefix


# -- moltis install ------------------------------------------------------------------


def install(prefix, text=STAND_IN, python=sys.executable, path="/usr/bin:/bin"):
    place = moltis.Installation(Path(prefix))
    return place, place.install(text.encode(), str(python), {"PATH": path})


def launch(launcher, *arguments, **options):
    return subprocess.run(
        [str(launcher), *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
        **options,
    )


def files_below(directory):
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*.*"))


def test_install_sh_installs_runs_and_removes_the_program(shell, home):
    done = run_script(shell, home, "--", "--version")
    launcher = home / ".local" / "bin" / "moltis"
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"moltis {moltis.__version__}\n"
    assert f"moltis {moltis.__version__} is {launcher}" in done.stderr
    assert "is not on your PATH" in done.stderr
    assert launch(launcher, "--version").stdout == done.stdout
    installed = home / ".local/lib/moltis/moltis.py"
    assert installed.read_bytes() == PROGRAM.read_bytes()
    done = run_script(shell, home, "--uninstall")
    assert done.returncode == 0
    assert done.stderr == f"moltis is removed from {home}/.local\n"
    assert files_below(home) == [".local"]
    done = run_script(shell, home, "--uninstall")
    assert done.returncode == 0
    assert done.stderr == (
        f"moltis is not installed in {home}/.local; --prefix names another directory\n"
    )


def test_the_launcher_starts_compiled_code(tmp_path):
    place, _ = install(tmp_path)
    options = f"{moltis.PYTHON_OPTIONS} -c '{moltis.IMPORT_AND_RUN}'"
    assert options in place.launcher.read_text()
    assert len(list(place.library.glob("__pycache__/moltis.*.pyc"))) == 1
    ran = launch(place.launcher, "node", "list")
    assert ran.stdout == f"moltis {place.library} ['node', 'list']\n"
    assert ran.returncode == 2


def test_a_prefix_may_have_any_name(tmp_path):
    place, _ = install(tmp_path / 'it\'s a "$HOME" & more')
    assert launch(place.launcher).stdout == f"moltis {place.library} []\n"


def test_a_relative_prefix_is_made_absolute(home):
    done = run_moltis("install", "--prefix", "x", home=home)
    assert done.returncode == 0
    assert launch(home / "x/bin/moltis", "--version").returncode == 0


def test_installing_again_is_an_upgrade(tmp_path):
    """Also to a text of the same length within the same second."""
    for word in ("first", "again"):
        place, _ = install(tmp_path, STAND_IN.replace("__name__,", f"'{word}',"))
        assert launch(place.launcher).stdout == f"{word} {place.library} []\n"


def test_a_launcher_of_the_first_edition_is_replaced(tmp_path):
    place = moltis.Installation(tmp_path)
    place.launcher.parent.mkdir()
    place.launcher.write_text(
        "#!/bin/sh\n# Installed by install.sh of moltis.py.\n"
        "# It imports the program, so that Python takes the compiled form …\nexec …\n"
    )
    install(tmp_path)
    assert launch(place.launcher).returncode == 0


def test_another_program_of_the_same_name_is_left_alone(tmp_path):
    """The existing Moltis has one."""
    place = moltis.Installation(tmp_path)
    place.launcher.parent.mkdir()
    place.launcher.write_bytes(b"\x7fELF\0other")
    for action in (lambda: install(tmp_path), place.remove):
        with pytest.raises(moltis.BadConfiguration, match="moltis is another program"):
            action()
    assert place.launcher.read_bytes() == b"\x7fELF\0other"
    assert not place.library.exists()


def test_a_moltis_that_comes_first_on_the_path_is_pointed_out(tmp_path):
    other = tmp_path / "other" / "moltis"
    other.parent.mkdir()
    fake_python(other, "")
    place = moltis.Installation(tmp_path)
    _, notes = install(tmp_path, path=f"{other.parent}:{place.launcher.parent}")
    assert notes == [f"but `moltis` is still {other} on your PATH"]
    _, notes = install(tmp_path, path=f"{place.launcher.parent}:{other.parent}")
    assert notes == []


def test_removing_it_from_a_node_says_how_to_remove_the_node(home):
    (home / ".moltis").mkdir()
    done = run_moltis("install", "--uninstall", home=home)
    assert done.stderr.endswith(f"{home}/.moltis is kept\n")
    (home / ".moltis/node.json").write_text("{}")
    done = run_moltis("install", "--uninstall", home=home)
    assert f"python3 {home}/.moltis/moltis.py node remove" in done.stderr


def python_without(path, modules, options):
    """Make an interpreter that lacks some modules when started with `options`."""
    hook = f"import sys; sys.modules.update({dict.fromkeys(modules)}); "
    hook += "exec(sys.argv.pop(1))"
    fake_python(
        path,
        f'case "$1 $3" in\n"{options} "*importlib*) shift 2\n'
        f'exec {sys.executable} -I -c "{hook}" "$@" ;;\nesac\n'
        f'exec {sys.executable} "$@"',
    )
    return path


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        ("ssl", "has no module ssl, which https:// and wss:// need; install"),
        ("sqlite3", "has no module sqlite3, which a gateway needs; install"),
    ],
)
def test_a_module_that_python_lacks_is_named_with_its_package(
    tmp_path, module, sentence
):
    python = tmp_path / "python"
    python_without(python, [module], "-I*")
    python.write_text(python.read_text().replace('"-I* "*', "-I*"))
    place, notes = install(tmp_path, python=python)
    assert sentence in notes[0]
    assert len(notes) == 2
    assert launch(place.launcher).returncode == 0


def test_modules_among_what_was_added_to_python_are_found(tmp_path):
    """FreeBSD has sqlite3 there."""
    python = python_without(tmp_path / "python", ["sqlite3"], "-IS")
    place, notes = install(tmp_path, python=python)
    assert not any("has no module" in note for note in notes)
    assert f"exec {python} -I -c" in place.launcher.read_text()


def test_nothing_that_was_added_to_python_is_run(tmp_path):
    """Neither a .pth file nor what PYTHONPATH has."""
    place, _ = install(tmp_path / "prefix")
    (tmp_path / "gc.py").write_text("raise SystemExit(99)")
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit(99)")
    done = subprocess.run(
        [str(place.launcher)],
        check=False,
        cwd=str(tmp_path),
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0


def test_others_may_run_but_not_write_what_is_installed(home):
    previous = os.umask(0)
    try:
        assert run_moltis("install", home=home).returncode == 0
    finally:
        os.umask(previous)
    found = (home / ".local").rglob("*")
    modes = {p.name: p.stat().st_mode & 0o777 for p in found}
    assert {modes[name] for name in ("bin", "lib", "moltis", "__pycache__")} == {0o755}
    assert modes["moltis.py"] == 0o644


def test_a_place_that_cannot_be_written_is_named(home):
    (home / "file").write_text("")
    done = run_moltis("install", "--prefix", home / "file", home=home)
    assert done.returncode == moltis.EXIT_CONFIGURATION
    assert f"cannot write to {home}/file" in done.stderr


def test_a_program_from_a_pipe_asks_for_a_source(home):
    with open(PROGRAM, "rb") as text:
        done = subprocess.run(
            [sys.executable, "-", "install"],
            stdin=text,
            check=False,
            capture_output=True,
            text=True,
            env=clean_environment(home),
        )
    assert done.returncode == moltis.EXIT_USAGE
    assert "name one with --from" in done.stderr


def test_it_upgrades_itself_from_a_gateway(home):
    newer = PROGRAM.read_text().replace(
        f'__version__ = "{moltis.__version__}"', '__version__ = "98.7"'
    )
    with ScriptedServer(lambda request: (200, {}, [newer.encode()])) as server:
        done = run_moltis("install", "--from", server.url, home=home)
    assert done.stderr.startswith("moltis 98.7 is "), done.stderr
    assert launch(home / ".local/bin/moltis", "--version").stdout == "moltis 98.7\n"
    # And back only where that is said by who has the older one.
    done = launch(home / ".local/bin/moltis", "install", "--from", str(PROGRAM))
    assert done.returncode == moltis.EXIT_CONFIGURATION
    assert f"moltis {moltis.__version__}, older than this 98.7" in done.stderr


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot read"),
        ("<html>", "is not moltis.py, or not all of it"),
        (STAND_IN.partition("if __name__")[0], "is not moltis.py, or not all of it"),
    ],
)
def test_moltis_install_refuses_what_is_not_moltis(home, text, sentence):
    if text is not None:
        (home / "other.py").write_text(text)
    done = run_moltis("install", "--from", "other.py", home=home)
    assert done.returncode != 0
    assert (
        f"other.py {sentence}" in done.stderr or f"{sentence} other.py" in done.stderr
    )
    assert not (home / ".local").exists()


# -- started once more from bytecode -------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("gateway --bind 0.0.0.0", True),
        ("chat", True),
        ("mcp", True),
        ("node run", True),
        ("node add --host h --foreground --name x", True),
        ("node add --host h", False),
        ("node list", False),
        ("", False),
    ],
)
def test_what_leaves_a_process_at_rest_runs_long(line, expected):
    assert moltis.runs_long(line.split()) is expected


class Site:
    """A gateway that was started from the program's text."""

    def __init__(self, home):
        self.home = home
        # From bytecode: to compile the text takes a second each time.
        self.launcher = install(home / "installed", PROGRAM.read_text())[0].launcher
        self.gateway = Program(
            *("gateway", "--port", "0", "--demo-node"), home=home, program=PROGRAM
        )
        self.gateway.wait_for_output("Ctrl+C stops it.")

    def run(self, *arguments):
        return subprocess.run(
            [str(self.launcher), *arguments],
            check=False,
            capture_output=True,
            text=True,
            env=clean_environment(self.home),
        )

    def words(self, name):
        """Return the arguments of a node in the foreground, and its token."""
        done = self.run("node", "generate-token", "--name", name, "--json")
        made = json.loads(done.stdout)
        words = ["node", "add", "--foreground", "--host", made["gatewayUrl"]]
        return [*words, "--name", name], made["deviceToken"]

    def wait_for_answers(self, *names):
        """Wait until commands run on the nodes of these names."""

        def answered():
            return self.run("node", "exec", *names, "--", "true").returncode == 0

        wait_for(answered, 60, f"answers of {names}")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("site"))
    try:
        yield site
    finally:
        site.gateway.end()


@pytest.fixture
def start(site):
    """Start nodes, each with its token in the environment; return its Popen."""
    nodes = []

    def start(
        name, *options, command=(sys.executable, str(PROGRAM)), environ=None, **k
    ):
        words, token = site.words(name)
        environ = {"MOLTIS_DEVICE_TOKEN": token, **(environ or {})}
        node = subprocess.Popen(
            [*command, *words, *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=clean_environment(site.home, **environ),
            cwd=str(site.home),
            **{"stdin": subprocess.DEVNULL, **k},
        )
        nodes.append(node)
        return node

    yield start
    for node in nodes:
        node.terminate()
        try:
            assert node.wait(60) in (0, -signal.SIGTERM)
        finally:
            node.kill()
            node.wait()


def started(process):
    """Return the command line of a process that was restarted, once it was."""

    def words():
        text = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode()
        found = text.split("\0")[:-1]
        return found if moltis.LOAD_AND_RUN in found else None

    return wait_for(words, 30, "the restart")


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_gateway_and_node_rest_on_bytecode(site, start):
    """Without the restart, they rest on what the compiler took and did not return."""
    compiler = """if True:
        import sys
        compile(open(sys.argv[1]).read(), "moltis.py", "exec")
        print(flush=True)
        sys.stdin.read()
    """
    words = [sys.executable, "-c", compiler, str(PROGRAM)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"\n"
        most = memory_of(process.pid, "VmHWM")
        process.stdin.close()
    node = start("resting")
    site.wait_for_answers("resting")
    assert memory_of(site.gateway.pid) < 0.45 * most  # 1 without it
    assert memory_of(node.pid) < 0.35 * most


@linux
def test_the_arguments_stay_and_no_secret_joins_them(site, start):
    words, _ = site.words("quiet")
    words[-1] = "quieter"  # its name: there is one node of each
    found = started(start("quieter"))
    assert found[0] == sys.executable
    assert found[-len(words) - 1 :] == [str(PROGRAM), *words]
    assert not any("mdt_" in word for word in found)


@linux
@pytest.mark.parametrize("options", [[], ["-I"], ["-E", "-s", "-B"], ["-X", "utf8"]])
def test_a_node_from_a_pipe_runs_with_the_options_it_was_given(site, start, options):
    """The text is in standard input only, and that is consumed."""
    name = "piped" + "".join(options).replace(" ", "")
    with open(PROGRAM, "rb") as text:
        node = start(name, command=[sys.executable, *options, "-"], stdin=text)
        found = started(node)
    site.wait_for_answers(name)
    assert found[1 : found.index("-c")] != []
    for option in options:
        assert option.lstrip("-") in "".join(found[: found.index("-c")])


@linux
def test_two_start_at_the_same_moment(site, start):
    nodes = [start(name) for name in ("one", "two")]
    for node in nodes:
        started(node)
    site.wait_for_answers("one", "two")


@linux
def test_nothing_on_disk_is_written_or_believed(site, start, tmp_path):
    """A directory that is read-only serves as well; a planted cache is not used."""
    program = tmp_path / "moltis.py"
    shutil.copy(PROGRAM, program)
    evil = tmp_path / "evil.py"
    evil.write_text("raise SystemExit(99)\n")
    for place in (tmp_path, site.home / ".moltis"):
        import py_compile

        tag = sys.implementation.cache_tag
        cache = place / "__pycache__" / f"moltis.{tag}.pyc"
        py_compile.compile(str(evil), cfile=str(cache), dfile=str(program))
    evil.unlink()
    before = files_below(tmp_path)
    tmp_path.chmod(0o500)
    node = start("read-only", command=[sys.executable, str(program)])
    started(node)
    site.wait_for_answers("read-only")
    assert files_below(tmp_path) == before
    tmp_path.chmod(0o700)


@linux
def test_a_node_needs_no_home(site, start):
    environ = {"HOME": "/nonexistent", "TMPDIR": "/nonexistent"}
    node = start("homeless", "--working-dir", "/", environ=environ)
    started(node)
    site.wait_for_answers("homeless")


@linux
@pytest.mark.parametrize("function", ["memfd_create", "execv"])
def test_what_the_system_cannot_do_leaves_a_program_that_runs(
    site, start, tmp_path, function
):
    """Without memfd_create() a temporary file does; without exec all stays as it is."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n\ndef fail(*_):\n    raise OSError(38, 'not implemented')\n\n"
        f"os.{function} = fail\n"
    )
    node = start(function, environ={"PYTHONPATH": str(tmp_path)})
    site.wait_for_answers(function)
    command = Path(f"/proc/{node.pid}/cmdline").read_text()
    assert (moltis.LOAD_AND_RUN in command) is (function != "execv")


@linux
def test_nothing_of_the_restart_is_left_and_a_hangup_stays_ignored(site, start):
    inherited, other = os.pipe()

    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])

    node = start("inheriting", pass_fds=[inherited], preexec_fn=ignore)
    os.close(other)
    os.close(inherited)
    started(node)
    site.wait_for_answers("inheriting")
    links = [os.readlink(path) for path in Path(f"/proc/{node.pid}/fd").iterdir()]
    assert not any("memfd" in link for link in links)
    status = Path(f"/proc/{node.pid}/status").read_text()
    masks = dict(re.findall(r"(Sig\w+):\s*([0-9a-f]+)", status))
    # The handler of main() for what a parent ignored, which commands do not inherit.
    assert int(masks["SigCgt"], 16) & 1 << signal.SIGHUP - 1
    assert not int(masks["SigBlk"], 16) & 1 << signal.SIGUSR2 - 1
    node.send_signal(signal.SIGHUP)
    site.wait_for_answers("inheriting")


@linux
def test_a_program_that_was_imported_is_not_restarted(site, start, tmp_path):
    place, _ = install(tmp_path, PROGRAM.read_text())
    node = start("installed", command=[str(place.launcher)])
    site.wait_for_answers("installed")
    command = Path(f"/proc/{node.pid}/cmdline").read_text()
    assert moltis.IMPORT_AND_RUN in command


def test_a_traceback_shows_the_lines_of_the_text(home, tmp_path):
    """Whoever reports a fault needs them."""
    head = "def cmd_gateway(args: argparse.Namespace, context: Context) -> int:\n"
    text = PROGRAM.read_text()
    assert head in text
    program = tmp_path / "moltis.py"
    broken = "    raise ZeroDivisionError\n\n\ndef rest(args, context):\n"
    program.write_text(text.replace(head, head + broken))
    done = run_moltis("gateway", home=home, program=program)
    assert f'{program}", line' in done.stderr
    assert "    raise ZeroDivisionError" in done.stderr
