"""Which backend runs which op: one table, that dispatcher, layers, solver, self-test and ``compaware info`` read.

A row says why its backend cannot run on this machine, and which arguments it declines. The first row without an
objection runs; where there is none, plain PyTorch does. To add a backend, add a row; if Python starts it, with its body
(``run``), which the op's CUDA body below then calls. Importing this imports no Triton.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import library, quarantine, shrinkage
from . import lowrank as lowrank_ops
from .lowrank_limits import cpu_declines, triton_declines

WANTED = (3, 6)  # of Triton
TWO_STEPS = "two steps, not the fused kernel"
SHRINK_OPS = (
    "soft_threshold", "group_shrink", "sparse_group_shrink",
    "soft_threshold_", "group_shrink_", "neuron_shrink_", "sparse_group_shrink_",
)  # fmt: skip
SPECTRAL_OPS = ("svt_", "firm_svt_")


class Backend(NamedTuple):
    """One row of the table.  A reason is a text; "" is none."""

    name: str
    missing: Callable[[torch.device], str] = lambda device: ""  # why it cannot run there, whatever the arguments
    declines: Callable[..., str] = lambda *args: ""  # why it does not take these arguments
    family: str = ""  # of the self-test: where that found it wrong, it is not used
    run: Callable[..., Tensor] | None = None  # None: the C++ library has registered it
    ops: tuple[str, ...] = ()  # that it is made of

    def why_not(self, device: torch.device) -> str:
        """Why it is not used there, whatever the arguments."""
        return self.missing(device) or (quarantine.refused(self.family, device) if self.family else "")


# --- why a backend cannot run on this machine -------------------------------------------------------------------------


@cache
def triton_missing() -> str:
    """Why no Triton kernel can run here, whatever the device; "" if they can."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return "" if version >= WANTED else f"triton 3.6 or later is wanted; found {triton.__version__}"


def _no_library(device: torch.device) -> str:
    return f"C++ library: {library.missing}" if library.missing else ""


def _no_shrink(device: torch.device) -> str:
    """The library was loaded, but for CUDA it may have been built without nvcc."""
    here = torch._C._dispatch_has_kernel_for_dispatch_key("compaware::soft_threshold", device.type.upper())
    return _no_library(device) or ("" if here else f"C++ library: built without kernels for {device.type}")


@torch.compiler.assume_constant_result  # a compiler would trace through caches
def _no_triton(device: torch.device) -> str:
    return triton_missing() or _too_old(device)


@cache
def _too_old(device: torch.device) -> str:
    old = device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)
    return f"sm_80 or later is wanted; {device} is older" if old else ""


# --- Triton's low-rank kernel, as the ops call it ---------------------------------------------------------------------


def _triton_conv2d(x, V, U, bias, residual, packed, stride, padding, dilation, groups, fold, activation) -> Tensor:
    from . import triton_lowrank

    y = triton_lowrank.lowrank_conv2d(x, V, U, bias, residual, stride, padding, dilation, activation)
    return y.contiguous(memory_format=lowrank_ops.format_of(x, V))


def _triton_linear(x, V, U, bias, residual, packed, activation) -> Tensor:
    from . import triton_lowrank

    return triton_lowrank.lowrank_linear(x, V, U, bias, residual, activation)


# --- the table --------------------------------------------------------------------------------------------------------

PLAIN = Backend("reference (plain PyTorch)")
CPP = Backend("C++ kernel", _no_library)
CPP_LOW_RANK = CPP._replace(declines=cpu_declines)
CUDA_SHRINK = Backend("C++ kernel", _no_shrink, family=quarantine.SHRINK)
TRITON = Backend("Triton kernel", _no_triton, triton_declines, quarantine.LOW_RANK)

