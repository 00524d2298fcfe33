"""Cases of damaged and hostile files, read by ck.load and by the reader of ``compaware compress``.

    python -m tests.fuzz.files 10000 --seed 0

Whatever the file: the documented exception in one line, in little memory, or a model with the values of the file; and
with those that were saved, if the file was damaged after that.
"""

from __future__ import annotations

import copy
import io
import json
import random
import resource
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import typer
from safetensors.torch import load as parse
from safetensors.torch import save as serialized
from torch import nn

import compaware_kernels as ck
from compaware_kernels.compression import tensor_file
from compaware_kernels.compression.state_dicts import read_into
from tests.fuzz import driver

MEMORY = 1 << 28  # bytes a case may take beyond what the process has
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "C64", "F8_E4M3", "F4", "", "f32", 3)
SIZES = (0, 1, -1, 2, 7, 10**5, 10**8, 10**12, 2**31, 2**63, 2**64, 10**30, 1.5, "3", None, [], True)


class Extra(nn.Linear):
    """Layer with state that is no tensor."""

    extra: object = None

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def _convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 12), nn.ReLU(),
                         nn.Linear(12, 12))  # fmt: skip


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), Extra(8, 8))
    model[1].weight = model[0].weight
    model[2].extra = {"scale": 1.5, "seen": [torch.ones(2), (1, "a")]}
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (_convolutions, (1, 2, 4, 4)),
    "half": (lambda: _convolutions().bfloat16(), ()),
    "tied": (_tied, ()),
}


@cache
def _saved(name: str) -> tuple[nn.Module, bytes]:
    """A model, compressed if it has an input, and its file."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    if shape:
        model, _ = ck.compress(model, ck.ranks.fixed(2), (torch.zeros(shape),), goal="size")
    with tempfile.TemporaryDirectory() as folder:
        ck.save(model, path := Path(folder, "m"))
        return model, path.read_bytes()


def _parts(raw: bytes) -> tuple[dict, bytes]:
    """Header and data."""
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def _joined(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# --- damage: something happens to a file ----------------------------------------------------------------------------


def _flipped(raw: bytes, rng: random.Random, end: int | None = None) -> bytes:
    out = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        out[rng.randrange(end or len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _overwritten(raw: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(raw)), rng.randrange(1, 200)
    new = rng.choice([bytes(size), rng.randbytes(size), raw[: rng.randrange(1, size + 1)], b"\xff" * size, b"[" * size])
    return raw[:at] + new + raw[at + len(new) * rng.choice([0, 1]) :]


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bits": _flipped,
    "bits of the header": lambda raw, rng: _flipped(raw, rng, len(raw) - len(_parts(raw)[1])),
    "truncated": lambda raw, rng: raw[: rng.choice([rng.randrange(len(raw)), rng.randrange(20), len(raw) - 1])],
    "overwritten": _overwritten,
    "appended": lambda raw, rng: raw + rng.randbytes(rng.randrange(1, 50)),
    "cut out": lambda raw, rng: raw[: (at := rng.randrange(len(raw)))] + raw[at + rng.randrange(1, 99) :],
    "another's data": lambda raw, rng: _joined(_parts(raw)[0], _parts(_saved(rng.choice(list(MODELS)))[1])[1]),
    "another's header": lambda raw, rng: _joined(_parts(_saved(rng.choice(list(MODELS)))[1])[0], _parts(raw)[1]),
    "names exchanged": lambda raw, rng: _exchanged(raw, rng),
}


def _exchanged(raw: bytes, rng: random.Random) -> bytes:
    header, data = _parts(raw)
    a, b = rng.sample([name for name in header if name != "__metadata__"], 2)
    header[a], header[b] = header[b], header[a]
    return _joined(header, data)


# --- hostile: somebody made it so -----------------------------------------------------------------------------------


def _nested(rng: random.Random) -> str:
    depth = rng.choice([10, 900, 1000, 5000, 100_000])
    return rng.choice(["[", '{"0":', '[{"a":', '{"list": [']) * depth + rng.choice(["", "1" + "]" * depth])


def _anything(rng: random.Random) -> object:
    return rng.choice([*SIZES, "", "0", "paper", "LowRankLinear", {}, {"a": 1}, [1, [2]], 1e308, "\0", "é" * 50])


def _layers(layers: dict, rng: random.Random) -> object:
    """Description of layers with a few wrong entries."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        name = rng.choice([*layers, "", "0", "9", "0.first", "nope", "__class__", "3.weight"])
        entry = layers.setdefault(name, {"class": "Linear", "inputs": 8, "outputs": 8, "bias": True})
        key = rng.choice(["class", "inputs", "outputs", "bias", "rank", "fold", "more"])
        if not isinstance(entry, dict) or rng.random() < 0.1:
            layers[name] = _anything(rng)
        elif rng.random() < 0.15:
            entry.pop(key, None)
        else:
            sizes = rng.random() < 0.7 and key in ("inputs", "outputs", "rank")
            entry[key] = rng.choice(SIZES) if sizes else _anything(rng)
    return rng.choice([layers, layers, layers, layers, [*layers.items()], _anything(rng)])


