"""Several processes for a test: one gloo group on this machine, from a server that has imported torch already."""

import os
import pickle
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from threadpoolctl import threadpool_limits

LIMIT = 120.0  # seconds


def run(work, processes, *args):
    """``work(rank, *args)`` in so many processes; what each returns, by rank.  Raises what the first one raised."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "compaware_kernels", "torch.distributed.tensor", "torch.distributed.fsdp"])
    with tempfile.TemporaryDirectory() as folder:
        entries = [(rank, processes, folder, work, args) for rank in range(processes)]
        started = [context.Process(target=_enter, args=entry, daemon=True) for entry in entries]
        for process in started:
            process.start()
        for process in started:
            process.join(LIMIT)
        hanging = [rank for rank, process in enumerate(started) if process.is_alive()]
        for process in started:
            process.kill()
        found = [_read(os.path.join(folder, f"{rank}")) for rank in range(processes)]
    failures = [f"process {rank}:\n{error}" for rank, (error, _) in enumerate(found) if error]
    assert not failures, "\n".join(failures)
    assert not hanging, f"processes {hanging} did not end in {LIMIT} s"
    return [result for _, result in found]


def _enter(rank, processes, folder, work, args):
    torch.set_num_threads(1)
    threadpool_limits(1)  # NumPy's: the processes share few cores
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    store = dist.FileStore(os.path.join(folder, "store"), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=60))
    error = result = None
    try:
        result = work(rank, *args)
    except BaseException:
        error = traceback.format_exc()
    with open(os.path.join(folder, f"{rank}.part"), "wb") as file:
        pickle.dump((error, result), file)
    os.replace(os.path.join(folder, f"{rank}.part"), os.path.join(folder, f"{rank}"))
    if error is None:
        dist.destroy_process_group()


def _read(path):
    if not os.path.exists(path):
        return None, None
    with open(path, "rb") as file:
        return pickle.load(file)
