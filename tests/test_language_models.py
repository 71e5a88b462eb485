"""Language models: what each vendor sends, and strictly what we send it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from email.utils import formatdate

import pytest
from support import ScriptedServer, free_port, wait_for

import moltis
from moltis import (
    Cancellation,
    Cancelled,
    ChatMessage,
    ChatRequest,
    ContextTooLong,
    Delta,
    Finished,
    ModelBusy,
    ModelError,
    RpcError,
    ToolCall,
    ToolSpec,
)

EXEC = ToolSpec("exec", "Run it.", {"type": "object", "properties": {}})
HELLO = (ChatMessage("user", "hello"),)


def ndjson(*documents):
    return b"".join(json.dumps(d).encode() + b"\n" for d in documents)


def sse(*documents, done=False):
    events = b"".join(b"data: " + json.dumps(d).encode() + b"\n\n" for d in documents)
    return events + (b"data: [DONE]\n\n" if done else b"")


class Ollama:
    """How Ollama talks, and what it lets pass."""

    content_type = "application/x-ndjson"
    make = moltis.OllamaProvider
    spec = moltis.PROVIDERS[0]
    path = "/api/chat"

    def answer(self, text="", calls=(), thinking="", reason="stop"):
        def chunk(**message):
            message = {"role": "assistant", "content": "", **message}
            return {"model": "m", "message": message, "done": False}

        return ndjson(
            *[chunk(thinking=piece) for piece in pieces(thinking)],
            *[chunk(content=piece) for piece in pieces(text)],
            *[
                chunk(tool_calls=[{"function": {"name": name, "arguments": arguments}}])
                for _, name, arguments in calls
            ],
            {
                "message": {"role": "assistant", "content": ""},
                "done": True,
                "done_reason": reason,
                "prompt_eval_count": 7,
                "eval_count": 3,
            },
        )

    def broken(self, text, message):
        whole = self.answer(text)
        return whole[: whole.index(b'{"message": {"role": "assistant"')] + ndjson(
            {"error": message}
        )

    def error(self, message, kind=""):
        return json.dumps({"error": message}).encode()

    def check(self, headers, body):
        assert set(body) <= {"model", "messages", "stream", "tools", "options"}
        assert body["stream"] is True
        assert set(body["options"]) == {"num_ctx"}
        for message in body["messages"]:
            expected = {"role", "content"}
            if message["role"] == "tool":
                expected = {"role", "content", "tool_name"}
            extra = set(message) - expected
            assert extra <= {"tool_calls", "thinking"}
            assert not extra or message["role"] == "assistant"
            for call in message.get("tool_calls", ()):
                assert set(call) == {"function"}
                assert set(call["function"]) == {"name", "arguments"}
                assert isinstance(call["function"]["arguments"], dict)
        check_function_tools(body)


class OpenAi:
    """How OpenAI talks, and what it lets pass."""

    content_type = "text/event-stream; charset=utf-8"
    make = moltis.OpenAiProvider
    spec = next(s for s in moltis.PROVIDERS if s.id == "openai")
    path = "/chat/completions"

    def answer(self, text="", calls=(), thinking="", reason=None):
        def chunk(delta, finish=None):
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            return {"id": "c", "choices": [choice], "usage": None}

        deltas = [{"role": "assistant", "content": ""}]
        deltas += [{"reasoning_content": piece} for piece in pieces(thinking)]
        deltas += [{"content": piece} for piece in pieces(text)]
        for index, (call_id, name, arguments) in enumerate(calls):
            head = {"name": name, "arguments": ""}
            deltas.append(
                {
                    "tool_calls": [
                        {
                            "index": index,
                            "id": call_id,
                            "type": "function",
                            "function": head,
                        }
                    ]
                }
            )
            deltas += [
                {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}
                for piece in pieces(json.dumps(arguments))
            ]
        return sse(
            *map(chunk, deltas),
            chunk({}, reason or ("tool_calls" if calls else "stop")),
            {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}},
            done=True,
        )

    def broken(self, text, message):
        delta = {"choices": [{"index": 0, "delta": {"content": text}}]}
        return sse(*[delta] * bool(text), {"error": {"message": message}})

    def error(self, message, kind="invalid_request_error"):
        return json.dumps({"error": {"message": message, "type": kind}}).encode()

    def check(self, headers, body):
        assert headers["Authorization"] == "Bearer k-secret"
        assert set(body) <= {"model", "messages", "stream", "stream_options", "tools"}
        assert body["stream"] is True
        open_calls = []
        for message in body["messages"]:
            if open_calls:  # every call's result comes before anything else
                assert set(message) == {"role", "content", "tool_call_id"}
                assert message["role"] == "tool"
                assert message["tool_call_id"] == open_calls.pop(0)
                assert isinstance(message["content"], str)
                continue
            assert message["role"] != "tool"
            extra = set(message) - {"role", "content"}
            assert extra <= {"tool_calls"}
            for call in message.get("tool_calls", ()):
                assert set(call) == {"id", "type", "function"}
                assert call["type"] == "function"
                assert set(call["function"]) == {"name", "arguments"}
                assert isinstance(json.loads(call["function"]["arguments"]), dict)
                assert re.fullmatch("[A-Za-z0-9_-]{1,40}", call["id"])
                open_calls.append(call["id"])
            assert extra or message["content"]
        assert not open_calls
        check_function_tools(body)


class Responses:
    """How OpenAI's Responses API talks, and what it lets pass."""

    content_type = "text/event-stream; charset=utf-8"
    make = moltis.ResponsesProvider
    spec = next(s for s in moltis.PROVIDERS if s.id == "openai")
    path = "/responses"

    def answer(self, text="", calls=(), thinking="", reason=None):
        summary = "response.reasoning_summary_text.delta"
        events = [{"type": "response.created", "response": {"id": "r"}}]
        items = []
        if thinking:
            events += [
                {"type": summary, "item_id": "rs_1", "delta": piece}
                for piece in pieces(thinking)
            ]
            items.append({"type": "reasoning", "id": "rs_1", "encrypted_content": "ZQ"})
        events += [
            {"type": "response.output_text.delta", "item_id": "msg_1", "delta": piece}
            for piece in pieces(text)
        ]
        if text:
            part = {"type": "output_text", "text": text, "annotations": []}
            items.append(
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "assistant",
                    "status": "completed",
                    "content": [part],
                }
            )
        for number, (call_id, name, arguments) in enumerate(calls):
            events += [
                {"type": "response.function_call_arguments.delta", "delta": piece}
                for piece in pieces(json.dumps(arguments))
            ]
            items.append(
                {
                    "type": "function_call",
                    "id": f"fc_{number}",
                    "call_id": call_id,
                    "name": name,
                    "arguments": json.dumps(arguments),
                }
            )
        events += [
            {"type": "response.output_item.done", "output_index": n, "item": item}
            for n, item in enumerate(items)
        ]
        ended = "incomplete" if reason else "completed"
        response = {
            "status": ended,
            "incomplete_details": reason and {"reason": reason},
            "usage": {"input_tokens": 7, "output_tokens": 3},
        }
        return sse(*events, {"type": f"response.{ended}", "response": response})

    def broken(self, text, message):
        whole = self.answer(text)
        return whole[: whole.index(b'data: {"type": "response.output_item')] + sse(
            {"type": "error", "code": "x", "message": message, "param": None}
        )

    def error(self, message, kind=""):
        error = {"message": message, "type": kind or "invalid_request_error"}
        return json.dumps({"error": error}).encode()

    def check(self, headers, body):
        assert headers["Authorization"] == "Bearer k-secret"
        allowed = {"model", "input", "stream", "store", "include", "reasoning", "tools"}
        assert set(body) <= allowed
        assert (body["stream"], body["store"]) == (True, False)
        for item in body["input"]:
            kind = item.get("type", "message")
            assert kind in (
                "message",
                "reasoning",
                "function_call",
                "function_call_output",
            )
            if kind == "message":
                assert item["role"] in ("system", "user", "assistant")
                assert item["content"]
            elif kind.startswith("function_call"):
                assert re.fullmatch("[A-Za-z0-9_-]{1,64}", item["call_id"])
                assert isinstance(item.get("arguments", item.get("output")), str)
        open_calls = [i["call_id"] for i in body["input"] if "arguments" in i]
        assert open_calls == [i["call_id"] for i in body["input"] if "output" in i]
        for tool in body.get("tools", ()):
            fields = {"type", "strict", "name", "description", "parameters"}
            assert set(tool) == fields


