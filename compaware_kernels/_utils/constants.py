"""Constants, codes and layouts of device tables that C++ and Python share, read once from the C++ headers."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

__all__ = ["CSRC", "constant", "enumerators", "members"]

HEADERS = ("core/constants.h", "cuda/step.h")


def _find_sources() -> Path:
    """The folder ``csrc``: in an installed package, or beside the package in a source tree."""
    package = Path(str(files(__name__.partition(".")[0])))
    places = (package / "csrc", package.parent / "csrc")
    if found := next((place for place in places if all((place / name).exists() for name in HEADERS)), None):
        return found
    raise ImportError(f"C++ headers: wanted {', '.join(HEADERS)} in {places[0]} or {places[1]}; got neither")


CSRC = _find_sources()
_TEXT = re.sub(r"//.*", "", "".join((CSRC / name).read_text() for name in HEADERS))


def constant(name: str) -> int | float:
    """The value of ``constexpr type name = literal;``."""
    literal = _search(rf"constexpr \w+ {name} = ([-+.\w]+);", name)
    return int(literal) if literal.isdigit() else float(literal)


def enumerators(enum: str) -> tuple[str, ...]:
    """Enumerators in the order of their values, spelled as in Python: ``kScaleSign`` is ``scale_sign``."""
    names = re.findall(r"\w+", _search(rf"enum (?:class )?{enum} {{(.*?)}};", enum))
    return tuple(re.sub(r"(?<!^)(?=[A-Z])", "_", re.sub(r"^k(?=[A-Z])", "", name)).lower() for name in names)


def members(struct: str) -> tuple[str, ...]:
    """Members of a struct in the order of their addresses; each has 8 bytes."""
    return tuple(re.findall(r"(\w+)[,;]", _search(rf"struct {struct} {{(.*?)}};", struct)))


def _search(pattern: str, name: str) -> str:
    if found := re.search(pattern, _TEXT, re.DOTALL):
        return found[1]
    raise LookupError(f"{name}: wanted a name that {' or '.join(HEADERS)} defines in plain form; got none")
