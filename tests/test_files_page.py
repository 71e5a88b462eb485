"""A machine's files on the page, in a real Chromium, and their downloads over HTTP."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import Browser
from peers import RawPeer, other_node, revoke, rust_connect
from support import wait_for
from world import World

import moltis

READY = "document.querySelector('#app').hidden === false"
NAMES = """[...document.querySelectorAll("#files-rows .file [data-part=name]")]
  .sort((a, b) => a.closest(".file").ariaRowIndex - b.closest(".file").ariaRowIndex)
  .map(name => name.textContent)"""
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360f8cfc0f01f0005000180d8a3f1"
    "a70000000049454e44ae426082"
)


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("files-page"), silent=False)
    yield world
    world.close()


@pytest.fixture(scope="module")
def shared_page():
    with Browser() as browser, browser.new_page() as page:
        yield page


@pytest.fixture
def world(shared_world, tmp_path):
    shared_world.scratch = tmp_path
    yield shared_world
    shared_world.node_proxy.heal()


@pytest.fixture
def page(shared_page, world):
    """A page that is signed in, at the files of the node, in a directory of its own."""
    if not shared_page.urls:
        shared_page.goto(f"{world.direct_url}/#key={world.api_key}")
        shared_page.wait_for(READY)
    shared_page.set_viewport(1280, 800)
    yield shared_page
    assert shared_page.errors == []
    allowed = (f"{world.direct_url}/", f"ws{world.direct_url[4:]}/", "data:")
    assert [url for url in shared_page.urls if not url.startswith(allowed)] == []


def show(page, world, path="", node="far"):
    """Go to a directory or a file below the test's own, as a link leads there."""
    full = f"{world.scratch}/{path}".rstrip("/")
    page.goto(f"{world.direct_url}/nodes/{node}/files{moltis.quote(os.fsencode(full))}")
    page.wait_for(READY)


def names(page):
    return page.evaluate(NAMES)


def wait_for_names(page, *expected):
    wait_for(lambda: names(page) == list(expected), what=lambda: f"{names(page)}")


def test_a_directory_is_listed_with_directories_first(page, world):
    (world.scratch / "b.txt").write_text("x" * 2000)
    (world.scratch / "a10").touch()
    (world.scratch / "a9").touch()
    (world.scratch / "zoo").mkdir()
    (world.scratch / ".hidden").touch()
    (world.scratch / "to zoo").symlink_to("zoo")
    show(page, world)
    wait_for_names(page, "to zoo", "zoo", "a9", "a10", "b.txt")
    assert "→ zoo" in page.text("#files-rows")
    assert page.text("#files-note") == "5 entries · 1 hidden"
    page.click("#files-head button:nth-child(2)")  # the largest first
    wait_for_names(page, "to zoo", "zoo", "b.txt", "a9", "a10")
    page.click("#files-hidden")
    wait_for(lambda: ".hidden" in names(page))
    page.click("#files-hidden")
    page.fill("#files-find", "A")
    wait_for_names(page, "a9", "a10")


def test_names_are_kept_byte_for_byte(page, world):
    odd = [
        b"caf\xe9",
        b"  a  b%41?#&",
        "ünï€😀".encode(),
        b"\xed\xa0\x80",
        b"new\nline",
    ]
    for number, name in enumerate(odd):
        path = os.path.join(os.fsencode(str(world.scratch)), name)
        os.mkdir(path)
        Path(os.fsdecode(path), f"inside-{number}").write_text(f"text {number}")
    show(page, world)
    wait_for(lambda: len(names(page)) == len(odd))
    assert {r"caf\xe9", "ünï€😀", r"\xed\xa0\x80", r"new\nline"} < set(names(page))
    # To a person as well, with all spaces.
    assert page.evaluate(
        """[...document.querySelectorAll("#files-rows .file [data-part=name]")]
          .every(name => name.innerText === name.textContent)"""
    )
    for number in range(len(odd)):
        shown = [r"caf\xe9", "  a  b%41?#&", "ünï€😀", r"\xed\xa0\x80", r"new\nline"][
            number
        ]
        row = f"""[...document.querySelectorAll("#files-rows .file")].find(row =>
          row.querySelector("[data-part=name]").textContent === {json.dumps(shown)})"""
        page.evaluate(f"{row}.querySelector('a').click()")
        wait_for_names(page, f"inside-{number}")
        page.reload()  # its address leads there, too
        page.wait_for(READY)
        wait_for_names(page, f"inside-{number}")
        page.click("#files-up")
        wait_for(lambda: len(names(page)) == len(odd))