class Anthropic:
    """How Anthropic talks, and what it lets pass."""

    content_type = "text/event-stream; charset=utf-8"
    make = moltis.AnthropicProvider
    spec = moltis.PROVIDERS[1]
    path = "/v1/messages"

    def answer(self, text="", calls=(), thinking="", reason=None):
        usage = {"input_tokens": 4, "cache_read_input_tokens": 3, "output_tokens": 1}
        start = {"type": "message_start", "message": {"usage": usage}}
        documents = [start, {"type": "ping"}]
        blocks = []
        if thinking:
            deltas = [
                {"type": "thinking_delta", "thinking": piece}
                for piece in pieces(thinking)
            ]
            deltas.append({"type": "signature_delta", "signature": "c2lnbmVk"})
            head = {"type": "thinking", "thinking": "", "signature": ""}
            blocks.append((head, deltas))
        if text:
            deltas = [{"type": "text_delta", "text": piece} for piece in pieces(text)]
            blocks.append(({"type": "text", "text": ""}, deltas))
        for call_id, name, arguments in calls:
            written = json.dumps(arguments) if arguments else ""
            deltas = [
                {"type": "input_json_delta", "partial_json": piece}
                for piece in ["", *pieces(written)]
            ]
            head = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
            blocks.append((head, deltas))
        for index, (head, deltas) in enumerate(blocks):
            documents.append(
                {"type": "content_block_start", "index": index, "content_block": head}
            )
            documents += [
                {"type": "content_block_delta", "index": index, "delta": delta}
                for delta in deltas
            ]
            documents.append({"type": "content_block_stop", "index": index})
        reason = reason or ("tool_use" if calls else "end_turn")
        documents.append(
            {
                "type": "message_delta",
                "delta": {"stop_reason": reason, "stop_sequence": None},
                "usage": {"output_tokens": 3},
            }
        )
        documents.append({"type": "something_newer", "of": "them"})
        documents.append({"type": "message_stop"})
        return b"".join(
            b"event: " + d["type"].encode() + b"\n" + sse(d) for d in documents
        )

    def broken(self, text, message):
        block = {"type": "content_block_start", "index": 0}
        delta = {"type": "text_delta", "text": text}
        return sse(
            {**block, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": delta},
            {"type": "error", "error": {"type": "api_error", "message": message}},
        )

    def error(self, message, kind="invalid_request_error"):
        value = {"type": "error", "error": {"type": kind, "message": message}}
        return json.dumps(value).encode()

    def check(self, headers, body):
        assert headers["anthropic-version"] == "2023-06-01"
        assert headers["x-api-key"] == "k-secret"
        assert "Authorization" not in headers
        allowed = {"model", "max_tokens", "messages", "stream", "system", "tools"}
        assert set(body) <= allowed
        assert body["stream"] is True
        assert body["max_tokens"] > 0
        roles = [message["role"] for message in body["messages"]]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
        open_calls = []
        for message in body["messages"]:
            assert set(message) == {"role", "content"}
            blocks = message["content"]
            answered = [b["tool_use_id"] for b in blocks if b["type"] == "tool_result"]
            assert answered == open_calls
            assert all(b["type"] == "tool_result" for b in blocks[: len(answered)])
            assert all(b["text"].strip() for b in blocks if b["type"] == "text")
            open_calls = [b["id"] for b in blocks if b["type"] == "tool_use"]
            assert all(re.fullmatch("[A-Za-z0-9_-]+", i) for i in open_calls)
        assert not open_calls
        for tool in body.get("tools", ()):
            assert set(tool) == {"name", "description", "input_schema"}


def pieces(text):
    return [text[i : i + 4] for i in range(0, len(text), 4)]


def check_function_tools(body):
    for tool in body.get("tools", ()):
        assert set(tool) == {"type", "function"}
        assert tool["type"] == "function"
        assert set(tool["function"]) == {"name", "description", "parameters"}


@pytest.fixture(
    params=[Ollama(), OpenAi(), Responses(), Anthropic()],
    ids=["ollama", "openai", "responses", "anthropic"],
)
def vendor(request):
    return request.param


class Script:
    """A vendor's server that sends prepared replies, one after the other."""

    def __init__(self, vendor):
        self.vendor = vendor
        self.replies = []  # (status, headers, chunks)
        self.server = ScriptedServer(self._reply)
        self.provider = vendor.make(
            vendor.spec, self.server.url, "k-secret", first_pause=0.01
        )

    def _reply(self, handler):
        if handler.path == "/api/show":  # of Ollama, before the first question
            self.server.requests.pop()
            return 200, {}, [b"{}"]
        return self.replies.pop(0)

    def stream(self, *chunks, **headers):
        headers = {"Content-Type": self.vendor.content_type, **headers}
        self.replies.append((200, headers, chunks))

    def refuse(self, status, message="no", kind="", **headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.replies.append((status, headers, [self.vendor.error(message, kind)]))

    def ask(self, messages=HELLO, tools=(EXEC,), cancel=None):
        model = moltis.ProviderModel(self.provider, "m")
        return model.stream(messages, tools, cancel or Cancellation())

    @property
    def bodies(self):
        return [json.loads(body) for _, _, _, body in self.server.requests]


@pytest.fixture
def script(vendor):
    script = Script(vendor)
    yield script
    script.server.close()
    for method, path, headers, body in script.server.requests:
        assert (method, path) == ("POST", vendor.path)
        assert headers["Content-Type"] == "application/json"
        vendor.check(headers, json.loads(body))
    assert not script.replies


def text_of(events):
    return "".join(e.text for e in events if isinstance(e, Delta) and e.kind == "text")


def notices(events):
    return [e.text for e in events if isinstance(e, Delta) and e.kind == "notice"]


def body_of(vendor, messages=HELLO, effort="", spec=None):
    provider = vendor.make(spec or vendor.spec, "http://x", "k-secret")
    return provider._body(ChatRequest("m", tuple(messages), (), effort))


@pytest.mark.parametrize(
    ("vendor", "effort", "fields"),
    [
        (Ollama(), "off", {"think": False}),
        (Ollama(), "high", {"think": "high"}),
        (OpenAi(), "off", {"reasoning_effort": "none"}),
        (OpenAi(), "low", {"reasoning_effort": "low"}),
        (Responses(), "off", {"reasoning": {"summary": "auto", "effort": "none"}}),
        (Responses(), "high", {"reasoning": {"summary": "auto", "effort": "high"}}),
        (Anthropic(), "off", {"thinking": {"type": "disabled"}}),
        (Anthropic(), "medium", {"output_config": {"effort": "medium"}}),
    ],
)
def test_the_effort_of_reasoning_is_said_as_each_vendor_has_it(vendor, effort, fields):
    plain, chosen = body_of(vendor), body_of(vendor, effort=effort)
    assert fields.items() <= chosen.items()
    assert not set(plain) & (set(fields) - {"reasoning"})


@pytest.mark.parametrize(
    ("vendor", "effort", "refusal", "then"),
    [
        (Ollama(), "low", '"m" does not support thinking', {}),
        (
            *(Ollama(), "low", 'think value "low" is not supported for this model'),
            {"think": True},
        ),
        (OpenAi(), "high", "Unsupported parameter: 'reasoning_effort'", {}),
        (
            *(OpenAi(), "off"),
            "'reasoning_effort' cannot be 'none'; supported values are: 'low', 'high'",
            {"reasoning_effort": "low"},
        ),
        (
            *(OpenAi(), "high"),
            "`reasoning_effort` must be one of `none` or `default`",
            {},
        ),
        (
            *(Responses(), "low", "Unsupported parameter: 'reasoning.effort'"),
            {"reasoning": {"summary": "auto"}},
        ),
        (
            *(Responses(), "", "must be verified to generate reasoning summaries"),
            {"reasoning": {}},
        ),
        (
            *(Anthropic(), "high", "adaptive thinking is not supported on this model"),
            {"thinking": {"type": "enabled", "budget_tokens": 8192}},
        ),
    ],
)
def test_an_effort_that_is_refused_is_amended_once(vendor, effort, refusal, then):
    body = body_of(vendor, effort=effort)
    provider = vendor.make(vendor.spec, "http://x", "k-secret")
    assert provider._amend(body, ModelError("no", refusal)) == ""
    fields = ("think", "reasoning", "reasoning_effort", "thinking", "output_config")
    assert {name: body[name] for name in fields if name in body} == then


def test_anthropic_keeps_the_prompt_and_the_last_two_turns_of_the_user():
    call = ToolCall("a", "exec", {})
    messages = (
        ChatMessage("system", "be good"),
        ChatMessage("user", "hello"),
        ChatMessage("system", "the machines now"),
        ChatMessage("assistant", "", (call,)),
        ChatMessage("tool", "done", (), "a", "exec"),
    )
    body = body_of(Anthropic(), messages)
    mark = {"cache_control": {"type": "ephemeral"}}
    assert body["system"] == [{"type": "text", "text": "be good", **mark}]
    first, _, last = (turn["content"] for turn in body["messages"])
    assert [b["text"] for b in first] == ["hello", "the machines now"]
    assert mark.items() <= first[-1].items()
    assert mark.items() <= last[-1].items()
    assert str(body).count("ephemeral") == 3


def test_a_later_system_text_ends_the_users_message():
    messages = (*HELLO, ChatMessage("system", "the machines now"))
    for vendor, field in ((OpenAi(), "messages"), (Responses(), "input")):
        assert body_of(vendor, messages)[field] == [
            {"role": "user", "content": "hello\n\nthe machines now"}
        ]


# --- What every provider does ---


def test_an_answer_streams_and_ends_with_the_whole_of_it(script, vendor):
    script.stream(vendor.answer("Grüße, world"))
    *deltas, finished = script.ask()
    assert len(deltas) == 3
    assert text_of(deltas) == "Grüße, world"
    assert finished == Finished(ChatMessage("assistant", "Grüße, world"), "stop", 7, 3)


def test_every_byte_may_come_alone(script, vendor):
    """Also as chunks of HTTP/1.1, RFC 9112 §7.1"""
    calls = [("call_a", "exec", {"command": "ls"})]
    whole = vendor.answer("Grüße", calls, thinking="hm")
    single = [b"1\r\n%c\r\n" % byte for byte in whole]
    script.stream(*single, b"0\r\n\r\n", **{"Transfer-Encoding": "chunked"})
    events = list(script.ask())
    assert text_of(events) == "Grüße"
    assert events[-1].message.tool_calls[0].arguments == {"command": "ls"}


def test_the_stream_may_be_cut_anywhere_into_two_reads(vendor):
    whole = vendor.answer("Grüße", [("call_a", "exec", {"command": "ls"})])
    provider = vendor.make(vendor.spec, "http://nobody", "")
    for cut in range(len(whole) + 1):
        reader = provider.answer("m")
        for data in provider._documents(Reads(whole[:cut], whole[cut:])):
            if data != b"[DONE]":
                list(reader.take(provider._document(data)))
        assert reader.complete
        assert reader.finished().message.text == "Grüße"
        assert reader.finished().message.tool_calls[0].arguments == {"command": "ls"}


class Reads:
    """A response whose body arrives in the given pieces."""

    def __init__(self, *data):
        self._data = [piece for piece in data if piece]

    def getheader(self, name, default):
        return default

    def read1(self, size):
        return self._data.pop(0) if self._data else b""


def test_lines_may_end_with_carriage_return_and_line_feed(script, vendor):
    script.stream(vendor.answer("fine").replace(b"\n", b"\r\n"))
    assert text_of(script.ask()) == "fine"


def test_tool_calls_arrive_whole_and_in_order(script, vendor):
    script.stream(
        vendor.answer(
            "Let me look.",
            [
                ("call_a", "exec", {"command": "uptime", "node": "pi"}),
                ("call_b", "nodes_list", {}),
            ],
        )
    )
    finished = list(script.ask())[-1]
    first, second = finished.message.tool_calls
    assert finished.reason == "stop"
    assert (first.name, first.arguments) == (
        "exec",
        {"command": "uptime", "node": "pi"},
    )
    assert (second.name, second.arguments) == ("nodes_list", {})
    assert first.id
    assert first.id != second.id


def test_thinking_is_told_apart_from_the_answer(script, vendor):
    script.stream(vendor.answer("42", thinking="six times seven"))
    events = list(script.ask())
    thoughts = [event.text for event in events[:-2] if event.kind == "thinking"]
    assert "".join(thoughts) == "six times seven"
    assert text_of(events) == "42"
    assert events[-1].message.text == "42"


def test_an_answer_that_met_its_limit_says_so(script, vendor):
    reason = "max_tokens" if isinstance(vendor, Anthropic) else "length"
    script.stream(vendor.answer("and then", reason=reason))
    assert list(script.ask())[-1].reason == "length"


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("length", "length"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("content_filter", "refusal"),
        ("content_filter: PROHIBITED_CONTENT", "refusal"),
        ("SAFETY", "refusal"),
        ("sensitive", "refusal"),
        ("refusal", "refusal"),
    ],
)
def test_calls_of_an_answer_that_was_cut_or_refused_are_not_run(
    script, vendor, word, reason
):
    script.stream(vendor.answer("and", [("a", "exec", {"command": "ls"})], reason=word))
    finished = list(script.ask())[-1]
    assert (finished.reason, finished.message.text) == (reason, "and")
    assert finished.message.tool_calls == ()


@pytest.mark.parametrize("word", ["max_tokens", "refusal"])
def test_after_an_answer_that_was_cut_or_refused_no_call_is_open(script, vendor, word):
    """Its reasoning came with calls that were not run: fixture `script` checks them."""
    calls = [("a", "exec", {"command": "ls"})]
    script.stream(vendor.answer("and", calls, thinking="hm", reason=word))
    script.stream(vendor.answer("fine"))
    said = list(script.ask())[-1].message
    assert text_of(script.ask((*HELLO, said, ChatMessage("user", "go on")))) == "fine"


@pytest.mark.parametrize(
    "reason",
    [
        *("error", "network_error", "insufficient_system_resource"),
        "function_call_filter: MALFORMED_FUNCTION_CALL",
    ],
)
def test_an_answer_that_an_error_ended_is_not_complete(script, vendor, reason):
    calls = [("a", "exec", {"command": "ls"})]
    script.stream(vendor.answer("half", calls, reason=reason))
    with pytest.raises(ModelError, match="because of an error of its own"):
        list(script.ask())


@pytest.mark.parametrize("reason", ["stop", "error"])
def test_an_answer_without_a_word_is_an_error(script, vendor, reason):
    script.stream(vendor.answer("", reason=reason))
    with pytest.raises(ModelError, match=r"answered nothing|error of its own"):
        list(script.ask())


def test_white_space_is_no_answer(script, vendor):
    script.stream(vendor.answer("\n\n", thinking="hm"))
    with pytest.raises(ModelError, match="answered nothing"):
        list(script.ask())


def test_lines_may_end_with_carriage_return_after_a_byte_order_mark(script, vendor):
    answer = b"\xef\xbb\xbf" + vendor.answer("fine").replace(b"\n", b"\r")
    script.stream(*[answer[at : at + 7] for at in range(0, len(answer), 7)])
    assert text_of(script.ask()) == "fine"


def test_each_piece_may_end_within_a_character(script, vendor, monkeypatch):
    """Row 15"""

    def units(text):
        return [
            bytes(pair).decode("utf-16-le", "surrogatepass")
            for pair in zip(*[iter(text.encode("utf-16-le"))] * 2)
        ]

    monkeypatch.setitem(globals(), "pieces", units)
    calls = [("a", "exec", {"command": "echo \U0001f600"})]
    script.stream(vendor.answer("a\U0001f642b", calls, thinking="\U0001f914"))
    *deltas, finished = script.ask()
    said = {"text": "", "thinking": ""}
    for delta in deltas:
        assert delta.text.encode()
        said[delta.kind] += delta.text
    assert said == {"text": "a\U0001f642b", "thinking": "\U0001f914"}
    assert finished.message.tool_calls[0].arguments == calls[0][2]
    assert moltis.to_json(finished).encode()


def test_half_a_character_alone_is_replaced(vendor):
    reader = vendor.make(vendor.spec, "http://nobody", "").answer("m")
    pieces = ["a\ud83d", "b", "\udc00c"]
    said = [event.text for piece in pieces for event in reader.say(piece)]
    assert said == ["a", "\ufffdb", "\ufffdc"]


@pytest.mark.parametrize(
    "name", ["multi_tool_use.parallel", "", "run: df -h", "x" * 99]
)
def test_a_name_that_a_model_made_up_goes_back_as_apis_take_it(script, vendor, name):
    script.stream(vendor.answer("ok"))
    call = ToolCall("call_a", name, {})
    list(script.ask((*HELLO, ChatMessage("assistant", "", (call,)))))
    sent = json.dumps({**script.bodies[0], "tools": []})
    (found,) = re.findall(r'"name": "([^"]*)"', sent)[:1]
    assert re.fullmatch(moltis.CALL_NAME_PATTERN, found)


@pytest.mark.parametrize(
    ("key", "address"),
    [
        ("sk-\u2019x", "http://127.0.0.1:1"),
        ("sk-a\nb", "http://127.0.0.1:1"),
        ("", "http://127.0.0.1:1/a b"),
        ("", "http://127.0.0.1:1/\u00e9"),
    ],
)
def test_a_key_or_address_that_http_does_not_take_is_said(vendor, key, address):
    provider = vendor.make(vendor.spec, address, key)
    with pytest.raises(ModelError, match="HTTP does not take") as caught:
        provider.models(Cancellation())
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    ["http://[::1", "http://h:99999/v1", "sk-in-the-wrong-place", "ftp://h/v1"],
)
def test_an_address_that_is_none_is_said_but_not_shown(address):
    """It may be a key in the wrong variable."""
    environ = {"OPENAI_BASE_URL": address, "ANTHROPIC_BASE_URL": address}
    for provider in moltis.make_providers(environ, {})[-2:]:
        with pytest.raises(ModelError, match="must look like http://gpu-box") as said:
            provider.models(Cancellation())
        assert address not in str(said.value)
    moltis.make_providers({"OLLAMA_HOST": address}, {})


