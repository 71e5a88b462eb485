"""Hold moltis.py to its own map: contents, banners, and what each section may use.

`faults(source)` finds what is wrong with a source text; the first test asks it about
moltis.py, all others show that it finds what it is there for.
"""

from __future__ import annotations

import ast
import builtins
import io
import re
import statistics
import tokenize
from dataclasses import dataclass

import pytest
from support import PROGRAM

RULE = "# " + "=" * 78
IMPLICIT = ("Constants and errors", "Helpers")  # every section may use these
MAX_FUNCTION = 60  # lines
MAX_CLASS = 250  # lines
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")

# Annotations that make a display or a call at module level unchangeable for mypy.
READ_ONLY = {"Mapping", "Sequence", "Collection", "AbstractSet", "FrozenSet", "Tuple"}
MUTABLE_DISPLAYS = (
    ast.List,
    ast.Dict,
    ast.Set,
    ast.ListComp,
    ast.DictComp,
    ast.SetComp,
    ast.GeneratorExp,
)
MUTABLE_CALLS = {
    *("list", "dict", "set", "bytearray", "defaultdict", "OrderedDict", "Counter"),
    *("deque", "ChainMap", "iter", "count", "cycle", "open", "StringIO", "BytesIO"),
    *("local", "Lock", "RLock", "Condition", "Event", "Semaphore", "Barrier"),
    *("BoundedSemaphore", "Thread", "Timer", "Queue", "LifoQueue", "PriorityQueue"),
    *("SimpleQueue", "WeakSet", "WeakValueDictionary", "WeakKeyDictionary"),
    *("ContextVar", "Random", "SystemRandom", "ExitStack", "socket"),
}


# -- reading a source ----------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    name: str
    part: str
    uses: tuple
    purpose: str
    first_line: int


def read_contents(docstring):
    """Return the (part, section) pairs of the table of contents, in order."""
    _, _, table = docstring.partition("\nContents\n")
    pairs, part = [], ""
    for line in table.splitlines():
        indent = len(line) - len(line.lstrip())
        if indent == 2:
            part = line.strip().upper()
        elif indent == 4:
            pairs.append((part, re.split(r"  +", line.strip())[0]))
    return pairs


def read_banners(source):
    """Return the sections that the banners announce, in order."""
    lines = source.splitlines()
    sections, part, index = [], "", 0
    while index < len(lines):
        if lines[index] != RULE:
            index += 1
            continue
        end = lines.index(RULE, index + 1)
        title, *rest = [line[1:].strip() for line in lines[index + 1 : end]]
        if rest:
            sections.append(_read_banner(title, part, rest, end + 2))
        else:
            part = title
        index = end + 1
    return sections


def _read_banner(title, part, rest, first_line):
    uses_text, _, purpose = "\n".join(rest).partition("\n\n")
    if uses_text.startswith("Uses:"):
        names = uses_text[len("Uses:") :].replace("\n", " ").split(",")
        uses = tuple(name.strip() for name in names)
    else:
        uses, purpose = (), "\n".join(rest)
    return Section(title, part, uses, purpose.strip(), first_line)


class Bindings(ast.NodeVisitor):
    """The names that one scope binds, with the line of each, scopes within left out."""

    def __init__(self, body):
        self.lines = {}  # name -> lines
        self.outer = set()  # declared nonlocal or global
        for node in body:
            self.visit(node)

    def bind(self, name, node):
        self.lines.setdefault(name, []).append(node.lineno)

    def visit_FunctionDef(self, node):
        self.bind(node.name, node)

    visit_AsyncFunctionDef = visit_ClassDef = visit_FunctionDef

    def visit_Lambda(self, node):
        pass

    def visit_ListComp(self, node):
        # Its variables are its own, but a walrus inside binds out here.
        for inner in ast.walk(node):
            if isinstance(inner, ast.NamedExpr):
                self.bind(inner.target.id, inner)

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp

    def visit_Name(self, node):
        if not isinstance(node.ctx, ast.Load):
            self.bind(node.id, node)

    def visit_ExceptHandler(self, node):
        if node.name:
            self.bind(node.name, node)
        self.generic_visit(node)

    def visit_Import(self, node):
        for alias in node.names:
            self.bind((alias.asname or alias.name).partition(".")[0], node)

    visit_ImportFrom = visit_Import

    def visit_Nonlocal(self, node):
        self.outer.update(node.names)

    visit_Global = visit_Nonlocal


