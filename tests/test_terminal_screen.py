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
from support import wait_for

import moltis

CACHE = Path(__file__).resolve().parent / "cache"  # git ignores it
PACKAGES = ("@xterm/headless@6.0.0", "@xterm/addon-unicode11@0.9.0")

# Prints what differs, for each session: the emulator gets its bytes at once and one by
# one, and sizes between them.
COMPARE = """
const require = createRequire(process.argv[2] + "/");
const {Terminal: Xterm} = require("@xterm/headless");
const {Unicode11Addon} = require("@xterm/addon-unicode11");
const MOUSE = {none: 0, x10: 9, vt200: 1000, drag: 1002, any: 1003};

const FLAGS_OF = ["isBold", "isDim", "isItalic", "isUnderline", "isBlink", "isInverse",
  "isInvisible", "isStrikethrough", "isOverline"];

function cellOf(cell, term) {
  const color = name => cell[`is${name}Default`]() ? -1 :
    (cell[`is${name}RGB`]() ? 0x1000000 : 0) | cell[`get${name}Color`]();
  const flags = FLAGS_OF.reduce((all, name, n) => all | (cell[name]() ? 1 << n : 0), 0);
  const link = term.addresses.get(cell.extended.urlId) || "";
  return [cell.getChars(), flags, color("Fg"), color("Bg"), link].join(",");
}

// Without this, characters at the right edge depend on where the input was cut, and
// links are forgotten when the rows where they began are gone.
function standardize(term) {
  const {_inputHandler: handler, _oscLinkService: links} = term._core;
  const print = handler.print.bind(handler);
  const register = links.registerLink.bind(links);
  handler.print = (codes, start, end) => {
    for (let n = start; n < end; n += 1) print(codes, n, n + 1);
  };
  term.addresses = new Map();
  links.registerLink = link => {
    const id = register(link);
    term.addresses.set(id, link.uri);
    return id;
  };
}

function theirState(term) {
  const {buffer: {active}, modes, _core: core} = term;
  // Made lower while it was not shown, their alternate screen scrolls rows out.
  const first = active.type === "alternate" ? active.baseY : 0;
  return {
    rows: Array.from({length: active.length - first}, (_, n) =>
      Array.from({length: term.cols}, (_, x) =>
        cellOf(active.getLine(first + n).getCell(x), term))),
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

// xterm.js has links underlined.
function ourState({page, modes, isAlternate}) {
  const {blinks, newLine, ...compared} = modes;
  return {...compared, alternate: isAlternate, x: page.x, y: page.y,
    rows: page.rows.map(({cells}) => cells.map(({text, style}) =>
      [text, style.flags | (style.link && UNDERLINE), style.ink, style.ground,
        style.link].join(",")))};
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

// Accents of characters that xterm.js moves within a row overwrite each other.
function mendRows({_core: {buffer}}) {
  const rows = Object.getPrototypeOf(buffer.lines.get(0));
  const copy = rows.copyCellsFrom;
  rows.copyCellsFrom = function (from, ...places) {
    copy.call(this, from === this ? from.clone() : from, ...places);
  };
}

mendRows(new Xterm({allowProposedApi: true}));
const faults = [];
for (const [name, steps] of Object.entries(JSON.parse(readFileSync(0, "utf8")))) {
  const term = new Xterm({cols: 80, rows: 24, scrollback: 5000, allowProposedApi: true,
    logLevel: "off"});
  term.loadAddon(new Unicode11Addon());
  term.unicode.activeVersion = "11";
  standardize(term);
  const [whole, cut] = [new Emulator(80, 24), new Emulator(80, 24)];
  for (const [n, step] of steps.entries()) {
    if (typeof step === "string") {
      const bytes = Buffer.from(step, "base64");
      await new Promise(done => term.write(bytes, done));
      whole.write(bytes);
      for (const n of bytes.keys()) cut.write(bytes.subarray(n, n + 1));
    } else for (const one of [term, whole, cut]) one.resize(...step);
    // Of a full scrollback, xterm.js drops each row at once, and ours many together.
    if (steps.length > 1 && term.buffer.normal.baseY === SCROLLBACK) break;
    if (typeof step === "string" && n + 1 < steps.length) continue;
    const theirs = theirState(term);
    const found = [["at once", whole], ["cut", cut]]
      .map(([how, emulator]) => [how, difference(ourState(emulator), theirs)])
      .filter(([, fault]) => fault);
    if (!found.length) continue;
    const where = `${name}, step ${n}`;
    faults.push(...found.map(([how, fault]) => `${where}, ${how}: ${fault}`));
    break;
  }
  term.dispose();
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
    sections = re.split(r"^// == (.+?) ==$", moltis.WEB_JS.decode(), flags=re.M)
    rooms = dict(zip(sections[1::2], sections[2::2]))
    composing = "const isComposing = () => false;\n"
    first = "".join(
        f'import {{{name}}} from "node:{module}";\n'
        for name, module in (("readFileSync", "fs"), ("createRequire", "module"))
    )
    script = tmp_path_factory.mktemp("screen") / "script.mjs"

    def run(text, *arguments, given=None):
        rooms_used = "".join(map(rooms.get, ("words", "terminal", "terminal screen")))
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
    """Return a function that compares sessions with xterm.js.

    A session is output, or pieces of output and sizes (columns, rows) between them.
    """
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
        given = {
            name: [
                base64.b64encode(step).decode() if isinstance(step, bytes) else step
                for step in ([session] if isinstance(session, bytes) else session)
            ]
            for name, session in sessions.items()
        }
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

    def type_until(self, keys, end):
        """Type keys; return once what is printed since then ends with a pattern."""
        before = len(self.output)
        os.write(self._terminal, keys)

        def has_ended():
            self.read(quiet=0.0, first=0.1)
            return re.search(end + rb"\Z", self.output[before:])

        wait_for(has_ended, what=lambda: f"{end} after {self.output[before:]}")

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


VTTEST_WAITS = rb"(Push <RETURN>|Enter choice number \(\d+ - \d+\): )"


@pytest.mark.parametrize(("menu", "count"), [("1", 6), ("2", 15), ("3", 1), ("8", 14)])
def test_each_screen_of_vttest_looks_as_in_xterm(compare, tmp_path, menu, count):
    """Cursor movements, screen features, character sets, VT102's insert and delete."""
    program = shutil.which("vttest") or pytest.skip("vttest is not installed")
    recorder = Recorder([program, "24x80.80"], tmp_path)
    screens = {}
    try:
        recorder.read()
        # What it asks the terminal first.
        recorder.type_until(b"\x1b[?1;2c", VTTEST_WAITS)
        recorder.type_until(menu.encode() + b"\r", VTTEST_WAITS)
        while recorder.output.endswith(b"Push <RETURN>") and len(screens) < 30:
            screens[f"screen {len(screens)}"] = recorder.output
            recorder.type_until(b"\r", VTTEST_WAITS)
    finally:
        recorder.close()
    assert len(screens) == count
    assert compare(screens) == []


