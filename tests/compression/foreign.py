"""Foreign architectures: every function of compression on models that nobody wrote for it.

``python -m tests.compression.foreign [NUMBER or NAMES or PATTERNS]`` runs all, the first NUMBER of each family, or
those named (``timm.*``), and ends with a table of failures; exit code 1 if there is one. Models have random weights;
nothing is downloaded. A model that a function cannot take is no failure if the error says so in the words of
:data:`REFUSALS`.
"""

from __future__ import annotations

import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import compaware_kernels as ck
from compaware_kernels._utils.tables import text_table
from compaware_kernels.compression.arguments import Inputs
from compaware_kernels.compression.comparison import output_tensors
from compaware_kernels.compression.compress import READ
from compaware_kernels.compression.macs import count_macs
from compaware_kernels.folds import from_matrix
from compaware_kernels.nn.discovery import Layer
from compaware_kernels.nn.lowrank import LowRank
from compaware_kernels.nn.unwrap import without_wrappers

from .foreign_models import CASES

TOLERANCE = 2e-3  # of outputs, relative to the largest; fp32 through up to 60 layers measured: 3e-4
REFUSALS = (
    r"fuse: torch\.fx cannot trace the model",
    r"fuse: .* the model itself gives other outputs in every call",
    r"budget: rank 1 everywhere needs",
    r"optimizer: wanted the weight of a Linear or convolution of this model; got none: nothing to shrink",
    r"CheckpointError: .*: save the model before it is quantized",
    r"weight of a low-rank layer: wanted reads only",
    r"of: the multiply-adds of this model cannot be counted",
)
# What does not work, and says so in torch's words.
KNOWN = {
    ("torch.output size", "to_plain"): "unexpected keyword argument 'output_size'",
    ("torch.reads the weight", "to_plain"): "shapes cannot be multiplied",
    ("torch.weight decay in forward", "to_plain"): "relative error",
    ("torch.nested tensors", "counts"): "unknown",
    ("timm.beit_base_patch16_224", "to_plain"): "shapes cannot be multiplied",
    ("timm.eva02_tiny_patch14_224", "to_plain"): "shapes cannot be multiplied",
    ("transformers.mamba", "to_plain"): "Expected size",
    ("transformers.wavlm", "to_plain"): "has no attribute 'bias'",
}


class Subject:
    """A foreign model, and what compress made of it."""

    def __init__(self, name: str):
        self.name, self.build = name, CASES[name]
        self.model, self.inputs = self.fresh()
        self.wanted = run(self.model, self.inputs)

    def fresh(self) -> tuple[nn.Module, Inputs]:
        """The model anew, with the same weights, in eval mode; and its inputs."""
        torch.manual_seed(0)
        model, inputs = self.build()
        return model.eval(), Inputs.of(inputs)

    def compressed(self, rule: Callable, **options) -> tuple[nn.Module, ck.CompressReport]:
        return ck.compress(self.model, rule, self.inputs.args, example_kwargs=self.inputs.kwargs, **options)

    def by_hand(self, report: ck.CompressReport) -> nn.Module:
        """The dense model whose factorized layers have truncated weights of the same ranks."""
        model = without_wrappers(self.fresh()[0])
        for row in report.layers:
            if row.rank:
                module = model.get_submodule(row.name)
                layer = Layer(row.name, module)
                module.weight = nn.Parameter(module.weight.detach().clone())  # others may share it
                U, s, Vh = torch.linalg.svd(layer.matrix().detach().cdouble() if module.weight.is_complex()
                                            else layer.matrix().detach().double(), full_matrices=False)  # fmt: skip
                M = (U[..., : row.rank] * s[:, None, : row.rank]) @ Vh[:, : row.rank]
                layer.set_rows(from_matrix(M, layer.rows.shape, "paper"))
        return model


def run(model: nn.Module, inputs: Inputs, grad: bool = False) -> list[Tensor]:
    """Floating-point tensors in the model's outputs."""
    torch.manual_seed(1)
    with torch.set_grad_enabled(grad):
        found = list(output_tensors(inputs.cloned().run(model), set()))
    parts = [part for tensor in found for part in (tensor.unbind() if tensor.is_nested else [tensor])]
    return [part for part in parts if part.is_floating_point() or part.is_complex()]