def test_ten_thousand_entries_stay_usable(page, world):
    for number in range(10_000):
        (world.scratch / f"f{number}").touch()
    show(page, world)
    page.wait_for_text("10,000 entries")
    assert names(page)[:3] == ["f0", "f1", "f2"]
    assert page.evaluate("document.querySelectorAll('#files-rows .file').length") < 80
    page.evaluate("document.querySelector('#files-rows').focus()")
    page.press("End")
    wait_for(lambda: names(page)[-1:] == ["f9999"])
    page.wait_for_text("f9999")
    page.fill("#files-find", "777")
    page.wait_for("document.querySelector('#files-note').textContent.startsWith('19 ')")


def test_keys_lead_through_a_directory(page, world):
    (world.scratch / "one").mkdir()
    (world.scratch / "two").write_text("the text of two")
    show(page, world)
    wait_for_names(page, "one", "two")
    page.evaluate("document.querySelector('#files-rows').focus()")
    page.press("ArrowDown")
    page.press("ArrowDown")
    page.press("Enter")
    page.wait_for_text("the text of two")
    assert page.evaluate("location.pathname.endsWith('/two')")


def test_the_path_is_completed(page, world):
    (world.scratch / "documents" / "letters").mkdir(parents=True)
    (world.scratch / "downloads").mkdir()
    show(page, world)
    wait_for_names(page, "documents", "downloads")
    page.fill("#files-path", f"{world.scratch}/do")
    page.wait_for("document.querySelectorAll('#files-matches li').length === 2")
    page.press("ArrowDown")
    page.press("Enter")
    page.wait_for("document.querySelector('#files-matches').innerText === 'letters'")
    page.press("Tab")
    page.press("Enter")
    page.wait_for_text("This directory is empty.")
    assert page.evaluate("location.pathname.endsWith('/documents/letters/')") is False
    page.fill("#files-path", f"{world.scratch}/do")
    page.click("#files-matches li:last-child")
    page.wait_for(
        "document.querySelector('#files-path').value.endsWith('/downloads/') && "
        "document.activeElement.id === 'files-path'"
    )


def test_a_text_is_shown_with_line_numbers(page, world):
    (world.scratch / "page.html").write_text(
        "<h1>no\n<script>document.title='x'</script>\n"
    )
    show(page, world, "page.html")
    page.wait_for_text("<h1>no")
    assert page.text(".text pre:first-child") == "1\n2"
    assert page.evaluate("document.title.includes('x')") is False
    (world.scratch / "wide").write_bytes("grüße\r\n".encode("utf-16"))
    show(page, world, "wide")
    page.wait_for_text("grüße")


def test_a_raster_image_is_shown_and_never_one_that_runs(page, world):
    (world.scratch / "image.png").write_bytes(PNG)
    show(page, world, "image.png")
    page.wait_for("document.querySelector('.picture')?.naturalWidth === 1")
    (world.scratch / "image.svg").write_text(
        "<svg xmlns='http://www.w3.org/2000/svg'/>"
    )
    show(page, world, "image.svg")
    page.wait_for_text("<svg xmlns=")
    assert page.evaluate("document.querySelector('.picture')") is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("binary", "neither a text nor an image"),
        ("large", "too large to be shown here: 1 MiB"),
        ("pipe", "neither a file nor a directory"),
        ("gone", "gone: No such file or directory"),
    ],
)
def test_what_is_not_shown_is_said(page, world, name, words):
    (world.scratch / "binary").write_bytes(b"\x7fELF\0\1\2")
    (world.scratch / "large").write_bytes(b"a" * (1024 * 1024 + 1))
    os.mkfifo(world.scratch / "pipe")
    show(page, world, name)
    page.wait_for_text(words)