# What vttest says of our answers, for each choice of its menu of reports.
REPORTS = {
    "3": ('0 n  -- means "TERMINAL OK"', "5 ; 1 R  -- OK"),
    "4": ("1 ; 2 c  -- means VT100 with AVO (could be a VT102)",),
    "5": ("firmware version 27.6", "ROM cartridge registration number ok"),
}


@pytest.mark.parametrize("choice", REPORTS)
def test_vttest_takes_each_report(compare, run, tmp_path, choice):
    program = shutil.which("vttest") or pytest.skip("vttest is not installed")
    recorder = Recorder([program, "24x80.80"], tmp_path)
    screens, answers, shown = {}, [], ""
    try:
        recorder.read()
        for keys in ("", "6\r", f"{choice}\r", *[""] * 8):
            recorder.type(keys.encode())
            given = {"steps": [recorder.output.decode()], "sizes": [(80, 24)]}
            seen = run(SHOW, given=given)
            new = seen["answers"][len(answers) :]
            answers += new
            recorder.type("".join(new).encode())
            screens[f"screen {len(screens)}"] = recorder.output
            shown = "\n".join(seen["lines"])
            if shown.rstrip().endswith("Push <RETURN>"):
                break
    finally:
        recorder.close()
    assert [text for text in REPORTS[choice] if text not in shown] == []
    assert compare(screens) == []


@pytest.mark.skipif(not shutil.which("apt-get"), reason="apt-get is not installed")
@pytest.mark.skipif(os.getuid() != 0, reason="packages are installed by root")
def test_what_apt_prints_looks_as_in_xterm(compare, tmp_path):
    """It installs a package of ours, with its progress bar, below a root of ours."""
    package = tmp_path / "package/DEBIAN"
    for name in ("dpkg/updates", "dpkg/info", "cache/archives/partial", "log"):
        (tmp_path / name).mkdir(parents=True)
    package.mkdir(parents=True)
    (tmp_path / "dpkg/status").touch()
    fields = "Package: tiny\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.test>\n"
    (package / "control").write_text(f"{fields}Description: none\n")
    deb = tmp_path / "tiny.deb"
    build = ["dpkg-deb", "-b", str(package.parent), str(deb)]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    options = {
        "Dir::State": tmp_path / "state",
        "Dir::State::status": tmp_path / "dpkg/status",
        "Dir::Cache": tmp_path / "cache",
        "Dir::Log": tmp_path / "log",
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dpkg::Progress-Fancy": 1,
        "Debug::NoLocking": 1,
    }
    ours = [f"--root={tmp_path}", f"--admindir={tmp_path}/dpkg"]
    ours += ["--force-not-root", f"--log={tmp_path}/dpkg.log"]
    words = [shutil.which("apt-get"), *(f"-o{n}={v}" for n, v in options.items())]
    words += [f"-oDpkg::Options::={option}" for option in ours]
    recorder = Recorder([*words, "-y", "install", str(deb)], tmp_path)
    try:
        recorder.read(quiet=10.0)
    finally:
        recorder.close()
    assert b"Progress: [" in recorder.output
    assert b"Setting up tiny" in recorder.output
    assert compare({"apt": recorder.output}) == []


