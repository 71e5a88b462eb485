"""A headless Chromium for tests, driven over its DevTools WebSocket.

    with Browser() as browser:
        page = browser.new_page()
        page.goto("http://127.0.0.1:9090/")
        page.fill("#key", "mk_…")
        page.click("button[type=submit]")
        page.wait_for_text("Nodes")
        page.screenshot("nodes.png")
        assert page.errors == []

A Browser takes about a second to start: share one among the tests of a file, and
give each test a page of its own (`isolated=True`: with cookies of its own, too).
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
from support import wait_for

import moltis

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking", "--disable-sync"),
    *("--disable-component-update", "--disable-dev-shm-usage"),
    "--remote-debugging-port=0",
)
CALL_TIMEOUT = 60.0  # s
TIMEOUT = 60.0  # s; see wait_for()

# Name of a key: its `code`, its virtual key code, and the text that it enters.
KEYS = {
    "Enter": ("Enter", 13, "\r"),
    "Tab": ("Tab", 9, ""),
    "Escape": ("Escape", 27, ""),
    "Backspace": ("Backspace", 8, ""),
    "Delete": ("Delete", 46, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
    "Home": ("Home", 36, ""),
    "End": ("End", 35, ""),
    "PageUp": ("PageUp", 33, ""),
    "PageDown": ("PageDown", 34, ""),
    "F6": ("F6", 117, ""),
    " ": ("Space", 32, " "),
    "ф": ("KeyA", 65, "ф"),  # Cyrillic
    "в": ("KeyD", 68, "в"),
    "л": ("KeyK", 75, "л"),
    "Б": ("Comma", 188, "Б"),  # with Shift
    "؟": ("Slash", 191, "؟"),  # Arabic, with Shift
}
MODIFIERS = {"Alt": 1, "Control": 2, "Meta": 4, "Shift": 8}

# Where to click an element: None while it is missing, invisible, moving or covered.
# What is to be drawn in the next frame is waited for: it may move the element.
CLICK_POINT = """(async () => {
  const element = document.querySelector(%s);
  if (!element) return null;
  element.scrollIntoView({block: "center", inline: "center", behavior: "instant"});
  const before = element.getBoundingClientRect();
  const frame = () => new Promise((done) => requestAnimationFrame(done));
  await new Promise((done) => setTimeout(done, 20));
  await frame();
  await frame();
  const box = element.getBoundingClientRect();
  if (!box.width || !box.height) return null;
  if (box.x !== before.x || box.y !== before.y) return null;
  const point = [box.x + box.width / 2, box.y + box.height / 2];
  const top = document.elementFromPoint(...point);
  const meets = (other) => element.contains(other) || other.contains(element);
  if (!top || !meets(top)) return null;
  document.removeEventListener("click", globalThis.testNote, true);
  globalThis.testClicked = false;
  globalThis.testNote = ({target}) => { globalThis.testClicked ||= meets(target); };
  document.addEventListener("click", globalThis.testNote, true);
  return point;
})()"""
CLICKED = "globalThis.testClicked"  # undefined on a page to which the click led


class BrowserError(AssertionError):
    """Chromium, or a script in its page, says that something cannot be done."""


def find_chromium():
    """Return the path of Chromium; skip the test where there is none."""
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    return found or pytest.skip("Chromium is not installed")


class Browser:
    """One Chromium, with a profile of its own that goes with it."""

    def __init__(self, *flags):
        program = find_chromium()
        self._profile = Path(tempfile.mkdtemp(prefix="moltis-chromium-"))
        self._ids = itertools.count(1)
        self._lock = threading.Lock()  # guards _calls
        self._calls = {}  # id: Future of the result
        self._pages = {}  # by DevTools session
        with open(self._profile / "log", "wb") as log:
            self.process = subprocess.Popen(
                [program, *FLAGS, f"--user-data-dir={self._profile}", *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "HOME": str(self._profile)},
                start_new_session=True,  # a group: it starts many processes
            )
        try:
            self._ws = moltis.connect(self._address())
        except BaseException:
            self._end()
            raise
        self._reader = threading.Thread(target=self._read, name="test-browser")
        self._reader.start()

    def _address(self):
        file = self._profile / "DevToolsActivePort"

        def lines():
            if self.process.poll() is not None:
                log = (self._profile / "log").read_text(errors="replace")
                raise BrowserError(f"Chromium ended at once: {log}")
            return file.exists() and len(file.read_text().split("\n")) > 1

        wait_for(lines, CALL_TIMEOUT, "Chromium's DevTools port")
        port, path = file.read_text().split("\n")[:2]
        return f"ws://127.0.0.1:{port}{path}"

    def new_page(self, *, isolated=False, width=1280, height=800):
        """Return a new tab, `isolated` from the others' cookies and storage."""
        target = {"url": "about:blank"}
        if isolated:
            target.update(self.call("Target.createBrowserContext"))
        target_id = self.call("Target.createTarget", **target)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target_id, flatten=True)
        page = Page(self, target_id, session["sessionId"])
        self._pages[session["sessionId"]] = page
        page.prepare(width, height)
        return page

    def call(self, method, session=None, **params):
        """Return the result of a DevTools method.  Raises BrowserError."""
        future = Future()
        number = next(self._ids)
        with self._lock:
            self._calls[number] = future
        try:
            self.send(number, method, session, params)
            return future.result(CALL_TIMEOUT)
        except moltis.ConnectionClosed:
            raise BrowserError(f"{method}: Chromium is gone") from None
        finally:
            with self._lock:
                self._calls.pop(number, None)

    def send(self, number, method, session, params):
        """Send a DevTools message; only `call` waits for the answer."""
        message = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        self._ws.send(json.dumps(message))

    def forget(self, page):
        self._pages.pop(page.session, None)

    def _read(self):
        with contextlib.suppress(moltis.ConnectionClosed):
            while True:
                text = self._ws.receive()
                if text is None:
                    break
                self._take(json.loads(text))
        with self._lock:
            calls = list(self._calls.values())
        for future in calls:
            future.set_exception(BrowserError("Chromium is gone"))

    def _take(self, message):
        if "id" not in message:
            page = self._pages.get(message.get("sessionId"))
            if page is not None:
                page.take(message["method"], message["params"])
            return
        with self._lock:
            future = self._calls.get(message["id"])
        if future is None:
            return
        if "error" in message:
            future.set_exception(BrowserError(message["error"]["message"]))
        else:
            future.set_result(message["result"])

    def close(self):
        """End Chromium, with all that it started and wrote."""
        with contextlib.suppress(BrowserError, moltis.ConnectionClosed):
            self.send(next(self._ids), "Browser.close", None, {})
        self._end()
        self._ws.abort()
        self._reader.join()

    def _end(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        # Also those of its processes that would live a moment longer than itself.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        wait_for(self._remove_profile, what=f"the end of {self._profile}")

    def _remove_profile(self):
        shutil.rmtree(self._profile, ignore_errors=True)
        return not self._profile.exists()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Page:
    """One tab: what a person does in it, and what they would see."""

    def __init__(self, browser, target_id, session):
        self._browser = browser
        self._target_id = target_id
        self.session = session
        self.errors = []  # console errors, uncaught exceptions, refused resources
        self.urls = []  # all that was requested, WebSockets too
        self.dialogs = []  # texts of alert(), confirm(), …: each was accepted
        self._loaded = []  # ids of the documents that are complete

    def prepare(self, width, height):
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)
        # Each page believes that it is the one in front, with the focus.
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        self.set_viewport(width, height)

    def call(self, method, **params):
        return self._browser.call(method, self.session, **params)

    def take(self, event, params):
        """Note an event of DevTools; called by the thread that reads."""
        if event == "Page.lifecycleEvent" and params["name"] == "load":
            self._loaded.append(params["loaderId"])
        elif event == "Network.requestWillBeSent":
            self.urls.append(params["request"]["url"])
        elif event == "Network.webSocketCreated":
            self.urls.append(params["url"])
        elif event == "Runtime.consoleAPICalled" and params["type"] == "error":
            said = (a.get("value", a.get("description")) for a in params["args"])
            self.errors.append(" ".join(map(str, said)))
        elif event == "Runtime.exceptionThrown":
            self.errors.append(_exception_text(params["exceptionDetails"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] == "error":
            entry = params["entry"]
            self.errors.append(f"{entry['text']} {entry.get('url', '')}".strip())
        elif event == "Page.javascriptDialogOpening":
            self.dialogs.append(params["message"])
            answer = {"accept": True}
            self._browser.send(0, "Page.handleJavaScriptDialog", self.session, answer)

    def goto(self, url):
        """Go to `url` and return when it has loaded; at once for another #fragment."""
        answer = self.call("Page.navigate", url=url)
        if "errorText" in answer:
            raise BrowserError(f"{url}: {answer['errorText']}")
        loader = answer.get("loaderId")
        wait_for(lambda: loader is None or loader in self._loaded, what=url)

    def reload(self):
        before = len(self._loaded)
        self.call("Page.reload")
        wait_for(lambda: len(self._loaded) > before, what="the page to load again")

    def evaluate(self, expression):
        """Return the value of a JavaScript expression; a promise is awaited.

        Raises BrowserError with what the expression threw.
        """
        answer = self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in answer:
            raise BrowserError(_exception_text(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait_for(self, expression, timeout=TIMEOUT):
        """Return the first true value of a JavaScript expression."""
        failures = []

        def value():
            try:
                return self.evaluate(expression)
            except BrowserError as error:  # also while one page gives way to the next
                failures.append(str(error))
                return None

        def what():
            shown = self.evaluate("document.body?.innerText")
            return f"{expression} {failures[-1:]} errors={self.errors} shown={shown!r}"

        return wait_for(value, timeout, what)

    def wait_for_text(self, text, timeout=TIMEOUT):
        """Return when a person can read `text` on the page."""
        shown = "document.body.innerText"
        self.wait_for(f"{shown}.includes({json.dumps(text)})", timeout)

    def text(self, selector="body"):
        """Return what a person reads in the element, once there is one."""
        element = f"document.querySelector({json.dumps(selector)})"
        return self.wait_for(f"(found => found && [found.innerText])({element})")[0]

    def click(self, selector, timeout=TIMEOUT):
        """Click the middle of the element, once a person could.

        A click is lost where what is pressed is drawn anew before it is released, and
        missed where it moves just then: a person would click again.
        """

        def clicked():
            x, y = self.wait_for(CLICK_POINT % json.dumps(selector), timeout)
            mouse = {"x": x, "y": y, "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
            self.call("Input.dispatchMouseEvent", type="mousePressed", **mouse)
            self.call("Input.dispatchMouseEvent", type="mouseReleased", **mouse)
            try:
                return self.evaluate(CLICKED) is not False
            except BrowserError:  # one page gives way to the next
                return True

        wait_for(clicked, timeout, f"a click on {selector}")

    def fill(self, selector, text):
        """Click into a field and replace what is in it."""
        self.click(selector)
        self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        self.type(text)

    def type(self, text):
        """Enter text where the focus is, as a paste does."""
        self.call("Input.insertText", text=text)

    def press(self, keys):
        """Press a key, such as `Enter`, `a`, or `Control+Shift+ArrowUp`."""
        *modifiers, key = keys.split("+") if len(keys) > 1 else [keys]
        code, number, text = KEYS.get(key) or (
            f"Key{key.upper()}",
            ord(key.upper()),
            key,
        )
        held = sum(MODIFIERS[name] for name in modifiers)
        if held & ~MODIFIERS["Shift"]:
            text = ""  # a shortcut enters nothing
        event = {"key": key, "code": code, "windowsVirtualKeyCode": number}
        event["modifiers"] = held
        down = "keyDown" if text else "rawKeyDown"
        self.call("Input.dispatchKeyEvent", type=down, text=text, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def set_viewport(self, width, height, *, mobile=False, scale=1):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=mobile,
        )

    def set_media(self, *, dark=False, reduced_motion=False):
        """Prefer a dark scheme, or less motion, as the system of a person may."""
        values = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if reduced_motion else "no-preference",
        }
        features = [{"name": name, "value": value} for name, value in values.items()]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path, *, full=False):
        """Write what is seen, or the `full` length of the page, as PNG."""
        answer = self.call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=full
        )
        Path(path).write_bytes(base64.b64decode(answer["data"]))

    def close(self):
        """Close the tab; the Browser stays."""
        self._browser.call("Target.closeTarget", targetId=self._target_id)
        self._browser.forget(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _exception_text(details):
    exception = details.get("exception", {})
    return exception.get("description") or str(exception.get("value", details["text"]))
