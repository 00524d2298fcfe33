"""What fine-tuning has changed -> a LoRA adapter with a rank per layer, in the format of PEFT."""

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
from ..nn.discovery import require_matches
from ..nn.factorization import SVD
from ..nn.registry import read_by_parent
from ..nn.unwrap import without_wrappers
from ..ranks import break_even
from .arguments import RankRule, rank_of, rule_of, rules_by_pattern

__all__ = ["LoraLayer", "LoraReport", "export_lora", "noise_floor"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's own, of every name in the file
LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # which PEFT cannot wrap
NO_TARGETS = "dummy-target-modules"  # PEFT's word for an adapter without low-rank layers


@dataclass(frozen=True)
class LoraLayer:
    """What the adapter stores of one layer.

    ``params``: numbers stored; ``params_dense``: those it would take without factors.  ``rank`` and ``error``, the
    relative error ``||W - C - B A||_F / ||W - C||_F``, are None where something is stored as it is (``note``: why).
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
    """What :func:`export_lora` wrote.  ``str(report)`` is a table; ``report.to_dict()`` is plain data for JSON."""

    layers: list[LoraLayer]
    params: int
    bytes: int  # of the weights' file

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
    """Write what fine-tuning has added to ``base`` as an adapter: ``peft.PeftModel.from_pretrained(base, path)`` loads
    it, and ``merge_and_unload()`` gives the model.

    ``W - C ~ B A,  B = U_r S_r^(1/2)  [out, r],  A = S_r^(1/2) V_r^T  [r, in]``  (truncated SVD, in fp64)

    Export right after a proximal step of ``ProximalStep(model, optimizer, nuclear=..., center=base)``: the ranks are
    those it learned. The optimizer's next step makes them full again; weight decay pulls to 0, not to C.

    Linear layers and convolutions (``paper`` fold: A has the kernel, B is 1 x 1) get an adapter of scaling 1 and of a
    rank of their own, or none at rank 0. Biases that changed are stored as they are (PEFT's ``bias="all"``). What else
    changed is stored whole (``modules_to_save``): norms, embeddings, layers that PEFT could not run or merge (grouped
    or dilated convolutions, for example), and those whose factors would not be smaller. PEFT finds these modules by
    the endings of their names; any other whose name ends so is stored whole, too, and the report says so.

    Args:
        model: the fine-tuned model.  base: what it was fine-tuned from, of the same architecture.  Neither is changed.
            What torch.compile, DistributedDataParallel, AveragedModel and the like wrapped around is looked through.
        path: the folder to write; an adapter that is there is replaced whole.
        ranks: a rule of :mod:`compaware_kernels.ranks`, or any function from singular values ``[1, k]`` to a rank; or
            rules by layer name pattern, first match wins. It sees the singular values of ``W - C``, with 0 for those
            within :func:`noise_floor`. Default, also without a match: all others.
        whole: name patterns of modules to store whole, such as a new head: the adapter then fits any base, whatever
            head that has.

    Raises:
        ValueError: another architecture; NaN or Inf; a changed parameter that several modules share, or that belongs
            to the model itself or to a list (PEFT stores modules); names that PEFT would confuse; a pattern that
            matches nothing; a rule that returns no rank.
        OSError: the folder cannot be written, or holds anything else than an adapter. It is as it was.

    Source: Hu et al., LoRA, ICLR 2022. The format is that of PEFT 0.21 (https://github.com/huggingface/peft).
    """
    folder, model, base = _target(path), without_wrappers(model), without_wrappers(base)
    names = [name for name, _ in model.named_modules()]
    require_matches(whole, names, "whole")
    rules = rules_by_pattern(ranks, names)
    layers, biases, wholly = _sorted(model, _changed(model, base), whole)
    found = {}
    for name in layers:
        rule = rule_of(rules, name) or _all_that_count
        found[name] = _factorized(name, model.get_submodule(name), base.get_submodule(name), rule)
    wholly |= {name: entry.note for name, (entry, *_) in found.items() if entry.note}
    wholly = _as_peft_finds(wholly, model)
    entries, tensors = _contents(model, found, biases, wholly)
    size = _write(folder, _config(entries, list(wholly)), tensors)
    return LoraReport(entries, sum(entry.params for entry in entries), size)


def noise_floor(W: Tensor, largest: float) -> float:
    """Singular values of an update ``W - C`` up to here may be rounding: of W to its dtype, and of the SVT behind it.

    ``max_i ||e_i:||_2 + max_j ||e_:j||_2 + 32 eps(compute dtype) ||W - C||_2,  e = eps |W| / (2 sqrt(3))``

    Storing W rounds each entry by at most eps / 2 of itself, so e bounds the deviations of the errors; the norm of a
    matrix of independent ones is about the sum of the longest row and the longest column (measured: 0.14 to 0.7 of it,
    for fp32, bf16 and fp16, of pretrained, random and constant matrices). ``eps ||W - C||`` alone would be too low: an
    update is small beside the weights whose difference it is.

    Args:
        W: the weight as a matrix ``[m, n]``, in the dtype it is stored in.  largest: ``||W - C||_2``.

    Source: Bandeira & van Handel, Ann. Probab. 44(4), 2016. SVT: see :func:`compaware_kernels.ranks.numerical_rank`.
    """
    e = torch.finfo(W.dtype).eps / (2 * math.sqrt(3)) * W.double()
    return float(e.norm(dim=1).max() + e.norm(dim=0).max()) + 32 * torch.finfo(compute_dtype(W.dtype)).eps * largest


def _changed(model: nn.Module, base: nn.Module) -> list[str]:
    """Names of the parameters and buffers of ``model`` that are not as in ``base``."""
    ours, theirs = model.state_dict(), base.state_dict()
    for name in ours | theirs:
        shapes = [list(state[name].shape) if name in state else "none" for state in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"base: wanted the model's architecture: {name} is {shapes[0]} there; got {shapes[1]}")
    changed = [name for name, W in ours.items() if not torch.equal(W, theirs[name].to(W))]
    for name in changed:
        if not ours[name].isfinite().all():
            raise ValueError(f"{name}: contains NaN or Inf")
    for each in (model, base):
        first: dict[int, str] = {}
        for name, p in each.named_parameters(remove_duplicate=False):
            owner = first.setdefault(id(p), name)
            if owner != name and name in changed:
                raise ValueError(f"{name}: is the same parameter as {owner}, and changed; PEFT would store two of it")
    return changed


def _sorted(
    model: nn.Module, changed: Sequence[str], whole: Sequence[str]
) -> tuple[list[str], list[str], dict[str, str]]:
    """The layers that can have an adapter, the biases, and module -> why of what is to be stored whole."""
    modules, biases = dict(model.named_modules()), []
    wholly = {name: "asked for" for name in modules if name and any(fnmatchcase(name, p) for p in whole)}
    for key in changed:
        owner, parametrized, _ = key.partition(".parametrizations.")
        owner, _, leaf = (owner, "", "weight") if parametrized else key.rpartition(".")
        if not owner and leaf != "bias":
            raise ValueError(f"{key}: belongs to the model itself; PEFT stores only what belongs to a module in it")
        why = _why_whole(modules, owner)
        if leaf == "bias":
            biases.append(key)
        elif leaf != "weight" or why:
            wholly.setdefault(owner, f"its {leaf} changed; {why}".removesuffix("; "))
    adapted = [name for name in modules if name and not _within(name, wholly) and not _why_whole(modules, name)]
    return adapted, biases, wholly


def _why_whole(modules: Mapping[str, nn.Module], name: str) -> str:
    """Why PEFT could not adapt the layer and merge that again, or nothing."""
    module, parent = modules[name], modules[name.rpartition(".")[0]]
    if type(module) not in (nn.Linear, *CONVS):
        return f"a {type(module).__name__} has no low-rank update"
    if reason := read_by_parent(parent):
        return reason
    if isinstance(module, CONVS) and module.groups > 1:
        return "PEFT cannot merge grouped convolutions"
    if isinstance(module, CONVS) and (set(module.dilation) != {1} or module.padding_mode != "zeros"):
        return "PEFT's adapters have no dilation, and pad with zeros"
    if isinstance(module, nn.Conv3d) and module.kernel_size[:2] == (1, 1):
        return "PEFT cannot merge kernels of 1 x 1 x k"
    return ""


def _all_that_count(s: Tensor) -> int:
    return int((s > 0).sum())


def _factorized(name: str, module: nn.Module, base: nn.Module, rule: RankRule) -> tuple[LoraLayer, Tensor, Tensor]:
    """What to say of a layer, and A [r, in, *K] and B [out, r, *1]; with a note, they would not be smaller."""
    W = module.weight
    M = to_matrix(W.double() - base.weight.to(W).double())  # [1, m, n]
    m, n = M.shape[-2:]
    if not M.any():
        return LoraLayer(name, type(module).__name__, 0, m * n, 0, min(m, n), 0.0), W, W
    svd = SVD.of(M)
    s = torch.where(svd.s > noise_floor(W.flatten(1), float(svd.s[0, 0])), svd.s, 0)
    rank = min(rank_of(name, rule, s), _all_that_count(s))
    B, A = (factor[0] for factor in svd.factors(rank, W.dtype))
    error = float((M[0] - B.double() @ A.double()).norm() / M.norm())
    limit = break_even(m, n)
    note = "" if rank <= limit else f"rank {rank} of a {m} x {n} update is not smaller (break-even: {limit})"
    entry = LoraLayer(name, type(module).__name__, rank * (m + n), m * n, rank, min(m, n), error, note)
    ones = [1] * (W.ndim - 2)
    return entry, A.reshape(rank, *W.shape[1:]), B.reshape(m, rank, *ones)


def _as_peft_finds(wholly: Mapping[str, str], model: nn.Module) -> dict[str, str]:
    """With every module that PEFT takes, too, because its name ends in one of these; none that is inside another."""
    modules = dict(model.named_modules())
    found = {
        name: wholly.get(name, f"its name ends in {ending!r}, and PEFT goes by that")
        for name in modules
        for ending in [next((ending for ending in wholly if name.endswith(ending)), None)]
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
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _contents(
    model: nn.Module,
    found: Mapping[str, tuple[LoraLayer, Tensor, Tensor]],
    biases: Sequence[str],
    wholly: Mapping[str, str],
) -> tuple[list[LoraLayer], dict[str, Tensor]]:
    """What to say of each entry of the adapter, and its tensors by their names in the file."""
    entries, tensors, state = [], {}, model.state_dict()
    for name, (entry, A, B) in found.items():
        if _within(name, wholly):
            continue
        entries.append(entry)
        if entry.rank:
            tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
            alike = next((other for other in wholly if re.match(rf"(.*\.)?{other}(\..*)?$", name)), None)
            if alike:  # PEFT reads its name as a pattern, in which a dot is any character
                raise ValueError(f"{name}: PEFT would not adapt it, taking it for {alike}, stored whole; rename one")
    for name in biases:
        if not _within(name, wholly):
            owner = name.rpartition(".")[0]
            tensors[f"{owner}.base_layer.bias" if f"{owner}.lora_A.weight" in tensors else name] = state[name]
            entries.append(LoraLayer(name, "bias", state[name].numel(), state[name].numel()))
    for name, why in wholly.items():
        inside = {key: T for key, T in state.items() if key.startswith(f"{name}.")}
        size = sum(T.numel() for T in inside.values())
        entries.append(LoraLayer(name, type(model.get_submodule(name)).__name__, size, size, note=why))
        tensors |= inside
    return entries, {PREFIX + key: T for key, T in tensors.items()}


def _config(entries: Sequence[LoraLayer], wholly: list[str]) -> dict:
    """PEFT matches plain names by their endings, too; these patterns match the whole name, and only that."""
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
        "modules_to_save": wholly or None,
        "bias": "all" if any(entry.kind == "bias" for entry in entries) else "none",
        "lora_dropout": 0.0,
    }


def _target(path: str | os.PathLike) -> Path:
    """The folder, if it may be written."""
    folder = Path(path).resolve()
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"{path}: wanted a folder in one that exists; {folder.parent} does not")
    if folder.exists() and (not folder.is_dir() or {file.name for file in folder.iterdir()} - {CONFIG, WEIGHTS}):
        raise FileExistsError(f"{path}: wanted an adapter to replace, or nothing; there is something else")
    return folder


def _write(folder: Path, config: dict, tensors: dict[str, Tensor]) -> int:
    """Write the folder, atomically, and return the size of the weights' file."""
    tensors = {key: T.detach().cpu().clone(memory_format=torch.contiguous_format) for key, T in tensors.items()}
    try:
        with atomic_folder(folder) as new:
            (new / CONFIG).write_text(json.dumps(config, indent=2))
            save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{folder}: cannot be written: {error}") from error
    return (folder / WEIGHTS).stat().st_size
