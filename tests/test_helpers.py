"""The helpers that every section uses."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from typing import Any, ClassVar, Mapping, Sequence

import pytest
from support import wait_for, with_patience

import moltis


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "",
        "NaN",
        "[Infinity]",
        '{"a": -Infinity}',
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        "[" * 200 + "]" * 200,
        '"\\ud800"',
        b'{"a": "\\uDFFF"}',
        b"\xff",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_what_is_no_json_of_ours_is_a_value_error(text):
    with pytest.raises(ValueError):
        moltis.from_json(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('"\\ud83d\\ude00"', "😀"),
        (b'"\\\\ud800"', "\\ud800"),
        ("[[[1]]]", [[[1]]]),
        ('{"a": null}', {"a": None}),
    ],
)
def test_json_is_read(text, value):
    assert moltis.from_json(text) == value


def test_a_string_that_a_cut_went_through_is_shorter():
    text = r'{"a": [1, {"b": "\\\"x"}], "c": {"d": "a\n\"\\\u00e9\ud83d\ude00z"}}'
    whole = json.loads(text)
    begins = text.index('"d": "') + len('"d": "')
    for end in range(begins, len(text)):
        value = moltis.complete_json(text[:end])
        assert value["a"] == whole["a"]
        assert whole["c"]["d"].startswith(value["c"]["d"])
    assert value == whole


@pytest.mark.parametrize("run", [0, 1, 23, 24, 25, 26, 100])
@pytest.mark.parametrize("end", ["", "x", "\\n", "\\u00e9", "\\ud83d\\ude00"])
def test_a_cut_behind_backslashes_loses_one_character_at_most(run, end):
    whole = '["y' + "\\\\" * run + end
    full = json.loads(whole + '"]')[0]
    for cut in range(len(end) + 1):
        value = moltis.complete_json(whole[: len(whole) - cut])[0]
        assert full.startswith(value)
        assert len(full) - len(value) <= 1


def test_sixteen_mebibytes_of_escapes_are_completed():
    text = '{"a":"' + "\\n" * (8 * 1024 * 1024) + "\\"
    assert moltis.complete_json(text)["a"] == "\n" * (8 * 1024 * 1024)


@pytest.mark.parametrize(
    "text",
    [
        *('{"a', '{"a"', '{"a":', '{"a": tru', "[1,", "", "}"),
        '["\n' + "x" * 20,
        "[" * 20_000,
        "[]," * 20_000,
    ],
    ids=lambda text: repr(text[:9]),
)
def test_what_a_cut_left_without_a_meaning_is_refused(text):
    with pytest.raises(ValueError, match="JSON"):
        moltis.complete_json(text)


def test_json_is_written_without_spaces_and_as_it_is_spelled():
    assert moltis.to_json({"é": [1, None]}) == '{"é":[1,null]}'


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        ("x", int, "must be a whole number, not a string"),
        (True, int, "must be a whole number, not true or false"),
        (1.5, int, "must be a whole number, not a number"),
        (1, bool, "must be true or false, not a whole number"),
        ([], dict, "must be an object, not an array"),
    ],
)
def test_a_field_of_another_type_is_named_with_both(value, kind, words):
    with pytest.raises(moltis.RpcError, match=f"^field {words}$") as caught:
        moltis.optional({"field": value}, "field", kind)
    assert caught.value.code == "INVALID_REQUEST"


def test_an_absent_field_and_null_are_the_same():
    assert moltis.optional({}, "field", str) is None
    assert moltis.optional({"field": None}, "field", str) is None
    for params in ({}, {"field": None}):
        with pytest.raises(moltis.RpcError, match="field is missing: a string"):
            moltis.required(params, "field", str)


def test_a_number_may_be_whole():
    assert moltis.required({"field": 3}, "field", float) == 3


@pytest.mark.parametrize("prefix", ["mdt_", "mk_"])
def test_secrets_are_cut_out_of_texts(prefix):
    secret = moltis.new_secret(prefix)
    assert len(secret) == len(prefix) + 43
    text = f"the token {secret}, and http://h/#key={secret}"
    assert moltis.redact(text) == f"the token {prefix}…, and http://h/#key={prefix}…"


def test_long_texts_keep_head_and_tail_and_say_what_was_cut():
    assert moltis.clip("short", 10) == "short"
    clipped = moltis.clip("a" * 5000 + "b" * 5000, 100)
    assert clipped == "a" * 50 + "\n… 9,900 characters cut …\n" + "b" * 50


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**40, "3.0 TiB")],
)
def test_bytes_for_people(count, text):
    assert moltis.format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.31, "0.3 s"), (42, "42 s"), (200, "3 min"), (20_000, "5 h"), (1e6, "11 d")],
)
def test_durations_for_people(seconds, text):
    assert moltis.format_duration(seconds) == text


def test_a_deadline_may_be_never():
    never = moltis.Deadline(None)
    assert never.remaining() is None
    assert not never.expired


def test_a_deadline_that_is_over_has_nothing_left():
    over = moltis.Deadline(-1)
    assert over.remaining() == 0
    assert over.expired


def test_backoff_grows_to_its_limit_with_jitter_and_starts_anew():
    backoff = moltis.Backoff(1.0, 60.0)
    pauses = [backoff.next() for _ in range(2000)]
    assert all(0.5 <= pause <= 60 for pause in pauses)
    assert pauses[0] <= 1
    assert max(pauses) > 50
    assert min(pauses[100:]) < 10  # full jitter: a fleet spreads out
    backoff.reset()
    assert backoff.next() <= 1


def test_a_ticker_ticks_on_after_a_tick_that_failed(caplog):
    ticks = []

    def tick():
        ticks.append(1)
        raise RuntimeError("once in a while")

    ticker = moltis.Ticker(0.001, tick)
    wait_for(lambda: len(ticks) > 2, what="ticks")
    ticker.close()
    assert "once in a while" in caplog.text


def test_a_ticker_stops_at_once():
    ticker = moltis.Ticker(3600, lambda: None)
    ticker.close()  # joins its thread


def test_a_cancellation_wakes_what_is_blocked():
    cancellation, woken = moltis.Cancellation(), threading.Event()

    def cancel():
        cancellation.cancel()

    thread = threading.Thread(target=cancel)
    with pytest.raises(moltis.Cancelled), cancellation.calling(woken.set):
        thread.start()
        assert woken.wait(60)
        raise OSError("the socket was closed")
    thread.join()
    with pytest.raises(moltis.Cancelled), cancellation.calling(woken.set):
        raise AssertionError("not reached")


def test_a_directory_of_all_users_stays_what_it_is(tmp_path):
    """`MOLTIS_DATA_DIR=/tmp` must not close /tmp to the others."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "of another program").touch()
    with pytest.raises(moltis.BadConfiguration, match="not a directory of your own"):
        moltis.make_private_directory(shared)
    assert shared.stat().st_mode & 0o7777 == 0o1777
    moltis.make_private_directory(shared / "mine")
    assert (shared / "mine").stat().st_mode & 0o7777 == 0o700


