"""What else holds on to the layers of a model: parents that read weights, subclasses, attributes, tied parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from inspect import signature
from types import CellType, FunctionType, MethodType

from torch import Tensor, nn

from .._utils.memory import span
from .lowrank import FACTORS, LowRank
from .module_surgery import plain_attributes, why_irreplaceable
from .registry import LOW_RANK
from .unwrap import wrapped_module

__all__ = ["kind_of", "tied_weights", "why_dense", "why_read_or_overridden"]

READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # pass the weights of their children to one function
# Methods by which a layer's class uses its weight, and those on which no output depends.
USES = {"forward", "_conv_forward", "_output_padding", "__call__", "_call_impl", "__getattr__", "__getattribute__"}
HARMLESS = {"extra_repr", "reset_parameters", "_get_name"}


def why_dense(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Reasons by name why layers of ``model`` cannot become two factors; layers that can are left out."""
    fixed, held, parents = why_read_or_overridden(model), _held(model), _parents(model)
    reasons = {}
    for name in names:
        layer = model.get_submodule(name)
        holder = held.get(id(layer)) or held.get(id(layer.weight))
        if any(isinstance(parent, LowRank) for parent in parents.get(id(layer), ())):
            reasons[name] = "a factor of a low-rank layer; ck.to_dense(model) first, to cut its rank further"
        elif reason := fixed.get(id(layer)) or _why_not_taken_over(layer):
            reasons[name] = reason
        elif holder:
            reasons[name] = f"the attribute {holder} holds it, too, and would keep the dense layer"
    return reasons


def why_read_or_overridden(model: nn.Module) -> dict[int, str]:
    """Reasons by ``id`` of layers that can never become two factors: read by a parent, or a forward of their own."""
    parents, reasons = _parents(model), {}
    for layer in model.modules():
        reader = next((parent for parent in parents.get(id(layer), ()) if isinstance(parent, READERS)), None)
        if reader is not None:
            reasons[id(layer)] = f"{kind_of(type(reader))} reads its weight directly"
        elif isinstance(layer, tuple(LOW_RANK)) and (own := _own_names(type(layer)) & USES):
            reasons[id(layer)] = _subclass(layer, own)
    return reasons


def tied_weights(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Layers by name whose weight occupies memory that another parameter or buffer uses, too -> the other's name."""
    uses: dict[int, list[tuple[int, int, int, str]]] = {}
    for owner, module in model.named_modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            storage, start, end = span(tensor)
            uses.setdefault(storage, []).append((start, end, id(module), f"{owner}.{name}".lstrip(".")))
    tied = {}
    for name in names:
        layer = model.get_submodule(name)
        storage, start, end = span(layer.weight)
        others = (other for a, b, module, other in uses[storage] if module != id(layer) and a < end and start < b)
        if other := next(others, None):
            tied[name] = other
    return tied


def kind_of(kind: type) -> str:
    """Name of a class: ``nn.Linear`` for one of torch.nn, else with its module, as another library's may be alike."""
    return f"nn.{kind.__name__}" if getattr(nn, kind.__name__, None) is kind else f"{kind.__module__}.{kind.__name__}"


def _parents(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Parents by ``id`` of the module; wrappers of torch.compile and checkpointing are looked through."""
    parents: dict[int, list[nn.Module]] = {}
    for parent in model.modules():
        for child in parent._modules.values():
            while child is not None and (inside := wrapped_module(child)) is not None:
                child = inside
            parents.setdefault(id(child), []).append(parent)
    return parents


def _why_not_taken_over(layer: nn.Module) -> str:
    """Why a low-rank layer in the place of this one would lack something that it has; "" if it takes over all."""
    if own := _own_names(type(layer)):
        return _subclass(layer, own)
    used = {*plain_attributes(layer), *layer._buffers, *layer._parameters} & {*LowRank.own_attributes, *FACTORS}
    if used:
        return f"an attribute called {min(used)}, as low-rank layers have"
    return why_irreplaceable(layer) or _why_not_as_made(layer)


def _why_not_as_made(layer: nn.Module) -> str:
    """Why the layer is not what its class makes of its attributes; "" if it is, so that these describe it."""
    bias, base = layer.bias, next(base for base in type(layer).__mro__ if base in LOW_RANK)
    if bias is not None and not isinstance(bias, nn.Parameter):
        return "a bias that is no parameter"
    arguments = {name: getattr(layer, name, None) for name in signature(base).parameters}
    try:
        made = base(**arguments | {"bias": bias is not None, "device": "meta", "dtype": layer.weight.dtype})
    except (TypeError, ValueError) as error:
        return f"attributes that were changed to invalid ones: {error}"
    for name in ("weight", "bias"):
        now, then = getattr(layer, name), getattr(made, name)
        if now is not None and (now.shape, now.dtype) != (then.shape, then.dtype):
            return f"a {name} {list(now.shape)} {now.dtype}, where its attributes say {list(then.shape)} {then.dtype}"
    for name, value in plain_attributes(made).items():
        if getattr(layer, name, None) != value:
            return f"{name} = {getattr(layer, name, None)}, where its other attributes say {value}"
    return ""


def _own_names(kind: type[nn.Module]) -> set[str]:
    """What a subclass of a layer of torch.nn defines anew; without special methods that do not run it."""
    names: set[str] = set()
    for base in kind.__mro__:
        if base in LOW_RANK:
            break
        names |= {name for name in vars(base) if name in USES or not name.startswith("__")}
    return names - HARMLESS


def _subclass(layer: nn.Module, own: set[str]) -> str:
    base = next(base for base in type(layer).__mro__ if base in LOW_RANK)
    return f"{kind_of(type(layer))}, a subclass of {kind_of(base)} with its own {', '.join(sorted(own)[:3])}"


def _held(model: nn.Module) -> dict[int, str]:
    """Modules and tensors by ``id`` that plain attributes hold, also in containers and functions -> the attribute."""
    own = ("_modules", "_parameters", "_buffers", "_compiled_call_impl")  # the last: module.compile(), left by copies
    held = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in own:
                for found in _reachable(value):
                    held.setdefault(id(found), f"{name}.{attribute}".lstrip("."))
    return held


def _reachable(value: object) -> Iterator[nn.Module | Tensor]:
    """Modules and tensors in a value, through containers, partial and bound functions, and closures."""
    left, seen = [value], set()
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (nn.Module, Tensor)):
            yield value
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            left += value
        elif isinstance(value, partial):
            left += (value.func, *value.args, *value.keywords.values())
        elif isinstance(value, MethodType):
            left.append(value.__self__)
        elif isinstance(value, FunctionType):
            left += [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
