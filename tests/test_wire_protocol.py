"""Envelopes, logs, connect and calls."""

from __future__ import annotations

import json
import threading
import uuid

import pytest
from support import wait_for

import moltis

ID = "0f0e0d0c-0b0a-0908-0706-050403020100"


@pytest.mark.parametrize(
    ("envelope", "text"),
    [
        (
            moltis.Request("1", "node.list", {}),
            '{"type":"req","id":"1","method":"node.list","params":{}}',
        ),
        (
            moltis.Response("1", [1]),
            '{"type":"res","id":"1","ok":true,"payload":[1]}',
        ),
        (
            moltis.Response("1", None, moltis.RpcError("NOT_FOUND", "é")),
            '{"type":"res","id":"1","ok":false,"error":{"code":"NOT_FOUND","message":"é"}}',
        ),
        (moltis.Event("presence"), '{"type":"event","event":"presence"}'),
        (
            moltis.Event("chat", {"a": 1}, 7),
            '{"type":"event","event":"chat","payload":{"a":1},"seq":7}',
        ),
    ],
)
def test_an_envelope_is_spelled_like_this_and_read_back(envelope, text):
    assert moltis.encode_envelope(envelope) == text
    again = moltis.decode_envelope(text)
    assert moltis.encode_envelope(again) == text


def test_an_error_carries_what_it_knows_and_no_null():
    error = moltis.RpcError(
        "RATE_LIMITED", "later", details={"n": 1}, retryable=True, retry_after=1.5
    )
    assert moltis.encode_error(error) == {
        "code": "RATE_LIMITED",
        "message": "later",
        "details": {"n": 1},
        "retryable": True,
        "retryAfterMs": 1500,
    }
    again = moltis.decode_error(moltis.encode_error(error))
    assert (again.code, again.retryable, again.retry_after) == (
        "RATE_LIMITED",
        True,
        1.5,
    )


def test_secrets_do_not_travel_in_errors():
    error = moltis.RpcError("INTERNAL", "mdt_" + "x" * 43)
    assert "xxx" not in moltis.encode_error(error)["message"]


@pytest.mark.parametrize(
    "value",
    [{}, {"code": 7, "message": None}, {"retryAfterMs": "soon", "retryable": 1}],
)
def test_whatever_a_peer_calls_an_error_becomes_one(value):
    error = moltis.decode_error(value)
    assert isinstance(error.code, str)
    assert error.message
    assert error.retryable is None
    assert error.retry_after is None


@pytest.mark.parametrize(
    ("text", "known_id"),
    [
        ("", ""),
        ("{", ""),
        ("[]", ""),
        ("7", ""),
        ('{"type":"req"}', ""),
        ('{"type":"req","id":5,"method":"x"}', ""),
        ('{"type":"req","id":"a"}', "a"),
        ('{"type":"req","id":"a","method":7}', "a"),
        ('{"type":"req","id":"a","method":"x","params":[]}', "a"),
        ('{"type":"res","id":"a"}', "a"),
        ('{"type":"res","id":"a","ok":"yes"}', "a"),
        ('{"type":"res","id":"a","ok":false,"error":"no"}', "a"),
        ('{"type":"event"}', ""),
        ('{"type":"event","event":"x","seq":"1"}', ""),
        ('{"type":"bogus","id":"a"}', "a"),
        ('{"id":"a"}', "a"),
        ("[" * 100_000 + "]" * 100_000, ""),
        ('{"type":"req","id":"a","method":"\\ud800"}', ""),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_a_message_that_is_no_envelope_is_refused_under_its_id(text, known_id):
    with pytest.raises(moltis.EnvelopeError) as caught:
        moltis.decode_envelope(text)
    assert caught.value.code == "INVALID_REQUEST"
    assert caught.value.id == known_id


def test_unknown_fields_and_null_are_ignored():
    text = '{"type":"req","id":"1","method":"x","params":null,"zzz":[1],"seq":9}'
    assert moltis.decode_envelope(text) == moltis.Request("1", "x", {})


# -- binary messages and log frames ---------------------------------------------


def test_a_binary_message_is_kind_id_offset_and_data():
    message = moltis.encode_job_data(moltis.INPUT_DATA, ID, 258, b"\x00data")
    assert message == b"\x02" + uuid.UUID(ID).bytes + b"\0\0\0\0\0\0\x01\x02" + (
        b"\x00data"
    )
    assert moltis.decode_job_data(message) == (2, ID, 258, b"\x00data")


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b"", "PROTOCOL_ERROR"),
        (b"\x01" + bytes(23), "PROTOCOL_ERROR"),
        (b"\x00" + bytes(24), "PROTOCOL_ERROR"),
        (b"\x03" + bytes(24), "PROTOCOL_ERROR"),
        (b"\x01" + bytes(16) + b"\x80" + bytes(7), "PROTOCOL_ERROR"),
        (b"\x01" + bytes(24 + 65537), "PAYLOAD_TOO_LARGE"),
    ],
    ids=lambda value: repr(value[:3]),
)
def test_a_malformed_binary_message_is_refused(message, code):
    with pytest.raises(moltis.RpcError) as caught:
        moltis.decode_job_data(message)
    assert caught.value.code == code


