"""install.sh under the shells that people have, in an empty HOME, with `env -i`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from support import ROOT, ScriptedServer, clean_environment

import moltis

SCRIPT = ROOT / "install.sh"
SHELLS = {"dash": ["dash"], "busybox sh": ["busybox", "sh"], "bash": ["bash"]}

# Stands in for moltis.py: it says how it was started, and with what.
PROGRAM = '''#!/usr/bin/env python3
"""moltis: a stand-in."""
import os, sys
__version__ = "9.8.7"

def main():
    print(__name__, os.path.exists(__cached__), sys.argv[1:])
    return len(sys.argv) - 1


if __name__ == "__main__":
    sys.exit(main())
'''

# What install.sh needs besides a shell and Python; no curl and no wget.
TOOLS = (
    *("cat", "chmod", "cp", "dirname", "grep", "mkdir", "mktemp", "mv", "rm", "rmdir"),
    *("sed", "tr", "uname"),
)


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
    path.write_text(PROGRAM)
    return path


@pytest.fixture
def path_of(tmp_path):
    """Make a PATH with the basic tools and those named."""

    def make(*names):
        directory = tmp_path / "bin"
        directory.mkdir(exist_ok=True)
        for name in (*TOOLS, *names):
            (directory / name).symlink_to(shutil.which(name))
        if not (directory / "python3").exists():
            (directory / "python3").symlink_to(sys.executable)
        return directory

    return make


def install(shell, home, *arguments, script=SCRIPT, stdin=None, **environment):
    return subprocess.run(
        [*shell, str(script), *map(str, arguments)] if script else [*shell, *arguments],
        input=stdin,
        check=False,
        capture_output=True,
        text=True,
        cwd=str(home),
        env=clean_environment(home, **environment),
    )


def launch(launcher, *arguments):
    return subprocess.run(
        [str(launcher), *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
    )


def files_below(directory):
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*.*"))


def test_it_installs_a_launcher_that_starts_from_compiled_code(shell, home, source):
    done = install(shell, home, "--from", source)
    launcher = home / ".local" / "bin" / "moltis"
    assert done.returncode == 0, done.stderr
    assert f"moltis 9.8.7 is {launcher}" in done.stderr
    assert "is not on your PATH" in done.stderr
    options = f"{moltis.PYTHON_OPTIONS} -c '{moltis.IMPORT_AND_RUN}'"
    assert options in launcher.read_text()
    ran = launch(launcher, "node", "list")
    assert ran.stdout == "moltis True ['node', 'list']\n"
    assert ran.returncode == 2
    assert (home / ".local/lib/moltis/moltis.py").read_text() == PROGRAM
    assert len(files_below(home)) == len([".local", "moltis.py", "moltis.cpython.pyc"])


def test_a_prefix_may_have_any_name(shell, home, source):
    prefix = home / 'it\'s a "$HOME" & more'
    done = install(shell, home, f"--from={source}", f"--prefix={prefix}")
    assert done.returncode == 0, done.stderr
    assert launch(prefix / "bin" / "moltis").stdout == "moltis True []\n"


def test_a_relative_prefix_is_made_absolute(shell, home, source):
    assert install(shell, home, "--from", source, "--prefix", "x").returncode == 0
    assert launch(home / "x/bin/moltis").returncode == 0


def test_the_subcommand_runs_with_what_was_installed(shell, home, source):
    done = install(shell, home, "--from", source, "--", "node", "add", "--name", "a b")
    assert done.stdout == "moltis True ['node', 'add', '--name', 'a b']\n"
    assert done.returncode == 4


def test_beside_the_script_is_where_the_program_is(shell, home, source):
    script = source.parent / "install.sh"
    shutil.copy(SCRIPT, script)
    source.rename(source.parent / "moltis.py")
    assert install(shell, home, script=script).returncode == 0
    assert launch(home / ".local/bin/moltis").returncode == 0


@pytest.mark.parametrize("tool", ["curl", "wget", None])
def test_a_gateways_address_is_enough(shell, home, path_of, tool):
    """From a pipe, and with curl, wget or neither."""
    if tool and not shutil.which(tool):
        pytest.skip(f"no {tool} here")
    path = path_of(*([tool] if tool else []))
    with ScriptedServer(lambda request: (200, {}, [PROGRAM.encode()])) as server:
        done = install(
            [*shell, "-s", "--"],
            home,
            "--from",
            server.url,
            script=None,
            stdin=SCRIPT.read_text(),
            PATH=str(path),
        )
    assert done.returncode == 0, done.stderr
    assert [request[1] for request in server.requests] == ["/moltis.py"]
    assert launch(home / ".local/bin/moltis").returncode == 0


def test_from_a_pipe_nothing_is_taken_from_the_working_directory(shell, home):
    (home / "moltis.py").write_text(PROGRAM)
    done = install([*shell, "-s"], home, script=None, stdin=SCRIPT.read_text())
    assert done.returncode == 2
    assert "say --from http://GATEWAY:9090" in done.stderr


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    ids=["absent", "a page", "empty", "cut", "another"],
    argvalues=[
        (404, b"not found", "cannot download"),
        (200, b"<html>please sign in</html>", "is not moltis.py"),
        (200, b"", "is not moltis.py"),
        (200, PROGRAM.encode().partition(b"if __name__")[0], "not all of it"),
        (200, b"import os\n__version__ = '1'\n", "is not moltis.py"),
    ],
)
def test_what_is_not_moltis_is_refused(shell, home, status, body, reason):
    with ScriptedServer(lambda request: (status, {}, [body])) as server:
        done = install(shell, home, "--from", f"{server.url}/moltis.py")
    assert done.returncode == 1
    assert reason in done.stderr
    assert server.url in done.stderr
    assert not list(home.iterdir())


def test_a_gateway_that_is_away_is_named(shell, home, path_of):
    done = install(shell, home, "--from", "http://127.0.0.1:9", PATH=str(path_of()))
    assert done.returncode == 1
    assert "cannot download http://127.0.0.1:9/moltis.py" in done.stderr


def test_it_can_be_run_again_as_an_upgrade(shell, home, source):
    for version in ("1.0.0", "1.0.1"):
        source.write_text(PROGRAM.replace("9.8.7", version))
        done = install(shell, home, "--from", source)
        assert f"moltis {version} is" in done.stderr
    source.write_text(PROGRAM.replace("__name__,", "'again',"))
    install(shell, home, "--from", source)
    assert launch(home / ".local/bin/moltis").stdout == "again True []\n"


def test_another_program_of_the_same_name_is_left_alone(shell, home, source):
    """The existing Moltis has one."""
    launcher = home / ".local/bin/moltis"
    launcher.parent.mkdir(parents=True)
    launcher.write_bytes(b"\x7fELF\0other")
    for arguments in (["--from", source], ["--uninstall"]):
        done = install(shell, home, *arguments)
        assert done.returncode == 1
        assert f"{launcher} is another program" in done.stderr
    assert launcher.read_bytes() == b"\x7fELF\0other"


def test_a_moltis_that_comes_first_on_the_path_is_pointed_out(shell, home, source):
    other = home / "other" / "moltis"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    path = f"{other.parent}:{home}/.local/bin:/usr/bin:/bin"
    done = install(shell, home, "--from", source, PATH=path)
    assert f"`moltis` is still {other} on your PATH" in done.stderr


def test_it_removes_all_that_it_has_installed(shell, home, source):
    install(shell, home, "--from", source)
    (home / ".moltis").mkdir()
    done = install(shell, home, "--uninstall")
    assert done.returncode == 0
    assert files_below(home) == [".local", ".moltis"]
    assert not (home / ".local/lib/moltis").exists()
    assert f"{home}/.moltis is kept" in done.stderr
    assert install(shell, home, "--uninstall").returncode == 0


def test_removing_it_from_a_node_says_how_to_remove_the_node(shell, home, source):
    install(shell, home, "--from", source)
    (home / ".moltis").mkdir()
    (home / ".moltis/node.json").write_text("{}")
    done = install(shell, home, "--uninstall")
    assert f"python3 '{home}/.moltis/moltis.py' node remove" in done.stderr


def fake_python(directory, script):
    path = directory / "python3"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.skipif(
    os.path.exists("/usr/libexec/platform-python"), reason="has a platform-python"
)
def test_without_a_new_enough_python_it_says_so(shell, home, source, path_of):
    path = path_of()
    (path / "python3").unlink()
    for script in (None, "exit 0", "exit 1"):  # none, too old, broken
        if script:
            fake_python(path, script)
        done = install(shell, home, "--from", source, PATH=str(path))
        assert done.returncode == 1
        assert "no Python 3.8 or later here" in done.stderr


@pytest.mark.parametrize(
    ("module", "status", "sentence"),
    [
        ("ssl", 0, "has no module ssl, which https:// and wss:// need; install"),
        ("sqlite3", 0, "has no module sqlite3, which a gateway needs; install"),
        ("zlib", 1, "has no module zlib; install"),
    ],
)
def test_a_python_without_a_module_gets_its_sentence(
    shell, home, source, path_of, module, status, sentence
):
    path = path_of()
    (path / "python3").unlink()
    hook = f"import sys; sys.modules['{module}'] = None; exec(sys.argv.pop(1))"
    fake_python(
        path,
        'case "$*" in\n'
        f"*base_prefix*) echo '{path}/python3' ;;\n"
        f'*importlib*) shift 2; exec {sys.executable} -I -c "{hook}" "$@" ;;\n'
        f'*) exec {sys.executable} "$@" ;;\n'
        "esac",
    )
    done = install(shell, home, "--from", source, PATH=str(path))
    assert done.returncode == status, done.stderr
    assert sentence in done.stderr


def test_modules_among_what_was_added_to_python_are_found(shell, home, source, path_of):
    """FreeBSD has sqlite3 there."""
    path = path_of()
    (path / "python3").unlink()
    hook = "import sys; sys.modules['sqlite3'] = None; exec(sys.argv.pop(1))"
    fake_python(
        path,
        'case "$*" in\n'
        f"*base_prefix*) echo '{path}/python3' ;;\n"
        f'-IS*importlib*) shift 2; exec {sys.executable} -I -c "{hook}" "$@" ;;\n'
        f'*) exec {sys.executable} "$@" ;;\n'
        "esac",
    )
    done = install(shell, home, "--from", source, PATH=str(path))
    assert done.returncode == 0, done.stderr
    assert "has no module" not in done.stderr
    launcher = (home / ".local/bin/moltis").read_text()
    assert f"exec '{path}/python3' -I -c" in launcher


def test_nothing_that_was_added_to_python_is_run(home, source, tmp_path):
    """Neither a .pth file nor what PYTHONPATH has."""
    assert install(["sh"], home, "--from", source).returncode == 0
    (tmp_path / "gc.py").write_text("raise SystemExit(99)")
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit(99)")
    done = subprocess.run(
        [str(home / ".local/bin/moltis")],
        check=False,
        cwd=str(tmp_path),
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--frm", "x"], "unknown argument --frm"),
        (["--from"], "--from needs a value"),
        (["--from", "/nowhere/moltis.py"], "there is no file /nowhere/moltis.py"),
    ],
)
def test_wrong_arguments_are_named(shell, home, arguments, sentence):
    done = install(shell, home, *arguments)
    assert done.returncode != 0
    assert sentence in done.stderr


def test_a_place_that_cannot_be_written_is_named(shell, home, source):
    (home / "file").write_text("")
    done = install(shell, home, "--from", source, "--prefix", home / "file")
    assert done.returncode != 0
    assert f"cannot write to {home}/file" in done.stderr


def test_help_is_on_stdout(shell, home):
    done = install(shell, home, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: sh install.sh")


def test_a_download_that_stops_halfway_does_nothing(home, source):
    """All is in functions, and the last line calls the first of them."""
    lines = SCRIPT.read_text().splitlines(keepends=True)
    assert lines[-1] == 'main "$@"\n'
    done = install(
        ["sh", "-s", "--"],
        home,
        "--from",
        str(source),
        script=None,
        stdin="".join(lines[:-1]),
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
