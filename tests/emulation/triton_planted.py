"""Bugs to inject into the matrix programs: text replaced in the source, its replacement, and the check to detect it."""

import importlib.util
from pathlib import Path

NEXT, LATER = "        tl.debug_barrier()\n", "            tl.debug_barrier()\n    "
OPEN = "        gate = tl.load(problem + 5)\n"
IS_OPEN = "tl.load(gate.to(tl.pointer_type(tl.int32)), mask=gate != 0, other=1) != 0"
WAIT = "        while done < wanted:\n"
WAIT_IF_OPEN = OPEN + f"        while (done < wanted) & ({IS_OPEN}):\n"
DONE = '        tl.atomic_add(_counter(counters, problem), 1, sem="release", scope="gpu")\n'
STORE = "        tl.store(shares + tl.load(tile + 3) * (BM * BN) + at, total)\n"
GATHER = "        if last:\n"

IN_KERNEL = {
    "no wait": ("chain", (WAIT, "        while done < 0:\n")),
    "one tile is not waited for": ("short chain", (WAIT, "        while done < wanted - 1:\n")),
    "done before it is stored": ("chain", (DONE, ""), (OPEN, DONE + OPEN)),
    "a shut tile does not wait": ("shut chain", (WAIT, WAIT_IF_OPEN)),
    "a shut tile is not counted": ("shut chain", (NEXT + DONE, LATER + DONE)),
    "a shut tile is computed": ("shut chain", (IS_OPEN, "True")),
    "layers share a counter": ("two layers", ("counters + 1 + tl.load(problem + 20)", "counters + 1")),
    "the last tickets first": ("chain", ("ticket.to(tl.int64) * 4", "(last - 1 - ticket).to(tl.int64) * 4")),
    "a row too many of A": ("ragged", ("i < M - first_m", "i <= M - first_m")),
    "a column too many of B": ("ragged", ("j < N - first_n", "j <= N - first_n")),
    "a row too many of C": ("ragged", ("(i < M - m)", "(i <= M - m)")),
    "a column too many of C": ("ragged", ("(j < N - n)", "(j <= N - n)")),
    "a row too few": ("ragged", ("(i < M - m)", "(i < M - m - 1)")),
    "one too many of K": ("ragged", ("k < K - at", "k <= K - at")),
    "one too few of K": ("ragged", ("k < K - at", "k < K - at - 1")),
    "K has no end": ("ragged", ("k < K - at", "k < BK")),
    "plus is read in vain": ("ragged", ("if beta != 0:", "if given:")),
    "I in every tile": ("ragged", ("(m + i)[:, None] == (n + j)", "i[:, None] == j")),
    "a share has no end": ("sums", ("min(K, first_k + length)", "K")),
    "arrivals stay": ("sums", ("tl.store(arrivals, 0)", "tl.store(arrivals, chunks)")),
    "the last but one sums": ("sums", ("== chunks - 1", "== chunks - 2")),
    "arrival before the share": ("sums", (STORE, ""), (GATHER, STORE + GATHER)),
    "a share too few": ("sums", ("for _ in range(chunks)", "for _ in range(chunks - 1)")),
    "one tile's shares": ("sums", ("(here * chunks).to", "(here * 0).to")),
    "one part of fp32 on the right": ("types", ("b - near, total", "b * 0, total")),
    "one part of fp32 on the left": ("types", ("tl.dot(a - near, ", "tl.dot(a * 0, ")),
    "tf32 for fp32": ("types", ("input_precision=PRECISION", 'input_precision="tf32"')),
}
IN_TABLES = {
    "no stage waits": ("chain", ("before, stage = now.copy(), product.stage", "stage = product.stage")),
    "shares are not waited for": ("sums", ("+= down * across * chunks", "+= down * across")),
    "arrivals for two": ("sums", ("waiting += down * across", "waiting += 0")),
    "shares for two": ("sums", ("used += product.share_bytes(chunks)", "used += 0")),
    "some vectors are whole": ("vectors", ("2 * all(n % VECTOR", "2 * any(n % VECTOR")),
    "plus lies as C does": ("vectors", ("for X in (C, plus) if X", "for X in (C,) if X")),
    "plus is not transposed": ("strides", ("None if plus is None else plus.T", "plus")),
}
IN_CODE = {
    "no barrier": ("told without a barrier after the store", (NEXT + DONE, DONE)),
    "done before it is stored": ("stored and not told", (DONE, ""), (OPEN, DONE + OPEN)),
    "never done": ("stored and not told", (DONE, "")),
    "a shut tile is not counted": ("the next ticket before all is told", (NEXT + DONE, LATER + DONE)),
    "nothing is released": ("too few or too many atomics", ('1, sem="release"', '1, sem="relaxed"')),
    "nothing is acquired": ("too few or too many atomics", ('0, sem="acquire"', '0, sem="relaxed"')),
    "shares are not acquired": ("too few or too many atomics", ('sem="acq_rel"', 'sem="release"')),
    "shares are not released": ("too few or too many atomics", ('sem="acq_rel"', 'sem="acquire"')),
    "for one multiprocessor": ("not for the whole GPU", ('"release", scope="gpu"', '"release", scope="cta"')),
}


def plant(module, folder, *replaced):
    """The module with some texts replaced in its source."""
    source = Path(module.__file__).read_text()
    for old, new in replaced:
        assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in the source"
        source = source.replace(old, new)
    path = folder / "planted.py"
    path.write_text(source)
    name = f"{module.__name__.rpartition('.')[0]}.planted"
    spec = importlib.util.spec_from_file_location(name, path)
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    return planted
