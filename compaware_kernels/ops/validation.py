"""Argument checks of the public functions: weights, thresholds, centers; errors read ``<name>: wanted X; got Y``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import UninitializedTensorMixin

from .._utils import memory
from .._utils.dtypes import DTYPES, compute_dtype

__all__ = [
    "Check",
    "all_finite",
    "check_above_one",
    "check_all_finite",
    "check_apart",
    "check_center",
    "check_finite",
    "check_kind",
    "check_layout",
    "check_values",
    "check_weight",
    "check_weights",
    "check_writable",
    "checked",
    "checked_list",
    "checked_tau",
    "has_values",
    "one_per_weight",
]

Check = Callable[[Tensor, str], None]  # (values, their name in an error)


def checked(W: Tensor, tau: float | Tensor, what: str = "tau") -> tuple[Tensor, Tensor]:
    """W ``[..., m, n]`` and tau as a tensor, one number or ``[...]``, both checked."""
    check_weight(W, "W")
    return W, checked_tau(tau, W, what)


def check_weight(W: Tensor, name: str, axes: int = 2) -> None:
    """Raise TypeError or ValueError unless W is a finite tensor of a supported dtype with at least ``axes`` axes."""
    check_kind(W, name, axes)
    check_finite(W, name)


def check_kind(W: Tensor, name: str, axes: int = 2) -> None:
    """:func:`check_weight` without reading values."""
    if not isinstance(W, Tensor):
        raise TypeError(f"{name}: wanted a torch.Tensor; got {type(W).__name__}")
    if isinstance(W, UninitializedTensorMixin):  # is_lazy would break graphs of torch.compile
        raise ValueError(f"{name}: wanted a tensor with values; got one that is not initialized (a lazy module)")
    if W.dtype not in DTYPES:
        raise TypeError(f"{name}: wanted dtype {', '.join(str(d)[6:] for d in DTYPES)}; got {str(W.dtype)[6:]}")
    check_layout(W, name)
    if W.ndim < axes:
        raise ValueError(f"{name}: wanted a matrix or a batch of them, [..., m, n]; got shape {list(W.shape)}")


def check_layout(t: Tensor, name: str) -> None:
    """Raise TypeError unless t is dense, ValueError if its values are not in memory."""
    if t.layout != torch.strided or t.is_nested:
        kind = "nested" if t.is_nested else str(t.layout).removeprefix("torch.").lstrip("_")
        raise TypeError(f"{name}: wanted a dense tensor; got a {kind} one")
    if t.device.type == "meta":
        raise ValueError(f"{name}: wanted a tensor with values; got one on the meta device")
    if memory.has_memory(t) and memory.is_freed(t):
        raise ValueError(f"{name}: wanted a tensor with values; got one whose memory was freed (by FSDP?)")


def check_writable(t: Tensor, name: str) -> None:
    """Raise unless t can be written in place, whatever is computed for it.

    Raises:
        TypeError: a wrapper without memory of its own, or a tensor of a torch.func transform.
        ValueError: an inference tensor outside of inference mode; elements that share memory (an expanded tensor).
    """
    if torch.compiler.is_compiling():
        return
    if not memory.has_memory(t):
        transformed = torch._C._functorch.is_functorch_wrapped_tensor(t)
        got = "one inside a torch.func transform" if transformed else f"a {type(t).__name__}"
        raise TypeError(f"{name}: wanted a tensor that can be written in place; got {got}")
    if t.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name}: wanted a tensor that can be written in place; "
                         "got an inference tensor outside of inference mode")  # fmt: skip
    if memory.overlaps_itself(t):
        raise ValueError(f"{name}: wanted a tensor that can be written in place; got elements that share memory, "
                         f"shape {list(t.shape)} with strides {list(t.stride())}")  # fmt: skip


def check_apart(
    tensors: Sequence[Tensor], names: Sequence[str], alike: Callable[[int, int], bool] = lambda i, j: True
) -> None:
    """Raise ValueError if two tensors share memory, unless they are the same view of it (tied weights).

    Args:
        alike: whether the arguments for tensors i and j are the same; those of tied weights must be.
    """
    if torch.compiler.is_compiling():
        return
    for i, j in memory.overlapping_pairs(tensors):
        if memory.view_of(tensors[i]) != memory.view_of(tensors[j]):
            raise ValueError(f"{names[j]}: wanted memory of its own; got a view that overlaps {names[i]}")
        if not alike(i, j):
            raise ValueError(f"{names[j]}: wanted the same arguments as {names[i]}, whose memory it is; got others")


def check_finite(W: Tensor, name: str) -> None:
    """Raise ValueError if W contains NaN or Inf; no check where values cannot be read (:func:`has_values`)."""
    if has_values(W) and W.numel() and not all_finite(values := _values(W)):
        raise ValueError(f"{name}: contains {'NaN' if values.isnan().any() else 'Inf'}; nothing was changed")


def check_weights(weights: Sequence[tuple[Tensor, str, bool]]) -> None:
    """Check many weights, given as (weight, name, whether to check that it is finite)."""
    for W, name, _ in weights:
        check_kind(W, name, axes=1)
    look = [(W, name) for W, name, values in weights if values]
    check_all_finite([W for W, _ in look], [name for _, name in look])


def check_all_finite(weights: Sequence[Tensor], names: Sequence[str]) -> None:
    """:func:`check_finite` of many weights, with one fused norm computation if all are finite."""
    if not _clearly_finite(weights):
        for W, name in zip(weights, names, strict=True):
            check_finite(W, name)


def check_center(center: Sequence[Tensor], weights: Sequence[Tensor], names: Sequence[str] | None) -> None:
    """Raise unless the centers are finite and match the weights in number, shape, dtype and device."""
    if isinstance(center, Tensor) or len(center) != len(weights):
        raise ValueError(f"center: wanted a list of {len(weights)} tensors, one per weight")
    for i, (C, W) in enumerate(zip(center, weights, strict=True)):
        name = f"center of {names[i]}" if names else f"center[{i}]"
        check_weight(C, name)
        if C.shape != W.shape or C.dtype != W.dtype or C.device != W.device:
            raise ValueError(f"{name}: wanted {W.dtype} {list(W.shape)} on {W.device}, as the weight; "
                             f"got {C.dtype} {list(C.shape)} on {C.device}")  # fmt: skip


def has_values(x: Tensor) -> bool:
    """Whether values of x can be read: not where torch.compile, make_fx or fake tensors trace."""
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None


def _values(x: Tensor) -> Tensor:
    """The values of x, under vmap those of the whole batch: what one call refuses, vmap refuses."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.detach()


