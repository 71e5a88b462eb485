"""The page's emulator of terminals, compared with xterm.js, which node runs as well."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest

import moltis

CACHE = Path(__file__).resolve().parent / "cache"  # git ignores it
PACKAGES = ("@xterm/headless@6.0.0", "@xterm/addon-unicode11@0.9.0")

# Prints what differs, for each session: the emulator gets its bytes at once and one by
# one.  What links look like and where resizing breaks lines is not compared.
COMPARE = """
const require = createRequire(process.argv[2] + "/");
const {Terminal: Xterm} = require("@xterm/headless");
const {Unicode11Addon} = require("@xterm/addon-unicode11");
const MOUSE = {none: 0, x10: 9, vt200: 1000, drag: 1002, any: 1003};

const FLAGS_OF = ["isBold", "isDim", "isItalic", "isUnderline", "isBlink", "isInverse",
  "isInvisible", "isStrikethrough", "isOverline"];

function cellOf(cell) {
  const color = name => cell[`is${name}Default`]() ? -1 :
    (cell[`is${name}RGB`]() ? 0x1000000 : 0) | cell[`get${name}Color`]();
  const flags = FLAGS_OF.reduce((all, name, n) => all | (cell[name]() ? 1 << n : 0), 0);
  return [cell.getChars(), flags, color("Fg"), color("Bg")].join(",");
}

function theirState(term) {
  const {buffer: {active}, modes, _core: core} = term;
  return {
    rows: Array.from({length: active.length}, (_, n) =>
      Array.from({length: term.cols}, (_, x) => cellOf(active.getLine(n).getCell(x)))),
    x: active.cursorX,
    y: active.cursorY,
    alternate: active.type === "alternate",
    cursorKeys: modes.applicationCursorKeysMode,
    keypad: modes.applicationKeypadMode,
    bracketedPaste: modes.bracketedPasteMode,
    inserts: modes.insertMode,
    mouse: MOUSE[modes.mouseTrackingMode],
    origin: modes.originMode,
    wrapsBack: modes.reverseWraparoundMode,
    focus: modes.sendFocusMode,
    synchronized: modes.synchronizedOutputMode,
    wraps: modes.wraparoundMode,
    showsCursor: !core.coreService.isCursorHidden,
    sgrMouse: core.coreMouseService.activeEncoding === "SGR",
  };
}

function ourState({page, modes, isAlternate}) {
  const {blinks, newLine, ...compared} = modes;
  return {...compared, alternate: isAlternate, x: page.x, y: page.y,
    rows: page.rows.map(({cells}) => cells.map(({text, style}) =>
      [text, style.flags, style.ink, style.ground].join(",")))};
}

function difference(ours, theirs) {
  for (const [n, row] of theirs.rows.entries())
    for (const [x, cell] of row.entries())
      if (ours.rows[n]?.[x] !== cell)
        return `row ${n}, column ${x}: ${ours.rows[n]?.[x]}, not ${cell}`;
  for (const name of Object.keys(theirs).filter(name => name !== "rows"))
    if (ours[name] !== theirs[name])
      return `${name} is ${ours[name]}, not ${theirs[name]}`;
  return ours.rows.length === theirs.rows.length ? null : "too many rows";
}

