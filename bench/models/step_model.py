"""Roofline model of the proximal step of a whole network on a GPU; step_roofline.py writes its predictions.

The step is planned on the meta device and its launches are listed as :mod:`compaware_kernels.proximal.cuda.step`
queues them. A stage of a matrix program takes as long as the longest of: DRAM traffic, L2 traffic, arithmetic, and the
latency of the steps that one Triton program must run in sequence. A CUDA kernel has one block per matrix; it takes as
long as the block of the largest matrix.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import ceil, prod
from typing import NamedTuple

import torch

from bench.models.lowrank_roofline import CHIPS, DRAM_SHARE, L2_SHARE, PORT, STEP, TENSOR_SHARE, Chip
from compaware_kernels.ops import cuda_launcher
from compaware_kernels.proximal.cuda import step
from compaware_kernels.proximal.cuda.device_structs import PAIRS, PROBES, ROOT_PAIRS
from compaware_kernels.proximal.cuda.matmul_program import TYPES, Product, Program
from compaware_kernels.proximal.cuda.plan import Plan
from compaware_kernels.proximal.cuda.polar_express import schedule
from compaware_kernels.proximal.cuda.sizes import width


class Gpu(NamedTuple):
    chip: Chip
    tf32: float  # dense flop/s of the tensor cores
    wide: float  # fp64 flop/s of Triton's tl.dot: tensor cores on sm_80 and sm_90, else the FMA units
    fp64: float  # flop/s of the FMA units

    @property
    def lanes(self) -> float:
        """fp64 FMAs per clock of one multiprocessor."""
        return self.fp64 / 2 / self.chip.multiprocessors / self.chip.clock


H100 = CHIPS["H100 SXM"]
RTX_5090 = Chip(209.5e12, 1.792e12, 15.9e12, 96e6, 170, 2.407e9)
GPUS = {
    "A100 80 GB SXM": Gpu(CHIPS["A100 80 GB SXM"], 156e12, 19.5e12, 9.7e12),
    "H100 SXM": Gpu(H100, 494.5e12, 67e12, 33.5e12),
    "H200 SXM": Gpu(H100._replace(dram=4.8e12), 494.5e12, 67e12, 33.5e12),
    "B200": Gpu(CHIPS["B200"], 1100e12, 37e12, 37e12),
    "RTX 5090": Gpu(RTX_5090, 104.8e12, 1.64e12, 1.64e12),
}
BETA = 1e4  # default (||W||_F / tau)^2 of a matrix whose rank is not known

RESIDENT = 2  # Triton programs per multiprocessor, limited by registers
LAUNCH, WAIT, GATED = 3e-6, 3e-6, 1.5e-6  # s: a launch; ticket, wait and signal of a stage; a tile whose gate is closed
DRAM_LATENCY, WARPS, SCHEDULERS = 0.6e-6, 8, 4
# Clocks of one block. Instruction counts: from the machine code for sm_90.
FMA_SHARE = 0.25  # fraction of the multiprocessor's fp64 rate, in the sums of Cholesky factors and inverses
COLUMN, DIVISION, FAR = 300, 250, 600  # per column of a Cholesky factor; per column of an inverse; L2 and barrier
SWEEPS = {4: 8, 8: 5}  # Jacobi sweeps, by bytes per number
# Jacobi: longest row, rows per group, and per rotation the instructions in fp32, in fp64, and on the fp64 units.
MEETINGS = ((64, 8, 310, 473, 91), (128, 8, 437, 708, 155), (256, 4, 400, 621, 152))
TURN = 1000  # least clocks of a Jacobi rotation: sums, angle, update
IN_PLACE = 60  # clocks: 32 elements of two rows in global memory
NORMAL, NORMAL_FP64 = 370, 100  # instructions of one normal random number; those in fp64
JUDGE_ROW, SUMMAND = 120, 70  # clocks: Gram product of 32 probes, per row; an element of a sum of squares, per thread


class Part(NamedTuple):
    """One stage of a matrix program, or one CUDA kernel."""

    name: str
    flops: float
    bytes: float
    seconds: float
    bound: str


class Launch(NamedTuple):
    name: str
    parts: list[Part]
    tiles: int
    gated: float  # seconds of tiles whose gate is closed

    @property
    def seconds(self) -> float:
        return LAUNCH + self.gated + sum(part.seconds for part in self.parts)

    @property
    def bound(self) -> str:
        """The resource that takes most of the time."""
        by = {bound: sum(part.seconds for part in self.parts if part.bound == bound) for *_, bound in self.parts}
        by["gated tiles"] = self.gated
        return max(by, key=by.get)


def plan_of(shapes: Sequence[tuple[int, int]], share: float | int | None, dtype: torch.dtype = torch.float32) -> Plan:
    """Plan without memory, for layers of these shapes; share: rank over full rank, the rank itself, or None if
    unknown."""
    weights = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    ranks = [share if isinstance(share, int) else share and max(1, round(share * min(shape))) for shape in shapes]
    return Plan(weights, [width(rank, min(W.shape)) if rank else 0 for rank, W in zip(ranks, weights, strict=True)])


def launches(plan: Plan) -> list[str | Program]:
    """Kernels and matrix programs that one step queues, in order."""
    queued: list[str | Program] = []
    run = Program.run
    Program.run = lambda program, counters: queued.append(program) if program.tiles else None
    try:
        with cuda_launcher.registered(lambda kernel, *_: queued.append(kernel), plan.device.type):
            step.run(plan, 1e-3)
    finally:
        Program.run = run
    return queued


def workspace(plan: Plan) -> int:
    """Bytes of workspace and tables, without the weights."""
    tensors = [plan.out, plan.inputs, plan.table, plan.counters, plan.chunks, plan.partials]
    for program in plan.programs:
        tensors += [*program.tensors, program._problems, program._tiles]
    for x in plan.layers:
        tensors += [value for value in vars(x).values() if isinstance(value, torch.Tensor) and value is not x.W]
    weights = {x.W.untyped_storage()._cdata for x in plan.matrices}
    sizes = {X.untyped_storage()._cdata: X.untyped_storage().nbytes() for X in tensors}
    return sum(size for storage, size in sizes.items() if storage not in weights)


def open_gates(plan: Plan, beta: float, tol: float = 1e-3) -> set[int]:
    """Ids of the gates that are open if every subspace that is tried succeeds.

    Layers without a subspace take matrix products of the whole matrix; beta: their (||W||_F / tau)^2.
    """
    found, lows = set(), [low for low, *_ in schedule()]
    for x in plan.layers:
        if x.k:
            found |= {id(x.gate["try"]), id(x.gate["apply"])}
            continue
        skipped = 2 * (PAIRS - ROOT_PAIRS)
        sign, root = first_needed(lows, tol / (2 * beta)), first_needed(lows[skipped:], 0.9 / (beta + 1) ** 0.5)
        found |= {id(x.gate["dense"]), *map(id, x.sign_pairs[sign // 2 :]), *map(id, x.root_pairs[root // 2 :])}
    return found


def first_needed(lows: Sequence[float], low: float) -> int:
    """Index of the first polynomial that is needed, as csrc/cuda/step.cuh decides."""
    return max([0, *(t for t in range(0, len(lows), 2) if lows[t] <= low)])


# --- matrix programs --------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """One product of a program; a tile sums ``steps`` blocks of K, and ``chunks`` tiles add up to one tile of C."""

    product: Product
    steps: int
    chunks: int

    @property
    def wide(self) -> bool:
        return TYPES[self.product.group.accumulator] == torch.float64

    @property
    def tiles(self) -> int:
        return prod(self.product.tiles) * self.chunks

    @property
    def flops(self) -> int:
        return 2 * prod(self.product.sizes)

    @property
    def tile_flops(self) -> float:
        """flops of one tile, padding included; an fp32 product is three tf32 products."""
        group, BK = self.product.group, self.product.loop.BK
        return 2 * group.BM * group.BN * BK * self.steps * (1 if self.wide else 3)

    def moved(self) -> tuple[int, int]:
        """(Bytes if each operand is read once, bytes that all tiles read and write.)"""
        _, _, A, B, C, plus, *_ = self.product
        ends = C.nbytes + (0 if plus is None else plus.nbytes)
        shares = 2 * self.product.share_bytes(self.chunks) if self.chunks > 1 else 0
        down, across = self.product.tiles
        return A.nbytes + B.nbytes + ends, across * A.nbytes + down * B.nbytes + ends + shares


def stages(program: Program) -> Iterator[list[Work]]:
    for _, pairs in groupby(zip(program._products, program._lengths(), strict=True), lambda pair: pair[0].stage):
        yield [
            Work(
                product, ceil(min(length, product.sizes[2]) / product.loop.BK), max(1, ceil(product.sizes[2] / length))
            )
            for product, length in pairs
        ]


def stage_time(gpu: Gpu, works: Sequence[Work]) -> tuple[float, str]:
    """Seconds of a stage, and the resource that limits it."""
    chip = gpu.chip
    slots, tiles = RESIDENT * chip.multiprocessors, sum(work.tiles for work in works)
    busy = min(1, tiles / chip.multiprocessors)
    rate = {True: gpu.wide * TENSOR_SHARE, False: gpu.tf32 * TENSOR_SHARE}
    once, again = (sum(sizes) for sizes in zip(*(work.moved() for work in works), strict=True))
    arithmetic = {
        wide: sum(w.tiles * w.tile_flops for w in works if w.wide is wide) / rate[wide] / busy for wide in rate
    }
    bounds = {
        "DRAM": once / (chip.dram * DRAM_SHARE) if once > chip.L2_size / 4 else 0,
        "L2": again / min(chip.L2 * L2_SHARE, PORT * chip.clock * chip.multiprocessors * busy),
        "fp64": arithmetic[True],
        "tf32x3": arithmetic[False],
        "longest tile": max(max(w.steps * STEP, w.tile_flops / rate[w.wide] * chip.multiprocessors) for w in works),
        "latency": sum(work.tiles * work.steps for work in works) * STEP / slots,
    }
    bound = max(bounds, key=bounds.get)
    return WAIT + bounds[bound], bound


def program_launch(gpu: Gpu, name: str, program: Program, gates: set[int], sleeps: bool) -> Launch:
    """Launch of one matrix program; ``sleeps``: it returns at once if no gate is open."""
    parts, left_out = [], 0
    for number, works in enumerate(stages(program), 1):
        live = [work for work in works if work.product.gate is None or id(work.product.gate) in gates]
        left_out += sum(work.tiles for work in works) - sum(work.tiles for work in live)
        if live:
            size, flops = sum(work.moved()[0] for work in live), sum(work.flops for work in live)
            parts.append(Part(f"{name}, stage {number}", flops, size, *stage_time(gpu, live)))
    waves = 1 if sleeps and not parts else ceil(left_out / (RESIDENT * gpu.chip.multiprocessors))
    return Launch(name, parts, program.tiles, waves * GATED)


# --- one block a matrix -----------------------------------------------------------------------------------------------


def issue(gpu: Gpu, warps: int, instructions: float, fp64: float) -> float:
    """Clocks in which a multiprocessor issues this many instructions for each of these warps."""
    return max(ceil(warps / SCHEDULERS) * instructions, warps * fp64 * 32 / gpu.lanes)


def normals(gpu: Gpu, size: int) -> float:
    """Clocks in which one block draws ``size`` normal random numbers."""
    return ceil(size / (32 * WARPS)) * issue(gpu, WARPS, NORMAL, NORMAL_FP64)


def cholesky(gpu: Gpu, k: int) -> float:
    panel = 16 if k <= 160 else 8 if k <= 321 else 4
    return k**3 / 3 / (2 * gpu.lanes * FMA_SHARE) + k * COLUMN + ceil(k / panel) * 4 * FAR


def inverse(gpu: Gpu, k: int) -> float:
    return k**3 / (2 * gpu.lanes * FMA_SHARE) + k * DIVISION + ceil(k / 16) * 2 * FAR


def jacobi(gpu: Gpu, rows: int, length: int, size: int = 8) -> float:
    """Clocks of one-sided Jacobi on ``rows`` rows of this length; size: bytes per number."""
    for longest, group, *instructions, fp64 in MEETINGS:
        if length <= longest:
            busy = min(WARPS, ceil(rows / group) // 2 + 1)
            one = group * max(TURN, issue(gpu, busy, instructions[size // 8], fp64 * (size // 8)))
            break
    else:
        group, one = 1, TURN + 2 * ceil(length / 32) * IN_PLACE
    groups = ceil(rows / group)
    return SWEEPS[size] * groups * ceil((groups // 2 + 1) / WARPS) * one


def squares(size: int) -> float:
    return size / (32 * WARPS) * SUMMAND


def begin(gpu: Gpu, plan: Plan) -> tuple[float, float]:
    """(flops, clocks) of ck_begin."""
    weights = sum(x.W.nbytes for x in plan.matrices)
    read = max(weights / (gpu.chip.dram * DRAM_SHARE), DRAM_LATENCY) * gpu.chip.clock
    return 2 * sum(x.W.numel() for x in plan.matrices), max(read, 0, *(normals(gpu, x.n * PROBES) for x in plan.layers))


def small(gpu: Gpu, plan: Plan) -> tuple[float, float]:
    clocks = [jacobi(gpu, x.n, x.m, size=4) for x in plan.small]
    return sum(SWEEPS[4] * 4 * x.n**2 * x.m for x in plan.small), max([0, *clocks])


def orth(gpu: Gpu, plan: Plan) -> tuple[float, float]:
    tried = [x.k for x in plan.layers if x.k]
    return sum(4 * k**3 / 3 for k in tried), max([0, *(cholesky(gpu, k) + inverse(gpu, k) for k in tried)])


def ritz(gpu: Gpu, plan: Plan) -> tuple[float, float]:
    tried = [x.k for x in plan.layers if x.k]
    clocks = [cholesky(gpu, k) + jacobi(gpu, k, k) + normals(gpu, k * PROBES) + k * k / 32 for k in tried]
    return sum(k**3 / 3 + SWEEPS[8] * 4 * k**3 for k in tried), max([0, *clocks])


def judge(gpu: Gpu, plan: Plan) -> tuple[float, float]:
    tried = [x for x in plan.layers if x.k]
    clocks = [(x.m + 3 * x.k) * JUDGE_ROW + squares((5 * x.m + 4 * x.n) * PROBES) for x in tried]
    return sum(2 * PROBES**2 * (x.m + 3 * x.k) for x in tried), max([0, *clocks])


def finish(gpu: Gpu, plan: Plan) -> tuple[float, float]:
    return 0, max([0, *(squares(2 * x.n * PROBES) + 4 * x.n for x in plan.layers if not x.k)])


KERNELS = {
    "ck_begin": begin,
    "ck_small": small,
    "ck_orth": orth,
    "ck_ritz": ritz,
    "ck_judge": judge,
    "ck_finish": finish,
}


def kernel_launch(gpu: Gpu, name: str, plan: Plan) -> Launch:
    flops, clocks = KERNELS[name](gpu, plan)
    read = sum(x.W.nbytes for x in plan.matrices) if name == "ck_begin" else 0
    waves = ceil(len(plan.small if name == "ck_small" else plan.layers) / gpu.chip.multiprocessors)
    return Launch(name, [Part(name, flops, read, waves * clocks / gpu.chip.clock, "one block")], 0, 0)


# --- a step -----------------------------------------------------------------------------------------------------------


class Predicted(NamedTuple):
    launches: list[Launch]

    @property
    def seconds(self) -> float:
        return sum(launch.seconds for launch in self.launches)


def predict(gpu: Gpu, plan: Plan, beta: float = BETA) -> Predicted:
    """Launches of one step: the subspace route for layers that have a basis, matrix products for all others."""
    gates, found = open_gates(plan, beta), []
    for entry in launches(plan):
        if isinstance(entry, str):
            found.append(kernel_launch(gpu, entry, plan))
        else:
            found.append(
                program_launch(
                    gpu, f"program {1 + plan.programs.index(entry)}", entry, gates, entry is plan.programs[-1]
                )
            )
    return Predicted(found)
