"""Annotations of the public names: complete, and all in typing_sample.py, which mypy checks in make lint."""

import inspect
import re
from pathlib import Path

import pytest

import compaware_kernels as ck
from compaware_kernels.integrations import lightning, transformers

PUBLIC = {name: getattr(ck, name) for name in ck.__all__}
PUBLIC |= {module.__name__: module.CompressionAware for module in (lightning, transformers)}


def functions(name, value):
    """The functions of this project that a public name stands for."""
    if inspect.isfunction(value):
        return {name: value}
    members = inspect.getmembers(value, inspect.isfunction)
    own = {f"{name}.{key}": f for key, f in members if f.__module__.startswith("compaware_kernels")}
    return {key: f for key, f in own.items() if not f.__name__.startswith("_") or f.__name__ == "__init__"}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_and_result_is_annotated(name):
    for key, function in functions(name, PUBLIC[name]).items():
        signature = inspect.signature(function)
        bare = [
            p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")
        ]
        assert bare == [], key
        assert function.__name__ == "__init__" or signature.return_annotation is not signature.empty, key


def test_sample_uses_every_public_name():
    sample = (Path(__file__).parent / "typing_sample.py").read_text()
    assert [name for name in ck.__all__ if not re.search(rf"\bck\.{name}\b", sample)] == []