def close(got: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = TOLERANCE) -> None:
    assert len(got) == len(wanted), f"{len(wanted)} outputs wanted; got {len(got)}"
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape, f"shape {tuple(b.shape)} wanted; got {tuple(a.shape)}"
        finite = b.isfinite()
        assert torch.equal(a[~finite].nan_to_num(7), b[~finite].nan_to_num(7)), "other values that are not finite"
        a, b = a[finite], b[finite]
        low = b.dtype in (torch.float16, torch.bfloat16)
        if len(b):
            error = float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
            assert error <= (0.1 if low else tolerance), f"relative error {error:.1e}"


def loss(model: nn.Module, inputs: Inputs) -> Tensor | int:
    """Weighted sum of the outputs; that of squares is constant after a layer norm.  0 for outputs without gradients."""
    outputs = [y for y in run(model, inputs, grad=True) if y.requires_grad]
    torch.manual_seed(2)
    outputs = [(y.abs() if y.is_complex() else y).nan_to_num(0, 0, 0).clamp(-1e3, 1e3) for y in outputs]
    return sum((y * torch.randn(y.shape, dtype=y.dtype)).mean() for y in outputs if y.numel())


# --- checks -----------------------------------------------------------------------------------------------------------


def check_size(s: Subject) -> None:
    """Values are those of truncated SVD by hand; no larger than before; a reason for each layer that stays."""
    s.small, s.report = s.compressed(ck.ranks.share(0.3), goal="size", remove_dead=False)
    close(run(s.small, s.inputs), run(s.by_hand(s.report), s.inputs))
    close(run(s.model, s.inputs), s.wanted, 0)
    storages = {p.untyped_storage().data_ptr(): p.numel() for p in s.small.parameters()}
    assert s.report.params <= s.report.params_before, f"grew: {s.report.params_before} -> {s.report.params}"
    assert sum(storages.values()) <= s.report.params
    silent = [row.name for row in s.report.layers if not row.rank and not row.reason]
    assert not silent, f"dense without a reason: {silent}"


def check_full_rank(s: Subject) -> None:
    """At most rounding is lost at full rank, and where a layer would not be smaller it stays; dead neurons go."""
    small, _ = s.compressed(ck.ranks.share(1.0), goal="size")
    close(run(small, s.inputs), s.wanted)


def check_speed(s: Subject) -> None:
    small, report = s.compressed(ck.ranks.share(0.1), remove_dead=False)
    close(run(small, s.inputs), run(s.by_hand(report), s.inputs))


def check_to_plain(s: Subject) -> None:
    plain = ck.to_plain(s.small)
    close(run(plain, s.inputs), run(s.small, s.inputs))
    assert not any(isinstance(module, LowRank) for module in plain.modules())


def check_to_dense(s: Subject) -> None:
    dense = ck.to_dense(s.small)
    close(run(dense, s.inputs), run(s.small, s.inputs))
    assert dense.state_dict().keys() == without_wrappers(s.model).state_dict().keys()


def check_save_and_load(s: Subject) -> None:
    with TemporaryDirectory() as folder:
        ck.save(s.small, path := Path(folder) / "small.safetensors")
        loaded = ck.load(path, s.fresh()[0])
    close(run(loaded.eval(), s.inputs), run(s.small, s.inputs), 1e-5)


def check_fuse(s: Subject) -> None:
    fused = ck.fuse(s.small, s.inputs.args, s.inputs.kwargs)
    close(run(fused, s.inputs), run(s.small, s.inputs))


def check_counts(s: Subject) -> None:
    assert count_macs(s.model, s.inputs) is not None, "unknown"
    model, called = without_wrappers(s.fresh()[0]), set()
    for row in s.report.layers:
        model.get_submodule(row.name).register_forward_hook(lambda *_, name=row.name: called.add(name))
    torch.backends.mha.set_fastpath_enabled(False)
    run(model, s.inputs)
    torch.backends.mha.set_fastpath_enabled(True)
    uncounted = [row.name for row in s.report.layers if row.name in called and not row.macs_before]
    assert not uncounted, f"without multiply-adds: {uncounted}"
    read = [row.name for row in s.report.layers if row.rank and READ in row.reason]
    more = s.report.macs > s.report.macs_before and not read
    assert not more, f"more multiply-adds: {s.report.macs_before} -> {s.report.macs}"