const faults = [];
for (const {name, data} of JSON.parse(readFileSync(0, "utf8"))) {
  const bytes = Buffer.from(data, "base64");
  const term = new Xterm({cols: 80, rows: 24, scrollback: 5000, allowProposedApi: true,
    logLevel: "off"});
  term.loadAddon(new Unicode11Addon());
  term.unicode.activeVersion = "11";
  await new Promise(done => term.write(bytes, done));
  const theirs = theirState(term);
  term.dispose();
  const [whole, cut] = [new Emulator(80, 24), new Emulator(80, 24)];
  whole.write(bytes);
  for (let n = 0; n < bytes.length; n += 1) cut.write(bytes.subarray(n, n + 1));
  for (const [how, emulator] of [["at once", whole], ["cut", cut]]) {
    const fault = difference(ourState(emulator), theirs);
    if (fault) faults.push(`${name}, ${how}: ${fault}`);
  }
}
console.log(JSON.stringify(faults));
process.exit();
"""


@pytest.fixture(scope="module")
def node():
    return shutil.which("node") or pytest.skip("node is not installed")


@pytest.fixture(scope="module")
def run(node, tmp_path_factory):
    """Return a function that runs JavaScript which sees the emulator."""
    sections = re.split(r"^// == (.+?) ==$", moltis.WEB_JS, flags=re.M)
    rooms = dict(zip(sections[1::2], sections[2::2]))
    composing = "const isComposing = () => false;\n"
    first = "".join(
        f'import {{{name}}} from "node:{module}";\n'
        for name, module in (("readFileSync", "fs"), ("createRequire", "module"))
    )
    script = tmp_path_factory.mktemp("screen") / "script.mjs"

    def run(text, *arguments, given=None):
        rooms_used = rooms["terminal"] + rooms["terminal screen"]
        script.write_text(first + composing + rooms_used + text, encoding="utf-8")
        done = subprocess.run(
            [node, str(script), *arguments],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="module")
def compare(run):
    """Return a function that compares sessions, {name: bytes}, with xterm.js."""
    if not (CACHE / "node_modules/@xterm/addon-unicode11").exists():
        npm = shutil.which("npm") or pytest.skip("npm is not installed")
        CACHE.mkdir(exist_ok=True)
        done = subprocess.run(
            [
                *(npm, "install", "--silent", "--no-audit", "--no-fund"),
                *("--no-save", "--prefix", str(CACHE), *PACKAGES),
            ],
            check=False,
            env={**os.environ, "HOME": str(CACHE)},
            timeout=300,
        )
        if done.returncode:
            pytest.skip("npm reaches no registry")

    def compare(sessions):
        given = [
            {"name": name, "data": base64.b64encode(data).decode()}
            for name, data in sessions.items()
        ]
        return run(COMPARE, str(CACHE), given=given)

    return compare


# -- what real programs print --------------------------------------------------

LINES = "".join(f"line {n} äöü 中文 é {'x' * (n % 130)}\n" for n in range(200))


class Recorder:
    """A program on a terminal of 24 rows and 80 columns, and all that it printed."""

    def __init__(self, words, home):
        self.output = b""
        pid, self._terminal = pty.fork()
        if pid == 0:
            os.chdir(home)
            os.execve(
                words[0],
                words,
                {
                    "HOME": str(home),
                    "PATH": os.environ["PATH"],
                    "TERM": "xterm-256color",
                    "LANG": "C.UTF-8",
                    "PS1": "$ ",
                    "TMUX_TMPDIR": str(home),
                },
            )
        self._pid = pid
        size = struct.pack("HHHH", 24, 80, 0, 0)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, size)

    def read(self, quiet=0.15, first=5.0):
        """Take what is printed until nothing came for `quiet` s."""
        wait = first
        while select.select([self._terminal], [], [], wait)[0]:
            try:
                data = os.read(self._terminal, 65536)
            except OSError:
                return
            if not data:
                return
            self.output += data
            wait = quiet

    def type(self, keys):
        os.write(self._terminal, keys)
        self.read(first=1.0)

    def close(self):
        os.kill(self._pid, signal.SIGKILL)
        os.close(self._terminal)
        os.waitpid(self._pid, 0)


DOWN = b"\x1b[B"
PROGRAMS = {
    "bash": (
        ("--norc",),
        (
            b"ls -la --color /\r",
            "echo 中文 😀 e\u0301 │\r".encode(),
            b"abc\x01X\x05Y\x17\x0c",
            b"seq 60\r",
        ),
    ),
    "vim": (
        ("-u", "NONE", "-N", "text"),
        (
            b":syntax on | set hlsearch nu\r",
            b"/line\r",
            b"5dd",
            "ihello 中 world\x1b".encode(),
            b"\x06\x06:split\r",
            b"Gu",
        ),
    ),
    "less": (("text",), (b" ", b"/line 5\r", b"n", b"G", b"b", b"yyy")),
    "nano": (("text",), (b"hello", b"\x16", b"\x17line\r", b"\x19")),
    "htop": ((), (DOWN * 3, b"t")),
    "mc": (("-u",), (DOWN * 3, b"\x1bOR")),
    "tmux": (
        ("-L", "moltis-test", "-f", "/dev/null", "new", "bash --norc"),
        (b"ls --color /\r", b"\x02%", b"seq 50\r", b'\x02"', b"\x02o"),
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_a_program_prints_looks_as_in_xterm(compare, tmp_path, name):
    program = shutil.which(name) or pytest.skip(f"{name} is not installed")
    (tmp_path / "text").write_text(LINES, encoding="utf-8")
    arguments, keys = PROGRAMS[name]
    recorder = Recorder([program, *arguments], tmp_path)
    try:
        recorder.read()
        for pressed in keys:
            recorder.type(pressed)
    finally:
        recorder.close()
        if name == "tmux":
            subprocess.run(
                [program, "-L", "moltis-test", "kill-server"],
                env={**os.environ, "TMUX_TMPDIR": str(tmp_path)},
                check=False,
            )
    assert len(recorder.output) > 500
    assert compare({name: recorder.output}) == []


# -- what they might print -----------------------------------------------------

TEXTS = ["a", "hello", "w" * 30, "z" * 85, "中", "日本", "é", "e\u0301", "😀", "한"]
CONTROLS = ["\r", "\n", "\r\n", "\b", "\t", "\x0b", "\x0e", "\x0f", "\x07"]
COLOURS = [
    *map(str, (*range(6), 7, 8, 9, *range(21, 26), 27, 28, 29)),
    *("31", "39", "42", "49", "53", "55", "95", "103", "38;5;200", "48;5;17"),
    *("38;2;1;2;250", "48;2;9;8;7", "38:5:77", "58;5;3", "4:3"),
]
MODES = [
    *map("?{}".format, (1, 7, 9, 12, 25, 45, 47, 66, 1000, 1002, 1003, 1004, 1006)),
    *("?1047", "?1048", "?1049", "?2004", "?2026", "?1;2004", "4", "20"),
]
ESCAPES = [
    *"78DEHM=>no",
    *("(0", "(B", ")0", ")B", "(A", "#8"),
    *("]0;title\x07", "]2;title\x1b\\", "]52;c;aGk=\x07", "P$qm\x1b\\", "_apc\x1b\\"),
    *("[3\x18", "[12;\x1b[1m", "[1\n2C", "[>1u", "[<u", "[?u", "[>4;2m", "[2 q"),
    *("[1?h", "[?5;6:7$$h", "[!p", "[s", "[u", "[g", "[3g", "^pm\x9c"),
    "[1;10r\x1b[?6h\x1b[99;7H#\n\x1b[3;4H+\x1b[?6l",
]


def piece(chance):
    """Return some text, or one sequence of those that the emulator knows."""
    number = chance.choice(("", str(chance.randint(0, 30))))
    column = chance.choice(("", str(chance.randint(0, 90))))
    kind = chance.random()
    if kind < 0.35:
        return chance.choice([*TEXTS, " ", "│", "  x  "])
    if kind < 0.5:
        return chance.choice(CONTROLS)
    if kind < 0.62:
        codes = chance.choices(COLOURS, k=chance.randint(1, 3))
        return f"\x1b[{';'.join(codes)}m"
    if kind < 0.74:
        return f"\x1b[{number}{chance.choice('ABCDEFGIZad`eX@P')}"
    if kind < 0.78:
        return f"\x1b[{number};{column}{chance.choice('Hf')}"
    if kind < 0.86:
        few = chance.choice(("", "1", "2", "5"))
        return f"\x1b[{few}{chance.choice('JKLMSTb')}"
    if kind < 0.89:
        top = chance.randint(1, 8)
        return f"\x1b[{top};{chance.randint(top + 1, 24)}r"
    if kind < 0.94:
        return f"\x1b[{chance.choice(MODES)}{chance.choice('hl')}"
    return "\x1b" + chance.choice(ESCAPES)


def test_random_streams_look_as_in_xterm_wherever_they_are_cut(compare):
    streams = {}
    for seed in range(60):
        chance = random.Random(seed)
        streams[f"seed {seed}"] = "".join(piece(chance) for _ in range(150)).encode()
    assert compare(streams) == []


# -- what xterm.js does otherwise, or not at all -------------------------------

SHOW = """
const {steps, sizes} = JSON.parse(readFileSync(0, "utf8"));
const screen = new Emulator(...sizes[0]);
const answers = [];
screen.answer = text => answers.push(text);
for (const step of steps) {
  if (typeof step === "string") screen.write(Buffer.from(step));
  else screen.resize(...step);
}
const {page, title, bells, pen} = screen;
console.log(JSON.stringify({answers, title, bells, x: page.x, y: page.y,
  link: pen.link, count: page.rows.length, base: page.base,
  lines: page.rows.map(row => row.text)}));
