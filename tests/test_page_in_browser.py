"""The page in a real Chromium, against a real gateway with real nodes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import MODIFIERS, Browser
from peers import InProcessGateway
from proxy import FaultyProxy
from support import (
    Program,
    ScriptedServer,
    Terminal,
    account_in,
    free_port,
    open_new_chat,
    wait_for,
    wait_in_shell,
)
from test_edges import nginx_config_of, proxy_of_debian

import moltis

HERE = Path(__file__).resolve().parent
SCREENSHOTS = HERE / "screenshots"  # git ignores it
CACHE = HERE / "cache"  # git ignores it
AXE = CACHE / "node_modules/axe-core/axe.min.js"
AXE_VERSION = "4.10.3"
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489"
    "0000000d49444154789c6360f8cfc0f01f0005000180d8a3f10000000049454e44ae426082"
)

SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
READY = "document.querySelector('#app').hidden === false"
SETTLED = """(item => item && !item.classList.contains("replying") &&
  item.innerText.includes(%s))(document.querySelector("#sessions li.current"))"""
LISTED = "document.querySelector('#node-count').textContent !== ''"
LAST = "#messages > :last-child"


class Site:
    """A gateway on a port of its own, with a HOME that outlives it."""

    def __init__(self, directory):
        self.home = directory / "gateway"
        self.home.mkdir()
        self._directory = directory
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.gateway = None
        self._nodes = []

    def start(self, *options, **environ):
        words = ["gateway", "--port", str(self.port), *options]
        environ = {**account_in(self.home), **environ}
        self.gateway = Program(*words, home=self.home, **environ)
        self.gateway.wait_for_output("Ctrl+C stops it.")
        self.key = json.loads((self.home / ".moltis/gateway.json").read_text())[
            "api_key"
        ]
        return self

    def stop(self):
        self.gateway.end()

    def run(self, line):
        """Run a line that begins with `moltis`, as a person on another machine."""
        words = shlex.split(line)
        assert words.pop(0) == "moltis"
        home = self._directory / f"node-{len(self._nodes)}"
        home.mkdir()
        self._nodes.append(Program(*words, home=home, **account_in(home)))
        return self._nodes[-1]

    def call(self, method, **params):
        """Make one call as a script does."""
        request = urllib.request.Request(
            f"{self.url}/api/rpc",
            json.dumps({"method": method, "params": params}).encode(),
            {"Authorization": f"Bearer {self.key}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["payload"]

    def close(self):
        for program in [*self._nodes, self.gateway]:
            program.end()


@pytest.fixture(scope="module")
def browser():
    with Browser() as one:
        yield one


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory):
    """A gateway with a demo node."""
    site = Site(tmp_path_factory.mktemp("site")).start("--demo-node")
    try:
        wait_for(lambda: len(nodes(site)) == 2, what="the demo node")
        yield site
    finally:
        site.close()


@pytest.fixture
def site(shared_site):
    """The gateway that most tests of this file share: what a test began is ended.

    Each page lists what runs, also for another test; and an `exit` that was typed right
    before its page was closed may never have been sent.
    """
    yield shared_site
    for device in shared_site.call("device.pair.list"):
        if not device["nodeId"]:  # a test that failed left its token
            shared_site.call("device.token.revoke", deviceId=device["deviceId"])

    def has_ended():
        jobs = shared_site.call("job.list", state="open", limit=1000)
        for job in jobs:
            shared_site.call("job.cancel", id=job["id"])
        return not jobs

    wait_for(has_ended, what="the end of what the test began")


@pytest.fixture
def own_site(tmp_path):
    """A gateway that a test may stop."""
    site = Site(tmp_path).start()
    yield site
    site.close()


@pytest.fixture
def make_page(browser):
    """Pages that are signed in; none may have erred or asked another host."""
    pages = []

    def make(site, path="", **options):
        page = browser.new_page(isolated=True, **options)
        pages.append((page, site))
        page.goto(f"{site.url}/#key={site.key}")
        page.wait_for(READY)
        if path:
            page.goto(site.url + path)
        return page

    yield make
    for page, site in pages:
        page.close()
        assert page.errors == []
        allowed = (f"{site.url}/", f"ws://127.0.0.1:{site.port}/", "data:")
        assert [url for url in page.urls if not url.startswith(allowed)] == []


def nodes(site):
    return {node["displayName"]: node for node in site.call("node.list")}


def take_screenshot(page, name):
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(SCREENSHOTS / f"{name}.png")


def shows(selector, text):
    """Return JavaScript that tells whether a person reads `text` in an element."""
    element = f"document.querySelector({json.dumps(selector)})"
    return f"({element}?.innerText || '').includes({json.dumps(text)})"


def choose_files(page, selector, *paths):
    """Choose files in a field, as a person does in the browser's own dialog."""
    document = page.call("DOM.getDocument")["root"]["nodeId"]
    field = page.call("DOM.querySelector", nodeId=document, selector=selector)
    files = list(map(str, paths))
    page.call("DOM.setFileInputFiles", files=files, nodeId=field["nodeId"])


def choose(page, name):
    """Choose a machine with the keyboard alone, by typing how it is called."""
    page.wait_for(READY)

    def chosen():
        page.evaluate("document.querySelector('#node-button').focus()")
        page.press("Enter")
        page.wait_for("document.activeElement.id === 'node-list'")
        page.wait_for(shows("#node-list", name))
        for letter in name[:4]:
            page.press(letter)
        # Who is slow types a new name with each letter.
        found = page.evaluate(shows("#node-list .active", name))
        page.press("Enter" if found else "Escape")
        return found

    wait_for(chosen, what=f"{name} to be chosen")
    page.wait_for(shows("#node-button", name))


def type_line(page, line):
    page.click("#text")
    page.type(line)
    page.press("Enter")


def run(page, line, verdict="Done"):
    """Type a command, wait for its end, and return the text of its card.

    In a chat that tests share no other may type the same line: its card would be taken
    for this one's.
    """
    command = line.split("\n")[0]
    type_line(page, line)
    page.wait_for(f"{shows(LAST, command)} && {shows(LAST, verdict)}")
    page.wait_for(f"!document.querySelector('{LAST} .size').innerHTML.match('loading')")
    return page.text(f"{LAST} .lines")


# -- sign-in -------------------------------------------------------------------


def test_the_link_of_the_start_message_signs_in_and_leaves_no_key_behind(
    site, make_page
):
    page = make_page(site)
    assert page.evaluate("location.href") == f"{site.url}/chat/main"
    assert page.evaluate("history.length") <= 2
    assert not page.evaluate("JSON.stringify({...localStorage})").count(site.key)
    page.reload()
    page.wait_for_text("Shell")


def test_one_can_type_as_soon_as_the_page_is_there(site, make_page):
    page = make_page(site)
    page.wait_for("document.activeElement.id === 'text'")
    page.type("echo typed")
    page.press("Enter")
    page.wait_for(f"{shows(LAST, 'echo typed')} && {shows(LAST, 'Done')}")


@pytest.mark.parametrize(
    ("path", "button"),
    [
        ("/nodes", "#new-chat"),
        ("/nodes", "#node-cards [data-part=use]"),
        ("/nodes/Local", "#node-use"),
        ("/settings/models", "#model-rows button, #unlisted button"),
    ],
)
def test_who_goes_to_a_chat_from_another_view_can_type_at_once(
    site, make_page, path, button
):
    page = make_page(site, path)
    page.wait_for(LISTED)
    page.evaluate("document.querySelector('#unlisted').open = true")
    page.evaluate("document.querySelector('#model-name').value = 'shell'")
    page.click(button)
    page.wait_for("location.pathname.startsWith('/chat/')")
    page.wait_for("document.activeElement.id === 'text'")


def test_an_address_of_nothing_gets_a_sentence(site, make_page):
    page = make_page(site)
    for path, sentence in {
        "/chat/%E0%A4%A": "There is no such chat",
        "/nodes/%zz": "There is no machine called %zz.",
        "/nodes/%/files/x": "There is no machine called %.",
        "/nodes/Local/files/%zz": "/%zz: No such file or directory",
        "/activity/%": "There is no job '%'",
        "/terminal/%": "There is no job '%'",
        "/terminal/%/recording": "There is no job '%'",
        "/activity/?state=%zz": "All results",
        "/settings/%": "All well",
        "/settings/constructor": "All well",
        "/terminal": "Terminals",
    }.items():
        page.goto(site.url + path)
        page.wait_for_text(sentence)
        assert '{"type"' not in page.text()
    page.errors.clear()  # Chromium reports the 404 of the recording
    page.goto(site.url)  # shows another chat than that which there is not
    page.wait_for("location.pathname === '/chat/main'")


@pytest.mark.parametrize("name", ["activity", "nodes", "models", "access", "models/"])
def test_each_view_opens_by_its_name_as_an_address(site, make_page, name):
    page = make_page(site, f"/{name}")
    view = name.strip("/")
    page.wait_for(f"document.querySelector('#{view}')?.hidden === false")


def test_without_a_sign_in_the_page_asks_for_the_key(site, browser):
    with browser.new_page(isolated=True) as page:
        page.goto(f"{site.url}/settings/nodes")
        page.wait_for_text("Operator key")
        page.click("summary")
        page.wait_for_text("gateway.json")
        take_screenshot(page, "sign-in")
        page.fill("#key", "mk_" + "x" * 43)
        page.press("Enter")
        page.wait_for_text("not a key of this gateway")
        page.errors.clear()  # Chromium reports every 401
        page.fill("#key", site.key)
        page.press("Enter")
        page.wait_for_text("Add a machine")
        assert page.evaluate("location.pathname") == "/settings/nodes"
        assert page.errors == []


# Null while a document is loaded anew, as whoever signs out has it.
DOCUMENT = "document.readyState === 'complete' && document.documentElement.outerHTML"


def test_signing_out_ends_it_in_this_browser_only(site, make_page):
    page, other = make_page(site, "/settings/nodes"), make_page(site)
    page.wait_for(shows("#node-cards", "Demo node"))
    page.click("#sign-out")
    page.wait_for_text("Operator key")
    assert "Demo node" not in page.wait_for(DOCUMENT)
    page.reload()
    page.wait_for_text("Operator key")
    assert run(other, "echo still here").strip() == "still here"


def test_who_signs_out_beside_an_open_terminal_is_not_asked(site, browser):
    """Answered with No, the page would keep what it had shown."""
    with browser.new_page(isolated=True) as page:
        page.goto(f"{site.url}/#key={site.key}")
        page.wait_for(READY)
        open_terminal(page, site, "Local")
        job_id = page.evaluate("location.pathname.split('/').pop()")
        page.click("#sign-out")
        page.wait_for_text("Operator key")
        assert page.dialogs == []
    site.call("job.cancel", id=job_id)


@pytest.mark.parametrize("way_out", ["signed out", "ended elsewhere"])
def test_nothing_of_a_sign_in_is_left_in_the_document(site, browser, way_out):
    with browser.new_page(isolated=True) as page:
        page.goto(site.url)
        page.fill("#key", site.key)
        page.press("Enter")
        page.wait_for(READY)
        assert page.evaluate("document.querySelector('#key').value") == ""
        run(page, f"echo secret of the transcript, {way_out}")
        page.fill("#text", "secret of the draft")
        if way_out == "signed out":
            names = '[{"label": "secret of the upload"}]'
            page.evaluate(f"sessionStorage.setItem('uploads', '{names}')")
            page.click("#sign-out")
        else:
            for login in site.call("logins.list"):
                site.call("logins.revoke", loginId=login["loginId"])
        page.wait_for_text("Operator key")
        page.wait_for("document.readyState === 'complete'")
        left = """document.documentElement.outerHTML +
          [...document.querySelectorAll('input, textarea')].map(i => i.value)"""
        page.wait_for(f"!({left}).includes('secret of the')")
        assert "secret" not in page.evaluate("JSON.stringify({...sessionStorage})")
        assert site.key not in page.evaluate(left)


def test_without_storage_the_page_works_and_keeps_drafts_in_memory(site, browser):
    with browser.new_page(isolated=True) as page:
        source = """Object.defineProperty(window, "localStorage", {
          get() { throw new DOMException("denied", "SecurityError"); }});"""
        page.call("Page.addScriptToEvaluateOnNewDocument", source=source)
        page.goto(f"{site.url}/#key={site.key}")
        page.wait_for(READY)
        assert run(page, "echo works").strip() == "works"
        page.fill("#text", "not sent")
        open_new_chat(page)
        page.click("#sessions a[href='/chat/main']")
        page.wait_for("document.querySelector('#text').value === 'not sent'")
        assert page.errors == []


def test_a_key_in_the_address_that_is_none_gets_a_sentence(site, browser):
    with browser.new_page(isolated=True) as page:
        page.goto(f"{site.url}/chat/%E0%A4%A#key=%zz")
        page.wait_for_text("This is not a key of this gateway")


def test_a_cookie_that_was_not_kept_is_said(own_site, browser):
    """FAULTS C8: otherwise the sign-in goes round in a circle without a word."""
    with WithoutCookies(own_site.port) as relay:
        with browser.new_page(isolated=True) as page:
            page.goto(f"http://127.0.0.1:{relay.port}/#key={own_site.key}")
            page.wait_for_text("this browser did not keep the cookie of the sign-in")
        assert relay.dropped == 1  # it was not tried again and again


class WithoutCookies:
    """Stands before a gateway, whose cookies it takes away."""

    def __init__(self, target):
        self.dropped = 0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets = [self._listener]
        self._threads = []
        self._spawn(self._accept)

    def _spawn(self, target, *args):
        self._threads.append(threading.Thread(target=target, args=args, name="test-x"))
        self._threads[-1].start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [client, server]
                self._spawn(self._pass_on, client, server)
                self._spawn(self._pass_on, server, client)

    def _pass_on(self, source, sink):
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                if not data:
                    break
                self.dropped += data.count(b"\r\nSet-Cookie:")
                sink.sendall(data.replace(b"\r\nSet-Cookie:", b"\r\nX-Dropped1:"))
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in self._sockets:
            sock.close()


def test_a_draft_belongs_to_its_chat_and_outlives_the_page(site, make_page):
    page = make_page(site)
    run(page, "echo in the other chat")
    open_new_chat(page)
    run(page, "echo earlier")
    page.fill("#text", "half a thought")
    page.press("ArrowUp")
    text = "document.querySelector('#text').value"
    page.wait_for(f"{text} === 'echo earlier'")
    chat = page.evaluate("location.pathname")
    page.click("#sessions a[href='/chat/main']")
    page.wait_for(f"location.pathname === '/chat/main' && {text} === ''")
    page.click("#text")
    page.press("ArrowDown")
    assert page.evaluate(text) == ""
    page.reload()
    page.wait_for(READY)
    page.click(f"#sessions a[href='{chat}']")
    page.wait_for(f"{text} === 'half a thought'")
    page.press("Enter")
    page.click("#text")
    page.press("Enter")
    page.wait_for(f"{text} === ''")
    page.reload()
    page.wait_for(READY)
    assert page.evaluate(text) == ""


NAMING = "document.activeElement.id === 'name-text'"


def test_a_name_that_is_half_typed_is_saved_only_by_those_who_type_it(site, make_page):
    """Not by a list that moves its rows."""
    page = make_page(site)
    open_new_chat(page)
    run(page, "echo first")
    page.click("#sessions .current [aria-label=Rename]")
    page.wait_for(NAMING)
    page.type("half")
    site.call("chat.send", sessionKey="main", text="echo moves the rows")
    page.wait_for(shows("#sessions a[href='/chat/main']", "Done"))
    page.wait_for("document.querySelector('#sessions a').pathname === '/chat/main'")
    assert page.evaluate(NAMING)
    labels = [entry["label"] for entry in site.call("sessions.list")]
    assert "half" not in labels
    page.type(" and whole")
    page.press("Enter")
    wait_for(lambda: "half and whole" in str(site.call("sessions.list")))


def test_a_name_is_not_saved_by_who_closes_the_question(site, make_page):
    page = make_page(site, "/nodes")
    page.click("#node-cards a[href$='/Demo%20node']")
    page.click("#node-rename")
    page.wait_for(NAMING)
    page.type("half")
    page.press("Control+k")
    assert page.evaluate(f"{NAMING} && !document.querySelector('#palette').open")
    page.press("Escape")
    page.wait_for("document.activeElement.id === 'node-rename'")
    assert page.text("#node-title") == "Demo node"
    assert "Demo node" in nodes(site)


def test_another_tab_replaces_no_draft_and_is_signed_out_as_well(site, browser):
    with browser.new_page() as page, browser.new_page() as other:
        page.goto(f"{site.url}/#key={site.key}")
        page.wait_for(READY)
        open_new_chat(page)
        chat = page.evaluate("location.pathname")
        page.fill("#text", "secret of the first tab")
        other.goto(site.url + chat)
        other.wait_for(f"{value_of('#text')} === 'secret of the first tab'")
        other.fill("#text", "secret of the second tab")
        page.click("#sessions a[href='/chat/main']")
        page.wait_for(f"{value_of('#text')} === ''")
        page.click(f"#sessions a[href='{chat}']")
        page.wait_for(f"{value_of('#text')} === 'secret of the first tab'")
        other.goto(f"{site.url}/settings/access")
        key = make_key(other, "two tabs")
        page.click("#sign-out")
        for tab in (page, other):
            tab.wait_for_text("Operator key")
            html = tab.wait_for(DOCUMENT)
            assert key not in html
            assert "Demo node" not in html
        assert "tab" not in page.evaluate("JSON.stringify(localStorage)")


@pytest.mark.skipif(not shutil.which("nginx"), reason="no nginx here")
def test_two_gateways_at_two_paths_of_a_host_share_nothing_in_a_browser(
    browser, tmp_path
):
    port, proxies = free_port(), moltis.TrustedProxies(["127.0.0.1"])
    with InProcessGateway(tmp_path / "a", proxies=proxies) as first, InProcessGateway(
        tmp_path / "b", proxies=proxies
    ) as second, browser.new_page(isolated=True) as page:
        gateways = {"/a": first, "/b": second}
        ports = {path: each.running.port for path, each in gateways.items()}
        config = nginx_config_of(port, ports)
        with proxy_of_debian("nginx", port, config, tmp_path):
            origin = f"http://127.0.0.1:{port}"
            for path, gateway in gateways.items():
                page.goto(f"{origin}{path}/#key={gateway.api_key}")
                page.wait_for(READY)
                page.click("#text")
                page.type(f"draft of {path}")
                page.wait_for(f"JSON.stringify(localStorage).includes('of {path}')")
            cookies = page.call("Network.getCookies", urls=[origin + "/a/ws"])
            assert [cookie["path"] for cookie in cookies["cookies"]] == ["/a/"]
            page.click("#sign-out")
            page.wait_for_text("Operator key")
            page.goto(f"{origin}/a/")
            page.wait_for(f"{value_of('#text')} === 'draft of /a'")
            page.wait_for(READY)
            assert page.errors == []


def make_key(page, name):
    """Make a key on the page for them; return it."""
    page.fill("#key-name", name)
    page.press("Enter")
    return page.wait_for(
        "document.querySelector('#key-lines code')"
        "?.closest('#key-lines').innerText.match(/mk_[\\w-]+/)?.[0]"
    )


