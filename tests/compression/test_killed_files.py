"""SIGKILL at any moment of save and export_lora: there is always a complete file or adapter, the old or the new one."""

import copy
import json
import os
import random
import time

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import nn

import compaware_kernels as ck
from compaware_kernels._utils.atomic_write import atomic_folder
from compaware_kernels.compression.peft_export import CONFIG, WEIGHTS

KILLS = 36  # of each writer


def network(version):
    """Network whose weights are all this number."""
    model = nn.Sequential(nn.Linear(120, 120), nn.Linear(120, 60))
    return model.requires_grad_(False).apply(lambda m: [p.fill_(version) for p in m.parameters(recurse=False)])


def save(path, version):
    ck.save(network(version), path)


def adapter(path, version):
    ck.export_lora(network(version), network(0), path)


def folder(path, version):
    """What export_lora ends with, hundreds of times a second."""
    with atomic_folder(path) as new:
        for name in "ab":
            (new / name).write_text(str(version))


def loaded(path):
    """Version of the saved model."""
    (version,) = {float(T.unique()) for T in ck.load(path, network(0)).state_dict().values()}
    return version


def loaded_adapter(path):
    config, tensors = json.loads((path / CONFIG).read_text()), load_file(path / WEIGHTS)
    assert config["r"] == 1
    (version,) = {float(T.unique()) for name, T in tensors.items() if name.endswith("bias")}
    return version


def read(path):
    (version,) = {float((path / name).read_text()) for name in "ab"}
    return version


WRITERS = {"save": (save, loaded), "export_lora": (adapter, loaded_adapter), "folder": (folder, read)}


def slow_rename(*paths, rename=os.replace):
    rename(*paths)
    time.sleep(0.002)


def work(name, path, first, counter):
    torch.set_num_threads(1)
    os.replace = slow_rename  # so that processes are killed after a rename that is not the last
    write, _ = WRITERS[name]
    for version in range(first, first + 100_000):
        write(path, version)
        counter[0] = version


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_killed_while_writing(tmp_path, name):
    context, chance, counter = mp.get_context("forkserver"), random.Random(0), torch.zeros(1).share_memory_()
    context.set_forkserver_preload(["torch", "compaware_kernels"])
    path, version = tmp_path / "target", 1
    for _ in range(KILLS):
        before = copy.copy(float(counter[0]))
        process = context.Process(target=work, args=(name, path, version, counter), daemon=True)
        process.start()
        while counter[0] == before and process.is_alive():
            time.sleep(1e-4)
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.join(60)
        assert process.exitcode == -9
        done = float(counter[0])
        assert WRITERS[name][1](path) in (done, done + 1), "lost, or neither the old nor the new one"
        version = int(done) + 2
    left = [other.name for other in tmp_path.iterdir() if other != path]
    assert len(left) <= KILLS and all(each.startswith(".compaware-") for each in left)
