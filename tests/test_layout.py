"""Hold moltis.py to its map: contents, banners, and what each section may use.

`faults(source)` finds what is wrong with a source text; the first test asks it about
moltis.py, the others show that it finds what it is there for.
"""

from __future__ import annotations

import ast
import re
import symtable
from collections import namedtuple

import pytest
from support import PROGRAM

RULE = "# " + "=" * 78
IMPLICIT = ("Constants and errors", "Helpers")  # every section may use these

Section = namedtuple("Section", "name part uses purpose line")
Statement = namedtuple("Statement", "line section binds uses")  # of the module's body


# --- Reading a source ---


def read_contents(docstring):
    """Return the (part, section) pairs of the table of contents, in order."""
    pairs, part = [], ""
    for line in docstring.partition("\nContents\n")[2].splitlines():
        if re.match(r"    \S", line):
            pairs.append((part, re.split("  +", line.strip())[0]))
        elif line.strip():
            part = line.strip().upper()
    return pairs


def read_banners(source):
    """Return the sections that the banners announce, in order."""
    sections, part = [], ""
    for banner in re.finditer(f"^{RULE}\n((?:#.*\n)+?){RULE}\n", source, re.MULTILINE):
        title, *rest = (line[1:].strip() for line in banner[1].splitlines())
        if not rest:
            part = title
            continue
        uses, _, purpose = "\n".join(rest).partition("\n\n")
        if not uses.startswith("Uses:"):
            uses, purpose = "", "\n".join(rest)
        names = [name.strip() for name in uses[len("Uses:") :].split(",") if name]
        line = source.count("\n", 0, banner.end()) + 1
        sections.append(Section(title, part, names, purpose.strip(), line))
    return sections


def read_statements(source, sections):
    """Return the statements of the module, with the names of the module in each."""
    lines, found = source.splitlines(), []
    for node in ast.parse(source).body:
        above = [s.name for s in sections if s.line <= node.lineno]
        first = min(
            [node, *getattr(node, "decorator_list", ())], key=lambda n: n.lineno
        )
        text = "\n".join(lines[first.lineno - 1 : node.end_lineno])
        if above:
            names = names_in(symtable.symtable(text, "a statement", "exec"))
            found.append(Statement(first.lineno, above[-1], *names))
    return found


def names_in(module):
    """Return the names that a module binds, and those that it uses anywhere inside."""
    binds = {s.get_name() for s in module.get_symbols() if is_bound(s)}
    uses, tables = set(), [module]
    for table in tables:
        tables += table.get_children()
        uses |= {
            symbol.get_name()
            for symbol in table.get_symbols()
            if symbol.is_referenced() and (table is module or symbol.is_global())
        }
    return binds, uses - binds


def is_bound(symbol):
    return symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()


# --- Judging it ---


def faults(source):
    """Return what is wrong with `source`, one sentence each."""
    sections = read_banners(source)
    docstring = ast.get_docstring(ast.parse(source), clean=False) or ""
    statements = read_statements(source, sections)
    return [
        *contents_faults(read_contents(docstring), sections),
        *banner_faults(sections),
        *use_faults(statements, sections),
        *order_faults(statements),
    ]


def contents_faults(contents, sections):
    banners = [(s.part, s.name) for s in sections]
    for part, name in contents:
        if (part, name) not in banners:
            yield f"the contents list {part} / {name}, no banner does"
    for part, name in banners:
        if (part, name) not in contents:
            yield f"the contents do not list {part} / {name}"
    if sorted(contents) == sorted(banners) and contents != banners:
        yield "the contents are not in the order of the banners"


def banner_faults(sections):
    above = []
    for section in sections:
        for used in section.uses:
            if used in IMPLICIT:
                yield f"{section.name}: {used} need not be named after `Uses:`"
            elif used not in above:
                yield f"{section.name}: no section {used} stands above it"
        if not section.purpose.endswith("."):
            yield f"{section.name}: its banner does not say what it is for"
        above.append(section.name)


def use_faults(statements, sections):
    homes = {}
    for statement in statements:
        for name in statement.binds:
            home = homes.setdefault(name, statement.section)
            if home != statement.section:
                yield f"{name} is defined in {home} and in {statement.section}"
    order = [s.name for s in sections]
    allowed = {s.name: {s.name, *s.uses, *IMPLICIT} for s in sections}
    unused = {(s.name, used) for s in sections for used in s.uses if used in order}
    for line, here, _, uses in statements:
        for name in sorted(uses & homes.keys()):
            home = homes[name]
            unused.discard((here, home))
            if order.index(home) > order.index(here):
                yield f"line {line}: {name} is defined below, in {home}"
            elif home not in allowed[here]:
                yield f"line {line}: {here} does not name {home} ({name})"
    for name, used in sorted(unused):
        yield f"{name}: `Uses:` names {used}, of which it uses nothing"


def order_faults(statements):
    """Names that a section uses above their definition, without need."""
    homes = {name: s for s in reversed(statements) for name in s.binds}

    def reach(start):
        """Return the lines of the statements that `start` uses, directly or not."""
        found, waiting = set(), [start]
        for statement in waiting:
            for name in statement.uses & homes.keys():
                home = homes[name]
                if home.section == start.section and home.line not in found:
                    found.add(home.line)
                    waiting.append(home)
        return found

    for statement in statements:
        for name in sorted(statement.uses & homes.keys()):
            home = homes[name]
            below = home.section == statement.section and home.line > statement.line
            # Two that use each other cannot both stand above.
            if below and statement.line not in reach(home):
                yield f"line {statement.line}: {name} stands below, in line {home.line}"


