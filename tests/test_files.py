"""Files and directories as one stream, and `moltis node cp` between machines."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import socket
import stat
import tarfile
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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


@pytest.mark.parametrize("link", ["/etc/passwd", "../..", "a/../../../x", ".."])
def test_a_link_that_leads_out_is_left_out(target, link):
    notes = []
    top = member("top", tarfile.DIRTYPE)
    write(target, "dir", archive(top, member("top/l", tarfile.SYMTYPE, link)), notes)
    assert not os.path.lexists(target / "dir/top/l")
    assert "outside of what is copied" in notes[0]


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


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, NODES, max_size=5))
def test_any_tree_arrives_as_it_is(tmp_path_factory, node):
    base = tmp_path_factory.mktemp("any")
    build(os.fsencode(str(base / "a")), node)
    notes = []
    copy(base, ["a"], base, "b", notes)
    assert notes == []
    assert tree(base / "b") == tree(base / "a")


# -- between machines ------------------------------------------------------------


@pytest.fixture(scope="module")
def still_world(tmp_path_factory):
    with World(tmp_path_factory.mktemp("cp")) as world:
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
    digest = hashlib.sha256(b"".join(pieces_of(world.scratch, "f"))[:-32]).hexdigest()
    assert first["destination"] == f"far:{world.scratch}/copy"
    assert second["destination"] == f"Local:{world.scratch}/copy"
    assert (first["files"], first["bytes"], first["sha256"]) == (1, 6, digest)


@pytest.mark.parametrize(
    ("words", "status", "problem"),
    [
        (["{}/f", "nobody:x"], 1, "there is no node 'nobody'"),
        (["{}/f", "far:{}/none/"], 1, "No such file or directory; --mkdir makes it"),
        (["far:{}/none", "."], 1, "none: No such file or directory"),
        (["{}", "far:"], 1, "is a directory; -r copies directories"),
        (["{}/f", "{}/g"], 2, "one side has to be on a node"),
        (["{}/f"], 2, "name what to copy and where to"),
        (["-", "far:{}"], 1, "is a directory; name the file in it as well"),
        (["far:{}", "-", "-r"], 2, "- takes one file only"),
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


def test_the_audit_has_files_sizes_and_hashes(world):
    (world.scratch / "audited").write_bytes(b"x" * 1000)
    cp(world, world.scratch / "audited", f"far:{world.scratch}/there")
    row = world.rpc("job.list", limit=1)[0]
    assert row["command"] == f"write {world.scratch}/there"
    assert "1 file, 1,000 bytes, SHA-256 " in row["words"]
    assert row["callerName"] == "owner"


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


def test_an_interrupted_copy_leaves_nothing(world):
    big = world.scratch / "big"
    with big.open("wb") as file:
        file.truncate(3 * 2**30)
    (world.scratch / "there").mkdir()
    call = Call(world, ["node", "cp", str(big), f"far:{world.scratch}/there/"])
    wait_for(lambda: os.listdir(world.scratch / "there"))
    call.signal(2)
    assert call.wait() == 130
    wait_for(lambda: not os.listdir(world.scratch / "there"))


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_copy_whose_lines_are_cut_goes_on_at_the_byte(tmp_path, way):
    with World(tmp_path) as world:
        (tmp_path / "big").write_bytes(os.urandom(1_000_000) * 60)
        source, target = f"{tmp_path}/big", f"far:{tmp_path}/copy"
        if way == "down":
            source, target = f"far:{tmp_path}/big", f"{tmp_path}/copy"
        call = Call(world, ["node", "cp", source, target])
        wait_for(lambda: [n for n in os.listdir(tmp_path) if n.startswith(".moltis-")])
        for _ in range(5):
            for proxy in (world.node_proxy, world.operator_proxy):
                proxy.cut()
                threading.Event().wait(0.1)
        assert call.wait() == 0, call.complaints
        assert (tmp_path / "copy").read_bytes() == (tmp_path / "big").read_bytes()


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
    with World(tmp_path) as world:
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
    with World(tmp_path, small_disks=True) as world:
        (tmp_path / "big").write_bytes(bytes(64 * 2**20))
        before = os.listdir(world.node_data)
        call = cp(world, tmp_path / "big", f"far:{world.node_data}/big")
        assert call.status == 1
        assert "big: No space left on device" in call.complaints
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
    return moltis.FileChanger(FilePlaces(str(base), below), 0o027).change(spec)


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
