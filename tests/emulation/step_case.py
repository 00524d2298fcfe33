"""Proximal step of csrc/cuda/step.cuh on the CPU: its kernels in the emulator, its Triton programs by torch."""

import math

import torch
from torch import Tensor

from compaware_kernels.ops import cuda_launcher
from compaware_kernels.proximal import error_bounds
from compaware_kernels.proximal.cuda import device_structs, matmul_program, plan, step, subspace_iteration
from tests.emulation import emulator
from tests.emulation.emulator import Launch
from tests.helpers.cases import low_rank

TOL, SEED, CALL = 1e-3, 11, 5
FACTOR = error_bounds._factor(device_structs.PROBES)
GATE = {name: i for i, name in enumerate(device_structs.GATES)}
REPORT = {name: i for i, name in enumerate(device_structs.REPORT)}
NO = dict.fromkeys(device_structs.GATES, 0)
ZERO, NOTHING, SUBSPACE, FULL, UNSURE, REFUSED = 0, *range(3, 8)  # enum Method of step.h and small.h


def multiply(listed: matmul_program.Program, *_) -> None:
    """Compute all products of a program in fp64, stage by stage; within a stage in reverse order."""
    if listed.awake is not None and not listed.awake:
        return
    for product in sorted(reversed(listed._products), key=lambda p: p.stage):
        if product.gate is not None and not product.gate:
            continue
        alpha, beta, gamma = (1.0, 0.0, 0.0) if product.coef is None else product.coef.tolist()
        total = alpha * (product.A.double() @ product.B.double())
        if beta:
            total += beta * product.plus.double()
        if gamma:
            total.diagonal().add_(gamma)
        product.C.copy_(total)


def sanitized(made: plan.Plan, sanitizer: str):
    """Launcher that runs each launch in a process of its own under a sanitizer."""

    def launcher(kernel, grid, block, shared, device, stream, numbers):
        emulator.sanitize(sanitizer, [Launch(kernel, grid, block, shared, numbers)], tensors(made))

    return cuda_launcher.registered(launcher)


def make(weights, widths, tau=1.0, known=False, gamma=math.inf) -> plan.Plan:
    """Plan for these weights; ``known``: with bases of the true singular vectors; ``gamma``: of firm thresholding."""
    made = plan.Plan(weights, widths, firm=gamma < math.inf)
    made.slopes.fill_(1 / (1 - 1 / gamma))
    taus = tau if isinstance(tau, list) else [tau] * len(weights)
    made.inputs.copy_(torch.tensor([*taus, SEED, CALL], dtype=torch.float64))
    for x in (x for x in made.layers if known and x.k):
        x.V.copy_(right_vectors(x)[:, : x.k])
        x.report[REPORT["known"]] = 1
    return made


def right_vectors(x) -> Tensor:
    return torch.linalg.svd(x.W.double(), full_matrices=False).Vh.mT


def network(dtype=torch.float32) -> list[Tensor]:
    """Ragged weights: tall, wide, one that fits in a block, and one for which a narrow basis is enough."""
    weights = [low_rank(200, 64, 6), low_rank(64, 170, 4), low_rank(20, 12, 3), low_rank(130, 96, 9)]
    return [W.to(dtype) for W in weights]


WIDTHS = [16, 11, 16, 33]


def tensors(made: plan.Plan) -> list[Tensor]:
    spaces = [made, *made.matrices]
    found = [x for space in spaces for x in vars(space).values() if isinstance(x, Tensor)]
    return [*found, *(x for p in made.programs for x in p.tensors)]


def apart(made: plan.Plan) -> plan.Plan:
    """Reports and singular values of each layer without neighbors in memory: writes beyond them are out of bounds."""
    for x in made.layers:
        x.report, x.s = x.report.clone(), x.s.clone()
    made.table = device_structs.table(device_structs.LAYER, made.layers, made.device)
    return made


