"""Decorator for all-or-nothing functions: Ctrl-C and other signals are handled after the call, never within it."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ParamSpec, TypeVar

import torch

__all__ = ["signals_held", "uninterrupted"]

P = ParamSpec("P")
R = TypeVar("R")
# Signals whose handlers raise exceptions: Ctrl-C, schedulers' warnings before they kill, timeouts, and the death of a
# worker of a DataLoader. Their Python handlers run between any two bytecodes of the main thread.
NAMES = ("SIGINT", "SIGBREAK", "SIGTERM", "SIGHUP", "SIGALRM", "SIGCHLD", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


@contextmanager
def signals_held() -> Iterator[None]:
    """Context manager that holds back :data:`SIGNALS` with handlers in Python; they are called at its end, each once.

    Nested ones wait for the outermost. Nothing is held in other threads than the main one, where no handler runs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: dict[int, FrameType | None] = {}  # in order of arrival
    handlers = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    replaced: list[int] = []
    try:
        for number in handlers:
            replaced.append(number)
            signal.signal(number, arrived.__setitem__)
        yield
    finally:
        try:
            _restore(handlers, replaced)
        finally:
            _call_all(handlers, arrived)


def _restore(handlers: dict[int, Callable], replaced: list[int]) -> None:
    """Install these handlers again, all of them, although one that is back may be called at once and raise."""
    if replaced:
        number = replaced.pop()
        try:
            signal.signal(number, handlers[number])
        finally:
            _restore(handlers, replaced)


def _call_all(handlers: dict[int, Callable], arrived: dict[int, FrameType | None]) -> None:
    """Call the handlers of the signals that have arrived, all of them, although one may raise."""
    if arrived:
        number = next(iter(arrived))
        frame = arrived.pop(number)
        try:
            handlers[number](number, frame)
        finally:
            _call_all(handlers, arrived)


def uninterrupted(function: Callable[P, R]) -> Callable[P, R]:
    """The function, called with :func:`signals_held`; as it is while torch.compile traces it."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with signals_held():
            return function(*args, **kwargs)

    return call
