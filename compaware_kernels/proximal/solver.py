"""Spectral solver: chooses a route for every matrix of every layer, computes all results, then writes all of them.

Routes, for a matrix with m >= n:

* ``zero``: the Frobenius norm is at most tau, so the result is zero; nothing is factorized;
* ``jacobi``: batches of small matrices (:func:`torch.ops.compaware.small_svd`);
* ``gram`` for up to 128 columns: all of them at once (:mod:`.gram_list`);
* ``subspace``: few singular values exceed tau, or did at the last call (:mod:`.subspace_iteration`);
* ``gram``, ``svd``: all others (:mod:`.gram`).

Matrices of extreme norm are multiplied by a power of two, which is exact, so that their norm is near 1 on every route.

A route that cannot verify the tolerance falls back to the next one. The tolerance concerns the computed result; its
rounding to the dtype of the weight comes on top, on every route.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from .._utils.autocast import without_autocast
from ..distributed.row_sharded import RowSharded
from ..ops.validation import check_finite
from . import gram as dense
from . import gram_list, jacobi
from .cuda import backend as gpu
from .error_bounds import rescale, storage, unit_roundoff
from .record import Record, unfold_all
from .spectral_functions import Spectral
from .subspace_iteration import FIRST, Subspace, columns_for
from .svt_info import SvtInfo
from .task import Task, check_fits, product_dtype, write
from .warm_state import WarmState

__all__ = ["FEW", "LITTLE", "compute", "in_parallel", "seed_of", "shrink_", "worth_it"]

FEW = 3  # a subspace may start with up to n / FEW columns, and grow to n / 2
LITTLE = 1e8  # total m n^2 of the matrices below which threads do not pay


def compute(task: Task) -> None:
    """Compute the result of one task by the first route that meets the tolerance; W stays unchanged."""
    task.normalize()
    if task.norm == 0 or task.function.count == 0 or (task.function.count is None and task.norm <= task.function.floor):
        task.method, task.reason = "zero", f"||W||_F is at most {rescale(task.norm, -task.exponent):.3g}"
        return
    X = task.matrix()
    if _by_subspace(task, X):
        return
    found = dense.by_gram(X, task.function, task.tol, task.norm, task.generator)
    found = found or dense.by_svd(X, task.function, task.norm)
    new = task.function(found.s)
    rank = int((new > 0).sum())
    task.s, task.method, task.dense = new[:rank], found.method, found
    keep = columns_for(rank) if rank * FEW < X.n else 0
    task.basis = found.V[:, :keep].to(X.X.dtype).clone()
    found.V = None
    u = unit_roundoff(product_dtype(task, X.X.dtype))
    task.error = found.error + (X.n + rank + 1) * u * task.norm


def _by_subspace(task: Task, X: RowSharded) -> bool:
    """Subspace iteration on X ``[m, n]`` in fp32, then fp64; False if neither pays or meets the tolerance."""
    function = task.function
    wanted = task.basis.shape[1] if task.basis is not None else max(FIRST, function.count or 0)
    if function.floor <= 0 and function.count is None:
        task.reason = "the threshold is 0"
    elif task.basis is not None and not wanted:
        task.reason = "full rank at the last call"
    elif not worth_it(X.rows_per_rank, X.n, wanted):
        task.reason = "too small, or of too high rank, for a subspace"
    else:
        for dtype in (torch.float32, torch.float64):
            if unit_roundoff(dtype) <= unit_roundoff(X.X.dtype) and not task.too_wide and _try_subspace(task, X, dtype):
                return True
    return False


def _try_subspace(task: Task, X: RowSharded, dtype: torch.dtype) -> bool:
    """Subspace iteration on X ``[m, n]`` in ``dtype``; sets the result of the task, or its reason for refusal."""
    function, n, generator = task.function, X.n, task.generator
    u = unit_roundoff(dtype)
    floor = function.floor if function.count is None else task.norm
    if 2 * u * task.norm > task.tol * floor:
        task.reason = f"{dtype} is too coarse for ||W||_F / tau = {task.norm / floor:.1e}"
        return False
    known = task.basis is not None and bool(((task.basis.norm(dim=0) - 1).abs() < 0.1).all())
    V = task.basis.to(dtype) if known else X.X.new_empty(n, 0, dtype=dtype)
    limits = {"max_columns": n // 2, "slack": 4 * u * task.norm, "square": X.square()}
    search = Subspace(X, function.floor, V, task.tol, generator, **limits, gain=function.gain, count=function.count)
    found = search.run()
    if found is None:
        task.too_wide = search.too_wide
        why = "needs too many columns" if search.too_wide else f"would not do in {dtype}"
        task.reason = f"a subspace {why}"
        return False
    new = function(found.s)
    r = int((new > 0).sum())
    task.s = new[:r]
    task.left, task.right = found.U[:, :r] * task.s.to(dtype), found.V[:, :r]
    moved = math.hypot(found.sketch.bound, found.tail)
    gain = function.lipschitz(found.s, min(found.below, float(found.s[-1])) if len(found.s) else 0.0, moved)
    task.error = moved * gain + (r + 1) * u * float(task.s.norm())
    task.basis = found.basis.to(X.X.dtype)
    task.method = f"subspace, fp{torch.finfo(dtype).bits}"
    task.reason = f"{search.passes} passes, {search.products} products"
    return True


def worth_it(m: int, n: int, columns: int) -> bool:
    """Cost model: whether a subspace of ``columns`` columns is cheaper than the Gram route for X ``[m, n]``, m >= n.

    In flops of fp32 matrix products; other operations enter as flops of about the same run time.
    """
    subspace = 2 * m * n * (3 * columns + 60) + 6 * (m + n) * columns**2 + 6e7
    return columns * FEW < n and subspace < 4 * m * n * n + 20 * n**3 + 5e6


def in_parallel(work: Callable[[Task], None], tasks: Sequence[Task]) -> None:
    """Run ``work`` on every task: large tasks one by one on all threads, the others concurrently, one thread each.

    Sharded tasks come first, in order, so that all ranks issue the same collectives in the same order.
    """
    for task in (task for task in tasks if task.shards):
        try:
            work(task)
        except RuntimeError as error:
            raise RuntimeError(f"{task.key.rpartition('.')[0]}: {error}") from error
    tasks = [task for task in tasks if not task.shards]
    threads = torch.get_num_threads()
    on_cpu = all(task.W.device.type == "cpu" for task in tasks)

    def cost(task: Task) -> int:
        return task.W.numel() * min(task.W.shape)

    total = sum(map(cost, tasks))
    if threads == 1 or len(tasks) <= 1 or not on_cpu or total < LITTLE:
        for task in tasks:
            work(task)
        return
    share = total / threads
    tasks = sorted(tasks, key=cost, reverse=True)
    large = [task for task in tasks if cost(task) > share]
    for task in large:
        work(task)
    list(_pool(threads).map(torch.no_grad()(work), tasks[len(large) :]))
    torch.set_num_threads(threads)  # the workers' set_num_threads(1) would become the default of new threads


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Pool of single-threaded workers, cached: a new worker would allocate the buffers of every library again."""
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def seed_of(state_seed: int, call: int, key: str) -> int:
    """Seed of the probes of one matrix in one call: the same on every rank and for every number of threads."""
    return (zlib.crc32(f"{state_seed}/{call}/{key}".encode()) << 20) + 1


