"""The tools with which models and MCP clients read and change files."""

from __future__ import annotations

import base64
import hashlib
import os
import stat
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import Machines
from peers import InProcessGateway, rust_connect
from support import wait_for
from test_agent import Chat, Scripted, approve, calls, open_questions, says
from test_mcp import McpClient

import moltis
from moltis import FilePart, FilePlaces, FileRead, FileWrite, RpcError

# -- lines -----------------------------------------------------------------------


def read(path, first=1, count=moltis.MAX_READ_LINES, base="/", below=()):
    spec = FileRead([str(path)], part=FilePart(first, count))
    source = moltis.TextSource(spec, FilePlaces(str(base), below))
    data, found = source.read(lambda: None)
    return data.decode("utf-8"), found


@given(
    st.lists(
        st.text(
            st.characters(blacklist_categories=["Cs"], blacklist_characters="\n\r\0"),
            max_size=5,
        )
    ),
    st.booleans(),
    st.integers(1, 4),
)
def test_parts_with_their_next_offsets_are_the_whole_text(
    tmp_path_factory, lines, ends, count
):
    text = "\n".join(lines) + "\n" * (ends and bool(lines))
    text = text.lstrip("\ufeff%")
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(text.encode("utf-8"))
    parts, first = [], 1
    while first:
        part, found = read(path, first, count)
        assert found["lines"] == len(text.split("\n")) - (
            text.endswith("\n") or not text
        )
        parts.append(part)
        first = found.get("next")
    assert "".join(parts) == text


def test_at_most_fifty_kilobytes_come_cut_at_a_line(tmp_path):
    text = "".join(f"{number:09}\n" for number in range(100_000))
    (tmp_path / "f").write_text(text)
    part, found = read(tmp_path / "f", count=100_000)
    assert len(part) == moltis.MAX_READ_TEXT
    assert part.endswith("\n")
    assert (found["next"], found["lines"]) == (len(part) // 10 + 1, 100_000)
    assert found["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert read(tmp_path / "f", found["next"], 1)[0] == f"{len(part) // 10:09}\n"


def test_a_line_that_is_longer_is_cut_and_that_is_said(tmp_path):
    (tmp_path / "f").write_text("a\n" + "ä" * 100_000 + "\nz")
    assert read(tmp_path / "f")[1]["next"] == 2
    part, found = read(tmp_path / "f", 2)
    assert part == "ä" * (moltis.MAX_READ_TEXT // 2)
    assert (found["cut"], found["next"], found["lines"]) == (2, 3, 3)


@pytest.mark.parametrize(
    ("data", "text", "facts"),
    [
        (b"", "", {"lines": 0}),
        (b"a\r\nb\r\n", "a\nb\n", {"lines": 2, "lineEnds": "CRLF"}),
        (b"a\r\nb\n", "a\r\nb\n", {"lines": 2}),
        (b"\xef\xbb\xbfa", "a", {"lines": 1, "bom": True}),
        (b"gr\xfcn", "gr\xfcn", {"encoding": "ISO-8859-1"}),
        (b"caf\xe9", "caf\xe9", {"encoding": "ISO-8859-1"}),
    ],
)
def test_what_a_text_is_made_of_is_told(tmp_path, data, text, facts):
    (tmp_path / "f").write_bytes(data)
    part, found = read(tmp_path / "f")
    assert part == text
    assert found.items() >= facts.items()
    assert "next" not in found


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            b"\x89PNG\r\n\x1a\n" + bytes(2000),
            r"f: is a PNG image \(2.0 KiB\), not text",
        ),
        (b"a\0b", r"f: is binary data \(3 B\), not text"),
        (b"\xff\xfea\0", "f: is UTF-16 text"),
        (b"a\nb\n", "f: has 2 lines; line 9 is behind its end"),
    ],
    ids=["image", "NUL", "UTF-16", "offset"],
)
def test_what_is_no_text_is_refused_with_type_and_size(tmp_path, data, sentence):
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(RpcError, match=sentence):
        read(tmp_path / "f", 9)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "mem").symlink_to("/proc/self/mem")  # no page is at its beginning
    for path, sentence in (
        ("none", "none: No such file or directory"),
        ("pipe", "is neither a file nor a directory"),
        (".", "is a directory, not a file"),
        *([("mem", "mem: Input/output error")] if os.path.exists("/proc/self") else []),
    ):
        with pytest.raises(RpcError, match=sentence):
            read(path, base=tmp_path)
    (tmp_path / "leak").symlink_to("/etc/passwd")
    for path in ("leak", "../x", "/etc/passwd"):
        with pytest.raises(RpcError):
            read(path, base=tmp_path, below=[str(tmp_path)])