def test_a_draft_that_storage_has_no_room_for_is_kept_in_memory(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    chat = page.evaluate("location.pathname")
    page.fill("#text", "echo first")
    page.evaluate("""{
      let text = "x".repeat(4 * 1024 * 1024);
      for (let n = 0; text; n += 1)
        try { localStorage.setItem(`full ${n}`, text); }
        catch { text = text.slice(text.length / 2 + 1); }
    }""")
    page.type(" and more")
    page.click("#sessions a[href='/chat/main']")
    page.wait_for(f"{value_of('#text')} === ''")
    page.click(f"#sessions a[href='{chat}']")
    page.wait_for(f"{value_of('#text')} === 'echo first and more'")
    assert run(page, "; echo works").strip() == "first and more\nworks"
    page.click("#sessions a[href='/chat/main']")
    page.click(f"#sessions a[href='{chat}']")
    page.wait_for(shows("#messages", "works"))
    assert page.evaluate(value_of("#text")) == ""


def test_what_the_holder_of_one_key_typed_is_not_sent_by_that_of_another(site, browser):
    made = site.call("keys.create", name="leaves", scopes=["operator.write"])
    with browser.new_page(isolated=True) as page:
        page.goto(f"{site.url}/#key={made['key']}")
        page.wait_for(READY)
        page.fill("#text", "secret of the draft")
        message = {"id": moltis.new_id(), "text": "echo of another"}
        waits = f"[{{...{json.dumps(message)}, at: Date.now()}}]"
        page.evaluate(f"localStorage.setItem('outbox main', JSON.stringify({waits}))")
        site.call("keys.revoke", keyId=made["keyId"])
        page.wait_for_text("Operator key")
        page.fill("#key", site.key)
        page.press("Enter")
        page.wait_for(READY)
        page.wait_for("!document.querySelector('#chat').hidden")
        assert run(page, "echo mine").strip() == "mine"
        assert ran(site, "echo of another") == []
        assert "of the draft" not in page.evaluate("JSON.stringify(localStorage)")


def test_what_a_tab_keeps_for_one_key_is_not_shown_to_another(site, browser):
    """The other key signed in in another tab, which forgot what it kept itself."""
    made = site.call("keys.create", name="leaves", scopes=["operator.write"])
    with browser.new_page() as page, browser.new_page() as other:
        page.goto(f"{site.url}/#key={made['key']}")
        page.wait_for(READY)
        page.evaluate("sessionStorage.setItem('terminals', '[\"secret\"]')")
        other.goto(f"{site.url}/#key={site.key}")
        other.wait_for(READY)
        page.goto(f"{site.url}/terminal/")
        page.wait_for("!document.querySelector('#terminal-home').hidden")
        assert "secret" not in page.evaluate("JSON.stringify(sessionStorage)")
        assert page.text("#terminal-tabs") == ""
    site.call("keys.revoke", keyId=made["keyId"])


# -- chat ----------------------------------------------------------------------


def test_a_stranger_types_uname_on_the_demo_node_and_reads_the_answer(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    take_screenshot(page, "welcome")
    choose(page, "Demo node")
    answer = run(page, "uname -a")
    assert answer.strip() == subprocess.check_output(["uname", "-a"], text=True).strip()
    assert "Demo node" in page.text(f"{LAST} header")
    take_screenshot(page, "command")


def test_the_first_run_shows_how_to_add_a_machine_then_what_to_type(
    own_site, make_page
):
    answers = [{"content": "All is well."}]
    with scripted_model(answers) as server:
        own_site.stop()
        own_site.start(OLLAMA_HOST=server.url)
        page = make_page(own_site)
        page.wait_for(shows("#welcome", "Or type a command here"))
        first = "document.querySelector('#welcome').innerText"
        assert page.evaluate(first).startswith("Add your first machine")
        own_site.call("sessions.patch", key="main", model="ollama/m")
        page.wait_for(shows("#welcome", "Or ask about this machine"))
        assert "uname" not in page.evaluate(first)
        question = page.text("#welcome .starters button")
        assert question.endswith("?")
        page.click("#welcome .main")
        page.wait_for("document.activeElement.id === 'token-name'")
        page.press("Escape")
        page.click("#welcome .starters button")
        page.wait_for(shows("#messages", "All is well."))
        assert question in page.text("#messages")


def test_with_machines_an_empty_chat_offers_commands_for_the_chosen_one(
    site, make_page
):
    page = make_page(site)
    open_new_chat(page)
    choose(page, "Demo node")
    page.wait_for(shows("#welcome", "A shell on Demo node"))
    assert "first machine" not in page.text("#welcome")
    page.click("#welcome .starters button")
    page.wait_for(f"{shows(LAST, 'uname -a')} && {shows(LAST, 'Done')}")


def test_a_failure_is_told_in_words(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    output = run(page, "echo oops >&2; exit 3", "Exit status 3")
    assert output.strip() == "oops"
    assert page.evaluate(f"document.querySelector('{LAST}').dataset.kind") == "bad"


def test_colours_are_shown_and_progress_overwrites_its_line(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    output = run(
        page,
        r"printf '\033[31mred\033[0m \033]0;title\007\033[2Kplain\n'; "
        r"printf ' 10%%\r 50%%\r100%%\n'",
    )
    assert [line.rstrip() for line in output.splitlines()] == ["    plain", "100%"]
    run(page, r"printf '\033[1;32mgreen\033[0m'")
    span = f"document.querySelector('{LAST} .screen span')"
    assert page.evaluate(f"{span}.className") == "b"


def test_output_appears_while_the_command_runs_and_stop_ends_it(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    choose(page, "Demo node")
    # Not the words of the command: the card has those before there is any output.
    type_line(page, "echo $((6 * 7)); exec sleep 120")
    page.wait_for(shows(LAST, "42"))
    page.wait_for(shows(LAST, "Running"))
    page.click(f"{LAST} [data-part=stop]")
    page.wait_for(shows(LAST, "Cancelled"))
    assert "42" in page.text(LAST)


def test_ctrl_c_stops_what_runs_on_any_keyboard_and_with_shift_nothing(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    choose(page, "Demo node")
    type_line(page, "exec sleep 120")
    page.wait_for(shows(LAST, "Running"))
    press = (
        "document.querySelector('#text').dispatchEvent(new KeyboardEvent('keydown', "
        "{key: '\u0441', code: 'KeyC', ctrlKey: true, shiftKey: %s, bubbles: true, "
        "cancelable: true}))"
    )
    assert page.evaluate(press % "true")  # left to the browser
    assert not page.evaluate(press % "false")
    page.wait_for(shows(LAST, "Cancelled"))


def test_a_hundred_thousand_lines_leave_the_page_alive(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    choose(page, "Demo node")
    output = run(page, "seq 100000")
    assert output.split()[-1] == "100000"
    said = page.text(f"{LAST} .screen")
    assert "Only the end is shown." in said
    assert "Download all of it (575 KiB)" in said
    saved = "URL.createObjectURL = blob => (blob.text().then(done), 'data:,')"
    click = f"document.querySelector('{LAST} .cut a').click()"
    whole = page.evaluate(f"new Promise(done => {{ {saved}; {click} }})")
    assert whole.split() == [str(n) for n in range(1, 100_001)]
    assert page.evaluate("document.querySelectorAll('#messages div').length") < 5000
    assert run(page, "echo next").strip() == "next"


def test_a_command_that_writes_without_end_can_be_stopped(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    choose(page, "Demo node")
    type_line(page, "yes; echo never")
    page.wait_for(shows(f"{LAST} .lines", "y\ny\ny"))
    page.click(f"{LAST} [data-part=stop]")
    # The page is no minutes behind: it shows the end of the output soon.
    page.wait_for(f"{shows(LAST, 'Cancelled')} && !{shows(LAST, 'loading')}")
    assert run(page, "echo next").strip() == "next"


def test_a_long_output_is_read_from_its_end_after_a_reload(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    choose(page, "Demo node")
    run(page, "seq 200000")
    page.reload()
    page.wait_for(shows(f"{LAST} .lines", "199999\n200000"))
    assert page.text(f"{LAST} .screen").startswith("Only the end is shown.")


def test_output_goes_on_when_a_person_comes_back_to_the_chat(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    choose(page, "Demo node")
    type_line(page, "for n in $(seq 6000); do echo line $n; sleep 0.2; done")
    page.wait_for(shows(LAST, "line 1\n"))
    page.click("#to-nodes")
    page.wait_for(shows("#node-cards > :nth-child(1) .does", "for n in"))
    page.click("#node-cards > :nth-child(1) .name")
    page.wait_for(shows("#node-jobs", "Running"))
    page.wait_for(f"{shows('#node-state', 'Busy')}")
    page.click("#node-jobs a")
    page.wait_for("location.pathname.startsWith('/activity/')")
    page.wait_for(shows("#activity-list .command:not(.folded)", "for n in"))
    page.evaluate("history.go(-3)")
    page.wait_for(shows(LAST, "line 12\n"))
    lines = page.text(f"{LAST} .lines").split("\n")
    assert lines[:12] == [f"line {n}" for n in range(1, 13)]
    page.click(f"{LAST} [data-part=stop]")
    page.wait_for(shows(LAST, "Cancelled"))


def test_arrow_up_brings_earlier_commands_back(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    run(page, "echo one")
    run(page, "echo two")
    page.press("ArrowUp")
    page.press("ArrowUp")
    assert page.evaluate("document.querySelector('#text').value") == "echo one"
    page.press("ArrowDown")
    page.press("ArrowDown")
    assert page.evaluate("document.querySelector('#text').value") == ""


def test_machine_and_history_survive_a_reload_and_reach_a_second_browser(
    site, make_page
):
    page = make_page(site)
    open_new_chat(page)
    choose(page, "Demo node")
    run(page, "echo remembered")
    path = page.evaluate("location.pathname")
    page.reload()
    page.wait_for_text("remembered")
    page.wait_for(shows("#node-button", "Demo node"))
    other = make_page(site, path)
    other.wait_for_text("remembered")
    run(page, "echo for both")
    other.wait_for(shows(LAST, "for both"))
    choose(page, "Local")
    other.wait_for(shows("#node-button", "Local"))
    run(page, "echo here")
    other.wait_for(shows(LAST, "echo here"))
    assert "Local" in other.text(f"{LAST} header")


def test_back_and_forward_go_through_the_views(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    chat = page.evaluate("location.pathname")
    page.click("#to-nodes")
    page.wait_for_text("Add a machine")
    page.click("#to-activity")
    page.wait_for("!document.querySelector('#activity').hidden")
    page.evaluate("history.go(-2)")
    page.wait_for(f"location.pathname === {json.dumps(chat)}")
    page.wait_for("!document.querySelector('#chat').hidden")
    page.evaluate("history.forward()")
    page.wait_for("!document.querySelector('#nodes').hidden")


def test_a_chat_is_renamed_and_deleted(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    run(page, "echo to be deleted")
    page.wait_for(SETTLED % json.dumps("echo to be deleted"))
    current = "#sessions li.current"
    page.evaluate(f"document.querySelector('{current} [aria-label=Rename]').click()")
    page.wait_for(NAMING)
    page.type("Experiment")
    page.press("Enter")
    page.wait_for(shows("#chat-title", "Experiment"))
    page.evaluate(f"document.querySelector('{current} [aria-label=Delete]').click()")
    page.wait_for(shows("#confirm", "Delete “Experiment”?"))
    page.click("#confirm-yes")
    page.wait_for("location.pathname === '/chat/main'")
    page.wait_for(f"!{shows('#sessions', 'Experiment')}")


def test_a_long_name_fits_into_the_dialog_that_asks_for_another(site, make_page):
    page = make_page(site, width=390, height=844)
    page.wait_for(LISTED)
    key = site.call("sessions.create", label="x" * 150)["key"]
    page.goto(f"{site.url}/chat/{key}")
    page.wait_for(READY)
    current = "document.querySelector('#sessions li.current')"
    page.wait_for(f"{current}?.textContent.includes('xxx')")
    rename = f"{current}.querySelector('[aria-label=Rename]')"
    page.evaluate(f"{rename}.click()")
    page.wait_for(NAMING)
    width = "(it => it.scrollWidth - it.clientWidth)(document.querySelector('#name'))"
    assert page.evaluate(width) == 0
    page.press("Escape")
    site.call("sessions.delete", key=key)


def test_a_field_takes_no_longer_name_than_the_gateway(site, make_page):
    page = make_page(site, "/nodes/Demo%20node")
    page.wait_for(shows("#node-title", "Demo node"))
    page.click("#node-rename")
    page.wait_for(NAMING)
    for field in ("name-text", "key-name", "token-name"):
        limit = page.evaluate(f"document.querySelector('#{field}').maxLength")
        assert limit == moltis.MAX_NAME, field
    page.press("Escape")


def test_markup_in_output_and_messages_stays_text(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    markup = "<img src=x onerror=alert(1)>"
    assert run(page, f"echo '{markup}'").strip() == markup
    assert page.dialogs == []


def wanting(command):
    call = {"function": {"name": "exec", "arguments": {"command": command}}}
    return {"tool_calls": [call]}


def scripted_model(answers):
    """Serve the model `ollama/m`, which gives these answers."""

    def reply(request):
        if not request.path.endswith("/api/chat"):
            return 200, {}, [b'{"models": []}']
        message = {"role": "assistant", "content": "", **answers.pop(0)}
        end = {"model": "m", "message": message, "done": True, "done_reason": "stop"}
        return 200, {"Content-Type": "application/x-ndjson"}, [json.dumps(end).encode()]

    return ScriptedServer(reply)


def test_a_models_command_runs_once_it_is_approved_on_its_card(own_site, make_page):
    answers = [wanting("echo $((6 * 7))"), {"content": "It is **42**."}]
    with scripted_model(answers) as server:
        own_site.stop()
        own_site.start(OLLAMA_HOST=server.url)
        own_site.call("sessions.patch", key="main", model="ollama/m")
        page = make_page(own_site)
        type_line(page, "How much is it?")
        page.wait_for(shows(LAST, "The model wants to run this on Local in its usual"))
        page.wait_for(shows(LAST, "Waiting for your approval denied in 9 min"))
        page.wait_for(shows("#running", "asks for your approval"))
        page.wait_for(shows("#running-count", "1 to approve"))
        page.wait_for(shows("#sessions .current", "Asks you"))
        page.wait_for("document.title.startsWith('(1 to approve) ')")
        take_screenshot(page, "approval")
        assert own_site.call("job.list") == []
        page.click(f"{LAST} .approval .main")
        page.wait_for(shows(LAST, "It is 42."))
        assert "Done" in page.text(".command")
        page.wait_for(shows(".command .lines", "42"))
        page.wait_for("!document.title.startsWith('(')")


def test_a_change_of_a_file_is_approved_with_its_whole_diff(
    own_site, make_page, tmp_path
):
    path = tmp_path / "app.conf"
    path.write_text("".join(f"option_{n} = {n}\n" for n in range(40)))
    content = path.read_text().replace("= 7\n", "= seven\n").replace("= 30\n", "= 3\n")
    content = content.replace("option_9 = 9", "option_9 = \u202e" + "long " * 60)
    wanted = {
        "name": "file_write",
        "arguments": {"path": str(path), "content": content},
    }
    answers = [{"tool_calls": [{"function": wanted}]}, {"content": "The end."}]
    with scripted_model(answers) as server:
        own_site.stop()
        own_site.start(OLLAMA_HOST=server.url)
        own_site.call("sessions.patch", key="main", model="ollama/m")
        page = make_page(own_site)
        type_line(page, "Change it, please")
        page.wait_for(shows(LAST, "The model wants to make this change on Local"))
        shown = page.text(f"{LAST} .diff").split("\n")
        assert "-option_7 = 7" in shown
        assert "+option_7 = seven" in shown
        assert "+option_30 = 3" in shown
        assert any("\\u202elong" in line for line in shown)
        box = f"document.querySelector('{LAST} .diff')"
        assert page.evaluate(f"{box}.scrollHeight <= {box}.clientHeight + 1")
        assert "Always" not in page.text(LAST)
        for name, width, dark in (
            ("diff", 1280, False),
            ("diff-dark", 1280, True),
            ("diff-phone", 390, False),
        ):
            page.set_viewport(width, 900)
            page.set_media(dark=dark)
            take_screenshot(page, name)
        assert path.read_text() != content
        page.wait_for(f"document.querySelector('{LAST} .main')?.disabled === false")
        page.click(f"{LAST} .approval .main")
        page.wait_for(shows(LAST, "The end."))
        assert path.read_text() == content
        page.wait_for(shows(".command", "1 file"))
        assert page.errors == []
        take_screenshot(page, "diff-done")


@pytest.mark.parametrize(
    ("key", "result"), [("a", "Done"), ("d", "Denied"), ("ф", "Done"), ("в", "Denied")]
)
def test_a_question_names_its_risks_and_is_answered_by_a_key(
    own_site, make_page, tmp_path, key, result
):
    line = f"cd {tmp_path}; touch old; rm old"
    with scripted_model([wanting(line), {"content": "The end."}]) as server:
        own_site.stop()
        own_site.start(OLLAMA_HOST=server.url)
        own_site.call("sessions.patch", key="main", model="ollama/m")
        own_site.call("chat.send", sessionKey="main", text="clear up")
        # Away from the chat: the question is at the top of what runs.
        page = make_page(own_site, "/activity/")
        page.wait_for(shows("#activity-list", "It removes files (rm)"))
        page.press(key)  # too early, or not
        page.wait_for("!document.querySelector('.approval .main')?.disabled")
        page.press(key)
        page.wait_for(shows(row_of("rm old"), result))
        wait_for(lambda: "The end." in str(own_site.call("chat.history")))
        assert own_site.call("job.list")[0]["decidedBy"] == "owner"


def test_all_of_a_long_question_is_shown_and_a_key_answers_it_in_view_alone(
    own_site, make_page
):
    line = "\n".join(f"echo step {n}" for n in range(120))
    with scripted_model([wanting(line), {"content": "The end."}]) as server:
        own_site.stop()
        own_site.start(OLLAMA_HOST=server.url)
        own_site.call("sessions.patch", key="main", model="ollama/m")
        own_site.call("chat.send", sessionKey="main", text="go on")
        page = make_page(own_site, "/activity/")
        card = "#activity-list .asks"
        page.wait_for(shows(card, "step 119"))
        code = f"document.querySelector('{card} .line')"
        assert page.evaluate(f"{code}.scrollHeight <= {code}.clientHeight + 1")
        answers = f"document.querySelector('{card} .answers')"
        page.evaluate(f"{answers}.scrollIntoView()")
        page.wait_for(f"{answers}.firstChild.disabled === false")
        page.evaluate("document.querySelector('#activity-scroll').scrollTop = 0")
        page.wait_for(f"{answers}.getBoundingClientRect().top > innerHeight")
        frames = "new Promise(done => requestAnimationFrame(() => "
        page.evaluate(f"{frames}requestAnimationFrame(() => setTimeout(done))))")
        page.press("a")
        assert len(own_site.call("exec.approval.list")) == 1
        page.evaluate(f"{answers}.scrollIntoView()")

        def answered():
            page.press("d")
            return not own_site.call("exec.approval.list")

        wait_for(answered, what="the answer")


def test_a_key_typed_into_the_composer_answers_no_question(own_site, make_page):
    with scripted_model([wanting("echo asked"), {"content": "The end."}]) as server:
        own_site.stop()
        own_site.start(OLLAMA_HOST=server.url)
        own_site.call("sessions.patch", key="main", model="ollama/m")
        page = make_page(own_site)
        type_line(page, "go on")
        page.wait_for("document.querySelector('.approval .main')?.disabled === false")
        page.click("#text")
        page.press("a")
        page.press("d")
        assert page.evaluate("document.querySelector('#text').value") == "ad"
        assert "Waiting for your approval" in page.text(LAST)
        page.click(".approval .main")
        page.wait_for(shows(LAST, "The end."))


# -- nodes ---------------------------------------------------------------------


CHOSEN_LINE = "document.querySelector('#token-lines .ready > pre')?.innerText"
DEMO_ROW = "#node-cards > :nth-child(1)"  # of the demo node: D stands before L


def test_a_machine_joins_by_the_printed_line_and_goes_when_revoked(site, make_page):
    page = make_page(site, "/nodes")
    page.click("#new-token")
    page.fill("#token-name", "Build Server")
    page.press("Enter")
    page.wait_for_text("Waiting for Build Server")
    take_screenshot(page, "token")
    assert page.wait_for(CHOSEN_LINE).startswith(
        f"curl -fsSL {site.url}/moltis.py | python3 - node add --join {site.url}/join/"
    )
    page.evaluate("document.querySelector('#token-ways :checked').focus()")
    page.press("ArrowRight")
    page.wait_for(f"{CHOSEN_LINE}.startsWith('moltis node add --join ')")
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    page.wait_for(f"{CHOSEN_LINE}.endsWith('--foreground')")
    line = page.evaluate(CHOSEN_LINE).partition(" - ")[2]
    with site.run(f"moltis {line}") as node:
        page.wait_for_text("Build Server is connected")
        page.click("#token-chat")
        page.wait_for(shows("#node-button", "Build Server"))
        assert (
            run(page, "echo $((6 * 7)) on the new one").strip() == "42 on the new one"
        )
        page.goto(f"{site.url}/nodes")
        page.wait_for(shows("#node-cards", "Build Server"))
        take_screenshot(page, "nodes")
        page.click("#node-cards > :nth-child(1) .name")
        page.wait_for("location.pathname === '/nodes/Build%20Server'")
        page.wait_for(shows("#node-jobs", "on the new one"))
        page.click("#node-revoke")
        page.wait_for(shows("#confirm", "Revoke the token of Build Server?"))
        page.click("#confirm-yes")
        page.wait_for("location.pathname === '/nodes'")
        page.wait_for(
            "!document.querySelector('#node-cards').innerText.includes('Build')"
        )
        wait_for(lambda: node.process.poll() is not None, what="the end of the node")
        page.goto(f"{site.url}/chat/main")
        choose(page, "Local")


def test_on_loopback_the_command_that_lets_others_in_is_there_to_copy(site, make_page):
    page = make_page(site, "/nodes")
    page.click("#new-token")
    page.click("#token-name")
    page.press("Enter")
    mend = page.wait_for("document.querySelector('.mend code')?.innerText")
    assert mend.endswith(f" gateway --port {site.port} --demo-node --bind 0.0.0.0")
    assert f":{site.port}" in page.text(".mend p, .mend")
    page.press("Escape")
    revoke_unused(page)


def test_a_machine_has_a_page_with_its_facts_and_takes_a_new_name(site, make_page):
    page = make_page(site, "/settings/nodes")  # as older links have it
    page.wait_for(shows(DEMO_ROW, "Demo node"))
    level = "document.querySelector('#node-cards .figure .value').innerText"
    page.wait_for(f"{level}.endsWith('%')")
    page.click(f"{DEMO_ROW} .name")
    page.wait_for(shows("#node-facts", "python3"))
    facts = page.text("#node-facts")
    for label in ("Host name", "System", "User", "Address", "moltis", "Id"):
        assert label in facts
    page.click("#node-rename")
    page.wait_for(NAMING)
    page.type("Attic")
    page.press("Enter")
    page.wait_for(shows("#node-title", "Attic"))
    wait_for(lambda: "Attic" in nodes(site), what="the new name")
    node_id = nodes(site)["Attic"]["nodeId"]
    page.goto(f"{site.url}/nodes/{node_id}")
    page.wait_for(shows("#node-title", "Attic"))
    site.call("node.rename", nodeId=node_id, displayName="Demo node")
    page.goto(f"{site.url}/nodes/demo%20NODE")
    page.wait_for(shows("#node-title", "Demo node"))
    page.goto(f"{site.url}/nodes/nobody")
    page.wait_for_text("There is no machine called nobody")


def test_nodes_says_what_is_wrong_in_words_with_trouble_first(own_site, make_page):
    for name in ("Alpha", "Zulu"):
        made = own_site.call("device.token.create", displayName=name)
        join = f"--host {own_site.url} --token {made['deviceToken']}"
        node = own_site.run(f"moltis node add {join} --foreground")
        wait_for(lambda name=name: name in connected(own_site), what=name)
    page = make_page(own_site, "/nodes")
    page.wait_for(shows("#nodes-headline", "3 machines"))
    assert page.text("#nodes-headline").startswith("All well")
    node.end(9)
    page.wait_for(shows("#nodes-headline", "Zulu is offline"))
    order = "[...document.querySelectorAll('#node-cards .name')].map(e => e.innerText)"
    page.wait_for(f"String({order}) === 'Zulu,Alpha,Local'")
    assert "2 of 3 online" in page.text("#node-count")
    page.click("#node-chips [data-key=offline]")
    page.wait_for(f"String({order}) === 'Zulu'")
    page.click("#node-chips [data-key=all]")
    page.fill("#find-node", "alp")
    page.wait_for(f"String({order}) === 'Alpha'")
    page.fill("#find-node", "no such")
    page.wait_for_text("No machine matches.")


def revoke_unused(page):
    """Revoke the token that waits for a machine."""
    revoke = "document.querySelector('#unused-list [aria-label=Revoke]')"
    page.wait_for(f"{revoke} !== null")
    page.evaluate(f"{revoke}.click()")
    page.click("#confirm-yes")
    page.wait_for(f"{revoke} === null")


def test_what_is_chosen_is_seen_where_a_system_chooses_the_colours(site, make_page):
    page = make_page(site, "/nodes")
    forced = {"name": "forced-colors", "value": "active"}
    page.call("Emulation.setEmulatedMedia", features=[forced])
    outline = "(one => one && getComputedStyle(one).outlineStyle)"
    chosen = f"{outline}(document.querySelector(%s)) === 'solid'"
    page.wait_for(chosen % '"#node-chips [aria-pressed=true]"')
    page.press("Control+k")
    page.wait_for(chosen % '"#palette-list .active"')
    assert not page.evaluate(chosen % '"#palette-list li:not(.active)"')
    page.press("Escape")
    page.click("#new-token")
    page.click("#token-name")
    page.press("Enter")
    page.wait_for_text("Waiting for the machine to connect")
    page.wait_for(chosen % '"#token-ways label:first-child"')
    assert not page.evaluate(chosen % '"#token-ways label:last-child"')
    page.press("Escape")
    revoke_unused(page)


def test_a_machine_without_a_name_is_called_by_its_host_name(site, make_page):
    page = make_page(site, "/nodes")
    page.click("#new-token")
    page.click("#token-name")
    page.press("Enter")
    page.wait_for_text("Waiting for the machine to connect")
    lines = page.evaluate("document.querySelector('#token-lines').textContent")
    assert "node add" in lines
    assert "--name" not in lines
    page.press("Escape")
    page.wait_for("document.querySelector('#unused-list').textContent.match('Unnamed')")
    revoke_unused(page)


@pytest.mark.parametrize("way_out", ["Escape", "Done"])
def test_the_token_is_nowhere_once_its_dialog_is_closed(site, make_page, way_out):
    page = make_page(site, "/nodes")
    page.click("#new-token")
    page.fill("#token-name", f"Left with {way_out}")
    page.press("Enter")
    line = page.wait_for(CHOSEN_LINE)
    secrets = [line.rpartition("/")[2]]  # the join code
    assert "mdt_" not in page.text("#token")
    page.click("#token-lines summary")
    secrets += [page.text("#token-lines .secret code")]
    assert secrets[1].startswith("mdt_")
    if way_out == "Done":
        page.click("#token-done")
    else:
        page.press(way_out)
    page.wait_for("!document.querySelector('#token').open")
    html = "document.documentElement.outerHTML"
    for secret in secrets:
        page.wait_for(f"!{html}.includes({json.dumps(secret)})")
    waiting = "document.querySelector('#unused-list').textContent"
    page.wait_for(f"{waiting}.includes('Left with {way_out}')")
    revoke_unused(page)


# Requests of a method wait in `held`, for the test to send them, until `release()`.
# What arrives from then on is in `answers`, once the page has taken it.
HOLD = """{
  const {send} = WebSocket.prototype;
  let holds = true;
  globalThis.held = [];
  globalThis.answers = [];
  globalThis.release = () => {
    holds = false;
    held.forEach(sendNow => sendNow());
  };
  WebSocket.prototype.send = function(data) {
    if (holds && String(data).includes('"%s"')) {
      this.addEventListener("message", ({data}) => answers.push(data));
      held.push(() => send.call(this, data));
    } else send.call(this, data);
  };
}"""


def test_a_token_whose_dialog_is_closed_before_it_is_made_is_revoked(site, make_page):
    page = make_page(site, "/nodes")
    page.evaluate(HOLD % "device.token.create")
    page.click("#new-token")
    page.fill("#token-name", "Unseen")
    submit = "document.querySelector('#token-form').requestSubmit()"
    page.evaluate(f"{submit}, {submit}")
    page.wait_for("held.length > 0")
    assert page.evaluate("held.length") == 1
    page.press("Escape")
    page.wait_for("!document.querySelector('#token').open")
    page.click("#new-token")
    page.evaluate("held[0]()")
    newest = lambda event: str(site.call("audit.list", event=event, limit=1))  # noqa: E731
    wait_for(lambda: "Unseen" in newest("token.revoked"))
    assert "Unseen" in newest("token.created")
    assert page.evaluate("document.querySelector('#token-made').hidden")
    assert "mdt_" not in page.evaluate("document.documentElement.outerHTML")
    page.press("Escape")


def test_a_refusal_of_a_token_is_not_shown_in_a_dialog_that_was_opened_since(
    site, make_page
):
    page = make_page(site, "/nodes")
    page.evaluate(HOLD % "device.token.create")
    page.click("#new-token")
    page.evaluate("document.querySelector('#token-name').value = 'x'.repeat(201)")
    page.evaluate("document.querySelector('#token-form').requestSubmit()")
    page.wait_for("held.length === 1")
    page.press("Escape")
    page.wait_for("!document.querySelector('#token').open")
    page.click("#new-token")
    page.evaluate("held[0]()")
    page.wait_for("answers.some(one => String(one).includes('printable characters'))")
    assert page.text("#token-error") == ""
    page.press("Escape")


def test_another_link_that_is_refused_says_why_and_can_be_asked_for_again(
    site, make_page
):
    page = make_page(site, "/nodes")
    page.click("#new-token")
    page.fill("#token-name", "Twice")
    page.press("Enter")
    first = page.wait_for(CHOSEN_LINE)
    # Not ten minutes later, when it is shown: a page whose clock jumps reconnects.
    page.evaluate(
        """(({send}) => {
          WebSocket.prototype.send = function(data) {
            const long = '"displayName":"' + "x".repeat(201);
            send.call(this, data.replace?.('"displayName":"Twice', long) ?? data);
          };
          globalThis.allow = () => (WebSocket.prototype.send = send);
          document.querySelector("#token-again").click();
        })(WebSocket.prototype)"""
    )
    page.wait_for(shows("#token-error", "printable characters"))
    assert page.evaluate("document.querySelector('#token-error').checkVisibility()")
    page.evaluate("allow()")
    page.press("Enter")  # the focus is in the field with its name
    page.wait_for(f"({CHOSEN_LINE} || {json.dumps(first)}) !== {json.dumps(first)}")
    page.click("#token-done")
    devices = site.call("device.pair.list")
    [made] = [one for one in devices if one["displayName"] == "Twice"]
    site.call("device.token.revoke", deviceId=made["deviceId"])


# -- what runs, and what ran ---------------------------------------------------

STOP = "[data-part=stop]"


def start(site, command, node="Demo node", **params):
    """Start a job as another caller does; return its id."""
    params = {"keep": True, **params}
    jobs, spec = [{"node": node}], {"command": command}
    answer = site.call("job.start", jobs=jobs, work="run", spec=spec, **params)
    return answer["jobs"][0]["id"]


def row_of(command):
    """Return a selector for the row of a command in the list of all jobs."""
    return f"#activity-list [aria-label$={json.dumps(command)}]"


def choose_in(page, select, value):
    """Choose an option, once there is one."""
    page.wait_for(
        f"""(select => {{
          select.value = {json.dumps(value)};
          if (select.selectedIndex < 0) return false;
          select.dispatchEvent(new Event("change"));
          return true;
        }})(document.querySelector({json.dumps(select)}))"""
    )


@pytest.mark.parametrize("path", ["/settings/models", "/activity/", "/chat/main"])
def test_what_anybody_runs_is_on_every_view_with_its_time_and_stop(
    site, make_page, path
):
    page = make_page(site, path)
    page.wait_for(READY)
    job = start(site, "exec sleep 120 # of a shell")
    page.wait_for(shows("#running", "sleep 120 # of a shell"))
    page.wait_for(shows("#running", "Demo node · "))
    page.wait_for(shows("#running-count", "1 running"))
    page.wait_for("document.title.startsWith('(1 running) ')")
    page.click("#running [aria-label=Stop]")
    wait_for(lambda: site.call("job.wait", id=job)["state"] == "cancelled")
    page.wait_for("!document.title.startsWith('(')")


def test_the_list_of_what_runs_leads_to_the_card_in_its_chat(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    type_line(page, "exec sleep 120")
    page.wait_for(shows("#running", "sleep 120"))
    chat = page.evaluate("location.pathname")
    page.click("#to-nodes")
    page.click("#running a")
    page.wait_for(f"location.pathname === {json.dumps(chat)}")
    page.wait_for("document.activeElement.matches('.command')")
    page.wait_for(shows("#sessions .current", "Running · "))
    page.click(f"{LAST} {STOP}")
    page.wait_for(shows(LAST, "Cancelled by owner"))
    page.wait_for(shows("#sessions .current", "Cancelled by owner"))


def test_a_typed_command_is_one_card_from_its_wait_to_its_end(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    type_line(page, "exec sleep 120")
    page.wait_for(shows(LAST, "Running"))
    type_line(page, "echo second")
    page.wait_for(shows(LAST, "Waiting for the command before it"))
    page.evaluate(f"document.querySelector('{LAST}').isFirst = true")
    page.click(f"#messages > :first-child {STOP}")
    page.wait_for(f"{shows(LAST, 'echo second')} && {shows(LAST, 'Done')}")
    assert page.evaluate(f"document.querySelector('{LAST}').isFirst")
    assert page.evaluate("document.querySelectorAll('#messages > *').length") == 2


def test_activity_is_live_and_its_rows_open_to_the_log(site, make_page):
    page = make_page(site, "/activity/")
    page.wait_for(READY)
    job = start(site, "for n in $(seq 6000); do echo line $n; sleep 0.2; done")
    row = row_of("echo line $n; sleep 0.2; done")
    page.wait_for(shows(row, "Running"))
    page.click(f"{row} [data-part=line]")
    page.wait_for(shows(f"{row} .lines", "line 3\n"))
    page.wait_for(shows(row, "Asked by owner (API) from 127.0.0.1"))
    page.wait_for(f"location.pathname === '/activity/{job}'")
    take_screenshot(page, "activity-open")
    # A caller whose name is long is cut with an ellipsis, which a grid has not.
    who = f"document.querySelector({json.dumps(row + ' [data-part=who]')})"
    assert page.evaluate(f"getComputedStyle({who}).display") == "block"
    page.reload()
    page.wait_for(shows(f"{row} .lines", "line 12\n"))
    page.click(f"{row} {STOP}")
    page.wait_for(shows(row, "Cancelled by owner"))
    assert "line 12" in page.text(f"{row} .lines")


def test_a_command_of_a_shell_is_watched_and_says_where_its_output_went(
    site, make_page
):
    page = make_page(site, "/activity/")
    line = "for n in $(seq 6000); do echo shell $n; sleep 0.2; done"
    words = ("node", "exec", "Demo node", "--", line)
    with Program(*words, home=site.home) as shell:
        row = row_of(line)
        page.click(f"{row} [data-part=line]")
        page.wait_for(shows(f"{row} .lines", "shell 9\n"))
        page.wait_for(shows(row, "its output goes to the client that started it"))
        page.wait_for(shows(row, "Asked by owner (shell) from"))
        page.click(f"{row} {STOP}")
        page.wait_for(shows(row, "Cancelled by owner"))
        wait_for(lambda: shell.process.poll() is not None, what="the end of exec")
    page.reload()
    page.wait_for(shows(row, "its output goes to the client that started it"))
    # What is gone is not offered.
    for part in ("wrap", "copy", "save"):
        button = json.dumps(f"{row} [data-part={part}]")
        page.wait_for(f"document.querySelector({button}).hidden")


def test_the_link_of_an_old_command_shows_its_output(site, make_page):
    job = start(site, "echo $((6 * 7)) of long ago")
    site.call("job.wait", id=job)
    for number in range(101):
        start(site, f"true {number}")
    page = make_page(site, f"/activity/{job}")
    page.wait_for(shows(f"{row_of('of long ago')} .lines", "42 of long ago"))


def test_activity_filters_mean_what_they_say(site, make_page):
    site.call("job.wait", id=start(site, "echo on another machine", "Local"))
    for command in ("echo fine in any CASE", "exit 9 in any case"):
        site.call("job.wait", id=start(site, command))
    # More than a page of newer ones, none of which is looked for.
    jobs = [{"node": "Demo node"}] * 101
    spec = {"command": "true"}
    site.call("job.start", jobs=jobs, work="run", spec=spec, keep=True)
    page = make_page(site, "/activity/")
    page.wait_for(shows("#activity-list", "Today"))
    choose_in(page, "#filter-node", "local")
    page.wait_for(shows("#activity-list", "on another machine"))
    choose_in(page, "#filter-node", "")
    page.wait_for(shows("#activity-list", "true"))
    choose_in(page, "#filter-state", "failed")
    page.wait_for(shows("#activity-list", "exit 9"))
    assert "\ntrue\n" not in page.text("#activity-list")
    choose_in(page, "#filter-state", "")
    page.fill("#find-command", "IN ANY case")
    page.wait_for("document.querySelectorAll('#activity-list .command').length === 2")
    choose_in(page, "#filter-state", "succeeded")
    page.wait_for(f"!{shows('#activity-list', 'exit 9')}")
    assert "echo fine" in page.text("#activity-list")
    choose_in(page, "#filter-state", "failed")
    page.wait_for(f"{shows('#activity-list', 'exit 9')}")
    assert "echo fine" not in page.text("#activity-list")
    saved = page.evaluate("document.querySelector('#audit-save').search")
    assert saved == "?state=failed&query=IN+ANY+case"
    # What happens meanwhile is filtered as well.
    site.call("job.wait", id=start(site, "echo again in any case"))
    site.call("job.wait", id=start(site, "exit 8 in any case"))
    page.wait_for(shows("#activity-list", "exit 8"))
    assert "echo again" not in page.text("#activity-list")
    choose_in(page, "#filter-node", "local")
    page.wait_for(shows("#activity-empty", "No command matches."))


NOTICES = """window.notices = [];
window.Notification = class extends EventTarget {
  static permission = "default";
  static asked = 0;
  static async requestPermission() {
    Notification.asked += 1;
    return (Notification.permission = "granted");
  }
  constructor(title, {body}) { super(); notices.push(`${title}: ${body}`); }
};"""


# Nobody waits here for half a minute: what the gateway tells began an hour earlier.
EARLIER = """const parse = JSON.parse;
const earlier = (_, name, ms) => `"${name}":${ms - 3600_000}`;
JSON.parse = text => parse(text.replace(/"(startedAt|askedAt)":(\\d+)/g, earlier));"""


def test_a_terminal_offers_no_notice_of_its_end(site, make_page):
    page = make_page(site)
    page.call("Page.addScriptToEvaluateOnNewDocument", source=NOTICES + EARLIER)
    page.reload()
    page.wait_for(READY)
    open_terminal(page, site, "Local")
    page.wait_for(shows("#running", "login shell"))
    assert page.evaluate("document.querySelector('#notify-offer').hidden")
    enter(page, "exit")


def test_a_long_command_that_ends_notifies_who_asked_for_it_and_looks_elsewhere(
    site, make_page
):
    page = make_page(site)
    page.call("Page.addScriptToEvaluateOnNewDocument", source=NOTICES + EARLIER)
    page.reload()
    page.wait_for(READY)
    open_new_chat(page)
    assert page.evaluate("document.querySelector('#notify-offer').hidden")
    type_line(page, "exec sleep 120")
    page.wait_for(shows("#running", "sleep 120"))
    page.wait_for("!document.querySelector('#notify-offer').hidden")
    page.click("#notify-yes")
    page.wait_for("document.querySelector('#notify-offer').hidden")
    assert page.evaluate("Notification.asked") == 1
    page.evaluate("Object.defineProperty(document, 'hidden', {value: true})")
    (job,) = site.call("job.list", state="open")
    site.call("job.cancel", id=job["id"])
    page.wait_for("notices.length === 1")
    said = "Cancelled by owner on Local: exec sleep 120"
    assert page.evaluate("notices[0]") == said


def test_an_approval_notifies_who_looks_elsewhere(own_site, make_page):
    with scripted_model([wanting("echo asked"), {"content": "The end."}]) as server:
        own_site.stop()
        own_site.start(OLLAMA_HOST=server.url)
        own_site.call("sessions.patch", key="main", model="ollama/m")
        page = make_page(own_site)
        page.call("Page.addScriptToEvaluateOnNewDocument", source=NOTICES)
        page.reload()
        page.wait_for(READY)
        page.evaluate("Notification.permission = 'granted'")
        page.evaluate("Object.defineProperty(document, 'hidden', {value: true})")
        own_site.call("chat.send", sessionKey="main", text="go on")
        page.wait_for("notices.length === 1")
        assert page.evaluate("notices[0]") == "Approval is needed on Local: echo asked"


def test_an_approval_that_was_asked_for_while_the_page_was_away_is_notified(
    own_site, make_page
):
    with scripted_model([wanting("echo asked"), {"content": "The end."}]) as server:
        own_site.stop()
        own_site.start(OLLAMA_HOST=server.url)
        own_site.call("sessions.patch", key="main", model="ollama/m")
        page = make_page(own_site)
        page.call("Page.addScriptToEvaluateOnNewDocument", source=NOTICES)
        deafen(page)
        page.reload()
        page.wait_for(LISTED)
        page.evaluate("Notification.permission = 'granted'")
        page.evaluate("Object.defineProperty(document, 'hidden', {value: true})")
        page.evaluate("globalThis.isDeaf = true")
        own_site.call("chat.send", sessionKey="main", text="go on")
        wait_for(lambda: own_site.call("exec.approval.list"), what="the question")
        page.evaluate("globalThis.isDeaf = false; sockets.at(-1).close()")
        page.wait_for("notices.length === 1")
        assert page.evaluate("notices[0]") == "Approval is needed on Local: echo asked"


def test_a_command_is_run_again_elsewhere(site, make_page):
    site.call("job.wait", id=start(site, "echo $((4 * 4)) twice"))
    page = make_page(site, "/activity/")
    row = row_of("echo $((4 * 4)) twice")
    page.click(f"{row} [data-part=line]")
    page.click(f"{row} [data-part=again]")
    page.wait_for(shows("#again", "echo $((4 * 4)) twice"))
    take_screenshot(page, "again")
    choose_in(page, "#again-node", "local")
    page.click("#again .main")
    again = "#activity-list .command:not(.folded)[aria-label*='on Local']"
    page.wait_for(f"{shows(again, '16 twice')} && {shows(again, 'Done')}")


def test_a_copy_of_files_is_not_offered_to_be_run_again_as_a_command(site, make_page):
    request = {"work": "file.read", "spec": {"paths": ["/etc/hostname"]}}
    jobs = [{"node": "local"}]
    answer = site.call("job.start", **request, jobs=jobs, keep=True)
    site.call("job.wait", id=answer["jobs"][0]["id"])
    page = make_page(site, "/activity/")
    row = row_of("read /etc/hostname")
    page.click(f"{row} [data-part=line]")
    page.wait_for(shows(row, "1 file"))
    assert page.evaluate(f"document.querySelector('{row} [data-part=again]').hidden")


def test_a_key_that_reads_is_offered_no_stop_and_no_run_again(site, make_page):
    ended = "echo $((5 * 5)) read"
    site.call("job.wait", id=start(site, ended))
    runs = start(site, "sleep 120; echo $((6 * 6)) read")
    key = site.call("keys.create", name="looks", scopes=["operator.read"])["key"]
    reader = SimpleNamespace(url=site.url, port=site.port, key=key)
    page = make_page(reader, "/activity/")
    row = row_of(ended)
    page.click(f"{row} [data-part=line]")
    page.wait_for(shows(row, "25 read"))
    page.wait_for(shows("#running", "sleep 120"))
    seen = "[...document.querySelectorAll('[data-part=again], [data-part=stop]')]"
    assert page.evaluate(f"{seen}.filter(b => b.offsetParent).length") == 0
    site.call("job.cancel", id=runs)


# Both: the page notices where one goes on without the other.
STOP_CLOCKS = """(([at, now]) => {
  globalThis.clock = Date.now;
  Date.now = () => at;
  performance.now = () => now;
})([Date.now(), performance.now()])"""
START_CLOCKS = "Date.now = clock; delete performance.now"


def test_a_finished_output_starts_at_its_top_and_is_as_high_as_most_of_the_window(
    site, make_page, tmp_path
):
    page = make_page(site)
    open_new_chat(page)
    page.evaluate(STOP_CLOCKS)  # however long it takes here, nobody watches it
    run(page, "seq 300")
    screen = f"document.querySelector('{LAST} .screen')"
    page.wait_for(f"{screen}.scrollTop === 0 && {screen}.scrollHeight > 3000")
    page.reload()
    page.wait_for(shows(f"{LAST} .lines", "299\n300"))
    page.wait_for(f"{screen}.scrollTop === 0")
    assert 0.65 < page.evaluate(f"{screen}.offsetHeight / innerHeight") <= 0.7
    # One that a person follows stays where it is.
    go = tmp_path / "go"
    type_line(page, f"seq 300; {wait_in_shell(go)}; echo $((6 * 7)) at last")
    page.wait_for(f"{shows(LAST, 'Running')} && {shows(f'{LAST} .lines', '300')}")
    shown_at = page.evaluate("performance.now()")
    page.wait_for(f"performance.now() - {shown_at} > 2500")  # it counts from 2 s on
    go.touch()
    page.wait_for(f"{shows(LAST, '42 at last')} && {shows(LAST, 'Done')}")
    page.wait_for(f"{screen}.scrollTop > 1000")


def test_wide_output_uses_the_width_of_the_window(site, make_page):
    page = make_page(site, width=1920, height=1080)
    open_new_chat(page)
    run(page, "echo narrow")
    run(page, "printf '%0150d' 1")
    widths = page.evaluate(
        "[...document.querySelectorAll('#messages .command')].map(e => e.offsetWidth)"
    )
    assert widths[0] == 800
    assert widths[1] > 1100
    lefts = page.evaluate(
        "[...document.querySelectorAll('#messages .command')].map(e => e.offsetLeft)"
    )
    assert lefts[0] == lefts[1]


def test_long_lines_wrap_or_scroll_in_all_outputs(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    run(page, "printf '%0300d' 1")
    lines = f"document.querySelector('{LAST} .lines')"
    assert page.evaluate(f"getComputedStyle({lines}).whiteSpace") == "pre"
    page.click(f"{LAST} .lines")
    page.click(f"{LAST} [data-part=wrap]")
    page.wait_for(f"getComputedStyle({lines}).whiteSpace === 'pre-wrap'")
    page.reload()
    page.wait_for(shows(LAST, "Done"))
    assert page.evaluate(f"getComputedStyle({lines}).whiteSpace") == "pre-wrap"
    assert page.text(f"{LAST} [data-part=wrap]") == "Scroll lines"


def test_a_run_of_cards_names_its_machine_once(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    run(page, "echo one")
    run(page, "mkdir -p /tmp")
    where = "[...document.querySelectorAll('#messages .where')]"
    assert page.evaluate(f"{where}.filter(e => e.offsetWidth).length") == 1
    choose(page, "Demo node")
    run(page, "echo three")
    assert page.evaluate(f"{where}.filter(e => e.offsetWidth).length") == 2
    # A success without output is one line.
    height = "document.querySelectorAll('#messages .command')[1].offsetHeight"
    assert page.evaluate(height) < 50


def test_a_card_of_a_chat_is_run_again_in_that_chat(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    run(page, "echo $((3 * 41))")
    page.evaluate(f"document.querySelector('{LAST} [data-part=again]').click()")
    page.wait_for(shows("#again-note", "in this chat"))
    choose_in(page, "#again-node", nodes(site)["Demo node"]["nodeId"])
    page.click("#again .main")
    page.wait_for(f"{shows(LAST, 'Demo node')} && {shows(LAST, 'Done')}")
    assert "/chat/" in page.evaluate("location.pathname")
    page.wait_for(shows(f"{LAST} .lines", "123"))


# -- the palette, the keyboard -------------------------------------------------

FOUND = "[...document.querySelectorAll('#palette-list li')].map(li => li.innerText)"


def open_palette(page, typed=""):
    page.press("Control+k")
    page.wait_for("document.activeElement.id === 'palette-text'")
    page.type(typed)


def test_the_palette_finds_machines_chats_commands_views_and_actions(site, make_page):
    old = "echo $((7 * 11)) palette"
    site.call("job.wait", id=start(site, old))
    page = make_page(site)
    open_new_chat(page)
    run(page, "true")
    page.click("#text")
    page.type("half typed")
    open_palette(page, "demo")
    # What begins with it comes first.
    page.wait_for(f"{FOUND}[0].startsWith('Demo node')")
    listed = page.evaluate(FOUND)
    assert any(text.startswith("Use Demo node in the chat") for text in listed)
    page.press("Enter")
    page.wait_for(shows("#node-title", "Demo node"))
    open_palette(page, "activ")
    page.press("Enter")
    page.wait_for("!document.querySelector('#activity').hidden")
    open_palette(page, "77")  # an action or a command that nothing here names
    page.press("Escape")
    open_palette(page, "palette")
    page.wait_for(f"{FOUND}.some(text => text.startsWith({json.dumps(old)}))")
    page.click("#palette-list li")
    page.wait_for(f"document.querySelector('#text').value === {json.dumps(old)}")
    page.wait_for("document.activeElement.id === 'text'")
    page.press("ArrowDown")  # nothing ran, and what was typed is still there
    assert page.evaluate("document.querySelector('#text').value") == "half typed"
    page.fill("#text", "")


def test_the_palette_is_a_combobox_for_keyboard_and_pointer(site, make_page):
    page = make_page(site)
    open_palette(page)
    page.wait_for(f"{FOUND}.length > 5")
    active = (
        "document.getElementById(document.querySelector('#palette-text')"
        ".getAttribute('aria-activedescendant')).getAttribute('aria-selected')"
    )
    assert page.evaluate(active) == "true"
    # All at once: the chosen one stays so when others come before it.
    places = page.evaluate("""["ArrowDown", "ArrowDown", "ArrowUp"].map(key => {
      const place = () => [...document.querySelectorAll("#palette-list li")]
        .findIndex(item => item.matches(".active"));
      const before = place();
      document.querySelector("#palette-text").dispatchEvent(
        new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
      return place() - before;
    })""")
    assert places == [1, 1, -1]
    page.type("no such thing at all")
    page.wait_for(shows("#palette-none", "Nothing matches."))
    page.press("Enter")
    page.press("Escape")
    page.wait_for("!document.querySelector('#palette').open")
    page.click("#to-palette")
    page.wait_for("document.querySelector('#palette').open")
    page.press("Control+k")
    page.wait_for("!document.querySelector('#palette').open")


def test_a_question_mark_shows_the_keys_but_not_to_who_types(site, make_page):
    page = make_page(site)
    page.click("#text")
    page.type("?")
    assert not page.evaluate("document.querySelector('#shortcuts').open")
    page.fill("#text", "")
    page.evaluate("document.activeElement.blur()")
    for key in ("?", "Shift+؟"):
        page.press(key)
        page.wait_for("document.querySelector('#shortcuts').open")
        assert page.evaluate(shows("#shortcuts", "Ctrl+K"))
        page.press("Enter")
        page.wait_for("!document.querySelector('#shortcuts').open")


# -- models, access ------------------------------------------------------------


def own_server(names):
    """Serve an OpenAI-compatible list of models."""

    def reply(request):
        if not request.path.endswith("/v1/models"):
            return 404, {}, [b"{}"]
        listed = json.dumps({"data": [{"id": name} for name in names]})
        return 200, {"Content-Type": "application/json"}, [listed.encode()]

    return ScriptedServer(reply)


def open_provider(page, provider=""):
    """Open the form for a provider; "" is a server of one's own."""
    page.click("#add-provider")
    page.wait_for("document.querySelector('#provider').open")
    choose_in(page, "#provider-id", provider)


def test_a_server_of_ones_own_is_added_with_one_form_and_its_models_used(
    site, make_page
):
    page = make_page(site, "/settings/models")
    page.wait_for(shows("#model-rows", "Shell"))
    page.wait_for(shows("#chat-storage", "They are kept for ever"))
    with own_server(["coder", "talker"]) as server:
        open_provider(page)
        page.click("#provider-save")
        page.wait_for(shows("#provider-error", "Enter the address of the server"))
        # A sentence without the number of an error; what was entered stays.
        page.fill("#provider-url", f"127.0.0.1:{free_port()}")
        page.fill("#provider-name", "Lab box")
        page.click("#provider-save")
        page.wait_for(shows("#provider-error", "nothing listens there"))
        assert "rrno" not in page.text("#provider-error")
        page.fill("#provider-url", server.url)
        page.fill("#provider-key", "sk-entered-on-the-page")
        page.click("#provider-save")
        page.wait_for("!document.querySelector('#provider').open")
        page.wait_for(shows("#providers", "2 models · key entered here"))
        page.wait_for(shows("#models-headline", "2 language models can be used"))
        assert "sk-entered" not in page.evaluate("document.documentElement.outerHTML")
        page.click("[aria-label='Use coder in the chat']")
        page.wait_for(shows("#model-button", "coder"))
    page.goto(f"{site.url}/settings/models")
    page.click("[aria-label='Remove lab-box']")
    page.click("#confirm-yes")
    page.wait_for(f"!{shows('#providers', 'lab-box')}")
    site.call("sessions.patch", key="main", model="shell")


def test_a_provider_that_does_not_answer_is_asked_again_and_changed(site, make_page):
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    site.call("models.configure", provider="openai", apiKey="sk-1", baseUrl=url)
    page = make_page(site, "/settings/models")
    page.wait_for(shows("#providers", "nothing listens there"))
    page.click("#providers .button")
    page.click("[aria-label='Change OpenAI']")
    page.wait_for("document.querySelector('#provider').open")
    assert page.evaluate("document.querySelector('#provider-url').value") == url
    assert page.evaluate("document.querySelector('#provider-key').value") == ""
    with own_server(["gpt"]) as server:
        page.fill("#provider-url", server.url)
        page.click("#provider-save")
        page.wait_for(shows("#providers", "1 model · key entered here"))
    site.call("models.remove", provider="openai")


def test_a_key_comes_with_a_sign_in_link_is_shown_once_and_is_revoked(site, make_page):
    page = make_page(site, "/settings/access")
    page.wait_for(shows("#own-key", "the key owner"))
    page.fill("#key-name", "ci")
    page.press("Enter")
    page.wait_for(shows("#key-made", "shown only now"))
    page.click("#key-lines summary")
    lines = "[...document.querySelectorAll('#key-lines code')].map(c => c.textContent)"
    *_, link, key, claude, code = page.evaluate(lines)
    assert link.endswith(f"/#key={key}")
    mcp = page.evaluate("new URL('/mcp', location.href).href")
    assert f'{mcp} --header "Authorization: Bearer {key}"' in claude
    assert json.loads(code)["servers"]["moltis"]["url"] == mcp
    page.wait_for(shows("#keys", "ci"))
    other = make_page(SimpleNamespace(url=site.url, port=site.port, key=key))
    page.click("#key-done")
    html = "document.documentElement.outerHTML"
    page.wait_for(f"!{html}.includes({json.dumps(key)})")
    page.reload()
    page.wait_for(shows("#logins", "ci"))
    page.click("[aria-label='Revoke ci']")
    page.click("#confirm-yes")
    other.wait_for_text("Operator key")
    page.wait_for(f"!{shows('#keys', 'ci')}")


def test_a_key_that_is_shown_goes_with_its_view(site, make_page):
    page = make_page(site, "/settings/access")
    key = make_key(page, "left")
    page.click("#to-nodes")
    html = "document.documentElement.outerHTML"
    page.wait_for(f"!{html}.includes({json.dumps(key)})")
    (left,) = [k for k in site.call("keys.list") if k["name"] == "left"]
    site.call("keys.revoke", keyId=left["keyId"])


def test_the_key_of_the_owner_says_where_it_is_and_has_no_bin(site, make_page):
    page = make_page(site, "/settings/access")
    page.wait_for(shows("#keys", "gateway.json"))
    row = "[...document.querySelectorAll('#keys li')].find(e => e.innerText.match(%s))"
    owner = row % "/^owner/"
    assert page.evaluate(f"{owner}.querySelectorAll('button').length") == 0
    keys = [k["name"] for k in site.call("keys.list") if not k.get("revokedAt")]
    assert "owner" in keys
    assert "this machine" not in page.text("#access")


def test_scopes_are_explained_where_they_are_chosen_and_tick_what_they_include(
    site, make_page
):
    page = make_page(site, "/settings/access")
    page.wait_for(shows("#key-scopes", "see machines, chats, commands"))
    ticked = (
        "[...document.querySelectorAll('#key-scopes input:checked')]"
        ".map(box => box.value).join()"
    )
    assert page.evaluate(ticked) == "read,write"
    page.click("#key-scopes [value=admin]")
    page.wait_for(f"{ticked} === 'read,write,approvals,pairing,admin'")
    page.click("#key-scopes [value=admin]")
    page.wait_for(f"{ticked} === 'read,write'")
    page.click("#key-scopes [value=write]")
    page.wait_for(f"{ticked} === ''")
    page.fill("#key-name", "nothing")
    page.press("Enter")
    page.wait_for_text("Choose what the key may do")


# What a key that reads may not do.
DOES = re.compile(
    "New chat|Rename|Delete|Add a|Use|Revoke|Create|Send|Stop|Run again|Change|Remove|"
    "Approve|Deny|End this|Model:|Machine:"
)


def test_a_key_that_reads_is_shown_nothing_that_it_may_not_press(site, make_page):
    site.call("models.configure", provider="lab", baseUrl=f"http://127.0.0.1:{1}/v1")
    key = site.call("keys.create", name="looks on", scopes=["operator.read"])
    page = make_page(SimpleNamespace(url=site.url, port=site.port, key=key["key"]))
    views = ["nodes", "nodes/Demo%20node", "activity/", "settings/models"]
    for path in ["chat/main", *views, "settings/access"]:
        page.goto(f"{site.url}/{path}")
        page.wait_for(LISTED)
        if path == "chat/main":
            page.wait_for(shows("#only-reads", "reads only"))
        if path == "settings/models":
            page.wait_for(shows("#providers", "nothing listens there"))
        if path == "settings/access":
            page.wait_for(shows("#own-key", "the key looks on"))
            assert "see machines" in page.text("#own-key")
        seen = page.evaluate(
            "[...document.querySelectorAll('#app :is(button, input, textarea)')]"
            ".filter(e => e.checkVisibility() && !e.disabled)"
            ".map(e => e.getAttribute('aria-label') || e.innerText.trim())"
        )
        assert [name for name in seen if DOES.match(name)] == []
        assert page.evaluate("document.querySelector('#toast').hidden")
    site.call("keys.revoke", keyId=key["keyId"])
    site.call("models.remove", provider="lab")


def test_who_may_not_do_something_reads_which_scope_is_missing(site):
    key = site.call("keys.create", name="reads", scopes=["operator.read"])
    reader = Site.__new__(Site)
    reader.url, reader.key = site.url, key["key"]
    with pytest.raises(urllib.error.HTTPError) as caught:
        reader.call("sessions.create")
    said = json.load(caught.value)["error"]["message"]
    assert "the key reads lacks the scope operator.write" in said
    assert "sessions.create" not in said
    site.call("keys.revoke", keyId=key["keyId"])


def test_whoever_goes_to_files_before_the_machines_are_known_gets_them(
    site, make_page, tmp_path
):
    (tmp_path / "a file").touch()
    page = make_page(site)
    page.call("Page.addScriptToEvaluateOnNewDocument", source=HOLD % "node.list")
    page.reload()
    page.wait_for("held.length > 0")
    page.evaluate(
        f"history.pushState(null, '', '/nodes/Local/files{tmp_path}');"
        "dispatchEvent(new PopStateEvent('popstate'))"
    )
    page.wait_for("!document.querySelector('#files').hidden")
    page.evaluate("release()")
    page.wait_for(shows("#files-rows", "a file"))


# -- losing the gateway --------------------------------------------------------


def test_a_page_that_lost_its_gateway_comes_back_with_what_it_missed(own_site, browser):
    with browser.new_page(isolated=True) as page:
        page.goto(f"{own_site.url}/#key={own_site.key}")
        page.wait_for(READY)
        run(page, "echo before")
        own_site.stop()
        page.wait_for_text("The gateway cannot be reached")
        take_screenshot(page, "banner")
        own_site.start()
        own_site.call("chat.send", sessionKey="main", text="echo meanwhile")
        page.wait_for("document.querySelector('#banner').hidden")
        page.wait_for(f"{shows(LAST, 'meanwhile')} && {shows(LAST, 'Done')}")
        assert "before" in page.text("#messages")
        assert run(page, "echo after").strip() == "after"
        # Chromium reports each try to connect that failed, and nothing else went wrong.
        assert [e for e in page.errors if "WebSocket connection to" not in e] == []


def test_messages_that_one_answer_has_no_room_for_can_be_shown(own_site, browser):
    """The page is told of them when it comes back, too."""
    with browser.new_page(isolated=True) as page:
        page.goto(f"{own_site.url}/#key={own_site.key}")
        page.wait_for(READY)
        run(page, "echo the beginning")
        page.wait_for_text("the beginning")
        own_site.stop()
        db = sqlite3.connect(str(own_site.home / ".moltis/moltis.db"))
        with contextlib.closing(db), db:
            (last,) = db.execute("SELECT max(created_at) FROM messages").fetchone()
            (seq,) = db.execute(
                "SELECT seq FROM sessions WHERE key = 'main'"
            ).fetchone()
            details = json.dumps({"unknown": "x" * 3_000_000})
            for n in range(3):
                db.execute(
                    "INSERT INTO messages (id, session_key, run_id, role, created_at,"
                    " state, seq, text, details) VALUES (?, 'main', '', 'assistant', ?,"
                    " 'done', ?, ?, ?)",
                    (f"m{n}", last + 1 + n, seq, f"kept answer {n}", details),
                )
        own_site.start()
        page.wait_for_text("kept answer 2")
        for text in ("kept answer 1", "kept answer 0"):
            page.wait_for("!document.querySelector('#older').hidden")
            page.click("#older")
            page.wait_for_text(text)
        page.wait_for_text("the beginning")
        page.wait_for("document.querySelector('#older').hidden")


@pytest.fixture
def attic(own_site):
    """A node in a process of its own."""
    made = own_site.call("device.token.create", displayName="Attic")
    line = f"moltis node add --host {own_site.url} --token {made['deviceToken']}"
    node = own_site.run(f"{line} --name Attic --foreground")
    wait_for(lambda: "Attic" in connected(own_site), what="the node")
    return node


def connected(site):
    return {name for name, node in nodes(site).items() if node["connected"]}


def test_a_running_command_goes_on_after_the_gateway_was_restarted(
    own_site, attic, browser
):
    with browser.new_page(isolated=True) as page:
        page.goto(f"{own_site.url}/#key={own_site.key}")
        page.wait_for(READY)
        choose(page, "Attic")
        type_line(page, "for n in $(seq 6000); do echo line $n; sleep 0.2; done")
        page.wait_for(shows(LAST, "line 2\n"))
        own_site.stop()
        page.wait_for_text("The gateway cannot be reached")
        own_site.start()
        page.wait_for("document.querySelector('#banner').hidden")
        page.wait_for(shows(LAST, "line 40\n"), 60)
        lines = page.text(f"{LAST} .lines").split("\n")
        assert lines[:40] == [f"line {n}" for n in range(1, 41)]
        page.click(f"{LAST} [data-part=stop]")
        page.wait_for(shows(LAST, "Cancelled"))


def test_a_card_says_that_its_node_is_away(own_site, attic, make_page):
    page = make_page(own_site)
    choose(page, "Attic")
    type_line(page, "echo $((6 * 7)); sleep 100")
    page.wait_for(shows(LAST, "42"))
    attic.end(9)
    page.wait_for(shows(LAST, "Waiting for Attic to come back"))
    assert page.evaluate(f"document.querySelector('{LAST}').dataset.kind") == "wait"
    page.wait_for_text("Attic has been offline since")


def test_what_is_said_beside_a_machine_s_name_does_not_repeat_it(
    own_site, attic, make_page
):
    page = make_page(own_site)
    choose(page, "Attic")
    attic.end(9)
    wait_for(lambda: "Attic" not in connected(own_site), what="the node's end")
    type_line(page, "echo anything")
    page.wait_for(shows(LAST, "Offline since 20"))
    assert page.text(LAST).count("Attic") == 1
    page.goto(f"{own_site.url}/nodes/Attic/files/tmp")
    page.wait_for(shows("#files-problem", "Offline since 20"))
    assert not page.evaluate("document.querySelector('#files-tools').offsetParent")
    # "Offline for 1 min" beside "just now" would be two answers.
    page.goto(f"{own_site.url}/nodes")
    page.wait_for(shows("#nodes-headline", "Attic is offline"))
    seen, who = page.evaluate(
        "['.seen', '.who'].map(part => "
        "document.querySelector(`#node-cards .away ${part}`).innerText)"
    )
    assert (seen == "just now") == ("for" not in who)


def test_a_card_of_the_first_edition_shows_the_text_that_was_kept(own_site, make_page):
    """Its output is in its message; there is no log."""
    own_site.call("chat.send", sessionKey="main", text="echo 6 | tr 6 7")
    wait_for(lambda: own_site.call("job.list", state="done"), what="the command's end")
    own_site.stop()
    db = sqlite3.connect(str(own_site.home / ".moltis/moltis.db"))
    with db:
        db.execute("UPDATE jobs SET log = NULL")
        text = "kept by the first edition\n"
        change = "details = json_set(details, '$.command.output', ?)"
        db.execute(f"UPDATE messages SET {change} WHERE job_id IS NOT NULL", [text])
    db.close()
    own_site.start()
    page = make_page(own_site)
    page.wait_for(shows(f"{LAST} .lines", text.strip()))
    assert "Done" in page.text(LAST)
    assert page.evaluate(f"document.querySelector('{LAST} [data-part=save]').hidden")


# -- phones, accessibility -----------------------------------------------------


def test_it_works_on_a_phone(site, make_page):
    page = make_page(site)
    page.set_viewport(390, 844, mobile=True, scale=2)
    page.click("#open-sidebar")
    open_new_chat(page)
    focus = "document.activeElement.id"
    page.wait_for(shows("#fold", " on "))
    page.click("#fold")
    page.wait_for(f"{focus} === 'model-button'")
    page.press("Escape")
    page.wait_for(f"{focus} === 'fold'")
    page.click("#fold")
    page.click("#node-button")
    option = "[...document.querySelectorAll('#node-list li')]"
    page.wait_for(f"{option}.length === 2")
    take_screenshot(page, "phone-picker")
    page.click("#node-list li:last-child")
    page.wait_for(shows("#fold", "Shell on Demo node"))
    page.wait_for(f"{focus} === 'fold'")
    assert not page.evaluate("document.querySelector('#node-button').offsetParent")
    # The menu takes the focus, keeps it, and gives it back.
    page.click("#open-sidebar")
    page.wait_for(f"{focus} === 'close-sidebar'")
    assert page.evaluate("document.querySelector('#frame').inert")
    page.press("Escape")
    page.wait_for(f"{focus} === 'open-sidebar'")
    run(page, "uname -a")
    take_screenshot(page, "phone-chat")
    page.goto(f"{site.url}/nodes/Demo%20node")
    page.wait_for(shows("#node-facts", "Host name"))
    cut = "(title => title.scrollWidth > title.clientWidth)"
    assert not page.evaluate(f"{cut}(document.querySelector('#node-title'))")
    take_screenshot(page, "phone-node")
    views = ("nodes", "models", "access")
    for path in ("/chat/main", *(f"/settings/{view}" for view in views), "/activity/"):
        page.goto(site.url + path)
        page.wait_for(LISTED)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    take_screenshot(page, "phone-activity")
    # A dialog ends where a thumb reaches it, with its buttons in view.
    page.goto(f"{site.url}/nodes")
    page.click("#new-token")
    bottom = "document.querySelector('%s').getBoundingClientRect().bottom"
    page.wait_for(bottom % "#token" + " === innerHeight")
    assert page.evaluate(bottom % "#token-form .main") <= 844
    page.press("Escape")


def box(selector):
    """Return JavaScript for where an element is."""
    return f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"


def test_verdicts_stand_in_one_line_whether_there_is_output_or_not(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    run(page, "true")
    run(page, "echo output")
    cards = "#messages > :nth-last-child(%d) .verdict"
    page.wait_for(shows(cards % 2, "Done"))
    right = [page.evaluate(f"{box(cards % n)}.right") for n in (1, 2)]
    assert right[0] == right[1]


def test_chats_stay_in_reach_while_much_runs(site, make_page):
    jobs = [start(site, f"exec sleep 120 # {n}") for n in range(5)]
    page = make_page(site)
    page.set_viewport(1280, 700)
    page.wait_for("document.querySelectorAll('#running li').length === 3")
    page.click("#sessions a[href='/chat/main']")
    page.click("#running-more")
    page.wait_for("location.pathname === '/activity/'")
    for job in jobs:
        site.call("job.cancel", id=job)
        site.call("job.wait", id=job)


def test_on_a_phone_every_row_names_its_machine_and_columns_stand_apart(
    site, make_page, tmp_path
):
    (tmp_path / "a file").touch()
    site.call("job.wait", id=start(site, "echo rows; false # " + "long " * 9))
    page = make_page(site, "/activity/")
    page.set_viewport(390, 844, mobile=True)
    row = row_of("long ")
    page.wait_for(shows(f"{row} .where", "Demo node"))
    page.wait_for(shows(f"{row} .verdict", "Exit status 1"))
    text = f"document.querySelector({json.dumps(f'{row} .where')})"
    assert page.evaluate(f"{text}.scrollWidth <= {text}.clientWidth")
    page.goto(f"{site.url}/nodes/Local/files{tmp_path}")
    page.wait_for(shows("#files-rows", "a file"))
    heads = [f"#files-head button:nth-child({n})" for n in (2, 3)]
    page.wait_for(shows(heads[1], "Changed"))
    assert page.evaluate(f"{box(heads[1])}.left - {box(heads[0])}.right") > 12
    assert page.evaluate(f"{box('.files-box')}.right - {box(heads[1])}.right") > 12
    page.goto(f"{site.url}/nodes/Local")
    page.wait_for(shows("#node-figures", "Disk"))
    tops = "new Set([...document.querySelectorAll('#node-figures > *')].map(e => e.%s))"
    assert page.evaluate(f"({tops % 'offsetTop'}).size") == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.fixture(scope="module")
def axe():
    """The text of axe-core, from the npm registry."""
    if not AXE.exists():
        npm = shutil.which("npm") or pytest.skip("npm is not installed")
        CACHE.mkdir(exist_ok=True)
        subprocess.run(
            [
                *(npm, "install", "--silent", "--no-audit", "--no-fund"),
                *("--prefix", str(CACHE), f"axe-core@{AXE_VERSION}"),
            ],
            check=True,
            env={**os.environ, "HOME": str(CACHE)},
            timeout=300,
        )
    return AXE.read_text(encoding="utf-8")


LOOKS = {  # a size, and whether the scheme is dark, for each look at a state
    "desktop-light": (1280, 800, False),
    "phone-dark": (390, 844, True),
}
FINDINGS = """axe.run({resultTypes: ["violations"]}).then(({violations}) =>
  violations.map(({id, nodes}) =>
    [id, nodes.slice(0, 3).map(({html, failureSummary}) => html + failureSummary)]))"""


# More than is shown of an output, in few lines: axe-core looks at each.
LONG_OUTPUT = "seq -s x 100000 | fold -w 4000"


class Inspected:
    """A page that axe-core looks at, in one state after the other."""

    def __init__(self, site, page, axe, key=None):
        self.site = site
        self.page = page
        self.found = {}  # by the name of the state
        if key is not None:
            page.goto(f"{site.url}/#key={key}")
            page.wait_for(READY)
        page.evaluate(axe + ";0")
        self.see("desktop-light")

    def see(self, look):
        width, height, dark = LOOKS[look]
        self.page.set_viewport(width, height)
        self.page.set_media(dark=dark, reduced_motion=True)

    def go(self, path, selector, text):
        """Go to a view as a link does: the document stays, and axe-core in it."""
        self.page.evaluate(
            "document.querySelectorAll('dialog[open]').forEach(one => one.close());"
            f"history.pushState(null, '', {json.dumps(path)});"
            "dispatchEvent(new PopStateEvent('popstate'))"
        )
        self.page.wait_for(shows(selector, text))

    def new_chat(self, node, model="shell"):
        key = self.site.call("sessions.create")["key"]
        self.site.call("sessions.patch", key=key, node_id=node, model=model)
        self.go(f"/chat/{key}", "#node-button", node)
        # Of this chat: the one before may have been on the same machine.
        shown = "document.querySelector('#sessions li.current a')?.pathname"
        name = {"shell": "Shell"}.get(model, model.partition("/")[2])
        self.page.wait_for(
            f"{shown} === '/chat/{key}' && {shows('#node-button', node)} && "
            f"{shows('#model-button', name)}"
        )
        return f"/chat/{key}"

    def open(self, dialog, button):
        self.page.click(button)
        self.page.wait_for(f"document.querySelector('{dialog}').open")

    def look(self, name, *looks):
        for look in looks or LOOKS:
            self.see(look)
            violations = self.page.evaluate(FINDINGS)
            if violations:
                self.found[f"{name}, {look}"] = violations
            if os.environ.get("SCREENSHOTS"):
                take_screenshot(self.page, f"axe-{name.replace('/', '-')}-{look}")
        self.see("desktop-light")


@pytest.fixture(scope="module")
def asked():
    """What the model of the inspected gateway answers next."""
    return []


@pytest.fixture(scope="module")
def inspected_site(tmp_path_factory, asked):
    """A gateway with a model and a machine, for one test after the other."""
    with scripted_model(asked) as server:
        site = Site(tmp_path_factory.mktemp("inspected")).start(OLLAMA_HOST=server.url)
        try:
            made = site.call("device.token.create", displayName="Attic")
            line = f"moltis node add --host {site.url} --token {made['deviceToken']}"
            site.attic = site.run(f"{line} --name Attic --foreground")
            wait_for(lambda: "Attic" in connected(site), what="the node")
            site.call("job.wait", id=start(site, LONG_OUTPUT, "Attic"))
            yield site
        finally:
            site.close()


@pytest.fixture
def inspected(inspected_site, browser, axe):
    with browser.new_page(isolated=True) as page:
        one = Inspected(inspected_site, page, axe, inspected_site.key)
        yield one
        assert one.found == {}
        assert page.errors == []


def test_axe_finds_nothing_before_the_first_machine(own_site, browser, axe):
    with browser.new_page(isolated=True) as page:
        page.goto(own_site.url)
        page.fill("#key", "mk_" + "x" * 43)
        page.press("Enter")
        page.wait_for_text("not a key of this gateway")
        page.click("summary")
        one = Inspected(own_site, page, axe)
        one.look("sign-in")
        page.fill("#key", own_site.key)
        page.press("Enter")
        page.wait_for(shows("#welcome", "Add your first machine"))
        one.look("first run")
        one.go("/activity/", "#activity-empty", "No command yet")
        one.look("no command yet")
        one.go("/nodes", "#node-cards", "Local")
        one.look("no machine yet")
        own_site.stop()
        page.wait_for(shows("#banner", "The gateway cannot be reached"))
        one.look("gateway away")
        assert one.found == {}


def test_axe_finds_nothing_in_menus_and_dialogs(inspected):
    page = inspected.page
    inspected.new_chat("Attic", "ollama/m")
    inspected.look("empty chat")
    for menu in ("model", "node", "approvals"):
        page.click(f"#{menu}-button")
        page.wait_for(f"document.activeElement.id === '{menu}-list'")
        inspected.look(f"menu {menu}", "desktop-light")
        page.press("Escape")
    inspected.see("phone-dark")
    page.click("#fold")
    page.click("#model-button")
    page.wait_for("document.activeElement.id === 'model-list'")
    inspected.look("menu model", "phone-dark")
    page.press("Escape")
    inspected.see("phone-dark")
    page.click("#open-sidebar")
    page.wait_for("document.activeElement.id === 'close-sidebar'")
    inspected.look("sidebar", "phone-dark")
    page.press("Escape")
    page.evaluate("document.activeElement.blur()")
    page.press("?")
    page.wait_for("document.querySelector('#shortcuts').open")
    inspected.look("shortcuts")
    page.press("Escape")
    open_palette(page, "a")
    inspected.look("palette")
    inspected.go("/settings/models", "#model-rows", "m")
    inspected.look("models")
    open_provider(page)
    inspected.look("provider")


def test_axe_finds_nothing_where_a_machine_is_added(inspected):
    page = inspected.page
    inspected.go("/nodes", "#node-cards", "Attic")
    inspected.look("nodes")
    inspected.open("#token", "#new-token")
    inspected.look("add a machine")
    page.fill("#token-name", "Cellar")
    page.press("Enter")
    line = page.wait_for(CHOSEN_LINE).partition(" - ")[2]
    page.click("#token-lines summary")
    inspected.look("its line")
    with inspected.site.run(f"moltis {line} --foreground"):
        page.wait_for(shows("#token-wait", "is connected"))
        inspected.look("it is connected")
        inspected.go("/nodes/Cellar", "#node-facts", "Host name")
        # A history of seconds has no box: it would be empty.
        page.wait_for("document.querySelectorAll('#node-figures .new').length === 3")
        inspected.look("node")
        inspected.open("#confirm", "#node-revoke")
        inspected.look("confirm")
        page.click("#confirm-yes")
        page.wait_for("location.pathname === '/nodes'")


def test_axe_finds_nothing_on_keys_and_in_activity(inspected):
    page = inspected.page
    inspected.go("/settings/access", "#own-key", "owner")
    page.fill("#key-name", "a script")
    page.press("Enter")
    page.wait_for(shows("#key-made", "shown only now"))
    page.click("#key-lines summary")
    inspected.look("key")
    row = row_of(LONG_OUTPUT)
    inspected.go("/activity/", row, "Done")
    page.click(f"{row} [data-part=line]")
    page.wait_for(shows(f"{row} .lines", "x100000"))
    inspected.look("open row")
    inspected.open("#again", f"{row} [data-part=again]")
    inspected.look("run again")
    page.press("Escape")
    page.fill("#find-command", "nothing like this")
    page.wait_for(shows("#activity-empty", "No command matches"))
    inspected.look("no command matches", "phone-dark")


def test_axe_finds_nothing_for_a_key_that_reads(inspected_site, browser, axe):
    site = inspected_site
    key = site.call("keys.create", name="reads", scopes=["operator.read"])["key"]
    with browser.new_page(isolated=True) as page:
        one = Inspected(site, page, axe, key)
        for path, selector, text in [
            ("/chat/main", "#only-reads", "reads only"),
            ("/nodes", "#node-cards", "Attic"),
            ("/nodes/Attic", "#node-facts", "Host name"),
            ("/activity/", "#activity-list", LONG_OUTPUT),
            ("/settings/models", "#model-rows", "m"),
            ("/settings/access", "#own-key", "reads"),
            ("/nodes/Attic/files/tmp", "#files-problem", "scope"),
            ("/terminal/", "#terminal-nodes", ""),
        ]:
            one.go(path, selector, text)
            one.look(path)
        assert one.found == {}
        assert page.errors == []


def test_axe_finds_nothing_in_files(inspected, tmp_path):
    page = inspected.page
    (tmp_path / "some").mkdir()
    (tmp_path / "text").write_text("one\ntwo\n")
    (tmp_path / "binary").write_bytes(bytes(100))
    (tmp_path / "leads to").symlink_to("text")
    (tmp_path / "picture.png").write_bytes(PNG)
    where = f"/nodes/Attic/files{tmp_path}"
    inspected.go(where, "#files-rows", "picture.png")
    page.click("#files-path")
    page.press("End")
    page.type("/")
    page.wait_for("!document.querySelector('#files-matches').hidden")
    inspected.look("completion")
    page.evaluate("document.querySelector('#files-rows').focus()")
    page.press("ArrowDown")
    inspected.look("list")
    inspected.open("#name", "#files-make")
    inspected.look("new directory", "phone-dark")
    page.press("Escape")
    choose_files(page, "#files-chosen", tmp_path / "text")
    page.wait_for("document.querySelector('#confirm').open")
    inspected.look("conflict")
    page.press("Escape")
    inspected.go(f"{where}/text", "#files-open", "two")
    inspected.look("text")
    inspected.go(f"{where}/binary", "#files-open", "neither a text nor an image")
    inspected.go(f"{where}/picture.png", "#files-open", "picture.png")
    page.wait_for("document.querySelector('#files-open img') !== null")
    inspected.look("image")
    inspected.go(f"{where}/none", "#files-problem", "none")
    inspected.look("no such file")
    inspected.go(f"{where}/some", "#files-note", "empty")
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(2_000_000_000)
    choose_files(page, "#files-chosen", large)
    page.wait_for("document.querySelector('#uploads progress')?.value > 0")
    inspected.site.attic.process.send_signal(signal.SIGSTOP)  # it does not end yet
    try:
        inspected.look("upload")
        page.click("#uploads .bare")
    finally:
        inspected.site.attic.process.send_signal(signal.SIGCONT)
    page.wait_for(shows("#uploads", "Cancelled"))
    inspected.look("cancelled upload", "phone-dark")


def test_axe_finds_nothing_in_terminals(inspected):
    page = inspected.page
    inspected.go("/terminal/", "#terminal-nodes", "Attic")
    inspected.look("terminals")
    open_terminal(page, inspected.site, "Attic")
    page.evaluate(AXE.read_text(encoding="utf-8") + ";0")
    enter(
        page, "printf '\\033[3%dmink\\033[9%dmbright\\033[m ' 1 1 2 2 3 3 4 4 5 5 6 6"
    )
    page.wait_for(shows(SCREEN, "bright"))
    inspected.look("terminal")
    enter(page, "exit 3")
    page.wait_for(shows("#terminal-note", "Exit status 3"))
    inspected.look("ended terminal")


def test_axe_finds_nothing_on_other_endings_a_diff_and_a_rename(
    inspected, asked, tmp_path
):
    page, site = inspected.page, inspected.site
    spec = {"command": "sleep 20", "timeout": 200}
    answer = site.call("job.start", jobs=[{"node": "Attic"}], work="run", spec=spec)
    site.call("job.wait", id=answer["jobs"][0]["id"])
    inspected.go("/activity/", row_of("sleep 20"), "imed out")
    inspected.look("timed out")
    inspected.new_chat("Attic")
    type_line(page, "echo $((6 * 7)); exec sleep 120")
    page.wait_for(shows(LAST, "42"))
    page.click(f"{LAST} [data-part=stop]")
    page.wait_for(shows(LAST, "ancelled"))
    inspected.look("cancelled")
    page.evaluate("document.querySelector('#sessions [data-part=rename]').click()")
    page.wait_for(NAMING)
    inspected.look("rename", "desktop-light")
    page.press("Escape")
    change = {"path": str(tmp_path / "app.conf"), "content": "option = 1\n" * 30}
    wanted = {"name": "file_write", "arguments": change}
    asked.append({"tool_calls": [{"function": wanted}]})
    asked.append({"content": "The end."})
    inspected.new_chat("Attic", "ollama/m")
    type_line(page, "Write it")
    page.wait_for("document.querySelector('.approval .main')?.disabled === false")
    inspected.look("diff")
    page.click(".approval .button:not(.main)")
    page.wait_for(shows("#messages", "The end."))


def test_axe_finds_nothing_in_questions_and_notices(inspected, tmp_path):
    page = inspected.page
    inspected.new_chat("Attic", "ollama/m")
    page.click("#effort-button")
    page.wait_for("document.activeElement.id === 'effort-list'")
    inspected.look("menu reasoning", "desktop-light")
    page.press("Escape")
    page.evaluate("document.querySelector('#updated').hidden = false")
    inspected.look("updated")
    page.evaluate("document.querySelector('#updated').hidden = true")
    inspected.see("phone-dark")
    page.click("#fold")
    inspected.look("folded pickers", "phone-dark")
    page.press("Escape")
    open_palette(page, "nothing at all like this")
    page.wait_for(shows("#palette-none", "Nothing matches"))
    inspected.look("empty palette", "phone-dark")
    inspected.go("/nodes", "#node-cards", "Attic")
    page.fill("#find-node", "nothing like this")
    page.wait_for(shows("#nodes-empty", "No machine matches"))
    inspected.look("no machine matches", "desktop-light")
    inspected.go("/nodes/nowhere", "#node-state", "no machine called nowhere")
    inspected.look("unknown machine", "phone-dark")
    (tmp_path / "some.tar.gz").write_text("x")
    inspected.go(f"/nodes/Attic/files{tmp_path}", "#files-rows", "some.tar.gz")
    page.evaluate("document.querySelector('#files-rows [data-part=rename]').click()")
    page.wait_for("document.querySelector('#name').open")
    inspected.look("rename a file", "desktop-light")
    page.press("Escape")
    page.evaluate("document.querySelector('#files-rows [data-part=remove]').click()")
    page.wait_for("document.querySelector('#confirm').open")
    inspected.look("delete a file", "phone-dark")
    (tmp_path / "some.tar.gz").unlink()
    page.click("#confirm-yes")
    page.wait_for(shows("#toast", "No such file"))
    inspected.look("toast")
    inspected.go("/settings/models", "#model-rows", "m")
    page.click("#unlisted summary")
    open_provider(page)
    page.fill("#provider-url", "127.0.0.1:9")
    page.press("Enter")
    page.wait_for("document.querySelector('#provider-error').innerText !== ''")
    inspected.look("provider that does not answer")


def test_axe_finds_nothing_in_tabs_questions_and_recordings_of_terminals(inspected):
    page, site = inspected.page, inspected.site
    open_terminal(page, site, "Attic")
    first = page.evaluate("location.pathname")
    page.evaluate(AXE.read_text(encoding="utf-8") + ";0")
    enter(page, "printf '\\033]8;;https://example.org/\\007link\\033]8;;\\007\\n'")
    page.wait_for(f"document.querySelector('{SCREEN} .to') !== null")
    page.click(f"{SCREEN} .to")
    page.wait_for("document.querySelector('#confirm').open")
    inspected.look("question before an address", "desktop-light")
    page.press("Escape")
    page.evaluate("document.querySelector('.term textarea').focus()")
    paste(page, "echo one\necho two\n")
    page.wait_for(shows("#confirm", "Paste 2 lines?"))
    assert "at once:\necho one\necho two" in page.text("#confirm-text")
    inspected.look("question before a paste", "phone-dark")
    page.press("Escape")
    page.click("#terminal-more")
    page.click("#terminal-new")
    page.wait_for("document.querySelectorAll('#terminal-tabs li').length === 2")
    page.wait_for(KEYS)
    inspected.look("two tabs and a row of keys")
    page.click("#terminal-end")
    page.wait_for("document.querySelector('#confirm').open")
    page.click("#confirm-yes")
    page.wait_for("document.querySelector('#terminal-tabs .over') !== null")
    inspected.go(first, SCREEN, "link")
    page.click(SCREEN)
    enter(page, "exit")
    page.wait_for(shows("#terminal-note", "Done"))
    page.click("#terminal-recording")
    page.wait_for("document.querySelector('#recording-seek').max > 0")
    inspected.look("recording")
    page.click("#recording-play")
    inspected.look("recording that plays", "desktop-light")
    gone = f"/terminal/{moltis.new_id()}/recording"
    inspected.go(gone, "#recording-note", "")
    page.wait_for(REFUSED)
    inspected.look("recording that is not kept", "phone-dark")
    page.errors.clear()  # Chromium reports every 404


def test_axe_finds_nothing_on_an_expired_question_and_a_gap(inspected, asked, tmp_path):
    page, site = inspected.page, inspected.site
    asked.append(wanting("sudo true"))
    asked.append({"content": "The end of it.", "thinking": "It was asked."})
    chat = inspected.new_chat("Attic", "ollama/m")
    type_line(page, "Do it")
    page.wait_for("document.querySelector('.approval .main')?.disabled === false")
    inspected.go("/activity/", "#activity-list .asks", "sudo true")
    inspected.look("asking, in the list")
    inspected.go(chat, "#messages", "sudo true")
    page.click(".approval .button:not(.main)")
    page.wait_for(shows("#messages", "The end of it."))
    # As after ten minutes without an answer.
    words = "nobody answered within 10 min"
    with closing(sqlite3.connect(str(site.home / ".moltis/moltis.db"))) as db, db:
        db.execute("UPDATE jobs SET reason = ? WHERE state = 'denied'", [words])
    page.goto(f"{site.url}{chat}")
    page.wait_for(shows("#messages", words))
    page.evaluate(AXE.read_text(encoding="utf-8") + ";0")
    inspected.look("expired")
    chat = inspected.new_chat("Attic")
    line = f"{LONG_OUTPUT}; touch {tmp_path}/written; exec sleep 120"
    site.call("chat.send", sessionKey=chat.rpartition("/")[2], text=line)
    wait_for((tmp_path / "written").exists, what="more output than is shown")
    page.goto(f"{site.url}{chat}")
    page.wait_for(shows(LAST, "Only the end is shown."))
    page.evaluate(AXE.read_text(encoding="utf-8") + ";0")
    inspected.look("gap")
    page.click(f"{LAST} [data-part=stop]")
    page.wait_for(shows(LAST, "Cancelled"))


def test_axe_finds_nothing_on_cards_in_any_state(inspected, asked):
    page, site = inspected.page, inspected.site
    chat = inspected.new_chat("Attic")
    run(page, "printf '\\033[31mred\\033[0m\\n\\033[94mblue\\033[0m\\n'; seq 5 >&2")
    run(page, "cd /tmp; false", "Exit status 1")
    # Until its machine is away.
    type_line(page, "echo $((6 * 7)); for i in 1 2 3 4; do sleep 120; done")
    page.wait_for(shows(LAST, "42"))
    page.evaluate(f"document.querySelector('{LAST}').focus()")
    inspected.look("running, with its tools")
    type_line(page, "echo behind it")
    page.wait_for(shows("#messages", "Waiting for the command before it"))
    page.fill("#text", "draft")
    inspected.see("phone-dark")
    box = f"document.querySelector('{LAST} .verdict').getBoundingClientRect()"
    assert page.evaluate(f"{box}.height") < 60  # not a letter a line
    inspected.look("waiting for the one before")
    for n in range(15):
        start(site, f"exec sleep 120 # {n}", "Attic")
    inspected.new_chat("Attic")
    type_line(page, "echo in line")
    page.wait_for(shows(LAST, "in line"))
    inspected.look("in line")
    asked.append(wanting("sudo rm -r /srv/x; " + "echo long; " * 30))
    answer = "# No\n\n*Not* `x`:\n\n```sh\nls\n```\n\n|a|b|\n|-|-|\n|1|2|\n\n1. one"
    asked.append({"content": answer})
    inspected.new_chat("Attic", "ollama/m")
    type_line(page, "Clear **up**")
    page.wait_for("document.querySelector('.approval .main')?.disabled === false")
    inspected.look("asking")
    page.click(".approval .button:not(.main)")
    page.wait_for(shows(LAST, "Not x"))
    inspected.look("denied, and an answer")
    site.attic.end(9)
    inspected.go(chat, "#messages", "Waiting for Attic to come back")
    inspected.look("node away")
    inspected.go("/nodes", "#nodes-headline", "offline")
    inspected.look("trouble")
    inspected.go("/nodes/Attic", "#node-state", "ffline")
    inspected.look("node that is offline")
    page.click("#node-revoke")
    page.click("#confirm-yes")
    page.wait_for("location.pathname === '/nodes'")
    inspected.go(chat, "#messages", "Lost")
    page.wait_for(shows("#node-away", "The machine of this chat was removed"))
    page.wait_for(shows("#messages", "The machine of this chat was removed"))
    inspected.look("lost")
    key = chat.rpartition("/")[2]
    site.call("sessions.delete", key=key)
    page.wait_for_text("This chat was deleted")
    inspected.look("deleted")


# -- where and how often -------------------------------------------------------


def value_of(selector):
    return f"document.querySelector({json.dumps(selector)}).value"


WHERE = f"document.querySelector('{LAST} .where').textContent"


def ran(site, command):
    """Return the names of the machines on which a command ran, one for each time."""
    return [j["nodeName"] for j in site.call("job.list") if j["command"] == command]


def machine_of(site, key):
    """Return the id of the machine that a chat has at the gateway, None for Local."""
    (chat,) = [each for each in site.call("sessions.list") if each["key"] == key]
    return chat["node_id"]


def deafen(page):
    """Hold back what comes from the gateway, as a link that is half open does."""
    page.call("Page.addScriptToEvaluateOnNewDocument", source=DEAF)


DEAF = """
globalThis.isDeaf = globalThis.isMute = false;
globalThis.sockets = [];
globalThis.WebSocket = class extends WebSocket {
  constructor(...words) {
    super(...words);
    this.isHalfOpen = false;
    sockets.push(this);
    super.addEventListener("message", event => {
      if (globalThis.isDeaf || this.isHalfOpen) {
        this.isHalfOpen = true;
        event.stopImmediatePropagation();
      }
    });
  }
  send(message) {
    if (!globalThis.isMute) super.send(message);
  }
};
// Note when a text appears in the conversation, in ms from now on.
globalThis.noteTexts = texts => {
  const begin = performance.now();
  globalThis.seenAt = {}; // by text, in their order
  new MutationObserver(() => {
    const shown = document.querySelector("#messages").innerText;
    for (const text of texts)
      if (shown.includes(text)) seenAt[text] ??= performance.now() - begin;
  }).observe(document.querySelector("#messages"),
    {childList: true, subtree: true, characterData: true, attributes: true});
};
"""


def test_a_queued_command_runs_on_the_machine_that_was_seen(site, make_page, tmp_path):
    page = make_page(site)
    open_new_chat(page)
    choose(page, "Demo node")
    type_line(page, wait_in_shell(tmp_path / "go"))
    page.wait_for(shows(LAST, "Running"))
    type_line(page, "echo $((6 * 7)) there")
    page.wait_for(shows("#messages", "Waiting for the command before it"))
    choose(page, "Local")
    key = page.evaluate("location.pathname.split('/').pop()")
    wait_for(lambda: machine_of(site, key) is None, what="the choice at the gateway")
    (tmp_path / "go").touch()
    page.wait_for(f"{shows(LAST, '42 there')} && {shows(LAST, 'Done')}")
    assert "Demo node" in page.evaluate(WHERE)
    assert "sent before the chat changed its machine" in page.text(LAST)


def test_a_machine_stays_chosen_when_a_list_of_before_comes(site, make_page):
    """The next command would run on the other one."""
    page = make_page(site)
    open_new_chat(page)
    key = page.evaluate("location.pathname.split('/').pop()")
    page.evaluate(HOLD % "sessions.patch")
    choose(page, "Demo node")
    site.call("sessions.patch", key=key, label="Named meanwhile")
    page.wait_for(shows("#sessions", "Named meanwhile"))
    assert page.text("#prompt").strip() == "Demo node $"
    page.evaluate("release()")
    wait_for(lambda: machine_of(site, key), what="the choice at the gateway")
    type_line(page, "echo $((6 * 7)) there")
    page.wait_for(f"{shows(LAST, '42 there')} && {shows(LAST, 'Done')}")
    assert "Demo node" in page.evaluate(WHERE)


def test_what_is_half_typed_stays_with_the_machine_that_was_seen(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    choose(page, "Demo node")
    key = page.evaluate("location.pathname.split('/').pop()")
    page.click("#text")
    page.type("echo $((6 * 7)) half")
    site.call("sessions.patch", key=key, node_id=None)
    page.wait_for(shows("#bound", "This chat was changed to Local elsewhere."))
    assert page.text("#prompt").strip() == "Demo node $"
    take_screenshot(page, "bound")
    page.press("Enter")
    page.wait_for(f"{shows(LAST, '42 half')} && {shows(LAST, 'Done')}")
    assert "Demo node" in page.evaluate(WHERE)
    page.wait_for("document.querySelector('#bound').hidden")
    assert page.text("#prompt").strip() == "Local $"


def test_a_chat_that_is_deleted_elsewhere_says_so_and_keeps_the_draft(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    key = page.evaluate("location.pathname.split('/').pop()")
    page.fill("#text", "echo never in Main")
    site.call("sessions.delete", key=key)
    page.wait_for_text("This chat was deleted")
    page.click("#text")
    page.press("Enter")
    assert page.evaluate("location.pathname").endswith(key)
    assert page.evaluate(value_of("#text")) == "echo never in Main"
    take_screenshot(page, "deleted")
    page.click("#go-on")
    page.wait_for(f"!location.pathname.endsWith('{key}')")
    page.wait_for(f"{value_of('#text')} === 'echo never in Main'")
    assert ran(site, "echo never in Main") == []


def test_a_message_whose_answer_is_lost_is_sent_again_and_runs_once(site, make_page):
    page = make_page(site)
    deafen(page)
    page.reload()
    page.wait_for(READY)
    open_new_chat(page)
    page.wait_for("document.activeElement.id === 'text'")
    page.evaluate("globalThis.isDeaf = true")
    waiting = "Waiting for the gateway; it is sent once."
    page.click("#text")
    page.type("echo $((6 * 7)) once")
    page.evaluate(f"noteTexts(['Sending…', {json.dumps(waiting)}])")
    page.press("Enter")
    page.wait_for(shows("#messages", waiting))
    assert page.evaluate(value_of("#text")) == ""
    assert page.evaluate("Object.keys(seenAt)") == ["Sending…", waiting]
    assert page.evaluate(f"seenAt[{json.dumps(waiting)}]") > 4000  # ms
    take_screenshot(page, "waiting")
    page.evaluate("globalThis.isDeaf = false")
    page.wait_for(f"{shows(LAST, '42 once')} && {shows(LAST, 'Done')}")
    assert not page.evaluate(shows("#messages", "Waiting for the gateway"))
    assert len(ran(site, "echo $((6 * 7)) once")) == 1
    assert page.evaluate("JSON.stringify(localStorage).includes('outbox')") is False


def test_a_message_that_never_arrived_is_sent_again(site, make_page):
    page = make_page(site)
    deafen(page)
    page.reload()
    page.wait_for(READY)
    open_new_chat(page)
    page.evaluate("globalThis.isMute = true")
    type_line(page, "echo $((6 * 7)) arrives")
    page.wait_for(shows("#messages", "arrives"))
    page.evaluate("globalThis.isMute = false; sockets.at(-1).close()")
    page.wait_for(f"{shows(LAST, '42 arrives')} && {shows(LAST, 'Done')}")
    assert len(ran(site, "echo $((6 * 7)) arrives")) == 1


def test_a_command_whose_answer_is_lost_is_run_again_once(site, make_page):
    line = "echo $((6 * 7)) again"
    site.call("job.wait", id=start(site, line))
    page = make_page(site)
    deafen(page)
    page.goto(f"{site.url}/activity/")
    page.click(f"{row_of(line)} [data-part=line]")
    page.click(f"{row_of(line)} [data-part=again]")
    page.evaluate("globalThis.isDeaf = true")
    page.click("#again .main")
    wait_for(lambda: len(ran(site, line)) == 2)
    page.evaluate("globalThis.isDeaf = false; sockets.at(-1).close()")
    page.wait_for_text("The connection to the gateway was lost.")
    # Until the link is back; that it is not yet, nothing says at once.
    page.wait_for(
        "(again => (again.open && again.querySelector('.main').click(), !again.open))"
        "(document.querySelector('#again'))"
    )
    assert len(ran(site, line)) == 2


def test_a_message_that_waits_outlives_the_page_and_can_be_taken_back(site, make_page):
    page = make_page(site)
    deafen(page)
    page.reload()
    page.wait_for(READY)
    open_new_chat(page)
    page.wait_for("document.activeElement.id === 'text'")
    page.evaluate("globalThis.isDeaf = true")
    line = "echo $((6 * 7)) kept"
    type_line(page, line)
    page.wait_for(shows("#messages", "Take back"))
    page.click("#messages [data-part=back]")
    page.wait_for(f"{value_of('#text')} === {json.dumps(line)}")
    # Enter again: it may have run, and so it is the same message.
    page.click("#text")
    page.press("Enter")
    page.wait_for(shows("#messages", line))
    page.reload()
    page.wait_for(f"{shows(LAST, '42 kept')} && {shows(LAST, 'Done')}")
    assert len(ran(site, line)) == 1


def test_a_message_that_waited_for_too_long_asks_before_it_is_sent(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    key = page.evaluate("location.pathname.split('/').pop()")
    message = {"id": "01234567-89ab-4cde-8f01-23456789abcd", "text": "echo late"}
    old = f"{{...{json.dumps(message)}, at: Date.now() - 3600000}}"
    page.evaluate(f"localStorage.setItem('outbox {key}', JSON.stringify([{old}]))")
    page.reload()
    page.wait_for(shows("#messages", "Not sent: the gateway was away for too long."))
    assert ran(site, "echo late") == []
    page.click("#messages [data-part=again]")
    page.wait_for(f"{shows(LAST, 'echo late')} && {shows(LAST, 'Done')}")
    assert len(ran(site, "echo late")) == 1


def test_the_prompt_and_the_card_say_in_which_directory(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    assert page.text("#prompt").strip() == "Local $"
    run(page, "cd /usr/lib")
    page.wait_for(shows("#prompt", "Local /usr/lib $"))
    assert run(page, "pwd") == "/usr/lib"
    assert page.evaluate(WHERE) == "Local:/usr/lib"
    assert page.evaluate("document.querySelector('#text').ariaLabel") == (
        "Command for Local · /usr/lib"
    )
    take_screenshot(page, "directory")
    # Typed ahead, it is where the one before ends.
    type_line(page, "sleep 0.5; cd /")
    type_line(page, "pwd; echo ahead")
    page.wait_for(f"{shows(LAST, 'ahead')} && {shows(LAST, 'Done')}")
    page.wait_for(f"document.querySelector('{LAST} .lines').innerText === '/\\nahead'")
    choose(page, "Demo node")
    page.wait_for(shows("#prompt", "Demo node $"))
    type_line(page, "export A=1")
    page.wait_for_text("Only the directory stays")


def test_a_new_chat_is_on_the_machine_that_one_looks_at(site, make_page):
    """Also from a view of settings, and where an unused chat is taken."""
    page = make_page(site)
    open_new_chat(page)
    run(page, "echo used")
    open_new_chat(page)  # unused, on Local
    page.click("#sessions li:nth-child(2) a")
    choose(page, "Demo node")
    before = page.evaluate("location.pathname")
    page.click("#to-access")
    page.wait_for("location.pathname.endsWith('/access')")
    page.click("#new-chat")
    page.wait_for("location.pathname.startsWith('/chat/')")
    page.wait_for(f"location.pathname !== {json.dumps(before)}")
    page.wait_for(f"{shows('#node-button', 'Demo node')} && {shows('#prompt', 'Demo')}")
    page.wait_for("document.querySelector('#messages').childElementCount === 0")
    key = page.evaluate("location.pathname.split('/').pop()")
    demo = nodes(site)["Demo node"]["nodeId"]
    wait_for(lambda: machine_of(site, key) == demo, what="the choice of the machine")


def test_a_machine_is_used_before_the_gateway_knows(site, make_page):
    page = make_page(site)
    deafen(page)
    page.reload()
    page.wait_for(READY)
    page.goto(f"{site.url}/nodes/Demo%20node")
    page.wait_for("!document.querySelector('#node-use').hidden")
    page.evaluate("globalThis.isMute = true")
    page.click("#node-use")
    assert page.evaluate("location.pathname").startswith("/chat/")
    page.wait_for(shows("#prompt", "Demo node $"))


@pytest.fixture
def slow_chat(own_site, browser):
    """A link that may be slow or cut, and a page behind it, at a chat with a draft.

    No other test has left a chat that New chat would lead to.
    """
    with contextlib.closing(FaultyProxy(own_site.port)) as line, browser.new_page(
        isolated=True
    ) as page:
        page.goto(f"http://127.0.0.1:{line.port}/#key={own_site.key}")
        page.wait_for(READY)
        open_new_chat(page)
        run(page, "echo used")
        page.type("stays")
        yield line, page
        page.errors.clear()  # the connection that was cut


def test_what_is_typed_after_new_chat_is_typed_into_it(own_site, slow_chat):
    """However long the gateway takes to create it."""
    text = value_of("#text")
    line, page = slow_chat
    old = page.evaluate("location.href")
    line.silent = True
    page.click("#new-chat")
    page.type("goes along")
    page.press("Enter")
    line.silent = False
    page.wait_for(f"location.href !== '{old}'")
    page.wait_for(f"{text} === 'goes along'")
    assert ran(own_site, "goes along") == []
    page.press("Enter")  # else New chat would lead to it again
    wait_for(lambda: ran(own_site, "goes along"))
    page.goto(old)
    page.wait_for(f"{text} === 'stays'")
    line.silent = True
    page.click("#new-chat")
    page.type("comes back")
    line.cut()
    line.silent = False
    page.wait_for(f"{text} === 'stays\\ncomes back'")
    assert page.evaluate("location.href") == old


def test_new_chat_takes_an_unused_one_before_the_list_of_chats_has_come(
    own_site, make_page
):
    page = make_page(own_site)
    run(page, "echo used")
    unused = own_site.call("sessions.create")["key"]
    hold = HOLD % "sessions.list"
    page.call("Page.addScriptToEvaluateOnNewDocument", source=hold)
    page.reload()
    page.wait_for(READY)
    page.wait_for("held.length > 0")
    page.click("#new-chat")
    page.type("goes along")
    page.evaluate("release()")
    page.wait_for(f"location.pathname === '/chat/{unused}'")
    page.wait_for(f"{value_of('#text')} === 'goes along'")
    assert len(own_site.call("sessions.list")) == 2


def test_drafts_stay_in_their_chats_while_another_one_is_created(slow_chat):
    text = value_of("#text")
    line, page = slow_chat
    old = page.evaluate("location.href")
    chats = "document.querySelectorAll('#sessions li').length"
    before = page.evaluate(chats)
    line.silent = True
    page.click("#new-chat")
    page.wait_for(f"{text} === ''")
    page.click("#sessions li.current a")  # back, before there is another
    page.wait_for(f"{text} === 'stays'")
    page.click("#text")
    page.type("!")
    line.silent = False
    page.wait_for(f"{chats} > {before}")
    assert page.evaluate(text) == "stays!"
    page.click("#sessions li:first-child a")
    run(page, "echo used as well")  # else New chat would lead to it again
    page.click("#to-access")
    page.wait_for("location.pathname.endsWith('/access')")
    line.silent = True
    page.click("#new-chat")
    line.cut()
    line.silent = False
    page.wait_for("!document.querySelector('#toast').hidden")
    page.goto(old)
    page.wait_for(f"{text} === 'stays!'")


def scroll_up(page, box, pixels):
    """Scroll as a person does: a wheel is heard of before its box moves.

    Else what is drawn between that and the next frame would pull it back.
    """
    wheel = f"new WheelEvent('wheel', {{deltaY: -{pixels}, bubbles: true}})"
    page.evaluate(f"{box}.dispatchEvent({wheel}); {box}.scrollTop -= {pixels}")


def test_the_newest_output_is_followed_until_a_person_scrolls_up(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    type_line(page, "for n in $(seq 9000); do echo line $n; sleep 0.05; done")
    page.wait_for(shows(f"{LAST} .lines", "line 40\n"))
    screen = f"document.querySelector('{LAST} .screen')"
    at_end = f"{screen}.scrollHeight - {screen}.scrollTop - {screen}.clientHeight < 3"
    page.wait_for(at_end)
    scroll_up(page, screen, 20)
    top = page.evaluate(f"{screen}.scrollTop")
    count = "document.querySelectorAll('#messages .lines > div').length"
    before = page.evaluate(count)
    page.wait_for(f"{count} > {before + 20}")
    assert page.evaluate(f"{screen}.scrollTop") == top
    page.click(f"{LAST} .latest")
    page.wait_for(at_end)
    before = page.evaluate(count)
    page.wait_for(f"{count} > {before + 5} && {at_end}")
    page.click(f"{LAST} [data-part=stop]")
    page.wait_for(shows(LAST, "Cancelled"))


def test_an_output_in_activity_stays_where_a_person_scrolled_it(site, make_page):
    line = "for n in $(seq 4000); do echo line $n; sleep 0.05; done"
    page = make_page(site, f"/activity/{start(site, line)}")
    row = row_of(line)
    page.wait_for(shows(f"{row} .lines", "line 40\n"))
    screen = f"document.querySelector({json.dumps(row)}).querySelector('.screen')"
    scroll_up(page, screen, 20)
    top = page.evaluate(f"{screen}.scrollTop")
    page.wait_for(shows(f"{row} .lines", "line 60\n"))
    assert page.evaluate(f"{screen}.scrollTop") == top
    page.click(f"{row} .latest")
    page.wait_for(f"{screen}.scrollTop > {top + 20}")
    page.click(f"{row} [data-part=stop]")


def test_the_conversation_stays_where_a_person_scrolled_it(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    for n in range(4):
        run(page, f"seq {n} 40")
    box = "document.querySelector('#transcript')"
    page.wait_for(f"{box}.scrollHeight - {box}.scrollTop - {box}.clientHeight < 3")
    scroll_up(page, box, 30)
    page.wait_for("!document.querySelector('#latest').hidden")
    top = page.evaluate(f"{box}.scrollTop")
    key = page.evaluate("location.pathname.split('/').pop()")
    site.call("chat.send", sessionKey=key, text="seq 30; echo news")
    page.wait_for(f"{shows(LAST, 'news')} && {shows(LAST, 'Done')}")
    assert page.evaluate(f"{box}.scrollTop") == top
    page.click("#latest")
    page.wait_for(f"{box}.scrollHeight - {box}.scrollTop - {box}.clientHeight < 3")


# Its button is shown under the pointer.
COPY = f"document.querySelector('{LAST} [data-part=copy]').click()"


def copied(page, copy):
    """Return what a person could paste after `copy()`."""
    copy()
    page.evaluate("""{
      const area = document.createElement("textarea");
      area.id = "pasted";
      area.style.position = "fixed"; // else what is there gets another size
      document.body.append(area);
      area.focus();
    }""")
    key = {"key": "v", "code": "KeyV", "commands": ["paste"]}
    page.call("Input.dispatchKeyEvent", type="rawKeyDown", **key)
    page.call("Input.dispatchKeyEvent", type="keyUp", key="v", code="KeyV")
    text = page.wait_for(value_of("#pasted"))
    page.evaluate("document.querySelector('#pasted').remove()")
    return text


def test_output_is_copied_as_it_was(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    text = "one\n\n\n\ttwo  \n  three\tend"
    run(page, f"printf '%s' {shlex.quote(text)}")
    lines = f"document.querySelector('{LAST} .lines')"

    def select():
        page.evaluate(f"getSelection().selectAllChildren({lines})")
        page.evaluate("document.execCommand('copy')")

    assert copied(page, select) == text
    assert copied(page, lambda: page.evaluate(COPY)) == text


def test_what_is_copied_after_it_changed_says_so_and_is_copied_without_https(
    site, make_page
):
    page = make_page(site, "/nodes")
    page.click("#new-token")
    page.click("#token-name")
    page.press("Enter")
    before = page.wait_for(CHOSEN_LINE)
    page.click("#token-ways label:nth-child(2)")
    page.wait_for(f"{CHOSEN_LINE} !== {json.dumps(before)}")
    page.evaluate("""{
      navigator.clipboard.writeText = () => Promise.reject(new Error("no https"));
      document.addEventListener("copy", ({target}) => {
        globalThis.written = target.value;
      });
    }""")
    page.click("#token-lines .button")
    page.wait_for(shows("#token-lines .button", "Copied"))
    assert page.evaluate("globalThis.written") == page.evaluate(CHOSEN_LINE)
    page.press("Escape")
    revoke_unused(page)


def test_a_text_of_a_file_is_copied_as_it_was(site, make_page, tmp_path):
    text = "one\r\n\n\ttwo  \n\n\n  three\tend\n"
    (tmp_path / "text").write_text(text, newline="")
    page = make_page(site, f"/nodes/Local/files{tmp_path}/text")
    copy = "document.querySelector('[aria-label=\"Copy text\"]')"
    page.wait_for(copy)
    page.evaluate(
        "navigator.clipboard.writeText = async text => (globalThis.written = text)"
    )
    page.evaluate(f"{copy}.click()")
    assert page.wait_for("globalThis.written") == text


def test_a_long_line_is_copied_whole_and_a_cut_output_says_so(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    run(page, "printf '%09000d' 7")
    assert "[… 4,000 more characters" in page.text(f"{LAST} .lines")
    copy = lambda: page.evaluate(COPY)  # noqa: E731
    assert copied(page, copy) == "7".zfill(9000)
    run(page, "seq 100000")
    assert "KiB are left out." in page.text(f"{LAST} .cut")
    text = copied(page, copy)
    assert text.startswith("[… the output before this is left out …]\n")
    assert text.endswith("\n100000")
    page.wait_for_text("Only the end of the output was copied.")
    saved = "URL.createObjectURL = blob => (blob.text().then(done), 'data:,')"
    click = "document.querySelector('#toast a').click()"
    whole = page.evaluate(f"new Promise(done => {{ {saved}; {click} }})")
    assert len(whole.split()) == 100_000


def test_durations_are_those_of_the_gateway_clock(site, make_page):
    page = make_page(site)
    ahead = """{const real = Date.now; Date.now = () => real() + 3600_000;
      const D = Date; globalThis.Date = class extends D {
        constructor(...words) { words.length ? super(...words) : super(D.now()); } };
      Date.now = D.now; }"""
    page.call("Page.addScriptToEvaluateOnNewDocument", source=ahead)
    page.reload()
    page.wait_for(READY)
    open_new_chat(page)
    type_line(page, "echo $((6 * 7)); exec sleep 120")
    page.wait_for(shows(LAST, "42"))
    time_ = f"document.querySelector('{LAST} [data-part=time]').textContent"
    page.wait_for(f"/^[1-9][\\d.]* (s|min)\\b/.test({time_})")
    page.click(f"{LAST} [data-part=stop]")
    page.wait_for(shows(LAST, "Cancelled"))
    page.click("#to-access")
    # Minutes may have passed, but no hour.
    keys = "document.querySelector('#keys').innerText"
    page.wait_for(f"/used (just now|\\d min ago)/.test({keys})")
    page.goto(f"{site.url}/nodes/Local/files{site.home.parent}")
    date = "document.querySelector('#files-rows [data-part=changed]').textContent"
    assert "," not in page.wait_for(date)  # of today


@pytest.mark.parametrize("hours", [-1, 1, 30])
def test_times_are_told_by_the_clock_of_the_gateway(patching, hours):
    told = patching.evaluate(f"""(() => {{
      clock.ahead = {hours} * 3600_000;
      const words = [0, 5 * 60_000, 3 * 3600_000].map(ms => ago(now() - ms));
      const days = [0, 24 * 3600_000].map(ms => dayName(now() - ms));
      const isDated = formatTime(now()) !== clockFormat.format(now());
      clock.ahead = 0;
      return [words, days, isDated];
    }})()""")
    words = ["just now", "5 min ago", "3 h ago"]
    assert told == [words, ["Today", "Yesterday"], False]


def test_few_rooms_of_the_script_read_the_clock_of_the_browser():
    """All others ask now(), which is the gateway's."""
    parts = re.split(r"^// == (.+?) ==$", moltis.WEB_JS.decode(), flags=re.M)
    rooms = dict(zip(parts[1::2], parts[2::2]))
    reads = {name for name, text in rooms.items() if "Date.now()" in text}
    assert reads == {"words", "socket", "events", "view: frame", "start"}
    assert rooms["words"].count("Date.now()") == 1


def test_a_newer_gateway_asks_for_a_reload_and_keeps_the_draft(own_site, browser):
    with browser.new_page(isolated=True) as page:
        page.goto(f"{own_site.url}/#key={own_site.key}")
        page.wait_for(READY)
        page.fill("#text", "half a thought")
        own_site.stop()
        newer = own_site.home / "newer.py"
        text = Path(moltis.__file__).read_text(encoding="utf-8")
        text = re.sub(r'(?m)^__version__ = ".*"', '__version__ = "99.0"', text)
        newer.write_text(text, encoding="utf-8")
        own_site.start(program=newer)
        page.wait_for_text("moltis was updated.", 40)
        take_screenshot(page, "updated")
        page.click("#reload")
        page.wait_for(READY)
        page.wait_for(f"{value_of('#text')} === 'half a thought'")
        assert page.evaluate("document.querySelector('#updated').hidden")


@pytest.mark.parametrize(
    ("code", "composing"),
    [(229, "false"), (13, "true")],
    ids=["Safari, after the composition", "others, within it"],
)
def test_the_key_that_ends_a_composition_sends_nothing(
    site, make_page, code, composing
):
    page = make_page(site)
    open_new_chat(page)
    page.fill("#text", "echo かな")
    key = f"{{key: 'Enter', bubbles: true, cancelable: true, isComposing: {composing}}}"
    press = f"""(event => {{
      Object.defineProperty(event, 'keyCode', {{value: {code}}});
      document.activeElement.dispatchEvent(event);
    }})(new KeyboardEvent('keydown', {key}))"""
    page.evaluate(press)
    assert page.evaluate(value_of("#text")) == "echo かな"


def test_commands_are_not_corrected_and_fields_say_what_they_hold(site, make_page):
    page = make_page(site, "/settings/models")
    page.wait_for(LISTED)
    fields = page.evaluate(
        "[...document.querySelectorAll('input[type=password]')]"
        ".map(field => [field.name, field.autocomplete])"
    )
    own = [field for field in fields if field[0] == "operator-key"]
    assert own == [["operator-key", "current-password"]]
    assert {kind for name, kind in fields if name != "operator-key"} == {"new-password"}
    text = "document.querySelector('#text')"
    page.goto(f"{site.url}/chat/main")
    page.wait_for(shows("#prompt", "$"))
    corrects = f"[{text}.spellcheck, {text}.getAttribute('autocorrect')]"
    assert page.evaluate(corrects) == [False, "off"]


def test_a_press_is_not_lost_while_lists_are_drawn(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    page.click("#node-button")
    option = "#node-list li:last-child"
    node_id = nodes(site)["Demo node"]["nodeId"]
    for _ in range(9):  # see test_a_press_is_not_lost_on_a_row_that_moves
        page.wait_for(shows(option, "Demo node"))
        page.evaluate(f"globalThis.seen = document.querySelector('{option}')")
        x, y = page.evaluate(
            f"(b => [b.x + b.width / 2, b.y + b.height / 2])"
            f"(document.querySelector('{option}').getBoundingClientRect())"
        )
        mouse = {"x": x, "y": y, "button": "left", "clickCount": 1}
        began = time.monotonic()
        page.call("Input.dispatchMouseEvent", type="mousePressed", **mouse)
        # Both lists are drawn with other words, and the machines in another order.
        site.call("node.rename", nodeId=node_id, displayName="A name")
        page.evaluate("new Promise(done => setTimeout(done, 90))")
        page.call("Input.dispatchMouseEvent", type="mouseReleased", **mouse)
        if time.monotonic() - began < 0.9:
            break
        site.call("node.rename", nodeId=node_id, displayName="Demo node")
        page.press("Escape")
        choose(page, "Local")
        page.click("#node-button")
    page.wait_for(shows("#node-button", "A name"))
    site.call("node.rename", nodeId=node_id, displayName="Demo node")
    page.wait_for(shows("#node-button", "Demo node"))
    page.click("#node-button")
    # The same element, not one that looks like it.
    assert page.evaluate(f"globalThis.seen === document.querySelector('{option}')")


def test_a_press_is_not_lost_on_a_row_that_moves(site, make_page):
    line = "echo $((6 * 7)) pressed"
    site.call("job.wait", id=start(site, line))
    page = make_page(site, "/activity/")
    page.wait_for(shows(row_of(line), line))
    where = f"""(b => [b.x + b.width / 2, b.y + b.height / 2])(document.querySelector(
      {json.dumps(row_of(line) + " [data-part=line]")}).getBoundingClientRect())"""
    is_shut = f"document.querySelector({json.dumps(row_of(line))}).matches('.folded')"
    # The page waits one second for the end of a press: on a busy machine, once more.
    for _ in range(9):
        x, y = page.evaluate(where)
        mouse = {"x": x, "y": y, "button": "left", "clickCount": 1}
        began = time.monotonic()
        page.call("Input.dispatchMouseEvent", type="mousePressed", **mouse)
        site.call("job.wait", id=start(site, "echo comes above it"))
        page.evaluate("new Promise(done => setTimeout(done, 90))")
        page.call("Input.dispatchMouseEvent", type="mouseReleased", **mouse)
        if time.monotonic() - began < 0.9 or not page.evaluate(is_shut):
            break
    page.wait_for(shows(row_of(line), "42 pressed"))
    page.wait_for(shows("#activity-list", "comes above it"))


@pytest.fixture(scope="module")
def patching(browser):
    """A page with the first rooms of the script, as functions."""
    parts = re.split(r"^// == (.+?) ==$", moltis.WEB_JS.decode(), flags=re.M)
    rooms = dict(zip(parts[1::2], parts[2::2]))
    names = (
        "h, patch, fillIfChanged, Keyed, button, listRow, useList, "
        "clock, now, ago, dayName, formatTime, clockFormat"
    )
    script = rooms["dom"] + rooms["words"]
    script += "const useList = id => (usedList = id);"
    with browser.new_page(isolated=True) as page:
        page.evaluate(
            f"(() => {{ {script} Object.assign(globalThis, {{{names}}}) }})()"
        )
        yield page


def test_a_row_that_goes_takes_no_other_s_place_and_leaves_the_focus(patching):
    kept = patching.evaluate("""(() => {
      const list = h("ul");
      document.body.append(list);
      const show = keys => fillIfChanged(list, keys, () => keys.map(key =>
        listRow(key, key, "", button(`Revoke ${key}`))));
      const focused = () => document.activeElement.textContent;
      show(["a", "b", "c"]);
      const own = list.children[1].querySelector("button");
      own.focus();
      const seen = [];
      for (const keys of [["b", "c"], ["x", "b", "c"], ["c"]]) {
        show(keys);
        seen.push(focused());
      }
      return [seen, own.isConnected];
    })()""")
    assert kept == [["Revoke b", "Revoke b", "Revoke c"], False]


def test_a_list_that_a_person_uses_keeps_its_rows_and_their_places(patching):
    seen = patching.evaluate("""(() => {
      const list = h("ul", {id: "used"});
      document.body.append(list);
      const view = () => ({root: h("li"), update(name) {
        this.root.textContent = name;
      }});
      const views = new Keyed(list, name => name[0], view);
      const draw = names => {
        views.show(views.steady(names));
        return [...list.children].map(item => item.textContent).join(" ");
      };
      const seen = [draw(["a", "b", "c"])];
      useList("used");
      seen.push(draw(["x", "c", "b2", "y", "a"]), draw(["x", "c", "a3", "z"]));
      useList("");
      seen.push(draw(["x", "c", "a3", "z"]));
      return seen;
    })()""")
    # What is new waits, or follows all others; what is gone stays; texts change.
    used = ["a b2 c", "a3 b2 c z"]
    assert seen == ["a b c", *used, "x c a3 z"]


# A pointer that does not rest; both timers are due in order, however busy the page is.
MOVES = """globalThis.moves = setInterval(() => {
  const init = {bubbles: true, movementX: 1};
  document.querySelector(%s).dispatchEvent(new PointerEvent("pointermove", init));
}, 100)"""


def test_new_rows_wait_for_a_pointer_that_moves_and_not_for_one_that_rests(
    site, make_page
):
    line = "echo $((6 * 7)) under a pointer"
    site.call("job.wait", id=start(site, line))
    page = make_page(site, "/activity/")
    page.wait_for(shows(row_of(line), line))
    page.evaluate(MOVES % json.dumps(row_of(line)))
    page.evaluate("new Promise(done => setTimeout(done, 150))")
    job = start(site, "exec sleep 120 # comes meanwhile")
    page.wait_for(shows("#running", "comes meanwhile"))
    assert "comes meanwhile" not in page.text("#activity-list")
    # It is there once the pointer rests, and a click on it is that of its row.
    page.evaluate("clearInterval(moves)")
    page.wait_for(shows("#activity-list", "comes meanwhile"))
    # What is gone stays in its place: the next one would be stopped by mistake.
    page.evaluate(MOVES % json.dumps("#running li"))
    page.evaluate("new Promise(done => setTimeout(done, 150))")
    site.call("job.cancel", id=job)
    page.wait_for("!document.title.startsWith('(')")
    page.wait_for("document.querySelector('#running .over') !== null")
    page.evaluate("clearInterval(moves)")
    page.wait_for(f"!{shows('#running', 'comes meanwhile')}")


def test_a_list_under_a_pointer_keeps_its_order_while_it_is_shown(site, make_page):
    """A click or Enter that was meant for one machine does not choose another."""
    with away(site, "Alpha") as node:
        page = make_page(site)
        page.click("#node-button")
        labels = "[...document.querySelectorAll('#node-list .choice')]"
        labels = f"{labels}.map(choice => choice.firstChild.textContent)"
        page.wait_for(f"{labels}.includes('Alpha')")
        before = page.evaluate(labels)
        page.press("ArrowDown")
        name = "document.querySelector('#node-list .active .choice').firstChild"
        assert page.evaluate(f"{name}.textContent") == before[1] == "Alpha"
        node.end()  # offline machines are the last
        page.wait_for(shows("#node-list .active", "Offline"))
        assert page.evaluate(labels) == before
        page.press("ArrowDown")
        assert page.evaluate(f"{name}.textContent") == before[2]
        page.press("Escape")
        page.click("#node-button")
        page.wait_for(f"{labels}.at(-1) === 'Alpha'")
        page.press("Escape")
        # A choice that is open is not filled anew either.
        page.goto(f"{site.url}/activity/")
        page.wait_for(shows("#filter-node", "Alpha"))
        page.evaluate("document.querySelector('#filter-node').focus()")
        rename(site, "Alpha", "Zeta")
        page.evaluate("new Promise(done => setTimeout(done, 500))")
        assert page.evaluate(shows("#filter-node", "Alpha"))
        page.evaluate("document.activeElement.blur()")
        page.wait_for(shows("#filter-node", "Zeta"))


@contextlib.contextmanager
def away(site, name):
    """Yield a node as a program, which a test may end; afterwards it is revoked."""
    made = site.call("device.token.create", displayName=name)
    url = f"ws://127.0.0.1:{site.port}/ws"
    token = made["deviceToken"]
    line = f"moltis node add --host {url} --token {token} --foreground"
    try:
        node = site.run(line)
        wait_for(lambda: nodes(site).get(name, {}).get("connected"), what=name)
        yield node
    finally:
        site.call("device.token.revoke", deviceId=made["deviceId"])


def rename(site, name, new):
    node_id = nodes(site)[name]["nodeId"]
    site.call("node.rename", nodeId=node_id, displayName=new)


def test_a_list_that_changes_keeps_what_is_typed_scrolled_open_and_focused(patching):
    kept = patching.evaluate("""(() => {
      const list = h("ul");
      document.body.append(list);
      const clicks = [];
      const show = names => fillIfChanged(list, names, () => names.map(name =>
        h("li", {"data-key": name}, h("details", h("summary", name),
          h("input", {name}), button(names.join(), () => clicks.push(names.join()))))));
      show(["a", "b", "c"]);
      const [a, b] = list.children;
      b.firstChild.open = true;
      b.querySelector("input").value = "half";
      b.querySelector("input").focus();
      show(["c", "b", "x", "a"]);
      b.querySelector("button").click();
      return [document.activeElement === b.querySelector("input"),
        b.firstChild.open, b.querySelector("input").value, clicks,
        [...list.children].map(item => item.dataset.key), list.lastChild === a];
    })()""")
    order = ["c", "b", "x", "a"]
    assert kept == [True, True, "half", ["c,b,x,a"], order, True]


def test_views_that_change_places_or_go_leave_the_focus_in_their_list(patching):
    kept = patching.evaluate("""(() => {
      const list = h("ul");
      document.body.append(list);
      const view = name => ({root: h("li", h("button", name)), update() {}});
      const views = new Keyed(list, name => name, view);
      const focused = () => document.activeElement.textContent;
      const texts = () => [...list.children].map(item => item.textContent).join("");
      const seen = [];
      views.show(["a", "b", "c"]);
      list.children[2].firstChild.focus();
      let blurs = 0;
      list.addEventListener("focusout", () => (blurs += 1));
      for (const order of ["cab", "bca", "abc", "xcb"]) {
        views.show([...order]);
        seen.push([texts(), focused()]);
      }
      const moved = blurs;
      views.show(["x", "b"]);
      return [seen, moved, focused()];
    })()""")
    orders = ["cab", "bca", "abc", "xcb"]
    assert kept == [[[order, "c"] for order in orders], 0, "b"]


def test_the_loss_of_the_gateway_is_announced_once(own_site, browser):
    with browser.new_page(isolated=True) as page:
        page.goto(f"{own_site.url}/#key={own_site.key}")
        page.wait_for(READY)
        page.evaluate("""{
          globalThis.heard = [];
          const live = "[aria-live], [role=status], [role=alert]";
          for (const region of document.querySelectorAll(live))
            new MutationObserver(() => heard.push(region.innerText)).observe(region,
              {childList: true, characterData: true, subtree: true});
        }""")
        own_site.stop()
        page.wait_for(shows("#banner", "Trying again in"))
        page.evaluate("new Promise(done => setTimeout(done, 3500))")
        own_site.start()
        page.wait_for("document.querySelector('#banner').hidden")
        heard = [text for text in page.evaluate("heard") if text]
        assert heard == ["The gateway cannot be reached."]


def test_states_are_seen_without_colours(site, make_page):
    page = make_page(site)
    page.call(
        "Emulation.setEmulatedMedia",
        features=[{"name": "forced-colors", "value": "active"}],
    )
    open_new_chat(page)
    run(page, "false", "Exit status 1")
    page.click("#node-button")
    dot = "getComputedStyle(document.querySelector('#node-list .dot'))"
    page.wait_for("document.querySelectorAll('#node-list .dot').length")
    assert page.evaluate(f"{dot}.borderTopWidth") == "2px"
    active = "getComputedStyle(document.querySelector('#node-list .active'))"
    assert page.evaluate(f"{active}.outlineStyle") == "solid"
    take_screenshot(page, "forced-colours")


def test_the_composer_has_the_focus_after_an_example_and_one_stop(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    page.click(".starters button")
    page.wait_for(f"{shows(LAST, 'Done')} && document.activeElement.id === 'text'")
    type_line(page, "echo $((6 * 7)); exec sleep 120")
    page.wait_for(shows(LAST, "42"))
    stops = "[...document.querySelectorAll('#stop, .command [data-part=stop]')]"
    page.wait_for(f"{stops}.filter(b => b.getClientRects().length).length === 1")
    page.click(f"{LAST} [data-part=stop]")
    page.wait_for(f"{shows(LAST, 'Cancelled')} && document.activeElement.id === 'text'")


def test_a_command_that_waits_for_input_in_vain_says_so(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    run(page, "cat")
    page.wait_for(shows(LAST, "Nothing can be typed into a command here"))
    run(page, "python3 -c 'input()'", "Exit status 1")
    page.wait_for(shows(LAST, "Nothing can be typed into a command here"))
    run(page, "cat /dev/null")
    assert not page.evaluate(shows(LAST, "Nothing can be typed"))


def test_a_terminal_is_not_said_to_wait_for_input_in_vain(site, make_page):
    jobs, spec = [{"node": "Demo node"}], {"command": "cat"}
    spec["tty"] = {"rows": 24, "cols": 80}
    answer = site.call("job.start", jobs=jobs, work="run", spec=spec, keep=True)
    job = answer["jobs"][0]["id"]
    site.call("job.cancel", id=job)
    page = make_page(site, f"/activity/{job}")
    page.wait_for(shows(row_of("cat"), "Cancelled"))
    assert not page.evaluate(shows(row_of("cat"), "Nothing can be typed"))


def test_sizes_are_in_the_units_of_their_figures(site, make_page):
    page = make_page(site)
    open_new_chat(page)
    run(page, "head -c 3145728 /dev/zero | tr '\\0' '\\n'")
    page.wait_for(shows(f"{LAST} .size", "3 MiB"))


# -- terminals -----------------------------------------------------------------

SCREEN = ".term:not([hidden]) .term-rows"
KEYS = "document.activeElement.getAttribute('data-part') === 'keys'"


def test_a_machine_s_buttons_come_with_what_is_known_of_it(site, make_page):
    page = make_page(site)
    page.evaluate(
        f"fetch('/').then(answer => answer.text()).then(text => {{ {DRAWN} }})"
    )
    page.wait_for("globalThis.early?.length === 4")
    assert page.evaluate("early.every(one => one.hidden)")
    open_terminal(page, site, "Local")
    enter(page, "exit")


DRAWN = """
globalThis.early = [...new DOMParser().parseFromString(text, "text/html")
  .querySelectorAll("#node-rename, #node-term, #node-files, #node-use")];
"""


def open_terminal(page, site, node):
    """Open a terminal from a machine's page, with a short prompt in it."""
    page.goto(f"{site.url}/nodes/{node}")
    page.wait_for(
        "document.querySelector('#node-term:not([hidden])')?.disabled === false"
    )
    page.click("#node-term")
    page.wait_for(KEYS)
    enter(page, "exec env PS1='$ ' sh")
    page.wait_for(f"/^\\$ $/m.test(document.querySelector('{SCREEN}').innerText)")


def enter(page, line):
    page.type(line)
    page.press("Enter")


def listen(page):
    """Keep what the terminal reads out from now on: each text replaces the last one."""
    page.evaluate(
        """{
          const log = document.querySelector(".term [role=log]");
          globalThis.heard = "";
          new MutationObserver(() => heard += `${log.textContent}\\n`)
            .observe(log, {childList: true, characterData: true, subtree: true});
        }"""
    )


def hears(text):
    return f"heard.includes({json.dumps(text)})"


def paste(page, text):
    page.evaluate(
        f"(data => {{data.setData('text/plain', {json.dumps(text)});"
        "document.activeElement.dispatchEvent(new ClipboardEvent('paste',"
        "{clipboardData: data, bubbles: true, cancelable: true}))})(new DataTransfer())"
    )


def test_a_terminal_shows_its_end_and_its_last_screen(site, make_page):
    page = make_page(site)
    open_terminal(page, site, "Local")
    enter(page, "echo $((6*7)); stty size; printf '\\033]0;a title\\a'")
    page.wait_for(shows(SCREEN, "42\n"))
    page.wait_for(shows("#terminal-tabs", "a title · Local"))
    enter(page, "exit 3")
    page.wait_for(shows("#terminal-note", "Exit status 3. The last screen stays here."))
    assert page.evaluate(shows(SCREEN, "42\n"))
    take_screenshot(page, "terminal-ended")
    page.click("#terminal-recording")
    page.wait_for(shows("#recording .term-rows", "42\n"))
    page.evaluate("history.back()")
    page.click("#terminal-act")
    page.wait_for(f"{shows('#terminal-note', '')} && {KEYS}")
    page.wait_for("document.querySelectorAll('#terminal-tabs li').length === 2")


def test_a_link_opens_a_terminal_elsewhere_and_its_size_is_taken_over(site, make_page):
    page = make_page(site)
    open_terminal(page, site, "Local")
    enter(page, "echo here; exec cat")
    page.wait_for(shows(SCREEN, "here\n"))
    other = make_page(site, page.evaluate("location.pathname"), width=700, height=500)
    other.wait_for(shows(SCREEN, "here\n"))
    other.wait_for(shows("#terminal-people", "In it: owner, owner"))
    page.wait_for(shows("#terminal-note", "It has the size of owner:"))
    other.wait_for(KEYS)
    enter(other, "from there")
    page.wait_for(shows(SCREEN, "from there\nfrom there\n"))
    page.click("#terminal-act")
    other.wait_for(shows("#terminal-note", "It has the size of owner:"))
    page.wait_for("document.querySelector('#terminal-note').hidden")
    page.click(SCREEN)
    enter(page, "from here")
    other.wait_for(shows(SCREEN, "from here\nfrom here\n"))
    take_screenshot(other, "terminal-scaled")
    other.click("#terminal-end")
    other.wait_for(shows("#confirm", "Others are in it."))
    other.press("Escape")
    other.click("#terminal-tabs button")
    page.wait_for("document.querySelector('#terminal-people').textContent === ''")
    page.press("Control+d")
    page.wait_for(shows("#terminal-note", "The last screen stays here."))


def test_a_terminal_begins_with_its_size_and_the_focus_wherever_it_is_opened(
    site, make_page
):
    """From the list of machines, and in the place of another terminal."""
    page = make_page(site, "/terminal/")
    page.click("#terminal-nodes button")
    sizes = []
    for _ in range(2):
        page.wait_for(KEYS)
        job_id = page.evaluate("location.pathname").split("/")[-1]
        enter(page, "exit 3")
        page.wait_for(shows("#terminal-note", "Exit status 3"))
        recording = Terminal("node", "recording", job_id, home=site.home)
        assert recording.close() == 0
        first, *events = map(json.loads, recording.text.strip().split("\n"))
        sizes.append((first["width"], first["height"]))
        assert not [event for event in events if event[1] == "r"]
        page.click("#terminal-act")  # another one
        page.wait_for(f"!location.pathname.endsWith('{job_id}')")
    assert sizes[0] == sizes[1]
    page.wait_for(KEYS)
    enter(page, "exit")


def test_a_terminal_that_is_slow_to_start_begins_with_its_size_as_well(site, make_page):
    """A note above it would take room."""
    page = make_page(site, "/terminal/")
    page.wait_for(LISTED)
    page.evaluate(HOLD % "job.start")
    page.click("#terminal-nodes button")
    page.wait_for("held.length > 0")
    page.evaluate("new Promise(done => setTimeout(done, 500))")  # notes come after 300
    assert page.evaluate("document.querySelector('#terminal-note').hidden")
    page.evaluate("release()")
    page.wait_for(KEYS)
    enter(page, "exit 3")
    page.wait_for(shows("#terminal-note", "Exit status 3"))


def test_whoever_goes_elsewhere_is_in_no_terminal_and_comes_back_into_it(
    site, make_page
):
    """A browser may keep the page for its back button."""
    page = make_page(site)
    open_terminal(page, site, "Local")
    enter(page, "stty -echo; read word; echo heard $word")
    page.evaluate("globalThis.isKept = true")
    address = page.evaluate("location.pathname")

    def people():
        [job] = [one for one in site.call("job.list") if address.endswith(one["id"])]
        return [one["name"] for one in job.get("people", ())]

    assert people() == ["owner"]
    page.goto("about:blank")
    wait_for(lambda: people() == [], what="a terminal with nobody in it")
    page.evaluate("history.back()")
    page.wait_for("globalThis.isKept")
    wait_for(lambda: people() == ["owner"], what="the person who is back")
    page.click(SCREEN)
    enter(page, "a word")
    page.wait_for(shows(SCREEN, "heard a word"))
    assert people() == ["owner"]


# The next event of a job that is done arrives over and over again.
REPEAT = """sockets.at(-1).addEventListener("message", ({target, data, isTrusted}) => {
  if (!isTrusted || !/"event":"job".*"state":"done"/.test(data)) return;
  setInterval(() => target.dispatchEvent(new MessageEvent("message", {data})), 50);
  globalThis.repeats = true;
})"""


def test_a_terminal_says_what_is_up_whatever_happens_elsewhere(site, make_page):
    page = make_page(site)
    deafen(page)
    page.reload()
    open_terminal(page, site, "Local")
    page.evaluate(REPEAT)
    start(site, "true", "Local")
    page.wait_for("globalThis.repeats")
    page.evaluate("globalThis.isMute = true")
    enter(page, "exit")
    page.wait_for(shows("#terminal-note", "What you typed has not arrived yet."))


def test_a_key_that_reads_watches_a_terminal_and_types_nothing(
    site, make_page, browser
):
    page = make_page(site)
    open_terminal(page, site, "Local")
    enter(page, "exec cat")
    key = site.call("keys.create", name="watches", scopes=["operator.read"])["key"]
    with browser.new_page(isolated=True, width=700) as other:
        other.goto(f"{site.url}/#key={key}")
        other.wait_for(READY)
        other.goto(site.url + page.evaluate("location.pathname"))
        other.wait_for(shows("#terminal-note", "You can only watch"))
        other.wait_for(shows(SCREEN, "exec cat"))
        assert not other.evaluate(
            "document.querySelector('#terminal-end').offsetParent"
        )
        page.wait_for(shows("#terminal-people", "watches"))
        assert page.evaluate("document.querySelector('#terminal-note').hidden")
        other.click(SCREEN)
        enter(other, "not typed")
        enter(page, "typed")
        other.wait_for(shows(SCREEN, "typed\ntyped"))
        assert not other.evaluate(shows(SCREEN, "not typed"))
        assert other.errors == []
    page.press("Control+d")
    page.wait_for(shows("#terminal-note", "The last screen stays here."))


def test_a_key_that_reads_is_offered_no_new_terminal(site, browser):
    key = site.call("keys.create", name="only looks", scopes=["operator.read"])["key"]
    with browser.new_page(isolated=True) as page:
        page.goto(f"{site.url}/#key={key}")
        page.wait_for(LISTED)
        page.goto(f"{site.url}/terminal/")
        page.wait_for(LISTED)
        page.wait_for(shows("#terminal-home", "A terminal goes on"))
        assert not page.evaluate(shows("#terminal-home", "On a machine"))
        assert not page.evaluate("document.querySelector('#terminal-nodes button')")


def test_a_machine_that_opens_no_terminals_is_offered_none(own_site, make_page):
    join(own_site, "Closed", "--no-terminal")
    node_id = nodes(own_site)["Closed"]["nodeId"]
    own_site.call("sessions.patch", key="main", node_id=node_id)
    page = make_page(own_site, "/nodes/Closed")
    page.wait_for(LISTED)

    def wait_for_none(button):
        said = f"(({{disabled, title}}) => disabled && title)({button})"
        page.wait_for(f"{said} === 'This machine opens no terminals'")

    wait_for_none("document.querySelector('#node-term')")
    page.goto(f"{own_site.url}/nodes")
    rows = "[...document.querySelectorAll('#nodes .node')]"
    row = f"{rows}.find(row => row.innerText.includes('Closed'))"
    wait_for_none(f"{row}.querySelector('[data-part=term]')")
    page.goto(f"{own_site.url}/chat/main")
    wait_for_none("document.querySelector('#chat-term')")
    page.press("Control+k")
    page.wait_for("document.querySelector('#palette').open")
    page.type("open terminal on")
    page.wait_for(shows("#palette-list", "Open a terminal on Local"))
    assert not page.evaluate(shows("#palette-list", "Closed"))
    page.goto(f"{own_site.url}/terminal/")
    page.wait_for(shows("#terminal-nodes", "Local"))
    assert page.text("#terminal-nodes").split() == ["Local", "Open"]


def test_a_terminal_of_a_removed_machine_offers_no_other_one(own_site, make_page):
    join(own_site, "Gone")
    page = make_page(own_site)
    open_terminal(page, own_site, "Gone")
    page.wait_for("!document.querySelector('#terminal-new').hidden")
    device_id = nodes(own_site)["Gone"]["deviceId"]
    own_site.call("device.token.revoke", deviceId=device_id)
    page.wait_for(shows("#terminal-note", "The last screen stays here."))
    page.wait_for("document.querySelector('#terminal-new').hidden")
    page.wait_for("document.querySelector('#terminal-act').hidden")


def test_a_command_is_shown_as_no_terminal(own_site, make_page):
    command = "for n in $(seq 900); do echo not shown; sleep 0.1; done"
    job_id = start(own_site, command, "Local")
    page = make_page(own_site, f"/terminal/{job_id}")
    page.wait_for(shows("#terminal-note", "This is no terminal."))
    listed = shows("#running", "echo not shown")
    page.wait_for(listed)
    own_site.call("job.cancel", id=job_id)
    page.wait_for(f"!{listed}")
    assert "not shown" not in page.text(SCREEN)
    assert page.evaluate("document.querySelector('#terminal-recording').hidden")


def test_a_closed_tab_leaves_a_link_that_can_be_read(site, make_page):
    page = make_page(site)
    open_terminal(page, site, "Local")
    job_id = page.evaluate("location.pathname").split("/")[-1]
    page.click("#terminal-tabs button")
    page.wait_for(shows("#toast", "Open it again"))
    link, text = page.evaluate(
        "['#toast a', '#toast'].map(one => "
        "getComputedStyle(document.querySelector(one)).color)"
    )
    assert link == text
    page.click("#toast a")
    page.wait_for(KEYS)
    assert page.evaluate("document.querySelector('#toast').hidden")
    site.call("job.cancel", id=job_id)


def open_another(page):
    """Open another terminal beside the one that is shown."""
    before = page.evaluate("location.pathname")
    page.click("#terminal-new")
    page.wait_for(f"location.pathname !== {json.dumps(before)} && {KEYS}")
    page.wait_for("!document.querySelector('#terminal-new').hidden")


def test_a_reload_keeps_the_tabs_of_terminals(site, make_page):
    page = make_page(site)
    open_terminal(page, site, "Local")
    enter(page, "echo fi''rst")
    page.wait_for(shows(SCREEN, "first\n"))
    open_another(page)
    links = "[...document.querySelectorAll('#terminal-tabs a')].map(a => a.pathname)"
    current = "document.querySelector('#terminal-tabs [aria-current]')?.pathname"
    first, second = page.evaluate(links)
    assert page.evaluate(current) == second
    page.reload()
    both = f"({links}).join() === {json.dumps(f'{first},{second}')}"
    page.wait_for(f"{both} && {current} === {json.dumps(second)} && {KEYS}")
    page.click("#terminal-tabs a")
    page.wait_for(f"{current} === {json.dumps(first)} && {KEYS}")
    page.wait_for(shows(SCREEN, "first\n"))
    page.click("#terminal-tabs button")
    page.wait_for(f"({links}).join() === {json.dumps(second)}")
    page.reload()
    page.wait_for(f"{current} === {json.dumps(second)} && {KEYS}")
    assert page.evaluate(links) == [second]
    for path in (first, second):
        site.call("job.cancel", id=path.split("/")[-1])
    page.wait_for(shows("#terminal-note", "The last screen stays here."))


def test_tabs_of_terminals_without_titles_are_told_apart(site, make_page):
    page = make_page(site)
    open_terminal(page, site, "Local")
    open_another(page)
    open_another(page)
    names = "[...document.querySelectorAll('#terminal-tabs a')].map(a => a.innerText)"
    page.wait_for(f"({names}).join() === '1: Local,2: Local,3: Local'")
    page.wait_for("document.title.endsWith('3: Local · moltis')")
    page.wait_for(shows("#running", "2: Local"))
    page.reload()
    page.wait_for(f"({names}).join() === '1: Local,2: Local,3: Local'")
    page.click("#terminal-tabs li:nth-child(2) button")
    page.wait_for(f"({names}).join() === '1: Local,3: Local' && {KEYS}")
    enter(page, "printf '\\033]0;a title\\a'; exec cat")
    page.wait_for(f"({names}).join() === 'Local,a title · Local'")


def test_a_tab_of_a_terminal_that_there_is_not_stays_for_one_visit(site, make_page):
    page = make_page(site, f"/terminal/{moltis.new_id()}")
    page.wait_for(shows("#terminal-note", "There is no job"))
    page.goto(f"{site.url}/nodes/Local")
    open_terminal(page, site, "Local")
    assert page.evaluate("document.querySelectorAll('#terminal-tabs li').length") == 1


def test_kept_tabs_of_terminals_are_shown_while_the_gateway_is_away(own_site, browser):
    with browser.new_page(isolated=True) as page:
        page.goto(f"{own_site.url}/#key={own_site.key}")
        page.wait_for(READY)
        open_terminal(page, own_site, "Local")
        path = page.evaluate("location.pathname")
        page.goto(f"{own_site.url}/nodes")
        page.wait_for(shows("#running", "login shell"))
        own_site.stop()
        page.wait_for("!document.querySelector('#banner').hidden")
        page.click("#running a")
        page.wait_for(shows("#banner", "What you type is kept."))
        [tab] = page.evaluate(
            "[...document.querySelectorAll('#terminal-tabs a')].map(a => a.pathname)"
        )
        assert tab == path
        page.evaluate(
            f"history.pushState(null, '', '/terminal/{moltis.new_id()}');"
            "dispatchEvent(new PopStateEvent('popstate'))"
        )
        # It is not shown before the gateway is back: there is nothing to end.
        page.wait_for("document.querySelector('#terminal-bar').hidden")


def test_a_terminal_can_be_ended_once_it_is_known(site, make_page):
    """Whoever ends it sooner is not asked."""
    end = "document.querySelector('#terminal-end').checkVisibility()"
    page = make_page(site)
    open_terminal(page, site, "Local")
    hold = HOLD.replace('"%s"', '"job.')
    page.call("Page.addScriptToEvaluateOnNewDocument", source=hold)
    page.reload()
    page.wait_for(shows("#terminal-note", "Opening"))
    assert not page.evaluate(end)
    page.evaluate("release()")
    page.wait_for(end)


def test_a_terminal_that_comes_into_view_has_the_focus(site, make_page):
    page = make_page(site)
    open_terminal(page, site, "Local")
    first = json.dumps(page.evaluate("location.pathname"))
    open_another(page)
    enter(page, "exit")
    page.click("#terminal-tabs li:first-child a")
    page.wait_for(f"location.pathname === {first} && {KEYS}")
    page.evaluate("document.activeElement.blur()")
    page.click("#terminal-tabs li:first-child a")  # is shown already
    page.wait_for(KEYS)
    page.click("#terminal-tabs li:last-child button")
    page.wait_for(
        f"document.querySelectorAll('#terminal-tabs li').length === 1 && {KEYS}"
    )
    enter(page, "echo $((6*7))")
    page.wait_for(shows(SCREEN, "42\n"))
    page.click("#to-nodes")
    page.wait_for("document.querySelector('#nodes').hidden === false")
    page.evaluate("history.back()")
    page.wait_for(KEYS)
    enter(page, "exit")
    page.wait_for(shows("#terminal-note", "The last screen stays here."))


def test_the_tab_of_the_shown_terminal_is_in_view_and_says_what_runs_there(
    site, make_page
):
    page = make_page(site, width=800)
    open_terminal(page, site, "Local")
    for number in range(4):
        open_another(page)
        enter(page, f"printf '\\033]0;title {number}\\a'")
        page.wait_for(shows("#terminal-tabs", f"title {number} · Local"))
    in_bar = """(({left, right}, bar) => left >= bar.left && right <= bar.right)(
        document.querySelector("#terminal-tabs li:has([aria-current])")
          .getBoundingClientRect(),
        document.querySelector("#terminal-tabs").getBoundingClientRect())"""
    page.wait_for(in_bar)
    page.set_viewport(500, 800)
    page.wait_for(in_bar)
    page.evaluate("document.querySelector('#terminal-tabs a').click()")
    page.wait_for(f"document.querySelector('#terminal-tabs a').ariaCurrent && {in_bar}")
    links = "[...document.querySelectorAll('#terminal-tabs a')].map(a => a.pathname)"
    for path in page.evaluate(links):
        site.call("job.cancel", id=path.split("/")[-1])
    page.wait_for(shows("#terminal-note", "The last screen stays here."))


@pytest.mark.parametrize("width", [390, 700, 800])
def test_names_of_people_leave_room_for_tabs_and_buttons(
    site, make_page, browser, width
):
    page = make_page(site, width=width)
    open_terminal(page, site, "Local")
    name, scopes = f"{'A long name ' * 6}{width}", ["operator.read"]
    key = site.call("keys.create", name=name, scopes=scopes)["key"]
    with browser.new_page(isolated=True) as other:
        other.goto(f"{site.url}/#key={key}")
        other.wait_for(READY)
        other.goto(site.url + page.evaluate("location.pathname"))
        page.wait_for(shows("#terminal-people", name))
        [tab, bar] = page.evaluate(
            "['#terminal-tabs li', '#terminal-bar'].map(one => "
            "document.querySelector(one).getBoundingClientRect().toJSON())"
        )
    assert tab["right"] <= bar["left"]
    assert tab["top"] < bar["bottom"]
    assert bar["top"] < tab["bottom"]
    enter(page, "exit")


def size_of_terminal(page):
    """Return the rows and columns that its program has, as its screen says."""
    enter(page, "clear; stty size; echo so")
    page.wait_for(shows(SCREEN, "\nso\n"))
    return re.findall(r"^(\d+ \d+)$", page.text(SCREEN), re.M)[-1:]


def test_the_size_of_whoever_leaves_is_that_of_whoever_stays(site, make_page):
    """A phone, a hidden tab and a command line come and go beside a window."""
    page = make_page(site)
    open_terminal(page, site, "Local")
    own = size_of_terminal(page)
    job_id = page.evaluate("location.pathname").split("/")[-1]
    link = f"/terminal/{job_id}"
    is_own = "document.querySelector('#terminal-note').hidden"

    phone = make_page(site, link, width=390, height=844)
    page.wait_for(shows("#terminal-note", "It has the size of owner:"))
    phone.click("#terminal-tabs button")
    page.wait_for("document.querySelector('#terminal-people').textContent === ''")
    page.wait_for(is_own)
    wait_for(lambda: size_of_terminal(page) == own, what="our size")

    shell = Terminal("node", "attach", job_id, home=site.home)  # 24 rows, 80 columns
    page.wait_for(shows("#terminal-note", "It has the size of owner: 80 × 24."))
    shell.type("\r~d")
    assert shell.close() == 0
    page.wait_for(is_own)
    wait_for(lambda: size_of_terminal(page) == own, what="our size")

    # A hidden tab takes nothing, and what it owns is taken over by a click.
    phone = make_page(site, link, width=390, height=844)
    page.wait_for(shows("#terminal-note", "It has the size of owner:"))
    phone.evaluate(HIDE)
    page.click("#terminal-act")
    page.wait_for(is_own)
    wait_for(lambda: size_of_terminal(page) == own, what="our size")
    shell = Terminal("node", "attach", job_id, home=site.home)
    page.wait_for(shows("#terminal-note", "It has the size of owner: 80 × 24."))
    phone.wait_for(shows("#terminal-people", "In it: owner, owner, owner"))
    page.evaluate(HIDE)
    shell.type("\r~d")
    assert shell.close() == 0
    page.wait_for(shows("#terminal-people", "In it: owner, owner"))
    page.wait_for(
        "!document.querySelector('#terminal-people').innerText"
        ".includes('owner, owner, owner')"
    )
    [job] = [j for j in site.call("job.list", state="open") if j["id"] == job_id]
    assert [person["sizes"] for person in job["people"]] == [False, False]
    page.evaluate(SHOW_AGAIN)
    wait_for(lambda: size_of_terminal(page) == own, what="our size")
    enter(page, "exit")


HIDE = """
Object.defineProperty(document, "hidden", {value: true, configurable: true});
document.dispatchEvent(new Event("visibilitychange"));
"""
SHOW_AGAIN = """
delete document.hidden;
document.dispatchEvent(new Event("visibilitychange"));
"""


def test_a_tab_has_the_name_that_its_machine_has_now(site, make_page):
    page = make_page(site)
    open_terminal(page, site, "Demo node")
    rename(site, "Demo node", "New name")
    try:
        page.wait_for(shows("#terminal-tabs", "New name"))
        page.wait_for("document.title.includes('New name')")
    finally:
        rename(site, "New name", "Demo node")
    enter(page, "exit")


def test_only_one_of_those_who_look_answers_a_query_and_nobody_an_old_one(
    site, make_page
):
    page = make_page(site)
    open_terminal(page, site, "Local")
    ask = r"printf '\033[c'"
    enter(page, f"stty -echo; {ask}; echo one; read x; {ask}; echo two; exec cat -v")
    page.wait_for(shows(SCREEN, "one\n"))  # the page has answered
    other = make_page(site, page.evaluate("location.pathname"))
    other.wait_for(shows(SCREEN, "one\n"))
    page.click(SCREEN)
    page.press("Enter")
    page.wait_for(shows(SCREEN, "two\n"))
    page.press("Enter")
    page.wait_for(shows(SCREEN, "^[[?1;2c"))
    assert page.text(SCREEN).count("?1;2c") == 1
    page.press("Control+c")


def test_a_paste_of_several_lines_is_asked_about(site, make_page):
    page = make_page(site)
    open_terminal(page, site, "Local")
    enter(page, "exec cat")
    page.wait_for(shows(SCREEN, "exec cat\n"))
    paste(page, "one\x1b[31m\ntwo\n")
    page.wait_for("document.querySelector('#confirm').open")
    assert "Paste 2 lines?" in page.text("#confirm")
    page.click("#confirm-yes")
    page.wait_for(shows(SCREEN, "one[31m\ntwo\none[31m\ntwo\n"))
    page.press("Control+d")
    page.wait_for(shows("#terminal-note", "The last screen stays here."))


def test_a_question_about_a_paste_says_what_it_leaves_out(keyboard):
    page = keyboard.page
    paste(page, "w" * 300 + "\n" + "line\n" * 20)
    page.wait_for("document.querySelector('#confirm').open")
    shown = page.text("#confirm-text").split("\n")
    assert (shown[1], shown[-1]) == ("w" * 200 + "…", "… and 13 more")
    page.press("Escape")
    page.wait_for(KEYS)
    assert keyboard.typed() == ""


class Keyboard:
    """A terminal whose program, in raw mode, writes down each byte that is typed."""

    def __init__(self, page, site, directory):
        self.page = page
        self._file = directory / "typed"
        self._read = self._shown = 0
        open_terminal(page, site, "Local")
        name = directory / "name"
        files = [shlex.quote(str(path)) for path in (name, self._file)]
        enter(page, "tty > {}; stty raw -echo; exec cat > {}".format(*files))
        wait_for(self._file.exists, what="the program")
        self.screen = name.read_text().strip()

    def show(self, text):
        """Have the program print `text`; return once the page has taken it."""
        self._shown += 1  # what is waited for must not be there already
        with open(self.screen, "w", encoding="utf-8") as screen:
            screen.write(f"\x1b[2J\x1b[H{text}\r\nshown {self._shown}")
        self.page.wait_for(shows(SCREEN, f"shown {self._shown}"))

    def typed(self):
        """Return what was typed since the last call."""
        self.page.type("$")  # comes after all that was sent before
        end = self._read

        def arrived():
            return self._file.read_bytes()[end:].endswith(b"$")

        wait_for(arrived, what="typed bytes")
        text = self._file.read_bytes()[end:]
        self._read += len(text)
        return text[:-1].decode()

    def size(self):
        with open(self.screen, "rb") as screen:
            return os.get_terminal_size(screen.fileno())


@pytest.fixture(scope="module")
def shared_keyboard(browser, tmp_path_factory):
    """A terminal that stays open, on a gateway of its own."""
    directory = tmp_path_factory.mktemp("keyboard")
    with contextlib.closing(Site(directory).start()) as site, browser.new_page(
        isolated=True
    ) as page:
        page.goto(f"{site.url}/#key={site.key}")
        page.wait_for(READY)
        yield Keyboard(page, site, directory)
        assert page.errors == []


@pytest.fixture
def keyboard(shared_keyboard):
    shared_keyboard.show("\x1bc")
    shared_keyboard.page.click(SCREEN)
    return shared_keyboard


def test_a_paste_of_a_megabyte_arrives_whole_in_its_brackets(keyboard):
    keyboard.show("\x1b[?2004h")
    text = "0123456789abcde\n" * 62_500
    paste(keyboard.page, text)
    pasted = text.replace("\n", "\r")
    assert keyboard.typed() == f"\x1b[200~{pasted}\x1b[201~"


def test_a_terminal_goes_on_after_a_selection_that_ends_outside_of_it(keyboard):
    page = keyboard.page
    keyboard.show("chosen")
    page.wait_for(shows(SCREEN, "chosen"))
    Mouse(page).drag((0, 4), (-2, 2))  # into the tabs above it
    keyboard.show("something else")
    page.wait_for(shows(SCREEN, "something else"))


def test_a_hidden_tab_sends_no_size(keyboard):
    page = keyboard.page
    before = keyboard.size()
    narrow = """(async hides => {
      const views = document.querySelector("#terminal-views");
      views.style.maxWidth = `${(globalThis.width -= 100)}px`;
      // In the frame in which the page learns its size, which it sends later.
      await new Promise(done => new ResizeObserver((_, own) => {
        own.disconnect();
        Object.defineProperty(document, "hidden", {value: true, configurable: true});
        done();
      }).observe(views));
      await new Promise(done => setTimeout(done, 200)); // twice as late as a size is
    })()"""
    page.evaluate("(globalThis.width = 900)")
    page.evaluate(narrow)  # hidden before it has sent its new size
    page.evaluate(narrow)
    assert (keyboard.typed(), keyboard.size()) == ("", before)
    page.evaluate(
        "delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))"
    )
    wait_for(lambda: keyboard.size().columns < before.columns, what="the size")
    page.evaluate("document.querySelector('#terminal-views').style.maxWidth = ''; 0")
    wait_for(lambda: keyboard.size() == before, what="the size before")


def test_whoever_leaves_the_page_of_a_terminal_is_asked(keyboard):
    page = keyboard.page
    keyboard.typed()
    page.reload()
    assert len(page.dialogs) == 1
    page.wait_for(KEYS)
    page.reload()  # nothing was typed
    assert len(page.dialogs) == 1
    page.wait_for(KEYS)


def test_keys_that_a_browser_keeps_are_in_the_row(keyboard):
    page = keyboard.page
    page.click("#terminal-more")
    page.click("#terminal-keys button[aria-pressed]")
    page.press("w")
    page.press("w")
    assert keyboard.typed() == "\x17w"
    page.click("#terminal-keys button:last-child")
    assert page.evaluate(KEYS)  # the focus stays
    assert keyboard.typed() == "\x17"
    page.click("#terminal-more")


def test_composed_text_is_typed_once(keyboard):
    """As keyboards of phones compose words, and input methods."""
    page = keyboard.page
    unknown = {"key": "Unidentified", "windowsVirtualKeyCode": 229}
    for composed in ("k", "ka", "か"):
        page.call("Input.dispatchKeyEvent", type="rawKeyDown", **unknown)
        compose(page, composed)
        page.call("Input.dispatchKeyEvent", type="keyUp", **unknown)
    page.type("かな")
    assert keyboard.typed() == "かな"
    left = "document.activeElement.value"
    assert page.evaluate(left) == ""


def compose(page, text):
    """Compose a text that is not typed before the composition has ended."""
    at = {"selectionStart": len(text), "selectionEnd": len(text)}
    page.call("Input.imeSetComposition", text=text, **at)


def test_what_is_composed_is_seen_before_it_is_typed(keyboard):
    page = keyboard.page
    look = """(({value, scrollWidth, clientWidth}, {opacity}) =>
        [value, opacity, clientWidth >= scrollWidth])(
        document.activeElement, getComputedStyle(document.activeElement))"""
    compose(page, "にほんご")
    assert page.evaluate(look) == ["にほんご", "1", True]
    wide = page.evaluate("document.activeElement.clientWidth")
    compose(page, "にほ")
    assert page.evaluate("document.activeElement.clientWidth") < wide
    page.type("日本語")
    assert page.evaluate(look)[:2] == ["", "0"]
    assert keyboard.typed() == "日本語"


def test_a_key_of_the_row_comes_after_what_is_still_composed(keyboard):
    page = keyboard.page
    page.click("#terminal-more")
    compose(page, "Doc")
    page.click("#terminal-keys button:nth-child(2)")
    assert keyboard.typed() == "Doc\t"
    compose(page, "ls")
    page.click("#terminal-keys [aria-pressed]")
    compose(page, "r")
    assert keyboard.typed() == "ls\x12"
    page.click("#terminal-more")


def test_dead_keys_and_altgr_type_their_characters(keyboard):
    page = keyboard.page

    def press(key, code, number, text="", modifiers=0):
        event = {"key": key, "code": code, "windowsVirtualKeyCode": number}
        down = {**event, "modifiers": modifiers}
        page.call("Input.dispatchKeyEvent", type="rawKeyDown", **down)
        if text:
            page.call("Input.dispatchKeyEvent", type="char", text=text, **event)
        page.call("Input.dispatchKeyEvent", type="keyUp", **event)

    press("Dead", "Quote", 222)
    press("é", "KeyE", 69, "é")
    # AltGr, which is Ctrl and Alt on some systems.
    press("@", "KeyQ", 81, "@", modifiers=MODIFIERS["Control"] + MODIFIERS["Alt"])
    press("{", "Digit7", 55, modifiers=MODIFIERS["Control"] + MODIFIERS["Alt"])
    press("a", "KeyA", 65, modifiers=MODIFIERS["Alt"])
    assert keyboard.typed() == "é@{\x1ba"


def test_a_program_that_asks_for_the_focus_gets_it(keyboard):
    keyboard.typed()  # whoever types holds the terminal
    keyboard.show("\x1b[?1004h")
    keyboard.page.press("Control+F6")
    keyboard.page.wait_for(f"!({KEYS})")
    keyboard.page.click(SCREEN)
    assert keyboard.typed() == "\x1b[O\x1b[I"


class Mouse:
    """A mouse above the rows that a terminal shows."""

    def __init__(self, page):
        self._page = page
        rows = f"document.querySelector('{SCREEN} > div')"
        self._left, self._width, self._height = page.evaluate(
            f"""(rows => {{
              const row = rows.firstChild;
              const chosen = document.createRange();
              chosen.selectNodeContents(row);
              const {{width}} = chosen.getBoundingClientRect();
              return [rows.getBoundingClientRect().x, width / row.innerText.length,
                row.offsetHeight];
            }})({rows})"""
        )

    def _place(self, row, column):
        """Return where the left edge of a column is, in a row from the first drawn."""
        top = self._page.evaluate(
            f"document.querySelector('{SCREEN} > div').getBoundingClientRect().y"
        )
        y = top + (row + 0.5) * self._height
        return {"x": self._left + (column + 0.2) * self._width, "y": y}

    def drag(self, begin, end, keys="", clicks=1):
        event = {"button": "left", "modifiers": MODIFIERS[keys] if keys else 0}
        for count in range(1, clicks + 1):
            event["clickCount"] = count
            for kind, place in (("Pressed", begin), ("Moved", end), ("Released", end)):
                event["type"] = f"mouse{kind}"
                event["buttons"] = int(kind != "Released")
                event.update(self._place(*place))
                self._page.call("Input.dispatchMouseEvent", **event)


def test_lines_that_a_program_draws_join_from_row_to_row(keyboard):
    """As in other terminals: a row is as high as the font."""
    gap = keyboard.page.evaluate("""(row => {
      const text = document.createElement("i"); // inline: as high as its font
      text.append("\\u2502");
      row.prepend(text);
      const gap =
        row.getBoundingClientRect().height - text.getBoundingClientRect().height;
      text.remove();
      return gap;
    })(document.querySelector(".term:not([hidden]) .term-rows > div > div"))""")
    assert gap < 1


@pytest.mark.parametrize("height", [500, 507])
def test_no_part_of_a_row_is_seen_above_a_screen_that_was_cleared(
    site, make_page, height
):
    page = make_page(site, height=height)
    open_terminal(page, site, "Local")
    enter(page, "seq 300; printf '\\033[H\\033[2J'; echo cleared; exec cat")
    page.wait_for(f"/^cleared/.test({SEEN_ROWS})")
    page.press("Control+d")


SEEN_ROWS = """(box => {
  const {top, bottom} = box.getBoundingClientRect();
  return [...box.querySelectorAll(".term-rows > div > div")].filter(row => {
    const seen = row.getBoundingClientRect();
    return seen.bottom > top + box.clientTop + 1 && seen.top < bottom;
  }).map(row => row.innerText).join("\\n");
})(document.querySelector(".term:not([hidden]) .term-box"))"""


def test_what_a_program_synchronizes_is_drawn_when_it_is_whole(keyboard):
    """Or soon, in case its end never comes."""
    page = keyboard.page

    def put(text):
        with open(keyboard.screen, "w", encoding="utf-8") as screen:
            screen.write(text)

    page.evaluate(STOP_CLOCKS)
    put("\x1b[?2026hin parts\x1b]2;parts arrived\x07")
    page.wait_for(shows("#terminal-tabs", "parts arrived"))
    assert not page.evaluate(shows(SCREEN, "in parts"))
    put(" and whole\x1b[?2026l")
    page.wait_for(shows(SCREEN, "in parts and whole"))
    put("\x1b[?2026h without end\x1b]2;\x07")
    page.wait_for(f"!{shows('#terminal-tabs', 'parts arrived')}")
    assert not page.evaluate(shows(SCREEN, "without end"))
    page.evaluate(START_CLOCKS)
    page.wait_for(shows(SCREEN, "without end"))


def test_shift_keeps_the_mouse_from_a_program(keyboard):
    page = keyboard.page
    keyboard.show("\x1b[?1000h\x1b[?1006habcdefgh")
    page.wait_for(shows(SCREEN, "abcdefgh"))
    mouse = Mouse(page)
    mouse.drag((0, 0), (0, 5), "Shift")
    page.press("x")  # wherever the focus is
    assert keyboard.typed() == "x"
    mouse.drag((0, 0), (0, 5))
    assert keyboard.typed() == "\x1b[<0;1;1M\x1b[<0;6;1m"


@pytest.mark.parametrize("modes", ["", "\x1b[?1003h\x1b[?1006h"])
def test_text_is_selected_and_copied_as_in_any_page(keyboard, modes):
    """Also while a program has the mouse, with Shift."""
    page = keyboard.page
    keys = "Shift" if modes else ""
    columns = keyboard.size().columns
    rows = ["first row", "some/path and more", "z" * columns + "end", "last"]
    keyboard.show("\r\n".join(rows) + modes)
    page.wait_for(shows(SCREEN, "last\n"))
    mouse = Mouse(page)

    def copied_after(begin, end, clicks=1, press="Control+Shift+c"):
        page.evaluate(
            "getSelection().removeAllRanges(), document"
            f".querySelector('{SCREEN} textarea').focus({{preventScroll: true}})"
        )
        mouse.drag(begin, end, keys, clicks)
        return copied(page, lambda: page.press(press))

    assert copied_after((0, 2), (0, 5)) == "rst"
    assert copied_after((0, 6), (1, 4), press="Control+c") == "row\nsome"
    assert copied_after((1, 11), (1, 11), clicks=2).strip() == "and"
    # A line that the edge broke is one.
    wrapped = "more\n" + "z" * columns + "end\nla"
    assert copied_after((1, 14), (4, 2)) == wrapped
    page.click(SCREEN)  # the focus was where it was pasted
    keyboard.typed()


@pytest.mark.parametrize("key", ["Control+c", "Enter"])
def test_ctrl_c_interrupts_after_a_selection_was_copied_or_a_key_was_sent(
    keyboard, key
):
    page = keyboard.page
    keyboard.show("some text")
    Mouse(page).drag((0, 0), (0, 4))
    assert page.evaluate("String(getSelection())") == "some"
    page.press(key)
    page.press("Control+c")
    sent = "\r" if key == "Enter" else ""
    assert keyboard.typed() == f"{sent}\x03"


def test_what_follows_a_reset_is_read_out(keyboard):
    listen(keyboard.page)
    keyboard.show("line\r\n" * 900 + "before the reset")
    rows = f"document.querySelector('{SCREEN}').innerText.split('\\n').length"
    keyboard.page.wait_for(f"{rows} > 900 && {hears('before the reset')}")
    keyboard.show("\x1bcafter the reset")
    keyboard.page.wait_for(hears("after the reset"))


def test_an_address_is_asked_about_as_it_will_be_opened(keyboard):
    page = keyboard.page
    page.evaluate("globalThis.opened = []; window.open = url => opened.push(url); 0")
    link = "\x1b]8;;{}\x07{}\x1b]8;;\x07 "
    spoofed = "https://ex\u0430mple.org/\u202egro.elpmaxe"  # a Cyrillic letter
    shown = "https://xn--exmple-4nf.org/%E2%80%AEgro.elpmaxe"
    keyboard.show(link.format(spoofed, "one") + link.format("javascript:1", "two"))
    for nth, opened in (("first", []), ("last", [shown])):
        page.click(f"{SCREEN} .to")
        page.wait_for("document.querySelector('#confirm').open")
        assert page.text("#confirm-text") == shown
        page.click(f"#confirm button:{nth}-child")
        page.wait_for("!document.querySelector('#confirm').open")
        page.wait_for(f"JSON.stringify(opened) === '{json.dumps(opened)}'")
        page.wait_for(KEYS)  # the terminal has the focus again
    page.click(f"{SCREEN} .to:last-of-type")
    page.wait_for(shows("#toast", "This is no web address: javascript:1"))
    page.evaluate(
        "document.querySelector('#toast').hidden = true; delete window.open; 0"
    )


def test_a_question_about_a_long_address_begins_with_its_host(keyboard):
    page = keyboard.page
    keyboard.show(f"\x1b]8;;https://example.org/{'x' * 3000}\x07here\x1b]8;;\x07")
    page.click(f"{SCREEN} .to")
    page.wait_for("document.querySelector('#confirm').open")
    assert page.evaluate("document.querySelector('#confirm').scrollTop") == 0
    assert page.evaluate("document.activeElement.value") == ""  # to cancel
    page.press("Escape")
    page.wait_for(KEYS)


def test_a_terminal_on_a_phone_has_a_row_of_keys(site, make_page):
    page = make_page(site)
    open_terminal(page, site, "Local")
    page.set_viewport(390, 844, mobile=True)
    page.click("#terminal-more")
    page.wait_for(f"document.querySelector('{SCREEN} > div').clientWidth < 390")
    enter(page, "stty size; cat")
    page.wait_for(f"/^\\d+ \\d+$/m.test(document.querySelector('{SCREEN}').innerText)")
    columns = int(re.search(r"^\d+ (\d+)$", page.text(SCREEN), re.M).group(1))
    assert columns < 60
    page.click("#terminal-keys button[aria-pressed]")
    page.type("c")
    page.wait_for(shows(SCREEN, "^C"))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    take_screenshot(page, "terminal-phone")
    enter(page, "exit")


def touch(page, *points):
    """Move a finger from point to point."""
    for n, (x, y) in enumerate(points):
        kind = "touchMove" if n else "touchStart"
        at = [{"x": x, "y": y}]
        page.call("Input.dispatchTouchEvent", type=kind, touchPoints=at)
    page.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])


def make_phone(page):
    page.call("Emulation.setTouchEmulationEnabled", enabled=True)
    page.set_viewport(390, 600, mobile=True)


def test_a_finger_scrolls_a_program_that_has_the_screen(site, make_page):
    """A phone has no wheel and no Page Down."""
    page = make_page(site)
    open_terminal(page, site, "Local")
    make_phone(page)
    enter(page, "seq 900 | less")
    page.wait_for(f"{shows(SCREEN, '20')} && !{shows(SCREEN, 'seq')}")
    page.wait_for(f"document.querySelector('{SCREEN}').style.touchAction")  # it fits
    first = f"Number(document.querySelector('{SCREEN}').innerText.split('\\n')[0])"
    touch(page, *((200, y) for y in range(450, 150, -15)))
    page.wait_for(f"{first} > 1")
    # Farther than to the first line, as the other way may take longer than we waited.
    touch(page, *((200, y) for y in range(120, 480, 15)))
    page.wait_for(f"{first} === 1")
    page.type("q")
    enter(page, "exit")


@pytest.mark.parametrize("screen", ["", "\\033[?1049h"])
def test_a_finger_moves_a_screen_that_is_larger_than_the_window(
    site, make_page, screen
):
    desk = make_page(site, width=1900, height=1000)
    open_terminal(desk, site, "Local")
    page = make_page(site, desk.evaluate("location.pathname"))
    make_phone(page)
    note = "document.querySelector('#terminal-note').innerText"
    desk.wait_for(f"/size of owner: \\d\\d ×/.test({note})")  # the phone's
    desk.click("#terminal-act")
    box = "document.querySelector('.term:not([hidden]) .term-box')"
    page.wait_for(f"{box}.scrollWidth > {box}.clientWidth")
    desk.click(SCREEN)
    enter(desk, f"seq 90; printf '{screen}re''ady'; exec cat")
    page.wait_for(shows(SCREEN, "ready"))
    left = f"{box}.scrollLeft"
    rest = f"({box}.scrollHeight - {box}.clientHeight - {box}.scrollTop)"

    def moved():  # not by a slow touch, which selects
        page.evaluate(f"{box}.scrollTo(0, {box}.scrollHeight)")
        touch(page, *((x, 300) for x in range(350, 50, -15)))
        touch(page, *((200, y) for y in range(250, 450, 15)))
        page.evaluate("new Promise(done => requestAnimationFrame(done))")
        return page.evaluate(f"{left} > 0 && {rest} > 10")

    wait_for(moved, what="a screen that moves")


@pytest.mark.parametrize("screen", ["", "\\033[?1049h"])
def test_two_fingers_enlarge_a_terminal(site, make_page, screen):
    page = make_page(site)
    open_terminal(page, site, "Local")
    make_phone(page)
    enter(page, f"printf '{screen}re''ady'; exec cat")
    page.wait_for(shows(SCREEN, "ready"))
    for n in range(12):
        points = [{"x": x, "y": 250, "id": x} for x in (180, 210)]
        points[0]["x"] -= 8 * n
        points[1]["x"] += 8 * n
        kind = "touchMove" if n else "touchStart"
        page.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)
    page.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    page.wait_for("visualViewport.scale > 1")


def test_a_long_name_leaves_the_button_of_its_machine_in_view(own_site, make_page):
    join(own_site, "W" * 200)
    page = make_page(own_site, "/terminal/")
    page.set_viewport(390, 844, mobile=True)
    page.call("Emulation.setTouchEmulationEnabled", enabled=True)
    page.wait_for(shows("#terminal-nodes", "WWW"))
    assert page.evaluate("document.querySelector('#terminal-home').scrollWidth") <= 390
    page.click("#terminal-nodes button")
    page.wait_for("document.querySelector('#terminal-keys').clientHeight > 0")
    page.click(SCREEN)
    enter(page, "exit")
    page.click("#terminal-tabs button")
    page.wait_for("document.querySelector('#terminal-keys').hidden")


def join(site, name, options=""):
    """Connect another machine."""
    token = site.call("device.token.create", displayName=name)["deviceToken"]
    line = f"moltis node add --host {site.url} --token {token} --foreground"
    site.run(f"{line} {options}")
    wait_for(lambda: name in connected(site), what=name)


def test_a_name_from_right_to_left_keeps_to_its_place(own_site, make_page):
    name = "\u05e9\u05dc\u05d5\u05dd"  # shin, lamed, vav, final mem
    join(own_site, name)
    node_id = nodes(own_site)[name]["nodeId"]
    own_site.call("sessions.patch", key="main", node_id=node_id)
    page = make_page(own_site)
    type_line(page, "sleep 60")
    page.wait_for(shows("#running .detail", "s"))
    where, detail = f"{LAST} .where", "#running .detail"
    for element in (where, detail):  # the first letter is to the right of the last
        assert left_of(page, element, name[0]) > left_of(page, element, name[-1])
    assert left_of(page, detail, "·") > left_of(page, detail, name[0])
    page.click(f"{LAST} [data-part=stop]")


def left_of(page, selector, character):
    """Return where a character is, in px from the left of the page."""
    return page.evaluate(
        f"""(element => {{
          const range = new Range();
          const walk = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
          while (walk.nextNode()) {{
            const at = walk.currentNode.data.indexOf({json.dumps(character)});
            if (at < 0) continue;
            range.setStart(walk.currentNode, at);
            range.setEnd(walk.currentNode, at + 1);
            return range.getBoundingClientRect().left;
          }}
        }})(document.querySelector({json.dumps(selector)}))"""
    )


def test_the_focus_can_leave_a_terminal_and_new_lines_are_read_out(site, make_page):
    page = make_page(site)
    open_terminal(page, site, "Local")
    listen(page)
    enter(page, "echo to be' 'read out")
    page.wait_for(hears("to be read out"))
    page.press("Tab")
    assert page.evaluate(KEYS)
    page.press("Control+F6")
    page.wait_for("document.activeElement.getAttribute('aria-current') === 'page'")
    ring = page.evaluate("getComputedStyle(document.activeElement).outlineOffset")
    assert ring.startswith("-")  # inside: the bar of tabs would cut it
    page.click(SCREEN)
    enter(page, "exit")


@pytest.mark.parametrize("clear", [r"\033[2J\033[H", r"\033[H\033[J"])
def test_what_is_drawn_on_a_cleared_screen_is_read_out(site, make_page, clear):
    page = make_page(site)
    open_terminal(page, site, "Local")
    listen(page)
    enter(page, "seq 7; echo la''st")
    page.wait_for(hears("last"))
    enter(page, f"printf '{clear}drawn an''ew\\n'")
    page.wait_for(hears("drawn anew"))
    enter(page, "exit")
    page.wait_for(shows("#terminal-note", "The last screen stays here."))


def test_a_terminal_outlives_the_gateway_and_keeps_what_is_typed(
    own_site, attic, browser
):
    with browser.new_page(isolated=True) as page:
        page.goto(f"{own_site.url}/#key={own_site.key}")
        page.wait_for(READY)
        open_terminal(page, own_site, "Attic")
        own_site.stop()
        page.wait_for(shows("#banner", "What you type is kept."))
        page.evaluate(
            "new Promise(done => setTimeout(done, 500))"
        )  # notes come after 300
        assert page.evaluate("document.querySelector('#terminal-note').hidden")
        enter(page, "echo kept $((6*7))")
        own_site.start()
        page.wait_for(shows(SCREEN, "kept 42\n"))
        page.wait_for("document.querySelector('#terminal-note').hidden")
        enter(page, "exit")
        page.wait_for(shows("#terminal-note", "The last screen stays here."))


def test_a_terminal_says_that_what_is_typed_does_not_arrive(site, make_page):
    page = make_page(site)
    deafen(page)
    page.reload()
    page.wait_for(READY)
    open_terminal(page, site, "Local")
    page.evaluate("globalThis.isDeaf = true")
    enter(page, "echo $((6 * 7)) late")
    page.wait_for(shows("#terminal-note", "What you typed has not arrived yet."))
    page.evaluate("globalThis.isDeaf = false")
    page.wait_for(shows(SCREEN, "42 late"))
    page.wait_for("document.querySelector('#terminal-note').hidden")
    enter(page, "exit")


def test_a_terminal_stays_where_a_person_scrolled_it(site, make_page, tmp_path):
    page = make_page(site)
    open_terminal(page, site, "Local")
    counts = (30, 3000, 20_000)  # slowly, in a flood, beyond what is kept
    later = "; ".join(
        f"{wait_in_shell(tmp_path / f'go-{count}')}; seq {count}; "
        f"touch {tmp_path}/done-{count}"
        for count in counts
    )
    (tmp_path / "later").write_text(f"seq 300; echo done; {later}\n")
    enter(page, f". {tmp_path}/later")
    page.wait_for(shows(SCREEN, "done\n"))
    box = "document.querySelector('.term:not([hidden]) .term-box')"
    at_end = f"{box}.scrollHeight - {box}.scrollTop - {box}.clientHeight < 3"
    page.wait_for(at_end)
    scroll_up(page, box, 900)
    page.wait_for(f"!({at_end})")
    seen = f"""(({{left, top}}) => document.elementFromPoint(left + 20, top + 20)
      .textContent)({box}.getBoundingClientRect())"""
    before = page.evaluate(seen)
    assert before.isdigit()
    for count in counts:
        (tmp_path / f"go-{count}").touch()
        wait_for((tmp_path / f"done-{count}").exists)
        page.evaluate("new Promise(done => setTimeout(done, 300))")
        assert page.evaluate(seen) == before
    enter(page, "exit")
    page.wait_for(at_end)

    page = make_page(site)
    open_terminal(page, site, "Local")
    enter(page, "yes")
    page.wait_for(shows(SCREEN, "y\ny\n"))
    page.press("Control+c")
    page.wait_for(shows(SCREEN, "^C"))
    # A slow machine may have written few lines before it was interrupted.
    enter(page, "seq 6000; echo $((6*7)); exit")
    page.wait_for(shows(SCREEN, "42\n"))
    rows = f"document.querySelectorAll('{SCREEN} > div > div').length"
    page.wait_for(f"{rows} > 4000")  # those that scrolled out follow


def test_keys_scroll_a_terminal_unless_its_program_has_the_screen(keyboard):
    page = keyboard.page
    keyboard.show("row\r\n" * 200)
    box = "document.querySelector('.term:not([hidden]) .term-box')"
    at_end = f"{box}.scrollHeight - {box}.scrollTop - {box}.clientHeight < 3"
    page.wait_for(f"{box}.scrollTop > 1000 && {at_end}")
    page.press("Shift+PageUp")
    page.wait_for(f"!({at_end})")
    page.press("Shift+PageDown")
    page.wait_for(at_end)
    assert keyboard.typed() == ""
    keyboard.show("\x1b[?1049h")
    page.press("Shift+PageUp")
    assert keyboard.typed() == "\x1b[5;2~"


def test_of_a_flood_frames_are_drawn_and_not_lines(site, make_page):
    page = make_page(site)
    open_terminal(page, site, "Local")
    page.evaluate(f"""{{
      globalThis.most = 0; // rows made at once
      const count = list => list.reduce((sum, one) => sum + one.addedNodes.length, 0);
      new MutationObserver(list => (most = Math.max(most, count(list))))
        .observe(document.querySelector('{SCREEN} > div'), {{childList: true}});
    }}""")
    enter(page, "yes | head -c 3000000; echo do''ne")  # 1,500,000 lines
    page.wait_for(shows(SCREEN, "done\n"))
    # At most 500 since the frame before, and as many that had scrolled out.
    assert page.evaluate("most") < 1200
    enter(page, "exit")


def test_the_palette_leads_to_the_list_of_terminals(site, make_page):
    page = make_page(site)
    page.press("Control+k")
    page.wait_for("document.querySelector('#palette').open")
    page.type("terminals")
    page.wait_for(shows("#palette-list .active", "Terminals"))
    page.press("Enter")
    page.wait_for(shows("#terminal-home", "On a machine"))


def test_the_palette_goes_to_a_terminal_that_runs_before_it_offers_to_end_it(
    site, make_page
):
    page = make_page(site)
    open_terminal(page, site, "Local")
    path = json.dumps(page.evaluate("location.pathname"))
    open_another(page)
    page.click("#to-palette")
    page.type("login shell 1")
    page.wait_for(shows("#palette-list .active", "login shell · 1: Local"))
    page.press("Enter")
    page.wait_for(f"location.pathname === {path} && {KEYS}")
    page.click("#to-palette")
    page.type("stop login")
    page.wait_for(shows("#palette-list .active", "Stop login shell"))
    page.press("Enter")
    page.wait_for("document.querySelector('#confirm').open")
    assert "End this terminal?" in page.text("#confirm")
    page.press("Enter")  # Cancel
    page.wait_for("!document.querySelector('#confirm').open")
    assert len(site.call("job.list", state="open")) == 2


def test_the_palette_opens_a_terminal(site, make_page):
    page = make_page(site)
    page.wait_for(LISTED)
    page.press("Control+k")
    page.wait_for("document.querySelector('#palette').open")
    page.type("open term demo")
    page.wait_for(shows("#palette-list .active", "Open a terminal on"))
    page.press("Enter")
    page.wait_for(KEYS)
    enter(page, "exit 4")
    page.wait_for(shows("#terminal-note", "Exit status 4"))


def make_recording(site, command, signs=(), rows=24):
    """Return the id of a terminal's job that has ended.

    Each of the `signs`, a text and a file, makes the file once the text has arrived.
    """
    job_id = moltis.new_id()
    job = {"id": job_id, "node": "Local"}
    spec = {"command": command, "tty": {"rows": rows, "cols": 80}}
    site.call("job.start", jobs=[job], work="run", spec=spec, keep=True)

    def has(text):
        pieces = site.call("job.read", id=job_id, offset=0)["pieces"]
        return text in "".join(piece["text"] for piece in pieces)

    for text, path in signs:
        wait_for(lambda text=text: has(text), what=text)
        path.touch()
    wait_for(
        lambda: site.call("job.wait", id=job_id, wait=30)["state"] == "done",
        timeout=120,
        what="the end of what is recorded",
    )
    return job_id


PLAYED = "#recording .term-rows > div"
POSITION = "Number(document.querySelector('#recording-seek').value)"


def test_a_recording_is_replayed_in_the_page(site, make_page, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    command = (
        f"echo one; {wait_in_shell(first)}; sleep 0.3; echo two; "
        f"{wait_in_shell(second)}; sleep 0.3; printf '\\033[31mthree\\n'"
    )
    job_id = make_recording(site, command, [("one", first), ("two", second)])
    page = make_page(site, f"/activity/{job_id}")
    page.click(".command:not([data-kind=shut]) [data-part=recording]")
    page.wait_for(shows("#recording-title", "echo one"))
    page.wait_for(shows(PLAYED, "one\ntwo\nthree"))  # it plays at once, to its end
    page.wait_for(f"{POSITION} > 0.5")
    times = "document.querySelector('#recording-time').innerText.split(' / ')"
    page.wait_for(f"(([at, duration]) => at === duration)({times})")
    play = "document.querySelector('#recording-play').ariaLabel"
    page.wait_for(f"{play} === 'Play'")
    take_screenshot(page, "recording")
    page.press("Home")
    page.wait_for(f"{POSITION} === 0")
    seen = page.text(PLAYED)
    assert "two" not in seen
    page.evaluate(
        "(s => {s.value = s.max - 0.05; s.dispatchEvent(new Event('input'))})"
        "(document.querySelector('#recording-seek'))"
    )
    page.wait_for(shows(PLAYED, "two"))
    assert "three" not in page.text(PLAYED)
    page.press("<")
    assert page.evaluate("document.querySelector('#recording-speed').value") == "0.5"
    page.evaluate(
        "globalThis.frame = requestAnimationFrame; globalThis.held = [];"
        "requestAnimationFrame = draw => held.push(draw)"  # else it may end meanwhile
    )
    page.press(" ")
    assert page.evaluate(play) == "Pause"
    page.press("k")
    assert page.evaluate(play) == "Play"
    page.evaluate("requestAnimationFrame = frame; held.forEach(draw => frame(draw))")
    page.press("End")
    page.wait_for(shows(PLAYED, "three"))
    # At the end, it starts from its beginning.
    page.evaluate("""{
      globalThis.labels = [];
      const button = document.querySelector("#recording-play");
      new MutationObserver(() => labels.push(button.ariaLabel))
        .observe(button, {attributeFilter: ["aria-label"]});
    }""")
    page.click("#recording-play")
    page.wait_for("labels.join() === 'Pause,Play'")


def test_keys_of_a_player_work_on_keyboards_of_other_scripts(site, make_page):
    job_id = make_recording(site, "echo one; sleep 1; echo two")
    page = make_page(site, f"/terminal/{job_id}/recording")
    page.wait_for(shows(PLAYED, "two"))
    page.press("Shift+Б")
    page.wait_for("document.querySelector('#recording-speed').value === '0.5'")
    play = "document.querySelector('#recording-play').ariaLabel"
    page.wait_for(f"{play} === 'Play'")
    page.evaluate("requestAnimationFrame = () => 0")  # else it may end meanwhile
    page.press("л")
    assert page.evaluate(play) == "Pause"


def test_to_seek_in_a_long_recording_shows_what_to_play_it_does(site, make_page):
    """It is long enough for states that are kept on the way."""
    flood = "seq -f 'row %.0f' 150000"
    command = f"{flood}; printf 'middle\\033[31m'; sleep 0.4; {flood}"
    job_id = make_recording(site, f"{command}; echo last")
    page = make_page(site, f"/terminal/{job_id}/recording")
    page.wait_for(shows(PLAYED, "last"))

    def seek(time):
        page.evaluate(
            f"(s => {{s.step = 'any'; s.value = {time};"
            "s.dispatchEvent(new Event('input'))})"
            "(document.querySelector('#recording-seek'))"
        )
        page.evaluate("new Promise(done => requestAnimationFrame(() => done(0)))")

    tenths = 10 * page.evaluate("Number(document.querySelector('#recording-seek').max)")
    for _ in range(2):
        for tenth in range(int(tenths)):
            seek(tenth / 10)
            if "middle" in page.text(PLAYED):
                break
        page.wait_for(shows(PLAYED, "row 150000\nmiddle"))
        assert "last" not in page.text(PLAYED)
        seek(9999)
        page.wait_for(shows(PLAYED, "row 150000\nlast"))
        red = f"document.querySelector('{PLAYED} > div:nth-last-child(2)').innerHTML"
        assert "color" in page.evaluate(red)


def test_a_seek_shows_its_screen_to_a_person_who_scrolled_up(site, make_page):
    """Home also scrolls up: it would keep what follows out of view."""
    job_id = make_recording(site, "seq 50; sleep 0.2; seq 2000; echo last")
    page = make_page(site, f"/terminal/{job_id}/recording")
    page.wait_for(shows(PLAYED, "last"))
    page.press("Home")
    page.wait_for(f"{POSITION} === 0")
    page.press("End")
    page.wait_for(shows(PLAYED, "last"))


def test_a_screen_that_is_higher_than_the_window_is_shown_whole(site, make_page):
    full = "printf '\\033[?1049h\\033[Hfirst\\033[60Hlast'; printf '\\033[H'"
    job_id = make_recording(site, full, rows=60)
    page = make_page(site, f"/terminal/{job_id}")
    page.wait_for(f"{in_view(SCREEN, 'first')} && {in_view(SCREEN, 'last')}")
    page.goto(f"{site.url}/terminal/{job_id}/recording")
    recorded = "#recording .term-rows"
    page.wait_for(f"{in_view(recorded, 'first')} && {in_view(recorded, 'last')}")


def in_view(rows, text):
    """Return JavaScript that tells whether a row of a terminal is seen whole."""
    return f"""(box => {{
      const row = [...box.querySelectorAll("div > div")]
        .find(one => one.innerText.includes({json.dumps(text)}));
      const [inner, outer] = [row, box].map(one => one?.getBoundingClientRect());
      return row && inner.top >= outer.top && inner.bottom <= outer.bottom;
    }})(document.querySelector({json.dumps(rows)}).parentElement)"""


def test_a_replay_takes_sizes_and_answers_nobody(site, make_page):
    command = (
        "sleep 2; printf '\\033[c\\033[6n'; stty rows 10 cols 33; kill -WINCH $PPID;"
        " echo end"
    )
    job_id = make_recording(site, command)
    page = make_page(site, f"/terminal/{job_id}/recording")
    page.wait_for(shows(PLAYED, "end"))
    page.set_viewport(390, 844, mobile=True)
    page.wait_for(f"document.querySelector('{PLAYED} > div').clientWidth < 390")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    take_screenshot(page, "recording-phone")


REFUSED = (
    "!document.querySelector('#recording-note').hidden && "
    f"!{shows('#recording-note', 'Loading')}"
)


def test_a_recording_is_fetched_again_once_the_gateway_is_back(site, make_page):
    job_id = make_recording(site, "echo recorded")
    page = make_page(site)
    deafen(page)
    page.goto(f"{site.url}/activity/{job_id}")
    page.wait_for(shows(row_of("echo recorded"), "Done"))
    page.evaluate(
        "globalThis.fetched = fetch; globalThis.fetch = () => Promise.reject(Error())"
    )
    page.click(".command:not([data-kind=shut]) [data-part=recording]")
    page.wait_for(shows("#recording-note", "The gateway cannot be reached."))
    page.evaluate("globalThis.fetch = fetched; sockets.at(-1).close()")
    page.wait_for(shows(PLAYED, "recorded"))


def test_a_job_without_a_recording_says_so(site, make_page):
    page = make_page(site, f"/terminal/{moltis.new_id()}/recording")
    page.wait_for(REFUSED)
    page.errors.clear()  # the answer was 404


@pytest.fixture
def cable(own_site):
    """The connection of a node, named Far, to the gateway."""
    made = own_site.call("device.token.create", displayName="Far")
    with contextlib.closing(FaultyProxy(own_site.port)) as proxy:
        url = f"http://127.0.0.1:{proxy.port}"
        line = f"moltis node add --host {url} --token {made['deviceToken']}"
        node = own_site.run(f"{line} --name Far --foreground")
        wait_for(lambda: "Far" in connected(own_site), what="the node")
        yield proxy
        node.end()


def test_a_terminal_says_since_when_its_machine_is_away(own_site, cable, make_page):
    page = make_page(own_site)
    open_terminal(page, own_site, "Far")
    cable.target = free_port()
    cable.cut()
    page.wait_for(shows("#terminal-note", "Waiting for Far to come back (away since "))


def test_what_runs_on_a_machine_that_is_renamed_has_its_new_name(
    own_site, cable, make_page
):
    page = make_page(own_site)
    open_terminal(page, own_site, "Far")
    page.wait_for(shows("#running", "Far"))
    node_id = nodes(own_site)["Far"]["nodeId"]
    own_site.call("node.rename", nodeId=node_id, displayName="Near")
    page.wait_for(shows("#running", "Near"))
    cable.target = free_port()
    cable.cut()
    page.wait_for(shows("#running", "Near · waiting for Near to come back"))
    own_site.call("node.rename", nodeId=node_id, displayName="Nearer")
    page.wait_for(shows("#running", "Nearer · waiting for Nearer to come back"))
    page.wait_for(shows("#terminal-note", "Waiting for Nearer to come back"))


@pytest.mark.parametrize("size", SIZES)
def test_a_terminal_goes_from_a_cut_line_to_a_shell_and_into_its_recording(
    own_site, cable, browser, tmp_path, size
):
    if not shutil.which("vim"):
        pytest.skip("vim is not installed")
    is_phone = size == "phone"
    with browser.new_page(isolated=True) as page:
        page.set_viewport(*SIZES[size], mobile=is_phone)
        page.goto(f"{own_site.url}/#key={own_site.key}")
        page.wait_for(READY)
        open_terminal(page, own_site, "Far")
        job_id = page.evaluate("location.pathname").split("/")[-1]
        if is_phone:
            page.click("#terminal-more")
        enter(page, f"cd {tmp_path}; vim -u NONE -N text")
        page.wait_for(shows(SCREEN, "\n~"))
        page.type("i")
        page.type("before")
        page.wait_for(shows(SCREEN, "before"))
        cable.target, gateway = free_port(), cable.target
        cable.cut()
        page.wait_for(shows("#terminal-note", "Waiting for Far to come back"))
        page.wait_for(in_view(SCREEN, "before"))  # the note takes its place
        page.type(" and after")
        cable.target = gateway
        page.wait_for(shows(SCREEN, "before and after"), 60)  # its node backs off
        page.wait_for("document.querySelector('#terminal-note').hidden")
        if is_phone:
            page.click("#terminal-keys button")  # Esc
        else:
            page.press("Escape")
        enter(page, ":wq")
        page.wait_for(shows(SCREEN, "vim -u NONE"))  # it has ended
        assert (tmp_path / "text").read_text() == "before and after\n"
    shell = Terminal("node", "attach", job_id, home=own_site.home)
    shell.wait_for("$ ")
    shell.type("exit 3\r")
    assert shell.close() == 3
    with browser.new_page(isolated=True) as page:
        page.set_viewport(*SIZES[size], mobile=is_phone)
        page.goto(f"{own_site.url}/#key={own_site.key}")
        page.wait_for(READY)
        page.goto(f"{own_site.url}/terminal/{job_id}")
        page.wait_for(shows("#terminal-note", "Exit status 3"))
        page.click("#terminal-recording")
        page.wait_for("document.querySelector('#recording-seek').max > 1")
        page.press("End")
        page.wait_for(shows(PLAYED, "exit 3"))
        assert page.errors == []