# --- all layers -----------------------------------------------------------------------------------------------------


@without_autocast()
def shrink_(
    records: Sequence[Record],
    functions: Sequence[Spectral],  # one per record
    *,
    tol: float,
    state: WarmState | None = None,  # supplies and receives the bases; the caller advances it
    ball: bool = False,  # write W - f(W) instead
) -> list[SvtInfo]:
    """Spectral function of every weight, in place; all results are computed before any weight is written."""
    unfold_all(records)
    plain = not ball and all(record.center is None and record.shards is None for record in records)
    if gpu.takes([record.target for record in records], functions, plain):
        infos = gpu.shrink_(records, functions, tol, state)
    else:
        infos = _shrink_by_routes(records, functions, tol, state, ball)
    for record in records:
        record.fold_back()
    return infos


def _shrink_by_routes(records, functions, tol: float, state: WarmState | None, ball: bool) -> list[SvtInfo]:
    """Spectral function of every unfolded record by the routes of this module, on any device."""
    if gpu.on_gpu([record.target for record in records]):  # not validated yet, to avoid a synchronization
        for record in records:
            check_finite(record.target, record.label)
    small = groups_of(records, functions, tol)
    work: list[jacobi.Group | list[Task]] = [
        group or _tasks(record, function, tol, state)
        for group, record, function in zip(small, records, functions, strict=True)
    ]
    groups = [entry for entry in work if isinstance(entry, jacobi.Group)]
    tasks = [task for entry in work if isinstance(entry, list) for task in entry]
    for route, kind in ((jacobi, jacobi.Group), (gram_list, gram_list.Listed)):
        if mine := [group for group in groups if type(group) is kind]:
            route.compute(mine, tol, ball)
    in_parallel(compute, tasks)
    for task in tasks:
        check_fits(task, ball)
    if groups:
        jacobi.write(groups)
    in_parallel(lambda task: write(task, ball), tasks)
    for record, entry in zip(records, work, strict=True):
        if record.shards is not None:
            record.shards.from_row_shards(entry[0].W, record.target[0], entry[0].local_shapes)
    if state:
        dense = {"memory_format": torch.contiguous_format}  # the layout after loading a checkpoint
        state.remember({task.key: task.basis.clone(**dense) for task in tasks if task.basis is not None})
    return [_report(*each) for each in zip(records, work, strict=True)]


