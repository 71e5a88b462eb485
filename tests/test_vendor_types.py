"""Vendors' servers, built on the types of their SDKs.

What they send is made of these types, and what they are asked must fit them: a server
of our own invention would share our mistakes.  `MOLTIS_TEST_VENDORS=1 sh tests/run`
installs the SDKs; without one its tests are skipped.
"""

from __future__ import annotations

import collections.abc
import importlib
import json
import re
import sys
import types
import typing
from pathlib import Path

import pytest
from peers import InProcessGateway
from support import Program, ScriptedServer, free_port, wait_for

import moltis
from moltis import (
    Cancellation,
    ChatMessage,
    ChatRequest,
    ContextTooLong,
    Delta,
    ToolCall,
    ToolSpec,
)

EXEC = ToolSpec(
    "exec",
    "Run it.",
    {"type": "object", "properties": {"command": {"type": "string"}}},
)
HELLO = (ChatMessage("user", "hello"),)
MARKS = [getattr(typing, n, None) for n in ("Required", "NotRequired", "Annotated")]
CALL = ("call_1", "exec", {"command": "df -h"})


def of(module, name):
    """Return a vendor's type; the test is skipped where its SDK is missing."""
    pytest.importorskip(module.partition(".")[0])
    return getattr(importlib.import_module(module), name)


BEYOND = {  # what imitators of OpenAI want besides its types
    *("reasoning_content", "reasoning_details", "extra_content"),
    "stream_options",  # which servers take beyond the SDKs of Mistral and Groq
}


def fits(kind, value):
    """Return whether a request is what a vendor's type says, and no more than that.

    By hand: pydantic reads the arrays of such types only as they are walked.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if hasattr(origin, "__metadata__") or origin in MARKS:
        return fits(inner[0], value)
    if origin in (typing.Union, getattr(types, "UnionType", None)):
        return any(fits(each, value) for each in inner)
    if origin is typing.Literal:
        return value in inner
    if hasattr(kind, "__required_keys__"):
        hints = typing.get_type_hints(kind, include_extras=True)
        if not isinstance(value, dict) or not set(kind.__required_keys__) <= set(value):
            return False
        named = {k: v for k, v in value.items() if k not in BEYOND}
        return all(k in hints and fits(hints[k], v) for k, v in named.items())
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, dict) and all(fits(inner[1], value[k]) for k in value)
    if origin in (list, collections.abc.Iterable, collections.abc.Sequence):
        return isinstance(value, list) and all(fits(inner[0], each) for each in value)
    if kind in (typing.Any, object):
        return True
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(value, kind) and isinstance(value, bool) is (kind is bool)


def parses(kind, value):
    """Fail unless a request is what a vendor's pydantic model says."""
    kind.model_validate_json(json.dumps(value))


def dump(value):
    return value.model_dump(mode="json", by_alias=True, exclude_unset=True)


def sse(*values, named=False, done=False):
    events = b""
    for value in map(dump, values):
        head = f"event: {value['type']}\n" if named else ""
        events += f"{head}data: {json.dumps(value)}\n\n".encode()
    return events + (b"data: [DONE]\n\n" if done else b"")


# -- four protocols ------------------------------------------------------------


class OpenAiTypes:
    """Chat completions, by the SDK of OpenAI or of one who builds on it."""

    make = moltis.OpenAiProvider
    spec = moltis.OWN_SERVERS["openai"].replace(id="lab", label="lab")
    protocol = "openai"
    path = "/chat/completions"
    content_type = "text/event-stream"

    def __init__(self, sdk="openai"):
        self.sdk = sdk
        self.types = f"{sdk}.types.chat"

    def chunk(self, delta, finish=None, **more):
        chunk = of(f"{self.types}.chat_completion_chunk", "ChatCompletionChunk")
        return chunk.model_validate(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": "m",
                "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
                **more,
            }
        )

    def answer(self, text="", calls=(), reason=None, thinking="", **delta):
        chunks = [self.chunk({"role": "assistant", "content": "", **delta})]
        if thinking:
            chunks.append(self.chunk({"reasoning_content": thinking}))
        if text:
            chunks.append(self.chunk({"content": text}))
        for index, (call_id, name, arguments) in enumerate(calls):
            function = {"name": name, "arguments": json.dumps(arguments)}
            call = {"index": index, "id": call_id, "function": function}
            chunks.append(self.chunk({"tool_calls": [{**call, "type": "function"}]}))
        finish = reason or ("tool_calls" if calls else "stop")
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        chunks += [self.chunk({}, finish), self.chunk({}, usage=usage)]
        chunks[-1].choices.clear()
        return sse(*chunks, done=True)

    def error(self, message, kind="invalid_request_error"):
        if self.sdk == "openai":
            error = of("openai.types.shared", "ErrorObject")
            fields = dump(error(message=message, type=kind, code=None, param=None))
        else:
            fields = {"message": message, "type": kind}
        return json.dumps({"error": fields}).encode()

    def whole(self, text):
        return dump(
            of(self.types, "ChatCompletion").model_validate(
                {
                    "id": "chatcmpl-1",
                    "object": "chat.completion",
                    "created": 1,
                    "model": "m",
                    "choices": [
                        {
                            "index": 0,
                            "finish_reason": "stop",
                            "logprobs": None,
                            "message": {"role": "assistant", "content": text},
                        }
                    ],
                }
            )
        )

    def check(self, body):
        assert fits(of(f"{self.types}.completion_create_params", self.params), body)

    @property
    def params(self):
        streaming = self.sdk == "openai"
        return "CompletionCreateParams" + ("Streaming" if streaming else "")

    def results(self, body):
        return [m["content"] for m in body["messages"] if m["role"] == "tool"]

    def models(self):
        model = of(f"{self.sdk}.types", "Model")
        entry = model(id="m", created=1, object="model", owned_by="x")
        return {"object": "list", "data": [dump(entry)]}