def test_a_key_may_have_white_space_around_it(vendor):
    provider = vendor.make(vendor.spec, "http://nobody", " k-secret\n")
    assert "k-secret" in "".join(provider._headers().values())
    provider._check_settings()


@pytest.mark.parametrize("status", [307, 308])
def test_a_redirection_is_said_with_its_address(script, vendor, status):
    place = "https://elsewhere.test/v1?key=secret"
    script.replies.append((status, {"Location": place}, []))
    expected = r"redirects to https://elsewhere\.test/v1; enter"
    with pytest.raises(ModelError, match=expected):
        list(script.ask())


def test_a_web_page_for_an_answer_is_said(script, vendor):
    script.replies.append((200, {"Content-Type": "text/html"}, [b"<html>hi</html>"]))
    with pytest.raises(ModelError, match=r"web page|no JSON"):
        list(script.ask())


def test_a_compressed_answer_is_said(script, vendor):
    script.stream(b"\x1f\x8b", **{"Content-Encoding": "gzip"})
    with pytest.raises(ModelError, match="compressed its answer"):
        list(script.ask())


CONVERSATION = (
    ChatMessage("system", "Be brief."),
    ChatMessage("user", "Look around"),
    ChatMessage(
        "assistant",
        "",
        (
            ToolCall("call_a", "exec", {"command": "ls"}),
            ToolCall("call_b", "nodes_list", {}),
            ToolCall("call_c", "exec", {}, malformed='{"comm'),
        ),
    ),
    ChatMessage("tool", "two", tool_call_id="call_b", tool_name="nodes_list"),
    ChatMessage("user", "And hurry"),
    ChatMessage("tool", "one", tool_call_id="call_a", tool_name="exec"),
    ChatMessage("tool", "whose?", tool_call_id="call_x", tool_name="exec"),
    ChatMessage("assistant", " "),
    ChatMessage("assistant", "Done."),
    ChatMessage("user", "Thanks"),
)


def test_each_call_gets_its_result_at_once_and_in_order(script, vendor):
    """What is strictly sent is checked by the fixture; here, that all of it is."""
    script.stream(vendor.answer("ok"))
    list(script.ask(CONVERSATION))
    sent = json.dumps(script.bodies[0])
    texts = ("Be brief.", "Look around", '"one"', '"two"', "No result", "And hurry")
    positions = [sent.index(text) for text in texts[1:]]
    assert positions == sorted(positions)
    assert texts[0] in sent
    assert "whose?" not in sent


def test_ids_that_other_servers_gave_are_made_to_fit(script, vendor):
    odd = ("functions.exec:0", "x" * 90)
    script.stream(vendor.answer("ok"))
    list(
        script.ask(
            (
                *HELLO,
                ChatMessage(
                    "assistant", "", tuple(ToolCall(i, "exec", {}) for i in odd)
                ),
                *(
                    ChatMessage("tool", "", tool_call_id=i, tool_name="exec")
                    for i in odd
                ),
            )
        )
    )


@pytest.mark.parametrize("call_id", ["functions.exec:0", "call.1"])
def test_an_id_that_does_not_fit_is_changed_beside_reasoning_too(
    script, vendor, call_id
):
    """Row 9: the same in call and result: fixture `script` checks it."""
    script.stream(vendor.answer("", [(call_id, "exec", {})], thinking="hm"))
    answer = list(script.ask())[-1].message
    result = ChatMessage("tool", "ok", tool_call_id=answer.tool_calls[0].id)
    script.stream(vendor.answer("fine"))
    assert text_of(script.ask((*HELLO, answer, result))) == "fine"


def test_the_same_id_in_two_answers_stays_with_its_own_result():
    first = ChatMessage("assistant", "", (ToolCall("0", "exec", {}),))
    messages = [
        first,
        ChatMessage("tool", "one", tool_call_id="0"),
        first,
        ChatMessage("tool", "two", tool_call_id="0"),
    ]
    assert moltis.settle_tool_calls(messages) == messages


def test_without_tools_none_are_sent(script, vendor):
    script.stream(vendor.answer("ok"))
    list(script.ask(tools=()))
    assert "tools" not in script.bodies[0]


def test_a_stream_that_breaks_off_is_never_a_finished_answer(vendor):
    """Cut at every byte, it ends with an error, or with all of the text."""
    whole = vendor.answer("abcdefgh", [("call_a", "exec", {"command": "ls"})])
    provider = vendor.make(vendor.spec, "http://nobody", "")
    for cut in range(len(whole)):
        reader = provider.answer("m")
        try:
            for data in provider._documents(Reads(whole[:cut])):
                if data != b"[DONE]":
                    list(reader.take(provider._document(data)))
        except ModelError:
            continue
        if reader.complete:
            finished = reader.finished()
            assert finished.message.text == "abcdefgh"
            assert finished.message.tool_calls[0].arguments == {"command": "ls"}


def test_a_dropped_stream_is_an_error_once_something_was_shown(script, vendor):
    whole = vendor.answer("abcdefgh")
    script.stream(whole[: whole.index(b"efgh")])
    events = []
    with pytest.raises(ModelBusy, match="broke off"):
        iterate_into(events, script.ask())
    assert text_of(events) == "abcd"


def test_a_connection_that_is_reset_is_no_end(script, vendor):
    whole = vendor.answer("abcd")
    cut = whole.index(b"abcd") + 4
    cut = whole.index(b"\n\n" if b"\n\n" in whole else b"\n", cut) + 2
    head = b"%x\r\n" % cut + whole[:cut] + b"\r\n5\r\nab"
    script.stream(head, **{"Transfer-Encoding": "chunked"})
    events = []
    with pytest.raises(ModelBusy):
        iterate_into(events, script.ask())
    assert text_of(events) == "abcd"


def iterate_into(events, stream):
    for event in stream:
        events.append(event)


@pytest.mark.parametrize("length", [0, 20])
def test_a_stream_that_drops_before_its_first_word_is_asked_again(
    script, vendor, length
):
    script.stream(vendor.answer("ok")[:length])
    script.stream(vendor.answer("ok"))
    events = list(script.ask())
    assert text_of(events) == "ok"
    assert "try 2 of 3" in notices(events)[0]


