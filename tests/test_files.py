"""Files and directories as one stream, and `moltis node cp` between machines."""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import other_node
from proxy import DOWN, UP
from support import wait_for
from world import Call, SmallDisk, World

import moltis
from moltis import FilePlaces, FileRead, FileSource, FileTarget, FileWrite, RpcError


def pieces_of(base, *paths, recursive=True, below=(), notes=None, patterns=False):
    spec = FileRead([moltis.encode_path(p) for p in paths], recursive, patterns)
    note = (notes if notes is not None else []).append
    return FileSource(spec, FilePlaces(str(base), below), note).pieces()


def write(base, path, pieces, notes=None, below=(), **options):
    spec = FileWrite(moltis.encode_path(path), **options)
    note = (notes if notes is not None else []).append
    target = FileTarget(spec, FilePlaces(str(base), below), note, umask=0o022)
    return target.receive(moltis.one_by_one(pieces))


def copy(source_base, paths, base, path, notes=None, **options):
    """Copy with -r, from one directory to another."""
    pieces = pieces_of(source_base, *paths, notes=notes)
    return write(base, path, pieces, notes, **options)


def archive(*members):
    """Return a stream as a stranger could make it: TarInfo, or one with its bytes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            info, data = member if isinstance(member, tuple) else (member, b"")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = file.getvalue()
    return [data, hashlib.sha256(data).digest()]


def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def tree(path):
    """Return every name below `path` with its type, mode and content."""
    found = {}
    for directory, directories, files in os.walk(os.fsencode(str(path))):
        for name in directories + files:
            full = os.path.join(directory, name)
            facts = os.lstat(full)
            content = None
            if stat.S_ISLNK(facts.st_mode):
                content = os.readlink(full)
            elif stat.S_ISREG(facts.st_mode):
                with open(full, "rb") as file:
                    content = file.read()
            mode = None if stat.S_ISLNK(facts.st_mode) else stat.S_IMODE(facts.st_mode)
            times = None if stat.S_ISLNK(facts.st_mode) else facts.st_mtime_ns
            key = os.path.relpath(full, os.fsencode(str(path)))
            found[key] = (stat.S_IFMT(facts.st_mode), mode, times, content)
    return found


@pytest.fixture
def source(tmp_path):
    """A directory with one of each kind that is copied."""
    path = tmp_path / "source"
    (path / "d" / "empty").mkdir(parents=True)
    (path / "f").write_bytes(b"hello\n")
    (path / "f").chmod(0o640)
    (path / "d" / "big").write_bytes(os.urandom(300_000))
    (path / "d" / "none").touch()
    (path / "d" / "link").symlink_to("empty/../big")
    os.utime(path / "f", ns=(1, 1_234_567_890_123_456_789))
    with open(os.fsencode(str(path)) + b"/d/\xff\xfe", "wb") as file:
        file.write(b"no UTF-8")
    (path / "d" / "empty").chmod(0o750)
    return path


def test_a_directory_arrives_with_names_modes_times_links_and_bytes(source, tmp_path):
    result = copy(tmp_path, ["source"], tmp_path, "copy")
    assert tree(tmp_path / "copy") == tree(source)
    assert result["files"] == 5
    assert result["bytes"] == 300_000 + 6 + 8
    assert result["path"] == str(tmp_path / "copy")


# What cp does, by what is copied and what is there: the result, or the problem.
MISSING = "No such file or directory; --mkdir makes it"
CASES = [
    ("f", "new", "new"),
    ("f", "new/", MISSING),
    ("f", "file", "file"),
    ("f", "file/", "Not a directory"),
    ("f", "dir", "dir/f"),
    ("f", "dir/", "dir/f"),
    ("f", ".", "f"),
    ("f", "new/name", MISSING),
    ("f", "file/name", "Not a directory"),
    ("f", "link-to-file", "file"),
    ("f", "link-to-dir", "dir/f"),
    ("f", "dangling", "nowhere"),
    ("d", "new", "new"),
    ("d", "new/", MISSING),
    ("d", "file", "is a file, which a directory does not replace"),
    ("f", "pipe", "is a device, socket or pipe, which a file does not replace"),
    ("d", "dir", "dir/d"),
    ("d", "dir/", "dir/d"),
    ("d", "link-to-dir", "dir/d"),
]


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "target"
    (path / "dir").mkdir(parents=True)
    (path / "file").write_bytes(b"old")
    (path / "link-to-file").symlink_to("file")
    (path / "link-to-dir").symlink_to("dir")
    (path / "dangling").symlink_to("nowhere")
    os.mkfifo(path / "pipe")
    return path


@pytest.mark.parametrize(("what", "where", "expected"), CASES)
def test_places_are_those_of_cp(source, target, what, where, expected):
    before = tree(target)
    try:
        copy(source, [what], target, where)
    except RpcError as error:
        assert error.message.endswith(expected)
        assert tree(target) == before
        return
    placed = target / expected
    if what == "f":
        assert placed.read_bytes() == b"hello\n"
        assert not placed.is_symlink()
    else:
        assert tree(placed) == tree(source / "d")


def test_mkdir_makes_what_is_missing(source, target):
    copy(source, ["f"], target, "a/b/", mkdir=True)
    copy(source, ["f"], target, "c/d/name", mkdir=True)
    assert (target / "a/b/f").read_bytes() == b"hello\n"
    assert (target / "c/d/name").read_bytes() == b"hello\n"
    assert stat.S_IMODE((target / "a").stat().st_mode) == 0o755


def test_mkdir_makes_no_allowed_directory_that_is_missing(source, target):
    below = [str(target / "unmounted")]
    with pytest.raises(moltis.RpcError, match="directory that is allowed is missing"):
        write(
            str(target),
            "unmounted/a/f",
            pieces_of(source, "f"),
            below=below,
            mkdir=True,
        )


def test_several_sources_need_a_directory(source, target):
    copy(source, ["f", "d"], target, "dir", into=True)
    assert (target / "dir/f").is_file()
    assert (target / "dir/d/big").is_file()
    for options in ({}, {"into": True}):
        before = tree(target)
        with pytest.raises(RpcError):
            copy(source, ["f", "d"], target, "new", **options)
        assert tree(target) == before


def test_the_mode_of_what_is_replaced_stays(source, target):
    (target / "file").chmod(0o604)
    copy(source, ["f"], target, "file")
    assert stat.S_IMODE((target / "file").stat().st_mode) == 0o604


def test_setuid_is_not_kept(source, target):
    (source / "f").chmod(0o4755)
    copy(source, ["f"], target, "new")
    assert stat.S_IMODE((target / "new").stat().st_mode) == 0o755


def test_setuid_in_a_foreign_stream_is_not_kept(target):
    info = member("f")
    info.mode = 0o6755
    write(target, "set", archive((info, b"data")))
    assert stat.S_IMODE((target / "set").stat().st_mode) == 0o755


def test_a_directory_is_not_replaced_by_a_file_nor_a_file_by_a_directory(
    source, target
):
    (target / "dir" / "source" / "f").mkdir(parents=True)
    (target / "dir" / "source" / "d").touch()
    notes = []
    copy(source.parent, ["source"], target, "dir", notes)
    assert (target / "dir" / "source" / "f").is_dir()
    assert (target / "dir" / "source" / "d").is_file()
    assert len(notes) == 2
    assert "is a directory, which a file does not replace" in notes[1]


def test_a_pipe_in_a_directory_is_not_replaced_and_the_rest_arrives(source, target):
    os.mkfifo(target / "dir" / "f")
    notes = []
    write(target, "dir", pieces_of(source, "f", "d", notes=notes), notes, into=True)
    assert stat.S_ISFIFO((target / "dir" / "f").lstat().st_mode)
    assert (target / "dir" / "d").is_dir()
    assert [note.partition(": ")[2] for note in notes] == [
        "is a device, socket or pipe, which a file does not replace"
    ]
    assert not list((target / "dir").glob(".moltis-*"))


def test_a_pipe_is_not_replaced_by_a_link(source, target):
    (target / "dir" / "d").mkdir()
    os.mkfifo(target / "dir" / "d" / "link")
    notes = []
    write(target, "dir", pieces_of(source, "d"), notes, into=True)
    assert (target / "dir" / "d" / "link").is_fifo()
    assert (target / "dir" / "d" / "big").exists()
    assert "link: is a device, socket or pipe" in notes[0]


@pytest.mark.parametrize("kind", ["pipe", "link"])
@pytest.mark.parametrize("several", [False, True])
def test_what_another_user_puts_in_place_of_a_file_is_left_alone(
    source, target, kind, several
):
    """Its mode would change, and its owner where a file of theirs is replaced."""
    (target / "dir" / "f").touch(0o666)
    other = target / "other"
    other.touch(0o600)

    def meddled():
        for piece in pieces_of(source, "f", *(["d"] if several else [])):
            yield piece[:-1]
            for path in (target / "dir").glob(".moltis-*"):
                if path.is_file():
                    path.unlink()
                    os.mkfifo(path) if kind == "pipe" else os.link(other, path)
            yield piece[-1:]

    notes = []
    write(target, "dir", meddled(), notes, into=True)
    assert notes == [f"{target}/dir/f: was replaced while it was copied"]
    assert (target / "dir" / "f").read_bytes() == b""
    assert stat.S_IMODE(other.stat().st_mode) == 0o600
    assert (target / "dir" / "d").exists() is several


@pytest.mark.parametrize(("what", "function"), [("mode", "fchmod"), ("time", "utime")])
@pytest.mark.parametrize("where", ["new", "dir"])
def test_what_a_file_system_cannot_set_is_said_and_the_files_are_there(
    source, target, monkeypatch, what, function, where
):
    """Windows drives in WSL and the storage of phones refuse modes."""

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    notes = []
    with monkeypatch.context() as patch:
        patch.setattr(os, function, refuse)
        pieces = pieces_of(source, "f", "d")
        write(target, where, pieces, notes, into=True, mkdir=True)
    assert (target / where / "f").read_bytes() == b"hello\n"
    expected = (source / "d" / "big").read_bytes()
    assert (target / where / "d" / "big").read_bytes() == expected
    assert (target / where / "d" / "empty").is_dir()
    words = f"its {what} could not be set: Operation not permitted"
    assert f"{target}/{where}/f: {words}" in notes
    assert all(note.endswith(words) for note in notes)


def test_a_new_directory_has_its_name_once_all_of_it_has_arrived(source, target):
    seen = []

    def watched(pieces):
        for piece in pieces:
            yield piece
            seen.append(sorted(os.listdir(target / "dir")))

    write(target, "dir", watched(pieces_of(source, "d", "f")), into=True)
    assert sorted(os.listdir(target / "dir")) == ["d", "f"]
    assert any(seen)
    assert all(name.startswith(".moltis-") for names in seen for name in names)
    assert tree(target / "dir" / "d") == tree(source / "d")


def test_a_directory_that_appeared_meanwhile_stays_and_the_rest_arrives(source, target):
    def watched(pieces):
        yield from pieces
        (target / "dir" / "d").mkdir()
        (target / "dir" / "d" / "theirs").touch()

    notes = []
    pieces = watched(pieces_of(source, "d", "f"))
    result = write(target, "dir", pieces, notes, into=True)
    assert (result["files"], os.listdir(target / "dir" / "d")) == (1, ["theirs"])
    assert [note.partition(": ")[2] for note in notes] == [moltis.APPEARED]
    assert sorted(os.listdir(target / "dir")) == ["d", "f"]


@pytest.mark.parametrize("where", ["new", "dir"])
def test_of_two_files_with_one_name_the_first_stays(target, where):
    (target / "dir" / "d").mkdir()
    notes = []
    twice = [(member("d/f"), b"first"), (member("d/f"), b"second")]
    pieces = archive(member("d", tarfile.DIRTYPE), *twice)
    result = write(target, where, pieces, notes)
    below = target / where / ("" if where == "new" else "d")
    assert os.listdir(below) == ["f"]
    assert (below / "f").read_bytes() == b"first"
    assert result["files"] == 1
    assert notes == [f"{below / 'f'}: {moltis.NAMED_TWICE}"]


@pytest.mark.parametrize("where", ["new", "dir"])
def test_a_second_file_of_one_name_that_failed_leaves_the_first(target, where):
    (target / "dir" / "d").mkdir()
    failed = member("d/f")
    failed.pax_headers = {moltis.PAX_FAILED: "1"}
    twice = [(member("d/f"), b"first"), (member("d/f"), b"second"), failed]
    write(target, where, archive(member("d", tarfile.DIRTYPE), *twice))
    below = target / where / ("" if where == "new" else "d")
    assert (below / "f").read_bytes() == b"first"


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE])
def test_a_file_does_not_take_the_name_of_a_new_directory(target, kind, whole):
    notes = []
    second = (member("d", kind, "f"), b"second" if kind == tarfile.REGTYPE else b"")
    first = [member("d", tarfile.DIRTYPE), (member("d/f"), b"first")]
    data, digest = archive(*first, second)
    before = tree(target)
    pieces = [data, digest if whole else bytes(len(digest))]
    with contextlib.nullcontext() if whole else pytest.raises(RpcError):
        assert write(target, "new", pieces, notes)["files"] == 1
    assert notes == [f"{target / 'new'}: {moltis.NAMED_TWICE}"]
    if whole:
        assert (target / "new" / "f").read_bytes() == b"first"
    else:
        assert tree(target) == before  # nothing has its name before the check


def test_a_file_that_its_owner_may_not_read_arrives_in_a_new_directory(
    target, monkeypatch
):
    """Of /etc, say, sent by a node of root to one that is not."""

    def open_as_owner(*args, really=os.open, **options):
        descriptor = really(*args, **options)
        facts, writes = os.fstat(descriptor), args[1] & (os.O_WRONLY | os.O_RDWR)
        if writes or facts.st_mode & stat.S_IRUSR:
            return descriptor
        os.close(descriptor)
        raise PermissionError(errno.EACCES, "Permission denied")

    secret, notes = member("d/shadow"), []
    secret.mode = 0o200
    pieces = archive(member("d", tarfile.DIRTYPE), (secret, b"secret"))
    monkeypatch.setattr(os, "open", open_as_owner)
    assert write(target, "new", pieces, notes)["files"] == 1
    assert notes == []
    assert stat.S_IMODE((target / "new" / "shadow").stat().st_mode) == 0o200


@pytest.mark.parametrize(("name", "call"), [("d", "mkdir"), ("f", "open")])
def test_an_interrupt_right_after_something_was_made_leaves_nothing(
    source, target, monkeypatch, name, call
):
    pieces = list(pieces_of(source, name))
    real = getattr(os, call)

    def interrupted(path, *words, **options):
        result = real(path, *words, **options)
        if str(path).startswith(".moltis-"):
            if call == "open":
                os.close(result)
            monkeypatch.setattr(os, call, real)
            raise KeyboardInterrupt
        return result

    before = sorted(os.listdir(target))
    monkeypatch.setattr(os, call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(target, "new", pieces)
    assert sorted(os.listdir(target)) == before


def test_a_directory_that_is_named_twice_is_made_once(target):
    twice = [(member("d/f"), b"f"), member("d", tarfile.DIRTYPE), (member("d/g"), b"g")]
    notes = []
    write(target, "new", archive(member("d", tarfile.DIRTYPE), *twice), notes)
    assert notes == []
    assert sorted(os.listdir(target / "new")) == ["f", "g"]
    assert not [name for name in os.listdir(target) if name.startswith(".moltis-")]


def test_a_directory_without_recursion_is_refused_with_what_to_say(source):
    with pytest.raises(RpcError, match="is a directory; -r copies directories"):
        list(pieces_of(source, "d", recursive=False))


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(source, target):
    os.mkfifo(source / "pipe")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(source / "socket"))
        notes = []
        write(
            target,
            "dir",
            pieces_of(source, "nope", "pipe", "socket", "f", notes=notes),
            into=True,
        )
    assert [note.rpartition(": ")[2] for note in notes] == [
        "No such file or directory",
        "is neither a file nor a directory",
        "is neither a file nor a directory",
    ]
    assert (target / "dir" / "f").read_bytes() == b"hello\n"


def test_patterns_are_expanded_and_one_without_a_match_is_missing(source, target):
    for name in ("a.log", "b.log", "c.txt"):
        (source / name).write_text(name)
    write(target, "dir", pieces_of(source, "*.log", patterns=True), into=True)
    assert sorted(os.listdir(target / "dir")) == ["a.log", "b.log"]
    with pytest.raises(RpcError, match=r"\*\.png: No such file"):
        list(pieces_of(source, "*.png", patterns=True))


def test_a_file_that_shrinks_is_left_out_and_one_that_grows_is_said(source, target):
    (source / "grows").write_bytes(b"x" * 200_000)
    (source / "shrinks").write_bytes(b"x" * 200_000)
    notes = []

    def meddled():
        pieces = pieces_of(source, "grows", "shrinks", "f", notes=notes)
        for number, piece in enumerate(pieces):
            yield piece
            if number == 1:
                with (source / "grows").open("ab") as file:
                    file.write(b"more")
            elif number == 4:
                os.truncate(source / "shrinks", 100)

    write(target, "dir", meddled(), into=True)
    assert (target / "dir" / "grows").read_bytes() == b"x" * 200_000
    assert sorted(os.listdir(target / "dir")) == ["f", "grows"]
    assert any("grows: changed while it was read" in note for note in notes)
    assert any("shrinks: became shorter" in note for note in notes)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc here")
def test_a_file_that_says_it_is_empty_is_read_to_its_end(target):
    write(target, "new", pieces_of("/proc/self", "status"))
    assert b"VmRSS" in (target / "new").read_bytes()


SHORT = "/sys/kernel/mm/transparent_hugepage/enabled"  # says that it fills a page


@pytest.mark.skipif(not os.path.exists(SHORT), reason="no such /sys here")
@pytest.mark.parametrize("recursive", [False, True])
def test_a_file_that_says_more_than_it_has_is_read_to_its_end(target, recursive):
    with open(SHORT, "rb") as file:
        content = file.read()
    assert len(content) < os.stat(SHORT).st_size
    write(target, "new", pieces_of("/", SHORT, recursive=recursive))
    assert (target / "new").read_bytes() == content


def test_a_directory_that_is_copied_into_itself_is_there_once(source):
    (source / "d" / "e").mkdir()
    before, notes = tree(source / "d"), []
    pieces = pieces_of(source, "d", notes=notes)
    # The writer has its new directory before the reader comes to what it is in.
    write(source, "d/e/copy", itertools.chain([next(pieces)], pieces), notes)
    copied = tree(source / "d" / "e" / "copy")
    assert copied.keys() == before.keys()
    assert len(notes) == 1
    assert "is an incomplete copy; it is left out" in notes[0]


@pytest.mark.parametrize("kind", ["pipe", "shrinks", "removed"])
def test_a_single_file_that_cannot_be_read_is_an_error(source, tmp_path, kind):
    path = source / "f"
    path.write_bytes(b"x" * 300_000)
    notes = []
    pieces = pieces_of(source, "f", recursive=False, notes=notes)
    if kind == "shrinks":
        next(pieces)
        os.truncate(path, 1000)
    else:
        path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(RpcError, match=r"f: (is neither|became shorter|No such file)"):
        list(pieces)
    assert notes == []


@pytest.mark.parametrize("way", ["plain", "bare", "resumed"])
def test_a_single_file_that_cannot_be_written_ends_the_copy_at_once(
    source, target, monkeypatch, way
):
    """What cannot be kept is not sent either: it may be a day's worth."""

    def write_some(_descriptor, _data):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = source / "f"
    with path.open("wb") as file:
        file.truncate(50_000_000)
    pieces = pieces_of(source, "f", recursive=False)
    if way == "bare":
        pieces = moltis.with_digest(iter([bytes(65536)] * 700))
    before, notes = tree(target), []
    with monkeypatch.context() as patch, pytest.raises(RpcError, match="No space"):
        patch.setattr(os, "write", write_some)
        spec = FileWrite(str(target / "new"), bare=way == "bare", origin=origin(path))
        writer = FileTarget(spec, FilePlaces("/"), notes.append, umask=0o022)
        if way == "resumed":
            writer.find_part()
        writer.receive(moltis.one_by_one(pieces))
    assert notes == []
    assert sum(map(len, pieces)) > 40_000_000
    assert tree(target) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-32],
        lambda data: data[:700] + bytes([data[700] ^ 1]) + data[701:],
        lambda data: data[:-32] + bytes(32),
        lambda _data: b"",
        lambda data: data + b"x",
    ],
)
def test_a_stream_that_is_not_whole_changes_nothing(source, target, change):
    before = tree(target)
    data = change(b"".join(pieces_of(source, "f", "d")))
    with pytest.raises(RpcError):
        write(target, "dir", [data], into=True)
    assert {k: v[3] for k, v in tree(target).items()} == {
        k: v[3] for k, v in before.items()
    }


