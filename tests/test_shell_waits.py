"""Hold what tests ask shells to do to an end of its own.

A test run that is killed ends nothing that it started: what waits for a file that no
test will make any more, or sleeps for an hour, would stay.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

LONGEST_SLEEP = 120  # seconds
ENDLESS = r"""(?x)
    \b(?:until|while) \s+ (?: \[\s+(?:!\s+)?-\w | : | true\b | ! ) .* ; \s* do\b
    | \bsleep (?:\s+ | ",\s*") (?: inf | \d{4,} | [2-9]\d\d | 1[3-9]\d | 12[1-9] )
"""
WRITTEN_ONLY = {"test_store.py", Path(__file__).name}  # these run no shell


def endless(text):
    """Return the lines of `text` whose shell command may never end."""
    return [line for line in text.splitlines() if re.search(ENDLESS, line)]


@pytest.mark.parametrize(
    "line",
    [
        "until [ -e go ]; do sleep 0.02; done",
        "while [ ! -e {go} ]; do sleep 0.05; done",
        "echo a; while :; do echo b; done",
        "while true; do sleep 1; done",
        "while ! test -e go; do sleep 1; done",
        "exec sleep 121",
        "sleep 1000 & wait",
        'Popen(["sleep", "600"])',
        "sleep infinity",
    ],
)
def test_a_wait_without_an_end_is_found(line):
    assert endless(line) == [line]


@pytest.mark.parametrize(
    "line",
    [
        f"sleep {LONGEST_SLEEP}",
        "sleep 0.125",
        "i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done",
        "for i in 1 2 3; do sleep 0.5; done",
        "it waits until [-e] is there",
    ],
)
def test_a_wait_with_an_end_is_none(line):
    assert endless(line) == []


def test_every_wait_of_the_tests_in_a_shell_has_an_end():
    files = sorted(Path(__file__).parent.glob("*.py"))
    assert [
        f"{file.name}: {line.strip()}; see wait_in_shell of support.py"
        for file in files
        if file.name not in WRITTEN_ONLY
        for line in endless(file.read_text(encoding="utf-8"))
    ] == []