def _state(rng: random.Random) -> object:
    """Description of state that is no tensor."""
    kind = rng.choice(["tensor", "list", "tuple", "dict", "bytes", "dtype", "code", "quantized"])
    inner = rng.choice([_anything(rng), [1, 2], [[1, 2]], [{"list": []}], "2.weight", "torch.float32", "torch.nn"])
    value = rng.choice([{kind: inner}, {kind: inner, "x": 1}, inner])
    return {rng.choice(["2._extra_state", "0.weight", "new", ""]): value}


def _tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    """Wrong tensors."""
    name = rng.choice(list(tensors))
    T, what = tensors[name], rng.choice(["dtype", "shape", "NaN", "Inf", "absent", "more", "renamed", "empty", "int"])
    if what == "dtype":
        tensors[name] = T.to(rng.choice([torch.int8, torch.float16, torch.float64, torch.bool, torch.complex64,
                                         torch.float8_e4m3fn]))  # fmt: skip
    elif what == "shape":
        tensors[name] = rng.choice([T.flatten(), T[None], T.flatten()[:1], T.repeat(*[2] * max(T.ndim, 1))])
    elif what in ("NaN", "Inf") and T.is_floating_point():
        tensors[name] = torch.full_like(T, torch.nan if what == "NaN" else torch.inf)
    elif what == "more":
        tensors[rng.choice(["new", "0.weight_g", "0.first.first.weight", name + "."])] = torch.ones(2)
    elif what == "empty":
        tensors[name] = T.new_empty(0)
    elif what == "int":
        tensors[name] = torch.zeros(T.shape, dtype=torch.int64)
    else:
        del tensors[name]
        if what == "renamed":
            tensors[f"module.{name}"] = T


def _hostile(raw: bytes, rng: random.Random) -> bytes:
    """A file of this format, well-formed or nearly, and often with the right checksum, that says something wrong."""
    tensors = dict(parse(raw))
    metadata = _parts(raw)[0]["__metadata__"]
    metadata.pop("crc32")
    what = rng.choice(["layers", "layers", "layers", "state", "tensors", "tensors", "nested", "metadata"])
    if what == "layers":
        metadata["layers"] = json.dumps(_layers(json.loads(metadata["layers"]), rng))
    elif what == "state":
        metadata["state"] = json.dumps(_state(rng))
    elif what == "tensors":
        _tensors(tensors, rng)
    elif what == "nested":
        metadata[rng.choice(["layers", "state"])] = _nested(rng)
    else:
        metadata[rng.choice(["format", "0.weight", "0.bias", "new", "crc32", "layers"])] = str(_anything(rng))
    if "crc32" not in metadata and rng.random() < 0.6:
        metadata["crc32"] = tensor_file._checksum(tensors, metadata)
    return serialized(tensors, metadata)