class References(ast.NodeVisitor):
    """Every (name, line) that reaches the module's own scope."""

    def __init__(self, tree):
        self.found = []
        self._scopes = []  # (is a class, names bound there), innermost last
        for node in tree.body:
            self.visit(node)

    def _is_local(self, name):
        for depth, (is_class, names) in enumerate(reversed(self._scopes)):
            # A class body's names are seen in the body, not in its methods.
            if name in names and (not is_class or depth == 0):
                return True
        return False

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Load) and not self._is_local(node.id):
            self.found.append((node.id, node.lineno))

    def _visit_scope(self, body, *, arguments=None, is_class=False):
        bindings = Bindings(body)
        names = set(bindings.lines) - bindings.outer
        if arguments is not None:
            names.update(a.arg for a in ast.walk(arguments) if isinstance(a, ast.arg))
        self._scopes.append((is_class, names))
        for node in body:
            self.visit(node)
        self._scopes.pop()

    def _visit_arguments(self, arguments):
        for argument in ast.walk(arguments):
            if isinstance(argument, ast.arg) and argument.annotation:
                self.visit(argument.annotation)
        for default in [*arguments.defaults, *arguments.kw_defaults]:
            if default is not None:
                self.visit(default)

    def visit_FunctionDef(self, node):
        for decorator in node.decorator_list:
            self.visit(decorator)
        self._visit_arguments(node.args)
        if node.returns:
            self.visit(node.returns)
        self._visit_scope(node.body, arguments=node.args)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node):
        self._visit_arguments(node.args)
        self._visit_scope([ast.Expr(node.body)], arguments=node.args)

    def visit_ClassDef(self, node):
        for outside in [*node.decorator_list, *node.bases, *node.keywords]:
            self.visit(outside)
        self._visit_scope(node.body, is_class=True)

    def _visit_comprehension(self, node):
        targets = Bindings([g.target for g in node.generators]).lines
        self._scopes.append((False, set(targets)))
        self.generic_visit(node)
        self._scopes.pop()

    visit_ListComp = visit_SetComp = visit_DictComp = _visit_comprehension
    visit_GeneratorExp = _visit_comprehension


# -- judging it ----------------------------------------------------------------------


def faults(source):
    """Return what is wrong with `source`, one sentence each."""
    tree = ast.parse(source)
    sections = read_banners(source)
    return [
        *contents_faults(tree, sections),
        *banner_faults(sections),
        *reference_faults(tree, sections),
        *size_faults(tree),
        *docstring_faults(tree),
        *state_faults(tree),
        *word_faults(source),
    ]


def contents_faults(tree, sections):
    contents = read_contents(ast.get_docstring(tree, clean=False) or "")
    banners = [(s.part, s.name) for s in sections]
    for pair in contents:
        if pair not in banners:
            yield f"the contents list {' / '.join(pair)}, no banner does"
    for pair in banners:
        if pair not in contents:
            yield f"the contents do not list {' / '.join(pair)}"
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


def reference_faults(tree, sections):
    homes = defining_sections(tree, sections)
    for name, places in homes.items():
        if len(set(places)) > 1:
            yield f"{name} is defined in {' and in '.join(sorted(set(places)))}"
    order = [s.name for s in sections]
    touched = {s.name: set() for s in sections}
    for name, line in sorted(set(References(tree).found), key=lambda found: found[1]):
        here = section_at(sections, line)
        home = homes.get(name, [None])[0]
        if here is None or home in (None, here.name):
            continue
        touched[here.name].add(home)
        if order.index(home) > order.index(here.name):
            yield f"line {line}: {name} is defined below, in {home}"
        elif home not in (*here.uses, *IMPLICIT):
            yield f"line {line}: {here.name} does not name {home} ({name})"
    for section in sections:
        for used in section.uses:
            if used in order and used not in touched[section.name]:
                yield f"{section.name}: `Uses:` names {used}, of which it uses nothing"