# -- changes ---------------------------------------------------------------------


def edited(data, old, new, every=False):
    return moltis.splice_bytes(data, moltis.find_edits(data, old, new, every=every))


@pytest.mark.parametrize(
    ("data", "old", "new", "expected"),
    [
        (b"a\r\nb\r\nc", "b", "x\ny", b"a\r\nx\r\ny\r\nc"),
        (b"a\r\nb\r\nc\r\n", "a\nb", "z", b"z\r\nc\r\n"),
        (b"a\r\nb\nc\n", "b\nc", "z", b"a\r\nz\n"),
        (b"\xef\xbb\xbfa=1", "a=1", "a=2", b"\xef\xbb\xbfa=2"),
        (b"gr\xfcn\n", "gr\xfcn", "bl\xe4u", b"bl\xe4u\n"),
        ("grün 🙂".encode(), "🙂", "ß", "grün ß".encode()),
        (b"a\n", "a\n", "", b""),
        (b"a\rb\r", "b", "c", b"a\rc\r"),
        (b"a\r\nb\n", "a\r\n", "", b"b\n"),
        pytest.param(
            *(b"x" * 900_000 + b"y", "y", "z", b"x" * 900_000 + b"z"), id="a long line"
        ),
    ],
)
def test_an_edit_changes_no_byte_beside_its_own(data, old, new, expected):
    assert edited(data, old, new) == expected


@pytest.mark.parametrize(
    ("data", "old", "new", "sentence"),
    [
        (b"x\na\nb a\n", "a", "c", "2 times, at the lines 2, 3; give more"),
        (b"x\nx\nx\n", "x\nx\n", "y\n", "2 times, at the lines 1, 2; give more"),
        (b"aaa", "aa", "b", "2 times, at the lines 1; give more"),
        (b"a\r\na\r\na\r\n", "a\na\n", "", "2 times, at the lines 1, 2; give more"),
        (b"a\n" * 99, "a", "b", "99 times, at the lines 1, 2, .*, 20 and more; give"),
        (b"", "x", "c", "old is not in the file; read it again"),
        (b"x\n", "y", "c", "old is not in the file; read it again"),
        (b"x\n", "", "c", "old is empty"),
        (b"x\n", "x", "x", "nothing changes"),
        (b"\xfc\n", "\xfc", "€", "is no character of ISO-8859-1"),
    ],
)
def test_an_edit_that_cannot_be_made_says_why(data, old, new, sentence):
    with pytest.raises(RpcError, match=sentence):
        edited(data, old, new)
    assert edited(b"x\na\nb a\n", "a", "c", every=True) == b"x\nc\nb c\n"


@pytest.mark.parametrize(
    ("data", "old", "new"),
    [(b"\n" * 20_000, "\n", "x" * 2000), (b"1," * 300_000, ",", ";")],
    ids=["what it becomes", "the change itself"],
)
def test_an_edit_in_too_many_places_is_refused(data, old, new):
    with pytest.raises(RpcError, match="times, too often to be changed at once"):
        moltis.find_edits(data, old, new, every=True)


def test_an_edit_that_overlaps_itself_everywhere_is_refused():
    with pytest.raises(RpcError, match="21 times, at the lines 1 and more"):
        edited(b"a" * 10_000, "a" * 5000, "b")


def test_a_diff_of_two_places_far_apart_shows_both_and_little_else():
    lines = [f"{n % 7 and n}\n" for n in range(2000)]
    changed = ["x\n" if n in (5, 1990) else line for n, line in enumerate(lines)]
    diff = moltis.file_diff("".join(lines).encode(), "".join(changed).encode())
    assert (diff.count("\n+"), diff.count("\n-")) == (2, 2)
    assert len(diff.split("\n")) < 20


def test_a_diff_names_an_encoding_that_changes():
    assert moltis.file_diff("é\n".encode("iso-8859-1"), "é\n".encode()) == (
        "\\ the encoding ISO-8859-1 becomes UTF-8"
    )


def test_a_diff_is_whole_and_shows_line_ends_that_change():
    old = "".join(f"line {n}\n" for n in range(1, 30)).encode()
    new = old.replace(b"line 20\n", b"line XX\nmore\n").replace(
        b"line 29\n", b"line 29"
    )
    assert moltis.file_diff(old, new).split("\n") == [
        "@@ -17,7 +17,8 @@",
        *(f" line {n}" for n in (17, 18, 19)),
        "-line 20",
        "+line XX",
        "+more",
        *(f" line {n}" for n in (21, 22, 23)),
        "@@ -26,4 +27,4 @@",
        *(f" line {n}" for n in (26, 27, 28)),
        "-line 29",
        "+line 29",
        r"\ no line end at the end of the file",
    ]
    assert moltis.file_diff(b"", b"a\n") == "@@ -0,0 +1 @@\n+a"
    assert moltis.file_diff(b"a\r\nb\r\n", b"a\nb\r\n") == "\n".join(
        ["@@ -1,2 +1,2 @@", "-a␍", "+a", " b␍"]
    )


def test_a_diff_of_any_files_is_made_or_refused():
    old = "".join(f"{n % 97}\n" for n in range(9000)).encode()
    new = "".join(f"{n % 89}\n" for n in range(1, 9000)).encode()
    lines = moltis.file_diff(old, new).split("\n")
    assert "".join(x[1:] + "\n" for x in lines if x[0] in " -").encode() == old
    assert "".join(x[1:] + "\n" for x in lines if x[0] in " +").encode() == new
    with pytest.raises(RpcError, match="make it in parts"):
        moltis.file_diff(b"", b"x" * (moltis.MAX_DIFF + 1))


def splice(base, path, splices, expects, **changes):
    spec = FileWrite(path, splices=splices, expects=expects)
    places = FilePlaces(str(base))
    return moltis.SplicedFile(spec, places, lambda _: None, umask=0o022).write()


def piece(offset, length, data):
    return moltis.Splice(offset, length, base64.b64encode(data).decode())


def test_what_is_written_is_what_was_read_with_the_change(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"one two three")
    path.chmod(0o640)
    (tmp_path / "link").symlink_to("f")
    digest = hashlib.sha256(b"one two three").hexdigest()
    changes = [piece(0, 3, b"1"), piece(8, 5, b"3!")]
    result = splice(tmp_path, "link", changes, digest)
    assert path.read_bytes() == b"1 two 3!"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert (tmp_path / "link").is_symlink()
    assert result["sha256"] == hashlib.sha256(b"1 two 3!").hexdigest()
    assert result["path"] == str(path)
    made = splice(tmp_path, "new", [piece(0, 0, b"x")], "")
    assert (made["bytes"], (tmp_path / "new").read_bytes()) == (1, b"x")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o644


@pytest.fixture
def place(tmp_path):
    path = tmp_path / "place"
    path.mkdir()
    return path


def test_another_file_than_that_of_the_diff_is_not_written(place):
    digest = hashlib.sha256(b"old").hexdigest()
    (place / "f").write_bytes(b"other")
    (place / "d").mkdir()
    for path, expects in (("f", digest), ("f", ""), ("none", digest), ("d", "")):
        with pytest.raises(RpcError, match=f"{path}: .*") as caught:
            splice(place, path, [piece(0, 3, b"new")], expects)
        assert len(caught.value.message) < 200
    assert (place / "f").read_bytes() == b"other"
    assert sorted(os.listdir(place)) == ["d", "f"]