def test_moltis_keeps_to_its_map():
    found = faults(PROGRAM.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


# --- What it finds ---

CONTENTS = """
Contents

  First part
    Ground     what all stand on
    Walls      what stands on it
"""


def banner(name, uses="", purpose="What it is for."):
    lines = [RULE, f"# {name}"]
    if uses:
        lines.append(f"# Uses: {uses}")
    if purpose:
        lines += ["#", f"# {purpose}"]
    return "\n".join([*lines, RULE]) + "\n"


def module(ground="", walls="", uses="", contents=CONTENTS, **banner_arguments):
    part = f"{RULE}\n# FIRST PART\n{RULE}\n"
    return "\n".join(
        [
            f'"""A module.\n{contents}"""\n\nimport os\n\n{part}',
            banner("Ground") + ground,
            banner("Walls", uses, **banner_arguments) + walls,
        ]
    )


LAY = "def lay():\n    pass\n"


def test_a_module_in_order_has_no_fault():
    ground = "STONE = 1\n\n\ndef lay():\n    return os.getpid() + STONE\n"
    walls = "def build():\n    return lay()\n"
    assert faults(module(ground, walls, uses="Ground")) == []


def test_contents_list_what_the_banners_announce_in_their_order():
    assert faults(module(contents=CONTENTS.replace("Walls", "Roofs"))) == [
        "the contents list FIRST PART / Roofs, no banner does",
        "the contents do not list FIRST PART / Walls",
    ]
    lines = CONTENTS.splitlines()
    lines[4], lines[5] = lines[5], lines[4]
    assert faults(module(contents="\n".join(lines) + "\n")) == [
        "the contents are not in the order of the banners"
    ]


def test_a_banner_says_what_its_section_is_for_and_what_it_uses():
    assert faults(module(LAY, "wall = lay\n", uses="Ground", purpose="")) == [
        "Walls: its banner does not say what it is for"
    ]
    assert "Walls: no section Cellar stands above it" in faults(module(uses="Cellar"))
    assert faults(module(uses="Ground")) == [
        "Walls: `Uses:` names Ground, of which it uses nothing"
    ]
    names = "Ground,\n#       Cellar"
    assert "Walls: no section Cellar stands above it" in faults(module(uses=names))


def test_the_first_two_sections_are_for_all():
    source = module(
        LAY, "wall = lay\n", contents=CONTENTS.replace("Ground ", "Helpers")
    )
    source = source.replace("# Ground", "# Helpers")
    assert faults(source) == []
    assert faults(source.replace("# Walls\n", "# Walls\n# Uses: Helpers\n")) == [
        "Walls: Helpers need not be named after `Uses:`"
    ]


@pytest.mark.parametrize(
    "walls",
    [
        "wall = lay()\n",
        "wall: lay = 1\n",
        "wall = tuple(lay for stone in (1, 2))\n",
        "build = lambda: lay\n",
        "def build(stone=lay):\n    pass\n",
        "def build(stone: lay):\n    pass\n",
        "def build():\n    def inner():\n        return lay\n    return inner\n",
        "@lay\ndef build():\n    pass\n",
        "class Wall(lay):\n    pass\n",
        "class Wall:\n    stone: lay = 1\n",
        "class Wall:\n    lay = 1\n\n    def build(self):\n        return lay\n",
    ],
)
def test_a_use_is_seen_wherever_it_stands(walls):
    (fault,) = faults(module(LAY, walls))
    assert fault.endswith(": Walls does not name Ground (lay)")


@pytest.mark.parametrize(
    "walls",
    [
        "def build(lay):\n    return lay\n",
        "def build():\n    lay = 1\n    return lay\n",
        "def build():\n    import os as lay\n    return lay\n",
        (
            "def build():\n    lay = 1\n    def inner():\n        nonlocal lay\n"
            "        lay = 2\n    return inner\n"
        ),
        "build = tuple(lay for lay in (1, 2))\n",
        "build = lambda *lay: lay\n",
        "class Wall:\n    lay = 1\n    other = lay\n",
        "def build():\n    return os.lay\n",
    ],
)
def test_a_local_name_is_no_use(walls):
    assert faults(module(LAY, walls)) == []


def test_a_section_does_not_use_what_stands_below():
    source = module("def lay():\n    build()\n", "def build():\n    pass\n")
    (fault,) = faults(source)
    assert "build is defined below, in Walls" in fault


def test_a_name_has_one_home():
    assert faults(module("STONE = 1\n", "STONE = 2\n")) == [
        "STONE is defined in Ground and in Walls"
    ]


def test_within_a_section_a_name_stands_above_its_use():
    build = "def build():\n    lay()\n"
    assert faults(module(LAY + build)) == []
    (fault,) = faults(module(build + LAY))
    assert re.fullmatch(r"line \d+: lay stands below, in line \d+", fault)


def test_names_that_use_each_other_may_stand_in_any_order():
    even = "def even(n):\n    return n == 0 or odd(n - 1)\n"
    odd = "def odd(n):\n    return n != 0 and even(n - 1)\n"
    assert faults(module(even + odd)) == []
    assert faults(module("def lay(n):\n    return lay(n - 1)\n")) == []
