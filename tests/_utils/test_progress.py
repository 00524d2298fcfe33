"""Progress bars: on a terminal, of work that takes seconds, and nothing else of them remains."""

import io
import sys

import pytest
import torch
from torch import nn

import compaware_kernels as ck
from compaware_kernels._utils import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stderr", "shown", "patience", "visible"),
    [
        (Terminal, None, 0.0, True),
        (Terminal, None, 60.0, False),
        (Terminal, False, 0.0, False),
        (io.StringIO, None, 0.0, False),
        (io.StringIO, True, 0.0, True),
    ],
)
def test_bar(stderr, shown, patience, visible, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", patience)
    monkeypatch.setattr(sys, "stderr", stderr())
    monkeypatch.setenv("TERM", "xterm")
    for units in ([1, 2, 3], iter([1, 2, 3])):
        assert list(progress.tracked(units, "count", shown)) == [1, 2, 3]
    assert ("count" in sys.stderr.getvalue()) == visible


def test_errors_and_breaks_end_it(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(ZeroDivisionError):
        for unit in progress.tracked([1, 0], "divide"):
            1 // unit
    assert next(progress.tracked(iter([7]), "take")) == 7


def test_compress_and_allocate_tell_where_they_are(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    for options, words in ({"progress": True}, ("calibrate", "factorize", "singular values")), ({}, ()):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        rules = ck.allocate(model, 0.5, (x,), calibration=[(x,)], **options)
        ck.compress(model, rules, (x,), goal="size", calibration=[(x,)], **options)
        text = sys.stderr.getvalue()
        assert all(word in text for word in words) and (bool(words) or not text)