@pytest.mark.parametrize(
    "name", ["/etc/x", "../x", "a/../../x", "a//x", "./x", "..", "a/./b", ""]
)
def test_a_name_that_leads_out_is_refused(target, name):
    before = os.listdir(target)
    good = (member("top", tarfile.DIRTYPE), b"")
    with pytest.raises(RpcError):
        write(target, "dir", archive(good, (member(name), b"evil")), into=True)
    assert os.listdir(target) == before
    assert os.listdir(target / "dir") == []
    assert not os.path.exists(target.parent / "x")


def test_a_link_has_the_hash_that_its_sender_reports(source, target):
    """Where only one directory may be read, the link itself is copied."""
    (source / "link").symlink_to("f")
    spec = FileRead([str(source / "link")], recursive=True)
    reader = FileSource(spec, FilePlaces("/", [str(source)]), pytest.fail)
    spec = FileWrite(str(target / "link"))
    writer = FileTarget(spec, FilePlaces("/"), pytest.fail, umask=0o022)
    result = writer.receive(moltis.one_by_one(reader.pieces()))
    assert os.readlink(target / "link") == "f"
    assert result["sha256"] == reader.result["sha256"]


@pytest.mark.parametrize("link", ["/etc/passwd", "../..", "a/../../../x", ".."])
def test_a_link_that_leads_out_is_left_out(target, link):
    notes = []
    top = member("top", tarfile.DIRTYPE)
    write(target, "dir", archive(top, member("top/l", tarfile.SYMTYPE, link)), notes)
    assert not os.path.lexists(target / "dir/top/l")
    assert "outside of what is copied" in notes[0]


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("top/l", "file"),
        ("top/l", "./sub/../file"),
        ("top/l", "../top/file"),  # out and back in
        ("top/l", "later/inner"),  # through another link of the copy
        ("top/sub/l", ".."),
        ("top/sub/l", "../../top/sub/deep"),
        ("top/l", "{target}/dir/top/file"),
        ("top/sub/l", "{target}/dir/top"),
        ("top/l", "missing"),
    ],
)
def test_a_link_that_stays_inside_is_kept_as_it_is(target, name, link):
    link, notes = link.format(target=target), []
    stream = archive(
        member("top", tarfile.DIRTYPE),
        member("top/sub", tarfile.DIRTYPE),
        member("top/sub/deep", tarfile.DIRTYPE),
        (member("top/file"), b"1"),
        member(name, tarfile.SYMTYPE, link),
        member("top/later", tarfile.SYMTYPE, "sub"),
    )
    write(target, "dir", stream, notes)
    assert notes == []
    assert os.readlink(target / "dir" / name) == link


@pytest.mark.parametrize(
    "link",
    [
        "a/../../../x",  # by its text it is top/x
        "a/..",
        "../../dir/top",
        "../top/../../x",
        "{target}",
        "{target}/dir/top/../../x",
        "{target}/dir/topmost",
        "//etc/passwd",
        "",
    ],
)
def test_a_link_that_leads_out_through_another_one_is_left_out(target, link):
    """In any order, in one copy or in two."""
    notes, top = [], member("top", tarfile.DIRTYPE)
    deep = [member(f"top/{name}", tarfile.DIRTYPE) for name in ("b", "b/c", "b/c/d")]
    via = member("top/a", tarfile.SYMTYPE, "b/c/d/../../..")
    evil = member("top/l", tarfile.SYMTYPE, link.format(target=target))
    write(target, "dir", archive(top, *deep, via, evil), notes)
    write(target, "dir", archive(top, evil), notes)
    write(target, "dir", archive(top, evil, *deep, via), notes)
    assert not os.path.lexists(target / "dir/top/l")
    assert (target / "dir/top/a").resolve() == target / "dir/top"
    assert len(notes) == 3


