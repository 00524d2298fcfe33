"""Peak memory of one call beyond the weights, the warm state and what was loaded before.

    python -m bench.proximal.memory "resnet50" warm

The second call on the same weights is measured, after freed memory was given back to the system: the difference of the
peak resident set during the call, which Linux resets on request, and of the resident set before. Each row needs a
process of its own (:func:`measure`).
"""

import ctypes
import gc
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from bench.proximal import peers
from bench.proximal.cases import CASES, drifted

ROWS = ("warm", "cold", "svd", "gram_eigh_fp64", "svd_lowrank", "warm_subspace")


def status(key: str) -> int:
    """An entry of /proc/self/status in bytes."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak(function) -> int:
    """Bytes by which the resident set grows at most during the second of two calls."""
    function()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    function()
    return max(0, status("VmHWM") - before)


def measure(case: str, row: str) -> dict[str, float]:
    """MB of the peak, and of the weights, measured in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "bench.proximal.memory", case, row]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def main(case: str, row: str) -> None:
    found = drifted(*CASES[case], directions=256)
    Ws = [W.clone() for W in found.weights]
    if row in found.calls:
        call = found.calls[row]
    else:
        peer, known = getattr(peers, row), found.ranks
        if peer in peers.WARM:
            known = peers.last_vectors(found.previous, found.ranks)

        def call(Ws):
            for W, what in zip(Ws, known, strict=True):
                W.copy_(peer(W, what))

    def step():
        torch._foreach_copy_(Ws, found.weights)
        call(Ws)

    weights = sum(W.numel() * W.element_size() for W in Ws)
    print(json.dumps({"peak MB": peak(step) / 1e6, "weights MB": weights / 1e6}))


if __name__ == "__main__":
    main(*sys.argv[1:])