def test_a_click_downloads_a_file_and_a_directory(page, world):
    (world.scratch / "d").mkdir()
    (world.scratch / "d" / "f").write_text("below")
    (world.scratch / 'naïve "file".txt').write_text("content")
    target = world.scratch / "saved"
    target.mkdir()
    behaviour = {"behavior": "allow", "downloadPath": str(target)}
    page.call("Page.setDownloadBehavior", **behaviour)
    show(page, world)
    wait_for(lambda: len(names(page)) == 3)
    for number in (1, 3):
        page.evaluate(
            "document.querySelector(`#files-rows [aria-rowindex='"
            f"{number}'] [data-part=save]`).click()"
        )
    saved = target / "d.tar", target / "naïve _file_.txt"
    wait_for(
        lambda: all(path.exists() for path in saved), what=lambda: os.listdir(target)
    )
    assert saved[1].read_text() == "content"
    with tarfile.open(saved[0]) as tar:
        assert tar.getnames() == ["d", "d/f"]


def test_what_a_download_of_a_directory_leaves_out_is_said(page, world):
    (world.scratch / "site").mkdir()
    (world.scratch / "site" / "kept").write_text("kept")
    os.mkfifo(world.scratch / "site" / "pipe")
    target = world.scratch / "saved"
    target.mkdir()
    behaviour = {"behavior": "allow", "downloadPath": str(target)}
    page.call("Page.setDownloadBehavior", **behaviour)
    show(page, world)
    wait_for_names(page, "saved", "site")
    page.evaluate("document.querySelector('[aria-label$=\".tar: site\"]').click()")
    page.wait_for("!document.querySelector('#toast').hidden")
    said = page.text("#toast")
    assert said.startswith("site.tar: ")
    assert "pipe" in said
    assert "neither a file nor a directory" in said
    wait_for((target / "site.tar").exists, what=lambda: os.listdir(target))
    with tarfile.open(target / "site.tar") as tar:
        assert tar.getnames() == ["site", "site/kept"]


def test_a_machine_that_lends_no_files_says_so(page, world):
    with other_node(world, "closed", files=False):
        show(page, world, node="closed")
        page.wait_for_text("This machine's owner does not share its files")
        assert page.evaluate("document.querySelector('#files-list').hidden")
        seen = "[...document.querySelectorAll('#files .bar .button')]"
        assert page.evaluate(f"{seen}.filter(b => b.offsetParent).length") == 0


def test_a_machine_confined_to_directories_begins_in_the_first(page, world):
    shared = world.scratch / "shared"
    shared.mkdir()
    (shared / "f").touch()
    (world.scratch / "secret").touch()
    with other_node(world, "confined", allow_files=[str(shared)]):
        page.goto(f"{world.direct_url}/nodes/confined/files")
        page.wait_for(READY)
        wait_for_names(page, "f")
        page.wait_for(f"location.pathname.endsWith({json.dumps(f'{shared}')})")
        page.click("#files-up")
        page.wait_for("document.querySelector('#files-problem').innerText !== ''")
        assert "shared" in page.text("#files-problem")
        assert page.evaluate("document.querySelector('#files-list').hidden")


def test_a_moltis_node_says_that_it_has_no_files(page, world):
    token = world.rpc("device.token.create", displayName="Rust box")["deviceToken"]
    with RawPeer(f"ws{world.direct_url[4:]}/ws") as peer:
        assert peer.request("connect", rust_connect(token))["ok"]
        show(page, world, node="rust-1")
        page.wait_for("document.querySelector('#files-problem').innerText !== ''")
        assert "Rust box" in page.text("#files-problem")
        assert page.evaluate("document.querySelector('#files-list').hidden")
    revoke(world, "rust-1")


def row(name, part):
    """Return the selector of a button in the row of a file."""
    label = {"rename": "Rename", "remove": "Delete", "save": "Download"}[part]
    return f"#files-rows [aria-label={json.dumps(f'{label}: {name}')}]"


