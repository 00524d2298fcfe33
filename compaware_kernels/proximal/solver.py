"""Every layer in one call: which route each matrix takes, all of them computed, then all of them written.

Routes, for the short side n of a matrix:

* ``zero``: the Frobenius norm is at most tau, so the result is zero; nothing is factorised;
* ``jacobi``: small matrices, many at a time (:func:`torch.ops.compaware.small_svd`);
* ``subspace``: the triplets above tau are few, or were at the last call (:mod:`.subspace_iteration`);
* ``gram``, ``svd``: the rest (:mod:`.gram`).

A route that cannot show that it met the tolerance hands over to the next one. The tolerance is about what is computed;
storing the result in the dtype of the weight rounds it, whatever the route.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from .._utils.dtypes import compute_dtype
from ..distributed.dtensor import MatrixSharding
from ..distributed.row_sharded import RowSharded
from ..ops.linalg import ROWS, product
from ..ops.validation import check_finite
from . import gram as dense
from . import jacobi
from .cuda import backend as gpu
from .error_bounds import in_range, norms, storage, unit_roundoff
from .record import Record, unfold_all
from .spectral_functions import Spectral
from .subspace_iteration import FIRST, Subspace, columns_for
from .svt_info import SvtInfo
from .warm_state import WarmState

FEW = 3  # a subspace may begin with n / FEW columns, and grow to n / 2
LITTLE = 1e8  # multiplications of a matrix product, below which threads are not worth starting


@dataclass
class Task:
    """One matrix on its way through the engine, or what lies here of one that is divided by rows, m >= n or not."""

    W: Tensor  # [m, n], written at the end
    function: Spectral
    center: Tensor | None
    key: str  # in the state
    tol: float  # of the matrix: its function moves by up to ``slope`` times as much
    basis: Tensor | None = None  # from the state
    seed: int = 0
    shards: MatrixSharding | None = None  # then W is this rank's row shard of the tall matrix,
    local_shapes: Sequence[torch.Size] = ()  # with the local shapes before each all-to-all, to undo it
    norm: float = 0.0  # >= ||W - center||_F
    too_wide: bool = False  # the subspace that would be needed
    # what comes out
    method: str = ""
    reason: str = ""
    s: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))  # of the result, without its zeros
    error: float = 0.0
    stored: float = 0.0  # >= the Frobenius norm of what is rounded to the dtype of W
    left: Tensor | None = None  # the result is left right^T
    right: Tensor | None = None
    dense: dense.Dense | None = None

    @property
    def tall(self) -> bool:
        return self.shards is not None or self.W.shape[0] >= self.W.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """m, n of the whole matrix, m >= n."""
        m, n = sorted(self.W.shape if self.shards is None else self.shards.shape, reverse=True)
        return m, n

    def matrix(self) -> RowSharded:
        """X [m, n], m >= n, in the compute dtype: fp32, or fp64 where the weight is, or a difference needs it."""
        dtype = compute_dtype(self.W.dtype)
        X = jacobi.difference(self.W, self.center)
        X = X.to(dtype if self.center is None else _product_dtype(self, dtype))
        return RowSharded(X if self.tall else X.mT, self.shape[0], () if self.shards is None else self.shards.groups)

    def norm_of(self, W: Tensor) -> float:
        """>= the Frobenius norm of the whole, whose part here is W."""
        norm = float(norms(W))
        return norm if self.shards is None else RowSharded(W, 0, self.shards.groups).global_norm(norm)

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator(self.W.device).manual_seed(self.seed)


def compute(task: Task) -> None:
    """Find the result of one task; write nothing."""
    task.norm = task.norm_of(jacobi.difference(task.W, task.center))
    if task.norm == 0 or task.function.count == 0 or (task.function.count is None and task.norm <= task.function.floor):
        task.method, task.reason = "zero", f"||W||_F is at most {task.norm:.3g}"
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
    u = unit_roundoff(_product_dtype(task, X.X.dtype))
    task.error = found.error + (X.n + rank + 1) * u * task.norm


def _by_subspace(task: Task, X: RowSharded) -> bool:
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
    function, n, generator = task.function, X.n, task.generator
    u = unit_roundoff(dtype)
    floor = function.floor if function.count is None else task.norm
    if 2 * u * task.norm > task.tol * floor or not in_range(dtype, task.norm, floor):
        task.reason = f"{dtype} is too coarse for ||W||_F / tau = {task.norm / floor:.1e}"
        return False
    known = task.basis is not None and bool(((task.basis.norm(dim=0) - 1).abs() < 0.1).all())
    V = task.basis.to(dtype) if known else X.X.new_empty(n, 0, dtype=dtype)
    limits = {"max_columns": n // 2, "slack": 4 * u * task.norm}
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
    """Whether a subspace of so many columns is cheaper than a Gram matrix and its eigenvectors.

    In flops of an fp32 matrix product; what is no such product is counted by about the time it takes.
    """
    subspace = 2 * m * n * (3 * columns + 60) + 6 * (m + n) * columns**2 + 6e7
    return columns * FEW < n and subspace < 4 * m * n * n + 20 * n**3 + 5e6


def write(task: Task, ball: bool) -> None:
    """Put the result in its place."""
    W, center = task.W, task.center
    if task.left is not None:
        left, right = (task.left, task.right) if task.tall else (task.right, task.left)
        right = right.mT.contiguous().mT
        for part in _row_ranges(W):
            P = product(left[part], right.mT)
            W[part] = W[part] - P if ball else P if center is None else P + center[part].to(P.dtype)
    elif task.dense is not None:
        dtype = _product_dtype(task, torch.float64 if W.dtype == torch.float64 else torch.float32)
        X = task.matrix().X
        dtype = torch.promote_types(dtype, X.dtype)
        X = X.to(dtype)
        L, R = task.dense.L.to(dtype), task.dense.R
        XK = product(X, L) if R is None else product(product(X, L), R.to(dtype).mT)
        XK = XK if task.tall else XK.mT
        if ball != task.dense.residual:  # X K is not what is wanted, but what is taken away
            XK = (X if task.tall else X.mT) - XK
        W.copy_(XK if center is None else XK + center.to(dtype))
    elif not ball:
        W.zero_() if center is None else W.copy_(center)
    # P and a center, or a difference, are rounded once when added, and once when stored
    task.stored = 2.02 * task.norm_of(W) if ball or center is not None else float(task.s.norm())


def _row_ranges(W: Tensor) -> list[slice]:
    rows = max(1, ROWS // W.shape[1])
    return [slice(start, start + rows) for start in range(0, W.shape[0], rows)]


def _product_dtype(task: Task, dtype: torch.dtype) -> torch.dtype:
    """The dtype the dense routes multiply in: fp64 where fp32 could not give the tolerance."""
    coarse = 32 * unit_roundoff(dtype) * task.norm > task.tol * task.function.floor
    extreme = not 1e-25 < task.norm < 1e25  # where fp32 products underflow or overflow
    return torch.float64 if extreme or (coarse and task.function.count is None) else dtype


def in_parallel(work: Callable[[Task], None], tasks: Sequence[Task]) -> None:
    """Do the work on every task: large ones in turn on all threads, the others side by side on one thread each.

    Divided ones come first, in order: all who share in them must do the same at the same time.
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
    torch.set_num_threads(threads)  # the workers' setting is what new threads of the program would get


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Workers of one thread each, kept: new ones would first set up the buffers of every library."""
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def seed_of(state_seed: int, call: int, key: str) -> int:
    return (zlib.crc32(f"{state_seed}/{call}/{key}".encode()) << 20) + 1


# --- all layers -----------------------------------------------------------------------------------------------------


def shrink_(
    records: Sequence[Record],
    functions: Sequence[Spectral],  # of the singular values, one per record
    *,
    tol: float,
    state: WarmState | None = None,  # read, and given the bases; its caller counts the calls
    ball: bool = False,  # write W - f(W) instead
) -> list[SvtInfo]:
    """Apply to every weight, in place, the function of its singular values.  Nothing is written before all is known."""
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
    if gpu.on_gpu([record.target for record in records]):  # not checked yet, as that would wait for it
        for record in records:
            check_finite(record.target, record.label)
    small = jacobi.small_shapes([record.target for record in records if record.shards is None])
    work: list[jacobi.Group | list[Task]] = []
    for record, function in zip(records, functions, strict=True):
        if record.shards is None and tuple(record.target.shape[-2:]) in small:
            work.append(jacobi.Group(record.target, function, record.target_center))
        else:
            work.append(_tasks(record, function, tol, state))
    groups = [entry for entry in work if isinstance(entry, jacobi.Group)]
    tasks = [task for entry in work if isinstance(entry, list) for task in entry]
    if groups:
        jacobi.compute(groups, tol, ball)
    in_parallel(compute, tasks)
    if groups:
        jacobi.write(groups)
    in_parallel(lambda task: write(task, ball), tasks)
    for record, entry in zip(records, work, strict=True):
        if record.shards is not None:
            record.shards.from_row_shards(entry[0].W, record.target[0], entry[0].local_shapes)
    if state:
        dense = {"memory_format": torch.contiguous_format}  # as it comes back from a checkpoint
        state.remember({task.key: task.basis.clone(**dense) for task in tasks if task.basis is not None})
    return [_report(*each) for each in zip(records, work, strict=True)]


def _tasks(record: Record, function: Spectral, tol: float, state: WarmState | None) -> list[Task]:
    """A task for every matrix of a weight."""
    W, center, key, tol = record.target, record.target_center, record.key, function.tolerance(tol)
    m, n = W.shape[-2:]
    if record.shards is not None:
        X, local_shapes = record.shards.to_row_shards(W[0])
        C = None if center is None else record.shards.to_row_shards(center[0])[0]
        tasks = [Task(X, function, C, f"{key}.0", tol, shards=record.shards, local_shapes=local_shapes)]
    elif not W.numel():
        return []
    else:
        matrices = W.reshape(-1, m, n)
        centers = [None] * len(matrices) if center is None else center.reshape(-1, m, n)
        pairs = enumerate(zip(matrices, centers, strict=True))
        tasks = [Task(M, function, C, f"{key}.{j}", tol) for j, (M, C) in pairs]
    for task in tasks:
        _recall(task, state)
    return tasks


def _recall(task: Task, state: WarmState | None) -> None:
    """The basis that the last call left, and the seed of the probes: the same however the matrix is sharded."""
    if state:
        V = state.bases.get(task.key)
        task.basis = V.to(task.W.device) if V is not None and V.shape[0] == task.shape[1] else None
    task.seed = seed_of(state.seed, state.calls, task.key) if state else seed_of(0, 0, task.key)


def _report(record: Record, entry: jacobi.Group | list[Task]) -> SvtInfo:
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
        row[: len(task.s)] = task.s.cpu()
    error = [task.error + storage(W.dtype, task.stored, numel) for task in entry]
    ranks = torch.tensor([len(task.s) for task in entry], dtype=torch.int64)
    methods, reasons = (list(dict.fromkeys(getattr(t, what) for t in entry)) for what in ("method", "reason"))
    shape = [s.reshape(*batch, k), torch.tensor(error, dtype=torch.float64).reshape(batch)]
    return SvtInfo(ranks.reshape(batch), *shape, " + ".join(methods), "; ".join(reasons), name)
