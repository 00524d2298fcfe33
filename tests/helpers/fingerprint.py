"""Fingerprints of what the library computes: they show whether a change left every bit as it was.

    python tests/helpers/fingerprint.py > before.json            # on one commit
    python tests/helpers/fingerprint.py --against before.json    # on another: lists what differs, and then exits with 1

Writes one JSON object: section/case/what -> a number, a text, or dtype, shape, strides and sha256 of a tensor or file.
Uses public names only. Bits depend on processor and torch: compare runs on one machine with equal builds of the
library.
"""

import argparse
import copy
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path

os.environ["COMPAWARE_TUNE"] = "off"  # the way that a layer measures to be the fastest changes low-order bits

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # import this checkout, not an installed package

import compaware_kernels as ck  # noqa: E402
from compaware_kernels.demo.networks import small_convnet  # noqa: E402

OPS, PENALTIES, FOLDS = torch.ops.compaware, ("nuclear", "group", "l1"), ("paper", "spatial", "input")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "gelu": nn.GELU}
MEASURED = ("seconds", "machine", "milliseconds")  # fields of records that differ from run to run
Found = dict[str, object]


def sha(raw: bytes) -> str:
    return f"sha256 {hashlib.sha256(raw).hexdigest()}"


def of_tensor(x: Tensor) -> str:
    kind = f"{x.dtype} {list(x.shape)} {[step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]}"
    return f"{kind} {sha(x.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy())}"


def of_file(path: Path) -> str:
    """Fingerprint of a file; of safetensors with sorted header keys, because metadata is written in random order."""
    raw = path.read_bytes()
    if path.suffix == ".safetensors":
        end = 8 + int.from_bytes(raw[:8], "little")
        raw = json.dumps(json.loads(raw[8:end]), sort_keys=True).encode() + raw[end:]
    return sha(raw)