def groups_of(records: Sequence[Record], functions: Sequence[Spectral], tol: float) -> list[jacobi.Group | None]:
    """The weights whose matrices are small and computed together, by Jacobi or a Gram matrix; None for the others."""
    whole = {i: record for i, record in enumerate(records) if record.shards is None}
    targets = [record.target for record in whole.values()]
    small, many = jacobi.small_shapes(targets), jacobi.small_shapes(targets, alone=0)

    def groups(kind: type[jacobi.Group], shapes: Container) -> dict:
        entries = ((i, r) for i, r in whole.items() if r.target.shape[-2:] in shapes)
        return {i: kind(r.target, functions[i], r.target_center, r.label, r.stored_as) for i, r in entries}

    others = {W.shape[-2:] for W in targets} - many
    found = groups(jacobi.Group, small) | gram_list.served(groups(gram_list.Listed, others), tol)
    return [found.get(i) for i in range(len(records))]


def _tasks(record: Record, function: Spectral, tol: float, state: WarmState | None) -> list[Task]:
    """One task per matrix of a weight ``[..., m, n]``."""
    W, center, key, tol = record.target, record.target_center, record.key, function.tolerance(tol)
    m, n = W.shape[-2:]
    stored_as = record.stored_as or W.dtype
    if record.shards is not None:
        X, local_shapes = record.shards.to_row_shards(W[0])
        C = None if center is None else record.shards.to_row_shards(center[0])[0]
        sharded = {"shards": record.shards, "local_shapes": local_shapes}
        tasks = [Task(X, function, C, f"{key}.0", record.label, stored_as, tol, **sharded)]
    elif not W.numel():
        return []
    else:
        matrices = W.reshape(-1, m, n)
        centers = [None] * len(matrices) if center is None else center.reshape(-1, m, n)
        pairs = enumerate(zip(matrices, centers, strict=True))
        tasks = [Task(M, function, C, f"{key}.{j}", record.label, stored_as, tol) for j, (M, C) in pairs]
    for task in tasks:
        _recall(task, state)
    return tasks


def _recall(task: Task, state: WarmState | None) -> None:
    """Set the warm basis and the probe seed of a task; both are independent of how the matrix is sharded."""
    if state:
        V = state.bases.get(task.key)
        task.basis = V.to(task.W.device) if V is not None and V.shape[0] == task.shape[1] else None
    task.seed = seed_of(state.seed, state.calls, task.key) if state else seed_of(0, 0, task.key)


def _report(record: Record, entry: jacobi.Group | list[Task]) -> SvtInfo:
    """SvtInfo of one weight, from its Jacobi group or its tasks."""
    W, name = record.target, record.name
    if isinstance(entry, jacobi.Group):
        return SvtInfo(entry.rank, entry.s, entry.error, entry.method, "small", name)
    shape = record.shards.shape if record.shards else W.shape[-2:]
    batch, k = W.shape[:-2], min(shape)
    if not entry:
        zeros = torch.zeros(batch, dtype=torch.float64)
        return SvtInfo(zeros.long(), zeros[..., None].expand(*batch, k).clone(), zeros, "empty", "", name)
    numel = math.prod(shape)
    s = torch.zeros(len(entry), k, dtype=torch.float64)
    for row, task in zip(s, entry, strict=True):
        row[: len(task.s)] = rescale(task.s.cpu(), -task.exponent)
    error = [rescale(task.error, -task.exponent) + storage(W.dtype, task.stored, numel) for task in entry]
    methods, reasons = (list(dict.fromkeys(getattr(t, what) for t in entry)) for what in ("method", "reason"))
    shape = [s.reshape(*batch, k), torch.tensor(error, dtype=torch.float64).reshape(batch)]
    return SvtInfo((s > 0).sum(-1).reshape(batch), *shape, " + ".join(methods), "; ".join(reasons), name)