def check_gradients(s: Subject) -> None:
    """Of all that is not factorized: those of the model truncated by hand."""
    gradients = []
    for model in (s.by_hand(s.report), s.small):
        value = loss(model, s.inputs)
        if not isinstance(value, Tensor):
            return
        try:
            value.backward()
        except RuntimeError as error:
            if not gradients:  # of the model itself
                return
            raise error
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    dense, low = gradients
    largest = max((float(g.norm()) for g in dense.values()), default=0)
    for name in low.keys() & dense.keys():
        error = float((low[name] - dense[name]).norm() / dense[name].norm().clamp_min(1e-2 * largest + 1e-6))
        assert error < (0.2 if dense[name].dtype in (torch.float16, torch.bfloat16) else 0.02), f"{name}: {error:.1e}"
    missing = [row.name for row in s.report.layers
               if row.rank and f"{row.name}.weight" in dense and f"{row.name}.first.weight" not in low]  # fmt: skip
    trained = dict(s.model.named_parameters())
    missing = [name for name in missing if trained[f"{name}.weight"].requires_grad]
    assert not missing, f"no gradient: {missing}"


def check_training(s: Subject) -> None:
    """One step with ProximalStep: finite, and no layer's nuclear norm is larger than without."""
    model, inputs = s.fresh()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        return
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    prox = ck.ProximalStep(model.train(), optimizer, nuclear=0.1)
    value = loss(model, inputs)
    if isinstance(value, Tensor):
        value.backward()
    optimizer.step()
    prox.step()
    assert all(p.isfinite().all() for p in parameters)
    prox.report()


def check_calibration(s: Subject) -> None:
    small, report = s.compressed(ck.ranks.share(0.3), goal="size", remove_dead=False,
                                 calibration=[s.inputs.kwargs if s.inputs.kwargs else s.inputs.args])  # fmt: skip
    assert [row.rank for row in report.layers] == [row.rank for row in s.report.layers]
    run(small, s.inputs)


def check_budget(s: Subject) -> None:
    for of in ("macs", "params"):
        rules = ck.allocate(s.model, 0.6, s.inputs.args, of=of, example_kwargs=s.inputs.kwargs)
        if rules:
            _, report = s.compressed(rules, goal="size", remove_dead=False)
            patterns = list(rules)
            rows = [row for row in report.layers if any(fnmatchcase(row.name, pattern) for pattern in patterns)]
            before, after = (sum(getattr(row, f"{of}{when}") for row in rows) for when in ("_before", ""))
            biases = (
                sum(without_wrappers(s.model).get_submodule(row.name).weight.shape[0] for row in rows)
                if of == "params"
                else 0
            )
            assert after <= 0.6 * before + biases, f"{of}: {before} -> {after}"


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def failures(name: str) -> Iterator[tuple[str, str]]:
    """(check, message) of each check that the model fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject = Subject(name)
        for check, function in CHECKS.items():
            try:
                function(subject)
            except Exception as error:
                text = f"{type(error).__name__}: {' '.join(str(error).split())}"
                known = re.search(KNOWN.get((name, check), "(?!)"), text)
                if not known and not any(re.search(refusal, text) for refusal in REFUSALS):
                    frame = traceback.extract_tb(error.__traceback__)[-1]
                    yield check, f"{text[:300]} ({Path(frame.filename).name}:{frame.lineno})"
                if not hasattr(subject, "report"):
                    return


def chosen(arguments: Sequence[str]) -> list[str]:
    """Names of cases from the command line: none, a number per family, or patterns.  Raises SystemExit for others."""
    if len(arguments) == 1 and arguments[0].isdigit():
        families: dict[str, list[str]] = {}
        for name in CASES:
            families.setdefault(name.partition(".")[0], []).append(name)
        return [name for names in families.values() for name in names[: int(arguments[0])]]
    names = [name for name in CASES if not arguments or any(fnmatchcase(name, pattern) for pattern in arguments)]
    if not names:
        raise SystemExit(f"no model matches {' '.join(arguments)}; models: {', '.join(CASES)}")
    return names


def main(arguments: Sequence[str]) -> int:
    names, rows, took = chosen(arguments), [], {}
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(names))
        for name in names:
            bar.update(task, description=name)
            start, found = time.perf_counter(), []
            try:
                found = list(failures(name))
            except Exception as error:
                found = [("the model itself", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")]
            for failure in found:
                bar.console.print(f"{name}, {': '.join(failure)}", markup=False, highlight=False)
            rows += [(name, *failure) for failure in found]
            took[name] = time.perf_counter() - start
            bar.advance(task)
    slowest = sorted(took, key=took.get, reverse=True)[:5]
    print("slowest: " + ", ".join(f"{name} {took[name]:.0f} s" for name in slowest))
    if rows:
        print(text_table(("model", "check", "failure"), rows))
    print(f"{len(names)} models, {len(CHECKS)} checks each, {len(rows)} failures")
    return int(bool(rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