def test_nothing_is_written_through_a_link_in_the_stream_or_at_the_target(target):
    outside = target.parent / "outside"
    outside.mkdir()
    (target / "dir" / "top").mkdir()
    (target / "dir" / "top" / "sub").symlink_to(outside)
    notes = []
    stream = archive(
        member("top", tarfile.DIRTYPE),
        member("top/made", tarfile.SYMTYPE, "../dir"),
        (member("top/made/x"), b"evil"),
        member("top/sub", tarfile.DIRTYPE),
        (member("top/sub/x"), b"evil"),
        (member("top/ok"), b"fine"),
    )
    write(target, "dir", stream, notes)
    assert os.listdir(outside) == []
    assert (target / "dir/top/ok").read_bytes() == b"fine"
    assert not (target / "dir/x").exists()


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.LNKTYPE])
def test_devices_pipes_and_hard_links_are_not_made(target, kind):
    notes = []
    write(target, "dir", archive(member("x", kind, "y"), (member("f"), b"1")), notes)
    assert os.listdir(target / "dir") == ["f"]
    assert "neither a file nor a directory" in notes[0]


@pytest.mark.parametrize(
    "block",
    [
        b"\xff" * 512,
        b"y" + tarfile.TarInfo("x").tobuf()[1:],
        moltis.tar_header("x", os.stat("/"), b"x", size=10 * 2**20),
    ],
    ids=["noise", "checksum", "a long extended header"],
)
def test_what_is_no_archive_is_one_sentence(target, block):
    data = block + bytes(1024)
    with pytest.raises(RpcError) as caught:
        write(target, "dir", [data, hashlib.sha256(data).digest()])
    assert len(caught.value.message) < 300
    assert os.listdir(target / "dir") == []


def test_only_allowed_directories_are_read_and_written(source, target):
    below = (str(target / "dir"),)
    (target / "dir" / "out").symlink_to(source)
    (target / "dir" / "f").write_bytes(b"mine")
    (target / "dir" / "leak").symlink_to(target / "file")
    for path in ("../file", "/etc/passwd", "out/f", "leak", "~/x", ".."):
        with pytest.raises(RpcError):
            pieces_of(target / "dir", path, below=below, recursive=False)
    assert b"old" not in b"".join(pieces_of(target / "dir", "leak", below=below))
    for path in ("../new", "/tmp/x", "out/new", "out/"):
        with pytest.raises(RpcError):
            write(target / "dir", path, pieces_of(source, "f"), below=below)
    assert not (source / "new").exists()
    assert b"mine" in b"".join(pieces_of(target / "dir", "f", below=below))
    write(target / "dir", "copy", pieces_of(source, "f"), below=below)
    assert (target / "dir" / "copy").read_bytes() == b"hello\n"
    # A link at the target itself is replaced, not followed.
    write(target / "dir", "leak", pieces_of(source, "f"), below=below)
    assert (target / "file").read_bytes() == b"old"


def test_an_allowed_directory_is_read_whole_by_its_own_name(source):
    below = (str(source),)
    whole = b"".join(pieces_of(source, ".", below=below))
    assert b"hello" in whole
    assert b"hello" in b"".join(pieces_of(source, str(source), below=below))


def test_no_name_or_size_behind_a_link_out_of_an_allowed_directory_is_told(
    source, target
):
    inside = target / "dir"
    (inside / "out").symlink_to(source)
    (inside / "own").mkdir()
    (inside / "own" / "f").write_bytes(b"mine")
    places, notes = moltis.FilePlaces(str(inside), (str(inside),)), []
    for pattern in ("out/*", "out/d/b*", "*/d/b*", "o*/d"):
        with pytest.raises(RpcError) as caught:
            list(pieces_of(inside, pattern, patterns=True, below=[str(inside)]))
        assert caught.value.message.startswith(f"{inside}/{pattern}: ")
    wanted = moltis.FileRead(("*/f",), patterns=True)
    assert moltis.FileSource(wanted, places, notes.append).measure() == 4
    everything = moltis.FileRead((".", "out"), recursive=True)
    assert moltis.FileSource(everything, places, notes.append).measure() < 10_000
    assert notes == []


def test_no_kind_behind_a_link_out_of_an_allowed_directory_is_told(source, tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "file").touch()
    os.mkfifo(outside / "pipe")
    (inside / "link").symlink_to(outside)
    for path in ("d", "f"):
        problems = set()
        for name in ("file", "pipe", "none"):
            pieces = pieces_of(source, path)
            with pytest.raises(RpcError) as caught:
                write(inside, f"link/{name}", pieces, below=[str(inside)])
            problems.add(caught.value.message)
        assert len(problems) == 1, problems


def test_patterns_look_behind_links_where_all_may_be_read(source, target):
    (target / "dir" / "out").symlink_to(source)
    (target / "dir" / ".hidden").write_bytes(b"hidden")
    write(target, "dir", pieces_of(target / "dir", "o*/[!d]", patterns=True))
    assert (target / "dir" / "f").read_bytes() == b"hello\n"
    found = b"".join(pieces_of(target / "dir", "*", patterns=True))
    assert b"hidden" not in found
    assert b"hidden" in b"".join(pieces_of(target / "dir", ".h*", patterns=True))


NAMES = st.binary(min_size=1, max_size=40).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
)
NODES = st.recursive(
    st.tuples(st.binary(max_size=3000), st.integers(0o400, 0o777)),
    lambda children: st.dictionaries(NAMES, children, max_size=5),
    max_leaves=12,
)


def build(path, node):
    if isinstance(node, dict):
        os.mkdir(path)
        for name, child in node.items():
            build(os.path.join(path, name), child)
        return
    with open(path, "wb") as file:
        file.write(node[0])
    os.chmod(path, node[1])


@settings(max_examples=40)
@given(st.dictionaries(NAMES, NODES, max_size=5))
def test_any_tree_arrives_as_it_is(tmp_path_factory, node):
    base = tmp_path_factory.mktemp("any")
    build(os.fsencode(str(base / "a")), node)
    notes = []
    copy(base, ["a"], base, "b", notes)
    assert notes == []
    assert tree(base / "b") == tree(base / "a")


# -- against a model of README's table ---------------------------------------------

# Nodes: ("file", content, mode), ("link", target), ("pipe",), or a dict: a directory.
ODD_NAMES = ["a", "b", "-", "--help", "a\nb", "C:\\x", "ü", "\udcff", ".h", "x" * 255]
LINKS = ["a", "b/a", "..", "../a", "../../a", "/etc/passwd", "./b/../a", "-"]
LEAVES = st.one_of(
    st.tuples(st.just("file"), st.binary(max_size=9), st.sampled_from([0o400, 0o755])),
    st.tuples(st.just("link"), st.sampled_from(LINKS)),
    st.just(("pipe",)),
)
TREES = st.recursive(
    LEAVES,
    lambda below: st.dictionaries(st.sampled_from(ODD_NAMES), below, max_size=3),
    max_leaves=6,
)


def make(path, node):
    if isinstance(node, dict):
        os.mkdir(path)
        for name, below in node.items():
            make(os.path.join(path, name), below)
    elif node[0] == "file":
        with open(path, "wb") as file:
            file.write(node[1])
        os.chmod(path, node[2])
    elif node[0] == "link":
        os.symlink(node[1], path)
    else:
        os.mkfifo(path)


def found_at(path):
    mode = os.lstat(path).st_mode
    if stat.S_ISDIR(mode):
        return {name: found_at(os.path.join(path, name)) for name in os.listdir(path)}
    if stat.S_ISLNK(mode):
        return ("link", os.readlink(path))
    if stat.S_ISFIFO(mode):
        return ("pipe",)
    with open(path, "rb") as file:
        return ("file", file.read(), stat.S_IMODE(mode))


def stays_inside(link, above, top):
    """Whether a link in the directory `above`, of names below `top`, leads nowhere else
    than into the first of them, whatever becomes of other links."""
    at, named = list(above), False
    for part in link.split("/"):
        if part == "..":
            below = top
            for name in at if named else ():
                below = below.get(name) if isinstance(below, dict) else None
            if not at or not isinstance(below, dict):
                return False
            at.pop()
        elif part != ".":
            at.append(part)
            named = True
    return not link.startswith("/") and at[:1] == list(above[:1])


def put(directory, name, node, left_out, links, above=()):
    """Put a copy into a directory of the model, as README says; links come later."""
    there = directory.get(name)
    if isinstance(node, dict):
        if there is not None and not isinstance(there, dict):
            left_out.append(name)
            return
        below = directory.setdefault(name, {})
        for each, child in node.items():
            put(below, each, child, left_out, links, (*above, name))
    elif node[0] == "link":
        links.append((directory, name, node, above))
    elif (
        node == ("pipe",)
        or isinstance(there, dict)
        or (there == ("pipe",) and node[0] == "file")
    ):
        left_out.append(name)
    elif there is not None and there[0] == "file":
        directory[name] = (*node[:2], there[2])  # its permissions win
    else:
        directory[name] = node


def copied(sources, target, slash):
    """Return what is at the target's parent afterwards, whether it is refused, and
    what is left out."""
    there, left_out, links = {} if target is None else {"target": target}, [], []
    into = len(sources) > 1 or slash or isinstance(target, dict)
    if into and not isinstance(target, dict):
        return there, True, left_out
    for name, node in sources.items():
        if into:
            put(there["target"], name, node, left_out, links)
        elif target is not None and (isinstance(node, dict) or target == ("pipe",)):
            return there, True, left_out
        else:
            put(there, "target", node, left_out, links)
    for directory, name, node, above in links:
        top = there["target"] if into else there
        if isinstance(directory.get(name), dict) or not stays_inside(
            node[1], above, top
        ):
            left_out.append(name)
        else:
            directory[name] = node
    return there, False, left_out


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(ODD_NAMES),
        TREES.filter(lambda node: isinstance(node, dict) or node[0] == "file"),
        min_size=1,
        max_size=2,
    ),
    st.none() | TREES.filter(lambda node: isinstance(node, dict) or node[0] != "link"),
    st.booleans(),
)
def test_what_is_there_afterwards_is_what_the_table_says(
    tmp_path_factory, sources, target, slash
):
    base = tmp_path_factory.mktemp("model")
    make(str(base / "from"), sources)
    (base / "to").mkdir()
    if target is not None:
        make(str(base / "to" / "target"), target)
    expected, refused, left_out = copied(sources, copy_of(target), slash)
    notes, path = [], "to/target/" if slash else "to/target"
    try:
        paths = [f"from/{name}" for name in sources]
        copy(base, paths, base, path, notes, into=len(sources) > 1)
    except RpcError as error:
        assert refused, error
        assert "\n" not in str(error)
    else:
        assert not refused
        assert bool(notes) == bool(left_out)
    assert found_at(str(base / "to")) == expected
    assert found_at(str(base / "from")) == sources
    shutil.rmtree(base)


def copy_of(node):
    """Return a tree whose directories can be changed apart."""
    if isinstance(node, dict):
        return {name: copy_of(below) for name, below in node.items()}
    return node