def all_finite(W: Tensor) -> bool:
    """Whether W has no NaN or Inf: fast if its 2-norm is finite; else elementwise, as the norm may have overflowed."""
    return bool(torch.linalg.vector_norm(W).isfinite()) or bool(W.isfinite().all())


def _clearly_finite(weights: Sequence[Tensor]) -> bool:
    """Whether one fused pass of 2-norms proves all weights finite; False proves nothing (norms may overflow)."""
    if not weights or not all(map(has_values, weights)) or len({W.device for W in weights}) > 1:
        return False
    norms = torch._foreach_norm([_values(W) for W in weights])
    if len({norm.dtype for norm in norms}) > 1:
        norms = [norm.float() for norm in norms]
    return bool(torch.stack(norms).isfinite().all())


def check_values(t: Tensor, what: str) -> None:
    """Raise ValueError unless all thresholds are finite and >= 0."""
    if has_values(t) and not ((values := _values(t)).isfinite() & (values >= 0)).all():
        raise ValueError(f"{what}: wanted finite thresholds >= 0; got {values.tolist()}")


def check_above_one(t: Tensor, what: str) -> None:
    """Raise ValueError unless all numbers are finite and > 1."""
    if has_values(t) and not ((values := _values(t)).isfinite() & (values > 1)).all():
        raise ValueError(f"{what}: wanted finite numbers > 1; got {values.tolist()}")


def checked_tau(tau: float | Tensor, W: Tensor, what: str = "tau", check: Check = check_values) -> Tensor:
    """Thresholds as a tensor in W's compute dtype on its device: one number, or ``[...]`` for W ``[..., m, n]``."""
    t = _numbers(tau, what, compute_dtype(W.dtype), W.device)
    if t.ndim and t.shape != W.shape[:-2]:
        raise ValueError(f"{what}: wanted one number, or shape {list(W.shape[:-2])}; got shape {list(t.shape)}")
    check(t, what)
    return t


def checked_list(
    weights: Sequence[Tensor],
    tau: float | Sequence[float] | Tensor,
    names: Sequence[str] | None,
    what: str = "tau",
    axes: int = 2,
    finite: bool = True,
) -> Tensor:
    """Check L weights to write (``finite``: also their values); returns the thresholds, fp64 ``[L]`` on the CPU."""
    if isinstance(weights, Tensor):
        raise TypeError("weights: wanted a list of tensors, one per layer; got one tensor (put it in a list)")
    if names is not None and len(names) != len(weights):
        raise ValueError(f"names: wanted {len(weights)}, one per weight; got {len(names)}")
    names = names or [f"weights[{i}]" for i in range(len(weights))]
    for W, name in zip(weights, names, strict=True):
        check_kind(W, name, axes)
        check_writable(W, name)
    if finite:
        check_all_finite(weights, names)
    return one_per_weight(tau, len(weights), what)


def one_per_weight(
    values: float | Sequence[float] | Tensor, count: int, what: str, check: Check = check_values
) -> Tensor:
    """One number, or one per weight, as an fp64 tensor ``[count]`` on the CPU."""
    t = _numbers(values, what, torch.float64, torch.device("cpu"))
    if t.ndim and t.shape != (count,):
        raise ValueError(f"{what}: wanted one number, or {count}, one per weight; got shape {list(t.shape)}")
    check(t, what)
    return t.expand(count).clone()  # a view of a weight would change with it


def _numbers(values: float | Sequence[float] | Tensor, what: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Real numbers as a tensor of this dtype on this device; raises TypeError or ValueError for anything else."""
    if isinstance(values, Tensor):
        check_layout(values, what)
    try:
        given = torch.as_tensor(values) if hasattr(values, "dtype") else values  # NumPy's, too
        if not (isinstance(given, Tensor) and given.is_complex()):
            return torch.as_tensor(given, dtype=dtype, device=device)
        got = str(given.dtype)[6:]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        got = f"{values!r:.80}"
    raise TypeError(f"{what}: wanted a real number, or a list or tensor of them; got {got}")