class ResponsesTypes:
    """OpenAI's Responses API."""

    make = moltis.ResponsesProvider
    spec = next(s for s in moltis.PROVIDERS if s.id == "openai")
    protocol = "responses"
    path = "/responses"
    content_type = "text/event-stream"

    def response(self, output, status="completed", **more):
        return {
            "id": "resp_1",
            "object": "response",
            "created_at": 1,
            "model": "m",
            "output": output,
            "status": status,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": {
                "input_tokens": 7,
                "output_tokens": 3,
                "total_tokens": 10,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens_details": {"reasoning_tokens": 0},
            },
            **more,
        }

    def event(self, name, kind, **fields):
        self.number += 1
        event = of("openai.types.responses", name)
        return event.model_validate(
            {"type": kind, "sequence_number": self.number, **fields}
        )

    def answer(self, text="", calls=(), reason=None, thinking=""):
        self.number = 0
        output, events = [], []
        begin = self.response([], "in_progress", usage=None)
        events.append(
            self.event("ResponseCreatedEvent", "response.created", response=begin)
        )
        items = []
        if thinking:
            summary = [{"type": "summary_text", "text": thinking}]
            item = {"type": "reasoning", "id": "rs_1", "summary": summary}
            items.append(({**item, "encrypted_content": "gAAA"}, None))
        if text:
            part = {"type": "output_text", "text": text, "annotations": []}
            message = {"type": "message", "id": "msg_1", "role": "assistant"}
            message.update(status="completed", content=[part])
            items.append((message, text))
        for call_id, name, arguments in calls:
            call = {"type": "function_call", "id": f"fc_{call_id}", "call_id": call_id}
            call.update(name=name, arguments=json.dumps(arguments), status="completed")
            items.append((call, None))
        for index, (item, said) in enumerate(items):
            at = {"output_index": index}
            added = {**item, **({"content": []} if said else {})}
            if item["type"] == "function_call":
                added["arguments"] = ""
            kind = "response.output_item.added"
            events.append(
                self.event("ResponseOutputItemAddedEvent", kind, item=added, **at)
            )
            if said:
                events.append(
                    self.event(
                        *("ResponseTextDeltaEvent", "response.output_text.delta"),
                        item_id="msg_1",
                        content_index=0,
                        delta=said,
                        logprobs=[],
                        **at,
                    )
                )
            if item["type"] == "function_call":
                events.append(
                    self.event(
                        "ResponseFunctionCallArgumentsDeltaEvent",
                        "response.function_call_arguments.delta",
                        item_id=item["id"],
                        delta=item["arguments"],
                        **at,
                    )
                )
            if item["type"] == "reasoning":
                events.append(
                    self.event(
                        "ResponseReasoningSummaryTextDeltaEvent",
                        "response.reasoning_summary_text.delta",
                        item_id="rs_1",
                        summary_index=0,
                        delta=thinking,
                        **at,
                    )
                )
            kind = "response.output_item.done"
            events.append(
                self.event("ResponseOutputItemDoneEvent", kind, item=item, **at)
            )
            output.append(item)
        if reason:
            cut = {"incomplete_details": {"reason": reason}}
            end = self.response(output, "incomplete", **cut)
            name, kind = "ResponseIncompleteEvent", "response.incomplete"
        else:
            end = self.response(output)
            name, kind = "ResponseCompletedEvent", "response.completed"
        return sse(*events, self.event(name, kind, response=end), named=True)

    def error(self, message, kind="invalid_request_error"):
        return OpenAiTypes().error(message, kind)

    def whole(self, text):
        part = {"type": "output_text", "text": text, "annotations": []}
        message = {"type": "message", "id": "msg_1", "role": "assistant"}
        message.update(status="completed", content=[part])
        response = of("openai.types.responses", "Response")
        return dump(response.model_validate(self.response([message])))

    def check(self, body):
        kind = "ResponseCreateParamsStreaming"
        assert fits(of("openai.types.responses.response_create_params", kind), body)
        assert body["store"] is False

    def results(self, body):
        outputs = (i for i in body["input"] if i.get("type") == "function_call_output")
        return [item["output"] for item in outputs]

    def models(self):
        return OpenAiTypes().models()