@pytest.mark.parametrize("target", ["file", "dir", "gone"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_link_that_was_typed_as_target_is_followed(tmp_path, target, slash):
    (tmp_path / "f").write_bytes(b"new")
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to(target)
    place = {"file": "file", "dir": "dir/f", "gone": "gone"}[target]
    if slash and target != "dir":
        with pytest.raises(RpcError):
            copy(tmp_path, ["f"], tmp_path, "link/")
        assert (tmp_path / "file").read_bytes() == b"old"
        return
    copy(tmp_path, ["f"], tmp_path, f"link{slash}")
    assert (tmp_path / place).read_bytes() == b"new"
    assert os.readlink(tmp_path / "link") == target


# -- names -------------------------------------------------------------------------


def test_names_of_255_bytes_arrive_and_longer_ones_are_one_sentence(tmp_path):
    longest = "ü" * 127 + "x"
    (tmp_path / longest).write_bytes(b"1")
    copy(tmp_path, [longest], tmp_path, "copy")
    (tmp_path / "dir").mkdir()
    copy(tmp_path, [longest], tmp_path, "dir/")
    assert os.listdir(tmp_path / "dir") == [longest]
    for path in (longest + "y", f"{longest}y/f", "d/" * 3000 + "f"):
        with pytest.raises(RpcError, match=os.strerror(errno.ENAMETOOLONG)) as caught:
            copy(tmp_path, ["copy"], tmp_path, path)
        assert "\n" not in str(caught.value)
        with pytest.raises(RpcError, match=os.strerror(errno.ENAMETOOLONG)) as caught:
            copy(tmp_path, [path], tmp_path, "copy")
        assert "\n" not in str(caught.value)
    notes = []
    too_long = [(member("d/" + "x" * 256), b"1"), (member("d/f"), b"2")]
    write(tmp_path, "dir/", archive(member("d", tarfile.DIRTYPE), *too_long), notes)
    assert len(notes) == 1
    assert os.strerror(errno.ENAMETOOLONG) in notes[0]
    assert "\n" not in notes[0]
    assert os.listdir(tmp_path / "dir" / "d") == ["f"]


def test_a_tree_deeper_than_a_path_may_be_long_arrives(tmp_path):
    """Each step is relative to a directory: PATH_MAX is 4,096."""
    name, depth = "x" * 200, 30
    for top in ("deep", "copy"):
        (tmp_path / top).mkdir()
    here = os.open(tmp_path / "deep", os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=here)
        here = moltis.descend(here, [name])
    with open(os.open("f", os.O_WRONLY | os.O_CREAT, dir_fd=here), "wb") as file:
        file.write(b"below")
    os.close(here)
    notes = []
    copy(tmp_path, ["deep"], tmp_path, "copy", notes)
    assert notes == []
    here = os.open(tmp_path / "copy" / "deep", os.O_RDONLY)
    here = moltis.descend(here, [name] * depth)
    with open(os.open("f", os.O_RDONLY, dir_fd=here), "rb") as file:
        assert file.read() == b"below"
    os.close(here)
    for top in ("deep", "copy"):
        change(tmp_path, "delete", top, recursive=True)


@pytest.fixture
def caseless(monkeypatch):
    """File systems that cannot tell A from a, as those of macOS: each name is small."""

    for name in ("mkdir", "open", "stat", "unlink"):
        function = getattr(os, name)

        def call(path, *args, _function=function, **options):
            path = path.lower() if "dir_fd" in options else path
            return _function(path, *args, **options)

        monkeypatch.setattr(os, name, call)
    rename, symlink = os.rename, os.symlink
    monkeypatch.setattr(os, "rename", lambda a, b, **o: rename(a, b.lower(), **o))
    monkeypatch.setattr(os, "symlink", lambda a, b, **o: symlink(a, b.lower(), **o))


def entries(*names):
    """Return members of an archive: `d/` directories, `l=` links, and files."""
    for name in names:
        if name.endswith("/"):
            yield member(name[:-1], tarfile.DIRTYPE)
        elif "=" in name:
            yield member(name.split("=")[0], tarfile.SYMTYPE, name.split("=")[1])
        else:
            yield member(name), name.encode()


@pytest.mark.parametrize(
    ("names", "left_out", "there"),
    [
        (
            ["d/", "d/Makefile", "d/makefile"],
            ["d/makefile"],
            {"makefile": b"d/Makefile"},
        ),
        (["d/", "d/S/", "d/S/x", "d/s/", "d/s/x"], ["d/s"], {"s": {"x": b"d/S/x"}}),
        (["d/", "d/f", "d/F=f"], ["d/F"], {"f": b"d/f"}),
        (["d/", "d/L=x", "d/l=y"], ["d/l"], {"l": "x"}),
        (["d/", "d/S/", "d/s"], ["d/s"], {"s": {}}),
    ],
)
@pytest.mark.usefixtures("caseless")
def test_names_that_differ_only_in_case_are_refused_where_they_are_the_same(
    tmp_path, names, left_out, there
):
    (tmp_path / "to").mkdir()
    notes = []
    write(tmp_path, "to", archive(*entries(*names)), notes)
    assert [note.partition(": ")[0] for note in notes] == [
        f"{tmp_path}/to/{name}" for name in left_out
    ]

    def found(path):
        if path.is_symlink():
            return os.readlink(path)
        if path.is_dir():
            return {each.name: found(each) for each in path.iterdir()}
        return path.read_bytes()

    assert found(tmp_path / "to") == {"d": there}


def test_two_files_of_one_name_do_not_replace_each_other(tmp_path):
    """As with cp: `cp a/f b/f there/`."""
    for directory in ("a", "b"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "f").write_text(directory)
    (tmp_path / "to").mkdir()
    notes = []
    copy(tmp_path, ["a/f", "b/f"], tmp_path, "to", notes, into=True)
    (note,) = notes
    assert "to/f: two files of this name are copied; only the first is there" in note
    assert os.listdir(tmp_path / "to") == ["f"]
    assert (tmp_path / "to" / "f").read_text() == "a"


@settings(max_examples=50)
@given(
    st.text(
        st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1
    ).map(lambda name: name.strip("/").replace("//", "") or "x"),
    st.integers(-(2**40), 2**40),
    st.sampled_from([0, 5, 8 * 2**30 - 1, 8 * 2**30, 2**50]),
    st.integers(0, 0o777),
)
def test_other_programs_read_our_headers(name, mtime_ns, size, mode):
    name = f"{name}/{'d' * (1 + mtime_ns % 120)}"
    facts = os.stat_result((mode, *[0] * 9), {"st_mtime_ns": mtime_ns})
    for kind, link in ((b"0", ""), (b"5", ""), (b"2", f"{name}é")):
        length = size if kind == b"0" else 0
        data = moltis.tar_header(name, facts, kind, size=length, link=link)
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            [info] = [tar.next()]
        found = (info.name, info.size, info.mode, info.linkname, info.type)
        assert found == (name, length, mode, link, kind)
        assert abs(info.mtime * 10**9 - mtime_ns) < 1000 + abs(mtime_ns) / 10**12


def test_tar_reads_what_we_send(source, tmp_path):
    if shutil.which("tar") is None:
        pytest.skip("there is no tar here")
    data = b"".join(pieces_of(source.parent, "source"))[:-32]
    (tmp_path / "there").mkdir()
    command = ["tar", "-xpf", "-", "-C", str(tmp_path / "there")]
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "there" / "source") == tree(source)


# -- between machines ------------------------------------------------------------


@pytest.fixture(scope="module")
def still_world(tmp_path_factory):
    with World(tmp_path_factory.mktemp("cp"), silent=False) as world:
        yield world


@pytest.fixture
def world(still_world, tmp_path):
    still_world.scratch = tmp_path
    return still_world


def cp(world, *words, stdin=b""):
    call = Call(world, ["node", "cp", *map(str, words)], stdin)
    call.wait()
    return call


def test_files_go_both_ways_and_between_nodes(world):
    (world.scratch / "s").mkdir()
    (world.scratch / "s" / "f").write_bytes(os.urandom(3_000_000))
    expected = tree(world.scratch / "s")
    for source, target, placed in (
        ("{}/s", "far:{}/up", "up"),
        ("far:{}/up", "{}/down", "down"),
        ("far:{}/down", "Local:{}/across", "across"),
    ):
        call = cp(
            world, "-r", source.format(world.scratch), target.format(world.scratch)
        )
        assert (call.status, call.output, call.complaints) == (0, b"", "")
        assert tree(world.scratch / placed) == expected


@pytest.mark.parametrize("name", ["-", "--help", "a\nb", "C:\\x", "a:b", "\udcff"])
def test_odd_names_go_both_ways(world, name):
    for directory in ("here", "there", "back"):
        (world.scratch / directory).mkdir()
    (world.scratch / "here" / name).write_bytes(b"odd")
    far = f"far:{world.scratch}/there"
    assert cp(world, world.scratch / "here" / name, f"{far}/").status == 0
    assert cp(world, f"{far}/{name}", world.scratch / "back").status == 0
    assert os.listdir(world.scratch / "back") == [name]
    assert (world.scratch / "back" / name).read_bytes() == b"odd"


def test_names_that_begin_with_a_dash_follow_two(world):
    name = f"--{world.scratch.name}"
    (world.directory / name).write_bytes(b"odd")
    call = cp(world, "--", name, f"far:{world.scratch}/copy")
    assert (call.status, call.complaints) == (0, "")
    assert (world.scratch / "copy").read_bytes() == b"odd"


def test_a_pipe_goes_in_and_comes_out(world):
    path = f"far:{world.scratch}/piped"
    assert cp(world, "-", path, stdin=b"a\0b" * 100_000).status == 0
    call = cp(world, path, "-")
    assert (call.status, call.output) == (0, b"a\0b" * 100_000)


def test_json_says_what_was_copied_to_each_node(world):
    (world.scratch / "f").write_bytes(b"hello\n")
    call = cp(
        world,
        "--json",
        world.scratch / "f",
        f"far,Local:{world.scratch}/copy",
    )
    first, second = json.loads(call.output)
    digest = hashlib.sha256(b"hello\n").hexdigest()
    assert first["destination"] == f"far:{world.scratch}/copy"
    assert second["destination"] == f"Local:{world.scratch}/copy"
    assert (first["files"], first["bytes"], first["sha256"]) == (1, 6, digest)


@pytest.mark.parametrize(
    ("words", "status", "problem"),
    [
        (["{}/f", "nobody:x"], 1, "there is no node 'nobody'"),
        (["{}/f", "far:{}/none/"], 1, "No such file or directory; --mkdir makes it"),
        (["far:{}/none", "."], 1, "none: No such file or directory"),
        (["far:/dev/null", "."], 1, "null: is neither a file nor a directory"),
        (["/dev/null", "far:{}/x"], 1, "null: is neither a file nor a directory"),
        (["{}/f", "far:{}/" + "x" * 256], 1, "File name too long"),
        (["{}", "far:"], 1, "is a directory; -r copies directories"),
        (["{}/f", "{}/g"], 2, "one side has to be on a node"),
        (["{}/f"], 2, "name what to copy and where to"),
        (["-", "far:{}"], 1, "is a directory; name the file in it as well"),
        (["far:{}", "-", "-r"], 2, "- takes one file only"),
        # Of this machine too: 77 is for keys and tokens.
        (["--mkdir", "far:{}/f", "/proc/none/"], 1, "/proc/none: "),
    ],
)
def test_what_cannot_be_copied_is_one_sentence(world, words, status, problem):
    (world.scratch / "f").write_bytes(b"hello\n")
    before = tree(world.scratch)
    call = cp(world, *(word.format(world.scratch) for word in words))
    assert problem in call.complaints
    assert call.complaints.count("\n") == 1
    assert (call.status, call.output) == (status, b"")
    assert tree(world.scratch) == before


def test_what_was_left_out_is_listed_and_the_status_says_so(world):
    (world.scratch / "s").mkdir()
    (world.scratch / "s" / "f").write_bytes(b"1")
    os.mkfifo(world.scratch / "s" / "pipe")
    call = cp(world, "-r", f"far:{world.scratch}/s", world.scratch / "copy")
    assert call.status == 1
    assert "s/pipe: is neither a file nor a directory" in call.complaints
    assert (world.scratch / "copy" / "f").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("source", "target", "command", "where"),
    [
        ("{}/f", "far:{}/there", "write {}/there", "1 file ({}/there)"),
        ("{}/f", "far:{}/dir/", "write {}/dir/", "1 file ({}/dir/f)"),
        ("{}/d", "far:{}/dir", "write {}/dir", "2 files ({}/dir/d)"),
        ("far:{}/f", "{}/here", "read {}/f", "1 file ({}/f)"),
        ("far:{}/d/*", "{}/dir", "read {}/d/*", "2 files ({}/d/a and 1 more)"),
    ],
)
def test_the_audit_has_which_file_which_way_size_hash_and_by_whom(
    world, source, target, command, where
):
    for name in ("f", "d/a", "d/b", "dir/x"):
        (world.scratch / name).parent.mkdir(exist_ok=True)
        (world.scratch / name).write_bytes(b"x" * 1000)
    call = cp(
        world, "-r", "--json", *(w.format(world.scratch) for w in (source, target))
    )
    (copied,) = json.loads(call.output)
    row = world.rpc("job.list", limit=1)[0]
    assert row["command"] == command.format(world.scratch)
    if copied["files"] == 1:  # what sha256sum says of the file
        assert copied["sha256"] == hashlib.sha256(b"x" * 1000).hexdigest()
    facts = f"{copied['bytes']:,} bytes, SHA-256 {copied['sha256']}"
    assert row["reason"] == f"{where.format(world.scratch)}, {facts}"
    assert (row["callerName"], row["callerKind"]) == ("owner", "shell")
    assert row["result"]["sha256"] == copied["sha256"]
    (entry,) = world.rpc("audit.list", limit=1)
    assert (entry["jobId"], entry["reason"]) == (row["id"], row["reason"])


