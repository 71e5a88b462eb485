"""The section Store: what the gateway remembers."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support import ROOT, wait_for

import moltis
from moltis import (
    MIGRATIONS,
    BadConfiguration,
    CommandEnd,
    CommandRecord,
    CommandState,
    Device,
    DeviceCredential,
    Login,
    OperatorKey,
    Store,
    StoreError,
)

NOW = 1_700_000_000_000


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / moltis.STORE_FILE


@pytest.fixture
def store(path):
    store = Store(path)
    yield store
    store.close()


def credential(name):
    return DeviceCredential(f"handle {name}", f"hash {name}", f"verifier {name}")


def add_device(store, name, **more):
    device = Device(
        id=name, display_name=name, platform="linux", created_at=NOW, **more
    )
    store.devices.add(device, credential(name))
    return device


def connect(store, name, node_id, **more):
    return store.devices.connect(
        name, node_id=node_id, address="192.0.2.7", now=NOW + 1, **more
    )


def command(name, **more):
    record = {
        "invoke_id": name,
        "asked_at": NOW,
        "caller_kind": "operator",
        "caller_name": "ci",
        "node_id": "n1",
        "node_name": "Pi",
        "command": "uptime",
    }
    return CommandRecord(**{**record, **more})


def operator_key(name):
    return OperatorKey(id=name, name=name, scopes=("operator.admin",), created_at=NOW)


def login(name, key_id):
    return Login(
        id=name,
        key_id=key_id,
        created_at=NOW,
        last_used_at=NOW,
        expires_at=NOW + 1000,
        user_agent="Firefox",
        address="192.0.2.7",
    )


# --- the file -------------------------------------------------------------------------


def test_the_file_and_its_helpers_are_readable_by_their_owner_alone(store, path):
    store.settings.put("a", 1)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()}
    assert set(modes) >= {"moltis.db", "moltis.db-wal"}
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_file_that_others_could_read_is_closed_to_them(path):
    Store(path).close()
    path.chmod(0o644)
    Store(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_database_uses_wal_and_foreign_keys(store):
    database = store.settings._db
    assert database.row("PRAGMA journal_mode")[0] == "wal"
    assert database.row("PRAGMA foreign_keys")[0] == 1
    assert database.row("PRAGMA synchronous")[0] == 1


def test_what_was_stored_is_there_after_a_restart(path):
    first = Store(path)
    add_device(first, "d1")
    connect(first, "d1", "n1", capabilities=("exec.stream",), commands=("system.run",))
    first.devices.rename("d1", "Attic")
    first.devices.save_telemetry("d1", {"cpuCount": 4, "näme": "é"}, NOW + 2)
    first.close()
    second = Store(path)
    device = second.devices.by_id("d1", NOW)
    second.close()
    assert device == Device(
        id="d1",
        display_name="Attic",
        platform="linux",
        created_at=NOW,
        renamed=True,
        node_id="n1",
        last_seen_at=NOW + 2,
        last_ip="192.0.2.7",
        telemetry={"cpuCount": 4, "näme": "é"},
        capabilities=("exec.stream",),
        commands=("system.run",),
    )


def test_a_database_from_a_newer_version_is_refused_with_both_versions(path):
    Store(path).close()
    newer = len(MIGRATIONS) + 4
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {newer}")
    db.close()
    with pytest.raises(BadConfiguration) as caught:
        Store(path)
    assert f"version {newer} " in str(caught.value)
    assert f"up to {len(MIGRATIONS)}" in str(caught.value)


def test_a_migration_that_fails_leaves_the_old_version_whole(path, monkeypatch):
    store = Store(path)
    add_device(store, "d1")
    store.close()
    broken = "CREATE TABLE extra (id); CREATE TABLE devices (id)"
    monkeypatch.setattr(moltis, "MIGRATIONS", (*MIGRATIONS, broken))
    with pytest.raises(BadConfiguration):
        Store(path)
    monkeypatch.setattr(moltis, "MIGRATIONS", MIGRATIONS)
    store = Store(path)
    assert store.devices.by_id("d1", NOW)
    assert not store.settings._db.rows(
        "SELECT * FROM sqlite_master WHERE name = 'extra'"
    )
    store.close()


def test_a_later_migration_keeps_what_was_there(path, monkeypatch):
    store = Store(path)
    add_device(store, "d1")
    store.close()
    more = "CREATE TABLE extra (id)"
    monkeypatch.setattr(moltis, "MIGRATIONS", (*MIGRATIONS, more))
    store = Store(path)
    assert store.devices.by_id("d1", NOW)
    assert store.settings._db.rows("SELECT * FROM extra") == []
    store.close()


def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(path):
    path.parent.mkdir(parents=True)
    path.write_bytes(b"my diary, " * 1000)
    with pytest.raises(BadConfiguration, match=r"moltis\.db: file is not a database"):
        Store(path)
    assert path.read_bytes() == b"my diary, " * 1000


def test_a_damaged_database_is_an_error_that_says_so(path):
    store = Store(path)
    for number in range(300):
        add_device(store, f"d{number}")
    store.close()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(size - 4096))
    refusals = (BadConfiguration, StoreError)
    with pytest.raises(refusals, match="malformed"), contextlib.closing(
        Store(path)
    ) as damaged:
        damaged.devices.all(NOW)


def test_a_directory_in_place_of_the_file_is_refused(path):
    path.mkdir(parents=True)
    with pytest.raises(BadConfiguration, match=r"cannot open .*moltis\.db"):
        Store(path)


@pytest.mark.skipif(os.name != "posix", reason="file permissions")
def test_an_unreadable_directory_is_refused_with_advice(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(BadConfiguration, match="MOLTIS_DATA_DIR"):
        Store(blocker / "moltis.db")


def test_a_python_without_sqlite3_is_told_what_to_install(tmp_path):
    script = (
        "import sys; sys.modules['sqlite3'] = None; sys.path.insert(0, sys.argv[1])\n"
        "import moltis, pathlib\n"
        "try:\n    moltis.Store(pathlib.Path(sys.argv[2]) / 'moltis.db')\n"
        "except moltis.BadConfiguration as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "sqlite3" in done.stdout
    assert "install" in done.stdout


def test_importing_moltis_does_not_import_sqlite3():
    script = "import moltis, sys; assert 'sqlite3' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


# --- when the disk is full, the file is held, or the store is closed ------------------


def test_a_full_disk_is_an_error_and_nothing_stored_before_is_lost(store):
    add_device(store, "d1")
    database = store.settings._db
    database.rows(f"PRAGMA max_page_count = {database.row('PRAGMA page_count')[0]}")
    with pytest.raises(StoreError, match=r"full; make room") as caught:
        store.settings.put("big", "x" * 100_000)
    assert (caught.value.code, caught.value.retryable) == ("UNAVAILABLE", True)
    assert store.devices.by_id("d1", NOW)
    database.rows("PRAGMA max_page_count = 1000000")
    store.settings.put("big", "x" * 100_000)
    assert store.settings.get("big") == "x" * 100_000


def test_a_transaction_that_fails_changes_nothing_and_holds_no_lock(store):
    store.settings.put("a", 1)
    with pytest.raises(StoreError), store.settings._db.transaction() as db:
        db.execute("UPDATE settings SET value = '2'")
        db.execute("SELECT * FROM nowhere")
    with pytest.raises(ZeroDivisionError), store.settings._db.transaction() as db:
        db.execute("UPDATE settings SET value = '3'")
        _ = 1 / 0
    assert store.settings.get("a") == 1


def test_a_file_size_limit_is_an_error_in_a_process_that_lives_on(tmp_path):
    script = (
        "import resource, sys, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "import moltis\n"
        "store = moltis.Store(pathlib.Path(sys.argv[2]) / 'moltis.db')\n"
        "store.settings.put('small', 1)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"
        "try:\n    store.settings.put('big', 'x' * 1_000_000)\n"
        "except moltis.StoreError as error:\n    print(error)\n"
        "assert store.settings.get('small') == 1\n"
        "store.settings.put('small', 2)\nassert store.settings.get('small') == 2\n"
        "store.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "make room on that disk" in done.stdout


def test_a_file_that_another_program_holds_is_an_error_after_the_timeout(
    path, monkeypatch
):
    monkeypatch.setattr(moltis, "STORE_BUSY_TIMEOUT", 0.05)
    store = Store(path)
    other = sqlite3.connect(str(path), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked; end the program"):
        store.settings.put("a", 1)
    other.execute("ROLLBACK")
    other.close()
    store.settings.put("a", 1)
    store.close()


def test_a_number_that_no_table_takes_is_an_error_that_says_so(store):
    with pytest.raises(StoreError, match="more than 64 bits"):
        store.commands.page(before=2**63)


def test_a_closed_store_raises_and_may_be_closed_again(store):
    store.close()
    store.close()
    with pytest.raises(StoreError):
        store.settings.get("a")


def test_many_threads_may_use_one_store(store):
    def work(number):
        for step in range(50):
            store.commands.add(command(f"{number}-{step}"))
            store.commands.end(
                f"{number}-{step}", CommandEnd(CommandState.DONE, NOW, exit_code=0)
            )

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.commands.page(state=CommandState.DONE, limit=1000)) == 400
    assert store.commands.unfinished() == []


# --- devices --------------------------------------------------------------------------


def test_a_device_is_found_by_each_of_its_names_and_by_no_other(store):
    device = add_device(store, "d1")
    add_device(store, "d2")
    assert store.devices.by_id("d1", NOW) == device
    assert store.devices.by_token_hash("hash d1", NOW) == device
    assert store.devices.by_handle("handle d1", NOW) == device
    assert store.devices.verifier("handle d1", NOW) == "verifier d1"
    assert store.devices.by_token_hash("hash d3", NOW) is None
    assert store.devices.verifier("handle d3", NOW) is None


def test_devices_are_listed_by_name_whatever_its_case(store):
    for name in ("b", "C", "a"):
        add_device(store, name)
    assert [d.id for d in store.devices.all(NOW)] == ["a", "b", "C"]


def test_a_connection_is_noted_and_binds_the_node_id(store):
    add_device(store, "d1")
    assert connect(store, "d1", "n1", platform="macos", version="2")
    device = store.devices.by_node_id("n1", NOW)
    assert (device.id, device.platform, device.version) == ("d1", "macos", "2")
    assert (device.last_ip, device.last_seen_at) == ("192.0.2.7", NOW + 1)
    assert connect(store, "d1", "n1")
    assert store.devices.by_id("d1", NOW).platform == "macos"


def test_a_node_id_of_another_device_is_refused(store):
    add_device(store, "d1")
    add_device(store, "d2")
    assert connect(store, "d1", "n1")
    assert not connect(store, "d2", "n1", display_name="thief")
    assert store.devices.by_id("d2", NOW).node_id is None
    assert store.devices.by_id("d2", NOW).display_name == "d2"


def test_a_machine_that_was_installed_anew_brings_a_new_node_id(store):
    add_device(store, "d1")
    assert connect(store, "d1", "n1")
    assert connect(store, "d1", "n2")
    assert store.devices.by_id("d1", NOW).node_id == "n2"
    assert store.devices.by_node_id("n1", NOW) is None


def test_a_node_names_itself_until_an_operator_renames_it(store):
    add_device(store, "d1")
    connect(store, "d1", "n1", display_name="raspberrypi")
    assert store.devices.by_id("d1", NOW).display_name == "raspberrypi"
    assert store.devices.rename("d1", "Attic")
    connect(store, "d1", "n1", display_name="raspberrypi")
    assert store.devices.by_id("d1", NOW).display_name == "Attic"


def test_a_revoked_device_is_gone_and_its_machine_may_come_back(store):
    add_device(store, "d1")
    connect(store, "d1", "n1")
    assert store.devices.revoke("d1", NOW)
    assert not store.devices.revoke("d1", NOW)
    assert store.devices.all(NOW) == []
    assert store.devices.by_token_hash("hash d1", NOW) is None
    assert store.devices.by_handle("handle d1", NOW) is None
    assert store.devices.verifier("handle d1", NOW) is None
    assert not connect(store, "d1", "n1")
    assert not store.devices.rename("d1", "x")
    assert not store.devices.rotate("d1", credential("new"))
    add_device(store, "d2")
    assert connect(store, "d2", "n1")


def test_rotating_replaces_the_credential_and_nothing_else(store):
    add_device(store, "d1")
    connect(store, "d1", "n1")
    before = store.devices.by_id("d1", NOW)
    assert store.devices.rotate("d1", credential("new"))
    assert store.devices.by_token_hash("hash d1", NOW) is None
    assert store.devices.by_token_hash("hash new", NOW) == before
    assert store.devices.verifier("handle new", NOW) == "verifier new"


def test_a_device_that_does_not_connect_in_time_is_gone(store):
    add_device(store, "late", expires_at=NOW - 1)
    add_device(store, "early", expires_at=NOW + 5)
    assert store.devices.by_handle("handle late", NOW) is None
    assert store.devices.verifier("handle late", NOW) is None
    assert not connect(store, "late", "n1")
    assert connect(store, "early", "n2")
    assert store.devices.delete_expired(NOW + 100) == 1
    assert [d.id for d in store.devices.all(NOW + 100)] == ["early"]


def test_seen_moves_the_last_sight_of_a_device(store):
    add_device(store, "d1")
    store.devices.seen("d1", NOW + 9)
    assert store.devices.by_id("d1", NOW).last_seen_at == NOW + 9


# --- commands -------------------------------------------------------------------------


def test_a_command_has_a_row_from_the_moment_it_is_asked_for(store):
    asked = command("c1", session_key="main", cwd="/tmp")
    assert store.commands.add(asked)
    row = store.commands.by_id("c1")
    assert row == CommandRecord(**{**vars(asked), "seq": row.seq})
    assert row.state == "sent"


def test_a_second_command_with_one_id_is_refused_and_changes_nothing(store):
    assert store.commands.add(command("c1"))
    assert not store.commands.add(command("c1", command="rm -rf /"))
    assert store.commands.by_id("c1").command == "uptime"


def test_a_command_starts_and_ends_once(store):
    store.commands.add(command("c1"))
    store.commands.start("c1", NOW + 1)
    assert store.commands.by_id("c1").state == "running"
    end = CommandEnd(
        CommandState.FAILED,
        NOW + 2,
        exit_code=-1,
        signal="SIGKILL",
        stdout_bytes=2**40,
        stderr_bytes=1,
        error="no such directory",
    )
    assert store.commands.end("c1", end)
    assert not store.commands.end("c1", CommandEnd(CommandState.DONE, NOW + 3))
    store.commands.start("c1", NOW + 4)
    row = store.commands.by_id("c1")
    assert (row.state, row.started_at, row.ended_at) == ("failed", NOW + 1, NOW + 2)
    assert (row.exit_code, row.signal, row.error) == (
        -1,
        "SIGKILL",
        "no such directory",
    )
    assert (row.stdout_bytes, row.stderr_bytes) == (2**40, 1)


def test_a_command_given_up_as_lost_may_still_report_its_end(store):
    store.commands.add(command("c1"))
    assert store.commands.end("c1", CommandEnd(CommandState.LOST, NOW + 1))
    assert store.commands.end("c1", CommandEnd(CommandState.DONE, NOW + 2, exit_code=0))
    assert store.commands.by_id("c1").state == "done"


def test_a_command_given_up_as_lost_may_still_be_heard_of(store):
    store.commands.add(command("c1"))
    store.commands.end("c1", CommandEnd(CommandState.LOST, NOW + 1, error="gone"))
    store.commands.start("c1", NOW)  # a look that began before it was given up
    assert store.commands.by_id("c1").state == "lost"
    store.commands.start("c1", NOW, revives=True)
    row = store.commands.by_id("c1")
    assert (row.state, row.started_at, row.ended_at) == ("running", NOW, None)
    assert row.error is None


def test_a_command_keeps_its_timeout_and_when_it_was_first_to_end(store):
    store.commands.add(command("c1", timeout_ms=90_000))
    store.commands.cancel("c1", NOW + 1)
    store.commands.cancel("c1", NOW + 2)
    row = store.commands.by_id("c1")
    assert (row.timeout_ms, row.cancelled_at, row.state) == (90_000, NOW + 1, "sent")


def test_the_end_of_an_unknown_command_is_not_noted(store):
    assert not store.commands.end("c1", CommandEnd(CommandState.DONE, NOW))
    assert store.commands.by_id("c1") is None


def test_commands_are_paged_newest_first_with_filters(store):
    for number in range(6):
        node = "n1" if number % 2 else "n2"
        store.commands.add(command(f"c{number}", node_id=node))
    store.commands.end("c5", CommandEnd(CommandState.DONE, NOW))

    def ids(**filters):
        return [c.invoke_id for c in store.commands.page(**filters)]

    assert ids() == ["c5", "c4", "c3", "c2", "c1", "c0"]
    assert ids(node_id="n1") == ["c5", "c3", "c1"]
    assert ids(state="done") == ["c5"]
    assert ids(node_id="n1", state="sent") == ["c3", "c1"]
    first = store.commands.page(limit=4)
    assert ids(before=first[-1].seq) == ["c1", "c0"]
    assert ids(limit=-1) == []


def test_unfinished_commands_are_listed_oldest_first(store):
    store.commands.add(command("c1"))
    store.commands.add(command("c2"))
    store.commands.add(command("c3", node_id="n2"))
    store.commands.start("c2", NOW)
    store.commands.end("c1", CommandEnd(CommandState.LOST, NOW))
    assert [c.invoke_id for c in store.commands.unfinished()] == ["c2", "c3"]


def test_old_commands_are_deleted_unless_they_have_not_ended(store):
    for name, asked_at in (("old", 1), ("old, running", 2), ("new", NOW)):
        store.commands.add(command(name, asked_at=asked_at))
    store.commands.end("old", CommandEnd(CommandState.DONE, 5))
    store.commands.end("new", CommandEnd(CommandState.DONE, NOW))
    assert store.commands.delete_before(NOW) == 1
    assert [c.invoke_id for c in store.commands.page()] == ["new", "old, running"]


def test_a_command_of_a_clock_that_was_wrong_is_kept_by_when_it_ended(store):
    """A machine without a battery begins in 1970, until it has asked for the time."""
    store.commands.add(command("early", asked_at=1000))
    store.commands.end("early", CommandEnd(CommandState.DONE, NOW + 1))
    assert store.commands.delete_before(NOW) == 0
    assert store.commands.delete_before(NOW + 2) == 1


def test_a_command_never_ends_before_it_started(store):
    """Its clock was set back meanwhile."""
    store.commands.add(command("c1"))
    store.commands.start("c1", NOW - 1)
    store.commands.end("c1", CommandEnd(CommandState.DONE, NOW - 2))
    row = store.commands.by_id("c1")
    assert (row.asked_at, row.started_at, row.ended_at) == (NOW, NOW, NOW)


# --- operator keys, sign-ins, join codes, settings ------------------------------------


def test_a_revoked_key_opens_nothing_and_ends_its_sign_ins(store):
    for name in ("k1", "k2"):
        store.operator_keys.add(operator_key(name), f"hash {name}")
        store.logins.add(login(f"login {name}", name), f"cookie {name}")
    assert store.operator_keys.revoke("k1", NOW)
    assert not store.operator_keys.revoke("k1", NOW)
    assert store.operator_keys.by_hash("hash k1") is None
    assert store.operator_keys.by_hash("hash k2") == operator_key("k2")
    assert store.logins.by_cookie_hash("cookie k1", NOW) is None
    assert [entry.id for entry in store.logins.all(NOW)] == ["login k2"]
    assert [(k.id, k.revoked_at) for k in store.operator_keys.all()] == [
        ("k2", None),
        ("k1", NOW),
    ]


def test_a_key_remembers_when_it_was_used(store):
    store.operator_keys.add(operator_key("k1"), "hash")
    store.operator_keys.used("k1", NOW + 7)
    assert store.operator_keys.by_hash("hash").last_used_at == NOW + 7


def test_a_sign_in_lasts_until_it_expires_is_renewed_or_deleted(store):
    store.operator_keys.add(operator_key("k1"), "hash")
    store.logins.add(login("l1", "k1"), "cookie")
    assert store.logins.by_cookie_hash("cookie", NOW) == (
        login("l1", "k1"),
        operator_key("k1"),
    )
    assert store.logins.by_cookie_hash("cookie", NOW + 1000) is None
    store.logins.used("l1", NOW + 500, NOW + 1500)
    assert (
        store.logins.by_cookie_hash("cookie", NOW + 1000)[0].last_used_at == NOW + 500
    )
    assert store.logins.delete_expired(NOW + 1000) == 0
    assert store.logins.delete_expired(NOW + 1500) == 1
    assert not store.logins.delete("l1")


def test_a_sign_in_without_a_key_is_impossible(store):
    with pytest.raises(StoreError):
        store.logins.add(login("l1", "nobody"), "cookie")


def test_one_of_many_takers_gets_a_join_code(store):
    add_device(store, "d1")
    store.join_codes.add("code", "d1", NOW + 1)
    taken = []
    threads = [
        threading.Thread(
            target=lambda: taken.append(store.join_codes.take("code", NOW))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [t for t in taken if t] == ["d1"]


def test_a_join_code_that_has_expired_is_forgotten(store):
    add_device(store, "d1")
    store.join_codes.add("code", "d1", NOW)
    assert store.join_codes.take("code", NOW) is None
    assert store.settings._db.rows("SELECT * FROM join_codes") == []


def test_settings_are_json_values_by_name(store):
    assert store.settings.get("a") is None
    for value in ({"b": [1, None, "é"]}, "text", 0, False):
        store.settings.put("a", value)
        assert store.settings.get("a") == value
    store.settings.delete("a")
    assert store.settings.get("a") is None


def test_the_path_may_hold_any_character(tmp_path):
    path = Path(tmp_path) / "a ?#%'é" / "moltis.db"
    Store(path).close()
    assert path.exists()


def test_the_log_goes_into_the_file_without_anybody_waiting(path):
    """SQLite would do it in the middle of a transaction, waiting for the disk."""
    with contextlib.closing(Store(path)) as store:
        for number in range(moltis.CHECKPOINT_EVERY):
            store.settings.put(f"key{number}", "x" * 200)
        # One that sees no log of the others has to find it in the file itself.
        copied = path.with_name("copy.db")

        def is_there():
            copied.write_bytes(path.read_bytes())
            with contextlib.closing(sqlite3.connect(copied)) as db:
                tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
                return (
                    tables and db.execute("SELECT max(key) FROM settings").fetchone()[0]
                )

        wait_for(is_there)


def test_a_store_closes_while_its_keeper_is_at_work(path):
    end = CommandEnd(CommandState.DONE, NOW)
    kept = []
    for number in range(30):
        with contextlib.closing(Store(path)) as store:
            store.commands.end_soon(str(number), end, kept.append)
    assert kept == [True] * 30


def test_a_full_disk_at_the_log_is_one_line_and_ends_nothing(path, monkeypatch, caplog):
    """Schedule 40104 of the soak: it was a traceback."""

    def fail(_database):
        raise StoreError("the disk is full")

    with contextlib.closing(Store(path)) as store:
        kept = []
        with monkeypatch.context() as full:
            full.setattr(moltis.Database, "checkpoint", fail)
            store.commands.end_soon(
                "1", CommandEnd(CommandState.DONE, NOW), kept.append
            )
            wait_for(lambda: "the disk is full" in caplog.text)
        store.commands.end_soon("2", CommandEnd(CommandState.DONE, NOW), kept.append)
        wait_for(lambda: kept == [True, True])
    assert not any(record.exc_info for record in caplog.records)