def test_a_terminal_inside_a_terminal_looks_as_in_xterm(compare, tmp_path):
    """One of script, and one of tmux that was left and entered again."""
    bash = shutil.which("bash")
    for program in ("script", "tmux"):
        shutil.which(program) or pytest.skip(f"{program} is not installed")
    tmux = b"tmux -L moltis-inner -f /dev/null "
    status, left = rb"(?s:\[0\].*)", rb"(?s:\[detached.*)"
    recorder = Recorder([bash, "--norc"], tmp_path)
    try:
        recorder.read()
        recorder.type(b"script -qc 'bash --norc' /dev/null\r")
        recorder.type(b"ls --color /\r")
        recorder.type_until(tmux + b"new 'bash --norc'\r", status)
        recorder.type(b"seq 40\r")
        recorder.type_until(b"\x02d", left)
        recorder.type(b"echo left\r")
        recorder.type_until(tmux + b"attach\r", status)
        recorder.type(b"echo entered\r")
        recorder.type_until(b"\x02d", left)
        recorder.type(b"exit\r")
    finally:
        recorder.close()
        subprocess.run(
            ["tmux", "-L", "moltis-inner", "kill-server"],
            env={**os.environ, "TMUX_TMPDIR": str(tmp_path)},
            check=False,
        )
    assert compare({"inside": recorder.output}) == []


def layers(step):
    """Return what docker prints of layers that are being fetched."""
    lines = (
        f"\x1b[2K\r{name}: Downloading [{'=' * step}>{' ' * (9 - step)}] {step} MB\r\n"
        for name in ("4f4fb700ef54", "0a9d3f1b2c3d", "e1caac4eb9d2")
    )
    return "\x1b[3A" + "".join(lines)


def packages(step):
    """Return what apt prints: lines above a bar, which stays in the last row."""
    bar = "\x1b7\x1b[24;0f\x1b[42m\x1b[30mProgress: [{:3}%]\x1b[49m\x1b[39m [{}] \x1b8"
    return f"Setting up package-{step} (1.{step}) ...\r\n" + bar.format(
        step * 10, "#" * step + "." * (10 - step)
    )


def test_progress_of_apt_and_docker_looks_as_in_xterm(compare):
    steps = range(10)
    docker = "Using default tag\r\n" * 22 + "\r\n" * 3 + "".join(map(layers, steps))
    apt = "\n" * 23 + "\x1b7\x1b[0;23r\x1b8\x1b[1A" + "".join(map(packages, steps))
    apt += "\x1b7\x1b[0;24r\x1b8\x1b[1A\x1b[J"
    assert compare({"docker": docker.encode(), "apt": apt.encode()}) == []


# -- what they might print -----------------------------------------------------

