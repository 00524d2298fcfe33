"""Autocast off, on every device: for what is stated in the precision of its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from operator import or_

from torch import _C

__all__ = ["without_autocast"]

_KEYS = reduce(or_, (_C.DispatchKeySet(getattr(_C.DispatchKey, name)) for name in dir(_C.DispatchKey)
                     if name.startswith("Autocast")))  # fmt: skip


@contextmanager
def without_autocast() -> Iterator[None]:
    """Context, or decorator, in which no op casts its arguments, though the caller runs under ``torch.autocast``.

    Matrix products in bf16 would move a proximal step by a thousand times its error bound.
    """
    with _C._ExcludeDispatchKeyGuard(_KEYS):
        yield