def section_at(sections, line):
    found = None
    for section in sections:
        if section.first_line <= line:
            found = section
    return found


def defining_sections(tree, sections):
    """Return the names of the module, each with the sections that define it."""
    homes = {}
    for name, lines in Bindings(tree.body).lines.items():
        found = [section_at(sections, line) for line in lines]
        places = [section.name for section in found if section]
        if places and name not in vars(builtins):
            homes[name] = places
    return homes


def functions_of(tree):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def size(node):
    return node.end_lineno - node.lineno + 1


def size_faults(tree):
    for node in functions_of(tree):
        if size(node) > MAX_FUNCTION:
            yield f"{node.name}() has {size(node)} lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and size(node) > MAX_CLASS:
            yield f"class {node.name} has {size(node)} lines"
        if isinstance(node, ast.Global):
            yield f"line {node.lineno}: global {', '.join(node.names)}"


def docstring_faults(tree):
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    public = [c for c in classes if not c.name.startswith("_")]
    for node in public:
        # A value is its fields; a class with a life has one sentence.
        if not ast.get_docstring(node) and not _is_value(node):
            yield f"class {node.name} does not say what it is"
    for owner in [tree, *public]:
        for node in owner.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield from _raises_faults(node)


def _raises_faults(function):
    raised = sorted({n for n in _raised(function) if n != "NotImplementedError"})
    if raised and "Raises" not in (ast.get_docstring(function) or ""):
        yield f"{function.name}() does not say that it raises {', '.join(raised)}"


def _raised(node):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
            yield called_name(child.exc)
        yield from _raised(child)


def called_name(call):
    function = call.func
    if isinstance(function, ast.Subscript):
        function = function.value
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def state_faults(tree):
    """Module-level and class-level values that somebody could change."""
    changeable = {
        n.name for n in tree.body if isinstance(n, ast.ClassDef) and not _is_value(n)
    }
    bodies = [tree.body, *(n.body for n in tree.body if isinstance(n, ast.ClassDef))]
    for node in (n for body in bodies for n in body):
        if isinstance(node, ast.AugAssign):
            yield f"line {node.lineno}: state at module level: {ast.dump(node.target)}"
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            continue
        annotation = getattr(node, "annotation", None)
        if annotation is not None and _annotated_as(annotation) in READ_ONLY:
            continue
        if _is_mutable(node.value, changeable):
            yield f"line {node.lineno}: state at module level or in a class body"


def _is_value(node):
    """Tell whether instances of a class are unchangeable."""
    bases = {b.id for b in node.bases if isinstance(b, ast.Name)}
    bases |= {b.attr for b in node.bases if isinstance(b, ast.Attribute)}
    frozen = any("frozen=True" in _text(d) for d in node.decorator_list)
    return frozen or bool(bases & {"NamedTuple", "Enum", "IntEnum", "IntFlag", "Flag"})


def _text(node):
    keywords = node.keywords if isinstance(node, ast.Call) else []
    return ",".join(f"{k.arg}={getattr(k.value, 'value', None)}" for k in keywords)


def _annotated_as(annotation):
    if isinstance(annotation, ast.Subscript):
        annotation = annotation.value
    if isinstance(annotation, ast.Attribute):
        return annotation.attr
    return annotation.id if isinstance(annotation, ast.Name) else ""


def _is_mutable(value, changeable):
    if isinstance(value, ast.Call):
        return called_name(value) in MUTABLE_CALLS | changeable
    return isinstance(value, MUTABLE_DISPLAYS)


def word_faults(source):
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            for word in UNFINISHED.findall(token.string):
                yield f"line {token.start[0]}: {word}"