"""


@pytest.fixture
def show(run):
    def show(*steps, size=(20, 5)):
        return run(SHOW, given={"steps": steps, "sizes": [size]})

    return show


LONG = "abcdefghijklmnopqrstuvwxyz"


def test_a_resize_breaks_long_lines_anew_and_keeps_their_text(show):
    seen = show(f"{LONG}\r\nend", [10, 5])
    assert seen["lines"] == ["abcdefghij", "klmnopqrst", "uvwxyz", "end", ""]
    assert (seen["x"], seen["y"]) == (3, 3)
    assert show(f"{LONG}\r\nend", [10, 5], [30, 5])["lines"][:2] == [LONG, "end"]


def test_a_resize_never_halves_a_wide_character(show):
    text = "a" + "中" * 6
    assert show(text, [6, 5])["lines"][:3] == ["a中中", "中中中", "中"]
    assert show(text, [6, 5], [20, 5])["lines"][0] == text


def test_a_lower_screen_keeps_the_cursor_and_what_is_above_it(show):
    seen = show("\r\n".join("12345"), [20, 2])
    assert seen["lines"] == ["1", "2", "3", "4", "5"]
    assert (seen["base"], seen["y"]) == (3, 1)
    assert show("\r\n".join("12345"), [20, 2], [20, 5])["base"] == 0


def test_a_cleared_screen_stays_cleared_when_it_is_resized(show):
    seen = show("\r\n".join("123456789"), "\x1b[H\x1b[2J$ ", [15, 5], [20, 7])
    assert seen["lines"][seen["base"] :] == ["$ ", *[""] * 6]


def test_only_so_many_rows_are_kept(show):
    seen = show("x\r\n" * 12_000)
    assert 5000 <= seen["count"] <= 5600


def test_a_number_that_is_too_large_costs_nothing(show):
    began = time.monotonic()
    huge = "99999999999"
    show("".join(f"a\x1b[{huge}{final}" for final in "@ABCDEFGIJKLMPSTXZ`abde"))
    assert time.monotonic() - began < 10


def test_queries_are_answered(show):
    asked = "\x1b[c\x1b[>c\x1b[5n\x1b[3;4H\x1b[6n\x1b[?2004$p\x1b]11;?\x07\x1b[18t"
    assert show(asked)["answers"] == [
        *("\x1b[?1;2c", "\x1b[>0;276;0c", "\x1b[0n", "\x1b[3;4R", "\x1b[?2004;2$y"),
        *("\x1b]11;rgb:1616/1919/1d1d\x1b\\", "\x1b[8;5;20t"),
    ]


def test_titles_links_and_bells_are_known_and_a_clipboard_is_not_written(show):
    text = "\x1b]0;a title\x07\x07\x1b]8;id=1;https:x.test\x1b\\l\x1b]52;c;aGk=\x07"
    seen = show(text)
    assert (seen["title"], seen["bells"]) == ("a title", 1)
    assert seen["link"] == "https:x.test"
    assert seen["answers"] == []


def test_after_a_full_reset_nothing_is_left(show):
    seen = show("x\r\n" * 30 + "\x1b[31m\x1b[?1049h\x1b(0\x1bcq")
    assert seen["lines"] == ["q", "", "", "", ""]


KEYS = """
const {events, modes, isMac} = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(events.map(({states = [], ...event}) => keySequence(
  {ctrlKey: false, altKey: false, shiftKey: false, metaKey: false, ...event,
    getModifierState: name => states.includes(name)}, modes, isMac))));