class AnthropicTypes:
    """Anthropic's Messages API."""

    make = moltis.AnthropicProvider
    spec = moltis.OWN_SERVERS["anthropic"].replace(id="lab", label="lab")
    protocol = "anthropic"
    path = "/v1/messages"
    content_type = "text/event-stream"

    def event(self, name, kind, **fields):
        return of("anthropic.types", name).model_validate({"type": kind, **fields})

    def message(self, content, reason=None):
        usage = {"input_tokens": 7, "output_tokens": 3}
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "m",
            "content": content,
            "stop_reason": reason,
            "stop_sequence": None,
            "usage": usage,
        }

    def answer(self, text="", calls=(), reason=None, thinking=""):
        blocks = []
        if thinking:
            block = {"type": "thinking", "thinking": "", "signature": ""}
            deltas = [{"type": "thinking_delta", "thinking": thinking}]
            deltas.append({"type": "signature_delta", "signature": "EqQB"})
            blocks.append((block, deltas))
        if text:
            block = {"type": "text", "text": "", "citations": None}
            blocks.append((block, [{"type": "text_delta", "text": text}]))
        for call_id, name, arguments in calls:
            block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
            said = {"type": "input_json_delta", "partial_json": json.dumps(arguments)}
            blocks.append((block, [said]))
        begin = self.message([])
        events = [self.event("RawMessageStartEvent", "message_start", message=begin)]
        for index, (block, deltas) in enumerate(blocks):
            at = {"index": index}
            kind = "content_block_start"
            events.append(
                self.event("RawContentBlockStartEvent", kind, content_block=block, **at)
            )
            kind = "content_block_delta"
            events += [
                self.event("RawContentBlockDeltaEvent", kind, delta=delta, **at)
                for delta in deltas
            ]
            events.append(
                self.event("RawContentBlockStopEvent", "content_block_stop", **at)
            )
        reason = reason or ("tool_use" if calls else "end_turn")
        delta = {"stop_reason": reason, "stop_sequence": None}
        usage = {"output_tokens": 3}
        events += [
            self.event(
                "RawMessageDeltaEvent", "message_delta", delta=delta, usage=usage
            ),
            self.event("RawMessageStopEvent", "message_stop"),
        ]
        return sse(*events, named=True)

    def error(self, message, kind="invalid_request_error"):
        error = of("anthropic.types", "ErrorResponse")
        fields = {"type": kind, "message": message}
        found = error.model_validate(
            {"type": "error", "error": fields, "request_id": "req_1"}
        )
        return json.dumps(dump(found)).encode()

    def whole(self, text):
        block = {"type": "text", "text": text, "citations": None}
        message = of("anthropic.types", "Message")
        return dump(message.model_validate(self.message([block], "end_turn")))

    def check(self, body):
        kind = "MessageCreateParamsStreaming"
        assert fits(of("anthropic.types.message_create_params", kind), body)

    def results(self, body):
        return [
            block["content"]
            for turn in body["messages"]
            for block in turn["content"]
            if block["type"] == "tool_result"
        ]

    def models(self):
        model = of("anthropic.types", "ModelInfo")
        entry = model.model_construct(
            id="m", display_name="M", type="model", created_at="2026-01-01T00:00:00Z"
        )
        return {"data": [dump(entry)], "has_more": False}


class OllamaTypes:
    """Ollama's own API."""

    make = moltis.OllamaProvider
    spec = moltis.PROVIDERS[0]
    protocol = "ollama"
    path = "/api/chat"
    content_type = "application/x-ndjson"

    def chunk(self, message, **more):
        chunk = of("ollama", "ChatResponse").model_validate(
            {
                "model": "m",
                "created_at": "2026-01-01T00:00:00Z",
                "done": False,
                "message": {"role": "assistant", **message},
                **more,
            }
        )
        return json.dumps(dump(chunk)).encode() + b"\n"

    def answer(self, text="", calls=(), reason="stop", thinking=""):
        functions = [{"name": n, "arguments": a} for _, n, a in calls]
        lines = self.chunk({"content": "", "thinking": thinking}) if thinking else b""
        lines += self.chunk({"content": text}) if text else b""
        for function in functions:
            lines += self.chunk({"content": "", "tool_calls": [{"function": function}]})
        end = {"done": True, "done_reason": reason}
        end.update(prompt_eval_count=7, eval_count=3)
        return lines + self.chunk({"content": ""}, **end)

    def error(self, message, kind=""):
        return json.dumps({"error": message}).encode()

    def whole(self, text):
        end = {"done": True, "done_reason": "stop"}
        return json.loads(self.chunk({"content": text}, **end))

    def check(self, body):
        parses(of("ollama._types", "ChatRequest"), body)

    def results(self, body):
        return [m["content"] for m in body["messages"] if m["role"] == "tool"]

    def models(self):
        entry = {"model": "m", "name": "m", "size": 1}
        return dump(of("ollama", "ListResponse").model_validate({"models": [entry]}))


