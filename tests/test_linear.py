"""What strangers, nodes and models write costs time in proportion to its length.

Each parser gets its bad shapes at two sizes, the larger eight times the smaller: work
that grows with the square takes 64 times as long.
"""

from __future__ import annotations

import contextlib
import gc
import io
import re
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from peers import InProcessGateway
from support import ScriptedServer

import moltis

LARGE = 100_000  # bytes, unless a parser's own bound is lower
GROWTH = 8  # from the smaller size to the larger
TOLERANCE = 3  # caches and a busy machine cost something too
NOISE = 0.004  # s; shorter times are not compared
EXPECTED = (ValueError, moltis.MoltisError)


def cost(action, clock=time.thread_time):
    """Return the shortest of a few times, in seconds of CPU; one if that is long."""
    times = []
    gc.disable()  # it would look at what other tests have left
    try:
        while len(times) < 3 and sum(times) < 0.05:
            start = clock()
            with contextlib.suppress(*EXPECTED):
                action()
            times.append(clock() - start)
    finally:
        gc.enable()
    return min(times)


def check_growth(action, large=LARGE, clock=time.thread_time, noise=NOISE):
    """Fail if `action(size)` grows by more than the size does."""
    small = cost(lambda: action(large // GROWTH), clock)
    assert small < 5, f"{small:.1f} s for a part of it"
    for _ in range(3):  # a busy machine may disturb one
        big = cost(lambda: action(large), clock)
        if big <= max(small, noise) * GROWTH * TOLERANCE:
            return
    raise AssertionError(f"{small:.4f} s, and {big:.4f} s for {GROWTH} times as much")


def filled(unit, size, before="", after=""):
    """Return `unit` as often as it takes, between the texts around it."""
    return before + unit * max(1, size // len(unit)) + after


def shapes(parser, *rows):
    """Return parameters: a parser, and (unit, before, after) of its input."""
    return [
        pytest.param(parser, *row, *[""] * (3 - len(row)), id=f"{parser.__name__}-{n}")
        for n, row in enumerate(rows)
    ]


def pattern(name, text):
    """Return a function that looks for all of a pattern."""

    def search(value):
        return re.findall(text, value)

    search.__name__ = name
    return search


# -- a text in, a value or a refusal out ---------------------------------------------


def json_depth(text):
    moltis.from_json(text)


def envelope(text):
    moltis.decode_envelope(text)


def tool_arguments(text):
    moltis.read_tool_call("id", "exec", text)


def scram_server_first(text):
    moltis.ScramServer(lambda _: None, None).first(text)


def scram_client_final(text):
    moltis.ScramClient("user", "secret").final(text)


def scram_client_verify(text):
    moltis.ScramClient("user", "secret").verify(text)


def server_address(text):
    moltis.ServerUrl.parse(text)


def ollama_address(text):
    moltis.ollama_url(text)


def node_name(text):
    moltis.valid_name(text)


def allowed_pattern(text):
    command = moltis.CommandSpec(command="git log --oneline")
    moltis.AllowedCommands([text]).check(command)


def allowed_command(text):
    patterns = ["git *", "*a*a*a*b", "*[!x]*[a-z]*?c", "echo 'a'*"]
    moltis.AllowedCommands(patterns).check(moltis.CommandSpec(command=text))


def terminal_text(text):
    re.sub(moltis.TERMINAL_CONTROLS, "", text)


def visible_text(text):
    moltis.visible(text)
    moltis.printable(text)
    moltis.clip(text, 1000)


def redacted_text(text):
    moltis.redact(text)


def meminfo(text):
    moltis._linux_memory(text)


def proc_stat(text):
    moltis._linux_cpu_times(text)


def first_number(text):
    moltis._first_number(text)


def fib_trie(text):
    moltis.parse_fib_trie(text)


def if_inet6(text):
    moltis.parse_if_inet6(text)


def ifconfig(text):
    moltis.parse_ifconfig(text)


def program_to_install(text):
    moltis.check_program(text.encode(), "a server")


def tar_attributes(text):
    moltis._pax_fields(text.encode())


def program_name(text):
    moltis.find_binary(text, {"PATH": "/usr/bin"})


def last_line_of_output(text):
    moltis.newest_line(text)


def edited_in_the_middle(text):
    quarter = text[: len(text) // 4]
    moltis.find_edits(text.encode(), f"{quarter}b{quarter}", "c", every=True)


def edited_where_it_overlaps(text):
    moltis.find_edits(text.encode(), text[: len(text) // 2], "b", every=False)


def edited_file(text):
    moltis.find_edits(text.encode(), "a" * 1000 + "b", "c", every=True)


def change_to_show(text):
    moltis.file_diff(text.encode(), b"x\n" + text.encode())


def change_to_lines_that_repeat(text):
    moltis.file_diff(text.encode(), b"a\nb\n" * 99)


def change_in_every_place(text):
    count = len(text) // 4
    old, new = ("".join(f"{n % k}\n" for n in range(count)) for k in (97, 89))
    moltis.file_diff(old.encode(), new.encode())


def recorded_terminal(text):
    recording = moltis.Recording("sh", "pi", 0)
    mark = moltis.to_json(moltis.Mark(0, 24, 80)).encode()
    list(recording.lines(moltis.MARK, mark))
    data = text.encode()
    for start in range(0, len(data), 16):
        list(recording.lines(moltis.STDOUT, data[start : start + 16]))


def terminal_modes(text):
    moltis.TerminalModes().feed(text.encode())


def terminal_modes_in_pieces(text):
    modes, data = moltis.TerminalModes(), text.encode()
    for start in range(0, len(data), 16):
        modes.feed(data[start : start + 16])


def terminal_mark(text):
    moltis.decode_mark(text.encode())


def file_name(text):
    moltis.decode_path(text)
    moltis.encode_path(text)


TEXTS = [
    *shapes(
        json_depth,
        ("[",),
        ('{"a":',),
        ("[],", "[", "[]]"),
        ("[" * 60 + "]" * 60 + ",", "[", "[]]"),
        ("\\ud83d", '"', '"'),
        ('\\"', '"', '"'),
        ("1", "[", "]"),
        ("1", "[0.", "]"),
        (" ", "[", "]"),
        ('"a":1,', "{", '"b":1}'),
    ),
    *shapes(
        moltis.complete_json,
        ("\\\\", '{"a":"'),
        ("\\\\", '{"a":"', "\\"),
        ("\\ud83d\\ude00", '{"a":"', "\\ud83d"),
        ("\\u00e9", '"'),
        ("\\n", '{"a":["', "\\u0"),
        ('"a",', "["),
        ("[",),
        ("]",),
        ('{"a":',),
        ("x", '{"a":"'),
    ),
    *shapes(
        envelope,
        ("x", '{"type":"req","id":"', '"}'),
        ("x", '{"type":"req","id":"1","method":"', '","params":{}}'),
        ("[],", '{"type":"event","event":"a","payload":{"a":[', "[]]}}"),
        ('{"type":"req",',),
    ),
    *shapes(tool_arguments, ('{"a":',), ("[",), ("}",), ("}", '{"a":"'), (" ",)),
    *shapes(
        scram_server_first,
        ("a", "n,,n="),
        (",", "n,,"),
        ("a=b,", "n,,n=u,r=n,"),
        ("-", "p="),
        (",a", "n"),
    ),
    *shapes(
        scram_client_final, ("a", "r="), (",",), ("a=b,", "r=n,s=c2FsdA==,i=4096,")
    ),
    *shapes(scram_client_verify, ("a", "e="), ("A", "v="), (",", "v=A")),
    *shapes(
        server_address,
        ("a.", "ws://"),
        ("a", "ws://"),
        ("é", "ws://"),
        ("é.", "ws://"),
        (":", "ws://[", "]/"),
        ("@", "ws://"),
        ("é", "ws://h/"),
        ("1", "ws://h:"),
        ("?", "ws://h/"),
    ),
    *shapes(ollama_address, ("a",), (":",), ("[",), ("/",), ("1", "h:")),
    *shapes(node_name, (" ",), ("a ",), ("\t\n",), ("\u202e",)),
    *shapes(allowed_pattern, ("[",), ("[!",), ("*",), ("[]",), ("[a", "", "]")),
    *shapes(allowed_command, ("a",), (";",), ("$",), ("'",), ("ab",), ("a", "git ")),
    *shapes(terminal_text, ("\x1b[",), ("\x1b]0;",), ("\x9b",), ("a",)),
    *shapes(visible_text, ("\u202e",), ("\x1b",), ("\U000e0041",)),
    *shapes(redacted_text, ("mk_",), ("mk_a ",), ("mdt_-",), (" mk_aaaaaaa!",)),
    *shapes(meminfo, ("a",), ("a:",), ("a:\n",), ("\n", "a:"), (" ", "a:"), ("\n ",)),
    *shapes(proc_stat, ("1", "cpu "), (" 1", "cpu "), (" ", "cpu")),
    *shapes(first_number, ("1",), ("-",), ("1", "0.")),
    *shapes(fib_trie, ("|-- ",), ("|-- a\n",), ("a", "|-- "), (" ", "|-- a\n")),
    *shapes(if_inet6, (" ",), ("0" * 32 + " 1 2 3\n",), ("0",)),
    *shapes(ifconfig, ("\n",), (" ",), ("\n\t",), (":", "\tinet "), ("\tinet ",)),
    *shapes(
        program_to_install,
        ("\n",),
        ('__version__ = "',),
        ("1", '"""moltis:\n__version__ = "', '"\nif __name__ == a\n\n'),
        ("if __name__ == \n",),
    ),
    *shapes(program_name, ("a",), ("/",)),
    *shapes(
        tar_attributes,
        ("4 =\n",),
        ("2 ",),
        ("5 a=\n",),
        ("\0", "4 =\n"),
        ("9",),
        (" ",),
    ),
    *shapes(pattern("boot_time", moltis._BOOT_TIME), ("kern.boottime\n",), ("sec = ",)),
    *shapes(pattern("vm_stat", moltis._VM_STAT_PAGE), ("page size of ",), ("1",)),
    *shapes(
        pattern("nvidia_smi", moltis._GPU_ROW),
        ("a",),
        ("a,",),
        (" ", "a,"),
        ("]", "a, ["),
        ("] ", "a, [", "x"),
        ("[", "a, "),
        ("1", "a, ", "x"),
        ("a, 1 \n",),
    ),
    *(
        row
        for name, (_, text) in moltis.RUNTIMES.items()
        for row in shapes(
            pattern(f"version_of_{name}", text),
            ("1",),
            ("1.",),
            ('version "',),
            (".", "1.1"),
            ("1 ",),
        )
    ),
    *shapes(
        last_line_of_output,
        ("\n",),
        ("\x1b[",),
        ("\x1b]",),
        ("\x1b[0",),
        ("0", "\x1b["),
        (" ", "\x1b[0"),
        ("\x1b[0m\n",),
        ("x", "\x1b]"),
    ),
    *shapes(edited_in_the_middle, ("a",)),
    *shapes(edited_where_it_overlaps, ("a",)),
    *shapes(edited_file, ("a",), ("\r\n",), ("a\n",), ("b",), ("a" * 999 + "b\n",)),
    *shapes(change_to_show, ("a\n",), ("\r\n",), ("a\nb\nc\n",), ("a",)),
    *shapes(change_to_lines_that_repeat, ("a\nc\n",), ("a\na\nc\n",)),
    *shapes(change_in_every_place, ("a",)),
    *shapes(recorded_terminal, ("a",), ("\x1b[",), ("\ud7ff",), ("\x00",)),
    *(
        row
        for parser in (terminal_modes, terminal_modes_in_pieces)
        for row in shapes(
            parser,
            ("\x1b",),
            ("\x1b[",),
            ("\x1b[?",),
            ("1;", "\x1b[?"),
            ("\x1b[?1;",),
            ("\x1b[?2004h",),
            ("0", "\x1b[>4;"),
        )
    ),
    *shapes(terminal_mark, ("[",), ('{"modes":',), ('"5":true,', '{"modes":{')),
    *shapes(file_name, ("%",), ("%f",), ("%ff",), ("/",), ("a",), ("%%",)),
    *shapes(
        pattern("too_long_for_a_model", moltis.OVERLONG_PATTERN),
        ("context",),
        ("contextlengt",),
        ("a", "context"),
    ),
]

SMALLER = {  # bytes; what is slow for each character, or refused
    allowed_command: 50_000,
    change_to_lines_that_repeat: 40_000,
    change_in_every_place: 40_000,
}


@pytest.mark.parametrize(("parser", "unit", "before", "after"), TEXTS)
def test_a_parser_s_work_grows_with_the_text(parser, unit, before, after):
    check_growth(
        lambda size: parser(filled(unit, size, before, after)),
        SMALLER.get(parser, LARGE),
    )


# -- bytes, and streams of them ------------------------------------------------------


HEADS = [
    ("a: b\r\n", ""),
    ("a:\r\n", ""),
    ("a", "a: "),
    (" ", "a: "),
    (":", ""),
    ("\r\n", ""),
    (" ", ""),
    (",", "Connection: "),
]


@pytest.mark.parametrize(("unit", "before"), HEADS)
def test_the_answer_to_a_handshake_is_read_in_time(unit, before):
    def read(size):
        head = filled(unit, size, "HTTP/1.1 101 x\r\n" + before)
        moltis.check_upgraded(head.encode(), "key")

    check_growth(read)


def test_the_head_of_an_answer_is_read_in_time():
    def read(size):
        left, right = socket.socketpair()
        with left, right:
            text = filled("\r", size, "HTTP/1.1 200 OK\r\nX: ", "\r\n\r\n")
            writer = threading.Thread(target=right.sendall, args=(text.encode(),))
            writer.start()
            moltis.read_head(left, moltis.Deadline(60))
            writer.join()

    check_growth(read, 60_000)


def test_the_type_of_an_answer_is_read_in_time():
    def answer(handler):
        headers = {"Content-Type": 'multipart/a;"' + ";" * int(handler.path[1:])}
        return 200, headers, [b"ok"]

    with ScriptedServer(answer) as server:

        def read(size):
            with moltis.http_exchange("GET", f"{server.url}/{size}") as response:
                assert response.read() == b"ok"

        check_growth(read, 60_000, clock=time.process_time, noise=0.05)


def der(tag, content):
    size = len(content).to_bytes(4, "big")
    return bytes([tag, 0x84]) + size + content


CERTIFICATES = {
    "values": lambda size: b"\x05\x00" * (size // 2),
    "a long value": lambda size: der(0x30, bytes(size)),
    "a list of lists": lambda size: der(0x30, der(0x30, b"\x30\x00" * (size // 2))),
    "long lengths": lambda size: b"\x30\xff" * (size // 2),
    "many names": lambda size: certificate(b"\x82\x01a" * (size // 3)),
    "many extensions": lambda size: certificate(b"", b"\x30\x00" * (size // 2)),
}


def certificate(names, more=b""):
    """Return DER with the fields that a certificate needs, and these names."""
    octets = der(0x04, der(0x30, names))
    extension = der(0x30, b"\x06\x03" + moltis._SUBJECT_ALT_NAME + octets)
    dates = der(0x30, b"\x17\x0d260101000000Z" * 2)
    empty = der(0x30, b"")
    fields = b"\x02\x01\x01" + empty * 2 + dates + empty * 2
    extensions = der(0xA3, der(0x30, extension + more))
    return der(0x30, der(0x30, fields + extensions) + empty + b"\x03\x00")


@pytest.mark.parametrize("shape", CERTIFICATES)
def test_a_certificate_is_read_in_time(shape):
    def read(size):
        with contextlib.suppress(ValueError):
            moltis.parse_certificate(CERTIFICATES[shape](size))
        moltis.tls_server_end_point(CERTIFICATES[shape](size))

    check_growth(read, 100_000)  # OpenSSL takes no more


def test_the_certificate_with_many_names_is_one():
    found = moltis.parse_certificate(certificate(b"\x82\x01a" * 3))
    assert found.names == ("DNS:a",) * 3


class Dripping(io.RawIOBase):
    """A body of which few bytes come at a time."""

    def __init__(self, data, piece=64):
        self._rest = io.BytesIO(data)
        self._piece = piece

    def read1(self, _):
        return self._rest.read(self._piece)


@pytest.mark.parametrize("body", [io.BytesIO, Dripping])
@pytest.mark.parametrize(
    "unit", ["\n", "\r\n", "\r", "a", "data:\n", "data: a\n\n", ":", "data:", " "]
)
def test_a_stream_of_a_model_is_split_in_time(body, unit):
    def read(size):
        for _ in moltis._server_sent_data(
            moltis._lines(body(filled(unit, size).encode()))
        ):
            pass

    check_growth(read)


class Lent:
    """The answer of a lent model, which comes in small pieces."""

    def __init__(self, data):
        self._pieces = Dripping(data)
        self.job = SimpleNamespace(away_ms=None)
        self.news = threading.Event()

    def read(self):
        return self._pieces.read1(0) or None


@pytest.mark.parametrize("unit", ["a", '{"kind":"text","text":"a"}\n'])
def test_an_answer_of_a_lent_model_is_split_in_time(unit):
    model = moltis.RemoteModel(None, ("id", "name"), "ollama/m")

    def read(size):
        work = Lent(filled(unit, size).encode())
        for _ in model._events(work, moltis.Cancellation()):
            pass

    check_growth(read, 800_000)


def openai(**delta):
    return {"choices": [{"delta": delta}]}


def openai_call(number, name="", arguments="", call_id=""):
    function = {"name": name, "arguments": arguments}
    call = {"index": number, "id": call_id, "function": function}
    return openai(tool_calls=[call])


def anthropic(kind, text):
    field = {"input_json_delta": "partial_json"}.get(kind, kind.partition("_")[0])
    delta = {"type": kind, field: text}
    return {"type": "content_block_delta", "index": 0, "delta": delta}


TOOL_USE = {"type": "tool_use", "id": "1", "name": "exec", "input": {}}
START = {"type": "content_block_start", "index": 0, "content_block": TOOL_USE}
STOP = {"type": "content_block_stop", "index": 0}
PIECE = "x" * 50
ANSWERS = {  # a reader, what begins, what comes n times (given its number), what ends
    "ollama's words": (
        moltis.OllamaAnswer,
        (),
        lambda n: {"message": {"content": PIECE, "thinking": PIECE}},
        (),
    ),
    "ollama's calls": (
        moltis.OllamaAnswer,
        (),
        lambda n: {"message": {"tool_calls": [{"id": f"c{n}", "function": {}}]}},
        (),
    ),
    "thoughts": (
        moltis.OpenAiAnswer,
        (),
        lambda n: openai(reasoning_content=PIECE, content=PIECE),
        (),
    ),
    "arguments in pieces": (
        moltis.OpenAiAnswer,
        (openai_call(0, "exec", '{"a":"', "1"),),
        lambda n: openai_call(0, "", PIECE),
        (),
    ),
    "arguments in pieces that look whole, each with the name": (
        moltis.OpenAiAnswer,
        (openai_call(0, "exec", '{"a":"'),),
        lambda n: openai_call(0, "exec", PIECE + "}"),
        (),
    ),
    "a name in pieces": (
        moltis.OpenAiAnswer,
        (openai_call(0, "exec"),),
        lambda n: openai_call(0, PIECE),
        (),
    ),
    "calls that get their ids late": (
        moltis.OpenAiAnswer,
        (),
        lambda n: openai_call(n // 2, "exec", "", f"call-{n}" if n % 2 else ""),
        (),
    ),
    "empty arguments": (
        moltis.OpenAiAnswer,
        (openai_call(0, "exec"),),
        lambda n: openai_call(0, "exec", ""),
        (),
    ),
    "many calls": (
        moltis.OpenAiAnswer,
        (),
        lambda n: openai_call(n, "exec", "{}", f"call-{n}"),
        (),
    ),
    "many calls with one id": (
        moltis.OpenAiAnswer,
        (),
        lambda n: openai_call(n, "exec", "{}", "call"),
        (),
    ),
    "words of responses": (
        moltis.ResponsesAnswer,
        (),
        lambda n: {"type": "response.output_text.delta", "delta": PIECE},
        (),
    ),
    "thoughts of responses": (
        moltis.ResponsesAnswer,
        (),
        lambda n: {"type": "response.reasoning_summary_text.delta", "delta": PIECE},
        (),
    ),
    "items of responses": (
        moltis.ResponsesAnswer,
        (),
        lambda n: {
            "type": "response.output_item.done",
            "item": {"type": "function_call", "name": "exec", "call_id": f"c{n % 7}"},
        },
        ({"type": "response.completed", "response": {}},),
    ),
    "anthropic's thoughts": (
        moltis.AnthropicAnswer,
        (),
        lambda n: anthropic("thinking_delta", PIECE),
        (STOP,),
    ),
    "anthropic's words": (
        moltis.AnthropicAnswer,
        (),
        lambda n: anthropic("text_delta", PIECE),
        (STOP,),
    ),
    "anthropic's arguments": (
        moltis.AnthropicAnswer,
        (START,),
        lambda n: anthropic("input_json_delta", PIECE),
        (STOP,),
    ),
}


@pytest.mark.parametrize("shape", ANSWERS)
def test_an_answer_of_a_model_is_put_together_in_time(shape):
    make, first, middle, last = ANSWERS[shape]

    def read(count):
        reader = make("m")
        for document in (*first, *map(middle, range(count)), *last):
            for _ in reader.take(document):
                pass
        reader.finished()

    check_growth(read, large=20_000)


def test_a_conversation_is_made_ready_in_time():
    def prepare(count):
        talk = [
            moltis.ChatMessage(("user", "assistant")[n % 2], "a") for n in range(count)
        ]
        moltis.compact(moltis.settle_tool_calls(talk), count // 2)

    check_growth(prepare, large=8_000)


def test_frames_are_taken_apart_in_time():
    def read(size):
        parser = moltis.FrameParser(masked=False, max_frame=1000)
        parser.feed(b"\x82\x00" * (size // 2))
        while parser.next_frame() is not None:
            pass

    check_growth(read, 200_000)


def test_a_message_in_many_fragments_is_put_together_in_time():
    def read(size):
        protocol = moltis.WebSocketProtocol(client=True)
        data = b"\x02\x01a" + b"\x00\x01a" * (size // 3)
        protocol.receive(data)

    check_growth(read, 200_000)


# -- a gateway -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def proxied(tmp_path_factory):
    proxies = moltis.TrustedProxies(["127.0.0.0/8"])
    with InProcessGateway(tmp_path_factory.mktemp("gw"), proxies=proxies) as gateway:
        yield gateway


LINES = {
    "request line": ("GET /", "a"),
    "slashes": ("GET ", "/"),
    "words": ("GET", " a"),
    "path of a page": ("GET /chat/", "%2f"),
    "query": ("GET /api/audit.csv?", "a=&"),
    "cookies": ("GET / HTTP/1.1\r\nHost: h\r\nCookie: ", "a;"),
    "nameless cookies": ("GET / HTTP/1.1\r\nHost: h\r\nCookie: ", "=;"),
    "quoted cookies": ("GET / HTTP/1.1\r\nHost: h\r\nCookie: ", 'a="\\'),
    "hops": ("GET / HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: ", "127.0.0.1,"),
    "no hops": ("GET / HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: ", ","),
    "ports": ("GET / HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: ", "[::1]:1,"),
    "schemes": ("GET / HTTP/1.1\r\nHost: h\r\nX-Forwarded-Proto: ", "https,"),
    "hosts": ("GET / HTTP/1.1\r\nHost: h\r\nX-Forwarded-Host: ", "h,"),
    "host": ("GET / HTTP/1.1\r\nHost: ", "a."),
    "brackets": ("GET / HTTP/1.1\r\nHost: ", "["),
    "upgrades": ("GET /ws HTTP/1.1\r\nHost: h\r\nUpgrade: ", ","),
    "origin": ("GET /ws HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nOrigin: ", ":"),
    "white space": ("GET / HTTP/1.1\r\nHost: h\r\nA: ", " \t"),
    "continuation": ("GET / HTTP/1.1\r\nHost: h\r\nA: a\r\n", " \r\n"),
    "parameters": ('GET / HTTP/1.1\r\nHost: h\r\nContent-Type: multipart/a;"', ";"),
    "no colon": ("GET / HTTP/1.1\r\nHost: h\r\n", "a"),
}


@pytest.mark.parametrize("shape", LINES)
def test_the_head_of_a_request_is_read_in_time(proxied, shape):
    before, unit = LINES[shape]
    address = ("127.0.0.1", proxied.running.port)

    def ask(size):
        head = filled(unit, size, before, "\r\n\r\n").encode()
        with socket.create_connection(address, timeout=60) as sock:
            with contextlib.suppress(OSError):  # it is answered before it is read
                sock.sendall(head)
                sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while sock.recv(65536):
                    pass

    # Other threads of this process work as well, so small differences say nothing.
    check_growth(ask, 60_000, clock=time.process_time, noise=0.05)


@pytest.mark.parametrize("unit", ["a", " ", "é", ":", "\u202e"])
def test_a_reference_to_a_node_is_looked_up_in_time(proxied, unit):
    with proxied.operator() as client:

        def ask(size):
            client.call("node.describe", {"nodeId": filled(unit, size)})

        check_growth(ask, 400_000, clock=time.process_time, noise=0.05)