def test_the_longest_binary_message_carries_64_kib():
    assert len(moltis.decode_job_data(b"\x01" + bytes(24 + 65536))[3]) == 65536


def frame(kind, data):
    return moltis.encode_log_frame(kind, data)


ENDING = frame(moltis.ENDING, b'{"state":"done","exitCode":3}')


def test_only_whole_frames_are_read():
    data = frame(moltis.STDOUT, b"out") + frame(moltis.STDERR, b"")
    for cut in range(8, 13):
        assert moltis.whole_frames(data[:cut]) == 8
        assert list(moltis.log_frames(data[:cut])) == [(moltis.STDOUT, b"out")]
    assert moltis.whole_frames(data) == 13
    assert moltis.whole_frames(b"") == 0


def test_checked_frames_return_their_ending():
    output = frame(moltis.STDOUT, b"out")
    assert moltis.check_frames(b"") is None
    assert moltis.check_frames(output) is None
    assert moltis.check_frames(output + ENDING).exit_code == 3


@pytest.mark.parametrize(
    "data",
    [
        frame(moltis.STDOUT, b"out")[:-1],
        frame(moltis.STDOUT, b"out")[:3],
        frame(9, b"x"),
        ENDING + frame(moltis.STDOUT, b"after it"),
        ENDING + ENDING,
        frame(moltis.ENDING, b"[]"),
        frame(moltis.ENDING, b'{"state":"lost"}'),
        frame(moltis.ENDING, b'{"state":"done","duration":1e300}'),
        frame(moltis.ENDING, b'{"state":"done","stdoutBytes":-1}'),
        frame(moltis.ENDING, b'{"state":"done","exitCode":4294967296}'),
    ],
)
def test_frames_that_break_the_rules_are_refused(data):
    with pytest.raises(moltis.RpcError) as caught:
        moltis.check_frames(data)
    assert caught.value.code == "PROTOCOL_ERROR"


def test_the_words_of_an_ending_cannot_write_on_a_terminal():
    data = json.dumps({"state": "failed", "reason": "a\x1b[2Jb" + "c" * 9000}).encode()
    ending = moltis.decode_ending(data)
    assert ending.words().startswith("failed: a\\x1b[2Jb")
    assert len(ending.reason) < 2100


# -- connect -------------------------------------------------------------------

RUST = {
    "protocol": {"min": 4, "max": 4},
    "client": {
        "id": "n1",
        "displayName": "Box",
        "version": "1",
        "platform": "linux",
        "mode": "headless",
    },
    "role": "node",
    "auth": {"deviceToken": "mdt_x", "publicKey": "k"},
    "extensions": {"moltis": {"caps": ["exec"], "commands": ["system.run"]}},
}


def test_connect_is_read_as_a_rust_node_writes_it():
    params = moltis.ConnectParams.from_json(RUST)
    assert params == moltis.ConnectParams(
        role="node",
        client_id="n1",
        display_name="Box",
        version="1",
        platform="linux",
        capabilities=("exec",),
        commands=("system.run",),
        device_token="mdt_x",
    )
    params.check_protocol()


def test_connect_is_read_in_its_older_flat_form():
    params = moltis.ConnectParams.from_json(
        {
            "minProtocol": 3,
            "maxProtocol": 4,
            "client": {"id": "n1"},
            "caps": ["exec"],
            "commands": ["system.run"],
            "role": "node",
            "auth": {"deviceToken": "mdt_x"},
        }
    )
    assert (params.min_protocol, params.max_protocol) == (3, 4)
    assert params.capabilities == ("exec",)
    assert params.commands == ("system.run",)
    params.check_protocol()


def test_connect_of_an_operator_has_its_key_in_snake_case():
    params = moltis.ConnectParams(role="operator", api_key="mk_x")
    assert params.to_json()["auth"] == {"api_key": "mk_x"}
    assert moltis.ConnectParams.from_json(params.to_json()) == params


