"""The page: its three files as text, and what of its script needs no browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from browser import Browser

import moltis

FILES = {
    "html": moltis.WEB_HTML.decode(),
    "css": moltis.WEB_CSS.decode(),
    "js": moltis.WEB_JS.decode(),
}
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
    return Document(moltis.WEB_HTML.decode())


def test_the_page_is_well_formed(document):
    assert document.faults == []
    assert len(set(document.ids())) == len(document.ids())


SHARED_NUMBERS = {  # of the script: the same in Python, in the script's unit
    "LOG_DATA": moltis.LOG_DATA,
    "INPUT_DATA": moltis.INPUT_DATA,
    "STDOUT": moltis.STDOUT,
    "STDERR": moltis.STDERR,
    "MARK": moltis.MARK,
    "FRAME_HEAD": moltis.FRAME_HEAD.size,
    "AWAY_KEYS": moltis.AWAY_KEYS,
    "MAX_SIDE": moltis.MAX_SIDE,
    "JOIN_LIFETIME": moltis.JOIN_CODE_LIFETIME * 1000,
}


@pytest.mark.parametrize("name", SHARED_NUMBERS)
def test_numbers_that_the_page_shares_with_the_gateway_are_the_same(name):
    found = re.search(rf"^const {name} = ([0-9_]+);", moltis.WEB_JS.decode(), re.M)
    assert int(found[1]) == SHARED_NUMBERS[name]


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("MAX_INPUT", moltis.MAX_LOG_MESSAGE),  # in one message
        ("INPUT_PIECE", moltis.MAX_LOG_MESSAGE),
        ("INPUT_WINDOW", moltis.LOG_WINDOW),  # not yet consumed
        ("TYPED_WINDOW", moltis.LOG_WINDOW),
    ],
)
def test_the_page_sends_no_more_input_than_a_node_takes(name, limit):
    found = re.search(
        rf"^const {name} = ([0-9]+) \* 1024;", moltis.WEB_JS.decode(), re.M
    )
    assert int(found[1]) * 1024 <= limit


def test_every_id_that_the_script_looks_up_is_on_the_page(document):
    script = moltis.WEB_JS.decode()
    looked_up = set(re.findall(r'\$\("([^"]+)"\)', script))
    clicks = re.search(r"const CLICKS = \{(.*?)\n\};", script, re.S).group(1)
    looked_up |= set(re.findall(r'^  "?([\w-]+)"?:', clicks, re.M))
    looked_up |= set(re.findall(r'onSubmit\("([^"]+)"', script))
    for name in re.findall(r'new Picker\(\s*"(\w+)"', script):
        looked_up |= {f"{name}-button", f"{name}-list"}
    assert len(looked_up) > 50
    assert looked_up <= set(document.ids())


def test_every_template_that_is_copied_exists(document):
    copied = set(re.findall(r'copyOf\("([^"]+)"\)', moltis.WEB_JS.decode()))
    templates = {a.get("id") for tag, a in document.elements if tag == "template"}
    assert len(copied) > 4
    assert copied | {"icon"} == templates


def test_parts_of_a_template_have_unique_names():
    for template in re.findall(
        r"<template.*?</template>", moltis.WEB_HTML.decode(), re.S
    ):
        names = re.findall(r'data-part="(\w+)"', template)
        assert len(set(names)) == len(names), template


def test_every_icon_that_is_named_exists(document):
    named = {a["data-icon"] for _, a in document.elements if "data-icon" in a}
    named |= set(re.findall(r'[iI]con(?:Button)?\("(\w+)"', moltis.WEB_JS.decode()))
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
            assert attributes == {"type": "module", "src": "app.js"}


@pytest.mark.parametrize(
    "word",
    [
        *("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write"),
        *("eval(", "new Function", 'setAttribute("style"', "DOMParser", "import("),
    ],
)
def test_text_never_becomes_markup_or_code(word):
    assert word not in moltis.WEB_JS.decode()


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_host(name):
    text = FILES[name].replace(SVG_NAMESPACE, "")
    assert re.findall(r"(?:https?|wss?):?//\w[^\s\"'`]*", text) == []
    assert re.findall(r"url\(|@import|^(?:import|export)\b", text, re.M) == []


def test_no_name_is_defined_below_its_use_at_load_time():
    """The script's sections stand in the order that its first lines give."""
    script = moltis.WEB_JS.decode()
    sections = re.findall(r"^// == (?:view: )?(.+?) ==$", script, re.M)
    order = ["dom", "storage", "words", "terminal", "terminal screen", "Markdown"]
    order.append("socket")
    assert sections[: len(order)] == order
    assert sections[-1] == "start"


