"""What a machine remembers between runs."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from support import wait_for

import moltis

NODE = {
    "gateway_url": "ws://gateway:9090/ws",
    "device_token": "mdt_" + "x" * 43,
    "node_id": "id",
    "display_name": "Pi",
}


@pytest.mark.parametrize(
    ("typed", "url"),
    [
        ("gateway", "ws://gateway/ws"),
        ("gateway:9090", "ws://gateway:9090/ws"),
        ("http://gateway:9090", "ws://gateway:9090/ws"),
        ("https://gateway/", "wss://gateway/ws"),
        ("wss://gateway/moltis/ws", "wss://gateway/moltis/ws"),
        ("https://gateway/moltis", "wss://gateway/moltis/ws"),
        ("https://gateway/moltis/", "wss://gateway/moltis/ws"),
        (" ws://[::1]:9090/ws/ ", "ws://[::1]:9090/ws"),
    ],
)
def test_an_address_may_be_typed_in_many_ways(typed, url):
    assert moltis.websocket_url(typed) == url


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "ws://",
        "ftp://gateway",
        "ws://gateway:port",
        "ws://gateway:0",
        "ws://gateway:99999",
        "ws://user:secret@gateway",
        "ws://[::1",
    ],
)
def test_what_is_no_address_is_a_matter_of_usage(typed):
    with pytest.raises(moltis.UsageError, match="ws://gateway:9090/ws"):
        moltis.websocket_url(typed)


def test_a_token_in_an_address_is_not_repeated():
    token = "mdt_" + "x" * 43
    with pytest.raises(moltis.UsageError) as caught:
        moltis.websocket_url(f"ftp://gateway/{token}")
    assert token not in str(caught.value)


def test_the_data_directory_is_chosen_or_in_the_home(home):
    assert moltis.data_directory({}) == home / ".moltis"
    assert moltis.data_directory({"MOLTIS_DATA_DIR": ""}) == home / ".moltis"
    assert moltis.data_directory({"MOLTIS_DATA_DIR": "/x"}) == Path("/x")
    assert moltis.data_directory({"MOLTIS_DATA_DIR": "~/x"}) == home / "x"


def test_node_json_is_kept_in_snake_case_for_its_owner_alone(tmp_path):
    settings = moltis.NodeSettings(**NODE, working_dir="/srv", timeout=9.5)
    settings.save(tmp_path)
    path = tmp_path / "node.json"
    assert path.stat().st_mode & 0o777 == 0o600
    kept = json.loads(path.read_text())
    assert {**kept, **NODE, "working_dir": "/srv", "timeout": 9.5} == kept
    assert moltis.NodeSettings.load(tmp_path) == settings


def test_no_node_json_is_no_node(tmp_path):
    assert moltis.NodeSettings.load(tmp_path) is None
    assert moltis.GatewayFile.load(tmp_path) is None


def test_an_empty_working_dir_is_none(tmp_path):
    text = json.dumps({**NODE, "working_dir": "", "unknown": [1]})
    (tmp_path / "node.json").write_text(text)
    assert moltis.NodeSettings.load(tmp_path).working_dir is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "gateway_url is missing; repair or delete it"),
        (json.dumps({**NODE, "timeout": "long"}), "timeout must be a number"),
        (json.dumps({**NODE, "node_id": 7}), "node_id must be a string"),
    ],
)
def test_a_node_json_that_makes_no_sense_is_named(tmp_path, text, words):
    (tmp_path / "node.json").write_text(text)
    with pytest.raises(moltis.BadConfiguration, match=words) as caught:
        moltis.NodeSettings.load(tmp_path)
    assert str(tmp_path / "node.json") in str(caught.value)
    assert NODE["device_token"] not in str(caught.value)


def test_gateway_json_keeps_url_key_and_process(tmp_path):
    file = moltis.GatewayFile("http://127.0.0.1:1", "mk_x", 42)
    file.save(tmp_path)
    path = tmp_path / "gateway.json"
    assert path.stat().st_mode & 0o777 == 0o600
    kept = json.loads(path.read_text())
    assert {**kept, "url": "http://127.0.0.1:1", "api_key": "mk_x", "pid": 42} == kept
    assert moltis.GatewayFile.load(tmp_path) == file


def test_an_empty_file_is_none(tmp_path):
    """A crash of the first edition, or a full disk, leaves one."""
    (tmp_path / "gateway.json").write_text("\n")
    assert moltis.GatewayFile.load(tmp_path) is None


def test_models_that_are_not_lent_stay_so(tmp_path):
    moltis.NodeSettings(**NODE, llm=False, allow=("uptime",)).save(tmp_path)
    kept = json.loads((tmp_path / "node.json").read_text())
    assert kept["llm"] is False
    assert moltis.NodeSettings.load(tmp_path).allow == ("uptime",)


def test_a_user_without_a_home_is_asked_for_a_directory(monkeypatch):
    with pytest.raises(moltis.BadConfiguration, match="MOLTIS_DATA_DIR"):
        moltis.data_directory({"MOLTIS_DATA_DIR": "~no such user/x"})


@pytest.mark.parametrize("text", ["", "\n", "\0" * 512])
def test_a_file_that_a_crash_emptied_is_made_anew(tmp_path, text):
    """A file system may keep a file's length and lose what was in it."""
    for kind in (moltis.GatewayFile, moltis.NodeSettings):
        (tmp_path / kind.FILE).write_text(text)
        assert kind.load(tmp_path) is None
    moltis.GatewayFile("http://127.0.0.1:1", "mk_x", 42).save(tmp_path)
    assert moltis.GatewayFile.load(tmp_path).pid == 42


@pytest.mark.parametrize("kind", [moltis.GatewayFile, moltis.NodeSettings])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_read(tmp_path, kind):
    os.mkfifo(tmp_path / kind.FILE)
    problems = []

    def load():
        try:
            kind.load(tmp_path)
        except moltis.BadConfiguration as error:
            problems.append(str(error))

    threading.Thread(target=load, daemon=True).start()
    wait_for(lambda: problems)
    assert "is not a regular file; delete it" in problems[0]


def test_a_half_written_file_is_named_with_what_to_do(tmp_path):
    moltis.NodeSettings(**NODE).save(tmp_path)
    path = tmp_path / "node.json"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(moltis.BadConfiguration, match=r"half written.*delete it"):
        moltis.NodeSettings.load(tmp_path)


def test_a_uid_without_an_account_is_asked_for_a_directory(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 4711_4711)
    with pytest.raises(moltis.BadConfiguration, match="uid 47114711 has no account"):
        moltis.data_directory({})
    with pytest.raises(moltis.BadConfiguration, match="no account 'nouser' is known"):
        moltis.data_directory({"MOLTIS_DATA_DIR": "~nouser/x"})


def test_a_node_keeps_the_proxies_that_its_service_would_not_inherit(tmp_path):
    environ = {"https_proxy": "http://u:secret@proxy:3128", "NO_PROXY": "x", "A": "b"}
    proxies = moltis.proxies_from(environ)
    assert sorted(proxies) == ["NO_PROXY", "https_proxy"]
    node = {**NODE, "gateway_url": "wss://gateway:9090/ws"}
    moltis.NodeSettings(**node, proxies=proxies).save(tmp_path)
    kept = moltis.NodeSettings.load(tmp_path)
    assert kept.proxies == proxies
    assert moltis.node_proxy(kept) == "http://proxy:3128"
    assert "secret" not in repr(kept)
    assert moltis.node_proxy(moltis.NodeSettings(**NODE)) is None
