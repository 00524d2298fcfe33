"""Several processes for a test: one gloo group on this machine per number of processes, reused from test to test."""

import os
import pickle
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from threadpoolctl import threadpool_limits

LIMIT = 120.0  # seconds
SEED = torch.Generator().initial_seed()  # of the default generator in a new process

_teams: dict[int, "Team"] = {}  # by number of processes


def run(work, processes, *args):
    """Run ``work(rank, *args)`` in this many processes; returns the results by rank, None for a process that died.

    Raises what the first one raised. A group in which a process raised, died or hung is not used again. ``work`` must
    undo what it changes for its whole process.
    """
    team = _teams.pop(processes, None) or Team(processes)
    found, hanging = team.run(work, args)
    failures = [f"process {rank}:\n{error}" for rank, (error, _) in enumerate(found) if error]
    if failures or hanging or not team.whole:
        team.end()
    else:
        _teams[processes] = team
    assert not failures, "\n".join(failures)
    assert not hanging, f"processes {hanging} did not end in {LIMIT} s"
    return [result for _, result in found]


class Team:
    """Processes of one gloo group, forked by a server that has imported torch already. They end with this process."""

    def __init__(self, processes):
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(
            ["torch", "compaware_kernels", "torch.distributed.tensor", "torch.distributed.fsdp"]
        )
        self.folder, self.whole, self.started, self.pipes = tempfile.TemporaryDirectory(), True, [], []
        for rank in range(processes):
            here, there = context.Pipe()
            entry = (rank, processes, os.path.join(self.folder.name, "store"), there)
            self.started.append(context.Process(target=_serve, args=entry, daemon=True))
            self.started[-1].start()
            there.close()  # so that the process's end closes the pipe
            self.pipes.append(here)

    def run(self, work, args):
        """(error, result) of each process, and the ranks of those that have not answered in time."""
        found, until = [(None, None) for _ in self.pipes], time.monotonic() + LIMIT
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((work, args)))
        while waiting and (ready := wait(waiting, until - time.monotonic())):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    found[rank] = pipe.recv()
                except (EOFError, OSError):  # the process died
                    self.whole = False
        return found, sorted(waiting.values())

    def end(self):
        for process in self.started:
            process.kill()
        self.folder.cleanup()


def _serve(rank, processes, store, pipe):
    torch.set_num_threads(1)
    threadpool_limits(1)  # NumPy's: the processes share few cores
    store = dist.FileStore(store, processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=60))
    error = None
    while error is None:  # a failed process ends, and so unblocks those that wait for it in a collective
        result = None
        try:
            received = pipe.recv_bytes()
        except EOFError:
            return
        try:
            work, args = pickle.loads(received)
            torch.manual_seed(SEED)
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = True
            result = work(rank, *args)
        except BaseException:
            error = traceback.format_exc()
        pipe.send((error, result))