class MistralTypes(OpenAiTypes):
    """Mistral's chat completions."""

    spec = next(s for s in moltis.PROVIDERS if s.id == "mistral")

    def chunk(self, delta, finish=None, **more):
        if "tool_calls" in delta:
            calls = [{**call, "type": None} for call in delta["tool_calls"]]
            delta = {"tool_calls": calls}
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        value = {"id": "x", "model": "m", "choices": [choice], **more}
        return of("mistralai.client.models", "CompletionChunk").model_validate(value)

    def check(self, body):
        kind = of("mistralai.client.models", "ChatCompletionStreamRequest")
        parses(kind, {k: v for k, v in body.items() if k not in BEYOND})

    def models(self):
        card = of("mistralai.client.models", "BaseModelCard")
        can = of("mistralai.client.models", "ModelCapabilities")
        entries = [
            card(id="m", capabilities=can(completion_chat=True, function_calling=True)),
            card(id="ocr", capabilities=can(completion_chat=False)),
        ]
        return {"object": "list", "data": [dump(entry) for entry in entries]}


VENDORS = {
    "openai": OpenAiTypes(),
    "groq": OpenAiTypes("groq"),
    "mistralai": MistralTypes(),
    "responses": ResponsesTypes(),
    "anthropic": AnthropicTypes(),
    "ollama": OllamaTypes(),
}


@pytest.fixture(params=VENDORS)
def vendor(request):
    return VENDORS[request.param]


class Script:
    """A vendor's server that sends prepared replies, and checks what it is asked."""

    def __init__(self, vendor):
        self.vendor = vendor
        self.replies = []
        self.bodies = []
        self.server = ScriptedServer(self._reply)
        self.provider = vendor.make(
            vendor.spec, self.server.url, "k-secret", first_pause=0.01
        )

    def _reply(self, handler):
        if handler.path == "/api/show":  # of Ollama, before the first question
            return 200, {}, [b"{}"]
        self.bodies.append(json.loads(handler.body))
        return self.replies.pop(0)

    def stream(self, body, content_type=None):
        kind = content_type or self.vendor.content_type
        self.replies.append((200, {"Content-Type": kind}, [body]))

    def refuse(self, message, status=400):
        self.replies.append((status, {}, [self.vendor.error(message)]))

    def ask(self, messages=HELLO, tools=(EXEC,), effort=""):
        model = moltis.ProviderModel(self.provider, "m", effort)
        return list(model.stream(messages, tools, Cancellation()))

    def said(self, kind, events):
        return "".join(
            e.text for e in events if isinstance(e, Delta) and e.kind == kind
        )


@pytest.fixture
def script(vendor):
    script = Script(vendor)
    yield script
    script.server.close()
    for body in script.bodies:
        vendor.check(body)
    assert not script.replies


def only(*names):
    return pytest.mark.parametrize("vendor", [VENDORS[n] for n in names], ids=names)


def after_a_call(finished):
    """Return a conversation that goes on after a model's answer with calls."""
    results = [
        ChatMessage("tool", '{"stdout":"ok"}', (), call.id, call.name)
        for call in finished.message.tool_calls
    ]
    return [*HELLO, finished.message, *results]


# -- rows of what fails --------------------------------------------------------


def test_an_answer_thinks_speaks_calls_and_goes_on_with_the_result(script, vendor):
    """What is sent back after a call fits the vendor's types, too."""
    script.stream(vendor.answer("I look.", [CALL], thinking="hm"))
    events = script.ask([ChatMessage("system", "Be brief."), *HELLO])
    assert script.said("text", events) == "I look."
    if vendor.spec.id != "mistral":  # its SDK has thinking as a part of the content
        assert script.said("thinking", events) in ("hm", "")
    finished = events[-1]
    [call] = finished.message.tool_calls
    assert (call.name, call.arguments) == ("exec", {"command": "df -h"})
    assert (finished.input_tokens, finished.output_tokens) == (7, 3)
    script.stream(vendor.answer("Fine."))
    events = script.ask(after_a_call(finished))
    assert script.said("text", events) == "Fine."
    assert vendor.results(script.bodies[-1]) == ['{"stdout":"ok"}']


CUT = {
    "openai": ("length", "length"),
    "groq": ("length", "length"),
    "mistralai": ("length", "length"),
    "responses": ("max_output_tokens", "length"),
    "anthropic": ("max_tokens", "length"),
    "ollama": ("length", "length"),
}


@pytest.mark.parametrize(
    ("vendor", "reason", "found"),
    [
        *((VENDORS[name], *words) for name, words in CUT.items()),
        (VENDORS["openai"], "content_filter", "refusal"),
        (VENDORS["responses"], "content_filter", "refusal"),
        (VENDORS["anthropic"], "refusal", "refusal"),
        (VENDORS["anthropic"], "model_context_window_exceeded", "length"),
    ],
)
def test_what_was_cut_or_refused_says_so_and_its_calls_are_not_run(
    script, vendor, reason, found
):
    """Row 3"""
    script.stream(vendor.answer("half", [CALL], reason=reason))
    finished = script.ask()[-1]
    assert finished.reason == found
    assert finished.message.tool_calls == ()