TEXTS = ["a", "hello", "w" * 30, "z" * 85, "中", "日本", "é", "e\u0301", "😀", "한"]
TEXTS += ["\u0301", "👨\u200d👩", "🇩🇪", "❤\ufe0f", "\x1b]8;;https://x.test\x1b\\"]
TEXTS += [
    f"one\r\n{'z' * 170}\r\né\r\n\r\n",
    "\x1b[m\x1b]8;id=1;https://x.test/1\x1b\\to 中\x1b]8;;\x07\x1b[m",
]
CONTROLS = ["\r", "\n", "\r\n", "\b", "\t", "\x0b", "\x0e", "\x0f", "\x07"]
COLOURS = [
    *map(str, (*range(6), 7, 8, 9, *range(21, 26), 27, 28, 29)),
    *("31", "39", "42", "49", "53", "55", "95", "103", "38;5;200", "48;5;17"),
    *("38;2;1;2;250", "48;2;9;8;7", "38:5:77", "58;5;3", "4:3"),
    *("38:2::1:2:250", "48:2:9:8:7", "38;4;5"),
]
MODES = [
    *map("?{}".format, (1, 6, 7, 9, 12, 25, 45, 47, 66, 1000, 1002, 1003, 1004, 1006)),
    *("?1047", "?1048", "?1049", "?2004", "?2026", "?1;2004", "4", "20"),
]
ESCAPES = [
    *"78DEHM=>no~}|",
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
        few = chance.choice(("", "1", "2", "3", "5"))
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


def size(chance):
    """Return columns and rows: like those before, of a phone, of a wall, or too few."""
    near = (chance.randint(70, 90), chance.randint(20, 28))
    far = (chance.randint(12, 130), chance.randint(5, 40))
    extreme = (chance.choice([2, 3, 200]), chance.choice([1, 2, 3, 60]))
    return chance.choices([near, far, extreme], [4, 3, 1])[0]


WORDS = ["a", "中文", "é", "e\u0301", "w" * 30, "z" * 170, "日" * 45, "\x1b[44m \x1b[K"]
WORDS += ["\x1b[41mred\x1b[m", "\x1b[H\x1b[2J", "\x1b7", "\x1b8", "\x1b[5A", "\x1b[3g"]
WORDS += ["\tt", "\x1b[9C\x1bH", "\x1b[1K", "\x1b[K", "y" * 80]


def pieces_and_sizes(chance, kind):
    """Return pieces of output with sizes between them.

    Some is left out: xterm.js keeps rows of an alternate screen that was made lower
    unseen, takes the row that scrolls out of one of a single row for the new one, and
    fails on `CSI 1 J` in the last cell.
    """
    if kind == "alternate":
        yield b"one\r\n" * 30 + b"\x1b[?1049h"
    for _ in range(12):
        if kind == "lines":
            words = chance.choices(WORDS, k=8)
            ends = chance.choices(["\r\n", "\r\n\r\n", " ", ""], k=8)
            text = "".join(word + end for word, end in zip(words, ends))
        else:
            text = "".join(piece(chance) for _ in range(20))
            text = re.sub(r"\?(47|1047|1049)(?!\d)", "?7", text).replace("[1J", "[J")
        yield text.encode()
        columns, rows = size(chance)
        yield columns, max(rows, 2 if kind == "alternate" else 1)
    yield b"\x1b[?1049lend"


@pytest.mark.parametrize("kind", ["lines", "sequences", "alternate"])
def test_sizes_between_pieces_of_output_look_as_in_xterm(compare, kind):
    """Also what scrolled out, both screens, and wide characters at the edge."""
    streams = {
        f"seed {seed}": list(pieces_and_sizes(random.Random(seed), kind))
        for seed in range(12)
    }
    assert compare(streams) == []


RARE = {
    "wide at an edge that does not wrap": ["\x1b[?7l", [2, 2], "😀日本"],
    "half at an edge, and a wider row": [
        *("\x1b[B\nello\x1b[6;14r\na\x1b[?7l", [3, 3]),
        *("\x1b[53;22;4m日本\n", [200, 3]),
    ],
    "half where a row was wider": ["\x1b[?1049h│中\x1b[7m", [2, 60], " ", [74, 39]],
    "more repeated than fits": [[2, 2], "😀\x1b[5b"],
    "repeated after a size": ["\x1b[11d" + "z" * 85 + "\x1b[Hw", [42, 39], "\x1b[2b"],
    "repeated after what is none": ["a\x1b[1?h\x1b[b\x1b^pm\x1b\\b\x1b^x\x1b[3b"],
    "repeated after a cancel": ["a\x18\x1b[3b"],
    "a link whose row is gone": ["\x1b]8;;https://x.test\x1b\\\x1b[2Ma"],
    "a mark that follows a control": ["e\x1b[1m\u0301\r\u0301\u0301b\x1b[2G\x1b[P"],
    "a mark at the edge": ["w" * 80 + "\x1b[1m\u0301\u0301a"],
    "a mark of a wide one that did not fit": ["\x1b[?7l\x1b[99Ca\bb👨\u200d👩c"],
    "moves within a region": ["\x1b[9;13r\x1b[?6h\x1b[3Ca\x1b[Ab\x1b[5Gc\x1b#8"],
    "a saved row of a screen cleared with its scrollback": [
        "\n" * 30 + "\x1b[9;9H\x1b7\x1b[3J\x1b8a"
    ],
    "a link when the cursor is restored": [
        *(
            "\x1b7\x1b]8;;https://x.test\x1b\\a\x1b8b\x1b[4mc\x1b[0md\x1b7\x1b]8;;\x1b\\"
        ),
        *("e\x1b[4m\x1b8f\x1b[#8"),
    ],
    "an alignment in a link": ["\x1b]8;;https://x.test\x1b\\\x1b[4m\x1b#8"],
    "colours after colons": ["\x1b[38:2::1:2:3ma\x1b[48:2:9:8:7mb\x1b[38:5mc"],
    "a colour of an unknown kind": ["\x1b[38;4;5;1;2;3;31ma\x1b[38:4:1:2:3mb"],
    "another character set": ["\x1b)0\x1b~qx\x1b*0\x1b}qx\x0fq\x1b+0\x1b|qx"],
}


@pytest.mark.parametrize("case", RARE)
def test_a_rare_case_looks_as_in_xterm(compare, case):
    steps = [s.encode() if isinstance(s, str) else s for s in RARE[case]]
    assert compare({case: steps}) == []


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
    assert show(f"{text}\r\n", [6, 5])["lines"][:3] == ["a中中", "中中中", "中"]
    assert show(f"{text}\r\n", [6, 5], [20, 5])["lines"][0] == text


def test_half_of_a_wide_character_never_stands_at_an_edge_again(compare):
    """The line of the cursor loses the other half when it is cut."""
    text = ("wwa" + "日" * 16).encode()
    assert compare({"half": [text, [34, 17], b"\n", [3, 2]]}) == []


def test_a_saved_cursor_of_the_alternate_screen_stays_on_its_row(show):
    saved = "\x1b[?1049h\x1b[2;1H\x1b7\x1b[5;1H\n\n\x1b8here"
    assert show(saved)["lines"] == ["", "here", "", "", ""]


def test_a_huge_line_is_broken_anew_as_far_as_its_rows_are_kept(run):
    """All of it would be 2,700,000 rows: seconds, and a GiB."""
    script = """
    const screen = new Emulator(1000, 24);
    screen.write(Buffer.from("x".repeat(5_500_000) + "\\r\\nend"));
    let made = 0;
    const {resize} = Row.prototype;
    Row.prototype.resize = function (...size) {
      made += 1;
      resize.apply(this, size);
    };
    screen.resize(2, 24);
    const {rows, base, y} = screen.page;
    console.log(JSON.stringify([made < 12_000, rows.length, base,
      rows.slice(-24).map(row => row.text)[0], rows.every(row => row.goesOn ||
      row === rows.at(base + y))]));
    """
    assert run(script) == [True, 5024, 5000, "xx", True]


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


def test_a_flood_makes_no_cells_of_rows_that_nobody_sees(run):
    script = """
    const screen = new Emulator(80, 24);
    for (let n = 0; n < 100; n += 1) screen.write(Buffer.from("y\\r\\n".repeat(9999)));
    const {rows, dropped} = screen.page;
    const made = rows.filter(row => row.made).length;
    console.log(JSON.stringify([made, rows.length + dropped, rows[0].text]));
    """
    made, count, text = run(script)
    assert made < 24
    assert (count, text) == (100 * 9999 + 1, "y")


def test_a_row_keeps_its_text_alone_of_what_came_with_it(run):
    script = """
    import v8 from "node:v8";
    import vm from "node:vm";
    v8.setFlagsFromString("--expose-gc");
    const collect = vm.runInNewContext("gc");
    const used = () => (collect(), process.memoryUsage().heapUsed);
    const before = used();
    const screen = new Emulator(80, 24);
    const unseen = "\\x1bP" + "x".repeat(60_000) + "\\x1b\\\\";
    for (let n = 0; n < 1000; n += 1)
      screen.write(Buffer.from(unseen + "a row of some length\\r\\n"));
    console.log(used() - before);
    """
    assert run(script) < 16 << 20


@pytest.mark.parametrize(
    "mark",
    [
        *('{"rows": 1e9, "cols": 80}', '{"rows": 24, "cols": 0}', '{"rows": 24}'),
        *('{"rows": 24.5, "cols": 80}', '{"rows": "24", "cols": 80}', "null", "{"),
        '{"rows": 24, "cols": 80, "modes": null}',
    ],
)
def test_a_size_that_no_terminal_has_is_skipped(run, mark):
    script = "console.log(JSON.stringify(decodeMark(Buffer.from(process.argv[2]))))"
    assert run(script, mark) is None
    assert run(script, '{"ms": 1, "rows": 24, "cols": 80}') == {
        "rows": 24,
        "cols": 80,
        "modes": {},
    }


def test_a_number_that_is_too_large_costs_nothing(show):
    began = time.monotonic()
    huge = "99999999999"
    show("".join(f"a\x1b[{huge}{final}" for final in "@ABCDEFGIJKLMPSTXZ`abde"))
    assert time.monotonic() - began < 60  # it would take hours


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


def test_a_title_is_short_and_keeps_the_text_around_it_in_order(show):
    text = "a\u202eb\u2066c\u200fd\u2028e\nf" + "g" * 5000
    assert show(f"\x1b]2;{text}\x07")["title"] == "abcdef" + "g" * 194


def test_a_copy_of_a_screen_goes_on_by_itself(run):
    script = """
    const [begin, rest] = JSON.parse(readFileSync(0, "utf8"));
    const seen = ({page, modes, columns, isAlternate, title}) => JSON.stringify([page.x,
      page.y, columns, isAlternate, title, modes, page.rows.map(row => row.text)]);
    const goOn = screen => {
      screen.parse(rest);
      screen.resize(10, 4);
      return seen(screen);
    };
    const first = new Emulator(20, 5);
    first.parse(begin);
    const before = seen(first);
    const [one, other] = [first.copy(), first.copy()].map(goOn);
    console.log(JSON.stringify([seen(first) === before, one === other,
      goOn(first) === one]));
    """
    begin = "one\r\n中two\x1b[31m\x1b[?2004h\x1b]2;title\x07\x1b[22t\x1b]2;new\x07"
    rest = "C+\x1b8-" + "\r\n" * 5 + "end\x1b[23t\x1b[?1049hother"
    assert run(script, given=[f"{begin}\x1b7abc\x1b[5", rest]) == [True, True, True]


@pytest.fixture
def replay(run):
    """Return a function that runs JavaScript which sees the player of recordings."""
    sections = re.split(r"^// == (.+?) ==$", moltis.WEB_JS.decode(), flags=re.M)
    recording = dict(zip(sections[1::2], sections[2::2]))["view: recording"]
    return lambda script: run(recording + script)


def test_states_of_a_long_recording_are_few_and_equally_far_apart(replay):
    """Each holds what scrolled out; a seek starts from the one before its time."""
    script = """
    player = Object.assign(Object.create(Player.prototype),
      {events: [], states: [], unkept: 0, distance: 10, newest: new Emulator(80, 24)});
    for (let n = 0; n < 70; n += 1) player.add([n, "o", "0123456789"]);
    console.log(JSON.stringify(player.states.map(([next]) => next)));
    """
    assert replay(script) == [*range(4, 69, 4)]


def test_a_long_recording_that_is_loaded_is_sought_at_once_and_loads_in_slices(replay):
    """A person seeks to the end first, and waits no longer for it than for others."""
    script = """
    let time = 0, slices = 0, shown = 0;
    Object.defineProperty(performance, "now", {value: () => (time += 5)}); // ms
    const fields = {}, $ = () => fields, setText = () => null;
    const fill = () => null, setTimeout = done => (slices += 1, done());
    const castPath = () => "/x", ROOT = "", matchMedia = () => ({matches: true});
    const events = Array.from({length: 300}, (_, n) => [n, "o", `line ${n}\\r\\n`]);
    const bytes = new TextEncoder().encode([{version: 2, width: 80, height: 24},
      ...events].map(line => `${JSON.stringify(line)}\\n`).join(""));
    const fetchOk = async () => ({body: new ReadableStream({start(stream) {
      for (let at = 0; at < bytes.length; at += 7)
        stream.enqueue(bytes.slice(at, at + 7));
      stream.close();
    }})});
    player = Object.assign(Object.create(Player.prototype), {events: [], states: [],
      unkept: 0, distance: 100, next: 0, grid: {tail: {resume() {}}}, schedule() {},
      play() {}});
    await player.load();
    const {show} = player;
    player.show = (...event) => (shown += 1, show.call(player, ...event));
    const seen = [299, 150].map(time => {
      player.goTo(time);
      while (!player.isThere) player.proceed();
      return player.emulator.page.rows.at(-2).text;
    });
    console.log(JSON.stringify([player.events.length, fields.max, slices > 9, ...seen,
      shown < 30]));
    """
    assert replay(script) == [300, 299, True, "line 299", "line 150", True]


def test_a_replay_plays_on_where_a_seek_jumps_to_a_state(replay):
    """To jump while it plays would drop what scrolled out and draw all rows anew."""
    script = """
    Object.defineProperty(performance, "now", {value: () => 1000}); // ms
    const fields = {value: 4, checked: false};
    const $ = () => fields;
    const requestAnimationFrame = () => null;
    const events = [..."abcdefgh"].map((letter, n) => [n / 10, "o", letter]);
    player = Object.assign(Object.create(Player.prototype), {width: 80, height: 24,
      events, states: [], next: 0, isPlaying: true, drawnAt: 900, grid: {},
      emulator: new Emulator(80, 24), schedule() {}});
    for (const count of [3, 7]) {
      const state = new Emulator(80, 24);
      for (const event of events.slice(0, count)) player.show(state, event);
      player.states.push([count, state]);
    }
    const seen = [];
    const note = (before = player.emulator) =>
      seen.push([player.emulator.page.row.text, player.emulator === before]);
    player.seek(0.1);
    const first = player.emulator;
    player.go(); // beyond the first state
    note(first);
    player.seek(0.65);
    note(first);
    player.seek(0);
    note(first);
    console.log(JSON.stringify(seen));
    """
    played, *sought = replay(script)
    assert played == ["abcdef", True]
    assert sought == [["abcdefg", False], ["a", False]]


def test_a_replay_skips_pauses(replay):
    script = """
    Object.defineProperty(performance, "now", {value: () => 1000}); // ms
    const fields = {value: 1, checked: false};
    const $ = () => fields;
    const requestAnimationFrame = () => null;
    player = Object.assign(Object.create(Player.prototype), {width: 80, height: 24,
      events: [[0, "o", "a"], [60, "o", "b"], [61, "o", "c"]], states: [], next: 0,
      isPlaying: true, grid: {}, emulator: new Emulator(80, 24), schedule() {}});
    player.seek(0.95);
    const seen = [];
    for (fields.checked of [false, true]) {
      player.drawnAt = 900;
      player.go();
      seen.push(player.at, player.emulator.page.row.text);
    }
    console.log(JSON.stringify(seen));
    """
    assert replay(script) == [1.05, "a", 60, "ab"]


def test_a_seek_that_takes_long_leaves_the_page_usable_until_it_is_there(replay):
    script = """
    let time = 0;
    Object.defineProperty(performance, "now", {value: () => (time += 5)}); // ms
    const events = [..."a".repeat(100)].map((letter, n) => [n / 10, "o", letter]);
    let slices = 0;
    player = Object.assign(Object.create(Player.prototype), {width: 200, height: 24,
      events, states: [], next: 0, emulator: new Emulator(200, 24),
      schedule() { slices += 1; }});
    player.seek(99);
    const begun = player.next;
    while (!player.isThere) player.proceed();
    console.log(JSON.stringify([begun < 20, slices > 4, player.emulator.page.x]));
    """
    assert replay(script) == [True, True, 100]


def test_after_a_full_reset_nothing_is_left(show):
    seen = show("x\r\n" * 30 + "\x1b[31m\x1b[?1049h\x1b(0\x1bcq")
    assert seen["lines"] == ["q", "", "", "", ""]


COLOURED = """
const [flags, ink, ground] = JSON.parse(readFileSync(0, "utf8"));
const {color, exact, background} = styleOf(flags, ink, ground);
console.log(JSON.stringify({color, exact, background}));
"""
CONTRASTS = """
const colors = [...Array(256).keys(), RGB, RGB | 0xffffff, RGB | 0x777777, RGB | 0x46];
const levels = (text, usual) => (text ? text.match(/\\d+/g).map(Number) : usual);
const faint = [];
for (const flags of [0, INVERSE]) for (const ink of [-1, ...colors])
  for (const ground of [-1, ...colors]) {
    const {color, background} = styleOf(flags, ink, ground);
    if (!isReadable(levels(color, SCREEN_INK), levels(background, SCREEN)))
      faint.push([flags, ink, ground]);
  }
console.log(JSON.stringify(faint));
"""


def test_text_can_be_read_in_each_colour_on_each_other(run):
    """WCAG 2.1, 1.4.3"""
    assert run(CONTRASTS) == []


def test_what_can_be_read_keeps_its_colour_and_a_picture_does_in_any_case(run):
    assert run(COLOURED, given=[0, 82, -1])["color"] == "rgb(95,255,0)"
    dark = run(COLOURED, given=[0, 17, 18])
    assert dark["exact"] == "rgb(0,0,95)"
    assert dark["background"] == "rgb(0,0,135)"
    assert dark["color"] != dark["exact"]
    script = "console.log(JSON.stringify(styleOf(0, 17, 18).colorOf('\u2580')))"
    assert run(script) == "rgb(0,0,95)"


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


def test_ctrl_makes_controls_on_keyboards_of_other_scripts(press):
    """Browsers name the Cyrillic or Greek letter, not the Latin one in its place."""
    keys = {"с": "KeyC", "В": "KeyD", "ψ": "KeyC", "я": "KeyZ"}
    events = [{"key": key, "code": code} for key, code in keys.items()]
    held = [{**event, "ctrlKey": True} for event in events]
    assert press(*held) == ["\x03", "\x04", "\x03", "\x1a"]
    assert press(*events) == [None] * 4
    assert press({"key": "é", "code": "KeyW", "ctrlKey": True}) == [None]
    brackets = {"х": "BracketLeft", "ъ": "BracketRight"}
    events = [{"key": key, "code": code} for key, code in brackets.items()]
    assert press(*({**event, "ctrlKey": True} for event in events)) == ["\x1b", "\x1d"]


def test_alt_makes_meta_on_keyboards_of_other_scripts(press):
    held = {"altKey": True}
    assert press({"key": "и", "code": "KeyB", **held}) == ["\x1bb"]
    shifted = {"key": "Б", "code": "Comma", "shiftKey": True, **held}
    assert press(shifted) == ["\x1b<"]
    assert press({"key": "∫", "code": "KeyB", **held}, is_mac=True) == [None]


def test_a_character_wins_over_ctrl_and_alt(press):
    """They are AltGr on some systems, where some browsers type nothing themselves."""
    held = {"ctrlKey": True, "altKey": True}
    events = [{"key": "@", "code": "KeyQ"}, {"key": "{", "code": "Digit7"}]
    assert press(*({**event, **held} for event in events)) == ["@", "{"]


@pytest.mark.parametrize(
    ("event", "is_mac"),
    [
        ({"key": "a"}, False),
        ({"key": "q", "code": "KeyA", "ctrlKey": True, "altKey": True}, False),
        ({"key": "с", "code": "KeyC", "ctrlKey": True, "altKey": True}, False),
        ({"key": "ƒ", "code": "KeyF", "ctrlKey": True, "altKey": True}, True),
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


COSTLY = [  # what stands first, and what is repeated
    *(("", f"\x1b[99999{final}") for final in "ABCDGILMPSTXZ@bdhlm"),
    *(("", f"\x1b{final}") for final in "78=>DEHMPXc[]#"),
    *(
        ("", text)
        for text in ("\x1b[2J", "\x1b[3J", "\x1b[2Ja\n", "\x1b#8", "\t", "a\b")
    ),
    *(
        ("", text)
        for text in ("\n", "a", "\u0301", "a\u0301", "\U0001f468\u200d", "\a")
    ),
    *(("", text) for text in ("\x1b[?1049h\x1b[?1049l", "\x1b[22;0t", "\x1b[6n")),
    *(("", text) for text in ("\x1b[31ma\x1b[32mb", "\x1b[38;2;1;2;3ma", "\x1bH\t")),
    *(("", text) for text in ("\x1b]8;;http://a\x1b\\a", "\x1b[?2026h", "\x0e\x0f")),
    *((first, "1;") for first in ("\x1b[", "\x1b]0;", "\x1b]8;", "\x1bP")),
    ("\x1b[H", "\x1bM"),
    ("\x1b[2;3r", "\n"),
]


def test_no_output_costs_a_terminal_more_than_its_size(run):
    """Eight times as much may take 24 times as long; a square would take 64."""
    assert not run(
        """
        const shapes = JSON.parse(readFileSync(0, "utf8"));
        function time(first, unit, size) {
          const text = first + unit.repeat(size / unit.length);
          const emulator = new Emulator(80, 24);
          const start = process.cpuUsage().user;
          for (let at = 0; at < text.length; at += 2048) {
            emulator.parse(text.slice(at, at + 2048));
          }
          return (process.cpuUsage().user - start) / 1000;
        }
        const isLinear = ([first, unit]) => {
          let [small, large] = [Infinity, Infinity];
          for (let n = 0; n < 6; n += 1) { // other programs take time from some
            small = Math.min(small, time(first, unit, 5_000));
            large = Math.min(large, time(first, unit, 40_000));
            if (large < Math.max(24 * small, 50)) return true; // small is about 1 ms
          }
          return false;
        };
        console.log(JSON.stringify(shapes.filter(shape => !isLinear(shape))));
        """,
        given=COSTLY,
    )


def test_a_paste_costs_its_size_and_no_square_of_it(run):
    """Eight times as much may take 24 times as long; a square would take 64."""
    text = moltis.WEB_JS.decode()
    start = text.index("const MAX_INPUT = ")
    typed_input = text[start : text.index("\n// == ", start)]
    script = """
    function time(size) {
      const began = process.cpuUsage().user;
      let arrived = 0;
      const input = new TypedInput((offset, data) => (arrived = offset + data.length));
      input.type(new Uint8Array(size), false);
      input.take({offset: 0, resume: true});
      for (let offset = 0; offset < size; offset = Math.min(offset + 2048, arrived))
        input.take({offset});
      input.take({offset: size});
      const {length} = input.kept.buffer;
      if (arrived !== size || length) throw Error(`${arrived} arrived, ${length} kept`);
      return (process.cpuUsage().user - began) / 1000;
    }
    let isLinear = false;
    for (let n = 0; n < 5 && !isLinear; n += 1) {
      const small = time(1e6);
      isLinear = time(8e6) < Math.max(24 * small, 50);
    }
    console.log(isLinear);
    """
    assert run(typed_input + script)


@pytest.mark.parametrize("others", ["", "other"], ids=["alone", "others type"])
def test_what_was_typed_before_a_reconnect_is_not_typed_again(run, others):
    """A program that shows no echo, as for a password, reports nothing for long."""
    text = moltis.WEB_JS.decode()
    start = text.index("const MAX_INPUT = ")
    typed_input = text[start : text.index("\n// == ", start)]
    script = """
    let program = "", isUp = true;
    const bytes = text => new TextEncoder().encode(text);
    const input = new TypedInput((offset, data) => {
      // The gateway takes what follows, and the node skips what it has.
      if (!isUp || offset > program.length) return;
      program += new TextDecoder().decode(data).slice(program.length - offset);
    });
    input.take({offset: 0, resume: true});
    for (const key of "secret") input.type(bytes(key), false);
    isUp = false;
    input.pause();
    input.type(bytes("12"), true);
    program += OTHERS;
    isUp = true;
    input.take({offset: program.length, resume: true});
    input.type(bytes("\\r"), false);
    console.log(JSON.stringify(program));
    """
    script = script.replace("OTHERS", json.dumps(others))
    assert run(typed_input + script) == f"secret{others}12\r"


def test_a_terminal_whose_start_was_lost_is_started_again_with_its_id(run):
    """Else its shell would go on unseen, or never have begun."""
    script = moltis.WEB_JS.decode()
    session = re.search(r"^class TerminalSession .*?^}", script, re.M | re.S)[0]
    steps = """
    const state = {link: "up", jobs: new Map(), terminals: new Map()}, calls = [];
    const TERMINAL = "terminal", isOpen = () => true, learn = () => {};
    class TypedInput {
      pause() {}
    }
    let breaks = true;
    const link = {
      reopen: () => calls.push("reopen"),
      async call(method, {jobs: [{id}]}) {
        calls.push(`${method} ${id}`);
        if (breaks) throw Object.assign(new Error("lost"), {isLost: true});
        return {jobs: [{}]};
      },
    };
    const terminal = new TerminalSession("the-id", {rows: 24, cols: 80});
    await terminal.start("pi");
    const {problem} = terminal;
    terminal.pause();
    breaks = false;
    await terminal.follow();
    await terminal.follow();
    console.log(JSON.stringify([problem, calls, terminal.follows]));
    """
    started = "job.start the-id"
    assert run(session + steps) == ["", [started, "reopen", started], True]
