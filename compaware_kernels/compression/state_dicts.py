"""State dicts of training checkpoints: read without executing code, found where programs nest them, and matched."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..nn.unwrap import name_without_wrappers
from .tensor_file import one_line

__all__ = ["misfit", "read_into"]

SHOWN = 3  # names of each kind
DEPTH = 4  # of nesting


def misfit(wanted: Mapping[str, object], got: Mapping[str, object]) -> str:
    """Difference of a state dict ``got`` from a model's: three names of each kind, and the likely cause; "" if it fits.

    Names, and shapes and dtypes of tensors, are compared. Of a model's state dict with ``keep_vars=True`` also what
    two names have in common: a tied tensor must not have two values.
    """
    missing, unexpected = [n for n in wanted if n not in got], [n for n in got if n not in wanted]
    both = [(n, wanted[n], got[n]) for n in wanted if n in got]
    shapes = [f"{n} is {_shape(b)}, wanted {_shape(a)}" for n, a, b in both if _shape(a) != _shape(b)]
    dtypes = [f"{n} is {_dtype(b)}, wanted {_dtype(a)}" for n, a, b in both if _dtype(a) != _dtype(b)]
    kinds = {"missing": missing, "not of the model": unexpected, "of other shapes": shapes, "of other dtypes": dtypes,
             "of two values for one tied tensor": _untied(both)}  # fmt: skip
    found = [f"{len(names)} {kind} ({', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)})"
             for kind, names in kinds.items() if names]  # fmt: skip
    return f"{'; '.join(found)}. {_cause(wanted, got, kinds)}" if found else ""


def _untied(both: Sequence[tuple[str, object, object]]) -> list[str]:
    """Names of tensors that are one in the model, and have another value than that in the state dict."""
    first: dict[int, object] = {}
    pairs = [(name, value, first.setdefault(id(own), value)) for name, own, value in both if isinstance(value, Tensor)]
    pairs = [pair for pair in pairs if pair[1] is not pair[2]]
    dense = {name for name, *values in pairs if all(T.layout == torch.strided for T in values)}
    return [name for name, value, other in pairs if name not in dense or not torch.equal(value, other)]


def _shape(T: object) -> str:
    return str(list(T.shape)) if isinstance(T, Tensor) else "no tensor"


def _dtype(T: object) -> str:
    if not isinstance(T, Tensor):
        return "no tensor"
    return str(T.dtype if T.layout == torch.strided else f"{T.layout} {T.dtype}").removeprefix("torch.")


def _cause(wanted: Mapping[str, object], got: Mapping[str, object], kinds: dict[str, list[str]]) -> str:
    """The likely cause of a misfit, as a sentence."""
    missing, unexpected, shapes, dtypes, _ = kinds.values()
    if any(name.endswith(("first.weight", "second.weight")) for name in unexpected):
        return "It is a compressed model: ck.load reads those"
    if prefix := _prefix([(name,) for name in wanted], got):
        return f"Its names begin with {prefix!r}"
    if prefix := _prefix([(name,) for name in got], wanted):
        return f"The model's names begin with {prefix!r}, the file's do not"
    if not wanted.keys() & got.keys():
        return "They have no name in common: another architecture, or another part of the file"
    if missing or unexpected:
        return "Another architecture, or another variant of it"
    if shapes:
        return "The same architecture in other sizes"
    if not dtypes:
        return "Untie them in the model first"
    floats = all(
        _dtype(got[name]).startswith(("float", "bfloat"))
        for name in wanted
        if _dtype(wanted[name]) != _dtype(got[name])
    )
    return "Convert the model first: model.to(dtype)" if floats else "No file of this model"


def _prefix(wanted: Sequence[Sequence[str]], got: Mapping[str, object]) -> str:
    """The prefix other than "" with which ``got`` has a name of every group in ``wanted``; "" if there is none."""
    first = [f".{name}" for name in next(iter(wanted), ())]
    found = {name.removesuffix(end) + "." for name in got for end in first if name.endswith(end)}
    covers = (p for p in sorted(found) if all(any(p + name in got for name in names) for names in wanted))
    return next(covers, "")


def read_into(model: nn.Module, path: Path, key: str | None = None, of: str = "the model") -> list[str]:
    """Load the state dict of a training checkpoint into ``model``; no code in the file is executed.

    The file is of safetensors or ``torch.save``. The state dict may be nested ({"state_dict": ...}). The parts of names
    that torch.compile and activation checkpointing add and prefixes such as ``module.`` are removed, tied tensors need
    one of their names, and floating-point weights are converted to the model's dtype.

    Args:
        key: where in the file the state dict is, "model" or "ema.module"; default: the first that fits.
        of: what errors call the model.

    Returns:
        what was done beyond this, as sentences.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is damaged, no state dict in it fits, or a tensor holds NaN.
    """
    content, own = _read(path), model.state_dict(keep_vars=True)
    candidates = dict(_state_dicts(content))
    names = ", ".join(map(repr, candidates)) or f"a {type(content).__name__} without one"
    if key is not None:
        candidates = {key: candidates[key]} if key in candidates else {}
    if not candidates:
        raise ValueError(f"{path}: wanted a state dict{f' at {key!r}' if key else ''}; got {names}")
    matched = {where: _matched(own, state) for where, state in candidates.items()}
    problems = {where: misfit(own, state) for where, (state, _) in matched.items()}
    where = min(problems, key=lambda where: (problems[where] != "", -len(own.keys() & matched[where][0].keys())))
    (state, done), at = matched[where], f" at {where!r}" * bool(where)
    if problems[where]:
        raise ValueError(f"{path}: wanted a state dict of {of}; got one{at} with {problems[where]}")
    for name, T in state.items():
        if isinstance(T, Tensor) and T.isnan().any():
            raise ValueError(f"{path}: {name}: wanted numbers; got NaN")
    try:
        model.load_state_dict(state)
    except Exception as error:  # of a model's own set_extra_state, for example
        raise ValueError(f"{path}: wanted a state dict of {of}; got {one_line(error)}") from error
    others = [repr(other) for other in problems if other != where and not problems[other]]
    done = [f"read the state dict{at}"] * bool(where) + done
    return done + [f"{' and '.join(others)} would fit, too (--key)"] * bool(others)


def _read(path: Path) -> object:
    """Contents of a file of safetensors or ``torch.save``, on the CPU."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes raises anything
        kind = re.search(r"GLOBAL (\S+)", str(error))
        got = f"an object of {kind[1]}: save model.state_dict() alone" if kind else one_line(error).partition(". ")[0]
        raise ValueError(f"{path}: wanted a readable state dict; got {got}") from error