def test_connect_of_ours_names_the_logs_that_it_holds():
    params = moltis.ConnectParams(role="node", instance="i", jobs={ID: 5})
    assert moltis.ConnectParams.from_json(params.to_json()) == params


def test_connect_is_written_like_this():
    params = moltis.ConnectParams("node", "n1", commands=("x",), scram_final="f")
    assert params.to_json() == {
        "role": "node",
        "client": {"id": "n1", "mode": "headless"},
        "protocol": {"min": 4, "max": 4},
        "auth": {"scram": {"clientFinal": "f"}},
        "extensions": {"moltis": {"caps": [], "commands": ["x"]}},
    }


def test_connect_of_nobody_in_particular_is_an_operator_s():
    for params in ({}, {"role": "", "client": None}):
        assert moltis.ConnectParams.from_json(params) == moltis.ConnectParams()
    assert moltis.ConnectParams().role == "operator"


@pytest.mark.parametrize(
    "params",
    [
        {"protocol": 4},
        {"client": []},
        {"client": {"id": 7}},
        {"auth": "mdt_x"},
        {"auth": {"deviceToken": 7}},
        {"extensions": {"moltis": []}},
        {"extensions": {"moltis": {"caps": "exec"}}},
        {"extensions": {"moltis": {"jobs": [ID]}}},
        {"extensions": {"moltis": {"jobs": {"x": 0}}}},
        {"extensions": {"moltis": {"jobs": {ID: -1}}}},
        {"extensions": {"moltis": {"jobs": {moltis.new_id(): 0 for _ in range(4097)}}}},
        {"minProtocol": "4"},
    ],
)
def test_connect_with_a_wrong_type_is_refused(params):
    with pytest.raises(moltis.RpcError) as caught:
        moltis.ConnectParams.from_json(params)
    assert caught.value.code == "INVALID_REQUEST"


def test_what_a_node_says_of_itself_is_bounded():
    ours = {"caps": ["x" * 10_000] * 10_000, "commands": [7, None, "system.run"]}
    params = moltis.ConnectParams.from_json({"extensions": {"moltis": ours}})
    assert sum(map(len, params.capabilities)) <= 100 * 100
    assert params.commands == ("system.run",)


def test_what_a_node_says_of_itself_cannot_write_on_a_terminal():
    client = {"id": "n", "displayName": "a\x1b[2Jb\n", "platform": "li\u202enux"}
    params = moltis.ConnectParams.from_json({"client": client})
    assert params.display_name == "a[2Jb"
    assert params.platform == "linux"


# -- calls ---------------------------------------------------------------------


def test_a_call_is_known_before_it_is_sent():
    """A fast answer finds it: here it comes while the request is being sent."""

    def send(text):
        calls.answer(moltis.Response(json.loads(text)["id"], "fast"))

    calls = moltis.Calls(send)
    assert calls.call("x", {}, 10) == "fast"


def test_an_error_is_raised_where_the_call_was_made():
    def send(text):
        error = moltis.RpcError("CONFLICT", "again?")
        calls.answer(moltis.Response(json.loads(text)["id"], None, error))

    calls = moltis.Calls(send)
    with pytest.raises(moltis.RpcError, match="again"):
        calls.call("x", {}, 10)


def test_a_call_that_is_not_answered_in_time_says_so():
    calls = moltis.Calls(lambda text: None)
    with pytest.raises(moltis.RpcError, match=r"no answer to slow within 0\.01 s"):
        calls.call("slow", {}, 0.01)


def test_an_answer_that_nobody_waits_for_is_dropped():
    moltis.Calls(lambda text: None).answer(moltis.Response("nobody's", 1))


def test_a_call_that_cannot_be_sent_is_forgotten():
    def send(text):
        raise moltis.ConnectionClosed(1006)

    calls = moltis.Calls(send)
    with pytest.raises(moltis.ConnectionClosed):
        calls.call("x", {}, 10)
    assert not calls._pending


def test_closing_fails_all_calls_and_those_to_come():
    calls = moltis.Calls(lambda text: None)
    errors = []

    def call():
        try:
            calls.call("x", {}, 30)
        except moltis.ConnectionClosed as error:
            errors.append(error.code)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(calls._pending) == 3, what="three calls")
    calls.close(moltis.ConnectionClosed(1001))
    for thread in threads:
        thread.join()
    assert errors == [1001] * 3
    with pytest.raises(moltis.ConnectionClosed):
        calls.call("late", {}, 30)
