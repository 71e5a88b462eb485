"""Every subcommand has a help line, an example and a line in README, and these work."""

from __future__ import annotations

import argparse
import re
import shlex

import pytest
from support import PROGRAM, ROOT, run_moltis

import moltis

README = (ROOT / "README.md").read_text(encoding="utf-8")


def subcommands(parser, path=()):
    """Return (words, help line, parser) of each subcommand that does something."""
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        help_lines = {choice.dest: choice.help for choice in action._choices_actions}
        for name, child in action.choices.items():
            below = list(subcommands(child, (*path, name)))
            if not below or child.get_default("run"):
                yield (*path, name), help_lines.get(name), child
            yield from below


PARSER = moltis.build_parser()
SUBCOMMANDS = {" ".join(words): rest for words, *rest in subcommands(PARSER)}


@pytest.fixture(params=SUBCOMMANDS)
def subcommand(request):
    help_line, parser = SUBCOMMANDS[request.param]
    return request.param, help_line, parser


def moltis_lines(text):
    """Return the command lines of moltis in `text`, without the program's name."""
    pattern = r"^\s*(?:\$ )?(?:python3 moltis\.py|moltis) (.*)$"
    return re.findall(pattern, text, re.M)


def accepts(parser, line):
    """Tell whether the program takes the words of a shell line."""
    words = shlex.split(line, comments=True)
    for end in ("|", "<", "--"):  # another program's words, or another machine's
        if end in words:
            words = words[: words.index(end)]
    try:
        parser.parse_args(words)
    except SystemExit as end:
        return not end.code
    return True


def test_the_table_of_subcommands_has_their_names():
    assert list(SUBCOMMANDS) == list(moltis.SUBCOMMANDS)


def test_it_has_a_help_line(subcommand):
    name, help_line, _ = subcommand
    assert help_line, f"{name} has no help line"


def test_its_help_ends_with_examples_that_it_accepts(subcommand):
    name, _, parser = subcommand
    examples = moltis_lines(parser.epilog or "")
    assert examples, f"moltis {name} --help shows no example"
    for example in examples:
        assert re.match(rf"{name}\b", example)
        assert accepts(PARSER, example), f"moltis {example} is not accepted"


def test_each_of_its_arguments_is_explained(subcommand):
    name, _, parser = subcommand
    silent = [a.dest for a in parser._actions if not a.help]
    assert not silent, f"moltis {name} --help does not explain {silent}"


def test_it_has_a_line_in_readme(subcommand):
    name, _, _ = subcommand
    assert re.search(rf"moltis(\.py)? {name}\b", README), f"README lacks moltis {name}"


def test_its_help_is_on_stdout(subcommand, home):
    name, _, _ = subcommand
    done = run_moltis(*name.split(), "--help", home=home)
    assert done.returncode == 0
    assert done.stderr == ""
    assert f"moltis {name}" in done.stdout


def test_the_program_accepts_the_lines_of_readme():
    blocks = re.findall(r"^```console\n(.*?)^```", README, re.M | re.S)
    lines = [line for block in blocks for line in moltis_lines(block)]
    assert len(lines) >= 10
    lines += re.findall(r"^\| `moltis (.*?)` \|", README, re.M)
    refused = [line for line in lines if not accepts(PARSER, line)]
    assert not refused


def test_readme_explains_every_variable_that_the_program_reads():
    source = PROGRAM.read_text(encoding="utf-8")
    variables = set(re.findall(r"[\"'](MOLTIS_[A-Z_]+[A-Z])[\"']", source))
    assert [name for name in sorted(variables) if name not in README] == []


def test_readme_explains_every_exit_status():
    statuses = {
        status
        for name, status in vars(moltis).items()
        if name in ("INTERRUPTED", "TIMED_OUT")
        or (name.startswith("EXIT_") and isinstance(status, int))
    }
    table = README.partition("| exit status |")[2]
    assert statuses <= set(map(int, re.findall(r"^\| (\d+) \|", table, re.M)))


def test_readme_says_nothing_of_what_is_not_there():
    files = re.findall(r"`(?:sh )?(tests/[\w./]+|install\.sh|LICENSE)", README)
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_readme_shows_small_pictures_that_are_there():
    pictures = [ROOT / name for name in re.findall(r'<img src="(.*?)"', README)]
    assert len(pictures) == 3
    assert sum(picture.stat().st_size for picture in pictures) <= 200 * 1024


def test_the_version_is_printed(home):
    done = run_moltis("--version", home=home)
    assert done.returncode == 0
    assert done.stdout == f"moltis {moltis.__version__}\n"