@pytest.mark.parametrize(
    "result",
    [
        {"sha256": "no hash"},
        {"files": -1},
        {"bytes": 2**70},
        {"files": "7"},
        {"firstNotes": 7},
        {"path": "a\0b"},
    ],
)
def test_what_a_node_reports_of_a_transfer_is_checked(result):
    good = {"files": 1, "bytes": 2, "sha256": "0" * 64}
    assert moltis.Transfer.of({**good, **result}) is None
    noisy = {**good, "notes": 9, "firstNotes": ["a\x1b[2J" + "x" * 9000] * 9}
    found = moltis.Transfer.of({**noisy, "path": "x" * 100_000})
    assert len(found.to_json()["firstNotes"]) == 3
    assert "\x1b" not in found.words()
    assert len(found.words()) < 1200


def test_a_key_that_reads_cannot_read_files(world):
    key = world.rpc("keys.create", name="reader", scopes=["operator.read"])["key"]
    owner = moltis.OperatorClient(world.direct_url, world.api_key)
    reader = moltis.OperatorClient(world.direct_url, key)
    with owner, reader:
        request = {"work": "file.read", "spec": {"paths": ["/etc/passwd"]}}
        started = {**request, "jobs": [{"id": moltis.new_id(), "node": "far"}]}
        with pytest.raises(moltis.Refused):
            reader.call("job.start", {**started, "keep": True})
        (job,) = owner.call("job.start", {**started, "keep": True})["jobs"]
        owner.call("job.wait", {"id": job["id"]})
        for method in ("job.follow", "job.read"):
            with pytest.raises(moltis.Refused, match=r"operator\.write"):
                reader.call(method, {"id": job["id"]})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("way", ["up", "down"])
def test_an_interrupted_copy_leaves_nothing(world, way, number):
    (world.scratch / "from").mkdir()
    with (world.scratch / "from" / "big").open("wb") as file:
        file.truncate(3 * 2**30)
    (world.scratch / "there").mkdir()
    source, target = f"{world.scratch}/from", f"{world.scratch}/there/"
    places = [source, f"far:{target}"] if way == "up" else [f"far:{source}", target]
    call = Call(world, ["node", "cp", "-r", *places])
    wait_for(lambda: os.listdir(world.scratch / "there"))
    call.signal(number)
    assert call.wait() == 128 + number
    wait_for(lambda: not os.listdir(world.scratch / "there"))


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (["far,Local:{}/f"], "Local:{}/f would replace the f of another source"),
        (["far:{}/f", "Local:{}/d/f"], "Local:{}/d/f would replace the f of another"),
        (["far,Local:{}/*"], "far:{}/* may have names that other sources have as well"),
        (["far,Local:{}/d/."], "Local:{}/d/. would replace the d of another source"),
        (["far,Local:."], "far:. may have names that other sources have as well"),
    ],
)
def test_files_of_one_name_from_two_machines_are_refused(world, sources, words):
    """A copy of one machine does not know what that of another has written."""
    (world.scratch / "f").write_text("f")
    (world.scratch / "d").mkdir()
    target = world.scratch / "there"
    target.mkdir()
    paths = [source.format(world.scratch) for source in sources]
    call = Call(world, ["node", "cp", "-r", *paths, str(target)])
    assert call.wait() == 2
    assert words.format(world.scratch) in call.complaints
    assert os.listdir(target) == []


WAYS = {
    "up": ("{}/big", "far:{}/copy"),
    "down": ("far:{}/big", "{}/copy"),
    "across": ("far:{}/big", "Local:{}/copy"),
}


@pytest.mark.parametrize("seed", range(int(os.environ.get("MOLTIS_SEEDS", "1"))))
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_whose_lines_are_cut_ten_times_arrives_as_it_was(world, way, seed):
    """At any moment: in a handshake, in the middle, and about the ending."""
    rng = random.Random(f"{way} {seed}")
    size = 24_000_000
    (world.scratch / "big").write_bytes(
        rng.getrandbits(8 * 65536).to_bytes(65536, "big") * (size // 65536)
    )
    size = (world.scratch / "big").stat().st_size
    proxies = (world.node_proxy, world.operator_proxy)

    def arrived():
        names = parts(world.scratch) or ["copy"]
        with contextlib.suppress(FileNotFoundError):
            return (world.scratch / names[0]).stat().st_size
        return 0

    call = Call(world, ["node", "cp", *(w.format(world.scratch) for w in WAYS[way])])
    # Before that, an operator whose gateway hangs up is told so.
    wait_for(lambda: parts(world.scratch) or call.status is not None)
    for number in range(10):
        proxy = rng.choice(proxies)
        count = rng.choice((rng.randrange(1500), rng.randrange(size // 12)))
        direction = None
        if number >= 8:  # about the ending
            count = max(0, size - arrived()) + rng.randrange(2000)
            direction = DOWN if way == "down" or proxy is world.node_proxy else UP
        proxy.cut_after(count, direction)
        proxy.wait_until_cut(call.process)
    for proxy in proxies:
        proxy.heal()
    assert call.wait() == 0, call.complaints
    assert (world.scratch / "copy").read_bytes() == (world.scratch / "big").read_bytes()
    assert parts(world.scratch) == []


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"files": False}, False),
        ({"allow": ["uptime"]}, False),
        ({"allow": ["uptime"], "allow_files": ["here"]}, True),
        ({"allow_files": ["here"]}, True),
    ],
)
def test_the_owner_of_a_node_decides_which_files_are_shared(tmp_path, options, allowed):
    here = tmp_path / "here"
    here.mkdir()
    if "allow_files" in options:
        options = {**options, "allow_files": [str(here)]}
    with World(tmp_path, silent=False) as world:
        known = moltis.NodeSettings.load(world.node_data)
        world.node.end()
        known.replace(**options).save(world.node_data)
        world.node.start()
        world.wait_for_node()
        (tmp_path / "f").write_bytes(b"1")
        inside = cp(world, tmp_path / "f", f"far:{here}/f")
        outside = cp(world, f"far:{tmp_path}/f", tmp_path / "g")
        assert (inside.status == 0) is allowed
        assert outside.status != 0
        assert "this machine's owner" in outside.complaints


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path):
    if not SmallDisk.can_be_made():
        pytest.skip("no file systems can be mounted here")
    with World(tmp_path, small_disks=True, silent=False) as world:
        (tmp_path / "big").write_bytes(bytes(64 * 2**20))
        before = os.listdir(world.node_data)
        call = cp(world, tmp_path / "big", f"far:{world.node_data}/big")
        assert call.status == 1
        assert call.complaints.count("big: No space left on device") == 1
        row = world.rpc("job.list", limit=1)[0]
        assert row["state"] == "failed"
        assert row["reason"] == f"{world.node_data}/big: No space left on device"
        assert sorted(os.listdir(world.node_data)) == sorted(before)


def test_scp_agrees_on_what_a_colon_means():
    def read(text):
        place = moltis.copy_place(text, None)
        return place.nodes, place.path

    assert read("pi:x") == (("pi",), "x")
    assert read("pi:") == (("pi",), ".")
    assert read("a,b:/x:y") == (("a", "b"), "/x:y")
    assert read("./a:b") == ((), "./a:b")
    assert read("/a:b") == ((), "/a:b")
    assert read(":b") == ((), ":b")
    assert moltis.copy_place("pi:x", "/srv").path == "/srv/x"
    assert moltis.copy_place("pi:/x", "/srv").path == "/x"


@pytest.mark.parametrize("name", ["web:1", "web,1"])
def test_a_node_whose_name_cannot_stand_before_a_path_is_copied_to_by_its_id(
    world, tmp_path, name
):
    (tmp_path / "file").write_text("text")
    before = f"second-{ord(name[3])}"
    node_id = f"id-of-{before}"
    with other_node(world, before):
        world.rpc("node.rename", nodeId=node_id, displayName=name)
        call = cp(world, tmp_path / "file", f"{name}:{tmp_path}/copy")
        assert call.status == moltis.EXIT_USAGE
        assert f"{name!r} cannot stand before a path" in call.complaints
        assert call.complaints.strip().endswith(f"use the node's id: {node_id}")
        call = cp(world, tmp_path / "file", f"{node_id}:{tmp_path}/copy")
        assert call.status == moltis.EXIT_OK, call.complaints
    assert (tmp_path / "copy").read_text() == "text"


# -- resuming ------------------------------------------------------------------------

BIG = 12 * 2**20  # bytes; more than twice MIN_PART


def origin(path):
    identity = moltis.file_identity(str(path), os.stat(path))
    return moltis.FileOrigin(moltis.encode_path(path.name), identity, resumes=True)


def open_part(parent, path):
    identity = moltis.file_identity(str(path), os.stat(path))
    names = moltis.part_names(path.name, identity)
    return moltis.PartialFile(parent, names, resumes=True)


def resumed(path, target, stop=None, said=None, resumes=True, places=None):
    """Copy a file into `target` until `stop` bytes; return the bytes that were sent."""
    said, sent = [] if said is None else said, 0
    hooks = moltis.TransferHooks(say=said.append)
    spec = FileWrite(str(target), origin=origin(path) if resumes else None)
    writer = FileTarget(spec, FilePlaces("/"), said.append, umask=0o022, hooks=hooks)
    part = writer.find_part() if resumes else None
    reader = FileSource(
        FileRead([str(path)], after=part),
        FilePlaces("/"),
        said.append,
        hooks=hooks,
    )
    pieces = reader.pieces()

    def read(_size):
        nonlocal sent
        if stop is not None and sent >= stop:
            raise KeyboardInterrupt
        piece = next(pieces, b"")
        sent += len(piece)
        return piece

    try:
        writer.receive(read)
    except KeyboardInterrupt:
        assert stop is not None
    return sent


READERS = {
    "copy": lambda path: list(pieces_of("/", str(path), recursive=False)),
    "tool": lambda path: moltis.TextSource(
        FileRead([str(path)], part=moltis.FilePart(1, 1)), FilePlaces("/")
    ).read(lambda: None),
    "change": lambda path: moltis.SplicedFile(
        FileWrite(str(path), splices=[]), FilePlaces("/"), print, umask=0o022
    ).write(),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["moltis.db", "link", "other name"])
def test_a_database_that_is_open_here_keeps_its_locks(tmp_path, reader, name):
    """A descriptor that is closed drops all POSIX locks; others delete the WAL then."""
    path = tmp_path / "moltis.db"
    (tmp_path / "link").symlink_to(path)
    with contextlib.closing(moltis.Store(path)):
        os.link(path, tmp_path / "other name")
        with contextlib.suppress(RpcError):
            READERS[reader](tmp_path / name)
        look = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); "
        look += "db.execute('PRAGMA quick_check'); db.close()"
        subprocess.run([sys.executable, "-c", look, str(path)], check=True)
        assert (tmp_path / "moltis.db-wal").exists()