def test_an_error_amid_the_stream_is_an_error(script, vendor):
    """Under HTTP 200, when the answer has begun."""
    script.stream(vendor.broken("abcd", "the GPU fell out"))
    events = []
    with pytest.raises(ModelError, match="the GPU fell out"):
        iterate_into(events, script.ask())
    assert text_of(events) == "abcd"


@pytest.mark.parametrize("status", [429, 500, 503, 529])
def test_a_busy_provider_is_asked_three_times(script, vendor, status):
    for _ in range(3):
        script.refuse(status, "come back later")
    events = []
    with pytest.raises(ModelBusy, match=f"come back later.*{status}"):
        iterate_into(events, script.ask())
    assert [re.search(r"try \d of 3", text).group() for text in notices(events)] == [
        "try 2 of 3",
        "try 3 of 3",
    ]
    assert script.bodies[0] == script.bodies[2]


def test_retry_after_is_honoured(script, vendor):
    script.refuse(429, Retry_After="0.2")
    script.stream(vendor.answer("ok"))
    events = list(script.ask())
    assert "trying again in 0.2 s" in notices(events)[0]
    assert text_of(events) == "ok"


@pytest.mark.parametrize("later", ["3600", formatdate(4102444800, usegmt=True)])
def test_nobody_waits_for_an_hour(script, vendor, later):
    script.refuse(429, "quota", Retry_After=later)
    with pytest.raises(ModelBusy, match="quota") as caught:
        list(script.ask())
    assert caught.value.retry_after > 3000


@pytest.mark.parametrize(
    "message",
    [
        "The encrypted content gAAA...wXBV could not be verified.",
        "messages.1.content.0: Invalid `signature` in `thinking` block",
        "Item 'rs_1' was provided without its required following item.",
        "Thought signature is not valid",
    ],
)
def test_reasoning_that_its_server_refuses_is_left_out(script, vendor, message):
    """It is bound to a key, and to what was said before it, which may be shortened."""
    script.stream(vendor.answer("and", thinking="hm"))
    answer = list(script.ask())[-1].message.replace(text="hello again")
    for _ in range(2):
        script.refuse(400, message)
        script.stream(vendor.answer("fine"))
        again = (*HELLO, answer, ChatMessage("user", "go on"))
        assert text_of(script.ask(again)) == "fine"
    script.stream(vendor.answer("", [("a", "exec", {})], thinking="hm"))
    *_, finished = script.ask()
    first, *_, last = script.bodies
    assert last == first
    assert finished.message.tool_calls


def test_a_request_without_reasoning_is_not_repeated(script, vendor):
    script.refuse(400, "Invalid `signature` in `thinking` block")
    with pytest.raises(ModelError, match="Invalid `signature`"):
        list(script.ask())


def test_a_request_that_is_refused_is_not_repeated(script, vendor):
    script.refuse(400, "no such thing")
    with pytest.raises(ModelError, match="no such thing") as caught:
        list(script.ask())
    assert not isinstance(caught.value, ModelBusy)


def test_a_wrong_key_is_said_without_the_key(script, vendor):
    script.refuse(401, "bad key k-secret")
    with pytest.raises(ModelError, match="is the API key right") as caught:
        list(script.ask())
    assert "k-secret" not in str(caught.value)


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 8192 tokens",
        "prompt is too long: 210000 tokens > 200000 maximum",
        "the request exceeds the available context size, try increasing it",
        "The input token count (1200000) exceeds the maximum number of tokens allowed",
        "This model's maximum prompt length is 131072 but the request has 200000",
        "Please reduce the length of the messages or completion.",
        "Invalid request: Your request exceeded model token limit: 8192",
        "prompt token count of 140000 exceeds the limit of 128000",
        "Input is too long for requested model.",
        "Range of input length should be [1, 30720]",
        "Prompt exceeds max length",
        "total message size 10176584 exceeds limit 2097152",
        "`inputs` tokens + `max_new_tokens` must be <= 4097",
        "The decoder prompt (length 9000) is longer than the maximum model length",
    ],
)
def test_a_conversation_that_is_too_long_has_an_error_of_its_own(script, message):
    script.refuse(400, message)
    with pytest.raises(ContextTooLong):
        list(script.ask())


def test_a_request_that_no_minute_has_room_for_is_too_long(script):
    script.refuse(
        429,
        "Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested "
        "30601. The input or output tokens must be reduced in order to run.",
    )
    with pytest.raises(ContextTooLong):
        list(script.ask())


def test_a_bare_413_is_a_conversation_that_is_too_long(script):
    script.refuse(413, "")
    with pytest.raises(ContextTooLong):
        list(script.ask())


def test_a_page_of_html_is_an_error_that_shows_it(script, vendor):
    script.replies.append((404, {}, [b"<h1>not here</h1>"]))
    with pytest.raises(ModelError, match=r"not here.*404"):
        list(script.ask())


@pytest.mark.parametrize(
    "documents",
    [
        [[1, 2]],
        [{"choices": "x", "message": 3, "type": "content_block_start", "index": "a"}],
        [{"choices": [{"delta": {"tool_calls": [{"function": 5}, 7], "content": {}}}]}],
        [{"message": {"tool_calls": [{"function": []}], "content": 1}}],
        [{"type": "content_block_delta", "index": 9, "delta": {"text": 1}}],
    ],
)
def test_nonsense_is_an_error_and_no_traceback(script, vendor, documents):
    for _ in range(3):
        if vendor.content_type.startswith("text"):
            script.stream(sse(*documents))
        else:
            script.stream(ndjson(*documents))
    with pytest.raises(ModelError):
        list(script.ask())
    script.replies.clear()


def test_an_endless_line_is_given_up(script, vendor, monkeypatch):
    monkeypatch.setattr(moltis, "MAX_MODEL_LINE", 100_000)
    script.stream(*[b"data: " + b"x" * 65536] * 3)
    with pytest.raises(ModelError, match="line"):
        list(script.ask())


def test_where_nobody_listens_the_address_is_named(vendor):
    port = free_port()
    provider = vendor.make(vendor.spec, f"http://127.0.0.1:{port}", "")
    with pytest.raises(ModelError, match=rf"127\.0\.0\.1:{port} cannot be reached"):
        list(provider.stream(ChatRequest("m", HELLO), Cancellation()))


# --- Cancelling ---


def cancel_once(condition, cancel):
    """Cancel from another thread as soon as `condition` holds."""

    def wait():
        wait_for(condition)
        cancel.cancel()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_cancelled_before_it_begins_nothing_is_sent(script):
    cancel = Cancellation()
    cancel.cancel()
    with pytest.raises(Cancelled):
        list(script.ask(cancel=cancel))
    assert not script.server.requests


def test_cancelled_while_the_model_loads(script, vendor):
    cancel = Cancellation()
    released = threading.Event()

    def slow():
        released.wait(60)
        yield vendor.answer("too late")

    script.stream()
    script.replies[0] = (200, {"Content-Type": vendor.content_type}, slow())
    thread = cancel_once(lambda: script.server.requests, cancel)
    with pytest.raises(Cancelled):
        list(script.ask(cancel=cancel))
    released.set()
    thread.join()


def test_cancelled_amid_the_answer(script, vendor):
    cancel = Cancellation()
    released = threading.Event()
    whole = vendor.answer("abcdefgh")
    cut = whole.index(b"efgh")

    def slow():
        yield whole[:cut]
        released.wait(60)
        yield whole[cut:]

    script.replies.append((200, {"Content-Type": vendor.content_type}, slow()))
    stream = script.ask(cancel=cancel)
    assert next(stream) == Delta("text", "abcd")
    cancel.cancel()
    with pytest.raises(Cancelled):
        next(stream)
    released.set()


def test_cancelled_while_waiting_to_try_again(script):
    cancel = Cancellation()
    script.refuse(429, Retry_After="50")
    stream = script.ask(cancel=cancel)
    assert next(stream).kind == "notice"
    thread = cancel_once(lambda: True, cancel)
    with pytest.raises(Cancelled):
        next(stream)
    thread.join()