def test_private_files_are_replaced_in_one_step(tmp_path):
    path = tmp_path / "deep" / "file"
    moltis.write_private(path, b"one")
    inode = path.stat().st_ino
    moltis.write_private(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_ino != inode
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert os.listdir(path.parent) == ["file"]


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    moltis.write_private(path, b"one")

    def fail(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(moltis.BadConfiguration, match="No space left on device"):
        moltis.write_private(path, b"two")
    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["file"]


def test_now_is_in_milliseconds():
    assert abs(moltis.now_ms() - time.time() * 1000) < 10_000


def test_ids_are_uuids():
    assert moltis.is_uuid(moltis.new_id())
    assert json.loads(moltis.to_json(moltis.new_id()))


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("box", "http://box:11434"),
        ("0.0.0.0:9", "http://127.0.0.1:9"),
        ("https://box", "https://box:443"),
        ("[::1]", "http://[::1]:11434"),
        ("[::1", "http://127.0.0.1:11434"),
        ("box:many", "http://box:11434"),
    ],
)
def test_ollama_s_address_is_read_as_ollama_reads_it(host, url):
    assert moltis.ollama_url(host) == url


# -- values --------------------------------------------------------------------


class Part(moltis.Value):
    exit_code: int
    api_key: str = ""


class Point(moltis.Value):
    """Required fields, and every kind of annotation."""

    x: int
    y: float
    name: str | None = None
    tags: tuple[str, ...] = ()
    parts: Sequence[Part] = ()
    more: Mapping[str, Any] = moltis.NOTHING
    UNIT: ClassVar[str] = "mm"


def test_a_value_has_the_fields_of_its_annotations_and_cannot_change():
    point = Point(1, y=2.5)
    assert (point.x, point.y, point.name, point.UNIT) == (1, 2.5, None, "mm")
    for change in (lambda: setattr(point, "x", 3), lambda: delattr(point, "x")):
        with pytest.raises(AttributeError, match="x cannot be changed"):
            change()
    assert point.replace(x=3) == Point(3, 2.5)
    assert point == Point(1, 2.5) != (1, 2.5)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((1,), {}), ((1, 2), {"z": 3}), ((1, 2, "a", (), (), {}, 7), {})],
)
def test_missing_and_unknown_fields_of_a_value_are_refused(args, kwargs):
    with pytest.raises(TypeError, match="Point"):
        Point(*args, **kwargs)