def test_a_locked_file_is_known_whatever_became_of_others(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    locked = [f"{file}/no directory", str(tmp_path / "missing"), str(file)]
    monkeypatch.setattr(moltis, "LOCKED_FILES", locked)
    with pytest.raises(RpcError, match="belongs to the database of a running gateway"):
        list(pieces_of("/", str(file), recursive=False))


def test_who_copies_an_open_database_is_told_how(tmp_path):
    notes = []
    with contextlib.closing(moltis.Store(tmp_path / "moltis.db")):
        copy("/", [str(tmp_path)], tmp_path / "..", "copied", notes)
    assert len(notes) == 3
    assert all("`moltis gateway backup` copies" in note for note in notes)
    copy("/", [str(tmp_path)], tmp_path / "..", "copied again", notes)
    assert len(notes) == 3  # it is closed


@pytest.fixture
def big(tmp_path):
    path = tmp_path / "from" / "big"
    path.parent.mkdir()
    path.write_bytes(os.urandom(BIG))
    (tmp_path / "to").mkdir()
    return path


def parts(directory):
    return [n for n in os.listdir(directory) if n.startswith(".moltis-")]


def test_a_copy_that_is_interrupted_three_times_is_resumed_each_time(big, tmp_path):
    target = tmp_path / "to"
    resumed(big, target, 5 * 2**20, resumes=False)  # nobody knew that it would end
    for _ in range(3):
        assert parts(target) == os.listdir(target)  # nothing has the name yet
        assert resumed(big, target, 2**20) < 2 * 2**20
    said = []
    assert resumed(big, target, said=said) < 5 * 2**20
    assert said == []
    assert os.listdir(target) == ["big"]
    assert (target / "big").read_bytes() == big.read_bytes()
    assert (target / "big").stat().st_mtime_ns == big.stat().st_mtime_ns


def edit_in_place(path):
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"other")
    os.utime(path, ns=(1, before.st_mtime_ns))  # the same inode, size and time


def replace(path):
    data = path.read_bytes()
    path.rename(path.with_name("old"))
    path.write_bytes(data)


CHANGED = "has changed since the copy was interrupted; it is copied anew"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), CHANGED),
        (os.utime, CHANGED),
        (replace, CHANGED),
        (edit_in_place, "does not begin with the part that was copied; it is copied"),
    ],
    ids=["longer", "touched", "another inode", "the same to look at"],
)
def test_a_source_that_changed_is_copied_anew(big, tmp_path, change, sentence):
    resumed(big, tmp_path / "to", 5 * 2**20)
    change(big)
    said = []
    assert resumed(big, tmp_path / "to", said=said) > BIG
    assert [sentence in text for text in said] == [True]
    assert os.listdir(tmp_path / "to") == ["big"]
    assert (tmp_path / "to" / "big").read_bytes() == big.read_bytes()


def flip(part):
    with part.open("r+b") as file:
        file.seek(1000)
        file.write(b"other")


def lengthen(part):
    with part.open("ab") as file:
        file.write(bytes(2 * BIG))


@pytest.mark.parametrize("change", [flip, lengthen])
def test_a_part_that_changed_is_copied_anew(big, tmp_path, change):
    resumed(big, tmp_path / "to", 5 * 2**20)
    [name] = parts(tmp_path / "to")
    change(tmp_path / "to" / name)
    said = []
    assert resumed(big, tmp_path / "to", said=said) > BIG
    assert [text.endswith("it is copied anew") for text in said] == [True]
    assert os.listdir(tmp_path / "to") == ["big"]
    assert (tmp_path / "to" / "big").read_bytes() == big.read_bytes()


def test_a_source_that_changes_between_look_and_copy_is_copied_anew(big, tmp_path):
    resumed(big, tmp_path / "to", 5 * 2**20)
    spec = FileWrite(str(tmp_path / "to"), origin=origin(big))
    writer = FileTarget(spec, FilePlaces("/"), pytest.fail, umask=0o022)
    part = writer.find_part()
    big.write_bytes(bytes(BIG))
    said = []
    hooks = moltis.TransferHooks(say=said.append)
    reader = FileSource(
        FileRead([str(big)], after=part),
        FilePlaces("/"),
        said.append,
        hooks=hooks,
    )
    writer.receive(moltis.one_by_one(reader.pieces()))
    assert [CHANGED in text for text in said] == [True]
    assert (tmp_path / "to" / "big").read_bytes() == bytes(BIG)


def test_little_is_not_kept_and_a_copy_without_resume_begins_anew(big, tmp_path):
    resumed(big, tmp_path / "to", 2**20)
    assert os.listdir(tmp_path / "to") == []
    resumed(big, tmp_path / "to", 5 * 2**20)
    assert resumed(big, tmp_path / "to", 6 * 2**20, resumes=False) >= 6 * 2**20
    assert resumed(big, tmp_path / "to", resumes=False) > BIG
    assert os.listdir(tmp_path / "to") == ["big"]


def test_a_stream_that_is_wrong_leaves_no_part(big, tmp_path):
    spec = FileWrite(str(tmp_path / "to"), origin=None)
    target = FileTarget(spec, FilePlaces("/"), pytest.fail, umask=0o022)
    *pieces, digest = pieces_of("/", str(big), recursive=False)
    with pytest.raises(RpcError, match="what arrived is not what was sent"):
        target.receive(moltis.one_by_one([*pieces, bytes(len(digest))]))
    assert os.listdir(tmp_path / "to") == []


def test_one_copy_at_a_time_has_the_part(big, tmp_path, monkeypatch):
    monkeypatch.setattr(moltis, "PART_PATIENCE", 0.2)
    spec = FileWrite(str(tmp_path / "to"), origin=origin(big))
    first = FileTarget(spec, FilePlaces("/"), pytest.fail, umask=0o022)
    first.find_part()
    second = FileTarget(spec, FilePlaces("/"), pytest.fail, umask=0o022)
    with pytest.raises(RpcError, match="another copy is writing it"):
        second.find_part()
    # Without --resume it needs no part.
    assert resumed(big, tmp_path / "to", resumes=False) > BIG
    first.receive(moltis.one_by_one(pieces_of("/", str(big), recursive=False)))
    assert os.listdir(tmp_path / "to") == ["big"]


def test_a_part_in_use_is_a_conflict_whenever_the_patience_ends(
    big, tmp_path, monkeypatch
):
    """It ended between two looks at the clock: FORBIDDEN, without what to do."""
    spec = FileWrite(str(tmp_path / "to"), origin=origin(big))
    first = FileTarget(spec, FilePlaces("/"), pytest.fail, umask=0o022)
    first.find_part()
    looks = itertools.chain([False], itertools.repeat(True))
    monkeypatch.setattr(moltis.Deadline, "expired", property(lambda _: next(looks)))
    second = FileTarget(spec, FilePlaces("/"), pytest.fail, umask=0o022)
    with pytest.raises(RpcError, match="another copy is writing it") as refusal:
        second.find_part()
    assert refusal.value.code == "CONFLICT"
    first.receive(moltis.one_by_one(pieces_of("/", str(big), recursive=False)))


@pytest.mark.parametrize("kept", [BIG - 1000, 0])
def test_the_hash_of_one_file_is_its_own_also_where_its_copy_was_resumed(
    big, tmp_path, kept
):
    digest = hashlib.sha256(big.read_bytes()).hexdigest()
    if kept:
        resumed(big, tmp_path / "to", kept, resumes=False)
    spec = FileWrite(str(tmp_path / "to"), origin=origin(big))
    writer = FileTarget(spec, FilePlaces("/"), pytest.fail, umask=0o022)
    read = FileRead([str(big)], after=writer.find_part())
    reader = FileSource(read, FilePlaces("/"), pytest.fail)
    result = writer.receive(moltis.one_by_one(reader.pieces()))
    assert result["sha256"] == reader.result["sha256"] == digest


def test_a_part_passes_to_another_copy_once_its_own_sender_is_silent(
    big, tmp_path, monkeypatch
):
    """It was killed, say; a copy that goes on keeps its part."""
    monkeypatch.setattr(moltis, "PART_PATIENCE", 60.0)
    spec, places = FileWrite(str(tmp_path / "to"), origin=origin(big)), FilePlaces("/")
    first = FileTarget(spec, places, pytest.fail, umask=0o022)
    first.give_way(moltis.PART_IDLE)
    first.find_part()
    first.give_way(moltis.PART_IDLE)  # nobody waits
    second = FileTarget(spec, places, pytest.fail, umask=0o022)
    found = []
    waits = threading.Thread(target=lambda: found.append(second.find_part()))
    waits.start()
    wait_for(lambda: places.wanted_parts)
    first.give_way(moltis.PART_IDLE / 2)

    def read(_size):
        first.give_way(moltis.PART_IDLE)

    with pytest.raises(RpcError, match="another copy took over its part"):
        first.receive(read)
    waits.join(60)
    assert [part.size for part in found] == [0]
    assert places.wanted_parts == set()
    second.receive(moltis.one_by_one(pieces_of("/", str(big), recursive=False)))
    assert (tmp_path / "to" / "big").read_bytes() == big.read_bytes()


def test_a_copy_that_gives_way_asks_no_file_system(big, tmp_path, monkeypatch):
    """One that is away would hold the thread that reads the node's connection."""
    spec, places = FileWrite(str(tmp_path / "to"), origin=origin(big)), FilePlaces("/")
    writer = FileTarget(spec, places, pytest.fail, umask=0o022)
    writer.find_part()

    def read(_size):
        places.wanted_parts.add(writer._tree.part.key)
        with monkeypatch.context() as patches:
            patches.setattr(os, "fstat", pytest.fail)
            writer.give_way(moltis.PART_IDLE)

    with pytest.raises(RpcError, match="another copy took over its part"):
        writer.receive(read)


def test_a_part_that_is_removed_while_another_copy_opens_it_is_waited_for(
    big, tmp_path, monkeypatch
):
    flock, taken = fcntl.flock, []

    def late(descriptor, operation):
        if not taken:
            (part,) = parts(tmp_path / "to")
            taken.append(part)
            (tmp_path / "to" / part).unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    resumed(big, tmp_path / "to")
    assert len(taken) == 1
    assert (tmp_path / "to" / "big").read_bytes() == big.read_bytes()


def test_a_copy_that_is_cancelled_as_it_reports_its_part_releases_it(big, tmp_path):
    def report(_part):
        raise moltis.Cancelled

    def is_open(path):  # here; other tests' gateways open and close theirs meanwhile
        for descriptor in map(int, os.listdir("/dev/fd")):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return True
        return False

    to = tmp_path / "to"
    resumed(big, to, 5 * 2**20, resumes=False)
    [part] = to.iterdir()
    spec = FileWrite(str(to), origin=origin(big))
    target = FileTarget(spec, FilePlaces("/"), print, umask=0o022)
    with pytest.raises(moltis.Cancelled):
        target.find_part(report)
    assert not is_open(to)
    assert not is_open(part)
    resumed(big, to)
    assert (to / "big").read_bytes() == big.read_bytes()


def test_a_sender_has_time_to_check_a_part_by_its_size(big, tmp_path):
    resumed(big, tmp_path / "to", 5 * 2**20, resumes=False)
    (part,) = (tmp_path / "to").iterdir()

    class Errand:
        patience = moltis.INPUT_PATIENCE
        cancellation = moltis.Cancellation()

        def write(self, value, kind):
            pass

        def read(self, size):
            raise RpcError("TIMEOUT", "nothing came")

        def call_file_system(self, action, _path):
            return action()

        def alive(self, limit):
            pass

        def step(self):
            pass

        commit = step

    errand, size = Errand(), part.stat().st_size
    options = moltis.MachineOptions({}, None, files=FilePlaces("/"))
    spec = FileWrite(str(tmp_path / "to"), origin=origin(big))
    with pytest.raises(RpcError, match="nothing came"):
        moltis._write_files(options, spec, errand)
    assert errand.patience == moltis.INPUT_PATIENCE + size / moltis.CHECK_RATE
    assert part.exists()