@only("openai")
def test_a_refusal_is_said_as_the_answer(script, vendor):
    """Row 3: `delta.refusal`"""
    script.stream(vendor.answer(refusal="I cannot."))
    events = script.ask()
    assert script.said("text", events) == "I cannot."
    assert events[-1].reason == "refusal"


@only("openai")
def test_tools_with_reasoning_are_amended_once_and_remembered(script, vendor):
    """Row 4"""
    script.refuse(
        "Function tools with reasoning_effort are not supported for m in "
        "/v1/chat/completions. Please use /v1/responses or set reasoning_effort to "
        "'none'."
    )
    script.stream(vendor.answer("fine"))
    script.stream(vendor.answer("fine"))
    script.ask(effort="high")
    script.ask(effort="high")
    efforts = [body["reasoning_effort"] for body in script.bodies]
    assert efforts == ["high", "none", "none"]


@only("responses")
def test_reasoning_of_openai_goes_back_encrypted(script, vendor):
    """Row 4"""
    script.stream(vendor.answer(calls=[CALL], thinking="hm"))
    finished = script.ask()[-1]
    script.stream(vendor.answer("done"))
    script.ask(after_a_call(finished))
    kinds = [item.get("type", "message") for item in script.bodies[-1]["input"]]
    assert kinds == ["message", "reasoning", "function_call", "function_call_output"]
    assert script.bodies[-1]["input"][1]["encrypted_content"] == "gAAA"


def test_deepseek_gets_reasoning_with_each_answer_and_the_types_allow_it():
    """Row 5"""
    vendor = OpenAiTypes()
    spec = next(s for s in moltis.PROVIDERS if s.id == "deepseek")
    said = ChatMessage("assistant", "yes", (ToolCall(*CALL),))
    result = ChatMessage("tool", "{}", (), CALL[0], CALL[1])
    request = ChatRequest("m", (*HELLO, said, result), (EXEC,))
    body = moltis.OpenAiProvider(spec, "http://x", "k")._body(request)
    vendor.check(body)
    assert body["messages"][1]["reasoning_content"] == ""


@only("openai", "mistralai")
def test_roles_alternate_for_a_template_that_demands_it(script, vendor):
    """Row 6: after Stop two messages of the user follow each other."""
    script.refuse("Conversation roles must alternate user/assistant/user/assistant")
    script.stream(vendor.answer("fine"))
    script.ask([*HELLO, ChatMessage("user", "are you there?")], ())
    assert [m["role"] for m in script.bodies[-1]["messages"]] == ["user"]


@only("openai", "groq", "mistralai", "responses", "anthropic")
@pytest.mark.parametrize(
    "name", ["multi_tool_use.parallel", "", "run the command: df -h"]
)
def test_a_name_that_a_model_made_up_is_one_that_apis_take(script, vendor, name):
    """Row 7"""
    script.stream(vendor.answer(calls=[("call_1", name, {})]))
    finished = script.ask()[-1]
    script.stream(vendor.answer("fine"))
    script.ask(after_a_call(finished))
    # In quotes: other names of the conversation may be parts of it.
    assert f'"{name}"' not in json.dumps(script.bodies[-1]).replace('""', "")


@only("anthropic")
def test_the_prompt_and_two_turns_are_kept_by_anthropic(script, vendor):
    """Row 8"""
    script.stream(vendor.answer("fine"))
    told = [ChatMessage("system", "Be brief."), *HELLO]
    told += [ChatMessage("assistant", "yes"), ChatMessage("user", "and?")]
    script.ask(told)
    [body] = script.bodies
    marked = [body["system"][-1]]
    marked += [t["content"][-1] for t in body["messages"] if t["role"] == "user"]
    assert [b["cache_control"] for b in marked] == [{"type": "ephemeral"}] * 3


@pytest.mark.parametrize(
    "call_id", ["functions.exec:0", "call_1__thought__" + "x" * 300, "t" * 64]
)
@only("openai", "groq", "ollama")
def test_ids_go_back_as_they_came(script, vendor, call_id):
    """Row 9"""
    script.stream(vendor.answer(calls=[(call_id, "exec", {})]))
    finished = script.ask()[-1]
    script.stream(vendor.answer("fine"))
    script.ask(after_a_call(finished))
    if vendor.protocol != "ollama":  # which has none
        _, said, result = script.bodies[-1]["messages"]
        assert said["tool_calls"][0]["id"] == result["tool_call_id"] == call_id


@only("openai")
def test_reasoning_details_and_signatures_go_back(script, vendor):
    """Row 10: they are beyond OpenAI's types, which let them pass."""
    details = [{"type": "reasoning.encrypted", "data": "EqQB", "index": 0, "id": "r"}]
    signed = {"google": {"thought_signature": "EqQC"}}
    call = {"index": 0, "id": "c", "type": "function", "extra_content": signed}
    call["function"] = {"name": "exec", "arguments": "{}"}
    chunks = [
        vendor.chunk({"reasoning_details": details}),
        vendor.chunk({"tool_calls": [call]}),
        vendor.chunk({}, "tool_calls"),
    ]
    script.stream(sse(*chunks, done=True))
    finished = script.ask()[-1]
    script.stream(vendor.answer("fine"))
    script.ask(after_a_call(finished))
    said = script.bodies[-1]["messages"][1]
    assert said["reasoning_details"] == details
    assert said["tool_calls"][0]["extra_content"] == signed