def state(made: plan.Plan) -> dict[str, Tensor]:
    """Copies of everything that kernels write."""
    found = {f"{x.number}.{name}": value.clone() for x in made.layers for name, value in vars(x).items()
             if isinstance(value, Tensor) and name not in ("partial", "awake", "tau", "slope")}  # fmt: skip
    return found | {name: getattr(made, name).clone() for name in ("inputs", "out", "refused", "partials", "zeroed")}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that differ in any bit; NaN equals NaN."""
    return {name for name, x in before.items() if not torch.equal(bits(x), bits(after[name]))}


def bits(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


def gates(x) -> dict[str, int]:
    return {name: int(x.gates[i]) for name, i in GATE.items()}


def report(x) -> dict[str, float]:
    return dict(zip(device_structs.REPORT, x.report.tolist(), strict=True))


def judged(x, norm: float) -> tuple[float, float, float]:
    """(Error bound, estimate of the error's spectral norm, bound of the rest) that ck_judge must report.

    By the formulas of proximal/cuda/subspace_iteration.py, and the norms of error_bounds.py.
    """
    tau, slope, unit, slack = x.tau.item(), x.slope.item(), 2.0**-24, 4 * 2.0**-24 * norm
    parts = torch.stack([R.mT @ R for R in (x.F, x.left, x.skew_U, x.skew_V)])
    F, E, U, V = (FACTOR * math.sqrt(K.trace()) for K in parts)
    about_F, about_E, about_U, about_V = error_bounds.spectral_estimates(parts)
    bound = math.hypot(F, E) + U + V
    sketches = {
        j: FACTOR * subspace_iteration._power(j, x).double().norm().item() for j in range(1, device_structs.POWERS + 1)
    }
    rho = tau * min(s ** (1 / j) for j, s in sketches.items() if j == 1 or s > 1e-20) + slack
    c = int((x.mu > max(0.8 * tau, 1e-6 * x.mu[0])).sum())
    above = ((x.mu[c:] ** 2 + rho**2).sqrt() + slack + bound - tau).clamp_min(0)
    excess = above.norm().item() if rho <= tau else math.inf
    stored = torch.minimum(slope * (x.mu[:c] - tau), x.mu[:c]).clamp_min(0).norm().item()
    rounding = 2 * (c + 1) * unit * x.mu[:c].norm().item() + error_bounds.unit_roundoff(x.W.dtype) * stored
    rounding += error_bounds.storage(x.W.dtype, 0.0, x.W.numel())  # subnormal numbers
    spectral = math.hypot(about_F, about_E) + about_U + about_V
    return slope * (bound + excess) + rounding, 1.25 * spectral + excess, rho


def launch(made, kernel, tol=TOL):
    count = len(made.layers)
    if kernel == "orth":
        step._orth(made, tol, first=False)
    elif kernel == "ritz":
        step._ritz(made)
    elif kernel == "judge":
        step._launch(made, "ck_judge", count, 0, [made.table, made.lows, tol])
    else:
        step._launch(made, "ck_finish", count + 1, 0, [made.table, count, made.refused, made.call, tol])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one(m=200, n=64, k=16, tau=1.0, dtype=torch.float32, **options):
    """Plan of one matrix, and its entry in the plan."""
    made = make([low_rank(m, n, 6).to(dtype)], [k], tau, **options)
    return made, made.layers[0]


def trying(x, norm=100.0):
    """Set the state that ck_orth leaves if the subspace is tried."""
    x.gates.zero_()
    x.gates[GATE["try"]] = 1
    x.report.copy_(torch.tensor([norm, 0, 0, SUBSPACE, 1, 0]))
    x.s.zero_()


def look_alike(x, y):
    """Fraction of the numbers of one random stream that also occur in another."""
    size = min(x.numel(), y.numel())
    return (x.flatten()[:size].float() == y.flatten()[:size].float()).double().mean()


def is_normal(x):
    size = x.numel()
    assert abs(x.mean()) <= 5 / size**0.5 and abs(x.double().var() - 1) <= 5 * (2 / size) ** 0.5
    assert abs((x.flatten()[1:] * x.flatten()[:-1]).mean()) <= 5 / size**0.5