@pytest.fixture(scope="module")
def node():
    return shutil.which("node") or pytest.skip("node is not installed")


def test_node_can_read_the_script(node, tmp_path):
    script = tmp_path / "app.mjs"
    script.write_text(moltis.WEB_JS.decode(), encoding="utf-8")
    checked = subprocess.run(
        [node, "--check", str(script)], check=False, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr


WORDS_OF_A_SHELL = ("plain", "a/b", "~", "~root", "a b", "it's", "-x", "$HOME", "é", "")


def test_a_word_for_a_shell_arrives_as_it_was(node):
    """Also one that begins like a home directory: only of a path that stands for it."""
    text = moltis.WEB_JS.decode()
    start = text.index("const quoted = ")
    end = text.index("\n\n", text.index("const quotedPath = "))
    shown = (
        "JSON.parse(process.argv[1]).map(quoted).concat(quotedPath('~/a b')).join(' ')"
    )
    script = f"{text[start:end]}\nconsole.log({shown})"
    words = [node, "-e", script, json.dumps(WORDS_OF_A_SHELL)]
    line = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    done = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {line}"],
        check=True,
        capture_output=True,
        text=True,
        env={"HOME": "/home/of"},
    )
    assert done.stdout.split("\n")[:-1] == [*WORDS_OF_A_SHELL, "/home/of/a b"]


# -- job logs ------------------------------------------------------------------

JOB_ID = "0123abcd-4567-89ab-cdef-00112233aabb"

HARNESS = """
const steps = JSON.parse(readFileSync(0, "utf8"));
const log = new JobLog("x");
let id = null;
for (const step of steps) {
  if (step === "settle") log.settle();
  else {
    const found = decodeLogData(new Uint8Array(Buffer.from(step, "base64")));
    id = found.id;
    log.take(found.offset, found.frames);
  }
}
log.settle();
const {terminal, offset, hasOutput} = log;
const styles = terminal.lines.map(runs => runs.map(([, style]) => style.classes));
const {isCut} = terminal;
const text = terminal.text();
console.log(JSON.stringify({id, offset, isCut, hasOutput, text, styles}));
"""


@pytest.fixture(scope="module")
def show(node, tmp_path_factory):
    """Return what the script makes of (offset, frames) messages, run by node."""
    sections = re.split(r"^// == (.+?) ==$", moltis.WEB_JS.decode(), flags=re.M)
    named = dict(zip(sections[1::2], sections[2::2]))
    script = tmp_path_factory.mktemp("page") / "logs.mjs"
    first = 'import {readFileSync} from "node:fs";\n'
    text = first + named["terminal"] + named["job logs"] + HARNESS
    script.write_text(text, encoding="utf-8")

    def run(*steps):
        encoded = [
            step if isinstance(step, str) else base64.b64encode(message(*step)).decode()
            for step in steps
        ]
        done = subprocess.run(
            [node, str(script)],
            input=json.dumps(encoded),
            check=True,
            capture_output=True,
            text=True,
        )
        return json.loads(done.stdout)

    return run


def message(offset, frames):
    return moltis.encode_job_data(moltis.LOG_DATA, JOB_ID, offset, frames)


def out(text):
    data = text.encode() if isinstance(text, str) else text
    return moltis.encode_log_frame(moltis.STDOUT, data)


def err(text):
    return moltis.encode_log_frame(moltis.STDERR, text.encode())


def test_a_log_message_is_read_as_its_job_and_the_output_in_its_frames(show):
    frames = out("one\n") + err("two\n") + out("three")
    shown = show((0, frames))
    assert shown == {
        "id": JOB_ID,
        "offset": len(frames),
        "isCut": False,
        "hasOutput": True,
        "text": "one\ntwo\nthree",
        "styles": [[""], ["err"]],
    }


def test_characters_and_escape_sequences_may_be_split_between_frames(show):
    """Each stream is decoded by itself: stderr may come between the halves."""
    euro, colour = "€".encode(), b"\x1b[1mbold\n"
    first = out(euro[:1]) + err("é\n") + out(euro[1:] + b"\n")
    second = out(colour[:3]) + err("x\n") + out(colour[3:])
    shown = show((0, first), "settle", (len(first), second))
    assert shown["text"] == "é\n€\nx\nbold"
    assert shown["styles"] == [["err"], [""], ["err"], ["b"]]