def test_a_file_that_changes_while_it_is_written_stays(place, monkeypatch):
    path = place / "f"
    path.write_bytes(b"old")
    digest = hashlib.sha256(b"old").hexdigest()
    monkeypatch.setattr(os, "fsync", lambda _fd: path.write_bytes(b"meanwhile"))
    with pytest.raises(RpcError, match="is not the file that was read before"):
        splice(place, "f", [piece(0, 3, b"new")], digest)
    assert path.read_bytes() == b"meanwhile"
    assert os.listdir(place) == ["f"]


# -- a model ---------------------------------------------------------------------


@pytest.fixture
def home(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "conf").write_bytes(b"port = 1\r\nname = x\r\n")
    return home


@pytest.fixture
def chat(tmp_path, home):
    machines = Machines(tmp_path)
    machines.connect("pi-id", "Pi", files=FilePlaces(str(home)))
    chat = Chat(machines)
    chat.talk.select("pi-id")
    yield chat
    machines.close()


def use(chat, name, **arguments):
    """Return the result of one call of a tool that nobody is asked about."""
    chat.run(Scripted(calls((name, arguments)), says("ok")))
    return chat.results()[-1]


def begin(chat, name, **arguments):
    return chat.start(Scripted(calls((name, arguments)), says("ok")))


