"""tests/browser.py itself, against a page of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
from browser import Browser, BrowserError
from support import process_exists, wait_for

PAGE = """<!doctype html><title>Test</title>
<style>
  body { background: white; height: 3000px }
  @media (prefers-color-scheme: dark) { body { background: black } }
  #cover { position: fixed; inset: 0; background: red }
  #below { position: absolute; top: 2500px }
</style>
<form><input id=name value=old><button>Send</button></form>
<p id=out></p>
<button id=below type=button>Below</button>
<script>
  const out = document.getElementById("out");
  document.forms[0].onsubmit = (event) => {
    event.preventDefault();
    const name = document.getElementById("name").value;
    setTimeout(() => { out.textContent = "Hello " + name });
  };
  document.getElementById("below").onclick = () => { out.textContent = "Below!" };
  document.onkeydown = (event) => {
    if (event.ctrlKey && event.key === "k") out.textContent = "shortcut";
  };
</script>"""


@pytest.fixture(scope="module")
def browser():
    with Browser() as one:
        yield one


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A web server in a process of its own: Chromium keeps connections open."""
    directory = tmp_path_factory.mktemp("web")
    (directory / "index.html").write_text(PAGE)
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "0"],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        words = process.stdout.readline().split()
        yield f"http://127.0.0.1:{words[words.index('port') + 1]}/"
        process.kill()


@pytest.fixture
def page(browser, url):
    with browser.new_page() as one:
        one.goto(url)
        yield one


def test_a_form_is_filled_in_and_sent(page):
    page.fill("#name", "Ada")
    page.click("form button")
    page.wait_for_text("Hello Ada")
    assert page.text("#out") == "Hello Ada"
    page.fill("#name", "Grace")
    page.press("Backspace")
    page.press("Enter")
    page.wait_for_text("Hello Grac")


def test_what_lies_below_is_scrolled_to_before_the_click(page):
    page.click("#below")
    assert page.text("#out") == "Below!"


def test_a_click_on_what_is_drawn_anew_as_it_is_pressed_is_made_again(page):
    page.evaluate(
        "document.getElementById('below').onmousedown = ({target}) => {"
        "  target.onmousedown = null;"
        "  const other = target.cloneNode(true);"
        "  other.onclick = target.onclick;"
        "  target.replaceWith(other)"
        "}"
    )
    page.click("#below")
    assert page.text("#out") == "Below!"


def test_a_shortcut_is_pressed(page):
    page.press("Control+k")
    page.wait_for("out.textContent === 'shortcut'")


def test_what_is_covered_cannot_be_clicked(page):
    page.evaluate(
        "document.body.append(Object.assign("
        "document.createElement('div'), {id: 'cover'}))"
    )
    with pytest.raises(AssertionError, match="in vain"):
        page.click("form button", timeout=0.3)


def test_values_promises_and_errors_come_back_from_scripts(page):
    assert page.evaluate("({a: [1, 'x', null]})") == {"a": [1, "x", None]}
    assert page.evaluate("Promise.resolve(7)") == 7
    assert page.evaluate("undefined") is None
    with pytest.raises(BrowserError, match="ReferenceError: nothing"):
        page.evaluate("nothing")


def test_requests_and_errors_are_collected(page, url):
    assert page.urls == [url]
    assert page.errors == []
    page.evaluate("console.error('broken', 7)")
    page.evaluate("setTimeout(() => { throw new Error('thrown') })")
    page.evaluate("fetch('/missing').then(() => null)")
    for said in ("broken 7", "Error: thrown", "404"):
        wait_for(lambda said=said: said in "\n".join(page.errors), what=said)
    assert page.urls[-1] == f"{url}missing"


def test_a_dialog_is_accepted_and_noted(page):
    assert page.evaluate("confirm('Really?')") is True
    assert page.dialogs == ["Really?"]


def test_the_viewport_and_the_colour_scheme_are_emulated(page):
    page.set_viewport(390, 844, mobile=True)
    page.set_media(dark=True)
    assert page.evaluate("innerWidth") >= 390
    colour = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(colour) == "rgb(0, 0, 0)"
    page.set_media(dark=False)
    assert page.evaluate(colour) == "rgb(255, 255, 255)"


def test_a_screenshot_is_written(page, tmp_path):
    page.set_viewport(400, 300)
    page.screenshot(tmp_path / "seen.png")
    page.screenshot(tmp_path / "full.png", full=True)
    sizes = []
    for name in ("seen.png", "full.png"):
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        sizes.append(int.from_bytes(data[20:24], "big"))
    assert sizes[0] == 300
    assert sizes[1] >= 3000


def test_an_isolated_page_has_cookies_of_its_own(browser, url, page):
    page.evaluate("document.cookie = 'seen=1'")
    with browser.new_page() as same, browser.new_page(isolated=True) as other:
        same.goto(url)
        assert same.evaluate("document.cookie") == "seen=1"
        other.goto(url)
        assert other.evaluate("document.cookie") == ""


def test_a_page_is_loaded_again(page, url):
    page.fill("#name", "Ada")
    page.reload()
    assert page.urls == [url, url]
    assert page.evaluate("document.getElementById('name').value") == "old"


def test_another_fragment_is_gone_to_without_loading(page, url):
    page.goto(f"{url}#nodes")
    assert page.evaluate("location.hash") == "#nodes"


def test_a_page_that_cannot_be_reached_is_an_error(page):
    with pytest.raises(BrowserError, match="ERR_"):
        page.goto("http://127.0.0.1:1/")


def test_closing_leaves_no_process_and_no_file():
    with Browser() as one:
        one.new_page().goto("about:blank")
        profile, pid = one._profile, one.process.pid
        assert profile.is_dir()
    assert not process_exists(pid)
    assert not profile.exists()


def test_calls_to_a_browser_that_died_fail():
    with Browser() as one:
        page = one.new_page()
        one.process.kill()
        one.process.wait()
        with pytest.raises(BrowserError):
            page.evaluate("1")
