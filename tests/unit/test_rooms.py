"""One direction: a module imports from its own room and from those below it, and no import leads back to where it began.

All imports count: at the top of a module, inside functions, and for type checkers alone. What the registry finds by name
(`module:Class`) is no import: each room registers its own.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import txtrain

PACKAGE = Path(txtrain.__file__).parent

# From the top of the house to the ground. Each is a folder or a module of txtrain/; of the ground also the order within.
ROOMS = (
    "cli",
    "training",  # the loop; a step without storage, which `plan` shows
    "monitor",  # what is measured of a run, and who is told
    "planning",  # figures in closed form
    "config",  # composes and checks: so it sees every group's options
    "parallel",
    "checkpoint",
    "objectives",
    "hf",
    "data",
    "run_config",  # what a run is told, as all rooms above see it
    "optim",
    "model",
    "ground",
    "registry",  # what a component says of itself, and where it is found
    "errors",
)
PUBLIC = ("", "__main__", "loggers")  # names for users and saved configs: above all rooms, imported by none


def name_of(path: Path) -> str:
    """The module's name below txtrain; that of the package itself is empty."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imports(name: str) -> Iterator[tuple[str, int]]:
    """Modules of the package that a module imports, wherever it does, and the lines."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{MODULES[name]}:{node.lineno} is relative"
            wanted = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        else:
            continue
        for full in wanted:
            top, _, inner = full.partition(".")
            if top == "txtrain":
                inner = inner if inner in MODULES else inner.rpartition(".")[0]  # a name within the module
                yield inner, node.lineno


ARROWS = {(name, to): line for name in MODULES for to, line in imports(name) if to != name}


def room(name: str) -> str:
    return name.partition(".")[0]


def test_every_module_is_in_a_room() -> None:
    assert {room(name) for name in MODULES} == {*ROOMS, *PUBLIC}


def test_no_import_goes_up() -> None:
    floor = {name: i for i, name in enumerate((*PUBLIC, *ROOMS))}
    against = [
        f"{MODULES[name]}:{line} imports {to or 'txtrain'}"
        for (name, to), line in ARROWS.items()
        if room(name) not in PUBLIC and floor[room(to)] < floor[room(name)]
    ]
    assert not against, "imports against the order of the rooms:\n" + "\n".join(sorted(against))


def test_the_model_knows_neither_hydra_nor_lightning() -> None:
    below = [name for name in MODULES if room(name) in ROOMS[ROOMS.index("run_config") :]]
    text = {name: MODULES[name].read_text(encoding="utf-8") for name in below}
    found = {
        (name, word)
        for name in below
        for word in re.findall(r"^ *(?:from|import) (hydra|omegaconf|lightning)", text[name], re.M)
    }
    assert not found, found


def circles() -> list[list[str]]:
    """Sets of modules of which each imports, by way of others, every other (Tarjan 1972)."""
    below: dict[str, list[str]] = {name: [] for name in MODULES}
    for name, to in ARROWS:
        below[name].append(to)
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        stack.append(name)
        for to in below[name]:
            if to not in number:
                visit(to)
            if to in stack:
                lowest[name] = min(lowest[name], lowest[to])
        if lowest[name] == number[name]:
            begin = stack.index(name)
            found.append(sorted(stack[begin:]))
            del stack[begin:]

    sys.setrecursionlimit(max(sys.getrecursionlimit(), 10 * len(MODULES)))
    for name in MODULES:
        if name not in number:
            visit(name)
    return [circle for circle in found if len(circle) > 1]


def test_no_import_leads_back() -> None:
    assert not (found := circles()), "circles of imports:\n" + "\n".join(", ".join(circle) for circle in found)