@pytest.mark.parametrize("many", [False, True], ids=["one file", "many notes"])
@pytest.mark.parametrize("step", ["flush", "_give_names"])
def test_a_cancel_while_files_get_their_names_comes_too_late(
    tmp_path, monkeypatch, step, many
):
    """One before does not; with many notes the log has no room for them."""
    (tmp_path / "d").mkdir()
    for number in range(400 if many else 1):
        (tmp_path / "d" / str(number)).write_bytes(b"new")
    (tmp_path / "to" / "d").mkdir(parents=True)
    if many:
        monkeypatch.setattr(moltis, "MAX_NOTES", 10**6)
        for number in range(1, 400):
            (tmp_path / "to" / "d" / str(number)).mkdir()
    options = moltis.MachineOptions({}, None, files=FilePlaces(str(tmp_path)))
    log = moltis.JobLog(moltis.new_id(), lambda _log: None, window=65536)
    spec = FileWrite("to", into=True)
    errand = moltis.InputErrand(
        moltis._write_files, options, log, lambda _offset: None, spec
    )
    original = getattr(moltis.StagedTree, step)

    def cancelled(tree):
        errand.cancel("somebody pressed Ctrl+C")
        original(tree)

    monkeypatch.setattr(moltis.StagedTree, step, cancelled)
    data = b"".join(pieces_of(tmp_path, "d"))
    errand.input(0, data)
    errand.input(len(data), b"")
    ending = errand.run()
    names = sorted(os.listdir(tmp_path / "to"))
    assert names == ["d"]
    there = (tmp_path / "to" / "d" / "0").exists()
    if step == "_give_names":
        assert (ending.state, ending.result["files"], there) == ("done", 1, True)
        assert ending.result["notes"] == (399 if many else 0)
    else:
        assert (ending.state, there) == ("cancelled", False)


def test_a_cancel_during_the_last_flush_leaves_the_part(big, tmp_path):
    def commit():
        raise moltis.Cancelled

    hooks = moltis.TransferHooks(commit=commit)
    spec = FileWrite(str(tmp_path / "to") + "/", origin=origin(big))
    target = FileTarget(spec, FilePlaces("/"), pytest.fail, umask=0o022, hooks=hooks)
    source = FileSource(FileRead([str(big)]), FilePlaces("/"), pytest.fail)
    with pytest.raises(moltis.Cancelled):
        target.receive(moltis.one_by_one(source.pieces()))
    [part] = parts(tmp_path / "to")
    assert (tmp_path / "to" / part).stat().st_size == big.stat().st_size


def test_a_file_system_that_cannot_lock_for_now_keeps_the_part(
    big, tmp_path, monkeypatch
):
    resumed(big, tmp_path / "to", 5 * 2**20)
    before = parts(tmp_path / "to")

    def no_locks(*_args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    parent = os.open(tmp_path / "to", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match=os.strerror(errno.ENOLCK)):
            open_part(parent, big)
    finally:
        os.close(parent)
    assert parts(tmp_path / "to") == before


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe"])
def test_a_part_that_is_not_ours_is_refused(big, tmp_path, kind):
    resumed(big, tmp_path / "to", 5 * 2**20)
    part = tmp_path / "to" / parts(tmp_path / "to")[0]
    part.rename(tmp_path / "victim")
    if kind == "link":
        part.symlink_to(tmp_path / "victim")
    elif kind == "hard link":
        os.link(tmp_path / "victim", part)
    else:
        os.mkfifo(part)
    before = (tmp_path / "victim").read_bytes()
    with pytest.raises(RpcError):
        resumed(big, tmp_path / "to")
    assert (tmp_path / "victim").read_bytes() == before


@pytest.mark.parametrize("name", ["big", "a/b"])
def test_an_identity_with_slashes_leads_out_of_no_directory(tmp_path, name):
    """A caller may name any, also where --allow-files confines it."""
    inside, victim = tmp_path / "inside", tmp_path / "victim"
    victim.write_text("private")
    begin = f".moltis-{hashlib.sha256(b'big').hexdigest()[:12]}-"
    (inside / begin).mkdir(parents=True)
    origin = moltis.FileOrigin(name, "/../../victim", resumes=True)
    places = FilePlaces(str(inside), [str(inside)])
    spec = FileWrite(str(inside / "big"), origin=origin)
    target = FileTarget(spec, places, pytest.fail, umask=0o022)
    assert target.find_part().size == 0
    with pytest.raises(RpcError):
        target.receive(lambda _size: b"")
    assert victim.read_text() == "private"


def test_a_copy_without_resume_needs_no_locks(big, tmp_path, monkeypatch):
    """As on NFS and Lustre without them."""

    def flock(_descriptor, _operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    assert resumed(big, tmp_path / "to", resumes=False) > BIG
    assert os.listdir(tmp_path / "to") == ["big"]
    with pytest.raises(RpcError, match=os.strerror(errno.ENOLCK)):
        resumed(big, tmp_path / "to")


def test_a_copy_that_is_complete_leaves_the_part_of_the_next_one(big, tmp_path):
    parent = os.open(tmp_path / "to", os.O_RDONLY)
    try:
        first = open_part(parent, big)
        first.is_kept = False
        (tmp_path / "to" / first.name).rename(tmp_path / "to" / "big")
        second = open_part(parent, big)
        first.close()
        assert sorted(os.listdir(tmp_path / "to")) == [second.name, "big"]
        second.close()
    finally:
        os.close(parent)


@pytest.mark.parametrize(
    "report",
    [
        b"no JSON",
        b"7",
        b'{"part":7}',
        b'{"part":{"size":7}}',
        b'{"skipped":"7"}',
        b'{"checked":7}',
        b'{"checked":7,"of":"8"}',
        b'{"bytes":"7","result":7}',
    ],
)
def test_what_a_node_reports_of_a_copy_is_no_traceback(report):
    output = moltis.Output({})
    remote = moltis.RemoteFiles.__new__(moltis.RemoteFiles)
    remote._said, remote.result = bytearray(), {}
    remote.part_known = threading.Event()
    remote._job = moltis.FollowedJob("id", "pi", "pi", holds=True)
    remote._progress = moltis.CopyProgress(output, "")
    try:
        remote._take_reports(report + b"\n")
    except moltis.MoltisError as error:
        assert str(error)
    remote._progress.add("name", 1)
    assert remote.result == {}
    assert remote._progress.total == 0


def test_the_result_of_a_copy_is_known_if_an_older_gateway_does_not_pass_it_on():
    remote = moltis.RemoteFiles.__new__(moltis.RemoteFiles)
    remote._said, remote.result = bytearray(), {}
    remote._progress = moltis.CopyProgress(moltis.Output({}), "")
    remote._waiting = moltis.Waiting(moltis.Output({}))
    remote._job = moltis.FollowedJob("id", "pi", "pi", holds=True)
    remote._job.ending = moltis.Ending(moltis.JobState.DONE)
    result = {"files": 2, "bytes": 7, "sha256": "0" * 64}
    remote._take_reports(moltis.to_json({"result": result}).encode() + b"\n")
    remote._take_change()
    assert {name: remote.result[name] for name in result} == result


def test_the_rest_of_a_file_is_whole_blocks_wherever_its_part_ends(big):
    part = moltis.FilePartial(
        origin(big).identity, 7, hashlib.sha256(big.read_bytes()[:7]).hexdigest()
    )
    source = FileSource(FileRead([str(big)], after=part), FilePlaces("/"), print)
    size = sum(map(len, source.pieces())) - moltis.DIGEST_SIZE
    assert size % moltis.TAR_BLOCK == 0


def test_the_rest_of_a_file_that_grows_ends_where_its_header_says(big):
    part = moltis.FilePartial(
        origin(big).identity, 7, hashlib.sha256(big.read_bytes()[:7]).hexdigest()
    )
    spec, notes = FileRead([str(big)], after=part), []
    pieces = FileSource(spec, FilePlaces("/"), notes.append).pieces()
    begin = next(pieces)
    with big.open("ab") as file:
        file.write(bytes(100_000))
    rest = moltis.one_by_one(itertools.chain([begin], pieces))
    stream = moltis.CheckedStream(rest)
    [length] = [
        sum(map(len, [*stream.pieces(m.size), stream.exactly(-m.size % 512)]))
        for m in moltis.read_members(stream)
    ]
    stream.check()
    assert length == BIG - 7 + -(BIG - 7) % 512
    assert "changed while it was read" in notes[0]


def test_a_stream_continues_no_file_that_is_not_there(tmp_path):
    info = member("f")
    info.pax_headers = {moltis.PAX_OFFSET: "5"}
    with pytest.raises(RpcError, match="continues a file that is not there"):
        write(tmp_path, ".", archive((info, b"data")))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("{}/from/big", "far:{}/to"),
        ("far:{}/from/big", "{}/to"),
        ("far:{}/from/big", "Local:{}/to"),
    ],
    ids=["up", "down", "across"],
)
def test_cp_resumes_what_was_interrupted(world, source, target):
    (world.scratch / "from").mkdir()
    (world.scratch / "to").mkdir()
    big, there = world.scratch / "from" / "big", world.scratch / "to"
    with big.open("wb") as file:
        file.truncate(2 * 2**30)  # more than is copied before the signal
    words = [source.format(world.scratch), target.format(world.scratch)]

    def has_part():
        sizes = [(there / name).stat().st_size for name in parts(there)]
        return any(size > 2 * moltis.MIN_PART for size in sizes)

    call = Call(world, ["node", "cp", *words])
    wait_for(has_part)
    call.signal(2)
    assert call.wait() == 130
    assert "--resume continues the copy" in call.complaints
    [name] = parts(there)
    # The rest is short: a shorter file, of which this part is the beginning.
    size = (there / name).stat().st_size + 100_000
    facts = big.stat()
    os.truncate(big, size)
    os.utime(big, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    given = moltis.file_identity(str(big), big.stat())
    hashed = hashlib.sha256(given.encode()).hexdigest()[:20]
    (there / name).rename(there / f"{name[:-20]}{hashed}")
    call = cp(world, "--resume", "--json", *words)
    assert call.status == 0, call.complaints
    assert "are there and right" in call.complaints
    [report] = json.loads(call.output)
    assert (report["resumed"], report["bytes"]) == (size - 100_000, size)
    assert os.listdir(there) == ["big"]
    assert (there / "big").read_bytes() == bytes(size)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["{}", "far:{}/x"], "is no regular file; --resume continues only those"),
        (["far:{}", "."], "is no regular file; --resume continues only those"),
        (["far:{}/*.log", "."], "--resume takes names of files, not a pattern"),
        (["far:{}/none", "."], "none: No such file or directory"),
        (["-", "far:{}/x"], "--resume continues files; what - brings"),
    ],
)
def test_what_cannot_be_resumed_is_one_sentence(world, words, problem):
    call = cp(world, "--resume", *(word.format(world.scratch) for word in words))
    assert problem in call.complaints
    assert call.complaints.count("\n") == 1
    assert call.status in (1, 2)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("{0}/big", "{1}:{0}/copy"),
        ("{1}:{0}/big", "{0}/copy"),
        ("{1}:{0}/big", "far:{0}/copy"),
    ],
)
def test_a_node_that_cannot_continue_a_copy_is_refused_at_once(
    world, monkeypatch, source, target
):
    """An older 0.2.0 does not know the field, and waits for 15 minutes."""
    (world.scratch / "big").write_bytes(b"x" * 1000)
    caps = [cap for cap in moltis.MACHINE_CAPABILITIES if cap != moltis.CAP_RESUME]
    monkeypatch.setattr(moltis, "MACHINE_CAPABILITIES", caps)
    entry = moltis._file_entry
    monkeypatch.setattr(
        moltis, "_file_entry", lambda *args, **_: entry(*args, follow=True)
    )
    name = f"old{random.random()}"
    places = [place.format(world.scratch, name) for place in (source, target)]
    with other_node(world, name, working_dir=str(world.scratch)):
        call = cp(world, "--resume", *places)
        assert call.status == 2
        assert call.complaints.count("\n") == 1
        assert (
            f"{name} cannot continue a copy: its moltis.py is too old"
            in call.complaints
        )
        assert cp(world, *places).status == 0  # what the sentence says to do
    assert (world.scratch / "copy").read_bytes() == b"x" * 1000