def press(page, name, part):
    page.wait_for(f"document.querySelector({json.dumps(row(name, part))}) !== null")
    page.evaluate(f"document.querySelector({json.dumps(row(name, part))}).click()")


def test_a_directory_is_made_and_a_file_renamed(page, world):
    (world.scratch / "old.txt").write_text("content")
    (world.scratch / "other").touch()
    show(page, world)
    page.click("#files-make")
    page.fill("#name-text", "new directory")
    page.press("Enter")
    wait_for_names(page, "new directory", "old.txt", "other")
    press(page, "old.txt", "rename")
    page.type("new")  # the ending is not selected
    page.press("Enter")
    wait_for_names(page, "new directory", "new.txt", "other")
    assert (world.scratch / "new.txt").read_text() == "content"
    press(page, "new.txt", "rename")
    page.fill("#name-text", "other")
    page.press("Enter")
    page.wait_for_text("other: is there already")
    assert (world.scratch / "new.txt").read_text() == "content"


def test_what_is_deleted_was_named_in_the_question(page, world):
    (world.scratch / "d" / "sub").mkdir(parents=True)
    (world.scratch / "d" / "sub" / "deep").touch()
    (world.scratch / "d" / "f").touch()
    (world.scratch / "kept").mkdir()
    (world.scratch / "kept" / "f").touch()
    (world.scratch / "link").symlink_to("kept")
    show(page, world)
    press(page, "link", "remove")
    page.wait_for_text("Delete link on far?")
    page.wait_for_text("Only the link is deleted")
    page.click("#confirm-yes")
    wait_for_names(page, "d", "kept")
    press(page, "d", "remove")
    page.wait_for_text("Delete d on far?")
    page.wait_for_text("It is not empty: f, sub are deleted with it")
    page.click("#confirm button")  # Cancel
    press(page, "d", "remove")
    page.wait_for_text("Delete d on far?")
    page.click("#confirm-yes")
    wait_for_names(page, "kept")
    assert os.listdir(world.scratch / "kept") == ["f"]


# -- uploads ---------------------------------------------------------------------


@pytest.fixture
def chosen(tmp_path_factory):
    """A directory of the person at the browser, apart from the machine's."""
    path = tmp_path_factory.mktemp("chosen")
    (path / "site" / "empty").mkdir(parents=True)
    (path / "site" / "ünï").mkdir()
    (path / "site" / "ünï" / ("x" * 120)).write_bytes(os.urandom(100_000))
    (path / "site" / "none").touch()
    (path / "f").write_bytes(os.urandom(3_000_000))
    os.utime(path / "f", ns=(1_234_567_890_123_000_000,) * 2)
    return path


def choose(page, selector, *paths):
    """Choose files in a field, as a person does in the browser's own dialog."""
    document = page.call("DOM.getDocument")["root"]["nodeId"]
    field = page.call("DOM.querySelector", nodeId=document, selector=selector)
    files = list(map(str, paths))
    page.call("DOM.setFileInputFiles", files=files, nodeId=field["nodeId"])


