"""The helpers that every section uses."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from typing import ClassVar

import pytest
from support import wait_for

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
        assert woken.wait(10)
        raise OSError("the socket was closed")
    thread.join()
    with pytest.raises(moltis.Cancelled), cancellation.calling(woken.set):
        raise AssertionError("not reached")


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


# -- dataclasses ---------------------------------------------------------------


@moltis.dataclass(frozen=True)
class Point:
    """Two required fields, and every kind of default."""

    x: int
    y: int
    name: str = "origin"
    tags: list = moltis.field(default_factory=list)
    secret: str = moltis.field(default="s", repr=False)
    UNIT: ClassVar[str] = "mm"


def test_a_dataclass_is_what_the_standard_library_makes_of_it():
    theirs = dataclasses.make_dataclass(
        "Point",
        [
            "x",
            "y",
            ("name", str, "origin"),
            ("tags", list, dataclasses.field(default_factory=list)),
            ("secret", str, dataclasses.field(default="s", repr=False)),
        ],
        frozen=True,
    )
    for arguments in ((1, 2), (1, 2, "a", [3], "t")):
        assert repr(Point(*arguments)) == repr(theirs(*arguments))
        assert moltis.asdict(Point(*arguments)) == dataclasses.asdict(
            theirs(*arguments)
        )
    assert moltis.field_names(Point) == tuple(
        f.name for f in dataclasses.fields(theirs)
    )
    for arguments in ((), (1,), (1, 2, "a", [], "s", 6)):
        for cls in (Point, theirs):
            with pytest.raises(TypeError):
                cls(*arguments)


def test_a_frozen_value_does_not_change():
    point = Point(1, y=2)
    for change in (lambda: setattr(point, "x", 3), lambda: delattr(point, "x")):
        with pytest.raises(AttributeError, match="x cannot be changed"):
            change()
    assert moltis.replace(point, x=3) == Point(3, 2)
    assert point == Point(1, 2)
    assert point != (1, 2)
    assert point.UNIT == "mm"


def test_a_default_is_made_anew_for_each():
    one, other = Point(1, 2), Point(1, 2)
    one.tags.append("a")
    assert other.tags == []


def test_values_are_found_by_what_they_hold():
    @moltis.dataclass(frozen=True)
    class Key:
        a: int

    assert {Key(1): "one"}[Key(1)] == "one"


def test_first_objects_may_be_made_by_many_threads_at_once():
    for _ in range(50):

        @moltis.dataclass(frozen=True)
        class Value:
            a: int
            b: list = moltis.field(default_factory=list)

        barrier, made = threading.Barrier(4), []

        def make(cls=Value, barrier=barrier, made=made):
            barrier.wait()
            made.append(cls(1))

        threads = [threading.Thread(target=make) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert made == [Value(1, [])] * 4
