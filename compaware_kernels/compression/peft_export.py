"""LoRA export: the fine-tuning update ``W - C`` as a PEFT adapter with a rank per layer."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .._utils.atomic_write import atomic_folder
from .._utils.dtypes import compute_dtype
from .._utils.tables import text_table
from ..folds import CONVS, to_matrix
from ..nn.discovery import require_matches, why_no_matrix
from ..nn.factorization import SVD
from ..nn.holders import why_read_or_overridden
from ..nn.module_surgery import short_name
from ..nn.unwrap import without_wrappers
from ..ranks import break_even
from .arguments import RankRule, rank_of, rule_of, rules_by_pattern
from .tensor_file import CheckpointError, require_values, same_state, storable

__all__ = ["LoraLayer", "LoraReport", "export_lora", "noise_floor"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # with which PEFT prefixes every name in the file
LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # containers that PEFT cannot wrap
NO_TARGETS = "dummy-target-modules"  # PEFT's placeholder for an adapter without low-rank layers


@dataclass(frozen=True)
class LoraLayer:
    """Adapter entry of one layer.

    ``params``: numbers stored; ``params_dense``: numbers of the dense update.  ``rank`` and ``error``, the relative
    error ``||W - C - B A||_F / ||W - C||_F``, are None if the parameter is stored in full (``note``: why).
    """

    name: str
    kind: str
    params: int
    params_dense: int
    rank: int | None = None
    full_rank: int | None = None
    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class LoraReport:
    """Report of :func:`export_lora`: totals and one entry per layer; a table (``str``) or JSON data (``to_dict``)."""

    layers: list[LoraLayer]
    params: int
    bytes: int  # of the adapter weights file

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            (r.name, r.kind, "" if r.rank is None else f"{r.rank}/{r.full_rank}", f"{r.params:,} of {r.params_dense:,}",
             "" if r.error is None else f"{r.error:.1e}", r.note)
            for r in self.layers
        ]  # fmt: skip
        rows.append(("total", "", "", f"{self.params:,}", "", f"{self.bytes:,} bytes"))
        return text_table(("layer", "kind", "rank", "parameters", "error", "note"), rows, right=(2, 3, 4))


@torch.no_grad()
def export_lora(
    model: nn.Module,
    base: nn.Module,
    path: str | os.PathLike,
    *,
    ranks: RankRule | Mapping[str, RankRule] | None = None,
    whole: Sequence[str] = (),
) -> LoraReport:
    """LoRA export: write the difference of a fine-tuned model to its base as a PEFT adapter with a rank per layer.

    ``peft.PeftModel.from_pretrained(base, path)`` loads it; ``merge_and_unload()`` then gives ``model``.

    ``W - C ~ B A,  B = U_r S_r^(1/2)  [out, r],  A = S_r^(1/2) V_r^T  [r, in]``  (truncated SVD, in fp64)

    Export right after a proximal step of ``ProximalStep(model, optimizer, nuclear=..., center=base)``: only then do the
    updates have the learned ranks. The next optimizer step makes them full rank; weight decay pulls to 0, not to C.

    Linear layers and convolutions (``paper`` fold: A has the kernel, B is 1 x 1) get an adapter of scaling 1 and their
    own rank, or none at rank 0. Changed biases are stored in full (PEFT's ``bias="all"``). All other changed modules
    are stored whole (``modules_to_save``): norms, embeddings, layers that PEFT cannot run or merge (grouped or dilated
    convolutions, for example), and layers whose factors would not be smaller. PEFT selects these modules by name
    suffix; another module whose name has the same suffix is stored whole, too, and the report says so.

    Args:
        model: the fine-tuned model.  base: the model before fine-tuning, of the same architecture.  Neither is changed.
            Wrappers (torch.compile, DistributedDataParallel, AveragedModel) are removed.
        path: the folder to write; an existing adapter is replaced. On Linux no crash leaves it without a complete one;
            a killed process leaves a hidden folder ``.compaware-...`` beside it. Elsewhere, one that is killed between
            two renames leaves the old adapter and the new one there.
        ranks: a rule of :mod:`compaware_kernels.ranks`, or any function from singular values ``[1, k]`` to a rank; or
            rules by layer name pattern, first match wins. Rules see the singular values of ``W - C``, with those below
            :func:`noise_floor` set to 0. Default, also for layers without a match: the number of nonzero ones.
        whole: name patterns of modules to store whole, such as a new head: the adapter then loads onto a base with any
            head.

    Raises:
        CheckpointError: a tensor on the meta device or of a lazy layer; in what changed, or in a module to store whole,
            state that is no tensor, or a tensor that safetensors does not store.
        ValueError: another architecture; NaN or Inf; a changed parameter that several modules share, or that belongs
            to the model itself or to a list (PEFT stores modules); names that are ambiguous to PEFT; a pattern that
            matches nothing; a rule that returns no rank.
        OSError: the folder cannot be written, or holds other files than an adapter. It is left unchanged.

    Source: Hu et al., LoRA, ICLR 2022. The format is that of PEFT 0.21 (https://github.com/huggingface/peft).
    """
    folder, model, base = _target(path), without_wrappers(model), without_wrappers(base)
    names = [name for name, _ in model.named_modules()]
    require_matches(whole, names, "whole")
    rules = rules_by_pattern(ranks, names)
    layers, biases, stored_whole = _partition(model, _changed(model, base), whole)
    found = {}
    for name in layers:
        rule = rule_of(rules, name) or _nonzero_rank
        found[name] = _factorized(name, model.get_submodule(name), base.get_submodule(name), rule)
    stored_whole |= {name: entry.note for name, (entry, *_) in found.items() if entry.note}
    stored_whole = _matched_by_suffix(stored_whole, model)
    entries, tensors = _contents(model, found, biases, stored_whole)
    size = _write(folder, _config(entries, list(stored_whole)), tensors)
    return LoraReport(entries, sum(entry.params for entry in entries), size)


def noise_floor(W: Tensor, largest: float) -> float:
    """Noise floor of an update ``W - C``: singular values up to it may be rounding error of W's dtype and of the SVT.

    ``max_i ||e_i:||_2 + max_j ||e_:j||_2 + 32 eps(compute dtype) ||W - C||_2,  e = eps |W| / (2 sqrt(3))``

    Rounding changes an entry by at most eps / 2 of its value, so e bounds the standard deviations of the errors; the
    spectral norm of a matrix of independent errors is about the largest row norm plus the largest column norm
    (measured: 0.14 to 0.7 of that, for fp32, bf16 and fp16, of pretrained, random and constant matrices).
    ``eps ||W - C||`` alone would be too low: the update is small compared with the weights it is the difference of.

    Args:
        W: the weight as a matrix ``[m, n]``, in the dtype it is stored in.  largest: ``||W - C||_2``.

    Source: Bandeira & van Handel, Ann. Probab. 44(4), 2016. SVT: see :func:`compaware_kernels.ranks.numerical_rank`.
    """
    e = torch.finfo(W.dtype).eps / (2 * math.sqrt(3)) * W.double()
    return float(e.norm(dim=1).max() + e.norm(dim=0).max()) + 32 * torch.finfo(compute_dtype(W.dtype)).eps * largest


def _changed(model: nn.Module, base: nn.Module) -> list[str]:
    """Names of the parameters and buffers of ``model`` that differ from those of ``base``."""
    ours, theirs = model.state_dict(), base.state_dict()
    for name in ours | theirs:
        shapes = [_shape(name, state[name]) if name in state else "none" for state in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"base: wanted the model's architecture: {name} is {shapes[0]} there; got {shapes[1]}")
    changed = [name for name, W in ours.items() if not _same(name, W, theirs[name])]
    for name in changed:
        if not storable(name, ours[name]).isfinite().all():
            raise ValueError(f"{name}: contains NaN or Inf")
    for each in (model, base):
        first: dict[int, str] = {}
        for name, p in each.named_parameters(remove_duplicate=False):
            owner = first.setdefault(id(p), name)
            if owner != name and name in changed:
                raise ValueError(f"{name}: is the same parameter as {owner}, and changed; PEFT would store two of it")
    return changed


def _shape(name: str, value: object) -> list[int] | str:
    """Shape of a state.  Raises CheckpointError for a tensor without values."""
    if not isinstance(value, Tensor):
        return "no tensor"
    require_values(name, value)
    return list(value.shape)


def _same(name: str, ours: object, theirs: object) -> bool:
    """Whether a state of the model is that of the base."""
    if isinstance(ours, Tensor):
        same = ours.layout == theirs.layout
        ours, theirs = (T if T.layout == torch.strided else T.to_dense() for T in (ours, theirs))
        return same and torch.equal(ours, theirs.to(ours))
    if same_state(name, ours, theirs):
        return True
    raise CheckpointError(f"{name}: wanted tensors to change, which PEFT stores; got a changed {type(ours).__name__}")


def _partition(
    model: nn.Module, changed: Sequence[str], whole: Sequence[str]
) -> tuple[list[str], list[str], dict[str, str]]:
    """Names of layers that get an adapter, of changed biases, and of modules to store whole (-> why)."""
    modules, biases, fixed = dict(model.named_modules()), [], why_read_or_overridden(model)
    stored_whole = {name: "asked for" for name in modules if name and any(fnmatchcase(name, p) for p in whole)}
    for key in changed:
        owner, parametrized, _ = key.partition(".parametrizations.")
        owner, _, leaf = (owner, "", "weight") if parametrized else key.rpartition(".")
        if not owner and leaf != "bias":
            raise ValueError(f"{key}: belongs to the model itself; PEFT stores only what belongs to a module in it")
        why = _why_whole(modules[owner], fixed)
        if leaf == "bias":
            biases.append(key)
        elif leaf != "weight" or why:
            stored_whole.setdefault(owner, f"its {leaf} changed; {why}".removesuffix("; "))
    adapted = [
        name
        for name, module in modules.items()
        if name and not _within(name, stored_whole) and not _why_whole(module, fixed)
    ]
    return adapted, biases, stored_whole


def _why_whole(module: nn.Module, fixed: Mapping[int, str]) -> str:
    """Why PEFT cannot adapt and merge the layer, so that it is stored whole; "" if it can."""
    if type(module) not in (nn.Linear, *CONVS):
        return f"a {short_name(type(module))} has no low-rank update"
    if reason := fixed.get(id(module)) or why_no_matrix(module.weight):
        return reason
    if isinstance(module, CONVS) and module.groups > 1:
        return "PEFT cannot merge grouped convolutions"
    if isinstance(module, CONVS) and (set(module.dilation) != {1} or module.padding_mode != "zeros"):
        return "PEFT's adapters have no dilation, and pad with zeros"
    if isinstance(module, nn.Conv3d) and module.kernel_size[:2] == (1, 1):
        return "PEFT cannot merge kernels of 1 x 1 x k"
    return ""


def _nonzero_rank(s: Tensor) -> int:
    """Default rank rule: the number of nonzero singular values."""
    return int((s > 0).sum())


def _factorized(name: str, module: nn.Module, base: nn.Module, rule: RankRule) -> tuple[LoraLayer, Tensor, Tensor]:
    """Report entry, ``A`` ``[r, in, *K]`` and ``B`` ``[out, r, *1]``; the entry has a note if they are not smaller."""
    W = module.weight
    M = to_matrix(W.double() - base.weight.to(W).double())  # [1, m, n]
    m, n = M.shape[-2:]
    if not M.any():
        return LoraLayer(name, type(module).__name__, 0, m * n, 0, min(m, n), 0.0), W, W
    svd = SVD.of(M)
    s = torch.where(svd.s > noise_floor(W.flatten(1), float(svd.s[0, 0])), svd.s, 0)
    rank = min(rank_of(name, rule, s), _nonzero_rank(s))
    B, A = (factor[0] for factor in svd.factors(rank, W.dtype))
    error = float((M[0] - B.double() @ A.double()).norm() / M.norm())
    limit = break_even(m, n)
    note = "" if rank <= limit else f"rank {rank} of a {m} x {n} update is not smaller (break-even: {limit})"
    entry = LoraLayer(name, type(module).__name__, rank * (m + n), m * n, rank, min(m, n), error, note)
    ones = [1] * (W.ndim - 2)
    return entry, A.reshape(rank, *W.shape[1:]), B.reshape(m, rank, *ones)


def _matched_by_suffix(stored_whole: Mapping[str, str], model: nn.Module) -> dict[str, str]:
    """Modules to store whole as PEFT selects them: by name suffix, so others may match; nested ones are dropped."""
    modules = dict(model.named_modules())
    found = {
        name: stored_whole.get(name, f"its name ends in {ending!r}, and PEFT goes by that")
        for name in modules
        for ending in [next((ending for ending in stored_whole if name.endswith(ending)), None)]
        if ending is not None
    }
    outer = {name: why for name, why in found.items() if not _within(name.rpartition(".")[0], found)}
    for name, module in modules.items():
        ending = next((ending for ending in outer if name.endswith(ending)), None)
        if ending and name not in outer:
            raise ValueError(f"{name}: PEFT would store it twice, whole and for its ending {ending!r}; rename one")
        if name in outer and isinstance(module, LISTS):
            raise ValueError(f"{name}: PEFT cannot store a {type(module).__name__}")
    return outer


def _within(name: str, modules: Iterable[str]) -> bool:
    """Whether ``name`` is one of the modules, or inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _contents(
    model: nn.Module,
    found: Mapping[str, tuple[LoraLayer, Tensor, Tensor]],
    biases: Sequence[str],
    stored_whole: Mapping[str, str],
) -> tuple[list[LoraLayer], dict[str, Tensor]]:
    """Report entries of the adapter, and its tensors by their names in the file."""
    entries, tensors, state = [], {}, model.state_dict()
    for name, (entry, A, B) in found.items():
        if _within(name, stored_whole):
            continue
        entries.append(entry)
        if entry.rank:
            tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
            alike = next((other for other in stored_whole if re.match(rf"(.*\.)?{other}(\..*)?$", name)), None)
            if alike:  # PEFT uses the name as a regular expression: a dot matches any character
                raise ValueError(f"{name}: PEFT would not adapt it, taking it for {alike}, stored whole; rename one")
    for name in biases:
        if not _within(name, stored_whole):
            owner = name.rpartition(".")[0]
            tensors[f"{owner}.base_layer.bias" if f"{owner}.lora_A.weight" in tensors else name] = state[name]
            entries.append(LoraLayer(name, "bias", state[name].numel(), state[name].numel()))
    for name, why in stored_whole.items():
        inside = {key: _tensor(key, T) for key, T in state.items() if key.startswith(f"{name}.")}
        size = sum(T.numel() for T in inside.values())
        entries.append(LoraLayer(name, type(model.get_submodule(name)).__name__, size, size, note=why))
        tensors |= inside
    return entries, {PREFIX + key: T for key, T in tensors.items()}


def _tensor(name: str, value: object) -> Tensor:
    """State of a module that is stored whole.  Raises CheckpointError if safetensors does not store it."""
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{name}: wanted tensors only, in a module to store whole; got a {type(value).__name__}")
    return storable(name, value)


def _config(entries: Sequence[LoraLayer], stored_whole: list[str]) -> dict:
    """PEFT's ``adapter_config.json``; ranks are keyed by anchored patterns, as PEFT matches plain names by suffix."""
    ranks = {entry.name: entry.rank for entry in entries if entry.rank}
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": max(ranks.values(), default=1),
        "lora_alpha": max(ranks.values(), default=1),
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": "|".join(map(re.escape, ranks)) or NO_TARGETS,
        "modules_to_save": stored_whole or None,
        "bias": "all" if any(entry.kind == "bias" for entry in entries) else "none",
        "lora_dropout": 0.0,
    }


def _target(path: str | os.PathLike) -> Path:
    """The resolved output folder.  Raises OSError unless it is missing, empty or an adapter."""
    folder = Path(path).resolve()
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"{path}: wanted a folder in one that exists; {folder.parent} does not")
    if folder.exists() and (not folder.is_dir() or {file.name for file in folder.iterdir()} - {CONFIG, WEIGHTS}):
        raise FileExistsError(f"{path}: wanted an adapter to replace, or nothing; there is something else")
    return folder


def _write(folder: Path, config: dict, tensors: dict[str, Tensor]) -> int:
    """Write the folder, atomically; returns the bytes of the weights file."""
    tensors = {key: T.detach().cpu().clone(memory_format=torch.contiguous_format) for key, T in tensors.items()}
    try:
        with atomic_folder(folder) as new:
            (new / CONFIG).write_text(json.dumps(config, indent=2))
            save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{folder}: cannot be written: {error}") from error
    return (folder / WEIGHTS).stat().st_size