@pytest.mark.parametrize(
    "parts",
    [
        [("a", "exec", ""), ("b", None, '{"comm'), ("c", None, 'and": "df"}')],
        [("a", "ex", ""), (None, "ec", '{"comm'), (None, None, 'and": "df"}')],
        [(None, "exec", ""), ("b", None, '{"command": "df"}')],
    ],
    ids=["fresh ids", "name in pieces", "name before id"],
)
@only("openai", "groq")
def test_fragments_of_one_call_are_one_call(script, vendor, parts):
    """Row 11"""
    chunks = []
    for call_id, name, arguments in parts:
        function = {"name": name, "arguments": arguments}
        call = {"index": 0, "id": call_id, "type": "function", "function": function}
        chunks.append(vendor.chunk({"tool_calls": [call]}))
    script.stream(sse(*chunks, vendor.chunk({}, "tool_calls"), done=True))
    calls = script.ask()[-1].message.tool_calls
    assert [(c.name, c.arguments) for c in calls] == [("exec", {"command": "df"})]


@pytest.mark.parametrize(
    ("vendor", "message"),
    [
        (
            VENDORS["openai"],
            (
                "This model's maximum context length is 128000 tokens. However, your "
                "messages resulted in 130001 tokens."
            ),
        ),
        (VENDORS["groq"], "Please reduce the length of the messages or completion."),
        (
            VENDORS["mistralai"],
            (
                "Prompt contains 40000 tokens, too large for model with 32768 maximum "
                "context length"
            ),
        ),
        (
            VENDORS["responses"],
            (
                "Your input exceeds the context window of this model. Please adjust "
                "your input and try again."
            ),
        ),
        (VENDORS["anthropic"], "prompt is too long: 210000 tokens > 200000 maximum"),
        (VENDORS["ollama"], "the input length exceeds the context length"),
    ],
)
def test_a_conversation_that_is_too_long_is_understood(script, vendor, message):
    """Row 12"""
    script.refuse(message)
    with pytest.raises(ContextTooLong):
        script.ask()


@only("anthropic")
def test_a_blank_text_beside_thinking_is_left_out(script, vendor):
    """Row 13"""
    script.stream(vendor.answer("\n\n", [CALL], thinking="hm"))
    finished = script.ask()[-1]
    script.stream(vendor.answer("fine"))
    script.ask(after_a_call(finished))
    kinds = [block["type"] for block in script.bodies[-1]["messages"][1]["content"]]
    assert kinds == ["thinking", "tool_use"]


def test_ollama_gets_the_context_that_its_model_was_made_with():
    """Row 14"""
    show = of("ollama", "ShowResponse").model_validate(
        {
            "parameters": "num_ctx 32768\ntemperature 1",
            "capabilities": ["completion"],
            "model_info": {"llama.context_length": 131072},
        }
    )
    asked = []

    def reply(handler):
        if handler.path != "/api/chat":
            found = (
                dump(show) if handler.path == "/api/show" else OllamaTypes().models()
            )
            return 200, {}, [json.dumps(found).encode()]
        asked.append(json.loads(handler.body))
        return 200, {}, [OllamaTypes().answer("fine")]

    with ScriptedServer(reply) as server:
        provider = moltis.OllamaProvider(moltis.PROVIDERS[0], server.url, "")
        model = moltis.ProviderModel(provider, "m")
        list(model.stream(HELLO, (), Cancellation()))
        provider.models(Cancellation())
        list(model.stream(HELLO, (), Cancellation()))
    assert [body["options"] for body in asked] == [{"num_ctx": 32768}] * 2


def test_a_whole_message_where_a_stream_was_asked_for_is_read(script, vendor):
    """Row 15"""
    body = json.dumps(vendor.whole("all of it")).encode()
    script.stream(body, "application/json")
    assert script.said("text", script.ask()) == "all of it"


@only("openai")
def test_stream_options_that_are_refused_are_left_out_from_then_on(script, vendor):
    """Row 15"""
    script.refuse("Unrecognized request argument supplied: stream_options")
    script.stream(vendor.answer("fine"))
    script.stream(vendor.answer("fine"))
    script.ask()
    script.ask()
    assert ["stream_options" in body for body in script.bodies] == [True, False, False]


def test_lists_have_what_can_chat(vendor):
    """Row 16"""
    show, listed = {"capabilities": ["completion", "tools"]}, vendor.models()

    def reply(handler):
        found = show if handler.path == "/api/show" else listed
        return 200, {}, [json.dumps(found).encode()]

    with ScriptedServer(reply) as server:
        provider = vendor.make(vendor.spec, server.url, "k")
        models = provider.models(Cancellation())
    assert [model.id for model in models] == [f"{vendor.spec.id}/m"]


# -- the whole loop on two nodes -----------------------------------------------