def test_cancelled_while_connecting(vendor):
    """A listener whose queue is full never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        waiting = []
        for _ in range(4):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(address)
            waiting.append(sock)
        cancel = Cancellation()
        provider = vendor.make(vendor.spec, f"http://127.0.0.1:{address[1]}", "")
        stream = provider.stream(ChatRequest("m", HELLO), cancel)
        thread = cancel_once(lambda: cancel._callbacks, cancel)
        with pytest.raises(Cancelled):
            next(stream)
        thread.join()
        for sock in waiting:
            sock.close()


def test_a_stream_that_nobody_reads_on_closes_its_connection(script, vendor):
    gone = threading.Event()
    whole = vendor.answer("abcdefgh")

    def until_it_breaks():
        try:
            yield whole[: whole.index(b"efgh")]
            while True:
                yield b" "
        finally:
            gone.set()

    script.replies.append(
        (200, {"Content-Type": vendor.content_type}, until_it_breaks())
    )
    stream = script.ask()
    next(stream)
    stream.close()
    assert gone.wait(60)


# --- Ollama alone ---

only_ollama = pytest.mark.parametrize("vendor", [Ollama()], ids=["ollama"])
only_openai = pytest.mark.parametrize("vendor", [OpenAi()], ids=["openai"])
only_anthropic = pytest.mark.parametrize("vendor", [Anthropic()], ids=["anthropic"])


@only_ollama
def test_a_model_without_tools_is_asked_without_them(script, vendor):
    script.refuse(400, "registry.ollama.ai/library/m does not support tools")
    script.stream(vendor.answer("just words"))
    events = list(script.ask())
    assert notices(events) == ["m cannot use tools: it can only talk"]
    assert "tools" not in script.bodies[1]


@only_ollama
def test_the_context_grows_in_doublings_with_the_conversation(script, vendor):
    sizes = []
    for length in (10, 40_000, 10_000_000):
        script.stream(vendor.answer("ok"))
        list(script.ask((ChatMessage("user", "x" * length),)))
        sizes.append(script.bodies[-1]["options"]["num_ctx"])
    assert sizes == [8192, 16384, 65536]


@only_ollama
def test_several_chunks_may_each_carry_several_calls(script):
    def call(name):
        return {"function": {"name": name, "arguments": {}}}

    script.stream(
        ndjson(
            {"message": {"tool_calls": [call("a"), call("b")]}},
            {"message": {"tool_calls": [call("c")]}, "done": True},
        )
    )
    finished = list(script.ask())[-1]
    assert [c.name for c in finished.message.tool_calls] == ["a", "b", "c"]


@only_ollama
def test_thinking_goes_back_to_the_same_model_only(script, vendor):
    script.stream(vendor.answer("", [("", "exec", {})], thinking="hm"))
    message = list(script.ask())[-1].message
    script.stream(vendor.answer("ok"))
    list(script.ask((*HELLO, message)))
    assert script.bodies[1]["messages"][1]["thinking"] == "hm"
    other = moltis.ProviderModel(script.provider, "other")
    script.stream(vendor.answer("ok"))
    list(other.stream((*HELLO, message), (), Cancellation()))
    assert "thinking" not in script.bodies[2]["messages"][1]


# --- OpenAI and its imitators ---


def openai_calls(script, *pieces_of_calls, finish="stop"):
    """Let the server send these tool-call deltas, one a chunk; return the calls."""
    deltas = [
        {"choices": [{"delta": {"tool_calls": [piece]}}]} for piece in pieces_of_calls
    ]
    end = {"choices": [{"delta": {}, "finish_reason": finish}]}
    script.stream(sse(*deltas, end, done=True))
    return list(script.ask())[-1].message.tool_calls


def piece(index=None, call_id=None, name=None, arguments=None):
    value = {"function": {}}
    for key, found in (("index", index), ("id", call_id)):
        if found is not None:
            value[key] = found
    for key, found in (("name", name), ("arguments", arguments)):
        if found is not None:
            value["function"][key] = found
    return value


@only_openai
def test_pieces_are_merged_by_index_although_they_interleave(script):
    calls = openai_calls(
        script,
        piece(0, "a", "exec", ""),
        piece(1, "b", "exec", ""),
        piece(0, arguments='{"command":'),
        piece(1, arguments='{"command":"w"'),
        piece(0, arguments='"ls"}'),
        piece(1, arguments="}"),
        finish="tool_calls",
    )
    assert [(c.id, c.arguments) for c in calls] == [
        ("a", {"command": "ls"}),
        ("b", {"command": "w"}),
    ]


@only_openai
@pytest.mark.parametrize("index", [None, 0])
def test_a_new_id_on_the_same_index_is_a_new_call(script, index):
    """And `finish_reason` may be `stop` although there are calls."""
    calls = openai_calls(
        script,
        piece(index, "a", "exec", '{"command":'),
        piece(index, arguments='"ls"}'),
        piece(index, "b", "exec", '{"command":'),
        piece(index, "b", arguments='"w"}'),
    )
    assert [(c.id, c.arguments) for c in calls] == [
        ("a", {"command": "ls"}),
        ("b", {"command": "w"}),
    ]


@only_openai
@pytest.mark.parametrize("call_id", [None, ""])
def test_missing_ids_are_made_up_and_differ(script, call_id):
    calls = openai_calls(
        script,
        piece(0, call_id, "exec", '{"command":"ls"}'),
        piece(0, call_id, "exec", '{"command":"w"}'),
    )
    assert [c.arguments["command"] for c in calls] == ["ls", "w"]
    assert len({c.id for c in calls}) == 2
    assert all(re.fullmatch("[A-Za-z0-9]{9}", c.id) for c in calls)


@only_openai
def test_the_same_id_on_two_indexes_is_two_calls(script):
    calls = openai_calls(
        script,
        piece(0, "call", "exec", '{"command":"ls"}'),
        piece(1, "call", "exec", '{"command":'),
        piece(1, "call", arguments='"w"}'),
    )
    assert [c.arguments["command"] for c in calls] == ["ls", "w"]
    assert len({c.id for c in calls}) == 2


@only_openai
@pytest.mark.parametrize(
    ("written", "arguments", "malformed"),
    [
        ("", {}, ""),
        (None, {}, ""),
        ("null", {}, ""),
        ({"command": "ls"}, {"command": "ls"}, ""),
        ('{"comm', {}, '{"comm'),
        ("[1]", {}, "[1]"),
        ("NaN", {}, "NaN"),
    ],
)
def test_arguments_are_an_object_or_marked_as_malformed(
    script, written, arguments, malformed
):
    (call,) = openai_calls(script, piece(0, "a", "exec", written))
    assert call == ToolCall("a", "exec", arguments, malformed)


@only_openai
def test_a_server_that_refuses_stream_options_is_asked_without(script, vendor):
    script.refuse(422, "Extra inputs are not permitted: stream_options")
    script.stream(vendor.answer("ok"))
    events = list(script.ask())
    assert notices(events) == []
    assert "stream_options" not in script.bodies[1]


@only_openai
@pytest.mark.parametrize("kind", ["application/json", "text/plain", ""])
@pytest.mark.parametrize("before", [b"", b"\n  \n"])
def test_a_server_that_does_not_stream_is_understood(script, kind, before):
    message = {"role": "assistant", "content": "whole"}
    whole = {"choices": [{"message": message, "finish_reason": "stop"}]}
    written = json.dumps(whole, indent=2).encode()
    script.stream(before, written, **{"Content-Type": kind})
    assert text_of(script.ask()) == "whole"


@only_openai
def test_a_whole_answer_has_a_limit(script, monkeypatch):
    monkeypatch.setattr(moltis, "MAX_MODEL_LINE", 1000)
    script.stream(b"{" + b"\n" * 2000)
    with pytest.raises(ModelError, match="too long"):
        list(script.ask())


@only_openai
def test_events_may_be_called_json(script, vendor):
    script.stream(vendor.answer("fine"), **{"Content-Type": "application/json"})
    assert text_of(script.ask()) == "fine"


@only_openai
def test_an_event_without_data_is_none(script, vendor):
    """HTML Living Standard §9.2.6"""
    script.stream(b"data:\n\nevent: ping\ndata: \n\n" + vendor.answer("fine"))
    assert text_of(script.ask()) == "fine"


@only_openai
def test_comments_and_a_missing_last_line_do_no_harm(script, vendor):
    whole = vendor.answer("ok").replace(b"data:", b": PROCESSING\n\ndata:")
    script.stream(whole.rstrip(b"\n"))
    assert text_of(script.ask()) == "ok"


@only_openai
def test_an_end_without_done_is_an_end(script, vendor):
    script.stream(vendor.answer("ok").replace(b"data: [DONE]\n\n", b""))
    assert list(script.ask())[-1].output_tokens == 3


@only_openai
def test_too_many_tokens_a_minute_are_no_long_conversation(script, vendor):
    script.refuse(429, "Too many tokens, please wait")
    script.stream(vendor.answer("ok"))
    assert text_of(script.ask()) == "ok"


@only_openai
def test_a_used_up_quota_is_not_asked_again(script):
    script.refuse(429, "You exceeded your current quota", "insufficient_quota")
    with pytest.raises(ModelError, match="quota") as caught:
        list(script.ask())
    assert not isinstance(caught.value, ModelBusy)


@only_openai
def test_thinking_comes_under_several_names(script):
    def chunk(**delta):
        return {"choices": [{"delta": delta}]}

    thought = [{"type": "thinking", "thinking": [{"type": "text", "text": "c"}]}]
    said = [{"type": "text", "text": "d"}]
    script.stream(
        sse(
            chunk(reasoning_content="a"),
            chunk(reasoning="b"),
            chunk(content=thought),
            chunk(content=said),
            done=True,
        )
    )
    events = list(script.ask())
    assert "".join(e.text for e in events[:-1] if e.kind == "thinking") == "abc"
    assert events[-1].message.text == "d"


@only_openai
def test_a_refusal_is_read_and_its_calls_are_not_run(script):
    call = piece(0, "a", "exec", "{}")
    script.stream(
        sse(
            {"choices": [{"delta": {"refusal": "I can", "tool_calls": [call]}}]},
            {"choices": [{"delta": {"refusal": "not."}, "finish_reason": "stop"}]},
        )
    )
    *_, finished = script.ask()
    assert (finished.reason, finished.message.text) == ("refusal", "I cannot.")
    assert finished.message.tool_calls == ()


@only_openai
@pytest.mark.parametrize(
    "fragments",
    [
        [
            piece(0, "a", "exec", ""),
            piece(0, "b", "", '{"command":'),
            piece(0, "c", "", '"ls"}'),
        ],
        [piece(0, "", "exec", ""), piece(0, "a", "", '{"command":"ls"}')],
        [
            piece(0, "a", "ex", ""),
            piece(0, "", "ec", ""),
            piece(0, "", "", '{"command":"ls"}'),
        ],
        [piece(0, "a", "exec", '{"comm'), piece(0, "a", "exec", 'and":"ls"}')],
    ],
    ids=["a fresh id each", "name before id", "name in pieces", "name repeated"],
)
def test_fragments_of_one_call_are_one_call(script, fragments):
    (call,) = openai_calls(script, *fragments)
    assert (call.id, call.name, call.arguments) == ("a", "exec", {"command": "ls"})


@only_openai
def test_a_call_without_arguments_may_come_before_another(script):
    calls = openai_calls(
        script,
        piece(0, "a", "nodes_list", ""),
        piece(0, "b", "exec", '{"command":"w"}'),
    )
    assert [(c.id, c.name) for c in calls] == [("a", "nodes_list"), ("b", "exec")]


@only_openai
def test_roles_that_must_alternate_do_from_then_on(script, vendor):
    messages = (
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "I ran df"),
        ChatMessage("user", "what is full?"),
    )
    script.refuse(400, "Conversation roles must alternate user/assistant/user/…")
    script.stream(vendor.answer("ok"))
    script.stream(vendor.answer("ok"))
    for _ in range(2):
        assert text_of(script.ask(messages)) == "ok"
    one = {"role": "user", "content": "Be brief.\n\nI ran df\n\nwhat is full?"}
    assert [len(body["messages"]) for body in script.bodies] == [3, 1, 1]
    assert script.bodies[2]["messages"] == [one]


@only_openai
def test_a_model_that_takes_no_tools_with_reasoning_is_asked_without_reasoning(
    script, vendor, monkeypatch
):
    monkeypatch.setattr(type(vendor), "check", lambda *_: None)
    script.refuse(
        400,
        "function tools with reasoning_effort are not supported, use "
        "/v1/responses or set reasoning_effort to 'none'",
    )
    script.stream(vendor.answer("ok"))
    assert text_of(script.ask()) == "ok"
    assert script.bodies[1]["reasoning_effort"] == "none"


def test_reasoning_details_without_index_and_type_are_kept_too():
    reader = moltis.OpenAiAnswer("openrouter/m")
    delta = {"reasoning_details": [{"text": "so"}]}
    list(reader.take({"choices": [{"delta": delta}]}))
    assert reader.provider_data["reasoning_details"] == [{"text": "so"}]


def test_reasoning_details_go_back_in_one_piece():
    details = [
        {"type": "reasoning.text", "index": 0, "text": "I "},
        {"type": "reasoning.text", "index": 0, "text": "see", "signature": "c2ln"},
        {"type": "reasoning.encrypted", "index": 1, "data": "ZGF0YQ=="},
    ]
    spec = next(s for s in moltis.PROVIDERS if s.id == "openrouter")
    reader = moltis.OpenAiAnswer("openrouter/m")
    for detail in details:
        list(reader.take({"choices": [{"delta": {"reasoning_details": [detail]}}]}))
    list(reader.take({"choices": [{"delta": {"content": "ok"}}]}))
    message = reader.finished().message
    provider = moltis.OpenAiProvider(spec, "http://nobody/v1", "")
    sent = provider._body(ChatRequest("m", (*HELLO, message)))["messages"][1]
    text = {**details[1], "text": "I see"}
    assert sent["reasoning_details"] == [text, details[2]]


def test_deepseek_gets_reasoning_with_every_answer():
    spec = next(s for s in moltis.PROVIDERS if s.id == "deepseek")
    provider = moltis.OpenAiProvider(spec, "http://nobody/v1", "")
    answer = ChatMessage("assistant", "fine")
    sent = provider._body(ChatRequest("m", (*HELLO, answer)))["messages"]
    assert [message.get("reasoning_content") for message in sent] == [None, ""]


class Moonshot(OpenAi):
    """How a server talks that wants its reasoning back, in a field of its own."""

    def check(self, headers, body):
        for message in body["messages"]:
            message.pop("reasoning_content", None)
        super().check(headers, body)


@pytest.mark.parametrize("vendor", [Moonshot()], ids=["moonshot"])
def test_reasoning_goes_back_to_a_server_that_misses_it(script, vendor):
    """Row 5"""
    script.stream(vendor.answer("", [("a", "exec", {})], thinking="hm"))
    answer = list(script.ask())[-1].message
    result = ChatMessage("tool", "ok", tool_call_id="a")
    script.refuse(
        400,
        "thinking is enabled but reasoning_content is missing in assistant tool call "
        "message at index 1",
    )
    for _ in range(2):
        script.stream(vendor.answer("fine"))
        messages = (*HELLO, answer, result, ChatMessage("assistant", "so"), *HELLO)
        assert text_of(script.ask(messages)) == "fine"
    given = [
        [message.get("reasoning_content") for message in body["messages"]]
        for body in script.bodies[1:]
    ]
    without, with_it = [None] * 5, [None, "hm", None, "", None]
    assert given == [without, with_it, with_it]
    script.refuse(400, "reasoning_content is missing")
    with pytest.raises(ModelError, match="is missing"):
        list(script.ask(messages))


@pytest.mark.parametrize("vendor", [OpenAi()], ids=["openai"])
def test_a_refusal_that_only_quotes_the_field_for_reasoning_is_final(script, vendor):
    """FastAPI's errors have the input in them.  Other chats are asked as before."""
    question = ChatMessage("user", "what is reasoning_content?")
    script.refuse(422, f"Extra inputs are not permitted; input: {question.text}")
    with pytest.raises(ModelError, match="not permitted"):
        list(script.ask([question]))
    script.refuse(400, "reasoning_content is missing")  # of no answer at all
    with pytest.raises(ModelError, match="is missing"):
        list(script.ask([question]))
    assert len(script.bodies) == 2
    script.stream(vendor.answer("fine"))
    answer = ChatMessage("assistant", "so")
    assert text_of(script.ask((*HELLO, answer, *HELLO))) == "fine"