def _state_dicts(content: object, where: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[str, object]]]:
    """State dicts in nested dicts, the outermost first: dicts with text keys of which one at least is a tensor's."""
    if not isinstance(content, Mapping) or depth > DEPTH:
        return
    if all(isinstance(name, str) for name in content) and any(isinstance(T, Tensor) for T in content.values()):
        yield where, content
    for name, inner in content.items():
        if isinstance(name, str):
            yield from _state_dicts(inner, f"{where}.{name}".lstrip("."), depth + 1)


def _matched(own: Mapping[str, Tensor], state: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """The state dict by the names and in the floating-point dtypes of the model's ``own``; what that took."""
    done, groups = [], defaultdict(list)
    for name, T in own.items():
        groups[id(T)].append(name)
    plain = {name_without_wrappers(name): T for name, T in state.items()}
    if plain.keys() != state.keys():
        done.append("removed the parts of names that wrappers add")
    missing = any(all(name not in plain for name in names) for names in groups.values())
    if missing and (prefix := _prefix([*groups.values()], plain)):
        dropped = [name for name in plain if not name.startswith(prefix)]
        done.append(f"removed the prefix {prefix!r}" + f" and {len(dropped)} other entries" * bool(dropped))
        plain = {name.removeprefix(prefix): T for name, T in plain.items() if name not in dropped}
    for names in groups.values():
        if here := [name for name in names if name in plain]:
            plain |= {name: plain[here[0]] for name in names if name not in plain}
    for name in own.keys() & plain.keys():
        a, b = own[name], plain[name]
        floats = all(isinstance(T, Tensor) and T.is_floating_point() for T in (a, b))
        if floats and a.dtype != b.dtype:
            plain[name] = b.to(a.dtype)
            done.append(f"converted {_dtype(b)} to {_dtype(a)}")
    return plain, list(dict.fromkeys(done))
