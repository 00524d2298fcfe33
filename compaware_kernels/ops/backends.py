"""Backend registry: per op and device type an ordered list of kernels, with why each is unavailable or declines.

The dispatcher, the layers, the solver, the self-test and ``compaware info`` all read this table. The first backend that
is available and accepts the arguments runs; otherwise plain PyTorch does. To add a backend, add a row; a backend
launched from Python also needs its function (``run``), which the op's CUDA implementation below calls. Importing this
module does not import Triton.
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

WANTED = (3, 6)  # least Triton version
TWO_STEPS = "two steps, not the fused kernel"
SHRINK = (
    "soft_threshold", "group_shrink", "sparse_group_shrink",
    "soft_threshold_", "group_shrink_", "neuron_shrink_", "sparse_group_shrink_",
)  # fmt: skip
SPECTRAL = ("svt_", "firm_svt_")


class Backend(NamedTuple):
    """Backend of an op on a device type.  Reasons are text; "" means that there is none."""

    name: str
    missing: Callable[[torch.device], str] = lambda device: ""  # why it is unavailable on the device, for any arguments
    declines: Callable[..., str] = lambda *args: ""  # why it does not accept these arguments
    family: str = ""  # of the self-test; where the family failed, it is not used
    run: Callable[..., Tensor] | None = None  # None: registered by the C++ library
    ops: tuple[str, ...] = ()  # ops that it calls

    def why_not(self, device: torch.device) -> str:
        """Why it is not used on the device, for any arguments; "" if it is."""
        return self.missing(device) or (quarantine.refused(self.family, device) if self.family else "")


# --- why a backend is unavailable -------------------------------------------------------------------------------------


@cache
def triton_missing() -> str:
    """Why no Triton kernel can run on any device; "" if they can."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return "" if version >= WANTED else f"triton 3.6 or later is wanted; found {triton.__version__}"


def _no_library(device: torch.device) -> str:
    return f"C++ library: {library.missing}" if library.missing else ""


def _no_shrink(device: torch.device) -> str:
    """Why the shrink kernels are missing: no library, or one built without nvcc; "" if they are registered."""
    here = torch._C._dispatch_has_kernel_for_dispatch_key("compaware::soft_threshold", device.type.upper())
    return _no_library(device) or ("" if here else f"C++ library: built without kernels for {device.type}")


@cache
def _no_triton(device: torch.device) -> str:
    too_old = device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)
    return triton_missing() or (f"sm_80 or later is wanted; {device} is older" if too_old else "")


# --- Triton low-rank kernel, with the ops' arguments ------------------------------------------------------------------


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

TABLE: dict[str, dict[str, list[Backend]]] = {  # op -> device type -> backends, in order of preference
    "svt": {},
    "small_svd": {"cpu": [CPP]},
    "wide_product": {"cpu": [CPP]},
    **{op: {"cpu": [CPP], "cuda": [CUDA_SHRINK]} for op in SHRINK},
    **{
        op: {"cpu": [], "cuda": []} for op in SPECTRAL
    },  # filled by the proximal solver and the CUDA step, which import this module
    "lowrank_pack": {"cpu": [CPP]},
    "lowrank_conv2d": {"cpu": [CPP_LOW_RANK], "cuda": [TRITON._replace(run=_triton_conv2d)]},
    "lowrank_conv2d_": {"cpu": [CPP_LOW_RANK], "cuda": [TRITON]},  # on CUDA through lowrank_conv2d
    "lowrank_linear": {"cpu": [CPP_LOW_RANK], "cuda": [TRITON._replace(run=_triton_linear)]},
}
_CPU = torch.device("cpu")


def choose(op: str, device: torch.device, *args, kind: str = "") -> tuple[Backend, str]:
    """Backend that runs ``op`` on a device, and why those preferred to it do not.

    Args:
        args: the op's arguments, for the backends to accept or decline; none: disregard arguments.
        kind: device type to look up, if it is not that of ``device``.
    """
    kind = kind or ("cpu" if device == _CPU else device.type)  # comparing avoids .type, which takes 0.2 us
    reasons = []
    for backend in TABLE[op].get(kind, ()):
        reason = backend.why_not(device) or (backend.declines(*args) if args else "")
        if not reason:
            return backend, "; ".join(reasons)
        reasons.append(reason)
    return PLAIN, "; ".join(reasons)


def describe(op: str, device: torch.device, kind: str = "") -> str:
    """Text for ``compaware info``: the backend of ``op`` on a device, its parts, and why preferred ones do not run."""
    backend, reason = choose(op, device, kind=kind)
    kernels = [part for part in backend.ops if choose(part, device)[0] is not PLAIN]
    parts = "; ".join(f"{part}: {describe(part, device)}" for part in kernels) or "plain PyTorch"
    return backend.name + (f" ({parts})" if backend.ops else "") + (f": {reason}" if reason else "")


@cache
def log_once(what: str, instead: str, reason: str, level: int = logging.INFO) -> None:
    """Log a fallback from the fast path and its reason, once per process."""
    logging.getLogger("compaware_kernels").log(level, "%s: %s: %s", what, instead, reason)


# --- CUDA implementations of the ops ----------------------------------------------------------------------------------


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
    """Register the CUDA implementations launched from Python, and replace kernels that failed the self-test."""
    for name, body in {"lowrank_conv2d": _conv2d, "lowrank_linear": _linear}.items():
        torch.library.register_kernel(f"compaware::{name}", "cuda", body)
    replace_shrink()


_put: list[torch.library.Library] = []  # its registrations live as long as the Library object


def replace_shrink(key: str = "CUDA") -> None:
    """Register the reference implementations over the C++ shrink kernels if those failed the self-test, else undo it.

    These ops are dispatched to the library without Python, so the table alone cannot keep them from running.
    """
    reason = quarantine.failure(quarantine.SHRINK, torch.device(key.lower()))
    if not reason:
        _put.clear()
    elif not _put:
        logging.getLogger("compaware_kernels").warning("shrink kernels: plain PyTorch instead: they failed: %s", reason)
        _put.append(torch.library.Library("compaware", "IMPL"))
        for name in SHRINK:
            _put[0].impl(name, getattr(shrinkage, name)._init_fn, key, allow_override=True)