def test_ids_go_back_as_they_came_where_they_are_taken():
    answer = ChatMessage("assistant", "", (ToolCall("functions.exec:0", "exec", {}),))
    for name, kept in (("openrouter", True), ("openai", False)):
        spec = next(s for s in moltis.PROVIDERS if s.id == name)
        provider = moltis.OpenAiProvider(spec, "http://nobody/v1", "")
        sent = provider._body(ChatRequest("m", (*HELLO, answer)))["messages"]
        assert (sent[2]["tool_call_id"] == "functions.exec:0") is kept
        assert sent[1]["tool_calls"][0]["id"] == sent[2]["tool_call_id"]


def test_what_gemini_and_deepseek_want_back_they_get():
    extra = {"google": {"thought_signature": "c2ln"}}
    call = {**piece(0, "a", "exec", "{}"), "extra_content": extra}
    delta = {"reasoning_content": "hm", "tool_calls": [call]}
    spec = next(s for s in moltis.PROVIDERS if s.id == "deepseek")
    reader = moltis.OpenAiAnswer("deepseek/m")
    list(reader.take({"choices": [{"delta": delta, "finish_reason": "tool_calls"}]}))
    message = reader.finished().message
    provider = moltis.OpenAiProvider(spec, "http://nobody/v1", "")
    sent = provider._body(ChatRequest("m", (*HELLO, message)))["messages"][1]
    assert sent["reasoning_content"] == "hm"
    assert sent["tool_calls"][0]["extra_content"] == extra


def test_mistral_gets_ids_of_nine_characters():
    spec = next(s for s in moltis.PROVIDERS if s.id == "mistral")
    provider = moltis.OpenAiProvider(spec, "http://nobody/v1", "")
    answer = ChatMessage("assistant", "", (ToolCall("toolu_01", "exec", {}),))
    sent = provider._body(ChatRequest("m", (*HELLO, answer)))["messages"]
    assert re.fullmatch("[a-z0-9]{9}", sent[2]["tool_call_id"])
    assert sent[1]["tool_calls"][0]["id"] == sent[2]["tool_call_id"]


# --- OpenAI's Responses API alone ---

only_responses = pytest.mark.parametrize("vendor", [Responses()], ids=["responses"])


@only_responses
def test_reasoning_goes_back_encrypted_before_its_call(script, vendor):
    script.stream(vendor.answer("", [("call_a", "exec", {"command": "w"})], "hm"))
    script.stream(vendor.answer("ok"))
    answer = list(script.ask())[-1].message
    result = ChatMessage("tool", "2 users", tool_call_id="call_a", tool_name="exec")
    assert text_of(script.ask((*HELLO, answer, result))) == "ok"
    sent = script.bodies[1]["input"][1:]
    kinds = ["reasoning", "function_call", "function_call_output"]
    assert [item["type"] for item in sent] == kinds
    assert sent[0]["encrypted_content"] == "ZQ"
    assert sent[1]["call_id"] == sent[2]["call_id"] == "call_a"


@only_responses
def test_a_model_that_does_not_reason_is_asked_without_reasoning(script, vendor):
    script.refuse(400, "Encrypted content is not supported with this model.")
    script.stream(vendor.answer("ok"))
    script.stream(vendor.answer("ok"))
    assert text_of(script.ask()) == text_of(script.ask()) == "ok"
    assert ["include" in body for body in script.bodies] == [True, False, False]


@only_responses
def test_a_refusal_of_a_response_is_a_refusal(script, vendor):
    refusal = {"type": "response.refusal.delta", "delta": "I will not."}
    script.stream(sse(refusal) + vendor.answer())
    *_, finished = script.ask()
    assert (finished.reason, finished.message.text) == ("refusal", "I will not.")


@only_responses
def test_a_response_that_failed_is_an_error(script, vendor):
    error = {"code": "invalid_prompt", "message": "this prompt is odd"}
    failed = {"status": "failed", "error": error}
    script.stream(sse({"type": "response.failed", "response": failed}))
    with pytest.raises(ModelError, match="this prompt is odd"):
        list(script.ask())


@only_responses
@pytest.mark.parametrize("code", ["rate_limit_exceeded", "server_error"])
def test_an_error_event_is_judged_by_its_code(script, vendor, code):
    script.stream(sse({"type": "error", "code": code, "message": "later"}))
    script.stream(vendor.answer("ok"))
    assert text_of(script.ask()) == "ok"


@only_openai
def test_a_code_alone_says_that_a_conversation_is_too_long(script):
    error = {"message": "Bad input", "type": "invalid_request_error"}
    body = {"error": {**error, "code": "context_length_exceeded"}}
    script.replies.append((400, {}, [json.dumps(body).encode()]))
    with pytest.raises(ContextTooLong):
        list(script.ask())


@only_responses
def test_a_whole_response_is_understood(script, vendor):
    content = [{"type": "output_text", "text": "fine"}]
    item = {"type": "message", "role": "assistant", "content": content}
    body = json.dumps({"object": "response", "output": [item], "usage": {}}).encode()
    script.stream(body, **{"Content-Type": "application/json"})
    assert text_of(script.ask()) == "fine"


def test_openai_itself_is_asked_for_responses_and_an_imitation_for_completions():
    def made(**environ):
        return moltis.make_providers({"OPENAI_API_KEY": "k", **environ}, {})[-1]

    assert isinstance(made(), moltis.ResponsesProvider)
    official = made(OPENAI_BASE_URL="https://api.openai.com/v1")
    assert isinstance(official, moltis.ResponsesProvider)
    other = made(OPENAI_BASE_URL="http://127.0.0.1:4000")
    assert not isinstance(other, moltis.ResponsesProvider)
    assert other.chat_path == "/chat/completions"


@pytest.mark.parametrize(
    ("vendor", "whole"),
    [
        (
            OpenAi(),
            {"choices": [{"message": {"content": "ok"}, "finish_reason": "stop"}]},
        ),
        (
            Responses(),
            {
                "object": "response",
                "status": "completed",
                "error": None,
                "output": [
                    {"type": "reasoning", "summary": [], "encrypted_content": "ZQ"},
                    {
                        "type": "message",
                        "content": [{"type": "output_text", "text": "ok"}],
                    },
                ],
            },
        ),
    ],
    ids=["openai", "responses"],
)
def test_a_model_that_may_not_be_streamed_is_asked_for_whole_answers(
    script, vendor, whole, monkeypatch
):
    monkeypatch.setattr(type(vendor), "check", lambda *_: None)
    script.refuse(400, "Your organization must be verified to stream this model.")
    for _ in range(2):
        script.stream(
            json.dumps(whole).encode(), **{"Content-Type": "application/json"}
        )
        assert text_of(script.ask()) == "ok"
    assert [body["stream"] for body in script.bodies] == [True, False, False]
    assert not any("stream_options" in body for body in script.bodies[1:])


# --- Anthropic alone ---


@only_anthropic
def test_a_turn_that_began_without_reasoning_changes_nothing_for_others(
    script, vendor, monkeypatch
):
    monkeypatch.setattr(type(vendor), "check", lambda *_: None)
    model = moltis.ProviderModel(script.provider, "m", "high")
    script.refuse(400, "adaptive thinking is not supported on this model")
    script.refuse(
        400,
        "messages.1.content.0.type: Expected `thinking` or `redacted_thinking`, but "
        "found `tool_use`. When `thinking` is enabled, a final assistant message must "
        "start with a thinking block.",
    )
    for _ in range(2):
        script.stream(vendor.answer("ok"))
        assert text_of(model.stream(HELLO, (), Cancellation())) == "ok"
    kinds = [body.get("thinking", {}).get("type") for body in script.bodies]
    assert kinds == ["adaptive", "enabled", None, "enabled"]
    # Of the adaptive kind likewise: another budget would be refused, and remembered.
    script.provider._refusals.clear()
    script.refuse(400, "Expected `thinking`, but found `text`")
    for _ in range(2):
        script.stream(vendor.answer("ok"))
        assert text_of(model.stream(HELLO, (), Cancellation())) == "ok"
    kinds = [body.get("thinking", {}).get("type") for body in script.bodies[4:]]
    assert kinds == ["adaptive", None, "adaptive"]