# -- moltis.py -----------------------------------------------------------------------


def test_moltis_keeps_to_its_map():
    found = faults(PROGRAM.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


def test_functions_of_moltis_are_short():
    sizes = sorted(map(size, functions_of(ast.parse(PROGRAM.read_bytes()))))
    assert statistics.median(sizes) <= 8
    assert sizes[len(sizes) * 9 // 10] <= 30


# -- what it finds -------------------------------------------------------------------


def banner(name, uses="", purpose="What it is for."):
    lines = [RULE, f"# {name}"]
    if uses:
        lines.append(f"# Uses: {uses}")
    if purpose:
        lines += ["#", f"# {purpose}"]
    return "\n".join([*lines, RULE]) + "\n"


CONTENTS = """
Contents

  First part
    Ground     what all stand on
    Walls      what stands on it
"""


def module(ground="", walls="", uses="", contents=CONTENTS, **banner_arguments):
    part = f"{RULE}\n# FIRST PART\n{RULE}\n"
    return "\n".join(
        [
            f'"""A module.\n{contents}"""\n\nimport os\n\n{part}',
            banner("Ground") + ground,
            banner("Walls", uses, **banner_arguments) + walls,
        ]
    )


def test_a_module_in_order_has_no_fault():
    ground = "STONE = 1\n\n\ndef lay():\n    return os.getpid() + STONE\n"
    walls = "def build():\n    return lay()\n"
    assert faults(module(ground, walls, uses="Ground")) == []


def test_contents_must_list_what_the_banners_announce():
    wrong = CONTENTS.replace("Walls", "Roofs")
    assert faults(module(contents=wrong)) == [
        "the contents list FIRST PART / Roofs, no banner does",
        "the contents do not list FIRST PART / Walls",
    ]


def test_contents_must_be_in_the_order_of_the_banners():
    lines = CONTENTS.splitlines()
    lines[4], lines[5] = lines[5], lines[4]
    assert faults(module(contents="\n".join(lines) + "\n")) == [
        "the contents are not in the order of the banners"
    ]


def test_a_section_without_a_purpose_is_found():
    assert faults(module(purpose="see above")) == [
        "Walls: its banner does not say what it is for"
    ]


def test_a_section_must_name_what_it_uses():
    source = module("def lay():\n    pass\n", "def build():\n    lay()\n")
    assert len(faults(source)) == 1
    assert "Walls does not name Ground (lay)" in faults(source)[0]


@pytest.mark.parametrize(
    "walls",
    [
        "def build(stone: lay):\n    pass\n",
        "def build(stone=lay):\n    pass\n",
        "def build() -> lay | None:\n    pass\n",
        "@lay\ndef build():\n    pass\n",
        "class Wall(lay):\n    '''A wall.'''\n",
        "class Wall:\n    '''A wall.'''\n\n    stone: lay = 1\n",
        (
            "class Wall:\n    '''A wall.'''\n\n    lay = 1\n\n    def build(self):\n"
            "        return lay\n"
        ),
        "build = lambda: lay\n",
        "build = tuple(lay for stone in (1, 2))\n",
        "def build():\n    def inner():\n        return lay\n    return inner\n",
    ],
)
def test_a_use_is_seen_wherever_it_stands(walls):
    found = faults(module("def lay():\n    pass\n", walls))
    assert any("Walls does not name Ground (lay)" in fault for fault in found)


@pytest.mark.parametrize(
    "walls",
    [
        "def build(lay):\n    return lay\n",
        "def build():\n    lay = 1\n    return lay\n",
        "def build():\n    for lay in (1, 2):\n        return lay\n",
        "def build():\n    import os as lay\n    return lay\n",
        "def build():\n    with open('x') as lay:\n        return lay\n",
        (
            "def build():\n    try:\n        pass\n    except OSError as lay:\n"
            "        return lay\n"
        ),
        (
            "def build():\n    lay = 1\n    def inner():\n        nonlocal lay\n"
            "        lay = 2\n    return inner\n"
        ),
        "build = tuple(lay for lay in (1, 2))\n",
        "build = lambda *lay: lay\n",
        "class Wall:\n    '''A wall.'''\n\n    lay = 1\n    other = lay\n",
        "def build():\n    return os.lay\n",
    ],
)
def test_a_local_name_is_no_use(walls):
    assert faults(module("def lay():\n    pass\n", walls)) == []


def test_a_section_must_not_use_what_stands_below():
    source = module("def lay():\n    build()\n", "def build():\n    pass\n")
    assert len(faults(source)) == 1
    assert "build is defined below, in Walls" in faults(source)[0]


def test_a_section_must_not_name_what_it_does_not_use():
    assert faults(module(uses="Ground")) == [
        "Walls: `Uses:` names Ground, of which it uses nothing"
    ]
    assert "Walls: no section Cellar stands above it" in faults(module(uses="Cellar"))


def test_the_first_two_sections_are_for_all():
    contents = CONTENTS.replace("Ground ", "Helpers")
    source = module("def lay():\n    pass\n", "wall = lay\n", contents=contents)
    assert faults(source.replace("# Ground", "# Helpers")) == []


def test_a_name_has_one_home():
    assert faults(module("STONE = 1\n", "STONE = 2\n")) == [
        "STONE is defined in Ground and in Walls"
    ]


def test_long_functions_and_classes_are_found():
    function = "def lay():\n" + "    pass\n" * 60
    assert faults(module(function)) == ["lay() has 61 lines"]
    long_class = "class Wall:\n    '''A wall.'''\n" + "    pass\n" * 249
    assert faults(module(long_class)) == ["class Wall has 251 lines"]


def test_global_is_found():
    source = module("STONE = 1\n\n\ndef lay():\n    global STONE\n    STONE = 2\n")
    assert any("global STONE" in fault for fault in faults(source))


def test_a_public_class_says_what_it_is():
    assert faults(module("class Wall:\n    pass\n")) == [
        "class Wall does not say what it is"
    ]
    assert faults(module("class _Wall:\n    pass\n")) == []
    value = "@dataclass(frozen=True)\nclass Wall:\n    stones: int\n"
    assert faults(module(value)) == []


def test_a_public_function_says_what_it_raises():
    body = "    if os:\n        raise ValueError('no')\n"
    assert faults(module(f"def lay():\n{body}")) == [
        "lay() does not say that it raises ValueError"
    ]
    assert (
        faults(module(f"def lay():\n    '''Lay it.  Raises ValueError.'''\n{body}"))
        == []
    )
    assert faults(module(f"def _lay():\n{body}")) == []


@pytest.mark.parametrize(
    "state",
    [
        "stones = []\n",
        "stones = {'a': 1}\n",
        "stones: list = [1]\n",
        "stones = set()\n",
        "lock = threading.Lock()\n",
        "stones = collections.defaultdict(list)\n",
        "class Wall:\n    '''A wall.'''\n\n    stones = []\n",
        "class Wall:\n    '''A wall.'''\n\n\nwall = Wall()\n",
        "stones = 1\nstones += 1\n",
    ],
)
def test_state_at_module_level_is_found(state):
    assert any("state at module level" in fault for fault in faults(module(state)))


@pytest.mark.parametrize(
    "constant",
    [
        "STONES = (1, 2)\n",
        "STONES: Mapping[str, int] = {'a': 1}\n",
        "STONES = frozenset({1, 2})\n",
        "STONE = re.compile('x')\n",
        "@dataclass(frozen=True)\nclass Wall:\n    '''A wall.'''\n\n\nWALL = Wall()\n",
    ],
)
def test_constants_at_module_level_are_fine(constant):
    assert faults(module(constant)) == []


def test_unfinished_work_is_found():
    word = "TODO"
    found = faults(module(f"x = 1  # {word}: lay\n"))
    assert [fault.split(": ")[1] for fault in found] == [word]
    assert faults(module("x = 1  # all done\n")) == []