def drop(page, selector, *paths):
    box = page.evaluate(f"""(box => [box.x + box.width / 2, box.y + box.height / 2])(
      document.querySelector({json.dumps(selector)}).getBoundingClientRect())""")
    data = {"items": [], "files": list(map(str, paths)), "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        page.call("Input.dispatchDragEvent", type=kind, x=box[0], y=box[1], data=data)


def uploaded(page, words):
    """Wait for what an upload says, then close what is said."""
    page.wait_for(f"document.querySelector('#uploads').innerText.includes({words!r})")
    page.evaluate("document.querySelectorAll('#uploads .bare').forEach(b => b.click())")
    page.wait_for("document.querySelectorAll('#uploads li').length === 0")


def contents(path):
    """Return what is in each file below, None for directories."""
    return {
        str(each.relative_to(path)): each.read_bytes() if each.is_file() else None
        for each in path.rglob("*")
    }


def test_a_file_is_uploaded_by_a_button(page, world, chosen):
    show(page, world)
    page.wait_for_text("This directory is empty.")
    choose(page, "#files-chosen", chosen / "f")
    uploaded(page, "1 file uploaded")
    assert contents(world.scratch) == {"f": (chosen / "f").read_bytes()}
    assert (world.scratch / "f").stat().st_mtime_ns == 1_234_567_890_123_000_000
    wait_for_names(page, "f")
    (job,) = world.rpc("job.list", limit=1)
    assert job["command"] == f"write {world.scratch}"
    assert f"1 file ({world.scratch}/f), 3,000,000 bytes, SHA-256 " in job["reason"]
    assert job["callerName"] == "owner"


def test_the_second_of_two_files_of_one_name_is_said(page, world, chosen):
    """A phone lets one choose from several albums at once."""
    show(page, world)
    page.wait_for_text("This directory is empty.")
    (chosen / "site" / "f").write_text("another")
    choose(page, "#files-chosen", chosen / "f", chosen / "site" / "f")
    uploaded(page, "f: two files of this name are copied; only the first is there")
    assert contents(world.scratch) == {"f": (chosen / "f").read_bytes()}


def test_a_directory_is_uploaded_by_a_button_of_a_phone(page, world, chosen):
    page.set_viewport(390, 844)
    show(page, world)
    page.wait_for_text("This directory is empty.")
    box = "document.querySelector('#files-send-all').getBoundingClientRect()"
    page.wait_for(f"{box}.width > 30 && {box}.right <= 390")
    assert page.text("#files-title") == "far"
    cut = "(title => title.scrollWidth > title.clientWidth)"
    assert not page.evaluate(f"{cut}(document.querySelector('#files-title'))")
    choose(page, "#files-chosen-all", chosen / "site")
    uploaded(page, "2 files uploaded")
    assert (world.scratch / "site" / "none").exists()


def test_a_directory_is_uploaded_by_dropping_it(page, world, chosen):
    show(page, world)
    page.wait_for_text("This directory is empty.")
    drop(page, "#files-list", chosen / "site", chosen / "f")
    uploaded(page, "3 files uploaded")
    assert contents(world.scratch) == contents(chosen)


def test_what_is_there_is_replaced_only_if_a_person_says_so(page, world, chosen):
    (world.scratch / "f").write_text("mine")
    show(page, world)
    wait_for_names(page, "f")
    choose(page, "#files-chosen", chosen / "f", chosen / "site" / "none")
    page.wait_for_text("f is already on far")
    page.click("#confirm-other")
    uploaded(page, "f: is there already, and stays as it is")
    assert contents(world.scratch) == {"f": b"mine", "none": b""}
    choose(page, "#files-chosen", chosen / "f")
    page.wait_for_text("f is already on far")
    page.click("#confirm button")  # Cancel
    choose(page, "#files-chosen", chosen / "f")
    page.wait_for_text("f is already on far")
    page.click("#confirm-yes")
    uploaded(page, "1 file uploaded")
    assert (world.scratch / "f").read_bytes() == (chosen / "f").read_bytes()


def test_a_question_waits_for_the_answer_to_the_one_before(page, world, chosen):
    """An upload asks once its directory is listed, whatever is asked by then."""
    (world.scratch / "f").write_text("mine")
    show(page, world)
    wait_for_names(page, "f")
    choose(page, "#files-chosen", chosen / "f")
    page.wait_for_text("f is already on far")
    page.evaluate("document.querySelector('#files-rows [data-part=remove]').click()")
    assert "f is already on far" in page.text("#confirm")
    page.click("#confirm-yes")
    page.wait_for_text("Delete f on far?")
    page.click("#confirm button")  # Cancel
    uploaded(page, "1 file uploaded")
    assert (world.scratch / "f").read_bytes() == (chosen / "f").read_bytes()


def test_a_question_about_a_file_shows_what_hides_in_its_name(page, world, chosen):
    name = "no\u200bsh"
    for directory in (world.scratch, chosen):
        (directory / name).touch()
    show(page, world)
    page.wait_for_text("1 entry")
    choose(page, "#files-chosen", chosen / name)
    page.wait_for_text("no\\u200bsh is already on far")
    page.click("#confirm button")  # Cancel
    page.evaluate("document.querySelector('#files-rows [data-part=rename]').click()")
    page.wait_for_text("Rename no\\u200bsh")


def begin_upload(page, world, path, size):
    """Upload a large file over a link so slow that the upload does not end by itself.

    Return its path once some of it has arrived.
    """
    with path.open("wb") as file:
        file.truncate(size)
    world.node_proxy.delay = 0.2
    choose(page, "#files-chosen", path)
    page.wait_for(
        "[...document.querySelectorAll('#uploads progress')].some(bar => bar.value > 0)"
    )
    return path


def test_what_is_cancelled_is_not_uploaded(page, world, chosen):
    show(page, world)
    page.wait_for_text("This directory is empty.")
    begin_upload(page, world, chosen / "large", 2_000_000_000)
    page.click("#uploads .bare")
    uploaded(page, "Cancelled: nothing was uploaded.")
    wait_for(lambda: world.rpc("job.list", limit=1)[0]["state"] == "cancelled")
    wait_for(lambda: os.listdir(world.scratch) == [])


def test_an_upload_goes_on_after_a_broken_link_and_a_reload(page, world, chosen):
    show(page, world)
    page.wait_for_text("This directory is empty.")
    large = begin_upload(page, world, chosen / "large", 60_000_000)
    page.reload()
    page.wait_for(READY)
    page.wait_for_text("Stopped by a reload: choose it again to go on.")
    choose(page, "#uploads input", chosen / "f")
    page.wait_for_text("These are not the files that were being uploaded.")
    buttons = "[...document.querySelectorAll('#uploads button')]"
    page.evaluate(f"{buttons}[0].focus()")
    page.press("Tab")
    assert page.evaluate(f"{buttons}.map(it => it.textContent)[0]") == "Choose it again"
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused.startswith("Cancel: large")
    world.node_proxy.cut()
    world.node_proxy.heal()
    choose(page, "#uploads input", large)
    uploaded(page, "1 file uploaded")
    assert (world.scratch / "large").stat().st_size == 60_000_000
    assert os.listdir(world.scratch) == ["large"]
    (job,) = world.rpc("job.list", limit=1)
    assert (job["result"]["files"], job["result"]["bytes"]) == (1, 60_000_000)


# The connection breaks as soon as the page asks about its upload.
BROKEN_ONCE = """(() => {
  const {send} = WebSocket.prototype;
  WebSocket.prototype.send = function(data) {
    if (this.readyState !== WebSocket.OPEN) return;
    if (!String(data).includes('"job.wait"') || sessionStorage.broken)
      return send.call(this, data);
    sessionStorage.broken = "yes";
    this.close();
  };
})()"""


def test_an_upload_is_kept_if_the_connection_breaks_after_a_reload(page, world, chosen):
    show(page, world)
    page.wait_for_text("This directory is empty.")
    large = begin_upload(page, world, chosen / "large", 60_000_000)
    script = page.call("Page.addScriptToEvaluateOnNewDocument", source=BROKEN_ONCE)
    page.reload()
    page.wait_for("sessionStorage.broken")
    page.call("Page.removeScriptToEvaluateOnNewDocument", **script)
    page.wait_for_text("Stopped by a reload: choose it again to go on.")
    world.node_proxy.heal()
    choose(page, "#uploads input", large)
    uploaded(page, "1 file uploaded")
    assert (world.scratch / "large").stat().st_size == 60_000_000


def test_what_cannot_be_written_is_said(page, world, chosen):
    (world.scratch / "site").write_text("a file")
    show(page, world)
    wait_for_names(page, "site")
    drop(page, "#files-list", chosen / "site")
    page.wait_for_text("site is already on far")
    page.click("#confirm-yes")
    uploaded(page, "a file or a link is where a directory has to be")


def test_a_file_dropped_on_a_chat_is_there_and_mentioned(page, world, chosen):
    world.rpc("sessions.patch", key="main", node_id="far")
    page.goto(f"{world.direct_url}/chat/main")
    page.wait_for(READY)
    page.wait_for("document.querySelector('#node-button').innerText === 'far'")
    name = "dropped on the chat"
    (chosen / name).write_text("content")
    page.fill("#text", "cat")
    drop(page, "#transcript", chosen / name)
    path = world.directory / name
    page.wait_for(f"document.querySelector('#text').value === \"cat '{path}'\"")
    assert path.read_text() == "content"
    uploaded(page, "1 file uploaded")
    page.fill("#text", "")


# -- over HTTP -------------------------------------------------------------------


def post(world, body, key=None, **headers):
    """Prepare a download; return the status and the answer."""
    headers = {"Authorization": f"Bearer {key or world.api_key}", **headers}
    data = json.dumps(body).encode()
    url = f"{world.direct_url}/api/downloads/"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, data, headers), timeout=30
        ) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            text = error.read().decode()
            return error.code, json.loads(text) if text[0] == "{" else text


