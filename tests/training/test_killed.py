"""SIGKILL at any moment of training: complete checkpoints, and resuming gives the weights of uninterrupted training."""

import random
import runpy
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import compaware_kernels as ck
from tests.compression.test_checkpoints import assert_same, start, train

save_atomically = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "plain_pytorch.py"))["save_atomically"]
STEPS, KILLS = 60, 9
PADDING = nn.Linear(1500, 1000)  # so that writing takes a while
NOTHING, PROX, CHECKPOINT, MODEL = range(4)  # phases of training: optimizer, proximal step, writing either file


def load(folder):
    """Model, optimizer and ProximalStep from the checkpoint, if there is one, and the steps done."""
    parts, done = start(), 0
    parts[2].every = 1
    if (folder / "checkpoint.pt").exists():
        *states, _, done = torch.load(folder / "checkpoint.pt", weights_only=True)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
    return parts, done


def saved(folder):
    return ck.load(folder / "model.safetensors", nn.ModuleList([start()[0], PADDING]))[0]


def work(folder, at):
    torch.set_num_threads(1)
    parts, done = load(folder)
    model, optimizer, prox = parts
    take = prox.step

    def step():
        at[0] = PROX
        take()

    prox.step = step
    for i in range(done, STEPS):
        at[0] = NOTHING
        train(model, optimizer, i, i + 1)
        at[0] = CHECKPOINT
        save_atomically([*(part.state_dict() for part in parts), PADDING.weight.data, i + 1], folder / "checkpoint.pt")
        at[0] = MODEL
        ck.save(nn.ModuleList([model, PADDING]), folder / "model.safetensors")
    at[0] = NOTHING


def run(context, folder, kill=None, wait=0.0):
    """Train in a process; kill it ``wait`` seconds after it reached phase ``kill``. Returns the phase at its end."""
    folder.mkdir(exist_ok=True)
    at = torch.zeros(1, dtype=torch.int8).share_memory_()
    process = context.Process(target=work, args=(folder, at), daemon=True)
    process.start()
    if kill is not None:
        while at[0] != kill and process.is_alive():
            time.sleep(1e-4)
        time.sleep(wait)
        process.kill()
    process.join(60)
    assert process.exitcode == (0 if kill is None else -9), "failed, or done before it could be killed"
    return int(at[0])


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    context, chance, seen, before = mp.get_context("forkserver"), random.Random(0), set(), 0
    context.set_forkserver_preload(["torch", "compaware_kernels", "torch.distributed.checkpoint"])
    run(context, tmp_path / "whole")
    folder = tmp_path / "killed"
    for i in range(3 * KILLS):
        seen.add(run(context, folder, (PROX, CHECKPOINT, MODEL)[i % 3], chance.uniform(0, 0.01)))
        _, done = load(folder)
        assert before <= done < STEPS
        before = done
        if (folder / "model.safetensors").exists():
            assert all(p.isfinite().all() for p in saved(folder).parameters())
        if i >= KILLS and len(seen - {NOTHING}) == 3:
            break
    assert {PROX, CHECKPOINT, MODEL} <= seen, seen
    run(context, folder)
    (parts, done), (wanted, _) = load(folder), load(tmp_path / "whole")
    assert done == STEPS
    assert_same(parts, wanted)
    torch.testing.assert_close(saved(folder).state_dict(), wanted[0].state_dict(), rtol=0, atol=0)
    left = {path.name for path in folder.iterdir()} - {"checkpoint.pt", "model.safetensors"}
    assert len(left) <= 3 * KILLS and all(name.startswith(".") for name in left), left