"""


@pytest.fixture
def press(run):
    def press(*events, is_mac=False, **modes):
        given = {"events": events, "modes": modes, "isMac": is_mac}
        return run(KEYS, given=given)

    return press


def test_keys_send_what_terminfo_says(press):
    names = ["ArrowUp", "Home", "F1", "F5", "Delete", "Enter", "Tab", "Escape"]
    events = [{"key": name} for name in [*names, "Backspace"]]
    assert press(*events) == [
        *("\x1b[A", "\x1b[H", "\x1bOP", "\x1b[15~", "\x1b[3~", "\r", "\t", "\x1b"),
        "\x7f",
    ]
    assert press(*events[:2], cursorKeys=True) == ["\x1bOA", "\x1bOH"]
    assert press({"key": "ArrowLeft", "ctrlKey": True}) == ["\x1b[1;5D"]
    assert press({"key": "Enter", "location": 3}, keypad=True) == ["\x1bOM"]


def test_ctrl_and_alt_make_controls_and_meta(press):
    letters = [{"key": key, "ctrlKey": True} for key in "cW@[ _"]
    assert press(*letters) == ["\x03", "\x17", "\x00", "\x1b", "\x00", "\x1f"]
    assert press({"key": "b", "altKey": True}) == ["\x1bb"]


@pytest.mark.parametrize(
    ("event", "is_mac"),
    [
        ({"key": "a"}, False),
        ({"key": "@", "ctrlKey": True, "altKey": True}, False),  # AltGr on Windows
        ({"key": "€", "altKey": True, "states": ["AltGraph"]}, False),
        ({"key": "@", "altKey": True}, True),  # Option
        ({"key": "Dead"}, False),
        ({"key": "v", "metaKey": True}, True),
    ],
)
def test_a_key_that_types_text_is_left_to_the_browser(press, event, is_mac):
    assert press(event, is_mac=is_mac) == [None]


PASTE = """
const {text, modes} = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(pasteSequence(text, modes)));
"""


def test_a_paste_cannot_end_its_bracket(run):
    given = {"text": "a\x1b[201~\u009bb\r\nc\n", "modes": {"bracketedPaste": True}}
    assert run(PASTE, given=given) == "\x1b[200~a[201~b\rc\r\x1b[201~"


MOUSE = """
const {events, modes} = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(events.map(event =>
  mouseSequence({modifiers: 0, x: 4, y: 1, ...event}, modes))));
"""


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        ({"mouse": 0}, ["", "", "", ""]),
        ({"mouse": 9}, ['\x1b[M %"', "", "", ""]),
        ({"mouse": 1000, "sgrMouse": True}, ["\x1b[<0;5;2M", "\x1b[<0;5;2m", "", ""]),
        (
            {"mouse": 1003, "sgrMouse": True},
            ["\x1b[<0;5;2M", "\x1b[<0;5;2m", "\x1b[<32;5;2M", "\x1b[<35;5;2M"],
        ),
    ],
)
def test_the_mouse_sends_what_the_program_asked_for(run, modes, expected):
    events = [
        {"button": 0},
        {"button": 0, "isUp": True},
        {"button": 0, "isMove": True},
        {"button": 3, "isMove": True},
    ]
    assert run(MOUSE, given={"events": events, "modes": modes}) == expected