def prepare(world, path, **options):
    path = moltis.encode_path(path)
    status, answer = post(world, {"nodeId": "far", "path": path, **options})
    assert status == 200, answer
    return f"{world.direct_url}/{answer['url']}"


def fetch(url, method="GET"):
    return urllib.request.urlopen(
        urllib.request.Request(url, method=method), timeout=30
    )


def test_a_small_file_of_any_name_is_downloaded(world):
    path = os.fsencode(world.scratch) + b"/\xff.txt"
    with open(path, "wb") as file:
        file.write(b"small")
    with fetch(prepare(world, os.fsdecode(path))) as answer:
        assert answer.read() == b"small"
        assert "filename*=UTF-8''%EF%BF%BD.txt" in answer.headers["Content-Disposition"]
    assert post(world, {"nodeId": "far", "path": "/none"})[1]["error"]["message"]


def test_a_download_is_saved_and_never_run(world):
    name = 'naïve\u202e".html'
    (world.scratch / name).write_bytes(b"<script>" * 50_000)
    url = prepare(world, f"{world.scratch}/{name}")
    with fetch(url, "HEAD") as answer:
        assert answer.headers["Content-Length"] == "400000"
    with fetch(url) as answer:
        headers = answer.headers
        assert answer.read() == b"<script>" * 50_000
    assert headers["Content-Length"] == "400000"
    assert headers["Content-Type"] == "application/octet-stream"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in headers.get_all("Content-Security-Policy")
    assert headers["Content-Disposition"] == (
        "attachment; filename=\"na_ve__.html\"; filename*=UTF-8''na%C3%AFve__.html"
    )
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetch(url)  # once


