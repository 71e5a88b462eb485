"""What every test gets without asking: a home of its own, and a look for leftovers."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

# The repository root for `import moltis`; pytest itself adds this directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support import child_processes, wait_for

# Minutes each: begun first, so that nothing else waits for them at the end.
LONGEST = ("test_end_to_end", "test_fuzz_door", "test_page_in_browser")
LONGEST += ("test_command_line", "test_agent_on_nodes", "test_chat", "test_node_agent")
SINGLY = "test_faults"  # handed out test by test, at the end
RUN_ALL = os.environ.get("MOLTIS_TEST_ALL") == "1"


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
    """Give a worker whole files, which share fixtures, but for one."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return nodeid if file.endswith(f"{SINGLY}.py") else file

    config.option.loadscopereorder = False  # our order, not by number of tests
    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    """Begin with the longest files, so that short tests fill the end."""
    order = [*LONGEST, "", SINGLY]
    ranks = {name: rank for rank, name in enumerate(order)}
    items.sort(key=lambda item: ranks.get(item.path.stem, ranks[""]))


def pytest_configure(config):
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


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """An empty HOME: no test sees, or touches, the files of who runs it."""
    path = tmp_path_factory.mktemp("home")
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
        names = [t.name for t in set(threading.enumerate()) - threads]
        processes = child_processes()
        names += [f"{processes[pid]} ({pid})" for pid in set(processes) - children]
        return sorted(names)

    wait_for(lambda: not leftovers(), 20, lambda: f"end of {', '.join(leftovers())}")
