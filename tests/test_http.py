"""The gateway's door, spoken to as bytes."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import socket
import time
import types

import pytest
from peers import InProcessGateway, RawPeer
from support import PROGRAM, wait_for, wait_in_shell

import moltis


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    with InProcessGateway(tmp_path_factory.mktemp("gateway")) as running:
        yield running


class Answer:
    def __init__(self, raw):
        head, _, self.body = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split()[1])
        self.headers = dict(line.split(": ", 1) for line in lines)

    @property
    def json(self):
        return json.loads(self.body)


def talk(gateway, data):
    """Send bytes; return all that comes until the gateway hangs up."""
    port = int(gateway.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 20) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while True:
                piece = sock.recv(65536)
                if not piece:
                    break
                answer += piece
    return answer


def ask(gateway, method, path, body=b"", **headers):
    headers = {"Host": "127.0.0.1", "Connection": "close", **headers}
    if method == "POST":
        headers.setdefault("Content_Length", str(len(body)))
    lines = "".join(f"{n.replace('_', '-')}: {v}\r\n" for n, v in headers.items())
    head = f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1")
    return Answer(talk(gateway, head + body))


def rpc(gateway, value, **headers):
    headers.setdefault("Authorization", f"Bearer {gateway.api_key}")
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return ask(gateway, "POST", "/api/rpc", body, **headers)


# -- routes --------------------------------------------------------------------


def test_health_says_version_protocol_connections_and_the_time(gateway):
    answer = ask(gateway, "GET", "/health")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json == {
        "status": "ok",
        "version": moltis.__version__,
        "protocol": 4,
        "connections": answer.json["connections"],
        "at": answer.json["at"],
    }
    assert abs(answer.json["at"] / 1000 - time.time()) < 60


def test_head_has_the_headers_and_no_body(gateway):
    answer = ask(gateway, "HEAD", "/health")
    assert answer.status == 200
    assert int(answer.headers["Content-Length"]) > 0
    assert answer.body == b""


def test_the_gateway_serves_itself(gateway):
    assert ask(gateway, "GET", "/moltis.py").body == PROGRAM.read_bytes()
    assert ask(gateway, "GET", "/install.sh").body.startswith(b"#!/bin/sh\n")


def test_every_answer_keeps_other_pages_out(gateway):
    for path in ("/health", "/nothing", "/"):
        headers = ask(gateway, "GET", path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/../etc/passwd", 404),
        ("GET", "/%2e%2e/etc/passwd", 404),
        ("GET", "/api/rpc", 405),
        ("POST", "/health", 405),
        ("PUT", "/health", 501),
        ("GET", "/ws", 426),
    ],
)
def test_what_is_not_there_is_said_so(gateway, method, path, status):
    answer = ask(gateway, method, path)
    assert answer.status == status
    assert b"<html" not in answer.body.lower()


def test_a_method_that_is_not_allowed_names_the_one_that_is(gateway):
    assert ask(gateway, "GET", "/api/rpc").headers["Allow"] == "POST"


def test_a_query_is_no_part_of_the_path(gateway):
    assert ask(gateway, "GET", "/health?x=1").status == 200


def test_a_connection_may_ask_more_than_once(gateway):
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    answer = talk(gateway, one + b"\r\n" + one + b"Connection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 OK") == 2


# -- /api/rpc ------------------------------------------------------------------


def test_a_call_is_answered_by_a_response_envelope(gateway):
    answer = rpc(gateway, {"method": "node.list", "params": {}})
    assert answer.status == 200
    assert answer.json["type"] == "res"
    assert answer.json["ok"] is True
    assert answer.json["payload"][0]["nodeId"] == "local"


def test_the_answer_carries_the_id_of_the_request(gateway):
    answer = rpc(gateway, {"id": "mine", "method": "node.list"})
    assert answer.json["id"] == "mine"


def test_a_command_s_result_comes_in_one_piece(tmp_path):
    args = {"command": "echo hi; exit 3", "stream": True}
    params = {"nodeId": "local", "command": "system.run", "args": args}
    with InProcessGateway(tmp_path) as gateway:
        answer = rpc(gateway, {"method": "node.invoke", "params": params})
    payload = answer.json["payload"]
    assert payload["stdout"] == "hi\n"
    assert payload["exitCode"] == 3
    assert payload["node"] == "Local"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "INVALID_REQUEST"),
        (b"{", 400, "INVALID_REQUEST"),
        (b"[]", 400, "INVALID_REQUEST"),
        (b"\xff", 400, "INVALID_REQUEST"),
        (b"[" * 100_000 + b"]" * 100_000, 400, "INVALID_REQUEST"),
        ({"method": 7}, 400, "INVALID_REQUEST"),
        ({"method": "node.list", "params": []}, 400, "INVALID_REQUEST"),
        ({"method": "node.list", "id": 7}, 400, "INVALID_REQUEST"),
        (b'{"method":"\\ud800"}', 400, "INVALID_REQUEST"),
        ({"method": "no.such"}, 404, "UNKNOWN_METHOD"),
        ({"method": "connect"}, 404, "UNKNOWN_METHOD"),
        ({"method": "subscribe", "params": {"events": []}}, 400, "INVALID_REQUEST"),
        (
            {"method": "node.describe", "params": {"nodeId": "nowhere"}},
            404,
            "NOT_FOUND",
        ),
        ({"method": "node.describe", "params": {}}, 400, "INVALID_REQUEST"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_call_that_makes_no_sense_is_an_error_envelope(gateway, body, status, code):
    answer = rpc(gateway, body)
    assert answer.status == status
    assert answer.json["ok"] is False
    assert answer.json["error"]["code"] == code


@pytest.mark.parametrize(
    "authorization", ["", "Bearer", "Bearer mk_" + "x" * 43, "Basic eDp5", "Bearer é"]
)
def test_without_the_operator_key_nothing_is_answered(tmp_path, authorization):
    with InProcessGateway(tmp_path) as gateway:
        answer = rpc(gateway, {"method": "node.list"}, Authorization=authorization)
        assert answer.status == 401
        assert answer.json["error"]["code"] == "UNAUTHORIZED"
        assert "payload" not in answer.json


def test_a_device_token_opens_nothing_here(gateway):
    token = gateway.token("sly")
    answer = rpc(gateway, {"method": "node.list"}, Authorization=f"Bearer {token}")
    assert answer.status in (401, 403)


def test_failed_sign_ins_are_limited_and_say_when_to_come_back(tmp_path):
    with InProcessGateway(tmp_path) as gateway:
        statuses = []
        for _ in range(7):
            body = json.dumps({"key": "mk_" + "x" * 43}).encode()
            answer = ask(gateway, "POST", "/api/sign-in", body)
            statuses.append(answer.status)
        assert statuses[:5] == [401] * 5
        assert statuses[-1] == 429
        assert 0 < int(answer.headers["Retry-After"]) <= 60


def test_a_sign_in_is_a_cookie_that_no_script_reads(gateway):
    body = json.dumps({"key": gateway.api_key}).encode()
    answer = ask(gateway, "POST", "/api/sign-in", body)
    assert answer.status == 200
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert answer.json["pageSecret"] not in cookie
    signed_in = {
        "Cookie": cookie.partition(";")[0],
        "X_Moltis_Page": answer.json["pageSecret"],
        "Authorization": "",
    }
    assert rpc(gateway, {"method": "node.list"}, **signed_in).status == 200
    out = ask(gateway, "POST", "/api/sign-out", **signed_in)
    assert "Max-Age=0" in out.headers["Set-Cookie"]
    assert rpc(gateway, {"method": "node.list"}, **signed_in).status == 401


def test_the_cookie_alone_opens_nothing(gateway):
    """Browsers send it to every port of a host, so others may learn it."""
    body = json.dumps({"key": gateway.api_key}).encode()
    host = gateway.url.partition("://")[2]
    answer = ask(gateway, "POST", "/api/sign-in", body, Host=host)
    cookie = {"Cookie": answer.headers["Set-Cookie"].partition(";")[0]}
    secret = answer.json["pageSecret"]
    call = {"method": "node.list"}
    for given in (cookie, {"X_Moltis_Page": secret}, {**cookie, "X_Moltis_Page": "x"}):
        assert rpc(gateway, call, Authorization="", Host=host, **given).status == 401
        for path in ("/api/audit.csv", "/api/jobs/x/output"):
            assert ask(gateway, "GET", path, Host=host, **given).status == 401
    with RawPeer(gateway.websocket_url, headers=list(cookie.items())) as peer:
        params = moltis.ConnectParams(role="operator", client_id="page").to_json()
        assert peer.request("connect", params)["error"]["code"] == "FORBIDDEN"
    for half, code in (("x", "UNAUTHORIZED"), (secret, None)):
        with RawPeer(gateway.websocket_url, headers=list(cookie.items())) as peer:
            params["auth"] = {"pageSecret": half}
            answer = peer.request("connect", params)
            assert answer.get("error", {}).get("code") == code


@pytest.mark.parametrize(
    "others",
    [
        'prefs={{"a":"b"}}; {cookie}',
        'x="a; b; {cookie}; z=[1,2]',
        "=; ;;{cookie}",
        "a=" + "b;" * 20_000 + "{cookie}",
        "{name}=; {name}=of_another_port_with_a_longer_path; {cookie}",
    ],
)
def test_our_cookie_is_found_among_those_of_others(gateway, others):
    body = json.dumps({"key": gateway.api_key}).encode()
    answer = ask(gateway, "POST", "/api/sign-in", body)
    ours = answer.headers["Set-Cookie"].partition(";")[0]
    cookie = others.format(cookie=ours, name=ours.partition("=")[0])
    headers = {"Cookie": cookie, "X_Moltis_Page": answer.json["pageSecret"]}
    listed = rpc(gateway, {"method": "node.list"}, Authorization="", **headers)
    assert listed.status == 200


def test_two_gateways_on_one_host_name_their_cookies_apart(gateway, tmp_path):
    body = json.dumps({"key": gateway.api_key}).encode()
    with InProcessGateway(tmp_path) as other:
        other_body = json.dumps({"key": other.api_key}).encode()
        names = set()
        for each, key in ((gateway, body), (other, other_body)):
            host = each.url.partition("://")[2]
            answer = ask(each, "POST", "/api/sign-in", key, Host=host)
            names.add(answer.headers["Set-Cookie"].partition("=")[0])
    assert len(names) == 2


@pytest.mark.parametrize("path", ["/join/x", "/api/rpc", "/health"])
@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_page_of_another_site_gets_no_answer_and_costs_no_attempt(
    tmp_path, path, site
):
    with InProcessGateway(tmp_path) as gateway:
        for _ in range(7):
            answer = ask(gateway, "GET", path, Sec_Fetch_Site=site)
            assert answer.status == 403
        code = gateway.call("device.token.create")["joinCode"]
        assert ask(gateway, "GET", f"/join/{code}").status == 200


def test_a_link_on_another_site_leads_to_the_page(gateway):
    link = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}
    assert ask(gateway, "GET", "/chat/main", **link).status == 200


# -- downloads -----------------------------------------------------------------


def download(gateway, path, **headers):
    headers.setdefault("Authorization", f"Bearer {gateway.api_key}")
    return ask(gateway, "GET", path, **headers)


def run_in_background(gateway, command):
    run = {"nodeId": "local", "command": "system.run", "args": {"command": command}}
    return gateway.call("node.invoke", **run, background=True)["invokeId"]


def test_the_output_of_a_job_is_a_file(gateway):
    job_id = run_in_background(gateway, "head -c 3000000 /dev/zero; echo end >&2")
    assert gateway.call("job.wait", id=job_id, wait=60)["state"] == "done"
    answer = download(gateway, f"/api/jobs/{job_id}/output")
    assert answer.status == 200
    begin, _, rest = answer.body.partition(b"end\n")  # of the other output: anywhere
    assert begin + rest == bytes(3_000_000)
    assert answer.headers["Connection"] == "close"
    assert answer.headers["Cache-Control"] == "no-store"
    name = f'attachment; filename="output-{job_id[:8]}.txt"'
    assert answer.headers["Content-Disposition"] == name


def test_a_download_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(moltis, "MAX_SEGMENTS", 3)
    with InProcessGateway(tmp_path) as gateway:
        job_id = run_in_background(gateway, "echo first; head -c 9000000 /dev/zero")
        gateway.call("job.wait", id=job_id, wait=60)
        body = download(gateway, f"/api/jobs/{job_id}/output").body
    assert body.startswith(b"first\n")
    assert body.count("bytes cut …]".encode()) == 1
    assert len(body) < 5_000_000


def test_a_download_ends_though_its_command_goes_on(tmp_path):
    log = moltis.Log(tmp_path / "log")
    frame = moltis.encode_log_frame(1, b"y\n")
    log.append(0, frame)
    pieces = []
    for piece in itertools.islice(moltis.job_output(types.SimpleNamespace(log=log)), 9):
        pieces.append(piece)
        log.append(log.end, frame)  # faster than it is read
    assert pieces == [b"y\n"]


def test_the_audit_is_a_file_in_which_nothing_is_a_formula(gateway):
    gateway.call("device.token.create", displayName="=1+1")
    answer = download(gateway, "/api/audit.csv")
    first, *rows = answer.body.decode().replace('"', "").splitlines()
    assert first.startswith("at,event,caller,address,subject,node,state,exitCode")
    assert first.endswith("callerId,count,lastAt")
    assert ",'=1+1," in rows[0]


def test_the_audit_is_downloaded_to_its_end_and_as_the_filter_says(
    gateway, monkeypatch
):
    """FAULTS A23"""
    import csv

    monkeypatch.setattr(moltis, "MAX_PAGE", 7)  # rows of one answer
    store = gateway.running.store
    made = [
        moltis.JobRecord(
            id=f"job-{number}",
            node_id=f"n{number % 2}",
            node_name="far",
            caller_kind="operator",
            caller_name="owner",
            asked_at=1000 + number // 20,  # more of one time than a page has
            state="done",
            exit_code=number % 3,
            command="Make all" if number % 5 else "ls",
        )
        for number in range(60)
    ]
    for record in made:
        store.jobs.add(record)

    def jobs(query):
        answer = download(gateway, f"/api/audit.csv{query}")
        assert answer.status == 200
        rows = csv.DictReader(answer.body.decode().splitlines())
        ids = (row["jobId"] for row in rows if row["event"] == "command")
        return sorted(job_id for job_id in ids if job_id.startswith("job-"))

    assert jobs("") == sorted(r.id for r in made)
    assert jobs("?nodeId=n1") == sorted(r.id for r in made if r.node_id == "n1")
    both = [r.id for r in made if r.node_id == "n1" and r.exit_code]
    assert jobs("?state=failed&nodeId=n1") == sorted(both)
    made_all = [r.id for r in made if r.command == "Make all" and r.node_id == "n1"]
    assert jobs("?query=make+A&nodeId=n1") == sorted(made_all)
    assert jobs("?state=lost") == []
    assert download(gateway, "/api/audit.csv?state=lost").body.startswith(b'"at"')
    assert download(gateway, "/api/audit.csv?state=bogus").status == 400
    assert download(gateway, "/api/audit.csv?node=n1").status == 400
    exports = [e for e in store.audit.page() if e.event == "audit.exported"]
    assert (exports[0].caller, exports[0].count >= 4) == ("owner", True)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/jobs/x/output", 404),
        ("/api/jobs/x/input", 404),
        ("/api/jobs/", 404),
        ("/api/audit.csv", 200),
    ],
)
def test_downloads_need_a_credential(gateway, path, status):
    assert download(gateway, path).status == status
    assert ask(gateway, "GET", path).status in (401, 404)


READERS = "operator.read operator.write operator.admin"
ROUTES = [  # and the scopes that may use them; for anything else, 401 or 403
    ("GET", "/api/jobs/x/output", 404, READERS),
    ("GET", "/api/jobs/x/recording", 404, READERS),
    ("GET", "/api/audit.csv", 200, "operator.admin"),
    ("POST", "/api/rpc", 400, " ".join(moltis.SCOPES)),
    ("POST", "/mcp", 400, " ".join(moltis.SCOPES)),
]


@pytest.mark.parametrize(("method", "path", "status", "scopes"), ROUTES)
def test_a_route_is_open_to_its_scopes_alone(gateway, method, path, status, scopes):
    for scope in moltis.SCOPES:
        name = f"{scope} {moltis.new_id()[:8]}"
        key = gateway.call("keys.create", name=name, scopes=[scope])["key"]
        answer = ask(gateway, method, path, Authorization=f"Bearer {key}")
        assert answer.status == (status if scope in scopes.split() else 403)
    for refused in (gateway.token(), "mk_x", ""):
        answer = ask(gateway, method, path, Authorization=f"Bearer {refused}")
        assert answer.status == 401
    assert ask(gateway, method, path).status == 401


# -- bad input -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\r\n\r\n", None),
        (b"nonsense\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"GET /health HTTP/9.9\r\n\r\n", 505),
        (b"GET " + b"/x" * 40_000 + b" HTTP/1.1\r\n\r\n", (414, 431)),
        (b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 10_000 + b"\r\n", 431),
        (b"GET /health HTTP/1.1\r\nA: " + b"b" * 100_000 + b"\r\n\r\n", 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", (400, None)),
        (b"\x00" * 1000 + b"\r\n\r\n", 400),
    ],
    ids=range(9),
)
def test_bytes_that_are_no_request_do_no_harm(gateway, data, status):
    answer = talk(gateway, data + b"GET /nothing HTTP/1.1\r\nConnection: close\r\n\r\n")
    wanted = status if isinstance(status, tuple) else (status,)
    if None not in wanted:
        assert Answer(answer).status in wanted
    assert b"Traceback" not in answer
    assert ask(gateway, "GET", "/health").status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content_Length": "x"}, 411),
        ({"Content_Length": "-1"}, 411),
        ({"Transfer_Encoding": "chunked"}, 400),
        ({"Content_Length": str(10 * 1024 * 1024)}, 413),
        ({"Content_Length": "9" * 400}, 411),
    ],
)
def test_a_body_says_its_length_which_is_bounded(gateway, headers, status):
    assert rpc(gateway, b"{}", **headers).status == status


@pytest.mark.parametrize("host", ["evil.example", "[::1", "a b", "evil.example:9090"])
def test_a_browser_s_request_under_a_foreign_name_is_refused(gateway, host):
    answer = ask(gateway, "GET", "/", Host=host, Cookie="x=y")
    assert answer.status in (400, 421)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://[::1", "https://127.0.0.1"]
)
def test_a_request_from_another_page_is_refused(gateway, origin):
    assert rpc(gateway, {"method": "node.list"}, Origin=origin).status == 403


def test_an_upgrade_that_is_none_says_what_it_lacks(gateway):
    answer = ask(gateway, "GET", "/ws", Upgrade="websocket", Connection="Upgrade")
    assert answer.status == 426
    keyless = ask(
        gateway,
        "GET",
        "/ws",
        Upgrade="websocket",
        Connection="Upgrade",
        Sec_WebSocket_Version="13",
    )
    assert keyless.status == 400
    version = ask(
        gateway,
        "GET",
        "/ws",
        Upgrade="websocket",
        Connection="Upgrade",
        Sec_WebSocket_Key="AAAAAAAAAAAAAAAAAAAAAA==",
        Sec_WebSocket_Version="7",
    )
    assert version.status == 426
    assert version.headers["Sec-WebSocket-Version"] == "13"


def test_a_client_that_leaves_in_the_middle_does_no_harm(gateway):
    port = int(gateway.url.rpartition(":")[2])
    half = b"POST /api/rpc HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"
    for data in (b"", b"GET /hea", half):
        with socket.create_connection(("127.0.0.1", port), 5) as sock:
            sock.sendall(data)
    assert ask(gateway, "GET", "/health").status == 200


@contextlib.contextmanager
def asking(gateway, method, params):
    """Ask over HTTP; yield the socket, on which the answer comes."""
    body = json.dumps({"method": method, "params": params}).encode()
    head = (
        "POST /api/rpc HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Authorization: Bearer {gateway.api_key}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    port = int(gateway.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 60) as sock:
        sock.sendall(head.encode() + body)
        yield sock


def test_a_client_that_ends_only_its_own_side_gets_its_answer(
    gateway, monkeypatch, tmp_path
):
    """RFC 9112 §9.6; as `nc -N` does it"""
    looks, look = [], moltis.is_closed_there
    monkeypatch.setattr(moltis, "ABANDONED_LOOK", 0.01)
    monkeypatch.setattr(
        moltis, "is_closed_there", lambda sock: looks.append(look(sock)) or looks[-1]
    )
    spec = {"command": wait_in_shell(tmp_path / "go")}
    jobs = [{"id": moltis.new_id(), "node": moltis.LOCAL_ID}]
    gateway.call("job.start", jobs=jobs, work="run", spec=spec, keep=True)
    with asking(gateway, "job.wait", {"id": jobs[0]["id"], "wait": 300}) as sock:
        sock.shutdown(socket.SHUT_WR)
        wait_for(lambda: looks.count(True) > 2, what="looks whether it has left")
        (tmp_path / "go").touch()
        with sock.makefile("rb") as file:
            interim, rest = file.read().split(b"\r\n\r\n", 1)
    assert interim == b"HTTP/1.1 100 Continue"
    assert Answer(rest).status == 200
    assert Answer(rest).json["payload"]["state"] == "done"


def test_what_follows_the_upgrade_in_the_same_packet_is_read(gateway):
    """The first frame may come with the request, before its answer."""
    connect = {
        "type": "req",
        "id": "1",
        "method": "connect",
        "params": {"role": "operator", "auth": {"api_key": gateway.api_key}},
    }
    client = moltis.WebSocketProtocol(client=True)
    client.send(json.dumps(connect))
    port = int(gateway.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(
            b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n" + client.outgoing()
        )
        data = b""
        while b"hello-ok" not in data:
            piece = sock.recv(65536)
            assert piece, data
            data += piece


def test_connections_are_forgotten_when_they_end(gateway):
    with gateway.operator() as client:
        count = ask(gateway, "GET", "/health").json["connections"]
        assert client.call("node.list", {})
    wait_for(
        lambda: ask(gateway, "GET", "/health").json["connections"] < count,
        what="one connection less",
    )


def test_a_wait_ends_when_its_client_has_left(gateway):
    """It held a place among the answers that wait until its time was up."""
    jobs = gateway.running.jobs
    spec = {"command": "sleep 120"}
    asked = {"jobs": [{"node": "local"}], "work": "run", "spec": spec, "keep": True}
    with gateway.operator() as owner:
        [job] = owner.call("job.start", asked)["jobs"]
        for method, params in (
            ("job.wait", {"id": job["id"], "wait": 300}),
            ("job.read", {"id": job["id"], "wait": 300}),
            ("node.invoke", {"nodeId": "local", "command": "system.run", "args": spec}),
        ):
            with asking(gateway, method, params):
                wait_for(lambda: jobs._waits, what=f"{method} to wait")
            wait_for(lambda: not jobs._waits, what=f"the end of {method}")
        for running in owner.call("job.list", {"state": "running"}):
            owner.call("job.cancel", {"id": running["id"]})


def test_a_wait_ends_with_a_time_out_of_the_disk(tmp_path, monkeypatch):
    """From Python 3.11 on it has the class of the error for a wait that goes on."""
    spec = {"command": "echo x"}
    asked = {"jobs": [{"node": "local"}], "work": "run", "spec": spec, "keep": True}

    def read(*_arguments):
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    # A gateway of its own: on the others' one, jobs of other tests may just end.
    with InProcessGateway(tmp_path) as gateway:
        with gateway.operator() as owner:
            [job] = owner.call("job.start", asked)["jobs"]
            owner.call("job.wait", {"id": job["id"], "wait": 60})
        monkeypatch.setattr(moltis.Log, "read", read)
        params = {"id": job["id"], "wait": 60}
        answer = rpc(gateway, {"method": "job.read", "params": params})
    assert answer.json["ok"] is False