def leaves(name: str, value: object) -> Iterator[tuple[str, str]]:
    """(name/part, fingerprint) of everything in a nested value."""
    if isinstance(value, ck.SvtInfo):  # without its reason, which is prose
        value = {what: getattr(value, what) for what in ("rank", "s", "error_bound", "method", "name")}
    elif isinstance(value, nn.Module):
        value = {"repr": repr(value), "state": value.state_dict()}
    elif is_dataclass(value):
        value = vars(value)
    elif isinstance(value, str) and "\n" in value:
        value = value.splitlines()
    if isinstance(value, (list, tuple)):
        numbers = len(value) > 8 and all(isinstance(part, (int, float)) for part in value)
        value = repr([*value]) if numbers else dict(enumerate(value))
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key not in MEASURED:
                yield from leaves(f"{name}/{key}", part)
    elif isinstance(value, (Tensor, Path)):
        yield name, of_tensor(value) if isinstance(value, Tensor) else of_file(value)
    else:
        yield name, str(value) if len(str(value)) < 200 else sha(str(value).encode())


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(repr((shape, seed)).encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def low_rank(m: int, n: int, r: int, seed: int = 0) -> Tensor:
    """Matrix [m, n] with r large singular values and noise of a norm of about 0.4."""
    return normal(m, r, seed=seed) @ normal(r, n, seed=seed) / 4 + 0.4 * normal(m, n, seed=seed) / (m**0.5 + n**0.5)


def ragged(dtype: torch.dtype) -> list[Tensor]:
    """Weights of a network, some strided, such that every route of the solver is taken."""
    made = [normal(64, 48), low_rank(200, 170, 6), low_rank(300, 64, 5).mT, normal(32, 16, 3, 3), normal(32, 8, 3, 3),
            normal(1, 9), normal(9, 2), 1e-3 * normal(40, 30),
            normal(24, 20, 3, 3).contiguous(memory_format=torch.channels_last)]  # fmt: skip
    return [W.to(dtype) for W in made]


GROUPS, TAUS = [1, 1, 1, 1, 4, 1, 1, 1, 1], [1.0, 1.0, 1.0, 3.0, 2.0, 0.3, 0.3, 1.0, 1e-4]


def filled(model: nn.Module, dead: int = 0) -> nn.Module:
    """The model with random weights of low rank plus noise, and some dead neurons."""
    for i, (name, x) in enumerate((name, x) for name, x in model.state_dict().items() if x.ndim):
        m, n = len(x), x[0].numel()
        y = low_rank(m, n, max(1, min(m, n) // 6), seed=i).reshape(x.shape) / (n / 4) ** 0.5
        x.copy_(y.abs() + 0.5 if name.endswith("running_var") else y)
        x[: dead if m > 4 * dead else 0] = 0
    return model.eval()


class Residual(nn.Module):
    """Network with batch norms, a residual sum, a grouped and a transposed convolution, and a layer norm."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.conv1, self.norm1 = nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.conv2, self.norm2 = nn.Conv2d(24, 24, (3, 5), padding=(1, 2), groups=2), nn.BatchNorm2d(24)
        self.up, self.act, self.pool = nn.ConvTranspose2d(24, 20, 2, 2), nn.SiLU(), nn.AdaptiveAvgPool2d(2)
        self.fc, self.ln, self.head = nn.Linear(80, 48), nn.LayerNorm(48), nn.Linear(48, 10)

    def forward(self, x):
        x = self.norm0(self.stem(x)).relu()
        x = F.relu(x + self.norm2(self.conv2(F.gelu(self.norm1(self.conv1(x))))))
        return self.head(self.ln(self.fc(self.pool(self.act(self.up(x))).flatten(1))))


def mlp() -> nn.Sequential:
    layers = nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 120), nn.ReLU(), nn.Linear(120, 10)
    return nn.Sequential(nn.Flatten(), *layers)


def parametrized() -> nn.Sequential:
    model = mlp()
    parametrizations.weight_norm(model[1])
    return model


def names() -> Found:
    """Public names, and ops with their schemas and whether they have a compiled body."""
    ops = {name: name.removeprefix("compaware::") for name in sorted(torch._C._dispatch_get_all_op_names())}
    return {"torch": torch.__version__, "processor": torch.backends.cpu.get_cpu_capability(),
            "public": dict.fromkeys(ck.__all__, "here")} | {
        op: [getattr(OPS, op).default._schema, torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")]
        for name, op in ops.items() if name != op
    }  # fmt: skip


def derived(op: Callable, *args: object, order: int = 1) -> list:
    """Outputs, and derivatives by all tensors up to this order."""
    args = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args]
    found = [y := op(*args)]
    for i in range(1, order + 1):
        y = [part for part in ([y] if isinstance(y, Tensor) else y) if part is not None]
        inputs, ahead = [a for a in args if isinstance(a, Tensor)], [normal(*p.shape, seed=i).to(p.dtype) for p in y]
        found.append(y := torch.autograd.grad(y, inputs, ahead, create_graph=i < order, allow_unused=True))
    return found


def proximal_ops() -> Found:
    found, shapes = {}, [(1, 9), (40, 12), (31, 37), (3, 20, 70), (0, 5)]
    for dtype, shape, strided in itertools.product(DTYPES, shapes, (False, True)):
        W = (normal(*shape[:-2], shape[-1], shape[-2]).mT if strided else normal(*shape)).to(dtype)
        one, each = torch.tensor(1.5), 1 + normal(*shape[:-2]).abs()
        here = found[f"{dtype} {list(shape)}{' strided' * strided}"] = {
            "svt, one tau": derived(OPS.svt, W, one, order=2), "svt": derived(OPS.svt, W, each, order=2),
            "soft_threshold": derived(OPS.soft_threshold, W, one), "group_shrink": derived(OPS.group_shrink, W, each),
            "sparse_group_shrink": derived(OPS.sparse_group_shrink, W, 0.1 * one, each),
            "info": ck.svt(W, 0.5, return_info=True),
        }  # fmt: skip
        if dtype.itemsize >= 4:
            here["small_svd"] = OPS.small_svd(W[None].flatten(0, -3))
            here["wide_product"] = OPS.wide_product(W.flatten(0, -2), normal(shape[-1], 7).to(dtype))
        many, t = [W.clone(), W[..., 1:].clone(), W[..., ::2]], torch.tensor([0.5, 1.0, 0.2])
        biases = [M[..., 0].clone() for M in many]
        in_place = {"svt_": (t, 1e-3), "soft_threshold_": (t / 9,), "group_shrink_": (t,),
                    "neuron_shrink_": (biases, t), "sparse_group_shrink_": (t / 9, t)}  # fmt: skip
        for name, more in in_place.items():
            here[name] = copy.deepcopy([getattr(OPS, name)(many, *more), many, biases])
    W = normal(4, 12, 9)
    found["vmap"] = torch.func.vmap(torch.func.grad(lambda W, t: ck.svt(W, t).sum(), (0, 1)))(W, normal(4).abs())
    return found | {"1-D": ck.soft_threshold(W[0, 0], 0.3)}


def low_rank_ops() -> Found:
    found, kernels = {}, {"paper": (3, 5, 1, 1), "spatial": (1, 5, 3, 1), "input": (1, 1, 3, 5)}
    strides = zip(ACTIVATIONS, (1, 2, 1, 2, 1), strict=True)
    for dtype, (fold, k), G, (act, stride) in itertools.product(DTYPES[:3], kernels.items(), (1, 2), strides):
        V, U = normal(G * 20, 36 // G, *k[:2]).to(dtype) / 9, normal(48, 20, *k[2:]).to(dtype) / 9
        x, residual = normal(2, 36, 14, 11).to(dtype), normal(2, 48, *([14, 11] if stride == 1 else [7, 6])).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last) if stride == 2 else x
        b, geometry = normal(48).to(dtype), ([stride, stride], [1, 2], [1, 1], G, fold, act)
        # What is packed starts with a header of 16 numbers that holds addresses.
        packed, conv = OPS.lowrank_pack(V, U, G), lambda *a, g=geometry: OPS.lowrank_conv2d(*a, None, *g)
        here = found[f"{dtype} {fold} {G} {act}"] = {
            "packed": packed[16:], "conv2d": derived(conv, x, V, U, b, residual),
            "two steps": OPS.lowrank_two_step(x, V, U, b, None, *geometry), "no bias": conv(x, V, U, None, None),
            "in place": [OPS.lowrank_conv2d_(x, V, U, b, residual, packed, *geometry), residual],
        }  # fmt: skip
        linear, y = lambda *a, act=act: OPS.lowrank_linear(*a, None, act), normal(5, 7, 36 // G).to(dtype)
        V, U, residual = V[:20, :, 0, 0].contiguous(), U[..., 0, 0].contiguous(), normal(5, 7, 48).to(dtype)
        here["linear"] = derived(linear, y, V, U, b, residual), OPS.lowrank_linear_two_step(y, V, U, b, residual, act)
        with torch.autocast("cpu", torch.bfloat16):
            here["autocast"] = ck.lowrank_linear(y, V, U, b, activation=act)
    return found


def called(op: Callable, weights: list[Tensor], *args: object, threads: int = 1, **options: object) -> Found:
    """Three calls with one warm state; the weights drift in between."""
    state, found = ck.WarmState(seed=3), {}
    torch.set_num_threads(threads)
    for i in range(3):
        found[i] = copy.deepcopy([op(weights, *args, state=state, **options), weights])
        for W in weights:
            W.add_(0.02 * normal(*W.shape, seed=i).to(W.dtype))
    torch.set_num_threads(1)
    return found | {"state": state.state_dict(), "text": repr(state)}


def shrinking() -> Found:
    """Public functions that apply proximal operators to lists of weights in place."""
    found, grouped = {}, {"groups": GROUPS, "names": [f"layer{i}" for i in range(len(GROUPS))]}
    for dtype in DTYPES:
        center = [0.1 * normal(*W.shape, seed=9).to(dtype) for W in ragged(dtype)]
        batch = [normal(20, 12, 8).to(dtype), normal(2, 3, 70, 30).to(dtype).mT, normal(2, 0, 4).to(dtype)]
        sigma_weights = [torch.linspace(1, 2, k) for k in (48, 170, 64)]
        cases = {f"svt_ {fold}": called(ck.svt_, ragged(dtype), TAUS, fold=fold, **grouped) for fold in FOLDS} | {
            "center": called(ck.svt_, ragged(dtype), 0.7, center=center, **grouped),
            "batch": called(ck.svt_, batch, [0.5, 2, 1], fold=None, tol=1e-6),
            "weighted_svt_": called(ck.weighted_svt_, ragged(dtype)[:3], sigma_weights),
            "truncate_": called(ck.truncate_, ragged(dtype), [3, 6, 5, 20, 4, 1, 0, 2, 9], fold="spatial"),
            "spectral_ball_": called(ck.spectral_ball_, ragged(dtype), TAUS, fold="input", tol=1e-5),
        }
        rows = ragged(dtype)
        biases = [None if i % 3 == 0 else normal(len(W)).to(dtype) for i, W in enumerate(rows)]
        cases["group_shrink_"] = copy.deepcopy([ck.group_shrink_(rows, TAUS, biases=biases), rows, biases])
        cases["soft_threshold_"] = copy.deepcopy([ck.soft_threshold_([*rows, biases[1]], 0.1), rows, biases])
        cases["sparse_group_shrink_"] = ck.sparse_group_shrink_(rows, 0.05, [t / 2 for t in TAUS]), rows
        found[f"{dtype}"] = cases
    large = low_rank(500, 420, 12), low_rank(512, 384, 20), normal(200, 260), normal(64, 64, 3, 3)
    found["two threads"] = called(ck.svt_, [W.float() for W in large], [1.0, 1.0, 5.0, 9.0], threads=2)
    weights = ragged(torch.float32)[:4]
    return found | {"traced": [torch.compile(lambda: ck.svt_(weights, 1.0), backend="aot_eager")(), weights]}


def trained(make: Callable, dtype: torch.dtype = torch.float32, adam: bool = False, **options: object) -> Found:
    """20 optimizer steps on random images, resumed from a checkpoint after 10; ``center``: the initial weights."""
    torch.manual_seed(0)
    model, x, y, found = make().to(dtype), normal(32, 1, 8, 8).to(dtype), torch.arange(32) % 10, {}
    options = {name: copy.deepcopy(model) if name == "center" else value for name, value in options.items()}
    groups = [{"params": [*model.parameters()][:2], "lr": 0.02}, {"params": [*model.parameters()][2:]}]
    optimizer = torch.optim.Adam(groups, 0.01) if adam else torch.optim.SGD(groups, 0.05, momentum=0.9)
    prox = ck.ProximalStep(model, optimizer, **options)
    for step in range(1, 21):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if prox.every == "epoch" and step % 4 == 0:
            prox.step()
        if step == 10:
            found["10 steps"] = copy.deepcopy([prox.state_dict(), prox.thresholds(), model.state_dict()])
            prox.remove()
            prox = ck.ProximalStep(model, optimizer, **options)
            prox.load_state_dict(found["10 steps"][0])
    report = prox.report()
    return found | {
        "model": model, "report": [*report], "table": str(report), "scalars": report.scalars(),
        "thresholds": prox.thresholds(), "state": prox.state_dict(), "warm": prox.warm.state_dict(),
        "steps": prox.steps, "applied": prox.applied, "left alone": sorted(prox.skipped),
    }  # fmt: skip


def training() -> Found:
    """Training with ProximalStep."""
    found, orders = {}, itertools.permutations(PENALTIES)
    for order, fold, every in zip(orders, FOLDS * 2, (1, 2, 3, "epoch", 7, 1), strict=True):
        for make in (small_convnet, mlp, parametrized, Residual):
            n, more = 4 if every == "epoch" else every, {"order": order, "fold": fold, "every": every, "warmup": 2}
            name = f"{make.__name__} {every} {' '.join(order)}"
            found[name] = trained(make, nuclear=0.6 * n, group=0.02 * n, l1=0.002 * n, **more)
    found |= {
        "patterns": trained(small_convnet, nuclear={"0": 1.0, "*": 3.0}, group={"?": 0.1}, skip=["11"], every=2),
        "Adam": trained(Residual, adam=True, nuclear=0.02, l1=1e-4, scale_by_lr=False, every=3),
        "center, convnet": trained(small_convnet, nuclear=0.5, center=None, every=2, fold="spatial"),
        "center, mlp": trained(mlp, nuclear=0.5, center=None),
    }
    return found | {f"mlp {dtype}": trained(mlp, dtype, nuclear=2.0, every=4) for dtype in DTYPES[:3]}


def compressed(model: nn.Module, ranks: object, x: Tensor, **options: object) -> tuple[nn.Module, Found]:
    small, report = ck.compress(model, ranks, (x,), **options)
    found = {"model": small, "outputs": small(x), "totals": [report.params, report.macs, report.bytes]}
    return small, found | ({"report": report, "table": str(report)} if options.get("goal") == "size" else {})


def compressing() -> Found:
    """Ranks, allocate and compress; then save, load, to_plain, to_dense and fuse of the compressed model."""
    found, x, seen = {}, normal(4, 1, 8, 8).float(), [(normal(16, 1, 8, 8).float(),)]
    rules = map(ck.ranks.parse, itertools.cycle(("energy:0.9", "nuclear:0.8", "fixed:4", "share:0.25", "relative:0.1")))
    for make, fold in itertools.product((small_convnet, mlp, Residual), (*FOLDS, "auto")):
        model, rule, path = filled(make(), dead=3), next(rules), Path(f"{make.__name__} {fold}.safetensors")
        options, some = {"goal": "size", "fold": fold}, {"*[0-6]": ck.ranks.energy(0.8)}
        small, here = compressed(model, rule, x, **options)
        ck.save(small, path)
        fused = ck.fuse(small, (x,))
        found[f"{path.stem} {rule}"] = here | {
            "file": path, "loaded": ck.load(path, make()).eval()(x), "plain": ck.to_plain(small),
            "dense": ck.to_dense(small), "fused": fused, "code": fused.code, "fused outputs": fused(x),
            "calibrated": compressed(model, some, x, calibration=seen, **options)[1],
            "skip": compressed(model, some, x, remove_dead=False, skip=["*1"], **options)[1],
        }  # fmt: skip
        bys = ("relative", "absolute", "equal", "greedy", "share")
        for of, by, batches in itertools.product(("macs", "params"), bys, ((), seen)) if fold in FOLDS else ():
            ranks = ck.allocate(model, 0.4, (x,), of=of, by=by, fold=fold, calibration=batches or None)
            found[f"{path.stem} {of} {by} {len(batches)}"] = {layer: str(rank) for layer, rank in ranks.items()}
    wide = filled(nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)))
    deep = filled(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 4, 1)))
    # so much faster that noise in the timing cannot change the choice
    for model, x in ((wide, normal(64, 512).float()), (deep, normal(8, 64, 16, 16).float())):
        found[f"speed {len(model)}"] = compressed(model, {"0": ck.ranks.fixed(3)}, x)[1]
    return found


def lora() -> Found:
    """export_lora of a low-rank update, with changed biases and norms."""
    found, base = {}, filled(Residual())
    model = copy.deepcopy(base)
    for i, x in enumerate(model.parameters()):
        x.data += 0.1 * (normal(len(x), 2, seed=i) @ normal(2, x[0].numel(), seed=i)).reshape(x.shape)
    for name, more in {"learned": {}, "fixed": {"ranks": ck.ranks.fixed(1), "whole": ["head"]}}.items():
        report = ck.export_lora(model, base, name, **more)
        found[name] = {"report": report, "table": str(report), "files": {p.name: p for p in Path(name).iterdir()}}
    return found


LAYERS = {
    "Linear": (nn.Linear(40, 32), (6, 40)),
    "Conv1d": (nn.Conv1d(20, 32, 3, 2, 1), (2, 20, 9)),
    "Conv2d": (nn.Conv2d(36, 32, (3, 5), padding=(1, 2), groups=2), (2, 36, 9, 11)),
    "Conv2d, same": (nn.Conv2d(16, 48, 3, padding="same", dilation=2, bias=False), (2, 16, 9, 7)),
    "Conv3d": (nn.Conv3d(16, 16, 3, padding=1, padding_mode="circular"), (2, 16, 4, 5, 3)),
    "ConvTranspose1d": (nn.ConvTranspose1d(20, 16, 3, 2), (2, 20, 6)),
    "ConvTranspose2d": (nn.ConvTranspose2d(24, 16, 3, 2, 1, 1, groups=2), (2, 24, 5, 4)),
    "ConvTranspose3d": (nn.ConvTranspose3d(16, 8, 2, bias=False), (1, 16, 3, 2, 4)),
}


def layers() -> Found:
    """Low-rank layers: from dense and back, gradients, residual sums, activations, loading a dense checkpoint."""
    found = {}
    for (name, (dense, size)), fold, dtype in itertools.product(LAYERS.items(), FOLDS, DTYPES[:3]):
        dense, x = filled(dense).to(dtype), normal(*size).to(dtype)
        layer = getattr(ck, f"LowRank{name.partition(',')[0]}").from_dense(dense, 13 if min(size) > 5 else 5, fold)
        y = layer(x)
        here = found[f"{name} {fold} {dtype}"] = {"layer": layer, "dense": layer.to_dense(), "y": y}
        here["gradients"] = torch.autograd.grad(layer.train()(x).square().sum(), [*layer.parameters()])
        here["sum"] = layer.eval()(x, residual=normal(*y.shape).to(dtype))
        for act, module in ACTIVATIONS.items():
            here[act] = ck.fuse(nn.Sequential(layer, module()), (x,))(x)
        layer.load_state_dict({name: p / 2 for name, p in dense.state_dict().items()})
        here["loaded"] = layer(x)
    return found


def run(*words: object) -> str:
    """Output of the compaware command."""
    command = [sys.executable, "-m", "compaware_kernels", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def command_line() -> Found:
    torch.save(filled(small_convnet(), dead=3).state_dict(), "dense.pt")
    found, network = {}, ("dense.pt", "--model", "compaware_kernels.demo.networks:small_convnet", "--input", "1,1,8,8")
    for fold, rank in (("paper", "energy:0.99"), ("auto", "fixed:3")):
        out, report = Path(f"{fold}.safetensors"), Path(f"{fold}.json")
        options = ("--rank", rank, "--goal", "size", "--fold", fold, "--out", out, "--report", report)
        found[fold] = {"prints": run("compress", *network, *options), "file": out, "report": report}
    return found


ARMS = {
    "plain": "", "nuclear": "nuclear = 10", "nuclear-steps": "nuclear = 10", "nuclear-loss": "nuclear = 3",
    "nuclear+group": "nuclear = 4, group = 0.4", "reload": "nuclear = 10, group = 0.4", "group": "group = 0.8",
    "sparse-group": "group = 0.4, l1 = 0.4", "l1": "l1 = 0.5", "l2": "l2 = 1e-3", "trp": "energy = 0.9",
    "fixed-rank": "share = 0.25", "magnitude": "sparsity = 0.8", "variational": "cost = 0.01",
}  # fmt: skip


def study() -> Found:
    """Records and results of a small study."""
    settings = ["epochs = 2", "seeds = 1", "batch = 128", "lr = 0.02", "tune_epochs = 1", "rules = ['energy:0.9']",
                "sparsities = [0.5]", "map = { nuclear = [2], group = [0.1] }"]  # fmt: skip
    Path("small.toml").write_text("\n".join([*settings, *(f'arms."{a}" = [{{{s}}}]' for a, s in ARMS.items())]))
    run("study", "small.toml", "--out", "study", "--processes", 1)
    return {str(p): json.loads(p.read_text()) for p in sorted(Path("study").glob("**/*.json")) if p.stem != "latency"}


def demo() -> Found:
    prints = run("demo", "--seeds", 1, "--epochs", 2, "--tune-epochs", 0, "--out", "demo")
    files = {p.name: p for p in sorted(Path("demo").glob("*.safetensors"))}
    return files | {"prints": prints, "results": json.loads(Path("demo/results.json").read_text())}


SECTIONS = {f.__name__: f for f in (names, proximal_ops, low_rank_ops, shrinking, training, compressing, lora, layers,
                                    command_line, study, demo)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="fingerprints of another commit: list what differs")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS], help="some sections")
    arguments, found = parser.parse_args(), {}
    before = json.loads(arguments.against.read_text()) if arguments.against else {}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in arguments.only:
            start = time.perf_counter()
            found |= leaves(name, SECTIONS[name]())
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        os.chdir(ROOT)
    if not arguments.against:
        json.dump(found, sys.stdout, indent=0)
        return
    before = {name: value for name, value in before.items() if name.partition("/")[0] in arguments.only}
    differs = [name for name, value in before.items() if found.get(name) != value]
    for name in differs:
        print(f"{name}:\n    was {before[name]}\n    is  {found.get(name, 'gone')}")
    print(*(f"{name}:\n    new {found[name]}\n" for name in found if name not in before), sep="", end="")
    print(f"{len(differs)} of {len(before)} fingerprints differ")
    sys.exit(bool(differs))


if __name__ == "__main__":
    main()
