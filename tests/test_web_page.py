"""The page's three files, read as text: what a browser need not run to find wrong."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

import moltis

FILES = {"html": moltis.WEB_HTML, "css": moltis.WEB_CSS, "js": moltis.WEB_JS}
MAX_SIZE = 120 * 1024  # bytes, of the three together
SVG_NAMESPACE = "http://www.w3.org/2000/svg"  # a name; nobody fetches it

VOID = {"meta", "link", "input", "br", "hr", "img"}


class Document(HTMLParser):
    """Reads the page strictly: what is opened is closed, and ids are unique."""

    def __init__(self, text):
        super().__init__()
        self.elements = []  # (tag, attributes)
        self.faults = []
        self._open = []
        self._svg = 0
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag in self._open]

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()} closes something else")

    def ids(self):
        return [a["id"] for _, a in self.elements if "id" in a]


@pytest.fixture(scope="module")
def document():
    return Document(moltis.WEB_HTML)


def test_the_page_is_well_formed(document):
    assert document.faults == []
    assert len(set(document.ids())) == len(document.ids())


def test_every_id_that_the_script_looks_up_is_on_the_page(document):
    script = moltis.WEB_JS
    looked_up = set(re.findall(r'\$\("([^"]+)"\)', script))
    clicks = re.search(r"const CLICKS = \{(.*?)\n\};", script, re.S).group(1)
    looked_up |= set(re.findall(r'^  "?([\w-]+)"?:', clicks, re.M))
    looked_up |= set(re.findall(r'onSubmit\("([^"]+)"', script))
    for name in re.findall(r'new Picker\(\s*"(\w+)"', script):
        looked_up |= {f"{name}-button", f"{name}-list"}
    assert len(looked_up) > 50
    assert looked_up <= set(document.ids())


def test_every_icon_that_is_named_exists(document):
    named = {a["data-icon"] for _, a in document.elements if "data-icon" in a}
    named |= set(re.findall(r'[iI]con(?:Button)?\("(\w+)"', moltis.WEB_JS))
    assert {f"i-{name}" for name in named} <= set(document.ids())


def test_labels_and_descriptions_refer_to_what_is_there(document):
    ids = set(document.ids())
    for tag, attributes in document.elements:
        for name in ("for", "aria-labelledby", "aria-describedby", "aria-controls"):
            for target in attributes.get(name, "").split():
                assert target in ids, f"<{tag} {name}={target}>"


def test_the_page_has_no_style_and_no_script_of_its_own(document):
    """A Content-Security-Policy without unsafe-inline would refuse them."""
    for tag, attributes in document.elements:
        assert tag != "style"
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        if tag == "script":
            assert attributes == {"type": "module", "src": "/app.js"}


@pytest.mark.parametrize(
    "word",
    [
        *("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write"),
        *("eval(", "new Function", 'setAttribute("style"', "DOMParser", "import("),
    ],
)
def test_text_never_becomes_markup_or_code(word):
    assert word not in moltis.WEB_JS


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_host(name):
    text = FILES[name].replace(SVG_NAMESPACE, "")
    assert re.findall(r"(?:https?|wss?):?//\w[^\s\"'`]*", text) == []
    assert re.findall(r"url\(|@import|^(?:import|export)\b", text, re.M) == []


def test_the_three_files_are_small():
    assert sum(len(text.encode()) for text in FILES.values()) < MAX_SIZE


def test_no_name_is_defined_below_its_use_at_load_time():
    """The script's sections stand in the order that its first lines give."""
    script = moltis.WEB_JS
    sections = re.findall(r"^// == (?:view: )?(.+?) ==$", script, re.M)
    order = ["dom", "words", "terminal", "Markdown", "socket", "state", "routes"]
    assert sections[: len(order)] == order
    assert sections[-1] == "start"


def test_node_can_read_the_script(tmp_path):
    node = shutil.which("node") or pytest.skip("node is not installed")
    script = tmp_path / "app.mjs"
    script.write_text(moltis.WEB_JS, encoding="utf-8")
    checked = subprocess.run(
        [node, "--check", str(script)], check=False, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr
