"""A machine's files on the page, in a real Chromium, and their downloads over HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from browser import Browser
from support import wait_for
from world import World

import moltis

READY = "document.querySelector('#app').hidden === false"
NAMES = """[...document.querySelectorAll("#files-rows .file [data-part=name]")]
  .sort((a, b) => a.closest(".file").ariaRowIndex - b.closest(".file").ariaRowIndex)
  .map(name => name.textContent)"""
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360f8cfc0f01f0005000180d8a3f1"
    "a70000000049454e44ae426082"
)


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("files-page"))
    yield world
    world.close()


@pytest.fixture(scope="module")
def shared_page():
    with Browser() as browser, browser.new_page() as page:
        yield page


@pytest.fixture
def world(shared_world, tmp_path):
    shared_world.scratch = tmp_path
    return shared_world


@pytest.fixture
def page(shared_page, world):
    """A page that is signed in, at the files of the node, in a directory of its own."""
    if not shared_page.urls:
        shared_page.goto(f"{world.direct_url}/#key={world.api_key}")
        shared_page.wait_for(READY)
    shared_page.set_viewport(1280, 800)
    yield shared_page
    assert shared_page.errors == []
    allowed = (f"{world.direct_url}/", f"ws{world.direct_url[4:]}/", "data:")
    assert [url for url in shared_page.urls if not url.startswith(allowed)] == []


def show(page, world, path=""):
    """Go to a directory or a file below the test's own, as a link leads there."""
    full = f"{world.scratch}/{path}".rstrip("/")
    page.evaluate("void (globalThis.testWasHere = true)")
    url = f"{world.direct_url}/nodes/far/files{moltis.quote(os.fsencode(full))}"
    page.goto(url)
    page.wait_for(READY)


def names(page):
    return page.evaluate(NAMES)


def wait_for_names(page, *expected):
    page.wait_for(
        f"JSON.stringify({NAMES}) === {json.dumps(json.dumps(expected, ensure_ascii=False, separators=(',', ':')))}"
    )


def test_a_directory_is_listed_with_directories_first(page, world):
    (world.scratch / "b.txt").write_text("x" * 2000)
    (world.scratch / "a10").touch()
    (world.scratch / "a9").touch()
    (world.scratch / "zoo").mkdir()
    (world.scratch / ".hidden").touch()
    (world.scratch / "to zoo").symlink_to("zoo")
    show(page, world)
    wait_for_names(page, "to zoo", "zoo", "a9", "a10", "b.txt")
