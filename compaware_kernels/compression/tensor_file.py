"""Files of model states: safetensors, with a checksum, every shared tensor once, and other state as JSON; no pickle.

The header's metadata holds ``format``, ``layers`` (JSON, see :mod:`.checkpoint`), ``crc32``, ``state`` (JSON, what is
no tensor), and for each tensor that is stored under another name that name. Equal models give equal bytes.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["FORMAT", "CheckpointError", "TensorFile", "one_line", "read", "require_values", "same_state", "storable",
           "write"]  # fmt: skip

FORMAT = "compaware_kernels/1"
KEYS = ("format", "layers", "crc32", "state")  # of the metadata; all others are names of tensors
DTYPES = {  # of safetensors
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
}  # fmt: skip
DTYPE_OF = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, not in this format, or of another architecture; or a model without one."""


@dataclass(frozen=True)
class TensorFile:
    """Contents of a file: structure of the layers, state by name, and names whose values another one holds."""

    layers: dict[str, dict]
    state: dict[str, object]
    shared: dict[str, str]


def write(path: Path, state: Mapping[str, object], layers: Mapping[str, dict], verify: bool) -> None:
    """Write a state dict, and the structure of the layers it belongs to.

    Raises:
        CheckpointError: names a state that has no values, cannot be stored, or, with ``verify``, holds NaN.
        SafetensorError: the file cannot be written.
    """
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    others: dict[str, object] = {}
    for name in [name for name in state if name not in tensors]:
        try:
            others[name] = _encoded(state[name], name, tensors)
        except RecursionError as error:
            raise CheckpointError(f"{name}: wanted state of finite depth; got more") from error
    tensors = {name: storable(name, T) for name, T in tensors.items()}
    shared = _shared(tensors)
    stored = _apart({name: T for name, T in tensors.items() if name not in shared})
    if verify:
        _require_no_nan(stored, "")
    metadata = {"format": FORMAT, "layers": json.dumps(layers)} | shared
    metadata |= {"state": json.dumps(others, sort_keys=True)} if others else {}
    save_file(stored, path, metadata | {"crc32": _checksum(stored, metadata)})
    _sort_metadata(path)