@only_anthropic
def test_a_whole_message_is_understood(script):
    message = {
        "type": "message",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
            {"type": "text", "text": " "},
            {"type": "tool_use", "id": "a", "name": "exec", "input": {"command": "w"}},
        ],
        "stop_reason": "tool_use",
        "usage": {"input_tokens": 7, "output_tokens": 3},
    }
    body = json.dumps(message).encode()
    script.stream(body, **{"Content-Type": "application/json"})
    *_, finished = script.ask()
    assert finished.message.tool_calls == (ToolCall("a", "exec", {"command": "w"}),)
    kinds = [block["type"] for block in finished.message.provider_data["blocks"]]
    assert kinds == ["thinking", "tool_use"]  # a blank text would be refused
    assert (finished.reason, finished.input_tokens) == ("stop", 7)


@only_anthropic
def test_thinking_goes_back_unchanged_with_its_signature(script, vendor):
    calls = [("toolu_1", "exec", {"command": "ls"})]
    script.stream(vendor.answer("So", calls, thinking="hm"))
    message = list(script.ask())[-1].message
    message = ChatMessage.from_json(json.loads(json.dumps(message.to_json())))
    script.stream(vendor.answer("ok"))
    list(script.ask((*HELLO, message)))
    assert script.bodies[1]["messages"][1]["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": "c2lnbmVk"},
        {"type": "text", "text": "So"},
        {
            "type": "tool_use",
            "id": "toolu_1",
            "name": "exec",
            "input": {"command": "ls"},
        },
    ]


@only_anthropic
def test_a_block_whose_end_was_not_sent_goes_back_too(script, vendor):
    """Else its call's result would be one of no call: fixture `script` checks it."""
    whole = vendor.answer("", [("a", "exec", {})], thinking="hm")
    script.stream(whole.replace(b'"type": "content_block_stop"', b'"type": "other"'))
    answer = list(script.ask())[-1].message
    script.stream(vendor.answer("ok"))
    assert text_of(script.ask((*HELLO, answer))) == "ok"
    kinds = [block["type"] for block in script.bodies[1]["messages"][1]["content"]]
    assert kinds == ["thinking", "tool_use"]


@only_anthropic
def test_input_that_is_no_json_is_marked(script, vendor):
    whole = vendor.answer("", [("toolu_1", "exec", {"command": "ls"})])
    script.stream(whole.replace(b'{\\"co', b'<\\"co'))
    (call,) = list(script.ask())[-1].message.tool_calls
    assert call == ToolCall("toolu_1", "exec", {}, '<"command": "ls"}')


@only_anthropic
def test_an_overload_before_the_first_word_is_asked_again(script, vendor):
    overload = {"type": "overloaded_error", "message": "Overloaded"}
    script.stream(sse({"type": "error", "error": overload}))
    script.stream(vendor.answer("ok"))
    assert text_of(script.ask()) == "ok"


@only_anthropic
def test_an_old_model_gets_the_answer_length_that_it_allows(script, vendor):
    script.refuse(400, "max_tokens: 16384 > 4096, which is the maximum for m")
    script.stream(vendor.answer("ok"))
    assert text_of(script.ask()) == "ok"
    assert script.bodies[1]["max_tokens"] == 4096


# --- TLS ---


@pytest.fixture
def certificate(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl program")
    path = tmp_path / "tls.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
        " -subj /CN=localhost -addext subjectAltName=DNS:localhost"
        f" -keyout {path} -out {tmp_path / 'crt.pem'}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    path.write_text(path.read_text() + (tmp_path / "crt.pem").read_text())
    return path


@pytest.fixture
def tls(script, certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(certificate))
    server = script.server._server
    server.handle_error = lambda *_: None  # a client that does not trust it leaves
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    script.provider.base_url = f"https://localhost:{script.server.port}"
    return certificate


@only_anthropic
def test_over_tls_it_is_the_same(script, vendor, tls, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls))
    script.stream(vendor.answer("ok"))
    assert text_of(script.ask()) == "ok"


@only_anthropic
def test_over_tls_it_can_be_cancelled(script, vendor, tls, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls))
    released = threading.Event()
    cancel = Cancellation()

    def slow():
        released.wait(60)
        yield b""

    script.replies.append((200, {}, slow()))
    thread = cancel_once(lambda: script.server.requests, cancel)
    with pytest.raises(Cancelled):
        list(script.ask(cancel=cancel))
    released.set()
    thread.join()


@only_anthropic
def test_a_certificate_that_nobody_vouches_for_is_refused_once(script, tls):
    with pytest.raises(ModelError, match=r"self.signed certificate"):
        list(script.ask())
    assert not script.server.requests


# --- The JSON forms ---


@pytest.mark.parametrize(
    "event",
    [
        Delta("text", "hi"),
        Delta("thinking", "hm"),
        Delta("notice", "busy"),
        Finished(ChatMessage("assistant", "hi"), "stop", 1, 2),
        Finished(
            ChatMessage(
                "assistant",
                "",
                (ToolCall("a", "exec", {"command": "ls"}, ""),),
                provider_data={"by": "x/y", "blocks": [{"type": "thinking"}]},
            ),
            "length",
            0,
            0,
        ),
    ],
)
def test_an_event_survives_json(event):
    text = json.dumps(event.to_json())
    assert type(event).from_json(json.loads(text)) == event
    # How a reader tells them apart.
    assert ("message" in json.loads(text)) is isinstance(event, Finished)


def test_a_request_survives_json():
    request = ChatRequest("m", CONVERSATION, (EXEC,))
    text = json.dumps(request.to_json())
    assert ChatRequest.from_json(json.loads(text)) == request


def test_a_model_survives_json():
    info = moltis.ModelInfo("ollama/llama3.2", "Ollama", "llama3.2", True)
    text = json.dumps(info.to_json())
    assert moltis.ModelInfo.from_json(json.loads(text)) == info


@pytest.mark.parametrize(
    "change",
    [
        {"model": 5},
        {"messages": "x"},
        {"messages": [3]},
        {"messages": [{"role": "boss", "text": ""}]},
        {"tools": [{"name": "x"}]},
    ],
)
def test_a_request_of_the_wrong_shape_is_refused(change):
    value = {**ChatRequest("m", HELLO, (EXEC,)).to_json(), **change}
    with pytest.raises(RpcError):
        ChatRequest.from_json(value)


# --- Which providers and models there are ---


def make(environ=(), **settings):
    settings = {n: moltis.ProviderSettings(**s) for n, s in settings.items()}
    providers = moltis.make_providers(dict(environ), settings)
    return {p.spec.id: p for p in providers}


def test_without_keys_there_is_the_ollama_of_this_machine():
    providers = make()
    assert list(providers) == ["ollama"]
    assert providers["ollama"].base_url == "http://127.0.0.1:11434"


def test_ollama_host_may_be_written_as_ollama_reads_it():
    urls = {
        "box": "http://box:11434",
        "0.0.0.0": "http://127.0.0.1:11434",
        "0.0.0.0:80": "http://127.0.0.1:80",
        ":99": "http://127.0.0.1:99",
        "https://box": "https://box:443",
        "http://box/": "http://box:80",
        "https://box:3000/ollama/": "https://box:3000/ollama",
        "box/llm": "http://box:11434/llm",
        "http://box:11434/v1": "http://box:11434",
        "http://box:11434/api/": "http://box:11434",
        "[::1]:5": "http://[::1]:5",
        "box:what": "http://box:11434",
    }
    assert {host: moltis.ollama_url(host) for host in urls} == urls


@pytest.mark.parametrize(
    ("provider", "variable"),
    [(s.id, moltis.API_KEY_VARIABLES[s.id]) for s in moltis.PROVIDERS[1:]],
)
def test_a_key_in_the_environment_is_enough(provider, variable):
    providers = make({variable: "k"})
    assert list(providers) == ["ollama", provider]
    assert providers[provider].base_url.startswith("https://")


def test_a_key_in_the_environment_beats_one_that_was_entered():
    providers = make({"OPENAI_API_KEY": "env"}, openai={"api_key": "entered"})
    assert providers["openai"]._headers()["Authorization"] == "Bearer env"


def test_a_server_without_key_needs_an_address_only():
    providers = make({"OPENAI_BASE_URL": "http://box:8080/v1"})
    assert providers["openai"].base_url == "http://box:8080/v1"
    assert "Authorization" not in providers["openai"]._headers()


@pytest.mark.parametrize(
    ("protocol", "entered", "asked"),
    [
        ("", "http://box:8080", "http://box:8080/v1"),
        ("openai", "http://box:8080/v1/", "http://box:8080/v1"),
        ("openai", "http://box/api/v1/chat/completions", "http://box/api/v1"),
        ("anthropic", "http://box:8080", "http://box:8080"),
        ("anthropic", "http://box:8080/v1", "http://box:8080"),
        ("anthropic", "http://box/llm/v1/messages", "http://box/llm"),
    ],
)
def test_an_address_may_be_that_of_a_request(protocol, entered, asked):
    entry = moltis.ProviderSettings(base_url=entered, protocol=protocol)
    assert moltis.make_providers({}, {"lab": entry})[-1].base_url == asked


def test_a_query_of_an_address_stays_at_the_end():
    environ = {"OPENAI_BASE_URL": "https://box/v1/?api-version=1"}
    environ["ANTHROPIC_BASE_URL"] = "https://box?api-version=1"
    _, claude, openai = moltis.make_providers(environ, {})
    url = "https://box/v1/chat/completions?api-version=1"
    assert openai._url(openai.chat_path) == url
    url = "https://box/v1/models?limit=1000&api-version=1"
    assert claude._url(claude.list_path) == url


@pytest.mark.parametrize("path", ["", "/v1/", "/v1/responses", "/v1/chat/completions"])
def test_the_address_of_openai_itself_may_be_that_of_a_request(path):
    environ = {"OPENAI_BASE_URL": f"https://eu.api.openai.com{path}"}
    provider = moltis.make_providers(environ, {})[-1]
    assert provider.base_url + provider.chat_path == (
        "https://eu.api.openai.com/v1/responses"
    )


def test_a_token_for_anthropic_is_sent_as_a_bearer_and_comes_first(monkeypatch):
    environ = {"ANTHROPIC_AUTH_TOKEN": "t", "ANTHROPIC_API_KEY": "k"}
    _, provider = moltis.make_providers(environ, {})
    headers = provider._headers()
    assert headers["Authorization"] == "Bearer t"
    assert "x-api-key" not in headers
    described = moltis.describe_providers(environ, {})[1]
    assert described["keyVariable"] == "ANTHROPIC_AUTH_TOKEN"
    assert described["keyFrom"] == "environment"
    assert [p.provider for p in moltis.providers_with_keys(environ)] == ["anthropic"]


def test_ollama_takes_a_key():
    environ = {"OLLAMA_HOST": "https://ollama.com", "OLLAMA_API_KEY": "k"}
    (provider,) = moltis.make_providers(environ, {})
    assert provider.base_url == "https://ollama.com:443"
    assert provider._headers()["Authorization"] == "Bearer k"