def test_a_model_reads_lists_edits_and_writes_files(chat, home):
    path = str(home / "conf")
    assert use(chat, "file_read", path="conf") == {
        "node": "Pi",
        "path": path,
        "text": "     1\tport = 1\n     2\tname = x\n",
        "lines": 2,
        "size": 20,
        "encoding": "UTF-8",
        "line_ends": "CRLF",
    }
    result = use(chat, "file_edit", path="conf", old="1\nname", new="2\nname")
    assert (result["path"], result["replaced"], result["made"]) == (path, 1, False)
    assert (home / "conf").read_bytes() == b"port = 2\r\nname = x\r\n"
    assert use(chat, "file_write", path="new", content="hello\n")["made"] is True
    assert (home / "new").read_bytes() == b"hello\n"
    names = [entry["name"] for entry in use(chat, "file_list", path=".")["entries"]]
    assert names == ["conf", "new"]


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("file_read", {"path": "none"}, "none: No such file or directory"),
        ("file_read", {"path": " "}, "path is empty"),
        ("file_read", {"path": "conf", "limit": 2001}, "limit 1 to 2,000"),
        ("file_read", {"path": "conf", "offset": 0}, "a line from 1 on"),
        ("file_read", {"path": "a\0b"}, "a path holds a NUL character"),
        ("file_read", {"path": "conf", "node": "Local"}, "does not share its files"),
        ("file_list", {"path": "none"}, "none: No such file or directory"),
        ("file_edit", {"path": "conf", "old": "=", "new": "x"}, "at the lines 1, 2"),
        ("file_edit", {"path": "none", "old": "=", "new": "x"}, "not in the file"),
        ("file_write", {"path": ".", "content": "x"}, "is a directory, not a file"),
        ("file_write", {"path": "no/f", "content": "x"}, "No such file or directory"),
        ("file_write", {"path": "b", "content": "x" * 300_000}, "file_write takes"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(chat, home, name, arguments, sentence):
    result = use(chat, name, **arguments)
    assert sentence in result["error"]
    assert os.listdir(home) == ["conf"]
    shown = [call.id for call, _ in chat.talk.of("begin_call")]
    assert shown == [call.id for call, _ in chat.talk.of("end_call")]


def test_a_change_asks_with_its_diff_and_that_is_what_is_written(chat, home):
    chat.talk.asks = True
    thread = begin(chat, "file_write", path="conf", content="port = 3\r\nname = x\r\n")
    question = approve(chat, allowed=True)
    thread.join()
    assert question.diff == "@@ -1,2 +1,2 @@\n-port = 1\n+port = 3\n name = x"
    assert question.command == f"write {home}/conf"
    assert (home / "conf").read_bytes() == b"port = 3\r\nname = x\r\n"
    row = chat.ran()[-1]
    assert (row.id, row.work, row.decided_by) == (question.job_id, "file.write", "anna")
    digest = hashlib.sha256((home / "conf").read_bytes()).hexdigest()
    where = f"1 file ({home}/conf), 20 bytes"
    assert row.words() == f"done: {where}, SHA-256 {digest}"
    assert (row.result["path"], row.result["sha256"]) == (f"{home}/conf", digest)


def test_a_file_that_changed_while_the_person_looked_is_not_written(chat, home):
    chat.talk.asks = True
    thread = begin(chat, "file_write", path="conf", content="new")
    wait_for(lambda: open_questions(chat))
    (home / "conf").write_bytes(b"somebody else's")
    approve(chat, allowed=True)
    thread.join()
    assert "is not the file that was read before" in chat.results()[-1]["error"]
    assert (home / "conf").read_bytes() == b"somebody else's"


def test_a_change_that_is_denied_is_not_written(chat, home):
    chat.talk.asks = True
    thread = begin(chat, "file_write", path="conf", content="new")
    approve(chat, allowed=False)
    thread.join()
    assert chat.results()[-1]["error"] == "denied by the user"
    assert (home / "conf").read_bytes() == b"port = 1\r\nname = x\r\n"


def test_reading_asks_until_a_person_allows_it_here(chat):
    chat.talk.asks = True
    thread = begin(chat, "file_read", path="conf")
    question = approve(chat, allowed=True, always=True)
    thread.join()
    assert (question.command, question.work) == ("read conf", "file.read")
    assert use(chat, "file_read", path="conf")["lines"] == 2
    assert use(chat, "file_list", path=".")["entries"]
    # Neither a command nor a change is allowed with it.
    for name, arguments in (
        ("exec", {"command": "true"}),
        ("file_edit", {"path": "conf", "old": "1", "new": "2"}),
    ):
        thread = begin(chat, name, **arguments)
        approve(chat, allowed=False)
        thread.join()
        assert chat.results()[-1]["error"] == "denied by the user"


def test_an_edit_of_a_file_that_was_not_read_asks_for_that_first(chat, home):
    chat.talk.asks = True
    thread = begin(chat, "file_edit", path="conf", old="1", new="2")
    assert approve(chat, allowed=True).command == "read conf"
    wait_for(lambda: len(chat.talk.of("ask")) == 2 and open_questions(chat))
    assert approve(chat, allowed=True).command == f"write {home}/conf"
    thread.join()
    assert chat.results()[-1]["replaced"] == 1
    thread = begin(chat, "file_edit", path="conf", old="zzz", new="2")
    approve(chat, allowed=False)
    thread.join()
    assert chat.results()[-1]["error"] == "denied by the user"


def test_always_is_no_answer_to_a_change(chat, home):
    chat.talk.asks = True
    thread = begin(chat, "file_write", path="conf", content="new")
    with pytest.raises(RpcError, match="allowed for itself, not always"):
        approve(chat, allowed=True, always=True)
    approve(chat, allowed=False)
    thread.join()


def test_a_change_through_a_link_names_the_file_that_changes(chat, home, tmp_path):
    target = tmp_path / "elsewhere"
    target.write_text("old\n")
    (home / "notes").symlink_to(target)
    chat.talk.asks = True
    thread = begin(chat, "file_write", path="notes", content="new\n")
    question = approve(chat, allowed=True)
    thread.join()
    assert question.command == f"write {target}"
    assert target.read_text() == "new\n"
    assert (home / "notes").is_symlink()


def test_what_a_model_may_not_read_it_does_not_learn_by_writing(chat, home):
    (home / "same").write_text("secret")
    (home / "directory").mkdir()
    chat.talk.asks = True
    for name in ("same", "directory"):
        result = use(chat, "file_write", path=name, content="secret")
        assert result["error"] == f"{name}: cannot be replaced; file_read says more"


def test_a_change_outside_of_home_is_pointed_out():
    planned = moltis.PlannedCommand("j", "n", "N", "write /etc/x", work="file.write")
    outside = planned.replace(path="/etc/hosts").risks()
    assert outside == ["writes outside the home directory (/etc/hosts)"]
    assert planned.replace(path="/home/me/x").risks() == []


# -- MCP -------------------------------------------------------------------------


@pytest.fixture
def gateway(tmp_path):
    with InProcessGateway(tmp_path / "gateway") as running:
        yield running


def test_mcp_clients_read_and_change_files_with_the_right_hints(gateway, tmp_path):
    (tmp_path / "f").write_text("a\nb\n")
    client = McpClient(gateway)
    try:
        path = str(tmp_path / "f")
        assert client.tool(1, "file_read", path=path, offset=2)[1]["text"] == (
            "     2\tb\n"
        )
        failed, result = client.tool(2, "file_edit", path=path, old="b", new="c")
        assert (failed, result["replaced"]) == (False, 1)
        assert (tmp_path / "f").read_text() == "a\nc\n"
        assert client.tool(3, "file_write", path=path, content="z")[1]["size"] == 1
        assert client.tool(4, "file_write", path=path, content="z")[0]
        entries = client.tool(5, "file_list", path=str(tmp_path))[1]["entries"]
        assert "f" in [entry["name"] for entry in entries]
        tools = client.request(6, "tools/list")["result"]["tools"]
        hints = {tool["name"]: tool["annotations"] for tool in tools}
        assert hints["file_read"]["readOnlyHint"] is True
        assert hints["file_list"]["readOnlyHint"] is True
        for name, idempotent in (("file_write", True), ("file_edit", False)):
            assert hints[name]["readOnlyHint"] is False
            assert hints[name]["destructiveHint"] is True
            assert hints[name]["idempotentHint"] is idempotent
    finally:
        client.close()


def test_a_key_that_only_reads_has_no_tool_for_files(gateway):
    class Reader:
        def operator(self):
            key = gateway.call("keys.create", name="r", scopes=["operator.read"])["key"]
            trust = gateway.trust
            return moltis.OperatorClient(gateway.url, key, trust)

    client = McpClient(Reader())
    try:
        tools = client.request(1, "tools/list")["result"]["tools"]
        assert not [tool for tool in tools if tool["name"].startswith("file_")]
        failed, result = client.tool(2, "file_read", path="/etc/passwd")
        assert failed
        assert "operator.write" in result["error"]
    finally:
        client.close()


def test_a_cancelled_call_over_mcp_ends_its_transfer(gateway, tmp_path, monkeypatch):
    begun = threading.Event()

    def read(_source, pause):
        begun.set()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            pause()
            time.sleep(0.01)
        raise AssertionError("nobody ended the transfer")

    monkeypatch.setattr(moltis.TextSource, "read", read)
    call = {"name": "file_read", "arguments": {"path": str(tmp_path / "f")}}
    client = McpClient(gateway)
    try:
        client.send({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call})
        assert begun.wait(30)
        (job,) = gateway.call("job.list", state="open")
        note = {"jsonrpc": "2.0", "method": "notifications/cancelled"}
        client.send({**note, "params": {"requestId": 1}})
        wait_for(lambda: not gateway.call("job.list", state="open"), what="its end")
        assert gateway.call("job.wait", id=job["id"])["state"] == "cancelled"
        assert client.request(2, "ping")["result"] == {}
        assert all(answer["id"] != 1 for answer in client.answers)
    finally:
        client.close()


def test_a_change_whose_answer_was_lost_is_made_once_and_that_is_said(
    gateway, tmp_path
):
    asked = {
        "nodeId": "local",
        "work": "file.change",
        "spec": {"action": "mkdir", "path": moltis.encode_path(str(tmp_path / "new"))},
        "jobId": moltis.uuid_text(bytes(16)),
    }
    gateway.call("job.once", **asked)
    (tmp_path / "new").rmdir()
    with pytest.raises(moltis.MoltisError, match="it was done, but its answer is lost"):
        gateway.call("job.once", **asked)
    assert not (tmp_path / "new").exists()


def test_a_node_of_moltis_is_refused_with_a_sentence(gateway):
    with gateway.peer() as peer:
        token = gateway.token("Rust box")
        assert peer.request("connect", rust_connect(token))["ok"]
        for work, spec in (
            ("file.list", {"path": "."}),
            ("file.read", {"paths": ["."]}),
            ("file.write", {"path": "x", "splices": []}),
        ):
            with pytest.raises(
                moltis.MoltisError, match="cannot do that: it is a node of Moltis"
            ):
                gateway.call("job.once", nodeId="rust-1", work=work, spec=spec)