@pytest.fixture
def site(tmp_path):
    """A gateway with two nodes that commands run on."""
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    running = InProcessGateway(tmp_path / "gw", environ=environ)
    with running as gateway, gateway.node("alpha"), gateway.node("beta"):
        yield gateway


class Talk:
    """A new session with a model, every command of which is approved."""

    def __init__(self, site, model):
        self._events = []
        self._client = site.operator(on_news=self._take)
        self._client.call("subscribe", {"events": ["chat"]})
        create = {"label": model, "model": model}
        self.key = self._client.call("sessions.create", create)["key"]
        self._client.call("sessions.patch", {"key": self.key, "approvals": "all"})

    def _take(self, _client, news):
        if isinstance(news, moltis.Event) and news.payload["sessionKey"] == self.key:
            self._events.append(news.payload)

    def send(self, text):
        sent = {"sessionKey": self.key, "text": text}
        return self._client.call("chat.send", sent)["runId"]

    def wait_for(self, run_id, *states):
        def reached():
            found = (e for e in self._events if e.get("runId") == run_id)
            return next((e for e in found if e["state"] in states), None)

        return wait_for(reached, 60, what=lambda: f"{states} in {self._events}")

    def ask(self, text):
        """Return the messages of the session once the answer has ended."""
        self.wait_for(self.send(text), "final", "error", "aborted")
        return self._client.call("chat.history", {"sessionKey": self.key})

    def abort(self):
        self._client.call("chat.abort", {"sessionKey": self.key})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._client.close()


def test_a_model_asks_two_nodes_and_answers(site, vendor):
    """With the types of each vendor: both calls, their results, the same prefix."""
    wanted = [
        (f"call_{node}", "exec", {"command": f"echo on {node}", "node": node})
        for node in ("alpha", "beta")
    ]
    replies = [vendor.answer("I look.", wanted), vendor.answer("Both are there.")]
    bodies = []

    def reply(handler):
        if not handler.path.endswith(vendor.path):
            return 404, {}, [b"{}"]
        bodies.append(json.loads(handler.body))
        return 200, {"Content-Type": vendor.content_type}, [replies.pop(0)]

    with ScriptedServer(reply) as server:
        entry = {"provider": vendor.spec.id, "baseUrl": server.url, "apiKey": "k"}
        if vendor.protocol == "responses":
            # Only OpenAI's own address is asked for responses.
            entry.update(provider="openai", baseUrl=f"{server.url}/api.openai.com/v1")
        elif vendor.spec.id == "lab":
            entry["protocol"] = vendor.protocol
        site.call("models.configure", **entry)
        with Talk(site, f"{entry['provider']}/m") as talk:
            messages = talk.ask("who is there?")
    assert messages[-1]["text"] == "Both are there."
    outputs = [json.loads(text) for text in vendor.results(bodies[-1])]
    assert [o["stdout"] for o in outputs] == ["on alpha\n", "on beta\n"]
    for body in bodies:
        vendor.check(body)
    # What was read once is the beginning of what comes next.
    first, second = (body.get("input") or body["messages"] for body in bodies)
    if vendor.protocol != "anthropic":  # whose marks move
        assert second[: len(first)] == first


# -- real servers --------------------------------------------------------------


class Upstream:
    """A vendor's server behind a real proxy, by whichever protocol that asks."""

    def __init__(self, *vendors):
        self.vendors = vendors
        self.replies = []
        self.bodies = []
        self.server = ScriptedServer(self._reply)

    def _reply(self, handler):
        path = handler.path.partition("?")[0]
        self.vendor = next(v for v in self.vendors if path.endswith(v.path))
        self.bodies.append(json.loads(handler.body))
        return self.replies.pop(0)()

    def stream(self, *answer, **more):
        self.replies.append(
            lambda: (
                200,
                {"Content-Type": self.vendor.content_type},
                [self.vendor.answer(*answer, **more)],
            )
        )

    def refuse(self, status, message):
        headers = {"Content-Type": "application/json"}
        self.replies.append(lambda: (status, headers, [self.vendor.error(message)]))


LITELLM_KEY = "sk-litellm-0123456789"


@pytest.fixture(scope="module")
def litellm(tmp_path_factory):
    """A LiteLLM proxy and, by the name of the model, what is behind it."""
    pytest.importorskip("litellm", reason="the proxy LiteLLM is not installed")
    directory = tmp_path_factory.mktemp("litellm")
    upstreams = {
        "openai": Upstream(VENDORS["openai"], VENDORS["responses"]),
        "anthropic": Upstream(VENDORS["anthropic"]),
    }
    port = free_port()
    settings = {
        "model_list": [
            {
                "model_name": name,
                "litellm_params": {
                    "model": f"{name}/m",
                    "api_base": upstream.server.url,
                    "api_key": "sk-upstream",
                },
            }
            for name, upstream in upstreams.items()
        ],
        "general_settings": {"master_key": LITELLM_KEY},
        "litellm_settings": {"num_retries": 0, "telemetry": False},
    }
    (directory / "config.yaml").write_text(json.dumps(settings))
    program = Program(
        *("--config", "config.yaml", "--host", "127.0.0.1", "--port", port),
        program=Path(sys.executable).parent / "litellm",
        home=directory,
        LITELLM_LOCAL_MODEL_COST_MAP="True",  # it is in the package, too
    )
    program.wait_for_output("Uvicorn running", timeout=120)  # it imports for long
    yield f"http://127.0.0.1:{port}", upstreams
    program.end()
    for upstream in upstreams.values():
        upstream.server.close()
        assert not upstream.replies