def test_endings_marks_and_unknown_frames_are_skipped(show):
    others = b"".join(moltis.encode_log_frame(kind, b'{"a":1}') for kind in (0, 4, 9))
    frames = out("a\n") + others + out("b")
    shown = show((0, frames))
    assert (shown["text"], shown["offset"]) == ("a\nb", len(frames))


@pytest.mark.parametrize("output", ["\a", "50 %\r\x1b[K", "\x1b[0m"])
def test_output_that_draws_nothing_is_output(show, output):
    """Else the page says that it is not kept, and offers no download of it."""
    shown = show((0, out(output)), "settle")
    assert (shown["hasOutput"], shown["text"]) == (True, "")
    assert show((0, moltis.encode_log_frame(4, b"{}")))["hasOutput"] is False


def test_a_log_that_does_not_begin_at_0_is_shown_as_cut(show):
    shown = show((10**12, out("end")))
    assert (shown["isCut"], shown["text"]) == (
        True,
        "[… the output before this is left out …]\nend",
    )
    assert shown["offset"] == 10**12 + len(out("end"))


def test_frames_that_come_once_more_after_a_reconnect_are_dropped(show):
    a, b, c = out("a\n"), out("b\n"), err("c\n")
    shown = show((0, a + b), "settle", (len(a), b + c))
    assert shown["text"] == "a\nb\nc"
    assert shown["isCut"] is False


def test_output_before_a_gap_is_not_shown_with_what_follows_it(show):
    """Also not half a character: the decoders start anew."""
    a = out("before\n" + "x") + out("€".encode()[:2])
    shown = show((0, a), "settle", (len(a) + 1000, out("after\n")))
    assert shown["text"] == "[… the output before this is left out …]\nafter"


def test_of_output_faster_than_the_page_draws_only_the_end_is_parsed(show):
    piece = out("y\n" * 10_000)
    steps = [(n * len(piece), piece) for n in range(30)]
    end = out("end")
    shown = show(*steps, (30 * len(piece), end))
    assert shown["isCut"] is True
    assert shown["text"].endswith("\ny\nend")
    assert shown["offset"] == 30 * len(piece) + len(end)


# -- socket --------------------------------------------------------------------

LINK_HARNESS = """
const noted = [];
const timers = new Map(); // id -> [ms, action]
let lastTimer = 0;
globalThis.setTimeout = (action, ms) => {
  timers.set((lastTimer += 1), [ms, action]);
  return lastTimer;
};
globalThis.clearTimeout = id => timers.delete(id);
globalThis.setInterval = () => 0;
globalThis.window = globalThis.document = {hidden: false};
globalThis.location = {origin: "http://gateway"};
const BASE = "http://gateway/", ROOT = ""; // of the rooms above: where the page is,
const kept = new Map(); // and what the browser stores
const on = (target, type, action) => (target[`on${type}`] = action);
const sockets = [];
globalThis.WebSocket = class {
  constructor() { sockets.push(this); this.sent = []; this.closed = false; }
  send(text) { this.sent.push(JSON.parse(text)); }
  close() { this.closed = true; }
};
// Let the timer of so many milliseconds run out; without a number, that of open().
async function expire(wanted) {
  for (const [id, [ms, action]] of [...timers]) {
    if (wanted === undefined ? ms > 500 : ms !== wanted) continue;
    timers.delete(id);
    await action();
  }
  await new Promise(resolve => setImmediate(resolve));
}
async function connect(socket) {
  socket.onopen();
  const {id} = socket.sent[0];
  socket.onmessage({data: JSON.stringify({type: "res", id, ok: true, payload: {}})});
  await new Promise(resolve => setImmediate(resolve));
}
"""