def test_a_directory_is_downloaded_as_a_tar_archive(world):
    (world.scratch / "d" / "sub").mkdir(parents=True)
    (world.scratch / "d" / "sub" / "f").write_bytes(os.urandom(3_000_000))
    (world.scratch / "d" / "none").touch()
    with fetch(prepare(world, f"{world.scratch}/d", archive=True)) as answer:
        assert answer.headers["Content-Disposition"] == 'attachment; filename="d.tar"'
        assert answer.headers["Transfer-Encoding"] == "chunked"
        data = answer.read()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == ["d", "d/none", "d/sub", "d/sub/f"]
        found = tar.extractfile("d/sub/f").read()
    assert found == (world.scratch / "d" / "sub" / "f").read_bytes()


def test_an_empty_file_is_downloaded(world):
    (world.scratch / "none").touch()
    with fetch(prepare(world, f"{world.scratch}/none")) as answer:
        assert (answer.read(), answer.headers["Content-Length"]) == (b"", "0")


def test_a_file_that_shrinks_is_no_whole_download(world):
    with (world.scratch / "f").open("wb") as file:
        file.truncate(50_000_000)
    with fetch(prepare(world, f"{world.scratch}/f")) as answer:
        answer.read(1000)
        os.truncate(world.scratch / "f", 0)
        with pytest.raises(http.client.IncompleteRead):
            answer.read()


def test_a_download_that_is_broken_off_ends_its_job(world):
    with (world.scratch / "f").open("wb") as file:
        file.truncate(500_000_000)
    fetch(prepare(world, f"{world.scratch}/f")).close()
    wait_for(lambda: world.rpc("job.list", limit=1)[0]["state"] == "cancelled")


def test_a_download_names_its_file_in_the_audit(world):
    (world.scratch / "f").write_bytes(b"content")
    with fetch(prepare(world, f"{world.scratch}/f")) as answer:
        answer.read()
    (job,) = world.rpc("job.list", limit=1)
    assert (job["command"], job["state"]) == (f"read {world.scratch}/f", "done")
    digest = job["result"]["sha256"]
    words = f"1 file ({world.scratch}/f), 7 bytes, SHA-256 {digest}"
    assert (job["reason"], job["callerName"]) == (words, "owner")


def test_a_copy_in_the_commands_of_a_machine_stays_within_the_page(page, world):
    (world.scratch / "f").write_bytes(b"content")
    with fetch(prepare(world, f"{world.scratch}/f")) as answer:
        answer.read()
    page.goto(f"{world.direct_url}/nodes/far")
    page.wait_for_text("Done: 1 file, 7 B, ")
    row = "#node-jobs li"
    assert "SHA-256" not in page.text(row)
    assert "SHA-256" in page.evaluate(f"document.querySelector('{row} .detail').title")
    assert page.evaluate(
        f"[...document.querySelectorAll('{row} > *')]"
        ".every(part => part.getBoundingClientRect().right <= innerWidth)"
    )


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("gone", "gone: No such file or directory"),
        ("", "is a directory"),
        ("pipe", "is neither a file nor a directory"),
        ("a\0b", "a path holds a NUL character"),
    ],
)
def test_what_cannot_be_downloaded_is_one_sentence(world, path, words):
    os.mkfifo(world.scratch / "pipe")
    status, answer = post(world, {"nodeId": "far", "path": f"{world.scratch}/{path}"})
    assert status in (400, 404, 503)
    assert words in answer["error"]["message"]


def test_a_key_that_only_reads_gets_no_file(world):
    scopes = ["operator.read"]
    key = world.rpc("keys.create", name="reader", scopes=scopes)["key"]
    status, answer = post(world, {"nodeId": "far", "path": "/etc/hostname"}, key)
    assert (status, answer["error"]["code"]) == (403, "FORBIDDEN")


def test_a_foreign_page_cannot_prepare_a_download(world):
    body = {"nodeId": "far", "path": "/etc/hostname"}
    status, text = post(world, body, Origin="http://evil.example")
    assert (status, "comes from a page at" in text) == (403, True)


def test_downloads_that_nobody_fetches_are_dropped():
    dropped = []
    downloads = moltis.Downloads(dropped.append)
    late, early = SimpleNamespace(), SimpleNamespace()
    late.deadline, early.deadline = moltis.Deadline(0), moltis.Deadline(60)
    ticket = downloads.add(early)
    gone = downloads.add(late)
    downloads.tick()
    assert dropped == [late]
    with pytest.raises(moltis.RpcError, match="waited too long"):
        downloads.find(gone, takes=True)
    assert downloads.find(ticket, takes=True) is early


def test_an_upload_that_ended_while_the_link_was_away_is_done(page):
    """The answer to `job.follow` is then all that the page hears of it."""
    script = moltis.WEB_JS.decode()
    upload = re.search(r"^class Upload .*?^}", script, re.M | re.S)[0]
    ended = {"state": "done", "words": "1 file, 5 bytes", "result": {"files": 1}}
    found = page.evaluate(f"""(async () => {{
      const state = {{uploads: new Map()}}, keptByTab = {{set() {{}}}}, UPLOADS = "";
      const keepUploads = () => {{}}, touch = keepUploads, loadFiles = keepUploads;
      const isOpen = job => job.state === "running", files = {{}}, now = Date.now;
      const link = {{call: async () => ({{job: {json.dumps(ended)}}})}};
      {upload}
      const one = new Upload({{id: "x", path: "/tmp"}}, []);
      await one.hold();
      return [one.state, one.result.files];
    }})()""")
    assert found == ["done", 1]