@pytest.mark.parametrize("protocol", ["openai", "anthropic"])
@pytest.mark.parametrize("name", ["openai", "anthropic"])
def test_a_model_behind_litellm_asks_two_nodes(litellm, site, name, protocol):
    """Asked in each protocol, LiteLLM translates to and from each."""
    url, upstreams = litellm
    upstream = upstreams[name]
    upstream.bodies.clear()
    wanted = [
        (f"call_{node}", "exec", {"command": f"echo on {node}", "node": node})
        for node in ("alpha", "beta")
    ]
    upstream.stream("I look.", wanted)
    upstream.stream("Both are there.")
    entry = {"provider": "proxy", "baseUrl": url, "apiKey": LITELLM_KEY}
    site.call("models.configure", **entry, protocol=protocol)
    with Talk(site, f"proxy/{name}") as talk:
        messages = talk.ask("who is there?")
    assert messages[-1]["text"] == "Both are there."
    outputs = [json.loads(t) for t in upstream.vendor.results(upstream.bodies[-1])]
    assert [o["stdout"] for o in outputs] == ["on alpha\n", "on beta\n"]
    assert "sk-" not in json.dumps(messages)


@pytest.mark.parametrize("name", ["openai", "anthropic"])
def test_errors_come_through_litellm(litellm, name):
    url, upstreams = litellm
    provider = moltis.OpenAiProvider(
        moltis.OWN_SERVERS["openai"], url + "/v1", LITELLM_KEY, first_pause=0.01
    )

    def ask(model):
        model = moltis.ProviderModel(provider, model)
        return list(model.stream(HELLO, (EXEC,), Cancellation()))

    upstreams[name].refuse(400, "prompt is too long: 210000 tokens > 200000 maximum")
    with pytest.raises(ContextTooLong):
        ask(name)
    upstreams[name].refuse(400, "temperature is out of range")
    with pytest.raises(moltis.ModelError, match="temperature is out of range") as said:
        ask(name)
    assert "sk-" not in str(said.value) + said.value.detail
    reason = "length" if name == "openai" else "max_tokens"
    upstreams[name].stream("half an answ", [CALL], reason=reason)
    finished = ask(name)[-1]
    assert (finished.reason, finished.message.tool_calls) == ("length", ())
    assert (finished.input_tokens, finished.output_tokens) == (7, 3)
    with pytest.raises(moltis.ModelError, match="nope"):
        ask("nope")
    with pytest.raises(moltis.ModelError, match="No connected db"):
        provider._api_key = "sk-wrong"
        ask(name)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The address of a llama.cpp server; see llama_server.py for what it says."""
    for package in ("xllamacpp", "gguf"):
        pytest.importorskip(package, reason=f"{package}, for llama.cpp, is not there")
    directory = tmp_path_factory.mktemp("llama")
    script = Path(__file__).with_name("llama_server.py")
    program = Program(directory, program=script, home=directory)
    said = program.wait_for_output("listening on http", timeout=60)
    yield re.search(r"listening on (\S+)", said).group(1)
    program.end()


@pytest.mark.parametrize("protocol", ["openai", "anthropic"])
def test_a_model_of_llama_cpp_asks_two_nodes(llama, site, protocol):
    entry = {"provider": "llama", "baseUrl": llama, "protocol": protocol}
    site.call("models.configure", **entry)
    [_, listed] = site.call("models.list")
    assert listed["supportsTools"]
    with Talk(site, listed["id"]) as talk:
        messages = talk.ask("who is there?")
        cards = [m["command"] for m in messages if m["role"] == "command"]
        assert sorted(card["node"] for card in cards) == ["alpha", "beta"]
        assert messages[-1]["text"] == "Both are there."
        assert messages[-1]["usage"]["outputTokens"] > 5
        # It would go on for thousands of words.
        run_id = talk.send("count")
        talk.wait_for(run_id, "delta")
        talk.abort()
        talk.wait_for(run_id, "aborted")
        assert talk.ask("still there?")[-1]["text"] == "Both are there."


@pytest.mark.parametrize("protocol", ["openai", "anthropic"])
def test_llama_cpp_says_what_did_not_fit(llama, protocol):
    provider = moltis.PROTOCOLS[protocol](
        moltis.OWN_SERVERS[protocol], moltis._tidy_url(protocol, llama), ""
    )
    model = moltis.ProviderModel(provider, "says")
    with pytest.raises(ContextTooLong):
        list(model.stream([ChatMessage("user", "x" * 20_000)], (), Cancellation()))
    *told, finished = model.stream([ChatMessage("user", "count")], (), Cancellation())
    assert finished.reason == "length"
    assert (len(told) > 1000, finished.output_tokens > 1000) == (True, True)