@pytest.fixture(scope="module")
def link(node, tmp_path_factory):
    """Return what a script says about a Link over scripted sockets and timers."""
    sections = re.split(r"^// == (.+?) ==$", moltis.WEB_JS.decode(), flags=re.M)
    named = dict(zip(sections[1::2], sections[2::2]))
    rooms = named["words"] + named["socket"]
    directory = tmp_path_factory.mktemp("link")

    def run(steps):
        handlers = "".join(
            f'{name}() {{ noted.push("{name}"); }}, '
            for name in ("up", "down", "refused", "event", "data")
        )
        start = f"const link = new Link({{{handlers}}});\nlink.open();\n"
        end = "\nconsole.log(JSON.stringify({noted, sockets: sockets.length}));"
        script = directory / "link.mjs"
        script.write_text(LINK_HARNESS + rooms + start + steps + end)
        done = subprocess.run(
            [node, str(script)], check=True, capture_output=True, text=True
        )
        return json.loads(done.stdout)

    return run


def test_a_gateway_that_does_not_answer_connect_is_tried_again(link):
    shown = link("sockets[0].onopen(); await expire(10_000); await expire();")
    assert shown == {"noted": ["down"], "sockets": 2}


def test_a_silent_connection_is_replaced_once(link):
    """Its socket may report the end much later: the other end is unreachable."""
    shown = link("""
      await connect(sockets[0]);
      link.lastMessageAt = 0;
      link.probe();
      await expire(8000);
      sockets[0].onclose();
      await expire();
      sockets[0].onclose();
      await connect(sockets[1]);
      link.retryNow();
    """)
    assert shown == {"noted": ["up", "down", "up"], "sockets": 2}


def test_a_key_that_was_revoked_ends_the_connection(link):
    shown = link("""
      sockets[0].onopen();
      const error = {code: "UNAUTHORIZED", message: "revoked"};
      sockets[0].onmessage({data: JSON.stringify({type: "res", id: "1", error})});
      await expire();
    """)
    assert shown == {"noted": ["refused"], "sockets": 1}


# -- text of outsiders -----------------------------------------------------------

# The rooms of the script that turn text into nodes, as functions of a real page.
PARSERS = """(() => {
%s
globalThis.parsers = {
  markdown(text) {
    const box = h("div");
    showMarkdown(box, text);
    return box;
  },
  terminal(text) {
    const box = h("div");
    const log = JobLog.ofText("x", text);
    const parts = {screen: h("div"), cut: h("p"), lines: box, latest: h("button")};
    const screen = new Screen(log, parts);
    screen.draw();
    return box;
  },
};
})()"""
PARSE = "globalThis.root = parsers[%s](%s); 0"
EXTENT = """(() => {
  let depth = 0;
  for (let level = [root]; level.length; depth += 1)
    level = level.flatMap(element => [...element.children]);
  return [depth, root.textContent.length];
})()"""


@pytest.fixture(scope="module")
def parsers():
    """Return a page of Chromium in which `parsers` makes nodes of text."""
    sections = re.split(r"^// == (.+?) ==$", moltis.WEB_JS.decode(), flags=re.M)
    named = dict(zip(sections[1::2], sections[2::2]))
    rooms = ("dom", "words", "terminal", "Markdown", "job logs")
    body = moltis.WEB_HTML.decode().partition("<body>")[2].partition("</body>")[0]
    with Browser() as browser, browser.new_page() as page:
        page.evaluate(f"document.body.innerHTML = {json.dumps(body)}; 0")
        page.evaluate(PARSERS % "".join(named[room] for room in rooms))
        page.call("Performance.enable")
        yield page