def _header(raw: bytes, rng: random.Random) -> bytes:
    """A header of safetensors that claims wrong dtypes, shapes and offsets, or is no header at all."""
    header, data = _parts(raw)
    if rng.random() < 0.15:
        text = rng.choice([_nested(rng).encode(), b"", b"{}", b"[]", b"null", rng.randbytes(99), b'{"a":{}}'])
        return _joined(text, data)
    if rng.random() < 0.1:
        return struct.pack("<Q", rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(raw), len(raw) - 8])) + raw[8:]
    name = rng.choice(list(header))
    if name == "__metadata__" or rng.random() < 0.1:
        header[name] = _anything(rng)
        return _joined(header, data)
    key = rng.choice(["dtype", "shape", "data_offsets"])
    numbers = [rng.choice([*SIZES[:12], *header[name]["data_offsets"]]) for _ in range(rng.randrange(4))]
    header[name][key] = rng.choice(DTYPES) if key == "dtype" else rng.choice([numbers, numbers, _anything(rng)])
    if rng.random() < 0.5:
        header["__metadata__"].pop("crc32")
    return _joined(header, data)


def _foreign(raw: bytes, rng: random.Random) -> bytes:
    tensors = {rng.choice("abcdef"): torch.ones(rng.randrange(5), rng.randrange(5)) for _ in range(3)}
    other = {"a": "b", "format": rng.choice(["pt", "compaware_kernels/1", "compaware_kernels/2"])}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x", "y")
    own = dict(parse(raw))
    files = [serialized(tensors), serialized(tensors, other), serialized({}), serialized(own), _pickled(own, rng)]
    return rng.choice([*files, b"", rng.randbytes(rng.randrange(300)), b"x" * 8, buffer.getvalue()])


HOSTILE = {"hostile": _hostile, "header": _header, "foreign": _foreign}


# --- state dicts of torch.save --------------------------------------------------------------------------------------


class _Code:
    """Object whose unpickling runs code."""

    def __reduce__(self):
        return (_violate, ())


ran: list[str] = []


def _violate() -> None:
    ran.append("a file ran code")


def _pickled(content: object, rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=rng.random() < 0.5)
    return buffer.getvalue()


def _state_dict(rng: random.Random, name: str) -> bytes:
    """A training checkpoint: nested, prefixed, damaged or hostile."""
    state = dict(MODELS[name][0]().state_dict())
    if rng.random() < 0.4:
        state = {key: T for key, T in state.items() if isinstance(T, torch.Tensor)}
        _tensors(state, rng)
    if rng.random() < 0.3:
        state[rng.choice(list(state))] = rng.choice([_anything(rng), torch.eye(3).to_sparse(), torch.ones(2)])
    prefix = rng.choice(["", "", "module.", "_orig_mod.", "module._orig_mod.", "net."])
    content: object = {prefix + key: T for key, T in state.items()}
    for _ in range(rng.choice([0, 0, 1, 1, 2, 30])):
        content = rng.choice([{"state_dict": content}, {"model": content, "epoch": 3}, [content], {0: content}])
    if rng.random() < 0.05:
        content = {"state_dict": content, "more": _Code()}
    raw = _pickled(content, rng)
    if rng.random() < 0.5:
        damage = rng.choice([_flipped, _overwritten, DAMAGE["truncated"], DAMAGE["cut out"], DAMAGE["appended"]])
        raw = damage(raw, rng) if rng.random() < 0.6 else damage(raw[:2000], rng) + raw[2000:]
    return raw


# --- what must hold -------------------------------------------------------------------------------------------------


