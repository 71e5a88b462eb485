"""What every test gets without asking: a home of its own, and a look for leftovers."""

from __future__ import annotations

import collections
import itertools
import os
import signal
import sys
import threading
from pathlib import Path

import hypothesis
import pytest

# The repository root for `import moltis`; pytest itself adds this directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support import ONE_RUNTIME, child_processes, wait_for

import moltis

# The same examples in each run, however long one takes on a busy machine; to look for
# others: --hypothesis-profile default.
hypothesis.settings.register_profile(
    "moltis", deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("moltis")

# A minute and more each: begun first, and handed out in parts, so that nothing else
# waits for them at the end.
LONGEST = ("test_page_in_browser", "test_terminals", "test_command_line", "test_chat")
LONGEST += ("test_end_to_end", "test_trust", "test_gateway", "test_mcp")
LONGEST += ("test_node_agent", "test_agent_on_nodes")
WHOLE = ("test_mcp_clients",)  # as well, but its clients run once for all its tests
PART = 25  # tests
SINGLY = "test_faults"  # handed out test by test, at the end
HOMES = itertools.count()
RUN_ALL = os.environ.get("MOLTIS_TEST_ALL") == "1"

# `python3` is the interpreter itself: a shim of pyenv, which each gateway would ask for
# the version, starts thirty programs.
os.environ["PATH"] = os.pathsep.join(
    [str(Path(sys.executable).resolve().parent), os.environ["PATH"]]
)


def pytest_addoption(parser):
    parser.addoption(
        "--schedules",
        type=int,
        default=200,
        metavar="N",
        help="how many schedules of faults to run (tests/test_faults.py)",
    )
    parser.addoption(
        "--schedules-at-once",
        type=int,
        default=3,
        metavar="N",
        help="how many of them each worker runs side by side: they mostly wait",
    )
    parser.addoption(
        "--first-schedule",
        type=int,
        default=0,
        metavar="SEED",
        help="the seed of the first of them; the others follow",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give a worker whole files, which share fixtures, or parts of the longest."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def __init__(self, *args):
            super().__init__(*args)
            self._scopes = {}  # by test, in our order
            self._counts = collections.Counter()  # of tests by file

        def _split_scope(self, nodeid):
            if nodeid not in self._scopes:
                file = nodeid.partition("::")[0]
                size = {SINGLY: 1, **dict.fromkeys(LONGEST, PART)}.get(Path(file).stem)
                part = self._counts[file] // size if size else 0
                self._counts[file] += 1
                self._scopes[nodeid] = f"{file} {part}"
            return self._scopes[nodeid]

    config.option.loadscopereorder = False  # our order, not by number of tests
    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    """Begin with the longest files, so that short tests fill the end."""
    order = [*WHOLE, *LONGEST, "", SINGLY]
    ranks = {name: rank for rank, name in enumerate(order)}
    items.sort(key=lambda item: ranks.get(item.path.stem, ranks[""]))


def pytest_configure(config):
    # A shell's `&`, or nohup, would have the programs of tests ignore them as well.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):  # we ourselves still do
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    config.addinivalue_line("markers", "systemd: needs a working `systemctl --user`")
    config.addinivalue_line("markers", "boots: boots a machine of its own, as root")
    # A thread that dies, or a socket that is left to the garbage collector, is a
    # fault of ours even where the test itself would pass.
    for category in (
        "ResourceWarning",
        "pytest.PytestUnhandledThreadExceptionWarning",
        "pytest.PytestUnraisableExceptionWarning",
    ):
        config.addinivalue_line("filterwarnings", f"error::{category}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    _fail_instead_of_skipping(outcome.get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    outcome = yield
    _fail_instead_of_skipping(outcome.get_result())


def _fail_instead_of_skipping(report):
    if RUN_ALL and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped under MOLTIS_TEST_ALL=1: {report.longrepr}"


@pytest.fixture(scope="session", autouse=True)
def one_runtime():
    """Let the gateways and nodes of this process ask for the version of Python alone.

    The other runtimes would take most of the CPU time of a gateway that a test starts.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moltis, "RUNTIMES", ONE_RUNTIME)
        yield


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """An empty HOME: no test sees, or touches, the files of who runs it."""
    # Numbered by us: pytest looks at the names of all there are, a thousand and more.
    path = tmp_path_factory.mktemp(f"home-{next(HOMES)}", numbered=False)
    for name in [n for n in os.environ if n.startswith("MOLTIS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.setenv("MOLTIS_DATA_DIR", str(path / ".moltis"))
    return path


@pytest.fixture(autouse=True)
def nothing_left_behind(home):
    """Fail the test after which a thread or a child process of ours still lives."""
    threads = set(threading.enumerate())
    children = set(child_processes())
    yield

    def leftovers():
        # An idle one waits 10 s for another job of a gateway that tests share.
        ours = (t.name for t in set(threading.enumerate()) - threads)
        names = [name for name in ours if name != "moltis-idle"]
        processes = child_processes()
        names += [f"{processes[pid]} ({pid})" for pid in set(processes) - children]
        return sorted(names)

    wait_for(lambda: not leftovers(), 60, lambda: f"end of {', '.join(leftovers())}")