TABLE: dict[str, dict[str, list[Backend]]] = {  # op -> type of device -> its backends there, the first choice first
    "svt": {},
    "small_svd": {"cpu": [CPP]},
    "gram_eigh": {"cpu": [CPP]},
    "wide_product": {"cpu": [CPP]},
    "sum_of_squares": {"cpu": [CPP]},
    "subspace_step": {"cpu": [CPP]},
    **{op: {"cpu": [CPP], "cuda": [CUDA_SHRINK]} for op in SHRINK_OPS},
    **{op: {"cpu": [], "cuda": []} for op in SPECTRAL_OPS},  # filled from above, by the solver and the step on a GPU
    "lowrank_pack": {"cpu": [CPP]},
    "lowrank_conv2d": {"cpu": [CPP_LOW_RANK], "cuda": [TRITON._replace(run=_triton_conv2d)]},
    "lowrank_conv2d_": {"cpu": [CPP_LOW_RANK], "cuda": [TRITON]},  # on CUDA by lowrank_conv2d
    "lowrank_linear": {"cpu": [CPP_LOW_RANK], "cuda": [TRITON._replace(run=_triton_linear)]},
}
_CPU = torch.device("cpu")


def choose(op: str, device: torch.device, *args, kind: str = "") -> tuple[Backend, str]:
    """The backend that runs ``op``, and why not those before it.

    Args:
        args: those that a row is asked about; none: whatever they are.
        kind: the type of device to look up, where that is not the device's own: "cuda", where a launcher is registered.
    """
    kind = kind or ("cpu" if device == _CPU else device.type)  # .type takes 0.2 us
    reasons = []
    for backend in TABLE[op].get(kind, ()):
        reason = backend.why_not(device) or (backend.declines(*args) if args else "")
        if not reason:
            return backend, "; ".join(reasons)
        reasons.append(reason)
    return PLAIN, "; ".join(reasons)


def describe(op: str, device: torch.device, kind: str = "") -> str:
    """What runs ``op`` on arguments that it takes, and why not what stands before it: for ``compaware info``."""
    backend, reason = choose(op, device, kind=kind)
    kernels = [part for part in backend.ops if choose(part, device)[0] is not PLAIN]
    parts = "; ".join(f"{part}: {describe(part, device)}" for part in kernels) or "plain PyTorch"
    return backend.name + (f" ({parts})" if backend.ops else "") + (f": {reason}" if reason else "")


@cache
def log_once(what: str, instead: str, reason: str, level: int = logging.INFO) -> None:
    """Log that the fast path was not taken, what was done instead, and why; the same once per process."""
    logging.getLogger("compaware_kernels").log(level, "%s: %s: %s", what, instead, reason)


# --- bodies for the dispatcher ---------------------------------------------------------------------------------------
# Not only layers get here, and under autocast dtypes are others than the layer has seen: each asks the table.


def _conv2d(x, V, U, bias, residual, packed, stride, padding, dilation, groups, fold, activation) -> Tensor:
    rest = (stride, padding, dilation, groups, fold, activation)
    backend, reason = choose("lowrank_conv2d", x.device, x, V, U, groups, fold)
    if backend.run:
        return backend.run(x, V, U, bias, residual, packed, *rest)
    log_once("lowrank_conv2d", TWO_STEPS, reason)
    return lowrank_ops.lowrank_two_step(x, V, U, bias, residual, *rest)


def _linear(x, V, U, bias, residual, packed, activation) -> Tensor:
    backend, reason = choose("lowrank_linear", x.device, x, V, U)
    if backend.run:
        return backend.run(x, V, U, bias, residual, packed, activation)
    log_once("lowrank_linear", TWO_STEPS, reason)
    return lowrank_ops.lowrank_linear_two_step(x, V, U, bias, residual, activation)


def register() -> None:
    """Give the dispatcher the bodies that Python starts, and take from it those that failed the self-test."""
    for name, body in {"lowrank_conv2d": _conv2d, "lowrank_linear": _linear}.items():
        torch.library.register_kernel(f"compaware::{name}", "cuda", body)
    replace_shrink()


_put: list[torch.library.Library] = []  # what it registers is gone with it


def replace_shrink(key: str = "CUDA") -> None:
    """Put the reference bodies in the place of ck_shrink if it has failed: its ops go to the library without Python."""
    reason = quarantine.failure(quarantine.SHRINK, torch.device(key.lower()))
    if not reason:
        _put.clear()
    elif not _put:
        logging.getLogger("compaware_kernels").warning("shrink kernels: plain PyTorch instead: they failed: %s", reason)
        _put.append(torch.library.Library("compaware", "IMPL"))
        for name in SHRINK_OPS:
            _put[0].impl(name, getattr(shrinkage, name)._init_fn, key, allow_override=True)