def numbered(pattern):
    return lambda count: "".join(pattern % n for n in range(count // len(pattern)))


def repeated(text, end=""):
    return lambda count: text * (count // len(text)) + end


MARKDOWN_SHAPES = {
    "targets without an end": repeated("[x]("),
    "one long target": lambda count: "[x](" + "a" * count,
    "nested targets": repeated("[x](a(b"),
    "titles without an end": repeated('](a "'),
    "spaces in a target": lambda count: "[x](a" + " " * count + "b",
    "labels": repeated("["),
    "ends of labels": repeated("]"),
    "labels and ends": repeated("[a]"),
    "links in labels": lambda count: "[" * (count // 2) + "](http://a)" * (count // 22),
    "images": repeated("!["),
    "quotes": repeated(">"),
    "spaced quotes": repeated("> "),
    "lists on one line": repeated("- "),
    "quotes and lists": repeated("> - "),
    "nested lists": lambda count: "\n".join(
        " " * (2 * n) + "- a" for n in range(int(count**0.5))
    ),
    "emphasis that opens": repeated("*a "),
    "emphasis that closes": repeated("a* "),
    "strong that opens": repeated("**a "),
    "two marks": repeated("*a _b "),
    "three marks": repeated("*a **b ~~c "),
    "nested emphasis": lambda n: "*a **b " * (n // 16) + " b** a*" * (n // 16),
    "stars": repeated("*"),
    "stars and a letter": repeated("*", "a"),
    "underscores": repeated("_"),
    "words with underscores": repeated("a_"),
    "tildes": repeated("a~"),
    "backticks": repeated("`"),
    "runs of backticks": lambda count: (
        "x " + " ".join("`" * n for n in range(1, int((2 * count) ** 0.5)))
    ),
    "code without an end": repeated("a` ``b "),
    "a long code": lambda count: "a ` " + "b" * count + " c`",
    "a fence": lambda count: "`" * count + "\n" + "`" * (count - 1),
    "fences": repeated("```\n~~~\n"),
    "a heading": lambda count: "# a" + " " * count + "b",
    "marks of a heading": lambda count: "# a" + " #" * (count // 2) + "b",
    "more marks of a heading": lambda count: "# " + "#" * count + "b",
    "rules": repeated("- * ", "x"),
    "a rule": repeated("* ", "x"),
    "a wide table": lambda count: "|" * count + "\n" + "-|" * count,
    "a table with short rows": lambda count: (
        "a|" * count + "\n" + "-|" * count + "\n|" * count
    ),
    "rules of a table": lambda count: "a|b\n" + "-" * count + "x",
    "spaces in a rule": lambda count: "a|b\n|-" + " " * count + "x",
    "heads of tables": repeated("a|b\n"),
    "escaped cells": lambda count: "a|b\n-|-\n" + "\\|" * count,
    "spaces": lambda count: "a" + " " * count + "b",
    "breaks": repeated("a  \n"),
    "backslashes": repeated("\\"),
    "addresses": repeated("http://"),
    "an address of dots": lambda count: "http://a" + "." * count,
    "automatic links": repeated("<http://a"),
    "paragraphs": repeated("a\n\n"),
    "numbers": numbered("%d. a\n"),
    "blank lines of a list": lambda count: "- a" + "\n" * count + "b",
}
TERMINAL_SHAPES = {
    "sequences without an end": repeated("\x1b["),
    "a long sequence": lambda count: "\x1b[" + "1;" * count,
    "many colours": lambda count: "\x1b[" + "38;" * (count // 3) + "mx",
    "titles without an end": repeated("\x1b]0;a"),
    "a long title": lambda count: "\x1b]0;" + "a" * count,
    "escapes": repeated("\x1b"),
    "intermediates": lambda count: "\x1b" + " " * count,
    "a colour for each character": repeated("\x1b[31ma\x1b[32mb"),
    "a line written over and over": lambda count: (
        "\x1b[31ma\x1b[32mb" * (count // 24) + "\r" + "\x1b[33mc" * (count // 12)
    ),
    "returns": repeated("a\rb"),
    "backspaces": repeated("ab\b\b"),
    "columns far away": repeated("\x1b[999999999Ga\x1b[1G"),
    "erased lines": repeated("abc\x1b[2K\r"),
    "tabs": repeated("\t"),
    "a long line": repeated("a"),
    "new lines": repeated("\n"),
    "flags": repeated("\x1b[1;2;3;4;7;9ma"),
}


@pytest.mark.parametrize(
    ("parser", "shape"),
    [
        *(pytest.param("markdown", s, id=n) for n, s in MARKDOWN_SHAPES.items()),
        *(pytest.param("terminal", s, id=n) for n, s in TERMINAL_SHAPES.items()),
    ],
)
def test_no_text_costs_the_page_more_than_its_size(parsers, parser, shape):
    """In time, in depth, and in what becomes of it."""

    def cpu_time():
        """Of the page's thread: other programs take nothing from it."""
        metrics = parsers.call("Performance.getMetrics")["metrics"]
        return next(m["value"] for m in metrics if m["name"] == "ThreadTime")

    def measure(count):
        words = json.dumps(parser), json.dumps(shape(count))
        before = cpu_time()
        parsers.evaluate(PARSE % words)
        return cpu_time() - before

    def is_linear():
        # Four times the text; a quadratic parser takes sixteen times as long.
        return min(larges) < max(9 * min(smalls), 0.2)

    smalls, larges = [measure(15_000)], [measure(60_000)]
    while not is_linear() and len(smalls) < 6:  # the collector of garbage ran in one
        smalls.append(measure(15_000))
        larges.append(measure(60_000))
    assert is_linear(), (smalls, larges)
    depth, length = parsers.evaluate(EXTENT)
    assert depth <= 60
    assert length <= 8 * 60_000


def markdown_of(page, text):
    html = page.evaluate(f"parsers.markdown({json.dumps(text)}).innerHTML")
    return html.replace(' target="_blank" rel="noreferrer"', "")


@pytest.mark.parametrize(
    ("text", "html"),
    [
        (
            "a *b* **c** ***d*** ~~e~~",
            "a <em>b</em> <strong>c</strong> <em><strong>d</strong></em> <del>e</del>",
        ),
        ("**a *b***", "<strong>a <em>b</em></strong>"),
        ("***a** b*", "<em><strong>a</strong> b</em>"),
        ("_a_ snake_case_name __b__", "<em>a</em> snake_case_name <strong>b</strong>"),
        ("2 * 3 * 4, *.py", "2 * 3 * 4, *.py"),
        ("`a` ``b ` c`` ` d", "<code>a</code> <code>b ` c</code> ` d"),
        ("`` `a` ``", "<code>`a`</code>"),
        ("`*a*` \\*b\\*", "<code>*a*</code> *b*"),
        (
            '[a **b**](http://c/d_(e) "t")',
            '<a href="http://c/d_(e)">a <strong>b</strong></a>',
        ),
        ("[a](javascript:alert(1)) [b] [c](", "[a](javascript:alert(1)) [b] [c]("),
        (
            "see http://[::1]:80/x_y.",
            'see <a href="http://[::1]:80/x_y">http://[::1]:80/x_y</a>.',
        ),
        ("a  \nb", "a<br>b"),
    ],
)
def test_marks_in_a_paragraph_become_elements(parsers, text, html):
    assert markdown_of(parsers, text) == f"<p>{html}</p>"


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("# a b ##", '<h3 aria-level="2">a b</h3>'),
        ("## C#", '<h4 aria-level="2">C#</h4>'),
        (
            "> a\n> > b",
            "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
        ),
        ("- a\n  - b\n- c", "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("---", "<hr>"),
    ],
)
def test_blocks_become_elements(parsers, text, html):
    assert markdown_of(parsers, text) == html


def test_headings_have_levels_without_a_gap(parsers):
    text = "\n".join(f"{'#' * marks} h" for marks in (2, 4, 4, 3, 1, 6, 2))
    levels = parsers.evaluate(
        f"[...parsers.markdown({json.dumps(text)}).querySelectorAll('[aria-level]')]"
        ".map(heading => heading.ariaLevel).join('')"
    )
    assert levels == "2333233"


def test_a_table_has_its_cells_and_no_more_than_its_head(parsers):
    text = "|a|b|\n|:-:|--:|\n|1\\|2|3|4|\n|5|"
    rows = parsers.evaluate(
        f"[...parsers.markdown({json.dumps(text)}).querySelectorAll('tr')]"
        ".map(row => [...row.children].map(cell => cell.textContent))"
    )
    assert rows == [["a", "b"], ["1|2", "3"], ["5"]]


@pytest.mark.parametrize(
    ("output", "lines"),
    [
        ("a\x1b[3\nimportant\n", ["a", "important"]),
        ("\x1b[31\nEND\n", ["", "END"]),
        ("a\x1b]0;title\x1bXb\x1b\\c\n", ["a]0;titlec"]),
        ("\x1b]0;" + "t" * 5000 + "\nshown\n", "shown"),
        ("a\x1b]0;title\nimportant\n", ["a]0;title", "important"]),
        ("a\x1bPq1\nimportant\n", ["aPq1", "important"]),
        ("a\n\x1b]8;;http://x", ["a", "]8;;http://x"]),
        ("a\n\x1b_private\x1b", ["a", "_private"]),
        ("a\x1b[3", ["a"]),
        ("a\x1b[38;5;9\rb\n", ["b"]),
        ("abc\rX\x1b[9GY\n", ["Xbc     Y"]),
        ("50%\r100%\x1b[2K\rdone\n", ["done"]),
    ],
)
def test_a_sequence_that_cannot_be_completed_hides_nothing(parsers, output, lines):
    text = f"parsers.terminal({json.dumps(output)})"
    shown = parsers.evaluate(f"[...{text}.children].map(line => line.textContent)")
    assert shown[-1] == lines if isinstance(lines, str) else shown == lines