@contextmanager
def _bounded() -> Iterator[None]:
    """Context with little memory left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _differences(got: dict, wanted: dict) -> list[str]:
    """Names of states that are not equal."""
    wrong = [f"{name} is there once only" for name in got.keys() ^ wanted.keys()]
    for name in got.keys() & wanted.keys():
        a, b = got[name], wanted[name]
        tensors = isinstance(a, torch.Tensor), isinstance(b, torch.Tensor)
        if all(tensors) and not (a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)):
            wrong.append(f"{name} has another value")
        elif not any(tensors) and repr(a) != repr(b):
            wrong.append(f"{name} is {a!r:.50}, wanted {b!r:.50}")
        elif any(tensors) and not all(tensors):
            wrong.append(f"{name} is a tensor once only")
    return wrong


def _loaded(name: str, raw: bytes, damaged: bool) -> Iterator[str]:
    """Violations of ck.load."""
    model, before = _saved(name)[0], copy.deepcopy(fresh := MODELS[name][0]())
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder, "m.safetensors")).write_bytes(raw)
        try:
            with _bounded():
                got = ck.load(path, fresh)
        except ck.CheckpointError as error:
            if "\n" in str(error) or len(str(error)) > 2000:
                yield f"an error of {len(str(error))} characters: {error!s:.80}"
            if "alloc" in str(error):
                yield f"too much memory: {error}"
            return
        finally:
            yield from _differences(fresh.state_dict(), before.state_dict())
        if damaged:
            yield from _differences(got.state_dict(), model.state_dict())
            return
        inside = {key: T for key, T in parse(raw).items() if key in got.state_dict()}
        state = {key: T for key, T in got.state_dict().items() if key in inside}
        yield from _differences(state, inside)
        if any(isinstance(T, torch.Tensor) and T.isnan().any() for T in got.state_dict().values()):
            yield "NaN"


def _read(name: str, raw: bytes, suffix: str) -> Iterator[str]:
    """Violations of the command line's reader."""
    model = MODELS[name][0]()
    before = copy.deepcopy(model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder, f"w{suffix}")).write_bytes(raw)
        try:
            with _bounded():
                read_into(model, path)
        except ValueError as error:
            if len(str(error)) > 3000:
                yield f"an error of {len(str(error))} characters: {error!s:.80}"
            if "set_extra" not in str(error):
                yield from _differences(model.state_dict(), before)
            return
        content = parse(raw) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    values = [T for T in _values(content) if isinstance(T, torch.Tensor)]
    for key, T in model.state_dict().items():
        same = (T.shape == V.shape and torch.equal(T, V.to(T.dtype)) for V in values)
        if isinstance(T, torch.Tensor) and not any(same):
            yield f"{key} has a value that is not in the file"


def _values(content: object) -> Iterator[object]:
    for inner in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield inner
        yield from _values(inner)


def check(seed: int) -> tuple[str, list[str]]:
    """The case of this seed: its name, and what does not hold."""
    rng = random.Random(seed)
    name, reader = rng.choice(list(MODELS)), rng.choice(["ck.load", "ck.load", "ck.load", "compress"])
    if reader == "compress" and rng.random() < 0.7:
        kind, raw, suffix = "state dict", _state_dict(rng, name), ".pt"
    else:
        kind = rng.choice([*DAMAGE, *HOSTILE, *["hostile"] * 6])
        suffix, raw = ".safetensors", {**DAMAGE, **HOSTILE}[kind](_saved(name)[1], rng)
    about = f"{reader} {kind}, {name}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            violations = [*(_loaded(name, raw, kind in DAMAGE) if reader == "ck.load" else _read(name, raw, suffix))]
    except Exception as error:
        violations = [f"{type(error).__name__}: {error!s:.150}"]
    violations += ran
    ran.clear()
    return about, violations


def main(cases: int, seed: int = 0) -> None:
    """Check so many seeds."""
    driver.hunt("tests.fuzz.files", cases, seed)


if __name__ == "__main__":
    typer.run(main)
