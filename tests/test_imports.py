"""The rooms of the package: imports run down only, and never in a circle. Read from the source, run by nothing."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "compaware_kernels"
LEVELS = (  # from the top: a room may import what stands below it, and itself
    {"__init__", "__main__"},
    {"cli"},
    {"demo"},
    {"study"},
    {"integrations", "selftest"},
    {"training", "compression"},
    {"proximal", "nn"},
    {"distributed"},
    {"environment"},
    {"ops"},
    {"folds", "ranks"},
    {"_utils"},
)
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
FORBIDDEN = {("nn", "distributed")}
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def module_of(name: str) -> str:
    """The file that ``name`` is, or is defined in; "" is the package itself."""
    while name and name not in FILES and f"{name}.__init__" not in FILES:
        name = name.rpartition(".")[0]
    return name if name in FILES else f"{name}.__init__".lstrip(".")


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports, also within its functions."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else None
            if base is None and (node.module or "").partition(".")[0] != PACKAGE.name:
                continue
            base = [*(base or ()), *(node.module or "").split(".")[0 if node.level else 1 :]]
            found |= {module_of(".".join(filter(None, [*base, alias.name]))) for alias in node.names}
        elif isinstance(node, ast.Import):
            inside = [alias.name.partition(".")[2] for alias in node.names if alias.name.startswith(PACKAGE.name)]
            found |= {module_of(part) for part in inside}
    return found - {name}


IMPORTS = {name: imports(name) for name in FILES}


def room(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("name", FILES)
def test_imports_run_down(name):
    assert room(name) in LEVEL, f"{room(name)} is no room: name it in LEVELS"
    for other in IMPORTS[name]:
        here, there = room(name), room(other)
        allowed = here == there or LEVEL[there] > LEVEL[here]
        assert allowed and (here, there) not in FORBIDDEN, f"{name} imports {other}: not below {here}"


def test_no_circles():
    assert list(TopologicalSorter(IMPORTS).static_order())