def test_values_are_found_by_what_they_hold_and_hide_their_secrets():
    assert {Part(1): "one"}[Part(1)] == "one"
    assert repr(Part(1, "mk_secret")) == "Part(exit_code=1)"


def test_a_value_survives_its_json():
    point = Point(1, 2.5, tags=("a", "b"), parts=(Part(3),), more={"k": [1]})
    value = point.to_json()
    assert value["parts"] == [{"exitCode": 3, "apiKey": ""}]
    assert "name" not in value
    assert Point.from_json(json.loads(json.dumps(value))) == point
    assert Point.from_json({"x": 1, "y": 2, "unknown": 0, "name": None}) == Point(1, 2)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"x": 1}, "y is missing"),
        ({"x": "1", "y": 2}, "x must be a whole number, not a string"),
        ({"x": True, "y": 2}, "x must be a whole number, not true or false"),
        ({"x": 1, "y": 2, "tags": [1]}, "tags must be a string"),
        ({"x": 1, "y": 2, "parts": [{}]}, "exitCode is missing"),
        ({"x": 1, "y": 2, "parts": [3]}, "parts must be an object"),
        ({"x": 1, "y": 2, "more": []}, "more must be an object"),
    ],
)
def test_json_that_is_no_such_value_is_refused_with_the_field_s_name(value, problem):
    with pytest.raises(moltis.RpcError, match=problem):
        Point.from_json(value)


# -- programs ------------------------------------------------------------------------


def run(script, timeout=60.0, **options):
    environ = {"PATH": "/usr/bin:/bin"}
    return moltis.run_program(["sh", "-c", script], environ, timeout=timeout, **options)


def test_a_program_returns_its_status_and_both_outputs():
    result = run("echo out; echo err >&2; exit 3")
    assert (result.status, result.stdout, result.stderr) == (3, b"out\n", b"err\n")
    assert result.text == "out\nerr"
    assert run("kill -9 $$").status == 128 + 9


def test_a_program_that_closed_its_outputs_has_its_time():
    assert run("exec >&- 2>&-; sleep 1.5; exit 3").status == 3


def test_a_program_gets_no_input_and_only_its_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MOLTIS_API_KEY", "mk_secret")
    result = run("cat; env; pwd", cwd=str(tmp_path))
    assert "mk_secret" not in result.text
    assert result.text.endswith(str(tmp_path))


def test_a_program_that_is_missing_has_the_status_of_a_shell():
    result = moltis.run_program(["/no/such/program"], {}, timeout=1.0)
    assert result.status == 127
    assert result.text == "/no/such/program: No such file or directory"


@pytest.mark.parametrize("script", ["sleep 120", "sleep 120 & exit 0", "yes"])
def test_a_program_that_does_not_end_is_killed_with_its_children(script, tmp_path):
    def attempt(limit):
        result = run(f"echo $$ >{tmp_path}/pid; {script}", timeout=limit)
        assert (tmp_path / "pid").exists()
        return result

    result = with_patience(attempt, 0.5, 5, 30)
    assert result.status == 124
    assert re.search(r"did not end within (0\.5|5|30) s", result.text)
    assert len(result.stdout) < 2 * moltis.MAX_PROGRAM_OUTPUT
    assert result.survivor == 0
    group = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        wait_for(lambda: os.killpg(group, 0))


def test_a_program_can_be_cancelled(tmp_path):
    cancel = moltis.Cancellation()
    timer = threading.Timer(0.2, cancel.cancel)
    timer.start()
    with pytest.raises(moltis.Cancelled):
        run("sleep 120", cancel=cancel)
    with pytest.raises(moltis.Cancelled):
        run("sleep 120", cancel=cancel)
    timer.join()


# -- files ---------------------------------------------------------------------------


def test_a_file_gets_its_mode_whatever_the_umask_is(tmp_path):
    path = tmp_path / "file"
    for umask in (0, 0o077):
        previous = os.umask(umask)
        try:
            moltis.replace_file(path, b"x", 0o644)
        finally:
            os.umask(previous)
        assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_process_is_told_from_a_later_one_of_its_id():
    assert moltis.process_mark(os.getpid()) == moltis.process_mark(os.getpid()) != ""
    assert moltis.process_mark(2**22 + 1) == ""