def read(path: str | os.PathLike, verify: bool) -> TensorFile:
    """Read a file of :func:`write`; its tensors are mapped from it, not yet copied.

    Raises:
        CheckpointError: the file is missing, damaged, or in another format; with ``verify`` also: its checksum is not
            that of its contents, or a tensor holds NaN. Files of earlier versions have no checksum.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            found = metadata.get("format", "none")
            raise CheckpointError(f"{path}: not a compressed model ({FORMAT}); format: {found}")
        tensors = load_file(path)
    except (SafetensorError, OSError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or damaged: {one_line(error)}") from error
    shared = {name: other for name, other in metadata.items() if name not in KEYS}
    crc = metadata.pop("crc32", None)
    if wrong := [name for name, other in shared.items() if other not in tensors or name in tensors]:
        raise CheckpointError(f"{path}: damaged: its header has {wrong[0]!r}, which is no tensor")
    if verify and crc not in (None, _checksum(tensors, metadata)):
        raise CheckpointError(f"{path}: damaged: wanted the checksum {crc}; its contents have another")
    if verify:
        _require_no_nan(tensors, f"{path}: ")
    layers = _json(f"{path}: its description of the layers is damaged", lambda: dict(json.loads(metadata["layers"])))
    state: dict[str, object] = dict(tensors)
    others = _json(f"{path}: its state is damaged", lambda: {
        name: _decoded(value, state) for name, value in dict(json.loads(metadata.get("state", "{}"))).items()
    })  # fmt: skip
    return TensorFile(layers, state | others, shared)


def _json(message: str, parse: Callable[[], dict]) -> dict:
    try:
        return parse()
    except (KeyError, TypeError, ValueError, RecursionError, AttributeError) as error:
        raise CheckpointError(f"{message}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """Type and text of an error, without the stack of C++ that torch appends."""
    text = " ".join(str(error).partition("Exception raised from")[0].split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# --- what can be stored ---------------------------------------------------------------------------------------------


def storable(name: str, T: Tensor) -> Tensor:
    """The tensor, detached.  Raises CheckpointError if it has no values, or if safetensors cannot store them."""
    require_values(name, T)
    wrong = ""
    if type(T.detach()) is not Tensor:
        wrong = f"a {type(T).__name__}: gather or convert it first"
    elif T.layout != torch.strided:
        wrong = f"a {str(T.layout).removeprefix('torch.')} one"
    elif T.dtype not in DTYPES:
        wrong = f"{T.dtype}: save the model before it is quantized or converted"
    if wrong:
        raise CheckpointError(f"{name}: wanted a dense tensor of a dtype of safetensors; got {wrong}")
    return T.detach()


def require_values(name: str, T: Tensor) -> None:
    """Raise CheckpointError for a tensor of a lazy layer or on the meta device."""
    lazy = nn.parameter.is_lazy(T)
    if lazy or T.is_meta:
        what = (
            "of a lazy layer: run the model once" if lazy else "on the meta device: built without memory, or offloaded"
        )
        raise CheckpointError(f"{name}: wanted a tensor with values; got one {what}")


def same_state(name: str, a: object, b: object) -> bool:
    """Whether two states that are no tensors are equal.  Raises CheckpointError if they are of unknown kinds."""
    tensors: tuple[dict, dict] = {}, {}
    texts = [_encoded(value, name, inside) for value, inside in zip((a, b), tensors, strict=True)]
    return texts[0] == texts[1] and all(torch.equal(T, tensors[1][key]) for key, T in tensors[0].items())


def _require_no_nan(tensors: Mapping[str, Tensor], source: str) -> None:
    for name, T in tensors.items():
        if (T.is_floating_point() or T.is_complex()) and (T if T.element_size() > 1 else T.half()).isnan().any():
            raise CheckpointError(f"{source}{name}: wanted numbers; got NaN (verify=False lets it pass)")


def _encoded(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    """JSON form of state that is no tensor; the tensors within it go to ``tensors``, under names of their own."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        inside = f"{name}[{len(tensors)}]"
        tensors[inside] = value.detach()
        return {"tensor": inside}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encoded(each, name, tensors) for each in value]}
    if isinstance(value, dict):
        return {"dict": [[_encoded(each, name, tensors) for each in pair] for pair in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    raise CheckpointError(f"{name}: wanted state of tensors, numbers, text, lists, dicts; got a {type(value).__name__}")


def _decoded(value: object, tensors: dict[str, object]) -> object:
    """State from its JSON form; its tensors are taken out of ``tensors``."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors.pop(content)
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "dtype":
        return DTYPE_OF[content]
    if kind == "dict":
        return {_decoded(key, tensors): _decoded(each, tensors) for key, each in content}
    return {"list": list, "tuple": tuple}[kind](_decoded(each, tensors) for each in content)


# --- memory, checksum, order ----------------------------------------------------------------------------------------


def _storage(T: Tensor) -> tuple:
    return T.device, T.untyped_storage().data_ptr()


def _shared(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are another one of the same memory -> its name, the first in order."""
    first: dict[tuple, str] = {}
    views = {name: (*_storage(T), T.storage_offset(), T.shape, T.stride(), T.dtype, T.is_conj(), T.is_neg())
             for name, T in sorted(tensors.items()) if T.numel() and name not in KEYS}  # fmt: skip
    owners = {name: first.setdefault(view, name) for name, view in views.items()}
    return {name: owner for name, owner in owners.items() if owner != name}


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, of which no two share memory: safetensors refuses views of one storage."""
    apart, seen = {}, set()
    for name, T in tensors.items():
        T = T.resolve_conj().resolve_neg().cpu().contiguous()
        apart[name] = T.clone() if _storage(T) in seen else T
        seen.add(_storage(T))
    return apart


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 of names, dtypes, shapes and data of all tensors, and of the metadata."""
    crc = zlib.crc32(json.dumps(sorted(metadata.items())).encode())
    for name, T in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {T.dtype} {list(T.shape)}".encode(), crc)
        crc = zlib.crc32(T.flatten().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in the header, which safetensors writes in an order drawn by chance."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # else its text has an escape of another kind; the file is right as it is
            file.seek(8)
            file.write(text.ljust(size))