def test_each_file_and_each_node_is_resumed_by_itself(world):
    for name in ("a", "b"):
        (world.scratch / name).write_bytes(os.urandom(100_000))
    (world.scratch / "far").mkdir()
    for _ in range(2):  # without a part it says so, and copies
        call = cp(
            world,
            "--resume",
            world.scratch / "a",
            world.scratch / "b",
            f"far,Local:{world.scratch}/far",
        )
        assert call.status == 0, call.complaints
        assert call.complaints.count("no part of it to resume") == 4
    for name in ("a", "b"):
        copied = (world.scratch / "far" / name).read_bytes()
        assert copied == (world.scratch / name).read_bytes()


def test_a_check_says_how_far_it_is_and_can_be_cancelled(big, tmp_path):
    resumed(big, tmp_path / "to", 8 * 2**20)
    seen = []

    def progress(done, size):
        seen.append((done, size))
        if done > size // 2:
            raise moltis.Cancelled

    spec = FileWrite(str(tmp_path / "to"), origin=origin(big))
    hooks = moltis.TransferHooks(progress=progress)
    writer = FileTarget(spec, FilePlaces("/"), pytest.fail, umask=0o022, hooks=hooks)
    with pytest.raises(moltis.Cancelled):
        writer.find_part()
    assert 4 <= len(seen) < 12
    assert len(parts(tmp_path / "to")) == 1  # it is there for the next time


# -- lists -----------------------------------------------------------------------


def listed(base, path, below=()):
    listing = moltis.FileListing(
        moltis.FileList(moltis.encode_path(str(path))), FilePlaces(str(base), below)
    )
    return {moltis.decode_path(entry.name): entry for entry in listing.entries()}


def test_a_list_has_each_name_with_its_kind_size_and_mode(source, target):
    (source / "away").symlink_to(target)
    (source / "nowhere").symlink_to("nothing")
    os.mkfifo(source / "pipe")
    found = listed(source, ".")
    assert {name: entry.kind for name, entry in found.items()} == {
        "away": "directory",
        "d": "directory",
        "f": "file",
        "nowhere": "link",
        "pipe": "other",
    }
    assert (found["f"].size, found["f"].mode) == (6, 0o640)
    assert found["f"].changed_at == 1_234_567_890_123
    assert found["away"].link == str(target)
    assert os.fsdecode(b"\xff\xfe") in listed(source, "d")
    assert list(listed(source, "f")) == ["f"]  # of a file, itself


def test_a_list_tells_nothing_about_what_is_not_allowed(source, target):
    (target / "dir" / "out").symlink_to(source)
    assert listed(target, "dir", (str(target / "dir"),))["out"].kind == "link"
    assert list(listed(target, "dir/out", (str(target / "dir"),))) == ["out"]
    for path in (".", "dir/out/f", "dir/.."):
        with pytest.raises(RpcError):
            listed(target, path, (str(target / "dir"),))


def test_file_systems_that_are_away_spare_the_rest_of_a_list(source, monkeypatch):
    """One fails, as FUSE does whose program died; one never answers, as NFS."""
    look, answers = moltis._file_entry, threading.Event()
    asked = []

    def file_entry(directory, name, **options):
        if name == "silent":
            asked.append(name)
            answers.wait(60)
        if name in ("silent", "failing"):
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        return look(directory, name, **options)

    class Patience:
        """Ends as the silent one is asked: others may take their time."""

        def __init__(self, _limit):
            self._asked = len(asked)

        def remaining(self):
            return 60.0 if len(asked) == self._asked else 0.0

    monkeypatch.setattr(moltis, "_file_entry", file_entry)
    monkeypatch.setattr(moltis, "Deadline", Patience)
    for name in ("failing", "silent"):
        (source / name).mkdir()
    try:
        for _ in range(5):
            found = {name: entry.kind for name, entry in listed(source, ".").items()}
            assert found.pop("failing") == found.pop("silent") == "other"
            assert found == {"d": "directory", "f": "file"}
        assert len(asked) == 2  # for all together and by itself, then not again
    finally:
        answers.set()


def test_two_lists_at_a_time_are_both_whole():
    second = threading.Event()

    def first():
        second.wait(60)
        return "first"

    answers, soon = [], moltis.Deadline(60).remaining
    thread = threading.Thread(
        target=lambda: answers.append(moltis.call_file_system(first, "/d", soon))
    )
    thread.start()
    try:
        assert moltis.call_file_system(lambda: "second", "/d", soon) == "second"
    finally:
        second.set()
        thread.join()
    assert answers == ["first"]


def test_what_is_done_as_a_wait_for_it_ends_is_not_away(monkeypatch):
    class Late(moltis.Future):
        def result(self, timeout=None):
            found = super().result()
            if timeout is not None:
                raise moltis.FutureTimeout
            return found

    monkeypatch.setattr(moltis, "Future", Late)
    soon = moltis.Deadline(60).remaining
    assert moltis.call_file_system(lambda: "found", "/d", soon) == "found"


def test_a_list_ends_although_nothing_in_the_directory_answers(tmp_path, monkeypatch):
    for number in range(260):
        (tmp_path / f"f{number}").touch()
    answers, steps = threading.Event(), []
    monkeypatch.setattr(moltis, "_file_entry", lambda *_, **__: answers.wait(60))
    monkeypatch.setattr(moltis, "LOOK_TIMEOUT", 0.05)
    monkeypatch.setattr(moltis, "LOOK_AGAIN", 0.01)
    spec = moltis.FileList(moltis.encode_path(str(tmp_path)))

    def step():
        steps.append(1)
        if len(steps) == limit:
            raise moltis.Cancelled

    try:
        limit = None
        listing = moltis.FileListing(spec, FilePlaces("/"), step)
        kinds = [entry.kind for entry in listing.entries()]
        # Those that are asked each keep a thread; the others are not asked.
        assert kinds == ["other"] * 260
        assert listing._away == moltis.MAX_AWAY
        limit = len(steps) + 3
        with pytest.raises(moltis.Cancelled):
            list(moltis.FileListing(spec, FilePlaces("/"), step).entries())
    finally:
        answers.set()


def test_files_that_are_measured_or_made_one_by_one_are_signs_of_life(tmp_path):
    """On a slow disk each takes its time, and no byte is read or written yet."""
    (tmp_path / "d").mkdir()
    for number in range(50):
        (tmp_path / "d" / str(number)).touch()
    signs = []
    hooks = moltis.TransferHooks(
        alive=lambda _limit: signs.append("made"), step=lambda: signs.append("seen")
    )
    places = FilePlaces(str(tmp_path))
    source = FileSource(
        FileRead(["d"], recursive=True), places, pytest.fail, hooks=hooks
    )
    source.measure()
    assert signs.count("seen") >= 50
    spec = FileWrite("to", into=True)
    (tmp_path / "to").mkdir()
    target = FileTarget(spec, places, pytest.fail, umask=0o022, hooks=hooks)
    target.receive(moltis.one_by_one(source.pieces()))
    assert signs.count("made") >= 50


def test_a_list_of_what_is_away_is_one_sentence(source, monkeypatch):
    answers = threading.Event()
    monkeypatch.setattr(moltis, "FileListing", lambda *_: answers.wait(60))
    monkeypatch.setattr(moltis, "LOOK_TIMEOUT", 0.2)
    options = moltis.MachineOptions({}, None, files=FilePlaces(str(source)))
    spec = moltis.FileList(moltis.encode_path(str(source)))
    log = moltis.JobLog(moltis.new_id(), lambda _log: None)
    errand = moltis.Errand(moltis._list_files, options, log, print, spec)
    try:
        ending = errand.run()
    finally:
        answers.set()
    assert "source: its file system did not answer" in ending.reason


def once(world, node, work, **spec):
    answer = world.rpc("job.once", nodeId=node, work=work, spec=spec)
    return answer["result"], base64.b64decode(answer["output"])


@pytest.mark.parametrize("node", ["far", "Local"])
def test_a_list_of_many_files_is_one_answer_without_a_row(world, node):
    for number in range(3000):
        (world.scratch / f"a file with a name that is long {number:05}").touch()
    before = world.rpc("job.list", limit=1)
    result, output = once(world, node, "file.list", path=str(world.scratch))
    names = [json.loads(line)["name"] for line in output.splitlines()]
    assert names == sorted(os.listdir(world.scratch))
    assert result == {"path": str(world.scratch), "directory": True, "leftOut": 0}
    assert world.rpc("job.list", limit=1) == before


@pytest.mark.parametrize("node", ["far", "Local"])
def test_what_cannot_be_listed_is_one_sentence(world, node):
    with pytest.raises(moltis.MoltisError, match="none: No such file or directory"):
        once(world, node, "file.list", path=f"{world.scratch}/none")


# -- changes ---------------------------------------------------------------------


def change(base, action, path, to="", below=(), **options):
    encode = moltis.encode_path
    spec = moltis.FileChange(action, encode(str(path)), encode(str(to)), **options)
    return moltis.change_file(spec, FilePlaces(str(base), below), 0o027, lambda: None)


def test_a_directory_is_made_with_the_callers_umask(target):
    change(target, "mkdir", "dir/new")
    assert stat.S_IMODE((target / "dir" / "new").stat().st_mode) == 0o750
    with pytest.raises(RpcError, match="File exists"):
        change(target, "mkdir", "dir/new")


def test_a_rename_replaces_nothing(source):
    (source / "g").write_text("other")
    with pytest.raises(RpcError, match="g: is there already"):
        change(source, "rename", "f", "g")
    os.link(str(source / "f"), str(source / "same"))
    with pytest.raises(RpcError, match="is there already"):
        change(source, "rename", "f", "same")
    change(source, "rename", "d/big", "moved")
    assert (source / "moved").stat().st_size == 300_000


def test_only_what_was_asked_for_is_deleted(source, target):
    (source / "d" / "out").symlink_to(target)
    (source / "d" / os.fsdecode(b"\xff")).mkdir()
    with pytest.raises(RpcError, match="not empty"):
        change(source, "delete", "d")
    change(source, "delete", "d", recursive=True)
    assert os.listdir(source) == ["f"]
    assert target.is_dir()  # no link was followed
    (source / "link").symlink_to(target)
    change(source, "delete", "link", recursive=True)
    assert target.is_dir()


def test_a_directory_that_became_a_file_meanwhile_is_deleted(tmp_path):
    path = tmp_path / "d"
    path.mkdir()

    def replace():
        path.rmdir()
        path.touch()

    spec = moltis.FileChange("delete", "d", recursive=True)
    moltis.change_file(spec, FilePlaces(str(tmp_path)), 0o022, replace)
    assert os.listdir(tmp_path) == []


def test_a_deep_directory_is_deleted(tmp_path):
    below = os.open(tmp_path, os.O_RDONLY)
    for _ in range(400):
        os.mkdir("deep", dir_fd=below)
        below = moltis.descend(below, ["deep"])
    os.close(below)
    change(tmp_path, "delete", "deep", recursive=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("action", ["mkdir", "rename", "delete"])
def test_nothing_is_changed_outside_of_what_is_allowed(source, target, action):
    allowed = (str(target / "dir"),)
    (target / "dir" / "out").symlink_to(source)
    (target / "dir" / "in").touch()
    before = tree(source)
    for path in (
        source / "f",
        target / "dir" / "out" / "f",
        target / "dir" / "..",
        target / "dir",
    ):
        with pytest.raises(RpcError):
            change(target, action, path, target / "dir" / "x", allowed, recursive=True)
    with pytest.raises(RpcError):
        change(target, "rename", target / "dir" / "in", source / "x", allowed)
    assert tree(source) == before
    assert sorted(os.listdir(target / "dir")) >= ["in", "out"]


@pytest.mark.parametrize("node", ["far", "Local"])
def test_a_change_is_in_the_audit(world, node):
    (world.scratch / "f").touch()
    once(world, node, "file.change", action="delete", path=f"{world.scratch}/f")
    (job,) = world.rpc("job.list", limit=1)
    assert job["command"] == f"delete {world.scratch}/f"
    assert (job["state"], list(world.scratch.iterdir())) == ("done", [])