def test_servers_can_be_added_by_address():
    providers = make(studio={"base_url": "http://box:1234/"}, half={"api_key": "k"})
    assert list(providers) == ["ollama", "studio"]
    assert providers["studio"].base_url == "http://box:1234/v1"


def test_entered_keys_are_kept_for_their_owner_alone(tmp_path):
    settings = {"groq": moltis.ProviderSettings("gsk", "")}
    moltis.ProviderSettings.save_all(tmp_path / "data", settings)
    path = tmp_path / "data" / "models.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert moltis.ProviderSettings.load_all(tmp_path / "data") == settings
    assert "gsk" not in repr(settings)


def test_settings_of_the_wrong_shape_are_bad_configuration(tmp_path):
    (tmp_path / "models.json").write_text('{"groq": {"api_key": 5}}')
    with pytest.raises(moltis.BadConfiguration, match=r"models\.json: api_key"):
        moltis.ProviderSettings.load_all(tmp_path)


def test_providers_are_described_without_their_keys():
    environ = {"ANTHROPIC_API_KEY": "k-env"}
    settings = {"groq": moltis.ProviderSettings("k-entered", "")}
    rows = {d["id"]: d for d in moltis.describe_providers(environ, settings)}
    assert rows["anthropic"]["keyFrom"] == "environment"
    assert rows["groq"]["keyFrom"] == "settings"
    assert rows["openai"]["keyFrom"] == ""
    assert "k-" not in json.dumps(rows)


def listing(replies):
    """Return a server that answers by path, and counts."""

    def reply(handler):
        found = replies[handler.path]
        if callable(found):
            found = found(json.loads(handler.body))
        return 404 if "error" in found else 200, {}, [json.dumps(found).encode()]

    return ScriptedServer(reply)


def test_ollama_lists_what_can_chat_and_what_can_use_tools():
    abilities = {
        "qwen3:8b": {"capabilities": ["completion", "tools"]},
        "gemma3": {"capabilities": ["completion"]},
        "nomic-embed-text": {"capabilities": ["embedding"]},
        "of-an-old-server": {},
        "broken": {"error": "no such blob"},
    }
    replies = {
        "/api/tags": {"models": [{"name": name} for name in abilities]},
        "/api/show": lambda body: abilities[body["model"]],
    }
    with listing(replies) as server:
        provider = Ollama.make(Ollama.spec, server.url, "")
        models = provider.models(Cancellation())
    assert [(m.id, m.supports_tools) for m in models] == [
        ("ollama/qwen3:8b", True),
        ("ollama/gemma3", False),
        ("ollama/of-an-old-server", True),
    ]


def ollama(shown, sizes):
    """Return a server whose `/api/show` answers `shown`; `sizes` gets contexts."""

    def reply(handler):
        body = json.loads(handler.body or b"{}")
        if handler.path == "/api/tags":
            found = {"models": [{"model": "m:latest"}, {"model": "n:latest"}]}
        elif handler.path == "/api/show":
            found = shown(body) if callable(shown) else shown
        else:
            sizes.append((body["model"], body["options"]["num_ctx"]))
            return 200, {}, [Ollama().answer("ok")]
        return 200, {}, [json.dumps(found).encode()]

    return ScriptedServer(reply)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    ("wanted", "trained", "length", "size"),
    [
        (32768, 131072, 10, 32768),
        (20000, 131072, 100_000, 40000),
        (2048, 131072, 10, 8192),
        (0, 16384, 10_000_000, 16384),
        (0, 131072, 10_000_000, 65536),
        (131072, 262144, 10, 131072),
        (32768, 16384, 10, 32768),
        (0, "x", 10, 8192),
    ],
)
def test_the_context_of_a_modelfile_counts_from_the_first_request(
    listed, wanted, trained, length, size
):
    """Its own or more, up to what the model was trained for; asked for once."""
    shown = {
        "parameters": f"stop x\nnum_ctx      {wanted}\n" if wanted else "",
        "model_info": {"general.architecture": "q", "q.context_length": trained},
    }
    sizes = []
    with ollama(shown, sizes) as server:
        provider = moltis.OllamaProvider(moltis.PROVIDERS[0], server.url, "")
        if listed:
            provider.models(Cancellation())
        for name in ("m", "m:latest"):
            model = moltis.ProviderModel(provider, name)
            message = ChatMessage("user", "x" * length)
            list(model.stream((message,), (), Cancellation()))
        asked = [path for _, path, _, _ in server.requests]
    assert sizes == [("m", size), ("m:latest", size)]
    assert asked.count("/api/show") == (2 if listed else 1)


@pytest.mark.parametrize("trained", [4096, 8192, 32768])
def test_a_conversation_that_ollama_would_cut_is_too_long_for_it(trained):
    """Its last turn, which cannot be shortened, is sent as it is."""
    facts = {"general.architecture": "q", "q.context_length": trained}
    sizes = []
    with ollama({"model_info": facts}, sizes) as server:
        provider = moltis.OllamaProvider(moltis.PROVIDERS[0], server.url, "")
        model = moltis.ProviderModel(provider, "m")
        last = ChatMessage("user", "and now?")
        for length, fits in ((trained, True), (3 * trained, False)):
            before = ChatMessage("user", "x" * length), ChatMessage("assistant", "yes")
            stream = model.stream((*before, last), (), Cancellation())
            with contextlib.nullcontext() if fits else pytest.raises(ContextTooLong):
                list(stream)
        long = ChatMessage("user", "x" * 3 * trained)
        list(model.stream((long,), (), Cancellation()))
    assert sizes == [("m", max(8192, trained))] * 2 or trained == 32768


def test_an_ollama_that_describes_no_model_is_asked_once(monkeypatch):
    """A `/api/show` that hangs neither hides models nor delays each question."""
    leave, sizes = threading.Event(), []
    with ollama(lambda _: leave.wait(60) and {}, sizes) as server:
        provider = moltis.OllamaProvider(moltis.PROVIDERS[0], server.url, "")
        model = moltis.ProviderModel(provider, "m")
        with monkeypatch.context() as hurry:  # for that alone: others may take longer
            hurry.setattr(moltis, "CONNECT_TIMEOUT", 0.5)
            list(model.stream(HELLO, (), Cancellation()))
        list(model.stream(HELLO, (), Cancellation()))
        models = provider.models(Cancellation())
        leave.set()
        asked = [path for _, path, _, _ in server.requests]
    assert sizes == [("m", 8192)] * 2
    assert [model.id for model in models] == ["ollama/m:latest", "ollama/n:latest"]
    assert asked.count("/api/show") == 1


def test_openai_and_its_imitators_list_models_in_their_ways():
    found = [
        {"id": "gpt-5"},
        {"id": "text-embedding-3-small"},
        {"id": "a/no-tools", "supported_parameters": ["seed"]},
        {"id": "mistral", "capabilities": {"function_calling": False}},
    ]
    for answer in ({"data": found}, found):
        with listing({"/models": answer}) as server:
            provider = OpenAi.make(OpenAi.spec, server.url, "")
            models = provider.models(Cancellation())
        assert [(m.id, m.supports_tools) for m in models] == [
            ("openai/gpt-5", True),
            ("openai/a/no-tools", False),
            ("openai/mistral", False),
        ]


@pytest.mark.parametrize(
    ("provider", "others", "chats"),
    [
        ("openai", ["gpt-3.5-turbo-instruct", "sora-2"], ["gpt-5", "codex-mini"]),
        ("groq", ["whisper-large-v3", "playai-tts"], ["moonshotai/kimi-k2-instruct"]),
        ("xai", ["grok-2-image-1212", "grok-imagine-video"], ["grok-4"]),
        ("gemini", ["models/imagen-4", "models/veo-3", "models/x-embedding-1"], []),
    ],
)
def test_models_that_cannot_chat_are_not_listed(provider, others, chats):
    spec = next(s for s in moltis.PROVIDERS if s.id == provider)
    found = {"data": [{"id": name, "object": "model"} for name in [*others, *chats]]}
    with listing({"/models": found}) as server:
        models = OpenAi.make(spec, server.url, "").models(Cancellation())
    assert [m.id for m in models] == [f"{provider}/{name}" for name in chats]


def test_a_model_that_its_server_marks_is_judged_by_that_and_not_by_its_name():
    spec = next(s for s in moltis.PROVIDERS if s.id == "openrouter")
    can = {"architecture": {"output_modalities": ["text", "audio"]}}
    found = {"data": [{"id": "openai/gpt-audio", **can}]}
    with listing({"/models": found}) as server:
        models = OpenAi.make(spec, server.url, "").models(Cancellation())
    assert [m.id for m in models] == ["openrouter/openai/gpt-audio"]


def test_anthropic_lists_names_for_people():
    found = {"data": [{"id": "claude-x", "display_name": "Claude X"}]}
    with listing({"/v1/models?limit=1000": found}) as server:
        provider = Anthropic.make(Anthropic.spec, server.url, "k")
        (model,) = provider.models(Cancellation())
    assert model == moltis.ModelInfo(
        "anthropic/claude-x", "Anthropic", "Claude X", True
    )


def test_lists_are_remembered_until_somebody_wants_them_fresh():
    with listing({"/models": {"data": [{"id": "m"}]}}) as server:
        dead = Ollama.make(Ollama.spec, f"http://127.0.0.1:{free_port()}", "")
        catalog = moltis.ModelCatalog([OpenAi.make(OpenAi.spec, server.url, ""), dead])
        for _ in range(2):
            models, errors = catalog.models(Cancellation())
            assert [m.id for m in models] == ["openai/m"]
            assert "cannot be reached" in errors["ollama"]
        assert len(server.requests) == 1
        catalog.models(Cancellation(), refresh=True)
        assert len(server.requests) == 2
        catalog.replace([])
        assert catalog.models(Cancellation()) == ([], {})


def test_a_model_can_be_typed_in_though_no_list_has_it(script, vendor):
    catalog = moltis.ModelCatalog([script.provider])
    model = catalog.model(f"{vendor.spec.id}/new/est:1b")
    assert model.id == f"{vendor.spec.id}/new/est:1b"
    script.stream(vendor.answer("ok"))
    list(model.stream(HELLO, (), Cancellation()))
    assert script.bodies[0]["model"] == "new/est:1b"


@pytest.mark.parametrize("model_id", ["gpt-5", "openai/", "other/m", ""])
def test_a_model_of_nobody_is_an_error_that_lists_the_providers(model_id):
    catalog = moltis.ModelCatalog([OpenAi.make(OpenAi.spec, "http://nobody", "")])
    with pytest.raises(ModelError, match="openai"):
        catalog.model(model_id)


def test_a_python_without_tls_says_so_of_a_model(monkeypatch):
    monkeypatch.setitem(sys.modules, "ssl", None)
    with pytest.raises(moltis.ModelError, match="Python's module ssl"):
        OpenAi.make(OpenAi.spec, "https://x.test", "").models(Cancellation())
